"""Strip and TokenStrip: scales of colours, what is told of a token, the static twin, the widget's state."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import plots
from workbench.folder import RUN_VARIABLE
from workbench.widgets.strip import WHITE, Strip, StripRow, TokenStrip, contrast, visible

HOSTILE = ("<script>alert(1)</script>", '" onmouseover="alert(1)', "</span></div>", "&lt;", "\u202egnp", "\ud800", "'")
FINITE = st.integers(-(10**6), 10**6).map(lambda parts: parts / 64)  # scaling them by powers of two is exact


def strip(*values: float | None, **settings: Any) -> Strip:
    """One row with a token for each value."""
    return Strip((StripRow(tuple(f" t{k}" for k in range(len(values))), values),), **settings)


def grounds(of: Strip) -> list[str]:
    return [ground for row in of.drawn()["rows"] for ground in row["ground"]]


def depth(color: str) -> float:
    """How far a colour is from white."""
    return 255.0 * 3 - sum(bytes.fromhex(color[1:]))


class Page(HTMLParser):
    """The tags, the text and the titles of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.titles: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


# Laws


@given(st.lists(FINITE, min_size=1, max_size=30), st.booleans())
def test_a_larger_value_never_has_a_colour_nearer_to_the_low_end(values: list[float], diverging: bool) -> None:
    drawn = grounds(strip(*values, diverging=diverging))
    side = [depth(color) * (-1 if diverging and value < 0 else 1) for value, color in zip(values, drawn, strict=True)]
    ordered = [side[k] for k in np.argsort(values, kind="stable")]
    assert ordered == sorted(ordered)


@given(st.lists(FINITE, min_size=1, max_size=30), st.sampled_from([0.25, 2.0, 1024.0]), st.booleans())
def test_colours_do_not_depend_on_the_unit(values: list[float], factor: float, diverging: bool) -> None:
    scaled = strip(*(value * factor for value in values), diverging=diverging)  # powers of two: exact
    assert grounds(scaled) == grounds(strip(*values, diverging=diverging))


@given(st.lists(FINITE, min_size=1, max_size=30))
def test_turning_every_sign_mirrors_a_diverging_scale(values: list[float]) -> None:
    low, high = strip(*values, diverging=True).span()
    assert low == -high and strip(*(-value for value in values), diverging=True).span() == (low, high)


@given(FINITE, st.lists(FINITE, min_size=1, max_size=30), st.booleans())
def test_text_on_every_colour_has_a_contrast_of_at_least_4_5(
    value: float, others: list[float], diverging: bool
) -> None:
    for row in strip(value, *others, diverging=diverging).drawn()["rows"]:
        assert min(wcag(ink, ground) for ink, ground in zip(row["ink"], row["ground"], strict=True)) >= 4.5


def wcag(one: str, other: str) -> float:
    """The contrast of two colours, spelt out a second time from the definition of WCAG 2.2."""
    light = []
    for color in (one, other):
        total = 0.0
        for weight, part in zip((0.2126, 0.7152, 0.0722), (color[1:3], color[3:5], color[5:7]), strict=True):
            share = int(part, 16) / 255
            total += weight * (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
        light.append(total)
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_black_on_white_is_21_and_a_colour_on_itself_is_1() -> None:
    assert contrast("#000000", WHITE) == pytest.approx(21.0) and contrast(plots.BLUE, plots.BLUE) == 1.0


@settings(max_examples=300)
@given(st.text(max_size=200) | st.text(alphabet="\u202e\u200d\u0301\x1b\ud800 \n\ta<&", max_size=20))
def test_every_token_is_drawn_as_signs_that_can_be_seen_and_sent(token: str) -> None:
    shown = visible(token)
    assert shown and shown.isprintable() and " " not in shown
    assert len(shown) <= 80 * len("\\U0010ffff") + 2  # every sign as the longest code, what stands alone, the ellipsis
    state = json.dumps(Strip((StripRow((token,), notes=(token,), label=token),), token, title=token).drawn())
    assert state.encode() and json.loads(state)["rows"][0]["shown"] == [shown]


# Built by hand


def test_the_ends_of_the_scales_are_the_colours_of_the_figures() -> None:
    assert grounds(strip(0.0, 1.0, low=0.0, high=1.0)) == [WHITE, plots.VERMILLION]
    assert grounds(strip(-1.0, 0.0, 1.0, diverging=True, high=1.0)) == [plots.BLUE, WHITE, plots.VERMILLION]


def test_one_scale_serves_all_rows() -> None:
    rows = (StripRow(("a", "b"), (0.0, 1.0)), StripRow(("c",), (1.0,)))
    assert grounds(Strip(rows, low=0.0, high=2.0)) == ["#FFFFFF", "#EAAE80", "#EAAE80"]


def test_a_few_extremes_do_not_bleach_the_rest() -> None:
    values = [*np.linspace(0, 1, 1000), 1e6]
    assert strip(*values).span() == pytest.approx((0.02, 0.98), abs=2e-3)  # a step between two of the values


def test_where_nearly_all_values_are_equal_the_others_still_show() -> None:
    rare = [0.0] * 200 + [0.5]
    assert strip(*rare).span() == (0.0, 0.5) and strip(*rare, diverging=True).span() == (-0.5, 0.5)
    assert grounds(strip(*rare))[-2:] == [WHITE, plots.VERMILLION]


def test_one_given_end_of_a_diverging_scale_sets_the_other() -> None:
    assert strip(9.0, diverging=True, high=2.0).span() == (-2.0, 2.0)
    assert strip(9.0, diverging=True, low=-3.0).span() == (-3.0, 3.0)
    assert grounds(strip(-1.0, 1.0, diverging=True, low=-1.0, high=4.0)) == ["#BFDCEC", "#F4D7BF"]  # a quarter, both


@pytest.mark.parametrize("values", [(), (None,), (0.0,), (3.0, 3.0), (-3.0,)])
@pytest.mark.parametrize("diverging", [False, True])
def test_scales_of_few_or_equal_values_are_drawn(values: tuple[float | None, ...], diverging: bool) -> None:
    made = strip(*values, diverging=diverging, unit="nats")
    low, high = made.span()
    assert low <= high and len(grounds(made)) == len(values) and made.html()


def test_the_legend_says_where_values_lie_beyond_the_scale() -> None:
    legend = strip(-5.0, 0.5, 1.0, low=0.0, high=1.0, unit="nats").drawn()["legend"]
    assert (legend["low"], legend["high"]) == ("≤ 0", "1 nats")
    assert legend["colors"][0] == WHITE and legend["colors"][-1] == plots.VERMILLION
    assert strip(None, None).drawn()["legend"]["colors"] == []


def test_what_is_told_of_a_token_is_its_text_value_fate_and_note() -> None:
    row = StripRow((" cat", "\n", " sat"), (0.3117, None, -2.0), ("a noun", "", ""), kept=(True, False, True))
    (drawn,) = Strip((row,), unit="nats").drawn()["rows"]
    assert drawn["said"] == ["' cat', 0.312 nats, kept, a noun", r"'\n', dropped", "' sat', -2 nats, kept"]
    assert drawn["shown"] == ["·cat", "↵", "·sat"] and drawn["dropped"] == [False, True, False]
    assert drawn["ground"][1] == WHITE


def test_nothing_is_said_of_a_cache_where_there_is_none() -> None:
    assert strip(1.0).drawn()["rows"][0]["said"] == ["' t0', 1"]


def test_signs_that_are_not_seen_are_drawn() -> None:
    shown = [visible(token) for token in ("", " a", "\t", "a\n", "\u200b", "\u0301", "é", "x" * 81)]
    assert shown == ["∅", "·a", "⇥", "a↵", r"\u200b", "◌\u0301", "é", "x" * 80 + "…"]


def test_arrays_are_values_too() -> None:
    row = StripRow(("a", "b"), np.array([1.0, 2.0], np.float32), kept=np.array([True, False]))  # type: ignore[arg-type]
    assert row == StripRow(("a", "b"), (1.0, 2.0), kept=(True, False))


# The static twin


def test_the_static_twin_tells_what_the_widget_tells() -> None:
    row = StripRow((" cat", "\n", " sat"), (0.3, None, 1.0), label="before", kept=(True, True, False))
    made = Strip((row, StripRow(())), unit="nats", title="Nouns surprise")
    page, source = Page(made.html()), made.html()
    assert page.titles == made.drawn()["rows"][0]["said"]
    assert page.text.split() == ["Nouns", "surprisebefore", "·cat↵·sat(no", "tokens)0.3", "1", "nats"]
    assert source.count("line-through") == 1 and source.count("<br>") == 1 and made._repr_html_() == source


def test_hostile_text_stays_text() -> None:
    row = StripRow(HOSTILE, notes=HOSTILE, label=HOSTILE[0])
    page = Page(Strip((row,), unit=HOSTILE[0], title=HOSTILE[2]).html())
    assert set(page.tags) <= {"div", "b", "span", "br"} and page.names <= {"style", "role", "aria-label", "title"}
    assert page.tags.count("span") == len(HOSTILE) and "<script>alert(1)</script>" in page.text


def test_a_notebook_stores_a_long_strip_once() -> None:
    assert repr(strip(*range(5000), title="Long", unit="nats")) == "Strip('Long', unit='nats': 1 rows, 5000 tokens)"


def test_a_strip_of_nothing_says_so() -> None:
    assert "no tokens" in Page(Strip(()).html()).text


# Bad input


@pytest.mark.parametrize("name", ["values", "notes", "kept"])
def test_lengths_that_disagree_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"StripRow 'mine': got 1 {name} for 2 tokens, expected one per token"):
        StripRow(("a", "b"), label="mine", **{name: ("1",)})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"got (nan|inf) for token 1, ' t1', expected finite values. Give None"):
        strip(0.0, value)


def test_a_whole_text_is_refused_where_its_tokens_are_due() -> None:
    with pytest.raises(ValueError, match="got one text, 'the cat', expected its tokens"):
        StripRow("the cat")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({"low": 1.0, "high": 1.0}, "low below high"),
        ({"high": float("nan")}, "finite numbers"),
        ({"low": 1.0, "diverging": True}, "0 between them"),
        ({"high": 0.0, "diverging": True}, "0 between them"),
    ],
)
def test_scales_that_can_not_be_are_refused(ends: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        strip(0.5, **ends)


# The widget


def test_another_strip_of_the_same_tokens_keeps_what_is_selected() -> None:
    widget = TokenStrip(strip(0.0, 1.0))
    widget.selected = [0, 1]
    widget.show(strip(5.0, 2.0))
    assert widget.selected == [0, 1] and widget.strip == strip(5.0, 2.0).drawn()
    widget.show(strip(5.0, 2.0, 3.0))
    assert widget.selected == []


@pytest.mark.parametrize("place", [[0], [0, 2], [1, 0], [-1, 0], [0, -1]])
def test_only_a_token_can_be_selected(place: list[int]) -> None:
    widget = TokenStrip(strip(0.0, 1.0))
    with pytest.raises(ValueError, match="expected \\[row, index\\] of a token"):
        widget.selected = place
    assert widget.selected == []


def test_in_a_batch_run_the_widget_is_its_static_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    made = strip(0.0, 1.0, title="Two")
    widget = TokenStrip(made)
    assert "application/vnd.jupyter.widget-view+json" in widget._repr_mimebundle_()[0]
    monkeypatch.setenv(RUN_VARIABLE, "somewhere")
    assert widget._repr_mimebundle_()["text/html"] == made.html()


def test_the_script_is_short_and_fetches_nothing(root: Path) -> None:
    script = (root / "workbench" / "widgets" / "strip.js").read_text()
    style = (root / "workbench" / "widgets" / "strip.css").read_text()
    assert len(script.splitlines()) <= 80
    for word in (
        "innerHTML",
        "insertAdjacentHTML",
        "outerHTML",
        "eval(",
        "import ",
        "fetch",
        "http",
        "@import",
        "url(",
    ):
        assert word not in script + style, word
