"""Greedy decoding of many prompts gives what one prompt at a time gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ctlens.decoding import generate
from ctlens.errors import CtlensError
from ctlens.models import build
from ctlens.types import LensModel
from ctlens.weights import ModelConfig

N_CTX = 24
Answers = dict[tuple[int, ...], tuple[int, ...]]

PROMPTS = ((1, 2, 3), (4,), (5, 6, 7, 8, 9, 10, 11), (3, 2, 1), (0, 0, 12))


@pytest.fixture(scope="module")
def model() -> LensModel:
    config = ModelConfig(n_layers=2, d_model=32, n_heads=4, d_mlp=48, d_vocab=20, n_ctx=N_CTX)
    model = build(config, seed=0)
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def naive(model: LensModel, prompt: Sequence[int]) -> tuple[int, ...]:
    """Six tokens, one prompt, one forward a token."""
    tokens = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.fixture(scope="module")
def expected(model: LensModel) -> Answers:
    return {prompt: naive(model, prompt) for prompt in PROMPTS}


def test_the_answers_of_these_tests_differ(expected: Answers):
    assert len(set(expected.values())) == len(PROMPTS)
    assert max(len(set(answer)) for answer in expected.values()) > 2


def test_decoding_equals_one_prompt_at_a_time(model: LensModel, expected: Answers):
    assert generate(model, PROMPTS, max_new_tokens=6) == list(expected.values())


@pytest.mark.parametrize("batch_size", [1, 2, 99])
def test_batch_mates_and_order_change_nothing(model: LensModel, expected: Answers, batch_size: int):
    for order in (PROMPTS[::-1], PROMPTS[2:] + PROMPTS[:2], (PROMPTS[1],) * 3):
        answers = generate(model, order, max_new_tokens=3, batch_size=batch_size)
        assert answers == [expected[prompt][:3] for prompt in order]


def test_an_answer_is_cut_at_the_longest(model: LensModel, expected: Answers):
    assert generate(model, PROMPTS, max_new_tokens=3) == [answer[:3] for answer in expected.values()]


def test_an_answer_stops_at_the_end_token_and_its_mates_go_on(model: LensModel, expected: Answers):
    end = expected[PROMPTS[0]][2]
    cut = [answer[: answer.index(end) + 1] if end in answer else answer for answer in expected.values()]
    assert len({len(answer) for answer in cut}) > 1
    assert generate(model, PROMPTS, max_new_tokens=6, end=end) == cut


def test_an_end_token_at_once_is_the_whole_answer(model: LensModel, expected: Answers):
    end = expected[PROMPTS[0]][0]

    assert generate(model, PROMPTS[:1], end=end) == [(end,)]


def test_nothing_asked_for_is_nothing_given(model: LensModel):
    assert generate(model, []) == []
    assert generate(model, PROMPTS[:2], max_new_tokens=0) == [(), ()]


def test_decoding_leaves_no_gradient_and_no_change_of_the_gradient_mode(model: LensModel):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    generate(model, PROMPTS, max_new_tokens=2)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_model_in_training_mode_is_refused(model: LensModel):
    model.train()
    try:
        with pytest.raises(CtlensError, match=r"eval mode: call model\.eval\(\) first"):
            generate(model, PROMPTS)
    finally:
        model.eval()


def test_a_prompt_that_leaves_no_room_is_refused_and_one_that_just_fits_is_not(model: LensModel):
    assert len(generate(model, [(1,) * (N_CTX - 4)], max_new_tokens=4)[0]) == 4
    with pytest.raises(CtlensError, match="a prompt of 21 tokens and 4 new ones exceed the model's context of 24"):
        generate(model, [(1,), (1,) * (N_CTX - 3)], max_new_tokens=4)


def test_an_empty_prompt_is_refused(model: LensModel):
    with pytest.raises(CtlensError, match="an empty prompt cannot be continued"):
        generate(model, [(1,), ()])
