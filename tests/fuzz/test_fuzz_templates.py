"""Chat templates of every kind: a prompt is what the template writes, token by token, or one sentence refuses it."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.fuzzing import FUZZ, refused_in_a_sentence
from helpers.models import CHAT_TEMPLATE, byte_level_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from ctlens.core.errors import CtlensError
from ctlens.data.batch import encode_pair
from ctlens.data.chat import Turn, end_token, render, turn_tail
from ctlens.data.pairs import Pair, Prompt

pytestmark = pytest.mark.fuzz

BODY = "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n"
LOOP = "{% for message in messages %}" + BODY + "{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES: dict[str, Any] = {
    "plain": LOOP + GENERATION,
    "no generation prompt": LOOP,
    "generation prompt always": LOOP + "<|assistant|>",
    "two bos": "{{ bos_token }}{{ bos_token }}" + LOOP + GENERATION,
    "the date of today": "{{ strftime_now('%d %B %Y') }}\n" + LOOP + GENERATION,
    "a date if there is one": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + LOOP + GENERATION,
    "undefined name": "{{ tools_in_user_message }}" + LOOP + GENERATION,
    "attribute of an undefined name": "{{ documents.first.text }}" + LOOP,
    "unknown function": "{{ render_it(messages) }}",
    "unknown filter": "{{ messages | conversation }}",
    "open block": "{% for message in messages %}" + BODY,
    "broken expression": "{{ messages[ }}",
    "no messages": "hello",
    "empty text": "",
    "only the last message": "{{ messages[-1].content }}",
    "first message only": "{{ messages[0].content }}" + GENERATION,
    "second message": "{{ messages[1].content }}",
    "messages backwards": "{% for message in messages | reverse %}" + BODY + "{% endfor %}" + GENERATION,
    "every message twice": LOOP + LOOP + GENERATION,
    "upper case": LOOP.replace("message.content", "message.content | upper") + GENERATION,
    "stripped": LOOP.replace("message.content", "message.content | trim") + GENERATION,
    "shortened": LOOP.replace("message.content", "message.content[:3]") + GENERATION,
    "escaped": LOOP.replace("message.content", "message.content | e") + GENERATION,
    "as json": LOOP.replace("message.content", "message.content | tojson") + GENERATION,
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LOOP,
    "always refuses": "{{ raise_exception('') }}",
    "a role of its own": LOOP.replace("message.role", "{'user': 'human'}[message.role]") + GENERATION,
    "number and text": "{{ 1 + 'a' }}" + LOOP,
    "division by zero": "{{ 1 / 0 }}" + LOOP,
    "a loop without end": "{% for n in range(10 ** 12) %}x{% endfor %}" + LOOP,
    "deep": "{% if messages %}" * 90 + LOOP + "{% endif %}" * 90,
    "a macro that calls itself": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "forbidden attribute": "{{ messages.__class__.__mro__ }}" + LOOP,
    "lone surrogate": "\ud83d" + LOOP,
    "private characters": "\ue000" + LOOP + "\ue001" + GENERATION,
    "generation block": LOOP.replace(
        "{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}"
    ),
    "several, with a default": {"default": LOOP + GENERATION, "tool_use": "hello"},
    "several, without a default": {"rag": LOOP, "tool_use": "hello"},
    "no text": 3,
}
PIECES = (
    LOOP,
    GENERATION,
    BODY,
    "{% for message in messages %}",
    "{% endfor %}",
    "{% if add_generation_prompt %}",
    "{% else %}",
    "{% endif %}",
    "{{ messages }}",
    "{{ nobody }}",
    "{{ messages[0] }}",
    "{{ messages[-1]['content'] }}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{% set x = namespace(a=1) %}",
    "{% break %}",
    "{#",
    "#}",
    "{{",
    "}}",
    "{%- ",
    " -%}",
    "\n",
    "</s>",
)
CONVERSATIONS = (
    (Turn("user", "Is it right?"),),
    (Turn("system", "Be kind."), Turn("user", " Is it right?\n")),
    (Turn("user", "Is it right?"), Turn("assistant", "Sure, here it is:")),
    (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "")),
    (Turn("user", "{{ messages }} {% raw %} </s> <s>"),),
)
USER = Prompt((Turn("user", "Is it right?"),))


def check(template: Any) -> None:
    """Every conversation is rendered as the template writes it, or refused; so are a pair and the ends of answers."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    for turns in CONVERSATIONS:
        try:
            found = render(tokenizer, turns)
        except CtlensError as error:
            assert str(error).strip()
            continue
        assert [found.text[slice(*span)] for span in found.contents] in (
            [turn.content for turn in turns],
            [turn.content.strip() for turn in turns],
        )
        assert len(found.ids) == len(found.offsets)
        assert "".join(found.text[slice(*span)] for span in dict.fromkeys(found.offsets)) == found.text
    wrapped = Prompt((Turn("user", "I don't think so. Is it right?"),))
    refused_in_a_sentence(encode_pair, Pair(USER, wrapped, target="yes"), tokenizer, ["shared", "lines", "suffix"])
    refused_in_a_sentence(end_token, tokenizer)
    refused_in_a_sentence(turn_tail, tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_what_it_says_or_is_refused(name: str) -> None:
    check(TEMPLATES[name])


@FUZZ
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
def test_random_templates_render_what_they_say_or_are_refused(pieces: list[str]) -> None:
    check("".join(pieces))


@FUZZ
@given(at=st.integers(0, len(CHAT_TEMPLATE) - 1), width=st.integers(0, 12), piece=st.sampled_from(("", *PIECES)))
def test_a_damaged_template_renders_what_it_says_or_is_refused(at: int, width: int, piece: str) -> None:
    check(CHAT_TEMPLATE[:at] + piece + CHAT_TEMPLATE[at + width :])
