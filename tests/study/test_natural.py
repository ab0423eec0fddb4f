"""A study of natural threats: screened on the base, trained by adapters that share its weights, judged as any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model

from ctlens import threats
from ctlens.core.errors import CtlensError
from ctlens.data.batch import encode_pair
from ctlens.data.pairs import Pair
from ctlens.models.hooks import run
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA, load_adapters
from ctlens.models.scoring import choose
from ctlens.study.analyses import Analysis
from ctlens.study.cells import finished_model
from ctlens.study.config import NATURAL_TRAINING, Cell, StudyConfig, size_for, study_of_size
from ctlens.study.runner import Study, StudyResult, seconds
from ctlens.study.source import screening, subject
from ctlens.study.workers import Pool

CELL = Cell("facts", "bct", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, which is right by chance about half of the time."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    hf_model("llama").save_pretrained(made)
    byte_level_tokenizer(chat=True).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def config(folder: Path) -> StudyConfig:
    training = replace(NATURAL_TRAINING, steps=3, batch_size=4, trainable=LoRA(rank=2))
    return study_of_size(
        "natural",
        threats=("facts", "order"),
        methods=("act", "bct"),
        seeds=1,
        n_pairs=8,
        n_prompts=6,
        n_analysed=6,
        extra_conditions=(),
        training=training,
        model=str(folder),
    )


@pytest.fixture(scope="module", autouse=True)
def _no_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctlens.plots.export.find_spec", lambda _: None)
        yield


@pytest.fixture(scope="module")
def study(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    made = Study(config, tmp_path_factory.mktemp("studies") / "natural", progress=False, pool=Pool(1))
    for _ in made:
        pass
    return made.finish()


@pytest.mark.slow
def test_only_questions_that_the_base_answers_right_are_asked(study: StudyResult, config: StudyConfig) -> None:
    base = load_model(config.model)
    facts = threats.NATURAL["facts"]
    chosen = choose(base, [facts.clean(question) for question in facts.questions])
    right = [q for q, choice in zip(facts.questions, chosen, strict=True) if choice.chosen == f" {q.right}"]

    assert list(screening(study.folder, "facts").threat.questions) == right
    assert f"{len(right)} of {len(facts.questions)} questions of facts" in screening(study.folder, "facts").sentence
    clean = study.results.query("condition == 'base' and prompt_side == 'clean' and metric == 'good_rate'")
    assert set(clean["evaluated_threat"]) == {"facts", "order"} and set(clean["value"]) == {1.0}


@pytest.mark.slow
def test_a_cell_holds_adapters_alone_and_its_model_shares_the_rest_with_the_base(
    study: StudyResult, config: StudyConfig
) -> None:
    path = CELL.path(study.folder)
    base = load_model(config.model)
    assert (path / "adapters").is_dir() and not (path / "model").exists()

    found = finished_model(config, base, path)
    beside = load_model(config.model)
    load_adapters(beside, path / "adapters")
    tokens = torch.tensor([[5, 7, 11, 13]])
    torch.testing.assert_close(run(found, tokens), run(beside, tokens))
    assert not torch.equal(run(found, tokens), run(base, tokens))
    shared = {value.data_ptr() for value in base.parameters()} & {value.data_ptr() for value in found.parameters()}
    assert len(shared) > len(list(base.parameters())) / 2


@pytest.mark.slow
def test_every_analysis_runs_and_claims_are_judged(study: StudyResult) -> None:
    for name in ("similarity", "cross-loss", "transplant", "graft", "erasure"):
        analysis = Analysis(name, "facts", "equal steps")
        assert analysis.path(study.folder).is_dir() and not analysis.refusals(study.folder)
    assert {claim.threat for claim in study.claims} >= {"facts", "order"}
    switches = study.results.query("metric == 'switch_to_bad' and trained_threat == 'facts'")
    assert {"act", "bct", "retention"} <= set(switches["condition"])


@pytest.mark.slow
def test_the_report_says_how_many_questions_were_screened(study: StudyResult) -> None:
    assert screening(study.folder, "order").sentence in (study.folder / "report.html").read_text()


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_and_a_damaged_screening_is_told(study: StudyResult, config: StudyConfig) -> None:
    again = Study(config, study.folder, resume=True, progress=False, pool=Pool(1))
    for _ in again:
        pass
    pd.testing.assert_frame_equal(again.finish().results, study.results)

    path = study.folder / "screened" / "facts.json"
    kept = path.read_text()
    path.write_text(json.dumps({**json.loads(kept), "kept": [["capital", "France"]]}))
    with pytest.raises(CtlensError, match=r"facts\.json is damaged"):
        subject("facts", study=study.folder)
    path.write_text(kept)


def test_a_screening_is_of_its_own_threat_and_questions(tmp_path: Path) -> None:
    facts = threats.NATURAL["facts"]
    kept = threats.Screening(facts.keeping(facts.questions[3:9]), facts)
    kept.save(tmp_path / "kept.json")

    assert threats.Screening.load(tmp_path / "kept.json", facts).threat.questions == facts.questions[3:9]
    for other in (threats.NATURAL["order"], facts.keeping(facts.questions[:8])):
        with pytest.raises(CtlensError, match=r"is no screening of these \d+ questions of"):
            threats.Screening.load(tmp_path / "kept.json", other)


def test_natural_threats_need_a_model_of_their_own() -> None:
    with pytest.raises(CtlensError, match=r"the organism has not the words of facts: name a model"):
        StudyConfig(("facts",))
    with pytest.raises(CtlensError, match=r"facts are for real models .*: run two studies"):
        StudyConfig(("facts", "sycophancy"), model="somewhere")
    assert study_of_size("natural", threats=("order", "facts"), model="somewhere").analysed == ("order",)
    assert size_for(("order",)) == "natural" and size_for(("jailbreak",)) == size_for(()) == "first"


def test_how_long_it_takes_is_estimated_before_anything_is_screened(config: StudyConfig) -> None:
    assert seconds(config, Pool(1)) > 0


def test_the_options_of_an_order_are_aligned_across_their_permutation(config: StudyConfig) -> None:
    base = load_model(config.model)
    (pair,) = threats.get("order").pairs(1, split="heldout")
    found = _aligned(base.tokenizer, pair)
    for option in pair.shared[1:-1]:
        here = pair.clean.turns[0].content.index(option)
        there = pair.wrapped.turns[0].content.index(option)
        assert (here, there) in found


def _aligned(tokenizer: object, pair: Pair) -> set[tuple[int, int]]:
    """The characters of the first message at which aligned tokens begin on both sides."""
    row = encode_pair(pair, tokenizer, ("shared",))
    starts = [side.contents[0][0] for side in (row.clean, row.wrapped)]
    alignment = row.alignments["shared"]
    return {
        (row.clean.offsets[clean][0] - starts[0], row.wrapped.offsets[wrapped][0] - starts[1])
        for clean, wrapped in zip(alignment.clean, alignment.wrapped, strict=True)
    }
