"""What steering gives and costs, layer by strength: tables, figures, and the answer to "which layer, how much?".

value = target after the push;  effect = value - target without;  band = where one more random direction would fall.
Rule of the answer: of the cells within the KL limit whose effect leaves the band, those that reach the value wanted
(else 90 % of the largest effect); of these the one with the least KL.
Source: this project; random directions as control: Arditi et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.steering.random_control import prediction_band
from workbench.result import Result
from workbench.stats import bootstrap_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ENOUGH = 0.9  # share of the largest effect that counts as reaching it


@dataclass(frozen=True)
class Choice:
    """The answer: push at `layer` by `strength` mean residual norms.

    value, base   target with and without the push      kl, ppl_ratio   what it costs on other text
    """

    layer: int
    kind: str
    strength: float
    added_norm: float
    value: float
    base: float
    kl: float
    ppl_ratio: float
    rule: str

    def __str__(self) -> str:
        return (
            f"{self.kind}@{self.layer}, strength {self.strength:g}: target {self.base:.1f} to {self.value:.1f}, "
            f"KL {self.kl:.2f} nats, perplexity x {self.ppl_ratio:.2f} ({self.rule})"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SteeringMapResult(Result):
    """Effect and side effects of each cell. L layers, S strengths, R random directions. Cells not run are NaN.

    norm (L,)                      mean norm of the residual stream there: the unit of strength
    score (L, S, prompt)           target on each prompt      base_score (prompt,)   without the push
    random_score, random_kl (L, S, R)   means over prompts and over texts for random directions of the same norm
    kl, nll (L, S, text)           on other text, nats per token      base_nll, n_tokens (text,)
    fluency (L, S, prompt)         nats per token, by the unpushed model, of what the pushed one writes; NaN: not asked
    base_fluency (prompt,)         the same of what the unpushed one writes
    """

    norm: np.ndarray
    score: np.ndarray
    random_score: np.ndarray
    kl: np.ndarray
    random_kl: np.ndarray
    nll: np.ndarray
    fluency: np.ndarray
    base_score: np.ndarray
    base_nll: np.ndarray
    base_fluency: np.ndarray
    n_tokens: np.ndarray
    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    kind: str
    target: str
    unit: str
    direction: str
    kl_limit: float
    reach: float | None
    seed: int

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "kind", "strength", "added_norm", "metric", "value", "low", "high", "effect",
        "control", "control_low", "control_high", "beyond_control", "kl", "kl_low", "kl_high", "control_kl",
        "ppl_ratio", "fluency", "run", "reason", "seed",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per cell; control is the mean over random directions, control_low and _high their band."""
        layer, strength = (axis.ravel() for axis in np.meshgrid(self.layers, self.strengths, indexing="ij"))
        n = len(layer)
        flat = {name: getattr(self, name).reshape(n, -1) for name in ("score", "kl", "nll", "fluency")}
        value, low, high = bootstrap_interval(flat["score"].T, seed=self.seed)
        kl, kl_low, kl_high = bootstrap_interval(flat["kl"].T, weights=self.n_tokens, seed=self.seed)
        random = self.random_score.reshape(n, -1)
        control_low, control_high = prediction_band(random)
        base = self.base_score.mean()
        run = ~np.isnan(value)
        drift = np.average(flat["nll"] - self.base_nll, axis=1, weights=self.n_tokens)
        columns = {
            "layer": layer, "kind": self.kind, "strength": strength,
            "added_norm": strength * np.repeat(self.norm, len(self.strengths)),
            "metric": self.target, "value": value, "low": low, "high": high, "effect": value - base,
            "control": _mean(random), "control_low": control_low, "control_high": control_high,
            "beyond_control": run & ((value < control_low) | (value > control_high)),
            "kl": kl, "kl_low": kl_low, "kl_high": kl_high, "control_kl": _mean(self.random_kl.reshape(n, -1)),
            "ppl_ratio": np.exp(drift), "fluency": _mean(flat["fluency"]), "run": run,
            "reason": np.where(run, "", f"not run: a smaller push passed KL {self.kl_limit:g}"), "seed": self.seed,
        }  # fmt: skip
        return pd.DataFrame(columns, columns=list(self.columns))

    @property
    def base(self) -> float:
        """The target without a push, mean over prompts."""
        return float(self.base_score.mean())

    def best(
        self, max_kl: float | None = None, towards: Literal["more", "less"] = "more", reach: float | None = None
    ) -> Choice | None:
        """Which layer, how much: the cheapest cell that goes far enough; None where none qualifies.

        max_kl    nats per token allowed on other text; None: the map's own limit
        towards   whether more or less of the target is wanted
        reach     the target's value that is far enough; None: the map's own, else 90 % of the largest effect
        """
        if towards not in ("more", "less"):
            raise ValueError(f"best: got towards={towards!r}, expected 'more' or 'less'.")
        limit = self.kl_limit if max_kl is None else max_kl
        table, side = self.table(), 1 if towards == "more" else -1
        outside = table["value"] > table["control_high"] if side == 1 else table["value"] < table["control_low"]
        fit = table.loc[table["run"] & (table["kl"] <= limit) & outside & (side * table["effect"] > 0)]
        if fit.empty:
            return None
        if reach is None and towards == "more":
            reach = self.reach
        wanted = ENOUGH * (side * fit["effect"]).max() if reach is None else side * (reach - self.base)
        enough = fit.loc[side * fit["effect"] >= wanted]
        if enough.empty:
            return None
        row = enough.sort_values(["kl", "layer"], kind="stable").iloc[0].to_dict()
        far = f"{ENOUGH:.0%} of the largest effect" if reach is None else f"the target at {reach:g}"
        rule = f"least KL among cells with {far}, KL <= {limit:g}, beyond random directions"
        names = ("layer", "kind", "strength", "added_norm", "value", "kl", "ppl_ratio")
        return Choice(**{name: row[name] for name in names}, base=self.base, rule=rule)

    def views(self) -> dict[str, list[Any]]:
        return {"view": list(self._drawings()), "layer": list(self.layers)}

    def plot(self, view: str = "map", layer: int | None = None) -> Figure:
        """map: effect beside damage (KL on other text), layer by strength · tradeoff: effect against KL, beside random
        directions · strength: the target of one layer against strength, with the band · fluency: of written text."""
        if view not in self._drawings():
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self._drawings())}.")
        chosen = self.best()
        at = (chosen.layer if chosen else self.layers[0]) if layer is None else layer
        if at not in self.layers:
            raise ValueError(f"plot: got layer {at}, expected one of {', '.join(map(str, self.layers))}.")
        return self._drawings()[view](at)

    def _drawings(self) -> dict[str, Callable[[int], Figure]]:
        return {
            "map": lambda _: self._plot_map(),
            "tradeoff": lambda _: self._plot_tradeoff(),
            "strength": self._plot_strength,
            "fluency": lambda _: self._plot_fluency(),
        }

    def _plot_map(self) -> Figure:
        table = self.table().sort_values(["layer", "strength"], ascending=[False, True])
        table = table.assign(strength=[f"{value:g}" for value in table["strength"]])
        names: dict[str, Any] = {"x_title": "strength (mean residual norms)", "y_title": f"layer ({self.kind})"}
        effect = plots.heatmap(table, "strength", "layer", "effect", value_title=self.unit, midpoint=0.0, **names)
        damage = plots.heatmap(table, "strength", "layer", "kl", value_title="nats", **names)
        parts = {f"change of the {self.target}": effect, "KL on other text, per token": damage}
        return plots.beside(parts, title=self._title() + self._skipped())

    def _plot_tradeoff(self) -> Figure:
        table = self.table().query("run")
        own = table.assign(curve="direction", x=table["kl"], y=table["effect"])
        random = table.assign(curve="random directions", x=table["control_kl"], y=table["control"] - self.base)
        random = random.assign(low=random["control_low"] - self.base, high=random["control_high"] - self.base)
        own = own.assign(low=own["low"] - self.base, high=own["high"] - self.base)
        drawn = pd.concat([own, random]).query("x > 0").dropna(subset=["y"])
        names: dict[str, Any] = {
            "x_title": "KL on other text (nats per token)", "y_title": f"change of {self.target} ({self.unit})",
            "colors": {"random directions": plots.GREY}, "log_x": True,
        }  # fmt: skip
        outside = len(table.query("beyond_control"))
        title = (
            f"{outside} of {len(table)} pushes along {self.direction!r} move the {self.target} further than random "
            f"directions of the same norm would (whiskers: 95 % of them)"
        )
        return plots.scatter(drawn, "x", "y", "curve", "low", "high", title=title, **names)

    def _plot_strength(self, layer: int) -> Figure:
        table = self.table().query("run and layer == @layer")
        own = table.assign(curve="direction")
        random = table.assign(curve="random directions", value=table["control"])
        random = random.assign(low=table["control_low"], high=table["control_high"])
        drawn = pd.concat([own, random]).replace([np.inf, -np.inf], np.nan).dropna(subset=["value", "low", "high"])
        outside = table.query("beyond_control")["strength"]
        smallest = min(outside, key=abs) if len(outside) else None
        found = f"from strength {smallest:g} on" if smallest is not None else "at no strength"
        title = (
            f"At {self.kind}@{layer} the {self.target} leaves the band of random directions {found}; "
            f"without a push it is {self.base:.1f}"
        )
        names: dict[str, Any] = {
            "x_title": "strength (mean residual norms of the layer)", "y_title": f"{self.target} ({self.unit})",
            "colors": {"random directions": plots.GREY},
        }  # fmt: skip
        return plots.lines(drawn, "strength", "value", "curve", "low", "high", title=title, **names)

    def _plot_fluency(self) -> Figure:
        table = self.table().query("run")
        drawn = table.assign(curve=[f"layer {layer}" for layer in table["layer"]])
        base = float(np.mean(self.base_fluency)) if self.base_fluency.size else float("nan")
        chosen = self.best()
        if chosen is None or np.isnan(base):
            title = f"What the pushed model writes, by its own likelihood; unpushed {base:.2f} nats per token"
        else:
            i, j = self.layers.index(chosen.layer), self.strengths.index(chosen.strength)
            here = float(self.fluency[i, j].mean())
            title = (
                f"What the model writes when pushed at {chosen.kind}@{chosen.layer} by {chosen.strength:g} costs the "
                f"unpushed model {here:.2f} nats per token; its own text {base:.2f}"
            )
        names: dict[str, Any] = {
            "x_title": "strength (mean residual norms of the layer)", "y_title": "nats per written token",
        }  # fmt: skip
        return plots.lines(drawn, "strength", "fluency", "curve", title=title, **names)

    def _title(self) -> str:
        chosen = self.best() or (self.best(towards="less") if self.reach is None else None)
        if chosen is None:
            far = "moves it further than random directions do"
            if self.reach is not None:
                far = f"brings it to {self.reach:g} and further than random directions do"
            return (
                f"The {self.target} is {self.base:.1f} {self.unit}, and no push along {self.direction!r} within "
                f"KL {self.kl_limit:g} {far}"
            )
        return (
            f"Pushed along {self.direction!r} at {chosen.kind}@{chosen.layer} by {chosen.strength:g} times the "
            f"residual norm, the {self.target} goes from {self.base:.1f} to {chosen.value:.1f} {self.unit} at a KL of "
            f"{chosen.kl:.2f} nats"
        )

    def _skipped(self) -> str:
        n = len(self.table().query("not run"))
        return f"; {n} cells not run, beyond a KL of {self.kl_limit:g}" if n else ""


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean along the last axis; NaN, without a warning, where there is nothing."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)
