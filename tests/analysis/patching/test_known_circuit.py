"""Patching finds the heads and positions of an induction circuit whose weights were written by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctlens.analysis import patch
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, prompt
from ctlens.models.loading import build
from ctlens.models.weights import ModelConfig, load_weights

pytestmark = pytest.mark.boundary

WORDS = 10
D_MODEL = 32
D_HEAD = 16
TOKEN = 0
PREVIOUS = 10
ONE = 20
OUTPUT = 21
SLOW = 6  # the first three rotary pairs of a head tell neighbours apart, the others hardly turn
SHARP = 60.0


def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({str(number): number for number in range(WORDS)}, unk_token="none"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core)


def induction_model() -> LensModel:
    """Layer 0, head 0 writes the previous token; layer 1, head 1 looks for its own token there and copies."""
    model: Any = build(ModelConfig(WORDS, n_layers=2, n_heads=2, d_model=D_MODEL, d_mlp=8, n_ctx=16), words())
    each = torch.arange(WORDS)
    zero = {"W_Q": (2, D_MODEL, D_HEAD), "W_K": (2, D_MODEL, D_HEAD), "W_V": (2, D_MODEL, D_HEAD)}
    zero |= {"W_O": (2, D_HEAD, D_MODEL)}
    weights = {"embed.W_E": torch.zeros(WORDS, D_MODEL), "unembed.W_U": torch.zeros(D_MODEL, WORDS)}
    weights["ln_final.w"] = torch.ones(D_MODEL)
    for layer in range(2):
        block = {f"attn.{name}": torch.zeros(shape) for name, shape in zero.items()}
        block |= {"mlp.W_in": torch.zeros(D_MODEL, 8), "mlp.W_gate": torch.zeros(D_MODEL, 8)}
        block |= {"mlp.W_out": torch.zeros(8, D_MODEL), "ln1.w": torch.ones(D_MODEL), "ln2.w": torch.ones(D_MODEL)}
        weights |= {f"blocks.{layer}.{name}": weight for name, weight in block.items()}
    weights["embed.W_E"][each, TOKEN + each] = 1
    weights["embed.W_E"][:, ONE] = 1
    weights["unembed.W_U"][OUTPUT + each, each] = 1
    for pair in range(SLOW // 2):  # a query turned back by one position meets the key in front of it
        angle = 10_000 ** (-2 * pair / D_HEAD)
        weights["blocks.0.attn.W_K"][0, ONE, 2 * pair] = 1
        weights["blocks.0.attn.W_Q"][0, ONE, 2 * pair] = SHARP * math.cos(angle)
        weights["blocks.0.attn.W_Q"][0, ONE, 2 * pair + 1] = -SHARP * math.sin(angle)
    for layer, head, written in ((0, 0, PREVIOUS), (1, 1, OUTPUT)):
        weights[f"blocks.{layer}.attn.W_V"][head, TOKEN + each, SLOW + each] = 1
        weights[f"blocks.{layer}.attn.W_O"][head, SLOW + each, written + each] = 1
    weights["blocks.1.attn.W_Q"][1, TOKEN + each, SLOW + each] = SHARP
    weights["blocks.1.attn.W_K"][1, PREVIOUS + each, SLOW + each] = 1
    load_weights(model, weights)
    return model


REPEATS = (("0 3 7 1 5 2 3", "0 8 7 1 5 2 3", "7", "1"), ("0 6 4 9 2 1 6", "0 5 4 9 2 1 6", "4", "9"))
PAIRS = [Pair(prompt(clean, good, bad), prompt(other, good, bad)) for clean, other, good, bad in REPEATS]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_two_heads_of_the_circuit_and_their_positions_are_found(direction: str):
    """Behind the first of two equal tokens the one head writes what the other, at the second, looks for."""
    options: Any = {"direction": direction, "window": "position", "progress": False}
    found = patch(induction_model(), PAIRS, site="z", **options)
    assert (np.abs(found.source - found.target) > 1).all()
    shares = found.normalised().pivot_table(index=["layer", "head"], columns="position", values="value").to_numpy()
    circuit = {(0, 2), (3, 6)}  # layer 0 head 0 behind the first token, layer 1 head 1 at the last
    for place, share in np.ndenumerate(shares):
        assert (share > 0.9) if place in circuit else (abs(share) < 0.1), (place, share)


def test_the_stream_carries_it_from_the_first_token_to_the_one_behind_and_to_the_last():
    options: Any = {"direction": "denoising", "window": "position", "progress": False}
    found = patch(induction_model(), PAIRS, site="resid_post", **options)
    shares = found.normalised().pivot_table(index="layer", columns="position", values="value").to_numpy()
    assert shares[0].argmax() == 2 and shares[1].argmax() == 6
    assert shares[0, 2] > 0.9 and shares[1, 6] == pytest.approx(1) and np.abs(shares[1, :-1]).max() == 0


def test_the_mlps_write_nothing_and_change_nothing():
    options: Any = {"direction": "denoising", "window": "position", "progress": False}
    found = patch(induction_model(), PAIRS, site="mlp_out", **options)
    np.testing.assert_allclose(found.values, np.broadcast_to(found.target, found.values.shape), atol=1e-5)
