"""Laws of places, captures and generation, on every family."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from families import FAMILIES, subject_of, texts

from workbench import Site, Subject
from workbench.discovery import find_anatomy
from workbench.loading import small_copy
from workbench.remote import capture_by_trace
from workbench.site import KINDS
from workbench.toggles import Clamp, Steer

every_family = pytest.mark.parametrize("family", FAMILIES)


def all_sites(subject: Subject) -> list[Site]:
    return [Site(layer, kind) for layer, places in enumerate(subject.anatomy.places) for kind in places]


@every_family
def test_the_card_passes_and_prints_every_kind(family: str) -> None:
    card = subject_of(family).card
    assert len(card.checks) >= 9 and all(check.passed for check in card.checks)
    assert all(kind in str(card) for kind in KINDS)


@every_family
def test_residuals_are_conserved_and_chained_in_captures(family: str) -> None:
    subject = subject_of(family)
    capture = subject.capture(texts(), all_sites(subject))
    for layer in range(subject.n_layers):
        parts = [capture[Site(layer, kind)] for kind in ("resid_in", "attn_out", "mlp_out")]
        torch.testing.assert_close(sum(parts), capture[Site(layer, "resid_out")], rtol=1e-4, atol=1e-5)  # fp32 sums
        if layer:
            assert torch.equal(capture[Site(layer - 1, "resid_out")], capture[Site(layer, "resid_in")])


@every_family
def test_heads_and_neurons_make_what_attention_and_mlp_write(family: str) -> None:
    subject = subject_of(family)
    if family == "gemma2":  # its writes pass a norm first; conservation covers them
        pytest.skip("gemma2 normalises what the projections write")
    capture = subject.capture(texts(), all_sites(subject))
    kinds = (("heads", "attn_out"), ("neurons", "mlp_out"))
    for source, written in kinds:
        site = Site(1, source)
        if source not in subject.anatomy.places[1]:
            continue
        projection = subject.anatomy.module(subject.model, site)
        with torch.no_grad():
            made = projection(capture[site].flatten(1))
        torch.testing.assert_close(made, capture[Site(1, written)], rtol=1e-4, atol=1e-5)


@every_family
def test_a_missing_place_is_an_error_that_names_it(family: str) -> None:
    subject = subject_of(family)
    lacking = {
        "gpt2": "gate",
        "gpt_neox": "gate",
        "phi": "gate",
        "opt": "gate",
        "falcon": "gate",
        "mixtral": "neurons",
    }
    if family not in lacking:
        assert set(subject.anatomy.places[0]) == set(KINDS)
        return
    site = Site(0, lacking[family])
    with pytest.raises(ValueError, match=f"{site}: this model has no such place: .*"):
        subject.capture(texts(), [site])
    with pytest.raises(ValueError, match=f"{site}"), subject.under(Clamp({site: [0]})):
        pass


@every_family
def test_capture_equals_an_nnsight_trace_and_its_simulated_remote_call(family: str) -> None:
    subject = subject_of(family)
    sites = all_sites(subject)
    for selection in ("all", "last", "mean"):
        ours = subject.capture(texts(), sites, tokens=selection)
        for remote in (False, "local"):
            made = subject.tokenize(texts())
            theirs = capture_by_trace(subject, made, sites, selection, batch=4096, remote=remote)
            for site in sites:
                torch.testing.assert_close(
                    theirs[site], ours[site], rtol=1e-5, atol=1e-6
                )  # sums of means differ in order
                if selection != "mean":
                    assert torch.equal(theirs[site], ours[site])


@every_family
def test_a_text_alone_equals_the_same_text_in_a_padded_batch(family: str) -> None:
    subject = subject_of(family)
    sites = all_sites(subject)
    for selection in ("all", "last", "mean"):
        together = subject.capture(texts(), sites, tokens=selection)
        for index, text in enumerate(texts()):
            alone = subject.capture([text], sites, tokens=selection)
            for site in sites:
                torch.testing.assert_close(together.of_text(index)[site], alone[site], rtol=1e-4, atol=1e-5)  # fp32


@every_family
def test_batch_size_changes_nothing_but_rounding(family: str) -> None:
    subject = subject_of(family)
    sites = all_sites(subject)
    one, many = (subject.capture(texts() * 3, sites, batch=size) for size in (1, 10_000))
    assert torch.equal(one.text, many.text) and torch.equal(one.ids, many.ids)
    for site in sites:
        torch.testing.assert_close(one[site], many[site], rtol=1e-4, atol=1e-5)


@every_family
def test_what_is_added_at_a_site_is_seen_at_that_same_site(family: str) -> None:
    subject = subject_of(family)
    for kind in ("resid_in", "attn_out", "mlp_out", "resid_out"):
        site = Site(1, kind)
        push = torch.linspace(-1, 1, subject.anatomy.d_model)
        plain = subject.capture(texts(), [site])[site]
        with subject.under(Steer(push, site)):
            edited = subject.capture(texts(), [site])[site]
        torch.testing.assert_close(edited - plain, push.expand_as(plain), rtol=0, atol=2e-6)


@every_family
def test_greedy_generation_equals_transformers_alone_and_in_a_batch(family: str) -> None:
    subject = subject_of(family)
    ours = subject.generate(texts(), max_new_tokens=8)
    uncached = subject.generate(texts(), max_new_tokens=8, use_cache=False)
    assert ours.ids == uncached.ids
    for index, text in enumerate(texts()):
        made = subject.tokenizer([text], return_tensors="pt")
        theirs = subject.model.generate(
            made["input_ids"], attention_mask=made["attention_mask"], max_new_tokens=8, do_sample=False
        )
        assert ours.ids[index] == tuple(theirs[0, made["input_ids"].shape[1] :].tolist())
        assert subject.generate([text], max_new_tokens=8).ids[0] == ours.ids[index]


@every_family
def test_nll_equals_the_loss_that_transformers_computes(family: str) -> None:
    subject = subject_of(family)
    ours = subject.nll(texts())
    for index, text in enumerate(texts()):
        ids = subject.tokenizer([text], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = subject.model(input_ids=ids, labels=ids).loss
        assert float(ours[index]) == pytest.approx(float(loss), rel=1e-4)  # fp32, padded against alone


@every_family
def test_the_places_of_a_remote_model_are_those_of_the_same_model_here(family: str) -> None:
    subject = subject_of(family)
    assert find_anatomy(small_copy(subject.model)).places == subject.anatomy.places


def test_taps_leave_no_hooks_behind() -> None:
    subject = subject_of("llama")
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in subject.model.named_modules()}
    with ExitStack() as undo:
        subject.edit(Site(0, "neurons"), lambda value, step: value, undo)
    subject.capture(texts(), all_sites(subject))
    after = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in subject.model.named_modules()}
    assert before == after and sum(after.values()) == 0
