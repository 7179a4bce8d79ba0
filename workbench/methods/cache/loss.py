"""What compressed caches lost over many texts: tables and figures of recall, predictions, attention outputs and tokens.

Exact recall needs no generation: greedy decoding says a continuation iff each of its tokens is the most probable one
given those before it. Intervals: bootstrap over texts (Efron, 1979), shares of texts after Wilson, 1927.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.cache.comparison import N_BOOTSTRAP, TOKEN_ARRAYS, Loss, quantile_interval, shares_held
from workbench.result import Result
from workbench.stats import bootstrap_interval, wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

KEPT = [[0.0, "#EDEDED"], [1.0, plots.BLUE]]  # dropped tokens are nearly white


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheLossResult(Result):
    """What the active toggles lost, against the same subject without them. N texts, M continuation tokens of all texts.

    nll, base_nll, kl    (M,) nats, per continuation token           token_text   (M,) which text a token is of
    same_top             (M,) 1 where both sides' most probable token is the same
    right, base_right    (M,) 1 where the most probable token is the continuation's, with and without the toggles
    head_error           (N, layer, head) relative error of attention outputs; NaN where there is no such head
    held_share, held_again   (N, layer, kv_head) share of the prompt's tokens held; of those that the continuation
                         says again (for a code: the code)
    bytes_held           (side, N) cache bytes after the prompt, side 0 is the untoggled one
    kept                 (map, layer, kv_head, seq) of the texts in kept_text: 1 held, 0 dropped, -1 not there
    """

    nll: np.ndarray
    base_nll: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray
    right: np.ndarray
    base_right: np.ndarray
    token_text: np.ndarray
    head_error: np.ndarray
    held_share: np.ndarray
    held_again: np.ndarray
    bytes_held: np.ndarray
    kept: np.ndarray
    kept_text: tuple[int, ...]
    kept_words: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    toggles: str = "no toggle"
    notes: str = ""
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "toggles", "measure", "group", "value", "low", "high", "base", "unit", "n", "seed",
    )  # fmt: skip

    @classmethod
    def of(
        cls, losses: Sequence[Loss], groups: Sequence[str], words: Mapping[int, Sequence[str]], **rest: Any
    ) -> CacheLossResult:
        """The result of these texts; `words` are the prompts' tokens of the texts whose maps are kept."""
        shares = [shares_held(loss) for loss in losses]
        maps = [losses[index].held for index in words]
        longest = max((held.shape[2] for held in maps), default=0)
        kept = [np.pad(held, ((0, 0), (0, 0), (0, longest - held.shape[2])), constant_values=-1) for held in maps]
        return cls(
            **{name: np.concatenate([loss.tokens[name] for loss in losses]) for name in TOKEN_ARRAYS},
            token_text=np.repeat(np.arange(len(losses)), [len(loss.tokens["nll"]) for loss in losses]),
            head_error=np.stack([loss.head_error for loss in losses]),
            held_share=np.stack([share for share, _ in shares]),
            held_again=np.stack([again for _, again in shares]),
            bytes_held=np.array([loss.cache_bytes for loss in losses]).T,
            kept=np.array(kept, dtype=np.int8) if kept else np.zeros((0, 1, 1, 1), dtype=np.int8),
            kept_text=tuple(words),
            kept_words=tuple(map(tuple, words.values())),
            groups=tuple(groups),
            **rest,
        )

    def table(self) -> pd.DataFrame:
        """One row per measure, and per group for recall: value with the toggles, 95 % interval, the untoggled value."""
        rows = [
            ("perplexity", "all", *self._mean(self.nll, np.exp), self._mean(self.base_nll, np.exp)[0], "1"),
            ("nll", "all", *self._mean(self.nll), self._mean(self.base_nll)[0], "nats per token"),
            ("nll_added", "all", *self._mean(self.nll - self.base_nll), 0.0, "nats per token"),
            ("kl", "all", *self._mean(self.kl), 0.0, "nats per token"),
            ("kl_p99", "all", *self._quantile(self.kl, 0.99), 0.0, "nats"),
            ("top1_agreement", "all", *self._mean(self.same_top), 1.0, "share of tokens"),
            ("head_error", "all", *self._over_texts(self.head_error), 0.0, "share of the output's norm"),
            ("held", "all", *self._over_texts(self.held_share), 1.0, "share of the prompt's tokens"),
            ("held_again", "all", *self._over_texts(self.held_again), 1.0, "share of tokens said again"),
        ]
        base, value = self.bytes_held.sum(axis=1)
        rows.append(("cache_bytes", "all", value, value, value, base, "bytes"))
        table = pd.DataFrame(rows, columns=["measure", "group", "value", "low", "high", "base", "unit"])
        table = pd.concat([table.assign(n=len(self.groups)), self.recall()], ignore_index=True)
        return table.assign(toggles=self.toggles, seed=self.seed).loc[:, list(self.columns)]

    def recall(self) -> pd.DataFrame:
        """Share of texts whose continuation greedy decoding says word for word: over all, then per group."""
        exact, base_exact = self.exact(), self.exact(base=True)
        names = list(dict.fromkeys(self.groups))
        rows = []
        for name in ["all", *names] if len(names) > 1 else ["all"]:
            inside = np.array([name in ("all", group) for group in self.groups])
            count, total = int(exact[inside].sum()), int(inside.sum())
            low, high = map(float, wilson_interval(count, total))
            rows.append(("recall", name, count / total, low, high, float(base_exact[inside].mean()), total))
        table = pd.DataFrame(rows, columns=["measure", "group", "value", "low", "high", "base", "n"])
        return table.assign(unit="share of texts")

    def exact(self, *, base: bool = False) -> np.ndarray:
        """(N,) True where every token of the continuation is the most probable one."""
        wrong = 1.0 - (self.base_right if base else self.right)
        return np.bincount(self.token_text, weights=wrong, minlength=len(self.groups)) == 0

    def errors(self) -> pd.DataFrame:
        """One row per layer and head: the relative error of its attention output, with its interval over texts."""
        return _per_place(self.head_error, "head", self.seed)

    def held(self) -> pd.DataFrame:
        """One row per layer and key/value head: share of the prompt's tokens that it holds, with its interval."""
        return _per_place(self.held_share, "kv_head", self.seed)

    @property
    def bytes_share(self) -> float:
        """Bytes held, as a share of what the untoggled cache holds."""
        base, value = self.bytes_held.sum(axis=1)
        return float(value / base)

    # Figures

    def plot(self, view: str = "recall", text: int | None = None, kv_head: str = "all", **options: Any) -> Figure:
        """recall per group · predictions: loss and KL · heads: error map · kept: kept-token map of a text · bytes.

        text, kv_head   of the kept-token map: one of kept_text, None the first; "all" heads shows the share that holds
        """
        drawings: dict[str, Callable[[], Figure]] = {
            "recall": self._plot_recall,
            "predictions": self._plot_predictions,
            "heads": self._plot_heads,
            "kept": lambda: self._plot_kept(text, str(kv_head)),
            "bytes": self._plot_bytes,
        }
        if view not in drawings:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(drawings)}.")
        return drawings[view]()

    def views(self) -> dict[str, list[Any]]:
        heads = ["all", *map(str, range(self.kept.shape[2]))]
        return {
            "view": ["recall", "predictions", "heads", "kept", "bytes"],
            "text": list(self.kept_text),
            "kv_head": heads,
        }

    def _plot_recall(self) -> Figure:
        table = self.recall()
        overall, n = table.iloc[0], len(self.groups)
        title = f"Under {self.toggles} {overall['value']:.0%} of {n} continuations are said word for word"
        title += f" (untoggled {overall['base']:.0%}), from {self.bytes_share:.2f} times the bytes"
        shown = table[1:] if len(table) > 1 else table
        flat = shown.assign(value=shown["base"], low=np.nan, high=np.nan, side="untoggled")
        drawn = pd.concat([flat, shown.assign(side="toggled")], ignore_index=True)
        colors = {"untoggled": plots.GREY, "toggled": plots.BLUE}
        if len(table) > 1 and all(name.isdigit() for name in shown["group"]):
            drawn = drawn.assign(group=drawn["group"].astype(int), low=drawn["low"].fillna(drawn["value"]))
            drawn = drawn.assign(high=drawn["high"].fillna(drawn["value"]))
            titles: dict[str, Any] = {"x_title": "distance (tokens)", "y_title": "share recalled word for word"}
            figure = plots.lines(drawn, "group", "value", "side", "low", "high", title=title, colors=colors, **titles)
        else:
            titles = {"x_title": "", "y_title": "share said word for word"}
            figure = plots.bars(drawn, "group", "value", "low", "high", "side", title=title, colors=colors, **titles)
        return figure.update_yaxes(range=[-0.03, 1.05])

    def _plot_predictions(self) -> Figure:
        table = self.table().set_index("measure")
        before, after = table.loc["perplexity", "base"], table.loc["perplexity", "value"]
        title = f"Under {self.toggles} perplexity of the continuations goes from {before:.3f} to {after:.3f}"
        title += f"; {table.loc['top1_agreement', 'value']:.0%} of top tokens stay"
        rows = [
            ("loss, untoggled", "untoggled", *self._mean(self.base_nll)),
            ("loss, toggled", "toggled", *self._mean(self.nll)),
            ("KL from untoggled", "toggled", *self._mean(self.kl)),
            ("KL, 99th percentile", "toggled", *self._quantile(self.kl, 0.99)),
        ]
        drawn = pd.DataFrame(rows, columns=["what", "side", "value", "low", "high"])
        colors = {"untoggled": plots.GREY, "toggled": plots.BLUE}
        titles: dict[str, Any] = {"title": title, "x_title": "", "y_title": "nats per token"}
        return plots.bars(drawn, "what", "value", "low", "high", color="side", colors=colors, **titles)

    def _plot_heads(self) -> Figure:
        table = self.errors()
        if not len(table):
            raise ValueError("plot: no head read the cache: each text has one continuation token. Set unseen=1.")
        worst = table.iloc[int(table["value"].to_numpy().argmax())]
        title = f"Under {self.toggles} attention outputs are off by {table['value'].mean():.0%} of their norm on"
        title += f" average, most in layer {worst['layer']:.0f}, head {worst['head']:.0f} ({worst['value']:.0%})"
        titles: dict[str, Any] = {"x_title": "head", "y_title": "layer", "value_title": "error / norm"}
        span = (0.0, max(1.0, float(worst["value"])))
        return plots.heatmap(table, "head", "layer", "value", title=title, span=span, **titles)

    def _plot_kept(self, text: int | None, kv_head: str) -> Figure:
        if not self.kept_text:
            raise ValueError("plot: no kept-token map is held. Measure with CacheLoss(maps=1) or more.")
        text = self.kept_text[0] if text is None else int(text)
        if text not in self.kept_text:
            raise ValueError(f"plot: got text={text}, expected one whose map is held: {self.kept_text}.")
        place = self.kept_text.index(text)
        words = self.kept_words[place]
        kept = self.kept[place, :, :, : len(words)]  # (layer, kv_head, seq)
        if kv_head != "all":
            if not (kv_head.isdigit() and int(kv_head) < kept.shape[1]):
                raise ValueError(f"plot: got kv_head={kv_head!r}, expected all or 0 to {kept.shape[1] - 1}.")
            kept = kept[:, int(kv_head) : int(kv_head) + 1]
        exists = kept >= 0
        share = np.where(exists.any(1), (kept == 1).sum(1) / np.maximum(exists.sum(1), 1), np.nan)  # (layer, seq)
        layer, position = np.indices(share.shape)
        drawn = pd.DataFrame({"layer": layer.ravel(), "position": position.ravel(), "held": share.ravel()})
        whose = "all heads" if kv_head == "all" else f"key/value head {kv_head}"
        title = f"Under {self.toggles} {whose} hold {np.nanmean(share):.0%} of the {len(words)} tokens of text {text}"
        again = self.held_again[text]
        if np.isfinite(again).any():
            at, head = np.unravel_index(np.nanargmax(again), again.shape)
            title += f"; of what its continuation says again, layer {at}, head {head} holds most: {again[at, head]:.0%}"
        titles: dict[str, Any] = {"x_title": "position (tokens)", "y_title": "layer", "value_title": "share of heads"}
        figure = plots.heatmap(
            drawn, "position", "layer", "held", title=title, span=(0.0, 1.0), show_values=False, **titles
        )
        hover = "position %{x}: <b>%{text}</b><br>layer %{y}, held by %{z:.0%} of heads<extra></extra>"
        figure.update_traces(text=[list(words)] * len(share), hovertemplate=hover, xgap=0, ygap=2, colorscale=KEPT)
        return figure.update_xaxes(nticks=12)

    def _plot_bytes(self) -> Figure:
        base, value = self.bytes_held.mean(axis=1)
        title = f"Under {self.toggles} a prompt's cache holds {value:,.0f} bytes instead of {base:,.0f}: "
        drawn = pd.DataFrame({"side": ["untoggled", "toggled"], "bytes": [base, value]})
        titles: dict[str, Any] = {"title": title + f"{value / base:.3f} times as many", "x_title": ""}
        return plots.bars(drawn, "side", "bytes", y_title="bytes per text, indices and scales included", **titles)

    # Statistics

    def _mean(self, values: np.ndarray, transform: Callable | None = None) -> tuple[float, float, float]:
        """Mean over tokens with its interval; each text is drawn with all its tokens."""
        counts = np.bincount(self.token_text, minlength=len(self.groups))
        means = np.bincount(self.token_text, weights=values, minlength=len(self.groups)) / counts
        estimate, low, high = bootstrap_interval(
            means, weights=counts, transform=transform, n_bootstrap=N_BOOTSTRAP, seed=self.seed
        )
        return float(estimate), float(low), float(high)

    def _over_texts(self, values: np.ndarray) -> tuple[float, float, float]:
        """Mean over texts of each text's mean over places; NaN without any."""
        flat = values.reshape(len(values), -1)
        told = np.isfinite(flat).any(axis=1)
        if not told.any():
            return float("nan"), float("nan"), float("nan")
        estimate, low, high = bootstrap_interval(
            np.nanmean(flat[told], axis=1), n_bootstrap=N_BOOTSTRAP, seed=self.seed
        )
        return float(estimate), float(low), float(high)

    def _quantile(self, values: np.ndarray, at: float) -> tuple[float, float, float]:
        return quantile_interval(values, self.token_text, at, seed=self.seed)


def _per_place(values: np.ndarray, name: str, seed: int) -> pd.DataFrame:
    """Rows (layer, name, value, low, high) of an array (text, layer, place), over the texts that tell."""
    told = np.isfinite(values).any(axis=(1, 2))
    exists = np.isfinite(values[told]).all(axis=0) if told.any() else np.zeros(values.shape[1:], dtype=bool)
    layer, place = np.nonzero(exists)
    if not len(layer):
        return pd.DataFrame(columns=["layer", name, "value", "low", "high"])
    chosen = values[told][:, layer, place]
    value, low, high = bootstrap_interval(chosen, n_bootstrap=N_BOOTSTRAP, seed=seed)
    return pd.DataFrame({"layer": layer, name: place, "value": value, "low": low, "high": high})
