"""CarveMoE: planted blocks are found, all experts make the dense block, mask equals slice, only numbers are held."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from workbench import Clamp, Site, Steer, Subject
from workbench.methods.pruning.experts import (
    Experts,
    assign_evenly,
    carve,
    distances,
    farthest_first,
    markers,
    purity,
    router_scores,
    selected,
)
from workbench.methods.pruning.ffn_weights import FFNWeights, ffn_inputs
from workbench.pruned import Plan
from workbench.toggle import Toggle
from workbench.toggles.carve_moe import CarveMoE
from workbench.toggles.prune import Prune
from workbench.toggles.skip_ffn import SkipFFN

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi", "phi3", "opt")
IDS = torch.tensor([[5, 9, 2, 7, 11, 30, 4, 8, 21, 3, 17, 40]])
ACT = torch.nn.SiLU()


@functools.cache
def double(family: str) -> Subject:
    """One shared subject per family, in float64."""
    subject = Subject.tiny(family)
    subject.model.double()
    return subject


@functools.cache
def texts() -> tuple[str, ...]:
    words = sorted(word for word in Subject.tiny().tokenizer.get_vocab() if word.isalpha())
    return tuple(" ".join(words[start : start + 20]) for start in range(0, 160, 20))


@functools.cache
def carved(family: str) -> CarveMoE:
    return CarveMoE.carve(double(family), texts(), experts=7, shared=2, active=2)  # 48 neurons: 6 left over


@torch.no_grad()
def logits(subject: Subject, toggle: Toggle | None = None) -> torch.Tensor:
    if toggle is None:
        return subject.model(input_ids=IDS).logits
    with subject.under(toggle):
        return subject.model(input_ids=IDS).logits


# Grouping


def planted(seed: int, gated: bool = True) -> tuple[torch.Tensor, torch.Tensor, Any, np.ndarray, np.ndarray]:
    """(tokens, said, rows, topic of each token, block of each neuron): six blocks of 12 that fire together for a topic,
    and 24 neurons, block 0, that fire for all; d = 64, noise .02 on the weights and .5 on the inputs."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions = torch.linalg.qr(noise(64, 64))[0]
    block = torch.tensor([0] * 24 + [one for one in range(1, 7) for _ in range(12)])
    block = block[torch.randperm(96, generator=generator)]
    gate, up = (directions[block] + 0.02 * noise(96, 64) for _ in range(2))
    topic = torch.randint(1, 7, (2000,), generator=generator)
    x = 8 * (directions[0] + directions[topic]) + 0.5 * noise(2000, 64)
    short = x / x.norm(dim=1, keepdim=True)
    said = ACT(short @ gate.T) * (short @ up.T) if gated else ACT(short @ up.T)
    return x, said, (gate, up), topic.numpy(), block.numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_planted_blocks_are_found_and_routed(seed: int, gated: bool) -> None:
    x, said, (gate, up), topic, block = planted(seed, gated)
    found = carve(said, range(96), layer=0, experts=8, shared=2)
    assert (block[list(found.shared)] == 0).all() and len(found.shared) == 24
    assert purity(found.experts, block) == 1.0
    rows = [one[list(found.switches)] for one in (gate, up)]
    gate_rows, up_rows = (one / one.norm(dim=1, keepdim=True) for one in rows)
    chosen = selected(router_scores(x @ gate_rows.T if gated else None, x @ up_rows.T, ACT), 1)[:, 0]
    right = np.array([block[one[0]] for one in found.experts])[chosen.numpy()] == topic
    assert right.mean() >= 0.99


def test_the_official_rules_miss_planted_blocks() -> None:
    values = []
    for seed in range(3):
        _, said, _, _, block = planted(seed)
        values.append(purity(carve(said, range(96), layer=0, experts=8, shared=2, mode="paper").experts, block))
    assert max(values) < 0.9  # measured .51 to .72


def test_all_neurons_belong_to_one_expert_of_the_right_size() -> None:
    said = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    found = carve(said, range(100), layer=0, experts=8, shared=2)
    assert found.units == tuple(range(100)) and not found.dropped
    assert [len(one) for one in found.experts] == [12] * 6 and len(found.shared) == 28
    paper = carve(said, range(100), layer=0, experts=8, shared=2, mode="paper")
    assert len(paper.dropped) == 4 and paper.units == tuple(range(100))


def test_renumbering_neurons_renumbers_experts() -> None:
    _, said, _, _, _ = planted(0)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    found = carve(said, range(96), layer=0, experts=8, shared=2)
    moved = carve(said[:, order], order.tolist(), layer=0, experts=8, shared=2)
    assert moved.shared == found.shared and set(moved.experts) == set(found.experts)


@pytest.mark.parametrize(("n", "k"), [(12, 3), (60, 6), (200, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_even_assignment_is_as_cheap_as_scipy_s(n: int, k: int, seed: int) -> None:
    rng, size = np.random.default_rng(seed), n // k
    for cost in (rng.random((n, k)) * np.array([0.2] + [1.0] * (k - 1)), rng.integers(0, 4, (n, k)).astype(float)):
        group = assign_evenly(cost, size)
        rows, columns = linear_sum_assignment(np.repeat(cost, size, axis=1))
        assert (np.bincount(group, minlength=k) == size).all()
        assert cost[np.arange(n), group].sum() == pytest.approx(cost[rows, columns // size].sum(), abs=1e-9)
    with pytest.raises(ValueError, match="expected"):
        assign_evenly(np.zeros((5, 2)), 3)


def test_markers_distances_and_seeds_are_those_of_their_definition() -> None:
    said = torch.tensor([[3.0, -5.0, 1.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    marks = markers(said, 2)
    assert marks.int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    centres = torch.tensor([[1.0, 0.25], [0.5, 0.0]])
    slow = np.array([[np.abs(m - c).sum() for c in centres.numpy().T] for m in marks.float().numpy().T])
    np.testing.assert_allclose(distances(marks.float(), centres), slow, atol=1e-6)
    assert set(farthest_first(marks.float(), 2).tolist()) in ({0, 2}, {0, 3}, {1, 2}, {1, 3})


# The toggle


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_equals_slice_and_all_experts_are_the_dense_block(family: str) -> None:
    subject, made = double(family), carved(family)
    plain = logits(subject)
    assert [one.layer for one in made.layers] == [0, 1, 2]
    for active in range(6):
        masked = logits(subject, replace(made, active=active, form="mask"))
        if family == "opt":
            with pytest.raises(ValueError, match="no module of its own"):
                logits(subject, made)
        else:
            sliced = logits(subject, replace(made, active=active))
            torch.testing.assert_close(sliced, masked, rtol=0, atol=1e-12)  # measured 5e-15
        assert (torch.dist(masked, plain) < 1e-12) == (active == 5)


def test_one_token_at_a_time_is_as_many_at_once() -> None:
    for family in ("llama", "gpt2"):
        subject = double(family)
        with subject.under(carved(family)), torch.no_grad():
            output, said = None, []
            for column in range(IDS.shape[1]):
                cache = None if output is None else output.past_key_values
                output = subject.model(input_ids=IDS[:, column : column + 1], past_key_values=cache, use_cache=True)
                said.append(output.logits)
        torch.testing.assert_close(torch.cat(said, 1), logits(subject, carved(family)), rtol=0, atol=1e-12)


def test_with_no_routed_expert_the_shared_one_is_alone() -> None:
    subject = double("llama")
    made = CarveMoE.carve(subject, texts(), experts=8, shared=2, active=0, layers=[1])
    weights, x = FFNWeights.of(subject, 1), ffn_inputs(subject, [IDS[0].tolist()], 1, 100, 0)
    shared = list(made.layers[0].shared)
    alone = weights.said(x)[:, shared] @ weights.down[:, shared].T
    site = [Site(1, "mlp_out")]
    with subject.under(made):
        found = subject.capture([IDS[0].tolist()], site)[site[0]]
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)


def test_reconstruction_gets_better_with_every_expert_on_planted_blocks() -> None:
    x, said, (gate, up), _, _ = planted(0)
    found = carve(said, range(96), layer=0, experts=8, shared=2)
    rows = [one[list(found.switches)] for one in (gate, up)]
    gated, read = (x @ (one / one.norm(dim=1, keepdim=True)).T for one in rows)
    order = selected(router_scores(gated, read, ACT), 6)
    errors = []
    for active in range(7):
        heard = torch.zeros(2000, 96, dtype=torch.bool)
        heard[:, list(found.shared)] = True
        for token, parts in enumerate(order[:, :active].tolist()):
            heard[token, [unit for part in parts for unit in found.experts[part]]] = True
        errors.append(float((said * ~heard).norm()))
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.2 * errors[0] and errors[6] == 0


def test_only_numbers_are_held_and_they_survive_json_and_other_dtypes() -> None:
    made = carved("llama")
    again = Toggle.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and hash(again) == hash(made)
    assert torch.equal(logits(double("llama"), again), logits(double("llama"), made))
    loads = []
    for subject in (double("llama"), Subject.tiny("llama")):
        with subject.under(replace(made, model=None)), torch.no_grad():
            subject.nll(texts())
            loads.append(subject.receipts[0].to_json()["per_layer"]["load"])
    assert loads[0] == loads[1]


def test_the_receipt_tells_shares_and_loads() -> None:
    subject = double("llama")
    with subject.under(carved("llama")):
        subject.nll((*texts()[:2], " ".join(texts()[2].split()[:7])))  # padded: padding is no load
        facts, tokens = subject.receipts[0].to_json(), subject.receipts[0].tokens
    for load in facts["per_layer"]["load"].values():
        assert sum(load) == 2 * tokens
    assert "62.5% of the neurons of 3 layers active" in facts["notes"][0] and "entropy" in facts["notes"][1]


def test_blocks_planted_in_a_model_are_carved_out_of_it() -> None:
    subject = Subject.tiny("llama")
    mlp, rows = subject.model.model.layers[1].mlp, torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight.copy_(rows.repeat_interleave(12, 0) + 0.1 * weight)
    made = CarveMoE.carve(subject, texts(), experts=4, shared=0, active=2, layers=[1], form="mask")
    assert purity(made.layers[0].experts, np.arange(48) // 12) == 1.0
    lots = [purity(made.random_control(seed).layers[0].experts, np.arange(48) // 12) for seed in range(5)]
    assert max(lots) < 0.7
    plain = logits(subject)
    errors = [float(torch.dist(logits(subject, made.random_control(seed)), plain)) for seed in range(5)]
    assert torch.dist(logits(subject, made), plain) < np.mean(errors)


def test_an_edit_can_not_revive_a_neuron_that_was_not_chosen() -> None:
    subject, site = double("llama"), Site(1, "neurons")
    made = replace(carved("llama"), active=0, form="mask")
    experts = made.layers[1]
    off, on = experts.experts[0][0], experts.shared[0]
    plain = logits(subject, made)
    assert torch.equal(logits(subject, made | Clamp(((site, (off,)),), 9.0)), plain)
    assert not torch.equal(logits(subject, made | Clamp(((site, (on,)),), 9.0)), plain)
    with subject.under(made):
        seen = subject.capture([IDS[0].tolist()], [site])[site]
    assert not seen[:, off].any() and seen[:, on].all()


def test_in_slices_neurons_can_not_be_read_and_the_reason_is_told() -> None:
    subject = double("llama")
    for toggle in (carved("llama"), carved("llama") | SkipFFN(0.9)):
        with subject.under(toggle), pytest.raises(ValueError, match="carved into experts; use form='mask'"):
            subject.capture([IDS[0].tolist()], [Site(1, "neurons")])


def test_pruning_comes_before_carving_and_not_behind_it() -> None:
    subject = double("llama")
    cut = Prune(Plan.of(subject, {0: {"neurons": range(0, 48, 2)}, 1: {"neurons": range(30)}}))
    with subject.under(cut):
        made = CarveMoE.carve(subject, texts(), experts=5, shared=1, active=2)
        plain = logits(subject)
    assert made.layers[0].units == tuple(range(0, 48, 2)) and made.layers[1].units == tuple(range(30))
    said = [
        logits(subject, replace(cut, form=form) | replace(made, form=other))
        for form in ("mask", "slice")
        for other in ("mask", "slice")
    ]
    for one in said[1:]:
        torch.testing.assert_close(one, said[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(subject, cut | replace(made, active=4)), plain, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="Write it after: Prune"):
        logits(subject, carved("llama") | cut)
    with pytest.raises(ValueError, match="does not fit layer 0 as it is now: neuron 1 is in no expert"):
        logits(subject, made)
    dropped = Prune(Plan.of(subject, drop=[1]))
    with subject.under(dropped):
        assert [one.layer for one in CarveMoE.carve(subject, texts()[:2], experts=4, shared=1).layers] == [0, 2]


def test_skipping_wraps_around_carved_blocks() -> None:
    subject, skip = double("llama"), SkipFFN(0.8, warmup=0, run=1)
    said = []
    for form in ("mask", "slice"):
        with subject.under(replace(carved("llama"), form=form) | skip), torch.no_grad():
            said.append(subject.model(input_ids=IDS, use_cache=False).logits)
            assert subject.receipts[1].tokens > 0
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="Write it after: CarveMoE"):
        logits(subject, skip | carved("llama"))


def test_layers_are_carved_behind_carved_layers() -> None:
    subject = double("llama")
    first = CarveMoE.carve(subject, texts(), experts=6, shared=1, active=1, layers=[0])
    both = CarveMoE.carve(subject, texts(), experts=6, shared=1, active=1, layers=[0, 1])
    with subject.under(first):
        weights, ids = FFNWeights.of(subject, 1), subject.tokenize(list(texts())).ids
        said = weights.said(ffn_inputs(subject, ids, 1, 4096, 0), normed=True).float()
    assert both.layers == (first.layers[0], carve(said, range(48), layer=1, experts=6, shared=1))


def test_steering_changes_the_routes() -> None:
    subject = double("llama")
    push = Steer(torch.randn(32, generator=torch.Generator().manual_seed(0)), Site(0, "resid_out"), 20.0)
    loads = []
    for toggle in (carved("llama"), push | carved("llama")):
        with subject.under(toggle):
            logits(subject)
            loads.append(subject.receipts[-1].to_json()["per_layer"]["load"])
    assert loads[0]["0"] == loads[1]["0"] and loads[0]["1"] != loads[1]["1"]


def test_a_bias_can_even_out_the_router() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    assert selected(scores, 1).tolist() == [[0], [2]]
    assert selected(scores, 1, torch.tensor([0.0, 1.0, 0.0])).tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"switches": (5, 8)}, "one switch of its own"),
        ({"shared": (3,)}, "names a neuron twice"),
        ({"bias": (1.0,)}, "1 biases for 2 experts"),
    ],
)
def test_experts_that_do_not_add_up_are_refused(change: dict[str, Any], message: str) -> None:
    good = Experts(0, (0, 1), ((2, 3), (4, 5)), (2, 4))
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_wrong_settings_are_refused() -> None:
    subject = double("llama")
    with pytest.raises(ValueError, match="an empty list"):
        CarveMoE.carve(subject, [])
    with pytest.raises(ValueError, match="0 <= shared < experts <= 48"):
        CarveMoE.carve(subject, texts(), experts=4, shared=4)
    with pytest.raises(ValueError, match="0 <= shared < experts <= 48"):
        CarveMoE.carve(subject, texts(), experts=0, shared=0)
    for wrong in ({"mode": "best"}, {"marked": 0}, {"marked": -1}):
        with pytest.raises(ValueError, match="expected 'corrected' or 'paper', and 1 or more"):
            CarveMoE.carve(subject, texts(), experts=4, shared=1, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one string"):
        CarveMoE.carve(subject, "....", experts=4, shared=1)
    with pytest.raises(ValueError, match="expected 0 to 5"):
        replace(carved("llama"), active=6)
    with pytest.raises(ValueError, match="'slice' or 'mask'"):
        replace(carved("llama"), form="cut")
    with pytest.raises(ValueError, match="Carve it again"):
        logits(double("qwen3"), carved("llama"))
    with pytest.raises(ValueError, match="a mixture of experts"):
        CarveMoE.carve(Subject.tiny("mixtral"), texts())
