"""An exported desk in a real browser: it opens where the desk stood, its controls move in the grid, its address keeps
the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from plain_desk import HOSTILE, Plain
from playwright.sync_api import Page, expect

from workbench import Subject


@pytest.fixture
def desk() -> Plain:
    return Plain(Subject.tiny("llama", verify=False), size=3)


def test_a_page_opens_where_the_desk_stood(desk: Plain, page: Callable[..., Page], tmp_path: Path) -> None:
    for settings in ((), ("size",)):  # of one setting alone, too
        tab = page()
        tab.goto(desk.export_html(tmp_path / "desk.html", *settings).as_uri())
        expect(tab.locator(".gtitle")).to_have_text("bars 3")
        expect(tab.locator("output").last).to_have_text("3")
        expect(tab.locator("#rest")).to_contain_text("3 units")


def test_a_text_with_a_script_in_it_is_shown_and_not_run(
    desk: Plain, page: Callable[..., Page], tmp_path: Path
) -> None:
    tab, alerts = page(), []
    tab.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    tab.goto(desk.export_html(tmp_path / "desk.html").as_uri())
    tab.get_by_role("slider").focus()
    tab.keyboard.press("ArrowRight")  # a picture put in by the page's own script, too
    expect(tab.locator("#rest")).to_contain_text("4 units")
    assert HOSTILE in (tab.locator("#rest").text_content() or "") and not alerts


def test_its_controls_move_by_keyboard_and_its_address_keeps_the_place(
    desk: Plain, page: Callable[..., Page], tmp_path: Path
) -> None:
    tab = page()
    tab.goto(desk.export_html(tmp_path / "desk.html").as_uri())
    tab.get_by_role("slider").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator(".gtitle")).to_have_text("bars 4")
    expect(tab.locator("#rest")).to_contain_text("4 units")
    tab.get_by_role("combobox").select_option("lines")
    expect(tab.locator(".gtitle")).to_have_text("lines 4")
    assert tab.url.endswith("#1,4")
    tab.reload()
    expect(tab.locator(".gtitle")).to_have_text("lines 4")
    tab.goto(tab.url.replace("#1,4", "#1,9"))
    tab.reload()
    expect(tab.locator(".gtitle")).to_have_text("bars 3")


def test_what_can_not_be_shown_is_told_and_the_last_picture_stays(
    desk: Plain, page: Callable[..., Page], tmp_path: Path
) -> None:
    tab = page()
    tab.goto(desk.changed(kind="lines").export_html(tmp_path / "desk.html").as_uri())
    expect(tab.locator(".gtitle")).to_have_text("lines 3")
    tab.get_by_role("slider").focus()
    tab.keyboard.press("ArrowLeft")
    expect(tab.get_by_role("alert")).to_have_text("size 2 can't be drawn as lines. Choose another.")
    expect(tab.locator(".gtitle")).to_have_text("lines 3")
    tab.keyboard.press("ArrowLeft")
    expect(tab.locator(".gtitle")).to_have_text("lines 1")
    expect(tab.get_by_role("alert")).to_have_text("")
