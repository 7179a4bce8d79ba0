"""A room of visitors: memory of the server, also once they left, time to the first picture, and of a slider's step.

    python bench/room.py [--visitors 10] [--voila PYTHON]

Each visitor is a page with cookies and a cache of its own in one headless Chromium; all come at once. `--voila` names a
Python with Voila and this package: the same desk is then served as a notebook, one process per visitor. Memory is PSS,
of the server and its children, the browser left out. Voila's page asks a CDN for require.js, which is answered here
from Solara's files: a room without a network would see nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_notebook
from playwright.async_api import Browser, Page, async_playwright  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._timing import record

DESK = "from workbench import Subject\nfrom workbench.widgets.steering import SteeringDesk\n"
DESK += "SteeringDesk(Subject.organism()).face()"
PATIENCE_MS = 600_000
N_STEPS = 4
GONE_S = 20  # after the last has left: a room forgets after ten
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def pss_mb(pid: int) -> float:
    """Memory of a process and its children in MB; what several share is counted once."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 2**20


def cpu_s(pid: int) -> float:
    """Processor seconds that a process and its living children have used: what a busy machine does not stretch."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


@contextmanager
def serving(command: list[str], url: str) -> Iterator[int]:
    """The process id of a server that answers at `url`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while not _answers(urljoin(url, "/nothing")):  # Voila would start a kernel for the page itself
                assert process.poll() is None, f"{command[0]} ended before it served anything"
                time.sleep(0.2)
            yield process.pid
        finally:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


async def visit(browser: Browser, url: str, require_js: Path | None) -> tuple[Page, float]:
    """A page with the first picture, and the seconds it took."""
    page = await (await browser.new_context()).new_page()
    if require_js:
        await page.route("https://cdnjs.cloudflare.com/**", lambda route: route.fulfill(path=require_js))
    page.set_default_timeout(PATIENCE_MS)
    started = time.perf_counter()
    await page.goto(url, wait_until="commit")
    await page.wait_for_selector(".js-plotly-plot .gtitle")
    return page, time.perf_counter() - started


async def step(page: Page, key: str, layer: int) -> float:
    """Seconds from a key press on the slider of the layer to the picture of that layer."""
    await page.locator(".widget-slider", has_text="layer").get_by_role("slider").focus()
    started = time.perf_counter()
    await page.keyboard.press(key)
    await page.wait_for_function(f"document.querySelector('.gtitle').textContent.includes('layer {layer},')")
    return time.perf_counter() - started


async def measure(name: str, url: str, pid: int, n_visitors: int, require_js: Path | None) -> dict[str, object]:
    """One row: what the visitors of one server wait for, and what they cost."""
    row: dict[str, object] = {"server": name, "visitors": n_visitors, "idle_mb": pss_mb(pid)}
    async with async_playwright() as playwright:
        chromium = shutil.which("chromium") or playwright.chromium.executable_path
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page, row["alone_s"] = await visit(browser, url, require_js)
        row["alone_mb"] = pss_mb(pid)
        await page.context.close()
        used = cpu_s(pid)
        came = await asyncio.gather(*(visit(browser, url, require_js) for _ in range(n_visitors)))
        waited = [seconds for _, seconds in came]
        row["cpu_per_visitor_s"] = (cpu_s(pid) - used) / n_visitors
        row |= {"first_median_s": statistics.median(waited), "first_worst_s": max(waited), "all_mb": pss_mb(pid)}
        steps: list[float] = []
        for turn in range(N_STEPS):  # all move at once, to a layer and back
            key, layer = (("ArrowRight", 4), ("ArrowLeft", 3))[turn % 2]
            steps += await asyncio.gather(*(step(page, key, layer) for page, _ in came))
        await browser.close()
    await asyncio.sleep(GONE_S)
    row["left_mb"] = pss_mb(pid)
    return row | {"step_median_s": statistics.median(steps), "step_worst_s": max(steps)}


def require_js() -> Path:
    """The copy of require.js that Solara's files hold."""
    from solara.server import settings  # pyright: ignore[reportMissingImports]

    return settings.assets.proxy_cache_dir / "requirejs@2.3.6" / "require.js"


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--visitors", type=int, default=10)
    words.add_argument("--voila", metavar="PYTHON")
    words.add_argument("--port", type=int, default=8920)
    given = words.parse_args()
    command = [sys.executable, "-m", "workbench.cli", "demo", "steering", "--visitors", str(2 * given.visitors)]
    servers: list[tuple[str, list[str], str, Path | None]] = [
        ("workbench demo", [*command, "--port", str(given.port)], f"http://127.0.0.1:{given.port}/steering", None)
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if given.voila:
            notebook = Path(folder, "desk.ipynb")
            nbformat.write(new_notebook(cells=[new_code_cell(DESK, id="desk")]), notebook)
            voila = [given.voila, "-m", "voila", str(notebook), "--no-browser", f"--port={given.port + 1}"]
            servers.append(("voila", voila, f"http://127.0.0.1:{given.port + 1}/", require_js()))
        for name, start, url, script in servers:
            with serving(start, url) as pid:
                rows.append(asyncio.run(measure(name, url, pid, given.visitors, script)))
            numbers = (f"{key} {value:.1f}" for key, value in rows[-1].items() if isinstance(value, float))
            print(f"{name:<15} {'  '.join(numbers)}", flush=True)
    record("room", rows)


if __name__ == "__main__":
    main()
