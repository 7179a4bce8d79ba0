"""How often answers begin with given words: shares with Wilson intervals, group by group and toggle by toggle.

share = answers whose text begins with one of the words / answers; case and leading space don't count.
Source of the interval: Wilson, 1927. Judging a refusal by its first words: Arditi et al. 2024, appendix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.result import Result
from workbench.stats import wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def begins(text: str, starts: Sequence[str]) -> bool:
    """Whether an answer begins with one of the words."""
    return text.lstrip().lower().startswith(tuple(word.lstrip().lower() for word in starts))


@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerRatesResult(Result):
    """Answers counted.

    count (toggle, group)   answers that begin with one of `starts`, of total (group,)
    toggles, groups         their names, in order           examples (toggle, group)   the first answer of each
    """

    count: np.ndarray
    total: np.ndarray
    toggles: tuple[str, ...]
    groups: tuple[str, ...]
    starts: tuple[str, ...]
    examples: tuple[tuple[str, ...], ...]

    columns: ClassVar[tuple[str, ...]] = ("toggle", "group", "share", "low", "high", "count", "total", "example")

    @classmethod
    def of(cls, answers: Mapping[str, Mapping[str, Sequence[str]]], starts: Sequence[str]) -> AnswerRatesResult:
        """Counted from {toggle: {group: answers}}, with the same groups under every toggle."""
        groups = tuple(next(iter(answers.values())))
        return cls(
            count=np.array(
                [[sum(begins(t, starts) for t in under[group]) for group in groups] for under in answers.values()]
            ),
            total=np.array([len(next(iter(answers.values()))[group]) for group in groups]),
            toggles=tuple(answers),
            groups=groups,
            starts=tuple(starts),
            examples=tuple(tuple(under[group][0] for group in groups) for under in answers.values()),
        )

    def table(self) -> pd.DataFrame:
        """One row per toggle and group: the share, its 95 % interval, and the first answer."""
        low, high = (bound.ravel() for bound in wilson_interval(self.count, self.total))
        pairs = [(toggle, group) for toggle in self.toggles for group in self.groups]
        table = pd.DataFrame(pairs, columns=["toggle", "group"]).assign(
            share=(self.count / self.total).ravel(),
            low=low,
            high=high,
            count=self.count.ravel(),
            total=np.tile(self.total, len(self.toggles)),
            example=[text for under in self.examples for text in under],
        )
        return table.loc[:, list(self.columns)]

    def share(self, toggle: str, group: str) -> float:
        """Share of the answers of `group` under `toggle` that begin with one of the words."""
        i, j = self.toggles.index(toggle), self.groups.index(group)
        return float(self.count[i, j] / self.total[j])

    def views(self) -> dict[str, list[Any]]:
        return {"toggle": list(self.toggles[::-1])}

    def plot(self, toggle: str | None = None) -> Figure:
        """Shares of every group under every toggle; the title tells those under `toggle`, by default the last one."""
        told = self.toggles[-1] if toggle is None else toggle
        if told not in self.toggles:
            raise ValueError(f"plot: got toggle {told!r}, expected one of {', '.join(self.toggles)}.")
        shares = ", ".join(f"{self.share(told, group):.1%} of {group}" for group in self.groups)
        words = " or ".join(f"'{word}'" for word in self.starts)
        title = f"{told}: answers begin with {words} in {shares}"
        y_title = f"share of answers that begin with {words}"
        return plots.bars(
            self.table(), "toggle", "share", "low", "high", color="group", title=title, x_title="", y_title=y_title
        )
