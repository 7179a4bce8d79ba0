"""The knapsack over layers: the best of all choices, within every budget, never worse with more room."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

from workbench import Site, Subject
from workbench.methods.pruning.menu import DROPPED, choose
from workbench.probes.layer_menu import LayerMenu
from workbench.pruned import plan_now
from workbench.toggles.prune import Prune


def random_menu(seed: int, n_layers: int = 4, n_choices: int = 5) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    costs = {
        "weight_bytes": rng.integers(1, 50, (n_layers, n_choices)) * 1e6,
        "prefill_ms": rng.random((n_layers, n_choices)),
    }
    return rng.random((n_layers, n_choices)), costs


def by_hand(damage: np.ndarray, costs: dict[str, np.ndarray], budgets: dict[str, float]) -> float:
    """The least damage of all choices, tried one by one; infinite where none fits."""
    rows = np.arange(len(damage))
    every = itertools.product(range(damage.shape[1]), repeat=len(damage))
    fitting = (p for p in every if all(costs[n][rows, list(p)].sum() <= b * (1 + 1e-12) for n, b in budgets.items()))
    return min((float(damage[rows, list(pick)].sum()) for pick in fitting), default=np.inf)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_625_under_one_and_two_budgets(seed: int) -> None:
    damage, costs = random_menu(seed)
    for names in (["weight_bytes"], ["prefill_ms"], ["weight_bytes", "prefill_ms"]):
        for room in (0.2, 0.5, 0.8):
            budgets = {}
            for name in names:
                low, high = costs[name].min(1).sum(), costs[name].max(1).sum()
                budgets[name] = low + room * (high - low)
            best = by_hand(damage, costs, budgets)
            if best == np.inf:
                with pytest.raises(ValueError, match="keeps all budgets"):
                    choose(damage, costs, budgets)
                continue
            found = choose(damage, costs, budgets)
            assert found.predicted == pytest.approx(best, abs=1e-9)
            assert all(found.costs[name] <= budget * (1 + 1e-9) for name, budget in budgets.items())


@pytest.mark.parametrize(("size", "spread"), [(1.0, 1e-5), (1.0, 1e-7), (1e-8, 1.0), (0.0, 1.0)])
def test_the_best_is_found_where_others_are_nearly_as_good_and_damages_are_small(size: float, spread: float) -> None:
    for seed in range(6):
        damage, costs = random_menu(seed)
        damage = size * (1 + spread * damage)
        low, high = costs["weight_bytes"].min(1).sum(), costs["weight_bytes"].max(1).sum()
        budgets = {"weight_bytes": low + 0.4 * (high - low)}
        best = by_hand(damage, costs, budgets)
        assert choose(damage, costs, budgets).predicted == pytest.approx(best, rel=1e-12, abs=0)
    with pytest.raises(ValueError, match="got a budget of nan"):
        choose(damage, costs, {"weight_bytes": float("nan")})


def test_more_room_is_never_worse_and_all_room_takes_the_best_of_every_layer() -> None:
    damage, costs = random_menu(1, 12, 6)
    most = costs["weight_bytes"].max(1).sum()
    least = costs["weight_bytes"].min(1).sum()
    found = [choose(damage, costs, {"weight_bytes": b}).predicted for b in np.linspace(least, most, 9)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(found))
    assert found[-1] == pytest.approx(damage.min(1).sum())


def test_an_impossible_budget_says_what_the_least_is() -> None:
    damage, costs = random_menu(2)
    least = costs["weight_bytes"].min(1).sum()
    with pytest.raises(ValueError, match=re.escape(f"no choice takes less than {least:g}")):
        choose(damage, costs, {"weight_bytes": least * 0.9})
    with pytest.raises(ValueError, match="expected some of weight_bytes, prefill_ms"):
        choose(damage, costs, {"money": 1.0})


def test_an_alternative_that_a_layer_lacks_is_never_chosen_and_a_needed_one_is() -> None:
    damage = np.array([[1.0, np.nan], [1.0, 0.0]])
    costs = {"weight_bytes": np.array([[2.0, 0.0], [2.0, 1.0]])}
    assert choose(damage, costs, {"weight_bytes": 4.0}).picks == (0, 1)
    damage, needed = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[True, False], [False, False]])
    assert choose(damage, costs, {"weight_bytes": 4.0}, needed=needed).picks == (0, 1)


def planted_identity(layer: int) -> Subject:
    subject = Subject.tiny("llama")
    with torch.no_grad():
        for kind in ("heads", "neurons"):
            weight: Any = subject.anatomy.module(subject.model, Site(layer, kind)).weight
            weight.zero_()
    return subject


def test_a_block_that_does_nothing_goes_first_and_costs_nothing() -> None:
    subject = planted_identity(1)
    texts = [torch.randint(4, 1200, (12,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    result: Any = LayerMenu(widths=(0.5,), budgets=(0.67, 1.0), prompt_tokens=8, repeats=1, draws=2).run(subject, texts)
    menu = result.table().set_index(["layer", "alternative"])
    assert menu.loc[(1, DROPPED), "damage"] == 0.0 and menu.loc[(0, DROPPED), "damage"] > 0.01
    assert menu.loc[(1, DROPPED), "weight_bytes"] == menu.loc[(1, DROPPED), "prefill_ms"] == 0
    plan = result.plan(weight_bytes=0.67)
    assert plan.dropped == (1,) and not plan.layers
    frontier = result.frontier().set_index(["budget", "way"])
    assert frontier.loc[(0.67, "knapsack"), "measured"] == pytest.approx(0, abs=1e-9)
    assert frontier.loc[(0.67, "uniform"), "measured"] > 0.01 < frontier.loc[(0.67, "random"), "measured"]
    assert (frontier["share"] <= frontier.index.get_level_values("budget") + 1e-9).all()
    assert frontier.loc[1.0, "measured"].loc["knapsack"] == pytest.approx(0, abs=1e-9)
    with subject.under(Prune(result.plan(weight_bytes=0.4, kv_bytes_per_token=0.7))):
        subject.nll(texts)
        assert plan_now(subject).kept(1, "heads") == 0


def test_one_layer_that_attends_is_always_left() -> None:
    subject = planted_identity(0)
    texts = [torch.randint(4, 1200, (9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
    result: Any = LayerMenu(widths=(0.5,), budgets=(0.9,), prompt_tokens=8, repeats=1, draws=1).run(subject, texts)
    picks = result.choose(kv_bytes_per_token=0.34).picks
    assert sum(result.needed[layer, pick] for layer, pick in enumerate(picks)) == 1
    with pytest.raises(ValueError, match=r"no choice keeps all budgets|takes less than"):
        result.choose(kv_bytes_per_token=0.1)


def test_settings_and_data_that_cant_work_are_refused() -> None:
    for wrong in ({"widths": (0.0,)}, {"budgets": ()}, {"by": "money"}, {"repeats": 0}):
        with pytest.raises(ValueError, match="LayerMenu: "):
            LayerMenu(**wrong)
    with pytest.raises(ValueError, match="at least two"):
        LayerMenu().run(Subject.tiny(), ["one"])
    with pytest.raises(ValueError, match=r"prompt_tokens=510, expected at most 509: 3 more .* the context is 512"):
        LayerMenu(prompt_tokens=510).run(Subject.tiny("gpt2"), [[5, 6, 7], [8, 9]])
