"""Neurons of a feed-forward block as experts: who fires for nearly every token, who fires together, and who may switch.

Markers M_tn = 1 where |h_n| is among the largest of token t; the highest rates make the shared expert; the others are
grouped by the L1 distance of their columns, in groups of one size; the member nearest its group's mean is its switch.
Source: CMoE, Pei et al., 2025 (arXiv 2502.04416). Where the official code has holes, mode "corrected" differs: all
neurons belong to some expert; the shared one holds those that say most in the mean square, as markers of ten neurons
can't rank more than ten that always fire; seeds lie far apart; five rounds instead of one; routed neurons are marked
among themselves. The assignment is exact, by shortest paths between groups: no neuron x neuron matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mode = Literal["corrected", "paper"]
PAPER_MARKED = 10  # neurons that the official code marks per token
ROUNDS = {"corrected": 5, "paper": 1}


@dataclass(frozen=True)
class Experts:
    """The neurons of one layer by expert, in original numbers.

    shared    those that always run               experts    those that each routed expert holds, all as many
    switches  one neuron of each routed expert: the router's score is what it would say
    dropped   in no expert, so off for good: only what mode "paper" leaves over
    bias      added to the router's shares, one per routed expert; (): none
    """

    layer: int
    shared: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    switches: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    bias: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("shared", "dropped", "switches"):
            object.__setattr__(self, name, tuple(int(unit) for unit in getattr(self, name)))
        object.__setattr__(self, "experts", tuple(tuple(int(unit) for unit in one) for one in self.experts))
        object.__setattr__(self, "bias", tuple(float(value) for value in self.bias))
        units = [*self.shared, *self.dropped, *(unit for one in self.experts for unit in one)]
        if len(set(units)) < len(units):
            raise ValueError(f"Experts: layer {self.layer} names a neuron twice, expected each in one expert.")
        if len(self.switches) != len(self.experts) or any(
            switch not in one for switch, one in zip(self.switches, self.experts, strict=False)
        ):
            raise ValueError(f"Experts: layer {self.layer} needs one switch of its own per routed expert.")
        if len(self.bias) not in (0, len(self.experts)):
            raise ValueError(
                f"Experts: layer {self.layer} has {len(self.bias)} biases for {len(self.experts)} experts."
            )

    @property
    def units(self) -> tuple[int, ...]:
        """All neurons, ascending."""
        return tuple(sorted([*self.shared, *self.dropped, *(unit for one in self.experts for unit in one)]))

    def active_share(self, active: int) -> float:
        """Share of the neurons that run for one token."""
        run = len(self.shared) + sum(len(one) for one in self.experts[:active])
        return run / len(self.units)

    def shuffled(self, seed: int) -> Experts:
        """Experts of the same sizes from neurons drawn by lot: the control."""
        rng = np.random.default_rng([seed, self.layer])
        drawn = iter(rng.permutation(np.array(self.units)).tolist())
        shared, dropped = ([next(drawn) for _ in part] for part in (self.shared, self.dropped))
        experts = tuple(tuple(sorted(next(drawn) for _ in one)) for one in self.experts)
        switches = tuple(one[int(rng.integers(len(one)))] for one in experts)
        return Experts(self.layer, tuple(sorted(shared)), experts, switches, tuple(sorted(dropped)), self.bias)


def carve(
    said: Float[Tensor, "token neuron"],
    units: Sequence[int],
    *,
    layer: int,
    experts: int,
    shared: int,
    mode: Mode = "corrected",
    marked: int | None = None,
) -> Experts:
    """The experts of one layer, from what its neurons say with inputs and rows of norm 1.

    experts   in all, of which `shared` are one that always runs; each holds len(units) // experts neurons, and what is
              left over goes to the shared one (mode "paper": is dropped)
    marked    neurons marked per token when groups are made; None: as many as one expert holds (mode "paper": 10)
    """
    check_sizes(len(units), experts, shared, layer)
    if mode not in ROUNDS or (marked is not None and marked < 1):
        raise ValueError(
            f"carve: got mode={mode!r}, marked={marked}, expected {' or '.join(map(repr, ROUNDS))}, and 1 or more."
        )
    size, routed = len(units) // experts, experts - shared
    if not len(said):
        raise ValueError(f"carve: got no tokens for layer {layer}, expected calibration texts.")
    often = markers(said, PAPER_MARKED if marked is None else marked)
    rate = (often if mode == "paper" else said.square()).double().mean(0)
    order = torch.argsort(rate, descending=True, stable=True)
    n_shared = shared * size + (len(units) - experts * size if mode == "corrected" else 0)
    rest = order[n_shared:].sort().values
    ranked = order[n_shared:]
    if mode == "corrected":
        marks = markers(said[:, rest], size if marked is None else marked).float()
        seeds = farthest_first(marks, routed)
        kept = torch.arange(len(rest))
    else:  # its seeds are the busiest neurons, and neurons that make up no whole expert get lost
        marks = often[:, rest].float()
        seeds = torch.searchsorted(rest, ranked[:routed])
        kept = _nearest(marks, seeds, routed * size)
    groups, centres = grouped(marks[:, kept], marks[:, seeds], ROUNDS[mode])
    distance = distances(marks[:, kept], centres)
    numbers, chosen = np.array(units), rest[kept].numpy()
    members = [np.flatnonzero(groups.numpy() == one) for one in range(routed)]
    switches = [one[int(distance[one, number].argmin())] for number, one in enumerate(members)]
    lost = np.setdiff1d(rest.numpy(), chosen)
    return Experts(
        layer,
        tuple(sorted(numbers[order[:n_shared].numpy()].tolist())),
        tuple(tuple(sorted(numbers[chosen[one]].tolist())) for one in members),
        tuple(numbers[chosen[one]].item() for one in switches),
        tuple(sorted(numbers[lost].tolist())),
    )


def check_sizes(n_units: int, experts: int, shared: int, layer: int) -> None:
    """ValueError where so many neurons can't be so many experts."""
    if not 0 <= shared < experts or experts > n_units:
        raise ValueError(
            f"carve: got experts={experts}, shared={shared} for the {n_units} neurons of layer {layer}; expected "
            f"0 <= shared < experts <= {n_units}."
        )


def markers(said: Float[Tensor, "token neuron"], k: int) -> Bool[Tensor, "token neuron"]:
    """True at the k largest |said| of each token."""
    top = said.abs().topk(min(k, said.shape[1]), dim=1).indices
    return torch.zeros_like(said, dtype=torch.bool).scatter_(1, top, True)


def distances(marks: Float[Tensor, "token neuron"], centres: Float[Tensor, "token group"]) -> np.ndarray:
    """(neuron, group) L1 distances in float64: sum |m - c| = sum c + m . (1 - 2 c), as m is 0 or 1."""
    return (centres.sum(0) + marks.T @ (1 - 2 * centres)).double().numpy()


def farthest_first(marks: Float[Tensor, "token neuron"], k: int) -> Int[Tensor, " k"]:
    """Neurons whose columns lie far apart in L1: the busiest first, then always the one farthest from all so far."""
    seeds = [int(marks.sum(0).argmax())]
    nearest = torch.from_numpy(distances(marks, marks[:, seeds]))[:, 0]
    for _ in range(k - 1):
        nearest[seeds] = -1.0
        seeds.append(int(nearest.argmax()))
        nearest = nearest.minimum(torch.from_numpy(distances(marks, marks[:, seeds[-1:]]))[:, 0])
    return torch.tensor(seeds)


def grouped(
    marks: Float[Tensor, "token neuron"], centres: Float[Tensor, "token group"], rounds: int
) -> tuple[Int[Tensor, " neuron"], Float[Tensor, "token group"]]:
    """The group of each neuron, all groups of one size, and the mean column of each; k-means with equal sizes."""
    size, before = marks.shape[1] // centres.shape[1], None
    for _ in range(rounds):
        groups = torch.from_numpy(assign_evenly(distances(marks, centres), size))
        centres = torch.stack([marks[:, groups == one].mean(1) for one in range(centres.shape[1])], 1)
        if before is not None and torch.equal(groups, before):
            break
        before = groups
    return groups, centres


def assign_evenly(cost: np.ndarray, size: int) -> np.ndarray:
    """(n,) the group of each of n = size * k things, `size` to each of k groups, at the least sum of cost (n, k).

    All go where they cost least; then, one at a time, the shortest chain of moves from a group that has too many to
    one that has too few: successive shortest paths, which keep every stage optimal. Memory is that of `cost`; for the
    routed neurons of a wide layer, where scipy's matrix would have their number squared, seconds.
    """
    n, k = cost.shape
    if n != size * k:
        raise ValueError(f"assign_evenly: got {n} things for {k} groups of {size}, expected {size * k}.")
    group, rows = cost.argmin(1), np.arange(k)
    counts = np.bincount(group, minlength=k)
    move, who = np.full((k, k), np.inf), np.zeros((k, k), dtype=np.int64)

    def measure(one: int) -> None:
        members = np.flatnonzero(group == one)
        move[one] = np.inf
        if len(members):
            extra = cost[members] - cost[members, one][:, None]
            least = extra.argmin(0)
            move[one], who[one] = extra[least, rows], members[least]
        move[one, one] = np.inf

    for one in rows:
        measure(one)
    slack = 1e-9 * max(1.0, float(np.abs(cost).max()))  # what rounding may make of a chain that gains nothing
    while (counts > size).any():
        length, parent = np.where(counts > size, 0.0, np.inf), np.full(k, -1)
        for _ in rows:
            through = length[:, None] + move
            best = through.argmin(0)
            shorter = through[best, rows] < length - slack
            if not shorter.any():
                break
            length = np.where(shorter, through[best, rows], length)
            parent = np.where(shorter, best, parent)
        at = int(np.where(counts < size, length, np.inf).argmin())
        counts[at] += 1
        touched = {at}
        while parent[at] >= 0:
            source = int(parent[at])
            group[who[source, at]] = at
            at = source
            touched.add(at)
        counts[at] -= 1
        for one in touched:
            measure(one)
    return group


def router_scores(
    before: Float[Tensor, "token expert"] | None, up: Float[Tensor, "token expert"], act: torch.nn.Module
) -> Float[Tensor, "token expert"]:
    """How strongly each switch would fire: |act(gate) up|, or |act(up)| of an MLP without a gate."""
    return (act(up) if before is None else act(before) * up).abs()


def selected(
    scores: Float[Tensor, "token expert"], active: int, bias: Float[Tensor, " expert"] | None = None
) -> Int[Tensor, "token active"]:
    """The experts that run for each token: the highest scores, or of softmax + bias where there is one."""
    ranked = scores if bias is None else scores.softmax(-1) + bias
    return ranked.topk(active, dim=-1).indices


def purity(groups: Sequence[Sequence[int]], truth: np.ndarray) -> float:
    """Share of the grouped neurons that belong to the commonest true block of their group; truth (neuron,)."""
    right = sum(int(np.bincount(truth[list(one)]).max()) for one in groups if len(one))
    return right / max(1, sum(len(one) for one in groups))


def _nearest(marks: Tensor, seeds: Tensor, count: int) -> Tensor:
    """The `count` neurons nearest to any seed: what the official code's assignment has room for."""
    cost = torch.from_numpy(distances(marks, marks[:, seeds])).min(1).values
    cost[seeds] = -1.0
    return cost.argsort(stable=True)[:count].sort().values
