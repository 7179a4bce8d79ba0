"""The vectors of an MLP neuron, in any decoder: the rows it reads the residual stream with, the column it writes.

neuron_j = act(g_j . n(h)) (u_j . n(h)); h += sum_j neuron_j d_j; n(h) = w * h / size(h), so u_j * w reads h itself.
Source: own; a neuron's two sides as in Geva et al., 2021, "Transformer Feed-Forward Layers Are Key-Value Memories".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.anatomy import KEPT, Kept, add_tap
from workbench.site import Kind, Site
from workbench.unembedding import norm_weight

if TYPE_CHECKING:
    from workbench.subject import Subject

Side = Literal["read", "gate", "write"]
KIND_OF: dict[str, Kind] = {"read": "up", "gate": "gate", "write": "neurons"}  # the site whose projection holds a side


def neuron_vectors(subject: Subject, layer: int, side: Side) -> Float[Tensor, "d_mlp d_model"]:
    """One vector per neuron of a block, float32: its row of the up or gate projection, or its column of the down one.

    Read when called, so it obeys toggles that swap weights. ValueError in words where a block has no such projection
    (mixture of experts, an MLP without a gate), or where its weights are quantised or elsewhere.
    Neurons that a toggle removed are zeros.
    """
    if side not in KIND_OF:
        raise ValueError(f"neuron_vectors: got side {side!r}, expected one of {', '.join(KIND_OF)}.")
    site = Site(layer, KIND_OF[side])
    place, module = subject.anatomy.place(site), subject.anatomy.module(subject.model, site)
    weight = module.weight.detach()  # type: ignore[union-attr]
    if weight.is_meta or not weight.is_floating_point():
        what = "on another machine or disk" if weight.is_meta else f"packed as {weight.dtype}"
        raise ValueError(
            f"neuron_vectors: the weights of {site} are {what}. Load the model here, without quantisation."
        )
    kept: Kept | None = vars(module).get(KEPT)
    columns = place.columns if kept is None else kept.columns(place.columns)
    by_input = weight.T if isinstance(module, nn.Linear) else weight  # GPT-2's Conv1D is (in, out) already
    by_neuron = by_input.T if side == "write" else by_input[:, slice(*columns) if columns else slice(None)]
    vectors = (by_neuron if kept is None else kept.show(by_neuron)).T  # (d_mlp, d_model)
    return vectors.float()


def write_norm(subject: Subject, layer: int) -> nn.Module | None:
    """The norm between the down projection and the residual stream (Gemma-2, OLMo-2), None where there is none."""
    module = subject.anatomy.module(subject.model, Site(layer, "mlp_out"))
    return module if _is_norm(module, subject.anatomy.d_model) else None


def read_norms(subject: Subject, layers: Sequence[int]) -> list[nn.Module | None]:
    """The norm whose output each block's MLP reads, None where it reads the residual stream itself (OLMo-2).

    Found in one forward without toggles. ValueError where the MLP's input is neither a norm's output nor that stream.
    """
    outputs: list[list[tuple[nn.Module, Tensor]]] = [[] for _ in layers]
    streams: list[list[Tensor]] = [[] for _ in layers]  # resid_in, attn_out
    inputs: dict[int, Tensor] = {}
    model, anatomy = subject.model, subject.anatomy
    ids = torch.arange(1, 9, device=subject.device)[None] % anatomy.vocab
    with subject.untoggled(), ExitStack() as undo, torch.no_grad():
        for found, stream, layer in zip(outputs, streams, layers, strict=True):
            for module in model.get_submodule(f"{anatomy.blocks}.{layer}").modules():
                if _is_vectorwise(module, anatomy.d_model):
                    undo.callback(module.register_forward_hook(partial(_note, found)).remove)
            for kind in ("resid_in", "attn_out"):
                add_tap(model, anatomy, Site(layer, kind), lambda value, to=stream: to.append(value.clone()), undo)
            up = anatomy.module(model, Site(layer, "up"))
            undo.callback(up.register_forward_pre_hook(partial(_note_input, inputs, layer)).remove)
        model(input_ids=ids, use_cache=False)
    every = zip(layers, outputs, streams, strict=True)
    return [_source(layer, inputs[layer], norms, stream, subject.name) for layer, norms, stream in every]


def scale_of(subject: Subject, norm: nn.Module | None) -> Float[Tensor, " d_model"]:
    """What a norm multiplies each coordinate by; ones for None. Measured without toggles: a norm may be their place."""
    ones = torch.ones(subject.anatomy.d_model, device=subject.device)
    if norm is None:
        return ones
    with subject.untoggled():
        return norm_weight(norm, like=ones)


def _is_norm(module: nn.Module, d_model: int) -> bool:
    """Has parameters, and all of them are vectors over the residual stream."""
    return _is_vectorwise(module, d_model) and next(module.parameters(), None) is not None


def _is_vectorwise(module: nn.Module, d_model: int) -> bool:
    """Holds nothing but vectors over the residual stream, as a norm does; OLMo's first norms hold nothing at all."""
    leaf = next(module.children(), None) is None
    return leaf and all(tuple(parameter.shape) == (d_model,) for parameter in module.parameters())


def _note_input(inputs: dict[int, Tensor], layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs[layer] = args[0]


def _note(found: list[tuple[nn.Module, Tensor]], norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    if isinstance(output, Tensor) and not (args and output is args[0]):  # a dropout at rest gives back what it gets
        found.append((norm, output))


def _source(
    layer: int, value: Tensor, norms: list[tuple[nn.Module, Tensor]], stream: list[Tensor], name: str
) -> nn.Module | None:
    """The norm that made `value`. Parallel blocks may have two norms of equal output: the one in the same memory."""
    equal = [
        (norm, out) for norm, out in norms if out.numel() == value.numel() and torch.equal(_flat(out), _flat(value))
    ]
    same = [norm for norm, out in equal if out.data_ptr() == value.data_ptr()]
    if same or equal:
        return (same or [norm for norm, _ in equal])[-1]
    resid_in, attn_out = stream
    for residual in (resid_in, resid_in + attn_out):
        error = (_flat(residual).double() - _flat(value).double()).norm() / _flat(value).double().norm()
        if error < (1e-5 if value.dtype in (torch.float32, torch.float64) else 3e-2):  # one rounding of a sum
            return None
    raise ValueError(
        f"neuron_weights: what the MLP of block {layer} of {name} reads is neither a norm's output nor the residual "
        "stream, so no norm can be folded. Pass fold_norm=False."
    )


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1)
