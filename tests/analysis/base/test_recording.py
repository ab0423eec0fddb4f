"""A recording gives every reading analysis the numbers that the model gives, without running it, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jaxtyping
import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import CHAT_MODELS, chat_model

from ctlens import analysis as look
from ctlens.analysis import Recording, Result
from ctlens.analysis.base.record import record
from ctlens.analysis.base.recording import LOGITS, Readable, model_of
from ctlens.analysis.outputs.logit_lens import ATTRIBUTION_SITES
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import pad
from ctlens.data.chat import render
from ctlens.data.pairs import Pair, prompt
from ctlens.models.parameters import copy_model

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "Is it right?", "When a creature feels, what?")
PAIRS = [  # one question twice, in different batches and beside other prompts
    Pair(prompt(q, "the", "a"), prompt("no. " * n + q, "the", "a"), labels={"item": str(n)})
    for n, q in enumerate(QUESTIONS, 1)
]
RUN: dict[str, Any] = {"batch_size": 2, "progress": False}
Analysis: TypeAlias = Callable[[Readable, Readable], Result]
SOME = look.Task(
    "?",
    ("x",) * 4 + ("y",) * 4,
    {"item": tuple("12341234")},
    parts=((tuple(PAIRS), "wrapped"), (tuple(PAIRS), "clean")),
)
READING: dict[str, Analysis] = {
    "residual_shift": lambda before, after: look.residual_shift(before, after, PAIRS, **RUN),
    "shift_similarity": lambda before, after: look.shift_similarity(
        before, {"one": after, ("two", 1): after}, PAIRS, site="attn_out", **RUN
    ),
    "logit_lens": lambda before, after: look.logit_lens({"base": before, "act": after}, PAIRS, **RUN),
    "logit_attribution": lambda before, after: look.logit_attribution(after, PAIRS, side="clean", **RUN),
    "states": lambda before, after: look.states(after, PAIRS, positions="wrapper", site="mlp_out", **RUN),
    "mean_difference": lambda before, after: look.mean_difference(
        before, PAIRS, name="base", positions="content", **RUN
    ),
    "probe": lambda before, after: look.probe({"base": before, "act": after}, SOME, folds=2, seeds=1, **RUN),
    "probe_direction": lambda before, after: look.probe_direction(after, SOME, "x", name="after", **RUN),
}


@pytest.fixture(scope="module", params=CHAT_MODELS)
def models(request: pytest.FixtureRequest) -> tuple[LensModel, LensModel]:
    before = chat_model(request.param)
    after = copy_model(before)
    draw = torch.Generator().manual_seed(1)
    for parameter in after.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return before, after


@pytest.fixture(scope="module")
def recordings(models: tuple[LensModel, LensModel]) -> tuple[Recording, Recording]:
    before, after = models
    return (
        record(before, PAIRS, sites=ATTRIBUTION_SITES, **RUN),
        record(after, PAIRS, sites=ATTRIBUTION_SITES, **RUN),
    )


@pytest.mark.parametrize("name", READING)
def test_a_recording_gives_the_models_numbers_to_the_last_bit(models, recordings, name: str, monkeypatch) -> None:
    from_models = READING[name](*models)
    monkeypatch.setattr(
        "ctlens.analysis.base.recording.run_capturing", lambda *args, **options: pytest.fail("the model was run")
    )

    found = READING[name](*recordings)

    for field, value in vars(from_models).items():
        np.testing.assert_equal(getattr(found, field), value, err_msg=field)


@pytest.mark.boundary
def test_a_recording_holds_what_transformer_lens_caches_of_one_prompt(models, recordings) -> None:
    model, seen = models[0], recordings[0]
    ids = render(model.tokenizer, PAIRS[3].wrapped.turns).ids
    logits, cache = model.run_with_cache(torch.tensor([ids]))

    assert seen.sides == ("clean",) * 4 + ("wrapped",) * 4 and seen.numbers.tolist() == [0, 1, 2, 3] * 2
    assert tuple(seen.tokens[-len(ids) :]) == ids and seen.lengths.sum() == len(seen.tokens)
    for name in ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z"):
        expected = cache[name][0].detach().numpy()
        np.testing.assert_allclose(seen.values[name][-len(ids) :].reshape(expected.shape), expected, atol=2e-5)
    np.testing.assert_allclose(seen.values[LOGITS][-1], logits[0, -1].detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("chosen", [[3, 1], [0, 2], [2, 1, 0]])
def test_some_of_the_pairs_in_any_order_and_batches_are_read_as_from_the_model(models, recordings, chosen) -> None:
    pairs = [PAIRS[number] for number in chosen]

    for positions in ("last", "content"):
        found = look.states(recordings[1], pairs, positions=positions, batch_size=64, progress=False).values
        expected = look.states(models[1], pairs, positions=positions, batch_size=64, progress=False).values
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("analysis", [look.logit_lens, look.logit_attribution])
def test_answers_that_begin_alike_are_recorded_up_to_where_they_part(models, analysis) -> None:
    alike = [Pair(pair.clean, prompt(pair.wrapped.turns[0].content, "is right", "is that")) for pair in PAIRS[:3]]
    seen = record(models[0], alike, sites=ATTRIBUTION_SITES, sides=["wrapped"], **RUN)

    assert len(seen.lengths) == 6 and (seen.lengths[3:] > seen.lengths[:3]).all()
    np.testing.assert_allclose(
        analysis(seen, alike, **RUN).values, analysis(models[0], alike, **RUN).values, rtol=1e-3, atol=1e-4
    )


def test_a_recording_survives_saving_and_is_read_with_its_model_alone(models, recordings, tmp_path) -> None:
    recordings[0].save(tmp_path / "seen.safetensors")
    again = Recording.load(tmp_path / "seen.safetensors")

    with pytest.raises(CtlensError, match=r"needs its model: call recording.of\(model\)"):
        look.logit_lens(again, PAIRS, **RUN)
    with pytest.raises(CtlensError, match="of a model with other weights"):
        again.of(models[1])
    lens = look.logit_lens(again.of(copy_model(models[0])), PAIRS, **RUN)
    np.testing.assert_array_equal(lens.values, look.logit_lens(models[0], PAIRS, **RUN).values)
    by = ["hook_name", "side", "pair"]
    tables = [
        table.sort_values(by, ignore_index=True) for table in (again.to_dataframe(), recordings[0].to_dataframe())
    ]
    assert tables[0].equals(tables[1])


def test_the_table_and_the_figure_hold_the_lengths_at_the_last_token() -> None:
    of_layer_2 = np.array([[1, 0], [3, 4], [6, 8]], dtype=np.float32)  # two tokens of one prompt, one of the other
    seen = Recording(
        {"blocks.10.hook_mlp_out": 2 * of_layer_2, "blocks.2.hook_mlp_out": of_layer_2},
        np.array([5, 6, 7]),
        np.array([2, 1]),
        np.array([0, 0]),
        ("clean", "wrapped"),
        "",
    )

    assert seen.to_dataframe().values.tolist() == [
        ["blocks.10.hook_mlp_out", 0, "clean", 2, 10],
        ["blocks.10.hook_mlp_out", 0, "wrapped", 1, 20],
        ["blocks.2.hook_mlp_out", 0, "clean", 2, 5],
        ["blocks.2.hook_mlp_out", 0, "wrapped", 1, 10],
    ]
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in seen.figure("mlp_out").data if trace.name}
    assert {name: line for name, line in lines.items() if len(line[0]) == 2} == {
        "clean": ([2, 10], [5, 10]),
        "wrapped": ([2, 10], [10, 20]),
    }
    with pytest.raises(CtlensError, match="unknown hook point of the recording 'resid_post'"):
        seen.figure("resid_post")


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_prompt_that_was_recorded_twice_is_read_at_its_own_place(padding) -> None:
    """Prompts 5 6, then 7, then 5 6 again, as other batches round it; the values count the tokens."""
    seen = Recording(
        {"blocks.0.hook_mlp_out": np.arange(5, dtype=np.float32)[:, None], LOGITS: np.eye(3, dtype=np.float32)},
        np.array([5, 6, 7, 5, 6]),
        np.array([2, 1, 2]),
        np.array([0, 1, 2]),
        ("clean",) * 3,
        "",
    )
    side = pad([(5, 6), (7,)], padding)

    def read(first: int) -> tuple[list[list[float]], list[list[float]]]:
        found = seen.read(side, ["blocks.0.hook_mlp_out", LOGITS], first)
        return found["blocks.0.hook_mlp_out"][..., 0].tolist(), found[LOGITS].tolist()

    lone = [2.0, 0.0] if padding == "right" else [0.0, 2.0]
    assert read(0) == ([[0, 1], lone], [[1, 0, 0], [0, 1, 0]])
    assert read(2) == ([[3, 4], lone], [[0, 0, 1], [0, 1, 0]])
    assert read(7) == read(0)  # it was not recorded at this index: the first


# What does not fit is refused.


def test_a_model_that_was_trained_since_is_refused(models) -> None:
    trained = copy_model(models[0])
    seen = record(trained, PAIRS, **RUN)
    next(trained.parameters()).data[0] += 1e-3

    for analysis in (lambda: look.states(seen, PAIRS, **RUN), lambda: look.logit_lens(seen, PAIRS, **RUN)):
        with pytest.raises(CtlensError, match="other weights: record this model"):
            analysis()


@pytest.fixture(scope="module")
def lacking(models: tuple[LensModel, LensModel]) -> list[list[Recording]]:
    """Recordings of both models that lack a pair, and recordings that lack a layer."""
    last = {"layers": "last", "sites": ("resid_post", "attn_out", "mlp_out")}
    return [
        [record(model, pairs, **{"sites": ATTRIBUTION_SITES, **RUN, **options}) for model in models]
        for pairs, options in ((PAIRS[:3], {}), (PAIRS, last))
    ]


@pytest.mark.parametrize("name", READING)
def test_what_was_not_recorded_is_refused(lacking, name: str) -> None:
    without_a_pair, without_a_layer = lacking
    with pytest.raises(
        CtlensError, match=r"prompt \d was not recorded \(\d others were\): record these pairs and sides"
    ):
        READING[name](*without_a_pair)
    with pytest.raises(CtlensError, match="unknown hook point of the recording 'blocks.0.hook"):
        READING[name](*without_a_layer)


def test_a_recording_of_one_side_serves_the_trained_model_and_not_the_reference(models, recordings) -> None:
    before = recordings[0]
    after = record(models[1], PAIRS, sides=["wrapped"], **RUN)

    found = look.residual_shift(before, after, PAIRS, **RUN)

    np.testing.assert_array_equal(found.gap_closed, look.residual_shift(*models, PAIRS, **RUN).gap_closed)
    np.testing.assert_array_equal(
        look.residual_shift(before, models[1], PAIRS, **RUN).gap_closed,
        found.gap_closed,  # a model beside a recording
    )
    with pytest.raises(CtlensError, match="prompt 1 was not recorded"):
        look.residual_shift(after, before, PAIRS, **RUN)


def test_an_analysis_that_runs_the_model_refuses_a_recording_in_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user has no checks of types at run time
    base = planted.model()
    seen = record(base, planted.pairs(), progress=False)
    pairs = planted.pairs()
    direction = look.mean_difference(seen, pairs, name="base", layers=[1], progress=False)

    for analysis in (
        lambda: look.steer({"base": seen}, pairs, direction, progress=False),  # type: ignore[dict-item]
        lambda: look.ablate(seen, pairs, direction, progress=False),  # type: ignore[arg-type]
        lambda: look.patch(seen, pairs, site="resid_post", direction="denoising", progress=False),  # type: ignore[arg-type]
        lambda: look.knockout(seen, pairs, progress=False),  # type: ignore[arg-type]
        lambda: look.attention_diff(base, seen, pairs, progress=False),  # type: ignore[arg-type]
    ):
        with pytest.raises(CtlensError, match="give recording.model"):
            analysis()
    assert look.steer(model_of(seen), pairs, direction, draws=2, progress=False).layers == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": ["pattern"]}, "'pattern' has one value per pair of tokens"),
        ({"sites": ["resid_past"]}, "unknown hook point 'resid_past'"),
        ({"sites": []}, "nothing to record"),
        ({"pairs": []}, "there are no pairs"),
        ({"layers": [3]}, "layer 3 does not exist"),
        ({"sides": ["left"]}, "unknown prompt side 'left'"),
        ({"sides": ["benign"]}, "pair 1 has no benign prompt"),
        (
            {"pairs": [Pair(prompt("ada ?"), prompt("quite ada ?"))]},
            "wrapped prompt of pair 1: the tokenizer does not know 'quite'",
        ),
        ({"pairs": [Pair(prompt("is it " * 9 + "?"), prompt("ada ?"))]}, "context"),
    ],
)
def test_what_cannot_be_recorded_is_told_in_a_sentence(change: dict, message: str) -> None:
    options: dict[str, Any] = {"pairs": planted.pairs(), "progress": False} | change
    with pytest.raises(CtlensError, match=message):
        record(planted.model(), options.pop("pairs"), **options)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(CtlensError, match="eval mode"):
        record(planted.model().train(), planted.pairs(), progress=False)
