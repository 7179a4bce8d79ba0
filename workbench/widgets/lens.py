"""LensDesk: what every layer would say at every token of a text, and after how many blocks it says what the model says.

p_l = softmax(W_U norm(h_l)); shown are KL(p_L || p_l), the rank in p_l of p_L's top word, probabilities and entropy.
Controls: an untrained twin on the same text, or the states of other positions read in place of a position's own.
Source: nostalgebraist, 2020, "interpreting GPT: the logit lens"; a tuned lens after Belrose et al., 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from workbench import plots
from workbench.methods.lens.lens import Lens, ReadOut, read_out, states_of
from workbench.methods.lens.read_outs import X_TITLE
from workbench.methods.lens.tuned_lens import TunedLens, lens_named
from workbench.stats import bootstrap_interval
from workbench.subject import Subject
from workbench.unembedding import Unembedding
from workbench.widgets import material
from workbench.widgets.controls import Choice, Control, Number, Slider, Text
from workbench.widgets.desk import Desk, given
from workbench.widgets.picture import Fact, Pane, Picture
from workbench.widgets.strip import Strip, StripRow

VIEWS = ("layer by token", "at the token", "over depth")
TWIN, OTHERS = "untrained twin", "other positions"
OWN = "this text"
MEASURES = {  # name -> what a colour or a curve is
    "own word": "probability of the layer's own word",
    "final word": "probability of the final word",
    "KL": "KL of the final from the layer's prediction (nats)",
    "rank": "rank of the final word",
    "entropy": "entropy (bits)",
}
K, IN_PANE = 5, 3  # words per layer: in the figure of one token, in a pane
SHOWN, LONGEST = 10, 8  # tokens side by side in the map, letters of a word in a cell
OPENING = 19  # words of the text that the desk opens with


@dataclass(frozen=True)
class LensDesk(Desk):
    """A text and a position in it; the picture shows what each layer would say there, and everywhere.

    text       "": one that means something to the subject
    position   of the token whose layers are spelt out; -1: the last
    lens       "logit", one of `lenses`, or a file that TunedLens.save wrote
    control    "untrained twin" or "other positions"; "": the twin where there is one
    lenses     name -> TunedLens, of the caller's own
    twin       an untrained model of the same architecture and tokenizer; None: the organism's own, for the organism
    """

    view: str = "layer by token"
    measure: str = "own word"
    text: str = ""
    position: int = -1
    lens: str = "logit"
    control: str = ""
    seed: int = 0
    lenses: Mapping[str, TunedLens] = given(default_factory=dict)
    twin: Subject | None = given(default=None)  # noqa: RUF009  # a field, as any `given` is

    notebook = "75_lens_desk"
    question = "What would each layer say if the model stopped there, and when does it know?"

    def fitted(self) -> dict[str, Any]:
        text = self.text or " ".join(material.texts(self.subject)[0].split()[:OPENING])
        return {"text": text, "control": self.control or (TWIN if self._has_twin else OTHERS)} | (
            {"position": len(self._ids(text)) - 1} if self.position == -1 else {}
        )

    def changed(self, **settings: Any) -> Self:
        """This desk with other settings; another text is looked at from its end, unless a position is named too."""
        if settings.get("text", self.text) != self.text:
            settings = {"position": -1} | settings
        return super().changed(**settings)

    def controls(self) -> tuple[Control, ...]:
        lenses = tuple(dict.fromkeys(["logit", *self.lenses, self.lens]))
        arms = (TWIN, OTHERS) if self._has_twin else (OTHERS,)
        return (
            Choice("view", "show", options=VIEWS),
            Choice("measure", "colour or curve", self.view != VIEWS[1], options=tuple(MEASURES)),
            Text("text", "text", lines=2),
            Slider("position", "position in the text (tokens)", True, 0, len(self._ids(self.text)) - 1, 1),
            Choice("lens", "lens", len(lenses) > 1, options=lenses),
            Choice("control", "control", options=arms),
            Number("seed", "random shift or twin no."),
        )

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("measure", "position")

    def picture(self) -> Picture:
        own, chance = self.read(), self.read(self.control)
        leads, by_chance = leads_after(own), leads_after(chance)
        at, half = self.position, (len(own.kl) - 1) // 2
        facts = (
            Fact("final word leads here", leads[at], "blocks passed"),
            Fact("median of the text", float(np.median(leads)), "blocks passed"),
            Fact(f"median, {self.control}", float(np.median(by_chance)), "blocks passed"),
            Fact(f"already final after {half} blocks", float((own.rank[half] == 1).mean()), "share"),
            Fact(f"already final, {self.control}", float((chance.rank[half] == 1).mean()), "share"),
            Fact(f"KL after {half} blocks", float(own.kl[half].mean()), "nats"),
            Fact(f"KL, {self.control}", float(chance.kl[half].mean()), "nats"),
        )
        draw = (self._by_token, self._at_token, self._over_depth)[VIEWS.index(self.view)]
        panes = (self._pane(OWN, own), self._pane(self.control, chance))
        tuned = (
            "" if self.lens == "logit" else "A tuned lens was trained to guess the end: it may know what no layer uses."
        )
        strip = self._strip(own, leads)
        return Picture(draw(own, chance), panes, strip, "position", facts, tuned, self._code())

    def read(self, arm: str = OWN) -> ReadOut:
        """What each layer says at each position: "this text", or a control, "untrained twin" or "other positions"."""
        seed = None if arm == OWN else self.seed
        lens = "logit" if arm == TWIN else (self.lens, self.lenses.get(self.lens))  # a tuned lens is bound to its model
        return self.once(("read", self.text, arm, lens, seed, self.twin), lambda: self._read(arm))

    # Parts, each computed once for the settings that decide it

    @property
    def _has_twin(self) -> bool:
        return self.twin is not None or self.subject.name == "organism"

    def _untrained(self) -> Subject:
        return self.twin or self.once(("twin", self.seed), lambda: Subject.tiny("organism", self.seed, verify=False))

    def _ids(self, text: str) -> list[int]:
        return self.once(("ids", text), lambda: self.subject.tokenize([text]).ids[0])

    def _words(self, ids: Any) -> list[str]:
        return [str(self.subject.tokenizer.decode([int(index)])) for index in ids]

    def _states(self) -> list[Tensor]:
        """(token, d_model) of every layer, from one forward per text."""
        return self.once(("states", self.text), lambda: states_of(self.subject, [self.text], "all"))

    def _lens(self) -> Lens:
        unembedding = self.once(("unembedding",), lambda: Unembedding.of(self.subject))
        made = self.lenses.get(self.lens)
        return lens_named(self.lens, unembedding)[1] if made is None else made.lens(unembedding)

    def _read(self, arm: str) -> ReadOut:
        if arm == TWIN:
            twin = self._untrained()
            if twin.tokenize([self.text]).ids[0] != self._ids(self.text):
                raise ValueError(
                    f"LensDesk: {twin.name} splits the text otherwise, expected a twin with its tokenizer."
                )
            unembedding = Unembedding.of(twin)
            return _read_all(states_of(twin, [self.text], "all"), lambda _, states: unembedding.logits(states))
        states = self._states()
        if arm == OTHERS:
            if len(states[0]) < 2:
                raise ValueError("A text of one token has no other positions to compare with. Write some more words.")
            shift = 1 + int(np.random.default_rng(self.seed).integers(len(states[0]) - 1))
            states = [values.roll(shift, 0) for values in states[:-1]] + [states[-1]]
        return _read_all(states, self._lens())

    # What is shown

    def _pane(self, arm: str, found: ReadOut) -> Pane:
        """The most probable words of every layer at the position, the last layer on top."""
        lines = ["blocks best words"]
        for layer in reversed(range(len(found.kl))):
            ids, chances = (of[layer, self.position, :IN_PANE] for of in (found.top_ids, found.top_probability))
            said = zip(self._words(ids), chances, strict=True)
            lines.append(f"{layer:<7}" + " ".join(f"{word.strip()[:9]:9}{chance:4.0%}" for word, chance in said))
        return Pane(f"after “{self._read_token}”, {arm}", (("\n".join(lines), ""),))

    def _strip(self, own: ReadOut, leads: np.ndarray) -> Strip:
        words = self._words(own.top_ids[-1, :, 0])
        notes = tuple(f"then the model says {word!r}" for word in words)
        row = StripRow(tuple(self._words(self._ids(self.text))), tuple(leads.tolist()), notes)
        unit, title = "blocks until the final word leads", "When is it decided? Click a token"
        return Strip((row,), unit, low=0.0, high=float(len(own.kl) - 1), title=title)

    @property
    def _read_token(self) -> str:
        return self._words([self._ids(self.text)[self.position]])[0].strip()

    def _by_token(self, own: ReadOut, chance: ReadOut) -> go.Figure:
        n_layers, n_tokens = own.kl.shape
        start = max(0, min(self.position - SHOWN // 2, n_tokens - SHOWN))
        tokens = range(start, min(start + SHOWN, n_tokens))
        read = self._words(self._ids(self.text))
        values = _measured(own, self.measure)[:, tokens]
        values = np.log10(values) if self.measure == "rank" else values
        words = [self._words(row) for row in own.top_ids[:, tokens, 0]]
        names: dict[str, Any] = {"x_title": "position and token read", "value_title": self.measure}
        names |= {"span": (0.0, 1.0) if "word" in self.measure else None, "title": self._title(own, chance)}
        figure = _words_map(values, words, [f"{token} {read[token].strip()}" for token in tokens], **names)
        if self.measure == "rank":
            ticks = np.arange(int(np.ceil(values.max())) + 1)
            figure.update_traces(colorbar={"tickvals": ticks, "ticktext": [f"{10**tick:,.0f}" for tick in ticks]})
        frame = {"line": {"color": plots.VERMILLION, "width": 3}, "y0": -0.5, "y1": n_layers - 0.5}
        place = self.position - start
        return figure.add_shape(type="rect", x0=place - 0.5, x1=place + 0.5, **frame)

    def _at_token(self, own: ReadOut, chance: ReadOut) -> go.Figure:
        maps = {}
        for name, found in ((OWN, own), (self.control, chance)):
            ids, chances = found.top_ids[:, self.position], found.top_probability[:, self.position]
            words = [
                [f"{word.strip()}<br>{value:.0%}" for word, value in zip(self._words(row), values, strict=True)]
                for row, values in zip(ids, chances, strict=True)
            ]
            places = [f"best {place}" for place in range(1, K + 1)]
            maps[name] = _words_map(chances, words, places, span=(0.0, 1.0), x_title="words of a layer")
        figure = plots.beside(maps, title=self._title(own, chance)).update_traces(showscale=False)
        return _tall(figure, len(own.kl))

    def _over_depth(self, own: ReadOut, chance: ReadOut) -> go.Figure:
        tables, layers = [], np.arange(len(own.kl))
        ranks = self.measure == "rank"  # which are averaged as their logarithms, as the probe does
        for name, found in (("all positions", own), (self.control, chance)):
            values = _measured(found, self.measure).T
            values, back = (np.log(values), np.exp) if ranks else (values, None)
            mean, low, high = bootstrap_interval(values, transform=back, n_bootstrap=500, seed=0)
            tables.append(pd.DataFrame({"layer": layers, "value": mean, "low": low, "high": high, "curve": name}))
        here = _measured(own, self.measure)[:, self.position]
        name = f"after “{self._read_token}”"
        tables.insert(0, pd.DataFrame({"layer": layers, "value": here, "low": here, "high": here, "curve": name}))
        names: dict[str, Any] = {"x_title": X_TITLE, "y_title": MEASURES[self.measure], "log_y": ranks}
        title, table = self._title(own, chance), pd.concat(tables)
        figure = plots.lines(table, "layer", "value", "curve", "low", "high", title=title, **names)
        return figure.update_xaxes(dtick=max(1, len(layers) // 12))

    def _title(self, own: ReadOut, chance: ReadOut) -> str:
        leads, by_chance, at = leads_after(own), leads_after(chance), self.position
        word = self._words(own.top_ids[-1, at, :1])[0].strip()
        return (
            f"After “{self._read_token}” the model says “{word}”, which leads after {leads[at]} of {len(own.kl) - 1} "
            f"blocks; over the text after {np.median(leads):g} (median), {self.control}: {np.median(by_chance):g}"
        )

    def _code(self) -> str:
        lens = "" if self.lens == "logit" else f"lens={self.lens!r}"
        saved = f"lenses[{self.lens!r}].save('own.safetensors')\n" if self.lens in self.lenses else ""
        lens = "lens='own.safetensors'" if saved else lens
        return f"{saved}result = LogitLens({lens}).run(subject, [text])\nresult.plot('grid')"


def leads_after(found: ReadOut) -> np.ndarray:
    """(position,) blocks passed until the final word is on top and stays there to the end."""
    to_the_end = (found.rank == 1)[::-1].cumprod(axis=0).sum(axis=0)  # layers, counted from the last
    return len(found.rank) - to_the_end


def _read_all(states: list[Tensor], lens: Lens) -> ReadOut:
    """Read every row, with the probability of the last layer's top word in every layer."""
    final = lens(len(states) - 1, states[-1]).argmax(-1).cpu()
    return read_out(states, lens, k=K, pairs=torch.stack([torch.arange(len(final)), final], dim=1))


def _measured(found: ReadOut, measure: str) -> np.ndarray:
    """(layer, position) of one of MEASURES."""
    return {
        "own word": found.top_probability[..., 0],
        "final word": np.exp(found.log_prob),
        "KL": found.kl,
        "rank": found.rank.astype(float),
        "entropy": found.entropy_bits,
    }[measure]


def _words_map(values: np.ndarray, words: list[list[str]], columns: list[str], **names: Any) -> go.Figure:
    """A heat map (layer, column), the last layer on top, with a word in each cell."""
    layers = list(reversed(range(len(values))))
    rows = [(name, layer, values[layer, k]) for layer in layers for k, name in enumerate(columns)]
    table = pd.DataFrame(rows, columns=["column", "layer", "value"])
    figure = plots.heatmap(table, "column", "layer", "value", y_title=X_TITLE, show_values=False, **names)
    whole = [words[layer] for layer in layers]
    figure.update_traces(text=[list(map(_fitting, row)) for row in whole], hovertext=whole)
    style = {"texttemplate": "%{text}", "textfont": {"size": 11}}  # plotly's own choice is as small as the longest word
    figure.update_traces(hovertemplate="%{hovertext}<br>%{x}, %{y} blocks: %{z:.3g}<extra></extra>", **style)
    return _tall(figure, len(layers))


def _tall(figure: go.Figure, n_rows: int) -> go.Figure:
    """The figure with room for two lines of words in each of its rows."""
    layout: Any = figure.layout
    return figure.update_layout(height=max(layout.height, 160 + 30 * n_rows))


def _fitting(word: str) -> str:
    """A word as a cell has room for it; what stands below it stays."""
    first, line, rest = word.partition("<br>")
    return (first if len(first) <= LONGEST else first[: LONGEST - 1] + "…") + line + rest
