"""The answers that losses on outputs train towards: the pairs' own targets, or the reference's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.files import digest_of, write_json
from ctlens.core.reading import read_json
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPairs, require_room
from ctlens.data.chat import end_token, turn_tail
from ctlens.losses import Loss
from ctlens.models.generation import Ids, Sampling, end_tokens, generate
from ctlens.models.parameters import fingerprint


def answers_kind(losses: Sequence[Loss]) -> str:
    """Finds the kind of reference answers that the losses need (`ctlens.losses.base.ANSWERS`); empty if they need none.

    A loss on rollouts takes the trained model's own answers, so it goes with any other loss.

    Raises:
        CtlensError: two losses need different kinds.
    """
    kinds = dict.fromkeys(loss.answers for loss in losses if loss.answers not in ("", "rollouts"))
    if len(kinds) > 1:
        raise CtlensError(f"the losses want different answers ({', '.join(kinds)}): train them in separate runs.")
    return next(iter(kinds), "")


def drawn_at(losses: Sequence[Loss]) -> tuple[float, float]:
    """Finds the temperature and the `top_p` for the reference's sampled answers; both are 1 if no loss samples.

    Raises:
        CtlensError: two losses need different values.
    """
    found = dict.fromkeys(loss.drawn_at for loss in losses if loss.answers == "sampled")
    if len(found) > 1:
        raise CtlensError(
            "the losses want answers sampled at different temperatures or top_p: train them in separate runs."
        )
    return next(iter(found), (1.0, 1.0))


def answer_tail(losses: Sequence[Loss], tokenizer: Any) -> Ids:
    """Finds the tokens that follow the end token of every answer; none unless the losses train on the template's tail.

    Raises:
        CtlensError: one loss on answers trains on it, another does not.
    """
    found = dict.fromkeys(loss.answer_tail for loss in losses if loss.answers not in ("", "rollouts"))
    if len(found) > 1:
        raise CtlensError("the losses want answers with and without the template's tail: train them in separate runs.")
    return turn_tail(tokenizer) if any(found) else ()


def drawn_together(pairs: EncodedPairs, losses: Sequence[Loss]) -> list[list[int]]:
    """Groups the rows that batches keep together: a prompt's variants if a loss compares them, else each row alone."""
    if not any(loss.keeps_variants for loss in losses):
        return [[number] for number in range(len(pairs))]
    together: dict[Ids, list[int]] = {}
    for number, row in enumerate(pairs.rows):
        together.setdefault(row.clean.ids, []).append(number)
    return list(together.values())


def reference_answers(
    reference: LensModel,
    pairs: EncodedPairs,
    max_new_tokens: int,
    *,
    kind: str = "greedy",
    drawn_at: tuple[float, float] = (1.0, 1.0),
    tail: Ids = (),
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
) -> list[Ids]:
    """Gives the answer of each pair in tokens: its own target, or else the reference's answer to the clean prompt.

    Args:
        reference: the model before training, in eval mode.
        pairs: the encoded pairs.
        max_new_tokens: length of the longest answer, in tokens.
        kind: `"greedy"`; `"sampled"`; or `"consensus"`, the greedy answer that more than half of the prompts
            get, token for token, among a clean prompt and its distinct wrapped prompts; empty without a majority.
        drawn_at: the temperature and the `top_p` of sampled answers.
        tail: follows the end token of every answer that has one, see `answer_tail`.
        seed: decides the sampled answers.
        folder: keeps the answers on disk for the next training that asks the same weights the same prompts
            in the same way; None keeps them nowhere.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: the reference gives an empty answer to a clean prompt, or an answer does not fit the
            context behind its prompts; for a consensus, no two pairs share a clean prompt, or no prompt has
            a majority.
    """
    open_rows = [row for row in pairs.rows if not row.answer]
    asked = [row.clean.ids for row in open_rows]
    if kind == "consensus":
        asked = list(dict.fromkeys([*asked, *(row.wrapped.ids for row in open_rows)]))
    draws = dict(zip(("temperature", "top_p", "seed"), (*drawn_at, seed), strict=True)) if kind == "sampled" else {}
    settings = {"ends": end_tokens(reference), "max_new_tokens": max_new_tokens, **draws}
    given = _kept(reference, asked, settings, folder, progress)
    if kind == "consensus":
        given = _consensus(pairs, dict(zip(asked, given, strict=True)))
    found = iter(given)
    answers = [row.answer or next(found) for row in pairs.rows]
    for row, answer in zip(pairs.rows, answers, strict=True):
        if not set(answer) - {*settings["ends"]} and (answer or kind != "consensus"):
            raise CtlensError("the reference gives an empty answer to a clean prompt: give the pairs targets.")
        longest = max(len(row.wrapped.ids), len(row.clean.ids))
        require_room(longest + len(answer) + len(tail), reference.cfg.n_ctx, "a prompt with its answer")
    end = end_token(reference.tokenizer)
    return [(*answer, *tail) if answer[-1:] == (end,) else answer for answer in answers]


def _kept(
    reference: LensModel, asked: Sequence[Ids], settings: dict[str, Any], folder: Path | None, progress: bool
) -> list[Ids]:
    """Reads the answers from the folder; if it has none, asks the reference and writes them there."""
    if folder is None or not asked:
        return _given(reference, asked, settings, progress)
    question = {"weights": fingerprint(reference), "settings": settings, "prompts": [list(ids) for ids in asked]}
    path = folder / f"answers-{digest_of(question)}.json"
    if not path.is_file():
        given = _given(reference, asked, settings, progress)
        if not path.is_file():  # those that another training wrote meanwhile stay, and are read by both
            write_json(path, {**question, "answers": given})
    held = read_json(path)
    answers: Any = held.pop("answers", None)
    if held != question or not _are_answers(answers, len(asked)):
        raise CtlensError(f"{path} does not hold the answers to {len(asked)} prompts: remove it.")
    return [tuple(ids) for ids in answers]


def _given(reference: LensModel, asked: Sequence[Ids], settings: Mapping[str, Any], progress: bool) -> list[Ids]:
    """Asks the reference, which answers greedily unless the settings have a seed."""
    sampling = None
    if "seed" in settings:
        draw = generator(settings["seed"], "answers")
        sampling = Sampling(draw, settings["temperature"], settings["top_p"])
    ends, longest = settings["ends"], settings["max_new_tokens"]
    return generate(reference, asked, max_new_tokens=longest, ends=ends, sampling=sampling, progress=progress)


def _are_answers(found: Any, count: int) -> bool:
    """Checks that this is `count` lists of tokens."""
    return (
        isinstance(found, list)
        and len(found) == count
        and all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in found)
    )


def _consensus(pairs: EncodedPairs, given: dict[Ids, Ids]) -> list[Ids]:
    """Takes the majority's answer for each pair without a target, from the answers `given` to its prompts."""
    variants: dict[Ids, dict[Ids, None]] = {}
    for row in pairs.rows:
        if not row.answer:
            variants.setdefault(row.clean.ids, {})[row.wrapped.ids] = None
    if variants and max(map(len, variants.values())) < 2:
        raise CtlensError(
            "no two pairs share a clean prompt: give several wrapped prompts per clean prompt, or train without F2C."
        )
    chosen = {clean: majority([given[ids] for ids in (clean, *wrapped)]) for clean, wrapped in variants.items()}
    if variants and not any(chosen.values()):
        raise CtlensError("no prompt has an answer that most of its variants get: give more variants.")
    return [chosen[row.clean.ids] for row in pairs.rows if not row.answer]


def majority(answers: Sequence[Ids]) -> Ids:
    """Returns the answer that more than half give, or an empty one: a tie goes to nobody.

    >>> majority([(5, 1), (5, 1), (6, 1)]), majority([(5, 1), (6, 1)])
    ((5, 1), ())
    """
    answer, count = Counter(answers).most_common(1)[0]
    return answer if count > len(answers) / 2 else ()
