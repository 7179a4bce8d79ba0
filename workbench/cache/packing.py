"""Groups of numbers as 2, 4 or 8 bits each: minimum, step, and codes packed in planes of a byte.

s = (max - min) / (2^b - 1), c = round((x - min) / s), x_hat = c s + min; codes are computed against the stored
float16 s and min. A byte at (w, d) holds the codes of tokens w, w + g, w + 2g, ... of its block, g the group.
Source: KIVI, Liu et al., 2024 (arXiv 2402.02750); the planes, the shared boundary and the stored-step codes are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

BITS = (2, 4, 8)


def quantise(x: Float[Tensor, "... group"], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 (..., group), step and minimum float16 (..., 1)) of groups along the last axis.

    A constant group has step 0 and is exact up to the rounding of its minimum. Raises ValueError for NaN or infinity,
    and where a value is beyond float16.
    """
    _check_bits(bits)
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    top = 2**bits - 1
    # By a tensor: CUDA would multiply by the reciprocal of a number, and round otherwise than the CPU.
    step, base = ((high - low) / torch.full((), float(top), device=x.device)).half(), low.half()
    if not bool((torch.isfinite(step) & torch.isfinite(base)).all()):
        raise ValueError(
            "QuantizeKV: got NaN, infinity or a value beyond 65504 among keys or values, expected finite numbers. "
            "One such number would poison its whole group."
        )
    safe = torch.where(step > 0, step, 1.0).float()
    codes = torch.round((wide - base.float()) / safe).clamp_(0, top)
    return torch.where(step > 0, codes, 0.0).to(torch.uint8), step, base


def dequantise(codes: Tensor, step: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """x_hat = c s + min, computed in float32."""
    return torch.addcmul(base.float(), codes.float(), step.float()).to(dtype)


def pack_planes(codes: UInt8[Tensor, "unit token width"], bits: int, group: int) -> UInt8[Tensor, "unit row width"]:
    """Codes of whole units as bytes: row = token * bits / 8. The token count must be a multiple of group * 8 / bits."""
    _check_bits(bits)
    units, tokens, width = codes.shape
    planes = 8 // bits
    if tokens % (planes * group):
        raise ValueError(f"pack_planes: got {tokens} tokens, expected a multiple of {planes} planes x {group}.")
    split = codes.reshape(units, tokens // (planes * group), planes, group, width)
    shifts = (torch.arange(planes, device=codes.device, dtype=torch.uint8) * bits)[:, None, None]
    return (split << shifts).sum(2, dtype=torch.uint8).reshape(units, tokens // planes, width)


def unpack_planes(rows: UInt8[Tensor, "unit row width"], bits: int, group: int) -> UInt8[Tensor, "unit token width"]:
    """The codes that `pack_planes` packed."""
    _check_bits(bits)
    codes = rows.new_empty(rows.shape[0], rows.shape[1] * 8 // bits, rows.shape[2])
    unpack_planes_into(codes, rows, bits, group)
    return codes


def unpack_planes_into(
    out: Num[Tensor, "... token width"], rows: UInt8[Tensor, "... row width"], bits: int, group: int
) -> None:
    """Write the codes as numbers of `out`'s own type: plane by plane, so that little memory is passed over twice."""
    planes = 8 // bits
    split, blocks = out.unflatten(-2, (-1, planes, group)), rows.unflatten(-2, (-1, group))
    for plane in range(planes):
        codes = blocks >> plane * bits if plane else blocks
        split[..., plane, :, :] = codes & 2**bits - 1 if plane < planes - 1 else codes


def words_of_channels(codes: UInt8[Tensor, "... token"], bits: int) -> Tensor:
    """KIVI's own layout, to exchange caches with it: little-endian int32 words along the last axis."""
    _check_bits(bits)
    per_word = 32 // bits
    if codes.shape[-1] % per_word:
        raise ValueError(f"words_of_channels: got {codes.shape[-1]} codes, expected a multiple of {per_word}.")
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (codes.reshape(*codes.shape[:-1], -1, per_word).long() << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"packing: got {bits} bits, expected one of {BITS}.")
