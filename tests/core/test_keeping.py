"""Equal work inside a block is done once, and outside of one every time."""

from __future__ import annotations

from ctlens import threats
from ctlens.core.keeping import KeptResults, keeping, once


def test_equal_work_is_done_once_in_blocks_of_the_same_results() -> None:
    calls: list[str] = []
    kept: KeptResults = {}

    def made(word: str) -> str:
        return once(lambda: ("upper", word), lambda: calls.append(word) or word.upper())

    with keeping(kept):
        assert [made("a"), made("b"), made("a")] == ["A", "B", "A"]
        with keeping({}):
            assert made("a") == "A"  # a block of its own begins anew
    with keeping(kept):
        assert made("b") == "B"

    assert calls == ["a", "b", "a"] and list(kept) == [("upper", "a"), ("upper", "b")]


def test_outside_of_a_block_nothing_is_kept_and_nothing_is_described() -> None:
    calls: list[int] = []
    for _ in range(2):
        once(lambda: calls.append(0), lambda: calls.append(1))
    assert calls == [1, 1]


def test_pairs_that_were_drawn_before_are_the_same_and_a_caller_may_change_the_list() -> None:
    threat = threats.get("sycophancy")
    plain = threat.pairs(8, seed=3)
    with keeping({}):
        first = threat.cases(8, seed=3)
        first.clear()
        again = threat.pairs(8, seed=3)
        other = threat.pairs(8, seed=4)
    assert again == plain and other == threat.pairs(8, seed=4) != plain
