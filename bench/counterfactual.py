"""What dice that can be thrown again cost per decoding step: against the forward, and against noise from a generator.

128,256 tokens, the vocabulary of Llama 3. The forward is one cached step of a small random Llama with that vocabulary:
in larger models the shares are smaller. Also the memory that repeats a text: an integer, against a generator's states.
Run: python bench/counterfactual.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._timing import machine, medians, record
from workbench.dice import Dice, uniform

VOCAB, D_MODEL, N_LAYERS, CONTEXT = 128_256, 512, 8, 64
DICE = {
    "full": Dice(),
    "top_k 50": Dice(sampler="top_k", top_k=50),
    "top_p .9": Dice(sampler="top_p", top_p=0.9),
    "rank": Dice(sampler="rank"),
    "inverse_cdf": Dice(sampler="inverse_cdf"),
}


def main() -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=4 * D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    print(f"{VOCAB} tokens; Llama with d_model {D_MODEL}, {N_LAYERS} layers, float32; {machine()}")
    print(f"the uniforms are those of plain integers: {exact()}\n")
    rows = [row for batch in (1, 8) for row in steps(model, batch)]
    state = torch.Generator().get_state().numel()
    print(f"to repeat a text of 100 tokens: 8 bytes of seed, against {100 * state:,} bytes of generator states")
    rows.append(
        {"what": "bytes to repeat 100 tokens", "seconds": float("nan"), "bytes": 8, "bytes_states": 100 * state}
    )
    print(f"written to {record('counterfactual', rows)}")


@torch.no_grad()
def steps(model: LlamaForCausalLM, batch: int) -> list[dict[str, object]]:
    """Median seconds of one step's parts, for `batch` rows."""
    ids = torch.zeros(batch, CONTEXT, dtype=torch.int64)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    generator, positions = torch.Generator().manual_seed(0), torch.full((batch,), CONTEXT)
    ranks = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(batch)])
    logits = -1.5 * (1.0 + ranks).log()  # Zipf's law: the nucleus of .9 has about a hundred tokens

    def forward() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    def drawn() -> torch.Tensor:
        noise = torch.rand(batch, VOCAB, generator=generator, dtype=torch.float64).clamp_min_(1e-300)
        return (logits.double() + noise.log_().neg_().log_().neg_()).argmax(-1)

    rivals = {"forward": forward, "generator noise": drawn}
    rivals |= {name: lambda dice=dice: dice.choose(logits, range(batch), positions) for name, dice in DICE.items()}
    seconds = medians(rivals, repeats=15)
    rows = []
    for name, value in seconds.items():
        against = {
            "ratio_to_forward": value / seconds["forward"],
            "ratio_to_generator": value / seconds["generator noise"],
        }
        rows.append({"what": name, "batch": batch, "seconds": value, **against})
        print(f"batch {batch}  {name:18s} {1e3 * value:8.2f} ms   {against['ratio_to_forward']:6.3f} of the forward   "
              f"{against['ratio_to_generator']:6.2f} x generator noise")  # fmt: skip
    print()
    return rows


def exact() -> bool:
    """Whether a few uniforms equal SplitMix64 written in Python's own integers."""

    def slow(*counters: int) -> float:
        state = 0
        for counter in counters:
            z = (state + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            state = z ^ (z >> 31)
        return ((state >> 12) + 0.5) / 2**52

    ids = [0, 1, VOCAB - 1]
    found = uniform(7, torch.tensor([3]), torch.tensor([CONTEXT]), torch.tensor(ids))[0].tolist()
    return found == [slow(7, 3, CONTEXT, token) for token in ids]


if __name__ == "__main__":
    main()
