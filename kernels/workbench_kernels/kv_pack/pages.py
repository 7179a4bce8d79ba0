"""Where packed keys and values lie: codes in planes of a byte, one step and one base per group.

A unit is some tokens that are packed together: a whole number of blocks of 8 / bits planes of `group` tokens each. The
byte at (w, d) of a block holds the codes of its tokens w, w + group, w + 2 group, ... at bits 0, bits, 2 bits, ...
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Of = Literal["keys", "values"]
OF: tuple[Of, ...] = ("keys", "values")
BITS = (2, 4, 8)


class Pages(NamedTuple):
    """Packed units, of the same tuple form as a cache keeps them.

    rows   (unit, token * bits / 8, width) uint8
    step   keys (unit, token / group, width); values (unit, token, width / channels); float16
    base   the smallest number of each group, shaped as `step`, float16
    """

    rows: Tensor
    step: Tensor
    base: Tensor


def channels(width: int, group: int) -> int:
    """Channels of one value group: the group size where it divides the width, else all of them."""
    return group if width % group == 0 else width


def shapes(units: int, tokens: int, width: int, bits: int, of: Of, group: int) -> tuple[tuple[int, int, int], ...]:
    """The shapes of rows, step and base. Raises ValueError where the tokens are no whole number of blocks."""
    if bits not in BITS:
        raise ValueError(f"kv_pack: got {bits} bits, expected one of {', '.join(map(str, BITS))}.")
    if of not in OF:
        raise ValueError(f"kv_pack: got of={of!r}, expected one of {', '.join(OF)}.")
    if group < 1 or width < 1:
        raise ValueError(f"kv_pack: got groups of {group} and width {width}, expected at least 1.")
    planes = 8 // bits
    if tokens % (planes * group):
        raise ValueError(f"kv_pack: got units of {tokens} tokens, expected a multiple of {planes} planes x {group}.")
    meta = (tokens // group, width) if of == "keys" else (tokens, width // channels(width, group))
    return (units, tokens // planes, width), (units, *meta), (units, *meta)


def new_pages(
    units: int, tokens: int, width: int, bits: int, of: Of, *, group: int = 32, device: torch.device | str = "cpu"
) -> Pages:
    """Room for so many units, not yet filled."""
    rows, step, base = shapes(units, tokens, width, bits, of, group)
    half = {"dtype": torch.float16, "device": device}
    return Pages(
        torch.empty(rows, dtype=torch.uint8, device=device), torch.empty(step, **half), torch.empty(base, **half)
    )


def part_of(pages: Pages, start: int, wanted: tuple[tuple[int, int, int], ...], device: torch.device) -> Pages:
    """Views of the units [start, start + n) of pages. Raises ValueError where they don't have these shapes."""
    units, found = wanted[0][0], []
    for name, tensor, shape in zip(Pages._fields, pages, wanted, strict=True):
        dtype = torch.uint8 if name == "rows" else torch.float16
        if tensor.dim() != 3 or tuple(tensor.shape[1:]) != shape[1:] or tensor.dtype != dtype:
            raise ValueError(
                f"kv_pack: got {name} {tuple(tensor.shape)} {tensor.dtype}, expected (units, {shape[1]}, {shape[2]}) "
                f"{dtype}. Make them with new_pages."
            )
        if tensor.device != device:
            raise ValueError(f"kv_pack: got {name} on {tensor.device}, expected them on {device} as the input.")
        if not 0 <= start <= len(tensor) - units:
            raise ValueError(f"kv_pack: got units {start} to {start + units} of pages with room for {len(tensor)}.")
        part = tensor[start : start + units]
        if part.numel() and not part[0].is_contiguous():  # the step from unit to unit may be any
            raise ValueError(f"kv_pack: got {name} whose units are not contiguous, expected each unit in one piece.")
        found.append(part)
    return Pages(*found)
