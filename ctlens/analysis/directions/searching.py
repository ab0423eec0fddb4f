"""The direction that matters most to the answer, found by gradients.

A prompt's wrapper moves its state by a difference, wrapped less clean. Taking the part of every prompt's difference
along one direction out of the wrapped states raises the logit difference of good and bad answer by some amount, and the
search looks for the direction, shared by all prompts, where that amount is largest.

For small changes the amount along a unit vector `u` is `-mean((u . difference) (u . gradient))`, a quadratic form,
which projected gradient ascent maximises from random starts. The gradient then is taken anew where that vector was
taken out, and so on. The search starts at both ends, at the wrapped states and at those without any difference, and
keeps the best that it met.

A search always finds something. A vector half along a difference that nothing reads, and half along what the answer is
read from, turns one into the other (Makelov, Lange and Nanda, arXiv 2311.17030). With differences at a right angle to
the gradient the gain is half of their product, with differences along it the whole. So the null of a search is the same
search with the differences turned at random, which have the same lengths and angles but mean nothing to the model.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.analysis.directions.edited_answers import EditedAnswers, adding
from ctlens.core.config import generator

Differences = Float[Tensor, "variant prompt d"]
Units = Float[Tensor, "variant d"]

# Not tuned: on planted models and on the organism, more of either gains less than a hundredth.
_STEPS = 1
_ASCENTS = 40
_STARTS = 3


def part_taken_out(differences: Differences, units: Units) -> Differences:
    """What takes the part of each difference along the unit vector of its variant out, when it is added to a state."""
    along = torch.einsum("vpd,vd->vp", differences, units)
    return -along[..., None] * units[:, None]


@torch.no_grad()
def most_effective(answers: EditedAnswers, hook_name: str, differences: Differences) -> Units:
    """The unit vector, per variant, along which taking the differences out raises the logit difference most.

    Args:
        answers: to the prompts that are searched on.
        hook_name: where the states are changed.
        differences: of these prompts; each variant is a search of its own.
    """
    found = []
    for start in (torch.zeros_like(differences[:1]), -differences):
        gradient = answers.gradients(hook_name, start)
        for _ in range(_STEPS):
            found.append(_steepest(differences, gradient))
            gradient = answers.gradients(hook_name, part_taken_out(differences, found[-1]))
        found.append(_steepest(differences, gradient))
    tried = [answers.log_probabilities(hook_name, adding(part_taken_out(differences, units))) for units in found]
    logit_diffs = np.stack(tried) @ (1, -1)
    best = torch.from_numpy(logit_diffs.mean(-1).argmax(0)).to(differences.device)
    return torch.stack(found)[best, torch.arange(len(differences), device=differences.device)]


def _steepest(differences: Differences, gradient: Float[Tensor, "#variant prompt d"]) -> Units:
    """The unit vectors with the largest gain to first order, by projected gradient ascent from random starts.

    Steps are as long as keeps the largest gain ahead of the largest loss.
    """
    gradient = gradient.expand_as(differences)
    bound = (differences.norm(dim=-1) * gradient.norm(dim=-1)).mean(1)[:, None, None]
    draw = generator(0, "starts of a search")
    starts = torch.randn(_STARTS, differences.shape[-1], generator=draw).to(differences)
    units = starts.expand(len(differences), -1, -1)
    for _ in range(_ASCENTS):
        units = torch.nn.functional.normalize(bound * units + _pull(differences, gradient, units), dim=-1)
    gains = (units * _pull(differences, gradient, units)).sum(-1)
    return units[torch.arange(len(units), device=units.device), gains.argmax(1)]


def _pull(
    differences: Differences, gradient: Differences, units: Float[Tensor, "variant start d"]
) -> Float[Tensor, "variant start d"]:
    """The quadratic form of the gain applied to unit vectors, half the gradient of the gain."""
    at_differences = torch.einsum("vpd,vsd->vsp", differences, units)
    at_gradient = torch.einsum("vpd,vsd->vsp", gradient, units)
    both = torch.einsum("vsp,vpd->vsd", at_differences, gradient) + torch.einsum(
        "vsp,vpd->vsd", at_gradient, differences
    )
    return -both / (2 * differences.shape[1])
