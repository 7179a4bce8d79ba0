"""What a search for bits found: how much each pair hurts each layer, the plan, and what plans really cost in KL.

surrogate E = sum_l w_l e_o[l, p_l]; KL(untoggled || packed) on held-out text; their rank correlation over plans says
whether errors of layers add up. Source: KVTuner, Li et al., 2025 (arXiv 2502.04420); the validation is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from workbench import plots
from workbench.methods.cache.bits import BitPlan, pareto, said
from workbench.result import Result
from workbench.stats import bootstrap_interval, resampling_weights

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

N_BOOTSTRAP = 1000
NOTHING = (float("nan"), float("nan"), float("nan"))
MOST_CURVES = 8  # layers drawn together
COLORS = {"searched": plots.BLUE, "uniform": plots.VERMILLION, "shuffled": plots.ORANGE, "random": plots.GREY}


@dataclass(frozen=True, eq=False, kw_only=True)
class BitSearchResult(Result):
    """The profile, the plan and the plans that it was compared with.

    e_o, e_k, e_v   (text, layer, pair) relative errors of attention outputs, keys, values; NaN at layers left alone,
                    and for keys and values where other key/value toggles acted
    costs           (layer, pair) what a pair costs          pairs    (key bits, value bits) of each
    layers          that can be packed
    groups          (layer,) layers of one number share a choice; -1: left alone
    plan_pairs      (plan, layer, 2) bits; plan 0 is the answer
    plan_kinds      searched; uniform; shuffled: the answer's pairs dealt to other layers; random
    plan_caps       mean bits that each plan was searched or drawn for; NaN where none
    kl              (plan, text) mean KL in nats per token of each held-out text; no text where nothing was validated
    kl_tokens       (text,) tokens that it is over
    accounted       (plan,) bits per number really held, scales and whole tokens included; NaN where not known
    """

    e_o: np.ndarray
    e_k: np.ndarray
    e_v: np.ndarray
    costs: np.ndarray
    groups: np.ndarray
    weights: np.ndarray
    plan_pairs: np.ndarray
    plan_caps: np.ndarray
    accounted: np.ndarray
    kl: np.ndarray
    kl_tokens: np.ndarray
    pairs: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    plan_kinds: tuple[str, ...]
    cap: float
    budget: str = "nominal"
    notes: tuple[str, ...] = ()
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "key_bits", "value_bits", "e_o", "low", "high", "e_k", "e_v", "pareto", "chosen", "group", "seed",
    )  # fmt: skip

    @property
    def plan(self) -> BitPlan:
        """The answer: best within the budget by the surrogate."""
        return self.plan_of(0)

    def plan_of(self, number: int) -> BitPlan:
        """One of the plans that were compared."""
        return BitPlan(tuple((int(keys), int(values)) for keys, values in self.plan_pairs[number]))

    def table(self) -> pd.DataFrame:
        """One row per packable layer and pair: its errors with e_o's 95 % interval over texts, and what became of it.

        With no layer to pack, one row per layer, left whole.
        """
        if not self.layers:
            whole = pd.DataFrame({"layer": range(self.plan_pairs.shape[1]), "key_bits": 16, "value_bits": 16})
            rest = dict.fromkeys(("e_o", "low", "high", "e_k", "e_v"), 0.0)
            return whole.assign(**rest, pareto=True, chosen=True, group=-1, seed=self.seed).loc[:, list(self.columns)]
        e_o, low, high = bootstrap_interval(self.e_o[:, list(self.layers)], n_bootstrap=N_BOOTSTRAP, seed=self.seed)
        e_k, e_v = self.e_k.mean(axis=0), self.e_v.mean(axis=0)
        kept, plan = self.kept(), self.plan.pairs
        rows = [
            (
                *(layer, *pair, e_o[n, p], low[n, p], high[n, p], e_k[layer, p], e_v[layer, p]),
                *(bool(kept[n, p]), plan[layer] == pair, int(self.groups[layer]), self.seed),
            )
            for n, layer in enumerate(self.layers)
            for p, pair in enumerate(self.pairs)
        ]
        return pd.DataFrame(rows, columns=list(self.columns))

    def chosen(self) -> pd.DataFrame:
        """One row per packable layer: its pair, what that costs in errors, and the pairs that were worth a thought."""
        table: Any = self.table()
        names = {
            layer: " ".join(map(_name, rows[rows["pareto"]].itertuples())) for layer, rows in table.groupby("layer")
        }
        found = table[table["chosen"]].assign(pareto_pairs=table["layer"].map(names))
        return found[["layer", "key_bits", "value_bits", "e_o", "e_k", "e_v", "group", "pareto_pairs"]].reset_index(
            drop=True
        )

    def plans(self) -> pd.DataFrame:
        """One row per plan: nominal and really held bits, the surrogate, and KL in nats per token with its interval."""
        n_plans, n_texts = self.kl.shape
        nothing = np.full(n_plans, np.nan)
        kl, low, high = (
            bootstrap_interval(self.kl.T, weights=self.kl_tokens, n_bootstrap=N_BOOTSTRAP, seed=self.seed)
            if n_texts
            else (nothing,) * 3
        )
        made = [self.plan_of(number) for number in range(n_plans)]
        return pd.DataFrame(
            {
                "kind": self.plan_kinds,
                "cap": self.plan_caps,
                "plan": list(map(str, made)),
                "mean_bits": [plan.mean_over(self.layers) for plan in made],
                "accounted_bits": self.accounted,
                "surrogate": self.surrogate(),
                "kl": kl,
                "low": low,
                "high": high,
                "n": n_texts,
            }
        )

    def kept(self) -> np.ndarray:
        """(packable layer, pair) True where a pair is on its layer's Pareto front of cost and e_o."""
        inside = list(self.layers)
        errors = self.e_o.mean(axis=0)[inside]
        return np.array([pareto(*row) for row in zip(errors, self.costs[inside], strict=True)])

    def surrogate(self) -> np.ndarray:
        """(plan,) sum over layers of the weighted e_o of its pair."""
        errors = self.e_o.mean(axis=0) if self.layers else self.e_o
        places: dict[Any, int] = {pair: p for p, pair in enumerate(self.pairs)}
        chosen = [[places[tuple(map(int, plan[layer]))] for layer in self.layers] for plan in self.plan_pairs]
        return np.array(
            [sum(self.weights[n] * errors[n, p] for n, p in zip(self.layers, c, strict=True)) for c in chosen]
        )

    def agreement(self) -> tuple[float, float, float]:
        """(estimate, low, high) Spearman's rank correlation of surrogate and KL over plans; texts are resampled.

        NaN where fewer than three plans were validated, or all are alike.
        """
        surrogate = self.surrogate()
        if self.kl.shape[1] == 0 or len(surrogate) < 3 or np.ptp(surrogate) == 0:
            return NOTHING
        draws = resampling_weights(self.kl.shape[1], N_BOOTSTRAP, self.seed) * self.kl_tokens
        means = np.vstack([self.kl_tokens, draws]) @ self.kl.T  # (1 + resample, plan); ranks don't mind the scale
        found = _correlation(rankdata(surrogate), rankdata(means, axis=1))
        low, high = np.nanquantile(found[1:], [0.025, 0.975]) if np.isfinite(found[1:]).any() else (np.nan, np.nan)
        return float(found[0]), float(low), float(high)

    def rival(self) -> int | None:
        """The uniform plan with the least KL of those within the cap; None where there is none, or no KL."""
        plans: Any = self.plans()
        bits = plans["accounted_bits" if self.budget == "accounted" else "mean_bits"]
        within = plans[(plans["kind"] == "uniform") & (bits <= self.cap + 1e-9)]
        return int(within["kl"].idxmin()) if len(within) and self.kl.shape[1] else None

    def gain(self) -> tuple[float, float, float]:
        """(estimate, low, high) KL of the best uniform plan within the cap minus that of the answer, text by text."""
        rival = self.rival()
        return NOTHING if rival is None else self._apart(self.kl[rival])

    def shuffled_gain(self) -> tuple[float, float, float]:
        """(estimate, low, high) mean KL of the answer's pairs in other layers minus the answer's, text by text."""
        others = [number for number, kind in enumerate(self.plan_kinds) if kind == "shuffled"]
        return self._apart(self.kl[others].mean(axis=0)) if others and self.kl.shape[1] else NOTHING

    def _apart(self, kl: np.ndarray) -> tuple[float, float, float]:
        options: dict[str, Any] = {"weights": self.kl_tokens, "n_bootstrap": N_BOOTSTRAP, "seed": self.seed}
        estimate, low, high = bootstrap_interval(kl - self.kl[0], **options)
        return float(estimate), float(low), float(high)

    # Figures

    def plot(self, view: str = "plan", **options: Any) -> Figure:
        """plan: bits of each layer · errors: against bits, per layer · profile: all layers and pairs ·
        frontier: KL of plans against their bits · surrogate: what was minimised against KL."""
        drawings: dict[str, Callable[[], Figure]] = {
            "plan": self._plot_plan,
            "errors": self._plot_errors,
            "profile": self._plot_profile,
            "frontier": self._plot_frontier,
            "surrogate": self._plot_surrogate,
        }
        if view in drawings and not self.layers:
            return self._plot_plan()  # whose title says why there is nothing else to see
        if view not in self.views()["view"]:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")
        return drawings[view]()

    def views(self) -> dict[str, list[Any]]:
        validated = ["frontier", "surrogate"] if self.kl.shape[1] else []
        return {"view": ["plan", "errors", "profile", *validated] if self.layers else ["plan"]}

    def _plot_plan(self) -> Figure:
        plan = self.plan
        rows = [
            (layer, side, bits)
            for side, of_layers in (("keys", plan.key_bits), ("values", plan.value_bits))
            for layer, bits in enumerate(of_layers)
        ]
        drawn = pd.DataFrame(rows, columns=["layer", "side", "bits"])
        titles: dict[str, Any] = {"title": self._finding(), "x_title": "layer", "y_title": "", "value_title": "bits"}
        figure = plots.heatmap(
            drawn, "layer", "side", "bits", span=(2.0, float(max(8, *plan.key_bits, *plan.value_bits))), **titles
        )
        figure.update_traces(texttemplate="%{z:.0f}" if len(plan.pairs) <= 64 else None)
        ticks = [2, 4, 8, 16]
        return figure.update_traces(colorbar={"tickvals": ticks, "title": {"text": "bits"}}).update_layout(height=330)

    def _finding(self) -> str:
        if not self.layers:
            return "No layer of this model can be packed: all stay whole. " + " ".join(self.notes)
        inside = list(self.layers)
        keys, values = self.plan_pairs[0, inside].mean(axis=0)
        kind = "held" if self.budget == "accounted" else "nominal"
        title = (
            f"Within {self.cap:g} {kind} bits the best plan by error gives keys {keys:.2f} and values {values:.2f} bits"
        )
        rival = self.rival()
        if rival is None:
            return title
        kl, (gain, low, high) = self.plans()["kl"], self.gain()
        uniform = said(self.plan_of(rival).pairs[inside[0]])
        if tuple(self.plan_pairs[rival].ravel()) == tuple(self.plan_pairs[0].ravel()):
            return f"{title}: {uniform} everywhere; its KL is {kl[0]:.2g} nats per token"
        title += f"; its KL is {kl[0]:.2g} nats per token, that of {uniform} everywhere {kl[rival]:.2g}"
        return f"{title} (difference {gain:.2g}, 95 % interval {low:.2g} to {high:.2g})"

    def _plot_errors(self) -> Figure:
        table: Any = self.table()
        shown = [self.layers[i] for i in _spread(len(self.layers), MOST_CURVES)]
        front = table[table["pareto"] & table["layer"].isin(shown)]
        drawn = front.assign(
            bits=(front["key_bits"] + front["value_bits"]) / 2, curve=[f"layer {layer}" for layer in front["layer"]]
        )
        mean = table.groupby("layer")["e_o"].mean()
        some = "" if len(shown) == len(self.layers) else f" ({len(shown)} of {len(self.layers)} layers drawn)"
        title = (
            f"Few bits hurt layer {mean.idxmax()} most and layer {mean.idxmin()} least, on average over all pairs by a"
        )
        title += f" factor of {mean.max() / mean.min():.1f}; each curve is the pairs that are worth having{some}"
        titles: dict[str, Any] = {"title": title, "x_title": "(key bits + value bits) / 2"}
        y_title = "error of attention outputs / norm"
        return plots.lines(drawn, "bits", "e_o", "curve", "low", "high", y_title=y_title, log_y=True, **titles)

    def _plot_profile(self) -> Figure:
        table: Any = self.table()
        by_side = table.set_index(["layer", "key_bits", "value_bits"])["e_o"].unstack("layer")
        prefer = 0.0
        if {(8, 4), (4, 8)} <= set(self.pairs):
            prefer = float((by_side.loc[(8, 4)] < by_side.loc[(4, 8)]).mean())
        title = f"Errors from {table['e_o'].min():.2g} to {table['e_o'].max():.2g} of the output's norm; "
        title += f"{prefer:.0%} of layers would rather have K8V4 than K4V8"
        drawn = table.assign(
            pair=[_name(row) for row in table.itertuples()], order=table["key_bits"] + table["value_bits"]
        )
        drawn = drawn.sort_values(["layer", "order", "key_bits"], ascending=[True, False, False])
        titles: dict[str, Any] = {"title": title, "x_title": "bits of keys and values", "y_title": "layer"}
        figure = plots.heatmap(drawn, "pair", "layer", "e_o", value_title="error / norm", **titles)
        return figure.update_traces(texttemplate="%{z:.3f}" if len(drawn) <= 200 else None)

    def _plot_frontier(self) -> Figure:
        drawn = self._drawn()
        bits, rival, (estimate, low, high) = self._bits(), self.rival(), self.gain()
        title = f"{len(drawn)} plans read on {self.kl.shape[1]} held-out texts: at {self.cap:g} bits the searched plan "
        if rival is None:
            title += "has no uniform rival"
        elif tuple(self.plan_pairs[rival].ravel()) == tuple(self.plan_pairs[0].ravel()):
            title += "is the uniform one"
        else:
            sure = "is better than" if low > 0 else "is worse than" if high < 0 else "can't be told from"
            title += f"{sure} the best uniform one (KL less by {estimate:.2g}, 95 % interval {low:.2g} to {high:.2g})"
        x_title = (
            "bits per number, scales and whole tokens included" if bits == "accounted_bits" else "mean nominal bits"
        )
        titles: dict[str, Any] = {
            "title": title,
            "x_title": x_title,
            "y_title": "KL (nats per token)",
            "colors": COLORS,
        }
        figure = plots.scatter(drawn, bits, "kl", "kind", "low", "high", log_y=True, **titles)
        searched: Any = figure.data[0]
        return figure.update_traces(
            mode="lines+markers", line={"color": searched.marker.color}, selector={"name": "searched"}
        ).update_yaxes(exponentformat="power")

    def _plot_surrogate(self) -> Figure:
        estimate, low, high = self.agreement()
        title = f"Errors of layers, added up, rank the plans by their KL with a correlation of {estimate:.2f}"
        title += f" (95 % interval over texts {low:.2f} to {high:.2f})"
        if not np.isfinite(estimate):
            title = "Whether summed errors rank plans by their KL can't be told from these few plans"
        x_title = "summed error of attention outputs, what the search minimises"
        titles: dict[str, Any] = {
            "title": title,
            "x_title": x_title,
            "y_title": "KL (nats per token)",
            "colors": COLORS,
        }
        return plots.scatter(
            self._drawn(), "surrogate", "kl", "kind", "low", "high", log_x=True, log_y=True, **titles
        ).update_yaxes(exponentformat="power")

    def _drawn(self) -> pd.DataFrame:
        plans: Any = self.plans()
        order = plans["kind"].map(list(COLORS).index)
        return plans.assign(order=order).sort_values(["order", self._bits()])

    def _bits(self) -> str:
        return "accounted_bits" if self.budget == "accounted" else "mean_bits"


def _name(row: Any) -> str:
    return said((int(row.key_bits), int(row.value_bits)))


def _spread(n: int, most: int) -> list[int]:
    """At most so many of n indices, the first and the last among them."""
    return sorted({round(float(i)) for i in np.linspace(0, n - 1, min(n, most))})


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(row,) Pearson's correlation of x (n,) with each row of y (row, n); NaN where a row is constant."""
    x, y = x - x.mean(), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x**2).sum() * (y**2).sum(axis=1))
    return np.where(scale > 0, y @ x / np.where(scale > 0, scale, 1.0), np.nan)
