"""Any text becomes tokens or is refused; directions keep their algebra; the same throw is the same token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import subject_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from workbench import Dice, Direction, Site, random_direction
from workbench.dice import SAMPLERS, uniform
from workbench.tokens import batches, left_pad, tokenize

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ODD = ["", " ", "\n\n", "\u200b", "🧑‍🚀", "é", "e\u0301", "ﬁ", "İ", "\U0001f1e9\U0001f1ea", "a\x00b", "漢字", "\ufeffa",
       "\u202eabc",
       "x" * 10_000, "🧑‍🚀" * 2_000, "<s></s>", "<unk>", "[PAD]"]  # fmt: skip
SURROGATES = ["\ud800", "a\udfff b", "\ud83d"]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer that knows every byte, as GPT-2's does, made here: nothing is fetched."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@given(UNICODE | st.sampled_from(ODD))
def test_every_text_comes_back_and_every_token_knows_its_characters(byte_level: Any, text: str) -> None:
    if not text:
        with pytest.raises(ValueError, match="text 0 is empty"):
            tokenize(byte_level, [text])
        return
    made = tokenize(byte_level, [text])
    assert byte_level.decode(made.ids[0]) == text
    spans = made.offsets[0]
    assert all(0 <= low <= high <= len(text) for low, high in spans)
    assert sorted({at for low, high in spans for at in range(low, high)}) == list(range(len(text)))


@pytest.mark.parametrize("text", SURROGATES)
def test_half_a_character_is_refused_in_words(byte_level: Any, text: str) -> None:
    for tokenizer in (byte_level, subject_of("llama").tokenizer):
        with pytest.raises(ValueError, match=r"texts: .*expected"):
            tokenize(tokenizer, [text])


@given(UNICODE | st.sampled_from(ODD))
def test_a_tokenizer_of_words_takes_its_own_and_names_the_others(text: str) -> None:
    try:
        made = tokenize(subject_of("llama").tokenizer, [text])
    except ValueError as error:
        assert "texts: " in str(error) and "expected" in str(error)
    else:
        assert made.lengths[0] >= 1


@given(st.none() | st.integers() | st.lists(st.integers() | st.floats() | st.text(max_size=2) | st.none(), max_size=4))
def test_what_is_no_text_is_token_ids_or_refused_in_words(text: Any) -> None:
    subject = subject_of("llama")
    try:
        ids = subject.tokenize([text]).ids[0]
    except ValueError as error:
        assert "texts: " in str(error) and "expected" in str(error)
    else:
        assert ids == text and all(0 <= token < subject.anatomy.vocab for token in ids)


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 60), st.booleans())
def test_batches_hold_every_text_once_within_the_limit(lengths: list[int], limit: int, even: bool) -> None:
    made = list(batches(lengths, limit, even=even))
    assert sorted(row for rows in made for row in rows) == list(range(len(lengths)))
    for rows in made:
        widest = max(lengths[row] for row in rows)
        assert len(rows) == 1 or len(rows) * widest <= limit
        assert not even or {lengths[row] for row in rows} == {widest}


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5))
def test_padding_hides_nothing_and_counts_for_nothing(ids: list[list[int]]) -> None:
    batch = left_pad(ids, list(range(len(ids))), pad=0, device=torch.device("cpu"))
    for row, text in enumerate(ids):
        assert batch.ids[row][batch.mask[row]].tolist() == text
        assert batch.positions[row][batch.mask[row]].tolist() == list(range(len(text)))


def test_another_family_of_tokenizers_without_offsets_reads_any_text_too() -> None:
    tokenizer = ByT5Tokenizer()
    for text in ODD[1:10]:
        made = tokenize(tokenizer, [text])
        assert made.lengths[0] == len(text.encode()) + 1 and set(made.offsets[0]) == {(0, 0)}


# Directions

VECTORS = hnp.arrays(np.float32, 6, elements=st.floats(-1e3, 1e3, width=32))
SITE = Site(1, "resid_out")


def direction(vector: np.ndarray) -> Direction:
    return Direction(torch.from_numpy(vector.copy()), SITE, "model", "d", "this - that", "texts")


@given(VECTORS, VECTORS, st.floats(-10, 10))
def test_directions_keep_the_algebra_of_vectors(a: np.ndarray, b: np.ndarray, k: float) -> None:
    x, y = direction(a), direction(b)
    near = {"rtol": 1e-5, "atol": 1e-2}  # float32 of numbers up to 1e4
    torch.testing.assert_close((x + y).vector, (y + x).vector)
    torch.testing.assert_close(((x + y) * k).vector, (x * k + y * k).vector, **near)
    torch.testing.assert_close((x - x).vector, torch.zeros(6))
    assert torch.equal((-x).vector, -(x.vector)) and torch.equal((k * x).vector, (x * k).vector)
    assert (x + y).site == SITE and (x * k).model == "model"
    assert (x * k).norm == pytest.approx(abs(k) * x.norm, rel=1e-5, abs=1e-2)


@given(VECTORS, VECTORS)
def test_a_cosine_is_a_cosine(a: np.ndarray, b: np.ndarray) -> None:
    x, y = direction(a), direction(b)
    assume(x.norm > 1e-3 and y.norm > 1e-3)
    assert -1 - 1e-9 <= x.cosine(y) <= 1 + 1e-9 and x.cosine(y) == pytest.approx(y.cosine(x))
    assert x.cosine(-y) == pytest.approx(-x.cosine(y)) and x.cosine(x) == pytest.approx(1)
    assert x.unit().norm == pytest.approx(1, rel=1e-5) and x.unit().cosine(x) == pytest.approx(1)


@settings(max_examples=20)
@given(VECTORS, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(0, 2**31))
def test_a_direction_survives_its_file_to_the_bit(tmp_path: Any, a: np.ndarray, name: str, seed: int) -> None:
    one = Direction(torch.from_numpy(a.copy()), SITE, "model", name, name, name)
    again = Direction.load(one.save(tmp_path / "d.safetensors", overwrite=True))
    assert again == one and hash(again) == hash(one) and again.vector.numpy().tobytes() == one.vector.numpy().tobytes()
    assert random_direction(one, seed).norm == pytest.approx(one.norm, rel=1e-5)


NO_VECTORS = hnp.arrays(np.float64, hnp.array_shapes(min_dims=0, min_side=0), elements=st.floats())


@given(st.none() | st.text(max_size=3) | NO_VECTORS | st.lists(st.none() | st.floats(), max_size=3))
def test_what_is_no_vector_of_numbers_is_refused_in_words(given_: Any) -> None:
    try:
        made = Direction(given_)
    except ValueError as error:
        assert "Direction: " in str(error) and "expected" in str(error)
    else:
        assert made.vector.dim() == 1 and torch.isfinite(made.vector).all()


# Dice

LOGITS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.floats(-20, 20, width=32))
DICE = st.builds(
    lambda sampler, seed, temperature, k, p: Dice(
        seed, sampler, temperature, k if sampler == "top_k" else None, p if sampler == "top_p" else None
    ),
    st.sampled_from(SAMPLERS), st.integers(0, 2**70), st.floats(0.1, 5), st.integers(1, 20), st.floats(0.01, 1),
)  # fmt: skip


@given(LOGITS, DICE, st.data())
def test_the_same_throw_is_the_same_token_in_any_batch(logits: np.ndarray, dice: Dice, data: Any) -> None:
    scores = torch.from_numpy(logits.copy())
    rows = data.draw(st.lists(st.integers(0, 2**40), min_size=len(scores), max_size=len(scores)))
    at = torch.tensor(data.draw(st.lists(st.integers(0, 10**6), min_size=len(scores), max_size=len(scores))))
    together = dice.choose(scores, rows, at)
    alone = torch.cat([dice.choose(scores[n : n + 1], rows[n : n + 1], at[n : n + 1]) for n in range(len(scores))])
    assert torch.equal(together, alone) and torch.equal(together, dice.choose(scores, rows, at))
    assert (dice.log_probs(scores).gather(1, together[:, None]) > -torch.inf).all(), "never a token that was cut off"


@given(LOGITS, DICE)
def test_what_the_dice_sample_from_sums_to_1(logits: np.ndarray, dice: Dice) -> None:
    total = dice.log_probs(torch.from_numpy(logits.copy())).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**60), st.integers(0, 2**60), st.integers(-1, 2**40))
def test_a_uniform_number_is_never_0_or_1(seed: int, row: int, position: int, token: int) -> None:
    number = float(uniform(seed, torch.tensor([row]), torch.tensor([position]), torch.tensor([token]))[0, 0])
    assert 0 < number < 1
