"""Cost: exact where the answer is known, and an allocation meter that counts what it should."""

from __future__ import annotations

import itertools

import pytest
import torch

from workbench import Cost, Site, Steer, Subject
from workbench.cache import cache_bytes
from workbench.memory import AllocationMeter
from workbench.probes.cost import compare
from workbench.toggle import Toggle
from workbench.toggles.evict import EvictKV
from workbench.toggles.quantize import QuantizeKV


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@pytest.fixture(scope="module")
def texts(subject: Subject) -> list[str]:
    words = sorted(word for word in subject.tokenizer.get_vocab() if word.isalpha())
    return [" ".join(words[start : start + 7 + start]) for start in range(6)]


def test_without_a_toggle_nothing_is_lost(subject: Subject, texts: list[str]) -> None:
    table = Cost(repeats=2).run(subject, texts).table().set_index("measure")
    assert table.loc["kl", "value"] == 0 and table.loc["top1_agreement", "value"] == 1
    assert table.loc["perplexity", "ratio"] == 1 and table.loc["cache_bytes", "ratio"] == 1


def test_perplexity_is_that_of_all_tokens_together(subject: Subject, texts: list[str]) -> None:
    result = Cost(repeats=1).run(subject, texts)
    counts = torch.tensor(result.n_tokens)  # type: ignore[attr-defined]
    expected = float(((subject.nll(texts) * counts).sum() / counts.sum()).exp())
    row = result.table().set_index("measure").loc["perplexity"]
    assert row["value"] == pytest.approx(expected, rel=1e-6)
    assert row["low"] <= row["value"] <= row["high"]


def test_texts_of_unequal_length_widen_no_interval_by_themselves(subject: Subject, texts: list[str]) -> None:
    table = Cost(repeats=1).run(subject, texts).table().set_index("measure")
    assert tuple(table.loc["top1_agreement", ["low", "high"]]) == pytest.approx((1.0, 1.0))
    assert tuple(table.loc["kl", ["low", "high"]]) == (0.0, 0.0)


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"new_tokens": 0}])
def test_settings_that_time_nothing_are_refused(subject: Subject, texts: list[str], settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"Cost: got .*=0, expected at least 1"):
        Cost(**settings).run(subject, texts)


def test_the_base_is_the_untoggled_subject_and_the_toggle_acts_again_afterwards(
    subject: Subject, texts: list[str]
) -> None:
    plain = Cost(repeats=1).run(subject, texts).table().set_index("measure")
    push = Steer(torch.linspace(-1, 1, 32), Site(1, "resid_out"), 5.0)
    with subject.under(push):
        table = Cost(repeats=1).run(subject, texts).table().set_index("measure")
        assert subject.active == (push,)
    assert table.loc["nll", "base"] == pytest.approx(plain.loc["nll", "value"])
    assert table.loc["kl", "value"] > 0.01 and table.loc["kl", "low"] > 0
    assert table.loc["top1_agreement", "value"] < 1


def test_divergence_matches_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    base, other = (torch.randn(9, 20, generator=generator).log_softmax(-1) for _ in range(2))
    ids = torch.randint(20, (9,), generator=generator).tolist()
    nll, base_nll, divergence, agreement, count = compare(base, other, ids)
    expected = torch.nn.functional.kl_div(other[:-1], base[:-1], log_target=True, reduction="batchmean")
    assert divergence == pytest.approx(float(expected), rel=1e-5) and count == 8
    assert nll == pytest.approx(float(torch.nn.functional.nll_loss(other[:-1], torch.tensor(ids[1:]))), rel=1e-5)
    assert base_nll == pytest.approx(float(torch.nn.functional.nll_loss(base[:-1], torch.tensor(ids[1:]))), rel=1e-5)
    assert agreement == pytest.approx(float((base[:-1].argmax(-1) == other[:-1].argmax(-1)).double().mean()))


def test_tokens_that_both_sides_rule_out_add_no_divergence() -> None:
    base = torch.tensor([0.0, 1.0, float("-inf")]).log_softmax(-1).expand(3, 3)
    assert compare(base, base, [0, 1, 0])[2] == 0.0
    assert compare(base, torch.tensor([0.0, float("-inf"), 1.0]).log_softmax(-1).expand(3, 3), [0, 0, 0])[2] == float(
        "inf"
    )


def test_cache_bytes_follow_the_formula_and_views_do_not_pass(subject: Subject, texts: list[str]) -> None:
    ids = torch.tensor([subject.tokenize(texts).ids[5]])
    with torch.no_grad():
        cache = subject.model(input_ids=ids, use_cache=True).past_key_values
    shape = subject.anatomy
    assert cache_bytes(cache) == 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * ids.shape[1] * 4
    held = cache_bytes(cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2]
    assert cache_bytes(cache) == held, "a slice keeps the whole storage alive"
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
    assert cache_bytes(cache) == held // ids.shape[1] * 2


def test_the_meter_counts_live_bytes_at_their_peak() -> None:
    with AllocationMeter() as meter:
        one = torch.ones(1000)  # 4,000 bytes
        two = one + 1  # 8,000 live
        view = two[:10]  # nothing new
        del two
        three = view + one[:10]  # 40 more, as the view still holds its storage
        del view, one
        four = torch.ones(500)
    assert meter.peak_bytes == 8040 and meter.live_bytes == 40 + 2000, (meter.peak_bytes, meter.live_bytes)
    assert len(three) + len(four) == 510


def test_no_texts_and_one_token_are_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="got no texts"):
        Cost().run(subject, [])
    with pytest.raises(ValueError, match="got a text of 1 token"):
        Cost().run(subject, [""])
    with pytest.raises(ValueError, match="Ask for fewer"):
        Cost(new_tokens=600).run(subject, ["of"] if "of" in subject.tokenizer.get_vocab() else ["the the"])


@pytest.mark.parametrize(
    ("toggle", "lossy"),
    [
        (EvictKV(12, "streaming", sinks=2, window=4, every=4), True),
        (EvictKV(0.5, "h2o", "adaptive", sinks=2, window=4, every=None), False),  # a text that is read has no prompt
        (QuantizeKV(4, 4, group=4, residual=4, sinks=2), True),
        (QuantizeKV(4, 4), False),  # shorter than its residual: nothing is packed
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*never fired")
def test_under_cache_toggles_the_bytes_are_those_of_prompt_and_continuation(
    subject: Subject, texts: list[str], toggle: Toggle, lossy: bool
) -> None:
    probe = Cost(prompt_tokens=30, new_tokens=10, repeats=1)
    with subject.under(toggle):
        table = probe.run(subject, [" ".join(texts)]).table().set_index("measure")
    base, value = table.loc["cache_bytes", ["base", "value"]]
    per_token = 2 * 3 * 2 * 8 * 4  # keys and values, 3 layers, 2 heads of 8, float32
    assert base == 40 * per_token
    index = 3 * (40 * 2 * 4 + 2 * 3 * 8)  # at most a position per token and head, counts of three parts
    if isinstance(toggle, EvictKV):
        kept = {12: 12 + 2, 0.5: 15 + 10}[
            toggle.keep
        ]  # 12 after 38 tokens and two more; half of the prompt and all after
        scores = 3 * kept * 2 * 4 if toggle.by == "h2o" else 0
        # room for the tokens between two selections, and an eighth of what grows without any
        assert kept * per_token <= value <= (kept + 4) * per_token + scores + index * 2
        assert value < 0.9 * base
    elif toggle.residual < 30:
        assert 0.2 * base < value < 0.9 * base  # units of 8 tokens; steps and minima of groups of 4 weigh 8 bits
    else:
        assert base < value <= 1.2 * base + index  # positions, and room to grow
    assert (table.loc["kl", "value"] > 1e-6) == lossy and table.loc["kl", "base"] == 0
    assert table.loc["peak_bytes", "value"] >= value


def test_the_loss_under_a_cache_toggle_is_that_of_a_text_that_the_model_says_itself(
    subject: Subject, texts: list[str]
) -> None:
    with subject.under(EvictKV(6, "tova", sinks=1, window=2, every=1)):
        result = Cost(repeats=1, prompt_tokens=8, new_tokens=2).run(subject, texts)
        output, total = None, 0.0
        ids = subject.tokenize(texts).ids[5]
        with torch.no_grad():
            for token, following in itertools.pairwise(ids):
                past = None if output is None else output.past_key_values
                output = subject.model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
                total -= float(output.logits[0, -1].double().log_softmax(-1)[following])
    assert result.nll[5] == pytest.approx(total / (len(ids) - 1), rel=1e-5)  # type: ignore[attr-defined]
