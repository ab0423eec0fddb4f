"""Bridges: models that TransformerLens wraps around a HuggingFace model, or around its own, and what stands behind."""

from __future__ import annotations

from typing import Any

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
