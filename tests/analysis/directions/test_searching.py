"""The search for the most effective direction: its gradient, what it finds, and what it cannot find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import chat_model

from ctlens.analysis.base.forward import pair_batches
from ctlens.analysis.base.positions import positions_mask
from ctlens.analysis.directions.directions import turned
from ctlens.analysis.directions.edited_answers import EditedAnswers, adding
from ctlens.analysis.directions.searching import most_effective, part_taken_out
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt

pytestmark = pytest.mark.boundary

NAME = "blocks.1.hook_resid_post"
PAIRS = [
    Pair(prompt("Is it right?", "right", "wrong"), prompt("No, no. Is it right?", "right", "wrong")),
    Pair(prompt("Who was it then?", "Ada", "Bea"), prompt("It was Bea. Who was it then?", "Ada", "Bea")),
]


def answers_of(model: LensModel, pairs: list[Pair], name: str = NAME) -> EditedAnswers:
    ((rows, batch),) = pair_batches(model, pairs, "shared", len(pairs), False)
    mask = positions_mask("last", "wrapped", rows, batch)
    return EditedAnswers(model, rows, "wrapped", mask, [name])


def gains(answers: EditedAnswers, differences: torch.Tensor, units: torch.Tensor) -> np.ndarray:
    """The mean logit difference with the part of the differences along each of the unit vectors taken out."""
    edit = adding(part_taken_out(differences.expand(len(units), -1, -1), units))
    return (answers.log_probabilities(NAME, edit) @ (1, -1)).mean(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_gradient_is_the_slope_of_the_answers(kind: str) -> None:
    model = chat_model(kind)
    name = "blocks.0.hook_resid_mid"
    answers = answers_of(model, PAIRS, name)
    draw = torch.Generator().manual_seed(0)
    added = torch.randn(3, len(PAIRS), model.cfg.d_model, generator=draw)
    step = torch.randn(added.shape, generator=draw)

    found = (answers.gradients(name, added) * step).sum(-1).numpy()

    reach = 3e-3
    ahead = answers.log_probabilities(name, adding(added + reach * step)) @ (1, -1)
    behind = answers.log_probabilities(name, adding(added - reach * step)) @ (1, -1)
    np.testing.assert_allclose(found, (ahead - behind) / (2 * reach), rtol=0.05, atol=2e-2)
    assert np.abs(found).max() > 0.05


def test_no_unit_vector_near_or_far_does_better() -> None:
    answers = answers_of(planted.model("base"), planted.pairs())
    differences = torch.tensor([planted.written(pair) for pair in planted.pairs()])[:, None] * planted.DIRECTION
    angles = torch.linspace(0, np.pi, 721)[:, None]  # the cue is along one axis, and what is read between the two
    plane = angles.cos() * planted.DIRECTION + angles.sin() * planted.AXES["truth"]

    unit = most_effective(answers, NAME, differences[None])
    found = gains(answers, differences[None], unit)[0]

    moved = unit + 0.05 * torch.randn(500, planted.SIZE, generator=torch.Generator().manual_seed(0))
    others = torch.cat([plane, moved / moved.norm(dim=-1, keepdim=True)])
    assert found > gains(answers, differences[None], others).max() - 0.01
    assert found > 1.05 * gains(answers, differences[None], planted.DIRECTION[None])[0]


def test_what_nothing_reads_gains_no_more_than_turned_differences_do() -> None:
    differences = torch.tensor([planted.written(pair) for pair in planted.pairs()])[:, None] * planted.OTHER
    null = turned(differences.double().numpy()[None], 19)[:, 0]
    for variant, used in (("base", True), ("moved", False)):
        answers = answers_of(planted.model(variant), planted.pairs())
        real = differences if variant == "moved" else differences @ torch.outer(planted.OTHER, planted.DIRECTION)
        every = torch.cat([real[None], answers.tensor(null)])
        found = gains_of_own(answers, every, most_effective(answers, NAME, every))
        assert (found[0] > found[1:].max()) == used and found[0] > 1  # the search finds something either way


def gains_of_own(answers: EditedAnswers, differences: torch.Tensor, units: torch.Tensor) -> np.ndarray:
    plain = answers.log_probabilities(NAME, adding(torch.zeros_like(differences[:1]))) @ (1, -1)
    return (answers.log_probabilities(NAME, adding(part_taken_out(differences, units))) @ (1, -1) - plain).mean(-1)


def test_turned_vectors_keep_their_lengths_and_angles() -> None:
    vectors = np.random.default_rng(0).standard_normal((2, 5, 8))
    for drawn in turned(vectors, 3):
        np.testing.assert_allclose(drawn @ drawn.swapaxes(1, 2), vectors @ vectors.swapaxes(1, 2), atol=1e-9)
        assert np.abs(drawn - vectors).max() > 0.5
