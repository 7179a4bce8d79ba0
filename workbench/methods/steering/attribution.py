"""Which tokens of a prompt carry the preference for one answer over another? Integrated gradients on their embeddings.

F(x) = log p(y+ | x) - log p(y- | x);  a_t = sum_j (x - b)_tj * mean over s of dF/dx_tj at b + s (x - b), s in (0, 1)
Completeness: sum_t a_t = F(x) - F(b), the law that tells whether the steps were enough.
Sources: Sundararajan et al., 2017 (integrated gradients); Nguyen et al., 2025 (GrAInS, arXiv 2507.18043).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from workbench.subject import Subject

Triples = Sequence[tuple[str, str, str]]  # (prompt, preferred answer, dispreferred answer)
Score = Callable[[Float[Tensor, "rows seq d_model"]], Float[Tensor, " rows"]]
Rule = Literal["midpoint", "right"]
Baseline = Literal["mean", "pad", "zero"]

AT_ONCE = 2048  # tokens in one forward and backward


@dataclass(frozen=True)
class Preference:
    """A prompt and its two answers as token ids; `free` marks the prompt's tokens that may carry the preference."""

    prompt: tuple[int, ...]
    preferred: tuple[int, ...]
    dispreferred: tuple[int, ...]
    free: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Attribution:
    """What each token adds to a preference.

    scores   (seq,) float64, in the unit of F: nats      change   F(x) - F(b), which they should add up to
    steps    how many points of the path were taken
    """

    scores: Float[Tensor, " seq"]
    change: float
    steps: int

    @property
    def gap(self) -> float:
        """What the scores miss of the change."""
        return float(self.scores.sum()) - self.change

    @property
    def relative_gap(self) -> float:
        """|gap| against the change, or against the largest score where scores cancel."""
        scale = max(abs(self.change), float(self.scores.abs().max()))
        return 0.0 if scale == 0 else abs(self.gap) / scale


def attributed(
    subject: Subject,
    triples: Triples,
    *,
    baseline: Baseline = "mean",
    rule: Rule = "midpoint",
    steps: int = 64,
    most_steps: int = 1024,
    tolerance: float = 0.01,
    separator: str = " ",
    template: Sequence[str] = (),
) -> Iterator[tuple[Preference, Attribution]]:
    """For each triple its tokens and what they add to the preference, under the toggles that are active.

    baseline   embedding that stands for "no word": the mean over the vocabulary, the padding token's, or zero. Zero is
               as published, but where blocks begin with a norm it turns all that matters into the path's first instant
    steps      points on the path, doubled up to `most_steps` until the scores are complete to `tolerance`
    separator  between prompt and answers      template   words or phrases of the prompts that belong to their frame
    Special tokens and template stay as they are along the path: their scores are exactly 0. Whether scores are complete
    is for the caller to look at: a mixture of experts switches experts along the path, and no number of steps will do.
    """
    if rule not in ("midpoint", "right") or not 1 <= steps <= most_steps:
        raise ValueError(
            f"attributed: got rule={rule!r}, steps={steps}, most_steps={most_steps}, "
            "expected rule 'midpoint' or 'right' and 1 <= steps <= most_steps."
        )
    blank = blank_embedding(subject, baseline)
    for pair in read_preferences(subject, triples, separator=separator, template=template):
        x = embedded(subject, pair.prompt)
        b = torch.where(torch.tensor(pair.free, device=x.device)[:, None], blank, x)  # (seq, d_model)
        rows = max(1, AT_ONCE // (len(pair.prompt) + max(len(pair.preferred), len(pair.dispreferred))))
        score, taken = preference_score(subject, pair), steps
        found = integrated_gradients(score, x, b, steps=taken, rule=rule, at_once=rows)
        while found.relative_gap > tolerance and 2 * taken <= most_steps:
            taken *= 2
            found = integrated_gradients(score, x, b, steps=taken, rule=rule, at_once=rows)
        yield pair, found


def integrated_gradients(
    score: Score,
    x: Float[Tensor, "seq d_model"],
    baseline: Float[Tensor, "seq d_model"],
    *,
    steps: int = 64,
    rule: Rule = "midpoint",
    at_once: int = 64,
) -> Attribution:
    """Attribution of score(x) - score(baseline) to the tokens; `at_once` points of the path share a forward.

    Gradients are taken with respect to the points alone: parameters keep none. Sums are float64.
    """
    where = (torch.arange(steps, device=x.device) + (0.5 if rule == "midpoint" else 1.0)) / steps  # (steps,)
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for part in where.split(at_once):
        points = (baseline + part[:, None, None].to(x.dtype) * (x - baseline)).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(points).sum(), points)
        total += gradient.double().sum(0)
    with torch.no_grad():
        ends = score(torch.stack([x, baseline])).double()
    scores = ((x - baseline).double() * total / steps).sum(-1)
    return Attribution(scores.cpu(), float(ends[0] - ends[1]), steps)


def preference_score(subject: Subject, pair: Preference) -> Score:
    """F of many versions of the prompt's embeddings at once; each token is predicted from the one before it."""
    return lambda points: (
        answer_log_prob(subject, points, pair.preferred) - answer_log_prob(subject, points, pair.dispreferred)
    )


def answer_log_prob(
    subject: Subject, prompts: Float[Tensor, "rows seq d_model"], answer: Sequence[int]
) -> Float[Tensor, " rows"]:
    """log p(whole answer | embedded prompt) of each row, in nats and float32; gradients flow to `prompts`."""
    ids = torch.tensor(answer, device=prompts.device)
    tail = embedded(subject, answer).to(subject.dtype).expand(len(prompts), -1, -1)
    logits = forward_embedded(subject, prompts, tail, logits_to_keep=len(answer) + 1)[:, -len(answer) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids.expand(len(prompts), -1)[..., None])[..., 0].sum(-1)


def forward_embedded(
    subject: Subject, prompts: Float[Tensor, "rows seq d_model"], tail: Tensor | None = None, *, logits_to_keep: int = 1
) -> Float[Tensor, "rows kept vocab"]:
    """Logits of embedded prompts of one length, followed by `tail` where given; toggles know where the prompts end."""
    whole = prompts.to(subject.dtype) if tail is None else torch.cat([prompts.to(subject.dtype), tail], dim=1)
    rows, seq = whole.shape[:2]
    arguments = {
        "attention_mask": torch.ones(rows, seq, dtype=torch.long, device=whole.device),
        "position_ids": torch.arange(seq, device=whole.device).expand(rows, -1),
        "use_cache": False,
        "logits_to_keep": logits_to_keep,
    }
    with subject.watch.prompts(torch.tensor([prompts.shape[1]])):
        return subject.model(
            inputs_embeds=whole, **{name: value for name, value in arguments.items() if name in subject.accepts}
        ).logits


@torch.no_grad()
def embedded(subject: Subject, ids: Sequence[int]) -> Float[Tensor, "seq d_model"]:
    """Input embeddings of token ids, in float32."""
    embed = subject.model.get_input_embeddings()
    return embed(torch.tensor(ids, device=subject.device)).float()


def blank_embedding(subject: Subject, kind: Baseline, chunk: int = 8192) -> Float[Tensor, " d_model"]:
    """The embedding that stands for "no word": mean over the vocabulary, the padding token's, or zero; float32."""
    if subject.remote:
        raise ValueError(f"attribution: {subject.name} is remote, but gradients are taken here. Load it locally.")
    if kind == "pad":
        if subject.tokenizer.pad_token_id is None:
            raise ValueError("attribution: got 'pad', but the tokenizer has no padding token. Take 'mean'.")
        return embedded(subject, [subject.pad_id])[0]
    if kind == "zero":
        return torch.zeros(subject.anatomy.d_model, device=subject.device)
    if kind != "mean":
        raise ValueError(f"attribution: got {kind!r} for a blank token, expected 'mean', 'pad' or 'zero'.")
    total = torch.zeros(subject.anatomy.d_model, dtype=torch.float64, device=subject.device)
    for start in range(0, subject.anatomy.vocab, chunk):
        total += embedded(subject, range(start, min(start + chunk, subject.anatomy.vocab))).double().sum(0)
    return (total / subject.anatomy.vocab).float()


def read_preferences(
    subject: Subject, triples: Triples, *, separator: str = " ", template: Sequence[str] = ()
) -> list[Preference]:
    """The triples as tokens. Each answer is tokenized together with its prompt, as the model would meet it.

    Raises ValueError for no triples, equal answers, or a tokenizer that joins prompt and answer in one token.
    """
    if not len(triples) or isinstance(triples, str) or any(isinstance(t, str) or len(t) != 3 for t in triples):
        raise ValueError("attribution: expected triples [(prompt, preferred answer, dispreferred answer), ...].")
    if isinstance(template, str):
        raise ValueError(
            f"attribution: got template={template!r}, expected a list of words or phrases: [{template!r}]."
        )
    return [_read_one(subject, *triple, separator, template) for triple in triples]


def _read_one(
    subject: Subject, prompt: str, preferred: str, dispreferred: str, separator: str, template: Sequence[str]
) -> Preference:
    made = subject.tokenize([prompt + separator + answer for answer in (preferred, dispreferred)])
    parts: list[tuple[list[int], list[int]]] = []
    for ids, offsets, special in zip(made.ids, made.offsets, made.special, strict=True):
        answer = [not mark and high > len(prompt) for mark, (_, high) in zip(special, offsets, strict=True)]
        first = answer.index(True) if True in answer else len(ids)
        if first == len(ids) or offsets[first][0] < len(prompt.rstrip()) or not first:
            raise ValueError(
                f"attribution: the tokens of {prompt[-20:]!r} and its answer can't be told apart. Let the prompt end "
                "and the answer begin at a token, see `separator`; the tokenizer must know character offsets."
            )
        last = len(answer) - answer[::-1].index(True)  # special tokens after the answer are none of it
        parts.append((ids[:first], ids[first:last]))
    (ids, plus), (others, minus) = parts
    if ids != others or plus == minus:
        raise ValueError(f"attribution: {preferred!r} and {dispreferred!r} must be different answers to one prompt.")
    never = set(subject.tokenizer.all_special_ids)  # written out in a text, they are not marked as special
    frame = [match.span() for phrase in template for match in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", prompt)]
    marks = zip(ids, made.special[0], made.offsets[0], strict=False)  # the answer's are left over
    free = tuple(
        not (mark or token in never or any(start < high and low < end for start, end in frame))
        for token, mark, (low, high) in marks
    )
    if not any(free):
        raise ValueError(
            f"attribution: every token of {prompt[:40]!r} is special or template, expected one that is not."
        )
    return Preference(tuple(ids), tuple(plus), tuple(minus), free)
