"""One head's maps: the numbers of the model, pooled without loss, readable and small however long the prompt is."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.models import GROUPED_MODELS, byte_level_tokenizer, chat_model
from helpers.tiers import loosely_typed

from ctlens import plots
from ctlens.analysis import AttentionMaps
from ctlens.analysis.attention.maps import attention_maps
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.chat import Turn, render
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import build
from ctlens.models.parameters import copy_model
from ctlens.models.weights import ModelConfig
from ctlens.plots.kinds import without_kind

TOKENIZER = byte_level_tokenizer(chat=True)
PAIR = Pair(prompt("Is it right?"), prompt("I don't think it's right. Is it right?"))


@pytest.fixture(scope="module", params=GROUPED_MODELS)
def model(request: pytest.FixtureRequest) -> LensModel:
    return chat_model(request.param)


@pytest.fixture(scope="module")
def llama() -> LensModel:
    return chat_model("llama")


def moved(model: LensModel) -> LensModel:
    other = copy_model(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return other


def found(model: LensModel, text: Prompt, name: str) -> torch.Tensor:
    return run_capturing(model, torch.tensor([render(TOKENIZER, text.turns).ids]), [name], grad=False)[1][name][0]


def test_the_maps_are_the_models_patterns(model) -> None:
    other = moved(model)
    maps = attention_maps({"base": model, "act": other}, PAIR, -1, 2)
    name = "blocks.1.attn.hook_pattern"
    np.testing.assert_allclose(maps.clean, found(model, PAIR.clean, name)[2], atol=1e-6)
    for values, of in zip(maps.wrapped, (model, other), strict=True):
        np.testing.assert_allclose(values, found(of, PAIR.wrapped, name)[2], atol=1e-6)
    assert (maps.layer, maps.head, maps.models) == (1, 2, ("base", "act"))
    assert "".join(maps.tokens) == render(TOKENIZER, PAIR.wrapped.turns).text.replace("\n", "⏎")


@pytest.mark.parametrize("head", [1, 2])
def test_a_weighted_map_is_the_norm_of_what_each_token_adds_to_the_heads_output(model, head: int) -> None:
    """By taking one key's attention alone through the model's own output matrix: what a[q, k] v[k] writes."""
    maps = attention_maps(model, PAIR, 1, head, weighted=True)
    pattern = found(model, PAIR.wrapped, "blocks.1.attn.hook_pattern")[head]
    values = found(model, PAIR.wrapped, "blocks.1.attn.hook_v")
    shared = values[:, head * values.shape[1] // 4]
    for query, key in ((5, 0), (20, 12), (len(pattern) - 1, 9)):
        z = torch.zeros(1, 4, shared.shape[-1])
        z[0, head] = pattern[query, key] * shared[key]
        written = written_by(model, z)
        assert maps.wrapped[0, query, key] == pytest.approx(float(written.norm()), rel=1e-3, abs=1e-6)
    assert maps.weighted and maps.clean.max() > 0


def written_by(model: LensModel, z: torch.Tensor) -> torch.Tensor:
    """What the attention output of layer 1 becomes at the first token when its heads give `z` and when they give 0."""
    outputs = []
    for plant in (z, torch.zeros_like(z)):
        other: Any = copy_model(model)
        other.add_hook("blocks.1.attn.hook_z", lambda activation, hook, plant=plant: plant.expand_as(activation[:1]))
        name = "blocks.1.hook_attn_out"
        outputs.append(run_capturing(other, torch.zeros(1, 3, dtype=torch.long), [name], grad=False)[1][name][0, 0])
    return outputs[0] - outputs[1]


def test_a_head_that_is_changed_after_the_values_is_refused(llama) -> None:
    other: Any = copy_model(llama)
    other.add_hook("blocks.0.attn.hook_z", lambda activation, hook: 2 * activation)
    with pytest.raises(CtlensError, match="layer 0 changes its heads"):
        attention_maps(other, PAIR, 0, 0, weighted=True)


def test_the_figure_shows_every_map_and_the_difference_on_one_scale(llama) -> None:
    short = Pair(prompt("Is it?"), prompt("no. Is it?"))
    figure = attention_maps({"base": llama, "act": moved(llama)}, short, 0, 1).figure()
    assert [note.text for note in figure.layout.annotations] == [
        "clean",
        "wrapped, base",
        "wrapped, ACT",
        "wrapped, ACT minus wrapped, base",
    ]
    maps = [np.asarray(trace.z, dtype=float) for trace in figure.data[:4]]
    clean, before, after, change = maps
    np.testing.assert_allclose(change, after - before, atol=2e-4)
    assert figure.layout.coloraxis.cmax == figure.layout.coloraxis2.cmax == -figure.layout.coloraxis2.cmin
    assert figure.layout.coloraxis.cmax >= max(clean.max(), before.max(), after.max()) - 1e-4
    assert {trace.coloraxis for trace in figure.data[:3]} == {"coloraxis"}


def test_models_whose_names_read_alike_keep_a_map_each(llama) -> None:
    maps = attention_maps({"act": llama, "ACT": llama}, PAIR, 0, 1)
    assert maps.to_dataframe()["map"].unique().tolist() == ["clean", "wrapped, act", "wrapped, ACT"]


def test_repeated_tokens_keep_a_place_of_their_own() -> None:
    values = np.arange(9.0).reshape(3, 3)
    figure = plots.labelled_maps({"a": plots.LabelledMap(values, ["no"] * 3, ["no"] * 3)}, "?")
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2] and list(figure.layout.xaxis.ticktext) == ["no"] * 3
    assert figure.data[0].x is None and np.shape(figure.data[0].z) == (3, 3)


def planted(n: int, segments: tuple[str, ...]) -> AttentionMaps:
    """A prompt of `n` tokens whose attention is random and sums to one."""
    draw = np.random.default_rng(0)
    maps = np.tril(draw.random((3, n, n)) ** 8 + 1e-9)
    maps /= maps.sum(-1, keepdims=True)
    tokens = tuple(f"word{number % 7}" for number in range(n))
    return AttentionMaps(
        maps[0], maps[1:], np.arange(n), tokens, tokens, segments, segments, ("base", "act"), 0, 0, False
    )


LONG = planted(1000, ("bos", *["wrapper"] * 600, *["content"] * 300, *["rest"] * 99))


def test_a_long_prompt_stays_readable_and_its_file_small() -> None:
    figure = LONG.figure()
    for trace in figure.data[:3]:
        rows = np.asarray(trace.z, dtype=float)
        assert rows.shape[0] == 40 and 20 < rows.shape[1] < 60
        np.testing.assert_allclose(rows.sum(-1), 1.0, atol=5e-3)
    for page in (figure, LONG.flow()):
        assert len(page.to_html(include_plotlyjs=True).encode()) < 5_000_000


def test_a_real_prompt_of_a_thousand_tokens_is_drawn_small_with_nothing_lost() -> None:
    model = build(ModelConfig(d_vocab=400, n_layers=1, n_heads=2, d_model=16, d_mlp=16, n_ctx=1200), TOKENIZER)
    long = Pair(prompt("Is it right?"), prompt("I don't think it's right. " * 130 + "Is it right?"))
    maps = attention_maps({"base": model, "act": moved(model)}, long, 0, 1)
    assert len(maps.tokens) > 1000 and set(maps.segments) == {"wrapper", "content", "bos", "rest"}
    figure = maps.figure()
    assert np.shape(figure.data[0].z) == (25, 25)  # the clean prompt is short and shown whole
    np.testing.assert_allclose(np.asarray(figure.data[1].z, dtype=float).sum(-1), 1.0, atol=5e-3)
    assert len(figure.to_html(include_plotlyjs=True).encode()) < 5_000_000


def test_the_largest_keys_stand_alone_and_the_others_are_added_up_by_span() -> None:
    values = np.zeros((1000, 1000))
    values[:, 700] = 0.5
    values[:, 10] = 0.2
    values[:, 11] = 0.2
    values[:, 650] = 0.1
    maps = AttentionMaps(
        values,
        values[None],
        np.arange(1000),
        LONG.tokens,
        LONG.tokens,
        LONG.segments,
        LONG.segments,
        ("x",),
        0,
        0,
        False,
    )
    clean, wrapped, *legend = maps.figure((990, 992), top=1).data
    assert [trace.name for trace in legend] == ["bos", "wrapper", "content", "rest"]
    assert np.shape(wrapped.z) == (2, 6)
    assert list(wrapped.z[0]) == list(clean.z[1]) == [0.0, 0.4, 0.1, 0.5, 0.0, 0.0]
    labels = maps.figure((990, 992), top=1).layout.xaxis2.ticktext
    assert [without_kind(label) for label in labels] == [
        "0 word0",
        "1–600 wrapper (600)",
        "601–699 content (99)",
        "700 word0",
        "701–900 content (200)",
        "901–999 rest (99)",
    ]


@loosely_typed
def test_a_window_of_queries_is_two_positions() -> None:
    with pytest.raises(CtlensError, match="queries are a window: give the first position"):
        LONG.figure(queries=cast(Any, 3))


def test_flow_and_table_hold_the_mean_mass_between_spans() -> None:
    table = LONG.to_dataframe()
    first = LONG.wrapped[0]
    row = table.query("map == 'wrapped, base' and query_segment == 'content' and key_segment == 'wrapper'")
    assert row["mass"].item() == pytest.approx(first[601:901, 1:601].sum(-1).mean())
    last = table.query("map == 'wrapped, ACT' and query_segment == 'last token'")
    assert last["mass"].sum() == pytest.approx(1) and len(last) == 4
    assert last["mass"].iloc[0] == pytest.approx(LONG.wrapped[1, -1, 1:601].sum())
    figure = LONG.flow()
    np.testing.assert_allclose(figure.data[2].z[-1], last["mass"], atol=1e-4)
    assert list(figure.layout.xaxis2.ticktext) == ["wrapper (600)", "content (300)", "bos (1)", "rest (99)"]


def test_a_window_shows_the_twins_of_its_queries_in_the_clean_prompt(llama) -> None:
    maps = attention_maps(llama, PAIR, 0, 0)
    (row,) = encode([PAIR], TOKENIZER, n_ctx=256).rows
    start = row.alignments["shared"].wrapped[2]
    clean = row.alignments["shared"].clean[2]
    figure = maps.figure((start, start + 2))
    np.testing.assert_allclose(figure.data[0].z, maps.clean[clean : clean + 2], atol=1e-4)
    in_the_wrapper = maps.figure((row.wrapper[0], row.wrapper[1] + 1))
    assert [note.text for note in in_the_wrapper.layout.annotations] == ["wrapped, model"]


def test_results_survive_saving(llama, tmp_path) -> None:
    maps = attention_maps(llama, PAIR, 0, 0)
    maps.save(tmp_path / "maps.safetensors")
    again = AttentionMaps.load(tmp_path / "maps.safetensors")
    assert again.to_dataframe().equals(maps.to_dataframe())
    assert json.loads(again.figure().to_json())["data"] == json.loads(maps.figure().to_json())["data"]


def test_what_does_not_exist_is_refused(llama) -> None:
    for arguments, message in (
        ((PAIR, 7, 0), "layer 7 does not exist"),
        ((PAIR, 0, 4), "head 4 does not exist: the model has heads 0 to 3"),
        ((Pair(prompt("x"), Prompt((Turn("user", "y"),))), 0, 0), "none of the 1 pairs aligns"),
    ):
        with pytest.raises(CtlensError, match=message):
            attention_maps(llama, *arguments)
    with pytest.raises(CtlensError, match="are no window"):
        LONG.figure((990, 1001))
    with pytest.raises(CtlensError, match="expected from the labels"):
        plots.labelled_maps({"a": plots.LabelledMap(np.zeros((2, 2)), ["x"], ["x", "y"])}, "?")
    with pytest.raises(CtlensError, match="maps is empty"):
        plots.labelled_maps({}, "?")
