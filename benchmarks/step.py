"""What a loss costs: a training step with it over the same forward and backward passes without it.

Run `python benchmarks/step.py`, with `--quick` for a fifth of the rounds. All variants are timed in turn, in one
process on one thread, and compared by the median of the per-round ratios; the table is printed and kept in `step.csv`.
The same with low-rank adapters on a real model is kept in `step_model.csv`: the model that `make smollm2` puts into
`runs/models/smollm2`, or with `--model FOLDER` another one, which is then measured alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

import ctlens as ct
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.alignment import WINDOWS, Alignment
from ctlens.data.batch import EncodedPair, PairBatch, collate
from ctlens.data.chat import Rendered
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import LOSSES, Forwards, Loss
from ctlens.models.hooks import run_capturing
from ctlens.models.lora import add_adapters
from ctlens.models.parameters import copy_model
from ctlens.study.config import NATURAL_TRAINING
from ctlens.training.prepare import prepare

BATCH = 64
DEEP_BATCH = 16
WRAPPER = 15
CONTENT = 44
ANSWER = 4
ROUNDS = 25
WARM = 3
CONFIG = ct.ModelConfig(d_vocab=512, n_layers=4, n_heads=4, d_model=128, d_mlp=512, n_ctx=128)
DEEP = ct.ModelConfig(d_vocab=512, n_layers=12, n_heads=8, d_model=256, d_mlp=1024, n_ctx=128)
BARE = "bare passes"
REAL_MODEL = Path("runs/models/smollm2")
REAL_BATCH = 4
REAL_ROUNDS = 3
REAL_WARM = 1


def losses() -> dict[str, Loss | None]:
    """By name, nothing, every loss that needs these two passes alone as it is by default, and AttCT on lifted rows."""
    registered = {name: kind() for name, kind in LOSSES.items()}
    on_passes: dict[str, Loss | None] = {
        name: loss
        for name, loss in registered.items()
        if loss.answers in ("", "greedy") and loss.clean_side == "reference" and not loss.makes_rows
        if not loss.subspace_rank
    }
    return {BARE: None, **on_passes, "attct, lifted": ct.AttCT(keys="lifted")}


def batch(n_pairs: int | None = None) -> PairBatch:
    """Random pairs of 64 wrapped tokens: a BOS, 15 of a wrapper, 44 shared ones and an answer of 4; `BATCH` of them."""
    draw = generator(0, "benchmark")
    ids = torch.randint(1, CONFIG.d_vocab, (n_pairs or BATCH, WRAPPER + CONTENT + ANSWER), generator=draw).tolist()
    return collate([_pair(row) for row in ids])


def _pair(ids: list[int]) -> EncodedPair:
    clean = rendered((0, *ids[WRAPPER:-ANSWER]))
    wrapped = rendered((0, *ids[0:-ANSWER]))
    positions = tuple(range(1, 1 + CONTENT))
    moved = tuple(position + WRAPPER for position in positions)
    alignments = {window: Alignment(window, positions, moved, CONTENT) for window in WINDOWS}
    wrapper = tuple(range(1, 1 + WRAPPER))
    answer = tuple(ids[-ANSWER:])
    return EncodedPair(Pair(prompt("-"), prompt("-")), clean, wrapped, alignments, answer, wrapper, answer)


def rendered(ids: tuple[int, ...]) -> Rendered:
    """A BOS and one message, a character a token."""
    offsets = tuple((position, position + 1) for position in range(len(ids)))
    return Rendered("-" * len(ids), ids, offsets, ((1, len(ids)),))


def step(reference: LensModel, model: LensModel, pairs: PairBatch, loss: Loss | None) -> None:
    """Both forward passes and one backward pass from the logits, with or without a loss beside them."""
    factors = loss.factors(model) if loss else {}
    clean_logits, clean = run_capturing(reference, pairs.clean.tokens, factors, grad=False)
    logits, wrapped = run_capturing(model, pairs.wrapped.tokens, factors, grad=True)
    total = logits.square().mean()
    if loss:
        held = clean_logits if loss.needs_clean_logits else None
        total = total + loss.compute(Forwards(pairs, clean, wrapped, logits, held), factors).total
    total.backward()
    for parameter in model.parameters():
        parameter.grad = None


def timed(work: Callable[[], object]) -> float:
    """Seconds of processor time of one call; on one thread those of the wall, but for other work on the machine."""
    start = time.process_time()
    work()
    return time.process_time() - start


def costs(reference: LensModel, model: LensModel, pairs: PairBatch, rounds: int, warm: int = WARM) -> pd.DataFrame:
    """Times every loss against the bare passes on these models, round by round."""
    variants = losses()
    layers = model.cfg.n_layers
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(warm + rounds), desc=f"rounds, {layers} layers"):
        for name, loss in variants.items():
            seconds[name].append(timed(lambda loss=loss: step(reference, model, pairs, loss)))
    bare = seconds[BARE][warm:]
    rows = []
    for name, times in seconds.items():
        ratios = sorted(own / base for own, base in zip(times[warm:], bare, strict=True))
        quarter = len(ratios) // 4
        middle = 1000 * statistics.median(times[warm:]), statistics.median(ratios)
        rows.append((name, layers, model.cfg.d_model, *middle, ratios[quarter], ratios[-1 - quarter]))
    columns = ["step with", "layers", "d_model", "ms", "ratio", "ratio_low", "ratio_high"]
    return pd.DataFrame(rows, columns=columns).round(3)


def real_model(named: Path | None) -> LensModel | None:
    """The real model to measure; None where none is named and none was fetched.

    A sentence says so. A named one that does not load ends the program.
    """
    if named is None and not REAL_MODEL.is_dir():
        tqdm.write(f"{REAL_MODEL} is not there, so no real model is measured: make smollm2, or give --model FOLDER.")
        return None
    try:
        return ct.load_model(named or REAL_MODEL)
    except CtlensError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def costs_of_real_model(model: LensModel, rounds: int) -> pd.DataFrame:
    """Times every loss on a few questions under a hint, with the adapters of a study of a real model."""
    trained = copy_model(model, share_weights=True)
    add_adapters(trained, NATURAL_TRAINING.trainable)
    measured = [loss for loss in losses().values() if loss]
    pairs = prepare(model, ct.threats.get("facts").pairs(REAL_BATCH), measured, (), NATURAL_TRAINING)
    return costs(model, trained, collate(pairs.rows), rounds, REAL_WARM)


def main() -> None:
    """Times every loss on a small model, on a deeper and wider one, and on a real one."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="a fifth of the rounds, and no file")
    options.add_argument("--model", type=Path, metavar="FOLDER", help="time this real model alone")
    given = options.parse_args()
    torch.set_num_threads(1)
    rounds = ROUNDS // 5 if given.quick else ROUNDS
    tables: dict[str, pd.DataFrame] = {}
    if given.model is None:
        sizes = ((CONFIG, batch()), (DEEP, batch(DEEP_BATCH)))
        found = [costs(ct.build(config), ct.build(config, seed=1), pairs, rounds) for config, pairs in sizes]
        tables["step"] = pd.concat(found)
    if (model := real_model(given.model)) is not None:
        tables["step_model"] = costs_of_real_model(model, 1 if given.quick else REAL_ROUNDS)
    for name, table in tables.items():
        if not given.quick:
            table.to_csv(Path(__file__).with_name(f"{name}.csv"), index=False)
        tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
