"""What fuzzing found, one plain example each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from families import subject_of

from workbench import Clamp, Plan, Site, SkipFFN, Weights, stats
from workbench.cache.packing import pack_planes
from workbench.grid import values_of
from workbench.keys import input_digest
from workbench.leases import lease
from workbench.pruned.plan import Shape
from workbench.runs.records import moment, records
from workbench.settings import Bounds, Settings
from workbench.values import decode, encode


@dataclass(frozen=True)
class Search(Settings):
    """Settings of every kind."""

    steps: int = 3
    share: float | int = 0.5
    layers: tuple[int, ...] | None = None
    rule: Literal["best", "all"] = "best"
    site: Site | None = None
    quiet: bool = False

    bounds: ClassVar[Bounds] = {"steps": 1, "share": (0, 1), "layers": 0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": "3"}, "got steps='3', expected a whole number."),
        ({"steps": True}, "got steps=True, expected a whole number."),
        ({"steps": 0}, "got steps=0, expected at least 1."),
        ({"share": float("nan")}, "got share=nan, expected a finite number."),
        ({"share": 1.5}, "got share=1.5, expected 0 to 1."),
        ({"layers": 3}, "got layers=3, expected a tuple, each a whole number or None."),
        ({"layers": "12"}, "got layers='12', expected a tuple, each a whole number or None."),
        ({"layers": ()}, "got layers=(), expected at least one."),
        ({"layers": (0, -1)}, "got layers=(0, -1), expected at least 0."),
        ({"rule": "bets"}, "got rule='bets', expected 'best' or 'all'."),
        ({"site": "up@3"}, "got site='up@3', expected a Site or None."),
        ({"quiet": 1}, "got quiet=1, expected True or False."),
    ],
)
def test_a_setting_of_another_kind_or_size_is_refused_by_its_name(settings: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Search(**settings)
    assert str(caught.value) == f"Search: {words}"


def test_good_settings_are_taken_as_they_are() -> None:
    made = Search(np.int64(2), np.float32(0.25), [0, 1], "all", Site(3, "up"), np.bool_(True))  # type: ignore[arg-type]
    assert (made.steps, made.share, made.layers, made.site) == (2, 0.25, [0, 1], Site(3, "up"))


@pytest.mark.parametrize("shape", [(0,), (0, 0), (2, 0, 3)])
def test_a_tensor_without_numbers_survives_json(shape: tuple[int, ...]) -> None:
    again = decode(encode(torch.zeros(shape, dtype=torch.float64)), {})
    assert again.shape == shape and again.dtype == torch.float64


@pytest.mark.parametrize("text", ["é" * 300, "a" * 900, "~nobody-of-this-name", "\ud800"])
def test_a_prompt_that_can_name_no_file_is_plain_text(text: str) -> None:
    assert input_digest(text) is None


def test_a_range_beyond_64_bits_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="expected up to 100000"):
        values_of(f"0..{10**30}")


def test_a_layer_far_too_high_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"got layers 0 to 1000000000000, but this model has blocks 0 to 2\."):
        SkipFFN(0.9, last=10**12).layers(3)


def test_an_age_beyond_the_calendar_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="expected an age such as 12h"):
        moment("99999999999d")


@pytest.mark.parametrize(("count", "total"), [(np.nan, 1), (1, np.nan), (1, np.inf)])
def test_a_share_of_nan_or_infinity_is_refused(count: float, total: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= count <= total"):
        stats.wilson_interval(count, total)


def test_nothing_to_pack_packs_to_nothing() -> None:
    assert pack_planes(torch.zeros(0, 8, 3, dtype=torch.uint8), 4, 2).shape == (0, 4, 3)


@pytest.mark.parametrize("change", [{"dropped": [""]}, {"layers": {"x": {}}}, {"layers": {"0": {"neurons": [1.5]}}}])
def test_a_plan_of_other_than_whole_numbers_is_refused_in_words(change: dict) -> None:
    with pytest.raises(ValueError, match=r"^Plan: got .* expected"):
        Plan.from_json(Plan(Shape(2, 8, 4, 2, 2, 6)).to_json() | change)


def test_a_lease_is_the_one_that_its_file_is_called(tmp_path: Path) -> None:
    leases = tmp_path / ".a.lease"
    leases.mkdir()
    told = '{"number": 0, "owner": "x", "host": "", "pid": 0, "heartbeat": 0, "ttl_s": 1, "released": true}'
    (leases / "000005").write_text(told)
    with lease(tmp_path / "a") as mine:
        assert mine.holder.number == 6


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "k").mkdir(parents=True)
    (tmp_path / "a" / "k" / "manifest.json").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON .* Bring the file back"):
        records(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"), [("a\ud800", "half a character"), ([10**9], "got token id"), (3, "expected a text")]
)
def test_what_no_tokenizer_reads_is_refused_before_it(text: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        subject_of("llama").tokenize([text])  # type: ignore[list-item]


def test_units_and_tensors_of_another_kind_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"expected \{Site: \[numbers of units\]\}"):
        Clamp({Site(0, "neurons"): ["a"]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \{name: tensor\}"):
        Weights("weights.safetensors")  # type: ignore[arg-type]
