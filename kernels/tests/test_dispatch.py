"""Which implementation answers: told by the tensors, refused in words, never silently another."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from workbench_kernels import dispatch


def test_auto_takes_the_reference_on_the_cpu_and_triton_on_cuda(device: torch.device) -> None:
    x = torch.zeros(2, device=device)
    assert dispatch.choose("auto", x, None) == ("triton" if device.type == "cuda" else "reference")
    assert dispatch.choose("reference", x) == "reference"
    assert dispatch.choose("triton", x) == "triton"  # in the interpreter, where there is no GPU


def test_triton_where_it_cant_run_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"'triton' for tensors on cpu, expected CUDA.*TRITON_INTERPRET=1"):
        dispatch.choose("triton", x)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"triton is not installed.*impl='reference'"):
        dispatch.choose("triton", x)
    assert dispatch.choose("auto", x) == "reference"


def test_unknown_names_and_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'cuda', expected one of auto, triton, reference"):
        dispatch.choose("cuda", torch.zeros(1))
    with pytest.raises(ValueError, match="got tensors on cpu, meta, expected all on one device"):
        dispatch.choose("auto", torch.zeros(1), torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="no tensor"):
        dispatch.choose("auto")


def test_the_package_imports_with_torch_alone() -> None:
    hidden = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None; sys.modules['workbench'] = None"
    )
    code = f"{hidden}; import workbench_kernels, workbench_kernels.dispatch, pkgutil, importlib\n"
    code += "for m in pkgutil.iter_modules(workbench_kernels.__path__):\n"
    code += "    if m.ispkg: importlib.import_module('workbench_kernels.' + m.name)\n"
    path = [p for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
