"""TransformerLens's model classes, which show a model's sizes in the place of all its modules.

An adopted model is of one of them. They have TransformerLens's names and add nothing else.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any, cast

from transformer_lens import model_bridge

from ctlens.core.shown import Shown
from ctlens.core.types import LensModel
from ctlens.models.parameters import present_parameters

HAS_HOOKED_TRANSFORMER = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
"""Whether TransformerLens still has models of its own making, which are no bridges."""
_Bridge: Any = model_bridge.TransformerBridge


class Sizes(Shown):
    """A model is shown by its sizes."""

    def described(self) -> dict[str, str]:
        """Says how large the model is."""
        model = cast(LensModel, self)
        cfg = model.cfg
        return {
            "parameters": f"{sum(parameter.numel() for parameter in present_parameters(model).values()):,}",
            "layers": str(cfg.n_layers),
            "width": f"{cfg.d_model}, {cfg.n_heads} heads of {cfg.d_head}",
            "vocabulary": str(cfg.d_vocab),
        }


class TransformerBridge(Sizes, _Bridge):
    """A bridge to a HuggingFace model that shows its sizes."""


_BY_KIND: dict[type, type] = {_Bridge: TransformerBridge}
if HAS_HOOKED_TRANSFORMER and not TYPE_CHECKING:
    import transformer_lens

    class HookedTransformer(Sizes, transformer_lens.HookedTransformer):
        """A model of TransformerLens's own that shows its sizes."""

    _BY_KIND[transformer_lens.HookedTransformer] = HookedTransformer


def show_sizes(model: LensModel) -> None:
    """Lets a model, and every copy of it, show its sizes; one of another class shows itself as before."""
    cast(Any, model).__class__ = _BY_KIND.get(type(model), type(model))
