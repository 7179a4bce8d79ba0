"""What a recovery gave back: the loss on held-out texts as adapters learn, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch

from workbench import plots
from workbench.pruned.weights import Weights
from workbench.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.methods.pruning.adapters import Training


@dataclass(frozen=True, eq=False, kw_only=True)
class RecoveryResult(Result):
    """The course of a recovery and the update that it left: `LoRA(result.update)` is the toggle.

    steps      (measurement, 4) step, loss on the batches since the last one, kl and nll on the held-out texts
    whole_nll  nll of the held-out texts for the model without toggles: what could be got back
    flat       all tensors of the best step, one after another, as `layout` names them
    """

    steps: np.ndarray
    whole_nll: float
    best: int
    stopped: str
    flat: np.ndarray
    layout: tuple[tuple[str, tuple[int, int]], ...]
    toggles: str = "no toggle"

    columns: ClassVar[tuple[str, ...]] = ("step", "train_loss", "kl", "nll", "perplexity", "kl_removed", "best")

    @classmethod
    def of(cls, training: Training, whole_nll: float, toggles: str) -> RecoveryResult:
        layout = tuple((name, (t.shape[0], t.shape[1])) for name, t in sorted(training.update.items()))
        flat = [training.update[name].reshape(-1) for name, _ in layout]
        return cls(
            steps=np.array(training.steps, dtype=np.float64),
            whole_nll=whole_nll,
            best=training.best,
            stopped=training.stopped,
            flat=torch.cat(flat).numpy() if flat else np.zeros(0, dtype=np.float32),
            layout=layout,
            toggles=toggles,
        )

    @property
    def update(self) -> Weights:
        """The update of the best step, for `LoRA`."""
        sizes = [rows * columns for _, (rows, columns) in self.layout]
        pieces = torch.from_numpy(np.array(self.flat)).split(sizes)
        return Weights({name: piece.reshape(shape) for (name, shape), piece in zip(self.layout, pieces, strict=True)})

    @property
    def kl_removed(self) -> float:
        """Share of the KL to the whole model that the best step took away on held-out texts; 0 where there was none."""
        return float(self.table().set_index("step").loc[self.best, "kl_removed"])

    def table(self) -> pd.DataFrame:
        """One row per measurement: step, train_loss since the last one, kl and nll (nats per token, held-out texts),
        perplexity, kl_removed (share of the KL at step 0), best (the step whose update is kept)."""
        table = pd.DataFrame(self.steps, columns=["step", "train_loss", "kl", "nll"]).astype({"step": int})
        before = float(table["kl"].iloc[0])
        removed = 1 - table["kl"] / before if before > 1e-9 else 0.0 * table["kl"]  # of nothing nothing is taken
        table = table.assign(perplexity=np.exp(table["nll"]), kl_removed=removed, best=table["step"] == self.best)
        return table.loc[:, list(self.columns)]

    def plot(self, **view: Any) -> Figure:
        """Loss on held-out texts against the steps of the recovery, with the whole model's as the line to reach."""
        table = self.table()
        first, best = table.iloc[0], table[table["best"]].iloc[0]
        rows = pd.concat(
            [
                pd.DataFrame({"step": table["step"], "value": table["nll"], "what": "with the adapters"}),
                pd.DataFrame({"step": table["step"], "value": self.whole_nll, "what": "the whole model"}),
            ]
        )
        title = (
            f"Recovery under {self.toggles}: held-out loss goes from {first['nll']:.3f} to {best['nll']:.3f} nats in "
            f"{self.best} steps (whole model {self.whole_nll:.3f}); {self.kl_removed:.0%} of the KL is taken back"
        )
        return plots.lines(rows, "step", "value", color="what", title=title, x_title="step", y_title="nats per token")
