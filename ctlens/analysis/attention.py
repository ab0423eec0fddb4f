"""How much the last token attends to the wrapper, per layer and head, before and after a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from ctlens import plots
from ctlens.analysis.forward import batches, require_comparable
from ctlens.analysis.result import Result
from ctlens.errors import CtlensError
from ctlens.hooks import capture, resolve
from ctlens.intervals import bootstrap_mean
from ctlens.pairs import Pair
from ctlens.plots import Curve, Figure
from ctlens.types import LensModel, Mask


@dataclass(frozen=True)
class AttentionDiff(Result):
    """Attention mass from the last prompt token to the wrapper's tokens.

    Attributes:
        before, after: `[pair, layer, head]`, each 0 to 1.
    """

    before: Float[np.ndarray, "pair layer head"]
    after: Float[np.ndarray, "pair layer head"]

    def curve(self, side: str = "after") -> Curve:
        """Mean over heads and pairs and its 95 percent bootstrap interval over pairs, `[layer]` each."""
        return bootstrap_mean(getattr(self, side).mean(-1))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and head: mass before, after, their change with its interval, `n` pairs; largest first."""
        change, low, high = bootstrap_mean(self.after - self.before)
        before, after = self.before.mean(0), self.after.mean(0)
        rows = [
            (
                layer,
                head,
                before[layer, head],
                after[layer, head],
                change[layer, head],
                low[layer, head],
                high[layer, head],
            )
            for layer, head in np.ndindex(change.shape)
        ]
        table = pd.DataFrame(rows, columns=["layer", "head", "before", "after", "change", "ci_low", "ci_high"])
        return table.assign(n=len(self.before)).sort_values("change", key=np.abs, ascending=False, ignore_index=True)

    def figure(self) -> Figure:
        """The mass of every head before and after, and the difference."""
        title = "Which heads stop attending from the last token to the wrapper?"
        return plots.attention_heads(self.before.mean(0), self.after.mean(0), title)


def figure(results: dict[str, AttentionDiff], *, subtitle: str | None = None) -> Figure:
    """The mass by layer, for the base and for several trainings, one line each."""
    base = next(iter(results.values())).curve("before")
    curves = {"none": base, **{name: result.curve("after") for name, result in results.items()}}
    return plots.layer_curves(
        curves,
        "How much does the last token attend to the wrapper?",
        y_title="attention mass on the wrapper, mean over heads",
        subtitle=subtitle,
    )


def attention_diff(
    before: LensModel, after: LensModel, pairs: Sequence[Pair], *, batch_size: int = 64, progress: bool = True
) -> AttentionDiff:
    """Attention from the last token of the wrapped prompts to the wrapper, in two models.

    Args:
        before, after: models of one shape, in eval mode.
        pairs: clean and wrapped prompts; the wrapper is what the wrapped one adds to the clean one's message.
        batch_size: pairs a forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare or are in training mode, or a pair's wrapper cannot
            be told from its content.
    """
    require_comparable(before, after)
    names = resolve(before, "pattern")
    chunks: list[tuple[np.ndarray, np.ndarray]] = []
    for _, batch in batches(before, pairs, "shared", batch_size, progress):
        if not batch.wrapper.any(-1).all():
            raise CtlensError("a pair's wrapper cannot be told from its content: leave that pair out.")
        sides = [
            _mass(capture(model, batch.wrapped.tokens, names, grad=False)[1], names, batch.wrapper, batch.last_prompt)
            for model in (before, after)
        ]
        chunks.append((sides[0], sides[1]))
    return AttentionDiff(*(np.concatenate(side) for side in zip(*chunks, strict=True)))


def _mass(
    patterns: dict[str, torch.Tensor], names: Sequence[str], wrapper: Mask, last: torch.Tensor
) -> Float[np.ndarray, "batch layer head"]:
    rows = torch.arange(len(last), device=last.device)
    layers = [(patterns[name][rows, :, last] * wrapper[:, None]).sum(-1) for name in names]
    return torch.stack(layers, 1).cpu().numpy()
