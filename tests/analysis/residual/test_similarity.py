"""How alike shifts are: values by hand, planted weight changes, and what must not be compared."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import byte_level_tokenizer
from scipy.linalg import subspace_angles

from ctlens import plots
from ctlens.analysis import ShiftSimilarity, shift_similarity
from ctlens.analysis.base.recording import read
from ctlens.analysis.residual import shift_vectors
from ctlens.analysis.residual.likeness import (
    between,
    ceilings,
    cosines,
    debiased_cka,
    principal_cosines,
    top_directions,
    without_each_seed,
)
from ctlens.analysis.residual.shift_vectors import Shifts, measure, split
from ctlens.analysis.residual.similarity_result import AT_CEILING, AT_FLOOR, BELOW_CEILING
from ctlens.analysis.residual.similarity_statistics import STATISTICS, measure_all
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.loading import build
from ctlens.models.parameters import copy_model
from ctlens.models.weights import ModelConfig, canonical_weights, load_weights

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
WRAPPERS = ("I don't think so. ", "Sure, here it is: ", "You are a helpful assistant. ", "I may be in the minority. ")
PAIRS = [Pair(prompt(question), prompt(wrapper + question)) for question in QUESTIONS for wrapper in WRAPPERS]
D = 32
CONSTANT = 4
SHARED = 8
OTHER = 9
NOISE = 20
A = 0.8
B = 0.5
SEEDS = [(method, seed) for method in ("x", "y", "z") for seed in (0, 1)]
RNG = np.random.default_rng(0)


# A model whose residual stream is the embedding plus the mean, over the tokens so far, of what they write.
# Tokens of wrappers alone write into dimensions 0 to 3; every token has the same feature in dimension 4.


@pytest.fixture(scope="module")
def model() -> LensModel:
    tokenizer = byte_level_tokenizer()
    config = ModelConfig(d_vocab=400, n_layers=2, n_heads=1, d_model=D, d_mlp=2, n_ctx=64)
    planted = build(config, tokenizer)
    weights = {name: torch.zeros_like(weight) for name, weight in canonical_weights(planted).items()}
    weights |= {name: torch.ones_like(weight) for name, weight in weights.items() if weight.ndim == 1}
    embedding = weights["embed.W_E"]
    embedding[:, CONSTANT] = 1
    embedding[:, 16:] = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    asked = {token for question in QUESTIONS for token in ids(tokenizer, question)}
    for token in {token for wrapper in WRAPPERS for token in ids(tokenizer, wrapper)} - asked:
        embedding[token, token % 4] = 2.0
    for layer in range(2):
        weights[f"blocks.{layer}.attn.W_V"][0] = torch.eye(D)
    for index in range(4):
        weights["blocks.0.attn.W_O"][0, index, index] = 8
    load_weights(planted, weights)
    return planted


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def trained(model: LensModel, closed: float, writes: Mapping[int, float]) -> LensModel:
    """`closed` of the gap closed, and the constant feature written into other dimensions."""
    changed = copy_model(model)
    weights = canonical_weights(model)
    output = weights["blocks.0.attn.W_O"][0]
    output *= 1 - closed
    for dimension, strength in writes.items():
        output[CONSTANT, dimension] = strength
    load_weights(changed, weights)
    return changed


@pytest.fixture(scope="module")
def models(model: LensModel) -> dict[tuple[str, int], LensModel]:
    """`x` and `y` write one direction off the gap, `z` and the null others; each seed adds a direction of its own."""
    kinds = {"x": (0.5, SHARED), "y": (0.9, SHARED), "z": (0.7, OTHER), "null": (0.0, 16)}
    return {
        (method, seed): trained(
            model, closed, {direction: A, NOISE + 2 * index + seed: B} | ({SHARED: 0.2} if method == "null" else {})
        )
        for index, (method, (closed, direction)) in enumerate(kinds.items())
        for seed in (0, 1)
    }


@pytest.fixture(scope="module")
def found(model: LensModel, models: dict[tuple[str, int], LensModel]) -> ShiftSimilarity:
    return shift_similarity(model, models, PAIRS, null="null", progress=False)


def row(found: ShiftSimilarity, a: str, b: str, **at: object) -> pd.Series:
    asked = {"quantity": "cosine", "part": "off", "positions": "last", "layer": 1, **at, "a": a, "b": b}
    table = found.to_dataframe()
    (index,) = np.flatnonzero(np.logical_and.reduce([table[name] == value for name, value in asked.items()]))
    return table.iloc[index]


@pytest.mark.parametrize("positions", ["last", "content"])
@pytest.mark.parametrize("quantity", ["cosine", "mean_cosine"])
def test_trainings_that_write_one_direction_off_the_gap_are_told_from_those_that_share_the_target(
    found: ShiftSimilarity, positions: str, quantity: str
) -> None:
    ceiling = A**2 / (A**2 + B**2)  # two seeds have A in common, not B
    same = row(found, "x", "y", positions=positions, quantity=quantity)
    target = row(found, "x", "z", positions=positions, quantity=quantity)

    assert row(found, "x", "x", positions=positions, quantity=quantity)["value"] == pytest.approx(ceiling, rel=1e-4)
    assert same["value"] == pytest.approx(ceiling, rel=1e-4) and same["corrected"] == pytest.approx(1, rel=1e-4)
    assert same["ceiling"] == pytest.approx(ceiling, rel=1e-4) and same["verdict"] == AT_CEILING
    assert abs(target["value"]) < 1e-4 and target["verdict"] == AT_FLOOR
    assert row(found, "x", "z", positions=positions, quantity=quantity, part="along")["value"] == pytest.approx(
        1, abs=1e-3
    )
    assert row(found, "x", "z", positions=positions, quantity=quantity, part="all")["value"] > 0.5
    told = row(found, "x", "z", positions=positions, quantity=quantity, part="along")["verdict"]
    assert (told == "") == ((quantity, positions) == ("cosine", "last"))  # along one direction it is a mere sign


def test_the_whole_shift_is_what_is_along_and_what_is_off_the_gap(model, models) -> None:
    """One training closes the gap and writes off it, another only closes it: their cosine is that of a triangle."""
    pair = PAIRS[:1]
    changed = trained(model, 1.0, {SHARED: 8.0})
    base = resid(model, pair[0].wrapped.turns[0].content)
    other = resid(changed, pair[0].wrapped.turns[0].content)
    gap = resid(model, pair[0].clean.turns[0].content) - base
    off = other - base - gap

    pure = trained(model, 1.0, {})  # the gap and nothing else
    found = shift_similarity(model, {"x": changed, "pure": pure}, pair, progress=False)

    expected = gap.norm() / (gap.norm() ** 2 + off.norm() ** 2).sqrt()
    assert row(found, "x", "pure", part="all")["value"] == pytest.approx(expected.item(), rel=1e-4)
    assert row(found, "x", "pure", part="along")["value"] == pytest.approx(1, rel=1e-5)


def test_trainings_that_do_nothing_but_close_the_gap_have_nothing_off_it(model) -> None:
    """What is left off the gap is rounding, and rounding is alike in models of the same weights."""
    found = shift_similarity(model, {"x": trained(model, 0.5, {}), "y": trained(model, 0.9, {})}, PAIRS, progress=False)

    assert row(found, "x", "y", part="all")["value"] == pytest.approx(1, rel=1e-4)
    assert np.isnan(row(found, "x", "y")["value"]) and row(found, "x", "y")["n_prompts"] == 0


def resid(model: LensModel, text: str) -> torch.Tensor:
    tokens = torch.tensor([[0, *ids(model.tokenizer, text)]])
    return model.run_with_cache(tokens)[1]["blocks.1.hook_resid_post"][0, -1].detach()


def test_the_floors_are_the_null_and_random_directions(found: ShiftSimilarity) -> None:
    numbers = row(found, "x", "y", part="all")
    with_null = [row(found, name, "null", part="all")["value"] for name in ("x", "y")]

    assert with_null[0] != with_null[1] and numbers["floor"] == max(with_null)
    assert -0.5 < numbers["random_low"] < 0 < numbers["random_high"] < 0.5
    assert row(found, "x", "null")["verdict"] == "" and np.isnan(row(found, "x", "null")["floor"])


def test_a_null_that_hardly_moved_is_called_a_weak_floor(model, models, found: ShiftSimilarity) -> None:
    still = {key: models[key] for key in models if key[0] != "null"} | {("still", 0): trained(model, 0, {OTHER: 0.001})}

    weak = shift_similarity(model, still, PAIRS, null="still", progress=False)

    assert "still hardly moved (0.1%" in weak.curves().layout.meta["subtitle"]
    assert "hardly" not in found.curves().layout.meta["subtitle"]
    assert row(weak, "x", "z")["weak_floor"] and not row(found, "x", "z")["weak_floor"]
    assert not row(weak, "x", "still")["weak_floor"]  # the null itself is no floor there
    numbers = row(found, "x", "z", layer=0)  # of one length off the gap: 0.8 and 0.5 times one reading
    assert numbers["length_a"] == pytest.approx(numbers["length_b"], rel=1e-4)
    assert row(weak, "x", "still")["length_a"] / row(weak, "x", "still")["length_b"] == pytest.approx(
        (A**2 + B**2) ** 0.5 / 0.001, rel=1e-2
    )


@pytest.mark.slow
def test_order_of_prompts_and_batches_change_nothing(model, models, found: ShiftSimilarity) -> None:
    for pairs, size in ((PAIRS[::-1], 64), (PAIRS, 1), (PAIRS, 5)):
        again = shift_similarity(model, models, pairs, null="null", batch_size=size, progress=False)
        for name in ("value", "corrected", "random_high", "n_prompts"):
            np.testing.assert_allclose(getattr(again, name), getattr(found, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("held", "rows", "hooks"), [(2**26, len(PAIRS), 2), (15 * 10**3, 1, 2), (1, 1, 1)])
def test_models_run_again_only_where_not_one_prompt_fits_at_all_hook_points(
    model, models, found: ShiftSimilarity, held: int, rows: int, hooks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(shift_vectors, "_HELD", held)
    monkeypatch.setattr(
        shift_vectors, "read", lambda source, side, names, first: asked.append(len(names)) or read(source, side, names)
    )

    again = shift_similarity(model, models, PAIRS, null=found.null, progress=False)

    tables = [result.to_dataframe().drop(columns="verdict") for result in (again, found)]  # one is decided by rounding
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-4)
    assert asked == [hooks] * (2 // hooks) * (len(PAIRS) // rows) * (len(models) + 2)


def test_a_model_is_like_itself_and_like_no_training_before_it_moved(model, models) -> None:
    copies = {("x", 0): models["x", 0], ("y", 1): copy_model(models["x", 0]), ("late", 2): late(model)}

    found = shift_similarity(
        model, copies, PAIRS, quantities=["cosine", "mean_cosine", "principal"], k=2, progress=False
    )

    assert row(found, "x", "y", part="all")["value"] == pytest.approx(1, rel=1e-5)
    unmoved = row(found, "x", "late", part="all", layer=0)
    assert np.isnan(unmoved["value"]) and unmoved["n_prompts"] == 0 and unmoved["verdict"] == ""
    assert np.isfinite(row(found, "x", "late", part="all", layer=1)["value"])


def late(model: LensModel) -> LensModel:
    """Trained in the second layer alone."""
    changed = copy_model(model)
    weights = canonical_weights(model)
    weights["blocks.1.attn.W_O"][0, CONSTANT, OTHER] = 1
    load_weights(changed, weights)
    return changed


def test_one_seed_has_no_ceiling_and_no_correction(model, models) -> None:
    found = shift_similarity(model, {"x": models["x", 0], "y": models["y", 0]}, PAIRS, progress=False)

    numbers = row(found, "x", "y")
    assert np.isfinite(numbers["value"]) and numbers[["corrected", "ceiling", "floor"]].isna().all()
    assert found.one_seed == ("x", "y")
    assert "no ceiling" in found.figure().layout.title.text and "divided" not in found.figure().layout.title.text
    assert numbers["verdict"] == "above the floor"


def test_orthogonal_shifts_have_cosine_0_and_parts_are_those_by_hand() -> None:
    shift = torch.tensor([[[[3.0, 4.0]]], [[[4.0, -3.0]]]])  # model, batch, pos, d
    gap = torch.tensor([[[2.0, 0.0]]])

    parts = [measure(part, torch.tensor([[True]])) for part in split(shift, gap)]

    assert [cosines(part.gram)[0, 0, 1] for part in parts] == pytest.approx([0, 1, -1])
    assert [part.gram[0, 0, 1] for part in parts] == [0, 12, -12]


def test_tokens_outside_the_place_count_nothing_and_pull_is_the_cosine_with_a_direction() -> None:
    shift = torch.tensor([[[[3.0, 0.0], [0.0, 1.0], [100.0, 100.0]]]])
    where = torch.tensor([[True, True, False]])

    found = measure(shift, where)

    assert found.gram.tolist() == [[[10.0]]] and found.mean.tolist() == [[[1.5, 0.5]]]
    direction = np.array([0.6, 0.8])  # of lengths 3 and 1 at the two tokens: (3*3*.6 + 1*.8) / 10
    assert found.pull[0, 0] @ direction == pytest.approx(0.62)
    assert np.isnan(measure(shift, torch.zeros(1, 3, dtype=torch.bool)).mean).all()


def test_the_correction_recovers_the_cosine_that_noise_between_seeds_hides() -> None:
    """Two directions with cosine 0.6, each seen with independent noise as long as itself at every prompt."""
    d = 400
    prompts = 200
    true = {"x": np.eye(d)[0], "y": 0.6 * np.eye(d)[0] + 0.8 * np.eye(d)[1], "z": np.eye(d)[2]}
    noise = RNG.normal(size=(prompts, len(SEEDS), d)) / d**0.5
    vectors = np.stack([true[method] for method, _ in SEEDS]) + noise

    table, _ = measure_all(shifts(vectors), SEEDS, ["cosine"], 1, {})

    numbers = dict(zip(STATISTICS, table[0], strict=True))
    assert np.diagonal(numbers["value"]) == pytest.approx([0.5] * 3, abs=0.02)
    assert numbers["value"][0, 1] == pytest.approx(0.3, abs=0.02)
    assert numbers["corrected"][0, 1] == pytest.approx(0.6, abs=0.03)
    assert numbers["corrected_low"][0, 1] < 0.6 < numbers["corrected_high"][0, 1]
    assert abs(numbers["corrected"][0, 2]) < 0.03


def shifts(vectors: np.ndarray) -> Shifts:
    """One token a prompt; `[prompt, model, d]`."""
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return Shifts(vectors @ vectors.swapaxes(1, 2), vectors, unit)


def test_numbers_between_methods_come_from_different_seeds() -> None:
    values = np.arange(16.0).reshape(4, 4)
    seeds = [("x", 0), ("x", 1), ("y", 0), ("y", 1)]

    mean, low, high = between(values, seeds)

    assert mean.tolist() == [[2.5, (3 + 6) / 2], [(9 + 12) / 2, 12.5]]  # (0,3) and (1,2); never (0,2) or (1,3)
    assert (low[0, 1], high[0, 1]) == (3, 6)
    alone = between(values[1:3, 1:3], [("x", 0), ("y", 0)])[0]
    assert alone[0, 1] == 6 and np.isnan(alone[0, 0])


def test_what_is_left_without_a_seed_is_the_comparison_of_the_other_models(model, models) -> None:
    three = models | {("x", 2): trained(model, 0.6, {SHARED: A, 30: B})}
    found = shift_similarity(model, three, PAIRS, null="null", progress=False)
    left = {key: one for key, one in three.items() if key[1] != 1}

    alone = shift_similarity(model, left, PAIRS, null="null", progress=False)

    assert found.without_seed.shape == (3, *found.by_prompt.shape)
    np.testing.assert_allclose(found.without_seed[1], alone.by_prompt, atol=1e-6)


def test_a_method_of_one_seed_has_nothing_without_it() -> None:
    values = np.arange(16.0).reshape(4, 4)
    seeds = [("x", 0), ("y", 1), ("y", 0), ("y", 2)]

    first, second, _ = without_each_seed(values, seeds)

    assert np.isnan(first[0]).all() and np.isnan(first[:, 0]).all()
    assert first[1, 1] == (values[1, 3] + values[3, 1]) / 2
    assert (second[0, 1], second[1, 0]) == (values[0, 3], values[3, 0])  # the only pair of different seeds


def test_methods_keep_their_order_where_a_seed_is_left_out() -> None:
    values = np.arange(16.0).reshape(4, 4)

    first, _ = without_each_seed(values, [("x", 0), ("y", 0), ("y", 1), ("x", 1)])

    assert (first[0, 1], first[1, 0]) == (values[3, 2], values[2, 3])


def test_a_missing_or_small_ceiling_corrects_nothing() -> None:
    table = np.array([[0.81, 0.4, 0.4], [0.4, 0.25, 0.4], [0.4, 0.4, np.nan]])

    assert ceilings(table)[0].tolist() == pytest.approx([0.81, np.nan, np.nan], nan_ok=True)


def hsic_of_tuples(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The unbiased estimator as the mean over ordered 4-tuples of distinct items."""
    tuples = list(permutations(range(len(k)), 4))
    return float(np.mean([k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in tuples]))


def hsic_of_song(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The closed form of Song et al. (2012)."""
    n = len(k)
    one = np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ l) + sums - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3)))


@pytest.mark.parametrize("hsic", [hsic_of_tuples, hsic_of_song])
def test_cka_is_that_of_the_unbiased_estimator(hsic) -> None:
    vectors = RNG.normal(size=(2, 7, 3)) + 1
    vectors[1] += vectors[0]
    one = vectors[0] @ vectors[0].T
    other = vectors[1] @ vectors[1].T

    expected = hsic(one, other) / (hsic(one, one) * hsic(other, other)) ** 0.5

    assert debiased_cka(vectors)[0, 1] == pytest.approx(expected)


def test_unrelated_data_of_many_dimensions_have_debiased_cka_0_where_the_biased_one_is_high() -> None:
    vectors = RNG.normal(size=(2, 110, 100))
    centred = vectors - vectors.mean(1, keepdims=True)
    biased = np.linalg.norm(centred[0].T @ centred[1]) ** 2 / np.prod(
        [np.linalg.norm(of_model.T @ of_model) for of_model in centred]
    )

    assert biased > 0.4 and abs(debiased_cka(vectors)[0, 1]) < 0.05


def test_cka_knows_no_rotation_scale_or_offset() -> None:
    vectors = RNG.normal(size=(40, 5))
    turned = 3 * vectors @ np.linalg.qr(RNG.normal(size=(5, 5)))[0] + 7

    assert debiased_cka(np.stack([vectors, turned]))[0, 1] == pytest.approx(1)


def test_principal_cosines_are_those_of_scipy_and_by_hand() -> None:
    angle = np.pi / 6
    tilted = np.array([[1.0, 0, 0], [0, np.cos(angle), np.sin(angle)]])
    assert principal_cosines(np.eye(3)[:2], tilted) == pytest.approx([1, np.cos(angle)])

    vectors = RNG.normal(size=(2, 20, 6))
    top = top_directions(vectors, 3)
    expected = np.cos(subspace_angles(top[0].T, top[1].T))
    assert principal_cosines(top[0], top[1]) == pytest.approx(np.sort(expected)[::-1])


def test_top_directions_hold_most_of_the_length_and_there_are_no_more_than_the_vectors_span() -> None:
    vectors = np.outer([1.0, -2.0, 3.0], [0.6, 0.8, 0.0])

    top = top_directions(vectors, 2)

    assert np.abs(top).round(6).tolist() == [[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]


def test_all_quantities_have_intervals_that_hold_their_value() -> None:
    common = RNG.normal(size=(60, 1, 4))
    vectors = np.concatenate([common + 0.5 * RNG.normal(size=(60, 1, 4)) for _ in SEEDS], 1)

    table, band = measure_all(shifts(vectors), SEEDS, ["cosine", "mean_cosine", "cka", "principal"], 2, {})

    value, low, high = table[:, 0], table[:, 1], table[:, 2]
    assert table.shape == (5, 8, 3, 3) and np.all((low <= value) & (value <= high) & (high <= 1))
    assert np.isnan(table[2:, 5:]).all() and np.isfinite(band[[0, 1, 3, 4]]).all() and np.isnan(band[2]).all()


def test_a_comparison_comes_back_from_its_file(found: ShiftSimilarity, tmp_path) -> None:
    found.save(tmp_path / "similarity.safetensors")

    again = ShiftSimilarity.load(tmp_path / "similarity.safetensors")

    assert again.to_dataframe().equals(found.to_dataframe()) and again.one_seed == found.one_seed == ()


def test_the_matrix_shows_corrected_numbers_and_those_as_measured_on_hover(found: ShiftSimilarity) -> None:
    figure = found.figure()
    last, content = figure.data
    size = len(found.methods)
    numbers = row(found, "x", "y")

    assert [note.text for note in figure.layout.annotations] == ["at the last token", "at the content tokens"]
    assert last.z[1][0] == last.z[0][1] == numbers["corrected"]
    assert list(last.customdata[1][0]) == ["y and x", numbers["value"]]
    assert last.z[0][0] == row(found, "x", "x")["value"] and "divided by the ceilings" in figure.layout.title.text
    assert last.text[2][0].count("(") == 1 and "(" not in last.text[1][0]  # z and x are not above the floor
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1, 1)
    assert content.coloraxis == last.coloraxis and list(figure.layout.yaxis.ticktext)[-1] == "null"
    assert len([shape for shape in figure.layout.shapes if shape.type == "rect"]) == 2 * size


def test_the_curves_show_ceiling_floor_and_random_band(found: ShiftSimilarity) -> None:
    figure = found.curves()
    named = {trace.name: trace for trace in figure.data if trace.name and trace.xaxis in (None, "x")}

    x = found.methods.index("x")
    y = found.methods.index("y")
    null = found.methods.index("null")
    at = (0, 2, 0, slice(None))  # cosine, off, last
    assert list(named["y"].y) == found.value[(*at, x, y)].tolist()
    assert list(named["null"].y) == found.value[(*at, x, null)].tolist()
    assert list(named["ceiling: same method, other seed"].y) == found.value[(*at, x, x)].tolist()
    band = list(named["random directions"].y)
    assert band[:2] == found.random_high[(*at, x)].tolist() and band[:1:-1] == found.random_low[(*at, x)].tolist()
    assert len([note for note in figure.layout.annotations]) == 3  # no panel for the null


def test_a_partly_shared_direction_is_between_floor_and_ceiling(model, models) -> None:
    half = {("h", seed): trained(model, 0.6, {SHARED: A, OTHER: A, 30 + seed: B}) for seed in (0, 1)}
    chosen = {key: models[key] for key in models if key[0] in ("x", "null")}

    numbers = row(shift_similarity(model, chosen | half, PAIRS, null="null", progress=False), "x", "h")

    assert numbers["verdict"] == BELOW_CEILING and 0.6 < numbers["corrected"] < 0.8  # 1 / root of 2


def test_a_place_without_tokens_has_no_numbers_and_refuses_nothing() -> None:
    empty = Shifts(np.zeros((3, 6, 6)), np.full((3, 6, 4), np.nan), np.full((3, 6, 4), np.nan))

    table, band = measure_all(empty, SEEDS, ["cosine", "mean_cosine", "cka"], 3, {})

    assert np.isnan(table).all() and np.isnan(band).all() and table.shape == (3, 8, 3, 3)


def test_what_does_not_compare_is_refused(model, models) -> None:
    pair = {key: models[key] for key in [("x", 0), ("y", 0)]}
    smaller = build(ModelConfig(d_vocab=400, n_layers=1, n_heads=2, d_model=16, d_mlp=16), model.tokenizer)
    cases: list[tuple[dict, dict, str]] = [
        ({"x": models["x", 0]}, {}, "at least two models"),
        (pair | {("z", 3): copy_model(model)}, {}, r"\('z', 3\) does not differ from the one before"),
        (pair | {"x": models["x", 1]}, {}, "given twice"),
        (pair | {"small": smaller}, {}, "n_layers is 2 before and 1 after"),
        (pair | {"t": copy_model(model).train()}, {}, "eval mode"),
        (pair, {"null": "zz"}, "null"),
        (pair, {"quantities": ["cosin"]}, "did you mean 'cosine'"),
        (pair, {"quantities": []}, "at least one quantity"),
        (pair, {"quantities": ["cosine"] * 2}, "twice: name each once"),
        (pair, {"quantities": ["cka"]}, "12 prompts do not suffice for 32 dimensions"),
        (pair, {"quantities": ["principal"], "k": 7}, "7 principal angles need 14 prompts"),
        (pair, {"layers": [2]}, "layer 2 does not exist"),
        (pair, {"site": "z"}, "'z' has one vector per head"),
    ]
    for chosen, options, message in cases:
        with pytest.raises(CtlensError, match=message):
            shift_similarity(model, chosen, PAIRS, progress=False, **options)
    with pytest.raises(CtlensError, match="1 of 13 pairs do not align"):
        shift_similarity(model, pair, [*PAIRS, Pair(prompt("x"), prompt("y"))], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "of"}, "did you mean 'off'"),
        ({"quantity": "cka"}, "quantity"),
        ({"part": "off", "positions": "wrapper"}, "no clean counterpart"),
    ],
)
def test_what_was_not_measured_is_not_drawn(found: ShiftSimilarity, options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        found.curves(**options)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.similarity_matrix(["x"], {}, "?"),
        lambda: plots.similarity_matrix(["x", "y"], {"last": (([[1]],) * 3, ([[1]],) * 3, [[0]])}, "?"),
        lambda: plots.similarity_curves([0], {}, {}, "?", y_title="y"),
        lambda: plots.similarity_curves([], {"x": {}}, {"x": ([], [])}, "?", y_title="y"),
        lambda: plots.similarity_curves(
            [0, 1], {"x": {"y": ([1], [1], [1])}}, {"x": ([0, 0], [0, 0])}, "?", y_title="y"
        ),
    ],
)
def test_figures_of_nothing_or_of_another_shape_are_refused(draw) -> None:
    with pytest.raises(CtlensError):
        draw()
