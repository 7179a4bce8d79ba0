"""The script of TokenStrip in a real browser: keyboard, what is read aloud, recolouring, thousands of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, Page

from workbench.widgets.strip import Strip, StripRow, contrast

Open = Callable[..., Page]
# What anywidget hands to a script: a model with get, set, on, off and save_changes, which here writes down.
MODEL = """async ([script, strip]) => {
  const state = {strip, selected: []}, heard = {};
  window.model = {
    saved: [],
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; (heard[`change:${name}`] ?? []).forEach((does) => does()); },
    save_changes: () => model.saved.push(state.selected),
    on: (name, does) => (heard[name] ??= []).push(does),
    off: (name, does) => { heard[name] = heard[name].filter((other) => other !== does); },
  };
  const url = URL.createObjectURL(new Blob([script], {type: "text/javascript"}));
  window.widget = (await import(url)).default;
  window.leave = widget.render({model, el: document.getElementById("strip")});
}"""
PLACE = "() => document.activeElement.ariaLabel ?? document.activeElement.id"
WORDS = ("the", "cat", "that", "the", "dogs", "chase", "sees", "a", "vase", ";", "it", "falls", "and", "breaks")


def strip(n: int = 60, label: str = "", sign: float = 1.0) -> Strip:
    """n different tokens with values from -1 to 1, every fifth of them dropped."""
    tokens = tuple(f" {WORDS[k % len(WORDS)]}{k}" for k in range(n))
    values = tuple(sign * (k % 9 - 4) / 4 for k in range(n))
    kept = tuple(k % 5 != 0 for k in range(n))
    return Strip((StripRow(tokens, values, label=label, kept=kept),), "nats", diverging=True, title="Nouns surprise")


def shown(opened: Page, made: Strip, root: Path, dark: bool = False) -> Page:
    """A page with the strip between two buttons."""
    folder = root / "workbench" / "widgets"
    style = (folder / "strip.css").read_text() + ("body { background: #111; color: #eee; }" if dark else "")
    body = '<button id="before"></button><div id="cell" tabindex="-1"><div id="strip"></div></div><button id="after">'
    opened.set_content(f'<!doctype html><html lang="en"><style>{style}</style><body>{body}</button></body></html>')
    opened.evaluate(MODEL, [(folder / "strip.js").read_text(), made.drawn()])
    return opened


def change(page: Page, name: str, value: Any) -> None:
    """What Python sets."""
    page.evaluate("([name, value]) => model.set(name, value)", [name, value])


def press(page: Page, *keys: str) -> str:
    """What has the focus after these keys."""
    for key in keys:
        page.keyboard.press(key)
    return page.evaluate(PLACE)


def line(page: Page) -> str:
    return page.get_by_role("status").inner_text()


def tops_and_lefts(tokens: Locator) -> list[tuple[float, float]]:
    boxes = "nodes => nodes.map((node) => { const box = node.getBoundingClientRect(); return [box.top, box.left]; })"
    return [(top, left) for top, left in tokens.evaluate_all(boxes)]


def test_all_tokens_are_one_stop_of_the_tab_key(page: Open, root: Path) -> None:
    opened = shown(page(), strip(), root)
    assert press(opened, "Tab") == "before"
    assert press(opened, "Tab") == "' the0', -1 nats, dropped"
    assert press(opened, "ArrowRight", "ArrowRight") == "' that2', -0.5 nats, kept"
    assert press(opened, "Tab") == "after"
    assert press(opened, "Shift+Tab") == "' that2', -0.5 nats, kept", "back to where the reader was"


def test_arrows_home_and_end_move_and_stop_at_the_ends(page: Open, root: Path) -> None:
    opened = shown(page(), strip(12), root)
    first, last = "' the0', -1 nats, dropped", "' falls11', -0.5 nats, kept"
    assert press(opened, "Tab", "Tab", "ArrowLeft") == first
    assert press(opened, "End") == last and press(opened, "ArrowRight") == last
    assert press(opened, "Home") == first and press(opened, "ArrowUp") == first
    assert press(opened, "ArrowDown") == first, "one line has none below it"


def test_up_and_down_go_to_the_nearest_token_of_the_next_line(page: Open, root: Path) -> None:
    opened = shown(page(width=480), strip(), root)
    places = tops_and_lefts(opened.get_by_role("option"))
    lines = sorted({top for top, _ in places})
    assert len(lines) > 3
    at = next(k for k, (top, _) in enumerate(places) if top == lines[1]) + 2
    below = [(abs(left - places[at][1]), k) for k, (top, left) in enumerate(places) if top == lines[2]]
    said = strip().drawn()["rows"][0]["said"]
    opened.get_by_role("option").nth(at).focus()
    assert press(opened, "ArrowDown") == said[min(below)[1]]
    above = [(abs(left - places[min(below)[1]][1]), -k) for k, (top, left) in enumerate(places) if top == lines[1]]
    assert press(opened, "ArrowUp") == said[-min(above)[1]]


def test_enter_space_and_a_click_select_and_take_back(page: Open, root: Path) -> None:
    opened = shown(page(), strip(), root)
    press(opened, "Tab", "Tab", "ArrowRight", "Enter")
    assert opened.evaluate("() => model.get('selected')") == [0, 1]
    assert opened.get_by_role("option", selected=True).all_inner_texts() == ["·cat1"]
    press(opened, "ArrowRight", "Space")
    opened.get_by_role("option").nth(7).click()
    opened.get_by_role("option").nth(7).click()
    assert opened.evaluate("() => model.saved") == [[0, 1], [0, 2], [0, 7], []]
    assert opened.get_by_role("option", selected=True).count() == 0
    change(opened, "selected", [0, 3])
    assert opened.get_by_role("option", selected=True).all_inner_texts() == ["·the3"]


def test_escape_leaves_to_the_cell_around(page: Open, root: Path) -> None:
    opened = shown(page(), strip(), root)
    assert press(opened, "Tab", "Tab", "Escape") == "cell"


def test_only_keys_without_control_are_taken_and_shift_enter_runs_the_cell(page: Open, root: Path) -> None:
    opened = shown(page(), strip(), root)
    heard = """(keys) => keys.map((key) => {
        let passed = false;
        document.body.onkeydown = () => { passed = true; };
        const event = new KeyboardEvent("keydown", {...key, bubbles: true, cancelable: true});
        return [!document.querySelector("[role=option]").dispatchEvent(event), passed];
    })"""
    keys = [{"key": "End"}, {"key": "x"}, {"key": "s", "ctrlKey": True}, {"key": "Enter", "shiftKey": True}]
    assert opened.evaluate(heard, keys) == [[True, False], [False, False], [False, True], [False, True]]


def test_a_screen_reader_finds_a_list_of_tokens_with_their_values(page: Open, root: Path) -> None:
    opened = shown(page(), Strip((strip(3, "steered").rows[0], StripRow((" a",))), "nats", title="Two"), root)
    opened.get_by_role("option").nth(1).click()
    tree = opened.locator("#strip").aria_snapshot()
    assert re.search(r'listbox "Two":\s+- group "steered":\s+- option', tree) and 'group "row 2"' in tree
    assert """option "' the0', -1 nats, dropped": ·the0""" in tree
    assert """option "' cat1', -0.75 nats, kept" [selected]: ·cat1""" in tree
    assert tree.count("option") == 4 and """status: "' cat1', -0.75 nats, kept\"""" in tree


def test_the_line_tells_of_the_token_under_the_pointer_and_then_again_of_that_with_the_focus(
    page: Open, root: Path
) -> None:
    opened = shown(page(), strip(), root)
    assert "arrow keys move" in line(opened)
    opened.get_by_role("option").nth(4).hover()
    assert line(opened) == "' dogs4', 0 nats, kept" == opened.get_by_role("option").nth(4).get_attribute("title")
    press(opened, "Tab", "Tab")
    opened.get_by_role("option").nth(4).hover()
    opened.mouse.move(1, 1)
    assert line(opened) == "' the0', -1 nats, dropped"
    assert opened.get_by_role("status").get_attribute("aria-live") == "off", "the browser reads it already"


def test_other_values_recolour_the_same_tokens_where_the_reader_is(page: Open, root: Path) -> None:
    opened = shown(page(), strip(), root)
    opened.evaluate("() => { window.before = [...document.querySelectorAll('[role=option]')]; }")
    press(opened, "Tab", "Tab", "ArrowRight", "Enter")
    change(opened, "strip", strip(sign=-1.0).drawn())
    same = "() => [...document.querySelectorAll('[role=option]')].every((token, k) => token === before[k])"
    assert opened.evaluate(same)
    assert opened.evaluate(PLACE) == line(opened) == "' cat1', 0.75 nats, kept"
    assert opened.get_by_role("status").get_attribute("aria-live") == "polite", "a new value is read aloud"
    assert opened.get_by_role("option", selected=True).count() == 1
    colors = opened.get_by_role("option").evaluate_all(
        "all => all.slice(0, 2).map((token) => token.style.backgroundColor)"
    )
    assert colors == ["rgb(213, 94, 0)", "rgb(224, 134, 64)"]


def test_other_tokens_are_drawn_anew_and_the_reader_stays_inside(page: Open, root: Path) -> None:
    opened = shown(page(), strip(), root)
    press(opened, "Tab", "Tab", "End")
    change(opened, "strip", Strip((StripRow(("x", "y")),)).drawn())
    assert opened.get_by_role("option").all_inner_texts() == ["x", "y"] and opened.evaluate(PLACE) == "'x'" == line(
        opened
    )
    change(opened, "strip", Strip(()).drawn())
    assert opened.get_by_role("option").count() == 0 and "arrow keys move" in line(opened)
    change(opened, "strip", strip(3).drawn())
    opened.locator("#before").focus()
    assert press(opened, "Tab") == "' the0', -1 nats, dropped"


def test_a_strip_that_is_gone_draws_nothing_more(page: Open, root: Path) -> None:
    opened = shown(page(), strip(2), root)
    opened.evaluate("() => leave()")
    change(opened, "strip", strip(9).drawn())
    assert opened.get_by_role("option").count() == 2


def test_two_views_of_one_strip_show_the_same_selection(page: Open, root: Path) -> None:
    opened = shown(page(), strip(5), root)
    opened.evaluate("() => widget.render({model, el: document.getElementById('after').parentElement})")
    opened.get_by_role("option").nth(2).click()
    assert opened.get_by_role("option", selected=True).all_inner_texts() == ["·that2", "·that2"]


def test_hostile_text_stays_text(page: Open, root: Path) -> None:
    evil = ("<script>window.hit = 1</script>", "<img src=x onerror='hit = 1'>", "\u202egnp", "\ud800", "__proto__")
    made = Strip((StripRow(evil, notes=evil, label=evil[1]), StripRow(evil)), unit=evil[0], title=evil[1])
    opened = shown(page(), made, root)
    opened.get_by_role("option").nth(1).hover()
    assert opened.evaluate("() => window.hit") is None
    assert opened.locator("#strip script, #strip img").count() == 0
    assert opened.get_by_role("option").all_inner_texts() == made.drawn()["rows"][0]["shown"] * 2


def test_5000_tokens_arrive_at_once_and_are_recoloured_without_a_change_of_the_tree(page: Open, root: Path) -> None:
    opened = shown(page(), strip(2), root)
    watch = """() => { window.changes = 0; new MutationObserver((records) => { changes += records.length; })
        .observe(document.querySelector("[role=listbox]"), {childList: true, subtree: true}); }"""
    opened.evaluate(watch)
    change(opened, "strip", strip(5000).drawn())
    assert opened.evaluate("() => changes") == 1, "one fragment"
    change(opened, "strip", strip(5000, sign=-1.0).drawn())
    assert opened.evaluate("() => changes") == 1, "no node came or went"
    chunks = opened.locator(".workbench-strip-chunk")
    assert chunks.count() == 25
    assert set(chunks.evaluate_all("all => all.map((one) => getComputedStyle(one).contentVisibility)")) == {"auto"}
    assert press(opened, "Tab", "Tab", "End") == line(opened) == strip(5000, sign=-1.0).drawn()["rows"][0]["said"][-1]
    assert opened.evaluate("() => document.activeElement.getBoundingClientRect().bottom <= innerHeight"), "in sight"


@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1000, True), (480, False)])
def test_every_text_is_readable_and_nothing_is_cut(
    page: Open, root: Path, screenshot: Callable[..., Path], width: int, dark: bool
) -> None:
    long = StripRow(("x" * 300, "a\n", "b", " עברית"), label="a label of some length")
    opened = shown(
        page(width=width, height=500), Strip((*strip(80, "steered").rows, long), "nats", title="Two"), root, dark
    )
    press(opened, "Tab", "Tab", "ArrowDown", "Enter", "ArrowRight")
    colors = opened.get_by_role("option").evaluate_all(
        "all => all.map((one) => { const own = getComputedStyle(one); return [own.color, own.backgroundColor]; })"
    )
    assert min(contrast(*(in_hex(color) for color in pair)) for pair in colors) >= 4.5
    paper = opened.locator(".workbench-strip-paper")
    assert paper.evaluate("one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]") == [
        "rgb(0, 0, 0)",
        "rgb(255, 255, 255)",
    ]
    assert opened.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    screenshot(opened, f"strip_{width}_{'dark' if dark else 'light'}")


def test_print_shows_every_token_with_its_colour(page: Open, root: Path) -> None:
    opened = shown(page(height=400), strip(2000), root)
    opened.emulate_media(media="print")
    tokens = opened.locator(".workbench-strip-tokens")
    assert tokens.evaluate("one => one.scrollHeight <= one.clientHeight + 1 && one.clientHeight > 400")
    assert opened.get_by_role("option").first.evaluate("one => getComputedStyle(one).printColorAdjust") == "exact"


def test_the_static_twin_reads_the_same_without_a_script(page: Open, root: Path) -> None:
    opened = page(java_script_enabled=False)
    opened.set_content(f"<!doctype html><html lang=en><body>{strip(4).html()}</body></html>")
    tree = opened.locator("body").aria_snapshot()
    assert json.dumps(strip(4).drawn()["rows"][0]["said"][1]) in tree and tree.count("img") == 4


def test_in_jupyterlab_the_keys_move_in_the_strip_and_python_hears_of_the_selection(page: Open, lab: Any) -> None:
    make = "Strip((StripRow(('a', ' b', ' c'), (0.0, 1.0, 2.0)),), title='Three')"
    first = f"from workbench.widgets.strip import *\nshown = TokenStrip({make})\nshown"
    cells = [new_code_cell(first, id="first"), new_code_cell("print('selected', shown.selected)", id="second")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), lab.notebooks / "strip.ipynb")
    opened = page()
    opened.goto(lab.url("strip.ipynb", "strip"))
    drawn = opened.locator(".jp-CodeCell")
    opened.get_by_text("| Idle").first.wait_for(timeout=60_000)  # a cell that is run before its kernel is there is lost
    drawn.first.locator(".cm-content").click()
    opened.keyboard.press("Shift+Enter")
    tokens = opened.get_by_role("listbox", name="Three").get_by_role("option")
    tokens.first.focus(timeout=60_000)
    assert press(opened, "ArrowRight", "Enter") == "' b', 1"
    assert press(opened, "ArrowDown", "x") == "' b', 1" and drawn.count() == 2, "x cuts a cell, and did not"
    assert drawn.first.evaluate("cell => cell.classList.contains('jp-mod-active')"), (
        "arrows move between cells, and did not"
    )
    press(opened, "Escape")
    assert opened.evaluate("() => document.activeElement.closest('.jp-Notebook') !== null"), "back in the notebook"
    drawn.nth(1).locator(".cm-content").click()
    opened.keyboard.press("Shift+Enter")
    opened.get_by_text("selected [0, 1]").wait_for(timeout=30_000)


def in_hex(color: str) -> str:
    """ "rgb(1, 2, 3)" as "#010203"."""
    return "#" + "".join(f"{int(part):02X}" for part in re.findall(r"\d+", color)[:3])
