"""What counterfactual generation found: tables of agreement between texts before and after an edit.

Each pair is one edit and one throw of the dice: a factual text, its counterfactual (same throw) and its interventional
twin (fresh throw). Intervals: bootstrap over pairs (Efron, 1979); shares of read words after Wilson, 1927.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench.generation import text_of
from workbench.methods.counterfactual import figures
from workbench.methods.counterfactual.agreement import (
    COUNTERFACTUAL,
    END,
    FACTUAL,
    INTERVENTIONAL,
    KINDS,
    OTHER_DICE,
    SAME_DICE,
    TEXTS,
    common_prefix,
    edit_distance,
    equal_and_counted,
    equal_share,
    share_interval,
)
from workbench.methods.counterfactual.edits import Edit, Plan, read
from workbench.result import Result
from workbench.stats import wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from transformers import PreTrainedTokenizerBase

TEXTS_SHOWN = 24  # pairs that `views` offers


@dataclass(frozen=True)
class Pair:
    """One edit under one throw: factual, counterfactual, interventional. `expected` and `shift` as in the result."""

    edit: int
    sample: int
    sampler: str
    temperature: float
    ids: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]
    expected: tuple[float, float, float]
    shift: tuple[float, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class CounterfactualResult(Result):
    """n pairs of E edits, texts of up to T tokens from the first one that is sampled after the edit.

    factual, counterfactual, interventional (n, T)   token ids, -1 after the end of a text
    log_prob (n, 3, T)   of these tokens, in nats, at temperature 1 without truncation; NaN after the end
    expected (n, 3)      chance that the first token stays: same dice, fresh dice, the most that any coupling reaches;
                         from the model's two distributions. NaN for the sampler "rank", which has no closed form here;
                         0 where the factual text ends with the edit, so that nothing could stay
    shift (n, 2)         log(q / p) of the first factual and the first counterfactual token: what the edit did to both
    edit, sample, sampler, temperature (n,)          edit and sampler are indices into names and samplers
    texts                the three texts of each pair, decoded; text does not go back to ids anywhere
    names, prompts, edited, edit_positions, reads    one per edit        pieces   id -> its text
    """

    factual: np.ndarray
    counterfactual: np.ndarray
    interventional: np.ndarray
    log_prob: np.ndarray
    expected: np.ndarray
    shift: np.ndarray
    edit: np.ndarray
    sample: np.ndarray
    sampler: np.ndarray
    temperature: np.ndarray
    texts: pd.DataFrame
    names: tuple[str, ...]
    prompts: tuple[str, ...]
    edited: tuple[str, ...]
    edit_positions: tuple[int, ...]
    reads: tuple[Mapping[str, Mapping[str, Sequence[str]]], ...]
    pieces: Mapping[int, str]
    samplers: tuple[str, ...]
    noise_follows: str = "position"
    seed: int = 0
    notes: tuple[str, ...] = ()

    columns: ClassVar[tuple[str, ...]] = (
        "edit", "prompt", "sample", "sampler", "temperature", "edit_position", "kind", "equal_share", "common_prefix",
        "edit_distance", "tokens", "seed",
    )  # fmt: skip

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        length: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        edits: Sequence[Edit],
        plans: Sequence[Plan],
        samplers: Sequence[str],
        **settings: Any,
    ) -> CounterfactualResult:
        """Pack pairs with texts of at most `length` tokens."""
        ids = [_packed([pair.ids[k] for pair in pairs], length, END, np.int32) for k in range(3)]
        log_prob = [_packed([pair.log_probs[k] for pair in pairs], length, np.nan, np.float32) for k in range(3)]
        texts = {kind: [text_of(tokenizer, pair.ids[k]) for pair in pairs] for k, kind in enumerate(TEXTS)}
        before, after = ([text_of(tokenizer, ids) for ids in some] for some in zip(*map(_around, plans), strict=True))
        return cls(
            **dict(zip(TEXTS, ids, strict=True)),
            log_prob=np.stack(log_prob, axis=1),
            expected=np.array([pair.expected for pair in pairs], dtype=np.float64),
            shift=np.array([pair.shift for pair in pairs], dtype=np.float64),
            edit=np.array([pair.edit for pair in pairs], dtype=np.int32),
            sample=np.array([pair.sample for pair in pairs], dtype=np.int32),
            sampler=np.array([samplers.index(pair.sampler) for pair in pairs], dtype=np.int32),
            temperature=np.array([pair.temperature for pair in pairs], dtype=np.float64),
            texts=pd.DataFrame(texts),
            names=tuple(edit.name for edit in edits),
            prompts=tuple(before),
            edited=tuple(after),
            edit_positions=tuple(one.position for one in plans),
            reads=tuple(_plain(edit.reads) for edit in edits),
            pieces=_pieces(tokenizer, np.unique(np.stack(ids)), plans[0].before[-1]),
            samplers=tuple(samplers),
            **settings,
        )

    def table(self) -> pd.DataFrame:
        """One row per pair and kind; `tokens` is the length of the text of that kind, edit_distance is normalised."""
        facts = {
            "edit": np.array(self.names)[self.edit],
            "prompt": np.array(self.prompts)[self.edit],
            "sample": self.sample,
            "sampler": np.array(self.samplers)[self.sampler],
            "temperature": self.temperature,
            "edit_position": np.array(self.edit_positions)[self.edit],
        }
        tables = []
        for kind in KINDS:
            ids = self._ids(kind)
            measures = {
                "equal_share": equal_share(self.factual, ids),
                "common_prefix": common_prefix(self.factual, ids),
                "edit_distance": edit_distance(self.factual, ids),
                "tokens": (ids != END).sum(axis=1),
            }
            tables.append(pd.DataFrame({**facts, "kind": kind, **measures, "seed": self.seed}))
        return pd.concat(tables, ignore_index=True).loc[:, list(self.columns)]

    def summary(self) -> pd.DataFrame:
        """Mean of each measure per edit, sampler, temperature and kind, with 95 % interval over pairs."""
        rows = []
        keys = ["edit", "sampler", "temperature", "kind"]
        for _, group in self.table().groupby(keys, sort=False):
            for measure in ("equal_share", "common_prefix", "edit_distance"):
                estimate = share_interval(group[measure].to_numpy(), seed=self.seed)
                rows.append((*group[keys].iloc[0], measure, *map(float, estimate), len(group)))
        return pd.DataFrame(rows, columns=[*keys, "measure", "value", "low", "high", "pairs"])

    def agreement(
        self, edit: str | None = None, sampler: str | None = None, temperature: float | None = None
    ) -> pd.DataFrame:
        """Share of equal tokens per position after the edit (0: the first sampled token), per kind, with interval.

        Of pairs where at least one text still goes on. None: the first edit, first sampler, highest temperature.
        """
        chosen = self._chosen(edit, sampler, temperature)
        return pd.concat([_per_position(self.factual[chosen], self._ids(k)[chosen], k, self.seed) for k in KINDS])

    def first_token(self) -> pd.DataFrame:
        """Observed and expected share of pairs whose first token stays, and the most that any coupling could keep."""
        rows = []
        for name, sampler, temperature, chosen in self._groups():
            for kind, expected in zip(KINDS, self.expected[chosen, :2].T, strict=True):
                same = self.factual[chosen, 0] == self._ids(kind)[chosen, 0]
                observed = map(float, share_interval(same, seed=self.seed))
                bound = float(self.expected[chosen, 2].mean())
                rows.append((name, sampler, temperature, kind, *observed, float(expected.mean()), bound, len(same)))
        columns = ["edit", "sampler", "temperature", "kind", "observed", "low", "high", "expected", "largest", "pairs"]
        return pd.DataFrame(rows, columns=columns)

    def stability(self, tolerance: float = 1e-3) -> pd.DataFrame:
        """Pairs whose first token i became a j that the edit made less likely, relative to i: none under Gumbel-max.

        tolerance   nats by which q_j / p_j must fall short of q_i / p_i: two forwards of one text differ by rounding
        """
        rows = []
        moved = (self.factual[:, 0] != self.counterfactual[:, 0]) & ~np.isnan(self.shift).any(axis=1)
        with np.errstate(invalid="ignore"):  # infinity minus itself: both impossible before the edit, no violation
            worse = moved & (self.shift[:, 1] - self.shift[:, 0] < -tolerance)
        for k, sampler in enumerate(self.samplers):
            of = (self.sampler == k) & (self.temperature > 0)
            rows.append((sampler, int(worse[of].sum()), int(moved[of].sum()), int(of.sum())))
        table = pd.DataFrame(rows, columns=["sampler", "violations", "changed", "pairs"])
        return table.assign(share=table["violations"] / table["pairs"].where(table["pairs"] > 0))

    def attributes(self, read_text: Callable[[str], str] | None = None, name: str = "read") -> pd.DataFrame:
        """Value read before and after the edit: one row per group, attribute, kind and pair of values.

        A group is an edit name, a sampler and a temperature; share is that of all its pairs.
        read_text, name: a function of the text, and its name, instead of the edits' own `reads`
        """
        return self._transitions(lambda kind, chosen: (self, kind, chosen), KINDS, read_text, name)

    def changed(self, read_text: Callable[[str], str] | None = None, name: str = "read") -> pd.DataFrame:
        """Share of pairs whose attribute changed, per edit, sampler, temperature, attribute and kind, with interval."""
        table = self.attributes(read_text, name)
        keys = ["edit", "sampler", "temperature", "attribute", "kind"]
        if not len(table):
            return pd.DataFrame(columns=[*keys, "share", "low", "high", "pairs"])
        table = table.assign(moved=table["count"].where(table["before"] != table["after"], 0))
        table = table.groupby(keys, sort=False, as_index=False).agg({"moved": "sum", "count": "sum"})
        moved, pairs = table["moved"].to_numpy(dtype=float), table["count"].to_numpy(dtype=float)
        low, high = wilson_interval(moved, pairs)
        return table[keys].assign(share=moved / pairs, low=low, high=high, pairs=pairs.astype(int))

    def against(self, other: CounterfactualResult) -> pd.DataFrame:
        """The same dice, another model: agreement of the two results' factual texts, per position, with its control.

        other   a result of the same probe on the same edits: another model with this tokenizer, or the model under
                toggles. kind "same dice": same sample; "other dice": the next sample, whose throws are others.
        One row per edit, sampler, temperature above 0, kind and position. Raises ValueError where throws don't match.
        """
        self._check_same_dice(other)
        tables = []
        for edit, sampler, temperature, chosen in self._groups():
            if temperature == 0:
                continue
            mine, theirs = self.factual[chosen], other.factual[chosen]
            keys = {"edit": edit, "sampler": sampler, "temperature": temperature}
            tables.append(_per_position(mine, theirs, SAME_DICE, self.seed).assign(**keys))
            moved = theirs[_next_sample(self.edit[chosen])]
            tables.append(_per_position(mine, moved, OTHER_DICE, self.seed).assign(**keys))
        return pd.concat(tables, ignore_index=True)

    def flips(
        self, other: CounterfactualResult, read_text: Callable[[str], str] | None = None, name: str = "read"
    ) -> pd.DataFrame:
        """Value read in this result's factual texts (before) and in those of `other` (after); as `attributes`.

        kinds and errors as in `against`: what the other model changes, and what other throws alone would have changed.
        """
        self._check_same_dice(other)

        def text(kind: str, chosen: np.ndarray) -> tuple[CounterfactualResult, str, np.ndarray]:
            places = np.flatnonzero(chosen)
            return other, FACTUAL, places if kind == SAME_DICE else places[_next_sample(self.edit[chosen])]

        return self._transitions(text, (SAME_DICE, OTHER_DICE), read_text, name)

    def views(self) -> dict[str, list[Any]]:
        views = [view for view in self._drawings() if view != "models"]
        attributes = self._attributes(self.names[0])
        return {
            "view": views if attributes else [view for view in views if view != "attributes"],
            "edit": list(dict.fromkeys(self.names)),
            "sampler": list(self.samplers),
            "temperature": sorted({float(t) for t in self.temperature}, reverse=True),
            "attribute": attributes,
            "pair": list(range(min(TEXTS_SHOWN, int(self._chosen(None, None, None).sum())))),
        }

    def plot(
        self,
        view: str = "temperature",
        edit: str | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        attribute: str | None = None,
        pair: int = 0,
        other: CounterfactualResult | None = None,
        other_name: str = "other model",
    ) -> Figure:
        """temperature: edit distance against temperature · position: agreement after the edit · couplings: first token
        attributes: values read, before and after · text: one pair, aligned · models: the same dice on `other`.

        None: the first edit, first sampler, highest temperature, first attribute.
        """
        drawings = self._drawings()
        if view not in drawings:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(drawings)}.")
        if not self._chosen(edit, sampler, temperature).any():
            raise ValueError(f"plot: every text ended before the edit {edit or self.names[0]!r}. See `notes`.")
        edit, sampler = edit or self.names[0], sampler or self.samplers[0]
        temperature = float(self.temperature.max()) if temperature is None else temperature
        extra = {"attributes": (attribute,), "text": (pair,), "models": (other, other_name)}.get(view, ())
        return drawings[view](edit, sampler, temperature, *extra)

    def _drawings(self) -> dict[str, Callable[..., Figure]]:
        return {
            "temperature": self._plot_temperature,
            "position": self._plot_position,
            "couplings": self._plot_couplings,
            "attributes": self._plot_attributes,
            "text": self._plot_text,
            "models": self._plot_models,
        }

    def _plot_temperature(self, edit: str, sampler: str, temperature: float) -> Figure:
        table = self.summary().query("edit == @edit and sampler == @sampler and measure == 'edit_distance'")
        return figures.temperatures(table, edit, sampler, temperature)

    def _plot_position(self, edit: str, sampler: str, temperature: float) -> Figure:
        chosen = self._chosen(edit, sampler, temperature)
        whole = {kind: float(equal_share(self.factual[chosen], self._ids(kind)[chosen]).mean()) for kind in KINDS}
        return figures.positions(self.agreement(edit, sampler, temperature).dropna(), whole, edit)

    def _plot_couplings(self, edit: str, sampler: str, temperature: float) -> Figure:
        return figures.couplings(self.first_token().query("edit == @edit and temperature == @temperature"), edit)

    def _plot_attributes(self, edit: str, sampler: str, temperature: float, attribute: str | None) -> Figure:
        known = self._attributes(edit)
        attribute = attribute or (known[0] if known else None)
        if attribute not in known:
            raise ValueError(
                f"plot: edit {edit!r} reads no {attribute!r}, expected one of {known or 'its reads: none'}."
            )
        chosen = self._chosen(edit, sampler, temperature)
        return figures.attributes({k: self._values(k, attribute, chosen, None) for k in TEXTS}, attribute, edit)

    def _plot_text(self, edit: str, sampler: str, temperature: float, pair: int) -> Figure:
        chosen = np.flatnonzero(self._chosen(edit, sampler, temperature))
        if not 0 <= pair < len(chosen):
            raise ValueError(f"plot: got pair {pair}, expected 0 to {len(chosen) - 1} for {edit!r} at {temperature:g}.")
        at = int(chosen[pair])
        prompts = self.prompts[self.edit[at]], self.edited[self.edit[at]]
        return figures.texts(prompts, {k: self._tokens(k, at) for k in TEXTS}, self._piece, edit, pair)

    def _plot_models(
        self, edit: str, sampler: str, temperature: float, other: CounterfactualResult | None, other_name: str
    ) -> Figure:
        if other is None:
            raise ValueError("plot: view 'models' got no second result, expected other=RESULT, see `against`.")
        table = self.against(other).query("edit == @edit and sampler == @sampler and temperature == @temperature")
        return figures.models(table.dropna(), edit, temperature, other_name)

    def _ids(self, kind: str) -> np.ndarray:
        return {FACTUAL: self.factual, COUNTERFACTUAL: self.counterfactual, INTERVENTIONAL: self.interventional}[kind]

    def _groups(self) -> list[tuple[str, str, float, np.ndarray]]:
        """(edit, sampler, temperature, mask of its pairs) in the order in which they were measured."""
        found = []
        for k, sampler in enumerate(self.samplers):
            for temperature in dict.fromkeys(self.temperature[self.sampler == k].tolist()):
                for name in dict.fromkeys(self.names):
                    chosen = self._chosen(name, sampler, temperature)
                    if chosen.any():  # not where all texts ended before the edit
                        found.append((name, sampler, temperature, chosen))
        return found

    def _chosen(self, edit: str | None, sampler: str | None, temperature: float | None) -> np.ndarray:
        """(n,) the pairs of one edit name, sampler and temperature."""
        edit, sampler = edit or self.names[0], sampler or self.samplers[0]
        temperature = float(self.temperature.max()) if temperature is None else temperature
        temperatures = sorted(set(self.temperature.tolist()))
        known = (("edit", edit, self.names), ("sampler", sampler, self.samplers))
        for what, got, choices in (*known, ("temperature", temperature, temperatures)):
            if got not in choices:
                names = ", ".join(map(str, dict.fromkeys(choices)))
                raise ValueError(f"Counterfactual: got {what} {got!r}, expected one of {names}.")
        named = np.array([name == edit for name in self.names])[self.edit]
        return named & (self.sampler == self.samplers.index(sampler)) & (self.temperature == temperature)

    def _attributes(self, edit: str) -> list[str]:
        sets = [set(reads) for name, reads in zip(self.names, self.reads, strict=True) if name == edit]
        first = next(reads for name, reads in zip(self.names, self.reads, strict=True) if name == edit)
        return [attribute for attribute in first if all(attribute in some for some in sets)]

    def _values(
        self, kind: str, attribute: str, chosen: np.ndarray, read_text: Callable[[str], str] | None
    ) -> list[str]:
        texts = self.texts[kind].to_numpy()[chosen]
        if read_text is not None:
            return [str(read_text(text)) for text in texts]
        return [read(text, self.reads[e][attribute]) for text, e in zip(texts, self.edit[chosen], strict=True)]

    def _transitions(
        self,
        text_of_kind: Callable[[str, np.ndarray], tuple[CounterfactualResult, str, np.ndarray]],
        kinds: Sequence[str],
        read_text: Callable[[str], str] | None,
        name: str,
    ) -> pd.DataFrame:
        """Counts of (value before, value after): before in the factual texts, after in the texts of each kind."""
        tables = []
        for edit, sampler, temperature, chosen in self._groups():
            for attribute in [name] if read_text else self._attributes(edit):
                keys = {"edit": edit, "sampler": sampler, "temperature": temperature, "attribute": attribute}
                before = self._values(FACTUAL, attribute, chosen, read_text)
                for kind in kinds:
                    result, text, places = text_of_kind(kind, chosen)
                    after = result._values(text, attribute, places, read_text)
                    counts = sorted(Counter(zip(before, after, strict=True)).items())
                    count = np.array([number for _, number in counts])
                    low, high = wilson_interval(count, len(before))
                    values = {"before": [pair[0] for pair, _ in counts], "after": [pair[1] for pair, _ in counts]}
                    shares = {"count": count, "share": count / len(before), "low": low, "high": high}
                    tables.append(pd.DataFrame({**keys, **values, "kind": kind, **shares}))
        columns = ["edit", "sampler", "temperature", "attribute", "before", "after", "kind", "count"]
        columns += ["share", "low", "high"]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)

    def _tokens(self, kind: str, at: int) -> list[int]:
        return [int(token) for token in self._ids(kind)[at] if token != END]

    def _piece(self, token: int) -> str:
        return self.pieces.get(token, f" {token}")

    def _check_same_dice(self, other: CounterfactualResult) -> None:
        for name in ("seed", "samplers", "prompts"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"against: the {name} differ ({mine!r:.80} and {theirs!r:.80}), expected the same dice."
                )
        for name in ("edit", "sample", "sampler", "temperature"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"against: the pairs differ in {name}, expected the same probe on the same edits.")
        if self.factual.shape != other.factual.shape:
            raise ValueError("against: the texts differ in max_new_tokens, expected the same probe.")
        thrown = self.temperature > 0
        if not thrown.any():
            raise ValueError(
                "against: both results are greedy only, expected a temperature above 0. Nothing was thrown."
            )
        settings = np.stack([self.edit, self.sampler, self.temperature])[:, thrown]
        groups, pairs = np.unique(settings, axis=1, return_counts=True)
        if pairs.min() < 2:
            name = self.names[int(groups[0, pairs.argmin()])]
            raise ValueError(
                f"against: got one sample of edit {name!r}, expected at least two. The next one is the control."
            )


def _packed(rows: Sequence[Sequence[float]], length: int, fill: float, dtype: Any) -> np.ndarray:
    """(n, length) the rows, filled up at their ends."""
    made = np.full((len(rows), length), fill, dtype=dtype)
    for k, row in enumerate(rows):
        made[k, : len(row)] = row
    return made


def _around(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids to show for the text before and after the edit; an edit in the model's own text shows its new ids."""
    return plan.before, plan.ids if plan.after is None else plan.after


def _plain(reads: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, dict[str, tuple[str, ...]]]:
    return {name: {value: tuple(words) for value, words in values.items()} for name, values in reads.items()}


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, anchor: int) -> dict[int, str]:
    """The text of each id inside a text, with the space before it: what it adds to the text of `anchor`."""
    start = str(tokenizer.decode([anchor]))
    found = {}
    for token in (int(token) for token in ids if token != END):
        text = str(tokenizer.decode([anchor, token]))
        found[token] = text[len(start) :] if text.startswith(start) else str(tokenizer.decode([token]))
    return found


def _per_position(a: np.ndarray, b: np.ndarray, kind: str, seed: int) -> pd.DataFrame:
    equal, counted = equal_and_counted(a, b)
    share, low, high = share_interval(equal, counted, seed=seed)
    columns = {"position_after_edit": np.arange(a.shape[1]), "kind": kind, "equal_share": share}
    return pd.DataFrame({**columns, "low": low, "high": high, "pairs": counted.sum(axis=0)})


def _next_sample(edit: np.ndarray) -> np.ndarray:
    """(n,) for each pair the place of the next pair of its edit, the last one's being the first."""
    following = np.empty(len(edit), dtype=np.int64)
    for number in np.unique(edit):
        places = np.flatnonzero(edit == number)
        following[places] = np.roll(places, -1)
    return following
