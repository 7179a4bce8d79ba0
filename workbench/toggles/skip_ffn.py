"""Skip feed-forward blocks that hardly turn the stream, token by token, while generating; attention always runs.

c = cos(x, x + y) >= threshold: the next `run` feed-forward blocks of the middle layers add nothing for this token.
Source: FFN-SkipLLM, Jaiswal et al., 2024 (arXiv 2404.03865). No code is public: the rule that ends a rest, the test by
length, fixed schedules, and that positions decide instead of calls, are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from workbench.anatomy import add_tap, first_tensor
from workbench.methods.pruning.skipping import Test, change, is_saturated, still_to_skip
from workbench.pruned.blocks import block_of
from workbench.site import Site
from workbench.step import Step
from workbench.swap import stand_in, standing_in
from workbench.toggle import Receipt, Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class SkipFFN(Toggle):
    """A model that thinks less about easy tokens: after a saturated feed-forward block the next ones rest.

    threshold   a block is saturated where the cosine is at least this, or the relative length at most this
    first, last   the middle layers, whose blocks may rest; None: to the end. `FFNSaturation` finds them and a threshold
    warmup      generated tokens at the start that always run in full
    run         blocks that rest after a saturated one; None: all up to `last`
    test        cosine: cos(x, x + y); relative: |y| / |x|, which a few huge coordinates of x do not drown
    static      instead of a threshold: these layers always rest, without a test and without waiting for the device
    batch       gather: each token of a batch decides for itself, and the blocks compute the rows that run;
                all: blocks rest only where all rows of a batch agree

    A prompt never skips. A text that is read and not generated is taken as generated from its first token on: `nll`,
    `predictions` and `capture` say what decoding it token by token would, by one forward, which saves no time (and so
    does each forward of transformers' own generate with use_cache=False, which tells no prompt).
    What reads or edits inside a block (neurons, gate, up) expects whole batches: then all rows are computed, and
    skipped ones read zero at neurons and add nothing, whatever is put there. Steer before skipping to have it seen.
    """

    threshold: float | None = None
    first: int = 0
    last: int | None = None
    warmup: int = 16
    run: int | None = 2
    test: Test = "cosine"
    static: tuple[int, ...] = ()
    batch: Literal["gather", "all"] = "gather"

    claims: ClassVar[frozenset[str]] = frozenset({"ffn.skip"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "static", tuple(sorted(set(self.static or ()))))
        if (self.threshold is None) == (not self.static):
            raise ValueError(
                f"SkipFFN: got threshold={self.threshold} and static={self.static}, expected one of them: a threshold "
                "that decides token by token, or the layers that always rest."
            )
        if self.first < 0 or (self.last is not None and self.last < self.first) or min(self.static, default=0) < 0:
            raise ValueError(
                f"SkipFFN: got first={self.first}, last={self.last}, static={self.static}; expected layers from 0, "
                "and first <= last."
            )
        if self.warmup < 0 or (self.run is not None and self.run < 1):
            raise ValueError(
                f"SkipFFN: got warmup={self.warmup}, run={self.run}; expected warmup >= 0, and run >= 1 or None."
            )
        if self.test not in ("cosine", "relative") or self.batch not in ("gather", "all"):
            raise ValueError(
                f"SkipFFN: got test={self.test!r}, batch={self.batch!r}; expected cosine or relative, gather or all."
            )

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers whose blocks may rest."""
        found = self.static or range(self.first, n_layers if self.last is None else self.last + 1)
        if not found or found[-1] >= n_layers:  # both are in order; the maximum of a range would be counted up to
            said = list(self.static) or f"{self.first} to {self.last}"
            raise ValueError(f"{self}: got layers {said}, but this model has blocks 0 to {n_layers - 1}.")
        return tuple(found)

    def install(self, subject: Subject, undo: ExitStack) -> None:
        layers = self.layers(subject.n_layers)
        if self.threshold is not None and (self.threshold > 1.5 if self.test == "cosine" else self.threshold < 0):
            return  # never saturated
        reason = subject.remember(("what stands in the way of SkipFFN",), lambda: _in_the_way(subject))
        if reason:
            raise ValueError(f"SkipFFN: feed-forward blocks of {subject.name} can't be skipped: {reason}.")
        skipping = _Skipping(self, subject, subject.receipt)
        watch = subject.watch
        watch.before.append(skipping.begin)
        undo.callback(watch.before.remove, skipping.begin)
        for layer in layers:
            _Block(skipping, layer, *_entry_and_exit(subject, layer)).install(subject, undo)

    def facts(self, receipt: Receipt) -> list[str]:
        tokens, skipped = (receipt.per_layer.get(name, {}) for name in ("tokens", "skipped"))
        if not tokens:
            return ["no token came behind prompt and warm-up, so nothing could rest"] if receipt.fired else []
        share = {layer: float(skipped.get(layer, 0)) / float(count) for layer, count in tokens.items()}
        some = ", ".join(f"{part:.0%} at {layer}" for layer, part in share.items() if part)
        told = f"skipped {sum(share.values()) / len(share):.1%} of the feed-forward blocks after the warm-up"
        return [f"{told} ({some})" if some else told]

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return (  # a cosine is never below -1, nor a length above 1e9: each saturated, so every second block rests
            cls(-1.0, warmup=0, run=1),
            cls(1e9, last=1, warmup=1, run=None, test="relative"),
            cls(static=(0, subject.n_layers - 1), warmup=0),
        )

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(2.0)  # not 1: rounding gives cosines of 1 + 2e-16

    def __str__(self) -> str:
        if self.static:
            return f"SkipFFN(layers {', '.join(map(str, self.static))})"
        rule = f"{'cosine >=' if self.test == 'cosine' else 'relative <='} {self.threshold:.6g}"
        rest = "all up to the last" if self.run is None else f"{self.run} blocks"
        return f"SkipFFN({rule} in {self.first}..{'' if self.last is None else self.last}, {rest})"


@dataclass(eq=False)
class _Skipping:
    """The forward under way: which tokens may skip, and how many blocks each has still to skip.

    step   the step that this was decided for; in any other, such as a pass that reads the prompt, nothing is skipped
    may    True at tokens behind prompt and warm-up; None where there are none
    read   the forward brings texts that are read to their ends: no company of rows decides
    """

    settings: SkipFFN
    subject: Subject
    receipt: Receipt
    step: Step | None = None
    may: Bool[Tensor, "batch seq"] | None = None
    left: Int[Tensor, "batch seq"] = field(default_factory=lambda: torch.empty(0, 0))
    read: bool = False

    def begin(self, step: Step, given: Mapping[str, Any]) -> None:
        self.receipt.fired += 1  # a forward was looked at: where nothing could rest, `facts` says so
        self.step, self.may, self.read = step, None, _is_read(self.subject, given)
        ends = 1 if self.read else step.prompt_lengths[:, None]
        may = step.real & (step.positions >= ends + self.settings.warmup)
        count = int(may.sum())  # one wait for the device per forward
        if count:
            self.may, self.left = may, torch.zeros_like(step.positions)
            for layer in range(self.subject.n_layers):
                self.receipt.count_layer("tokens", layer, count)

    @property
    def acting(self) -> bool:
        return self.may is not None and self.subject.step is self.step

    def skips(self) -> Bool[Tensor, "batch seq"]:
        """The tokens that skip the next block."""
        assert self.may is not None and self.step is not None
        skips = self.may if self.settings.static else self.may & (self.left > 0)
        if self.settings.batch == "all" and not self.read:
            skips = skips & (skips | ~self.step.real).all()
        return skips


@dataclass(eq=False)
class _Block:
    """One feed-forward block: what runs instead of it, and the test behind it.

    entry, exit   the modules that it begins and ends with: one and the same, but in OPT
    rows          the tokens that run, of all in the batch; None: all of them
    """

    skipping: _Skipping
    layer: int
    entry: nn.Module
    exit: nn.Module
    skips: Bool[Tensor, "batch seq"] | None = None
    rows: Int[Tensor, " rows"] | None = None
    whole: bool = False  # all rows run, as something looks on
    ran: bool = False
    said: Tensor | None = None  # by attention
    n_own: int = 0  # hooks of ours inside

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.entry is self.exit:
            other = standing_in(self.entry)
            stand_in(self.entry, self._instead, undo, reason=other.reason if other else "")
        else:
            stand_in(self.entry, lambda inner: lambda x: inner(self.take(x)), undo)
            stand_in(self.exit, lambda inner: lambda x: self.give(inner(x)), undo)
        if "neurons" in subject.anatomy.places[self.layer]:
            down = subject.anatomy.module(subject.model, Site(self.layer, "neurons"))
            undo.callback(down.register_forward_pre_hook(self._zeros).remove)  # no tap: it would expect whole batches
            self.n_own = 1
        if not self.skipping.settings.static:
            add_tap(subject.model, subject.anatomy, Site(self.layer, "attn_out"), self._hear, undo)
            undo.callback(block_of(subject, self.layer).register_forward_hook(self._test, with_kwargs=True).remove)

    def _instead(self, inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(hidden_states: Tensor) -> Tensor:
            x = self.take(hidden_states)
            return self.give(inner(x) if x.numel() else x)

        return forward

    def take(self, x: Tensor) -> Tensor:
        """Of the input of the block, the rows that run."""
        state, self.ran, self.skips, self.rows = self.skipping, True, None, None
        if not state.acting:
            return x
        assert state.step is not None
        self.skips = state.skips().to(x.device)
        rows = (state.step.real.to(x.device) & ~self.skips).flatten().nonzero()[:, 0]
        if len(rows) == self.skips.numel():
            return x
        self.rows, self.whole = rows, self._looked_at()
        if self.whole:
            return x
        some = x.reshape(-1, x.shape[-1])[rows]
        return some if x.dim() == 2 else some[None]

    def give(self, y: Tensor) -> Tensor:
        """What the block adds: zero for the rows that did not run."""
        if self.rows is None:
            return y
        assert self.skips is not None and self.skipping.step is not None
        self.skipping.receipt.count_forward(self.skips, self.skipping.step.prompt_lengths)
        self.skipping.receipt.count_layer("skipped", self.layer, self.skips.sum())
        flat = y.reshape(-1, y.shape[-1])
        ran = flat[self.rows] if self.whole else flat
        full = y.new_zeros(self.skips.numel(), y.shape[-1]).index_copy(0, self.rows, ran)
        return full if y.dim() == 2 else full.reshape(*self.skips.shape, -1)

    def _looked_at(self) -> bool:
        """Whether hooks inside the block would see fewer rows than they expect."""
        if self.entry is not self.exit:
            return len(self.entry._forward_hooks) + len(self.exit._forward_pre_hooks) > self.n_own
        inside = [module for module in self.entry.modules() if module is not self.entry]
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in inside) > self.n_own

    def _zeros(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """At the neurons: nothing where the block is skipped."""
        if self.rows is None or not self.whole:
            return None
        assert self.skips is not None
        return args[0].masked_fill(self.skips.reshape(*args[0].shape[:-1], 1), 0.0), *args[1:]

    def _hear(self, value: Tensor) -> None:
        self.said = value if self.skipping.acting else None

    def _test(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Behind the block: did it turn the stream? One that another toggle left out tells nothing."""
        state, ran, said = self.skipping, self.ran, self.said
        self.ran, self.said = False, None
        if not state.acting or not ran or said is None:
            return
        assert self.skips is not None and state.may is not None
        before = (args[0] if args else kwargs["hidden_states"]) + said
        value = change(before, first_tensor(output), state.settings.test)
        assert state.settings.threshold is not None
        saturated = is_saturated(value, state.settings.threshold, state.settings.test).to(state.left.device)
        run = state.subject.n_layers if state.settings.run is None else state.settings.run
        skips = self.skips.to(state.left.device)
        state.left = still_to_skip(state.left, skips, saturated & state.may & ~skips, run)


def _is_read(subject: Subject, given: Mapping[str, Any]) -> bool:
    """Whether a forward brings texts that are read to their ends: nobody told a prompt, and no cache goes on from them.

    Under toggles on caches such texts come token by token, as the prompts of `generate` come in chunks.
    """
    watch, chunk = subject.watch, subject.stages.chunk
    if watch.whole is not None:
        if chunk == 1:
            raise ValueError("SkipFFN: with chunk=1, prompts can't be told from texts that are read. Take chunk=2.")
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        return chunk is None or tokens.shape[1] == 1  # a chunk of one holds the first token, which never skips
    cached = given.get("use_cache")
    cached = subject.model.config.get_text_config().use_cache if cached is None else cached
    return not watch.told and not cached and given.get("past_key_values") is None


def _entry_and_exit(subject: Subject, layer: int) -> tuple[nn.Module, nn.Module]:
    """The modules that a feed-forward block begins and ends with."""
    block, places = block_of(subject, layer), subject.anatomy.places[layer]
    if "neurons" not in places:
        whole = block.get_submodule(places["mlp_out"].path)
        return whole, whole
    path, _, _ = places["neurons"].path.rpartition(".")
    if path:
        return block.get_submodule(path), block.get_submodule(path)
    return block.get_submodule(places["up"].path), block.get_submodule(places["neurons"].path)


@torch.no_grad()
def _in_the_way(subject: Subject) -> str:
    """Why blocks can't be skipped, or "": the stream must stand between attention and FFN, and zero must stay zero."""
    anatomy, model = subject.anatomy, subject.model
    heard: list[Tensor] = []
    ids = torch.arange(1, 3, device=subject.device)[None] % anatomy.vocab
    with subject.untoggled(), ExitStack() as undo:
        for layer in range(subject.n_layers):
            behind = block_of(subject, layer).get_submodule(anatomy.place(Site(layer, "mlp_out")).path)
            nothing = torch.zeros(1, 1, anatomy.d_model, device=subject.device, dtype=subject.dtype)
            if behind is not _entry_and_exit(subject, layer)[1] and behind(nothing).any():
                return f"what stands behind the one of layer {layer} makes something of zero"
        entry = _entry_and_exit(subject, 0)[0]
        undo.callback(entry.register_forward_pre_hook(lambda _, args: heard.append(args[0].clone())).remove)
        model(input_ids=ids, use_cache=False)
        add_tap(model, anatomy, Site(0, "attn_out"), lambda value: value + torch.ones_like(value).cumsum(-1), undo)
        model(input_ids=ids, use_cache=False)
    return (
        "attention and feed-forward run side by side, with no stream between them" if heard[0].equal(heard[1]) else ""
    )
