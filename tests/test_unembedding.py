"""The unembedding: found and proved on every family, its norm measured, its streaming top-k equal to the dense one."""

from __future__ import annotations

import pytest
import torch

from workbench import Site, Subject
from workbench.organism.tiny import FAMILIES
from workbench.unembedding import Unembedding, norm_weight, top_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_reads_out_as_the_models_own_logits(family: str) -> None:
    subject = Subject.tiny(family, verify=False)
    text = next(iter(subject.tokenizer.get_vocab()))
    captured = subject.capture([text], [Site(subject.n_layers - 1, "resid_out")], progress=False)
    _, _, logprobs = next(iter(subject.predictions([text])))
    read = Unembedding.of(subject).logits(captured[Site(subject.n_layers - 1, "resid_out")]).log_softmax(-1)
    torch.testing.assert_close(read, logprobs, rtol=0, atol=1e-5)  # measured 0.0 to 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_weight_is_measured_whatever_its_class_calls_it(family: str) -> None:
    made = Unembedding.of(Subject.tiny(family, verify=False))
    assert made.norm is not None
    own = next(made.norm.parameters()).detach()
    with torch.no_grad():
        own.copy_(torch.linspace(0.5, 2.0, len(own)))
    expected = own + 1 if family.startswith("gemma") else own
    torch.testing.assert_close(made.norm_weight, expected, rtol=2e-5, atol=0)  # the norm's own epsilon, 1e-5


def test_an_odd_width_has_its_norm_measured_too() -> None:
    for width in (3, 5, 7):
        norm = torch.nn.LayerNorm(width)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2.0, width))
            norm.bias.fill_(3.0)
        torch.testing.assert_close(norm_weight(norm, torch.ones(width)), norm.weight.detach(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_streaming_finds_the_dense_top_tokens_and_gives_ties_to_the_smaller_id(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (100, 4), generator=generator).float()
    vectors = torch.randint(-2, 3, (20, 4), generator=generator).float()
    allowed = torch.rand(100, generator=generator) > 0.2
    scores, ids = top_tokens(vectors, rows, 9, allowed=allowed, chunk=chunk)
    dense = (vectors @ rows.T).masked_fill(~allowed, -torch.inf)
    order = dense.sort(dim=1, descending=True, stable=True).indices[:, :9]
    assert torch.equal(ids, order) and torch.equal(scores, dense.gather(1, order))


@pytest.mark.parametrize("at_once", [3, 2048])
def test_the_negated_vectors_have_their_own_top_tokens_from_the_same_products(at_once: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-2, 3, (100, 4), generator=generator).float()
    vectors = torch.cat([torch.randint(-2, 3, (20, 4), generator=generator).float(), torch.zeros(1, 4)])
    allowed = torch.rand(100, generator=generator) > 0.2
    both = top_tokens(vectors, rows, 9, allowed=allowed, negated=True, chunk=30, at_once=at_once)
    for sign, own in ((0, vectors), (1, -vectors)):
        scores, ids = top_tokens(own, rows, 9, allowed=allowed)
        assert torch.equal(both[1][sign], ids) and torch.equal(both[0][sign], scores)
    assert ids[-1].tolist() == allowed.nonzero()[:9, 0].tolist(), "all products of a zero vector tie"


def test_real_numbers_have_the_dense_top_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, vectors = torch.randn(3000, 48, generator=generator), torch.randn(50, 48, generator=generator)
    scores, ids = top_tokens(vectors, rows, 20, chunk=700, at_once=16)
    dense = (vectors.double() @ rows.double().T).topk(20, dim=1)
    assert torch.equal(ids, dense.indices)
    torch.testing.assert_close(scores.double(), dense.values, rtol=1e-5, atol=1e-5)  # float32 sums of 48 products


def test_more_tokens_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to the number of tokens"):
        top_tokens(torch.zeros(1, 4), torch.zeros(5, 4), 6)
    with pytest.raises(ValueError, match="got k=4, expected 1 to the number of tokens, 3"):
        top_tokens(torch.zeros(1, 4), torch.zeros(5, 4), 4, allowed=torch.tensor([True, False, True, False, True]))


def test_rows_without_a_token_and_special_tokens_are_no_words() -> None:
    made = Unembedding.of(Subject.organism())
    special = made.subject.tokenizer.all_special_ids
    assert not made.is_token[special].any() and int(made.is_token.sum()) == len(made.is_token) - len(special)
    assert made.words([int(made.is_token.nonzero()[0])])[0].strip()


def test_a_model_whose_read_out_is_not_its_logits_is_refused() -> None:
    subject = Subject.tiny("llama", verify=False)
    handle = subject.model.register_forward_hook(lambda _, args, out: setattr(out, "logits", out.logits * 2) or out)
    try:
        with pytest.raises(ValueError, match="would be of another model"):
            Unembedding.of(subject)
    finally:
        handle.remove()
