"""A study folder in, one self-contained HTML page out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template

from ctlens.errors import CtlensError
from ctlens.files import read_json, write_text
from ctlens.plots.export import plotly_source
from ctlens.plots.theme import style
from ctlens.tables import (
    ARMS,
    NOT_MEASURED,
    RATES,
    SPLIT,
    Measured,
    Rate,
    Row,
    by_threat,
    final_rows,
    in_order,
    read_results,
)

CONTROLS = {"none": "the base model", "retention": "retention-only training"}
FIGURE_ORDER = (
    "cross_threat", "attack_strength", "behaviour", "dose_response", "layer_curves", "attention_heads", "history",
    "hook_history",
)  # fmt: skip


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
    figures = _figures(folder / "figures")
    threats = _threats(results, figures)
    page = _template().render(
        threats=threats,
        splits=_splits(results),
        rates=RATES[:2],
        arms=ARMS,
        figures=[figure for figure in figures if not any(figure in threat["figures"] for threat in threats)],
        settings=dict(_flat(read_json(folder / "config.json"))),
        environment=dict(_flat(read_json(folder / "environment.json"))),
        plotly=plotly_source(),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _splits(results: pd.DataFrame) -> list[str]:
    return [str(split) for split in dict.fromkeys(results["split"])]


def _threats(results: pd.DataFrame, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page says and shows of each threat."""
    splits = {split: by_threat(results, split) for split in _splits(results)}
    metrics = _field_metrics(results)
    return [
        {
            **_threat(name, methods, {split: found[name] for split, found in splits.items() if name in found}),
            "metrics": metrics.get(name),
            "figures": [figure for figure in figures if figure["name"].startswith(f"{name}-")],
        }
        for name, methods in by_threat(results).items()
    ]


def _threat(name: str, methods: dict[str, Measured], splits: dict[str, dict[str, Measured]]) -> dict[str, Any]:
    """A line per method, and an answer per method against a control."""
    control = "retention" if "retention" in methods else "none"
    lines = [
        {
            "style": style(method),
            "found": found,
            "seeds": found.seeds or "–",
            "held": [
                on[method].rate("bad_rate", "wrapped") if method in on else NOT_MEASURED for on in splits.values()
            ],
        }
        for method, found in methods.items()
    ]
    answers = [_answer(methods, method, control) for method in methods if method not in CONTROLS]
    lower = sum(answer["after"].against(answer["control"]) == "lower than" for answer in answers)
    return {"name": name, "control": CONTROLS[control], "answers": answers, "lower": lower, "lines": lines}


def _answer(methods: dict[str, Measured], method: str, control: str) -> dict[str, Any]:
    def measured(who: str, arm: str, metric: str = "bad_rate") -> Rate:
        return methods[who].rate(metric, arm) if who in methods else NOT_MEASURED

    return {
        "style": style(method),
        "base": measured("none", "wrapped"),
        "after": measured(method, "wrapped"),
        "control": measured(control, "wrapped"),
        "gaps": [100 * (measured(who, "wrapped").value - measured(who, "clean").value) for who in ("none", method)],
        "benign": [measured(who, "benign", "good_rate") for who in ("none", method)],
    }


def _field_metrics(results: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Per threat, the metrics that are not one of `RATES`: a line per (metric, arm), a text per method."""
    seeds: dict[str, dict[tuple[str, str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in final_rows(results, SPLIT):
        if row["metric"] not in RATES and not pd.isna(row["value"]):
            seeds[row["evaluated_threat"]][row["metric"], row["arm"], row["method"]].append(row)
    tables = {}
    for threat, cells in seeds.items():
        methods = in_order(method for _, _, method in cells)
        lines = [
            (metric, arm, [_seeds_text(cells.get((metric, arm, method), [])) for method in methods])
            for metric, arm in dict.fromkeys((metric, arm) for metric, arm, _ in cells)
        ]
        tables[threat] = {"methods": [style(method).label for method in methods], "lines": lines}
    return tables


def _seeds_text(rows: list[Row]) -> str:
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
