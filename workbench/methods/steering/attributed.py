"""What token attribution found: one row per token, the mean of each word over pairs, and how complete the scores are.

Intervals: bootstrap over pairs, a word's scores within one pair added up first.
Source: Nguyen et al., 2025 (GrAInS, arXiv 2507.18043); completeness after Sundararajan et al., 2017.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.steering.attribution import Attribution
from workbench.result import Result
from workbench.stats import bootstrap_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_WORDS, MOST_PROMPTS = 12, 20  # drawn
UNIT = "preference carried (nats)"


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenAttributionResult(Result):
    """What each token of each prompt adds to the preference between its two answers.

    pair, position, score, free   (token,) of all prompts one after the other; score in nats, 0 where not free
    words                         one per token, as text
    change, gap, relative_gap, steps   (pair,) preference against the blanked prompt; what the scores miss of it
    """

    pair: np.ndarray
    position: np.ndarray
    score: np.ndarray
    free: np.ndarray
    words: tuple[str, ...]
    change: np.ndarray
    gap: np.ndarray
    relative_gap: np.ndarray
    steps: np.ndarray
    tolerance: float
    baseline: str
    rule: str
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "pair", "position", "token", "score", "free", "change", "gap", "complete", "steps", "baseline", "rule", "seed",
    )  # fmt: skip

    @classmethod
    def of(
        cls, found: Iterable[tuple[Sequence[str], Sequence[bool], Attribution]], **settings: Any
    ) -> TokenAttributionResult:
        """From (words, free, attribution) of each pair."""
        rows = list(found)
        lengths = [len(words) for words, _, _ in rows]
        return cls(
            pair=np.repeat(np.arange(len(rows)), lengths),
            position=np.concatenate([np.arange(length) for length in lengths]),
            score=np.concatenate([each.scores.numpy() for _, _, each in rows]),
            free=np.concatenate([np.asarray(free, dtype=bool) for _, free, _ in rows]),
            words=tuple(word for words, _, _ in rows for word in words),
            change=np.array([each.change for _, _, each in rows]),
            gap=np.array([each.gap for _, _, each in rows]),
            relative_gap=np.array([each.relative_gap for _, _, each in rows]),
            steps=np.array([each.steps for _, _, each in rows]),
            **settings,
        )

    @property
    def complete(self) -> np.ndarray:
        """(pair,) whether the scores add up to the change, to the tolerance."""
        return self.relative_gap <= self.tolerance

    def table(self) -> pd.DataFrame:
        """One row per token of each prompt."""
        of_pair = {"change": self.change, "gap": self.gap, "complete": self.complete, "steps": self.steps}
        columns = {"pair": self.pair, "position": self.position, "token": self.words, "score": self.score}
        columns |= {"free": self.free} | {name: values[self.pair] for name, values in of_pair.items()}
        return pd.DataFrame(columns).assign(baseline=self.baseline, rule=self.rule, seed=self.seed)

    def by_word(self) -> pd.DataFrame:
        """Mean score of each word over the pairs that have it, with 95 % interval, strongest first; free words only."""
        totals: dict[str, dict[int, float]] = {}  # word -> pair -> its scores added up
        for word, pair, score in zip(
            self._free(self.words), self._free(self.pair), self._free(self.score), strict=True
        ):
            of_word = totals.setdefault(str(word), {})
            of_word[int(pair)] = of_word.get(int(pair), 0.0) + float(score)
        rows = []
        for word, values in totals.items():
            mean, low, high = bootstrap_interval(np.array(list(values.values())), seed=self.seed)
            rows.append((word, float(mean), float(low), float(high), len(values)))
        rows.sort(key=lambda row: -abs(row[1]))
        return pd.DataFrame(rows, columns=["token", "score", "low", "high", "pairs"])

    def plot(self, view: str = "words", pair: int = 0, **options: Any) -> Figure:
        """words: mean of each word over pairs · pair: the tokens of one prompt · strip: all prompts, a row each."""
        if view not in self.views()["view"]:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")
        if not 0 <= pair < len(self.change):
            raise ValueError(f"plot: got pair {pair}, expected 0 to {len(self.change) - 1}.")
        if view == "words":
            return self._plot_words()
        return self._plot_pair(pair) if view == "pair" else self._plot_strip()

    def views(self) -> dict[str, list[Any]]:
        return {"view": ["words", "pair", "strip"], "pair": list(range(min(len(self.change), MOST_PROMPTS)))}

    def _plot_words(self) -> Figure:
        table = self.by_word()
        carried = _carried(table["token"].tolist(), table["score"].to_numpy(), float(self.change.mean()))
        title = f"{carried}, on average over {_prompts(len(self.change))}{self._proof()}"
        drawn = table.head(MOST_WORDS).assign(token=lambda rows: [_shown(word) for word in rows["token"]])
        return plots.bars(
            drawn, "token", "score", "low", "high", title=title, x_title="word of the prompt", y_title=UNIT
        )

    def _plot_pair(self, pair: int) -> Figure:
        words = [_shown(word) for word, of in zip(self.words, self.pair, strict=True) if of == pair]
        score = self.score[self.pair == pair]
        title = f"In prompt {pair} {_carried(words, score, float(self.change[pair]))}{self._proof(pair)}"
        drawn = pd.DataFrame({"token": [f"{place} {word}" for place, word in enumerate(words)], "score": score})
        return plots.bars(drawn, "token", "score", title=title, x_title="tokens in reading order", y_title=UNIT)

    def _plot_strip(self) -> Figure:
        size = [np.abs(self.score[self.position == place]).mean() for place in range(int(self.position.max()) + 1)]
        most = int(np.argmax(size))
        there = {_shown(word) for word, place in zip(self.words, self.position, strict=True) if place == most}
        what = repr(there.pop()) if len(there) == 1 else f"{len(there)} different words"
        title = (
            f"Position {most} weighs most, {size[most]:.2f} nats on average over {_prompts(len(self.change))}: {what}"
        )
        drawn = self.table().query(f"pair < {MOST_PROMPTS}").assign(pair=lambda rows: rows["pair"].astype(str))
        figure = plots.heatmap(
            drawn,
            "position",
            "pair",
            "score",
            midpoint=0.0,
            show_values=False,
            title=f"{title}{self._proof()}",
            x_title="position in the prompt",
            y_title="prompt",
            value_title="nats",
        )
        words = drawn.pivot_table(index="pair", columns="position", values="token", aggfunc="first", sort=False)
        return figure.update_traces(text=words.fillna("").to_numpy(), texttemplate="%{text}")

    def _free(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        return np.asarray(values)[self.free]

    def _proof(self, pair: int | None = None) -> str:
        """How far the scores can be trusted, in words."""
        gaps = self.relative_gap if pair is None else self.relative_gap[[pair]]
        missed = int((~(gaps <= self.tolerance)).sum())  # NaN is not complete either
        if missed:
            return f"; NOT complete: {missed} of {_prompts(len(gaps))} miss more than {self.tolerance:.0%}"
        return f" (complete to {max(gaps.max(), 1e-4):.2%})"


def _carried(words: Sequence[str], score: np.ndarray, change: float) -> str:
    """The two strongest words as a sentence."""
    order = np.argsort(-np.abs(score), kind="stable")[:2]
    named = [f"{_shown(words[int(place)])!r}" for place in order]
    text = f"{named[0]} carries {score[order[0]]:+.2f} of {change:+.2f} nats of preference"
    return f"{text}, then {named[1]} {score[order[1]]:+.2f}" if len(order) > 1 else text


def _shown(word: str) -> str:
    """A word for an axis or a title, where blanks are seen."""
    return word.strip() or repr(word)


def _prompts(count: int) -> str:
    return f"{count} prompt" if count == 1 else f"{count} prompts"
