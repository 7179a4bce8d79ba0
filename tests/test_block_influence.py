"""Block influence: exact on planted blocks, equal to the slow way, read before the final norm; orders and figures."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from workbench import Site, Steer, Subject
from workbench.methods.pruning import influence as module
from workbench.methods.pruning.influence import droppable, influence, losses, macro_rounds, token_mean, turned
from workbench.methods.pruning.influenced import NAMES
from workbench.organism.tiny import tiny_pair
from workbench.probes.block_influence import BlockInfluence
from workbench.pruned import Plan
from workbench.pruned.blocks import drop_blocks
from workbench.toggles.drop_blocks import DropBlocks

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt", "falcon", "olmo2")


def texts(n: int = 6, seed: int = 0) -> list[list[int]]:
    """Token ids of unequal lengths."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 200, (5 + 3 * k,), generator=made).tolist() for k in range(n)]


def double(family: str, idle: tuple[int, ...] = ()) -> Subject:
    """In float64, with uneven weights in the final norm and blocks that write nothing."""
    model, tokenizer = tiny_pair(family, 0)
    subject = Subject(model.double(), tokenizer, name=family, verify=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and subject.anatomy.blocks not in name:
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)) * 2)
        for block in idle:
            for kind in ("heads", "neurons"):
                for part in subject.anatomy.module(model, Site(block, kind)).parameters():
                    part.zero_()
    return subject


def by_hand(subject: Subject, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Both measures, one text at a time, from states that hooks of this test read: cosines as in the papers."""
    listed = subject.model.get_submodule(subject.anatomy.blocks)
    alone, at_end = np.zeros((len(ids), len(listed))), np.zeros((len(ids), len(listed)))

    def states(text: list[int], without: int | None = None) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        with ExitStack() as undo, torch.no_grad():
            for block in listed:  # type: ignore[union-attr]
                undo.callback(block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())).remove)
            last = listed[-1].register_forward_hook(lambda _, args, out: seen.append(_first(out).clone()))
            undo.callback(last.remove)
            if without is not None:
                skip = listed[without].register_forward_hook(lambda _, args, out: _as(out, args[0]), prepend=True)
                undo.callback(skip.remove)
            subject.model(input_ids=torch.tensor([text]), use_cache=False)
        return [state[0].double() for state in seen]

    for row, text in enumerate(ids):
        plain = states(text)
        for block in range(len(listed)):
            cosine = torch.nn.functional.cosine_similarity
            alone[row, block] = 1 - float(cosine(plain[block], plain[block + 1], dim=-1).mean())
            at_end[row, block] = 1 - float(cosine(plain[-1], states(text, block)[-1], dim=-1).mean())
    return alone, at_end


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _as(output: Any, value: torch.Tensor) -> Any:
    return value if isinstance(output, torch.Tensor) else (value, *output[1:])


# --- the measures


def test_turning_is_one_minus_the_cosine_and_exact_where_nothing_turns() -> None:
    made = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 40, 16, generator=made, dtype=torch.float64) for _ in range(2))
    expected = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
    torch.testing.assert_close(turned(a, b), expected, rtol=0, atol=1e-14)
    assert not turned(a, a).any() and torch.allclose(turned(a, -a), torch.full((2, 40), 2.0, dtype=torch.float64))
    torch.testing.assert_close(turned(a, 3 * b), turned(a, b), rtol=0, atol=1e-14)
    zero = torch.zeros(3)
    assert float(turned(zero, zero)) == 0.0 and float(turned(zero, torch.ones(3))) == 1.0
    nearly = a + 1e-9 * b  # 1 - cos of it is far below the rounding of a cosine
    assert 0 < float(turned(a, nearly).max()) < 1e-16


@pytest.mark.parametrize("family", FAMILIES)
def test_running_what_follows_equals_running_all_and_equals_hooks_by_hand(family: str) -> None:
    subject, ids = double(family), texts(4)
    fast = influence(subject, ids, batch=1)  # unpadded: in float64 padding makes Gemma-2's own attention NaN
    slow = (np.full((4, 3), np.nan), np.full((4, 3), np.nan))
    for row in range(4):
        module._by_capture(subject, ids, [row], [0, 1, 2], [0, 1, 2], slow)
    for found, other, expected in zip((fast.alone, fast.at_end), slow, by_hand(subject, ids), strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_batches_and_padding_change_nothing() -> None:
    subject, ids = double("llama"), texts()
    one, other = influence(subject, ids), influence(subject, ids, batch=1)
    np.testing.assert_allclose(one.alone, other.alone, rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.at_end, other.at_end, rtol=0, atol=1e-12)
    assert one.at_end.shape == (6, 3) and not np.isnan(one.at_end).any()


def test_the_last_block_has_one_influence_by_both_measures_as_states_are_read_before_the_final_norm() -> None:
    subject, ids = double("llama"), texts()
    found = influence(subject, ids)
    np.testing.assert_array_equal(found.alone[:, -1], found.at_end[:, -1])
    with torch.no_grad():  # what is read after the norm, as hidden_states[-1] is, is another number
        states = subject.model(input_ids=torch.tensor([ids[0]]), output_hidden_states=True).hidden_states
    wrong = float(turned(states[-2][0], states[-1][0]).mean())
    assert abs(wrong - found.alone[0, -1]) > 1e-3


def test_idle_blocks_have_no_influence_and_go_first_for_nothing() -> None:
    subject, ids = double("organism", idle=(1, 4)), texts()
    found = influence(subject, ids)
    assert np.abs(found.alone[:, [1, 4]]).max() <= 1e-12 and np.abs(found.at_end[:, [1, 4]]).max() <= 1e-12
    assert min(found.alone[:, [0, 2, 3, 5]].min(), found.at_end[:, [0, 2, 3, 5]].min()) > 1e-3
    rounds, gone = macro_rounds(subject, ids, 3, range(6), progress=False)
    assert sorted(gone[:2]) == [1, 4] and len(rounds) == 3
    with torch.no_grad():
        plain = subject.model(input_ids=torch.tensor([ids[0]])).logits
        with subject.under(DropBlocks(tuple(gone[:2]))):
            assert torch.equal(subject.model(input_ids=torch.tensor([ids[0]])).logits, plain)


def test_each_round_is_measured_on_the_model_that_the_last_one_left() -> None:
    subject, ids = double("organism"), texts()
    rounds, gone = macro_rounds(subject, ids, 3, range(6), progress=False)
    for number in range(3):
        with ExitStack() as undo:
            drop_blocks(subject, gone[:number], undo)
            again = influence(subject, ids)
        np.testing.assert_array_equal(again.at_end, rounds[number].at_end)
        assert np.isnan(again.at_end[:, gone[:number]]).all() and np.isnan(again.alone[:, gone[:number]]).all()
        assert gone[number] == np.nanargmin(token_mean(again.at_end, ids))
    assert not any("forward" in vars(one) for one in subject.model.modules())


def test_under_a_toggle_whole_forwards_are_run_and_its_edits_are_part_of_the_model() -> None:
    subject, ids = double("llama"), texts(3)
    plain = influence(subject, ids)
    push = Steer(torch.linspace(-1, 1, 32), Site(0, "resid_out"), 2.0)
    with subject.under(push):
        pushed = influence(subject, ids)
    assert np.abs(pushed.at_end - plain.at_end).min() > 1e-6
    with subject.under(Steer(torch.linspace(-1, 1, 32), Site(0, "resid_out"), 0.0)):
        same = influence(subject, ids)
    np.testing.assert_allclose(same.at_end, plain.at_end, rtol=0, atol=1e-12)
    np.testing.assert_allclose(same.alone, plain.alone, rtol=0, atol=1e-12)


def test_a_model_in_bfloat16_is_measured_in_float64() -> None:
    subject = Subject.tiny("llama")
    subject.model.bfloat16()
    found = influence(subject, texts(2))
    assert found.at_end.dtype == np.float64 and (found.at_end > 0).all()


def test_losses_are_those_under_the_toggle() -> None:
    subject, ids = Subject.tiny("llama"), texts(3)
    found = losses(subject, ids, [2, 0])
    for count, blocks in enumerate(((), (2,), (0, 2))):
        with ExitStack() as undo:
            if blocks:
                undo.enter_context(subject.under(DropBlocks(blocks)))
            np.testing.assert_array_equal(found[count], subject.nll(ids).numpy())


def test_what_the_cache_needs_is_passed_over() -> None:
    subject = Subject.tiny("gemma2")  # sliding, full, sliding: slot 0 is of a sliding one
    assert droppable(subject, [0, 2, 1], 3) == [0, 1]
    assert droppable(Subject.tiny("llama"), [0, 2, 1], 3) == [0, 2]


# --- the probe


def result_of(subject: Subject, **settings: Any) -> Any:
    return BlockInfluence(**{"n_drop": 2, "n_random": 2} | settings).run(subject, texts())


def test_the_result_gives_toggles_and_plans_in_the_order_that_was_found() -> None:
    subject = double("organism", idle=(1, 4))
    result = result_of(subject, n_drop=5)
    assert isinstance(result.drop(2), DropBlocks) and result.drop(2) == DropBlocks((1, 4)) == result.drop(
        2, "block_influence"
    )
    assert result.plan(2) == Plan.of(subject, drop=(1, 4)) and result.drop() == DropBlocks(result.order(5))
    assert result.drop(0) == DropBlocks() and result.order(2, "last_blocks") == (5, 4)
    with pytest.raises(ValueError, match=r"got n=6, but macro influence ranked 5 blocks"):
        result.drop(6)
    with pytest.raises(
        ValueError, match=r"got by='size', expected one of block_influence, macro_influence, last_blocks"
    ):
        result.drop(1, by="size")


def test_the_table_ranks_the_blocks_and_weighs_them() -> None:
    subject = Subject.tiny("llama")
    table = result_of(subject).table()
    assert list(table["block"]) == [0, 1, 2] and table["dropped"].sum() == 2
    assert (table["parameters"] == sum(p.numel() for p in subject.model.model.layers[0].parameters())).all()
    assert (table["kv_bytes"] == 2 * 2 * 8 * 4).all()  # keys and values, heads, d_head, bytes
    assert (table["macro_low"] <= table["macro_influence"]).all() and (
        table["macro_influence"] <= table["macro_high"]
    ).all()
    assert sorted(table["macro_rank"].dropna()) == [1, 2] == sorted(table["block_rank"].dropna())
    alone = result_of(subject, by="block_influence")
    assert alone.table()["macro_influence"].isna().all() and alone.views()["view"] == ["influence", "loss"]


def test_curves_begin_at_the_whole_model_and_controls_stand_beside_them() -> None:
    result = result_of(double("organism", idle=(1, 4)))
    losses = result.losses()
    assert set(losses["by"]) == set(NAMES.values())
    start = losses[losses["dropped"] == 0]["perplexity"]
    assert start.nunique() == 1
    ours = losses[(losses["by"] == "macro influence") & (losses["dropped"] == 2)]["perplexity"].item()
    assert ours == pytest.approx(start.iloc[0], rel=1e-12)
    assert (losses["low"] <= losses["perplexity"]).all() and (losses["perplexity"] <= losses["high"]).all()
    assert not len(result_of(Subject.tiny("llama"), validate=False).losses())


def test_blocks_that_are_dropped_already_are_not_there() -> None:
    subject = Subject.tiny("organism")
    with subject.under(DropBlocks((2,))):
        result = result_of(subject)
    assert list(result.table()["block"]) == [0, 1, 3, 4, 5] and 2 not in result.order(2)
    with subject.under(DropBlocks((2,)) | result.drop(2)):
        subject.nll(texts(2))


def test_ends_that_must_stay_stay() -> None:
    result = result_of(Subject.tiny("organism"), n_drop=3, keep_first=2, keep_last=1)
    assert all(set(row[row >= 0]) == {2, 3, 4} for row in result.removed)


def test_the_cut_lies_between_the_dropped_and_the_kept() -> None:
    result = result_of(double("organism", idle=(1, 4)))
    table = result.table()
    line = result.plot().layout.shapes[0]
    assert (
        table[table["dropped"]]["macro_influence"].max() < line.y0 < table[~table["dropped"]]["macro_influence"].min()
    )
    assert "blocks" in result.finding and "perplexity goes from" in result.finding
    with pytest.raises(ValueError, match="expected one of influence, rounds, loss"):
        result.plot(view="else")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_drop": 3}, "got n_drop=3, .* but 3 blocks are there"),
        ({"n_drop": 0}, "got n_drop=0"),
        ({"keep_first": 2}, "got n_drop=2, keep_first=2"),
        ({"keep_last": -1}, "numbers of at least 0"),
        ({"by": "size"}, "expected 'block_influence' or 'macro_influence'"),
    ],
)
def test_bad_settings_are_refused_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        result_of(Subject.tiny("llama"), **settings)


def test_bad_texts_are_refused_in_words() -> None:
    subject = Subject.tiny("llama")
    for wrong in ("one two", [], [[5, 6, 7]]):
        with pytest.raises(ValueError, match="expected at least 2 texts: every second one validates"):
            BlockInfluence().run(subject, wrong)
    result = BlockInfluence(validate=False).run(subject, [[5, 6, 7]])
    assert len(result.table()) == 3
    subject.model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match=r"no block of .* can go. .*scales attention by the number of the block"):
        BlockInfluence().run(subject, texts())
