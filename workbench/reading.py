"""Reading a prompt to decide how each row of a batch is steered, once, for the whole generation.

strength[row, k] = decide(value of the row's prompt at the sites read); it is kept with the key/value cache.
A site that the forward meets before the first edit is read in passing. Else the prompt runs twice: a reading pass
without the edits that wait for it, then the forward proper. That pass runs without anyone's hooks, so a capture or
a hook of the user sees one forward only. The prompt is what the first forward with a cache brings, or what
`Subject.generate` knows; without both (transformers' generate with use_cache=False) each forward is all prompt.
Source: this project; the condition of CAST and the controller of Guiding Giants (Hegazy et al. 2025) both need it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.anatomy import Anatomy, add_tap
from workbench.site import Site
from workbench.step import Step

Pooling = Literal["last", "mean"]
Decide = Callable[[Mapping[Site, Tensor]], Tensor]
Tap = tuple[Site, Callable[[Tensor], Tensor | None]]

ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")  # what a reading pass takes over


class PromptReading:
    """What was decided for each row from its prompt; `now` are the strengths of the forward under way.

    sites      what is read: the value at the prompt's last token, or its mean over the prompt
    decide     {site: (batch, *width) in float32} to strengths (batch, k); a row of zeros is left alone
    passing    read during the forward itself; else in a pass of its own
    kept       strengths by key/value cache
    """

    def __init__(
        self,
        sites: Sequence[Site],
        decide: Decide,
        tokens: Pooling,
        *,
        passing: bool,
        kept: WeakKeyDictionary[Any, Tensor],
    ) -> None:
        self.sites, self.decide, self.passing, self.kept = tuple(dict.fromkeys(sites)), decide, passing, kept
        self.tokens: Pooling = tokens
        self.strengths: Tensor | None = None
        self._seen: dict[Site, Tensor] = {}

    @property
    def now(self) -> Tensor:
        """(batch, k) strengths of the rows of the forward under way."""
        if self.strengths is None:
            raise RuntimeError("The prompt is not read yet: an edit stands before the site that decides about it.")
        return self.strengths

    def forget(self) -> None:
        """The next forward begins new texts."""
        self.strengths, self._seen = None, {}

    @torch.no_grad()
    def see(self, site: Site, value: Tensor, step: Step) -> None:
        """Take in the value (batch, seq, *width) at one of the sites; with the last of them the rows are decided."""
        if self.strengths is None:
            home = next(iter(self._seen.values()), value).device  # the layers of one model may lie on several
            self._seen[site] = pooled(value, step, self.tokens).to(home)
            if len(self._seen) == len(self.sites):
                self.strengths, self._seen = self.decide(self._seen), {}

    def recall(self, cache: Any, batch: int) -> None:
        """The strengths decided when the prompts in `cache` were read.

        Rows may be repeated, each in its place, as sampling and beam search do; beams trade places only within
        their prompt, which has one strength. Other changes of the number of rows are refused.
        """
        kept = self.kept.get(cache)
        if kept is None:
            raise ValueError(
                "under: the toggle decides from the prompt, but got a cache whose prompt it never read. "
                "Start from an empty cache under it."
            )
        if batch % len(kept):
            raise ValueError(
                f"under: got {batch} rows, but the cache was made for {len(kept)} prompts and the toggle decides per "
                "prompt. Keep the rows together, or start from an empty cache."
            )
        self.strengths = kept.repeat_interleave(batch // len(kept), 0)

    def keep(self, cache: Any) -> None:
        """Remember the strengths for the forwards that go on with `cache`."""
        self.kept[cache] = self.now


def pooled(value: Tensor, step: Step, tokens: Pooling) -> Tensor:
    """(batch, *width) in float32: the value at each prompt's last token, or its mean over the prompt's tokens."""
    last = step.real & (step.positions == step.prompt_lengths[:, None] - 1)
    if not last.any(-1).all():
        raise ValueError(
            "under: a toggle that decides from the prompt got a forward without the prompt's last token. "
            "Bring each prompt whole in the first forward."
        )
    if tokens == "last":
        rows = torch.arange(len(value), device=value.device)
        return value[rows, last.long().argmax(-1).to(value.device)].float()
    weight = step.where("prompt").to(value.device)
    weight = weight.reshape(*weight.shape, *(1,) * (value.dim() - 2))
    return value.float().where(weight, 0.0).sum(1) / weight.sum(1)  # padding may hold NaN: no weight of 0 will do


def meets_first(read: Site, edited: Site) -> bool:
    """Whether every forward meets `read` no later than `edited`, in sequential and in parallel blocks."""
    if read.layer != edited.layer:
        return read.layer < edited.layer
    return read == edited or read.kind == "resid_in" or edited.kind == "resid_out"


@torch.no_grad()
def read_apart(
    trunk: nn.Module,
    model: nn.Module,
    anatomy: Anatomy,
    taps: Iterable[Tap],
    given: Mapping[str, Any],
) -> None:
    """Run the decoder's trunk on the arguments of a forward with nothing attached but `taps`, and without a cache."""
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(
            "under: a toggle that reads the prompt in a pass of its own needs the attention mask as (batch, seq); "
            "got one made for a cache of fixed size. Generate with a growing cache."
        )
    if getattr(model, "tp_size", None):  # its shards are joined by hooks, which this pass goes without
        raise ValueError(
            "under: a toggle that reads the prompt in a pass of its own can't act on a model sharded by tensor "
            "parallelism. Load it without tp_plan, or let it read before the layers that it edits."
        )
    arguments = {name: given[name] for name in ARGUMENTS if given.get(name) is not None}
    with ExitStack() as undo:
        _lift_hooks(trunk, undo)
        for site, tap in taps:
            add_tap(model, anatomy, site, tap, undo)
        trunk.forward(**arguments, use_cache=False)  # not trunk(...): its own hooks are running at this moment


def _lift_hooks(trunk: nn.Module, undo: ExitStack) -> None:
    """Take the forward hooks off all modules inside `trunk`; undone, they are there in the same order."""

    def put_back(state: dict[str, Any], name: str, held: OrderedDict[int, Any]) -> None:
        held.update(state[name])  # transformers may have installed hooks of its own meanwhile
        state[name] = held

    for module in trunk.modules():
        if module is not trunk:
            state = vars(module)
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                if state[name]:
                    undo.callback(put_back, state, name, state[name])
                    state[name] = OrderedDict()
