"""A place in a transformer, as a value.

`Site(12, "neurons")` names a vector per token inside block 12; it prints as `neurons@12`.
Which module holds that vector in a given model is the business of `anatomy.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["resid_in", "attn_out", "mlp_out", "resid_out", "neurons", "heads", "gate", "up"]
KINDS: tuple[str, ...] = get_args(Kind)

# Order in which a forward pass meets the kinds of one block (parallel blocks meet gate and up earlier; no matter).
EXECUTION_ORDER: tuple[str, ...] = ("resid_in", "heads", "attn_out", "gate", "up", "neurons", "mlp_out", "resid_out")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a transformer: one kind of vector per token in one block.

    kind        shape per token         what it is
    resid_in    (d_model,)              residual stream before the block
    heads       (n_heads, d_head)       per-head values, input of the attention's output projection
    attn_out    (d_model,)              what attention adds to the residual stream
    gate, up    (d_mlp,)                outputs of those projections, before the nonlinearity
    neurons     (d_mlp,)                input of the down projection, after the nonlinearity
    mlp_out     (d_model,)              what the MLP adds to the residual stream
    resid_out   (d_model,)              residual stream after the block
    """

    layer: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Site: got kind {self.kind!r}, expected one of {', '.join(KINDS)}.")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"Site: got layer {self.layer!r}, expected an integer from 0 (the first block).")

    def __str__(self) -> str:
        return f"{self.kind}@{self.layer}"

    def __repr__(self) -> str:
        return f"Site({self.layer}, {self.kind!r})"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that prints as `text`, such as `neurons@12`."""
        kind, _, layer = text.partition("@")
        if not layer.isdecimal():
            raise ValueError(f"Site: got {text!r}, expected KIND@LAYER such as neurons@12.")
        return cls(int(layer), kind)  # type: ignore[arg-type]


def sites(layers: Iterable[int], kind: Kind) -> list[Site]:
    """The same kind of place in several blocks."""
    return [Site(layer, kind) for layer in layers]
