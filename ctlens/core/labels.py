"""The label that the base model has in every table, figure and mapping of models."""

from __future__ import annotations

BASE = "base"
"""The frozen weights before training."""
