"""The rule by which measurements of a cue become a verdict, one of `ERASURE_VERDICTS`.

All measurements are of one layer, and of the tokens at which states are changed, by default the last one; the name of
each says which they are. `ctlens.analysis.directions.erasure.Erasure` has them as columns by the same names.

- *readable*: balanced accuracy of a probe for the cue, refitted on the model itself and tried on groups it was not
  fitted on, see `ctlens.analysis.probing.probe`; by a linear probe (`ridge`) and by one that is not (`rbf`), at the
  changed tokens and at second positions: the content tokens, or the last one where the content tokens are changed.
  Null: from the lowest to the highest end of the intervals of the same with shuffled labels, over all models. A probe
  fitted on the base that fails proves nothing: the cue may have moved.
- *used*: how far the logit difference of good and bad answer recovers when a direction is taken out of wrapped prompts,
  along three directions: the *base's*, see `ctlens.analysis.ablate`; the model's *own* refitted mean difference of
  wrapped and clean states; and the *searched* one, which a gradient search on half of the clean prompts finds most
  effective, measured on the other half, see `ctlens.analysis.directions.searching`. Null of the first two: equal
  changes along random directions; of the third: equal searches on differences that were turned at random.
- *left*: how far wrapped prompts stay below clean ones in the logit difference when the model's whole difference is
  taken out of the changed tokens, so that what is left rests on other tokens; null: that of *used* along its own.
- *reelicited*: how far the logit difference drops when the base's direction is added to clean prompts, see
  `ctlens.analysis.steer`; null: random directions of equal norm.

A finding is *yes* where the 95 percent interval (over pairs; of *readable* over groups) lies above 0 and the null,
*no* where it lies nowhere above both and wholly below the base's interval, and else *unclear*. Of several probes or
directions, one *yes* is enough, and *no* needs that all are *no* that are *yes* in the base: what finds nothing in the
base has no power to deny. Only what is *left* needs no base to be *no*, for in the base there may be none.

The verdict on a layer:

- *vulnerable*: the answer rests on a direction at the changed tokens (used), and the cue is readable there;
- *reduced*: the same, but the answer rests on its own direction less than in the control, or in the base where
  there is none, and the model is repaired: neither erased nor masked, there is only less of it;
- *masked*: the cue is readable at the changed tokens, but the answer rests on none of the three directions there, and
  nothing is left elsewhere;
- *elsewhere*: the answer rests on none of the three directions at the changed tokens, but it rests on the wrapper at
  other tokens (left), or the cue is read at the second positions alone;
- *erased*: the cue is readable at neither positions, the answer rests on none of the three and nothing is left;
- *inconclusive* in every other case. Also where the base itself does not show all of readable, used along its
  direction and reelicited, because then there was nothing to lose; where a model is masked or erased but not
  repaired, that is, its logit difference on wrapped prompts is no larger than the base's, because then the answer goes
  wrong some other way; and where the retention-only control earns the same verdict, because then consistency training
  is not the reason.

As one *yes* of several is enough, chance makes a cue readable or used more often than one time in twenty, and masked or
erased less often: the rule errs on the side of *vulnerable* and *inconclusive*.

Re-elicitation decides between none of these: a model that no longer writes the cue, one that
gates it upstream and one that never changed all react to the direction alike. It tells what
became of the *read-out* above the layer: *intact*; *weakened*, where the logit difference drops less than in
the control, or in the base where there is none; *cut*, where it drops no more than along random
directions; or *unclear*.

*Erased* is said of one layer, two choices of positions and two kinds of probe: the cue may be readable elsewhere, such
as at the wrapper's own tokens. *Masked* holds however little is left to read: see how much it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

USED_ALONG = ("base", "own", "searched")
"""The directions along which use is measured."""
VULNERABLE = "vulnerable"
REDUCED = "reduced"
MASKED = "masked"
HELD_ELSEWHERE = "elsewhere"
ERASED = "erased"
INCONCLUSIVE = "inconclusive"
ERASURE_VERDICTS = (VULNERABLE, REDUCED, MASKED, HELD_ELSEWHERE, ERASED, INCONCLUSIVE)
READOUTS = ("intact", "weakened", "cut", "unclear")
YES = "yes"
NO = "no"
UNCLEAR = "unclear"
# Effects of an edit that changes nothing differ from 0 by the rounding of forward passes: less than this, in nats.
EFFECT_ROUNDING = 1e-3


@dataclass(frozen=True)
class MeasuredWithNull:
    """A mean with its 95 percent interval, and the lowest and highest end of its null."""

    value: float
    low: float
    high: float
    null_low: float
    null_high: float

    @property
    def edge(self) -> float:
        """The number above which a measurement is beyond its null and 0."""
        return max(self.null_high, 0) + EFFECT_ROUNDING


Measurements = Mapping[str, MeasuredWithNull]
"""Measurements of one thing, by the name of the probe or of the direction."""


@dataclass(frozen=True)
class Evidence:
    """The measurements of one model at one layer.

    Attributes:
        readable: by probe, at the tokens whose states are changed.
        beside: by probe, at the second positions.
        used: by direction, one of `USED_ALONG`.
        left: what other tokens carry.
        reelicited: along the base's direction.
    """

    readable: Measurements
    beside: Measurements
    used: Measurements
    left: MeasuredWithNull
    reelicited: MeasuredWithNull


def finding(here: MeasuredWithNull, base: MeasuredWithNull) -> str:
    """`"yes"`, `"no"` or `"unclear"`: whether a measurement lies beyond its null.

    >>> base = MeasuredWithNull(value=9.0, low=8.0, high=10.0, null_low=-1.0, null_high=1.0)
    >>> [finding(MeasuredWithNull(value, value - 0.5, value + 0.5, -1.0, 1.0), base) for value in (2.0, 0.2, 0.8)]
    ['yes', 'no', 'unclear']
    """
    if here.low > here.edge:
        return YES
    within = here.high <= here.edge
    return NO if within and here.high < base.low else UNCLEAR


def finding_of_any(here: Measurements, base: Measurements) -> str:
    """`"yes"` if any of the measurements is; `"no"` if all are that are `"yes"` in the base; else `"unclear"`."""
    found = {name: finding(here[name], base[name]) for name in here}
    if YES in found.values():
        return YES
    told = {found[name] for name in found if finding(base[name], base[name]) == YES}
    return NO if told == {NO} else UNCLEAR


def erasure_verdict(
    here: Evidence, base: Evidence, *, repaired: bool, less: bool, control: str = INCONCLUSIVE
) -> tuple[str, str]:
    """Judges by the rule of this module: one of `ERASURE_VERDICTS`, and the reason in words.

    Args:
        here: of the model that is judged; the base judges itself.
        base: of the base at the same layer.
        repaired: whether the model's logit difference on wrapped prompts is larger than the base's.
        less: whether the answer rests less on the model's own direction than in the control, or in the base.
        control: the verdict of the retention-only control on the same layer.
    """
    absent = _absent(base)
    if absent:
        return INCONCLUSIVE, f"in the base the cue is not clearly {' or '.join(absent)} here"
    readable = finding_of_any(here.readable, base.readable)
    used = finding_of_any(here.used, base.used)
    shown = f"{_told('readable', readable, here.readable)}; {_told('used', used, here.used)}"
    if (readable, used) == (YES, YES):
        return REDUCED if repaired and less else VULNERABLE, shown
    if used != NO:
        return INCONCLUSIVE, shown
    beside = _beside(here, base)
    left = _left(here.left)
    shown += (
        f"; {_told('readable at the second positions', beside, here.beside)}; {_told('left', left, {'': here.left})}"
    )
    found = _unused(readable, beside, left)
    if found in (MASKED, ERASED) and not repaired:
        return INCONCLUSIVE, f"{shown}; but wrapped prompts are answered no better than by the base"
    if found == control != INCONCLUSIVE:
        return INCONCLUSIVE, f"{shown}; but the retention-only control is {found} too"
    return found, shown


def _absent(base: Evidence) -> list[str]:
    """What the base does not clearly show, of all that a trained model could lose."""
    shown = {
        "readable": finding_of_any(base.readable, base.readable),
        "used": finding(base.used["base"], base.used["base"]),
        "reelicited": finding(base.reelicited, base.reelicited),
    }
    return [name for name, found in shown.items() if found != YES]


def _beside(here: Evidence, base: Evidence) -> str:
    """The finding at the second positions, where the cue need not be readable in the base."""
    found = finding_of_any(here.beside, base.beside)
    return NO if found == UNCLEAR and finding_of_any(base.beside, base.beside) != YES else found


def _left(left: MeasuredWithNull) -> str:
    if left.low > left.edge:
        return YES
    return NO if left.high <= left.edge else UNCLEAR


def _unused(readable: str, beside: str, left: str) -> str:
    """The verdict where the answer rests on no direction at the changed tokens."""
    if left == YES:
        return HELD_ELSEWHERE
    if left == UNCLEAR:
        return INCONCLUSIVE
    if readable == NO:
        return {YES: HELD_ELSEWHERE, NO: ERASED, UNCLEAR: INCONCLUSIVE}[beside]
    return MASKED if readable == YES else INCONCLUSIVE


def readout(here: MeasuredWithNull, base: MeasuredWithNull, *, less: bool) -> str:
    """Judges re-elicitation: one of `READOUTS`.

    Args:
        here: of the model that is judged.
        base: of the base at the same layer.
        less: whether the logit difference drops less than in the control, or in the base where there is none.
    """
    return {YES: "weakened" if less else "intact", NO: "cut", UNCLEAR: "unclear"}[finding(here, base)]


def _told(name: str, found: str, here: Measurements) -> str:
    word = {YES: name, NO: f"not {name}", UNCLEAR: f"not clearly {name}"}[found]
    numbers = [
        f"{which} {one.value:.2f} [{one.low:.2f}, {one.high:.2f}], null up to {one.null_high:.2f}".strip()
        for which, one in here.items()
    ]
    return f"{word} ({', '.join(numbers)})"
