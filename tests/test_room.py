"""The room: turns, seats and doors by themselves, then the real server with a hostile client that is no browser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from workbench.cli import main
from workbench.room import doors
from workbench.room.doors import Doors, allowed
from workbench.room.serving import Room, chosen, is_loopback, open_port
from workbench.room.turns import LONGEST, Seat, Turns
from workbench.subject import Subject
from workbench.widgets.steering import SteeringDesk

PATIENCE_S = 120  # for what takes seconds on a quiet machine
SECRET = "the-teacher-s-secret"


@pytest.fixture
def turns() -> Iterator[Turns]:
    made = Turns()
    yield made
    made.close()


# Turns


def test_one_computes_at_a_time_in_the_order_of_asking(turns: Turns) -> None:
    inside, most, order = 0, 0, []
    gate = threading.Event()

    def work(number: int) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        gate.wait(10)
        order.append(number)
        inside -= 1

    askers = []
    for number in range(5):
        askers.append(threading.Thread(target=turns.take, args=(lambda number=number: work(number),)))
        askers[-1].start()
        while turns._thread._work_queue.qsize() < number:  # until this one waits in line
            time.sleep(0.001)
    gate.set()
    for asker in askers:
        asker.join()
    assert most == 1 and order == [0, 1, 2, 3, 4]


def test_an_error_comes_to_the_one_who_asked_and_the_next_is_served(turns: Turns) -> None:
    with pytest.raises(ZeroDivisionError):
        turns.take(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="of its own"):
        turns.take(lambda: _raise(RuntimeError("of its own")))
    assert turns.take(lambda: 7) == 7


def test_after_closing_nothing_is_computed_and_words_say_so(turns: Turns) -> None:
    turns.close()
    with pytest.raises(ValueError, match="The room is closing"):
        turns.take(lambda: 7)


def _raise(error: Exception) -> None:
    raise error


# Seats


def seat(turns: Turns, subject: Subject | None = None, **settings: Any) -> Seat:
    return Seat(SteeringDesk(subject or Subject.tiny(), new_tokens=2, **settings), turns)


def test_visitors_at_the_same_time_see_what_each_would_see_alone(turns: Turns) -> None:
    strengths = (-1.5, 0.0, 0.75, 1.5)
    alone = [seat(turns, strength=strength).picture().html() for strength in strengths]
    subject = Subject.tiny()
    seats = [seat(turns, subject).changed(strength=strength) for strength in strengths]
    seen: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: seen.update({n: seats[n].picture().html()})) for n in range(len(strengths))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [seen[n] for n in range(len(strengths))] == alone
    assert subject.active == () and len(set(alone)) > 1


def test_a_file_that_a_program_may_name_is_not_for_visitors(turns: Turns, tmp_path: Path) -> None:
    file = tmp_path / "direction.safetensors"
    taken = seat(turns)
    assert SteeringDesk(taken.desk.subject, direction=str(file)).direction == str(file)
    with pytest.raises(ValueError, match=r"direction: got .*, expected one of"):
        taken.changed(direction=str(file))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": "a" * (LONGEST + 1)}, f"got {LONGEST + 1} characters, expected {LONGEST} at most"),
        ({"subject": None}, "got setting 'subject', expected one of"),
        ({"memo": None}, "got setting 'memo'"),
        ({"layer": 10**9}, "layer: got 1000000000, expected a number from"),
        ({"new_tokens": 10**6}, "new_tokens: got 1000000"),
        ({"strength": float("nan")}, "strength: got nan"),
    ],
)
def test_a_visitor_gets_no_further_than_the_controls_go(turns: Turns, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        seat(turns).changed(**settings)


def test_a_hidden_control_lets_no_more_through_than_a_shown_one(turns: Turns) -> None:
    hidden = seat(turns, view="layer by strength")
    assert not {control.name: control.shown for control in hidden.controls()}["layer"]
    with pytest.raises(ValueError, match="layer: got 999"):
        hidden.changed(layer=999)


# Doors


def message(kind: str, content: Any, channel: str = "shell") -> str:
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": kind,
        "session": "s",
        "username": "",
        "version": "5.3",
        "date": "",
    }
    whole = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": channel}
    return json.dumps({**whole, "buffers": []})


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("kernel_info_request", {}),
        ("comm_info_request", {"target_name": "jupyter.widget"}),
        ("comm_open", {"comm_id": "a", "target_name": "solara.control", "data": {}}),
        ("comm_msg", {"comm_id": "a", "data": {"method": "update", "state": {"value": 3}}}),
        ("comm_msg", {"comm_id": "a", "data": {"method": "custom", "content": {"event": "click"}}}),
        ("comm_close", {"comm_id": "a"}),
    ],
)
def test_what_a_page_needs_comes_in(kind: str, content: dict[str, Any]) -> None:
    assert allowed(message(kind, content))


HOSTILE = [
    *(message(kind, {"code": "1"}) for kind in ("execute_request", "inspect_request", "complete_request")),
    *(message(kind, {}) for kind in ("history_request", "is_complete_request", "connect_request", "input_reply")),
    *(message(kind, {}, "control") for kind in ("debug_request", "shutdown_request", "interrupt_request")),
    message("kernel_info_request", {}, "control"),
    message("comm_open", {"comm_id": "a", "target_name": "jupyter.widget", "data": {"state": {}}}),
    message("comm_open", {"comm_id": "a", "target_name": "os.system", "data": {}}),
    message("comm_msg", {"comm_id": "a", "data": {"method": "reload"}}),
    message("comm_msg", {"comm_id": "a", "data": {"method": "evict"}}),
    message("comm_msg", {"comm_id": "a", "data": {"method": ["update"]}}),
    message("comm_msg", {"comm_id": "a", "data": {"method": "update", "state": {"value": "a" * doors.LARGEST_BYTES}}}),
    *("", "null", "[]", "{}", "not json", "[" * 100_000, '{"header": {"msg_type": "comm_msg"}, "content": 3}'),
]


@pytest.mark.parametrize("text", [None, *HOSTILE], ids=range(len(HOSTILE) + 1))
def test_nothing_else_does(text: str | None) -> None:
    assert not allowed(text)


@dataclass
class Inner:
    """An application that says which requests reached it, and answers 200."""

    reached: list[dict[str, Any]]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope)
        if scope["type"] == "websocket":
            while (await receive())["type"] != "websocket.disconnect":
                pass
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inner"})


def ask(
    through: Doors, path: str, method: str = "GET", headers: tuple[tuple[bytes, bytes], ...] = ()
) -> tuple[int, str]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
    asyncio.run(through(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], sent[1]["body"].decode()


PAGES = {"/": "<p>all desks</p>", "/steering": None}


@pytest.mark.parametrize(
    "path",
    [
        *("/files/x", "/api/contents/x", "/readyz", "/resourcez", "/steering/x", "/static/../x", "//steering", ""),
        *("/_solara/cdn/a/../../x", "/jupyter/nbextensions/other/x", "/jupyter/api/kernels/1", "/_solara/api/evict/1"),
    ],
)
def test_any_other_path_leads_nowhere_and_never_reaches_the_server(path: str) -> None:
    inner = Inner([])
    assert ask(Doors(inner, PAGES, 1), path)[0] == 404
    assert ask(Doors(inner, PAGES, 1), path, "POST")[0] == 404 and not inner.reached


def test_pages_and_their_files_are_served_and_a_proxys_headers_are_not_believed() -> None:
    inner = Inner([])
    through = Doors(inner, PAGES, 1)
    assert ask(through, "/") == (200, "<p>all desks</p>") and not inner.reached
    for path in ("/steering", "/static/a.js", "/jupyter/nbextensions/anywidget/index.js"):
        assert ask(through, path, headers=((b"x-script-name", b"evil"), (b"host", b"here"))) == (200, "inner")
    assert {name for scope in inner.reached for name, _ in scope["headers"]} == {b"host"}
    assert ask(through, "/steering", "DELETE")[0] == 404


def connect(through: Doors, kernel: str, headers: list[tuple[bytes, bytes]], stay: asyncio.Event) -> Any:
    """One connection that says nothing and stays until `stay`; the messages it was sent."""
    sent: list[Any] = []

    async def receive() -> Any:
        await stay.wait()
        return {"type": "websocket.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": f"/jupyter/api/kernels/{kernel}/channels", "headers": headers}
    return sent, through(scope, receive, send)


def test_the_next_visitor_after_the_last_seat_is_told_so_until_somebody_leaves() -> None:
    async def room() -> None:
        through, stay = Doors(Inner([]), PAGES, 1), asyncio.Event()
        _, visit = connect(through, "one", [], stay)
        sitting = asyncio.ensure_future(visit)
        await asyncio.sleep(0)
        assert through.full
        refused, late = connect(through, "two", [], stay)
        stay.set()
        await late
        await sitting
        assert refused == [{"type": "websocket.close", "code": 1013}] and not through.full and not through.seated

    asyncio.run(room())
    through = Doors(Inner([]), PAGES, 1)
    through.seated["one"] = 1
    status, words = ask(through, "/steering")
    assert status == 503 and "All 1 seats are taken" in words and ask(through, "/")[0] == 200
    through.cookies["one"] = "session=mine"
    assert ask(through, "/steering", headers=((b"cookie", b"session=mine"),))[0] == 200  # reloads the page
    assert ask(through, "/steering", headers=((b"cookie", b"session=other"),))[0] == 503


def test_a_page_of_another_site_gets_no_connection() -> None:
    async def visit(origin: bytes) -> tuple[int, list[Any]]:
        inner, stay = Inner([]), asyncio.Event()
        stay.set()
        sent, connection = connect(Doors(inner, PAGES, 1), "one", [(b"host", b"a:1"), (b"origin", origin)], stay)
        await connection
        return len(inner.reached), sent

    assert asyncio.run(visit(b"http://a:1")) == (1, [])
    assert asyncio.run(visit(b"http://evil:1")) == (0, [{"type": "websocket.close", "code": 1008}])


# The room and its command


def test_every_desk_has_a_page_and_a_model_without_one_is_told_why() -> None:
    class Absent(SteeringDesk):
        def fitted(self) -> dict[str, Any]:
            raise ValueError("this model has no <neurons>")

    kinds = chosen([])
    assert list(kinds) == ["steering", "cache", "pruning", "neuron", "lens", "dice", "compose"]
    assert kinds["steering"] is SteeringDesk and list(chosen(["steering"])) == ["steering"]
    room = Room(Subject.tiny(), {"steering": SteeringDesk, "absent": Absent}, 3)
    index = room.index()
    assert "<a href='/steering'>" in index and "/absent" not in index and "no &lt;neurons&gt;" in index
    room.turns.close()


def test_mistakes_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "flying"]) == 2
    assert "got desk 'flying', expected some of " in capsys.readouterr().err
    with open_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1 port {port}: Address already in use. Choose another with --port." in error
    assert error.count("\n") == 1
    for port in (-1, 2**16, 10**12):
        assert main(["demo", f"--port={port}"]) == 2
        assert capsys.readouterr().err == f"workbench: demo: got port {port}, expected 0 to 65535.\n"


def test_this_machine_alone_is_served_unless_told_otherwise_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = []

    def serve(room: Room, opened: socket.socket) -> None:
        with opened, closing(room.turns):
            hosts.append(opened.getsockname()[0])

    monkeypatch.setattr("workbench.room.serving.serve", serve)
    words = ["demo", "steering", "--model", "tiny:llama", "--port", "0"]
    assert main(words) == 0 and capsys.readouterr().err == ""
    assert main([*words, "--host", "0.0.0.0"]) == 0
    assert "0.0.0.0 can be reached from other machines, without a password" in capsys.readouterr().err
    assert hosts == ["127.0.0.1", "0.0.0.0"]


def test_without_what_serves_a_room_words_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "solara", None)  # as if it were not installed
    monkeypatch.setattr(os, "environ", dict(os.environ))
    room = Room(Subject.tiny(), {}, 1)
    with pytest.raises(ValueError, match=r"pip install 'workbench\[demo\]'"):
        room.application(str(tmp_path))
    room.turns.close()


def test_only_addresses_of_this_machine_are_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"))


# The real server


@dataclass
class Server:
    """A running `workbench demo`."""

    process: subprocess.Popen[str]
    port: int
    folder: Path

    def get(self, path: str) -> tuple[int, str]:
        """Status and text, the path sent as it is."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(2**16), b"")).decode("utf-8", "replace")
        return int(answer.split()[1]), answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo: Callable[..., Any]) -> Iterator[Server]:
    """The room of two seats on the tiny model, its working folder holding a secret."""
    pytest.importorskip("websockets", reason="what serves a room is not installed: pip install 'workbench[demo]'")
    folder = tmp_path_factory.mktemp("room")
    (folder / "secret.txt").write_text(SECRET)
    with demo(folder, "--model", "tiny:llama") as (process, address):
        yield Server(process, int(address.removeprefix("http://127.0.0.1:")), folder)


class Visitor:
    """A client that is no browser: opens a desk as a page would, remembers its widgets, and may say anything."""

    def __init__(self, server: Server, path: str = "/steering") -> None:
        from websockets.sync.client import connect as connection

        self.kernel, self.page = str(uuid.uuid4()), str(uuid.uuid4())
        self.server = server
        where = f"ws://127.0.0.1:{server.port}/jupyter/api/kernels/{self.kernel}/channels?session_id={self.page}"
        self.held = ExitStack()
        self.socket = self.held.enter_context(connection(where, max_size=None, open_timeout=PATIENCE_S))
        self.widgets: dict[str, dict[str, Any]] = {}
        self.kinds: set[str] = set()
        self.heard = ""  # every word of every message
        self.say("comm_open", {"comm_id": "page", "target_name": "solara.control", "data": {}})
        themes = {"themes": {"light": {}, "dark": {}}, "dark": False}
        self.tell("page", {"method": "run", "args": {"path": path, **themes}})

    def say(self, kind: str, content: Any, channel: str = "shell") -> None:
        self.socket.send(message(kind, content, channel))

    def tell(self, widget: str, data: dict[str, Any]) -> None:
        self.say("comm_msg", {"comm_id": widget, "data": data})

    def set(self, widget: str, **state: Any) -> None:
        self.tell(widget, {"method": "update", "state": state, "buffer_paths": []})

    def wait(self, done: Callable[[], bool]) -> None:
        """Take in what the server says until `done`."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, self.text()
            self.listen(1)

    def rest(self) -> None:
        """Take in what the server says until it says nothing for a while."""
        while self.listen(2):
            pass

    def listen(self, seconds: float) -> bool:
        """Take in one message; False when none comes."""
        try:
            heard = self.socket.recv(timeout=seconds)
        except TimeoutError:
            return False
        self.heard += str(heard)
        self.hear(json.loads(heard) if isinstance(heard, str) else {})
        return True

    def hear(self, heard: dict[str, Any]) -> None:
        kind = heard.get("header", {}).get("msg_type", "bytes")
        self.kinds.add(kind)
        if kind == "comm_open":
            self.widgets[heard["content"]["comm_id"]] = heard["content"]["data"].get("state", {})
        elif kind == "comm_msg" and heard["content"]["data"].get("method") == "update":
            self.widgets.setdefault(heard["content"]["comm_id"], {}).update(heard["content"]["data"]["state"])

    def text(self) -> str:
        """All words that its page shows."""
        return " ".join(str(state.get("value", "")) for state in self.widgets.values())

    def widget(self, description: str) -> str:
        return next(key for key, state in self.widgets.items() if state.get("description") == description)

    def leave(self) -> None:
        where = f"http://127.0.0.1:{self.server.port}/_solara/api/close/{self.kernel}?session_id={self.page}"
        urllib.request.urlopen(urllib.request.Request(where, method="POST"), timeout=PATIENCE_S).close()
        self.held.close()


@pytest.fixture
def visitor(server: Server) -> Iterator[Callable[..., Visitor]]:
    seated: list[Visitor] = []

    def sit(**options: Any) -> Visitor:
        seated.append(Visitor(server, **options))
        return seated[-1]

    yield sit
    for each in seated:
        each.leave()


def test_a_hostile_client_gets_nothing_executed_and_the_desk_goes_on(server: Server, visitor: Any) -> None:
    guest = visitor()
    guest.wait(lambda: "answered in" in guest.text())
    loot = server.folder / "loot"
    code = f"open({str(loot)!r}, 'w').write('taken')"
    guest.say(
        "execute_request", {"code": code, "silent": False, "user_expressions": {"a": code}, "store_history": True}
    )
    guest.say("execute_request", {"code": code}, "control")
    guest.say("inspect_request", {"code": code, "cursor_pos": 4})
    guest.say("complete_request", {"code": f"{code}; open(", "cursor_pos": 4})
    guest.say("debug_request", {"type": "request", "command": "evaluate", "arguments": {"expression": code}}, "control")
    made = {"_model_module": "@jupyter-widgets/output", "_model_name": "OutputModel", "_view_name": "OutputView"}
    guest.say("comm_open", {"comm_id": "mine", "target_name": "jupyter.widget", "data": {"state": made}})
    guest.say("shutdown_request", {"restart": False})
    guest.socket.send(b"\x00\x00\x00\x01" * 8)
    guest.set(guest.widget("direction"), _options_labels=[str(server.folder / "secret.txt")], index=0)
    guest.set(guest.widget("direction"), index=10**6)
    guest.set(guest.widget("direction"), value="../secret.txt", label="../secret.txt", options=["../secret.txt"])
    guest.set(guest.widget("tokens to write"), max=10**9, value=10**9)
    guest.wait(lambda: "new_tokens: got 1000000000, expected a whole number from 1 to 64" in guest.text())
    guest.set(guest.widget("prompts, one per line"), value=f"__import__('os').system('touch {loot}')")
    guest.wait(lambda: "touch" in guest.text() and "answered in" in guest.text())
    assert not loot.exists() and SECRET not in guest.heard
    assert not {kind for kind in guest.kinds if kind.endswith("_reply")} and "mine" not in guest.widgets


def test_a_visitor_sees_no_widget_of_another(server: Server, visitor: Any) -> None:
    one, two = visitor(), visitor()
    for guest in (one, two):
        guest.wait(lambda guest=guest: "answered in" in guest.text())
    one.rest()
    foreign, before = one.widget("layer"), json.dumps(one.widgets)
    assert foreign not in two.widgets
    two.set(foreign, value=1)
    two.say("comm_open", {"comm_id": "all", "target_name": "jupyter.widget.control", "data": {}})
    two.tell("all", {"method": "request_states"})
    two.set(two.widget("layer"), value=0)
    two.wait(lambda: "working" in two.text())
    two.wait(lambda: "answered in" in two.text())
    one.rest()
    assert json.dumps(one.widgets) == before and foreign not in two.widgets and foreign not in two.heard


def test_keep_this_tells_the_command_and_writes_nothing(server: Server, visitor: Any) -> None:
    guest = visitor()
    guest.wait(lambda: "answered in" in guest.text())
    before = sorted(server.folder.rglob("*"))
    guest.tell(guest.widget("Keep this"), {"method": "custom", "content": {"event": "click"}})
    guest.wait(lambda: "workbench run notebooks/" in guest.text())
    assert sorted(server.folder.rglob("*")) == before and not (server.folder / "runs").exists()


@pytest.mark.parametrize(
    "path",
    [
        *("/static/{}", "/static/assets/{}", "/_solara/cdn/{}", "/jupyter/nbextensions/anywidget/{}"),
        *("/files/{}", "/api/contents/{}", "/static/public/{}", "/voila/files/{}"),
    ],
)
def test_no_path_leads_to_a_file_of_the_server(server: Server, path: str) -> None:
    up = "../" * 12
    ways = (up, up.replace("/", "%2f"), up.replace(".", "%2e"), up.replace("../", "..%5c"), "%252e%252e%252f" * 12, "/")
    for way in ways:
        status, text = server.get(path.format(way + str(server.folder / "secret.txt").lstrip("/")))
        assert status in (400, 404) and SECRET not in text
    assert server.get(path.format("secret.txt"))[0] == 404


def test_nothing_of_development_is_on_and_pages_ask_nobody_else(server: Server) -> None:
    status, text = server.get("/steering")
    assert status == 200 and "solara.production = true" in text
    policy = next(line for line in text.splitlines() if line.startswith("content-security-policy"))
    assert "default-src 'self'" in policy and f"ws://127.0.0.1:{server.port}" in policy
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=.?(?:https?:)?//", text)
    assert server.get("/resourcez")[0] == server.get("/readyz")[0] == 404


def test_a_full_room_says_so_and_has_a_seat_once_somebody_left(server: Server, visitor: Any) -> None:
    from websockets.exceptions import InvalidStatus

    first, second = visitor(), visitor()
    first.wait(lambda: bool(first.widgets))
    second.wait(lambda: bool(second.widgets))
    status, text = server.get("/steering")
    assert status == 503 and "All 2 seats are taken" in text
    with pytest.raises(InvalidStatus):
        Visitor(server)
    first.leave()
    deadline = time.monotonic() + PATIENCE_S
    while server.get("/steering")[0] == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    third = visitor()
    third.wait(lambda: "answered in" in third.text())


def test_ctrl_c_closes_the_room_cleanly(server: Server) -> None:
    guest = Visitor(server)
    guest.wait(lambda: bool(guest.widgets))
    log = server.folder / "log.txt"
    before = len(log.read_text())
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=PATIENCE_S) == 0
    assert server.process.stdout is not None and "the room is closed" in server.process.stdout.read()
    assert "Traceback" not in log.read_text()[before:]
    guest.held.close()
