"""DropBlocks equals a model without those blocks, in every way of reading and writing; and all comes back."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging

from workbench import Clamp, EvictKV, PyramidInfer, QuantizeKV, Site, Steer, Subject
from workbench.cache.held import held_bytes
from workbench.corpora import requests
from workbench.organism.tiny import tiny_pair
from workbench.pruned import Plan
from workbench.pruned import blocks as blocks_module
from workbench.pruned.blocks import attention_of
from workbench.toggle import Toggle
from workbench.toggles.drop_blocks import DropBlocks
from workbench.toggles.prune import Prune

logging.disable_progress_bar()
WINDOW, N_LAYERS, NEW = 6, 4, 5
IDS = torch.tensor([[5, 9, 2, 7, 11, 30, 4, 8]])
TEXTS = (requests.prompt("paint", "lamp"), requests.prompt("paint", "lamp") + " " + requests.prompt("smash", "bell"))
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": 1, "eos_token_id": None}
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "use_sliding_window": True}
HYBRID = [FULL, FULL, SLIDING, SLIDING]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "mistral with a window": ("mistral", SIZES | WINDOWED),
    "qwen2": ("qwen2", SIZES),
    "qwen2, full and sliding": ("qwen2", SIZES | WINDOWED | {"layer_types": HYBRID}),
    "gemma2": ("gemma2", SIZES | WINDOWED | {"query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", SIZES | WINDOWED | {"query_pre_attn_scalar": 8}),
    "olmo2": ("olmo2", SIZES),
    "gpt2": ("gpt2", GPT2),
}


@functools.cache
def subject_of(name: str) -> Subject:
    """A small model of one of the kinds above, with windows shorter than the texts."""
    family, options = MODELS[name]
    config = AutoConfig.for_model(family, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return Subject(model, tiny_pair("llama")[1], name=name)


def deleted(subject: Subject, blocks: tuple[int, ...]) -> Any:
    """A copy of the model from which the blocks were taken out for good, as an export does it."""
    model: Any = copy.deepcopy(subject.model)
    listed = model.get_submodule(subject.anatomy.blocks)
    left = [layer for layer in range(subject.n_layers) if layer not in blocks]
    for slot, layer in enumerate(left):
        attention_of(model, subject.anatomy, layer).layer_idx = slot
    trunk, _, name = subject.anatomy.blocks.rpartition(".")
    setattr(model.get_submodule(trunk), name, torch.nn.ModuleList([listed[layer] for layer in left]))
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        model.config.layer_types = [types[layer] for layer in left]
    model.config.num_hidden_layers = len(left)
    return model


def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def decoded(model: Any, cache: Any) -> torch.Tensor:
    """Logits of a loop written by hand that gives no positions and no mask: the model asks its cache for both."""
    ids, said = IDS, []
    with torch.no_grad():
        for _ in range(NEW):
            said.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1])
            ids = said[-1].argmax(-1, keepdim=True)
    return torch.stack(said)


def everything(model: Any) -> dict[str, torch.Tensor]:
    """What the model says in every way of asking it."""
    return {
        "forward": logits(model),
        "generate": model.generate(IDS, max_new_tokens=NEW, do_sample=False),
        "decode": decoded(model, DynamicCache(config=model.config)),
        "decode, static": decoded(model, StaticCache(config=model.config, max_cache_len=IDS.shape[1] + NEW)),
    }


def static_generated(model: Any) -> torch.Tensor:
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    return model.generate(IDS, cache_implementation="static", **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("blocks", [(0,), (N_LAYERS - 1,), (1, 2), (0, N_LAYERS - 1)], ids=str)
def test_a_model_under_the_toggle_equals_one_without_the_blocks_to_the_bit(name: str, blocks: tuple[int, ...]) -> None:
    subject = subject_of(name)
    cut = deleted(subject, blocks)
    expected, plain = everything(cut), logits(subject.model)
    with subject.under(DropBlocks(blocks)):
        found = everything(subject.model)
    for way, value in expected.items():
        assert torch.equal(found[way], value), f"{way}: off by {float((found[way] - value).abs().max()):.1e}"
    assert not torch.equal(expected["forward"], plain)
    with subject.under(DropBlocks(blocks)):
        assert torch.equal(static_generated(subject.model), static_generated(cut))


def test_without_new_slots_a_cache_takes_the_wrong_length(monkeypatch) -> None:
    """What the slots are for: the same blocks dropped, every block in its old slot."""
    subject = subject_of("llama")
    expected = decoded(deleted(subject, (0,)), DynamicCache(config=subject.model.config))
    monkeypatch.setattr(blocks_module, "number_slots", lambda *_: None)
    with subject.under(DropBlocks((0,))):
        found = decoded(subject.model, DynamicCache(config=subject.model.config))
    assert torch.equal(found[0], expected[0]) and float((found - expected).abs().max()) > 0.1


def test_slots_are_given_within_the_type_of_a_layer_and_come_back() -> None:
    subject = subject_of("qwen2, full and sliding")

    def slots() -> list[int]:
        return [vars(attention_of(subject.model, subject.anatomy, n))["layer_idx"] for n in range(N_LAYERS)]

    config = subject.model.config.to_json_string()
    for blocks, expected in (((0,), [0, 0, 2, 3]), ((0, 2), [0, 0, 2, 2]), ((2, 3), [0, 1, 2, 3])):
        with subject.under(DropBlocks(blocks)):
            logits(subject.model)
            left = [n for n in range(N_LAYERS) if n not in blocks]
            assert [slots()[n] for n in left] == [expected[n] for n in left]
            assert subject.model.config.to_json_string() == config
    assert slots() == [0, 1, 2, 3] and not any("forward" in vars(m) for m in subject.model.modules())
    assert subject.model.config.to_json_string() == config


def test_what_a_cache_could_not_do_without_is_refused() -> None:
    subject = subject_of("qwen2, full and sliding")
    plain = logits(subject.model)
    with (
        pytest.raises(ValueError, match="no block of type full_attention would attend"),
        subject.under(DropBlocks((0, 1))),
    ):
        pass
    every = DropBlocks((0, 1)) | DropBlocks((2, 3))
    with pytest.raises(ValueError, match="all 4 blocks would be gone"), subject_of("llama").under(every):
        pass
    with pytest.raises(ValueError, match=r"got block 4, but .* has blocks 0 to 3"), subject.under(DropBlocks((1, 4))):
        pass
    assert torch.equal(logits(subject.model), plain)
    config = AutoConfig.for_model("gpt2", **GPT2, scale_attn_by_inverse_layer_idx=True)
    scaled = Subject(AutoModelForCausalLM.from_config(config).eval(), subject.tokenizer, name="scaled")
    with pytest.raises(ValueError, match="scales attention by the number of the block"), scaled.under(DropBlocks((1,))):
        pass


@pytest.mark.parametrize("wrong", [(-1,), (1.5,), ("3",), 3, "37", None])
def test_what_is_no_list_of_blocks_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"DropBlocks: got blocks=.* expected numbers of blocks"):
        DropBlocks(wrong)


def test_it_is_a_value_whose_blocks_have_no_order() -> None:
    toggle = DropBlocks([2, 0, 2])  # type: ignore[arg-type]
    assert toggle == DropBlocks((0, 2)) and hash(toggle) == hash(DropBlocks((0, 2)))
    assert Toggle.from_json(toggle.to_json()) == toggle and str(toggle) == "DropBlocks(0, 2)"


def test_dropping_nothing_is_the_identity_and_says_that_it_never_acted() -> None:
    subject = subject_of("llama")
    plain = logits(subject.model)
    with pytest.warns(UserWarning, match="never fired"), subject.under(DropBlocks(())):
        assert torch.equal(logits(subject.model), plain)


def test_nested_drops_drop_the_union_and_come_off_one_by_one() -> None:
    subject = subject_of("llama")
    with subject.under(DropBlocks((0, 1, 2))):
        union = everything(subject.model)
    with subject.under(DropBlocks((0, 1))):
        outer = logits(subject.model)
        with subject.under(DropBlocks((1, 2))):
            found = everything(subject.model)
            freed = [receipt.bytes_freed for receipt in subject.receipts]
        assert torch.equal(logits(subject.model), outer)
    assert all(torch.equal(found[way], union[way]) for way in union) and freed[0] == 2 * freed[1]
    plan = Prune(Plan.of(subject, drop=[1])) | DropBlocks((0, 2))
    with subject.under(plan):
        assert torch.equal(logits(subject.model), union["forward"])


def test_inside_a_dropped_block_captures_read_zeros_and_conservation_holds() -> None:
    subject = Subject.tiny("llama")
    kinds = ("heads", "attn_out", "gate", "up", "neurons", "mlp_out")
    sites = [Site(1, kind) for kind in (*kinds, "resid_in", "resid_out")]  # type: ignore[misc]
    with subject.under(DropBlocks((1,))):
        read = subject.capture(TEXTS, sites)
    for site in sites[:-2]:
        assert not read[site].any() and read[site].shape[1:] == subject.anatomy.width(site)
    assert read[sites[-2]].any() and torch.equal(read[sites[-2]], read[sites[-1]])


def test_steering_the_stream_beside_a_dropped_block_works_and_its_units_are_not_heard() -> None:
    subject = Subject.tiny("llama")
    with subject.under(DropBlocks((1,))):
        plain = logits(subject.model)
        with pytest.warns(UserWarning, match="never fired"), subject.under(Clamp({Site(1, "neurons"): [3]}, 9.0)):
            assert torch.equal(logits(subject.model), plain)
        with subject.under(Steer(torch.ones(32), Site(1, "resid_out"), 2.0)):
            pushed = logits(subject.model)
    with subject.under(DropBlocks((1,)) | Steer(torch.ones(32), Site(1, "resid_in"), 2.0)):
        assert torch.equal(logits(subject.model), pushed) and not torch.equal(pushed, plain)


def test_the_cache_holds_numbers_for_the_blocks_that_are_left_and_no_others() -> None:
    subject = subject_of("llama")
    ids = torch.arange(34).reshape(2, 17)  # batch of 2, 17 tokens

    def held() -> int:
        cache = subject.model(input_ids=ids, use_cache=True).past_key_values
        return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.is_initialized)

    per_block = 2 * 2 * 17 * 8 * 2  # keys and values, batch, tokens, d_head, key/value heads
    assert held() == N_LAYERS * per_block == 4352
    for blocks in ((0,), (1, 3)):
        with subject.under(DropBlocks(blocks)):
            assert held() == (N_LAYERS - len(blocks)) * per_block
            left = sum(p.nbytes for n in blocks for p in subject.model.model.layers[n].parameters())
            assert subject.receipts[0].bytes_freed == left and subject.receipts[0].tokens == 34


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_toggles_on_caches_act_on_the_blocks_that_are_left(name: str) -> None:
    subject = Subject.tiny(name)
    for squeezed in (EvictKV(6, sinks=1, window=3), QuantizeKV(4, 4, group=8, residual=0, sinks=0)):
        for blocks in ((0,), (1,), (2,)):
            for toggle in (DropBlocks(blocks) | squeezed, squeezed | DropBlocks(blocks)):
                with subject.under(toggle):
                    written = subject.generate(list(TEXTS), max_new_tokens=6).ids
                    assert all(receipt.fired and receipt.bytes_freed for receipt in subject.receipts)
                    assert tuple(subject.generate([text], max_new_tokens=6).ids[0] for text in TEXTS) == written


def bytes_per_block(subject: Subject, toggle: Toggle) -> dict[int, int]:
    """What the cache holds for each block after a text of 40 tokens."""
    with subject.under(toggle), torch.no_grad():
        cache: Any = subject.model(input_ids=torch.arange(40)[None], use_cache=True).past_key_values
        return {layer.layer: held_bytes(layer) for layer in cache.layers if layer.is_initialized}


@pytest.mark.parametrize(
    "per_layer",
    [
        QuantizeKV((8, 2, 16, 4), (16, 4, 2, 8), group=8, residual=0, sinks=0),
        EvictKV(16, schedule="pyramid", sinks=1, window=3),
    ],
    ids=["bits per layer", "budgets per layer"],
)
def test_what_a_toggle_is_told_per_layer_belongs_to_the_block_and_not_to_its_slot(per_layer: Toggle) -> None:
    subject = subject_of("llama")
    whole = bytes_per_block(subject, per_layer)
    assert len(set(whole.values())) == N_LAYERS
    for blocks in ((0,), (0, 2)):
        left = {layer: size for layer, size in whole.items() if layer not in blocks}
        assert bytes_per_block(subject, DropBlocks(blocks) | per_layer) == left
        assert bytes_per_block(subject, per_layer | DropBlocks(blocks)) == left


def test_a_pyramid_narrows_over_the_blocks_that_are_left() -> None:
    subject = subject_of("llama")
    pyramid = PyramidInfer(decay=0.5, min_context=4, sinks=1)
    for blocks in ((0,), (1,), (N_LAYERS - 1,), (0, 2)):
        held = bytes_per_block(subject, DropBlocks(blocks) | pyramid)
        assert list(held) == [block for block in range(N_LAYERS) if block not in blocks]
        sizes = list(held.values())
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1], (blocks, sizes)
        whole = 40 * 2 * subject.anatomy.n_kv_heads * subject.anatomy.d_head * 4 * len(held)  # tokens, keys and values
        with subject.under(DropBlocks(blocks) | pyramid), torch.no_grad():
            subject.model(input_ids=torch.arange(40)[None], use_cache=True)
            freed = subject.receipts[1].bytes_freed
        assert 0 < freed < whole
