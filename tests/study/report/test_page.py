"""The report says what the results and the claims say, and its page is whole and in order."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.study_folder import BAD, THREAT, claims, everything, results, rows_of, write_study
from helpers.tiers import unit_first

from ctlens import plots
from ctlens.core.errors import CtlensError
from ctlens.core.rates import NOT_MEASURED, Rate
from ctlens.study.claims import answer, write_claims
from ctlens.study.report import write_report
from ctlens.study.report.figures import read_figures
from ctlens.study.report.rates import rates_by_threat
from ctlens.study.results import overview, read_results, summary_table


class Page(HTMLParser):
    """Collects what a page would load, its table rows, and its visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.inside = ""
        self.cell = False
        self.feed(text)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            return
        self.words += " " + " ".join(data.split())
        if self.cell and data.strip():
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    path = write_report(write_study(tmp_path_factory.mktemp("study") / "run"))
    return path, Page(path.read_text(encoding="utf-8"))


def rate(table: pd.DataFrame, method: str, column: str) -> Rate:
    return table.set_index("condition").at[method, column]


def test_the_summary_pools_seeds_at_the_last_step():
    act = rate(summary_table(results()), "act", "bad wrapped")
    assert (act.value, act.n_prompts) == (2 / 100, 50)
    # Wilson's interval of 1 in 50, from the closed formula with z = 1.959964: two seeds answered the same 50 prompts.
    assert (act.low, act.high) == pytest.approx((0.00354, 0.10495), abs=1e-5)
    assert str(act) == "2% [0–10]"


def test_the_summary_lists_base_and_controls_first_then_the_methods_in_their_order():
    assert list(summary_table(results())["condition"]) == ["base", "retention", "act", "bct"]


def test_the_summary_leaves_out_other_threats_and_splits_and_marks_what_was_not_measured():
    rows = results()
    elsewhere = rows.assign(evaluated_threat="jailbreak", value=1.0)
    train = rows.assign(split="train", value=1.0)
    table = summary_table(pd.concat([rows[rows["prompt_side"] != "benign"], elsewhere, train]))
    assert set(table["threat"]) == {"sycophancy"}
    assert rate(table, "base", "bad wrapped").value == 0.8
    assert np.isnan(rate(table, "act", "bad benign").value)
    assert str(rate(table, "act", "bad benign")) == "–"


def test_the_summary_reads_the_same_from_a_file(tmp_path):
    results().to_csv(tmp_path / "results.csv", index=False)
    assert str(summary_table(read_results(tmp_path / "results.csv"))) == str(summary_table(results()))


def test_results_of_the_base_alone_are_read(tmp_path):
    pd.DataFrame(rows_of("base", np.nan, 0, BAD["base"])).to_csv(tmp_path / "results.csv", index=False)
    assert list(summary_table(read_results(tmp_path / "results.csv"))["condition"]) == ["base"]


def test_results_without_the_split_are_refused():
    with pytest.raises(CtlensError, match="heldout"):
        summary_table(results().assign(split="train"))


def test_the_overview_has_the_bad_rate_on_every_split_and_the_good_rate_elsewhere():
    lines = overview(everything()).set_index("condition")
    assert list(lines.columns) == ["threat", "heldout", "structure", "good clean", "good benign"]
    assert str(lines.at["act", "structure"]) == "10% [4–21]"  # 5 in 50, by the closed formula
    assert str(lines.at["act", "heldout"]) == "2% [0–10]"
    assert (lines.at["act", "good clean"].value, lines.at["bct", "good benign"].value) == (0.96, 0.6)


def test_two_rates_differ_only_when_the_interval_of_the_difference_leaves_out_zero():
    low = Rate(0.02, 0.006, 0.07, 100, 100.0)
    middle = Rate(0.05, 0.02, 0.11, 100, 100.0)
    high = Rate(0.8, 0.71, 0.87, 100, 100.0)
    assert low.against(high) == "lower than"
    assert high.against(low) == "higher than"
    assert low.against(middle) == "not distinguishable from"
    assert low.against(NOT_MEASURED) == "not compared with"


def test_the_table_of_a_threat_compares_with_the_control_and_the_base(page):
    # Wilson's intervals of 1, 36, 38, 40 and 49 in 50, by the closed formula with z = 1.959964.
    rows = {row[0]: row[1:] for row in reversed(page[1].rows) if len(row) == 7}
    assert rows["base"] == ["80% [67–89]", "–", "76", "98% [90–100]", "–", "–"]
    assert rows["retention only"] == ["76% [63–86]", "–", "72", "98% [90–100]", "no clear difference", "1"]
    assert rows["ACT"] == ["2% [0–10]", "lower", "−2", "98% [90–100]", "no clear difference", "1"]
    assert rows["BCT"] == ["72% [58–83]", "no clear difference", "66", "60% [46–72]", "lower", "1"]
    assert "1 of 2 methods leave fewer bad answers to wrapped prompts than retention-only training." in page[1].words


def test_the_table_of_all_rates_holds_every_prompt_side(page):
    rows = {row[0]: row[1:] for row in page[1].rows if len(row) == 11}
    assert rows["ACT"][:3] == ["2% [0–10]", "4% [1–13]", "2% [0–10]"]
    assert rows["BCT"][3:6] == ["28% [17–42]", "94% [84–98]", "60% [46–72]"]
    assert rows["ACT"][6:] == ["0%", "0%", "0%", "50 / 50 / 50"]
    assert ["brr", "wrapped", "0.12 [0.10, 0.20]"] in page[1].rows


def test_the_page_holds_the_bad_rate_on_every_split(page):
    assert ["condition", "heldout", "structure"] in page[1].rows
    assert ["base", "80% [67–89]", "90% [79–96]"] in page[1].rows
    assert ["BCT", "72% [58–83]", "–"] in page[1].rows


def test_a_field_metric_of_several_trainings_is_their_mean_with_the_lowest_and_highest():
    one = results().query("metric == 'brr'")
    two = pd.concat([results(), one.assign(seed=1, value=0.323)])
    assert rates_by_threat(two)[THREAT].metrics == {("brr", "wrapped"): {"act": "0.22 (0.12 to 0.32)"}}


def test_a_figure_is_as_wide_as_it_says_or_as_its_panels_need(tmp_path):
    folder = write_study(tmp_path / "study") / "figures"
    curve = ([1, 2], *[[0.5, 0.5]] * 3)
    figure = plots.attack_strength({name: {"heldout": curve} for name in "abcde"}, "Five panels, three in a row?")
    (folder / "five.json").write_text(figure.to_json())
    widths = {
        f["name"]: f["width"] for part in read_figures(folder, [THREAT]).values() for of in part.values() for f in of
    }
    assert (widths["five"], widths["cross-threat"], widths["z_dose"]) == (3 * 290, 880, 0)


def test_controls_are_not_counted_as_methods_and_unknown_methods_are(tmp_path):
    folder = write_study(tmp_path / "study")
    added = [row for condition in ("sft", "mine_new") for row in rows_of(condition, 0, 20, (0, 0, 0))]
    pd.concat([everything((0,)), pd.DataFrame(added)]).to_csv(folder / "results.csv", index=False)
    text = Page(write_report(folder).read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in text.rows if len(row) == 7}
    assert "2 of 3 methods leave fewer" in text.words
    assert rows["SFT on other prompts"][:2] == rows["mine_new"][:2] == ["0% [0–7]", "lower"]


def test_the_answer_and_the_tally_come_first_and_from_the_claims(page, tmp_path):
    tally = "4 tests of 2 claims : ✓ holds 1 ✗ does not hold 1 ? inconclusive 1 – not measured 1"
    assert tally in page[1].words
    folder = write_study(tmp_path / "study")
    asked = [replace(claims()[0], key=key) for key in ("repair", "shared", "cue_act")]
    write_claims(asked, folder / "claims.csv")

    words = Page(write_report(folder).read_text(encoding="utf-8")).words

    told = [f"{one.question} {one.sentence}" for one in answer(asked)]
    assert told[0] == "Does every method leave fewer bad answers than retention alone? Yes on sycophancy."
    places = [words.index(one) for one in [*told, "Intervals are over topics", "What the models answer The first"]]
    assert len(told) == 3 and places == sorted(places)


def test_the_first_screen_has_the_table_of_methods_by_threats(page):
    start = page[1].rows.index(["condition", "sycophancy"])
    assert [row[0] for row in page[1].rows[start + 1 : start + 5]] == ["base", "retention only", "ACT", "BCT"]
    assert page[1].rows[start + 3][1].startswith("2%")


def test_the_transcripts_show_the_prompt_and_every_answer_with_its_verdict(page):
    words = page[1].words
    assert "Sycophancy; good: “blue”, bad: “<red>” user i bet it is <red> . what is it ?" in words
    assert "base “<red>” bad ACT “blue” good BCT “why” other" in words


def test_a_study_without_transcripts_has_no_such_part(tmp_path):
    folder = write_study(tmp_path / "study")
    (folder / "transcripts.jsonl").unlink()

    text = write_report(folder).read_text(encoding="utf-8")

    assert 'href="#transcripts"' not in text and "What the models answer" not in text


def test_a_claim_is_one_group_with_a_line_per_threat_and_setting_and_its_reason(page):
    start = next(number for number, row in enumerate(page[1].rows) if row[0].startswith("Methods share <shifts>"))
    assert page[1].rows[start : start + 9] == [
        ["Methods share <shifts> difference of similarities (similarity)"],
        ["sycophancy equal steps", "✓ holds", "0.50 [0.25, 0.75]", "0.06", "0.00", "64 prompts"],
        ["It holds."],
        ["jailbreak equal steps", "✗ does not hold", "−0.50 [−0.75, −0.25]", "0.06", "0.00", "64 prompts"],
        ["It does not hold."],
        ["sycophancy matched effect", "? inconclusive", "0.12 [−0.25, 0.50]", "0.06", "0.00", "64 prompts"],
        ["It inconclusive."],
        ["The cue stays accuracy (share)"],
        ["sycophancy equal steps", "– not measured", "–", "–", "0.00", "0 none"],
    ]


@pytest.mark.parametrize("other", ["accuracy of another probe", "difference of similarities"])
def test_every_line_of_a_claim_has_its_own_statistic(other, tmp_path):
    """It stands over the lines where they share it, and otherwise in front of the reason of each."""
    folder = write_study(tmp_path / "run")
    lines = claims()
    lines[-1] = replace(lines[-1], statistic=other)
    write_claims(lines, folder / "claims.csv")

    rows = [row for row in Page(write_report(folder).read_text(encoding="utf-8")).rows if row]

    over = next(row[0] for row in rows if row[0].startswith("Methods share <shifts>") and len(row) == 1)
    reasons = [row[0] for row in rows if len(row) == 1 and "it " in row[0].lower() and row != [over]]
    shared = "difference of similarities (similarity)"
    if other == "difference of similarities":
        assert over.endswith(shared)
        assert reasons == ["It holds.", "It does not hold.", "It inconclusive."]
    else:
        assert shared not in over
        assert reasons == [
            f"{shared.capitalize()}: it holds.",
            f"{shared.capitalize()}: it does not hold.",
            "Accuracy of another probe (similarity): it inconclusive.",
        ]


def test_the_page_says_how_many_models_were_trained(page):
    assert "A ctlens study of 1 threat and 3 trainings" in page[1].words  # retention, ACT and BCT, of one seed


def test_models_that_were_made_of_trained_ones_are_no_trainings(tmp_path):
    folder = write_study(tmp_path / "run")
    table = read_results(folder / "results.csv")
    made = table[table["condition"] == "act"].assign(condition="perturbed")
    pd.concat([table, made]).to_csv(folder / "results.csv", index=False)

    assert "of 1 threat and 3 trainings" in Page(write_report(folder).read_text(encoding="utf-8")).words


def test_headings_go_down_one_level_at_a_time(page):
    levels = [int(level) for level in re.findall(r"<h([1-6])", page[0].read_text(encoding="utf-8"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_every_table_has_a_caption_and_every_header_a_scope(page):
    text = page[0].read_text(encoding="utf-8").split("<script")[0]  # up to the first figure
    text += page[0].read_text(encoding="utf-8").split('id="claims"')[1].split("<script")[0]
    assert text.count("<table") == text.count("<caption>") >= 2
    assert all("scope=" in tag for tag in re.findall(r"<th\b[^>]*>", text))


def test_every_figure_is_named_for_those_who_do_not_see_it(page):
    names = re.findall(r'class="plot" role="img" aria-label="([^"]*)"', page[0].read_text(encoding="utf-8"))
    assert len(names) == 6
    assert any(name.startswith("How much training? 50 prompts Lines are rates") for name in names)


def test_the_contents_lead_to_every_part(page):
    text = page[0].read_text(encoding="utf-8")
    targets = [target.removeprefix("#") for target in page[1].loads if target.startswith("#")]
    parts = {f"{part}-{THREAT}" for part in ("behaviour", "training", "mechanism")}
    assert {"answer", "behaviour", "training", "mechanism", "claims", "repeat"} | parts <= set(targets)
    assert all(text.count(f'id="{target}"') == 1 for target in targets)


def test_figures_come_in_order_of_the_argument_with_captions(page):
    words = page[1].words
    titles = (
        "Does training protect against others?",
        "How much training?",
        "50 prompts",
        "Did training converge?",
        "How much sycophancy?",
        "Where is the gap closed?",
        "What is <new>?",
        "Methods share <shifts>",
    )
    places = [words.index(title) for title in titles]
    assert places == sorted(places)
    assert "bands their 95% intervals" in words


def test_settings_are_flat_and_text_is_escaped(page):
    rows = {row[0]: row[1] for row in page[1].rows if len(row) == 2}
    assert (rows["train.steps"], rows["train.until"], rows["threats"]) == ("20", "none", "sycophancy")
    assert rows["torch"] == "<b>2.9</b>"
    assert '"until": null' in page[1].words  # the file as it is, to copy


def test_the_page_loads_nothing_and_holds_plotly_once(page):
    path, parsed = page
    assert all(target.startswith(("data:", "#")) for target in parsed.loads)
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    assert 1_000_000 < path.stat().st_size < 10_000_000


@pytest.mark.parametrize(
    "name", unit_first(["results.csv", "claims.csv", "config.json", "environment.json", "figures"])
)
def test_a_missing_file_is_named_and_no_report_is_written(tmp_path, name):
    folder = write_study(tmp_path / "study")
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CtlensError, match=name):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2,3\n4,5,6,7\n", bytes(range(256))], ids=["empty", "ragged", "binary"]
)
def test_results_that_are_no_table_are_refused(tmp_path, content):
    (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(CtlensError, match="results.csv"):
        read_results(tmp_path / "results.csv")


def test_results_that_lack_a_column_are_refused(tmp_path):
    results().drop(columns="prompt_side").to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(CtlensError, match="prompt_side"):
        read_results(tmp_path / "results.csv")


def test_a_file_that_is_no_figure_is_refused(tmp_path):
    folder = write_study(tmp_path / "study")
    (folder / "figures" / "notes.json").write_text("{}")
    with pytest.raises(CtlensError, match="notes.json"):
        write_report(folder)


def test_results_of_an_older_version_say_how_to_convert_them(tmp_path: Path) -> None:
    old = {"prompt_side": "arm", "condition": "method", "n_prompts": "n"}
    results().rename(columns=old).to_csv(tmp_path / "results.csv", index=False)

    advice = (
        "rename its column arm to prompt_side, method to condition, n to n_prompts, and write base for the method none"
    )
    with pytest.raises(CtlensError, match=f"written by an earlier ctlens: {advice}"):
        read_results(tmp_path / "results.csv")
