"""Tiny untrained models of many families, for tests and as controls: random weights, milliseconds to make.

They share the organism's tokenizer, so any text of the project's corpora can be fed to all of them.
`organism` is the organism's untrained twin: the same architecture with random weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from workbench.organism import FOLDER

D_MODEL, N_LAYERS, N_HEADS, D_MLP, CONTEXT = 32, 3, 4, 48, 512

_COMMON: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = _COMMON | {"intermediate_size": D_MLP, "num_key_value_heads": 2, "head_dim": D_MODEL // N_HEADS}
_GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_inner": D_MLP, "n_positions": CONTEXT}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma2": _GROUPED | {"sliding_window": CONTEXT, "query_pre_attn_scalar": D_MODEL // N_HEADS},
    "gpt2": _GPT2,
    "gpt_neox": _COMMON | {"intermediate_size": D_MLP},
    "phi": _COMMON | {"intermediate_size": D_MLP},
    "opt": _COMMON | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL},
    "falcon": _COMMON | {"ffn_hidden_size": D_MLP},
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "mistral": _GROUPED,
    "phi3": _COMMON | {"intermediate_size": D_MLP, "num_key_value_heads": 2},
    "gemma3_text": _GROUPED | {"sliding_window": CONTEXT, "query_pre_attn_scalar": D_MODEL // N_HEADS},
    "olmo2": _GROUPED,
}


def tiny_model(
    family: str, *, vocab: int, special: dict[str, int], seed: int = 0, twin: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A random model of `family` in evaluation mode, float32; the same seed gives the same weights.

    special   ids of pad, bos and eos token          twin   the configuration that family="organism" repeats
    """
    if family == "organism" and twin is not None:
        config = twin
    elif family in FAMILIES:
        # 1 / sqrt(d_model) keeps activations of order one, so that every part of the model matters to the logits.
        scale = {"initializer_range": D_MODEL**-0.5}
        config = AutoConfig.for_model(family, vocab_size=vocab, **FAMILIES[family], **special, **scale)
    else:
        raise ValueError(f"tiny: got family {family!r}, expected organism or one of {', '.join(FAMILIES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def tiny_pair(family: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tiny model and the organism's tokenizer, made for each other."""
    tokenizer = _tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    twin = AutoConfig.from_pretrained(FOLDER) if family == "organism" else None
    return tiny_model(family, vocab=len(tokenizer), special=special, seed=seed, twin=twin), tokenizer


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)
