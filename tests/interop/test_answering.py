"""Requests of other tools: each is answered as if it were alone, and its numbers are those of a plain pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import made

import ctlens as ct
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn, render
from ctlens.data.pairs import Prompt
from ctlens.interop.answering import AnswerRequest, answer_requests
from ctlens.models.scoring import continuation_logprobs
from ctlens.threats import ask

TURNS = (Turn("user", "Is it right?"),)
REQUESTS = [
    AnswerRequest(TURNS, max_new_tokens=6),
    AnswerRequest((Turn("system", "No."), Turn("user", "Which term is it?")), max_new_tokens=6),
    AnswerRequest((*TURNS, Turn("assistant", "It is")), max_new_tokens=3),
    AnswerRequest(TURNS, options=(" yes", " no", " never")),
    AnswerRequest(TURNS, max_new_tokens=6, temperature=1.5, seed=3),
    AnswerRequest(TURNS, max_new_tokens=6, temperature=1.5, seed=4, top_p=0.9),
]


@pytest.fixture(scope="module")
def model() -> LensModel:
    return made()


def test_a_request_is_answered_as_if_it_were_alone(model: LensModel) -> None:
    together = answer_requests(model, REQUESTS)
    alone = [answer_requests(model, [request])[0] for request in REQUESTS]

    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.tokens for one in answer_requests(model, REQUESTS[::-1])] == [one.tokens for one in together][::-1]
    assert len({one.tokens for one in together}) == len(REQUESTS)


def test_the_greedy_answer_is_that_of_chat_and_of_an_evaluation() -> None:
    model = ct.load_organism()
    prompts = [pair.wrapped for pair in ct.threats.get("sycophancy").pairs(8, split="heldout")]

    found = [
        one.text
        for one in answer_requests(model, [AnswerRequest(prompt.turns, max_new_tokens=16) for prompt in prompts])
    ]

    assert found == [reply.answer for reply in ask(model, prompts)]
    assert found == [ct.chat(model, prompt, max_new_tokens=16) for prompt in prompts]


def test_the_option_is_the_one_that_an_evaluation_chooses(model: LensModel) -> None:
    options = (" yes", " no", " never")
    asked = Prompt(TURNS, " yes", " no", options)

    (found,) = answer_requests(model, [AnswerRequest(TURNS, options=options)])

    (reply,) = ask(model, [asked])
    assert found.text == reply.answer and sum(found.shares) == pytest.approx(1)
    assert found.shares[:2] == (reply.good_probability, reply.bad_probability)


def test_a_draw_is_the_plain_one_of_its_seed(model: LensModel) -> None:
    request = AnswerRequest(TURNS, max_new_tokens=1, temperature=0.7, seed=11)

    (found,) = answer_requests(model, [request])

    logits = model(torch.tensor([render(model.tokenizer, TURNS).ids]))[0, -1]
    shares = (logits / 0.7).softmax(-1)
    drawn = torch.multinomial(shares[None], 1, generator=torch.Generator().manual_seed(11))
    assert found.tokens == (int(drawn),)


def test_without_a_seed_draws_are_new(model: LensModel) -> None:
    request = AnswerRequest(TURNS, max_new_tokens=8, temperature=2.0)

    assert len({one.tokens for one in answer_requests(model, [request] * 6)}) > 1
    assert len({one.tokens for one in answer_requests(model, [replace(request, seed=0)] * 6)}) == 1


@pytest.mark.boundary
def test_scores_are_those_of_a_plain_pass(model: LensModel) -> None:
    (found,) = answer_requests(model, [AnswerRequest(TURNS, max_new_tokens=5, top_logprobs=3)])

    ids = render(model.tokenizer, TURNS).ids
    with torch.no_grad():
        plain = model(torch.tensor([ids + found.tokens]))[0].log_softmax(-1)
    assert found.scores is not None and len(found.scores) == len(found.tokens) == 5
    for position, (token, score) in enumerate(zip(found.tokens, found.scores, strict=True), start=len(ids) - 1):
        assert score.logprob == pytest.approx(float(plain[position, token]), abs=1e-5)
        assert score.top[0] == (score.token, score.logprob)  # the greedy token is the likeliest
        assert [value for _, value in score.top] == pytest.approx(plain[position].topk(3).values.tolist(), abs=1e-5)
    (whole,) = continuation_logprobs(model, [ids], [[found.tokens]])
    assert [one.logprob for one in found.scores] == pytest.approx(whole[0], abs=1e-5)


def test_a_stop_text_cuts_the_answer_and_its_tokens(model: LensModel) -> None:
    (whole,) = answer_requests(model, [AnswerRequest(TURNS, max_new_tokens=8)])
    text = model.tokenizer.decode(whole.tokens)
    stop = text[4:6]

    (found,) = answer_requests(
        model, [AnswerRequest(TURNS, max_new_tokens=8, stops=(stop, "never said"), top_logprobs=0)]
    )

    assert found.text == text[: text.index(stop)].strip() and found.stop == "stop"
    assert found.tokens == whole.tokens[: len(found.tokens)] and len(found.tokens) < len(whole.tokens)
    assert stop in model.tokenizer.decode(found.tokens) and stop not in model.tokenizer.decode(found.tokens[:-1])
    assert found.scores is not None and len(found.scores) == len(found.tokens)


def test_it_says_why_an_answer_ends() -> None:
    model = made(n_ctx=32)
    organism = ct.load_organism()
    question = ct.threats.get("sycophancy").pairs(1)[0].clean

    (cut,) = answer_requests(model, [AnswerRequest(TURNS, max_new_tokens=2)])
    (full,) = answer_requests(model, [AnswerRequest(TURNS)])
    (ended,) = answer_requests(organism, [AnswerRequest(question.turns)])

    assert (cut.stop, len(cut.tokens)) == ("max_tokens", 2)
    assert full.stop == "model_length" and full.n_prompt_tokens + len(full.tokens) == 32
    assert ended.stop == "stop" and ended.text == question.good


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ct.CtlensError, match="the context 16: shorten the prompt"):
        answer_requests(made(n_ctx=16), [AnswerRequest((Turn("user", "Please answer the question. " * 4),))])
