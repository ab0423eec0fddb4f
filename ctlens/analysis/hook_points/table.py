"""The table of a model's hook points: what can be read there, what can be edited, and which losses train on it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ctlens import losses
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import HookFunction, LensModel, Tokens
from ctlens.models.adopt import adopt
from ctlens.models.hooks import SHORTHANDS, editing, hooked, run
from ctlens.models.parameters import evaluating

_TOKENS = 5
"""Length of the pass that the shapes are read off; a prime, so that few other axes have that length."""
_ROUNDINGS = 32
"""Units of rounding of the largest logit below which an edit reached nothing; chosen by eye."""
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_SITES = {name.format(layer="#"): site for site, name in SHORTHANDS.items()}
"""The short names that analyses take, by the name of the hook point without the number of its block."""


@public
@torch.no_grad()
def hook_table(model: LensModel) -> pd.DataFrame:
    """Tabulates the hook points of a model.

    Every hook point is tried: it is read in one pass, and a random edit is made at it in another. In the blocks an edit
    is tried once per kind of hook point, in the last block that has it, since blocks are made alike.

    >>> import ctlens as ct
    >>> table = ct.hook_table(ct.load_organism()).set_index("hook_name")
    >>> table.loc["blocks.0.attn.hook_z", ["site", "shape", "losses"]].tolist()
    ['z', 'batch pos 4 24', 'attout']

    Args:
        model: any that ctlens takes.

    Returns:
        A row per hook point that a pass computes, in the order in which it does: `hook_name` in full; `site`, the short
        name that analyses take, or empty; `layer`, empty outside of blocks; `shape`, in which `batch` and `pos` stand
        for the prompts and their tokens; `can_edit`; the `losses` that train on it, by name; and a `note` that says why
        it cannot be edited, or what is odd about it.
    """
    adopt(model)
    device = next(model.parameters()).device
    tokens = torch.arange(_TOKENS, device=device)[None] % model.cfg.d_vocab
    with evaluating(model), warnings.catch_warnings():
        # A bridge says that an edited norm is computed again, with other rounding, and that an edit is discarded.
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale|A hook on .* returned a modified")
        seen = _read(model, tokens)
        plain = run(model, tokens)
        edited = _tried_edits(model, tokens, plain, seen)
    trained = _trained_on(model)
    odd: Mapping[str, str] = getattr(getattr(model, "ctlens_trial", None), "odd", {})
    rows = []
    for name, activation in seen.items():
        block = _BLOCK.match(name)
        note = edited.get(_kind(name), "")
        rows.append(
            {
                "hook_name": name,
                "site": "" if name in odd else _SITES.get(_kind(name), ""),
                "layer": block.group(1) if block else "",
                "shape": _shape(activation),
                "can_edit": not note,
                "losses": ", ".join(trained.get(name, ())),
                "note": odd.get(name, note),
            }
        )
    return pd.DataFrame(rows)


def _kind(name: str) -> str:
    """The name of a hook point without the number of its block."""
    return _BLOCK.sub("blocks.#.", name)


def _read(model: LensModel, tokens: Tokens) -> dict[str, Tensor]:
    """The activations of a pass at every hook point that fires, in the order in which they do.

    A bridge has several names for one hook point; that of TransformerLens's own models is taken where there is one.
    """
    named: dict[int, str] = {}
    points: dict[int, Any] = {}
    for name, point in model.hook_dict.items():
        points[id(point)] = point
        if id(point) not in named or _kind(name) in _SITES:
            named[id(point)] = name
    found: dict[str, Tensor] = {}

    def reading(name: str) -> HookFunction:
        def read(activation: Tensor, hook: Any) -> None:
            if isinstance(activation, Tensor):
                found.setdefault(name, activation)

        return read

    with hooked(model, [(point, reading(named[key])) for key, point in points.items()]):
        run(model, tokens)
    return found


def _tried_edits(model: LensModel, tokens: Tokens, plain: Tensor, seen: Mapping[str, Tensor]) -> dict[str, str]:
    """Why hook points cannot be edited, by kind; those that can are missing."""
    last = {_kind(name): name for name in seen}
    bar = _ROUNDINGS * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    refused = {}
    for kind, name in last.items():
        if not seen[name].is_floating_point():
            refused[kind] = "it holds no numbers that could be changed"
            continue
        noise = torch.randn(seen[name].shape, generator=generator(0, "hook table", kind)).to(seen[name])
        try:
            with editing(model, {name: lambda activation, noise=noise: activation + noise}):
                moved = float((run(model, tokens) - plain).abs().max())
        except CtlensError as error:
            refused[kind] = str(error)
        else:
            if not moved > bar:
                refused[kind] = "an edit of it reaches no logit"
    return refused


def _trained_on(model: LensModel) -> dict[str, list[str]]:
    """The names of the losses that train on each hook point, with the options that are their own."""
    found: dict[str, list[str]] = {}
    for name in losses.names():
        try:
            trained = losses.get(name).hook_names(model)
        except CtlensError:  # the model has nothing that this loss could train on
            continue
        for hook_name in trained:
            found.setdefault(hook_name, []).append(name)
    return found


def _shape(activation: Tensor) -> str:
    """The shape in words: the first axis is the batch, and those as long as the pass are positions."""
    first, *rest = activation.shape
    axes = ["pos" if size == _TOKENS else str(size) for size in rest]
    return " ".join(["batch" if first == 1 else str(first), *axes])
