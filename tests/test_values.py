"""Sites and settings as values: what prints, compares and travels through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench import Site
from workbench.site import KINDS
from workbench.values import decode, encode, fingerprint


@dataclass(frozen=True)
class Setting:
    value: object


@given(st.integers(0, 200), st.sampled_from(KINDS))
def test_a_site_prints_and_parses_back(layer: int, kind: str) -> None:
    site = Site(layer, kind)  # type: ignore[arg-type]
    assert Site.parse(str(site)) == site and str(site) == f"{kind}@{layer}"


@pytest.mark.parametrize("bad", [(-1, "neurons"), (1.5, "neurons"), (True, "neurons"), (0, "mlp")])
def test_a_wrong_site_is_refused(bad: tuple) -> None:
    with pytest.raises(ValueError, match=r"Site: got .*, expected"):
        Site(*bad)


@pytest.mark.parametrize("text", ["neurons", "neurons@x", "neurons@²", "@3", "mlp@1"])
def test_text_that_names_no_site_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Site: got .*, expected"):
        Site.parse(text)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=10)


@given(values)
def test_settings_survive_json_exactly(value: object) -> None:
    text = json.dumps(encode(Setting(value)))
    assert decode(json.loads(text), {"Setting": Setting}) == Setting(value)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_survive_json_to_the_bit(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    again = decode(json.loads(json.dumps(encode(tensor))), {})
    assert again.dtype == dtype and torch.equal(again, tensor)


def test_arrays_and_special_numbers_survive_json() -> None:
    array = np.array([[1.5, np.inf], [-0.0, np.nan]])
    again = decode(json.loads(json.dumps(encode(array))), {})
    assert again.tobytes() == array.tobytes()
    assert decode(json.loads(json.dumps(encode(math.inf))), {}) == math.inf
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan))), {}))
    both = {Site(0, "up"): (1, 2)}
    assert decode(json.loads(json.dumps(encode(both))), {"Site": Site}) == both


def test_a_fingerprint_sees_every_difference() -> None:
    one = {"a": (1, 2.0, "x"), "b": torch.arange(3)}
    assert fingerprint(one) == fingerprint({"a": (1, 2.0, "x"), "b": torch.arange(3)})
    assert fingerprint(one) != fingerprint(one | {"b": torch.arange(3).float()})
    assert fingerprint(Site(0, "up")) != fingerprint(Site(1, "up"))


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="encode: got a function"):
        encode(test_what_has_no_json_form_is_refused)
    with pytest.raises(TypeError, match="got an array of object"):  # its bytes are addresses: no two runs would agree
        encode(np.array(["a", None], dtype=object))
    with pytest.raises(ValueError, match="decode: got class 'Setting', expected one of Site"):
        decode(encode(Setting(1)), {"Site": Site})
