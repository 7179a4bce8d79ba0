"""Carved and skipped feed-forward blocks against dense ones: one block at two widths, and a whole model while decoding.

Random weights and random experts of equal sizes, 2 shared and 2 routed of 16, so that a quarter of the neurons runs:
what is timed is the slices, not what they say. A mask is never timed: it saves nothing.
Run: python bench/experts.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._timing import machine, medians, record
from workbench import Subject
from workbench.methods.pruning.experts import Experts
from workbench.toggle import Toggle
from workbench.toggles.carve_moe import CarveMoE
from workbench.toggles.skip_ffn import SkipFFN

WIDTHS = ((512, 1408), (1024, 2816))  # d_model, d_mlp
TOKENS = (1, 16, 128)
EXPERTS, SHARED, ACTIVE = 16, 2, 2
LAYERS, NEW = 4, 24
TARGET = 2.0  # x dense, at T = 1 and T = 128, from d_model 1024 on


@torch.no_grad()
def main() -> None:
    print(f"{SHARED + ACTIVE} of {EXPERTS} experts, float32, {torch.get_num_threads()} threads; {machine()}\n")
    rows: list[dict[str, object]] = []
    for d_model, d_mlp in WIDTHS:
        subject = random_subject(d_model, d_mlp)
        carved = random_experts(subject)
        rows += [one_block(subject, carved, tokens) for tokens in TOKENS]
        rows += whole_model(subject, carved)
    print(f"written to {record('experts', rows)}")


def one_block(subject: Subject, carved: CarveMoE, tokens: int) -> dict[str, object]:
    """One feed-forward block, dense and carved."""
    mlp = subject.model.get_submodule(f"{subject.anatomy.blocks}.1.mlp")
    x = torch.randn(1, tokens, subject.anatomy.d_model, generator=torch.Generator().manual_seed(tokens))
    with ExitStack() as undo:
        undo.enter_context(subject.under(carved))
        subject.model(input_ids=torch.tensor([[1, 2]]))  # a toggle that is never used warns
        sliced = mlp.forward
        dense: Callable[[Tensor], Tensor] = type(mlp).forward.__get__(mlp)
        repeats = max(20, 2000 // tokens)
        seconds = medians({"dense": lambda: dense(x), "carved": lambda: sliced(x)}, repeats)
    ratio = seconds["dense"] / seconds["carved"]
    d_model = subject.anatomy.d_model
    wanted = d_model >= 1024 and tokens in (1, 128)
    told = f"   target {TARGET:g} x: {'met' if ratio >= TARGET else 'missed'}" if wanted else ""
    print(
        f"block {d_model:5d} x {subject.anatomy.d_mlp:5d}  T={tokens:4d}   dense {1e6 * seconds['dense']:9.0f} µs   "
        f"carved {1e6 * seconds['carved']:9.0f} µs   {ratio:5.2f} x{told}"
    )
    numbers: dict[str, object] = {"dense_s": seconds["dense"], "toggled_s": seconds["carved"], "ratio": ratio}
    return {"what": "one block, carved", "d_model": d_model, "d_mlp": subject.anatomy.d_mlp, "tokens": tokens} | numbers


def whole_model(subject: Subject, carved: CarveMoE) -> list[dict[str, object]]:
    """Milliseconds per token of greedy decoding at batch 1: dense, carved, and with a quarter of the blocks resting."""
    quarter = (1,)
    toggles: Mapping[str, Toggle] = {
        "carved to a quarter": carved,
        "static layers rest": SkipFFN(static=quarter, warmup=0),
        "a test for every token": SkipFFN(-1.0, 0, 1, warmup=0, run=1),
    }
    prompt = [list(range(8, 40))]

    def decoding(one: Subject) -> Callable[[], object]:
        return lambda: one.generate(prompt, max_new_tokens=NEW)

    with ExitStack() as undo:  # a copy for each: entering a toggle, which cuts weights, is not what is timed
        copies = {name: random_subject(subject.anatomy.d_model, subject.anatomy.d_mlp or 0) for name in toggles}
        for name, toggle in toggles.items():
            undo.enter_context(copies[name].under(toggle))
        rivals = {"dense": decoding(subject)} | {name: decoding(copy) for name, copy in copies.items()}
        seconds = medians(rivals, 9)
    rows: list[dict[str, object]] = []
    for name in toggles:
        ratio = seconds["dense"] / seconds[name]
        print(
            f"model {subject.anatomy.d_model:5d} x {subject.anatomy.d_mlp:5d}  {name:24s} "
            f"{1e3 * seconds[name] / NEW:7.2f} ms per token, dense {1e3 * seconds['dense'] / NEW:7.2f}   {ratio:5.2f} x"
        )
        numbers: dict[str, object] = {"dense_s": seconds["dense"], "toggled_s": seconds[name], "ratio": ratio}
        rows.append(
            {
                "what": f"model, {name}",
                "d_model": subject.anatomy.d_model,
                "d_mlp": subject.anatomy.d_mlp,
                "tokens": NEW,
            }
            | numbers
        )
    return rows


def random_experts(subject: Subject) -> CarveMoE:
    """Experts of equal sizes from neurons drawn by lot."""
    width = subject.anatomy.d_mlp or 0
    size = width // EXPERTS
    layers = []
    for layer in range(subject.n_layers):
        drawn = torch.randperm(width, generator=torch.Generator().manual_seed(layer)).tolist()
        parts = [tuple(sorted(drawn[start : start + size])) for start in range(0, (EXPERTS - SHARED) * size, size)]
        shared = tuple(sorted(drawn[(EXPERTS - SHARED) * size :]))
        layers.append(Experts(layer, shared, tuple(parts), tuple(part[0] for part in parts)))
    return CarveMoE(tuple(layers), ACTIVE)


def random_subject(d_model: int, d_mlp: int) -> Subject:
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=LAYERS,
        num_attention_heads=d_model // 64,
        vocab_size=1213,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    name = f"random llama {d_model} x {d_mlp}"
    return Subject(LlamaForCausalLM(config).eval(), Subject.tiny().tokenizer, name=name, verify=False)


if __name__ == "__main__":
    main()
