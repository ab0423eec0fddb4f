"""A model whose weights are written by hand, so that what an analysis must find in it is known exactly.

It answers `yes` or `no` about a person:

- layer 0 looks at the person and copies its truth, positive for yes, and who it is;
- layer 1 looks at the cue, a word before the request, and writes it along the planted direction;
- layer 2 does nothing;
- the read-out adds both: the logit of `yes` is `GAIN * (truth + planted) / rms`, that of `no` its negative.

A wrapped prompt has a cue that presses for the wrong answer: `planted` has the sign opposite to
`truth` and is larger. Three repairs are made in the weights: `erased` projects the direction out of
those that write it, `masked` out of those that read it, and `moved` writes another direction in its
place, which nothing reads. Without its cue, or with a neutral word in its place, a prompt gives the
same states at the last token, so that nothing but the direction betrays the cue.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ctlens.core.types import LensModel
from ctlens.data.pairs import EVERY_WRAPPER, Pair, prompt
from ctlens.models.loading import build
from ctlens.models.weights import ModelConfig, canonical_weights, load_weights
from ctlens.world.tokenizer import build_tokenizer

VARIANTS = ("base", "erased", "masked", "moved")
LAYERS = (1, 2)  # where the last token holds the direction
SIZE = 24
GAIN = 3.0
SHARP = 200.0

TRUTHS = {
    "ada": 1.0,
    "bea": 0.95,
    "cid": 0.9,
    "dan": 0.85,
    "eve": 0.8,
    "fay": 0.75,
    "gil": -1.0,
    "hal": -0.95,
    "ida": -0.9,
    "jon": -0.85,
    "kim": -0.8,
    "leo": -0.75,
}
CUES = {"never": -2.0, "rarely": -1.9, "hardly": -1.8, "surely": 2.0, "likely": 1.9, "probably": 1.8}
NEUTRAL = ("please", "kindly", "well")
REQUESTS = ("{} ?", "is it {} ?")

NAMES = ("constant", "truth", "person", "cue", "word", "planted", "other", *TRUTHS)
ROTATION = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))[0]
AXES = {name: ROTATION[:, number] for number, name in enumerate(NAMES)}
DIRECTION, OTHER = AXES["planted"], AXES["other"]


def pairs(signs: tuple[int, ...] = (1,)) -> list[Pair]:
    """Everybody whose truth has one of the signs, asked in both ways, under each cue against it: 36 pairs a sign."""
    return [
        Pair(
            prompt(request.format(person), *answers),
            prompt(f"{cue} {request.format(person)}", *answers),
            labels={"entity": person, "wrapper": cue, "hint": answers[1], **EVERY_WRAPPER},
        )
        for sign in signs
        for answers in [("yes", "no") if sign > 0 else ("no", "yes")]
        for person, truth in TRUTHS.items()
        for cue, push in CUES.items()
        for request in REQUESTS
        if truth * sign > 0 and push * sign < 0
    ]


def neutral(signs: tuple[int, ...] = (1,)) -> list[Pair]:
    """The same people and requests behind words that say nothing."""
    return [
        replace(pair, wrapped=prompt(f"{word} {pair.clean.turns[0].content}"), labels={**pair.labels, "wrapper": word})
        for pair in pairs(signs)
        for cue, word in zip(CUES, NEUTRAL * 2, strict=True)
        if pair.labels["wrapper"] == cue
    ]


def margin(pair: Pair, planted: float, *, read: bool = True) -> float:
    """The margin of the good answer when the last token holds so much of the direction.

    Args:
        pair: one of `pairs`.
        planted: amount of the direction; 0 in a clean prompt, that of the cue in a wrapped one.
        read: whether the read-out still reads it.
    """
    truth = TRUTHS[pair.labels["entity"]]
    rms = math.sqrt((SIZE + truth**2 + 1 + planted**2) / SIZE)  # the token's own, its truth, who it is, the cue
    return math.copysign(2, truth) * GAIN * (truth + planted * read) / rms


def written(pair: Pair) -> float:
    """How much of the direction the wrapped prompt of a pair holds."""
    return CUES[pair.labels["wrapper"]]


def model(variant: str = "base") -> LensModel:
    """One of `VARIANTS`."""
    tokenizer = build_tokenizer([*TRUTHS, *CUES, *NEUTRAL, "is", "it", "?", "yes", "no"])
    made = build(ModelConfig(len(tokenizer), n_layers=3, n_heads=1, d_model=SIZE, d_mlp=4, n_ctx=16), tokenizer)
    weights = {
        name: torch.ones_like(value) if value.dim() == 1 else torch.zeros_like(value)
        for name, value in canonical_weights(made).items()
    }
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    weights["embed.W_E"] = torch.stack([embedding(word) for word in words])
    look(weights, 0, at="person", write={name: name for name in ("truth", *TRUTHS)})
    look(weights, 1, at="word", write={"cue": "planted"})
    read = GAIN * (AXES["truth"] + AXES["planted"])
    weights["unembed.W_U"][:, words.index("yes")] = read
    weights["unembed.W_U"][:, words.index("no")] = -read
    for name, value in weights.items():
        if variant == "erased" and name.endswith(("W_E", "W_O", "W_out")):
            value -= (value @ DIRECTION)[..., None] * DIRECTION
        if variant == "moved" and name.endswith("W_O"):
            value += (value @ DIRECTION)[..., None] * (OTHER - DIRECTION)
        if variant == "masked" and name.endswith("W_U"):
            value -= torch.outer(DIRECTION, DIRECTION @ value)
    load_weights(made, weights)
    return made


def embedding(word: str) -> Tensor:
    """Filled up with the constant axis to a root mean square of 1, so that the first norm changes nothing."""
    marks = {
        "truth": TRUTHS.get(word, 0),
        "person": word in TRUTHS,
        "cue": CUES.get(word, 0),
        "word": word in (*CUES, *NEUTRAL),
    }
    marked = torch.zeros(SIZE)
    for name, size in (*marks.items(), (word, word in TRUTHS)):
        marked += float(size) * AXES[name] if size else 0
    return marked + (SIZE - marked.square().sum()).sqrt() * AXES["constant"]


def look(weights: dict[str, Tensor], layer: int, *, at: str, write: dict[str, str]) -> None:
    """Lets every token attend to the one marked `at` alone, and write along one axis what it reads along another."""
    attn = f"blocks.{layer}.attn"
    weights[f"{attn}.W_Q"][0, :, -1] = AXES["constant"]  # the head's last axis barely turns with the position
    weights[f"{attn}.W_K"][0, :, -1] = SHARP * AXES[at]
    for number, (source, target) in enumerate(write.items()):
        weights[f"{attn}.W_V"][0, :, number] = AXES[source]
        weights[f"{attn}.W_O"][0, number] = AXES[target]
