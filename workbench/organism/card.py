"""The organism's card: what it is, how it was raised, what it can do and what it cannot, as a page and as data.

Law: card.json holds exactly the rows that exam.examine returns, CARD.md the same rows in words.
Source: Mitchell et al., 2019 (model cards). train.py writes it at the end, `python -m workbench.organism.card` again.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from . import FOLDER
from .exam import examine, load
from .mixture import ANSWER_WEIGHT, OTHER_ANSWER_WEIGHT, SHARES

PAGE, DATA = "CARD.md", "card.json"

LIMITS = """
* Its world is {words} words. Any other word is an error in a `Subject`; elsewhere it becomes `<unk>`,
  which the model has never seen.
* It knows only seven kinds of text. Outside them its words mean nothing; it cannot chat, count or reason.
* What is found in it is found in {parameters:.2f} M parameters raised on templates. That a method works here shows that
  the method is right, not that large models are built in the same way.
* Texts begin with `<bos>`, as in training. No document was longer than {context} tokens: do not trust it beyond.
* A dictionary entry that training never showed cannot be guessed, so word pairs have no held-out split. Held-out
  sentences, requests, programs and stories are new combinations of known words.
* Recall was trained with one code in a text. Two codes in one text were never shown.
* Inside the first sentence of a stream the frame cannot be known; a four-word and an eight-word stream can only be told
  apart at the fifth word.
"""


def write_card(folder: Path = FOLDER, seed: int = 0) -> pd.DataFrame:
    """Measures the model in a folder and writes CARD.md and card.json beside it; returns the table."""
    model, tokenizer = load(folder)
    table = examine(model, tokenizer, seed)
    made = json.loads((folder / "training.json").read_text())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    data = {
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "exam_seed": seed,
        "made": made,
        "rows": json.loads(str(table.to_json(orient="records", double_precision=6))),
    }
    _write(folder / DATA, json.dumps(data, indent=1) + "\n")
    _write(folder / PAGE, page(data))
    return table


def page(data: dict) -> str:
    """The card as Markdown."""
    made, recipe, rows = data["made"], data["made"]["recipe"], data["rows"]
    shape = recipe["shape"]
    judged = [row for row in rows if row["met"] is not None]
    missed = [row for row in judged if not row["met"]]
    words, parameters = data["vocabulary"], data["parameters"] / 1e6
    lines = [
        "# The organism",
        "",
        f"A Llama-architecture model of {parameters:.2f} M parameters ({shape['n_layers']} layers, d_model "
        f"{shape['d_model']}, {shape['n_heads']} query and {shape['n_kv_heads']} key/value heads, d_mlp "
        f"{shape['d_mlp']}, RoPE, RMSNorm, SwiGLU, tied embeddings, context {shape['context']}), raised on texts that "
        f"`workbench.corpora` writes. One token is one word; {words} words. Weights: float32, "
        f"{data['weights_bytes'] / 1e6:.1f} MB.",
        "",
        "## How it was raised",
        "",
        f"`python -m workbench.organism.train`, seed {recipe['seed']}: {recipe['steps']} steps, "
        f"{made['tokens'] / 1e6:.1f} M tokens, {made['minutes']:.0f} minutes with {recipe['threads']} threads on CPU "
        f"({made['machine']}, shared with other work), torch {made['torch']}"
        f"{', compiled' if recipe['compile'] else ''}. Fused AdamW, peak rate {recipe['peak_rate']}, cosine to "
        f"{recipe['final_rate']}, weight decay {recipe['weight_decay']}, gradients clipped at norm {recipe['clip']}. "
        "Weights start at standard deviation 1/sqrt(d_model). "
        f"Answer words weigh more in the loss than other words (recall {ANSWER_WEIGHT['recall']:g}, others "
        f"{OTHER_ANSWER_WEIGHT:g}).",
        "",
        "Shares of the tokens: " + ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items()) + ".",
        "",
        *_stages(recipe["stages"]),
        "",
        "The same command on the same machine and library versions gives the same bytes; another processor or torch "
        "version rounds differently and gives a sibling, not a copy. `curve.csv` holds the losses.",
        "",
        "## What it can do",
        "",
        "Held-out items, except facts whose form says `seen` and word pairs; 95 % intervals; "
        f"{len(judged) - len(missed)} of {len(judged)} targets met.",
        "",
        "| phenomenon | form | measure | value | 95 % interval | target | n | met |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(row) for row in rows),
        "",
        "Targets that it misses: " + ("none." if not missed else "; ".join(map(_missed, missed)) + "."),
        "",
        "## What it cannot do",
        LIMITS.format(words=words, parameters=parameters, context=shape["context"]).rstrip(),
    ]
    return "\n".join(lines) + "\n"


def _stages(stages: list[dict]) -> list[str]:
    rows = ["| until | rows x length | largest recall distance |", "|---|---|---|"]
    for stage in stages:
        first, last = stage["nearest"]
        rows.append(f"| {stage['until']:.0%} | {stage['rows']} x {stage['length']} | {first} to {last} |")
    return rows


def _row(row: dict) -> str:
    if row["target"] is None:
        target = ""
    elif row["measure"] == "share of braces":
        target = f"{row['target']:.2f} ± 0.05"
    else:
        target = f"≥ {row['target']:.2f}"
    met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    cells = (row["phenomenon"], row["form"], row["measure"], f"{row['value']:.3f}", interval, target, row["n"], met)
    return "| " + " | ".join(map(str, cells)) + " |"


def _missed(row: dict) -> str:
    return f"{row['phenomenon']} ({row['form']}): {row['value']:.3f} instead of {row['target']:.2f}"


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(path.suffix + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.organism.card", description=__doc__)
    parser.add_argument("--weights", type=Path, default=FOLDER)
    write_card(parser.parse_args().weights)


if __name__ == "__main__":
    main()
