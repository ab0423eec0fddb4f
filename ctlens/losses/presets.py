"""The published definitions of each method as losses of this package, and the table that compares them.

Two papers and two code bases train by the same names and mean different windows, layers, distances
and targets. A preset is the loss that computes a source's own formula at aligned tokens; its note
says which parts of the source lie outside a loss, cannot be had, or could not be established.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd

from ctlens.core.config import to_dict
from ctlens.losses.act import ACT
from ctlens.losses.attct import AttCT
from ctlens.losses.attmass import AttMass
from ctlens.losses.base import OUTPUT, InternalLoss, Loss
from ctlens.losses.bct import BCT, DISTRIBUTIONS
from ctlens.losses.klct import KLCT
from ctlens.losses.mlpct import MLPCT
from ctlens.losses.opct import OPCT
from ctlens.losses.rmct import RMCT
from ctlens.losses.subact import SubACT

OURS = "ctlens"
SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "irpan": "Irpan et al. 2025, *Consistency Training Helps Stop Sycophancy and Jailbreaks* (arXiv 2510.27062), "
        "which has no public code",
        "stack": "*Consistency Training Along the Transformer Stack* (arXiv 2606.05817), by its code (c-wei/AttCT)",
        "ctm": "the code of rate-matching consistency training (sohaibimran7/consistency-training-methods), with the "
        "options that it has by default",
        "opct": "*On-Policy Consistency Training* (arXiv 2605.21834), by its code "
        "(kristinafuji/on-policy-consistency-training)",
        "trasn": "Cao 2026, trait-invariant refusal (arXiv 2608.11705)",
        "aisi": "*Consistency Training Can Entrench Misalignment* (arXiv 2606.03810), by its code "
        "(AI-Safety-Institute/consistency-misalignment)",
        OURS: "the defaults of this package; [docs/divergences.md](divergences.md) says why",
    }
)
"""The source that each name stands for. With an ending, as in `stack-jailbreak`, it is another loss of that source."""

_SLICED = (
    "The code slices both sides by the length of the clean content, which it finds by text, and compares no tokens."
)
_LAST_TOKENS = (
    "The code compares as many last tokens as the shorter side has, answers included, whatever they hold, and averages "
    "over the tokens of a batch."
)
_POST_NORM = "HuggingFace's hidden_states, whose last is after the final norm."
_SAID_BY_NO_OPTION = {
    "rmct": "squared gap of rates",
    "opct": "kl, reversed",
    "dpo": "preference",
    "f2c": "cross_entropy and kl",
    "attmass": "mass",
    "subact": "squared, over the clean norm",
}
_OTHER_COLUMNS = ("weight", "window", "layers", "final_norm", "layer_weights", "gap", "clean", "distance", "site")


@dataclass(frozen=True)
class Published:
    """Published is a loss as a source defines it.

    Attributes:
        loss: the loss, with the source's options.
        note: the parts of the source's definition that the loss leaves out.
    """

    loss: Loss
    note: str


PUBLISHED: Mapping[tuple[str, str], Published] = MappingProxyType(
    {
        ("act", "irpan"): Published(
            ACT(window="suffix", weight=1e-4),
            "Weight as the stack code reports it. Whether the last layer is read after the final norm could not be "
            "established: before it here. Only attention weights are trained.",
        ),
        ("act", "stack"): Published(
            ACT(window="suffix", weight=1e-4, final_norm=True),
            f"{_POST_NORM} Weight for Llama; 5e-5 for Gemma and Qwen. Without a common suffix the code takes the "
            "content; here the pair is dropped.",
        ),
        ("act", "stack-frustration"): Published(
            ACT(distance="mse", window="suffix", weight=0.1, final_norm=True),
            f"{_POST_NORM} For Gemma 3 27B, where the sum over d_model diverged.",
        ),
        ("act", "ctm"): Published(
            ACT(window="suffix", final_norm=True, weight=1.0),
            f"{_POST_NORM} A pair without a common suffix is refused.",
        ),
        ("act", "aisi"): Published(
            ACT(distance="mse", window="suffix", weight=1e-4, clean="own"),
            f"{_LAST_TOKENS} Earlier versions took hidden_states, the embedding included.",
        ),
        ("subact", "trasn"): Published(
            SubACT(layers="middle", weight=1.0),
            "At one layer; which one could not be established: the middle one here. The subspace is that of mean "
            "shifts per trait on harmful prompts; as many benign prompts are trained at equal weight, and adapters of "
            "rank 16.",
        ),
        ("mlpct", "stack"): Published(
            MLPCT(window="content", weight=1.0),
            f"{_SLICED} Its configs also normalise the states, which a cosine does not see.",
        ),
        ("mlpct", "ctm"): Published(MLPCT(window="content", weight=1.0), _SLICED),
        ("attct", "stack"): Published(AttCT(window="content", weight=1.0), _SLICED),
        ("attct", "stack-exponential"): Published(
            AttCT(window="content", weight=1.0, layer_weights="exponential"),
            f"{_SLICED} Called a decay in the code, and grows with depth from 0 at the first layer.",
        ),
        ("attct", "stack-last-quarter"): Published(
            AttCT(window="content", weight=1.0, layers="last_quarter"),
            f"{_SLICED} The code rounds the first layer down, so it has one layer more where 4 does not divide "
            "their number.",
        ),
        ("attct", "stack-jailbreak"): Published(
            AttCT(distance="mse", heads="mean", window="content", weight=1.0),
            f"{_SLICED} In the jailbreak configs of all five models; the paper's text has the divergence of each head.",
        ),
        ("attct", "stack-l2"): Published(
            AttCT(distance="mse", window="content", weight=1.0), f"{_SLICED} The method's first form."
        ),
        ("attct", "ctm"): Published(AttCT(window="content", weight=1.0), _SLICED),
        ("bct", "irpan"): Published(
            BCT(),
            "Targets are the model's own answers to the clean prompts. How they are decoded, and whether prompt tokens "
            "are trained, could not be established: greedy and the answer alone, as here.",
        ),
        ("bct", "stack"): Published(
            BCT(targets="sampled", prompt=True, tail=True),
            "The code trains on whole rendered conversations, with the template's line break behind the answer. The "
            "mean is over all tokens of a batch of two. Its runs mix in instruction data.",
        ),
        ("bct", "stack-frustration"): Published(
            BCT(tail=True), "Targets are calm answers that another model wrote: give them as the pairs' targets."
        ),
        ("bct", "stack-prefill"): Published(
            BCT(targets="prefill", early=True),
            "The answer to a whole prefill is not trained. The mean is over all positions of a batch. A tenth of a "
            "cross-entropy on refusals is added.",
        ),
        ("bct", "ctm"): Published(
            BCT(), "Targets at temperature 0 unless told otherwise. The mean is over all tokens of a batch."
        ),
        ("bct", "aisi"): Published(
            KLCT(window="suffix", distance="cross_entropy", clean="own"),
            f"{_LAST_TOKENS} Soft targets at temperature 1.",
        ),
        ("rmct", "ctm"): Published(
            RMCT(weight=1.0, rollouts=128, standardise="per_item", clean="own"),
            "The sum over tokens is divided by all answer tokens of a batch; 4 prompts per step, and a KL to the base "
            "of weight 0.05. Its options of an anchor, a gate on the gap's error and PPO are left out.",
        ),
        ("opct", "opct"): Published(
            OPCT(temperature=0.7),
            "64 prompts of 4 answers, up to 2,048 tokens. The code corrects for earlier steps' answers by importance "
            "sampling or PPO; here each batch of answers serves one step. Whether it corrects for the sampling "
            "temperature could not be established: not here.",
        ),
        ("opct", "ctm"): Published(
            OPCT(weight=1.0, temperature=0.7), "As in `opct`, with half its factor of the advantages."
        ),
        ("attmass", "stack"): Published(
            AttMass(window="content", weight=1.0, per_key=True, outside=True),
            "All but the content is wrapper, the BOS and the chat frame included.",
        ),
        ("attout", "stack"): Published(
            ACT(distance="mse", window="content", weight=1.0, final_norm=True),
            f"Named attention output, but an ACT: it compares {_POST_NORM} {_SLICED}",
        ),
    }
)
"""Every published loss, by its method and its source."""


def page(table: pd.DataFrame) -> str:
    """Writes the table of `ctlens.losses.table` as a Markdown page, with the sources."""
    rows = [" | ".join(f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in row) for row in table.values]
    lines = [
        "# The losses, side by side",
        "",
        "What trains under one name differs by source. `ct.losses.preset(method, source)` is a row of this table as a "
        "loss, `ct.losses.table()` the table. A preset computes its source's formula at aligned tokens, averaged over "
        "the tokens of a pair and then over pairs; the note says what of the source lies outside a loss or could not "
        "be established. *Loss* names the class, which explains its options.",
        "",
        *(f"- `{source}`: {explained}." for source, explained in SOURCES.items()),
        "",
        f"| {' | '.join(table.columns)} |",
        f"|{'---|' * len(table.columns)}",
        *(f"| {row} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def described(loss: Loss) -> dict[str, Any]:
    """Fills the columns of the table that follow from the loss itself.

    >>> described(ACT(window="suffix", final_norm=True))["layers"]
    'all, the last after the final norm'
    """
    options = to_dict(loss)
    shown = {name: value for name, value in options.items() if name not in _OTHER_COLUMNS and value is not None}
    return {
        "loss": loss.name,
        "hook point": loss.point if isinstance(loss, InternalLoss) else OUTPUT,
        "window": options.get("window", ""),
        "layers": _layers(options),
        "distance": _distance(loss, options),
        "options": ", ".join(f"{name}={value}" for name, value in shown.items()),
        "layer weights": _layer_weights(options),
        "clean side": loss.clean_side if loss.needs_clean_activations else "none",
        "tokens": _tokens(loss, options),
        "weight": loss.weight,
    }


def _layers(options: Mapping[str, Any]) -> str:
    layers = str(options.get("layers", ""))
    return f"{layers}, the last after the final norm" if options.get("final_norm") else layers


def _layer_weights(options: Mapping[str, Any]) -> str:
    weights = str(options.get("layer_weights", ""))
    return f"{weights}, relative to the gap" if options.get("gap") else weights


def _distance(loss: Loss, options: Mapping[str, Any]) -> str:
    if isinstance(loss, BCT):
        return "kl" if loss.targets in DISTRIBUTIONS else "cross_entropy"
    return options.get("distance", _SAID_BY_NO_OPTION.get(loss.name, ""))


def _tokens(loss: Loss, options: Mapping[str, Any]) -> str:
    if isinstance(loss, BCT):
        answer = "prefill" if loss.targets == "prefill" else "answer"
        return f"prompt and {answer}" if loss.prompt else answer
    if loss.answers and "window" not in options:
        return "sampled answers" if loss.answers == "rollouts" else "answer"
    return "answer" if options.get("window") == "answer" else "prompt"
