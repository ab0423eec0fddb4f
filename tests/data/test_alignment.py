"""Matched positions hold the same token of the same content: by hand, and for thousands of random wrappers."""

from __future__ import annotations

from itertools import accumulate, pairwise, zip_longest
from string import printable

import pytest
from helpers.models import byte_level_tokenizer
from helpers.tiers import unit_first
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctlens.core.errors import CtlensError
from ctlens.data.alignment import FUSED, RETOKENISED, UNSHARED, WINDOWS, Alignment, align, opening, wrapper_positions
from ctlens.data.chat import Rendered, Turn, render

FRAME = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
PLAIN = byte_level_tokenizer()
CHAT = byte_level_tokenizer(chat=True)

WORDS = ("the", "answer", " ", "  ", "\n", ".", "a", "t", "s", "'s", "é", "漢", "🟦", "👩‍👧", "1", "user", "assistant")
TEXT = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
CONTENT = TEXT.filter(str.strip)
MANY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def spelled(merges: tuple[str, ...] = (), template: str | None = FRAME) -> PreTrainedTokenizerFast:
    """One token a character, except for `merges` of two characters, applied in their order."""
    vocabulary = {piece: index for index, piece in enumerate((*printable, *merges))}
    core = Tokenizer(models.BPE(vocabulary, [(merge[0], merge[1]) for merge in merges]))
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


def user(text: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Rendered:
    return render(tokenizer or spelled(), (Turn("user", text),))


def chat(*turns: tuple[str, str]) -> Rendered:
    return render(spelled(), tuple(Turn(role, content) for role, content in turns))


def matches(alignment: Alignment) -> list[tuple[int, int]]:
    return list(zip(alignment.clean, alignment.wrapped, strict=True))


def byte_spans(tokenizer: PreTrainedTokenizerFast, prompt: Rendered) -> list[tuple[int, int]]:
    """The bytes of the text that each token covers, from the tokens alone: byte-level tokens have a letter per byte."""
    pieces = tokenizer.convert_ids_to_tokens(list(prompt.ids))
    sizes = [0 if span == (0, 0) else len(piece) for span, piece in zip(prompt.offsets, pieces, strict=True)]
    return list(pairwise(accumulate(sizes, initial=0)))


def content_bytes(tokenizer: PreTrainedTokenizerFast, prompt: Rendered, text: str) -> dict[int, tuple[int, int]]:
    """Per token inside the only `text` of the last message, its bytes relative to the text's start."""
    start = len(prompt.text[: prompt.text.index(text, prompt.contents[-1][0])].encode())
    length = len(text.encode())
    relative = ((i, (left - start, right - start)) for i, (left, right) in enumerate(byte_spans(tokenizer, prompt)))
    return {i: span for i, span in relative if 0 <= span[0] < span[1] <= length}


def test_each_window_by_hand():
    clean, wrapped = user("ab"), user("xxabyy")
    assert (clean.text, wrapped.text) == ("[ab]:", "[xxabyy]:")
    assert matches(align(clean, wrapped, "content")) == [(1, 3), (2, 4)]
    assert matches(align(clean, wrapped, "suffix")) == [(3, 7), (4, 8)]
    assert matches(align(clean, wrapped, "shared")) == [(1, 3), (2, 4), (3, 7), (4, 8)]
    assert matches(align(clean, wrapped, "explicit", shared=["b"])) == [(2, 4)]


def test_last_is_the_token_that_predicts_the_answer():
    alignment = align(user("ab"), user("xxabyy"), "last")
    assert (matches(alignment), alignment.candidates, alignment.drops) == ([(4, 8)], 1, {})
    tokenizer = spelled(template=None)
    assert matches(align(user("ab", tokenizer), user("cb", tokenizer), "last")) == [(1, 1)]


def test_last_is_refused_where_a_prefill_ends_in_another_token():
    clean = chat(("user", "ab"))
    refused = align(clean, chat(("user", "ab"), ("assistant", "sure")), "last")
    assert (matches(refused), refused.candidates, refused.drops) == ([], 1, {UNSHARED: 1})
    assert refused.refusal == "the prompts end in different tokens"
    assert matches(align(clean, chat(("user", "ab"), ("assistant", "s:")), "last")) == [(4, 6)]


def test_shared_is_the_default_and_counts_what_it_leaves_out():
    alignment = align(user("ab"), user("xxabyy"))
    assert (alignment.window, alignment.candidates, alignment.refusal) == ("shared", 5, "")
    assert alignment.drops == {UNSHARED: 1}
    assert alignment.coverage == 4 / 5


def test_an_explicit_text_may_be_wrapped_on_both_sides():
    clean, wrapped = user("pp ab q"), user("x ab yyy")
    alignment = align(clean, wrapped, "explicit", shared=["ab"])
    assert matches(alignment) == [(4, 3), (5, 4)]
    assert alignment.coverage == 1


def test_a_token_fused_with_the_end_of_the_wrapper_is_dropped_and_nothing_shifts():
    tokenizer = spelled(merges=("ab",))
    clean, wrapped = user("bcd", tokenizer), user("abcd", tokenizer)
    assert tokenizer.convert_ids_to_tokens(wrapped.ids) == ["[", "ab", "c", "d", "]", ":"]
    alignment = align(clean, wrapped, "content")
    assert matches(alignment) == [(2, 2), (3, 3)]
    assert alignment.drops == {FUSED: 1}
    assert matches(align(clean, wrapped, "shared")) == [(2, 2), (3, 3), (4, 4), (5, 5)]


def test_a_token_fused_with_the_template_is_dropped_from_the_content():
    tokenizer = spelled(merges=("[b", "d]"))
    alignment = align(user("bcd", tokenizer), user("xbcd", tokenizer), "content")
    assert matches(alignment) == [(1, 3)]
    assert (alignment.candidates, alignment.drops) == (3, {FUSED: 2})


def test_a_fused_token_at_the_end_is_counted_once_by_the_shared_window():
    tokenizer = spelled(merges=("d]",))
    alignment = align(user("bcd", tokenizer), user("xbcd", tokenizer), "shared")
    assert matches(alignment) == [(1, 2), (2, 3), (4, 5)]
    assert alignment.drops == {FUSED: 1, UNSHARED: 1}


def test_a_fused_boundary_may_split_the_next_token_differently():
    tokenizer = spelled(merges=("ab", "bc", "cd"))
    clean, wrapped = user("bcde", tokenizer), user("abcde", tokenizer)
    assert tokenizer.convert_ids_to_tokens(clean.ids)[1:4] == ["bc", "d", "e"]
    assert tokenizer.convert_ids_to_tokens(wrapped.ids)[1:4] == ["ab", "cd", "e"]
    alignment = align(clean, wrapped, "content")
    assert matches(alignment) == [(3, 3)]
    assert alignment.drops == {FUSED: 1, RETOKENISED: 1}


def test_a_content_that_only_fuses_is_refused_by_content_and_by_shared():
    tokenizer = spelled(merges=("ab",))
    for window in ("content", "shared"):
        alignment = align(user("b", tokenizer), user("ab", tokenizer), window)
        assert (alignment.clean, alignment.drops) == ((), {FUSED: 1})
        assert "share no token" in alignment.refusal


def test_the_bytes_of_one_character_match_as_a_whole_or_not_at_all():
    """The square is F0 9F 9F A6: with its first byte fused away, the second 9F would meet the first."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE({**alphabet, "Ġð": 256}, [("Ġ", "ð")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    alignment = align(user("🟦b", tokenizer), user("a 🟦b", tokenizer), "content")
    assert matches(alignment) == [(4, 5)]
    assert alignment.drops == {FUSED: 4}


def test_an_equal_token_of_the_wrapper_is_not_taken_for_the_content():
    tokenizer = spelled(merges=("yz",), template=None)
    alignment = align(user("xy", tokenizer), user("xyzy", tokenizer), "shared")
    assert matches(alignment) == [(0, 0)]
    assert alignment.drops == {FUSED: 1}


def test_the_end_of_a_prefill_is_not_taken_for_the_end_of_the_template():
    clean = chat(("user", "ab"))
    wrapped = chat(("user", "ab"), ("assistant", "s:"))
    assert (clean.text, wrapped.text) == ("[ab]:", "[ab][s:")
    assert matches(align(clean, wrapped, "shared")) == [(1, 1), (2, 2)]


def test_the_end_of_the_template_is_not_taken_for_a_prefill():
    clean, wrapped = chat(("user", "ab"), ("assistant", ":")), chat(("assistant", ":"), ("user", "xab"))
    assert (clean.text, wrapped.text) == ("[ab][:", "[:][xab]:")
    assert matches(align(clean, wrapped, "shared")) == [(1, 5), (2, 6), (5, 1)]


def test_a_begun_answer_is_content_with_the_request_before_it():
    clean = chat(("user", "ab"), ("assistant", "s"))
    wrapped = chat(("user", "xab"), ("assistant", "s"))
    assert (clean.text, wrapped.text) == ("[ab][s", "[xab][s")
    assert matches(align(clean, wrapped, "content")) == [(1, 2), (2, 3), (5, 6)]
    assert matches(align(clean, wrapped, "shared")) == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    longer = chat(("user", "ab"), ("assistant", "ts"))  # the frame before an unequal beginning is no tail
    assert matches(align(clean, longer, "shared")) == [(1, 1), (2, 2), (5, 6)]
    assert "is not in the wrapped" in align(clean, chat(("user", "x"), ("assistant", "s")), "shared").refusal


def test_named_texts_are_matched_wherever_they_stand_and_once_each():
    clean, wrapped = user("q:ab,cd"), user("q:cd;ab")
    assert (clean.text, wrapped.text) == ("[q:ab,cd]:", "[q:cd;ab]:")
    texts = ["q", "ab", "cd"]
    moved = [(1, 1), (3, 6), (4, 7), (6, 3), (7, 4)]
    assert matches(align(clean, wrapped, "explicit", shared=texts)) == moved
    assert matches(align(clean, wrapped, "shared", shared=texts)) == [*moved, (8, 8), (9, 9)]
    assert align(clean, wrapped, "explicit", shared=texts).candidates == 5
    assert "occurs 2 times in the wrapped" in align(clean, user("abq,ab,cd"), "explicit", shared=texts).refusal


def test_demonstrations_before_the_question_leave_the_question_matched():
    clean = chat(("user", "ab"))
    wrapped = chat(("user", "c"), ("assistant", "d"), ("user", "ab"))
    assert wrapped.text == "[c][d][ab]:"
    assert matches(align(clean, wrapped)) == [(0 + i, 6 + i) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("window", ["content", "shared"])
@pytest.mark.parametrize(("wrapped", "reason"), [("ab or ab", "occurs 2 times in the wrapped"), ("a b", "is not in")])
def test_a_content_that_stands_twice_or_nowhere_is_refused(wrapped: str, reason: str, window: str):
    alignment = align(user("ab"), user(wrapped), window)
    assert reason in alignment.refusal
    assert (alignment.window, matches(alignment), alignment.coverage) == (window, [], 0)


def test_overlapping_repeats_count_as_repeats():
    assert "occurs 2 times" in align(user("aa"), user("aaa"), "content").refusal


def test_an_explicit_text_that_is_missing_or_repeated_names_the_side():
    assert "is not in the clean" in align(user("ab"), user("ab"), "explicit").refusal
    assert "is not in the wrapped" in align(user("ab"), user("b"), "explicit", shared=["a"]).refusal
    assert "occurs 2 times in the clean" in align(user("abab"), user("ab"), "explicit", shared=["ab"]).refusal


@pytest.mark.parametrize("word", ["user", "assistant", "|>\n", "s"])
def test_words_of_the_template_are_not_mistaken_for_the_message(word: str):
    clean = user(word, CHAT)
    wrapped = user("b " + word, CHAT)
    alignment = align(clean, wrapped, "content")
    start, end = wrapped.contents[-1]
    assert alignment.wrapped
    assert all(start + 2 <= wrapped.offsets[w][0] < end for w in alignment.wrapped)


def test_words_of_the_system_message_are_not_mistaken_for_the_request():
    clean = chat(("system", "ab"), ("user", "ab"))
    assert matches(align(clean, user("xab"), "content")) == [(5, 2), (6, 3)]
    assert "occurs 2 times in the wrapped" in align(user("ab"), chat(("system", "ab"), ("user", "ab"))).refusal


def test_common_lines_match_whatever_stands_between_them():
    clean, wrapped = user("ab\ncd\nxy"), user("hint\nab\nno\ncd\nzz")
    # [ a b \n c d \n x y ] :   and   [ h i n t \n a b \n n o \n c d \n z z ] :
    alignment = align(clean, wrapped, "lines")
    assert matches(alignment) == [(1, 6), (2, 7), (3, 8), (4, 12), (5, 13), (6, 14), (9, 17), (10, 18)]
    assert (alignment.candidates, alignment.drops) == (11, {UNSHARED: 3})
    assert align(clean, wrapped, "content").refusal


def test_lines_keep_their_order_and_blank_ones_alone_do_not_match():
    assert matches(align(user("ab\ncd\n"), user("cd\nab\n"), "lines"))[:3] in (
        [(1, 4), (2, 5), (3, 6)],
        [(4, 1), (5, 2), (6, 3)],
    )
    alignment = align(user("ab\n\ncd"), user("xy\n\nzz"), "lines")
    assert matches(alignment) == [(7, 7), (8, 8)]  # the template behind both


def test_a_token_that_reaches_out_of_its_line_is_dropped():
    tokenizer = spelled(("b\n", "\nx"))
    clean, wrapped = user("ab\ncd\nq", tokenizer), user("ab\nxx\ncd\nr", tokenizer)
    found = align(clean, wrapped, "lines")
    # In the wrapped prompt "b\n" is one token as in the clean one, and the lines start anew behind it.
    assert [clean.text[slice(*clean.offsets[c])] for c, _ in matches(found)] == ["a", "b\n", "c", "d", "\n", "]", ":"]


def test_a_token_that_touches_two_runs_of_common_lines_is_dropped_once():
    """The line breaks of the clean prompt are one token; in the wrapped prompt a line stands between them."""
    tokenizer = spelled(("\n\n",), template=None)
    clean, wrapped = user("x\n\ny", tokenizer), user("x\nQ\n\ny", tokenizer)

    alignment = align(clean, wrapped, "lines")

    assert [clean.text[slice(*clean.offsets[c])] for c in alignment.clean] == ["x", "y"]
    assert (alignment.candidates, alignment.drops) == (3, {FUSED: 1})


def test_prompts_without_a_common_end_have_no_suffix():
    tokenizer = spelled(template=None)
    alignment = align(user("ab", tokenizer), user("ac", tokenizer), "suffix")
    assert (alignment.coverage, alignment.drops) == (0, {UNSHARED: 2})
    assert "share no token" in alignment.refusal


@pytest.mark.parametrize("window", ["suffix", "shared", "content"])
def test_equal_prompts_match_entirely_except_for_the_added_bos(window: str):
    prompt = user("the answer", PLAIN)
    alignment = align(prompt, prompt, window)
    assert prompt.offsets[0] == (0, 0)
    assert alignment.clean == alignment.wrapped == tuple(range(1, len(prompt.ids)))
    assert (alignment.coverage, alignment.drops) == (1, {})


def test_an_unknown_window_is_refused():
    with pytest.raises(CtlensError, match="unknown alignment window 'sufix'; did you mean 'suffix'"):
        align(user("a"), user("a"), "sufix")


def test_the_opening_by_hand():
    assert opening(user("ab"), user("xab")) == opening(user("ab"), user("abx")) == 1
    assert opening(user("ab", PLAIN), user("ab", PLAIN)) == 1
    assert opening(user("b", spelled(merges=("[b",))), user("xb", spelled(merges=("[b",)))) == 0
    clean = chat(("system", "s"), ("user", "ab"))
    assert opening(clean, chat(("system", "s"), ("user", "xab"))) == len("[s][")
    assert opening(clean, chat(("system", "t"), ("user", "ab"))) == 1


def test_wrapper_positions_by_hand():
    assert wrapper_positions(user("ab"), user("xxabyy")) == (1, 2, 5, 6)
    assert wrapper_positions(user("ab"), chat(("user", "ab"), ("assistant", "s:"))) == (5, 6)
    assert wrapper_positions(user("ab"), user("ab")) == ()


def test_wrapper_positions_are_empty_where_the_added_part_is_not_known():
    assert wrapper_positions(user("ab"), user("ab, ab")) == ()
    assert wrapper_positions(user("ab"), user("xyz")) == ()


def test_a_message_that_stands_in_both_prompts_is_no_wrapper():
    clean = chat(("system", "s"), ("user", "ab"))
    assert wrapper_positions(clean, chat(("system", "s"), ("user", "xab"))) == (4,)
    assert wrapper_positions(clean, chat(("system", "s"), ("user", "sab"))) == ()


def test_a_token_fused_across_the_boundary_is_no_wrapper():
    assert wrapper_positions(user("b"), user("xab", spelled(merges=("ab",)))) == (1,)


def prompts(tokenizer: PreTrainedTokenizerFast, before: str, content: str, after: str) -> tuple[Rendered, Rendered]:
    return user(content, tokenizer), user(before + content + after, tokenizer)


@pytest.mark.parametrize("tokenizer", unit_first([PLAIN, CHAT]), ids=["plain", "chat"])
@settings(MANY, max_examples=1000)
@given(before=TEXT, content=CONTENT, after=TEXT)
def test_every_match_holds_the_same_token_in_order_and_every_candidate_is_accounted_for(
    tokenizer: PreTrainedTokenizerFast, before: str, content: str, after: str
):
    clean, wrapped = prompts(tokenizer, before, content, after)
    for window in WINDOWS:
        alignment = align(clean, wrapped, window, shared=content)
        assert [clean.ids[c] for c in alignment.clean] == [wrapped.ids[w] for w in alignment.wrapped]
        for side in (alignment.clean, alignment.wrapped):
            assert all(here < there for here, there in pairwise(side))
        assert len(alignment.clean) + sum(alignment.drops.values()) == alignment.candidates
        assert all(count > 0 for count in alignment.drops.values())
        assert 0 <= alignment.coverage <= 1
        assert bool(alignment.refusal) == (not alignment.clean)


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@MANY
@given(before=TEXT, content=CONTENT, after=TEXT)
def test_a_matched_token_of_the_content_stands_at_the_same_byte_of_the_content(
    tokenizer: PreTrainedTokenizerFast, before: str, content: str, after: str
):
    clean, wrapped = prompts(tokenizer, before, content, after)
    alignment = align(clean, wrapped, "content")
    assume(not alignment.refusal)
    here, there = content_bytes(tokenizer, clean, content), content_bytes(tokenizer, wrapped, content)
    assert [here[c] for c in alignment.clean] == [there[w] for w in alignment.wrapped]
    possible = [
        c for c, span in here.items() if (span, clean.ids[c]) in {(s, wrapped.ids[w]) for w, s in there.items()}
    ]
    assert {*alignment.clean} <= {*possible}
    if content.isascii():
        assert list(alignment.clean) == possible


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@MANY
@given(before=TEXT, content=CONTENT, after=TEXT)
def test_shared_is_the_content_and_the_template_behind_the_last_message(
    tokenizer: PreTrainedTokenizerFast, before: str, content: str, after: str
):
    clean, wrapped = prompts(tokenizer, before, content, after)
    inner, shared = align(clean, wrapped, "content"), align(clean, wrapped, "shared")
    assume(not inner.refusal)
    tail = matches(shared)[len(inner.clean) :]
    assert matches(shared)[: len(inner.clean)] == matches(inner)
    assert tail == [
        (c, c + len(wrapped.ids) - len(clean.ids))
        for c, (left, _) in enumerate(clean.offsets)
        if left >= clean.contents[-1][1]
    ]
    assert bool(tail) == (tokenizer is CHAT)


@MANY
@given(left=TEXT, right=TEXT)
def test_suffix_is_the_longest_common_run_at_the_end(left: str, right: str):
    clean, wrapped = user(left, CHAT), user(right, CHAT)
    length = len(align(clean, wrapped, "suffix").clean)
    assert clean.ids[len(clean.ids) - length :] == wrapped.ids[len(wrapped.ids) - length :]
    assert clean.ids[-length - 1 :] != wrapped.ids[-length - 1 :] or length == len(clean.ids) == len(wrapped.ids)


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@MANY
@given(left=CONTENT, right=CONTENT)
def test_last_is_exactly_the_two_ends_or_refused(tokenizer: PreTrainedTokenizerFast, left: str, right: str):
    clean, wrapped = user(left, tokenizer), user(right, tokenizer)
    alignment = align(clean, wrapped, "last")
    ends = [(len(clean.ids) - 1, len(wrapped.ids) - 1)]
    assert matches(alignment) == (ends if clean.ids[-1] == wrapped.ids[-1] else [])
    assert bool(alignment.refusal) == (clean.ids[-1] != wrapped.ids[-1])


@MANY
@given(before=TEXT, content=CONTENT, after=TEXT)
def test_the_wrapper_and_the_content_share_no_position(before: str, content: str, after: str):
    clean, wrapped = prompts(CHAT, before, content, after)
    added = wrapper_positions(clean, wrapped)
    start, end = wrapped.contents[-1]
    assume(not align(clean, wrapped, "content").refusal)
    assert not {*added} & {*align(clean, wrapped, "shared").wrapped}
    assert all(start <= wrapped.offsets[w][0] < end for w in added)
    covered = {*added} | {*wrapped.positions((start + len(before), end - len(after)))}
    assert covered == {*wrapped.positions((start, end))}


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@MANY
@given(left=CONTENT, right=CONTENT, answer=st.lists(st.integers(0, 399), max_size=4))
def test_answer_pairs_what_predicts_the_answer_behind_both_prompts(
    tokenizer: PreTrainedTokenizerFast, left: str, right: str, answer: list[int]
):
    clean, wrapped = user(left, tokenizer), user(right, tokenizer)
    alignment = align(clean, wrapped, "answer", answer=answer)
    here, there = (*clean.ids, *answer), (*wrapped.ids, *answer)
    behind = [(len(clean.ids) - 1 + step, len(wrapped.ids) - 1 + step) for step in range(len(answer))]
    same = [(c, w) for c, w in behind if here[c] == there[w]]
    assert matches(alignment) == same
    assert len(same) + sum(alignment.drops.values()) == alignment.candidates == len(answer)
    assert bool(alignment.refusal) == (not same)


LINES = st.lists(st.lists(st.sampled_from(WORDS), max_size=4).map("".join), min_size=1, max_size=5)


@MANY
@given(kept=LINES, added=LINES, tail=TEXT)
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_every_match_of_lines_is_the_same_token_at_the_same_place_of_an_equal_line(
    tokenizer: PreTrainedTokenizerFast, kept: list[str], added: list[str], tail: str
):
    mixed = [line for both in zip_longest(kept, added) for line in both if line is not None]
    assume("".join(kept).strip() and "".join(mixed).strip())
    sides = [user("\n".join(lines) + end, tokenizer) for lines, end in ((kept, ""), (mixed, tail))]

    alignment = align(*sides, "lines")

    for half in (alignment.clean, alignment.wrapped):
        assert list(half) == sorted(set(half))
    assert len(alignment.clean) + sum(alignment.drops.values()) == alignment.candidates
    for c, w in matches(alignment):
        assert sides[0].ids[c] == sides[1].ids[w]
        assert placed(sides[0], c) == placed(sides[1], w)


ASCII_LINES = st.lists(st.lists(st.sampled_from("ab. \n"), max_size=4).map("".join), min_size=1, max_size=5)


@MANY
@given(kept=ASCII_LINES, added=ASCII_LINES, keep=st.lists(st.booleans(), min_size=10, max_size=10))
def test_every_candidate_is_matched_or_dropped_once_where_tokens_cross_lines(
    kept: list[str], added: list[str], keep: list[bool]
):
    mixed = [line for both in zip_longest(kept, added) for line in both if line is not None]
    some = [line for line, chosen in zip(mixed, keep, strict=False) if chosen]
    assume("".join(kept).strip() and "".join(some).strip())
    tokenizer = spelled(("\n\n", "\na", ".\n", "b "), template=None)
    clean, wrapped = user("\n".join(kept), tokenizer), user("\n".join(some), tokenizer)

    for window in WINDOWS:
        alignment = align(clean, wrapped, window, shared=["ab"])
        assert len(alignment.clean) + sum(alignment.drops.values()) == alignment.candidates
        assert all(count > 0 for count in alignment.drops.values())
        assert [clean.ids[c] for c in alignment.clean] == [wrapped.ids[w] for w in alignment.wrapped]
        for half in (alignment.clean, alignment.wrapped):
            assert all(here < there for here, there in pairwise(half))


def placed(side: Rendered, position: int) -> tuple[str, int]:
    """The line of the last message that a token begins in, and where in it; or its place behind the message."""
    start, end = side.contents[-1]
    left = side.offsets[position][0]
    if left >= end:
        return "", left - end
    line = side.text.rfind("\n", start, left) + 1 or start
    stop = side.text.find("\n", left, end)
    return side.text[max(line, start) : end if stop < 0 else stop], left - max(line, start)
