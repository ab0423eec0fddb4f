"""Models for analyses of attention."""

from __future__ import annotations

import pytest
from helpers.models import GROUPED_MODELS, chat_model

from ctlens.core.types import LensModel


@pytest.fixture(scope="module", params=GROUPED_MODELS)
def model(request: pytest.FixtureRequest) -> LensModel:
    return chat_model(request.param)


@pytest.fixture(scope="module")
def llama() -> LensModel:
    return chat_model("llama")
