"""Where a source is on this machine; what cannot be loaded as it stands is refused before anything is read of it."""

from __future__ import annotations

import copy
import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.reading import read_json
from ctlens.models.hub import fetched, is_hub_name

MODEL_FILE = "model.json"
PEFT_FILE = "adapter_config.json"
GGUF = ".gguf"
MERGE = "merge it into the model first, with peft's merge_and_unload, and load what that gives"


def found_on_disk(source: str | PathLike[str], revision: str | None = None) -> Path:
    """The folder or the GGUF file of a model; of a run folder, the model's own; a model of the hub is fetched.

    What is there on disk comes before a model of the hub of the same name, and a `Path` never names one.

    Raises:
        CtlensError: a model of the hub cannot be had, or there is a revision of something on disk.
    """
    path = Path(source)
    if isinstance(source, str) and not path.exists() and path.suffix != GGUF and is_hub_name(source):
        return fetched(source, revision)
    if revision is not None:
        raise CtlensError(f"{source} is no model of the hub, so it has no revision {revision}: leave the revision out.")
    return path / "model" if (path / "model" / MODEL_FILE).is_file() else path


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT, which transformers too reads rather than a model beside it."""
    return (folder / PEFT_FILE).is_file() and not (folder / MODEL_FILE).is_file()


def require_model(path: Path) -> None:
    """Refuses a path with no model or with quantised weights.

    Raises:
        CtlensError: one of these; the sentence says what to do.
    """
    if (path / MODEL_FILE).is_file() or is_peft(path) or (path.suffix == GGUF and path.is_file()):
        return
    if not (path / "config.json").is_file():
        raise CtlensError(
            f"{path} is no model folder: name one with HuggingFace's config.json, with {MODEL_FILE} of ctlens or with "
            f"{PEFT_FILE} of PEFT, a {GGUF} file, or a model of the hub, as owner/name."
        )
    _require_unquantised(str(path), _setting(path / "config.json", "quantization_config"))


def require_safetensors(folder: Path) -> None:
    """Refuses a HuggingFace folder whose weights are in another form: reading a pickle may run any command.

    Raises:
        CtlensError: the folder holds no safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        raise CtlensError(
            f"{folder} holds no weights as safetensors (*.safetensors), and other forms may run any command when they "
            "are read: take a version of the model that has them, or save it again with HuggingFace's save_pretrained."
        )


def require_plain_model(source: object) -> PreTrainedModel:
    """Refuses an object that is no HuggingFace model, has a PEFT adapter, or is quantised, and returns it else.

    Raises:
        CtlensError: one of these; the sentence says what to do.
    """
    kind = type(source).__name__
    if getattr(source, "peft_config", None) is not None or kind.startswith("Peft"):
        raise CtlensError(f"this {kind} has a PEFT adapter: load the folder of its save_pretrained, or {MERGE}.")
    if not isinstance(source, PreTrainedModel):
        raise CtlensError(f"a {kind} is no model that can be loaded: give a folder or a HuggingFace model.")
    _require_unquantised(f"this {kind}", getattr(source.config, "quantization_config", None))
    return source


def is_laid_out(hf: PreTrainedModel) -> bool:
    """Whether accelerate laid a model out over devices and disk (`device_map`), so that nobody can copy or move it.

    Raises:
        CtlensError: the embedding or the unembedding is not on a device until it runs.
    """
    if not getattr(hf, "hf_device_map", None) or not any(value.is_meta for value in hf.parameters()):
        return False
    if any(
        part is not None and part.weight.is_meta for part in (hf.get_input_embeddings(), hf.get_output_embeddings())
    ):
        raise CtlensError(
            "the embedding and the unembedding must lie on a device: let the device_map put only blocks on disk."
        )
    return True


def read_config(source: str | PathLike[str] | PretrainedConfig) -> PretrainedConfig:
    """Reads a HuggingFace configuration; no code of others is run, and nothing is downloaded.

    Args:
        source: a config.json, a folder that holds one, or a `model_type`, whose sizes are those that transformers gives
            it by default.

    Raises:
        CtlensError: there is no such file or type, the file is damaged, or its weights are quantised.
    """
    if isinstance(source, PretrainedConfig):
        return source
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if not path.exists():
        if str(source) in CONFIG_MAPPING:
            return CONFIG_MAPPING[str(source)]()
        raise CtlensError(
            f"{path} is no file: name HuggingFace's config.json, a folder that holds one, or a model type, such as "
            "llama."
        )
    settings = read_json(path)
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise CtlensError(f"{path} names no model_type, so nobody knows what its sizes mean: take HuggingFace's own.")
    if kind not in CONFIG_MAPPING:
        raise unknown(f"model_type in {path}", kind, CONFIG_MAPPING)
    _require_unquantised(str(path), settings.get("quantization_config"))
    try:
        return CONFIG_MAPPING[kind].from_dict(settings)
    except Exception as error:  # transformers checks each setting in its own way
        raise CtlensError(f"{path} is no configuration of {kind}: {error}.") from error


def shallower(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """Copies a configuration with only the first layers; what is listed layer by layer is cut too."""
    cut = copy.deepcopy(config)
    text: Any = cut.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
    return cut


def require_embedded(tokenizer: Any, n_embeddings: int) -> None:
    """Refuses a tokenizer whose prompts may hold tokens that the model has no embeddings for.

    Special tokens that neither begin nor end a text and are not in the chat template may lack one: HuggingFace adds a
    padding token to some tokenizers, and that of Gemma 3 1B has one for images, which the model does not read.

    Raises:
        CtlensError: there are such tokens; one is named.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= n_embeddings}
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    template = str(tokenizer.chat_template)
    for number, token in sorted(beyond.items()):
        added = tokenizer.added_tokens_decoder.get(number)
        if number in ends or token in template or added is None or not added.special:
            raise CtlensError(
                f"the tokenizer has the token {token!r} with number {number}, but the model has embeddings for "
                f"{n_embeddings} tokens: use the model's own tokenizer, or HuggingFace's resize_token_embeddings."
            )


def _require_unquantised(what: str, settings: Any) -> None:
    if settings:
        plain = settings if isinstance(settings, dict) else vars(settings)
        method = getattr(plain.get("quant_method"), "value", plain.get("quant_method")) or "an unknown method"
        raise CtlensError(
            f"{what} holds weights that {method} quantised, which can be neither trained nor compared exactly: load "
            "the model's plain weights."
        )


def _setting(path: Path, name: str) -> Any:
    """A setting of a HuggingFace configuration; None also where the file is damaged, which loading it says better."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get(name) if isinstance(config, dict) else None
