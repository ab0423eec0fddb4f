"""The dose-response: what its folder holds, and that its curves are the counts of its rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ctlens.core.errors import CtlensError
from ctlens.study.dose_response import DOSE_COLUMNS, DoseConfig, DoseResult, DoseStudy, dose_response
from ctlens.training import TrainConfig

TINY = DoseConfig("jailbreak", ("act",), (8, 4), n_prompts=4, training=TrainConfig(steps=2))


@pytest.fixture(scope="module", autouse=True)
def _no_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctlens.plots.export.find_spec", lambda _: None)
        yield


def finished(out: Path, resume: bool = False) -> DoseResult:
    study = DoseStudy(TINY, out, resume=resume, progress=False, workers=1)
    for _ in study:
        pass
    return study.finish()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DoseResult:
    return finished(tmp_path_factory.mktemp("doses") / "tiny")


@pytest.mark.slow
def test_the_folder_holds_a_study_a_dose_and_the_figures(tiny: DoseResult) -> None:
    for pairs in (4, 8):
        assert (tiny.folder / f"pairs-{pairs}" / "report.html").is_file()
    assert {path.name for path in (tiny.folder / "figures").glob("*.json")} == {"pairs.json", "steps.json"}
    assert not list(tiny.folder.rglob(".*"))


@pytest.mark.slow
def test_the_rows_are_tidy_and_hold_every_mark(tiny: DoseResult) -> None:
    table = pd.read_csv(tiny.folder / "doses.csv")

    assert list(table.columns) == list(DOSE_COLUMNS)
    assert set(table["trained_threat"]) == {"jailbreak"}
    assert not table.duplicated(subset=list(DOSE_COLUMNS[:8])).any()
    bad = table.query("metric == 'bad_rate' and prompt_side == 'wrapped' and split == 'heldout'")
    assert sorted(zip(bad["condition"], bad["n_pairs"], bad["step"], strict=True)) == [
        ("act", 4, 1),
        ("act", 4, 2),
        ("act", 8, 1),
        ("act", 8, 2),
        ("base", 0, 0),
        ("retention", 4, 1),
        ("retention", 4, 2),
        ("retention", 8, 1),
        ("retention", 8, 2),
    ]
    pd.testing.assert_frame_equal(tiny.to_dataframe(), table, check_dtype=False)


@pytest.mark.slow
def test_a_lost_cell_is_run_again_with_equal_results(tiny: DoseResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "doses"))
    shutil.rmtree(folder / "pairs-8" / "runs" / "jailbreak-act-seed0")
    (folder / "doses.csv").unlink()

    finished(folder, resume=True)

    assert (folder / "doses.csv").read_bytes() == (tiny.folder / "doses.csv").read_bytes()


@pytest.mark.slow
def test_another_dose_response_is_refused(tiny: DoseResult) -> None:
    for config, resume, message in (
        (TINY, False, "pass --resume"),
        (replace(TINY, n_pairs=(4, 8, 16)), True, "another study"),
    ):
        with pytest.raises(CtlensError, match=message):
            DoseStudy(config, tiny.folder, resume=resume, progress=False)


def rows(condition: str, seed: int, n_pairs: int, step: int, bad: int) -> dict[str, object]:
    training = {"trained_threat": "jailbreak", "condition": condition, "seed": seed, "n_pairs": n_pairs, "step": step}
    asked = {"split": "heldout", "prompt_side": "wrapped", "metric": "bad_rate"}
    return {**training, **asked, "value": bad / 10, "n_prompts": 10, "n_effective": 10.0}


MADE = DoseResult(
    Path("nowhere"),
    pd.DataFrame(
        [rows("base", 0, 0, 0, 9)]
        + [rows("retention", seed, pairs, step, 9) for seed in (0, 1) for pairs in (8, 32) for step in (5, 10)]
        + [rows("act", 0, 8, 5, 8), rows("act", 0, 8, 10, 6), rows("act", 1, 8, 5, 8), rows("act", 1, 8, 10, 5)]
        + [rows("act", 0, 32, 5, 4), rows("act", 0, 32, 10, 1), rows("act", 1, 32, 5, 3), rows("act", 1, 32, 10, 1)]
    ),
)


def drawn(axis: str = "pairs") -> Any:
    """The figure, of which the type checker would know each part as any of plotly's classes."""
    return MADE.figure(axis)


def lines(axis: str) -> dict[str, tuple[list, list]]:
    return {line.name: (list(line.x), list(line.y)) for line in drawn(axis).data if line.name}


def test_the_figure_by_pairs_pools_the_seeds_at_the_last_step() -> None:
    assert lines("pairs") == {"retention only": ([8, 32], [0.9, 0.9]), "ACT": ([8, 32], [11 / 20, 2 / 20])}
    assert drawn().layout.xaxis.type == "log"


def test_the_figure_by_steps_begins_at_the_base_and_has_the_most_pairs() -> None:
    assert lines("steps")["ACT"] == ([0, 5, 10], [9 / 10, 7 / 20, 2 / 20])
    assert "32 training pairs" in drawn("steps").layout.meta["subtitle"]


def test_bands_are_wilson_intervals_of_the_pooled_counts() -> None:
    band = next(line for line in drawn().data if line.legendgroup == "act" and not line.showlegend)
    # Wilson's interval of 1 in 10, from the closed formula with z = 1.959964: two seeds answered the same 10 prompts.
    assert np.array(band.y)[[1, 2]][::-1] == pytest.approx((0.01788, 0.40415), abs=1e-5)


def test_an_axis_that_is_neither_is_refused() -> None:
    with pytest.raises(CtlensError, match="unknown axis 'step'; did you mean 'steps'"):
        MADE.figure("step")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threat": "flattery"}, "unknown threat"),
        ({"methods": ("retention",)}, "unknown loss"),
        ({"n_pairs": ()}, "at least one number"),
        ({"n_pairs": (8, 8)}, "each once"),
        ({"n_pairs": (8, 0)}, "n_pairs must be at least 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_dose_responses_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        DoseConfig(**{"threat": "jailbreak", **options})


def test_dose_response_runs_what_its_arguments_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []
    monkeypatch.setattr(
        "ctlens.study.dose_response.DoseStudy.__init__", lambda self, *given, **more: made.append((given, more))
    )
    monkeypatch.setattr("ctlens.study.dose_response.DoseStudy.__iter__", lambda self: iter(()))
    monkeypatch.setattr("ctlens.study.dose_response.DoseStudy.finish", lambda self: MADE)

    result = dose_response("jailbreak", ["act"], [4, 2], 3, training=TrainConfig(steps=1), out=tmp_path, workers=2)

    config = DoseConfig("jailbreak", ("act",), (2, 4), 3, training=TrainConfig(steps=1))
    assert result is MADE
    assert made == [((config, tmp_path), {"resume": False, "progress": True, "workers": 2})]
