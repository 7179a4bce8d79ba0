"""In which language a model is at each layer: what the lens gives the words of each, and where one hands over.

P(right word) / sum of all candidates = [language's candidates / all candidates] x [right word / language's candidates]:
which language, times which word. The two are often decided at different layers.
Sources: Wendler et al., 2024 (arXiv 2402.10588); Zhong et al., 2025, ACL Findings (words of several tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench import plots
from workbench.methods.lens.crossover import Crossover, crossover
from workbench.result import Result
from workbench.stats import bootstrap_interval, wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

REST = "all else"
MEASURES = {
    "mass": "probability of the right word",
    "normalised": "its share among all candidates",
    "language": "share of the language among all candidates",
    "word": "share of the right word in its language",
    "top1": "right word first in its language",
}
LEAST_MASS = 0.05  # below it nobody leads
X_TITLE = "blocks passed (0: embedding)"


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentLanguageResult(Result):
    """Words of each language at each layer. Layer l stands after l blocks, 0 is the embedding; K words per language.

    log_prob (item, layer, language, K)   in nats; the right word first, NaN where a language has fewer
    kl (nats), rank, entropy_bits, energy (item, layer)   at the end of the prompt, kl and rank against the last layer's
                                          prediction; energy: how much of a state lies where tokens are
    tasks, sources, targets               of each item
    dropped                               task -> items left out because their languages share tokens
    """

    log_prob: np.ndarray
    kl: np.ndarray
    rank: np.ndarray
    entropy_bits: np.ndarray
    energy: np.ndarray
    tasks: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    languages: tuple[str, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    words: str = "whole"
    length: str = "sum"
    lens: str = "logit"
    mode: str = "corrected"
    n_bootstrap: int = 2000
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "language", "task", "source", "target", "measure", "probability", "low", "high", "n", "dropped",
        "words", "length", "lens", "mode",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per task, measure, layer and language; "all else" is the mass on no candidate of any language."""
        tables = [self.curves(task, measure) for task in self.task_names for measure in self.measures]
        return pd.concat(tables, ignore_index=True).loc[:, list(self.columns)]

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(self.tasks))

    @property
    def measures(self) -> list[str]:
        """Mode "paper" knows masses of prefixes alone, words of a language's own are not compared there."""
        return list(MEASURES)[:1] if self.mode == "paper" else list(MEASURES)

    def values(self, task: str, measure: str) -> Float[np.ndarray, "item layer language"]:
        """One measure of each item of a task."""
        if task not in self.task_names:
            raise ValueError(f"LatentLanguage: got task {task!r}, expected one of {', '.join(self.task_names)}.")
        if measure not in self.measures:
            raise ValueError(f"LatentLanguage: got measure {measure!r}, expected one of {', '.join(self.measures)}.")
        logs = self.log_prob[np.array(self.tasks) == task]  # (item, layer, language, K)
        if measure == "top1":
            return (logs[..., :1] >= np.where(np.isnan(logs), -np.inf, logs)).all(axis=-1).astype(float)
        if measure == "mass":
            mass = np.exp(logs)
            return np.nansum(mass, axis=-1) if self.mode == "paper" else mass[..., 0]
        # Relative to the largest candidate: a share of numbers too small for a float is still a share.
        over = (2, 3) if measure != "word" else (3,)
        weight = np.exp(logs - np.nanmax(logs, axis=over, keepdims=True))
        part = np.nansum(weight, axis=-1) if measure == "language" else weight[..., 0]
        return part / np.nansum(weight, axis=over, keepdims=True)[..., 0]

    def curves(self, task: str, measure: str = "mass") -> pd.DataFrame:
        """Mean of a measure over the items of a task per layer and language, with its 95 % interval.

        Bootstrap over items; Wilson for top1; Gaussian in mode "paper".
        """
        values = self.values(task, measure)
        names = list(self.languages)
        if measure == "mass" and self.length == "sum":
            rest = 1.0 - self._used(task)[..., None]
            values, names = np.concatenate([values, rest], axis=2), [*names, REST]
        mean, low, high = self._interval(values, measure)
        n, n_layers = values.shape[:2]
        layer, language = (axis.ravel() for axis in np.indices((n_layers, len(names))))
        facts = {"task": task, "source": self.sources[self.tasks.index(task)], "target": self._target(task)}
        facts |= {"measure": measure, "n": n}
        facts |= {"dropped": self.dropped.get(task, 0), "words": self.words, "length": self.length}
        columns = {"layer": layer, "language": np.array(names)[language]}
        columns |= {"probability": mean.ravel(), "low": low.ravel(), "high": high.ravel()}
        return pd.DataFrame(columns | facts | {"lens": self.lens, "mode": self.mode})

    def lead(self, task: str, language: str, measure: str = "mass") -> pd.DataFrame:
        """How far a language is ahead of the target per layer: mean of the differences within items, 95 % interval."""
        values, target = self.values(task, measure), self._target(task)
        gap = values[..., self._index(language)] - values[..., self._index(target)]
        mean, low, high = bootstrap_interval(gap, n_bootstrap=self.n_bootstrap, seed=self.seed)
        columns = {"task": task, "language": language, "target": target, "measure": measure}
        layers = np.arange(gap.shape[1])
        return pd.DataFrame(columns | {"layer": layers, "lead": mean, "low": low, "high": high, "n": len(gap)})

    def crossover(self, task: str, language: str, measure: str = "mass", least: float = LEAST_MASS) -> Crossover:
        """Where the target's language takes over from `language`.

        A mass leads only where it is at least `least`, and nobody leads in the shares of a layer whose candidates all
        together hold less: two words at 1e-6 each say nothing about a language.
        """
        values = self.values(task, measure)
        if measure in ("normalised", "language"):
            values = values * (self._used(task).mean(axis=0) >= least)[:, None]
        target, other = (values[..., self._index(name)] for name in (self._target(task), language))
        floor = least if measure == "mass" else 0.0
        return crossover(target, other, least=floor, n_bootstrap=self.n_bootstrap, seed=self.seed)

    def crossovers(self, measure: str = "mass") -> pd.DataFrame:
        """One row per task and language other than its target: the crossover, and how far the other ever leads."""
        rows = []
        for task in self.task_names:
            target = self._target(task)
            for language in self.others(task):
                found, lead = self.crossover(task, language, measure), self.lead(task, language, measure)
                most = lead.loc[lead["lead"].idxmax()]
                rows.append((task, language, target, measure, found.layer, found.low, found.high, found.share,
                             int(most["layer"]), most["lead"], most["low"], most["high"]))  # fmt: skip
        names = ["task", "other", "target", "measure", "crossover", "from", "to", "share_of_resamples"]
        return pd.DataFrame(rows, columns=[*names, "layer", "largest_lead", "low", "high"])

    def others(self, task: str) -> list[str]:
        """The languages other than the target of a task."""
        return [name for name in self.languages if name != self._target(task)]

    def views(self) -> dict[str, list[Any]]:
        return {"view": [*self.measures, "lead", "entropy", "energy"], "task": self.task_names}

    def plot(
        self,
        view: str = "mass",
        task: str | None = None,
        other: LatentLanguageResult | None = None,
        other_name: str = "other",
    ) -> Figure:
        """mass, normalised, language, word, top1: a curve per language, the crossover marked, for one task
        lead: how far the other language's right word stands out more than the target's · entropy, energy: a curve per
        task, or that of one.

        `other` adds a second result of the same tasks, such as that of the untrained twin.
        """
        if view in self.measures:
            return self._plot_measure(view, task or self.task_names[0], other, other_name)
        results = {"": self} | ({f", {other_name}": other} if other is not None else {})
        if view == "lead":
            return self._plot_lead([task] if task else self.task_names, results)
        if view in ("entropy", "energy"):
            return self._plot_state(view, [task] if task else self.task_names, results)
        raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")

    def _plot_measure(self, measure: str, task: str, other: LatentLanguageResult | None, other_name: str) -> Figure:
        table = self.curves(task, measure).assign(curve=lambda rows: rows["language"])
        title = f"{self._subject}, {task}: " + "; ".join(self._story(task, name, measure) for name in self.others(task))
        if other is not None:
            added = other.curves(task, measure).query("language != @REST")
            table = pd.concat([table, added.assign(curve=added["language"] + f", {other_name}")])
            title += f"; {other_name}: neither above {added['probability'].max():.3f}"
        colors = {REST: plots.GREY}
        figure = plots.lines(
            table, "layer", "probability", "curve", "low", "high",
            title=title, x_title=X_TITLE, y_title=MEASURES[measure], colors=colors,
        )  # fmt: skip
        for name in self.others(task):
            found = self.crossover(task, name, measure)
            if found.layer is not None and found.low is not None and found.high is not None:
                figure.add_vline(found.layer, line={"color": plots.BLACK, "dash": "dot", "width": 1})
                figure.add_vrect(found.low - 0.08, found.high + 0.08, fillcolor=plots.GREY, opacity=0.2, line_width=0)
                label = f"{self._target(task)} takes over"
                turned = {"textangle": -90, "xanchor": "right", "showarrow": False}
                figure.add_annotation(x=found.low - 0.1, y=0.5, text=label, **turned)
        return figure.update_yaxes(range=(-0.02, 1.02)).update_xaxes(dtick=max(1, self.log_prob.shape[1] // 12))

    def _plot_lead(self, tasks: list[str], results: Mapping[str, LatentLanguageResult]) -> Figure:
        measure = "word" if "word" in self.measures else "mass"
        table = pd.concat(
            result.lead(task, name, measure).assign(curve=f"{task}: {name}{mark}")
            for mark, result in results.items()
            for task in tasks
            for name in self.others(task)
        )
        ahead = table.query("low > 0").sort_values("lead")
        title = f"{self._subject}: no word stands out more in another language than in the target's"
        if len(ahead):
            most = ahead.iloc[-1]
            title = (
                f"{self._subject}: most of all in {most['curve']!r} the right word stands out more than the target's, "
                f"by {most['lead']:.2f} [{most['low']:.2f}, {most['high']:.2f}] after {most['layer']} blocks"
            )
        names: dict[str, Any] = {"x_title": X_TITLE, "y_title": f"lead over the target ({measure})"}
        figure = plots.lines(table, "layer", "lead", "curve", "low", "high", title=title, **names)
        return figure.add_hline(0.0, line={"color": plots.GREY, "width": 1})

    def _plot_state(self, view: str, tasks: list[str], results: Mapping[str, LatentLanguageResult]) -> Figure:
        tables = []
        for mark, result in results.items():
            values = result.entropy_bits if view == "entropy" else result.energy
            for task in tasks:
                chosen = values[np.array(result.tasks) == task]
                mean, low, high = bootstrap_interval(chosen, n_bootstrap=result.n_bootstrap, seed=result.seed)
                columns = {"layer": np.arange(len(mean)), "value": mean, "low": low, "high": high}
                tables.append(pd.DataFrame(columns | {"task": task + mark}))
        first = tables[0]["value"].to_numpy()
        name, unit = ("entropy", "bits") if view == "entropy" else ("token energy", "times that of a token")
        title = (
            f"{self._subject}: in {tasks[0]!r} the {name} goes from {first[0]:.2f} over {first.max():.2f} after "
            f"{int(first.argmax())} blocks to {first[-1]:.2f} {unit}"
        )
        names: dict[str, Any] = {"x_title": X_TITLE, "y_title": f"{name} ({unit})"}
        return plots.lines(pd.concat(tables), "layer", "value", "task", "low", "high", title=title, **names)

    def _story(self, task: str, language: str, measure: str) -> str:
        """What happens between a language and the target of a task, in words."""
        found, lead = self.crossover(task, language, measure), self.lead(task, language, measure)
        target = self._target(task)
        if found.layer is not None:
            spread = "" if found.low == found.high else f" [{found.low}, {found.high}]"
            most = lead["lead"].max()
            return f"{language} leads by up to {most:.2f}, {target} takes over at layer {found.layer}{spread}"
        ahead = lead.query("low > 0 and layer in @found.led").sort_values("lead")
        if len(ahead):
            most = ahead.iloc[-1]
            return f"{language} leads {target} by {most['lead']:.2f} after {most['layer']} blocks, with no hand-over"
        reached = self.values(task, measure)[..., self._index(language)].mean(0).max()
        return f"{language} never leads {target} (it reaches {reached:.3f}): no crossover"

    def _interval(self, values: np.ndarray, measure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean = values.mean(axis=0)
        if self.mode == "paper":  # as published; it may leave [0, 1], for which Wilson and the bootstrap are the cure
            half = 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros_like(mean)
            return mean, mean - half, mean + half
        if measure == "top1":
            return mean, *wilson_interval(values.sum(axis=0), len(values))
        return bootstrap_interval(values, n_bootstrap=self.n_bootstrap, seed=self.seed)

    def _used(self, task: str) -> Float[np.ndarray, "item layer"]:
        """Probability of all candidates of all languages together."""
        return np.nansum(np.exp(self.log_prob[np.array(self.tasks) == task]), axis=(2, 3))

    def _target(self, task: str) -> str:
        return self.targets[self.tasks.index(task)]

    def _index(self, language: str) -> int:
        if language not in self.languages:
            raise ValueError(f"LatentLanguage: got language {language!r}, expected one of {', '.join(self.languages)}.")
        return self.languages.index(language)

    @property
    def _subject(self) -> str:
        return str(self.provenance.subject["name"]) if self.provenance else "simulated"
