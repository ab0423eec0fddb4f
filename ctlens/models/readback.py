"""What was written is read back: a folder from which another model would come is refused before it gets its name."""

from __future__ import annotations

from pathlib import Path

import torch

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.bridges import huggingface_config
from ctlens.models.finite import require_finite_weights
from ctlens.models.loading import load_model
from ctlens.models.parameters import evaluating, own_part, saved_tensors
from ctlens.models.parity import compared, lens_answers, narrowed, probe_prompts
from ctlens.models.sharding import is_sharded, read_slices


@torch.no_grad()
def require_written(model: LensModel, folder: Path) -> None:
    """Loads the folder that `save_model` wrote, on the CPU, and compares it with the model.

    The logits of a few short prompts say what no weight says: settings of modules that no configuration holds.

    Raises:
        NotFinite: a weight of the model is not, so that it could not be compared.
        CtlensError: weights, buffers or logits differ, or the folder cannot be read.
    """
    require_finite_weights(model)
    if is_sharded(model):
        _require_same_slices(model, folder)
        return
    again = load_model(folder, dtype=next(model.parameters()).dtype, check=False)
    kept = saved_tensors(again)
    for name, value in saved_tensors(model).items():
        if name not in kept or not torch.equal(value.cpu(), kept[name]):
            raise _lost(name)
    config = huggingface_config(model)
    with evaluating(model), narrowed(config, huggingface_config(again)):
        prompts = probe_prompts(config or model.cfg)
        apart = compared(lens_answers(again, prompts), lens_answers(model, prompts))
    if not apart.is_rounding:
        raise _lost(f"its logits, by {apart.largest:.2g}")


def _require_same_slices(model: LensModel, folder: Path) -> None:
    """Reads a sharded model's slices again; the model is not made anew, which would hold it once more."""
    kept = saved_tensors(model)
    again = {name: torch.empty_like(value) for name, value in kept.items()}
    read_slices(folder, again)
    for name, value in kept.items():
        if not torch.equal(own_part(value), own_part(again[name])):
            raise _lost(name)


def _lost(what: str) -> CtlensError:
    return CtlensError(
        f"the model would not come back from its folder as it is, which changes {what}, so nothing was written: change "
        "a model before load_model, not behind it."
    )
