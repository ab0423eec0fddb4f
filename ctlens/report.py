"""A study folder in, one self-contained HTML page out; and the table of rates that page and terminal share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template

from ctlens.errors import CtlensError
from ctlens.files import read_json, write_text
from ctlens.intervals import difference, wilson
from ctlens.plots.export import plotly_source
from ctlens.plots.theme import METHODS, style

RATES = ("bad_rate", "good_rate", "other_rate")
ARMS = ("wrapped", "clean", "benign")
SPLIT = "heldout"
COLUMNS = ("trained_threat", "method", "seed", "step", "evaluated_threat", "split", "arm", "metric")
NUMBERS = ("value", "n", "ci_low", "ci_high")
CONTROLS = {"none": "the base model", "retention": "retention-only training"}
FIGURE_ORDER = ("behaviour", "dose_response", "layer_curves", "attention_heads", "history", "hook_history")


class Rate(NamedTuple):
    """A share of answers (0 to 1) with its 95% interval and the number of answers; NaN where not measured."""

    value: float
    low: float
    high: float
    n: int

    @property
    def percent(self) -> str:
        """The share as a percentage."""
        return "–" if pd.isna(self.value) else f"{self.value:.0%}"

    @property
    def interval(self) -> str:
        """The ends of the interval, in percent, in brackets."""
        return "" if pd.isna(self.value) else f"[{100 * self.low:.0f}–{100 * self.high:.0f}]"

    def __str__(self) -> str:
        return f"{self.percent} {self.interval}".strip()

    def against(self, other: Rate) -> str:
        """How this share compares with an independent one, in words.

        They differ when the 95% interval of the difference (Newcombe's) leaves out 0; the answers
        are taken as independent, which is cautious for two models on the same prompts.
        """
        if pd.isna(self.value) or pd.isna(other.value):
            return "not compared with"
        low, high = difference(round(self.value * self.n), self.n, round(other.value * other.n), other.n)
        return "lower than" if high < 0 else "higher than" if low > 0 else "not distinguishable from"


NAN = float("nan")
NOT_MEASURED = Rate(NAN, NAN, NAN, 0)


class Cell(NamedTuple):
    """A method on one threat: its pooled rates by (metric, arm), and how many seeds they are pooled from."""

    rates: dict[tuple[str, str], Rate]
    seeds: int

    def rate(self, metric: str, arm: str) -> Rate:
        """One of the rates; `NOT_MEASURED` where there is none."""
        return self.rates.get((metric, arm), NOT_MEASURED)


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a study folder and returns its path.

    The page needs no network: styles, data and plotly.js are inside it.

    Args:
        folder: a study folder with `config.json`, `environment.json`, `results.csv` and `figures/*.json`.

    Raises:
        CtlensError: one of them is missing or cannot be read.
    """
    folder = Path(folder)
    results = read_results(folder / "results.csv")
    page = _template().render(
        threats=[_threat(name, cells) for name, cells in _pooled(results, SPLIT).items()],
        field_metrics=_field_metrics(results),
        rates=RATES[:2],
        arms=ARMS,
        figures=_figures(folder / "figures"),
        settings=dict(_flat(read_json(folder / "config.json"))),
        environment=dict(_flat(read_json(folder / "environment.json"))),
        plotly=plotly_source(),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def read_results(path: str | Path) -> pd.DataFrame:
    """The rows of a `results.csv`, one number each.

    Raises:
        CtlensError: the file is missing, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise CtlensError(f"{path} does not exist: run the study first, or check the path.")
    try:
        results = pd.read_csv(path, dtype={"trained_threat": str})
    except ValueError as error:  # pandas: empty, ragged or not text
        raise CtlensError(f"{path} is no table ({error}): check that it is a study's results.") from None
    missing = [name for name in (*COLUMNS, *NUMBERS) if name not in results]
    if missing:
        raise CtlensError(f"{path} lacks the columns {', '.join(missing)}: check that it is a study's results.")
    return results


def summary_table(results: pd.DataFrame, split: str = SPLIT) -> pd.DataFrame:
    """How often each method answers badly and how often well, on the threat that it was trained on.

    Each training counts at its last step. Seeds are pooled: their answers are added up, and the
    interval is Wilson's 95% interval of the total. It takes the answers of different seeds as
    independent, so it is too narrow where seeds share their prompts.

    Args:
        results: rows as in `results.csv`; the base model is the method `none` without a trained threat.
        split: the prompts to count.

    Returns:
        One row per threat and method, the base and the controls first, with the columns `threat`,
        `method`, `bad wrapped`, `bad clean`, `bad benign`, `good wrapped`, `good clean` and
        `good benign`. A rate is a `Rate`: it has `value`, `low`, `high` and `n`, and prints as
        `84% [76–90]`; its value is NaN where it was not measured.

    Raises:
        CtlensError: no row of that split holds a rate of a model on its own threat.
    """
    return pd.DataFrame(
        [
            {"threat": threat, "method": method}
            | {f"{name} {arm}": cell.rate(f"{name}_rate", arm) for name in ("bad", "good") for arm in ARMS}
            for threat, cells in _pooled(results, split).items()
            for method, cell in cells.items()
        ]
    )


def _pooled(results: pd.DataFrame, split: str) -> dict[str, dict[str, Cell]]:
    """Per threat and method, the rates over all seeds."""
    totals: dict[tuple[str, str], dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    seeds: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row in _final(results, split):
        if row["metric"] not in RATES or not row["n"] > 0:
            continue
        name = row["evaluated_threat"], row["method"]
        total = totals[name][row["metric"], row["arm"]]
        total[0] += round(row["value"] * row["n"])
        total[1] += int(row["n"])
        seeds[name] |= set() if pd.isna(row["seed"]) else {int(row["seed"])}
    if not totals:
        raise CtlensError(f"the results hold no rates on the split {split!r}: evaluate on that split first.")
    cells: dict[str, dict[str, Cell]] = {threat: {} for threat, _ in totals}
    for threat, method in sorted(totals, key=lambda name: _place(name[1])):
        rates = {key: Rate(count / n, *wilson(count, n), n) for key, (count, n) in totals[threat, method].items()}
        cells[threat][method] = Cell(rates, len(seeds[threat, method]))
    return cells


def _place(method: str) -> tuple[int, str]:
    known = list(METHODS)
    return (known.index(method) if method in known else len(known), method)


def _final(results: pd.DataFrame, split: str) -> list[dict[Any, Any]]:
    """The rows of every model on its own threat at its last step; the base and shared controls count for every one."""
    rows = results.fillna({"trained_threat": ""}).to_dict("records")
    trained = {row["trained_threat"] for row in rows} - {""} or {row["evaluated_threat"] for row in rows}
    own = [
        row
        for row in rows
        if row["split"] == split
        and row["evaluated_threat"] in trained
        and row["trained_threat"] in ("", row["evaluated_threat"])
    ]
    last: dict[tuple[str, str, str], float] = {}
    for row in own:
        last[_run(row)] = max(row["step"], last.get(_run(row), 0))
    return [row for row in own if row["step"] == last[_run(row)]]


def _run(row: Mapping[Any, Any]) -> tuple[str, str, str]:
    return row["trained_threat"], row["method"], str(row["seed"])


def _threat(name: str, cells: dict[str, Cell]) -> dict[str, Any]:
    """What the page says of one threat: a line per cell, and an answer per method against a control."""
    control = "retention" if "retention" in cells else "none"
    lines = [{"style": style(method), "cell": cell, "seeds": cell.seeds or "–"} for method, cell in cells.items()]
    answers = [_answer(cells, method, control) for method in cells if method not in CONTROLS]
    lower = sum(answer["after"].against(answer["control"]) == "lower than" for answer in answers)
    return {"name": name, "control": CONTROLS[control], "answers": answers, "lower": lower, "lines": lines}


def _answer(cells: dict[str, Cell], method: str, control: str) -> dict[str, Any]:
    def bad(who: str, arm: str) -> Rate:
        return cells[who].rate("bad_rate", arm) if who in cells else NOT_MEASURED

    return {
        "style": style(method),
        "base": bad("none", "wrapped"),
        "after": bad(method, "wrapped"),
        "control": bad(control, "wrapped"),
        "gaps": [100 * (bad(who, "wrapped").value - bad(who, "clean").value) for who in ("none", method)],
        "benign": (bad("none", "benign"), bad(method, "benign")),
    }


def _field_metrics(results: pd.DataFrame) -> list[dict[str, Any]]:
    """Per threat, the metrics that are not one of `RATES`: a line per (metric, arm), a text per method."""
    seeds: dict[str, dict[tuple[str, str, str], list[dict[Any, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in _final(results, SPLIT):
        if row["metric"] not in RATES and not pd.isna(row["value"]):
            seeds[row["evaluated_threat"]][row["metric"], row["arm"], row["method"]].append(row)
    tables = []
    for threat, cells in seeds.items():
        methods = sorted({method for _, _, method in cells}, key=_place)
        lines = [
            (metric, arm, [_seeds_text(cells.get((metric, arm, method), [])) for method in methods])
            for metric, arm in dict.fromkeys((metric, arm) for metric, arm, _ in cells)
        ]
        tables.append({"threat": threat, "methods": [style(method).label for method in methods], "lines": lines})
    return tables


def _seeds_text(rows: list[dict[Any, Any]]) -> str:
    values = [row["value"] for row in rows]
    if not values:
        return "–"
    if len(values) > 1:
        return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    low, high = rows[0]["ci_low"], rows[0]["ci_high"]
    return f"{values[0]:.2f}" if pd.isna(low) else f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"


def _figures(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise CtlensError(f"{folder} holds no figure (*.json): run the study to its end first.")
    return sorted((_figure(path) for path in paths), key=lambda figure: figure["order"])


def _figure(path: Path) -> dict[str, Any]:
    """A saved figure with its title moved out of the drawing, where it can wrap on a narrow page."""
    figure = read_json(path)
    if not isinstance(figure, dict) or not {"data", "layout"} <= set(figure):
        raise CtlensError(f"{path} is not a plotly figure: check that only figures are in the folder.")
    meta = figure["layout"].get("meta") or {}
    drawn = re.sub(r"<[^>]*>", " ", figure["layout"].pop("title", {}).get("text") or path.stem)
    figure["layout"].update(paper_bgcolor="rgba(0, 0, 0, 0)", margin={**figure["layout"].get("margin", {}), "t": 36})
    kind = meta.get("kind")
    return {
        "title": meta.get("title") or drawn,
        "subtitle": meta.get("subtitle"),
        "caption": meta.get("caption"),
        "kind": kind,
        "name": path.stem,
        "order": FIGURE_ORDER.index(kind) if kind in FIGURE_ORDER else len(FIGURE_ORDER),
        "json": {"data": figure["data"], "layout": figure["layout"]},
    }


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _template() -> Template:
    """The page; its filter `whole` writes a number without decimals."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["whole"] = lambda number: "–" if pd.isna(number) else f"{round(number)}".replace("-", "−")
    return page.from_string(files("ctlens").joinpath("report.html.jinja").read_text(encoding="utf-8"))
