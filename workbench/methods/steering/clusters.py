"""Clusters of per-prompt differences at one place, and the probe that tells from the residual which of them is meant.

c_i = argmin_c |d_i - m_c|^2, m_c the mean of cluster c (k-means); p(c | h) = softmax(W h + b), trained on the c_i.
Whether the probe knows anything is judged on prompts that it was not trained on: k-means always returns clusters.
Sources: Sharma and Raman, 2025 (G-ACT, arXiv 2506.18887; no code is public: the details are ours); Lloyd, 1982; Arthur
and Vassilvitskii, 2007 (k-means++); Rousseeuw, 1987 (silhouette).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.stats import wilson_interval

FOLDS = 5  # each prompt is held out once, from a probe trained on the other four fifths
EPOCHS, RATE, DECAY = 200, 1e-3, 1e-2  # of AdamW, over all prompts at once
REFINEMENT_RATE = 1e-4
CHOICES = range(2, 9)  # numbers of clusters that are tried where none is given


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of differences at one place and the probe that picks one from a residual. Arrays are float64.

    means          (k, width) mean difference of each cluster: what steering adds
    weight, bias   (k, width), (k,) of the probe, for residuals standardised by centre and scale, (width,) both:
                   gradient steps know no scale, while coordinates of a residual stream differ by orders of magnitude
    labels         (n,) cluster of each prompt it was found from
    predicted      (n,) what a probe that was not trained on that prompt says
    silhouette     mean silhouette of the clusters; -1 to 1
    """

    means: Float[Tensor, "k width"]
    weight: Float[Tensor, "k width"]
    bias: Float[Tensor, " k"]
    centre: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    labels: Int[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    silhouette: float

    @property
    def k(self) -> int:
        return len(self.means)

    @property
    def accuracy(self) -> float:
        """Share of held-out prompts for which the probe names the right cluster."""
        return float((self.predicted == self.labels).double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        low, high = wilson_interval(int((self.predicted == self.labels).sum()), len(self.labels))
        return float(low), float(high)

    @property
    def majority(self) -> float:
        """Share of the largest cluster: the accuracy of always naming that one."""
        return float(torch.bincount(self.labels).max() / len(self.labels))

    def has_signal(self, margin: float = 0.0) -> bool:
        """Whether the probe surely beats always naming the largest cluster, by more than `margin`."""
        return self.interval[0] > self.majority + margin

    def probabilities(self, residual: Float[Tensor, "batch width"]) -> Float[Tensor, "batch k"]:
        """p(cluster | residual), in the precision of the weights."""
        return (self._standardised(residual) @ self.weight.T + self.bias).softmax(-1)

    def choice(self, residual: Float[Tensor, "batch width"]) -> Int[Tensor, " batch"]:
        """The most probable cluster of each row."""
        return self.probabilities(residual).argmax(-1)

    def moved_to(self, device: torch.device) -> Clusters:
        """A copy on `device` in float32, which every device has: to steer with."""
        names = ("means", "weight", "bias", "centre", "scale")
        return replace(self, **{name: getattr(self, name).to(device, torch.float32) for name in names})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clusters):
            return NotImplemented
        return self.silhouette == other.silhouette and all(map(torch.equal, self._tensors(), other._tensors()))

    def __hash__(self) -> int:
        return hash((self.silhouette, self.means.cpu().numpy().tobytes()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.means, self.weight, self.bias, self.centre, self.scale, self.labels, self.predicted

    def _standardised(self, residual: Tensor) -> Tensor:
        return (residual.to(self.centre.dtype) - self.centre) / self.scale

    def refined(
        self, residual: Float[Tensor, "n width"], labels: Int[Tensor, " n"], *, rate: float = REFINEMENT_RATE
    ) -> Clusters:
        """New clusters whose probe took one gradient step per row towards its label, in the order of the rows.

        The gradient of cross-entropy is (p - onehot) h, h standardised as in training: on residuals as they are, with
        norms in the hundreds, steps of this rate overturn the probe. Means and all that was measured stay.
        """
        weight, bias = self.weight.clone(), self.bias.clone()
        for row, label in zip(self._standardised(residual), labels.tolist(), strict=True):
            error = (weight @ row + bias).softmax(-1)
            error[label] -= 1.0
            weight -= rate * error[:, None] * row
            bias -= rate * error
        return replace(self, weight=weight, bias=bias)


def fit_clusters(
    residual: Float[Tensor, "n width"], differences: Float[Tensor, "n width"], *, k: int | None = None, seed: int = 0
) -> Clusters:
    """Cluster the differences of n prompts and train the probe that reads the cluster off their residuals.

    residual   what the probe reads for each prompt; keep it apart from the two sides of its difference: a side's own
               noise is part of the difference too, and would tell the cluster where prompts don't
    k          how many clusters; None: the number from 2 to 8 with the largest silhouette
    """
    n = len(differences)
    if residual.shape != differences.shape or residual.dim() != 2:
        raise ValueError(
            f"fit_clusters: got residuals {tuple(residual.shape)} and differences {tuple(differences.shape)}, "
            "expected (n, width) twice: one row per prompt."
        )
    if n < 2 * FOLDS:
        raise ValueError(f"fit_clusters: got {n} prompts, expected at least {2 * FOLDS}: a fifth of them is held out.")
    if not (torch.isfinite(residual).all() and torch.isfinite(differences).all()):
        raise ValueError("fit_clusters: got NaN or infinity among the values, expected finite numbers.")
    points = differences.double().cpu().numpy()
    labels, k = (k_means(points, k, seed=seed), k) if k is not None else choose_k(points, seed=seed)
    labels_of = torch.from_numpy(labels)
    means = torch.stack([differences.double().cpu()[labels_of == c].mean(0) for c in range(k)])
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(n) % FOLDS)
    trained_on = torch.cat([torch.arange(FOLDS)[:, None] != fold, torch.ones(1, n, dtype=torch.bool)])
    rows = residual.double().cpu()
    centre, scale = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    rows = (rows - centre) / scale
    weight, bias = train_probes(rows, labels_of, k, trained_on)
    predicted = (torch.einsum("nw,nkw->nk", rows, weight[fold]) + bias[fold]).argmax(-1)
    spread = silhouette(points, labels)
    return Clusters(means, weight[-1], bias[-1], centre, scale, labels_of, predicted, spread)


def train_probes(
    rows: Float[Tensor, "n width"], labels: Int[Tensor, " n"], k: int, trained_on: Bool[Tensor, "probe n"]
) -> tuple[Float[Tensor, "probe k width"], Float[Tensor, "probe k"]]:
    """(weight, bias) of linear probes of the labels, one per row of `trained_on`, which marks its prompts.

    All are trained side by side, on standardised rows in float64, from zero weights, so that no seed matters.
    """
    share = trained_on.double() / trained_on.sum(1, keepdim=True)  # (probe, n): a mean over each probe's own prompts
    weight = torch.zeros(len(trained_on), k, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(trained_on), k, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([weight, bias], lr=RATE, weight_decay=DECAY)
    targets = labels.expand(len(trained_on), -1)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            optimiser.zero_grad()
            logits = torch.einsum("nw,pkw->pkn", rows, weight) + bias[..., None]
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")  # (probe, n)
            (loss * share).sum().backward()
            optimiser.step()
    return weight.detach(), bias.detach()


def choose_k(points: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, int]:
    """(labels, k) of the number of clusters from 2 to 8 whose mean silhouette is largest; the smaller one of equals."""
    most = min(len(points) - 1, len(np.unique(points, axis=0)))  # of fewer different points there are fewer clusters
    found = {k: k_means(points, k, seed=seed) for k in CHOICES if k <= max(2, most)}
    best = max(found, key=lambda k: (silhouette(points, found[k]), -k))
    return found[best], best


def k_means(
    points: np.ndarray, k: int, *, n_init: int = 10, n_iterations: int = 300, seed: int = 0
) -> Int[np.ndarray, " n"]:
    """(n,) labels of the best of `n_init` runs by Lloyd's algorithm from k-means++ starts; points (n, width).

    Clusters are numbered by their first point. Raises ValueError where there are fewer than k different points.
    """
    points = np.asarray(points, dtype=np.float64)
    n_different = len(np.unique(points, axis=0))
    if not 2 <= k <= n_different:
        raise ValueError(f"k_means: got k={k} for {n_different} different points, expected 2 to that number.")
    points = points - points.mean(axis=0)  # distances stay, and lose less to rounding
    rng, best, smallest = np.random.default_rng(seed), np.zeros(len(points), dtype=np.int64), np.inf
    for _ in range(n_init):
        labels, spread = _lloyd(points, _far_apart(points, k, rng), n_iterations)
        if spread < smallest * (1 - 1e-12):
            best, smallest = labels, spread
    _, first = np.unique(best, return_index=True)
    return np.argsort(np.argsort(first))[best]


def silhouette(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean over points of (b - a) / max(a, b): a the mean distance within the cluster, b to the nearest other one.

    A point alone in its cluster counts 0. Distances are formed for 256 points at a time.
    """
    member = np.eye(int(labels.max()) + 1)[labels]  # (n, k)
    size, total = member.sum(axis=0), 0.0
    for start in range(0, len(points), 256):
        own = member[start : start + 256].astype(bool)
        sums = np.sqrt(_squared_distances(points[start : start + 256], points)) @ member  # (rows, k)
        within = sums[own] / np.maximum(size[labels[start : start + 256]] - 1, 1)
        nearest = np.where(own, np.inf, sums / size).min(axis=1)
        alone = size[labels[start : start + 256]] == 1
        larger = np.maximum(within, nearest)
        total += np.where(alone | (larger == 0), 0.0, (nearest - within) / np.where(larger == 0, 1.0, larger)).sum()
    return float(total / len(points))


def _far_apart(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each further start is drawn with a chance proportional to its squared distance from the others."""
    chosen = [int(rng.integers(len(points)))]
    for _ in range(k - 1):
        nearest = _squared_distances(points, points[chosen]).min(axis=1)
        nearest[chosen] = 0.0  # rounding must not draw a point twice
        chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
    return points[chosen]


def _lloyd(points: np.ndarray, centres: np.ndarray, n_iterations: int) -> tuple[np.ndarray, float]:
    """(labels, sum of squared distances): nearest centre and mean of each cluster in turns, until nothing moves."""
    labels = np.full(len(points), -1)
    for _ in range(n_iterations):
        distances = _squared_distances(points, centres)
        new = distances.argmin(axis=1)
        for empty in np.setdiff1d(np.arange(len(centres)), new):  # it takes the point that fits worst elsewhere
            new[np.where(np.bincount(new, minlength=len(centres))[new] > 1, distances.min(axis=1), -1).argmax()] = empty
        if np.array_equal(new, labels):
            break
        labels = new
        centres = np.stack([points[labels == c].mean(axis=0) for c in range(len(centres))])
    return labels, float(((points - centres[labels]) ** 2).sum())


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(len(a), len(b)), never negative by rounding."""
    return np.maximum((a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1), 0.0)
