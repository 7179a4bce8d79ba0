"""What a compression may break: each mechanism reads a subject as it is, and says how much of another reading it kept.

kept(before, after) is 1 for the same reading and 0 for one that knows nothing; `scales` has the equations.
The seed draws the texts and questions, so that several seeds tell what other data would have said.
Sources: those of the probes that are used; the scales are this project's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from workbench.corpora import bilingual, recall, requests, streams
from workbench.directions import difference_in_means
from workbench.methods.pruning.curves import as_prompt
from workbench.methods.relations.facts import ask, project_facts
from workbench.methods.snmf.activations import read_activations
from workbench.methods.snmf.concepts import LabelledTexts, text_scores, topics
from workbench.methods.snmf.factorise import SemiNMF
from workbench.probes.hftp import HFTP
from workbench.probes.latent_language import LatentLanguage
from workbench.probes.relation_neurons import RelationNeurons
from workbench.site import Site
from workbench.stats import auc, mean_interval, wilson_interval
from workbench.studies.questions import drawn_facts, drawn_requests, guessed, says, too_few, too_small
from workbench.studies.scales import above_chance, features_above_chance, overlap_above_chance, profile_agreement

if TYPE_CHECKING:
    from workbench.subject import Subject

Reading = Mapping[str, np.ndarray]
LEAST_SHARE = 0.05  # of codes, which nobody guesses
TASKS = ("common to velish", "velish to common", "repeat velish", "repeat common")


@dataclass(frozen=True)
class Mechanism(ABC):
    """One thing that a model does, with one number, or two, that a compression may lower.

    measures   name of each number -> what 1 and 0 stand for
    """

    measures: ClassVar[Mapping[str, str]]

    @abstractmethod
    def read(self, subject: Subject, seed: int) -> Reading:
        """Read the subject as it is, on data that the seed draws. ValueError for a model that lacks the places."""

    @abstractmethod
    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        """How much of `before` is in `after`, one number per measure."""

    def lacking(self, before: Reading) -> str:
        """Why there is nothing to keep in this reading, in words; "" where there is."""
        return ""


@dataclass(frozen=True)
class Fluency(Mechanism):
    """How well running text is predicted: the field's yardstick."""

    n_texts: int = 48
    n_words: int = 40

    measures: ClassVar[Mapping[str, str]] = {"perplexity": "perplexity before / after"}

    def read(self, subject: Subject, seed: int) -> Reading:
        pieces = [recall.filler(Random(f"fluency {seed} {n}"), self.n_words, "held_out") for n in range(self.n_texts)]
        return {"nll": subject.nll([" ".join(words) for words in pieces], cut=True).numpy()}

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        return (float(np.exp(before["nll"].mean() - after["nll"].mean())),)


@dataclass(frozen=True)
class FactsAnswered(Mechanism):
    """Facts asked for, answered word for word; the question is read as it would be written, token by token."""

    n_per_relation: int = 4
    form: str = "question"

    measures: ClassVar[Mapping[str, str]] = {"facts": "share answered, above an answer drawn from the same relation"}

    def read(self, subject: Subject, seed: int) -> Reading:
        facts = drawn_facts(project_facts().of(self.form), self.n_per_relation, seed)
        right = says(subject, [(prompt.text, prompt.answers[0]) for prompt in facts.prompts])
        return {"right": right, "chance": np.array(guessed(project_facts().of(self.form)))}

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        return (above_chance(before["right"].mean(), after["right"].mean(), float(before["chance"])),)

    def lacking(self, before: Reading) -> str:
        return too_few(before["right"], float(before["chance"]), "facts")


@dataclass(frozen=True)
class RelationSets(Mechanism):
    """The neurons that follow each relation."""

    n_relations: int = 4
    n_per_relation: int = 24
    form: str = "statement"

    measures: ClassVar[Mapping[str, str]] = {"relation neurons": "overlap of each relation's neurons at q ≤ .05"}

    def read(self, subject: Subject, seed: int) -> Reading:
        names = project_facts().relations[: self.n_relations]
        asked = project_facts().of(self.form).where(lambda prompt: prompt.relation in names)
        facts = drawn_facts(asked, self.n_per_relation, seed)
        # Of all prompts, answered or not: which ones are answered is what the compression changes.
        probe = RelationNeurons(templates=(self.form,), only_answered=False, held_out=0.01, n_null=500, seed=seed)
        found: Any = probe.run(subject, facts)
        return {
            "selected": np.moveaxis(found.selected, -1, 0),  # (relation, layer, unit)
            "right": says(subject, [(prompt.text, prompt.answers[0]) for prompt in facts.prompts]),
            "chance": np.array(guessed(asked)),
        }

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        return (overlap_above_chance(before["selected"], after["selected"]),)

    def lacking(self, before: Reading) -> str:
        few = too_few(before["right"], float(before["chance"]), "facts")
        return few or too_small(before["selected"], "any relation")


@dataclass(frozen=True)
class SyntaxSets(Mechanism):
    """The neurons that repeat at the rate of sentences and phrases."""

    n_sentences: int = 40
    n_shuffles: int = 6
    sentences_per_text: int = 6

    measures: ClassVar[Mapping[str, str]] = {"syntax neurons": "overlap of the sets at q ≤ .05"}

    def read(self, subject: Subject, seed: int) -> Reading:
        corpus = streams.corpus("four", self.n_sentences, seed)
        found: Any = self._probe(seed).run(subject, corpus)
        return {"significant": np.moveaxis(found.significant, -1, 0)}  # (level, layer, neuron)

    def _probe(self, seed: int) -> HFTP:
        settings: dict[str, Any] = {"n_shuffles": self.n_shuffles, "sentences_per_text": self.sentences_per_text}
        return HFTP(n_bootstrap=20, spectra="none", seed=seed, **settings)

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        return (overlap_above_chance(before["significant"], after["significant"]),)

    def lacking(self, before: Reading) -> str:
        return too_small(before["significant"], "sentences or phrases")


@dataclass(frozen=True)
class Features(Mechanism):
    """Groups of neurons that fire together, made again from the same start, and whether one of them tells a topic."""

    n_per_topic: int = 4
    n_features: int = 20
    keep: float = 0.05
    max_iterations: int = 40

    measures: ClassVar[Mapping[str, str]] = {
        "features": "cosine of matched features",
        "topics told": "AUC of the best feature per topic on new texts, above .5",
    }

    def read(self, subject: Subject, seed: int) -> Reading:
        site, data = Site(subject.n_layers // 2, "neurons"), topics(self.n_per_topic, seed)
        read = read_activations(subject, list(data.texts), site, cut=True)
        held = torch.from_numpy(data.held_out)[read.text]
        made_on = torch.cat([*read.blocks])[~held.to(read.blocks[0].device)]
        settings = SemiNMF(self.n_features, self.keep, max_iterations=self.max_iterations)
        if not bool(made_on.any()):  # a block that is left out reads zeros: there is nothing to factorise
            return {"features": np.zeros((made_on.shape[1], self.n_features)), "auc": np.full(len(data.concepts), 0.5)}
        features = settings.fit([made_on], seed=seed, device=subject.device).features
        scores = text_scores(features, read.blocks, read.text, len(data), subject.device)
        return {"features": features.double().numpy(), "auc": told(scores, data)}

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        first, second = (torch.from_numpy(one["features"]) for one in (before, after))
        return features_above_chance(first, second), above_chance(before["auc"].mean(), after["auc"].mean(), 0.5)

    def lacking(self, before: Reading) -> str:
        low = mean_interval(before["auc"])[1]
        return "" if low > 0.5 else f"no feature tells topics apart: the mean AUC's interval begins at {low:.2f}"


@dataclass(frozen=True)
class Refusals(Mechanism):
    """Whether harmful requests are refused and harmless ones are not, by the first word, read token by token; and the
    direction in the middle of the model that tells them apart, found again."""

    n_requests: int = 24

    measures: ClassVar[Mapping[str, str]] = {
        "refusals": "harmful minus harmless requests refused",
        "refusal direction": "cosine of the direction found again",
    }

    def read(self, subject: Subject, seed: int) -> Reading:
        groups, site = drawn_requests(self.n_requests, seed), Site(subject.n_layers // 2, "resid_out")
        refused = [says(subject, [(one, requests.REFUSAL) for one in prompts]).sum() for prompts in groups.values()]
        direction = difference_in_means(subject, groups["harmful"], groups["harmless"], site)
        return {
            "refused": np.array(refused),  # harmful, harmless
            "asked": np.array([len(prompts) for prompts in groups.values()]),
            "direction": direction.vector.double().numpy(),
        }

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        gaps = [float(-np.diff(one["refused"] / one["asked"])[0]) for one in (before, after)]
        a, b = before["direction"], after["direction"]
        size = float(np.linalg.norm(a) * np.linalg.norm(b))
        return above_chance(*gaps), float(a @ b) / size if size else 0.0

    def lacking(self, before: Reading) -> str:
        low, high = wilson_interval(before["refused"], before["asked"])
        if low[0] > high[1]:
            return ""
        shares = before["refused"] / before["asked"]
        return f"harmful and harmless requests are refused alike: {shares[0]:.0%} and {shares[1]:.0%}"


@dataclass(frozen=True)
class LanguageProfile(Mechanism):
    """What each layer gives the right word in either language, over translations and repetitions."""

    n_per_task: int = 6
    n_words: int = 6

    measures: ClassVar[Mapping[str, str]] = {"latent language": "profile of both languages over layers; flat is 0"}

    def read(self, subject: Subject, seed: int) -> Reading:
        rng, every = np.random.default_rng([seed, 5]), bilingual.word_items(self.n_words, seed)
        of_task = [[item for item in every if item.task == task] for task in TASKS]
        items = [some[i] for some in of_task for i in rng.choice(len(some), self.n_per_task, replace=False)]
        found: Any = LatentLanguage(n_bootstrap=2, seed=seed).run(subject, items)
        values = {task: found.values(task, "normalised") for task in found.task_names}
        said = [values[task][:, -1, found.languages.index(task.split()[-1])] for task in values]
        profile = np.stack([one.mean(axis=0) for one in values.values()])  # (task, layer, language)
        return {"profile": profile, "said": np.concatenate(said), "flat": np.array(0.5 / self.n_words)}

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        return (profile_agreement(before["profile"], after["profile"], float(before["flat"])),)

    def lacking(self, before: Reading) -> str:
        low = mean_interval(before["said"])[1]
        if low > 2 * float(before["flat"]):
            return ""
        return f"the words of neither language are known: the right one gets {before['said'].mean():.0%} of them all"


@dataclass(frozen=True)
class CodesRecalled(Mechanism):
    """A code that was said some words before, said again word for word. The prompt is read at once, as one generates:
    what compresses a cache acts from the second word of the answer on."""

    n_codes: int = 16
    distance: int = 64

    measures: ClassVar[Mapping[str, str]] = {"recall": "share of codes said again word for word"}

    def read(self, subject: Subject, seed: int) -> Reading:
        items = recall.items("held_out", seed, self.n_codes, (self.distance,))
        return {"right": ask(subject, map(as_prompt, items)).exact}

    def kept(self, before: Reading, after: Reading) -> tuple[float, ...]:
        return (above_chance(before["right"].mean(), after["right"].mean()),)

    def lacking(self, before: Reading) -> str:
        return too_few(before["right"], LEAST_SHARE, "codes")


def mechanisms(scale: int = 1) -> tuple[Mechanism, ...]:
    """All of them; the data of each is `scale` times as large, as far as the corpora reach."""
    if scale < 1:
        raise ValueError(f"mechanisms: got scale={scale}, expected a whole number of at least 1.")
    return (
        Fluency(48 * scale),
        FactsAnswered(min(4 * scale, 40)),
        RelationSets(min(4 * scale, 12)),
        SyntaxSets(min(40 * scale, 60), 6 * scale),
        Features(4 * scale),
        Refusals(min(24 * scale, 60)),
        LanguageProfile(min(6 * scale, len(bilingual.DICTIONARY))),
        CodesRecalled(16 * scale),
    )


def told(scores: np.ndarray, data: LabelledTexts) -> np.ndarray:
    """(topic,) AUC on the texts held out, of the feature that tells the topic best where the features were made.

    Best is the one whose scores differ most between texts with and without the topic: with few texts several features
    have an AUC of 1 there, and rounding would choose among them.
    """
    labels, held = np.array(data.labels), data.held_out
    found = []
    for concept in data.concepts:
        inside = labels == concept
        best = int(np.argmax(scores[inside & ~held].mean(axis=0) - scores[~inside & ~held].mean(axis=0)))
        found.append(float(auc(scores[held, best], inside[held])))
    return np.array(found)
