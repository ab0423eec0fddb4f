"""The methods of the field in the gallery: what each repairs, what it costs, and where its repair sits.

What the tables of their study do not hold is computed from its models here: how far the answers to prompts drift that
must not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis import CrossLoss, ShiftSimilarity, Transplant
from ctlens.analysis.base.metrics import SMALLEST_GAPS
from ctlens.analysis.base.positions import STATE_POSITIONS
from ctlens.analysis.base.result import groups_of
from ctlens.analysis.exchange.exchange import EXCHANGE_QUANTITIES
from ctlens.analysis.residual.shift_vectors import SHIFT_PARTS
from ctlens.core.clusters import Clusters, clustered_mean, clustered_ratio
from ctlens.core.config import from_dict
from ctlens.core.rates import NOT_MEASURED, Rate
from ctlens.core.reading import read_json
from ctlens.core.stats import student
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.data.pairs import Prompt
from ctlens.losses.distances import kl_divergence
from ctlens.models.hooks import run
from ctlens.study.analyses import SETTINGS, Analysis
from ctlens.study.cells import base_model, finished_model
from ctlens.study.conditions import DEFAULT_METHODS, RETENTION
from ctlens.study.config import ANALYSED_THREATS, StudyConfig
from ctlens.study.results import SEVERAL, SPLIT, by_threat, in_order, last_step, read_results
from ctlens.study.source import subject

FOLDER = "rivals"
FIELD = ("opct", "opct_full", "subact", "subact_random", "subact_rest", "dpo", "rmct", "rmct_agreement", "act_ema")
"""The methods of the field that the study has beside the four, without KLCT and its sharpened form."""
COMPARED = (*DEFAULT_METHODS, "klct", *FIELD, "klct_sharp")
MUST_NOT_CHANGE = ("clean", "benign")
KEPT = ("bad_rate", "good_rate", "bad_rate_vs_retention", "gap_recovered")
Numbers = tuple[float, float, float]


def take(study: Path, held: Path) -> None:
    """Writes what the gallery shows of a study: rates at the last step, the drift, and what analyses found.

    Args:
        study: its folder.
        held: where the tables go.
    """
    described = read_json(study / "config.json")
    fields = StudyConfig.__dataclass_fields__
    config = from_dict(StudyConfig, {name: value for name, value in described.items() if name in fields})
    held.mkdir(parents=True, exist_ok=True)
    results = last_step(read_results(study / "results.csv"))
    results[results["metric"].isin(KEPT)].to_csv(held / "results.csv", index=False, float_format="%.5g")
    with one_thread():
        drifts = [row for threat in config.threats for row in _drifts(config, study, threat)]
    pd.DataFrame(drifts).to_csv(held / "drift.csv", index=False, float_format="%.5g")
    inside(study, config.analysed_threats).to_csv(held / "inside.csv", index=False, float_format="%.5g")


def inside(study: Path, threats: Sequence[str]) -> pd.DataFrame:
    """What the analyses of a study found of each condition at the first seed, a row per number.

    Args:
        study: its folder.
        threats: trained on, whose models were compared inside.
    """
    return pd.DataFrame(
        [
            {"threat": threat, "setting": setting, **row}
            for threat, setting in product(threats, SETTINGS)
            for row in _inside(study, threat, setting)
        ]
    )


def _drifts(config: StudyConfig, study: Path, threat: str) -> Iterator[dict[str, Any]]:
    """The drift of every model that was trained on a threat and is there, a row per prompt side."""
    base = base_model(config)
    pairs = subject(threat).pairs(config.n_prompts, split=SPLIT)
    groups = Clusters.of({kind: numbers.tolist() for kind, numbers in groups_of(pairs).items()})
    sides = {"clean": [pair.clean for pair in pairs], "benign": [pair.benign or pair.clean for pair in pairs]}
    before = {side: last_logits(base, prompts) for side, prompts in sides.items()}
    for cell in config.cells():
        if cell.threat != threat or not cell.path(study).is_dir():
            continue
        model = finished_model(config, base, cell.path(study))
        for side, prompts in sides.items():
            nats = kl_divergence(before[side], last_logits(model, prompts)).numpy()
            value, low, high = clustered_mean(nats, groups)
            numbers = {"value": float(value), "ci_low": float(low), "ci_high": float(high)}
            yield {"threat": threat, "condition": cell.condition, "seed": cell.seed, "prompt_side": side, **numbers}


@torch.no_grad()
def last_logits(model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, "prompt d_vocab"]:
    """The logits behind each prompt; those of one length run together."""
    by_length: dict[int, list[int]] = {}
    ids = [render(model.tokenizer, prompt.turns).ids for prompt in prompts]
    for number, of_prompt in enumerate(ids):
        by_length.setdefault(len(of_prompt), []).append(number)
    found = torch.zeros(len(prompts), model.cfg.d_vocab)
    for numbers in by_length.values():
        found[numbers] = run(model, torch.tensor([ids[number] for number in numbers]))[:, -1]
    return found


def _inside(study: Path, threat: str, setting: str) -> Iterator[dict[str, Any]]:
    """The rows of `inside` of one threat and setting."""
    similar = Analysis("similarity", threat, setting).load(study, ShiftSimilarity)
    for other in ("act", "bct"):
        if found := similar.get("similarity"):
            yield from _rows(f"like {other}", _alike(found, other))
    transplants = Analysis("transplant", threat, setting).load(study, Transplant)
    for quantity in EXCHANGE_QUANTITIES:
        yield from _rows(quantity, {name: _moved(found, quantity) for name, found in transplants.items()})
    crossed = Analysis("cross-loss", threat, setting).load(study, CrossLoss) if setting == SETTINGS[0] else {}
    for found in crossed.values():
        table = found.to_dataframe().query("hook_name == ''")
        for loss in ("act", "attct"):
            rows = table[table["loss"] == loss].set_index("model")
            numbers = rows[["relative", "relative_low", "relative_high"]].T.to_dict("list")
            yield from _rows(f"{loss} left", {str(name): tuple(found) for name, found in numbers.items()})


def _rows(quantity: str, found: Mapping[str, Numbers]) -> Iterator[dict[str, Any]]:
    for name in in_order(found):
        value, low, high = found[name]
        yield {"quantity": quantity, "condition": name, "value": value, "ci_low": low, "ci_high": high}


def _alike(found: ShiftSimilarity, other: str) -> dict[str, Numbers]:
    """The cosine of each method's shift with that of another one, off the gap, at the last token, mean over layers."""
    if other not in found.methods:
        return {}
    values = found.by_prompt[SHIFT_PARTS.index("off"), STATE_POSITIONS.index("last")].mean(0)
    mean = clustered_mean(values[:, :, found.methods.index(other)], found.clusters())
    return {name: tuple(float(ends[at]) for ends in mean) for at, name in enumerate(found.methods) if name != other}


def _moved(found: Transplant, quantity: str) -> Numbers:
    """The share of the effect that moves with the stream of the first quarter's layer at the last token.

    It is the number of the claims on transplants; NaN where the effect is too small to have shares.
    """
    at = EXCHANGE_QUANTITIES.index(quantity)
    moved = found.values[at, 0, len(found.layers) // 4, found.positions.index("last")] - found.unpatched[at, 0]
    effect = found.source[at, 0] - found.unpatched[at, 0]
    if found.effect().mean() < SMALLEST_GAPS["logit_diff"]:
        return np.nan, np.nan, np.nan
    value, low, high = clustered_ratio(moved, effect, found.clusters())
    return float(value), float(low), float(high)


def over_seeds(rows: pd.DataFrame) -> Numbers:
    """The mean of a number over trainings; its interval spans that over prompts and, of several, that over trainings.

    Args:
        rows: with `value`, `ci_low` and `ci_high`, one per training.
    """
    value, low, high = rows[["value", "ci_low", "ci_high"]].mean()
    if len(rows) >= SEVERAL:
        ends = student(rows["value"].to_numpy())
        low = np.minimum(low, ends[0])
        high = np.maximum(high, ends[1])
    return float(value), float(low), float(high)


class Rivals:
    """The tables of the study, read from a folder.

    Args:
        held: the folder that `take` wrote.
        times: `benchmarks/choose_rivals.csv`, with the processor's seconds of a training and those of ACT's.
    """

    def __init__(self, held: Path, times: Path) -> None:
        self.results = read_results(held / "results.csv")
        self.drift = pd.read_csv(held / "drift.csv")
        self.inside = pd.read_csv(held / "inside.csv")
        timed = pd.read_csv(times).drop_duplicates("arm").set_index("arm")
        self.times = timed["seconds"] / timed["act_seconds"]

    def fall(self, threat: str, condition: str, split: str = SPLIT) -> Numbers:
        """How far the bad rate on wrapped prompts falls below that of retention alone."""
        rows = self._of(self.results, threat, condition).query("metric == 'bad_rate_vs_retention' and split == @split")
        value, low, high = over_seeds(rows)
        return -value, -high, -low

    def drifted(self, threat: str, condition: str, side: str) -> Numbers:
        """How far the answers to the prompts of a side drift, in nats."""
        return over_seeds(self.drift.query("threat == @threat and condition == @condition and prompt_side == @side"))

    def time(self, condition: str) -> float:
        """The time of a training over that of ACT's, on sycophancy."""
        return float(self.times.get(condition, np.nan))

    def figure(self) -> plots.Figure:
        """Draws what each method repairs against what it costs: a panel per threat, and one for the time."""
        panels = {}
        for threat in ANALYSED_THREATS:
            gained = _curve([self.fall(threat, name) for name in COMPARED])
            drifts = [np.mean([self.drifted(threat, name, side) for side in MUST_NOT_CHANGE], 0) for name in COMPARED]
            panels[f"{threat}: drift"] = plots.TradeoffPanel(COMPARED, gained, _curve(drifts), "drift, nats")
        timed = tuple(name for name in COMPARED if name in self.times)
        times = [(self.time(name),) * 3 for name in timed]
        gained = _curve([self.fall(ANALYSED_THREATS[0], name) for name in timed])
        panels[f"{ANALYSED_THREATS[0]}: time"] = plots.TradeoffPanel(timed, gained, _curve(times), "time over ACT's")
        return plots.tradeoff(
            panels,
            "What does each method repair, and what does it cost?",
            x_title="fall of the bad rate against retention alone",
            caption="Drift is the KL of the base's first answer token from the trained model's, a mean over clean and "
            "benign prompts, which must not change; time is the processor's, for a whole training. Whiskers are 95% "
            "intervals over prompts and trainings.",
            subtitle=f"the shipped organism, {self.seeds} seeds, new entities in new wrapper texts",
        )

    @property
    def seeds(self) -> int:
        """The seeds of every method."""
        return int(self.results["seed"].nunique())

    def rates_table(self) -> str:
        """Writes what each method repairs and what it costs as a Markdown table."""
        columns = [
            f"{threat}, {where}" for threat in ANALYSED_THREATS for where in ("bad", "bad, new structure", "drift")
        ]
        lines = [f"| method | {' | '.join(columns)} | time |", "|---|" + "---|" * (len(columns) + 1)]
        for name in (RETENTION, *COMPARED):
            cells = []
            for threat in ANALYSED_THREATS:
                cells += [str(self.bad(threat, name, split)) for split in (SPLIT, "structure")]
                cells.append(f"{np.mean([self.drifted(threat, name, side)[0] for side in MUST_NOT_CHANGE]):.3f}")
            time = self.time(name)
            told = "–" if np.isnan(time) else f"{time:.1f}"
            lines.append(f"| {plots.label(name)} | {' | '.join(cells)} | {told} |")
        return "\n".join(lines)

    def bad(self, threat: str, condition: str, split: str = SPLIT) -> Rate:
        """The bad rate on wrapped prompts."""
        found = by_threat(self.results, split)[threat]
        return found[condition].rate("bad_rate", "wrapped") if condition in found else NOT_MEASURED

    def inside_table(self, threat: str) -> str:
        """Writes where the repairs of a threat sit as a Markdown table, at equal steps and at a matched effect."""
        return inside_table(self.inside.query("threat == @threat"), SETTINGS)

    def number(self, threat: str, setting: str, quantity: str, condition: str) -> Numbers | None:
        """What an analysis found of a condition; None where it was not measured."""
        return _number(self.inside.query("threat == @threat"), setting, quantity, condition)

    def _of(self, table: pd.DataFrame, threat: str, condition: str) -> pd.DataFrame:
        return table.query("trained_threat == @threat == evaluated_threat and condition == @condition")


def inside_table(rows: pd.DataFrame, settings: Sequence[str]) -> str:
    """Writes where repairs sit as a Markdown table, a row per method that was compared.

    Args:
        rows: of `inside`, of one threat.
        settings: of which the numbers are written.
    """
    quantities = ("like act", "like bct", "lost")
    heads = [f"{words}, {setting}" for setting in settings for words in ("like ACT", "like BCT", "lost")]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in [name for name in COMPARED if name in set(rows["condition"])]:
        cells = [_told(_number(rows, setting, kind, name)) for setting in settings for kind in quantities]
        lines.append(f"| {plots.label(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(rows: pd.DataFrame, setting: str, quantity: str, condition: str) -> Numbers | None:
    found = rows.query("setting == @setting and quantity == @quantity and condition == @condition")
    return tuple(found.iloc[0][["value", "ci_low", "ci_high"]].tolist()) if len(found) else None


def _curve(numbers: Sequence[Sequence[float]]) -> plots.Curve:
    """Numbers with their intervals as three arrays."""
    value, low, high = np.array(numbers, dtype=float).T
    return value, low, high


def _told(numbers: Numbers | None) -> str:
    if numbers is None or np.isnan(numbers[0]):
        return "–"
    return f"{numbers[0]:.2f} [{numbers[1]:.2f}, {numbers[2]:.2f}]".replace("-", "−")


def moving_table(rows: pd.DataFrame) -> str:
    """Writes the rates after the trainings toward each clean side as a Markdown table, those before them first.

    Args:
        rows: of `benchmarks/moving_targets.csv`, a training each.
    """
    lines = [
        "| loss | clean side | retention | bad, clean prompts | good | bad, under the prompt | good |",
        "|---|---|---|---|---|---|---|",
    ]
    lines.append(f"| before | – | – | {' | '.join(_over_trainings(rows, 'before'))} |")
    for (loss, target, retention), of in rows.groupby(["loss", "target", "retention"], sort=False):
        rates = " | ".join(_over_trainings(of, "after"))
        lines.append(f"| {plots.label(loss)} | {target} | {retention:g} | {rates} |")
    return "\n".join(lines)


def _over_trainings(rows: pd.DataFrame, when: str) -> list[str]:
    """The mean of each rate over the trainings, and the lowest and highest where they are not the same."""
    found = []
    for side, verdict in product(("clean", "wrapped"), ("bad", "good")):
        rates = rows[f"{verdict} {side} {when}"]
        ends = [f"{100 * rate:.0f}" for rate in (rates.min(), rates.max())]
        found.append(f"{rates.mean():.0%}" + ("" if ends[0] == ends[1] else f" ({'–'.join(ends)})"))
    return found
