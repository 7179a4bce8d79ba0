"""Steering: what each toggle does to the values, at which tokens, and what its receipt tells."""

from __future__ import annotations

import pytest
import torch

from workbench import Clamp, Direction, ProjectOut, Site, Steer, Subject, difference_in_means, random_direction

SITE = Site(1, "resid_out")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@pytest.fixture(scope="module")
def texts(subject: Subject) -> list[str]:
    words = sorted(word for word in subject.tokenizer.get_vocab() if word.isalpha())
    return [" ".join(words[:6]), " ".join(words[9:12])]


@pytest.fixture(scope="module")
def push(subject: Subject) -> torch.Tensor:
    return torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(3))


def values(subject: Subject, texts: list[str], site: Site = SITE) -> torch.Tensor:
    return subject.capture(texts, [site])[site]


def test_steering_adds_strength_times_the_direction(subject: Subject, texts: list[str], push: torch.Tensor) -> None:
    plain = values(subject, texts)
    with subject.under(Steer(push, SITE, -2.5)):
        torch.testing.assert_close(values(subject, texts), plain - 2.5 * push, rtol=0, atol=1e-5)
        receipt = subject.receipts[0]
    n_tokens = len(plain)
    assert (receipt.fired, receipt.tokens) == (1, n_tokens), "padding must not be counted"
    expected = float(2.5 * push.norm() * n_tokens**0.5 / plain.norm())
    assert receipt.relative_moved == pytest.approx(expected, rel=1e-5)


def test_steering_and_its_inverse_cancel(subject: Subject, texts: list[str], push: torch.Tensor) -> None:
    plain = subject.nll(texts)
    with subject.under(Steer(push, SITE, 3.0) | Steer(push, SITE, -3.0)):
        torch.testing.assert_close(subject.nll(texts), plain, rtol=1e-5, atol=1e-6)


def test_keeping_the_norm_keeps_it_and_still_turns(subject: Subject, texts: list[str], push: torch.Tensor) -> None:
    plain = values(subject, texts)
    with subject.under(Steer(push, SITE, 4.0, keep_norm=True)):
        turned = values(subject, texts)
    torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert ((turned @ push) > (plain @ push)).all()


def test_positions_count_from_the_first_real_token(subject: Subject, texts: list[str], push: torch.Tensor) -> None:
    capture = subject.capture(texts, [SITE])
    with subject.under(Steer(push, SITE, 1.0, (0, 2))):
        moved = (values(subject, texts) - capture[SITE]).norm(dim=-1) > 1e-3
    assert torch.equal(moved, torch.isin(capture.position, torch.tensor([0, 2])))


def test_projecting_out_removes_the_component_and_is_idempotent(
    subject: Subject, texts: list[str], push: torch.Tensor
) -> None:
    plain, unit = values(subject, texts), push / push.norm()
    out = ProjectOut(push, (SITE,))
    with subject.under(out):
        once = values(subject, texts)
    with subject.under(out | out):
        twice = values(subject, texts)
    torch.testing.assert_close(once, plain - (plain @ unit)[:, None] * unit, rtol=0, atol=1e-5)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-6)
    with subject.under(ProjectOut(5.0 * push, (SITE,))):
        torch.testing.assert_close(values(subject, texts), once, rtol=0, atol=1e-6)


def test_projecting_out_everywhere_leaves_nothing_along_it_in_the_stream(
    subject: Subject, texts: list[str], push: torch.Tensor
) -> None:
    sites = [Site(layer, "resid_out") for layer in range(subject.n_layers)]
    with subject.under(ProjectOut.everywhere(subject, Direction(push))):
        capture = subject.capture(texts, sites)
    for site in sites:
        assert float((capture[site] @ (push / push.norm())).abs().max()) < 1e-5 * float(capture[site].norm())


def test_clamping_holds_exactly_the_named_units(subject: Subject, texts: list[str]) -> None:
    first, second = Site(0, "neurons"), Site(2, "heads")
    plain = values(subject, texts, first)
    with subject.under(Clamp({first: [4, 1], second: [0]}, (1.5, -2.0, 0.25))):
        capture = subject.capture(texts, [first, second])
    assert (capture[first][:, 4] == 1.5).all() and (capture[first][:, 1] == -2.0).all()
    assert (capture[second][:, 0, 0] == 0.25).all()
    others = [unit for unit in range(plain.shape[1]) if unit not in (1, 4)]
    torch.testing.assert_close(capture[first][:, others], plain[:, others])


def test_clamping_to_the_mean_uses_the_mean_over_real_tokens(subject: Subject, texts: list[str]) -> None:
    site = Site(1, "neurons")
    clamp = Clamp.to_mean(subject, texts, {site: [3, 40]})
    expected = values(subject, texts, site).double().mean(0)[[3, 40]]
    assert clamp.to == pytest.approx(expected.tolist())


def test_the_mean_of_a_unit_that_is_not_there_is_refused_in_words(subject: Subject, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="got unit 48 at neurons@1, expected 0 to 47"):
        Clamp.to_mean(subject, texts, {Site(1, "neurons"): [48]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clamp({Site(0, "neurons"): [48]}), "got unit 48 at neurons@0, expected 0 to 47"),
        (lambda: Clamp({Site(0, "neurons"): [1, 2]}, (0.0,)), "got 1 values for 2 units"),
        (lambda: Steer(torch.ones(32), SITE, positions="first"), "positions: got 'first'"),
        (lambda: Steer(torch.ones(2, 16), SITE), r"got a tensor of shape \(2, 16\), expected one vector"),
        (lambda: Steer(torch.full((32,), torch.nan), SITE), "NaN or infinity"),
        (lambda: ProjectOut(torch.ones(32), ()), "got no site"),
        (lambda: ProjectOut(torch.zeros(32), (SITE,)), "the zero vector has no direction"),
        (lambda: Steer(torch.ones(32), Site(9, "resid_out")), "got layer 9, but this model has 3 blocks"),
    ],
)
def test_impossible_settings_are_refused_in_words(subject: Subject, make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), subject.under(make()):  # type: ignore[operator]
        pass
    assert subject.active == ()


def test_directions_have_algebra_and_keep_their_place(subject: Subject, texts: list[str]) -> None:
    one = difference_in_means(subject, texts[:1], texts[1:], SITE, name="a")
    two = difference_in_means(subject, texts[1:], texts[:1], SITE, name="b")
    assert one.site == SITE and one.model == subject.fingerprint
    torch.testing.assert_close((2 * one - two).vector, 3 * one.vector)
    assert one.unit().norm == pytest.approx(1.0)
    with pytest.raises(ValueError, match="belong to different places or models"):
        one + Direction(one.vector, Site(0, "resid_out"), one.model)
    control = random_direction(one, seed=1)
    assert control.norm == pytest.approx(one.norm, rel=1e-6) and control != random_direction(one, seed=2)


def test_difference_in_means_finds_a_planted_direction(subject: Subject, texts: list[str], push: torch.Tensor) -> None:
    """Push at a position that the longer text alone has: the difference in means must point there."""
    with subject.under(Steer(push, SITE, 1e3, (5,))):
        found = difference_in_means(subject, texts[:1], texts[1:], SITE, tokens="mean")
    assert found.cosine(push) > 0.999
    assert abs(difference_in_means(subject, texts[:1], texts[1:], SITE, tokens="mean").cosine(push)) < 0.9


def test_gradients_flow_through_an_edit(subject: Subject, texts: list[str], push: torch.Tensor) -> None:
    """Learned controllers train through the frozen model."""
    from contextlib import ExitStack

    strength = torch.tensor(0.5, requires_grad=True)

    class Learned(Steer):
        def install(self, subject: Subject, undo: ExitStack) -> None:
            subject.edit(self.at, lambda value, step: value + strength * push, undo)

    ids = torch.tensor([subject.tokenize(texts).ids[0]])
    with subject.under(Learned(push, SITE)):
        subject.model(input_ids=ids, labels=ids).loss.backward()
    assert strength.grad is not None and float(strength.grad.abs()) > 0
