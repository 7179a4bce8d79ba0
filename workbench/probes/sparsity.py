"""How many weights does a model need? Zeros by several methods, with random ones as the control.

Calibration texts tell the methods what the matrices read; held-out ones judge: loss, KL(dense || sparse), the relative
error |x W'^T - x W^T| / |x W^T| of every matrix, answers, and the bytes of a bitmap file. Sources: as in `Sparsify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.generation import text_of
from workbench.methods.pruning.curves import Trial, as_prompt, chunks, compare
from workbench.methods.pruning.inputs import linears_in, output_errors
from workbench.methods.pruning.sparse_loss import SparsityLossResult
from workbench.methods.pruning.sparsity import BY, By
from workbench.methods.relations.facts import ask
from workbench.probe import Expectation, Planted, Probe
from workbench.pruned.bitmap import bitmap_sizes
from workbench.pruned.units import rows_of
from workbench.toggles.sparsify import Sparsify

if TYPE_CHECKING:
    from workbench.subject import Subject

BASE_BYTES = 1 << 30  # predictions of the dense side in memory while settings come and go


@dataclass(frozen=True)
class SparsityLoss(Probe):
    """What zeros cost. Data: a Trial (texts to calibrate on, others to judge, questions), or at least two texts, of
    which every second one judges.

    sparsities   shares of zeros        patterns   "n:m" patterns, beside them
    by           methods, each at every share and pattern
    like         a Sparsify whose other settings all have: propagate, refit, block, permute
    """

    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7)
    patterns: tuple[str, ...] = ()
    by: tuple[By, ...] = BY
    like: Sparsify = field(default_factory=Sparsify)
    seed: int = 0

    def measure(self, subject: Subject, data: Any) -> SparsityLossResult:
        trial = Trial.of(data)
        if not all(isinstance(text, str) for text in trial.calibration):
            raise ValueError("SparsityLoss: got token ids to calibrate on, expected texts, which a Sparsify can hold.")
        toggles = self.toggles(tuple(trial.calibration))
        dense = {
            name: rows_of(module)
            for layer in range(subject.n_layers)
            for name, module in linears_in(subject, layer).items()
        }
        return SparsityLossResult(
            by=tuple(toggle.by for toggle in toggles),
            asked=tuple(toggle.pattern or f"{100 * toggle.share:.3g}%" for toggle in toggles),
            dense=np.array([weight.nbytes for weight in dense.values()], dtype=np.float64),
            numbers=np.array([weight.numel() for weight in dense.values()], dtype=np.float64),
            linears=tuple(dense),
            task=np.repeat(np.arange(len(trial.questions)), [len(items) for items in trial.questions.values()]),
            tasks=tuple(trial.questions),
            seed=self.seed,
            **self._compared(subject, toggles, trial, dense),
        )

    def _compared(
        self, subject: Subject, toggles: list[Sparsify], trial: Trial, dense: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Predictions, outputs and answers of every setting against those without zeros."""
        ids = [list(row) for row in subject.tokenize(trial.held_out).ids]
        if min(map(len, ids)) < 2:
            raise ValueError("SparsityLoss: a held-out text has 1 token, expected at least two.")
        prompts = [as_prompt(item) for items in trial.questions.values() for item in items]
        nll, kl = np.zeros((2, len(toggles), len(ids)))
        base_nll = np.zeros(len(ids))
        lost, whole = np.zeros((2, len(toggles), len(dense), len(ids)))
        zeros, packed = np.zeros((2, len(toggles), len(dense)))
        right, base_right = np.zeros((len(toggles), len(prompts)), dtype=bool), np.zeros(len(prompts), dtype=bool)
        if prompts:
            base_right = ask(subject, prompts).exact
        for rows in chunks(ids, subject.anatomy.vocab, BASE_BYTES):
            chunk = [ids[row] for row in rows]
            base = {i: logprobs.cpu() for i, _, logprobs in subject.predictions(chunk)}
            base_nll[rows] = [compare(base[i], base[i], row)[0] for i, row in enumerate(chunk)]
            for number, toggle in enumerate(toggles):
                with subject.under(toggle):
                    for i, row, logprobs in subject.predictions(chunk):
                        nll[number, rows[i]], kl[number, rows[i]] = compare(base[i], logprobs.cpu(), row)
                    lost[number][:, rows], whole[number][:, rows] = output_errors(subject, chunk, dense)
                    if rows[0] == 0:  # what no text decides is found once
                        sizes = bitmap_sizes({name: rows_of(subject.model.get_submodule(name)) for name in dense})
                        zeros[number], packed[number] = sizes["sparsity"], sizes["bitmap_bytes"]
                        right[number] = ask(subject, prompts).exact if prompts else False
        arrays = {"nll": nll, "kl": kl, "base_nll": base_nll, "n_tokens": np.array([len(row) - 1.0 for row in ids])}
        arrays |= {"lost": lost, "whole": whole, "zeros": zeros, "packed": packed}
        return arrays | {"right": right, "base_right": base_right}

    def toggles(self, texts: tuple[str, ...]) -> list[Sparsify]:
        """One toggle per setting, calibrated on these texts."""
        amounts: list[dict[str, Any]] = [{"sparsity": share, "pattern": None} for share in self.sparsities]
        amounts += [{"sparsity": None, "pattern": pattern} for pattern in self.patterns]
        if not amounts or not self.by:
            raise ValueError("SparsityLoss: got no share, no pattern or no method, expected at least one setting.")
        return [
            replace(self.like, **amount, by=by, texts=texts, seed=self.seed) for by in self.by for amount in amounts
        ]

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Half of the inputs of every matrix are always zero, under the largest weights: superfluous to the bit."""
        return _planted(cls(sparsities=(0.5,), seed=seed), seed, superfluous=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same model with all its inputs: no half of the weights can go without a loss."""
        return _planted(cls(sparsities=(0.5,), seed=seed), seed, superfluous=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[SparsityLoss, list[str]]:
        texts = [text_of(subject.tokenizer, range(start, start + 10)) for start in (8, 18, 28, 38)]
        return cls(sparsities=(0.5,), patterns=("2:4",)), texts


# A model whose truth is known


def superfluous_subject(seed: int, superfluous: bool = True) -> Subject:
    """A random model in which half of the inputs of every matrix are zero for every text, under threefold weights."""
    from workbench.subject import Subject

    subject = Subject.tiny("llama", seed, verify=False)
    if not superfluous:
        return subject
    model: Any = subject.model
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[::2] = 0.0
            attention.v_proj.weight[::2] = 0.0  # what the output projection reads
            mlp.up_proj.weight[::2] = 0.0
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(attention, name).weight[:, ::2] *= 3.0
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(mlp, name).weight[:, ::2] *= 3.0
    return subject


def _planted(probe: SparsityLoss, seed: int, *, superfluous: bool) -> Planted:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(8, 1000, (12, 12))

    def solve() -> SparsityLossResult:
        subject = superfluous_subject(seed, superfluous)
        return probe.measure(subject, [text_of(subject.tokenizer, row.tolist()) for row in drawn])

    def read(by: str, measure: str) -> Callable[[Any], float]:
        return lambda result: result.value(by, "50%", measure)

    costs = (0.01, np.inf)
    free = (0.0, 1e-9) if superfluous else costs  # what is removed is multiplied by zero: no rounding differs
    repaired = (0.0, 1e-6) if superfluous else costs  # SparseGPT rewrites what is left, in float32
    name = "half of the weights superfluous" if superfluous else "no weight superfluous"
    spans = {"wanda": free, "sparsegpt": repaired, "magnitude": costs, "random": costs}
    expectations = [Expectation(f"kl by {by}", read(by, "kl"), *span) for by, span in spans.items()]
    error = (0.0, 1e-9) if superfluous else (0.1, 1.0)
    expectations.append(Expectation("output_error by wanda", read("wanda", "output_error"), *error))
    return Planted(name, {"ids": drawn}, solve, tuple(expectations))
