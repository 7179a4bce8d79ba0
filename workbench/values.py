"""Values to JSON and back: what makes settings printable, comparable and saved with every result.

A value is a frozen dataclass whose fields are scalars, strings, tuples, mappings, arrays or other values.
Arrays travel as base64 of their bytes, beside dtype and shape, so that a round trip is exact to the bit.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


def encode(value: Any) -> Any:
    """`value` as JSON data: dataclasses become {"class": name, field: ...}, arrays base64."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):  # JSON has no infinity and no NaN
        return value if np.isfinite(value) else {"float": repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return {"class": type(value).__qualname__} | {name: encode(getattr(value, name)) for name in names}
    if isinstance(value, torch.Tensor):
        return {"tensor": _pack(value), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:  # its bytes are addresses
            raise TypeError("encode: got an array of objects, expected numbers or text of a fixed width. Give a tuple.")
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return encode(value.item())
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, frozenset | set):
        return {"set": sorted((encode(item) for item in value), key=str)}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    raise TypeError(f"encode: got a {type(value).__name__}, expected a scalar, tuple, dict, array or frozen dataclass.")


def decode(data: Any, classes: dict[str, type]) -> Any:
    """The value that `encode` gave `data` for; `classes` maps names to the dataclasses allowed to come back.

    Lists come back as tuples, as frozen values hold them.
    """
    if isinstance(data, list):
        return tuple(decode(item, classes) for item in data)
    if not isinstance(data, dict):
        return data
    if "class" in data:
        cls = classes.get(data["class"])
        if cls is None:
            raise ValueError(f"decode: got class {data['class']!r}, expected one of {', '.join(sorted(classes))}.")
        return cls(**{name: decode(item, classes) for name, item in data.items() if name != "class"})
    if "tensor" in data:
        flat = np.frombuffer(bytearray(base64.b64decode(data["tensor"])), np.uint8)  # unlike torch's, it takes nothing
        return torch.from_numpy(flat).view(getattr(torch, data["dtype"])).reshape(data["shape"])
    if "array" in data:
        return np.frombuffer(base64.b64decode(data["array"]), dtype=data["dtype"]).reshape(data["shape"])
    if "dict" in data:
        return {decode(key, classes): decode(item, classes) for key, item in data["dict"]}
    if "set" in data:
        return frozenset(decode(item, classes) for item in data["set"])
    if "float" in data:
        return float(data["float"])
    raise ValueError(f"decode: got an object with {sorted(data)}, expected one written by encode.")


def fingerprint(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(encode(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _pack(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()
