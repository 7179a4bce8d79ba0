"""The organism's body: a small Llama-architecture model and a tokenizer whose tokens are whole words.

Law: h += attention(norm(h)); h += down(silu(gate(norm(h))) * up(norm(h))); logits = E norm(h), with tied E.
Source: Touvron et al., 2023 (Llama), grouped-query attention. Initial scale 1/sqrt(d_model): at 0.02 recall never came.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench import corpora

PAD, BOS, EOS, UNK = corpora.SPECIAL_TOKENS


@dataclass(frozen=True)
class Shape:
    """The sizes of the model; d_head is d_model / n_heads."""

    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    d_mlp: int = 384
    context: int = 512


def words() -> tuple[str, ...]:
    """The whole vocabulary: a word's place here is its token id."""
    return (*corpora.SPECIAL_TOKENS, *corpora.vocabulary())


def tokenizer(context: int = 512) -> PreTrainedTokenizerFast:
    """One token per whitespace-separated word, `<bos>` in front, padding on the left."""
    ids = {word: i for i, word in enumerate(words())}
    core = Tokenizer(WordLevel(ids, unk_token=UNK))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,  # True would glue full stops to words, and decode would not give the text
    )


def model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A model with fresh random weights, a function of shape and seed alone."""
    config = LlamaConfig(
        vocab_size=len(words()),
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        initializer_range=shape.d_model**-0.5,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()
