"""Under key/value toggles texts are read in pieces: every steering toggle must do the same as on the whole text."""

from __future__ import annotations

import pytest
import torch
from families import subject_of, texts

from workbench.toggle import Toggle
from workbench.toggles import ClusteredSteer, ConditionalSteer, Steer, WeightedSteer
from workbench.toggles.evict import EvictKV

DROPS_NOTHING = EvictKV(10_000, "streaming")
every_steering = pytest.mark.parametrize("cls", [Steer, ConditionalSteer, WeightedSteer, ClusteredSteer])


@every_steering
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.filterwarnings("ignore:EvictKV.*never fired")
def test_steering_acts_the_same_on_a_text_that_is_read_in_pieces(cls: type[Toggle], family: str) -> None:
    subject = subject_of(family)
    for toggle in cls.examples(subject):
        with subject.under(toggle):
            whole, written = subject.nll(texts()), subject.generate(texts(), max_new_tokens=4)
        with subject.under(toggle | DROPS_NOTHING):
            pieces = subject.nll(texts())
            assert subject.generate(texts(), max_new_tokens=4).ids == written.ids
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)  # fp32
        with subject.under(toggle | EvictKV(10_000, "streaming", chunk=3)):
            assert subject.generate(texts(), max_new_tokens=4).ids == written.ids


@every_steering
def test_the_prompt_is_read_once_for_each_text_whatever_the_pieces(cls: type[Toggle]) -> None:
    subject = subject_of("llama")
    toggle = cls.examples(subject)[0]
    with pytest.warns(UserWarning, match="never fired"), subject.under(toggle | DROPS_NOTHING):
        subject.nll(texts())
        read = 0 if cls is Steer else len(texts())  # a plain push asks nothing of the prompt
        assert subject.receipts[0].prompts == read and subject.receipts[0].rows == len(texts())
