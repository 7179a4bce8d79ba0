"""Bitmap files: sparse weights as one bit per number, zero or not, and the numbers that are not zero. Lossless.

bytes = n/8 + b/8 (1 - s) n for n numbers of b bits, s of them zero: smaller where s > 1/b. "Zero" is the bit pattern,
not the value: -0.0 is kept, which is what a product of weights and a mask makes of half of its zeros. One safetensors
file: `<name>.bits` (uint8, lowest bit first, row by row), `<name>.values`, and as it is what would grow; the metadata
tells version, shapes and names.
Source: Endor, 2024 (arXiv 2406.11674); the layout of the file is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from workbench.files import write_atomically

FORMAT, VERSION = "workbench-bitmap", 1
BITS, VALUES = ".bits", ".values"
CHUNK = 1 << 16  # numbers that are expanded at once: a piece that stays in a processor's cache; a multiple of 8
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes: bits without meaning


@dataclass(frozen=True, eq=False)
class Bitmap:
    """A tensor as bits and values.

    bits     (ceil(n / 8),) uint8, lowest bit first, row by row: 1 where the number is not all zero bits
    values   (ones,) those numbers in the same order, of the tensor's dtype
    """

    bits: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, tensor: Tensor) -> Bitmap:
        """The bitmap of a tensor of any dtype of 1, 2, 4 or 8 bytes; on the CPU."""
        numbers = _integers(tensor)
        parts = (numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK))
        values = np.concatenate([numbers[:0], *(part[np.flatnonzero(part)] for part in parts)])
        bits = np.packbits(numbers != 0, bitorder="little")
        return cls(torch.from_numpy(bits), torch.from_numpy(values).view(tensor.dtype), tuple(tensor.shape))

    def unpack(self) -> Tensor:
        """The tensor, to the bit. ValueError where bits and values don't belong together."""
        size, bits = math.prod(self.shape), self.bits.numpy()
        n_ones = int(np.bitwise_count(bits).sum(dtype=np.int64))
        if len(bits) != -(-size // 8) or (size % 8 and bits[-1] >> size % 8):
            raise ValueError(
                f"got {8 * len(bits)} bits for {size} numbers, expected one each and zeros to a whole byte"
            )
        if n_ones != len(self.values):
            raise ValueError(f"got {len(self.values)} values for {n_ones} bits that are set, expected one each")
        numbers = _expanded(bits, _integers(self.values), size)
        return torch.from_numpy(numbers).view(self.values.dtype).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.values.nbytes


def save_bitmap(weights: nn.Module | Mapping[str, Tensor], path: str | Path) -> Path:
    """Write the tensors of a model, as it is under the active toggles, or of a state dict; returns the path.

    What a bitmap would make larger stays as it is; tensors that share their memory are written once. The file is
    written whole or not at all, and is in memory, twice, until then.
    """
    tensors = _tensors(weights)
    same, held, shapes, places = _same(tensors), {}, {}, set()
    for name, tensor in tensors.items():
        if name in same:
            continue
        taken = {f"{name}{BITS}", f"{name}{VALUES}"} & tensors.keys()
        if not taken and pays(tensor):
            made = Bitmap.pack(tensor)
            held |= {f"{name}{BITS}": made.bits, f"{name}{VALUES}": made.values}
            shapes[name] = list(made.shape)
        else:
            alone = _alone(tensor)
            held[name] = alone.clone() if alone.data_ptr() in places else alone  # a tensor and a view of all of it
            places.add(held[name].data_ptr())
    told = {"version": VERSION, "names": list(tensors), "packed": shapes, "same": same}
    path = Path(path)
    write_atomically(path, save(held, {FORMAT: json.dumps(told)}))  # one entry: several come in no fixed order
    return path


def stream_bitmap(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one after the other, in the order in which they were saved: memory holds one at a time.

    Raises FileNotFoundError, and ValueError for a file that is cut short, of another version, or that contradicts
    itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"bitmap: {path} is no file, expected one that save_bitmap wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            told = _told(path, file.metadata() or {})
            for name in told["names"]:
                yield name, _read(file, told["same"].get(name, name), told["packed"])
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as problem:
        raise ValueError(f"bitmap: {path} is damaged ({problem}). Save it again.") from problem


def load_bitmap(path: str | Path) -> dict[str, Tensor]:
    """The tensors by name, as a state dict; errors as in `stream_bitmap`."""
    return dict(stream_bitmap(path))


@torch.no_grad()
def load_into(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors into a model of the same shapes and dtypes, one at a time: its memory and one tensor more.

    Raises ValueError for names, shapes or dtypes that differ, before the first tensor that does; errors else as in
    `stream_bitmap`. Tensors before it are overwritten by then.
    """
    places, seen = model.state_dict(keep_vars=True), set()
    for name, tensor in stream_bitmap(path):
        place = places.get(name)
        if place is None:
            raise ValueError(f"bitmap: {path} holds {name}, which {type(model).__name__} has not. Load it elsewhere.")
        if place.is_meta or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            there = f"{tuple(place.shape)} of {place.dtype} on {place.device}"
            raise ValueError(
                f"bitmap: {name} is {tuple(tensor.shape)} of {tensor.dtype}, the model has {there}. Make the model "
                "with the shapes and the dtype of the file, in memory."
            )
        place.copy_(tensor)
        seen.add(name)
    if places.keys() - seen:
        raise ValueError(f"bitmap: {path} lacks {', '.join(sorted(places.keys() - seen)[:3])} of the model.")


def bitmap_sizes(weights: nn.Module | Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per tensor of what a bitmap file would hold.

    tensor, dtype, numbers, sparsity       sparsity: share of zero bit patterns
    dense_bytes, bitmap_bytes, ratio       formula: 1/b + (1 - s), which knows no padding to whole bytes
    formula, verdict                       bitmap or dense, whichever is smaller; same: written once already
    """
    tensors = _tensors(weights)
    same = _same(tensors)
    rows = []
    for name, tensor in tensors.items():
        n, size = tensor.numel(), tensor.element_size()
        ones = _ones(tensor)
        packed = -(-n // 8) + ones * size
        share = 1 - ones / n if n else 0.0
        verdict = "same" if name in same else "bitmap" if packed < tensor.nbytes else "dense"
        ratio = packed / tensor.nbytes if n else 1.0
        formula = 1 / (8 * size) + 1 - share
        kind = str(tensor.dtype).removeprefix("torch.")
        rows.append((name, kind, n, share, tensor.nbytes, packed, ratio, formula, verdict))
    columns = ["tensor", "dtype", "numbers", "sparsity", "dense_bytes", "bitmap_bytes", "ratio", "formula", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def pays(tensor: Tensor) -> bool:
    """Whether the bitmap of a tensor is smaller than the tensor."""
    return -(-tensor.numel() // 8) + _ones(tensor) * tensor.element_size() < tensor.nbytes


def _expanded(bits: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """The values at the set bits, zeros elsewhere; piece by piece, and without a branch per number."""
    numbers, at = np.zeros(size, values.dtype), 0
    for start in range(0, size, CHUNK):
        piece = np.unpackbits(bits[start // 8 : (start + CHUNK) // 8], bitorder="little").view(bool)
        ones = np.flatnonzero(piece)  # bits beyond the last number are known to be zeros
        numbers[start : start + CHUNK][ones] = values[at : at + len(ones)]
        at += len(ones)
    return numbers


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory that it shares with no other, as safetensors wants it."""
    found = tensor.detach().cpu().contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


def _ones(tensor: Tensor) -> int:
    """How many numbers are not all zero bits."""
    return int(np.count_nonzero(_integers(tensor)))


def _integers(tensor: Tensor) -> np.ndarray:
    """The numbers in a row, as integers of the same bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(AS_INTEGERS[tensor.element_size()]).numpy()


def _tensors(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = weights.state_dict() if isinstance(weights, nn.Module) else dict(weights)
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            what = "on another machine or disk" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"bitmap: {name} is {what}, expected tensors in memory.")
        if tensor.element_size() not in AS_INTEGERS:
            raise ValueError(f"bitmap: {name} is {tensor.dtype}, expected numbers of 1, 2, 4 or 8 bytes.")
    return found


def _same(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> an earlier name of the same tensor in the same memory, as tied embeddings have."""
    first: dict[Any, str] = {}
    found = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(place, name) != name:
                found[name] = first[place]
    return found


def _told(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata tells of the tensors."""
    if FORMAT not in metadata:
        raise ValueError(f"bitmap: {path} is no bitmap file, expected one that save_bitmap wrote.")
    told = json.loads(metadata[FORMAT])
    if told["version"] != VERSION:
        raise ValueError(
            f"bitmap: {path} is of version {told['version']}, this reads version {VERSION}. Update the package."
        )
    return told


def _read(file: Any, name: str, packed: Mapping[str, list[int]]) -> Tensor:
    if name not in packed:
        return file.get_tensor(name)
    found = Bitmap(file.get_tensor(f"{name}{BITS}"), file.get_tensor(f"{name}{VALUES}"), tuple(packed[name]))
    try:
        return found.unpack()
    except ValueError as problem:
        raise ValueError(f"bitmap: {name} contradicts itself: {problem}. Save the file again.") from problem
