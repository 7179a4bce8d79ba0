"""The peer's end of the pipe: a line with a job comes in, a line with what one run of it measured goes out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any


def serve(**jobs: Callable[..., Callable[[], Any]]) -> None:
    """Answer until the input ends. A job prepares its work once for its arguments; what it returns is run each time."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    jobs["version"] = lambda library: lambda: metadata.version(library)
    prepared: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        try:
            if line not in prepared:
                asked = json.loads(line)
                prepared[line] = jobs[asked["job"]](**asked["arguments"])
            answer = {"answer": prepared[line]()}
        except Exception as error:  # everything: it is the answer, which the table tells in words; the next may go well
            answer = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        answers.write(json.dumps(answer) + "\n")
