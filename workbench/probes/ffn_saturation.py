"""Which feed-forward blocks hardly turn the residual stream, and at which threshold may they rest?

c = cos(x, x + y) per token and layer; the middle is the plateau of layers where it is highest.
Source: FFN-SkipLLM, Jaiswal et al., 2024 (arXiv 2404.03865); regions and thresholds by our own rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from workbench.generation import text_of
from workbench.methods.pruning.saturation import SHOWN_TOKENS, SaturationResult
from workbench.methods.pruning.skipping import Test, change
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.site import Site
from workbench.toggles.skip_ffn import SkipFFN

if TYPE_CHECKING:
    from workbench.subject import Subject

HELD_NUMBERS = 1 << 26  # that a capture may hold at once, about
SHOWN_TEXTS = 4  # whose tokens the result keeps, for maps


@dataclass(frozen=True)
class FFNSaturation(Probe):
    """How far every block turns the stream. Data: texts longer than the warm-up; `toggle` makes a SkipFFN of it.

    warmup   tokens behind the first that are left out, as SkipFFN never skips there
    rest     blocks that rest after a saturated one, SkipFFN's `run`            test   as for SkipFFN
    target   share of all blocks that tables and plots let rest
    In families that compute attention and feed-forward side by side, x is the stream that attention has written to.
    """

    warmup: int = 16
    rest: int | None = 2
    test: Test = "cosine"
    target: float = 0.25
    cut: bool = False
    seed: int = 0

    bounds: ClassVar[Bounds] = {"warmup": 0, "rest": 1, "target": (0, 1)}

    def measure(self, subject: Subject, data: Sequence[str]) -> SaturationResult:
        texts = [data] if isinstance(data, str) else list(data)
        if not texts:
            raise ValueError("FFNSaturation: got no texts, expected at least one.")
        made = subject.tokenize(texts, cut=self.cut)
        if max(made.lengths) <= self.warmup + 1:
            raise ValueError(
                f"FFNSaturation: got texts of at most {max(made.lengths)} tokens, expected one longer than its first "
                f"token and the warm-up of {self.warmup}. Lower warmup or take longer texts."
            )
        found: dict[str, list[Tensor]] = {name: [] for name in ("cosine", "relative", "text", "position")}
        for rows in _chunks(made.lengths, HELD_NUMBERS // (3 * subject.n_layers * subject.anatomy.d_model)):
            for name, values in _changes(subject, [made.ids[row] for row in rows]).items():
                found[name].append(values + rows[0] if name == "text" else values)
        columns: dict[str, Any] = {name: torch.cat(values).numpy() for name, values in found.items()}
        words = tuple(
            tuple(text_of(subject.tokenizer, [token]).strip() or "·" for token in ids[:SHOWN_TOKENS])
            for ids in made.ids[:SHOWN_TEXTS]
        )
        return self._result(words=words, **columns)

    def toggle(self, result: SaturationResult, target: float | None = None, *, static: bool = False) -> SkipFFN:
        """The toggle that skips about this share of all blocks; None: the probe's target.

        static   the layers that turn the stream least always rest, instead of a test for every token
        What tokens really skip, its receipt tells: a skipped block changes what the next ones get.
        """
        target = self.target if target is None else target
        if static:
            return SkipFFN(static=result.flattest(target), warmup=self.warmup)
        (first, last), reached = result.middle, result.reached(target)
        if abs(reached - target) > max(0.05, target / 4):
            raise ValueError(
                f"FFNSaturation: got target={target:g}, but with rest={self.rest} in the middle layers {first} to "
                f"{last} of {result.n_layers}, tokens come no nearer than {reached:.3f} of all blocks. Choose another "
                "target or rest, or static=True."
            )
        return SkipFFN(result.threshold(target), first, last, self.warmup, self.rest, self.test)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Blocks that turn every token by a known angle, the ones of layers 2 to 5 by the least."""
        return _planted("a plateau in layers 2 to 5", seed, (0.6, 0.7, 0.96, 0.97, 0.97, 0.95, 0.7, 0.5), (2, 5))

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Blocks that turn all alike: there is no plateau."""
        return _planted("all layers alike", seed, (0.8,) * 8, (0, 7))

    @classmethod
    def example(cls, subject: Subject) -> tuple[FFNSaturation, list[str]]:
        text = text_of(subject.tokenizer, range(8, 32))
        return cls(warmup=2, rest=1, target=1 / 3), [text, " ".join(text.split()[:12])]

    def _result(self, **columns: Any) -> SaturationResult:
        settings = {name: getattr(self, name) for name in ("warmup", "rest", "test", "target", "seed")}
        return SaturationResult(**columns, **settings)


def _changes(subject: Subject, texts: list[list[int]]) -> dict[str, Tensor]:
    """What each block did to each token of some texts, one row per token."""
    kinds = ("resid_in", "attn_out", "resid_out")
    sites = [Site(layer, kind) for layer in range(subject.n_layers) for kind in kinds]
    capture = subject.capture(texts, sites, progress=False)
    columns: dict[str, list[Tensor]] = {"cosine": [], "relative": []}
    for layer in range(subject.n_layers):
        stream, attention, after = (capture[Site(layer, kind)] for kind in kinds)
        for name, values in columns.items():
            values.append(change(stream + attention, after, name).float())  # type: ignore[arg-type]
    stacked = {name: torch.stack(values, 1) for name, values in columns.items()}
    return stacked | {"text": capture.text, "position": capture.position}


def _chunks(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Following texts with at most `limit` tokens together, or one text."""
    rows: list[int] = []
    for row, length in enumerate(lengths):
        if rows and sum(lengths[one] for one in rows) + length > limit:
            yield rows
            rows = []
        rows.append(row)
    yield rows


def _planted(name: str, seed: int, cosines: tuple[float, ...], plateau: tuple[int, int]) -> Planted:
    """2000 tokens in 20 texts whose blocks turn them by arccos(c), c the given one plus noise of .02."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.tensor(cosines, dtype=torch.float64) + 0.02 * torch.randn(
        2000, len(cosines), generator=generator, dtype=torch.float64
    )
    truth = truth.clamp(-1, 1)
    before, other = torch.randn(2, 2000, len(cosines), 32, generator=generator, dtype=torch.float64)
    unit = before / before.norm(dim=-1, keepdim=True)
    aside = other - (other * unit).sum(-1, keepdim=True) * unit
    aside = aside / aside.norm(dim=-1, keepdim=True)
    after = before.norm(dim=-1, keepdim=True) * (truth[..., None] * unit + (1 - truth**2).sqrt()[..., None] * aside)

    def solve() -> SaturationResult:
        columns: dict[str, Any] = {kind: change(before, after, kind).numpy() for kind in ("cosine", "relative")}
        place = {"text": np.arange(2000) // 100, "position": np.arange(2000) % 100}
        return FFNSaturation(seed=seed)._result(**columns, **place)

    def share(result: Any) -> float:
        return float(result.rests(0.25)[result.counts].mean())

    def error(result: Any) -> float:
        return float(np.abs(result.cosine - truth.numpy()).max())

    tests = (
        Expectation("first layer of the plateau", lambda result: result.middle[0], plateau[0], plateau[0]),  # type: ignore[attr-defined]
        Expectation("last layer of the plateau", lambda result: result.middle[1], plateau[1], plateau[1]),  # type: ignore[attr-defined]
        Expectation("largest error of a cosine", error, 0.0, 1e-12),
        Expectation("share of blocks that rest at a target of .25", share, 0.23, 0.27),
    )
    return Planted(name, {"before": before.numpy(), "after": after.numpy(), "cosine": truth.numpy()}, solve, tests)
