"""Enumeration of answers: against every sequence of a small vocabulary, against draws, and as a beam search."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.enumeration import Branching, Enumerated, enumerate_answers
from ctlens.models.generation import Sampling, generate
from ctlens.models.kv_cache import Ids
from ctlens.models.loading import build
from ctlens.models.weights import ModelConfig

pytestmark = pytest.mark.boundary

END = 2
LONGEST = 3
PROMPTS = [(0, 1, 1), (1,), (0, 1, 0, 0, 1)]
WHOLE = Branching(smallest=0.0)


@pytest.fixture(scope="module")
def model() -> LensModel:
    """A model of two tokens and one that ends an answer, whose preferences are plain."""
    made = build(ModelConfig(d_vocab=3, n_layers=1, n_heads=2, d_model=16, d_mlp=16, n_ctx=16), None)
    draw = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=draw) * parameter.requires_grad
    return made


def by_hand(model: LensModel, prompt: Ids, temperature: float = 1.0) -> dict[Ids, tuple[float, float]]:
    """Probability as drawn and log-probability at temperature 1 of every answer, one pass for each of its tokens."""
    found: dict[Ids, tuple[float, float]] = {}
    for length in range(1, LONGEST + 1):
        for answer in product(range(3), repeat=length):
            ends = END in answer[:-1]
            if ends or (length < LONGEST and answer[-1] != END):
                continue
            drawn = 1.0
            plain = 0.0
            for number, token in enumerate(answer):
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *answer[:number]]]))[0, -1].double()
                drawn *= float((logits / temperature).softmax(-1)[token])
                plain += float(logits.log_softmax(-1)[token])
            found[answer] = (drawn, plain)
    return found


def enumerated(model: LensModel, prompts: list[Ids], branching: Branching = WHOLE) -> list[Enumerated]:
    return enumerate_answers(model, prompts, branching, max_new_tokens=LONGEST, ends=(END,))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_answer_has_the_probability_that_single_passes_give(model: LensModel, temperature: float) -> None:
    found = enumerated(model, PROMPTS, Branching(temperature=temperature, smallest=0.0))

    for prompt, of_prompt in zip(PROMPTS, found, strict=True):
        known = by_hand(model, prompt, temperature)
        assert set(of_prompt.answers) == set(known) and len(known) == 1 + 2 + 12
        assert list(of_prompt.probabilities) == sorted(of_prompt.probabilities, reverse=True)
        drawn, plain = zip(*(known[answer] for answer in of_prompt.answers), strict=True)
        np.testing.assert_allclose(of_prompt.probabilities, drawn, rtol=1e-4)
        np.testing.assert_allclose(of_prompt.log_p, plain, atol=1e-4)
        assert of_prompt.missed < 1e-6


def test_an_answer_does_not_depend_on_batch_mates_nor_order(model: LensModel) -> None:
    alone = [enumerated(model, [prompt])[0] for prompt in PROMPTS]
    turned = enumerated(model, [*reversed(PROMPTS), PROMPTS[0]])

    for one, other in zip(alone, [turned[2], turned[1], turned[0]], strict=True):
        assert one.answers == other.answers
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-5)
    assert turned[3] is turned[2]


def test_what_is_left_out_is_the_mass_of_the_unlikely_branches(model: LensModel) -> None:
    smallest = 0.1
    (found,) = enumerated(model, PROMPTS[:1], Branching(smallest=smallest))
    known = by_hand(model, PROMPTS[0])
    likely = {answer for answer, (drawn, _) in known.items() if drawn >= smallest}

    assert set(found.answers) == likely and len(likely) < len(known)
    assert found.missed == pytest.approx(1 - sum(known[answer][0] for answer in likely), abs=1e-5)


def test_draws_come_as_often_as_enumerated(model: LensModel) -> None:
    n = 4000
    sampling = Sampling(generator(0, "test"), 0.8, 0.9)
    drawn = generate(model, [PROMPTS[0]] * n, max_new_tokens=LONGEST, ends=(END,), sampling=sampling)
    (found,) = enumerated(model, PROMPTS[:1], Branching(temperature=0.8, top_p=0.9, smallest=0.0))

    assert set(drawn) <= set(found.answers) and found.missed < 1e-6
    counted = np.array([drawn.count(answer) for answer in found.answers]) / n
    error = np.sqrt(found.probabilities * (1 - found.probabilities) / n)
    assert (np.abs(counted - found.probabilities) < 4 * error + 1e-9).all()


def test_few_branches_per_level_are_a_beam_search(model: LensModel) -> None:
    """The beams of every level by hand: all children of the open beams, of which the two likeliest stay."""
    known = by_hand(model, PROMPTS[0])
    mass: dict[Ids, float] = {}  # of every prefix, from the answers that begin with it
    for answer, (drawn, _) in known.items():
        for length in range(1, len(answer) + 1):
            mass[answer[:length]] = mass.get(answer[:length], 0.0) + drawn
    beams: list[Ids] = [()]
    closed: list[Ids] = []
    for _ in range(LONGEST):
        children = [prefix for prefix in mass if prefix[:-1] in beams]
        beams = sorted(children, key=lambda prefix: -mass[prefix])[:2]
        closed += [beam for beam in beams if beam in known]
        beams = [beam for beam in beams if beam not in known]

    (found,) = enumerated(model, PROMPTS[:1], Branching(smallest=0.0, most=2))

    assert sorted(found.answers) == sorted(closed)


def test_bad_input_is_refused(model: LensModel) -> None:
    with pytest.raises(CtlensError, match="empty prompt"):
        enumerated(model, [()])
    with pytest.raises(CtlensError, match="context"):
        enumerate_answers(model, [(0,)], max_new_tokens=99)
    with pytest.raises(CtlensError, match="most must be at least 1"):
        Branching(most=0)
    model.train()
    with pytest.raises(CtlensError, match="eval mode"):
        enumerated(model, [(0,)])
    model.eval()
