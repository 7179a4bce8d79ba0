"""Which direction stands for a behaviour? The difference in means, over layers and positions, that removes it best.

D[p, l] = mean of positive texts - mean of negative ones, at the input of block l and position p from the end. Each is
judged on held-out texts: removed everywhere (less of the target?), added at its place (more?), KL on the next token.
Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3; see `mode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from workbench.directions import position_means
from workbench.generation import text_of
from workbench.methods.steering.contrast import Contrast, constant_suffix
from workbench.methods.steering.random_control import random_units
from workbench.methods.steering.rowwise import RowProjectOut, RowSteer
from workbench.methods.steering.searched import SearchResult, Thresholds
from workbench.methods.steering.target import Target, arm_by_text, last_logprobs
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.site import Site
from workbench.values import fingerprint

if TYPE_CHECKING:
    from workbench.subject import Subject

MOST_POSITIONS = 5  # of a template's constant end: the published number for the longest template


@dataclass(frozen=True)
class DirectionSearch(Probe):
    """Finds the direction of a contrast and chooses where. Data: a Contrast, or (positive texts, negative texts).

    mode           "corrected": a candidate must also do more than random directions, and a search may find none;
                   "paper": texts filtered by their own score, thresholds as published, an error where none is left
    target         tokens that show the behaviour, a Target or words; None: found from the training texts
    positions      from the end, such as (-1, -2); None: the end that all texts share (a template's), at most 5
    layers         None: all                  kind      which residual stream: before a block, as published, or after
    n_train, n_validation   texts of each class to find the direction, and others to judge it
    answer_tokens  over how many tokens of the answer the target is looked for; 1 as published
    n_controls     random directions, at every layer; their band takes two or more, mode "paper" takes none
    kl_limit, addition_min, depth_limit   see `Thresholds`; the last is a share of the layers
    batch          tokens per forward; candidates and texts share batches
    """

    mode: Literal["corrected", "paper"] = "corrected"
    target: Target | tuple[str, ...] | None = None
    positions: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    kind: Literal["resid_in", "resid_out"] = "resid_in"
    n_train: int = 128
    n_validation: int = 32
    answer_tokens: int = 1
    n_controls: int = 8
    kl_limit: float = 0.1
    addition_min: float = 0.0
    depth_limit: float = 0.8
    batch: int = 4096
    seed: int = 0

    bounds: ClassVar[Bounds] = {
        "layers": 0,
        "n_train": 1,
        "n_validation": 1,
        "answer_tokens": 1,
        "n_controls": 0,
        "kl_limit": 0,
        "depth_limit": (0, 1),
        "batch": 1,
    }

    def measure(self, subject: Subject, data: Any) -> SearchResult:
        if self.mode == "corrected" and self.n_controls < 2:
            raise ValueError(
                f"DirectionSearch: got n_controls={self.n_controls} in mode 'corrected', expected 2 or more: "
                "candidates are compared with the band of random directions, and one gives no band."
            )
        train, validation = Contrast.of(data).split(self.n_train, self.n_validation, self.seed)
        target = self._target(subject, train)
        if self.mode == "paper":
            train, validation = (_as_scored(subject, part, target) for part in (train, validation))
        positions = self.positions or tuple(
            -n for n in range(1, 1 + max(1, min(MOST_POSITIONS, constant_suffix(subject, train))))
        )
        layers = tuple(range(subject.n_layers)) if self.layers is None else tuple(sorted(set(self.layers)))
        trial = _SubjectTrial(self, subject, train, validation, target, layers, positions)
        notes = [f"{len(train.positive)} + {len(train.negative)} training texts"]
        if not target.tells_apart():
            notes.append(
                f"no token begins answers to {train.names[0]} rather than {train.names[1]} texts: "
                f"{target.name} (gap {target.gaps[0]:.3f}) stands in"
            )
        facts = {"names": train.names, "model": subject.fingerprint, "data": fingerprint(train), "notes": tuple(notes)}
        result = self._judged(trial, target, **facts)
        if self.mode == "paper":
            _ = result.direction  # raises where every candidate was rejected
        return result

    def _judged(self, trial: _Trial, target: Target, **facts: Any) -> SearchResult:
        """The search itself, on any trial: a subject's, or a simulated one's whose truth is known."""
        vectors = trial.differences()  # (position, layer, d_model)
        n_layers = len(trial.layers)
        flat = vectors.flatten(0, 1)  # (candidate, d_model)
        layer = torch.tensor(trial.layers).repeat(len(trial.positions))
        norms = flat.norm(dim=1)
        units = flat / norms.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        random = random_units(self.n_controls, flat.shape[1], self.seed)
        longest = norms.reshape(-1, n_layers).amax(0)  # (layer,)
        pushes = (longest[:, None, None] * random).flatten(0, 1)  # (layer x random, d_model)
        nothing = torch.zeros(1, flat.shape[1], dtype=torch.float64)
        ablation, kl = trial.ablated(torch.cat([units, random, nothing]))
        addition = trial.added(
            torch.cat([flat, pushes, nothing]),
            torch.cat([layer, torch.tensor(trial.layers).repeat_interleave(self.n_controls), layer[:1]]),
        )
        n = len(flat)
        missing = (norms == 0).numpy()[:, None]
        shape = (n_layers, self.n_controls, -1)
        return SearchResult(
            layer=layer.numpy(),
            position=np.repeat(trial.positions, n_layers),
            vectors=flat.float().numpy(),
            ablation=np.where(missing, np.nan, ablation[:n]),
            addition=np.where(missing, np.nan, addition[:n]),
            kl=np.where(missing, np.nan, kl[:n]),
            random_ablation=ablation[n:-1],
            random_kl=kl[n:-1],
            random_addition=addition[n:-1].reshape(shape) if self.n_controls else np.zeros((n_layers, 0, 1)),
            base_positive=ablation[-1],
            base_negative=addition[-1],
            kind=self.kind,
            target=target.name,
            unit=target.unit,
            thresholds=asdict(self._thresholds(trial.n_layers)),
            mode=self.mode,
            seed=self.seed,
            **facts,
        )

    def _thresholds(self, n_layers: int) -> Thresholds:
        late = self.depth_limit * n_layers  # rounded down as published, which costs a small model a layer more
        first_late = math.floor(late) if self.mode == "paper" else math.ceil(late)
        return Thresholds(first_late, self.kl_limit, self.addition_min, self.mode == "corrected")

    def _target(self, subject: Subject, train: Contrast) -> Target:
        if isinstance(self.target, Target):
            return self.target
        return Target.of_words(subject, self.target) if self.target else Target.found(subject, train)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A toy stream: one class gets 5 times a unit vector at block 2, and the target is read along it."""
        return _planted("planted", cls(seed=seed), _Toy.of(seed, amount=5.0), found=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same stream where the classes differ in nothing: every candidate must be rejected."""
        return _planted("null", cls(seed=seed), _Toy.of(seed, amount=0.0), found=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[DirectionSearch, Contrast]:
        positive, negative = (
            tuple(text_of(subject.tokenizer, (*range(8 + k, 14 + k), 30)) for k in range(start, start + 8))
            for start in (0, 40)
        )
        probe = cls(n_train=6, n_validation=2, n_controls=2, layers=(0, subject.n_layers - 1))
        return probe, Contrast(positive, negative)


class _Trial(Protocol):
    """What the search asks of its world. Scores and KL are arrays (direction, text)."""

    @property
    def n_layers(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def positions(self) -> tuple[int, ...]: ...

    def differences(self) -> Tensor:
        """(position, layer, d_model) differences in means, float64."""
        ...

    def ablated(self, units: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Scores of positive texts and KL of negative ones with each unit vector (or nothing: zeros) removed."""
        ...

    def added(self, vectors: Tensor, layer: Tensor) -> np.ndarray:
        """Scores of negative texts with each vector added at its layer."""
        ...


@dataclass(frozen=True)
class _SubjectTrial:
    """The trial on a model: candidates are rows of the same batches."""

    probe: DirectionSearch
    subject: Subject
    train: Contrast
    validation: Contrast
    target: Target
    layers: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        return self.subject.n_layers

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, self.probe.kind) for layer in self.layers)

    def differences(self) -> Tensor:
        classes = (self.train.positive, self.train.negative)
        first, second = (position_means(self.subject, texts, self.sites, self.positions) for texts in classes)
        return torch.stack([first[site] - second[site] for site in self.sites], 1)

    def ablated(self, units: Tensor) -> tuple[np.ndarray, np.ndarray]:
        base = last_logprobs(self.subject, self.validation.negative, batch=self.probe.batch)

        def without(arms: Tensor) -> Any:
            return self.subject.under(RowProjectOut(units[arms]))

        def divergence(logprobs: Tensor, texts: list[int]) -> Tensor:
            before, after = base[texts].to(logprobs.device).double(), logprobs[:, 0].double()
            return (before.exp() * (before - after)).sum(-1, keepdim=True)

        scores = self._run(self.validation.positive, len(units), without, self._score, self.probe.answer_tokens)
        return scores, self._run(self.validation.negative, len(units), without, divergence, 1)

    def added(self, vectors: Tensor, layer: Tensor) -> np.ndarray:
        here = layer[:, None] == torch.tensor(self.layers)  # (direction, layer)

        def pushed(arms: Tensor) -> Any:
            return self.subject.under(RowSteer(vectors[arms][:, None] * here[arms][:, :, None], self.sites))

        texts = self.validation.negative
        return self._run(texts, len(vectors), pushed, self._score, self.probe.answer_tokens)

    def _score(self, logprobs: Tensor, texts: list[int]) -> Tensor:
        return self.target.score(logprobs)[:, None]

    def _run(self, texts: Any, n_arms: int, under: Callable, read: Callable, n_tokens: int) -> np.ndarray:
        options = {"n_tokens": n_tokens, "batch": self.probe.batch}
        return arm_by_text(self.subject, texts, n_arms, under, read, **options)[..., 0].numpy()


@dataclass(frozen=True)
class _Toy:
    """A residual stream whose blocks write nothing but, in block 2 of one class, `amount` times a unit vector.

    The target's score is 2 (x . r) - 5 at the end of the stream, so it turns at half of the published amount 5.
    """

    truth: Tensor  # (d_model,) the unit vector
    train: tuple[Tensor, Tensor]  # (text, d_model) of the positive and of the negative class, before block 0
    validation: tuple[Tensor, Tensor]
    amount: float
    n_layers: int = 8
    positions: tuple[int, ...] = (-1,)

    @classmethod
    def of(cls, seed: int, amount: float, width: int = 64, n_train: int = 128, n_validation: int = 32) -> _Toy:
        generator = torch.Generator().manual_seed(7919 * (seed + 1))  # not the stream of the random directions
        truth, *classes = (
            torch.randn(n, width, generator=generator, dtype=torch.float64)
            for n in (1, n_train, n_train, n_validation, n_validation)
        )
        return cls(truth[0] / truth.norm(), (classes[0], classes[1]), (classes[2], classes[3]), amount)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.n_layers))

    @property
    def written(self) -> Tensor:
        """What block 2 adds for the positive class."""
        return self.amount * self.truth

    def differences(self) -> Tensor:
        noise = self.train[0].mean(0) - self.train[1].mean(0)
        return torch.stack([noise + self.written * (layer > 2) for layer in self.layers])[None]

    def ablated(self, units: Tensor) -> tuple[np.ndarray, np.ndarray]:
        positive, negative = self.validation[0] + self.written, self.validation[1]
        return self._score(positive, units), self._divergence(self._score(negative, units))

    def added(self, vectors: Tensor, layer: Tensor) -> np.ndarray:
        return (2 * (self.validation[1] + vectors[:, None]) @ self.truth - 5).numpy()

    def _score(self, values: Tensor, units: Tensor) -> np.ndarray:
        left = values - (values @ units.T).T[..., None] * units[:, None]  # (direction, text, d_model)
        return (2 * left @ self.truth - 5).numpy()

    def _divergence(self, scores: np.ndarray) -> np.ndarray:
        """KL of the two outcomes, target or not; the last direction is no direction at all: the base."""
        p, q = (1 / (1 + np.exp(-values)) for values in (scores[-1:], scores))
        return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def _planted(name: str, probe: DirectionSearch, toy: _Toy, *, found: bool) -> Planted:
    def solve() -> SearchResult:
        return probe._judged(toy, Target((0,), ("toy",)), names=("with", "without"), notes=())

    def cosine(result: Any, layers: range, reduce: Callable = min) -> float:
        return reduce(abs(result.at(layer, -1).cosine(toy.truth)) for layer in layers)

    def n_accepted(result: Any) -> float:
        return float(len(result.accepted))

    def left(result: Any) -> float:
        return float(result.table()["ablation_score"].min())

    early = Expectation("largest cosine before the block", lambda it: cosine(it, range(3), max), 0.0, 0.4)
    if found:
        tests = (
            Expectation("smallest cosine after the block", lambda it: cosine(it, range(3, 8)), 0.95, 1.0),
            early,
            Expectation("accepted candidates", n_accepted, 4, 4),  # layers 3 to 6; 7 is late
            Expectation("score left by removal", left, -6.0, -4.0),
        )
    else:
        late = Expectation("largest cosine after the block", lambda it: cosine(it, range(3, 8), max), 0.0, 0.4)
        tests = (early, late, Expectation("accepted candidates", n_accepted, 0, 0))
    arrays = {"truth": toy.truth.numpy(), "positive": toy.train[0].numpy(), "negative": toy.train[1].numpy()}
    return Planted(name, arrays, solve, tests)


def _as_scored(subject: Subject, contrast: Contrast, target: Target) -> Contrast:
    """The texts on which the model does what their class says: score above 0 for positive, below 0 for negative."""
    kept = []
    for texts, wanted, name in zip((contrast.positive, contrast.negative), (1, -1), contrast.names, strict=True):
        scores = target.score(last_logprobs(subject, texts)[:, None])
        kept.append(tuple(text for text, score in zip(texts, scores.tolist(), strict=True) if score * wanted > 0))
        if not kept[-1]:
            raise ValueError(
                f"DirectionSearch: mode 'paper' keeps texts that show their class, but none of {len(texts)} {name} "
                f"texts does ({target.name}). Use mode='corrected' or another target."
            )
    return Contrast(kept[0], kept[1], contrast.names)
