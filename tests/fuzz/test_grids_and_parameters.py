"""Whatever is typed as a grid or a parameter: read as it was meant, or refused in words before anything runs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.grid import MOST_RUNS, axes_of, combinations, grid_of, quoted, read_grid, size, values_of
from workbench.parameters import Parameter, declared, merged

WORDS = st.text(st.sampled_from("ab01.,'\"\\ -=\n"), max_size=12)
ANY = st.text(st.characters(exclude_categories=()), max_size=30)
PARAMETERS = {
    "n": Parameter("n", "int", False, 3),
    "rate": Parameter("rate", "float", False, 1.5),
    "name": Parameter("name", "str", False, "a"),
    "many": Parameter("many", "bool", True, None),
}


@given(WORDS | ANY)
def test_a_word_is_values_or_refused_in_words(text: str) -> None:
    try:
        values = values_of(text)
    except ValueError as error:
        assert "values: got" in str(error) and ("expected" in str(error) or "write" in str(error))
        return
    assert len(values) and all(isinstance(value, str) for value in values)


@given(ANY)
def test_a_quoted_text_is_one_value(text: str) -> None:
    assert list(values_of(quoted(text))) == [text]


@given(st.lists(ANY, min_size=1, max_size=4))
def test_quoted_texts_between_commas_are_as_many_values(texts: list[str]) -> None:
    assert list(values_of(",".join(map(quoted, texts)))) == texts


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 9))
def test_a_range_holds_both_ends_and_keeps_its_step(first: int, last: int, step: int) -> None:
    numbers = list(map(int, values_of(f"{first}..{last}..{step}")))
    assert numbers[0] == first and abs(last - numbers[-1]) < step
    assert all(abs(b - a) == step for a, b in itertools.pairwise(numbers))
    assert min(first, last) <= min(numbers) and max(numbers) <= max(first, last)


@given(st.integers(), st.integers())
def test_a_range_too_long_is_refused_without_being_made(first: int, last: int) -> None:
    if abs(last - first) >= MOST_RUNS:
        with pytest.raises(ValueError, match="expected up to"):
            values_of(f"{first}..{last}")


@given(st.lists(ANY, max_size=3))
def test_words_of_a_command_are_axes_or_refused_in_words(words: list[str]) -> None:
    try:
        axes = axes_of(words)
    except ValueError as error:
        assert "expected" in str(error) or "write" in str(error)
        return
    assert all(name.isidentifier() for name in axes)


@given(st.fixed_dictionaries({}, optional={
    "n": st.lists(st.integers(0, 3), min_size=1, max_size=3),
    "rate": st.lists(st.floats(allow_nan=False), min_size=1, max_size=2),
    "name": st.lists(ANY, min_size=1, max_size=2),
    "many": st.lists(st.none() | st.booleans(), min_size=1, max_size=3),
}))  # fmt: skip
def test_a_grid_names_every_combination_once(axes: dict[str, list[Any]]) -> None:
    found = combinations([axes, axes], PARAMETERS)
    texts = [repr(sorted(given.items())) for given in found.given]
    distinct = math.prod(len({repr(value) for value in values}) for values in axes.values())
    assert len(texts) == len(set(texts)) == distinct
    assert len(found.given) + found.n_folded == size([axes, axes])


DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@given(DATA)
def test_plain_data_is_a_grid_or_refused_in_words(data: Any) -> None:
    try:
        grid = grid_of(data)
        combinations(grid, PARAMETERS)
    except ValueError as error:
        assert any(word in str(error) for word in ("expected", "this notebook has none", "write"))


@given(st.binary(max_size=60) | ANY.map(lambda text: text.encode(errors="surrogatepass")))
def test_any_file_is_a_grid_or_refused_with_its_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "grid.yaml"
    path.write_bytes(data)
    try:
        read_grid(path)
    except ValueError as error:
        assert "grid.yaml" in str(error)


@pytest.mark.parametrize("text", ["a: *b", "&a [*a]", "? [1, 2]\n: 3", "!!python/object:os.system x", "a: !!set {b}",
    "2020-01-01: 3", "n: 2020-01-01", "<<: {n: 1}", "n: 0o17", "n: 1_000", "n: .nan", "a: {b: 1}", "[[n, 1]]", "n: []",
    "{{n: 1}: 2}", "n: [[1]]", "- n: 1\n- 3", "n: 9" + "9" * 400 + ".." + "9" * 400, "n: 0..9..0"])  # fmt: skip
def test_odd_yaml_is_a_grid_or_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    try:
        combinations(read_grid(path), PARAMETERS)
    except ValueError as error:
        assert any(word in str(error) for word in ("grid.yaml", "parameter", "values:", "sweep:"))


# Parameters


@given(ANY | st.text(st.sampled_from("n:=int floatsrb0.'\"|None#\n,()+-"), max_size=40))
def test_any_cell_declares_parameters_or_is_refused_in_words(source: str) -> None:
    try:
        found = declared(source)
    except ValueError as error:
        assert "parameter" in str(error)
        return
    assert all(item.check(item.default) == item.default or item.default != item.default for item in found.values())


KINDS = {"int": st.integers(), "float": st.floats(allow_nan=False), "bool": st.booleans(), "str": ANY}


@given(st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), KINDS[kind])), st.booleans())
def test_what_a_command_line_spells_is_what_it_means(pair: tuple[str, Any], optional: bool) -> None:
    kind, value = pair
    item = Parameter("x", kind, optional, None)
    if optional and value in ("None", "none"):
        assert item.convert(value) is None
    else:
        assert item.convert(str(value)) == value and type(item.convert(str(value))) is type(value)
        assert item.convert(value) == value


@given(
    st.sampled_from(sorted(KINDS)), st.none() | st.booleans() | st.integers() | st.floats() | ANY | st.lists(st.none())
)
def test_a_value_has_the_declared_type_or_is_refused_by_name(kind: str, value: Any) -> None:
    try:
        made = Parameter("steepness", kind, False, None).convert(value)
    except ValueError as error:
        assert "parameter steepness: got" in str(error) and f"expected {kind}" in str(error)
        return
    assert type(made).__name__ == kind


@given(st.dictionaries(ANY, st.none() | st.integers() | ANY, max_size=3))
def test_given_parameters_are_taken_or_refused_by_name(given_: dict[str, Any]) -> None:
    try:
        assert set(merged(PARAMETERS, given_)) == set(PARAMETERS)
    except ValueError as error:
        assert "parameter " in str(error)
