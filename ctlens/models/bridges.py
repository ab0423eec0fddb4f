"""Bridges: models that TransformerLens wraps around a HuggingFace model, or around its own, and what stands behind."""

from __future__ import annotations

from typing import Any, cast

from ctlens.core.types import LensModel


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
