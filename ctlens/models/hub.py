"""Models of the HuggingFace hub, by their names: from the cache, or from the network where it may be asked."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ctlens.core.errors import CtlensError

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_UNWANTED = ["*/*", "consolidated*"]
"""Weights in other forms: in folders of their own (ONNX, originals), and Mistral's second copy."""
_BY_HAND = "`hf download NAME --local-dir FOLDER` where there is a network gets a folder that loads anywhere"


def is_hub_name(text: str) -> bool:
    """Whether a text may name a model of the hub: `name` or `owner/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def fetched(name: str, revision: str | None = None) -> Path:
    """The folder of a model of the hub in HuggingFace's cache, into which it is downloaded if need be.

    HuggingFace's own settings hold: with `HF_HUB_OFFLINE` nothing is asked, and `HF_HOME` or `HF_HUB_CACHE` say where
    the cache is.

    Args:
        name: `name` or `owner/name`.
        revision: a branch, a tag or a commit; the default branch if None.

    Raises:
        CtlensError: the model is neither in the cache nor within reach.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except RevisionNotFoundError:
        raise CtlensError(f"the hub's {name} has no revision {revision}: name a branch, a tag or a commit.") from None
    except GatedRepoError:
        raise CtlensError(
            f"{name} is open to those alone who accepted its terms on the hub: accept them and run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise CtlensError(
            f"{name} is no model folder, and the hub shows no model of that name: check its spelling, or run `hf auth "
            "login` if it is private."
        ) from None
    except LocalEntryNotFoundError:
        version = f" at revision {revision}" if revision else ""
        raise CtlensError(
            f"{name} is no model folder, HuggingFace's cache ({constants.HF_HUB_CACHE}) has no whole model of "
            f"that name{version}, and {_unreached()}: {_BY_HAND}."
        ) from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise CtlensError(f"{name} cannot be fetched from the hub: {reason}. {_BY_HAND}.") from error


def _unreached() -> str:
    return "HF_HUB_OFFLINE forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
