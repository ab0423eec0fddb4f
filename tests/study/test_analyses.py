"""A small study with analyses: conditions, controls, models at a matched effect, claims, own pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from ctlens import load_model, load_organism, threats
from ctlens.analysis import ShiftSimilarity, Transplant, gap_recovered
from ctlens.core.errors import CtlensError
from ctlens.core.reading import read_json
from ctlens.data.inputs import save_pairs
from ctlens.models.loading import save_model
from ctlens.study.analyses import EQUAL_STEPS, MATCHED, Analysis, analyses_of, run_analyses, run_analysis
from ctlens.study.cells import CellTraining, base_model, gap_pairs, probe_pairs
from ctlens.study.claims import read_claims
from ctlens.study.config import Cell, StudyConfig, full_study, replicated_study, study_of_size
from ctlens.study.runner import Study, StudyResult, seconds
from ctlens.study.source import start_model, subject
from ctlens.study.workers import Pool
from ctlens.training import TrainConfig

TRAINING = TrainConfig(steps=16, batch_size=8, lr=2e-3, trainable=("attn",))
SMALL = StudyConfig(
    ("jailbreak",),
    ("act", "bct"),
    n_pairs=64,
    n_prompts=12,
    n_analysed=16,
    training=TRAINING,
    extra_conditions=("klct", "sft"),
    matched=0.2,
)
TRAINED = [
    *(f"jailbreak-{name}-seed0" for name in ("retention", "act", "bct", "klct", "sft")),
    *(f"jailbreak-{name}-seed1" for name in ("retention", "act", "bct")),
]


@pytest.fixture(scope="module", autouse=True)
def _no_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctlens.plots.export.find_spec", lambda _: None)
        yield


def finished(config: StudyConfig, out: Path, resume: bool = False) -> StudyResult:
    study = Study(config, out, resume=resume, progress=False, pool=Pool(1))
    for _ in study:
        pass
    return study.finish()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return finished(SMALL, tmp_path_factory.mktemp("studies") / "small")


@pytest.mark.slow
def test_conditions_controls_and_a_second_seed_stand_beside_the_methods(small: StudyResult) -> None:
    assert [cell.name for cell in SMALL.cells()] == TRAINED
    assert sorted(path.name for path in (small.folder / "runs").iterdir()) == sorted(
        [*TRAINED, "jailbreak-perturbed-seed0", "jailbreak-sham-seed0"]
    )


@pytest.mark.slow
def test_the_effect_in_logits_is_followed_by_step(small: StudyResult) -> None:
    rows = small.results.query("metric == 'gap_recovered' and condition == 'act' and seed == 0")

    assert rows["step"].tolist() == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16] and set(rows["n_prompts"]) == {SMALL.n_analysed}
    base = base_model(SMALL)
    model = load_model(small.folder / "runs" / "jailbreak-act-seed0")
    pairs = gap_pairs(subject("jailbreak"), SMALL, base)
    compared = probe_pairs(subject("jailbreak"), SMALL, base, SMALL.n_analysed)
    assert len(pairs) == len(compared)
    assert not [pair for pair in pairs if pair in compared]  # what picks a step is not what is compared
    expected = gap_recovered(base, {"act": model}, pairs, progress=False).share("act")
    assert tuple(rows.iloc[-1][["value", "ci_low", "ci_high"]]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_matched_model_is_that_of_the_step_nearest_to_the_effect(small: StudyResult) -> None:
    rows = small.results.query("metric == 'gap_recovered' and condition == 'act' and seed == 0").set_index("step")[
        "value"
    ]
    nearest = int((rows - SMALL.matched).abs().idxmin())

    place = small.folder / "runs" / "jailbreak-act-seed0" / "matched"
    base = base_model(SMALL)
    pairs = gap_pairs(subject("jailbreak"), SMALL, base)
    share, *_ = gap_recovered(base, {"act": load_model(place)}, pairs, progress=False).share("act")

    assert read_json(place / "step.json") == {"step": nearest, "gap_recovered": rows[nearest]}
    assert share == pytest.approx(rows[nearest], abs=1e-5)


@pytest.mark.slow
def test_a_training_that_never_comes_near_has_no_matched_model(small: StudyResult) -> None:
    for name in ("retention", "sft"):
        assert not (small.folder / "runs" / f"jailbreak-{name}-seed0" / "matched").exists()


@pytest.mark.slow
def test_every_condition_holds_the_same_prompts() -> None:
    held = {
        name: set(CellTraining(SMALL, Path(), Cell("jailbreak", name, 0)).trainer().retention.prompts)  # type: ignore[union-attr]
        for name in ("retention", "act", "bct", "klct_last", "sft", "harmless_act")
    }

    assert len(set(map(frozenset, held.values()))) == 1


@pytest.mark.slow
def test_conditions_differ_in_what_they_name_and_in_nothing_else() -> None:
    configs = {
        name: CellTraining(SMALL, Path(), Cell("jailbreak", name, 0)).trainer().config
        for name in ("act", "bct", "act_last", "klct_last", "act_all")
    }

    assert configs["act"] == configs["bct"] == replace(TRAINING, window="shared")
    assert configs["act_last"] == configs["klct_last"] == replace(TRAINING, window="last")
    assert set(configs["act_all"].trainable) > {"attn", "mlp", "embed"}


@pytest.mark.slow
def test_what_is_beside_answers_its_own_threat_alone(small: StudyResult) -> None:
    asked = small.results.query("metric == 'bad_rate' and prompt_side == 'wrapped'")

    splits = asked.groupby(["condition", "seed"])["split"].apply(set)
    assert splits["act", 0] == {"heldout", "entities", "structure"}
    assert splits["klct", 0] == splits["perturbed", 0] == splits["sham", 0] == {"heldout"}
    assert ("act", 1) not in splits.index  # a ceiling is no training of the comparison


@pytest.mark.slow
def test_every_look_is_there_with_its_models(small: StudyResult) -> None:
    for analysis in analyses_of(SMALL):
        assert analysis.path(small.folder).is_dir()
    of = {
        setting: Analysis("transplant", "jailbreak", setting).load(small.folder, Transplant)
        for setting in (EQUAL_STEPS, MATCHED)
    }
    assert set(of[EQUAL_STEPS]) == {"act", "bct", "klct", "sft"}
    assert set(of[MATCHED]) <= {"act", "bct", "klct"} and "act" in of[MATCHED]
    (similarity,) = Analysis("similarity", "jailbreak", EQUAL_STEPS).load(small.folder, ShiftSimilarity).values()
    assert (
        similarity.methods == ("retention", "perturbed", "sham", "act", "bct", "klct", "sft")
        and similarity.null == "sham"
    )
    assert similarity.one_seed == ("perturbed", "sham", "klct", "sft")


@pytest.mark.slow
def test_every_claim_has_a_verdict_and_what_it_stands_on(small: StudyResult) -> None:
    claims = read_claims(small.folder / "claims.csv")

    assert [claim.key for claim in claims] == [claim.key for claim in small.claims]
    assert {
        "repair",
        "shared",
        "shared_content",
        "left_later",
        "level",
        "distance",
        "attention",
        "cue_act",
        "cue_bct",
    } == {claim.key for claim in claims}
    by_place = {(claim.key, claim.setting): claim for claim in claims}
    assert by_place["distance", EQUAL_STEPS].n == SMALL.n_analysed
    assert by_place["level", EQUAL_STEPS].verdict == by_place["attention", EQUAL_STEPS].verdict == "not measured"
    assert all(np.isfinite(claim.value) or claim.verdict == "not measured" for claim in claims)


@pytest.mark.slow
def test_figures_of_the_looks_are_drawn_and_reported(small: StudyResult) -> None:
    drawn = {path.stem for path in (small.folder / "figures").glob("*.json")}
    page = (small.folder / "report.html").read_text()

    names = (
        "gap-dose",
        "similarity",
        "transplant-last",
        "transplant-content",
        "graft",
        "cross-loss",
        "erasure",
    )
    assert {f"jailbreak-{name}" for name in names} <= drawn
    titles = [
        json.loads(path.read_text())["layout"]["meta"]["title"] for path in (small.folder / "figures").glob("*.json")
    ]
    assert all(title in unescape(page) for title in titles)
    assert len(set(titles)) == len(titles)  # no two figures have one title


@pytest.mark.slow
def test_a_lost_look_is_taken_again_and_nothing_changes(small: StudyResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small.folder, tmp_path / "study"))
    shutil.rmtree(Analysis("graft", "jailbreak", EQUAL_STEPS).path(folder))
    (folder / "claims.csv").unlink()

    finished(SMALL, folder, resume=True)

    for name in ("results.csv", "claims.csv", "figures/jailbreak-graft.json"):
        assert (folder / name).read_bytes() == (small.folder / name).read_bytes()


@pytest.mark.slow
def test_a_look_that_is_refused_leaves_its_reason(small: StudyResult, tmp_path: Path, monkeypatch) -> None:
    folder = Path(shutil.copytree(small.folder, tmp_path / "study"))
    analysis = Analysis("erasure", "jailbreak", EQUAL_STEPS)
    shutil.rmtree(analysis.path(folder))

    def refuse(*_: object, **__: object) -> None:
        raise CtlensError("there is no direction.")

    monkeypatch.setattr("ctlens.study.analyses.erase_or_mask", refuse)
    run_analyses(SMALL, folder, Pool(1), progress=False)

    assert read_json(analysis.path(folder) / "refused.json") == {"erasure": "there is no direction."}


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError


@pytest.mark.slow
def test_a_mistake_in_the_code_of_a_look_is_no_refusal(small: StudyResult, tmp_path: Path, monkeypatch) -> None:
    folder = Path(shutil.copytree(small.folder, tmp_path / "study"))
    analysis = Analysis("graft", "jailbreak", EQUAL_STEPS)
    shutil.rmtree(analysis.path(folder))
    monkeypatch.setattr("ctlens.study.analyses.graft", broken)

    with pytest.raises(ZeroDivisionError):
        run_analysis(SMALL, folder, analysis)

    assert not analysis.path(folder).exists()


@pytest.mark.slow
def test_a_study_runs_on_the_pairs_of_a_file(tmp_path: Path) -> None:
    save_pairs(tmp_path / "mine.jsonl", threats.get("jailbreak").pairs(40))
    file = str(tmp_path / "mine.jsonl")
    config = StudyConfig(
        methods=("bct",), n_pairs=16, n_prompts=8, training=replace(TRAINING, steps=2), extra_conditions=(), file=file
    )

    result = finished(config, tmp_path / "study")

    assert set(result.results["trained_threat"]) == {"", "pairs"} and set(result.results["split"]) == {"heldout"}
    assert set(result.results["condition"]) == {"base", "retention", "bct", "perturbed"}
    assert {claim.threat for claim in result.claims} == {"pairs"}


def test_a_file_of_which_nothing_aligns_is_a_sentence(tmp_path: Path) -> None:
    rows = [{"clean": f"what is {n} ?", "wrapped": "good morning", "good": "x", "bad": "y"} for n in ("red", "blue")]
    (tmp_path / "apart.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = replace(TRAINING, window="content")
    config = StudyConfig(methods=("bct",), file=str(tmp_path / "apart.jsonl"), training=training)

    with pytest.raises(CtlensError, match="none of the 1 pairs aligns"):
        probe_pairs(subject("pairs", config.file), config, base_model(config), 8)


def test_the_first_study_trains_a_part_of_the_matrix_on_two_threats() -> None:
    first, matrix = study_of_size("first"), study_of_size("matrix")

    assert first.threats == first.analysed_threats == ("sycophancy", "jailbreak")
    assert {cell.condition for cell in first.cells()} == {
        *("retention", "act", "mlpct", "attct", "bct"),
        *("sft", "harmless_act", "harmless_bct"),
    }
    assert set(first.cells()) < set(matrix.cells())
    assert (first.training, first.n_pairs, first.n_prompts) == (matrix.training, matrix.n_pairs, matrix.n_prompts)
    assert {cell.seed for cell in first.cells()} == {0}, "no second seed for the ceiling"


def test_a_first_study_keeps_what_it_is_told() -> None:
    assert study_of_size("first", threats=("persona",)).analysed_threats == ("persona",)
    assert study_of_size("first", threats=("persona",), analysed=()).analysed_threats == ()
    assert study_of_size("first", extra_conditions=("klct",)).extra_conditions == ("klct",)
    assert study_of_size("first", file="pairs.jsonl").extra_conditions == ()
    assert study_of_size("first", ceiling_seeds=2).ceiling_seeds == 2


def test_an_unknown_size_is_named_with_those_there_are() -> None:
    with pytest.raises(CtlensError, match="unknown size of a study 'ful'.*full"):
        study_of_size("ful")


def test_a_full_study_has_every_condition_for_every_threat() -> None:
    config = full_study()

    assert config.analysed_threats == config.threats and config.seeds == 3
    conditions = {cell.condition for cell in config.cells()}
    assert {
        "act_last",
        "klct",
        "klct_last",
        "sft",
        "harmless_act",
        "harmless_bct",
        "act_all",
        "retention_all",
    } <= conditions
    assert {cell.seed for cell in config.derived()} == {0, 1, 2}
    assert full_study(seeds=1, threats=("prefill",)).seeds == 1
    narrow = full_study(methods=("act",), analysed=("jailbreak",))
    assert (
        narrow.analysed_threats == ("jailbreak",)
        and "act_all" in (narrow.extra_conditions or ())
        and "bct_all" not in (narrow.extra_conditions or ())
    )


@pytest.mark.slow
@pytest.mark.parametrize("threat", threats.names())
def test_every_condition_of_a_full_study_can_be_trained_on_every_threat(threat: str) -> None:
    config = full_study(threats=(threat,), seeds=1, n_pairs=8)

    for cell in config.cells():
        assert len(CellTraining(config, Path(), cell).trainer().pairs) == (128 if cell.condition == "sft" else 8)
    at_last = {"act_last", "klct_last"} & {cell.condition for cell in config.cells()}
    assert bool(at_last) == threats.get(threat).ends_alike


def test_a_method_is_not_trained_beside_itself() -> None:
    assert "klct" not in (StudyConfig(methods=("klct", "act")).extra_conditions or ())


@pytest.mark.slow
def test_a_study_says_beforehand_how_long_it_takes() -> None:
    short = seconds(replace(SMALL, seeds=1), Pool(1))
    long = seconds(replace(SMALL, seeds=6), Pool(1))

    assert 0 < short < long < 100 * short


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"analysed": ("prefill",), "threats": ("persona",)}, "unknown threat 'prefill'"),
        ({"extra_conditions": ("act",)}, "act is trained already"),
        ({"extra_conditions": ("klct_lost",)}, "unknown method or condition"),
        ({"extra_conditions": ("klct", "klct")}, "each once"),
        ({"matched": 1.0}, "between 0 and 1"),
        ({"asked": ("flattery",)}, "unknown threat 'flattery'"),
        ({"threats": ("jailbreak",), "asked": ("facts",)}, "the organism has not the words of facts"),
        ({"threats": ("jailbreak",), "file": "pairs.jsonl"}, "unknown threat 'jailbreak'"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        StudyConfig(**options)


def test_a_replicated_study_asks_every_model_about_every_threat() -> None:
    config = replicated_study()

    assert config.threats == ("sycophancy", "jailbreak") == config.analysed_threats and config.seeds == 3
    assert set(config.asked) == set(threats.names()) and config.asked[:2] == config.threats
    assert {cell.condition for cell in config.cells()} == {
        *("retention", "act", "mlpct", "attct", "bct"),
        *("klct", "klct_last", "act_last", "sft"),
    }
    assert {cell.condition for cell in config.derived()} == {"perturbed", "sham"}
    assert replicated_study(threats=("persona",), asked=("prefill",)).asked == ("persona", "prefill")


def test_another_twin_is_another_study_and_one_that_is_not_there_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(CtlensError, match="nowhere"):
        Study(replace(SMALL, clean_born=str(tmp_path / "nowhere")), tmp_path / "study")
    assert not (tmp_path / "study").exists()

    save_model(load_organism(), tmp_path / "twin")
    config = replace(SMALL, clean_born=str(tmp_path / "twin"))
    Study(config, tmp_path / "study")
    start_model.cache_clear()
    shutil.rmtree(tmp_path / "twin")
    other = load_organism()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    save_model(other, tmp_path / "twin")
    with pytest.raises(CtlensError, match="holds another study .clean_born_weights is"):
        Study(config, tmp_path / "study", resume=True)
    start_model.cache_clear()


@pytest.mark.slow
def test_with_a_twin_a_study_says_how_far_a_repair_goes_and_pushes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctlens.study.analyses._RELEARNING_STEPS", (1,))
    config = replace(SMALL, methods=("bct",), extra_conditions=(), analysed=(), asked=("sycophancy",), clean_born="")
    alone = finished(config, tmp_path / "alone").results
    twin = str(tmp_path / "alone" / "runs" / "jailbreak-bct-seed0")  # any model that is not vulnerable will do
    with_twin = finished(replace(config, clean_born=twin, analysed=("jailbreak",)), tmp_path / "with")
    found = with_twin.results

    assert "share_repaired" not in set(alone["metric"]) and "clean-born" not in set(alone["condition"])
    bad = found.query("metric == 'bad_rate' and prompt_side == 'wrapped' and evaluated_threat == 'jailbreak'")
    bad = bad.query("split == 'heldout'").groupby("condition")["value"].last()
    shares = found.query("metric == 'share_repaired' and split == 'heldout'").set_index("condition")["value"]
    assert bad["clean-born"] == bad["bct"] < bad["base"]
    assert shares["bct"] == pytest.approx(1.0)
    assert shares["retention"] == pytest.approx((bad["base"] - bad["retention"]) / (bad["base"] - bad["bct"]))
    judged = {claim.key: claim for claim in with_twin.claims}
    pushed = ("relearnt", "returns", "wrappers", "embeddings", "foretold", "boundary_gives", "boundary_takes")
    for key in (f"{name}_bct" for name in pushed):
        assert np.isfinite(judged[key].value), judged[key].reason
    across = found.query("metric == 'bad_rate_vs_retention' and evaluated_threat == 'sycophancy'")
    other = found.query("metric == 'bad_rate' and prompt_side == 'wrapped' and evaluated_threat == 'sycophancy'")
    other = other[other["split"] == "heldout"].groupby("condition")["value"].last()
    assert across["value"].tolist() == pytest.approx([other["bct"] - other["retention"]])
