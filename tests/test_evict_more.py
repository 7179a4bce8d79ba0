"""EvictKV beyond its base: expected attention, reindexed positions, ALISA and its plan, prompts read in chunks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from by_hand import Hand, held, largest_gap, spied
from families import subject_of, texts
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from workbench import Subject
from workbench.cache import accounts, cache_bytes
from workbench.cache.layer import View
from workbench.cache.rotation import Rotation
from workbench.cache.segments import Slots
from workbench.methods.cache import scorers
from workbench.methods.cache.alisa_plan import AlisaPlan
from workbench.methods.cache.scorers import SCORERS, Alisa, ExpectedAttention, Random, SnapKV
from workbench.organism.architecture import tokenizer as word_tokenizer
from workbench.step import Step
from workbench.toggle import Toggle
from workbench.toggles.evict import Evict, EvictKV
from workbench.toggles.quantize import QuantizeKV
from workbench.tokens import Batch, batches

FP32 = 3e-5  # float32 in another order of operations, measured 4e-6


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 1000, (length,), generator=generator).tolist() for length in lengths]


def read_on(subject: Subject, ids: Tensor, pieces: list[int]) -> Any:
    """Bare forwards of these many tokens each, with one cache; the last output."""
    output: Any = None
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            past = None if output is None else output.past_key_values
            output = subject.model(input_ids=piece, past_key_values=past, use_cache=True)
    return output


def view_of(
    keys: Tensor, query: Tensor, *, values: Tensor | None = None, before: int = 0, scaling: float | None = None
) -> View:
    """A view of one forward: `before` tokens, then those of `query`; nothing is padded."""
    batch, heads, length, _ = keys.shape
    at = torch.arange(length, dtype=torch.int32).expand(batch, 1, -1)
    seq = query.shape[2]
    step = Step(
        torch.arange(before, before + seq).expand(batch, -1),
        torch.ones(batch, seq, dtype=torch.bool),
        torch.full((batch,), before + seq),
    )
    values = torch.ones_like(keys) if values is None else values
    slots = Slots((keys, values, torch.zeros(batch, heads, length, 1)), at, True)
    context = Slots((keys, values), at, True)
    return View(0, slots, context, query, step, scaling, True, seq, torch.nn.Module(), lambda change: None)


def one_layer(dtype: torch.dtype = torch.float32) -> Subject:
    """A random model whose keys depend on token and position alone."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).eval()
    return Subject(model, tokenizer, name="one layer", verify=False)


# Scorers as values


@pytest.mark.parametrize("by", [*SCORERS, SnapKV(16, 3), ExpectedAttention(8), Alisa("mask", 0.5, 0.25), Random(3)])
def test_a_toggle_survives_json_whatever_scores(by: Any) -> None:
    toggle = EvictKV(0.4, by, every=None)
    assert Toggle.from_json(json.loads(json.dumps(toggle.to_json()))) == toggle


@pytest.mark.parametrize(
    ("name", "value"),
    [("snapkv", SnapKV()), ("random", Random()), ("alisa", Alisa()), ("expected_attention", ExpectedAttention())],
)
def test_a_name_stands_for_the_value_with_usual_settings(name: str, value: Any) -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(30))
    found = []
    for by in (name, value):
        with subject.under(EvictKV(0.4, by, every=2, sinks=1, window=2)):
            found.append(read_on(subject, ids, [25, 1, 1, 1, 1, 1]).logits)
    assert torch.equal(*found)


def test_settings_of_a_scorer_reach_the_cache() -> None:
    subject, ids, kept = subject_of("llama"), torch.tensor(prompts(40)), []
    for by in (Random(0), Random(1), SnapKV(2, 1), SnapKV(32, 9)):
        with subject.under(EvictKV(12, by, sinks=1, window=1)):
            kept.append(held(read_on(subject, ids, [40]).past_key_values.layers[1]))
    assert kept[0] != kept[1] and kept[2] != kept[3]


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (EvictKV, {"by": "snap"}, "got by='snap', expected one of streaming, .*or a value of SnapKV"),
        (EvictKV, {"by": len}, "expected one of streaming"),
        (EvictKV, {"positions": "slots"}, "got positions='slots', expected keep or reindex"),
        (EvictKV, {"chunk": 0}, "chunk=0; expected"),
        (EvictKV, {"by": Alisa("mask"), "chunk": 4}, "nothing to reindex and no chunk"),
        (EvictKV, {"by": Alisa("mask"), "positions": "reindex"}, "nothing to reindex"),
        (SnapKV, {"kernel": 4}, "an odd kernel"),
        (ExpectedAttention, {"future": 0}, "expected future >= 1"),
        (Alisa, {"mode": "hide"}, "expected mode evict or mask"),
        (Alisa, {"decay": 0.0}, r"decay in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused_in_words(make: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**settings)


# Running scores


@pytest.mark.parametrize("by", ["h2o", Alisa(decay=0.7), Alisa(decay=0.05)], ids=str)
@pytest.mark.parametrize("pieces", [[24], [9, 1, 1, 5, 1, 7], [1] * 24], ids=len)
def test_a_running_score_is_the_decayed_sum_of_all_weights_however_the_text_came(by: Any, pieces: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 24, 8, generator=generator)
    query = torch.randn(2, 4, 24, 8, generator=generator)
    hand, scorer = Hand(EvictKV(100, by, sinks=1, window=1, every=1)), EvictKV(by=by).scorer
    shown: list[Tensor] = []

    class Spy:
        running = True

        def keep(self, view: View) -> None:
            shown.append(scorer(view))

    hand.stages.select = Spy()
    for k, v, q in zip(keys.split(pieces, 2), values.split(pieces, 2), query.split(pieces, 2), strict=True):
        hand.feed(k, v, q)
    logits = query.double() @ keys.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    weights = logits.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)
    decay = 1.0 if by == "h2o" else by.decay
    age = torch.arange(23, -1, -1).double()
    expected = (weights * (decay**age)[:, None]).sum(2).unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(shown[-1].double(), expected, rtol=1e-5, atol=2e-5)  # float32, and rows left out at 1e-6
    stored = hand.layer.recent.buffers[2][:, :, :24, 0]
    torch.testing.assert_close(stored, shown[-1])


# Expected attention


def test_the_expected_exponential_is_what_random_queries_give() -> None:
    generator = torch.Generator().manual_seed(0)
    width, n = 8, 400_000
    mean, key = torch.randn(2, width, generator=generator).double() * 0.5
    root = torch.randn(width, width, generator=generator).double() * 0.4
    queries = mean + torch.randn(n, width, generator=generator).double() @ root.T
    scorer, view = ExpectedAttention(sinks=0), view_of(key.float().view(1, 1, 1, -1), torch.zeros(1, 1, 1, width))
    view.state.update(query_count=torch.ones(1, 1, 1), query_mean=mean.float().view(1, 1, -1))
    view.state["query_spread"] = (root @ root.T).float()[None, None]
    sampled = (queries @ key * width**-0.5).exp()
    error = float(sampled.std()) / n**0.5
    assert abs(float(scorer.logits(view).exp()) - float(sampled.mean())) < 4 * error  # four standard errors
    without = float((mean @ key * width**-0.5).exp())
    assert abs(without - float(sampled.mean())) > 8 * error, "the covariance would not be noticed"


def test_without_spread_it_is_the_softmax_of_the_mean_query_times_the_value_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, 2, 12, 8, generator=generator)
    query = torch.randn(1, 2, 1, 8, generator=generator).expand(-1, -1, 12, -1)  # always the same
    view, scorer = view_of(keys, query, values=values), ExpectedAttention(sinks=0)
    scorer.observe(view)
    expected = (keys @ query[:, :, :1].transpose(2, 3))[..., 0].mul(8**-0.5).softmax(-1) * values.norm(dim=-1)
    torch.testing.assert_close(scorer(view), expected)


def test_positions_below_sinks_count_in_no_statistic_and_get_the_best_score() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, query = torch.randn(2, 1, 1, 10, 4, generator=generator)
    wild = query.clone()
    wild[:, :, :4] = 100.0
    plain, other = view_of(keys, query), view_of(keys, wild)
    scorer = ExpectedAttention()
    for view in (plain, other):
        scorer.observe(view)
    torch.testing.assert_close(scorer(plain), scorer(other))
    best = scorer(plain)[0, 0]
    assert (best[:4] == best.max()).all() and len(best[4:].unique()) == 6


@pytest.mark.parametrize("pieces", [[30], [7, 1, 1, 12, 9]], ids=len)
def test_query_statistics_are_those_of_queries_before_rotation_however_they_came(pieces: list[int]) -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(30, 30))
    with subject.under(EvictKV(12, "expected_attention", sinks=1, every=1)):
        layer = read_on(subject, ids, pieces).past_key_values.layers[0]
    with torch.no_grad():
        block = subject.model.model.layers[0]
        hidden = block.input_layernorm(subject.model.model.embed_tokens(ids))
        queries = block.self_attn.q_proj(hidden).unflatten(2, (-1, 8)).transpose(1, 2).double()[:, :, 4:]
    mean = queries.mean(2)
    apart = queries - mean[:, :, None]
    torch.testing.assert_close(layer.state["query_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        layer.state["query_spread"].double(), apart.transpose(2, 3) @ apart, rtol=1e-4, atol=1e-5
    )
    assert layer.state["query_count"].flatten().tolist() == [26, 26]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi", "mixtral"])  # phi, gpt_neox: some channels rotate
def test_a_mean_rotation_meets_keys_as_its_rotations_do_on_average(family: str) -> None:
    rotation = Rotation.of(subject_of(family))
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 2, 3, 1, 16, generator=generator)
    places = torch.tensor([[5, 6, 7, 90], [1, 2, 300, 4]])
    spread = query.expand(-1, -1, 4, -1)
    expected = (rotation.turn(spread, places) * key).sum(-1).mean(-1)
    torch.testing.assert_close((query * rotation.mean_back(key, places)).sum(-1)[..., 0], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])  # gpt2, opt: no rotation, and none is needed
def test_expected_attention_acts_alike_on_a_row_alone_and_in_a_batch(family: str) -> None:
    subject = subject_of(family)
    with subject.under(EvictKV(0.4, "expected_attention", sinks=1, window=2, every=3)):
        ours = subject.generate(texts(), max_new_tokens=6)
        for index, text in enumerate(texts()):
            assert subject.generate([text], max_new_tokens=6).ids[0] == ours.ids[index]


def test_a_key_that_all_queries_look_for_is_kept() -> None:
    direction = torch.zeros(64)
    direction[3] = 1.0
    keys, query = torch.zeros(1, 1, 256, 64), direction.expand(1, 1, 256, -1)
    keys[0, 0, 77] = 64 * direction
    hand = Hand(EvictKV(16, "expected_attention", sinks=4, window=4))
    hand.feed(keys, torch.ones_like(keys), query)
    assert 77 in held(hand.layer)[0][0] and len(held(hand.layer)[0][0]) == 16


def test_statistics_of_queries_are_on_the_account_while_they_are_needed() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(30))
    for every, state in ((8, 4 * (1 + 4 * 8 + 4 * 8 * 8)), (None, 0)):  # four query heads of 8, float32
        with subject.under(EvictKV(12, "expected_attention", sinks=1, window=2, every=every)):
            cache = read_on(subject, ids, [28, 1, 1]).past_key_values
        rows = accounts(cache)
        assert sum(row["bytes"] for row in rows) == cache_bytes(cache)
        assert sum(row["bytes"] for row in rows if row["part"] == "state") == 3 * state


# Reindexed positions


@pytest.mark.parametrize("every", [1, None])
def test_reindexed_one_layer_equals_the_model_on_the_compacted_text(every: int | None) -> None:
    subject, ids = one_layer(), torch.tensor(prompts(40))
    toggle = EvictKV(12, "streaming", sinks=3, window=2, every=every, positions="reindex")
    with subject.under(toggle):
        output = read_on(subject, ids, [37, 1, 1, 1])
        kept = held(output.past_key_values.layers[0])[0][0]
    # What the last query saw: with every=1 one more was dropped after it.
    seen = [0, 1, 2, *range(30, 40)] if every else [0, 1, 2, *range(28, 40)]
    assert set(kept) <= set(seen) and kept[-1] == 39
    with torch.no_grad():
        compacted = subject.model(input_ids=ids[:, seen]).logits[:, -1]
    torch.testing.assert_close(output.logits[:, -1], compacted, rtol=0, atol=1e-5)
    with subject.under(replace(toggle, positions="keep")):
        assert float((read_on(subject, ids, [37, 1, 1, 1]).logits[:, -1] - compacted).abs().max()) > 1e-4


@pytest.mark.parametrize("schedule", ["uniform", "pyramid", "adaptive"])
def test_reindexed_keys_stand_contiguously_up_to_the_newest_in_every_segment(schedule: Any) -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(50, 50))
    toggle = EvictKV(0.4, "h2o", schedule, sinks=1, window=2, every=2, positions="reindex")
    with subject.under(toggle):
        layers = read_on(subject, ids, [30, *[1] * 20]).past_key_values.layers
        rotation, lengths = Rotation.of(subject), set()
        for layer in layers:
            shown, segments = layer.slots(), held(layer)
            raw = [part.slots() for part in layer.parts]
            for row, heads in enumerate(segments):
                for head, positions in enumerate(heads):
                    lengths.add(len(positions))
                    here = shown.positions.expand(2, 2, -1)[row, head] >= 0
                    own = torch.cat(
                        [
                            s.tensors[0][row, head][s.positions.expand(2, s.tensors[0].shape[1], -1)[row, head] >= 0]
                            for s in raw
                        ]
                    )[None, None]
                    plain = rotation.turn(own, torch.tensor([positions]), back=True)
                    places = torch.arange(50 - len(positions), 50)[None]
                    torch.testing.assert_close(
                        shown.tensors[0][row, head][here], rotation.turn(plain, places)[0, 0], rtol=1e-4, atol=1e-5
                    )
    assert (len(lengths) > 1) == (schedule != "uniform")


def test_positions_that_are_told_stay_the_original_ones_and_keys_never_drift() -> None:
    subject, ids = one_layer(torch.bfloat16), torch.tensor(prompts(200))
    found = []
    for positions in ("keep", "reindex"):
        with subject.under(EvictKV(16, "streaming", sinks=4, window=2, every=1, positions=positions)):
            layer = read_on(subject, ids, [20, *[1] * 180]).past_key_values.layers[0]
            found.append((held(layer), layer.kept.tensors[0]))
    assert found[0][0] == found[1][0] == [[[0, 1, 2, 3, *range(188, 200)]] * 2]
    assert torch.equal(found[0][1], found[1][1])  # 180 evictions: bit-equal, as a turned key is never written back


def test_until_something_is_dropped_reindexing_changes_no_bit() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(20))
    found = []
    for positions in ("keep", "reindex"):
        with subject.under(EvictKV(15, "snapkv", sinks=1, window=1, every=None, positions=positions)):
            read_on(subject, ids, [20])
            found.append(read_on(subject, ids[:, :12], [10, 1, 1]).logits)
    assert torch.equal(*found)


def test_reindexed_keys_may_be_packed() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(40))
    one = EvictKV(0.5, "snapkv", "adaptive", sinks=1, window=2, every=None)
    pack, found = QuantizeKV(8, 8, group=2, residual=3, sinks=1), []
    for toggle in (one, replace(one, positions="reindex"), pack | replace(one, positions="reindex")):
        with subject.under(toggle):
            found.append(read_on(subject, ids, [35, 1, 1, 1, 1, 1]).logits)
    apart = float((found[0] - found[1]).abs().max())
    assert float((found[1] - found[2]).abs().max()) < apart / 5  # 8 bits against another place of the keys


def test_reindexing_acts_alike_on_a_row_alone_and_in_a_batch() -> None:
    subject, given = subject_of("llama"), prompts(30, 12)
    toggle = EvictKV(0.5, "snapkv", "adaptive", sinks=1, window=2, every=3, positions="reindex")
    for one in (toggle, toggle | QuantizeKV(8, 8, group=2, residual=3, sinks=1)):
        with subject.under(one):
            ours = subject.generate(given, max_new_tokens=8)
            assert subject.generate(given[1:], max_new_tokens=8).ids[0] == ours.ids[1]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_without_rotary_positions_cant_be_reindexed(family: str) -> None:
    subject = subject_of(family)
    with pytest.raises(ValueError, match="no rotary positions"), subject.under(EvictKV(0.5, positions="reindex")):
        pass
    assert not subject.stages and subject.active == ()


@pytest.mark.parametrize("toggle", [EvictKV(positions="reindex"), EvictKV(by="expected_attention")], ids=str)
def test_models_with_several_rotations_are_refused(toggle: EvictKV) -> None:
    subject = Subject.tiny("gemma3_text")
    with pytest.raises(ValueError, match="several kinds of them"), subject.under(toggle):
        pass


# ALISA


def seen_by_each_step(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Positions that row 0, head 0 was shown at each forward from now on."""
    from workbench.cache import layer as module

    seen: list[list[int]] = []
    original = module.attend

    def attend(query: Tensor, slots: Slots, positions: Tensor, **options: Any) -> Tensor:
        seen.append([at for at in slots.positions[0, 0].tolist() if at >= 0])
        return original(query, slots, positions, **options)

    monkeypatch.setattr(module, "attend", attend)
    return seen


def spiky(length: int, spikes: dict[int, int], width: int = 16) -> tuple[Tensor, Tensor]:
    """Keys and queries (1, 1, length, width): the query at t looks at the key at spikes[t], others look nowhere."""
    keys, query = torch.zeros(1, 1, length, width), torch.zeros(1, 1, length, width)
    for number, (at, key) in enumerate(spikes.items()):
        query[0, 0, at, number] = 8.0
        keys[0, 0, key, number] = 8.0
    return keys, query


@pytest.mark.parametrize("mode", ["evict", "mask"])
def test_a_token_comes_back_in_mask_mode_and_never_in_evict_mode(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query = spiky(40, {19: 5, 24: 5, 30: 9})  # 9 draws its first weight when the query at 30 looks for it
    hand = Hand(EvictKV(8, Alisa(mode, decay=0.5), sinks=0, window=1, every=1))
    stage = hand.stages.select
    assert isinstance(stage, Evict)
    hand.stages.hide = stage.hide if mode == "mask" else None
    seen = seen_by_each_step(hand, monkeypatch)
    hand.feed(keys[:, :, :20], keys[:, :, :20], query[:, :, :20])
    for at in range(20, 40):
        part = slice(at, at + 1)
        hand.feed(keys[:, :, part], keys[:, :, part], query[:, :, part])
    at_step = dict(zip(range(19, 40), seen, strict=True))
    assert 5 in at_step[20] and 5 in at_step[25]
    assert 9 not in at_step[29] and 9 not in at_step[30]
    assert (9 in at_step[31]) == (mode == "mask")
    assert all(9 not in at_step[at] for at in range(31, 40)) == (mode == "evict")
    assert len(held(hand.layer)[0][0]) == (40 if mode == "mask" else 8)


def test_mask_mode_shows_each_decoding_step_exactly_its_budget_half_of_it_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = torch.randn(3, 1, 1, 60, 8, generator=torch.Generator().manual_seed(0))
    hand = Hand(EvictKV(0.25, Alisa("mask"), sinks=1, window=1))
    stage = hand.stages.select
    assert isinstance(stage, Evict)
    hand.stages.hide = stage.hide
    seen = seen_by_each_step(hand, monkeypatch)
    hand.feed(*made[:, :, :, :20])
    for at in range(20, 60):
        hand.feed(*made[:, :, :, at : at + 1])
    assert seen[0] == list(range(20))  # the prompt attends in full
    for total, shown in zip(range(21, 61), seen[1:], strict=True):
        k = round(0.25 * total)
        assert len(shown) == k and 0 in shown and shown[-(k // 2) :] == list(range(total - k // 2, total))
    assert hand.stages.receipts["select"].bytes_freed == 0 and hand.stages.receipts["select"].tokens > 0


def test_a_budget_of_all_tokens_is_dense_attention() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(20))
    plain = read_on(subject, ids, [15, 1, 1, 1, 1, 1]).logits
    for mode in ("mask", "evict"):
        with pytest.warns(UserWarning, match="never fired"), subject.under(EvictKV(100, Alisa(mode))):
            torch.testing.assert_close(read_on(subject, ids, [15, 1, 1, 1, 1, 1]).logits, plain, rtol=0, atol=FP32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("schedule", ["uniform", "pyramid", "adaptive"])
def test_mask_mode_acts_alike_on_a_row_alone_in_a_batch_and_in_transformers(family: str, schedule: Any) -> None:
    subject = subject_of(family)
    with subject.under(EvictKV(0.4, Alisa("mask"), schedule, sinks=1, window=1)):
        ours = subject.generate(texts(), max_new_tokens=6)
        for index, text in enumerate(texts()):
            assert subject.generate([text], max_new_tokens=6).ids[0] == ours.ids[index]
            made = subject.tokenizer([text], return_tensors="pt")
            theirs = subject.model.generate(
                **{k: v for k, v in made.items() if k in ("input_ids", "attention_mask")},
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=subject.pad_id,
            )
            assert tuple(theirs[0, made["input_ids"].shape[1] :].tolist()) == ours.ids[index]
        assert subject.receipts[0].fired


def test_mask_mode_and_packing_are_refused_together() -> None:
    subject = subject_of("llama")
    toggle = EvictKV(0.5, Alisa("mask")) | QuantizeKV()
    with pytest.raises(ValueError, match=r"both claim 'kv\.store'"), subject.under(toggle):
        pass
    with subject.under(EvictKV(0.5, Alisa("evict"), sinks=1) | QuantizeKV(group=2, residual=2)):
        subject.generate(prompts(40), max_new_tokens=2)


def test_the_plan_switches_where_the_sums_say() -> None:
    plan = AlisaPlan(on_gpu=100, keep=0.2, compute_s=5.0, fetch_s=1.0, recompute_s=0.5)
    assert (plan.fetching_from, plan.recomputing_from) == (101, 151)
    assert plan.recomputed_share == pytest.approx(2 / 3)
    assert [plan.phase(t) for t in (100, 101, 150, 151)] == ["on the GPU", "fetched", "fetched", "recomputed"]
    more = replace(plan, on_gpu=300)
    assert more.fetching_from > plan.fetching_from and more.recomputing_from > plan.recomputing_from


def test_a_plan_never_takes_longer_than_fetching_alone_and_its_share_tends_to_beta() -> None:
    plan = AlisaPlan(on_gpu=100, keep=0.2, compute_s=5.0, fetch_s=1.0, recompute_s=0.5)
    for tokens in range(1, 2000, 7):
        alone = max(plan.compute_s, plan.missing(tokens) * plan.fetch_s)
        shares = torch.linspace(0, 1, 201).double()
        missing = plan.missing(tokens)
        best = torch.maximum(5.0 + shares * missing * 0.5, (1 - shares) * missing).min()
        assert plan.step_s(tokens) <= alone + 1e-9 and plan.step_s(tokens) <= float(best) + 1e-9
    assert plan.recomputed(151) < 0.02 and plan.recomputed(10**7) == pytest.approx(2 / 3, abs=1e-4)


def test_a_plan_of_a_shape_states_what_recomputing_takes_for_granted() -> None:
    shape = {"n_layers": 1, "n_kv_heads": 8, "d_head": 128, "d_model": 4096, "on_gpu": 100, "keep": 0.2}
    plan = AlisaPlan.of(**shape, compute_s=1e-3, bytes_per_s=25e9, flops_per_s=300e12)
    assert plan.fetch_s == pytest.approx(0.164e-6, rel=2e-3) and plan.recompute_s == pytest.approx(0.056e-6, rel=2e-3)
    assert "must be stored" in str(plan) and "2 times the keys and values: this saves no memory" in str(plan)
    many = AlisaPlan.of(**(shape | {"n_kv_heads": 32}), compute_s=1e-3, bytes_per_s=25e9, flops_per_s=300e12)
    assert "0.5 times the keys and values: this saves 50% of their memory" in many.assumption
    with pytest.raises(ValueError, match="expected seconds above 0"):
        AlisaPlan(100, 0.2, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="a share above 0"):
        AlisaPlan(100, 0.0, 1.0, 1.0, 1.0)


# All of them


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"by": "expected_attention", "positions": "reindex"}),
        ("gpt2", {"by": "expected_attention"}),
        ("llama", {"by": Alisa("evict")}),
        ("llama", {"by": Alisa("mask")}),
        ("gpt2", {"by": Alisa("mask", local=0.0), "schedule": "adaptive"}),
        ("llama", {"by": "snapkv", "every": None, "chunk": 3}),
    ],
    ids=str,
)
def test_a_text_reads_alike_alone_and_in_a_padded_batch(family: str, more: dict[str, Any]) -> None:
    subject, given = subject_of(family), prompts(15, 5, 9)
    settings: dict[str, Any] = {"keep": 5, "sinks": 1, "window": 2, "every": 2} | more
    with subject.under(EvictKV(**settings)):
        together = {row: logprobs for row, _, logprobs in subject.predictions(given)}
        for row, ids in enumerate(given):
            alone = next(iter(subject.predictions([ids])))[2]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
        assert subject.receipts[0].fired


# Prompts in chunks


@pytest.mark.parametrize(("width", "size"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_pieces_are_a_partition_and_the_short_one_comes_first_where_asked(width: int, size: int) -> None:
    ids = torch.arange(2 * width).reshape(2, width)
    whole = Batch([0, 1], ids, ids >= 0, ids)
    for short_first in (False, True):
        pieces = list(whole.pieces(size, short_first=short_first))
        assert torch.equal(torch.cat([piece.ids for piece in pieces], 1), ids)
        assert [piece.mask.shape[1] for piece in pieces] == torch.tensor(
            [piece.ids.shape[1] for piece in pieces]
        ).cumsum(0).tolist()
        full = pieces[1:] if short_first else pieces[:-1]
        assert all(piece.ids.shape[1] == size for piece in full)


def test_even_batches_hold_one_length_each_and_every_text_once() -> None:
    lengths = [5, 9, 5, 5, 9, 2]
    made = list(batches(lengths, 10, even=True))
    assert sorted(index for group in made for index in group) == list(range(6))
    assert all(len({lengths[index] for index in group}) == 1 for group in made)
    assert all(sum(lengths[index] for index in group) <= 10 for group in made)


@pytest.mark.parametrize("by", ["snapkv", "h2o", "streaming", "expected_attention"])
@pytest.mark.parametrize("every", [None, 4])
def test_in_chunks_no_layer_ever_holds_more_than_budget_and_chunk(
    by: str, every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of("llama")
    longest = {None: 0, 16: 0}
    for chunk in longest:
        toggle = EvictKV(24, by, sinks=2, window=4, every=every, chunk=chunk)
        with subject.under(toggle), spied(monkeypatch) as calls:
            subject.generate(prompts(200), max_new_tokens=5)
        for call in calls:
            new = call.keys.shape[2]
            longest[chunk] = max([longest[chunk], new, *(len(at) + new for row in call.held for at in row)])
        if chunk is not None:
            assert largest_gap(calls) < FP32
            shapes = [call.keys.shape[2] for call in calls if call.layer.layer == 0]
            assert shapes == [8, *[16] * 12, 1, 1, 1, 1]
    assert longest[None] == 200 and longest[16] == 24 + 16


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_prompt_in_chunks_reads_alike_alone_and_beside_others(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, given = subject_of(family), prompts(37, 12, 37, 3, 20)
    with subject.under(EvictKV(12, "snapkv", sinks=1, window=2, every=3, chunk=8)):
        with spied(monkeypatch) as calls:
            ours = subject.generate(given, max_new_tokens=6)
        assert all(call.real.all() for call in calls), "padding shifts where chunks end"
        assert max(len(call.real) for call in calls) == 2  # prompts of one length go together
        for index, one in enumerate(given):
            assert subject.generate([one], max_new_tokens=6).ids[0] == ours.ids[index]
    with subject.under(EvictKV(12, "snapkv", sinks=1, window=2, every=3)):
        assert subject.generate(given, max_new_tokens=6).ids != ours.ids  # it does matter


def test_chunks_equal_bare_forwards_of_the_same_pieces() -> None:
    subject, ids = subject_of("llama"), prompts(30)
    with subject.under(EvictKV(10, "tova", sinks=1, window=2, every=8, chunk=8)):
        first = subject.generate(ids, max_new_tokens=1).ids[0][0]
    with subject.under(EvictKV(10, "tova", sinks=1, window=2, every=8)):
        logits = read_on(subject, torch.tensor(ids), [6, 8, 8, 8]).logits
    assert first == int(logits[0, -1].argmax())


def test_chunks_that_drop_nothing_or_hold_the_prompt_change_nothing() -> None:
    subject, given = subject_of("llama"), prompts(37, 12)
    plain = subject.generate(given, max_new_tokens=6).ids
    with pytest.warns(UserWarning, match="never fired"), subject.under(EvictKV(500, chunk=8)):
        assert subject.generate(given, max_new_tokens=6).ids == plain
    found = []
    for chunk in (None, 64):
        with subject.under(EvictKV(12, sinks=1, window=2, chunk=chunk)):
            found.append(subject.generate(given, max_new_tokens=6).ids)
    assert found[0] == found[1]


def test_leaving_puts_back_chunks_rotation_and_masks() -> None:
    subject = subject_of("llama")
    before = dict(vars(subject.stages))
    outer = EvictKV(0.5, "expected_attention", positions="reindex", chunk=8)
    with subject.under(outer):
        subject.generate(prompts(40), max_new_tokens=2)
        assert subject.stages.chunk == 8 and subject.stages.reindex and subject.stages.rotation is not None
        with subject.untoggled():
            assert vars(subject.stages) == before
        assert subject.stages.reindex
    assert vars(subject.stages) == before


def test_queries_of_long_ago_cost_no_row_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = View.attention

    def attention(self: View, window: Any) -> Tensor:
        out = original(self, window)
        asked.append(out.shape[2])
        return out

    monkeypatch.setattr(View, "attention", attention)
    made = torch.randn(1, 1, 600, 4, generator=torch.Generator().manual_seed(0))
    for by, rows in (("h2o", 600), (Alisa(decay=0.5), 20)):  # 0.5^20 = 1e-6
        asked.clear()
        Hand(EvictKV(50, by)).feed(made, made)
        assert sum(asked) == rows and max(asked) <= scorers.BLOCK
