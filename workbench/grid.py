"""The grid of a sweep: values per parameter, in all combinations, checked as a whole before anything runs.

    -p seed=0..9 -p model=a,b -p keep=0.25,0.5,1.0        60 runs
    --grid FILE.yaml: a mapping (one product), or a list of mappings (each a product; the runs are their union)

Ranges hold both ends, as `{0..9}` in bash does; a list of mappings means what scikit-learn's ParameterGrid means.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.parameters import Parameter, merged

Axes = Mapping[str, Sequence[Any]]  # the values of each parameter of one product

MOST_RUNS = 100_000  # more is a slip of the keyboard
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


@dataclass(frozen=True)
class Combinations:
    """The runs that a grid asks for: what each is given, in the declared types, and how many were named twice."""

    given: tuple[dict[str, Any], ...]
    n_folded: int


def combinations(grid: Sequence[Axes], parameters: Mapping[str, Parameter]) -> Combinations:
    """Every combination of every product of `grid`, once, in its order; later names change fastest.

    Raises ValueError with every wrong name and value of the whole grid, one per line.
    """
    _refuse_wrong(grid, parameters)
    if (asked := size(grid)) > MOST_RUNS:
        raise ValueError(f"sweep: got a grid of {asked} runs, expected up to {MOST_RUNS}. Sweep over parts of it.")
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for axes in grid:
        for values in itertools.product(*axes.values()):
            given = {name: parameters[name].convert(value) for name, value in zip(axes, values, strict=True)}
            identity = tuple(map(repr, merged(parameters, given).values()))  # a default spelled out is the same run
            found.setdefault(identity, given)
    return Combinations(tuple(found.values()), asked - len(found))


def size(grid: Sequence[Axes]) -> int:
    """How many combinations a grid names, those that it names twice included."""
    return sum(math.prod(len(values) for values in axes.values()) for axes in grid)


def axes_of(words: Iterable[str]) -> dict[str, Sequence[Any]]:
    """The axes that `-p NAME=VALUES` words spell. Raises ValueError for other words and for a name given twice."""
    axes: dict[str, Sequence[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"-p: got {word!r}, expected NAME=VALUES, such as seed=0..9 or model=a,b.")
        if name in axes:
            raise ValueError(f"-p: {name} is given twice, expected once; commas part its values: {name}=a,b.")
        axes[name] = values_of(text)
    return axes


def values_of(text: str) -> Sequence[str]:
    """The values that a text spells: parted by commas, whole-number ranges FIRST..LAST or FIRST..LAST..STEP spread.

    An item in single or double quotes is taken as it stands; a backslash before a comma, a quote or a backslash
    makes it an ordinary character. Raises ValueError for a quote that never ends and for an item of nothing.
    """
    if not text:
        return [""]  # `-p name=` is the empty text, as for one run
    spelled = [[item] if plain else _spread(item) for item, plain in _items(text)]
    return spelled[0] if len(spelled) == 1 else [value for values in spelled for value in values]


def quoted(value: str) -> str:
    """The text that `values_of` reads as this one value."""
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def grid_of(data: Any, source: str = "grid") -> list[dict[str, Sequence[Any]]]:
    """The grid in plain data: a mapping of names to a value or values, or a list of such mappings.

    Text that is a range is spread; other text is one value, commas and all. Raises ValueError for anything else.
    """
    blocks = [data] if isinstance(data, Mapping) else data
    if not isinstance(blocks, list | tuple) or not all(isinstance(block, Mapping) for block in blocks) or not blocks:
        raise ValueError(
            f"{source}: got {_kind(data)}, expected a mapping such as {{seed: 0..9, model: [a, b]}} or a list of them."
        )
    return [{_name(name, source): _axis(name, value, source) for name, value in block.items()} for block in blocks]


def read_grid(path: str | Path) -> list[dict[str, Sequence[Any]]]:
    """The grid in a YAML file. Raises FileNotFoundError without one, ValueError for a file that holds no grid."""
    import yaml  # here: a sweep without a file does without

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Expected a grid in YAML.")
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.load(file, Loader=_unique_names(yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}.") from None
    return grid_of(data, str(path))


def crossed(grid: Sequence[Axes], axes: Axes) -> list[Axes]:
    """Every product of `grid` with `axes` as well; a name in both takes its values from `axes`."""
    return [{**block, **axes} for block in grid]


def _refuse_wrong(grid: Sequence[Axes], parameters: Mapping[str, Parameter]) -> None:
    wrong: dict[str, None] = {}  # in order, each once
    for axes in grid:
        for name, values in axes.items():
            if not len(values):
                wrong[f"parameter {name}: got no values, expected at least one."] = None
            for value in values[: MOST_RUNS + 1]:
                try:
                    merged(parameters, {name: value})
                except ValueError as error:
                    wrong[str(error)] = None
                    if name not in parameters:
                        break  # an unknown name is wrong once, not once per value
    if len(wrong) == 1:
        raise ValueError(*wrong)
    if wrong:
        raise ValueError(f"{len(wrong)} wrong parameters:\n" + "\n".join(f"  {line}" for line in wrong))


def _items(text: str) -> list[tuple[str, bool]]:
    """The items between commas, unescaped, and whether quotes or a backslash made them plain text."""
    items: list[tuple[str, bool]] = []
    place = 0
    while place <= len(text):
        item, plain, place = _quoted_item(text, place) if text[place : place + 1] in ("'", '"') else _item(text, place)
        if not item and not plain:
            raise ValueError(f'values: got {text!r}, with nothing between commas; write "" for the empty text.')
        items.append((item, plain))
        place += 1  # the comma
    return items


def _item(text: str, place: int) -> tuple[str, bool, int]:
    """The bare item at `place`: its text, whether something in it is escaped, and where it ends."""
    match = re.compile(r"(?:\\.|[^,])*", re.DOTALL).match(text, place)
    assert match is not None  # it matches nothing at all, too
    item = _unescaped(match.group())
    return item, item != match.group(), match.end()


def _quoted_item(text: str, place: int) -> tuple[str, bool, int]:
    """The quoted item at `place`, in the same form."""
    quote = text[place]
    match = re.compile(rf"{quote}((?:\\.|[^{quote}\\])*){quote}(?=,|\Z)", re.DOTALL).match(text, place)
    if match is None:
        raise ValueError(
            f"values: got {text!r}, expected a {quote} and then a comma or the end after the {quote} at character "
            f"{place + 1}; write \\{quote} for the character itself."
        )
    return _unescaped(match.group(1)), True, match.end()


def _unescaped(text: str) -> str:
    return re.sub(r"\\([,'\"\\])", r"\1", text)


def _spread(item: str) -> Sequence[str]:
    """The whole numbers of a range, as text; any other item as it stands."""
    match = RANGE.fullmatch(item.strip())
    if match is None:
        return [item]
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step < 1:
        raise ValueError(f"values: got {item!r}, expected a step of at least 1; 9..0 counts down by itself.")
    n_numbers = abs(last - first) // step + 1  # not the length of the range: that must fit 64 bits
    if n_numbers > MOST_RUNS:
        raise ValueError(f"values: got {item!r}, {n_numbers} values, expected up to {MOST_RUNS}.")
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [str(number) for number in numbers]


def _axis(name: Any, value: Any, source: str) -> Sequence[Any]:
    """The values of one name in plain data, with ranges spread."""
    listed = list(value) if isinstance(value, list | tuple | range | np.ndarray) else [value]
    plain = [item.item() if isinstance(item, np.generic) else item for item in listed]
    for item in plain:
        if not isinstance(item, bool | int | float | str | None):
            raise ValueError(f"{source}: {name} holds {_kind(item)}, expected a number, a text, true, false or null.")
    return [one for item in plain for one in (_spread(item) if isinstance(item, str) else [item])]


def _name(name: Any, source: str) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{source}: got the name {name!r}, expected a parameter's name.")
    return name


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"


def _unique_names(loader: type) -> type:
    """The YAML loader, except that it refuses a name that stands twice, where YAML would keep the last."""

    class UniqueNames(loader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{node.start_mark.name}: {twice[0]} is given twice, expected once.")
            return super().construct_mapping(node, deep)

    return UniqueNames
