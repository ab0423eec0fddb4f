"""How costs grow: a training step, an evaluation and a patching sweep against pairs, length, layers and width.

Run `python benchmarks/scaling.py`, or with `--quick` in less than a minute. It writes three tables:

- `scaling.csv`: each size is raised by itself. The exponent of a cost is the slope of a straight line through its
  logarithms, with the standard error of that slope. Times are of one thread's processor; memory is counted,
  tensor by tensor, so that it is the same on every machine.
- `estimate.csv`: what `ctlens.estimate` predicts for four models and trainings, beside what a fresh process held more
  than before any model, which is its resident memory. glibc keeps some of what is freed for later, so it is told to
  give tensors back at once.
- `estimate_known.csv`: predictions for the sizes of known models of 1B, 8B and 70B parameters;
- `estimate_plan.csv`: predictions for 8B in one process and 70B in eight that split its weights.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import ctlens as ct
from ctlens.core.config import generator
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.counting import Counting
from ctlens.training.estimate import GIB
from ctlens.world.tokenizer import build_tokenizer

HERE = Path(__file__).parent
ROUNDS = 2
WRAPPER = 8
VOCABULARY = 512
USUAL = {"pairs": 4, "length": 64, "layers": 4, "width": 128}
RAISED = {"pairs": (2, 4, 8, 16), "length": (16, 32, 64, 128), "layers": (2, 4, 8, 16), "width": (32, 64, 128, 256)}
QUICK = {name: sizes[:3] for name, sizes in RAISED.items()}

EXPECTED = {
    ("step", "pairs"): ("1", "0 to 1"),
    ("step", "length"): ("1 to 2", "0 to 2"),
    ("step", "layers"): ("1", "1"),
    ("step", "width"): ("1 to 2", "1 to 2"),
    ("evaluation", "pairs"): ("1", "0 to 1"),
    ("evaluation", "length"): ("1 to 2", "0 to 2"),
    ("evaluation", "layers"): ("1", "0 to 1"),
    ("evaluation", "width"): ("1 to 2", "0 to 1"),
    ("sweep", "pairs"): ("1", "0 to 1"),
    ("sweep", "length"): ("2 to 3", "1 to 2"),
    ("sweep", "layers"): ("1 to 2", "0 to 1"),
    ("sweep", "width"): ("1 to 2", "0 to 1"),
}
"""Of time and of memory. Every part of a cost has its own exponent, so that a sum of parts lies between them: products
with weights grow with the length and with the square of the width, those of queries and keys the other way round."""


class Fit(NamedTuple):
    """The slope of a straight line through logarithms, and its standard error."""

    exponent: float
    error: float


def fitted(sizes: tuple[int, ...], costs: list[float]) -> Fit:
    """Fits `cost = factor * size ** exponent` by least squares of the logarithms."""
    x, y = np.log(sizes), np.log(costs)
    slope, offset = np.polyfit(x, y, 1)
    left = y - (slope * x + offset)
    return Fit(float(slope), float(np.sqrt((left**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())))


def words(vocabulary: int) -> list[str]:
    """As many words as a vocabulary has beside its special tokens."""
    return [f"w{number}" for number in range(vocabulary - 7)]


def random_pairs(n_pairs: int, length: int, vocabulary: int, wrapper: int = WRAPPER) -> list[Pair]:
    """Pairs whose wrapped prompts have that length: a BOS, two role marks, the wrapper, and the clean words."""
    known = words(vocabulary)
    ids = torch.randint(len(known), (n_pairs, length - 3), generator=generator(0, "scaling")).tolist()
    texts = [[known[number] for number in row] for row in ids]
    return [
        Pair(prompt(" ".join(row[wrapper:]), "w1", "w2"), prompt(" ".join(row), "w1", "w2"))  # a good and a bad answer
        for row in texts
    ]


def made(size: dict[str, int]) -> tuple[LensModel, list[Pair]]:
    """A random model made here, and its pairs."""
    shape: Any = {"n_layers": size["layers"], "n_heads": 4, "d_model": size["width"], "d_mlp": 4 * size["width"]}
    config = ct.ModelConfig(d_vocab=VOCABULARY, n_ctx=512, **shape)
    return ct.build(config, build_tokenizer(words(VOCABULARY))), random_pairs(size["pairs"], size["length"], VOCABULARY)


def step(size: dict[str, int]) -> Callable[[], object]:
    """A training step of AttCT without retention, its targets kept from an earlier one."""
    model, pairs = made(size)
    config = ct.TrainConfig(steps=1000, batch_size=len(pairs), retention=0.0, trainable=("attn", "mlp"))
    trainer = ct.Trainer(model, pairs, ct.AttCT(), config)
    trainer.take_step()
    return trainer.take_step


def evaluation(size: dict[str, int]) -> Callable[[], object]:
    """Answers to both sides of all pairs."""
    model, pairs = made(size)
    return lambda: ct.evaluate(model, pairs=pairs, n_prompts=len(pairs))


def sweep(size: dict[str, int]) -> Callable[[], object]:
    """A patching sweep of the residual stream, at every layer and aligned token."""
    model, pairs = made(size)
    return lambda: ct.analysis.patch(model, pairs, site="resid_pre", direction="denoising", progress=False)


WORK = {"step": step, "evaluation": evaluation, "sweep": sweep}


def costs(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of the processor, the least of some rounds; and counted bytes."""
    with Counting() as counting:
        work()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return {"time": min(seconds), "memory": float(counting.peak)}


def exponents(raised: dict[str, tuple[int, ...]]) -> pd.DataFrame:
    """One row per kind of work and size that is raised."""
    rows = []
    todo = [(kind, name) for kind in WORK for name in raised]
    for kind, name in tqdm(todo, desc="exponents"):
        found = [costs(WORK[kind]({**USUAL, name: size})) for size in raised[name]]
        row: dict[str, Any] = {"work": kind, "against": name, "sizes": " ".join(map(str, raised[name]))}
        for cost in found[0]:
            fit = fitted(raised[name], [costs[cost] for costs in found])
            row |= {cost: round(fit.exponent, 2), f"{cost}_error": round(fit.error, 2)}
        time_expected, memory_expected = EXPECTED[kind, name]
        rows.append({**row, "time_expected": time_expected, "memory_expected": memory_expected})
    return pd.DataFrame(rows)


LLAMA = {"model_type": "llama", "vocab_size": 2048, "max_position_embeddings": 1024, "tie_word_embeddings": False}
MEASURED: dict[str, dict[str, Any]] = {
    "Llama-like, 8 layers of 512": {
        "model": {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
        | {"num_attention_heads": 8, "num_key_value_heads": 8},
        "loss": "attct",
        "training": {"batch_size": 4, "memory": "layers", "max_new_tokens": 8},
        "length": 384,
    },
    "Llama-like, 12 layers of 768": {
        "model": {**LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "num_key_value_heads": 4},
        "loss": "act",
        "training": {"batch_size": 2, "memory": "all", "max_new_tokens": 2},
        "length": 96,
    },
    "GPT-2-like, 12 layers of 768": {
        "model": {"model_type": "gpt2", "vocab_size": 2048, "n_embd": 768, "n_layer": 12, "n_head": 12},
        "loss": "bct",
        "training": {"batch_size": 2, "memory": "blocks", "max_new_tokens": 2},
        "length": 96,
    },
    "Llama-like, 12 layers of 1024, LoRA": {
        "model": {**LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
        | {"num_attention_heads": 16, "num_key_value_heads": 4},
        "loss": "mlpct",
        "training": {"batch_size": 2, "memory": "all", "max_new_tokens": 2},
        "lora_rank": 8,
        "length": 192,
    },
}


def training(case: dict[str, Any]) -> ct.TrainConfig:
    """The settings of a training that is measured; two batches, so that the second one's targets are new."""
    trainable = ct.LoRA(case["lora_rank"]) if "lora_rank" in case else ("attn", "mlp")
    return ct.TrainConfig(steps=2, trainable=trainable, **case["training"])


def held(case: dict[str, Any]) -> int:
    """The bytes by which the second step of a training raises this process's memory above that before any model."""
    torch.set_num_threads(1)
    config = training(case)
    small = {**case, "model": {**case["model"], "hidden_size": 192, "n_embd": 192, "intermediate_size": 64}}
    two_steps(small)  # what libraries hold from their first use on belongs to no model
    before = resident("VmRSS")
    trainer = two_steps(case, last=False)
    settle()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    trainer.take_step()
    assert len(trainer.history) == config.steps
    return resident("VmHWM") - before


def two_steps(case: dict[str, Any], *, last: bool = True) -> ct.Trainer:
    """A training of random weights after its first step, or after both."""
    settings = dict(case["model"])
    described = AutoConfig.for_model(settings.pop("model_type"), **settings)
    vocabulary = settings["vocab_size"]
    tokenizer = build_tokenizer(words(vocabulary))
    model = ct.load_model(AutoModelForCausalLM.from_config(described), tokenizer=tokenizer, check=False)
    config = training(case)
    pairs = random_pairs(config.steps * config.batch_size, case["length"], vocabulary, case["length"] // 4)
    trainer = ct.Trainer(model, pairs, case["loss"], config)
    trainer.take_step()
    if last:
        trainer.take_step()
    return trainer


def settle() -> None:
    """Gives freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(name: str) -> int:
    """The bytes of this process in memory: now, `VmRSS`, or at their most, `VmHWM`."""
    settle()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def predicted(case: dict[str, Any]) -> int:
    """The bytes that the estimate says, with the targets of both batches, which stay in the same memory on a CPU."""
    settings = dict(case["model"])
    described = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config = training(case)
    options: Any = {"length": case["length"], "wrapper_length": case["length"] // 4, "progress": False}
    found = ct.estimate(described, case["loss"], config=config, **options).asked
    return found.peak + found.targets * config.batch_size * config.steps


def against_measured(names: list[str]) -> pd.DataFrame:
    """One row per model: the prediction, and what a fresh process held."""
    rows = []
    for name in tqdm(names, desc="fresh processes"):
        case = MEASURED[name]
        said = predicted(case)
        measured = in_fresh_process(case)
        row = {"model": name, "loss": case["loss"], "memory": case["training"]["memory"], "predicted_gib": said / GIB}
        rows.append({**row, "measured_gib": measured / GIB, "ratio": said / measured})
    return pd.DataFrame(rows).round(3)


def in_fresh_process(case: dict[str, Any]) -> int:
    """What a training holds in a process of its own, whose allocator gives tensors back at once."""
    command = [sys.executable, __file__, "--held", json.dumps(case)]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout)


KNOWN = {
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
    "Llama-3.1-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}
"""The published sizes."""
WAYS = (("float32", None, "all"), ("bfloat16", 8, "all"), ("bfloat16", 8, "blocks"))


def known(names: list[str]) -> pd.DataFrame:
    """A step of ACT on 8 pairs of 512 tokens: attention and MLPs in float32, or adapters beside bfloat16."""
    rows = []
    for name, (dtype, rank, memory) in tqdm([(name, way) for name in names for way in WAYS], desc="known sizes"):
        described = AutoConfig.for_model("llama", max_position_embeddings=131072, **KNOWN[name])
        trainable = ("attn", "mlp") if rank is None else ct.LoRA(rank)
        config = ct.TrainConfig(batch_size=8, memory=memory, trainable=trainable)
        found = ct.estimate(described, "act", config=config, length=512, dtype=dtype, progress=False)
        asked = found.asked
        row = {"model": name, "parameters": found.n_parameters, "dtype": dtype, "trained": asked.trained}
        sizes = {"weights_gib": (asked.reference + asked.weights) / GIB, "peak_gib": asked.peak / GIB}
        rows.append({**row, "memory": memory, **sizes, "tflop": sum(asked.flops.values()) / 1e12})
    return pd.DataFrame(rows).round(1)


PLANNED: tuple[tuple[str, int, str, int | None, str], ...] = (
    ("Llama-3.1-8B", 1, "bfloat16", 8, "all"),
    ("Llama-3.1-8B", 1, "bfloat16", 8, "blocks"),
    ("Llama-3.1-70B", 8, "bfloat16", 8, "all"),
    ("Llama-3.1-70B", 8, "bfloat16", 8, "blocks"),
    ("Llama-3.1-70B", 8, "float32", None, "blocks"),
)
"""Model, processes that split its weights, dtype, rank of adapters (None for attention in whole) and memory."""
TFLOPS = 200.0
"""What a card is taken to do in the plan; nobody measured it."""


def planned(rows: Sequence[tuple[str, int, str, int | None, str]]) -> pd.DataFrame:
    """A step of ACT and retention on 8 pairs of 512 tokens, by one process or by several that split the weights."""
    found = []
    for name, processes, dtype, rank, memory in tqdm(rows, desc="plan"):
        described = AutoConfig.for_model("llama", max_position_embeddings=131072, **KNOWN[name])
        trainable = ("attn",) if rank is None else ct.LoRA(rank)
        config = ct.TrainConfig(batch_size=8, memory=memory, trainable=trainable)
        options: dict[str, Any] = {"processes": processes, "shard": processes > 1, "tflops": TFLOPS}
        estimate = ct.estimate(described, "act", config=config, length=512, dtype=dtype, progress=False, **options)
        asked = estimate.asked
        (speed,) = estimate.to_dataframe()["pairs per second"]
        held = (asked.reference + asked.weights + asked.optimizer) / GIB
        sizes = {"slices_gib": held, "gathered_gib": asked.gathered / GIB, "peak_gib": asked.peak / GIB}
        settings = {"model": name, "processes": processes, "dtype": dtype, "trained": asked.trained, "memory": memory}
        found.append({**settings, **sizes, "targets_gib": asked.targets / GIB, "pairs_per_second": speed})
    return pd.DataFrame(found).round(2)


PAGE = HERE.parent / "docs/scaling.md"
QUOTED: dict[str, dict[str, str]] = {
    "scaling": {
        **{name: name for name in ("work", "against", "sizes", "time")},
        "time_error": "error",
        "time_expected": "expected",
        "memory": "memory",
        "memory_error": "error",
        "memory_expected": "expected",
    },
    "estimate": {
        "model": "model",
        "loss": "loss",
        "memory": "`memory`",
        "predicted_gib": "predicted, GiB",
        "measured_gib": "measured, GiB",
        "ratio": "ratio",
    },
    "estimate_known": {
        **{name: name for name in ("model", "parameters", "dtype", "trained")},
        "memory": "`memory`",
        "weights_gib": "weights, GiB",
        "peak_gib": "peak, GiB",
        "tflop": "TFLOP",
    },
    "estimate_plan": {
        **{name: name for name in ("model", "processes", "dtype", "trained")},
        "memory": "`memory`",
        "slices_gib": "slices, GiB",
        "gathered_gib": "gathered, GiB",
        "peak_gib": "peak, GiB",
        "targets_gib": "targets per pair, GiB",
        "pairs_per_second": "pairs per second",
    },
}
"""The columns of each table that the page on scaling quotes, with their headings there."""


def quoted(name: str) -> str:
    """A table as the page quotes it, from its file."""
    table = pd.read_csv(HERE / f"{name}.csv", dtype=str, keep_default_na=False)
    headings = list(QUOTED[name].values())
    rows = [headings, ["---"] * len(headings), *table[list(QUOTED[name])].to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str) -> str:
    """The page with every table put anew between its two marks."""
    for name in QUOTED:
        mark = f"<!-- {name} -->"
        before, _, after = text.split(mark)
        text = f"{before}{mark}\n{quoted(name)}\n{mark}{after}"
    return text


def main() -> None:
    """Writes the tables, also into the page on scaling; with `--quick`, prints them at fewer sizes only."""
    if sys.argv[1:2] == ["--held"]:
        sys.stdout.write(f"{held(json.loads(sys.argv[2]))}\n")
        return
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv[1:]
    tables = {
        "scaling": exponents(QUICK if quick else RAISED),
        "estimate": against_measured(list(MEASURED)[:1] if quick else list(MEASURED)),
        "estimate_known": known(list(KNOWN)[:1] if quick else list(KNOWN)),
        "estimate_plan": planned(PLANNED[:1] if quick else PLANNED),
    }
    for name, table in tables.items():
        tqdm.write(table.to_string(index=False))
        if not quick:
            table.to_csv(HERE / f"{name}.csv", index=False)
    if not quick:
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
