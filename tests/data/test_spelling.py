"""The tokens of a text cover it, and what no token stands for is refused by its word."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.spelling import CHARACTERS, TOKENIZERS, WORDS, spelling_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctlens.core.errors import CtlensError, UnknownWords
from ctlens.data.batch import encode_pair
from ctlens.data.chat import Turn, answer_ids, opening_token, render, with_answer
from ctlens.data.pairs import Pair, prompt
from ctlens.data.spelling import spaces, spell

LETTERS = st.text(alphabet=CHARACTERS, min_size=1, max_size=12).filter(str.strip)
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
FAST = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def asked(text: str) -> tuple[Turn, ...]:
    return (Turn("user", text),)


def trimmed() -> Any:
    tokenizer = spelling_tokenizer("byte-level")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@FAST
@given(text=LETTERS)
def test_spans_that_a_tokenizer_trims_are_those_of_one_that_does_not(text: str) -> None:
    assert spell(TRIMMED, text) == spell(TOKENIZERS["byte-level"], text)


TRIMMED = trimmed()


def test_tokens_of_spaces_belong_to_the_wrapper_and_to_the_content() -> None:
    pair = Pair(prompt("if x:\n    a  b"), prompt("so   it\n    is.\nif x:\n    a  b"))
    rows = [encode_pair(pair, tokenizer, ["content"]) for tokenizer in (TRIMMED, TOKENIZERS["byte-level"])]
    assert spaces(TRIMMED) == "trimmed"
    assert rows[0] == rows[1]
    assert len(rows[0].wrapper) + len(rows[0].alignments["content"].clean) == len(rows[0].wrapped.ids) - 1  # the BOS


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("byte-level", "spelled"), ("sentencepiece", "spelled"), ("words", "separators"), ("unigram", "spelled")],
)
def test_what_a_space_is(kind: str, expected: str) -> None:
    assert spaces(TOKENIZERS[kind]) == expected


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_where_everything_is_spelled_in_bytes_nothing_is_unknown(kind: str) -> None:
    ids = render(TOKENIZERS[kind], asked("a 😀 \u0416 b")).ids
    assert TOKENIZERS[kind].decode(ids, skip_special_tokens=True).strip() == "a 😀 \u0416 b"


@pytest.mark.parametrize("kind", ["sentencepiece", "words"])
def test_an_unknown_word_is_named(kind: str) -> None:
    with pytest.raises(UnknownWords, match="does not know '\u0416' in 'a \u0416 b': give the model .*--model"):
        render(TOKENIZERS[kind], asked("a \u0416 b"))
    answered = render(TOKENIZERS[kind], asked("a b"))
    with pytest.raises(UnknownWords, match="does not know '\u0416' in '\u0416'"):
        answer_ids(TOKENIZERS[kind], answered, "\u0416")


def test_of_many_unknown_words_three_are_named_and_the_rest_counted() -> None:
    text = " ".join("\u0416\u0417\u0418\u0419\u041a")
    with pytest.raises(UnknownWords, match="know '\u0416', '\u0417', '\u0418' and 2 more in"):
        render(TOKENIZERS["words"], asked(text))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_mark_of_an_unknown_word_is_none_that_one_may_write(kind: str) -> None:
    with pytest.raises(UnknownWords, match="does not know '<unk>'"):
        render(TOKENIZERS[kind], asked("a <unk> b"))


def test_a_token_for_unknown_words_that_the_tokenizer_does_not_name_is_found_too() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.unk_token is None and render(tokenizer, asked("a a")).ids == (0, 0)
    with pytest.raises(UnknownWords, match="does not know 'b'"):
        render(tokenizer, asked("a b a"))


def test_a_character_that_is_dropped_is_unknown_but_a_mark_on_a_letter_may_be() -> None:
    core = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert spell(tokenizer, "bb axb b") == ((1, 1, 0, 1, 1), ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)))  # spans shift
    with pytest.raises(UnknownWords, match="does not know 'axb b'"):
        render(tokenizer, asked("bb axb b"))
    core.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert render(tokenizer, asked("a\u0301b")).ids == (0, 1)


def test_a_token_that_also_begins_and_ends_texts_is_not_taken_for_an_unknown_word() -> None:
    tokenizer = spelling_tokenizer("byte-level")  # as GPT-2's
    tokenizer.add_special_tokens(dict.fromkeys(("unk_token", "bos_token", "eos_token"), "</s>"))
    assert render(tokenizer, asked("a</s>b")).ids.count(tokenizer.eos_token_id) == 2


def test_a_template_may_use_the_mark_of_an_unknown_word() -> None:
    tokenizer = spelling_tokenizer("words")
    tokenizer.chat_template = "<unk> {% for m in messages %}{{ m.content }} zzz {% endfor %}"
    assert len(render(tokenizer, asked("a b")).ids) == 4
    with pytest.raises(UnknownWords, match="does not know 'zzz'"):
        render(tokenizer, asked("a zzz"))


def test_half_a_character_is_refused_in_a_sentence() -> None:
    with pytest.raises(UnknownWords, match="cannot read"):
        render(TOKENIZERS["byte-level"], asked("a \ud83d"))


def whole(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of a text behind a BOS, by the tokenizer alone."""
    return (tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@FAST
@given(data=st.data())
def test_an_answer_has_the_tokens_of_the_whole_text_behind_its_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    texts = SENTENCES if kind == "words" else LETTERS
    before, answer = data.draw(texts), data.draw(texts)
    between = " " if kind == "words" else ""
    prompted = render(tokenizer, asked(before))
    joined = whole(tokenizer, before + between + answer)
    if joined[: len(prompted.ids)] != prompted.ids:
        with pytest.raises(CtlensError, match="fuses with the end of its prompt"):
            answer_ids(tokenizer, prompted, answer)
    else:
        assert answer_ids(tokenizer, prompted, answer, end=False) == joined[len(prompted.ids) :]
        assert (*prompted.ids, *answer_ids(tokenizer, prompted, answer)) == (*joined, tokenizer.eos_token_id)


def test_an_answer_by_itself_begins_with_another_token_than_behind_its_prompt() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    names = tokenizer.convert_ids_to_tokens
    prompted = render(tokenizer, asked("so it is ("))
    assert names(list(answer_ids(tokenizer, prompted, "b a", end=False))) == ["b", "▁a"]
    assert names(tokenizer("b a", add_special_tokens=False).input_ids) == ["▁b", "▁a"]


def test_an_answer_that_fuses_with_its_prompt_is_refused_with_advice() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    prompted = render(tokenizer, asked("so it i"))
    with pytest.raises(CtlensError, match="the answer 's it' fuses .* 'so it i', .*begin the answer with a space"):
        answer_ids(tokenizer, prompted, "s it")
    assert opening_token(tokenizer, prompted, "s it") is None
    assert opening_token(tokenizer, prompted, " it") == answer_ids(tokenizer, prompted, " it")[0]
    assert with_answer(tokenizer, prompted, "s it").ids == whole(tokenizer, "so it is it")


INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ bos_token }} ( {{ m.content }} ){% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_stands_where_the_chat_template_puts_it(kind: str) -> None:
    tokenizer = spelling_tokenizer(kind)
    tokenizer.chat_template = INST
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b a"}]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    prompted = render(tokenizer, asked("a b"))
    ids = answer_ids(tokenizer, prompted, "b a")
    assert (*prompted.ids, *ids) == tuple(tokenizer(written, add_special_tokens=False).input_ids)
    assert answer_ids(tokenizer, prompted, " b a") == ids


def test_a_prefill_is_continued_without_a_space_of_the_template() -> None:
    tokenizer = spelling_tokenizer("byte-level")
    tokenizer.chat_template = INST
    prefilled = render(tokenizer, (Turn("user", "a b"), Turn("assistant", "so (")))
    joined = tokenizer("<s> ( a b ) so (b a", add_special_tokens=False).input_ids
    assert (*prefilled.ids, *answer_ids(tokenizer, prefilled, "b a", end=False)) == tuple(joined)
