"""KLCT trains the model to predict, after each aligned token, what the reference predicts on the clean prompt.

`L = weight * T^2 * mean_t KL( p_ref(. | clean prompt up to t) || p(. | wrapped prompt up to t) )` in
nats, with both softmaxes at temperature `T`. It compares outputs, as BCT does, at the tokens of an internal
loss, so a comparison can separate the level of a method from its token window. The nearest published losses
are the soft BCT of arXiv 2606.03810, the cross-entropy form at trailing tokens, and the prefill loss
in the code of the stack paper (arXiv 2606.05817), see `ctlens.losses.bct`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ctlens.core.arguments import require_types
from ctlens.core.limits import POSITIVE, SHARE_OF_ALL, require
from ctlens.core.types import LensModel, PerRow
from ctlens.data.alignment import WINDOWS
from ctlens.losses.base import OUTPUT, Forwards, Loss, check_option, moving_target
from ctlens.losses.outputs import OUTPUT_DISTANCES, output_distance


@dataclass(frozen=True)
class KLCT(Loss):
    """KLCT is output consistency: it compares next-token distributions at aligned tokens.

    Attributes:
        window: the alignment window, see `ctlens.data.alignment.align`; `"last"` compares only the
            distributions of the answer's first token.
        weight: factor of the total.
        distance: `"kl"`, or `"cross_entropy"`: the same plus the entropy of the clean side, with
            the same gradient (arXiv 2606.03810).
        temperature: divides the logits of both sides; the loss is multiplied by its square.
        clean: the model whose predictions on the clean prompts are the target: the `"reference"`, or
            `"own"` for the trained model, whose predictions move as it is trained; or a copy that follows it, as of
            losses on activations.
        confidence: leave out tokens whose target gives no answer this probability, see `output_distance`.
        sharpen: divides the target's logits alone, see `output_distance`.
    """

    name: ClassVar[str] = "klct"
    window: str = "shared"
    weight: float = 1.0
    distance: str = "kl"
    temperature: float = 1.0
    clean: str = "reference"
    confidence: float = 0.0
    sharpen: float = 1.0

    def __post_init__(self) -> None:
        require_types(self)
        check_option("alignment window", self.window, WINDOWS)
        check_option("distance of KLCT", self.distance, tuple(OUTPUT_DISTANCES))
        moving_target(self.clean)
        require(POSITIVE, temperature=self.temperature)
        require(POSITIVE, weight=self.weight)
        require(SHARE_OF_ALL, confidence=self.confidence)
        require(POSITIVE, sharpen=self.sharpen)

    @property
    def windows(self) -> tuple[str, ...]:
        """The loss reads its one alignment window."""
        return (self.window,)

    @property
    def clean_side(self) -> str:
        """The predictions of this model on the clean prompts are the target."""
        return self.clean

    @property
    def needs_clean_logits(self) -> bool:
        """True: the logits on the clean prompts are the target."""
        return True

    def hook_names(self, model: LensModel) -> list[str]:
        """Lists no hook point: the loss reads the logits."""
        return []

    def row_values(self, forwards: Forwards, hook_names: Sequence[str]) -> dict[str, PerRow]:
        """Measures the divergence per pair in nats, averaged over aligned tokens; the clean side is detached.

        Raises:
            CtlensError: `forwards` lacks the logits on the clean prompts.
        """
        matched = forwards.batch.matched[self.window]
        values = output_distance(
            "KLCT",
            forwards,
            matched,
            distance=self.distance,
            temperature=self.temperature,
            confidence=self.confidence,
            sharpen=self.sharpen,
        )
        return {OUTPUT: values}
