"""Semi-nonnegative factorisation: activations as sums of sparse patterns with weights that are never negative.

A ~ G F^T with A (n tokens, m neurons), F (m, K) signed with at most ceil(keep m) entries per column, G (n, K) >= 0.
|A - G F^T|^2 = |A|^2 - 2 <A^T G, F> + <G^T G, F^T F>: one pass over A per iteration, and never the n x m product.
Sources: Ding, Li and Jordan, 2010 (semi-NMF, its multiplicative update and start); Shafran, Geiger and Geva, 2025
(arXiv 2506.10920: sparse columns); Cichocki and Phan, 2009 (HALS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from workbench.methods.snmf.baselines import Blocks, k_means, principal_axes

RIDGE = 1e-6  # the paper's, on columns of norm 1
TINY = 1e-12
ONE_HOT_FLOOR = 0.2  # Ding et al.: a weight of exactly 0 could never grow under the multiplicative update


@dataclass(frozen=True, eq=False)
class Factors:
    """One factorisation: `features` (m, K), `weights` (n, K) with columns of norm 1 (or 0: a feature nobody uses).

    loss     (n_iterations,) |A - G F^T|^2 / |A|^2, float64, after every iteration
    energy   |A|^2, float64
    seed     of the start
    """

    features: Float[Tensor, "m K"]
    weights: Float[Tensor, "n K"]
    loss: Float[Tensor, " n_iterations"]
    energy: float
    seed: int

    @property
    def best_loss(self) -> float:
        """The loss of these factors: the smallest that was seen."""
        return float(self.loss.min())


@dataclass(frozen=True)
class SemiNMF:
    """How to factorise. `fit(blocks)` does it from one start; compare starts by `best_loss`.

    keep         share of neurons that a feature may use; 1 is no sparsity
    init         start of G: "random"; "svd" or "knn", of principal components or k-means clusters
    update       "hals": block coordinate descent; "multiplicative": the paper's
    explore      iterations in which F is the least-squares solution cut to `keep`, as in the paper. After them "hals"
                 replaces one column at a time by its exact best under `keep`, so that the loss can only fall.
                 Measured: exploring finds the planted features, the exact steps then find the lower loss
    sweeps       passes over the columns of G per iteration
    tolerance    stop when the loss fell by less than this share in `patience` iterations
    """

    n_features: int
    keep: float = 0.01
    init: Literal["random", "svd", "knn"] = "random"
    update: Literal["hals", "multiplicative"] = "hals"
    explore: int = 20
    sweeps: int = 1
    max_iterations: int = 200
    tolerance: float = 1e-4
    patience: int = 20

    def __post_init__(self) -> None:
        if self.n_features < 1 or self.max_iterations < 1 or self.sweeps < 1 or self.patience < 1:
            raise ValueError(f"SemiNMF: got {self}, expected at least one feature, iteration, sweep and patience.")
        if not 0 < self.keep <= 1:
            raise ValueError(f"SemiNMF: got keep={self.keep}, expected a share of neurons, 0 < keep <= 1.")
        for name, value, known in (
            ("init", self.init, ("random", "svd", "knn")),
            ("update", self.update, ("hals", "multiplicative")),
        ):
            if value not in known:
                raise ValueError(f"SemiNMF: got {name}={value!r}, expected one of {', '.join(known)}.")

    def fit(self, blocks: Blocks, *, seed: int = 0, device: torch.device | str = "cpu") -> Factors:
        """Factors of the tokens in `blocks`, each (n_tokens, m). Each block is moved to `device` when its turn comes.

        Memory: one block, the weights (n, K) twice, and O(m K). Blocks may lie on disk: an iteration reads each once.
        Raises ValueError for empty, infinite or all-zero activations, for more features than tokens, and with
        init="svd" for more than neurons.
        """
        energy = self._checked(blocks, device)
        weights = self._start(blocks, seed, device)  # one (K, n_tokens) per block
        losses: list[float] = []
        best: tuple[Tensor, list[Tensor]] | None = None
        features, switched = None, self.explore if self.update == "hals" else self.max_iterations
        for iteration in range(self.max_iterations):
            gram, cross = self._pass(blocks, weights, features, device)
            norms = gram.diagonal().sqrt()
            norms = torch.where(norms > 0, norms, torch.ones_like(norms))
            gram, cross = gram / norms / norms[:, None], cross / norms
            for index, block in enumerate(weights):
                weights[index] = block / norms[:, None].to(block)
            if features is None or iteration < switched:
                features = sparsest(least_squares(cross, gram), self.keep)
            else:
                features = best_columns(features * norms, cross, gram, self.keep)
            losses.append(gram_loss(energy, cross, gram, features) / energy)
            if losses[-1] <= min(losses):
                best = features.clone(), list(weights)
            if self._stalled(losses):
                if iteration >= switched or self.update != "hals":
                    break
                switched = iteration + 1  # exploring found no more: on to the exact steps
        assert best is not None
        together = torch.cat([block.cpu() for block in best[1]], 1).T.contiguous()
        return Factors(best[0].float().cpu(), together.float(), torch.tensor(losses, dtype=torch.float64), energy, seed)

    def _pass(
        self, blocks: Blocks, weights: list[Tensor], features: Tensor | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Renew the weights of every block given the features; G^T G (K, K) and A^T G (m, K), in float64."""
        gram = cross = torch.zeros((), dtype=torch.float64, device=device)
        for index, block in enumerate(blocks):
            held = weights[index].device  # weights stay where their block is
            block, weight = block.to(device), weights[index].to(device)
            if features is not None:
                one = features.to(block.dtype)
                products, inner = one.T @ block.T, one.T @ one  # P (K, n_tokens), Q (K, K)
                weight = renewed(weight, products, inner, self.update, self.sweeps)
            gram = gram + (weight @ weight.T).double()
            cross = cross + (weight @ block).T.double()
            weights[index] = weight.to(held)
        return gram, cross

    def _stalled(self, losses: list[float]) -> bool:
        if len(losses) <= self.patience:
            return False
        before, now = min(losses[: -self.patience]), min(losses)
        return before - now < self.tolerance * before

    def _checked(self, blocks: Blocks, device: torch.device | str) -> float:
        """|A|^2 in float64: summed in float32 over 61 million entries it is off by a thousandth."""
        n, m = sum(len(block) for block in blocks), blocks[0].shape[1] if len(blocks) else 0
        if n < self.n_features or m < 1:
            raise ValueError(f"SemiNMF: got {n} tokens of {m} neurons, expected at least {self.n_features} tokens.")
        if self.init == "svd" and m < self.n_features:
            raise ValueError(
                f"SemiNMF: got init='svd' for {self.n_features} features of {m} neurons, expected at most {m}: there "
                "are no more components to start from. Take 'random' or 'knn'."
            )
        energy = sum(float(block.to(device).double().square().sum()) for block in blocks)
        if not math.isfinite(energy) or energy == 0:
            raise ValueError(f"SemiNMF: the activations' sum of squares is {energy}, expected a finite, positive one.")
        return energy

    def _start(self, blocks: Blocks, seed: int, device: torch.device | str) -> list[Tensor]:
        """G at the start, (K, n_tokens) for each block."""
        generator = torch.Generator().manual_seed(seed)
        if self.init == "random":  # drawn on the CPU: the same start on every device
            return [torch.rand(self.n_features, len(b), generator=generator).to(b.device, b.dtype) for b in blocks]
        if self.init == "knn":
            _, nearest = k_means(blocks, self.n_features, seed=seed, device=device)
            hot = [torch.nn.functional.one_hot(one, self.n_features).T + ONE_HOT_FLOOR for one in nearest]
            return [one.to(b.device, b.dtype) for one, b in zip(hot, blocks, strict=True)]
        axes = principal_axes(blocks, self.n_features, seed=seed, centred=False, device=device)
        scores = [(b.to(device) @ axes.to(device, b.dtype)).T for b in blocks]
        # The sign of an axis is arbitrary: take the one with the larger positive mass before clamping.
        flip = torch.stack([(one.sign() * one.square()).sum(1) for one in scores]).sum(0).sign()
        jitter = [torch.rand(one.shape, generator=generator).to(one) for one in scores]  # so that restarts differ
        scale = (
            sum(float(one.square().sum()) for one in scores) / sum(one.numel() for one in scores)
        ) ** 0.5  # root mean square
        starts = [(one * flip[:, None]).clamp_min(0) + 0.1 * scale * j for one, j in zip(scores, jitter, strict=True)]
        return [one.to(b.device, b.dtype) for one, b in zip(starts, blocks, strict=True)]


def renewed(weight: Tensor, products: Tensor, inner: Tensor, update: str, sweeps: int) -> Tensor:
    """Weights (K, n_tokens) >= 0 after one update, given P = F^T A^T (K, n_tokens) and Q = F^T F (K, K).

    hals             g_k <- max(0, g_k + (P_k - Q_k G) / Q_kk), one row after another: the exact best of each
    multiplicative   G <- G sqrt((P+ + Q- G) / (P- + Q+ G + 1e-6)), X+ and X- the parts of X, both >= 0
    """
    if update == "multiplicative":
        up = products.clamp_min(0) + (-inner).clamp_min(0) @ weight
        down = (-products).clamp_min(0) + inner.clamp_min(0) @ weight
        return weight * (up / (down + RIDGE)).sqrt()
    weight = weight.clone()
    diagonal = inner.diagonal().tolist()
    for _ in range(sweeps):
        for k, size in enumerate(diagonal):
            if size > TINY:
                weight[k].add_((products[k] - inner[k] @ weight) / size).clamp_min_(0)
    return weight


def least_squares(cross: Tensor, gram: Tensor) -> Float[Tensor, "m K"]:
    """F = A^T G (G^T G + ridge)^-1: the best features for given weights, without sparsity."""
    ridge = RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, cross.T).T


def best_columns(features: Tensor, cross: Tensor, gram: Tensor, keep: float) -> Float[Tensor, "m K"]:
    """Each column in turn replaced by its exact best under `keep`, the others given.

    |R - g f^T|^2 is smallest at f = R^T g / |g|^2, and among columns with s entries at the s largest of that.
    """
    features = features.clone()
    for k, size in enumerate(gram.diagonal().tolist()):
        if size > TINY:
            column = features[:, k] + (cross[:, k] - features @ gram[:, k]) / size
            features[:, k] = sparsest(column[:, None], keep)[:, 0]
    return features


def sparsest(features: Tensor, keep: float) -> Float[Tensor, "m K"]:
    """Winner takes all: in each column only the ceil(keep m) entries of largest magnitude stay."""
    count = math.ceil(keep * len(features) - 1e-9)  # .01 * 300 is 3.0000000000000004
    if count >= len(features):
        return features
    kept = features.abs().topk(count, dim=0).indices
    return torch.zeros_like(features).scatter_(0, kept, features.gather(0, kept))


def gram_loss(energy: float, cross: Tensor, gram: Tensor, features: Tensor) -> float:
    """|A - G F^T|^2 from A^T G and G^T G, without the n x m reconstruction; float64 sums."""
    features = features.double()
    inner = features.T @ features
    return energy - 2 * float((cross.double() * features).sum()) + float((gram.double() * inner).sum())


def weights_of(
    features: Tensor, blocks: Blocks, *, sweeps: int = 50, device: torch.device | str = "cpu"
) -> Float[Tensor, "n K"]:
    """Non-negative weights of tokens that the features were not made from: the features stay fixed."""
    found = []
    for block in blocks:
        block = block.to(device)
        one = features.to(device, block.dtype)
        start = torch.zeros(one.shape[1], len(block), dtype=block.dtype, device=device)
        found.append(renewed(start, one.T @ block.T, one.T @ one, "hals", sweeps).cpu())
    return torch.cat(found, 1).T.contiguous()


def cosines(a: Tensor, b: Tensor) -> Float[Tensor, "K L"]:
    """Signed cosine of every column of a with every column of b, float64; 0 with a column of zeros."""
    units = [x.double() / x.double().norm(dim=0).clamp_min(TINY) for x in (a, b)]
    return units[0].T @ units[1]


def matched_cosines(a: Tensor, b: Tensor) -> Float[Tensor, " K"]:
    """For each column of a the signed cosine with its partner in b, NaN without one: the best one-to-one matching.

    Columns are matched by the magnitude of the cosine.
    """
    table = cosines(a, b)
    rows, columns = linear_sum_assignment(-table.abs().numpy())
    found = torch.full((len(table),), torch.nan, dtype=torch.float64)
    found[torch.from_numpy(rows)] = table[rows, columns]
    return found


def explained_share(features: Tensor, blocks: Blocks, device: torch.device | str = "cpu") -> float:
    """1 - |A - G F^T|^2 / |A|^2 with the best weights for these features."""
    energy = gap = 0.0
    for block in blocks:
        weights = weights_of(features, [block], device=device).double()
        here, one = block.double().cpu(), features.double()
        energy += float(here.square().sum())
        gap += gram_loss(float(here.square().sum()), here.T @ weights, weights.T @ weights, one)
    return 1 - gap / energy


def hierarchy(
    features: Tensor, levels: tuple[int, ...], settings: SemiNMF, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Features factorised again into fewer and fewer: per level (parents (m, K'), weights (children, K')).

    A parent stands for K / K' children, so it may use that many times their share of neurons. Greedy: a level is
    made from the one below it and never changes it.
    """
    found: list[tuple[Tensor, Tensor]] = []
    keep = settings.keep
    for n_parents in levels:
        if not 0 < n_parents < features.shape[1]:
            raise ValueError(f"SNMF: got a level of {n_parents} above {features.shape[1]} features, expected fewer.")
        keep = min(1.0, keep * features.shape[1] / n_parents)
        fit = replace(settings, n_features=n_parents, keep=keep).fit([features.T.contiguous()], seed=seed)
        found.append((fit.features, fit.weights))
        features = fit.features
    return found


def in_blocks(activations: Float[Tensor, "n m"], n_tokens: int) -> tuple[Tensor, ...]:
    """Views of the activations with at most `n_tokens` tokens each."""
    return activations.split(n_tokens)
