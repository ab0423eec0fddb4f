"""Of what rank is the update of a pretraining: all weights trained, one pair of low-rank adapters, or restarted ones?

Run `python benchmarks/relora.py`. The three trainings go on from one organism after a warm start at full rank,
on the same batches and with one learning rate; the table is printed and kept in `relora.csv`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

import ctlens as ct
from ctlens.core.types import LensModel
from ctlens.models.matrices import MATRICES
from ctlens.models.parameters import GROUPS, copy_model, freeze
from ctlens.organism import PretrainConfig, ReLoRA, pretrain
from ctlens.organism.corpus import Batch, draw_batches, encode, make_lessons
from ctlens.organism.pretrain import FitConfig, answer_loss, fit
from ctlens.world import World

WARM = PretrainConfig(steps=100, batch_size=64, lessons=8000)
FURTHER = FitConfig(steps=400, batch_size=64, lr=2e-3, seed=1)
LORA = ct.LoRA(rank=8, target_modules=MATRICES)
VARIANTS = {
    "full rank": None,
    "LoRA, rank 8": ReLoRA(LORA, warm_start=0, every=FURTHER.steps),
    "ReLoRA, rank 8, every 100": ReLoRA(LORA, warm_start=0, every=100),
    "ReLoRA, rank 8, every 50": ReLoRA(LORA, warm_start=0, every=50),
}


@torch.no_grad()
def loss_of(model: LensModel, batch: Batch) -> float:
    """The cross-entropy of answers, in nats a token."""
    return float(answer_loss(model, batch))


def main() -> None:
    """Trains every variant and looks at its update since the warm start."""
    torch.set_num_threads(1)
    start = pretrain(WARM)
    lessons = encode(start.tokenizer, make_lessons(WARM.lessons, World.make(), WARM.bad_share, WARM.seed))
    unseen = encode(start.tokenizer, make_lessons(1000, World.make(), WARM.bad_share, WARM.seed + 1))
    check = next(draw_batches(unseen, 1000, start.tokenizer.pad_token_id))
    rows: list[dict[str, object]] = []
    for name, relora in VARIANTS.items():
        model = copy_model(start)
        fit(model, lessons, freeze(model, GROUPS), FURTHER, label=name, progress=True, relora=relora)
        table = ct.analysis.update_rank(start, model).to_dataframe()
        means = table[["rank", "effective_rank", "stable_rank", "norm"]].mean()
        rows.append({"training": name, "loss": loss_of(model, check), **means, "lowest_rank": table["rank"].min()})
    report = pd.DataFrame(rows).round(3)
    report.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(f"before: loss {loss_of(start, check):.3f}")
    tqdm.write(report.to_string(index=False))


if __name__ == "__main__":
    main()
