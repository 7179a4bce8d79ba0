"""NeuronDesk: one neuron, or a feature of many: where it fires, what it repeats with, tells apart, writes and causes.

Values are shares of the unit's peak, its largest value on a fixed sample, sign included. Control: another unit of the
same layer, drawn at random, in shares of its own peak. Sources: the probe and the toggle of each view name theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import plots
from workbench.corpora import streams
from workbench.generation import Generation
from workbench.methods.neurons.contexts import Firing
from workbench.methods.relations.facts import project_facts
from workbench.methods.snmf.activations import TokenActivations, read_sites
from workbench.methods.snmf.features import SNMFResult
from workbench.methods.steering.target import last_logprobs
from workbench.probes.hftp import HFTP
from workbench.probes.neuron_tokens import NeuronTokens
from workbench.probes.relation_neurons import RelationNeurons
from workbench.probes.snmf import SNMF
from workbench.site import Site
from workbench.strength import mean_kl
from workbench.toggle import Toggle
from workbench.toggles.steer import Clamp, Steer
from workbench.widgets import material
from workbench.widgets.controls import Choice, Control, Number, Slider, Text
from workbench.widgets.desk import Desk, given
from workbench.widgets.neuron_views import read_out, relations, spectrum, spelt
from workbench.widgets.picture import Fact, Pane, Picture, lines_of
from workbench.widgets.strip import Strip, StripRow

T = TypeVar("T")
VIEWS = ("contexts", "spectrum", "relations", "read-out", "clamp")
KINDS = ("neuron", "feature")
ARMS = ("untouched", "clamped", "random")
N_EACH = 12  # texts of each kind in the sample
N_FEATURES = 24  # of the SNMF of a layer
N_CONTEXTS, AROUND = 6, 9  # rows of the strip, tokens on each side of the strongest
N_WORDS = 10  # words in a figure
FEWEST = 4  # occurrences of a word whose mean is told
SUITS = 257  # of the organism's middle layer: it fires on verbs that go with places
MOST_VALUES = 2**24  # of the neurons of all layers on the sample, to be kept together
N_NULL = 2000  # random orders or vectors behind a null


class Unit(NamedTuple):
    """A neuron or a feature of a layer, and where it fires on the sample."""

    index: int
    firing: Firing


@dataclass(frozen=True)
class NeuronDesk(Desk):
    """A unit of one layer; the picture shows one of its sides beside a random unit of that layer.

    kind       a "neuron", or a "feature" of a sparse factorisation of the layer's neurons
    layer      -1: the middle                 neuron    -1: one that is easy to read in the organism, else the first
    clamp      what the unit is held at in view clamp (a feature: pushed by), in its own strongest values
    prompts    one per line; "": some that mean something to the subject
    seed       of the random unit
    texts      of the caller's own, in place of the sample
    """

    view: str = "contexts"
    kind: str = "neuron"
    layer: int = -1
    neuron: int = -1
    feature: int = 0
    clamp: float = 1.0
    prompts: str = ""
    new_tokens: int = 8
    seed: int = 0
    texts: tuple[str, ...] = given(default=())

    notebook = "74_neuron_desk"
    question = "What makes this neuron fire, what does it write, and what happens if it is held there?"

    def fitted(self) -> dict[str, Any]:
        layer = self.subject.n_layers // 2 if self.layer == -1 else self.layer
        suits = SUITS if self.subject.name == "organism" else 0
        neuron = suits if self.neuron == -1 else self.neuron
        prompts = self.prompts or "\n".join(material.openings(self.subject))
        return {"layer": layer, "neuron": neuron, "prompts": prompts}

    def controls(self) -> tuple[Control, ...]:
        one, held = self.kind == "neuron", self.view == "clamp"
        return (
            Choice("view", "show", options=VIEWS),
            Choice("kind", "unit", options=KINDS),
            Slider("layer", "layer", True, 0, self.subject.n_layers - 1, 1),
            Slider("neuron", "neuron", one, 0, self._n_units("neuron") - 1, 1),
            Slider("feature", "feature", not one, 0, self._n_units("feature") - 1, 1),
            Slider("clamp", "held at (its own maxima)", held, -3.0, 3.0, 0.25),
            Text("prompts", "prompts, one per line", held, lines=3),
            Number("new_tokens", "tokens to write", held, 1, 64),
            Number("seed", "random unit no."),
        )

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("view", "neuron")

    def picture(self) -> Picture:
        views: dict[str, Callable[[], Picture]] = {
            "contexts": self._contexts,
            "spectrum": self._spectrum,
            "relations": self._relations,
            "read-out": self._read_out,
            "clamp": self._clamp,
        }
        return views[self.view]()

    def toggle(self, arm: str = "clamped") -> Toggle:
        """Holds the unit at `clamp` times its peak, or the "random" unit at as many times its own; pushes a feature."""
        unit, site = self.unit(arm), Site(self.layer, "neurons")
        if self.kind == "neuron":
            return Clamp(((site, (unit.index,)),), self._held_at(unit))
        return Steer(self._factors().feature(unit.index).direction(), site, self._held_at(unit))

    def unit(self, arm: str = "clamped") -> Unit:
        """The unit of these settings, or the "random" one of its layer."""
        key = ("unit", self.kind, self.layer, self._own, self.texts, self.seed if arm == "random" else None)
        return self.once(key, lambda: self._random() if arm == "random" else self._unit(self._own))

    # Parts, each computed once for the settings that decide it

    @property
    def _own(self) -> int:
        return self.neuron if self.kind == "neuron" else self.feature

    def _n_units(self, kind: str) -> int:
        layer = min(max(self.layer, 0), self.subject.n_layers - 1)  # a wrong one is refused by its own control
        return self.subject.anatomy.width(Site(layer, "neurons"))[0] if kind == "neuron" else N_FEATURES

    @property
    def _texts(self) -> tuple[str, ...]:
        return self.texts or material.sample(self.subject, N_EACH)

    def _captured(self) -> TokenActivations:
        """The neurons of this layer on the sample: all layers are read at once where they are small."""
        n_layers, width = self.subject.n_layers, self._n_units("neuron")
        small = n_layers * width * sum(map(len, self._ids())) <= MOST_VALUES
        layers = range(n_layers) if small else [self.layer]
        sites = [Site(layer, "neurons") for layer in layers]
        key = ("captured", tuple(layers), self.texts)
        read = self.once(key, lambda: read_sites(self.subject, self._texts, sites, cut=True))
        return read[layers.index(self.layer)]

    def _snmf(self) -> SNMF:
        return SNMF(layer=self.layer, n_features=N_FEATURES, keep=0.05, restarts=2, max_iterations=60, cut=True)

    def _factors(self) -> SNMFResult:
        found: Any = self.once(
            ("factors", self.layer, self.texts), lambda: self._snmf().run(self.subject, list(self._texts))
        )
        return found

    def _values(self, index: int) -> np.ndarray:
        """(token,) in float64; of a feature the length of what it adds to the neurons."""
        if self.kind == "neuron":
            return torch.cat([block[:, index] for block in self._captured().blocks]).double().cpu().numpy()
        found = self._factors()
        return found.weights[:, index] * np.linalg.norm(found.features[:, index].astype(float))

    def _unit(self, index: int) -> Unit:
        if self.kind == "neuron":
            read = self._captured()
            return Unit(
                index, Firing(self._values(index), *(of.numpy() for of in (read.text, read.position, read.ids)))
            )
        found = self._factors()
        return Unit(index, Firing(self._values(index), found.text, found.positions, found.token_ids))

    def _random(self) -> Unit:
        """Another unit of the layer, the first of a random order that fires at all."""
        order = np.random.default_rng([self.seed, self.layer]).permutation(self._n_units(self.kind)).tolist()
        alive = (index for index in order if index != self._own and np.any(self._values(index)))
        if (found := next(alive, None)) is None:
            raise ValueError(
                f"NeuronDesk: no other {self.kind} of layer {self.layer} fires on these texts. Give others."
            )
        return self._unit(found)

    def _name(self, index: int) -> str:
        return f"{self.kind.capitalize()} {self.layer}.{index}"

    def _word(self, token: int) -> str:
        """A token as an axis shows it."""
        return str(self.subject.tokenizer.decode([int(token)])).strip() or f"token {token}"

    # Views

    def _contexts(self) -> Picture:
        own, chance = self.unit(), self.unit("random")
        tables = [self._by_word(unit) for unit in (own, chance)]
        words = tables[0].head(N_WORDS)["token"]
        names = self._name(own.index), f"{self._name(chance.index)}, at random"
        rows = [
            table.set_index("token").loc[list(words)].reset_index().assign(unit=name)
            for table, name in zip(tables, names, strict=True)
        ]
        best = ", ".join(f"“{word}”" for word in words[:3])
        share, by_chance = (float((unit.firing.shares > 0.5).mean()) for unit in (own, chance))
        title = (
            f"{names[0]} is strongest on {best}: {tables[0]['share'].iloc[0]:.0%} of its maximum on average; it "
            f"passes half on {share:.1%} of all tokens, a random {self.kind} on {by_chance:.1%}"
        )
        figure = plots.bars(
            pd.concat(rows), "token", "share", "low", "high", "unit",
            title=title, x_title=f"token that comes at least {FEWEST} times", y_title="mean (share of its own maximum)",
        )  # fmt: skip
        figure.update_yaxes(tickformat=".0%")
        below = f"Its largest values lie below 0: 100 % is {own.firing.peak:.3g}." if own.firing.peak < 0 else ""
        facts = (
            Fact("strongest value", own.firing.peak, "activation units"),
            Fact("best word, mean", float(tables[0]["share"].iloc[0]), "share", *tables[0][["low", "high"]].iloc[0]),
            Fact(f"best word of a random {self.kind}", float(tables[1]["share"].iloc[0]), "share"),
            Fact("tokens above half", 100 * share, "%"),
            Fact(f"tokens above half, random {self.kind}", 100 * by_chance, "%"),
        )
        site = f"Site({self.layer}, 'neurons')"
        code = f"capture = subject.capture(texts, [{site}])\ncapture[{site}][:, {own.index}]"
        if self.kind == "feature":
            code = f"{spelt(self._snmf())}.run(subject, texts).plot('card', {own.index})"
        return Picture(figure, strip=self._strip(own), facts=facts, words=below, code=code)

    def _by_word(self, unit: Unit) -> pd.DataFrame:
        table = unit.firing.by_token(FEWEST)
        return table.assign(token=list(map(self._word, table["id"]))).drop_duplicates("token")

    def _strip(self, unit: Unit) -> Strip:
        """The texts where the unit is strongest, one row each, around its strongest token."""
        ids, firing, rows = self._ids(), unit.firing, []
        for best in firing.strongest(N_CONTEXTS):
            text, at, share = ids[firing.text[best]], firing.position[best], firing.around(int(firing.text[best]))
            shown = range(max(0, at - AROUND), min(len(text), at + AROUND + 1))
            tokens = tuple(str(self.subject.tokenizer.decode([text[place]])) for place in shown)
            rows.append(StripRow(tokens, tuple(map(share.get, shown)), label=f"{firing.shares[best]:.0%}"))
        title = f"Where {self._name(unit.index).lower()} is strongest"
        return Strip(tuple(rows), "of its maximum", diverging=True, low=-1.0, high=1.0, title=title)

    def _ids(self) -> list[list[int]]:
        return self.once(("ids", self.texts), lambda: self.subject.tokenize(self._texts, cut=True).ids)

    def _neurons_only(self, what: str) -> int:
        if self.kind != "neuron":
            raise ValueError(f"The {what} is measured for single neurons, not for features. Set unit to neuron.")
        return self.unit("random").index

    def _spectrum(self) -> Picture:
        chance = self._neurons_only("spectrum")
        probe = HFTP(layers=(self.layer,), control="shuffle", n_shuffles=12, n_bootstrap=200, spectra="all")
        found: Any = self.once(("spectrum", self.layer), lambda: probe.run(self.subject, streams.corpus("four")))
        call = f"{spelt(probe)}.run(subject, streams.corpus('four'))"
        return spectrum(found, call, (self.layer, self.neuron), chance)

    def _relations(self) -> Picture:
        chance = self._neurons_only("average precision")
        asked = project_facts()
        probe = RelationNeurons(layers=(self.layer,), templates=asked.templates[:1], only_answered=False, n_null=N_NULL)
        found: Any = self.once(("relations", self.layer), lambda: probe.run(self.subject, asked))
        return relations(found, f"{spelt(probe)}.run(subject, project_facts())", (self.layer, self.neuron), chance)

    def _read_out(self) -> Picture:
        own, chance = self._own, self.unit("random").index
        if self.kind == "neuron":
            probe = NeuronTokens(layers=(self.layer,), n_random=N_NULL)
            labels: Any = self.once(("labels", self.layer), lambda: probe.run(self.subject, None))
            return read_out(labels, f"{spelt(probe)}.run(subject, None)", (self.layer, own), chance)
        found = self._factors()
        best = found.vocabulary.query("rank == 0 and sign == 1").set_index("feature")
        facts = (
            Fact("best word written", float(best.loc[own, "score"]), "logits per unit"),
            Fact("best word, random feature", float(best.loc[chance, "score"]), "logits per unit"),
        )
        code = f"{spelt(self._snmf())}.run(subject, texts).plot('words', {own})"
        return Picture(found.plot("words", own), facts=facts, code=code)

    def _clamp(self) -> Picture:
        written = {arm: self.answers(arm) for arm in ARMS}
        logs = {arm: self._logprobs(arm).double() for arm in ARMS}
        moved = {arm: mean_kl(logs["untouched"], logs[arm]) for arm in ARMS[1:]}
        change = {arm: (logs[arm].exp() - logs["untouched"].exp()).mean(0) for arm in ARMS[1:]}  # (vocab,)
        leading = [token for arm in ARMS[1:] for token in change[arm].abs().topk(N_WORDS // 2).indices.tolist()]
        units = {arm: self.unit(arm) for arm in ARMS[1:]}
        names = {arm: f"{self._name(unit.index)} at {self._held_at(unit):.3g}" for arm, unit in units.items()}
        names["random"] += ", at random"
        shown: dict[str, int] = {}
        for token in dict.fromkeys(leading):
            word = self._word(token)
            shown[word if word not in shown else f"{word} ({token})"] = token  # two that read alike stay apart
        rows = [
            (word, 100 * float(change[arm][token]), names[arm]) for arm in ARMS[1:] for word, token in shown.items()
        ]
        brought = self._word(int(change["clamped"].argmax()))
        verb = "Held at" if self.kind == "neuron" else "Pushed by"
        title = (
            f"{verb} {self.clamp:g} of its maximum, {self._name(self.unit().index).lower()} moves the next word by "
            f"{moved['clamped']:.2g} nats, “{brought}” above all; a random {self.kind} by {moved['random']:.2g} nats"
        )
        figure = plots.bars(
            pd.DataFrame(rows, columns=["token", "change", "unit"]), "token", "change", color="unit", title=title,
            x_title=f"next token, mean of {len(self._prompts)} prompts", y_title="change of probability (points)",
        )  # fmt: skip
        panes = (Pane(names.get(arm, arm), lines_of(self._prompts, made.texts)) for arm, made in written.items())
        first = {arm: np.array([ids[0] for ids in made.ids]) for arm, made in written.items()}
        facts = (
            *(Fact(f"next word moved, {arm}", moved[arm], "nats") for arm in ARMS[1:]),
            *(Fact(f"first word changed, {arm}", (first[arm] != first["untouched"]).mean(), "share")
              for arm in ARMS[1:]),
        )  # fmt: skip
        write = f"print(subject.generate(prompts, max_new_tokens={self.new_tokens}))"
        code = f"with subject.under({self._toggle_code()}):\n    {write}"
        return Picture(figure, tuple(panes), facts=facts, words=self._held_words(), code=code)

    def answers(self, arm: str = "clamped") -> Generation:
        """What is written after each prompt: "untouched", "clamped", or with the "random" unit held instead."""
        key = ("answers", self._prompts, self.new_tokens, *self._held(arm))
        return self.once(key, lambda: self._under(arm, self._write))

    def _write(self) -> Generation:
        return self.subject.generate(self._prompts, max_new_tokens=self.new_tokens)

    @property
    def _prompts(self) -> tuple[str, ...]:
        return material.lines(self.prompts)

    def _held(self, arm: str) -> tuple[Any, ...]:
        """What decides what an arm does; nothing where nothing is held."""
        return () if arm == "untouched" else (self.kind, self.layer, self.unit(arm).index, self.clamp, self.texts)

    def _logprobs(self, arm: str) -> Tensor:
        key = ("logprobs", self._prompts, *self._held(arm))
        return self.once(key, lambda: self._under(arm, lambda: last_logprobs(self.subject, self._prompts)))

    def _under(self, arm: str, work: Callable[[], T]) -> T:
        if arm == "untouched":
            return work()
        with self.subject.under(self.toggle(arm)):
            return work()

    def _held_at(self, unit: Unit) -> float:
        return self.clamp * unit.firing.peak + 0.0  # not -0

    def _held_words(self) -> str:
        if self.clamp != 0:
            return ""
        return "At 0 the neuron is switched off." if self.kind == "neuron" else "At 0 nothing is pushed."

    def _toggle_code(self) -> str:
        value = f"{self._held_at(self.unit()):.4g}"
        if self.kind == "neuron":
            return f"Clamp({{Site({self.layer}, 'neurons'): [{self.neuron}]}}, {value})"
        return f"Steer(factors.feature({self.feature}).direction(), Site({self.layer}, 'neurons'), {value})"
