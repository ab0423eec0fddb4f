"""The parameters of a model: in groups, frozen or trained, and copied."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.core.types import LensModel

GROUPS = ("embed", "attn", "mlp", "norm", "unembed")
OTHER_SENSES = ("vision", "multi_modal", "audio")  # parts of a model that text does not pass through
WRAPPED_MODULE = "._original_component"
PARAMETRIZED = ".parametrizations."
ADAPTED = re.compile(r"\.parametrizations\.(\w+)\.original$")


def plain_name(name: str) -> str:
    """A parameter's name without the wrapping of the bridge and of adapters, equal on all versions."""
    return ADAPTED.sub(r".\1", name.replace(WRAPPED_MODULE, ""))


def without(model: LensModel, names: Collection[str]) -> LensModel:
    """Marks parameters that the architecture does not have: they are never trained and never saved."""
    cast(Any, model).ctlens_absent = frozenset(names)
    for name, parameter in model.named_parameters():
        if plain_name(name) in names:
            parameter.requires_grad_(False)
    return model


def present_parameters(model: LensModel) -> dict[str, nn.Parameter]:
    """The parameters that the architecture has, by a name that does not depend on the bridge's version.

    Parameters of adapters are not among them: an adapted weight stands here as it is without its adapter.
    """
    absent = getattr(model, "ctlens_absent", frozenset())
    plain = ((plain_name(name), value) for name, value in model.named_parameters())
    return {name: value for name, value in plain if name not in absent and PARAMETRIZED not in name}


@torch.no_grad()
def present_weights(model: LensModel) -> dict[str, Tensor]:
    """The weights that the model computes with: `present_parameters` with the adapters' updates added."""
    adapted: dict[int, Tensor] = {}
    for module in cast(nn.Module, model).modules():
        if parametrize.is_parametrized(module):
            for name, held in cast(nn.ModuleDict, module.parametrizations).items():
                adapted[id(held.original)] = getattr(module, name)
    return {name: adapted.get(id(value), value.detach()) for name, value in present_parameters(model).items()}


def parameter_groups(model: LensModel) -> dict[str, list[str]]:
    """Parameter names by group: `embed`, `attn`, `mlp`, `norm` and `unembed`.

    Parameters of a vision tower are in no group.
    """
    owner: dict[int, str] = {}
    lens = cast(Any, model)
    modules = [(lens.embed, "embed"), (lens.unembed, "unembed"), (getattr(lens, "pos_embed", None), "embed")]
    for block in lens.blocks:
        modules += [(block.attn, "attn"), (getattr(block, "mlp", None), "mlp")]
    for module, group in modules:
        for parameter in module.parameters() if module is not None else ():
            owner.setdefault(id(parameter), group)
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, parameter in present_parameters(model).items():
        if not any(part in name for part in OTHER_SENSES):
            groups[owner.get(id(parameter), "norm")].append(name)
    return groups


@public
def freeze(model: LensModel, trainable: Iterable[str]) -> list[nn.Parameter]:
    """Leaves only the named groups trainable and returns their parameters.

    Args:
        model: changed in place (`requires_grad` alone).
        trainable: names from `parameter_groups`.

    Raises:
        CtlensError: a group is unknown, or the groups hold no parameter.
    """
    groups = parameter_groups(model)
    chosen: set[str] = set()
    for group in trainable:
        if group not in groups:
            raise unknown("parameter group", group, GROUPS)
        chosen |= set(groups[group])
    if not chosen:
        raise CtlensError(f"no parameter is trainable: name at least one group of {', '.join(GROUPS)}.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = [value for name, value in present_parameters(model).items() if name in chosen]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def fingerprint(model: LensModel) -> str:
    """A short name of the weights, equal for equal weights on every TransformerLens version."""
    digest = hashlib.sha256()
    for name, weight in sorted(present_weights(model).items()):
        digest.update(name.encode())
        digest.update(weight.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


# On TransformerLens 4.x a copied bridge keeps hooks that point weakly at the original, and fails without it.
ORIGINALS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def copy_model(model: LensModel) -> LensModel:
    """A copy in eval mode; `model` is left as it is."""
    device = next(model.parameters()).device
    with torch.no_grad():  # a bridge holds on to its last activations, and a graph among them cannot be copied
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    copied = copy.deepcopy(model).eval()
    ORIGINALS[copied] = model
    return copied
