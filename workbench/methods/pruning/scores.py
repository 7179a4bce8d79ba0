"""How much each head and neuron matters, by one or more criteria: kept once, so that any budget is a sort away.

score of a key/value head = sum over the query heads that read it; rank 0 is the unit that leaves first.
Sources of the criteria: `criteria.py` and `taylor.py`; of the budgets: `budgets.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from workbench import plots
from workbench.methods.pruning.budgets import Budget, Of, Ranking
from workbench.methods.pruning.criteria import CRITERIA, READING, activity, has_neurons, n_neurons, scores_of
from workbench.methods.pruning.taylor import Taylor, taylor_scores
from workbench.pruned.plan import Plan, Shape
from workbench.pruned.report import Sizes, kept_map, plan_table
from workbench.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.subject import Subject

MOST_CURVES = 6  # layers drawn together
RATIOS = (0.3, 0.1, 0.2, 0.4, 0.5, 0.6)  # that can be looked at


@dataclass(frozen=True, eq=False, kw_only=True)
class PruningScoresResult(Result):
    """Scores of all units by each criterion, higher is worth more, and what every unit weighs.

    heads     (criterion, layer, head)      neurons   (criterion, layer, neuron); no neuron in a mixture of experts
    costs     (layer, 4) parameters of a query head, of a key/value head alone, of a neuron, and of the rest of a block
    outside   parameters outside of blocks  itemsize  bytes of one
    shape     layers, d_model, heads, key/value heads, d_head, d_mlp
    refusals  why heads and why neurons can't be cut out, or ""
    """

    heads: np.ndarray
    neurons: np.ndarray
    costs: np.ndarray
    outside: int
    itemsize: int
    shape: tuple[int | None, ...]
    refusals: tuple[str, str]
    criteria: tuple[str, ...]
    n_texts: int = 0
    n_tokens: int = 0
    notes: tuple[str, ...] = ()
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "criterion", "layer", "family", "unit", "score", "rank", "parameters", "seed",
    )  # fmt: skip

    @functools.cached_property
    def sizes(self) -> Sizes:
        """What every unit weighs."""
        shape: Any = self.shape
        head, group, neuron, rest = (tuple(map(int, column)) for column in self.costs.T)
        return Sizes(Shape(*shape), head, group, neuron, rest, self.outside, self.itemsize, *self.refusals)

    def ranking(self, criterion: str | None = None) -> Ranking:
        """The units in order of one criterion, the first by default; made once."""
        name = self._known(criterion)
        if name not in self._rankings:
            row = self.criteria.index(name)
            self._rankings[name] = Ranking(self.heads[row], self.neurons[row], self.sizes)
        return self._rankings[name]

    def plan(
        self, ratio: float | None = None, *, keep: float | None = None, criterion: str | None = None, **budget: Any
    ) -> Plan:
        """What to keep when a share `ratio` of the parameters must leave, or `keep` must stay; nothing is read again.

        budget   of, allocation, unit, mode, round_to, keep_first, keep_last: see `Budget`
        Raises ValueError with the reason for what can't be met.
        """
        if ratio is not None and keep is not None:
            raise ValueError(f"plan: got ratio={ratio} and keep={keep}, expected one of the two.")
        ratio = 1 - keep if keep is not None else ratio
        origin = {"criterion": self._known(criterion), "texts": self.n_texts, "tokens": self.n_tokens}
        if self.provenance is not None:
            origin |= {name: self.provenance.subject[name] for name in ("name", "fingerprint")}
        return self.ranking(criterion).plan(ratio, Budget(**budget), origin)

    def plan_table(self, plan: Plan, criterion: str | None = None) -> pd.DataFrame:
        """One row per layer: what the plan leaves of it, in bytes too, and the scores on either side of the cut."""
        ranking = self.ranking(criterion)
        return plan_table(plan, self.sizes, ranking.heads, ranking.neurons)

    def table(self) -> pd.DataFrame:
        """One row per criterion and unit, and per key/value head where heads share them; rank 0 leaves first."""
        frames = [
            self._rows(name, family, scores, cost)
            for name in self.criteria
            for family, scores, cost in self._families(name)
        ]
        return pd.concat(frames, ignore_index=True).loc[:, list(self.columns)]

    def layers(self, ratio: float = 0.3, criterion: str | None = None) -> pd.DataFrame:
        """Who leaves first: one row per layer, the shares of heads and of neurons that a global cut would take."""
        plan = self._shown(ratio, criterion, "global")
        families = [name for name in ("heads", "neurons") if plan.total(name)]
        rows = [
            (layer, *(1 - plan.kept(layer, name) / plan.total(name) for name in families))
            for layer in range(plan.shape.n_layers)
        ]
        return pd.DataFrame(rows, columns=["layer", *(f"{name}_gone" for name in families)])

    def correlation(self) -> pd.DataFrame:
        """One row per pair of criteria and family: Spearman's rank correlation inside layers, averaged over them."""
        rows = [
            (one, other, family, np.mean([_spearman(a, b) for a, b in zip(scores[one], scores[other], strict=True)]))
            for family, scores in (("heads", self._by_name("heads")), ("neurons", self._by_name("neurons")))
            if next(iter(scores.values())).shape[1] > 1
            for one, other in combinations(self.criteria, 2)
        ]
        return pd.DataFrame(rows, columns=["criterion", "other", "family", "correlation"])

    # Figures

    def plot(self, view: str = "kept", *, criterion: str | None = None, ratio: float = 0.3, **options: Any) -> Figure:
        """kept: who would leave under a global cut of `ratio` · curves: sorted scores with the cut ·
        correlation: between criteria, where there are several."""
        drawings: dict[str, Callable[[], Figure]] = {
            "kept": lambda: self._plot_kept(criterion, ratio),
            "curves": lambda: self._plot_curves(criterion, ratio),
            "correlation": self._plot_correlation,
        }
        if view not in self.views()["view"]:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")
        return drawings[view]()

    def views(self) -> dict[str, list[Any]]:
        several = ["correlation"] if len(self.criteria) > 1 else []
        return {"view": ["kept", "curves", *several], "criterion": list(self.criteria), "ratio": list(RATIOS)}

    def _plot_kept(self, criterion: str | None, ratio: float) -> Figure:
        return kept_map(self._shown(ratio, criterion, "global"), title=self._finding(ratio, criterion))

    def _finding(self, ratio: float, criterion: str | None) -> str:
        name, of = self._known(criterion), self._of()
        what = {"blocks": "the parameters in heads and neurons", "heads": "the parameters in heads"}.get(
            of, "the parameters in neurons"
        )
        title = f"To free {min(ratio, self._most(criterion)):.0%} of {what}, {name} takes"
        gone: Any = self.layers(ratio, criterion).set_index("layer")
        said = []
        for column in gone.columns:
            family, most = column.removesuffix("_gone"), gone[column]
            if most.max() == 0:
                said.append(f"no {family}")
                continue
            said.append(f"{most.mean():.0%} of {family}, most from layer {most.idxmax()} ({most.max():.0%})")
        notes = f"; {'; '.join(self.notes)}" if self.notes else ""
        return f"{title} {' and '.join(said)}{notes}"

    def _plot_curves(self, criterion: str | None, ratio: float) -> Figure:
        """Scores over their layer's mean, from the lowest up; a line where a cut of all layers alike would fall."""
        name, family = self._known(criterion), "neurons" if self.neurons.shape[2] else "heads"
        scores = np.sort(self._by_name(family)[name], axis=1)  # (layer, unit)
        n_layers, n_units = scores.shape
        height = scores / np.maximum(scores.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        some = sorted({round(float(x)) for x in np.linspace(0, n_layers - 1, min(MOST_CURVES, n_layers))})
        share = (np.arange(n_units) + 0.5) / n_units
        drawn = pd.concat(pd.DataFrame({"share": share, "score": height[n], "curve": f"layer {n}"}) for n in some)
        lowest = height[:, share <= ratio].sum() / max(height.sum(), np.finfo(np.float64).tiny)
        title = f"The lowest {ratio:.0%} of the {family} of each layer hold {lowest:.1%} of the layer's {name} score"
        titles: dict[str, Any] = {"title": title, "y_title": "score / mean score of the layer"}
        x_title = f"share of the layer's {family}, from the lowest score up"
        figure = plots.lines(drawn, "share", "score", "curve", x_title=x_title, markers=False, **titles)
        figure.add_vline(ratio, line={"color": plots.GREY, "width": 1, "dash": "dot"})
        return figure.update_xaxes(tickformat=".0%")

    def _plot_correlation(self) -> Figure:
        table: Any = self.correlation()
        best = table.loc[table["correlation"].idxmax()]
        title = f"Of {len(self.criteria)} criteria {best['criterion']} and {best['other']} agree most on"
        title += f" {best['family']}: a rank correlation of {best['correlation']:.2f} inside layers"
        swapped = table.rename(columns={"criterion": "other", "other": "criterion"})
        maps = {}
        for family, rows in pd.concat([table, swapped]).groupby("family"):
            grid = rows.set_index(["criterion", "other"])["correlation"]
            full = [(one, two, 1.0 if one == two else grid[one, two]) for one in self.criteria for two in self.criteria]
            drawn = pd.DataFrame(full, columns=["criterion", "other", "correlation"])
            titles: dict[str, Any] = {"x_title": "", "y_title": "", "value_title": "rank correlation"}
            options: dict[str, Any] = {"midpoint": 0.0, "span": (-1.0, 1.0)}
            maps[str(family)] = plots.heatmap(drawn, "other", "criterion", "correlation", **options, **titles)
        figure = plots.beside(maps, title=title)
        figure.update_traces(showscale=False, selector=lambda trace: trace is not figure.data[-1])
        return figure.update_layout(margin={"l": 130})

    # Below: how

    @functools.cached_property
    def _rankings(self) -> dict[str, Ranking]:
        return {}

    def _known(self, criterion: str | None) -> str:
        if criterion is not None and criterion not in self.criteria:
            raise ValueError(f"scores: got criterion {criterion!r}, expected one of {', '.join(self.criteria)}.")
        return self.criteria[0] if criterion is None else criterion

    def _of(self) -> Of:
        """Whose units can pay in this model."""
        no_heads, no_neurons = self.refusals
        return "neurons" if no_heads else "heads" if no_neurons else "blocks"

    def _shown(self, ratio: float, criterion: str | None, allocation: str) -> Plan:
        """A plan to look at; where floors forbid the ratio, as far as they let it go."""
        most = self._most(criterion, allocation)
        return self.plan(min(ratio, most), criterion=criterion, of=self._of(), allocation=allocation)

    def _most(self, criterion: str | None, allocation: str = "global") -> float:
        """The largest ratio that floors allow."""
        return self.ranking(criterion).most(Budget(of=self._of(), allocation=allocation))

    def _by_name(self, family: str) -> dict[str, np.ndarray]:
        return dict(zip(self.criteria, getattr(self, family), strict=True))

    def _families(self, criterion: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(family, scores (layer, unit), parameters (layer,)) of heads, shared key/value heads, and neurons."""
        ranking, size = self.ranking(criterion), self.sizes.shape.group
        found = [("head", ranking.heads, self.costs[:, 0])]
        if size > 1:
            found.append(("kv_head", ranking.groups(), size * self.costs[:, 0] + self.costs[:, 1]))
        return [*found, ("neuron", ranking.neurons, self.costs[:, 2])]

    def _rows(self, criterion: str, family: str, scores: np.ndarray, cost: np.ndarray) -> pd.DataFrame:
        n_layers, n_units = scores.shape
        ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
        return pd.DataFrame(
            {
                "criterion": criterion,
                "layer": np.repeat(np.arange(n_layers), n_units),
                "family": family,
                "unit": np.tile(np.arange(n_units), n_layers),
                "score": scores.ravel(),
                "rank": ranks.ravel(),
                "parameters": np.repeat(cost, n_units),
                "seed": self.seed,
            }
        )


def scored(
    subject: Subject,
    texts: Any,
    criteria: Sequence[str] = ("amp_out",),
    *,
    norm: int = 2,
    taylor: Taylor | None = None,
    batch: int = 4096,
    seed: int = 0,
) -> PruningScoresResult:
    """Scores of all units by all criteria, as the subject is now: one pass over the texts, one more for taylor.

    texts   None or empty where every criterion looks at weights alone
    """
    _check(subject, texts, criteria, norm)
    reads = bool({*READING, "taylor"} & set(criteria))
    ids = subject.tokenize(texts).ids if reads else []
    seen = activity(subject, ids, batch=batch) if set(READING) & set(criteria) else None
    found, notes = [], []
    for name in criteria:
        if name == "taylor":
            scores, discarded = taylor_scores(subject, ids, taylor or Taylor(), seed=seed)
            found.append(scores)
            notes += [f"taylor discarded {discarded} steps that gave NaN"] if discarded else []
            continue
        found.append(scores_of(name, subject, seen, norm=norm, seed=seed))
    sizes = Sizes.of(subject)
    if not has_neurons(subject):
        notes.append("this model's experts have no neurons that can be told apart, so only heads are scored")
    if sizes.no_heads and "taylor" in criteria:
        notes.append("taylor scores heads by their outputs alone, as rows of queries can't be told apart")
    return PruningScoresResult(
        heads=np.stack([heads for heads, _ in found]),
        neurons=np.stack([neurons[:, : n_neurons(subject)] for _, neurons in found]),
        costs=np.array([sizes.head, sizes.group, sizes.neuron, sizes.rest]).T.copy(),
        outside=sizes.outside,
        itemsize=sizes.itemsize,
        shape=tuple(vars(sizes.shape).values()),
        refusals=(sizes.no_heads, sizes.no_neurons),
        criteria=tuple(criteria),
        n_texts=len(ids),
        n_tokens=sum(map(len, ids)),
        notes=tuple(notes),
        seed=seed,
    )


def _check(subject: Subject, texts: Any, criteria: Sequence[str], norm: int) -> None:
    unknown = [name for name in criteria if name not in CRITERIA]
    if unknown or not criteria or len(set(criteria)) < len(criteria):
        raise ValueError(f"scores: got criteria {tuple(criteria)}, expected some of {', '.join(CRITERIA)}, each once.")
    if norm not in (1, 2):
        raise ValueError(f"scores: got norm={norm}, expected 1 or 2.")
    if subject.remote:
        raise ValueError(f"scores: the weights of {subject.name} are on another machine, expected a local model.")
    reads = [name for name in criteria if name in (*READING, "taylor")]
    if reads and (texts is None or len(texts) == 0):
        raise ValueError(f"scores: got no texts, but {reads[0]} reads some. Give texts, or criterion='magnitude'.")


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two scores of the same units; 0 where all of one are equal, which orders nothing."""
    x, y = (rankdata(one) - (len(one) + 1) / 2 for one in (a, b))
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float(x @ y) / scale if scale > 0 else 0.0
