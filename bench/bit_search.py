"""The exact search for bits per layer against NSGA-II, the published one: error of the best plan, and seconds.

Both minimise the same summed error over the same pairs within the same bits; NSGA-II also after clustering layers.
Run: python bench/bit_search.py   (needs optuna, a peer that the project itself does not use: pip install optuna==5.0.0)
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match
from bench._timing import machine, record
from bench.peers import PeerProcess
from workbench.methods.cache.bits import PAIRS, clusters, pareto, search

LAYERS, CAP, SEEDS = (4, 8, 32, 80), 4.0, 3
TRIALS = (100, 1000)  # 100 is what was published
COSTS = np.sum(PAIRS, axis=1)


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table: seconds, and the error of the plan that was found."""
    layers = LAYERS[1] if quick else LAYERS[2]
    with PeerProcess("optuna") as peer:
        for trials in TRIALS:
            what = f"bits per layer: {layers} layers, at most {CAP:g} bits on average"
            theirs = peer.side("search", layers=layers, trials=trials)
            yield Match(what, "search, exact", f"NSGA-II, {trials} trials", lambda: exact(layers), theirs, peer.version)


def exact(n_layers: int) -> dict[str, float]:
    """Seconds of the exact search and the error of its plan."""
    errors = profile(n_layers, 0)
    started = time.perf_counter()
    plan = search(errors, np.broadcast_to(COSTS, errors.shape), budget_of(n_layers))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "summed error": float(errors[np.arange(n_layers), plan].sum())}


def published(n_layers: int, trials: int) -> dict[str, float]:
    """The same of NSGA-II, without clusters."""
    errors, alone = profile(n_layers, 0), np.arange(n_layers)
    kept = np.array([pareto(row, COSTS) for row in errors])
    started = time.perf_counter()
    error = nsga2(errors, kept, alone, budget_of(n_layers), trials, 0)
    return {"seconds": time.perf_counter() - started, "summed error": error}


def budget_of(n_layers: int) -> int:
    return math.floor(2 * n_layers * CAP)


def optuna() -> Any:
    """The library, silent. Raises SystemExit where it is not installed."""
    try:
        library: Any = importlib.import_module("optuna")
    except ModuleNotFoundError:
        raise SystemExit("bit_search: optuna is not installed. Run: pip install optuna==5.0.0") from None
    library.logging.set_verbosity(library.logging.ERROR)
    return library


def main() -> None:
    optuna()
    print(f"mean bits <= {CAP:g}, pairs {{8, 4, 2}} x {{8, 4, 2}}; medians over {SEEDS} profiles; {machine()}\n")
    rows: list[dict[str, object]] = []
    for n_layers in LAYERS:
        found = [compared(n_layers, seed) for seed in range(SEEDS)]
        for name in found[0]:
            excess, seconds = np.median([one[name] for one in found], axis=0)
            rows.append(
                {"what": name, "layers": n_layers, "error_over_exact": float(excess), "seconds": float(seconds)}
            )
            print(f"{n_layers:3d} layers  {name:34s} error {excess:7.3f} x the exact one   {seconds:9.4f} s")
    print(f"\nwritten to {record('bit_search', rows)}")
    if any(float(str(row["error_over_exact"])) < 1 - 1e-9 for row in rows):
        raise SystemExit("NSGA-II found a better plan than the exact search")


def compared(n_layers: int, seed: int) -> dict[str, tuple[float, float]]:
    """(error over that of the exact plan, seconds) of each way to search one random profile."""
    errors, costs = profile(n_layers, seed), np.broadcast_to(COSTS, (n_layers, len(PAIRS)))
    budget = budget_of(n_layers)
    kept = np.array([pareto(*row) for row in zip(errors, costs, strict=True)])
    groups, alone = clusters(errors, kept, 0.1), np.arange(n_layers)
    started = time.perf_counter()
    exact = search(errors, costs, budget)
    seconds = time.perf_counter() - started
    least = errors[alone, exact].sum()
    found = {"exact": (1.0, seconds)}
    for name, shared in (("NSGA-II", alone), ("NSGA-II, layers clustered", groups)):
        for trials in TRIALS:
            started = time.perf_counter()
            error = nsga2(errors, kept, shared, budget, trials, seed)
            found[f"{name}, {trials} trials"] = (error / least, time.perf_counter() - started)
    return found


def profile(n_layers: int, seed: int) -> np.ndarray:
    """(layer, pair) errors as they are measured: about 2^-bits of each side, layers of very different sensitivity."""
    rng = np.random.default_rng(seed)
    keys, values = np.exp(rng.normal(0.0, 1.0, (2, n_layers, 1)))
    bits = np.array(PAIRS, dtype=float)
    errors = np.hypot(keys * 2.0 ** -bits[:, 0], values * 2.0 ** -bits[:, 1])
    return errors * np.exp(rng.normal(0.0, 0.05, errors.shape))


def nsga2(errors: np.ndarray, kept: np.ndarray, groups: np.ndarray, budget: int, trials: int, seed: int) -> float:
    """The least error within the budget that NSGA-II finds; infinite where no trial keeps to it."""
    layers = np.arange(len(errors))
    menu = [np.nonzero(kept[groups == group].all(axis=0))[0].tolist() for group in range(int(groups.max()) + 1)]

    def chosen(trial: Any) -> np.ndarray:
        picks = [pairs[trial.suggest_int(f"group {n}", 0, len(pairs) - 1)] for n, pairs in enumerate(menu)]
        return np.array(picks)[groups]

    def objective(trial: Any) -> tuple[float, float]:
        plan = chosen(trial)
        bits = float(COSTS[plan].sum())
        trial.set_constraint("budget", bits - budget)
        return float(errors[layers, plan].sum()), bits

    library = optuna()
    sampler = library.samplers.NSGAIISampler(seed=seed)
    study = library.create_study(directions=["minimize", "minimize"], sampler=sampler)
    study.optimize(objective, n_trials=trials)
    within = [trial.values[0] for trial in study.trials if trial.values[1] <= budget]
    return min(within, default=math.inf)


if __name__ == "__main__":
    main()
