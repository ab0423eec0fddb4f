"""The gallery: every figure here is drawn from the files in `data`, and a test draws them again.

`python figures/draw.py` draws anew from these data, and `python figures/draw.py runs` first takes them
from those studies that lie there; `make figures` runs the organism's studies and then that. The study of a real
chat model takes hours and has a command of its own, `make real`. What was drawn is
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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import audit_figures
import audited
import numpy as np
import pandas as pd
import rivals
import verbalisation

import ctlens
from ctlens import plots
from ctlens.analysis import ResidualShift, ShiftSimilarity, Transplant
from ctlens.analysis.outputs.gap_recovered import GAP_RECOVERED
from ctlens.core.files import write_json
from ctlens.core.reading import read_json
from ctlens.evaluation import Evaluation
from ctlens.study import figures as study_figures
from ctlens.study.analyses import SETTINGS
from ctlens.study.claims import Claim
from ctlens.study.claims.behaviour import TRANSFERS_FILE
from ctlens.study.conditions import CROSSED_CONDITIONS, DEFAULT_METHODS, FINE_TUNED, PERTURBED, RETENTION, SHAM
from ctlens.study.config import ANALYSED_THREATS
from ctlens.study.dose_response import DoseResult
from ctlens.study.inoculation import Leak
from ctlens.study.replication import ALL_MODELS, Replication, replicate
from ctlens.study.results import SPLIT, in_order, last_step, read_results

HERE = Path(__file__).parent
DATA = HERE / "data"
KINDS = ("json", "html", "png")
LIBRARY = "plotly.min.js"
SHOWN = (RETENTION, *DEFAULT_METHODS)
EXCHANGED = (*DEFAULT_METHODS, *CROSSED_CONDITIONS)
SIMILARITY = "-similarity.safetensors"
POOLED = ("bad_rate", "good_rate", "bad_rate_vs_retention", "share_repaired")
MECHANISM = ("repair", "shared", "shared_content", "left_later", "level", "distance", "attention")
BEHAVIOUR = ("repair", "output_only")
PUSHED = ("relearnt", "returns", "wrappers", "embeddings")


@dataclass(frozen=True)
class ShownStudy:
    """A study of the gallery.

    Attributes:
        folder: with its data, under `DATA` and under the folder of the runs.
        analysed: the threats whose models were compared inside.
        prefix: of the names of its figures.
    """

    folder: str
    analysed: tuple[str, ...]
    prefix: str = ""

    def taken(self) -> dict[str, str]:
        """What is taken from the study: the file under `DATA`, and where it lies under the folder of the runs."""
        found = {name: name for name in ("results.csv", "claims.csv", "base.csv", TRANSFERS_FILE)}
        for threat in self.analysed:
            analyses = f"analyses/{threat}"
            found[f"{threat}{SIMILARITY}"] = f"{analyses}/similarity/similarity.safetensors"
            for name in EXCHANGED:
                found[f"{threat}-transplant-{name}.safetensors"] = f"{analyses}/transplant-seed0/{name}.safetensors"
        for name in SHOWN:
            residual = f"runs/{self.analysed[0]}-{name}-seed0/residual.safetensors"
            found[f"{self.analysed[0]}-residual-{name}.safetensors"] = residual
        return {f"{self.folder}/{name}": f"{self.folder}/{source}" for name, source in found.items()}

    def drawings(self, data: Path) -> Iterator[tuple[str, plots.Figure]]:
        """Draws the figures of the study from `DATA` or a folder like it, each with its name."""
        own = data / self.folder
        results = read_results(own / "results.csv")
        for threat in self.analysed:
            for name, figure in _inside(own, results, threat):
                yield f"{self.prefix}{name}", plots.placed(figure, threat)
        yield f"{self.prefix}cross-threat", study_figures.cross_threat_figure(pd.read_csv(own / TRANSFERS_FILE))
        yield f"{self.prefix}attack-strength", Evaluation.load(own / "base.csv").strength_figure()
        first = self.analysed[0]
        shifts = {name: ResidualShift.load(own / f"{first}-residual-{name}.safetensors") for name in SHOWN}
        words = study_figures.prompts_in_words(int(shifts[RETENTION].to_dataframe()["n_pairs"].max()))
        compared = shifts[RETENTION].compare(shifts, label=RETENTION, subtitle=words)
        yield f"{self.prefix}{first}-residual-last", plots.placed(compared, first)


@dataclass(frozen=True)
class ShownReplication:
    """The studies of several organisms in the gallery, pooled.

    Attributes:
        folder: with a folder per recipe, in it a study per organism, under `DATA` and under the folder of the runs.
        analysed: the threats whose models were compared inside, which have figures.
    """

    folder: str
    analysed: tuple[str, ...] = ()

    def studies(self, root: Path) -> list[Path]:
        """The folders of the studies under a root."""
        return sorted(path.parent for path in (root / self.folder).glob("*/*/claims.csv"))

    def take(self, runs: Path) -> None:
        """Copies what is pooled from the studies of a folder of runs: config, claims, and rates at the last step."""
        for study in self.studies(runs):
            held = DATA / study.relative_to(runs)
            held.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "claims.csv"):
                shutil.copyfile(study / name, held / name)
            results = last_step(read_results(study / "results.csv"))
            results[results["metric"].isin(POOLED)].to_csv(held / "results.csv", index=False)

    def drawings(self, data: Path) -> Iterator[tuple[str, plots.Figure]]:
        """Draws the figures of the replication, each with its name."""
        found = replicate(self.studies(data))
        for threat in self.analysed:
            yield f"{threat}-replicated", found.figure(threat, SETTINGS[0], MECHANISM)
            pushed = [f"{kind}_{method}" for kind in PUSHED for method in DEFAULT_METHODS]
            yield f"{threat}-replicated-pushed", found.figure(threat, SETTINGS[0], pushed)


REPLICATION = ShownReplication("replication", ANALYSED_THREATS)
OTHER_THREATS = ShownReplication("other-threats")
"""The studies of several organisms, of the two threats whose models are analysed and of the four others."""
REAL_RIVALS = "real-rivals"
"""The folder of the study of the methods of the field on a real chat model, under the folder of the runs."""
REAL_THREAT = "facts"
"""The threat against which the models were trained that are compared inside."""
TIMES = HERE.parent / "benchmarks" / "choose_rivals.csv"
STUDIES = (ShownStudy("study", ANALYSED_THREATS), ShownStudy("real", (REAL_THREAT,), "real-"))
"""The study of the organism, and that of a real chat model."""
TAKEN = {
    "doses.csv": "doses/doses.csv",
    "leak.csv": "leak/leak.csv",
    **{name: source for study in STUDIES for name, source in study.taken().items()},
}


def drawings(data: Path) -> dict[str, plots.Figure]:
    """The figures of the gallery by name, drawn by today's code from the data in a folder."""
    doses = DoseResult(data, pd.read_csv(data / "doses.csv", keep_default_na=False))
    return {
        **{name: figure for study in (*STUDIES, REPLICATION) for name, figure in study.drawings(data)},
        "doses-pairs": doses.figure("pairs"),
        "doses-steps": doses.figure("steps"),
        "leak": Leak(pd.read_csv(data / "leak.csv"), {}).figure(),
        rivals.FOLDER: rivals.Rivals(data / rivals.FOLDER, TIMES).figure(),
        **dict(audit_figures.figures(audited.Audited(data / audited.DATA.name))),
        verbalisation.FOLDER: verbalisation.Verbalised(data / verbalisation.FOLDER).figure(),
    }


def take(runs: Path) -> None:
    """Copies what the gallery shows from those studies that lie in a folder of runs, of each all or none."""
    for name, source in TAKEN.items():
        if not (runs / Path(source).parts[0]).is_dir():
            continue
        (DATA / name).parent.mkdir(exist_ok=True)
        if name.endswith(SIMILARITY):  # every seed and condition by every other, at every layer
            _shown(ShiftSimilarity.load(runs / source)).save(DATA / name)
        else:
            shutil.copyfile(runs / source, DATA / name)
    for replication in (REPLICATION, OTHER_THREATS):
        replication.take(runs)
    if (runs / REAL_RIVALS).is_dir():
        results = last_step(read_results(runs / REAL_RIVALS / "results.csv"))
        kept = results["metric"].isin(("bad_rate", "good_rate", GAP_RECOVERED)) & results["condition"].isin(
            (*rivals.FIELD, "klct_sharp")
        )
        results[kept & (results["seed"] == 0)].to_csv(DATA / "real" / "rivals.csv", index=False)
        found = rivals.inside(runs / REAL_RIVALS, (REAL_THREAT,))
        found.to_csv(DATA / "real" / "rivals-inside.csv", index=False, float_format="%.5g")
    if (runs / rivals.FOLDER).is_dir():
        rivals.take(runs / rivals.FOLDER, DATA / rivals.FOLDER)


def _shown(found: ShiftSimilarity) -> ShiftSimilarity:
    """The methods that the figure shows, with the floor; a control that moved nothing was not compared."""
    return found.among([name for name in (SHAM, *SHOWN) if name in found.methods])


def _inside(data: Path, results: pd.DataFrame, threat: str) -> Iterator[tuple[str, plots.Figure]]:
    """Draws the changes inside the models trained on one threat."""
    transplants = {name: Transplant.load(data / f"{threat}-transplant-{name}.safetensors") for name in EXCHANGED}
    words = study_figures.prompts_in_words(transplants[EXCHANGED[0]].n_pairs)
    shares = results[results["trained_threat"] == threat]
    yield f"{threat}-gap-dose", study_figures.gap_figure(shares, DEFAULT_METHODS, words)
    yield f"{threat}-similarity", _shown(ShiftSimilarity.load(data / f"{threat}{SIMILARITY}")).figure()
    first = EXCHANGED[0]
    subtitle = f"source: a trained model, target: the base; {words}"
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


def compared_table(claims: Mapping[str, Sequence[Claim]]) -> str:
    """Writes the claims of several studies side by side as a Markdown table, a row per claim and setting.

    Args:
        claims: by the name of the study.
    """
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for study, found in claims.items():
        for claim in found:
            row = rows.setdefault((claim.statement, claim.setting), {name: [] for name in claims})
            row[study].append(f"{claim.threat}: {_verdict(claim)}")
    lines = [f"| claim | setting | {' | '.join(claims)} |", "|---|---|" + "---|" * len(claims)]
    for (statement, setting), by_study in rows.items():
        cells = " | ".join("<br>".join(verdicts) or "–" for verdicts in by_study.values())
        lines.append(f"| {statement[0].upper()}{statement[1:]} | {setting} | {cells} |")
    return "\n".join(lines)


def _verdict(claim: Claim) -> str:
    """The verdict on a claim, with its number and interval where there is one."""
    return _judged(claim.verdict, claim.value, claim.ci_low, claim.ci_high)


def _judged(verdict: str, value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return verdict
    ends = "too few" if math.isnan(low) else f"{low:.2f}, {high:.2f}"
    return f"**{verdict}**, {value:.2f} [{ends}]".replace("-", "−")


def replicated_table(found: Replication, keys: Sequence[str] = MECHANISM) -> str:
    """Writes pooled claims that are not about one method as a Markdown table, a row per claim and case."""
    groups = [ALL_MODELS, *found.groups]
    lines = [f"| claim | threat | setting | {' | '.join(groups)} |", "|---|---|---|" + "---|" * len(groups)]
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in found.to_dataframe().to_dict("records"):
        if row["key"] in keys:
            case = (row["statement"], row["threat"], row["setting"])
            rows.setdefault(case, {})[row["group"]] = _pooled_verdict(row)
    for (statement, threat, setting), cells in rows.items():
        told = " | ".join(cells.get(group, "–") for group in groups)
        lines.append(f"| {statement[0].upper()}{statement[1:]} | {threat} | {setting} | {told} |")
    return "\n".join(lines)


def by_method_table(found: Replication, kinds: Sequence[str]) -> str:
    """Writes the pooled claims about each method as a Markdown table, a row per kind and threat, over all models."""
    lines = [f"| claim | threat | {' | '.join(map(plots.label, DEFAULT_METHODS))} |"]
    lines.append("|---|---|" + "---|" * len(DEFAULT_METHODS))
    table = found.to_dataframe().query("group == @ALL_MODELS").set_index(["key", "threat"])
    for kind in kinds:
        for threat in ANALYSED_THREATS:
            rows = {method: table.loc[(f"{kind}_{method}", threat)] for method in DEFAULT_METHODS}
            first = DEFAULT_METHODS[0]
            statement = rows[first]["statement"].replace(plots.label(first), "training")
            told = " | ".join(_pooled_verdict(row) for row in rows.values())
            lines.append(f"| {statement[0].upper()}{statement[1:]} | {threat} | {told} |")
    return "\n".join(lines)


def _pooled_verdict(row: Mapping[Any, Any]) -> str:
    """The verdict on a pooled claim, its number and interval, and on how many of the models it holds alone."""
    told = _judged(row["verdict"], row["value"], row["ci_low"], row["ci_high"])
    return f"{told}; {row['holds']} of {row['n']}" if row["n"] else told


def pooled_rates_table(
    found: Replication,
    metric: str,
    split: str = SPLIT,
    prompt_side: str = "wrapped",
    groups: Sequence[str] | None = None,
) -> str:
    """Writes a number of every method on its own threat, pooled over models, as a Markdown table.

    Args:
        found: the studies.
        metric, split, prompt_side: as of `Replication.rates`.
        groups: of the studies that have rows; by default all together, and each.
    """
    rates = found.rates(metric, split, prompt_side).set_index(["threat", "group", "condition"])
    # Of the fine-tuning on other data the sham stands there, which moves as far as the methods.
    conditions = in_order(set(rates.index.get_level_values("condition")) - {FINE_TUNED})
    lines = [
        f"| threat | organisms | {' | '.join(map(plots.label, conditions))} |",
        "|---|---|" + "---|" * len(conditions),
    ]
    for threat in dict.fromkeys(rates.index.get_level_values("threat")):
        for group in groups or (ALL_MODELS, *found.groups):
            told = []
            for condition in conditions:
                row = rates.loc[(threat, group, condition)]
                ends = "too few" if math.isnan(row["ci_low"]) else f"{row['ci_low']:.0%}, {row['ci_high']:.0%}"
                told.append(f"{row['value']:.0%} [{ends}]".replace("-", "−"))
            lines.append(f"| {threat} | {group} | {' | '.join(told)} |")
    return "\n".join(lines)


def one_seed_table(results: pd.DataFrame, threat: str) -> str:
    """Writes what each condition of the first seed does to a threat as a Markdown table, with its intervals.

    Args:
        results: of trainings at their last step.
        threat: trained on, and asked.
    """
    own = results.query("trained_threat == @threat == evaluated_threat and seed == 0")
    numbers = own.set_index(["condition", "metric", "split", "prompt_side"])[["value", "ci_low", "ci_high"]]
    heads = {
        "bad": ("bad_rate", SPLIT, "wrapped"),
        "bad, new structure": ("bad_rate", "structure", "wrapped"),
        "share of the gap": (GAP_RECOVERED, SPLIT, "wrapped"),
        "clean right": ("good_rate", SPLIT, "clean"),
    }
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for condition in in_order(set(own["condition"]) - {PERTURBED}):
        cells = []
        for case in heads.values():
            if (condition, *case) not in numbers.index or (condition, case[0]) == (RETENTION, GAP_RECOVERED):
                cells.append("–")
                continue
            value, low, high = numbers.loc[(condition, *case)]
            if case[0] == GAP_RECOVERED:
                cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−"))
            else:
                cells.append(f"{value:.0%} [{100 * low:.0f}–{100 * high:.0f}]")
        lines.append(f"| {plots.label(condition)} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
