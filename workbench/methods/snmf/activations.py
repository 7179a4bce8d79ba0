"""The values of one site at every token but the first of each text, in memory or in a file, as blocks of tokens.

The first token of a text is left out: its activations are massive in most models and would be the whole loss.
Source: this project; massive activations after Sun et al., 2024 (arXiv 2402.17762).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.methods.snmf.baselines import Blocks
from workbench.site import Site

if TYPE_CHECKING:
    from workbench.subject import Subject

BLOCK = 4096  # tokens: weights of a block stay in the processor's cache while its columns are renewed


@dataclass(frozen=True, eq=False)
class TokenActivations:
    """Blocks of (n_tokens, width) in float32; for each token the index of its text, its position and its id."""

    blocks: Blocks
    text: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.text)


def read_activations(
    subject: Subject, texts: Sequence[str], site: Site, *, on_disk: bool = False, cut: bool = False
) -> TokenActivations:
    """Read `site` on all texts.

    on_disk   keep the values in a temporary file that the system pages in block by block: for more tokens than fit
              the memory. Else they lie on the subject's device. Either way the model runs once.
    cut       cut texts to the context instead of raising
    Raises ValueError where no text has a second token.
    """
    return read_sites(subject, texts, [site], on_disk=on_disk, cut=cut)[0]


def read_sites(
    subject: Subject, texts: Sequence[str], sites: Sequence[Site], *, on_disk: bool = False, cut: bool = False
) -> list[TokenActivations]:
    """Several sites in one run of the model, as `read_activations` reads one."""
    lengths = subject.tokenize(texts, cut=cut).lengths
    n = sum(lengths) - len(lengths)
    if n < 1:
        raise ValueError(
            f"SNMF: got {len(lengths)} texts of one token each, expected longer ones: first tokens are left out."
        )
    values = [_room((n, subject.anatomy.width(site)[0]), None if on_disk else subject.device) for site in sites]
    columns, filled = [], 0
    for first, last in _groups(lengths):
        masks = [[False] + [True] * (length - 1) for length in lengths[first:last]]
        capture = subject.capture(texts[first:last], sites, tokens=masks, cut=cut, progress=False)
        for site, room in zip(sites, values, strict=True):
            room[filled : filled + len(capture.text)] = capture[site].to(room.device, torch.float32)
        columns.append((capture.text + first, capture.position, capture.ids))
        filled += len(capture.text)
    which = [torch.cat(parts) for parts in zip(*columns, strict=True)]
    return [TokenActivations(room.split(BLOCK), *which) for room in values]


def _room(shape: tuple[int, int], device: torch.device | None) -> Tensor:
    """Room for float32 on a device, or in a file without a name, which lives as long as the tensor."""
    if device is not None:
        return torch.empty(shape, device=device)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))


def _groups(lengths: Sequence[int], limit: int = 16 * BLOCK) -> list[tuple[int, int]]:
    """Runs of texts with at most `limit` tokens (or one text): what is captured at once."""
    bounds, size = [0], 0
    for index, length in enumerate(lengths):
        if size and size + length > limit:
            bounds.append(index)
            size = 0
        size += length
    return list(zip(bounds, [*bounds[1:], len(lengths)], strict=True))
