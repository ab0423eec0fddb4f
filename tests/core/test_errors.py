"""One exception for a user's mistake, in one sentence that says what to do."""

from __future__ import annotations

from ctlens.core.errors import CtlensError, unknown


def test_the_error_is_a_value_error_and_can_be_caught_apart():
    assert issubclass(CtlensError, ValueError)
    assert CtlensError is not ValueError


def test_an_unknown_name_gets_the_nearest_names():
    message = str(unknown("loss", "atct", ["act", "attct", "bct"]))
    assert message == "unknown loss 'atct'; did you mean 'attct' or 'act'? Known: act, attct, bct."


def test_a_name_near_to_none_gets_the_list_alone():
    assert str(unknown("loss", "zzzz", ["act", "bct"])) == "unknown loss 'zzzz'. Known: act, bct."


def test_a_long_list_is_cut():
    message = str(unknown("hook", "zzzz", [f"h{index}" for index in range(13)]))
    assert message.endswith("h10, h11, ....")
    assert "h12" not in message


def test_names_that_are_no_text_are_accepted():
    assert "unknown layer '7'" in str(unknown("layer", 7, ["0", "1"]))


def test_capitals_are_near_to_small_letters():
    assert "did you mean 'act'" in str(unknown("loss", "ACT", ["act", "bct"]))
