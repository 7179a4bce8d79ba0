"""Rotary positions of a decoder: turning a key to another position, or back to none; found by structure and proved.

k_m = R(m) k_0 with R(m) a rotation by m f_i in each plane i, times a fixed factor where the model scales (YaRN).
Source: Su et al., 2021, RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from workbench.subject import Subject

PROOF_RTOL = 1e-3  # float32, measured 1e-6; an unrotated key is wrong by 1
HALF_RTOL = 3e-2  # bfloat16, measured 4e-3: cosines, sines and keys are rounded


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a subject rotates its keys and queries. Make one with `Rotation.of(subject)`.

    module        gives cosines and sines for positions        interleaved   planes are (0, 1), (2, 3), ...
    """

    module: nn.Module
    interleaved: bool

    @classmethod
    def of(cls, subject: Subject) -> Rotation:
        """Find and prove it: one token, said again and again, has one first-layer key once rotations are taken back.

        Raises ValueError for models without rotary positions, or with more than one kind of them.
        """
        trunk = subject.model.get_submodule(subject.anatomy.trunk)
        found = [
            child
            for child in trunk.children()
            for name, _ in child.named_buffers()
            if name.endswith("inv_freq") and "original" not in name
        ]
        if len(found) != 1 or "layer_type" in inspect.signature(type(found[0]).forward).parameters:
            raise ValueError(
                f"Rotation: {subject.name} has {'no rotary positions' if not found else 'several kinds of them'}, "
                "expected one rotation for all layers. This setting needs a model with rotary positions."
            )
        module = found[0]
        if getattr(module, "rope_type", "default") in ("dynamic", "longrope"):
            raise ValueError(
                f"Rotation: {subject.name} changes its frequencies with the length of the text, so no key can be "
                "turned to another position afterwards."
            )
        keys = _keys_of_one_token(subject)
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
        rtol = PROOF_RTOL if subject.dtype in (torch.float32, torch.float64) else HALF_RTOL
        for interleaved in (False, True):
            made = cls(module, interleaved)
            plain = made.turn(keys, positions, back=True)
            if float((plain - plain[:, :, :1]).abs().max()) <= rtol * float(keys.abs().max()):
                return made
        raise ValueError(f"Rotation: taking back the rotations of {subject.name} does not give one key for one token.")

    @classmethod
    def if_any(cls, subject: Subject) -> Rotation | None:
        """The same, but None for a model whose decoder has no rotary positions at all."""
        trunk = subject.model.get_submodule(subject.anatomy.trunk)
        return cls.of(subject) if any(name.endswith("inv_freq") for name, _ in trunk.named_buffers()) else None

    @torch.no_grad()
    def turn(
        self,
        x: Float[Tensor, "batch head seq d_head"],
        positions: Int[Tensor, "batch *kv_head seq"],
        *,
        back: bool = False,
    ) -> Float[Tensor, "batch head seq d_head"]:
        """`x` turned by its positions, or turned back to position 0; channels beyond the rotary ones stay.

        Scaled models multiply by a factor when turning, and `back` divides by it: the two are inverse.
        """
        cos, sin = self._waves(x, positions)
        if back:
            scale = cos.square() + sin.square()
            cos, sin = cos / scale, -sin / scale
        return self._turned(x, cos, sin)

    def move(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Keys at positions `old` as they would be at `new`, rounded once; a scale factor is not applied again."""
        return self.turn(self.turn(x.float(), old, back=True), new).to(x.dtype)

    @torch.no_grad()
    def mean_back(
        self, x: Float[Tensor, "batch head seq d_head"], positions: Int[Tensor, "batch place"]
    ) -> Float[Tensor, "batch head seq d_head"]:
        """M^T `x`, M the mean of the rotations to these places: q_0 . M^T k is the mean of (R q_0) . k over them."""
        cos, sin = (wave.mean(2, keepdim=True) for wave in self._waves(x, positions))
        return self._turned(x, cos, -sin)

    def _waves(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (batch, head or 1, seq, rotary), times the factor of scaled models."""
        heads = positions.shape[1] if positions.dim() == 3 else 1
        flat = positions.reshape(-1, positions.shape[-1]).to(x.device)
        cos, sin = (t.float() for t in self.module(x[:1, :1, :1].float(), flat))
        return cos.reshape(-1, heads, *cos.shape[1:]), sin.reshape(-1, heads, *sin.shape[1:])

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = cos.shape[-1]
        part = x[..., :width].float()
        turned = part * cos + self._half(part) * sin
        return torch.cat([turned.to(x.dtype), x[..., width:]], -1)

    def _half(self, x: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)


def _keys_of_one_token(subject: Subject, times: int = 8) -> Tensor:
    """The first layer's keys (1, kv_head, times, d_head) of one token said again and again, without toggles."""
    token = subject.anatomy.vocab // 2
    with subject.untoggled(), torch.no_grad():
        ids = torch.full((1, times), token, device=subject.device)
        cache = subject.model(input_ids=ids, use_cache=True).past_key_values
    return cache.layers[0].keys.float()
