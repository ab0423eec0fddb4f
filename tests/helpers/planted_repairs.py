"""Models whose weights are written by hand, after repairs of known kinds, so that what became of the cue is known.

They answer `yes` or `no` about a person, as those of `planted`, under a wrapper of two words. Layer 0 copies the truth
and who it is to every token that follows the person. The kinds differ in what becomes of the cue after that:

| kind | layer 1 writes the cue | the read-out reads |
|---|---|---|
| `base` | along the base's direction | the base's direction |
| `weak` | the same, more weakly | the base's direction |
| `rotated` | along a direction at an angle to it, at some strength | that direction |
| `split` | over the base's and another direction, at some strength | both |
| `moved` | along another direction | the base's direction |
| `cut` | along the base's direction | neither |
| `parity` | as two bits, which differ in an attack and agree otherwise, along two directions | the base's direction |
| `content` | along another direction, at the request's tokens alone | the base's direction |
| `late` | the same; layer 2 copies it to the last token, more weakly | the base's direction |
| `erased` | nowhere | the base's direction |

Each word of a wrapper has one of the bits. The first word of a prompt, `<bos>`, stands in where there is no wrapper:
without cue, and with bits that agree.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ctlens.core.types import LensModel
from ctlens.data.pairs import EVERY_WRAPPER, Pair, prompt
from ctlens.models.loading import build
from ctlens.models.weights import ModelConfig, canonical_weights, load_weights
from ctlens.world.tokenizer import BOS, build_tokenizer
from helpers.planted import GAIN, REQUESTS, ROTATION, SHARP, SIZE

USED = ("weak", "rotated", "split")
MASKED = ("moved", "cut", "parity")
KINDS = (*USED, *MASKED, "content", "late", "erased")

TRUTHS = {"ada": 1.0, "bea": 0.95, "cid": 0.9, "dan": 0.85, "eve": 0.8, "fay": 0.75}
ATTACKS = {"never": -2.0, "rarely": -1.95, "hardly": -1.9, "scarcely": -1.85, "barely": -1.8, "seldom": -2.05}
HARMLESS = ("please", "kindly", "well", "now", "so", "then")
SECOND = {1: ("ever", "just"), -1: ("quite", "really")}  # by their bit
BIT = 1.2

NAMES = ("constant", "truth", "person", "cue", "first bit", "second bit", "word", "request", "start")
NAMES += ("planted", "other", "first code", "second code", *TRUTHS)
AXES = {name: ROTATION[:, number] for number, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Repair:
    """What became of the cue.

    Attributes:
        kind: one of `KINDS`, or `"base"`.
        strength: of the kinds in `USED`, and of `late` before a norm shortens it, how much of the cue is left.
        angle: of `rotated` and `split`, from the base's direction to that which the cue is written along, in degrees.
    """

    kind: str
    strength: float = 1.0
    angle: float = 90.0

    @property
    def verdicts(self) -> tuple[str, str]:
        """What is true of the last token after layers 1 and 2."""
        rests = "reduced" if self.strength < 1 else "vulnerable"
        if self.kind == "late":
            return "elsewhere", "reduced"
        told = {"base": "vulnerable", "content": "elsewhere", "erased": "erased"}
        told |= dict.fromkeys(USED, rests) | dict.fromkeys(MASKED, "masked")
        return told[self.kind], told[self.kind]

    @property
    def along(self) -> Tensor:
        """The direction along which layer 1 writes the cue."""
        if self.kind in ("moved", "content", "late"):
            return AXES["other"]
        if self.kind not in ("rotated", "split"):
            return AXES["planted"]
        angle = math.radians(self.angle)
        return math.cos(angle) * AXES["planted"] + math.sin(angle) * AXES["other"]

    @property
    def read(self) -> Tensor:
        """The direction that the read-out reads beside the truth."""
        if self.kind == "cut":
            return torch.zeros(SIZE)
        return self.along if self.kind in ("rotated", "split") else AXES["planted"]


def drawn(count: int, seed: int) -> list[Repair]:
    """Repairs drawn at random, each kind in its turn."""
    draw = random.Random(seed)
    return [
        Repair(
            KINDS[number % len(KINDS)],
            strength=draw.choice([1.0, draw.uniform(0.3, 0.8)]),
            angle=draw.uniform(20, 70) if KINDS[number % len(KINDS)] == "split" else draw.uniform(60, 120),
        )
        for number in range(count)
    ]


def bit(word: str) -> int:
    """The bit of the first word of a wrapper."""
    words = [*ATTACKS, *HARMLESS]
    return 1 if words.index(word) % 2 else -1


def wrapper(word: str, number: int) -> str:
    """A first word, and a second one whose bit makes it an attack or not."""
    wanted = -bit(word) if word in ATTACKS else bit(word)
    return f"{word} {SECOND[wanted][number % 2]}"


def pairs(words: tuple[str, ...] = tuple(ATTACKS)) -> list[Pair]:
    """Everybody asked in one of two ways under a wrapper of each first word: 36 pairs."""
    return [
        Pair(
            prompt(REQUESTS[number % 2].format(person), "yes", "no"),
            prompt(f"{wrapper(word, number)} {REQUESTS[number % 2].format(person)}", "yes", "no"),
            labels={"entity": person, "wrapper": word, **EVERY_WRAPPER},
        )
        for number, person in enumerate(TRUTHS)
        for word in words
    ]


def neutral() -> list[Pair]:
    """The same requests behind harmless words."""
    return pairs(HARMLESS)


def cost(repair: Repair, pair: Pair) -> float:
    """What the wrapper of a pair costs the good answer, by hand: the logit difference without it less that with it."""
    truth = TRUTHS[pair.labels["entity"]]
    amount = repair.strength * ATTACKS[pair.labels["wrapper"]]
    if repair.kind in ("erased", "parity", "content"):
        return 0.0  # of a parity, both prompts have bits of the same length
    # Each norm divides the last token's state, of length `SIZE ** .5`, by its root mean square as it has grown so far.
    with_person = SIZE + truth**2 + 1
    read = 0 if repair.kind in ("moved", "cut") else 1
    if repair.kind == "late":  # the person's token had truth and person before they were copied to it
        amount /= math.sqrt((SIZE + 3 * truth**2 + 3 + ATTACKS[pair.labels["wrapper"]] ** 2) / SIZE)
    without = 2 * GAIN * truth / math.sqrt(with_person / SIZE)
    return without - 2 * GAIN * (truth + read * amount) / math.sqrt((with_person + amount**2) / SIZE)


def model(repair: Repair) -> LensModel:
    """The model after a repair."""
    small = [word for words in SECOND.values() for word in words]
    tokenizer = build_tokenizer([*TRUTHS, *ATTACKS, *HARMLESS, *small, "is", "it", "?", "yes", "no"])
    made = build(ModelConfig(len(tokenizer), n_layers=3, n_heads=1, d_model=SIZE, d_mlp=4, n_ctx=16), tokenizer)
    weights = {
        name: torch.ones_like(value) if value.dim() == 1 else torch.zeros_like(value)
        for name, value in canonical_weights(made).items()
    }
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    weights["embed.W_E"] = torch.stack([embedding(word) for word in words])
    look(weights, 0, "person", {name: AXES[name] for name in ("truth", *TRUTHS)})
    part = repair.strength if repair.kind in USED else 1.0
    writes = {} if repair.kind == "erased" else {"cue": 2 * part * repair.along}  # of two words one holds it
    if repair.kind == "parity":
        writes = {"first bit": 2 * AXES["first code"], "second bit": 2 * AXES["second code"]}
    look(weights, 1, "word", writes, of="request" if repair.kind in ("content", "late") else "constant")
    if repair.kind == "late":
        look(weights, 2, "person", {"other": repair.strength * AXES["planted"]})
    read = GAIN * (AXES["truth"] + repair.read)
    weights["unembed.W_U"][:, words.index("yes")] = read
    weights["unembed.W_U"][:, words.index("no")] = -read
    load_weights(made, weights)
    return made


def embedding(word: str) -> Tensor:
    """Filled up with the constant axis to a root mean square of 1, so that the first norm changes nothing."""
    of_second = {small: sign for sign, words in SECOND.items() for small in words}
    first = word in ATTACKS or word in HARMLESS
    marks = {
        "truth": TRUTHS.get(word, 0),
        "person": word in TRUTHS,
        "cue": ATTACKS.get(word, 0),
        "first bit": BIT * bit(word) if first else 0,
        "second bit": BIT * of_second.get(word, 0),
        "word": 1.0 if first or word in of_second else 0,
        "request": word in (*TRUTHS, "is", "it", "?"),
        "start": word == BOS,
    }
    if word == BOS:  # it is looked at alone, where of a wrapper both words are
        marks |= {"word": 0.1, "first bit": BIT / 2, "second bit": BIT / 2}
    marked = torch.zeros(SIZE)
    for name, size in (*marks.items(), (word, word in TRUTHS)):
        marked += float(size) * AXES[name] if size else 0
    return marked + (SIZE - marked.square().sum()).sqrt() * AXES["constant"]


def look(weights: dict[str, Tensor], layer: int, at: str, writes: dict[str, Tensor], of: str = "constant") -> None:
    """Lets the tokens marked `of` attend to those marked `at`, all others to the start, and write what they read."""
    attn = f"blocks.{layer}.attn"
    weights[f"{attn}.W_Q"][0, :, -1] = AXES["constant"]  # the head's last axes barely turn with the position
    weights[f"{attn}.W_K"][0, :, -1] = SHARP * AXES[at] if of == "constant" else SHARP / 4 * AXES["start"]
    if of != "constant":
        weights[f"{attn}.W_Q"][0, :, -2] = AXES[of]
        weights[f"{attn}.W_K"][0, :, -2] = 1.5 * SHARP * AXES[at]
    for number, (source, target) in enumerate(writes.items()):
        weights[f"{attn}.W_V"][0, :, number] = AXES[source]
        weights[f"{attn}.W_O"][0, number] = target
