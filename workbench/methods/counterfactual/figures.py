"""The six figures of counterfactual generation: what an edit changes with the same dice, and what with fresh ones.

Each is a function of what `CounterfactualResult` tells, mostly of its tables; its title states the finding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.counterfactual.agreement import (
    COUNTERFACTUAL,
    FACTUAL,
    INTERVENTIONAL,
    KINDS,
    OTHER_DICE,
    SAME_DICE,
    TEXTS,
)
from workbench.stats import wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLORS = {FACTUAL: plots.GREY, COUNTERFACTUAL: plots.BLUE, INTERVENTIONAL: plots.VERMILLION}
Passage = tuple[str, list[tuple[str, str | None]]]  # a name, and pieces of text with their colours


def temperatures(table: Any, edit: str, sampler: str, temperature: float) -> Figure:
    """Edit distance against temperature; table: the rows of `summary` for it, of one edit and sampler."""
    at = table[table["temperature"] == temperature].set_index("kind")["value"]
    title = (
        f"Edit of {edit}: with the same dice {at[COUNTERFACTUAL]:.0%} of the text changes, with fresh dice "
        f"{at[INTERVENTIONAL]:.0%} (temperature {temperature:g}, sampler {sampler})"
    )
    names: dict[str, Any] = {"x_title": "temperature", "y_title": "edit distance (share of tokens)", "colors": COLORS}
    figure = plots.lines(table, "temperature", "value", "kind", "low", "high", title=title, **names)
    return figure.update_yaxes(rangemode="tozero", tickformat=".0%")


def positions(table: Any, whole: Mapping[str, float], edit: str) -> Figure:
    """Share of equal tokens after the edit; table: `agreement`; whole: kind -> the same over all positions."""
    first = table[table["position_after_edit"] == 0].set_index("kind")["equal_share"]
    title = (
        f"Edit of {edit}: with the same dice {first[COUNTERFACTUAL]:.0%} of first tokens and "
        f"{whole[COUNTERFACTUAL]:.0%} of all stay where they were; with fresh dice {first[INTERVENTIONAL]:.0%} and "
        f"{whole[INTERVENTIONAL]:.0%}"
    )
    return _over_positions(table, title, COLORS)


def couplings(table: Any, edit: str) -> Figure:
    """Share of first tokens that stay under each sampler; table: the rows of `first_token` of one edit and
    temperature."""
    same, twin = (table[table["kind"] == kind] for kind in KINDS)
    kept = [f"{name} {share:.0%}" for name, share in zip(same["sampler"], same["observed"], strict=True)]
    bound = table["largest"].mean()
    title = (
        f"Edit of {edit}: the coupling decides how many first tokens stay: {', '.join(kept)}; by chance "
        f"{twin['expected'].mean():.0%}, and no coupling can keep more than {bound:.0%}"
    )
    truth = same.assign(source="closed form", **dict.fromkeys(("observed", "low", "high"), same["expected"]))
    drawn = pd.concat([same.assign(source="same dice"), truth, twin.assign(source="fresh dice")])
    names: dict[str, Any] = {"title": title, "x_title": "sampler", "y_title": "share of first tokens that stay"}
    colors = {"same dice": plots.BLUE, "closed form": plots.SKY, "fresh dice": plots.VERMILLION}
    figure = plots.bars(drawn, "sampler", "observed", "low", "high", "source", colors=colors, **names)
    dotted = {"color": plots.GREY, "width": 1, "dash": "dot"}
    figure.add_hline(bound, line=dotted, annotation_text="the most that any coupling can keep")
    return figure.update_yaxes(range=[0, 1.02], tickformat=".0%")


def attributes(values: Mapping[str, Sequence[str]], attribute: str, edit: str) -> Figure:
    """How often each value is read; values: kind of text -> the value of every pair."""
    rows = []
    for value in dict.fromkeys(chain.from_iterable(values.values())):
        for kind in TEXTS:
            count = list(values[kind]).count(value)
            low, high = wilson_interval(count, len(values[kind]))
            rows.append((value, kind, count / len(values[kind]), float(low), float(high)))
    table = pd.DataFrame(rows, columns=["value", "text", "share", "low", "high"])
    moved = [np.mean([a != b for a, b in zip(values[FACTUAL], values[k], strict=True)]) for k in KINDS]
    title = f"Edit of {edit}: the {attribute} changes in {moved[0]:.0%} of texts with the same dice"
    title += f", in {moved[1]:.0%} with fresh dice"
    names: dict[str, Any] = {"title": title, "x_title": attribute, "y_title": "share of texts", "colors": COLORS}
    figure = plots.bars(table, "value", "share", "low", "high", "text", **names)
    return figure.update_yaxes(range=[0, 1.02], tickformat=".0%")


def texts(
    prompts: tuple[str, str], tokens: Mapping[str, list[int]], piece: Callable[[int], str], edit: str, pair: int
) -> Figure:
    """One pair side by side, what is new in colour.

    prompts   before the edit and after it      tokens   kind of text -> its ids      piece   the text of an id
    """
    marked = {kind: _changes(tokens[FACTUAL], tokens[kind]) for kind in KINDS}
    counts = [f"{sum(new for _, new in marked[kind])} of {len(marked[kind])}" for kind in KINDS]
    title = f"Edit of {edit}, pair {pair}: {counts[0]} tokens are new with the same dice, {counts[1]} with fresh dice"
    passages: list[Passage] = [(name, [(text, None)]) for name, text in zip(("prompt", "edited"), prompts, strict=True)]
    passages.append((FACTUAL, [(piece(token), None) for token in tokens[FACTUAL]]))
    for kind in KINDS:
        passages.append((kind, [(piece(token), COLORS[kind] if new else None) for token, new in marked[kind]]))
    return plots.passages(passages, title=title)


def models(table: Any, edit: str, temperature: float, other_name: str) -> Figure:
    """Share of equal tokens of two models; table: the rows of `against` of one edit, sampler and temperature."""
    first = table[table["position_after_edit"] == 0].set_index("kind")["equal_share"]
    title = (
        f"The same dice on {other_name}: {first[SAME_DICE]:.0%} of first tokens stay, "
        f"with other dice {first[OTHER_DICE]:.0%} (unedited prompts of {edit!r}, temperature {temperature:g})"
    )
    return _over_positions(table, title, {SAME_DICE: plots.BLUE, OTHER_DICE: plots.VERMILLION})


def _over_positions(table: pd.DataFrame, title: str, colors: Mapping[str, str]) -> Figure:
    names: dict[str, Any] = {"x_title": "tokens after the edit", "y_title": "share of equal tokens", "colors": colors}
    figure = plots.lines(table, "position_after_edit", "equal_share", "kind", "low", "high", title=title, **names)
    return figure.update_yaxes(range=[0, 1.02], tickformat=".0%")


def _changes(factual: list[int], tokens: list[int]) -> list[tuple[int, bool]]:
    """The tokens, each with whether it is new: outside of every block that both texts share."""
    new = [True] * len(tokens)
    for _, start, size in SequenceMatcher(None, factual, tokens, autojunk=False).get_matching_blocks():
        new[start : start + size] = [False] * size
    return list(zip(tokens, new, strict=True))
