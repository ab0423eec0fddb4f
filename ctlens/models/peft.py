"""PEFT's format of low-rank adapters, read onto a model and written from one.

PEFT adapts the layers that HuggingFace has, each with a rank and a scale of its own. Here a matrix is adapted in every
layer, with one rank and scale for all, and a fused layer is several matrices. What is missing is filled with zeros: a
row of `A` with zeros for its column of `B` adds nothing, and no gradient reaches either, so that ranks stay what they
were when the adapters are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ctlens.core.errors import CtlensError
from ctlens.core.files import write_json
from ctlens.core.reading import read_json
from ctlens.core.types import LensModel
from ctlens.models.bridges import huggingface_config
from ctlens.models.lora import LoRA, adapter_tensors, adapters_off, attach_adapters, has_adapters
from ctlens.models.matrices import MATRICES, Slot, slots
from ctlens.models.parameters import fingerprint, present_parameters
from ctlens.models.parity import lens_answers, narrowed, original_answers, probe_prompts, require_parity
from ctlens.models.sources import MERGE, PEFT_FILE
from ctlens.models.twins import INTERLEAVED, SPLIT_LAYERS, huggingface_twin

_WEIGHTS_FILE = "adapter_model.safetensors"
_BASE = "ctlens_base"
"""The key, in the header of the weights, of the mark of the model that adapters of ours belong to."""
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_PREFIX = "base_model.model."
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""The values of `init_lora_weights` that leave the base's weights as they are."""
_READ = frozenset(
    (
        *("base_model_name_or_path", "revision", "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern"),
        *("alpha_pattern", "init_lora_weights"),
        # These say which layers have an update, how it began, or how it was trained: the tensors say the first.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("eva_config", "lora_dropout", "task_type", "inference_mode", "auto_mapping", "peft_version"),
        *("megatron_core", "qalora_group_size", "runtime_config"),
    )
)
"""The settings of PEFT whose every value is known here; all others must be off."""
_OFF = (None, False, "none", [], {})


@dataclass(frozen=True)
class Update:
    """An update `scale * B A` of one layer of a HuggingFace model.

    Attributes:
        A: from the inputs to the rank.
        B: from the rank to the outputs.
        scale: alpha by rank, or by its root.
    """

    A: Float[Tensor, "rank d_in"]
    B: Float[Tensor, "d_out rank"]
    scale: float


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter is a folder's low-rank updates, by the path of their layer in the HuggingFace model.

    Attributes:
        folder: it comes from.
        base: the name of the model that it was trained on; empty if it does not say.
        revision: of the base on the hub.
        updates: by layer.
        mark: of the base, from `base_mark`; None if the folder is not ours.
    """

    folder: Path
    base: str
    revision: str | None
    updates: Mapping[str, Update]
    mark: str | None


def read_peft(folder: Path) -> PeftAdapter:
    """Reads the folder of a PEFT adapter.

    Raises:
        CtlensError: a file is missing or damaged, or the adapter is more than low-rank updates of layers.
    """
    settings = read_json(folder / PEFT_FILE)
    _require_low_rank(folder, settings)
    tensors, mark = _tensors(folder)
    names = sorted({name.removesuffix(half) for name in tensors for half in (_A, _B) if name.endswith(half)})
    odd = sorted(tensors.keys() - {name + half for name in names for half in (_A, _B)})
    lone = [name for name in names if any(name + half not in tensors for half in (_A, _B))]
    if odd or lone or not names:
        what = (*odd, *lone, "nothing")[0]
        raise CtlensError(f"{folder / _WEIGHTS_FILE} holds {what}, which is no low-rank update: {MERGE}.")
    updates = {}
    for name in names:
        layer = name.removeprefix(_PREFIX)
        A = tensors[name + _A]
        B = tensors[name + _B]
        if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or not (A.isfinite().all() and B.isfinite().all()):
            raise CtlensError(f"{folder / _WEIGHTS_FILE} holds no usable update of {layer}: save the adapter again.")
        alpha = _of_pattern(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", 8))
        updates[layer] = Update(A, B, float(alpha) / (len(A) ** 0.5 if settings.get("use_rslora") else len(A)))
    base = settings.get("base_model_name_or_path") or ""
    return PeftAdapter(folder, str(base), settings.get("revision"), updates, mark)


def _require_low_rank(folder: Path, settings: Mapping[str, Any]) -> None:
    wrong = [key for key, value in settings.items() if key not in _READ and value not in _OFF]
    if settings.get("peft_type") != "LORA":
        wrong = ["peft_type"]
    elif not wrong and settings.get("init_lora_weights") not in _INITIAL:
        wrong = ["init_lora_weights"]  # of a base whose weights changed before the first step
    if wrong:
        raise CtlensError(
            f"{folder} is a PEFT adapter that cannot be added as low-rank updates, because its {PEFT_FILE} has "
            f"{wrong[0]}={settings.get(wrong[0])!r:.60}: {MERGE}."
        )


def _tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of an adapter, and the mark of its base, if it has one."""
    path = folder / _WEIGHTS_FILE
    if not path.is_file():
        raise CtlensError(
            f"{folder} holds no {_WEIGHTS_FILE}, and other forms may run any command when they are read: save the "
            "adapter again with PEFT's save_pretrained."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, (file.metadata() or {}).get(_BASE)
    except (OSError, SafetensorError) as error:
        raise CtlensError(f"{path} cannot be read: {error}.") from None


def _of_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a layer's path, as PEFT matches it."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)


@dataclass(frozen=True)
class _Layer:
    """A layer of a HuggingFace model, and the matrices that are here its parts.

    Attributes:
        names: of the matrices, in the order of the layer's outputs.
        d_outs: how many outputs each of them has.
        d_in: inputs.
        heads: of a layer that keeps the query, key and value of a head together; else 0.
    """

    names: tuple[str, ...]
    d_outs: tuple[int, ...]
    d_in: int
    heads: int

    def split(self, B: Tensor) -> list[Tensor]:
        """The rows of each matrix, of an update's `B`."""
        if self.heads:
            B = rearrange(B, "(head three d_head) rank -> (three head d_head) rank", head=self.heads, three=3)
        return list(B.split(self.d_outs))

    def join(self, parts: list[Tensor]) -> Tensor:
        """The `B` of the whole layer, of which each part has ranks of its own."""
        B = torch.block_diag(*parts)
        if self.heads:
            B = rearrange(B, "(three head d_head) rank -> (head three d_head) rank", head=self.heads, three=3)
        return B


def _layers(model: LensModel) -> dict[str, _Layer]:
    """The layers that adapters can be on, by their path in the HuggingFace model behind a bridge."""
    paths = {id(value): name.removesuffix(".weight") for name, value in present_parameters(model).items()}
    found: dict[str, dict[int, tuple[str, Slot]]] = {}
    for name, slot in slots(model, MATRICES).items():
        layer, number = _whole(paths[id(slot.weight)])
        found.setdefault(layer, {})[number] = (name, slot)
    layers = {}
    for layer, parts in found.items():
        names, chosen = zip(*(parts[number] for number in sorted(parts)), strict=True)
        shapes = [slot.matrix_shape for slot in chosen]
        heads = model.cfg.n_heads if layer.endswith(INTERLEAVED) else 0
        layers[layer] = _Layer(names, tuple(d_out for d_out, _ in shapes), shapes[0][1], heads)
    return layers


def _whole(path: str) -> tuple[str, int]:
    """The layer of HuggingFace's model that a bridge's layer is a part of, and the number of the part."""
    for whole, parts in SPLIT_LAYERS.items():
        for number, part in enumerate(parts):
            if path.endswith(f".{part}"):
                return path.removesuffix(part) + whole, number
    return path, 0


def add_peft(model: LensModel, adapter: PeftAdapter) -> None:
    """Adds an adapter to its base, as `add_adapters` does.

    Args:
        model: the base, a bridge to a HuggingFace model; changed in place.
        adapter: from `read_peft`.

    Raises:
        CtlensError: the adapter belongs to another model, or the model has adapters already.
    """
    layers = _layers(model)
    for path, update in adapter.updates.items():
        layer = layers.get(path)
        if layer is None or (len(update.B), update.A.shape[1]) != (sum(layer.d_outs), layer.d_in):
            raise CtlensError(
                f"the adapter in {adapter.folder} belongs to another model: there is no layer {path} of its shape; "
                f"give its base with base=, or {MERGE}."
            )
    if adapter.mark and _same_dtype(adapter.mark, mark := base_mark(model)) and adapter.mark != mark:
        raise CtlensError(
            f"the adapter in {adapter.folder} belongs to a model with other weights: give its own base with base=."
        )
    rank = max(len(update.A) for update in adapter.updates.values())
    scale = next(iter(adapter.updates.values())).scale
    given: dict[str, Tensor] = {}
    for path, update in adapter.updates.items():
        for name, part in zip(layers[path].names, layers[path].split(update.B.float()), strict=True):
            given[f"{name}.A"] = pad(update.A.float(), (0, 0, 0, rank - len(update.A)))
            given[f"{name}.B"] = pad(part * (update.scale / scale), (0, rank - len(update.A)))
    adapted = {name.split(".")[2] for name in given}
    matrices = tuple(matrix for matrix in MATRICES if matrix in adapted)
    for name, slot in slots(model, matrices).items():
        d_out, d_in = slot.matrix_shape
        given.setdefault(f"{name}.A", torch.zeros(rank, d_in))
        given.setdefault(f"{name}.B", torch.zeros(d_out, rank))
    attach_adapters(model, LoRA(rank, scale * rank, matrices), given)


def base_mark(model: LensModel) -> str:
    """A short name of the weights beneath a model's adapters, and of their dtype, which rounds them."""
    with adapters_off(model) if has_adapters(model) else nullcontext():
        return f"{next(model.parameters()).dtype} {fingerprint(model).partition('-')[0]}"


def _same_dtype(one: str, other: str) -> bool:
    return one.partition(" ")[0] == other.partition(" ")[0]


def peft_updates(model: LensModel) -> dict[str, Update]:
    """The updates of the adapters on a HuggingFace model, by layer; a fused layer has the ranks of all its parts.

    Raises:
        CtlensError: the model has no adapters.
    """
    lora, tensors = adapter_tensors(model)
    updates = {}
    for path, layer in _layers(model).items():
        A = [tensors[f"{name}.A"].cpu() for name in layer.names if f"{name}.A" in tensors]
        if A:
            bare = zip(layer.names, (torch.zeros(d_out, 0) for d_out in layer.d_outs), strict=True)
            B = layer.join([tensors.get(f"{name}.B", nothing).cpu() for name, nothing in bare])
            updates[path] = Update(torch.cat(A), B, lora.alpha / lora.rank)
    return updates


@torch.no_grad()
def add_updates(hf: PreTrainedModel, updates: Mapping[str, Update]) -> None:
    """Adds updates to the weights of a HuggingFace model by what PEFT says of them, without any of our names."""
    for path, update in updates.items():
        layer = cast(Any, hf.get_submodule(path))
        delta = (update.scale * (update.B.float() @ update.A.float())).to(layer.weight.device)
        layer.weight += (delta.T if isinstance(layer, Conv1D) else delta).to(layer.weight.dtype)


@torch.no_grad()
def require_added(model: LensModel, adapter: PeftAdapter) -> None:
    """Refuses a model whose adapters do not do what the adapter's file says, added to HuggingFace's own weights.

    Raises:
        CtlensError: the logits differ by more than rounding.
    """
    with adapters_off(model):
        twin = huggingface_twin(model)
    add_updates(twin, adapter.updates)
    prompts = probe_prompts(twin.config)
    with narrowed(twin.config, huggingface_config(model)):
        expected = original_answers(twin, prompts)
        require_parity(f"{type(twin).__name__} with an adapter", lens_answers(model, prompts), expected)


def write_peft(folder: Path, updates: Mapping[str, Update], *, base: str, mark: str, hf: PreTrainedModel) -> None:
    """Writes the two files of a PEFT adapter.

    Args:
        folder: an existing one.
        updates: by layer of the base.
        base: the folder, or the name on the hub, that PEFT loads the base from.
        mark: of the base, from `base_mark`.
        hf: the base, or a model of its architecture.
    """
    tensors = {}
    for path, update in updates.items():
        tensors[f"{_PREFIX}{path}{_A}"] = update.A.float().contiguous()
        tensors[f"{_PREFIX}{path}{_B}"] = update.B.float().contiguous()
    save_file(tensors, folder / _WEIGHTS_FILE, metadata={"format": "pt", _BASE: mark})
    rank = min(len(update.A) for update in updates.values())
    scale = next(iter(updates.values())).scale
    wider = {re.escape(path): len(update.A) for path, update in updates.items() if len(update.A) > rank}
    settings = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True},
        **{"r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none"},
        "rank_pattern": wider,
        "alpha_pattern": {path: scale * wide for path, wide in wider.items()},
        "target_modules": _targets(updates, [name for name, _ in hf.named_modules()]),
        "fan_in_fan_out": any(isinstance(hf.get_submodule(path), Conv1D) for path in updates),
    }
    write_json(folder / PEFT_FILE, settings)


def _targets(layers: Collection[str], modules: Collection[str]) -> list[str]:
    """The ends of paths that name these layers and no others, or else the paths themselves."""
    ends = {re.sub(r".*\.\d+\.", "", layer) for layer in layers}
    named = [module for module in modules if any(module.endswith(f".{end}") for end in ends)]
    return sorted(ends if set(named) <= set(layers) else layers)
