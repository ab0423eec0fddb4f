"""Claims about what changed inside, from made-up analyses whose numbers can be worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctlens.analysis import AttentionDiff, CrossLoss, Erasure, ShiftSimilarity, Transplant
from ctlens.analysis.attention.diff import ATTENTION_MEASURES, HEADLINE
from ctlens.analysis.base.positions import STATE_POSITIONS
from ctlens.analysis.base.result import Result
from ctlens.analysis.residual.shift_vectors import SHIFT_PARTS
from ctlens.study.analyses import EQUAL_STEPS, MATCHED, Analysis, FinishedAnalyses
from ctlens.study.claims import Claim
from ctlens.study.claims.inside import inside_claims
from ctlens.study.config import Cell, StudyConfig
from ctlens.study.figures import figures_at_setting

METHODS = ("act", "mlpct", "attct", "bct")
LAYERS = 4
PROMPTS = 16
NAN = float("nan")
CONFIG = StudyConfig(("sycophancy",), METHODS, n_analysed=PROMPTS)


def write(study: Path, analysis: str, results: Mapping[str, Result], setting: str = EQUAL_STEPS) -> None:
    folder = Analysis(analysis, "sycophancy", setting).path(study)
    folder.mkdir(parents=True)
    for name, result in results.items():
        result.save(folder / f"{name}.safetensors")


def attention(falls: Mapping[str, float], study: Path, seed: int = 0) -> None:
    """Every cell's attention, which `FinishedAnalyses` reads from the cells themselves."""
    for name, fall in falls.items():
        values = np.zeros((2, len(ATTENTION_MEASURES), PROMPTS, LAYERS, 2))
        values[0, ATTENTION_MEASURES.index(HEADLINE)] = 0.5 + np.linspace(-0.1, 0.1, PROMPTS)[:, None, None]
        values[1, ATTENTION_MEASURES.index(HEADLINE)] = values[0, ATTENTION_MEASURES.index(HEADLINE)] - fall
        place = Cell("sycophancy", name, seed).path(study)
        place.mkdir(parents=True)
        AttentionDiff(values).save(place / "attention.safetensors")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    attention({"retention": 0.0, "act": 0.1, "mlpct": 0.12, "attct": 0.2, "bct": 0.05}, tmp_path)
    return tmp_path


def claims(study: Path, config: StudyConfig = CONFIG) -> dict[tuple[str, str], Claim]:
    return {(claim.key, claim.setting): claim for claim in inside_claims(FinishedAnalyses(config, study))}


def similarity(
    cosines: np.ndarray, methods: tuple[str, ...] = METHODS, without: Sequence[np.ndarray] = ()
) -> ShiftSimilarity:
    """The same cosines at every prompt and layer off the gap at the last token, and nothing like them elsewhere.

    Those without each seed are `without`; where there are none, the models are of one seed.
    """
    m = len(methods)
    where = SHIFT_PARTS.index("off"), STATE_POSITIONS.index("last")
    by_prompt = np.full((len(SHIFT_PARTS), len(STATE_POSITIONS), LAYERS, PROMPTS, m, m), -0.9)
    by_prompt[where] = cosines
    left = without or [np.full_like(cosines, NAN)]
    without_seed = np.full((len(left), *by_prompt.shape), -0.9)
    for of_seed, table_left in zip(without_seed, left, strict=True):
        of_seed[where] = table_left
    two = np.zeros((1, len(SHIFT_PARTS), len(STATE_POSITIONS), LAYERS, m, m))
    arrays: dict[str, Any] = {
        f.name: two
        for f in dataclasses.fields(ShiftSimilarity)
        if f.name.split("_")[0] in ("value", "ci", "seed", "corrected")
    }
    arrays |= {
        "random_low": two[..., 0],
        "random_high": two[..., 0],
        "length": 1 + two[0, ..., 0],
        "n_prompts": two[0].astype(int),
    }
    return ShiftSimilarity(
        **arrays,
        by_prompt=by_prompt,
        without_seed=without_seed,
        quantities=("cosine",),
        methods=methods,
        layers=(0, 1, 2, 3),
        null="",
        one_seed=() if without else methods,
        site="resid_post",
    )


def table(internal: float, attct: float, bct: float, ceiling: float = NAN) -> np.ndarray:
    """ACT and MLPCT are `internal` alike, AttCT with them `attct`, BCT with all `bct`."""
    cosines = np.full((4, 4), bct)
    cosines[:3, :3] = attct
    cosines[0, 1] = internal
    cosines[1, 0] = internal
    np.fill_diagonal(cosines, ceiling)
    return cosines


def test_bct_stands_apart_beyond_the_furthest_internal_method(study: Path) -> None:
    write(study, "similarity", {"similarity": similarity(table(0.9, 0.7, 0.4))})

    found = claims(study)["shared", EQUAL_STEPS]

    bct = (0.9 + 0.7 + 0.7) / 3 - 0.4
    attct = (0.9 + 0.4 + 0.4) / 3 - (0.7 + 0.7 + 0.4) / 3  # the furthest internal method
    assert found.value == pytest.approx(bct - attct, abs=1e-6)
    assert (found.verdict, found.n, found.over) == ("inconclusive", PROMPTS, "prompts")
    assert "seeds of one method differ by less takes 3 of each" in found.reason
    assert "AttCT -0.03" in found.reason and "BCT 0.37" in found.reason


def test_methods_are_told_apart_beyond_what_seeds_differ_by(study: Path) -> None:
    """BCT's cosine with the others is b = .4 over all seeds; then the claim's number is 14/15 - 4b/3."""
    alike = [table(0.9, 0.7, 0.4)] * 3
    unlike = [table(0.9, 0.7, bct) for bct in (0.3, 0.4, 0.5)]
    write(study, "similarity", {"similarity": similarity(table(0.9, 0.7, 0.4), without=alike)})
    write(study, "similarity", {"similarity": similarity(table(0.9, 0.7, 0.4), without=unlike)}, MATCHED)

    found = claims(study)

    equal = found["shared", EQUAL_STEPS]
    assert (equal.verdict, equal.over) == ("holds", "prompts and seeds")
    matched = found["shared", MATCHED]
    reach = 4.302653 * (4 / 15) / 3**0.5  # Student's, of the pseudo-values 2/15, 6/15 and 10/15
    assert (matched.value, matched.ci_low, matched.ci_high) == pytest.approx((0.4, 0.4 - reach, 0.4 + reach), abs=1e-5)
    assert (matched.verdict, matched.prompts_low) == ("inconclusive", pytest.approx(0.4, abs=1e-6))


def test_where_attct_stands_further_apart_the_claim_does_not_hold(study: Path) -> None:
    write(study, "similarity", {"similarity": similarity(table(0.9, 0.3, 0.6))})

    assert claims(study)["shared", EQUAL_STEPS].verdict == "does not hold"


def test_the_null_of_likeness_is_retention_alone(study: Path) -> None:
    cosines = np.full((5, 5), 0.1)
    cosines[:4, :4] = table(0.9, 0.7, 0.4)
    with_null = dataclasses.replace(similarity(cosines, (*METHODS, "retention")), null="retention")
    write(study, "similarity", {"similarity": with_null})

    assert claims(study)["shared", EQUAL_STEPS].null == pytest.approx(0.1, abs=1e-6)


def test_each_choice_of_positions_is_judged_by_itself(study: Path) -> None:
    cosines = table(0.9, 0.7, 0.4)
    write(study, "similarity", {"similarity": similarity(cosines, without=[cosines] * 3)})

    found = claims(study)

    assert found["shared", EQUAL_STEPS].verdict == "holds"
    assert found["shared_content", EQUAL_STEPS].value == pytest.approx(0.0, abs=1e-6)
    assert found["shared_content", EQUAL_STEPS].verdict != "holds"


def transplant(lost: float, effect: float = 4.0) -> Transplant:
    """A repair of which a share is lost with the base's stream at layer 1 and the last token, and nothing elsewhere."""
    donor = np.linspace(1.0, 3.0, PROMPTS) + effect
    recipient = donor - effect * np.linspace(0.5, 1.5, PROMPTS)
    unpatched, source = np.array([[recipient], [donor]]), np.array([[donor], [recipient]])
    values = np.repeat(np.repeat(unpatched[:, :, None, None], LAYERS, 2), 2, 3)
    values[1, 0, 1, 0] = donor + lost * (recipient - donor)
    return Transplant(
        values, unpatched, source, ("logit_diff",), (0, 1, 2, 3), ("last", "content"), "resid_post", "wrapped", "suffix"
    )


CROSSED = {"act": 0.9, "act_last": 0.8, "mlpct": 0.9, "attct": 0.8, "bct": 0.5, "klct": 0.6, "klct_last": 0.4}


def test_what_is_lost_tells_levels_apart(study: Path) -> None:
    write(study, "transplant", {name: transplant(lost) for name, lost in CROSSED.items()})

    found = claims(study)["left_later", EQUAL_STEPS]

    within = np.mean([*(0.1, 0.0, 0.1, 0.1, 0.0, 0.1), *(0.1, 0.1, 0.2)])
    assert found.value == pytest.approx(0.85 - 0.5 - within)
    assert (found.null, found.floor) == (pytest.approx(within), 0.0)
    assert found.verdict == "holds" and "lost: " in found.reason and "BCT 0.50" in found.reason


def test_a_contrast_within_the_spread_of_a_level_does_not_hold(study: Path) -> None:
    shares = {"act": 0.9, "mlpct": 0.5, "attct": 0.7, "bct": 0.6, "klct": 0.8}
    write(study, "transplant", {name: transplant(lost) for name, lost in shares.items()})

    assert claims(study)["left_later", EQUAL_STEPS].verdict == "does not hold"


def test_the_level_is_told_from_the_window(study: Path) -> None:
    write(study, "transplant", {name: transplant(lost) for name, lost in CROSSED.items()})
    only_window = {"act": 0.9, "klct": 0.9, "act_last": 0.4, "klct_last": 0.4}
    write(study, "transplant", {name: transplant(lost) for name, lost in only_window.items()}, MATCHED)

    found = claims(study)

    assert found["level", EQUAL_STEPS].value == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert found["level", EQUAL_STEPS].null == pytest.approx(((0.9 - 0.8) + (0.6 - 0.4)) / 2)
    assert found["level", EQUAL_STEPS].verdict == "holds"
    assert found["level", MATCHED].value == pytest.approx(0.0, abs=1e-9)
    assert found["level", MATCHED].verdict != "holds" and found["level", MATCHED].null == pytest.approx(0.5)


def test_a_condition_without_an_effect_has_no_share(study: Path) -> None:
    write(
        study, "transplant", {name: transplant(lost, 0.1 if name == "klct" else 4.0) for name, lost in CROSSED.items()}
    )

    found = claims(study)

    assert found["level", EQUAL_STEPS].verdict == "not measured"
    within = np.mean([*(0.1, 0.0, 0.1, 0.1, 0.0, 0.1), 0.1])
    assert found["left_later", EQUAL_STEPS].value == pytest.approx(0.85 - 0.45 - within)


def cross_loss(after: Mapping[str, tuple[float, float]]) -> CrossLoss:
    """By model, the ACT distance and the cross-entropy as multiples of those before."""
    models = ("base", *after)
    factors = np.array([(1.0, 1.0), *after.values()])
    by_hook = factors[:, :, None] * np.linspace(1, 3, PROMPTS)
    points = ("blocks.0.hook_resid_post", "logits")
    return CrossLoss(by_hook, np.ones((2, PROMPTS), dtype=bool), models, ("act", "bct"), points, "reference")


@pytest.mark.parametrize(
    ("distance", "drift", "entropy", "judged"),
    [
        (0.5, 1.0, 0.1, "does not hold"),
        (4.0, 1.0, 0.1, "holds"),
        (1.3, 1.5, 0.1, "does not hold"),  # retention alone drifts further
        (4.0, 1.0, 2.0, "inconclusive"),  # the cross-entropy rose
    ],
)
def test_the_distance_is_held_against_drift(
    study: Path, distance: float, drift: float, entropy: float, judged: str
) -> None:
    after = {"bct": (distance, entropy), "retention": (drift, 1.0)}
    write(study, "cross-loss", {"cross-loss": cross_loss(after)})

    found = claims(study)["distance", EQUAL_STEPS]

    assert (found.value, found.null, found.floor) == pytest.approx((distance / drift, drift, 1.0))
    assert found.verdict == judged and f"{entropy:.2f} of the cross-entropy" in found.reason


def test_attention_falls_beyond_the_next(study: Path) -> None:
    found = claims(study)["attention", EQUAL_STEPS]

    assert found.value == pytest.approx(0.2 - 0.12) and found.null == pytest.approx(0.0, abs=1e-12)
    assert "MLPCT 0.120" in found.reason
    assert found.verdict == "inconclusive" and "takes 3 of each" in found.reason


def test_attention_is_judged_over_three_seeds(study: Path) -> None:
    for seed, fall in ((1, 0.21), (2, 0.22)):
        attention({"retention": 0.0, "act": 0.1, "mlpct": 0.12, "attct": fall, "bct": 0.05}, study, seed=seed)

    found = claims(study, dataclasses.replace(CONFIG, seeds=3))["attention", EQUAL_STEPS]

    reach = 4.302653 * 0.01 / 3**0.5
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx((0.09, 0.09 - reach, 0.09 + reach), abs=1e-6)
    assert (found.verdict, found.over) == ("holds", "prompts and seeds")


def erasure(read: Mapping[str, float]) -> Erasure:
    """By model, the accuracy, with .1 to both sides, at layer 2, worse at others; shuffled labels reach .25.

    That is what the linear probe reads at the last token; the other probe and the other place are always right.
    """
    models = ("base", *read)
    readable = np.ones((2, 2, len(models), LAYERS, 5))
    for row, value in enumerate((0.95, *read.values())):
        readable[0, 0, row] = (0.3, 0.2, 0.4, 0.1, 0.25)
        readable[0, 0, row, 2] = (value, value - 0.1, value + 0.1, 0.1, 0.25)
    effects = np.zeros((3, len(models), LAYERS, 5, PROMPTS))
    answers = np.zeros((len(models), PROMPTS))
    return Erasure(
        readable=readable,
        used=effects,
        reelicited=effects[0],
        patched=effects[0, :, :, 0],
        wrapped=answers,
        clean=answers,
        held_out=np.arange(PROMPTS) % 2 == 0,
        models=models,
        layers=(0, 1, 2, 3),
        control="retention",
        question="the hint",
        read_positions=("last", "content"),
        direction="d",
    )


def test_a_cue_is_readable_where_a_refitted_probe_beats_shuffled_labels(study: Path) -> None:
    write(
        study, "erasure", {"erasure": erasure({"act": 0.2, "mlpct": 0.3, "attct": 0.6, "bct": 0.9, "retention": 0.95})}
    )

    found = claims(study)

    judged = {name: found[f"cue_{name}", EQUAL_STEPS].verdict for name in METHODS}
    assert judged == {"act": "inconclusive", "mlpct": "inconclusive", "attct": "holds", "bct": "holds"}
    bct = found["cue_bct", EQUAL_STEPS]
    assert (bct.value, bct.ci_low, bct.null, bct.floor) == pytest.approx((0.9, 0.8, 0.95, 0.25))
    assert "layer 2" in bct.reason and "the hint" in bct.statistic


def test_a_refusal_is_the_reason(study: Path) -> None:
    write(study, "erasure", {})
    (Analysis("erasure", "sycophancy", EQUAL_STEPS).path(study) / "refused.json").write_text('{"erasure": "too few."}')

    found = claims(study)["cue_act", EQUAL_STEPS]

    assert found.verdict == "not measured" and found.reason.endswith("; too few.")


def test_what_no_look_has_is_not_measured(study: Path) -> None:
    found = claims(study)

    assert {claim.verdict for (key, _), claim in found.items() if key != "attention"} == {"not measured"}
    assert all(np.isnan(claim.value) for (key, _), claim in found.items() if key != "attention")


def test_a_matrix_of_no_method_is_not_drawn(study: Path) -> None:
    cosines = np.ones((2, 2))
    write(study, "similarity", {"similarity": similarity(cosines, ("klct", "klct_last"))}, MATCHED)

    drawn = [name for name, _ in figures_at_setting(CONFIG, study, "sycophancy", MATCHED)]

    assert drawn == []
