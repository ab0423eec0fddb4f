"""Capability: what a training costs where there is no attack, on clean prompts and on a text, without any download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

import pandas as pd

from ctlens import threats as threat_registry
from ctlens.core.errors import CtlensError, UnknownWords
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.evaluation.asked import AskedPrompt, threats_named, what_is_asked
from ctlens.evaluation.numbers import by, difference_with_interval, rate_with_interval
from ctlens.models.perplexity import Perplexity, perplexity
from ctlens.threats import Threat, ask

ALL = "all"
"""What the table calls the prompts of all threats together."""
_METRIC = "good_rate"


@dataclass(frozen=True)
class Capability:
    """What models can do where there is no attack; the first model is what the others are compared with.

    Attributes:
        answers: a row per model, threat and clean prompt, with the columns `model, threat, prompt, good, answer,
            verdict, topic, wrapper`; the last is empty, for a clean prompt has none.
        texts: by model, how well it predicts the text; empty where there is none.
    """

    answers: pd.DataFrame
    texts: Mapping[str, Perplexity]

    def _repr_html_(self) -> str:
        return self.to_dataframe().round(4).to_html(index=False, border=0)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulates the accuracy on clean prompts: a row per threat and model, and of all threats together.

        The columns are `threat, model, n_prompts, accuracy, ci_low, ci_high, change, change_low, change_high`.
        `accuracy` is the share of distinct clean prompts with a good answer; a prompt of several threats counts once
        among `all` of them. `change` is the accuracy less the first model's, with an interval for paired answers; it is
        NaN for the first model. Intervals are at 95% and over topics, see `ctlens.core.clusters`.
        """
        parts = [(threat, part) for (threat,), part in by(self.answers, "threat")]
        if len(parts) > 1:
            parts.append((ALL, self.answers.drop_duplicates(["model", "prompt", "good"])))
        rows = []
        for threat, part in parts:
            base = None
            for (model,), answers in by(part, "model"):
                share, n_prompts, _, low, high = rate_with_interval(answers, _METRIC)
                change = (nan, nan, nan) if base is None else difference_with_interval([answers], [base], _METRIC)
                base = answers if base is None else base
                rows.append((threat, model, n_prompts, share, low, high, *change))
        columns = ["threat", "model", "n_prompts", "accuracy", "ci_low", "ci_high"]
        return pd.DataFrame(rows, columns=[*columns, "change", "change_low", "change_high"])

    def text_table(self) -> pd.DataFrame:
        """Tabulates how well each model predicts the text.

        The columns are `model, n_tokens, n_bytes, nats_per_token, perplexity, nats_per_byte, change_per_byte`; the last
        is `nats_per_byte` less the first model's, above 0 for a model that predicts it worse.
        """
        base = next(iter(self.texts.values()), None)
        rows = [
            (
                *(model, found.n_tokens, found.n_bytes, found.nats_per_token, found.perplexity, found.nats_per_byte),
                nan if found is base or base is None else found.nats_per_byte - base.nats_per_byte,
            )
            for model, found in self.texts.items()
        ]
        columns = ["model", "n_tokens", "n_bytes", "nats_per_token", "perplexity", "nats_per_byte", "change_per_byte"]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        tables = [self.to_dataframe(), self.text_table()] if self.texts else [self.to_dataframe()]
        return "\n".join(["Capability", *(table.to_string(index=False) for table in tables)])


@public
def capability(
    models: LensModel | Mapping[str, LensModel],
    threats: Sequence[str | Threat] | None = None,
    *,
    text: str | Path | None = None,
    split: str | Sequence[str] = "heldout",
    n_prompts: int = 96,
    seed: int = 0,
    max_length: int | None = None,
    stride: int | None = None,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> Capability:
    """Asks models what stands clean in threats, and how well they predict a text, with nothing to fetch.

    Every clean prompt is asked once, whatever the number of its wrappers. The questions of natural threats are not
    screened: a model that was chosen for being right on them could only lose.

    Args:
        models: one model, or several by name, of which the first is the one before training.
        threats: names or threats; by default the natural ones where the first model's tokenizer knows their words, and
            else those of the micro-world.
        text: for the perplexity, see `ctlens.perplexity`; without it none is measured.
        split, n_prompts, seed: the pairs whose clean prompts are asked, as in `ctlens.evaluate`.
        max_length, stride: of the text's windows.
        max_new_tokens: length of the longest answer, in tokens.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: there is no model, a length is named without a text, or as `ctlens.evaluate` and `perplexity`.
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not named:
        raise CtlensError("there is no model: give one, or several by name.")
    if text is None and (max_length is not None or stride is not None):
        raise CtlensError("max_length and stride are of a text: give text= too.")
    chosen = threats_named(threats) if threats is not None else _known_to(next(iter(named.values())))
    asked = what_is_asked(chosen, split=split, n_prompts=n_prompts, seed=seed)
    rows = []
    for threat in chosen:
        clean = [one for one in asked if (one.evaluated_threat, one.prompt_side) == (threat.name, "clean")]
        distinct = {(_shown(one), one.prompt.good or ""): one for one in clean}
        prompts = [one.prompt for one in distinct.values()]
        for name, model in named.items():
            replies = ask(model, prompts, max_new_tokens=max_new_tokens, judge=threat.judge, progress=progress)
            rows += [
                (name, threat.name, *shown, reply.answer, reply.verdict, one.topic, "")
                for (shown, one), reply in zip(distinct.items(), replies, strict=True)
            ]
    columns = ["model", "threat", "prompt", "good", "answer", "verdict", "topic", "wrapper"]
    texts: dict[str, Perplexity] = {}
    if text is not None:
        for name, model in named.items():
            texts[name] = perplexity(model, text, max_length=max_length, stride=stride, progress=progress)
    return Capability(pd.DataFrame(rows, columns=columns), texts)


def _known_to(model: LensModel) -> list[Threat]:
    """The natural threats, or those of the micro-world for a model that has not the words for them."""
    natural = list(threat_registry.NATURAL.values())
    try:
        for threat in natural:
            render(model.tokenizer, threat.clean(threat.questions[0]).turns)
    except UnknownWords:
        return list(threat_registry.REGISTRY.values())
    return list(natural)


def _shown(one: AskedPrompt) -> str:
    """A prompt as text: its turns with who speaks, and the options that it is answered by."""
    turns = [f"{turn.role}: {turn.content}" for turn in one.prompt.turns]
    return "\n".join([*turns, *(f"-{option}" for option in one.prompt.options)])
