"""What ctlens costs on a GPU, beside the bare passes, the published loop and TransformerLens, in one run.

Run `python benchmarks/gpu.py`. The table is printed and kept in `gpu.csv` with the name of the card:

- a step of each loss on a Llama of a billion parameters (adapters beside weights in bfloat16, losses layer by layer)
  over the same two passes without a loss, and of AttCT at 2,048 tokens, whose memory is compared with theirs;
- an epoch of each published loss on the shipped organism by the published loop (`peer_step.py`), over ctlens's;
- a patching sweep by TransformerLens (`patching.py`), over ctlens's, and one of the organism;
- the larger organism from scratch.

Without a GPU it ends with a sentence; `--small --device cpu` tries the script itself on small models.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import patching
import peer_step
import torch
from memory import pair, passes_alone
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import ctlens as ct
from ctlens import losses
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, EncodedPairs, collate
from ctlens.models.lora import add_adapters
from ctlens.models.parameters import copy_model
from ctlens.organism import PRESETS, pretrain
from ctlens.training.passes import Passes, Term

BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ROUNDS = 5

COLUMNS = ("what", "model", "seconds", "over", "ratio", "peak_gib", "peak_ratio")
"""What was done, on which model, in how many seconds; over which other thing it is compared, how many times its time;
the peak of the memory, and how many times that of the other."""
Row = tuple[str, str, float, str, float, float, float]
NONE = float("nan")
BARE = "bare passes"


def llama(small: bool, device: torch.device) -> LensModel:
    """A random Llama in bfloat16."""
    shape = {**(TINY if small else BILLION), "vocab_size": 32_000, "max_position_embeddings": 4096}
    config = LlamaConfig(**shape, num_key_value_heads=shape["num_attention_heads"] // 4)
    with torch.device(device):
        hf = LlamaForCausalLM(config)
    return ct.load_model(hf, device=device, dtype=torch.bfloat16)


def timed(device: torch.device, work: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """The median of the seconds, and the peak of the memory in GiB where there is a card to ask."""
    seconds = []
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        work()
        if on_card:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds), torch.cuda.max_memory_allocated(
        device
    ) / 2**30 if on_card else 0.0


def steps(small: bool, device: torch.device) -> list[Row]:
    """A step of every loss that needs no samples, over the bare passes; and one of AttCT on a long prompt."""
    every = [losses.get(name) for name in losses.names()]
    needing_none = [loss for loss in every if loss.answers in ("", "greedy") and not loss.makes_rows]
    short = _steps(small, device, 128 if small else 1024, needing_none)
    return [*short, *_steps(small, device, 256 if small else 2048, [losses.get("attct")])]


def _steps(small: bool, device: torch.device, n_tokens: int, compared: Sequence[losses.Loss]) -> list[Row]:
    reference = llama(small, device)
    model = copy_model(reference)
    add_adapters(model, ct.LoRA(8))
    rows = replace(pair(n_tokens), answer=(5, 6, 7))
    batch = collate([rows]).to(device)
    name = f"{'tiny' if small else '1B'} Llama, {n_tokens} tokens"
    bare, least = timed(device, lambda: passes_alone(reference, model, batch).backward())
    found: list[Row] = [(BARE, name, bare, "", NONE, least, NONE)]
    for loss in tqdm(compared, desc=name):
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak = timed(device, one_step(loss, reference, model, rows, Path(folder)))
        ratio = peak / least if least else NONE
        found.append((f"step of {loss.name}", name, seconds, BARE, seconds / bare, peak, ratio))
    return found


def one_step(
    loss: losses.Loss, reference: LensModel, model: LensModel, rows: EncodedPair, folder: Path
) -> Callable[[], None]:
    """Both passes with the loss and the backward pass, the clean targets worked out again each time."""
    term = Term(loss, loss.factors(model))
    config = ct.TrainConfig(steps=1, batch_size=1, memory="layers", cache=False)
    passes = Passes(reference, model, EncodedPairs((rows,), {}), {loss.name: term}, [[0]], config, folder)

    def step() -> None:
        with passes.open() as forwards:
            seen = forwards.seen([0], {loss.name: term}, step=1, grad=True)
            loss.compute(seen[loss.name], term.factors).total.backward()

    return step


def published(small: bool, device: torch.device) -> list[Row]:
    """An epoch of each published loss by the published loop, a pair at a time, over one by ctlens in batches."""
    base = ct.load_organism(device=device)
    pairs = ct.threats.get("sycophancy").pairs(16 if small else peer_step.PAIRS)
    steps = len(pairs) // peer_step.BATCH
    found: list[Row] = []
    for name, loss in tqdm(peer_step.LOSSES.items(), desc="published loop"):
        ours, theirs = peer_step.trainers(base, pairs, loss, steps * (ROUNDS + 1))
        rows = ours.pairs.rows
        own, peak = timed(device, lambda ours=ours: [ours.take_step() for _ in range(steps)], ROUNDS)
        seconds, _ = timed(device, lambda theirs=theirs, rows=rows: theirs.epoch(rows), ROUNDS)
        over = f"epoch of {name} by ctlens"
        found.append((over, f"organism, {len(rows)} pairs", own, "", NONE, peak, NONE))
        found.append(
            (f"epoch of {name} as published", f"organism, {len(rows)} pairs", seconds, over, seconds / own, NONE, NONE)
        )
    return found


def organism(small: bool, device: torch.device) -> list[Row]:
    """The organism of about 10M parameters, trained from scratch."""
    config = replace(PRESETS["small"], steps=3, lessons=2000, batch_size=16) if small else PRESETS["large"]
    seconds, peak = timed(device, lambda: pretrain(config, device=device, progress=not small), rounds=0)
    return [("organism from scratch", "3 steps" if small else "large preset", seconds, "", NONE, peak, NONE)]


def sweep(small: bool, device: torch.device) -> list[Row]:
    """Every patch of some sites by TransformerLens over those by ctlens, and of resid_pre on the shipped organism."""
    setting = patching.quick(patching.SETTINGS[1]) if small else patching.SETTINGS[3]
    model, pairs = patching.make(setting, device)
    own, peak = timed(device, lambda: patching.ours(model, pairs, setting), rounds=1)
    theirs, _ = timed(device, lambda: patching.theirs(model, pairs, setting), rounds=1)
    share = sum(map(len, (patching.sampled(setting, site) for site in patching.SITES)))
    every = sum(map(len, (patching.sampled(replace(setting, stride=1), site) for site in patching.SITES)))
    name = f"{setting.name}, {setting.pairs} pairs"
    found: list[Row] = [("patching sweep by ctlens", name, own, "", NONE, peak, NONE)]
    whole = theirs * every / share
    found.append(("patching sweep by TransformerLens", name, whole, found[0][0], whole / own, NONE, NONE))

    shipped = ct.load_organism(device=device)
    asked = ct.threats.get("sycophancy").pairs(4 if small else 256, split="heldout")
    options: dict[str, Any] = {"site": "resid_pre", "direction": "denoising", "progress": False}
    seconds, peak = timed(device, lambda: ct.analysis.patch(shipped, asked, **options), rounds=1)
    return [*found, (f"patching sweep of resid_pre, {len(asked)} pairs", "organism", seconds, "", NONE, peak, NONE)]


def main() -> None:
    """Runs everything and keeps the table."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--small", action="store_true", help="small models, to try the script; nothing is kept")
    given = asked.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("no GPU here: nothing was measured; --small --device cpu tries the script itself\n")
        sys.exit(2)
    rows = [row for part in (steps, published, sweep, organism) for row in part(given.small, device)]
    table = pd.DataFrame(rows, columns=[*COLUMNS]).round(4)
    table["card"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if not given.small:
        table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
