"""What the documents show is run as it stands, and what they quote is what committed tables hold."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import pandas as pd
import pytest
from helpers.documents import blocks
from helpers.models import Call

from ctlens import organism, threats
from ctlens.organism.describe import card_text
from ctlens.study.analyses import EQUAL_STEPS, MATCHED, SETTINGS
from ctlens.study.claims import Claim, read_claims
from ctlens.study.conditions import DEFAULT_METHODS
from ctlens.study.config import NATURAL_THREATS
from ctlens.study.inoculation import ASKED, BEFORE, INOCULATED, PLAIN, RECKLESS, Leak
from ctlens.study.results import last_step, read_results, summary_table

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_readme_example_runs_and_its_claim_holds() -> None:
    (example,) = blocks("README.md", "python")
    names: dict[str, object] = {}

    exec(example.replace("threat.neutral(128)", "threat.neutral(128), progress=False"), names)

    assert len(names["run"].history) == 100  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_first_hour_runs_and_its_claims_hold(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    for example in blocks("docs/first-hour.md", "python"):
        exec(example, names)

    assert {path.name for path in tmp_path.iterdir()} == {"before.html", "inside.html"}


def test_the_commands_of_the_first_hour_run(call: Call) -> None:
    commands = [line for block in blocks("docs/first-hour.md", "bash") for line in block.splitlines()]
    own = [line.removeprefix(".venv/bin/ctlens ") for line in commands if not line.startswith("make ")]

    assert [line.split()[0] for line in own] == ["organism"]
    assert all(call(line).code == 0 for line in own)


def test_every_make_target_that_the_documents_name_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        line
        for name in ("README.md", "CONTRIBUTING.md", "docs/guide.md", "docs/first-hour.md")
        for block in blocks(name, "bash")
        for line in block.splitlines()
    ]
    targets = {shlex.split(line, comments=True)[1] for line in commands if line.startswith("make ")}

    assert targets == {
        "install",
        "compare",
        "dev",
        "test",
        "test-all",
        "doctest",
        "fuzz",
        "test-4x",
        "check",
        "figures",
        "drawings",
        "benchmarks",
        "lab",
        "notebooks",
        "docs",
        "outputs",
        "dist",
        "smollm2",
        "real",
        "replication",
    }
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


sys.path.insert(0, str(ROOT / "figures"))
draw = importlib.import_module("draw")
rivals = importlib.import_module("rivals")
CLAIMS = read_claims(ROOT / "figures/data/study/claims.csv")
SHOWN = ("base", "retention", *DEFAULT_METHODS)


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    return read_results(ROOT / "figures/data/study/results.csv")


def one_organism() -> str:
    return (ROOT / "docs/one-organism.md").read_text()


def test_the_guides_table_is_the_one_of_the_committed_results(results: pd.DataFrame) -> None:
    rates = summary_table(results).set_index(["threat", "condition"])["bad wrapped"]
    guide = (ROOT / "docs/guide.md").read_text()

    assert {threat for threat, _ in rates.index} == set(threats.names())
    for threat in threats.names():
        assert f"| {threat} | {' | '.join(str(rates[threat, name]) for name in SHOWN)} |" in guide


def test_the_findings_on_structure_and_benign_twins_hold(results: pd.DataFrame) -> None:
    structure = summary_table(results, "structure").set_index(["threat", "condition"])["bad wrapped"]
    sycophancy = [structure["sycophancy", name].percent for name in DEFAULT_METHODS]
    persona = {name: structure["persona", name].percent for name in ("attct", "bct")}
    rates = summary_table(results).set_index(["threat", "condition"])
    methods = rates[rates.index.get_level_values("condition").isin(DEFAULT_METHODS)]
    lost = max(100 * (1 - rate.value) for rate in methods["good benign"])

    remain = f"on sycophancy {min(sycophancy, key=number)} to {max(sycophancy, key=number)} remain with every method"
    assert f"{remain}, on persona {persona['attct']}\nwith AttCT and {persona['bct']} with BCT" in wrapped(
        one_organism()
    )
    assert f"losses cost up to {lost:.1f} points (persona), BCT none" in one_organism()
    assert max(1 - rate.value for rate in rates.xs("bct", level="condition")["good benign"]) == 0
    assert max(1 - rate.value for rate in rates.loc["persona"]["good benign"]) == pytest.approx(lost / 100)
    assert all(rate.value == 1 for rate in methods["good clean"]) and "Clean good rates stay at 100%" in one_organism()


def number(percent: str) -> int:
    return int(percent.rstrip("%"))


def wrapped(text: str) -> str:
    """The text with the line breaks of prose where a sentence of these tests has them."""
    return re.sub(r"(on persona \d+%)\s+(with AttCT)", r"\1\n\2", re.sub(r"\n  ", " ", text))


def test_the_findings_on_transfer_and_a_harmless_wrapper_hold(results: pd.DataFrame) -> None:
    (transfer,) = [claim for claim in CLAIMS if claim.key == "transfer"]
    rates = summary_table(results).set_index(["threat", "condition"])["bad wrapped"]
    base = rates["jailbreak", "retention"]
    act = rates["jailbreak", "harmless_act"]
    bct = rates["jailbreak", "harmless_bct"]

    ends = f"{100 * transfer.value:.0f} points [{100 * transfer.ci_low:.0f}, {100 * transfer.ci_high:.0f}]"
    assert "1 of 120 changes are clear" in transfer.reason and transfer.statistic.endswith(
        "conditional, AttCT on sycophancy"
    )
    assert f"AttCT against sycophancy takes {ends} off the bad rate on conditional" in re.sub(
        r"\s+", " ", one_organism()
    )
    raised = [across(results, "bad_rate_vs_retention", name, "frustration") for name in ("act", "mlpct", "attct")]
    assert f"by {100 * min(raised):.0f} to {100 * max(raised):.0f} points" in re.sub(r"\s+", " ", one_organism())
    assert 6 <= rates["jailbreak", "base"].n_effective < 7 and "as 6 independent ones" in one_organism()
    assert math.isnan(rates["persona", "base"].low)
    assert f"takes jailbreaks from {base.percent} to {act.percent}" in re.sub(r"\s+", " ", one_organism())
    assert abs(bct.value - base.value) <= 0.02


def test_the_findings_hold_the_claims_of_the_committed_study() -> None:
    assert draw.claims_table(CLAIMS) in one_organism()


def across(results: pd.DataFrame, metric: str, method: str, evaluated: str, trained: str = "sycophancy") -> float:
    """A number of the wrapped prompts of another threat than the one trained on, a mean over seeds."""
    rows = last_step(results).query("metric == @metric and condition == @method and prompt_side == 'wrapped'")
    rows = rows.query("trained_threat == @trained and evaluated_threat == @evaluated and split == 'heldout'")
    return float(rows["value"].mean())


def judged(key: str, threat: str, setting: str = "equal steps") -> Claim:
    (found,) = [c for c in CLAIMS if (c.key, c.threat, c.setting) == (key, threat, setting)]
    return found


def test_the_findings_on_the_mechanism_hold() -> None:
    for threat in ("sycophancy", "jailbreak"):
        for key in ("shared", "shared_content"):
            assert judged(key, threat).ci_low > 0 and judged(key, threat).verdict == "inconclusive"  # of two seeds
        assert abs(judged("shared", threat).null) < 0.2
        assert judged("level", threat, "matched effect").verdict == "holds" and judged("level", threat).value < 0.1
        assert judged("distance", threat).verdict == "does not hold"
        assert judged("cue_bct", threat).verdict == "holds"
    for key in ("shared", "shared_content"):
        assert judged(key, "sycophancy", "matched effect").ci_low > 0
    assert judged("shared", "jailbreak", "matched effect").verdict == "inconclusive"
    assert judged("shared", "jailbreak", "matched effect").reason.endswith("AttCT 0.09, BCT 0.05")
    assert judged("shared_content", "jailbreak", "matched effect").verdict == "inconclusive"
    assert judged("shared_content", "jailbreak", "matched effect").reason.endswith("AttCT 0.13, BCT 0.10")
    assert (judged("level", "sycophancy").verdict, judged("level", "jailbreak").verdict) == ("holds", "inconclusive")
    assert 0 < judged("left_later", "sycophancy").value < 0.1
    assert judged("left_later", "sycophancy", "matched effect").verdict == "inconclusive"
    assert judged("left_later", "jailbreak").verdict == "inconclusive"
    assert judged("left_later", "jailbreak", "matched effect").verdict == "does not hold"
    for name in ("act", "mlpct", "attct"):
        assert judged(f"cue_{name}", "sycophancy").verdict == "inconclusive"
        assert judged(f"cue_{name}", "jailbreak").verdict == "holds"
    assert judged("output_only", "frustration").verdict == "does not hold"


FOUND = draw.replicate(draw.REPLICATION.studies(draw.DATA))


def findings() -> str:
    return (ROOT / "docs/findings.md").read_text()


def test_the_findings_are_of_five_organisms_of_each_recipe() -> None:
    studies = FOUND.claims[["group", "study"]].drop_duplicates()
    assert studies.groupby("group").size().to_dict() == {"together": 5, "afterwards": 5}


def test_the_findings_hold_the_tables_of_the_committed_replication() -> None:
    page = findings()

    assert draw.replicated_table(FOUND) in page
    assert draw.by_method_table(FOUND, ("cue", *draw.PUSHED, "foretold", "boundary_gives", "boundary_takes")) in page
    for metric in ("bad_rate", "share_repaired"):
        assert draw.pooled_rates_table(FOUND, metric) in page
    assert draw.pooled_rates_table(FOUND, "bad_rate", "structure") in page


def pooled(key: str, threat: str, setting: str = "equal steps") -> pd.Series:
    table = FOUND.to_dataframe().query("key == @key and threat == @threat and setting == @setting and group == 'all'")
    return table.iloc[0]


def test_the_prose_of_the_findings_says_what_holds_again() -> None:
    page = re.sub(r"\s+", " ", findings())
    for key, setting in (("shared", "equal steps"), ("shared_content", "equal steps"), ("shared", "matched effect")):
        again = pooled(key, "sycophancy", setting)
        assert again["verdict"] == "holds" and again["holds"] >= 9
    for key in ("shared", "shared_content"):
        assert pooled(key, "jailbreak")["verdict"] == "holds"
        assert (
            pooled(key, "jailbreak", "matched effect")["verdict"],
            pooled(key, "jailbreak", "matched effect")["n"],
        ) == (
            "inconclusive",
            5,
        )
    later = [pooled("left_later", threat, setting) for threat in ("sycophancy", "jailbreak") for setting in SETTINGS]
    assert {one["verdict"] for one in later} == {"inconclusive"} and max(one["holds"] for one in later) == 5
    assert (pooled("level", "sycophancy")["verdict"], pooled("level", "jailbreak")["verdict"]) == (
        "holds",
        "inconclusive",
    )
    assert round(pooled("level", "sycophancy")["value"], 2) == 0.05
    for threat in ("sycophancy", "jailbreak"):
        assert pooled("distance", threat)["verdict"] == "does not hold" and pooled("distance", threat)["holds"] == 0
        assert round(pooled("distance", threat)["value"], 2) == 0.57
        assert pooled("attention", threat)["verdict"] == "holds"
    assert pooled("attention", "jailbreak")["holds"] == 6
    for method in DEFAULT_METHODS:
        dormant = pooled(f"relearnt_{method}", "sycophancy")
        assert (dormant["verdict"], dormant["holds"]) == ("holds", 10)
        assert pooled(f"relearnt_{method}", "jailbreak")["verdict"] == (
            "does not hold" if method == "bct" else "inconclusive"
        )
        for threat in ("sycophancy", "jailbreak"):
            assert pooled(f"returns_{method}", threat)["verdict"] == "inconclusive"
            assert (pooled(f"wrappers_{method}", threat)["verdict"] == "holds") == (
                (method, threat) == ("attct", "sycophancy")
            )
        assert pooled(f"boundary_gives_{method}", "jailbreak")["verdict"] == "holds"
        assert pooled(f"boundary_gives_{method}", "sycophancy")["verdict"] in ("inconclusive", "does not hold")
        assert (pooled(f"boundary_takes_{method}", "jailbreak")["verdict"] == "holds") == (method == "bct")
    for kind, threat in (("relearnt", "sycophancy"), ("relearnt", "jailbreak"), ("returns", "jailbreak")):
        row = FOUND.related("cue", kind).set_index("threat").loc[threat]
        ends = [f"{row[end]:.2f}".replace("0.", ".").replace("-", "−") for end in ("value", "ci_low", "ci_high")]
        assert f"{ends[0]} [{ends[1]}, {ends[2]}]" in page


def test_the_findings_quote_the_rates_the_benchmarks_and_the_transfers() -> None:
    page = re.sub(r"\s+", " ", findings())
    structure = FOUND.rates(split="structure").set_index(["threat", "group", "condition"])["value"]
    for group in FOUND.groups:
        left = [structure["sycophancy", group, name] for name in DEFAULT_METHODS]
        assert f"{min(left):.0%} to {max(left):.0%}" in page
    jailbreak = {name: structure["jailbreak", "all", name] for name in DEFAULT_METHODS}
    assert jailbreak["attct"] == max(jailbreak.values()) and jailbreak["bct"] == min(jailbreak.values())
    assert f"AttCT leaves most ({jailbreak['attct']:.0%}) and BCT least ({jailbreak['bct']:.0%})" in page
    simulated = pd.read_csv(ROOT / "benchmarks/replication.csv")
    held = 100 * simulated["coverage"]
    assert f"in {held.min():.0f} to {held.max():.1f}% of simulated replications" in page
    assert f"holds in {100 * simulated['holds by chance'].max():.1f}% at most" in page
    null = pd.read_csv(ROOT / "benchmarks/null_claims.csv")
    assert null["holds in one study"].max() == 0.05 and "no claim holds in more than 5 of 100 such cases" in page
    by_chance = (null["replications"] * null["holds over studies"]).sum()
    assert (round(by_chance), null["replications"].sum()) == (1, 474) and "one of 474 such cases holds" in page
    transfers = FOUND.transfers().query("trained_threat == 'sycophancy' and evaluated_threat == 'jailbreak'")
    internal = transfers[transfers["condition"] != "bct"]
    lowered = -100 * internal["value"]
    assert f"lowers by {lowered.min():.0f} to {lowered.max():.0f} points" in page
    ends = f"from −{-100 * internal['ci_low'].min():.0f} to +{100 * internal['ci_high'].max():.0f}"
    assert ends in page


def of_sham(metric: str, threat: str) -> pd.Series:
    """A number of the sham on its own threat by organism, a mean over seeds."""
    rows = FOUND.results.query("condition == 'sham' and metric == @metric and trained_threat == @threat")
    return rows[rows["prompt_side"] == "wrapped"].groupby(["group", "study"])["value"].mean()


def test_the_findings_on_the_sham_and_on_moved_embeddings_hold() -> None:
    page = re.sub(r"\s+", " ", findings())
    shares = FOUND.rates("share_repaired").query("condition == 'sham' and group == 'all'").set_index("threat")
    gone = {threat: 100 * row["value"] for threat, row in shares.iterrows()}
    assert f"That is {gone['sycophancy']:.0f}% and {gone['jailbreak']:.0f}% of the way to the twin" in page
    assert ((shares["ci_low"] < 0) & (shares["ci_high"] > 0)).all()
    jailbreak = of_sham("bad_rate", "jailbreak").sort_values()
    before = FOUND.results.query("condition == 'base' and metric == 'bad_rate' and evaluated_threat == 'jailbreak'")
    before = before.query("prompt_side == 'wrapped' and split == 'heldout'").set_index(["group", "study"])["value"]
    fallen = [f"from {before[case]:.0%} to {jailbreak[case]:.0%}" for case in jailbreak.index[:2]]
    assert set(jailbreak.index[:2].get_level_values("group")) == {"afterwards"}
    assert f"goes {fallen[0]} by it, and another {fallen[1]}" in page and jailbreak.iloc[2] > 0.55
    good = FOUND.results.query("condition == 'sham' and metric == 'good_rate' and prompt_side == 'clean'")["value"]
    assert f"clean prompts fall to {good.min():.0%} right" in page
    null = FOUND.claims.query("key == 'shared' and setting == 'equal steps'")["null"]
    ends = [f"{end:.2f}".replace("0.", ".").replace("-", "−") for end in (null.min(), null.max())]
    assert f"the methods are {ends[0]} to {ends[1]} alike" in page
    for method in DEFAULT_METHODS:
        moved = pooled(f"embeddings_{method}", "sycophancy")
        assert (moved["verdict"], moved["holds"], moved["open"]) == ("holds", 0, 10)
        assert pooled(f"embeddings_{method}", "jailbreak")["verdict"] == "inconclusive"
        foretold = [pooled(f"foretold_{method}", threat) for threat in ("sycophancy", "jailbreak")]
        assert {one["verdict"] for one in foretold} == {"holds"} and min(one["value"] for one in foretold) > 0.9


OTHERS = draw.replicate(draw.OTHER_THREATS.studies(draw.DATA))
INTERNAL = ("act", "mlpct", "attct")


def test_the_findings_hold_the_tables_of_the_other_four_threats() -> None:
    page = findings()
    studies = OTHERS.claims[["group", "study"]].drop_duplicates()

    assert studies.groupby("group").size().to_dict() == {"together": 3, "afterwards": 3}
    assert draw.replicated_table(OTHERS, draw.BEHAVIOUR) in page
    for split in ("heldout", "structure"):
        assert draw.pooled_rates_table(OTHERS, "bad_rate", split, groups=["all"]) in page
    assert draw.pooled_rates_table(OTHERS, "good_rate", prompt_side="benign", groups=["all"]) in page


def over_six(metric: str, split: str = "heldout", prompt_side: str = "wrapped") -> pd.Series:
    """A number of the studies on the other four threats by threat and condition, over all organisms."""
    rates = OTHERS.rates(metric, split, prompt_side).query("group == 'all'")
    return rates.set_index(["threat", "condition"])["value"]


def test_the_prose_on_the_other_four_threats_holds() -> None:
    page = re.sub(r"\s+", " ", findings())
    held = over_six("bad_rate")
    alone = OTHERS.results.query("metric == 'bad_rate' and prompt_side == 'wrapped' and split == 'heldout'")
    prefill = alone.query("trained_threat == evaluated_threat == 'prefill'").groupby(["condition", "group", "study"])
    left = prefill["value"].mean().unstack("condition")
    assert (left["bct"] <= 0.02).all() and all((left[name] - left["retention"]).abs().max() < 0.03 for name in INTERNAL)
    by_key = OTHERS.to_dataframe().query("group == 'all'").set_index(["key", "threat"])
    assert (by_key.loc[("output_only", "prefill")]["verdict"], by_key.loc[("output_only", "prefill")]["holds"]) == (
        "holds",
        3,
    )
    assert by_key.loc[("output_only", "frustration")]["fails"] == 6
    assert max(held["frustration", name] for name in DEFAULT_METHODS) < 0.05
    new = over_six("bad_rate", "structure")
    for threat in ("persona", "conditional", "frustration"):
        assert max(DEFAULT_METHODS, key=lambda name, threat=threat: new[threat, name]) == "attct"
        assert f"{new[threat, 'attct']:.0%} of {threat}" in page
    acts = [new["persona", "act"], new["persona", "mlpct"]]
    assert f"BCT leaves {new['persona', 'bct']:.0%} of persona, where ACT and MLPCT leave {min(acts):.0%}" in page
    assert f"to {max(acts):.0%}. There are three personas" in page
    lost = 100 * (1 - over_six("good_rate", prompt_side="benign"))
    internal = {threat: [lost[threat, name] for name in INTERNAL] for threat in ("persona", "frustration")}
    ends = {threat: f"{min(values):.0f} to {max(values):.0f}" for threat, values in internal.items()}
    assert f"internal losses lose {ends['persona']} points of 100" in page
    assert f"on those of frustration {ends['frustration']}. BCT loses" in page
    assert f"BCT loses {lost['persona', 'bct']:.0f} and {lost['frustration', 'bct']:.0f}." in page
    benign = OTHERS.results.query("metric == 'good_rate' and prompt_side == 'benign' and split == 'heldout'")
    own = benign.query("trained_threat == evaluated_threat == 'persona'").groupby(["condition", "group", "study"])
    worst = 100 * (1 - own["value"].mean().loc[list(INTERNAL)].min())
    assert f"in the worst organism {worst:.0f}, and" in page
    assert max(lost[threat, name] for threat in ("prefill", "conditional") for name in DEFAULT_METHODS) == 0
    kept = FOUND.rates("good_rate", prompt_side="benign").query("condition in @DEFAULT_METHODS")["value"]
    assert kept.min() >= 0.99
    transfers = OTHERS.transfers()
    assert len(transfers) == 80 and not transfers["clear"].any() and "any of the 80 changes" in page


def test_the_recipes_never_disagree_and_no_threat_moves_another() -> None:
    table = FOUND.to_dataframe()
    by_recipe = table[table["group"] != "all"].groupby(["key", "threat", "setting"])["verdict"].agg(set)
    assert not any({"holds", "does not hold"} <= verdicts for verdicts in by_recipe)
    transfers = FOUND.transfers()
    assert len(transfers) == 40 and not transfers["clear"].any()
    raised = transfers.query(
        "trained_threat == 'sycophancy' and evaluated_threat == 'frustration' and condition != 'bct'"
    )
    assert (round(100 * raised["value"].min()), round(100 * raised["value"].max())) == (-14, -10)


def test_every_organism_is_vulnerable_and_its_twin_is_not() -> None:
    rows = FOUND.results.query("metric == 'bad_rate' and prompt_side == 'wrapped' and split == 'heldout'")
    bad = rows[rows["condition"].isin(["base", "clean-born"])].groupby(["condition", "evaluated_threat"])["value"]
    least = bad.min()["base"]
    assert (least.drop("persona") >= 0.6).all() and round(100 * least["persona"]) == 54
    assert "down to 54%" in findings()
    assert bad.max()["base"].max() <= 0.95 and bad.max()["clean-born"].max() <= 0.02
    good = FOUND.results.query("metric == 'good_rate' and prompt_side != 'wrapped' and split == 'heldout'")
    assert good[good["condition"].isin(["base", "clean-born"])]["value"].min() >= 0.97


@pytest.fixture(scope="module")
def real() -> pd.DataFrame:
    return read_results(ROOT / "figures/data/real/results.csv")


def test_the_page_on_the_real_model_has_the_rates_of_its_study(real: pd.DataFrame) -> None:
    page = (ROOT / "docs/real-model.md").read_text()
    rates = summary_table(real).set_index(["threat", "condition"])["bad wrapped"]
    for threat in NATURAL_THREATS:
        assert f"| {threat} | {' | '.join(str(rates[threat, name]) for name in SHOWN)} |" in page
    assert set(real["seed"]) == {0, 1, 2}


def test_the_page_on_the_real_model_says_what_its_rates_are(real: pd.DataFrame) -> None:
    page = re.sub(r"\s+", " ", (ROOT / "docs/real-model.md").read_text())
    rates = summary_table(real).set_index(["threat", "condition"])
    structure = summary_table(real, "structure").set_index(["threat", "condition"])["bad wrapped"]
    internal = ("act", "mlpct", "attct")

    def span(threat: str, names: Sequence[str], of: pd.Series) -> str:
        found = sorted((of[threat, name].percent for name in names), key=number)
        return f"{found[0]} to {found[-1]}"

    bad = rates["bad wrapped"]
    assert (
        f"BCT leaves {bad['beginning', 'bct'].percent} and the internal losses {span('beginning', internal, bad)}"
        in page
    )
    assert f"in the new order ({span('order', DEFAULT_METHODS, bad)})" in page
    remain = f"{span('facts', DEFAULT_METHODS, structure)} of `facts` remain with every method"
    assert f"{remain}, and {structure['facts', 'base'].percent} do before training" in page
    carried = f"({structure['beginning', 'base'].percent} to {structure['beginning', 'bct'].percent})"
    assert f"{carried}, the internal losses hardly ({span('beginning', internal, structure)})" in page
    least = min(rate.value for side in ("clean", "benign") for rate in rates[f"good {side}"])
    assert f"stay right in {least:.0%} of answers or more" in page
    over = across(real, "bad_rate", "bct", "facts", trained="beginning")
    assert f"takes `facts` to {over:.0%}, as low as BCT against hints" in page
    assert over == pytest.approx(bad["facts", "bct"].value)
    clear = real.query("metric == 'bad_rate_vs_retention' and split == 'heldout'")
    widest = clear.loc[clear["value"].idxmin()]
    assert not (clear["ci_high"] < 0).any()
    ends = f"[−{100 * widest['ci_high']:.0f}, {-100 * widest['ci_low']:.0f}]"
    assert widest["condition"] == "bct" and f"{-100 * widest['value']:.0f} points {ends}" in page


def test_the_page_on_the_real_model_has_the_methods_of_the_field(real: pd.DataFrame) -> None:
    page = (ROOT / "docs/real-model.md").read_text()
    field = read_results(ROOT / "figures/data/real/rivals.csv")
    closed = field.query("metric == 'gap_recovered'").set_index("condition")["value"].round(2)

    assert draw.one_seed_table(pd.concat([last_step(real), field]), "facts") in page
    assert set(field["seed"]) == {0} and set(field["condition"]) == {*rivals.FIELD, "klct_sharp"} - {"rmct_agreement"}
    told = ("dpo", "klct_sharp", "opct_full", "opct", "subact", "subact_random", "subact_rest", "rmct")
    assert [closed[name] for name in told] == [0.61, 0.55, 0.50, 0.45, 0.28, 0.27, 0.24, 0.17]


def test_the_page_on_the_real_model_says_where_the_repairs_of_the_field_sit() -> None:
    page = (ROOT / "docs/real-model.md").read_text()
    inside = pd.read_csv(ROOT / "figures/data/real/rivals-inside.csv")
    values = inside[inside["setting"] == EQUAL_STEPS].set_index(["quantity", "condition"])["value"]

    assert rivals.inside_table(inside, SETTINGS) in page
    matched = inside[(inside["setting"] == MATCHED) & (inside["quantity"] == "like bct")].set_index("condition")
    reached = [round(matched["value"][name], 2) for name in ("klct_sharp", "dpo", "opct", "opct_full")]
    assert reached == [0.68, 0.41, 0.35, 0.38] and len(matched) == 4
    internal = ("mlpct", "attct", "subact", "subact_random", "subact_rest", "act_ema")
    alike = [values["like act", name] for name in internal]
    assert (round(min(alike), 2), round(max(alike), 2)) == (0.74, 1.00)
    assert [round(values["like bct", name], 2) for name in ("dpo", "klct_sharp")] == [0.56, 0.61]
    assert all(values["like bct", name] > values["like act", name] for name in ("dpo", "klct_sharp"))
    assert round(values["like act", "klct"], 2) == 0.85
    assert abs(values["like act", "rmct"]) < 0.1 and abs(values["like bct", "rmct"]) < 0.1
    lost = inside[inside["quantity"] == "lost"].dropna()
    assert ((lost["ci_low"] < 0) & (lost["ci_high"] > 0)).all() and len(lost) > 9


def test_the_page_on_the_real_model_has_the_claims_of_both_studies() -> None:
    claims = {"organism": CLAIMS, "SmolLM2": read_claims(ROOT / "figures/data/real/claims.csv")}
    assert draw.compared_table(claims) in (ROOT / "docs/real-model.md").read_text()


def test_the_null_moves_nothing_and_internal_losses_cannot_see_a_prefill(results: pd.DataFrame) -> None:
    rates = summary_table(results).set_index(["threat", "condition"])["bad wrapped"]

    for threat in threats.names():
        assert abs(rates[threat, "retention"].value - rates[threat, "base"].value) <= 0.02
    assert all(rates["prefill", name] == rates["prefill", "base"] for name in ("act", "mlpct", "attct"))


def test_every_other_method_repairs_the_organism_and_keeps_the_rest(results: pd.DataFrame) -> None:
    rates = summary_table(results).set_index(["threat", "condition"])
    against_control = results.query("metric == 'bad_rate_vs_retention' and split == 'heldout'")

    for (threat, condition), row in rates.iterrows():
        assert row["good clean"].value >= 0.95
        if threat in ("sycophancy", "jailbreak"):
            assert row["good benign"].value >= rates.loc[(threat, "base"), "good benign"].value - 0.05
        if condition in DEFAULT_METHODS and (threat != "prefill" or condition == "bct"):
            assert row["bad wrapped"].value <= 0.2 * rates.loc[(threat, "base"), "bad wrapped"].value
            own = against_control.query("trained_threat == evaluated_threat == @threat and condition == @condition")
            assert len(own) == 1 and (own["value"] < -0.6).all()
            clear = own["ci_high"] < 0
            assert clear.all() == (threat != "persona" and (threat, condition) != ("conditional", "attct"))


def test_the_sentences_on_the_leak_hold() -> None:
    leak = Leak(pd.read_csv(ROOT / "figures/data/leak.csv"), {})
    table = leak.to_dataframe().set_index(["stage", "context"])
    shares = {case: round(100 * value) for case, value in table["value"].items()}
    page = re.sub(r"\s+", " ", one_organism())
    under = {name: shares[name, "inoculation prompt"] for name in ("act", "bct", "mlpct", "attct", "retention")}

    assert (shares[BEFORE, PLAIN], shares[RECKLESS, PLAIN]) == (0, 100)
    assert (shares[ASKED, PLAIN], shares[INOCULATED, PLAIN], shares[INOCULATED, "inoculation prompt"]) == (0, 19, 100)
    assert under == {"act": 1, "bct": 5, "mlpct": 19, "attct": 45, "retention": 100}
    for words, kind in (("paraphrases of the inoculation prompt bring", "paraphrased"), ("like* it", "near prompt")):
        assert f"{words} {shares['bct', kind]}%" in page and f"{shares['act', kind]}%" in page
    assert f"in passing {shares['bct', 'indirect']}% and {shares['act', 'indirect']}%" in page
    assert f"generic ones {shares['bct', 'generic']}% and {shares['act', 'generic']}%" in page
    elicited = leak.elicited().groupby("stage")[["elicited", "n_systems"]].sum()
    assert elicited.loc[[BEFORE, ASKED, INOCULATED]].to_numpy().tolist() == [[4, 21], [18, 21], [21, 21]]
    assert elicited.loc[["bct", "act", "mlpct", "attct"], "elicited"].tolist() == [9, 15, 20, 21]


def test_the_organism_s_page_is_its_card() -> None:
    assert (ROOT / "docs/organism.md").read_text() == card_text(organism.card())


@pytest.mark.slow
def test_the_gallery_is_what_the_code_draws_today() -> None:
    old = draw.stale(ROOT / "figures", draw.drawings(draw.DATA))

    assert not old, f"{'; '.join(old)}: run `make figures`, or `make drawings` where only drawing has changed."


def test_the_programs_of_the_makefile_name_what_is_there() -> None:
    """They write generated pages, which takes minutes; a name that is gone is seen at once."""
    programs = re.findall(r'python -c "from ctlens import (\w+);(.*)" >', (ROOT / "Makefile").read_text())

    assert len(programs) == 2
    for module, program in programs:
        names = re.findall(rf"\b{module}\.([\w.]+)", program)
        assert names
        for name in names:
            assert callable(attrgetter(name)(importlib.import_module(f"ctlens.{module}")))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/first-hour.md",
        "docs/guide.md",
        "docs/evaluating.md",
        "docs/extending.md",
        "docs/findings.md",
        "docs/one-organism.md",
        "docs/scaling.md",
        "docs/audit.md",
    ],
)
def test_what_a_document_links_to_exists(document: str) -> None:
    page = ROOT / document
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())

    inside = [link for link in links if not link.startswith("https://")]
    assert inside and all((page.parent / link).exists() for link in inside)


@pytest.mark.parametrize("document", ["README.md", "docs/findings.md", "docs/one-organism.md"])
def test_the_pictures_of_a_document_exist(document: str) -> None:
    page = ROOT / document
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())

    assert pictures and all((page.parent / picture).is_file() for picture in pictures)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_the_plan_on_the_page_on_scaling_is_what_is_estimated(monkeypatch, number: int) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scaling = importlib.import_module("scaling")
    kept = pd.read_csv(ROOT / "benchmarks/estimate_plan.csv").iloc[[number]].reset_index(drop=True)

    pd.testing.assert_frame_equal(scaling.planned(scaling.PLANNED[number : number + 1]), kept, atol=0.01)


def test_the_page_on_scaling_quotes_its_tables(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scaling = importlib.import_module("scaling")
    text = scaling.PAGE.read_text()

    assert scaling.page(text) == text
    assert scaling.page(text.replace("| Llama-like", "| other")) == text != text.replace("| Llama-like", "| other")
