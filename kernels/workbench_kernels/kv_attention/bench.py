"""A decode step over a long cache in few bits, against attention over the same numbers whole.

Geometry of Llama-3.1-8B, and one of 7 heads of width 64. Each cache has 4 sinks and 128 newest tokens whole. Every time
has its largest error beside it, against the reference in float32; what is wrong is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench_kernels import timing
from workbench_kernels.kv_attention import PackedPart, WholePart, kv_attention, reference

TOLERANCE = 2e-3  # of relative RMS in float16: see the tests


@dataclass(frozen=True)
class Case:
    """Sizes of one cache; keys and values have the same bits."""

    batch: int
    tokens: int
    bits: int
    group: int
    kv_heads: int = 8
    heads: int = 4  # query heads of a kv head
    width: int = 128


SIZES = ((1, 2**13), (1, 2**15), (1, 2**17), (8, 2**15))
CASES = [Case(*size, bits, group) for size in SIZES for bits in (4, 2) for group in (64, 32)]
CASES += [Case(8, 2**15, 4, 32, kv_heads=2, heads=7, width=64)]


def rows(device: torch.device | str = "cuda") -> list[dict[str, object]]:
    """One row per case and rival. Raises ValueError without CUDA, AssertionError where a rival is not the reference."""
    device = torch.device(device)
    timing.require_cuda(device)
    copy, found = timing.copy_gb_per_s(device), []
    for case in CASES:
        query, parts = cache(case, device)
        truth = kv_attention(query.float(), [_wide(part) for part in parts], impl="reference")
        for name, (run, n_bytes) in with_compilers(rivals(query, parts)).items():
            error = (run().float() - truth).reshape(-1)
            rms = float(error.norm() / truth.norm())
            assert rms < TOLERANCE, f"kv_attention: {name} is {rms:.1e} off the reference at {case}"
            told = {"max_abs_err": float(error.abs().max()), "relative_rms": rms}
            found.append(timing.timed("kv_attention", name, run, n_bytes, copy, **vars(case), **told))
    return found


def cache(case: Case, device: torch.device) -> tuple[Tensor, list[PackedPart | WholePart]]:
    """A query and its sinks, packed and newest tokens, in float16: keys and values of about unit size."""
    draw = torch.Generator(device).manual_seed(0)
    segments, unit = case.batch * case.kv_heads, case.group * 8 // case.bits
    n = segments * case.tokens // unit

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=torch.float32).half()

    def side(*steps: int) -> tuple[Tensor, ...]:
        size = n, case.group, case.width  # a unit is `group` bytes of each channel, 8 / bits codes in a byte
        codes = torch.randint(0, 256, size, generator=draw, device=device, dtype=torch.uint8)
        return codes, drawn(n, *steps).abs() * 3 / 2**case.bits, drawn(n, *steps) - 1.5

    def kept(tokens: int) -> WholePart:
        shape = case.batch, case.kv_heads, tokens, case.width
        return WholePart(drawn(*shape), drawn(*shape))

    keys, values = side(unit // case.group, case.width), side(unit, case.width // case.group)
    units = torch.full((case.batch, case.kv_heads), n // segments, dtype=torch.int32, device=device)
    packed = PackedPart(keys, values, units, case.bits, case.bits, case.group, longest=n // segments)
    return drawn(case.batch, case.kv_heads * case.heads, 1, case.width), [kept(4), packed, kept(128)]


def rivals(query: Tensor, parts: list[PackedPart | WholePart]) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """Name, call, and the bytes of keys and values that it can't avoid to read."""
    keys, values = whole(parts)
    held = sum(tensor.nbytes for part in parts for tensor in part.tensors)
    return {
        "triton": (lambda: kv_attention(query, parts, impl="triton"), held),
        "sdpa float16": (lambda: sdpa(query, keys, values), keys.nbytes + values.nbytes),
        "sdpa float16, heads as rows": (lambda: sdpa_rows(query, keys, values), keys.nbytes + values.nbytes),
        "unpack, then sdpa": (lambda: unpack_then_sdpa(query, parts), held),
    }


def with_compilers(
    found: dict[str, tuple[Callable[[], Tensor], int]],
) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """The same, with the kernel as a CUDA graph, which launches nothing from Python, and the unpacking compiled."""
    run, held = found["triton"]
    unpack, _ = found["unpack, then sdpa"]
    torch.compiler.reset()  # a function of many shapes would stop being compiled, and say so in a warning only
    compiled = torch.compile(unpack, fullgraph=True, dynamic=False)
    return found | {"triton, CUDA graph": (graphed(run), held), "unpack, then sdpa, compiled": (compiled, held)}


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call, recorded once and replayed."""
    run()  # compiles, which can't be recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def sdpa_rows(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """All query heads of a kv head as rows of one query: no key is read twice."""
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, keys.shape[1], -1, width)
    return scaled_dot_product_attention(packed, keys, values).reshape(batch, heads, 1, -1)


def unpack_then_sdpa(query: Tensor, parts: list[PackedPart | WholePart]) -> Tensor:
    """What a cache without a kernel does in every step."""
    return sdpa_rows(query, *whole(parts))


def whole(parts: list[PackedPart | WholePart]) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, kv_head, token, width) in float16, where all segments are as long."""
    keys, values = [], []
    for part in parts:
        if isinstance(part, WholePart):
            keys.append(part.keys)
            values.append(part.values)
        else:
            for side, unpacked in ((keys, reference.unpack_keys(part)), (values, reference.unpack_values(part))):
                side.append(unpacked.half().reshape(*part.units.shape, -1, unpacked.shape[-1]))
    return torch.cat(keys, 2), torch.cat(values, 2)


def _wide(part: PackedPart | WholePart) -> PackedPart | WholePart:
    """In float32 where it is whole, so that the reference rounds nothing."""
    return part if isinstance(part, PackedPart) else WholePart(part.keys.float(), part.values.float())
