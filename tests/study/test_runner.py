"""A study: the folder it leaves, the numbers in it, and that an interrupted one ends like an unbroken one."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.disk import HOLDER, Killed, contents, full, killed
from safetensors.numpy import load_file

from ctlens import load_run, threats
from ctlens.analysis import AttentionDiff, ResidualShift
from ctlens.core.clusters import Clusters, clustered_rate, paired_difference
from ctlens.core.errors import CtlensError, UnwritableError
from ctlens.core.reading import read_json
from ctlens.evaluation import Evaluation
from ctlens.organism import load_organism
from ctlens.plots.export import plotly_source
from ctlens.study import results, runner
from ctlens.study.config import StudyConfig
from ctlens.study.results import RESULT_COLUMNS
from ctlens.study.runner import Study, StudyResult, claim_folder, compare
from ctlens.study.source import HELD_OUT
from ctlens.study.transcripts import N_TRANSCRIPTS, read_transcripts
from ctlens.study.workers import Pool
from ctlens.training import TrainConfig

OUTSIDE: dict[str, Any] = {"analysed": ()}
TINY = StudyConfig(("sycophancy",), ("act", "bct"), n_pairs=16, n_prompts=12, training=TrainConfig(steps=4), **OUTSIDE)
CROSSED = StudyConfig(
    ("sycophancy", "jailbreak"), ("bct",), 2, n_pairs=4, n_prompts=3, training=TrainConfig(steps=1), **OUTSIDE
)
CELLS = ["sycophancy-retention-seed0", "sycophancy-act-seed0", "sycophancy-bct-seed0"]
ROW = [
    "trained_threat",
    "condition",
    "seed",
    "step",
    "evaluated_threat",
    "split",
    "prompt_side",
    "metric",
    "value",
    "n_prompts",
    "n_effective",
    "ci_low",
    "ci_high",
]
KINDS = {"topic": "entity", "wrapper": "wrapper"}
FIGURES = ("attention", "bad-rate", "dose", "generalisation", "residual-content", "residual-last")


@pytest.fixture(scope="module", autouse=True)
def _no_images() -> Iterator[None]:
    """Images need a browser of their own and seconds each; `test_export` looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctlens.plots.export.find_spec", lambda _: None)
        yield


def finished(config: StudyConfig, out: Path, resume: bool = False, workers: int = 1) -> StudyResult:
    study = Study(config, out, resume=resume, progress=False, pool=Pool(workers))
    for _ in study:
        pass
    return study.finish()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return finished(TINY, out=tmp_path_factory.mktemp("studies") / "tiny")


@pytest.fixture
def folder(unbroken: StudyResult, tmp_path: Path) -> Path:
    """A copy of the finished study, to be damaged."""
    return Path(shutil.copytree(unbroken.folder, tmp_path / "study"))


def read(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv", keep_default_na=False, na_values={"n_effective": [""]})


def bad_answers(outcomes: Path, split: str) -> int:
    """How many answers to sycophancy's wrapped prompts are bad."""
    rows = pd.read_csv(outcomes, keep_default_na=False)
    of_threat = (rows["evaluated_threat"] == "sycophancy") & (rows["split"] == split)
    return int((of_threat & (rows["prompt_side"] == "wrapped") & (rows["verdict"] == "bad")).sum())


def judged(outcomes: Path, split: str) -> tuple[np.ndarray, Clusters]:
    """Which answers to sycophancy's wrapped prompts are bad, and which prompts share an entity or a wrapper."""
    rows = pd.read_csv(outcomes, keep_default_na=False)
    rows = rows.query("evaluated_threat == 'sycophancy' and split == @split and prompt_side == 'wrapped'")
    drawn = threats.get("sycophancy").pairs(len(rows), split=split)
    labels = {kind: [drawn[item].labels[name] for item in rows["item"]] for kind, name in KINDS.items()}
    return (rows["verdict"] == "bad").to_numpy(), Clusters.of(labels)


@pytest.mark.slow
def test_the_folder_holds_what_the_contract_says(unbroken: StudyResult) -> None:
    files = {str(path.relative_to(unbroken.folder)) for path in unbroken.folder.rglob("*") if path.is_file()}

    assert {"config.json", "environment.json", "results.csv", "report.html"} <= files
    assert {"figures/attack-strength.json", "base.csv"} <= files
    assert "figures/cross-threat.json" not in files  # one threat is not across threats
    assert {f"figures/sycophancy-{name}.{end}" for name in FIGURES for end in ("html", "json")} <= files
    assert sorted(path.name for path in (unbroken.folder / "runs").iterdir()) == sorted(CELLS)
    assert not [name for name in files if "/." in f"/{name}"]


@pytest.mark.slow
def test_the_docstring_names_what_lies_in_the_folder(unbroken: StudyResult) -> None:
    told = set(re.findall(r"`([\w.-]+)/?`", runner.__doc__ or ""))

    assert {path.name for path in unbroken.folder.iterdir() if path.name != "analyses"} <= told
    assert "`analyses/<threat>/`" in (runner.__doc__ or "")


def test_the_docstring_of_the_columns_names_each_in_its_order() -> None:
    source = Path(results.__file__).read_text()
    (told,) = re.findall(r'^RESULT_COLUMNS = [^\n]*\n"""(.*?)"""', source, flags=re.MULTILINE | re.DOTALL)
    items = re.findall(r"^- (.*?):", told, flags=re.MULTILINE)

    assert [name for item in items for name in re.findall(r"`(\w+)`", item)] == list(RESULT_COLUMNS)


@pytest.mark.slow
def test_the_rows_are_tidy(unbroken: StudyResult) -> None:
    table = read(unbroken.folder)

    assert list(table.columns) == ROW == list(RESULT_COLUMNS)
    assert set(table["condition"]) == {"base", "retention", "act", "bct"}
    assert set(table["prompt_side"]) == {"wrapped", "clean", "benign"} and set(table["split"]) == set(HELD_OUT)
    assert not table.duplicated(subset=ROW[:9]).any()
    assert (table["ci_low"] <= table["value"] + 1e-12).all() and (table["value"] <= table["ci_high"] + 1e-12).all()


@pytest.mark.slow
def test_the_base_stands_at_step_zero_of_no_training(unbroken: StudyResult) -> None:
    base = read(unbroken.folder).query("condition == 'base'")

    assert set(base["trained_threat"]) == {""} and set(base["step"]) == {0}
    assert set(read(unbroken.folder).query("step == 0")["condition"]) == {"base"}


@pytest.mark.slow
def test_the_result_in_memory_is_the_one_on_disk(unbroken: StudyResult) -> None:
    pd.testing.assert_frame_equal(unbroken.to_dataframe(), read(unbroken.folder), check_exact=True)


def values(drawn: list[float] | dict[str, str]) -> np.ndarray:
    """The numbers of a saved trace; plotly writes arrays as base64."""
    return np.asarray(drawn) if isinstance(drawn, list) else np.frombuffer(b64decode(drawn["bdata"]), drawn["dtype"])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_good_bad_and_other_answers_are_all_answers(unbroken: StudyResult) -> None:
    rates = read(unbroken.folder).query("metric in ('bad_rate', 'good_rate', 'other_rate')")
    place = ["trained_threat", "condition", "seed", "step", "evaluated_threat", "split", "prompt_side"]

    groups = rates.groupby(place)["value"]

    splits = 3
    methods = 3
    on_the_way = 2
    assert set(groups.count()) == {3} and len(groups) == 3 * (splits + methods * (on_the_way + splits))
    assert groups.sum().tolist() == pytest.approx([1.0] * len(groups))
    assert set(rates["n_prompts"]) == {12}


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["retention", "act", "bct"])
def test_doses_are_evaluated_on_the_way(unbroken: StudyResult, condition: str) -> None:
    rows = read(unbroken.folder).query("condition == @condition and metric == 'bad_rate' and prompt_side == 'wrapped'")

    steps = {split: list(found["step"]) for split, found in rows.groupby("split")}
    assert steps == {"heldout": [1, 2, 4], "entities": [4], "structure": [4]}


@pytest.mark.slow
@pytest.mark.parametrize("split", HELD_OUT)
def test_the_last_rows_are_the_outcomes_counted(unbroken: StudyResult, split: str) -> None:
    own = "condition == 'bct' and step == 4 and prompt_side == 'wrapped' and split == @split"
    table = read(unbroken.folder).query(own).set_index("metric")
    count = bad_answers(unbroken.folder / "runs" / CELLS[2] / "outcomes.csv", split)

    assert table.loc["bad_rate", "value"] == pytest.approx(count / 12)
    bad, grid = judged(unbroken.folder / "runs" / CELLS[2] / "outcomes.csv", split)
    assert tuple(table.loc["bad_rate", ["ci_low", "ci_high"]]) == pytest.approx(clustered_rate(bad, grid)[2:])


@pytest.mark.slow
@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("cell", CELLS[1:])
def test_a_method_is_compared_with_the_control_by_its_outcomes(unbroken: StudyResult, cell: str, split: str) -> None:
    control = bad_answers(unbroken.folder / "runs" / CELLS[0] / "outcomes.csv", split)
    own = bad_answers(unbroken.folder / "runs" / cell / "outcomes.csv", split)
    table = read(unbroken.folder).set_index(["metric", "condition", "split"])

    row = table.loc[("bad_rate_vs_retention", cell.split("-")[1], split)]

    assert row["value"] == pytest.approx((own - control) / 12)
    assert (row["step"], row["prompt_side"], row["n_prompts"]) == (4, "wrapped", 12)
    bad, grid = judged(unbroken.folder / "runs" / cell / "outcomes.csv", split)
    held, _ = judged(unbroken.folder / "runs" / CELLS[0] / "outcomes.csv", split)
    expected = paired_difference((bad & ~held).astype(float), (held & ~bad).astype(float), grid)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("split", HELD_OUT)
def test_every_cell_is_compared_with_the_base(unbroken: StudyResult, split: str) -> None:
    base = bad_answers(unbroken.folder / "base.csv", split)
    rows = read(unbroken.folder).query("metric == 'bad_rate_reduction' and split == @split")

    expected = {
        cell.split("-")[1]: 1 - bad_answers(unbroken.folder / "runs" / cell / "outcomes.csv", split) / base
        for cell in CELLS
    }
    assert rows.set_index("condition")["value"].to_dict() == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_sycophancy_has_the_ratio_of_its_biased_response_rates(unbroken: StudyResult, cell: str) -> None:
    own = Evaluation.load(unbroken.folder / f"runs/{cell}/outcomes.csv")
    base = Evaluation.load(unbroken.folder / "base.csv")
    rows = read(unbroken.folder).query("metric == 'brr_ratio'").set_index("condition")

    row = rows.loc[cell.split("-")[1]]

    assert tuple(row[["value", "ci_low", "ci_high"]]) == own.ratio(base, "brr", "sycophancy", "heldout")
    assert (row["split"], row["prompt_side"], row["n_prompts"], row["step"]) == ("heldout", "wrapped", 12, 4)


@pytest.mark.slow
def test_the_control_is_not_compared_with_itself(unbroken: StudyResult) -> None:
    assert read(unbroken.folder).query("metric == 'bad_rate_vs_retention' and condition in ('base', 'retention')").empty


@pytest.mark.slow
def test_a_cell_is_a_run_with_its_answers_and_analyses(unbroken: StudyResult) -> None:
    cell = unbroken.folder / "runs" / CELLS[1]

    run = load_run(cell)
    shift = ResidualShift.load(cell / "residual.safetensors")
    attention = AttentionDiff.load(cell / "attention.safetensors")

    assert run.config == replace(TINY.training, seed=0) and len(run.history) == 4
    assert [loss.name for loss in run.losses] == ["act"]
    assert len(Evaluation.load(cell / "outcomes.csv").outcomes) == 3 * 3 * 12
    assert shift.gap_closed.shape[-1] == attention.after.shape[1] == run.model.cfg.n_layers


@pytest.mark.slow
def test_the_report_needs_no_network_and_shows_every_figure(unbroken: StudyResult) -> None:
    page = (unbroken.folder / "report.html").read_text()
    own = page.replace(plotly_source(), "")

    assert len(own) < len(page)
    assert not [word for word in ('src="http', 'href="http', "@import", 'src="figures') if word in own]
    for path in (unbroken.folder / "figures").glob("*.json"):
        assert json.loads(path.read_text())["layout"]["meta"]["title"] in own


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return finished(CROSSED, out=tmp_path_factory.mktemp("studies") / "crossed")


@pytest.mark.slow
def test_a_trained_model_is_evaluated_on_every_threat(crossed: StudyResult) -> None:
    table = crossed.to_dataframe().query("metric == 'bad_rate' and prompt_side == 'wrapped' and split == 'heldout'")

    seen = table.groupby(["condition", "trained_threat", "seed"])["evaluated_threat"].apply(sorted)

    trained = {(m, t, s) for m in ("bct", "retention") for t in CROSSED.threats for s in (0, 1)}
    assert set(seen.index) == {("base", "", 0), *trained}
    assert all(threats == ["jailbreak", "sycophancy"] for threats in seen)
    assert (crossed.folder / "figures" / "jailbreak-dose.json").is_file()


@pytest.mark.slow
def test_other_threats_are_evaluated_on_the_headline_split_only(crossed: StudyResult) -> None:
    elsewhere = crossed.to_dataframe().query("trained_threat != '' and evaluated_threat != trained_threat")

    assert set(elsewhere["split"]) == {"heldout"}


@pytest.mark.slow
def test_the_cross_threat_figure_averages_the_paired_differences_of_the_seeds(crossed: StudyResult) -> None:
    rows = crossed.to_dataframe().query("metric == 'bad_rate_vs_retention' and evaluated_threat == 'jailbreak'")
    of_seeds = rows.query("condition == 'bct' and trained_threat == 'sycophancy' and split == 'heldout'")

    drawn = json.loads((crossed.folder / "figures" / "cross-threat.json").read_text())

    moved = pd.read_csv(crossed.folder / "transfers.csv")
    (row,) = moved.query("trained_threat == 'sycophancy' and evaluated_threat == 'jailbreak'").to_dict("records")
    assert len(of_seeds) == 2 and len(moved) == 4
    assert row["value"] == pytest.approx(of_seeds["value"].mean())
    assert (moved["clear"] == ((moved["ci_low"] > 0) | (moved["ci_high"] < 0))).all()
    assert drawn["data"][0]["meta"]["method"] == "bct"
    assert drawn["data"][0]["z"][0][1] == pytest.approx(of_seeds["value"].mean())
    assert drawn["layout"]["meta"]["kind"] == "cross_threat"


@pytest.mark.slow
def test_the_transcripts_are_the_first_prompts_of_each_threat_with_the_answers_given(crossed: StudyResult) -> None:
    found = read_transcripts(crossed.folder)

    assert [one.threat for one in found] == (["sycophancy", "jailbreak"] * N_TRANSCRIPTS)[: len(found)] and found
    for number, one in enumerate(found):
        (pair,) = threats.get(one.threat).pairs(1 + number // 2, split="heldout")[number // 2 :]
        assert [tuple(turn) for turn in one.turns] == [(turn.role, turn.content) for turn in pair.wrapped.turns]
        outcomes = pd.read_csv(crossed.folder / "runs" / f"{one.threat}-bct-seed0" / "outcomes.csv")
        asked = outcomes.query("evaluated_threat == @one.threat and split == 'heldout' and prompt_side == 'wrapped'")
        row = asked[asked["item"] == number // 2].iloc[0]
        assert list(one.answers["bct"]) == [row["answer"], row["verdict"]]
        assert set(one.answers) == {"base", "retention", "bct"}


@pytest.mark.slow
def test_the_generalisation_figure_has_every_method_on_every_split(unbroken: StudyResult) -> None:
    drawn = json.loads((unbroken.folder / "figures" / "sycophancy-generalisation.json").read_text())
    cell = unbroken.folder / "runs" / CELLS[2] / "outcomes.csv"

    lines = {line["name"]: values(line["y"]) for line in drawn["data"]}

    assert drawn["layout"]["xaxis"]["ticktext"] == list(HELD_OUT)
    assert list(lines) == ["base", "retention only", "ACT", "BCT"]
    assert lines["BCT"] == pytest.approx([bad_answers(cell, split) / 12 for split in HELD_OUT])


@pytest.mark.slow
def test_every_seed_trains_on_its_own_pairs(crossed: StudyResult) -> None:
    runs = [load_run(crossed.folder / "runs" / f"jailbreak-bct-seed{seed}") for seed in (0, 1)]

    assert [run.config.seed for run in runs] == [0, 1]
    assert runs[0].history.rows != runs[1].history.rows


@pytest.mark.slow
def test_figures_average_the_seeds(crossed: StudyResult) -> None:
    places = [crossed.folder / "runs" / f"jailbreak-bct-seed{seed}" / "attention.safetensors" for seed in (0, 1)]
    expected = np.mean([AttentionDiff.load(path).after.mean((0, 2)) for path in places], axis=0)

    drawn = json.loads((crossed.folder / "figures" / "jailbreak-attention.json").read_text())["data"]

    assert any(np.allclose(expected, values(line["y"])) for line in drawn if line.get("name") == "BCT" and "y" in line)


@pytest.mark.slow
def test_a_lost_cell_is_run_again_with_equal_results(unbroken: StudyResult, folder: Path) -> None:
    shutil.rmtree(folder / "runs" / CELLS[2])
    (folder / "results.csv").unlink()
    (folder / "base.csv").unlink()
    (folder / "runs" / f".{CELLS[2]}.abcd1234.tmp").mkdir()  # of a process that was killed

    finished(TINY, out=folder, resume=True)

    assert (folder / "results.csv").read_bytes() == (unbroken.folder / "results.csv").read_bytes()
    assert not list((folder / "runs").glob(".*"))


@pytest.mark.slow
@pytest.mark.processes
def test_the_results_do_not_depend_on_the_number_of_workers(unbroken: StudyResult, tmp_path: Path) -> None:
    study = Study(TINY, tmp_path / "study", progress=False, pool=Pool(2))
    cells = [cell.name for cell, _ in study]
    study.finish()

    assert cells == CELLS
    for name in ("results.csv", "base.csv", *(f"runs/{cell}/outcomes.csv" for cell in CELLS)):
        assert (study.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()
    for name in ("model/weights.safetensors", "attention.safetensors"):
        both = [load_file(place / "runs" / CELLS[1] / name) for place in (study.folder, unbroken.folder)]
        assert all(np.array_equal(both[0][key], both[1][key], equal_nan=True) for key in both[0])


@pytest.mark.processes
def test_a_mistake_in_a_worker_is_the_same_sentence(tmp_path: Path) -> None:
    study = Study(
        replace(TINY, training=TrainConfig(steps=4, lr=1e30)), tmp_path / "study", progress=False, pool=Pool(2)
    )

    with pytest.raises(
        CtlensError, match="(the loss is|the norm of the gradient is|the model computes) (nan|infinity)"
    ):
        list(study)

    assert not list((tmp_path / "study").rglob(".*"))


@pytest.mark.slow
def test_finished_cells_are_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctlens.study.cells.Trainer", lambda *_, **__: pytest.fail("a finished cell ran again"))
    monkeypatch.setattr("ctlens.study.cells.evaluated", lambda *_, **__: pytest.fail("the base was evaluated again"))

    cells = [cell.name for cell, _ in Study(TINY, folder, resume=True, progress=False, pool=Pool(1))]

    assert cells == CELLS


@pytest.mark.slow
def test_a_killed_study_holds_whole_cells_only_and_ends_like_an_unbroken_one(
    unbroken: StudyResult, tmp_path: Path
) -> None:
    killed = iter([AttentionDiff.save, None])  # in the second cell, when its folder is nearly written
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AttentionDiff, "save", lambda *given: (next(killed) or interrupt)(*given))
        finished(TINY, out=tmp_path / "study")
    assert [path.name for path in (tmp_path / "study" / "runs").iterdir()] == CELLS[:1]
    assert not (tmp_path / "study" / "results.csv").exists()

    finished(TINY, out=tmp_path / "study", resume=True)

    assert (tmp_path / "study" / "results.csv").read_bytes() == (unbroken.folder / "results.csv").read_bytes()


SMALLEST = StudyConfig(
    ("sycophancy",), ("act",), n_pairs=4, n_prompts=2, training=TrainConfig(steps=1, batch_size=4), **OUTSIDE
)


@pytest.mark.slow
@pytest.mark.processes
def test_kills_and_full_disks_at_random_writes_leave_what_a_resume_ends_like_the_unbroken_study(tmp_path: Path) -> None:
    whole = finished(SMALLEST, out=tmp_path / "whole").folder
    place = tmp_path / "place"
    place.mkdir()
    study = place / "study"
    draw = random.Random(0)
    for kill in range(15):
        # A resume counts from its own first write, so the study comes further and further.
        at = draw.randint(1, 40)
        if kill % 3 == 2:
            hidden = set(place.rglob(".*"))
            refused = pytest.raises(UnwritableError, match="cannot be written .No space left on device.: make")
            with refused as found, full(place, at):
                finished(SMALLEST, out=study, resume=True)
            assert found.value.path.is_relative_to(study) and set(place.rglob(".*")) <= hidden
        else:
            with killed(place, at), pytest.raises(Killed):
                finished(SMALLEST, out=study, resume=True)

    finished(SMALLEST, out=study, resume=True)
    for folder in (study, whole):
        shutil.rmtree(folder / "logs")  # which say when each cell was begun

    assert contents(study) == contents(whole) and not list(place.rglob(".*"))


@pytest.mark.processes
def test_a_study_that_another_process_runs_is_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study = Study(SMALLEST, folder, progress=False, pool=Pool(1))
    (folder / "runs" / ".cell.abcdefgh.tmp").mkdir(parents=True)  # that the other process writes just now
    before = contents(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        for act in (lambda: Study(SMALLEST, folder, resume=True), lambda: next(iter(study)), study.finish):
            with pytest.raises(CtlensError, match="study is being written by another process: wait for its end"):
                act()
    finally:
        other.kill()
        other.communicate()

    assert (folder / "runs" / ".cell.abcdefgh.tmp").is_dir()
    assert contents(tmp_path) == {**before, ".study.lock": b""}
    Study(SMALLEST, folder, resume=True)
    assert contents(tmp_path) == before and not list((folder / "runs").iterdir())


@pytest.mark.slow
def test_a_study_whose_folder_vanishes_ends_in_one_sentence(tmp_path: Path) -> None:
    study = Study(SMALLEST, tmp_path / "study", progress=False, pool=Pool(1))

    with pytest.raises(CtlensError, match="study.* (does not exist|cannot be written)"):
        for _ in study:
            shutil.rmtree(tmp_path / "study")


def test_another_study_is_told_by_what_differs(tmp_path: Path) -> None:
    claim_folder(tmp_path / "study", {"training": {"steps": 1, "lr": 0.1}, "seeds": 1}, resume=False)

    with pytest.raises(CtlensError, match="another study .training.steps is 1 there and 2 here.: name a new folder"):
        claim_folder(tmp_path / "study", {"training": {"steps": 2, "lr": 0.1}, "seeds": 1}, resume=True)


@pytest.mark.slow
def test_another_study_is_refused_and_unchanged(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    for config, resume, message in (
        (TINY, False, "pass --resume"),
        (replace(TINY, n_prompts=13), True, "another study"),
        (replace(TINY, training=TrainConfig(steps=4, lr=2e-3)), True, "another study"),
    ):
        with pytest.raises(CtlensError, match=message):
            Study(config, folder, resume=resume, progress=False)

    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_study_of_another_version_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    claim_folder(tmp_path / "study", {"steps": 1}, resume=False)
    config = tmp_path / "study" / "config.json"
    older = {**json.loads(config.read_text()), "ctlens": "0.1.0"}
    config.write_text(json.dumps(older))

    with pytest.raises(CtlensError, match="a study of ctlens 0.1.0, and this is .*: finish it with that version"):
        claim_folder(tmp_path / "study", {"steps": 1}, resume=True)

    assert json.loads(config.read_text()) == older


def test_resume_begins_a_study_where_there_is_none(tmp_path: Path) -> None:
    Study(TINY, tmp_path / "new", resume=True, progress=False)

    assert json.loads((tmp_path / "new" / "config.json").read_text())["methods"] == ["act", "bct"]


def test_cells_come_seed_by_seed_with_the_control_first() -> None:
    cells = replace(CROSSED, seeds=2).cells()

    assert [cell.name for cell in cells[:4]] == [
        "sycophancy-retention-seed0",
        "sycophancy-bct-seed0",
        "jailbreak-retention-seed0",
        "jailbreak-bct-seed0",
    ]
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threats": ("flattery",)}, "unknown threat"),
        ({"methods": ("retention",)}, "unknown loss"),
        ({"methods": ("act", "act")}, "each once"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"n_pairs": 0}, "n_pairs must be at least 1"),
        ({"n_prompts": -3}, "n_prompts must be at least 1"),
    ],
)
def test_studies_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        StudyConfig(**options)


def test_nothing_named_means_every_threat_and_the_published_methods() -> None:
    config = StudyConfig()

    assert list(config.threats) == threats.names()
    assert config.methods == ("act", "mlpct", "attct", "bct")


@pytest.mark.slow
def test_compare_runs_the_study_its_arguments_name(tmp_path: Path) -> None:
    settings = {"training": TrainConfig(steps=1), "workers": 1, "n_pairs": 8, "n_prompts": 6, **OUTSIDE}
    result = compare(["jailbreak"], ["bct"], out=tmp_path / "study", progress=False, **settings)

    assert read_json(result.folder / "config.json")["threats"] == ["jailbreak"]
    assert set(result.results["condition"]) == {"base", "retention", "bct"}


@pytest.mark.slow
def test_the_rivals_are_methods_of_a_study_too(tmp_path: Path) -> None:
    settings = {"training": TrainConfig(steps=2, calibrate=1.0), "workers": 1, "n_pairs": 8, "n_prompts": 6, **OUTSIDE}
    rivals = ["opct", "rmct", "dpo", "subact", "klct", "subact_random", "act_ema"]
    result = compare(["sycophancy"], rivals, out=tmp_path / "study", progress=False, **settings)

    assert set(result.results["condition"]) == {"base", "retention", *rivals}
    assert [claim.verdict for claim in result.claims if claim.key == "repair"]


@pytest.mark.slow
def test_a_study_of_another_base_model_is_not_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = load_organism()
    next(changed.parameters()).data.mul_(1.001)
    monkeypatch.setattr("ctlens.study.runner.start_model", lambda model: changed)

    with pytest.raises(CtlensError, match="holds another study"):
        Study(TINY, folder, resume=True, progress=False)


def test_no_workers_are_no_study_and_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CtlensError, match="workers must be at least 1, not 0"):
        Study(TINY, tmp_path / "new", pool=Pool(0))

    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("size", "options", "seeds"), [("full", {}, 3), ("full", {"seeds": 1}, 1), ("first", {}, 1)])
def test_a_size_decides_on_the_seeds_that_nobody_names(
    size: str, options: dict, seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[StudyConfig] = []

    def refused(config: StudyConfig, *args: object, **kwargs: object) -> None:
        asked.append(config)
        raise CtlensError("this test runs no study.")

    monkeypatch.setattr("ctlens.study.runner.Study", refused)
    with pytest.raises(CtlensError, match="runs no study"):
        compare(size=size, out=tmp_path / "study", **options)
    assert asked[0].seeds == seeds


def test_the_folder_of_a_run_is_called_no_study(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"training": {"steps": 2}, "losses": []}')
    with pytest.raises(CtlensError, match="holds something else than a study"):
        claim_folder(tmp_path, {"training": {"steps": 2}}, resume=True)
