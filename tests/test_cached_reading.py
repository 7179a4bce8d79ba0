"""Reading a text under a toggle on caches: as it would be generated, with every selection, edit and position rule."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from families import subject_of, texts

from workbench import Site, Subject
from workbench.anatomy import add_tap
from workbench.toggle import Toggle
from workbench.toggles import Clamp, ProjectOut, Steer
from workbench.toggles.evict import EvictKV
from workbench.toggles.quantize import QuantizeKV

IDLE = (EvictKV(500, "streaming"), EvictKV(500, "h2o"), QuantizeKV(4, 4, residual=500))  # drop and pack nothing here
ACTING = (EvictKV(4, "h2o", "adaptive", sinks=1, window=2, every=1), QuantizeKV(4, 2, group=3, residual=0, sinks=1))
FP32 = {"rtol": 1e-4, "atol": 2e-5}  # one token at a time sums in another order
SITES = [Site(0, "resid_in"), Site(1, "heads"), Site(1, "attn_out"), Site(2, "resid_out")]

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired")


def masks() -> list[list[bool]]:
    lengths = subject_of("llama").tokenize(texts()).lengths
    return [[position % 3 == 1 for position in range(length)] for length in lengths]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("idle", IDLE, ids=["streaming", "h2o", "quantise"])
def test_a_cache_toggle_that_drops_nothing_changes_no_reading(idle: Toggle, family: str) -> None:
    subject = subject_of(family)
    plain = {row: logprobs for row, _, logprobs in subject.predictions(texts())}
    with subject.under(idle):
        for row, ids, logprobs in subject.predictions(texts(), batch=20):  # two batches, one of them padded
            assert len(ids) == len(logprobs)
            torch.testing.assert_close(logprobs, plain[row], **FP32)


@pytest.mark.parametrize("selection", ["all", "last", "mean", "masks"])
@pytest.mark.parametrize("batch", [14, 4096])
@pytest.mark.parametrize("piece", [1, 5])
def test_captures_under_it_are_put_together_from_pieces(selection: str, batch: int, piece: int) -> None:
    subject = subject_of("llama")
    tokens: Any = masks() if selection == "masks" else selection
    plain = subject.capture(texts(), SITES, tokens=tokens)
    with subject.under(IDLE[0]):
        before, subject.stages.piece = subject.stages.piece, piece
        try:
            made = subject.capture(texts(), SITES, tokens=tokens, batch=batch)
        finally:
            subject.stages.piece = before
    for site in SITES:
        torch.testing.assert_close(made[site], plain[site], **FP32)
    for name in ("text", "position", "ids", "offsets"):
        assert torch.equal(getattr(made, name), getattr(plain, name))


@pytest.mark.parametrize("rule", ["all", "prompt", "generated", "last", [0, 3]], ids=str)
@pytest.mark.parametrize("on_the_left", [True, False])
def test_edits_hold_their_position_rules_piece_by_piece(rule: Any, on_the_left: bool) -> None:
    subject = subject_of("llama")
    push = Steer(torch.linspace(-1, 1, 32), Site(1, "resid_out"), 3.0, rule)
    both = push | IDLE[0] if on_the_left else IDLE[0] | push
    with subject.under(push):
        plain, nll = subject.capture(texts(), SITES), subject.nll(texts())
        acted = subject.receipts[0].tokens
    with subject.under(both):
        made, same = subject.capture(texts(), SITES), subject.nll(texts())
        assert subject.receipts[0 if on_the_left else 1].tokens == acted
    torch.testing.assert_close(same, nll, rtol=1e-4, atol=1e-5)  # fp32
    for site in SITES:
        torch.testing.assert_close(made[site], plain[site], **FP32)


def test_other_edits_go_with_it_too() -> None:
    subject, site = subject_of("llama"), Site(1, "resid_out")
    for edit in (ProjectOut(torch.linspace(-1, 1, 32), (site,)), Clamp({Site(1, "neurons"): [2, 5]})):
        with subject.under(edit):
            plain = subject.nll(texts())
        with subject.under(edit | IDLE[1]):
            torch.testing.assert_close(subject.nll(texts()), plain, rtol=1e-4, atol=1e-5)  # fp32


@pytest.mark.parametrize("acting", ACTING, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_text_is_read_as_bare_forwards_of_one_token_would_read_it(acting: Toggle, family: str) -> None:
    subject, site = subject_of(family), Site(2, "resid_out")
    longer = [ids * 2 for ids in subject.tokenize(texts()).ids]
    seen: list[torch.Tensor] = []
    with subject.under(acting):
        made = subject.capture(longer, [site])
        for index, ids in enumerate(longer):
            seen.clear()
            with ExitStack() as undo, torch.no_grad():
                add_tap(subject.model, subject.anatomy, site, lambda value: seen.append(value[0].clone()), undo)
                cache = None
                for token in ids:
                    output = subject.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                    cache = output.past_key_values
            torch.testing.assert_close(made[site][made.text == index], torch.cat(seen), **FP32)


@pytest.mark.parametrize("acting", ACTING, ids=str)
def test_it_does_change_what_is_read(acting: Toggle) -> None:
    subject = subject_of("llama")
    ids = [one * 3 for one in subject.tokenize(texts()).ids]
    plain = subject.nll(ids)
    with subject.under(acting):
        assert float((subject.nll(ids) - plain).abs().max()) > 1e-3


def test_a_long_text_is_read_in_the_memory_of_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.cache.layer import KVLayer

    subject, lengths = subject_of("llama"), []
    original = KVLayer.attend

    def attend(self: KVLayer, *args: Any) -> torch.Tensor:
        out = original(self, *args)
        lengths.append(max(len(part) for part in self.parts))
        return out

    monkeypatch.setattr(KVLayer, "attend", attend)
    text = (subject.tokenize(texts()).ids[0] * 30)[:300]
    with subject.under(EvictKV(16, "streaming", sinks=2, window=4, every=4)):
        assert torch.isfinite(subject.nll([text])).all()
    assert max(lengths) <= 2 * 16 and len(lengths) == 3 * 300  # all heads' segments of one layer


def test_bad_texts_are_refused_as_ever() -> None:
    subject = subject_of("llama")
    with subject.under(ACTING[0]):
        for bad, words in (([], "empty list"), ([[]], "text 0 is empty"), ("a text", "got one string")):
            with pytest.raises(ValueError, match=words):
                subject.capture(bad, SITES)
        with pytest.raises(ValueError, match="has 513 tokens, but the model's context is 512"):
            subject.nll([[9] * 513])
        with pytest.raises(ValueError, match="expected at least two"):
            subject.nll([[9]])
        with pytest.raises(ValueError, match="masks of lengths"):
            subject.capture([[9, 8]], SITES, tokens=[[True]])
        assert torch.isfinite(subject.nll(texts())).all(), "a refusal leaves nothing behind"


def test_a_trace_of_a_remote_model_is_refused_in_words() -> None:
    near = subject_of("llama")
    far = Subject(near.model, near.tokenizer, name="far", verify=False, remote="local")
    with far.under(ACTING[0]), pytest.raises(ValueError, match="can only act on a local model"):
        far.capture(texts(), SITES)


def test_generation_without_a_cache_contradicts_itself() -> None:
    subject = subject_of("llama")
    with subject.under(ACTING[1]), pytest.raises(ValueError, match="use_cache=False, but QuantizeKV"):
        subject.generate(texts(), max_new_tokens=2, use_cache=False)
