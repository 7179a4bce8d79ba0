"""Which layer, and how much? What a push along a direction does to its target and to all else, layer by strength.

x' = x + s m_l v / |v| at layer l; s the strength, m_l the mean norm of the residual stream there, so that strengths
mean the same at every layer. Beside it random directions of the same norm. A layer stops where KL passes a limit.
Source: this project; the question is that of Turner et al. 2023 and Arditi et al. 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from workbench.directions import Direction
from workbench.generation import text_of
from workbench.methods.steering.random_control import random_units
from workbench.methods.steering.rowwise import RowSteer
from workbench.methods.steering.side_effects import divergence_by_text, mean_residual_norm, own_likelihood
from workbench.methods.steering.steered import SteeringMapResult
from workbench.methods.steering.target import Target, arm_by_text
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.site import Site
from workbench.step import Positions
from workbench.toggles.steer import Steer
from workbench.tokens import Texts

if TYPE_CHECKING:
    from workbench.subject import Subject

STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class SteeringMap(Probe):
    """Maps effect and side effect. Data: {"prompts": texts to push, "texts": other texts that should not change}.

    direction   one Direction for every layer, or several, each for the layer of its own site
    target      what the push is for: a Target, or words whose first tokens make one
    layers      None: all, or those of the directions          strengths   in mean residual norms; may be negative
    kind        which residual stream; None: the direction's own, else after the block
    positions   which tokens are pushed
    kl_limit    nats per token on other text from which a layer's stronger pushes are not run
    reach       the target's value at which a push is strong enough, for the choice; None: see `best`
    n_controls  random directions           n_written   tokens written per prompt for the fluency; 0: none
    """

    direction: Direction | tuple[Direction, ...]
    target: Target | tuple[str, ...]
    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = STRENGTHS
    kind: Literal["resid_in", "resid_out"] | None = None
    positions: Positions | tuple[int, ...] = "all"
    kl_limit: float = 2.0
    reach: float | None = None
    n_controls: int = 5
    n_written: int = 12
    batch: int = 2048
    seed: int = 0

    bounds: ClassVar[Bounds] = {"kl_limit": 0, "n_controls": 0, "n_written": 0, "batch": 1}

    def measure(self, subject: Subject, data: Any) -> SteeringMapResult:
        if not isinstance(data, Mapping) or not {"prompts", "texts"} <= set(data):
            raise ValueError('SteeringMap: expected data {"prompts": [...], "texts": [...]}: to push, and to leave.')
        target = self.target if isinstance(self.target, Target) else Target.of_words(subject, self.target)
        directions = self._by_layer(subject)
        trial = _SubjectTrial(self, subject, target, directions, data["prompts"], data["texts"])
        name = next(iter(directions.values())).name or "a direction"
        return self._mapped(trial, directions, target, kind=self._kind(), direction=name)

    def _mapped(
        self, trial: _Trial, directions: Mapping[int, Direction], target: Target, **facts: Any
    ) -> SteeringMapResult:
        """The map itself, on any trial: a subject's, or a simulated one's whose truth is known."""
        layers, strengths = tuple(directions), tuple(sorted(self.strengths))
        norm = trial.norms(layers)
        base = trial.cell(layers[0], torch.zeros(1, len(directions[layers[0]].vector), dtype=torch.float64))
        shape = (len(layers), len(strengths))
        found: dict[str, np.ndarray] = {
            "score": np.full((*shape, base.score.shape[1]), np.nan),
            "kl": np.full((*shape, base.kl.shape[1]), np.nan),
            "nll": np.full((*shape, base.kl.shape[1]), np.nan),
            "random_score": np.full((*shape, self.n_controls), np.nan),
            "random_kl": np.full((*shape, self.n_controls), np.nan),
            "fluency": np.full((*shape, len(base.fluency)), np.nan),
        }
        for i, layer in enumerate(layers):
            unit = directions[layer].unit().vector.double()[None]
            units = norm[i] * torch.cat([unit, random_units(self.n_controls, unit.shape[1], self.seed)])
            for j, cell in self._cells(trial, layer, strengths, units):
                found["score"][i, j], found["kl"][i, j], found["nll"][i, j] = cell.score[0], cell.kl[0], cell.nll[0]
                found["random_score"][i, j] = cell.score[1:].mean(axis=1)
                found["random_kl"][i, j] = np.average(cell.kl[1:], axis=1, weights=base.n_tokens)
                found["fluency"][i, j] = cell.fluency
        return SteeringMapResult(
            norm=norm.numpy(),
            base_score=base.score[0],
            base_nll=base.nll[0],
            base_fluency=base.fluency,
            n_tokens=base.n_tokens,
            layers=layers,
            strengths=strengths,
            target=target.name,
            unit=target.unit,
            kl_limit=self.kl_limit,
            reach=self.reach,
            seed=self.seed,
            **found,
            **facts,
        )

    def _cells(
        self, trial: _Trial, layer: int, strengths: tuple[float, ...], units: Tensor
    ) -> Iterator[tuple[int, _Cell]]:
        """The cells of one layer with their place among the strengths: from the weakest push on, until one costs too
        much, each way. A strength of 0 is on the positive side."""
        for side in (1, -1):
            chosen = [j for j, strength in enumerate(strengths) if (strength >= 0) == (side == 1)]
            for j in chosen[::side]:
                cell = trial.cell(layer, strengths[j] * units)
                yield j, cell
                if np.average(cell.kl[0], weights=cell.n_tokens) > self.kl_limit:
                    break

    def _kind(self) -> str:
        first = self.direction if isinstance(self.direction, Direction) else self.direction[0]
        return self.kind or (first.site.kind if first.site else "resid_out")

    def _by_layer(self, subject: Subject) -> dict[int, Direction]:
        """The direction of each layer."""
        if not self.strengths or self.layers == () or self.direction == ():
            raise ValueError("SteeringMap: got no strengths, layers or directions, expected at least one of each.")
        if self.positions == "generated":
            raise ValueError(
                "SteeringMap: got positions='generated', but the target is read after the prompt, where nothing is "
                "generated yet. Push at 'all', 'prompt' or 'last'."
            )
        if isinstance(self.direction, Direction):
            layers = range(subject.n_layers) if self.layers is None else self.layers
            found = dict.fromkeys(layers, self.direction)
        else:
            if any(one.site is None for one in self.direction):
                raise ValueError("SteeringMap: got several directions, one without a site: which layer is it for?")
            own = {one.site.layer: one for one in self.direction if one.site}
            if len(own) < len(self.direction) or len({one.site.kind for one in self.direction if one.site}) > 1:
                places = ", ".join(str(one.site) for one in self.direction)
                raise ValueError(f"SteeringMap: got directions for {places}, expected one per layer, all of one kind.")
            found = own if self.layers is None else {layer: own[layer] for layer in self.layers if layer in own}
            if self.layers is not None and set(self.layers) - set(own):
                raise ValueError(f"SteeringMap: got layers {self.layers}, but directions for {tuple(own)} only.")
        for layer, one in found.items():
            one.for_subject(subject, Site(layer, self._kind()))  # type: ignore[arg-type]
        return found

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A toy whose target is read at block 3, and whose early layers are the more easily damaged."""
        return _planted("planted", seed, aligned=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same toy pushed along a direction that it does not read: no cell may leave the random band."""
        return _planted("null", seed, aligned=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[SteeringMap, dict[str, tuple[str, ...]]]:
        vector = torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(0))
        texts = tuple(text_of(subject.tokenizer, range(8 + k, 14 + k)) for k in range(6))
        direction = Direction(vector, name="a random vector")
        probe = cls(direction, Target((9, 10)), (0, subject.n_layers - 1), (-1.0, 0.5, 1.0), n_controls=2, n_written=2)
        return probe, {"prompts": texts[:3], "texts": texts[3:]}


def steering_map(
    subject: Subject,
    direction: Direction | Sequence[Direction],
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    *,
    prompts: Texts,
    texts: Texts,
    target: Target | Sequence[str],
    **settings: Any,
) -> SteeringMapResult:
    """The layer x strength map of a direction: `SteeringMap` with `settings`, run on `prompts` and other `texts`.

    `.plot()` shows it, `.best()` answers which layer and how much.
    """
    if isinstance(target, str):
        raise ValueError(f"steering_map: got target={target!r}, expected a Target or a list of words: [{target!r}].")
    probe = SteeringMap(
        direction if isinstance(direction, Direction) else tuple(direction),
        target if isinstance(target, Target) else tuple(target),
        None if layers is None else tuple(layers),
        tuple(float(strength) for strength in strengths),
        **settings,
    )
    result = probe.run(subject, {"prompts": prompts, "texts": texts})
    assert isinstance(result, SteeringMapResult)
    return result


@dataclass(frozen=True, eq=False)
class _Cell:
    """One layer and push: target (arm, prompt), KL and nll (arm, text), fluency (prompt,) of the first arm."""

    score: np.ndarray
    kl: np.ndarray
    nll: np.ndarray
    n_tokens: np.ndarray
    fluency: np.ndarray


class _Trial(Protocol):
    """What the map asks of its world."""

    def norms(self, layers: tuple[int, ...]) -> Tensor:
        """(layer,) mean norm of the residual stream, float64."""
        ...

    def cell(self, layer: int, pushes: Tensor) -> _Cell:
        """What each push (arm, d_model) at a layer does."""
        ...


@dataclass(frozen=True, eq=False)
class _SubjectTrial:
    """The trial on a model: the direction and its controls are rows of the same batches."""

    probe: SteeringMap
    subject: Subject
    target: Target
    directions: Mapping[int, Direction]
    prompts: Texts
    texts: Texts

    def site(self, layer: int) -> Site:
        return Site(layer, self.probe._kind())  # type: ignore[arg-type]

    def norms(self, layers: tuple[int, ...]) -> Tensor:
        return mean_residual_norm(self.subject, self.texts, tuple(map(self.site, layers)))

    def cell(self, layer: int, pushes: Tensor) -> _Cell:
        def pushed(rows: Tensor) -> Any:
            return self.subject.under(RowSteer(rows[:, None], (self.site(layer),), self.probe.positions))

        def read(logprobs: Tensor, texts: list[int]) -> Tensor:
            return self.target.score(logprobs)[:, None]

        score = arm_by_text(
            self.subject, self.prompts, len(pushes), lambda arms: pushed(pushes[arms]), read, batch=self.probe.batch
        )
        with_base = torch.cat([torch.zeros_like(pushes[:1]), pushes])
        kl, nll = divergence_by_text(
            self.subject, self.texts, len(with_base), lambda arms: pushed(with_base[arms]), batch=self.probe.batch
        )
        lengths = np.array(self.subject.tokenize(self.texts).lengths) - 1.0
        return _Cell(score[..., 0].numpy(), kl[1:].numpy(), nll[1:].numpy(), lengths, self._fluency(layer, pushes[0]))

    def _fluency(self, layer: int, push: Tensor) -> np.ndarray:
        n = self.probe.n_written
        if not n:
            return np.zeros(0)
        with self.subject.under(Steer(push, self.site(layer), positions=self.probe.positions)):
            written = self.subject.generate(self.prompts, max_new_tokens=n)
        return own_likelihood(self.subject, self.prompts, written.ids).numpy()


@dataclass(frozen=True, eq=False)
class _Toy:
    """A stream in which block 3 reads 4 times the component along a unit vector: later pushes come too late.

    Damage is c_l s^2 with c_l = 0.4 / (1 + l): of the layers that work, the last one costs least.
    """

    truth: Tensor
    noise: np.ndarray
    gain: float = 4.0
    reads_at: int = 3

    def norms(self, layers: tuple[int, ...]) -> Tensor:
        return torch.tensor([2.0 + layer for layer in layers], dtype=torch.float64)

    def cell(self, layer: int, pushes: Tensor) -> _Cell:
        along = (pushes @ self.truth).numpy()[:, None] * self.gain * (layer <= self.reads_at)
        strength = (pushes.norm(dim=1) / (2.0 + layer)).numpy()[:, None]
        kl = 0.4 / (1 + layer) * strength**2 * np.ones((1, 4))
        return _Cell(self.noise + along, kl, 2.0 + kl, np.ones(4), np.full(2, 1.0 + float(strength[0, 0])))


def _planted(name: str, seed: int, *, aligned: bool) -> Planted:
    rng = np.random.default_rng(seed)
    truth, other = rng.normal(size=(2, 64))
    truth /= np.linalg.norm(truth)
    toy = _Toy(torch.from_numpy(truth), rng.normal(size=(1, 16)))
    direction = Direction(torch.from_numpy(truth if aligned else other), name="the truth" if aligned else "another")
    target = Target((0,), ("toy",))
    probe = SteeringMap(direction, target, strengths=(0.5, 1.0, 2.0, 4.0, 8.0), seed=seed)

    def solve() -> SteeringMapResult:
        directions = dict.fromkeys(range(6), direction)
        return probe._mapped(toy, directions, target, kind="resid_out", direction=direction.name)

    def per_strength(result: Any) -> float:
        """The effect per unit of added norm where the push works."""
        table = result.table().query("run and layer <= 3")
        return float((table["effect"] / table["added_norm"]).mean())

    def beyond(result: Any, query: str) -> float:
        return float(result.table().query(f"run and {query}")["beyond_control"].mean())

    def chosen(result: Any) -> float:
        return float(result.best().layer) if result.best() else float("nan")

    def choices(result: Any) -> float:
        return float(sum(result.best(towards=side) is not None for side in ("more", "less")))

    def not_run(result: Any) -> float:
        return float((~result.table()["run"]).sum())

    stopped = Expectation("cells not run: KL at 4 passes 2 at layers 0 to 2", not_run, 3, 3)
    late = Expectation("share beyond random directions, late layers", lambda it: beyond(it, "layer > 3"), 0, 0)
    if aligned:
        tests = (
            Expectation("effect per added norm", per_strength, 4 - 1e-5, 4 + 1e-5),
            Expectation("share beyond random directions, layers that work", lambda it: beyond(it, "layer <= 3"), 1, 1),
            Expectation("chosen layer", chosen, 3, 3),
            late,
            stopped,
        )
    else:
        early = Expectation("share beyond random directions, early layers", lambda it: beyond(it, "layer <= 3"), 0, 0)
        tests = (early, late, Expectation("choices", choices, 0, 0), stopped)
    return Planted(name, {"truth": truth, "noise": toy.noise}, solve, tests)
