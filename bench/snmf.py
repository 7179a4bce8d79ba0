"""SNMF: time to the same loss against plain multiplicative updates, and what features cause against other methods.

Both updates minimise the same |A - G F^T|^2 from the same start, on the organism's activations, with sparsity and
without; their curves are written too. The small sparse autoencoder gets as many passes over A as SNMF had.
Run: python bench/snmf.py
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import NMF
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, Side, version_of
from bench._timing import machine, record
from workbench import Site, Subject
from workbench.methods.snmf import concepts, factorise
from workbench.methods.snmf.activations import read_activations
from workbench.methods.snmf.baselines import Blocks
from workbench.methods.snmf.factorise import SemiNMF
from workbench.probes import snmf as probe_module
from workbench.probes.snmf import SNMF

LAYER, N_FEATURES, TEXTS_PER_TOPIC = 3, 60, 20
SLOW, FAST, LIBRARY = 300, 60, 50  # iterations
AUTOENCODER, L1, RATE = "sparse autoencoder", 0.02, 3e-3


def main() -> None:
    subject = Subject.organism()
    blocks = activations(subject, TEXTS_PER_TOPIC)
    values = torch.cat(list(blocks))
    print(
        f"layer {LAYER} of the organism, {len(values)} tokens, {values.shape[1]} neurons, K {N_FEATURES}\n{machine()}\n"
    )
    rows: list[dict[str, object]] = []
    for keep in (0.02, 1.0):
        rows += race(blocks, keep)
    rows += [scikit_learn(values)]
    table = causal(subject)
    print(f"\nequal KL, mean over concepts, 95 % interval over concepts:\n{table.to_string(index=False)}")
    rows += [{"what": f"effect of {row['method']}", **row} for row in table.to_dict("records")]
    print(f"written to {record('snmf', rows)}")


def activations(subject: Subject, texts_per_topic: int) -> Blocks:
    texts = concepts.topics(texts_per_topic).texts
    return read_activations(subject, texts, Site(LAYER, "neurons")).blocks


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table: seconds to the loss that the peer ends with."""
    blocks = activations(Subject.organism(), 4 if quick else TEXTS_PER_TOPIC)
    values = torch.cat(list(blocks))
    size = f"SNMF: {len(values):,} tokens x {values.shape[1]} neurons, K {N_FEATURES}"
    slow = 60 if quick else SLOW
    for keep in (0.02, 1.0):
        updates = SemiNMF(N_FEATURES, keep, update="multiplicative", max_iterations=slow, tolerance=0.0)
        goal = 1.001 * min(timed(updates, blocks)["loss"])
        fast = replace(updates, update="hals", max_iterations=FAST)
        what = f"{size}, keep {keep:g}, to the loss {goal:.3f} of {slow} multiplicative updates"
        sides = until(fast, blocks, goal), until(updates, blocks, goal)
        yield Match(what, "SemiNMF, hals", "multiplicative updates", *sides, version_of("torch"), rounds=3, warm=False)
    positive = values.clamp_min(0)
    loss = library(positive)[1]
    unlimited = SemiNMF(N_FEATURES, 1.0, max_iterations=LIBRARY, tolerance=0.0)
    what = f"{size}, of max(A, 0), all kept, to the loss {loss:.3f} of {LIBRARY} iterations of scikit-learn"
    sides = until(unlimited, (positive,), loss), lambda: {"seconds": library(positive)[0]}
    version = version_of("scikit-learn")
    yield Match(what, "SemiNMF (features of any sign)", "NMF (features >= 0)", *sides, version, rounds=3, warm=False)


def until(settings: SemiNMF, blocks: Blocks, goal: float) -> Side:
    """A side that is measured in seconds until the loss is at most `goal`."""

    def measured() -> dict[str, float]:
        curve = timed(settings, blocks)
        seconds = reached(curve, goal)
        if not np.isfinite(seconds):
            raise ValueError(f"{settings.update} updates ended at a loss of {min(curve['loss']):.4f}, not {goal:.4f}")
        return {"seconds": seconds}

    return measured


def reached(curve: dict[str, list[float]], goal: float) -> float:
    """Seconds until the loss is at most `goal`; infinite where it never is."""
    return next((t for t, x in zip(curve["seconds"], curve["loss"], strict=True) if x <= goal), np.inf)


def race(blocks: Blocks, keep: float) -> list[dict[str, object]]:
    """Seconds of both updates to the loss that the multiplicative one ends with, within a thousandth."""
    curves: dict[str, dict[str, list[float]]] = {}
    plan: tuple[tuple[Literal["hals", "multiplicative"], int], ...]
    plan = ("hals", FAST), ("multiplicative", SLOW), ("hals", FAST)  # the first one warms up
    for update, iterations in plan:
        settings = SemiNMF(N_FEATURES, keep, update=update, max_iterations=iterations, tolerance=0.0)
        curves[update] = timed(settings, blocks)
    goal = 1.001 * min(curves["multiplicative"]["loss"])
    seconds = {name: reached(curve, goal) for name, curve in curves.items()}
    steps = {name: int(np.argmax(np.array(c["loss"]) <= goal)) + 1 for name, c in curves.items()}
    ratio = seconds["multiplicative"] / seconds["hals"]
    print(f"keep {keep}: to a loss of {goal:.4f}")
    for name in curves:
        print(f"  {name:16s}{seconds[name]:8.2f} s {steps[name]:5d} iterations; lowest {min(curves[name]['loss']):.4f}")
    print(f"  ratio {ratio:.1f}")
    facts = {"what": f"to the same loss, keep {keep}", "ratio": ratio, "goal": goal}
    return [
        facts
        | {
            "method": name,
            "seconds": seconds[name],
            "iterations": steps[name],
            "curve": list(c["loss"]),
            "curve_seconds": list(c["seconds"]),
        }
        for name, c in curves.items()
    ]


def timed(settings: SemiNMF, blocks: Blocks) -> dict[str, list[float]]:
    """Loss after every iteration, with the seconds since the start."""
    clock, ticks = time.perf_counter(), []

    def ticking(*args: Any) -> float:
        ticks.append(time.perf_counter() - clock)
        return factorise_loss(*args)

    factorise_loss = factorise.gram_loss
    with patch.object(factorise, "gram_loss", ticking):
        fit = settings.fit(blocks)
    return {"loss": fit.loss.tolist(), "seconds": ticks}


def scikit_learn(values: Tensor) -> dict[str, object]:
    """scikit-learn's NMF where the two solve the same problem: non-negative activations, no sparsity."""
    positive = values.clamp_min(0)
    seconds, loss = library(positive)
    ours = timed(SemiNMF(N_FEATURES, 1.0, max_iterations=LIBRARY, tolerance=0.0), (positive,))
    at = reached(ours, loss)
    print(f"scikit-learn NMF of max(A, 0), both factors >= 0: {seconds:.2f} s to {loss:.4f}; semi-NMF: {at:.2f} s")
    return {"what": "scikit-learn NMF (its features are >= 0 as well)", "seconds": seconds, "loss": loss, "ours": at}


def library(values: Tensor) -> tuple[float, float]:
    """Seconds of scikit-learn's iterations, and the loss after them."""
    positive = values.numpy()
    clock = time.perf_counter()
    peer: Any = NMF(
        N_FEATURES,  # type: ignore[arg-type]
        init="random",
        max_iter=LIBRARY,
        tol=0.0,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that 50 iterations were not enough
        weights = peer.fit_transform(positive)
    seconds = time.perf_counter() - clock
    loss = ((positive - weights @ peer.components_) ** 2).sum() / (positive.astype(np.float64) ** 2).sum()
    return seconds, float(loss)


def autoencoder(values: Tensor, n_features: int, passes: int, seed: int = 0) -> Tensor:
    """Decoder columns (m, K) of z = relu(W (a - b) + c), a ~ D z + b with an L1 penalty; columns of D of norm 1."""
    torch.manual_seed(seed)
    m = values.shape[1]
    scale = values.norm(dim=1).mean()
    decoder = torch.nn.functional.normalize(torch.randn(m, n_features), dim=0).requires_grad_()
    encoder = decoder.detach().T.clone().requires_grad_()
    shift, bias = values.mean(0).clone().requires_grad_(), torch.zeros(n_features, requires_grad=True)
    optimiser = torch.optim.Adam([decoder, encoder, shift, bias], lr=RATE)
    for _ in range(passes):
        for rows in torch.randperm(len(values)).split(512):
            some = values[rows] / scale
            code = torch.relu((some - shift / scale) @ encoder.T + bias)
            error = (code @ decoder.T + shift / scale - some).square().sum(1).mean()
            optimiser.zero_grad()
            (error + L1 * code.sum(1).mean()).backward()
            optimiser.step()
            with torch.no_grad():
                decoder /= decoder.norm(dim=0).clamp_min(1e-8)
    return decoder.detach()


def causal(subject: Subject) -> pd.DataFrame:
    """AUC and concept mass at equal KL of every method, the sparse autoencoder among them."""
    probe = SNMF(n_features=40, keep=0.03, restarts=1, max_iterations=100, target_kl=(0.5,))
    usual = concepts.directions_of

    def with_autoencoder(features: Tensor, blocks: Blocks, *rest: Any) -> dict[str, Tensor]:
        values = torch.cat(list(blocks)).float().cpu()
        return usual(features, blocks, *rest) | {
            AUTOENCODER: autoencoder(values, features.shape[1], probe.max_iterations)
        }

    with patch.object(probe_module, "directions_of", with_autoencoder):
        result: Any = probe.run(subject, concepts.topics(TEXTS_PER_TOPIC))
    auc = result.detection.groupby("method")["auc"].mean().rename("auc").reset_index()
    return result.causal_summary().merge(auc, on="method", how="left").round(3)


if __name__ == "__main__":
    main()
