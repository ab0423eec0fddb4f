"""Padding, batch-mates and row order change nothing but the shape; what is left out is counted."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from helpers.models import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ctlens.core.errors import CtlensError
from ctlens.data.alignment import UNSHARED, align
from ctlens.data.batch import EncodedPair, EncodedPairs, Matched, PaddingSide, PairBatch, collate, encode, pad
from ctlens.data.chat import Rendered, answer_ids
from ctlens.data.pairs import Pair, prompt

CHAT = byte_level_tokenizer(chat=True)
SIDES: tuple[PaddingSide, ...] = ("right", "left")


def letters(text: str) -> Rendered:
    """One token a letter, a = 1, all of them the message."""
    spans = tuple((i, i + 1) for i in range(len(text)))
    return Rendered(text, tuple(ord(letter) - 96 for letter in text), spans, ((0, len(text)),))


def row(clean: str, wrapped: str, answer: tuple[int, ...] = ()) -> EncodedPair:
    sides = letters(clean), letters(wrapped)
    windows = {window: align(*sides, window) for window in ("content", "suffix")}
    return EncodedPair(Pair(prompt(clean), prompt(wrapped)), *sides, windows, answer)


def sample() -> EncodedPairs:
    texts = ("the answer", "1", "is it a 🟦?", "Please answer the question. You are a helpful assistant.")
    pairs = [Pair(prompt(text), prompt(f"{'no. ' * n}{text} now"), target="t" * n) for n, text in enumerate(texts, 1)]
    return encode([replace(pairs[0], target=None), *pairs[1:]], CHAT, windows=("shared", "suffix"), n_ctx=500)


ENCODED = sample()


def matched_ids(batch: PairBatch, window: str) -> list[list[tuple[int, int]]]:
    """Per row of the batch, the token ids that the window pairs."""
    matched = batch.matched[window]
    sides = batch.clean.tokens.gather(1, matched.clean), batch.wrapped.tokens.gather(1, matched.wrapped)
    both = torch.stack(sides, -1)
    return [[(c, w) for c, w in ids[valid].tolist()] for ids, valid in zip(both, matched.valid, strict=True)]


def test_padding_by_hand():
    right = pad([(5, 6, 7), (8,)])
    left = pad([(5, 6, 7), (8,)], "left")
    assert right.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert left.tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert right.mask.tolist() == [[True, True, True], [True, False, False]]
    assert left.mask.tolist() == [[True, True, True], [False, False, True]]


def test_only_padding_on_the_left_needs_a_mask():
    right = pad([(5, 6), (8,)])
    left = pad([(5, 6), (8,)], "left")
    assert right.needed_mask is None
    assert left.needed_mask is left.mask


def test_a_real_token_equal_to_the_padding_stays_real():
    assert pad([(0, 0), (0,)]).mask.tolist() == [[True, True], [True, False]]


def test_matched_positions_by_hand_on_both_sides_of_padding():
    rows = [row("ab", "xab"), row("c", "c")]
    right = collate(rows, "right").matched["content"]
    left = collate(rows, "left").matched["content"]
    assert (right.clean.tolist(), right.wrapped.tolist()) == ([[0, 1], [0, 0]], [[1, 2], [0, 0]])
    assert (left.clean.tolist(), left.wrapped.tolist()) == ([[0, 1], [1, 0]], [[1, 2], [2, 0]])
    assert right.valid.tolist() == left.valid.tolist() == [[True, True], [True, False]]


def test_answers_follow_the_wrapped_prompt_and_are_marked():
    rows = [row("ab", "xab"), row("c", "c", (8, 9)), row("d", "xd", (7,))]
    right = collate(rows, "right")
    left = collate(rows, "left")
    assert right.wrapped.tokens.tolist() == [[24, 1, 2], [3, 8, 9], [24, 4, 7]]
    assert right.answer.tolist() == [[False] * 3, [False, True, True], [False, False, True]]
    assert right.last_prompt.tolist() == [2, 0, 1]
    assert torch.equal(left.answer, right.answer)


def test_answer_and_last_prompt_count_from_the_padding():
    rows = [row("ab", "xyzab"), row("c", "c", (8, 9)), row("d", "xd", (7,))]
    right = collate(rows, "right")
    left = collate(rows, "left")
    assert right.answer.nonzero().tolist() == [[1, 1], [1, 2], [2, 2]]
    assert left.answer.nonzero().tolist() == [[1, 3], [1, 4], [2, 4]]
    assert (right.last_prompt.tolist(), left.last_prompt.tolist()) == ([4, 0, 1], [4, 2, 3])


@pytest.mark.parametrize("window", ["shared", "suffix"])
@pytest.mark.parametrize("padding", SIDES)
def test_batch_mates_order_and_padding_never_change_what_is_matched(padding: PaddingSide, window: str):
    rows = ENCODED.rows
    alone = [matched_ids(collate([one]), window)[0] for one in rows]
    assert all(c == w for one in alone for c, w in one)
    for seed in range(8):
        order = Random(seed).sample(range(4), 1 + seed % 4)
        assert matched_ids(collate([rows[i] for i in order], padding), window) == [alone[i] for i in order]


@pytest.mark.parametrize("padding", SIDES)
def test_the_tokens_under_the_mask_are_the_prompt_and_its_answer(padding: PaddingSide):
    rows = ENCODED.rows
    batch = collate(rows, padding)
    for index, one in enumerate(rows):
        real = batch.wrapped.tokens[index, batch.wrapped.mask[index]]
        assert tuple(real.tolist()) == one.wrapped.ids + one.answer
        assert tuple(batch.wrapped.tokens[index, batch.answer[index]].tolist()) == one.answer
        assert batch.wrapped.tokens[index, batch.last_prompt[index]] == one.wrapped.ids[-1]


def test_the_row_mean_by_hand():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    matched = Matched(torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), valid)
    assert matched.row_mean(torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])).tolist() == [2, 5]


def test_the_row_mean_ignores_what_is_not_a_number_in_the_padding():
    matched = collate([row("ab", "xab"), row("c", "c")]).matched["content"]
    values = torch.tensor([[1.0, 3.0], [5.0, torch.nan]], requires_grad=True)
    matched.row_mean(values).sum().backward()
    assert matched.row_mean(values).tolist() == [2, 5]
    assert values.grad is not None and values.grad.tolist() == [[0.5, 0.5], [1, 0]]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(order=st.permutations(range(4)), size=st.integers(1, 4), padding=st.sampled_from(SIDES))
def test_the_row_mean_does_not_depend_on_batch_mates(order: list[int], size: int, padding: PaddingSide):
    rows = ENCODED.rows

    def mean(batch: PairBatch) -> list[float]:
        matched = batch.matched["shared"]
        return matched.row_mean(batch.wrapped.tokens.gather(1, matched.wrapped).double()).tolist()

    alone = [mean(collate([one]))[0] for one in rows]
    together = mean(collate([rows[i] for i in order[:size]], padding))
    assert together == pytest.approx([alone[i] for i in order[:size]], rel=1e-12)


def test_a_batch_of_no_rows_is_refused():
    with pytest.raises(CtlensError, match="a batch needs at least one pair"):
        collate([])


def test_to_moves_every_tensor():
    moved = collate(ENCODED.rows).to("meta")
    matched = moved.matched["shared"]
    tensors = (*(t for side in (moved.clean, moved.wrapped) for t in (side.tokens, side.mask)), moved.answer)
    assert {t.device.type for t in (*tensors, matched.clean, matched.wrapped, matched.valid)} == {"meta"}
    assert moved.matched.keys() == {"shared", "suffix"}


def test_encode_keeps_order_and_encodes_targets(chat_tokenizer: PreTrainedTokenizerFast):
    encoded = ENCODED
    assert [one.pair.clean.turns[0].content for one in encoded.rows][:2] == ["the answer", "1"]
    assert [one.answer for one in encoded.rows][:2] == [(), answer_ids(chat_tokenizer, encoded.rows[1].wrapped, "tt")]
    assert encoded.rows[0].alignments.keys() == {"shared", "suffix"}


def test_pairs_that_do_not_align_are_left_out_and_counted_by_reason(chat_tokenizer: PreTrainedTokenizerFast):
    texts = [("t a", "s t a"), ("t a", "s"), ("t a", "t a, t a"), ("s", "t")]
    encoded = encode([Pair(prompt(c), prompt(w)) for c, w in texts], chat_tokenizer, n_ctx=99)
    assert len(encoded) == 1
    assert encoded.dropped == {
        "the text of the window is not in the wrapped prompt": 2,
        "the text of the window occurs 2 times in the wrapped prompt": 1,
    }


def test_a_pair_must_align_in_every_window(chat_tokenizer: PreTrainedTokenizerFast):
    pairs = [Pair(prompt("a"), prompt("xa")), Pair(prompt("a"), prompt("a, a"))]
    assert len(encode(pairs, chat_tokenizer, windows=("suffix",), n_ctx=99)) == 2
    both = encode(pairs, chat_tokenizer, windows=("suffix", "content"), n_ctx=99)
    assert (len(both), sum(both.dropped.values())) == (1, 1)


def test_the_explicit_window_takes_its_text_from_the_pair(chat_tokenizer: PreTrainedTokenizerFast):
    pair = Pair(prompt("1 ab"), prompt("ab 2"), shared=("ab",))
    (one,) = encode([pair], chat_tokenizer, windows=["explicit"], n_ctx=99).rows
    covered = [one.clean.text[slice(*one.clean.offsets[c])] for c in one.alignments["explicit"].clean]
    assert covered == ["b"]


def test_coverage_and_drops_are_summed_over_tokens():
    encoded = EncodedPairs((row("ab", "xb"), row("cd", "cd")), {})
    assert encoded.coverage("suffix") == 3 / 4
    assert encoded.token_drops("suffix") == {UNSHARED: 1}


def test_without_pairs_or_without_any_alignment_nothing_is_encoded(chat_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(CtlensError, match="there are no pairs: give at least one"):
        encode([], chat_tokenizer, n_ctx=99)
    with pytest.raises(CtlensError, match=r"none of the 2 pairs aligns \(2 times: .* is not in the wrapped prompt\)"):
        encode([Pair(prompt("a"), prompt("b"))] * 2, chat_tokenizer, n_ctx=99)


@pytest.mark.parametrize(
    ("pair", "what"),
    [
        (Pair(prompt("a" * 50), prompt("b")), "the clean prompt of pair 2 has"),
        (Pair(prompt("a"), prompt("a" + "b" * 50)), "the wrapped prompt of pair 2 has"),
        (Pair(prompt("a"), prompt("ba"), target="c" * 50), "the wrapped prompt of pair 2 has"),
    ],
)
def test_a_prompt_longer_than_the_context_is_named(chat_tokenizer: PreTrainedTokenizerFast, pair: Pair, what: str):
    with pytest.raises(CtlensError, match=f"{what} .* but the model's context is 50: shorten it"):
        encode([Pair(prompt("a"), prompt("ba")), pair], chat_tokenizer, n_ctx=50)


def test_a_prompt_as_long_as_the_context_fits(chat_tokenizer: PreTrainedTokenizerFast):
    pair = Pair(prompt("a"), prompt("ba"), target="c")
    (one,) = encode([pair], chat_tokenizer, n_ctx=99).rows
    exact = len(one.wrapped.ids) + len(one.answer)
    assert len(encode([pair], chat_tokenizer, n_ctx=exact)) == 1
    with pytest.raises(CtlensError, match=f"has {exact} tokens"):
        encode([pair], chat_tokenizer, n_ctx=exact - 1)


def test_answers_can_be_set_one_a_pair():
    encoded = EncodedPairs((row("a", "xa"), row("b", "b")), {"reason": 1})
    answered = encoded.with_answers([(5,), ()])
    assert ([one.answer for one in answered.rows], answered.dropped) == ([(5,), ()], {"reason": 1})
    with pytest.raises(ValueError, match="shorter"):
        encoded.with_answers([(5,)])


def test_answers_behind_both_prompts_are_marked_and_aligned_by_hand():
    rows = EncodedPairs((row("ab", "xab"), row("cd", "yd")), {})
    both = rows.with_answers([(7, 8), (9,)], both_sides=True)
    right = collate(both.rows)
    assert right.clean.tokens.tolist() == [[1, 2, 7, 8], [3, 4, 9, 0]]
    assert right.clean_answer.tolist() == [[False, False, True, True], [False, False, True, False]]
    assert right.last_clean.tolist() == [1, 1]
    assert right.last_prompt.tolist() == [2, 1]
    assert matched_ids(right, "answer") == [[(2, 2), (7, 7)], [(4, 4)]]
    assert matched_ids(collate(both.rows, "left"), "answer") == matched_ids(right, "answer")


def test_answers_behind_the_wrapped_prompts_alone_leave_the_clean_side_as_it_is():
    batch = collate(EncodedPairs((row("ab", "xab"),), {}).with_answers([(7,)]).rows)
    assert batch.clean.tokens.tolist() == [[1, 2]]
    assert not batch.clean_answer.any()
    assert "answer" not in batch.matched


def test_a_pair_whose_only_answer_token_is_predicted_from_another_token_is_left_out_and_counted():
    rows = EncodedPairs((row("ab", "xab"), row("ab", "abx")), {"before": 1})
    kept = rows.with_answers([(7,), (7,)], both_sides=True).aligned(["answer"])
    assert [kept_row.wrapped.text for kept_row in kept.rows] == ["xab"]
    assert kept.dropped == {"before": 1, "there is no answer to align at": 1}
    with pytest.raises(CtlensError, match="none of the 1 pairs aligns"):
        EncodedPairs(rows.rows[1:], {}).with_answers([(7,)], both_sides=True).aligned(["answer"])


@pytest.mark.parametrize("side", SIDES)
def test_tokens_that_the_attack_added_are_marked(side: PaddingSide):
    pairs = [Pair(prompt("is it"), prompt("is it")), Pair(prompt("is it"), prompt("no! is it"))]
    batch = collate(encode(pairs, CHAT, n_ctx=500).rows, side)
    assert not batch.wrapper[0].any()
    assert CHAT.decode(batch.wrapped.tokens[1][batch.wrapper[1]]) == "no!"
