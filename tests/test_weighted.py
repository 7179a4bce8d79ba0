"""WeightedSteer: the toy whose causal layer is known, training through the frozen model, two passes, and bad input."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from workbench import Direction, Site, Steer, Subject, difference_in_means
from workbench.corpora import requests
from workbench.methods.steering.controlled_world import LAYERS, WIDTH, ControlledWorld
from workbench.methods.steering.controller import Controller
from workbench.methods.steering.controller_training import Trained, Training, model_response, train
from workbench.toggle import Toggle
from workbench.toggles.weighted import WeightedSteer

EDITS = tuple(Site(layer, "resid_out") for layer in range(LAYERS))
QUIET = Training(progress=False)


@functools.cache
def trained(seed: int, causal: int) -> Trained:
    return ControlledWorld.of(seed, causal).trained(seed=seed)


def moved(made: Trained, world: ControlledWorld) -> tuple[float, float]:
    """Mean norm of gate times weights on wanted prompts and on the others."""
    gates, weights = made.controller(world.values)
    norms = (gates[:, None] * weights).norm(dim=1)
    return float(norms[world.wanted].mean()), float(norms[~world.wanted].mean())


# --- the toy


@pytest.mark.parametrize("causal", range(LAYERS))
@pytest.mark.parametrize("seed", [0, 1])
def test_the_causal_layer_gets_the_largest_weight_and_others_are_left_alone(causal, seed):
    world, made = ControlledWorld.of(seed, causal), trained(seed, causal)
    table = made.controller.table(world.values, world.wanted.numpy())
    assert table["weight"].idxmax() == causal and float(table["weight"][causal]) > 0.9 * LAYERS
    assert float(table["gate_auc"][0]) == 1.0
    wanted, others = moved(made, world)
    assert others < 0.03 * wanted
    gates = made.controller(world.values)[0]
    assert torch.equal(gates >= 0.5, world.wanted), "a hard gate at one half leaves the others exactly alone"


@pytest.mark.parametrize("seed", [0, 1])
def test_paper_mode_fails_at_it_its_weights_learn_nothing_and_others_are_steered_away(seed):
    world = ControlledWorld.of(seed, 2)
    made = world.trained("paper", seed)
    table = made.controller.table(world.values, world.wanted.numpy())
    assert float(table["gate_auc"][0]) == 1.0 and float(table["gate_others"][0]) < 0
    assert table["weight"].between(0.4, 0.6).all(), "no task gradient reaches a layer: none stands out as above"
    wanted, others = moved(made, world)
    assert others > 0.5 * wanted


def test_where_the_model_answers_nothing_no_layer_is_preferred():
    world = ControlledWorld.of(0, 1)

    def deaf(rows: torch.Tensor, pushes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = 0.0 * pushes.sum(1)
        return nothing, nothing

    made = world.trained(response=deaf)
    assert made.controller.table(world.values, world.wanted.numpy())["weight"].tolist() == [1.0] * LAYERS


def test_the_same_seed_gives_the_same_controller_and_touches_no_global_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = ControlledWorld.of(0, 1).trained()
    assert again.controller == trained(0, 1).controller and hash(again.controller) == hash(trained(0, 1).controller)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.controller != trained(1, 1).controller


def test_training_stops_early_and_keeps_the_epoch_that_was_best_on_held_out_rows():
    losses = trained(0, 1).losses
    held = losses[losses["split"] == "held out"].set_index("epoch")
    assert len(held) < QUIET.epochs
    assert held.loc[held["kept"], "total"].iloc[0] <= held["total"].min() + 1e-3  # the gain that counts as one


@pytest.mark.parametrize("mode", ["corrected", "paper"])
def test_the_losses_that_are_told_do_not_depend_on_the_size_of_a_batch(mode):
    """Held-out rows come class by class: a mean over batches would count each class as if the other were fine."""
    world, one = ControlledWorld.of(), replace(QUIET, mode=mode, rate=0.0, epochs=1)
    whole, parts = (
        train(
            world.values,
            world.wanted.numpy(),
            world.response,
            reads=EDITS[:1],
            edits=EDITS,
            training=replace(one, batch=batch),
        ).losses
        for batch in (512, 12)
    )
    columns = ["gate", "behaviour", "kl", "total"]
    np.testing.assert_allclose(parts[columns], whole[columns], rtol=1e-4, atol=1e-6)  # float32 sums


def test_rows_of_one_kind_or_too_few_are_refused():
    world = ControlledWorld.of()
    for labels, message in (([True] * 8, "rows of both kinds"), ([True] + [False] * 7, "got 1 row of one class")):
        with pytest.raises(ValueError, match=message):
            train(world.values[:8], labels, world.response, reads=EDITS[:1], edits=EDITS)
    with pytest.raises(ValueError, match="at least 1"):
        train(world.values, world.wanted.numpy(), world.response, reads=[], edits=[], training=replace(QUIET, epochs=0))
    with pytest.raises(ValueError, match="needs the response"):
        train(world.values, world.wanted.numpy(), None, reads=EDITS[:1], edits=EDITS)


# --- through the frozen model


def prompts(n: int = 6) -> tuple[list[str], list[str]]:
    """Requests to sell, which the organism answers as it does the others: nothing in it refuses them."""
    nouns = requests.HARMLESS_NOUNS[:n]
    others = [requests.prompt(verb, noun) for noun in nouns for verb in ("paint", "wash")]
    return [requests.prompt("sell", noun) for noun in nouns], others


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt"])
def test_the_response_is_what_the_toggle_does_and_has_the_right_slope(family):
    subject = Subject.tiny(family, verify=False)
    texts, sites = prompts(2)[1], [Site(0, "resid_out"), Site(1, "resid_out")]
    vector = torch.linspace(-1, 1, subject.anatomy.d_model)
    respond = model_response(subject, texts, vector, sites, [3, 5])
    rows = torch.arange(len(texts))

    def behaviour() -> torch.Tensor:
        found = {row: log_p[-1, [3, 5]].logsumexp(0) for row, _, log_p in subject.predictions(texts)}
        return torch.stack([found[row] for row in range(len(texts))])

    with subject.under(Steer(vector, sites[0], 2.0) | Steer(vector, sites[1], 0.5)):
        expected = behaviour()
    pushes = torch.tensor([[2.0, 0.5]] * len(texts), requires_grad=True)
    score, kl = respond(rows, pushes)
    torch.testing.assert_close(score.detach(), expected, rtol=1e-4, atol=1e-4)  # fp32
    assert (kl > 0).all() and respond(rows, torch.zeros_like(pushes))[1].abs().max() < 1e-5
    (slope,) = torch.autograd.grad(score.sum(), [pushes])
    step = torch.tensor([[0.05, 0.0]])
    rise = (respond(rows, pushes.detach() + step)[0] - respond(rows, pushes.detach() - step)[0]) / 0.1
    torch.testing.assert_close(slope[:, 0], rise.detach(), rtol=0.05, atol=2e-3)  # central difference in fp32


def test_training_leaves_the_model_without_gradients_hooks_or_changes():
    subject = Subject.tiny("llama")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    flags = [p.requires_grad for p in subject.model.parameters()]
    direction = Direction(torch.linspace(-1, 1, subject.anatomy.d_model))
    sites = [Site(0, "resid_out"), Site(1, "resid_out")]
    toggle, made = WeightedSteer.fit(
        subject, *prompts(), direction, reads=sites, edits=sites, behaviour=[3], training=replace(QUIET, epochs=2)
    )
    assert all(p.grad is None for p in subject.model.parameters())
    assert [p.requires_grad for p in subject.model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
    assert made.controller.model == subject.fingerprint and toggle.threshold == 0.5
    with pytest.raises(ValueError, match="got 2 reads and 0 edits, expected some of each"):
        WeightedSteer.fit(subject, *prompts(), direction, reads=sites, edits=[], behaviour=[3])
    with pytest.raises(ValueError, match="was trained on model"), Subject.tiny("llama", 1).under(toggle):
        pass


def test_on_the_organism_a_controller_refuses_what_it_was_told_to_and_hardly_anything_else():
    subject = Subject.organism()
    nouns = requests.HARMLESS_NOUNS
    asked = {
        split: [requests.prompt("sell", n) for n in some]
        for split, some in (("train", nouns[:16]), ("test", nouns[16:]))
    }
    verbs = [verb for verb in requests.HARMLESS_VERBS if verb != "sell"]
    others = {"train": [requests.prompt(v, n) for n in nouns[:16] for v in verbs[::2]]}
    others["test"] = [requests.prompt(v, n) for n in nouns[16:] for v in verbs]
    at = Site(3, "resid_out")
    harmful = [i.prompt for i in requests.items("train") if i.form == "harmful"][:60]
    refuse = difference_in_means(subject, harmful, others["train"], at, name="refusal")
    toggle, _ = WeightedSteer.fit(
        subject,
        asked["train"],
        others["train"],
        refuse,
        reads=[Site(3, "resid_out")],
        edits=[Site(layer, "resid_out") for layer in range(2, subject.n_layers)],
        behaviour=subject.tokenize([requests.REFUSAL], special=False).ids[0],
        strength=0.5,
        training=replace(QUIET, epochs=12),
    )
    with subject.under(toggle):
        wanted, rest = (subject.generate(texts, max_new_tokens=1).texts for texts in (asked["test"], others["test"]))
        receipt = subject.receipts[0]
    refused = [np.mean([text == requests.REFUSAL for text in texts]) for texts in (wanted, rest)]
    assert refused[0] > 0.8 and refused[1] < refused[0] / 5
    assert receipt.prompts == len(wanted) + len(rest) and receipt.prompts_acted < 2 * len(wanted)


# --- the toggle


def split_gate(subject: Subject, texts: list[str], read: Site) -> Controller:
    """A controller whose gate is 1 on half of the texts and 0 on the others, with different weights per layer."""
    values = subject.capture(texts, [read], tokens="last")[read].float()
    edits = tuple(Site(layer, "resid_out") for layer in range(subject.n_layers))
    noise = Controller.random((read,), edits, values.shape[1])
    along = values @ noise.w1[0]
    cut = float(along.sort().values[len(texts) // 2 - 1 :][:2].mean())
    w2 = torch.cat([torch.tensor([[1e4, -1e4]]), torch.zeros(len(edits), 2)])
    b2 = torch.cat([torch.zeros(1), torch.linspace(0, 1, len(edits))])
    return Controller(
        (read,),
        edits,
        noise.centre,
        noise.scale,
        torch.stack([noise.w1[0], -noise.w1[0]]),
        torch.tensor([-cut, cut]),
        w2,
        b2,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
@pytest.mark.parametrize("last", [False, True])
def test_with_a_hard_gate_closed_rows_stay_to_the_bit_cached_and_uncached(family, last):
    subject = Subject.tiny(family, verify=False)
    texts = [*prompts(2)[0], "wash the bell", "please paint the lamp and the vase"]
    read = Site(subject.n_layers - 1 if last else 0, "resid_out")
    toggle = WeightedSteer(
        Direction(torch.linspace(-1, 1, subject.anatomy.d_model)), split_gate(subject, texts, read), 3.0
    )
    values = subject.capture(texts, [read], tokens="last")[read].float()
    open_rows = (toggle.controller(values)[0] > 0.5).tolist()
    assert sum(open_rows) == 2
    site = Site(0, "resid_out")
    plain, written = subject.capture(texts, [site], tokens="last")[site], subject.generate(texts, max_new_tokens=4).ids
    with subject.under(toggle):
        moved = subject.capture(texts, [site], tokens="last")[site] - plain
        ids = subject.generate(texts, max_new_tokens=4).ids
        assert subject.generate(texts, max_new_tokens=4, use_cache=False).ids == ids
        assert subject.generate(texts[::-1], max_new_tokens=4).ids[::-1] == ids
    push = 3.0 * float(toggle.controller(values[:1])[1][0, 0]) * torch.linspace(-1, 1, subject.anatomy.d_model)
    for row, is_open in enumerate(open_rows):
        torch.testing.assert_close(moved[row], push if is_open else torch.zeros_like(push), rtol=1e-4, atol=1e-5)
        assert is_open or (torch.equal(moved[row], 0 * push) and ids[row] == written[row])


def test_a_controller_survives_its_file_and_json(tmp_path):
    controller = trained(0, 1).controller
    path = controller.save(tmp_path / "gate.safetensors")
    assert Controller.load(path) == controller
    toggle = WeightedSteer(Direction(torch.ones(8)), controller, threshold=None, positions="last")
    again = Toggle.from_json(json.loads(json.dumps(toggle.to_json())))
    assert again == toggle and hash(again) == hash(toggle)
    save_file({"vector": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no controller"):
        Controller.load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="can't be read"):
        Controller.load(tmp_path / "broken.safetensors")


def test_tensors_that_do_not_fit_or_are_no_numbers_are_refused():
    made = Controller.random(EDITS[:1], EDITS, WIDTH)
    with pytest.raises(ValueError, match="expected"):
        replace(made, b2=torch.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        replace(made, b1=torch.full_like(made.b1, torch.nan))


def test_a_model_in_half_precision_is_steered_too():
    subject = Subject.organism(dtype="bfloat16")
    toggle = WeightedSteer.examples(subject)[0]
    with subject.under(toggle):
        subject.generate(prompts(2)[0], max_new_tokens=2)
        assert subject.receipts[0].relative_moved > 0
