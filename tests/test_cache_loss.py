"""CacheLoss and its frontier: reading equals generation, losses in closed form, needles kept or dropped, bad input."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.cache import cache_bytes
from workbench.corpora import recall
from workbench.methods.cache.comparison import compare, padded, quantile_interval, relative_error
from workbench.methods.cache.continuations import Text, own_text, texts_of
from workbench.methods.cache.frontier import CONTROL
from workbench.methods.cache.heavy_hitter import World
from workbench.methods.cache.loss import CacheLossResult
from workbench.methods.cache.reading import Reading, held_tokens, read
from workbench.probes.cache_loss import CacheFrontier, CacheLoss, frontier, heavy_hitter, random_control, spread
from workbench.result import Result
from workbench.site import Site
from workbench.stats import bootstrap_interval
from workbench.subject import Subject
from workbench.toggles.evict import EvictKV
from workbench.toggles.quantize import QuantizeKV
from workbench.toggles.steer import Clamp

HARD = EvictKV(0.25, "snapkv")


@functools.cache
def organism() -> Subject:
    return Subject.organism()


@functools.cache
def tiny(family: str = "llama") -> Subject:
    return Subject.tiny(family)


@functools.cache
def codes(n: int = 4, distances: tuple[int, ...] = (64, 128)) -> tuple:
    return tuple(recall.items("held_out", 0, n, distances))


@functools.cache
def pairs(lengths: tuple[int, ...] = (20, 20, 26), scored: int = 5) -> tuple:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(8, 200, (length + scored,), generator=generator).tolist() for length in lengths]
    return tuple((one[:length], one[length:]) for one, length in zip(ids, lengths, strict=True))


def value(result: Result, measure: str) -> float:
    table = result.table()
    return float(table.loc[(table["measure"] == measure) & (table["group"] == "all"), "value"].iloc[0])


# --- laws


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_without_a_toggle_nothing_is_lost(family):
    result = CacheLoss().run(tiny(family), pairs())
    assert result.kl.max() == 0 and result.same_top.all() and np.nanmax(result.head_error) == 0
    assert result.bytes_share == 1 and (result.kept[result.kept >= 0] == 1).all()


def test_recall_by_reading_is_recall_by_greedy_generation():
    subject, items = organism(), codes()
    for toggle in (EvictKV(0.5, "tova"), EvictKV(0.5) | QuantizeKV(2, 2, group=8, residual=0)):
        with subject.under(toggle):
            read_right = CacheLoss().run(subject, items).exact()
            said = subject.generate([item.prompt for item in items], max_new_tokens=4).texts
        assert read_right.tolist() == [
            text.split() == item.answer.split() for text, item in zip(said, items, strict=True)
        ]


def test_texts_read_together_are_texts_read_alone():
    subject = tiny()
    with subject.under(EvictKV(0.5, "h2o", sinks=1, window=2, every=2)):
        together = CacheLoss().run(subject, pairs())
        alone = [CacheLoss().run(subject, [one]) for one in pairs()]
    np.testing.assert_allclose(together.nll, np.concatenate([one.nll for one in alone]), atol=1e-4)  # float32 kernels
    np.testing.assert_allclose(together.bytes_held[1], [one.bytes_held[1, 0] for one in alone])
    np.testing.assert_allclose(together.held_share, np.concatenate([one.held_share for one in alone]))


def test_the_untoggled_side_is_the_models_own_single_forward():
    subject, (prompt, following) = tiny(), pairs()[0]
    reading = read(subject, [Text(prompt, following, "x")], 0, 4096)[0]
    _, _, logprobs = next(subject.predictions([prompt + following]))
    np.testing.assert_allclose(reading.logprobs, logprobs[len(prompt) - 1 : -1], atol=1e-5)  # float32, 4e-7 measured
    heads = subject.capture([prompt + following], [Site(1, "heads")])[Site(1, "heads")][len(prompt) : -1]
    np.testing.assert_allclose(reading.heads[1], heads, atol=1e-5)


@pytest.mark.parametrize("unseen", [0, 1, 3])
def test_every_scored_token_but_the_exact_first_has_a_query(unseen):
    subject, (prompt, following) = tiny(), pairs()[0]
    text = Text(prompt, following, "x")
    reading = read(subject, [text], unseen, 4096)[0]
    assert [len(part) for part in reading.heads] == [len(following) - (unseen == 0)] * subject.n_layers
    assert reading.held.shape[2] == len(prompt) - unseen
    whole = read(subject, [text], 0, 4096)[0]
    np.testing.assert_allclose(reading.logprobs, whole.logprobs, atol=1e-5)
    np.testing.assert_allclose(reading.heads[0][-4:], whole.heads[0], atol=1e-5)


def test_the_first_token_is_exact_unless_the_prompts_last_is_unseen():
    subject = tiny()
    with subject.under(EvictKV(0.2, "streaming", sinks=1, window=1)):
        seen, unseen = (CacheLoss(unseen=n).run(subject, pairs()) for n in (0, 1))
    first = np.unique(seen.token_text, return_index=True)[1]
    assert seen.kl[first].max() < 1e-9 and np.delete(seen.kl, first).min() > 1e-9  # exact up to the kernel
    assert unseen.kl[first].min() > 1e-9


def test_bytes_and_kept_tokens_are_those_of_the_cache_itself():
    subject, (prompt, following) = tiny(), pairs()[0]
    with subject.under(EvictKV(0.5, "snapkv", "adaptive", sinks=1, window=2)):
        result = CacheLoss().run(subject, [(prompt, following)])
        with torch.no_grad():
            cache = subject.model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
        assert result.bytes_held[1, 0] == cache_bytes(cache)
        for layer, part in enumerate(cache.layers):
            for head, positions in enumerate(part.slots().positions.expand(1, 2, -1)[0]):
                assert np.flatnonzero(result.kept[0, layer, head]).tolist() == positions[positions >= 0].tolist()
    assert result.kept[0].sum() == 10 * 2 * subject.n_layers  # adaptive moves tokens between heads, not their number
    assert result.bytes_share < 0.6


def test_a_prompt_read_in_chunks_is_read_as_generation_reads_it():
    subject, items = organism(), codes(2, (64,))
    with subject.under(EvictKV(24, "snapkv", chunk=16)):
        read_right = CacheLoss().run(subject, items)
        said = subject.generate([item.prompt for item in items], max_new_tokens=1)
        top = [read(subject, [text], 0, 4096)[0].logprobs[0].argmax() for text in texts_of(subject, items, 1)]
    assert [int(one) for one in top] == [ids[0] for ids in said.ids]
    assert (read_right.kept == 1).sum(-1).max() == 24


def test_a_continuation_that_ends_early_changes_no_other():
    subject, (first, second, _) = tiny(), pairs()
    short = (first[0], first[1][:2])
    together = CacheLoss().run(subject, [short, second])
    np.testing.assert_allclose(together.nll[2:], CacheLoss().run(subject, [second]).nll, atol=1e-5)
    assert np.bincount(together.token_text).tolist() == [2, 5]


# --- truths by hand


def test_the_needles_weight_is_the_published_one():
    assert World.of(0).weight(256) == pytest.approx(0.921198, abs=1e-6)
    assert World.of(0).weight(1024) == pytest.approx(0.744503, abs=1e-6)


@pytest.mark.parametrize(
    ("by", "held"),
    [("h2o", 1), ("snapkv", 1), ("tova", 1), ("alisa", 1), ("streaming", 0), ("key_norm", 0)],
)
def test_a_heavy_hitter_is_kept_by_attention_and_dropped_by_recency(by, held):
    result = heavy_hitter(EvictKV(0.25, by))
    assert result.held_again.min() == result.held_again.max() == held
    assert value(result, "recall") == held and value(result, "held") == 0.25


def test_losses_of_a_hand_made_pair_of_readings():
    base = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]).log()
    output = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])  # (query, head, d_head)
    held = np.array([[[1, 0, 1]]], dtype=np.int8)
    sides = Reading(base, (output,), np.ones_like(held), 100.0), Reading(other, (1.5 * output,), held, 40.0)
    loss = compare(*sides, Text([7, 1, 2], [1, 1], "x"))
    np.testing.assert_allclose(loss.tokens["kl"], [0.25 * np.log(2), 0.0], atol=1e-7)  # .5 log 2 + .25 log .5
    np.testing.assert_allclose(loss.tokens["nll"], [-np.log(0.5), -np.log(0.7)], atol=1e-7)
    np.testing.assert_allclose(loss.tokens["base_nll"], [-np.log(0.25), -np.log(0.7)], atol=1e-7)
    assert loss.tokens["same_top"].tolist() == [0, 1] and loss.tokens["right"].tolist() == [1, 1]
    assert loss.head_error[0, 0] == 0.5 and np.isnan(loss.head_error[0, 1])  # no output, no relative error
    result = CacheLossResult.of([loss], ["x"], {0: ["a", "b", "c"]})
    assert result.bytes_share == 0.4 and result.held_share[0, 0, 0] == pytest.approx(2 / 3)
    assert result.held_again[0, 0, 0] == 0  # token 1 comes again and is dropped
    assert result.exact().tolist() == [True] and result.exact(base=True).tolist() == [False]


def test_a_word_that_the_full_cache_excludes_has_no_part_in_the_divergence():
    sure, half = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.5, 0.5]]).log()
    held = np.ones((1, 1, 2), dtype=np.int8)
    output = (torch.ones(0, 1, 1),)
    loss = compare(Reading(sure, output, held, 1.0), Reading(half, output, held, 1.0), Text([0, 1], [0], "x"))
    assert loss.tokens["kl"][0] == pytest.approx(np.log(2))


def test_layers_of_unequal_width_are_filled_up_with_gaps():
    matrix = padded([np.ones(2), np.ones(3)])
    assert matrix.shape == (2, 3) and np.isnan(matrix[0, 2]) and np.isfinite(matrix).sum() == 5
    assert relative_error(torch.ones(0, 2, 4), torch.ones(0, 2, 4)).shape == (2,)


def test_a_quantile_is_the_smallest_value_that_its_share_does_not_exceed():
    values, text = np.arange(1.0, 101.0), np.repeat(np.arange(10), 10)
    estimate, low, high = quantile_interval(values, text, 0.99)
    assert estimate == 99 and 70 <= low < 99 and high == 100  # one resample in 36 lacks the last three texts
    assert quantile_interval(np.full(7, 3.0), np.arange(7), 0.99) == (3.0, 3.0, 3.0)
    shuffled = np.random.default_rng(0).permutation(100)
    assert quantile_interval(values[shuffled], text[shuffled], 0.99) == (estimate, low, high)


def test_means_weigh_texts_by_their_tokens():
    subject, (first, second, _) = tiny(), pairs()
    with subject.under(Clamp({Site(0, "neurons"): (0, 1, 2)}, to=3.0)):
        result = CacheLoss().run(subject, [(first[0], first[1][:1]), second])
    assert value(result, "nll") == pytest.approx(result.nll.mean()) and value(result, "kl") > 0
    texts = [result.nll[result.token_text == index] for index in (0, 1)]
    expected = bootstrap_interval(np.array([t.mean() for t in texts]), weights=np.array([1, 5]), n_bootstrap=1000)
    row = result.table().set_index("measure").loc["nll"]
    assert (row["low"], row["high"]) == pytest.approx(expected[1:])


# --- the frontier


def test_chance_is_tried_at_every_budget_once():
    settings = [("a", EvictKV(0.5)), ("b", EvictKV(0.5, "tova", "pyramid") | QuantizeKV(4)), ("c", EvictKV(16))]
    assert random_control(settings) == ((CONTROL, EvictKV(0.5, "random")), (CONTROL, EvictKV(16, "random")))
    assert [toggle.keep for _, toggle in random_control([("bits", QuantizeKV(4))])] == [0.75, 0.5, 0.25, 0.125]
    assert random_control([(CONTROL, EvictKV(0.5, "random"))]) == ()


def test_the_frontier_is_the_loss_under_each_toggle():
    subject, items = organism(), codes(1, (128,))
    result = frontier(subject, {"snapkv": [HARD], "bits": [QuantizeKV(2, 2, residual=0)]}, items)
    with subject.under(HARD):
        alone = CacheLoss().run(subject, items)
    row = result.curve("snapkv", "kl").iloc[0]
    assert row["value"] == value(alone, "kl") and row["bytes_share"] == alone.bytes_share
    assert set(result.table()["method"]) == {"snapkv", "bits", CONTROL} and len(result.summary()) == 3
    assert result.best("kl", within=0.3)["method"] == "bits" and not subject.active
    assert "random eviction" in result.finding and result.provenance.probe["class"] == "CacheFrontier"


def test_the_best_setting_is_the_best_within_its_bytes():
    result = CacheFrontier.planted(0).solve()
    assert result.best("recall", within=0.6)["toggles"] == "EvictKV(keep 12% by snapkv)"  # of equals the smallest
    assert result.best("head_error", within=0.6)["method"] == "snapkv"
    assert result.best("recall", within=0.01)["bytes_share"] < 0.2  # none within: the smallest
    with pytest.raises(ValueError, match="measure 'loss'"):
        result.plot("loss")
    with pytest.raises(ValueError, match="group '64'"):
        result.plot("recall", "64")
    with pytest.raises(ValueError, match="expected one of snapkv"):
        result.curve("tova", "recall")


def test_on_the_organism_attention_recalls_from_afar_what_recency_forgets():
    items = codes(8, (256,))
    curves = {"snapkv, pyramid": [EvictKV(0.25, "snapkv", "pyramid")], "streaming": [EvictKV(0.25, "streaming")]}
    result = frontier(organism(), curves, items)
    recalled = {name: result.curve(name, "recall")["value"].iloc[0] for name in (*curves, CONTROL)}
    assert recalled["snapkv, pyramid"] >= 0.9 and recalled["streaming"] <= 0.2 >= recalled[CONTROL]


# --- figures


def test_every_view_states_its_finding():
    with organism().under(HARD):
        result = CacheLoss(maps=2).run(organism(), codes())
    assert result.kept_text == (7, 0) and result.kept_words[0][1:4] == ("the", "code", "is")
    for view in result.views()["view"]:
        assert any(character.isdigit() for character in result.plot(view).layout.title.text)
    words = result.plot("kept", text=0, kv_head="1").data[0].text[0]
    assert len(words) == len(result.kept_words[1]) < len(result.kept_words[0])
    assert [
        trace.name for trace in result.plot().data if trace.name
    ] and "distance" in result.plot().layout.xaxis.title.text
    for wrong, message in (
        ({"text": 3}, "text=3"),
        ({"kv_head": "9"}, "kv_head='9'"),
        ({"kv_head": "x"}, "kv_head='x'"),
    ):
        with pytest.raises(ValueError, match=message):
            result.plot("kept", **wrong)
    with pytest.raises(ValueError, match="view 'all'"):
        result.plot("all")
    with pytest.raises(ValueError, match="maps=1"):
        replace(result, kept_text=()).plot("kept")


def test_a_small_memory_gives_the_same_result(monkeypatch):
    subject, toggle = tiny(), EvictKV(0.5, "tova", sinks=1, window=2)
    with subject.under(toggle):
        whole = CacheLoss().run(subject, pairs())
        monkeypatch.setattr("workbench.probes.cache_loss.BASE_BYTES", 1)
        parts = CacheLoss(batch=1).run(subject, pairs())
    np.testing.assert_allclose(parts.kl, whole.kl, atol=1e-5)  # float32 kernels of other batch sizes
    assert parts.token_text.tolist() == whole.token_text.tolist() and (parts.kept == whole.kept).all()


def test_maps_are_spread_over_the_data():
    assert spread(list(range(9)), 3) == [8, 4, 0] and spread(list(range(2)), 4) == [1, 0] and spread([1], 0) == []


def test_one_token_each_leaves_no_query_to_compare():
    result = CacheLoss().run(tiny(), [(prompt, following[:1]) for prompt, following in pairs()])
    assert np.isnan(value(result, "head_error")) and not len(result.errors())
    with pytest.raises(ValueError, match="unseen=1"):
        result.plot("heads")
    assert len(CacheLoss(unseen=1).run(tiny(), [(prompt, following[:1]) for prompt, following in pairs()]).errors())


# --- input


def test_items_pairs_texts_and_ids_mean_the_same_tokens():
    subject, item = organism(), codes(1, (64,))[0]
    whole = f"{item.prompt} {item.answer}"
    made = [texts_of(subject, [one], 4)[0] for one in (item, (item.prompt, item.answer), whole)]
    made.append(texts_of(subject, [(made[0].prompt, made[0].continuation)], 4)[0])
    assert all((text.prompt, text.continuation) == (made[0].prompt, made[0].continuation) for text in made)
    assert [text.group for text in made] == ["64", "texts", "texts", "texts"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "got \\[\\]"),
        ("the code", "got 'the code'"),
        (["the code is"], "got a text of 4 tokens"),
        ([([], [3])], "empty prompt"),
        ([([3], [])], "empty prompt or continuation"),
        ([[9, 8, 7]], r"got \[9, 8, 7\], expected an item"),
        ([("the", "code", "is")], "expected an item, a text, or a"),
        ([("the code", [9, 8])], "token ids of both"),
        ([([9, 8], "is")], "token ids of both"),
        ([([9] * 600, [3])], "context is"),
        ([("the code", "zzzz")], "zzzz"),
    ],
)
def test_data_that_can_not_be_split_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        CacheLoss().run(organism(), data)


@pytest.mark.parametrize("unseen", [-1, 20, 21])
def test_some_of_each_prompt_must_be_read_first(unseen):
    with pytest.raises(ValueError, match=f"unseen={unseen}"):
        CacheLoss(unseen=unseen).run(tiny(), pairs())


def test_a_frontier_without_settings_is_refused():
    with pytest.raises(ValueError, match="no settings"):
        CacheFrontier((), control=False).run(tiny(), pairs())


def test_own_text_is_said_word_for_word_by_the_full_cache():
    subject = organism()
    texts = own_text(subject, ["once there was a"] * 4, prompt_tokens=40, continuation=6)
    assert texts and all((len(prompt), len(following)) == (40, 6) for prompt, following in texts)
    assert len({tuple(prompt) for prompt, _ in texts}) > 1, "sampled beginnings differ"
    assert CacheLoss().run(subject, texts).exact(base=True).all()
    with pytest.raises(ValueError, match="expected under 3"):
        own_text(subject, ["once there was a"], prompt_tokens=3)


def test_a_layer_without_single_tokens_has_no_heads_here():
    class Recurrent:
        def __init__(self) -> None:
            self.keys = None

    class Window:
        def __init__(self) -> None:
            self.keys = torch.zeros(1, 2, 3, 4)

    assert held_tokens(Recurrent(), 5).shape == (1, 0, 5)
    assert held_tokens(Window(), 5)[0].tolist() == [[0, 0, 1, 1, 1]] * 2
