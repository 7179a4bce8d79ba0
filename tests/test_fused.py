"""The toggles and read-outs that kernels serve on a GPU: in Triton's interpreter they give what the CPU path gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workbench import EvictKV, QuantizeKV, Subject, fused
from workbench.cache.attention import attend_in_blocks
from workbench.cache.packed import Format, Packed, pack_keys, pack_values
from workbench.cache.segments import Frozen, Recent, Slots
from workbench.unembedding import top_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels serve by themselves")
FORMATS = [Format(4, 4, 16), Format(2, 2, 16), Format(8, 2, 16), Format(2, 4, 16)]


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    def switch(on: bool) -> None:
        monkeypatch.setattr(fused, "IMPL", "triton" if on else "auto")

    return switch


def slots(n_tokens: int, *, ragged: bool, seed: int = 0) -> Slots:
    """(2, 3) segments of up to `n_tokens` tokens of width 32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(torch.randn(2, 3, n_tokens, 32, generator=generator) for _ in range(2))
    positions = torch.arange(n_tokens).expand(2, 1, -1).clone()
    if ragged:
        positions[1, :, -n_tokens // 3 :] = -1
    return Slots(tensors, positions, not ragged)


def test_nothing_serves_on_the_cpu_unless_a_test_says_so(by_kernel) -> None:
    assert not fused.serves(torch.zeros(2))
    by_kernel(True)
    assert fused.serves(torch.zeros(2)) and not fused.serves(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.key_bits},{form.value_bits}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in which the interpreter computes, minds NaN
def test_packing_gives_the_same_bits(form: Format, dtype: torch.dtype, by_kernel) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(3, form.unit, 40, generator=generator) * 3).to(dtype)
    x[0, :, 0] = 1.5  # a constant channel
    for pack in (pack_keys, pack_values):
        by_kernel(False)
        expected = pack(x, form)
        by_kernel(True)
        found = pack(x, form)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        wrong = x.clone()
        wrong[1, 3, 5] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            pack(wrong, form)


@pytest.mark.parametrize("ragged", [False, True])
def test_eviction_gathers_the_same_tokens(ragged: bool, by_kernel) -> None:
    held = slots(21, ragged=ragged)
    keep = (torch.rand(2, 3, 21, generator=torch.Generator().manual_seed(2)) < 0.4) & held.filled
    by_kernel(False)
    expected = Frozen.chosen(held, keep)
    by_kernel(True)
    found = Frozen.chosen(held, keep)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))
    assert torch.equal(found.positions, expected.positions) and torch.equal(found.counts, expected.counts)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.key_bits},{form.value_bits}")
def test_decoding_over_packed_and_whole_parts_gives_the_same_numbers(form: Format, by_kernel) -> None:
    held, recent = slots(2 * form.unit, ragged=False), slots(11, ragged=True, seed=3)
    keep = torch.zeros(2, 3, 2 * form.unit, dtype=torch.bool)
    keep[:, :, : form.unit] = True
    keep[0, 1] = True  # a longer segment
    packed, newest = Packed.chosen(held, keep, form), Recent()
    real = recent.filled[:, 0]
    newest.append(recent.tensors, recent.positions[:, 0].clamp_min(0), real)
    sinks = Frozen.chosen(slots(4, ragged=False, seed=4), torch.rand(2, 3, 4) < 0.7)
    query = torch.randn(2, 6, 1, 32, generator=torch.Generator().manual_seed(5))
    parts: list[Any] = [sinks, packed, newest]
    by_kernel(False)
    expected = attend_in_blocks(query, parts, 3, scaling=None)
    by_kernel(True)
    assert fused.attention(query, parts, 3, scaling=None, soft_cap=None) is not None
    found = attend_in_blocks(query, parts, 3, scaling=None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
    assert fused.attention(query, parts, 3, scaling=None, soft_cap=30.0) is None  # left to the plain path


def test_read_outs_name_the_same_tokens(by_kernel) -> None:
    generator = torch.Generator().manual_seed(6)
    vectors, rows = torch.randn(9, 24, generator=generator), torch.randn(150, 24, generator=generator)
    allowed = torch.rand(150, generator=generator) < 0.8
    for negated in (False, True):
        by_kernel(False)
        scores, ids = top_tokens(vectors, rows, 5, allowed=allowed, negated=negated)
        by_kernel(True)
        found, named = top_tokens(vectors, rows, 5, allowed=allowed, negated=negated)
        assert torch.equal(named, ids)
        torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-5)


def test_a_model_writes_the_same_under_squeezed_caches(by_kernel) -> None:
    subject = Subject.tiny("llama")
    texts = [torch.randint(4, 1200, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (85, 79)]
    for toggle in (QuantizeKV(4, 2, group=16, residual=8, sinks=2), EvictKV(20, sinks=1, window=4)):
        written = []
        for on in (False, True):
            by_kernel(on)
            with subject.under(toggle):
                written.append(subject.generate(texts, max_new_tokens=3).ids)
                assert subject.receipts[0].fired
        assert written[0] == written[1]
