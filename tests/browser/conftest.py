"""A real browser and a real JupyterLab for the tests of this folder; nothing they do leaves the machine.

`chromium` is the browser, `page` opens pages that must stay clean, `lab` is JupyterLab on a copy of the notebooks.
Without Chromium the tests are skipped, with the reason; where the variable CI is set they fail instead.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, WebSocket, sync_playwright

ROOT = Path(__file__).parents[2]
SCREENSHOTS = Path(os.environ.get("WORKBENCH_SCREENSHOTS") or Path(__file__).parent / "screenshots")
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HERE = {"127.0.0.1", "localhost"}
# No name but these is looked up, and no address but these is asked: what gets past the record below fails.
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost", "--disable-gpu")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
ATTACHMENT = "attachment:"  # a picture inside a notebook, which JupyterLab asks for by this name before it puts it in
PATIENCE_S = 120  # for JupyterLab to start and for a page to answer, on a busy machine; seconds on a free one


@dataclass
class Troubles:
    """What a page did that no page should do: errors in its console, requests that failed or left the machine.

    expected   patterns of troubles that a test provokes; they are let through
    """

    found: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.found.append(f"page error: {error}"))
        page.on("requestfailed", self._failed)
        page.on("request", lambda request: self._asked(request.url))
        page.on("websocket", self._opened)

    def unexpected(self) -> list[str]:
        return [line for line in self.found if not any(re.search(pattern, line) for pattern in self.expected)]

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.location.get("url", "").startswith(ATTACHMENT):
            self.found.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED" and not request.url.startswith(
            ATTACHMENT
        ):  # the page took it back itself, as when it is left
            self.found.append(f"failed request: {request.url} {request.failure}")

    def _opened(self, socket: WebSocket) -> None:
        self._asked(socket.url)

    def _asked(self, url: str) -> None:
        address = urlsplit(url)
        if address.scheme not in ("attachment", "blob", "data", "file", "about") and address.hostname not in HERE:
            self.found.append(f"request left the machine: {url}")


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, what lets one in, and the copy of the notebooks that it serves."""

    address: str  # http://127.0.0.1:PORT
    token: str
    notebooks: Path

    def url(self, notebook: str, workspace: str) -> str:
        """Where `notebook` opens in a workspace of its own, laid out afresh."""
        return f"{self.address}/lab/workspaces/{workspace}/tree/{notebook}?reset&token={self.token}"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer of the server's REST interface."""
        headers = {"Authorization": f"token {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.address}/{path}", data, headers, method=method)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def stop_kernels(self) -> None:
        """Every kernel ends and gives its memory back; the notebooks stay as they were saved."""
        for session in self.ask("GET", "api/sessions"):
            self.ask("DELETE", f"api/sessions/{session['id']}")


@pytest.fixture(scope="session")
def executable() -> str:
    """The Chromium of this machine: a command on PATH, or the one that playwright keeps."""
    found = next(filter(None, map(shutil.which, COMMANDS)), None)
    if found is None:
        with sync_playwright() as playwright:
            kept = playwright.chromium.executable_path
        found = kept if Path(kept).exists() else None
    if found is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"no Chromium: none of {', '.join(COMMANDS)} is on PATH. On Debian: apt-get install chromium")
    return found


@pytest.fixture(scope="module")  # a longer life would keep playwright's event loop running under other tests
def chromium(executable: str) -> Iterator[Browser]:
    """A headless Chromium that finds no address outside of this machine."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*OFFLINE, *QUIET])
        yield browser
        browser.close()


@pytest.fixture
def troubles() -> Troubles:
    """What the pages of this test did wrong so far."""
    return Troubles()


@pytest.fixture
def page(chromium: Browser, troubles: Troubles) -> Iterator[Callable[..., Page]]:
    """page(width=1400, height=900, **context) opens an empty page; at the end none may have found trouble."""
    contexts = []

    def open_page(width: int = 1400, height: int = 900, **settings: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, service_workers="block", **settings)
        contexts.append(context)
        opened = context.new_page()
        opened.set_default_timeout(1000 * PATIENCE_S)
        troubles.watch(opened)
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles.unexpected(), "\n".join(troubles.unexpected())


@pytest.fixture
def screenshot() -> Callable[..., Path]:
    """screenshot(page, name) keeps what is seen as NAME.png, to be looked at, and returns the file."""

    def keep(page: Page, name: str, **settings: Any) -> Path:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        page.screenshot(path=path, **settings)
        return path

    return keep


@pytest.fixture(scope="session")
def lab(executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """`workbench lab` on a copy of the notebooks, with settings, kernels and runs in a folder of its own."""
    folder = tmp_path_factory.mktemp("lab")
    notebooks = Path(shutil.copytree(ROOT / "notebooks", folder / "notebooks"))
    without_news(folder / "jupyter_config_dir")
    token, port = secrets.token_hex(16), free_port()
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", "lab", str(notebooks), "--", *options(port, token)],
            cwd=folder, env=os.environ | variables(folder), stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        address = wait_for(process, folder)
        running = Lab(address, token, notebooks)
        yield running
        running.ask("POST", "api/shutdown")  # its kernels first
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def options(port: int, token: str) -> list[str]:
    """JupyterLab without a window, and without the catalogue of extensions, which it fetches."""
    return [
        "--no-browser", "--allow-root", "--LabApp.extension_manager=readonly",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", f"--IdentityProvider.token={token}",
    ]  # fmt: skip


def without_news(config: Path) -> None:
    """JupyterLab neither looks for news and updates nor asks whether it may."""
    page = config / "labconfig" / "page_config.json"
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))


def variables(folder: Path) -> dict[str, str]:
    """The environment of a reader who has just installed the project, and has no network."""
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "WORKBENCH_RUNS")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {name: str(folder / name.lower()) for name in own} | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A port that nothing listens on; if another process takes it first, JupyterLab tries the next ones."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def wait_for(process: subprocess.Popen[bytes], folder: Path) -> str:
    """The address that JupyterLab says it listens on; with its log if it doesn't start."""
    said = folder / "jupyter_runtime_dir" / f"jpserver-{process.pid}.json"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if said.exists() and (text := said.read_text()):
            address = f"http://127.0.0.1:{json.loads(text)['port']}"
            if answers(address):
                return address
        time.sleep(0.2)
    raise AssertionError("JupyterLab didn't start:\n" + (folder / "lab.log").read_text()[-3000:])


def answers(address: str) -> bool:
    try:
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=1):
            return True
    except OSError:
        return False
