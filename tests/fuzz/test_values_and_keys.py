"""Any value, key, site: round trips are exact, keys tell what differs and nothing else."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench import Site
from workbench.keys import input_digest, key_of, key_parts
from workbench.site import KINDS
from workbench.values import decode, encode, fingerprint

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates and control characters too
FLOATS = st.floats()  # NaN, infinities, -0.0 and subnormals too
SCALARS = st.none() | st.booleans() | st.integers() | FLOATS | TEXT
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner), max_leaves=4)
ARRAYS = hnp.arrays(
    st.sampled_from(["<f8", "<f4", "<i8", "|b1", "|u1", "<f2", "<c16", ">i4"]), hnp.array_shapes(min_dims=0, min_side=0)
)
TENSORS = ARRAYS.filter(lambda a: a.dtype.str != ">i4").map(torch.tensor)
VALUES = st.recursive(
    SCALARS | ARRAYS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.frozensets(st.integers() | TEXT, max_size=3)
        | st.builds(lambda a, b: Pair(a, b), inner, inner)
    ),
    max_leaves=8,
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
PARAMS = st.dictionaries(st.text("abcxyz_", min_size=1, max_size=6), PLAIN, max_size=5)


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any = None
    derived: int = field(init=False, default=3)


def same(a: Any, b: Any) -> bool:
    """Equal in type and to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes() or (math.isnan(a) and math.isnan(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and same(a.numpy(), b.numpy())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(tuple(a), tuple(b)) and same(tuple(a.values()), tuple(b.values()))
    if isinstance(a, Pair):
        return same(a.left, b.left) and same(a.right, b.right)
    return a == b


@given(VALUES)
def test_any_value_comes_back_from_its_json_to_the_bit(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)  # strict JSON: other readers must not choke
    assert same(decode(json.loads(text), {"Pair": Pair}), value)


@given(VALUES)
def test_a_fingerprint_is_a_function_of_the_value(value: Any) -> None:
    again = decode(encode(value), {"Pair": Pair})
    assert fingerprint(again) == fingerprint(value) and len(fingerprint(value)) == 16


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | TEXT, st.lists, max_leaves=5) | st.dictionaries(TEXT, TEXT)
)
def test_json_that_encode_never_wrote_is_refused_or_read_but_never_breaks(data: Any) -> None:
    try:
        decode(data, {"Pair": Pair})
    except ValueError as error:
        assert "expected" in str(error)


@given(PARAMS, st.lists(st.text(max_size=30), max_size=3), st.randoms(use_true_random=False))
def test_a_key_does_not_hang_on_the_order_of_parameters(params: dict, code: list[str], dice: random.Random) -> None:
    names = list(params)
    dice.shuffle(names)
    shuffled = {name: params[name] for name in names}
    assert key_of(key_parts(code, params, "p")) == key_of(key_parts(code, shuffled, "p"))


@given(PARAMS, PARAMS)
def test_two_keys_are_equal_only_for_the_same_parameters(one: dict, other: dict) -> None:
    told = [{name: repr(value) for name, value in params.items()} for params in (one, other)]
    equal = key_of(key_parts(["x"], one, "p")) == key_of(key_parts(["x"], other, "p"))
    assert equal == (told[0] == told[1])


@given(PARAMS, st.sampled_from([(1, True), (1, 1.0), (0, False), ("1", 1), (None, "None"), (0.0, -0.0)]))
def test_a_key_tells_apart_what_python_calls_equal(params: dict, pair: tuple[Any, Any]) -> None:
    first, second = (key_of(key_parts(["x"], params | {"a": value}, "p")) for value in pair)
    assert first != second


@given(st.lists(st.text(max_size=30), max_size=3), st.sampled_from([" ", "\t", "\n", "  \n"]))
def test_space_at_the_ends_of_lines_changes_no_key(code: list[str], space: str) -> None:
    assert key_parts(code, {}, "p") == key_parts([cell + space for cell in code], {}, "p")


@given(TEXT)
def test_any_text_can_be_a_parameter(text: str) -> None:
    assume(text.strip("./") and not text.startswith(("~", "/")))  # a path that is there is another test
    assert input_digest(text) is None


@pytest.mark.parametrize(
    "text", ["\ud800", "~nobody-here/x", "a\nb", "x" * 5000, "\x00", "models--a/../../b", "é" * 300]
)
def test_hostile_texts_name_no_input(text: str) -> None:
    assert input_digest(text) is None


@given(st.integers(0, 10**9), st.sampled_from(KINDS))
def test_a_site_is_the_text_that_it_prints_as(layer: int, kind: Any) -> None:
    assert Site.parse(str(Site(layer, kind))) == Site(layer, kind)


@given(TEXT)
def test_a_text_is_a_site_or_refused_in_words(text: str) -> None:
    try:
        assert str(Site.parse(text))
    except ValueError as error:
        assert "expected" in str(error)
