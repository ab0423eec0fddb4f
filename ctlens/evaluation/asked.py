"""What an evaluation asks: every prompt of every side, with what is known of it beside the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctlens import threats as threat_registry
from ctlens.core.errors import CtlensError
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import PROMPT_SIDES, Pair, Prompt, clusters_of, short_digest
from ctlens.evaluation.result import OWN_PAIRS
from ctlens.threats import Threat


@dataclass(frozen=True)
class AskedPrompt:
    """One prompt of an evaluation, with what its row of the outcomes says beside the answer.

    Attributes:
        evaluated_threat, split: whose prompt it is; of a user's own pairs `OWN_PAIRS` and empty, if no threat is named.
        prompt_side: `"wrapped"`, `"clean"` or `"benign"`.
        item: the number of its pair among those of the threat and split.
        pair: a digest of the pair's prompts and answers.
        kind, strength: labels of the pair.
        topic, wrapper: which pairs go together in an interval.
        prompt: what the model is asked, with its good and bad answer.
    """

    evaluated_threat: str
    split: str
    prompt_side: str
    item: int
    pair: str
    kind: str
    strength: int
    topic: str
    wrapper: str
    prompt: Prompt

    @property
    def name(self) -> str:
        """A name of its own among the prompts of an evaluation, such as `sycophancy-heldout-wrapped-3`."""
        return "-".join(filter(None, (self.evaluated_threat, self.split, self.prompt_side, str(self.item))))

    @property
    def known(self) -> dict[str, str | int]:
        """What its row of the outcomes says beside the answer, by column."""
        return {name: value for name, value in vars(self).items() if name != "prompt"}


def what_is_asked(
    threats: Sequence[Threat],
    pairs: Pairs | None = None,
    *,
    split: str | Sequence[str] = "heldout",
    n_prompts: int = 96,
    seed: int = 0,
) -> list[AskedPrompt]:
    """Lists the prompts of threats, or of a user's own pairs: by threat and split, then by side, then by pair.

    Args:
        threats: the threats; with `pairs` at most one, whose name and metrics the pairs get.
        pairs: the user's own.
        split, n_prompts, seed: as of `ctlens.evaluate`.

    Raises:
        CtlensError: as `ctlens.evaluate` does, for what has to do with the pairs.
    """
    if pairs is None:
        splits = [split] if isinstance(split, str) else split
        groups = {(one.name, name): one.pairs(n_prompts, split=name, seed=seed) for one in threats for name in splits}
    else:
        groups = {(_name_of_own(threats), ""): list(pairs)}
    asked = [one for (name, of), group in groups.items() for one in _of_group(name, of, group)]
    if not asked:
        raise CtlensError("there is nothing to evaluate: name at least one split.")
    return asked


def _of_group(threat: str, split: str, pairs: Sequence[Pair]) -> list[AskedPrompt]:
    """The prompts of one threat and split."""
    known = [_known(pair) for pair in pairs]
    return [
        AskedPrompt(threat, split, prompt_side, item, *known[item], prompt)
        for prompt_side in PROMPT_SIDES
        for item, pair in enumerate(pairs)
        if (prompt := pair.side(prompt_side)) is not None
    ]


def _name_of_own(threats: Sequence[Threat]) -> str:
    """Finds the threat name of the user's own pairs: the threat whose metrics they get, or `OWN_PAIRS`."""
    names = [threat.name for threat in threats]
    if len(names) > 1:
        raise CtlensError(f"pairs of your own get the metrics of one threat: name one of {', '.join(names)}.")
    return names[0] if names else OWN_PAIRS


def _known(pair: Pair) -> tuple[str, str, int, str, str]:
    """Makes the values of the columns `pair`, `kind`, `strength`, `topic` and `wrapper`."""
    strength = pair.labels.get("strength", "0")
    if not str(strength).isdecimal():
        raise CtlensError(
            f"the label 'strength' of a pair is {strength!r}, not a whole number: write it as '2', or leave it out."
        )
    topic, wrapper = clusters_of(pair)
    digest = short_digest(pair.clean, pair.wrapped, pair.benign)
    return digest, pair.labels.get("kind", ""), int(strength), topic, wrapper


def threats_named(threats: Sequence[str | Threat] | None, pairs: Pairs | None = None) -> list[Threat]:
    """The threats of these names, or threats themselves; by default all of the micro-world, unless there are pairs.

    Raises:
        CtlensError: a threat is unknown, or there are neither threats nor pairs.
    """
    if threats is not None and not threats and pairs is None:
        raise CtlensError("there are no threats: name at least one, or leave it out to ask all of the micro-world.")
    named = [threat if isinstance(threat, Threat) else threat_registry.get(threat) for threat in threats or ()]
    return named if named or pairs is not None else list(threat_registry.REGISTRY.values())
