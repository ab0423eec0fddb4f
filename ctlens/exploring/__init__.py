"""The panel that one leaves open: a pair, its models, and what they do with it, by hand.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from ctlens.exploring.exploration import Exploration as Exploration
from ctlens.exploring.exploration import explore as explore
from ctlens.exploring.views import VIEWS as VIEWS
