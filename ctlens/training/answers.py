"""The answers that losses on outputs train towards: the pairs' own targets, or what the reference says."""

from __future__ import annotations

from collections.abc import Sequence

from ctlens.batch import EncodedPairs, require_room
from ctlens.config import generator
from ctlens.decoding import Ids, Sampling, generate
from ctlens.errors import CtlensError
from ctlens.losses import Loss
from ctlens.types import LensModel


def answers_kind(losses: Sequence[Loss]) -> str:
    """How the losses want their answers, one of `ctlens.losses.base.ANSWERS`; empty where none needs any.

    Raises:
        CtlensError: two of them want different ones.
    """
    kinds = dict.fromkeys(loss.answers for loss in losses if loss.answers)
    if len(kinds) > 1:
        raise CtlensError(f"the losses want different answers ({', '.join(kinds)}): train them in separate runs.")
    return next(iter(kinds), "")


def reference_answers(
    reference: LensModel,
    pairs: EncodedPairs,
    answer_tokens: int,
    *,
    kind: str = "greedy",
    seed: int = 0,
    progress: bool = False,
) -> list[Ids]:
    """Per pair, its own target's tokens or the reference's answer to the clean prompt.

    Args:
        reference: in eval mode.
        pairs: encoded.
        answer_tokens: longest answer, in tokens.
        kind: `"greedy"`, or `"sampled"` at temperature 1.
        seed: of the sampled ones.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: the reference gives an empty answer to some clean prompt, or an answer does
            not fit the context behind its prompts.
    """
    end = reference.tokenizer.eos_token_id
    sampling = Sampling(generator(seed, "answers")) if kind == "sampled" else None
    asked = [row.clean.ids for row in pairs.rows if not row.answer]
    given = iter(
        generate(reference, asked, max_new_tokens=answer_tokens, end=end, sampling=sampling, progress=progress)
    )
    answers = [row.answer or next(given) for row in pairs.rows]
    for row, answer in zip(pairs.rows, answers, strict=True):
        if answer in ((), (end,)):
            raise CtlensError("the reference gives an empty answer to a clean prompt: give the pairs targets.")
        longest = max(len(row.wrapped.ids), len(row.clean.ids))
        require_room(longest + len(answer), reference.cfg.n_ctx, "a prompt with its answer")
    return answers
