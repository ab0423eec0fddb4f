"""HuggingFace's own models and tokenizers, read from a folder or a GGUF file; their weights are never quantised."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from ctlens.core.errors import CtlensError
from ctlens.models.sources import GGUF, require_safetensors


@contextmanager
def reading(what: str, advice: str = "Check the folder's files") -> Iterator[None]:
    """Turns whatever HuggingFace and TransformerLens raise on something odd into one sentence."""
    try:
        with quiet_huggingface():
            yield
    except CtlensError:
        raise
    except Exception as error:
        raise CtlensError(f"{what} does not load as a causal language model: {first_line(error)}. {advice}.") from error


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


def first_line(error: Exception) -> str:
    """What an error of another library says, without the stop at the end of its first line."""
    return str(error).strip().split("\n")[0].rstrip(".") or f"it ends in {type(error).__name__}"


def pretrained(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder of safetensors, or of a GGUF file, whose weights become plain ones of this dtype.

    Raises:
        CtlensError: the weights are in another form, or do not fit the configuration.
    """
    hf, report = _from_gguf(path, dtype) if path.suffix == GGUF else _from_folder(path, dtype)
    unfit = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unfit:  # HuggingFace would leave them random
        raise CtlensError(
            f"{path} lacks weights that fit its config.json: {', '.join(unfit[:3])}. Use their own config.json."
        )
    return hf


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model of a folder, and HuggingFace's report of weights that it has not or cannot place."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    require_safetensors(folder)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    return cast(Any, AutoModelForCausalLM).from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, **options
    )


def _from_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The same of a GGUF file. Told to dequantise, HuggingFace takes off the mark that forbids to train and to save."""
    _require_gguf(file)
    options = {
        **{"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True},
        "quantization_config": transformers.GgufConfig(dequantize=True),
    }
    with redirect_stderr(io.StringIO()):  # for some architectures, a bar that no setting turns off
        return cast(Any, AutoModelForCausalLM).from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **options)


def _require_gguf(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise CtlensError(f"{file} is read by the package gguf, which is not installed: pip install 'ctlens[gguf]'.")


def pretrained_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder or a GGUF file; None where a folder has none."""
    if path.suffix == GGUF:
        _require_gguf(path)
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if not any(found.is_file() for found in (*path.glob("tokenizer*"), *path.glob("vocab*"))):
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def with_random_weights(config: Any, dtype: torch.dtype) -> Any:
    """A HuggingFace model whose norms and biases are random too: as they begin, many hide what a bridge does wrong."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype)
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return hf
