"""What may come in: pages and files by a short list, and of a browser's messages those alone that move a widget.

An ASGI application around the server's own, which never sees anything else: no request to execute, complete or inspect
code, no widget that a browser makes up, no path but these. Source: own; messages as in Jupyter's protocol 5.3.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

NBEXTENSIONS = ("anywidget", "jupyter-js-widgets", "jupyter-vue", "jupyter-vuetify")  # the JavaScript of widgets
FILES = ("/static/", "/_solara/cdn/", *(f"/jupyter/nbextensions/{name}/" for name in NBEXTENSIONS))
KERNEL, CLOSING = "/jupyter/api/kernels/", "/_solara/api/close/"
TARGETS = {"solara.control", "jupyter.widget.control"}  # what a browser may open: its page, and to ask for its widgets
METHODS = {"update", "custom", "request_state", "request_states", "run", "app-status"}
LARGEST_BYTES = 2**18  # of one message from a browser
UNTRUSTED = (b"forwarded", b"x-forwarded-", b"script-name", b"x-script-name")  # headers with which a proxy would speak
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline' blob:;"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data: {socket};"
    " worker-src 'self' blob:; frame-ancestors 'self'; form-action 'none'; base-uri 'none'"
)  # a browser itself then asks nobody else
STYLE = """<style>body { font: 17px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem;
color: #222; } a { color: #0072B2; } li { margin: .6rem 0; } small { color: #555; }</style>"""


class Doors:
    """The application `inner` behind doors.

    pages      path -> HTML of its own, or None where `inner` makes the page
    n_seats    visitors at a time; the next one is told in words that the room is full
    """

    def __init__(self, inner: App, pages: Mapping[str, str | None], n_seats: int) -> None:
        self.inner, self.pages, self.n_seats = inner, pages, n_seats
        self.seated: Counter[str] = Counter()  # connections by the kernel id that a page of a visitor has
        self.cookies: dict[str, str] = {}  # by the same, for who reloads a page of their own in a full room

    @property
    def full(self) -> bool:
        return len(self.seated) >= self.n_seats

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._visit(scope, receive, send)
        else:
            await self._page(_plain(scope), receive, send)

    async def _page(self, scope: Message, receive: Receive, send: Send) -> None:
        path, reading = scope["path"], scope["method"] in ("GET", "HEAD")
        if not self._open(path, scope["method"]):
            await _say(send, 404, "Nothing here", "There is no such page. <a href='/'>To the desks</a>")
        elif not reading or path.startswith(FILES):
            await self.inner(scope, receive, send)
        elif (page := self.pages[path]) is not None:
            await _answer(send, 200, page)
        elif self.full and _header(scope, b"cookie") not in filter(None, self.cookies.values()):
            seats = f"All {self.n_seats} seats are taken. A seat is free as soon as somebody closes a desk."
            await _say(send, 503, "The room is full", f"{seats} Reload this page then.")
        else:
            await self.inner(scope, receive, _guarded(send, _header(scope, b"host")))

    def _open(self, path: str, method: str) -> bool:
        if method == "POST":
            return path.startswith(CLOSING) and "/" not in path.removeprefix(CLOSING)
        return method in ("GET", "HEAD") and (path in self.pages or (path.startswith(FILES) and ".." not in path))

    async def _visit(self, scope: Message, receive: Receive, send: Send) -> None:
        """A browser's connection: counted while it lasts, its messages looked at one by one."""
        visitor = scope["path"].removeprefix(KERNEL).partition("/")[0]
        at_the_door = scope["path"].startswith(KERNEL) and _same_origin(scope)
        if not at_the_door or (self.full and visitor not in self.seated):
            await receive()  # the request to connect
            await send({"type": "websocket.close", "code": 1008 if not at_the_door else 1013})
            return

        async def looked_at() -> Message:
            while True:
                message = await receive()
                if message["type"] != "websocket.receive" or allowed(message.get("text")):
                    return message

        self.seated[visitor] += 1
        self.cookies[visitor] = _header(scope, b"cookie")
        try:
            await self.inner(_plain(scope), looked_at, send)
        finally:
            self.seated[visitor] -= 1
            if not self.seated[visitor]:
                del self.seated[visitor], self.cookies[visitor]


def allowed(text: str | None) -> bool:
    """Whether a message of a browser moves a widget, or asks what its page needs to know; no more is let in."""
    if text is None or len(text) > LARGEST_BYTES:  # bytes carry files, which no desk takes
        return False
    try:
        message = json.loads(text)
        kind, content = message["header"]["msg_type"], message["content"]
        if kind in ("kernel_info_request", "comm_info_request", "comm_close"):
            return message["channel"] == "shell"
        if kind == "comm_open":
            return content["target_name"] in TARGETS and message["channel"] == "shell"
        return kind == "comm_msg" and content["data"]["method"] in METHODS and message["channel"] == "shell"
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _same_origin(scope: Message) -> bool:
    """Whether the page that asks for a connection is one of this server; a program that is no browser names none."""
    origin = _header(scope, b"origin")
    return not origin or origin.partition("://")[2] == _header(scope, b"host")


def _header(scope: Message, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _plain(scope: Message) -> Message:
    """The request without what only a proxy may say: one visitor's header would move the pages of all."""
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if not name.startswith(UNTRUSTED)]}


def _guarded(send: Send, host: str) -> Send:
    """Sends a page with the policy that keeps a browser from asking anybody else."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_policy(host)]
        await send(message)

    return sent


def _policy(host: str) -> list[tuple[bytes, bytes]]:
    name = host if host and all(char.isalnum() or char in ".:-[]" for char in host) else "'none'"
    policy = POLICY.format(socket=f"ws://{name}" if name != "'none'" else "")
    return [(b"content-security-policy", policy.encode("latin-1")), (b"x-content-type-options", b"nosniff")]


async def _say(send: Send, status: int, title: str, words: str) -> None:
    await _answer(send, status, page(title, f"<p>{words}</p>"))


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    headers += [*_policy(""), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def page(title: str, body: str) -> str:
    """A plain page; `body` is HTML, `title` text."""
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
    head += "<meta name='viewport' content='width=device-width'><link rel='icon' href='data:,'>"
    return f"{head}{STYLE}<h1>{html.escape(title)}</h1>{body}</html>"
