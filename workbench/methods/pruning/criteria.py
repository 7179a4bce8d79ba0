"""How much each head and each neuron matters, by what it writes into the residual stream or by its weights.

amp       head: mean over tokens of |W_j z_j|_1, then over texts;  neuron: the same mean of |a_n|
amp_out   heads as amp;  neuron: mean |a_n| times the norm of its column of the down projection
wanda_structured  mean over rows of |W| |x|_2 per input column, summed over a head's columns
magnitude norms of the columns alone        random  a permutation per layer, the control
Sources: AMP (arXiv 2504.21174); structured Wanda as the baseline of FLAP (An et al., 2023, arXiv 2312.11983);
amp_out is own: by amp alone a loud neuron that nothing reads would matter most.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.anatomy import KEPT, Kept, add_tap, silence
from workbench.pruned.cut import plain_weight
from workbench.pruned.units import rows_of
from workbench.site import Kind, Site
from workbench.tokens import batches

if TYPE_CHECKING:
    from workbench.subject import Subject

READING = ("amp", "amp_out", "wanda_structured")  # need texts to be read
CRITERIA = ("amp_out", "amp", "taylor", "wanda_structured", "magnitude", "random")


@dataclass(frozen=True, eq=False)
class Activity:
    """What the units of every layer did on the texts, float64 and in original numbers; d_mlp 0 where no neurons are.

    written   (layer, head) mean over tokens of the 1-norm of what a head writes, then over texts
    active    (layer, d_mlp) mean over tokens of |activation|, then over texts
    head_energy, neuron_energy   (layer, head, d_head) and (layer, d_mlp) sums of squares over all tokens
    """

    written: np.ndarray
    active: np.ndarray
    head_energy: np.ndarray
    neuron_energy: np.ndarray


def activity(subject: Subject, ids: Sequence[Sequence[int]], *, batch: int = 4096) -> Activity:
    """Read token ids once, as the subject is now; `batch` tokens per forward. Nothing is kept but sums."""
    shape, n_layers, width = subject.anatomy, subject.n_layers, n_neurons(subject)
    total = {
        "written": torch.zeros(n_layers, shape.n_heads, dtype=torch.float64),
        "active": torch.zeros(n_layers, width, dtype=torch.float64),
        "head_energy": torch.zeros(n_layers, shape.n_heads, shape.d_head, dtype=torch.float64),
        "neuron_energy": torch.zeros(n_layers, width, dtype=torch.float64),
    }
    kinds: tuple[Kind, ...] = ("heads", "neurons") if has_neurons(subject) else ("heads",)
    places = [Site(layer, kind) for layer in range(n_layers) for kind in kinds]
    counts: dict[Site, int] = {}  # tokens seen in the forward under way, which toggles may cut into pieces
    means: dict[Site, Tensor] = {}

    def see(site: Site, value: Tensor) -> None:
        x = wide(value.detach())
        of_heads = site.kind == "heads"
        total["head_energy" if of_heads else "neuron_energy"][site.layer] += x.square().sum((0, 1)).double().cpu()
        size = written(x, columns_of(subject, site)).sum(1) if of_heads else x.abs().sum(1)  # (batch, unit)
        means[site] = means.get(site, 0) + size.double().cpu()
        counts[site] = counts.get(site, 0) + x.shape[1]

    with ExitStack() as undo:
        for site in places:
            add_tap(subject.model, subject.anatomy, site, lambda value, site=site: see(site, value), undo)
        # Texts of one length share a batch: without padding nothing has to be left out of a mean.
        for rows in batches([len(one) for one in ids], batch, even=True):
            chosen = [list(ids[row]) for row in rows]
            subject.capture(chosen, [Site(0, "resid_out")], tokens="last", batch=sum(map(len, chosen)), progress=False)
            for site in places:
                if site not in counts:
                    _check_silent(subject, site)
                    continue
                name = "written" if site.kind == "heads" else "active"
                total[name][site.layer] += means.pop(site).sum(0) / counts.pop(site)
    for name in ("written", "active"):
        total[name] /= len(ids)
    return Activity(**{name: value.numpy() for name, value in total.items()})


def scores_of(
    criterion: str, subject: Subject, seen: Activity | None, *, norm: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(layer, head) and (layer, d_mlp) scores by any criterion but taylor; float64.

    seen   what the units did on the texts; None for magnitude and random, which need none
    norm   of the output columns by which amp_out weighs neurons; with 1 it is amp's head score in one dimension
    """
    n_layers = subject.n_layers
    if criterion == "random":
        heads = shuffled_ranks(n_layers, subject.anatomy.n_heads, seed, 0)
        return heads, shuffled_ranks(n_layers, n_neurons(subject), seed, 1)
    found = (_of_layer(criterion, subject, seen, layer, norm) for layer in range(n_layers))
    heads, neurons = zip(*found, strict=True)
    return np.stack(heads), np.stack(neurons)


def _of_layer(
    criterion: str, subject: Subject, seen: Activity | None, layer: int, norm: int
) -> tuple[np.ndarray, np.ndarray]:
    """(head,) and (d_mlp,) scores of one layer."""
    if criterion == "magnitude":
        return _columns(subject, layer, "heads", 2).sum(1), _columns(subject, layer, "neurons", 2)[:, 0]
    assert seen is not None
    if criterion == "wanda_structured":
        heads = (_columns(subject, layer, "heads", 1) * np.sqrt(seen.head_energy[layer])).sum(1)
        neurons = _columns(subject, layer, "neurons", 1)[:, 0] * np.sqrt(seen.neuron_energy[layer])
        return heads / subject.anatomy.d_model, neurons / subject.anatomy.d_model
    weight = 1.0 if criterion == "amp" else _columns(subject, layer, "neurons", norm)[:, 0]
    return seen.written[layer], seen.active[layer] * weight


def written(values: Float[Tensor, "batch seq head d_head"], columns: Tensor) -> Float[Tensor, "batch seq head"]:
    """The 1-norm of what each head writes, W_j z_j; columns are (d_model, head, d_head). One head at a time."""
    return torch.stack([contribution(values, columns, j).abs().sum(-1) for j in range(columns.shape[1])], dim=-1)


def contribution(values: Tensor, columns: Tensor, head: int) -> Float[Tensor, "batch seq d_model"]:
    """What one head writes; over all heads that is the output of the projection without its bias."""
    return values[:, :, head] @ columns[:, head].T


def columns_of(subject: Subject, site: Site) -> Float[Tensor, "d_model unit width"]:
    """The columns by which units write into the residual stream, as they are now; removed units are zeros."""
    module = subject.anatomy.module(subject.model, site)
    plain_weight(module)  # or it says why there are none
    kept: Kept | None = vars(module).get(KEPT)
    weight = rows_of(module)
    shown = wide(weight if kept is None else kept.show(weight))
    return shown.reshape(len(shown), -1, subject.anatomy.d_head if site.kind == "heads" else 1)


def has_neurons(subject: Subject) -> bool:
    """Whether the MLPs have neurons that can be told apart."""
    return all("neurons" in places for places in subject.anatomy.places)


def n_neurons(subject: Subject) -> int:
    """Neurons per layer that are scored: none where some layers have them and others, mixtures of experts, do not."""
    return (subject.anatomy.d_mlp or 0) if has_neurons(subject) else 0


def wide(value: Tensor) -> Tensor:
    """In float32, or float64 where it was: sums of half precision overflow."""
    return value if value.dtype == torch.float64 else value.float()


def shuffled_ranks(n_layers: int, n_units: int, seed: int, family: int = 0) -> np.ndarray:
    """(layer, unit) a permutation of 1/n, 2/n, ..., 1 per layer."""
    ranks = np.empty((n_layers, n_units))
    for layer in range(n_layers):
        ranks[layer] = np.random.default_rng([seed, family, layer]).permutation(n_units) + 1.0
    return ranks / max(n_units, 1)


def _columns(subject: Subject, layer: int, kind: Kind, norm: int) -> np.ndarray:
    """(unit, width) norms of the columns that a layer's units write with."""
    if kind == "neurons" and not has_neurons(subject):
        return np.zeros((0, 1))
    columns = columns_of(subject, Site(layer, kind))
    return torch.linalg.vector_norm(columns.double(), ord=norm, dim=0).cpu().numpy()


def _check_silent(subject: Subject, site: Site) -> None:
    """A site that nothing was read at is silent under a toggle, and then its units do nothing; else ValueError."""
    reason = silence(subject.model, subject.anatomy, site)
    if reason != "":
        raise ValueError(f"scores: nothing was read at {site}: {reason or 'its module did not run'}.")
