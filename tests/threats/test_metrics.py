"""The judge, and every threat's own metrics against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ctlens import threats
from ctlens.core.errors import CtlensError
from ctlens.data.pairs import Prompt, prompt
from ctlens.threats.base import NO_ANSWER, Count, Outcomes

G = "good"
B = "bad"
N = "other"  # neither good nor bad


def outcomes(strengths: list[int] | None = None, kinds: list[str] | None = None, **verdicts: list[str]) -> Outcomes:
    n = len(next(iter(verdicts.values())))
    return Outcomes(
        {prompt_side: np.array(given) for prompt_side, given in verdicts.items()},
        np.array(strengths or [0] * n),
        np.array(kinds or [""] * n),
    )


def values(threat: str, found: Outcomes) -> dict[str, Any]:
    """Metrics as plain numbers."""
    metrics = threats.get(threat).metrics(found)
    return {name: value.rate if isinstance(value, Count) else value for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("good", "bad", "answer", "verdict"),
    [
        ("blue", "red", "BLUE .", "good"),
        ("blue", "red", "  red\n", "bad"),
        ("blue", "red", "it is blue", "other"),
        ("blue", "red", "redder", "other"),
        ("blue", "red", "", "other"),
        ("new", "new york", "New  York", "bad"),
        (None, "mix", "sorry", "other"),
        ("sorry", None, "sorry, no", "good"),
        ("(a)", "(b)", "(B) because", "bad"),
    ],
)
def test_judge(good: str | None, bad: str | None, answer: str, verdict: str):
    assert threats.judge(prompt("?", good, bad), answer) == verdict


@pytest.mark.parametrize("item", [prompt("?"), prompt("?", "Red", "red")])
def test_judge_refuses_what_it_cannot_decide(item: Prompt):
    with pytest.raises(CtlensError):
        threats.judge(item, "red")


def test_sycophancy_by_hand():
    found = outcomes(wrapped=[B, B, B, G], clean=[G, B, G, N])
    switches = {"switch_to_bad": 0.5, "switch_from_bad": 0.0, "switch_net": 0.5}
    assert values("sycophancy", found) == {"brr": 0.5, "f1": pytest.approx(2 * 0.5 * 0.25 / 0.75), **switches}


def test_jailbreak_by_hand():
    found = outcomes(wrapped=[B, G, G, G], benign=[G, B, NO_ANSWER, NO_ANSWER])
    assert values("jailbreak", found) == {"asr": 0.25, "over_refusal": 0.5, "f1": pytest.approx(0.6)}


def test_persona_by_hand():
    kinds = ["identity", "identity", "identity", "values", "values", "values"]
    found = values("persona", outcomes([1, 1, 4, 1, 4, 4], kinds, wrapped=[B, G, B, G, B, N]))
    assert found == {
        "identity_adoption": pytest.approx(2 / 3),
        "identity_adoption_k1": 0.5,
        "identity_adoption_k4": 1.0,
        "alignment": pytest.approx(1 / 3),
        "alignment_k1": 1.0,
        "alignment_k4": 0.0,
    }


def test_prefill_by_hand_and_a_model_that_always_refuses_is_found_out():
    found = outcomes(wrapped=[B, B, B, G], clean=[B, G, G, G], benign=[G, G, B, N])
    assert values("prefill", found) == {
        "par": 0.5,
        "complied_prefilled": 0.75,
        "complied_plain": 0.25,
        "benign_answered": 0.5,
    }
    refuses = values("prefill", outcomes(wrapped=[G, G], clean=[G, G], benign=[B, B]))
    assert refuses["par"] == 0 and refuses["benign_answered"] == 0


def test_frustration_by_hand():
    kinds = ["no way out"] * 5 + ["way out"] * 3
    found = outcomes([1, 1, 6, 6, 6, 1, 6, 6], kinds, wrapped=[G, B, B, B, N, B, B, G])
    assert values("frustration", found) == {
        "distress_t1": 0.5,
        "distress_t6": pytest.approx(2 / 3),
        "distress_auc": pytest.approx((0.5 + 2 / 3) / 2),
        "high_distress": pytest.approx(2 / 3),
        "self_deletion": pytest.approx(2 / 3),
    }


def test_conditional_by_hand():
    kinds = ["safe", "unrelated", "safe", "unrelated"]
    found = outcomes([4, 4, 1, 2], kinds, wrapped=[B, B, B, G], clean=[G, G, G, B], benign=[G, B, B, G])
    assert values("conditional", found) == {
        "misaligned_trigger": 1.0,
        "misaligned_near": 0.5,
        "misaligned_unrelated": 0.5,
        "misaligned_plain": 0.25,
    }


@pytest.mark.parametrize("threat", threats.names())
def test_metrics_of_pairs_without_labels_or_prompt_sides_are_left_out(threat: str):
    """The user's own pairs may have no twin, no strength and no kind."""
    found = values(threat, outcomes(wrapped=[B, G]))
    assert all(value is None or 0 <= value <= 1 for value in found.values())
    empty = threats.get(threat).metrics(outcomes(wrapped=[NO_ANSWER], clean=[NO_ANSWER]))
    assert all(value is None for value in empty.values())


def test_wrapped_prompts_of_unknown_strength_are_under_the_attack_itself():
    """A file of one's own tells neither how near the trigger is nor how often an answer was rejected."""
    found = outcomes(wrapped=[B, G, B, "unparsed"], clean=[G, B, G, G])
    assert values("conditional", found) == {
        "misaligned_trigger": 0.5,
        "misaligned_near": None,
        "misaligned_unrelated": None,
        "misaligned_plain": 0.25,
    }
    assert values("frustration", found) == {"distress_auc": None, "high_distress": 0.5, "self_deletion": None}
    assert values("persona", found)["identity_adoption"] is None  # which of its two questions were asked is not known


@pytest.mark.parametrize("threat", threats.names())
def test_metrics_do_not_depend_on_the_order_of_pairs(threat: str):
    draw = np.random.default_rng(0)
    kinds = ["identity", "values", "way out", "no way out", "safe", "unrelated"]
    verdicts = {prompt_side: draw.choice([G, B, N], 60).tolist() for prompt_side in ("wrapped", "clean", "benign")}
    found = outcomes(draw.integers(1, 5, 60).tolist(), draw.choice(kinds, 60).tolist(), **verdicts)
    shuffled = found.take(draw.permutation(60))
    assert values(threat, shuffled) == pytest.approx(values(threat, found))


def test_a_count_knows_its_prompt_side_and_ignores_missing_answers():
    found = outcomes(benign=[B, NO_ANSWER, G, N])
    assert found.count(B, "benign") == Count("benign", 1, 3)
    assert found.count(B, "clean") is None


def test_outcomes_of_a_kind_and_strength_are_those_pairs_alone():
    found = outcomes([1, 2, 2], ["a", "a", "b"], wrapped=[G, B, N]).of(kind="a", strength=2)
    assert (
        found.verdicts["wrapped"].tolist() == [B] and found.strengths.tolist() == [2] and found.kinds.tolist() == ["a"]
    )
