"""Which r directions of a head's keys or values to keep, and how many in which layer: pure functions of matrices.

x W_r = (x W) V_r V_r^T: cutting a weight to rank r is projecting its output on r eigenvectors of M = W^T W, or of
M = sum v v^T over cached vectors v. r_l falls from the first layer to the last with log kappa_l + ... + log kappa_L.
Source: LoRC, Zhang et al., 2024 (arXiv 2410.03111); the moment form and the floor of kappa are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench import plots

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FLOOR = 1e-4  # of s_min / s_max: one dead channel would make kappa infinite, and all other layers equal
MULTIPLE = 8  # ranks that kernels like


@dataclass(frozen=True, eq=False)
class Subspace:
    """An affine subspace per head: z = (x - offset) V and x_hat = z V^T + offset."""

    vectors: Float[Tensor, "kv_head d_head rank"]
    offset: Float[Tensor, "kv_head d_head"]

    def into(self, x: Float[Tensor, "batch kv_head seq d_head"]) -> Float[Tensor, "batch kv_head seq rank"]:
        """Coordinates in the subspace, in the dtype of `x`; computed in float32 or finer."""
        vectors, offset, wide = self._as(x)
        return ((wide - offset[:, None]) @ vectors).to(x.dtype)

    def back(self, z: Float[Tensor, "batch kv_head seq rank"]) -> Float[Tensor, "batch kv_head seq d_head"]:
        """The points of the subspace that have these coordinates."""
        vectors, offset, wide = self._as(z)
        return (wide @ vectors.transpose(1, 2) + offset[:, None]).to(z.dtype)

    def _as(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.vectors.to(x.device, dtype), self.offset.to(x.device, dtype), x.to(dtype)


def eigenbasis(
    moment: Float[Tensor, "kv_head d_head d_head"],
) -> tuple[Float[Tensor, "kv_head d_head"], Float[Tensor, "kv_head d_head d_head"]]:
    """(energies, vectors in columns), largest energy first; energies are squared singular values, never negative."""
    energies, vectors = torch.linalg.eigh(moment.double())
    return energies.flip(-1).clamp_min(0.0), vectors.flip(-1)


def evened(vectors: Float[Tensor, "kv_head d_head rank"]) -> Float[Tensor, "kv_head d_head rank"]:
    """The same subspaces in other axes, each with about the same energy: vectors times a cosine transform.

    Along eigenvectors energies fall steeply, and channels that share a step in few bits would all be rounded as
    coarsely as the first: on the organism, errors of packed values are 12 to 16 % smaller this way.
    """
    rank = vectors.shape[-1]
    index = torch.arange(rank, dtype=torch.float64, device=vectors.device)
    waves = torch.cos(math.pi / rank * (index + 0.5) * index[:, None])  # row k is a wave of k half periods
    return vectors @ (waves / waves.norm(dim=1, keepdim=True)).to(vectors.dtype)


def energy_kept(moment: Float[Tensor, "kv_head d_head d_head"], vectors: Float[Tensor, "kv_head d_head rank"]) -> float:
    """Share of tr M that lies in the subspaces of all heads together; 1 - it is the squared relative error.

    With M of other texts than the ones that the vectors come from, this is their quality on held-out text.
    """
    inside = (vectors * (moment.double() @ vectors)).sum()
    return float(inside / moment.double().diagonal(dim1=1, dim2=2).sum())


def log_kappa(weight: Float[Tensor, "kv_head d_model d_head"]) -> float:
    """log of the condition number s_max / s_min of a layer's whole projection, s_min no less than 1e-4 s_max."""
    values = torch.linalg.svdvals(weight.double().transpose(0, 1).flatten(1)).clamp_min(1e-30)  # all may be 0
    return -math.log(max(float(values[-1] / values[0]), FLOOR))


def cumulative(log_kappas: Sequence[float]) -> list[float]:
    """The sum from each layer to the last: how much an error may grow on its way."""
    total, sums = 0.0, []
    for value in reversed(log_kappas):
        total += value
        sums.append(total)
    return sums[::-1]


def progressive_ranks(log_kappas: Sequence[float], highest: int, lowest: int) -> list[int]:
    """A rank per layer, `highest` in the first to `lowest` in the last, by cumulative condition number.

    Equal numbers give `highest` everywhere. Whole multiples of 8 where both ends are; the sum is that of the formula,
    rounded. Raises ValueError for lowest > highest.
    """
    if not 1 <= lowest <= highest:
        raise ValueError(f"progressive_ranks: got {lowest} to {highest}, expected 1 <= lowest <= highest.")
    sums = cumulative(log_kappas)
    span = max(sums) - min(sums)
    if span == 0:
        return [highest] * len(sums)
    exact = [highest - (max(sums) - value) / span * (highest - lowest) for value in sums]
    step = MULTIPLE if highest % MULTIPLE == lowest % MULTIPLE == 0 else 1
    units = [math.floor(rank / step) for rank in exact]
    left = round(sum(exact) / step) - sum(units)
    # The largest remainders first, and of equal ones the earlier layer: ranks still never rise with depth.
    for layer in sorted(range(len(exact)), key=lambda i: units[i] - exact[i] / step)[:left]:
        units[layer] += 1
    return [unit * step for unit in units]


def spectra_table(energies: Sequence[tuple[int, str, Float[Tensor, "kv_head d_head"]]]) -> pd.DataFrame:
    """One row per (layer, tensor, kv_head, rank): the share of that head's energy that the rank leaves out."""
    rows = []
    for layer, tensor, spectra in energies:
        left = 1 - spectra.double().cumsum(1) / spectra.double().sum(1, keepdim=True)
        for head, shares in enumerate(left.clamp_min(0.0).tolist()):
            rows += [(layer, tensor, head, rank, share) for rank, share in enumerate(shares, 1)]
    return pd.DataFrame(rows, columns=["layer", "tensor", "kv_head", "rank", "energy_left_out"])


def ranks_for_energy(table: pd.DataFrame, share: float, n_layers: int) -> tuple[int, ...]:
    """For each layer the least rank that keeps `share` of the energy of keys and of values, the mean over heads.

    Of a `spectra_table`; layers that it lacks get the full rank. Another rule than LoRC's: it looks at no depth.
    """
    if not 0 < share <= 1:
        raise ValueError(f"ranks_for_energy: got share={share}, expected above 0 and up to 1.")
    left = table.groupby(["layer", "tensor", "rank"]).energy_left_out.mean().groupby(["layer", "rank"]).max()
    enough = left[left <= 1 - share + 1e-9].reset_index().groupby("layer")["rank"].min()
    return tuple(int(enough.get(layer, table["rank"].max())) for layer in range(n_layers))


def spectra_figure(table: pd.DataFrame, tensor: str = "values") -> Figure:
    """Energy that each rank leaves out, the heads of a layer averaged, one line per layer; of a `spectra_table`."""
    shown = table[table.tensor == tensor]
    if shown.empty:
        raise ValueError(f"spectra_figure: got tensor={tensor!r}, expected one of {', '.join(table.tensor.unique())}.")
    mean = shown.groupby(["layer", "rank"], as_index=False).energy_left_out.mean()
    width, half = int(mean["rank"].max()), int(mean["rank"].max()) // 2
    at_half = mean[mean["rank"] == max(half, 1)].energy_left_out
    title = (
        f"Half of the {width} directions of {tensor} leave out {at_half.min():.1%} to {at_half.max():.1%} of the energy"
    )
    mean = mean[mean["rank"] < width].assign(layer="layer " + mean.layer.astype(str))
    return plots.lines(
        mean,
        "rank",
        "energy_left_out",
        "layer",
        title=title,
        x_title="rank kept",
        y_title="share of energy left out",
        markers=False,
    )
