"""TransformerLens keeps the neurons that bench/capture.py keeps, over the same batches of the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from serve import serve
from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

from bench._match import Side, timed
from bench._models import realistic_subject
from bench.capture import Kept, padded, sums, texts


def capture(count: int) -> Side:
    return timed(captured(count))


def captured(count: int) -> Callable[[], Kept]:
    subject, ids = realistic_subject(), texts(count)
    bridge: Any = TransformerBridge.boot_transformers("random-512", hf_model=subject.model, tokenizer=subject.tokenizer)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(subject.n_layers)]

    @torch.no_grad()
    def run() -> Kept:
        kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(subject.n_layers)}
        for batch in padded(ids):
            given = {"attention_mask": batch.mask.long(), "return_type": None, "names_filter": names}
            _, cache = bridge.run_with_cache(batch.ids, **given)
            for layer, name in enumerate(names):
                kept[layer].append(cache[name][batch.mask])
        return {layer: torch.cat(values) for layer, values in kept.items()}

    return run


if __name__ == "__main__":
    serve(capture=capture, sums=lambda count: lambda: sums(captured(count)()))
