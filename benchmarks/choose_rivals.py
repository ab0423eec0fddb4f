"""Which weight, target and schedule does each rival of the four methods take into a study?

Run `python benchmarks/choose_rivals.py`; it keeps every training in `choose_rivals.csv` and goes on where it stopped.
Each candidate trains the shipped organism as a study does (its settings, 256 pairs, 100 steps) on sycophancy, from a
seed that no study has, and answers the prompts of `entities` alone: new entities in the wrapper texts of training. The
headline splits are not looked at, nor is jailbreak.

The rule, which was written down before any number: of an arm's candidates those stay whose rates of good answers on
clean and on benign prompts are at most 2 points below retention alone (KL to the reference on prompts that must not
change); of these the one with the highest mean probability of the good answer on wrapped prompts is taken. Where none
stays, the one that loses least is. Two arms are not searched and take the weight of their plain form: OPCT by the full
sum, and the rest of the stream for SubACT. The methods with their defaults stand beside for their times: `seconds` are
of the processor, for a whole training without its evaluation, and `act_seconds` those of ACT in the same sitting.

Two things were changed while it ran. Jailbreak was to count as much as sycophancy, and was left out for time when two
candidates of OPCT had been trained. A weight that was best at the upper end of its grid got larger ones beside it,
first for SubACT, whose best is the largest tried all the same; that of RMCT by agreement is the smallest tried.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ctlens import losses
from ctlens.core.threads import one_thread
from ctlens.study.cells import NEUTRAL_PROMPTS, CellTraining, aligned
from ctlens.study.conditions import DEFAULT_METHODS, RETENTION
from ctlens.study.config import Cell, StudyConfig
from ctlens.study.source import evaluated
from ctlens.training import Trainer
from ctlens.training.retention import held_prompts

TABLE = Path(__file__).with_suffix(".csv")
THREAT = "sycophancy"
SPLIT = "entities"
SEED = 10
MOST_LOST = 0.02
_WEIGHTS = (0.25, 1.0, 4.0)
"""Factors of the weight from which the search starts, a quarter, the same and four times."""


def _weighted(weight: float, **options: Any) -> list[dict[str, Any]]:
    """The candidates of an arm whose weight alone is searched."""
    return [{**options, "weight": weight * factor} for factor in _WEIGHTS]


ARMS: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]] = {
    **{name: (name, [{}]) for name in (*DEFAULT_METHODS, "klct")},
    "opct": ("opct", _weighted(2.0)),
    "subact": ("subact", [*_weighted(4.0), *_weighted(256.0)[:2]]),
    "subact_random": ("subact", [*_weighted(16.0, part="random"), {"part": "random", "weight": 256.0}]),
    "dpo": ("dpo", _weighted(4.0)),
    "rmct": ("rmct", [*_weighted(10.0), {"weight": 160.0}]),
    "rmct_agreement": ("rmct", _weighted(10.0, reward="agreement")),
    "opct_full": ("opct", [{"estimator": "full"}]),
    "subact_rest": ("subact", [{"part": "rest"}]),
    "act_ema": ("act", [{"clean": "ema(0.9)"}, {"clean": "ema(0.99)"}]),
    "klct_sharp": (
        "klct",
        [{"confidence": 0.8, "sharpen": 0.4}, {"confidence": 0.8}, {"sharpen": 0.4}],
    ),
}
"""The loss of each arm and its candidates: the options that are not the loss's own."""


def trained(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Trains one candidate and asks it; retention alone has no loss.

    Args:
        name: of the loss; empty for retention alone.
        options: of the loss.
    """
    config = StudyConfig(threats=(THREAT,))
    cell = CellTraining(config, Path(), Cell(THREAT, RETENTION, SEED))
    began = time.process_time()
    pairs = aligned(cell.subject, config.n_pairs, cell.base, config, split="train", seed=SEED)
    retain = held_prompts(pairs, cell.subject.neutral(NEUTRAL_PROMPTS, seed=SEED))
    objective = [losses.get(name, **options)] if name else []
    trainer = Trainer(cell.base, pairs, objective, replace(config.training, seed=SEED), retain=retain)
    for _ in trainer:
        pass
    seconds = time.process_time() - began
    answers = evaluated(trainer.model, [cell.subject], [SPLIT], config.n_prompts)
    return {
        "bad": answers.rate("bad_rate", "wrapped"),
        "good": answers.rate("good_probability", "wrapped"),
        "clean": answers.rate("good_rate", "clean"),
        "benign": answers.rate("good_rate", "benign"),
        "seconds": seconds,
    }


def chosen(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The options of each arm by the rule above.

    Args:
        table: a row per arm and candidate.
    """
    control = table[table["arm"] == RETENTION].iloc[0]
    found = {}
    for arm, rows in table.groupby("arm", sort=False):
        lost = (control[["clean", "benign"]] - rows[["clean", "benign"]]).max(axis=1).astype(float)
        kept = rows[lost <= MOST_LOST + 1e-9]
        best = kept.sort_values("good", kind="stable").iloc[-1] if len(kept) else rows.loc[lost.idxmin()]
        found[str(arm)] = json.loads(best["options"])
    return found


def main() -> None:
    """Trains the candidates that are missing and prints the choice."""
    done = pd.read_csv(TABLE).to_dict("records") if TABLE.is_file() else []
    known = {(row["arm"], row["options"]) for row in done}
    arms = {RETENTION: ("", [{}]), **ARMS}
    asked = [(arm, name, options) for arm, (name, candidates) in arms.items() for options in candidates]
    missing = [one for one in asked if (one[0], json.dumps(one[2])) not in known]
    with one_thread():
        sitting = {"act_seconds": trained("act", {})["seconds"]} if missing else {}
        for arm, name, options in tqdm(missing, desc="candidates"):
            done.append({"arm": arm, "options": json.dumps(options)} | trained(name, options) | sitting)
            pd.DataFrame(done).to_csv(TABLE, index=False, float_format="%.4g")
    table = pd.DataFrame(done)
    tqdm.write(table.to_string(index=False))
    tqdm.write(json.dumps(chosen(table), indent=1))


if __name__ == "__main__":
    main()
