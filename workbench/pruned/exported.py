"""A smaller model as a folder: what acts now, written so that it loads again bit-equal.

Where every layer has the same widths the folder is a plain Hugging Face model that any program loads. Where they
differ, stock loaders refuse the sizes; `load_pruned` (and so `Subject.load`) builds each layer as narrow as its
weights. A trap: transformers' ignore_mismatched_sizes would fill such a model with random numbers. Source: own.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from workbench.anatomy import KEPT, Kept
from workbench.files import PARTIAL, write_json
from workbench.pruned.blocks import is_dropped, spoken_biases
from workbench.pruned.cut import cut_layer
from workbench.pruned.plan import LayerPlan, Plan, Shape

if TYPE_CHECKING:
    from workbench.subject import Subject

PLAN_FILE = "pruned.json"  # in the folder of a model that needs `load_pruned`


@dataclass(frozen=True)
class Export:
    """A written model: its folder, the plan that it keeps, bytes of its weights, and whether stock programs load it.

    reason   why they don't, or ""
    """

    folder: Path
    plan: Plan
    weight_bytes: int
    reason: str = ""

    @property
    def stock(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        how = "any Hugging Face program loads it" if self.stock else f"Subject.load reads it ({self.reason})"
        return f"{self.folder}: {self.weight_bytes:,} bytes, {self.plan}; {how}"


def plan_now(subject: Subject) -> Plan:
    """What is left of `subject` as it is now, under its toggles; masked units are left, as their weights are."""
    anatomy = subject.anatomy
    layers: dict[int, LayerPlan] = {}
    for units in subject.units:
        block = subject.model.get_submodule(f"{anatomy.blocks}.{units.layer}")
        found = {"heads": units.heads_out} | ({"neurons": units.down} if units.down else {})
        kept = {name: vars(block.get_submodule(path)).get(KEPT) for name, path in found.items()}
        layers[units.layer] = LayerPlan(**{name: _there(one) for name, one in kept.items()})
    dropped = [layer for layer in layers if is_dropped(subject.model.get_submodule(f"{anatomy.blocks}.{layer}"))]
    return Plan(Shape.of(subject), tuple(layers.items()), tuple(dropped))


def export(subject: Subject, folder: str | Path, *, overwrite: bool = False) -> Export:
    """Write `subject`, as its active toggles make it, as a Hugging Face model folder with its tokenizer.

    Blocks that are dropped are left out and the others numbered anew. Raises ValueError for an active toggle that does
    not lie in weights, such as steering, and FileExistsError for a folder that is not empty.
    """
    target = Path(folder)
    for toggle in subject.active:
        if not toggle.in_weights:
            raise ValueError(f"export: {toggle} does not lie in the model's weights, so no file can hold it. Leave it.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"export: {target} is a file, expected a folder. Choose another name.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"export: {target} exists and is not empty. Choose another folder, or overwrite=True.")
    plan = plan_now(subject)
    tensors = _renumbered(subject, plan)
    config = _config(subject, plan)
    reason = _why_not_stock(config, tensors)
    scratch = target.with_name(f"{PARTIAL}{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        if reason:
            config = _config(subject, replace(plan, layers=()))
            write_json(scratch / PLAN_FILE, _without_dropped(plan).to_json())
        _write(subject, config, tensors, scratch)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}  # a tied unembedding once
    return Export(target, plan, sum(stored.values()), reason)


def load_pruned(
    folder: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "auto", verify: bool = True
) -> Subject:
    """The subject in a folder whose layers differ in width: written by `export`, or by another program.

    Units go on having the numbers that they had in the whole model, so that plans, probes and toggles made on it fit.
    Without the plan's file they are numbered in their order. Raises ValueError where the weights don't fit the config.
    """
    from workbench.loading import load_parts
    from workbench.subject import Subject

    path = Path(folder)
    config, tokenizer, kind, where = load_parts(path, dtype=dtype, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=kind).eval().requires_grad_(False)
    whole = Subject(model, tokenizer, name=str(folder), verify=False)
    tensors = _read(path)
    plan = _plan_of(whole, path, tensors)
    with ExitStack() as undo:
        for layer, kept in plan.layers:
            cut_layer(whole, whole.units[layer], kept, "slice", undo)
        undo.pop_all()  # this model was never wider
    _fill(whole, tensors, path)
    model = model.to(where)
    return Subject(model, tokenizer, name=str(folder), anatomy=whole.anatomy, units=whole.units, verify=verify)


def _there(kept: Kept | None) -> tuple[int, ...] | None:
    return None if kept is None or kept.there is None else tuple(kept.there.tolist())


def _renumbered(subject: Subject, plan: Plan) -> dict[str, Tensor]:
    """The tensors that act, under the names that they have once dropped blocks are gone."""
    start = f"{subject.anatomy.blocks}."
    left = [layer for layer in range(plan.shape.n_layers) if layer not in plan.dropped]
    number = {layer: index for index, layer in enumerate(left)}
    silent, spoken = _silent(subject.model), spoken_biases(subject)
    tensors = {}
    for name, tensor in subject.model.state_dict().items():
        if name not in spoken and any(name.startswith(f"{module}.") for module in silent):
            # Not left out: what is absent stock programs fill with random numbers and go on.
            tensor = tensor[:0].clone()
        if name.startswith(start):
            layer, _, rest = name.removeprefix(start).partition(".")
            if int(layer) in plan.dropped:
                continue
            name = f"{start}{number[int(layer)]}.{rest}"
        tensors[name] = tensor
    return tensors


def _config(subject: Subject, plan: Plan) -> PretrainedConfig:
    """The config of what is left: fewer layers, and the widths where they are one for all."""
    config = copy.deepcopy(subject.model.config)
    text: Any = config.get_text_config()
    left = [layer for layer in range(plan.shape.n_layers) if layer not in plan.dropped]
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in left]
    text.num_hidden_layers = len(left)
    if plan.layers and plan.uniform:
        widths = {name: plan.kept(left[0], name) for name in ("heads", "kv_heads", "neurons")}
        if not isinstance(getattr(type(text), "head_dim", None), property):
            text.head_dim = plan.shape.d_head  # else it would be derived from the number of heads
        text.num_attention_heads = widths["heads"]
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = widths["kv_heads"]
        for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
            if name in text.to_dict() and widths["neurons"]:
                setattr(text, name, widths["neurons"])
    return config


def _why_not_stock(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> str:
    """Why a stock program can't build these tensors from this config; "" where it can: it is tried, without memory."""
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config).state_dict()
    except Exception as error:  # a config that its family does not allow
        return f"its config is refused: {str(error).splitlines()[0][:100]}"
    for name, tensor in built.items():
        if name not in tensors:
            return f"{name} is gone"
        if tensor.shape != tensors[name].shape:
            return f"{name} is {tuple(tensors[name].shape)} and not {tuple(tensor.shape)}"
    return ""


def _without_dropped(plan: Plan) -> Plan:
    """The plan in the numbers of the layers that are left."""
    left = [layer for layer in range(plan.shape.n_layers) if layer not in plan.dropped]
    layers = tuple((left.index(layer), kept) for layer, kept in plan.layers if layer in left)
    return Plan(replace(plan.shape, n_layers=len(left)), layers)


def _write(subject: Subject, config: PretrainedConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    config.architectures = [type(subject.model).__name__]
    config.save_pretrained(folder)
    if subject.model.generation_config is not None:
        subject.model.generation_config.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, folder)


def _read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _plan_of(whole: Subject, folder: Path, tensors: Mapping[str, Tensor]) -> Plan:
    """The plan that the folder tells, or that the sizes of its tensors imply."""
    file = folder / PLAN_FILE
    if file.is_file():
        return Plan.load(file).for_subject(whole)
    shape, layers = Shape.of(whole), {}
    for units in whole.units:
        start = f"{whole.anatomy.blocks}.{units.layer}."
        block = whole.model.get_submodule(start[:-1])
        sizes = {}
        for path in (*units.heads, *units.gate_up, units.heads_out, *([units.down] if units.down else [])):
            if f"{start}{path}.weight" not in tensors:
                raise ValueError(f"load_pruned: {folder} lacks {start}{path}.weight, and has no {PLAN_FILE}.")
            found = tuple(tensors[f"{start}{path}.weight"].shape)
            sizes[path] = found if isinstance(block.get_submodule(path), torch.nn.Linear) else found[::-1]  # (out, in)
        neurons = {"neurons": tuple(range(sizes[units.down][1]))} if units.down else {}
        if units.no_heads:
            layers[units.layer] = LayerPlan(**neurons)
            continue
        n_heads = sizes[units.heads_out][1] // shape.d_head
        n_rows = sum(sizes[path][0] for path in units.heads) // shape.d_head
        n_groups = n_heads if shape.group == 1 else (n_rows - n_heads) // 2
        if n_heads % max(n_groups, 1) or n_heads > shape.n_heads or n_groups > shape.n_kv_heads:
            raise ValueError(f"load_pruned: layer {units.layer} of {folder} has {n_heads} heads on {n_groups} groups.")
        per_group = n_heads // max(n_groups, 1)
        heads = [group * shape.group + head for group in range(n_groups) for head in range(per_group)]
        layers[units.layer] = LayerPlan(heads=tuple(heads), **neurons)
    return Plan(shape, tuple(layers.items()))


def _fill(whole: Subject, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put the tensors in; ValueError where one is missing, left over or of another size."""
    model, spoken = whole.model, spoken_biases(whole)
    for name in _silent(model):  # nothing else runs there: no memory for what nobody reads
        for path, module in model.get_submodule(name).named_modules(prefix=name):
            for key, parameter in [(key, value) for key, value in module._parameters.items() if value is not None]:
                if f"{path}.{key}" not in spoken:
                    module._parameters[key] = torch.nn.Parameter(parameter.detach()[:0].clone(), requires_grad=False)
    expected = model.state_dict()
    for name, tensor in tensors.items():
        if name not in expected or expected[name].shape != tensor.shape:
            wanted = f"expected {tuple(expected[name].shape)}" if name in expected else "which the model has not"
            raise ValueError(f"load_pruned: {folder} has {name} of {tuple(tensor.shape)}, {wanted}.")
    kind = next(model.parameters()).dtype
    cast = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    absent, _ = model.load_state_dict(cast, strict=False)
    model.tie_weights()
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters(remove_duplicate=False)}
    filled = {held[name] for name in tensors if name in held}  # an unembedding may be the embedding's own tensor
    lacking = [name for name in absent if held.get(name) not in filled]
    if lacking:
        raise ValueError(f"load_pruned: {folder} lacks {lacking[0]} ({len(lacking)} tensors in all).")


def _silent(model: torch.nn.Module) -> list[str]:
    """Paths of the modules that are left out and that lie in no other such module."""
    found = [name for name, module in model.named_modules() if name and is_dropped(module)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
