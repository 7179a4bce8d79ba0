"""Trained tensors as a value: what a toggle holds that was fitted and can't be computed again in a moment.

Two are equal if they hold the same names and bits, wherever they lie. In memory they travel inside a toggle's JSON;
once saved, a path and a digest travel instead, and a file that has changed since is refused. Source: own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from workbench.files import write_atomically


@dataclass(frozen=True, eq=False, repr=False)
class Weights(Mapping[str, Tensor]):
    """Tensors by name, on the CPU: `Weights({"layers.0.mlp": tensor})`, or `Weights.load(path)`.

    given    the tensors, where they are in memory
    path     the file they lie in, otherwise, with the `digest` that they must have
    """

    given: Mapping[str, Tensor] | None = None
    path: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if (self.given is None) == (not self.path):
            raise ValueError("Weights: expected tensors or the path of a file. Use Weights(tensors) or Weights.load.")
        if self.given is not None:
            if not isinstance(self.given, Mapping):
                raise ValueError(
                    f"Weights: got {self.given!r:.60}, expected {{name: tensor}}. Weights.load reads a file."
                )
            for name, tensor in self.given.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"Weights: {name} is {tensor!r:.40}, expected a tensor.")
            held = {str(name): tensor.detach().cpu().clone() for name, tensor in sorted(self.given.items())}
            object.__setattr__(self, "given", held)
            object.__setattr__(self, "digest", _digest(held))

    @functools.cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors; read from the file at the first use. ValueError where it holds something else by now."""
        if self.given is not None:
            return self.given
        try:
            found = load(Path(self.path).read_bytes())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"Weights: {self.path} can't be read as safetensors: {error}.") from error
        if self.digest and _digest(found) != self.digest:
            raise ValueError(f"Weights: {self.path} holds other tensors than those that were saved. Fit them again.")
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, path: str | Path) -> Weights:
        """Write one safetensors file; returns weights that know its path instead of holding them."""
        write_atomically(Path(path), save({name: tensor.contiguous() for name, tensor in self.tensors.items()}))
        return Weights(path=str(path), digest=self.digest)

    @classmethod
    def load(cls, path: str | Path) -> Weights:
        """The weights in a safetensors file."""
        return cls(path=str(path), digest=_digest(cls(path=str(path)).tensors))

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Weights) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        return f"Weights({len(self)} tensors, {self.nbytes:,} bytes{where}, {self.digest[:8]})"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of names, dtypes, shapes and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
