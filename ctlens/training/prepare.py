"""The preparation of a training: pairs encoded with their answers, one window for every method, weights unfrozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPairs, encode
from ctlens.data.pairs import Pair
from ctlens.losses import Loss
from ctlens.models.lora import LoRA, add_adapters, fill_adapters, has_adapters, merge_adapters
from ctlens.models.parameters import copy_model, freeze
from ctlens.models.sharding import is_sharded, sharded_copy
from ctlens.training.answers import answer_tail, answers_kind, drawn_at, reference_answers
from ctlens.training.config import TrainConfig


def in_window(loss: Loss, window: str | None) -> Loss:
    """Sets the window of a loss that reads one; None leaves the loss as it is.

    >>> from ctlens.losses import ACT, BCT
    >>> in_window(ACT(), "last").windows, in_window(BCT(), "last").windows
    (('last',), ())
    """
    takes_one = any(field.name == "window" for field in fields(cast(Any, loss)))
    return replace(cast(Any, loss), window=window) if takes_one and window else loss


def prepare(
    reference: LensModel,
    pairs: Sequence[Pair],
    losses: Sequence[Loss],
    track: Sequence[Loss],
    config: TrainConfig,
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> EncodedPairs:
    """Encodes the pairs that align in every window of the losses, with their answers.

    Args:
        reference: the model before training, in eval mode.
        pairs: the pairs to train on.
        losses: the losses to train with.
        track: the losses to measure only; they may not change which pairs are trained on.
        config: the settings; its `window` must align in all pairs, whether or not a loss reads it.
        folder: keeps the reference's answers on disk for the next training; None keeps them nowhere.
        progress: show a progress bar when the reference's answers take more than two seconds.

    Raises:
        CtlensError: no pair aligns, a pair does not fit the context, or a tracked loss would leave pairs out.
    """
    own = dict.fromkeys([*(window for loss in losses for window in loss.windows), *filter(None, [config.window])])
    every = dict.fromkeys([*own, *(window for loss in track for window in loss.windows)])
    encoded = encode(pairs, reference.tokenizer, windows=every, n_ctx=reference.cfg.n_ctx)
    both = (*losses, *track)
    if kind := answers_kind(both):
        answers = reference_answers(
            reference,
            encoded,
            config.max_new_tokens,
            kind=kind,
            drawn_at=drawn_at(both),
            tail=answer_tail(both, reference.tokenizer),
            seed=config.seed,
            folder=folder,
            progress=progress,
        )
        both_sides = any(loss.answers_on_both_sides for loss in both)
        encoded = encoded.with_answers(answers, both_sides=both_sides).answered().aligned(every)
    if every != own:
        trained = encode(pairs, reference.tokenizer, windows=own, n_ctx=reference.cfg.n_ctx)
        if lost := len(trained) - len(encoded):
            raise CtlensError(f"{lost} pairs do not align in the window of a tracked loss: give it another window.")
    return encoded


def trained_copy(reference: LensModel, config: TrainConfig) -> tuple[LensModel, list[nn.Parameter]]:
    """The model that is trained, a copy of the reference, and what is trained of it; raises as `trained_parameters`.

    Adapters leave the weights beside them as they are, so the copy shares those of the reference.
    """
    shared = isinstance(config.trainable, LoRA)
    if not is_sharded(reference):
        model = copy_model(reference, share_weights=shared)
        return model, trained_parameters(model, config)
    model = sharded_copy(reference, partial(_prepare_blank, config=config), share_weights=shared)
    return model, [parameter for parameter in cast(nn.Module, model).parameters() if parameter.requires_grad]


def _prepare_blank(blank: LensModel, config: TrainConfig) -> None:
    if has_adapters(blank):
        raise CtlensError(
            "a sharded model that has adapters cannot be trained on: export it, and load what is written."
        )
    trained_parameters(blank, config)
    if isinstance(config.trainable, LoRA):
        fill_adapters(blank, config.trainable, config.seed)


def trained_parameters(model: LensModel, config: TrainConfig) -> list[nn.Parameter]:
    """Freezes all weights except those that the config trains; adapters of an earlier training are merged first.

    Raises:
        CtlensError: as `freeze` or `add_adapters`, or the weights to train are in half precision.
    """
    if has_adapters(model):
        merge_adapters(model)
    if isinstance(config.trainable, LoRA):
        return add_adapters(model, config.trainable, config.seed)
    parameters = freeze(model, config.trainable)
    if any(torch.finfo(parameter.dtype).bits < 32 for parameter in parameters):
        raise CtlensError(
            "weights in half precision are too coarse to train, because most steps would round to nothing: train "
            "adapters, which stay in float32 (a LoRA, --lora-rank), or load the model in float32."
        )
    return parameters
