"""Mediation: what runs through a layer's attention or MLP, laid out from the patches that measure it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model
from helpers.transplants import PAIRS, edited, moved

from ctlens.analysis import Mediation, mediation, patch, transplant
from ctlens.core.errors import CtlensError


@pytest.mark.parametrize("kind", CHAT_MODELS)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_wrapper_is_the_cause_and_the_clean_run_without_it(kind: str, positions: str):
    model = chat_model(kind)
    metrics = ("logit_diff", "kl")
    found = mediation(model, PAIRS, positions=positions, metrics=metrics, progress=False)
    options: dict[str, Any] = {"positions": positions, "metrics": metrics, "progress": False}
    for quantity, direction in enumerate(("noising", "denoising")):
        for mediator, site in enumerate(("attn_out", "mlp_out")):
            expected = patch(model, PAIRS, site=site, direction=direction, **options)
            # Both sites share the batches of one sweep, and a row may round otherwise among other rows.
            np.testing.assert_allclose(found.values[quantity, :, mediator], expected.values[:, :, 0], rtol=0, atol=1e-5)
            np.testing.assert_array_equal(found.unpatched[quantity], expected.target)
            np.testing.assert_array_equal(found.source[quantity], expected.source)
    assert found.cause == "wrapper" and not np.allclose(found.values[0], found.values[1])


@pytest.mark.parametrize("kind", CHAT_MODELS)
def test_the_training_is_the_cause_and_the_base_without_it(kind: str):
    model = chat_model(kind)
    trained = moved(model)
    found = mediation(model, PAIRS, trained=trained, positions="content", progress=False)
    for mediator, site in enumerate(("attn_out", "mlp_out")):
        expected = transplant(trained, model, PAIRS, site=site, positions="content", progress=False)
        np.testing.assert_array_equal(found.values[:, :, mediator], expected.values[:, :, :, 0])
        np.testing.assert_array_equal(found.source, expected.source)
    assert found.cause == "training"


@pytest.mark.parametrize("trained", [None, "W_O"])
def test_a_planted_effect_runs_through_the_attention_of_its_layer_alone(trained: str | None):
    """The cue is written by layer 1; nothing acts on it behind, so that the shares add up to 1."""
    model = edited(trained) if trained else None
    found = mediation(planted.model(), planted.pairs(), trained=model, progress=False)
    table = found.normalised()
    inside = (table["mediator"] == "attention") & (table["layer"] == 1)
    np.testing.assert_allclose(table["value"][inside], 1, atol=1e-5)
    np.testing.assert_allclose(table["value"][~inside], 0, atol=1e-5)
    totals = found.totals()
    assert totals["part"].tolist() == ["attention", "MLP", "remainder"] * 2
    np.testing.assert_allclose(totals["value"], [1, 0, 0] * 2, atol=1e-5)


def by_hand(scale: float = 1.0) -> Mediation:
    """Two pairs, two layers: without the cause 0 and 0, with it 2 and 6."""
    attention = [[1.0, 2.0], [2.0, 6.0]]
    mlp = [[0.0, 1.0], [1.0, 0.0]]
    without = np.array([[0.0, 0.0]])
    caused = scale * np.array([[2.0, 6.0]])
    forth = scale * np.array([[attention, mlp]])
    values = np.stack([forth, caused[:, None, None] - forth])
    labels = (("logit_diff",), (0, 1), "wrapper", "last")
    return Mediation(values, np.stack([without, caused]), np.stack([caused, without]), *labels)


def test_shares_are_added_up_and_what_is_missing_is_the_remainder():
    table = by_hand().normalised()
    totals = by_hand().totals()
    assert table.query("quantity == 'sufficient'")["value"].tolist() == [3 / 8, 1.0, 1 / 8, 1 / 8]
    assert table["mediator"].tolist() == ["attention", "attention", "MLP", "MLP"] * 2
    assert totals["value"].tolist() == [11 / 8, 2 / 8, -5 / 8] * 2
    # -1 of a gap of 2 and -1/2 of one of 6: the two move the ratio by 3/16 each way; Student's factor is 12.706
    assert totals["ci_high"][2] - totals["value"][2] == pytest.approx(12.7062 * 3 / 16, rel=1e-4)
    assert set(totals["n_pairs"]) == {2}


def test_what_has_no_effect_has_no_shares():
    none = by_hand(scale=0.1)
    for refused in (none.normalised, none.totals, none.figure):
        with pytest.raises(CtlensError, match=r"logit_diff differs by 0.4 between source and target"):
            refused()
    drawn = by_hand().compare({"bct": none}, label="act")
    assert drawn.layout.meta["subtitle"].endswith(
        "remainder of the sum: ACT -0.62; not drawn, effect too small: BCT (0.4)"
    )


def test_results_round_trip_and_draw(tmp_path):
    found = by_hand()
    found.save(tmp_path / "mediation.safetensors")
    assert Mediation.load(tmp_path / "mediation.safetensors").to_dataframe().equals(found.to_dataframe())
    for quantity, words in (("sufficient", "brought by {} alone"), ("lost", "lost without {}")):
        drawn = found.compare({"bct": found}, label="act", quantity=quantity)
        lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
        assert [(line.name, line.xaxis) for line in lines] == [("ACT", "x"), ("BCT", "x"), ("ACT", "x2"), ("BCT", "x2")]
        assert list(lines[0].y) == [3 / 8, 1.0] and list(lines[2].y) == [1 / 8, 1 / 8]
        names = [note.text for note in drawn.layout.annotations[:2]]
        assert names == [words.format("attention"), words.format("MLP")]
    with pytest.raises(CtlensError, match="unknown quantity"):
        found.figure("direct")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "wrapper"}, "no twin in the clean prompt"),
        ({"layers": [7]}, "layer 7 does not exist"),
        ({"metrics": ()}, "no metrics"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(CtlensError, match=message):
        mediation(chat_model("made here"), PAIRS, **{"progress": False} | options)
