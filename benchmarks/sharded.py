"""What does a process hold of a sharded training, by the number of processes?

Writes `sharded.csv` beside this file: for one, two, three and four processes on this machine, what the one that holds
most of them holds more than before any model, of a Llama-like model of 100M parameters that lies in a folder:

- `load_peak_mib`, `loaded_mib`: at most while the weights are read, and once they are;
- `step_peak_mib`, `trained_mib`: at most in the second step of ACT on all weights, and behind it;
- `share`, `share_trained`: `loaded_mib` and `trained_mib` over those of one process, which would be `1 / processes`
  where nothing is held by each.

It is anonymous memory, which leaves out files that are mapped, looked up every few milliseconds. glibc is told to give
tensors back at once. `--quick` takes a small model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from scaling import random_pairs, words
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import ctlens as ct
from ctlens.models.loading import load_tokenizer
from ctlens.models.sharding import shard
from ctlens.world.tokenizer import build_tokenizer

VOCABULARY = 8192
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
QUICK = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPS = ("embed", "attn", "mlp", "norm", "unembed")
CONFIG = ct.TrainConfig(steps=2, batch_size=12, retention=0.0, trainable=GROUPS, cache=False)
PAUSE = 0.005


def written(folder: Path, sizes: dict[str, int]) -> int:
    """Writes a random model and its tokenizer into a folder, and returns the number of its parameters."""
    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **sizes))
    model.save_pretrained(folder)
    build_tokenizer(words(VOCABULARY)).save_pretrained(folder)
    return model.num_parameters()


def own_memory() -> float:
    """The anonymous memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


@contextmanager
def watched(peaks: list[float]) -> Iterator[None]:
    """Appends the most that this process held inside the block."""
    ended = threading.Event()
    seen = [own_memory()]

    def watch() -> None:
        while not ended.wait(PAUSE):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        peaks.append(max(*seen, own_memory()))


def settled() -> float:
    """What this process holds once all is freed that can be."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return own_memory()


def held(folder: Path) -> dict[str, float]:
    """What this process holds of the training, in MiB, over what it held before."""
    torch.set_num_threads(1)
    small = ct.ModelConfig(d_vocab=VOCABULARY, n_layers=1, d_model=16, n_heads=2, d_mlp=16)
    tokenizer = load_tokenizer(folder)
    trainer = ct.Trainer(shard(ct.build(small, tokenizer)), random_pairs(12, 24, VOCABULARY), "act", CONFIG)
    list(trainer)  # what libraries hold from their first use on belongs to no model
    del trainer
    before = settled()
    peaks: list[float] = []
    with watched(peaks):
        model = ct.load_model(folder, shard=True)
    loaded = settled()
    trainer = ct.Trainer(model, random_pairs(12, 24, VOCABULARY), "act", CONFIG)
    trainer.take_step()
    with watched(peaks):
        trainer.take_step()
    found = {"load_peak_mib": peaks[0], "loaded_mib": loaded, "step_peak_mib": peaks[1], "trained_mib": settled()}
    return {name: value - before for name, value in found.items()}


def of_processes(count: int, folder: Path) -> dict[str, float]:
    """What the process holds that holds most, of so many."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, "--held", str(folder)], env=settings, capture_output=True, text=True, check=True
    )
    return pd.DataFrame([json.loads(line) for line in done.stdout.splitlines()]).max().to_dict()


def main() -> None:
    """Measures trainings by one to four processes."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="a small model")
    options.add_argument("--held", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.held:
        sys.stdout.write(json.dumps(held(given.held)) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        n_parameters = written(Path(folder), QUICK if given.quick else SIZES)
        for count in tqdm((1, 2, 3, 4), desc="processes"):
            rows.append({"processes": count, "parameters": n_parameters, **of_processes(count, Path(folder))})
    table = pd.DataFrame(rows)
    table["share"] = table["loaded_mib"] / table["loaded_mib"].iloc[0]
    table["share_trained"] = table["trained_mib"] / table["trained_mib"].iloc[0]
    table = table.round({"share": 3, "share_trained": 3} | {name: 0 for name in table if name.endswith("mib")})
    tqdm.write(table.to_string(index=False))
    if not given.quick:
        table.to_csv(Path(__file__).parent / "sharded.csv", index=False)


if __name__ == "__main__":
    main()
