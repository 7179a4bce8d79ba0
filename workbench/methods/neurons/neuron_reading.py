"""From a model to the labels of its neurons: settings decided, one side of one layer in memory at a time.

Read side: (w_in * u_j) against W; write side: (w_out * d_j) against w_final * W; w the weights of the norms between.
Source: Davies, 2025, "Flash Interpretability" (arXiv 2501.02688), mode "paper"; mode "corrected" is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.methods.neurons import clamping
from workbench.methods.neurons.labelling import SIGNS, Score, label, null_line, prepared_rows
from workbench.methods.neurons.labels import NeuronTokensResult
from workbench.methods.neurons.neuron_weights import KIND_OF, Side, neuron_vectors, read_norms, scale_of, write_norm
from workbench.site import Kind, Site
from workbench.unembedding import Unembedding
from workbench.values import fingerprint

if TYPE_CHECKING:
    from workbench.subject import Subject

MODES: dict[str, dict[str, Any]] = {
    "corrected": {
        "sides": ("read", "write"),
        "score": "cosine",
        "fold_norm": True,
        "signs": "both",
        "clamp_at": "neurons",
    },
    "paper": {"sides": ("read",), "score": "dot", "fold_norm": False, "signs": "+", "clamp_at": "up"},
}


@dataclass(frozen=True, eq=False)
class Part:
    """The vectors (neuron, d_model) of one side of one layer, norms folded in, and the rows they are compared with."""

    vectors: Tensor
    rows: Tensor
    scale: Tensor | None = None

    def shares_line(self, other: Part) -> bool:
        """Whether random vectors do the same in both: same rows, same folded scale."""
        if self.scale is None or other.scale is None:
            return self.rows is other.rows and self.scale is other.scale
        return self.rows is other.rows and torch.equal(self.scale, other.scale)


@dataclass(frozen=True)
class Reading:
    """The settings of a NeuronTokens probe with nothing left open. Make one with `Reading.of(probe)`."""

    mode: str
    sides: tuple[Side, ...]
    score: Score
    fold_norm: bool
    signs: tuple[str, ...]
    clamp_at: Kind
    k: int
    n_random: int
    seed: int

    @classmethod
    def of(cls, settings: Any) -> Reading:
        """Every None replaced by what the mode says. ValueError where the settings make no sense."""
        chosen = {name: getattr(settings, name) for name in MODES[settings.mode]}
        chosen |= {name: default for name, default in MODES[settings.mode].items() if chosen[name] is None}
        if not chosen["sides"]:
            raise ValueError(f"NeuronTokens: got sides (), expected a tuple of some of {', '.join(KIND_OF)}.")
        counts = {name: getattr(settings, name) for name in ("k", "n_random")}
        if min(counts.values()) < 1:
            raise ValueError(f"NeuronTokens: got k={settings.k}, n_random={settings.n_random}, expected at least 1.")
        chosen |= {"signs": SIGNS if chosen["signs"] == "both" else (chosen["signs"],), "sides": tuple(chosen["sides"])}
        return cls(**chosen, **counts, mode=settings.mode, seed=settings.seed)

    def labels_of(self, subject: Subject, layers: Sequence[int]) -> NeuronTokensResult:
        """The labels of a model's neurons. ValueError names what it lacks (mixture of experts, no gate)."""
        for site in (Site(layer, KIND_OF[side]) for layer in layers for side in self.sides):
            subject.anatomy.place(site)  # before anything is computed
        unembedding = Unembedding.of(subject)
        embedding = next(subject.model.get_input_embeddings().parameters())
        return self.result(
            layers,
            self._parts(subject, unembedding, layers),
            allowed=unembedding.is_token,
            words=unembedding.words,
            tokenizer=fingerprint(sorted(subject.tokenizer.get_vocab().items())),
            tied=embedding.data_ptr() == unembedding.weight.data_ptr(),
        )

    def result(
        self,
        layers: Sequence[int],
        parts: Iterable[Part],
        *,
        allowed: Tensor | None,
        words: Callable[[list[int]], list[str]],
        tokenizer: str = "",
        tied: bool = False,
    ) -> NeuronTokensResult:
        """Label the vectors of every part; `parts` come side by side, the layers of each in order."""
        found: dict[str, list[np.ndarray]] = {"top_token": [], "top_score": [], "norm": [], "null_line": []}
        before, line, n_tokens = None, 0.0, 0
        for part in parts:
            if before is None or not part.shares_line(before):
                chosen: dict[str, Any] = {"signs": self.signs, "allowed": allowed, "seed": self.seed}
                line = null_line(part.rows, scale=part.scale, n_random=self.n_random, **chosen)
            scores, ids = label(
                part.vectors, part.rows, self.k, score=self.score, signs=self.signs, allowed=allowed
            )  # (neuron, sign, k)
            columns = (ids.int(), scores.float(), part.vectors.norm(dim=1), torch.tensor(line))
            for values, value in zip(found.values(), columns, strict=True):
                values.append(value.cpu().numpy())
            before, n_tokens = part, len(part.rows) if allowed is None else int(allowed.sum())
        shape = len(self.sides), len(layers)
        arrays = {name: np.stack(values).reshape(*shape, *values[0].shape) for name, values in found.items()}
        used = np.unique(arrays["top_token"])
        return NeuronTokensResult(
            top_token=np.moveaxis(arrays["top_token"], 0, 2),  # (layer, neuron, side, sign, k)
            top_score=np.moveaxis(arrays["top_score"], 0, 2),
            norm=np.moveaxis(arrays["norm"], 0, 2),
            null_line=arrays["null_line"].T,
            vocabulary=pd.DataFrame({"token_id": used, "token": words(used.tolist())}),
            clamps=pd.DataFrame(columns=list(clamping.COLUMNS)),
            layers=tuple(layers),
            sides=self.sides,
            signs=self.signs,
            score=self.score,
            fold_norm=self.fold_norm,
            mode=self.mode,
            n_tokens=n_tokens,
            tied=tied,
            tokenizer=tokenizer,
            seed=self.seed,
        )

    def _parts(self, subject: Subject, unembedding: Unembedding, layers: Sequence[int]) -> Iterator[Part]:
        reads = self.fold_norm and set(self.sides) & {"read", "gate"}
        norms = dict(zip(layers, read_norms(subject, layers), strict=True)) if reads else {}
        for side in self.sides:
            weight = unembedding.weight.float()
            folded = weight * unembedding.norm_weight if self.fold_norm and side == "write" else weight
            rows = prepared_rows(folded, self.score, unembedding.is_token)
            for layer in layers:
                vectors, scale = neuron_vectors(subject, layer, side).to(rows.device), None
                if self.fold_norm:
                    norm = write_norm(subject, layer) if side == "write" else norms[layer]
                    scale = scale_of(subject, norm).to(rows.device)
                    vectors = vectors * scale
                yield Part(vectors, rows, scale)
