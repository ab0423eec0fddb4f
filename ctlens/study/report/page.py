"""The page: what the folder of a study holds, laid out by the templates beside this file."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ctlens.core.digests import require_undamaged
from ctlens.core.files import write_text
from ctlens.core.reading import read_json
from ctlens.plots.export import plotly_source
from ctlens.plots.theme import INK, MUTED, style
from ctlens.study.claims import CLAIM_VERDICTS, Claim, answer, basis, read_claims
from ctlens.study.conditions import DERIVED
from ctlens.study.report.figures import read_figures
from ctlens.study.report.rates import COMPARISON_WORDS, compared_conditions, rates_by_threat, splits
from ctlens.study.results import PROMPT_SIDES, TRAINING_COLUMNS, in_order, read_results
from ctlens.study.source import screening, screening_file
from ctlens.study.transcripts import read_transcripts

# A verdict has a word, a symbol and the name of a style in the page: it is read without colour too.
_VERDICT_STYLES = (("✓", "holds"), ("✗", "fails"), ("?", "open"), ("–", "unmeasured"))
_JUDGEMENT_STYLES = {"good": "holds", "bad": "fails", "other": "unmeasured"}
_SYMBOLS = dict(zip(CLAIM_VERDICTS, _VERDICT_STYLES, strict=True))


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a study folder and returns its path.

    The page needs no network: styles, scripts, data and plotly.js are inside it.

    Args:
        folder: a study folder with `config.json`, `environment.json`, `results.csv`, `claims.csv` and
            `figures/*.json`; the numbers of a figure are offered as a table where its `.csv` is there.

    Raises:
        CtlensError: one of them is missing, cannot be read or is not as the study wrote it.
    """
    folder = Path(folder)
    require_undamaged(folder)
    results = read_results(folder / "results.csv")
    claims = read_claims(folder / "claims.csv")
    threats = rates_by_threat(results)
    config = read_json(folder / "config.json")
    environment = read_json(folder / "environment.json")
    page = _template().render(
        answer=answer(claims),
        basis=basis(claims),
        compared=compared_conditions(threats),
        transcripts=read_transcripts(folder),
        verdicts=Counter(claim.verdict for claim in claims),
        claims=_grouped(claims),
        threats=threats,
        conditions={name: style(name) for name in in_order(results["condition"])},
        trainings=_trainings(results),
        screened=[screening(folder, name).sentence for name in threats if screening_file(folder, name).is_file()],
        splits=splits(results),
        prompt_sides=PROMPT_SIDES,
        figures=read_figures(folder / "figures", list(threats)),
        repeat={"Settings": dict(_flat(config)), "Environment": dict(_flat(environment))},
        config=json.dumps(config, indent=2, ensure_ascii=False),
        colours={"ink": INK, "muted": MUTED},
        plotly=plotly_source(),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _trainings(results: pd.DataFrame) -> int:
    """Counts the models that were trained, so neither the base nor the models that were made of trained ones."""
    trained = results[(results["trained_threat"].fillna("") != "") & ~results["condition"].isin(DERIVED)]
    return trained.groupby(list(TRAINING_COLUMNS)).ngroups


def _grouped(claims: Sequence[Claim]) -> list[list[Claim]]:
    """The lines of each claim, together."""
    lines: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        lines[claim.key].append(claim)
    return list(lines.values())


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | Mapping):
            yield name, ", ".join(map(str, value)) or "none"
        else:
            yield name, "none" if value is None else str(value) or "none"


def _whole(number: float) -> str:
    """A number without decimals."""
    return "–" if math.isnan(number) else f"{round(number)}".replace("-", "−")


def _number(value: float) -> str:
    """A number with three digits, or two decimals when it is small.

    >>> _number(0.1234), _number(-12.34), _number(1234.5), _number(-0.001), _number(float("nan"))
    ('0.12', '−12.3', '1234', '0.00', '–')
    """
    if math.isnan(value):
        return "–"
    decimals = next((digits for digits, end in ((2, 10), (1, 100)) if abs(value) < end), 0)
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")  # + 0.0: no minus before a zero


def _template() -> Template:
    page = Environment(
        loader=PackageLoader("ctlens.study", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"whole": _whole, "number": _number, "capital": lambda words: words[:1].upper() + words[1:]}
    page.globals |= {"symbols": _SYMBOLS, "words": COMPARISON_WORDS, "judgement": _JUDGEMENT_STYLES}
    return page.get_template("page.html.jinja")
