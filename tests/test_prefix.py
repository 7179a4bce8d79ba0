"""Prefix states: with them every number, receipt and refusal is what it is without them, and fewer blocks run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.contract.families import FAMILIES, subclasses_in, subject_of, texts
from workbench import Clamp, Direction, EvictKV, ProjectOut, Prune, Site, Steer, Subject, toggles
from workbench.organism.tiny import tiny_pair
from workbench.prefix import PrefixStates
from workbench.pruned import Plan
from workbench.pruned.blocks import block_of
from workbench.swap import stand_in, swap
from workbench.toggle import Toggle

NEW = 3


@functools.cache
def states_of(family: str) -> PrefixStates:
    """What each family's blocks did with the three texts, read once for all tests."""
    return PrefixStates.read(subject_of(family), texts())


@pytest.fixture
def llama() -> Subject:
    return subject_of("llama")


@pytest.fixture
def states(llama: Subject) -> PrefixStates:
    return PrefixStates.read(llama, texts())


def said(subject: Subject, prompts: Any = None, at: tuple[Site, ...] = ()) -> dict[str, Any]:
    """All that a subject says about prompts: words, log-probabilities, values, receipts; or its refusals."""
    given = texts() if prompts is None else prompts
    at = at or tuple(Site(layer, "resid_out") for layer in range(subject.n_layers))

    def words() -> Any:
        made = subject.generate(given, max_new_tokens=NEW)
        return made, made.log_probs

    asked: dict[str, Callable[[], Any]] = {
        "words": words,
        "predictions": lambda: {row: logprobs for row, _, logprobs in subject.predictions(given)},
        "values": lambda: dict(subject.capture(given, at, progress=False)),
    }
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except ValueError as error:
            found[name] = str(error)
    return found | {"receipts": [receipt.to_json() for receipt in subject.receipts]}


def equal(a: Any, b: Any) -> bool:
    """Equality to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    return a == b


def vector(subject: Subject, site: Site) -> torch.Tensor:
    """A random direction at a site, flat as a Direction holds it."""
    width = torch.Size(subject.anatomy.width(site)).numel()
    return torch.randn(width, generator=torch.Generator().manual_seed(7))


def places(subject: Subject) -> tuple[Site, ...]:
    """Every place of a subject."""
    return tuple(Site(layer, kind) for layer, kinds in enumerate(subject.anatomy.places) for kind in kinds)  # type: ignore


def edits_at(subject: Subject, site: Site) -> list[Toggle]:
    """Every kind of edit, each with another rule of positions."""
    push = Steer(vector(subject, site), site, 4.0)
    removal, held = ProjectOut(push.direction, (site,), "last"), Clamp(((site, (0, 3)),), 2.0, "prompt")
    return [push, removal, held, replace(push, positions="generated")]


@contextmanager
def counted_mlps() -> Iterator[list[int]]:
    """How often an MLP of the Llama family ran, told by its class: a hook would make its block run."""
    ran, forward = [0], LlamaMLP.forward

    def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
        ran[0] += 1
        return forward(self, x)

    LlamaMLP.forward = counting
    try:
        yield ran
    finally:
        LlamaMLP.forward = forward


# Laws


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_at_every_place_says_the_same_to_the_bit(family):
    subject, states = subject_of(family), states_of(family)
    for turn, site in enumerate(places(subject)):
        edit = edits_at(subject, site)[turn % 4 - site.layer]
        with subject.under(edit):
            plain = said(subject)
        before = states.replayed
        with subject.under(edit), states.resume():
            resumed = said(subject)
        assert equal(plain, resumed), edit
        assert states.replayed - before >= 3 * site.layer, edit  # words, predictions, values


@pytest.mark.parametrize("cls", subclasses_in(toggles, Toggle), ids=lambda cls: cls.__name__)
def test_every_toggle_says_the_same_in_either_order_of_entering(cls, llama, states):
    for turn, toggle in enumerate(cls.examples(llama)):
        with llama.under(toggle):
            plain = said(llama)
        with ExitStack() as undo:
            if turn % 2:
                undo.enter_context(states.resume())
            undo.enter_context(llama.under(toggle))
            if not turn % 2:
                undo.enter_context(states.resume())
            assert equal(plain, said(llama)), toggle


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_edit_no_block_runs_and_every_place_still_reads_the_same(family):
    subject, states = subject_of(family), states_of(family)
    plain = said(subject)
    before = states.replayed, states.misses
    with states.resume():
        assert equal(plain, said(subject))
    assert (states.replayed, states.misses) == (before[0] + 3 * subject.n_layers, before[1])
    plain = said(subject, at=places(subject))
    with states.resume():
        assert equal(plain, said(subject, at=places(subject)))


def test_blocks_run_from_the_edit_on_and_in_every_step_of_decoding(llama, states):
    n = llama.n_layers
    for layer in range(n):
        places = {Site(layer, "resid_in"): layer, Site(layer, "mlp_out"): layer, Site(layer, "resid_out"): layer + 1}
        for site, first in places.items():
            with llama.under(Steer(vector(llama, site), site, 4.0)), states.resume(), counted_mlps() as ran:
                list(llama.predictions(texts()))
                assert ran[0] == n - first
                made = llama.generate(texts(), max_new_tokens=NEW)
            assert max(map(len, made.ids)) == NEW
            assert ran[0] == 2 * (n - first) + (NEW - 1) * n


def test_an_edit_of_generated_tokens_alone_leaves_the_whole_prompt_as_it_was(llama, states):
    site = Site(0, "resid_out")
    with llama.under(Steer(vector(llama, site), site, 4.0, "generated")), states.resume(), counted_mlps() as ran:
        llama.generate(texts(), max_new_tokens=NEW)
    assert ran[0] == (NEW - 1) * llama.n_layers


def test_what_was_read_under_toggles_serves_with_and_without_them():
    subject = subject_of("llama")
    inside, outside = Site(1, "neurons"), Site(0, "resid_out")
    base = Steer(vector(subject, outside), outside, 4.0) | Clamp(((inside, (0, 3)),), 2.0)
    with subject.under(base):
        states = PrefixStates.read(subject, texts())
    with subject.under(base):
        plain = said(subject)
    assert (states.hits, states.misses, states.replayed) == (0, 0, 0)
    with subject.under(base), states.resume():
        assert equal(plain, said(subject))
    assert states.replayed == 3 * (subject.n_layers - 1)  # block 1 has a tap inside
    plain = said(subject)
    with states.resume():
        assert equal(plain, said(subject))  # block 1 was not remembered: what it gave was edited


@pytest.mark.parametrize("path", ["", "mlp"])
def test_what_stands_in_for_a_block_or_a_part_of_it_runs_every_time(llama, path):
    ran: list[str] = []

    def noting(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (ran.append(path), forward(*args, **kwargs))[1]

    with ExitStack() as undo:
        stand_in(block_of(llama, 1).get_submodule(path), noting, undo)
        states = PrefixStates.read(llama, texts())
        assert len(ran) == 2  # with a cache and without one
        with states.resume():
            list(llama.predictions(texts()))
    assert len(ran) == 3 and states.replayed == llama.n_layers - 1


@pytest.mark.parametrize("form", ["mask", "slice"])
def test_a_block_with_other_weights_runs_and_those_before_it_do_not(llama, states, form):
    cut = Prune(Plan.of(llama, {1: {"neurons": range(0, 30)}}), form)
    with llama.under(cut):
        plain = said(llama)
        with states.resume():
            assert equal(plain["predictions"], said(llama)["predictions"])
    assert (states.hits, states.misses, states.replayed) == (3, 0, 3)


def test_a_number_changed_inside_a_block_is_noticed(llama, states):
    with ExitStack() as undo:
        swap(block_of(llama, 1).get_submodule("self_attn"), "scaling", 0.1, undo)
        plain = said(llama)
        with states.resume():
            assert equal(plain, said(llama))
    assert states.replayed == 3  # block 0 only


def test_weights_changed_in_place_and_another_attention_are_noticed():
    subject = Subject.tiny("llama", seed=1)
    states = PrefixStates.read(subject, texts())
    with torch.no_grad():
        next(block_of(subject, 1).parameters()).mul_(1.5)
    plain = said(subject)
    with states.resume():
        assert equal(plain, said(subject))
    assert states.replayed == 3  # block 0 only
    subject.model.set_attn_implementation("eager")
    plain = said(subject)
    with states.resume():
        assert equal(plain, said(subject))
    assert (states.replayed, states.misses) == (3, 3)


def test_windows_shorter_than_the_prompts_are_filled_as_if_the_blocks_had_run():
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "intermediate_size": 48, "sliding_window": 6, "initializer_range": 0.2}
    tokenizer = tiny_pair("llama")[1]
    config = AutoConfig.for_model("gemma2", vocab_size=len(tokenizer), query_pre_attn_scalar=8, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    subject = Subject(model, tokenizer, name="gemma2 with a window")
    states, site = PrefixStates.read(subject, texts()), Site(2, "resid_out")
    with subject.under(Steer(vector(subject, site), site, 4.0)):
        plain = said(subject)
        with states.resume():
            assert equal(plain["words"], said(subject)["words"])
    assert states.replayed == 3 * 3


def test_half_precision_is_kept_to_the_bit():
    subject = Subject.organism(dtype="bfloat16")
    states, site = PrefixStates.read(subject, texts()), Site(3, "resid_out")
    with subject.under(Steer(vector(subject, site), site, 2.0)):
        plain = said(subject)
    with subject.under(Steer(vector(subject, site), site, 2.0)), states.resume():
        assert equal(plain, said(subject))
    assert states.hits == 3


# Which forwards are served


def test_other_prompts_and_other_company_run_whole_and_are_counted(llama, states):
    one, two, three = texts()
    for prompts in ((one,), (one, two), (three, one, two, two), (one, two, three + " " + two)):
        plain, before = said(llama, prompts), states.misses
        with states.resume():
            assert equal(plain, said(llama, prompts))
        assert states.misses == before + 3
    assert (states.hits, states.replayed) == (0, 0)
    with states.resume():
        said(llama, (three, two, one))  # longest first is the same batch
    assert states.hits == 3


def test_several_batches_are_remembered_each(llama):
    prompts = [[5 + row] * 900 for row in range(5)]  # two to a batch of 2,048 tokens, four to one of 4,096
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.model.config, "max_position_embeddings", 2048)
        states = PrefixStates.read(llama, prompts)
        plain = llama.capture(prompts, [Site(2, "resid_out")], tokens="last", progress=False)
        with states.resume():
            resumed = llama.capture(prompts, [Site(2, "resid_out")], tokens="last", progress=False)
    assert torch.equal(plain[Site(2, "resid_out")], resumed[Site(2, "resid_out")])
    assert (states.hits, states.misses) == (2, 0)


def test_generation_of_the_model_itself_is_served(llama, states):
    batch = llama.tokenize(texts()[:1]).ids
    alone, ids = PrefixStates.read(llama, batch), torch.tensor(batch)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = llama.model.generate(ids, **options)
        with alone.resume():
            assert torch.equal(plain, llama.model.generate(ids, **options))


def test_gradients_flow_as_ever(llama, states):
    ids = torch.tensor(llama.tokenize(texts()[:1]).ids)
    states = PrefixStates.read(llama, ids.tolist())
    weight = llama.model.get_input_embeddings().weight
    with states.resume(), torch.enable_grad():
        embeds = weight[ids].detach().requires_grad_()
        llama.model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0
    assert (states.hits, states.misses) == (0, 1)


def test_hooks_of_a_user_see_what_they_always_see(llama, states):
    seen: list[torch.Tensor] = []
    inner = block_of(llama, 1).get_submodule("mlp").register_forward_hook(lambda *got: seen.append(got[-1].clone()))
    everywhere = None
    try:
        list(llama.predictions(texts()))
        with states.resume():
            list(llama.predictions(texts()))
            everywhere = register_module_forward_hook(lambda *_: None)
            list(llama.predictions(texts()))
    finally:
        inner.remove()
        if everywhere is not None:
            everywhere.remove()
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert (states.hits, states.misses, states.replayed) == (1, 1, 2)


def test_a_hook_that_writes_into_what_a_block_gave_spoils_nothing(llama, states):
    plain = said(llama)
    hook = block_of(llama, 1).register_forward_hook(lambda module, args, output: output.mul_(3))
    try:
        changed = said(llama)
        with states.resume():
            assert equal(changed, said(llama))
    finally:
        hook.remove()
    with states.resume():
        assert equal(plain, said(llama)) and not equal(plain, changed)


def test_a_trace_runs_whole():
    subject = Subject.tiny("llama", seed=2)
    batch = subject.tokenize(texts()[:1]).ids
    traced = subject.nn
    states = PrefixStates.read(subject, batch)
    with states.resume(), torch.no_grad():
        with traced.trace(torch.tensor(batch)):
            value = traced.model.layers[0].mlp.output.save()
        plain = subject.capture(batch, [Site(0, "mlp_out")], progress=False)
    assert torch.equal(value[0], plain[Site(0, "mlp_out")])
    assert (states.hits, states.misses) == (1, 1)  # the trace whole; the capture from block 1 on


def test_two_states_at_once_say_the_same_and_one_serves(llama, states):
    other, plain = PrefixStates.read(llama, texts()), said(llama)
    with states.resume(), other.resume():
        assert equal(plain, said(llama))
    assert states.hits + other.hits == 3


# Putting back


def test_after_leaving_nothing_is_left_on_the_model(llama):
    trunk = llama.model.get_submodule(llama.anatomy.trunk)
    states = PrefixStates.read(llama, texts())
    for stop in (ValueError, KeyboardInterrupt):

        def halt(*_: Any, stop: type[BaseException] = stop) -> None:
            raise stop("stop here")

        hook = block_of(llama, 1).register_forward_hook(halt)
        try:
            with states.resume():
                with pytest.raises(stop, match="stop here"):
                    list(llama.predictions(texts()))
                left = any("forward" in vars(module) for module in llama.model.modules())
                assert left == (stop is KeyboardInterrupt)  # until `resume` is left, as the next assertion says
        finally:
            hook.remove()
        assert not any("forward" in vars(module) for module in llama.model.modules())
        assert not trunk._forward_hooks and not trunk._forward_pre_hooks and not trunk._forward_hooks_always_called
    plain = said(llama)
    with states.resume():
        assert equal(plain, said(llama))


def test_between_forwards_toggles_may_come_go_and_be_lifted(llama, states):
    drop = toggles.DropBlocks.examples(llama)[0]
    plain = said(llama)
    with llama.under(drop):
        dropped = said(llama)
    with llama.under(drop), states.resume():
        with llama.untoggled():
            assert equal(plain, said(llama))
        assert equal(dropped["words"], said(llama)["words"])


# Memory


def test_bytes_are_those_of_the_tensors_held_and_bounded(llama, states):
    held = {id(tensor): tensor for calls in states._calls.values() for call in calls for tensor in call.tensors}
    assert states.bytes == sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    anatomy, longest = llama.anatomy, max(llama.tokenize(texts()).lengths)
    per_block = anatomy.d_model + 2 * anatomy.n_kv_heads * anatomy.d_head
    streams = 4 * 3 * longest * (anatomy.n_layers * per_block + anatomy.d_model)
    assert streams <= states.bytes < 1.3 * streams  # beside it mask, positions and rotations, once
    assert PrefixStates.read(llama, texts(), max_bytes=states.bytes).bytes == states.bytes
    with pytest.raises(ValueError, match="need more than max_bytes"):
        PrefixStates.read(llama, texts(), max_bytes=states.bytes - 1)
    assert not any("forward" in vars(module) for module in llama.model.modules())


# Bad input


def test_what_cannot_be_read_is_refused_in_words(llama, states):
    with pytest.raises(ValueError, match="max_bytes=0"):
        PrefixStates.read(llama, texts(), max_bytes=0)
    with pytest.raises(ValueError, match="empty list"):
        PrefixStates.read(llama, ())
    with llama.under(EvictKV(0.5)):
        with pytest.raises(ValueError, match="acts on the cache"):
            PrefixStates.read(llama, texts())
        llama.generate(texts(), max_new_tokens=1)
    everywhere = ProjectOut.everywhere(llama, Direction(vector(llama, Site(0, "resid_in"))))
    with llama.under(everywhere), pytest.raises(ValueError, match="no block could be read"):
        PrefixStates.read(llama, texts())
    with pytest.raises(ValueError, match="resumed already"), states.resume(), states.resume():
        pass
    with states.resume():
        assert states._resumed
    assert not states._resumed
