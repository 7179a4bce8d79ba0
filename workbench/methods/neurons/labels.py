"""What reading neurons through the unembedding found: tables of labels and of the check by clamping, and their figures.

A neuron is labelled where its best score, with either sign, lies above what 999 in 1000 random vectors reach.
Source: Davies, 2025, "Flash Interpretability" (arXiv 2501.02688); intervals of shares after Wilson, 1927.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.neurons.clamping import CONTROL, LABELLED
from workbench.methods.neurons.labelling import NULL_LEVEL
from workbench.result import Result
from workbench.stats import bootstrap_interval, wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


COLORS = {"read": plots.BLUE, "write": plots.VERMILLION, "gate": plots.PURPLE}  # a side looks the same everywhere


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronTokensResult(Result):
    """The tokens that each neuron points at. L layers, N neurons of a layer; sides and signs as in those fields.

    top_token, top_score  (L, N, side, sign, k) token ids, best first, and scores; sign "-": of the vector times -1
    norm         (L, N, side) length of the vector that was compared, with the folded norm
    null_line    (L, side) the best score that 999 in 1000 random vectors of length 1 stay below
    vocabulary   token_id, token: the text of every id in top_token
    clamps       the check: one row per neuron, role and push (empty without prompts), see `clamp_summary`
    n_tokens     how many tokens could win       tied   the unembedding is the embedding: read labels look too good
    tokenizer    fingerprint of the vocabulary: labels of two models compare only where it is the same
    """

    top_token: np.ndarray
    top_score: np.ndarray
    norm: np.ndarray
    null_line: np.ndarray
    vocabulary: pd.DataFrame
    clamps: pd.DataFrame
    layers: tuple[int, ...]
    sides: tuple[str, ...]
    signs: tuple[str, ...]
    score: str
    fold_norm: bool
    mode: str
    n_tokens: int
    tied: bool
    tokenizer: str
    seed: int

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "neuron", "side", "sign", "rank", "token_id", "token", "score", "gap", "above_null", "mode",
    )  # fmt: skip

    def table(self, ranks: int = 1) -> pd.DataFrame:
        """One row per neuron, side, sign and rank, rank 1 the best; only the first `ranks` of the k tokens kept.

        gap   of the best score to the second, NaN where one token was kept       above_null   of the best score
        """
        shape = (*self.top_token.shape[:4], min(ranks, self.k))
        layer, neuron, side, sign, rank = (index.ravel() for index in np.indices(shape))
        ids = self.top_token[layer, neuron, side, sign, rank]
        gap = self.gap()[layer, neuron, side, sign]
        return pd.DataFrame(
            {
                "layer": np.array(self.layers)[layer],
                "neuron": neuron,
                "side": np.array(self.sides)[side],
                "sign": np.array(self.signs)[sign],
                "rank": rank + 1,
                "token_id": ids,
                "token": self.words(ids),
                "score": self.top_score[layer, neuron, side, sign, rank],
                "gap": gap,
                "above_null": self.above_null()[layer, neuron, side, sign],
                "mode": self.mode,
            },
            columns=list(self.columns),
        )

    @property
    def k(self) -> int:
        return self.top_token.shape[-1]

    def words(self, ids: np.ndarray) -> np.ndarray:
        """The text of token ids that are in top_token."""
        known = self.vocabulary["token_id"].to_numpy()
        return self.vocabulary["token"].to_numpy(dtype=object)[np.searchsorted(known, ids)]

    def gap(self) -> np.ndarray:
        """(L, N, side, sign) best score minus second best."""
        if self.k < 2:
            return np.full(self.top_score.shape[:4], np.nan)
        return self.top_score[..., 0] - self.top_score[..., 1]

    def strength(self) -> np.ndarray:
        """(L, N, side, sign) best score of the vector at length 1, over the line of random vectors."""
        unit = self.norm[..., None] if self.score == "dot" else 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(self.top_score[..., 0] / unit) / self.null_line[:, None, :, None]

    def above_null(self) -> np.ndarray:
        """(L, N, side, sign) whether the best score is one that random vectors hardly reach."""
        return np.array(self.strength() > 1.0)

    def labelled(self) -> np.ndarray:
        """(L, N, side) whether either sign is above the line: true of 1 in 1000 random neurons."""
        return np.any(self.above_null(), axis=3)

    def summary(self) -> pd.DataFrame:
        """Share of labelled neurons per layer and side, with 95 % interval."""
        count, total = self.labelled().sum(axis=1), self.top_token.shape[1]  # (L, side)
        low, high = wilson_interval(count, np.full(count.shape, total))
        layer, side = (index.ravel() for index in np.indices(count.shape))
        columns = {"count": count, "share": count / total, "low": low, "high": high}
        return pd.DataFrame(
            {"layer": np.array(self.layers)[layer], "side": np.array(self.sides)[side]}
            | {name: values.ravel() for name, values in columns.items()}
        )

    def naming(self, words: Collection[str]) -> pd.DataFrame:
        """Among labels above the line, the share that is one of `words`, per layer and side, with 95 % interval.

        by_chance   the share of these words among all tokens that could win. Layers without a label are left out.
        """
        wanted = set(words)
        table = self.table()
        table = table[table["above_null"]].assign(hit=lambda rows: rows["token"].str.strip().isin(wanted))
        rows = table.groupby(["layer", "side"], sort=False)["hit"].agg(count="sum", n="size").reset_index()
        low, high = wilson_interval(rows["count"].to_numpy(), rows["n"].to_numpy())
        return rows.assign(share=rows["count"] / rows["n"], low=low, high=high, by_chance=len(wanted) / self.n_tokens)

    def coherence(self, classes: Mapping[str, Collection[str]], side: str = "write") -> pd.DataFrame:
        """Do the tokens of a label belong together? The share of its other tokens that are of its best one's class.

        One row per layer, over labels above the line whose best token has a class; 95 % bootstrap interval over labels.
        classes     name -> words, each word in one class at most
        by_chance   the same share, were the other tokens drawn at random from all that could win
        """
        if side not in self.sides or self.k < 2:
            raise ValueError(
                f"coherence: got side {side!r} and k={self.k}, expected one of {self.sides} and k of 2 or more."
            )
        class_of = {word: name for name, words in classes.items() for word in words}
        j, rows = self.sides.index(side), []
        for i, layer in enumerate(self.layers):
            texts = self.words(self.top_token[i, :, j][self.above_null()[i, :, j]])  # (label, k)
            kinds = [[class_of.get(word.strip(), "") for word in label] for label in texts.tolist()]
            kinds = [label for label in kinds if label[0]]
            if kinds:
                same = np.array([np.mean([kind == label[0] for kind in label[1:]]) for label in kinds])
                chance = np.mean([(len(classes[label[0]]) - 1) / (self.n_tokens - 1) for label in kinds])
                rows.append((layer, *map(float, bootstrap_interval(same, seed=self.seed)), len(kinds), float(chance)))
        return pd.DataFrame(rows, columns=["layer", "share", "low", "high", "n", "by_chance"])

    def clamp_summary(self) -> pd.DataFrame:
        """Mean over neurons per role and push, with 95 % bootstrap interval: probability of the neuron's own token.

        push   length of what the neuron is made to write, over that of the residual stream there; its sign is the
               label's: a positive push is towards the token
        """
        rows = []
        for (role, push), group in self.clamps.groupby(["role", "push"], sort=False):  # type: ignore[misc]
            interval = map(float, bootstrap_interval(group["token_prob"].to_numpy(), seed=self.seed))
            gain = (group["token_logit"] - group["base_logit"]).mean()
            rows.append((role, push, *interval, gain, group["kl"].mean(), len(group)))
        return pd.DataFrame(rows, columns=["role", "push", "token_prob", "low", "high", "logit_gain", "kl", "neurons"])

    def views(self) -> dict[str, list[Any]]:
        return {"view": list(self._drawings()), "neuron": [f"{a}.{b}" for a, b in self._strongest()]}

    def plot(
        self,
        view: str = "layers",
        neuron: str | tuple[int, int] | None = None,
        other: NeuronTokensResult | None = None,
        other_name: str = "other",
    ) -> Figure:
        """layers: share of labelled neurons per layer · neuron: the tokens of one, "layer.neuron" or a pair
        clamp: probability of the label against the push, where prompts were given.

        `other` adds a second result, such as that of the untrained twin, to layers.
        """
        drawings = self._drawings()
        if view not in drawings:
            why = " (run the probe with prompts)" if view == "clamp" else ""
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(drawings)}{why}.")
        return drawings[view](self._neuron(neuron), other, other_name)

    def _drawings(self) -> dict[str, Callable[..., Figure]]:
        drawings = {"layers": self._plot_layers, "neuron": self._plot_neuron}
        return drawings | ({"clamp": self._plot_clamp} if len(self.clamps) else {})

    def _plot_layers(self, at: tuple[int, int], other: NeuronTokensResult | None, other_name: str) -> Figure:
        table = self.summary().assign(curve=lambda rows: rows["side"])
        parts = [f"{share:.1%} by what they {side}" for side, share in self._shares().items()]
        title = f"{self.subject_name}: {_listed(parts)} of {self.top_token[..., 0, 0, 0].size} neurons point at a token"
        title += f" more closely than {NULL_LEVEL:.1%} of random vectors"
        if other is not None:
            table = pd.concat([table, other.summary().assign(curve=lambda rows: rows["side"] + f", {other_name}")])
            title += f"; {other_name}: {_listed([f'{share:.1%}' for share in other._shares().values()])}"
        names: dict[str, Any] = {"x_title": "layer", "y_title": "share of the layer's neurons"}
        figure = plots.lines(table, "layer", "share", "curve", "low", "high", title=title, colors=COLORS, **names)
        figure.add_hline(1 - NULL_LEVEL, line={"color": plots.GREY, "width": 1, "dash": "dot"})
        figure.update_yaxes(tickformat=".1~%", rangemode="tozero")
        return figure.update_xaxes(dtick=max(1, len(self.layers) // 12))

    def _plot_neuron(self, at: tuple[int, int], other: NeuronTokensResult | None, other_name: str) -> Figure:
        layer, neuron = self._at(at)
        rows, step = [], self.k + 1
        for i, side in enumerate(self.sides):
            for j, sign in enumerate(self.signs):
                ids = self.top_token[layer, neuron, i, j]
                score = self.top_score[layer, neuron, i, j] * (-1.0 if sign == "-" else 1.0)
                place = i * step + np.arange(self.k)
                rows.append(pd.DataFrame({"x": place, "score": score, "side": side, "token": self.words(ids)}))
        table = pd.concat(rows)
        figure = plots.bars(
            table, "x", "score", color="side", title=self._described(at), x_title="", y_title=self._unit, colors=COLORS
        )
        style = {"textposition": "outside", "textangle": -90, "textfont": {"size": 12}, "constraintext": "none"}
        for i, side in enumerate(self.sides):
            figure.update_traces(text=table.loc[table["side"] == side, "token"], selector={"name": side}, **style)
            line = self.null_line[layer, i] * (self.norm[layer, neuron, i] if self.score == "dot" else 1.0)
            for sign in self.signs:
                y = -line if sign == "-" else line
                mark = {"color": plots.BLACK, "width": 1, "dash": "dot"}
                figure.add_shape(type="line", x0=i * step - 0.5, x1=i * step + self.k - 0.5, y0=y, y1=y, line=mark)
        ticks = [i * step + (self.k - 1) / 2 for i in range(len(self.sides))]
        figure.update_layout(barmode="overlay", height=520, showlegend=False)
        note = {"x": 1.0, "y": 1.0, "xref": "paper", "yref": "paper", "yanchor": "top", "showarrow": False}
        figure.add_annotation(text=f"dotted: {NULL_LEVEL:.1%} of random vectors stay inside", **note)
        figure.update_xaxes(tickvals=ticks, ticktext=[f"what it {side}s" for side in self.sides])
        reach = 1.75 * (np.abs(table["score"].to_numpy()).max() or 1.0)  # room for the words above and below the bars
        return figure.update_yaxes(range=[-reach if "-" in self.signs else 0.0, reach if "+" in self.signs else 0.0])

    def _plot_clamp(self, at: tuple[int, int], other: NeuronTokensResult | None, other_name: str) -> Figure:
        table = self.clamp_summary()
        top = table["push"].max()
        last = table[table["push"] == top].set_index("role")
        own, control = (f"{last['token_prob'][role]:.1%}" for role in (LABELLED, CONTROL))
        before, count = self.clamps["base_prob"].mean(), last["neurons"][LABELLED]
        title = (
            f"{self.subject_name}: pushed {top:g} residual lengths towards it, {count} labelled neurons bring their "
            f"token from {before:.1%} to {own}; random neurons pushed as far bring it to {control}"
        )
        names: dict[str, Any] = {
            "x_title": "push of the clamped neuron towards its label (residual lengths)",
            "y_title": "probability of the labelled token",
        }
        return plots.lines(table, "push", "token_prob", "role", "low", "high", title=title, **names).update_yaxes(
            rangemode="tozero"
        )

    def _described(self, at: tuple[int, int]) -> str:
        layer, neuron = self._at(at)
        parts = []
        for i, side in enumerate(self.sides):
            j = int(self.strength()[layer, neuron, i].argmax())
            word = self.words(self.top_token[layer, neuron, i, j, :1])[0]
            times = self.strength()[layer, neuron, i, j]
            parts.append(f"{side}s {word!r} ({self.signs[j]}), {times:.1f} times the line of random vectors")
        return f"Neuron {at[0]}.{at[1]} of {self.subject_name} {_listed(parts)}"

    def _shares(self) -> dict[str, float]:
        return dict(zip(self.sides, self.labelled().mean(axis=(0, 1)).tolist(), strict=True))

    @property
    def subject_name(self) -> str:
        """The model that was read, or "planted" for a simulated one."""
        name = str(self.provenance.subject["name"]) if self.provenance else "planted"
        return name.rstrip("/").rpartition("/")[2]  # of a folder or an organisation's model, the last part

    @property
    def _unit(self) -> str:
        names = {"dot": "product", "cosine": "cosine", "centred": "cosine, mean row taken out,"}
        return f"{names[self.score]} with the token's row"

    def _strongest(self, count: int = 24) -> list[tuple[int, int]]:
        """(layer, neuron) whose weakest side is strongest above its line, best first: both sides are worth a look."""
        strength = self.strength().max(axis=3).min(axis=2)  # (L, N)
        order = np.argsort(-strength, axis=None, kind="stable")[:count]
        layer, neuron = np.unravel_index(order, strength.shape)
        return [(self.layers[a], int(b)) for a, b in zip(layer, neuron, strict=True)]

    def _neuron(self, neuron: str | tuple[int, int] | None) -> tuple[int, int]:
        if neuron is None:
            return self._strongest(1)[0]
        try:
            layer, index = (int(part) for part in (neuron.split(".") if isinstance(neuron, str) else neuron))
            self._at((layer, index))
        except (ValueError, IndexError):
            raise ValueError(
                f"plot: got neuron {neuron!r}, expected LAYER.NEURON such as {self.layers[0]}.7 with a layer of "
                f"{', '.join(map(str, self.layers))} and neurons 0 to {self.top_token.shape[1] - 1}."
            ) from None
        return layer, index

    def _at(self, neuron: tuple[int, int]) -> tuple[int, int]:
        if neuron[0] not in self.layers or not 0 <= neuron[1] < self.top_token.shape[1]:
            raise IndexError(f"neuron {neuron[0]}.{neuron[1]} was not read")
        return self.layers.index(neuron[0]), neuron[1]


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
