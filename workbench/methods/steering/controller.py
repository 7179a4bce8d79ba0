"""A small network that reads a prompt and says how strongly to steer it, and in which layers.

(a, b) = W2 relu(W1 x + b1) + b2, x the values read at the prompt's last token, K edited sites
corrected   s = sigmoid(a), w = K softmax(b): how strongly, and spread how over the sites
paper       s = a, w = sigmoid(b): s is negative for prompts to be left alone, which steers them the other way
Source: Hegazy et al., 2025, "Guiding Giants" (arXiv 2505.20309). Its training is in `controller_training.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from workbench.files import write_atomically
from workbench.site import Site
from workbench.stats import auc

Mode = Literal["corrected", "paper"]
TENSORS = ("centre", "scale", "w1", "b1", "w2", "b2")


@dataclass(frozen=True, eq=False, repr=False)
class Controller:
    """From what is read of a prompt to a strength and a weight per edited site.

    reads    sites read, at the prompt's last token        edits    sites that get a weight
    centre, scale  (d,) subtracted from and divided out of what is read, d the widths of `reads` together
    w1, b1   (d_hidden, d), (d_hidden,)                     w2, b2   (1 + K, d_hidden), (1 + K,)
    model    fingerprint of the subject it was trained on; refused on another. None: taken anywhere
    """

    reads: tuple[Site, ...]
    edits: tuple[Site, ...]
    centre: Tensor
    scale: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    mode: Mode = "corrected"
    model: str | None = None

    def __post_init__(self) -> None:
        for name in TENSORS:
            value = torch.as_tensor(getattr(self, name)).detach().float().cpu().clone()
            if not torch.isfinite(value).all():
                raise ValueError(f"Controller: {name} holds NaN or infinity, expected finite numbers.")
            object.__setattr__(self, name, value)
        d, hidden, outputs = len(self.centre), len(self.b1), 1 + len(self.edits)
        expected = ((d,), (d,), (hidden, d), (hidden,), (outputs, hidden), (outputs,))
        got = tuple(tuple(getattr(self, name).shape) for name in TENSORS)
        if got != expected:
            raise ValueError(
                f"Controller: got tensors of shapes {got}, expected {expected} for {len(self.edits)} edits."
            )

    @classmethod
    def random(
        cls, reads: Sequence[Site], edits: Sequence[Site], d: int, *, mode: Mode = "corrected", seed: int = 0
    ) -> Controller:
        """An untrained controller that reads `d` numbers: the control of any trained one."""
        layers = fresh_layers(d, len(edits), 16, torch.Generator().manual_seed(seed))
        return cls(tuple(reads), tuple(edits), torch.zeros(d), torch.ones(d), *layers.values(), mode=mode)

    def __call__(self, values: Float[Tensor, "row d"]) -> tuple[Float[Tensor, " row"], Float[Tensor, "row site"]]:
        """Strength and weight per edited site of each row, from that row alone."""
        logits, weights = outputs({name: getattr(self, name).to(values.device) for name in TENSORS}, values, self.mode)
        return (logits.sigmoid() if self.mode == "corrected" else logits), weights

    def table(self, values: Float[Tensor, "row d"], wanted: Sequence[bool] | np.ndarray) -> pd.DataFrame:
        """What it does on some rows: layer, kind, weight, gate, gate_others, gate_auc; one row per edited site.

        The weight is the mean over wanted rows; a gate is the mean strength of wanted rows and of the others.
        """
        strengths, weights = self(values)
        want = np.asarray(wanted, dtype=bool)
        rows = torch.as_tensor(want)
        table = pd.DataFrame([(site.layer, site.kind) for site in self.edits], columns=["layer", "kind"])
        return table.assign(
            weight=weights[rows].mean(0).tolist(),
            gate=float(strengths[rows].mean()),
            gate_others=float(strengths[~rows].mean()),
            gate_auc=float(auc(strengths.double().numpy()[:, None], want)[0]),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Controller):
            return NotImplemented
        same = (self.reads, self.edits, self.mode, self.model) == (other.reads, other.edits, other.mode, other.model)
        return same and all(torch.equal(getattr(self, name), getattr(other, name)) for name in TENSORS)

    def __hash__(self) -> int:
        return hash((self.reads, self.edits, self.mode, self.model, self.b2.numpy().tobytes()))

    def __repr__(self) -> str:
        reads, edits = (", ".join(map(str, sites)) for sites in (self.reads, self.edits))
        return f"Controller({self.mode}, reads {reads}, edits {edits}, {len(self.b1)} hidden)"

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file and return its path."""
        facts = {"reads": list(map(str, self.reads)), "edits": list(map(str, self.edits))}
        facts |= {"mode": self.mode, "model": self.model}
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        write_atomically(Path(path), save(tensors, {"controller": json.dumps(facts)}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Controller:
        """The controller that `save` wrote; ValueError where the file holds something else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = (file.metadata() or {}).get("controller")
                tensors = {name: file.get_tensor(name) for name in TENSORS} if facts else {}
        except SafetensorError as error:
            raise ValueError(
                f"Controller.load: {path} can't be read ({error}), expected a file that save wrote."
            ) from None
        if facts is None:
            raise ValueError(f"Controller.load: {path} holds no controller, expected a file that save wrote.")
        made = json.loads(facts)
        reads, edits = (tuple(map(Site.parse, made[name])) for name in ("reads", "edits"))
        return cls(reads, edits, **tensors, mode=made["mode"], model=made["model"])


def outputs(state: dict[str, Tensor], values: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """Gate logit (row,) and weights (row, site) of the network with the tensors `state`."""
    x = (values.float() - state["centre"]) / state["scale"]
    hidden = torch.relu(functional.linear(x, state["w1"], state["b1"]))
    out = functional.linear(hidden, state["w2"], state["b2"])
    n_sites = out.shape[-1] - 1
    weights = out[:, 1:].softmax(-1) * n_sites if mode == "corrected" else out[:, 1:].sigmoid()
    return out[:, 0], weights


def fresh_layers(d: int, n_sites: int, d_hidden: int, chance: torch.Generator) -> dict[str, Tensor]:
    """The layers of an untrained network."""

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=chance) * 2 - 1) / shape[-1] ** 0.5

    return {
        "w1": uniform(d_hidden, d),
        "b1": torch.zeros(d_hidden),
        "w2": uniform(1 + n_sites, d_hidden),
        "b2": torch.zeros(1 + n_sites),
    }
