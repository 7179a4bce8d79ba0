"""`workbench doctor` and `workbench lab`: this machine, a model on it, and JupyterLab."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `workbench`; they look at no runs, so `common` is not for them."""
    check = commands.add_parser("doctor", help="versions, devices, and how well a model fits")
    check.add_argument("model", nargs="?", default="organism", help="organism, tiny:FAMILY, a folder or a hub name")
    check.set_defaults(action=doctor)

    open_lab = commands.add_parser("lab", help="open JupyterLab on the notebooks")
    open_lab.add_argument("notebooks", nargs="?", default="notebooks", metavar="FOLDER")
    open_lab.add_argument("options", nargs="*", metavar="-- OPTION", help="options for JupyterLab, after --")
    open_lab.set_defaults(action=lab)


def doctor(arguments: argparse.Namespace) -> int:
    """Print versions, devices and the compatibility card of a model."""
    import torch

    from workbench.environment import n_cpus, versions
    from workbench.subject import Subject

    print("versions  " + "  ".join(f"{name} {version}" for name, version in versions().items()))
    memory = (
        f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB" if os.name == "posix" else ""
    )
    print(f"cpu       {n_cpus()} cores, {torch.get_num_threads()} threads{memory}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}    {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda      none")
    print(Subject.open(arguments.model).card)
    return 0


def lab(arguments: argparse.Namespace) -> int:
    """Replace this process by JupyterLab on the notebooks."""
    from workbench.run import RUNS_VARIABLE, default_runs

    folder = Path(arguments.notebooks)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Start in the project, or name the notebooks' folder.")
    os.environ.setdefault(RUNS_VARIABLE, str(default_runs().resolve()))
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    if not os.access(Path.home(), os.W_OK):  # a class's machines may have no home to write to
        home = tempfile.mkdtemp(prefix="workbench-home-")
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            os.environ.setdefault(name, str(Path(home, name.lower())))
    words = [sys.executable, "-m", "jupyterlab", str(folder), *arguments.options]
    os.execv(sys.executable, words)
