"""The room itself: one subject, its desks as pages, Solara's virtual kernels behind the doors, uvicorn before them.

Each visitor has a kernel without code, with widgets and settings of their own; `Turns` computes for all. Solara patches
threads and widgets of the process that imports it, which is why only this file does, and inside functions. Source: own.
"""

from __future__ import annotations

import html
import importlib
import inspect
import ipaddress
import os
import pkgutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from importlib import metadata
from pathlib import Path
from typing import Any

from workbench import widgets
from workbench.memo import Memo
from workbench.room.doors import LARGEST_BYTES, Doors, page
from workbench.room.turns import Seat, Turns
from workbench.subject import Subject
from workbench.widgets.desk import REMEMBERED, Desk
from workbench.widgets.face import Answer, Face, Moved
from workbench.widgets.newest import Later

LEAVING_S = 10  # after a connection is lost, until its widgets are forgotten: a page that is reloaded comes back sooner
CLOSING_S = 2  # for connections to end once the room closes
SETTINGS = {  # read by Solara and anywidget at import: no reports to makers, no watching of files
    "SOLARA_TELEMETRY_MIXPANEL_ENABLE": "false",
    "SOLARA_MODE": "production",
    "SOLARA_KERNEL_CULL_TIMEOUT": f"{LEAVING_S}s",
    "SOLARA_SESSION_HTTP_ONLY": "true",
    "SOLARA_THEME_SHOW_BANNER": "false",
    "SOLARA_THEME_TITLE": "workbench",
    "SOLARA_ASSETS_FONTAWESOME_ENABLED": "false",
    "ANYWIDGET_HMR": "0",
}


def desk_classes() -> dict[str, type[Desk]]:
    """Every desk by its short name, such as "steering", in the order of their notebooks."""
    for module in pkgutil.iter_modules(widgets.__path__):
        importlib.import_module(f"workbench.widgets.{module.name}")
    found = [kind for kind in Desk.__subclasses__() if not inspect.isabstract(kind)]
    ours = [kind for kind in found if kind.__module__.startswith("workbench.")]
    return {_short(kind): kind for kind in sorted(ours, key=lambda kind: kind.notebook)}


def _short(kind: type[Desk]) -> str:
    return kind.__name__.removesuffix("Desk").lower()


def chosen(names: Sequence[str]) -> dict[str, type[Desk]]:
    """The named desks, or all. ValueError for an unknown name."""
    known = desk_classes()
    for name in names:
        if name not in known:
            raise ValueError(f"demo: got desk {name!r}, expected some of {', '.join(known)}.")
    return {name: known[name] for name in names or known}


class Room:
    """Desks over one subject, for at most `n_seats` visitors at a time.

    desks      short name -> the desk at which everybody begins; all that are made of it share what was computed
    missing    short name -> why the subject has no such desk
    """

    def __init__(self, subject: Subject, kinds: dict[str, type[Desk]], n_seats: int) -> None:
        if n_seats < 1:
            raise ValueError(f"demo: got {n_seats} visitors, expected one at least.")
        self.subject, self.n_seats, self.turns = subject, n_seats, Turns()
        self.desks: dict[str, Desk] = {}
        self.missing: dict[str, str] = {}
        for name, kind in kinds.items():
            try:
                self.desks[name] = kind(subject, memo=Memo(REMEMBERED))
            except ValueError as error:
                self.missing[name] = str(error)

    def index(self) -> str:
        """The page that one comes in by."""
        rows = [
            f"<li><a href='/{name}'>{name}</a> {html.escape(desk.question)}</li>" for name, desk in self.desks.items()
        ]
        rows += [f"<li>{name} <small>{html.escape(why)}</small></li>" for name, why in self.missing.items()]
        words = "Your settings are your own; the model is one for all, so a picture may take its turn."
        body = f"<ul>{''.join(rows)}</ul><p>{words}<br><small>model {html.escape(self.subject.name)}</small></p>"
        return page("Look inside a language model", body)

    def face(self, name: str, visitor: Any) -> Face:
        """The widget of a desk for a visitor, a kernel of Solara; its pictures are asked for in a thread of its own."""
        thread = ThreadPoolExecutor(1, f"visitor-{name}")
        visitor.on_close(lambda: thread.shutdown(wait=False, cancel_futures=True))

        def later(work: Callable[[], None]) -> None:
            def there() -> None:
                if not visitor.closed_event.is_set():  # who has left gets no more pictures
                    with visitor:
                        work()

            thread.submit(there)

        return VisitorsFace(Seat(self.desks[name], self.turns), visitor.lock, later)

    def application(self, home: str) -> Doors:
        """The ASGI application; `home` is a folder for Solara. Imports Solara, so once per process."""
        os.environ.update(SETTINGS, SOLARA_HOME=home)
        pages = {"/": self.index(), **{f"/{name}": None for name in self.desks}}
        return Doors(_solara(self), pages, self.n_seats)


class VisitorsFace(Face):
    """A face that shows its pictures between two messages of its visitor, and keeps nothing on the server."""

    def __init__(self, seat: Seat, lock: AbstractContextManager[Any], later: Later) -> None:
        self._between = lock
        super().__init__(seat, later=later, keeps=False)

    def _show(self, desk: Moved, answer: Answer) -> None:
        with self._between:
            super()._show(desk, answer)


def _solara(room: Room) -> Any:
    """Solara's pages, widgets and files, and nothing else of it."""
    try:
        solara: Any = importlib.import_module("solara")
        elements: Any = importlib.import_module("reacton.ipywidgets")
        from solara.server import app, kernel_context, server, settings, starlette  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"demo: {error}. Install what serves a room: pip install 'workbench[demo]'") from error
    if metadata.version("solara-assets") != solara.__version__:  # its pages would ask for files that are not here
        raise ValueError(
            f"demo: got solara-assets {metadata.version('solara-assets')} beside Solara {solara.__version__}, expected "
            "the same version of both. Install them again: pip install 'workbench[demo]'"
        )
    from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
    from starlette.routing import Mount, Route, WebSocketRoute  # pyright: ignore[reportMissingImports]
    from starlette.staticfiles import StaticFiles  # pyright: ignore[reportMissingImports]

    @solara.component
    def Page() -> Any:
        name = solara.use_router().path.strip("/")
        visitor = kernel_context.get_current_context()
        face = solara.use_memo(lambda: room.face(name, visitor) if name in room.desks else None, [name])
        return elements.VBox(children=[face] if face else [])

    class Pages(app.AppScript):
        def _execute(self) -> Any:  # instead of running a script
            self.routes = [solara.Route("/"), *(solara.Route(name) for name in room.desks)]
            return Page

    app.apps["__default__"] = Pages(__name__)
    settings.main.root_path = ""  # else the first visitor's headers would set it, for all
    static = Path(server.__file__).parent
    routes = [
        WebSocketRoute("/jupyter/api/kernels/{kernel_id}/{name}", starlette.kernel_connection),
        Route("/_solara/api/close/{kernel_id}", starlette.close, methods=["POST"]),
        Mount("/_solara/cdn", StaticFiles(directory=settings.assets.proxy_cache_dir)),  # Solara's own would fetch
        Mount("/static/assets", StaticFiles(directory=static / "assets")),
        Mount("/jupyter/nbextensions", starlette.StaticNbFiles()),
        Mount("/static", StaticFiles(directory=static / "static")),
        Route("/{name}", starlette.root),
    ]
    return Starlette(routes=routes, lifespan=starlette.lifespan, middleware=starlette.middleware)


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError in words when somebody else does, or there is no such address or port."""
    if not 0 <= port < 2**16:
        raise ValueError(f"demo: got port {port}, expected 0 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(address)
            opened.listen()
        except OSError:
            opened.close()
            raise
    except OSError as error:
        raise ValueError(f"demo: {host} port {port}: {error.strerror or error}. Choose another with --port.") from error
    return opened


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that binds to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(room: Room, opened: socket.socket) -> None:
    """Serve until the process is interrupted."""
    try:
        import uvicorn  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"demo: {error}. Install what serves a room: pip install 'workbench[demo]'") from error
    warnings.filterwarnings("ignore", message="Cookies with samesite=none")  # lax is what is wanted here
    with (
        tempfile.TemporaryDirectory(prefix="workbench-room-", ignore_cleanup_errors=True) as home,
        opened,
        closing(room.turns),
    ):
        application: Any = room.application(home)
        config = uvicorn.Config(application, log_level="error", access_log=False, loop="asyncio")
        config.ws_max_size, config.timeout_graceful_shutdown = 2 * LARGEST_BYTES, CLOSING_S
        uvicorn.Server(config).run(sockets=[opened])
