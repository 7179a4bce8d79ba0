"""Capture: the values at chosen sites for chosen tokens, from one forward per batch, streamed to the CPU.

Memory is one batch plus what was asked for: a hook picks the wanted tokens at once and writes them to their row of
the result. Padding never enters: it is neither captured nor part of a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.anatomy import Anatomy, add_tap, silence
from workbench.site import Site
from workbench.tokens import Batch, Tokens

Selection = Literal["all", "last", "mean"] | Sequence[Sequence[bool]]


@dataclass(frozen=True, eq=False)
class Capture(Mapping[Site, Tensor]):
    """Values at sites: `capture[site]` is a CPU tensor (rows, *width), rows in the order of the texts.

    With tokens="all" or a mask there is one row per chosen token, with "last" and "mean" one per text.

    text       (rows,) index of the text
    position   (rows,) logical position of the token; -1 for means
    ids        (rows,) token id; -1 for means
    offsets    (rows, 2) character span in the text; (0, 0) for special tokens and means
    """

    values: Mapping[Site, Tensor] = field(repr=False)
    text: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]
    ids: Int[Tensor, " rows"]
    offsets: Int[Tensor, "rows 2"]

    def __getitem__(self, site: Site) -> Tensor:
        try:
            return self.values[site]
        except KeyError:
            have = ", ".join(str(one) for one in self.values)
            raise KeyError(f"capture: {site} was not captured, only {have}. Name it in at=[...].") from None

    def __iter__(self) -> Iterator[Site]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site} {tuple(value.shape)}" for site, value in self.values.items())
        return f"Capture({shapes}; {len(self.text)} rows)"

    def of_text(self, index: int) -> dict[Site, Tensor]:
        """The rows of one text, at every site."""
        return {site: value[self.text == index] for site, value in self.values.items()}


def chosen_tokens(tokens: Tokens, selection: Selection) -> list[Tensor]:
    """For each text the positions whose values are wanted, as an integer tensor."""
    if isinstance(selection, str):
        if selection in ("all", "mean"):
            return [torch.arange(length) for length in tokens.lengths]
        if selection == "last":
            return [torch.tensor([length - 1]) for length in tokens.lengths]
        raise ValueError(f"capture: got tokens={selection!r}, expected 'all', 'last', 'mean' or a mask per text.")
    try:
        masks = [torch.as_tensor(mask, dtype=torch.bool) for mask in selection]
        lengths = [len(mask) for mask in masks]
    except (TypeError, ValueError):
        raise ValueError(
            f"capture: got tokens={selection!r:.60}, expected 'all', 'last', 'mean' or a mask per text."
        ) from None
    if lengths != tokens.lengths:
        got, expected = lengths[:5], tokens.lengths[:5]
        raise ValueError(f"capture: got masks of lengths {got}…, expected one per text of lengths {expected}….")
    return [mask.nonzero()[:, 0] for mask in masks]


def collect(
    model: nn.Module,
    anatomy: Anatomy,
    at: Sequence[Site],
    tokens: Tokens,
    selection: Selection,
    forwards: Iterator[tuple[Batch, Callable[[], object]]],
    n_batches: int,
    *,
    progress: bool,
) -> Capture:
    """Run `forwards` one after another with taps at the sites and gather what `selection` names."""
    wanted = chosen_tokens(tokens, selection)
    mean = isinstance(selection, str) and selection == "mean"
    counts = [1] * len(tokens) if mean else [len(chosen) for chosen in wanted]
    starts = torch.tensor([0, *counts]).cumsum(0)
    values: dict[Site, Tensor] = {}
    waiting: dict[Site, list[Tensor]] = {}
    heard: set[Site] = set()
    batch: Batch

    def tap(site: Site, value: Tensor) -> None:
        """Take a whole batch at once; a batch that is read in pieces is put together first."""
        heard.add(site)
        pieces = waiting.setdefault(site, [])
        pieces.append(value.detach())
        if sum(piece.shape[1] for piece in pieces) < batch.ids.shape[1]:
            pieces[-1] = pieces[-1].clone()  # the model may reuse the memory of what it gave
            return
        picked = _pick(torch.cat(waiting.pop(site), 1), batch, wanted, mean)
        if site not in values:  # dtype is known only now
            values[site] = torch.empty((int(starts[-1]), *picked.shape[1:]), dtype=picked.dtype)
        where = torch.cat([torch.arange(int(starts[row]), int(starts[row + 1])) for row in batch.rows])
        values[site][where] = picked.cpu()

    with ExitStack() as undo, torch.no_grad():
        for site in dict.fromkeys(at):
            add_tap(model, anatomy, site, lambda value, site=site: tap(site, value), undo)
        # The bar appears only where the work takes longer than two seconds.
        for batch, forward in tqdm(  # the taps read `batch`
            forwards, total=n_batches, desc="capture", unit="batch", delay=2, disable=not progress
        ):
            forward()
            for site in dict.fromkeys(at):
                if site not in heard:
                    tap(site, _unheard(model, anatomy, site, batch))
            heard.clear()
            for site, pieces in waiting.items():  # else they would be taken for the next batch
                seen = sum(piece.shape[1] for piece in pieces)
                raise ValueError(f"capture: {site} was reached by {seen} of {batch.ids.shape[1]} tokens of a batch.")
    return Capture({site: values[site] for site in at}, *describe_rows(tokens, wanted, mean))


def _unheard(model: nn.Module, anatomy: Anatomy, site: Site, batch: Batch) -> Tensor:
    """What a site says that was not reached in a forward: zeros, where a toggle keeps it silent."""
    reason = silence(model, anatomy, site)
    if reason != "":
        raise ValueError(f"capture: nothing was read at {site}: {reason or 'its module did not run'}.")
    like = next(model.get_submodule(f"{anatomy.blocks}.{site.layer}").parameters())
    return torch.zeros(*batch.ids.shape, *anatomy.width(site), dtype=like.dtype, device=like.device)


def describe_rows(tokens: Tokens, wanted: list[Tensor], mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text index, position, token id and character span of each captured row."""
    if mean:
        n = len(tokens)
        return torch.arange(n), torch.full((n,), -1), torch.full((n,), -1), torch.zeros(n, 2, dtype=torch.long)
    text = torch.cat([torch.full((len(chosen),), row) for row, chosen in enumerate(wanted)])
    pairs = [(row, int(position)) for row, chosen in enumerate(wanted) for position in chosen]
    ids = torch.tensor([tokens.ids[row][position] for row, position in pairs], dtype=torch.long)
    offsets = torch.tensor([tokens.offsets[row][position] for row, position in pairs], dtype=torch.long).reshape(-1, 2)
    return text, torch.cat(wanted), ids, offsets


def _pick(value: Tensor, batch: Batch, wanted: list[Tensor], mean: bool) -> Tensor:
    """The wanted rows of one batch's values (batch, seq, ...), in the order of `batch.rows`; always a copy."""
    if mean:
        weight = batch.mask.reshape(*batch.mask.shape, *(1,) * (value.dim() - 2)).to(value.device)
        return value.float().where(weight, 0.0).sum(1) / weight.sum(1)  # float32; padding may hold NaN: no weight of 0
    rows = torch.cat([torch.full((len(wanted[row]),), index) for index, row in enumerate(batch.rows)])
    columns = torch.cat([wanted[row] + start for row, start in zip(batch.rows, batch.starts, strict=True)])
    return value[rows.to(value.device), columns.to(value.device)]
