"""A result: arrays, settings and where they came from. Its table has one row per fact; its plot draws the table.

On disk a result is one folder: `result.json` (settings and provenance), arrays in safetensors, tables in Parquet.
`result.json` is replaced last and atomically, so a kill or a full disk leaves the old result whole. Never pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save

from workbench.files import PARTIAL, write_atomically
from workbench.values import decode, encode

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Provenance:
    """Where a result came from: everything needed to run it again.

    subject     card of the model: name, revision, fingerprint of the weights, dtype, device
    probe       class and settings            toggles     as `Toggle.to_json` writes them, in order of action
    receipts    one per toggle                data        fingerprint and size of the input
    versions    of python and the libraries   seed        of the probe
    started     ISO time, UTC                 seconds     duration
    """

    subject: Mapping[str, Any]
    probe: Mapping[str, Any]
    toggles: tuple[Mapping[str, Any], ...]
    receipts: tuple[Mapping[str, Any], ...]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int | None
    started: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False, kw_only=True)
class Result(ABC):
    """What a probe found. Subclasses are frozen dataclasses; their fields are saved by type:
    numpy arrays in safetensors, pandas tables in Parquet, everything else as JSON."""

    provenance: Provenance | None = field(default=None, repr=False)

    columns: ClassVar[tuple[str, ...]] = ()  # of table(), documented by each subclass
    clocks: ClassVar[tuple[str, ...]] = ()  # fields that hold measured times: the only ones that no seed decides

    @abstractmethod
    def table(self) -> pd.DataFrame:
        """Tidy: one row per fact."""

    @abstractmethod
    def plot(self, **view: Any) -> Figure:
        """A figure whose title states the finding. View arguments have defaults and pick what is shown."""

    def views(self) -> dict[str, list[Any]]:
        """The choices for each view argument of `plot`, first the default. `explore` makes controls of them."""
        return {}

    @property
    def finding(self) -> str:
        """The finding in one sentence: the title of the default plot."""
        layout: Any = self.plot().layout
        return str(layout.title.text or "").replace("<br>", " ")

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write this result to `folder` and return it.

        Raises FileExistsError where a result is there already, unless `overwrite`.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"save: {folder} is a file, expected a folder to write a result to.")
        if (folder / "result.json").exists() and not overwrite:
            raise FileExistsError(
                f"save: {folder} holds a result already. Pass overwrite=True or choose another folder."
            )
        if folder.exists() and any(folder.iterdir()) and not (folder / "result.json").exists() and not overwrite:
            strange = sorted(path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL))
            if strange:
                raise FileExistsError(f"save: {folder} holds {strange[0]!r}, expected an empty or a result folder.")
        folder.mkdir(parents=True, exist_ok=True)
        arrays, tables, settings = self._sorted_fields()
        files: dict[str, str] = {}
        if arrays:
            files["arrays"] = _write_named(folder, "arrays", ".safetensors", save(arrays))
        for name, table in ({"table": self.table()} | tables).items():
            files[name] = _write_named(folder, name, ".parquet", table.to_parquet(index=False))
        record = {
            "class": f"{type(self).__module__}:{type(self).__qualname__}",
            "files": files,
            "fields": settings,
            "provenance": self.provenance.to_json() if self.provenance else None,
        }
        text = json.dumps(record, indent=1, sort_keys=True, default=_refuse)
        write_atomically(folder / "result.json", text.encode())
        keep = set(files.values()) | {"result.json"}
        for path in folder.iterdir():  # data of the result that this one replaced, and remains of killed saves
            if path.name not in keep and path.name.startswith((*(f"{name}-" for name in files), PARTIAL)):
                path.unlink()
        return folder

    @staticmethod
    def load(folder: str | Path) -> Result:
        """The result saved in `folder`, as an instance of the class that made it."""
        folder = Path(folder)
        try:
            record = json.loads((folder / "result.json").read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"load: {folder} has no result.json, expected a folder that save wrote.") from None
        cls = _result_class(record["class"])
        values = {name: decode(data, {}) for name, data in record["fields"].items()}
        files = dict(record["files"])
        if "arrays" in files:
            values |= load_file(folder / files.pop("arrays"))
        files.pop("table")
        values |= {name: pd.read_parquet(folder / file) for name, file in files.items()}
        if record["provenance"]:
            stamp = record["provenance"] | {name: tuple(record["provenance"][name]) for name in ("toggles", "receipts")}
            values["provenance"] = Provenance(**stamp)
        return cls(**values)

    def stamped(self, provenance: Provenance) -> Self:
        """This result with its provenance."""
        return dataclasses.replace(self, provenance=provenance)

    def _sorted_fields(self) -> tuple[dict[str, np.ndarray], dict[str, pd.DataFrame], dict[str, Any]]:
        arrays, tables, settings = {}, {}, {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "provenance" or not item.init:
                continue
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                arrays[item.name] = np.asarray(value, order="C")
            elif isinstance(value, pd.DataFrame):
                tables[item.name] = value
            else:
                settings[item.name] = encode(value)
        return arrays, tables, settings


def _write_named(folder: Path, name: str, suffix: str, data: bytes) -> str:
    """Write data under a name that holds its hash, so that it never overwrites other data; returns the name."""
    file = f"{name}-{hashlib.sha256(data).hexdigest()[:12]}{suffix}"
    if not (folder / file).exists():
        write_atomically(folder / file, data)
    return file


def _result_class(path: str) -> type[Result]:
    import importlib

    module, _, name = path.partition(":")
    if module.startswith("workbench."):
        importlib.import_module(module)
    waiting: list[type] = [Result]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            if f"{cls.__module__}:{cls.__qualname__}" == path:
                return cls
            waiting.append(cls)
    raise ValueError(f"load: the result's class {name!r} of {module!r} is not imported. Import {module} first.")


def _refuse(value: Any) -> Any:
    raise TypeError(f"save: a {type(value).__name__} can't be written as JSON.")
