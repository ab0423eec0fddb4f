"""Contrasts: every text is tokenised once, whatever an analysis makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from helpers.models import made

from ctlens import analysis
from ctlens.analysis.base.contrast import contrasts, encoded_contrasts
from ctlens.analysis.base.forward import encoded_pairs
from ctlens.core.types import LensModel
from ctlens.data import chat
from ctlens.data.pairs import Pair, prompt

PAIRS = [
    Pair(prompt("what is it ?", "blue", "red"), prompt("i say red . what is it ?", "blue", "red")),
    Pair(prompt("who is she ?", "dora", "dina"), prompt("i say dina . who is she ?", "dora", "dina")),
]
ANALYSES: dict[str, Callable[[LensModel], Any]] = {
    "patching": lambda model: analysis.patch(model, PAIRS, site="resid_pre", direction="denoising", progress=False),
    "attribution": lambda model: analysis.attribution_patch(
        model, PAIRS, site=["resid_pre"], direction="denoising", progress=False
    ),
    "knockout": lambda model: analysis.knockout(model, PAIRS, progress=False),
    "saliency": lambda model: analysis.saliency_agreement(model, PAIRS, progress=False),
    "gap": lambda model: analysis.gap_recovered(model, {"after": model}, PAIRS, progress=False),
}


@pytest.fixture(scope="module")
def model() -> LensModel:
    return made()


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each text was given to the tokenizer."""
    counts: Counter[str] = Counter()
    spell = chat.spell

    def counting(tokenizer: Any, text: str) -> Any:
        counts[text] += 1
        return spell(tokenizer, text)

    monkeypatch.setattr(chat, "spell", counting)
    return counts


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_renders_and_tokenises_a_pair_once(name: str, model: LensModel, tokenised: Counter[str]) -> None:
    ANALYSES[name](model)

    texts = {text: count for text, count in tokenised.items() if text.startswith("<s>")}
    assert sum(text.endswith("<|assistant|>\n") for text in texts) == 2 * len(PAIRS)
    assert set(texts.values()) == {1}  # an answer behind its prompt is a text of its own


def test_contrasts_of_texts_and_of_tokens_are_the_same(model: LensModel) -> None:
    rows = encoded_pairs(model, PAIRS, ())

    for side in ("clean", "wrapped"):
        assert encoded_contrasts(model, rows, side) == contrasts(model, PAIRS, side)
