"""The share of the gap in the logit difference that a training recovers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ctlens import threats, train
from ctlens.analysis import GapRecovered, gap_recovered
from ctlens.analysis.outputs.gap_recovered import Gap
from ctlens.core.errors import CtlensError
from ctlens.data.chat import answer_ids, render
from ctlens.losses import ACT
from ctlens.organism import load_organism


@pytest.fixture(scope="module")
def base():
    return load_organism()


@pytest.fixture(scope="module")
def trained(base):
    return train(base, threats.get("sycophancy").pairs(64), ACT(), steps=12, progress=False).model


@pytest.fixture(scope="module")
def pairs():
    return threats.get("sycophancy").pairs(12, split="heldout")


def difference(model, prompt) -> float:
    asked = render(model.tokenizer, prompt.turns)
    with torch.no_grad():
        last = model(torch.tensor([asked.ids]))[0, -1]
    good = answer_ids(model.tokenizer, asked, prompt.good)[0]
    bad = answer_ids(model.tokenizer, asked, prompt.bad)[0]
    return float(last[good] - last[bad])


def test_every_difference_is_that_of_a_plain_pass(base, trained, pairs) -> None:
    found = gap_recovered(base, {"act": trained}, pairs, progress=False)

    for row, model in enumerate((base, trained)):
        for column, side in enumerate(("wrapped", "clean")):
            expected = [difference(model, getattr(pair, side)) for pair in pairs]
            assert found.logit_diffs[row, column] == pytest.approx(expected, abs=1e-4)
    assert found.models == ("base", "act")


def test_a_training_that_is_followed_has_the_shares_of_the_whole_analysis(base, trained, pairs) -> None:
    whole = gap_recovered(base, {"act": trained, "same": base}, pairs, progress=False)

    gap = Gap(base, pairs)

    assert gap.share(trained) == whole.share("act")
    assert gap.share(base) == (0.0, 0.0, 0.0)
    assert np.array_equal(gap.recovered_by({"act": trained, "same": base}).logit_diffs, whole.logit_diffs)


def test_the_share_is_a_ratio_of_means(base, trained, pairs) -> None:
    found = gap_recovered(base, {"act": trained}, pairs, progress=False)

    (wrapped, clean), (after, _) = found.logit_diffs
    value, low, high = found.share("act")
    assert value == pytest.approx((after.mean() - wrapped.mean()) / (clean.mean() - wrapped.mean()))
    assert low < value < high and 0 < value < 1


def test_order_and_batches_do_not_matter(base, trained, pairs) -> None:
    whole = gap_recovered(base, {"act": trained}, pairs, progress=False)

    parts = gap_recovered(base, {"act": trained}, pairs[::-1], batch_size=5, progress=False)

    assert parts.logit_diffs[..., ::-1] == pytest.approx(whole.logit_diffs, abs=1e-4)


def test_one_pair_with_a_small_gap_cannot_carry_the_share_away() -> None:
    logit_diffs = np.array([[[-2.0, 3.999], [2.0, 4.0]], [[0.0, 4.999], [2.0, 4.0]]])

    value, *_ = GapRecovered(logit_diffs, ("base", "act")).share("act")

    assert value == pytest.approx(3 / 4.001)


def test_a_gap_that_is_noise_is_refused() -> None:
    logit_diffs = np.array([[[1.0, 1.0], [1.2, 1.2]], [[1.1, 1.1], [1.2, 1.2]]])

    with pytest.raises(CtlensError, match="differ by 0.2 logits before training"):
        GapRecovered(logit_diffs, ("base", "act")).share("act")


def test_the_label_of_the_base_is_taken(base, pairs) -> None:
    with pytest.raises(CtlensError, match="choose another"):
        gap_recovered(base, {"base": base}, pairs, progress=False)


def test_a_model_in_training_mode_is_refused(base, pairs, trained) -> None:
    trained.train()
    try:
        with pytest.raises(CtlensError, match="eval mode"):
            gap_recovered(base, {"act": trained}, pairs, progress=False)
    finally:
        trained.eval()


def test_pairs_without_answers_are_refused(base, pairs) -> None:
    mute = [replace(pairs[0], clean=replace(pairs[0].clean, bad=None))]

    with pytest.raises(CtlensError, match="names no good and bad answer"):
        gap_recovered(base, {"same": base}, mute, progress=False)


def test_the_figure_has_a_row_a_model(base, trained, pairs) -> None:
    drawn = gap_recovered(base, {"act": trained, "same": base}, pairs, progress=False).figure()

    assert drawn.layout.yaxis.ticktext == ("ACT", "same")
    assert [trace.x for trace in drawn.data][1] == (0.0,)
