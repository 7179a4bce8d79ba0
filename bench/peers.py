"""Peers in environments of their own, made under .bench/ and never in the project's, and asked through a pipe.

An environment sees the libraries of the interpreter that runs the bench (the same torch and transformers stand under
both sides), and holds the peer with what else it needs. A peer's process answers one JSON line per line; while one side
works the other waits for its line. What can't be installed or run is Unavailable, with the reason in words.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from bench._match import Side, Unavailable
from bench._timing import ROOT

FOLDER = ROOT / ".bench"
INSTALL_S = ANSWER_S = 600  # an answer takes seconds, but the first time a peer may compile: quanto does
SHARED = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Peer:
    """What to install for a peer, and the script in bench/peer/ that answers for it.

    whole: with what it depends on, in versions that agree with the project's torch, transformers and numpy.
    Otherwise only what is named, because the limits that the peer states would refuse those versions.
    """

    library: str
    needs: tuple[str, ...]
    script: str
    whole: bool = True


PEERS = {
    "TransformerLens": Peer("transformer-lens", ("transformer-lens==4.3.0",), "lens_capture"),
    # repeng states numpy < 2 and means it, as it names np.float_; pandas has to be built for the same numpy
    "repeng": Peer(
        "repeng",
        ("repeng==0.4.0", "gguf==0.17.1", "numpy==1.26.4", "pandas==2.3.3", "pytz==2025.2"),
        "repeng_steer",
        whole=False,
    ),
    # steering-vectors states transformers < 5; with 5 it gives the same logits, which the check proves
    "steering-vectors": Peer("steering-vectors", ("steering-vectors==0.12.2",), "vectors_steer", whole=False),
    "quanto": Peer("optimum-quanto", ("optimum-quanto==0.2.7",), "quantised_cache"),
    "hqq": Peer("hqq", ("hqq==0.2.8.post1",), "quantised_cache"),
    "optuna": Peer("optuna", ("optuna==5.0.0",), "optuna_search"),
}


def variables() -> dict[str, str]:
    """The environment that every process of the bench gets: the project importable, no spinning threads, no network."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return dict(os.environ) | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def environment(name: str, peer: Peer, folder: Path = FOLDER) -> Path:
    """The interpreter of a peer's environment, which is made where it isn't there yet or was made for another one."""
    home = folder / name
    python, stamp = home / "bin" / "python", home / "made_for.json"
    shared = [f"{library}=={metadata.version(library).split('+')[0]}" for library in SHARED]
    wanted = json.dumps([sys.executable, sys.version, *peer.needs, *shared])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    made(name, [sys.executable, "-m", "venv", "--without-pip", str(home)])
    below = sysconfig.get_paths()["purelib"]
    site = home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    limits = home / "limits.txt"
    limits.write_text("\n".join(shared) + "\n")
    words = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    words += ["--retries", "1", *peer.needs, *(["--constraint", str(limits)] if peer.whole else ["--no-deps"])]
    made(name, words)
    stamp.write_text(wanted)
    return python


def made(name: str, words: list[str]) -> None:
    """Run a step of an installation; Unavailable with its last error."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_S, env=variables())
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{name} was not installed within {INSTALL_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise Unavailable(f"{name} could not be installed: {(errors or lines[-1:])[0]}")


class PeerProcess:
    """A peer that is asked for work; its environment and its process are made when it is asked first."""

    def __init__(self, name: str, make: Callable[[str, Peer], Path] = environment) -> None:
        self.name, self.peer = name, PEERS[name]
        self._make, self._undo = make, ExitStack()
        self._process: subprocess.Popen[Any] | None = None
        self._failed: Unavailable | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def side(self, job: str, **arguments: Any) -> Side:
        """One side of a match: the job as the peer measures it."""
        return lambda: self.ask(job, **arguments)

    def version(self) -> str:
        return f"{self.peer.library} {self.ask('version', library=self.peer.library)}"

    def ask(self, job: str, **arguments: Any) -> Any:
        """The answer of one run of a job. Raises Unavailable, with the reason, where there is none."""
        if self._failed:
            raise self._failed  # asked once, and remembered: each row of this peer says the same
        try:
            if self._process is None:
                self._process = self._start()
            answer = self._answer(json.dumps({"job": job, "arguments": arguments}))
        except Unavailable as error:
            self._failed = error
            raise
        if "error" in answer:
            raise Unavailable(f"{self.name}: {answer['error']}")
        return answer["answer"]

    def _start(self) -> subprocess.Popen[Any]:
        python = self._make(self.name, self.peer)
        script = ROOT / "bench" / "peer" / f"{self.peer.script}.py"
        self._said = self._undo.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # closed with the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        process = subprocess.Popen([str(python), str(script)], bufsize=0, env=variables(), **pipes)
        self._undo.enter_context(process)  # closes its pipes and waits: a process whose input ended goes
        self._undo.callback(process.kill)
        return process

    def _answer(self, question: str) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(question.encode() + b"\n")
            line = b""
            while not line.endswith(b"\n"):  # an answer longer than a pipe comes in parts
                if not select.select([process.stdout], [], [], ANSWER_S)[0]:
                    raise Unavailable(f"{self.name} gave no answer within {ANSWER_S} s")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise BrokenPipeError
                line += part
        except BrokenPipeError:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines() or ["no word"]
            raise Unavailable(f"{self.name}: its process ended: {lines[-1]}") from None
        return json.loads(line)
