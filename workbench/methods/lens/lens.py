"""What each layer would say if the model stopped there: read-outs of its states through a lens, block by block.

p_l = softmax(lens(l, h_l)), L the last layer: KL(p_L || p_l) in nats, entropy in bits, rank in p_l of p_L's top token.
Sources: nostalgebraist, 2020, "interpreting GPT: the logit lens"; token energy after Wendler et al., 2024
(arXiv 2402.10588).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.site import Site

if TYPE_CHECKING:
    from workbench.capture import Selection
    from workbench.subject import Subject
    from workbench.tokens import Texts

# (layer, states (rows, d_model)) -> logits (rows, vocab) in float32. Layer l stands after l blocks, 0 is the embedding.
Lens = Callable[[int, Tensor], Tensor]
BLOCK_BYTES = 1 << 26  # of one (rows, vocab) block in float32; a handful of them live at a time
STATE_BYTES = 1 << 28  # of the states of all layers that are held at a time


@dataclass(frozen=True, eq=False)
class ReadOut:
    """What each layer says at each compared row, and how far that is from what the last layer says.

    kl                   (layer, row) KL(last || layer) in nats          entropy_bits   (layer, row)
    rank                 (layer, row) of the last layer's top token, 1 the best; ties go to the smaller id
    top_ids, top_probability   (layer, row, k) the most probable first; of equal tops the smallest id
    log_prob             (layer, pair) log-probability of the (row, token) pairs that were asked for
    """

    kl: Float[np.ndarray, "layer row"]
    entropy_bits: Float[np.ndarray, "layer row"]
    rank: Int[np.ndarray, "layer row"]
    top_ids: Int[np.ndarray, "layer row k"]
    top_probability: Float[np.ndarray, "layer row k"]
    log_prob: Float[np.ndarray, "layer pair"]


def lens_sites(n_layers: int) -> list[Site]:
    """Where the lens looks: the embedding, then the residual stream after each block; n_layers + 1 places."""
    return [Site(0, "resid_in"), *(Site(layer, "resid_out") for layer in range(n_layers))]


def states_of(subject: Subject, texts: Texts, tokens: Selection) -> list[Float[Tensor, "row d_model"]]:
    """The states of every layer at the chosen tokens, in the order of `subject.capture`."""
    at = lens_sites(subject.n_layers)
    captured = subject.capture(texts, at, tokens=tokens, progress=False)
    return [captured[site] for site in at]


def rows_held(subject: Subject) -> int:
    """How many rows of states of all layers make up STATE_BYTES."""
    return max(1, STATE_BYTES // (4 * subject.anatomy.d_model * (subject.n_layers + 1)))


def grouped(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Neighbours whose sizes sum to at most `limit`, or one that is larger alone."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > limit:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))


@torch.no_grad()
def read_out(
    states: Sequence[Float[Tensor, "row d_model"]],
    lens: Lens,
    *,
    k: int = 1,
    rows: Int[Tensor, " some"] | None = None,
    pairs: Int[Tensor, "pair 2"] | None = None,
    rows_at_once: int | None = None,
) -> ReadOut:
    """Read every row of every layer, in float32.

    rows    those that are compared with the last layer, in ascending order; None: all
    pairs   (row, token id), of any rows, whose log-probabilities are wanted as well
    Memory: a few (rows_at_once, vocab) blocks, whatever the number of layers and rows.
    """
    n_rows, vocab = len(states[-1]), lens(len(states) - 1, states[-1][:1]).shape[-1]
    pairs = torch.zeros((0, 2), dtype=torch.long) if pairs is None else pairs
    rows = torch.arange(n_rows) if rows is None else rows
    _check(states, pairs, vocab, k)
    shape = (len(states), len(rows))
    found = ReadOut(
        *(np.zeros(shape) for _ in range(2)),
        rank=np.zeros(shape, dtype=np.int64),
        top_ids=np.zeros((*shape, k), dtype=np.int64),
        top_probability=np.zeros((*shape, k)),
        log_prob=np.zeros((len(states), len(pairs))),
    )
    block = rows_at_once or max(1, BLOCK_BYTES // (4 * vocab))
    for start in range(0, n_rows, block):
        compared, asked = (_between(values, start, start + block) for values in (rows, pairs[:, 0]))
        here = rows[compared] - start
        last = lens(len(states) - 1, states[-1][start : start + block]).log_softmax(-1)  # (block, vocab)
        for layer, values in enumerate(states):
            final = layer == len(states) - 1
            logs = last if final else lens(layer, values[start : start + block]).log_softmax(-1)
            row, token = pairs[asked, 0] - start, pairs[asked, 1]
            found.log_prob[layer, asked.numpy()] = _numpy(logs[row.to(logs.device), token.to(logs.device)].double())
            if len(here):
                _reduce(found, layer, compared.numpy(), logs[here.to(logs.device)], last[here.to(logs.device)])
    return found


def _reduce(found: ReadOut, layer: int, at: np.ndarray, logs: Tensor, last: Tensor) -> None:
    """Everything that is kept of one layer's log-probabilities (row, vocab), at those rows of the result."""
    found.kl[layer, at] = _numpy((last.exp() * (last - logs)).sum(-1))
    found.entropy_bits[layer, at] = _numpy(torch.special.entr(logs.exp()).sum(-1) / math.log(2))
    top = last.argmax(-1, keepdim=True)
    own = logs.gather(1, top)
    before = torch.arange(logs.shape[1], device=logs.device) < top  # in bfloat16 ties at the top are common
    found.rank[layer, at] = _numpy(1 + (logs > own).sum(-1) + ((logs == own) & before).sum(-1))
    value, ids = logs.topk(found.top_ids.shape[-1])
    first = logs.argmax(-1, keepdim=True)  # the smallest of several equal tops, of which topk may take any
    ids = torch.cat([first, torch.where(ids == first, ids[:, :1], ids)[:, 1:]], dim=1)
    found.top_ids[layer, at] = _numpy(ids)
    found.top_probability[layer, at] = _numpy(value.exp())


def read_out_reference(states: Sequence[Tensor], lens: Lens) -> dict[str, np.ndarray]:
    """kl, entropy_bits and rank one row at a time, in float64: the slow and obvious version."""
    found = {name: np.zeros((len(states), len(states[-1]))) for name in ("kl", "entropy_bits", "rank")}
    for row in range(len(states[-1])):
        last = lens(len(states) - 1, states[-1][row : row + 1])[0].double().softmax(0)
        for layer, values in enumerate(states):
            p = lens(layer, values[row : row + 1])[0].double().softmax(0)
            found["kl"][layer, row] = sum(a * math.log(a / b) for a, b in zip(last.tolist(), p.tolist(), strict=True))
            found["entropy_bits"][layer, row] = -sum(a * math.log2(a) for a in p.tolist())
            order = p.sort(descending=True, stable=True).indices.tolist()
            found["rank"][layer, row] = 1 + order.index(int(last.argmax()))
    return found


@torch.no_grad()
def token_energy(
    rows: Float[Tensor, "vocab d_model"], *, chunk: int = 8192
) -> Callable[[Float[Tensor, "*row d_model"]], Float[Tensor, "*row"]]:
    """How much of a vector lies where tokens are: the rms over tokens of its cosine with them, in float64.

    rms_t cos(h, u_t)^2 = h' G h / |h|^2, G = mean_t u_t u_t' of the unit rows, so the vocabulary is streamed once for
    all vectors; divided by the mean of the same over the rows themselves. A zero vector has energy 0.
    """
    gram = torch.zeros((rows.shape[1], rows.shape[1]), dtype=torch.float64, device=rows.device)
    for part in rows.split(chunk):
        unit = torch.nn.functional.normalize(part.double(), dim=-1)
        gram += unit.T @ unit / len(rows)

    def rms(vectors: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(vectors.to(gram.device, torch.float64), dim=-1)
        return ((unit @ gram) * unit).sum(-1).clamp_min(0).sqrt()

    mean = torch.cat([rms(part) for part in rows.split(chunk)]).mean()
    return lambda vectors: rms(vectors) / mean


def _check(states: Sequence[Tensor], pairs: Tensor, vocab: int, k: int) -> None:
    sizes = {tuple(values.shape) for values in states}
    if len(sizes) != 1 or len(states[0].shape) != 2 or not len(states[0]):
        raise ValueError(f"read_out: got states of shapes {sorted(sizes)}, expected one (row, d_model) for all layers.")
    if not 1 <= k <= vocab:
        raise ValueError(f"read_out: got k={k}, expected 1 to the size of the vocabulary, {vocab}.")
    if len(pairs) and (
        int(pairs.min()) < 0 or bool((pairs.max(0).values >= torch.tensor([len(states[0]), vocab])).any())
    ):
        raise ValueError(
            f"read_out: got pairs up to {pairs.max(0).values.tolist()}, expected rows below {len(states[0])} and "
            f"token ids below {vocab}."
        )


def _between(values: Tensor, low: int, high: int) -> Tensor:
    """Indices of the values in [low, high)."""
    return ((values >= low) & (values < high)).nonzero()[:, 0]


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
