"""Prune: mask equals slice, dead units cost nothing, sites keep their numbers, caches shrink, and all comes back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workbench import Clamp, EvictKV, LowRankKV, QuantizeKV, Site, Steer, Subject
from workbench.corpora import requests
from workbench.methods.neurons.neuron_weights import neuron_vectors
from workbench.organism.tiny import tiny_pair
from workbench.pruned import LayerPlan, Plan, Shape
from workbench.pruned.report import parameter_bytes
from workbench.pruned.units import find_units
from workbench.swap import stand_in, swap
from workbench.toggles.prune import Prune

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi",
    "opt",
    "falcon",
    "phi3",
)
IDS = torch.tensor([[5, 9, 2, 7, 11, 30, 4, 8]])
TEXTS = (requests.prompt("paint", "lamp"), requests.prompt("paint", "lamp") + " " + requests.prompt("smash", "bell"))


def double(family: str) -> Subject:
    subject = Subject.tiny(family)
    subject.model.double()
    return subject


def logits(subject: Subject, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return subject.model(input_ids=ids).logits


def plans(subject: Subject) -> dict[str, Plan]:
    """Widths that differ by layer, whole groups, one head per group, families that are off, a dropped block."""
    a = subject.anatomy
    last_group = {"kv_heads": [a.n_kv_heads - 1]} if a.n_kv_heads > 1 else {"heads": range(0, a.n_heads, 2)}
    every_other = {"heads": range(0, a.n_heads, 2)}  # two per group of grouped families, so one is left of each
    return {
        "widths": Plan.of(subject, {0: {"neurons": range(0, 48, 3)}, 1: {"neurons": range(5, 40)}}),
        "heads": Plan.of(subject, {0: last_group, 1: every_other}),
        "all at once": Plan.of(subject, {0: last_group | {"neurons": range(7)}, 2: {"neurons": range(41)}}, drop=[1]),
        "ffn off": Plan.of(subject, {1: {"neurons": ()}}),
        "attention off": Plan.of(subject, {0: {"heads": ()}}),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_equals_slice(family: str) -> None:
    subject = double(family)
    plain = logits(subject)
    for name, plan in plans(subject).items():
        said, written = [], []
        for form in ("mask", "slice"):
            with subject.under(Prune(plan, form)):
                said.append(logits(subject))
                written.append(subject.generate(list(TEXTS), max_new_tokens=5).ids)
        torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-12, msg=f"{family}, {name}")  # measured 3e-15
        assert written[0] == written[1] and not torch.equal(said[0], plain), f"{family}, {name}"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_mask_equals_slice_in_float32_with_either_attention(implementation: str) -> None:
    subject = Subject.tiny("qwen2")
    subject.model.set_attn_implementation(implementation)
    for plan in plans(subject).values():
        said = []
        for form in ("mask", "slice"):
            with subject.under(Prune(plan, form)):
                said.append(logits(subject))
        torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-5)  # fp32, measured 4e-6


def test_a_switch_of_attention_inside_the_toggle_reaches_sliced_layers() -> None:
    subject = Subject.tiny("llama")
    with subject.under(Prune(plans(subject)["heads"])):
        subject.model.set_attn_implementation("eager")
        attention = subject.model.model.layers[0].self_attn
        assert attention.config._attn_implementation == "eager" and attention.config.num_key_value_heads == 1
        subject.model.set_attn_implementation("sdpa")
        logits(subject)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_removing_dead_units_changes_no_logit(family: str) -> None:
    subject = double(family)
    down = subject.anatomy.module(subject.model, Site(1, "neurons"))
    out = subject.anatomy.module(subject.model, Site(1, "heads"))
    with torch.no_grad():
        for module, columns in ((down, slice(3, 9)), (out, slice(0, 2 * subject.anatomy.d_head))):
            weight: Any = module.weight
            weight[(columns,) if family == "gpt2" else (slice(None), columns)] = 0.0
    neurons = [n for n in range(48) if not 3 <= n < 9]
    plan = Plan.of(subject, {1: {"neurons": neurons, "heads": [2, 3]}})
    plain = logits(subject)
    for form in ("mask", "slice"):
        with subject.under(Prune(plan, form)):
            torch.testing.assert_close(logits(subject), plain, rtol=0, atol=1e-13)  # order of sums


def test_uneven_groups_are_refused_with_the_layer_and_the_counts() -> None:
    shape = Shape(2, 64, 8, 2, 8, 96)
    with pytest.raises(
        ValueError, match=r"layer 1 keeps 7 query heads on 2 key/value heads unevenly \(3 on 0, 4 on 1\)"
    ):
        Plan(shape, ((1, LayerPlan(heads=(1, 2, 3, 4, 5, 6, 7))),))
    with pytest.raises(ValueError, match=r"layer 0 keeps heads that read key/value heads \[0\], but names \[1\]"):
        Plan(shape, ((0, LayerPlan(heads=(0, 1), kv_heads=(1,))),))
    with pytest.raises(ValueError, match="keeps all 8 heads, but 1 of 2"):
        Plan(shape, ((0, LayerPlan(heads=tuple(range(8)), kv_heads=(1,))),))
    with pytest.raises(ValueError, match="got neurons 96, expected 0 to 95"):
        Plan(shape, ((0, LayerPlan(neurons=(96,))),))
    with pytest.raises(ValueError, match="all 2 blocks are dropped"):
        Plan(shape, dropped=(0, 1))


def test_a_plan_is_a_value_that_survives_json_edits_and_joins(tmp_path) -> None:
    subject = Subject.tiny("llama")
    for plan in plans(subject).values():
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan == Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert hash(Plan.load(tmp_path / "plan.json")) == hash(plan)
    plan = Plan.of(subject, {0: {"neurons": range(10)}})
    assert plan.edit(0, neurons=None) == Plan.of(subject) and plan.edit(0, neurons=range(48)) == Plan.of(subject)
    assert plan.edit(1, kv_heads=[1]).at(1).heads == (2, 3)
    both = plan & Plan.of(subject, {0: {"neurons": range(5, 20)}}, drop=[2])
    assert both.at(0).neurons == (5, 6, 7, 8, 9) and both.dropped == (2,) and both.kept(2, "heads") == 0
    assert str(both) == "keeps 4 of 6 key/value heads, 8 of 12 heads, 53 of 144 neurons, without block 2"
    for wrong in ({"format": 2}, {"format": 1}, plan.to_json() | {"layers": 3}):
        with pytest.raises(ValueError, match="Plan: "):
            Plan.from_json(wrong)
    with (
        pytest.raises(ValueError, match=r"made for .* Was it made on another model"),
        subject.under(Prune(Plan.of(Subject.tiny("gpt2")))),
    ):
        pass


def test_nested_plans_keep_what_both_keep_and_come_off_one_by_one() -> None:
    subject = double("llama")
    one, two = plans(subject)["widths"], plans(subject)["all at once"]
    with subject.under(Prune(one & two)):
        joined = logits(subject)
    for first in ("mask", "slice"):
        for second in ("mask", "slice"):
            with subject.under(Prune(one, first)):
                outer, weight = logits(subject), subject.model.model.layers[0].mlp.down_proj.weight
                with subject.under(Prune(two, second)):
                    torch.testing.assert_close(logits(subject), joined, rtol=0, atol=1e-12)
                assert torch.equal(logits(subject), outer)
                assert subject.model.model.layers[0].mlp.down_proj.weight is weight


def test_sites_keep_their_numbers_and_removed_units_read_as_zero() -> None:
    for family in ("llama", "gpt2", "phi3", "opt"):
        subject = double(family)
        plan = plans(subject)["all at once"]
        kinds = [kind for kind in ("heads", "gate", "up", "neurons", "mlp_out") if kind in subject.anatomy.places[0]]
        sites = [Site(layer, kind) for layer in range(3) for kind in kinds]  # type: ignore[arg-type]
        read = []
        for form in ("mask", "slice"):
            with subject.under(Prune(plan, form)):
                read.append(subject.capture(TEXTS, sites))
        plain = subject.capture(TEXTS, sites)
        for site in sites:
            assert read[1][site].shape == plain[site].shape
            torch.testing.assert_close(read[1][site], read[0][site], rtol=0, atol=1e-12)
        gone = [n for n in range(48) if n not in plan.at(0).neurons]  # type: ignore[operator]
        assert not read[1][Site(0, "neurons")][:, gone].any() and read[1][Site(0, "neurons")].any()
        assert not read[1][Site(1, "heads")].any() and not read[1][Site(1, "mlp_out")].any()
        with subject.under(Prune(plans(subject)["widths"])):
            some = subject.capture(TEXTS, [Site(0, "neurons")])
        kept, every = some[Site(0, "neurons")][:, ::3], plain[Site(0, "neurons")][:, ::3]
        torch.testing.assert_close(kept, every, rtol=0, atol=1e-12)


def test_conservation_holds_at_a_dropped_block() -> None:
    subject = double("llama")
    sites = [Site(1, kind) for kind in ("resid_in", "attn_out", "mlp_out", "resid_out")]  # type: ignore[misc]
    with subject.under(Prune(Plan.of(subject, drop=[1]))):
        read = subject.capture(TEXTS, sites)
        before, attention, mlp, after = (read[site] for site in sites)
        assert torch.equal(before + attention + mlp, after)


def test_steering_a_removed_unit_does_nothing_and_a_kept_one_the_same_in_both_forms() -> None:
    subject = double("llama")
    plan = Plan.of(subject, {1: {"neurons": range(0, 48, 2), "heads": [0, 2]}})
    removed = Clamp({Site(1, "neurons"): [1, 3], Site(1, "heads"): [9]}, 50.0)
    kept = Clamp({Site(1, "neurons"): [2, 4], Site(1, "heads"): [1]}, 50.0)
    said = []
    for form in ("mask", "slice"):
        with subject.under(Prune(plan, form)):
            plain = logits(subject)
        for toggle in (Prune(plan, form) | removed, removed | Prune(plan, form)):
            with subject.under(toggle):
                assert torch.equal(logits(subject), plain)
        with subject.under(Prune(plan, form) | kept):
            said.append(logits(subject))
        assert not torch.equal(said[-1], plain)
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=1e-12)


def test_neuron_vectors_of_removed_neurons_are_zero() -> None:
    for family in ("llama", "gpt2", "phi3"):
        subject = Subject.tiny(family)
        plain = {side: neuron_vectors(subject, 0, side) for side in ("read", "write")}  # type: ignore[arg-type]
        with subject.under(Prune(Plan.of(subject, {0: {"neurons": range(5)}}))):
            for side, before in plain.items():
                now = neuron_vectors(subject, 0, side)  # type: ignore[arg-type]
                assert torch.equal(now[:5], before[:5]) and not now[5:].any()
            logits(subject)


def test_the_cache_shrinks_by_the_key_value_heads_and_blocks_that_are_gone() -> None:
    subject = Subject.tiny("llama")
    ids = IDS.repeat(2, 1)

    def numbers() -> int:
        layers = subject.model(input_ids=ids, use_cache=True).past_key_values.layers
        return sum(
            layer.keys.numel() + layer.values.numel() for layer in layers if getattr(layer, "keys", None) is not None
        )

    assert numbers() == 2 * 2 * 8 * 8 * 6  # keys and values, batch, tokens, d_head, heads of 3 layers
    with subject.under(Prune(Plan.of(subject, {1: {"kv_heads": [0]}}))):
        assert numbers() == 2 * 2 * 8 * 8 * 5
        assert subject.receipts[0].bytes_freed == 4 * 8 * 32 * (2 * 2 + 2)  # h d (2g + 2), four bytes each
    with subject.under(Prune(Plan.of(subject, {2: {"kv_heads": [0]}, 0: {"heads": ()}}))):
        assert numbers() == 2 * 2 * 8 * 8 * 3
    with subject.under(Prune(Plan.of(subject, {2: {"kv_heads": [0]}}, drop=[0]))):
        assert numbers() == 2 * 2 * 8 * 8 * 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_caches_are_compressed_on_pruned_layers_too(family: str) -> None:
    subject = Subject.tiny(family)
    for plan in (plans(subject)["heads"], plans(subject)["all at once"], plans(subject)["attention off"]):
        few = EvictKV(6, sinks=1, window=3)
        for squeezed in (few, QuantizeKV(4, 4, group=8, residual=0, sinks=0), *([LowRankKV(4)] * (family != "gpt2"))):
            with subject.under(Prune(plan) | squeezed):
                written = subject.generate(list(TEXTS), max_new_tokens=6).ids
                assert subject.receipts[1].fired and subject.receipts[1].bytes_freed
                assert tuple(subject.generate([text], max_new_tokens=6).ids[0] for text in TEXTS) == written


def test_a_pruning_after_a_toggle_made_for_whole_layers_is_refused() -> None:
    subject = Subject.tiny("llama")
    with (
        pytest.raises(ValueError, match=r"made for layers as they stand.*Write it after: Prune"),
        subject.under(LowRankKV(4) | Prune(plans(subject)["heads"])),
    ):
        pass


def test_heads_under_a_norm_that_spans_them_all_are_masked_but_not_sliced() -> None:
    subject = Subject.tiny("olmo2")
    assert "spans all heads" in subject.units[0].no_heads
    plan = Plan.of(subject, {0: {"kv_heads": [1]}})
    plain = logits(subject)
    with subject.under(Prune(plan, "mask")):
        assert not torch.equal(logits(subject), plain)
    with (
        pytest.raises(ValueError, match=r"can't be sliced: .* norm spans all heads.* Use form='mask'"),
        subject.under(Prune(plan)),
    ):
        pass
    assert torch.equal(logits(subject), plain)
    with subject.under(Prune(Plan.of(subject, {0: {"neurons": range(9)}}))):
        assert not torch.equal(logits(subject), plain)


def test_units_that_a_slice_would_get_wrong_are_found_out(monkeypatch) -> None:
    from workbench.pruned import cut

    subject = Subject.tiny("gpt2")
    monkeypatch.setattr(cut, "_tell_counts", lambda *_: None)  # a family whose counts of heads no one knows of
    assert "fails in GPT2LMHeadModel" in cut.proved(subject, find_units(subject))[0].no_heads


def test_a_mixture_of_experts_has_heads_to_prune_but_no_neurons() -> None:
    subject = Subject.tiny("mixtral")
    with subject.under(Prune(Plan.of(subject, {0: {"kv_heads": [1]}}))):
        logits(subject)
    with pytest.raises(ValueError, match="no neurons that can be told apart"):
        Plan.of(subject, {0: {"neurons": [1]}})


def test_an_exception_in_the_middle_of_an_install_restores_everything(monkeypatch) -> None:
    subject = Subject.tiny("llama")
    plain, before = logits(subject), {n: id(p) for n, p in subject.model.named_parameters()}
    plan = Plan.of(subject, {0: {"neurons": range(3), "kv_heads": [0]}, 2: {"neurons": range(5)}}, drop=[1])
    from workbench.toggles import prune

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(prune, "drop_blocks", fail)
    with pytest.raises(MemoryError), subject.under(Prune(plan)):
        pass
    assert {n: id(p) for n, p in subject.model.named_parameters()} == before
    assert torch.equal(logits(subject), plain) and subject.active == ()
    assert not any("forward" in vars(module) for module in subject.model.modules())


def test_a_slice_shares_no_memory_with_the_original_and_counts_what_acts() -> None:
    subject = Subject.tiny("llama")
    whole = parameter_bytes(subject)
    weight = subject.model.model.layers[0].mlp.down_proj.weight
    with subject.under(Prune(Plan.of(subject, {0: {"neurons": range(24)}}, drop=[2]))):
        cut = subject.model.model.layers[0].mlp.down_proj.weight
        assert cut.is_contiguous() and cut.untyped_storage().nbytes() == weight.nbytes // 2
        block = sum(p.nbytes for p in subject.model.model.layers[2].parameters())
        logits(subject)
        assert whole - parameter_bytes(subject) == 24 * 32 * 3 * 4 + block == subject.receipts[0].bytes_freed
    assert subject.model.model.layers[0].mlp.down_proj.weight is weight


def test_a_tracer_that_was_there_before_goes_on_tracing_afterwards() -> None:
    subject = Subject.tiny("llama")
    model = subject.nn
    with subject.under(Prune(Plan.of(subject, {1: {"neurons": range(9)}}, drop=[2]))):
        with model.trace("one two three"):
            narrow = model.model.layers[1].mlp.down_proj.input.save()
        assert narrow.shape[-1] == 9
    with model.trace("one two three"):
        wide = model.model.layers[1].mlp.down_proj.input.save()
        last = model.model.layers[2].output.save()
    assert wide.shape[-1] == 48 and last is not None


def test_a_tracer_that_comes_inside_a_toggle_sees_the_plain_forward_in_its_place() -> None:
    subject = Subject.tiny("llama")
    plain = logits(subject)
    with subject.under(Prune(Plan.of(subject, drop=[1]))):
        dropped = logits(subject)
        _ = subject.nn
        assert torch.equal(logits(subject), dropped)
    assert torch.equal(logits(subject), plain)


def test_swap_and_stand_in_refuse_what_would_break_a_tree() -> None:
    from contextlib import ExitStack

    subject = Subject.tiny("llama")
    block = subject.model.model.layers[0]
    with ExitStack() as undo:
        with pytest.raises(ValueError, match="is a module"):
            swap(block, "mlp", copy.deepcopy(block.mlp), undo)
        swap(block, "anything", 3, undo)
        assert block.anything == 3
    assert "anything" not in vars(block)
    block.mlp._hf_hook = object()
    with ExitStack() as undo, pytest.raises(ValueError, match="accelerate moves"):
        stand_in(block.mlp, lambda inner: inner, undo)
    del block.mlp._hf_hook
    undo = ExitStack()
    stand_in(block.mlp, lambda inner: inner, undo)
    vars(block.mlp)["forward"] = None
    with pytest.raises(RuntimeError, match="Wrap the model"):
        undo.close()
    del vars(block.mlp)["forward"]


def test_pruned_and_steered_together_equals_the_sum_of_their_receipts() -> None:
    subject = Subject.tiny("llama")
    plan = plans(subject)["widths"]
    with subject.under(Prune(plan) | Steer(torch.ones(32), Site(1, "resid_out"), 1.0)):
        subject.generate(list(TEXTS), max_new_tokens=3)
        cut, push = subject.receipts
        assert cut.tokens == push.tokens and cut.rows == push.rows == 2 and cut.bytes_freed > 0


def test_an_odd_number_of_groups_of_an_odd_number_of_heads_can_be_cut() -> None:
    """As in SmolLM2-135M: half of nine heads is no number of groups of three."""
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3}
    _, tokenizer = tiny_pair("llama")
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), intermediate_size=48, head_dim=4, initializer_range=0.2, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    subject = Subject(model, tokenizer, name="nine heads")
    assert not subject.units[0].no_heads
    plan, said = Plan.of(subject, {0: {"kv_heads": [0, 2]}, 1: {"heads": [1, 4, 7]}}), []
    for form in ("mask", "slice"):
        with subject.under(Prune(plan, form)):
            said.append(logits(subject))
    torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-12)


def test_units_and_layers_that_are_no_numbers_are_refused_and_none_keeps_all() -> None:
    subject = Subject.tiny("llama")
    assert Plan.of(subject, {1: {"neurons": None}}) == Plan.of(subject)
    with pytest.raises(ValueError, match="got neurons 5, expected whole numbers"):
        Plan.of(subject, {1: {"neurons": 5}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="got neurons 5, expected whole numbers"):
        Plan.of(subject).edit(1, neurons=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got layers \['1'\], expected whole numbers"):
        Plan.of(subject, {"1": {"neurons": [5]}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"read key/value heads \[0\], but names \[0, 1\]"):
        Plan.of(subject, {0: {"heads": [0, 1], "kv_heads": [0, 1]}})


def test_layers_without_neurons_have_no_width_in_common_with_others() -> None:
    shape = Shape(2, 64, 4, 2, 8, 12)
    every = {"heads": (0, 2), "neurons": (1, 2)}
    assert Plan(shape, tuple((layer, LayerPlan(**every)) for layer in range(2))).uniform
    assert not Plan(shape, tuple((layer, LayerPlan(neurons=())) for layer in range(2))).uniform
    assert Plan(Shape(2, 64, 4, 2, 8, None)).uniform, "experts are no neurons"
