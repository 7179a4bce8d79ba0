"""What zeros cost: loss, KL and answers against the share of zeros for several methods, and the error of every matrix.

KL(p0 || p) = sum_v p0(v) (log p0(v) - log p(v)) per token, p0 without the zeros; |x W'^T - x W^T| / |x W^T| per matrix.
Intervals: bootstrap over texts. Random zeros are the control that a criterion must beat. Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.result import Result
from workbench.stats import bootstrap_interval, resampling_weights, wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

N_BOOTSTRAP = 1000
COLORS = {"magnitude": plots.BLUE, "wanda": plots.VERMILLION, "sparsegpt": plots.GREEN, "random": plots.GREY}


@dataclass(frozen=True, eq=False, kw_only=True)
class SparsityLossResult(Result):
    """Per setting and held-out text; the table summarises.

    by, asked         (setting) the method, and the share of zeros or the pattern in words
    nll, kl           (setting, text) nats per token        base_nll, n_tokens   (text,) without zeros; weights of means
    right, base_right (setting, question), (question,) answered right        task   (question,) index into `tasks`
    lost, whole       (setting, linear, text) squared sizes of what each matrix's output loses, and of the output
    zeros             (setting, linear) share of zero weights
    packed, dense     (setting, linear), (linear,) bytes as bitmap and as they are
    numbers           (linear,) weights of each            linears   their paths
    """

    by: tuple[str, ...]
    asked: tuple[str, ...]
    nll: np.ndarray
    kl: np.ndarray
    base_nll: np.ndarray
    n_tokens: np.ndarray
    right: np.ndarray
    base_right: np.ndarray
    task: np.ndarray
    lost: np.ndarray
    whole: np.ndarray
    zeros: np.ndarray
    packed: np.ndarray
    dense: np.ndarray
    numbers: np.ndarray
    linears: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "by", "asked", "sparsity", "measure", "value", "low", "high", "base", "unit", "n", "seed",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per setting and measure: value, 95 % interval over texts or questions, the value without zeros."""
        rows = []
        base = float(np.average(self.base_nll, weights=self.n_tokens))
        for number, (by, asked) in enumerate(zip(self.by, self.asked, strict=True)):
            share = self.bitmap_share(number)
            for measure, values, reference, unit in (
                ("nll", self._mean(self.nll[number]), base, "nats per token"),
                ("nll_added", self._mean(self.nll[number] - self.base_nll), 0.0, "nats per token"),
                ("kl", self._mean(self.kl[number]), 0.0, "nats per token"),
                ("output_error", self._error(number), 0.0, "share of the output's norm"),
                ("bitmap", (share, share, share), 1.0, "share of the matrices' bytes"),
            ):
                rows.append((by, asked, self.sparsity(number), measure, *values, reference, unit, len(self.base_nll)))
            for task in self.tasks:
                rows.append((by, asked, self.sparsity(number), task, *self._answered(number, task)))
        return pd.DataFrame(rows, columns=list(self.columns[:-1])).assign(seed=self.seed)

    def linear_table(self) -> pd.DataFrame:
        """One row per setting and matrix: by, asked, linear, layer, part, sparsity, error with its interval, bytes."""
        draws = resampling_weights(len(self.base_nll), N_BOOTSTRAP, self.seed)
        tables = []
        for number, (by, asked) in enumerate(zip(self.by, self.asked, strict=True)):
            errors = _ratio(draws @ self.lost[number].T, draws @ self.whole[number].T)  # (draw, linear)
            low, high = np.quantile(errors, (0.025, 0.975), axis=0)
            tables.append(
                pd.DataFrame(
                    {
                        "by": by,
                        "asked": asked,
                        "linear": self.linears,
                        "layer": [place(name)[0] for name in self.linears],
                        "part": [place(name)[1] for name in self.linears],
                        "sparsity": self.zeros[number],
                        "error": _ratio(self.lost[number].sum(-1), self.whole[number].sum(-1)),
                        "low": low,
                        "high": high,
                        "dense_bytes": self.dense,
                        "bitmap_bytes": self.packed[number],
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def sparsity(self, number: int) -> float:
        """The share of zeros in all matrices under one setting."""
        return float(np.average(self.zeros[number], weights=self.numbers))

    def bitmap_share(self, number: int) -> float:
        """Bytes of the matrices in a bitmap file over their bytes as they are; what would grow stays as it is."""
        return float(np.minimum(self.packed[number], self.dense).sum() / self.dense.sum())

    def value(self, by: str, asked: str, measure: str) -> float:
        """One number of the table."""
        table = self.table()
        rows = table.loc[(table["by"] == by) & (table["asked"] == asked) & (table["measure"] == measure), "value"]
        if not len(rows):
            raise ValueError(f"SparsityLoss: got {by} at {asked}, {measure}, expected a setting of the table.")
        return float(rows.to_numpy()[0])

    # Figures

    def plot(self, view: str = "kl", by: str | None = None, asked: str | None = None, **options: Any) -> Figure:
        """kl, nll, output_error, a task: against the share of zeros · linears: error of each matrix · bytes: of files.

        by, asked   of the map of matrices: one of the settings; None: the first method, and the middle share
        """
        titles = {
            "kl": ("KL from the dense model", "KL from the dense model (nats per token)"),
            "nll": ("loss", "loss (nats per token)"),
            "output_error": ("relative output error of a matrix", "|error| / |output|, mean over matrices"),
        } | {task: (f"{task} answered right", f"{task}: share right") for task in self.tasks}
        if view in titles:
            return self._plot_curves(view, *titles[view])
        drawings: dict[str, Callable[[], Figure]] = {
            "linears": lambda: self._plot_linears(by or self.by[0], asked or self.middle),
            "bytes": self._plot_bytes,
        }
        if view not in drawings:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join([*titles, *drawings])}.")
        return drawings[view]()

    def views(self) -> dict[str, list[Any]]:
        return {
            "view": ["kl", "nll", "output_error", *self.tasks, "linears", "bytes"],
            "by": list(dict.fromkeys(self.by)),
            "asked": [self.middle, *(asked for asked in dict.fromkeys(self.asked) if asked != self.middle)],
        }

    @property
    def middle(self) -> str:
        """Among the shares and patterns, the one in the middle: what titles speak of."""
        order = sorted(dict.fromkeys(self.asked), key=lambda asked: self.sparsity(self.asked.index(asked)))
        return order[(len(order) - 1) // 2]

    def _plot_curves(self, measure: str, name: str, y_title: str) -> Figure:
        table = self.table()
        table = table.loc[table["measure"] == measure]
        there = table.loc[table["asked"] == self.middle].set_index("by")
        order = there["value"].sort_values(ascending=measure not in self.tasks, kind="stable").index
        best = str(order[0])
        rival = "random" if "random" in there.index and best != "random" else str(order[-1])
        kind = ".0%" if measure in self.tasks else ".3g"
        title = f"At {self.middle} zeros {best} is mildest: {name} {there.loc[best, 'value']:{kind}}"
        title += f", by {rival} {there.loc[rival, 'value']:{kind}}" if len(there) > 1 else ""
        title += f", dense {there.loc[best, 'base']:{kind}}" if measure not in ("kl", "output_error") else ""
        names = [
            by if ":" not in asked else f"{by} {asked}" for by, asked in zip(table["by"], table["asked"], strict=True)
        ]
        colors = {name: COLORS.get(name.split(" ")[0], plots.BLACK) for name in names}
        titles: dict[str, Any] = {"x_title": "share of zeros", "y_title": y_title, "title": title, "colors": colors}
        log_y = measure == "kl" and bool((table["low"] > 0).all())  # methods can lie decades apart
        drawn = table.assign(name=names)
        figure = plots.lines(drawn, "sparsity", "value", "name", "low", "high", log_y=log_y, **titles)
        return figure.update_xaxes(tickformat=".0%")

    def _plot_linears(self, by: str, asked: str) -> Figure:
        table = self.linear_table()
        table = table.loc[(table["by"] == by) & (table["asked"] == asked)]
        if table.empty:
            raise ValueError(f"plot: got by={by!r}, asked={asked!r}, expected a setting of the table.")
        told = table.loc[table["error"].notna()]
        title = f"No matrix reads anything under {by} at {asked} zeros"
        if len(told):
            worst = told.loc[told["error"].idxmax()]
            title = (
                f"At {asked} zeros by {by}, {worst['part']} of layer {worst['layer']} errs most: its output is off by"
            )
            title += f" {worst['error']:.1%} of its norm, the median matrix by {told['error'].median():.1%}"
        titles: dict[str, Any] = {"x_title": "matrix", "y_title": "layer", "value_title": "error / norm"}
        return plots.heatmap(table, "part", "layer", "error", title=title, **titles)

    def _plot_bytes(self) -> Figure:
        shares = np.linspace(0, 1, 41)
        bits = round(8 * float(self.dense.sum() / self.numbers.sum()))
        formula = pd.DataFrame(
            {"sparsity": shares, "ratio": 1 / bits + 1 - shares, "what": f"formula: 1/{bits} + what is left"}
        )
        points = [(self.sparsity(n), self.packed[n].sum() / self.dense.sum(), "measured") for n in range(len(self.by))]
        measured = pd.DataFrame(points, columns=["sparsity", "ratio", "what"]).drop_duplicates()
        number = self.asked.index(self.middle)
        title = (
            f"At {self.middle} zeros the matrices take {self.bitmap_share(number):.3f} of their bytes in a bitmap file;"
        )
        title += f" it pays above {1 / bits:.1%} zeros"
        titles: dict[str, Any] = {"x_title": "share of zeros", "y_title": "bytes as bitmap / bytes", "title": title}
        figure = plots.lines(formula, "sparsity", "ratio", "what", markers=False, **titles)
        figure.add_traces(
            plots.scatter(measured, "sparsity", "ratio", "what", colors={"measured": plots.VERMILLION}).data
        )
        figure.update_xaxes(tickformat=".0%")
        return figure.add_hline(1.0, line={"color": plots.GREY, "width": 1, "dash": "dot"})

    # Statistics

    def _mean(self, values: np.ndarray) -> tuple[float, float, float]:
        """Mean over tokens with its interval; each text is drawn with all its tokens."""
        found = bootstrap_interval(values, weights=self.n_tokens, n_bootstrap=N_BOOTSTRAP, seed=self.seed)
        value, low, high = map(float, found)
        return value, low, high

    def _answered(self, number: int, task: str) -> tuple[float, float, float, float, str, int]:
        """Share of a task's questions answered right, its interval, the share without zeros, unit and count."""
        mine = self.task == self.tasks.index(task)
        count, total = int(self.right[number, mine].sum()), int(mine.sum())
        low, high = map(float, wilson_interval(count, total))
        return count / total, low, high, float(self.base_right[mine].mean()), "share of questions", total

    def _error(self, number: int) -> tuple[float, float, float]:
        """Mean over the matrices that ran, with its interval over texts."""
        ran = self.whole[number].sum(-1) > 0
        if not ran.any():
            return float("nan"), float("nan"), float("nan")
        lost, whole = self.lost[number][ran], self.whole[number][ran]
        draws = resampling_weights(lost.shape[1], N_BOOTSTRAP, self.seed)
        means = np.nanmean(_ratio(draws @ lost.T, draws @ whole.T), axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(_ratio(lost.sum(-1), whole.sum(-1)).mean()), float(low), float(high)


def place(name: str) -> tuple[int, str]:
    """(layer, what it is called in the block) of a path such as model.layers.3.mlp.up_proj."""
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return int(parts[at]), ".".join(parts[at + 1 :])


def _ratio(lost: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """sqrt(lost / whole); NaN where there is nothing to lose."""
    return np.sqrt(np.divide(lost, whole, out=np.full_like(lost, np.nan), where=whole > 0))
