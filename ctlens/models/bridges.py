"""Bridges: models that TransformerLens wraps around a HuggingFace model, or around its own, and what stands behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from torch import Tensor
from transformers import masking_utils

from ctlens.core.types import LensModel

_ONE_PER_ROW: ContextVar[bool] = ContextVar("whether every row of a batch is known to hold one sequence", default=False)
_NOT_SETTINGS = (
    *("device", "dtype", "seed", "tokenizer_name"),
    *("tokenizer_prepends_bos", "tokenizer_appends_eos", "default_prepend_bos"),
)
"""Settings of TransformerLens that `load_model` sets, or that would draw numbers or fetch files."""


def is_bridge(model: LensModel) -> bool:
    """Whether the model is a `TransformerBridge`, whose `hook_resid_mid` does not feed the skip path."""
    return hasattr(model, "original_model")


def huggingface_config(model: LensModel) -> Any:
    """The HuggingFace configuration behind a bridge, or None for a model that does not come from HuggingFace."""
    return getattr(getattr(model, "original_model", None), "config", None)


def generation_config(model: LensModel) -> Any:
    """HuggingFace's settings for generation that came with the model, or None."""
    return getattr(getattr(model, "original_model", None), "generation_config", None)


def unwire(model: LensModel) -> None:
    """Takes off the hooks that a bridge sets at its first pass and sets again at the next.

    They point weakly at the model, so a copy that has them fails once the model is gone.
    """
    for block in cast(Any, model).blocks if is_bridge(model) else ():
        if hasattr(block, "_teardown_capture_hooks"):
            block._teardown_capture_hooks()


def plain_settings(model: LensModel) -> dict[str, Any]:
    """The configuration of a model that is not HuggingFace's, without where and in which type it lives, for JSON."""
    settings = {name: value for name, value in vars(model.cfg).items() if name not in _NOT_SETTINGS}
    return {name: value for name, value in settings.items() if value is not None and not name.startswith("_")}


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Spares the passes inside the block transformers' question whether a row holds several sequences, packed.

    It reads the answer from the GPU, and so waits for it at every pass. Rows of ctlens hold one sequence each.
    """
    asks = getattr(masking_utils, "find_packed_sequence_indices", None)
    if asks is None:
        yield
        return
    if not isinstance(asks, _Packed):
        masking_utils.find_packed_sequence_indices = _Packed(asks)
    token = _ONE_PER_ROW.set(True)
    try:
        yield
    finally:
        _ONE_PER_ROW.reset(token)


class _Packed:
    """_Packed asks as transformers does, but not where it is known that there is one sequence per row."""

    def __init__(self, asks: Callable[[Tensor], Tensor | None]) -> None:
        self.asks = asks

    def __call__(self, position_ids: Tensor) -> Tensor | None:
        return None if _ONE_PER_ROW.get() else self.asks(position_ids)
