"""Raises the organism: `python -m workbench.organism.train`, under two hours on two CPU cores.

Equation: minimise sum_t w_t nll_t / sum_t w_t with AdamW; learning rate = peak * cosine after a linear warm-up.
Source: Loshchilov and Hutter, 2019 (AdamW). A killed run goes on with --resume and ends in the same bytes. Where other
work runs too, set OMP_WAIT_POLICY=PASSIVE: waiting threads then sleep, and the bytes stay the same.
"""

import argparse
import csv
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .architecture import Shape, model, tokenizer
from .mixture import PHENOMENA, STAGES, Batch, Stage, batch, fingerprint

CHECKPOINT, CURVE, MADE = "checkpoint.safetensors", "curve.csv", "training.json"
OUT = Path("runs") / "organism"


@dataclass(frozen=True)
class Recipe:
    """Everything the weights depend on, apart from the machine and the library versions."""

    steps: int = 6_000
    seed: int = 0
    threads: int = 2
    compile: bool = True  # 1.3 times as fast; needs a C++ compiler, and rounds differently from the uncompiled model
    peak_rate: float = 3e-3
    final_rate: float = 3e-5
    warmup: int = 200
    weight_decay: float = 0.02
    clip: float = 1.0
    shape: Shape = field(default_factory=Shape)
    stages: tuple[Stage, ...] = STAGES

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_rate + (self.peak_rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def train(recipe: Recipe, out: Path, *, resume: bool = False, log_every: int = 50, save_every: int = 500) -> Path:
    """Trains, leaves the weights, tokenizer and curve in `out`, and returns `out`."""
    if recipe.steps < 1:
        raise ValueError(f"train: got steps={recipe.steps}, expected 1 or more.")
    out.mkdir(parents=True, exist_ok=True)
    with _repeatable(recipe.threads):
        return _train(recipe, out, resume, log_every, save_every)


@contextmanager
def _repeatable(threads: int) -> Iterator[None]:
    """The same sums in the same order each time; both global settings are put back."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(threads)
        # the compiled backward pass of the embedding adds with atomics otherwise: another order, other bytes
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _train(recipe: Recipe, out: Path, resume: bool, log_every: int, save_every: int) -> Path:
    organism = model(recipe.shape, recipe.seed)
    optimizer = torch.optim.AdamW(
        organism.parameters(), lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    first, spent, tokens, rows = _restore(recipe, out, organism, optimizer) if resume else _begin(out)
    loss_of = _losses(organism, recipe.compile)
    began, window = time.monotonic(), _Window()
    for step, read in _ahead(recipe, first):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        nll = loss_of(torch.from_numpy(read.ids), torch.from_numpy(read.documents))  # (batch, seq)
        weights = torch.from_numpy(read.weights)
        loss = (nll * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(organism.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        tokens += read.ids.size
        window.add(loss.item(), nll.detach().numpy(), read)
        done = step + 1
        if done % log_every == 0 or done == recipe.steps:
            rows.append({"step": done, "tokens": tokens, **window.close()})
            _show(rows[-1], recipe.steps, first, time.monotonic() - began)
        if done % save_every == 0 and done < recipe.steps:
            _save(recipe, out, organism, optimizer, done, spent + time.monotonic() - began, tokens, rows)
    return _finish(recipe, out, organism, tokens, spent + time.monotonic() - began, rows)


def _losses(organism: torch.nn.Module, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """ids, documents (batch, seq) -> nats of the next token (batch, seq); what stands at the last position weighs 0."""
    if compiled and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise ValueError("train: got compile=True, found no C++ compiler. Install g++, or pass --no-compile (slower).")

    def losses(ids: Tensor, documents: Tensor) -> Tensor:
        same = documents[:, None, :, None] == documents[:, None, None, :]  # (batch, 1, seq, seq)
        mask = same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        logits = organism(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return nll.view_as(ids)

    return torch.compile(losses, dynamic=False) if compiled else losses


def _ahead(recipe: Recipe, first: int) -> Iterator[tuple[int, Batch]]:
    """Every step with its batch, the next one being written while this one is learned from."""

    def read(step: int) -> Batch:
        return batch(recipe.seed, step, step / recipe.steps, recipe.stages)

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, first)
        for step in range(first, recipe.steps):
            ready = coming.result()
            coming = reader.submit(read, step + 1)
            yield step, ready


class _Window:
    """Means since the last line of the curve: the loss, and the nats per token of each phenomenon."""

    def __init__(self) -> None:
        self.losses, self.sums, self.counts = [], np.zeros(len(PHENOMENA)), np.zeros(len(PHENOMENA))

    def add(self, loss: float, nll: np.ndarray, read: Batch) -> None:
        known = read.phenomena >= 0
        which = read.phenomena[known]
        self.losses.append(loss)
        self.sums += np.bincount(which, nll[known].astype(np.float64), len(PHENOMENA))
        self.counts += np.bincount(which, minlength=len(PHENOMENA))

    def close(self) -> dict[str, float]:
        means = np.divide(self.sums, self.counts, out=np.full(len(PHENOMENA), np.nan), where=self.counts > 0)
        row = {"loss": float(np.mean(self.losses))} | dict(zip(PHENOMENA, means.tolist(), strict=True))
        self.__init__()
        return row


def _show(row: dict, steps: int, first: int, seconds: float) -> None:
    """One line: where the training is, and how long it still takes at the pace since the start or resumption."""
    pace = (row["step"] - first) / max(seconds, 1e-9)
    parts = " ".join(f"{name}={row[name]:.3f}" for name in PHENOMENA)
    left = (steps - row["step"]) / pace / 60
    print(
        f"step {row['step']}/{steps} loss={row['loss']:.4f} {parts} {pace:.2f} steps/s, {left:.1f} min left", flush=True
    )


def _begin(out: Path) -> tuple[int, float, int, list[dict]]:
    for name in (CHECKPOINT, CURVE, MADE):
        (out / name).unlink(missing_ok=True)
    return 0, 0.0, 0, []


def _described(recipe: Recipe) -> str:
    return json.dumps(asdict(recipe), sort_keys=True)


def _save(recipe, out, organism, optimizer, done: int, spent: float, tokens: int, rows: list[dict]) -> None:
    """Weights, both moments and the curve in one file, whole or not at all."""
    tensors = {}
    for name, parameter in organism.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"weight.{name}": parameter.detach(), f"first.{name}": state["exp_avg"]}
        tensors |= {f"second.{name}": state["exp_avg_sq"], f"step.{name}": state["step"]}
    about = {"recipe": _described(recipe), "done": str(done), "spent": str(spent), "tokens": str(tokens)}
    draft = out / (CHECKPOINT + ".part")
    save_file(tensors, draft, about | {"rows": json.dumps(rows)})
    draft.replace(out / CHECKPOINT)
    _write_curve(out, rows)


def _restore(recipe, out, organism, optimizer) -> tuple[int, float, int, list[dict]]:
    """Puts the last checkpoint back; without one the run begins at step 0."""
    if not (out / CHECKPOINT).exists():
        return _begin(out)
    with safe_open(out / CHECKPOINT, "pt") as file:
        about = file.metadata()
        if about["recipe"] != _described(recipe):
            raise ValueError(
                f"train: got another recipe than the checkpoint in {out} was made with: {about['recipe']}. "
                "Resume with the same arguments, or choose another --out."
            )
        for name, parameter in organism.named_parameters():
            parameter.data.copy_(file.get_tensor(f"weight.{name}"))
            parts = {"step": "step", "exp_avg": "first", "exp_avg_sq": "second"}
            optimizer.state[parameter] = {key: file.get_tensor(f"{part}.{name}") for key, part in parts.items()}
    return int(about["done"]), float(about["spent"]), int(about["tokens"]), json.loads(about["rows"])


def _write_curve(out: Path, rows: list[dict]) -> None:
    draft = out / (CURVE + ".part")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "tokens", "loss", *PHENOMENA])
        writer.writeheader()
        writer.writerows([{k: round(v, 5) for k, v in row.items()} for row in rows])
    draft.replace(out / CURVE)


def _finish(recipe, out: Path, organism, tokens: int, spent: float, rows: list[dict]) -> Path:
    """The Hugging Face folder, the curve and how it was made; the checkpoint goes."""
    _write_curve(out, rows)
    draft = out / ".part"
    organism.save_pretrained(draft)
    tokenizer(recipe.shape.context).save_pretrained(draft)
    made = {
        "recipe": asdict(recipe),
        "texts": fingerprint(recipe.seed, recipe.steps, recipe.stages),
        "tokens": tokens,
        "minutes": round(spent / 60, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
    }
    (draft / MADE).write_text(json.dumps(made, indent=1) + "\n")
    for file in draft.iterdir():
        file.replace(out / file.name)
    draft.rmdir()
    (out / CHECKPOINT).unlink(missing_ok=True)
    return out


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.organism.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT, help="a folder; the shipped one is never the default")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--no-compile", action="store_true", help="without a C++ compiler: slower, rounds differently")
    parser.add_argument("--no-card", action="store_true", help="do not measure the trained model")
    chosen = parser.parse_args(arguments)
    recipe = Recipe(steps=chosen.steps, seed=chosen.seed, threads=chosen.threads, compile=not chosen.no_compile)
    train(recipe, chosen.out, resume=chosen.resume)
    if not chosen.no_card:
        from .card import write_card

        write_card(chosen.out)


if __name__ == "__main__":
    main()
