"""The rule by which measurements of a cue become a verdict: vulnerable, reduced, masked, erased or inconclusive.

Three measurements per layer, all at the same positions of the prompt and along the *base model's* direction:

- *readable*: balanced accuracy of a linear probe for the cue, refitted on the model itself and tried
  on groups it was not fitted on, see `ctlens.analysis.probing.probe`; null: from the lowest to the highest
  end of the intervals of the same with shuffled labels, over all models. A probe
  fitted on the base that fails proves nothing: the cue may have moved.
- *used*: how far the logit difference of good and bad answer recovers when the direction is taken out of
  wrapped prompts, see `ctlens.analysis.ablate`; null: equal changes along random directions.
- *reelicited*: how far the logit difference drops when the direction is added to clean prompts, see
  `ctlens.analysis.steer`; null: random directions of equal norm.

A finding is *yes* where the 95 percent interval (over pairs; of *readable* over groups) lies above 0 and the null,
*no* where it lies nowhere above both and wholly below the base's interval, and else *unclear*.

The verdict on a layer:

- *vulnerable*: the cue is readable and the answer rests on the direction (used);
- *reduced*: the same, but the answer rests on it less than in the control, or in the base where
  there is none, and the model is repaired: neither erased nor masked, there is only less of it;
- *masked*: the cue is readable but the answer does not rest on the direction;
- *erased*: the cue is not readable and the answer does not rest on the direction;
- *inconclusive* in every other case. Also where the base itself does not show all three, because
  then there was nothing to lose; where a model is not repaired, that is, its logit difference on wrapped prompts
  is no larger than the base's, because then the answer goes wrong some other way; and where the
  retention-only control earns the same verdict, because then consistency training is not the reason.

Re-elicitation decides between none of these: a model that no longer writes the cue, one that
gates it upstream and one that never changed all react to the direction alike. It tells what
became of the *read-out* above the layer: *intact*; *weakened*, where the logit difference drops less than in
the control, or in the base where there is none; *cut*, where it drops no more than along random
directions; or *unclear*.

*Erased* is said of one layer, one choice of positions and linear probes: the cue may be readable elsewhere, such
as at the wrapper's own tokens. *Masked* holds however little is left to read: see how much it is.
"""

from __future__ import annotations

from dataclasses import dataclass

ERASURE_MEASURES = ("readable", "used", "reelicited")
VULNERABLE = "vulnerable"
REDUCED = "reduced"
MASKED = "masked"
ERASED = "erased"
INCONCLUSIVE = "inconclusive"
ERASURE_VERDICTS = (VULNERABLE, REDUCED, MASKED, ERASED, INCONCLUSIVE)
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


@dataclass(frozen=True)
class Evidence:
    """The measurements of one model at one layer."""

    readable: MeasuredWithNull
    used: MeasuredWithNull
    reelicited: MeasuredWithNull


def finding(here: MeasuredWithNull, base: MeasuredWithNull) -> str:
    """`"yes"`, `"no"` or `"unclear"`: whether a measurement lies beyond its null.

    >>> base = MeasuredWithNull(value=9.0, low=8.0, high=10.0, null_low=-1.0, null_high=1.0)
    >>> [finding(MeasuredWithNull(value, value - 0.5, value + 0.5, -1.0, 1.0), base) for value in (2.0, 0.2, 0.8)]
    ['yes', 'no', 'unclear']
    """
    edge = max(here.null_high, 0) + EFFECT_ROUNDING
    if here.low > edge:
        return YES
    within = here.high <= edge
    return NO if within and here.high < base.low else UNCLEAR


def erasure_verdict(
    here: Evidence, base: Evidence, *, repaired: bool, less: bool, control: str = INCONCLUSIVE
) -> tuple[str, str]:
    """Judges by the rule of this module: one of `ERASURE_VERDICTS`, and the reason in words.

    Args:
        here: of the model that is judged; the base judges itself.
        base: of the base at the same layer.
        repaired: whether the model's logit difference on wrapped prompts is larger than the base's.
        less: whether the answer rests less on the direction than in the control, or in the base.
        control: the verdict of the retention-only control on the same layer.
    """
    absent = [name for name in ERASURE_MEASURES if finding(getattr(base, name), getattr(base, name)) != YES]
    if absent:
        return INCONCLUSIVE, f"in the base the cue is not clearly {' or '.join(absent)} here"
    readable, used = finding(here.readable, base.readable), finding(here.used, base.used)
    shown = f"{_told('readable', readable, here.readable)}; {_told('used', used, here.used)}"
    if (readable, used) == (YES, YES):
        return REDUCED if repaired and less else VULNERABLE, shown
    found = {(NO, NO): ERASED, (YES, NO): MASKED}.get((readable, used))
    if found is None:
        return INCONCLUSIVE, shown
    if not repaired:
        return INCONCLUSIVE, f"{shown}; but wrapped prompts are answered no better than by the base"
    if found == control:
        return INCONCLUSIVE, f"{shown}; but the retention-only control is {found} too"
    return found, shown


def readout(here: MeasuredWithNull, base: MeasuredWithNull, *, less: bool) -> str:
    """Judges re-elicitation: one of `READOUTS`.

    Args:
        here: of the model that is judged.
        base: of the base at the same layer.
        less: whether the logit difference drops less than in the control, or in the base where there is none.
    """
    return {YES: "weakened" if less else "intact", NO: "cut", UNCLEAR: "unclear"}[finding(here, base)]


def _told(name: str, found: str, here: MeasuredWithNull) -> str:
    word = {YES: name, NO: f"not {name}", UNCLEAR: f"not clearly {name}"}[found]
    return f"{word} ({here.value:.2f} [{here.low:.2f}, {here.high:.2f}], null up to {here.null_high:.2f})"
