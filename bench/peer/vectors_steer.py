"""steering-vectors steers as bench/steering.py does: the same vector added after the same block of the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve import serve
from steering_vectors import SteeringVector  # type: ignore[import-not-found]
from torch import Tensor

from bench._match import Side, timed
from bench._models import realistic_subject
from bench.steering import LAYER, WORK, given


def prepared(work: str, rows: int) -> Callable[[], Tensor]:
    ids, vector = given(rows)
    model, push = realistic_subject().model, SteeringVector({LAYER: vector})

    def run() -> Tensor:
        with push.apply(model):
            return WORK[work](model, ids)

    return run


def steered(**asked: Any) -> Side:
    return timed(prepared(**asked))


if __name__ == "__main__":
    serve(steered=steered, logits=lambda **asked: lambda: prepared(**asked)().tolist())
