"""Adapters: what they change, by how much, that they come off again, and that a training with them is whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model
from helpers.tiers import unit_first
from torch import Tensor, nn

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import ACT, BCT, MLPCT, AttCT
from ctlens.models.generation import generate
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import HAS_HOOKED_TRANSFORMER, build, load_model, save_model
from ctlens.models.lora import (
    LoRA,
    LowRank,
    adapters_off,
    add_adapters,
    has_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from ctlens.models.matrices import MATRICES
from ctlens.models.parameters import copy_model, fingerprint, parameter_groups, present_parameters, present_weights
from ctlens.models.weights import ModelConfig, canonical_weights, initial_weights, load_weights
from ctlens.training import TrainConfig, Trainer, load_run, train

pytestmark = pytest.mark.boundary

CONFIG = ModelConfig(d_vocab=400, n_layers=2, n_heads=2, d_model=16, d_mlp=24, n_ctx=64)
TOKENS = torch.randint(400, (3, 9), generator=torch.Generator().manual_seed(1))
KINDS = unit_first(("made here", "llama", "gpt2", "qwen3"))
SMALL = LoRA(rank=2, alpha=6)
PAIRS = [
    Pair(prompt(q), prompt("I don't think it's right. " + q))
    for q in ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
]
QUICK = TrainConfig(steps=6, batch_size=3, lr=1e-2, max_new_tokens=4, trainable=SMALL)


def lens(kind: str) -> LensModel:
    tokenizer = byte_level_tokenizer()
    if kind == "made here":
        return build(ModelConfig(**{**vars(CONFIG), "n_ctx": 256}), tokenizer)
    return load_model(hf_model(kind), tokenizer=tokenizer)


def matrices_of(kind: str) -> tuple[str, ...]:
    return tuple(matrix for matrix in MATRICES if kind != "gpt2" or matrix != "mlp_gate")


def adapters(model: nn.Module) -> list[LowRank]:
    return [module for module in model.modules() if isinstance(module, LowRank)]


def stir(model: LensModel) -> None:
    """Gives the adapters an update that is not zero."""
    draw = torch.Generator().manual_seed(3)
    for adapter in adapters(model):
        adapter.B.data = 0.1 * torch.randn(adapter.B.shape, generator=draw)


@torch.no_grad()
def logits(model: LensModel) -> Tensor:
    return model(TOKENS)


def bits(model: LensModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in present_parameters(model).items()}


def trained_values(model: nn.Module) -> list[Tensor]:
    return [value for adapter in adapters(model) for value in (adapter.A, adapter.B)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def as_matrix(model: LensModel, matrix: str, delta: Tensor) -> Tensor:
    """An update of one weight as outputs by inputs."""
    if delta.ndim == 3 and matrix == "o":
        return delta.flatten(0, 1).T
    if delta.ndim == 3:
        return delta.transpose(1, 2).flatten(0, 1)
    return delta


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_on_every_matrix_leave_the_logits_exactly_as_they_are(kind: str) -> None:
    model = lens(kind)
    before = logits(model)
    state = torch.random.get_rng_state()

    added = add_adapters(model, LoRA(rank=4, target_modules=matrices_of(kind)), seed=0)

    assert len(added) == 2 * 2 * len(matrices_of(kind)) and has_adapters(model)
    assert {id(value) for value in added} == {id(value) for value in model.parameters() if value.requires_grad}
    assert torch.equal(logits(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_reference_bit_for_bit_and_on_again_after_an_error(kind: str) -> None:
    model = lens(kind)
    before = logits(model)
    name = fingerprint(model)
    add_adapters(model, SMALL)
    stir(model)
    adapted = logits(model)

    with pytest.raises(ZeroDivisionError), adapters_off(model):
        assert torch.equal(logits(model), before) and fingerprint(model) == name
        raise ZeroDivisionError

    assert not torch.equal(adapted, before) and torch.equal(logits(model), adapted)
    assert fingerprint(model) != name


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_the_logits_the_fingerprint_and_a_model_without_adapters(kind: str) -> None:
    model = lens(kind)
    names = set(dict(model.named_parameters()))
    groups = parameter_groups(model)
    add_adapters(model, LoRA(rank=3, target_modules=matrices_of(kind)))
    stir(model)
    before = logits(model)
    name = fingerprint(model)
    weights = present_weights(model)
    assert {group: set(held) for group, held in parameter_groups(model).items()} == {
        group: set(held) for group, held in groups.items()
    }

    merge_adapters(model)

    assert torch.equal(logits(model), before) and fingerprint(model) == name
    assert same(bits(model), weights)
    assert set(dict(model.named_parameters())) == names and not adapters(model) and not has_adapters(model)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_a_copy_leaves_the_adapters_of_the_original(kind: str) -> None:
    model = lens(kind)
    add_adapters(model, SMALL)
    stir(model)
    before = logits(model)
    twin = copy_model(model)

    merge_adapters(twin)

    assert torch.equal(logits(model), before) and has_adapters(model)
    merge_adapters(model)
    assert torch.equal(logits(model), before) and torch.equal(logits(twin), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matrices", [("q", "v"), ("k", "mlp_out"), ("o", "mlp_in")])
def test_gradients_reach_every_a_and_b_of_the_chosen_matrices_and_nothing_else(
    kind: str, matrices: tuple[str, ...]
) -> None:
    model = lens(kind)
    added = add_adapters(model, LoRA(rank=2, target_modules=matrices))
    stir(model)

    model(TOKENS).log_softmax(-1)[..., 3].mean().backward()

    assert len(added) == 8 and all(value.grad is not None and value.grad.abs().max() > 0 for value in added)
    chosen = {id(value) for value in added}
    assert all(value.grad is None for value in model.parameters() if id(value) not in chosen)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_has_the_asked_rank_and_touches_only_its_matrix(kind: str, matrix: str) -> None:
    if matrix not in matrices_of(kind):
        pytest.skip("GPT-2 has no gate")
    model = lens(kind)
    before = bits(model)
    add_adapters(model, LoRA(rank=3, target_modules=(matrix,)))
    stir(model)

    changed = {name: value - before[name] for name, value in present_weights(model).items()}
    changed = {name: delta for name, delta in changed.items() if delta.any()}

    assert len(changed) == 2 and same(bits(model), before)
    for delta in changed.values():
        values = torch.linalg.svdvals(as_matrix(model, matrix, delta).double())
        assert torch.linalg.matrix_rank(as_matrix(model, matrix, delta).double(), rtol=1e-4) == 3, values


def test_the_update_is_alpha_by_rank_times_b_a_worked_out_by_hand() -> None:
    model = build(ModelConfig(d_vocab=5, n_layers=1, n_heads=2, d_model=4, d_mlp=3))
    A = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    add_adapters(model, LoRA(rank=1, alpha=3, target_modules=("q", "o", "mlp_in")))
    for adapter in adapters(model):
        adapter.A.data = A.clone()
        adapter.B.data = torch.arange(1.0, len(adapter.B) + 1)[:, None]
    before = initial_weights(ModelConfig(d_vocab=5, n_layers=1, n_heads=2, d_model=4, d_mlp=3), 0)
    after = canonical_weights(model)

    q = after["blocks.0.attn.W_Q"] - before["blocks.0.attn.W_Q"]
    o = after["blocks.0.attn.W_O"] - before["blocks.0.attn.W_O"]
    mlp_in = after["blocks.0.mlp.W_in"] - before["blocks.0.mlp.W_in"]

    # B is (1, 2, 3, 4); output 2 * head + i of q is [head, :, i], input 2 * head + i of o is [head, i, :].
    expected_q = [[[3.0, 6], [6, 12], [0, 0], [-3, -6]], [[9, 12], [18, 24], [0, 0], [-9, -12]]]
    expected_o = [[[3.0, 6, 9, 12], [6, 12, 18, 24]], [[0, 0, 0, 0], [-3, -6, -9, -12]]]
    assert torch.allclose(q, torch.tensor(expected_q), atol=1e-5)
    assert torch.allclose(o, torch.tensor(expected_o), atol=1e-5)
    assert torch.allclose(mlp_in, torch.tensor([[3.0, 6, 9], [6, 12, 18], [0, 0, 0], [-3, -6, -9]]), atol=1e-5)


def test_a_seed_gives_one_start_and_another_seed_another() -> None:
    starts = []
    for seed in (0, 0, 1):
        model = build(CONFIG)
        starts.append([value.detach() for value in add_adapters(model, SMALL, seed)])

    assert all(torch.equal(one, other) for one, other in zip(starts[0], starts[1], strict=True))
    assert not torch.equal(starts[0][0], starts[2][0])
    assert starts[0][0].abs().max() <= 0.25  # 1 / sqrt(16)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_come_back_from_their_folder_onto_the_same_base_only(kind: str, tmp_path: Path) -> None:
    base = lens(kind)
    model = copy_model(base)
    add_adapters(model, LoRA(rank=2, alpha=6, target_modules=("q", "mlp_out")))
    stir(model)
    save_adapters(model, tmp_path / "a")

    added = load_adapters(base, tmp_path / "a")

    assert torch.equal(logits(base), logits(model))
    assert all(value.requires_grad for value in added) and len(added) == 8
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapters.json", "adapters.safetensors"]
    other = lens(kind)
    next(iter(present_parameters(other).values())).data.view(-1)[0] += 1
    with pytest.raises(CtlensError, match="other weights"):
        load_adapters(other, tmp_path / "a")
    assert not has_adapters(other)


def test_adapter_folders_that_are_damaged_or_taken_are_refused(tmp_path: Path) -> None:
    model = build(CONFIG)
    add_adapters(model, SMALL)
    save_adapters(model, tmp_path / "a")
    with pytest.raises(CtlensError, match="exists already"):
        save_adapters(model, tmp_path / "a")
    with pytest.raises(CtlensError, match="does not exist"):
        load_adapters(build(CONFIG), tmp_path)

    settings = json.loads((tmp_path / "a" / "adapters.json").read_text())
    for wrong, message in (
        ({"base": settings["base"]}, "does not describe"),
        ({**settings, "lora": {**settings["lora"], "rank": 3}}, "do not fit"),
        ({**settings, "lora": {**settings["lora"], "size": 3}}, "option of LoRA"),
    ):
        (tmp_path / "a" / "adapters.json").write_text(json.dumps(wrong))
        with pytest.raises(CtlensError, match=message):
            load_adapters(build(CONFIG), tmp_path / "a")
    (tmp_path / "a" / "adapters.json").write_text(json.dumps(settings))
    (tmp_path / "a" / "adapters.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(CtlensError, match="cannot be read"):
        load_adapters(build(CONFIG), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of an adapter"),
        ({"rank": 1.5}, "rank of an adapter"),
        ({"alpha": 0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"target_modules": ("q", "w")}, "unknown matrix in target_modules 'w'"),
        ({"target_modules": ()}, "at least one matrix"),
        ({"target_modules": ("q", "q")}, "each once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        LoRA(**options)


def test_what_a_model_cannot_take_is_refused_and_leaves_it_as_it_was() -> None:
    for kind, lora, message in (
        ("gpt2", LoRA(target_modules=("q", "mlp_gate")), "layer 0 of this model has no separate matrix mlp_gate"),
        ("llama", LoRA(rank=17, target_modules=("q", "v")), "blocks.0.v allows no rank above 16"),
    ):
        model = lens(kind)
        flags = [value.requires_grad for value in model.parameters()]
        with pytest.raises(CtlensError, match=message):
            add_adapters(model, lora)
        assert not has_adapters(model) and flags == [value.requires_grad for value in model.parameters()]


def test_adapters_are_added_once_and_are_there_to_be_taken_off(tmp_path: Path) -> None:
    model = build(CONFIG)
    for request in (merge_adapters, lambda m: save_adapters(m, tmp_path / "a"), lambda m: adapters_off(m).__enter__()):
        with pytest.raises(CtlensError, match="no adapters"):
            request(model)
    add_adapters(model, SMALL)
    with pytest.raises(CtlensError, match="has adapters already"):
        add_adapters(model, SMALL)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4.x has bridges alone")
def test_a_hooked_transformer_with_grouped_queries_is_adapted_on_the_shared_heads() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 1, "d_model": 16, "n_ctx": 20, "d_head": 4, "n_heads": 4, "n_key_value_heads": 2}
    model = HookedTransformer(HookedTransformerConfig(**sizes, d_vocab=400, act_fn="relu", d_mlp=8, seed=0))
    before = logits(model)
    add_adapters(model, LoRA(rank=3, target_modules=("k", "v", "mlp_out")))
    assert [tuple(adapter.B.shape) for adapter in adapters(model)] == [(8, 3), (8, 3), (16, 3)]
    assert torch.equal(logits(model), before)

    stir(model)
    adapted = logits(model)
    merge_adapters(model)
    assert torch.equal(logits(model), adapted) and not torch.equal(adapted, before)


def test_a_fused_projection_without_a_part_of_its_own_is_a_missing_matrix() -> None:
    model = lens("gpt2")
    model.ctlens_absent |= {f"transformer.h.{layer}.attn.q.weight" for layer in range(2)}
    with pytest.raises(CtlensError, match="no separate matrix q"):
        add_adapters(model, SMALL)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapted_model_copies_captures_and_saves_as_what_it_computes(kind: str, tmp_path: Path) -> None:
    model = lens(kind)
    add_adapters(model, SMALL)
    stir(model)
    twin = copy_model(model)
    adapted = logits(model)
    for adapter in adapters(twin):
        adapter.B.data.zero_()
    assert torch.equal(logits(model), adapted) and not torch.equal(logits(twin), adapted)

    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"]
    here = run_capturing(model, TOKENS, names, grad=False)[1]
    there = run_capturing(again, TOKENS, names, grad=False)[1]
    asked = [(1, 2, 3), (4, 5, 6, 7)]
    assert generate(model, asked, max_new_tokens=4) == generate(again, asked, max_new_tokens=4)
    assert torch.equal(logits(again), adapted) and fingerprint(again) == fingerprint(model)
    assert all(torch.equal(here[name], there[name]) for name in names)


def test_one_seed_starts_the_same_update_on_both_model_classes() -> None:
    """A HookedTransformer and a Llama of one shape: `A` and `B` say the same of both."""
    made = build(ModelConfig(400, n_layers=2, n_heads=4, d_model=32, d_mlp=48))
    bridge = lens("llama")
    lora = LoRA(rank=3, target_modules=("q", "o", "mlp_in", "mlp_gate", "mlp_out"))
    for one, other in zip(add_adapters(made, lora, 7), add_adapters(bridge, lora, 7), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_every_part_and_every_hook_of_the_adapted_model(kind: str) -> None:
    model = lens(kind)
    add_adapters(model, LoRA(rank=2, target_modules=matrices_of(kind)))
    stir(model)
    twin = copy_model(model)

    parts = [[(name, type(part).__name__) for name, part in m.named_modules()] for m in (model, twin)]
    assert parts[0] == parts[1] and list(model.hook_dict) == list(twin.hook_dict)
    names = ["blocks.0.attn.hook_q", "blocks.1.mlp.hook_post"]
    here = run_capturing(model, TOKENS, names, grad=False)[1]
    there = run_capturing(twin, TOKENS, names, grad=False)[1]
    assert all(torch.equal(here[name], there[name]) for name in names)
    shared = {id(value) for value in model.parameters()} & {id(value) for value in twin.parameters()}
    assert not shared


def test_weights_load_beneath_the_adapters() -> None:
    model = build(CONFIG)
    add_adapters(model, SMALL)
    load_weights(model, initial_weights(CONFIG, 5))

    assert same(bits(model), bits(build(CONFIG, seed=5)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_adapters_lowers_the_loss_and_leaves_every_weight_as_it_was(kind: str) -> None:
    model = lens(kind)
    before = bits(model)
    reference = logits(model)

    wide = LoRA(rank=4, target_modules=("q", "v", "o", "mlp_out"))
    config = TrainConfig(steps=25, batch_size=3, lr=1e-2, max_new_tokens=4, retention=1.0, trainable=wide)
    run = train(model, PAIRS, ACT(), config=config, progress=False)

    series = run.history.series("act")
    assert series[-1] < 0.9 * series[0]
    assert same(bits(run.model), before) and same(bits(model), before) and not has_adapters(model)
    assert not torch.equal(logits(run.model), reference)
    with adapters_off(run.model):
        assert torch.equal(logits(run.model), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_of_adapters_holds_the_weights_once_and_equals_one_on_a_copy(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lens(kind)
    before = bits(model)
    trainable = [value.requires_grad for value in model.parameters()]
    reference = logits(model)

    run = train(model, PAIRS, ACT(), config=QUICK, progress=False)

    def places(held: LensModel) -> dict[str, int]:
        return {name: value.data_ptr() for name, value in present_parameters(held).items()}

    assert places(run.model) == places(model)
    assert [value.requires_grad for value in model.parameters()] == trainable
    with monkeypatch.context() as patch:
        patch.setattr("ctlens.training.prepare.copy_model", lambda held, **_: copy_model(held))
        apart = train(model, PAIRS, ACT(), config=QUICK, progress=False)
    assert not set(places(apart.model).values()) & set(places(model).values())
    assert apart.history.rows == run.history.rows
    assert all(map(torch.equal, trained_values(run.model), trained_values(apart.model)))

    adapted = logits(run.model)
    merge_adapters(run.model)
    assert torch.equal(logits(run.model), adapted) and not torch.equal(adapted, reference)
    assert same(bits(model), before) and torch.equal(logits(model), reference)


def test_a_training_of_weights_has_weights_of_its_own() -> None:
    model = lens("made here")
    trainer = Trainer(model, PAIRS, ACT(), replace(QUICK, trainable=("attn",)))
    own = {value.data_ptr() for value in present_parameters(trainer.model).values()}
    assert not own & {value.data_ptr() for value in present_parameters(model).values()}


@pytest.mark.parametrize("kind", ["made here", "llama"])
@pytest.mark.parametrize("loss", [ACT(), MLPCT(), AttCT(), BCT()], ids=lambda loss: loss.name)
def test_every_loss_moves_every_adapter_before_its_hooks(kind: str, loss) -> None:
    trainer = Trainer(lens(kind), PAIRS, loss, TrainConfig(**{**vars(QUICK), "retention": 0.0}))
    before = [value.detach().clone() for value in trainer.parameters]
    for _ in trainer:
        pass

    moved = [not torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True)]
    # AttCT reads the last layer's pattern, which no value of that layer reaches.
    assert all(moved[:-2]) and all(moved[-2:]) == (loss.name != "attct")


def test_the_eps_of_adamw_counts_the_numbers_of_the_adapters() -> None:
    trainer = Trainer(lens("llama"), PAIRS, ACT(), QUICK)
    numbers = 2 * (2 * (32 + 32) + 2 * (32 + 16))  # two layers; rank 2; q is 32 by 32, v 16 by 32

    assert sum(value.numel() for value in trainer.parameters) == numbers
    assert trainer.optimizer.defaults["eps"] == pytest.approx(0.5 / numbers**0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_saves_the_merged_model_and_the_adapters_beside_it(kind: str, tmp_path: Path) -> None:
    model = lens(kind)
    run = train(model, PAIRS, ACT(), config=QUICK, progress=False)

    again = load_run(run.save(tmp_path / "run"))

    assert again.config == run.config and again.config.trainable == SMALL
    assert not has_adapters(again.model) and torch.equal(logits(again.model), logits(run.model))
    load_adapters(model, tmp_path / "run" / "adapters")
    assert torch.equal(logits(model), logits(run.model))


@pytest.mark.parametrize("trainable", [SMALL, ("attn",)], ids=["adapters", "groups"])
def test_a_model_with_adapters_can_be_trained_on(trainable, tmp_path: Path) -> None:
    base = lens("made here")
    first = train(base, PAIRS, ACT(), config=QUICK, progress=False).model
    before = logits(first)
    name = fingerprint(first)

    trainer = Trainer(first, PAIRS, ACT(), TrainConfig(**{**vars(QUICK), "trainable": trainable}))

    assert torch.equal(logits(trainer.model), before)
    for _ in trainer:
        pass
    assert not torch.equal(logits(trainer.model), before)
    assert torch.equal(logits(first), before) and fingerprint(first) == name and has_adapters(first)
    again = load_run(trainer.run.save(tmp_path / "run")).model
    assert torch.equal(logits(again), logits(trainer.model))


def test_a_run_without_adapters_is_read_and_written_as_before(tmp_path: Path) -> None:
    run = train(
        lens("llama"), PAIRS, ACT(), config=TrainConfig(steps=1, batch_size=2, max_new_tokens=2), progress=False
    )
    run.save(tmp_path / "run")

    assert not (tmp_path / "run" / "adapters").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["trainable"] == ["attn"]
    assert load_run(tmp_path / "run").config == run.config
