"""CacheDesk: squeeze the key/value cache after a prompt, and see what is still known, beside tokens kept at random.

held share = bytes after the prompt / bytes untouched, scales and indices included; an answer is recalled where each of
its tokens is the most probable one. Sources: at each scorer in `workbench.methods.cache.scorers`, and at the toggles.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench import plots
from workbench.corpora import recall
from workbench.generation import text_of
from workbench.methods.cache.comparison import compare
from workbench.methods.cache.continuations import Text, texts_of
from workbench.methods.cache.frontier import CONTROL, FrontierResult, Point
from workbench.methods.cache.loss import KEPT, CacheLossResult
from workbench.methods.cache.reading import Reading, read
from workbench.methods.cache.scorers import SCORERS, Random
from workbench.stats import bootstrap_interval
from workbench.toggle import Composed, Toggle
from workbench.toggles.evict import EvictKV
from workbench.toggles.lowrank import LowRankKV
from workbench.toggles.quantize import QuantizeKV
from workbench.widgets import material
from workbench.widgets.controls import Choice, Control, Number, Slider
from workbench.widgets.controls import Text as Words
from workbench.widgets.desk import Desk
from workbench.widgets.picture import Fact, Pane, Picture
from workbench.widgets.strip import Strip, StripRow

METHODS = ("none", *(name for name in SCORERS if name != CONTROL))  # retaining heads have to be trained first
SQUEEZED, CHANCE = "squeezed", "random tokens"
ARMS = ("untouched", SQUEEZED, CHANCE)
VIEWS = ("tokens kept", "word by word", "bytes against recall")
BITS = (16, 8, 4, 2)
RANKS = (1.0, 0.75, 0.5, 0.25, 0.125)
GROUP = 8  # numbers that share a step: in prompts as short as these, larger groups would hardly ever be full
KEEPS = (0.5, 0.25, 0.125)  # of the view of all methods, beside the share of the slider
OWN_WORDS = 8  # tokens of the model's own continuation
BATCH = 4096  # prompt tokens per forward
N_CODES = 6
N_LINES = 4  # answers shown


class Seen(NamedTuple):
    """What one arm made of all prompts: what it lost, what it would say at each place, and what the toggles noted."""

    loss: CacheLossResult
    said: tuple[str, ...]
    notes: str


@dataclass(frozen=True)
class CacheDesk(Desk):
    """Settings of a smaller cache; the picture shows which tokens it holds and what is still recalled.

    method     drops tokens by this score; "none": all stay        keep   share of the prompt's tokens that stay
    key_bits, value_bits   among `BITS`; 16 leaves them whole      rank   share of d_head held of each, among `RANKS`
    unseen     last tokens of the prompt that are read only once the cache is squeezed
    prompts    one per line, continued as the untouched model would; "": codes to recall, where the subject knows them
    distance   words between a code and its recall                seed   of the tokens kept at random
    """

    view: str = "tokens kept"
    method: str = "snapkv"
    keep: float = 0.5
    key_bits: int = 16
    value_bits: int = 16
    rank: float = 1.0
    unseen: int = 0
    prompts: str = ""
    distance: int = 96
    shown_prompt: int = 1
    seed: int = 0

    notebook = "72_cache_desk"
    question = "What does a smaller cache forget?"

    def controls(self) -> tuple[Control, ...]:
        evicts = self.method != "none" or self.view == VIEWS[2]
        return (
            Choice("view", "show", options=VIEWS),
            Choice("method", "drop tokens by", options=METHODS),
            Slider("keep", "share of tokens kept", evicts, 0.05, 1.0, 0.05),
            Choice("key_bits", "bits of keys", options=BITS),
            Choice("value_bits", "bits of values", options=BITS),
            Choice("rank", "rank (share of a head's width)", options=RANKS),
            Number("unseen", "last tokens read after squeezing", True, 0, 32),
            Number("distance", "words between code and question", self._asks_codes, 8, 256),
            Slider("shown_prompt", "prompt below", True, 1, self._n_prompts, 1),
            Number("seed", "random tokens no."),
            Words("prompts", "prompts of your own, one per line", lines=2, optional=True),
        )

    def changed(self, **settings: Any) -> Self:
        """This desk with other settings; where prompts go, the last that is left is shown, unless one is named."""
        if "prompts" in settings and "shown_prompt" not in settings:
            left = super().changed(prompts=settings["prompts"], shown_prompt=1)._n_prompts
            settings = {"shown_prompt": min(self.shown_prompt, left)} | settings
        return super().changed(**settings)

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("method", "keep")

    def toggle(self, arm: str = SQUEEZED) -> Toggle:
        """The toggles of these settings, or their control.

        The control keeps as many tokens in the same bits and rank, but any; where no token is dropped, as
        many whole tokens, any, as fit into the same bytes.
        """
        squeezed = self._toggle(self.method, self.keep)
        if arm == SQUEEZED or not squeezed.parts:
            return squeezed
        if any(isinstance(part, EvictKV) for part in squeezed.parts):
            return self._toggle(CONTROL, self.keep)
        return EvictKV(min(self.loss().bytes_share, 1.0), Random(self.seed), every=None)

    def loss(self, arm: str = SQUEEZED) -> CacheLossResult:
        """What an arm lost, as `CacheLoss` measures it: "untouched", "squeezed" or "random tokens"."""
        return self._seen(arm).loss

    def picture(self) -> Picture:
        drawings = {VIEWS[0]: self._kept_map, VIEWS[1]: self._word_by_word, VIEWS[2]: self._frontier}
        notes = dict.fromkeys(note for arm in ARMS[1:] for note in [self._seen(arm).notes] if note)
        return Picture(
            drawings[self.view](),
            tuple(self._pane(arm) for arm in ARMS),
            self._strip(),
            facts=self._facts(),
            words=" ".join([*self._idle(), *notes]),
            code=self._code(),
        )

    # Prompts

    @property
    def _asks_codes(self) -> bool:
        return not self.prompts.strip() and material.knows_our_words(self.subject)

    @property
    def _n_prompts(self) -> int:
        return N_CODES if self._asks_codes else len(self._prompts)

    @property
    def _prompts(self) -> tuple[str, ...]:
        """Prompts of the reader's own, or plain English in several orders."""
        texts = material.ENGLISH_TEXTS
        turned = tuple(" ".join(texts[n:] + texts[:n]) for n in range(len(texts)))
        return material.lines(self.prompts) or turned

    @property
    def _about(self) -> tuple[Any, ...]:
        """What decides the texts."""
        return (self.distance,) if self._asks_codes else self._prompts

    def _texts(self) -> list[Text]:
        return self.once(("texts", self._about), self._made_texts)

    def _made_texts(self) -> list[Text]:
        if self._asks_codes:
            return texts_of(self.subject, recall.items("held_out", 0, N_CODES, (self.distance,)), OWN_WORDS)
        prompts = self.subject.tokenize(self._prompts).ids
        written = self.subject.generate(prompts, max_new_tokens=OWN_WORDS)
        for prompt, ids, ended in zip(self._prompts, written.ids, written.ended, strict=True):
            if ended and len(ids) == 1:
                raise ValueError(f"prompts: the model ends after {prompt[-40:]!r}. Give one that it goes on with.")
        return texts_of(self.subject, list(zip(prompts, written.ids, strict=True)), OWN_WORDS)

    # Arms, each read once for the settings that decide it

    def _toggle(self, by: str, keep: float) -> Toggle:
        """Tokens dropped by a score, bits and rank; parts that would change nothing are left out."""
        evicts = by != "none" and keep < 1.0
        scorer = Random(self.seed) if by == CONTROL else by
        parts: list[Toggle] = [EvictKV(keep, scorer, every=None)] if evicts else []  # type: ignore[arg-type]
        if min(self.key_bits, self.value_bits) < max(BITS):
            parts.append(QuantizeKV(self.key_bits, self.value_bits, group=GROUP, residual=0))
        if self.rank < 1.0:
            parts.append(LowRankKV(self.rank))
        return parts[0] if len(parts) == 1 else Composed(tuple(parts))

    def _seen(self, arm: str) -> Seen:
        return self._under(Composed() if arm == "untouched" else self.toggle(arm))

    def _under(self, toggle: Toggle) -> Seen:
        return self.once(("seen", self._about, self.unseen, toggle), lambda: self._compared(toggle))

    def _compared(self, toggle: Toggle) -> Seen:
        texts = self._texts()
        shortest = min(len(text.prompt) for text in texts)
        if self.unseen >= shortest:
            raise ValueError(
                f"unseen: got {self.unseen}, but the shortest prompt has {shortest} tokens. Read some first."
            )
        base = self.once(("base", self._about, self.unseen), lambda: read(self.subject, texts, self.unseen, BATCH))
        readings, notes = (base, "") if not toggle.parts else self._read(texts, toggle)
        sides = zip(base, readings, texts, strict=True)
        words = {n: words[: len(words) - self.unseen] for n, words in enumerate(self._words())}
        about = {"toggles": str(toggle), "notes": notes}  # not our seed: that of the control, which decides no interval
        loss = CacheLossResult.of([compare(*one) for one in sides], [text.group for text in texts], words, **about)
        said = tuple(text_of(self.subject.tokenizer, one.logprobs.argmax(-1).tolist()) for one in readings)
        return Seen(loss, said, notes)

    def _read(self, texts: list[Text], toggle: Toggle) -> tuple[list[Reading], str]:
        """The readings, and what the toggles said of themselves: what they left alone, or that they never acted."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with self.subject.under(toggle):
                readings = read(self.subject, texts, self.unseen, BATCH)
                notes = [note for receipt in self.subject.receipts for note in receipt.notes]
        return readings, "; ".join(dict.fromkeys([*notes, *(str(one.message) for one in told)]))

    def _words(self) -> list[list[str]]:
        """The tokens of each prompt as they are spelt, special ones too: they are held like others."""
        return self.once(("words", self._about), lambda: [self._spelt(text.prompt) for text in self._texts()])

    def _spelt(self, ids: Sequence[int]) -> list[str]:
        return [str(self.subject.tokenizer.decode([token])) for token in ids]

    # What is told

    def _measures(self, arm: str) -> pd.DataFrame:
        """Rows of `CacheLossResult.table` over all prompts, by measure."""
        table = self.once(("table", self._about, self.unseen, self.toggle(arm)), lambda: self.loss(arm).table())
        return table[table["group"] == "all"].set_index("measure")

    def _facts(self) -> tuple[Fact, ...]:
        facts = []
        base, held = self.loss().bytes_held.mean(axis=1)
        facts += [Fact("cache of a prompt", held / 1000, "kB"), Fact("of the untouched one", held / base, "share")]
        for measure, label, unit in (("recall", "recalled word for word", "share"), ("kl", "KL", "nats per token")):
            for arm in ARMS[1:]:
                value, low, high = self._measures(arm).loc[measure, ["value", "low", "high"]]
                facts.append(Fact(f"{label}, {arm}", value, unit, low, high))
        facts.append(Fact("recalled, untouched", self._measures(SQUEEZED).loc["recall", "base"], "share"))
        for arm in ARMS[1:]:
            again = self._measures(arm).loc["held_again", "value"]
            facts += [Fact(f"held of what is to be said again, {arm}", again, "share")] if np.isfinite(again) else []
        return tuple(facts)

    def _finding(self) -> str:
        told = {arm: int(self.loss(arm).exact().sum()) for arm in ARMS}
        n_texts = len(self._texts())
        what = f"codes {self.distance} words back are" if self._asks_codes else "continuations are"
        share = self.loss().bytes_share
        return (
            f"With {share:.0%} of the cache's bytes ({self._named()}) {told[SQUEEZED]} of {n_texts} {what} said word "
            f"for word; with random tokens {told[CHANCE]}, untouched {told['untouched']}"
        )

    def _named(self) -> str:
        """The settings in a few words."""
        parts = [] if self.method == "none" or self.keep == 1.0 else [f"{self.keep:.0%} of tokens by {self.method}"]
        if min(self.key_bits, self.value_bits) < max(BITS):
            parts.append(f"keys {self.key_bits}, values {self.value_bits} bits")
        parts += [f"rank {self.rank:.0%}"] if self.rank < 1.0 else []
        return ", ".join(parts) or "untouched"

    def _idle(self) -> list[str]:
        idle = [] if self.toggle().parts else ["Nothing is squeezed: all three are the same."]
        known = self.loss("untouched").exact().mean()
        if known < 0.5:
            told = f"The untouched model itself says only {known:.0%} of the answers, so recall tells little here: look"
            idle.append(f"{told} at the KL.")
        if not self._asks_codes:
            told = "The answers are the model's own greedy words with the full cache, which says them all: this shows"
            idle.append(f"{told} what changes, not what is right.")
        return idle

    def _pane(self, arm: str) -> Pane:
        """What an arm says: each word given the right ones before it."""
        texts, said = self._texts(), self._seen(arm).said
        rows = [(self.shown_prompt - 1 + n) % len(texts) for n in range(min(N_LINES, len(texts)))]
        right = [text_of(self.subject.tokenizer, texts[row].continuation) for row in rows]
        return Pane(
            arm, tuple((f"{answer.strip()} →", said[row].strip()) for answer, row in zip(right, rows, strict=True))
        )

    def _strip(self) -> Strip:
        """The prompt under the squeezed cache and under its control; the colour is the share of heads that hold it."""
        row = self.shown_prompt - 1
        rows = []
        for arm in ARMS[1:]:
            shares = self._shares(arm, row)
            words = self._words()[row]
            unread = (None,) * (len(words) - len(shares))  # tokens that came after the squeezing
            values = (*map(float, shares), *unread)
            kept = tuple(value is None or value > 0 for value in values)
            rows.append(StripRow(tuple(words), values, label=arm, kept=kept))
        return Strip(
            tuple(rows), unit="of the heads hold it", low=0.0, high=1.0, title="Who holds which token, all layers"
        )

    def _shares(self, arm: str, row: int) -> np.ndarray:
        """(seq,) the share of all key/value heads of all layers that hold each token of a prompt."""
        loss = self.loss(arm)
        kept = loss.kept[row, :, :, : len(loss.kept_words[row])]
        return (kept == 1).sum((0, 1)) / np.maximum((kept >= 0).sum((0, 1)), 1)

    # Figures

    def _kept_map(self) -> go.Figure:
        """Layer x token, the control below; the shade is the share of key/value heads that hold a token."""
        row, tables = self.shown_prompt - 1, []
        words = self.loss().kept_words[row]
        for arm, name in ((SQUEEZED, ""), (CHANCE, "random ")):
            kept = self.loss(arm).kept[row, :, :, : len(words)]
            share = (kept == 1).sum(1) / np.maximum((kept >= 0).sum(1), 1)
            layer, position = np.indices(share.shape)
            names = [f"{name}{number}" for number in layer.ravel()]
            tables.append(pd.DataFrame({"layer": names, "position": position.ravel(), "held": share.ravel()}))
        titles: dict[str, Any] = {"x_title": "position (tokens)", "y_title": "layer", "value_title": "share of heads"}
        options: dict[str, Any] = {"span": (0.0, 1.0), "show_values": False, "title": self._finding()}
        figure = plots.heatmap(pd.concat(tables), "position", "layer", "held", **options, **titles)
        hover = "position %{x}: <b>%{text}</b><br>layer %{y}, held by %{z:.0%} of heads<extra></extra>"
        text = [list(words)] * (2 * self.subject.n_layers)
        figure.update_traces(text=text, hovertemplate=hover, xgap=0, ygap=2, colorscale=KEPT)
        return figure.update_xaxes(nticks=12)

    def _word_by_word(self) -> go.Figure:
        """The chance of the right word at each place of the answer, with intervals over prompts."""
        rows = []
        for arm in ARMS:
            loss = self.loss(arm)
            starts = np.flatnonzero(np.diff(loss.token_text, prepend=-1))
            place = np.arange(len(loss.nll)) - starts[loss.token_text]
            for at in range(place.max() + 1):
                chance, low, high = bootstrap_interval(np.exp(-loss.nll[place == at]), n_bootstrap=1000)
                rows.append((at + 1, float(chance), float(low), float(high), arm))
        drawn = pd.DataFrame(rows, columns=["place", "chance", "low", "high", "arm"])
        titles: dict[str, Any] = {"x_title": "word of the answer", "y_title": "probability of the right word"}
        colors: dict[str, str] = dict(zip(ARMS, (plots.BLACK, plots.BLUE, plots.GREY), strict=True))
        figure = plots.lines(
            drawn, "place", "chance", "arm", "low", "high", title=self._finding(), colors=colors, **titles
        )
        return figure.update_yaxes(range=[-0.03, 1.05]).update_xaxes(dtick=1)

    def _frontier(self) -> go.Figure:
        """Recall against bytes of every method, at the share of the slider and at others."""
        keeps = tuple(sorted({self.keep, *KEEPS}))
        settings = [(by, self._toggle(by, keep)) for by in (*METHODS[1:], CONTROL) for keep in keeps]
        key = ("frontier", self._about, self.unseen, tuple(settings))
        points = [Point(by, self._under(toggle).loss) for by, toggle in settings]
        found = self.once(key, lambda: FrontierResult.of(points, seed=self.seed))
        return found.plot("recall", within=self.loss().bytes_share)

    def _code(self) -> str:
        parts = []
        for part in self.toggle().parts:
            if isinstance(part, EvictKV):
                parts.append(f"EvictKV({part.keep:g}, {part.by!r}, every=None)")
            elif isinstance(part, QuantizeKV):
                parts.append(f"QuantizeKV({part.key_bits}, {part.value_bits}, group={part.group}, residual=0)")
            elif isinstance(part, LowRankKV):
                parts.append(f"LowRankKV({part.rank:g})")
        texts = f'recall.items("held_out", 0, {N_CODES}, ({self.distance},))' if self._asks_codes else "pairs"
        unseen = f"unseen={self.unseen}" if self.unseen else ""
        measured = f"CacheLoss({unseen}).run(subject, {texts}).table()"
        return f"with subject.under({' | '.join(parts)}):\n    print({measured})" if parts else f"print({measured})"
