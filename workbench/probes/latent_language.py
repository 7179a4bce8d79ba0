"""In which language does a model think? What each layer gives the words of every language when one of them is due.

P_l(w | x) = prod_t softmax(W_U norm(h_l(x, w_<t)))[w_t] for the right word and distractors of each language.
Sources: Wendler et al., 2024, "Do Llamas Work in English?" (arXiv 2402.10588), its measure is mode "paper"; Zhong et
al., 2025, "What Language Do Non-English-Centric Large Language Models Think in?" (words of several tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from workbench.corpora.bilingual import BilingualItem, word_items
from workbench.methods.lens.candidates import (
    Candidates,
    Reading,
    check_items,
    kept,
    n_rows,
    prefixes,
    reading,
    spelled,
    word_log_prob,
)
from workbench.methods.lens.latent_language import LatentLanguageResult
from workbench.methods.lens.lens import Lens, grouped, read_out, rows_held, states_of, token_energy
from workbench.methods.lens.tuned_lens import lens_named
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.unembedding import Unembedding

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class LatentLanguage(Probe):
    """Scores words of several languages at every layer. Data: BilingualItems, see `corpora.bilingual`.

    mode     "corrected": whole words among as many candidates per language, bootstrap over items; "paper": the sum over
             single tokens that begin the right word, Gaussian intervals
    words    "whole" words, teacher forced; the "first_token" of each, of which there may be fewer (not in mode "paper")
    length   "sum": joint log-probability of a word's tokens; "geometric": their mean, which favours no short words
    lens     "logit", or the path of a saved TunedLens
    Items whose languages share tokens are left out and counted.
    """

    mode: Literal["corrected", "paper"] = "corrected"
    words: Literal["whole", "first_token"] = "whole"
    length: Literal["sum", "geometric"] = "sum"
    lens: str = "logit"
    n_bootstrap: int = 2000
    seed: int = 0

    bounds: ClassVar[Bounds] = {"n_bootstrap": 1}

    def measure(self, subject: Subject, data: Sequence[BilingualItem]) -> LatentLanguageResult:
        self._check()
        items = list(data)
        check_items(items)
        unembedding = Unembedding.of(subject)
        name, lens = lens_named(self.lens, unembedding)
        first = self.words == "first_token"
        paper = self.mode == "paper"
        coded = prefixes(subject, items) if paper else spelled(subject, items, first_token=first)
        good, dropped = kept(items, coded, paper)
        if not good:
            raise ValueError(
                f"LatentLanguage: in all {len(items)} items the languages share tokens with this model's tokenizer, "
                "expected words that can be told apart. Use words='whole', or other words."
            )
        energy = token_energy(unembedding.weight)
        norm = unembedding.norm or torch.nn.Identity()
        parts = []
        for group in grouped([n_rows(coded[index]) for index in good], rows_held(subject)):
            plan = reading([coded[index] for index in good[group]])
            states = states_of(subject, plan.texts, plan.masks)
            parts.append(self._read(plan, states, lens, lambda one: energy(norm(one.to(unembedding.weight)))))
        return self._result(parts, [items[index] for index in good], dropped, name)

    def _check(self) -> None:
        if self.mode == "paper" and (self.words, self.length) != ("whole", "sum"):
            raise ValueError(
                f"LatentLanguage: got words={self.words!r}, length={self.length!r} in mode 'paper', which sums over "
                "prefixes. Leave both out, or use mode 'corrected'."
            )

    @torch.no_grad()
    def _read(
        self, plan: Reading, states: Sequence[Tensor], lens: Lens, energy: Callable[[Tensor], Tensor]
    ) -> dict[str, np.ndarray]:
        """What the layers say about some items; every array has the item first."""
        prompts = torch.from_numpy(plan.prompt_row)
        found = read_out(states, lens, rows=prompts, pairs=plan.pairs)
        at_prompt = {name: getattr(found, name).T for name in ("kl", "rank", "entropy_bits")}
        held = [energy(values[prompts]).cpu().numpy() for values in states]
        logs = word_log_prob(plan, found.log_prob, geometric=self.length == "geometric")
        return at_prompt | {"log_prob": logs, "energy": np.stack(held, axis=1)}

    def _result(
        self, parts: Sequence[dict[str, np.ndarray]], items: Sequence[BilingualItem], dropped: dict[str, int], lens: str
    ) -> LatentLanguageResult:
        widest = max(part["log_prob"].shape[-1] for part in parts)
        for part in parts:  # in mode "paper" languages and groups have as many tokens as there are prefixes
            missing = widest - part["log_prob"].shape[-1]
            part["log_prob"] = np.pad(part["log_prob"], [(0, 0)] * 3 + [(0, missing)], constant_values=np.nan)
        arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return LatentLanguageResult(
            **arrays,
            tasks=tuple(item.task for item in items),
            sources=tuple(item.source for item in items),
            targets=tuple(item.target for item in items),
            languages=tuple(name for name, _ in items[0].words),
            dropped=dropped,
            words="prefixes" if self.mode == "paper" else self.words,
            length=self.length,
            lens=lens,
            mode=self.mode,
            n_bootstrap=self.n_bootstrap,
            seed=self.seed,
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """English words in layers 2 to 5, their translations in 6 and 7, nothing before; noise of .2 their norm."""
        world = World.of(seed, signal=True)
        expected = (
            Expectation("smallest English mass in layers 2-5", _mass(0, slice(2, 6), np.min), 0.9, 1.0),
            Expectation("largest English mass in layers 6-7", _mass(0, slice(6, 8), np.max), 0.0, 0.01),
            Expectation("largest target mass in layers 2-5", _mass(1, slice(2, 6), np.max), 0.0, 0.01),
            Expectation("smallest target mass in layers 6-7", _mass(1, slice(6, 8), np.min), 0.9, 1.0),
            Expectation("mass of a word in layers 0-1, in tokens", _mass(0, slice(0, 2), _tokens), 0.9999, 1.0001),
            Expectation("entropy of layers 0-1 (bits)", _empty_entropy, np.log2(V) - 1e-4, np.log2(V) + 1e-4),
            *(Expectation(f"crossover: {end}", _crossover(end), 6, 6) for end in ("layer", "low", "high")),
        )
        return Planted("planted", world.arrays, lambda: world.solved(cls(seed=seed)), expected)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Random states of the same norm: every word has its share of the vocabulary, and nothing hands over."""
        world = World.of(seed, signal=False)
        expected = (
            Expectation("mean English mass, in tokens", _mass(0, slice(None), _tokens), 0.4, 2.0),
            Expectation("mean target mass, in tokens", _mass(1, slice(None), _tokens), 0.4, 2.0),
            Expectation("crossover of masses (-1: none)", _crossover("layer"), -1, -1),
            Expectation("crossover among candidates (-1: none)", _crossover("layer", "word"), -1, -1),
        )
        return Planted("null", world.arrays, lambda: world.solved(cls(seed=seed)), expected)

    @classmethod
    def example(cls, subject: Subject) -> tuple[LatentLanguage, list[BilingualItem]]:
        """A few words that any tokenizer of letters can spell; on the organism's, words of its two languages."""
        return cls(n_bootstrap=100), word_items(n_words=4)[::22]


V, D_MODEL, N_LAYERS, N_PAIRS, N_WORDS = 200, 64, 8, 40, 8
ENGLISH, TARGET = "english", "target"


@dataclass(frozen=True)
class World:
    """States of 8 layers whose words are known, read by unit rows after an RMS norm, logits doubled.

    rows (V, d_model)   states (layer, item, d_model)   pair (item, 2): the English word and its translation
    """

    rows: Tensor
    states: Tensor
    pair: Tensor

    @classmethod
    def of(cls, seed: int, *, signal: bool, noise: float = 0.6) -> World:
        """With `signal` 3 u_word plus noise of norm `noise`, 0 in layers 0 and 1; without it noise of norm 3."""
        draw = torch.Generator().manual_seed(seed)

        def directions(*shape: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(*shape, D_MODEL, generator=draw), dim=-1)

        rows, pair = directions(V), torch.randperm(V, generator=draw)[: 2 * N_PAIRS].reshape(N_PAIRS, 2)
        blurred = directions(N_LAYERS, N_PAIRS)
        said = torch.stack([rows[pair[:, 0 if layer < 6 else 1]] for layer in range(N_LAYERS)])
        states = 3 * said + noise * blurred if signal else 3 * blurred
        if signal:
            states[:2] = 0.0
        return cls(rows, states, pair)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"rows": self.rows.numpy(), "states": self.states.numpy(), "pair": self.pair.numpy()}

    def logits(self, _: int, states: Tensor) -> Tensor:
        return 2 * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) @ self.rows.T

    def solved(self, probe: LatentLanguage) -> LatentLanguageResult:
        """What `probe` finds: each item has its own pair first, then seven other pairs."""
        order = [torch.arange(k, k + N_WORDS) % N_PAIRS for k in range(N_PAIRS)]
        words = [tuple(tuple((int(w),) for w in self.pair[some, side]) for side in (0, 1)) for some in order]
        plan = reading([Candidates((0,), one) for one in words])
        part = probe._read(plan, list(self.states), self.logits, token_energy(self.rows))
        sides = tuple((name, ("",)) for name in (ENGLISH, TARGET))
        items = [BilingualItem("", sides, "translation", ENGLISH, TARGET)] * N_PAIRS
        return probe._result([part], items, {"translation": 0}, "logit")


def _mass(language: int, layers: slice, of: Callable[[Any], Any]) -> Callable[[Any], float]:
    return lambda found: float(of(found.values("translation", "mass").mean(0)[layers, language]))


def _tokens(mass: np.ndarray) -> float:
    return float(mass.mean() * V)


def _empty_entropy(found: Any) -> float:
    return float(found.entropy_bits[:, :2].mean())


def _crossover(end: str, measure: str = "mass") -> Callable[[Any], float]:
    """layer, low or high; -1 where there is no crossover."""

    def read(found: Any) -> float:
        value = getattr(found.crossover("translation", ENGLISH, measure), end)
        return -1.0 if value is None else float(value)

    return read
