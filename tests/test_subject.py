"""The subject: loading with its refusals, captures, generation and bad input."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from workbench import Site, Steer, Subject
from workbench.capture import _pick, collect
from workbench.card import Check
from workbench.organism import FOLDER
from workbench.reading import pooled
from workbench.step import Step
from workbench.tokens import Batch, batches, left_pad


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@pytest.fixture(scope="module")
def words(subject: Subject) -> list[str]:
    return sorted(word for word in subject.tokenizer.get_vocab() if word.isalpha())


# Loading


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "~/no/such"])
def test_a_path_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {path}"):
        Subject.load(path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"has only pytorch_model\.bin, expected \*\.safetensors"):
        Subject.load(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Subject.load(tmp_path.parent)
    with pytest.raises(ValueError, match="is a file"):
        Subject.load(tmp_path / "config.json")


def test_weights_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't be read"):
        Subject.load(tmp_path / "model")


def test_weights_of_another_shape_or_missing_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1})
    )
    with pytest.raises(ValueError, match="lacks weights"):  # transformers would fill them with random numbers
        Subject.load(tmp_path / "model")


def test_an_encoder_and_an_encoder_decoder_are_refused(tmp_path: Path) -> None:
    size = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertForMaskedLM(BertConfig(**size)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is an encoder \(BertForMaskedLM\), expected a decoder"):
        Subject.load(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        Subject.load(tmp_path / "t5")


def test_remote_code_is_off_until_asked_for_by_name(tmp_path: Path) -> None:
    config = {"model_type": "mystery", "architectures": ["MysteryForCausalLM"], "num_hidden_layers": 1}
    config["auto_map"] = {"AutoConfig": "code.MysteryConfig", "AutoModelForCausalLM": "code.Mystery"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="brings code of its own, which is off"):
        Subject.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int32, "float8_e4m3fn"])
def test_a_dtype_that_can_not_work_is_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"got dtype .*, expected auto or one of float32"):
        Subject.load(FOLDER, dtype=dtype)  # type: ignore[arg-type]


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'cuda:99' can't be used here"):
        Subject.load(FOLDER, device="cuda:99")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_organism_loads_and_proves_itself_in_other_dtypes(dtype: str) -> None:
    subject = Subject.load(FOLDER, dtype=dtype)
    assert subject.dtype == getattr(torch, dtype) and all(check.passed for check in subject.card.checks)


def test_verification_can_be_skipped_and_the_card_says_so() -> None:
    subject = Subject.load(FOLDER, verify=False)
    assert subject.card.checks == () and "not verified" in str(subject.card)


def test_a_check_knows_both_directions_and_refuses_nan() -> None:
    assert Check("a", 0.0, 0.0).passed and not Check("a", 1e-9, 0.0).passed
    assert Check("a", 1e-9, 0.0, above=True).passed and not Check("a", 0.0, 0.0, above=True).passed
    assert not Check("a", float("nan"), 1.0).passed and not Check("a", float("nan"), 0.0, above=True).passed


def test_a_cache_that_disagrees_is_refused_at_load() -> None:
    """A model that treats single tokens differently would generate something else than it predicts."""
    subject = Subject.tiny("llama")
    scale = lambda module, args, output: output * (1.5 if output.shape[1] == 1 else 1.0)  # noqa: E731
    subject.model.lm_head.register_forward_hook(scale)
    with pytest.raises(ValueError, match=r"cached and uncached predictions agree: got .*, expected at most"):
        Subject(subject.model, subject.tokenizer, name="odd")


def test_a_model_whose_blocks_do_something_else_is_refused_at_load() -> None:
    subject = Subject.tiny("llama")
    for block in subject.model.model.layers:  # type: ignore[union-attr]
        block.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(ValueError, match="no two modules of block 0 satisfy resid_in@0"):
        Subject(subject.model, subject.tokenizer, name="scaled")


def test_transformers_own_arguments_are_passed_on() -> None:
    subject = Subject.load(FOLDER, device_map="cpu", attn_implementation="eager")
    assert subject.model.config._attn_implementation == "eager"


def test_a_sharded_checkpoint_loads_like_a_whole_one(tmp_path: Path) -> None:
    whole = Subject.organism()
    whole.model.save_pretrained(tmp_path, max_shard_size="1MB")
    whole.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert Subject.load(tmp_path).fingerprint == whole.fingerprint


def test_a_remote_subject_has_no_weights_here_but_all_places(words: list[str]) -> None:
    far, near = Subject.load(FOLDER, remote=True), Subject.organism()
    assert all(parameter.device.type == "meta" for parameter in far.model.parameters())
    assert far.anatomy.places == near.anatomy.places and "not verified" in str(far.card)


def test_a_simulated_remote_capture_equals_the_local_one_and_refuses_toggles_by_name(words: list[str]) -> None:
    far, near = Subject.load(FOLDER, remote="local"), Subject.organism()
    texts, at = [" ".join(words[:5]), words[7]], [Site(2, "neurons"), Site(4, "heads")]
    one, other = far.capture(texts, at), near.capture(texts, at)
    assert all(torch.equal(one[site], other[site]) for site in at) and torch.equal(one.text, other.text)
    toggle = Steer(torch.ones(128), Site(1, "resid_out"))
    with pytest.raises(ValueError, match=r"Steer\(.*can only act on a local model"), far.under(toggle):
        far.capture(texts, at)


def test_open_understands_what_a_notebook_names() -> None:
    assert Subject.open("tiny:gpt2").name == "tiny:gpt2:0" and Subject.open("tiny:gpt2:7").name == "tiny:gpt2:7"
    assert Subject.open("organism").name == "organism" and Subject.open(str(FOLDER)).n_layers >= 6
    with pytest.raises(ValueError, match="got family 'elephant', expected organism or one of llama"):
        Subject.open("tiny:elephant")
    with pytest.raises(ValueError, match="got 'tiny:gpt2:x', expected tiny:FAMILY or tiny:FAMILY:SEED"):
        Subject.open("tiny:gpt2:x")
    with pytest.raises(ValueError, match="got 'tiny:gpt2:²', expected tiny:FAMILY or tiny:FAMILY:SEED"):
        Subject.open("tiny:gpt2:²")


def test_a_model_in_training_mode_is_refused() -> None:
    subject = Subject.tiny()
    with pytest.raises(ValueError, match=r"in training mode, expected a frozen model\. Call model\.eval\(\)"):
        Subject(subject.model.train(), subject.tokenizer, name="busy")


def test_the_untrained_twin_has_the_shape_of_the_organism_and_other_weights() -> None:
    twin, organism = Subject.tiny("organism", seed=1), Subject.organism()
    assert twin.anatomy == organism.anatomy and twin.fingerprint != organism.fingerprint
    assert Subject.tiny("organism", seed=1).fingerprint == twin.fingerprint
    assert Subject.tiny("organism", seed=2).fingerprint != twin.fingerprint


def test_weights_are_frozen_and_the_fingerprint_sees_one_changed_number() -> None:
    subject = Subject.load(FOLDER)
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    changed = Subject.load(FOLDER)
    with torch.no_grad():
        changed.model.model.norm.weight[3] += 1e-3  # type: ignore[union-attr, operator, index]
    changed = Subject(changed.model, changed.tokenizer, name="changed")
    assert Subject.load(FOLDER).fingerprint == subject.fingerprint != changed.fingerprint


# Bad input


def test_no_texts_and_empty_texts_are_refused(subject: Subject) -> None:
    for call in (
        lambda texts: subject.capture(texts, [Site(0, "resid_out")]),
        lambda texts: subject.generate(texts, max_new_tokens=1),
        lambda texts: subject.nll(texts),
    ):
        with pytest.raises(ValueError, match="got an empty list, expected at least one text"):
            call([])
        with pytest.raises(ValueError, match="got one string, expected a list"):
            call("one text")
        for wrong in (5, None, iter(["the"])):
            with pytest.raises(ValueError, match=r"texts: got .*, expected a list of texts"):
                call(wrong)
    with pytest.raises(ValueError, match="text 1 is empty"):
        subject.capture([[5, 6], []], [Site(0, "resid_out")])
    with pytest.raises(ValueError, match="text 0 has 1 token, expected at least two"):
        subject.nll([""])


def test_a_text_beyond_the_context_is_refused_or_cut(subject: Subject, words: list[str]) -> None:
    long = " ".join(words[:5] * 200)
    with pytest.raises(ValueError, match="text 1 has 1001 tokens, but the model's context is 512"):
        subject.capture([words[0], long], [Site(0, "resid_out")])
    assert subject.nll([long], cut=True).isfinite().all()
    with pytest.raises(ValueError, match=r"make 513 tokens, but the context is 512\. Ask for at most 511"):
        subject.generate([[5]], max_new_tokens=512)


def test_an_unknown_word_is_named_with_the_nearest(subject: Subject, words: list[str]) -> None:
    wrong = max(words, key=len)[:-1] + "q"
    with pytest.raises(
        ValueError, match=f"'{wrong}' is not in this model's vocabulary.* Nearest known: .*{max(words, key=len)}"
    ):
        subject.tokenize([f"{words[0]} {wrong} {words[1]}"])


def test_a_site_beyond_the_last_layer_and_no_site_are_refused(subject: Subject, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"neurons@3: got layer 3, but this model has 3 blocks, 0 to 2"):
        subject.capture(words[:2], [Site(3, "neurons")])
    with pytest.raises(ValueError, match="got no site"):
        subject.capture(words[:2], [])


@pytest.mark.parametrize("tokens", ["first", [[True]], [[True, False], [True]], -1, [True, True], [["a"], ["b"]]])
def test_a_wrong_token_selection_is_refused(subject: Subject, words: list[str], tokens: object) -> None:
    with pytest.raises(ValueError, match="capture: got"):
        subject.capture(words[:2], [Site(0, "neurons")], tokens=tokens)  # type: ignore[arg-type]


def test_wrong_generation_settings_are_refused(subject: Subject, words: list[str]) -> None:
    with pytest.raises(ValueError, match="got max_new_tokens=0"):
        subject.generate(words[:1], max_new_tokens=0)
    with pytest.raises(ValueError, match="got temperature -1"):
        subject.generate(words[:1], max_new_tokens=1, temperature=-1)


# Captures


def test_a_mask_chooses_exactly_its_tokens(subject: Subject, words: list[str]) -> None:
    texts, site = [" ".join(words[:4]), " ".join(words[5:7])], Site(1, "neurons")
    every = subject.capture(texts, [site])
    some = subject.capture(texts, [site], tokens=[[True, False, False, True, False], [False, False, True]])
    assert some.text.tolist() == [0, 0, 1] and some.position.tolist() == [0, 3, 2]
    torch.testing.assert_close(some[site], every[site][[0, 3, 7]])
    last = subject.capture(texts, [site], tokens="last")
    torch.testing.assert_close(last[site], every[site][[4, 7]])
    mean = subject.capture(texts, [site], tokens="mean")
    torch.testing.assert_close(mean[site][0], every[site][:5].mean(0), rtol=1e-5, atol=1e-6)
    none = subject.capture(texts, [site], tokens=[[False] * 5, [False] * 3])
    assert none[site].shape == (0, 48)


def test_a_number_at_padding_never_enters_a_mean() -> None:
    """An overflow at a token that isn't there, as half precision gives, is no number of the text."""
    mask = torch.tensor([[False, True, True]])
    value = torch.tensor([[[torch.inf], [1.0], [3.0]]])
    batch = Batch([0], torch.zeros(1, 3, dtype=torch.long), mask, torch.tensor([[0, 0, 1]]))
    assert _pick(value, batch, [torch.arange(2)], True).tolist() == [[2.0]]
    step = Step(batch.positions, mask, torch.tensor([2]))
    assert pooled(value, step, "mean").tolist() == [[2.0]]


def test_a_site_that_only_some_pieces_of_a_batch_reach_is_refused(subject: Subject, words: list[str]) -> None:
    """What is left of it would be taken for the next batch."""
    site, tokens = Site(1, "mlp_out"), subject.tokenize([" ".join(words[:3])])
    batch = left_pad(tokens.ids, [0], pad=0, device=subject.device)
    half = next(batch.pieces(2))
    forwards = [(batch, lambda: subject.model(input_ids=half.ids))]
    with pytest.raises(ValueError, match=r"capture: mlp_out@1 was reached by 2 of 4 tokens of a batch"):
        collect(subject.model, subject.anatomy, [site], tokens, "all", iter(forwards), 1, progress=False)


def test_a_progress_bar_waits_two_seconds_and_counts_batches(
    subject: Subject, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict = {}
    monkeypatch.setattr("workbench.capture.tqdm", lambda items, **options: seen.update(options) or items)
    subject.capture(words[:6], [Site(0, "up")], batch=4)
    assert seen["delay"] == 2 and seen["total"] == 3 and not seen["disable"]


def test_offsets_point_at_the_words(subject: Subject, words: list[str]) -> None:
    text = f"{words[3]}  {words[50]} {words[7]}"
    capture = subject.capture([text], [Site(0, "resid_in")])
    spans = [text[low:high] for low, high in capture.offsets.tolist()]
    assert spans == ["", words[3], words[50], words[7]] and capture.position.tolist() == [0, 1, 2, 3]
    bare = subject.capture([text], [Site(0, "resid_in")], special=False)
    assert len(bare.text) == 3 and torch.equal(bare.ids, capture.ids[1:])


def test_a_site_that_was_not_captured_is_named(subject: Subject, words: list[str]) -> None:
    capture = subject.capture(words[:2], [Site(0, "up")])
    with pytest.raises(KeyError, match="up@1 was not captured, only up@0"):
        capture[Site(1, "up")]
    assert Site(0, "up") in capture and len(capture) == 1 and "up@0 (4, 48)" in repr(capture)


def test_batches_hold_every_text_once_and_stay_within_the_limit() -> None:
    lengths = [3, 50, 7, 7, 1, 20, 50, 9]
    groups = list(batches(lengths, 60))
    assert sorted(index for group in groups for index in group) == list(range(8))
    assert all(len(group) == 1 or max(lengths[index] for index in group) * len(group) <= 60 for group in groups)


# Generation


def test_sampling_depends_on_the_seed_and_not_on_the_batch(subject: Subject, words: list[str]) -> None:
    prompts = [" ".join(words[:3]), " ".join(words[3:10])]
    one = subject.generate(prompts, max_new_tokens=12, temperature=1.0, seed=1)
    assert one == subject.generate(prompts, max_new_tokens=12, temperature=1.0, seed=1)
    assert one != subject.generate(prompts, max_new_tokens=12, temperature=1.0, seed=2)
    assert one.ids[0] == subject.generate(prompts[:1], max_new_tokens=12, temperature=1.0, seed=1).ids[0]
    assert one.ids == subject.generate(prompts, max_new_tokens=12, temperature=1.0, seed=1, batch=1).ids


def test_sampling_follows_the_model_s_probabilities(subject: Subject, words: list[str]) -> None:
    logprobs = next(subject.predictions([words[0]]))[2][-1]
    n = 3000
    drawn = subject.generate([words[0]] * n, max_new_tokens=1, temperature=1.0, seed=0, batch=8192)
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn.ids]), minlength=len(logprobs)).double()
    expected = logprobs.double().exp() * n
    likely = expected >= 5
    statistic = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    degrees = int(likely.sum()) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5, (statistic, degrees)  # mean + 4 sd of chi-square


def test_padding_needs_no_token_that_the_model_knows(subject: Subject) -> None:
    """A tokenizer may have got a padding token for which the model has no row."""
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[a token of its own]"})
    wide = Subject(subject.model, tokenizer, name="wide", verify=False)
    assert tokenizer.pad_token_id >= wide.anatomy.vocab
    prompts = [[5, 6, 7], [8]]
    assert wide.generate(prompts, max_new_tokens=4).ids == subject.generate(prompts, max_new_tokens=4).ids


def test_tokens_are_streamed_as_they_come(subject: Subject, words: list[str]) -> None:
    heard: list[tuple[int, int, str]] = []
    prompts = [" ".join(words[:3]), words[9]]
    made = subject.generate(prompts, max_new_tokens=5, on_token=lambda *facts: heard.append(facts))
    for row in (0, 1):
        assert tuple(token for index, token, _ in heard if index == row) == made.ids[row]
    assert [index for index, _, _ in heard[:2]] in ([0, 1], [1, 0]), "rows should advance together"


# Directions that do not fit


def test_a_direction_of_the_wrong_width_or_model_is_refused(subject: Subject, words: list[str]) -> None:
    with (
        pytest.raises(
            ValueError, match=r"direction has 64 dims, resid_out@1 of tiny:llama:0 has 32. Was it made on another"
        ),
        subject.under(Steer(torch.ones(64), Site(1, "resid_out"))),
    ):
        pass
    from workbench import difference_in_means

    other = Subject.tiny("llama", seed=1)
    found = difference_in_means(other, words[:3], words[3:6], Site(1, "resid_out"))
    with pytest.raises(ValueError, match="was found on model"), subject.under(Steer(found, Site(1, "resid_out"))):
        pass
    assert subject.active == ()
