"""FuseBlocks: grafts that add nothing at first, training that touches no weight, tensors that hold what was learned."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from workbench import LowRankKV, QuantizeKV, Subject
from workbench.generation import text_of
from workbench.methods.pruning import fusing as fusing_module
from workbench.methods.pruning.fusing import Fusing, Teaching, distance, make_grafts, neighbours, train
from workbench.organism.tiny import tiny_pair
from workbench.pruned import Plan, Weights
from workbench.pruned.blocks import block_of, bypass
from workbench.result import Result
from workbench.site import Site
from workbench.toggle import Toggle
from workbench.toggles.drop_blocks import DropBlocks
from workbench.toggles.fuse_blocks import FuseBlocks
from workbench.toggles.prune import Prune

IDS = torch.tensor([[5, 9, 2, 7, 11, 30, 4, 8]])
QUICK: dict[str, Any] = {"epochs": 2, "batch": 4, "rank": 8, "rate": 3e-3, "base_rate": 3e-3, "progress": False}


def texts(n: int = 9, length: int = 12, seed: int = 0) -> list[list[int]]:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(8, 200, (n, length), generator=made).tolist()


def double(family: str) -> Subject:
    """In float64 from the start, so that fingerprints are those of its weights."""
    model, tokenizer = tiny_pair(family, 0)
    return Subject(model.double(), tokenizer, name=family, verify=False)


def logits(subject: Subject) -> torch.Tensor:
    with torch.no_grad():
        return subject.model(input_ids=IDS).logits


def state(subject: Subject) -> dict[str, Any]:
    return {
        name: (id(p), p._version, p.grad is None, p.requires_grad, p.detach().clone().numpy().tobytes())
        for name, p in subject.model.named_parameters()
    } | {name: sorted(vars(module)) for name, module in subject.model.named_modules()}


def grafts_of(subject: Subject, block: int = 1, **options: Any) -> dict[str, Any]:
    dice = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"rank": 8, "donor": "block"} | options
    return make_grafts(subject, range(subject.n_layers), block, dice=dice, **settings)


def grown(grafts: dict[str, Any]) -> dict[str, Any]:
    """Grafts with random numbers in all that is trained."""
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for graft in grafts.values():
            for tensor in (*graft.base, *graft.coefficients):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=dice, dtype=tensor.dtype))
    return grafts


# --- grafts


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "mixtral", "falcon"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_at_first_the_fused_model_is_the_model_without_the_block_to_the_bit(family: str, block: int) -> None:
    subject = Subject.tiny(family)
    weights = {name: graft.value().detach() for name, graft in grafts_of(subject, block).items()}
    assert len(weights) >= 2 * 4
    toggle = FuseBlocks.of(subject, (block,), Weights(weights))
    with subject.under(DropBlocks((block,))):
        dropped = logits(subject)
    with subject.under(toggle):
        assert torch.equal(logits(subject), dropped)
    assert not torch.equal(logits(subject), dropped)


def test_what_is_multiplied_out_is_what_was_added_up_on_the_way() -> None:
    """y = x W^T + (x A^T) B^T + x (C o W_i)^T + b + c o b_i, one part after the other."""
    subject = double("qwen2")
    for name, graft in grown(grafts_of(subject)).items():
        if not name.endswith("q_proj.weight"):
            continue
        bias = grafts_of(subject)[name.replace("weight", "bias")]
        grown({"bias": bias})
        x = torch.randn(5, graft.weight.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (b, a), (p, q) = graft.base, graft.coefficients
        by_parts = x @ graft.weight.T + (x @ a.T) @ b.T + x @ ((p @ q) * graft.donor).T
        by_parts = by_parts + bias.weight + bias.coefficients[0] * bias.donor
        dense = torch.nn.functional.linear(x, graft.value(), bias.value())
        torch.testing.assert_close(dense, by_parts, rtol=0, atol=1e-12)


def test_a_graft_in_bfloat16_learns_in_float32_and_gives_bfloat16() -> None:
    subject = Subject.tiny("llama")
    subject.model.bfloat16()
    for graft in grafts_of(subject).values():
        assert graft.value().dtype == torch.bfloat16 and torch.equal(graft.value(), graft.weight)
        assert all(tensor.dtype == torch.float32 for tensor in (*graft.base, *graft.coefficients))


def test_a_group_lies_around_the_block_and_the_one_before_it_and_is_moved_in_at_the_ends() -> None:
    left = list(range(32))
    assert neighbours(left, 10, 8) == list(range(6, 14))
    assert neighbours(left, 0, 8) == list(range(8)) and neighbours(left, 31, 8) == list(range(24, 32))
    assert neighbours([0, 2, 3, 7, 8], 3, 3) == [2, 3, 7] and neighbours([0, 2, 3], 2, 8) == [0, 2, 3]


def test_biases_of_projections_are_fused_and_those_of_norms_are_trained() -> None:
    grafts = grafts_of(double("gpt2"), 1)
    assert grafts["0.attn.c_attn.bias"].coefficients and not grafts["0.attn.c_attn.bias"].base
    assert grafts["0.ln_1.bias"].base and not grafts["0.ln_1.bias"].coefficients
    alone = grafts_of(double("gpt2"), 1, donor="none")
    assert "0.attn.c_attn.bias" not in alone and not alone["0.attn.c_attn.weight"].coefficients
    mixed = grafts_of(double("gpt2"), 1, donor="shuffled")["0.attn.c_attn.weight"].donor
    plain = grafts["0.attn.c_attn.weight"].donor
    assert not torch.equal(mixed, plain) and torch.equal(mixed.flatten().sort().values, plain.flatten().sort().values)


# --- the loss


def test_the_loss_looks_at_each_token_and_not_across_texts() -> None:
    """The trap of a softmax over the batch: with one text it is 1 everywhere, and so no gradient."""
    subject = double("llama")
    dice = torch.Generator().manual_seed(0)
    for loss in ("mse", "kl_last"):
        settings = Fusing(group=3, batch=1, rank=4, loss=loss)  # type: ignore[arg-type]
        teaching, grafts = Teaching(subject, (0, 1, 2), 1, settings), grafts_of(subject)
        fusing_module._learn(
            teaching, grafts, next(teaching.batches(texts(1), [0])), [g.base[0] for g in grafts.values()]
        )
        assert all(float(graft.base[0].grad.norm()) > 0 for graft in grafts.values())
        curve = train(teaching, grafts, texts(2), texts(1, seed=3), dice, False)
        assert curve[0] > 0


def test_padding_is_not_part_of_the_loss() -> None:
    subject = double("llama")
    teaching = Teaching(subject, (0, 1, 2), 1, Fusing(batch=4))
    short, long = texts(1, 5)[0], texts(1, 12)[0]
    together = teaching.loss(next(teaching.batches([short, long], [0, 1])), {})
    alone = [teaching.loss(next(teaching.batches([one], [0])), {}) for one in (short, long)]
    torch.testing.assert_close(together, (5 * alone[0] + 12 * alone[1]) / 17, rtol=1e-12, atol=0)


def test_divergences_follow_their_definitions() -> None:
    out = torch.tensor([[[0.0, 1.0], [5.0, 5.0]]], dtype=torch.float64)
    target, real = torch.zeros_like(out), torch.tensor([[True, False]])
    assert float(distance(out, target, real, "mse")) == 0.5
    p, q = np.array([0.5, 0.5]), np.exp([0.0, 1.0]) / (1 + np.e)
    assert float(distance(out, target, real, "kl_last")) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-15)


# --- fitting


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_fitting_and_interrupting_it_leave_the_subject_as_it_was_to_the_bit(family: str, monkeypatch) -> None:
    subject = Subject.tiny(family)
    _ = subject.units
    plain, before = logits(subject), state(subject)
    FuseBlocks.fit(subject, texts(), 1, **QUICK)
    assert state(subject) == before and torch.equal(logits(subject), plain)
    distances = iter(range(3))

    def interrupted(*args: Any) -> torch.Tensor:
        if next(distances, None) is None:
            raise KeyboardInterrupt
        return distance(*args)

    monkeypatch.setattr(fusing_module, "distance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FuseBlocks.fit(subject, texts(), 1, **QUICK)
    assert state(subject) == before and torch.equal(logits(subject), plain)


def test_the_same_seed_gives_the_same_tensors_and_another_one_others() -> None:
    subject = Subject.tiny("llama")
    one, again, other = (FuseBlocks.fit(subject, texts(), 1, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert one == again and one.weights.digest == again.weights.digest != other.weights.digest


@pytest.mark.parametrize("leaving", [0, 2])
def test_a_group_at_either_end_is_trained(leaving: int, monkeypatch) -> None:
    subject = Subject.tiny("llama")
    found = fusing_module.macro_rounds

    def chosen(subject: Subject, ids: Any, n: int, allowed: Any, **options: Any) -> Any:
        return found(subject, ids, n, [leaving], **options)

    monkeypatch.setattr(fusing_module, "macro_rounds", chosen)
    toggle = FuseBlocks.fit(subject, texts(), 1, group=2, **QUICK)
    assert toggle.blocks == (leaving,) and toggle.fusions[0].group == ((0, 1) if leaving == 0 else (1, 2))
    assert min(toggle.fusions[0].curve) < toggle.fusions[0].curve[0]
    with subject.under(toggle):
        subject.generate(texts(2), max_new_tokens=3)


def test_an_idle_block_leaves_first_and_leaves_nothing_behind() -> None:
    subject = double("llama")
    with torch.no_grad():
        for kind in ("heads", "neurons"):
            subject.anatomy.module(subject.model, Site(1, kind)).weight.zero_()  # type: ignore[operator]
    plain = logits(subject)
    toggle = FuseBlocks.fit(subject, texts(), 1, **QUICK)
    assert toggle.blocks == (1,) and toggle.fusions[0].influence <= 1e-12 and toggle.fusions[0].curve[0] == 0.0
    with subject.under(toggle):
        torch.testing.assert_close(logits(subject), plain, rtol=0, atol=1e-12)


def test_what_a_neighbour_can_learn_it_learns() -> None:
    """Block 1 says a fifth of what block 2 says, before it does: larger projections of block 2 could say it all."""
    subject = double("llama")
    blocks = [dict(block_of(subject, layer).named_parameters()) for layer in range(3)]
    with torch.no_grad():
        for name, parameter in blocks[1].items():
            small = 0.2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.copy_(small * blocks[2][name])
    toggle = FuseBlocks.fit(subject, texts(33), 1, **QUICK | {"epochs": 6, "rate": 5e-3})
    fusion = toggle.fusions[0]
    assert fusion.block == 1 and min(fusion.curve) < 0.75 * fusion.curve[0]  # measured 0.61
    assert all(share > 0 for _, share in fusion.shares)


def test_several_fusions_build_on_each_other_and_count_their_bytes() -> None:
    subject = Subject.tiny("organism")
    before = state(subject)
    toggle = FuseBlocks.fit(subject, texts(), 3, group=3, **QUICK)
    assert len(toggle.blocks) == len(toggle.fusions) == 3 and state(subject) == before
    assert not {int(name.partition(".")[0]) for name in toggle.weights} & set(toggle.blocks)
    assert all(len(fusion.nll) == 3 and fusion.block in fusion.group for fusion in toggle.fusions)
    with subject.under(toggle):
        logits(subject)
        dropped = sum(p.nbytes for block in toggle.blocks for p in block_of(subject, block).parameters())
        assert subject.receipts[0].bytes_freed == dropped
        cache = subject.model(input_ids=IDS, use_cache=True).past_key_values
        assert sum(bool(layer.is_initialized) for layer in cache.layers) == subject.n_layers - 3


def test_qwen2_keeps_its_biases_finite_and_its_own() -> None:
    subject = Subject.tiny("qwen2")
    with torch.no_grad():
        for layer in range(3):
            for name, parameter in block_of(subject, layer).named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(layer))
    toggle = FuseBlocks.fit(subject, texts(), 1, **QUICK)
    biases = {name: tensor for name, tensor in toggle.weights.items() if name.endswith("bias")}
    assert len(biases) == 2 * 3
    for name, tensor in biases.items():
        layer, _, inside = name.partition(".")
        own, donor = (dict(block_of(subject, n).named_parameters())[inside] for n in (int(layer), toggle.blocks[0]))
        change = (tensor - own) / donor
        assert (
            torch.isfinite(tensor).all() and 0 < float(change.detach().abs().max()) < 0.1
        )  # c after a few small steps


# --- the toggle


def test_it_is_a_value_in_json_or_beside_a_file(tmp_path) -> None:
    subject = Subject.tiny("llama")
    toggle = FuseBlocks.fit(subject, texts(), 1, **QUICK)
    again = Toggle.from_json(json.loads(json.dumps(toggle.to_json())))
    assert again == toggle and hash(again) == hash(toggle)
    saved = toggle.save(tmp_path / "fused.safetensors")
    assert saved == toggle and len(json.dumps(saved.to_json())) < 3000
    with subject.under(toggle):
        expected = logits(subject)
    with subject.under(Toggle.from_json(json.loads(json.dumps(saved.to_json())))):
        assert torch.equal(logits(subject), expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        toggle.blocks = ()  # type: ignore[misc]


def test_it_goes_with_dropped_blocks_pruning_and_caches_in_the_order_that_makes_sense() -> None:
    subject = Subject.tiny("organism")
    toggle = FuseBlocks.fit(subject, texts(), 1, **QUICK)
    other = next(block for block in range(subject.n_layers) if block not in toggle.blocks)
    said = []
    for both in (toggle | DropBlocks((other,)), DropBlocks((other,)) | toggle):
        with subject.under(both):
            said.append(logits(subject))
    assert torch.equal(*said)
    prune = Prune(Plan.of(subject, {other: {"neurons": range(9)}}))
    with subject.under(toggle | prune | QuantizeKV(4, 4, group=4, residual=1, sinks=1)):
        subject.generate(texts(2), max_new_tokens=3)
    fused_again = r"are not those that were fused.* FuseBlocks \| Prune"
    with pytest.raises(ValueError, match=fused_again), subject.under(prune | toggle):
        pass
    with pytest.raises(ValueError, match=r"Write it after: FuseBlocks"), subject.under(LowRankKV(4) | toggle):
        pass
    with pytest.raises(ValueError, match=r"Was it fitted on another model"), Subject.tiny("llama").under(toggle):
        pass


def test_the_report_is_a_result_with_a_table_and_figures(tmp_path) -> None:
    subject = Subject.tiny("llama")
    toggle = FuseBlocks.fit(subject, texts(), 2, group=2, **QUICK)
    report = toggle.report(subject)
    table = report.table()
    assert tuple(table.columns) == report.columns and len(table) == 2 and (table["epochs"] <= 2).all()
    assert (table["loss_after"] <= table["loss_before"]).all() and table["nll_with"].iloc[1] == table["nll_fused"].iloc[
        0
    ]
    for view in report.views()["view"]:
        assert len(report.plot(view=view).layout.title.text) > 20
    again = Result.load(report.save(tmp_path / "report"))
    assert again.table().equals(table)
    with pytest.raises(ValueError, match="expected one of curves, shares, losses"):
        report.plot(view="else")
    with pytest.raises(ValueError, match="nothing was fused"):
        FuseBlocks().report(subject)


# --- bad input


def test_bad_input_is_refused_in_words() -> None:
    subject = Subject.tiny("llama")
    for settings in ({"group": 1}, {"rank": 0}, {"rate": -1.0}, {"loss": "kl"}, {"donor": "me"}, {"epochs": 0}):
        with pytest.raises(ValueError, match=r"FuseBlocks: got .* expected"):
            FuseBlocks.fit(subject, texts(), 1, progress=False, **settings)
    with pytest.raises(ValueError, match="expected at least 2 texts"):
        FuseBlocks.fit(subject, "one two", 1)
    with pytest.raises(ValueError, match="got n=3, expected 1 to 2"):
        FuseBlocks.fit(subject, texts(), 3)
    with subject.under(DropBlocks((1,))), pytest.raises(ValueError, match="is under toggles"):
        logits(subject)
        FuseBlocks.fit(subject, texts(), 1)
    with pytest.raises(ValueError, match=r"held-out loss became (nan|inf)"):
        FuseBlocks.fit(subject, texts(), 1, **QUICK | {"rate": 1e30})


def test_blocks_of_different_shapes_are_not_fused() -> None:
    subject = Subject.tiny("llama")
    with ExitStack() as undo:
        bypass(subject, [], undo)
        module: Any = block_of(subject, 2).mlp  # type: ignore[union-attr]
        module.down_proj.weight = torch.nn.Parameter(module.down_proj.weight[:, :40].clone())
        with pytest.raises(
            ValueError, match=r"mlp.down_proj.weight is \(32, 48\) in block 1 and \(32, 40\) in block 2"
        ):
            grafts_of(subject)


def test_text_as_strings_will_do() -> None:
    subject = Subject.tiny("gpt2")
    words = [text_of(subject.tokenizer, range(start, start + 9)) for start in range(8, 80, 9)]
    assert len(FuseBlocks.fit(subject, words, **QUICK).blocks) == 1


def test_losses_are_per_token_that_is_predicted_whatever_the_lengths() -> None:
    subject, made = Subject.tiny("llama"), torch.Generator().manual_seed(0)
    uneven = [torch.randint(8, 200, (2 + 5 * n,), generator=made).tolist() for n in range(16)]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    held_out = [uneven[row] for row in order[: 16 // fusing_module.HELD_OUT]]
    toggle = FuseBlocks.fit(subject, uneven, 1, **QUICK | {"epochs": 1, "rank": 2})
    weights = [len(row) - 1 for row in held_out]
    for nll, acting in zip(toggle.fusions[0].nll[1:], (DropBlocks(toggle.blocks), toggle), strict=True):
        with subject.under(acting):
            assert nll == pytest.approx(np.average(subject.nll(held_out), weights=weights), rel=1e-12)
    assert toggle.fusions[0].nll[0] == pytest.approx(np.average(subject.nll(held_out), weights=weights), rel=1e-12)
