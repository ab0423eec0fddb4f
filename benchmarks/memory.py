"""What a loss holds: the peak memory of a training step with it over that of the same passes without it.

Run `python benchmarks/memory.py`. Counted are the bytes of all tensors that live at once and were made in
the step, operation by operation, so that the numbers are the same on every run and machine; what an
operation needs inside itself is not seen. `memory.csv` has every loss at a moderate size, all captured at
once; `memory_sizes.csv` and its figure have AttCT on a HuggingFace Llama as layers, width and length grow,
for each way to keep memory and each home of the clean targets, which in memory or on disk were there before.
`memory_model.csv` has a whole training of a real model by low-rank adapters, from its preparation to its second step,
retention and optimiser included: its peak with the weights, over that of the bare passes with the weights. It is the
model that `make smollm2` puts into `runs/models/smollm2`, or with `--model FOLDER` another one, then measured alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from step import BARE, CONFIG, batch, losses, real_model, rendered, step
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import ctlens as ct
from ctlens import plots
from ctlens.core.config import generator
from ctlens.core.types import LensModel
from ctlens.data.alignment import Alignment
from ctlens.data.batch import EncodedPair, EncodedPairs, PairBatch, collate
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import Loss
from ctlens.models.counting import Counting, bytes_of
from ctlens.models.hooks import run_capturing
from ctlens.study.config import NATURAL_TRAINING
from ctlens.training.passes import OpenPasses, Passes, Term

MEGABYTE = 2**20
USUAL = {"layers": 4, "width": 64, "length": 1024}
GROWING = {"layers": (2, 4, 8), "width": (64, 128, 256), "length": (256, 512, 1024, 2048)}
DRAWN = {
    ("all", "memory"): "all layers at once",
    ("layers", "again"): "layer by layer, targets worked out again",
    ("layers", "disk"): "layer by layer, targets on disk",
    ("blocks", "disk"): "blocks run again, targets on disk",
}
WAYS = (("all", "memory"), ("layers", "memory"), ("layers", "disk"), ("layers", "again"), ("blocks", "disk"))
"""Of `TrainConfig.memory`, and where the clean targets are: in memory, on disk, or worked out again at each step."""


def costs() -> pd.DataFrame:
    """A step of AttCT over the bare passes, one size at a time away from the usual one."""
    sizes = [dict(USUAL)] + [
        {**USUAL, name: value} for name, values in GROWING.items() for value in values if value != USUAL[name]
    ]
    rows = []
    for size in tqdm(sizes, desc="sizes"):
        bare, seconds = measured(size, None, "all", "memory")
        for memory, targets in WAYS:
            peak, taken = measured(size, ct.AttCT(), memory, targets)
            found = {"bare_mb": bare, "peak_mb": peak, "ratio": peak / bare, "above_bare_mb": peak - bare}
            rows.append({**size, "memory": memory, "targets": targets, **found, "seconds_ratio": taken / seconds})
    return pd.DataFrame(rows).round(3)


def measured(size: dict[str, int], loss: Loss | None, memory: str, targets: str) -> tuple[float, float]:
    """The peak in MiB and the seconds of one step; targets that are kept were worked out before it."""
    reference = llama(size)
    model = llama(size)
    rows = pair(size["length"])
    terms = {loss.name: Term(loss, loss.factors(model))} if loss else {}
    config = ct.TrainConfig(steps=1, batch_size=1, memory=memory, cache=targets != "again")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if targets == "disk" else None
        passes = Passes(reference, model, EncodedPairs((rows,), {}), terms, [[0]], config, place)
        if loss and config.cache:
            passes.targets.fetch([0], collate([rows]))
        start = time.process_time()
        with Counting() as live, passes.open() as forwards:
            total = with_loss(forwards, terms) if terms else passes_alone(reference, model, collate([rows]))
            total.backward()
        return live.peak / MEGABYTE, time.process_time() - start


def passes_alone(reference: LensModel, model: LensModel, pairs: PairBatch) -> torch.Tensor:
    """Both forward passes, and a scalar of the logits."""
    run_capturing(reference, pairs.clean.tokens, [], grad=False)
    return run_capturing(model, pairs.wrapped.tokens, [], grad=True)[0].square().mean()


def with_loss(forwards: OpenPasses, terms: dict[str, Term]) -> torch.Tensor:
    """What a training step minimises."""
    seen = forwards.seen([0], terms, step=1, grad=True)
    return torch.stack([term.loss.compute(seen[name], term.factors).total for name, term in terms.items()]).sum()


def llama(size: dict[str, int]) -> LensModel:
    """A random Llama of the size."""
    shape = {"hidden_size": size["width"], "intermediate_size": 2 * size["width"], "num_hidden_layers": size["layers"]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096, "vocab_size": 512}
    return ct.load_model(LlamaForCausalLM(LlamaConfig(**shape, **heads)))


def pair(length: int) -> EncodedPair:
    """A wrapped prompt of the length, of which all but 64 tokens of a wrapper are shared with the clean one."""
    ids = tuple(torch.randint(1, 512, (length - 1,), generator=generator(0, "memory")).tolist())
    clean = rendered((0, *ids[64:]))
    wrapped = rendered((0, *ids))
    here = tuple(range(1, len(clean.ids)))
    alignments = {"shared": Alignment("shared", here, tuple(place + 64 for place in here), len(here))}
    return EncodedPair(Pair(prompt("-"), prompt("-")), clean, wrapped, alignments, (), tuple(range(1, 65)), ())


def costs_of_real_model(model: LensModel) -> pd.DataFrame:
    """The peak of a training by adapters with each loss, from its preparation to its second step."""
    pairs = ct.threats.get("facts").pairs(NATURAL_TRAINING.batch_size)
    weights = bytes_of(parameter for parameter in model.parameters())
    rows = []
    for name in tqdm(("act", "mlpct", "attct", "bct"), desc="trainings of a real model"):
        with Counting() as training:
            trainer = ct.Trainer(model, pairs, name, replace(NATURAL_TRAINING, steps=2))
            steps = list(trainer)
        with Counting() as bare:
            passes_alone(model, trainer.model, collate(trainer.pairs.rows)).backward()
        held = [total / MEGABYTE for total in (weights, weights + bare.peak, weights + training.peak)]
        rows.append((name, *held, held[2] / held[1]))
        assert len(steps) == 2
    return pd.DataFrame(rows, columns=["training with", "weights_mb", "bare_mb", "peak_mb", "ratio"]).round(3)


def peaks() -> pd.DataFrame:
    """The peak of a step with every loss and of the bare passes."""
    reference = ct.build(CONFIG)
    model = ct.build(CONFIG, seed=1)
    pairs = batch()
    found: dict[str, int] = {}
    for name, loss in losses().items():
        with Counting() as live:
            step(reference, model, pairs, loss)
        found[name] = live.peak
    rows = [(name, peak / MEGABYTE, peak / found[BARE]) for name, peak in found.items()]
    return pd.DataFrame(rows, columns=["step with", "peak_mb", "ratio"]).round(3)


def main() -> None:
    """Counts the peak of every loss and of the bare passes, then AttCT as the model grows, then a real model."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, metavar="FOLDER", help="measure this real model alone")
    named = options.parse_args().model
    torch.set_num_threads(1)
    here = Path(__file__).parent
    tables = {} if named else {"memory": peaks(), "memory_sizes": costs()}
    if (model := real_model(named)) is not None:
        tables["memory_model"] = costs_of_real_model(model)
    for name, table in tables.items():
        table.to_csv(here / f"{name}.csv", index=False)
        tqdm.write(table.to_string(index=False))
    if named is None:
        drawn = {size: lines(tables["memory_sizes"], size) for size in GROWING}
        title = "What does a step of AttCT hold, over the bare passes?"
        image = plots.costs(drawn, title, y_title="peak memory, ratio", limit=1.5).to_image("svg")
        (here / "memory_sizes.svg").write_bytes(image)


def lines(table: pd.DataFrame, size: str) -> dict[str, tuple[list[float], list[float]]]:
    """The ratio by way to keep memory, over one size, at the usual others."""
    others = [name for name in USUAL if name != size]
    part = table[(table[others] == pd.Series({name: USUAL[name] for name in others})).all(axis=1)].sort_values(size)
    found = {way: rows for way, rows in part.groupby(["memory", "targets"], sort=False)}
    return {name: (found[way][size].tolist(), found[way]["ratio"].tolist()) for way, name in DRAWN.items()}


if __name__ == "__main__":
    main()
