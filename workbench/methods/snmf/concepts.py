"""Do directions in activation space know concepts? Texts with labels, a score per text, the area under its curve.

score(text, direction) = max over the text's tokens of cos(a, d); AUC = chance that a text with the label scores above
one without. The direction for a concept is chosen on every other text of each label, its AUC measured on the rest.
Source: Shafran, Geiger and Geva, 2025, section on concept detection, here with labels of a corpus instead of a judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.corpora import code_styles, requests, stories
from workbench.corpora.item import Split
from workbench.methods.snmf.baselines import Blocks, k_means, mean_of, principal_axes
from workbench.stats import auc, resampling_weights

FACTORS, MEANS, KMEANS, PCA = "SNMF", "difference in means", "k-means", "PCA"
N_SHUFFLES = 50
RANDOM, SHUFFLED, OTHER = "random directions", "SNMF, shuffled labels", "SNMF, another concept's feature"


@dataclass(frozen=True)
class Question:
    """Where a concept can show itself: prompts that leave it open, and next words that express it."""

    concept: str
    prompts: tuple[str, ...]
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("prompts", "words"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"Question: got {name}={getattr(self, name)!r}, expected a tuple of texts.")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to factorise, with what is known about them. Labels and questions are for reports only.

    labels      one concept per text, "" for none; or () for texts without labels
    spans       per text the character spans (start, stop) where its concept shows; () where that is not known
    questions   what to ask under steering; concepts without a question are not steered
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    questions: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise ValueError(f"LabelledTexts: got one string, expected a tuple of texts: ({self.texts[:30]!r},).")
        for name, values in (("labels", self.labels), ("spans", self.spans)):
            if values and len(values) != len(self.texts):
                raise ValueError(f"LabelledTexts: got {len(values)} {name} for {len(self.texts)} texts.")
        unknown = {question.concept for question in self.questions} - set(self.labels)
        if unknown:
            raise ValueError(f"LabelledTexts: questions about {sorted(unknown)}, expected labels of the texts.")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label for label in self.labels if label))

    @property
    def held_out(self) -> np.ndarray:
        """(text,) every second text of each label: those that no feature was made or chosen on."""
        seen: dict[str, int] = {}
        marks = []
        for label in self.labels or ("",) * len(self.texts):
            seen[label] = seen.get(label, 0) + 1
            marks.append(bool(label) and seen[label] % 2 == 0)
        return np.array(marks, dtype=bool)


def topics(n_per_topic: int = 20, seed: int = 0, split: Split = "held_out") -> LabelledTexts:
    """Stories on ten topics, labelled by topic; the spans are the topical words. The questions open a story."""
    rng = Random(f"concepts topics {split} {seed}")
    made = [(topic, *stories.story(topic, rng, split)) for topic in stories.TOPICS for _ in range(n_per_topic)]
    prompts = ("long ago a", "one morning the", "once there was a")
    return LabelledTexts(
        tuple(" ".join(words) for _, words, _ in made),
        tuple(topic for topic, _, _ in made),
        tuple(tuple(_spans(words, topical)) for _, words, topical in made),
        tuple(Question(topic, prompts, words) for topic, words in stories.TOPIC_WORDS.items()),
    )


def refusals(n_per_label: int = 40, seed: int = 0, split: Split = "held_out") -> LabelledTexts:
    """Requests up to the reply, labelled by whether the reply is a refusal; the questions ask for the reply."""
    pairs, rng = list(requests.pairs(split)), Random(f"concepts refusals {split} {seed}")
    rng.shuffle(pairs)
    by_label = {"refusal": [p for p in pairs if requests.is_harmful(*p)], "answer": pairs}
    by_label["answer"] = [p for p in pairs if not requests.is_harmful(*p)]
    made = [(label, requests.prompt(*p)) for label, some in by_label.items() for p in some[:n_per_label]]
    others = {"refusal": "answer", "answer": "refusal"}
    prompts = {label: tuple(requests.prompt(*p) for p in some[n_per_label:][:12]) for label, some in by_label.items()}
    first = {"refusal": requests.REFUSAL, "answer": requests.ANSWER}
    questions = tuple(Question(label, prompts[others[label]], (first[label],)) for label in by_label)
    return LabelledTexts(tuple(text for _, text in made), tuple(label for label, _ in made), (), questions)


def styles(n_per_label: int = 40, seed: int = 0, split: Split = "train") -> LabelledTexts:
    """Programs labelled by their style; the questions ask for code and leave the style open."""
    found, rng = list(code_styles.combinations(split)), Random(f"concepts styles {split} {seed}")
    rng.shuffle(found)
    some = found[:n_per_label]
    made = [(style, code_styles.program(*one, style)) for style, one in product(code_styles.STYLES, some)]
    prompts = tuple(code_styles.prompt(*one) for one in found[n_per_label:][:12] or some[:12])
    questions = tuple(Question(style, prompts, (code_styles.FIRST_WORD[style],)) for style in code_styles.STYLES)
    return LabelledTexts(tuple(text for _, text in made), tuple(style for style, _ in made), (), questions)


def directions_of(
    features: Tensor, blocks: Blocks, text: Int[Tensor, " n"], data: LabelledTexts, seed: int, device: torch.device
) -> dict[str, Float[Tensor, "m candidates"]]:
    """Unit directions of every method, as many as there are features, from the same tokens.

    Difference in means has one per concept, in the order of `data.concepts`; PCA both signs of half as many axes.
    """
    n = features.shape[1]
    axes = principal_axes(blocks, (n + 1) // 2, seed=seed, device=device).cpu()
    centres, _ = k_means(blocks, n, seed=seed, device=device)
    overall = mean_of(blocks, device).cpu()
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
    made = {
        FACTORS: features,
        MEANS: difference_of_means(blocks, text, data, device),
        KMEANS: centres.cpu().T - overall[:, None].float(),
        PCA: torch.cat([axes, -axes], 1)[:, :n],
        RANDOM: noise,
    }
    return {name: _unit(columns) for name, columns in made.items()}


def difference_of_means(
    blocks: Blocks, text: Int[Tensor, " n"], data: LabelledTexts, device: torch.device | str = "cpu"
) -> Float[Tensor, "m concept"]:
    """Per concept: mean over all tokens of texts with the label minus that of texts without (the paper's baseline)."""
    label = np.array(data.labels)
    member = torch.from_numpy(np.stack([label == concept for concept in data.concepts])).double()  # (concept, text)
    sums, start = torch.zeros(len(member), blocks[0].shape[1], dtype=torch.float64), 0
    for block in blocks:
        rows = member[:, text[start : start + len(block)]].to(device)
        sums += (rows @ block.to(device).double()).cpu()
        start += len(block)
    count = member[:, text].sum(1, keepdim=True)
    total = mean_of(blocks, device).cpu() * len(text)
    return (sums / count - (total - sums) / (len(text) - count)).T.float()


def text_scores(
    directions: Float[Tensor, "m candidates"],
    blocks: Blocks,
    text: Int[Tensor, " n"],
    n_texts: int,
    device: torch.device | str = "cpu",
) -> Float[np.ndarray, "text candidates"]:
    """Largest cosine of each direction with a token of each text; -inf for a text without tokens."""
    best, start = torch.full((n_texts, directions.shape[1]), -torch.inf), 0
    for block in blocks:
        values = (_unit(block.to(device).T).T @ _unit(directions.to(device))).cpu()
        rows = text[start : start + len(block), None].expand_as(values)
        best.scatter_reduce_(0, rows, values, "amax")
        start += len(block)
    return best.numpy().astype(np.float64)


def detection(
    scores: Mapping[str, np.ndarray], data: LabelledTexts, read: np.ndarray, *, seed: int = 0, n_bootstrap: int = 1000
) -> pd.DataFrame:
    """Per method and concept: the direction chosen on the even texts, its AUC on the odd ones and a 95 % interval.

    read   (text,) texts that have any token
    Columns: method, concept, direction, fit_auc, auc, low, high. The control permutes the labels over texts 50 times:
    its row holds the mean and where 95 % of the permutations lie, and no direction (-1).
    """
    labels, held = np.array(data.labels), data.held_out
    fit, test = (read & (labels != "") & part for part in (~held, held))
    rows = []
    for method, values in scores.items():
        for index, concept in enumerate(data.concepts):
            fit_auc = auc(values[fit], labels[fit] == concept)
            best = index if method == MEANS else int(np.argmax(fit_auc))
            interval = auc_interval(values[test, best], labels[test] == concept, n_bootstrap=n_bootstrap, seed=seed)
            rows.append((method, concept, best, fit_auc[best], *interval))
    rng = np.random.default_rng(seed)
    for concept in data.concepts:
        null = [_shuffled(scores[FACTORS], labels == concept, fit, test, rng) for _ in range(N_SHUFFLES)]
        bounds = np.quantile([value for _, value in null], (0.025, 0.975))
        rows.append((SHUFFLED, concept, -1, *np.mean(null, axis=0), *bounds))
    return pd.DataFrame(rows, columns=["method", "concept", "direction", "fit_auc", "auc", "low", "high"])


def _shuffled(
    scores: np.ndarray, positive: np.ndarray, fit: np.ndarray, test: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """(AUC on the texts chosen on, AUC on the rest) of the best direction for labels that mean nothing."""
    fit_auc = auc(scores[fit], rng.permutation(positive[fit]))
    best = int(np.argmax(fit_auc))
    return float(fit_auc[best]), float(auc(scores[test, best], rng.permutation(positive[test])))


def auc_interval(
    scores: np.ndarray, positive: np.ndarray, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(AUC, low, high) by the bootstrap over items, drawn among positive and among negative ones."""
    high, low = scores[positive], scores[~positive]
    above = (high[:, None] > low) + 0.5 * (high[:, None] == low)  # (n_positive, n_negative)
    weights = [resampling_weights(len(part), n_bootstrap, seed + k) for k, part in enumerate((high, low))]
    draws = ((weights[0] @ above) * weights[1]).sum(1)
    bounds = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(auc(scores, positive)), float(bounds[0]), float(bounds[1])


def _spans(words: Sequence[str], marked: Sequence[bool]) -> Iterator[tuple[int, int]]:
    start = 0
    for word, yes in zip(words, marked, strict=True):
        if yes:
            yield start, start + len(word)
        start += len(word) + 1


def _unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
