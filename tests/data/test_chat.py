"""A prompt has at most one BOS, and the span of each turn holds exactly its content."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.models import CHAT_TEMPLATE, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ctlens.core.errors import CtlensError
from ctlens.core.keeping import KeptResults, keeping
from ctlens.data.chat import TEMPLATE_DATE, Turn, answer_ids, end_token, render

STRIPPING = CHAT_TEMPLATE.replace("message.content", "message.content | trim")
CHAT = byte_level_tokenizer(chat=True)


def templated(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def turns(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(role, content) for role, content in pairs)


def contents(tokenizer: Any, *pairs: tuple[str, str]) -> list[str]:
    rendered = render(tokenizer, turns(*pairs))
    return [rendered.text[start:end] for start, end in rendered.contents]


def bos_count(tokenizer: Any, *pairs: tuple[str, str]) -> int:
    return render(tokenizer, turns(*pairs)).ids.count(tokenizer.bos_token_id)


def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts a BOS before every text by itself."""
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def test_a_chat_by_hand(chat_tokenizer: PreTrainedTokenizerFast):
    rendered = render(chat_tokenizer, turns(("system", "Be."), ("user", "Hi")))
    assert rendered.text == "<s><|system|>\nBe.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert rendered.contents == ((14, 17), (31, 33))
    assert rendered.offsets[0] == (0, 3)
    assert chat_tokenizer.decode(list(rendered.ids)) == rendered.text


def test_a_plain_text_by_hand(tokenizer: PreTrainedTokenizerFast):
    rendered = render(tokenizer, turns(("user", "1 answer")))
    assert tokenizer.convert_ids_to_tokens(list(rendered.ids)) == ["<s>", "1", "Ġanswer"]
    assert rendered.offsets == ((0, 0), (0, 1), (1, 8))
    assert rendered.contents == ((0, 8),)


def test_there_is_one_bos_whoever_adds_it():
    assert bos_count(byte_level_tokenizer(), ("user", "a")) == 1
    assert bos_count(byte_level_tokenizer(), ("user", "<s>a")) == 1
    assert bos_count(adding_bos(byte_level_tokenizer()), ("user", "a")) == 1
    assert bos_count(byte_level_tokenizer(chat=True), ("user", "a")) == 1
    assert bos_count(adding_bos(byte_level_tokenizer(chat=True)), ("user", "a")) == 1


def test_there_is_no_bos_where_the_template_or_the_tokenizer_has_none():
    assert bos_count(templated(CHAT_TEMPLATE.replace("{{ bos_token }}", "")), ("user", "a")) == 0
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = None
    assert render(tokenizer, turns(("user", "a"))).offsets == ((0, 1),)


def test_a_template_that_doubles_the_bos_is_refused():
    with pytest.raises(CtlensError, match="two BOS tokens: remove one from the template"):
        render(templated("{{ bos_token }}" + CHAT_TEMPLATE), turns(("user", "a")))


def test_spans_hold_the_contents_even_when_they_repeat_each_other_and_the_template():
    chat = (("system", "user"), ("user", "assistant"), ("assistant", "user"), ("user", "<|user|>\nuser"))
    assert contents(CHAT, *chat) == [content for _, content in chat]


def test_a_last_assistant_turn_is_continued_and_not_closed():
    rendered = render(CHAT, turns(("user", "Hi"), ("assistant", "Sure: ")))
    assert rendered.text == "<s><|user|>\nHi</s>\n<|assistant|>\nSure: "
    assert rendered.text[slice(*rendered.contents[-1])] == "Sure: "


@pytest.mark.parametrize("prefill", ["s", "</", "user", " Sure ", "\n"])
def test_a_prefill_that_looks_like_the_template_is_continued_all_the_same(prefill: str):
    assert render(CHAT, turns(("user", "a"), ("assistant", prefill))).text.endswith("<|assistant|>\n" + prefill)
    assert contents(CHAT, ("user", "a"), ("assistant", prefill)) == ["a", prefill]


def test_a_template_that_strips_contents_moves_the_spans():
    chat = (("system", " s\n"), ("user", "\n a b "))
    assert contents(templated(STRIPPING), *chat) == ["s", "a b"]
    assert contents(templated(STRIPPING), *chat, ("assistant", "Sure! ")) == ["s", "a b", "Sure!"]


REWRITING = {
    "upper case": CHAT_TEMPLATE.replace("message.content", "message.content | upper"),
    "twice": CHAT_TEMPLATE.replace("message.content", "message.content * 2"),
    "dropped": CHAT_TEMPLATE.replace("message.content", "'x'"),
    "reordered": CHAT_TEMPLATE.replace("in messages", "in messages | reverse"),
}


@pytest.mark.parametrize("template", REWRITING.values(), ids=REWRITING)
def test_a_template_that_rewrites_messages_is_refused(template: str):
    with pytest.raises(CtlensError, match="rewrites or reorders messages"):
        render(templated(template), turns(("user", "ab"), ("assistant", "cd"), ("user", "ef")))


def test_a_template_that_refuses_the_messages_gives_its_reason():
    picky = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}" + CHAT_TEMPLATE
    assert contents(templated(picky), ("user", "a")) == ["a"]
    with pytest.raises(CtlensError, match="refuses these messages: System role not supported"):
        render(templated(picky), turns(("system", "s"), ("user", "a")))


def test_a_template_that_drops_the_prefill_is_refused():
    silent = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
    with pytest.raises(CtlensError, match="refuses these messages: continue_final_message"):
        render(templated(silent), turns(("user", "a"), ("assistant", "b")))


@pytest.mark.parametrize("chat", [(("system", "s"), ("user", "a")), (("assistant", "a"),)])
def test_messages_without_a_template_are_refused(tokenizer: PreTrainedTokenizerFast, chat: tuple[tuple[str, str], ...]):
    with pytest.raises(CtlensError, match="no chat template: give each prompt as one plain text"):
        render(tokenizer, turns(*chat))


def test_a_missing_or_slow_tokenizer_is_refused():
    with pytest.raises(CtlensError, match="has no tokenizer: load it from a folder that holds one"):
        render(None, turns(("user", "a")))
    with pytest.raises(CtlensError, match="fast tokenizer is needed"):
        render(object(), turns(("user", "a")))


def test_positions_are_the_tokens_that_share_a_character(tokenizer: PreTrainedTokenizerFast):
    rendered = render(tokenizer, turns(("user", "t 🟦")))
    assert rendered.offsets == ((0, 0), (0, 1), (1, 2), *[(2, 3)] * 4)
    assert rendered.positions((0, 1)) == (1,)
    assert rendered.positions((1, 3)) == (2, 3, 4, 5, 6)
    assert rendered.positions((1, 1)) == rendered.positions((3, 9)) == ()


def test_an_answer_is_closed_by_the_end_token_where_there_is_one():
    tokenizer = byte_level_tokenizer()
    asked = render(tokenizer, turns(("user", "is it?")))
    ids = answer_ids(tokenizer, asked, "1 answer")
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["1", "Ġanswer", "</s>"]
    assert answer_ids(adding_bos(byte_level_tokenizer()), asked, "1 answer") == ids
    tokenizer.eos_token = None
    assert answer_ids(tokenizer, asked, "1 answer") == ids[:-1]


TEXT = st.text(alphabet="ae \n<|>/s🟦é\ue000", min_size=1, max_size=8)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(chat=CHATS)
def test_spans_hold_the_contents_of_any_chat(chat: list[tuple[str, str]]):
    rendered = render(CHAT, turns(*chat))
    assert [rendered.text[start:end] for start, end in rendered.contents] == [content for _, content in chat]
    assert rendered.text.endswith("<|assistant|>\n") or chat[-1][0] == "assistant"
    assert CHAT.decode(list(rendered.ids), clean_up_tokenization_spaces=False) == rendered.text


# Frames in the manner of the field's chat models; none of them is a copy.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}<turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
FRAMES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", 0),
    "headers": (HEADERS, ["<|head|>", "<|tail|>", "<|eot|>"], "<|eot|>", 1),
    "turns": (TURNS, ["<turn>", "<end>"], "<end>", 1),
    "inst": (INST, [], "</s>", 1),
}


def framed(name: str) -> PreTrainedTokenizerFast:
    template, special, _, _ = FRAMES[name]
    tokenizer = templated(template)
    tokenizer.add_special_tokens({"additional_special_tokens": special} if special else {})
    return tokenizer


@pytest.mark.parametrize("name", FRAMES)
def test_an_answer_ends_in_the_token_that_its_template_ends_turns_with(name: str):
    tokenizer = framed(name)
    closing = tokenizer.convert_tokens_to_ids(FRAMES[name][2])
    assert end_token(tokenizer) == closing
    asked = render(tokenizer, turns(("user", "hi")))
    assert answer_ids(tokenizer, asked, "no") == (*answer_ids(tokenizer, asked, "no", end=False), closing)
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}], tokenize=False
    )
    assert written.partition("no")[2].startswith(FRAMES[name][2])


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("adds", [False, True], ids=["as it is", "with a tokenizer that adds one"])
def test_the_frames_have_the_bos_that_they_write_and_no_other(name: str, adds: bool):
    tokenizer = adding_bos(framed(name)) if adds else framed(name)
    several = (("user", "Is it right?"), ("assistant", "no"), ("user", "Sure? 🟦 é"))
    assert bos_count(tokenizer, *several) == FRAMES[name][3]
    assert contents(tokenizer, *several) == ["Is it right?", "no", "Sure? 🟦 é"]


@pytest.mark.parametrize("name", FRAMES)
def test_a_system_message_has_its_place_or_is_refused_with_advice(name: str):
    chat = (("system", "Be brief."), ("user", "Is it right?"))
    if name == "turns":
        with pytest.raises(
            CtlensError, match="System role not supported; put the system text in front of the first user"
        ):
            render(framed(name), turns(*chat))
    else:
        assert contents(framed(name), *chat) == ["Be brief.", "Is it right?"]


@pytest.mark.parametrize("name", FRAMES)
def test_a_prompt_ends_where_the_answer_begins_and_a_prefill_is_left_open(name: str):
    rendered = render(framed(name), turns(("user", "hi")))
    heads = {"chatml": "assistant\n", "headers": "<|tail|>\n\n", "turns": "model\n", "inst": "[/INST]"}
    assert rendered.text.endswith(heads[name])
    assert render(framed(name), turns(("user", "hi"), ("assistant", "Sure"))).text.endswith("Sure")


def test_a_template_without_a_closing_token_leaves_it_to_the_tokenizer():
    assert end_token(templated("{% for m in messages %}{{ m.content }}\n{% endfor %}")) == CHAT.eos_token_id
    assert end_token(byte_level_tokenizer()) == CHAT.eos_token_id


def test_a_changed_template_is_seen():
    tokenizer = framed("turns")
    assert end_token(tokenizer) != CHAT.eos_token_id
    tokenizer.chat_template = CHAT_TEMPLATE
    assert end_token(tokenizer) == CHAT.eos_token_id


def test_prompts_are_rendered_once_where_they_are_kept():
    tokenizer = framed("turns")
    asked = turns(("user", "Is it right?"))
    alone = render(tokenizer, asked)
    kept: KeptResults = {}

    with keeping(kept):
        first = render(tokenizer, asked)
        tokenizer.chat_template = CHAT_TEMPLATE
        reworded = render(tokenizer, asked)
    with keeping(kept):
        tokenizer.chat_template = FRAMES["turns"][0]
        assert render(tokenizer, asked) is first

    assert first == alone != reworded
    assert render(tokenizer, asked) is not first, "nothing is kept outside the block"


def test_a_block_inside_another_keeps_its_prompts_with_the_outer_one():
    tokenizer = framed("turns")
    asked = turns(("user", "Is it right?"))
    kept: KeptResults = {}

    with keeping(kept):
        with keeping():
            first = render(tokenizer, asked)
        assert render(tokenizer, asked) is first and len(kept) == 1
    with keeping():
        alone = render(tokenizer, asked)
        assert alone is not first and render(tokenizer, asked) is alone
    with keeping():
        assert render(tokenizer, asked) is not alone, "nothing is kept behind the outermost block"


def test_of_several_named_templates_the_default_one_is_taken(tmp_path: Path):
    named = framed("turns")
    named.chat_template = {"tool_use": CHATML, "default": TURNS}
    named.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    alone = framed("turns")
    asked = turns(("user", "Is it right?"))
    assert isinstance(loaded.chat_template, dict)
    assert render(loaded, asked) == render(alone, asked)
    assert answer_ids(loaded, render(loaded, asked), "no") == answer_ids(alone, render(alone, asked), "no")
    assert end_token(loaded) == end_token(alone) != CHAT.eos_token_id


def test_named_templates_without_a_default_are_refused_by_their_names():
    named = framed("turns")
    named.chat_template = {"tool_use": CHATML, "rag": TURNS}
    with pytest.raises(CtlensError, match=r"several chat templates \(rag, tool_use\) and none is called default: set"):
        render(named, turns(("user", "Is it right?")))


@pytest.mark.parametrize("day", ["%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%A, %-d.%-m.%y at %H:%M:%S", "%F (%a, day %j)"])
def test_a_template_has_one_date_whenever_it_is_rendered(day: str, monkeypatch: pytest.MonkeyPatch):
    class Clock(datetime):
        day_of_march = 1

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 3, cls.day_of_march, 12)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    dated = "{% set today = strftime_now('" + day + "') %}{% if strftime_now is defined %}{{ today }}\n{% endif %}"
    tokenizer = templated(dated + CHAT_TEMPLATE)
    asked = turns(("user", "Is it right?"))
    first = render(tokenizer, asked)
    Clock.day_of_march = 2
    assert render(tokenizer, asked) == first
    assert first.text == TEMPLATE_DATE.strftime(day) + "\n" + render(CHAT, asked).text
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": "Is it right?"}], tokenize=False)
    assert "2031" in theirs or "31" in theirs, "HuggingFace's own has the date of the clock"


def test_a_clock_changes_nothing_else_in_a_template():
    silent = "  {% if false %}{{ strftime_now('%d') }}{% endif %}\n\n" + CHAT_TEMPLATE
    asked = turns(("system", "Be brief."), ("user", "Is it right?"))
    messages = [{"role": turn.role, "content": turn.content} for turn in asked]
    tokenizer = templated(silent)
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, asked).text == theirs
