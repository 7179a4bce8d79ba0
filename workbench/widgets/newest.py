"""Latest wins: of many questions in a row only the newest is answered, and no stale answer follows a newer one.

A slider asks ten times while one answer is being computed; nine of the questions are never worked on. Source: own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from IPython.core.getipython import get_ipython

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Later = Callable[[Callable[[], None]], None]

PATIENCE_S = 0.01  # until work begins: questions that wait in the kernel's queue come in first


class Newest(Generic[Question, Answer]):
    """Works on the newest question.

    answer   computes, and must not raise       show    gets the question with its answer, if no newer one was asked
    later    calls a function soon: in the event loop of a kernel, in a worker of a server
    """

    def __init__(
        self, answer: Callable[[Question], Answer], show: Callable[[Question, Answer], None], later: Later
    ) -> None:
        self.answer, self.show, self.later = answer, show, later
        self._lock = threading.Lock()  # a server asks in one thread and answers in another
        self._asked = 0
        self._waiting = False
        self._question: Question | None = None

    def ask(self, question: Question) -> None:
        """Put `question` in the place of the one that waits."""
        with self._lock:
            self._question, self._asked = question, self._asked + 1
            if self._waiting:
                return
            self._waiting = True
        self.later(self._work)

    def _work(self) -> None:
        with self._lock:
            question, number, self._waiting = self._question, self._asked, False
        assert question is not None
        answer = self.answer(question)
        with self._lock:
            if number != self._asked:
                return  # a newer one was asked meanwhile, and waits for its turn
        self.show(question, answer)


def soon(work: Callable[[], None]) -> None:
    """In a kernel a moment later, in the thread that runs cells and never beside one; elsewhere at once.

    JupyterLab sends a widget's messages to threads of their own (subshells). A model computes for one at a time: what
    a toggle does in one thread, a cell in another would see.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        work()
        return
    loop = kernel.io_loop.asyncio_loop
    loop.call_soon_threadsafe(loop.call_later, PATIENCE_S, work)
