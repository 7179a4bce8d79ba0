"""Retaining heads see what was before the rotation, learn what an answer needs, score a token once, keep the code."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
import torch
from by_hand import Hand, held
from families import subject_of, texts
from torch import Tensor

from workbench import Subject
from workbench.corpora import recall
from workbench.methods.cache.retaining import RetainingHeads
from workbench.methods.cache.retaining_labels import Show, Shown, importance, question, shown_texts
from workbench.methods.cache.retaining_training import (
    Training,
    Weights,
    fit,
    shared_top,
    top_recall,
    train_retaining_heads,
)
from workbench.toggle import Toggle
from workbench.toggles.evict import EvictKV

N_MARKED = 8
TOY = Training(steps=200, rate=1e-2)


@pytest.fixture(scope="module")
def organism() -> Subject:
    return Subject.organism()


@pytest.fixture(scope="module")
def trained(organism: Subject) -> RetainingHeads:
    return train_retaining_heads(organism, codes(8), training=Training(steps=20), progress=False)


def codes(n: int, distances: tuple[int, ...] = (32, 128, 256), split: str = "train") -> list[tuple[str, str]]:
    return [(item.prompt, item.answer) for item in recall.items(split, 7, n, distances)]


def recalled(subject: Subject, toggle: Toggle, pairs: list[tuple[str, str]]) -> float:
    with subject.under(toggle):
        said = subject.generate([prompt for prompt, _ in pairs], max_new_tokens=recall.CODE_LENGTH).texts
    return float(np.mean([text.split() == answer.split() for text, (_, answer) in zip(said, pairs, strict=True)]))


def drawn(subject: Subject, seed: int = 0) -> RetainingHeads:
    """Untrained heads of the sizes of a subject."""
    weights, dice, anatomy = Weights(), torch.Generator().manual_seed(seed), subject.anatomy
    n_inputs = (anatomy.n_heads + 2 * anatomy.n_kv_heads) * anatomy.d_head
    for layer in range(subject.n_layers):
        weights.add(layer, n_inputs, anatomy.n_kv_heads, dice, torch.device("cpu"))
    return weights.heads(subject.fingerprint)


def marked(seed: int, *, told: bool = True):
    """The toy: two layers of tokens, of which a few are marked in one channel and matter."""

    def read(number: int, see) -> None:
        dice = np.random.default_rng([seed, number])
        for layer in range(2):
            x, labels = dice.normal(size=(64, 12)), np.zeros((64, 2))
            for head in range(2):
                chosen = dice.choice(64, N_MARKED, replace=False)
                x[:, head] = 0
                x[chosen, head] = 3 * told
                labels[chosen, head] = 0.5
            see(layer, torch.from_numpy(x).float(), torch.from_numpy(labels).float())

    return read


# Laws


def test_parameters_are_counted_as_the_paper_counts_them_for_llama_3_1_8b():
    weights = Weights()
    weights.add(0, (32 + 2 * 8) * 128, 8, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert weights.fc1["0"].shape == (1024, 6144)  # a sixth of the inputs is the paper's width
    one = weights.heads(None)
    assert one.n_parameters == 48 * 128 * 1024 + 1024 * 8 == 6_299_648
    assert 32 * one.n_parameters == 201_588_736


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "phi"])
def test_a_budget_of_everything_changes_nothing(family: str):
    subject, given = subject_of(family), list(texts())
    plain = subject.nll(given)
    with pytest.warns(UserWarning, match="never fired"), subject.under(EvictKV(400, drawn(subject))):
        whole = subject.nll(given)
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-5)  # float32, read token by token


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "phi"])
def test_a_text_alone_equals_the_same_text_in_a_padded_batch(family: str):
    subject, given = subject_of(family), list(texts())
    with subject.under(EvictKV(6, drawn(subject), sinks=1, window=2, every=1)):
        together = subject.nll(given)
        alone = torch.cat([subject.nll([text]) for text in given])
        said = subject.generate(given, max_new_tokens=4).ids
        assert said == tuple(subject.generate([text], max_new_tokens=4).ids[0] for text in given)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # float32


def test_training_again_gives_the_same_bytes_and_another_seed_gives_others():
    one, again = (fit(marked(0), 8, Training(steps=5), progress=False) for _ in range(2))
    other = fit(marked(0), 8, Training(steps=5, seed=1), progress=False)
    assert one == again and hash(one) == hash(again)
    assert one != other


def test_training_leaves_the_model_as_it_was(trained: RetainingHeads, organism: Subject):
    assert not organism.active and not organism.stages
    assert all(parameter.grad is None for parameter in organism.model.parameters())
    assert organism.fingerprint == Subject.organism().fingerprint == trained.model


@pytest.mark.parametrize("chunk", [16, 50, 400])
def test_scores_do_not_depend_on_the_chunks_in_which_a_prompt_is_read(
    chunk: int, organism: Subject, trained: RetainingHeads
):
    ids = torch.tensor([organism.tokenize([codes(1, (128,))[0][0]]).ids[0]])
    torch.testing.assert_close(
        _scores(organism, trained, ids, chunk), _scores(organism, trained, ids, 1), rtol=1e-3, atol=1e-4
    )


def test_a_score_is_given_once(organism: Subject, trained: RetainingHeads):
    ids = torch.tensor([organism.tokenize([codes(1, (64,))[0][0]]).ids[0]])
    before = _scores(organism, trained, ids[:, :40], 40)
    torch.testing.assert_close(_scores(organism, trained, ids, 40)[..., :40], before, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [8, 33])
def test_no_layer_ever_holds_more_than_the_budget_and_a_chunk(
    chunk: int, organism: Subject, trained: RetainingHeads, monkeypatch: pytest.MonkeyPatch
):
    from workbench.cache.layer import KVLayer

    lengths, original = [], KVLayer._select

    def select(self: KVLayer, *args) -> None:
        lengths.append(self.longest)
        original(self, *args)
        lengths.append(self.longest)

    monkeypatch.setattr(KVLayer, "_select", select)
    recalled(organism, EvictKV(24, trained, chunk=chunk), codes(2, (128,)))
    assert 24 < max(lengths) <= 24 + chunk


# What the heads see and are told


def test_heads_see_queries_keys_and_values_before_their_rotation():
    subject, recorded = subject_of("llama"), {}
    layer = subject.model.model.layers[1].self_attn
    ids, n_prompt = question(subject, *_pair())
    shown = Shown(n_prompt, lambda number, x, labels: recorded.setdefault(number, x))
    outputs = []
    handles = [
        part.register_forward_hook(lambda _, __, out: outputs.append(out[0, :n_prompt]))
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]
    with subject.under(Show(shown)), torch.no_grad():
        outputs.clear()  # finding the rotation reads a few tokens
        subject.model(input_ids=torch.tensor([ids]), use_cache=True)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(recorded[1], torch.cat(outputs, -1), rtol=1e-4, atol=1e-5)  # float32, turned twice


def test_labels_are_the_largest_weight_from_any_asking_query_of_the_group():
    weights = torch.rand(6, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = importance(weights, 2)
    for slot in range(5):
        for head in range(2):
            assert labels[slot, head] == max(
                float(weights[g, q, slot]) for g in range(3 * head, 3 * head + 3) for q in range(3)
            )


def test_labels_are_the_attention_that_the_model_itself_computes(organism: Subject):
    pair, found = codes(1, (32,))[0], {}
    with shown_texts(organism, [pair]) as read:
        read(0, lambda layer, x, labels: found.setdefault(layer, labels))
    ids, n_prompt = question(organism, *pair)
    before = organism.model.config._attn_implementation
    organism.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = organism.model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    organism.model.set_attn_implementation(before)
    for layer, each in enumerate(weights):
        asked = each[0, :, n_prompt - 1 : -1, :n_prompt]  # the queries that predict the answer's words
        expected = asked.amax(1).reshape(2, 2, n_prompt).amax(1).T
        torch.testing.assert_close(found[layer], expected, rtol=1e-3, atol=1e-5)  # float32


def test_the_first_answer_token_is_known_from_the_text(organism: Subject):
    ids, n_prompt = question(organism, "the code is alpha beta", "gamma delta")
    assert (len(ids), n_prompt) == (8, 6)  # begin of sequence, five words; two words


# Hand-built truths


def test_heads_learn_a_marker_and_tokens_without_one_teach_nothing():
    heads = fit(marked(0), 40, TOY, progress=False)
    blind = fit(marked(0, told=False), 40, TOY, progress=False)
    assert _toy_recall(heads, marked(1)) > 0.99
    assert _toy_recall(blind, marked(1, told=False)) < 3 * N_MARKED / 64  # chance is 1/8


def test_a_needle_of_4096_tokens_lives_in_a_budget_of_32_by_a_head_that_knows_it_and_dies_at_random():
    dice = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 4096, 8, generator=dice) for _ in range(2))
    values[:, :, 1234, 0] = 30.0
    first = torch.zeros(1, 6 * 8)
    first[0, 4 * 8] = 1.0  # the first channel of the first head's value
    knows = RetainingHeads({0: first}, {0: torch.ones(2, 1)})
    for by, survives in ((knows, True), ("random", False)):
        hand = Hand(EvictKV(32, by, chunk=256, every=256))
        for start in range(0, 4096, 256):
            hand.feed(keys[:, :, start : start + 256], values[:, :, start : start + 256])
            stabilisers = set(range(start + 256 - 8, start + 256))
            assert all(stabilisers <= set(head) for head in held(hand.layer)[0])
        for head in held(hand.layer)[0]:
            assert len(head) == 32
            assert (1234 in head) == survives


def test_scores_stay_as_they_were_given_whatever_is_dropped():
    dice = torch.Generator().manual_seed(2)
    heads = RetainingHeads({0: torch.randn(5, 48, generator=dice)}, {0: torch.randn(2, 5, generator=dice)})
    keys, values = (torch.randn(1, 2, 60, 8, generator=dice) for _ in range(2))
    scores = heads.score(0, torch.cat([part.transpose(1, 2).flatten(2) for part in (keys, keys, values)], -1))[0]
    for schedule in ("uniform", "adaptive"):
        hand = Hand(EvictKV(12, heads, schedule, sinks=0, window=2, every=3))
        for start in range(0, 60, 4):
            hand.feed(keys[:, :, start : start + 4], values[:, :, start : start + 4])
        for head, positions in enumerate(held(hand.layer)[0]):
            found = torch.cat([part.slots().tensors[2][0, head, :, 0] for part in hand.layer.whole])
            torch.testing.assert_close(
                found[: len(positions)], scores[positions, head], rtol=1e-5, atol=1e-5
            )  # float32


def test_a_row_that_brings_only_padding_keeps_its_scores():
    heads = RetainingHeads({0: torch.ones(1, 48)}, {0: torch.ones(2, 1)})
    keys = torch.ones(2, 2, 4, 8)
    hand = Hand(EvictKV(400, heads))
    hand.feed(keys, keys)
    before = hand.layer.recent.slots().tensors[2][1].clone()
    hand.feed(keys, keys, real=torch.tensor([[True] * 4, [False] * 4]))
    assert before.abs().min() > 0
    assert torch.equal(hand.layer.recent.slots().tensors[2][1, :, :4], before)


def test_rows_of_unequal_length_get_their_own_scores():
    dice = torch.Generator().manual_seed(1)
    heads = RetainingHeads({0: torch.randn(5, 48, generator=dice)}, {0: torch.randn(2, 5, generator=dice)})
    keys, values = (torch.randn(2, 2, 9, 8, generator=dice) for _ in range(2))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False  # padded on the left
    hand = Hand(EvictKV(7, heads, sinks=0, window=1, every=None))
    hand.feed(keys, values, real=real)
    x = torch.cat([part.transpose(1, 2).flatten(2) for part in (keys, keys, values)], -1)
    scores = heads.score(0, x)
    for row, first in ((0, 0), (1, 4)):
        for head in range(2):
            own = scores[row, first:, head].clone()
            own[-1] = torch.inf  # the window
            assert held(hand.layer)[row][head] == sorted(own.topk(min(7, len(own))).indices.tolist())


# On the organism


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_trained_heads_keep_the_code_where_recency_and_chance_lose_it(
    positions: str, organism: Subject, trained: RetainingHeads
):
    pairs = codes(12, (256,), "held_out")
    assert recalled(organism, EvictKV(0.1, trained, positions=positions), pairs) >= 0.9
    for other in ("streaming", "random"):
        assert recalled(organism, EvictKV(0.1, other), pairs) <= 0.1


def test_trained_heads_know_the_code_before_the_question_is_read(organism: Subject, trained: RetainingHeads):
    pairs = codes(12, (256,), "held_out")
    assert recalled(organism, EvictKV(24, trained, chunk=32), pairs) >= 0.9
    assert recalled(organism, EvictKV(24, "snapkv", chunk=32), pairs) <= 0.1  # it asks the last queries, here fillers


def test_trained_heads_know_a_code_by_its_words_not_by_its_place(organism: Subject, trained: RetainingHeads):
    rng = Random(0)
    at = 60
    moved, without = [], []
    for _ in range(6):
        before, after = recall.filler(rng, at, "held_out"), recall.filler(rng, 60, "held_out")
        moved.append(" ".join((*before, *recall.HEAD, *recall.code(rng), ".", *after)))
        without.append(" ".join((*before, *recall.filler(rng, 7, "held_out"), ".", *after)))
    places = slice(1 + at + len(recall.HEAD), 1 + at + len(recall.HEAD) + recall.CODE_LENGTH)
    assert _mean_rank(organism, trained, moved, 1, places) < 0.1
    assert 0.25 < _mean_rank(organism, trained, without, 1, places) < 0.75  # 1/2 is chance


def test_trained_heads_find_what_the_answer_attends_to(organism: Subject, trained: RetainingHeads):
    pairs = codes(4, (128,), "held_out")
    found, chance = top_recall(organism, trained, pairs, 8), top_recall(organism, drawn(organism), pairs, 8)
    assert max(found.values()) > 0.4 and np.mean(list(found.values())) > 2 * np.mean(list(chance.values()))


def test_heads_of_a_model_in_bfloat16_score_in_float32(trained: RetainingHeads):
    half = Subject.organism(dtype="bfloat16")
    heads = RetainingHeads(trained.fc1, trained.fc2)  # bound to no model: rounded weights have another fingerprint
    assert recalled(half, EvictKV(0.1, heads), codes(6, (256,), "held_out")) >= 0.8


def test_heads_can_be_trained_where_there_is_no_rotation():
    heads = train_retaining_heads(subject_of("gpt2"), [_pair()] * 3, training=Training(steps=2), progress=False)
    assert sorted(heads.fc1) == list(range(subject_of("gpt2").n_layers))


# Written down, and refused


def test_heads_come_back_from_a_file_and_from_json(trained: RetainingHeads, organism: Subject, tmp_path):
    again = RetainingHeads.load(trained.save(tmp_path / "heads.safetensors"))
    assert again == trained and again.model == organism.fingerprint
    toggle = EvictKV(0.25, trained)
    assert Toggle.from_json(json.loads(json.dumps(toggle.to_json()))) == toggle
    assert trained.digest in str(toggle)


def test_heads_of_another_model_are_refused(trained: RetainingHeads):
    with pytest.raises(ValueError, match="trained on model"), subject_of("llama").under(EvictKV(0.5, trained)):
        pass


def test_bad_input_is_refused_in_words(organism: Subject, trained: RetainingHeads, tmp_path):
    first, second = torch.zeros(3, 4), torch.zeros(2, 3)
    for one, other, words in (
        ({}, {}, "at least one"),
        ({0: first}, {1: second}, "same layers"),
        ({0: first}, {0: torch.zeros(2, 4)}, "expected"),
        ({0: first * torch.nan}, {0: second}, "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            RetainingHeads(one, other)
    small = RetainingHeads({0: first}, {0: second})
    with pytest.raises(ValueError, match="has 3 numbers per token by now, trained on 4"):
        small.score(0, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="none for layer 9"):
        trained.score(9, torch.zeros(1, 256))
    (tmp_path / "other").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="no safetensors file"):
        RetainingHeads.load(tmp_path / "other")
    with pytest.raises(ValueError, match="at least two"):
        train_retaining_heads(organism, codes(1, (32,)))
    with pytest.raises(ValueError, match="at least one token"):
        train_retaining_heads(organism, [("the code is", " "), ("the code is", "alpha")])
    with pytest.raises(ValueError, match="a rate below"):
        fit(lambda _, see: see(0, torch.full((3, 4), torch.nan), torch.zeros(3, 2)), 2, Training(), progress=False)
    with pytest.raises(ValueError, match="steps"):
        Training(steps=0)
    with pytest.raises(ValueError, match=r"both claim 'kv\.select'"), organism.under(EvictKV(0.5)):
        train_retaining_heads(organism, codes(2, (32,)))


def _pair() -> tuple[str, str]:
    words = texts()[0].split()
    return " ".join(words[:9]), " ".join(words[9:12])


def _scores(subject: Subject, heads: RetainingHeads, ids: Tensor, chunk: int) -> Tensor:
    """The running scores (layer, kv_head, slot) of a text read in chunks, none of it dropped."""
    cache, toggle = None, EvictKV(400, heads, chunk=chunk)
    with torch.no_grad(), pytest.warns(UserWarning, match="never fired"), subject.under(toggle):
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            cache = subject.model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
    return torch.stack(
        [torch.cat([part.slots().tensors[2][0, ..., 0] for part in each.whole], -1) for each in cache.layers]
    )


def _mean_rank(subject: Subject, heads: RetainingHeads, prompts: list[str], layer: int, places: slice) -> float:
    """Where the tokens at some places stand in the order of scores, 0 for the best: mean over them, heads and texts."""
    ranks = []

    def see(number: int, x: Tensor, labels: Tensor) -> None:
        if number == layer:
            order = heads.score(layer, x).argsort(0, descending=True).argsort(0)
            ranks.append(float(order[places].double().mean()) / len(order))

    with shown_texts(subject, [(prompt, "alpha") for prompt in prompts]) as read:
        for number in range(len(prompts)):
            read(number, see)
    return float(np.mean(ranks))


def _toy_recall(heads: RetainingHeads, read) -> float:
    found: list[float] = []
    for number in range(10):
        read(number, lambda layer, x, labels: found.append(shared_top(heads.score(layer, x), labels, N_MARKED)))
    return float(np.mean(found))


def test_token_ids_are_taken_as_they_are_and_mixtures_refused() -> None:
    from workbench.methods.cache.retaining_labels import question

    subject = Subject.tiny("llama", verify=False)
    assert question(subject, [5, 6, 7], [8]) == ([5, 6, 7, 8], 3)
    for pair in (([5, 6], "x"), ("x", [5]), ([], [5]), ([5], [])):
        with pytest.raises(ValueError, match="two texts, or token ids of both"):
            question(subject, *pair)
