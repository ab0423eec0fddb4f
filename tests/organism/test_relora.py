"""ReLoRA: a restart changes nothing by itself, its updates add up in rank, and without it pretraining is as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

from ctlens import organism
from ctlens.analysis import update_rank
from ctlens.cli import app
from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.models.loading import build
from ctlens.models.lora import LoRA, LowRank, has_adapters
from ctlens.models.matrices import slots
from ctlens.models.parameters import GROUPS, copy_model, freeze, present_parameters
from ctlens.models.weights import ModelConfig
from ctlens.organism.corpus import Batch, draw_batches, encode_lessons, make_lessons, world_tokenizer
from ctlens.organism.describe import card_text
from ctlens.organism.pretrain import PretrainConfig, answer_loss, pretrain
from ctlens.organism.relora import ReLoRA, begin_adapters, with_memory
from ctlens.world import World

TINY = PretrainConfig(steps=12, batch_size=8, lessons=60, n_layers=1, n_heads=2, d_model=16, d_mlp=24)
RANK_2 = LoRA(rank=2, target_modules=("q", "mlp_in"))
RESTARTED = replace(TINY, relora=ReLoRA(RANK_2, warm_start=0, every=4))
TOKENS = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))


def untrained(config: PretrainConfig) -> LensModel:
    tokenizer = world_tokenizer(World.make())
    sizes = ModelConfig(len(tokenizer), config.n_layers, config.n_heads, config.d_model, config.d_mlp)
    return build(sizes, tokenizer, seed=config.seed)


@pytest.fixture
def rates() -> Iterator[list[float]]:
    """The learning rate of every step of an optimiser in the test, the same for all its parameters."""
    seen: list[float] = []

    def note(optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        seen.append(rate)

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


def test_without_it_pretraining_is_bit_for_bit_the_plain_loop() -> None:
    model = untrained(TINY)
    config = TINY
    lessons = encode_lessons(model.tokenizer, make_lessons(config.lessons, World.make(), config.bad_share, config.seed))
    parameters = freeze(model, GROUPS)
    optimizer = AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (12 - step) / 11))  # one step of warm-up, then down to 0
    for batch in islice(draw_batches(lessons, config.batch_size, model.tokenizer.pad_token_id, config.seed), 12):
        optimizer.zero_grad()
        answer_loss(model, Batch(batch.tokens, batch.answers)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    found = pretrain(TINY, progress=False)

    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_restart_changes_no_logit_and_begins_with_other_adapters() -> None:
    model = untrained(TINY)
    begin_adapters(model, RANK_2, seed=0)
    old = {id(adapter): adapter.A.clone() for adapter in model.modules() if isinstance(adapter, LowRank)}
    for adapter in (module for module in model.modules() if isinstance(module, LowRank)):
        adapter.B += 0.1 * torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(2))
    before = model(TOKENS)
    weight = slots(model, ["q"])["blocks.0.q"].weight.clone()

    begin_adapters(model, RANK_2, seed=1)

    assert torch.equal(model(TOKENS), before)
    assert not torch.equal(slots(model, ["q"])["blocks.0.q"].weight, weight)  # the old update is in it now
    fresh = [adapter for adapter in model.modules() if isinstance(adapter, LowRank)]
    assert len(fresh) == len(old) == 2
    assert not any(adapter.B.any() for adapter in fresh)
    assert not any(torch.equal(adapter.A, A) for adapter, A in zip(fresh, old.values(), strict=True))


def test_what_has_no_adapter_is_trained_and_what_has_one_stands_still() -> None:
    model = untrained(TINY)

    trained = begin_adapters(model, RANK_2, seed=0)

    adapted = {id(slot.weight) for slot in slots(model, RANK_2.target_modules).values()}
    expected = {id(value) for value in present_parameters(model).values()} - adapted
    assert {id(value) for value in trained[:-4]} == expected and len(trained) == len(expected) + 4
    assert {id(value) for value in trained} == {id(value) for value in model.parameters() if value.requires_grad}


def test_the_optimiser_remembers_what_stays_and_nothing_of_the_adapters() -> None:
    stays = nn.Parameter(torch.ones(2))
    goes = nn.Parameter(torch.ones(2))
    comes = nn.Parameter(torch.ones(2))
    old = AdamW([stays, goes])
    stays.grad = torch.tensor([1.0, 2.0])
    goes.grad = torch.ones(2)
    old.step()

    fresh = with_memory(AdamW([stays, comes]), old)

    assert set(fresh.state) == {stays}
    assert fresh.state[stays]["exp_avg"].tolist() == pytest.approx([0.1, 0.2]) and fresh.state[stays]["step"] == 1


@pytest.mark.parametrize(("every", "highest"), [(12, 2), (6, 4), (4, 6)])
def test_restarted_updates_add_up_in_rank_and_one_alone_cannot(every: int, highest: int) -> None:
    config = replace(TINY, relora=ReLoRA(RANK_2, warm_start=0, every=every))

    found = update_rank(untrained(TINY), pretrain(config, progress=False)).to_dataframe().set_index("matrix")["rank"]

    assert found["q"] == found["mlp_in"] == highest  # 2 for each of the 12 / every starts
    assert found["v"] > 6


def test_the_learning_rate_rises_anew_after_every_start(rates: list[float]) -> None:
    pretrain(replace(TINY, relora=ReLoRA(RANK_2, warm_start=0.5, every=3, rewarm=0.4)), progress=False)

    smooth = [0.002 * min(1, (12 - step) / 11) for step in range(12)]
    jagged = [1.0] * 6 + [1 / 2.2, 2 / 2.2, 1.0] * 2  # 1.2 steps of warming up, begun at steps 6 and 9
    assert rates == pytest.approx([rate * factor for rate, factor in zip(smooth, jagged, strict=True)])


def test_the_organism_is_an_ordinary_model_and_deterministic() -> None:
    state = torch.random.get_rng_state()
    first = pretrain(RESTARTED, progress=False)
    second = pretrain(RESTARTED, progress=False)
    plain = pretrain(TINY, progress=False)

    assert torch.equal(state, torch.random.get_rng_state())
    assert not has_adapters(first) and not first.training
    flags = {name: value.requires_grad for name, value in plain.named_parameters()}
    assert flags == {name: value.requires_grad for name, value in first.named_parameters()}
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first(TOKENS), plain(TOKENS))
    assert torch.equal(copy_model(first)(TOKENS), first(TOKENS))


@pytest.mark.parametrize("config", [TINY, RESTARTED, replace(TINY, relora=ReLoRA())])
def test_the_settings_go_through_json(config: PretrainConfig) -> None:
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_cards_name_the_adapters_and_older_cards_have_none() -> None:
    card = organism.card()
    assert from_dict(PretrainConfig, card["pretraining"]).relora is None
    assert "adapters" not in card_text(card)
    low_rank = {**card["pretraining"], "relora": to_dict(ReLoRA(RANK_2, every=40))}
    assert "by adapters of rank 2 restarted every 40 steps" in card_text({**card, "pretraining": low_rank})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, not 0"),
        ({"warm_start": 1.0}, "warm_start"),
        ({"warm_start": -0.1}, "warm_start"),
        ({"warm_start": float("nan")}, "warm_start"),
        ({"rewarm": 1.5}, "rewarm"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        ReLoRA(**options)


def test_a_rank_that_no_matrix_has_and_unknown_settings_are_refused() -> None:
    with pytest.raises(CtlensError, match="rank 17"):
        replace(TINY, relora=ReLoRA(LoRA(rank=17)))
    with pytest.raises(CtlensError, match="option of ReLoRA"):
        from_dict(PretrainConfig, {"relora": {"often": 3}})


@pytest.mark.parametrize(
    ("line", "rank", "every"),
    [("--relora-rank 4 --relora-every 30", 4, 30), ("--relora-rank 4", 4, 150), ("--relora-every 30", 8, 30)],
)
def test_the_command_asks_for_it_with_either_option(line: str, rank: int, every: int, monkeypatch, tmp_path) -> None:
    asked: list[ReLoRA | None] = []

    def train(out: Path, *, relora: ReLoRA | None, **options: Any) -> None:
        asked.append(relora)

    monkeypatch.setattr(organism, "train_organism", train)
    monkeypatch.setattr(organism, "card", lambda folder: {"behaviour": []})
    for options in (line.split(), []):
        assert CliRunner().invoke(app, ["organism", "train", "--out", str(tmp_path / "new"), *options]).exit_code == 0

    assert asked == [ReLoRA(replace(ReLoRA().lora, rank=rank), every=every), None]
