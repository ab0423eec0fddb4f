"""A share of answers with its interval, as every table shows it: 84% [76–90]."""

from __future__ import annotations

from math import isnan, nan
from typing import NamedTuple

from ctlens.core.stats import difference


class Rate(NamedTuple):
    """A share of answers (0 to 1) with its 95% interval and its prompts; NaN where not measured.

    Attributes:
        value, low, high: the share and the ends of its interval; these are NaN with too few topics or wrapper texts.
        n_prompts: how many there are.
        n_effective: how many independent prompts would tell the share as exactly.
    """

    value: float
    low: float
    high: float
    n_prompts: int
    n_effective: float

    @property
    def percent(self) -> str:
        """The share as a percentage."""
        return "–" if isnan(self.value) else f"{self.value:.0%}"

    @property
    def interval(self) -> str:
        """The ends of the interval, in percent, in brackets."""
        if isnan(self.value):
            return ""
        return "[too few]" if isnan(self.low) else f"[{100 * self.low:.0f}–{100 * self.high:.0f}]"

    def __str__(self) -> str:
        return f"{self.percent} {self.interval}".strip()

    def against(self, other: Rate) -> str:
        """Says how this share compares with an independent one.

        They differ when the 95% interval of the difference (Newcombe's) leaves out 0; the answers
        are taken as independent, which is cautious for two models on the same prompts.
        """
        if isnan(self.low) or isnan(other.low):
            return "not compared with"
        low, high = difference(self.value, (self.low, self.high), other.value, (other.low, other.high))
        if high < 0:
            return "lower than"
        return "higher than" if low > 0 else "not distinguishable from"


NOT_MEASURED = Rate(nan, nan, nan, 0, nan)
