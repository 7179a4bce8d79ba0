"""LayerMenu: which layers can be narrowed, and which of their parts left out, for the least damage at a given cost?

Every layer's alternatives are swapped in alone and measured: KL, bytes, milliseconds. An integer program then picks
one per layer; what it picks is measured too, beside the same cut everywhere and random picks of the same cost.
Source: Puzzle, Bercovich et al., 2024 (arXiv 2411.19146), sections 2 and 3, without training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from workbench.clock import read_clock
from workbench.generation import text_of
from workbench.methods.pruning.budgets import Ranking
from workbench.methods.pruning.menu import COSTS, DROPPED, FULL, LayerMenuResult, choose, layer_plan
from workbench.methods.pruning.scores import scored
from workbench.probe import Expectation, Planted, Probe
from workbench.pruned.plan import Plan, Shape
from workbench.pruned.report import Sizes
from workbench.toggles.prune import Prune

if TYPE_CHECKING:
    from workbench.subject import Subject

AFTER = 3  # tokens that are timed after a prompt


@dataclass(frozen=True)
class LayerMenu(Probe):
    """A menu per layer and what to pick from it.

    widths         shares of a layer's neurons that an alternative keeps, best first by `criterion`
    criterion      of `PruningScores`
    budgets, by    shares of the whole blocks' cost that are solved for and measured
    prompt_tokens  length of the prompt whose time is measured; a token after it is measured too
    repeats        of every time; alternatives take turns
    draws          random picks per budget, the control
    Data: texts; their first half scores the neurons, the second half measures damage.
    """

    widths: tuple[float, ...] = (0.87, 0.75, 0.5, 0.25)
    criterion: str = "amp_out"
    budgets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)
    by: str = "weight_bytes"
    prompt_tokens: int = 64
    repeats: int = 5
    draws: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or any(not 0 < share <= 1 for share in (*self.widths, *self.budgets)):
            raise ValueError(f"LayerMenu: got widths={self.widths}, budgets={self.budgets}, expected shares in (0, 1].")
        if self.by not in COSTS:
            raise ValueError(f"LayerMenu: got by={self.by!r}, expected one of {', '.join(COSTS)}.")
        if min(self.repeats, self.draws, self.prompt_tokens) < 1:
            raise ValueError("LayerMenu: expected at least one repeat, one draw and one token of a prompt.")

    def measure(self, subject: Subject, data: Sequence[Any]) -> LayerMenuResult:
        texts = list(data)
        if len(texts) < 2:
            raise ValueError(f"LayerMenu: got {len(texts)} texts, expected at least two: some score, some measure.")
        if subject.context is not None and self.prompt_tokens + AFTER > subject.context:
            raise ValueError(
                f"LayerMenu: got prompt_tokens={self.prompt_tokens}, expected at most {subject.context - AFTER}: "
                f"{AFTER} more are timed after them, and the context is {subject.context}."
            )
        half = len(texts) // 2
        ranking = scored(subject, texts[:half], (self.criterion,), seed=self.seed).ranking()
        judge = _Judge(subject, texts[half:])
        names, kept = self._alternatives(subject, ranking)
        order = np.argsort(-ranking.neurons, axis=1, kind="stable")
        menu = {
            (layer, index): _plan(subject, {layer: name}, kept[index], order)
            for layer in range(subject.n_layers)
            for index, name in enumerate(names)
        }
        damage = np.array([judge.damage(plan) for plan in menu.values()]).reshape(subject.n_layers, len(names), -1)
        times = self._times(subject, names, kept, order)
        types = _types(subject)
        needed = [[one == types[0] and name not in ("no attention", DROPPED) for name in names] for one in types]
        result = LayerMenuResult(
            damage=damage,
            held=_held(menu, ranking.sizes).reshape(2, *damage.shape[:2]),
            times_ms=times,
            types=tuple(types),
            needed=np.array(needed),
            kept=np.array(kept),
            order=order,
            budgets=tuple(self.budgets),
            by=self.by,
            picks=np.zeros(0, dtype=int),
            measured=np.zeros(0),
            n_tokens=judge.n_tokens,
            alternatives=names,
            shape=tuple(vars(Shape.of(subject)).values()),
            seed=self.seed,
        )
        result = replace(result, picks=self.picked(result))
        return replace(
            result,
            measured=np.array(
                [[[judge.damage(result.plan_of(pick)) for pick in draws] for draws in ways] for ways in result.picks]
            ),
        )

    def picked(self, menu: LayerMenuResult) -> np.ndarray:
        """(budget, way, draw, layer) what the knapsack, the same cut everywhere and chance pick at every budget."""
        rng = np.random.default_rng(self.seed)
        cost, whole, picks = menu.cost, float(menu.cost[self.by][:, 0].sum()), []
        for share in self.budgets:
            budgets = {self.by: share * whole}
            best = choose(menu.mean_damage, cost, budgets, needed=menu.needed).picks
            gone = cost[self.by][:, :1] - cost[self.by]  # of layers that are worth something at random
            chance = [
                choose(rng.random((len(gone), 1)) * gone, cost, budgets, needed=menu.needed).picks
                for _ in range(self.draws)
            ]
            even = _even(cost[self.by], budgets[self.by], menu.needed, rng)
            picks.append([[best] * self.draws, [even] * self.draws, chance])
        return np.array(picks)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A menu in which half of the layers are superfluous: leaving those out costs nothing."""
        return _planted("superfluous layers", 0.0, seed)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """A menu in which every byte of every layer is worth the same: no choice is better than another."""
        return _planted("layers of equal worth", 1.0, seed)

    @classmethod
    def example(cls, subject: Subject) -> tuple[Probe, Any]:
        texts = [text_of(subject.tokenizer, range(start, start + 9)) for start in (8, 20, 32, 44)]
        probe = cls(widths=(0.5,), budgets=(0.8,), prompt_tokens=8, repeats=1, draws=1)
        return probe, texts

    # Below: how

    def _alternatives(self, subject: Subject, ranking: Ranking) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Names, and how many neurons each keeps."""
        n_neurons = ranking.neurons.shape[1]
        names, kept = [FULL], [n_neurons]
        if n_neurons and not ranking.sizes.no_neurons:
            names += [f"{share:.0%} of neurons" for share in self.widths] + ["no neurons"]
            kept += [max(1, round(share * n_neurons)) for share in self.widths] + [0]
        return (*names, "no attention", DROPPED), (*kept, n_neurons, 0)

    def _times(self, subject: Subject, names: Sequence[str], kept: Sequence[int], order: np.ndarray) -> np.ndarray:
        """(phase, layer, alternative, repeat) milliseconds; each alternative in all layers at once, in turns."""
        times = np.zeros((2, subject.n_layers, len(names), self.repeats))
        layers = range(subject.n_layers)
        ids = torch.arange(1, self.prompt_tokens + 1, device=subject.device)[None] % subject.anatomy.vocab
        for repeat in range(-1, self.repeats):  # the first round warms up
            for index, name in enumerate(names):
                if name == DROPPED:
                    continue  # takes no time
                first = 1 if name == "no attention" else 0  # the cache needs a layer that attends
                plan = _plan(subject, dict.fromkeys(layers[first:], name), kept[index], order)
                with subject.under(Prune(plan)):
                    found = _block_ms(subject, ids)
                if first and len(layers) > 1:
                    found[:, 0] = found[:, 1]
                if repeat >= 0:
                    times[:, :, index, repeat] = found
        return times


class _Judge:
    """KL to the subject as it was at first, of each text."""

    def __init__(self, subject: Subject, texts: Sequence[Any]) -> None:
        self.subject, self.texts = subject, texts
        self.n_tokens = np.array(subject.tokenize(texts, cut=True).lengths, dtype=np.float64)
        self.base = {row: logprobs for row, _, logprobs in subject.predictions(texts, cut=True)}

    def damage(self, plan: Plan) -> np.ndarray:
        """(text,) nats per token."""
        found = np.zeros(len(self.texts))
        with self.subject.under(Prune(plan)):
            for row, _, logprobs in self.subject.predictions(self.texts, cut=True):
                base = self.base[row].double()
                found[row] = float((base.exp() * (base - logprobs.double())).sum(-1).mean())
        return found


def _plan(subject: Subject, names: Mapping[int, str], kept: int, order: np.ndarray) -> Plan:
    """The plan in which some layers have the alternative of that name."""
    layers = {layer: layer_plan(name, order[layer], kept) for layer, name in names.items()}
    return Plan.of(subject, layers, drop=[layer for layer, name in names.items() if name == DROPPED])


def _types(subject: Subject) -> list[str]:
    """The type of each layer: only layers of one type and width cost the same."""
    config: Any = subject.model.config.get_text_config()
    return list(getattr(config, "layer_types", None) or [""] * subject.n_layers)


def _held(menu: Mapping[tuple[int, int], Plan], sizes: Sizes) -> np.ndarray:
    """(2, alternatives of all layers) bytes of weights, and of one token in the cache."""
    weights = [sizes.left(plan, layer) * sizes.itemsize for (layer, _), plan in menu.items()]
    return np.array([weights, [sizes.cache_bytes(plan, layer) for (layer, _), plan in menu.items()]])


def _block_ms(subject: Subject, ids: torch.Tensor) -> np.ndarray:
    """(2, layer) milliseconds of each block: for the prompt, and per token after it."""
    blocks: Any = subject.model.get_submodule(subject.anatomy.blocks)
    spent, started = np.zeros((2, len(blocks))), [0.0]
    phase = [0]

    def before(_: nn.Module, args: Any) -> None:
        started[0] = read_clock(ids)

    def after(layer: int, _: nn.Module, args: Any, output: Any) -> None:
        spent[phase[0], layer] += 1e3 * (read_clock(ids) - started[0])

    with ExitStack() as undo, torch.no_grad():
        for layer, block in enumerate(blocks):
            undo.callback(block.register_forward_pre_hook(before).remove)
            undo.callback(block.register_forward_hook(partial(after, layer)).remove)
        output = subject.model(input_ids=ids, use_cache=True)
        phase[0] = 1
        for _ in range(AFTER):
            chosen = output.logits[:, -1:].argmax(-1)
            output = subject.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
    spent[1] /= AFTER
    return spent


def _even(cost: np.ndarray, budget: float, needed: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """The same alternative in every layer, the most expensive one that fits; layers in random order then get the next
    more expensive one for as long as that fits."""
    allowed = [index for index in range(cost.shape[1]) if needed[:, index].any()]
    by_cost = sorted(allowed, key=lambda index: -float(cost[:, index].sum()))
    fitting = [place for place, index in enumerate(by_cost) if cost[:, index].sum() <= budget]
    if not fitting:
        raise ValueError("LayerMenu: the same cut in every layer can't be that small. Ask for a larger budget.")
    picks = np.full(len(cost), by_cost[fitting[0]])
    if fitting[0] > 0:
        more = by_cost[fitting[0] - 1]
        for layer in rng.permutation(len(cost)):
            trial = picks.copy()
            trial[layer] = more
            if cost[np.arange(len(cost)), trial].sum() <= budget:
                picks = trial
    return tuple(int(pick) for pick in picks)


def _planted(name: str, worth: float, seed: int) -> Planted:
    """A menu without a model: damage is proportional to the bytes that leave, in superfluous layers times `worth`."""
    rng = np.random.default_rng(seed)
    n_layers, kept = 6, np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    superfluous = rng.permutation(n_layers)[: n_layers // 2]
    weight = np.ones(n_layers)
    weight[superfluous] = worth
    damage = weight[:, None, None] * (1 - kept)[None, :, None] * np.ones(8)
    bytes_left = np.broadcast_to(1000.0 * kept, (n_layers, len(kept)))
    names = (FULL, *(f"{share:.0%} of neurons" for share in kept[1:-1]), "no neurons")
    menu = LayerMenuResult(
        damage=damage,
        held=np.stack([bytes_left, np.ones_like(bytes_left)]),
        times_ms=np.stack([bytes_left / 100, bytes_left / 1000])[..., None],
        types=("",) * n_layers,
        needed=np.ones((n_layers, len(kept)), dtype=bool),
        kept=(kept * 100).astype(int),
        order=np.tile(np.arange(100), (n_layers, 1)),
        budgets=(0.75, 0.5),
        by="weight_bytes",
        picks=np.zeros(0, dtype=int),
        measured=np.zeros(0),
        n_tokens=np.ones(8),
        alternatives=names,
        shape=(n_layers, 8, 1, 1, 8, 100),
        seed=seed,
    )

    def solve() -> LayerMenuResult:
        made = replace(menu, picks=LayerMenu(budgets=menu.budgets, seed=seed).picked(menu))
        rows = np.arange(n_layers)
        measured = [[[damage[rows, pick].sum(axis=0) for pick in draws] for draws in ways] for ways in made.picks]
        return replace(made, measured=np.array(measured))

    def left(result: Any) -> float:
        best = result.frontier().query("way == 'knapsack'")
        return float(best["predicted"].max())

    least = (0.0, 1e-9) if worth == 0 else (2.9, 3.1)  # what leaves at .5 is worth 3 layers, whichever they are
    return Planted(
        name=name,
        arrays={"damage": damage, "superfluous": superfluous},
        solve=solve,
        expectations=(
            Expectation("damage of the knapsack's choice", left, *least),
            Expectation(
                "gain over the same cut everywhere",
                lambda result: result.gain()[0],  # type: ignore[attr-defined]
                *((0.5, 3.0) if worth == 0 else (-1e-9, 1e-9)),
            ),
        ),
    )
