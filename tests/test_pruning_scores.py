"""Scores and budgets: laws of the criteria, planted units, gradients by hand, budgets met or refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from families import subject_of, texts
from transformers import AutoConfig, AutoModelForCausalLM

from workbench.methods.pruning import taylor as taylor_module
from workbench.methods.pruning.budgets import LEAST_NEURONS, Budget, Ranking
from workbench.methods.pruning.criteria import CRITERIA, activity, columns_of, contribution, scores_of
from workbench.methods.pruning.planted import amplify, deafen, living, mute, random_texts
from workbench.methods.pruning.scores import PruningScoresResult, scored
from workbench.methods.pruning.taylor import Adapter, Taylor, adapter_gradient, combined, parts_of, per_unit
from workbench.organism.tiny import tiny_pair
from workbench.probes.pruning_scores import PruningScores
from workbench.pruned import Plan, Shape
from workbench.pruned.report import PLAN_COLUMNS, Sizes, kept_map, parameter_bytes, plan_table
from workbench.pruned.units import rows_of
from workbench.site import Site
from workbench.subject import Subject
from workbench.toggles.drop_blocks import DropBlocks
from workbench.toggles.prune import Prune

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi", "opt", "falcon", "phi3")
READ = ("amp_out", "amp", "wanda_structured")
LLAMA2_7B = Shape(2, 4096, 32, 32, 128, 11008)  # two layers of it are enough


def double(family: str, seed: int = 0) -> Subject:
    subject = Subject.tiny(family, seed, verify=False)
    subject.model.double()
    return subject


def run(subject: Subject, *criteria: str, data: Any = None, **options: Any) -> PruningScoresResult:
    result = PruningScores(criteria, **options).run(subject, texts() if data is None else data)
    assert isinstance(result, PruningScoresResult)
    return result


def llama2_7b(heads: int = 32) -> Ranking:
    head, neuron = 4 * 128 * 4096, 3 * 4096
    sizes = Sizes(LLAMA2_7B, (head,) * 2, (0,) * 2, (neuron,) * 2, (0,) * 2, 0)
    rng = np.random.default_rng(0)
    return Ranking(rng.random((2, heads)), rng.random((2, 11008)), sizes)


# --- laws of the criteria


@pytest.mark.parametrize("family", FAMILIES)
def test_what_heads_write_adds_up_to_the_output_projection_without_its_bias(family: str) -> None:
    subject = double(family)
    site = Site(1, "heads")
    values = subject.capture(texts()[:1], [site])[site][None]  # (1, seq, head, d_head)
    columns, module = columns_of(subject, site), subject.anatomy.module(subject.model, site)
    said = sum(contribution(values, columns, head) for head in range(subject.anatomy.n_heads))
    with torch.no_grad():
        out = module(values.flatten(2))
        bias = module._parameters.get("bias")
    torch.testing.assert_close(said, out if bias is None else out - bias, rtol=0, atol=1e-12)  # measured 1e-15


def test_activity_is_what_a_capture_of_every_text_alone_says() -> None:
    subject = double("qwen2")
    seen = activity(subject, subject.tokenize(texts()).ids)
    heads, neurons, energy = [], [], 0.0
    for text in texts():
        found = subject.capture([text], [Site(1, "heads"), Site(1, "neurons")])
        z, a = found[Site(1, "heads")], found[Site(1, "neurons")]
        columns = columns_of(subject, Site(1, "heads"))
        heads.append(torch.einsum("thk,dhk->thd", z, columns).abs().sum(-1).mean(0))
        neurons.append(a.abs().mean(0))
        energy = energy + a.square().sum(0)
    np.testing.assert_allclose(seen.written[1], torch.stack(heads).mean(0), rtol=1e-12)
    np.testing.assert_allclose(seen.active[1], torch.stack(neurons).mean(0), rtol=1e-12)
    np.testing.assert_allclose(seen.neuron_energy[1], energy, rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_scores_do_not_depend_on_padding_batches_or_the_order_of_texts(family: str) -> None:
    subject = double(family)
    mixed = [*random_texts(subject, 0), random_texts(subject, 1)[0]]  # two of one length
    one = run(subject, *READ, data=mixed)
    for other in (run(subject, *READ, data=mixed[::-1]), run(subject, *READ, data=mixed, batch=1)):
        np.testing.assert_allclose(other.heads, one.heads, rtol=1e-12)
        np.testing.assert_allclose(other.neurons, one.neurons, rtol=1e-12)


def test_every_text_counts_the_same_for_amp_whatever_its_length() -> None:
    subject = double("llama")
    long, short = random_texts(subject, 0, 2, 40)
    short = short[:5]
    both, alone = (
        run(subject, "amp_out", data=[long, short]),
        [run(subject, "amp_out", data=[t]) for t in (long, short)],
    )
    np.testing.assert_allclose(both.heads, (alone[0].heads + alone[1].heads) / 2, rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon"])
def test_a_group_scores_the_sum_of_its_query_heads(family: str) -> None:
    subject = subject_of(family)
    result = run(subject, "amp_out", "taylor", "magnitude")
    size = subject.anatomy.n_heads // subject.anatomy.n_kv_heads
    table: Any = result.table()
    for name in result.criteria:
        heads = table[(table["family"] == "head") & (table["criterion"] == name)]
        groups = table[(table["family"] == "kv_head") & (table["criterion"] == name)]
        assert len(groups) == (0 if size == 1 else 3 * subject.anatomy.n_kv_heads)
        if size > 1:
            summed = heads.groupby(["layer", heads["unit"] // size])["score"].sum()
            np.testing.assert_allclose(groups["score"], summed.to_numpy(), rtol=1e-12)


def test_with_the_first_norm_a_neuron_is_scored_as_a_head_of_one_dimension() -> None:
    subject = double("llama")
    result, site = run(subject, "amp_out", norm=1), Site(2, "neurons")
    column = columns_of(subject, site)[:, 7, 0]
    alone = [subject.capture([text], [site])[site][:, 7] for text in texts()]
    size = np.mean([float((a[:, None] * column).abs().sum(-1).mean()) for a in alone])
    np.testing.assert_allclose(result.neurons[0, 2, 7], size, rtol=1e-12)


def test_magnitude_and_random_need_no_text_and_random_is_a_permutation_of_its_seed() -> None:
    subject = subject_of("llama")
    result = PruningScores(("magnitude", "random"), seed=3).run(subject, None)
    assert isinstance(result, PruningScoresResult) and result.n_texts == 0
    assert (np.sort(result.neurons[1], axis=1) == np.arange(1, 49) / 48).all()
    assert not np.array_equal(result.neurons[1, 0], result.neurons[1, 1])
    other = scores_of("random", subject, None, seed=4)[1]
    assert not np.array_equal(result.neurons[1], other)
    down = rows_of(subject.anatomy.module(subject.model, Site(1, "neurons")))
    np.testing.assert_allclose(result.neurons[0, 1], down.norm(dim=0), rtol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "olmo2"])
def test_every_family_is_scored_by_every_criterion(family: str) -> None:
    subject = Subject.tiny(family, verify=False)
    result = run(subject, *CRITERIA)
    assert np.isfinite(result.heads).all() and (result.heads > 0).all()
    silent = (result.neurons == 0).mean() if result.neurons.size else 0.0
    assert silent == 0 or (family == "opt" and silent < 0.1)  # a rectified neuron may never fire in a short text
    assert result.neurons.shape[2] == (0 if family == "mixtral" else 48)
    told = {"mixtral": "experts have no neurons", "olmo2": "rows of queries can't be told apart"}
    assert told.get(family, "") in result.finding and len(result.table()) > 0


def test_half_precision_is_scored_in_float32() -> None:
    subject = Subject.tiny("llama", verify=False)
    full = run(subject, *CRITERIA)
    subject.model.bfloat16()
    half = run(subject, *CRITERIA)
    for row in range(len(CRITERIA)):
        np.testing.assert_allclose(half.neurons[row].mean(), full.neurons[row].mean(), rtol=0.05)  # bf16 has 8 bits


# --- planted units: who sees what


def planted(seed: int = 0) -> Subject:
    """Layer 0: a deaf neuron, a loud mute one, head 3 mute; layer 1: group 0 mute; layer 2: group 0 without values."""
    subject = living(seed)
    subject.model.double()
    deafen(subject, 0, [5])
    amplify(subject, 0, [9], 10.0)
    mute(subject, 0, heads=[3], neurons=[9])
    mute(subject, 1, heads=[0, 1])
    with torch.no_grad():
        subject.model.model.layers[2].self_attn.v_proj.weight[:8] = 0.0
    return subject


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_units_are_seen_by_those_who_can_see_them(seed: int) -> None:
    subject = planted(seed)
    result = run(subject, "amp", "amp_out", "wanda_structured", "taylor", "magnitude", data=random_texts(subject, seed))
    by_name = {name: (result.heads[i], result.neurons[i]) for i, name in enumerate(result.criteria)}
    for name, (heads, neurons) in by_name.items():
        assert (neurons[0, 5] == 0) == (name != "magnitude"), name  # what a neuron reads is not in its column
        assert (neurons[0, 9] == 0) == (name != "amp"), name
        assert (heads[1, :2] == 0).all() == (name != "taylor") or name == "taylor", name
        assert (heads[2, :2] < 1e-12).all() == (name not in ("magnitude", "taylor")) or name == "taylor", name
    assert by_name["amp"][1][0].argmax() == 9, "a loud neuron that nothing reads matters most to amp"
    for name in ("amp", "amp_out", "wanda_structured", "magnitude"):
        assert by_name[name][0][0, 3] == 0 and by_name[name][0][0, :3].min() > 0
    taylor = by_name["taylor"][0]
    assert taylor[0].argmin() == 3 and taylor[0, 3] > 0, "head 3 has a share in keys and values that head 2 uses"
    assert (taylor[1, :2] == 0).all(), "the whole group is unheard"
    assert taylor[2].argmin() in (0, 1), "a group without values"


def test_dead_units_leave_first_and_nothing_changes() -> None:
    subject = living()
    subject.model.double()
    mute(subject, 1, heads=[0, 1], neurons=range(10, 20))
    ids = random_texts(subject, 0)
    before = subject.nll(ids)
    for name in ("amp_out", "wanda_structured", "taylor", "magnitude"):
        plan = run(subject, name, data=ids).plan(allocation={1: (1536 + 10 * 96) / (2 * 1536 + 48 * 96)})
        assert plan.at(1).heads == (2, 3) and set(plan.at(1).neurons or ()) == set(range(48)) - set(range(10, 20))
        with subject.under(Prune(plan)):
            torch.testing.assert_close(subject.nll(ids), before, rtol=0, atol=1e-12)


# --- taylor


def gradients(subject: Subject, text: list[int]) -> dict[str, torch.Tensor]:
    """The slow way: a backward into every parameter of a copy."""
    import copy

    model = copy.deepcopy(subject.model).requires_grad_(True)
    ids = torch.tensor([text])
    logits = model(input_ids=ids).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("variant", ["param_first", "param_second", "param_mix", "vectorize"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon", "opt"])
def test_gradients_by_hooks_are_those_of_a_backward_into_every_weight(family: str, variant: Any) -> None:
    subject = double(family)
    text = random_texts(subject, 0)[0]
    slow = gradients(subject, text)
    found: dict[int, list[Any]] = {}
    for (layer, path), parts in parts_of(subject).items():
        name = f"{subject.anatomy.blocks}.{layer}.{path}.weight"
        weight, gradient = subject.model.get_parameter(name).detach(), slow[name]
        if family == "gpt2":
            weight, gradient = weight.T, gradient.T
        found.setdefault(layer, []).extend((part, per_unit(part, weight, gradient, variant)) for part in parts)
    a = subject.anatomy
    result = run(subject, "taylor", data=[text], taylor=Taylor(variant=variant))
    for layer in range(3):
        heads, neurons = combined(found[layer], a.n_heads, a.n_kv_heads, a.d_mlp or 0)
        np.testing.assert_allclose(result.heads[0, layer], heads, rtol=1e-9)
        np.testing.assert_allclose(result.neurons[0, layer], neurons, rtol=1e-9)


@pytest.mark.parametrize("source", ["grad", "lora"])
def test_gradient_criteria_leave_nothing_behind(source: Any) -> None:
    for trained in (True, False):
        subject = Subject.tiny("qwen2", verify=False)
        subject.model.requires_grad_(trained)
        before = [(n, id(p), p._version, p.requires_grad) for n, p in subject.model.named_parameters()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())
        with torch.no_grad():  # as a careless notebook may stand in
            run(subject, "taylor", taylor=Taylor(source, steps=2))
        assert before == [(n, id(p), p._version, p.requires_grad) for n, p in subject.model.named_parameters()]
        assert all(parameter.grad is None for parameter in subject.model.parameters())
        assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())


def test_what_adapters_tell_of_a_gradient_is_the_published_identity() -> None:
    made = torch.Generator().manual_seed(0)
    g, a, b = (torch.randn(shape, generator=made, dtype=torch.float64) for shape in ((7, 9), (3, 9), (7, 3)))
    s = 1.7
    g_a, g_b = s * b.T @ g, s * g @ a.T  # chain rule of W + s B A
    paper = s * g @ a.T @ a + s * b @ b.T @ g - s * s * (g @ a.T) @ (b.T @ g)
    torch.testing.assert_close(adapter_gradient(Adapter(a, b, s), g_a, g_b, "paper"), paper, rtol=0, atol=1e-12)
    q = torch.linalg.qr(torch.randn(9, 9, generator=made, dtype=torch.float64)).Q  # full rank, orthogonal
    whole = Adapter(q, torch.zeros(7, 9, dtype=torch.float64), 1.0)
    torch.testing.assert_close(adapter_gradient(whole, torch.zeros(9, 9).double(), g @ q.T), g, rtol=0, atol=1e-12)


def test_adapters_of_full_rank_tell_the_true_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = double("llama")
    text = random_texts(subject, 0)[0]

    def orthogonal(module: Any, *_: Any) -> Adapter:
        weight = rows_of(module)
        a, b = torch.eye(weight.shape[1]).to(weight), weight.new_zeros(len(weight), weight.shape[1])
        return Adapter(a.requires_grad_(True), b.requires_grad_(True), 1.0)

    monkeypatch.setattr(taylor_module, "_adapter", orthogonal)
    lora = run(subject, "taylor", data=[text], taylor=Taylor("lora", steps=1))
    grad = run(subject, "taylor", data=[text])
    np.testing.assert_allclose(lora.neurons / 0.1, grad.neurons, rtol=1e-9)  # 0.1 is the new step's weight
    np.testing.assert_allclose(lora.heads / 0.1, grad.heads, rtol=1e-9)


def test_with_adapters_a_neuron_stays_at_zero_only_where_both_of_its_sides_are_dead(monkeypatch) -> None:
    subject = living()
    subject.model.double()
    deafen(subject, 0, [5, 6])
    mute(subject, 0, neurons=[6])
    make = taylor_module._adapter

    def unread(module: Any, *rest: Any) -> Adapter:
        adapter = make(module, *rest)
        if module is subject.anatomy.module(subject.model, Site(0, "neurons")):
            with torch.no_grad():
                adapter.a[:, 6] = 0.0
        return adapter

    monkeypatch.setattr(taylor_module, "_adapter", unread)
    settings = Taylor("lora", steps=4, learning_rate=1e-2)
    neurons = run(subject, "taylor", data=random_texts(subject, 0), taylor=settings).neurons[0, 0]
    assert neurons[6] == 0.0 and neurons[5] > 0.0


def test_the_moving_average_weighs_new_steps_by_a_tenth_and_leaves_nan_out(monkeypatch) -> None:
    subject = subject_of("llama")
    steps = [(np.full((3, 4), x), np.full((3, 48), x)) for x in (1.0, np.nan, 2.0)]
    monkeypatch.setattr(taylor_module, "_by_adapters", lambda *_: iter(steps))
    result = run(subject, "taylor", taylor=Taylor("lora"))
    np.testing.assert_allclose(result.heads, 0.9 * 0.1 + 0.1 * 2.0)
    assert result.notes == ("taylor discarded 1 steps that gave NaN",)
    monkeypatch.setattr(taylor_module, "_by_adapters", lambda *_: iter(steps[1:2]))
    with pytest.raises(ValueError, match="all 1 steps gave NaN"):
        run(subject, "taylor", taylor=Taylor("lora"))


def test_ranks_by_adapters_come_nearer_to_the_gradient_with_their_rank() -> None:
    """The law behind LoRA's cheapness: A^T A is a random projection of that rank."""
    made, found = torch.Generator().manual_seed(0), {}
    for rank in (2, 16, 64):
        agree = []
        for _ in range(20):
            w, g = (torch.randn(64, 64, generator=made) for _ in range(2))
            a = torch.randn(rank, 64, generator=made)
            true, guessed = ((w * one).abs().sum(1) for one in (g, g @ a.T @ a))
            agree.append(np.corrcoef(true.argsort().argsort(), guessed.argsort().argsort())[0, 1])
        found[rank] = np.mean(agree)
    assert found[2] + 0.1 < found[16] < found[64] - 0.05, found


# --- budgets


@pytest.mark.parametrize(
    ("ratio", "mode", "heads", "neurons", "over"),
    [
        (0.3, "paper", 10, 3302, 833_946),
        (0.3, "corrected", 10, 3234, -1_638),
        (0.2, "paper", 6, 2202, -833_946),
        (0.2, "corrected", 6, 2269, -10_650),
    ],
)
def test_budgets_of_llama_2_7b_are_those_worked_out_by_hand(ratio, mode, heads, neurons, over) -> None:
    ranking = llama2_7b()
    plan = ranking.plan(ratio, Budget(mode=mode))
    assert (32 - plan.kept(1, "heads"), 11008 - plan.kept(1, "neurons")) == (heads, neurons)
    missed = ranking.sizes.removed(plan) / 2 - ratio * ranking.sizes.units / 2
    assert round(missed) == over


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "falcon", "phi3"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("unit", ["group", "head", None])
def test_a_budget_is_met_within_one_unit_and_plans_are_what_the_model_loses(family, allocation, unit) -> None:
    subject = subject_of(family)
    ranking = run(subject, "magnitude").ranking()
    sizes, shape = ranking.sizes, ranking.sizes.shape
    bundle = {"group": shape.group * sizes.head[0] + sizes.group[0], "head": shape.n_kv_heads * sizes.head[0]}
    size = bundle["group" if shape.group == 1 else unit or ("group" if shape.n_kv_heads > 1 else "head")]
    budget = Budget(allocation=allocation, unit=unit)
    most = ranking.most(budget)
    for ratio in np.linspace(0.02, most - 1e-9, 9):
        plan = ranking.plan(float(ratio), budget)
        gone = sizes.removed(plan)
        wanted = ratio * sizes.units
        if allocation == "uniform":  # each layer within one neuron
            assert -1e-3 <= wanted - gone < 3 * sizes.neuron[0] + 1e-3, (ratio, wanted, gone)
        else:
            assert -1e-3 <= wanted - gone < max(size, sizes.neuron[0]) + 1e-3
        assert min(plan.kept(layer, "neurons") for layer in range(3)) >= LEAST_NEURONS
        assert min(plan.kept(layer, "kv_heads") for layer in range(3)) >= 1
    whole = parameter_bytes(subject)
    with subject.under(Prune(plan)):
        assert whole - parameter_bytes(subject) == 4 * gone
        subject.nll([texts()[0]])


def test_a_higher_ratio_keeps_a_subset_where_the_law_says_so() -> None:
    ranking, rng = llama2_7b(), np.random.default_rng(1)
    fixed = Budget(of="neurons")
    pairs = [sorted(rng.uniform(0, 0.9, 2)) for _ in range(5)]
    for low, high in pairs:
        for budget in (fixed, Budget(allocation="global")):
            more, less = (ranking.plan(ratio, budget) for ratio in (low, high))
            assert more & less == less, "not nested"
    before, after = (ranking.plan(ratio, Budget()) for ratio in (0.2656, 0.2657))  # r H crosses 8.5
    assert before.kept(0, "heads") - after.kept(0, "heads") == 1
    assert 165 < after.kept(0, "neurons") - before.kept(0, "neurons") < 175  # a head is worth 171 neurons


def test_the_lowest_scores_leave_in_groups_or_one_head_of_each_group() -> None:
    shape = Shape(1, 16, 6, 2, 4, 12)
    sizes = Sizes(shape, (128,), (128,), (48,), (0,), 0)
    heads = np.array([[1.0, 9.0, 5.0, 2.0, 3.0, 4.0]])  # groups 15 and 9
    ranking = Ranking(heads, np.arange(12.0)[None], sizes)
    by_group = ranking.plan(0.5, Budget(of="heads"))
    assert by_group.at(0).heads == (0, 1, 2) and by_group.at(0).kv_heads == (0,)
    by_head = ranking.plan(1 / 3, Budget(of="heads", unit="head"))
    assert by_head.at(0).heads == (1, 2, 4, 5) and by_head.at(0).kv_heads == (0, 1)
    assert ranking.plan(1 / 4, Budget(of="neurons")).at(0).neurons == tuple(range(3, 12))
    rounded = ranking.plan(1 / 4, Budget(of="neurons", round_to=5)).at(0).neurons
    assert rounded == tuple(range(2, 12))


def test_layers_that_stay_whole_are_paid_for_by_the_others() -> None:
    ranking = run(subject_of("llama"), "magnitude").ranking()
    for allocation in ("uniform", "global"):
        plan = ranking.plan(0.2, Budget(allocation=allocation, keep_first=1, keep_last=1))
        assert [layer for layer, _ in plan.layers] == [1]
        assert abs(ranking.sizes.removed(plan) / ranking.sizes.units - 0.2) < 1536 / ranking.sizes.units
    alone = ranking.plan(None, Budget(allocation={2: 0.5}))
    assert [layer for layer, _ in alone.layers] == [2]


def test_a_share_of_the_whole_model_asks_more_of_its_units() -> None:
    ranking = run(subject_of("llama"), "magnitude").ranking()
    sizes = ranking.sizes
    assert sizes.total == sum(p.numel() for p in subject_of("llama").model.parameters())
    plan = ranking.plan(0.1, Budget(of="all"))
    assert abs(sizes.removed(plan) - 0.1 * sizes.total) < 3 * 96
    assert dict(plan.origin)["achieved"] == sizes.removed(plan) / sizes.total


def test_an_order_is_made_once_and_a_slider_only_moves_its_prefix(monkeypatch) -> None:
    result = run(subject_of("llama"), "magnitude")
    first = result.plan(0.3, allocation="global")
    result.plan(0.3)
    monkeypatch.setattr(np, "argsort", lambda *_, **__: pytest.fail("sorted again"))
    assert result.plan(0.3, allocation="global") == first and result.plan(keep=0.5) != first
    assert result.plan(0.1) == result.plan(keep=0.9)


def test_a_plan_tells_where_it_came_from_and_survives_json() -> None:
    result = run(subject_of("qwen2"), "amp_out", "random")
    for plan in (result.plan(0.3), result.plan(allocation={1: 0.2}), result.plan(keep=0.6, criterion="random")):
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert plan.to_json()["origin"]["texts"] == 3
    origin = dict(result.plan(0.3, allocation="global").origin)
    assert (origin["criterion"], origin["ratio"], origin["allocation"]) == ("amp_out", 0.3, "global")
    assert origin["fingerprint"] == subject_of("qwen2").fingerprint and abs(origin["achieved"] - 0.3) < 0.1


@pytest.mark.parametrize(
    ("ratio", "options", "message"),
    [
        (0.95, {}, r"at most 0.7000 can leave: each layer keeps one key/value head and 8 neurons"),
        (0.95, {"of": "neurons"}, r"at most 0.8333 can leave: each layer keeps 8 neurons"),
        (0.6, {"of": "heads", "unit": "group"}, r"at most 0.5000 can leave: each layer keeps one key/value head"),
        (0.4, {"keep_last": 2}, r"at most 0.2333 can leave: .*, and 2 stay whole"),
        (0.2, {"of": "all"}, r"at most 0.1598 can leave"),
        (1.0, {}, "from 0 to below 1"),
        (-0.1, {}, "from 0 to below 1"),
        (0.1, {"keep_first": 3}, "Keep fewer whole"),
        (None, {}, "one of the three"),
        (0.1, {"allocation": {0: 0.1}}, "one of the three"),
        (None, {"allocation": {7: 0.1}}, "got a share for layer 7"),
        (None, {"allocation": {0: 0.9}}, "layer 0 would lose 0.9000 of its parameters, but at most 0.7000"),
        (None, {"allocation": {0: 0.1}, "of": "all"}, "shares by layer"),
    ],
)
def test_what_can_not_be_met_is_refused_with_the_reason(ratio, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(subject_of("llama"), "magnitude").plan(ratio, **options)


def test_units_that_a_model_lacks_are_refused_with_the_cure() -> None:
    experts = run(Subject.tiny("mixtral", verify=False), "magnitude")
    with pytest.raises(ValueError, match=r"no neurons: .*Ask for of='heads'"):
        experts.plan(0.2)
    assert experts.plan(0.4, of="heads", allocation="global").layers
    normed = run(Subject.tiny("olmo2", verify=False), "magnitude")
    with pytest.raises(ValueError, match=r"heads of this model can't be cut: .*Ask for of='neurons'"):
        normed.plan(0.2)
    assert normed.plan(0.2, of="neurons").layers


@pytest.mark.parametrize(
    ("options", "message"),
    [({"of": "half"}, "of='half'"), ({"allocation": "owl"}, "allocation='owl'"), ({"round_to": 0}, "round_to=0"),
     ({"unit": "query"}, "unit='query'"), ({"mode": "best"}, "mode='best'")],
)  # fmt: skip
def test_a_budget_that_is_none_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**options)


# --- under toggles, reports, input


def test_scores_under_a_pruning_are_zero_for_what_is_gone() -> None:
    subject = Subject.tiny("llama", verify=False)
    plan = Plan.of(subject, {1: {"neurons": range(0, 48, 2), "kv_heads": [1]}}, drop=[2])
    with subject.under(Prune(plan)):
        sliced = run(subject, *READ, "magnitude")
    with subject.under(Prune(plan, "mask")):
        masked = run(subject, *READ, "magnitude", "taylor")
    np.testing.assert_allclose(sliced.heads[:3], masked.heads[:3], rtol=1e-5, atol=1e-9)  # float32, order of sums
    np.testing.assert_allclose(sliced.neurons[:3], masked.neurons[:3], rtol=1e-5, atol=1e-9)
    for result in (sliced, masked):
        assert not result.neurons[:, 1, 1::2].any() and not result.heads[:, 1, :2].any()
        assert not result.neurons[:3, 2].any() and result.neurons[:, 1, ::2].all()
        assert result.sizes == Sizes.of(subject)
    with pytest.raises(ValueError, match="form='mask'"), subject.under(Prune(plan)):
        run(subject, "taylor")


def test_a_cache_that_is_compressed_is_read_through_but_has_no_gradient() -> None:
    from workbench import QuantizeKV

    subject = Subject.tiny("llama", verify=False)
    squeezed = QuantizeKV(2, 2, group=4, residual=0, sinks=0)
    with subject.under(squeezed):
        packed = run(subject, "amp_out", data=random_texts(subject, 0))
    plain = run(subject, "amp_out", data=random_texts(subject, 0))
    np.testing.assert_allclose(packed.heads, plain.heads, rtol=0.6)
    assert not np.allclose(packed.heads, plain.heads, rtol=1e-3)
    with (
        pytest.warns(UserWarning, match="never fired"),
        subject.under(squeezed),
        pytest.raises(ValueError, match="acts on the cache"),
    ):
        run(subject, "taylor")


def test_the_table_of_a_plan_says_what_is_left_of_each_layer() -> None:
    subject = subject_of("llama")
    result = run(subject, "amp_out")
    plan = Plan.of(subject, {0: {"neurons": range(12), "kv_heads": [1]}}, drop=[1])
    table: Any = result.plan_table(plan)
    assert tuple(table.columns) == PLAN_COLUMNS
    assert table[["heads", "kv_heads", "neurons"]].to_numpy().tolist() == [[2, 1, 12], [0, 0, 0], [4, 2, 48]]
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in subject.model.model.layers]
    assert table["parameters_before"].tolist() == blocks and table["parameters"][1] == 0
    assert blocks[0] - table["parameters"][0] == 1536 + 36 * 96  # h d (2g + 2) and 3 d each
    assert table["kv_bytes_per_token"].tolist() == [2 * 8 * 4, 0, 2 * 2 * 8 * 4]
    assert table["lowest_kept_neuron"][0] == result.neurons[0, 0, :12].min()
    assert table["highest_removed_head"][0] == result.heads[0, 0, :2].max() and np.isnan(
        table["highest_removed_head"][2]
    )
    assert plan_table(plan, result.sizes)["lowest_kept_head"].isna().all()
    figure = kept_map(plan, title="one layer is dropped and one is halved")
    shares = np.array(figure.data[0].z)
    assert shares[1].max() == 0 and shares[0].tolist() == [0, 0, 1, 1] and shares[2].min() == 1


def test_criteria_that_agree_correlate_and_random_ones_do_not() -> None:
    result = run(subject_of("llama"), "amp_out", "amp", "random", data=random_texts(subject_of("llama"), 0))
    found: Any = result.correlation().set_index(["family", "criterion", "other"])["correlation"]
    assert found["heads", "amp_out", "amp"] == 1.0 and found["neurons", "amp_out", "amp"] > 0.8
    assert abs(found["neurons", "amp_out", "random"]) < 0.3
    assert "amp" in str(result.plot("correlation").layout.title.text)


@pytest.mark.parametrize(
    ("criterion", "data", "options", "message"),
    [
        ("amp", None, {}, "amp reads some"),
        ("taylor", [], {}, "taylor reads some"),
        ("wanda", ["a"], {}, "criteria \\('wanda',\\), expected some of amp_out"),
        ((), ["a"], {}, "each once"),
        (("amp", "amp"), ["a"], {}, "each once"),
        ("amp", ["a"], {"norm": 3}, "norm=3"),
        ("taylor", [[5]], {}, "text 0 has 1 token"),
        ("amp", "one text", {}, "got one string"),
    ],
)
def test_what_can_not_be_scored_is_refused(criterion, data, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        PruningScores(criterion, **options).run(subject_of("llama"), data)


def test_settings_and_views_that_are_none_are_refused() -> None:
    for options in ({"source": "peft"}, {"variant": "third"}, {"order": "second"}, {"rank": 0}):
        with pytest.raises(ValueError, match="Taylor: got"):
            Taylor(**options)
    result = scored(subject_of("llama"), None, ("magnitude",))
    with pytest.raises(ValueError, match="kept, curves"):
        result.plot("correlation")
    with pytest.raises(ValueError, match="got criterion 'amp', expected one of magnitude"):
        result.plan(0.2, criterion="amp")
    with pytest.raises(ValueError, match="one of the two"):
        result.plan(0.2, keep=0.8)
    with pytest.raises(ValueError, match="scores of heads hold NaN"):
        Ranking(np.full((1, 2), np.nan), np.ones((1, 2)), result.sizes)


def test_a_model_without_what_a_budget_takes_is_told_so() -> None:
    ranking: Any = PruningScores().run(Subject.tiny("mixtral"), ["one morning the sailor dived alone ."]).ranking()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"there are no neurons to take: .*mixture"):
        ranking.most(Budget(of="neurons", allocation="global"))


def test_the_largest_ratio_can_be_had_whatever_its_rounding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, d = int(rng.integers(2, 9)), 8 * int(rng.integers(1, 40))
        each = [(size,) * n for size in (d * d // 4, d * d // 2, 3 * d, 0)]
        sizes = Sizes(Shape(n, d, 8, 4, d // 8, 64), *each, int(rng.integers(0, 10**6)))
        ranking = Ranking(rng.random((n, 8)), rng.random((n, 64)), sizes)
        for allocation in ("uniform", "global"):
            for of in ("blocks", "all", "heads", "neurons"):
                budget = Budget(of=of, allocation=allocation, keep_first=1)  # type: ignore[arg-type]
                plan = ranking.plan(ranking.most(budget), budget)
                assert min(plan.kept(layer, "neurons") for layer in range(n)) >= LEAST_NEURONS


def test_a_budget_for_no_layer_and_shares_in_a_list_are_refused() -> None:
    ranking = llama2_7b()
    for allocation in ("uniform", "global"):
        with pytest.raises(ValueError, match="Keep fewer whole"):
            ranking.most(Budget(allocation=allocation, keep_first=1, keep_last=1))
    for wrong in (3, None, [(0, 0.5)]):
        with pytest.raises(ValueError, match="Budget: got allocation="):
            Budget(allocation=wrong)  # type: ignore[arg-type]


def test_adapters_learn_beside_a_block_that_is_dropped() -> None:
    subject, found = Subject.tiny("llama", verify=False), []
    for rate in (1e-4, 1e-1):
        with subject.under(DropBlocks((1,))):
            settings = Taylor("lora", steps=4, learning_rate=rate)
            found.append(run(subject, "taylor", data=random_texts(subject, 0), taylor=settings))
    assert not found[0].neurons[0, 1].any() and not np.array_equal(found[0].neurons, found[1].neurons)


def test_a_model_of_which_some_layers_alone_are_mixtures_has_its_heads_scored() -> None:
    _, tokenizer = tiny_pair("llama")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    sizes |= {"head_dim": 8, "intermediate_size": 48, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes, **experts)).eval()
    subject = Subject(model, tokenizer, name="one dense layer", verify=False)
    assert subject.anatomy.d_mlp == 48
    result = run(subject, *CRITERIA)
    assert result.neurons.shape == (len(CRITERIA), 3, 0) and (result.heads > 0).all()
    plan = result.plan(0.3, of="heads", allocation="global")
    assert result.plan_table(plan)["lowest_kept_neuron"].isna().all() and "only heads are scored" in result.finding
    with subject.under(Prune(plan)):
        subject.nll([texts()[0]])


def test_a_figure_tells_the_share_that_floors_let_go() -> None:
    result = run(Subject.tiny("mixtral", verify=False), "magnitude")
    title = str(result.plot("kept", ratio=0.6).layout.title.text)
    assert title.startswith("To free 50% of the parameters in heads, magnitude takes 50% of heads")
