"""Weights by name and by what they do, wherever a model class keeps them and however it lays them out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.parameters import parameter_groups, present_parameters
from ctlens.models.weights import NATIVE_LAYOUT, TRANSPOSED


class _Location(NamedTuple):
    """A location says where the blocks of a model keep a matrix.

    Attributes:
        part: of the block.
        layer: of a bridge's part.
        weights: of a HookedTransformer's part; the first one that is there holds the matrix, which under
            grouped-query attention has a name of its own.
        layout: key of the weight's layout in `NATIVE_LAYOUT`.
    """

    part: str
    layer: str
    weights: tuple[str, ...]
    layout: str


_LOCATIONS = {
    "q": _Location("attn", "q", ("W_Q",), "attn.q.weight"),
    "k": _Location("attn", "k", ("_W_K", "W_K"), "attn.k.weight"),
    "v": _Location("attn", "v", ("_W_V", "W_V"), "attn.v.weight"),
    "o": _Location("attn", "o", ("W_O",), "attn.o.weight"),
    "mlp_in": _Location("mlp", "in", ("W_in",), "mlp.in.weight"),
    "mlp_gate": _Location("mlp", "gate", ("W_gate",), "mlp.gate.weight"),
    "mlp_out": _Location("mlp", "out", ("W_out",), "mlp.out.weight"),
}
MATRICES = tuple(_LOCATIONS)
"""The names of a block's matrices, as adapters and analyses of weights take them."""
CANONICAL_NAMES = {matrix: NATIVE_LAYOUT[location.layout][0] for matrix, location in _LOCATIONS.items()}
"""The weight of a model made here that each of them is, by its name in a block (see `ctlens.models.weights`)."""

COMPONENTS = ("qk", "ov", "mlp", "norm", "embed", "unembed")
TIED = "embed+unembed"
HALVES = {"q": "qk", "k": "qk", "v": "ov", "o": "ov", "q_norm": "qk", "k_norm": "qk"}
OF_HEADS = re.compile(r"_?[Wb]_([QKVO])$")


@dataclass(frozen=True)
class Slot:
    """A slot is one matrix of a model, where the model keeps it.

    Attributes:
        module: the one that holds it.
        name: of the parameter in the module.
        pattern: einops pattern from `outputs inputs` to its layout; None where they agree.
    """

    module: nn.Module
    name: str
    pattern: str | None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, without the adapter that may be on it."""
        if parametrize.is_parametrized(self.module, self.name):
            return cast(Any, self.module).parametrizations[self.name].original
        return self.module.get_parameter(self.name)

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axis that `pattern` splits."""
        per_head = self.pattern is not None and "(head" in self.pattern
        return {"head": self.weight.shape[0]} if per_head else {}

    @property
    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """The weight that the module computes with, its adapter added, as one matrix of outputs by inputs."""
        weight = getattr(self.module, self.name)
        return rearrange(weight, " -> ".join(reversed(self.pattern.split(" -> ")))) if self.pattern else weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs and inputs of the weight as one matrix."""
        return self.matrix.shape[0], self.matrix.shape[1]


def slots(model: LensModel, matrices: Iterable[str]) -> dict[str, Slot]:
    """Finds matrices, some of `MATRICES`, in every layer; each is called by both, for example `blocks.0.q`.

    A matrix is left out where a layer lacks it or, as the halves of a fused matrix, does not compute with it.
    """
    present = {id(parameter) for parameter in present_parameters(model).values()}
    found = {}
    for layer, block in enumerate(cast(Any, model).blocks):
        for matrix in matrices:
            slot = _slot(block, matrix)
            if slot is not None and id(slot.weight) in present:
                found[f"blocks.{layer}.{matrix}"] = slot
    return found


def _slot(block: Any, matrix: str) -> Slot | None:
    location = _LOCATIONS[matrix]
    part = getattr(block, location.part, None)
    linear = getattr(getattr(part, location.layer, None), "original_component", None)
    if isinstance(linear, nn.Linear):
        return Slot(linear, "weight", None)
    if isinstance(linear, Conv1D):
        return Slot(linear, "weight", TRANSPOSED)
    for name in location.weights:
        if part is not None and (name in part._parameters or parametrize.is_parametrized(part, name)):
            return Slot(part, name, NATIVE_LAYOUT[location.layout][1])
    return None


def components(model: LensModel) -> dict[str, tuple[int | None, str]]:
    """Of every parameter that the architecture has, its block (None outside the blocks) and its component.

    A component is one of `COMPONENTS`, or `TIED` where one matrix embeds and unembeds.

    Raises:
        CtlensError: an attention keeps queries, keys and values in one matrix.
    """
    blocks = cast(Any, model).blocks
    owner = {id(parameter): layer for layer, block in enumerate(blocks) for parameter in block.parameters()}
    halves = {number: half for block in blocks for number, half in _halves(block.attn).items()}
    groups = parameter_groups(model)
    parameters = present_parameters(model)
    found = {}
    for group, names in groups.items():
        for name in names:
            number = id(parameters[name])
            component = TIED if group == "embed" and not groups["unembed"] else group
            if group == "attn":
                component = halves.get(number)
            if component is None:
                raise CtlensError(f"{name} is not split into queries, keys and values: QK and OV cannot be told apart.")
            found[name] = owner.get(number), component
    return found


def _halves(attn: nn.Module) -> dict[int, str]:
    """Of the parameters of an attention, by their identity, whether they belong to QK or to OV."""
    found = {}
    for name, half in HALVES.items():
        part = getattr(attn, name, None)
        found |= {id(parameter): half for parameter in part.parameters()} if isinstance(part, nn.Module) else {}
    for name, parameter in attn.named_parameters(recurse=False):
        if named := OF_HEADS.match(name):
            found[id(parameter)] = HALVES[named[1].lower()]
    return found
