"""Cache r numbers of each key and value instead of d_head: their place in a subspace that the layer's weights prefer.

z = (x - b) V_r is cached and x_hat = z V_r^T + b is read, keys before their rotation; r may fall with depth. The
bases come from the weights, or from what the model caches on given texts. Source: LoRC, Zhang et al., 2024 (arXiv
2410.03111); exact new tokens, bases from texts, and keys of rotary models are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
from torch import Tensor

from workbench.cache.projections import KINDS, Kind, Projection, find_projections, second_moments
from workbench.cache.stages import refuse_own_attention, use_stage
from workbench.loading import weights_state
from workbench.methods.cache.low_rank import (
    Subspace,
    cumulative,
    eigenbasis,
    energy_kept,
    evened,
    log_kappa,
    progressive_ranks,
    spectra_table,
)
from workbench.pruned.blocks import groups_left
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

Moments = dict[int, dict[Kind, Tensor]]  # layer -> kind -> (kv_head, d_head, d_head)
Bases = dict[tuple[int, Kind], tuple[Tensor, Tensor]]  # vectors (kv_head, d_head, d_head), bias (kv_head, d_head)


PLAN_COLUMNS = (
    "layer",
    "rank_k",
    "rank_v",
    "log_kappa",
    "log_kappa_cum",
    "energy_kept_k",
    "energy_kept_v",
    "error_k",
    "error_v",
    "bytes_per_token",
    "share",
)


@dataclass(frozen=True)
class LowRankKV(Toggle):
    """A cache of short vectors.

    rank     numbers per token and head: a share of d_head (float), a number (int), or one number per layer
    lowest   rank of the last layer: ranks then fall from `rank` by cumulative condition number; None: they don't
    keys     False leaves the keys whole: half the saving, and nothing to rotate again at every reading
    texts    where given, the bases fit what is cached on these texts; else they come from the weights alone
    mode     corrected: new tokens attend exactly, only what is read back is cut; paper: cut from the start, as if the
             weights had been replaced
    """

    rank: float | int | tuple[int, ...] = 0.5
    lowest: int | None = None
    keys: bool = True
    texts: tuple[str, ...] = ()
    mode: Literal["corrected", "paper"] = "corrected"

    claims: ClassVar[frozenset[str]] = frozenset({"kv.project"})

    def __post_init__(self) -> None:
        if isinstance(self.rank, Iterable):
            object.__setattr__(self, "rank", tuple(self.rank))
        if isinstance(self.texts, str):
            raise ValueError(f"LowRankKV: got texts={self.texts[:30]!r}, expected several texts. Write (text,).")
        object.__setattr__(self, "texts", tuple(self.texts))
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        share = isinstance(self.rank, float)
        if not ranks or any(isinstance(r, bool) or not (0 < r <= 1 if share else r >= 1) for r in ranks):
            raise ValueError(
                f"LowRankKV: got rank={self.rank!r}, expected a share above 0 and up to 1.0, a number of at least 1, "
                "or one such number per layer."
            )
        if self.lowest is not None and (isinstance(self.rank, tuple) or self.lowest < 1):
            raise ValueError(
                f"LowRankKV: got lowest={self.lowest} with rank={self.rank}, expected lowest >= 1, and one rank for "
                "the first layer. Leave out lowest where each layer has its own rank."
            )
        if self.mode not in ("corrected", "paper"):
            raise ValueError(f"LowRankKV: got mode={self.mode!r}, expected 'corrected' or 'paper'.")

    def plan(self, subject: Subject, texts: Sequence[str] = ()) -> pd.DataFrame:
        """One row per layer: what is kept of keys (k) and values (v), and what that saves.

        rank_k, rank_v                 log_kappa, log_kappa_cum (of the layer; from it to the last)
        energy_kept_k, energy_kept_v   share of the squared size of what the bases come from
        error_k, error_v               |x - x_hat| / |x| of what is cached on `texts`; NaN without texts
        bytes_per_token, share         in the cache, and of what the whole vectors take
        """
        with subject.untoggled():
            return self._plan(subject, texts)

    def _plan(self, subject: Subject, texts: Sequence[str]) -> pd.DataFrame:
        found = find_projections(subject)
        ranks, moments = self._ranks(subject, found), self._moments(subject, found)
        held_out = second_moments(subject, found, texts) if texts else {}
        logs = _log_kappas(found)
        rows = []
        for number, layer in enumerate(found):
            row: dict[str, Any] = {"layer": layer, "log_kappa": logs[number], "log_kappa_cum": cumulative(logs)[number]}
            for kind in found[layer]:
                width = subject.anatomy.d_head
                rank = ranks[layer] if kind in self._kinds else width
                vectors = eigenbasis(moments[layer][kind])[1][:, :, :rank]
                row[f"rank_{kind[0]}"] = rank
                row[f"energy_kept_{kind[0]}"] = energy_kept(moments[layer][kind], vectors)
                lost = 1 - energy_kept(held_out[layer][kind], vectors) if texts else math.nan
                row[f"error_{kind[0]}"] = math.sqrt(max(0.0, lost)) if texts else math.nan
            numbers = row["rank_k"] + row["rank_v"]
            row["bytes_per_token"] = numbers * subject.anatomy.n_kv_heads * subject.dtype.itemsize
            row["share"] = numbers / (2 * subject.anatomy.d_head)
            rows.append(row)
        return pd.DataFrame(rows, columns=list(PLAN_COLUMNS))

    def spectra(self, subject: Subject) -> pd.DataFrame:
        """Columns layer, tensor, kv_head, rank, energy_left_out: for `methods.cache.low_rank.spectra_figure`."""
        with subject.untoggled():
            moments = self._moments(subject, find_projections(subject, self._kinds))
        return spectra_table(
            [(layer, kind, eigenbasis(moment)[0]) for layer, kinds in moments.items() for kind, moment in kinds.items()]
        )

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.rank == 1.0 and isinstance(self.rank, float) and self.lowest is None:
            return
        refuse_own_attention(subject)
        with subject.untoggled():  # ranks and bases are those of whole layers
            found, bases = self._whole(subject)
            ranks = self._ranks(subject, found)
        cut = {layer: kinds for layer, kinds in found.items() if ranks[layer] < subject.anatomy.d_head}
        if not cut:
            return
        subspaces: dict[tuple[int, Kind], Subspace] = {}
        for layer, kinds in cut.items():
            left = groups_left(subject, layer)  # a base belongs to one key/value head, and goes with it
            for kind in kinds:
                vectors, bias = bases[layer, kind]
                vectors = vectors[left, :, : ranks[layer]]
                subspaces[layer, kind] = Subspace(evened(vectors).float(), bias[left].float())
        use_stage(subject, "project", LowRank(cut, subspaces, self.mode == "corrected"), undo)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        texts = ("the code is alpha beta gamma delta . recall the code : alpha beta gamma delta .",)
        return cls(2), cls(5, lowest=1, mode="paper"), cls(0.5, keys=False, texts=texts)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(1.0)

    def __str__(self) -> str:
        rank = f"{self.rank:.0%} of d_head" if isinstance(self.rank, float) else _listed(self.rank)
        falling = "" if self.lowest is None else f" down to {self.lowest}"
        origin = f", from {len(self.texts)} texts" if self.texts else ""
        return f"LowRankKV({'keys and values' if self.keys else 'values'}, rank {rank}{falling}{origin}, {self.mode})"

    def _whole(self, subject: Subject) -> tuple[dict[int, dict[Kind, Projection]], Bases]:
        """The projections of whole layers and their bases, whatever the rank; remembered for the subject, untoggled.

        What a hook inside the model makes of texts no key tells: they are then read anew.
        """
        trunk = subject.model.get_submodule(subject.anatomy.trunk)
        inside = (module for module in trunk.modules() if module is not trunk)
        if self.texts and any(module._forward_hooks or module._forward_pre_hooks for module in inside):
            return self._factored(subject)
        key = ("bases", self._kinds, self.texts, subject.device, *weights_state(subject.model))
        return subject.remember(key, lambda: self._factored(subject))

    def _factored(self, subject: Subject) -> tuple[dict[int, dict[Kind, Projection]], Bases]:
        found = find_projections(subject, self._kinds)
        moments = self._moments(subject, found)
        bases: Bases = {}
        for layer, kinds in found.items():
            for kind, projection in kinds.items():
                bases[layer, kind] = eigenbasis(moments[layer][kind])[1], projection.bias()
        return found, bases

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        return KINDS if self.keys else ("values",)

    def _ranks(self, subject: Subject, found: dict[int, dict[Kind, Projection]]) -> dict[int, int]:
        width, n_layers = subject.anatomy.d_head, subject.n_layers
        if isinstance(self.rank, tuple):
            if len(self.rank) != n_layers:
                raise ValueError(f"LowRankKV: got {len(self.rank)} ranks, expected one per layer, {n_layers}.")
            ranks = {layer: self.rank[layer] for layer in found}
        else:
            rank = max(1, round(self.rank * width)) if isinstance(self.rank, float) else self.rank
            ranks = dict.fromkeys(found, rank)
        if max(ranks.values()) > width:
            raise ValueError(f"LowRankKV: got rank {max(ranks.values())}, but {subject.name} has d_head {width}.")
        if self.lowest is None:
            return ranks
        logs = _log_kappas(found if self.keys else find_projections(subject))
        return dict(zip(found, progressive_ranks(logs, max(ranks.values()), self.lowest), strict=True))

    def _moments(self, subject: Subject, found: dict[int, dict[Kind, Projection]]) -> Moments:
        """What the bases are made of: W^T W, or the second moments of what is cached on the texts."""
        if self.texts:
            return second_moments(subject, found, self.texts)
        moments: Moments = {layer: {} for layer in found}
        for layer, kinds in found.items():
            for kind, projection in kinds.items():
                weight = projection.weight()
                moments[layer][kind] = weight.transpose(1, 2) @ weight
        return moments


@dataclass(frozen=True, eq=False)
class LowRank:
    """The project stage of a `LowRankKV`; a tensor without a subspace is stored whole."""

    projections: dict[int, dict[Kind, Projection]]
    subspaces: dict[tuple[int, Kind], Subspace]
    exact: bool

    def encode(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Coordinates of keys, taken back to before their rotation, and of values."""
        stored = []
        for kind, x in zip(KINDS, (keys, values), strict=True):
            subspace = self.subspaces.get((layer, kind))
            if subspace is not None:
                x = subspace.into(self.projections[layer][kind].plain(x, positions))
            stored.append(x)
        return tuple(stored)

    def decode(self, layer: int, stored: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
        """Keys, rotated again, and values."""
        rebuilt = []
        for kind, z in zip(KINDS, stored, strict=True):
            subspace = self.subspaces.get((layer, kind))
            if subspace is not None:
                z, rotation = subspace.back(z), self.projections[layer][kind].rotation
                z = z if rotation is None else rotation.turn(z, positions)
            rebuilt.append(z)
        return tuple(rebuilt)


def _log_kappas(found: dict[int, dict[Kind, Projection]]) -> list[float]:
    """log(kappa of keys x kappa of values) of each layer."""
    return [sum(log_kappa(projection.weight()) for projection in kinds.values()) for kinds in found.values()]


def _listed(rank: int | tuple[int, ...]) -> str:
    return str(rank) if isinstance(rank, int) else "/".join(map(str, rank))
