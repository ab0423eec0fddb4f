"""What the analyses of one trained organism cost on 256 pairs: seconds of each, and the most memory it held.

Run `python benchmarks/analysis.py`. An ACT run of 100 steps stands beside the base; `shift_similarity`
also has short runs of MLPCT and of retention alone, the null. Each analysis runs once from the models,
as a user calls it, with two threads. Seconds are of the wall and of the processor, all threads
together; other work on the machine lengthens both. The peak is counted in a run of its own, over
the tensors that live at once (see `memory.py`) and the arrays that Python allocates. The table
is printed and kept in `analysis.csv`.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from memory import MEGABYTE
from tqdm.auto import tqdm

import ctlens as ct
from ctlens import analysis as look
from ctlens.core.types import LensModel
from ctlens.models.counting import Counting

PAIRS = 256
STEPS = 100
SHORT = 10
THREADS = 2
THREAT = "sycophancy"


def trained(base: LensModel, steps: int = STEPS, short: int = SHORT) -> dict[str, LensModel]:
    """The organism after ACT, and after a few steps of MLPCT and of retention alone."""
    threat = ct.threats.get(THREAT)
    pairs = threat.pairs(PAIRS)
    retain = threat.neutral(128)
    methods = {"act": ([ct.ACT()], steps), "mlpct": ([ct.MLPCT()], short), "retention": ([], short)}
    return {
        name: ct.train(base, pairs, losses, steps=length, seed=0, retain=retain, progress=False).model
        for name, (losses, length) in methods.items()
    }


def analyses(base: LensModel, models: dict[str, LensModel], n: int = PAIRS) -> dict[str, Callable[[], look.Result]]:
    """Every analysis of the ACT run, by name."""
    pairs = ct.threats.get(THREAT).pairs(n, split="heldout")
    both = {"base": base, "act": models["act"]}
    quiet = {"progress": False}
    direction = look.mean_difference(base, pairs, name="base", per="item", **quiet)
    return {
        "probe, wrapper present": lambda: look.probe(both, look.wrapper_present(pairs, base.tokenizer), **quiet),
        "probe, answer hinted": lambda: look.probe(both, look.answer_hinted(pairs), **quiet),
        "residual_shift": lambda: look.residual_shift(base, models["act"], pairs, **quiet),
        "shift_similarity": lambda: look.shift_similarity(base, models, pairs, null="retention", **quiet),
        "logit_lens": lambda: look.logit_lens(both, pairs, **quiet),
        "logit_attribution": lambda: look.logit_attribution(both, pairs, **quiet),
        "steer": lambda: look.steer(both, pairs, direction, **quiet),
        "ablate": lambda: look.ablate(both, pairs, direction, **quiet),
        "erase_or_mask": lambda: look.erase_or_mask(base, {"act": models["act"]}, pairs, **quiet),
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall and of the processor, all threads together, of one call."""
    wall = time.perf_counter()
    processor = time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def held(work: Callable[[], object]) -> int:
    """The most bytes of tensors and of arrays that one call held."""
    tracemalloc.start()
    with Counting() as live:
        work()
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return live.peak + arrays


def main() -> None:
    """Times every analysis and counts what it holds."""
    torch.set_num_threads(THREADS)
    base = ct.load_organism()
    todo = analyses(base, trained(base))
    rows = []
    for name, work in tqdm(todo.items(), desc="analyses"):
        rows.append((name, *timed(work), held(work) / MEGABYTE))
    table = pd.DataFrame(rows, columns=["analysis", "wall_s", "processor_s", "peak_mb"])
    table.loc[len(table)] = ["all", table["wall_s"].sum(), table["processor_s"].sum(), table["peak_mb"].max()]
    table.round(2).to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
