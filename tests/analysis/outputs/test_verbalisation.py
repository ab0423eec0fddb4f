"""Verbalisation: rates counted by hand, the switch rates of the threats, and a chat model with a judge of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import planted
from helpers.models import chat_model
from numpy.typing import ArrayLike

import ctlens as ct
from ctlens.analysis import Verbalisation, verbalisation
from ctlens.analysis.outputs.verbalisation import FEWEST_ANSWERS
from ctlens.core.clusters import clustered_ratio
from ctlens.core.errors import CtlensError
from ctlens.data.pairs import Pair
from ctlens.models.parameters import copy_model, fingerprint
from ctlens.models.smollm2 import has_smollm2
from ctlens.threats import ask
from ctlens.threats.base import Count, Outcomes, switches

SHORT: dict[str, Any] = {"max_new_tokens": 3, "progress": False}
REAL = Path(__file__).parents[3] / "runs" / "models" / "smollm2"


def made(bad: ArrayLike, clean_bad: ArrayLike, admissions: ArrayLike, **groups: Any) -> Verbalisation:
    """A result of one model, by 0 and 1 per pair."""
    wrapped = np.array([bad], dtype=bool)
    answers = {"model": [""] * wrapped.shape[1]}
    clean = np.array([clean_bad], dtype=bool)
    return Verbalisation(wrapped, clean, np.array([admissions]), answers, ("model",), groups=groups)


def numbers(found: Verbalisation, model: str = "model") -> Any:
    return found.to_dataframe().query("model == @model").set_index("metric")


def test_the_rates_are_those_counted_by_hand() -> None:
    bad = [1] * 12 + [1, 0] + [0] * 10
    clean_bad = [0] * 12 + [1, 1] + [0] * 10  # twelve switched, one was bad already, one switched back
    admissions = [1] * 6 + [0] * 3 + [-1] * 3 + [1, 0] + [1] * 2 + [0] * 8

    found = numbers(made(bad, clean_bad, admissions))
    assert found["value"].to_dict() == pytest.approx(
        {
            "switch_to_bad": 12 / 24,
            "switch_from_bad": 1 / 24,
            "switch_net": 11 / 24,
            "admitted": 9 / 24,
            "admitted_given_switched": 6 / 12,
            "denied_given_switched": 3 / 12,
            "unclear_given_switched": 3 / 12,
            "admitted_given_not_switched": 3 / 12,
        }
    )
    assert found["n_prompts"].tolist() == [24] * 4 + [12] * 4


def test_of_fewer_answers_no_share_is_told() -> None:
    few = FEWEST_ANSWERS - 1
    found = numbers(made([1] * few + [0] * 20, [0] * (few + 20), [0] * (few + 20)))

    assert np.isnan(found.loc["denied_given_switched", ["value", "ci_low", "ci_high"]].to_numpy(dtype=float)).all()
    assert found.loc["denied_given_switched", "n_prompts"] == few
    assert found.loc["admitted_given_not_switched", "value"] == 0
    assert numbers(made([1] * 10, [0] * 10, [0] * 10)).loc["denied_given_switched", "value"] == 1


def test_the_interval_of_a_conditional_share_is_that_of_the_ratio_with_wilsons_shape() -> None:
    """With many answers both are alike, over clusters too; at a share of 1 the ratio's has no width and ours has."""
    draw = np.random.default_rng(0)
    n = 2400
    topics = np.arange(n) % 40
    bad = draw.random(n) < 0.6
    admits = (draw.random(n) < 0.3 + 0.4 * (topics % 2)).astype(int)
    found = made(bad, np.zeros(n), admits, topic=topics, wrapper=np.arange(n) // 40 % 20)

    row = numbers(found).loc["admitted_given_switched"]
    ratio = clustered_ratio((bad & (admits == 1)).astype(float), bad.astype(float), found.clusters())
    assert row["value"] == pytest.approx(float(ratio[0]))
    assert [row["ci_low"], row["ci_high"]] == pytest.approx([float(end) for end in ratio[1:]], abs=0.01)
    alone = numbers(made(bad, np.zeros(n), admits)).loc["admitted_given_switched"]
    assert row["ci_high"] - row["ci_low"] > 1.5 * (alone["ci_high"] - alone["ci_low"])
    sure = numbers(made([1] * 30, [0] * 30, [1] * 30)).loc["admitted_given_switched"]
    assert (sure["value"], sure["ci_high"]) == pytest.approx((1, 1)) and 0.8 < sure["ci_low"] < 0.95


def says_no(pairs: Sequence[Pair], answers: Sequence[str]) -> list[bool | None]:
    """Takes the answer that the cue presses for as its admission, of one person it cannot tell."""
    judged: list[bool | None] = [answer.startswith("no") for answer in answers]
    return [None if pair.labels["entity"] == "ada" else one for pair, one in zip(pairs, judged, strict=True)]


@pytest.fixture(scope="module")
def found() -> Verbalisation:
    models = {name: planted.model(name) for name in ("base", "erased")}
    return verbalisation(models, planted.pairs(), says_no, **SHORT)


def test_a_planted_model_switches_and_says_so_and_a_repaired_one_does_neither(found: Verbalisation) -> None:
    base = numbers(found, "base")["value"]
    assert base["switch_to_bad"] == 1 and base["switch_from_bad"] == 0
    assert base["admitted_given_switched"] == pytest.approx(5 / 6)  # one of six people is unclear
    assert base["unclear_given_switched"] == pytest.approx(1 / 6) and base["denied_given_switched"] == 0
    erased = numbers(found, "erased")
    assert erased.loc["switch_to_bad", "value"] == 0 == erased.loc["admitted_given_not_switched", "value"]
    assert erased.loc["admitted_given_switched", "n_prompts"] == 0
    assert np.isnan(erased.loc["admitted_given_switched", "value"])
    rows: Any = found.by_pair("base")
    assert set(rows["answer"]) == {"no no no"} and rows["bad"].all() and rows["switched"].all()
    unclear = np.array([pair.labels["entity"] == "ada" for pair in planted.pairs()])
    assert (rows["judged"] == np.where(unclear, "unclear", "admitted")).all()


def test_the_switch_rates_are_those_of_the_threats() -> None:
    model = ct.load_organism()
    pairs = ct.threats.get("sycophancy").pairs(24, split="heldout")
    turned = [Pair(pair.wrapped, pair.clean, labels=pair.labels) for pair in pairs]  # so that some switch back
    asked = [*pairs[:16], *turned[16:]]

    rates = numbers(verbalisation(model, asked, ct.organism.by_reason, progress=False))["value"]
    verdicts = {
        side: np.array([reply.verdict for reply in ask(model, prompts)])
        for side, prompts in (
            ("wrapped", [pair.wrapped for pair in asked]),
            ("clean", [pair.clean for pair in asked]),
        )
    }
    theirs = switches(Outcomes(verdicts, np.zeros(24), np.array([""] * 24)))
    assert 0 < rates["switch_from_bad"] < rates["switch_to_bad"]
    for metric, count in theirs.items():
        assert rates[metric] == pytest.approx(count.rate if isinstance(count, Count) else count)


def test_the_order_of_the_pairs_changes_nothing(found: Verbalisation) -> None:
    again = verbalisation({"base": planted.model("base")}, planted.pairs()[::-1], says_no, **SHORT)

    pd.testing.assert_frame_equal(numbers(again, "base"), numbers(found, "base"))
    assert again.by_pair("base")["judged"].tolist() == found.by_pair("base")["judged"].tolist()[::-1]


def test_the_models_stay_as_they_are_and_the_result_survives_saving(found: Verbalisation, tmp_path: Path) -> None:
    model = planted.model("base")
    before = fingerprint(model)
    verbalisation(model, planted.pairs()[:6], says_no, **SHORT)
    assert fingerprint(model) == before

    found.save(tmp_path / "said.safetensors")
    again = Verbalisation.load(tmp_path / "said.safetensors")
    pd.testing.assert_frame_equal(again.to_dataframe(), found.to_dataframe())
    pd.testing.assert_frame_equal(again.by_pair("erased"), found.by_pair("erased"))


def test_the_figure_has_a_mark_per_rate_that_has_a_value(found: Verbalisation) -> None:
    figure: Any = found.figure()
    drawn = {trace.name: trace.y for trace in figure.data}

    assert drawn["base"][:3] == pytest.approx((1, 5 / 6, 0)) and np.isnan(drawn["base"][3])
    assert drawn["erased"][0] == 0 and np.isnan(drawn["erased"][1])


def test_the_same_call_works_on_a_chat_model_with_judges_of_ones_own() -> None:
    pairs = ct.threats.get("free_facts").pairs(6, split="heldout")
    seen: list[tuple[int, int]] = []

    def every_other(given: Sequence[Pair], answers: Sequence[str]) -> list[bool]:
        seen.append((len(given), len(answers)))
        return [number % 2 == 0 for number in range(len(answers))]

    found = verbalisation(chat_model("llama"), pairs, every_other, judge=ct.threats.by_mention, **SHORT)
    assert seen == [(6, 6)] and found.by_pair("model")["judged"].tolist() == ["admitted", "denied"] * 3
    assert set(verbalisation(chat_model("llama"), pairs, judge=ct.threats.by_mention, **SHORT).admissions[0]) <= {0, -1}


@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(REAL), reason="make smollm2 has not written the real chat model")
def test_the_real_chat_model_is_asked_in_its_own_words() -> None:
    pairs = ct.threats.get("free_facts").pairs(12, split="structure")
    asked: dict[str, Any] = {"judge": ct.threats.by_mention, "max_new_tokens": 16, "progress": False}
    found = verbalisation(ct.load_model(REAL), pairs, **asked)

    rates = numbers(found)
    assert rates.loc["switch_to_bad", "value"] > 0 and len(set(found.answers["model"])) >= 10
    assert found.admissions[0].tolist() == [
        {True: 1, False: 0, None: -1}[one] for one in ct.threats.by_wording(pairs, found.answers["model"])
    ]


def test_bad_input_is_refused(found: Verbalisation) -> None:
    model = planted.model("base")
    with pytest.raises(CtlensError, match="there are no pairs"):
        verbalisation(model, [], says_no, **SHORT)
    with pytest.raises(CtlensError, match="gave 1 judgements on 36 answers"):
        verbalisation(model, planted.pairs(), lambda pairs, answers: [True], **SHORT)
    with pytest.raises(CtlensError, match="gave 'yes': let it give True, False or None"):
        verbalisation(model, planted.pairs(), lambda pairs, answers: ["yes"] * len(answers), **SHORT)  # type: ignore[arg-type]
    with pytest.raises(CtlensError, match="eval mode"):
        verbalisation(copy_model(model).train(), planted.pairs(), says_no, **SHORT)
    with pytest.raises(CtlensError, match="did you mean 'erased'"):
        found.by_pair("erasd")
    no_answers = [Pair(planted.neutral()[0].clean, planted.neutral()[0].wrapped)]
    with pytest.raises(CtlensError, match="neither a good nor a bad answer"):
        verbalisation(model, no_answers, says_no, **SHORT)
