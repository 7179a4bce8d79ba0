"""What the probes behind NeuronDesk say of one neuron, beside another of its layer: pictures of their results.

Sources: those of the probes.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.hftp.tagged import HFTPResult
from workbench.methods.neurons.labels import NeuronTokensResult
from workbench.methods.relations.relational import RelationNeuronsResult
from workbench.widgets.picture import Fact, Picture

Place = tuple[int, int]  # layer, neuron


def spectrum(found: HFTPResult, call: str, place: Place, chance: int) -> Picture:
    """The spectrum at the rate that the neuron follows best, and both neurons at every rate.

    call   makes the result       place   (layer, neuron)       chance   the other neuron
    """
    layer, neuron = place
    own, other = (found.table().query("neuron == @one").set_index("level") for one in (neuron, chance))
    facts = []
    for level in found.levels:
        row = own.loc[level]
        facts += [
            Fact(f"{level} rate, beyond shuffled", row["effect"], "activation units", row["low"], row["high"]),
            Fact(f"{level} rate, neuron {chance} at random", other.loc[level, "effect"], "activation units"),
            Fact(f"{level} rate, p", row["p"]),
        ]
    level = str(own["p"].idxmin())
    code = f"result = {call}\nresult.plot('spectrum', {level!r}, ({layer}, {neuron}))"
    return Picture(found.plot("spectrum", level, place), facts=tuple(facts), code=code)


def relations(found: RelationNeuronsResult, call: str, place: Place, chance: int) -> Picture:
    """Average precision of both neurons for each relation, with the line below which 95 % of random orders stay."""
    layer, neuron = place
    line = np.quantile(found.null, 0.95, axis=1)  # (relation,)
    own, other = (found.ap[0, 0, one] for one in (neuron, chance))
    names = {f"Neuron {layer}.{neuron}": own, f"Neuron {layer}.{chance}, at random": other}
    tables = [pd.DataFrame({"relation": found.relations, "ap": ap, "unit": name}) for name, ap in names.items()]
    best, above = int(own.argmax()), [int((ap > line).sum()) for ap in (own, other)]
    title = (
        f"Neuron {layer}.{neuron} picks out “{found.relations[best]}” best, average precision {own[best]:.2f}; "
        f"it passes chance on {above[0]} of {len(line)} relations, a random neuron on {above[1]}"
    )
    figure = plots.bars(
        pd.concat(tables), "relation", "ap", color="unit", title=title, x_title="",
        y_title="average precision, better of both ends",
    )  # fmt: skip
    for at, level in enumerate(line):
        mark = {"color": plots.BLACK, "width": 2, "dash": "dot"}
        figure.add_shape(type="line", x0=at - 0.45, x1=at + 0.45, y0=level, y1=level, line=mark)
    figure.update_yaxes(range=[0.0, 1.2 * max(own.max(), other.max(), line.max())])
    figure.add_annotation(
        text="dotted: 95 % of random orders stay below", x=1.0, y=1.0, xref="paper", yref="paper", showarrow=False
    )
    facts = (
        Fact("best average precision", float(own[best])),
        Fact("best average precision, random neuron", float(other.max())),
        Fact("relations above chance", above[0], f"of {len(line)}"),
        Fact("relations above chance, random neuron", above[1], f"of {len(line)}"),
        Fact(f"q for {found.relations[best]}", float(found.q[0, 0, neuron, best])),
    )
    words = "All prompts are ranked, answered or not: a neuron may follow the wording rather than the fact."
    return Picture(figure, facts=facts, words=words, code=f"{call}.ap[0, 0, {neuron}]")


def read_out(found: NeuronTokensResult, call: str, place: Place, chance: int) -> Picture:
    """The words that the neuron's weights point at, and how far both neurons pass the line of random vectors."""
    strength = found.strength()[0].max(axis=2)  # (neuron, side)
    facts = tuple(
        Fact(f"what it {side}s, {name}", float(strength[index, k]), "times the line of random vectors")
        for k, side in enumerate(found.sides)
        for name, index in (("this neuron", place[1]), ("random neuron", chance))
    )
    return Picture(found.plot("neuron", place), facts=facts, code=f"{call}.plot('neuron', {place})")


def spelt(probe: Any) -> str:
    """The call that makes a probe, with the settings that are not as it comes."""
    moved = [
        f"{one.name}={getattr(probe, one.name)!r}" for one in fields(probe) if getattr(probe, one.name) != one.default
    ]
    return f"{type(probe).__name__}({', '.join(moved)})"
