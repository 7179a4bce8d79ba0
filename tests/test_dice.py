"""Dice: the same throw everywhere, the right distribution, the closed forms of what a changed distribution keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

import workbench.dice
from workbench import Subject
from workbench.dice import Dice, gumbel, uniform

EVERY = (
    Dice(3),
    Dice(3, "top_k", 0.8, top_k=5),
    Dice(3, "top_p", 1.2, top_p=0.7),
    Dice(3, "rank"),
    Dice(3, "inverse_cdf"),
)
each_dice = pytest.mark.parametrize("dice", EVERY, ids=lambda dice: dice.sampler)


def reference(seed: int, row: int, position: int, token: int) -> float:
    """One uniform number in plain Python integers."""
    state = 0
    for counter in (seed, row, position, token):
        z = (state + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        state = z ^ (z >> 31)
    return ((state >> 12) + 0.5) / 2**52


def logits_of(n: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 2.0 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


# The noise


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
def test_a_throw_is_the_hash_written_in_plain_integers(seed):
    rows, positions, ids = [0, 1, 10**12], [0, 7, 511], [-1, 0, 5, 128_255]
    found = uniform(seed, torch.tensor(rows), torch.tensor(positions), torch.tensor(ids))
    expected = [[reference(seed, r, p, i) for i in ids] for r, p in zip(rows, positions, strict=True)]
    assert found.tolist() == expected


def test_a_seed_of_numpy_is_the_same_seed():
    rows, positions = torch.arange(3), torch.arange(3)
    for seed in (np.int64(7), np.uint8(7)):
        assert torch.equal(uniform(seed, rows, positions, rows), uniform(7, rows, positions, rows))


def test_the_stream_is_splitmix64():
    """Against its published first outputs from state 0."""
    words = workbench.dice._draw(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert [word % 2**64 for word in words.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_noise_depends_on_seed_row_position_and_id_and_on_nothing_else():
    rows, positions = torch.tensor([4, 9, 4]), torch.tensor([0, 3, 8])
    wide = gumbel(5, rows, positions, torch.arange(1000))
    assert torch.equal(wide[:, :321], gumbel(5, rows, positions, torch.arange(321)))
    assert torch.equal(wide[1:2], gumbel(5, rows[1:2], positions[1:2], torch.arange(1000)))
    some = torch.tensor([[7, 900], [1, 2], [999, 0]])
    assert torch.equal(wide.gather(1, some), gumbel(5, rows, positions, some))
    for other in (gumbel(6, rows, positions, torch.arange(1000)), gumbel(5, rows + 1, positions, torch.arange(1000))):
        assert not torch.isclose(wide, other).any()
    assert not torch.isclose(wide, gumbel(5, rows, positions + 1, torch.arange(1000))).any()


def test_uniforms_are_uniform_and_never_0_or_1():
    u = uniform(0, torch.arange(500), torch.arange(500) % 7, torch.arange(1000)).numpy()
    assert u.min() > 0 and u.max() < 1 and kstest(u.ravel(), "uniform").pvalue > 1e-3
    neighbours = [(u[1:], u[:-1]), (u[:, 1:], u[:, :-1])]  # of rows and of ids
    assert max(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in neighbours) < 4 / 500_000**0.5  # 4 sd


@pytest.mark.parametrize("word", [0, -1])
def test_the_extreme_words_give_finite_noise(word, monkeypatch):
    monkeypatch.setattr(workbench.dice, "_draw", lambda state, counter: torch.full((1,), word))
    u = uniform(0, torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert 0 < float(u) < 1, "with 53 bits the largest word would round to 1, whose noise is infinite"
    assert gumbel(0, torch.tensor([0]), torch.tensor([0]), torch.tensor([0])).isfinite().all()


def test_noise_has_the_moments_of_gumbels_law():
    noise = gumbel(1, torch.arange(1000), torch.zeros(1000, dtype=torch.int64), torch.arange(1000))
    assert float(noise.mean()) == pytest.approx(0.577216, abs=4 * 1.2825 / 1000)  # 4 sd of the mean of a million
    assert float(noise.var()) == pytest.approx(np.pi**2 / 6, abs=4 * 2.98 / 1000)  # kurtosis 5.4


# The choice


@each_dice
def test_the_choice_follows_the_truncated_distribution(dice):
    logits, n = logits_of(1, 12)[0], 40_000
    drawn = dice.choose(logits.expand(n, -1), range(n), torch.full((n,), 9))
    expected = dice.log_probs(logits).exp().numpy()
    counts = np.bincount(drawn.numpy(), minlength=12)
    assert not counts[expected == 0].any()
    assert chisquare(counts[expected > 0], n * expected[expected > 0]).pvalue > 1e-3


@each_dice
def test_a_row_chooses_the_same_in_any_company(dice, monkeypatch):
    logits, rows, positions = logits_of(30, 50), torch.arange(100, 130), torch.arange(30) % 11
    together = dice.choose(logits, rows, positions)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dice.choose(logits[order], rows[order], positions[order]), together[order])
    assert torch.equal(
        torch.cat([dice.choose(logits[k : k + 1], [100 + k], positions[k : k + 1]) for k in range(30)]), together
    )
    monkeypatch.setattr("workbench.dice.AT_ONCE_CPU", 120)
    assert torch.equal(dice.choose(logits, rows, positions), together), "work in parts changes nothing"


def test_tokens_that_the_model_cannot_say_move_no_choice():
    logits, rows, positions = logits_of(40, 50), torch.arange(40), torch.arange(40)
    padded = torch.cat([logits, torch.full((40, 14), -torch.inf)], dim=1)
    for dice in EVERY:
        assert torch.equal(dice.choose(padded, rows, positions), dice.choose(logits, rows, positions)), dice


def test_a_constant_added_to_the_logits_moves_no_choice():
    logits, rows, positions = logits_of(40, 50), torch.arange(40), torch.arange(40)
    for dice in EVERY:
        assert torch.equal(dice.choose(logits + 8.0, rows, positions), dice.choose(logits, rows, positions)), dice


def test_noise_by_rank_knows_ranks_and_noise_by_id_knows_names():
    logits, rows, positions = logits_of(60, 50), torch.arange(60), torch.arange(60)
    renamed = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    by_rank, by_id = (
        (dice.choose(logits, rows, positions), renamed[dice.choose(logits[:, renamed], rows, positions)])
        for dice in (Dice(3, "rank"), Dice(3))
    )
    assert torch.equal(*by_rank) and not torch.equal(*by_id)


def test_truncation_that_keeps_everything_equals_full():
    logits, rows, positions = logits_of(60, 200), torch.arange(60), torch.arange(60)
    full = Dice(1).choose(logits, rows, positions)
    for dice in (Dice(1, "top_k", top_k=200), Dice(1, "top_k", top_k=999), Dice(1, "top_p", top_p=1.0)):
        assert torch.equal(dice.choose(logits, rows, positions), full)
    kept = Dice(1, "top_p", top_p=1 - 1e-12).choose(logits, rows, positions)
    assert torch.equal(kept, full), "noise belongs to the token, so what truncation leaves keeps its noise"


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_without_temperature_every_sampler_is_greedy(temperature):
    logits = logits_of(50, 30)
    for dice in (Dice(0, "full", temperature), Dice(0, "rank", temperature), Dice(0, "top_k", temperature, top_k=3)):
        assert torch.equal(dice.choose(logits, range(50), torch.arange(50)), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_full_sort(top_p):
    logits = torch.cat([logits_of(20, 700), 0.01 * logits_of(20, 700, 1)])  # sharp and flat: few and many tokens
    for row, log_probs in zip(logits, Dice(0, "top_p", top_p=top_p).log_probs(logits), strict=True):
        p, order = row.double().softmax(-1).sort(descending=True)
        size = int((p.cumsum(0) < top_p).sum()) + 1
        assert set(order[:size].tolist()) == set(log_probs.isfinite().nonzero()[:, 0].tolist())
        assert float(log_probs.exp().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("dice", [Dice(0, "top_k", top_k=2), Dice(0, "top_p", top_p=0.5)])
def test_tokens_that_tie_with_the_last_one_are_kept(dice):
    logits = torch.zeros(1, 300).index_fill(1, torch.tensor([4]), 1.0)
    logits[0, 10:] -= 30 * (dice.sampler == "top_p")
    kept = dice.log_probs(logits)[0].isfinite().sum()
    assert kept == (300 if dice.sampler == "top_k" else 10)


def test_half_precision_logits_are_taken_as_they_are():
    logits = logits_of(20, 64).bfloat16()
    assert torch.equal(
        Dice(2).choose(logits, range(20), torch.arange(20)),
        Dice(2).choose(logits.double(), range(20), torch.arange(20)),
    )


@pytest.mark.parametrize(
    ("dice", "message"),
    [
        (Dice(sampler="nucleus"), "got sampler 'nucleus'"),
        (Dice(temperature=-0.5), r"got temperature -0\.5"),
        (Dice(temperature=float("nan")), "got temperature nan"),
        (Dice(temperature=float("inf")), "got temperature inf"),
        (Dice(sampler="top_k"), "got top_k=None with sampler 'top_k', expected a number"),
        (Dice(top_p=0.9), "got top_p=0.9 with sampler 'full', expected None"),
        (Dice(sampler="top_k", top_k=0), "got top_k=0"),
        (Dice(sampler="top_p", top_p=1.5), r"got top_p=1\.5"),
        (Dice(seed=1.5), r"got seed 1\.5, expected a whole number"),
        (Dice(temperature="hot"), "got temperature 'hot'"),
        (Dice(sampler="top_k", top_k=2.5), r"got top_k=2\.5"),
    ],
)
def test_dice_that_make_no_sense_are_refused(dice, message):
    with pytest.raises(ValueError, match=message):
        dice.choose(logits_of(1, 5), [0], torch.tensor([0]))


def test_a_row_and_a_position_for_each_sample_are_asked_for():
    with pytest.raises(ValueError, match="got 2 rows and 1 positions for 1 samples"):
        Dice().choose(logits_of(1, 5), [0, 1], torch.tensor([0]))


# In generation


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@each_dice
def test_the_processor_makes_transformers_choose_the_same(subject, dice):
    prompts, rows = [[5, 6, 7, 8, 9], [10, 11]], [21, 4]
    ours = subject.generate(prompts, max_new_tokens=10, dice=dice, rows=rows)
    padded = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    theirs = subject.model.generate(
        padded,
        attention_mask=(torch.arange(5) >= torch.tensor([[0], [3]])).long(),
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
        logits_processor=[dice.processor(rows, padding=[0, 3])],
    )
    for row, ids in enumerate(ours.ids):
        assert theirs[row, 5 : 5 + len(ids)].tolist() == list(ids)


def test_rows_name_the_throws_and_the_place_in_the_batch_does_not(subject):
    prompts, dice = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7]], Dice(7)
    one = subject.generate(prompts, max_new_tokens=8, dice=dice, rows=[3, 1, 3])
    assert one.ids[0] == one.ids[2]
    assert one.ids[:2] == subject.generate(prompts[:2], max_new_tokens=8, dice=dice, rows=[3, 1], batch=1).ids
    assert one.ids[1] != subject.generate(prompts[1:2], max_new_tokens=8, dice=dice, rows=[2]).ids[0]
    assert (
        subject.generate(prompts, max_new_tokens=8, dice=Dice(4)).ids
        == subject.generate(prompts, max_new_tokens=8, temperature=1.0, seed=4).ids
    )


def test_what_was_generated_can_be_a_prompt_and_goes_on_with_the_same_throws(subject):
    whole = subject.generate([[5, 6, 7]], max_new_tokens=9, dice=Dice(1), rows=[2]).ids[0]
    rest = subject.generate([[5, 6, 7, *whole[:4]]], max_new_tokens=5, dice=Dice(1), rows=[2]).ids[0]
    assert (*whole[:4], *rest) == whole
    moved = subject.generate([[5, 6, 7, *whole[:4]]], max_new_tokens=5, dice=Dice(1), rows=[2], throws_from=[50]).ids[0]
    assert moved != rest


def test_log_probs_are_the_models_own(subject):
    made = subject.generate([[5, 6, 7]], max_new_tokens=6, dice=Dice(1, "top_k", 0.7, top_k=9))
    text = [5, 6, 7, *made.ids[0]]
    log_probs = next(subject.predictions([text]))[2]
    expected = [float(log_probs[at, text[at + 1]]) for at in range(2, len(text) - 1)]
    assert made.log_probs[0] == pytest.approx(expected, abs=1e-4)  # float32, cached against uncached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [1, 2]}, "got 2 rows for 1 prompts"),
        ({"throws_from": []}, "got 0 throws_from for 1 prompts"),
        ({"temperature": 1.0}, r"got dice and temperature=1\.0"),
        ({"seed": 3}, "seed=3. Give them to the dice"),
        ({"written": [4]}, "got written=4 for a prompt of 3 tokens"),
    ],
)
def test_generation_settings_that_contradict_are_refused(subject, options, message):
    with pytest.raises(ValueError, match=message):
        subject.generate([[5, 6, 7]], max_new_tokens=2, dice=Dice(), **options)
