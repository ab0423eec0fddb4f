"""Models that are split among processes hold the same weights, and analyses find the same in them as in whole ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model, random_model
from helpers.processes import together
from helpers.sharded_models import REFUSED, logits, numbers

import ctlens as ct
from ctlens.core.types import LensModel
from ctlens.models.loading import load_model
from ctlens.models.parameters import present_weights

pytestmark = [pytest.mark.processes, pytest.mark.slow]

READ = ("llama", "qwen3", "gemma2", "olmo2")
FUSED = ("gpt2", "phi3")
TIED = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("models")
    models = {kind: hf_model(kind) for kind in (*READ, *FUSED)}
    models["tied"] = random_model("llama", **TIED, tie_word_embeddings=True)
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="20KB")
        byte_level_tokenizer(chat=True).save_pretrained(folder / name)
    done = together(2, "helpers.sharded_models", str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("kind", [*READ, "tied"])
def test_a_model_read_slice_by_slice_is_the_one_in_the_folder(found: tuple[Path, dict], kind: str) -> None:
    folder, by_kind = found
    model = load_model(folder / kind)

    weights = present_weights(model)
    assert by_kind[kind].keys() == {"logits", *weights}
    assert all(by_kind[kind][name] == value.flatten().tolist() for name, value in weights.items())
    torch.testing.assert_close(torch.tensor(by_kind[kind]["logits"]), torch.tensor(logits(model)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FUSED)
def test_fused_matrices_cannot_be_read_slice_by_slice(found: tuple[Path, dict], kind: str) -> None:
    assert "so they cannot be read slice by slice" in found[1][kind]["refused"]


@pytest.fixture(scope="module")
def whole() -> dict[str, list[float]]:
    organism: LensModel = ct.load_organism()
    return numbers(organism)


def test_analyses_of_a_sharded_model_find_what_they_find_in_a_whole_one(
    found: tuple[Path, dict], whole: dict[str, list[float]]
) -> None:
    sharded = found[1]["analyses"]
    assert sharded.keys() == whole.keys() and all(whole.values())
    for name, values in whole.items():
        assert sharded[name] == pytest.approx(values, abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_takes_the_weights_themselves_is_refused(found: tuple[Path, dict], what: str) -> None:
    assert "takes the weights by themselves, which are split among processes" in found[1][what]
