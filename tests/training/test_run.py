"""A run is read back before its folder gets its name: what would not come back is refused, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import chat_model

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.losses import ACT
from ctlens.models import loading
from ctlens.models.lora import LoRA
from ctlens.models.parameters import present_parameters
from ctlens.threats import get
from ctlens.training import Run, TrainConfig, load_run, train

pytestmark = pytest.mark.boundary


def trained(kind: str, **settings: Any) -> Run:
    config = TrainConfig(steps=1, batch_size=2, **settings)
    return train(chat_model(kind), get("sycophancy").pairs(2), ACT(), config=config, progress=False)


@pytest.mark.parametrize("kind", ["made here", "gpt2"])
@torch.no_grad()
def test_a_run_with_adapters_comes_back_merged(kind: str, tmp_path: Path) -> None:
    run = trained(kind, trainable=LoRA(2))
    run.save(tmp_path / "run")
    tokens = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(load_run(tmp_path / "run").model(tokens), run.model(tokens), atol=1e-6, rtol=0)


def scaled_scores(model: Any) -> None:
    """What no configuration says: the model goes on to compute something else than its folder does."""
    model.original_model.model.layers[1].self_attn.scaling *= 3


def turned_faster(model: Any) -> None:
    model.original_model.model.rotary_emb.inv_freq.mul_(2)


def other_norm(model: Any) -> None:
    model.original_model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize("change", [scaled_scores, turned_faster, other_norm])
def test_a_model_that_was_changed_beside_its_weights_is_not_saved(change: Any, tmp_path: Path) -> None:
    run = trained("llama")
    run.save(tmp_path / "before")
    change(run.model)
    with pytest.raises(CtlensError, match=r"would not come back from its folder as it is, which changes its logits"):
        run.save(tmp_path / "after")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("kind", ["made here", "llama"])
def test_a_weight_that_is_lost_on_the_way_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(kind)
    write = loading.save_model

    def forgetful(model: LensModel, folder: Path) -> None:
        name, weight = next(iter(present_parameters(model).items()))
        kept = weight.detach().clone()
        weight.data[0, 0] += 1
        write(model, folder)
        weight.data.copy_(kept)

    monkeypatch.setattr("ctlens.training.run.save_model", forgetful)
    with pytest.raises(CtlensError, match=next(iter(present_parameters(run.model)))):
        run.save(tmp_path / "run")
    assert not any(tmp_path.iterdir())
