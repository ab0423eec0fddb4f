"""On weights written by hand, every reading of the residual stream recovers what was planted, and where."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import planted
from helpers.tiers import unit_first

from ctlens.analysis import (
    Directions,
    Probe,
    Task,
    ablate,
    logit_attribution,
    logit_lens,
    mean_difference,
    probe,
    probe_direction,
    residual_shift,
    shift_similarity,
    wrapper_present,
)
from ctlens.analysis.base.states import states
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel

pytestmark = pytest.mark.boundary

PAIRS = planted.pairs()
PUSH = np.array([abs(planted.written(pair)) for pair in PAIRS])
DIRECTION = planted.DIRECTION.numpy()


@pytest.fixture(scope="module")
def models() -> dict[str, LensModel]:
    return {variant: planted.model(variant) for variant in planted.VARIANTS}


@pytest.fixture(scope="module")
def task(models) -> Task:
    return wrapper_present(PAIRS, models["base"].tokenizer, negatives=planted.neutral())


# Probes.


@pytest.fixture(scope="module", params=unit_first(["mass_mean", "ridge", "logistic"]))
def probed(models, task: Task, request) -> Probe:
    return probe(models, task, positions=["last"], estimators=[request.param], progress=False)


def scores(found: Probe, fitted_on: str, read_on: str) -> list[float]:
    return found.curve(fitted_on, read_on, "last", found.estimators[0])[0].round(6).tolist()


@pytest.mark.parametrize(
    ("model", "expected"),
    [("base", [0.5, 1, 1]), ("erased", [0.5, 0.5, 0.5]), ("masked", [0.5, 1, 1]), ("moved", [0.5, 1, 1])],
)
def test_the_cue_is_read_from_the_layer_that_writes_it_on_unless_it_is_erased(probed: Probe, model: str, expected):
    assert scores(probed, model, model) == expected


def test_the_bases_probe_fails_on_a_cue_that_only_moved_and_not_on_a_masked_one(probed: Probe):
    assert scores(probed, "base", "masked") == [0.5, 1, 1]
    assert scores(probed, "base", "moved") == scores(probed, "base", "erased") == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("variant", "written"), [("base", planted.DIRECTION), ("moved", planted.OTHER)])
def test_the_direction_of_a_probe_is_the_one_that_was_written(models, task: Task, variant: str, written):
    found = probe_direction(models[variant], task, "wrapper", name=variant, layers=[1, 2], progress=False)
    means = probe_direction(
        task.states(models[variant], layers=[1, 2], progress=False),
        task,
        "wrapper",
        name=variant,
        estimator="mass_mean",
    )
    assert (found.unit[:, 0] @ -written.numpy()).min() > 0.65  # its penalty knows the axes, the direction does not
    np.testing.assert_allclose(means.unit[:, 0] @ -written.numpy(), 1, atol=1e-5)
    np.testing.assert_allclose(means.norm[:, 0], PUSH.mean(), rtol=1e-4)
    np.testing.assert_allclose(means.rest, 0, atol=1e-4)
    assert means.name == f"mass-mean probe for 'wrapper' at the last token of {variant}"


def test_what_a_probe_reads_along_is_what_the_base_uses_and_the_moved_model_does_not(models, task: Task):
    for variant, used in (("base", True), ("moved", False)):
        model = models[variant]
        found = probe_direction(model, task, "wrapper", name=variant, estimator="mass_mean", layers=[2], progress=False)
        table = ablate(model, PAIRS, found, progress=False).to_dataframe()
        assert table["beyond_random"].tolist() == [used]


def test_where_nothing_is_written_a_probe_has_no_direction(models, task: Task):
    for variant, layer in (("base", 0), ("erased", 2)):
        with pytest.raises(CtlensError, match=f"direction at layer {layer} has no length"):
            probe_direction(
                models[variant], task, "wrapper", name="", estimator="mass_mean", layers=layer, progress=False
            )
    with pytest.raises(CtlensError, match="unknown label 'wrappers'; did you mean 'wrapper'"):
        probe_direction(models["base"], task, "wrappers", name="base", progress=False)
    with pytest.raises(CtlensError, match="states of 36 prompts for 108 labels"):
        probe_direction(states(models["base"], PAIRS, progress=False), task, "wrapper", name="base")


# Shifts. At the last token the wrapped state is the clean one and what the cue wrote.


@pytest.mark.parametrize(
    ("variant", "closed", "cosine", "distance", "length"),
    [("erased", 1, 1, 0, 1), ("masked", 0, np.nan, 1, 0), ("moved", 1, 0.5**0.5, 1, 2**0.5)],
)
def test_a_shift_is_what_was_taken_out_or_put_in_its_place(models, variant, closed, cosine, distance, length):
    found = residual_shift(models["base"], models[variant], PAIRS, progress=False)
    expected = {"gap_closed": closed, "cosine": cosine, "distance": distance, "gap_norm": PUSH[:, None]}
    for quantity, value in {**expected, "shift_norm": PUSH[:, None] * length}.items():
        at_last = getattr(found, quantity)[0]
        wanted = np.broadcast_to(np.asarray(value, dtype=float), (len(PAIRS), 2))
        np.testing.assert_allclose(at_last[:, 1:], wanted, atol=1e-4, err_msg=quantity)
    np.testing.assert_allclose(found.shift_norm[0, :, 0], 0, atol=1e-5)
    assert np.isnan(found.gap_closed[0, :, 0]).all()  # before the cue is read there is no gap to close


def test_the_shift_of_the_erased_model_is_along_the_planted_direction(models):
    before = states(models["base"], PAIRS, progress=False)
    after = states(models["erased"], PAIRS, progress=False)
    shift = after.values - before.values
    np.testing.assert_allclose(shift[0], 0, atol=1e-5)
    np.testing.assert_allclose(shift[1:] @ DIRECTION, np.stack([PUSH] * 2), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(shift[1:], axis=-1), np.stack([PUSH] * 2), rtol=1e-4)


def test_shifts_are_alike_by_their_shared_target_and_not_off_it(models):
    two = {name: models[name] for name in ("erased", "moved")}
    table = shift_similarity(models["base"], two, PAIRS, quantities=["cosine"], progress=False).to_dataframe()
    rows = table.query("positions == 'last' and a == 'erased' and b == 'moved'").set_index(["part", "layer"])
    assert rows.loc["all", "n_prompts"].tolist() == rows.loc["along", "n_prompts"].tolist() == [0, 36, 36]
    np.testing.assert_allclose(rows.loc["all", "value"], [np.nan, 0.5**0.5, 0.5**0.5], atol=1e-4)
    np.testing.assert_allclose(rows.loc["along", "value"], [np.nan, 1, 1], atol=1e-4)
    assert rows.loc["off", "value"].isna().all()  # the erased model has no shift there
    lengths = table.query("part == 'off' and positions == 'last' and a == 'moved' and b == 'moved'")["length_a"]
    np.testing.assert_allclose(lengths, [0, *[np.sqrt((PUSH**2).mean())] * 2], atol=1e-4)


def test_a_masked_model_has_no_shift_to_compare(models):
    two = {name: models[name] for name in ("erased", "masked")}
    with pytest.raises(CtlensError, match=r"\('masked', 0\) does not differ from the one before"):
        shift_similarity(models["base"], two, PAIRS, progress=False)


# Lenses.


def test_the_answer_turns_at_the_layer_that_writes_the_cue(models):
    found = logit_lens(models, PAIRS, progress=False)
    clean = np.array([planted.margin(pair, (lambda pair: 0)(pair)) for pair in PAIRS])
    pressed = np.array([planted.margin(pair, planted.written(pair)) for pair in PAIRS])
    np.testing.assert_allclose(found.values[0], [clean, pressed, pressed], rtol=1e-3)
    np.testing.assert_allclose(found.values[1], [clean] * 3, rtol=1e-3)
    assert (found.values[2:] > 0).all()


def test_the_share_of_the_head_that_writes_the_cue_is_what_the_cue_costs(models):
    found = logit_attribution(models, PAIRS, progress=False)
    shares = dict(zip(found.components, found.values.swapaxes(0, 1), strict=True))
    cost = [planted.margin(p, planted.written(p)) - planted.margin(p, planted.written(p), read=False) for p in PAIRS]
    np.testing.assert_allclose(shares["L1H0"][0], cost, rtol=1e-3)
    np.testing.assert_allclose(shares["L1H0"][1:], 0, atol=1e-3)
    for name in ("L0 MLP", "L1 MLP", "L2 MLP", "L2H0", "bias"):
        np.testing.assert_allclose(shares[name], 0, atol=1e-3)


# Directions from states that are there already.


def test_a_mean_difference_of_given_states_is_that_of_the_model(models):
    model = models["base"]
    given = tuple(states(model, PAIRS, side=side, layers=[1, 2], progress=False) for side in ("wrapped", "clean"))
    one = mean_difference(model, PAIRS, name="base", per="wrapper", layers=[1, 2], progress=False)
    other = mean_difference((given[0], given[1]), PAIRS, name="base", per="wrapper", layers=[1, 2], progress=False)
    assert isinstance(one, Directions) and (one.groups, one.layers, one.name) == (
        other.groups,
        other.layers,
        other.name,
    )
    np.testing.assert_array_equal(one.unit * one.norm[..., None], other.unit * other.norm[..., None])
    for sides, pairs in ((given[::-1], PAIRS), (given, PAIRS[:5])):
        with pytest.raises(CtlensError, match="wrapped and then the clean states of these pairs"):
            mean_difference((sides[0], sides[1]), pairs, name="base")
