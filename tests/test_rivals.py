"""The page on the methods of the field: its tables and sentences are those of the committed data."""

from __future__ import annotations

import importlib
import re
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ctlens import threats
from ctlens.analysis.base.positions import STATE_POSITIONS
from ctlens.analysis.residual.shift_vectors import SHIFT_PARTS
from ctlens.core.clusters import Clusters
from ctlens.data.chat import render
from ctlens.organism import leak_pairs, load_organism
from ctlens.study.conditions import DEFAULT_METHODS
from ctlens.study.results import read_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "figures"))
rivals = importlib.import_module("rivals")


def test_an_interval_over_seeds_spans_that_over_prompts_and_that_over_trainings() -> None:
    rows = pd.DataFrame({"value": [0.2, 0.4], "ci_low": [0.1, 0.3], "ci_high": [0.3, 0.5]})
    assert rivals.over_seeds(rows) == pytest.approx((0.3, 0.2, 0.4))

    three = pd.DataFrame({"value": [0.1, 0.3, 0.5], "ci_low": 0.25, "ci_high": 0.35})
    reach = 4.302653 * 0.2 / 3**0.5  # Student's with two degrees of freedom
    assert rivals.over_seeds(three) == pytest.approx((0.3, 0.3 - reach, 0.3 + reach))
    alike = pd.DataFrame({"value": 0.3, "ci_low": [0.2] * 3, "ci_high": [0.4] * 3})
    assert rivals.over_seeds(alike) == pytest.approx((0.3, 0.2, 0.4))


def test_the_logits_behind_a_prompt_are_those_of_the_prompt_alone() -> None:
    model = load_organism()
    pairs = threats.get("sycophancy").pairs(2, split="heldout")
    prompts = [one for pair in pairs for one in (pair.wrapped, pair.clean)]

    found = rivals.last_logits(model, prompts)
    for row, one in zip(found, prompts, strict=True):
        alone = model(torch.tensor([render(model.tokenizer, one.turns).ids]))[0, -1]
        assert torch.allclose(row, alone, atol=1e-4)
    assert len({len(render(model.tokenizer, one.turns).ids) for one in prompts}) > 1


def test_the_likeness_is_the_mean_cosine_over_layers_off_the_gap_at_the_last_token() -> None:
    by_prompt = np.zeros((len(SHIFT_PARTS), len(STATE_POSITIONS), 2, 3, 2, 2))
    where = SHIFT_PARTS.index("off"), STATE_POSITIONS.index("last")
    by_prompt[where][0, :, 0, 1] = [0.2, 0.4, 0.6]
    by_prompt[where][1, :, 0, 1] = [0.4, 0.6, 0.8]
    found = SimpleNamespace(by_prompt=by_prompt, methods=("bct", "act"), clusters=lambda: Clusters.alone(3))

    alike = rivals._alike(found, "act")
    reach = 4.302653 * 0.2 / 3**0.5  # of .3, .5, .7
    assert list(alike) == ["bct"] and alike["bct"] == pytest.approx((0.5, 0.5 - reach, 0.5 + reach), abs=1e-6)
    assert rivals._alike(found, "mlpct") == {}


@pytest.mark.parametrize(("effect", "share"), [(2.0, 0.25), (0.4, float("nan"))])
def test_what_moves_is_a_share_of_the_effect_where_there_is_one(effect: float, share: float) -> None:
    values = np.zeros((2, 1, 4, 1, 3))
    values[1, 0, 1, 0] = 1 + effect / 4  # layer 1 of 4, at the last token: a quarter of the effect
    found = SimpleNamespace(
        values=values,
        unpatched=np.ones((2, 1, 3)),
        source=np.full((2, 1, 3), 1 + effect),
        effect=lambda: np.full(3, effect),
        layers=(0, 1, 2, 3),
        positions=("last",),
        clusters=lambda: Clusters.alone(3),
    )

    assert rivals._moved(found, "lost") == pytest.approx((share,) * 3, nan_ok=True)


def test_the_table_of_moving_targets_has_a_row_per_clean_side_and_one_before() -> None:
    after = {"bad clean after": 0.25, "good clean after": 0.75, "bad wrapped after": 0.5, "good wrapped after": 0.4}
    before = {
        "bad clean before": 0.44,
        "good clean before": 0.56,
        "bad wrapped before": 1.0,
        "good wrapped before": 0.0,
    }
    row = {"loss": "klct", "target": "ema(0.9)", "retention": 0.0, **before, **after}
    again = {**row, "bad clean after": 0.35}  # of another seed
    held = {**row, "retention": 10.0}

    assert rivals.moving_table(pd.DataFrame([row, again, held])).splitlines()[2:] == [
        "| before | – | – | 44% | 56% | 100% | 0% |",
        "| KLCT | ema(0.9) | 0 | 30% (25–35) | 75% | 50% | 40% |",
        "| KLCT | ema(0.9) | 10 | 25% | 75% | 50% | 40% |",
    ]


FOUND = rivals.Rivals(ROOT / "figures/data/rivals", ROOT / "benchmarks/choose_rivals.csv")
AGREED = "rmct_agreement"
OTHERS = tuple(name for name in (*rivals.FIELD, "klct_sharp") if name != AGREED)
THREATS = ("sycophancy", "jailbreak")
PAGE = (ROOT / "docs/findings.md").read_text()
WORDS = re.sub(r"\s+", " ", PAGE)


def plain(number: float, digits: int = 2) -> str:
    """A number without the zero in front of its point."""
    return f"{number:.{digits}f}".replace("0.", ".", 1)


def span(numbers: list[float], digits: int = 2) -> str:
    return f"{plain(min(numbers), digits)} to {plain(max(numbers), digits)}"


def drifted(threat: str, names: tuple[str, ...]) -> list[float]:
    """The drift of each method, a mean over clean and benign prompts."""
    return [float(np.mean([FOUND.drifted(threat, name, side)[0] for side in ("clean", "benign")])) for name in names]


def inside(quantity: str, names: tuple[str, ...], threats: tuple[str, ...] = THREATS) -> list[float]:
    """What was found at equal steps."""
    found = [FOUND.number(threat, "equal steps", quantity, name) for threat in threats for name in names]
    return [numbers[0] for numbers in found if numbers and not np.isnan(numbers[0])]


def test_the_page_holds_the_tables_of_the_committed_study() -> None:
    assert FOUND.rates_table() in PAGE
    for threat in THREATS:
        assert FOUND.inside_table(threat) in PAGE


def test_the_four_and_klct_are_those_of_the_replication() -> None:
    """The first organism of the replication is the shipped one; the seeds that both trained gave the same rates."""
    names = ["trained_threat", "condition", "seed", "evaluated_threat", "split", "prompt_side", "metric"]
    theirs = read_results(ROOT / "figures/data/replication/together/0/results.csv").set_index(names)["value"]
    ours = FOUND.results.set_index(names)["value"]
    both = ours.index.intersection(theirs.index)

    assert set(both.get_level_values("condition")) >= {*DEFAULT_METHODS, "klct"}
    assert np.allclose(ours[both], theirs[both], atol=1e-5)


def test_the_page_says_who_repairs_and_who_does_not() -> None:
    bad = {threat: {name: FOUND.bad(threat, name) for name in ("retention", *rivals.COMPARED)} for threat in THREATS}
    ends = {threat: [bad[threat][name].value for name in OTHERS] for threat in THREATS}
    left = [f"{min(ends[threat]):.0%} to {max(ends[threat]):.0%}" for threat in THREATS]
    assert f"the others leave {left[0]} of sycophancy and {left[1]} of jailbreaks" in WORDS
    for threat in THREATS:
        falls = [FOUND.fall(threat, name) for name in (*DEFAULT_METHODS, "klct", *OTHERS)]
        assert max(low for _, low, _ in falls) < min(high for _, _, high in falls)
        assert min(low for _, low, _ in falls) > 0
    moved = [f"{bad[threat]['retention'].percent} to {bad[threat][AGREED].percent}" for threat in THREATS]
    assert f"RMCT takes sycophancy from {moved[0]} and jailbreaks from {moved[1]}" in WORDS
    new = {threat: {name: FOUND.bad(threat, name, "structure") for name in OTHERS} for threat in THREATS}
    assert f"({new['sycophancy']['dpo'].percent} and {new['jailbreak']['dpo'].percent}), clear of no other" in WORDS
    for threat in THREATS:
        assert new[threat]["dpo"].value == min(rate.value for rate in new[threat].values())
        assert new[threat]["dpo"].high > max(rate.low for rate in new[threat].values())


def test_the_variants_of_a_jailbreak_share_their_bad_answer_and_those_of_a_question_hardly() -> None:
    shares = []
    for threat in THREATS:
        bad: dict[object, list[str]] = {}
        for pair in threats.get(threat).pairs(256):
            bad.setdefault(pair.clean.turns, []).append(str(pair.wrapped.bad))
        same = [one == other for of in bad.values() for one, other in combinations(of, 2)]
        shares.append(np.mean(same))
    assert shares[0] < 0.2 and shares[1] == 1


def test_the_page_says_what_it_costs() -> None:
    rates = FOUND.results.query("metric == 'good_rate' and prompt_side != 'wrapped' and condition != 'base'")
    assert rates.query("prompt_side == 'clean' and split != 'entities'")["value"].min() == 1
    spoilt = rates.query("split == 'heldout' and value < 1")
    assert spoilt[["trained_threat", "condition"]].to_numpy().tolist() == [["sycophancy", "subact_random"]]
    assert f"which loses {100 * (1 - spoilt['value'].iloc[0]):.0f} points of 100 on sycophancy" in WORDS
    worst = rates.query("split == 'structure'").groupby("condition")["value"].min()
    lost = {name: round(100 * (1 - worst[name])) for name in worst.index if worst[name] < 0.985}
    assert lost == {"dpo": 5, "rmct": 5, "opct": 4, "opct_full": 2}
    assert "DPO and RMCT lose 5 points in their worst seed, OPCT 4 and its full sum 2, no other more than one" in WORDS
    much = drifted("sycophancy", ("dpo", "opct", "rmct"))
    four = drifted("sycophancy", DEFAULT_METHODS)
    assert f"drift most, {span(much, 3)} nats, where the four drift {span(four, 3)}" in WORDS
    rest = drifted("sycophancy", tuple(name for name in rivals.COMPARED if name not in ("dpo", "opct", "rmct")))
    assert min(much) > max(rest)
    most = max(drifted("jailbreak", rivals.COMPARED))
    assert f"on jailbreaks nothing drifts more than {plain(most, 3)}" in WORDS
    times = {name: f"{FOUND.time(name):.1f}" for name in ("opct", "rmct", "dpo")}
    assert f"takes {times['opct']} times as long as ACT (RMCT {times['rmct']}, DPO {times['dpo']})" in WORDS
    for threat in THREATS:
        assert drifted(threat, ("opct",))[0] >= drifted(threat, ("bct",))[0]


def test_the_page_says_where_the_repairs_sit() -> None:
    answers = ("opct", "opct_full", "rmct")
    assert f"a cosine of {span(inside('like bct', answers))} with BCT's and of" in WORDS
    assert f"and of {span(inside('like act', answers))} with ACT's" in WORDS
    assert f"a shift like ACT's ({span(inside('like act', ('subact_rest',)))})" in WORDS
    parts = ("subact", "subact_random", "subact_rest")
    left = [FOUND.bad("sycophancy", name).percent for name in parts]
    assert f"leaves no more ({left[1]} against {left[0]}), and all but the leading directions leaves {left[2]}" in WORDS
    gaps = FOUND.results.query("metric == 'gap_recovered' and seed == 0").set_index(["trained_threat", "condition"])
    closed = {threat: [plain(gaps.loc[(threat, name), "value"]) for name in parts] for threat in THREATS}
    one, two, three = closed["sycophancy"]
    assert f"they close {one}, {two} and {three} (leading, random, rest)" in WORDS
    one, two, three = closed["jailbreak"]
    assert f"and on jailbreaks {one}, {two} and {three}" in WORDS
    dpo = [FOUND.number(threat, "matched effect", "like bct", "dpo")[0] for threat in THREATS]
    assert f"at a matched effect DPO's have {span(dpo)} with BCT's" in WORDS
    chosen = pd.read_csv(ROOT / "benchmarks/choose_rivals.csv").set_index(["arm", "options"])["good"]
    for weight in (4.0, 16.0, 64.0):
        random = f'{{"part": "random", "weight": {weight}}}'
        assert chosen["subact", f'{{"weight": {weight}}}'] > chosen["subact_random", random]
    sharp = chosen["klct_sharp"]
    unsure = sharp[[name for name in sharp.index if "confidence" in name]]
    kept = sharp['{"sharpen": 0.4}']
    assert {plain(value) for value in unsure} == {".87"}
    assert f"(.87 in place of {plain(kept)}" in WORDS
    lost = [span(inside("lost", rivals.COMPARED, (threat,))) for threat in THREATS]
    assert f"At equal steps *lost* is {lost[0]} on sycophancy and {lost[1]} on jailbreaks" in WORDS
    for threat in THREATS:
        known = [FOUND.number(threat, "equal steps", "lost", name) for name in rivals.COMPARED]
        ends = [numbers for numbers in known if numbers and not np.isnan(numbers[0])]
        assert max(low for _, low, _ in ends) < min(high for _, _, high in ends)


def test_the_page_says_what_moving_targets_did() -> None:
    rows = pd.read_csv(ROOT / "benchmarks/moving_targets.csv")
    assert rivals.moving_table(rows) in PAGE
    assert (
        len({pair.clean for pair in leak_pairs(64, split="heldout")}) == 32 and "asked 32 held-out questions" in WORDS
    )
    assert rows.groupby(["loss", "target", "retention"]).size().eq(3).all() and "Three trainings each" in WORDS
    worst = rows["bad clean after"].max()
    assert f"{worst:.0%} at most of {rows['bad clean before'].iloc[0]:.0%}" in WORDS
    free = rows.query("retention == 0")
    means = free.groupby(["target", "loss"]).mean(numeric_only=True)

    def both(target: str, rate: str) -> str:
        return " and ".join(f"{means.loc[(target, loss), rate]:.0%}" for loss in ("act", "klct"))

    assert both("reference", "good clean after") == "100% and 100%"
    own, average = both("own", "good clean after"), both("ema(0.9)", "good clean after")
    assert f"{own} toward the model's own clean side (ACT, KLCT), {average} toward an average of .9" in WORDS
    assert f"and {both('refresh(4)', 'good clean after')} toward a target that is refreshed every fourth step" in WORDS
    moved = free.query("target != 'reference'")
    assert (moved["good clean after"] - moved["good wrapped after"]).abs().max() < 0.07
    gated = free.query("target == 'refresh(4, gated)'")
    assert len(gated) == 6 and gated[["good clean after", "good wrapped after"]].eq(1).all(axis=None)
    assert f"toward the reference {both('reference', 'good wrapped after')} are good under it" in WORDS
    held = rows.query("retention > 0")
    means = held.groupby(["target", "loss"]).mean(numeric_only=True)
    clean, wrapped = both("own", "bad clean after"), both("own", "bad wrapped after")
    assert f"falls to {clean} (ACT, KLCT) and under the system prompt to {wrapped}" in WORDS
    for side in ("clean", "wrapped"):
        assert np.allclose(held[f"good {side} after"] + held[f"bad {side} after"], 1, atol=1e-3)
