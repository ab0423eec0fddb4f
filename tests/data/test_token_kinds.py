"""What each token of a prompt is: by hand, and for random chats every token's kind is that of its characters."""

from __future__ import annotations

import pytest
from helpers.models import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from ctlens.data.alignment import wrapper_positions
from ctlens.data.chat import Turn, render
from ctlens.data.token_kinds import TOKEN_KINDS, token_kinds

CHAT = byte_level_tokenizer(chat=True)
WORDS = ("the answer", " ", "\n", ".", "é", "漢", "🟦", "user", "right?")
TEXT = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


def kinds_of(clean: tuple[Turn, ...], wrapped: tuple[Turn, ...], answer: tuple[int, ...] = ()) -> list[dict[str, str]]:
    """Per side, the text of all tokens of a kind."""
    sides = render(CHAT, clean), render(CHAT, wrapped)
    texts = []
    for side, kinds in zip(sides, token_kinds(*sides, answer), strict=True):
        assert len(kinds) == len(side.ids) + len(answer) and set(kinds) <= set(TOKEN_KINDS)
        assert kinds[len(side.ids) :] == ("answer",) * len(answer)
        ids: dict[str, list[int]] = {}
        for token, kind in zip(side.ids, kinds, strict=False):
            ids.setdefault(kind, []).append(token)
        texts.append({kind: CHAT.decode(tokens) for kind, tokens in ids.items()})
    return texts


def test_a_wrapped_chat_by_hand() -> None:
    question = Turn("user", "Is it right?")
    clean, wrapped = kinds_of(
        (Turn("system", "Be brief."), question),
        (
            Turn("system", "Be brief."),
            Turn("user", "Hello"),
            Turn("assistant", "no"),
            Turn("user", "(hint) Is it right?"),
        ),
        answer=(5, 6),
    )
    assert clean["system"] == wrapped["system"] == "Be brief."
    assert clean["content"] == "Is it right?" and wrapped["content"].strip() == "Is it right?"
    assert "user" not in clean and wrapped["wrapper"].replace(" ", "") == "Hellono(hint)"
    assert clean["assistant header"] == wrapped["assistant header"] == "</s>\n<|assistant|>\n"
    assert wrapped["template"].startswith("<s><|system|>\n")


def test_a_content_that_is_worded_anew_leaves_the_roles() -> None:
    _, wrapped = kinds_of((Turn("user", "Is it right?"),), (Turn("user", "Is this right?"),))
    assert wrapped["user"] == "Is this right?" and "content" not in wrapped and "wrapper" not in wrapped


def test_a_prefill_is_the_wrapper_and_its_header_the_template() -> None:
    clean, wrapped = kinds_of((Turn("user", "Is it?"),), (Turn("user", "Is it?"), Turn("assistant", "Sure")))
    assert wrapped["wrapper"] == "Sure" and wrapped["content"] == clean["content"] == "Is it?"
    assert "assistant header" not in wrapped and wrapped["template"].endswith("<|assistant|>\n")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(before=TEXT, content=TEXT.filter(str.strip), after=TEXT, system=TEXT.filter(str.strip))
def test_every_token_is_what_its_characters_are(before: str, content: str, after: str, system: str) -> None:
    turns = (Turn("system", system), Turn("user", content))
    clean = render(CHAT, turns)
    wrapped = render(CHAT, (turns[0], Turn("user", before + content + after)))
    clean_kinds, wrapped_kinds = token_kinds(clean, wrapped)

    assert {i for i, kind in enumerate(wrapped_kinds) if kind == "wrapper"} == set(
        wrapper_positions(clean, wrapped)
    ) - {i for i, kind in enumerate(wrapped_kinds) if kind == "content"}
    for side, kinds in ((clean, clean_kinds), (wrapped, wrapped_kinds)):
        for (left, right), kind in zip(side.offsets, kinds, strict=True):
            inside = any(left < end and right > start for start, end in side.contents)
            assert inside == (kind in ("system", "user", "assistant", "content", "wrapper"))
            if kind == "assistant header":
                assert left >= side.contents[-1][1]
    if clean.text.count(content) == 1:
        assert "content" in clean_kinds and "user" not in clean_kinds


@pytest.mark.parametrize("content", ["é", "🟦", "漢漢"])
def test_characters_of_several_tokens_are_of_one_kind(content: str) -> None:
    clean, wrapped = kinds_of((Turn("user", content),), (Turn("user", f"no {content} yes"),))
    assert clean["content"] == content and wrapped["content"].strip() == content
