"""Building, loading and saving models: the only file that imports TransformerLens.

Weights are always raw: nothing is folded or centred, so that activations are the ones the papers
train on. Models made here are `HookedTransformer`s on TransformerLens 3.x and native
`TransformerBridge`s on 4.x, with the same weights; HuggingFace models are bridges on both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformer_lens.model_bridge.sources.native  # noqa: F401  (3.x registers the native architecture on import)
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.files import write_json
from ctlens.core.public import public
from ctlens.core.reading import read_json
from ctlens.core.types import ChosenRows, LensModel, RowNumbers, device_named, dtype_named
from ctlens.models.adopt import adopt, marked
from ctlens.models.bridges import generation_config, huggingface_config, is_bridge, plain_settings
from ctlens.models.classes import HAS_HOOKED_TRANSFORMER, show_sizes
from ctlens.models.huggingface import first_line, pretrained, pretrained_tokenizer, reading, with_random_weights
from ctlens.models.parameters import (
    copy_model,
    is_made_here,
    plain_name,
    present_parameters,
    present_weights,
    saved_tensors,
    state_buffers,
    without,
)
from ctlens.models.parity import (
    lens_answers,
    narrowed,
    not_causal,
    original_answers,
    probe_prompts,
    require_causal,
    require_finite_answers,
    require_parity,
)
from ctlens.models.peft import add_peft, read_peft, require_added
from ctlens.models.sharded_loading import read_in_slices
from ctlens.models.sharding import is_first, is_sharded, write_joined
from ctlens.models.sharding import shard as sharded
from ctlens.models.sources import (
    GGUF,
    MERGE,
    MODEL_FILE,
    found_on_disk,
    is_laid_out,
    is_peft,
    require_embedded,
    require_model,
    require_plain_model,
)
from ctlens.models.weights import ModelConfig, canonical_weights, copy_weights, initial_weights, is_bias, load_weights

_WEIGHTS_FILE = "weights.safetensors"


@public
def build(
    config: ModelConfig, tokenizer: Any = None, *, seed: int = 0, device: str | torch.device = "cpu"
) -> LensModel:
    """Makes a new model with random weights, the same for one seed on every TransformerLens version.

    Args:
        config: the sizes.
        tokenizer: a fast HuggingFace tokenizer, attached unchanged.
        seed: of the weights; the global random state is left alone.
        device: where the model lives.
    """
    model = _skeleton(config, device, torch.float32)
    load_weights(model, initial_weights(config, seed))
    return _attach(model, tokenizer)


def _skeleton(config: ModelConfig, device: str | torch.device, dtype: torch.dtype) -> LensModel:
    shape = {
        **to_dict(config),
        "d_head": config.d_head,
        "act_fn": "silu",
        "gated_mlp": True,
        "eps": 1e-5,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": True,
        "rotary_dim": config.d_head,
    }
    kind = "HookedTransformer" if HAS_HOOKED_TRANSFORMER else "TransformerBridge"
    model = _of_transformer_lens(kind, shape, device, dtype)
    biases = {plain_name(name): parameter for name, parameter in model.named_parameters() if is_bias(name)}
    for bias in biases.values():
        bias.data.zero_()
    return without(model, biases)


def _of_transformer_lens(
    kind: str, settings: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype
) -> LensModel:
    """A model of TransformerLens's own, with random weights, in eval mode; the global random state is left alone.

    Args:
        kind: `"HookedTransformer"` or `"TransformerBridge"`, which is native then.
        settings: of its configuration.
        device: where it lives.
        dtype: of its weights.

    Raises:
        CtlensError: it is a `HookedTransformer`, and TransformerLens has none any more.
    """
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if kind == "TransformerBridge":
            bridge_config = TransformerBridgeConfig.from_dict({**settings, "dtype": dtype})
            model = cast(Any, TransformerBridge).boot_native(bridge_config, device=device, dtype=dtype)
        elif HAS_HOOKED_TRANSFORMER:
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            model = HookedTransformer(HookedTransformerConfig(**settings, device=str(device), dtype=dtype))
        else:
            raise CtlensError(
                "the folder holds a HookedTransformer, which TransformerLens 4 does not have: load it with "
                "transformer-lens<4."
            )
    return cast(LensModel, model.eval())


@public
def load_model(
    source: str | PathLike[str] | PreTrainedModel | LensModel | Any,  # whatever else it is has a sentence of its own
    *,
    revision: str | None = None,
    base: str | PathLike[str] | PreTrainedModel | LensModel | Any = None,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    check: bool = True,
    shard: bool = False,
) -> LensModel:
    """Loads a model in eval mode: from a folder, a file, the hub or memory.

    A HuggingFace model answers a few short prompts by itself and as a lens model, and is refused unless both give the
    same logits (see `ctlens.models.parity`). An adapter of PEFT stays one, so that the model without it is there too
    (`adapters_off` and `merge_adapters` of `ctlens.models.lora`).

    Args:
        source: a HuggingFace folder of a causal language model; the name of one on the hub, which comes from
            HuggingFace's cache or the network; a `.gguf` file, whose weights become plain ones; a folder of a PEFT
            adapter (LoRA); a folder that `save_model` or `Run.save` wrote; or a model in memory, of HuggingFace or of
            TransformerLens (copied, so that it stays as it is, unless accelerate's `device_map` laid it out).
        revision: a branch, a tag or a commit of a model of the hub.
        base: the model that a PEFT adapter belongs to, as `source`; by default the one that it names.
        tokenizer: a fast HuggingFace tokenizer; by default the one that the source has.
        device: where the model lives; `"auto"` takes an accelerator where there is one.
        dtype: of the weights, or its name, one of `ctlens.core.types.DTYPES`.
        check: whether to compare logits with HuggingFace's; without it, numbers may be those of another model.
        shard: split the weights among the processes of torchrun, those of a HuggingFace folder as they are read.

    Raises:
        CtlensError: the dtype is unknown, this machine lacks the device, the source cannot be had, or it holds no model
            that TransformerLens computes as HuggingFace does, or one that `adopt` refuses; the sentence says which.
    """
    named = dtype_named(dtype) if isinstance(dtype, str) else dtype
    if shard:
        if (in_slices := read_in_slices(source, revision, named, check=check)) is not None:
            return _attach(in_slices, tokenizer or pretrained_tokenizer(found_on_disk(cast(str, source), revision)))
        return sharded(load_model(source, revision=revision, base=base, tokenizer=tokenizer, dtype=named, check=check))
    as_asked = _Loading(tokenizer, device_named(device), named, check)
    if isinstance(source, str | PathLike):
        return _from_disk(source, revision, base, as_asked)
    for name, value in (("revision", revision), ("base", base)):
        if value is not None:
            raise CtlensError(f"a model in memory has no {name}: leave {name}= out.")
    if isinstance(source, LensModel):
        return _copied(source, as_asked)
    hf: Any = require_plain_model(source)
    with reading(f"this {type(hf).__name__}", "Check that it runs by itself"):
        if not is_laid_out(hf):
            hf = copy.deepcopy(hf).to(device=as_asked.device, dtype=as_asked.dtype)
        return _bridge(hf, tokenizer, check)


class _Loading(NamedTuple):
    """How a model is to be loaded; the fields are options of `load_model`."""

    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    check: bool


def _from_disk(source: str | PathLike[str], revision: str | None, base: Any, asked: _Loading) -> LensModel:
    path = found_on_disk(source, revision)
    require_model(path)
    if base is not None and not is_peft(path):
        raise CtlensError(f"{source} is no PEFT adapter, so it has no other model as its base: leave base= out.")
    with reading(str(path)):
        if is_peft(path):
            return _load_peft(path, base, asked)
        if (path / MODEL_FILE).is_file():
            return _load_checkpoint(path, asked)
        hf: Any = pretrained(path, asked.dtype).to(asked.device)  # type: ignore[arg-type]
        hf.config.name_or_path = "" if path.suffix == GGUF else str(source)  # what HuggingFace loads it by
        return _bridge(hf, asked.tokenizer or pretrained_tokenizer(path), asked.check)


def _load_peft(folder: Path, base: Any, asked: _Loading) -> LensModel:
    """The base of a PEFT adapter, with the adapter on it."""
    adapter = read_peft(folder)
    source = adapter.base if base is None else base
    if not source:
        raise CtlensError(f"the PEFT adapter in {folder} names no base model: give it with load_model(..., base=...).")
    if isinstance(source, str | PathLike) and is_peft(Path(source)):
        raise CtlensError(f"the base of the PEFT adapter in {folder}, {source}, is an adapter itself: {MERGE}.")
    tokenizer = asked.tokenizer or pretrained_tokenizer(folder)
    revision = adapter.revision if base is None else None
    try:
        model = load_model(source, revision=revision, **asked._replace(tokenizer=tokenizer)._asdict())
    except CtlensError as error:
        raise CtlensError(f"the base of the PEFT adapter in {folder} (base= gives another): {error}") from None
    add_peft(model, adapter)
    if asked.check:
        require_added(model, adapter)
    return model


def _copied(model: LensModel, asked: _Loading) -> LensModel:
    """A copy of a TransformerLens model of one's own."""
    copied = copy_model(adopt(model))
    nn.Module.to(cast(nn.Module, copied), device=asked.device, dtype=asked.dtype)
    copied.cfg.device = str(asked.device)
    copied.cfg.dtype = asked.dtype
    return _attach(copied, asked.tokenizer)


def _bridge(hf: PreTrainedModel, tokenizer: Any, check: bool) -> LensModel:
    """Wraps `hf` in place; the bridge trains exactly the parameters that HuggingFace's model has."""
    if getattr(hf.config, "is_encoder_decoder", False):
        raise not_causal(hf)
    hf.eval().set_attn_implementation("eager")
    prompts = probe_prompts(hf.config)
    with narrowed(hf.config):
        expected = original_answers(hf, prompts)
    require_finite_answers(hf, expected)
    require_causal(hf, expected)
    with _bridging(hf):
        bridge = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config, tokenizer=None)
        model = cast(LensModel, bridge.eval())
        if check:
            with narrowed(hf.config):
                found = lens_answers(model, prompts)
            require_parity(type(hf).__name__, found, expected)
        marked(model)
    return _attach(model, tokenizer)


@contextmanager
def _bridging(hf: PreTrainedModel) -> Iterator[None]:
    """Turns whatever TransformerLens raises on a model that HuggingFace runs into one sentence."""
    try:
        yield
    except CtlensError:
        raise
    except Exception as error:
        raise CtlensError(
            f"TransformerLens cannot bridge {type(hf).__name__} in {str(hf.dtype).removeprefix('torch.')}: "
            f"{first_line(error)}. `ctlens models` lists what was checked."
        ) from error


def _attach(model: LensModel, tokenizer: Any) -> LensModel:
    """Gives the model its tokenizer as it is: TransformerLens's own setter would add a BOS to a model without one."""
    if tokenizer is not None:
        require_embedded(tokenizer, _n_embeddings(model))
        model.tokenizer = tokenizer
        model.cfg.tokenizer_prepends_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        model.cfg.default_prepend_bos = tokenizer.bos_token_id is not None
    show_sizes(model)
    return model


def _n_embeddings(model: LensModel) -> int:
    """How many tokens the model can read; HuggingFace's may have more embeddings than their configuration says."""
    if huggingface_config(model) is None:
        return model.cfg.d_vocab
    return len(cast(Any, model).original_model.get_input_embeddings().weight)


def load_tokenizer(source: str | PathLike[str]) -> Any:
    """Loads the tokenizer of what `load_model` would load from disk, without the model; None where it has none.

    Raises:
        CtlensError: there is no such folder, file or model, or its tokenizer cannot be read.
    """
    path = found_on_disk(source)
    if not path.is_dir() and path.suffix != GGUF:
        raise CtlensError(f"{path} is no folder: name one that holds a tokenizer.")
    with reading(str(path)):
        found = pretrained_tokenizer(path)
    return load_tokenizer(read_peft(path).base) if found is None and is_peft(path) else found


def empty_cache(model: LensModel, rows: int) -> Any:
    """A key-value cache for `rows` sequences, to pass as `past_kv_cache`; None on bridges.

    The native bridge accepts a cache, does not fill it and says nothing.
    """
    if is_bridge(model):
        return None
    from transformer_lens import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, next(model.parameters()).device, rows)


def keep_rows(cache: Any, rows: ChosenRows | RowNumbers) -> None:
    """Keeps only these sequences of a key-value cache, by a mask or by their numbers, which may repeat."""
    for entry in cache.entries:
        entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
    cache.previous_attention_mask = cache.previous_attention_mask[rows]


def save_model(model: LensModel, folder: str | Path) -> None:
    """Writes `model.json`, `weights.safetensors` and the tokenizer into a folder; adapters are merged in the file.

    All processes of a sharded model call it together.

    Raises:
        CtlensError: the model is one that `adopt` refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = made_config(model)
    hf_config = huggingface_config(model)
    if made is not None:
        description = {"kind": "ctlens", "config": to_dict(made)}
        weights = canonical_weights(model)
    elif hf_config is None:
        description = {"kind": type(model).__name__, "config": plain_settings(model)}
        weights = present_weights(model)
    else:
        description = {"kind": "huggingface"}
        # Copies, because halves of one fused matrix share their memory.
        weights = {name: value.clone() for name, value in saved_tensors(model).items()}
    if is_sharded(model):
        write_joined(folder / _WEIGHTS_FILE, weights)
        if not is_first(model):
            return
    else:
        save_file({name: value.cpu().contiguous() for name, value in weights.items()}, folder / _WEIGHTS_FILE)
    if hf_config is not None:
        hf_config.save_pretrained(folder)
        if (generation := generation_config(model)) is not None:
            generation.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    write_json(folder / MODEL_FILE, description)


def _load_checkpoint(folder: Path, asked: _Loading) -> LensModel:
    device, dtype = asked.device, asked.dtype
    description = read_json(folder / MODEL_FILE)
    weights = load_file(folder / _WEIGHTS_FILE, device=str(device))
    tokenizer = asked.tokenizer or pretrained_tokenizer(folder)
    match description:
        case {"kind": "ctlens", "config": dict(config)}:
            model = _skeleton(from_dict(ModelConfig, config), device, dtype)
            load_weights(model, weights)
            model = _attach(model, tokenizer)
        case {"kind": "HookedTransformer" | "TransformerBridge" as kind, "config": dict(config)}:
            model = _of_transformer_lens(kind, config, device, dtype)
            copy_weights({name: value.data for name, value in present_parameters(model).items()}, weights)
            model = _attach(adopt(model), tokenizer)
        case {"kind": "huggingface"}:
            hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
            hf_config.name_or_path = ""  # HuggingFace would not find the weights in this folder
            hf = with_random_weights(hf_config, dtype)
            if (folder / GENERATION_CONFIG_NAME).is_file():
                hf.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
            model = _bridge(hf.to(device), tokenizer, asked.check)
            copy_weights(_state(model), weights)
        case _:
            raise CtlensError(
                f"{folder / MODEL_FILE} does not describe a model that ctlens saved: save the model again."
            )
    return model


def _state(model: LensModel) -> dict[str, torch.Tensor]:
    """What a HuggingFace model's folder keeps, sharing the model's memory."""
    return {name: value.data for name, value in present_parameters(model).items()} | state_buffers(model)


def made_config(model: LensModel) -> ModelConfig | None:
    """The sizes of a model made here, or None for one from HuggingFace or of the user's own.

    Raises:
        CtlensError: the model is one that `adopt` refuses.
    """
    if not is_made_here(adopt(model)):
        return None
    return ModelConfig(**{name: getattr(model.cfg, name) for name in ModelConfig.__dataclass_fields__})
