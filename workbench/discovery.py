"""Finds the places of a decoder by structure: no table of model families.

One recorded forward of a few tokens; the attention write and the MLP write are the two modules of a block with
resid_in + attn_out + mlp_out == resid_out; a projection is the linear whose output is that write. Source: own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from workbench.anatomy import Anatomy, Place
from workbench.site import KINDS


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """The anatomy of `model`, found in one forward of a few tokens. ValueError names what could not be found."""
    config = model.config.get_text_config()
    blocks = _block_list(model, config.num_hidden_layers)
    records, kv_shape = _record(model, blocks)
    found = [_places(record, config, layer) for layer, record in enumerate(records)]
    n_heads = config.num_attention_heads
    d_heads = {_width(record, places["heads"]) // n_heads for record, (places, _) in zip(records, found, strict=True)}
    d_mlps = {_width(record, p["neurons"]) for record, (p, _) in zip(records, found, strict=True) if "neurons" in p}
    if len(d_mlps) > 1 or len(d_heads) > 1:
        raise ValueError(
            f"anatomy: got blocks of widths {sorted(d_mlps)} and heads {sorted(d_heads)}, expected one each."
        )
    return Anatomy(
        blocks=blocks,
        trunk=blocks.rpartition(".")[0],
        n_layers=len(records),
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_kv_heads=kv_shape[1],
        d_head=d_heads.pop(),
        d_mlp=d_mlps.pop() if d_mlps else None,
        vocab=int(next(model.get_input_embeddings().parameters()).shape[0]),
        places=tuple(places for places, _ in found),
        missing=tuple(missing for _, missing in found),
    )


@dataclass
class _Record:
    """What one block did in the recorded forward: first tensor in and out of each module, in order of completion."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)


def _block_list(model: nn.Module, n_layers: int) -> str:
    """Path of the outermost ModuleList as long as the config says that there are layers."""
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise ValueError(
            f"anatomy: {type(model).__name__} has no ModuleList of {n_layers} blocks (the config's layer count). "
            "Only decoders whose blocks are one list are supported."
        )
    return min(lists, key=lambda name: name.count("."))


def _record(model: PreTrainedModel, blocks: str) -> tuple[list[_Record], tuple[int, ...]]:
    """Run seven tokens, twice, through the model; returns a record per block and the shape of the first cached keys."""
    records = [_Record() for _ in model.get_submodule(blocks)]  # type: ignore[union-attr]
    with ExitStack() as undo, torch.no_grad():
        for record, block in zip(records, model.get_submodule(blocks), strict=True):  # type: ignore[arg-type]
            for path, module in block.named_modules():
                if not isinstance(module, nn.Dropout):
                    handle = module.register_forward_hook(_recorder(record, path), with_kwargs=True)
                    undo.callback(handle.remove)
        embedding = next(model.get_input_embeddings().parameters())  # (vocab, d_model)
        ids = (torch.arange(14).reshape(2, 7) * 7 + 3) % embedding.shape[0]
        output = model(input_ids=ids.to(embedding.device), use_cache=True)
    cache = output.past_key_values
    layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    if not layers:
        raise ValueError(
            f"anatomy: {type(model).__name__} keeps no key/value cache; only attention decoders are supported."
        )
    return records, tuple(layers[0].keys.shape)


def _recorder(record: _Record, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source = args[0] if args else kwargs.get("hidden_states")
        target = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
        if isinstance(source, Tensor) and isinstance(target, Tensor):
            # Copies: Falcon adds the attention's output to the MLP's in place.
            record.inputs[path], record.outputs[path], record.modules[path] = source.clone(), target.clone(), module

    return hook


def _places(record: _Record, config: Any, layer: int) -> tuple[dict[str, Place], dict[str, str]]:
    """The places of one block, and for each kind that it lacks the reason."""
    attention, mlp = _writes(record, layer)
    places = {
        "resid_in": Place("", "in"),
        "resid_out": Place("", "out"),
        "attn_out": Place(attention, "out", flat=record.outputs[attention].dim() == 2),
        "mlp_out": Place(mlp, "out", flat=record.outputs[mlp].dim() == 2),
    }
    heads = _projection_into(record, attention)
    if heads is None:
        raise ValueError(
            f"anatomy: no linear in block {layer} makes attn_out@{layer} ({attention}); heads can't be found."
        )
    places["heads"] = Place(heads, "in", per_head=True)
    neurons = _projection_into(record, mlp)
    if neurons is None:
        reason = "no single down projection makes the MLP's output (a mixture of experts, or a fused kernel)"
        missing: dict[str, str] = dict.fromkeys(("neurons", "gate", "up"), reason)
    else:
        places["neurons"] = Place(neurons, "in", flat=record.inputs[neurons].dim() == 2)
        missing = _add_gate_and_up(record, neurons, config, places)
    return {kind: places[kind] for kind in KINDS if kind in places}, missing


def _writes(record: _Record, layer: int) -> tuple[str, str]:
    """Paths of the modules whose outputs attention and MLP add to the residual stream, proved by conservation."""
    before, after = record.inputs[""].double(), record.outputs[""].double()
    wanted = after - before
    shaped = [path for path, value in record.outputs.items() if path and value.numel() == before.numel()]
    shaped.sort(key=lambda path: path.count("."))  # of equal values take the outermost module
    tolerance = 1e-5 if record.outputs[""].dtype in (torch.float32, torch.float64) else 3e-2  # one rounding of a sum
    best, pair = tolerance, None
    for one, other in itertools.combinations(shaped, 2):
        total = record.outputs[one].double().reshape(-1) + record.outputs[other].double().reshape(-1)
        error = float((total - wanted.reshape(-1)).norm() / wanted.norm().clamp_min(1e-30))
        if error < best * 0.5 or (pair is None and error < best):
            best, pair = error, (one, other)
    if pair is None:
        raise ValueError(
            f"anatomy: no two modules of block {layer} satisfy resid_in@{layer} + attn_out@{layer} + mlp_out@{layer} "
            f"== resid_out@{layer}. This architecture scales or mixes its residual stream; it is not supported."
        )
    order = list(record.outputs)
    attention, mlp = sorted(pair, key=lambda path: ("att" not in path.lower(), order.index(path)))
    return attention, mlp


def _projection_into(record: _Record, write: str) -> str | None:
    """The last linear before `write` whose output is that write, or becomes it through one norm."""
    order = list(record.outputs)
    targets = (record.outputs[write], record.inputs[write])
    for path in reversed(order[: order.index(write) + 1]):
        if is_linear(record.modules[path]):
            value = record.outputs[path]
            if any(value.shape == target.shape and torch.equal(value, target) for target in targets):
                return path
    return None


def _add_gate_and_up(record: _Record, down: str, config: Any, places: dict[str, Place]) -> dict[str, str]:
    """Add gate and up where the neurons are act(gate) * up or act(up); returns the missing kinds with reasons."""
    neurons = record.inputs[down]
    width = neurons.shape[-1]
    sources: list[tuple[Place, Tensor]] = []
    for path, value in record.outputs.items():
        if is_linear(record.modules[path]) and "att" not in path.lower() and path != down:
            if value.shape[-1] == width:
                sources.append((Place(path, "out", flat=value.dim() == 2), value))
            elif value.shape[-1] == 2 * width:  # gate and up fused in one projection
                halves = ((0, width), (width, 2 * width))
                sources += [(Place(path, "out", half), value[..., slice(*half)]) for half in halves]
    act = ACT2FN[_activation_name(config)]
    for (gate, gate_value), (up, up_value) in itertools.permutations(sources, 2):
        if _close(act(gate_value) * up_value, neurons):
            places["gate"], places["up"] = gate, up
            return {}
    for up, value in sources:
        if _close(act(value), neurons):
            places["up"] = up
            return {"gate": "its MLP has no gate, only an up projection"}
    return dict.fromkeys(("gate", "up"), "no projection was found whose activation gives the neurons")


def _activation_name(config: Any) -> str:
    for name in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        if isinstance(getattr(config, name, None), str):
            return getattr(config, name)
    return "gelu"


def _close(one: Tensor, other: Tensor) -> bool:
    error = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)
    return bool(error < (1e-4 if other.dtype in (torch.float32, torch.float64) else 3e-2))  # variants of GELU: 1e-3


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)  # quantised linears of bitsandbytes are subclasses of nn.Linear


def _width(record: _Record, place: Place) -> int:
    return record.inputs[place.path].shape[-1]
