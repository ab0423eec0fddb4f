"""What a loss costs: a training step with it over the same forward and backward passes without it.

Run `python benchmarks/step.py`. All variants are timed in turn, in one process on one thread, and
compared by the median of the per-round ratios; the table is printed and kept in `step.csv`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

import ctlens as ct
from ctlens.alignment import Alignment
from ctlens.batch import EncodedPair, PairBatch, collate
from ctlens.chat import Rendered
from ctlens.config import generator
from ctlens.hooks import capture
from ctlens.losses import Forwards, Loss
from ctlens.pairs import Pair, prompt
from ctlens.types import LensModel

BATCH, CLEAN, WRAPPER, ROUNDS, WARM = 64, 48, 16, 15, 3
CONFIG = ct.ModelConfig(d_vocab=512, n_layers=4, n_heads=4, d_model=128, d_mlp=512, n_ctx=128)
LOSSES: tuple[Loss, ...] = (ct.ACT(), ct.MLPCT(), ct.AttCT(), ct.BCT())


def batch() -> PairBatch:
    """Random pairs: 48 shared tokens behind 16 wrapper tokens, the last 4 counted as the answer."""
    draw = generator(0, "benchmark")
    ids = torch.randint(CONFIG.d_vocab, (BATCH, WRAPPER + CLEAN), generator=draw).tolist()
    rows = []
    for row in ids:
        clean, wrapped = (Rendered("", tuple(part), (), ()) for part in (row[WRAPPER:], row[:-4]))
        positions = tuple(range(CLEAN - 4))
        alignment = Alignment("shared", positions, tuple(p + WRAPPER for p in positions), CLEAN)
        rows.append(EncodedPair(Pair(prompt("-"), prompt("-")), clean, wrapped, {"shared": alignment}, tuple(row[-4:])))
    return collate(rows)


def step(reference: LensModel, model: LensModel, pairs: PairBatch, loss: Loss | None) -> None:
    """Both forward passes and one backward pass from the logits, with or without a loss beside them."""
    names = loss.factors(model) if loss else {}
    clean = capture(reference, pairs.clean.tokens, names, grad=False)[1]
    logits, wrapped = capture(model, pairs.wrapped.tokens, names, grad=True)
    total = logits.square().mean()
    if loss:
        total = total + loss.compute(Forwards(pairs, clean, wrapped, logits), names).total
    total.backward()
    for parameter in model.parameters():
        parameter.grad = None


def timed(work: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Times every loss against the bare passes, round by round."""
    torch.set_num_threads(1)
    reference, model, pairs = ct.build(CONFIG), ct.build(CONFIG, seed=1), batch()
    seconds: dict[str, list[float]] = {}
    for _ in tqdm(range(WARM + ROUNDS), desc="rounds"):
        for loss in (None, *LOSSES):
            name = loss.name if loss else "bare passes"
            seconds.setdefault(name, []).append(timed(lambda loss=loss: step(reference, model, pairs, loss)))
    bare = seconds["bare passes"][WARM:]
    rows = []
    for name, times in seconds.items():
        ratios = sorted(own / base for own, base in zip(times[WARM:], bare, strict=True))
        rows.append((name, 1000 * statistics.median(times[WARM:]), statistics.median(ratios), ratios[2], ratios[-3]))
    table = pd.DataFrame(rows, columns=["step with", "ms", "ratio", "ratio_low", "ratio_high"]).round(3)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
