"""The organism: what ships loads and does what its card says; training is repeatable, survives a kill, and learns."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from workbench import corpora
from workbench.organism import FOLDER, exam, mixture
from workbench.organism.architecture import Shape, model, tokenizer, words
from workbench.organism.card import page
from workbench.organism.train import Recipe, train

SMALL = Recipe(
    steps=100,
    threads=1,
    compile=False,
    warmup=10,
    shape=Shape(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=64, context=96),
    stages=(mixture.Stage(0.5, 2, 64, (6, 20)), mixture.Stage(1.0, 1, 96, (20, 60))),
)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine two threads of so small a model wait for each other: measured 27 s instead of 0.8 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shipped():
    return exam.load(FOLDER)


@pytest.fixture(scope="module")
def card():
    return json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train(SMALL, tmp_path_factory.mktemp("small"), log_every=20)


# --- what ships ---


def test_the_shipped_folder_is_plain_and_small():
    files = {path.name for path in FOLDER.iterdir()}
    needed = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert needed | {"CARD.md", "card.json", "curve.csv", "training.json"} == files
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    dtypes = {tensor.dtype for tensor in load_file(FOLDER / "model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_the_shipped_model_has_the_promised_architecture(shipped):
    config = shipped[0].config
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert config.num_hidden_layers >= 6 and config.max_position_embeddings >= 512
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.vocab_size == len(words()) == len(shipped[1])


def test_the_shipped_tokenizer_is_the_one_of_the_corpora(shipped):
    assert shipped[1].get_vocab() == tokenizer().get_vocab() == {word: i for i, word in enumerate(words())}


def test_every_text_survives_encoding_and_decoding(shipped):
    _, reader = shipped
    for phenomenon in corpora.PHENOMENA.values():
        text = next(phenomenon.documents("held_out", 1)).text
        ids = reader(text).input_ids
        assert ids[0] == reader.bos_token_id and reader.unk_token_id not in ids
        assert reader.decode(ids, skip_special_tokens=True) == text
        assert reader(text, add_special_tokens=False).input_ids == ids[1:]


def test_offsets_point_at_the_words(shipped):
    text = "the father of kalon is zebard ."
    encoded = shipped[1](text, return_offsets_mapping=True)
    spans = [text[start:stop] for start, stop in encoded["offset_mapping"][1:]]
    assert spans == text.split()


def test_padding_is_on_the_left(shipped):
    rows = shipped[1](["the code is", "the"], padding=True)
    assert rows.input_ids[1][0] == shipped[1].pad_token_id and rows.attention_mask[1][0] == 0


def test_every_target_of_the_card_is_met(card):
    judged = [row for row in card["rows"] if row["target"] is not None]
    assert {row["phenomenon"] for row in judged} == set(corpora.PHENOMENA)
    for row in judged:
        if row["measure"] == "share of braces":
            assert abs(row["value"] - row["target"]) <= 0.05
        else:
            assert row["value"] >= row["target"], row


def test_the_card_asks_what_was_promised(card):
    targets = {(row["phenomenon"], row["form"]): row["target"] for row in card["rows"]}
    assert targets["relations", "question, never asked"] == 0.80
    assert all(targets["relations", f"{form}, seen"] == 0.95 for form in corpora.relations.FORMS)
    assert targets["requests", "harmful"] == targets["requests", "harmless"] == 0.95
    assert targets["recall", "distance 64"] == 0.90 and targets["recall", "distance 256"] == 0.75
    assert targets["language", "to_velish"] == targets["language", "to_common"] == 0.90
    assert all(targets["streams", frame] == 0.95 for frame in corpora.streams.SLOT_CLASSES)
    assert targets["stories", "story"] == 0.90 and targets["code_styles", "open"] == 0.70


def test_measuring_again_agrees_with_the_card(shipped, card):
    again = exam.examine(*shipped, seed=card["exam_seed"] + 1, scale=0.15)  # other items, other fillers
    written = {(row["phenomenon"], row["form"]): row for row in card["rows"]}
    assert set(zip(again.phenomenon, again.form, strict=True)) == set(written)
    for row in again.itertuples():
        there = written[row.phenomenon, row.form]
        # two 95 % intervals of the same truth; 0.02 for the 25 comparisons made at once
        assert row.low - 0.02 <= there["high"] and there["low"] <= row.high + 0.02, (row, there)


def test_the_page_is_written_from_the_data(card):
    assert (FOLDER / "CARD.md").read_text(encoding="utf-8") == page(card)


def test_the_shipped_weights_were_made_by_the_default_recipe_from_the_texts_of_today(card):
    made = card["made"]
    assert made == json.loads((FOLDER / "training.json").read_text())
    assert made["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    assert made["texts"] == mixture.fingerprint(Recipe.seed, Recipe.steps), (
        "the corpora or the mixture changed: retrain"
    )


def test_the_curve_falls(card):
    curve = pd.read_csv(FOLDER / "curve.csv")
    assert list(curve.columns) == ["step", "tokens", "loss", *mixture.PHENOMENA]
    assert curve.step.is_monotonic_increasing and curve.tokens.iloc[-1] == card["made"]["tokens"]
    assert curve.loss.iloc[-1] < 0.5 * curve.loss.iloc[0]


def test_an_untrained_twin_fails_the_exam(shipped):
    table = exam.examine(model(Shape(), seed=1), shipped[1], scale=0.02)
    judged = table[table.target.notna() & (table.measure != "share of braces")]
    assert not judged.met.any()


# --- how it is raised ---


def test_a_hundred_small_steps_lower_the_loss(small):
    curve = pd.read_csv(small / "curve.csv")
    assert curve.step.tolist() == [20, 40, 60, 80, 100]
    assert curve.loss.iloc[-1] < 0.85 * curve.loss.iloc[0]
    assert exam.load(small)[0].config.hidden_size == 32
    assert not list(small.glob("*.part")) and not (small / "checkpoint.safetensors").exists()


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(small, tmp_path):
    bytes_of = {}
    for name, recipe in (("same", SMALL), ("other", replace(SMALL, seed=1))):
        bytes_of[name] = (train(recipe, tmp_path / name, log_every=20) / "model.safetensors").read_bytes()
    assert bytes_of["same"] == (small / "model.safetensors").read_bytes() != bytes_of["other"]


KILLED = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_organism import SMALL, train
train(SMALL, Path(sys.argv[1]), log_every=20, save_every=20)
"""


def test_a_killed_training_goes_on_and_ends_in_the_same_bytes(small, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), "the training was over, or had not begun, before it was killed"
    done = train(SMALL, tmp_path, resume=True, log_every=20)
    for name in ("model.safetensors", "curve.csv"):
        assert (done / name).read_bytes() == (small / name).read_bytes()


def test_resuming_with_another_recipe_is_refused(tmp_path):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("workbench.organism.train._show", stop)
        train(SMALL, tmp_path, log_every=25, save_every=20)
    with pytest.raises(ValueError, match="another recipe than the checkpoint"):
        train(replace(SMALL, peak_rate=1e-3), tmp_path, resume=True)


def test_compiling_without_a_compiler_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="--no-compile"):
        train(replace(SMALL, compile=True), tmp_path)


def test_training_leaves_the_global_settings_as_they_were(small):
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_batch_is_a_function_of_seed_and_number():
    for progress in (0.0, 0.5, 0.99):
        a, b, c = (mixture.batch(seed, 7, progress) for seed in (0, 0, 1))
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights)
        assert a.ids.shape != c.ids.shape or not np.array_equal(a.ids, c.ids)


def test_a_weight_belongs_to_the_word_that_is_predicted():
    read = mixture.batch(0, 3, 0.3)
    listed = np.array(words())
    heavy = np.argwhere(read.weights == mixture.ANSWER_WEIGHT["recall"])
    assert len(heavy) and set(listed[read.ids[heavy[:, 0], heavy[:, 1] + 1]]) <= set(corpora.recall.SYMBOLS)
    ends = np.argwhere(read.documents[:, 1:] != read.documents[:, :-1])
    assert (read.weights[ends[:, 0], ends[:, 1]] == 0).all()  # nobody guesses the next document
    assert (read.ids[ends[:, 0], ends[:, 1] + 1] == 1).all()  # which begins with <bos>


def test_the_mixture_keeps_its_shares():
    counts = np.zeros(len(mixture.PHENOMENA))
    for k in range(60):
        read = mixture.batch(0, k, 0.4)
        counts += np.bincount(read.phenomena[read.phenomena >= 0], minlength=len(counts))
    for name, share in zip(mixture.PHENOMENA, counts / counts.sum(), strict=True):
        assert share == pytest.approx(mixture.SHARES[name], abs=0.06), name


def test_recall_reaches_farther_as_training_goes_on():
    farthest = [mixture.stage_at(progress)[1] for progress in np.linspace(0, 1, 21)]
    assert farthest == sorted(farthest) and farthest[0] <= 16 and farthest[-1] > 256


# --- how it is measured ---


def test_the_intervals_cover_the_truth_as_often_as_they_claim():
    rng = np.random.default_rng(0)
    for truth in (0.5, 0.9):
        intervals = [exam.interval((rng.random(100) < truth).astype(float), 0) for _ in range(1000)]
        cover = np.mean([low <= truth <= high for low, high in intervals])
        assert 0.92 <= cover <= 0.98  # nominal 0.95; standard error 0.007, and shares are discrete
    means = [exam.interval(rng.beta(2, 1, 80), seed) for seed in range(300)]
    assert 0.90 <= np.mean([low <= 2 / 3 <= high for low, high in means]) <= 0.99


def test_a_missing_model_is_told_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model\.safetensors.*workbench\.organism\.train"):
        exam.load(tmp_path)
    with pytest.raises(ValueError, match="steps=0"):
        train(replace(SMALL, steps=0), tmp_path)
