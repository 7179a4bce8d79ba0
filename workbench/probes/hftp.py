"""Which neurons follow syntax? Those whose activity repeats at the rate of sentences or phrases in a steady stream.

X_j = sum_{s,p} R[s,p] exp(-2 pi i j p / U), R the mean response to unit p of sentence s over many sentence orders.
Source: An et al., 2025, "Hierarchical Frequency Tagging Probe" (arXiv 2510.13255); its test and ours, see `mode`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from workbench.corpora.streams import UnitCorpus
from workbench.corpora.streams import corpus as stream_corpus
from workbench.methods.hftp.streaming import World, as_corpus
from workbench.methods.hftp.tagged import HFTPResult
from workbench.methods.hftp.tagtest import FrequencyTest, Layer
from workbench.methods.hftp.units import read_units, sentences_that_fit
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class HFTP(Probe):
    """Finds MLP neurons that repeat at the sentence or phrase rate. Data: a UnitCorpus or rows of equal length.

    mode             "corrected": valid test, FDR over all neurons of all layers; "paper": as published
    null_model       "slot": closed form; "slot_permutation": the same by permuting slots inside sentences;
                     "time": the paper's, far too lenient for order-averaged responses. None: slot, time in mode "paper"
    control          what the effect is measured against, see `make_streams`; "category" needs slot classes.
                     None: category where the corpus has slot classes, else scramble; scramble in mode "paper"
    n_shuffles       sentence orders per condition
    levels           ((name, rate in Hz), ...) to test; None: those of the corpus
    detrend          "linear" takes a straight line out of each text; None leaves drift in
    drop_first       sentences at the start of each text that are read but not counted
    rotate_start     start each text at another slot of its first, uncounted sentence, against effects of position
    n_permutations   for the permutation nulls; 0 in mode "paper" is the closed form of its threshold. The smallest
                     p is 1 / (n_permutations + 1): with many neurons, FDR needs many permutations or the closed form
    special          add the tokenizer's special tokens, which are never units; None: not in mode "paper"
    sentences_per_text  None: the whole corpus in one text where the context allows, else as many as fit
    layers, layers_at_once  which layers; how many share one forward (memory: 8 bytes x their neurons x units)
    """

    mode: Literal["corrected", "paper"] = "corrected"
    null_model: Literal["slot", "slot_permutation", "time"] | None = None
    control: Literal["scramble", "fixed_scramble", "category", "shuffle"] | None = None
    n_shuffles: int = 100
    seed: int = 0
    fdr: float = 0.05
    unit_rate_hz: float = 4.0
    levels: tuple[tuple[str, float], ...] | None = None
    detrend: Literal["linear"] | None = "linear"
    drop_first: int = 1
    rotate_start: bool = True
    n_permutations: int = 1000
    n_bootstrap: int = 1000
    special: bool | None = None
    sentences_per_text: int | None = None
    layers: tuple[int, ...] | None = None
    layers_at_once: int | None = None
    spectra: Literal["top", "all", "none"] = "top"

    bounds: ClassVar[Bounds] = {
        "fdr": (0, 1),
        "n_permutations": 0,
        "n_bootstrap": 1,
        "sentences_per_text": 1,
        "layers": 0,
        "layers_at_once": 1,
    }

    def measure(self, subject: Subject, data: Any) -> HFTPResult:
        corpus = as_corpus(data)
        test = FrequencyTest.of(self, corpus)
        layers = tuple(range(subject.n_layers)) if self.layers is None else self.layers
        special = self.mode == "corrected" if self.special is None else self.special
        per_text = sentences_that_fit(test, subject, corpus, special)
        at_once = self.layers_at_once or len(layers)
        found: list[Layer] = []
        for start in range(0, len(layers), at_once):
            reader = partial(read_units, subject, corpus, layers[start : start + at_once], special)
            found += test.analyse(reader, per_text)
        return test.result(found, layers, corpus, per_text)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Sinusoids in 60 of 1000 neurons, lexical responses in all; the corrected mode must find those 60 only."""
        return _planted("planted", cls(seed=seed), World.of(seed, amplitude=0.5, lexical_sd=0.5))

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Purely lexical responses: p-values must be uniform and nothing may survive the correction."""
        return _planted("null", cls(seed=seed), World.of(seed, amplitude=0.0, lexical_sd=1.0))

    @classmethod
    def example(cls, subject: Subject) -> tuple[HFTP, UnitCorpus]:
        return cls(n_shuffles=4, n_bootstrap=100), stream_corpus("four", 12)


def solved(world: World, probe: HFTP) -> HFTPResult:
    """What `probe` finds in a simulated world."""
    rows = np.arange(len(world.lexical)).astype(str).reshape(-1, len(world.pattern))
    simulated = UnitCorpus("simulated", tuple(map(tuple, rows.tolist())))
    test = FrequencyTest.of(probe, simulated)
    return test.result(test.analyse(world.read, test.n_sentences), (0,), simulated, test.n_sentences)


def _planted(name: str, probe: HFTP, world: World) -> Planted:
    """A world with its truth: which neurons follow the sentence, the phrase, both, or nothing."""
    has = np.greater(np.abs(np.fft.rfft(world.pattern, axis=0)[1:3]).T, 1e-6)  # (n_neurons, 2): sentence, phrase
    silent = ~has.any(axis=1)

    def share(level: int, among: np.ndarray) -> Callable[[Any], float]:
        return lambda found: float(found.significant[0][among, level].mean())

    def rate(level: int) -> Callable[[Any], float]:
        return lambda found: float((found.p[0][silent, level] <= 0.05).mean())

    tests = []
    for k, level in enumerate(("sentence", "phrase")):
        if has[:, k].any():
            tests.append(Expectation(f"recall at the {level} rate", share(k, has[:, k]), 0.95, 1.0))
            tests.append(Expectation(f"wrong level: {level}", share(k, has[:, 1 - k] & ~has[:, k]), 0.0, 0.05))
        else:
            tests.append(Expectation(f"p <= .05 at the {level} rate", rate(k), 0.03, 0.07))
        tests.append(Expectation(f"false detections at the {level} rate", share(k, np.asarray(silent)), 0.0, 0.03))
    arrays = {"pattern": world.pattern, "lexical": world.lexical, "follows": has}
    return Planted(name, arrays, lambda: solved(world, probe), tuple(tests))
