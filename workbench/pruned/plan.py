"""A pruning plan: which heads, key/value groups and neurons of each layer are kept, and which blocks are dropped.

A value in original numbers, so that plans can be compared, edited, saved and moved between the mask and the slice.
Grouped attention: every surviving key/value head keeps as many query heads as every other of its layer. Source: own.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import write_atomically

if TYPE_CHECKING:
    from workbench.subject import Subject

FORMAT = 1
Units = tuple[int, ...] | None  # kept ones, ascending; None: all


@dataclass(frozen=True)
class Shape:
    """The model that a plan is for; `d_mlp` is None where no layer has neurons that can be told apart."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int | None

    @classmethod
    def of(cls, subject: Subject) -> Shape:
        a = subject.anatomy
        return cls(a.n_layers, a.d_model, a.n_heads, a.n_kv_heads, a.d_head, a.d_mlp)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: original numbers, ascending; None keeps all, () switches the family off.

    Of heads and kv_heads one is enough: heads keep their groups, groups keep all of their heads.
    """

    heads: Units = None
    kv_heads: Units = None
    neurons: Units = None

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "neurons"):
            given = getattr(self, name)
            object.__setattr__(self, name, _units(given, name))


@dataclass(frozen=True)
class Plan:
    """What a pruned model keeps. Make one with `Plan.of(subject, {layer: {"neurons": [...]}}, drop=[...])`.

    layers   ((layer, LayerPlan), ...), without layers that keep everything or are dropped
    dropped  blocks that are bypassed
    origin   how it came about: (("criterion", "amp_out"), ("ratio", 0.3), ...)
    Raises ValueError for units that the shape lacks and for uneven groups, with the layer and the counts.
    """

    shape: Shape
    layers: tuple[tuple[int, LayerPlan], ...] = ()
    dropped: tuple[int, ...] = ()
    origin: tuple[tuple[str, Any], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        given = tuple(self.layers.items() if isinstance(self.layers, Mapping) else self.layers)
        _numbers([layer for layer, _ in given], "layers")
        checked = {layer: _checked(layer, plan, self.shape) for layer, plan in given}
        dropped = tuple(sorted(set(_numbers(self.dropped, "dropped blocks"))))
        kept = [(n, plan) for n, plan in sorted(checked.items()) if plan != LayerPlan() and n not in dropped]
        object.__setattr__(self, "layers", tuple(kept))
        object.__setattr__(self, "dropped", dropped)
        object.__setattr__(self, "origin", tuple((str(name), value) for name, value in self.origin))
        for layer in (*checked, *self.dropped):
            if not 0 <= layer < self.shape.n_layers:
                raise ValueError(f"Plan: got layer {layer}, expected 0 to {self.shape.n_layers - 1}.")
        if len(self.dropped) == self.shape.n_layers:
            raise ValueError(f"Plan: all {self.shape.n_layers} blocks are dropped, expected at least one to be kept.")

    @classmethod
    def of(
        cls,
        subject: Subject,
        layers: Mapping[int, LayerPlan | Mapping[str, Iterable[int] | None]] | None = None,
        *,
        drop: Iterable[int] = (),
        origin: Mapping[str, Any] | None = None,
    ) -> Plan:
        """A plan for `subject`; `layers` maps a layer to a LayerPlan or to {"heads": ..., "neurons": ...}."""
        made = {
            layer: plan if isinstance(plan, LayerPlan) else _layer_plan(layer, plan)
            for layer, plan in (layers or {}).items()
        }
        return cls(Shape.of(subject), tuple(made.items()), tuple(drop), tuple((origin or {}).items()))

    def at(self, layer: int) -> LayerPlan:
        """What `layer` keeps."""
        return dict(self.layers).get(layer, LayerPlan())

    def kept(self, layer: int, family: str) -> int:
        """How many heads, kv_heads or neurons `layer` keeps; 0 in a dropped block."""
        if layer in self.dropped:
            return 0
        units = getattr(self.at(layer), family)
        return self.total(family) if units is None else len(units)

    def total(self, family: str) -> int:
        """How many heads, kv_heads or neurons each layer had."""
        return {"heads": self.shape.n_heads, "kv_heads": self.shape.n_kv_heads, "neurons": self.shape.d_mlp or 0}[
            family
        ]

    @property
    def uniform(self) -> bool:
        """Whether all layers that are kept have equal widths, at least one head and one neuron each."""
        left = [layer for layer in range(self.shape.n_layers) if layer not in self.dropped]
        widths = {tuple(self.kept(layer, name) for name in ("heads", "kv_heads", "neurons")) for layer in left}
        return len(widths) == 1 and all(
            min(heads, groups) > 0 and (neurons > 0 or not self.shape.d_mlp) for heads, groups, neurons in widths
        )

    def edit(self, layer: int, **units: Iterable[int] | None) -> Plan:
        """This plan with other units kept in one layer: `plan.edit(3, neurons=[0, 1, 2])`; None keeps all.

        Heads and key/value heads belong together: naming one of them forgets the other.
        """
        known = self.at(layer)
        if {"heads", "kv_heads"} & set(units):
            known = replace(known, heads=None, kv_heads=None)
        plan = replace(known, **{name: _units(ids, name) for name, ids in units.items()})
        return replace(self, layers=tuple((dict(self.layers) | {layer: plan}).items()))

    def __and__(self, other: Plan) -> Plan:
        """What both plans keep."""
        if self.shape != other.shape:
            raise ValueError(f"Plan: can't join plans for {self.shape} and {other.shape}. Make both for one model.")
        every = {layer for layer, _ in (*self.layers, *other.layers)}
        joined = {layer: _both(self.at(layer), other.at(layer)) for layer in every}
        return replace(self, layers=tuple(joined.items()), dropped=self.dropped + other.dropped)

    def for_subject(self, subject: Subject) -> Plan:
        """This plan, if it fits; ValueError names what differs."""
        if self.shape != Shape.of(subject):
            raise ValueError(
                f"Plan: made for {self.shape}, but {subject.name} has {Shape.of(subject)}. "
                "Was it made on another model?"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """As JSON data that people can read; `from_json` gives it back."""
        layers = {
            str(layer): {name: list(units) for name, units in vars(plan).items() if units is not None}
            for layer, plan in self.layers
        }
        origin = dict(self.origin)
        return {
            "format": FORMAT,
            "shape": vars(self.shape),
            "layers": layers,
            "dropped": list(self.dropped),
            "origin": origin,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote; ValueError for anything else."""
        if data.get("format") != FORMAT:
            raise ValueError(f"Plan: got format {data.get('format')!r}, expected {FORMAT}.")
        try:
            shape = Shape(**data["shape"])
            layers = {_layer(text): _layer_plan(_layer(text), units) for text, units in data["layers"].items()}
            return cls(shape, tuple(layers.items()), tuple(data["dropped"]), tuple(data.get("origin", {}).items()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Plan: not a plan's JSON: {error!r}. Expected what Plan.to_json writes.") from error

    def save(self, path: str | Path) -> None:
        """Write this plan as one JSON file."""
        write_atomically(Path(path), json.dumps(self.to_json(), indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a JSON file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Plan: {path} is not JSON: {error}.") from error
        return cls.from_json(data)

    def __str__(self) -> str:
        facts = []
        for name, word in (("kv_heads", "key/value heads"), ("heads", "heads"), ("neurons", "neurons")):
            total = self.shape.n_layers * self.total(name)
            kept = sum(self.kept(layer, name) for layer in range(self.shape.n_layers))
            if total and kept < total and not (name == "kv_heads" and self.shape.group == 1):
                facts.append(f"{kept:,} of {total:,} {word}")
        if self.dropped:
            facts.append(f"without block{'s' * (len(self.dropped) > 1)} {', '.join(map(str, self.dropped))}")
        return "keeps " + (", ".join(facts) or "everything")


def _numbers(given: Iterable[Any], what: str) -> tuple[int, ...]:
    """Units or blocks as they were given, in any kind of whole numbers."""
    try:
        return tuple(operator.index(number) for number in given)
    except TypeError:
        raise ValueError(f"Plan: got {what} {given!r:.60}, expected whole numbers such as (0, 2).") from None


def _layer(text: str) -> int:
    if not (isinstance(text, str) and text.isdecimal()):
        raise ValueError(f"Plan: got layer {text!r}, expected its number.")
    return int(text)


def _layer_plan(layer: int, units: Mapping[str, Iterable[int] | None]) -> LayerPlan:
    unknown = set(units) - {"heads", "kv_heads", "neurons"}
    if unknown:
        raise ValueError(f"Plan: layer {layer}: got {sorted(unknown)[0]!r}, expected heads, kv_heads or neurons.")
    return LayerPlan(**{name: _units(ids, name) for name, ids in units.items()})


def _units(given: Iterable[Any] | None, what: str) -> Units:
    return None if given is None else _numbers(given, what)


def _checked(layer: int, plan: LayerPlan, shape: Shape) -> LayerPlan:
    """The plan of one layer with heads and groups both told, everything kept as None."""
    neurons = _ids(layer, "neurons", plan.neurons, shape.d_mlp or 0)
    heads = _ids(layer, "heads", plan.heads, shape.n_heads)
    groups = _ids(layer, "kv_heads", plan.kv_heads, shape.n_kv_heads)
    if plan.heads is None and groups is not None:
        heads = tuple(head for head in range(shape.n_heads) if head // shape.group in groups)
    if heads is None and groups is not None:
        raise ValueError(
            f"Plan: layer {layer} keeps all {shape.n_heads} heads, but {len(groups)} of {shape.n_kv_heads} "
            "key/value heads that they read. Name the heads that go with them."
        )
    if heads is None:
        return LayerPlan(None, None, neurons)
    counts = {group: sum(head // shape.group == group for head in heads) for group in {h // shape.group for h in heads}}
    if plan.kv_heads is not None and set(plan.kv_heads) != set(counts):
        raise ValueError(
            f"Plan: layer {layer} keeps heads that read key/value heads {sorted(counts)}, but names "
            f"{list(plan.kv_heads)}. "
            "Name one of the two, or make them agree."
        )
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} on {group}" for group, count in sorted(counts.items()))
        raise ValueError(
            f"Plan: layer {layer} keeps {len(heads)} query heads on {len(counts)} key/value heads unevenly ({told}); "
            "grouped attention needs as many on each. Remove the same number per group, or whole groups."
        )
    return LayerPlan(heads, tuple(sorted(counts)), neurons)


def _ids(layer: int, family: str, units: Units, total: int) -> Units:
    if units is None:
        return None
    if units and not total:
        raise ValueError(f"Plan: layer {layer}: this model has no {family} that can be told apart.")
    wrong = [unit for unit in units if not 0 <= unit < total]
    if wrong:
        raise ValueError(f"Plan: layer {layer}: got {family} {wrong[0]}, expected 0 to {total - 1}.")
    kept = tuple(sorted(set(units)))
    return None if len(kept) == total else kept


def _both(one: LayerPlan, other: LayerPlan) -> LayerPlan:
    def common(a: Units, b: Units) -> Units:
        return b if a is None else a if b is None else tuple(sorted(set(a) & set(b)))

    return LayerPlan(common(one.heads, other.heads), None, common(one.neurons, other.neurons))
