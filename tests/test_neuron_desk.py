"""NeuronDesk: what fires by hand, what is held, what is not computed again, numbers as the probes give them, words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from workbench import HFTP, Clamp, NeuronTokens, Site, Subject
from workbench.corpora import streams
from workbench.methods.neurons.contexts import Firing
from workbench.strength import mean_kl
from workbench.widgets import neuron
from workbench.widgets.face import Face
from workbench.widgets.neuron import N_CONTEXTS, VIEWS, NeuronDesk

TEXTS = ("the owl saw the king", "the king saw the owl near the grove", "a king lived near the owl")


@pytest.fixture(scope="module")
def whole(organism: Subject) -> NeuronDesk:
    """A desk whose memo all tests share: what is read of the sample is read once."""
    return NeuronDesk(organism)


def firing(values: list[float], text: list[int], ids: list[int]) -> Firing:
    return Firing(np.array(values), np.array(text), np.arange(len(text)), np.array(ids))


# --- hand-built truths of Firing


def test_shares_are_of_the_largest_value_whatever_its_sign() -> None:
    unit = firing([1.0, -4.0, 2.0], [0, 0, 0], [7, 8, 9])
    assert unit.peak == -4.0 and unit.shares.tolist() == [-0.25, 1.0, -0.5]
    with pytest.raises(ValueError, match="the unit is 0 on all 2 tokens"):
        firing([0.0, 0.0], [0, 0], [1, 2])


def test_words_that_come_often_are_ranked_by_their_mean_with_its_interval() -> None:
    unit = firing([4.0, 4.0, 1.0, 3.0, 2.0, 9.0, 10.0], [0] * 7, [5, 5, 6, 6, 6, 7, 8])
    table = unit.by_token(2)
    assert table["id"].tolist() == [5, 6] and table["count"].tolist() == [2, 3]
    assert table["share"].tolist() == pytest.approx([0.4, 0.2])
    half = 4.302653 * 0.1 / np.sqrt(3)  # Student's t for 2 degrees of freedom; sd of .1, .3, .2
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx([0.2 - half, 0.2 + half], rel=1e-6)
    wide = firing([10.0, 1.0, 9.0], [0] * 3, [5, 5, 5]).by_token(3)
    assert wide["high"].tolist() == [1.0], "no share passes 1"
    with pytest.raises(ValueError, match="no token comes 4 times"):
        unit.by_token(4)


def test_the_strongest_contexts_are_one_of_each_text_best_first() -> None:
    unit = firing([1.0, 5.0, 4.0, 8.0, 7.0, 2.0], [0, 0, 1, 2, 2, 3], [1] * 6)
    assert unit.strongest(3).tolist() == [3, 1, 2] and unit.strongest(9).tolist() == [3, 1, 2, 5]
    assert unit.around(2) == {3: 1.0, 4: 0.875}


# --- laws of the desk


def test_a_unit_is_what_a_capture_reads_without_first_tokens(organism: Subject) -> None:
    desk = NeuronDesk(organism, layer=2, neuron=5, texts=TEXTS)
    capture = organism.capture(TEXTS, [Site(2, "neurons")])
    kept = capture.position > 0
    unit = desk.unit()
    np.testing.assert_allclose(unit.firing.values, capture[Site(2, "neurons")][kept, 5].double().numpy(), rtol=1e-6)
    assert unit.firing.ids.tolist() == capture.ids[kept].tolist()


def test_a_neuron_is_held_at_its_own_maxima_and_a_feature_is_pushed_by_them(whole: NeuronDesk) -> None:
    desk = whole.changed(clamp=0.5)
    toggle: Any = desk.toggle()
    assert isinstance(toggle, Clamp) and toggle.units == ((Site(3, "neurons"), (257,)),)
    assert toggle.to == 0.5 * desk.unit().firing.peak
    other: Any = desk.toggle("random")
    assert other.units[0][1] == (desk.unit("random").index,) and desk.unit("random").index != 257
    push: Any = desk.changed(kind="feature", feature=3).toggle()
    assert (
        str(push).startswith("Steer(")
        and push.strength == 0.5 * desk.changed(kind="feature", feature=3).unit().firing.peak
    )
    assert float(push.direction.norm) == pytest.approx(1.0, abs=1e-6)


def test_a_feature_pushed_by_nothing_changes_nothing(whole: NeuronDesk) -> None:
    still = whole.changed(view="clamp", kind="feature", clamp=0.0)
    picture = still.picture()
    assert still.answers("clamped") == still.answers("untouched") and "nothing is pushed" in picture.words
    assert picture.value("next word moved, clamped") == 0.0 == picture.value("next word moved, random")


def test_what_is_told_of_a_clamp_is_what_clamping_by_hand_does(whole: NeuronDesk) -> None:
    subject, desk = whole.subject, whole.changed(view="clamp", clamp=1.0)
    prompts = desk.prompts.splitlines()

    def last() -> torch.Tensor:
        rows = {row: logprobs[-1].double() for row, _, logprobs in subject.predictions(prompts)}
        return torch.stack([rows[row] for row in range(len(prompts))])

    plain = last()
    with subject.under(Clamp(((Site(3, "neurons"), (257,)),), desk.unit().firing.peak)):
        held, written = last(), subject.generate(prompts, max_new_tokens=8)
    picture = desk.picture()
    assert picture.value("next word moved, clamped") == pytest.approx(mean_kl(plain, held), rel=1e-4)  # float32 logits
    assert desk.answers("clamped").texts == written.texts and not subject.active
    assert picture.value("next word moved, clamped") > 10 * picture.value("next word moved, random")


def test_layers_are_read_once_together_and_a_view_is_worked_out_once(
    organism: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = NeuronDesk(organism)
    for number in (3, 4, 5):
        for view in VIEWS:
            desk.changed(view=view, neuron=number).picture()
    counted = desk.memo.computed
    assert {name: counted[name] for name in ("captured", "spectrum", "relations", "labels")} == dict.fromkeys(
        ("captured", "spectrum", "relations", "labels"), 1
    )
    assert counted["answers"] <= 1 + 2 * 3, "untouched once, and each neuron and its random one"
    drawn = str(desk.changed(layer=1).picture().figure.to_json())
    assert counted["captured"] == 1 and counted["spectrum"] == 1
    monkeypatch.setattr(neuron, "MOST_VALUES", 1000)  # a model too large for that: each layer by itself
    alone = NeuronDesk(organism)
    alone.picture()
    assert str(alone.changed(layer=1).picture().figure.to_json()) == drawn
    assert alone.memo.computed["captured"] == 2


def test_the_strip_shows_each_texts_strongest_token_among_its_neighbours(whole: NeuronDesk) -> None:
    strip, unit = whole.picture().strip, whole.unit()
    assert strip is not None and len(strip.rows) == N_CONTEXTS
    tops = [max(value for value in row.values if value is not None) for row in strip.rows]
    assert tops[0] == 1.0 and tops == sorted(tops, reverse=True)
    assert {row.label for row in strip.rows[:1]} == {"100%"}
    best = unit.firing.strongest(1)[0]
    word = whole.subject.tokenizer.decode([int(unit.firing.ids[best])])
    assert strip.rows[0].tokens[strip.rows[0].values.index(1.0)] == word


def test_spectrum_and_read_out_tell_what_the_probes_find(whole: NeuronDesk) -> None:
    probe: Any = HFTP(layers=(3,), control="shuffle", n_shuffles=12, n_bootstrap=200, spectra="all")
    row = probe.run(whole.subject, streams.corpus("four")).table().query("neuron == 257 and level == 'phrase'").iloc[0]
    picture = whole.changed(view="spectrum").picture()
    assert (
        picture.value("phrase rate, beyond shuffled") == row["effect"] and picture.value("phrase rate, p") == row["p"]
    )
    labels: Any = NeuronTokens(layers=(3,), n_random=2000).run(whole.subject, None)
    told = whole.changed(view="read-out").picture().value("what it writes, this neuron")
    assert told == pytest.approx(labels.strength()[0, 257, labels.sides.index("write")].max())


def test_the_random_neuron_changes_with_its_number_alone(whole: NeuronDesk) -> None:
    drawn = [whole.changed(seed=seed).unit("random").index for seed in range(6)]
    assert len(set(drawn)) > 3 and drawn[0] == whole.changed(clamp=2.0, view="clamp").unit("random").index
    assert whole.changed(neuron=drawn[0]).unit("random").index != drawn[0]


# --- bad input


def test_what_can_not_be_shown_is_told_in_words(organism: Subject, whole: NeuronDesk) -> None:
    for settings, words in (
        ({"neuron": 384}, "neuron: got 384, expected a number from 0 to 383"),
        ({"layer": 6}, "layer: got 6, expected a number from 0 to 5"),
        ({"view": "smell"}, "expected one of 'contexts', 'spectrum'"),
        ({"kind": "feature", "feature": 24}, "feature: got 24, expected a number from 0 to 23"),
        ({"view": "clamp", "prompts": " \n "}, "expected some words"),
    ):
        with pytest.raises(ValueError, match=words):
            whole.changed(**settings)
    for view in ("spectrum", "relations"):
        with pytest.raises(ValueError, match="for single neurons, not for features"):
            whole.changed(view=view, kind="feature").picture()
    with pytest.raises(ValueError, match="'zzzyx' is not in this model's vocabulary"):
        whole.changed(view="clamp", prompts="the zzzyx").picture()
    with pytest.raises(ValueError, match="no token comes 4 times in this sample"):
        NeuronDesk(organism, texts=("the owl",)).picture()
    with pytest.raises(ValueError, match="neurons"):
        NeuronDesk(Subject.tiny("mixtral", verify=False))


def test_a_face_tells_what_is_wrong_and_goes_on(whole: NeuronDesk) -> None:
    face = Face(whole)
    face.change(view="spectrum", kind="feature")
    assert "for single neurons" in face.message.value and "strongest" in face.figure.layout.title.text
    face.change(kind="neuron")
    assert face.message.value == "" and "rate" in face.figure.layout.title.text
    assert face._controls["feature"].layout.display == "none" and face._controls["clamp"].layout.display == "none"
