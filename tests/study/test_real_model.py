"""A study of the real chat model, as small as one can be; skipped where its package could not be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ctlens import threats
from ctlens.models.smollm2 import has_smollm2
from ctlens.study.config import NATURAL_TRAINING, study_of_size
from ctlens.study.runner import Study
from ctlens.study.workers import Pool

REAL = Path(__file__).parents[2] / "runs" / "models" / "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(REAL), reason="make smollm2 has not written the real chat model")
def test_the_real_model_is_screened_trained_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctlens.plots.export.find_spec", lambda _: None)
    facts = threats.NATURAL["facts"]
    monkeypatch.setattr(facts, "questions", facts.questions[::12])
    config = study_of_size(
        "natural",
        threats=("facts",),
        methods=("act",),
        seeds=1,
        ceiling_seeds=1,
        n_pairs=4,
        n_prompts=2,
        n_analysed=2,
        extra_conditions=(),
        analysed=(),
        training=replace(NATURAL_TRAINING, steps=2, batch_size=2),
        model=str(REAL),
    )
    study = Study(config, tmp_path / "study", progress=False, pool=Pool(1))
    for _ in study:
        pass
    found = study.finish()

    base = found.results.query("condition == 'base' and metric == 'good_rate'")
    assert set(base.query("prompt_side in ('clean', 'benign')")["value"]) == {1.0}
    assert set(found.results["condition"]) == {"base", "retention", "act"}
    assert {claim.key for claim in found.claims} >= {"repair"}
