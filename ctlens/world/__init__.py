"""The micro-world: its people, facts and requests, its chat language and its tokenizer.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from ctlens.world.tokenizer import build_tokenizer as build_tokenizer
from ctlens.world.world import SPLITS as SPLITS
from ctlens.world.world import Request as Request
from ctlens.world.world import World as World
from ctlens.world.world import check_split as check_split
