"""What the fixtures of this folder watch for: a page's trouble is noticed, and only a page's trouble."""

from __future__ import annotations

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="


def test_a_request_to_another_machine_is_noticed_and_goes_nowhere(page, troubles):
    tab = page()
    with tab.expect_event("requestfailed") as failed:
        tab.set_content('<img src="http://example.org/a.png">')
    assert failed.value.failure == "net::ERR_NAME_NOT_RESOLVED"
    assert "request left the machine: http://example.org/a.png" in troubles.unexpected()
    troubles.expected += ["http://example.org/a.png"]


def test_an_address_given_in_numbers_goes_nowhere_either(page, troubles):
    tab = page()
    with tab.expect_event("requestfailed") as failed:
        tab.set_content('<img src="http://192.0.2.1/a.png">')  # an address for documentation, RFC 5737
    assert failed.value.failure == "net::ERR_NAME_NOT_RESOLVED"
    troubles.expected += ["http://192.0.2.1/a.png"]


def test_errors_of_a_page_are_noticed(page, troubles):
    tab = page()
    tab.evaluate("() => console.error('said')")
    with tab.expect_event("pageerror"):
        tab.evaluate("() => setTimeout(() => { throw new Error('thrown'); })")
    assert [line.split(" (")[0] for line in troubles.unexpected()] == ["console: said", "page error: thrown"]
    troubles.expected += ["^console: said", "^page error: thrown$"]
    assert not troubles.unexpected()


def test_what_a_page_carries_in_itself_is_no_trouble(page, troubles):
    tab = page(width=480)
    tab.set_content(f'<img src="{PIXEL}">')
    tab.evaluate("async () => fetch(URL.createObjectURL(new Blob(['here'])))")
    tab.evaluate("() => console.warn('only a warning')")
    assert tab.viewport_size == {"width": 480, "height": 900} and not troubles.found
