"""The layer x strength map: its units, its cells against the slow way, early stopping, the rule of the choice."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from workbench import Direction, Site, Steer, Subject, difference_in_means
from workbench.corpora import stories
from workbench.methods.steering.contrast import Contrast
from workbench.methods.steering.side_effects import divergence_by_text, mean_residual_norm, own_likelihood
from workbench.methods.steering.steered import SteeringMapResult
from workbench.methods.steering.target import Target, last_logprobs
from workbench.probes.steering_map import SteeringMap, steering_map
from workbench.result import Result

TARGET = Target((20, 21, 22))


@functools.cache
def subject() -> Subject:
    return Subject.tiny()


@functools.cache
def texts() -> tuple[str, ...]:
    words = sorted(word for word in subject().tokenizer.get_vocab() if word.isalpha())
    return tuple(" ".join(words[k : k + 4 + k % 4]) for k in range(0, 60, 10))


def direction(seed: int = 0, **facts: object) -> Direction:
    vector = torch.randn(subject().anatomy.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, **facts)  # type: ignore[arg-type]


def mapped(strengths: tuple[float, ...] = (0.0, 0.5, 1.0), **settings: object) -> SteeringMapResult:
    options = {"layers": (0, 2), "n_controls": 3, "n_written": 3, "kl_limit": 99.0} | settings
    pushed = options.pop("direction", direction())
    return steering_map(
        subject(), pushed, strengths=strengths, prompts=texts()[:3], texts=texts()[3:], target=TARGET, **options
    )  # type: ignore[arg-type]


# --- laws


def test_a_strength_of_zero_changes_nothing_to_the_bit() -> None:
    result = mapped()
    assert result.strengths[0] == 0.0 and (result.kl[:, 0] == 0.0).all()
    np.testing.assert_array_equal(result.nll[0, 0], result.nll[1, 0])
    np.testing.assert_allclose(result.score[:, 0], np.broadcast_to(result.base_score, (2, 3)), atol=1e-5)  # other batch
    np.testing.assert_allclose(result.random_score[:, 0], result.base_score.mean(), atol=1e-5)
    np.testing.assert_array_equal(result.fluency[:, 0], np.broadcast_to(result.base_fluency, (2, 3)))
    table = result.table().query("strength == 0")
    assert not table["beyond_control"].any() and np.allclose(table["ppl_ratio"], 1.0)


def test_strengths_are_mean_norms_of_the_layer_without_each_texts_first_token() -> None:
    result = mapped()
    for i, layer in enumerate(result.layers):
        capture = subject().capture(texts()[3:], [Site(layer, "resid_out")])
        norms = capture[Site(layer, "resid_out")].norm(dim=1)[capture.position > 0]
        assert result.norm[i] == pytest.approx(float(norms.mean()), rel=1e-6)
    np.testing.assert_allclose(result.table()["added_norm"], result.table()["strength"] * np.repeat(result.norm, 3))


def test_the_mean_norm_does_not_depend_on_how_many_values_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = (Site(0, "resid_in"), Site(2, "resid_out"))
    whole = mean_residual_norm(subject(), texts(), sites)
    monkeypatch.setattr("workbench.methods.steering.side_effects.VALUES_AT_ONCE", 1)
    torch.testing.assert_close(mean_residual_norm(subject(), texts(), sites), whole, rtol=1e-6, atol=0)  # float32


@pytest.mark.parametrize("positions", ["all", "last", (1, 2)])
def test_a_cell_is_what_steering_alone_does(positions: object) -> None:
    """The slow way: one toggle, one forward per text, the distributions compared in full."""
    result = mapped((-1.0, 0.5), positions=positions)
    for i, layer in enumerate(result.layers):
        for j, strength in enumerate(result.strengths):
            push = strength * result.norm[i] * direction().unit().vector
            toggle = Steer(push, Site(layer, "resid_out"), positions=positions)  # type: ignore[arg-type]
            for k, text in enumerate(texts()[3:]):
                base = next(subject().predictions([text]))[2].double()
                with subject().under(toggle):
                    row = next(subject().predictions([text]))
                after, ids = row[2].double(), torch.tensor(row[1])
                kl = float((base[:-1].exp() * (base - after)[:-1]).sum(-1).mean())
                nll = float(-after[:-1].gather(1, ids[1:, None]).mean())
                assert result.kl[i, j, k] == pytest.approx(kl, rel=1e-3, abs=1e-6)  # float32 logits
                assert result.nll[i, j, k] == pytest.approx(nll, rel=1e-5)
            with subject().under(toggle):
                score = TARGET.score(last_logprobs(subject(), texts()[:3])[:, None])
                written = subject().generate(texts()[:3], max_new_tokens=3)
            np.testing.assert_allclose(result.score[i, j], score.numpy(), atol=1e-4)
            fluency = own_likelihood(subject(), texts()[:3], written.ids)
            np.testing.assert_allclose(result.fluency[i, j], fluency.numpy(), rtol=1e-5)


def test_small_batches_give_the_same_map() -> None:
    whole, small = mapped(), mapped(batch=12)
    for name in ("score", "kl", "nll", "random_score", "random_kl"):
        np.testing.assert_allclose(getattr(small, name), getattr(whole, name), atol=1e-4, err_msg=name)


def test_fluency_is_the_unpushed_models_surprise_at_the_text() -> None:
    made = subject().generate(texts()[:2], max_new_tokens=4)
    found = own_likelihood(subject(), texts()[:2], made.ids)
    expected = [-np.mean(values) for values in made.log_probs]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_a_layer_stops_beyond_the_limit_each_way_and_invents_nothing() -> None:
    result = mapped((-2.0, -1.0, 0.0, 1.0, 2.0), kl_limit=1e-6)
    table = result.table()
    assert table.groupby("strength")["run"].all().to_dict() == {-2: False, -1: True, 0: True, 1: True, 2: False}
    stopped = table.query("not run")
    assert stopped[["value", "kl", "ppl_ratio", "fluency", "control"]].isna().all(axis=None)
    assert not stopped["beyond_control"].any() and stopped["reason"].str.contains("a smaller push passed KL").all()
    assert "4 cells not run" in result.finding
    assert np.isnan(result.random_score[:, 0]).all(), "controls stop with the direction"


def test_a_direction_that_means_nothing_leaves_the_band_as_often_as_the_band_says() -> None:
    verdicts = [SteeringMap.null(seed).solve().table().query("run and layer == 0") for seed in range(200)]
    rate = np.mean([bool(table["beyond_control"].iloc[0]) for table in verdicts])
    assert 0.01 <= rate <= 0.075, rate  # nominal .05; at most 1.5 times that


# --- the choice


def hand_built(effect: list[list[float]], kl: list[list[float]], **facts: object) -> SteeringMapResult:
    """A map of two layers and two strengths; the target without a push is 0, random directions stay within +- 1."""
    shape = np.array(effect).shape
    made = SteeringMapResult(
        norm=np.array([1.0, 2.0]),
        score=np.array(effect)[..., None] * np.ones(3),
        random_score=np.zeros((*shape, 4)) + 0.3 * np.array([-1, 1, -1, 1]),
        kl=np.array(kl)[..., None] * np.ones(2),
        random_kl=np.zeros((*shape, 4)),
        nll=2.0 + np.array(kl)[..., None] * np.ones(2),
        fluency=np.zeros((*shape, 0)),
        base_score=np.zeros(3),
        base_nll=np.full(2, 2.0),
        base_fluency=np.zeros(0),
        n_tokens=np.ones(2),
        layers=(3, 7),
        strengths=(0.5, 1.0),
        kind="resid_out",
        target="score",
        unit="nats",
        direction="it",
        kl_limit=2.0,
        reach=None,
        seed=0,
    )
    return replace(made, **facts)  # type: ignore[arg-type]


def test_the_choice_is_the_cheapest_of_those_that_go_far_enough() -> None:
    result = hand_built([[5.0, 9.5], [2.0, 10.0]], [[0.1, 0.3], [0.05, 0.9]])
    chosen = result.best()
    assert chosen and (chosen.layer, chosen.strength) == (3, 1.0), "9.5 is nearly 10 and costs a third"
    assert "KL <= 2" in str(chosen) and chosen.added_norm == 1.0 and chosen.ppl_ratio == pytest.approx(np.exp(0.3))
    near = result.best(reach=4.0)
    assert near and (near.layer, near.strength) == (3, 0.5)
    assert (given := replace(result, reach=4.0).best()) and given == near
    cheap = result.best(max_kl=0.06)
    assert cheap and (cheap.layer, cheap.value) == (7, 2.0)
    assert result.best(reach=11.0) is None and result.best(max_kl=0.01) is None
    assert result.best(towards="less") is None
    fewer = replace(result, score=-result.score).best(towards="less")
    assert fewer and (fewer.layer, fewer.strength) == (3, 1.0)
    with pytest.raises(ValueError, match="expected 'more' or 'less'"):
        result.best(towards="up")  # type: ignore[arg-type]


def test_what_random_directions_do_as_well_is_no_choice() -> None:
    result = hand_built([[0.5, 0.6], [0.1, 0.2]], [[0.1, 0.3], [0.05, 0.9]])
    assert result.best() is None and "no push along 'it' within KL 2 moves it further" in result.finding
    far = replace(result, score=10 + result.score, reach=99.0)
    assert far.best() is None and "brings it to 99" in far.finding


def test_every_view_states_a_finding_and_survives_saving(tmp_path: Path) -> None:
    for result in (
        mapped(),
        mapped(n_written=0, n_controls=0),
        hand_built([[5.0, 9.5], [2.0, 10.0]], [[0.1, 0.3]] * 2),
    ):
        for view in result.views()["view"]:
            assert len(result.plot(view).layout.title.text) > 20
    effect, damage = mapped().plot("map").data
    assert effect.colorbar.x < damage.colorbar.x and effect.xaxis != damage.xaxis, "side by side, each with its scale"
    again = Result.load(mapped().save(tmp_path / "map"))
    assert isinstance(again, SteeringMapResult) and str(again.best()) == str(mapped().best())
    with pytest.raises(ValueError, match="got view 'best'"):
        again.plot("best")
    with pytest.raises(ValueError, match="got layer 1, expected one of 0, 2"):
        again.plot("strength", layer=1)


# --- several directions, and bad input


def test_each_direction_is_pushed_at_its_own_layer_and_kind() -> None:
    own = tuple(direction(k, site=Site(k, "resid_in")) for k in (0, 2))
    both = mapped(direction=own, layers=None)
    assert both.layers == (0, 2) and both.kind == "resid_in"
    one = mapped(direction=own[1], layers=(2,))
    np.testing.assert_allclose(both.score[1], one.score[0], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": (direction(),)}, "one without a site"),
        ({"direction": (direction(site=Site(0, "resid_out")),), "layers": (0, 1)}, "but directions for \\(0,\\) only"),
        (
            {"direction": tuple(direction(k, site=Site(0, "resid_out")) for k in (0, 1)), "layers": None},
            "expected one per layer, all of one kind",
        ),
        (
            {
                "direction": tuple(
                    direction(k, site=Site(k, kind)) for k, kind in enumerate(("resid_in", "resid_out"))
                ),
                "layers": None,
            },
            "expected one per layer, all of one kind",
        ),
        ({"direction": direction(model="another")}, "was found on model another"),
        ({"layers": (9,)}, "got layer 9, but this model has 3 blocks"),
        ({"strengths": ()}, "got no strengths"),
        ({"layers": ()}, "got no strengths, layers or directions"),
        ({"positions": "generated"}, "where nothing is generated yet"),
        ({"direction": Direction(torch.zeros(32))}, "the zero vector has no direction"),
    ],
)
def test_impossible_settings_are_refused_in_words(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapped(**settings)


def test_data_without_other_texts_and_texts_of_one_token_are_refused() -> None:
    probe = SteeringMap(direction(), TARGET)
    with pytest.raises(ValueError, match=r'expected data \{"prompts"'):
        probe.run(subject(), list(texts()))
    with pytest.raises(ValueError, match="text 1 has one token"):
        divergence_by_text(subject(), [(8, 9), (8,)], 2, lambda arms: subject().untoggled())
    with pytest.raises(ValueError, match="every text has one token only"):
        mean_residual_norm(subject(), [(8,)], (Site(0, "resid_in"),))


def test_a_log_odds_that_is_enough_may_be_negative() -> None:
    assert mapped((0.0, 0.5), reach=-1.0).reach == -1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "a text"}, "got one string, expected a list of texts"),
        ({"texts": "a text"}, "got one string, expected a list of texts"),
        ({"target": "sorry"}, r"expected a Target or a list of words: \['sorry'\]"),
    ],
)
def test_one_string_is_not_taken_apart_into_letters(given: dict, message: str) -> None:
    options = {"prompts": texts()[:3], "texts": texts()[3:], "target": TARGET} | given
    with pytest.raises(ValueError, match=message):
        steering_map(subject(), direction(), (0,), n_controls=2, n_written=0, **options)  # type: ignore[arg-type]


# --- the organism


def test_refusal_is_switched_on_in_the_middle_at_little_cost_to_stories() -> None:
    organism, known = Subject.organism(), Contrast.requests().take(60)
    refusal = difference_in_means(organism, known.positive, known.negative, Site(4, "resid_in"), name="refusal")
    other = [item.prompt for item in stories.items("held_out", 0)][::20][:4]
    result = steering_map(
        organism,
        refusal,
        (2, 4),
        (-1.0, 0.25, 1.0),
        prompts=Contrast.requests("held_out").negative[:6],
        texts=other,
        target=["sorry"],
        positions="prompt",
        n_controls=4,
        reach=3.0,
    )
    chosen = result.best()
    assert chosen and (chosen.layer, chosen.strength) == (4, 1.0) and chosen.kl < 0.4, chosen
    less = result.best(towards="less")
    assert less and less.strength == -1.0
    weak = result.table().query("strength == 0.25")
    assert (weak["effect"] > 0).all() and (weak["value"] < 0).all(), "a weak push is felt and does not refuse"
