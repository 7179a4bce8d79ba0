"""The projections that make a layer's keys and values, found by structure: what a cache holds, as a function of x.

v = x W + b; k = R(t) (x W + b), or k = R(t) g (x W + b) / |.| where the model normalises its keys. A channel of the
cache belongs to the output of a linear that equals it on every token; no table of model families. Source: own.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from workbench.cache.rotation import Rotation

if TYPE_CHECKING:
    from workbench.subject import Subject
    from workbench.tokens import Texts

Kind = Literal["keys", "values"]
KINDS: tuple[Kind, Kind] = ("keys", "values")
ROWS, SEQ = 4, 6  # of the tokens that are read to find the projections
MATCH_RTOL = {torch.float32: 1e-3, torch.float64: 1e-3}  # measured 1e-6; another channel is wrong by about 1
HALF_RTOL = 3e-2  # of bfloat16 and float16: rotating back rounds twice


@dataclass(frozen=True, eq=False)
class Projection:
    """How one layer makes its keys or its values.

    linear     the module that computes them, perhaps among others        columns   (kv_head, d_head) of its output
    gain       (kv_head, d_head) of the norm that keys go through after it, up to a factor; None without a norm
    rotation   what keys go through last; None where they stay
    """

    linear: Any
    columns: Int[Tensor, "kv_head d_head"]
    gain: Float[Tensor, "kv_head d_head"] | None = None
    rotation: Rotation | None = None

    def weight(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """W in float64 as it is now, times the gain: normalised keys lie in its row space.

        Raises ValueError where the weights are not plain numbers.
        """
        weight: Any = self.linear.weight
        if not weight.is_floating_point():
            raise ValueError(
                f"LowRankKV: the weights of {type(self.linear).__name__} are {weight.dtype}, expected floating point. "
                "Give texts: the bases then come from what is cached."
            )
        rows = weight.detach().T if isinstance(self.linear, Conv1D) else weight.detach()  # (out, in)
        if self.gain is not None and self.linear.bias is not None:  # normalised, a bias is one more direction
            rows = torch.cat([rows, self.linear.bias.detach()[:, None]], 1)
        found = rows[self.columns].double().transpose(1, 2)
        return found if self.gain is None else found * self.gain[:, None].double()

    def bias(self) -> Float[Tensor, "kv_head d_head"]:
        """b, in float64: what every token has, whatever it is; zeros where there is none, or where a norm follows."""
        bias: Any = self.linear.bias
        if bias is None or self.gain is not None:
            return torch.zeros(self.columns.shape, dtype=torch.float64, device=self.columns.device)
        return bias.detach()[self.columns].double()

    def plain(
        self, cached: Float[Tensor, "batch kv_head seq d_head"], positions: Int[Tensor, "batch *kv_head seq"]
    ) -> Float[Tensor, "batch kv_head seq d_head"]:
        """Cached vectors as they were before they were rotated."""
        return cached if self.rotation is None else self.rotation.turn(cached, positions, back=True)


def find_projections(subject: Subject, kinds: tuple[Kind, ...] = KINDS) -> dict[int, dict[Kind, Projection]]:
    """For each layer of full attention, its projections; other layers are left out. One forward of a few tokens.

    Raises ValueError where they can't be found, or where keys are rotated in a way that can't be taken back.
    """
    outputs, cache = _record(subject)
    positions = torch.arange(SEQ, device=subject.device)[None]
    rotations: list[Rotation] = []  # at most one, made when it is first needed
    found: dict[int, dict[Kind, Projection]] = {}
    for layer, (modules, held) in enumerate(zip(outputs, cache.layers, strict=True)):
        if type(held) is not DynamicLayer:
            continue
        found[layer] = {}
        for kind in kinds:
            cached: Tensor = getattr(held, kind)
            made = _found(modules, cached)
            if made is None and kind == "keys":
                rotations = rotations or [_rotation(subject)]
                made = _found(modules, rotations[0].turn(cached, positions, back=True), rotations[0])
            if made is None:
                raise ValueError(
                    f"LowRankKV: no linear in layer {layer} of {subject.name} makes its {kind}, as they are or "
                    f"through one norm. {'Pass keys=False' if kind == 'keys' else 'Choose a model of another family'}."
                )
            found[layer][kind] = made
    if not found:
        raise ValueError(
            f"LowRankKV: {subject.name} has no layer of full attention, expected one. Nothing can be done."
        )
    return found


def _rotation(subject: Subject) -> Rotation:
    try:
        return Rotation.of(subject)
    except ValueError as refusal:
        raise ValueError(f"LowRankKV: keys can't be compressed. {refusal} Or pass keys=False.") from refusal


@torch.no_grad()
def second_moments(
    subject: Subject, found: dict[int, dict[Kind, Projection]], texts: Texts
) -> dict[int, dict[Kind, Float[Tensor, "kv_head d_head d_head"]]]:
    """sum over tokens of (k - b)(k - b)^T before rotation, the same of values; in float64, one text at a time.

    Read without toggles. Raises ValueError for bad texts, as `Subject.tokenize` does.
    """
    sums: dict[int, dict[Kind, Tensor]] = {layer: {} for layer in found}
    options = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in subject.accepts else {})
    with subject.untoggled():
        for ids in subject.tokenize(texts).ids:
            row = torch.tensor([ids], device=subject.device)
            cache: Any = subject.model(input_ids=row, **options).past_key_values
            for layer, kinds in found.items():
                for kind, projection in kinds.items():
                    cached = getattr(cache.layers[layer], kind)
                    positions = torch.arange(len(ids), device=cached.device)[None]
                    vectors = projection.plain(cached, positions)[0].double() - projection.bias()[:, None]
                    sums[layer][kind] = sums[layer].get(kind, 0.0) + vectors.transpose(1, 2) @ vectors
    return sums


@dataclass(eq=False)
class _Module:
    """What one module did on the recorded tokens: (token, channel) in and out."""

    module: nn.Module
    source: Tensor
    output: Tensor


def _record(subject: Subject) -> tuple[list[list[_Module]], Any]:
    """Every module of every block on a few tokens, and the cache that they left; without toggles."""
    blocks: Any = subject.model.get_submodule(subject.anatomy.blocks)
    records: list[list[_Module]] = [[] for _ in blocks]
    ids = (torch.arange(ROWS * SEQ).reshape(ROWS, SEQ) * 7 + 3) % subject.anatomy.vocab
    with subject.untoggled(), torch.no_grad(), ExitStack() as undo:
        for record, block in zip(records, blocks, strict=True):
            for module in block.modules():
                handle = module.register_forward_hook(_recorder(record), with_kwargs=True)
                undo.callback(handle.remove)
        cache = subject.model(input_ids=ids.to(subject.device), use_cache=True).past_key_values
    return records, cache


def _recorder(record: list[_Module]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source = args[0] if args else None
        if isinstance(source, Tensor) and isinstance(output, Tensor):
            one, other = _by_token(source), _by_token(output)
            if one is not None and other is not None:
                record.append(_Module(module, one, other))

    return hook


def _by_token(value: Tensor) -> Tensor | None:
    """(token, channel) of a value whose heads stand before or after its tokens; None for what is not per token."""
    if value.dim() == 4 and value.shape[1] != SEQ and value.shape[2] == SEQ:
        value = value.transpose(1, 2)
    if not value.is_floating_point() or value.numel() % (ROWS * SEQ) or value.shape[0] not in (ROWS, ROWS * SEQ):
        return None
    return value.reshape(ROWS * SEQ, -1)


def _found(modules: list[_Module], cached: Tensor, rotation: Rotation | None = None) -> Projection | None:
    """The projection that makes `cached` (batch, kv_head, seq, d_head), directly or through one norm."""
    shape = (cached.shape[1], cached.shape[3])
    wanted = cached.transpose(1, 2).reshape(ROWS * SEQ, -1)
    linears = [item for item in modules if isinstance(item.module, nn.Linear | Conv1D)]
    for item in linears:
        columns = _columns(item.output, wanted)
        if columns is not None:
            return Projection(item.module, columns.reshape(shape), None, rotation)
    for norm in (item for item in modules if item.source.shape == item.output.shape):
        through = _columns(norm.output, wanted)
        for item in linears if through is not None else ():
            columns = _columns(item.output, norm.source[:, through])
            gain = _gain(norm.source[:, through].unflatten(1, shape), wanted.unflatten(1, shape))
            if columns is not None and gain is not None:
                return Projection(item.module, columns.reshape(shape), gain, rotation)
    return None


def _columns(output: Float[Tensor, "token channel"], wanted: Float[Tensor, "token width"]) -> Tensor | None:
    """(width,) the channel of `output` that equals each channel of `wanted`; None where one has no equal."""
    if output.shape[1] < wanted.shape[1]:
        return None
    distance, columns = torch.cdist(wanted.double().T, output.double().T).min(1)
    size = wanted.double().norm(dim=0)
    close = distance <= _rtol(wanted) * size.clamp_min(1e-6 * float(size.max()))
    return columns if bool(close.all()) else None


def _gain(before: Float[Tensor, "token head width"], after: Float[Tensor, "token head width"]) -> Tensor | None:
    """(head, width) g with after = s g before, s a number per token and head; None where no such g is."""
    ratio = after.double() / before.double()
    gain = (ratio / ratio.norm(dim=-1, keepdim=True)).median(0).values
    scaled = gain * before.double()
    factor = (after.double() * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
    error = (after.double() - factor * scaled).norm() / after.double().norm()
    return gain if float(error) <= _rtol(after) else None  # NaN is not below either


def _rtol(value: Tensor) -> float:
    return MATCH_RTOL.get(value.dtype, HALF_RTOL)
