"""Texts read as they would be generated: the prompt at once, the cache as the active toggles leave it, then on from it.

Rows are batched with prompts of their own length: nothing is padded, so a cache's bytes are those of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.anatomy import add_tap
from workbench.cache import KVLayer, cache_bytes
from workbench.methods.cache.continuations import Text
from workbench.site import sites

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True, eq=False)
class Reading:
    """What one side, with or without the toggles, made of one text. T continuation tokens.

    logprobs      (T, vocab) the prediction of each continuation token
    heads         per layer (queries, head, d_head), the queries that read the cache as it was after the prompt
    held          (layer, kv_head, seq) of the prompt as far as it was read: 1 held, 0 not, -1 where no such head is
    cache_bytes   of this text's cache after the prompt
    """

    logprobs: Float[Tensor, "T vocab"]
    heads: tuple[Float[Tensor, "queries head d_head"], ...]
    held: Int[np.ndarray, "layer kv_head seq"]
    cache_bytes: float


@torch.no_grad()
def read(subject: Subject, texts: Sequence[Text], unseen: int, batch: int) -> list[Reading]:
    """Each text under whatever acts: the prompt in one forward, then the rest token by token through its cache."""
    found: dict[int, Reading] = {}
    for rows in _batches(texts, batch):
        found |= zip(rows, _read([texts[row] for row in rows], subject, unseen), strict=True)
    return [found[row] for row in range(len(texts))]


def _read(texts: list[Text], subject: Subject, unseen: int) -> Iterator[Reading]:
    """Texts whose prompts are of one length. A continuation that is over goes on with token 0, unheeded."""
    n_prompt, longest = len(texts[0].prompt), max(len(text.continuation) for text in texts)
    ids = torch.zeros(len(texts), n_prompt + longest, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : n_prompt + len(text.continuation)] = torch.tensor(text.prompt + text.continuation)
    ids, seen = ids.to(subject.device), n_prompt - unseen
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in range(subject.n_layers)}
    cache: Any = None
    with ExitStack() as undo:
        undo.enter_context(subject.watch.prompts(torch.full((len(texts),), n_prompt)))
        for piece in _pieces(seen, subject.stages.chunk):
            output = _forward(subject, ids[:, piece], cache)
            cache = output.past_key_values
        predicted: list[Tensor] = [output.logits[:, -1]]
        held = [held_tokens(layer, seen) for layer in cache.layers]
        each = cache_bytes(cache) / len(texts)
        for site in sites(range(subject.n_layers), "heads"):
            add_tap(subject.model, subject.anatomy, site, partial(_note, outputs[site.layer]), undo)
        for column in range(seen, n_prompt + longest - 1):
            output = _forward(subject, ids[:, column : column + 1], cache)
            cache = output.past_key_values
            predicted.append(output.logits[:, -1])
    logits = torch.stack(predicted, 1)[:, unseen:]  # (text, scored, vocab)
    heads = [torch.cat(values, 1) if values else torch.zeros(len(texts), 0, 1, 1) for values in outputs.values()]
    for row, text in enumerate(texts):
        n = len(text.continuation)
        asked = slice(max(unseen - 1, 0), max(unseen - 1, 0) + n - (unseen == 0))  # queries whose prediction is scored
        maps = [layer[row] if len(layer) > row else layer[0] for layer in held]
        logprobs = logits[row, :n].float().log_softmax(-1).cpu()
        yield Reading(logprobs, tuple(value[row, asked] for value in heads), stacked(maps), each)


def held_tokens(layer: Any, n_tokens: int) -> np.ndarray:
    """(batch, kv_head, n_tokens) int8: 1 where a layer of a cache holds that token of the prompt, else 0.

    A layer that holds no tokens one by one, such as a recurrent one, has no heads here.
    """
    if isinstance(layer, KVLayer):
        slots = layer.slots()
        positions = slots.positions.expand(slots.tensors[0].shape[:3])
    else:
        keys = vars(layer).get("keys")
        if not isinstance(keys, Tensor) or keys.dim() != 4:
            return np.zeros((1, 0, n_tokens), dtype=np.int8)
        positions = torch.arange(n_tokens - keys.shape[2], n_tokens, device=keys.device).expand(keys.shape[:3])
    held = torch.zeros(*positions.shape[:2], n_tokens + 1, dtype=torch.int8, device=positions.device)
    held.scatter_(2, positions.long().where(positions >= 0, n_tokens), 1)  # empty slots fall into the last column
    return held[..., :n_tokens].cpu().numpy()


def stacked(layers: Sequence[np.ndarray]) -> np.ndarray:
    """(layer, kv_head, seq) of one text from (kv_head, seq) per layer, -1 where a layer has fewer heads."""
    heads = max(len(held) for held in layers)
    return np.stack([np.pad(held, ((0, heads - len(held)), (0, 0)), constant_values=-1) for held in layers])


def _pieces(n_tokens: int, chunk: int | None) -> Iterator[slice]:
    """The prompt as `Subject.generate` reads it: at once, or in chunks with the short one first."""
    starts = range(0, n_tokens, n_tokens) if chunk is None else range(-(-n_tokens % chunk), n_tokens, chunk)
    yield from (slice(max(start, 0), start + (chunk or n_tokens)) for start in starts)


def _forward(subject: Subject, ids: Tensor, cache: Any) -> Any:
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return subject.model(input_ids=ids, **{name: value for name, value in options.items() if name in subject.accepts})


def _note(values: list[Tensor], value: Tensor) -> None:
    values.append(value.to("cpu", torch.float32, copy=True))  # the model may reuse the memory of what it gave


def _batches(texts: Sequence[Text], limit: int) -> Iterator[list[int]]:
    """Indices of texts with prompts of one length, at most about `limit` prompt tokens together."""
    lengths: dict[int, list[int]] = {}
    for row, text in enumerate(texts):
        lengths.setdefault(len(text.prompt), []).append(row)
    for length, rows in lengths.items():
        size = max(1, limit // length)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
