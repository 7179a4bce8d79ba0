"""A toggle: a reversible change of a model, as a value that is not bound to any model.

`with subject.under(a | b):` installs a, then b, and undoes them in reverse, also after an exception.
Each change registers its own undo on the next line; a Receipt tells whether the toggle really acted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from workbench.settings import Settings
from workbench.values import decode, encode

if TYPE_CHECKING:
    from workbench.subject import Subject


SUMS = ("rows", "prompts", "prompts_acted", "tokens", "moved", "before")  # what a receipt adds up


class Toggle(Settings, ABC):
    """A reversible change of a model. Subclasses are frozen dataclasses of settings.

    claims   exclusive resources ("kv.select", "kv.store", "ffn.width", ...); two toggles that share a claim
             can't be active together.
    values   dataclasses that its fields may hold, besides Site, Direction and other toggles
    precedes claims of toggles that are made for layers as they stand: this one changes layers, so it must act before
    in_weights   whether all that it does lies in the model's weights, so that a file can hold it
    """

    claims: ClassVar[frozenset[str]] = frozenset()
    values: ClassVar[tuple[type, ...]] = ()
    precedes: ClassVar[frozenset[str]] = frozenset()
    in_weights: ClassVar[bool] = False

    @abstractmethod
    def install(self, subject: Subject, undo: ExitStack) -> None:
        """Change `subject`; register on `undo` how to take back each change, on the line after it."""

    @classmethod
    @abstractmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        """Settings that change what `subject` predicts: for contract tests and a first look."""

    @classmethod
    @abstractmethod
    def neutral(cls, subject: Subject) -> Toggle:
        """The setting that changes nothing: under it the logits are bit-equal."""

    @property
    def parts(self) -> tuple[Toggle, ...]:
        """The toggles that this one is composed of, in the order in which they act."""
        return (self,)

    def facts(self, receipt: Receipt) -> list[str]:
        """What the sums per layer of its receipt mean, in words; for toggles that fill them in."""
        return []

    def __or__(self, other: Toggle) -> Toggle:
        if not isinstance(other, Toggle):
            return NotImplemented
        return Composed(self.parts + other.parts)

    def to_json(self) -> dict[str, Any]:
        """This toggle as JSON data, arrays included; `Toggle.from_json` gives it back."""
        return encode(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Toggle:
        """The toggle that `to_json` wrote. Its class must be imported."""
        value = decode(data, _known_values())
        if not isinstance(value, Toggle):
            raise ValueError(f"Toggle.from_json: got a {type(value).__name__}, expected a toggle.")
        return value


@dataclass(frozen=True)
class Composed(Toggle):
    """Several toggles, the first acts first. Made by `a | b`."""

    members: tuple[Toggle, ...] = ()

    @property
    def parts(self) -> tuple[Toggle, ...]:
        return self.members

    def install(self, subject: Subject, undo: ExitStack) -> None:
        raise AssertionError("Subject.under installs the parts one by one.")

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return ()  # its parts have their own

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls()

    def __str__(self) -> str:
        return " | ".join(str(part) for part in self.members) or "nothing"


@dataclass(eq=False)
class Receipt:
    """Did the toggle apply? One per active toggle, filled in while its block runs.

    fired            how many times the toggle acted (a hook call, a cache update, a swapped parameter)
    tokens           real tokens acted upon, summed over sites; padding is not counted
    rows             texts acted upon: each counts once, for its prompt and all that is generated after it, at all sites
    relative_moved   root of sum |after - before|^2 / sum |before|^2 over everything that was edited
    bytes_freed      memory given back, for toggles that free some
    prompts          prompts that a toggle read to decide about them, for toggles that do
    prompts_acted    those among them that it acts on
    notes            facts in words, such as "2 sliding-window layers left alone"
    per_layer        name -> layer -> a sum, or one for each part of the layer, for toggles that tell layers apart
    """

    toggle: Toggle
    fired: int = 0
    bytes_freed: int = 0
    notes: list[str] = field(default_factory=list)
    # Sums stay on the model's device: reading them at every edit would make every forward wait for the GPU.
    sums: dict[str, torch.Tensor | float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0))
    per_layer: dict[str, dict[int, torch.Tensor | float]] = field(default_factory=dict)
    _lengths: torch.Tensor | None = field(default=None, repr=False)
    _seen: torch.Tensor | None = field(default=None, repr=False)

    def count_prompts(self, acted: torch.Tensor) -> None:
        """Record a decision about each prompt of a batch: `acted` (batch,) is True where the toggle acts."""
        self.sums["prompts"] = self.sums["prompts"] + len(acted)
        self.sums["prompts_acted"] = self.sums["prompts_acted"] + acted.sum()

    def count_edit(
        self, before: torch.Tensor, after: torch.Tensor, acted: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> None:
        """Record one edit: values (batch, seq, ...) before and after, and `acted` (batch, seq) where it applied.

        lengths   (batch,) of the rows' prompts: one tensor for all forwards of the same texts
        """
        self.fired += 1
        self._count_rows(acted.any(1), lengths)
        there = acted.reshape(acted.shape + (1,) * (before.dim() - 2))  # what is not may be NaN: no weight of 0 will do
        self.sums["tokens"] = self.sums["tokens"] + acted.sum()
        self.sums["moved"] = self.sums["moved"] + (after - before).float().where(there, 0.0).square().sum()
        self.sums["before"] = self.sums["before"] + before.float().where(there, 0.0).square().sum()

    def count_forward(self, real: torch.Tensor, lengths: torch.Tensor) -> None:
        """Record a forward through changed weights: they act on every real token (batch, seq)."""
        self.fired += 1
        self._count_rows(real.any(1), lengths)
        self.sums["tokens"] = self.sums["tokens"] + real.sum()

    def count_layer(self, name: str, layer: int, counts: torch.Tensor | float) -> None:
        """Add to a sum of one layer, or to one for each of its parts: `counts` () or (part,)."""
        of_name = self.per_layer.setdefault(name, {})
        of_name[layer] = of_name.get(layer, 0) + counts

    def _count_rows(self, acted: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Count rows at the first edit that acts on them: other sites and decoding steps bring the same rows again.

        Texts are told apart by the memory of their lengths; kept here, it can't be given to other lengths meanwhile.
        """
        same = lengths is not None and self._lengths is not None and lengths.data_ptr() == self._lengths.data_ptr()
        if not same or self._seen is None or self._seen.shape != acted.shape:
            self._lengths, self._seen = lengths, torch.zeros_like(acted)
        self.sums["rows"] = self.sums["rows"] + (acted & ~self._seen).sum()
        self._seen = self._seen | acted

    @property
    def rows(self) -> int:
        return int(self.sums["rows"])

    @property
    def prompts(self) -> int:
        return int(self.sums["prompts"])

    @property
    def prompts_acted(self) -> int:
        return int(self.sums["prompts_acted"])

    @property
    def tokens(self) -> int:
        return int(self.sums["tokens"])

    @property
    def relative_moved(self) -> float:
        before = float(self.sums["before"])
        return math.sqrt(float(self.sums["moved"]) / before) if before > 0 else 0.0

    def __str__(self) -> str:
        facts = [f"fired {self.fired} times"]
        if self.tokens:
            facts.append(f"on {self.tokens} tokens" + (f" of {self.rows} texts" if self.rows else ""))
        if self.prompts:
            facts.append(f"acted on {self.prompts_acted} of {self.prompts} prompts")
        if self.relative_moved:
            facts.append(f"moved activations by {self.relative_moved:.1%}")
        if self.bytes_freed:
            facts.append(f"freed {self.bytes_freed:,} bytes")
        return f"{self.toggle}: " + ", ".join(facts + self.notes + self.toggle.facts(self))

    def to_json(self) -> dict[str, Any]:
        """The numbers of this receipt as JSON data, without the toggle."""
        return {
            "fired": self.fired,
            "tokens": self.tokens,
            "rows": self.rows,
            "prompts": self.prompts,
            "prompts_acted": self.prompts_acted,
            "relative_moved": self.relative_moved,
            "bytes_freed": self.bytes_freed,
            "notes": self.notes + self.toggle.facts(self),
            "per_layer": {
                name: {str(layer): torch.as_tensor(counts).tolist() for layer, counts in layers.items()}
                for name, layers in self.per_layer.items()
            },
        }


def conflicting_claims(active: tuple[Toggle, ...], new: Toggle) -> list[tuple[Toggle, str]]:
    """Which active toggles hold a claim that `new` needs, with the claim."""
    return [(toggle, claim) for toggle in active for claim in sorted(toggle.claims & new.claims)]


def _known_values() -> dict[str, type]:
    """Every imported dataclass that a toggle may be made of, by name."""
    from workbench.directions import Direction
    from workbench.site import Site

    found: dict[str, type] = {"Site": Site, "Direction": Direction}
    waiting: list[type] = [Toggle]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            found[cls.__qualname__] = cls
            found |= {value.__qualname__: value for value in cls.values}
            waiting.append(cls)
    return found
