"""Prefix states: nothing of a prompt is computed again that did not change.

A block is a function of its arguments and its weights: block(x, mask, ...) -> y, keys, values. What every block got,
gave and wrote into the cache is read once; a block that is called with the same again gives the same without running.
So an edit at layer L runs the blocks from L on: they meet other values, those before it don't. Which toggle edits
where needs no telling. Source: own; the idea is memoisation (Michie 1968) and prefix caching, over layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import Cache, DynamicCache

from workbench.pruned.blocks import block_of
from workbench.site import Site
from workbench.swap import StandIn, stand_in
from workbench.tokens import Texts

if TYPE_CHECKING:
    from workbench.subject import Subject

Forward = Callable[..., Any]


@dataclass(eq=False)
class PrefixStates:
    """What every block of a subject did with a few prompts. Make one with `read`; within `resume` it is used.

    bytes      memory that it holds, on the model's device
    hits       forwards that began texts and in which at least one block did not have to run
    misses     forwards that began texts and ran whole: other prompts, another batch, an edit in the first block
    replayed   blocks that did not have to run, over all forwards
    """

    subject: Subject
    max_bytes: int
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    replayed: int = 0
    _calls: dict[int, list[_Call]] = field(default_factory=dict, repr=False)
    _resumed: bool = field(default=False, repr=False)

    @classmethod
    def read(cls, subject: Subject, prompts: Texts, *, special: bool = True, max_bytes: int = 2**30) -> PrefixStates:
        """Read the prompts twice, with a key/value cache and without one, batched as `Subject` batches them.

        special     add the tokenizer's special tokens
        max_bytes   the memory that it may take: about tokens * layers * 4 (d_model + keys + values) bytes in float32
        Toggles that act now stay in what is read, and count the two forwards in their receipts. Raises ValueError
        beyond `max_bytes`, under toggles that act on the cache or in every block, for prompts that can't be generated
        from, and for models whose blocks can't be told from outside.
        """
        if max_bytes < 1:
            raise ValueError(f"PrefixStates: got max_bytes={max_bytes}, expected at least 1.")
        if subject.remote:
            raise ValueError(
                f"PrefixStates: the blocks of {subject.name} run elsewhere. Load the model without remote."
            )
        if subject.stages:
            raise ValueError(
                f"PrefixStates: {subject.stages} acts on the cache, which is then no prompt's own. Leave it."
            )
        if getattr(subject.model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise ValueError(f"PrefixStates: blocks of {subject.name} share keys and values, so none stands alone.")
        states = cls(subject, max_bytes)
        last = Site(subject.n_layers - 1, "resid_out")
        with states._instead(states._remember):
            subject.generate(prompts, max_new_tokens=1, special=special)
            subject.capture(prompts, [last], tokens="last", special=special, progress=False)
        if not states._calls:
            raise ValueError(
                "PrefixStates: no block could be read as it stands: hooks or edits inside of every one, autocast or a "
                "trace. Read before they act, and resume under them."
            )
        states.misses = 0
        return states

    @contextmanager
    def resume(self) -> Iterator[PrefixStates]:
        """Within: forwards over the prompts, in the batch in which they were read, run only what changed.

        What they give is equal to the bit, receipts too: a block runs whenever anything is hung into it (an edit, a
        capture, a hook of your own), whenever another value reaches it, and whenever its weights are not those that
        it was read with. Weights changed through `.data` can't be noticed. Enter it before toggles or after them.
        Whole run: forwards that go on with a cache, with gradients, under autocast and inside an nnsight trace.
        """
        if self._resumed:
            raise ValueError("PrefixStates: these states are resumed already. One `with` is enough.")
        self._resumed = True
        try:
            with self._instead(self._replay):
                yield self
        finally:
            self._resumed = False

    def __str__(self) -> str:
        return (
            f"{self.bytes:,} bytes; {self.hits} forwards begun from what was read, {self.misses} run whole, "
            f"{self.replayed} blocks not run"
        )

    @contextmanager
    def _instead(self, run: Callable[..., Any]) -> Iterator[None]:
        """Within: `run(layer, forward, *arguments)` runs instead of the blocks, in each forward that begins texts.

        It stands in while a forward is under way only, so that toggles may come and go between two forwards.
        """
        with ExitStack() as undo:
            turn = undo.enter_context(ExitStack())

            def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                turn.close()  # a forward that was interrupted never came to `end`
                cache = _cache_in(args, kwargs)
                if cache is not None and cache.get_seq_length():
                    return
                turn.callback(self._count, self.replayed)
                if not _needs_all(self.subject):
                    for layer in range(self.subject.n_layers):
                        stand_in(block_of(self.subject, layer), partial(partial, run, layer), turn)

            def end(*_: Any) -> None:
                turn.close()

            undo.callback(self._trunk.register_forward_pre_hook(begin, with_kwargs=True).remove)
            undo.callback(self._trunk.register_forward_hook(end, prepend=True, always_call=True).remove)
            yield

    @property
    def _trunk(self) -> Any:
        return self.subject.model.get_submodule(self.subject.anatomy.trunk)

    def _count(self, replayed_before: int) -> None:
        if self.replayed > replayed_before:
            self.hits += 1
        else:
            self.misses += 1

    def _remember(self, layer: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a block and keep what it got, gave and wrote."""
        block, cache = block_of(self.subject, layer), _cache_in(args, kwargs)
        if cache is not None and type(cache) is not DynamicCache:
            raise ValueError(
                f"PrefixStates: {self.subject.name} keeps its past in a {type(cache).__name__}, expected transformers' "
                "DynamicCache. Leave out what brings another cache."
            )
        if _is_touched(block, forward):
            return forward(*args, **kwargs)
        known = [*self._calls.get(layer - 1, [])[-1:], *self._calls.get(layer, [])]
        near = [tensor for call in known for tensor in call.tensors]
        given = self._kept(_given(args, kwargs), near)  # now: a block may change its input in place
        written: list[Any] = []
        with _overheard(cache, lambda *what: written.append(self._kept(what, near))):
            output = forward(*args, **kwargs)
        call = _Call(forward, given, cache is not None, self._kept(output, near), tuple(written), *self._state(block))
        self._calls.setdefault(layer, []).append(call)
        return output

    def _replay(self, layer: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """What a block gives: remembered where it can be, else run."""
        call = self._known(layer, forward, args, kwargs)
        if call is None:
            return forward(*args, **kwargs)
        cache = _cache_in(args, kwargs)
        for positional, named in call.written:
            assert cache is not None
            cache.update(*_copied(positional), **_copied(named))
        self.replayed += 1
        return _copied(call.output)

    def _known(self, layer: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """The call that this one repeats, if there was one."""
        block, cache = block_of(self.subject, layer), _cache_in(args, kwargs)
        if _is_touched(block, forward) or (cache is not None and type(cache) is not DynamicCache):
            return None
        given, cached = _given(args, kwargs), cache is not None
        for call in self._calls.get(layer, []):
            if call.cached == cached and call.forward == forward and _same(call.given, given):
                parts, settings = self._state(block)
                same_parts = len(parts) == len(call.parts) and all(map(operator.is_, parts, call.parts))
                return call if same_parts and settings == call.settings else None
        return None

    def _state(self, block: nn.Module) -> tuple[list[Any], tuple[Any, ...]]:
        """What else decides what a block gives: objects that must be the very same, and values that must be equal."""
        parts: list[Any] = []
        for module in block.modules():
            held = vars(module)
            parts += [module, *held["_parameters"].values(), *held["_buffers"].values()]
            own = ("forward",) if module is block else ()  # where this module stands in itself
            parts += [item for name, item in held.items() if name not in own and not isinstance(item, dict)]
        versions = [part._version for part in parts if isinstance(part, Tensor) and not part.is_inference()]
        return parts, (self._trunk.config._attn_implementation, *versions)

    def _kept(self, value: Any, near: list[Tensor]) -> Any:
        """A copy of `value`; tensors equal to one in `near`, which grows, are not held twice."""
        if isinstance(value, Tensor):
            for held in near:
                if _same(held, value):
                    return held
            self.bytes += value.numel() * value.element_size()
            if self.bytes > self.max_bytes:
                raise ValueError(
                    f"PrefixStates: the prompts need more than max_bytes={self.max_bytes:,}. "
                    "Give fewer or shorter prompts, or allow more."
                )
            near.append(value.detach().clone())
            return near[-1]
        if type(value) is tuple:
            return tuple(self._kept(item, near) for item in value)
        if type(value) is dict:
            return {name: self._kept(item, near) for name, item in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(
            f"PrefixStates: blocks of {self.subject.name} are called with, or return, a {type(value).__name__}; "
            "expected tensors, numbers and words. Its states can't be kept."
        )


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a block.

    forward   what ran                                given    its arguments without the cache
    cached    whether a cache came with them          output   what it returned
    written   arguments of each update of the cache   parts, settings   see `PrefixStates._state`
    """

    forward: Forward
    given: Any
    cached: bool
    output: Any
    written: tuple[Any, ...]
    parts: list[Any]
    settings: tuple[Any, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return list(_tensors((self.given, self.output, self.written)))


def _needs_all(subject: Subject) -> bool:
    """Whether blocks must run: for gradients, in another precision, for who looks inside without a hook there."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(subject.device.type):
        return True
    traced = vars(subject).get("nn")  # made at its first use
    return (traced is not None and traced.interleaver.interleaving) or bool(torch_module._has_any_global_hook())


def _is_touched(block: nn.Module, forward: Forward) -> bool:
    """Whether something is hung into a block, or stands in for a part of it: its arguments don't tell all then.

    Hooks of the block itself are outside: they run anyway, before and after what stands in for it.
    """
    inside = (vars(module) for module in block.modules() if module is not block)
    return isinstance(forward, StandIn) or any(
        held["_forward_hooks"] or held["_forward_pre_hooks"] or isinstance(held.get("forward"), StandIn)
        for held in inside
    )


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The key/value cache among arguments; families call it by different names."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of a block without what tells of the cache."""
    named = {name: value for name, value in kwargs.items() if name != "use_cache" and not isinstance(value, Cache)}
    return tuple(value for value in args if not isinstance(value, Cache)), named


@contextmanager
def _overheard(cache: Cache | None, hear: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Within: `hear` gets the arguments of every update of `cache`."""
    if cache is None:
        yield
        return
    update = cache.update

    def heard(*args: Any, **kwargs: Any) -> Any:
        hear(args, kwargs)
        return update(*args, **kwargs)

    vars(cache)["update"] = heard
    try:
        yield
    finally:
        del vars(cache)["update"]


def _same(held: Any, value: Any) -> bool:
    """Whether two values are equal, tensors in every number and in dtype, shape and device."""
    if isinstance(held, Tensor) and isinstance(value, Tensor):
        return (held.dtype, held.device) == (value.dtype, value.device) and torch.equal(held, value)
    if type(held) is not type(value):
        return False
    if isinstance(held, dict):
        return held.keys() == value.keys() and all(_same(item, value[name]) for name, item in held.items())
    if isinstance(held, tuple):
        return len(held) == len(value) and all(map(_same, held, value))
    return held == value


def _copied(value: Any) -> Any:
    """`value` with tensors of its own: who gets them may change them in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
