"""Sparsify: exact zeros by every criterion, what SparseGPT repairs, only what it may touch, and what zeros cost."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench import Site, Steer, Subject
from workbench.methods.pruning.curves import Trial
from workbench.methods.pruning.inputs import input_moments, linears_in, output_errors
from workbench.methods.pruning.sparsegpt import column_order, sparsegpt
from workbench.methods.pruning.sparsity import (
    chance,
    lowest,
    lowest_in_groups,
    magnitude,
    output_error,
    read_pattern,
    refitted,
    wanda,
)
from workbench.probes.cost import Cost
from workbench.probes.sparsity import SparsityLoss
from workbench.pruned import Plan
from workbench.pruned.units import rows_of
from workbench.swap import swap_weight
from workbench.toggles.prune import Prune
from workbench.toggles.sparsify import Sparsify

TEXTS = (
    "the code is alpha beta gamma delta . recall the code : alpha beta gamma delta .",
    "recall the code : alpha beta .",
    "alpha beta gamma delta . the code is alpha .",
)
HELD = ("the code is delta gamma . recall the code : delta gamma .", "beta gamma delta . the code is beta .")
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi", "opt", "falcon", "mixtral", "phi3")


def correlated(seed: int = 0, width: int = 64, rows: int = 32, tokens: int = 1024) -> tuple[Tensor, Tensor]:
    """(W, H) of inputs that go together and whose size rises from 0.1 to 3: the setting where orders matter."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width).double() + torch.randn(width, width, generator=generator).double() / width**0.5
    x = torch.randn(tokens, width, generator=generator).double() @ mix
    x = x * torch.logspace(np.log10(0.1), np.log10(3), width).double()
    return torch.randn(rows, width, generator=generator).double(), x.T @ x


def cut(weight: Tensor, removed: Tensor) -> Tensor:
    return weight.masked_fill(removed, 0.0)


def zeros_of(subject: Subject, toggle: Sparsify) -> dict[str, Tensor]:
    """Name -> weight (out, in) of every matrix under a toggle."""
    with subject.under(toggle):
        layers = range(subject.n_layers)
        return {name: rows_of(one).clone() for layer in layers for name, one in linears_in(subject, layer).items()}


# Which weights: laws


@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 0.7, 0.999, 1.0])
def test_counts_are_exact(share: float) -> None:
    weight, moment = correlated(width=50, rows=20)
    rows = lowest(wanda(weight, moment.diagonal()), share, per="row").sum(1)
    assert set(rows.tolist()) == {{0.29: 14, 0.999: 49}.get(share, round(share * 50))}
    assert int(lowest(magnitude(weight), share, per="matrix").sum()) == round(share * 1000)
    for block in (7, 16, 50, 128):
        assert int((sparsegpt(weight, moment, share, block=block) == 0).sum()) == round(share * 1000)


def test_a_share_that_is_a_hair_below_a_whole_number_counts_as_it() -> None:
    assert 0.29 * 100 < 29
    assert int(lowest(torch.rand(1, 100), 0.29, per="row").sum()) == 29


def test_ties_are_removed_as_far_as_they_are_asked_for_and_not_beyond() -> None:
    constant = torch.full((12, 10), 0.3)
    assert int(lowest(magnitude(constant), 0.5, per="matrix").sum()) == 60
    assert set(lowest(wanda(constant, torch.ones(10)), 0.5, per="row").sum(1).tolist()) == {5}
    assert int((sparsegpt(constant, torch.eye(10), 0.5) == 0).sum()) == 60
    assert int(lowest_in_groups(magnitude(constant), 2, 5).sum()) == 48


def test_no_zeros_leave_a_matrix_as_it_is_and_all_zeros_leave_nothing() -> None:
    weight, moment = correlated()
    assert torch.equal(sparsegpt(weight, moment, 0.0), weight)
    assert not sparsegpt(weight, moment, 1.0).any()
    nothing, everything = torch.zeros_like(weight, dtype=torch.bool), torch.ones_like(weight, dtype=torch.bool)
    torch.testing.assert_close(refitted(weight, nothing, moment), weight, rtol=1e-9, atol=1e-9)  # solved, in float64
    assert not refitted(weight, everything, moment).any()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
def test_n_of_every_m_inputs_are_zero(n: int, m: int) -> None:
    weight, moment = correlated()
    made = [
        cut(weight, lowest_in_groups(magnitude(weight), n, m)),
        cut(weight, lowest_in_groups(wanda(weight, moment.diagonal()), n, m)),
        *(sparsegpt(weight, moment, pattern=(n, m), block=block) for block in (1, 16, 20, 128)),
    ]
    for sparse in made:
        counts = (sparse == 0).reshape(len(weight), -1, m).sum(-1)
        assert set(counts.flatten().tolist()) == {n}


def test_inputs_after_the_last_whole_group_stay() -> None:
    weight, moment = correlated(width=62)
    removed = lowest_in_groups(magnitude(weight), 2, 4)
    assert not removed[:, 60:].any() and int(removed.sum()) == 32 * 30
    assert int((sparsegpt(weight, moment, pattern=(2, 4)) == 0)[:, 60:].sum()) == 0
    assert not lowest_in_groups(torch.rand(3, 2), 2, 4).any()


def test_more_zeros_are_the_same_zeros_and_more() -> None:
    weight, moment = correlated()
    for scores, per in (
        (magnitude(weight), "matrix"), (wanda(weight, moment.diagonal()), "row"), (chance(weight, 3), "matrix"),
        (magnitude(torch.ones(8, 9)), "matrix"),
    ):  # fmt: skip
        masks = [lowest(scores, share, per=per) for share in (0.1, 0.35, 0.5, 0.8)]  # type: ignore[arg-type]
        assert all(not (less & ~more).any() for less, more in itertools.pairwise(masks))


def test_wanda_knows_neither_scale_nor_order_of_tokens_and_goes_with_its_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(9, 24, generator=generator), torch.randn(100, 24, generator=generator) * torch.arange(24)

    def removed(w: Tensor, inputs: Tensor) -> Tensor:
        return lowest(wanda(w, inputs.double().square().sum(0)), 0.5, per="row")

    plain, order = removed(weight, x), torch.randperm(24, generator=generator)
    assert torch.equal(removed(weight, 7.5 * x), plain)
    assert torch.equal(removed(weight, x[torch.randperm(100, generator=generator)]), plain)
    assert torch.equal(removed(weight[:, order], x[:, order]), plain[:, order])
    assert not torch.equal(lowest(magnitude(weight), 0.5, per="row"), plain)


def test_inputs_of_one_size_that_dont_go_together_make_wanda_magnitude_and_sparsegpt_repair_nothing() -> None:
    weight, _ = correlated()
    moment = 5.0 * torch.eye(64).double()
    assert torch.equal(
        lowest(wanda(weight, moment.diagonal()), 0.5, per="row"), lowest(magnitude(weight), 0.5, per="row")
    )
    made = sparsegpt(weight, moment, 0.5)
    assert torch.equal(made[made != 0], weight[made != 0])
    assert torch.equal(made == 0, lowest(magnitude(weight), 0.5, per="matrix"))


def test_an_input_that_is_always_zero_loses_its_column_by_what_reads_inputs_and_not_by_magnitude() -> None:
    weight, moment = correlated()
    weight[:, 40] = 10.0
    moment[40] = moment[:, 40] = 0.0
    assert lowest(wanda(weight, moment.diagonal()), 0.2, per="row")[:, 40].all()
    assert not lowest(magnitude(weight), 0.2, per="matrix")[:, 40].any()
    for block in (8, 64):
        made = sparsegpt(weight, moment, 0.2, block=block)
        assert not made[:, 40].any() and int((made == 0).sum()) == round(0.2 * weight.numel())


# SparseGPT and the refit against slow references


def swept_slowly(
    weight: Tensor, moment: Tensor, share: float, block: int, pattern: tuple[int, int] | None = None
) -> Tensor:
    """The sweep by the rule of optimal brain surgery, with a new inverse for the columns that are left at each step."""
    h = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    weight, removed = weight.double().clone(), torch.zeros_like(weight, dtype=torch.bool)

    def losses(columns: range) -> Tensor:
        return torch.stack([weight[:, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0] for j in columns], 1)

    for i in range(weight.shape[1]):
        if pattern is None and i % block == 0:
            part = range(i, min(i + block, weight.shape[1]))
            count = round(share * len(weight) * part.stop) - round(share * len(weight) * i)
            order = losses(part).flatten().argsort(stable=True)[:count]
            removed[:, i : part.stop] = torch.isin(
                torch.arange(len(weight) * len(part)).reshape(len(weight), -1), order
            )
        elif pattern is not None and i % pattern[1] == 0:
            removed[:, i : i + pattern[1]] = lowest_in_groups(losses(range(i, i + pattern[1])), *pattern)
        inverse = torch.linalg.inv(h[i:, i:])
        for row in range(len(weight)):
            if removed[row, i]:
                weight[row, i:] -= weight[row, i].clone() / inverse[0, 0] * inverse[0]
                weight[row, i] = 0.0
    return weight


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("block", [4, 8, 24])
def test_the_fast_sweep_is_the_slow_one(block: int, pattern: tuple[int, int] | None) -> None:
    weight, moment = correlated(width=24, rows=6)
    fast = sparsegpt(weight, moment, 0.5, block=block, pattern=pattern, permute="given")
    torch.testing.assert_close(fast, swept_slowly(weight, moment, 0.5, block, pattern), rtol=1e-8, atol=1e-9)


def test_an_order_of_columns_is_undone_after_the_sweep() -> None:
    weight, moment = correlated(width=24, rows=6)
    for permute in ("random", "rising", "falling"):
        order = column_order(moment.diagonal(), permute)
        assert sorted(order.tolist()) == list(range(24))
        swept = sparsegpt(weight[:, order], moment[order][:, order], 0.5, block=8, permute="given")
        made = sparsegpt(weight, moment, 0.5, block=8, permute=permute)  # type: ignore[arg-type]
        torch.testing.assert_close(made[:, order], swept, rtol=0, atol=0)
    assert column_order(moment.diagonal(), "rising").tolist() == moment.diagonal().argsort().tolist()
    groups = column_order(moment.diagonal(), "random", 4).reshape(-1, 4)
    assert (groups[:, 0] % 4 == 0).all() and (groups.diff(dim=1) == 1).all(), "a pattern's groups stay together"


def test_sparsegpt_knows_no_scale_of_inputs() -> None:
    weight, moment = correlated()
    torch.testing.assert_close(sparsegpt(weight, 1e6 * moment), sparsegpt(weight, moment), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude(seed: int) -> None:
    weight, moment = correlated(seed)
    by_row = lowest(wanda(weight, moment.diagonal()), 0.5, per="row")
    by_size = lowest(magnitude(weight), 0.5, per="matrix")
    made = sparsegpt(weight, moment, 0.5, block=16)
    errors = [output_error(weight, one, moment) for one in (made, cut(weight, by_row), cut(weight, by_size))]
    assert errors[0] < errors[1] < errors[2]
    best = output_error(weight, refitted(weight, by_row, moment, damping=1e-9), moment)
    assert best < errors[1], "the best there is for Wanda's zeros"
    nudged = refitted(weight, by_row, moment, damping=1e-9)
    nudged[0, (~by_row[0]).nonzero()[3]] += 0.01
    assert output_error(weight, nudged, moment) > best


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_columns_matters_where_blocks_are_small(seed: int) -> None:
    weight, moment = correlated(seed)

    def error(permute: Any, block: int) -> float:
        return output_error(weight, sparsegpt(weight, moment, 0.5, block=block, permute=permute), moment)

    wandas = output_error(weight, cut(weight, lowest(wanda(weight, moment.diagonal()), 0.5, per="row")), moment)
    assert error("random", 16) < wandas < error("falling", 16) < error("rising", 16)
    assert max(error(order, 64) for order in ("random", "falling", "rising")) < wandas * 1.05  # measured 0.98


def test_a_refit_is_the_least_squares_solution_of_every_row() -> None:
    weight, moment = correlated(width=12, rows=5)
    removed = lowest(chance(weight, 0), 0.4, per="matrix")
    made = refitted(weight, removed, moment, damping=0.0)
    half = torch.linalg.cholesky(moment).T  # |half (w' - w)|^2 is what the output loses
    for row, out in enumerate(made):
        kept = ~removed[row]
        solved = torch.linalg.lstsq(half[:, kept], half @ weight[row, :, None]).solution[:, 0]
        torch.testing.assert_close(out[kept], solved, rtol=1e-7, atol=1e-9)
        assert not out[removed[row]].any()


def test_a_refit_in_many_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = correlated(width=12, rows=5)
    removed = lowest(chance(weight, 0), 0.4, per="matrix")
    whole = refitted(weight, removed, moment)
    monkeypatch.setattr("workbench.methods.pruning.sparsity.REFIT_NUMBERS", 2 * 144)
    torch.testing.assert_close(refitted(weight, removed, moment), whole, rtol=1e-12, atol=1e-12)


def test_fewer_tokens_than_inputs_and_no_inputs_at_all_are_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=generator), torch.randn(3, 32, generator=generator).double()
    for moment in (x.T @ x, torch.zeros(32, 32)):
        made = sparsegpt(weight, moment, 0.5)
        assert torch.isfinite(made).all() and int((made == 0).sum()) == 128
        assert torch.isfinite(refitted(weight, made == 0, moment)).all()
    with pytest.raises(ValueError, match="inputs that are NaN or infinite"):
        sparsegpt(weight, torch.full((32, 32), torch.nan), 0.5)


# The toggle


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_in_the_blocks_has_its_zeros_and_nothing_else_is_touched(family: str) -> None:
    subject = Subject.tiny(family, verify=False)
    inside = {name for layer in range(subject.n_layers) for name in linears_in(subject, layer)}
    before = {name: parameter for name, parameter in subject.model.named_parameters()}
    for by in ("magnitude", "wanda", "sparsegpt", "random"):
        toggle = Sparsify(0.5, by=by, texts=TEXTS)  # type: ignore[arg-type]
        with subject.under(toggle):
            for name, parameter in subject.model.named_parameters():
                if name.removesuffix(".weight") not in inside:
                    assert parameter is before[name], name
            for name in inside:
                weight = rows_of(subject.model.get_submodule(name))
                assert int((weight == 0).sum()) == weight.numel() // 2, f"{by}, {name}"
                if by == "wanda":  # of every output: GPT-2 holds matrices the other way round
                    assert set((weight == 0).sum(1).tolist()) == {weight.shape[1] // 2}
            subject.nll(HELD)
            receipt = subject.receipts[0]
            assert receipt.bytes_freed == 0 and receipt.tokens > 0 and "50.00% of" in receipt.notes[0]
    assert all(parameter is before[name] for name, parameter in subject.model.named_parameters())


def test_fused_experts_stay_dense_and_the_receipt_says_so() -> None:
    with Subject.tiny("mixtral", verify=False).under(Sparsify(0.5)) as subject:
        assert "55,680 weights that no linear holds stay dense (experts, gate)" in subject.receipts[0].notes


def test_a_pattern_that_leaves_a_rest_says_so() -> None:
    with Subject.tiny("llama", verify=False).under(Sparsify(pattern="1:5")) as subject:
        assert "in 21 matrices the last inputs, fewer than 5, stay dense" in subject.receipts[0].notes
    with Subject.tiny("llama", verify=False).under(Sparsify(pattern="2:4")) as subject:
        assert len(subject.receipts[0].notes) == 1


def test_only_zeros_are_new_unless_weights_are_repaired() -> None:
    subject = Subject.tiny("llama", verify=False)
    dense = {name: rows_of(one).clone() for name, one in subject.model.named_modules() if name.endswith("_proj")}
    for toggle in (Sparsify(0.5), Sparsify(pattern="2:4", by="wanda", texts=TEXTS), Sparsify(0.5, by="random")):
        for name, weight in zeros_of(subject, toggle).items():
            assert torch.equal(weight[weight != 0], dense[name][weight != 0])
    for toggle in (Sparsify(0.5, by="sparsegpt", texts=TEXTS), Sparsify(0.5, texts=TEXTS, refit=True)):
        for name, weight in zeros_of(subject, toggle).items():
            assert not torch.equal(weight[weight != 0], dense[name][weight != 0])


def test_a_refit_keeps_the_zeros_and_lowers_the_error() -> None:
    subject = Subject.tiny("llama", verify=False)
    dense = {name: rows_of(one).clone() for name, one in linears_in(subject, 0).items()}
    ids, errors = subject.tokenize(TEXTS).ids, []
    for refit in (False, True):
        toggle = Sparsify(0.5, by="wanda", texts=TEXTS, refit=refit, propagate=False)
        found = zeros_of(subject, toggle)
        moments = input_moments(subject, ids, linears_in(subject, 0), 0, whole=True)
        errors.append([output_error(dense[name], found[name], moments[name]) for name in dense])
    assert all(after < before for before, after in zip(*errors, strict=True))


def test_a_block_reads_what_the_sparse_blocks_before_it_make_of_the_texts() -> None:
    subject = Subject.tiny("llama", verify=False)
    sparse = zeros_of(subject, Sparsify(0.5, by="wanda", texts=TEXTS))
    alone = zeros_of(subject, Sparsify(0.5, by="wanda", texts=TEXTS, propagate=False))
    name, site = "model.layers.1.mlp.down_proj", Site(1, "neurons")
    dense = rows_of(subject.model.get_submodule(name)).clone()
    unmoved = subject.capture(TEXTS, [site])[site].double().square().sum(0)
    with ExitStack() as undo:
        for path, weight in sparse.items():
            if ".layers.0." in path:
                swap_weight(subject.model.get_submodule(path), "weight", weight, undo)
        moved = subject.capture(TEXTS, [site])[site].double().square().sum(0)
    for squares, found in ((moved, sparse), (unmoved, alone)):
        expected = lowest(wanda(dense, squares), 0.5, per="row")
        # A padded batch adds in another order: two scores that are equal to rounding may trade places.
        assert (expected == (found[name] == 0)).double().mean() > 0.995
    assert not torch.equal(sparse[name], alone[name])
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(sparse[first], alone[first])


def test_what_matrices_read_is_what_a_capture_sees_whatever_the_lengths() -> None:
    for family in ("llama", "opt", "gpt2"):
        subject = Subject.tiny(family, verify=False)
        site = Site(1, "neurons")
        name = next(n for n, m in linears_in(subject, 1).items() if m is subject.anatomy.module(subject.model, site))
        x = subject.capture(TEXTS, [site])[site].double()
        linears = {name: subject.model.get_submodule(name)}
        for batch in (1, 4096):
            found = input_moments(subject, subject.tokenize(TEXTS).ids, linears, 1, whole=True, batch=batch)[name]
            torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-4)  # fp32 activations
            squares = input_moments(subject, subject.tokenize(TEXTS).ids, linears, 1, whole=False)[name]
            torch.testing.assert_close(squares, found.diagonal(), rtol=1e-9, atol=1e-9)


def test_weights_that_changed_have_zeros_of_their_own_also_where_no_version_tells() -> None:
    subject, toggle = Subject.tiny("llama"), Sparsify(0.5)
    before = zeros_of(subject, toggle)
    for parameter in subject.model.parameters():
        parameter.data.copy_(parameter.data.flip(-1))  # counts no version
    after = zeros_of(subject, toggle)
    name = next(name for name in before if before[name].shape[1] > 1)
    assert torch.equal(after[name], before[name].flip(-1)), "the smallest ones leave wherever they are now"


def test_zeros_are_computed_once_and_other_receipts_count_none_of_it() -> None:
    subject = Subject.tiny("llama", verify=False)
    steer, toggle = Steer(torch.ones(32), Site(0, "resid_out"), 0.5), Sparsify(0.5, by="wanda", texts=TEXTS)
    forwards: list[int] = []
    handle = subject.model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with subject.under(steer | toggle):
        assert forwards and subject.receipts[0].fired == 0 and subject.receipts[0].tokens == 0
        forwards.clear()
        with subject.untoggled():
            pass
        assert not forwards and len(subject.receipts[1].notes) == 1
        subject.nll(HELD)
        assert subject.receipts[0].fired == 1
    forwards.clear()
    with subject.under(steer | toggle):
        assert not forwards
        subject.nll(HELD)
    handle.remove()
    assert not torch.equal(
        zeros_of(subject, toggle)["model.layers.1.mlp.up_proj"],
        _under(subject, Steer(torch.ones(32), Site(0, "resid_out"), 9.0), toggle)["model.layers.1.mlp.up_proj"],
    ), "a subject is read as it is, steered"


def _under(subject: Subject, outer: Any, toggle: Sparsify) -> dict[str, Tensor]:
    with subject.under(outer):
        found = zeros_of(subject, toggle)
        subject.nll(HELD)
    return found


def test_weights_that_changed_in_place_are_read_again() -> None:
    subject = Subject.tiny("llama", verify=False)
    before = zeros_of(subject, Sparsify(0.5))["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        model: Any = subject.model
        model.model.layers[0].mlp.up_proj.weight.mul_(torch.linspace(0.1, 1, 32))
    after = zeros_of(subject, Sparsify(0.5))["model.layers.0.mlp.up_proj"]
    assert not torch.equal(before == 0, after == 0)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was() -> None:
    subject = Subject.tiny("llama", verify=False)
    model: Any = subject.model
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), subject.under(Sparsify(0.5, by="wanda", texts=TEXTS)):
        raise AssertionError("never reached")
    handle.remove()
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before and not subject.active
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_either_order_with_prune_is_valid_and_dropped_blocks_stay_dense() -> None:
    subject = Subject.tiny("llama", verify=False)
    plan = Plan.of(subject, {0: {"neurons": range(0, 48, 2), "kv_heads": [1]}}, drop=[1])
    for by in ("magnitude", "wanda", "sparsegpt"):
        toggle = Sparsify(0.5, by=by, texts=TEXTS)  # type: ignore[arg-type]
        with subject.under(Prune(plan) | toggle):
            sliced = rows_of(subject.model.get_submodule("model.layers.0.mlp.down_proj"))
            assert sliced.shape == (32, 24) and int((sliced == 0).sum()) == 32 * 12
            assert torch.isfinite(subject.nll(HELD)).all()
            assert "7 matrices that read nothing stay dense" in subject.receipts[1].notes
            assert subject.model.get_submodule("model.layers.1.mlp.up_proj").weight.all()  # type: ignore[operator]
        with subject.under(toggle | Prune(plan)):
            assert torch.isfinite(subject.nll(HELD)).all()


@pytest.mark.parametrize("by", ["magnitude", "wanda", "sparsegpt", "random"])
def test_a_model_in_bfloat16_stays_in_it(by: Any) -> None:
    subject = Subject.tiny("qwen2", verify=False)
    subject.model.bfloat16()
    found = zeros_of(subject, Sparsify(0.5, by=by, texts=TEXTS, refit=by == "wanda"))
    assert all(weight.dtype == torch.bfloat16 and (weight == 0).double().mean() == 0.5 for weight in found.values())


def test_shared_and_packed_weights_are_refused() -> None:
    subject = Subject.tiny("llama", verify=False)
    model: Any = subject.model
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises(ValueError, match=r"shares its weight with .*layers\.1\.mlp\.up_proj"):
        zeros_of(subject, Sparsify(0.5))
    subject = Subject.tiny("llama", verify=False)
    up: Any = subject.model.get_submodule("model.layers.0.mlp.up_proj")
    up.weight = torch.nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"packed as torch\.int8"):
        zeros_of(subject, Sparsify(0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.5}, "expected a share of zeros from 0 to 1"),
        ({"sparsity": -0.1}, "expected a share of zeros from 0 to 1"),
        ({"sparsity": float("nan")}, "expected a share of zeros from 0 to 1"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "expected one of the two"),
        ({"pattern": "4:2"}, "n zeros among every m inputs"),
        ({"pattern": "half"}, "n zeros among every m inputs"),
        ({"by": "size"}, "expected one of magnitude, wanda, sparsegpt, random"),
        ({"by": "wanda"}, "by='wanda' without texts"),
        ({"refit": True}, "refit=True without texts"),
        ({"by": "wanda", "texts": "one text"}, "expected several texts"),
        ({"permute": "sorted"}, "expected one of random, given, rising, falling"),
        ({"block": 0}, "expected at least 1 column"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sparsify(**settings)
    assert read_pattern("4:8") == (4, 8) and Sparsify().share == 0.5 and Sparsify(pattern="1:4").share == 0.25


# What zeros cost


def test_the_loss_is_that_of_the_cost_probe_and_errors_are_those_of_outputs() -> None:
    subject = Subject.tiny("qwen2", verify=False)
    data = [TEXTS[0], HELD[0], TEXTS[2], HELD[1]]
    result = SparsityLoss((0.5,), by=("wanda",)).measure(subject, data)
    toggle = Sparsify(0.5, by="wanda", texts=(TEXTS[0], TEXTS[2]))
    name, site = "model.layers.1.mlp.down_proj", Site(1, "neurons")
    dense = rows_of(subject.model.get_submodule(name)).double()
    with subject.under(toggle):
        cost = Cost(prompt_tokens=4, new_tokens=1, repeats=1).measure(subject, HELD)
        x = subject.capture(HELD, [site])[site].double()
        lost = x @ (rows_of(subject.model.get_submodule(name)).double() - dense).T
        unread, _ = output_errors(subject, subject.tokenize(HELD).ids, {name: dense.float()})
    np.testing.assert_allclose(result.kl[0], cost.kl, rtol=1e-9)
    np.testing.assert_allclose(result.nll[0], cost.nll, rtol=1e-9)
    np.testing.assert_allclose(result.base_nll, cost.base_nll, rtol=1e-9)
    table: Any = result.linear_table().set_index("linear")
    expected = float(lost.norm() / (x @ dense.T).norm())
    assert table.loc[name, "error"] == pytest.approx(expected, rel=1e-4)  # fp32 outputs
    assert float(unread.sum()) == pytest.approx(float(lost.square().sum()), rel=1e-3)
    assert (table["low"] <= table["error"] + 1e-9).all() and (table["error"] <= table["high"] + 1e-9).all()
    assert table["sparsity"].to_numpy() == pytest.approx(0.5)


def test_on_the_organism_every_criterion_beats_random_zeros_and_loss_rises_with_them() -> None:
    from workbench.corpora import stories, streams

    subject = Subject.organism()
    documents = [*itertools.islice(stories.documents("held_out", 0), 2)]
    documents += [*itertools.islice(streams.documents("held_out", 0, 40), 4)]
    result = SparsityLoss((0.3, 0.6), by=("magnitude", "wanda", "random")).measure(subject, [d.text for d in documents])
    for by in ("magnitude", "wanda"):
        assert result.value(by, "60%", "kl") < 0.5 * result.value("random", "60%", "kl")
        assert result.value(by, "30%", "kl") < result.value(by, "60%", "kl")
    assert result.value("magnitude", "60%", "bitmap") == pytest.approx(1 / 32 + 0.4, abs=1e-4)


def test_answers_are_counted_per_task_with_their_intervals() -> None:
    from workbench.methods.relations.facts import project_facts

    subject, facts = Subject.organism(), project_facts()
    questions: Any = {"statement": facts.of("statement").prompts[::40], "question": facts.of("question").prompts[::60]}
    trial = Trial([TEXTS[0]], [HELD[0]], questions)
    result = SparsityLoss((0.05, 1.0), by=("magnitude",)).measure(subject, trial)
    table: Any = result.table()
    table = table[table["measure"] == "statement"].set_index("asked")
    assert table.loc["5%", "value"] == table.loc["5%", "base"] == 1.0 and table.loc["5%", "low"] < 1.0
    assert table.loc["100%", "value"] == 0.0 and table.loc["100%", "n"] == len(questions["statement"])
    figure: Any = result.plot("statement")
    assert "statement answered right 100%" in figure.layout.title.text


def test_settings_and_texts_that_cant_be_measured_are_refused() -> None:
    subject = Subject.tiny("llama", verify=False)
    with pytest.raises(ValueError, match="two texts or more: every second one judges"):
        SparsityLoss().measure(subject, [TEXTS[0]])
    with pytest.raises(ValueError, match="expected at least one setting"):
        SparsityLoss(sparsities=()).measure(subject, TEXTS)
    with pytest.raises(ValueError, match="expected texts, which a Sparsify can hold"):
        SparsityLoss().measure(subject, [[5, 6], [7, 8]])
    with pytest.raises(ValueError, match="a held-out text has 1 token"):
        SparsityLoss().measure(subject, Trial(TEXTS, [[5]]))
    result = SparsityLoss((0.5,), by=("random",)).measure(subject, TEXTS)
    with pytest.raises(ValueError, match="expected one of kl, nll"):
        result.plot("speed")
    with pytest.raises(ValueError, match="expected a setting of the table"):
        result.plot("linears", by="wanda")
