"""One number per run, over seeds: the mean and the interval that the seeds leave open, and the figure of it.

mean +- t(n - 1) s / sqrt(n), n the number of seeds: each seed counts once.
Source: Student, 1908. The percentile bootstrap is z sqrt((n - 1) / n) / t(n - 1) as wide: .37 at 3 seeds, .82 at 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench import plots
from workbench.stats import mean_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_TICKS = 12
MOST_NAMES = 6  # of columns, in an error
SAME = "they are of runs with equal parameters, of which Runs(..., latest=True) takes the last"


def over_seeds(table: pd.DataFrame, y: str, by: Sequence[str], seed: str = "seed", level: float = 0.95) -> pd.DataFrame:
    """One row per combination of the columns `by`: the mean of `y` over seeds, `low`, `high` and `n_seeds`.

    With one seed there is no interval: low and high are NaN. Rows whose `y` is NaN are not counted.
    Raises ValueError where a seed has several rows in a combination: something else than the seed differs then.
    """
    for name in (y, *by, seed):
        if name not in table.columns:
            raise ValueError(f"over seeds: got column {name!r}, expected one of {', '.join(map(str, table.columns))}.")
    if not pd.api.types.is_numeric_dtype(table[y]):
        raise ValueError(f"over seeds: column {y} holds {table[y].dtype}, expected numbers.")
    counted = table.loc[table[y].notna()]
    groups = counted.groupby(list(by), sort=False, dropna=False, observed=True)
    if np.any(counted.duplicated([*by, seed])):
        raise ValueError(_several(counted, y, by, seed))
    rows = []
    for _, group in groups:
        mean, low, high = mean_interval(group[y].to_numpy(dtype=np.float64), level)
        place = {name: group[name].iloc[0] for name in by}
        rows.append(place | {y: mean, "low": low, "high": high, "n_seeds": len(group)})
    return pd.DataFrame(rows, columns=pd.Index([*by, y, "low", "high", "n_seeds"]))


def seeds_figure(table: pd.DataFrame, x: str, y: str, color: str | None = None, *, name: str = "") -> Figure:
    """The figure of a table that `over_seeds` made: lines with bands over numbers, else points with whiskers.

    Raises ValueError for a table without rows, which comes of a column that is NaN everywhere.
    """
    if table.empty:
        raise ValueError(
            f"over seeds: {name}{y} is NaN in every row, expected a number somewhere. Show another column."
        )
    n_known = int(np.isfinite(table["low"].to_numpy(dtype=np.float64)).sum())
    low, high = ("low", "high") if n_known else (None, None)
    title = _title(table, x, y, color, name)
    ticks = sorted(set(table[x])) if table[x].dtype.kind in "iuf" else []
    if not ticks:
        figure = plots.scatter(table.assign(**{x: table[x].astype(str)}), x, y, color, low, high, title=title)
    elif n_known in (0, len(table)):
        figure = plots.lines(table, x, y, color, low, high, title=title)
    else:  # a band would have holes
        figure = plots.scatter(table, x, y, color, low, high, title=title)
    if 0 < len(ticks) <= MOST_TICKS:
        figure.update_xaxes(tickvals=ticks)
    return figure.update_layout(legend={"title": {"text": color}}) if color else figure


def _title(table: pd.DataFrame, x: str, y: str, color: str | None, name: str) -> str:
    """Where the mean is highest, with its interval, and how many seeds that rests on."""
    top: dict[str, Any] = table.to_dict("records")[int(np.argmax(table[y].to_numpy()))]
    place = f"{x} {_short(top[x])}" + (f", {color} {_short(top[color])}" if color else "")
    fewest, most = min(table["n_seeds"]), max(table["n_seeds"])
    if most == 1:
        return f"{name}{y} is highest at {place}: {top[y]:.3g}; one seed only, so there is no interval"
    interval = f" [{top['low']:.3g}, {top['high']:.3g}]" if top["n_seeds"] > 1 else " (one seed)"
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    return f"{name}{y} is highest at {place}: {top[y]:.3g}{interval}, mean of {seeds} with 95 % intervals"


def _several(table: pd.DataFrame, y: str, by: Sequence[str], seed: str) -> str:
    """What else differs where a seed has several rows: the cure is to choose or to show it."""
    groups = table.groupby([*by, seed], dropna=False, observed=True)
    others = [str(name) for name in table.columns if name not in (y, *by, seed, "key")]
    differing = [name for name in others if max(groups[name].nunique(dropna=False)) > 1]
    shown = ", ".join(differing[:MOST_NAMES]) + ", …" * (len(differing) > MOST_NAMES)
    what = f"they differ in {shown}" if differing else SAME
    return (
        f"over seeds: up to {max(groups.size())} rows share one {seed} and one {', '.join(by)}; {what}. "
        "Choose with where=..., or show it with color=...."
    )


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)
