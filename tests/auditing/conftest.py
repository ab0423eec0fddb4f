"""What the tests of audits have in common."""

from __future__ import annotations

import pytest

import ctlens as ct
from ctlens.core.types import LensModel


@pytest.fixture(scope="package")
def model() -> LensModel:
    """The shipped organism, which no audit changes."""
    return ct.load_organism()
