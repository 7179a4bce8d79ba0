"""A dense feed-forward block as a mixture of experts, without training: most neurons wait for the topics they serve.

y = W_s h_s + sum over the `active` best experts j of W_j h_j, W columns of the down projection; score_j = |act(x . g_j)
(x . u_j)|, rows of expert j's switch neuron, scaled to norm 1. With all experts active it is the block that it was.
Source: CMoE, Pei et al., 2025 (arXiv 2502.04416), without its training; `workbench.methods.pruning.experts` differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.anatomy import KEPT, Kept, add_tap
from workbench.methods.pruning.experts import Experts, Mode, carve, router_scores, selected
from workbench.methods.pruning.ffn_weights import FFNWeights, Rows, ffn_inputs
from workbench.pruned.blocks import block_of, is_dropped
from workbench.site import Site
from workbench.swap import stand_in, standing_in
from workbench.toggle import Receipt, Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

ONE_BY_ONE = 2  # tokens up to which experts run token by token: their rows are read where they lie


@dataclass(frozen=True)
class CarveMoE(Toggle):
    """Feed-forward blocks whose neurons run in experts. Made by `CarveMoE.carve`; only numbers of neurons are held.

    layers   the Experts of each carved layer        active   routed experts that run for each token
    form     slice: experts in memory of their own, which run alone: faster, and the original weights wait beside them;
             mask: everything runs and what was not chosen is unheard: the same function, no faster, but gate, up and
             neurons can be read and edited (an edit of a neuron that was not chosen does nothing)
    model    fingerprint of the subject it was carved on; another is refused. None: taken anywhere
    Another `active`, by `dataclasses.replace`, needs no new carving, though layers were carved behind carved layers.
    """

    layers: tuple[Experts, ...] = ()
    active: int = 1
    form: Literal["slice", "mask"] = "slice"
    model: str | None = None

    claims: ClassVar[frozenset[str]] = frozenset({"ffn.experts"})
    precedes: ClassVar[frozenset[str]] = frozenset({"ffn.skip"})
    values: ClassVar[tuple[type, ...]] = (Experts,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(sorted(self.layers, key=lambda one: one.layer)))
        if len({one.layer for one in self.layers}) < len(self.layers):
            raise ValueError(f"CarveMoE: got layers {[one.layer for one in self.layers]}, expected each once.")
        least = min((len(one.experts) for one in self.layers), default=self.active)
        if not 0 <= self.active <= least:
            raise ValueError(f"CarveMoE: got active={self.active}, expected 0 to {least}, the routed experts.")
        if self.form not in ("slice", "mask"):
            raise ValueError(f"CarveMoE: got form {self.form!r}, expected 'slice' or 'mask'.")

    @classmethod
    def carve(
        cls,
        subject: Subject,
        texts: Sequence[str],
        *,
        experts: int = 16,
        shared: int = 2,
        active: int = 2,
        layers: Iterable[int] | None = None,
        mode: Mode = "corrected",
        marked: int | None = None,
        form: Literal["slice", "mask"] = "slice",
        tokens: int = 4096,
        seed: int = 0,
        cut: bool = False,
    ) -> CarveMoE:
        """Group the neurons of `layers` (None: all), one layer after the other, each on what the carved ones give it.

        experts, shared   of `experts` equal parts of a layer, `shared` always run; so `active` routed ones make
                          (shared + active) / experts of its neurons run, and what does not divide always runs too
        marked            neurons marked as firing per token        tokens   of the texts, drawn by `seed`, that count
        Under a pruning it carves what is left. Raises ValueError without texts, and where neurons can't be told apart.
        """
        ids = subject.tokenize(texts if isinstance(texts, str) else list(texts), cut=cut).ids
        made = cls((), 0, "mask", subject.fingerprint)
        for layer in range(subject.n_layers) if layers is None else sorted(set(layers)):
            weights = FFNWeights.of(subject, layer)
            if _is_off(subject, layer) or not len(weights.units):
                continue
            with ExitStack() as undo:
                if made.layers:
                    undo.enter_context(subject.under(made))
                x = ffn_inputs(subject, ids, layer, tokens, seed)
            said = weights.said(x, normed=True).float().cpu()
            numbers = weights.units.tolist()
            found = carve(said, numbers, layer=layer, experts=experts, shared=shared, mode=mode, marked=marked)
            made = replace(made, layers=(*made.layers, found), active=active)
        return replace(made, form=form)

    def random_control(self, seed: int = 0) -> CarveMoE:
        """Experts of the same sizes from neurons drawn by lot, routed by one of their own."""
        return replace(self, layers=tuple(one.shuffled(seed) for one in self.layers))

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.model is not None and self.model != subject.fingerprint:
            raise ValueError(
                f"{self}: was carved on model {self.model}, but {subject.name} is {subject.fingerprint}. "
                "Carve it again."
            )
        for experts in self.layers:
            subject.anatomy.place(Site(experts.layer, "neurons"))
        here = [experts for experts in self.layers if not _is_off(subject, experts.layer)]
        carved = [_Carved.of(self, subject, experts) for experts in here]  # all before any acts: this reads the model
        for one in carved:
            one.install(subject, undo)
        if self.layers:
            subject.count_forwards(undo)

    def facts(self, receipt: Receipt) -> list[str]:
        share = sum(one.active_share(self.active) for one in self.layers) / max(1, len(self.layers))
        told = [f"{share:.1%} of the neurons of {len(self.layers)} layers active"]
        loads = [torch.as_tensor(load).double() for load in receipt.per_layer.get("load", {}).values()]
        if loads:
            shares = [load / load.sum().clamp_min(1) for load in loads]
            low, high = min(float(one.min()) for one in shares), max(float(one.max()) for one in shares)
            entropy = sum(float(torch.special.entr(one).sum()) for one in shares) / len(shares)
            told.append(f"an expert was chosen in {low:.1%} to {high:.1%} of choices, entropy {entropy:.2f} nats")
        return told

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        width, layer = subject.anatomy.d_mlp or 48, subject.n_layers // 2
        size = width // 6
        experts = tuple(tuple(range(start, start + size)) for start in range(width - 4 * size, width, size))
        made = Experts(layer, tuple(range(width - 4 * size)), experts, tuple(one[1] for one in experts))
        masked = cls((made,), 2, "mask")
        return (masked, replace(masked, form="slice", active=1)) if _has_module(subject, layer) else (masked,)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls()

    def __str__(self) -> str:
        kinds = sorted({f"{self.active} of {len(one.experts)} experts" for one in self.layers})
        return f"CarveMoE({' or '.join(kinds) or 'nothing'} in {len(self.layers)} layers{', masked' * self.masked})"

    @property
    def masked(self) -> bool:
        return self.form == "mask"


@dataclass(eq=False)
class _Carved:
    """One carved block: its weights by expert, its router, and where the choices are counted.

    places   of the weights that are there, those of each routed expert        shared   of the shared one
    """

    toggle: CarveMoE
    experts: Experts
    subject: Subject
    receipt: Receipt
    weights: FFNWeights
    shared: Int[Tensor, " neuron"]
    places: list[Int[Tensor, " neuron"]]
    gate: Rows | None
    up: Rows
    bias: Tensor | None
    chosen: Int[Tensor, "token active"] | None = None

    @classmethod
    def of(cls, toggle: CarveMoE, subject: Subject, experts: Experts) -> _Carved:
        weights = FFNWeights.of(subject, experts.layer)
        left = set(weights.units.tolist())
        strange = sorted(left - set(experts.units))
        gone = [switch for switch in experts.switches if switch not in left]
        if strange or (gone and toggle.active < len(experts.experts)):
            why = f"neuron {strange[0]} is in no expert" if strange else f"neuron {gone[0]}, a switch, is gone"
            raise ValueError(f"{toggle}: does not fit layer {experts.layer} as it is now: {why}. Carve it as it is.")
        places = [weights.places_of(one) for one in experts.experts]
        switches = torch.searchsorted(weights.units, torch.tensor(experts.switches)).clamp_max(len(left) - 1)
        switches = switches.to(weights.down.device)
        gate = None if weights.gate is None else weights.gate.take(switches).normed
        bias = torch.tensor(experts.bias, device=weights.down.device) if any(experts.bias) else None
        shared = weights.places_of(experts.shared)
        up = weights.up.take(switches).normed
        return cls(toggle, experts, subject, subject.receipt, weights, shared, places, gate, up, bias)

    def install(self, subject: Subject, undo: ExitStack) -> None:
        layer = self.experts.layer
        if self.toggle.form == "mask":
            self._mask(subject, undo)
            return
        if not _has_module(subject, layer):
            raise ValueError(f"CarveMoE: the MLP of layer {layer} is no module of its own. Use form='mask'.")
        module = _module(subject, layer)
        if standing_in(module) is not None:
            raise ValueError(
                f"CarveMoE: another toggle runs instead of the MLP of layer {layer} already. Leave one out."
            )
        stand_in(module, self._sliced(), undo, reason="its block is carved into experts; use form='mask'")

    # Routing

    def choose(self, x: Float[Tensor, "token d_model"]) -> Int[Tensor, "token active"]:
        """The experts of each token, ranked in float32 or better; counted, where the tokens are the forward's."""
        n_routed, active = len(self.experts.experts), self.toggle.active
        if active in (0, n_routed):
            chosen = torch.arange(active, device=x.device).expand(len(x), active)
        else:
            scores = router_scores(None if self.gate is None else self.gate(x), self.up(x), self.weights.act)
            wide = torch.promote_types(x.dtype, torch.float32)
            chosen = selected(scores.to(wide), active, self.bias)
        step = self.subject.step
        counted = chosen
        if step is not None and step.real.numel() == len(x) and step.real.shape[1] > 1:
            counted = chosen[step.real.flatten().to(chosen.device)]  # padding is routed too, and no one's load
        load = torch.bincount(counted.flatten(), minlength=n_routed)
        self.receipt.count_layer("load", self.experts.layer, load)
        return chosen

    # Mask: everything runs

    def _mask(self, subject: Subject, undo: ExitStack) -> None:
        site = Site(self.experts.layer, "neurons")
        block, down = block_of(subject, site.layer), subject.anatomy.module(subject.model, site)
        kept: Kept | None = vars(down).get(KEPT)
        there = None if kept is None or kept.there is None else kept.there
        members = torch.zeros(len(self.places) + 1, subject.anatomy.d_mlp or 0, dtype=torch.bool)
        for number, one in enumerate((*self.experts.experts, self.experts.shared)):
            members[number, list(one)] = True
        members = members.to(self.weights.down.device)

        def heard(width: Tensor | None) -> Tensor:
            """(token, neuron) True at the neurons whose experts run."""
            assert self.chosen is not None
            columns = members if width is None else members[:, width.to(members.device)]
            always = columns[-1].expand(len(self.chosen), -1)
            return always | columns[self.chosen].any(1) if self.chosen.shape[1] else always

        def choosing(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                self.chosen = self.choose(x.reshape(-1, x.shape[-1]))
                return inner(x)

            return forward

        def masking(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: inner(x * heard(there).reshape(x.shape))  # after all edits: none can revive a neuron

        # In the modules, not in hooks: a pass that reads the prompt runs without those.
        entry = block.get_submodule(subject.anatomy.place(Site(site.layer, "up")).path)
        stand_in(entry, choosing, undo)
        stand_in(down, masking, undo)
        add_tap(subject.model, subject.anatomy, site, lambda value: value * heard(None).reshape(value.shape), undo)

    # Slice: only what was chosen runs

    def _sliced(self) -> Callable[[Callable[..., Any]], Callable[[Tensor], Tensor]]:
        rows, downs, bias, act, gated = *self._parts(), self.weights.bias, self.weights.act, self.gate is not None

        def run(x: Tensor, part: int) -> Tensor:
            """(token, d_model) what one expert says."""
            read = rows[part](x)
            if gated:
                gate, up = read.chunk(2, dim=-1)
                return nn.functional.linear(act(gate) * up, downs[part])
            return nn.functional.linear(act(read), downs[part])

        def forward(hidden_states: Tensor) -> Tensor:
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            chosen = self.choose(x)
            y = run(x, -1)
            if len(x) <= ONE_BY_ONE:
                parts = enumerate(chosen.tolist())
                y = torch.stack([y[row] + sum(run(x[row], part) for part in its) for row, its in parts])
            else:
                for part in range(len(self.places)):
                    its = (chosen == part).any(1).nonzero()[:, 0]
                    if len(its):
                        y.index_add_(0, its, run(x[its], part))
            return (y if bias is None else y + bias).reshape(hidden_states.shape)

        return lambda inner: forward

    def _parts(self) -> tuple[list[Rows], list[Tensor]]:
        """What each routed expert, and behind them the shared one, reads (gate above up) and writes, in copies."""
        weights, parts = self.weights, [*self.places, self.shared]
        rows = [weights.up.take(part) for part in parts]
        if weights.gate is not None:
            rows = [weights.gate.take(part).above(up) for part, up in zip(parts, rows, strict=True)]
        return rows, [weights.down[:, part].contiguous() for part in parts]


def _has_module(subject: Subject, layer: int) -> bool:
    """Whether the MLP of a block is one module."""
    neurons = subject.anatomy.places[layer].get("neurons")
    return neurons is not None and "." in neurons.path


def _module(subject: Subject, layer: int) -> nn.Module:
    return block_of(subject, layer).get_submodule(subject.anatomy.place(Site(layer, "neurons")).path.rpartition(".")[0])


def _is_off(subject: Subject, layer: int) -> bool:
    """Whether another toggle leaves out the block, or its MLP."""
    return is_dropped(block_of(subject, layer)) or (_has_module(subject, layer) and is_dropped(_module(subject, layer)))
