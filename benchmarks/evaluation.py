"""What an evaluation costs: the organism on every threat and split, with the key-value cache and without.

Also: with fewer and with more tokens a pass, and what the table of rates and intervals costs.

Run `python benchmarks/evaluation.py`. All variants are timed in turn, in one process on one thread,
and compared by the median of the per-round ratios; the table is printed and kept in `evaluation.csv`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch
from tqdm.auto import tqdm

import ctlens as ct
from ctlens import decoding
from ctlens.threats import replies
from ctlens.world import SPLITS

ITEMS, ROUNDS, WARM = 96, 5, 1
TOKENS = (512, 4096, 16384)


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Gives a name in a module another value inside the block."""
    held = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, held)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Times the ways to evaluate, and the table of rates and intervals, round by round."""
    torch.set_num_threads(1)
    model = ct.load_organism()

    def evaluate() -> ct.Evaluation:
        return ct.evaluate(model, split=SPLITS, n=ITEMS, progress=False)

    def full_passes() -> None:
        with replaced(decoding, "empty_cache", lambda model, rows: None):
            evaluate()

    def at(tokens: int) -> None:
        with replaced(replies, "decode", partial(decoding.decode, tokens_a_pass=tokens)):
            evaluate()

    held = evaluate().outcomes
    variants: dict[str, Callable[[], object]] = {
        "cached": evaluate,
        "full passes": full_passes,
        **{f"cached, {tokens} tokens a pass": partial(at, tokens) for tokens in TOKENS},
        "table": lambda: ct.Evaluation(held).to_dataframe(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(WARM + ROUNDS), desc="rounds"):
        for name, work in variants.items():
            seconds[name].append(timed(work))
    cached = seconds["cached"][WARM:]
    rows = []
    for name, times in seconds.items():
        ratios = sorted(own / base for own, base in zip(times[WARM:], cached, strict=True))
        middle = statistics.median(times[WARM:]), statistics.median(ratios)
        rows.append((name, len(held), *middle, ratios[1], ratios[-2]))
    columns = ["evaluation", "prompts", "seconds", "ratio", "ratio_low", "ratio_high"]
    table = pd.DataFrame(rows, columns=columns).round(3)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
