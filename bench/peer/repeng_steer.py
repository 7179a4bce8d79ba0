"""repeng steers as bench/steering.py does: the same vector added after the same block of the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from repeng import ControlModel, ControlVector  # type: ignore[import-not-found]
from serve import serve
from torch import Tensor

from bench._match import Side, timed
from bench._models import realistic_subject
from bench.steering import LAYER, WORK, given


def prepared(work: str, rows: int) -> Callable[[], Tensor]:
    ids, vector = given(rows)
    model: Any = ControlModel(realistic_subject().model, [LAYER])
    push = ControlVector(model_type="llama", directions={LAYER: vector.numpy()})

    def run() -> Tensor:
        model.set_control(push, 1.0)
        try:
            return WORK[work](model, ids)
        finally:
            model.reset()

    return run


def steered(**asked: Any) -> Side:
    return timed(prepared(**asked))


if __name__ == "__main__":
    serve(steered=steered, logits=lambda **asked: lambda: prepared(**asked)().tolist())
