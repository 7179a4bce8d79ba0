"""LowRankKV: cutting a cache to a subspace equals cutting the weights; planted ranks; ranks, bytes and refusals."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from workbench import Site, Subject
from workbench.cache import accounts, cache_bytes, use_stage
from workbench.cache.attention import attend
from workbench.cache.projections import find_projections, second_moments
from workbench.cache.segments import Slots
from workbench.loading import model_fingerprint
from workbench.methods.cache.low_rank import (
    Subspace,
    cumulative,
    eigenbasis,
    energy_kept,
    evened,
    log_kappa,
    progressive_ranks,
    ranks_for_energy,
    spectra_figure,
    spectra_table,
)
from workbench.pruned.plan import Plan
from workbench.toggle import Toggle
from workbench.toggles import Steer, lowrank
from workbench.toggles.evict import EvictKV
from workbench.toggles.lowrank import LowRank, LowRankKV
from workbench.toggles.prune import Prune
from workbench.toggles.quantize import QuantizeKV

TEXTS = (
    "the code is alpha beta gamma delta . the king has a lamp and a bell . recall the code :",
    "the code is omega psi chi phi .",
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu",
)
FP32 = {"rtol": 1e-4, "atol": 2e-5}  # two ways to sum in float32, measured 4e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_biases(family: str) -> Subject:
    """A tiny subject whose biases and norms are not the zeros and ones that they are made with."""
    subject = Subject.tiny(family)
    with torch.no_grad():
        for number, parameter in enumerate(subject.model.parameters()):
            if parameter.dim() == 1:
                parameter += 0.3 * random(*parameter.shape, seed=number).to(parameter.dtype)
    return Subject(subject.model, subject.tokenizer, name=subject.name)


def logprobs(subject: Subject, texts: tuple[str, ...] = TEXTS) -> Tensor:
    return torch.cat([rows for _, _, rows in sorted(subject.predictions(list(texts)), key=lambda found: found[0])])


def cut_weights(subject: Subject, rank: int) -> None:
    """Replace the weights of keys and values by their nearest of this rank, head by head: what LoRC does."""
    for kinds in find_projections(subject).values():
        for projection in kinds.values():
            u, s, v = torch.linalg.svd(projection.weight(), full_matrices=False)
            cut = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]  # (kv_head, d_model, d_head)
            weight: Any = projection.linear.weight
            rows = weight.data.T if type(projection.linear).__name__ == "Conv1D" else weight.data
            rows[projection.columns] = cut.transpose(1, 2).to(weight.dtype)


# Pure functions


def test_a_planted_rank_is_enough_and_one_less_is_not() -> None:
    weight = random(2, 40, 5) @ random(2, 5, 16, seed=1)
    moment = weight.transpose(1, 2) @ weight
    vectors = eigenbasis(moment)[1]
    x = random(1, 2, 30, 40, seed=2) @ weight
    for rank, exact in ((5, True), (4, False)):
        subspace = Subspace(vectors[:, :, :rank], torch.zeros(2, 16))
        error = float((subspace.back(subspace.into(x)) - x).norm() / x.norm())
        assert (error < 1e-7) == exact
        assert math.isclose(energy_kept(moment, vectors[:, :, :rank]), 1.0, abs_tol=1e-12) == exact


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_bounded_by_the_next_singular_value_and_exact_for_white_inputs(rank: int) -> None:
    weight, x = random(1, 20, 8), random(50, 20, seed=1)
    values = torch.linalg.svdvals(weight[0])
    vectors = eigenbasis(weight.transpose(1, 2) @ weight)[1][0, :, :rank]
    lost = weight[0] - weight[0] @ vectors @ vectors.T
    assert float((x @ lost).norm()) <= float(values[rank] * x.norm()) * (1 + 1e-12)
    white = torch.linalg.qr(x).Q
    assert math.isclose(float((white @ lost).norm()), float(values[rank:].square().sum().sqrt()), rel_tol=1e-10)


def test_bases_from_activations_are_never_worse_on_them_and_miss_exactly_the_tail() -> None:
    weight, x = random(1, 24, 12), random(400, 24, seed=1) @ random(24, 24, seed=2)
    v = x @ weight[0]
    moment = (v.T @ v)[None]
    aware, blind = eigenbasis(moment), eigenbasis(weight.transpose(1, 2) @ weight)
    for rank in range(1, 13):
        errors = []
        for _, vectors in (aware, blind):
            kept = vectors[0, :, :rank]
            errors.append(float((v - v @ kept @ kept.T).norm()))
        tail = float(aware[0][0, rank:].sum().sqrt())
        assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-6 * float(v.norm())
        assert math.isclose(errors[0], tail, rel_tol=1e-6, abs_tol=1e-5 * float(v.norm()))


def test_the_subspace_of_activations_is_that_of_the_whitened_weight() -> None:
    weight, x = random(24, 12), random(400, 24, seed=1) @ random(24, 24, seed=2)
    root = torch.linalg.eigh(x.T @ x)
    whitened = root.eigenvectors @ root.eigenvalues.sqrt().diag() @ root.eigenvectors.T @ weight
    right = torch.linalg.svd(whitened).Vh[:4].T
    vectors = eigenbasis((x @ weight).T[None] @ (x @ weight))[1][0, :, :4]
    torch.testing.assert_close(vectors @ vectors.T, right @ right.T, rtol=1e-9, atol=1e-9)


def test_latent_attention_equals_rebuilt_attention_and_naive_absorption_under_rotation_does_not() -> None:
    subspace = Subspace(eigenbasis(random(2, 8, 30) @ random(2, 30, 8, seed=1))[1][:, :, :3], random(2, 8, seed=2))
    query, plain = random(1, 4, 5, 8, seed=3), random(1, 2, 5, 8, seed=4)
    positions = torch.arange(5)[None]
    z_k, z_v = subspace.into(plain), subspace.into(random(1, 2, 5, 8, seed=5))

    def read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        slots = Slots((keys, values), positions[:, None].int(), True)
        return attend(query, slots, positions, scaling=8**-0.5)

    def absorbed(query: Tensor) -> Tensor:
        """Neither keys nor values are rebuilt: q V against z, and the sum of z V^T + b once per query head."""
        inside = (query.unflatten(1, (2, 2)) @ subspace.vectors[:, None]).flatten(1, 2)
        latent = read(inside, z_k, z_v).unflatten(1, (2, 2))
        return (latent @ subspace.vectors.transpose(1, 2)[:, None] + subspace.offset[:, None, None]).flatten(1, 2)

    rebuilt = read(query, subspace.back(z_k), subspace.back(z_v))
    torch.testing.assert_close(absorbed(query), rebuilt, rtol=1e-10, atol=1e-10)  # q.b is equal for all keys

    rotation = find_projections(Subject.tiny("llama"))[0]["keys"].rotation
    assert rotation is not None
    turned = read(rotation.turn(query, positions), rotation.turn(subspace.back(z_k), positions), subspace.back(z_v))
    assert float((absorbed(rotation.turn(query, positions)) - turned).norm() / turned.norm()) > 0.05


def test_ranks_fall_from_the_highest_to_the_lowest_by_cumulative_condition_number() -> None:
    assert cumulative([3, 4, 3, 2]) == [12, 9, 5, 2]
    assert progressive_ranks([3, 4, 3, 2], 63, 15) == [63, 49, 29, 15]  # 63, 48.6, 29.4, 15
    assert progressive_ranks([3, 4, 3, 2], 64, 16) == [64, 48, 32, 16]  # of 64, 49.6, 30.4, 16 in steps of 8
    assert progressive_ranks([0, 0, 0], 24, 8) == [24, 24, 24]
    assert progressive_ranks([5], 24, 8) == [24]
    for seed in range(20):
        logs = random(9, seed=seed).abs().tolist()
        for highest, lowest in ((64, 8), (61, 7), (8, 8)):
            ranks = progressive_ranks(logs, highest, lowest)
            assert ranks == sorted(ranks, reverse=True) and ranks[0] == highest and ranks[-1] == lowest
            sums = cumulative(logs)
            share = [(value - min(sums)) / (max(sums) - min(sums)) for value in sums]
            exact = sum(lowest + (highest - lowest) * part for part in share)
            assert abs(sum(ranks) - exact) <= (4 if highest % 8 == lowest % 8 == 0 else 0.5) + 1e-9


def test_a_dead_channel_has_a_large_but_finite_condition_number() -> None:
    weight = random(2, 40, 8)
    assert log_kappa(weight) < 2
    weight[1, :, 3] = 0
    assert math.isclose(log_kappa(weight), math.log(1e4))
    assert math.isclose(log_kappa(7 * weight), log_kappa(weight))
    assert math.isclose(log_kappa(0 * weight), 0.0)


def test_ranks_for_energy_are_the_least_that_keep_the_share_in_each_layer() -> None:
    spectra = [(0, "keys", torch.tensor([[6.0, 3.0, 1.0]])), (2, "keys", torch.ones(2, 3))]
    table = spectra_table(spectra)
    assert ranks_for_energy(table, 0.9, n_layers=4) == (2, 3, 3, 3)  # layers without a spectrum stay whole
    assert ranks_for_energy(table, 0.6, n_layers=3) == (1, 3, 2)
    assert ranks_for_energy(table, 1.0, n_layers=3) == (3, 3, 3)
    more = spectra_table([*spectra, (0, "values", torch.tensor([[1.0, 1.0, 1.0]]))])
    assert ranks_for_energy(more, 0.9, n_layers=3)[0] == 3, "the tensor that needs more decides"
    with pytest.raises(ValueError, match="expected above 0"):
        ranks_for_energy(table, 0.0, n_layers=3)


# What is found in a model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "phi", "opt", "phi3", "qwen3", "olmo2"])
def test_the_projections_found_make_what_the_model_caches(family: str) -> None:
    subject = with_biases(family)
    found = find_projections(subject)
    ids = torch.tensor([subject.tokenize(list(TEXTS)).ids[0]])
    norm = {"llama": "input_layernorm", "gpt2": "ln_1", "opt": "self_attn_layer_norm"}.get(family, "input_layernorm")
    inputs: list[Tensor] = []
    block: Any = subject.model.get_submodule(f"{subject.anatomy.blocks}.1")
    if family == "olmo2":  # its attention reads the residual stream itself
        handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    else:
        handle = block.get_submodule(norm).register_forward_hook(lambda _, args, out: inputs.append(out))
    with torch.no_grad():
        cache = subject.model(input_ids=ids, use_cache=True).past_key_values
    handle.remove()
    for kind, projection in found[1].items():
        plain = projection.plain(getattr(cache.layers[1], kind), torch.arange(ids.shape[1])[None])[0].double()
        made = inputs[0].double() @ projection.weight() + projection.bias()[:, None]
        if projection.gain is not None:  # up to one number per token and head
            assert family in ("qwen3", "olmo2") and kind == "keys"
            made, plain = (x / x.norm(dim=-1, keepdim=True) for x in (made, plain))
        torch.testing.assert_close(plain, made.reshape(plain.shape), **FP32)
        assert (projection.rotation is not None) == (kind == "keys" and family not in ("gpt2", "opt"))


def test_moments_of_texts_are_those_of_their_cached_vectors() -> None:
    subject = with_biases("qwen2")
    found = find_projections(subject)
    both = second_moments(subject, found, list(TEXTS[:2]))
    parts = [second_moments(subject, found, [text]) for text in TEXTS[:2]]
    torch.testing.assert_close(both[1]["keys"], parts[0][1]["keys"] + parts[1][1]["keys"])
    ids = torch.tensor([subject.tokenize([TEXTS[1]]).ids[0]])
    with torch.no_grad():
        values = subject.model(input_ids=ids, use_cache=True).past_key_values.layers[2].values[0].double()
    centred = values - subject.model.get_submodule("model.layers.2.self_attn.v_proj").bias.reshape(2, 1, 8)
    torch.testing.assert_close(parts[1][2]["values"], centred.transpose(1, 2) @ centred)


def test_a_normalised_key_with_a_bias_lies_in_the_row_space_that_is_found() -> None:
    model: Any = Subject.tiny("qwen3").model
    config = type(model.config)(**{**model.config.to_dict(), "attention_bias": True, "hidden_size": 4})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        subject = Subject(type(model)(config).eval(), Subject.tiny("llama").tokenizer, name="normalised")
    with torch.no_grad():
        subject.model.get_submodule("model.layers.0.self_attn.k_proj").bias.uniform_(-1, 1)
    found = find_projections(subject)
    weight = found[0]["keys"].weight()
    assert weight.shape[1] == 5  # four directions of x and the bias, in eight of the key
    moment = second_moments(subject, found, list(TEXTS[:1]))[0]["keys"]
    for rank, exact in ((5, True), (4, False)):
        kept = energy_kept(moment, eigenbasis(weight.transpose(1, 2) @ weight)[1][:, :, :rank])
        assert math.isclose(kept, 1.0, abs_tol=1e-6) == exact


# The toggle


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "phi", "opt", "phi3", "mixtral"])
def test_as_published_it_equals_a_model_whose_weights_were_cut(family: str) -> None:
    subject, other = with_biases(family), with_biases(family)
    cut_weights(other, 3)
    with subject.under(LowRankKV(3, mode="paper")):
        torch.testing.assert_close(logprobs(subject), logprobs(other), **FP32)
    with subject.under(LowRankKV(3)):  # corrected: the new tokens are exact, so it is not that model
        assert float((logprobs(subject) - logprobs(other)).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("keys", [True, False])
def test_it_equals_a_plain_cache_whose_tokens_are_cut_one_by_one(family: str, keys: bool) -> None:
    subject, toggle = with_biases(family), LowRankKV(3, keys=keys)
    found = find_projections(subject)
    ids = subject.tokenize([TEXTS[0]]).ids[0]
    cache, rows = DynamicCache(), []
    for position, token in enumerate(ids):
        with torch.no_grad():
            logits = subject.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
        rows.append(logits[0, -1].log_softmax(-1))
        at = torch.tensor([[position]])
        for layer, kinds in found.items():
            for kind in ("keys", "values") if keys else ("values",):
                projection, held = kinds[kind], getattr(cache.layers[layer], kind)
                right = torch.linalg.svd(projection.weight()).Vh[:, :3].float()
                bias = projection.bias()[:, None].float()
                plain = projection.plain(held[:, :, -1:], at)
                cut = (plain - bias) @ right.transpose(1, 2) @ right + bias
                held[:, :, -1:] = cut if projection.rotation is None else projection.rotation.turn(cut, at)
    with subject.under(toggle):
        torch.testing.assert_close(logprobs(subject, TEXTS[:1]), torch.stack(rows), **FP32)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_planted_low_rank_weights_lose_nothing_at_that_rank(family: str) -> None:
    subject = with_biases(family)
    cut_weights(subject, 2)
    plain = logprobs(subject)
    with subject.under(LowRankKV(2)):
        torch.testing.assert_close(logprobs(subject), plain, **FP32)
    with subject.under(LowRankKV(1)):
        assert float((logprobs(subject) - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("assigned", [False, True])
def test_weights_that_changed_have_bases_of_their_own_also_where_no_version_tells(assigned: bool) -> None:
    subject, other = Subject.tiny("llama"), Subject.tiny("llama", seed=1)
    with subject.under(LowRankKV(2)):
        logprobs(subject)  # bases of the weights as they were
    cut_weights(other, 2)
    if assigned:
        subject.model.load_state_dict(other.model.state_dict(), assign=True)
    else:
        for parameter, new in zip(subject.model.parameters(), other.model.parameters(), strict=True):
            parameter.data.copy_(new.data)  # counts no version
    plain = logprobs(subject)
    with subject.under(LowRankKV(2)):
        torch.testing.assert_close(logprobs(subject), plain, **FP32)


def test_bases_are_found_once_for_all_ranks_and_once_more_after_a_change_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject, found = Subject.organism(), []
    monkeypatch.setattr(lowrank, "find_projections", lambda *given: found.append(1) or find_projections(*given))
    for rank in (2, 3, (4, 2, 8, 8, 8, 8)):
        with subject.under(LowRankKV(rank)):
            subject.nll(TEXTS)
    assert len(found) == 1
    large = subject.model.get_input_embeddings().weight
    before = model_fingerprint(subject.model)
    with torch.no_grad():
        large[0, 1] += 1.0
    assert model_fingerprint(subject.model) == before, "it looks at some numbers of a large matrix only"
    with subject.under(LowRankKV(2)):
        subject.nll(TEXTS)
    assert len(found) == 2


def test_bases_from_texts_are_those_of_the_model_as_it_is_with_an_edit_and_without() -> None:
    subject, toggle = Subject.tiny("llama"), LowRankKV(2, texts=TEXTS)
    push = 5 * random(subject.anatomy.d_model).float()

    def vectors() -> Tensor:
        with subject.under(toggle):
            subject.nll(TEXTS)
            stage: Any = subject.stages.project
            return stage.subspaces[2, "keys"].vectors

    plain = vectors()
    with ExitStack() as undo:  # an edit outside of any toggle: nothing lifts it
        subject.edit(Site(0, "resid_out"), lambda value, step: value + push, undo)
        assert not torch.allclose(vectors(), plain, atol=1e-3)
    assert torch.equal(vectors(), plain)


def test_ranks_that_fall_are_those_of_whole_layers_where_heads_are_gone() -> None:
    subject, toggle = Subject.tiny("llama"), LowRankKV(6, lowest=2)
    with subject.under(Prune(Plan.of(subject, {1: {"kv_heads": [0]}})) | toggle):
        subject.nll(TEXTS)
        stage: Any = subject.stages.project
        ranks = [stage.subspaces[layer, "keys"].vectors.shape[-1] for layer in range(3)]
    assert ranks == toggle.plan(subject).rank_k.tolist() and ranks[0] > ranks[-1]


def test_weights_made_in_inference_mode_have_no_version_and_are_served() -> None:
    with torch.inference_mode():
        subject = Subject.tiny("llama", verify=False)
    with torch.inference_mode(), subject.under(LowRankKV(2)):
        cut = subject.nll(TEXTS)
    plain = Subject.tiny("llama")
    with plain.under(LowRankKV(2)):
        torch.testing.assert_close(cut, plain.nll(TEXTS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_rank_installs_nothing_and_forced_through_a_full_basis_it_changes_nothing(family: str) -> None:
    subject = with_biases(family)
    plain, width = logprobs(subject), subject.anatomy.d_head
    for neutral in (LowRankKV(1.0), LowRankKV(width), LowRankKV((width,) * subject.n_layers)):
        with pytest.warns(UserWarning, match="never fired"), subject.under(neutral):
            assert torch.equal(logprobs(subject), plain) and not subject.stages
    found = find_projections(subject)
    full = {
        (layer, kind): Subspace(torch.linalg.qr(random(subject.anatomy.n_kv_heads, width, width)).Q, one.bias())
        for layer, kinds in found.items()
        for kind, one in kinds.items()
    }

    class Forced(LowRankKV):
        def install(self, subject: Subject, undo: ExitStack) -> None:
            use_stage(subject, "project", LowRank(found, full, exact=False), undo)
            subject.receipt.fired = 1

    with subject.under(Forced(0.9)):
        torch.testing.assert_close(logprobs(subject), plain, **FP32)


@pytest.mark.parametrize(("keys", "share"), [(True, 0.5), (False, 0.75)])
def test_the_bytes_are_those_of_the_formula(keys: bool, share: float) -> None:
    subject, toggle = Subject.tiny("llama"), LowRankKV(0.5, keys=keys)
    ids = torch.tensor([subject.tokenize(list(TEXTS)).ids[0]])
    tokens, heads, width = ids.shape[1], subject.anatomy.n_kv_heads, subject.anatomy.d_head
    with subject.under(toggle), torch.no_grad():
        cache: Any = subject.model(input_ids=ids, use_cache=True).past_key_values
        freed = subject.receipts[0].bytes_freed
    held = sum(buffer.nbytes for layer in cache.layers for buffer in layer.recent.buffers)
    whole = subject.n_layers * tokens * heads * 2 * width * 4
    index = cache_bytes(cache) - held
    assert held == share * whole == whole - freed
    assert index == subject.n_layers * (tokens * 4 + 8)  # a position per token, a count per row
    assert sum(row["numbers"] for row in accounts(cache)) * 4 == whole, "what the short vectors stand for"
    plan = toggle.plan(subject)
    assert plan.bytes_per_token.sum() * tokens == held and set(plan.share) == {share}


def test_the_plan_tells_ranks_energy_and_the_error_on_other_texts() -> None:
    subject = Subject.organism()
    blind = LowRankKV(24, lowest=8).plan(subject, TEXTS[:1])
    aware = LowRankKV(24, lowest=8, texts=TEXTS[:1]).plan(subject, TEXTS[:1])
    assert list(blind.rank_k) == sorted(blind.rank_k, reverse=True)
    assert (blind.rank_k.iloc[0], blind.rank_k.iloc[-1]) == (24, 8) and list(blind.rank_k) == list(aware.rank_k)
    assert blind.log_kappa_cum.iloc[-1] == blind.log_kappa.iloc[-1] and blind.log_kappa_cum.is_monotonic_decreasing
    for kind in "kv":
        assert (aware[f"error_{kind}"] <= blind[f"error_{kind}"]).all()  # on the texts that they come from
        torch.testing.assert_close(
            torch.tensor(aware[f"error_{kind}"] ** 2 + aware[f"energy_kept_{kind}"]), torch.ones(6, dtype=torch.float64)
        )
    assert LowRankKV(8).plan(subject)[["error_k", "error_v"]].isna().all(axis=None)
    values_only = LowRankKV(8, keys=False).plan(subject)
    assert set(values_only.rank_k) == {32} and set(values_only.energy_kept_k.round(9)) == {1.0}


def test_a_larger_rank_hurts_the_organism_less() -> None:
    subject = Subject.organism()
    plain = logprobs(subject)
    moved = []
    for rank in (28, 16, 4):
        with subject.under(LowRankKV(rank)):
            moved.append(float((logprobs(subject).exp() - plain.exp()).abs().sum(-1).mean()))
    assert moved[0] < moved[1] < moved[2] and moved[0] < 0.1 < moved[2]


def test_one_rank_per_layer_cuts_only_the_layers_that_are_told() -> None:
    subject = Subject.tiny("llama")
    with subject.under(LowRankKV((8, 2, 8))), torch.no_grad():
        ids = torch.tensor([subject.tokenize(list(TEXTS)).ids[0]])
        cache: Any = subject.model(input_ids=ids, use_cache=True).past_key_values
        assert [layer.recent.buffers[0].shape[-1] for layer in cache.layers] == [8, 2, 8]
        assert subject.receipts[0].tokens == ids.shape[1]


# With other toggles


@pytest.mark.parametrize(
    ("mode", "by", "family"),
    [("corrected", "h2o", "llama"), ("paper", "snapkv", "llama"), ("corrected", "snapkv", "gpt2")],
)
def test_projected_evicted_and_packed_a_padded_batch_equals_single_texts(mode: Any, by: str, family: str) -> None:
    subject = with_biases(family)
    toggle: Toggle = (
        EvictKV(6, by, "adaptive" if by == "h2o" else "uniform", sinks=1, window=3, every=2)
        | LowRankKV(3, mode=mode)
        | QuantizeKV(8, 8, group=2, residual=2, sinks=1)
    )
    with subject.under(toggle):
        alone = torch.cat([logprobs(subject, (text,)) for text in TEXTS])
        torch.testing.assert_close(logprobs(subject), alone, **FP32)
        assert all(receipt.fired for receipt in subject.receipts)
        ours = subject.generate(list(TEXTS), max_new_tokens=8).ids
        for text, ids in zip(TEXTS[:2], ours, strict=False):
            made = torch.tensor([subject.tokenize([text]).ids[0]])
            theirs: Any = subject.model.generate(made, attention_mask=made.ne(-1), max_new_tokens=8, do_sample=False)
            assert tuple(theirs[0, made.shape[1] :].tolist()) == ids


@pytest.mark.parametrize("toggle", [LowRankKV(3), LowRankKV(3, keys=False), LowRankKV(3, mode="paper")])
def test_a_padded_batch_goes_on_as_its_texts_alone(toggle: LowRankKV) -> None:
    subject = with_biases("llama")  # whole keys are read as a view of where the new ones are written
    with subject.under(toggle):
        ours = subject.generate(list(TEXTS), max_new_tokens=12).ids
        assert ours == tuple(subject.generate([text], max_new_tokens=12).ids[0] for text in TEXTS)


@pytest.mark.parametrize("keys", [True, False])
def test_re_indexed_and_projected_a_padded_batch_equals_single_texts(keys: bool) -> None:
    subject = with_biases("llama")
    toggle = EvictKV(6, "snapkv", sinks=1, window=2, every=2, positions="reindex") | LowRankKV(3, keys=keys)
    with subject.under(toggle):
        alone = torch.cat([logprobs(subject, (text,)) for text in TEXTS])
        torch.testing.assert_close(logprobs(subject), alone, **FP32)
        ours = subject.generate(list(TEXTS), max_new_tokens=8).ids
        assert ours == tuple(subject.generate([text], max_new_tokens=8).ids[0] for text in TEXTS)


def test_axes_of_even_energy_span_the_same_subspace() -> None:
    _, vectors = eigenbasis(random(2, 8, 3) @ random(2, 3, 8, seed=1))
    for rank in (1, 3, 8):
        cut = vectors[:, :, :rank]
        mixed = evened(cut)
        torch.testing.assert_close(mixed @ mixed.transpose(1, 2), cut @ cut.transpose(1, 2), rtol=1e-12, atol=1e-12)
    weight = torch.tensor([100.0, 10.0, 1.0, 0.1]).diag()[None].double()
    assert float((evened(torch.eye(4)[None].double())[0].T @ weight[0]).norm(dim=1).min()) > 30  # was 0.1


def test_what_is_packed_is_the_short_vector() -> None:
    subject = Subject.organism()
    ids = torch.tensor([subject.tokenize([TEXTS[0]]).ids[0]])
    with torch.no_grad():
        with subject.under(LowRankKV(8)):
            whole: Any = subject.model(input_ids=ids, use_cache=True).past_key_values
        with subject.under(LowRankKV(8) | QuantizeKV(8, 8, group=2, residual=2, sinks=1)):
            packed: Any = subject.model(input_ids=ids, use_cache=True).past_key_values
    for one, other in zip(whole.layers, packed.layers, strict=True):
        assert other.packed[-1].keys[0].shape[-1] == other.packed[-1].values[0].shape[-1] == 8
        for a, b in zip(one.slots().tensors, other.slots().tensors, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0.02 * float(a.abs().max()))  # 1 / 255 of a group's range


def test_eviction_keeps_the_vectors_of_the_tokens_that_it_keeps() -> None:
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize([TEXTS[0]]).ids[0]])
    with torch.no_grad():
        with subject.under(LowRankKV(3)):
            whole: Any = subject.model(input_ids=ids, use_cache=True).past_key_values
        with subject.under(EvictKV(5, "streaming", sinks=2, window=3) | LowRankKV(3)):
            kept: Any = subject.model(input_ids=ids, use_cache=True).past_key_values
    last = ids.shape[1] - 1
    slots = kept.layers[0].slots()
    assert slots.positions[0, 0].tolist() == [0, 1, last - 2, last - 1, last]
    for a, b in zip(whole.layers[0].slots().tensors, slots.tensors, strict=True):
        torch.testing.assert_close(b, a[:, :, [0, 1, -3, -2, -1]])


def test_it_reads_the_plain_model_while_other_toggles_act_and_is_installed_once() -> None:
    subject = Subject.tiny("llama")
    steer = Steer(random(subject.anatomy.d_model).float(), Site(0, "resid_out"), 2.0)
    evict, cut = EvictKV(5, "streaming", sinks=1, window=2), LowRankKV(3, texts=TEXTS)
    before = LowRankKV(3, texts=TEXTS)._moments(subject, find_projections(subject))
    with subject.under(steer | evict | cut):
        assert subject.active == (steer, evict, cut)
        assert subject.receipts[0].fired == subject.receipts[1].fired == 0, "bases are none of their business"
        under = logprobs(subject)
        with subject.untoggled():
            after = cut._moments(subject, find_projections(subject))
            assert subject.active == () and torch.equal(after[1]["keys"], before[1]["keys"])
        assert subject.active == (steer, evict, cut) and torch.equal(logprobs(subject), under)
    assert subject.active == () and not subject.stages


# Half precision, refusals


def test_it_works_in_bfloat16() -> None:
    subject = Subject.organism(dtype="bfloat16")
    plain = subject.nll(TEXTS)
    with subject.under(LowRankKV(28)):
        cut = subject.nll(TEXTS)
        ids = torch.tensor([subject.tokenize([TEXTS[0]]).ids[0]])
        cache: Any = subject.model(input_ids=ids, use_cache=True).past_key_values
    assert cache.layers[0].recent.buffers[0].dtype == torch.bfloat16
    assert float((cut - plain).abs().max()) < 0.3


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, (), (4, 0)])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="expected a share above 0"):
        LowRankKV(rank)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "exact"}, "expected 'corrected' or 'paper'"),
        ({"texts": "a text"}, "expected several texts"),
        ({"lowest": 0}, "expected lowest >= 1"),
        ({"rank": (4, 2), "lowest": 1}, "Leave out lowest"),
    ],
)
def test_bad_settings_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LowRankKV(**options)


@pytest.mark.parametrize(
    ("toggle", "words"),
    [
        (LowRankKV(9), "got rank 9, but tiny:llama:0 has d_head 8"),
        (LowRankKV((4, 4)), "got 2 ranks, expected one per layer, 3"),
        (LowRankKV(4, lowest=5), "expected 1 <= lowest <= highest"),
        (LowRankKV(4, texts=("alpha " * 600,)), "but the model's context is 512"),
    ],
)
def test_settings_that_a_subject_cant_have_are_refused_and_nothing_stays(toggle: LowRankKV, words: str) -> None:
    subject = Subject.tiny("llama")
    with pytest.raises(ValueError, match=words), subject.under(toggle):
        raise AssertionError("never reached")
    assert subject.active == () and not subject.stages


def test_a_model_without_full_attention_is_refused_in_words() -> None:
    subject = Subject.tiny("mistral")
    with pytest.raises(ValueError, match="no layer of full attention"), subject.under(LowRankKV(4)):
        raise AssertionError("never reached")


def test_keys_that_are_rotated_in_several_ways_are_refused_and_values_are_not() -> None:
    from transformers import Gemma3ForCausalLM

    model: Any = Subject.tiny("gemma3_text").model
    config = type(model.config)(**{**model.config.to_dict(), "layer_types": ["full_attention"] * 3})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        subject = Subject(Gemma3ForCausalLM(config).eval(), Subject.tiny("llama").tokenizer, name="several")
    with (
        pytest.raises(ValueError, match=r"keys can't be compressed\. .* Or pass keys=False"),
        subject.under(LowRankKV(4)),
    ):
        raise AssertionError("never reached")
    with subject.under(LowRankKV(4, keys=False)):
        subject.nll(TEXTS)
        assert subject.receipts[0].fired > 0


def test_two_projections_of_one_cache_are_refused() -> None:
    subject = Subject.tiny("llama")
    with pytest.raises(ValueError, match=r"both claim 'kv\.project'"), subject.under(LowRankKV(4) | LowRankKV(2)):
        raise AssertionError("never reached")


def test_weights_that_are_no_plain_numbers_need_texts() -> None:
    projection = find_projections(Subject.tiny("llama"))[0]["values"]
    with torch.no_grad():
        projection.linear.weight = torch.nn.Parameter(projection.linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="expected floating point"):
        projection.weight()


def test_the_figure_of_spectra_says_what_half_of_the_directions_leave_out() -> None:
    table = LowRankKV(4).spectra(Subject.organism())
    assert list(table.columns) == ["layer", "tensor", "kv_head", "rank", "energy_left_out"]
    assert len(table) == 6 * 2 * 2 * 32 and (table[table["rank"] == 32].energy_left_out < 1e-9).all()
    assert "Half of the 32 directions of keys leave out" in str(spectra_figure(table, "keys").layout.title.text)
    with pytest.raises(ValueError, match="expected one of keys, values"):
        spectra_figure(table, "queries")
