"""A result of each analysis that no notebook draws: `python figures/analyses.py` computes them anew, in minutes.

They are of the shipped organism and of trainings of it against sycophancy, on few pairs: they show what a figure looks
like and support no finding. The page of the analysis draws the result and shows the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ctlens as ct
from ctlens.analysis import Result
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt

HELD = Path(__file__).parent / "data" / "analyses"
N_PAIRS = 32


@dataclass(frozen=True)
class Scene:
    """What the analyses are given.

    Attributes:
        base: the organism.
        trained: by label, trained with AttCT and with BCT.
        models: these beside the organism and retention alone.
        pairs: of the trainings.
        heldout: with new items and wrapper texts.
        neutral: ordinary requests.
    """

    base: LensModel
    trained: Mapping[str, LensModel]
    models: Mapping[str, LensModel]
    pairs: Sequence[Pair]
    heldout: Sequence[Pair]
    neutral: Sequence[Prompt]


def scene() -> Scene:
    """Trains the models."""
    base = ct.load_organism()
    threat = ct.threats.get("sycophancy")
    neutral = threat.neutral(128)
    losses = {"attct": ct.AttCT(), "bct": ct.BCT(), "retention": []}
    found = {name: ct.train(base, threat.pairs(256), loss, retain=neutral).model for name, loss in losses.items()}
    trained = {name: found[name] for name in ("attct", "bct")}
    heldout = threat.pairs(N_PAIRS, split="heldout")
    return Scene(base, trained, {"base": base, **found}, threat.pairs(N_PAIRS), heldout, neutral)


def saliency_agreement(of: Scene) -> Result:
    return ct.analysis.saliency_agreement(of.models, of.heldout)


def boundary_direction(of: Scene) -> Result:
    return ct.analysis.boundary_direction(of.base, of.trained, of.pairs, of.heldout)


def head_curve(of: Scene) -> Result:
    return ct.analysis.head_curve(of.trained["attct"], of.base, of.heldout)


def mediation(of: Scene) -> Result:
    return ct.analysis.mediation(of.base, of.heldout, trained=of.trained["attct"])


def cross_loss(of: Scene) -> Result:
    return ct.analysis.cross_loss(of.base, of.trained, of.heldout)


def logit_attribution(of: Scene) -> Result:
    return ct.analysis.logit_attribution({"base": of.base, **of.trained}, of.heldout)


def attribution_agreement(of: Scene) -> Result:
    approximate = ct.analysis.attribution_patch(of.base, of.heldout, site="z", direction="denoising")
    exact = ct.analysis.patch(of.base, of.heldout, site="z", direction="denoising")
    return ct.analysis.attribution_agreement(approximate, exact)


def path_patch(of: Scene) -> Result:
    return ct.analysis.path_patch(of.base, of.heldout, receivers="logits", direction="denoising")


def joint_patch(of: Scene) -> Result:
    most = ct.analysis.patch(of.base, of.heldout, site="z", direction="denoising", positions="all").top(3)
    heads = [(f"blocks.{layer}.attn.hook_z", head) for layer, head in zip(most["layer"], most["head"], strict=True)]
    return ct.analysis.joint_patch(of.base, of.heldout, heads, direction="denoising")


def best_of_n(of: Scene) -> Result:
    several = ct.threats.get("sycophancy").pairs(256, split="heldout")
    return ct.analysis.best_of_n(of.models, several)


def embedding_attack(of: Scene) -> Result:
    return ct.analysis.embedding_attack(of.models, of.heldout)


def relearn(of: Scene) -> Result:
    return ct.analysis.relearn(of.models, of.pairs, of.heldout, benign=of.neutral)


def interpolation(of: Scene) -> Result:
    return ct.analysis.interpolation(of.base, of.trained["attct"], of.heldout)


def update_rank(of: Scene) -> Result:
    return ct.analysis.update_rank(of.base, of.trained["attct"])


def trajectory(of: Scene) -> Result:
    line = ct.analysis.WeightLine(of.base, of.trained["bct"])
    return ct.analysis.trajectory(line, of.heldout, "bad_rate")


def text_diff(of: Scene) -> Result:
    models = {name: model for name, model in of.models.items() if name != "base"}
    return ct.analysis.text_diff(of.base, models, of.neutral, twin="retention")


def crosscoder(of: Scene) -> Result:
    texts = [prompt for pair in (*of.pairs, *of.heldout) for prompt in (pair.clean, pair.wrapped)]
    texts += of.neutral
    return ct.analysis.crosscoder(of.base, of.trained["bct"], texts, "blocks.2.hook_resid_post", n_latents=192)


class Coordinates:
    """Coordinates is the plainest dictionary: a feature for either sign of every coordinate of the stream."""

    def encode(self, x: Tensor, /) -> Tensor:
        """How far a state lies to either side of 0, `[..., 2 d]`."""
        return torch.cat([x, -x], -1).relu()

    def decode(self, x: Tensor, /) -> Tensor:
        """The state again."""
        above, below = x.chunk(2, -1)
        return above - below


def feature_shift(of: Scene) -> Result:
    features = ct.analysis.Features(Coordinates(), "blocks.2.hook_resid_post")
    return ct.analysis.feature_shift(of.base, of.trained["bct"], of.heldout, features)


def feature_patch(of: Scene) -> Result:
    features = ct.analysis.Features(Coordinates(), "blocks.2.hook_resid_post")
    moved = ct.analysis.feature_shift(of.base, of.trained["bct"], of.heldout, features)
    most = moved.to_dataframe()["feature"].tolist()[:6]
    return ct.analysis.feature_patch(of.base, of.heldout, features, most, source=of.trained["bct"])


def verbalisation(of: Scene) -> Result:
    reasoned = ct.organism.give_reasons(of.base)
    return ct.analysis.verbalisation({"base": reasoned}, of.heldout, ct.organism.by_reason)


SHOWN = {
    found.__name__: found
    for found in (
        saliency_agreement,
        boundary_direction,
        head_curve,
        mediation,
        cross_loss,
        logit_attribution,
        attribution_agreement,
        path_patch,
        joint_patch,
        best_of_n,
        embedding_attack,
        relearn,
        interpolation,
        update_rank,
        trajectory,
        text_diff,
        crosscoder,
        feature_shift,
        feature_patch,
        verbalisation,
    )
}


if __name__ == "__main__":
    HELD.mkdir(exist_ok=True)
    seen = scene()
    for name, analyse in SHOWN.items():
        analyse(seen).save(HELD / f"{name}.safetensors")
