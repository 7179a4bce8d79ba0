"""The unembedding: what turns a residual vector into a score per token, found in any decoder and proved on it.

logits = cap(s (W_U norm(h) + b)); cap(z) = c tanh(z / c) where the model has one (Gemma-2), s a fixed scale (Cohere).
Source: nostalgebraist, 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench import fused
from workbench.anatomy import add_tap
from workbench.site import Site

if TYPE_CHECKING:
    from workbench.subject import Subject

PROOF_ATOL = 1e-4  # float32, on logits of order 10; measured 0.0 on ten families


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The final norm and the output matrix of a subject. Make one with `Unembedding.of(subject)`.

    norm       the final norm, or None where the model has none
    head       the output projection, its weight (vocab, d_model)
    scale      factor on the logits           soft_cap   bound of the logits, or None
    It reads the modules when called, so it obeys toggles that swap their parameters.
    """

    subject: Subject
    norm: nn.Module | None
    head: nn.Linear
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, subject: Subject) -> Unembedding:
        """Find and prove it: the last layer's read-out must be the model's own logits.

        Raises ValueError where no final norm of the model gives its logits.
        """
        head = cast(nn.Linear | None, subject.model.get_output_embeddings())
        if head is None or not isinstance(getattr(head, "weight", None), Tensor):
            raise ValueError(f"Unembedding: {subject.name} has no output matrix, expected a causal language model.")
        config = subject.model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        cap = getattr(config, "final_logit_softcapping", None)
        hidden, logits = _one_forward(subject)
        errors = {}
        for name, norm in _candidates(subject):
            made = cls(subject, norm, head, scale, cap)
            errors[name] = float((made.logits(hidden) - logits).abs().max())
            if errors[name] <= made._tolerance(logits):
                return made
        raise ValueError(
            f"Unembedding: none of {', '.join(errors)} of {subject.name} turns the last block's output into "
            f"its logits (smallest difference {min(errors.values()):.3g}). This read-out would be of another model."
        )

    def _tolerance(self, logits: Tensor) -> float:
        low = self.subject.dtype in (torch.float16, torch.bfloat16)
        return PROOF_ATOL * max(1.0, float(logits.abs().max()) / 10) * (2000 if low else 1)

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of every token in float32 for residual vectors that come out of a block."""
        value = hidden.to(self.head.weight.device, self.head.weight.dtype)
        raw = self.head(value if self.norm is None else self.norm(value)).float() * self.scale
        return raw if self.soft_cap is None else self.soft_cap * torch.tanh(raw / self.soft_cap)

    @property
    def weight(self) -> Float[Tensor, "vocab d_model"]:
        """The rows of the output matrix, as the model holds them."""
        return self.head.weight.detach()

    @property
    def norm_weight(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies each coordinate by, float32; ones without a norm."""
        ones = torch.ones(self.weight.shape[1], device=self.weight.device)
        return ones if self.norm is None else norm_weight(self.norm, like=ones)

    @functools.cached_property
    def is_token(self) -> Bool[Tensor, " vocab"]:
        """False for rows that stand for no token (a vocabulary rounded up) and for special tokens."""
        known = torch.zeros(self.weight.shape[0], dtype=torch.bool)
        tokenizer = self.subject.tokenizer
        ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        known[[index for index in ids if index < len(known)]] = True
        return known

    def words(self, ids: Sequence[int]) -> list[str]:
        """Each token id as readable text, leading spaces kept."""
        return [str(self.subject.tokenizer.decode([int(index)])) for index in ids]


@torch.no_grad()
def norm_weight(norm: nn.Module, like: Tensor) -> Float[Tensor, " d_model"]:
    """What a norm multiplies each coordinate by, measured: Gemma's 1 + w, LayerNorm's w, whatever the class.

    A vector of mean 0 and mean square 1 passes every norm unscaled but for its weight; +x and -x cancel the bias.
    """
    width = like.numel()
    probe = torch.ones(width)
    probe[1::2] = -1.0
    if width % 2:  # the last three sum to 0 as well
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    weight = next(norm.parameters(), like)
    probe = probe.to(weight.device, weight.dtype)
    rms = probe.float().square().mean().sqrt()
    return (norm(probe[None, None]) - norm(-probe[None, None]))[0, 0].float() / 2 * rms / probe.float()


def top_tokens(
    vectors: Float[Tensor, "n d_model"],
    rows: Float[Tensor, "vocab d_model"],
    k: int,
    *,
    allowed: Bool[Tensor, " vocab"] | None = None,
    negated: bool = False,
    chunk: int = 8192,
    at_once: int = 2048,
) -> tuple[Float[Tensor, "*sign n k"], Int[Tensor, "*sign n k"]]:
    """(scores, ids) of the k rows with the largest product with each vector; ties go to the smaller id.

    negated   also those of each vector times -1, from the same products: both answers are then (2, n, k)
    Streams over the vocabulary and the vectors: never more than (at_once, chunk) products at a time; on CUDA none.
    """
    n_tokens = rows.shape[0] if allowed is None else int(allowed.sum())
    if not 1 <= k <= n_tokens:
        raise ValueError(f"top_tokens: got k={k}, expected 1 to the number of tokens, {n_tokens}.")
    by_kernel = fused.top_tokens(vectors, rows, k, allowed=allowed, negated=negated)
    if by_kernel is not None:
        return by_kernel
    scores = vectors.new_empty((1 + negated, len(vectors), k))
    ids = torch.empty(scores.shape, dtype=torch.long, device=vectors.device)
    for first in range(0, len(vectors), at_once):
        some = slice(first, first + at_once)
        best: list[tuple[Tensor, Tensor]] = [(scores[0, some, :0], ids[0, some, :0])] * (1 + negated)
        for start, products in _products(vectors[some], rows, chunk):
            barred = None if allowed is None else ~allowed[start : start + products.shape[1]].to(products.device)
            for i, sign in enumerate((1, -1)[: len(best)]):
                if barred is not None:
                    products.masked_fill_(barred, -sign * torch.inf)
                best[i] = _merged(best[i], _largest(products, k, sign), start, k)
        for i, (values, found) in enumerate(best):
            scores[i, some], ids[i, some] = values, found
    return (scores, ids) if negated else (scores[0], ids[0])


def _products(vectors: Tensor, rows: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, rows.shape[0], chunk):
        yield start, vectors @ rows[start : start + chunk].to(vectors.dtype).T


def _largest(products: Tensor, k: int, sign: int) -> tuple[Tensor, Tensor]:
    """(values, columns) of the k largest of sign times each row: a stable sort's head, at the price of a selection."""
    values, columns = products.topk(min(k + 1, products.shape[1]), dim=1, largest=sign > 0)
    columns, order = columns.sort(dim=1)
    values, order = (sign * values).gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if values.shape[1] > k:  # where the next one is as large, topk took any of them
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        if len(tied):
            columns[tied] = (sign * products[tied]).sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
    return values[:, :k], columns[:, :k]


def _merged(best: tuple[Tensor, Tensor], here: tuple[Tensor, Tensor], start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of those so far and those of a chunk; stable: the smaller ids, which came first, stay first."""
    ids = torch.cat([best[1], here[1] + start], 1)
    values, order = torch.cat([best[0], here[0]], 1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k])


def _one_forward(subject: Subject) -> tuple[Tensor, Tensor]:
    """The last block's output and the model's logits on a few tokens, without toggles."""
    ids = torch.arange(1, 9, device=subject.device)[None] % subject.anatomy.vocab
    site = Site(subject.n_layers - 1, "resid_out")
    seen: list[Tensor] = []
    with subject.untoggled(), ExitStack() as undo, torch.no_grad():
        add_tap(subject.model, subject.anatomy, site, lambda value: seen.append(value.clone()), undo)
        logits = subject.model(input_ids=ids, use_cache=False).logits.float()
    return seen[0], logits


def _candidates(subject: Subject) -> Iterator[tuple[str, nn.Module | None]]:
    """The trunk's own children that take a vector and give one back, last first; then no norm at all."""
    trunk = subject.model.get_submodule(subject.anatomy.trunk) if subject.anatomy.trunk else subject.model
    blocks = subject.model.get_submodule(subject.anatomy.blocks)
    children = [(name, child) for name, child in trunk.named_children() if child is not blocks]
    for name, child in reversed(children):
        vectors = [p for p in child.parameters() if p.dim() == 1 and len(p) == subject.anatomy.d_model]
        if vectors and len(vectors) == len(list(child.parameters())):
            yield name, child
    yield "no norm", None
