"""The lens, its read-outs and the latent language: laws, worlds whose truth is known, the organism, bad input."""

from __future__ import annotations

import functools
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from workbench import Site, Steer, Subject, corpora
from workbench.corpora import bilingual, language, relations
from workbench.corpora.bilingual import BilingualItem
from workbench.directions import Direction
from workbench.methods.lens import lens as lenses
from workbench.methods.lens.candidates import Candidates, kept, n_rows, prefixes, reading, spelled, word_log_prob
from workbench.methods.lens.crossover import crossover
from workbench.methods.lens.latent_language import LatentLanguageResult
from workbench.methods.lens.lens import grouped, read_out, read_out_reference, token_energy
from workbench.methods.lens.tuned_lens import TunedLens, fit_tuned_lens
from workbench.organism.tiny import FAMILIES
from workbench.probes.latent_language import LatentLanguage, World
from workbench.probes.logit_lens import LogitLens
from workbench.unembedding import Unembedding

TEXTS = ("common father = velish", "velish", "common honest baker eats bread = velish")
REAL = os.environ.get("WORKBENCH_REAL")


@functools.cache
def tiny(family: str = "llama") -> Subject:
    return Subject.tiny(family, verify=False)


@functools.cache
def organism() -> Subject:
    return Subject.organism()


def plain(subject: Subject) -> lenses.Lens:
    unembedding = Unembedding.of(subject)
    return lambda _, states: unembedding.logits(states)


# --- laws of the lens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_says_what_the_model_says(family: str) -> None:
    subject = tiny(family)
    vocab = subject.anatomy.vocab
    for row, ids, logprobs in subject.predictions(TEXTS):
        states = lenses.states_of(subject, [TEXTS[row]], "all")
        pairs = torch.cartesian_prod(torch.arange(len(ids)), torch.arange(vocab))
        found = read_out(states, plain(subject), pairs=pairs)
        expected = logprobs.reshape(-1).numpy()
        np.testing.assert_allclose(found.log_prob[-1], expected, atol=1e-4)  # batched with padding against alone
        assert np.all(found.kl[-1] == 0.0) and np.all(found.rank[-1] == 1)
        np.testing.assert_array_equal(found.top_ids[-1, :, 0], logprobs.argmax(-1).numpy())
        total = np.exp(found.log_prob).reshape(len(states), len(ids), vocab).sum(-1)
        np.testing.assert_allclose(total, 1.0, atol=1e-5)  # float32 over 1213 tokens


@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_of_rows_give_what_one_row_at_a_time_gives(block: int) -> None:
    subject = tiny("gemma2")  # with (1 + w) norm and a soft cap
    states = lenses.states_of(subject, TEXTS, "all")
    slow, fast = read_out_reference(states, plain(subject)), read_out(states, plain(subject), rows_at_once=block)
    np.testing.assert_array_equal(fast.rank, slow["rank"])
    np.testing.assert_allclose(fast.kl, slow["kl"], atol=2e-6)  # float32 logits, measured 3e-7
    np.testing.assert_allclose(fast.entropy_bits, slow["entropy_bits"], atol=1e-5)


def test_ties_go_to_the_smaller_token_as_in_the_models_own_choice() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    found = read_out([logits, logits], lambda _, values: values, k=3)
    assert found.top_ids[-1, 0].tolist() == [1, 2, 0] and found.top_ids[-1, 1, 0] == 0
    assert all(len(set(ids)) == 3 for ids in found.top_ids[-1].tolist())
    np.testing.assert_array_equal(found.rank, 1)
    other = torch.tensor([[2.0, 2.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0]])  # token 1 is top in the end, tied second here
    assert read_out([other, logits], lambda _, values: values).rank[0].tolist() == [2, 1]


def test_measures_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25, 1e-30]]), torch.full((1, 4), 0.25)
    found = read_out([q.log(), p.log()], lambda _, values: values, pairs=torch.tensor([[0, 1]]))
    assert found.entropy_bits[:, 0] == pytest.approx([2.0, 1.5], abs=1e-6)
    assert found.kl[0, 0] == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert found.log_prob[:, 0] == pytest.approx(math.log(0.25), abs=1e-6)


def test_a_read_out_is_the_same_alone_and_among_longer_texts() -> None:
    subject = tiny()
    together = LogitLens().run(subject, TEXTS)
    for index, text in enumerate(TEXTS):
        alone = LogitLens().run(subject, [text])
        np.testing.assert_allclose(together.kl[:, together.text == index], alone.kl, atol=1e-5)  # padded or not


def test_few_rows_at_a_time_give_the_same_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    items = bilingual.word_items(n_words=3)[::40]
    whole = LogitLens().run(tiny(), TEXTS), LatentLanguage().run(tiny(), items)
    monkeypatch.setattr(lenses, "STATE_BYTES", 1)
    monkeypatch.setattr(lenses, "BLOCK_BYTES", 1)
    parts = LogitLens().run(tiny(), TEXTS), LatentLanguage().run(tiny(), items)
    np.testing.assert_allclose(parts[0].kl, whole[0].kl, atol=1e-5)
    np.testing.assert_array_equal(parts[0].text, whole[0].text)
    np.testing.assert_allclose(parts[1].log_prob, whole[1].log_prob, atol=1e-5)
    assert list(grouped([3, 9, 1, 1, 1], 4)) == [slice(0, 1), slice(1, 2), slice(2, 5)]


def test_the_lens_reads_a_subject_as_its_toggles_leave_it() -> None:
    subject = tiny()
    site = Site(1, "resid_out")
    push = Steer(Direction(torch.ones(subject.anatomy.d_model), site), at=site, strength=3.0)
    bare = LogitLens().run(subject, TEXTS)
    with subject.under(push):
        pushed = LogitLens().run(subject, TEXTS)
    np.testing.assert_array_equal(bare.entropy_bits[:2], pushed.entropy_bits[:2])
    assert np.all(bare.entropy_bits[2] != pushed.entropy_bits[2])


def test_a_model_in_bfloat16_agrees_with_itself() -> None:
    made = tiny()
    half = Subject(Subject.tiny("llama").model.bfloat16(), made.tokenizer, name="half", verify=False)
    result = LogitLens().run(half, TEXTS)
    assert np.all(result.rank[-1] == 1) and np.all(result.kl[-1] == 0)
    np.testing.assert_allclose(
        result.entropy_bits, LogitLens().run(made, TEXTS).entropy_bits, rtol=0.02
    )  # 8 bits of mantissa, measured 4e-3


def test_token_energy_is_one_for_tokens_and_ignores_length() -> None:
    rows = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    energy = token_energy(rows, chunk=7)
    assert float(energy(rows).mean()) == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(energy(5 * rows[:3]), energy(rows[:3]))
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    slow = (unit @ unit.T).square().mean(1).sqrt()
    torch.testing.assert_close(energy(rows), slow / slow.mean())
    assert float(energy(torch.zeros(32))) == 0.0
    flat = torch.randn(300, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0] * 4 + [1e-3] * 28)
    across = torch.zeros(32)
    across[20] = 1.0
    assert float(token_energy(flat)(across)) < 0.01  # where no token points


# --- words


@functools.cache
def speller() -> Subject:
    """An untrained model with a byte-level BPE of few merges, in which most words are several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [f" {word}" for pair in language.DICTIONARY.items() for word in pair]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    sizes = {"vocab_size": 330, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = GPT2LMHeadModel(config).eval()
    return Subject(made, PreTrainedTokenizerFast(tokenizer_object=core), name="speller", verify=False)


def item(*words: tuple[str, ...], prompt: str = "it is", **fields: str) -> BilingualItem:
    named = tuple(zip(("a", "b", "c"), words, strict=False))
    return BilingualItem(prompt, named, fields.pop("task", "t"), "a", fields.pop("target", "b"), **fields)


SPELLED = item(("father", "mother", "bread"), ("xuqu", "é", "yaqax"))


def test_a_word_of_several_tokens_has_the_probability_of_the_continuation() -> None:
    subject = speller()
    result = LatentLanguage().run(subject, [SPELLED])
    lengths = set()
    for k, (_, words) in enumerate(SPELLED.words):
        for j, word in enumerate(words):
            (_, ids, logprobs) = next(iter(subject.predictions([f"it is {word}"])))
            start = len(subject.tokenize(["it is"]).ids[0])
            own = [float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))]
            assert result.log_prob[0, -1, k, j] == pytest.approx(sum(own), abs=1e-4)
            lengths.add(len(own))
    assert len(lengths) > 1, "words of one length would not test this"


def test_a_word_of_one_token_has_that_tokens_probability_at_every_layer() -> None:
    subject, (one,) = tiny(), bilingual.word_items(n_words=3)[:1]
    result = LatentLanguage().run(subject, [one])
    states = lenses.states_of(subject, [one.prompt], "last")
    for k, (_, words) in enumerate(one.words):
        ids = subject.tokenizer.convert_tokens_to_ids(list(words))
        for layer, values in enumerate(states):
            expected = plain(subject)(layer, values)[0].log_softmax(-1)[ids]
            np.testing.assert_allclose(result.log_prob[0, layer, k], expected.numpy(), atol=1e-5)


def test_first_tokens_and_geometric_means_are_what_they_say() -> None:
    subject = speller()
    whole, mean, first = (
        LatentLanguage(**options).run(subject, [SPELLED])  # type: ignore[arg-type]
        for options in ({}, {"length": "geometric"}, {"words": "first_token"})
    )
    (coded,) = spelled(subject, [SPELLED], first_token=False)
    n_tokens = np.array([[len(word) for word in words] for words in coded.words])
    np.testing.assert_allclose(mean.log_prob * n_tokens, whole.log_prob, rtol=1e-6)
    assert np.all(first.log_prob >= whole.log_prob - 1e-5) and np.any(first.log_prob > whole.log_prob + 0.1)
    alike = item(("father", "fatherly"), ("xuqu", "yaqax"))
    (once,) = spelled(subject, [alike], first_token=True)
    assert [len(words) for words in once.words] == [1, 2]  # or its mass would count twice
    assert np.isnan(LatentLanguage(words="first_token").run(subject, [alike]).log_prob[0, 0, 0, 1])
    rest = first.table().query("language == 'all else' and measure == 'mass'")
    assert len(rest) == 3 and not len(mean.table().query("language == 'all else'"))


def test_an_item_is_scored_the_same_alone_and_among_others() -> None:
    others = [replace(SPELLED, prompt="it is said that the answer is", words=SPELLED.words)]
    both = LatentLanguage().run(speller(), [*others, SPELLED])
    alone = LatentLanguage().run(speller(), [SPELLED])
    np.testing.assert_allclose(both.log_prob[1], alone.log_prob[0], atol=1e-5)
    np.testing.assert_allclose(both.kl[1], alone.kl[0], atol=1e-5)


def test_every_beginning_of_a_word_is_read_once() -> None:
    one = Candidates((1, 2), (((5,), (6, 7, 8)), ((6, 7, 9), (6, 3))))
    plan = reading([one, one])
    assert plan.texts == [[1, 2, 6, 7]] * 2 and plan.masks == [[False, True, True, True]] * 2
    assert plan.prompt_row.tolist() == [0, 3] and n_rows(one) == 3
    pairs = plan.pairs.tolist()
    assert pairs[:4] == [[0, 5], [0, 6], [1, 7], [2, 8]] and pairs[9 + 0] == [3, 5]
    logs = word_log_prob(plan, np.ones((1, len(pairs))))
    assert logs[:, 0].tolist() == [[[1.0, 3.0], [3.0, 2.0]]] * 2
    short = reading([Candidates((1,), (((5,),), ((6,), (7,))))])
    assert np.isnan(word_log_prob(short, np.zeros((1, 3)))[0, 0, 0, 1])


def test_words_that_two_languages_share_are_left_out_and_counted() -> None:
    shared = item(("radio", "bread"), ("lamp", "radio"), task="shared")
    begins = item(("brea", "lamp"), ("bread", "honey"), task="shared")
    apart = item(("father", "honey"), ("moth", "brood"), task="apart")
    result = LatentLanguage().run(speller(), [shared, apart])
    assert result.task_names == ["apart"] and result.dropped == {"shared": 1, "apart": 0}
    coded = [Candidates((1,), (((4, 5),), ((4, 5, 6),))), Candidates((1,), (((4, 5),), ((4, 6),)))]
    assert [one.collide for one in coded] == [True, False]
    assert kept([begins, apart], coded, paper=False) == ([1], {"shared": 1, "apart": 0})
    with pytest.raises(ValueError, match="in all 1 items the languages share tokens"):
        LatentLanguage().run(speller(), [shared])


def test_paper_mode_sums_every_token_that_begins_the_word() -> None:
    subject = speller()
    one = item(("bread",), ("moth",))
    (coded,) = prefixes(subject, [one])
    vocabulary = subject.tokenizer.get_vocab()
    starts = {mark + "bread"[:n] for n in range(1, 6) for mark in ("", "Ġ")}
    assert {ids[0] for ids in coded.words[0]} == {vocabulary[start] for start in starts if start in vocabulary}
    result = LatentLanguage(mode="paper").run(subject, [one])
    logits = plain(subject)(2, lenses.states_of(subject, ["it is"], "last")[2])[0].softmax(-1)
    expected = float(logits[[ids[0] for ids in coded.words[0]]].sum())
    assert result.values("t", "mass")[0, 2, 0] == pytest.approx(expected, rel=1e-4)
    assert result.measures == ["mass"] and result.words == "prefixes"
    assert result.curves("t").query("language == 'all else' and layer == 2")["probability"].item() < 1 - expected
    contained = item(("read",), ("bread",), task="contained")
    both = LatentLanguage(mode="paper").run(subject, [one, contained])
    assert both.dropped == {"t": 0, "contained": 1}


def test_the_first_byte_of_a_foreign_word_counts_in_paper_mode() -> None:
    core = Tokenizer(models.WordLevel({"?": 0, "it": 1, "<0xE4>": 2, "▁book": 3, "b": 4, "书": 5}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    subject = Subject(speller().model, words, name="bytes", verify=False)
    (coded,) = prefixes(subject, [item(("book",), ("书",), prompt="it")])
    assert coded.words == (((4,), (3,)), ((5,), (2,)))


def test_a_prompt_whose_end_melts_into_the_word_is_refused() -> None:
    with pytest.raises(ValueError, match="do not begin with those of its prompt"):
        LatentLanguage().run(speller(), [item(("tter",), ("moth",), prompt="it is o", separator="")])


# --- crossovers


def curve(*values: float, n: int = 20) -> np.ndarray:
    return np.tile(np.array(values), (n, 1))


def test_a_crossover_is_where_the_target_leads_for_good_after_another_led() -> None:
    other, target = curve(0, 0.9, 0.9, 0.2, 0.1), curve(0, 0.0, 0.1, 0.2, 0.9)
    found = crossover(target, other, n_bootstrap=50)
    assert (found.layer, found.low, found.high, found.share, found.led) == (4, 4, 4, 1.0, (1, 2))
    assert crossover(other, target, n_bootstrap=50).layer is None  # the target leads first and loses
    assert crossover(target, 0 * other, n_bootstrap=50).layer is None  # nobody else ever led
    again = crossover(curve(0, 1, 0, 1, 0, 1), curve(1, 0, 1, 0, 1, 0), n_bootstrap=50)
    assert again.layer == 5
    assert crossover(1e-6 * target, 1e-6 * other, least=0.05, n_bootstrap=50).layer is None


def test_the_interval_of_a_crossover_holds_where_items_hand_over() -> None:
    rng = np.random.default_rng(0)
    layer = rng.integers(4, 9, 40)
    target = (np.arange(12) >= layer[:, None]).astype(float)
    other = np.where(np.arange(12) < 2, 0, 1 - target)
    found = crossover(target, other)
    assert found.low is not None and found.layer is not None and found.high is not None
    assert found.low <= np.median(layer) <= found.high and found.low < found.high


def test_unrelated_curves_show_a_crossover_in_fewer_than_one_in_twenty() -> None:
    rng = np.random.default_rng(0)
    found = [crossover(*rng.random((2, 40, 9)), n_bootstrap=200, seed=k).layer for k in range(300)]
    assert np.mean([layer is not None for layer in found]) <= 0.05  # .029 of 1000 with 400 resamples


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_the_planted_hand_over_is_found_exactly_with_and_without_noise(seed: int, noise: float) -> None:
    result = World.of(seed, signal=True, noise=noise).solved(LatentLanguage(n_bootstrap=200))
    found = result.crossover("translation", "english")
    assert (found.layer, found.low, found.high, found.led) == (6, 6, 6, (2, 3, 4, 5))
    assert "takes over at layer 6" in result.finding
    np.testing.assert_allclose(result.entropy_bits[:, :2], math.log2(200), atol=1e-5)
    np.testing.assert_allclose(result.energy[:, 2:], 1.0, atol=0.35)
    assert np.all(result.energy[:, :2] == 0)


def test_which_language_times_which_word_is_the_normalised_mass() -> None:
    result = World.of(3, signal=False).solved(LatentLanguage(n_bootstrap=10))
    parts = {name: result.values("translation", name) for name in ("normalised", "language", "word", "top1")}
    np.testing.assert_allclose(parts["language"] * parts["word"], parts["normalised"], rtol=1e-9)
    np.testing.assert_allclose(parts["language"].sum(-1), 1.0, rtol=1e-9)
    assert set(np.unique(parts["top1"])) <= {0.0, 1.0} and abs(parts["top1"].mean() - 1 / 8) < 0.05


def test_shares_of_tiny_masses_hand_nothing_over() -> None:
    base = World.of(0, signal=True).solved(LatentLanguage(n_bootstrap=50))
    faint = replace(base, log_prob=base.log_prob - 12.0)  # the same shares of six millionths of the mass
    np.testing.assert_allclose(faint.values("translation", "language"), base.values("translation", "language"))
    assert base.crossover("translation", "english", "language").layer == 6
    assert faint.crossover("translation", "english", "language").layer is None


# --- a tuned lens


@functools.cache
def short_texts() -> tuple[str, ...]:
    documents = corpora.PHENOMENA["language"].documents("train", 1)
    return tuple(one.text for one in itertools.islice(documents, 60))


@functools.cache
def tuned() -> TunedLens:
    return fit_tuned_lens(organism(), short_texts(), steps=50, rate=5e-3, rows=64)


def test_a_tuned_lens_at_zero_is_the_logit_lens() -> None:
    subject = tiny()
    size = subject.n_layers, subject.anatomy.d_model
    zero = TunedLens(torch.zeros(*size, size[1]), torch.zeros(size), subject.fingerprint)
    states = lenses.states_of(subject, TEXTS, "all")
    made = zero.lens(Unembedding.of(subject))
    for layer, values in enumerate(states):
        assert torch.equal(made(layer, values), plain(subject)(layer, values))


def test_training_brings_every_layer_nearer_to_the_last_and_leaves_that_one_alone(tmp_path: Path) -> None:
    subject, made = organism(), tuned()
    assert all(values[-1] <= values[0] and min(values) < values[0] for values in made.history.values())
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    texts = [one.prompt + " " + one.answer for one in language.items("held_out")[::40]]
    path = made.save(tmp_path / "lens.safetensors")
    bare, moved = LogitLens().run(subject, texts), LogitLens(lens=str(path)).run(subject, texts)
    assert np.all(moved.kl[:-1].mean(1) < bare.kl[:-1].mean(1))
    np.testing.assert_array_equal(moved.kl[-1], 0.0)
    np.testing.assert_array_equal(moved.top_probability[-1], bare.top_probability[-1])
    assert moved.table()["lens"].unique().tolist() == [f"tuned {made.digest}"] and "tuned lens" in moved.finding


def test_a_tuned_lens_is_a_function_of_its_seed_and_survives_its_file(tmp_path: Path) -> None:
    options = {"steps": 2, "rows": 8, "n_tokens": 40}
    first, again, other = (
        fit_tuned_lens(tiny(), short_texts()[:6], seed=seed, **options)  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    )
    assert first.digest == again.digest != other.digest
    loaded = TunedLens.load(first.save(tmp_path / "a.safetensors"))
    assert torch.equal(loaded.weight, first.weight) and torch.equal(loaded.bias, first.bias)
    assert loaded.history == first.history and loaded.model == first.model


def test_a_tuned_lens_that_only_got_worse_stays_untrained() -> None:
    made = fit_tuned_lens(tiny(), short_texts()[:6], steps=75, rows=4, rate=30.0, patience=1)
    for layer, values in made.history.items():
        assert values[0] == min(values) and not made.weight[layer].any() and len(values) == 2


def test_a_tuned_lens_is_refused_where_it_does_not_belong(tmp_path: Path) -> None:
    path = tuned().save(tmp_path / "lens.safetensors")
    with pytest.raises(ValueError, match="was trained on model"):
        LogitLens(lens=str(path)).run(tiny(), TEXTS)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        tuned().save(tmp_path / "lens.bin")
    with pytest.raises(ValueError, match="expected 'logit' or the path"):
        LogitLens(lens="tuned").run(tiny(), TEXTS)
    with pytest.raises(FileNotFoundError, match="TunedLens"):
        LogitLens(lens="no.safetensors").run(tiny(), TEXTS)
    with pytest.raises(ValueError, match="holds no tuned lens"):
        (tmp_path / "w.safetensors").write_bytes((relations_weights()).read_bytes())
        TunedLens.load(tmp_path / "w.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="can't be read"):
        TunedLens.load(tmp_path / "broken.safetensors")
    site = Site(0, "resid_out")
    with tiny().under(Steer(Direction(torch.ones(32), site), at=site)) as subject:
        with pytest.raises(ValueError, match="under toggles"):
            fit_tuned_lens(subject, TEXTS)
        subject.nll(["common father"])
    with pytest.raises(ValueError, match="at least 2"):
        fit_tuned_lens(tiny(), TEXTS[:1])
    with pytest.raises(ValueError, match="got one string, expected a list of texts"):
        fit_tuned_lens(tiny(), "common father = velish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be positive"):
        fit_tuned_lens(tiny(), TEXTS, steps=0)


def relations_weights() -> Path:
    from workbench.organism import FOLDER

    return next(Path(FOLDER).glob("*.safetensors"))


# --- the organism: what its grammar says


@functools.cache
def found(model: str) -> LatentLanguageResult:
    items = bilingual.fact_items() + bilingual.word_items()
    result = LatentLanguage().run(organism() if model == "organism" else Subject.tiny("organism"), items)
    assert isinstance(result, LatentLanguageResult)
    return result


ONLY_COMMON, BOTH = "fact told in common only", "fact in velish"


def test_no_language_of_the_organism_hands_over_to_another() -> None:
    table = found("organism").crossovers()
    assert table["crossover"].isna().all() and len(table) == 7
    mass = found("organism").values("common to velish", "mass").mean(0)
    assert mass[1:, 0].max() < 0.1 and mass[-1, 1] > 0.99  # the other language is faint, and as faint in repetition
    repeat = found("organism").values("repeat velish", "mass").mean(0)
    assert abs(mass[:, 0].max() - repeat[:, 0].max()) < 0.02


def test_what_was_told_in_common_only_stands_out_in_common_words_first() -> None:
    lead = found("organism").lead(ONLY_COMMON, "common", "top1")
    assert (lead.query("layer >= 2")["low"] > 0).all() and lead["lead"].max() > 0.2
    control = found("organism").lead(BOTH, "common", "top1")
    assert (control["lead"] < 0.02).all()  # told in Velish too: never
    twin = found("twin").crossovers("top1")
    assert found("twin").lead(ONLY_COMMON, "common", "top1").query("layer >= 1")["low"].max() <= 0
    assert twin["crossover"].isna().all()


def test_bilingual_items_keep_their_law() -> None:
    for one in bilingual.word_items() + bilingual.fact_items():
        (_, common), (_, velish) = one.words
        assert tuple(language.DICTIONARY[word] for word in common) == velish
        assert len(set(common)) == len(common) == bilingual.N_WORDS
        right = dict(one.words)[one.target][0]
        told = one.prompt.split()
        assert one.task.startswith("repeat") == (right in told)
        assert {common[0], velish[0]} & set(told) == set() or one.task.startswith(("repeat", "common", "velish"))
    facts = {(fact.relation, fact.subject): fact for fact in relations.FACTS}
    unseen = [one for one in bilingual.fact_items() if one.task == ONLY_COMMON]
    prompts = {relations.prompt(fact, "foreign"): fact for fact in facts.values()}
    assert unseen and all("foreign" in prompts[one.prompt].unseen for one in unseen)
    assert bilingual.fact_items(seed=1) != bilingual.fact_items() == bilingual.fact_items()


# --- bad input


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "got no items"),
        ([item(("bread",), ("moth",), target="z")], "target 'z'"),
        ([item(("bread",))], "two or more languages"),
        ([item(("bread",), ("moth",)), item(("bread",), ("moth",), ("rice",))], "item 1 has words of"),
        ([item(("bread", "lamp"), ("moth",))], "as many in each"),
        ([item((), ())], "as many in each"),
        ([item(("bread",), ("moth",)), item(("bread",), ("moth",), target="a")], "one direction per task"),
    ],
)
def test_items_that_do_not_fit_are_named(items: list[BilingualItem], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentLanguage().run(speller(), items)


def test_settings_and_choices_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="in mode 'paper'"):
        LatentLanguage(mode="paper", words="first_token").run(speller(), [SPELLED])
    with pytest.raises(ValueError, match="got mode='papr', expected 'corrected' or 'paper'"):
        LatentLanguage(mode="papr").run(speller(), [SPELLED])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one string"):
        LogitLens().run(tiny(), "common father")
    with pytest.raises(ValueError, match="got 'common father', expected BilingualItems"):
        LatentLanguage().run(tiny(), ["common father"])
    with pytest.raises(ValueError, match="expected 'all' or 'last'"):
        LogitLens(positions="mean").run(tiny(), TEXTS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got k=0"):
        LogitLens(k=0).run(tiny(), TEXTS)
    with pytest.raises(ValueError, match="not in this model's vocabulary"):
        LatentLanguage().run(tiny(), [item(("zzz",), ("moth",), prompt="common")])
    with pytest.raises(ValueError, match="expected 1 to 14"):
        bilingual.fact_items(n_words=15)
    with pytest.raises(ValueError, match="expected the same"):
        crossover(np.zeros((2, 3)), np.zeros((2, 4)))
    states = [torch.zeros(2, 4), torch.zeros(3, 4)]
    with pytest.raises(ValueError, match="got states of shapes"):
        read_out(states, lambda _, values: values)
    with pytest.raises(ValueError, match="expected rows below 3"):
        read_out(states[1:], lambda _, values: values, pairs=torch.tensor([[3, 0]]))
    result = found_small()
    for bad in ({"view": "nothing"}, {"task": "nothing"}):
        with pytest.raises(ValueError, match="got"):
            result.plot(**bad)
    with pytest.raises(ValueError, match="got language"):
        result.lead("translation", "klingon")
    with pytest.raises(ValueError, match="got text 7"):
        LogitLens().run(tiny(), TEXTS).plot("grid", text=7)


def found_small() -> LatentLanguageResult:
    return World.of(0, signal=True).solved(LatentLanguage(n_bootstrap=10))


@pytest.mark.skipif(not REAL, reason="WORKBENCH_REAL names no folder of real models")
def test_a_real_models_words_have_the_probability_of_its_continuations() -> None:
    subject = Subject.load(Path(str(REAL)) / "models" / "stories260k")
    one = item(("dog", "elephant"), ("chien", "canard"), prompt="Lily saw a big")
    result = LatentLanguage().run(subject, [one])
    for k, (_, words) in enumerate(one.words):
        for j, word in enumerate(words):
            start = len(subject.tokenize([one.prompt]).ids[0])
            (_, ids, logprobs) = next(iter(subject.predictions([f"{one.prompt} {word}"])))
            own = sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids)))
            assert result.log_prob[0, -1, k, j] == pytest.approx(own, abs=1e-3)
