"""Labels: what selectors make of a model's sampled answers, drawn with recorded seeds and kept as JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctlens.auditing.answers import Answerer
from ctlens.auditing.exact import LabelDistribution, by_closed_form, by_every_way
from ctlens.auditing.methods import resolved
from ctlens.auditing.selectors import Selector
from ctlens.auditing.sources import Sampled
from ctlens.core.errors import CtlensError
from ctlens.core.files import write_text
from ctlens.core.public import public
from ctlens.core.reading import read_jsonl
from ctlens.core.types import LensModel
from ctlens.data.inputs import Prompts
from ctlens.data.pairs import Prompt, turns_of
from ctlens.models.adopt import adopt
from ctlens.models.enumeration import Branching

_FIELDS = ("model", "selector", "source", "seed", "prompt", "good", "bad", "samples", "scores", "label")


@dataclass(frozen=True)
class Label:
    """A label is what a selector chose for a prompt, with all that it was chosen from.

    Attributes:
        prompt: what was asked.
        selector: the name of what chose it.
        source: where the samples come from, with its settings.
        seed: of the draws.
        model: the fingerprint of the weights that gave the samples.
        samples, scores: what it was chosen from, and the mean log-probability of each.
        label: the chosen answer; None where the prompt was dropped.
    """

    prompt: Prompt
    selector: str
    source: dict[str, Any]
    seed: int
    model: str
    samples: tuple[str, ...]
    scores: tuple[float, ...]
    label: str | None


def _only_selectors(methods: Sequence[str | Selector], temperature: float) -> list[Selector]:
    """The selectors of names; a regulariser is refused."""
    found = resolved(methods, temperature)
    selectors = [method for method in found if isinstance(method, Selector)]
    if len(selectors) < len(found):
        raise CtlensError("a regulariser trains without labels, so it draws none: name selectors alone.")
    return selectors


@public
def draw_labels(
    model: LensModel,
    prompts: Prompts,
    selectors: Sequence[str | Selector],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 16,
    seed: int = 0,
) -> list[Label]:
    """Draws the labels that selectors make of a model's answers to prompts, each distinct prompt once per selector.

    The samples are those of the model as it is. Selectors over independent samples share them: one with fewer has the
    first of them.

    Args:
        model: in eval mode, with a tokenizer.
        prompts: what is asked.
        selectors: names, see `ctlens.auditing.selector_named`, or selectors.
        temperature: of the samples of those that are named.
        max_new_tokens: length of the longest sample, in tokens.
        seed: decides the samples.

    Raises:
        CtlensError: there is no prompt or no selector, or a selector is unknown or gives what it may not.
    """
    adopt(model)
    if not prompts:
        raise CtlensError("there is no prompt to label: give at least one.")
    answerer = Answerer(model, max_new_tokens)
    distinct = list(dict.fromkeys(prompts))
    made = [labels_of_one(answerer, distinct, selector, seed) for selector in _only_selectors(selectors, temperature)]
    return [label for labels in made for label in labels]


def labels_of_one(answerer: Answerer, prompts: Sequence[Prompt], selector: Selector, seed: int) -> list[Label]:
    """Draws the labels of one selector; the prompts are distinct."""
    labels = []
    for prompt, samples in zip(prompts, selector.source.draw(answerer, prompts, seed), strict=True):
        texts = tuple(sample.text for sample in samples)
        scores = tuple(sample.score for sample in samples)
        chosen = selector.label(prompt, texts, scores)
        labels.append(
            Label(prompt, selector.name, selector.source.described(), seed, answerer.weights, texts, scores, chosen)
        )
    return labels


def label_distributions(
    answerer: Answerer, prompts: Sequence[Prompt], selector: Selector, branching: Branching, seed: int
) -> list[LabelDistribution]:
    """Computes the distribution of each prompt's label; without a closed form and with too many ways, simulates it.

    Raises:
        CtlensError: the answers to a prompt cannot be enumerated.
    """
    found = []
    for prompt, slots in zip(prompts, selector.source.slots(answerer, prompts, branching), strict=True):
        if selector.closed_form is not None and isinstance(selector.source, Sampled):
            shares = selector.closed_form(prompt, slots[0], selector.source.n)
            found.append(by_closed_form(slots[0], shares))
        else:
            found.append(by_every_way(slots, _Choice(selector, prompt), seed))
    return found


@dataclass(frozen=True)
class _Choice:
    """What a selector chooses for one prompt."""

    selector: Selector
    prompt: Prompt

    def __call__(self, samples: Sequence[str], scores: Sequence[float]) -> str | None:
        return self.selector.label(self.prompt, samples, scores)


@public
def save_labels(path: str | Path, labels: Iterable[Label]) -> None:
    """Writes labels as JSONL, from which `load_labels` reads equal labels."""
    write_text(path, "".join(json.dumps(_row(label), ensure_ascii=False) + "\n" for label in labels))


def _row(label: Label) -> dict[str, Any]:
    return {
        "model": label.model,
        "selector": label.selector,
        "source": label.source,
        "seed": label.seed,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in label.prompt.turns],
        "good": label.prompt.good,
        "bad": label.prompt.bad,
        "samples": list(label.samples),
        "scores": list(label.scores),
        "label": label.label,
    }


@public
def load_labels(path: str | Path) -> list[Label]:
    """Reads the labels that `save_labels` wrote.

    Raises:
        CtlensError: the file is missing or damaged, or a label is not among its samples.
    """
    return [_label_of(row, f"{path}, line {number}") for number, row in read_jsonl(path)]


def _label_of(row: dict[str, Any], where: str) -> Label:
    for name in _FIELDS:
        if name not in row:
            raise CtlensError(f"{where}: the field {name!r} is missing: draw the labels again.")
    samples, scores, label = row["samples"], row["scores"], row["label"]
    whole = (
        isinstance(samples, list)
        and isinstance(scores, list)
        and len(samples) == len(scores)
        and all(isinstance(text, str) for text in samples)
        and all(type(score) in (int, float) for score in scores)
        and (label is None or label in samples)
        and isinstance(row["source"], dict)
    )
    if not whole:
        raise CtlensError(f"{where}: the label is not one of its samples with their scores: draw the labels again.")
    return Label(
        Prompt(turns_of(row["prompt"], "prompt", where), row["good"], row["bad"]),
        row["selector"],
        row["source"],
        row["seed"],
        row["model"],
        tuple(samples),
        tuple(float(score) for score in scores),
        label,
    )
