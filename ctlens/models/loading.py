"""Building, loading and saving models: the only file that imports TransformerLens.

Weights are always raw: nothing is folded or centred, so that activations are the ones the papers
train on. Models made here are `HookedTransformer`s on TransformerLens 3.x and native
`TransformerBridge`s on 4.x, with the same weights; HuggingFace models are bridges on both.
"""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import transformer_lens.model_bridge.sources.native  # noqa: F401  (3.x registers the native architecture on import)
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.utilities import quantization
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as hf_logging

from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.files import write_json
from ctlens.core.public import public
from ctlens.core.reading import read_json
from ctlens.core.types import ChosenRows, LensModel, RowNumbers, device_named, dtype_named
from ctlens.models.adopt import adopt, bridge_only, marked
from ctlens.models.bridges import generation_config, huggingface_config, is_bridge, plain_settings
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
from ctlens.models.sources import (
    MODEL_FILE,
    model_folder,
    require_embedded,
    require_plain_folder,
    require_plain_model,
    require_safetensors,
)
from ctlens.models.weights import ModelConfig, canonical_weights, copy_weights, initial_weights, is_bias, load_weights

HAS_HOOKED_TRANSFORMER = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
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
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    check: bool = True,
) -> LensModel:
    """Loads a model in eval mode from a folder or from memory; nothing is downloaded.

    A HuggingFace model answers a few short prompts by itself and as a lens model, and is refused unless both give the
    same logits (see `ctlens.models.parity`).

    Args:
        source: a HuggingFace folder of a causal language model, a folder that `save_model` or
            `Run.save` wrote, or a model in memory, of HuggingFace or of TransformerLens (copied, so that it stays as it
            is).
        tokenizer: a fast HuggingFace tokenizer; by default the folder's own.
        device: where the model lives.
        dtype: of the weights, or its name, one of `ctlens.core.types.DTYPES`.
        check: whether to compare logits with HuggingFace's; without it, numbers may be those of another model.

    Raises:
        CtlensError: the dtype is unknown, this machine lacks the device, or the source holds no model that
            TransformerLens computes as HuggingFace does, or one that `adopt` refuses; the sentence says which.
    """
    dtype = dtype_named(dtype) if isinstance(dtype, str) else dtype
    device = device_named(device)
    if isinstance(source, LensModel):
        return _copied(source, tokenizer, device, dtype)
    if not isinstance(source, str | PathLike):
        hf = require_plain_model(source)
        with _reading(f"this {type(hf).__name__}", "Check that it runs by itself"):
            return _bridge(copy.deepcopy(hf).to(device=device, dtype=dtype), tokenizer, check)  # type: ignore[arg-type]
    folder = model_folder(source)
    require_plain_folder(folder)
    with _reading(str(folder)):
        if (folder / MODEL_FILE).is_file():
            return _load_checkpoint(folder, tokenizer, device, dtype, check)
        return _load_huggingface(folder, tokenizer, device, dtype, check)


def _copied(model: LensModel, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> LensModel:
    """A copy of a TransformerLens model of one's own."""
    copied = copy_model(adopt(model))
    nn.Module.to(cast(nn.Module, copied), device=device, dtype=dtype)
    copied.cfg.device = str(device)
    copied.cfg.dtype = dtype
    return _attach(copied, tokenizer)


@contextmanager
def _reading(what: str, advice: str = "Check the folder's files") -> Iterator[None]:
    """Turns whatever HuggingFace and TransformerLens raise on something odd into one sentence."""
    try:
        with quiet_huggingface():
            yield
    except CtlensError:
        raise
    except Exception as error:
        raise CtlensError(
            f"{what} does not load as a causal language model: {_first_line(error)}. {advice}."
        ) from error


@contextmanager
def quiet_huggingface() -> Iterator[None]:
    """Keeps HuggingFace's progress bars off the terminal."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()


def _load_huggingface(folder: Path, tokenizer: Any, device: torch.device, dtype: torch.dtype, check: bool) -> LensModel:
    hf, report = _from_pretrained(folder, dtype)
    unfit = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unfit:  # HuggingFace would leave them random
        raise CtlensError(
            f"{folder} lacks weights that fit its config.json: {', '.join(unfit[:3])}. Use their own config.json."
        )
    return _bridge(hf.to(device), tokenizer or _load_tokenizer(folder), check)


def _from_pretrained(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model of a folder, and HuggingFace's report of weights that it has not or cannot place."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    require_safetensors(folder)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    return cast(Any, AutoModelForCausalLM).from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, **options
    )


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


def outline(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> LensModel:
    """Makes the lens model of a HuggingFace configuration without its numbers, on torch's meta device.

    Its passes tell the shapes of everything and compute nothing; see `ctlens.models.counting`.

    Raises:
        CtlensError: the configuration is of no causal language model that TransformerLens bridges.
    """
    with _reading(f"a model of the type {config.model_type}", "Name another config.json"):
        if config.is_encoder_decoder:
            raise CtlensError(f"{config.model_type} is no causal language model: name a decoder, such as llama.")
        with torch.device("meta"):
            hf = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype, attn_implementation="eager").eval()
        # To split fused weights, TransformerLens wants to read them; the shapes alone are split as well.
        with mock.patch.object(quantization, "unreadable_weight_reason", return_value=None):
            bridge = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config, tokenizer=None)
    model = cast(LensModel, bridge.eval())
    return without(model, bridge_only(model))


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
            f"{_first_line(error)}. `ctlens models` lists what was checked."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or f"it ends in {type(error).__name__}"


def _attach(model: LensModel, tokenizer: Any) -> LensModel:
    """Gives the model its tokenizer as it is: TransformerLens's own setter would add a BOS to a model without one."""
    if tokenizer is not None:
        require_embedded(tokenizer, _n_embeddings(model))
        model.tokenizer = tokenizer
        model.cfg.tokenizer_prepends_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        model.cfg.default_prepend_bos = tokenizer.bos_token_id is not None
    return model


def _n_embeddings(model: LensModel) -> int:
    """How many tokens the model can read; HuggingFace's may have more embeddings than their configuration says."""
    if huggingface_config(model) is None:
        return model.cfg.d_vocab
    return len(cast(Any, model).original_model.get_input_embeddings().weight)


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the tokenizer of a model folder or a run folder without the model; None where the folder has none.

    Raises:
        CtlensError: the folder does not exist, or its tokenizer cannot be read.
    """
    folder = model_folder(folder)
    if not folder.is_dir():
        raise CtlensError(f"{folder} is no folder: name one that holds a tokenizer.")
    with _reading(str(folder)):
        return _load_tokenizer(folder)


def _load_tokenizer(folder: Path) -> Any:
    if not any(path.is_file() for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


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
        hf_config.save_pretrained(folder)
        if (generation := generation_config(model)) is not None:
            generation.save_pretrained(folder)
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, folder / _WEIGHTS_FILE)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    write_json(folder / MODEL_FILE, description)


def _load_checkpoint(folder: Path, tokenizer: Any, device: torch.device, dtype: torch.dtype, check: bool) -> LensModel:
    description = read_json(folder / MODEL_FILE)
    weights = load_file(folder / _WEIGHTS_FILE, device=str(device))
    tokenizer = tokenizer or _load_tokenizer(folder)
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
            hf = _with_random_weights(hf_config, dtype)
            if (folder / GENERATION_CONFIG_NAME).is_file():
                hf.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
            model = _bridge(hf.to(device), tokenizer, check)
            copy_weights(_state(model), weights)
        case _:
            raise CtlensError(
                f"{folder / MODEL_FILE} does not describe a model that ctlens saved: save the model again."
            )
    return model


def _with_random_weights(config: Any, dtype: torch.dtype) -> Any:
    """A HuggingFace model whose norms and biases are random too: as they begin, many hide what a bridge does wrong."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype)
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return hf


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
