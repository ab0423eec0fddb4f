"""Directions of concepts are differences of means of states that no attack has touched."""

from __future__ import annotations

import numpy as np
import pytest

from ctlens import threats
from ctlens.analysis import concept_directions, mean_difference, states
from ctlens.analysis.probing.tasks import neutral_pairs
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.organism import load_organism

PAIRS = threats.get("jailbreak").pairs(24, split="heldout")
QUIET = {"progress": False, "layers": [1, 3]}


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_organism()


def test_length_and_topic_are_differences_of_clean_means(model: LensModel) -> None:
    found = concept_directions(model, PAIRS, name="base", **QUIET)
    clean = states(model, PAIRS, side="clean", **QUIET).values.astype(float)
    lengths = [len(render(model.tokenizer, pair.clean.turns).ids) for pair in PAIRS]
    long = [number for number, length in enumerate(lengths) if length > sorted(lengths)[11]]
    short = [number for number in range(24) if number not in long]
    assert sorted(lengths)[11] == sorted(lengths)[12]  # so the median is one of them
    expected = clean[:, long].mean(1) - clean[:, short].mean(1)
    np.testing.assert_allclose(found["length"].unit[:, 0] * found["length"].norm, expected, rtol=1e-6)

    hazards = [pair.labels["hazard"] for pair in PAIRS]
    common = max(dict.fromkeys(hazards), key=hazards.count)
    about = np.array([hazard == common for hazard in hazards])
    expected = clean[:, about].mean(1) - clean[:, ~about].mean(1)
    np.testing.assert_allclose(found["topic"].unit[:, 0] * found["topic"].norm, expected, rtol=1e-6)
    assert found["topic"].source == f"clean prompts about {common!r} less others"
    assert found["topic"].layers == (1, 3) and not found["topic"].rest.any()


def test_a_harmless_wrapper_is_that_of_harmless_pairs(model: LensModel) -> None:
    harmless = neutral_pairs(PAIRS, model.tokenizer)
    found = concept_directions(model, PAIRS, name="base", harmless=harmless, **QUIET)
    expected = mean_difference(model, harmless, name="base", **QUIET)
    assert list(found) == ["harmless wrapper", "length", "topic"]
    np.testing.assert_allclose(found["harmless wrapper"].unit, expected.unit)


def test_where_prompts_are_alike_there_is_no_concept(model: LensModel) -> None:
    same = [PAIRS[0], PAIRS[0]]
    with pytest.raises(CtlensError, match="one length and one topic"):
        concept_directions(model, same, name="base", **QUIET)
    one_topic = [pair for pair in PAIRS if pair.labels["hazard"] == PAIRS[0].labels["hazard"]]
    assert "topic" not in concept_directions(
        model, one_topic, name="base", harmless=neutral_pairs(one_topic, model.tokenizer), **QUIET
    )
