"""One GPU for one process: the first of those that this process may see and that no other sweep's run uses.

A lock file per GPU decides, so that several workers, and several sweeps, share a machine; a kill frees the GPU.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workbench.environment import gpus

VARIABLE = "CUDA_VISIBLE_DEVICES"
PAUSE_S = 1.0  # between two looks at GPUs that are all in use


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; all of the machine's without it."""
    named = os.environ.get(VARIABLE)
    if named is None:
        return [str(index) for index in range(len(gpus()))]
    return [name.strip() for name in named.split(",") if name.strip()]


@contextmanager
def one_gpu(names: Sequence[str]) -> Iterator[str]:
    """Hold one of the named GPUs; while all are in use, wait. Raises ValueError for no names."""
    import fcntl  # here, because Windows has none and needs the rest of this file

    if not names:
        raise ValueError(
            f"gpus: this machine shows none, expected at least one. If it has any, name them in {VARIABLE}."
        )
    while True:
        for name in names:
            with _lock_of(name).open("wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield name
                return
        time.sleep(PAUSE_S)


def _lock_of(name: str) -> Path:
    folder = Path(tempfile.gettempdir(), f"workbench-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / re.sub(r"[^\w-]", "_", name)
