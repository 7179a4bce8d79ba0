"""Random models that several benchmarks share: wide enough for the forward to be the cost."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbench import Subject


def realistic_subject() -> Subject:
    """A random model of 8 blocks, d_model 512, wide enough for the forward to be the cost."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    return Subject(LlamaForCausalLM(config).eval(), Subject.tiny().tokenizer, name="random-512")
