"""What the layers say about a text: tables of read-outs and their figures.

Distances are from the last layer's prediction: KL(last || layer), rank of its top token, share of equal top tokens.
Source: nostalgebraist, 2020, "interpreting GPT: the logit lens"; intervals by bootstrap over texts (Efron, 1979).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.result import Result
from workbench.stats import bootstrap_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MEASURES = {
    "agreement": "share of positions whose top token is the final one",
    "kl": "KL of the final from the layer's prediction (nats)",
    "rank": "rank of the final top token (geometric mean)",
    "entropy": "entropy (bits)",
}
SHOWN = 24  # positions of a text in one grid
X_TITLE = "blocks passed (0: embedding)"


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadOutResult(Result):
    """Read-outs of each layer at each read position. Layer l stands after l blocks, 0 is the embedding.

    kl (nats), entropy_bits, rank (layer, row)    rank 1: the layer's top token is the last layer's
    top_ids, top_probability (layer, row, k)      what the layer would say
    text, position, ids (row,)                    which token was read; ids is the token itself
    vocabulary                                    token id -> text, of all ids above
    """

    kl: np.ndarray
    entropy_bits: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray
    top_probability: np.ndarray
    text: np.ndarray
    position: np.ndarray
    ids: np.ndarray
    vocabulary: Mapping[int, str]
    lens: str = "logit"
    n_bootstrap: int = 2000
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "text", "position", "token", "kl", "rank", "entropy_bits", "top_token", "top_probability",
        "agreement", "lens",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per layer and read position."""
        layer, row = (axis.ravel() for axis in np.indices(self.kl.shape))
        arrays = {name: getattr(self, name).ravel() for name in ("kl", "rank", "entropy_bits")}
        columns = {"layer": layer, "text": self.text[row], "position": self.position[row]}
        columns |= {"token": [self.vocabulary[index] for index in self.ids[row].tolist()]} | arrays
        columns["top_token"] = [self.vocabulary[index] for index in self.top_ids[..., 0].ravel().tolist()]
        columns |= {"top_probability": self.top_probability[..., 0].ravel(), "agreement": self.agreement.ravel()}
        return pd.DataFrame(columns | {"lens": self.lens}).loc[:, list(self.columns)]

    @property
    def agreement(self) -> np.ndarray:
        """(layer, row) whether the layer's top token is the last layer's."""
        return self.rank == 1

    def summary(self) -> pd.DataFrame:
        """Mean per layer and measure over positions, with its 95 % interval: texts are drawn with their positions."""
        values = {
            "agreement": self.agreement.astype(np.float64),
            "kl": self.kl,
            "rank": np.log(self.rank),
            "entropy": self.entropy_bits,
        }
        texts, row_of = np.unique(self.text, return_inverse=True)
        n_rows = np.bincount(row_of)
        tables = []
        for name, of_row in values.items():
            of_text = np.stack([np.bincount(row_of, weights=one) / n_rows for one in of_row], axis=1)  # (text, layer)
            options: dict[str, Any] = {"weights": n_rows, "n_bootstrap": self.n_bootstrap, "seed": self.seed}
            mean, low, high = bootstrap_interval(of_text, transform=np.exp if name == "rank" else None, **options)
            columns = {"layer": np.arange(len(mean)), "measure": name, "value": mean, "low": low, "high": high}
            tables.append(pd.DataFrame(columns | {"texts": len(texts), "positions": len(self.text), "lens": self.lens}))
        return pd.concat(tables, ignore_index=True)

    def views(self) -> dict[str, list[Any]]:
        return {"view": [*MEASURES, "grid"], "text": sorted(set(self.text.tolist()))}

    def plot(
        self,
        view: str = "agreement",
        text: int | None = None,
        other: ReadOutResult | None = None,
        other_name: str = "other",
    ) -> Figure:
        """agreement, kl, rank, entropy: a curve over layers · grid: each layer's top token at the positions of a text.

        `other` adds the curves of a second result, such as that of the untrained twin or of a tuned lens.
        """
        if view == "grid":
            return self._plot_grid(int(self.text[0]) if text is None else text)
        if view not in MEASURES:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")
        table = self.summary().query("measure == @view").assign(curve=self._subject)
        if other is not None:
            table = pd.concat([table, other.summary().query("measure == @view").assign(curve=other_name)])
        title, middle = self._story(view), (len(self.kl) - 1) // 2
        if other is not None:
            of = table.set_index(["curve", "layer"])["value"]
            theirs = of.get((other_name, middle), float("nan"))
            title += f"; after {middle} blocks {of[self._subject, middle]:.3g}, {other_name} {theirs:.3g}"
        names: dict[str, Any] = {"x_title": X_TITLE, "y_title": MEASURES[view], "log_y": view == "rank"}
        figure = plots.lines(table, "layer", "value", "curve", "low", "high", title=title, **names)
        return figure.update_xaxes(dtick=max(1, len(self.kl) // 12))

    def _story(self, view: str) -> str:
        """The finding about one measure, in words."""
        value = self.summary().query("measure == @view")["value"].to_numpy()
        n = len(value) - 1
        if view == "agreement":
            settled = int(np.argmax(value >= 0.5))
            return (
                f"{self._subject}: half of the top tokens are final after {settled} of {n} blocks; "
                f"one block before the end {value[-2]:.0%} are"
            )
        if view == "kl":
            close = int(np.argmax(value <= 1.0))
            return (
                f"{self._subject}: after {close} of {n} blocks a layer is within one nat of the final prediction "
                f"(KL {value[close]:.2f}, one block before the end {value[-2]:.2f})"
            )
        if view == "rank":
            return (
                f"{self._subject}: the final top token ranks {value[0]:.3g} in the embedding, "
                f"{value[n // 2]:.3g} after {n // 2} of {n} blocks and 1 at the end"
            )
        most = int(value.argmax())
        return (
            f"{self._subject}: entropy is {value[0]:.2f} bits in the embedding, largest after {most} blocks "
            f"({value[most]:.2f}) and {value[-1]:.2f} at the end"
        )

    def _plot_grid(self, text: int) -> Figure:
        rows = np.flatnonzero(self.text == text)[:SHOWN]
        if not len(rows):
            raise ValueError(f"plot: got text {text}, expected one of those read: {self.views()['text'][:8]}.")
        table = self.table().iloc[(rows + np.arange(len(self.kl))[:, None] * len(self.text)).ravel()]
        table = table.assign(at=table["position"].astype(str) + " " + table["token"])
        first = [int(np.argmax(self.agreement[:, row])) for row in rows]
        title = (
            f"{self._subject}, text {text}: the final top token is first on top after {np.median(first):g} of "
            f"{len(self.kl) - 1} blocks (median of {len(rows)} positions)"
        )
        table = table.sort_values("layer", ascending=False, kind="stable")  # the last layer on top
        names: dict[str, Any] = {"x_title": "position and token read", "y_title": X_TITLE}
        figure = plots.heatmap(
            table, "at", "layer", "top_probability", title=title, value_title="probability", span=(0.0, 1.0),
            show_values=False, **names,
        )  # fmt: skip
        words = table["top_token"].to_numpy().reshape(len(self.kl), len(rows))
        return figure.update_traces(text=words, texttemplate="%{text}")

    @property
    def _subject(self) -> str:
        name = str(self.provenance.subject["name"]) if self.provenance else "simulated"
        return name if self.lens == "logit" else f"{name}, {self.lens.split()[0]} lens"
