"""Claims: numbers worked out by hand, intervals over what was repeated, and verdicts by the written rule."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from helpers.documents import blocks

from ctlens.core.clusters import Clusters, paired_difference
from ctlens.core.errors import CtlensError
from ctlens.core.stats import student
from ctlens.evaluation import Evaluation
from ctlens.evaluation.result import OUTCOME_COLUMNS
from ctlens.study.claims import Claim, answer, basis, claim_verdict, read_claims, write_claims
from ctlens.study.claims.behaviour import WrappedRates, behaviour_claims
from ctlens.study.claims.estimates import NOTHING, claim_estimate
from ctlens.study.claims.statistic import Statistic, of_parts, of_prompts, whole
from ctlens.study.conditions import CROSSED_CONDITIONS
from ctlens.study.config import Cell, StudyConfig
from ctlens.study.results import Counted, pooled

METHODS = ("act", "mlpct", "attct", "bct")
NAN = float("nan")


@pytest.mark.parametrize(
    ("numbers", "floor", "expected"),
    [
        ((0.5, 0.1, 0.9), 0.0, "holds"),
        ((0.5, 0.1, 0.9), 0.1, "inconclusive"),
        ((0.5, 0.1, 0.9), 0.95, "does not hold"),
        ((-0.2, -0.4, 0.0), 0.0, "does not hold"),
        ((0.0, 0.0, 0.0), 0.0, "does not hold"),
        ((NAN, NAN, NAN), 0.0, "not measured"),
        ((0.5, NAN, NAN), 0.0, "not measured"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_floor(numbers: tuple, floor: float, expected: str) -> None:
    assert claim_verdict(*numbers, floor) == expected


def mean_of(values: np.ndarray, clusters: Clusters | None = None) -> Statistic:
    return of_prompts("the mean", "", values, np.mean, clusters)


def test_a_statistic_of_parts_follows_the_prompts_that_count() -> None:
    parts = [of_prompts("one", "logits", np.arange(4.0), np.mean), of_prompts("two", "logits", np.ones(4), np.mean)]

    found = of_parts("one less two", "logits", parts, lambda of: of["one"] - of["two"])

    assert (found.name, found.unit, found.n) == ("one less two", "logits", 4)
    assert (whole(found), found.of(np.array([3, 3, 0]))) == (0.5, 1.0)


def test_of_one_training_the_interval_is_over_prompts() -> None:
    values = np.arange(40.0)

    found = claim_estimate({0: mean_of(values)})

    assert (found.value, found.n, found.over) == (19.5, 40, "prompts")
    assert 19.5 - 2.2 * 11.7 / 40**0.5 < found.low < 19.5 < found.high < 19.5 + 2.2 * 11.7 / 40**0.5


def test_two_seeds_share_their_resamples() -> None:
    values = np.arange(40.0)

    opposite = claim_estimate({0: mean_of(values), 1: mean_of(-values)})

    assert (opposite.value, opposite.low, opposite.high, opposite.over) == (0.0, 0.0, 0.0, "prompts")


def constant(value: float) -> Statistic:
    return of_prompts("constant", "", np.full(8, value), np.mean)


def test_three_seeds_widen_the_interval_and_never_narrow_it() -> None:
    found = claim_estimate({seed: constant(value) for seed, value in enumerate((1.0, 2.0, 3.0))})
    alike = claim_estimate({seed: mean_of(np.arange(40.0)) for seed in range(3)})

    reach = 4.302652729911275 / 3**0.5  # Student's t with two degrees of freedom, standard deviation 1
    assert (found.value, found.n, found.over) == (2.0, 8, "prompts and seeds")
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach))
    alone = claim_estimate({0: mean_of(np.arange(40.0))})
    assert (alike.low, alike.high) == pytest.approx((alone.low, alone.high))


def test_a_training_whose_number_is_not_defined_does_not_count() -> None:
    found = claim_estimate({0: constant(1.0), 1: constant(NAN)})

    assert (found.value, found.over) == (1.0, "prompts")
    assert claim_estimate({0: constant(NAN)}) is NOTHING


def test_nothing_measured_is_nothing() -> None:
    assert claim_estimate({}) is NOTHING


def test_an_estimate_is_over_what_prompts_share() -> None:
    values = np.repeat(np.arange(6.0), 8)
    topics = Clusters.of({"topic": np.repeat(np.arange(6), 8).astype(str).tolist()})

    alone = claim_estimate({0: mean_of(values)})
    found = claim_estimate({0: mean_of(values, topics)})
    few = claim_estimate({0: mean_of(values, Clusters.of({"topic": ["a"] * 20 + ["b"] * 28}))})

    assert (found.low, found.high) == pytest.approx(student(np.arange(6.0)))
    assert found.low < alone.low < alone.value == found.value < alone.high < found.high
    assert np.isnan([few.low, few.high]).all() and few.value == found.value


def results(rates: dict[tuple[str, str, str], tuple[int, ...]], n: int = 100) -> pd.DataFrame:
    """Bad answers to wrapped prompts by (trained, method, evaluated), one number a seed."""
    place = {
        "step": 100,
        "split": "heldout",
        "prompt_side": "wrapped",
        "metric": "bad_rate",
        "n_prompts": n,
        "n_effective": float(n),
    }
    return pd.DataFrame(
        [
            {"trained_threat": t, "condition": m, "evaluated_threat": e, "seed": seed, "value": count / n, **place}
            for (t, m, e), counts in rates.items()
            for seed, count in enumerate(counts)
        ]
    )


def own(threat: str, **counts: int) -> dict[tuple[str, str, str], tuple[int, ...]]:
    return {(threat, method, threat): (count,) for method, count in counts.items()}


def answered(folder: Path, rates: dict[tuple[str, str, str], tuple[int, ...]], n: int = 100) -> Path:
    """The answers in a study's folder: the first `count` of `n` prompts, each of a topic of its own, get a bad one."""
    found: dict[Cell, list[tuple]] = {}
    for (trained, condition, evaluated), counts in rates.items():
        for seed, count in enumerate(counts):
            verdicts = ["bad"] * count + ["good"] * (n - count)
            found.setdefault(Cell(trained, condition, seed), []).extend(
                (evaluated, "heldout", "wrapped", item, f"p{item}", "", 1, f"t{item}", "", "", verdict, NAN, NAN)
                for item, verdict in enumerate(verdicts)
            )
    for cell, rows in found.items():
        cell.path(folder).mkdir(parents=True)
        Evaluation(pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS))).save(cell.path(folder) / "outcomes.csv")
    return folder


def claims_of(rates: dict[tuple[str, str, str], tuple[int, ...]], *threats: str, n: int = 100) -> dict[str, Claim]:
    config = StudyConfig(threats, METHODS, analysed=())
    with TemporaryDirectory() as folder:
        judged = [*behaviour_claims(config, answered(Path(folder), rates, n), results(rates, n))]
    return {f"{claim.key}/{claim.threat}": claim for claim in judged}


def fewer(count: int, n: int = 100, level: float = 0.95) -> tuple[float, float]:
    """The interval of a rate less another where the first is bad on so many prompts more, and on none less."""
    alone = Clusters.of({"topic": [f"t{item}" for item in range(n)]})
    return paired_difference((np.arange(n) < count).astype(float), np.zeros(n), alone, level)


def test_a_repair_is_judged_by_the_weakest_method() -> None:
    found = claims_of(own("jailbreak", retention=80, act=0, mlpct=10, attct=50, bct=0), "jailbreak")["repair/jailbreak"]

    assert found.value == pytest.approx(0.3)
    assert (found.ci_low, found.ci_high) == pytest.approx(fewer(30))
    assert found.verdict == "holds" and "AttCT" in found.statistic and "AttCT 50%" in found.reason


def test_a_repair_that_one_method_lacks_does_not_hold() -> None:
    found = claims_of(own("prefill", retention=76, act=76, mlpct=76, attct=76, bct=0), "prefill")

    assert found["repair/prefill"].verdict == "inconclusive"


def test_a_repair_hangs_on_the_least_certain_method() -> None:
    rates = {("jailbreak", name, "jailbreak"): (10, 10, 10) for name in METHODS}
    rates |= {("jailbreak", "retention", "jailbreak"): (60, 60, 60), ("jailbreak", "act", "jailbreak"): (0, 5, 55)}

    found = claims_of(rates, "jailbreak")["repair/jailbreak"]

    assert "weakest method, ACT" in found.statistic and found.verdict == "inconclusive"


def test_a_repair_on_too_few_topics_has_no_verdict(tmp_path: Path) -> None:
    rates = own("persona", retention=80, act=0, mlpct=0, attct=10, bct=0)
    for cell in answered(tmp_path, rates).glob("runs/*/outcomes.csv"):
        rows = Evaluation.load(cell).outcomes
        Evaluation(rows.assign(topic=[f"t{item % 3}" for item in rows["item"]])).save(cell)

    found, *_ = behaviour_claims(StudyConfig(("persona",), METHODS, analysed=()), tmp_path, results(rates))

    assert (found.value, found.verdict) == (0.7, "not measured") and "AttCT" in found.statistic
    assert found.reason.startswith("it is 0.70, of too few topics or wrapper texts for an interval")


@pytest.mark.parametrize(
    ("internal", "bct", "value", "judged"),
    [
        (76, 0, 0.5, "holds"),  # of 76 under retention alone, all are left and none
        (30, 10, 30 / 76 - 0.5, "inconclusive"),  # internal methods repair more than half: they do not fail
        (20, 0, 20 / 76 - 0.5, "does not hold"),
        (76, 60, 0.5 - 60 / 76, "does not hold"),  # BCT fails too
    ],
)
def test_failing_is_leaving_more_than_half(internal: int, bct: int, value: float, judged: str) -> None:
    counts = {"retention": 76, "act": internal, "mlpct": 76, "attct": 76, "bct": bct}

    found = claims_of(own("prefill", **counts), "prefill")["output_only/prefill"]

    assert (found.value, found.verdict) == (pytest.approx(value), judged)


def test_other_threats_do_not_ask_whether_internal_methods_fail() -> None:
    rates = own("sycophancy", retention=80, act=0, mlpct=30, attct=2, bct=0)

    assert "output_only/sycophancy" not in claims_of(rates, "sycophancy")


def test_three_seeds_widen_the_interval_of_a_repair() -> None:
    rates = {("jailbreak", name, "jailbreak"): (10, 10, 10) for name in METHODS}
    rates["jailbreak", "retention", "jailbreak"] = (80, 70, 90)

    found = claims_of(rates, "jailbreak")["repair/jailbreak"]

    reach = 4.302652729911275 * 0.1 / 3**0.5
    assert (found.n, found.over, found.value) == (100, "prompts and seeds", pytest.approx(0.7))
    assert (found.ci_low, found.ci_high) == pytest.approx((0.7 - reach, 0.7 + reach))


def test_the_claim_that_the_documents_add_is_judged(tmp_path: Path) -> None:
    names = vars(import_module("ctlens.study.claims.behaviour")).copy()
    exec(blocks("docs/extending.md", "python")[-1], names)
    rates = own("jailbreak", retention=80, act=40, bct=10)

    found = names["_outputs_repair_more"](WrappedRates(answered(tmp_path, rates), results(rates)), "jailbreak")

    assert (found.value, found.verdict) == (pytest.approx(0.3), "holds")
    assert (found.ci_low, found.ci_high) == pytest.approx(fewer(30))


def transferred(bad: int) -> Claim:
    both = ("sycophancy", "persona")
    rates = {(t, m, e): (80,) for t in both for m in ("retention", *METHODS) for e in both}
    rates["sycophancy", "bct", "persona"] = (bad,)
    return claims_of(rates, *both)["transfer/all"]


def test_a_transfer_is_the_largest_change_with_bonferronis_level() -> None:
    found = transferred(40)

    assert found.value == pytest.approx(0.4) and "persona, BCT on sycophancy" in found.statistic
    assert (found.ci_low, found.ci_high) == pytest.approx(fewer(40, level=1 - 0.05 / 8))
    assert found.verdict == "holds" and "1 of 8 changes" in found.reason


def test_a_change_that_only_a_single_look_would_call_clear_is_no_transfer() -> None:
    assert fewer(5)[0] > 0
    assert transferred(75).verdict == "inconclusive"


def test_bonferronis_level_holds_over_trainings_too() -> None:
    both = ("sycophancy", "persona")
    rates = {(t, m, e): (800, 800, 800) for t in both for m in ("retention", *METHODS) for e in both}
    rates["sycophancy", "bct", "persona"] = (760, 750, 740)

    found = claims_of(rates, *both, n=1000)["transfer/all"]

    t = 24.4  # Student's at 1 - .05 / 8 with two degrees of freedom is far beyond the 4.3 of one look
    assert found.ci_low < 0.05 - 4.4 * 0.01 / 3**0.5 and found.value == pytest.approx(0.05)
    assert found.ci_low > 0.05 - t * 0.01 / 3**0.5


def test_a_rise_is_a_change_too() -> None:
    assert transferred(99).value == pytest.approx(0.19)
    assert transferred(99).ci_low > 0


def claim(key: str, threat: str, judged: str, setting: str = "equal steps", **changes: object) -> Claim:
    made = Claim(key, key, threat, setting, "", "", 0.5, 0.1, 0.9, 0.1, 0.9, NAN, 0.0, 64, "prompts", judged, "")
    return replace(made, **changes)


def test_the_answer_says_of_each_threat_what_holds() -> None:
    told = answer(
        [
            claim("repair", "sycophancy", "holds"),
            claim("repair", "prefill", "inconclusive"),
            claim("output_only", "prefill", "holds"),
            claim("shared", "sycophancy", "does not hold"),
            claim("shared", "sycophancy", "does not hold", "matched effect"),
            claim("left_later", "jailbreak", "holds"),
            claim("left_later", "jailbreak", "inconclusive", "matched effect"),
            claim("level", "jailbreak", "not measured"),
            claim("cue_act", "sycophancy", "holds"),
            claim("cue_bct", "sycophancy", "does not hold"),
            claim("cue_bct", "jailbreak", "not measured"),
        ]
    )

    assert [one.sentence for one in told] == [
        "Yes on sycophancy; not clear on prefill.",
        "Yes on prefill.",
        "No on sycophancy.",
        "Yes on jailbreak at equal steps; not clear on jailbreak at matched effect.",
        "Of 2 cases, a method on a threat each: yes in 1, no in 1.",
    ]
    assert told[1].question == "Do internal losses fail where BCT does not?"
    assert told[-1].question == "Can a refitted probe still read the cue?"


def test_the_answer_says_what_intervals_are_over() -> None:
    several = [claim("repair", "sycophancy", "holds", over="prompts and seeds", n=96)]

    assert "over topics and wrapper texts, and over seeds, of one model" in basis(several)
    assert "over topics and wrapper texts, of one model" in basis([])
    assert answer([claim("shared", "prefill", "not measured")]) == []


def test_claims_are_read_as_written(tmp_path: Path) -> None:
    written = [claim("repair", "sycophancy", "holds"), claim("shared", "jailbreak", "not measured", value=NAN)]

    write_claims(written, tmp_path / "claims.csv")

    read = read_claims(tmp_path / "claims.csv")
    assert read[0].value == 0.5 and np.isnan(read[1].value) and np.isnan(read[0].null)
    assert [(one.key, one.verdict, one.n) for one in read] == [("repair", "holds", 64), ("shared", "not measured", 64)]


def test_a_table_without_verdicts_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"key": ["repair"]}).to_csv(tmp_path / "claims.csv", index=False)

    with pytest.raises(CtlensError, match=r"lacks the columns statement, .*verdict"):
        read_claims(tmp_path / "claims.csv")
    with pytest.raises(CtlensError, match="does not exist"):
        read_claims(tmp_path / "other.csv")


def test_the_crossed_conditions_cross_two_levels_and_two_windows() -> None:
    assert {(condition.level, condition.window) for condition in CROSSED_CONDITIONS.values()} == {
        ("output", None),
        ("output", "last"),
        ("internal", "last"),
    }


def test_several_trainings_make_no_interval_where_there_are_too_few_clusters() -> None:
    few = Clusters.of({"topic": ["a"] * 20 + ["b"] * 28})
    values = np.arange(48.0)

    found = claim_estimate({seed: mean_of(values + seed, few) for seed in range(3)})
    rate = pooled([Counted(10 + seed, 24, NAN) for seed in range(3)])

    assert found.value == pytest.approx(24.5) and np.isnan([found.low, found.high]).all()
    assert rate.value == pytest.approx(11 / 24) and np.isnan([rate.low, rate.high]).all()
