"""What compressions did to mechanisms: damages with their noise, what was kept, and what perplexity didn't tell.

damage = mean over seeds of 1 - kept, with Student's 95 % interval; it is beyond the noise where its difference from
what the same seed loses on other data is above zero, at the lower end of its interval. Source: Student, 1908.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench.result import Result
from workbench.stats import mean_interval
from workbench.studies import figures
from workbench.studies.costs import ACTIVATIONS, COST_OF

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AGAIN, UNTRAINED = "other data", "untrained twin"
YARDSTICK = "perplexity"
ALIKE = 1e-5  # runs on other numbers of threads add up in another order: 1e-7 apart in float32
COLUMNS = (
    "measure", "kind", "control", "family", "asked", "cache", "weights", "kl", "seed", "kept", "damage", "toggle",
)  # fmt: skip
REFUSED = ("what", "where", "seed", "why")
SAME, LESS = 0.9, 0.8  # of perplexity kept: the yardstick sees little, and something


@dataclass(frozen=True, eq=False, kw_only=True)
class CrossResult(Result):
    """Every mechanism under every compression, over seeds.

    facts     one row per measure, kind, share and seed; also "other data" (noise line) and "untrained twin" (floor)
    refused   what could not be measured or made: columns what, where, seed, why
    scales    measure -> what 1 and 0 stand for
    """

    facts: pd.DataFrame
    refused: pd.DataFrame
    scales: Mapping[str, str]
    model: str
    fingerprint: str

    columns: ClassVar[tuple[str, ...]] = COLUMNS

    def table(self) -> pd.DataFrame:
        """One row per measure, kind, share asked for and seed: costs, what was kept, the damage, and the toggle."""
        return self.facts.copy()

    @property
    def measures(self) -> list[str]:
        """What could be measured, in the order of the mechanisms."""
        known = set(self.facts["measure"])
        return [name for name in self.scales if name in known]

    @property
    def seeds(self) -> list[int]:
        """The seeds that were measured."""
        return sorted(set(self.facts["seed"].tolist()))

    def summary(self) -> pd.DataFrame:
        """One row per measure, kind and share: the cost reached, mean damage over seeds, its interval, the noise.

        reached   in the unit that the kind's family is matched by      perplexity   kept at the same place
        noise     mean damage of the same measure on other data
        beyond    whether the damage exceeds it, seed by seed, at the lower end of the interval; False with one seed
        """
        facts: Any = self.facts
        rows = []
        for (measure, kind, asked), some in facts.groupby(["measure", "kind", "asked"], sort=False, dropna=False):
            first, noise = some.iloc[0], self._by_seed(measure, AGAIN)
            damage = some.set_index("seed")["damage"]
            mean, low, high = mean_interval(damage.to_numpy())
            over = (damage - noise.reindex(damage.index)).dropna().to_numpy()
            place = {"measure": measure, "kind": kind, "control": bool(first["control"]), "family": first["family"]}
            reached = float(some[COST_OF[first["family"]]].mean()) if first["family"] else np.nan
            found = {"damage": mean, "low": low, "high": high, "noise": float(noise.mean()) if len(noise) else np.nan}
            beyond = bool(over.size > 1 and mean_interval(over)[1] > 0)
            rows.append(place | {"asked": asked, "reached": reached} | found | {"beyond": beyond, "n_seeds": len(some)})
        table: Any = pd.DataFrame(rows)
        yard = table[table["measure"] == YARDSTICK].set_index(["kind", "asked"])["damage"].to_dict()
        places = zip(table["kind"], table["asked"], strict=True)
        return table.assign(kept=1 - table["damage"], perplexity=[1 - yard.get(place, np.nan) for place in places])

    def costs(self) -> pd.DataFrame:
        """One row per kind and share asked for: what was reached, mean over seeds, and the first seed's toggle."""
        facts: Any = self.facts
        groups = facts[facts["family"] != ""].groupby(["kind", "family", "asked"], sort=False)
        how = {"cache": "mean", "weights": "mean", "kl": "mean", "toggle": "first", "seed": "nunique"}
        table = groups.agg(how).reset_index().rename(columns={"seed": "n_seeds"})
        table.insert(3, "reached", [row[COST_OF[row["family"]]] for row in table.to_dict("records")])
        return table

    def kept(self, measure: str, kind: str, asked: float | None = None) -> np.ndarray:
        """(seed,) how much of a measure is left under a kind, at the first share or at the one asked for."""
        facts: Any = self.facts
        rows = facts[(facts["measure"] == measure) & (facts["kind"] == kind)]
        rows = rows if asked is None else rows[rows["asked"] == asked]
        if not len(rows):
            known = f"{', '.join(self.measures)} under {', '.join(dict.fromkeys(facts['kind']))}"
            raise ValueError(f"kept: nothing is known of {measure!r} under {kind!r}, expected one of {known}.")
        first = rows.iloc[0]["asked"]
        rows = rows if pd.isna(first) else rows[rows["asked"] == first]
        return rows.sort_values("seed")["kept"].to_numpy(dtype=np.float64)

    def unmeasured(self) -> list[str]:
        """What this model can't show or undergo, a sentence each, with the reason of the first seed."""
        first: Any = self.refused.drop_duplicates(["what", "where"])
        return [f"{row['what']}, {row['where']}: not measurable here. {row['why']}" for row in first.to_dict("records")]

    def surprises(self) -> list[str]:
        """What perplexity alone would not have said, as sentences; none from one seed, which has no intervals."""
        table: Any = self.summary()
        table = table[table["n_seeds"] > 1]
        told = table[(table["family"] != "") & ~table["control"] & (table["measure"] != YARDSTICK)]
        found = []
        blind = told[(told["perplexity"] >= SAME) & told["beyond"]]
        if len(blind):
            row = blind.loc[(blind["damage"] - blind["noise"]).idxmax()]
            found.append(f"{_where(row)} keeps {row['perplexity']:.0%} of perplexity, but only {_of(row)}")
        spared = told[(told["perplexity"] < LESS) & (told["kept"] >= SAME) & ~told["beyond"]]
        if len(spared):
            row = spared.loc[spared["perplexity"].idxmin()]
            found.append(f"{_where(row)} keeps only {row['perplexity']:.0%} of perplexity, and yet {_of(row)}")
        return [*found, *self._lucky(table)]

    # Figures

    def plot(self, view: str = "matrix", measure: str = "", family: str = "", **options: Any) -> Figure:
        """matrix: damage of every mechanism under every kind · frontier: what is kept of a measure against cost, in one
        family of kinds · yardstick: what is kept of a measure against what is kept of perplexity.

        measure, family   "": the first but perplexity, and the first family
        """
        asked = {"view": view, "measure": measure, "family": family}
        for name, known in self.views().items():
            if asked[name] and asked[name] not in known:
                raise ValueError(f"plot: got {name} {asked[name]!r}, expected one of {', '.join(known)}.")
        if not len(self.facts):
            raise ValueError(f"plot: nothing was measured. {' '.join(self.unmeasured())}")
        views = self.views()
        if view != "matrix" and not views["family"]:
            raise ValueError(f"plot: no compression was measured, so no {view}. {' '.join(self.unmeasured())}")
        if view == "yardstick" and YARDSTICK not in self.measures:
            raise ValueError(f"plot: {YARDSTICK}, the yardstick, was not measured. Add Fluency to the mechanisms.")
        table, measure = self.summary(), measure or views["measure"][0]
        family = family or next(iter(views["family"]), "")
        if view == "matrix":
            table = table.drop_duplicates(["measure", "kind"])  # the first share of each kind
            return figures.matrix(table, self._matrix_title(table), self.measures)
        if view == "yardstick":
            return figures.yardstick(table, measure, self.model)
        return figures.frontier(table, measure, family, self.model)

    def views(self) -> dict[str, list[Any]]:
        rest = [name for name in self.measures if name != YARDSTICK] or self.measures
        families = [name for name in dict.fromkeys(self.facts["family"]) if name]
        return {"view": ["matrix", "frontier", "yardstick"], "measure": rest, "family": families}

    def _matrix_title(self, table: Any) -> str:
        n = len(self.seeds)
        how = f"mean of {n} seeds ± 95 %, bold where more than other data would" if n > 1 else "one seed, no intervals"
        real = table[(table["family"] != "") & ~table["control"]]
        excess = (real["damage"] - real["noise"]).groupby(real["measure"], sort=False).mean()
        rest = excess.drop(YARDSTICK, errors="ignore").dropna()
        if not len(rest):
            return f"{self.model}: 0 is as before, 1 is gone ({how})"
        title = f"{self.model}: compression hurts {rest.idxmax()} most, by {rest.max():.2f} more than other data would"
        title += f"; perplexity says {excess[YARDSTICK]:.2f}" if YARDSTICK in excess else ""
        return f"{title}.<br>0: as before, 1: gone; {how}"

    # Below: how

    def _by_seed(self, measure: Any, kind: str) -> Any:
        """Damages of a measure by seed, at the first share."""
        facts: Any = self.facts
        rows = facts[(facts["measure"] == measure) & (facts["kind"] == kind)]
        return rows.drop_duplicates("seed").set_index("seed")["damage"]

    def _lucky(self, table: Any) -> Iterator[str]:
        """Where chance spares more than the method that it is the control of, at the same cost, seed by seed.

        Pushes aside: one along a direction is meant to hit what a random one misses.
        """
        table = table[table["family"] != ACTIVATIONS]
        for chance in dict.fromkeys(table.loc[table["control"], "kind"]):
            what = chance.removeprefix("random ")
            rivals = table.loc[(table["family"] != "") & ~table["control"], "kind"]
            for kind in [name for name in dict.fromkeys(rivals) if what in name]:
                better = []
                for measure in self.measures:
                    gap = (self._by_seed(measure, kind) - self._by_seed(measure, chance)).dropna().to_numpy()
                    if gap.size > 1 and mean_interval(gap)[1] > 0:
                        better.append(f"{measure} (by {gap.mean():.2f})")
                if better:
                    yield f"{chance} spare more than {kind} at the same cost: {', '.join(better)}"


def gathered(results: Iterable[Any]) -> CrossResult:
    """One result of many runs of a sweep, such as one per seed and kind; what several runs measured alike counts once.

    Raises ValueError where runs are of different models, or disagree about the same measure, kind, share and seed.
    """
    every: list[CrossResult] = list(results)
    if not every:
        raise ValueError("gathered: got no results, expected those of at least one run.")
    if len({one.fingerprint for one in every}) > 1:
        told = ", ".join(dict.fromkeys(one.model for one in every))
        raise ValueError(f"gathered: got results of {told}, expected one model. Gather each by itself.")
    facts: Any = pd.concat([one.facts for one in every], ignore_index=True)
    same = facts.groupby(["measure", "kind", "asked", "seed"], sort=False, dropna=False)
    numbers = same[["cache", "weights", "kl", "kept", "damage"]]
    told = numbers.count()
    apart = ((numbers.max() - numbers.min()) > ALIKE) | ((told > 0) & told.lt(same.size(), axis=0))
    apart = apart.any(axis=1) | (same["toggle"].nunique() > 1)
    if apart.any():
        measure, kind, _, seed = apart.idxmax()
        raise ValueError(
            f"gathered: {measure} under {kind}, seed {seed}, has several values: these runs have different settings or "
            "versions. Gather those of one."
        )
    facts = facts[~facts.duplicated(["measure", "kind", "asked", "seed"])]
    return CrossResult(
        facts=facts.sort_values("seed", kind="stable").reset_index(drop=True),
        refused=pd.concat([one.refused for one in every], ignore_index=True).drop_duplicates().reset_index(drop=True),
        scales={name: words for one in every for name, words in one.scales.items()},
        model=every[0].model,
        fingerprint=every[0].fingerprint,
    )


def _where(row: Any) -> str:
    return f"{row['kind']} at {row['asked']:g}"


def _of(row: Any) -> str:
    return f"{row['kept']:.0%} of {row['measure']}"
