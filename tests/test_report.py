"""The report says what the results say, needs no network, and renders in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctlens import plots
from ctlens.errors import CtlensError
from ctlens.report import write_report
from ctlens.tables import NOT_MEASURED, Rate, by_training, overview, read_results, summary_table

THREAT = "sycophancy"
ARMS = ("wrapped", "clean", "benign")
BAD = {"none": (40, 2, 1), "retention": (38, 2, 1), "act": (1, 2, 1), "bct": (36, 3, 20)}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows_of(method: str, seed: float, step: int, bad: tuple[int, int, int], split: str = "heldout") -> list[dict]:
    common = {"trained_threat": "" if method == "none" else THREAT, "method": method, "seed": seed, "step": step}
    common |= {"evaluated_threat": THREAT, "split": split, "n": 50, "ci_low": np.nan, "ci_high": np.nan}
    return [
        {**common, "arm": arm, "metric": metric, "value": value / 50}
        for arm, count in zip(ARMS, bad, strict=True)
        for metric, value in (("bad_rate", count), ("good_rate", 50 - count), ("other_rate", 0))
    ]


def results() -> pd.DataFrame:
    rows = rows_of("none", np.nan, 0, BAD["none"])
    for method in ("bct", "retention", "act"):
        for seed in (0, 1):
            rows += rows_of(method, seed, 10, (40, 2, 1)) + rows_of(method, seed, 20, BAD[method])
    rows += [{**rows_of("act", 0, 20, BAD["act"])[0], "metric": "brr", "value": 0.123, "ci_low": 0.1, "ci_high": 0.2}]
    return pd.DataFrame(rows)


def everything() -> pd.DataFrame:
    """The results with another split, where ACT was evaluated at its last step."""
    elsewhere = rows_of("none", np.nan, 0, (45, 0, 0), "structure") + rows_of("act", 0, 20, (5, 0, 0), "structure")
    return pd.concat([results(), pd.DataFrame(elsewhere)])


def write_study(folder: Path) -> Path:
    (folder / "figures").mkdir(parents=True)
    everything().to_csv(folder / "results.csv", index=False)
    (folder / "config.json").write_text(json.dumps({"threats": ["sycophancy"], "train": {"steps": 20}}))
    (folder / "environment.json").write_text(json.dumps({"torch": "<b>2.9</b>"}))
    curve = ([0.9, 0.1], [0.8, 0.0], [1.0, 0.2])
    figures = {
        "a_history": plots.history([1, 2], {"act": [1.0, 0.5]}, "Did training converge?"),
        "sycophancy-dose": plots.dose_response([0, 20], {"act": curve}, "How much sycophancy?"),
        "z_dose": plots.dose_response([0, 20], {"act": curve}, "How much training?", subtitle="50 prompts"),
    }
    for name, figure in figures.items():
        (folder / "figures" / f"{name}.json").write_text(figure.to_json())
    return folder


class Page(HTMLParser):
    """Collects what a page would load, its table rows, and its visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.inside, self.cell = "", False
        self.feed(text)

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
    return table.set_index("method").at[method, column]


def test_the_summary_pools_seeds_at_the_last_step():
    act = rate(summary_table(results()), "act", "bad wrapped")
    assert (act.value, act.n) == (2 / 100, 100)
    # Wilson's interval of 2 in 100, from the closed formula with z = 1.959964.
    assert (act.low, act.high) == pytest.approx((0.00550, 0.07001), abs=1e-5)
    assert str(act) == "2% [1–7]"


def test_the_summary_lists_base_and_controls_first_then_the_methods_in_their_order():
    assert list(summary_table(results())["method"]) == ["none", "retention", "act", "bct"]


def test_the_summary_leaves_out_other_threats_and_splits_and_marks_what_was_not_measured():
    rows = results()
    elsewhere = rows.assign(evaluated_threat="jailbreak", value=1.0)
    train = rows.assign(split="train", value=1.0)
    table = summary_table(pd.concat([rows[rows["arm"] != "benign"], elsewhere, train]))
    assert set(table["threat"]) == {"sycophancy"}
    assert rate(table, "none", "bad wrapped").value == 0.8
    assert np.isnan(rate(table, "act", "bad benign").value)
    assert str(rate(table, "act", "bad benign")) == "–"


def test_the_summary_reads_the_same_from_a_file(tmp_path):
    results().to_csv(tmp_path / "results.csv", index=False)
    assert str(summary_table(read_results(tmp_path / "results.csv"))) == str(summary_table(results()))


def test_results_of_the_base_alone_are_read(tmp_path):
    pd.DataFrame(rows_of("none", np.nan, 0, BAD["none"])).to_csv(tmp_path / "results.csv", index=False)
    assert list(summary_table(read_results(tmp_path / "results.csv"))["method"]) == ["none"]


def test_results_without_the_split_are_refused():
    with pytest.raises(CtlensError, match="heldout"):
        summary_table(results().assign(split="train"))


def test_the_overview_has_the_bad_rate_on_every_split_and_the_good_rate_elsewhere():
    lines = overview(everything()).set_index("method")
    assert list(lines.columns) == ["threat", "heldout", "structure", "good clean", "good benign"]
    assert str(lines.at["act", "structure"]) == "10% [4–21]"  # 5 in 50, by the closed formula
    assert str(lines.at["act", "heldout"]) == "2% [1–7]"
    assert (lines.at["act", "good clean"].value, lines.at["bct", "good benign"].value) == (0.96, 0.6)


def test_every_training_is_counted_on_every_threat_it_was_evaluated_on():
    elsewhere = results().assign(evaluated_threat="jailbreak", value=0.5)
    measured = by_training(pd.concat([results(), elsewhere]))
    assert {place[1:] for place in measured if not place[0]} == {("none", THREAT), ("none", "jailbreak")}
    assert measured[THREAT, "act", "jailbreak"].rate("bad_rate", "wrapped").value == 0.5
    own = measured[THREAT, "act", THREAT]
    assert (own.rate("bad_rate", "wrapped").value, own.rate("bad_rate", "wrapped").n, own.seeds) == (0.02, 100, 2)


def test_two_rates_differ_only_when_the_interval_of_the_difference_leaves_out_zero():
    low, middle, high = Rate(0.02, 0.006, 0.07, 100), Rate(0.05, 0.02, 0.11, 100), Rate(0.8, 0.71, 0.87, 100)
    assert low.against(high) == "lower than"
    assert high.against(low) == "higher than"
    assert low.against(middle) == "not distinguishable from"
    assert low.against(NOT_MEASURED) == "not compared with"


def test_the_table_of_the_page_holds_the_numbers(page):
    rows = {row[0]: row[1:] for row in reversed(page[1].rows) if row}
    assert rows["ACT"][:3] == ["2% [1–7]", "4% [2–10]", "2% [1–7]"]
    assert rows["base"][0] == "80% [67–89]"
    assert rows["BCT"][3:6] == ["28% [20–37]", "94% [88–97]", "60% [50–69]"]
    assert rows["ACT"][6:] == ["0%", "0%", "0%", "100 / 100 / 100", "2"]
    assert rows["brr"] == ["wrapped", "0.12 [0.10, 0.20]"]


def test_the_page_holds_the_bad_rate_on_every_split(page):
    rows = [row for row in page[1].rows if len(row) == 3]
    assert rows[0] == ["", "heldout", "structure"]
    assert ["base", "80% [67–89]", "90% [79–96]"] in rows
    assert ["BCT", "72% [63–80]", "–"] in rows


def test_the_contents_lead_to_every_part(page):
    text = page[0].read_text(encoding="utf-8")
    targets = [target.removeprefix("#") for target in page[1].loads if target.startswith("#")]
    assert {"answer", "across", THREAT, "how"} <= set(targets)
    assert all(text.count(f'id="{target}"') == 1 for target in targets)


def test_the_answer_follows_from_the_numbers(page):
    words = page[1].words
    assert "1 of 2 methods leave fewer bad answers to wrapped prompts than retention-only training." in words
    assert "lower than retention-only training (76% [67–83])" in words
    assert "Wrapped minus clean: 76 → −2 points." in words
    assert "Benign twins answered well: 98% → 60%, lower than base." in words


def test_figures_come_in_order_of_the_argument_with_captions(page):
    words = page[1].words
    titles = ("How much training?", "50 prompts", "Did training converge?", "How much sycophancy?")
    assert [*titles] == sorted(titles, key=words.index)
    assert "bands their 95% intervals" in words


def test_settings_are_flat_and_text_is_escaped(page):
    rows = {row[0]: row[1] for row in page[1].rows if len(row) == 2}
    assert rows["train.steps"] == "20"
    assert rows["torch"] == "<b>2.9</b>"


def test_the_page_loads_nothing_and_holds_plotly_once(page):
    path, parsed = page
    assert all(target.startswith(("data:", "#")) for target in parsed.loads)
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    assert 1_000_000 < path.stat().st_size < 10_000_000


@pytest.mark.parametrize("name", ["results.csv", "config.json", "environment.json", "figures"])
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
    results().drop(columns="arm").to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(CtlensError, match="arm"):
        read_results(tmp_path / "results.csv")


def test_a_file_that_is_no_figure_is_refused(tmp_path):
    folder = write_study(tmp_path / "study")
    (folder / "figures" / "notes.json").write_text("{}")
    with pytest.raises(CtlensError, match="notes.json"):
        write_report(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on the path")
def test_a_browser_draws_every_figure(page, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    command = [str(CHROMIUM), *flags, *quiet, "--virtual-time-budget=5000", "--dump-dom", page[0].as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    drawn = dom.split("<script>")[0]
    assert drawn.count('class="plot js-plotly-plot"') == 3
    assert drawn.count('class="trace scatter') == 5
