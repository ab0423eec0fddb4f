"""What the analyses of one trained organism cost on 256 pairs: each alone, and all of them together.

Run `python benchmarks/analysis.py`. An ACT run of 100 steps stands beside the base; `shift_similarity`
also has short runs of MLPCT and of retention alone, the null. Each analysis runs alone from the models, as a user
calls it, and then all of them run together: every prompt is rendered once, what only reads is read off one recording
of each model, and `erase_or_mask` takes the probes and the directions that are there.

With `--against FOLDER`, another checkout whose `benchmarks/analysis.py` has the same functions (and whose `.venv` is
used if it has one) runs the same analyses in a process beside this one, in turns. `ratio` is its processor time over
ours; of all together, it is the sum of its analyses alone over ours together.

Seconds are medians of `--rounds`, of the wall and of the processor on one thread; other work on the machine lengthens
both. The peak is counted in a run of its own, over the tensors that live at once (see `memory.py`) and the arrays that
Python allocates. The table is printed and kept in `analysis.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

import pandas as pd
import torch
from memory import MEGABYTE
from tqdm.auto import tqdm

import ctlens as ct
from ctlens import analysis as look
from ctlens.analysis.outputs.logit_lens import ATTRIBUTION_SITES
from ctlens.analysis.probing.tasks import Task
from ctlens.core.keeping import keeping
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.models.counting import Counting

PAIRS = 256
STEPS = 100
SHORT = 10
THREADS = 1
THREAT = "sycophancy"
ALONE = "all, each alone"
TOGETHER = "all, together"
QUIET: dict[str, Any] = {"progress": False}
SERVER = f"""
import json, sys
sys.path.insert(0, sys.argv[1] + "/benchmarks")
import analysis, ctlens, torch
torch.set_num_threads({THREADS})
base = ctlens.load_organism()
models = analysis.trained(base)
todo = analysis.analyses(base, models)
if hasattr(analysis, "together"):
    todo["{TOGETHER}"] = lambda: analysis.together(base, models)
print(json.dumps(list(todo)), flush=True)
for name in sys.stdin:
    print(json.dumps(analysis.timed(todo[name.strip()])), flush=True)
"""
"""Runs the analyses of a checkout as their names come in; it asks no more of it than what it had in 0.1."""


def trained(base: LensModel, steps: int = STEPS, short: int = SHORT) -> dict[str, LensModel]:
    """The organism after ACT, and after a few steps of MLPCT and of retention alone."""
    threat = ct.threats.get(THREAT)
    pairs = threat.pairs(PAIRS)
    retain = threat.neutral(128)
    config = ct.TrainConfig(batch_size=32, lr=5e-4, trainable=("attn", "mlp"))
    methods = {"act": ([ct.ACT()], steps), "mlpct": ([ct.MLPCT()], short), "retention": ([], short)}
    return {
        name: ct.train(base, pairs, losses, config=config, steps=length, retain=retain, progress=False).model
        for name, (losses, length) in methods.items()
    }


def analyses(base: LensModel, models: dict[str, LensModel], n: int = PAIRS) -> dict[str, Callable[[], look.Result]]:
    """Every analysis of the ACT run, by name."""
    pairs = ct.threats.get(THREAT).pairs(n, split="heldout")
    both = {"base": base, "act": models["act"]}
    direction = look.mean_difference(base, pairs, name="base", per="item", **QUIET)
    return {
        "probe, wrapper present": lambda: look.probe(both, look.wrapper_present(pairs, base.tokenizer), **QUIET),
        "probe, answer hinted": lambda: look.probe(both, look.answer_hinted(pairs), **QUIET),
        "residual_shift": lambda: look.residual_shift(base, models["act"], pairs, **QUIET),
        "shift_similarity": lambda: look.shift_similarity(base, models, pairs, null="retention", **QUIET),
        "logit_lens": lambda: look.logit_lens(both, pairs, **QUIET),
        "logit_attribution": lambda: look.logit_attribution(both, pairs, **QUIET),
        "steer": lambda: look.steer(both, pairs, direction, **QUIET),
        "ablate": lambda: look.ablate(both, pairs, direction, **QUIET),
        "erase_or_mask": lambda: look.erase_or_mask(base, {"act": models["act"]}, pairs, **QUIET),
    }


@keeping()
def together(base: LensModel, models: dict[str, LensModel], n: int = PAIRS) -> dict[str, look.Result]:
    """The same results from one recording of each model, by the same names."""
    pairs = ct.threats.get(THREAT).pairs(n, split="heldout")
    both = {"base": base, "act": models["act"]}
    task = look.wrapper_present(pairs, base.tokenizer)
    seen = {name: recorded(model, pairs, task, whole=name in both) for name, model in {"base": base, **models}.items()}
    read = {name: seen[name] for name in both}
    moved = {name: seen[name] for name in models}
    present = look.probe(read, task, estimators=["ridge", "rbf"], **QUIET)
    direction = look.mean_difference(seen["base"], pairs, name="base", per="item", **QUIET)
    found = look.erase_or_mask(base, {"act": models["act"]}, pairs, cue=present, direction=direction, **QUIET)
    return {
        "probe, wrapper present": present,
        "probe, answer hinted": look.probe(read, look.answer_hinted(pairs), **QUIET),
        "residual_shift": look.residual_shift(seen["base"], seen["act"], pairs, **QUIET),
        "shift_similarity": look.shift_similarity(seen["base"], moved, pairs, null="retention", **QUIET),
        "logit_lens": look.logit_lens(read, pairs, **QUIET),
        "logit_attribution": look.logit_attribution(read, pairs, **QUIET),
        "steer": look.steer(both, pairs, direction, **QUIET),
        "ablate": look.ablate(both, pairs, direction, **QUIET),
        "erase_or_mask": found,
    }


def recorded(model: LensModel, pairs: list[Pair], task: Task, *, whole: bool) -> look.Recording:
    """What the analyses read of a model; of the `whole`, also on neutral prompts and what attribution needs."""
    neutral = task.parts[-1][0]
    if not whole:
        return look.record(model, pairs, sides=["wrapped"], **QUIET)
    sites = tuple(dict.fromkeys(("resid_post", *ATTRIBUTION_SITES)))
    return look.record(model, [*pairs, *neutral], sites=sites, **QUIET)


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


class Checkout:
    """A process that runs the analyses of one checkout, one at a time.

    Args:
        folder: of the checkout.
    """

    def __init__(self, folder: Path) -> None:
        own = folder / ".venv" / "bin" / "python"
        command = [str(own if own.exists() else sys.executable), "-c", SERVER, str(folder)]
        settings = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(THREADS)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=settings)
        self.names: list[str] = self._answer()

    def timed(self, name: str) -> tuple[float, float]:
        """Seconds of the wall and of the processor of one analysis."""
        print(name, file=cast(IO[str], self.process.stdin), flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()

    def _answer(self) -> Any:
        line = cast(IO[str], self.process.stdout).readline()
        if not line:
            raise SystemExit("a process that runs the analyses ended early: its error stands above.")
        return json.loads(line)


def table_of(ours: Checkout, other: Checkout | None, rounds: int) -> pd.DataFrame:
    """The median seconds of every analysis, run in turns in both checkouts, and their sum."""
    checkouts = [("", ours)] if other is None else [("", ours), ("other_", other)]
    columns = [f"{prefix}{clock}" for prefix, _ in checkouts for clock in ("wall_s", "processor_s")]
    rows = {}
    for name in tqdm(ours.names, desc="analyses"):
        known = [checkout for _, checkout in checkouts if name in checkout.names]
        found = [[checkout.timed(name) for checkout in known] for _ in range(rounds)]
        medians = [median(of_clock) for times in zip(*found, strict=True) for of_clock in zip(*times, strict=True)]
        rows[name] = dict(zip(columns, medians, strict=False))  # the other checkout may not know it
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table.loc[ALONE] = table.drop(index=TOGETHER).sum()
    table.loc[TOGETHER, columns[2:]] = table.loc[ALONE, columns[2:]]
    if other is not None:
        table["ratio"] = table["other_processor_s"] / table["processor_s"]
    return table.rename_axis("analysis")


def main() -> None:
    """Times every analysis, here and in another checkout if one is named, and counts what it holds."""
    parser = argparse.ArgumentParser(description="What the analyses of one trained organism cost.")
    parser.add_argument("--against", type=Path, help="another checkout, which runs the same analyses in turns")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ours = Checkout(Path(__file__).parents[1])
    other = Checkout(options.against.resolve()) if options.against else None
    table = table_of(ours, other, options.rounds)
    for checkout in filter(None, (ours, other)):
        checkout.close()
    torch.set_num_threads(THREADS)
    base = ct.load_organism()
    models = trained(base)
    todo = {**analyses(base, models), TOGETHER: lambda: together(base, models)}
    peaks = {name: held(work) / MEGABYTE for name, work in tqdm(todo.items(), desc="peaks")}
    table["peak_mb"] = pd.Series(peaks)
    table.round(2).reset_index().to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.round(2).reset_index().to_string(index=False))


if __name__ == "__main__":
    main()
