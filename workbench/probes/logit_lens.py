"""What does each layer say? Every layer's state read through the final norm and the unembedding, at any position.

p_l = softmax(W_U norm(h_l)); reported are KL(p_L || p_l), entropy, and the rank in p_l of the final top token.
Source: nostalgebraist, 2020, "interpreting GPT: the logit lens"; `lens` also takes a tuned one (Belrose et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from workbench.generation import text_of
from workbench.methods.lens.lens import ReadOut, grouped, lens_sites, read_out, rows_held
from workbench.methods.lens.read_outs import ReadOutResult
from workbench.methods.lens.tuned_lens import lens_named
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.unembedding import Unembedding

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class LogitLens(Probe):
    """Reads texts out layer by layer. Data: a list of texts.

    positions   "all" tokens of each text, or its "last" one
    k           top tokens kept per layer and position
    lens        "logit", or the path of a saved TunedLens
    cut         cut texts to the context instead of raising
    """

    positions: Literal["all", "last"] = "all"
    k: int = 5
    lens: str = "logit"
    cut: bool = False
    n_bootstrap: int = 2000
    seed: int = 0

    bounds: ClassVar[Bounds] = {"k": 1, "n_bootstrap": 1}

    def measure(self, subject: Subject, data: Sequence[str]) -> ReadOutResult:
        lengths = subject.tokenize(data, cut=self.cut).lengths
        texts, unembedding = list(data), Unembedding.of(subject)
        name, lens = lens_named(self.lens, unembedding)
        at, found, where = lens_sites(subject.n_layers), [], []
        for group in grouped(lengths if self.positions == "all" else [1] * len(texts), rows_held(subject)):
            seen = subject.capture(texts[group], at, tokens=self.positions, cut=self.cut, progress=False)
            found.append(read_out([seen[site] for site in at], lens, k=self.k))
            where.append(torch.stack([seen.text + group.start, seen.position, seen.ids]).numpy())
        return self._result(found, np.concatenate(where, axis=1), name, unembedding.words)

    def _result(self, found: Sequence[ReadOut], where: np.ndarray, lens: str, spell: Any) -> ReadOutResult:
        """The parts joined; `where` (3, row) holds text, position and token id, `spell` turns ids to texts."""
        names = ("kl", "entropy_bits", "rank", "top_ids", "top_probability")
        arrays = {name: np.concatenate([getattr(part, name) for part in found], axis=1) for name in names}
        used = sorted({*where[2].tolist(), *arrays["top_ids"].ravel().tolist()})
        rest = {"lens": lens, "n_bootstrap": self.n_bootstrap, "seed": self.seed}
        rest |= {"vocabulary": dict(zip(used, spell(used), strict=True))}
        return ReadOutResult(**arrays, text=where[0], position=where[1], ids=where[2], **rest)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Nothing in layers 0-1, another token in 2-4, the final one in 5-7: every measure is known exactly."""
        world = World.of(seed, signal=True)
        expected = (
            Expectation("entropy of layers 0-1 (bits)", _mean("entropy_bits", 0, 2), BITS - 1e-4, BITS + 1e-4),
            Expectation("KL of layers 0-1 plus final entropy (bits)", _uniform_kl, BITS - 1e-4, BITS + 1e-4),
            Expectation("agreement in layers 2-4", _mean("agreement", 2, 5), 0.0, 0.02),
            Expectation("agreement in layers 5-7", _mean("agreement", 5, 8), 1.0, 1.0),
            Expectation("KL of the last layer", _mean("kl", 7, 8), 0.0, 0.0),
        )
        return Planted("planted", world.arrays, lambda: world.solved(cls(seed=seed)), expected)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Unrelated states in every layer: the final top token is anywhere in the ranking, until the last layer."""
        world = World.of(seed, signal=False)
        expected = (
            Expectation("agreement before the last layer", _mean("agreement", 0, 7), 0.0, 0.02),
            Expectation("mean rank before the last layer, of 200", _mean("rank", 0, 7), 90.0, 111.0),
            Expectation("rank in the last layer", _mean("rank", 7, 8), 1.0, 1.0),
            Expectation("KL of the last layer", _mean("kl", 7, 8), 0.0, 0.0),
        )
        return Planted("null", world.arrays, lambda: world.solved(cls(seed=seed)), expected)

    @classmethod
    def example(cls, subject: Subject) -> tuple[LogitLens, list[str]]:
        spans = range(8, 17), range(17, 22), range(22, 36)
        return cls(k=3, n_bootstrap=100), [text_of(subject.tokenizer, span) for span in spans]


V, D_MODEL, N_LAYERS, N_ROWS = 200, 64, 8, 160
BITS = float(np.log2(V))


@dataclass(frozen=True)
class World:
    """States of 8 layers with known tokens in them, read by unit rows after an RMS norm, logits doubled.

    rows (V, d_model)   states (layer, row, d_model)   said (row, 2): the token of the middle layers, the final one
    """

    rows: Tensor
    states: Tensor
    said: Tensor

    @classmethod
    def of(cls, seed: int, *, signal: bool) -> World:
        draw = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(V, D_MODEL, generator=draw), dim=-1)
        said = torch.stack([torch.randperm(V, generator=draw)[:2] for _ in range(N_ROWS)])  # never the same token
        states = 3 * torch.stack([rows[said[:, 0 if layer < 5 else 1]] for layer in range(N_LAYERS)])
        states[:2] = 0.0
        return cls(rows, states if signal else torch.randn(states.shape, generator=draw), said)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"rows": self.rows.numpy(), "states": self.states.numpy(), "said": self.said.numpy()}

    def logits(self, _: int, states: Tensor) -> Tensor:
        return 2 * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) @ self.rows.T

    def solved(self, probe: LogitLens) -> ReadOutResult:
        """What `probe` finds in sixteen simulated texts."""
        found = read_out(list(self.states), self.logits, k=probe.k)
        row = np.arange(N_ROWS)
        where = np.stack([row // 10, row % 10, self.said[:, 1].numpy()])
        return probe._result([found], where, probe.lens, lambda ids: [f"t{index}" for index in ids])


def _mean(name: str, first: int, end: int) -> Any:
    return lambda found: float(getattr(found, name)[first:end].mean())


def _uniform_kl(found: Any) -> float:
    """KL(p || uniform) = log V - H(p): with the final entropy it is log2 V in bits."""
    return float((found.kl[:2] / np.log(2) + found.entropy_bits[-1]).mean())
