"""Where steering directions come from. A direction is a value: a vector with its site and the model it belongs to.

Difference in means: d = mean(values on one group of texts) - mean(values on another), at one site and token.
Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from workbench.files import write_atomically
from workbench.site import Site
from workbench.tokens import Texts
from workbench.values import fingerprint

if TYPE_CHECKING:
    from workbench.capture import Capture
    from workbench.subject import Subject

Masks = Sequence[Sequence[bool]]
FORMAT = "workbench.direction"  # the entry of a file's metadata that makes it one
AT_ONCE = 64  # texts captured before they join a running sum


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """A vector at a site: adding it there pushes the model one way.

    vector    (width,) float32, not normalised unless made so
    site      where it was found and belongs; None for a bare vector
    model     fingerprint of the subject it was found on; it is refused on another. None for a bare vector
    name      what it stands for
    sign      the sign convention in words: what minus what, so that it is known which way a positive push goes
    data      fingerprint of the texts it was found from; "" for a bare vector
    """

    vector: Tensor
    site: Site | None = None
    model: str | None = None
    name: str = ""
    sign: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        try:
            vector = torch.as_tensor(self.vector).detach().float().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"Direction: got {self.vector!r:.60}, expected one vector (width,) of numbers.") from None
        if vector.dim() != 1 or not len(vector):
            raise ValueError(f"Direction: got a tensor of shape {tuple(vector.shape)}, expected one vector (width,).")
        if not torch.isfinite(vector).all():
            raise ValueError("Direction: the vector holds NaN or infinity, expected finite numbers.")
        object.__setattr__(self, "vector", vector.clone())

    @property
    def norm(self) -> float:
        return float(self.vector.norm())

    def unit(self) -> Direction:
        """The same direction with norm 1."""
        if self.norm == 0:
            raise ValueError(f"{self}: the zero vector has no direction.")
        return replace(self, vector=self.vector / self.norm)

    def cosine(self, other: Direction | Tensor) -> float:
        """Cosine of the angle to another direction or vector, from -1 to 1; NaN where one is zero."""
        mine = self.vector.double()
        theirs = (other.vector if isinstance(other, Direction) else other.detach().cpu()).double()
        if mine.shape != theirs.shape:
            raise ValueError(
                f"cosine: {self} has {len(mine)} dims, the other {tuple(theirs.shape)}; expected the same."
            )
        return float(mine @ theirs / (mine.norm() * theirs.norm()))

    def for_subject(self, subject: Subject, site: Site) -> Tensor:
        """The vector, checked to fit `site` of `subject`: same model and width."""
        width = subject.anatomy.width(site)
        expected = width[0] if len(width) == 1 else width[0] * width[1]
        if len(self.vector) != expected:
            raise ValueError(
                f"{self}: direction has {len(self.vector)} dims, {site} of {subject.name} has {expected}. "
                "Was it made on another model?"
            )
        if self.model is not None and self.model != subject.fingerprint:
            raise ValueError(
                f"{self}: was found on model {self.model}, but {subject.name} is {subject.fingerprint}. "
                "Find it again on this model; Direction(vector) without a model is taken anywhere."
            )
        return self.vector.to(subject.device)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as safetensors, with site, model, name, norm, sign and data as metadata; returns the path.

        Raises FileExistsError where a file is there already, unless `overwrite`.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"save: {path} is there already. Pass overwrite=True or choose another name.")
        facts = {
            "name": self.name,
            "site": str(self.site) if self.site else None,
            "model": self.model,
            "sign": self.sign,
            "data": self.data,
            "norm": self.norm,
            "sha256": self.digest,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry: safetensors writes several in no fixed order, and the same direction must give the same bytes.
        write_atomically(path, save({"vector": self.vector}, metadata={FORMAT: json.dumps(facts, sort_keys=True)}))
        return path

    @staticmethod
    def load(path: str | Path) -> Direction:
        """The direction that `save` wrote to `path`. It is still refused on another model than its own."""
        try:
            with safe_open(Path(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(FORMAT, "null"))
                vector = file.get_tensor("vector") if "vector" in file.keys() else None  # noqa: SIM118  # no mapping
        except SafetensorError as error:
            raise ValueError(f"load: {path} is no safetensors file ({error}), expected one that save wrote.") from None
        if vector is None or facts is None:
            raise ValueError(
                f"load: {path} holds no direction with its site and model, expected a file that Direction.save wrote. "
                "A bare vector is made a direction by Direction(vector, site)."
            )
        site = Site.parse(facts["site"]) if facts["site"] else None
        made = Direction(vector, site, facts["model"], facts["name"], facts["sign"], facts["data"])
        if made.digest != facts["sha256"]:
            raise ValueError(f"load: the vector in {path} is not the one that was saved. Was the file changed?")
        return made

    def __add__(self, other: Direction) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        if (self.site, self.model) != (other.site, other.model) or len(self.vector) != len(other.vector):
            raise ValueError(f"Direction: {self} and {other} belong to different places or models; they don't add.")
        words = (
            " + ".join(filter(None, pair))
            for pair in ((self.name, other.name), (self.sign, other.sign), (self.data, other.data))
        )
        return Direction(self.vector + other.vector, self.site, self.model, *words)

    def __mul__(self, factor: float) -> Direction:
        sign = f"{factor:g} ({self.sign})" if self.sign else ""
        return replace(self, vector=self.vector * factor, name=f"{factor:g} {self.name}".strip(), sign=sign)

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return self * -1.0

    def __sub__(self, other: Direction) -> Direction:
        return self + -other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Direction):
            return NotImplemented
        return self._facts() == other._facts() and torch.equal(self.vector, other.vector)

    def __hash__(self) -> int:
        return hash((*self._facts(), self.digest))

    def _facts(self) -> tuple[object, ...]:
        return (self.site, self.model, self.name, self.sign, self.data)

    @property
    def digest(self) -> str:
        """12 hex digits of the vector's bytes."""
        return hashlib.sha256(self.vector.numpy().tobytes()).hexdigest()[:12]

    def __repr__(self) -> str:
        where = f" at {self.site}" if self.site else ""
        return f"Direction({self.name or self.digest}{where}, norm {self.norm:.3g})"


def difference_in_means(
    subject: Subject,
    towards: Texts,
    away: Texts,
    site: Site,
    *,
    tokens: Literal["last", "mean"] | int | tuple[Masks, Masks] = "last",
    name: str = "difference in means",
) -> Direction:
    """Mean value at `site` on the texts `towards` minus that on `away`; every text counts alike.

    tokens   "last"; "mean" over each text's tokens; a position, negative ones from the end (-1 is the last); or a
             pair of boolean masks, (one per text of `towards`, one per text of `away`), averaged over each text
    Sums run in float64 over groups of texts, so memory does not grow with their number.
    """
    rules = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    if len(rules) != 2:
        raise ValueError(f"difference_in_means: got {len(rules)} sets of masks, expected (of towards, of away).")
    groups = zip((towards, away), rules, strict=True)
    first, second = (_mean_value(subject, texts, site, rule) for texts, rule in groups)
    data = fingerprint((tuple(towards), tuple(away)))
    return Direction(first - second, site, subject.fingerprint, name, "mean(towards) - mean(away)", data)


def position_means(
    subject: Subject, texts: Texts, at: Sequence[Site], positions: Sequence[int]
) -> dict[Site, Float[Tensor, "position width"]]:
    """Mean over texts at each position of each text (negative ones from the end), per site, in float64 on the CPU.

    One forward per text for all sites and positions; the sums run, so memory does not grow with the texts.
    """
    sums: dict[Site, Tensor] = {}
    for first, part in _groups(texts):
        values = at_positions(subject, part, at, positions, first=first)
        sums = {site: values[site].sum(0) + sums.get(site, 0.0) for site in at}
    return {site: total / len(texts) for site, total in sums.items()}


def at_positions(
    subject: Subject, texts: Texts, at: Sequence[Site], positions: Sequence[int], *, first: int = 0
) -> dict[Site, Float[Tensor, "text position width"]]:
    """Value of every text at each of the positions (negative ones from the end), in float64 on the CPU.

    first   the number of the first text where these are some of many: by it errors name them
    """
    lengths = subject.tokenize(texts).lengths
    places = torch.tensor([[p if p >= 0 else n + p for p in positions] for n in lengths])  # (text, position)
    outside = ((places < 0) | (places >= torch.tensor(lengths)[:, None])).nonzero()
    if len(outside):
        text, position = outside[0].tolist()
        raise ValueError(
            f"tokens: text {first + text} has {lengths[text]} tokens, so it has no position {positions[position]}. "
            "Positions count from 0, negative ones from the end, special tokens included."
        )
    masks = [
        torch.zeros(n, dtype=torch.bool).index_fill_(0, row, True).tolist()
        for n, row in zip(lengths, places, strict=True)
    ]
    capture = subject.capture(texts, at, tokens=masks, progress=False)
    row = {key: index for index, key in enumerate(zip(capture.text.tolist(), capture.position.tolist(), strict=True))}
    picked = torch.tensor([[row[text, place] for place in line] for text, line in enumerate(places.tolist())])
    return {site: capture[site].double().flatten(1)[picked] for site in at}


def random_direction(like: Direction, seed: int = 0) -> Direction:
    """A direction of the same norm and place with a random orientation: the control for any effect of `like`."""
    noise = torch.randn(len(like.vector), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Direction(noise / noise.norm() * like.norm, like.site, like.model, f"random, seed {seed}")


def _mean_value(
    subject: Subject, texts: Texts, site: Site, tokens: Literal["last", "mean"] | int | Masks
) -> Float[Tensor, " width"]:
    """Mean over texts of each text's value, in float64."""
    if tokens == "last" or isinstance(tokens, int):
        position = tokens if isinstance(tokens, int) else -1
        return position_means(subject, texts, [site], [position])[site][0]
    if isinstance(tokens, str) and tokens != "mean":
        raise ValueError(f"tokens: got {tokens!r}, expected 'last', 'mean', a position, or a pair of sets of masks.")
    if not isinstance(tokens, str) and len(tokens) != len(texts):
        raise ValueError(f"tokens: got {len(tokens)} masks for {len(texts)} texts, expected one each.")
    total = torch.zeros((), dtype=torch.float64)
    for first, part in _groups(texts):
        rule = tokens if isinstance(tokens, str) else tokens[first : first + len(part)]
        capture = subject.capture(part, [site], tokens=rule, progress=False)
        total = total + _per_text(capture, site, len(part), first).sum(0)
    return total / len(texts)


def _per_text(capture: Capture, site: Site, n_texts: int, first: int) -> Float[Tensor, "text width"]:
    """Mean over the captured tokens of each text; a text without any is refused, as it would count for zero."""
    values = capture[site].double().flatten(1)
    count = torch.bincount(capture.text, minlength=n_texts)
    if (count == 0).any():
        raise ValueError(
            f"tokens: the mask of text {first + int(count.argmin())} marks no token, expected at least one."
        )
    return values.new_zeros(n_texts, values.shape[1]).index_add_(0, capture.text, values) / count[:, None]


def _groups(texts: Texts) -> Iterator[tuple[int, Texts]]:
    """The texts, a few at a time, each time with the number of the first."""
    if isinstance(texts, str) or not isinstance(texts, Sized) or not len(texts):
        raise ValueError(f"texts: got {texts!r:.40}, expected a list of at least one text.")
    return ((first, texts[first : first + AT_ONCE]) for first in range(0, len(texts), AT_ONCE))
