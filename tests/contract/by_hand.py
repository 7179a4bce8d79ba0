"""Cache layers fed by hand, and an independent, slow reading of what a cache should have given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.cache import accounts
from workbench.cache.layer import KVLayer
from workbench.cache.packed import Format, Packed, PackStore
from workbench.cache.segments import Slots
from workbench.cache.stages import Stages
from workbench.step import Step
from workbench.toggle import Receipt
from workbench.toggles.evict import Evict, EvictKV
from workbench.toggles.quantize import QuantizeKV


class Hand:
    """One layer of a cache without a model: feed it keys, values and queries."""

    def __init__(self, *toggles: EvictKV | QuantizeKV, layer: int = 0, n_layers: int = 1) -> None:
        self.step: Step | None = None
        self.stages = Stages()
        for toggle in toggles:
            if isinstance(toggle, EvictKV):
                self.stages.select, stage = Evict(toggle, n_layers), "select"
            else:
                self.stages.store, stage = PackStore(toggle.formats(n_layers), toggle.residual, toggle.sinks), "store"
            self.stages.receipts[stage] = Receipt(toggle)
        self.layer = KVLayer(layer, self.stages, lambda: self.step)
        self.counts: Tensor | None = None

    def feed(self, keys: Tensor, values: Tensor, query: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """One forward: keys and values (batch, kv_head, seq, d_head); `query` the same or with more heads."""
        batch, _, seq, _ = keys.shape
        real = torch.ones(batch, seq, dtype=torch.bool) if real is None else real
        before = torch.zeros(batch, dtype=torch.long) if self.counts is None else self.counts
        positions = (before[:, None] + real.cumsum(1) - 1).clamp_min(0)
        self.counts = before + real.sum(1)
        self.step = Step(positions, real, self.counts)
        self.layer.update(keys, values)
        return self.layer.attend(keys if query is None else query, torch.nn.Module(), None, None)

    def rows(self) -> list[dict[str, Any]]:
        """`accounts` of this layer alone."""
        return accounts(self)

    @property
    def layers(self) -> list[KVLayer]:
        return [self.layer]


def held(layer: KVLayer) -> list[list[list[int]]]:
    """[row][kv_head]: the logical positions that a layer holds, in the order in which it holds them."""
    return positions_of(layer.slots(), layer.recent.buffers[0].shape[1]) if layer.parts else []


def packed(layer: KVLayer) -> list[list[list[int]]]:
    """[row][kv_head]: the logical positions that are packed."""
    heads = layer.recent.buffers[0].shape[1]
    parts = [positions_of(part.slots(), heads) for part in layer.packed if isinstance(part, Packed)]
    rows = range(layer.recent.positions.shape[0])
    return [[[at for part in parts for at in part[row][head]] for head in range(heads)] for row in rows]


def positions_of(slots: Slots, heads: int) -> list[list[list[int]]]:
    at = slots.positions
    return [
        [[p for p in at[row, head if at.shape[1] > 1 else 0].tolist() if p >= 0] for head in range(heads)]
        for row in range(len(at))
    ]


# An independent reading: plain softmax over the history


@dataclass
class Call:
    """What one layer was asked and gave in one forward; [row][kv_head] lists as `held` gives them, before it."""

    layer: KVLayer
    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    positions: np.ndarray
    real: np.ndarray
    out: np.ndarray
    scaling: float
    cap: float | None
    held: list[list[list[int]]] = field(default_factory=list)
    packed: list[list[list[int]]] = field(default_factory=list)
    form: Format | None = None


@contextmanager
def spied(monkeypatch: Any) -> Iterator[list[Call]]:
    """Every attention of every cache layer inside the block."""
    calls: list[Call] = []
    original = KVLayer.attend

    def attend(self: KVLayer, query: Tensor, module: Any, scaling: float | None, soft_cap: float | None) -> Tensor:
        step, new = self.step(), self._new
        assert step is not None and new is not None
        before = (held(self), packed(self)) if self.seen else ([], [])
        store = self.stages.store
        out = original(self, query, module, scaling, soft_cap)
        calls.append(
            Call(
                self,
                *(t.detach().double().numpy() for t in (query, *new)),
                step.positions.numpy().copy(),
                step.real.numpy().copy(),
                out.detach().double().numpy(),
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                soft_cap,
                *before,
                store.formats[self.layer] if isinstance(store, PackStore) else None,
            )
        )
        return out

    with monkeypatch.context() as patch:
        patch.setattr(KVLayer, "attend", attend)
        yield calls


def largest_gap(calls: list[Call]) -> float:
    """The largest difference between what the layers gave and softmax over the history, masked to what they held."""
    history: dict[int, dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]] = {}
    worst = 0.0
    for call in calls:
        past = history.setdefault(id(call.layer), {})
        groups = call.query.shape[1] // call.keys.shape[1]
        for row in range(len(call.query)):
            columns = np.flatnonzero(call.real[row])
            for column in columns:
                entry = call.keys[row, :, column], call.values[row, :, column]  # (kv_head, d_head) each
                past[row, int(call.positions[row, column])] = entry
            new = [int(call.positions[row, column]) for column in columns]
            for head in range(call.query.shape[1]):
                expected = _read(call, past, row, head, head // groups, columns, new)
                if len(columns):
                    worst = max(worst, float(np.abs(expected - call.out[row, head, columns]).max()))
    return worst


def _read(
    call: Call, past: dict[Any, Any], row: int, head: int, kv: int, columns: np.ndarray, new: list[int]
) -> np.ndarray:
    old = call.held[row][kv] if call.held else []
    assert old == sorted(set(old)), "held positions must rise"
    keys = {at: past[row, at][0][kv] for at in [*old, *new]}
    values = {at: past[row, at][1][kv] for at in [*old, *new]}
    if call.form is not None and call.held and call.packed[row][kv]:
        inside = call.packed[row][kv]
        keys |= dict(zip(inside, rounded_keys(np.stack([keys[at] for at in inside]), call.form), strict=True))
        values |= dict(zip(inside, rounded_values(np.stack([values[at] for at in inside]), call.form), strict=True))
    outputs = []
    for column, position in zip(columns, new, strict=True):
        seen = [at for at in keys if at <= position]
        logits = np.array([call.query[row, head, column] @ keys[at] for at in seen]) * call.scaling
        logits = logits if call.cap is None else call.cap * np.tanh(logits / call.cap)
        share = np.exp(logits - logits.max())
        outputs.append(share / share.sum() @ np.stack([values[at] for at in seen]))
    return np.array(outputs)


def rounded_keys(keys: np.ndarray, form: Format) -> np.ndarray:
    """(token, d_head) after groups of tokens of one channel were rounded."""
    if form.key_bits == 16:
        return keys
    groups = [keys[start : start + form.group] for start in range(0, len(keys), form.group)]
    return np.concatenate([rounded(group.T, form.key_bits).T for group in groups])


def rounded_values(values: np.ndarray, form: Format) -> np.ndarray:
    """(token, d_head) after groups of channels of one token were rounded; all channels where no group divides them."""
    if form.value_bits == 16:
        return values
    width = form.group if values.shape[1] % form.group == 0 else values.shape[1]
    groups = values.reshape(len(values), -1, width)
    return rounded(groups, form.value_bits).reshape(values.shape)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Each group along the last axis to 2^bits levels between its extremes, with a step and a base in float16."""
    x = x.astype(np.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = ((high - low) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    base = low.astype(np.float16).astype(np.float32)
    codes = np.clip(np.round((x - base) / np.where(step > 0, step, 1)), 0, 2**bits - 1)
    return np.where(step > 0, codes * step + base, base).astype(np.float64)
