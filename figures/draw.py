"""The gallery: every figure here is drawn from the files in `data`, and a test draws them again.

`python figures/draw.py` draws anew from these data, and `python figures/draw.py runs` first takes them
from those studies that lie there; `make figures` runs the studies and then that. What was drawn is
noted in `manifest.json`, so that `stale` can tell when the code has moved on.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

import ctlens
from ctlens import plots
from ctlens.analysis import ResidualShift, ShiftSimilarity, Transplant
from ctlens.core.files import write_json
from ctlens.core.labels import BASE
from ctlens.core.reading import read_json
from ctlens.evaluation import Evaluation
from ctlens.study import figures as study_figures
from ctlens.study.analyses import SETTINGS
from ctlens.study.claims import Claim
from ctlens.study.conditions import CROSSED_CONDITIONS, DEFAULT_METHODS, RETENTION
from ctlens.study.config import ANALYSED_THREATS
from ctlens.study.dose_response import DoseResult
from ctlens.study.inoculation import Leak
from ctlens.study.results import read_results

HERE = Path(__file__).parent
DATA = HERE / "data"
KINDS = ("json", "html", "png")
LIBRARY = "plotly.min.js"
SHOWN = (RETENTION, *DEFAULT_METHODS)
EXCHANGED = (*DEFAULT_METHODS, *CROSSED_CONDITIONS)


STUDY = "study"
"""The folder of the organism's study, under `DATA` and under the folder of the runs."""
RESIDUAL_THREAT = ANALYSED_THREATS[0]
OF_STUDY = {
    **{f"{name}.csv": f"{name}.csv" for name in ("results", "claims", "base")},
    **{
        f"{RESIDUAL_THREAT}-residual-{name}.safetensors": f"runs/{RESIDUAL_THREAT}-{name}-seed0/residual.safetensors"
        for name in SHOWN
    },
    **{
        f"{threat}-similarity.safetensors": f"analyses/{threat}/similarity/similarity.safetensors"
        for threat in ANALYSED_THREATS
    },
    **{
        f"{threat}-transplant-{name}.safetensors": f"analyses/{threat}/transplant-seed0/{name}.safetensors"
        for threat in ANALYSED_THREATS
        for name in EXCHANGED
    },
}
TAKEN = {
    "doses.csv": "doses/doses.csv",
    "leak.csv": "leak/leak.csv",
    **{f"{STUDY}/{name}": f"{STUDY}/{source}" for name, source in OF_STUDY.items()},
}


def drawings(data: Path) -> dict[str, plots.Figure]:
    """The figures of the gallery by name, drawn by today's code from the data in a folder."""
    doses = DoseResult(data, pd.read_csv(data / "doses.csv", keep_default_na=False))
    study = data / STUDY
    shifts = {name: ResidualShift.load(study / f"{RESIDUAL_THREAT}-residual-{name}.safetensors") for name in SHOWN}
    results = read_results(study / "results.csv")
    return {
        **{name: figure for threat in ANALYSED_THREATS for name, figure in _inside(study, results, threat)},
        "cross-threat": study_figures.cross_threat_figure(results[results["condition"].isin((BASE, *SHOWN))]),
        "attack-strength": Evaluation.load(study / "base.csv").strength_figure(),
        f"{RESIDUAL_THREAT}-residual-last": shifts[RETENTION].compare(
            shifts, label=RETENTION, subtitle=study_figures.prompts_in_words(RESIDUAL_THREAT)
        ),
        "doses-pairs": doses.figure("pairs"),
        "doses-steps": doses.figure("steps"),
        "leak": Leak(pd.read_csv(data / "leak.csv"), {}).figure(),
    }


def take(runs: Path) -> None:
    """Copies what the gallery shows from those studies that lie in a folder of runs, of each all or none."""
    for name, source in TAKEN.items():
        if (runs / Path(source).parts[0]).is_dir():
            shutil.copyfile(runs / source, DATA / name)


def _inside(data: Path, results: pd.DataFrame, threat: str) -> Iterator[tuple[str, plots.Figure]]:
    """Draws the changes inside the models trained on one threat."""
    words = study_figures.prompts_in_words(threat)
    transplants = {name: Transplant.load(data / f"{threat}-transplant-{name}.safetensors") for name in EXCHANGED}
    yield f"{threat}-gap-dose", study_figures.gap_figure(results[results["trained_threat"] == threat], words)
    yield f"{threat}-similarity", ShiftSimilarity.load(data / f"{threat}-similarity.safetensors").among(SHOWN).figure()
    first = EXCHANGED[0]
    subtitle = f"{words}; at equal steps"
    figure = transplants[first].compare(transplants, label=first, positions="last", subtitle=subtitle)
    yield f"{threat}-transplant", figure


def claims_table(claims: Sequence[Claim]) -> str:
    """Writes the claims as a Markdown table, a row per claim and threat."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for claim in claims:
        rows.setdefault((claim.statement, claim.threat), {})[claim.setting] = _verdict(claim)
    lines = [f"| claim | threat | {' | '.join(SETTINGS)} |", "|---|---|---|---|"]
    for (statement, threat), cells in rows.items():
        found = " | ".join(cells.get(setting, "–") for setting in SETTINGS)
        lines.append(f"| {statement[0].upper()}{statement[1:]} | {threat} | {found} |")
    return "\n".join(lines)


def _verdict(claim: Claim) -> str:
    """The verdict on a claim, with its number and interval where there is one."""
    if math.isnan(claim.value):
        return claim.verdict
    ends = "too few" if math.isnan(claim.ci_low) else f"{claim.ci_low:.2f}, {claim.ci_high:.2f}"
    number = f"{claim.value:.2f} [{ends}]".replace("-", "−")
    return f"**{claim.verdict}**, {number}"


def write(folder: Path, drawn: Mapping[str, plots.Figure]) -> None:
    """Writes page, data and picture of each figure into a folder, and the manifest; whole, or nothing."""
    files = [f"{name}.{kind}" for name in drawn for kind in KINDS]
    with TemporaryDirectory() as work:
        plots.write_figures({Path(work) / name: figure for name, figure in drawn.items()})
        if absent := [name for name in files if not (Path(work) / name).is_file()]:
            sys.exit(f"{', '.join(absent)} could not be drawn: install the export extra, or run it again.")
        for name in (*files, LIBRARY):
            shutil.copyfile(Path(work) / name, folder / name)
    write_json(
        folder / "manifest.json",
        {"ctlens": ctlens.__version__, "figures": {name: _hashes(folder, name) for name in drawn}},
    )


def stale(folder: Path, drawn: Mapping[str, plots.Figure]) -> list[str]:
    """Lists the files of a folder that are older than the code, a sentence each.

    A figure is fresh when its JSON is what was drawn just now, up to the rounding of another machine,
    and its page and picture are those that were written with it.
    """
    manifest = read_json(folder / "manifest.json")
    found = []
    if manifest["ctlens"] != ctlens.__version__:
        found.append(f"the gallery is of ctlens {manifest['ctlens']}, and this is {ctlens.__version__}")
    for name in sorted({*drawn, *manifest["figures"]}):
        if name not in drawn:
            found.append(f"{name} is drawn no more")
        elif name not in manifest["figures"]:
            found.append(f"{name} is missing")
        elif _hashes(folder, name) != manifest["figures"][name]:
            found.append(f"the files of {name} are not those that were written together")
        elif not same(read_json(folder / f"{name}.json"), json.loads(drawn[name].to_json() or "")):
            found.append(f"{name} is not what the code draws today")
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two parsed figures are equal, numbers up to rounding, however plotly has written them."""
    one = _numbers(one)
    other = _numbers(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(one) and math.isnan(other))
    return one == other


def _numbers(value: Any) -> Any:
    """An array that plotly has packed, as lists."""
    if not (isinstance(value, dict) and "bdata" in value):
        return value
    flat = np.frombuffer(b64decode(value["bdata"]), value["dtype"]).astype(float)
    return flat.reshape([int(size) for size in str(value.get("shape", flat.size)).split(",")]).tolist()


def _hashes(folder: Path, name: str) -> dict[str, str]:
    paths = {kind: folder / f"{name}.{kind}" for kind in KINDS}
    return {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in paths.items() if path.is_file()}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(Path(sys.argv[1]))
    write(HERE, drawings(DATA))
