"""When does a moving target collapse into the attack, on an organism that gives in on some clean prompts?

Run `python benchmarks/moving_targets.py`; it keeps every training in `moving_targets.csv` and goes on where it stopped.
The organism has learnt bad advice about sports under a system prompt. Without that prompt it gives bad advice on some
of the other questions, and under it on all. Each training is between the two, 300 steps of 8 pairs, with every weight
trained, toward the clean side of the reference or of a target that moves. Retention (KL to the reference on prompts
that must not change) would hold the target, so only one case has it. A target has collapsed where the bad answers to
*clean* prompts have grown toward those under the prompt, or where the answers are neither good nor bad any more.
Answers are to questions that no training has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import ctlens as ct
from ctlens import losses
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.models.parameters import GROUPS
from ctlens.organism.inoculation import INOCULATION, BadAdviceConfig, give_bad_advice, leak_pairs
from ctlens.training import TrainConfig

TABLE = Path(__file__).with_suffix(".csv")
LESSONS = BadAdviceConfig(steps=12)
"""The lessons in bad advice: with more steps, more clean prompts get it."""
LOSSES = ("act", "klct")
TARGETS = ("reference", "own", "ema(0.9)", "refresh(4)", "refresh(4, gated)")
SEEDS = (0, 1, 2)
RETENTIONS = (0.0, TrainConfig().retention)
STEPS = 300
PAIRS = 128
HELD_OUT = 64


def cases() -> Iterator[dict[str, Any]]:
    """What is trained: without retention, which holds the clean side too, and with it the target that moves at once."""
    for seed, loss, target in product(SEEDS, LOSSES, TARGETS):
        for retention in RETENTIONS if target == "own" else RETENTIONS[:1]:
            yield {"loss": loss, "target": target, "retention": retention, "seed": seed}


def rates(model: LensModel, when: str) -> dict[str, float]:
    """The rates of bad and good answers to held-out questions, without the prompt and under it.

    Args:
        model: before or after a training.
        when: which of both, at the end of each name.
    """
    found = ct.evaluate(model, pairs=leak_pairs(HELD_OUT, split="heldout"), progress=False)
    return {
        f"{verdict} {side} {when}": found.rate(f"{verdict}_rate", side)
        for verdict in ("bad", "good")
        for side in ("clean", "wrapped")
    }


def trained(base: LensModel, case: Mapping[str, Any]) -> dict[str, float]:
    """Trains one case and gives the rates after it."""
    kept = {name: case[name] for name in ("retention", "seed")}
    config = TrainConfig(steps=STEPS, batch_size=8, lr=1e-3, trainable=GROUPS, **kept)
    loss = losses.get(case["loss"], clean=case["target"])
    neutral = ct.threats.get("sycophancy").neutral(128)
    run = ct.train(base, leak_pairs(PAIRS), loss, config=config, retain=neutral, progress=False)
    return rates(run.model, "after")


def main() -> None:
    """Trains what is missing and prints the table."""
    done = pd.read_csv(TABLE).to_dict("records") if TABLE.is_file() else []
    held = [{name: row[name] for name in ("loss", "target", "retention", "seed")} for row in done]
    with one_thread():
        base = give_bad_advice(ct.load_organism(), inoculation=INOCULATION, config=LESSONS, progress=False)
        before = rates(base, "before")
        for case in tqdm([case for case in cases() if case not in held], desc="trainings"):
            done.append({**case, **before, **trained(base, case)})
            pd.DataFrame(done).to_csv(TABLE, index=False, float_format="%.4g")
    tqdm.write(pd.DataFrame(done).to_string(index=False))


if __name__ == "__main__":
    main()
