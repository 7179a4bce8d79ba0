"""What an edit may know of the forward pass under way: logical positions, real tokens, where the prompt ended.

An edit is a function of the logical position alone, never of the column or of how many tokens come at once:
that is why cached and uncached generation agree under every position rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

Positions = Literal["all", "prompt", "generated", "last"]
POSITION_RULES: tuple[str, ...] = get_args(Positions)


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass.

    positions        logical position of each token in its own text; 0 is the first real token
    real             False at padding
    prompt_lengths   real tokens of each row's prompt
    past             columns that came in earlier forwards; 0: this one begins the texts
    """

    positions: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    prompt_lengths: Int[Tensor, " batch"]
    past: int = 0

    def where(self, rule: Positions | Sequence[int]) -> Bool[Tensor, "batch seq"]:
        """True at the real tokens that a position rule names.

        all         every token                        prompt      the prompt's tokens
        generated   tokens after the prompt            last        the prompt's last token and every later one
        [0, 5]      these logical positions
        """
        ends = self.prompt_lengths[:, None]
        if rule == "all":
            return self.real
        if rule == "prompt":
            return self.real & (self.positions < ends)
        if rule == "generated":
            return self.real & (self.positions >= ends)
        if rule == "last":
            return self.real & (self.positions >= ends - 1)
        wanted = torch.as_tensor(list(rule), device=self.positions.device)
        return self.real & torch.isin(self.positions, wanted)


def check_positions(rule: Positions | Sequence[int]) -> Positions | tuple[int, ...]:
    """`rule` if it is one, sequences as tuples; ValueError otherwise."""
    if isinstance(rule, str):
        if rule not in POSITION_RULES:
            raise ValueError(
                f"positions: got {rule!r}, expected one of {', '.join(POSITION_RULES)} or a list of positions."
            )
        return rule
    listed = rule.tolist() if isinstance(rule, Tensor | np.ndarray) else rule
    numbers = tuple(listed) if isinstance(listed, Iterable) else ()
    if not numbers or any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in numbers):
        raise ValueError(f"positions: got {rule!r}, expected logical positions from 0, such as [0, 5].")
    return numbers


def read_step(
    input_shape: tuple[int, int],
    *,
    past: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    prompt_lengths: Tensor | None,
    device: torch.device,
) -> Step:
    """The step that a decoder's arguments describe; `past` tokens of each row came in earlier forwards."""
    batch, seq = input_shape
    # Prepared masks, of four dimensions or one per type of layer, tell of padding too late: positions must be given.
    flat_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
    if flat_mask is None:
        real = torch.ones(batch, seq, dtype=torch.bool, device=device)
        positions = torch.arange(past, past + seq, device=device).expand(batch, seq)
    else:
        counts = flat_mask.to(device).long().cumsum(-1) - 1
        real = flat_mask[:, -seq:].to(device).bool()
        positions = counts[:, -seq:].clamp_min(0)
    if position_ids is not None:
        given = position_ids.to(device).reshape(-1, seq) if position_ids.dim() <= 2 else position_ids[0].to(device)
        positions = given.expand(batch, seq)
    if prompt_lengths is None:  # the prompt is what this forward brings
        prompt_lengths = torch.where(real, positions + 1, 0).amax(-1)
    return Step(positions, real, prompt_lengths.to(device).expand(batch), past)


class StepWatch:
    """Notes the Step of every forward of a decoder's trunk, and whose prompt each key/value cache holds.

    A cache is data of the conditions that it was made under: going on with it under others raises, unless `adopt`.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.adopt = False
        # What must know of a forward before and after it, with its arguments or its cache; see `workbench.reading`.
        self.before: list[Callable[[Step, Mapping[str, Any]], None]] = []
        self.after: list[Callable[[Step, Any], None]] = []
        self.whole: Mapping[str, Any] | None = None  # arguments of a forward over texts that are read in pieces
        self._prompt_lengths: Tensor | None = None
        self._caches: WeakKeyDictionary[Any, tuple[Tensor, Any]] = WeakKeyDictionary()

    def install(self, trunk: nn.Module, conditions: Any, undo: ExitStack) -> None:
        """Watch `trunk`; `conditions()` tells what is active, comparable and printable."""
        signature = inspect.signature(type(trunk).forward)  # of the class: nnsight wraps the bound method

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind_partial(trunk, *args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            self.step = self.read(given, conditions())
            for hear in self.before:
                hear(self.step, given)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            cache = getattr(output, "past_key_values", None)
            if self.step is None:
                return
            if cache is not None and (cache not in self._caches or not self.step.past):
                self._caches[cache] = (self.step.prompt_lengths, conditions())
            for hear in self.after:
                hear(self.step, cache)

        undo.callback(trunk.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(trunk.register_forward_hook(after).remove)

    @contextmanager
    def texts(self, **arguments: Any) -> Iterator[None]:
        """Within: the forwards bring these texts piece by piece; who must read a prompt whole finds it here."""
        before, self.whole = self.whole, arguments
        try:
            yield
        finally:
            self.whole = before

    @contextmanager
    def prompts(self, lengths: Tensor) -> Iterator[None]:
        """Within: the prompt of each row has this many tokens, whatever a forward brings."""
        before, self._prompt_lengths = self._prompt_lengths, lengths
        try:
            yield
        finally:
            self._prompt_lengths = before

    @property
    def told(self) -> bool:
        """Whether someone said whose prompts the forwards bring, as `Subject.generate` does."""
        return self._prompt_lengths is not None

    def read(self, given: Mapping[str, Any], conditions: Any) -> Step:
        """The step of a forward with these arguments."""
        ids = given.get("input_ids")
        tokens = given["inputs_embeds"] if ids is None else ids
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        return read_step(
            (tokens.shape[0], tokens.shape[1]),
            past=past,
            attention_mask=given.get("attention_mask"),
            position_ids=given.get("position_ids"),
            prompt_lengths=self._lengths(cache if past else None, conditions, tokens.shape[0]),
            device=tokens.device,
        )

    def _lengths(self, cache: Any, conditions: Any, batch: int) -> Tensor | None:
        lengths = self._prompt_lengths
        if cache is not None:
            known, made_under = self._caches.get(cache, (None, None))
            if made_under != conditions and not self.adopt:
                raise ValueError(
                    f"under: got a key/value cache made under {_names(made_under)}, but {_names(conditions)} acts now. "
                    "Start from an empty cache, or allow it with subject.under(toggle, adopt_cache=True)."
                )
            lengths = known if lengths is None else lengths
        if lengths is None or len(lengths) == batch:
            return lengths
        if batch % len(lengths):
            raise ValueError(f"under: got {batch} rows, but the cache was made for {len(lengths)} prompts.")
        return lengths.repeat_interleave(batch // len(lengths))


def _names(conditions: Any) -> str:
    return "unknown conditions" if conditions is None else " | ".join(map(str, conditions)) or "no toggle"
