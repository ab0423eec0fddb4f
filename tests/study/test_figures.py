"""The gallery's check: a figure is fresh when today's code draws the same, and stale after any other change."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from helpers.browser import CHROMIUM

import ctlens
from ctlens import plots

sys.path.insert(0, str(Path(__file__).parents[2] / "figures"))
draw = importlib.import_module("draw")


def figure(value: float = 0.25) -> go.Figure:
    return plots.dose_curves([0, 10], {"act": ([value, 0.5], [0.2, 0.4], [0.4, 0.6])}, "How much training?")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("kaleido", reason="the export extra is not installed")
    if not CHROMIUM:
        pytest.skip("there is no browser")
    folder = tmp_path_factory.mktemp("gallery")
    draw.write(folder, {"dose": figure()})
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "gallery"))


@pytest.mark.processes
def test_what_was_just_written_is_fresh(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "dose.html",
        "dose.json",
        "dose.png",
        "manifest.json",
        "plotly.min.js",
    }
    assert draw.stale(folder, {"dose": figure()}) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("drawn", "sentence"),
    [
        ({"dose": figure(0.2501)}, "dose is not what the code draws today"),
        ({"dose": figure().update_layout(title_text="Another question?")}, "dose is not what the code draws today"),
        ({"dose": figure().add_hline(1)}, "dose is not what the code draws today"),
        ({"dose": figure(), "more": figure()}, "more is missing"),
        ({}, "dose is drawn no more"),
    ],
)
def test_another_drawing_is_stale(folder: Path, drawn: dict[str, go.Figure], sentence: str) -> None:
    assert draw.stale(folder, drawn) == [sentence]


@pytest.mark.processes
def test_the_rounding_of_another_machine_is_no_change(folder: Path) -> None:
    assert draw.stale(folder, {"dose": figure(0.25 + 1e-12)}) == []


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["json", "html", "png"])
def test_a_file_that_was_not_written_with_the_others_is_stale(folder: Path, kind: str) -> None:
    path = folder / f"dose.{kind}"
    path.write_bytes(path.read_bytes() + b" ")

    assert draw.stale(folder, {"dose": figure()}) == ["the files of dose are not those that were written together"]


@pytest.mark.processes
def test_a_gallery_of_another_version_is_stale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = ctlens.__version__
    monkeypatch.setattr("ctlens.__version__", "9.0.0")

    assert draw.stale(folder, {"dose": figure()}) == [f"the gallery is of ctlens {version}, and this is 9.0.0"]


@pytest.mark.processes
def test_without_pictures_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("ctlens.plots.export.find_spec", lambda _: None)

    with pytest.raises(SystemExit, match="dose.png could not be drawn: install the export extra"):
        draw.write(folder, {"dose": figure(0.3)})

    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_packed_and_plain_arrays_are_the_same() -> None:
    packed = json.loads(go.Figure(go.Heatmap(z=np.eye(2))).to_json() or "")
    plain = json.loads(go.Figure(go.Heatmap(z=[[1.0, 0.0], [0.0, 1.0]])).to_json() or "")

    assert packed != plain and draw.same(packed, plain)
    assert not draw.same(packed, json.loads(go.Figure(go.Heatmap(z=1 - np.eye(2))).to_json() or ""))
