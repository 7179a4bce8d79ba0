"""The room in a real browser: two visitors at the desks of one server, and no request that leaves the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

PATIENCE_MS = 120_000  # for a first picture, on a busy machine


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, demo: Callable[..., Any]) -> Iterator[str]:
    """Where `workbench demo` serves a desk of the organism, two visitors at a time."""
    folder = tmp_path_factory.mktemp("room")
    with demo(folder) as (_, address):
        yield address
    assert not (folder / "runs").exists()


def picture(page: Page) -> str:
    """The title of the figure, once there is one."""
    title = page.locator(".js-plotly-plot .gtitle")
    expect(title).not_to_be_empty(timeout=PATIENCE_MS)
    expect(page.locator(".workbench-busy")).to_contain_text("answered in", timeout=PATIENCE_MS)
    return title.text_content() or ""


def test_two_visitors_move_their_own_desks_and_a_third_waits(
    address: str, page: Callable[..., Page], screenshot: Callable[..., Path], troubles: object
) -> None:
    one, two = page(), page(800)
    one.goto(address)
    screenshot(one, "room_index")
    one.get_by_role("link", name="steering").click()
    two.goto(f"{address}/steering")
    first, second = picture(one), picture(two)
    assert first == second and "layer 3" in first
    one.locator(".widget-slider", has_text="layer").get_by_role("slider").focus()
    one.keyboard.press("ArrowRight")
    expect(one.locator(".js-plotly-plot .gtitle")).to_contain_text("layer 4", timeout=PATIENCE_MS)
    assert picture(two) == second
    two.get_by_role("button", name="Keep this").click()
    expect(two.locator(".workbench-kept")).to_contain_text("workbench run notebooks/71", timeout=PATIENCE_MS)
    screenshot(one, "room_1400", full_page=True)
    screenshot(two, "room_800", full_page=True)
    troubles.expected.append("503")  # type: ignore[attr-defined]
    third = page()
    third.goto(f"{address}/steering")
    expect(third.locator("h1")).to_have_text("The room is full")
    one.close()
    third.wait_for_timeout(500)
    third.reload()
    assert picture(third) == second


def test_every_desk_of_a_room_draws_its_own_picture(
    tmp_path: Path, demo: Callable[..., Any], page: Callable[..., Page], screenshot: Callable[..., Path], troubles: Any
) -> None:
    troubles.expected.append("^console: Could not send widget sync message")  # of a page that is just being left
    with demo(tmp_path, desks=()) as (_, address):
        index = page()
        index.goto(address)
        names = index.get_by_role("link").all_text_contents()
        assert {"steering", "cache", "pruning", "neuron", "lens", "dice", "compose"} <= set(names)
        titles = set()
        for name in names:
            index.goto(f"{address}/{name}")
            titles.add(picture(index))
            screenshot(index, f"room_{name}", full_page=True)
        index.close()
    assert len(titles) == len(names)
