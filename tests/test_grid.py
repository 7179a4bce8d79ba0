"""The grid: what its syntax spells, what combinations it makes, and every mistake told at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.grid import MOST_RUNS, axes_of, combinations, crossed, grid_of, quoted, read_grid, size, values_of
from workbench.parameters import declared

PARAMETERS = declared('seed: int = 0\nkeep: float = 1.0\nmodel: str = "organism"\nfast: bool = False')
plain = st.text(st.characters(exclude_characters=",'\"\\"), min_size=1).filter(lambda text: ".." not in text)


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_texts_in_quotes_come_back_as_they_were(texts):
    assert list(values_of(",".join(map(quoted, texts)))) == texts


@given(st.lists(plain, min_size=1, max_size=5))
def test_texts_without_special_characters_need_no_quotes(texts):
    assert list(values_of(",".join(texts))) == texts


@given(st.text(), st.text())
def test_whatever_is_typed_is_read_or_refused_in_words(left, right):
    try:
        values = values_of(f"{left},{right}")
    except ValueError as error:
        assert str(error).startswith("values: got ")
    else:
        assert all(isinstance(value, str) for value in values)


@given(st.integers(-300, 300), st.integers(-300, 300), st.integers(1, 50))
def test_a_range_holds_its_ends_and_nothing_outside(first, last, step):
    numbers = [int(text) for text in values_of(f"{first}..{last}..{step}")]
    assert numbers[0] == first and all(min(first, last) <= n <= max(first, last) for n in numbers)
    assert abs(last - numbers[-1]) < step and all(abs(b - a) == step for a, b in itertools.pairwise(numbers))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_combinations_are_the_product_each_once(seeds, keeps):
    made = combinations([{"seed": seeds, "keep": keeps}], PARAMETERS)
    expected = dict.fromkeys((seed, repr(keep)) for seed in seeds for keep in keeps)  # -0.0 is not 0.0
    assert [(run["seed"], repr(run["keep"])) for run in made.given] == list(expected)
    assert len(made.given) + made.n_folded == len(seeds) * len(keeps)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..3", ["0", "1", "2", "3"]),
        ("0..10..5", ["0", "5", "10"]),
        ("-1..1", ["-1", "0", "1"]),
        ("2..0", ["2", "1", "0"]),
        ("7", ["7"]),
        ("7..7", ["7"]),
        ("0..2,10,20..21", ["0", "1", "2", "10", "20", "21"]),
        ("0.25,0.5,1e-3", ["0.25", "0.5", "1e-3"]),
        ("", [""]),
        ('""', [""]),
        ('"a,b",c', ["a,b", "c"]),
        ("'say \"hi\", you'", ['say "hi", you']),
        (r"a\,b,c", ["a,b", "c"]),
        (r'"a\"b"', ['a"b']),
        (r"C:\data\new", [r"C:\data\new"]),
        (r"C:\data\\,d", ["C:\\data\\", "d"]),
        ('"0..9"', ["0..9"]),
        ("it's", ["it's"]),
        ("../up", ["../up"]),
        ("0.1..0.5", ["0.1..0.5"]),
        ("a b, c", ["a b", " c"]),
        ("line\nbreak", ["line\nbreak"]),
    ],
)
def test_values_are_read_as_a_shell_user_expects(text, values):
    assert list(values_of(text)) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "with nothing between commas"),
        ("a,", "with nothing between commas"),
        ('"a', 'expected a " and then a comma or the end after the " at character 1'),
        ('x,"a"b', 'after the " at character 3'),
        ("0..9..0", "expected a step of at least 1"),
        ("0..9..-1", "expected a step of at least 1"),
        ("0..1000000000", "1000000001 values, expected up to"),
    ],
)
def test_what_spells_no_values_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        values_of(text)


def test_words_become_axes_and_each_name_stands_once():
    assert axes_of(["seed=0..1", "model=a,b", "note=x=y"]) == {
        "seed": ["0", "1"],
        "model": ["a", "b"],
        "note": ["x=y"],
    }
    for words, message in [(["seed"], "got 'seed', expected NAME=VALUES"), (["a=1", "a=2"], "a is given twice")]:
        with pytest.raises(ValueError, match=message):
            axes_of(words)


def test_every_mistake_of_the_whole_grid_is_told_at_once():
    grid = [axes_of(["seed=1,two,3.5", "sed=1,2", "fast=yes"]), {"keep": ["much"], "model": []}]
    with pytest.raises(ValueError) as caught:
        combinations(grid, PARAMETERS)
    assert str(caught.value).splitlines() == [
        "6 wrong parameters:",
        "  parameter seed: got 'two', expected int.",
        "  parameter seed: got '3.5', expected int.",
        "  parameter sed: this notebook has none of that name. Did you mean seed?",
        "  parameter fast: got 'yes', expected bool.",
        "  parameter keep: got 'much', expected float.",
        "  parameter model: got no values, expected at least one.",
    ]
    with pytest.raises(ValueError, match=r"^parameter seed: got 'x', expected int\.$"):
        combinations([{"seed": ["x"]}], PARAMETERS)


def test_a_run_named_twice_is_made_once_and_said():
    grid = grid_of([{"seed": "0..2"}, {"seed": [2, 3], "keep": 1}, {"fast": False}])
    made = combinations(grid, PARAMETERS)
    assert [run["seed"] for run in made.given] == [0, 1, 2, 3], "keep=1.0, fast=False and seed=0 are the defaults"
    assert made.n_folded == 2 and size(grid) == 6


def test_no_grid_is_one_run_with_the_defaults():
    assert combinations([{}], PARAMETERS).given == ({},)


def test_too_many_runs_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match=f"got a grid of 1000000000 runs, expected up to {MOST_RUNS}"):
        combinations([{"seed": range(50_000), "keep": [float(n) for n in range(20_000)]}], PARAMETERS)


def test_a_file_holds_a_product_or_several(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text('seed: 0..2\nkeep: [0.5, 1e-3]\nmodel: "a, b"\nfast: true\n')
    (product,) = read_grid(file)
    assert product == {"seed": ["0", "1", "2"], "keep": [0.5, "1e-3"], "model": ["a, b"], "fast": [True]}
    file.write_text("- {seed: 0..2, keep: [0.5, 1.0]}\n- {seed: 7, model: tiny}\n")
    made = combinations(read_grid(file), PARAMETERS).given
    assert len(made) == 7 and made[0] == {"seed": 0, "keep": 0.5} and made[-1] == {"seed": 7, "model": "tiny"}


def test_the_command_line_crosses_the_file_and_wins(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("- {seed: 0..2, keep: 0.5}\n- {seed: 7}\n")
    made = combinations(crossed(read_grid(file), axes_of(["keep=0.1,0.2"])), PARAMETERS).given
    assert [(run["seed"], run["keep"]) for run in made] == [(s, k) for s in (0, 1, 2, 7) for k in (0.1, 0.2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got nothing, expected a mapping"),
        ("[]", "got a list, expected a mapping"),
        ("- 3", "got a list, expected a mapping"),
        ("seed", "got a str, expected a mapping"),
        ("seed: {a: 1}", "seed holds a dict, expected a number"),
        ("seed: [[1, 2]]", "seed holds a list, expected a number"),
        ("seed: 2026-01-01", "seed holds a date, expected a number"),
        ("1: 2", "got the name 1, expected a parameter's name"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("seed: [1", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_file_that_holds_no_grid_is_refused(tmp_path, text, message):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_grid(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_files_that_are_no_text_or_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match="not YAML"):
        read_grid(tmp_path / "bytes.yaml")


def test_python_values_are_a_grid_too():
    (axes,) = grid_of({"seed": range(3), "keep": np.linspace(0.5, 1.0, 2), "fast": np.bool_(True), "model": "tiny"})
    assert axes == {"seed": [0, 1, 2], "keep": [0.5, 1.0], "fast": [True], "model": ["tiny"]}
    assert [type(value) for values in axes.values() for value in values][3:6] == [float, float, bool]
    with pytest.raises(ValueError, match="seed holds a set"):
        grid_of({"seed": {1, 2}})
