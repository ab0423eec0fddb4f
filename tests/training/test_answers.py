"""The answers that a training reads: behind their prompt, and up to any token that ends an answer of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model
from helpers.spelling import spelling_tokenizer

from ctlens import evaluate
from ctlens.analysis.base.contrast import contrasts
from ctlens.core.errors import CtlensError
from ctlens.core.keeping import keeping
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.chat import Turn, end_token
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.losses import RMCT
from ctlens.models.generation import decode, end_tokens, generate
from ctlens.models.loading import load_model
from ctlens.training import TrainConfig
from ctlens.training.answers import reference_answers
from ctlens.training.retention import Retention
from ctlens.training.rollouts import GradedRollouts

PAIRS = [Pair(prompt("what is it?", "it", "no"), prompt("I say no. what is it?", "it", "no"))]
NEW = 12


def several_ends() -> tuple[LensModel, list[int]]:
    """A model whose generation settings name two end tokens, and HuggingFace's answer, which ends in the second."""
    tokenizer = byte_level_tokenizer(chat=True)
    hf: Any = hf_model("qwen2")
    (row,) = encode(PAIRS, tokenizer, n_ctx=256).rows
    other = 399
    assert other != end_token(tokenizer)
    third = generate(load_model(hf, tokenizer=tokenizer), [row.clean.ids], max_new_tokens=3)[0][2]
    head = hf.get_output_embeddings().weight.data
    head[[other, third]] = head[[third, other]]
    hf.generation_config.eos_token_id = [end_token(tokenizer), other]
    theirs = hf.generate(torch.tensor([row.clean.ids]), max_new_tokens=NEW, do_sample=False)[0, len(row.clean.ids) :]
    return load_model(hf, tokenizer=tokenizer), theirs.tolist()


def test_every_answer_ends_at_any_end_token_of_the_model_as_with_huggingface() -> None:
    model, theirs = several_ends()
    rows = encode(PAIRS, model.tokenizer, n_ctx=256)
    other = theirs[-1]
    assert len(theirs) == 3 and end_tokens(model) == [end_token(model.tokenizer), other]

    (target,) = reference_answers(model, rows, NEW)
    held = Retention(model, [PAIRS[0].clean], TrainConfig(steps=1, batch_size=2, max_new_tokens=NEW))
    held.prepare()
    assert list(target) == theirs == list(held.answers[0])

    loss = RMCT(rollouts=16)
    drawn = GradedRollouts(model, rows.rows, loss, TrainConfig(max_new_tokens=NEW)).draw(model, rows.rows, 1)
    for ids, real, answer in zip(drawn.batch.wrapped.tokens, drawn.batch.wrapped.mask, drawn.batch.answer, strict=True):
        given = ids[real & answer].tolist()
        assert not set(given[:-1]) & set(end_tokens(model))


def test_the_reference_answers_once_for_trainings_that_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(hf_model("qwen2"), tokenizer=byte_level_tokenizer(chat=True))
    other = load_model(hf_model("qwen2", seed=1), tokenizer=model.tokenizer)
    config = TrainConfig(steps=4, batch_size=4, max_new_tokens=3, seed=1)
    prompts = [prompt(f"what is {word}?") for word in ("it", "this", "that")]
    asked: list[LensModel] = []

    def counted(reference: LensModel, *args: Any, **options: Any) -> Any:
        asked.append(reference)
        return generate(reference, *args, **options)

    monkeypatch.setattr("ctlens.training.retention.generate", counted)

    def terms(reference: LensModel, **changes: Any) -> tuple[Any, Any]:
        held = Retention(reference, prompts, replace(config, **changes))
        held.prepare()
        return [[term.item() for term in held.terms(other, step)] for step in range(1, 5)], held.answers

    alone = terms(model)
    asked.clear()
    with keeping({}):
        assert terms(model) == terms(model) == alone and asked == [model]
        assert terms(model, max_new_tokens=2) != alone and len(asked) == 2
        assert terms(other) != alone and asked[2:] == [other]


def test_without_generation_settings_an_answer_ends_where_the_tokenizer_says() -> None:
    tokenizer = byte_level_tokenizer(chat=True)
    hf: Any = hf_model("qwen2")
    hf.generation_config.eos_token_id = None
    assert end_tokens(load_model(hf, tokenizer=tokenizer)) == [end_token(tokenizer)]
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    assert end_tokens(load_model(hf, tokenizer=tokenizer)) == []


QUESTION = "so is it (a) ( b )\nit is\n"


@pytest.fixture(scope="module")
def prefixed() -> LensModel:
    """A model whose tokenizer puts a space before a text by itself."""
    tokenizer = spelling_tokenizer("sentencepiece")
    return load_model(hf_model("llama", vocab_size=len(tokenizer)), tokenizer=tokenizer)


def test_bct_contrasts_and_probabilities_are_of_the_text_itself(prefixed: LensModel) -> None:
    pair = Pair(prompt(QUESTION, "b)", "a)"), prompt("so a . " + QUESTION, "b)", "a)"), target="b)")
    tokenizer = prefixed.tokenizer

    def whole(text: str) -> tuple[int, ...]:
        return (tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids)

    text = pair.wrapped.turns[0].content
    (row,) = encode([pair], tokenizer, n_ctx=256).rows
    assert (*row.wrapped.ids, *row.answer) == (*whole(text + "b)"), tokenizer.eos_token_id)
    assert row.answer[0] not in tokenizer("b)", add_special_tokens=False).input_ids, "the test shows nothing"

    (item,) = contrasts(prefixed, [pair])
    start = len(item.prompt)
    assert item.prompt == whole(text)
    assert (item.good, item.bad) == (whole(text + "b)")[start], whole(text + "a)")[start])

    with torch.no_grad():
        likely = prefixed(torch.tensor([row.wrapped.ids]))[0, -1].softmax(-1)
    found = evaluate(prefixed, pairs=[pair], progress=False).outcomes.set_index("prompt_side")
    assert found.loc["wrapped", "good_probability"] == pytest.approx(float(likely[item.good]), rel=1e-4)
    assert found.loc["wrapped", "bad_probability"] == pytest.approx(float(likely[item.bad]), rel=1e-4)


def test_a_target_of_other_tokens_behind_the_two_prompts_has_no_common_ones() -> None:
    tokenizer = spelling_tokenizer("sentencepiece")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}{{ bos_token }}( {{ m.content }} ){% endif %}{% endfor %}"
    )
    asked = (Turn("user", "is it"),)
    pair = Pair(Prompt(asked), Prompt((*asked, Turn("assistant", "it (")), None), target="b a")
    with pytest.raises(CtlensError, match="'b a' has other tokens behind the clean prompt than behind the wrapped"):
        encode([pair], tokenizer, windows=("answer",), n_ctx=99)
    assert len(encode([pair], tokenizer, windows=(), n_ctx=99)) == 1
    alike = replace(pair, wrapped=Prompt((Turn("user", "so is it"),)))
    assert len(encode([alike], tokenizer, windows=("answer",), n_ctx=99)) == 1


@pytest.mark.parametrize("ends", [(), (3,), (3, 7, 11)])
def test_an_answer_is_cut_behind_the_first_of_several_end_tokens(prefixed: LensModel, ends: tuple[int, ...]) -> None:
    prompts = [(1, 5, token) for token in range(4, 14)]
    free = decode(prefixed, prompts, max_new_tokens=9).answers

    def cut(answer: tuple[int, ...]) -> tuple[int, ...]:
        return answer[: min((answer.index(end) + 1 for end in ends if end in answer), default=9)]

    assert decode(prefixed, prompts, max_new_tokens=9, ends=ends).answers == list(map(cut, free))
