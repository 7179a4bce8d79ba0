"""Let fewer tokens of a prompt go on to each deeper layer, which then neither computes nor caches the others.

After layer l the newest queries score the context, and the hidden states of the best tokens alone enter layer l + 1, at
their own positions; how many is a closed form. While generating, blocks of older generated tokens are thinned likewise.
Source: PyramidInfer, Yang et al., 2024 (arXiv 2405.12532). Unlike its code: rows of a batch have lengths of their own,
at most `window` queries score, the linear schedule falls, and no token of the prompt is dropped while generating.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.anatomy import first_tensor, with_first_tensor
from workbench.cache.attention import weights
from workbench.cache.layer import KVLayer, View
from workbench.cache.stages import KVCache, use_stage
from workbench.methods.cache.pyramid_lengths import Schedule, going_on, lengths, newest, rates, row_weights, thinned
from workbench.methods.cache.scorers import random
from workbench.pruned.blocks import blocks_of_slots
from workbench.step import Step
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

DEEPEST = 0.1  # what `generated` falls to with depth, relative to layer 0
ROWS = 16  # queries whose weights are held at once: O(head x ROWS x slot) memory


@dataclass(frozen=True)
class PyramidInfer(Toggle):
    """A pyramid of tokens over the layers; layers 0 and 1 always receive every token.

    decay        rate by which the deepest layers shrink the context, layer after layer: 0.9 keeps far less than 90 %
    recent       share of the prompt that always goes on, as its last token does
    by           what a context token is chosen by: attention of the newest tokens, or random, the control
    schedule     how the rate falls from 1 to `decay`: cosine or linear
    interval     layers between two reductions
    min_context  a context of so many tokens or fewer is left alone        sinks   first tokens that always go on
    window       most of the recent queries that score, for O(T) memory; None: all of them, as in the paper
    generated    share that layer 0 keeps of each block of generated tokens once it is older than the recent ones,
                 deeper layers less, and nothing that is packed by then; None: all stay
    block        generated tokens that are thinned together, and newest queries that score them

    One forward must bring the whole prompt: a text read in pieces can't be scored. Tokens that do not go on have no
    prediction: logits of the prompt are NaN there.
    """

    decay: float = 0.9
    recent: float = 0.2
    by: Literal["attention", "random"] = "attention"
    schedule: Schedule = "cosine"
    interval: int = 1
    min_context: int = 64
    sinks: int = 4
    window: int | None = 128
    generated: float | None = 0.9
    block: int = 16

    claims: ClassVar[frozenset[str]] = frozenset({"kv.select"})

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or not 0 <= self.recent < 1:
            raise ValueError(
                f"PyramidInfer: got decay={self.decay}, recent={self.recent}; expected 0 < decay <= 1, 0 <= recent < 1."
            )
        if self.generated is not None and not 0 < self.generated <= 1:
            raise ValueError(f"PyramidInfer: got generated={self.generated}, expected above 0 and up to 1, or None.")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"PyramidInfer: got schedule={self.schedule!r}, expected cosine or linear.")
        if self.by not in ("attention", "random"):
            raise ValueError(f"PyramidInfer: got by={self.by!r}, expected attention or random.")
        for name, least in (("interval", 1), ("sinks", 0), ("block", 1), ("window", 1)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"PyramidInfer: got {name}={given}, expected at least {least}.")
        if self.min_context < self.sinks:
            raise ValueError(
                f"PyramidInfer: got min_context={self.min_context} and sinks={self.sinks}, expected a context that "
                "holds the sinks. Raise min_context or force fewer sinks."
            )

    def lengths(self, tokens: int, n_layers: int) -> list[int]:
        """Tokens of a prompt of `tokens` that enter each layer; see `workbench.methods.cache.pyramid_lengths`."""
        return lengths(
            tokens,
            n_layers,
            decay=self.decay,
            recent=self.recent,
            schedule=self.schedule,
            interval=self.interval,
            min_context=self.min_context,
        )

    def plan(self, tokens: int, n_layers: int) -> pd.DataFrame:
        """The pyramid of a prompt of `tokens`, without any model: one row per layer.

        Columns layer, entered (tokens that it computes and caches), context and recent (which add up to entered), rate
        (share of the context that may go on), and, relative to all tokens, cache, linear and attention: bytes held, and
        multiplications in matrix products and in attention.
        """
        if tokens < 1 or n_layers < 1:
            raise ValueError(f"PyramidInfer: got {tokens} tokens and {n_layers} layers, expected at least 1 of each.")
        entered, recent = np.array(self.lengths(tokens, n_layers)), newest(tokens, self.recent)
        columns = {
            "layer": range(n_layers),
            "entered": entered,
            "context": entered - recent,
            "recent": recent,
            "rate": rates(n_layers, self.decay, self.schedule),
            "cache": entered / tokens,
            "linear": entered / tokens,
            "attention": (entered / tokens) ** 2,
        }
        return pd.DataFrame(columns)

    def block_sizes(self, n_layers: int) -> list[int]:
        """Tokens that each layer keeps of a block of generated ones."""
        if self.generated is None:
            return [self.block] * n_layers
        return [int(self.block * self.generated * rate) for rate in rates(n_layers, DEEPEST)]

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.decay == 1 and self.generated is None:
            return
        _refuse_hidden_positions(subject)
        stages, pyramid = subject.stages, Pyramid(self, subject)
        use_stage(subject, "select", pyramid, undo)
        undo.callback(setattr, stages, "piece", stages.piece)
        stages.piece = None
        trunk = subject.model.get_submodule(subject.anatomy.trunk)
        _refuse_other_layers(subject, trunk)
        undo.callback(trunk.register_forward_pre_hook(pyramid.begin, with_kwargs=True).remove)
        blocks = [_block(subject, layer) for layer in range(subject.n_layers)]
        for block in blocks:
            undo.callback(block.register_forward_pre_hook(pyramid.place, with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(pyramid.narrow).remove)
        undo.callback(blocks[-1].register_forward_hook(pyramid.widen).remove)
        undo.callback(trunk.register_forward_hook(pyramid.end, with_kwargs=True).remove)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        small = {"min_context": 2, "sinks": 1, "generated": 0.5, "block": 2}
        return cls(0.5, **small), cls(0.3, 0.0, schedule="linear", window=None, **small), cls(0.3, by="random", **small)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(1.0, generated=None)

    def __str__(self) -> str:
        more = [] if self.by == "attention" else [f"by {self.by}"]
        more += [] if self.schedule == "cosine" else [self.schedule]
        more += [] if self.interval == 1 else [f"every {self.interval} layers"]
        return f"PyramidInfer({', '.join([f'decay {self.decay:g}, recent {self.recent:.0%}', *more])})"


@dataclass(eq=False)
class Pyramid:
    """The select stage of a `PyramidInfer` and its hooks; what it holds concerns the forward under way alone.

    plans     for each row, the tokens that enter each layer
    going     of the layer under way: (batch, kept) columns that go on, right-aligned, and where these are real
    columns   (batch, kept) columns of the whole forward that the next layer receives; None: all of them
    whole     the step of the whole forward
    acting    the blocks that attend, in order: others may be dropped, and a block's budget is that of its own number
    """

    settings: PyramidInfer
    subject: Subject
    plans: list[list[int]] = field(default_factory=list)
    going: tuple[Tensor, Tensor] | None = None
    columns: Int[Tensor, "batch kept"] | None = None
    whole: Step | None = None
    acting: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.acting = list(range(self.subject.n_layers))

    # The select stage

    @property
    def running(self) -> bool:
        return False

    def keep(self, view: View) -> Bool[Tensor, "batch kv_head slot"] | None:
        """In the prompt's forward, note who goes on and drop nothing; later, thin generated tokens."""
        if not view.first:
            return None if self.settings.generated is None else self._thin(view)
        if view.layer == self.acting[0]:
            counts = view.step.real.sum(1)
            self.plans = [self.settings.lengths(n, self.subject.n_layers) for n in counts.tolist()]
        prompt = [plan[0] for plan in self.plans]
        view.state["prompt"] = torch.tensor(prompt, device=view.query.device)
        view.state["thinned"] = torch.zeros_like(view.state["prompt"])
        view.state["wait"] = self.settings.block + min(newest(n, self.settings.recent) for n in prompt)
        self._choose(view)
        return torch.ones_like(view.slots.positions, dtype=torch.bool)  # so that the clock of thinning starts here

    def _choose(self, view: View) -> None:
        deeper = self.acting[self.acting.index(view.layer) + 1 :]
        if not deeper:
            return
        received = 0 if view.layer == self.acting[0] else view.layer  # the first one receives every token
        now, then = ([plan[layer] for plan in self.plans] for layer in (received, deeper[0]))
        if now == then:
            return
        device, real = view.query.device, view.step.real.to(view.query.device)
        chosen = going_on(
            self._prompt_scores(view),
            view.slots.positions[:, 0],
            torch.tensor(then, device=device),
            sinks=self.settings.sinks,
            recent=self._recent(view.state["prompt"]),
        )
        last = chosen.int().argsort(dim=1, stable=True)[:, -max(then) :]  # slots that go on, in order, at the right
        column = (~real).int().argsort(dim=1, stable=True)  # of each slot: padding took none
        self.going = column.gather(1, last), chosen.gather(1, last)
        token = sum(tensor[0, :, 0].nbytes for tensor in view.slots.tensors)  # bytes in one layer
        dropped = sum(now) - sum(then)
        self.subject.stages.acted("select", dropped, dropped * token * len(deeper))

    def _prompt_scores(self, view: View) -> Float[Tensor, "batch slot"]:
        """Sum over the newest rows of their weight times the attention that a token got, averaged over heads."""
        if self.settings.by == "random":
            return random(view)[:, 0]
        positions, real = (t.to(view.query.device) for t in (view.step.positions, view.step.real))
        positions = positions.where(real, -1)
        last, rows = positions.amax(1, keepdim=True), self._recent(view.state["prompt"])
        if self.settings.window is not None:
            rows = rows.clamp_max(self.settings.window)
        share = row_weights(positions, last, rows)  # (batch, seq)
        total = share.new_zeros(len(share), view.keys.shape[2])
        for start in range(int(share.any(0).int().argmax()), share.shape[1], ROWS):
            part = slice(start, start + ROWS)
            total += (view.attention(part).mean(1) * share[:, part, None]).sum(1)
        return total

    def _recent(self, prompt: Int[Tensor, " batch"]) -> Int[Tensor, "batch 1"]:
        """Newest tokens that are never touched, by the length of the prompt."""
        found = [newest(tokens, self.settings.recent) for tokens in prompt.tolist()]
        return torch.tensor(found, device=prompt.device)[:, None]

    def _thin(self, view: View) -> Bool[Tensor, "batch kv_head slot"] | None:
        """Of every block of generated tokens that has grown older than the recent ones, drop all but the best.

        A row's blocks are due by its own count; `wait` is how long none of the rows has one, without asking the device.
        """
        self._remember(view)
        state, block = view.state, self.settings.block
        if view.since < state["wait"]:
            return None
        positions, starts = view.slots.positions[:, 0], state["prompt"] + state["thinned"]
        last = view.context.positions[:, 0].amax(1)
        older = last + 1 - self._recent(state["prompt"])[:, 0] - starts  # tokens that wait to be thinned
        due = torch.div(older.clamp_min(0), block, rounding_mode="floor")
        state["thinned"] = state["thinned"] + due * block
        state["wait"] = int((block - older + due * block).min())
        count = self.settings.block_sizes(self.subject.n_layers)[view.layer]
        return thinned(self._block_scores(view), positions, starts, due, block=block, count=count)[:, None]

    def _block_scores(self, view: View) -> Float[Tensor, "batch slot"]:
        """The same of the newest queries while generating, which are remembered."""
        if self.settings.by == "random":
            return random(view)[:, 0]
        asked, last = view.state["asked"], view.context.positions[:, :1].amax(2)
        share = row_weights(asked, last, torch.full_like(last, self.settings.block))
        seen = weights(view.state["queries"], view.context, asked, view.scaling, view.soft_cap)
        return (seen[..., -view.keys.shape[2] :].mean(1) * share[..., None]).sum(1)

    def _remember(self, view: View) -> None:
        """Keep each row's newest queries, padding left out."""
        state, step = view.state, view.step
        asked = step.positions.where(step.real, -1).to(view.query.device)
        query = view.query
        if "asked" in state:
            asked, query = torch.cat([state["asked"], asked], 1), torch.cat([state["queries"], query], 2)
        order = asked.argsort(dim=1, stable=True)[:, -self.settings.block :]
        state["asked"] = asked.gather(1, order)
        state["queries"] = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))

    # Hooks

    def begin(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.going = self.columns = self.whole = None
        self.acting = sorted(blocks_of_slots(self.subject.model, self.subject.anatomy).values())
        config: Any = trunk.config
        wanted = kwargs.get("output_hidden_states")
        wanted = config.output_hidden_states if wanted is None else wanted
        if wanted and kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"{self.settings}: got output_hidden_states=True, but deeper layers receive fewer tokens, whose states "
                "would pass for those of all. Leave it out."
            )

    def place(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Positions of the tokens that the block receives; its attention goes by the step and reads no mask."""
        if self.columns is None:
            return None
        names = {"position_embeddings", "position_ids"} & kwargs.keys()
        return args, kwargs | {name: self._placed(kwargs[name]) for name in names}

    def _placed(self, given: Any) -> Any:
        assert self.columns is not None
        if isinstance(given, Tensor):
            return _taken(given.expand(len(self.columns), *given.shape[1:]), self.columns)
        return None if given is None else type(given)(self._placed(part) for part in given)

    def narrow(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Let go on only what was chosen; from here on the step is that of these tokens."""
        if self.going is None:
            return None
        (columns, real), self.going = self.going, None
        step = self.subject.step
        assert step is not None
        self.whole = self.whole or step
        self.columns = columns if self.columns is None else self.columns.to(columns.device).gather(1, columns)
        there, real = columns.to(step.positions.device), real.to(step.positions.device)
        positions = step.positions.gather(1, there).where(real, 0)
        self.subject.step = Step(positions, real, step.prompt_lengths)
        return with_first_tensor(output, _taken(first_tensor(output), columns))

    def widen(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last block every token is back in its column, NaN and no longer real where it did not come so far.

        Not after the decoder's last norm: GPT-2 shapes its output by the tokens that came in.
        """
        if self.columns is None:
            return None
        step, hidden = self.subject.step, first_tensor(output)
        assert self.whole is not None and step is not None
        row, place = step.real.to(hidden.device).nonzero(as_tuple=True)
        column = self.columns.to(hidden.device)[row, place]
        full = hidden.new_full((*self.whole.real.shape, hidden.shape[2]), torch.nan)
        full[row, column] = hidden[row, place]
        there = torch.zeros_like(self.whole.real)
        there[row.to(there.device), column.to(there.device)] = True
        self.subject.step = replace(self.whole, real=there)
        return with_first_tensor(output, full)

    def end(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Deeper layers received fewer tokens, but what transformers counts are those that came in."""
        if self.columns is not None:
            assert self.whole is not None
            first, *deeper = kwargs["past_key_values"].layers
            for layer in deeper:
                layer.seen = first.seen
            self.subject.step = self.whole


def _block(subject: Subject, layer: int) -> nn.Module:
    return subject.model.get_submodule(f"{subject.anatomy.blocks}.{layer}")


def _taken(values: Tensor, columns: Int[Tensor, "batch kept"]) -> Tensor:
    """(batch, kept, ...) of values (batch, seq, ...)."""
    columns = columns.to(values.device)
    return values[torch.arange(len(columns), device=values.device)[:, None], columns]


def _refuse_hidden_positions(subject: Subject) -> None:
    """Rotations that each attention makes for itself, by counting, would give the tokens that go on other positions."""
    trunk = subject.model.get_submodule(subject.anatomy.trunk)
    block = _block(subject, 0)
    rotary = any(name.endswith("inv_freq") for name, _ in trunk.named_buffers())
    if rotary and "position_embeddings" not in inspect.signature(type(block).forward).parameters:
        raise ValueError(
            f"PyramidInfer: the blocks of {type(subject.model).__name__} are not given their rotations "
            "(position_embeddings), so tokens can't keep their positions when others leave. Choose another family."
        )


def _refuse_other_layers(subject: Subject, trunk: nn.Module) -> None:
    layers = KVCache(subject, trunk.config).layers
    others = [number for number, layer in enumerate(layers) if not isinstance(layer, KVLayer)]
    if others:
        raise ValueError(
            f"PyramidInfer: layers {', '.join(map(str, others))} of {subject.name} are sliding-window or recurrent and "
            "need every token of their window. Choose a model of full attention, or EvictKV, which leaves them alone."
        )
