"""PyramidInfer: lengths follow the closed form, kept sets are nested, and what goes on is computed as if masked."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import held, largest_gap, spied
from families import subject_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench import Site, Subject
from workbench.cache import KVLayer, Stages, accounts
from workbench.methods.cache.pyramid_lengths import flops_fraction, going_on, lengths, rates, row_weights, thinned
from workbench.step import Step
from workbench.toggle import Receipt
from workbench.toggles import Steer
from workbench.toggles.evict import EvictKV
from workbench.toggles.pyramid import Pyramid, PyramidInfer
from workbench.toggles.quantize import QuantizeKV

SMALL = PyramidInfer(0.5, min_context=3, sinks=1, generated=0.5, block=2)
FP32 = 3e-5  # float32 against float32 in another order, measured 2e-6; a token too few moves logits by 0.01 and more


@functools.cache
def deep(n_layers: int) -> Subject:
    """A tiny Llama of so many layers, with a context of 1,024 tokens."""
    like = Subject.tiny("llama")
    config = copy.deepcopy(like.model.config)
    config.num_hidden_layers, config.max_position_embeddings = n_layers, 1024
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n_layers)
        model = type(like.model)(config)
    return Subject(model.eval(), like.tokenizer, name=f"tiny:llama of {n_layers} layers", verify=False)


def prompts(*sizes: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randint(8, 1000, (size,), generator=generator).tolist() for size in sizes]


@torch.no_grad()
def forward(subject: Subject, rows: list[list[int]], *, left: bool = True, **options: Any) -> Any:
    """One forward with a cache over a padded batch."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[index, start : start + len(row)], mask[index, start : start + len(row)] = torch.tensor(row), 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return subject.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **options)


def kept(output: Any, row: int = 0) -> list[list[int]]:
    """[layer]: the positions that the cache holds of one row."""
    return [held(layer)[row][0] for layer in output.past_key_values.layers]


# The closed form


def test_lengths_equal_the_examples_of_the_closed_form() -> None:
    assert lengths(1000, 4, decay=0.9) == [1000, 1000, 988, 948]
    assert lengths(1000, 4, decay=0.5) == [1000, 1000, 941, 756]
    assert lengths(400, 8, decay=0.9) == [400, 400, 398, 393, 383, 367, 347, 324]


@pytest.mark.parametrize(
    ("n_layers", "decay", "interval", "at_4096", "at_100_000"),
    [(32, 0.9, 1, 0.7657, 0.7670), (40, 0.8, 2, 0.7237, 0.7245), (80, 0.9, 3, 0.7815, 0.7825)],
)
def test_the_papers_settings_cache_three_quarters_of_a_long_prompt(
    n_layers: int, decay: float, interval: int, at_4096: float, at_100_000: float
) -> None:
    for tokens, share in ((4096, at_4096), (100_000, at_100_000)):
        entering = lengths(tokens, n_layers, decay=decay, interval=interval)
        assert np.mean(entering) / tokens == pytest.approx(share, abs=5e-5)  # four digits are given
    deepest = lengths(4096, 32)[-1] / 4096
    assert deepest == pytest.approx(0.376, abs=1e-3) and (deepest - 0.2) / 0.8 == pytest.approx(0.22, abs=1e-2)


def test_both_schedules_fall_from_one_towards_the_decay() -> None:
    for schedule in ("cosine", "linear"):
        falling = rates(10, 0.3, schedule)
        assert falling[0] == 1 and falling == sorted(falling, reverse=True) and 0.3 < falling[-1] < 0.4
    assert rates(4, 0.2, "linear") == pytest.approx([1.0, 0.8, 0.6, 0.4])


@given(st.integers(1, 300), st.integers(1, 12), st.floats(0.01, 1), st.floats(0, 0.99), st.integers(1, 4))
def test_lengths_never_rise_and_never_fall_below_the_floor(
    tokens: int, n_layers: int, decay: float, recent: float, interval: int
) -> None:
    entering = lengths(tokens, n_layers, decay=decay, recent=recent, interval=interval, min_context=16)
    assert len(entering) == n_layers and entering[0] == tokens and entering == sorted(entering, reverse=True)
    assert entering[-1] >= min(tokens, 1 + int(tokens * recent) + 16)


def test_the_flops_fraction_is_one_without_decay_and_the_mean_square_where_attention_is_all() -> None:
    assert flops_fraction([100, 100], weights=7, width=3) == 1
    assert flops_fraction([100, 50], weights=0, width=3) == pytest.approx((1 + 0.25) / 2)
    assert flops_fraction([100, 50], weights=3, width=0) == pytest.approx((1 + 0.5) / 2)


def test_a_plan_shows_each_layer_without_a_model() -> None:
    plan = PyramidInfer(0.5).plan(1000, 4)
    assert plan["entered"].tolist() == [1000, 1000, 941, 756] and plan["rate"].tolist() == rates(4, 0.5)
    assert plan.eval("context + recent == entered").all() and set(plan["recent"]) == {201}
    assert plan["attention"].tolist() == pytest.approx([1, 1, 0.941**2, 0.756**2])
    with pytest.raises(ValueError, match="got 0 tokens"):
        PyramidInfer().plan(0, 4)


# What goes on, by hand


def test_rows_that_score_weigh_from_one_to_six_fifths_and_older_ones_nothing() -> None:
    weight = row_weights(torch.tensor([[4, 5, 6, 7, 8, 9, -1]]), torch.tensor([[9]]), torch.tensor([[5]]))
    torch.testing.assert_close(weight, torch.tensor([[0, 1, 1.05, 1.1, 1.15, 1.2, 0]]))
    assert row_weights(torch.tensor([[3]]), torch.tensor([[3]]), torch.tensor([[1]])).tolist() == [[1.0]]


def test_sinks_and_recent_tokens_go_on_before_the_best_of_the_context() -> None:
    scores = torch.tensor([[0.0, 0.0, 3.0, 9.0, 1.0, 0.0, 0.0], [0.0, 5.0, 4.0, 0.0, 0.0, 0.0, 0.0]])
    positions = torch.tensor([[0, 2, 3, 5, 7, 8, 9], [0, 1, 2, 3, 4, -1, -1]])
    going = going_on(scores, positions, torch.tensor([5, 3]), sinks=1, recent=torch.tensor([[2], [1]]))
    assert [row[keep].tolist() for row, keep in zip(positions, going, strict=True)] == [[0, 3, 5, 8, 9], [0, 1, 4]]


def test_of_a_block_that_is_due_the_best_stay_and_nothing_else_is_touched() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
    scores = torch.tensor([[0.0, 0, 5, 1, 3, 9, 2, 0]]).expand(2, -1)
    keep = thinned(scores, positions, torch.tensor([2, 3]), torch.tensor([1, 0]), block=3, count=2)
    assert [row[k].tolist() for row, k in zip(positions, keep, strict=True)] == [[0, 1, 2, 4, 5, 6, 7], list(range(8))]
    packed = thinned(scores[:1, 3:], positions[:1, 3:], torch.tensor([2]), torch.tensor([1]), block=3, count=2)
    assert positions[0, 3:][packed[0]].tolist() == [4, 5, 6, 7], "2 is held elsewhere and is one of the two that stay"


# On models


@pytest.mark.parametrize(
    ("tokens", "n_layers", "decay", "expected"),
    [
        (1000, 4, 0.9, [1000, 1000, 988, 948]),
        (1000, 4, 0.5, [1000, 1000, 941, 756]),
        (400, 8, 0.9, [400, 400, 398, 393, 383, 367, 347, 324]),
    ],
)
def test_a_models_cache_and_its_bytes_equal_the_closed_form(
    tokens: int, n_layers: int, decay: float, expected: list[int]
) -> None:
    subject = deep(n_layers)
    with subject.under(PyramidInfer(decay)):
        output = forward(subject, prompts(tokens), logits_to_keep=1)
        freed = subject.receipts[0].bytes_freed
    assert [len(layer) for layer in kept(output)] == expected
    token = 2 * subject.anatomy.n_kv_heads * subject.anatomy.d_head * 4
    parts = [row for row in accounts(output.past_key_values) if row["part"] in ("keys", "values", "idle")]
    assert sum(row["bytes"] for row in parts if row["part"] != "idle") == token * sum(expected)
    assert not [row for row in parts if row["part"] == "idle"]
    assert freed == token * (tokens * n_layers - sum(expected))
    assert output.past_key_values.get_seq_length() == tokens
    assert {layer.seen for layer in output.past_key_values.layers} == {tokens}


def test_the_flops_of_a_prompt_equal_the_schedule() -> None:
    subject, tokens = deep(4), 400
    block = subject.model.model.layers[0]
    matrices = sum(module.weight.numel() for module in block.modules() if isinstance(module, torch.nn.Linear))
    found = []
    for toggle in (PyramidInfer(0.5), None):
        with FlopCounterMode(display=False) as counter:
            if toggle is None:
                forward(subject, prompts(tokens), logits_to_keep=1)
            else:
                with subject.under(toggle):
                    forward(subject, prompts(tokens), logits_to_keep=1)
        found.append(sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm"))
    head = 2 * subject.anatomy.vocab * subject.anatomy.d_model  # one token's logits
    entering = PyramidInfer(0.5).lengths(tokens, 4)
    assert found == [2 * matrices * sum(entering) + head, 2 * matrices * 4 * tokens + head]
    planned = flops_fraction(entering, weights=matrices, width=0)
    assert (found[0] - head) / (found[1] - head) == pytest.approx(planned, rel=1e-12)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_padded_rows_have_their_own_lengths_and_equal_themselves_alone(family: str, left: bool) -> None:
    subject, rows = subject_of(family), prompts(41, 7, 23)
    with subject.under(SMALL):
        together = forward(subject, rows, left=left)
        for index, row in enumerate(rows):
            alone = forward(subject, [row])
            assert kept(together, index) == kept(alone)
            assert [len(layer) for layer in kept(alone)] == SMALL.lengths(len(row), subject.n_layers)
            start = together.logits.shape[1] - len(row) if left else 0
            mine = together.logits[index, start : start + len(row)]
            torch.testing.assert_close(mine, alone.logits[0], rtol=0, atol=FP32, equal_nan=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 90), st.sampled_from([0.2, 0.6, 0.9]), st.sampled_from([0.0, 0.2, 0.5]), st.integers(1, 3))
def test_kept_sets_are_nested_and_hold_the_sinks_and_the_recent_tokens(
    tokens: int, decay: float, recent: float, interval: int
) -> None:
    toggle = PyramidInfer(decay, recent, schedule="linear", interval=interval, min_context=8)
    subject = deep(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a short context is rightly left alone
        with subject.under(toggle):
            output = forward(subject, prompts(tokens))
    layers = kept(output)
    assert [len(layer) for layer in layers] == toggle.lengths(tokens, 6)
    always = {*range(4), *range(tokens - 1 - int(tokens * recent), tokens)}
    for shallow, below in itertools.pairwise([list(range(tokens)), *layers]):
        assert below == sorted(set(below)) and always <= set(below) <= set(shallow)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_toggled_forward_equals_one_of_all_tokens_under_a_mask_per_layer(schedule: Any, window: int | None) -> None:
    subject, ids = deep(6), prompts(60)
    toggle = PyramidInfer(0.4, 0.2, schedule=schedule, min_context=8, window=window)
    with subject.under(toggle):
        output = forward(subject, ids)
    expected, going = masked_forward(subject, ids[0], toggle)
    assert kept(output) == going and len(going[-1]) < 40
    there = torch.zeros(60, dtype=torch.bool)
    there[going[-1]] = True
    assert torch.equal(output.logits[0].isnan().any(-1), ~there), "no prediction where a token did not go on"
    torch.testing.assert_close(output.logits[0, there], expected[there], rtol=0, atol=FP32)


def masked_forward(subject: Subject, ids: list[int], toggle: PyramidInfer) -> tuple[Tensor, list[list[int]]]:
    """The plain model on all tokens, those that did not go on hidden layer by layer; chosen by sorting in numpy."""
    tokens = len(ids)
    rec = int(toggle.recent * tokens)
    entering, going = [list(range(tokens))], []

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.full((tokens, tokens), -torch.inf).triu(1)
        gone = sorted(set(range(tokens)) - set(entering[-1]))
        mask[:, gone] = -torch.inf
        mask[gone, gone] = 0.0  # a row must see something
        return args, kwargs | {"attention_mask": mask[None, None]}

    def choose(module: Any, args: Any, output: Any) -> None:
        going.append(entering[-1])
        rate = rates(subject.n_layers, toggle.decay, toggle.schedule)[len(going) - 1]
        context, newest = entering[-1][: -1 - rec], entering[-1][-1 - rec :]
        count = int(rate * len(context))
        if rate == 1 or count <= toggle.min_context:
            entering.append(entering[-1])
            return
        rows = newest if toggle.window is None else newest[-toggle.window :]
        attention = output[1][0].double().numpy().mean(0)[np.ix_(rows, context)]
        scores = np.linspace(1, 1.2, len(rows)) @ attention
        scores[: toggle.sinks] = np.inf
        best = np.argsort(-scores, kind="stable")[:count]
        entering.append(sorted(context[index] for index in best) + newest)

    before = str(subject.model.config._attn_implementation)
    subject.model.set_attn_implementation("eager")
    hooks = [layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in subject.model.model.layers]
    hooks += [layer.self_attn.register_forward_hook(choose) for layer in subject.model.model.layers]
    with torch.no_grad():
        logits = subject.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    subject.model.set_attn_implementation(before)
    return logits, going


@pytest.mark.parametrize(
    "toggle",
    [SMALL, replace(SMALL, by="random"), SMALL | QuantizeKV(8, 8, group=2, residual=4, sinks=1)],
    ids=["attention", "random", "quantised"],
)
def test_padded_generation_equals_softmax_over_what_each_layer_holds(
    toggle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of("qwen2")
    with subject.under(toggle), spied(monkeypatch) as calls:
        subject.generate(prompts(33, 4, 21), max_new_tokens=12)
    assert min(len(call.held[row][0]) for call in calls[-3:] for row in (0, 2)) < 30, (
        "something was dropped and thinned"
    )
    assert largest_gap(calls) < FP32


def test_planted_heavy_hitters_survive_to_the_last_layer_and_without_the_plant_some_do_not() -> None:
    heavy = (20, 37, 55)
    assert set(heavy) <= set(pyramid_by_hand(heavy, logit=8.0)[-1])
    assert len(pyramid_by_hand(heavy, logit=8.0)[-1]) == PyramidInfer(0.3, min_context=8).lengths(100, 6)[-1] < 40
    assert not set(heavy) <= set(pyramid_by_hand(heavy, logit=-8.0)[-1])
    by_chance = pyramid_by_hand(heavy, logit=8.0, by="random")
    assert not set(heavy) <= set(by_chance[-1]) and set(by_chance[-1]) <= set(by_chance[-2]) < set(by_chance[0])


def pyramid_by_hand(heavy: tuple[int, ...], logit: float, by: Any = "attention") -> list[list[int]]:
    """[layer] positions held, where all queries look at `heavy` keys with this logit and at others by chance."""
    tokens, n_layers, width = 100, 6, 16
    toggle, stages = PyramidInfer(0.3, by=by, min_context=8), Stages()
    stages.receipts["select"] = Receipt(toggle)
    subject: Any = SimpleNamespace(n_layers=n_layers, stages=stages)
    stages.select = pyramid = Pyramid(toggle, subject)
    generator, along, columns, found = torch.Generator().manual_seed(0), torch.ones(width), torch.arange(tokens), []
    for number in range(n_layers):
        keys = 0.3 * torch.randn(1, 1, tokens, width, generator=generator)
        keys[:, :, list(heavy)] = along * logit * width**-0.5
        step = Step(columns[None], torch.ones(1, len(columns), dtype=torch.bool), torch.tensor([tokens]))
        layer = KVLayer(number, stages, lambda step=step: step)
        layer.update(keys[:, :, columns], keys[:, :, columns])
        layer.attend(along.expand(1, 1, len(columns), -1), torch.nn.Module(), None, None)
        found.append(held(layer)[0][0])
        if pyramid.going is not None:  # what the toggle's hooks do on a model
            columns, pyramid.going = columns[pyramid.going[0][0]], None
    return found


def test_of_a_block_of_sixteen_generated_tokens_each_layer_keeps_what_the_closed_form_says() -> None:
    subject, toggle, prompt = deep(4), PyramidInfer(0.9, recent=0.0), prompts(8)
    assert toggle.block_sizes(4) == [14, 12, 7, 3]
    lengths_now = []
    with subject.under(toggle):
        output = forward(subject, prompt)
        for count in range(1, 40):
            with torch.no_grad():
                output = subject.model(input_ids=torch.tensor([[count + 8]]), past_key_values=output.past_key_values)
            layers = kept(output)
            lengths_now.append([len(layer) for layer in layers])
            assert all(layer[:8] == list(range(8)) and layer[-1] == 7 + count for layer in layers)
    assert lengths_now[15] == [24, 24, 24, 24], "the newest token is recent: only 15 are older"
    assert lengths_now[16] == [8 + n + 1 for n in (14, 12, 7, 3)]
    assert lengths_now[31] == [8 + n + 16 for n in (14, 12, 7, 3)]
    assert lengths_now[32] == [8 + 2 * n + 1 for n in (14, 12, 7, 3)]


def test_a_rows_blocks_are_thinned_by_its_own_count_also_when_several_tokens_come_at_once() -> None:
    subject, rows = deep(4), prompts(60, 20)
    toggle = PyramidInfer(0.9, recent=0.2, min_context=4, block=4, generated=0.5)
    more = torch.tensor(prompts(30, 30))
    found = []
    with subject.under(toggle):
        for group in ([0, 1], [0], [1]):
            output = forward(subject, [rows[index] for index in group])
            longest = max(len(rows[index]) for index in group)
            mask = torch.tensor([[0] * (longest - len(rows[i])) + [1] * len(rows[i]) for i in group])
            for piece in more[group].split([1, 1, 1, 7, 1, 1, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1], 1):
                mask = torch.cat([mask, torch.ones_like(piece)], 1)
                with torch.no_grad():
                    output = subject.model(
                        input_ids=piece,
                        attention_mask=mask,
                        position_ids=mask.cumsum(1)[:, -piece.shape[1] :] - 1,
                        past_key_values=output.past_key_values,
                    )
            found.append((kept(output), kept(output, len(group) - 1), output.logits))
    assert found[0][0] == found[1][0] and found[0][1] == found[2][1]
    assert len(found[0][1][-1]) < len(found[0][1][0]) < 50, "deeper layers keep less of what was generated"
    torch.testing.assert_close(found[0][2], torch.cat([found[1][2], found[2][2]]), rtol=0, atol=FP32)


def test_of_a_block_those_stay_that_the_newest_sixteen_queries_look_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, toggle = deep(4), PyramidInfer(0.9, recent=0.0)
    with subject.under(toggle), spied(monkeypatch) as calls:
        output = forward(subject, prompts(8))
        for token in prompts(33)[0]:  # two blocks: 8 to 23, 24 to 39
            with torch.no_grad():
                output = subject.model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
    for number, layer in enumerate(output.past_key_values.layers):
        mine = [call for call in calls if call.layer is layer]
        keys = np.concatenate([call.keys[0] for call in mine], 1)  # (kv_head, 41, d_head)
        before, scores = np.array([*mine[-1].held[0][0], 40]), np.zeros(41)
        for weight, call in zip(np.linspace(1, 1.2, 16), mine[-16:], strict=True):
            queries, seen = call.query[0, :, 0], before[before <= call.positions[0, 0]]
            for head, query in enumerate(queries):
                logits = keys[head * len(keys) // len(queries), seen] @ query * call.scaling
                share = np.exp(logits - logits.max())
                scores[seen] += weight * share / share.sum() / len(queries)
        best = 24 + np.argsort(-scores[24:40])[: toggle.block_sizes(4)[number]]
        assert held(layer)[0][0] == [*before[before < 24], *sorted(best.tolist()), 40]


# What it leaves alone


def test_without_decay_the_logits_are_bit_equal() -> None:
    subject, rows = subject_of("llama"), prompts(90)
    plain = forward(subject, rows).logits
    for toggle in (PyramidInfer(1.0, generated=None), PyramidInfer(1.0)):
        with pytest.warns(UserWarning, match="never fired"), subject.under(toggle):
            assert torch.equal(forward(subject, rows).logits, plain)


def test_a_short_context_is_left_alone_to_the_bit() -> None:
    subject, toggle = deep(4), PyramidInfer(0.3, generated=None)
    for tokens in (80, 81):  # contexts of 63 and 64 tokens
        plain = forward(subject, prompts(tokens)).logits
        with pytest.warns(UserWarning, match="never fired"), subject.under(toggle):
            assert torch.equal(forward(subject, prompts(tokens)).logits, plain)
    with subject.under(toggle):
        assert len(kept(forward(subject, prompts(200)))[-1]) < 200


def test_a_model_of_one_layer_is_left_alone() -> None:
    subject, rows = deep(1), prompts(200)
    plain = forward(subject, rows).logits
    with pytest.warns(UserWarning, match="never fired"), subject.under(PyramidInfer(0.1, generated=None)):
        assert torch.equal(forward(subject, rows).logits, plain)


# With others


def test_survivors_are_quantised_once_and_the_lengths_stay() -> None:
    subject, pyramid, pack = deep(4), PyramidInfer(0.5), QuantizeKV(4, 4, group=8, residual=16)
    found = []
    for toggle in (pyramid | pack, pack | pyramid, pyramid):
        with subject.under(toggle):
            output = forward(subject, prompts(300), logits_to_keep=1)
        found.append((output.logits, accounts(output.past_key_values), kept(output)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert [len(layer) for layer in found[0][2]] == pyramid.lengths(300, 4) and found[0][2] == found[2][2]
    small, whole = (sum(row["bytes"] for row in rows) for _, rows, _ in found[1:])
    assert small < 0.5 * whole


def test_an_edit_in_a_deeper_layer_acts_at_logical_positions_in_either_order() -> None:
    subject, rows = deep(4), prompts(120, 90)
    pyramid, at = PyramidInfer(0.3, min_context=8), Site(3, "resid_out")
    with subject.under(pyramid):
        plain = forward(subject, rows).logits
    push = torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    steer = Steer(push, at, 3.0, (0, 119), keep_norm=True)  # a sink, and the last token of the longer row alone
    for toggle in (pyramid | steer, steer | pyramid):
        with subject.under(toggle):
            steered = forward(subject, rows).logits
            receipt = next(receipt for receipt in subject.receipts if receipt.toggle == steer)
            assert receipt.tokens == 3 and receipt.relative_moved > 0.1
        moved = ((steered - plain).abs().amax(-1) > 1e-3).nonzero().tolist()
        assert moved == [[0, 0], [0, 119], [1, 30]]


def test_receipts_of_edits_count_only_the_tokens_that_came_so_far() -> None:
    subject, rows = deep(4), prompts(120, 90)
    pyramid = PyramidInfer(0.3, min_context=8)
    steer = Steer(torch.ones(subject.anatomy.d_model), Site(3, "resid_out"), 3.0)
    receipts = []
    for toggle in (pyramid | steer, steer | pyramid):
        with subject.under(toggle):
            forward(subject, rows)
            receipts += [receipt.to_json() for receipt in subject.receipts if receipt.toggle == steer]
    assert receipts[0]["tokens"] == receipts[1]["tokens"] == sum(pyramid.lengths(len(row), 4)[-1] for row in rows)
    assert receipts[0]["relative_moved"] == pytest.approx(receipts[1]["relative_moved"], rel=1e-5)


def test_beams_carry_their_thinned_tokens_along() -> None:
    subject = deep(4)
    toggle = PyramidInfer(0.5, min_context=8, generated=0.5, block=2)
    ids = torch.tensor(prompts(50))
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    with subject.under(toggle):
        assert subject.model.generate(ids, **options).shape == (1, 62)


# Refusals


@pytest.mark.parametrize("read", ["nll", "capture", "predictions"])
def test_texts_that_would_be_read_in_pieces_are_refused_in_words(read: str) -> None:
    subject = subject_of("llama")
    at = [[Site(1, "resid_out")]] if read == "capture" else []
    with pytest.raises(ValueError, match="can't be read piece by piece"), subject.under(SMALL):
        list(getattr(subject, read)(prompts(20), *at))


def test_layers_that_need_their_window_are_refused_by_number() -> None:
    expected = pytest.raises(ValueError, match=r"layers 0, 2 of tiny:gemma2:0 are sliding-window")
    with expected, subject_of("gemma2").under(SMALL):
        pass
    assert not subject_of("gemma2").stages


def test_it_does_not_act_beside_eviction() -> None:
    expected = pytest.raises(ValueError, match=r"EvictKV.* and PyramidInfer.* both claim 'kv\.select'")
    with expected, subject_of("llama").under(SMALL | EvictKV(0.5)):
        pass


def test_hidden_states_of_unequal_lengths_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="got output_hidden_states=True"), subject_of("llama").under(SMALL):
        forward(subject_of("llama"), prompts(30), output_hidden_states=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"decay": 0.0}, "decay=0.0"),
        ({"decay": 1.1}, "decay=1.1"),
        ({"recent": 1.0}, "recent=1.0"),
        ({"generated": 0.0}, "generated=0.0"),
        ({"schedule": "square"}, "schedule='square'"),
        ({"by": "chance"}, "by='chance'"),
        ({"interval": 0}, "interval=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"block": 0}, "block=0"),
        ({"window": 0}, "window=0"),
        ({"min_context": 3}, "min_context=3 and sinks=4"),
    ],
)
def test_bad_settings_are_refused_in_words(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PyramidInfer(**given)


def test_an_exception_in_the_middle_of_a_forward_leaves_nothing_behind() -> None:
    subject, rows = deep(4), prompts(120)
    plain = forward(subject, rows).logits
    toggle = PyramidInfer(0.3, min_context=8)

    def stop(module: Any, args: Any) -> None:
        raise RuntimeError("stop")

    with subject.under(toggle):
        first = forward(subject, rows).logits
        hook = subject.model.model.layers[3].register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            forward(subject, rows)
        hook.remove()
        again = forward(subject, rows).logits
        torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(forward(subject, rows).logits, plain)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in subject.model.model.layers)
