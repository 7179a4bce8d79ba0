"""How far each feed-forward block turns the residual stream, token by token, and which blocks a threshold lets rest.

c = cos(x, x + y), r = |y| / |x|, x the stream before the block and y what it adds. Source: FFN-SkipLLM, Jaiswal et al.,
2024 (arXiv 2404.03865); the rules in `workbench.methods.pruning.skipping`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import plots
from workbench.methods.pruning.skipping import Test, middle, simulated, threshold_for, thresholds
from workbench.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHOWN_TOKENS = 48  # of a text, in the map


@dataclass(frozen=True, eq=False, kw_only=True)
class SaturationResult(Result):
    """What every block did to every token of the calibration texts.

    cosine, relative   (token, layer) as `skipping.change` gives them, float32
    text, position     (token,) which text, and where in it
    words              the tokens of the first texts, as far as maps show them: (text, ...)
    The rest repeats the settings of the probe: only tokens behind the warm-up count, as only they can skip.
    """

    cosine: np.ndarray
    relative: np.ndarray
    text: np.ndarray
    position: np.ndarray
    words: tuple[tuple[str, ...], ...] = ()
    warmup: int = 16
    rest: int | None = 2
    test: Test = "cosine"
    target: float = 0.25
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "region", "cosine", "cosine_p10", "cosine_p90", "relative", "relative_p10", "relative_p90",
        "skip_rate", "n_tokens",
    )  # fmt: skip

    @property
    def n_layers(self) -> int:
        return self.cosine.shape[1]

    @property
    def counts(self) -> np.ndarray:
        """(token,) True behind the warm-up, whose first token counts as the prompt."""
        return self.position > self.warmup

    @property
    def middle(self) -> tuple[int, int]:
        """First and last of the layers that turn the stream least."""
        return middle(torch.from_numpy(self.cosine[self.counts]))

    def threshold(self, target: float) -> float:
        """The threshold at which tokens would skip most nearly this share of all blocks."""
        values, (first, last) = self._values(), self.middle
        return threshold_for(self._share, thresholds(values, first, last), target)

    def reached(self, target: float) -> float:
        """The share that they would skip at that threshold, were the cosines those of the whole model."""
        return self._share(self.threshold(target))

    def flattest(self, target: float) -> tuple[int, ...]:
        """The middle layers that turn the stream least on average, as many as make up this share of all blocks."""
        (first, last), n = self.middle, round(target * self.n_layers)
        if not 1 <= n <= last + 1 - first:
            raise ValueError(
                f"flattest: got target={target:g}, which is {n} of {self.n_layers} blocks; expected 1 to "
                f"{last + 1 - first}, the middle being layers {first} to {last}."
            )
        means = self._values().mean(0) * (-1 if self.test == "cosine" else 1)
        return tuple(sorted(range(first, last + 1), key=lambda layer: float(means[layer]))[:n])

    def rests(self, target: float) -> np.ndarray:
        """(token, layer) True where a token behind the warm-up would skip a block at this share of all blocks."""
        first, last = self.middle
        skips = np.zeros(self.cosine.shape, dtype=bool)
        made = simulated(self._values(), self.threshold(target), first, last, self.rest, self.test)
        skips[self.counts] = made.numpy()
        return skips

    def table(self) -> pd.DataFrame:
        """One row per layer: its region, mean and 10th and 90th percentile over tokens, share of tokens that rest."""
        (first, last), rates = self.middle, self.rests(self.target)[self.counts].mean(0)
        columns: dict[str, Any] = {"layer": np.arange(self.n_layers)}
        columns["region"] = ["middle" if first <= layer <= last else "cold" for layer in range(self.n_layers)]
        for name in ("cosine", "relative"):
            values = getattr(self, name)[self.counts].astype(np.float64)
            columns[name] = values.mean(0)
            columns[f"{name}_p10"], columns[f"{name}_p90"] = np.quantile(values, [0.1, 0.9], axis=0)
        columns |= {"skip_rate": rates, "n_tokens": int(self.counts.sum())}
        return pd.DataFrame(columns).loc[:, list(self.columns)]

    def curve(self) -> pd.DataFrame:
        """Columns threshold, share: of all blocks that tokens would skip."""
        values, (first, last) = self._values(), self.middle
        grid = thresholds(values, first, last)
        return pd.DataFrame({"threshold": grid.numpy(), "share": [self._share(one) for one in grid.tolist()]})

    def views(self) -> dict[str, list[Any]]:
        shown = ["layers", "share"] + (["map"] if self.words else [])
        return {"show": shown, "row": list(range(len(self.words)))}

    def plot(self, show: str = "layers", row: int = 0) -> Figure:
        """layers: how far each block turns the stream; share: what a threshold skips; map: who rests in one text."""
        if show == "layers":
            return self._plot_layers()
        if show == "share":
            return self._plot_share()
        if show == "map" and self.words:
            if row not in range(len(self.words)):
                raise ValueError(
                    f"plot: got row={row!r}, expected 0 to {len(self.words) - 1}, the texts that are kept."
                )
            return self._plot_map(row)
        raise ValueError(f"plot: got show={show!r}, expected one of {', '.join(self.views()['show'])}.")

    def _plot_layers(self) -> Figure:
        (first, last), values = self.middle, getattr(self, self.test)[self.counts]
        low, centre, high = np.quantile(values.astype(np.float64), [0.1, 0.5, 0.9], axis=0)
        drawn = pd.DataFrame({"layer": np.arange(self.n_layers), "value": centre, "low": low, "high": high})
        inside = (drawn["layer"] >= first) & (drawn["layer"] <= last)
        if bool(inside.to_numpy().all()):
            title = "No layer stands out: every feed-forward block turns the residual stream about equally far"
        else:
            name, one = (
                ("cosine" if self.test == "cosine" else "relative length"),
                "layer" if first == last else "layers",
            )
            span = f"{first}" if first == last else f"{first} to {last}"
            title = (
                f"The feed-forward blocks of {one} {span} turn the residual stream least: median {name} "
                f"{drawn.loc[inside, 'value'].median():.3f}, elsewhere {drawn.loc[~inside, 'value'].median():.3f}"
            )
        axis = "cos(before, after) per token" if self.test == "cosine" else "|added| / |stream| per token"
        options: dict[str, Any] = {"x_title": "layer", "y_title": f"{axis}, middle 80 %"}
        figure = plots.lines(drawn, "layer", "value", None, "low", "high", title=title, **options)
        return figure.update_traces(showlegend=False).update_xaxes(dtick=max(1, self.n_layers // 16))

    def _plot_share(self) -> Figure:
        drawn, found = self.curve(), self.threshold(self.target)
        title = (
            f"A threshold of {found:.4g} lets tokens skip {self.reached(self.target):.0%} of all feed-forward blocks, "
            f"if none changed what the next ones get"
        )
        options: dict[str, Any] = {"markers": False, "x_title": f"threshold ({self.test})"}
        figure = plots.lines(drawn, "threshold", "share", y_title="share of blocks skipped", title=title, **options)
        figure.add_vline(found, line={"color": plots.GREY, "width": 1, "dash": "dot"})
        return figure.update_traces(showlegend=False).update_yaxes(rangemode="tozero", tickformat=".0%")

    def _plot_map(self, row: int) -> Figure:
        here = np.flatnonzero(self.text == row)[:SHOWN_TOKENS]
        values, skips = getattr(self, self.test)[here], self.rests(self.target)[here]
        names = [f"{position} {word}" for position, word in zip(self.position[here], self.words[row], strict=False)]
        grid = [
            {"token": name, "layer": layer, "value": float(values[token, layer]), "rests": bool(skips[token, layer])}
            for layer in reversed(range(self.n_layers))
            for token, name in enumerate(names)
        ]
        title = (
            f"Of text {row}, {skips.mean():.0%} of the feed-forward blocks rest (crosses) where the ones before "
            "hardly turned the stream"
        )
        figure = plots.heatmap(
            pd.DataFrame(grid), "token", "layer", "value", title=title, value_title=self.test, show_values=False
        )
        crosses = [(one["token"], str(one["layer"])) for one in grid if one["rests"]]
        x, y = zip(*crosses, strict=True) if crosses else ((), ())
        marker = {"symbol": "x", "size": 7, "color": plots.VERMILLION}
        figure.add_scatter(x=x, y=y, mode="markers", marker=marker, name="rests", showlegend=False)
        return figure.update_xaxes(tickangle=-60)

    def _share(self, threshold: float) -> float:
        return float(simulated(self._values(), threshold, *self.middle, self.rest, self.test).float().mean())

    def _values(self) -> Tensor:
        """(token, layer) of the tokens that count."""
        return torch.from_numpy(getattr(self, self.test)[self.counts])
