"""The micro-world: its people, facts and requests, its chat language and its tokenizer."""

from __future__ import annotations

from ctlens.world.tokenizer import build_tokenizer
from ctlens.world.world import SPLITS, Request, World, check_split

__all__ = ["SPLITS", "Request", "World", "build_tokenizer", "check_split"]
