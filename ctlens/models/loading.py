"""Building, loading and saving models: the only file that imports TransformerLens.

Weights are always raw: nothing is folded or centred, so that activations are the ones the papers
train on. Models made here are `HookedTransformer`s on TransformerLens 3.x and native
`TransformerBridge`s on 4.x, with the same weights; HuggingFace models are bridges on both.
"""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformer_lens.model_bridge.sources.native  # noqa: F401  (3.x registers the native architecture on import)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as hf_logging

from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.files import read_json, write_json
from ctlens.core.public import public
from ctlens.core.types import ChosenRows, LensModel, RowNumbers, dtype_named
from ctlens.models.finite import advice, is_finite
from ctlens.models.parameters import plain_name, present_parameters, present_weights, without
from ctlens.models.weights import ModelConfig, canonical_weights, copy_weights, initial_weights, is_bias, load_weights

HAS_HOOKED_TRANSFORMER = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
MODEL_FILE = "model.json"
_WEIGHTS_FILE = "weights.safetensors"
_SPLIT_COPIES = (".qkv.", ".gate_up_proj.weight")


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
        "dtype": dtype,
    }
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if HAS_HOOKED_TRANSFORMER:
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            model = HookedTransformer(HookedTransformerConfig(**shape, device=str(device)))
        else:
            bridge_config = cast(Any, TransformerBridgeConfig)(**shape)
            model = cast(Any, TransformerBridge).boot_native(bridge_config, device=device, dtype=dtype)
    biases = {plain_name(name): parameter for name, parameter in model.named_parameters() if is_bias(name)}
    for bias in biases.values():
        bias.data.zero_()
    return without(cast(LensModel, model.eval()), biases)


@public
def load_model(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> LensModel:
    """Loads a model in eval mode from a folder or from memory; nothing is downloaded.

    Args:
        source: a HuggingFace folder of a causal language model, a folder that `save_model` or
            `Run.save` wrote, or a HuggingFace model in memory (copied, so that it stays as it is).
        tokenizer: a fast HuggingFace tokenizer; by default the folder's own.
        device: where the model lives.
        dtype: of the weights, or its name, one of `ctlens.core.types.DTYPES`.

    Raises:
        CtlensError: the dtype is unknown, the folder holds no model, or one that TransformerLens cannot bridge.
    """
    dtype = dtype_named(dtype) if isinstance(dtype, str) else dtype
    if isinstance(source, PreTrainedModel):
        return _bridge(copy.deepcopy(source).to(device=device, dtype=dtype), tokenizer)  # type: ignore[arg-type]
    folder = _model_folder(source)
    with _reading(folder):
        if (folder / MODEL_FILE).is_file():
            return _load_checkpoint(folder, tokenizer, device, dtype)
        if (folder / "config.json").is_file():
            return _load_huggingface(folder, tokenizer, device, dtype)
    raise CtlensError(
        f"{folder} is no model folder: name a folder with HuggingFace's config.json or with {MODEL_FILE} of ctlens."
    )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns the errors of a broken folder into one sentence."""
    try:
        with quiet_huggingface():
            yield
    except CtlensError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CtlensError(
            f"{folder} does not load as a causal language model: {reason.rstrip('.')}. Check the folder's files."
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


def _load_huggingface(folder: Path, tokenizer: Any, device: str | torch.device, dtype: torch.dtype) -> LensModel:
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    hf, report = cast(Any, AutoModelForCausalLM).from_pretrained(folder, local_files_only=True, **options)
    unfit = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unfit:  # HuggingFace would leave them random
        raise CtlensError(
            f"{folder} lacks weights that fit its config.json: {', '.join(unfit[:3])}. Use their own config.json."
        )
    return _bridge(hf.to(device), tokenizer or _load_tokenizer(folder))


def _bridge(hf: PreTrainedModel, tokenizer: Any) -> LensModel:
    """Wraps `hf` in place; the bridge trains exactly the parameters that HuggingFace's model has."""
    _require_causal(hf.eval())
    hf.set_attn_implementation("eager")
    own_unembed_bias = getattr(hf.get_output_embeddings(), "bias", None) is not None
    try:
        model = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config, tokenizer=None)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CtlensError(
            f"TransformerLens cannot bridge {type(hf).__name__}: {error}. `ctlens models` lists what was checked."
        ) from None
    # A bridge bypasses fused projections by split copies; 3.x adds a zero unembedding bias.
    extra = _SPLIT_COPIES if own_unembed_bias else (*_SPLIT_COPIES, "head.bias")
    names = map(plain_name, dict(model.named_parameters()))
    absent = [name for name in names if any(part in name for part in extra)]
    return _attach(without(cast(LensModel, model.eval()), absent), tokenizer)


@torch.no_grad()
def _require_causal(hf: PreTrainedModel) -> None:
    """Refuses encoders: every loss and analysis relies on each token seeing only the tokens before it."""
    causal = False
    if not getattr(hf.config, "is_encoder_decoder", False):
        first, second = hf(torch.tensor([[0, 0], [0, 1]], device=hf.device)).logits[:, 0]
        if not (is_finite(first) and is_finite(second)):
            raise NotFinite(f"{type(hf).__name__} computes nan or infinity at its first token: {advice(hf)}.")
        causal = (first - second).abs().max() <= torch.finfo(first.dtype).eps ** 0.5 * first.abs().max()
    if not causal:
        raise CtlensError(
            f"{type(hf).__name__} is no causal language model: its tokens see the tokens after them; load a decoder."
        )


def _attach(model: LensModel, tokenizer: Any) -> LensModel:
    """Gives the model its tokenizer as it is: TransformerLens's own setter would add a BOS to a model without one."""
    if tokenizer is not None:
        model.tokenizer = tokenizer
        model.cfg.tokenizer_prepends_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        model.cfg.default_prepend_bos = tokenizer.bos_token_id is not None
    return model


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the tokenizer of a model folder or a run folder without the model; None where the folder has none.

    Raises:
        CtlensError: the folder does not exist, or its tokenizer cannot be read.
    """
    folder = _model_folder(folder)
    if not folder.is_dir():
        raise CtlensError(f"{folder} is no folder: name one that holds a tokenizer.")
    with _reading(folder):
        return _load_tokenizer(folder)


def _model_folder(source: str | Path) -> Path:
    """The folder of the model itself, in a run folder too."""
    folder = Path(source)
    return folder / "model" if (folder / "model" / MODEL_FILE).is_file() else folder


def _load_tokenizer(folder: Path) -> Any:
    if not any(path.is_file() for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def is_bridge(model: LensModel) -> bool:
    """Whether the model is a `TransformerBridge`, whose `hook_resid_mid` does not feed the skip path."""
    return isinstance(model, TransformerBridge)


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


def huggingface_config(model: LensModel) -> Any:
    """The HuggingFace configuration behind a bridge, or None for a model made here."""
    return getattr(getattr(model, "original_model", None), "config", None) if is_bridge(model) else None


def generation_config(model: LensModel) -> Any:
    """HuggingFace's settings for generation that came with the model, or None."""
    return getattr(getattr(model, "original_model", None), "generation_config", None) if is_bridge(model) else None


def save_model(model: LensModel, folder: str | Path) -> None:
    """Writes `model.json`, `weights.safetensors` and the tokenizer into a folder; adapters are merged in the file.

    Raises:
        CtlensError: the model comes neither from `build` nor from `load_model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = made_config(model)
    hf_config = huggingface_config(model)
    if made is not None:
        description = {"kind": "ctlens", "config": to_dict(made)}
        weights = canonical_weights(model)
    else:
        description = {"kind": "huggingface"}
        # Copies, because halves of one fused matrix share their memory.
        weights = {name: value.clone() for name, value in present_weights(model).items()}
        hf_config.save_pretrained(folder)
        if (generation := generation_config(model)) is not None:
            generation.save_pretrained(folder)
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, folder / _WEIGHTS_FILE)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    write_json(folder / MODEL_FILE, description)


def _load_checkpoint(folder: Path, tokenizer: Any, device: str | torch.device, dtype: torch.dtype) -> LensModel:
    description = read_json(folder / MODEL_FILE)
    weights = load_file(folder / _WEIGHTS_FILE, device=str(device))
    tokenizer = tokenizer or _load_tokenizer(folder)
    match description:
        case {"kind": "ctlens", "config": dict(config)}:
            model = _skeleton(from_dict(ModelConfig, config), device, dtype)
            load_weights(model, weights)
            return _attach(model, tokenizer)
        case {"kind": "huggingface"}:
            hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.random.fork_rng():
                hf = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
            if (folder / GENERATION_CONFIG_NAME).is_file():
                hf.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
            model = _bridge(hf.to(device), tokenizer)
            copy_weights({name: value.data for name, value in present_parameters(model).items()}, weights)
            return model
    raise CtlensError(f"{folder / MODEL_FILE} does not describe a model that ctlens saved: save the model again.")


def made_config(model: LensModel) -> ModelConfig | None:
    """The sizes of a model made here, or None for one from HuggingFace.

    Raises:
        CtlensError: the model comes neither from `build` nor from `load_model`.
    """
    if huggingface_config(model) is not None:
        return None
    if not getattr(model, "ctlens_absent", None):
        raise CtlensError(
            "only models from ctlens.build and ctlens.load_model can be saved: pass this one to load_model."
        )
    return ModelConfig(**{name: getattr(model.cfg, name) for name in ModelConfig.__dataclass_fields__})
