"""The labels that untrained models have in every table, figure and mapping of models."""

from __future__ import annotations

BASE = "base"
"""The frozen weights before training."""
CLEAN_BORN = "clean-born"
"""The base's twin, pretrained on the same corpus with good answers to every attack."""
