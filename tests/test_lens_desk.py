"""LensDesk: the last layer is the model, one forward per text, numbers as the probe gives them, its controls, words."""

from __future__ import annotations

import copy
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import Sequence

from workbench import LogitLens, Site, Subject
from workbench.methods.lens.lens import ReadOut
from workbench.methods.lens.tuned_lens import TunedLens
from workbench.toggles import Clamp
from workbench.widgets.face import Face
from workbench.widgets.lens import OTHERS, TWIN, VIEWS, LensDesk, leads_after


@pytest.fixture
def desk(organism: Subject) -> LensDesk:
    return LensDesk(organism)


def neutral(subject: Subject) -> TunedLens:
    """A tuned lens that was never trained: the logit lens."""
    width, layers = subject.anatomy.d_model, subject.n_layers
    return TunedLens(torch.zeros(layers, width, width), torch.zeros(layers, width), subject.fingerprint or "")


# --- laws


def test_the_last_layer_says_what_the_model_says_and_is_no_distance_from_it(desk: LensDesk) -> None:
    own = desk.read()
    assert (own.kl[-1] == 0).all() and (own.rank[-1] == 1).all()
    ((_, _, logprobs),) = desk.subject.predictions([desk.text])
    np.testing.assert_array_equal(own.top_ids[-1, :, 0], logprobs.argmax(-1).numpy())
    chance = logprobs.exp().amax(-1).numpy()
    np.testing.assert_allclose(own.top_probability[-1, :, 0], chance, atol=1e-5)  # another batch of float32
    np.testing.assert_allclose(np.exp(own.log_prob[-1]), chance, atol=1e-5)


def test_an_untrained_tuned_lens_is_the_logit_lens_to_the_bit(organism: Subject, desk: LensDesk) -> None:
    tuned = LensDesk(organism, lens="mine", lenses={"mine": neutral(organism)})
    np.testing.assert_array_equal(tuned.read().kl, desk.read().kl)
    assert "trained to guess" in tuned.picture().words and not desk.picture().words
    assert "mine" in tuned.picture().code


def test_everything_but_the_last_layer_comes_from_elsewhere_in_the_control_of_other_positions(desk: LensDesk) -> None:
    own, elsewhere = desk.read(), desk.changed(control=OTHERS).read(OTHERS)
    np.testing.assert_array_equal(elsewhere.kl[-1], own.kl[-1])
    shifts = [
        k for k in range(1, own.kl.shape[1]) if np.array_equal(np.roll(own.top_ids, k, 1)[:-1], elsewhere.top_ids[:-1])
    ]
    assert len(shifts) == 1, "every position is read at another one, and all of them as far away"
    assert (elsewhere.kl[:-1].mean(1) > own.kl[:-1].mean(1))[2:].all()


def test_a_text_costs_one_forward_whatever_is_looked_at(desk: LensDesk) -> None:
    desk = desk.changed(control=OTHERS)
    seen: list[int] = []
    with ExitStack() as undo:
        handle = desk.subject.model.register_forward_hook(lambda *_: seen.append(1))
        undo.callback(handle.remove)
        for view in VIEWS:
            for position in (0, 3, 7):
                desk.changed(view=view, position=position, measure="KL").picture()
        assert len(seen) == 2, "the text, and the proof of the unembedding"
        desk.changed(text="long ago a singer came to the").picture()
        assert len(seen) == 3


def test_the_map_is_the_probes_read_out(desk: LensDesk) -> None:
    probe: Any = LogitLens(k=5).run(desk.subject, [desk.text])
    own = desk.read()
    np.testing.assert_allclose(own.kl, probe.kl, atol=1e-6)
    np.testing.assert_array_equal(own.rank, probe.rank)
    np.testing.assert_array_equal(own.top_ids, probe.top_ids)
    figure = desk.changed(measure="entropy", position=3).picture().figure
    shown = np.array(figure.data[0].z)[::-1]  # the last layer stands on top
    np.testing.assert_allclose(shown, probe.entropy_bits[:, : shown.shape[1]], atol=1e-6)
    assert desk.picture().value("already final after 3 blocks") == (probe.rank[3] == 1).mean()
    curves = {trace.name: trace for trace in desk.changed(view="over depth", measure="rank").picture().figure.data}
    mean = probe.summary().query("measure == 'rank'")["value"]  # a geometric mean
    np.testing.assert_allclose(curves["all positions"].y, mean, rtol=1e-9)


def test_under_a_toggle_the_changed_model_is_read(organism: Subject, desk: LensDesk) -> None:
    plain = desk.read()
    with organism.under(Clamp(((Site(2, "neurons"), tuple(range(384))),))):
        held = desk.read()
    np.testing.assert_array_equal(held.kl[-1], plain.kl[-1])
    assert not np.allclose(held.entropy_bits[3:], plain.entropy_bits[3:])
    np.testing.assert_array_equal(desk.read().kl, plain.kl)


# --- hand-built truths


def test_a_word_leads_from_where_it_is_on_top_to_the_end() -> None:
    rank = np.array([[1, 5, 1, 9], [1, 1, 3, 9], [1, 1, 1, 9], [1, 1, 1, 1]])  # (layer, position)
    empty = np.zeros((4, 4))
    found = ReadOut(empty, empty, rank, empty[..., None], empty[..., None], empty)
    assert leads_after(found).tolist() == [0, 1, 2, 3]


def test_half_of_the_organism_knows_more_of_the_end_than_its_twin_and_than_other_positions(desk: LensDesk) -> None:
    own, half = (desk.read().rank == 1).mean(1), 3
    for control in (TWIN, OTHERS):
        assert own[half] > 2 * (desk.changed(control=control).read(control).rank == 1).mean(1)[half]


def test_a_token_of_the_strip_is_chosen_and_another_text_is_looked_at_from_its_end(desk: LensDesk) -> None:
    face = Face(desk)
    assert face.strip is not None
    face.strip.selected = [0, 4]
    assert face.desk.settings["position"] == 4 and face._controls["position"].value == 4
    face.change(text="long ago")
    assert face.message.value == "" and face.desk.settings["position"] == 2, "<bos> long ago"
    assert desk.changed(text="long ago a singer", position=1).position == 1


def test_the_command_makes_the_same_desk(desk: LensDesk) -> None:
    longer = desk.changed(text=" ".join(["the owl foraged"] * 10))
    for one in (longer, longer.changed(position=desk.position)):  # a fresh desk has this position, of another text
        told = dict(word.split("=", 1) for word in shlex.split(one.command()) if "=" in word)
        assert LensDesk(desk.subject, text=told["text"], position=int(told.get("position", -1))) == one


def test_a_long_text_shows_the_tokens_around_the_position(desk: LensDesk) -> None:
    long = desk.changed(text=" ".join(["the owl foraged"] * 30))
    for position, first in ((0, 0), (45, 40), (90, 81)):
        cells = long.changed(position=position).picture().figure.data[0]
        assert len(cells.x) == 10 and cells.x[0].startswith(f"{first} ")


# --- bad input


def test_what_can_not_be_read_is_told_in_words(organism: Subject, desk: LensDesk, tmp_path: Path) -> None:
    for settings, words in (
        ({"text": "the zzzyx"}, "'zzzyx' is not in this model's vocabulary"),
        ({"text": "  \n "}, "expected some words"),
        ({"text": "the owl " * 400}, "tokens"),
        ({"position": 99}, "position: got 99, expected a number from 0 to 19"),
        ({"control": "nobody"}, "expected one of 'untrained twin', 'other positions'"),
    ):
        with pytest.raises(ValueError, match=words):
            desk.changed(**settings)
    with pytest.raises(ValueError, match=r"lens: got 'mine', expected 'logit' or the path"):
        desk.changed(lens="mine").picture()
    with pytest.raises(ValueError, match="parameter text: got 5, expected str"):
        LensDesk(organism, text=5)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="is no file"):
        desk.changed(lens=str(tmp_path / "no.safetensors")).picture()
    tiny = Subject.tiny("gpt2", verify=False)
    with pytest.raises(ValueError, match="control: got 'untrained twin', expected one of 'other positions'"):
        LensDesk(tiny, control=TWIN)
    bare: Any = copy.deepcopy(tiny.tokenizer)
    bare.backend_tokenizer.post_processor = Sequence([])  # no <bos> before a text
    other = Subject(tiny.model, bare, name="bare", verify=False)
    with pytest.raises(ValueError, match="bare splits the text otherwise, expected a twin with its tokenizer"):
        LensDesk(tiny, text="the owl", twin=other).picture()
    with pytest.raises(ValueError, match="no other positions to compare with"):
        LensDesk(other, text="owl").picture()
