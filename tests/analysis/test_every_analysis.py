"""Analyses on planted changes: what was put in must come out, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model
from safetensors import safe_open
from safetensors.numpy import save_file

from ctlens.analysis import AttentionDiff, ResidualShift, attention_diff, residual_shift
from ctlens.analysis.residual.shift import RAW_QUANTITIES, SHIFT_QUANTITIES, _of_layer
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import Matched
from ctlens.data.pairs import Pair, prompt
from ctlens.models.loading import build, load_model
from ctlens.models.parameters import copy_model
from ctlens.models.weights import ModelConfig

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " * (i + 1) + q)) for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def model(tokenizer) -> LensModel:
    return load_model(hf_model("llama"), tokenizer=tokenizer)


def moved(model: LensModel, seed: int = 0) -> LensModel:
    other = copy_model(model)
    draw = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return other


def quantities(
    wrapped: torch.Tensor,
    clean: torch.Tensor,
    trained: torch.Tensor,
    valid: list[bool],
    wrapper: list[bool] | None = None,
) -> dict[str, list[float]]:
    """The quantities of one prompt by positions, with position numbers equal on both sides."""
    positions = torch.arange(len(valid))[None]
    matched = Matched(positions, positions, torch.tensor([valid]))
    found = _of_layer(clean, wrapped, trained, matched, torch.tensor([wrapper or [False] * len(valid)]))
    return {name: values[:, 0].tolist() for name, values in found.items()}


def test_a_shift_of_half_the_gap_closes_half_of_it() -> None:
    wrapped = torch.zeros(1, 2, 3)
    clean = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])

    found = quantities(wrapped, clean, 0.5 * clean, [True, True])  # at the last token, at the content

    assert found["gap_closed"] == [0.5, 0.5]
    assert found["cosine"] == pytest.approx([1.0, 1.0])
    assert found["distance"] == pytest.approx([0.25, 0.25])


def test_a_shift_off_the_gap_closes_nothing_but_adds_distance() -> None:
    wrapped = torch.zeros(1, 1, 3)
    clean = torch.tensor([[[2.0, 0.0, 0.0]]])
    trained = torch.tensor([[[0.0, 0.0, 4.0]]])

    found = quantities(wrapped, clean, trained, [True])

    assert [found[name][0] for name in ("gap_closed", "cosine", "distance")] == [0.0, 0.0, 5.0]  # (4 + 16) / 4


def test_tokens_are_pooled_by_their_share_of_the_gap_and_padding_counts_nothing() -> None:
    clean = torch.tensor([[[3.0], [1.0], [1.0], [9.0]]])
    trained = torch.tensor([[[3.0], [0.0], [1.0], [5.0]]])

    found = quantities(torch.zeros(1, 4, 1), clean, trained, [True, True, True, False])

    assert found["gap_closed"] == pytest.approx([1.0, 9 / 10])  # last token; (3*3 + 0*1) / (9 + 1) before it
    assert found["gap_norm"] == pytest.approx([1.0, 5**0.5])  # root of (9 + 1) / 2


def test_the_wrapper_has_a_relative_shift_and_no_gap() -> None:
    wrapped = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [1.0, 0.0]]])
    trained = torch.tensor([[[3.0, 0.0], [3.0, 5.0], [2.0, 0.0]]])

    found = quantities(wrapped, wrapped + 1, trained, [False, False, True], [True, True, False])

    relative = [found["relative"][index] for index in (0, 2)]
    ratio = [found["norm_ratio"][index] for index in (0, 2)]
    norm = [found["shift_norm"][index] for index in (0, 2)]
    assert relative == pytest.approx([1.0, (25 / 50) ** 0.5])  # last token 1/1; wrapper (16 + 9) / (25 + 25)
    assert ratio == pytest.approx([2.0, (43 / 50) ** 0.5])  # (9 + 9 + 25) / 50
    assert norm == pytest.approx([1.0, 12.5**0.5])
    assert len(found["gap_closed"]) == 2 and np.isnan(found["relative"][1])  # no content token


def test_a_gap_of_rounding_errors_is_no_gap() -> None:
    wrapped = torch.full((1, 1, 4), 1.0)

    found = quantities(wrapped, wrapped + 1e-6, wrapped + 1.0, [True])

    assert np.isnan([found[name][0] for name in ("gap_closed", "cosine", "distance")]).all()


def test_a_model_compared_with_itself_has_not_moved(model) -> None:
    shift = residual_shift(model, model, PAIRS, progress=False)

    assert np.all(shift.gap_closed == 0) and np.all(shift.distance == 1)
    assert np.all(shift.relative == 0) and np.all(shift.norm_ratio == 1)
    assert np.isnan(shift.cosine).all()
    assert shift.to_dataframe().query("quantity == 'cosine'")[["mean", "n_pairs"]].isna().sum().tolist() == [4, 0]


def test_raw_norms_come_on_request(model) -> None:
    shift = residual_shift(model, moved(model), PAIRS, progress=False)

    assert set(shift.to_dataframe()["quantity"]) == set(SHIFT_QUANTITIES)
    table = shift.to_dataframe(raw=True).query("positions == 'last' and layer == 1").set_index("quantity")["mean"]
    assert set(table.index) == {*SHIFT_QUANTITIES, *RAW_QUANTITIES}
    assert table["shift_norm"] == pytest.approx(shift.shift_norm[0, :, 1].mean())
    for pair, found in zip(PAIRS, shift.relative[0, :, 1] / shift.shift_norm[0, :, 1], strict=True):
        assert 1 / found == pytest.approx(plain_resid(model, pair.wrapped.turns[0].content)[1].norm().item(), rel=1e-3)


def test_residual_shift_matches_plain_indexing_of_one_pair(model) -> None:
    after = moved(model)
    shift = residual_shift(model, after, PAIRS, progress=False)

    for index, pair in enumerate(PAIRS):
        clean = plain_resid(model, pair.clean.turns[0].content)
        wrapped = plain_resid(model, pair.wrapped.turns[0].content)
        gap = clean - wrapped
        moved_by = plain_resid(after, pair.wrapped.turns[0].content) - wrapped
        expected = (moved_by * gap).sum(-1) / (gap * gap).sum(-1)
        np.testing.assert_allclose(shift.gap_closed[0, index], expected.numpy(), rtol=1e-3, atol=1e-4)


def plain_resid(model: LensModel, text: str) -> torch.Tensor:
    """The last token's `resid_post` at every layer, one prompt, TransformerLens's own cache."""
    ids = [0, *model.tokenizer(text, add_special_tokens=False).input_ids]
    cache = model.run_with_cache(torch.tensor([ids]))[1]
    return torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0, -1].detach() for layer in range(2)])


def test_attention_mass_matches_plain_indexing_of_one_pair(model) -> None:
    after = moved(model)
    result = attention_diff(model, after, PAIRS, progress=False)

    for index, (pair, question) in enumerate(zip(PAIRS, QUESTIONS, strict=True)):
        text = pair.wrapped.turns[0].content
        encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = len(text) - len(question)
        wrapper = [i + 1 for i, (_, end) in enumerate(encoded.offset_mapping) if end <= start]
        pattern = after.run_with_cache(torch.tensor([[0, *encoded.input_ids]]))[1]["blocks.1.attn.hook_pattern"]
        expected = pattern[0, :, -1, wrapper].sum(-1).detach().numpy()
        np.testing.assert_allclose(result.after[index, 1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("analysis", [residual_shift, attention_diff])
def test_results_do_not_depend_on_batch_mates(model, analysis) -> None:
    after = moved(model)

    together = analysis(model, after, PAIRS, progress=False)
    alone = [analysis(model, after, [pair], progress=False) for pair in PAIRS]

    for name, axis in (
        (("gap_closed", 1), ("distance", 1), ("relative", 1)) if analysis is residual_shift else (("after", 0),)
    ):
        joined = np.concatenate([getattr(result, name) for result in alone], axis=axis)
        np.testing.assert_allclose(getattr(together, name), joined, rtol=1e-3, atol=1e-5)


def test_results_survive_saving(model, tmp_path) -> None:
    after = moved(model)
    for kind, result in (
        (ResidualShift, residual_shift(model, after, PAIRS, progress=False)),
        (AttentionDiff, attention_diff(model, after, PAIRS, progress=False)),
    ):
        result.save(tmp_path / "result.safetensors")
        again = kind.load(tmp_path / "result.safetensors")
        assert again.to_dataframe().equals(result.to_dataframe())


def test_a_result_of_another_kind_or_a_missing_file_is_refused(tmp_path) -> None:
    AttentionDiff(np.zeros((2, 16, 1, 1, 1))).save(tmp_path / "a.safetensors")

    with pytest.raises(CtlensError, match="holds a AttentionDiff, not a ResidualShift"):
        ResidualShift.load(tmp_path / "a.safetensors")
    with pytest.raises(CtlensError, match="does not exist"):
        ResidualShift.load(tmp_path / "b.safetensors")


def test_a_result_that_lacks_a_field_is_refused_with_what_to_do(model, tmp_path) -> None:
    path = tmp_path / "shift.safetensors"
    residual_shift(model, model, PAIRS, progress=False).save(path)
    with safe_open(path, framework="numpy") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys() if name != "cosine"}  # noqa: SIM118
        metadata = stored.metadata()
    save_file(arrays, path, metadata)

    with pytest.raises(CtlensError, match="another version of ctlens, whose ResidualShift had no 'cosine': compute it"):
        ResidualShift.load(path)


def test_figures_hold_the_numbers_of_the_table(model) -> None:
    after = moved(model)
    shift = residual_shift(model, after, PAIRS, progress=False)
    attention = attention_diff(model, after, PAIRS, progress=False)

    lines = [np.asarray(trace.y, dtype=float) for trace in shift.figure("distance", "content").data]
    panels = [np.asarray(trace.z, dtype=float) for trace in attention.figure().data]

    mean = shift.curve("distance", "content")[0]
    assert any(line.shape == mean.shape and np.allclose(line, mean) for line in lines)
    assert any(np.allclose(panel, attention.before.mean(0)) for panel in panels)


def test_a_comparison_draws_this_result_first_under_its_label(model) -> None:
    still = residual_shift(model, model, PAIRS, progress=False)
    shift = residual_shift(model, moved(model), PAIRS, progress=False)

    drawn = shift.compare({"still": still}, label="moved", quantity="distance", positions="content")
    again = shift.compare({"still": still, "moved": shift}, label="moved", quantity="distance", positions="content")

    names = [trace.name for trace in drawn.data if trace.name]
    assert names == ["moved", "still"] and drawn.to_json() == again.to_json()
    with pytest.raises(CtlensError, match="two results are called 'moved': give every result a label of its own"):
        shift.compare({"moved": still}, label="moved")


def test_what_does_not_compare_is_refused(model) -> None:
    tokenizer = byte_level_tokenizer()
    other = build(ModelConfig(d_vocab=400, n_layers=1, n_heads=2, d_model=16, d_mlp=16), tokenizer)
    training = copy_model(model).train()
    elsewhere = [Pair(prompt("Is it right?"), prompt("Quite another text."))]

    for before, after, pairs, message in (
        (model, other, PAIRS, "n_layers is 2 before and 1 after"),
        (model, training, PAIRS, "eval mode"),
        (model, model, [*PAIRS, Pair(prompt("x"), prompt("y"))], "1 of 4 pairs do not align"),
        (model, model, elsewhere, "none of the 1 pairs aligns"),
    ):
        for analysis in (residual_shift, attention_diff):
            with pytest.raises(CtlensError, match=message):
                analysis(before, after, pairs, progress=False)
    with pytest.raises(CtlensError, match="did you mean 'distance'"):
        residual_shift(model, model, PAIRS, progress=False).curve("distanc")
    with pytest.raises(CtlensError, match="positions for gap_closed"):
        residual_shift(model, model, PAIRS, progress=False).curve("gap_closed", "wrapper")


def test_equal_results_are_equal_files(tmp_path) -> None:
    arrays = {name: np.ones((2, 3, 4)) for name in ("gap_closed", "cosine", "distance", "gap_norm")}
    arrays |= {name: np.ones((3, 3, 4)) for name in ("relative", "norm_ratio", "shift_norm")}

    for number in range(8):  # the entries of a file's metadata come in an order drawn by chance
        ResidualShift(**arrays, site="resid_post", window="shared").save(tmp_path / f"{number}.safetensors")

    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
