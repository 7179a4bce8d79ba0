"""Frequency tagging: does a response repeat at the rate of a structure? Pure functions of arrays: spectra and nulls.

X_j = sum_{s,p} R[s,p] exp(-2 pi i j p / U);  under exchangeable slots p_j = exp(-|X_j|^2 / V),
V = U^2 / (U - 1) sum_s var_p R[s].  Source: An et al., 2025 (HFTP, arXiv 2510.13255), with the nulls derived here.

R (n_sentences, n_units, n_neurons) holds the response to each unit of each sentence, averaged over many orders of
the sentences; U is n_units. All statistics are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import erfc

from workbench.stats import permutation_p, resampling_weights

GROUP = 10  # texts that the paper averages before it takes a spectrum
NEURONS_AT_ONCE = 1024  # 1024 neurons x 1000 permuted sums x 8 bytes = 8 MB: bounded memory, few calls


def observable_rates(unit_rate_hz: float, n_units: int) -> dict[int, float]:
    """Harmonic to rate in Hz. Only these survive the average over sentence orders; other rates decay to zero."""
    return {j: j * unit_rate_hz / n_units for j in range(1, n_units // 2 + 1)}


def harmonic_of(rate_hz: float, unit_rate_hz: float, n_units: int) -> int:
    """The harmonic of the sentence rate that `rate_hz` is, or ValueError with the rates that can be observed."""
    rates = observable_rates(unit_rate_hz, n_units)
    for harmonic, observable_hz in rates.items():
        if abs(observable_hz - rate_hz) < 1e-6 * unit_rate_hz:
            return harmonic
    listed = ", ".join(f"{value:g}" for value in rates.values())
    raise ValueError(
        f"HFTP: got {rate_hz:g} Hz, but {n_units}-unit sentences at {unit_rate_hz:g} units per second show only "
        f"{listed} Hz: averaged over sentence orders, any other rate decays to 0. Choose one of these."
    )


def slot_basis(n_units: int, harmonics: Sequence[int]) -> np.ndarray:
    """exp(-2 pi i j p / U) as (n_units, n_harmonics); real where the harmonic is the Nyquist rate."""
    basis = np.exp(-2j * np.pi * np.outer(np.arange(n_units), harmonics) / n_units)
    return _without_rounding(basis)


def time_basis(n_times: int, bins: Sequence[int]) -> np.ndarray:
    """exp(-2 pi i k t / T) as (n_times, n_bins): the columns of a Fourier transform that are needed."""
    return _without_rounding(np.exp(-2j * np.pi * np.outer(np.arange(n_times), bins) / n_times))


def sentence_transform(responses: np.ndarray, harmonics: Sequence[int]) -> np.ndarray:
    """The harmonics of each sentence by itself: (n_sentences, n_neurons, n_harmonics); their sum over s is X."""
    basis = slot_basis(responses.shape[1], harmonics)  # (n_units, n_harmonics)
    return np.einsum("spn,pj->snj", responses.astype(np.float64), basis)


def amplitude_scale(n_units: int, harmonics: Sequence[int]) -> np.ndarray:
    """c / U: turns |mean over sentences of the transform| into the amplitude of a sinusoid, in activation units."""
    return np.array([(1.0 if 2 * j == n_units else 2.0) / n_units for j in harmonics])


def amplitude(responses: np.ndarray, harmonics: Sequence[int]) -> np.ndarray:
    """Amplitude at each harmonic: (n_neurons, n_harmonics)."""
    mean = sentence_transform(responses, harmonics).mean(axis=0)  # (n_neurons, n_harmonics)
    return np.abs(mean) * amplitude_scale(responses.shape[1], harmonics)


def slot_null(responses: np.ndarray, harmonics: Sequence[int]) -> np.ndarray:
    """p-values (n_neurons, n_harmonics) under the null that the units of a sentence are exchangeable over slots.

    The closed form is the limit of many sentences, where X is normal. A neuron that never varies has p = 1.
    A response that carries over into the next sentence is not quite exchangeable: on shuffled words .071 +- .006 of the
    trained organism's neurons pass at .05 at the sentence rate, .050 +- .006 at the phrase rate (24 corpora).
    """
    n_units = responses.shape[1]
    power = np.abs(sentence_transform(responses, harmonics).sum(axis=0)) ** 2  # (n_neurons, n_harmonics)
    spread = n_units**2 / (n_units - 1) * responses.var(axis=1, dtype=np.float64).sum(axis=0)  # (n_neurons,)
    size = np.abs(responses).max(axis=(0, 1)).astype(np.float64)
    silent = spread <= responses.shape[0] * (1e-6 * size) ** 2  # constant up to float32 rounding
    ratio = power / np.where(silent, 1.0, spread)[:, None]
    nyquist = np.array([2 * j == n_units for j in harmonics])
    return np.where(silent[:, None], 1.0, np.where(nyquist, erfc(np.sqrt(ratio / 2)), np.exp(-ratio)))


def permutation_null(
    values: np.ndarray, bins: Sequence[int], permutations: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Magnitude, threshold and p-value, each (n_neurons, n_bins), of `values` (n_times, n_neurons) at Fourier bins.

    permutations (n_permutations, n_times) say which time goes where; all neurons share them. Instead of the signals
    the few rows of the Fourier basis are permuted: the whole null is one matrix product per block of neurons.
    """
    basis = time_basis(len(values), bins)  # (n_times, n_bins)
    inverse = np.argsort(permutations, axis=1)  # sum_t x[perm[t]] b[t] = sum_u x[u] b[inverse[u]]
    parts = [[part[inverse] for part in (np.real(column), np.imag(column)) if part.any()] for column in basis.T]
    observed, threshold, p = (np.empty((values.shape[1], len(bins))) for _ in range(3))
    for start in range(0, values.shape[1], NEURONS_AT_ONCE):
        block = slice(start, start + NEURONS_AT_ONCE)
        signal = np.ascontiguousarray(values[:, block].T, dtype=np.float64)  # (n_neurons, n_times)
        power = np.abs(signal @ basis) ** 2  # (n_neurons, n_bins)
        null, term = (np.empty((len(signal), len(permutations))) for _ in range(2))
        for k, rows in enumerate(parts):
            null[:] = 0.0
            for row in rows:  # cosine and sine; at the Nyquist rate only the cosine
                np.matmul(signal, row.T, out=term)
                null += np.square(term, out=term)
            p[block, k] = permutation_p(power[:, k], null, axis=1)
            threshold[block, k] = _quantile_of_root(null, level)
        observed[block] = np.sqrt(power)
    return observed, threshold, p


def permutation_null_reference(
    values: np.ndarray, bins: Sequence[int], permutations: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same as `permutation_null`, slow and obvious, as published: a spectrum per neuron and permutation."""
    observed, threshold, p = (np.empty((values.shape[1], len(bins))) for _ in range(3))
    for neuron, series in enumerate(values.T.astype(np.float64)):
        observed[neuron] = np.abs(np.fft.rfft(series))[bins]
        null = np.array([np.abs(np.fft.rfft(series[permutation]))[bins] for permutation in permutations])
        threshold[neuron] = np.quantile(null, level, axis=0)
        p[neuron] = permutation_p(observed[neuron], null)
    return observed, threshold, p


def time_permutations(n_times: int, n_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Any time may go anywhere: the paper's null, (n_permutations, n_times)."""
    return rng.permuted(np.tile(np.arange(n_times), (n_permutations, 1)), axis=1)


def slot_permutations(n_sentences: int, n_units: int, n_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Slots change places inside their sentence only: (n_permutations, n_sentences * n_units)."""
    cells = np.tile(np.arange(n_sentences * n_units).reshape(-1, n_units), (n_permutations, 1, 1))
    return rng.permuted(cells, axis=2).reshape(n_permutations, -1)


def time_threshold(values: np.ndarray, bins: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `permutation_null` of `time_permutations` gives, in closed form: |X| is Rayleigh, half-normal at Nyquist.

    Within 2 % of 20,000 permutations for normal and heavy tails; not valid where one huge outlier makes the variance.
    """
    n_times = len(values)
    observed = np.abs(values.T.astype(np.float64) @ time_basis(n_times, bins))  # (n_neurons, n_bins)
    power = n_times**2 / (n_times - 1) * values.var(axis=0, dtype=np.float64)[:, None]  # E |X|^2 under permutation
    nyquist = np.array([2 * k == n_times for k in bins])
    threshold = np.sqrt(power) * np.where(nyquist, 1.959964, np.sqrt(np.log(20.0)))
    ratio = observed**2 / np.where(power > 0, power, np.inf)
    return observed, threshold, np.where(nyquist, erfc(np.sqrt(ratio / 2)), np.exp(-ratio))


def paper_effect(
    power: np.ndarray, control_power: np.ndarray, passed: np.ndarray, bins: Sequence[int], n_times: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Amplitude, control amplitude and effect (n_neurons,) of one level in the paper's way.

    power, control_power, passed (n_neurons, n_bins): where a level has several bins, the one with the largest
    difference speaks for it and a negative difference is none. A neuron that passed at no bin has no effect.
    """
    scale = np.array([(1.0 if 2 * k == n_times else 2.0) / n_times for k in bins])
    own, other = power * scale, control_power * scale  # magnitudes as amplitudes, in activation units
    best = (power - control_power).argmax(axis=1)[:, None]
    own, other = (np.take_along_axis(values, best, axis=1)[:, 0] for values in (own, other))
    difference = own - other if len(bins) == 1 else np.maximum(own - other, 0.0)
    return own, other, np.where(passed.any(axis=1), difference, 0.0)


def amplitude_spectrum(values: np.ndarray) -> np.ndarray:
    """Amplitude of a sinusoid at every rate from 0 to Nyquist, (n_times // 2 + 1, n_neurons); no window, mean removed.

    The rate of row k is k * unit_rate_hz / n_times.
    """
    n_times = len(values)
    found = np.abs(np.fft.rfft(values.astype(np.float64), axis=0)) * (2.0 / n_times)
    found[0] = 0.0
    if n_times % 2 == 0:
        found[-1] /= 2
    return found


def detrended(values: np.ndarray) -> np.ndarray:
    """`values` (n_times, n_neurons) without the straight line that fits each neuron best."""
    n_times = len(values)
    slope = np.arange(n_times, dtype=np.float64) - (n_times - 1) / 2
    level = values.mean(axis=0, dtype=np.float64)
    centred = values - level
    gain = slope @ centred / max(slope @ slope, 1.0)  # (n_neurons,)
    return centred - np.outer(slope, gain)


def effect_interval(
    responses: np.ndarray, control: np.ndarray, harmonics: Sequence[int], n_bootstrap: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval (low, high), each (n_neurons, n_harmonics), of amplitude minus control amplitude.

    Sentences are resampled, the same in both conditions, so that what the two share cancels.
    """
    weights = resampling_weights(len(responses), n_bootstrap, seed)  # (n_bootstrap, n_sentences)
    scale = amplitude_scale(responses.shape[1], harmonics)
    low, high = (np.empty((responses.shape[2], len(harmonics))) for _ in range(2))
    for start in range(0, responses.shape[2], NEURONS_AT_ONCE):
        block = slice(start, start + NEURONS_AT_ONCE)
        sizes = []
        for condition in (responses, control):
            each = sentence_transform(condition[:, :, block], harmonics)  # (n_sentences, n_neurons, n_harmonics)
            flat = each.reshape(len(each), -1)
            mean = np.hypot(weights @ np.real(flat), weights @ np.imag(flat))  # (n_bootstrap, n_neurons * n_harmonics)
            sizes.append(mean.reshape(n_bootstrap, *each.shape[1:]) * scale)
        low[block], high[block] = np.quantile(sizes[0] - sizes[1], [0.025, 0.975], axis=0)
    return low, high


class Tally:
    """Running means of one layer's responses under one condition; memory does not grow with the number of texts.

    bins   of the Fourier transform of a text of so many units, to average over time as well; None: over cells only
    """

    def __init__(
        self, n_sentences: int, n_units: int, n_neurons: int, *, detrend: bool, bins: Callable[[int], list[int]] | None
    ) -> None:
        self.n_sentences, self.n_units, self.detrend, self.bins = n_sentences, n_units, detrend, bins
        self.sums = np.zeros((n_sentences * n_units, n_neurons), dtype=np.float32)
        self.counts = np.zeros(len(self.sums), dtype=np.int64)
        self.n_texts = 0
        self.in_time = self.group = self.magnitudes = np.zeros(0)

    def add(self, cells: np.ndarray, first: int, values: np.ndarray) -> None:
        """Add the responses (n_places, n_neurons) to one text; those before place `first` don't count."""
        values, cells = values[first:], cells[first:]
        if not len(values):  # a text of no more sentences than are dropped
            return
        if self.detrend:
            values = detrended(values)  # after the cut: the first token's activation is often enormous
        self.sums[cells] += values  # a text holds each cell at most once
        self.counts[cells] += 1
        self.n_texts += 1
        if self.bins is not None:
            self._add_in_time(values, self.bins(len(values)))

    def seen(self) -> np.ndarray:
        """Which sentences were counted at every slot at least once, (n_sentences,)."""
        return np.all(self.counts.reshape(self.n_sentences, -1) > 0, axis=1)

    def means(self, sentences: np.ndarray) -> np.ndarray:
        """Mean response to each unit of the chosen sentences: (n_sentences, n_units, n_neurons)."""
        means = self.sums / np.maximum(self.counts, 1)[:, None].astype(np.float32)
        return means.reshape(self.n_sentences, self.n_units, -1)[sentences]

    def order_average(self) -> np.ndarray:
        """Mean over texts at each place: (n_places, n_neurons)."""
        return self.in_time / self.n_texts

    def magnitude(self) -> np.ndarray:
        """Mean over groups of texts of the spectrum of the group's mean, at the bins of all levels, side by side."""
        return self.magnitudes / (self.n_texts // GROUP)

    def _add_in_time(self, values: np.ndarray, bins: Sequence[int]) -> None:
        if self.n_texts == 1:
            self.in_time, self.group = np.zeros(values.shape), np.zeros(values.shape)
        self.in_time += values
        self.group += values
        if self.n_texts % GROUP == 0:
            basis = time_basis(len(values), bins)
            found = np.abs(self.group.T @ basis) / GROUP  # (n_neurons, n_bins)
            self.magnitudes = found if self.n_texts == GROUP else self.magnitudes + found
            self.group[:] = 0.0


def _quantile_of_root(squares: np.ndarray, level: float) -> np.ndarray:
    """np.quantile(np.sqrt(squares), level, axis=1) from two order statistics, so that only those need a root."""
    place = level * (squares.shape[1] - 1)
    below = int(place)
    ordered = np.partition(squares, below, axis=1)  # one pivot and a minimum: five times faster than two pivots
    low = np.sqrt(ordered[:, below])
    high = np.sqrt(ordered[:, below + 1 :].min(axis=1)) if below + 1 < squares.shape[1] else low
    return low + (place - below) * (high - low)


def _without_rounding(basis: np.ndarray) -> np.ndarray:
    """cos and sin of multiples of a right angle as exact zeros: a real column is then seen to be real."""
    real, imag = (np.where(np.abs(part) < 1e-12, 0.0, part) for part in (np.real(basis), np.imag(basis)))
    return real + 1j * imag
