"""What an evaluation costs: the organism on every threat and split, with the key-value cache and without.

Also: with fewer and with more tokens a pass, what the table of rates and intervals costs, long answers of a
HuggingFace model on its bridge, with HuggingFace's cache and without, and the choice between two options of a real
chat model, each prompt run once for both options or once for each, if `make smollm2` has put it there.

Run `python benchmarks/evaluation.py`. All variants are timed in turn, in one process on one thread,
and compared with the first of their kind by the median of the per-round ratios; the table is printed
and kept in `evaluation.csv`.
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
from ctlens.models import generation as decoding
from ctlens.models import kv_cache as sequences
from ctlens.models import scoring
from ctlens.models.architectures import tiny_model
from ctlens.models.scoring import Choice, choose
from ctlens.threats import replies
from ctlens.world import SPLITS

ITEMS = 96
ROUNDS = 5
WARM = 1
TOKENS = (512, 4096, 16384)
PROMPTS = 16
PROMPT_TOKENS = 64
ANSWER_TOKENS = 64
REAL_MODEL = Path(__file__).parents[1] / "runs" / "models" / "smollm2"
CHOICES = 8
TOLERANCE = 1e-3  # nats: the rounding of float32 in 30 layers


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


@contextmanager
def no_cache() -> Iterator[None]:
    """Every pass runs the whole sequences."""
    with replaced(sequences, "_cache", lambda model, rows: None):
        yield


def bridged_variants() -> dict[str, Callable[[], object]]:
    """Long answers of a small Llama on its bridge, every prompt of another length."""
    model = ct.load_model(tiny_model("llama"))
    draw = torch.Generator().manual_seed(0)
    lengths = range(PROMPT_TOKENS - PROMPTS, PROMPT_TOKENS)
    prompts = [tuple(torch.randint(1, 400, (length,), generator=draw).tolist()) for length in lengths]

    def answers() -> list[decoding.Ids]:
        return decoding.generate(model, prompts, max_new_tokens=ANSWER_TOKENS)

    def full_passes() -> list[decoding.Ids]:
        with no_cache():
            return answers()

    if answers() != full_passes():
        raise AssertionError("the cache changes an answer")
    return {"bridge, cached": answers, "bridge, full passes": full_passes}


def choice_variants() -> dict[str, Callable[[], object]]:
    """The choices of SmolLM2 between the right and the hinted answer; nothing where its folder is not there."""
    if not REAL_MODEL.is_dir():
        return {}
    model = ct.load_model(REAL_MODEL)
    prompts = [pair.wrapped for pair in ct.threats.get("facts").pairs(CHOICES, split="heldout")]

    def choices() -> list[Choice]:
        return choose(model, prompts)

    def whole_prompts() -> list[Choice]:
        with no_cache(), replaced(scoring, "has_cache", lambda model: False):
            return choices()

    for one, other in zip(choices(), whole_prompts(), strict=True):
        if max(abs(a - b) for a, b in zip(one.log_probabilities, other.log_probabilities, strict=True)) > TOLERANCE:
            raise AssertionError("the cache changes a probability")
    return {"choice, once a prompt": choices, "choice, once an option": whole_prompts}


def main() -> None:
    """Times the ways to evaluate, and the table of rates and intervals, round by round."""
    torch.set_num_threads(1)
    model = ct.load_organism()

    def evaluate() -> ct.Evaluation:
        return ct.evaluate(model, split=SPLITS, n_prompts=ITEMS, progress=False)

    def full_passes() -> None:
        with no_cache():
            evaluate()

    def at(tokens: int) -> None:
        with replaced(replies, "decode", partial(decoding.decode, max_batch_tokens=tokens)):
            evaluate()

    held = evaluate().outcomes
    variants: dict[str, Callable[[], object]] = {
        "cached": evaluate,
        "full passes": full_passes,
        **{f"cached, {tokens} tokens a pass": partial(at, tokens) for tokens in TOKENS},
        "table": lambda: ct.Evaluation(held).to_dataframe(),
        **bridged_variants(),
        **choice_variants(),
    }
    first = {"bridge": "bridge, cached", "choice": "choice, once a prompt"}
    asked = {"bridge": PROMPTS, "choice": CHOICES}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(WARM + ROUNDS), desc="rounds"):
        for name, work in variants.items():
            seconds[name].append(timed(work))
    rows = []
    for name, times in seconds.items():
        kind = name.split(",")[0]
        base = seconds[first.get(kind, "cached")][WARM:]
        ratios = sorted(own / other for own, other in zip(times[WARM:], base, strict=True))
        middle = statistics.median(times[WARM:]), statistics.median(ratios)
        rows.append((name, asked.get(kind, len(held)), *middle, ratios[1], ratios[-2]))
    columns = ["evaluation", "prompts", "seconds", "ratio", "ratio_low", "ratio_high"]
    table = pd.DataFrame(rows, columns=columns).round(3)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
