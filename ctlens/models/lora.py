"""Low-rank adapters: torch parametrizations that train a small update beside frozen weights.

An update is worked out as one matrix of outputs by inputs and then laid out as the weight it is added
to, so that a rank means the same on a `HookedTransformer`, which keeps its heads apart, and on a bridge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ctlens.core.arguments import require_types
from ctlens.core.config import from_dict, generator, to_dict
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import write_json
from ctlens.core.limits import POSITIVE, require
from ctlens.core.reading import read_json
from ctlens.core.types import LensModel, widened
from ctlens.models.matrices import MATRICES, Slot, slots
from ctlens.models.parameters import copy_model, fingerprint, gathered, require_whole, same_fingerprint
from ctlens.models.sharding import folder_for, is_first
from ctlens.models.weights import copy_weights

CONFIG_FILE = "adapters.json"
ADAPTERS_FILE = "adapters.safetensors"


@dataclass(frozen=True)
class LoRA:
    """A LoRA says which matrices get a low-rank update `alpha / rank * B A`, and of which rank.

    Attributes:
        rank: of every update.
        alpha: its scale, before it is divided by the rank.
        target_modules: the matrices that get one in every layer, among `q`, `k`, `v`, `o`, `mlp_in`,
            `mlp_gate` and `mlp_out`.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q", "v")

    EARLIER_NAMES: ClassVar[Mapping[str, str]] = {"sites": "target_modules"}

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise CtlensError(f"the rank of an adapter must be a whole number of at least 1, not {self.rank}.")
        require_types(self)
        require(POSITIVE, alpha=self.alpha)
        for matrix in self.target_modules:
            if matrix not in MATRICES:
                raise unknown("matrix in target_modules", matrix, MATRICES)
        if not self.target_modules or len(set(self.target_modules)) < len(self.target_modules):
            raise CtlensError(f"name at least one matrix in target_modules, and each once: {', '.join(MATRICES)}.")


class LowRank(nn.Module):
    """The update of one weight; the parametrization that adds it.

    It is kept in float32 at least: in bfloat16 most steps of a usual learning rate would round to nothing.

    Args:
        lora: its rank and scale.
        A: from the inputs to the rank.
        B: from the rank to the outputs.
        pattern: einops pattern from `outputs inputs` to the layout of the weight; None where they agree.
        sizes: of the axes that the pattern splits.
    """

    def __init__(
        self,
        lora: LoRA,
        A: Float[Tensor, "rank d_in"],
        B: Float[Tensor, "d_out rank"],
        pattern: str | None,
        sizes: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.lora = lora
        self.pattern = pattern
        self.sizes = dict(sizes)
        self.enabled = True
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight with its update, or as it is inside `adapters_off`."""
        if not self.enabled:
            return weight
        update = self.lora.alpha / self.lora.rank * (self.B @ self.A)
        laid_out = rearrange(update, self.pattern, **self.sizes) if self.pattern else update
        return weight + laid_out.to(weight.dtype)


def add_adapters(model: LensModel, lora: LoRA, seed: int = 0) -> list[nn.Parameter]:
    """Freezes all weights and adds adapters that change nothing yet (`B` is zero, `A` random).

    Args:
        model: changed in place.
        lora: rank and matrices.
        seed: of `A`; the global random state is left alone. Equal on all classes of one model.

    Returns:
        What is trainable: `A` and `B` of every matrix.

    Raises:
        CtlensError: the model has adapters already, lacks a matrix, or has one too small for the rank.
    """
    chosen = _free_slots(model, lora)
    return _attach(model, chosen, lora, _initial(chosen, lora, seed))


def fill_adapters(model: LensModel, lora: LoRA, seed: int = 0) -> None:
    """Gives adapters that were added to weights without numbers, on the meta device, the numbers that they begin with.

    Args:
        model: changed in place.
        lora: as of `add_adapters`.
        seed: as of `add_adapters`.
    """
    attached = _attached(model)
    tensors = _initial({name: slot for name, (slot, _) in attached.items()}, lora, seed)
    for name, (_, adapter) in attached.items():
        adapter.A = nn.Parameter(tensors[f"{name}.A"].to(adapter.A.dtype))
        adapter.B = nn.Parameter(tensors[f"{name}.B"].to(adapter.B.dtype))


@contextmanager
def adapters_off(model: LensModel) -> Iterator[None]:
    """Inside the block the model is, bit for bit, the one that the adapters were added to.

    Raises:
        CtlensError: the model has no adapters.
    """
    adapters = [adapter for _, adapter in _attached(model).values()]
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


def has_adapters(model: LensModel) -> bool:
    """Whether `add_adapters` was used on the model, and its adapters not merged since."""
    return any(_adapter(slot) for slot in slots(model, MATRICES).values())


@torch.no_grad()
def merge_adapters(model: LensModel) -> None:
    """Adds the adapters' updates to the weights and removes the adapters; all weights stay frozen.

    A model that shares its weights with this one keeps its own.

    Raises:
        CtlensError: the model has no adapters.
    """
    require_whole(model)
    for slot, _ in _attached(model).values():
        merged = getattr(slot.module, slot.name)
        weight = slot.weight
        _own_class(slot.module)
        parametrize.remove_parametrizations(slot.module, slot.name, leave_parametrized=False)
        weight.data = merged.clone()  # and not written in place: a model may share its frozen weights with another


def merged_copy(model: LensModel) -> LensModel:
    """A copy in eval mode whose adapters, if there are any, are in its weights; `model` is left as it is."""
    copied = copy_model(model)
    if has_adapters(copied):
        merge_adapters(copied)
    return copied


def adapter_tensors(model: LensModel) -> tuple[LoRA, dict[str, Tensor]]:
    """The settings of a model's adapters, and each `A` and `B` by its name, for example `blocks.0.q.A`.

    Raises:
        CtlensError: the model has no adapters.
    """
    attached = _attached(model)
    lora = next(adapter.lora for _, adapter in attached.values())
    halves = {name: adapter.named_parameters() for name, (_, adapter) in attached.items()}
    return lora, {f"{name}.{half}": value.detach() for name, both in halves.items() for half, value in both}


def save_adapters(model: LensModel, folder: str | Path) -> None:
    """Writes the adapters alone into a new folder: `adapters.json` and `adapters.safetensors`.

    Raises:
        CtlensError: the model has no adapters, or the folder exists and is not empty.
    """
    lora, tensors = adapter_tensors(model)
    with adapters_off(model):
        base = fingerprint(model)
    plain = {name: gathered(value).cpu().contiguous() for name, value in tensors.items()}
    with folder_for(model, folder) as work:
        if is_first(model):
            save_file(plain, work / ADAPTERS_FILE)
            write_json(work / CONFIG_FILE, {"lora": to_dict(lora), "base": base})


def load_adapters(model: LensModel, folder: str | Path) -> list[nn.Parameter]:
    """Adds the adapters that `save_adapters` wrote to the model that they were trained on.

    Args:
        model: the reference, without adapters; changed in place as by `add_adapters`.
        folder: of `save_adapters`, or `adapters` in the folder of a run.

    Returns:
        What is trainable, as `add_adapters`.

    Raises:
        CtlensError: the folder holds no adapters, or those of a model with other weights.
    """
    folder = Path(folder)
    match read_json(folder / CONFIG_FILE):
        case {"lora": dict(options), "base": str(base)}:
            lora = from_dict(LoRA, options)
        case _:
            raise CtlensError(f"{folder / CONFIG_FILE} does not describe adapters that ctlens saved.")
    _free_slots(model, lora)
    if not same_fingerprint(base, fingerprint(model)):
        raise CtlensError(f"the adapters in {folder} belong to a model with other weights: load the one they are from.")
    try:
        saved = load_file(folder / ADAPTERS_FILE)
    except (OSError, SafetensorError) as error:
        raise CtlensError(f"{folder / ADAPTERS_FILE} cannot be read: {error}.") from None
    return attach_adapters(model, lora, saved)


def attach_adapters(model: LensModel, lora: LoRA, tensors: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Adds adapters with these values, which are named as those of `adapter_tensors`; raises as `add_adapters`."""
    chosen = _free_slots(model, lora)
    targets = _initial(chosen, lora, seed=0)
    copy_weights(targets, tensors)
    return _attach(model, chosen, lora, targets)


def _free_slots(model: LensModel, lora: LoRA) -> dict[str, Slot]:
    if has_adapters(model):
        raise CtlensError("the model has adapters already: merge_adapters first, or start from a copy without them.")
    chosen = slots(model, lora.target_modules)
    for layer in range(len(cast(Any, model).blocks)):
        for matrix in lora.target_modules:
            if f"blocks.{layer}.{matrix}" not in chosen:
                raise CtlensError(
                    f"layer {layer} of this model has no separate matrix {matrix}: leave it out of target_modules."
                )
    for name, slot in chosen.items():
        if lora.rank > min(slot.matrix_shape):
            raise CtlensError(f"{name} allows no rank above {min(slot.matrix_shape)}: lower {lora.rank}.")
    return chosen


def _initial(chosen: Mapping[str, Slot], lora: LoRA, seed: int) -> dict[str, Tensor]:
    """`A` uniform up to `1 / sqrt(inputs)`, as is usual, and `B` zero."""
    tensors = {}
    for name, slot in chosen.items():
        d_out, d_in = slot.matrix_shape
        uniform = torch.rand(lora.rank, d_in, generator=generator(seed, "adapters", name))
        tensors[f"{name}.A"] = (2 * uniform - 1) / math.sqrt(d_in)
        tensors[f"{name}.B"] = torch.zeros(d_out, lora.rank)
    return tensors


def _attach(
    model: LensModel, chosen: Mapping[str, Slot], lora: LoRA, tensors: Mapping[str, Tensor]
) -> list[nn.Parameter]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trainable = []
    for name, slot in chosen.items():
        wide = widened(slot.weight[:0]).dtype
        A = tensors[f"{name}.A"].to(slot.weight.device, wide)
        B = tensors[f"{name}.B"].to(slot.weight.device, wide)
        adapter = LowRank(lora, A, B, slot.pattern, slot.sizes)
        parametrize.register_parametrization(slot.module, slot.name, adapter)
        _own_class(slot.module)
        trainable += [adapter.A, adapter.B]
    return trainable


def _adapter(slot: Slot) -> LowRank | None:
    if not parametrize.is_parametrized(slot.module, slot.name):
        return None
    held = cast(Any, slot.module).parametrizations[slot.name]
    return next((adapter for adapter in held if isinstance(adapter, LowRank)), None)


def _own_class(module: nn.Module) -> None:
    """Gives a module the class in which torch keeps its adapters for itself alone, and fit to be copied.

    Deep copies share that class, and taking an adapter off one would break the others. Its `__deepcopy__`
    shines through the layer of a bridge around the module: a copy would lack that layer and its hooks.
    """
    shared = type(module)
    own = {name: value for name, value in vars(shared).items() if name not in ("__deepcopy__", "__getstate__")}
    cast(Any, module).__class__ = type(shared.__name__, shared.__bases__, own)


def _attached(model: LensModel) -> dict[str, tuple[Slot, LowRank]]:
    found = {name: (slot, _adapter(slot)) for name, slot in slots(model, MATRICES).items()}
    attached = {name: (slot, adapter) for name, (slot, adapter) in found.items() if adapter is not None}
    if not attached:
        raise CtlensError("the model has no adapters: add_adapters or load_adapters first.")
    return attached
