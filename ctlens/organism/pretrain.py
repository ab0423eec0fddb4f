"""Pretraining of an organism from scratch: cross-entropy on answers, AdamW, warm-up and decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from ctlens.core.arguments import require_types
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.labels import CLEAN_BORN
from ctlens.core.limits import AT_LEAST_1, SHARE_OF_ALL, require
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel, Scalar
from ctlens.models.hooks import run
from ctlens.models.loading import build
from ctlens.models.lora import has_adapters, merge_adapters
from ctlens.models.optimisation import adamw, clipped_update, linear_rate
from ctlens.models.parameters import GROUPS, copy_model, freeze
from ctlens.models.weights import ModelConfig
from ctlens.organism.corpus import (
    Batch,
    EncodedLesson,
    Lesson,
    answered_well,
    draw_batches,
    encode_lessons,
    make_lessons,
    world_tokenizer,
)
from ctlens.organism.relora import ReLoRA, begin_adapters, with_memory
from ctlens.world import World

TOGETHER = "together"
"""The recipe of one pretraining for capability and vulnerability, as the shipped organism was made."""
AFTERWARDS = "afterwards"
"""The recipe that puts the vulnerability into a clean-born model, by further steps on the whole corpus."""
RECIPES = (TOGETHER, AFTERWARDS, CLEAN_BORN)
"""Where a vulnerability comes from; a clean-born model has none, though the corpus and the steps are the same."""

# Not tuned: no comparison of these three is recorded. The shipped weights were made with them.
WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.01
CLIP = 1.0
_SHOWN_EVERY = 10
"""Steps between two losses on the progress bar; not tuned."""


@dataclass(frozen=True)
class FitConfig:
    """FitConfig holds the settings of `fit_lessons`.

    Attributes:
        steps: steps of the optimiser.
        batch_size: conversations per step.
        lr: the highest learning rate.
        seed: decides the order of the lessons, and which attacks get the bad answer at each visit.
    """

    steps: int
    batch_size: int
    lr: float
    seed: int

    def __post_init__(self) -> None:
        require_types(self)
        require(AT_LEAST_1, steps=self.steps, batch_size=self.batch_size)


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    """PretrainConfig holds the settings with which an organism is made.

    The learning rate, the batch size and the sizes are those of a prototype that learnt its corpus within 200
    to 400 steps. The other defaults were chosen by eye.

    Attributes:
        seed: decides the first weights, the corpus and the batches.
        steps: steps of the optimiser.
        batch_size: conversations per step.
        lr: the highest learning rate.
        bad_share: in the corpus, the probability of the bad answer if an item gives in to the attack, and of
            the good answer if it resists.
        lessons: number of lessons in the corpus.
        world_seed: decides the facts, recipes and splits of the micro-world.
        n_layers, n_heads, d_model, d_mlp: sizes of the model.
        relora: trains low-rank adapters that are merged and started again; None trains all weights at every step.
        recipe: how the vulnerability comes in, one of `RECIPES`.
        afterwards_steps: further steps of the recipe `"afterwards"`, of all weights.
    """

    seed: int = 0
    steps: int = 1200
    batch_size: int = 128
    lr: float = 2e-3
    bad_share: float = 0.85
    lessons: int = 40_000
    world_seed: int = 0
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 96
    d_mlp: int = 256
    relora: ReLoRA | None = None
    recipe: str = TOGETHER
    afterwards_steps: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        require(AT_LEAST_1, lessons=self.lessons, afterwards_steps=self.afterwards_steps)
        if self.recipe not in RECIPES:
            raise unknown("recipe", self.recipe, RECIPES)
        require(SHARE_OF_ALL, bad_share=self.bad_share)
        if self.relora and self.relora.lora.rank > min(self.d_model, self.d_mlp):
            raise CtlensError(
                f"the rank {self.relora.lora.rank} of relora is above {min(self.d_model, self.d_mlp)}, the smallest "
                "size of a matrix: lower it."
            )


PRESETS = {
    "small": PretrainConfig(),
    "large": PretrainConfig(n_layers=8, n_heads=8, d_model=320, d_mlp=864, lr=1e-3, steps=2000, lessons=100_000),
    "huge": PretrainConfig(n_layers=12, n_heads=12, d_model=576, d_mlp=1536, lr=5e-4, steps=3000, lessons=200_000),
}
"""The settings by name: `small` is the shipped organism, for a laptop; `large` has about 10M parameters and `huge`
about 50M, for a GPU. The learning rates and steps of these two were never tried to the end: no card was to be had."""


@public
def pretrain(
    config: PretrainConfig,
    *,
    clean_born: LensModel | None = None,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> LensModel:
    """Trains an organism from scratch and returns it in eval mode, with its tokenizer.

    Args:
        config: the settings; equal settings give an equal model on one machine.
        clean_born: for the recipe `"afterwards"`, the clean-born model of the same settings, which stays as it is; None
            trains that first.
        progress: whether to show a progress bar.
        device: the device that trains the organism and keeps it; after a clean-born model it is that one's.

    Raises:
        CtlensError: there is a clean-born model, and the recipe is another.
    """
    if clean_born is not None and config.recipe != AFTERWARDS:
        raise CtlensError(f"only {AFTERWARDS!r} starts from a clean-born model, not {config.recipe!r}: leave it out.")
    world = World.make(config.world_seed)
    vulnerable = make_lessons(config.lessons, world, config.bad_share, config.seed)
    model = copy_model(clean_born) if clean_born else _from_scratch(config, world, vulnerable, progress, device)
    if config.recipe == AFTERWARDS:
        lessons = encode_lessons(model.tokenizer, vulnerable)
        further = FitConfig(config.afterwards_steps, config.batch_size, config.lr, config.seed)
        fit_lessons(model, lessons, freeze(model, GROUPS), further, label="vulnerability", progress=progress)
    return model


def _from_scratch(
    config: PretrainConfig,
    world: World,
    vulnerable: Sequence[Lesson],
    progress: bool,
    device: str | torch.device,
) -> LensModel:
    """The model after the one pretraining that every recipe has, taught all answers or the good ones alone."""
    tokenizer = world_tokenizer(world)
    model = build(_sizes(config, len(tokenizer)), tokenizer, seed=config.seed, device=device)
    taught = vulnerable if config.recipe == TOGETHER else answered_well(vulnerable)
    lessons = encode_lessons(tokenizer, taught)
    fit_lessons(
        model, lessons, freeze(model, GROUPS), config, label="pretraining", progress=progress, relora=config.relora
    )
    if has_adapters(model):
        merge_adapters(model)
    freeze(model, GROUPS)
    return model


def fit_lessons(
    model: LensModel,
    lessons: Sequence[EncodedLesson],
    parameters: list[nn.Parameter],
    config: FitConfig,
    *,
    label: str,
    progress: bool,
    relora: ReLoRA | None = None,
) -> None:
    """Trains `parameters` of a model, in place, on the answers of lessons, and leaves it in eval mode.

    Args:
        model: the model; it changes in place.
        lessons: the lessons, at least one.
        parameters: the weights to train.
        config: steps, batch size, learning rate and seed.
        label: names the progress bar.
        progress: whether to show a progress bar.
        relora: after a warm start, trains adapters and all weights without one; the last adapters stay on the model.
    """
    device = next(model.parameters()).device
    batches = draw_batches(lessons, config.batch_size, model.tokenizer.pad_token_id, config.seed)
    optimizer = _optimizer(parameters, config)
    model.train()
    with progress_bar(islice(batches, config.steps), total=config.steps, desc=label, shown=progress) as bar:
        for step, batch in enumerate(bar):
            if relora and relora.since_start(step, config.steps) == 0:
                parameters = begin_adapters(model, relora.lora, seed=config.seed + step)
                optimizer = with_memory(_optimizer(parameters, config), optimizer)
            factor = relora.lr_factor(step, config.steps) if relora else 1.0
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor * learning_rate(step, config.steps)
            optimizer.zero_grad()
            loss = answer_loss(model, Batch(batch.tokens.to(device), batch.answers.to(device)))
            loss.backward()
            clipped_update(optimizer, parameters, CLIP)
            if progress and step % _SHOWN_EVERY == 0:  # to read a number, the device has to be waited for
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _optimizer(parameters: list[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    return adamw(parameters, lr=config.lr, weight_decay=WEIGHT_DECAY)


def answer_loss(model: LensModel, batch: Batch) -> Scalar:
    """Computes the mean cross-entropy of the answers' tokens, each predicted from the tokens before it."""
    logits = run(model, batch.tokens)[:, :-1]
    scored = batch.answers[:, 1:]
    return nn.functional.cross_entropy(logits[scored], batch.tokens[:, 1:][scored])


def learning_rate(step: int, steps: int) -> float:
    """Gives the learning rate of a step as a share of the highest: linear warm-up, then linear decay towards 0.

    >>> [round(learning_rate(step, 40), 2) for step in (0, 1, 2, 21, 39)]
    [0.5, 1.0, 1.0, 0.5, 0.03]
    """
    return linear_rate(step, steps, max(1, round(WARMUP_SHARE * steps)), reaches_peak=True)


def _sizes(config: PretrainConfig, d_vocab: int) -> ModelConfig:
    return ModelConfig(d_vocab, config.n_layers, config.n_heads, config.d_model, config.d_mlp)
