"""A training in less memory is the same training: layer by layer, with blocks run again, with targets on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Call, byte_level_tokenizer, chat_model, hf_model
from helpers.tiers import unit_first, unit_first_rows
from torch import Tensor

from ctlens import losses
from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.inputs import save_pairs
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, DPO, F2C, KLCT, MLPCT, OPCT, RMCT, AttCT, AttMass, AttOut, Loss, SubACT
from ctlens.models.counting import Counting
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA
from ctlens.models.parameters import present_weights
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.layerwise import blocks_again

QUESTIONS = ("Is it right?", "When a creature experiences feeling, what?", "Please answer.", "Which term is it?")
PAIRS = [
    Pair(prompt(q, "yes", "no"), prompt(f"{hint} {q}", "yes", "no"), target="(A) isolated cases")
    for q in QUESTIONS
    for hint in ("I don't think it's right.", "I may be in the minority here, but:")
]
CONFIG = TrainConfig(steps=2, batch_size=4, lr=2e-3, max_new_tokens=4, retention=0.0)
EVERY: list[Loss] = [
    ACT(),
    ACT(site="resid_mid"),
    ACT(final_norm=True),
    ACT(clean="own"),
    ACT(gap=True),
    MLPCT(),
    AttCT(),
    AttCT(keys="lifted"),
    AttCT(heads="mean"),
    AttCT(distance="mse", keys="rest"),
    AttOut(),
    AttMass(),
    AttMass(per_key=True),
    BCT(),
    BCT(targets="soft"),
    KLCT(),
    F2C(),
    RMCT(),
    OPCT(),
    DPO(),
    SubACT(rank=2),
    SubACT(rank=2, part="rest"),
]
KINDS = ("made here", "llama", "gpt2")


MODELS = {kind: chat_model(kind) for kind in KINDS}


@pytest.fixture(params=unit_first(KINDS))
def model(request: pytest.FixtureRequest) -> LensModel:
    return MODELS[request.param]


@pytest.fixture
def llama() -> LensModel:
    return MODELS["llama"]


def weights(model: LensModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in present_weights(model).items()}


def change(run: Any, reference: LensModel) -> Tensor:
    before = present_weights(reference)
    return torch.cat([(value - before[name]).flatten() for name, value in present_weights(run.model).items()])


FEW = (ACT(), AttCT(), MLPCT(), BCT())
TRIED = [("llama", loss, "blocks") for loss in EVERY] + [
    (kind, loss, memory)
    for kind in ("made here", "gpt2")
    for loss, memory in zip(FEW, ("layers", "blocks") * 2, strict=True)
]


@pytest.mark.parametrize(("kind", "loss", "memory"), unit_first_rows(TRIED, 6), ids=lambda value: str(value)[:50])
def test_every_loss_trains_the_same_in_less_memory(kind: str, loss: Loss, memory: str) -> None:
    model = MODELS[kind]
    track = [] if loss.name == "klct" else [KLCT()]
    expected = train(model, PAIRS, loss, config=CONFIG, track=track, progress=False)
    config = replace(CONFIG, memory=memory)
    found = train(model, PAIRS, loss, config=config, track=track, progress=False)

    name = loss.name
    assert found.history.series(name)[0] == pytest.approx(expected.history.series(name)[0], rel=1e-5, abs=1e-9)
    assert found.history.series(name) == pytest.approx(expected.history.series(name), rel=2e-3, abs=1e-6)
    assert found.history.by_hook(name).keys() == expected.history.by_hook(name).keys()
    here, there = change(found, model), change(expected, model)
    assert (here - there).norm() <= 0.02 * there.norm()
    if name != "rmct":  # a random model's sampled answers are never judged bad
        assert there.norm() > 0


@pytest.mark.parametrize("memory", ["layers", "blocks"])
def test_several_losses_adapters_parts_and_tracked_ones_go_together(llama: LensModel, memory: str) -> None:
    config = replace(CONFIG, trainable=LoRA(2), accumulate=2, calibrate=1.0, retention=1.0)
    several = [ACT(), AttCT(), BCT()]
    runs = [
        train(llama, PAIRS, several, config=replace(config, memory=way), track=[MLPCT()], progress=False)
        for way in ("all", memory)
    ]
    for name in ("act", "attct", "bct", "tracked/mlpct"):
        assert runs[1].history.series(name) == pytest.approx(runs[0].history.series(name), rel=1e-3)
    assert runs[1].calibration.gradient_norms == pytest.approx(runs[0].calibration.gradient_norms, rel=1e-3)


def test_a_tracked_loss_of_the_same_name_is_kept_apart(llama: LensModel) -> None:
    runs = [
        train(llama, PAIRS, ACT(), config=replace(CONFIG, memory=way), track=[ACT(site="resid_mid")], progress=False)
        for way in ("all", "layers")
    ]
    for name in ("act", "tracked/act"):
        assert runs[1].history.series(name) == pytest.approx(runs[0].history.series(name), rel=1e-3)
        assert runs[1].history.by_hook(name).keys() == runs[0].history.by_hook(name).keys()


@pytest.mark.parametrize("memory", ["layers", "blocks"])
def test_the_other_passes_of_a_step_are_left_alone(llama: LensModel, memory: str) -> None:
    # The model's own clean side, its sampled answers and the held prompts go through the same hooks and blocks.
    mixed = [AttCT(), KLCT(clean="own"), RMCT(), MLPCT(clean="own")]
    config = replace(CONFIG, retention=1.0)
    runs = [
        train(llama, PAIRS, mixed, config=replace(config, memory=way), track=[ACT(clean="own")], progress=False)
        for way in ("all", memory)
    ]
    for name in ("attct", "klct", "rmct", "mlpct", "tracked/act", "retention"):
        assert runs[1].history.series(name) == pytest.approx(runs[0].history.series(name), rel=1e-3, abs=1e-7)


@pytest.mark.boundary
def test_the_gradient_of_one_step_is_that_of_all_at_once(model: LensModel) -> None:
    gradients = []
    for memory in ("all", "layers", "blocks"):
        trainer = Trainer(model, PAIRS, [AttCT(), MLPCT(), ACT()], replace(CONFIG, memory=memory, retention=0.0))
        next(trainer)
        gradients.append([value.grad for value in trainer.parameters])
    for other in gradients[1:]:
        for here, there in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_less_is_held_and_with_targets_on_disk_no_more_for_more_layers(tmp_path: Path) -> None:
    long = " ".join(QUESTIONS * 3)
    pairs = [Pair(prompt(long), prompt("I don't think it's right. " + long))]

    def peak(n_layers: int, memory: str, loss: Loss | None) -> int:
        lens = chat_model("llama") if n_layers == 2 else deeper(n_layers)
        config = TrainConfig(steps=1, batch_size=1, memory=memory, retention=0.0)
        trainer = Trainer(lens, pairs, [loss or KLCT(window="last")], config, cache_folder=tmp_path)
        next(trainer)  # the targets are there
        trainer.config = replace(config, steps=2)
        (term,) = trainer._terms.values()
        with Counting() as live, trainer._passes.open() as forwards:
            seen = forwards.seen([0], trainer._terms, step=2, grad=True)
            term.loss.compute(seen[term.loss.name], term.factors).total.backward()
        return live.peak

    bare = {n: peak(n, "all", None) for n in (2, 5)}
    all_at_once = {n: peak(n, "all", AttCT()) for n in (2, 5)}
    layers = {n: peak(n, "layers", AttCT()) for n in (2, 5)}
    blocks = {n: peak(n, "blocks", AttCT()) for n in (2, 5)}
    assert layers[5] < all_at_once[5] and blocks[5] < layers[5]
    assert layers[5] <= 1.5 * bare[5] < all_at_once[5]
    per_layer = (bare[5] - bare[2]) / 3
    assert abs((layers[5] - bare[5]) - (layers[2] - bare[2])) < 0.05 * per_layer
    assert blocks[5] - blocks[2] < 3 * 0.2 * per_layer


def deeper(n_layers: int) -> LensModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=n_layers, vocab_size=400, max_position_embeddings=256)
    return load_model(LlamaForCausalLM(config), tokenizer=byte_level_tokenizer(chat=True))


@pytest.mark.boundary
def test_blocks_are_themselves_again_afterwards_whatever_happens(model: LensModel) -> None:
    lens: Any = model
    tokens = torch.arange(1, 9)[None]
    before = lens(tokens)
    with pytest.raises(ZeroDivisionError), blocks_again(model):
        assert torch.equal(lens(tokens), before)
        raise ZeroDivisionError
    assert all("forward" not in vars(block) for block in lens.blocks)
    assert torch.equal(lens(tokens), before)


def test_hooks_of_a_step_are_gone_after_it_and_after_an_error(
    llama: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(llama, PAIRS, AttCT(), replace(CONFIG, memory="blocks"))
    next(trainer)
    monkeypatch.setattr(AttCT, "row_values", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(trainer)
    assert not any(point.fwd_hooks for point in trainer.model.hook_dict.values())
    assert all("forward" not in vars(block) for block in trainer.model.blocks)  # type: ignore[attr-defined]


KEPT = [ACT(), MLPCT(), AttCT(), AttCT(keys="lifted"), KLCT(), BCT(targets="soft")]


@pytest.mark.parametrize("memory", ["all", "layers"])
@pytest.mark.parametrize("loss", unit_first(KEPT), ids=lambda loss: str(loss)[:40])
def test_targets_on_disk_are_those_in_memory_and_are_read_by_the_next_training(
    llama: LensModel, tmp_path: Path, loss: Loss, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, memory=memory)
    expected = train(llama, PAIRS, loss, config=config, progress=False)
    first = train(llama, PAIRS, loss, config=config, cache_folder=tmp_path, progress=False)
    assert same(first.model, expected.model)
    (folder,) = tmp_path.glob("targets-*")
    assert len(list(folder.glob("pair-*.safetensors"))) == len(PAIRS) and not list(folder.glob(".*"))

    from ctlens.training import targets

    monkeypatch.setattr(targets, "run_capturing", lambda *_, **__: pytest.fail("the targets were there"))
    again = train(llama, PAIRS, loss, config=config, cache_folder=tmp_path, progress=False)
    assert same(again.model, expected.model)


def same(one: LensModel, other: LensModel) -> bool:
    here, there = present_weights(one), present_weights(other)
    return all(torch.equal(value, there[name]) for name, value in here.items())


def test_other_weights_prompts_windows_or_types_have_other_targets(tmp_path: Path) -> None:
    def folders(lens: LensModel, pairs: list[Pair], loss: Loss) -> int:
        train(lens, pairs, loss, config=replace(CONFIG, steps=1), cache_folder=tmp_path, progress=False)
        return len(list(tmp_path.glob("targets-*")))

    lens = chat_model("llama")
    assert folders(lens, PAIRS, ACT()) == folders(lens, PAIRS, ACT(weight=2.0)) == 1
    assert folders(lens, PAIRS[1:], ACT()) == 2
    assert folders(lens, PAIRS, ACT(window="last")) == 3
    assert folders(lens, PAIRS, ACT(layers="last")) == 4
    half = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(chat=True), dtype=torch.bfloat16)
    train(half, PAIRS, ACT(), config=replace(CONFIG, steps=1, trainable=LoRA(2)), cache_folder=tmp_path, progress=False)
    assert len(list(tmp_path.glob("targets-*"))) == 5
    next(iter(present_weights(lens).values())).data.mul_(1.5)
    assert folders(lens, PAIRS, ACT()) == 6


def test_a_damaged_target_is_refused(llama: LensModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": replace(CONFIG, steps=1), "cache_folder": tmp_path, "progress": False}
    train(llama, PAIRS, ACT(), **options)
    for path in tmp_path.glob("targets-*/pair-*"):
        path.write_bytes(b"garbage")
    with pytest.raises(CtlensError, match="cannot be read .*: remove its folder"):
        train(llama, PAIRS, ACT(), **options)


def test_without_a_cache_nothing_is_written(llama: LensModel, tmp_path: Path) -> None:
    for memory in ("all", "layers"):
        config = replace(CONFIG, cache=False, memory=memory)
        run = train(llama, PAIRS, AttCT(), config=config, cache_folder=tmp_path, progress=False)
        assert len(run.history) == 2
    assert not any(tmp_path.iterdir())


def test_the_setting_is_checked_and_comes_back(llama: LensModel) -> None:
    with pytest.raises(CtlensError, match="unknown memory setting 'layer'; did you mean 'layers'"):
        TrainConfig(memory="layer")
    assert from_dict(TrainConfig, to_dict(replace(CONFIG, memory="blocks"))).memory == "blocks"
    assert from_dict(TrainConfig, {"steps": 3}).memory == "all"


def test_the_command_keeps_memory(call: Call, tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path / "hf")
    byte_level_tokenizer(chat=True).save_pretrained(tmp_path / "hf")
    save_pairs(tmp_path / "own.jsonl", PAIRS)
    call("--help")
    line = f"train --model {tmp_path}/hf --pairs {tmp_path}/own.jsonl --loss attct --steps 2 --batch-size 3 --quiet"
    ended = call(f"{line} --memory blocks --cache-folder {tmp_path}/cache --out {tmp_path}/run")
    assert (ended.code, ended.err) == (0, "")
    assert len(list((tmp_path / "cache").glob("targets-*/pair-*"))) == 6
    wrong = call(f"{line} --memory block --out {tmp_path}/other")
    assert wrong.code == 2 and "did you mean 'blocks'" in wrong.err


def test_every_loss_is_among_those_tried() -> None:
    assert {loss.name for loss in EVERY} == set(losses.names())
