"""The sources' formulas of the presets on internals, on one pair as the published codes see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ctlens.data.batch import EncodedPair
from helpers.reference import aisi, irpan, stack

CONTENT = "Which term best describes the disease?"
HINT = "I may be in the minority here, but I don't think it's right. "


@dataclass(frozen=True)
class Raw:
    """One pair as the published codes see it: by layer, `[token, d]` or `[head, q, k]`, clean and wrapped."""

    blocks: tuple[list[Tensor], list[Tensor]]
    hidden: tuple[list[Tensor], list[Tensor]]
    mlp: tuple[list[Tensor], list[Tensor]]
    attention: tuple[list[Tensor], list[Tensor]]
    suffix: int
    content: stack.Content


def act_of_the_code(weight: float, mse: bool = False) -> Callable[[Raw], float]:
    return lambda raw: stack.act(*raw.hidden, raw.suffix, weight, mse)


def jsd(**options: object) -> Callable[[Raw], float]:
    return lambda raw: stack.attct_jsd(*raw.attention, raw.content, 1.0, **options)


def mse(average_heads: bool) -> Callable[[Raw], float]:
    return lambda raw: stack.attct_mse(*raw.attention, raw.content, 1.0, average_heads)


def mlpct(raw: Raw) -> float:
    return stack.mlpct(*raw.mlp, raw.content, 1.0)


RESTATED: dict[tuple[str, str], Callable[[Raw], float]] = {
    ("act", "irpan"): lambda raw: irpan.act(*raw.blocks, raw.suffix, 1e-4),
    ("act", "stack"): act_of_the_code(1e-4),
    ("act", "stack-frustration"): act_of_the_code(0.1, mse=True),
    ("act", "ctm"): act_of_the_code(1.0),
    ("act", "aisi"): lambda raw: aisi.act(*raw.blocks, raw.suffix, 1e-4),
    ("mlpct", "stack"): mlpct,
    ("mlpct", "ctm"): mlpct,
    ("attct", "stack"): jsd(),
    ("attct", "stack-exponential"): jsd(layer_weights="exponential_decay"),
    ("attct", "stack-last-quarter"): lambda raw: jsd(first_layer=3 * len(raw.blocks[0]) // 4)(raw),
    ("attct", "stack-jailbreak"): mse(average_heads=True),
    ("attct", "stack-l2"): mse(average_heads=False),
    ("attct", "ctm"): jsd(),
    ("attout", "stack"): lambda raw: stack.attention_output(*raw.hidden, raw.content, 1.0),
}


def windows(row: EncodedPair) -> tuple[int, stack.Content]:
    """The suffix by comparing token ids from the end, and the content by text search and character offsets."""
    suffix = 0
    while row.clean.ids[-1 - suffix] == row.wrapped.ids[-1 - suffix]:
        suffix += 1
    starts = []
    lengths = []
    for side in (row.clean, row.wrapped):
        begin = side.text.index(CONTENT)
        inside = [i for i, (left, right) in enumerate(side.offsets) if right > begin and left < begin + len(CONTENT)]
        starts.append(inside[0])
        lengths.append(len(inside))
    assert lengths[0] == lengths[1]
    return suffix, stack.Content(*starts, lengths[0])
