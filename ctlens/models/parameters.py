"""The parameters of a model: in groups, frozen or trained, and copied."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.files import digest_of
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.models.bridges import huggingface_config, plain_settings

GROUPS = ("embed", "attn", "mlp", "norm", "unembed")
OTHER_SENSES = ("vision", "multi_modal", "audio")  # parts of a model that text does not pass through
WRAPPED_MODULE = "._original_component"
PARAMETRIZED = ".parametrizations."
# Settings that change no logit: of HuggingFace's configurations, whose `to_diff_dict` leaves out what has its default,
SILENT_SETTINGS = (
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "return_dict", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
    # and of TransformerLens's: where a model is from, how it began, what it shows.
    *("architecture", "checkpoint_index", "checkpoint_label_type", "checkpoint_value", "from_checkpoint", "model_name"),
    *("device", "init_mode", "init_weights", "initializer_range", "n_devices", "n_params", "original_architecture"),
    *("seed", "tokenizer_name", "tokenizer_prepends_bos", "tokenizer_appends_eos", "default_prepend_bos"),
    *("default_padding_side", "trust_remote_code", "use_attn_in", "use_attn_result", "use_hook_mlp_in"),
    *("use_split_qkv_input", "ungroup_grouped_query_attention"),
)
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


def is_made_here(model: LensModel) -> bool:
    """Whether ctlens itself built an adopted model: of TransformerLens's own models, these alone lack biases."""
    return huggingface_config(model) is None and bool(getattr(model, "ctlens_absent", None))


def present_parameters(model: LensModel) -> dict[str, nn.Parameter]:
    """The parameters that the architecture has, by a name that does not depend on the bridge's version.

    Parameters of adapters are not among them: an adapted weight stands here as it is without its adapter.
    """
    absent = getattr(model, "ctlens_absent", frozenset())
    plain = ((plain_name(name), value) for name, value in model.named_parameters())
    return {name: value for name, value in plain if name not in absent and PARAMETRIZED not in name}


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of a sharded model, which all processes gather together; any other is whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which is all of it unless its model is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def require_whole(model: LensModel) -> None:
    """Refuses a model that is not `is_whole`, for what takes weights by themselves."""
    if not is_whole(model):
        raise CtlensError(
            "this takes the weights by themselves, which are split among processes or lie on disk: load the model, or "
            "the folder of its run, without shard and without device_map."
        )


def is_whole(model: LensModel) -> bool:
    """Whether all weights are there: not those of a sharded model, nor those that accelerate fetches for each pass."""
    laid_out = bool(getattr(getattr(model, "original_model", None), "hf_device_map", None))
    return not any(isinstance(value, DTensor) or (laid_out and value.is_meta) for value in model.parameters())


@torch.no_grad()
def present_weights(model: LensModel) -> dict[str, Tensor]:
    """The weights that the model computes with: `present_parameters` with the adapters' updates added."""
    adapted: dict[int, Tensor] = {}
    for module in cast(nn.Module, model).modules():
        if parametrize.is_parametrized(module):
            for name, held in cast(nn.ModuleDict, module.parametrizations).items():
                adapted[id(held.original)] = _adapted(module, name, held)
    return {name: adapted.get(id(value), value.detach()) for name, value in present_parameters(model).items()}


def _adapted(module: nn.Module, name: str, held: nn.Module) -> Tensor:
    """A weight with its adapter's update, of which a process that shares the model keeps its slice."""
    original = cast(Tensor, held.original)
    if not isinstance(original, DTensor):
        return getattr(module, name)
    parts = {name: gathered(value) for name, value in held.named_parameters()}
    found = torch.func.functional_call(held, parts, ())
    return distribute_tensor(found, original.device_mesh, original.placements, src_data_rank=None)


def state_buffers(model: LensModel) -> dict[str, Tensor]:
    """The buffers of a HuggingFace model that are part of its state, as the corrections of a router are.

    HuggingFace keeps them in a model's files as it keeps the parameters; all others follow from the configuration.
    """
    if huggingface_config(model) is None:
        return {}
    lens = cast(Any, model)
    # TransformerLens 4.x keeps the zero unembedding bias, which it adds, in a buffer.
    added = getattr(lens.unembed.original_component, "bias", None)
    buffers = persistent_buffers(lens.original_model)
    return {plain_name(name): value for name, value in buffers.items() if value is not added}


def saved_tensors(model: LensModel) -> dict[str, Tensor]:
    """What the folder of a HuggingFace model keeps of it: `present_weights` and `state_buffers`."""
    return present_weights(model) | state_buffers(model)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a module keeps in its files."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    }


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


@contextmanager
def evaluating(model: LensModel) -> Iterator[None]:
    """Puts a model in eval mode inside the block and restores the mode of each of its modules after it."""
    # A bridge passes its mode on to the model behind it, whose modules are not among its own.
    parts = [cast(nn.Module, part) for part in (model, getattr(model, "original_model", None)) if part is not None]
    training = [module for part in parts for module in part.modules() if module.training]
    if not training:  # setting a mode takes ten times as long as a look
        yield
        return
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def fingerprint(model: LensModel) -> str:
    """A short name of what the model computes: of its weights and, behind a hyphen, of what else a model brings along.

    That is, for a HuggingFace model, its state buffers and its configuration, which two models of equal weights may
    differ in; and for a TransformerLens model of the user's own its configuration. Models made here follow from their
    weights.
    """
    digest = _digest(present_weights(model))
    config = huggingface_config(model)
    if config is None:
        return digest if is_made_here(model) else f"{digest}-{digest_of(_computing(plain_settings(model)))}"
    return f"{digest}-{digest_of([_computing(config.to_diff_dict()), _digest(state_buffers(model))])}"


def same_fingerprint(recorded: object, current: str) -> bool:
    """Whether a fingerprint from a file is the current one; those of ctlens 0.1 are of the weights alone."""
    return recorded == current or recorded == current.partition("-")[0]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(gathered(tensor.detach()).cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _computing(config: Any) -> Any:
    """A configuration without the settings that change no logit, ready for JSON."""
    if isinstance(config, Mapping):
        return {str(key): _computing(value) for key, value in config.items() if key not in SILENT_SETTINGS}
    if isinstance(config, list | tuple):
        return [_computing(value) for value in config]
    return config if isinstance(config, str | int | float | bool | None) else str(config)


# On TransformerLens 4.x a copied bridge keeps hooks that point weakly at the original, and fails without it.
ORIGINALS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def copy_model(model: LensModel, *, share_weights: bool = False) -> LensModel:
    """A copy in eval mode; `model` is left as it is.

    Args:
        model: the original.
        share_weights: the copy's parameters lie where the model's lie, and take no memory of their own. For a copy
            whose weights stay frozen beside adapters; whoever writes into the weights of one changes both.

    Raises:
        CtlensError: the model is not `is_whole`.
    """
    require_whole(model)
    device = next(model.parameters()).device
    # A bridge holds on to its last activations, and a graph among them cannot be copied. Dropout would draw numbers.
    with torch.no_grad(), evaluating(model):
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    there: dict[int, Any] = {id(model.tokenizer): model.tokenizer}  # both read text alike
    if share_weights:
        # Parameters of its own, because what is frozen in the copy stays as it is in the model.
        there |= {id(value): nn.Parameter(value.detach(), value.requires_grad) for value in model.parameters()}
    copied = copy.deepcopy(model, there).eval()
    ORIGINALS[copied] = model
    return copied
