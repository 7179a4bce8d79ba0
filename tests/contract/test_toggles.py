"""Laws of toggles: every subclass of Toggle in workbench/toggles, with all its examples, on every family."""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from families import FAMILIES, subclasses_in, subject_of, texts

import workbench.toggles
from workbench import Subject
from workbench.toggle import Toggle

TOGGLES = subclasses_in(workbench.toggles, Toggle)
every_toggle = pytest.mark.parametrize("cls", TOGGLES, ids=lambda cls: cls.__name__)
every_family = pytest.mark.parametrize("family", FAMILIES)


def on_caches(cls: type[Toggle]) -> bool:
    """Whether a toggle acts on key/value caches, and so on nothing that is read without one."""
    return any(claim.startswith("kv.") for claim in cls.claims)


def refusal(cls: type[Toggle], family: str) -> str | None:
    """What a toggle says to a family that it can't act on; None where it can."""
    if cls.__name__ == "PyramidInfer" and family == "gemma2":
        return "sliding-window or recurrent"
    if cls.__name__ == "SkipFFN" and family in ("gpt_neox", "phi", "falcon"):
        return "attention and feed-forward run side by side"
    if cls.__name__ == "CarveMoE" and family == "mixtral":
        return "no single down projection"
    return "computes attention in its own way" if on_caches(cls) and family == "falcon" else None


def pairs(given: list[tuple[type[Toggle], str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("cls", "family"), given, ids=[f"{cls.__name__}-{family}" for cls, family in given])


TAKEN = [(cls, family) for family in FAMILIES for cls in TOGGLES if refusal(cls, family) is None]
REFUSED = [(cls, family) for family in FAMILIES for cls in TOGGLES if refusal(cls, family) is not None]


def logits(subject: Subject, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [subject.model(input_ids=torch.tensor([ids]), **options).logits[0] for ids in subject.tokenize(texts()).ids]
        )


def state(subject: Subject) -> dict[str, Any]:
    """What a toggle could leave behind: hooks, attributes and Parameter objects of every module, and the attention."""
    return {"attention": subject.model.config._attn_implementation} | {
        name: (
            [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)],
            sorted(vars(module)),
            {key: (id(value), value._version) for key, value in module._parameters.items() if value is not None},
            {key: id(child) for key, child in module._modules.items()},
            id(vars(module).get("forward")),
        )
        for name, module in subject.model.named_modules()
    }


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


def test_the_toggles_are_found() -> None:
    assert {"Steer", "ProjectOut", "Clamp", "EvictKV", "QuantizeKV"} <= {cls.__name__ for cls in TOGGLES}


@every_family
@every_toggle
def test_at_its_neutral_setting_a_toggle_leaves_the_logits_bit_equal(cls: type[Toggle], family: str) -> None:
    subject = subject_of(family)
    plain = logits(subject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a neutral toggle may rightly say that it never fired
        with subject.under(cls.neutral(subject)):
            assert torch.equal(logits(subject), plain)


@pairs(REFUSED)
def test_a_family_that_a_toggle_cant_act_on_is_refused_in_words(cls: type[Toggle], family: str) -> None:
    subject = subject_of(family)
    before = state(subject)
    for toggle in cls.examples(subject):
        with pytest.raises(ValueError, match=refusal(cls, family)), subject.under(toggle):
            raise AssertionError("never reached")
    assert state(subject) == before and subject.active == ()


@pairs(TAKEN)
def test_a_toggle_changes_predictions_and_its_receipt_says_so(cls: type[Toggle], family: str) -> None:
    subject = subject_of(family)
    examples = cls.examples(subject)
    assert examples
    for toggle in examples:
        with subject.under(toggle):
            subject.generate(texts(), max_new_tokens=3)
            receipt = subject.receipts[0]
            assert receipt.fired > 0 and str(receipt).count("fired") == 1
            facts = receipt.to_json()
            assert facts["tokens"] + facts["bytes_freed"] > 0, f"{toggle}: an empty receipt"


@pairs(TAKEN)
def test_leaving_a_toggle_restores_hooks_attributes_parameters_and_logits(cls: type[Toggle], family: str) -> None:
    subject = subject_of(family)
    plain, before, held = logits(subject), state(subject), weights(subject)
    for toggle in cls.examples(subject):
        with subject.under(toggle):
            logits(subject)
        assert state(subject) == before
        assert all(torch.equal(value, held[name]) for name, value in subject.model.state_dict().items())
        assert torch.equal(logits(subject), plain)
        assert subject.active == () and subject.receipts == ()


@pairs(TAKEN)
def test_cached_uncached_batched_and_transformers_generation_agree_under_a_toggle(
    cls: type[Toggle], family: str
) -> None:
    subject = subject_of(family)
    for toggle in cls.examples(subject):
        with subject.under(toggle):
            ours = subject.generate(texts(), max_new_tokens=6)
            if on_caches(cls):
                with pytest.raises(ValueError, match=r"got use_cache=False, but .* acts on the cache"):
                    subject.generate(texts(), max_new_tokens=6, use_cache=False)
            else:
                assert subject.generate(texts(), max_new_tokens=6, use_cache=False).ids == ours.ids
            for index, text in enumerate(texts()):
                assert subject.generate([text], max_new_tokens=6).ids[0] == ours.ids[index]
                made = subject.tokenizer([text], return_tensors="pt")
                theirs = subject.model.generate(
                    made["input_ids"],
                    attention_mask=made["attention_mask"],
                    max_new_tokens=6,
                    do_sample=False,
                )
                assert tuple(theirs[0, made["input_ids"].shape[1] :].tolist()) == ours.ids[index]


@pairs(TAKEN)
def test_a_text_alone_equals_the_same_text_in_a_padded_batch_under_a_toggle(cls: type[Toggle], family: str) -> None:
    subject = subject_of(family)
    for toggle in cls.examples(subject):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with subject.under(toggle):
                if subject.stages and subject.stages.piece is None:
                    with pytest.raises(ValueError, match="can't be read piece by piece"):
                        subject.nll(texts())
                    continue  # such a toggle has padded prompts in its own tests
                together = subject.nll(texts())
                alone = torch.cat([subject.nll([text]) for text in texts()])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # fp32


@pairs([(cls, family) for cls, family in TAKEN if on_caches(cls)])
def test_a_forward_without_a_cache_is_bit_equal_under_a_toggle_on_caches(cls: type[Toggle], family: str) -> None:
    subject = subject_of(family)
    plain = logits(subject, use_cache=False)
    for toggle in cls.examples(subject):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # rightly says that it never fired
            with subject.under(toggle):
                assert torch.equal(logits(subject, use_cache=False), plain)


@every_family
def test_composition_is_associative_and_equals_nested_with(family: str) -> None:
    subject = subject_of(family)
    a, b, c = [cls.examples(subject)[0] for cls in TOGGLES if refusal(cls, family) is None][:3]
    assert (a | b) | c == a | (b | c)
    with subject.under(a | b | c):
        piped, receipts = logits(subject), [receipt.to_json() for receipt in subject.receipts]
    with subject.under(a), subject.under(b), subject.under(c):
        nested = logits(subject)
        assert subject.active == (a, b, c)
        assert [receipt.to_json() for receipt in subject.receipts] == receipts
    assert torch.equal(piped, nested)


@every_family
def test_a_toggle_acts_after_the_one_on_its_left(family: str) -> None:
    from workbench import Site
    from workbench.toggles import ProjectOut, Steer

    subject, site = subject_of(family), Site(1, "resid_out")
    push = torch.linspace(-1, 1, subject.anatomy.d_model)
    along = push / push.norm()
    with subject.under(Steer(push, site, 3.0) | ProjectOut(push, (site,))):
        removed = subject.capture(texts(), [site])[site] @ along
    with subject.under(ProjectOut(push, (site,)) | Steer(push, site, 3.0)):
        added = subject.capture(texts(), [site])[site] @ along
    torch.testing.assert_close(removed, torch.zeros_like(removed), rtol=0, atol=1e-4)
    torch.testing.assert_close(added, torch.full_like(added, 3.0 * float(push.norm())), rtol=0, atol=1e-4)


class Failing(Toggle):
    """Installs one edit and then fails."""

    def install(self, subject: Subject, undo: ExitStack) -> None:
        from workbench import Site

        subject.edit(Site(0, "resid_out"), lambda value, step: value + 1, undo)
        raise RuntimeError("in the middle of an install")

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return (cls(),)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls()


@every_toggle
def test_a_failing_install_or_body_unwinds_everything(cls: type[Toggle]) -> None:
    subject = subject_of("llama")
    plain, before = logits(subject), state(subject)
    toggle = cls.examples(subject)[0]
    with pytest.raises(RuntimeError, match="in the middle"), subject.under(toggle | Failing() | toggle):
        raise AssertionError("never reached")
    assert state(subject) == before and torch.equal(logits(subject), plain) and subject.active == ()
    with pytest.raises(KeyboardInterrupt), subject.under(toggle):
        raise KeyboardInterrupt
    assert state(subject) == before and torch.equal(logits(subject), plain)


@every_toggle
def test_a_toggle_survives_json_and_compares_by_value(cls: type[Toggle]) -> None:
    subject = subject_of("llama")
    for toggle in cls.examples(subject):
        again = Toggle.from_json(json.loads(json.dumps(toggle.to_json())))
        assert again == toggle and hash(again) == hash(toggle) and again is not toggle
    both = cls.examples(subject)[0] | cls.neutral(subject)
    assert Toggle.from_json(json.loads(json.dumps(both.to_json()))) == both


@every_toggle
def test_untoggled_lifts_and_puts_back(cls: type[Toggle]) -> None:
    subject = subject_of("llama")
    plain, toggle = logits(subject), cls.examples(subject)[0]
    with subject.under(toggle):
        under = logits(subject)
        with subject.untoggled():
            assert torch.equal(logits(subject), plain) and subject.active == ()
        # not torch.equal: NaN says that a token has no prediction
        torch.testing.assert_close(logits(subject), under, rtol=0, atol=0, equal_nan=True)
        assert subject.active == (toggle,)


class Claiming(Failing):
    claims = frozenset({"kv.select"})

    def install(self, subject: Subject, undo: ExitStack) -> None:
        subject.receipt.fired += 1


def test_two_toggles_with_one_claim_are_refused() -> None:
    subject = subject_of("llama")
    with pytest.raises(ValueError, match=r"both claim 'kv\.select'"), subject.under(Claiming() | Claiming()):
        pass
    assert subject.active == ()


def test_a_toggle_that_never_fired_warns() -> None:
    subject = subject_of("llama")
    toggle = TOGGLES[0].examples(subject)[0]
    with pytest.warns(UserWarning, match="never fired") as caught, subject.under(toggle):
        pass
    assert caught[0].filename == __file__, "the warning should point at the user's with"


def test_an_edit_without_a_toggle_knows_its_positions_too() -> None:
    from workbench import Site

    subject, site = subject_of("llama"), Site(1, "resid_out")
    plain = subject.capture(texts(), [site])
    with ExitStack() as undo:
        subject.edit(site, lambda value, step: value + 1, undo, positions=lambda step: step.positions == 2)
        edited = subject.capture(texts(), [site])
    moved = (edited[site] - plain[site]).abs().sum(-1) > 0.5
    assert torch.equal(moved, plain.position == 2)
    assert torch.equal(subject.capture(texts(), [site])[site], plain[site])


def test_a_cache_made_under_other_toggles_is_refused_unless_adopted() -> None:
    subject = subject_of("llama")
    toggle = next(cls for cls in TOGGLES if cls.__name__ == "Steer").examples(subject)[0]
    ids = torch.tensor([subject.tokenize(texts()).ids[0]])
    with torch.no_grad():
        cache = subject.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cache made under"), subject.under(toggle):
            subject.model(input_ids=ids[:, -1:], past_key_values=cache)
        with subject.under(toggle, adopt_cache=True):
            subject.model(input_ids=ids[:, -1:], past_key_values=cache)
            assert subject.receipts[0].tokens == 1


def test_entering_and_leaving_a_toggle_leaves_a_larger_stack_alone() -> None:
    subject = subject_of("gpt2")
    first = next(cls for cls in TOGGLES if not cls.claims)  # what claims a part of layers may refuse others after it
    with subject.under(first.examples(subject)[0]):
        outer = logits(subject)
        for cls in TOGGLES:
            with subject.under(cls.examples(subject)[0]):
                logits(subject)
            assert torch.equal(logits(subject), outer)
