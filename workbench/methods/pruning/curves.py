"""What a model loses against how much of it is kept, for several criteria, with random units as the control.

loss added = nll(pruned) - nll(untouched) and KL(untouched || pruned), nats per token on held-out texts.
Intervals: texts are drawn with all their tokens, and draws of the control with all their texts (Efron, 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import plots
from workbench.corpora.item import Item
from workbench.methods.relations.facts import Prompt, ask
from workbench.result import Result
from workbench.stats import resampling_weights

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.subject import Subject
    from workbench.toggle import Toggle

CONTROL = "random"
N_BOOTSTRAP = 1000
BASE_BYTES = 1 << 28  # of predictions of the untouched model that are held at a time
LOSSES = {"nll_added": "loss added (nats per token)", "kl": "KL from the untouched model (nats per token)"}


@dataclass(frozen=True)
class Trial:
    """Texts to score units on, others to judge plans by, and questions, a list of corpora items for each task."""

    calibration: Sequence[Any]
    held_out: Sequence[Any]
    questions: Mapping[str, Sequence[Item]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Any) -> Trial:
        """A trial as it is; of a list of texts every second one judges."""
        if isinstance(data, Trial):
            trial = data
        elif isinstance(data, str) or not isinstance(data, Sequence) or len(data) < 2:
            raise ValueError(
                f"Trial: got {data!r:.40}, expected a Trial, or two texts or more: every second one judges."
            )
        else:
            trial = cls(data[::2], data[1::2])
        if not len(trial.held_out) or not all(len(items) for items in trial.questions.values()):
            raise ValueError("Trial: expected at least one held-out text, and one question of each task.")
        return trial


@dataclass(frozen=True, eq=False)
class Losses:
    """What the subject lost under each toggle: (toggle, text) nll and KL in nats per token, (toggle, question) right.

    base_nll (text,), tokens (text,) and base_right (question,) are those of the subject as it is.
    """

    nll: np.ndarray
    kl: np.ndarray
    right: np.ndarray
    base_nll: np.ndarray
    base_right: np.ndarray
    tokens: np.ndarray

    def table(self, names: Sequence[str], trial: Trial) -> pd.DataFrame:
        """One row per toggle, the subject as it is first: loss added and KL, and the share right of each task."""
        sides = {"untouched": (self.base_nll, 0 * self.base_nll, self.base_right)}
        sides |= dict(zip(names, zip(self.nll, self.kl, self.right, strict=True), strict=True))
        ends = np.cumsum([len(items) for items in trial.questions.values()])
        rows = [
            (
                np.average(nll - self.base_nll, weights=self.tokens),
                np.average(kl, weights=self.tokens),
                *(part.mean() for part in np.split(right, ends)[:-1]),
            )
            for nll, kl, right in sides.values()
        ]
        return pd.DataFrame(rows, columns=[*LOSSES, *trial.questions], index=pd.Index(sides, name="toggle"))


def losses(subject: Subject, toggles: Sequence[Toggle], trial: Trial) -> Losses:
    """Read the held-out texts and ask the questions under each toggle, and without, on top of what acts already."""
    ids = [list(text) for text in subject.tokenize(trial.held_out).ids]
    short = [row for row, text in enumerate(ids) if len(text) < 2]
    if short:
        raise ValueError(f"losses: held-out text {short[0]} has {len(ids[short[0]])} token, expected at least two.")
    nll, kl = (np.zeros((len(toggles), len(ids))) for _ in range(2))
    base_nll, tokens = np.zeros(len(ids)), np.array([len(text) - 1.0 for text in ids])
    for rows in chunks(ids, subject.anatomy.vocab):
        chunk = [ids[row] for row in rows]
        base = {rows[i]: logprobs.cpu() for i, _, logprobs in subject.predictions(chunk)}
        for row in rows:
            base_nll[row] = compare(base[row], base[row], ids[row])[0]
        for number, toggle in enumerate(toggles):
            with subject.under(toggle):
                for i, _, logprobs in subject.predictions(chunk):
                    nll[number, rows[i]], kl[number, rows[i]] = compare(base[rows[i]], logprobs.cpu(), ids[rows[i]])
    prompts = [prompt for items in trial.questions.values() for prompt in map(as_prompt, items)]
    right, base_right = np.zeros((len(toggles), len(prompts)), dtype=bool), np.zeros(len(prompts), dtype=bool)
    if prompts:
        base_right = ask(subject, prompts).exact
        for number, toggle in enumerate(toggles):
            with subject.under(toggle):
                right[number] = ask(subject, prompts).exact
    return Losses(nll, kl, right, base_nll, base_right, tokens)


def compare(base: Tensor, logprobs: Tensor, ids: Sequence[int]) -> tuple[float, float]:
    """(nll, KL(base || pruned)) in nats per token of one text; (seq, vocab) log-probabilities, row t is for t + 1."""
    before, after = base[:-1].double(), logprobs[:-1].double()
    nll = -after.gather(1, torch.tensor(ids[1:])[:, None]).mean()
    kl = torch.where(before.exp() > 0, before.exp() * (before - after), 0.0).sum(-1).mean()  # 0 log 0 = 0
    return float(nll), float(kl)


@dataclass(frozen=True, eq=False, kw_only=True)
class PruningCurveResult(Result):
    """One point per criterion, draw and share kept; the control has several draws.

    nll, kl, right        (point, text), (point, text) and (point, question), as in `Losses`
    base_nll, base_right, tokens   of the untouched subject          task   (question,) index into `tasks`
    draws, keeps, kept    (point,) which draw, the share asked for, and the share of parameters really kept
    parameters            (point,) of the whole model that are left   total   of the untouched model
    """

    nll: np.ndarray
    kl: np.ndarray
    right: np.ndarray
    base_nll: np.ndarray
    base_right: np.ndarray
    tokens: np.ndarray
    task: np.ndarray
    draws: np.ndarray
    keeps: np.ndarray
    kept: np.ndarray
    parameters: np.ndarray
    total: int
    criteria: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    of: str = "blocks"
    notes: tuple[str, ...] = ()
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "criterion", "draw", "keep", "kept", "parameters", "measure", "value", "low", "high", "base", "n", "seed",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per point and measure, with its 95 % interval over texts or questions, and the untouched value."""
        rows = []
        for measure in self.measures:
            values, weights, base = self._values(measure)
            for p, name in enumerate(self.criteria):
                spread = self._pooled(values[[p]], weights, measure)
                point = (name, int(self.draws[p]), self.keeps[p], self.kept[p], int(self.parameters[p]))
                rows.append((*point, measure, *spread, base, len(weights), self.seed))
        return pd.DataFrame(rows, columns=list(self.columns))

    @property
    def measures(self) -> tuple[str, ...]:
        """What was measured: losses of texts, and for each task the share of questions that were answered right."""
        return (*LOSSES, "perplexity", *self.tasks)

    @property
    def rivals(self) -> tuple[str, ...]:
        """The criteria, without the control."""
        return tuple(name for name in dict.fromkeys(self.criteria) if name != CONTROL)

    def budgets(self) -> list[float]:
        """The shares kept, from the most to the least."""
        return sorted(map(float, set(self.keeps.tolist())), reverse=True)

    def curves(self, measure: str = "nll_added") -> pd.DataFrame:
        """One row per criterion and share kept: the mean over draws and its 95 % interval over texts and draws."""
        values, weights, _ = self._values(measure)
        rows = [
            (name, keep, float(self.kept[points].mean()), *self._pooled(values[points], weights, measure))
            for name in dict.fromkeys(self.criteria)
            for keep in self.budgets()
            for points in [self._points(name, keep)]
        ]
        return pd.DataFrame(rows, columns=["criterion", "keep", "kept", "value", "low", "high"])

    def beside(self, keep: float) -> pd.DataFrame:
        """One row per criterion at one share kept, one column per measure: means over texts or questions, and draws."""
        self._check_at(keep)
        columns: Any = {
            measure: self.curves(measure).set_index(["criterion", "keep"])["value"] for measure in self.measures
        }
        return pd.DataFrame(columns).xs(keep, level="keep").loc[list(dict.fromkeys(self.criteria))]

    def gap(self, criterion: str, keep: float, measure: str = "nll_added") -> tuple[float, float, float]:
        """(estimate, low, high) how much better than the control, text by text; NaN where there is no control.

        In the unit of the measure; of perplexity in nats per token, the difference of its logarithms.
        """
        self._check_at(keep)
        if criterion not in self.criteria:
            raise ValueError(f"gap: got criterion {criterion!r}, expected one of {', '.join(self.rivals)}.")
        ours, random = self._points(criterion, keep), self._points(CONTROL, keep)
        if not len(random):
            return float("nan"), float("nan"), float("nan")
        values, weights, _ = self._values(measure)
        more = values[random] - values[ours].mean(axis=0)  # (draw, item)
        return self._pooled(-more if measure in self.tasks else more, weights, "")

    def best(self, measure: str = "nll_added") -> str:
        """The criterion that loses least, on average over all budgets."""
        mean: Any = self.curves(measure).groupby("criterion", sort=False)["value"].mean()
        rivals = mean.loc[list(self.rivals)]
        return str(rivals.idxmax() if measure in self.tasks else rivals.idxmin())

    # Figures

    def plot(self, measure: str = "nll_added", *, at: float | None = None, **options: Any) -> Figure:
        """A measure against the share of parameters kept, a curve per criterion; the title tells of the share `at`.

        Bands, of the best criterion and of the control, are 95 % intervals.
        """
        if measure not in self.measures:
            raise ValueError(f"plot: got measure {measure!r}, expected one of {', '.join(self.measures)}.")
        budgets = self.budgets()
        at = budgets[len(budgets) // 2] if at is None else at
        self._check_at(at)
        untouched = self._values(measure)[2]
        curves: Any = self.curves(measure)
        whole = [(name, 1.0, 1.0, untouched, untouched, untouched) for name in dict.fromkeys(self.criteria)]
        drawn = pd.concat([pd.DataFrame(whole, columns=curves.columns), curves])
        told = drawn["criterion"].isin([self.best(measure), CONTROL])  # bands of all would hide each other
        drawn = drawn.assign(**{edge: drawn[edge].where(told, drawn["value"]) for edge in ("low", "high")})
        shades = [shade for shade in plots.PALETTE if shade != plots.YELLOW]
        colors = dict(zip(self.rivals, shades, strict=False)) | {CONTROL: plots.GREY}
        what = {"heads": " in heads", "neurons": " in neurons", "blocks": " in heads and neurons"}.get(self.of, "")
        title = "; ".join((self._finding(measure, at), *self.notes))
        titles: dict[str, Any] = {"title": title, "x_title": f"parameters{what} kept"}
        y_title = LOSSES.get(measure, "perplexity" if measure == "perplexity" else f"{measure}: share right")
        log_y = measure == "perplexity"
        figure = plots.lines(
            drawn, "kept", "value", "criterion", "low", "high", y_title=y_title, colors=colors, log_y=log_y, **titles
        )
        return figure.update_xaxes(autorange="reversed", tickformat=".0%")

    def views(self) -> dict[str, list[Any]]:
        budgets = self.budgets()
        middle = budgets[len(budgets) // 2]
        return {"measure": list(self.measures), "at": [middle, *(keep for keep in budgets if keep != middle)]}

    def _finding(self, measure: str, at: float) -> str:
        best = self.best(measure)
        value = self.curves(measure).set_index(["criterion", "keep"])["value"]
        said = f"With {at:.0%} kept, {best} "
        gap, low, high = self.gap(best, at, measure)
        ours, apart = value[best, at], f"difference {gap:.2g}, 95 % interval {low:.2g} to {high:.2g}"
        if measure in self.tasks:
            base = self._values(measure)[2]
            said += f"answers {ours:.0%} of {measure}, untouched {base:.0%}"
            chance = "random units {:.0%}"
        elif measure == "perplexity":
            said += f"has perplexity {ours:.3g}, untouched {self._values(measure)[2]:.3g}"
            return said if np.isnan(gap) else f"{said}, random units {value[CONTROL, at]:.3g}"
        else:
            said += "adds least loss" if measure == "nll_added" else "moves predictions least"
            said += f": {ours:.3g} nats per token"
            chance = "random units {:.3g}"
        return said if np.isnan(gap) else f"{said}, {chance.format(value[CONTROL, at])} ({apart})"

    # Below: how

    def _check_at(self, keep: float) -> None:
        if keep not in self.budgets():
            raise ValueError(f"curve: got at={keep}, expected one of {', '.join(map(str, self.budgets()))}.")

    def _points(self, criterion: str, keep: float) -> np.ndarray:
        return np.flatnonzero((np.array(self.criteria) == criterion) & (self.keeps == keep))

    def _values(self, measure: str) -> tuple[np.ndarray, np.ndarray, float]:
        """(point, item) values, (item,) weights, and the untouched value, of perplexity the logarithm's."""
        if measure in self.tasks:
            asked = self.task == self.tasks.index(measure)
            base = float(self.base_right[asked].mean())
            return self.right[:, asked].astype(np.float64), np.ones(int(asked.sum())), base
        weights = self.tokens / self.tokens.sum()
        if measure == "perplexity":
            return self.nll, weights, float(np.exp(self.base_nll @ weights))
        return (self.kl if measure == "kl" else self.nll - self.base_nll), weights, 0.0

    def _pooled(self, values: np.ndarray, weights: np.ndarray, measure: str) -> tuple[float, float, float]:
        """(mean, low, high) of values (draw, item) over both; one draw is taken as it is."""
        items = resampling_weights(values.shape[1], N_BOOTSTRAP, self.seed) * weights
        items /= items.sum(axis=1, keepdims=True)
        draws = resampling_weights(len(values), N_BOOTSTRAP, self.seed + 1)
        means = np.einsum("bd,dn,bn->b", draws, values, items)
        found = np.array([np.average(values.mean(axis=0), weights=weights), *np.quantile(means, (0.025, 0.975))])
        mean, low, high = np.exp(found) if measure == "perplexity" else found
        return float(mean), float(low), float(high)


def as_prompt(item: Item | Prompt) -> Prompt:
    """A question of the corpora as a prompt to complete."""
    return item if isinstance(item, Prompt) else Prompt(item.phenomenon, "", item.form, item.prompt, (item.answer,))


def chunks(ids: Sequence[Sequence[int]], vocab: int, most: int = BASE_BYTES) -> Iterator[list[int]]:
    """Rows in order whose predictions fit into `most` bytes together; one at least."""
    chunk: list[int] = []
    size = 0
    for row, text in enumerate(ids):
        new = 4 * vocab * len(text)
        if chunk and size + new > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += new
    yield chunk
