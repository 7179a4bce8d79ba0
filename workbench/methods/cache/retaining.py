"""Retaining heads: a small trained network per layer scores each token once, when its key and value are made.

s = W2 silu(W1 [q; k; v]), queries, keys and values of all heads before their rotation; one s per key/value head.
Source: Locret, Huang et al., 2024 (arXiv 2410.01805), section 3. Training: `methods.cache.retaining_training`.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import silu

from workbench.cache.layer import View
from workbench.files import write_atomically

if TYPE_CHECKING:
    from workbench.subject import Subject

BLOCK = 1024  # tokens scored at once: O(block x inputs) memory
KIND = "retaining heads"


@dataclass(frozen=True, eq=False, repr=False)
class RetainingHeads:
    """One network per layer of full attention; as a scorer, a running score that a token gets once and for all.

    fc1     layer -> (width, inputs) float32, inputs = (head + 2 kv_head) * d_head
    fc2     layer -> (kv_head, width) float32; neither has a bias
    model   fingerprint of the subject that they were trained on; they are refused on another. None for heads by hand

    As in the paper: EvictKV(6000, heads, sinks=0, window=2500, chunk=3072, every=None, positions="reindex"); `window`
    are its stabilisers.
    """

    fc1: dict[int, Tensor]
    fc2: dict[int, Tensor]
    model: str | None = None

    def __post_init__(self) -> None:
        if not self.fc1 or set(self.fc1) != set(self.fc2):
            raise ValueError(
                f"RetainingHeads: got fc1 of layers {sorted(self.fc1)} and fc2 of layers {sorted(self.fc2)}, "
                "expected both of the same layers, at least one."
            )
        for layer in self.fc1:
            first, second = self.fc1[layer], self.fc2[layer]
            if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[1]:
                raise ValueError(
                    f"RetainingHeads: layer {layer} has fc1 {tuple(first.shape)} and fc2 {tuple(second.shape)}, "
                    "expected (width, inputs) and (kv_head, width)."
                )
            if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
                raise ValueError(f"RetainingHeads: layer {layer} holds NaN or infinity, expected finite numbers.")
        for name in ("fc1", "fc2"):
            plain = {layer: w.detach().float().cpu() for layer, w in sorted(getattr(self, name).items())}
            object.__setattr__(self, name, plain)

    @property
    def n_parameters(self) -> int:
        return sum(weight.numel() for part in (self.fc1, self.fc2) for weight in part.values())

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits of all weights and their layers."""
        total = hashlib.sha256()
        for part in (self.fc1, self.fc2):
            for layer, weight in part.items():
                total.update(f"{layer} {tuple(weight.shape)}".encode() + weight.contiguous().numpy().tobytes())
        return total.hexdigest()[:12]

    def score(self, layer: int, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch kv_head"]:
        """The scores of tokens from their queries, keys and values."""
        first, second = self._weights(layer, x.device)
        if x.shape[-1] != first.shape[1]:
            raise ValueError(
                f"{self}: layer {layer} has {x.shape[-1]} numbers per token by now, trained on {first.shape[1]}: "
                "heads were pruned from it. Train heads on the pruned model."
            )
        return network(x, first, second)

    def __call__(self, view: View) -> Float[Tensor, "batch kv_head slot"]:
        """All scores of the layer; the tokens of this forward get theirs now, and it never changes again."""
        change = torch.zeros(view.keys.shape[:3], device=view.keys.device)
        column, slot, new = arrivals(view)
        for start in range(0, column.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            x = inputs(view, column[:, part], slot[:, part])
            scores = (self.score(view.layer, x) * new[:, part, None]).transpose(1, 2)  # (batch, kv_head, new)
            change.scatter_add_(2, slot[:, None, part].expand_as(scores), scores)
        scores = view.scores + change  # before the next line, which may change what view.scores looks at
        view.add_scores(change)
        return scores

    def for_subject(self, subject: Subject) -> RetainingHeads:
        """These heads, if they belong to `subject`. Raises ValueError otherwise."""
        if self.model is not None and self.model != subject.fingerprint:
            raise ValueError(
                f"{self}: trained on model {self.model}, but {subject.name} is {subject.fingerprint}. "
                "Train heads on this model: train_retaining_heads(subject, data)."
            )
        return self

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, with the fingerprint of the model."""
        tensors = {f"{layer}.fc1": weight.contiguous() for layer, weight in self.fc1.items()}
        tensors |= {f"{layer}.fc2": weight.contiguous() for layer, weight in self.fc2.items()}
        write_atomically(Path(path), save(tensors, {"kind": KIND, "model": self.model or ""}))
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> RetainingHeads:
        """The heads that `save` wrote. Raises ValueError for other files."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"RetainingHeads.load: {path} is no safetensors file: {error}") from error
        if about.get("kind") != KIND:
            raise ValueError(f"RetainingHeads.load: {path} holds no retaining heads. Pass a file that save() wrote.")
        parts = [{int(n.split(".")[0]): w for n, w in tensors.items() if n.endswith(end)} for end in (".fc1", ".fc2")]
        return cls(*parts, model=about["model"] or None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RetainingHeads):
            return NotImplemented
        return (self.model, self.digest) == (other.model, other.digest)

    def __hash__(self) -> int:
        return hash((self.model, self.digest))

    def __repr__(self) -> str:
        return f"RetainingHeads({len(self.fc1)} layers, {self.n_parameters:,} parameters, {self.digest})"

    @functools.cached_property
    def _moved(self) -> dict[tuple[int, torch.device], tuple[Tensor, Tensor]]:
        return {}  # weights by layer and device, so that decoding does not move them at every token

    def _weights(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if layer not in self.fc1:
            raise ValueError(
                f"{self}: there is none for layer {layer}, only for {', '.join(map(str, self.fc1))}. "
                "Were they trained on another model?"
            )
        if (layer, device) not in self._moved:
            self._moved[layer, device] = self.fc1[layer].to(device), self.fc2[layer].to(device)
        return self._moved[layer, device]


def network(x: Float[Tensor, "*batch inputs"], fc1: Tensor, fc2: Tensor) -> Float[Tensor, "*batch kv_head"]:
    """The head of one layer."""
    return silu(x @ fc1.T) @ fc2.T


def arrivals(view: View) -> tuple[Int[Tensor, "batch new"], Int[Tensor, "batch new"], Bool[Tensor, "batch new"]]:
    """Where the tokens of this forward are: their columns, their slots (alike in all heads), and True where one is."""
    step, places = view.step, view.slots.positions
    real, positions = step.real.to(places.device), step.positions.to(places.device)
    oldest = positions.where(real, torch.iinfo(positions.dtype).max).amin(1, keepdim=True)
    fresh = places[:, 0] >= oldest  # (batch, slot): the newest tokens of a row, in the same slots of all heads
    room = min(real.shape[1], fresh.shape[1])
    column = (~real).int().sort(dim=1, stable=True).indices[:, :room]
    slot = (~fresh).int().sort(dim=1, stable=True).indices[:, :room]
    return column, slot, real.gather(1, column)


def inputs(
    view: View, column: Int[Tensor, "batch new"], slot: Int[Tensor, "batch new"]
) -> Float[Tensor, "batch new inputs"]:
    """[q; k; v] of some tokens of this forward in float32, as they were before any rotation."""
    positions = view.step.positions.to(column.device).gather(1, column)
    parts = [_taken(view.query, column), _taken(view.keys, slot), _taken(view.values, slot)]
    if view.rotation is not None:  # reindexed too: the newest tokens stand where they always stood
        parts[:2] = [view.rotation.turn(part, positions, back=True) for part in parts[:2]]
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1)


def _taken(x: Float[Tensor, "batch head seq d_head"], index: Int[Tensor, "batch new"]) -> Tensor:
    wide = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, wide).float()
