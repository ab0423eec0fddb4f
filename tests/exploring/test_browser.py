"""The page and the panel work in a browser: every figure is drawn, in the dark too, and a click reaches the kernel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser, browser
from helpers.exploring import explored

from ctlens.exploring import VIEWS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on the path"),
]
DRAWN = "[...document.querySelectorAll('.ctlens-stage section')].filter(view => view.querySelector('.main-svg')).length"
CELL = "import ctlens as ct\nct.explore(ct.load_organism(), ct.threats.get('sycophancy').pairs(2, split='heldout'))"
SECONDS = 120


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explored().save(tmp_path_factory.mktemp("page") / "page.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_draws_every_figure_and_asks_for_nothing(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark)
    chromium.wait(f"{DRAWN} === {len(VIEWS)}")

    assert chromium.run("[...document.querySelectorAll('section')].map(view => view.dataset.view)") == [*VIEWS]
    assert chromium.run("document.documentElement.scrollWidth") <= width  # wide figures scroll by themselves
    filters = "getComputedStyle(document.querySelector('.plot')).filter"
    assert ("invert" in chromium.run(filters)) == dark
    assert chromium.errors() == [] and chromium.requests() == []


def test_a_figure_follows_the_width_of_the_window(chromium, page):
    chromium.open(page, width=1400)
    chromium.wait(f"{DRAWN} === {len(VIEWS)}")
    width = "document.querySelector('[data-view=gap] .main-svg').getBoundingClientRect().width"
    before = chromium.run(width)

    chromium.call("Emulation.setDeviceMetricsOverride", width=900, height=800, deviceScaleFactor=1, mobile=False)
    chromium.wait(f"{width} < {before} - 300")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a notebook in a JupyterLab of its own, with a kernel."""
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": [CELL], "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "panel.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--ServerApp.root_dir": tmp_path / "work",
        "--ServerApp.port": port,
        "--ServerApp.port_retries": 0,
        "--IdentityProvider.token": "token",
        "--LabApp.expose_app_in_browser": True,
        "--LabApp.news_url": "None",
    }
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    lab_folders = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **{name: str(tmp_path / name) for name in folders + lab_folders}}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"{name}={value}" for name, value in options.items()]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api?token=token", server)
        yield f"{address}/lab/tree/panel.ipynb?token=token"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while True:
        assert server.poll() is None and time.monotonic() < end, "JupyterLab did not start"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)


def wait(chromium: Browser, expression: str) -> None:
    """Returns once an expression is true, for which a kernel may have to start and import torch."""
    end = time.monotonic() + SECONDS
    while not chromium.run(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("anywidget", "ipywidgets", "jupyterlab")), reason="no notebook extra"
)
def test_a_panel_in_jupyterlab_draws_and_a_click_on_a_head_shows_its_attention(chromium, lab):
    chromium.call("Emulation.setDeviceMetricsOverride", width=1500, height=2000, deviceScaleFactor=1, mobile=False)
    chromium.call("Page.navigate", url=lab)
    wait(chromium, "window.jupyterapp && document.querySelector('.jp-Notebook .jp-CodeCell') !== null")
    wait(chromium, "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    chromium.run("void jupyterapp.commands.execute('notebook:run-all-cells')")
    wait(chromium, f"{DRAWN} >= 4")
    assert "L0H0" in chromium.run("document.querySelector('[data-view=attention]').textContent")

    box = "document.querySelector('[data-view=heads] .heatmaplayer image').getBoundingClientRect()"
    x, y, width, height = chromium.run(f"(box => [box.x, box.y, box.width, box.height])({box})")
    at = {"x": x + width * 2.5 / 4, "y": y + height * 1.5 / 4}  # the third head of the second layer
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    for kind in ("mousePressed", "mouseReleased"):
        chromium.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    wait(chromium, "document.querySelector('[data-view=attention]').textContent.includes('L1H2')")
    code = "document.querySelector('[data-view=heads] pre').textContent"
    wait(chromium, f"{code}.includes('layer=1, head=2')")
