"""Which groups of neurons fire together? Activations of one MLP as sums of sparse patterns with non-negative weights.

A ~ G F^T, G >= 0, at most ceil(keep m) neurons per feature; the start with the smallest |A - G F^T|^2 of several.
Source: Shafran, Geiger and Geva, 2025, "Decomposing MLP Activations into Interpretable Features via Semi-Nonnegative
Matrix Factorization" (arXiv 2506.10920); the update, the restarts and the labels are this project's, see `mode`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.directions import Direction
from workbench.generation import text_of
from workbench.methods.snmf import causal, concepts
from workbench.methods.snmf.activations import TokenActivations, read_activations
from workbench.methods.snmf.baselines import Blocks
from workbench.methods.snmf.concepts import LabelledTexts, detection, directions_of, text_scores
from workbench.methods.snmf.factorise import (
    Factors,
    SemiNMF,
    cosines,
    explained_share,
    hierarchy,
    in_blocks,
    matched_cosines,
)
from workbench.methods.snmf.feature_cards import TOKEN_COLUMNS, WORD_COLUMNS, top_contexts, written_words
from workbench.methods.snmf.features import SNMFResult
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.site import Site
from workbench.stats import auc
from workbench.toggles.steer import Steer

if TYPE_CHECKING:
    from workbench.subject import Subject

DETECTION = ("method", "concept", "direction", "fit_auc", "auc", "low", "high")
TREE = ("level", "feature", "parent", "share", "n_parents", "explained")


@dataclass(frozen=True)
class SNMF(Probe):
    """Features of one layer's MLP. Data: a list of texts, or LabelledTexts for reports by concept and steering.

    mode        "corrected": HALS, five starts, relative stopping; "paper": its multiplicative update and one start
    layer       None: the middle one                     n_features, keep   K, and the share of neurons per feature
    init        start of the weights: random, svd or knn; restarts and update: None takes those of the mode
    levels      sizes of the hierarchy above the features, falling; () for none
    target_kl   in nats: steer every concept that has a question to these; () for no steering. `signs` as listed
    on_disk     keep activations in a temporary file and read them block by block: for more than fit the memory
    cut         cut texts to the context instead of raising
    With labels, every second text of each label is held out: features are made, and chosen for concepts, on the rest.
    The first token of each text is never used, see `read_activations`.
    """

    mode: Literal["corrected", "paper"] = "corrected"
    layer: int | None = None
    n_features: int = 100
    keep: float = 0.01
    init: Literal["random", "svd", "knn"] = "random"
    restarts: int | None = None
    update: Literal["hals", "multiplicative"] | None = None
    max_iterations: int = 200
    tolerance: float = 1e-4
    levels: tuple[int, ...] = ()
    target_kl: tuple[float, ...] = ()
    signs: tuple[int, ...] = (1, -1)
    n_contexts: int = 10
    n_words: int = 10
    on_disk: bool = False
    cut: bool = False
    seed: int = 0

    bounds: ClassVar[Bounds] = {"restarts": 1, "tolerance": 0, "n_contexts": 0, "n_words": 0}

    def __post_init__(self) -> None:
        if any(not 0 < above < below for below, above in pairwise((self.n_features, *self.levels))):
            raise ValueError(
                f"SNMF: got levels={self.levels} above {self.n_features} features, expected fewer and fewer of them."
            )

    def measure(self, subject: Subject, data: LabelledTexts | Sequence[str]) -> SNMFResult:
        data = data if isinstance(data, LabelledTexts) else LabelledTexts(_as_texts(data))
        _check_labels(data)
        unasked = [one.concept for one in data.questions if not (one.prompts and one.words)]
        if self.target_kl and unasked:
            raise ValueError(f"SNMF: got a question about {unasked[0]!r} without prompts or words, expected both.")
        layer = subject.n_layers // 2 if self.layer is None else self.layer
        site, held = Site(layer, "neurons"), data.held_out
        subject.anatomy.place(site)  # a model without such a place is refused before anything runs
        made_on = [text for text, out in zip(data.texts, held, strict=True) if not out]
        read = read_activations(subject, made_on, site, on_disk=self.on_disk, cut=self.cut)
        fits, seconds = self._fits(read.blocks, subject.device)
        best = int(np.argmin([fit.best_loss for fit in fits]))
        found = fits[best]
        whole = np.flatnonzero(~held)
        parts: dict[str, Any] = {
            "tokens": top_contexts(subject, made_on, read, found.weights, self.n_contexts, cut=self.cut),
            "vocabulary": written_words(subject, layer, found.features, self.n_words),
        }
        parts["tokens"]["text"] = whole[parts["tokens"]["text"].to_numpy(dtype=int)]
        if data.concepts:
            parts |= self._by_concept(subject, data, read, torch.from_numpy(whole), found, site)
        if self.levels:
            parts["tree"] = _tree(found, self.levels, self._settings(), read.blocks, self.seed, subject.device)
        facts = {"token_ids": read.ids, "positions": read.position, "text": torch.from_numpy(whole)[read.text]}
        return self._result(
            fits, seconds, layer, subject.fingerprint, {k: v.numpy() for k, v in facts.items()}, **parts
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Ten features of eight neurons each, used by 15 % of the tokens, in noise: to be found, and stable."""
        return _planted("planted", seed, signal=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Noise alone: what is found explains nothing and is another thing from every start."""
        return _planted("null", seed, signal=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[SNMF, LabelledTexts]:
        texts = tuple(text_of(subject.tokenizer, range(8 + 3 * k, 20 + 3 * k)) for k in range(8))
        labels = ("first", "second") * 4
        questions = tuple(
            concepts.Question(label, (texts[k],), tuple(texts[k + 4].split()[-3:]))
            for k, label in enumerate(("first", "second"))
        )
        probe = cls(n_features=4, keep=0.1, restarts=2, max_iterations=20, levels=(2,), target_kl=(0.01,), signs=(1,))
        return probe, LabelledTexts(texts, labels, questions=questions)

    def _settings(self) -> SemiNMF:
        update = self.update or ("hals" if self.mode == "corrected" else "multiplicative")
        settings = {"max_iterations": self.max_iterations, "tolerance": self.tolerance}
        return SemiNMF(self.n_features, self.keep, self.init, update, **settings)

    def _fits(self, blocks: Blocks, device: torch.device) -> tuple[list[Factors], list[float]]:
        """One fit per start. Only the best keeps its weights: they are the large part."""
        restarts = self.restarts or (5 if self.mode == "corrected" else 1)
        fits: list[Factors] = []
        seconds = []
        for start in range(restarts):
            clock = time.perf_counter()
            fits.append(self._settings().fit(blocks, seed=1000 * self.seed + start, device=device))
            seconds.append(time.perf_counter() - clock)
            best = min(fits, key=lambda fit: fit.best_loss)
            fits = [
                fit if fit is best else replace(fit, weights=fit.weights.new_empty(0, self.n_features)) for fit in fits
            ]
        return fits, seconds

    def _result(
        self,
        fits: list[Factors],
        seconds: list[float],
        layer: int,
        model: str | None,
        facts: dict[str, np.ndarray],
        **parts: Any,
    ) -> SNMFResult:
        best = int(np.argmin([fit.best_loss for fit in fits]))
        found = fits[best]
        loss = np.full((len(fits), max(len(fit.loss) for fit in fits)), np.nan)
        for row, fit in zip(loss, fits, strict=True):
            row[: len(fit.loss)] = fit.loss.numpy()
        size = found.features.double().square().sum(0) * found.weights.double().square().sum(0)
        empty = {
            "tokens": pd.DataFrame(columns=list(TOKEN_COLUMNS)),
            "vocabulary": pd.DataFrame(columns=list(WORD_COLUMNS)),
            "detection": pd.DataFrame(columns=list(DETECTION)),
            "own_auc": pd.DataFrame(columns=["feature", "auc", "low", "high"]),
            "overlap": pd.DataFrame(columns=["feature", "concept", "cosine"]),
            "steering": pd.DataFrame(columns=list(causal.COLUMNS)),
            "tree": pd.DataFrame(columns=list(TREE)),
            "labels": ("",) * self.n_features,
        }
        return SNMFResult(
            features=found.features.numpy(),
            weights=found.weights.numpy(),
            loss=loss,
            seconds=np.array(seconds),
            best=best,
            stability=_stability(fits, best),
            share_of_energy=(size / found.energy).numpy(),
            layer=layer,
            model=model,
            mode=self.mode,
            update=self._settings().update,
            seed=self.seed,
            **facts,
            **(empty | parts),
        )

    def _by_concept(
        self,
        subject: Subject,
        data: LabelledTexts,
        read: TokenActivations,
        whole: Tensor,
        found: Factors,
        site: Site,
    ) -> dict[str, Any]:
        """Labels, detection, overlap with difference in means, and steering."""
        device, held = subject.device, data.held_out
        text = whole[read.text]
        directions = directions_of(found.features, read.blocks, text, data, self.seed, device)
        unseen = [one for one, out in zip(data.texts, held, strict=True) if out]
        rest = read_activations(subject, unseen, site, on_disk=self.on_disk, cut=self.cut)
        rest_text = torch.from_numpy(np.flatnonzero(held))[rest.text]
        scores = {}
        for name, columns in directions.items():
            halves = [
                text_scores(columns, one.blocks, of, len(data), device) for one, of in ((read, text), (rest, rest_text))
            ]
            scores[name] = np.maximum(*halves)
        known = np.isfinite(scores[concepts.FACTORS][:, 0])
        table = detection(scores, data, known, seed=self.seed)
        labels, own = _own_auc(scores[concepts.FACTORS], data, known, self.seed)
        cosine = cosines(found.features, directions[concepts.MEANS]).numpy()
        overlap = [
            (k, concept, cosine[k, c]) for k in range(self.n_features) for c, concept in enumerate(data.concepts)
        ]
        parts: dict[str, Any] = {
            "detection": table,
            "labels": labels,
            "own_auc": own,
            "overlap": pd.DataFrame(overlap, columns=["feature", "concept", "cosine"]),
        }
        if self.target_kl and data.questions:
            norm = float(torch.cat([block.norm(dim=1) for block in read.blocks]).mean())
            parts["steering"] = self._steering(subject, data, directions, table, site, norm)
        return parts

    def _steering(
        self,
        subject: Subject,
        data: LabelledTexts,
        directions: dict[str, Tensor],
        table: pd.DataFrame,
        site: Site,
        norm: float,
    ) -> pd.DataFrame:
        """Every method's chosen direction for every concept, and as control another concept's feature."""
        chosen = {
            (row["method"], row["concept"]): directions[row["method"]][:, row["direction"]]
            for row in table.to_dict("records")
            if row["direction"] >= 0
        }
        names = data.concepts
        for concept, following in zip(names, names[1:] + names[:1], strict=True):
            chosen[concepts.OTHER, concept] = chosen[concepts.FACTORS, following]
        made = {key: Direction(vector, site, subject.fingerprint, " for ".join(key)) for key, vector in chosen.items()}

        def make(direction: Direction, strength: float) -> Steer:
            return Steer(direction, site, strength)

        return causal.effects(
            subject, make, made, data.questions, self.target_kl, signs=self.signs, start=max(norm, 1e-3)
        )


def _as_texts(data: Any) -> tuple[str, ...]:
    if isinstance(data, str) or not all(isinstance(text, str) for text in data):
        raise ValueError(f"SNMF: got {type(data).__name__}, expected a list of texts or LabelledTexts.")
    return tuple(data)


def _check_labels(data: LabelledTexts) -> None:
    """ValueError where no concept could be told from another on texts that are held out."""
    count = Counter(label for label in data.labels if label)
    if count and (len(count) < 2 or min(count.values()) < 2):
        raise ValueError(
            f"SNMF: got labels of so many texts: {dict(count)}, expected two concepts or more, each of two texts or "
            "more: every second one is held out. Leave the labels out to factorise alone."
        )


def _stability(fits: list[Factors], best: int) -> np.ndarray:
    """(K,) mean over the other starts of the cosine with the matched feature; NaN with one start."""
    others = [fit for index, fit in enumerate(fits) if index != best]
    if not others:
        return np.full(fits[best].features.shape[1], np.nan)
    return torch.stack([matched_cosines(fits[best].features, fit.features) for fit in others]).mean(0).numpy()


def _own_auc(
    scores: np.ndarray, data: LabelledTexts, known: np.ndarray, seed: int
) -> tuple[tuple[str, ...], pd.DataFrame]:
    """Each feature's label, the concept it tells best where it was made, and its AUC on the texts held out."""
    labels, held = np.array(data.labels), data.held_out
    fit, test = (known & (labels != "") & part for part in (~held, held))
    table = np.stack([auc(scores[fit], labels[fit] == concept) for concept in data.concepts])  # (concept, feature)
    best = table.argmax(0)
    rows = []
    for k, c in enumerate(best):
        positive = labels[test] == data.concepts[c]
        rows.append((k, *concepts.auc_interval(scores[test, k], positive, n_bootstrap=500, seed=seed)))
    names = tuple(data.concepts[c] for c in best)
    return names, pd.DataFrame(rows, columns=["feature", "auc", "low", "high"])


def _tree(
    found: Factors, levels: tuple[int, ...], settings: SemiNMF, blocks: Blocks, seed: int, device: torch.device
) -> pd.DataFrame:
    """One row per child: its main parent (-1: none), the share of its weights there, what the level explains."""
    rows = []
    for level, (parents, weights) in enumerate(hierarchy(found.features, levels, settings, seed), start=1):
        explained = explained_share(parents, blocks, device)
        part = weights * parents.norm(dim=0)  # (children, parents)
        share = part / part.sum(1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)
        for child, parent in enumerate(share.argmax(1).tolist()):
            part_of = parent if share[child, parent] > 0 else -1
            rows.append((level, child, part_of, float(share[child, parent]), parents.shape[1], explained))
    return pd.DataFrame(rows, columns=list(TREE))


def simulated(seed: int, *, signal: bool, m: int = 400, n: int = 4000, k: int = 10) -> tuple[Tensor, Tensor]:
    """(activations (n, m), features (m, k)): eight neurons per feature, gamma weights on 15 % of tokens, noise .1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, m, generator=generator)
    rows = torch.stack([torch.randperm(m, generator=generator)[:8] for _ in range(k)], 1)  # (8, k)
    size = torch.randn(8, k, generator=generator)
    values = 2 * size + torch.sign(torch.randn(8, k, generator=generator))
    features = torch.zeros(m, k).scatter_(0, rows, values)
    used = torch.rand(n, k, generator=generator) < 0.15
    weights = -torch.log(torch.rand(n, k, generator=generator).clamp_min(1e-12)) * used
    return (weights @ features.T + 0.1 * noise if signal else noise), features


def solved(activations: Tensor, probe: SNMF) -> SNMFResult:
    """What `probe` finds in activations (n, m) that no model made."""
    fits, seconds = probe._fits(in_blocks(activations, 4096), torch.device("cpu"))
    n = np.arange(len(activations))
    return probe._result(fits, seconds, 0, None, {"token_ids": n, "positions": n, "text": 0 * n})


def _planted(name: str, seed: int, *, signal: bool) -> Planted:
    """Ten features or none. Score: pairs of a found and a planted feature with |cosine| > .9, matched one to one."""
    activations, truth = simulated(seed, signal=signal)
    probe = SNMF(n_features=10, keep=0.02, seed=seed)

    def near(result: Any) -> np.ndarray:
        return matched_cosines(truth, torch.from_numpy(result.features)).abs().numpy()

    def number(read: Callable[[Any], Any]) -> Callable[[Any], float]:
        return lambda result: float(read(result))

    if signal:
        tests = (
            Expectation("features found of 10", number(lambda r: (near(r) > 0.9).sum()), 9, 10),
            Expectation("unexplained share", number(lambda r: 1 - r.explained), 0.02, 0.06),
            Expectation("median stability", number(lambda r: np.median(r.stability)), 0.8, 1.0),
        )
    else:
        tests = (
            Expectation("largest |cosine| to a planted feature", number(lambda r: near(r).max()), 0.0, 0.5),
            Expectation("explained share", number(lambda r: r.explained), 0.0, 0.04),
            Expectation("mean stability", number(lambda r: r.stability.mean()), -0.3, 0.3),
        )
    arrays = {"activations": activations.numpy(), "features": truth.numpy()}
    return Planted(name, arrays, lambda: solved(activations, probe), tests)
