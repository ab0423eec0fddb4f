"""Estimates of a training step: sizes by arithmetic, operations and bytes as on a model with weights, refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from ctlens.core.errors import CtlensError
from ctlens.losses import ACT, RMCT, built
from ctlens.models.counting import Counting
from ctlens.models.hooks import run
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA
from ctlens.models.outline import outline
from ctlens.training import TrainConfig
from ctlens.training import needs as counted
from ctlens.training.estimate import GIB, Estimate, estimate, fewest_processes
from ctlens.training.needs import StepNeeds, example, step_needs

# Sizes with no common factor that a mistake could hide in.
VOCAB = 101
WIDTH = 24
MLP = 40
HEADS = 6
KV_HEADS = 2
HEAD = WIDTH // HEADS
LENGTH = 20
WRAPPER = 6


def llama(n_layers: int = 2, **settings: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        **{"tie_word_embeddings": False, **settings},
    )


ATTENTION = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_HEADS * HEAD  # q and o; k and v
MLPS = 3 * WIDTH * MLP
NORMS = 2 * WIDTH


def needs(config: PretrainedConfig, losses: Any = "act", *, length: int = LENGTH, **settings: Any) -> StepNeeds:
    training = TrainConfig(**{"batch_size": 3, "retention": 0.0, "max_new_tokens": 4, **settings})
    return estimate(config, losses, config=training, length=length, wrapper_length=WRAPPER, progress=False).asked


@pytest.mark.boundary
def test_the_sizes_of_weights_are_those_of_arithmetic() -> None:
    n_layers = 3
    config = TrainConfig(batch_size=2, trainable=("attn", "mlp"))
    found = estimate(llama(n_layers), config=config, length=LENGTH, wrapper_length=WRAPPER)
    asked = found.asked
    trained = n_layers * (ATTENTION + MLPS)

    assert found.n_parameters == 2 * VOCAB * WIDTH + n_layers * (ATTENTION + MLPS + NORMS) + WIDTH
    assert asked.n_trained == trained
    assert asked.optimizer == 8 * trained + 4 * (7 * n_layers)  # two moments, and a count per matrix
    assert 4 * found.n_parameters <= asked.reference <= 1.1 * 4 * found.n_parameters + 4 * 64 * HEAD
    assert asked.weights == asked.reference
    assert asked.peak == sum(getattr(asked, part) for part in counted.HELD)


def test_adapters_train_their_two_thin_matrices_and_half_precision_halves_the_rest() -> None:
    rank = 2
    single = needs(llama(), trainable=LoRA(rank))
    training = TrainConfig(batch_size=3, retention=0.0, trainable=LoRA(rank))
    half = estimate(llama(), config=training, length=LENGTH, wrapper_length=WRAPPER, dtype="bfloat16").asked
    of_q = rank * (WIDTH + WIDTH)
    of_v = rank * (WIDTH + KV_HEADS * HEAD)

    assert single.n_trained == half.n_trained == 2 * (of_q + of_v)
    assert 4 * half.n_trained <= half.weights < 4 * half.n_trained + half.reference / 2  # buffers are copied
    assert half.reference < 0.6 * single.reference


# A loss on activations reads no logits, so that its passes have no unembedding.
@pytest.mark.parametrize(("loss", "unembedding"), [("act", 0), ("klct", VOCAB * WIDTH)])
def test_the_operations_are_those_of_the_matrix_products_by_hand(loss: str, unembedding: int) -> None:
    n_layers = 2
    n_pairs = 3
    found = needs(llama(n_layers), loss).flops
    clean = LENGTH - WRAPPER

    def forward(length: int) -> int:
        products = n_layers * (ATTENTION + MLPS) + unembedding
        scores = n_layers * HEADS * HEAD * length * length  # queries with keys; as many for patterns with values
        return 2 * n_pairs * (length * products + 2 * scores)

    assert found["reference"] == forward(clean)
    assert found["forward"] == forward(LENGTH)
    assert found["retention"] == 0


def with_weights(config: PretrainedConfig, losses: Any, training: TrainConfig) -> StepNeeds:
    """The same step on a model with weights, by the same counts."""
    model = load_model(AutoModelForCausalLM.from_config(config), check=False)
    chosen = built(losses)
    pair = example(chosen, training, LENGTH, WRAPPER)
    return step_needs({model.cfg.n_layers: model}, model.cfg.n_layers, pair, chosen, training)


@pytest.mark.parametrize(
    ("loss", "memory"),
    [("act", "all"), ("attct", "layers"), ("bct", "blocks"), ("klct", "layers"), ("attmass", "blocks"), ("f2c", "all")],
)
def test_shapes_alone_need_what_weights_need(loss: str, memory: str) -> None:
    training = TrainConfig(batch_size=3, memory=memory, max_new_tokens=4)
    expected = with_weights(llama(), [loss], training)

    found = needs(llama(), loss, memory=memory, retention=training.retention)

    kept = training.batch_size * found.targets  # beside the step's own tensors, where the model is on the CPU too

    assert found.flops == expected.flops
    assert 0.99 * found.peak <= expected.peak <= 1.01 * found.peak + kept


@pytest.mark.boundary
@pytest.mark.parametrize(
    "config",
    [llama(), GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=64)],
    ids=["llama", "gpt2"],
)
def test_the_operations_of_a_pass_are_those_that_pytorch_counts(config: PretrainedConfig) -> None:
    model = load_model(AutoModelForCausalLM.from_config(config), check=False)
    tokens = torch.randint(VOCAB, (3, LENGTH))
    with FlopCounterMode(display=False) as flops:
        run(model, tokens).square().mean().backward()
    with Counting() as counting:
        run(outline(config), tokens.to("meta")).square().mean().backward()

    assert counting.flops[""] == flops.get_total_flops() > 0


def test_what_a_tiny_step_holds_is_a_sum_by_hand() -> None:
    """Of one weight `W`: its product and its square are kept for the way back, where gradients come beside them."""
    weight = torch.zeros(5, 7, device="meta", requires_grad=True)
    entering = torch.zeros(3, 5, device="meta")
    with Counting() as counting:
        counting.phase = "forward"
        product = entering @ weight  # 3 x 7
        total = product.square().sum()  # the square is summed at once and gone
        counting.phase = "backward"
        total.backward()
    assert sum(counting.at_peak["forward"].values()) == 4 * (21 + 21 + 1)
    assert weight.grad is not None and counting.now == 4 * (21 + 1 + 35)
    assert counting.flops == {"forward": 2 * 3 * 5 * 7, "backward": 2 * 3 * 5 * 7}


def test_logits_and_patterns_are_counted_apart() -> None:
    """All patterns of a step of AttCT that keeps everything are held at once, and a blocks' step holds one layer's."""
    one = 4 * 3 * HEADS * LENGTH * LENGTH
    n_layers = 6
    everything = needs(llama(n_layers), "attct")
    blocks = needs(llama(n_layers), "attct", memory="blocks")

    assert everything.patterns >= n_layers * one
    assert blocks.patterns < everything.patterns
    assert needs(llama(), "klct").logits >= 2 * 4 * 3 * (LENGTH - WRAPPER) * VOCAB


@pytest.mark.parametrize(
    ("memory", "trainable", "length"),
    [("all", ("attn", "mlp"), 8), ("all", LoRA(2), 40), ("layers", ("mlp",), 8), ("blocks", ("attn", "mlp"), 40)],
)
def test_two_depths_give_every_other(memory: str, trainable: Any, length: int, monkeypatch) -> None:
    settings = {"memory": memory, "trainable": trainable, "length": length}
    found = needs(llama(7), "act", **settings)
    monkeypatch.setattr("ctlens.training.estimate.DEPTHS", (7, 7))
    whole = needs(llama(7), "act", **settings)

    assert found.flops == whole.flops and found.targets == whole.targets
    assert found.optimizer == whole.optimizer and found.weights == whole.weights
    assert found.peak == pytest.approx(whole.peak, rel=0.1)


def test_a_loss_at_chosen_layers_is_run_in_full() -> None:
    assert needs(llama(6), ACT(layers=(5,))).targets == needs(llama(6), ACT(layers="last")).targets > 0
    assert needs(llama(6), ACT(layers="last_half")).targets == 3 * needs(llama(6), ACT(layers="last")).targets


def test_processes_share_pairs_and_accumulation_runs_them_in_parts() -> None:
    config = TrainConfig(batch_size=5, retention=0.0)
    options: dict[str, Any] = {"length": LENGTH, "wrapper_length": WRAPPER, "progress": False}
    alone = estimate(llama(), config=config, **options).asked
    shared = estimate(llama(), config=config, processes=2, **options).asked
    three = estimate(llama(), config=TrainConfig(batch_size=3, retention=0.0), **options).asked

    assert shared.pairs == 3 and shared.peak == three.peak < alone.peak
    assert needs(llama(), "attct", batch_size=4, accumulate=4).peak < needs(llama(), "attct", batch_size=4).peak


def of_bytes(pairs: int, config: TrainConfig, processes: int) -> StepNeeds:
    """Needs of one byte for everything, and of 10 for every pair."""
    rest = dict.fromkeys(("n_trained", *counted.HELD, "targets"), 0)
    sizes = {**rest, "weights": 1, "activations": 10 * pairs}
    flops = dict.fromkeys(counted.PHASES, 0)
    return StepNeeds("weights", config.memory, processes, pairs, shard=False, flops=flops, **sizes)


@pytest.mark.parametrize(("budget", "processes", "pairs"), [(71, 1, 7), (70, 2, 4), (31, 3, 3), (11, 7, 1), (10, 7, 1)])
def test_the_fewest_processes_that_fit_are_found(budget: int, processes: int, pairs: int) -> None:
    def needed(config: TrainConfig, processes: int, shard: bool) -> StepNeeds:
        return of_bytes(math.ceil(7 / processes), config, processes)

    found = fewest_processes(needed, TrainConfig(batch_size=7), 1, budget)

    assert (found.processes, found.pairs) == (processes, pairs)
    assert (found.peak <= budget) == (budget > 10)


@pytest.mark.parametrize(("budget", "processes"), [(100, 1), (99, 2), (50, 2), (20, 5), (19, 6), (13, 8), (12, 8)])
def test_weights_that_are_split_need_the_more_processes_the_less_fits(budget: int, processes: int) -> None:
    def needed(config: TrainConfig, processes: int, shard: bool) -> StepNeeds:
        assert shard
        return replace(of_bytes(0, config, processes), weights=math.ceil(100 / processes))

    found = fewest_processes(needed, TrainConfig(batch_size=8), 1, budget, shard=True)

    assert found.processes == processes and (found.peak <= budget) == (budget > 12)


def test_split_weights_are_cut_by_the_processes_and_gathered_by_hand() -> None:
    n_layers = 3
    n_processes = 4
    config = TrainConfig(batch_size=4, retention=0.0, trainable=("attn", "mlp"))
    options: dict[str, Any] = {"config": config, "length": LENGTH, "wrapper_length": WRAPPER, "processes": n_processes}
    whole = estimate(llama(n_layers), **options).asked
    split = estimate(llama(n_layers), **options, shard=True).asked
    trained = ATTENTION + MLPS
    outside = 2 * VOCAB * WIDTH + WIDTH

    for part in ("reference", "weights", "optimizer"):
        assert getattr(split, part) == math.ceil(getattr(whole, part) / n_processes)
    assert split.gradients <= 4 * n_layers * trained / n_processes
    # on the way back, when most is held: the embeddings, two blocks, and the gradients of what is trained of them
    assert split.gathered == 4 * (outside + 2 * (trained + NORMS) + 2 * trained) and whole.gathered == 0
    assert (split.flops, split.n_trained, split.targets) == (whole.flops, whole.n_trained, whole.targets)
    assert split.peak == sum(getattr(split, part) for part in counted.HELD)


def test_adapters_beside_split_weights_are_split_too() -> None:
    options: dict[str, Any] = {"length": LENGTH, "wrapper_length": WRAPPER, "processes": 2, "dtype": "bfloat16"}
    config = TrainConfig(batch_size=2, retention=0.0, trainable=LoRA(2))
    whole = estimate(llama(), config=config, **options).asked
    split = estimate(llama(), config=config, **options, shard=True).asked

    assert split.weights == math.ceil(whole.weights / 2) and split.reference == math.ceil(whole.reference / 2)
    assert 2 * (2 * VOCAB * WIDTH + WIDTH) < split.gathered < 2 * llama_parameters(2) + 12 * split.n_trained


def llama_parameters(n_layers: int) -> int:
    return 2 * VOCAB * WIDTH + n_layers * (ATTENTION + MLPS + NORMS) + WIDTH


MEASURED = pd.read_csv(Path(__file__).parents[2] / "benchmarks/sharded.csv")


@pytest.mark.parametrize("row", list(MEASURED.itertuples(index=False)), ids=lambda row: f"{row.processes} processes")
def test_what_processes_hold_is_what_was_measured(row: Any) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    described = LlamaConfig(vocab_size=8192, max_position_embeddings=128, **sizes)  # that of benchmarks/sharded.py
    groups = ("embed", "attn", "mlp", "norm", "unembed")
    config = TrainConfig(batch_size=12, retention=0.0, trainable=groups, cache=False)
    options: dict[str, Any] = {"length": 24, "wrapper_length": 6, "processes": row.processes, "progress": False}
    found = estimate(described, "act", config=config, shard=True, **options)
    asked = found.asked
    mib = 2**20
    behind = asked.reference + asked.weights + asked.optimizer + 4 * asked.n_trained / row.processes

    assert found.n_parameters == row.parameters
    assert asked.peak / mib == pytest.approx(row.step_peak_mib, rel=0.15)
    assert behind / mib == pytest.approx(row.trained_mib, rel=0.15)
    assert asked.reference / mib == pytest.approx(row.loaded_mib, rel=0.2)


def test_what_a_process_does_per_second_says_how_long_a_step_is() -> None:
    config = TrainConfig(batch_size=5, retention=0.0)
    options: dict[str, Any] = {"config": config, "length": LENGTH, "wrapper_length": WRAPPER, "processes": 2}
    found = estimate(llama(), **options, tflops=0.25)
    row = found.to_dataframe().iloc[0]

    assert row["seconds per step"] == pytest.approx(sum(found.asked.flops.values()) / 0.25e12)
    assert row["pairs per second"] == pytest.approx(5 / row["seconds per step"])
    assert "seconds per step" not in estimate(llama(), **options).to_dataframe()


def test_where_weights_do_not_fit_whole_splitting_them_is_tried() -> None:
    config = TrainConfig(batch_size=8, retention=0.0, trainable=LoRA(2))
    options: dict[str, Any] = {"config": config, "length": LENGTH, "wrapper_length": WRAPPER, "progress": False}
    wide = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=16, tie_word_embeddings=False
    )
    held = estimate(wide, **options).asked
    found = estimate(wide, **options, budget_gib=0.9 * held.reference / GIB)

    fitting = [way for way in found.ways if found.fits(way)]
    assert fitting and all(way.shard and way.processes > 1 for way in fitting)
    assert re.search(
        r"It fits with memory=\w+, LoRA of rank 2 on q and v trained, \d processes that split the weights",
        found.verdict,
    )


def in_budget(size: int, **settings: Any) -> Estimate:
    config = TrainConfig(batch_size=1, retention=0.0, **settings)
    options: dict[str, Any] = {"length": LENGTH, "wrapper_length": WRAPPER, "progress": False}
    return estimate(llama(1), config=config, budget_gib=size / GIB, **options)


def test_a_budget_that_is_large_enough_is_left_alone() -> None:
    found = in_budget(2 * GIB)

    assert found.ways == (found.asked,)
    assert re.fullmatch(r"A step holds .* GiB, which fits in 2 GiB\.", found.verdict)


def test_where_nothing_fits_every_way_was_tried() -> None:
    found = in_budget(1000)
    table = found.to_dataframe()

    assert not any(map(found.fits, found.ways)) and "nothing makes it fit" in found.verdict
    assert [(way.memory, "LoRA" in way.trained) for way in found.ways[1:]] == [
        (memory, adapters) for adapters in (False, True) for memory in ("all", "layers", "blocks")
    ]
    assert list(table["fits"]) == ["no"] * 7
    assert table["peak"].to_numpy() == pytest.approx(table[list(counted.HELD)].sum(axis=1).to_numpy())


def test_adapters_make_a_step_fit_that_its_moments_keep_out() -> None:
    adapters = in_budget(GIB, trainable=LoRA(2)).asked.peak
    found = in_budget(int(1.15 * adapters))

    assert not found.fits(found.asked) and "It fits with memory=all, LoRA of rank 8" in found.verdict


def written(path: Path, settings: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.boundary
def test_a_file_a_folder_and_a_configuration_are_one_model(tmp_path: Path) -> None:
    config = llama()
    config.save_pretrained(tmp_path)

    assert needs(tmp_path / "config.json") == needs(tmp_path) == needs(config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hidden_size": 8}, "names no model_type"),
        ({"model_type": "llamma"}, "unknown model_type in .* did you mean 'llama'"),
        ({"model_type": "t5"}, "t5 is no causal language model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "config.json is no configuration of llama"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "gptq quantised"),
    ],
)
def test_what_is_no_configuration_is_refused(settings: Mapping[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CtlensError, match=sentence):
        estimate(written(tmp_path / "config.json", settings))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget_gib": -1.0}, "budget_gib must be a positive number, not -1.0"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"processes": 17}, "16 pairs are too few for 17 processes"),
        ({"length": 7}, "a prompt of 7 tokens has no room for a wrapper of 6"),
        ({"length": 60}, "has 76 tokens, but the model's context is 64"),
        ({"dtype": "bfloat16"}, "half precision are too coarse to train"),
        ({"losses": RMCT()}, "rmct trains on rows of its own making"),
        ({"losses": ["act", "act"]}, "a loss is given twice"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CtlensError, match=sentence):
        estimate(llama(), **{"length": LENGTH, "wrapper_length": WRAPPER, **options})


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(CtlensError, match="nowhere.json is no file"):
        estimate("nowhere.json")
