"""SkipFFN: rests as planted, decoding equals reading, rows decide alone, caches stay whole, nothing leaks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from workbench import Clamp, EvictKV, QuantizeKV, Site, Steer, Subject
from workbench.corpora import requests
from workbench.methods.pruning.skipping import change, middle, simulated
from workbench.probes.ffn_saturation import FFNSaturation
from workbench.pruned import Plan
from workbench.toggles.prune import Prune
from workbench.toggles.skip_ffn import SkipFFN

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "opt")
IDS = torch.tensor([[5, 9, 2, 7, 11, 30, 4, 8, 21, 3, 17, 40]])
TEXTS = (requests.prompt("paint", "lamp"), requests.prompt("paint", "lamp") + " " + requests.prompt("smash", "bell"))
RULES = (
    SkipFFN(0.8, warmup=1, run=1),
    SkipFFN(0.9, warmup=0, run=None),
    SkipFFN(0.6, first=1, warmup=2, test="relative"),
    SkipFFN(static=(1,), warmup=3),
)


@functools.cache
def double(family: str) -> Subject:
    """One shared subject per family, in float64; tests that change weights make their own."""
    subject = Subject.tiny(family)
    subject.model.double()
    return subject


@torch.no_grad()
def read(subject: Subject, ids: torch.Tensor = IDS) -> torch.Tensor:
    return subject.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def decoded(subject: Subject, ids: torch.Tensor = IDS, prompt: int = 1) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt and then of one token after the other, and the cache."""
    output = subject.model(input_ids=ids[:, :prompt], use_cache=True)
    logits = [output.logits]
    for column in range(prompt, ids.shape[1]):
        output = subject.model(input_ids=ids[:, column : column + 1], past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits, 1), output.past_key_values


def facts(subject: Subject) -> dict[str, Any]:
    return subject.receipts[-1].to_json()["per_layer"]


def saturated_from(subject: Subject, first: int) -> None:
    """Let the feed-forward blocks from a layer on add exactly nothing."""
    for layer in range(first, subject.n_layers):
        down: Any = subject.anatomy.module(subject.model, Site(layer, "neurons"))
        with torch.no_grad():
            down.weight.zero_()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("toggle", RULES, ids=str)
def test_reading_a_text_equals_decoding_it_token_by_token(family: str, toggle: SkipFFN) -> None:
    subject = double(family)
    with subject.under(toggle):
        parallel, seen = read(subject), facts(subject)
    with subject.under(toggle):
        sequential, _ = decoded(subject)
        assert facts(subject) == seen  # the same tokens skip the same blocks
    torch.testing.assert_close(parallel, sequential, rtol=0, atol=1e-12)  # measured 4e-15
    assert seen["tokens"]["0"] == IDS.shape[1] - 1 - toggle.warmup


def test_the_rules_do_skip_some_blocks_and_not_others() -> None:
    subject = double("llama")
    plain = read(subject)
    for toggle in (RULES[0], SkipFFN(0.6, warmup=0, run=None)):
        with subject.under(toggle):
            assert not torch.equal(read(subject), plain)
            skipped, tokens = (sum(facts(subject)[name].values()) for name in ("skipped", "tokens"))
            assert 0 < skipped < tokens
            assert f"skipped {skipped / tokens:.1%} of the feed-forward blocks" in str(subject.receipts[0])


def test_mixtures_of_experts_skip_whole_blocks() -> None:
    subject = Subject.tiny("mixtral")  # its kernels know no float64
    with subject.under(SkipFFN(-1.0, warmup=0, run=1)):
        torch.testing.assert_close(read(subject), decoded(subject)[0], rtol=0, atol=1e-5)  # fp32
        assert facts(subject)["skipped"] == {"1": 2 * (IDS.shape[1] - 1)}


def test_skipping_saturated_blocks_changes_no_bit_and_starts_one_behind_the_first() -> None:
    subject = Subject.tiny("llama")
    subject.model.double()
    saturated_from(subject, 1)
    plain = read(subject)
    with subject.under(SkipFFN(1 - 1e-9, warmup=0, run=None)):
        assert torch.equal(read(subject), plain)
        assert facts(subject)["skipped"] == {"2": IDS.shape[1] - 1}


def test_a_threshold_that_nothing_reaches_is_bit_equal_to_the_model() -> None:
    subject = double("llama")
    plain = decoded(subject)[0]
    for toggle in (SkipFFN(1.001, warmup=0), SkipFFN(0.0, warmup=0, test="relative")):
        with subject.under(toggle):
            assert torch.equal(decoded(subject)[0], plain)
            assert "skipped" not in facts(subject)


def test_within_the_warm_up_and_in_the_prompt_nothing_is_skipped() -> None:
    subject = double("llama")
    plain, written = decoded(subject, prompt=5)[0], subject.generate(TEXTS, max_new_tokens=6)
    always = SkipFFN(-1.0, warmup=6, run=1)
    with subject.under(always):
        assert subject.generate(TEXTS, max_new_tokens=6) == written
        assert subject.receipts[0].tokens == 0
        assert "no token came behind prompt and warm-up" in str(subject.receipts[0])
        said, _ = decoded(subject, prompt=5)
    assert torch.equal(said[:, :11], plain[:, :11]) and not torch.equal(said[:, 11], plain[:, 11])


def test_the_cache_is_as_long_as_without_and_equal_up_to_the_first_skip() -> None:
    subject = double("llama")
    plain = decoded(subject)[1]
    with subject.under(SkipFFN(static=(1,), warmup=0)):
        _, cache = decoded(subject)
    for layer, (ours, theirs) in enumerate(zip(cache.layers, plain.layers, strict=True)):
        assert ours.keys.shape == theirs.keys.shape
        assert torch.equal(ours.keys, theirs.keys) == (layer <= 1)


def test_blocks_that_rest_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject.tiny("llama")
    rows: list[int] = []
    with subject.under(SkipFFN(static=(1,))):  # the first install of all reads a few tokens
        read(subject)
    act = subject.model.model.layers[1].mlp.act_fn
    forward = act.forward
    monkeypatch.setattr(act, "forward", lambda x: (rows.append(x.shape[:-1].numel()), forward(x))[1])
    with subject.under(SkipFFN(static=(1,), warmup=2)):
        decoded(subject, IDS.expand(3, -1), prompt=4)
        assert rows == [12, 3, 3] and subject.receipts[0].tokens == 18
        assert facts(subject)["skipped"] == {"1": 18}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rows_of_a_batch_decide_as_they_do_alone(family: str) -> None:
    subject = double(family)
    with subject.under(SkipFFN(0.8, warmup=1, run=1)):
        together = subject.generate(TEXTS, max_new_tokens=12)
        skipped = facts(subject)["skipped"]
    counts: dict[str, int] = {}
    for row, text in enumerate(TEXTS):
        with subject.under(SkipFFN(0.8, warmup=1, run=1)):
            assert subject.generate([text], max_new_tokens=12).ids[0] == together.ids[row]
            assert subject.generate([text], max_new_tokens=12, use_cache=False).ids[0] == together.ids[row]
            for layer, count in facts(subject)["skipped"].items():
                counts[layer] = counts.get(layer, 0) + count
    if all(len(ids) == 12 for ids in together.ids):  # a row that ended goes on beside one that has not
        assert set(counts) == set(skipped)


def test_all_skips_only_where_all_rows_agree() -> None:
    subject = double("llama")
    twice, other = IDS.expand(2, -1), torch.cat([IDS, IDS.flip(1)])
    gather, every = SkipFFN(0.8, warmup=0, run=1), SkipFFN(0.8, warmup=0, run=1, batch="all")
    said, counts = {}, {}
    for name, ids in (("twice", twice), ("other", other)):
        for toggle in (gather, every):
            with subject.under(toggle):
                said[name, toggle.batch], _ = decoded(subject, ids)
                counts[name, toggle.batch] = sum(facts(subject).get("skipped", {}).values())
    torch.testing.assert_close(said["twice", "all"], said["twice", "gather"], rtol=0, atol=1e-12)
    assert counts["twice", "all"] == counts["twice", "gather"] > 0
    assert counts["other", "all"] < counts["other", "gather"]


def test_two_generations_in_a_row_are_one_and_the_same() -> None:
    subject = double("llama")
    with subject.under(SkipFFN(0.8, warmup=0)):
        first, before = subject.generate(TEXTS, max_new_tokens=8), facts(subject)["skipped"]
        assert subject.generate(TEXTS, max_new_tokens=8) == first
        assert facts(subject)["skipped"] == {layer: 2 * count for layer, count in before.items()}


def test_an_exception_inside_generate_leaves_nothing_behind() -> None:
    subject = double("opt")
    plain, toggle = read(subject), SkipFFN(-1.0, warmup=0)
    with subject.under(toggle):
        expected = read(subject)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            subject.generate(TEXTS, max_new_tokens=4, on_token=stop)
        assert torch.equal(read(subject), expected)
    with pytest.raises(KeyboardInterrupt), subject.under(toggle):
        subject.generate(TEXTS, max_new_tokens=4, on_token=stop)
    for module in subject.model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks
        assert len(module._forward_hooks) == 0
    assert torch.equal(read(subject), plain)


def test_under_toggles_on_caches_texts_are_read_as_they_are_decoded() -> None:
    subject = Subject.tiny("llama")
    toggle = SkipFFN(0.8, warmup=1, run=1)
    with subject.under(toggle):
        alone = subject.nll(TEXTS)
        skipped = facts(subject)["skipped"]
    keeps_all = pytest.warns(UserWarning, match="EvictKV.* never fired")
    with keeps_all, subject.under(EvictKV(1000, "streaming") | toggle):  # so the same tokens are seen
        torch.testing.assert_close(subject.nll(TEXTS), alone, rtol=0, atol=1e-5)  # fp32
        assert facts(subject)["skipped"] == skipped
    with subject.under(QuantizeKV(8, 8, group=4, residual=0, sinks=0) | toggle):
        assert subject.generate(TEXTS, max_new_tokens=6).ids and subject.receipts[1].tokens > 0
    with subject.under(EvictKV(8, "tova", sinks=1, window=2, chunk=4) | toggle):
        prompt = subject.generate(TEXTS, max_new_tokens=1)
        assert subject.receipts[1].tokens == 0 and prompt.ids  # a prompt in chunks is still a prompt
    never = pytest.warns(UserWarning, match="EvictKV.* never fired")
    by_one = EvictKV(8, "tova", sinks=1, window=2, chunk=1) | toggle
    with never, subject.under(by_one), pytest.raises(ValueError, match="Take chunk=2"):
        subject.generate(TEXTS, max_new_tokens=1)


def test_what_reads_inside_a_skipped_block_reads_zero_and_clamps_there_do_nothing() -> None:
    subject, skip = double("llama"), SkipFFN(static=(1,), warmup=0)
    sites = [Site(1, "neurons"), Site(1, "mlp_out"), Site(0, "neurons")]
    with subject.under(skip):
        capture, plain = subject.capture([IDS[0].tolist()], sites), read(subject)
        generated = capture.position >= 1
        assert not capture[sites[0]][generated].any() and not capture[sites[1]][generated].any()
        assert capture[sites[0]][~generated].any() and capture[sites[2]][generated].all()
        with subject.under(Clamp(((Site(1, "neurons"), (3,)),), 5.0, positions=tuple(range(1, 12)))):
            torch.testing.assert_close(read(subject), plain, rtol=0, atol=1e-12)  # whole and gathered rows
    with subject.under(Clamp(((Site(1, "neurons"), (3,)),), 5.0) | skip):
        torch.testing.assert_close(read(subject), decoded(subject)[0], rtol=0, atol=1e-12)


def test_a_push_before_the_toggle_is_seen_by_its_test() -> None:
    subject, site = double("llama"), Site(1, "resid_out")
    away = torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    counts = []
    for toggle in (SkipFFN(0.8, warmup=0, run=1), Steer(away, site, 50.0) | SkipFFN(0.8, warmup=0, run=1)):
        with subject.under(toggle):
            read(subject)
            counts.append(facts(subject)["skipped"].get("2", 0))
    assert counts[0] > 0 and counts[1] == 0


def test_skipping_goes_with_pruning() -> None:
    subject = double("llama")
    skip = SkipFFN(0.8, warmup=0, run=1)
    for plan in (Plan.of(subject, {1: {"neurons": range(20)}}), Plan.of(subject, drop=[1])):
        said = []
        for form in ("mask", "slice"):
            with subject.under(Prune(plan, form) | skip):
                said += [read(subject), decoded(subject)[0]]
        for other in said[1:]:
            torch.testing.assert_close(other, said[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected one of them"),
        ({"threshold": 0.9, "static": (1,)}, "expected one of them"),
        ({"threshold": 0.9, "first": 3, "last": 2}, "first <= last"),
        ({"threshold": 0.9, "run": 0}, "run >= 1 or None"),
        ({"threshold": 0.9, "warmup": -1}, "warmup >= 0"),
        ({"threshold": 0.9, "test": "dot"}, "cosine or relative"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipFFN(**settings)


def test_layers_that_are_not_there_and_parallel_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks 0 to 2"), Subject.tiny().under(SkipFFN(static=(3,))):
        pass
    for family in ("gpt_neox", "phi", "falcon"):
        with pytest.raises(ValueError, match="side by side"), Subject.tiny(family).under(SkipFFN(0.9)):
            pass


# The rules and the probe


def test_cosines_and_lengths_are_those_of_their_definition() -> None:
    before, added = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]])
    assert float(change(before, before + added, "cosine")) == pytest.approx(0.5**0.5, abs=1e-7)
    assert float(change(before, before + added, "relative")) == pytest.approx(1.0, abs=1e-7)
    assert float(change(before.bfloat16(), (before + added).bfloat16(), "cosine")) == pytest.approx(0.5**0.5, abs=1e-6)


def test_a_token_rests_as_long_as_it_should() -> None:
    values = torch.tensor([[0.9, 0.1, 0.9, 0.9, 0.1, 0.9, 0.1], [0.1] * 7], dtype=torch.float64)
    rests = simulated(values, 0.5, 0, 6, 2, "cosine")
    assert rests.int().tolist() == [[0, 1, 1, 0, 1, 1, 0], [0] * 7]
    assert simulated(values, 0.5, 0, 5, None, "cosine").int().tolist()[0] == [0, 1, 1, 1, 1, 1, 0]
    assert simulated(values, 0.5, 2, 6, 1, "relative").int().tolist()[1] == [0, 0, 0, 1, 0, 1, 0]


def test_the_middle_is_the_longest_plateau_and_all_layers_where_they_are_alike() -> None:
    mean = torch.tensor([0.2, 0.9, 0.3, 0.9, 0.8, 0.95, 0.1])
    noise = 0.01 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert middle(mean + noise) == (3, 5)
    assert middle(0.5 + noise) == (0, 6)
    assert middle(mean[None]) == (3, 5), "one token has no spread"


def test_the_probe_s_toggle_skips_about_what_it_promised_on_the_organism() -> None:
    subject = Subject.organism()
    texts = [" ".join([requests.prompt(verb, "lamp")] * 8) for verb in ("paint", "smash")]
    probe = FFNSaturation(warmup=4)
    result = probe.run(subject, texts)
    assert set(result.table()["region"]) == {"middle", "cold"} and "turn the residual stream least" in result.finding
    toggle = probe.toggle(result, 0.25)  # type: ignore[arg-type]
    with subject.under(toggle):
        subject.nll(texts)
        seen = facts(subject)
    share = sum(seen["skipped"].values()) / sum(seen["tokens"].values())
    assert abs(share - 0.25) < 0.1  # a skipped block changes what the next ones get
    static = probe.toggle(result, 2 / 6, static=True)  # type: ignore[arg-type]
    assert len(static.static) == 2 and set(static.static) <= set(range(toggle.first, (toggle.last or 0) + 1))
    with pytest.raises(ValueError, match="come no nearer"):
        probe.toggle(result, 0.9)  # type: ignore[arg-type]


def test_the_probe_refuses_texts_that_end_within_the_warm_up() -> None:
    subject = Subject.tiny()
    with pytest.raises(ValueError, match="the warm-up of 16"):
        FFNSaturation().run(subject, [[5, 6, 7]])
    with pytest.raises(ValueError, match="no texts"):
        FFNSaturation().run(subject, [])
    result = FFNSaturation(warmup=2, rest=1).run(subject, [[5, 6, 7, 8]])  # one token behind the warm-up
    assert len(result.table()) == 3
    for row in (1, -1):
        with pytest.raises(ValueError, match=f"got row={row}, expected 0 to 0"):
            result.plot(show="map", row=row)


def test_a_chunked_reading_of_the_texts_measures_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.probes import ffn_saturation

    subject, texts = Subject.tiny(), [list(range(5, 25)), list(range(30, 45)), list(range(9, 27))]
    whole = FFNSaturation(warmup=2, rest=1).run(subject, texts)
    monkeypatch.setattr(ffn_saturation, "HELD_NUMBERS", 1)
    chunked = FFNSaturation(warmup=2, rest=1).run(subject, texts)
    for name in ("text", "position"):
        assert np.array_equal(vars(whole)[name], vars(chunked)[name])
    np.testing.assert_allclose(vars(whole)["cosine"], vars(chunked)["cosine"], atol=1e-6)  # fp32, other batches
