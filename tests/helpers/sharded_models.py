"""What analyses find in a model, whole or sharded; `python -m helpers.sharded_models FOLDER` is one of the processes.

The folder holds models of HuggingFace, each in a folder of its own. What is found in them goes to `found.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import ctlens as ct
from ctlens.analysis import (
    attention_diff,
    attention_maps,
    attribution_patch,
    graft,
    logit_attribution,
    logit_lens,
    mean_difference,
    patch,
    probe,
    residual_shift,
    steer,
    update_rank,
    wrapper_present,
)
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.export import to_huggingface
from ctlens.models.hooks import run
from ctlens.models.parameters import copy_model, gathered, present_weights
from ctlens.models.sharding import shard

TOKENS = torch.arange(2, 14).reshape(2, 6)


def tables(model: LensModel) -> dict[str, pd.DataFrame]:
    """The results of the analyses, by their names."""
    pairs = ct.threats.get("sycophancy").pairs(12, split="heldout")
    quiet = {"progress": False}
    direction = mean_difference(model, pairs, name="wrapper", **quiet)
    patched = {
        site: patch(model, pairs[:2], site=site, direction="denoising", positions="last", **quiet)
        for site in ("resid_pre", "pattern")
    }
    approximate = attribution_patch(model, pairs[:2], site="z", direction="denoising", **quiet)
    return {
        "attribution": approximate.to_dataframe(),
        "evaluation": ct.evaluate(model, ["sycophancy"], n_prompts=12, **quiet).to_dataframe(),
        "probe": probe(
            {"base": model}, wrapper_present(pairs, model.tokenizer), positions=["last"], seeds=1, **quiet
        ).to_dataframe(),
        "shift": residual_shift(model, model, pairs, **quiet).to_dataframe(),
        "lens": logit_lens(model, pairs, **quiet).to_dataframe(),
        "attention": attention_diff(model, model, pairs, **quiet).to_dataframe(),
        "steering": steer(model, pairs, direction, alphas=(1.0,), layers=[1], draws=2, **quiet).to_dataframe(),
        **{f"patching {site}": found.to_dataframe() for site, found in patched.items()},
    }


def numbers(model: LensModel) -> dict[str, list[float]]:
    """The numbers of each table, without those that are missing."""
    found = {name: table.select_dtypes("number").to_numpy(float).ravel() for name, table in tables(model).items()}
    return {name: values[~np.isnan(values)].tolist() for name, values in found.items()}


def logits(model: LensModel) -> list[float]:
    with torch.no_grad():
        return run(model, TOKENS).flatten().tolist()


def read_in_slices(folder: Path) -> dict[str, list[float] | str]:
    """The logits and the weights of a model that is read slice by slice, or why it is not."""
    try:
        model = ct.load_model(folder, shard=True)
    except CtlensError as error:
        return {"refused": str(error)}
    weights = {name: gathered(value).flatten().tolist() for name, value in present_weights(model).items()}
    return {"logits": logits(model), **weights}


def refusal(work: Callable[[LensModel], object], model: LensModel) -> str:
    """Why what takes weights by themselves is refused; empty if it is not."""
    try:
        work(model)
    except CtlensError as error:
        return str(error)
    return ""


PAIRS = ct.threats.get("sycophancy").pairs(2, split="heldout")
REFUSED: dict[str, Callable[[LensModel], object]] = {
    "logit_attribution": lambda model: logit_attribution(model, PAIRS, progress=False),
    "attention_maps": lambda model: attention_maps(model, PAIRS[0], 0, 0, weighted=True),
    "graft": lambda model: graft(model, model, PAIRS, progress=False),
    "update_rank": lambda model: update_rank(model, model),
    "to_huggingface": to_huggingface,
    "copy_model": copy_model,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    models = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {path.name: read_in_slices(path) for path in models}
    sharded = shard(ct.load_organism())
    found["analyses"] = numbers(sharded)
    for name, work in REFUSED.items():
        found[name] = refusal(work, sharded)
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
