"""How fast training is: pairs per second with ctlens over those of the published trainers' loop, on the same pairs.

The loop is that of the stack paper's code (arXiv 2606.05817), restated: a pair at a time goes through a HuggingFace
model, the reference runs on its clean prompt in every epoch anew, and the gradients of a batch add up to one
step. ctlens trains the same weights on the same pairs in batches, with the clean targets cached; both see
the same loss. `--quick` times two epochs of each instead of eight.

Run `python benchmarks/peer_step.py`. Both train in turn, epoch by epoch, in one process on one thread, and are
compared by the median of the per-round ratios; the table is printed and kept in `peer_step.csv`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from step import timed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import ctlens as ct
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair
from ctlens.losses import Loss
from ctlens.losses.distances import jensen_shannon
from ctlens.models.export import to_huggingface

Outputs: TypeAlias = Any  # what a model of transformers returns
PAIRS = 128
BATCH = 16
ROUNDS = 8
QUICK = 2
LOSSES: dict[str, Loss] = {
    "act": ct.ACT(final_norm=True),  # the last of HuggingFace's hidden states is after the final norm
    "mlpct": ct.MLPCT(),
    "attct": ct.AttCT(),
    "bct": ct.BCT(),
}


class Published:
    """Published is the trainer of the published code: one loss, one pair at a time.

    Args:
        model: a HuggingFace model, trained in place.
        reference: the same model, frozen.
        loss: the loss, as ctlens names it.
        config: the batch size, learning rate and clipping of the training.
    """

    def __init__(self, model: PreTrainedModel, reference: PreTrainedModel, loss: Loss, config: ct.TrainConfig) -> None:
        self.model = model
        self.reference = reference
        self.loss = loss
        self.config = config
        self.value: Callable[[Outputs, Outputs | None, EncodedPair], Tensor] = getattr(self, loss.name)
        for side in (model, reference):
            side.set_attn_implementation("eager" if loss.name == "attct" else "sdpa")
        for number, block in enumerate(side.model.layers for side in (model, reference)):
            for layer in block:
                layer.mlp.down_proj.register_forward_pre_hook(
                    lambda _, given, at=number: self.seen[at].append(given[0])
                )
        self.seen: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.optimizer = torch.optim.AdamW(model.model.layers.parameters(), lr=config.lr, weight_decay=0.0)

    def epoch(self, rows: Sequence[EncodedPair]) -> list[float]:
        """Goes through the pairs once and returns the loss of every step."""
        starts = range(0, len(rows), self.config.batch_size)
        return [self.step(rows[start : start + self.config.batch_size]) for start in starts]

    def step(self, rows: Sequence[EncodedPair]) -> float:
        """Adds up the gradients of a batch, a pair at a time, and takes one step."""
        losses = []
        for row in rows:
            for seen in self.seen:
                seen.clear()
            wrapped = self.run(self.model, row.wrapped.ids + row.answer)
            with torch.no_grad():
                clean = None if self.loss.name == "bct" else self.run(self.reference, row.clean.ids)
            value = self.loss.weight * self.value(wrapped, clean, row)
            (value / len(rows)).backward()
            losses.append(value.item())
        torch.nn.utils.clip_grad_norm_(self.model.model.layers.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return statistics.mean(losses)

    def run(self, model: PreTrainedModel, ids: Sequence[int]) -> Outputs:
        """Runs one prompt with the outputs that the loss reads."""
        asked = {"output_hidden_states": self.loss.name == "act", "output_attentions": self.loss.name == "attct"}
        return model(torch.tensor([ids], device=model.device), use_cache=False, **asked)

    def act(self, wrapped: Outputs, clean: Outputs, row: EncodedPair) -> Tensor:
        """The squared distance of the hidden states behind each block."""
        return self.over_layers(
            wrapped.hidden_states[1:], clean.hidden_states[1:], row, lambda x, y: (x - y) ** 2
        ).sum()

    def mlpct(self, wrapped: Outputs, clean: Outputs, row: EncodedPair) -> Tensor:
        """One minus the cosine of what enters the down-projections."""
        return self.over_layers(*self.seen, row, lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1))

    def over_layers(
        self,
        wrapped: Sequence[Tensor],
        clean: Sequence[Tensor],
        row: EncodedPair,
        distance: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The mean of a distance over layers and aligned tokens."""
        shared = row.alignments["shared"]
        layers = zip(wrapped, clean, strict=True)
        return torch.stack([distance(x[0, shared.wrapped], y[0, shared.clean]).mean(0) for x, y in layers]).mean(0)

    def attct(self, wrapped: Outputs, clean: Outputs, row: EncodedPair) -> Tensor:
        """The Jensen-Shannon divergence between the content's blocks of the attention of each head."""
        shared = row.alignments["shared"]
        here = torch.tensor(shared.wrapped)
        there = torch.tensor(shared.clean)
        values = [
            jensen_shannon(y[0][:, there][:, :, there], x[0][:, here][:, :, here]).mean()
            for x, y in zip(wrapped.attentions, clean.attentions, strict=True)
        ]
        return torch.stack(values).mean()

    def bct(self, wrapped: Outputs, clean: None, row: EncodedPair) -> Tensor:
        """The cross-entropy of the answer behind the wrapped prompt."""
        logits = wrapped.logits[0, -len(row.answer) - 1 : -1]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer, device=logits.device))


def trainers(base: LensModel, pairs: Sequence[ct.Pair], loss: Loss, steps: int) -> tuple[ct.Trainer, Published]:
    """Makes both trainers from the same weights, pairs and settings."""
    config = ct.TrainConfig(steps=steps, batch_size=BATCH, lr=5e-4, retention=0.0, trainable=("attn", "mlp"))
    model = to_huggingface(base).to(next(base.parameters()).device)
    return ct.Trainer(base, pairs, [loss], config), Published(model, copy.deepcopy(model).eval(), loss, config)


def measured(base: LensModel, pairs: Sequence[ct.Pair], loss: Loss, rounds: int) -> dict[str, float]:
    """Times both trainers, epoch by epoch, after a first epoch that fills the cache of clean targets."""
    steps = len(pairs) // BATCH
    ours, published = trainers(base, pairs, loss, steps * (rounds + 1))
    rows = ours.pairs.rows
    seconds = [
        (timed(lambda: published.epoch(rows)), timed(lambda: [ours.take_step() for _ in range(steps)]))
        for _ in range(rounds + 1)
    ][1:]
    ratios = sorted(theirs / own for theirs, own in seconds)
    quarter = len(ratios) // 4
    theirs = len(rows) / statistics.median(theirs for theirs, _ in seconds)
    own = len(rows) / statistics.median(own for _, own in seconds)
    spread = {"ratio_low": ratios[quarter], "ratio_high": ratios[-1 - quarter]}
    return {"published_pairs_s": theirs, "ctlens_pairs_s": own, "ratio": statistics.median(ratios), **spread}


def main() -> None:
    """Times every loss of the published code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="two epochs of each, and no file")
    quick = options.parse_args().quick
    torch.set_num_threads(1)
    base = ct.load_organism()
    pairs = ct.threats.get("sycophancy").pairs(PAIRS)
    rows = [
        {"loss": name, **measured(base, pairs, loss, QUICK if quick else ROUNDS)}
        for name, loss in tqdm(LOSSES.items(), desc="losses")
    ]
    table = pd.DataFrame(rows).round(3)
    if not quick:
        table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
