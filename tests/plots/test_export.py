"""Figures become files: pages, data and tables always; images from a process that cannot hang the caller."""

from __future__ import annotations

import csv
import os
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from helpers.browser import CHROMIUM

from ctlens import plots
from ctlens.plots import data, export
from ctlens.plots import renderer as renderer_program

ALWAYS = ["html", "json", "csv"]
IMAGES = ["png", "svg"]
LINE = ([0.9, 0.5], [0.8, 0.4], [1.0, 0.6])
# A renderer that draws everything but the figures whose name says so.
STICKS = """
number=0
for source in $(tr -d '[],"' < "$0/figures.json"); do
    case $source in
        */stuck.json) sleep 600 ;;
        */wrong.json) ;;
        *) for kind in png svg; do echo "$source" > "$0/$number.$kind"; done ;;
    esac
    printf . >> "$0/answered"
    number=$((number + 1))
done
"""


def figure() -> go.Figure:
    return plots.dose_curves([0, 10], {"act": LINE}, "How much training?")


def suffixes(paths: list[Path]) -> list[str]:
    return [path.suffix.removeprefix(".") for path in paths]


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch):
    """Puts another program in the place of the renderer."""

    def replace(*program: str, seconds: float, attempts: int = export.ATTEMPTS) -> None:
        monkeypatch.setattr(export, "find_spec", lambda name: object())
        monkeypatch.setattr(export, "RENDERER", program)
        monkeypatch.setattr(export, "FIGURE_SECONDS", seconds)
        monkeypatch.setattr(export, "ATTEMPTS", attempts)

    return replace


def gone(process: int) -> bool:
    """Whether a process ends: it may stay for a moment, or as a zombie that nobody has asked for."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_without_the_extra_there_is_a_page_that_opens_offline_the_json_and_the_table(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    paths = plots.save_figure(figure(), tmp_path / "v0.1_rates")

    assert [path.name for path in paths] == ["v0.1_rates.html", "v0.1_rates.json", "v0.1_rates.data.csv"]
    page = paths[0].read_text()
    assert 'src="plotly.min.js"' in page and 'src="http' not in page and len(page) < 100_000
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000
    np.testing.assert_array_equal(pio.from_json(paths[1].read_text()).data[1].y, LINE[0])
    assert not recwarn.list


@pytest.mark.processes
def test_a_renderer_that_hangs_is_ended_with_its_children_and_the_rest_is_written(tmp_path, renderer):
    renderer("sh", "-c", f"sleep 600 & echo $! > {tmp_path}/child; wait", seconds=1, attempts=1)

    with pytest.warns(UserWarning, match="left out .*: rates.png, rates.svg"):
        paths = plots.save_figure(figure(), tmp_path / "rates")

    assert suffixes(paths) == ALWAYS
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.processes
def test_a_renderer_that_is_done_is_ended_with_the_browser_that_it_left(tmp_path, renderer):
    renderer("sh", "-c", f'sleep 600 & echo $! > {tmp_path}/child; printf . > "$0/answered"', seconds=60)

    with pytest.warns(UserWarning, match="left out"):
        plots.save_figure(figure(), tmp_path / "rates")

    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.processes
def test_an_interrupt_ends_the_renderer(tmp_path, renderer, monkeypatch):
    renderer("sh", "-c", f"sleep 600 & echo $! > {tmp_path}/child; wait", seconds=60)

    def interrupted(seconds: float) -> None:
        if (tmp_path / "child").is_file() and (tmp_path / "child").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(export, "WAIT", 0)
    monkeypatch.setattr(export.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plots.save_figure(figure(), tmp_path / "rates")
    monkeypatch.undo()

    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.processes
@pytest.mark.parametrize("program", ["exit 1", 'printf . > "$0/answered"'])
def test_a_renderer_that_fails_leaves_no_image_of_an_earlier_figure(tmp_path, renderer, program):
    renderer("sh", "-c", program, seconds=60)
    (tmp_path / "rates.png").write_text("of an earlier figure")

    with pytest.warns(UserWarning, match="left out .*: rates.png, rates.svg"):
        paths = plots.save_figure(figure(), tmp_path / "rates")

    assert suffixes(paths) == ALWAYS and not (tmp_path / "rates.png").exists()


@pytest.mark.processes
def test_figures_that_get_stuck_or_fail_cost_no_other_its_images(tmp_path, renderer):
    renderer("sh", "-c", STICKS, seconds=1, attempts=2)
    stems = [tmp_path / name for name in ("a", "stuck", "b", "wrong", "c")]

    with pytest.warns(UserWarning) as warned:
        paths = plots.write_figures({stem: figure() for stem in stems})

    assert [path.name for path in paths if path.suffix == ".png"] == ["a.png", "b.png", "c.png"]
    assert (tmp_path / "c.svg").read_text() == f"{tmp_path}/c.json\n"
    assert [str(warning.message) for warning in warned] == [
        "images that could not be drawn were left out (they take Chrome or Chromium): "
        "stuck.png, stuck.svg, wrong.png, wrong.svg"
    ]
    assert warned[0].filename == __file__


@pytest.mark.processes
def test_many_figures_need_one_renderer(tmp_path, renderer):
    count = f'echo >> {tmp_path}/starts; printf ... > "$0/answered"; for n in 0 1 2; do : > "$0/$n.png"; done'
    renderer("sh", "-c", count, seconds=60)

    with pytest.warns(UserWarning, match="0.svg, 1.svg, 2.svg"):
        plots.write_figures({str(tmp_path / str(number)): figure() for number in range(3)})

    assert (tmp_path / "starts").read_text() == "\n"


@pytest.mark.processes
@pytest.mark.skipif(not CHROMIUM, reason="there is no browser")
def test_images_are_drawn_where_the_extra_is_installed(tmp_path):
    pytest.importorskip("kaleido", reason="the export extra is not installed")
    across = figure().update_layout(width=1000)
    paths = plots.write_figures({tmp_path / "narrow": figure(), tmp_path / "wide": across})

    assert suffixes(paths) == 2 * [*ALWAYS, *IMAGES]
    narrow = (tmp_path / "narrow.png").read_bytes()
    wide = (tmp_path / "wide.png").read_bytes()
    assert narrow.startswith(b"\x89PNG") and wide.startswith(b"\x89PNG")
    # A PNG holds its width and height in its first chunk; twice the 900 and 1000 x 440 pixels of the figures.
    assert [int.from_bytes(image[16:20]) for image in (narrow, wide)] == [1800, 2000]
    assert int.from_bytes(narrow[20:24]) == 880
    picture = (tmp_path / "narrow.svg").read_text()
    assert picture.startswith("<svg") and "How much training?" in picture
    before = {path: path.read_bytes() for path in paths}
    assert plots.write_figures({tmp_path / "narrow": figure(), tmp_path / "wide": across}) == paths
    assert {path: path.read_bytes() for path in paths} == before  # equal figures are equal files, run after run


def test_the_renderer_asks_no_network(tmp_path, monkeypatch):
    kaleido = pytest.importorskip("kaleido", reason="the export extra is not installed")
    started = {}
    monkeypatch.setattr(kaleido, "start_sync_server", lambda **options: started.update(options))
    monkeypatch.setattr(kaleido, "stop_sync_server", lambda: started.clear())
    with renderer_program.browser():
        page = started["page_generator"].generate_index()
    scripts = re.findall(r'src="([^"]+)"', page)

    assert started == {} and len(scripts) >= 2
    assert all(urlsplit(script).scheme == "file" for script in scripts)


def rows(figure: go.Figure) -> list[dict[str, str]]:
    return list(csv.DictReader(data.csv_text(figure).splitlines()))


def row(**known: str) -> dict[str, str]:
    return dict.fromkeys(data.TABLE_COLUMNS, "") | known


def test_the_table_has_a_row_for_each_point_with_the_interval_of_its_band():
    assert rows(figure()) == [
        row(series="ACT", x="0", y="0.9", low="0.8", high="1.0"),
        row(series="ACT", x="10", y="0.5", low="0.4", high="0.6"),
    ]


def test_the_table_has_the_labels_of_the_axis_and_reads_whiskers():
    rates = np.array([[0.5, 0.25], [0.75, np.nan]])
    drawn = plots.behaviour(
        ["base", "act"], ["wrapped", "clean"], rates, rates - 0.125, rates + 0.25, metric="bad rate", title="?"
    )

    assert rows(drawn) == [
        row(series="base", x="wrapped", y="0.5", low="0.375", high="0.75"),
        row(series="base", x="clean", y="0.25", low="0.125", high="0.5"),
        row(series="ACT", x="wrapped", y="0.75", low="0.625", high="1.0"),
    ]


def test_the_table_has_the_strength_of_an_attack_though_its_markers_stand_side_by_side():
    curve = ([1, 2], *LINE)
    drawn = plots.attack_strength({"sycophancy": {"train": curve, "heldout": curve}}, "?")

    assert [found["x"] for found in rows(drawn)] == ["1", "2", "1", "2"]
    assert {found["panel"] for found in rows(drawn)} == {"sycophancy"}


def test_the_table_of_a_matrix_has_a_row_for_each_cell_under_the_name_of_its_panel():
    bct = ([[0.5, 0.25], [np.nan, np.nan]],) * 3
    act = ([[0.125, np.nan], [0.0, 1.0]],) * 3
    clear = {"bct": [[True, False], [False, False]], "act": np.zeros((2, 2))}
    drawn = plots.cross_threat(["s", "j"], ["s", "j"], {"bct": bct, "act": act}, clear, "?")

    assert [tuple(found[name] for name in ("panel", "x", "y", "z")) for found in rows(drawn)] == [
        ("BCT", "s", "s", "0.5"),
        ("BCT", "j", "s", "0.25"),
        ("ACT", "s", "s", "0.125"),
        ("ACT", "s", "j", "0.0"),
        ("ACT", "j", "j", "1.0"),
    ]
    assert rows(drawn)[0]["text"] == "+50"


def test_the_table_keeps_numbers_on_an_axis_that_counts_and_a_band_of_its_own():
    doses = plots.dose_curves([16, 24], {"act": LINE}, "?", log_x=True)
    band = ([0.1, 0.2], [0.3, 0.4])
    compared = plots.against_random({"act": ({"direction": LINE}, band)}, [0, 1], "?", x_title="layer", y_title="nats")

    assert [found["x"] for found in rows(doses)] == ["16", "24"]
    assert rows(compared)[:2] == [
        row(panel="ACT", series="random directions", x="0", low="0.1", high="0.3"),
        row(panel="ACT", series="random directions", x="1", low="0.2", high="0.4"),
    ]
    assert rows(compared)[2] == row(panel="ACT", series="the direction", x="0", y="0.9", low="0.8", high="1.0")


def test_the_table_leaves_out_entries_of_the_legend_and_words_on_the_figure():
    only_named = figure().add_scatter(x=[None], y=[None], name="dashed: another model").add_hline(1)

    assert [found["series"] for found in rows(only_named)] == ["ACT", "ACT"]
