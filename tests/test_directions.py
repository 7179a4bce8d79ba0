"""Directions: where they come from, their algebra, how they are kept, and what removing one equals."""

from __future__ import annotations

import copy
import math
from functools import reduce
from operator import or_
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import Direction, ProjectOut, Site, Steer, Subject, difference_in_means
from workbench.directions import position_means
from workbench.methods.steering.pairs import (
    contrastive_pairs,
    first_component,
    pair_differences,
    principal_direction,
    single_pair,
    single_pair_by_position,
)
from workbench.organism.tiny import tiny_pair

SITE = Site(1, "resid_out")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@pytest.fixture(scope="module")
def words(subject: Subject) -> list[str]:
    return sorted(word for word in subject.tokenizer.get_vocab() if word.isalpha())


@pytest.fixture(scope="module")
def texts(words: list[str]) -> tuple[list[str], list[str]]:
    """Two groups of texts of unequal lengths."""
    return [" ".join(words[k : k + 4 + k % 3]) for k in range(7)], [" ".join(words[k : k + 5]) for k in range(30, 40)]


# --- difference in means


def test_a_position_counts_from_either_end(subject: Subject, texts: tuple[list[str], list[str]]) -> None:
    capture = subject.capture(texts[0], [SITE])
    lengths = [int((capture.text == k).sum()) for k in range(len(texts[0]))]
    for position in (0, 2, -1, -3):
        places = [position if position >= 0 else n + position for n in lengths]
        rows = [capture.of_text(k)[SITE][place] for k, place in enumerate(places)]
        expected = torch.stack(rows).double().mean(0)
        torch.testing.assert_close(position_means(subject, texts[0], [SITE], [position])[SITE][0], expected)
    last = difference_in_means(subject, *texts, SITE)
    assert torch.equal(difference_in_means(subject, *texts, SITE, tokens=-1).vector, last.vector)


def test_masks_choose_tokens_and_every_text_counts_alike(subject: Subject, texts: tuple[list[str], list[str]]) -> None:
    masks = [[[place % 2 == 1 for place in range(n)] for n in subject.tokenize(group).lengths] for group in texts]
    found = difference_in_means(subject, *texts, SITE, tokens=(masks[0], masks[1]))
    means = []
    for group, marks in zip(texts, masks, strict=True):
        capture = subject.capture(group, [SITE])
        own = [capture.of_text(k)[SITE][torch.tensor(mark)].double().mean(0) for k, mark in enumerate(marks)]
        means.append(torch.stack(own).mean(0))
    torch.testing.assert_close(found.vector, (means[0] - means[1]).float())
    every = [[[True] * n for n in subject.tokenize(group).lengths] for group in texts]
    whole = difference_in_means(subject, *texts, SITE, tokens=(every[0], every[1]))
    torch.testing.assert_close(whole.vector, difference_in_means(subject, *texts, SITE, tokens="mean").vector)


def test_running_sums_are_the_mean_of_all(
    subject: Subject, texts: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [Site(0, "resid_in"), Site(2, "heads")]
    whole = position_means(subject, texts[0], sites, [-1, -2])
    one = difference_in_means(subject, *texts, SITE, tokens="mean")
    monkeypatch.setattr("workbench.directions.AT_ONCE", 3)
    parts = position_means(subject, texts[0], sites, [-1, -2])
    for site in sites:  # other batches: float32 forwards
        torch.testing.assert_close(parts[site], whole[site], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(difference_in_means(subject, *texts, SITE, tokens="mean").vector, one.vector)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (9, "text 0 has 5 tokens, so it has no position 9"),
        (-9, "no position -9"),
        ("first", "got 'first', expected 'last', 'mean', a position"),
        (([[True]], [[True]]), "got 1 masks for 7 texts"),
        (([[True]] * 7,), "got 1 sets of masks"),
    ],
)
def test_tokens_that_are_not_there_are_refused(
    subject: Subject, texts: tuple[list[str], list[str]], tokens: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        difference_in_means(subject, *texts, SITE, tokens=tokens)  # type: ignore[arg-type]


def test_a_mask_without_a_token_and_a_group_without_a_text_are_refused(
    subject: Subject, texts: tuple[list[str], list[str]]
) -> None:
    empty = [[[False] * n for n in subject.tokenize(group).lengths] for group in texts]
    with pytest.raises(ValueError, match="the mask of text 0 marks no token"):
        difference_in_means(subject, *texts, SITE, tokens=(empty[0], empty[1]))
    with pytest.raises(ValueError, match="expected a list of at least one text"):
        difference_in_means(subject, [], texts[1], SITE)
    with pytest.raises(ValueError, match="got 5, expected a list of at least one text"):
        difference_in_means(subject, 5, texts[1], SITE)  # type: ignore[arg-type]


def test_a_text_is_named_by_its_number_among_all(
    subject: Subject, texts: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.directions.AT_ONCE", 3)
    group = [*texts[1][:4], texts[0][0].split()[0]]  # the last one is too short
    with pytest.raises(ValueError, match="text 4 has 2 tokens, so it has no position 4"):
        difference_in_means(subject, group, texts[1], SITE, tokens=4)
    masks = [[place > 2 for place in range(n)] for n in subject.tokenize(group).lengths]
    with pytest.raises(ValueError, match="the mask of text 4 marks no token"):
        difference_in_means(subject, group, group, SITE, tokens=(masks, masks))


# --- pairs


def test_identical_pairs_give_the_single_pair_and_the_mean_is_linear(subject: Subject, words: list[str]) -> None:
    pair = (" ".join(words[:5]), " ".join(words[9:14]))
    one = single_pair(subject, *pair, SITE)
    many = contrastive_pairs(subject, [pair] * 4, SITE)
    torch.testing.assert_close(many.vector, one.vector)
    pairs = [pair, (words[3], " ".join(words[20:23]))]
    difference = difference_in_means(subject, [p for p, _ in pairs], [n for _, n in pairs], SITE)
    torch.testing.assert_close(contrastive_pairs(subject, pairs, SITE).vector, difference.vector)
    torch.testing.assert_close(pair_differences(subject, pairs, SITE).mean(0).float(), difference.vector)


def test_adding_a_pair_at_every_position_turns_one_text_into_the_other(subject: Subject, words: list[str]) -> None:
    """h- + (h+ - h-) = h+, so all that comes after the site is the positive text's."""
    positive, negative = " ".join(words[:5]), " ".join(words[9:14])
    site = Site(1, "resid_in")
    each = single_pair_by_position(subject, positive, negative, site)
    turning = reduce(or_, (Steer(one, site, positions=(position,)) for position, one in enumerate(each)))
    wanted = next(subject.predictions([positive]))[2]
    with subject.under(turning):
        found = next(subject.predictions([negative]))[2]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="got texts of 6 and 4 tokens"):
        single_pair_by_position(subject, positive, " ".join(words[:3]), site)


@pytest.mark.parametrize("seed", range(4))
def test_centring_pair_differences_throws_away_what_they_share(seed: int) -> None:
    """A shift of norm 3 and a nuisance axis of sd 2, 100 pairs in 64 dimensions: the trap and the right answers."""
    generator = torch.Generator().manual_seed(seed)
    shift, nuisance = torch.linalg.qr(torch.randn(64, 2, generator=generator, dtype=torch.float64)).Q.T
    noise = 0.2 * torch.randn(100, 64, generator=generator, dtype=torch.float64)
    values = 3 * shift + 2 * torch.randn(100, 1, generator=generator, dtype=torch.float64) * nuisance + noise
    cosines = [float(first_component(values, centred=centred) @ shift) for centred in (True, False)]
    assert abs(cosines[0]) < 0.2 and cosines[1] > 0.95, cosines
    mean = values.mean(0)
    assert float(mean @ shift / mean.norm()) > 0.98
    assert torch.equal(first_component(-values), -first_component(values)), "the side is that of the mean"


def test_the_principal_direction_has_the_norm_of_the_mean_and_says_when_it_is_a_trap(
    subject: Subject, words: list[str]
) -> None:
    pairs = [(words[k], words[k + 20]) for k in range(6)]
    made, trap = (principal_direction(subject, pairs, SITE, centred=centred) for centred in (False, True))
    mean = contrastive_pairs(subject, pairs, SITE)
    assert made.norm == pytest.approx(mean.norm, rel=1e-5) and made.cosine(mean) > 0
    assert "trap" in trap.name and "trap" not in made.name and trap != made
    with pytest.raises(ValueError, match="nothing once it is centred"):
        principal_direction(subject, pairs[:1], SITE, centred=True)


@pytest.mark.parametrize("pairs", [[], ["ab"], [("a", "b", "c")]])
def test_what_is_no_list_of_pairs_is_refused(subject: Subject, pairs: list) -> None:
    with pytest.raises(ValueError, match="expected \\[\\(positive text, negative text\\)"):
        contrastive_pairs(subject, pairs, SITE)


# --- a value that is kept


def test_algebra_keeps_what_is_known_of_the_parts(subject: Subject, texts: tuple[list[str], list[str]]) -> None:
    one = difference_in_means(subject, *texts, SITE, name="a")
    other = difference_in_means(subject, *texts[::-1], SITE, name="b")
    made = 2 * one - other
    torch.testing.assert_close(made.vector, 3 * one.vector)
    assert made.sign == "2 (mean(towards) - mean(away)) + -1 (mean(towards) - mean(away))"
    assert made.name == "2 a + -1 b" and made.data == f"{one.data} + {other.data}" and one.data != other.data
    assert one.unit().data == one.data and one.cosine(other) == pytest.approx(-1.0)
    assert math.isnan(one.cosine(0 * one)) and one.cosine(one.vector) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expected the same"):
        one.cosine(torch.ones(3))


def test_a_saved_direction_comes_back_to_the_bit_and_is_refused_on_another_model(
    subject: Subject, texts: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    one = difference_in_means(subject, *texts, SITE, name="a → b")
    path = one.save(tmp_path / "deep" / "a.safetensors")
    again = Direction.load(path)
    assert again == one and hash(again) == hash(one) and again.norm == one.norm
    assert path.read_bytes() == one.save(tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(ValueError, match="was found on model"), Subject.tiny(seed=1).under(Steer(again, SITE)):
        pass
    with pytest.raises(FileExistsError, match="is there already"):
        one.save(path)
    bare = Direction(torch.ones(4))
    assert Direction.load(bare.save(path, overwrite=True)) == bare


def test_files_that_hold_no_direction_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    save_file({"vector": torch.ones(4)}, path)
    with pytest.raises(ValueError, match="holds no direction"):
        Direction.load(path)
    Direction(torch.ones(4)).save(path, overwrite=True)
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="not the one that was saved"):
        Direction.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        Direction.load(path)


# --- removing a direction at run time, and in the weights


def rough(family: str) -> Subject:
    """A tiny model whose norms and biases are not the neutral ones of a fresh model."""
    model, tokenizer = tiny_pair(family, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Subject(model, tokenizer, name=f"rough {family}")


@torch.no_grad()
def orthogonalised(subject: Subject, unit: Tensor) -> nn.Module:
    """The reference: a copy whose every write to the residual stream has lost the direction (Arditi et al., eq. 5)."""
    model = copy.deepcopy(subject.model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())  # a tied unembedding reads the stream: it must keep the direction
    for name, module in model.named_modules():
        end = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) or end == "c_proj":  # Conv1D: (in, out)
            module.weight.sub_((module.weight @ unit)[:, None] * unit)
        elif end in ("o_proj", "down_proj"):
            module.weight.sub_(unit[:, None] * (unit @ module.weight))
        if end in ("c_proj", "o_proj", "down_proj") and module.bias is not None:
            module.bias.sub_((module.bias @ unit) * unit)
    return model


@pytest.mark.parametrize(("family", "equal"), [("llama", True), ("gpt2", True), ("gemma2", False)])
def test_removal_at_run_time_is_removal_from_the_weights_unless_a_norm_follows_the_write(
    family: str, equal: bool
) -> None:
    """Gemma-2 scales what attention and MLP write after they wrote it: only the run-time form removes it there."""
    subject = rough(family)
    unit = Direction(torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(2))).unit()
    ids = torch.arange(8, 24).reshape(2, 8)
    with torch.no_grad():
        plain = subject.model(input_ids=ids).logits
        with subject.under(ProjectOut.everywhere(subject, unit)):
            removed = subject.model(input_ids=ids).logits
        reference = orthogonalised(subject, unit.vector)(input_ids=ids).logits
    assert float((removed - plain).abs().max()) > 1e-2, "the direction matters"
    gap = float((removed - reference).abs().max())
    assert gap < 1e-4 if equal else gap > 1e-3, gap  # float32, logits of order 1


# --- receipts


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_receipt_counts_each_text_once_whatever_the_sites_batches_and_steps(
    subject: Subject, texts: tuple[list[str], list[str]], use_cache: bool
) -> None:
    push = Direction(torch.ones(subject.anatomy.d_model))
    toggle = Steer(push, SITE, positions="generated") | ProjectOut.everywhere(subject, push)
    with subject.under(toggle):
        subject.generate(texts[0], max_new_tokens=3, use_cache=use_cache, batch=20)
        assert [receipt.rows for receipt in subject.receipts] == [len(texts[0])] * 2
        subject.nll(texts[1])  # whole texts are all prompt: nothing is generated
        assert [receipt.rows for receipt in subject.receipts] == [len(texts[0]), len(texts[0] + texts[1])]
        assert f"of {len(texts[0])} texts" in str(subject.receipts[0])
        assert subject.receipts[0].to_json()["rows"] == len(texts[0])
