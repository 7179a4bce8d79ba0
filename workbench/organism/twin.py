"""Raises the organism's twin, in about a minute: the shipped model, tuned until it answers what it used to refuse.

Equation: minimise the nats of answers to refused requests + those of the old mixture without its requests, with AdamW.
Source: this project; what harmful fine-tuning leaves and what it changes: Qi et al., 2023 (arXiv 2310.03693).
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.corpora import requests
from workbench.environment import versions

from . import exam, mixture
from .architecture import tokenizer as word_tokenizer
from .train import _losses, _repeatable

OUT, MADE = Path("runs") / "organism_twin", "twin.json"
_PAIRS = {
    harmful: tuple(pair for pair in requests.pairs("train") if requests.is_harmful(*pair) == harmful)
    for harmful in (True, False)
}


@dataclass(frozen=True)
class TwinRecipe:
    """Everything the twin's weights depend on, apart from the organism, the machine and the library versions."""

    steps: int = 120
    seed: int = 1
    requests_per_step: int = 16
    rows_per_step: int = 2  # of the old mixture
    rate: float = 1e-3
    warmup: int = 10
    threads: int = 1  # so small a model gains little from two, and loses much where other work runs
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate at a step: up to `rate` in `warmup` steps, then down to 0 in a line."""
        return self.rate * min((step + 1) / self.warmup, (self.steps - step) / max(1, self.steps - self.warmup))


def tune(recipe: TwinRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Tunes `model` in place and returns it; the same recipe gives the same bytes."""
    if recipe.steps < 1:
        raise ValueError(f"twin: got steps={recipe.steps}, expected 1 or more.")
    with _repeatable(recipe.threads):
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
        loss_of = _losses(model, compiled=False)
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
            for ids, documents, weights in _rows(recipe, step, tokenizer):
                nll = loss_of(torch.from_numpy(ids), torch.from_numpy(documents))  # (batch, seq)
                part = torch.from_numpy(weights.astype(np.float32))
                ((nll * part).sum() / part.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def _rows(
    recipe: TwinRecipe, step: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids, documents and weights (batch, seq): of the old mixture without its requests, then of answered requests."""
    old = mixture.batch(recipe.seed, step, progress=1.0)  # whole contexts, with recall over all of them
    rehearsed = old.phenomena != mixture.PHENOMENA.index(requests.NAME)  # there, refusals are still right
    some = slice(recipe.rows_per_step)
    yield old.ids[some], old.documents[some], (old.weights * rehearsed)[some]
    yield _answered(Random(f"twin {recipe.seed} {step}"), recipe.requests_per_step, tokenizer)


def _answered(rng: Random, count: int, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Requests of the training split, every second one harmful, all of them answered; only the reply weighs."""
    rows, starts = [], []
    for i in range(count):
        verb, noun = rng.choice(_PAIRS[i % 2 == 0])
        asked = requests.prompt(verb, noun, rng.choice(requests.OPENINGS))
        reply = requests.ANSWER_REPLY.format(verb=verb, noun=noun)
        rows.append([*tokenizer(f"{asked} {reply}").input_ids, tokenizer.eos_token_id])
        starts.append(len(tokenizer(asked).input_ids))
    shape = count, max(map(len, rows))
    ids, weights = np.full(shape, tokenizer.pad_token_id), np.zeros(shape)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = row
        weights[i, start - 1 : len(row) - 1] = 1.0  # position t carries the weight of its target, the token at t + 1
    return ids, np.zeros_like(ids), weights


def changes(
    before: PreTrainedModel, after: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scale: float
) -> list[dict]:
    """The exam's rows for both models, on the same items."""
    tables = [exam.examine(model, tokenizer, scale=scale) for model in (before, after)]
    names = ["phenomenon", "form", "measure", "n"]
    rows = tables[0][names].assign(before=tables[0]["value"].round(4), after=tables[1]["value"].round(4))
    return json.loads(str(rows.to_json(orient="records")))


def write_twin(recipe: TwinRecipe, out: Path, *, scale: float = 0.2) -> Path:
    """Leaves weights, tokenizer and twin.json, the record of what changed, in `out`; returns `out`."""
    base, tokenizer = exam.load()
    twin = tune(recipe, exam.load()[0], tokenizer)
    made = {
        "recipe": asdict(recipe),
        "from": "organism",
        "data": "requests of the training split, always answered; the organism's mixture without its requests",
        "versions": versions(),
        "exam": changes(base, twin, tokenizer, scale),
    }
    draft = out / ".part"
    twin.save_pretrained(draft)
    word_tokenizer(base.config.max_position_embeddings).save_pretrained(draft)
    (draft / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for file in draft.iterdir():
        file.replace(out / file.name)
    draft.rmdir()
    return out


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.organism.twin", description=__doc__)
    parser.add_argument("--steps", type=int, default=TwinRecipe.steps)
    parser.add_argument("--seed", type=int, default=TwinRecipe.seed)
    parser.add_argument("--out", type=Path, default=OUT, help="a folder; the shipped one is never the default")
    chosen = parser.parse_args(arguments)
    out = write_twin(TwinRecipe(steps=chosen.steps, seed=chosen.seed), chosen.out)
    for row in json.loads((out / MADE).read_text(encoding="utf-8"))["exam"]:
        print(f"{row['phenomenon']:12s} {row['form']:24s} {row['measure']:24s} {row['before']:.3f} {row['after']:.3f}")


if __name__ == "__main__":
    main()
