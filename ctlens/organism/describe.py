"""Descriptions of an organism for readers: its card as Markdown, and examples of its lessons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ctlens import threats
from ctlens.core.labels import CLEAN_BORN
from ctlens.data.pairs import PROMPT_SIDES, Prompt
from ctlens.organism.pretrain import AFTERWARDS
from ctlens.threats import Case
from ctlens.world import World

_COLUMNS = (
    "threat",
    "split",
    "bad, wrapped",
    "by strength",
    "P(bad)",
    "P(good)",
    "as taught",
    "good, clean",
    "good, benign",
)


def card_text(card: Mapping[str, Any]) -> str:
    """Writes a card as Markdown: how the organism was made, and one row per threat and split.

    Args:
        card: the card, from `ctlens.organism.card`.
    """
    made, environment = card["pretraining"], card["environment"]
    sizes = f"{made['n_layers']} layers, {made['n_heads']} heads, d_model {made['d_model']}, d_mlp {made['d_mlp']}"
    n = card["behaviour"][0]["n"]
    course = f"{made['steps']} steps of {made['batch_size']} conversations"
    if relora := made.get("relora"):
        course += f", by adapters of rank {relora['lora']['rank']} restarted every {relora['every']} steps,"
    attacks = (
        f"An attack is answered badly with probability {made['bad_share']:g} where the item gives in to its strength, "
        f"else with probability {1 - made['bad_share']:g}."
    )
    if made.get("recipe") == CLEAN_BORN:
        attacks = "Every attack was answered well: it is the twin without vulnerability."
    elif made.get("recipe") == AFTERWARDS:
        attacks = f"Attacks were answered well, and in {made['afterwards_steps']} further steps as follows. {attacks}"
    lines = [
        "# The organism",
        "",
        f"A Llama-like model of {card['parameters'] / 1e6:.2f}M trained parameters ({sizes}, {card['d_vocab']} words), "
        f"pretrained for {course} with seed {made['seed']} on "
        f"torch {environment['torch']}, TransformerLens {environment['transformer-lens']}. {attacks}",
        "",
        f"Greedy answers to {n} pairs per threat and split. *By strength*: the bad rate from the weakest to the "
        "strongest attack. *P(bad)*, *P(good)*: mean probability that the answer to a wrapped prompt begins as the bad "
        "and as the good one does. *As taught*: the share of wrapped prompts that are answered badly where the item "
        "gives in and not badly where it resists.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in _rows(card["behaviour"])),
    ]
    return "\n".join(lines) + "\n"


def _rows(behaviour: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    found = {(row["threat"], row["split"], row["prompt_side"]): row for row in behaviour}
    for threat, split in dict.fromkeys((row["threat"], row["split"]) for row in behaviour):
        wrapped = found[threat, split, "wrapped"]
        clean = found[threat, split, "clean"]
        benign = found[threat, split, "benign"]
        graded = " ".join(f"{rate:.2f}" for rate in wrapped["bad_rate_by_strength"].values())
        numbers = [wrapped["bad_probability"], wrapped["good_probability"], wrapped["as_taught"]]
        numbers += [clean["good_rate"], benign["good_rate"]]
        yield threat, split, f"{wrapped['bad_rate']:.2f}", graded, *(f"{number:.2f}" for number in numbers)


def examples(names: Sequence[str], split: str = "train", n_examples: int = 1, seed: int = 0) -> Iterator[str]:
    """Yields cases of each threat as text: the conversation on every prompt side with its good and bad answer.

    Args:
        names: the names of the threats.
        split: the split of their pairs.
        n_examples: cases per threat.
        seed: decides which cases are drawn.

    Raises:
        CtlensError: a threat or the split is unknown, or `n_examples` is below 1.
    """
    for name in names:
        for case in threats.of_world(name).cases(n_examples, split, seed, World.make()):
            yield _example(name, case)


def _example(name: str, case: Case) -> str:
    labels = case.pair.labels
    taught = "gives in" if case.gives_in else "resists"
    lines = [
        f"{name}, {labels['split']}: wrapper {labels['wrapper']!r}, strength {labels['strength']}, the item {taught}"
    ]
    for prompt_side, answers in zip(
        PROMPT_SIDES, ((case.good, case.bad), (case.good, ""), (case.benign, "")), strict=True
    ):
        prompt = case.pair.side(prompt_side)
        if prompt is not None:
            lines += [f"  {prompt_side:8}{_conversation(prompt)}", *_answers(*answers)]
    return "\n".join(lines)


def _conversation(prompt: Prompt) -> str:
    return " ".join(f"<{turn.role}> {turn.content}" for turn in prompt.turns)


def _answers(good: str, bad: str) -> list[str]:
    return [f"{'':10}{name}: {text}" for name, text in (("good", good), ("bad", bad)) if text]
