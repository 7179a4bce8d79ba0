"""Cost: what the active toggles do to predictions, memory and time, against the same subject without them.

KL(p0 || p) = sum_v p0(v) (log p0(v) - log p(v)) per token, p0 without the toggles; perplexity = exp(mean nats).
Intervals: bootstrap over texts for predictions; of times the middle 95 % of repeats. Both sides are timed alternately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import plots
from workbench.cache import cache_bytes
from workbench.clock import read_clock
from workbench.generation import text_of
from workbench.memory import AllocationMeter
from workbench.probe import Expectation, Planted, Probe
from workbench.result import Result
from workbench.settings import Bounds
from workbench.stats import bootstrap_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.subject import Subject

UNITS = {
    "perplexity": "1",
    "nll": "nats per token",
    "kl": "nats per token",
    "top1_agreement": "share of tokens",
    "cache_bytes": "bytes",
    "peak_bytes": "bytes",
    "prefill_ms": "ms",
    "decode_ms_per_token": "ms",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class CostResult(Result):
    """Per text and repeat, without ("base") and with the toggles; the table summarises.

    nll, base_nll          (text,) nats per token
    kl, top1_agreement     (text,) against the untoggled subject
    n_tokens               (text,) predicted tokens: the weights of every mean over texts
    times_ms               (side, repeat, 2) prefill and decode per token, side 0 is the base
    bytes_held             (side, 2) the cache after prompt and continuation, and the peak of both
    """

    nll: np.ndarray
    base_nll: np.ndarray
    kl: np.ndarray
    top1_agreement: np.ndarray
    n_tokens: np.ndarray
    times_ms: np.ndarray
    bytes_held: np.ndarray
    toggles: str = "no toggle"
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = ("toggles", "measure", "value", "low", "high", "base", "ratio", "unit", "seed")
    clocks: ClassVar[tuple[str, ...]] = ("times_ms",)

    def table(self) -> pd.DataFrame:
        """One row per measure: value with the toggles, its 95 % interval, the base's value and their ratio.

        Times are medians, and low and high the middle 95 % of their repeats; bytes have no interval.
        """
        rows = [
            ("perplexity", *self._mean(self.nll, np.exp), self._mean(self.base_nll, np.exp)[0]),
            ("nll", *self._mean(self.nll), self._mean(self.base_nll)[0]),
            ("kl", *self._mean(self.kl), 0.0),
            ("top1_agreement", *self._mean(self.top1_agreement), 1.0),
        ]
        for index, name in enumerate(("cache_bytes", "peak_bytes")):
            base, value = self.bytes_held[:, index]
            rows.append((name, value, value, value, base))
        for index, name in enumerate(("prefill_ms", "decode_ms_per_token")):
            base, value = np.median(self.times_ms[:, :, index], axis=1)
            low, high = np.quantile(self.times_ms[1, :, index], (0.025, 0.975))
            rows.append((name, value, low, high, base))
        table = pd.DataFrame(rows, columns=["measure", "value", "low", "high", "base"])
        ratio = (table["value"] / table["base"]).where(table["base"] != 0)
        units = [UNITS[name] for name in table["measure"]]
        table = table.assign(toggles=self.toggles, ratio=ratio, unit=units, seed=self.seed)
        return table.loc[:, list(self.columns)]

    def plot(self, view: str = "predictions", **options: Any) -> Figure:
        """predictions: loss and KL · resources: time and memory over the untoggled ones · texts: loss of each text."""
        drawings = {"predictions": self._plot_predictions, "resources": self._plot_resources, "texts": self._plot_texts}
        if view not in drawings:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(drawings)}.")
        return drawings[view](self.table().set_index("measure"))

    def views(self) -> dict[str, list[Any]]:
        return {"view": ["predictions", "resources", "texts"]}

    def _plot_predictions(self, table: pd.DataFrame) -> Figure:
        before, after = table.loc["perplexity", "base"], table.loc["perplexity", "value"]
        share = table.loc["top1_agreement", "value"]
        title = f"Under {self.toggles} perplexity goes from {before:.2f} to {after:.2f}; {share:.0%} of top tokens stay"
        rows = [
            ("loss, untoggled", "untoggled", *self._mean(self.base_nll)),
            ("loss, toggled", "toggled", *self._mean(self.nll)),
            ("KL from untoggled", "toggled", *self._mean(self.kl)),
        ]
        drawn = pd.DataFrame(rows, columns=["what", "side", "value", "low", "high"])
        return plots.bars(
            drawn, "what", "value", "low", "high", color="side", title=title, x_title="", y_title="nats per token"
        )

    def _plot_resources(self, table: pd.DataFrame) -> Figure:
        names = {
            "cache_bytes": "cache bytes",
            "peak_bytes": "peak bytes",
            "prefill_ms": "prefill time",
            "decode_ms_per_token": "time per token",
        }
        rows = table.loc[list(names)].reset_index()
        rows = rows.assign(
            what=rows["measure"].map(names), low=rows["low"] / rows["base"], high=rows["high"] / rows["base"]
        )
        title = f"Under {self.toggles} the cache takes {rows['ratio'][0]:.2f} times and a token {rows['ratio'][3]:.2f}"
        return plots.bars(
            rows,
            "what",
            "ratio",
            "low",
            "high",
            title=f"{title} times the untoggled model's",
            x_title="",
            y_title="ratio",
        )

    def _plot_texts(self, table: pd.DataFrame) -> Figure:
        drawn = pd.DataFrame(
            {"untoggled": self.base_nll, "toggled": self.nll, "text": np.arange(len(self.nll)).astype(str)}
        )
        worse = int((self.nll > self.base_nll).sum())
        title = f"Under {self.toggles} {worse} of {len(self.nll)} texts are predicted worse than without"
        return plots.scatter(
            drawn,
            "untoggled",
            "toggled",
            text="text",
            title=title,
            x_title="loss untoggled (nats per token)",
            y_title="loss toggled (nats per token)",
        )

    def _mean(self, values: np.ndarray, transform: Callable | None = None) -> tuple[float, float, float]:
        """Token-weighted mean over texts with its interval: each text is drawn together with its weight."""
        estimate, low, high = bootstrap_interval(values, weights=self.n_tokens, transform=transform, seed=self.seed)
        return float(estimate), float(low), float(high)


@dataclass(frozen=True)
class Cost(Probe):
    """What the active toggles cost. Run it under toggles: `with subject.under(toggle): Cost().run(subject, texts)`.

    prompt_tokens, new_tokens   length of the prompt and continuation that are timed and weighed; a toggle on caches
                                needs a prompt that is longer than what it leaves whole
    repeats                     timed repeats of each side, alternating
    cut                         cut texts to the context instead of raising
    """

    prompt_tokens: int = 64
    new_tokens: int = 16
    repeats: int = 5
    cut: bool = False
    seed: int = 0

    bounds: ClassVar[Bounds] = {"prompt_tokens": 1, "new_tokens": 1, "repeats": 1}

    def measure(self, subject: Subject, data: Sequence[str]) -> CostResult:
        texts: Any = data if isinstance(data, str) else list(data)
        rows = np.array([row for chunk in _chunks(texts, 16) for row in self._compare(subject, chunk)])
        prompt = self._prompt(subject, texts)
        rounds, held = [], np.zeros((2, 2))
        for _ in range(self.repeats + 1):
            with subject.untoggled():
                base = self._timed(subject, prompt)
            rounds.append((base, self._timed(subject, prompt)))
        times = np.array(rounds[1:]).transpose(1, 0, 2)  # (side, repeat, 2); the first round warms up
        with subject.untoggled():
            held[0] = self._memory(subject, prompt)
        held[1] = self._memory(subject, prompt)
        names = " | ".join(map(str, subject.active)) or "no toggle"
        columns = dict(zip(("nll", "base_nll", "kl", "top1_agreement", "n_tokens"), rows.T, strict=True))
        return CostResult(**columns, times_ms=times, bytes_held=held, toggles=names, seed=self.seed)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Predictions that the toggles sharpen by a known temperature: nll and KL follow in closed form."""
        return _planted("sharpened predictions", 2.0, seed)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same predictions twice: KL 0, agreement 1."""
        return _planted("same predictions", 1.0, seed)

    @classmethod
    def example(cls, subject: Subject) -> tuple[Cost, list[str]]:
        text = text_of(subject.tokenizer, range(8, 24))
        return cls(prompt_tokens=8, new_tokens=2, repeats=2, cut=True), [text, " ".join(text.split()[:7])]

    def _compare(self, subject: Subject, texts: list[str]) -> list[tuple[float, ...]]:
        with subject.untoggled():
            base = {row: logprobs for row, _, logprobs in subject.predictions(texts, cut=self.cut)}
        found = {
            row: compare(base[row], logprobs, ids) for row, ids, logprobs in subject.predictions(texts, cut=self.cut)
        }
        return [found[row] for row in range(len(texts))]

    def _prompt(self, subject: Subject, texts: list[str]) -> Tensor:
        """(1, prompt_tokens) token ids from the texts, repeated as often as needed."""
        ids = [token for text in subject.tokenize(texts, cut=self.cut).ids for token in text]
        limit = (
            self.prompt_tokens
            if subject.context is None
            else min(self.prompt_tokens, subject.context - self.new_tokens)
        )
        if limit < 1:
            raise ValueError(
                f"Cost: got new_tokens={self.new_tokens}, but the context is {subject.context}. Ask for fewer."
            )
        return torch.tensor([(ids * (limit // len(ids) + 1))[:limit]], device=subject.device)

    @torch.no_grad()
    def _timed(self, subject: Subject, prompt: Tensor) -> tuple[float, float]:
        """Milliseconds of the prefill, and per token of greedy decoding after it."""
        start = read_clock(prompt)
        output = subject.model(input_ids=prompt, use_cache=True)
        middle = read_clock(prompt)
        for _ in range(self.new_tokens):
            chosen = output.logits[:, -1:].argmax(-1)
            output = subject.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
        return 1e3 * (middle - start), 1e3 * (read_clock(prompt) - middle) / self.new_tokens

    @torch.no_grad()
    def _memory(self, subject: Subject, prompt: Tensor) -> tuple[float, float]:
        """Bytes of the cache after prompt and continuation, and the peak of bytes allocated beyond the weights."""
        if prompt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(prompt.device)
            before = torch.cuda.memory_allocated(prompt.device)
            held = cache_bytes(self._continued(subject, prompt))
            return held, torch.cuda.max_memory_allocated(prompt.device) - before
        with AllocationMeter() as meter:
            cache = self._continued(subject, prompt)
        return cache_bytes(cache), meter.peak_bytes

    def _continued(self, subject: Subject, prompt: Tensor) -> Any:
        """The cache of the prompt and `new_tokens` greedy tokens after it."""
        output = subject.model(input_ids=prompt, use_cache=True)
        for _ in range(self.new_tokens):
            chosen = output.logits[:, -1:].argmax(-1)
            output = subject.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
        return output.past_key_values


def compare(base: Tensor, logprobs: Tensor, ids: Sequence[int]) -> tuple[float, float, float, float, float]:
    """nll, base nll, KL(base || toggled), top-1 agreement and number of tokens predicted, for one text.

    base, logprobs   (seq, vocab) log-probabilities without and with the toggles; row t predicts token t + 1
    """
    if len(ids) < 2:
        raise ValueError(f"Cost: got a text of {len(ids)} token, expected at least two.")
    following = torch.tensor(ids[1:], device=base.device)[:, None]
    base, logprobs = base[:-1].double(), logprobs[:-1].double()
    share = base.exp()
    divergence = torch.where(share > 0, share * (base - logprobs), 0.0).sum(-1).mean()  # 0 log 0 = 0
    agreement = (base.argmax(-1) == logprobs.argmax(-1)).double().mean()
    nll, base_nll = (-part.gather(1, following).mean() for part in (logprobs, base))
    return float(nll), float(base_nll), float(divergence), float(agreement), float(len(following))


def _planted(name: str, sharpness: float, seed: int) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 40, 30, generator=generator, dtype=torch.float64)  # (text, seq, vocab)
    ids = torch.randint(30, (12, 40), generator=generator)
    base, sharp = logits.log_softmax(-1), (sharpness * logits).log_softmax(-1)

    def solve() -> CostResult:
        rows = np.array([compare(base[i], sharp[i], ids[i].tolist()) for i in range(len(ids))])
        columns = dict(zip(("nll", "base_nll", "kl", "top1_agreement", "n_tokens"), rows.T, strict=True))
        blank = {"times_ms": np.ones((2, 3, 2)), "bytes_held": np.ones((2, 2))}
        return CostResult(**columns, **blank, toggles=name, seed=seed)

    # Sharpening is log p = s log p0 - log Z with Z = sum p0^s: an independent way to the same KL.
    log_z = (sharpness * base[:, :-1]).exp().sum(-1).log()
    entropy = -(base[:, :-1].exp() * base[:, :-1]).sum(-1)
    truth = float((log_z + (sharpness - 1) * entropy).mean())

    def read(measure: str) -> Callable[[Result], float]:
        return lambda result: float(result.table().set_index("measure").loc[measure, "value"])

    return Planted(
        name=name,
        arrays={"base": base.numpy(), "toggled": sharp.numpy(), "ids": ids.numpy()},
        solve=solve,
        expectations=(
            Expectation("kl", read("kl"), truth - 1e-9, truth + 1e-9),
            Expectation("top1_agreement", read("top1_agreement"), 1.0, 1.0),
        ),
    )


def _chunks(texts: list[str], size: int) -> Iterator[list[str]]:
    if not texts:
        raise ValueError("Cost: got no texts, expected at least one.")
    return (texts[start : start + size] for start in range(0, len(texts), size))
