"""Sparsify: single weights of the blocks' matrices become zero; those that are left may make up for them.

The matrices keep their shape: nothing runs faster and no memory comes free. What is gained is a smaller file
(`workbench.pruned.bitmap`) and an answer to how many weights are needed. Sources: Wanda, Sun et al., 2023
(arXiv 2306.11695); SparseGPT, Frantar and Alistarh, 2023 (arXiv 2301.00774); what is ours is told in
`workbench.methods.pruning`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.discovery import is_linear
from workbench.loading import weights_state
from workbench.methods.pruning.inputs import input_moments, linears_in, others_in
from workbench.methods.pruning.sparsegpt import ORDERS, Order, sparsegpt
from workbench.methods.pruning.sparsity import (
    BY,
    By,
    Per,
    chance,
    lowest,
    lowest_in_groups,
    magnitude,
    read_pattern,
    refitted,
    wanda,
)
from workbench.pruned.cut import plain_weight
from workbench.pruned.units import rows_of
from workbench.swap import swap_weight
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class Sparsify(Toggle):
    """Zeros in every linear inside the blocks; embeddings, output matrix, norms and biases stay as they are.

    sparsity    share of zeros; None where a pattern tells, or for one half
    pattern     "n:m": n zeros among every m consecutive inputs of a row; a rest of fewer than m inputs stays dense
    by          magnitude: the smallest of a matrix · wanda: those of a row that are smallest times the size of their
                input · sparsegpt: the same with repair of what is left · random: the control
    texts       what wanda, sparsegpt and a refit read to know the inputs, without a cache and as other toggles make it
    propagate   a block reads what the sparse blocks before it make of the texts; False: what the dense ones make
    refit       after choosing the zeros, the least-squares optimum of what is left: for small matrices
    block       columns that sparsegpt decides upon together        permute   the order in which it sweeps them
    Zeros are computed block by block when the toggle is first entered on a subject, and remembered for it.
    """

    sparsity: float | None = None
    pattern: str | None = None
    by: By = "magnitude"
    texts: tuple[str, ...] = ()
    propagate: bool = True
    refit: bool = False
    block: int = 128
    permute: Order = "random"
    seed: int = 0

    precedes: ClassVar[frozenset[str]] = frozenset({"ffn.experts"})
    in_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise ValueError(f"Sparsify: got texts={self.texts[:30]!r}, expected several texts. Write (text,).")
        object.__setattr__(self, "texts", tuple(self.texts))
        if self.by not in BY:
            raise ValueError(f"Sparsify: got by={self.by!r}, expected one of {', '.join(BY)}.")
        if self.pattern is not None:
            read_pattern(self.pattern)
            if self.sparsity is not None:
                raise ValueError(
                    f"Sparsify: got sparsity={self.sparsity} and pattern={self.pattern!r}, expected one of the two."
                )
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"Sparsify: got sparsity={self.sparsity}, expected a share of zeros from 0 to 1.")
        if self.reads_texts and not self.texts:
            what = f"by={self.by!r}" if self.by in ("wanda", "sparsegpt") else "refit=True"
            raise ValueError(f"Sparsify: got {what} without texts, expected texts that tell the inputs: texts=(...).")
        if self.permute not in ORDERS:
            raise ValueError(f"Sparsify: got permute={self.permute!r}, expected one of {', '.join(ORDERS)}.")
        if self.block < 1:
            raise ValueError(f"Sparsify: got block={self.block}, expected at least 1 column.")

    @property
    def share(self) -> float:
        """The share of zeros that is asked for."""
        if self.pattern is not None:
            n, m = read_pattern(self.pattern)
            return n / m
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def reads_texts(self) -> bool:
        return self.by in ("wanda", "sparsegpt") or self.refit

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.share == 0:
            return
        found = subject.remember(self._key(subject), lambda: self._zeros(subject))
        if not found:
            raise ValueError(f"Sparsify: no linear inside the blocks of {subject.name} runs by now. Leave it out.")
        n_zeros = n_weights = 0
        for name, zeros in found.items():
            module = subject.model.get_submodule(name)
            weight = zeros.put_into(_rows(module))
            _swap_rows(module, weight, undo)
            n_zeros, n_weights = n_zeros + int((weight == 0).sum()), n_weights + weight.numel()
        subject.count_forwards(undo)
        subject.receipt.fired = subject.receipt.fired or len(found)  # swapped parameters: saving them is a use as well
        subject.receipt.notes[:] = [
            f"{n_zeros / max(1, n_weights):.2%} of {n_weights:,} weights in {len(found)} matrices are zero",
            *self._notes(subject, found),
        ]

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        texts = ("the code is alpha beta gamma delta . recall the code : alpha beta gamma delta .",)
        return cls(0.5), cls(pattern="2:4", by="wanda", texts=texts), cls(0.6, by="sparsegpt", texts=texts)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(0.0)

    def __str__(self) -> str:
        what = f"{self.share:.0%}" if self.pattern is None else self.pattern
        refit = ", refitted" if self.refit else ""
        return f"Sparsify({what} by {self.by}{refit})"

    # Computing

    def _key(self, subject: Subject) -> Hashable:
        """What decides the zeros."""
        return self, subject.active[:-1], *weights_state(subject.model)

    def _zeros(self, subject: Subject) -> dict[str, _Zeros]:
        """For every matrix which weights stay and, where they were repaired, what they become."""
        ids = subject.tokenize(self.texts).ids if self.reads_texts else []
        alone = self.reads_texts and (self.propagate or self.by == "sparsegpt" or self.refit)
        layers = list(range(subject.n_layers))
        groups = [[layer] for layer in layers] if alone else [layers]  # only squares of inputs fit for all at once
        found: dict[str, _Zeros] = {}
        with ExitStack() as undo, torch.no_grad():
            for group in tqdm(groups, desc="sparsify", unit="block", delay=2):
                linears = {name: one for layer in group for name, one in linears_in(subject, layer).items()}
                moments: Mapping[str, Tensor] = {}
                if self.reads_texts:
                    whole = self.by == "sparsegpt" or self.refit
                    moments = input_moments(subject, ids, linears, group[-1], whole=whole)
                    linears = {name: one for name, one in linears.items() if name in moments}
                for name, module in linears.items():
                    found[name] = self._zeros_of(_rows(module), moments.get(name), len(found))
                for name, module in linears.items() if self.propagate and self.reads_texts else ():
                    _swap_rows(module, found[name].put_into(_rows(module)), undo)
        return found

    def _zeros_of(self, weight: Tensor, moment: Tensor | None, number: int) -> _Zeros:
        """The zeros of one matrix (out, in), the `number`-th, from the moment of its inputs."""
        pattern = None if self.pattern is None else read_pattern(self.pattern)
        if self.by == "sparsegpt":
            assert moment is not None
            options = {"pattern": pattern, "block": self.block, "permute": self.permute, "seed": self.seed}
            made = sparsegpt(weight, moment, self.share, **options)
            removed = made == 0
        else:
            scores = self._scores(weight, moment, number)
            per: Per = "row" if self.by == "wanda" else "matrix"
            removed = lowest(scores, self.share, per=per) if pattern is None else lowest_in_groups(scores, *pattern)
            made = None
        if self.refit:
            assert moment is not None
            made = refitted(weight, removed, moment)
        return _Zeros.of(~removed, None if made is None else made.to(weight.dtype))

    def _scores(self, weight: Tensor, moment: Tensor | None, number: int) -> Tensor:
        if self.by == "random":
            return chance(weight, self.seed, number)
        if self.by == "magnitude":
            return magnitude(weight)
        assert moment is not None
        squares = moment.diagonal() if moment.dim() == 2 else moment
        if not torch.isfinite(squares).all():
            raise ValueError("Sparsify: the inputs of a matrix are NaN or infinite on these texts. Read other texts.")
        return wanda(weight, squares)

    def _notes(self, subject: Subject, found: Mapping[str, _Zeros]) -> list[str]:
        """What stays dense although it lies in the blocks."""
        layers = range(subject.n_layers)
        notes = []
        others = {name: value for layer in layers for name, value in others_in(subject, layer).items()}
        if others:
            names = ", ".join(sorted({name.rpartition(".")[0].rpartition(".")[2] for name in others}))
            size = sum(value.numel() for value in others.values())
            notes.append(f"{size:,} weights that no linear holds stay dense ({names})")
        blocks = (subject.model.get_submodule(f"{subject.anatomy.blocks}.{layer}") for layer in layers)
        idle = sum(is_linear(module) for block in blocks for module in block.modules()) - len(found)
        if idle:
            notes.append(f"{idle} matrices that read nothing stay dense")
        if self.pattern is not None:
            _, m = read_pattern(self.pattern)
            tails = sum(zeros.shape[1] % m > 0 for zeros in found.values())
            notes += [f"in {tails} matrices the last inputs, fewer than {m}, stay dense"] if tails else []
        return notes


@dataclass(frozen=True, eq=False)
class _Zeros:
    """Which weights of a matrix stay, one bit each, and what they become; None: what they are."""

    shape: tuple[int, ...]
    bits: np.ndarray
    values: Tensor | None

    @classmethod
    def of(cls, kept: Tensor, made: Tensor | None) -> _Zeros:
        return cls(tuple(kept.shape), np.packbits(kept.cpu().numpy()), None if made is None else made[kept])

    def put_into(self, weight: Tensor) -> Tensor:
        """A copy of the weight (out, in) with these zeros."""
        bits = np.unpackbits(self.bits, count=weight.numel()).reshape(self.shape)
        kept = torch.from_numpy(bits.astype(bool)).to(weight.device)
        if self.values is None:
            return weight.masked_fill(~kept, 0.0)
        return torch.zeros_like(weight).masked_scatter_(kept, self.values.to(weight))


def _rows(module: nn.Module) -> Tensor:
    """The weight of a projection as (out, in); ValueError where it is packed or elsewhere."""
    plain_weight(module)
    return rows_of(module)


def _swap_rows(module: nn.Module, rows: Tensor, undo: ExitStack) -> None:
    swap_weight(module, "weight", rows if isinstance(module, nn.Linear) else rows.T, undo)  # Conv1D holds (in, out)
