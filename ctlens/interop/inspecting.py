"""Inspect from Python: a model in memory for it, a task of any pairs, and the evaluation that a log holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.evaluation import Evaluation
from ctlens.evaluation.asked import threats_named, what_is_asked
from ctlens.models.adopt import adopt
from ctlens.threats import Judge, Threat

_INSTALL = "Inspect is not installed: pip install 'ctlens[inspect]'."


@contextmanager
def _with_inspect() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if not (error.name or "").startswith("inspect_ai"):
            raise
        raise CtlensError(_INSTALL) from None


@public
def inspect_model(model: LensModel, name: str = "model") -> Any:
    """Makes a model in memory one that Inspect asks, as `inspect_ai.eval(..., model=...)` takes it.

    A model that lies on disk needs only its name there: `model="ctlens/runs/mine"`, or `"ctlens/organism"`.

    Args:
        model: in eval mode, with a tokenizer.
        name: what Inspect's logs call it, behind `ctlens/`.

    Raises:
        CtlensError: Inspect is not installed, or the model has no tokenizer.
    """
    adopt(model)
    if model.tokenizer is None:
        raise CtlensError("the model has no tokenizer: load it from a folder that holds one, or pass tokenizer=.")
    with _with_inspect():
        from inspect_ai.model import get_model

        from ctlens.interop.entry import PROVIDER
    made = get_model(f"{PROVIDER}/{name}", memoize=False, lens=model)
    made.model_args.clear()  # a log would hold them as text
    return made


@public
def inspect_task(
    threat: str | Threat | None = None,
    *,
    pairs: Pairs | None = None,
    split: str = "heldout",
    n_prompts: int = 96,
    seed: int = 0,
    max_new_tokens: int = 16,
    judge: Judge | None = None,
) -> Any:
    """Makes a task of Inspect of a threat, such as one that `ctlens.threats.screen` made, or of pairs of your own.

    The threats themselves are there by name: `inspect eval ctlens/sycophancy --model ctlens/organism`.

    Args:
        threat: a threat or its name; with `pairs`, the one whose metrics and judge they get.
        pairs: your own; `ctlens.pairs` makes them of two lists of texts.
        split, n_prompts, seed, max_new_tokens, judge: as of `ctlens.evaluate`.

    Raises:
        CtlensError: Inspect is not installed, there is neither threat nor pairs, or as `ctlens.evaluate`.
    """
    if threat is None and pairs is None:
        raise CtlensError("there is nothing to ask: name a threat, or give pairs.")
    with _with_inspect():
        from ctlens.interop.tasks import task_of
    named = threats_named(None if threat is None else [threat], pairs)
    asked = what_is_asked(named, pairs, split=split, n_prompts=n_prompts, seed=seed)
    return task_of(asked, max_new_tokens, judge or next((one.judge for one in named), None))


@public
def inspect_evaluation(log: str | PathLike[str] | Any) -> Evaluation:
    """Reads the evaluation that a log of Inspect holds, whichever model answered.

    Args:
        log: its path, or a log that `inspect_ai.eval` returned.

    Raises:
        CtlensError: Inspect is not installed, or the log cannot be read or has not one verdict of ctlens per prompt.
    """
    with _with_inspect():
        from inspect_ai.log import read_eval_log

        from ctlens.interop.tasks import evaluation_of
    read: Any = log
    if isinstance(log, str | PathLike):
        try:
            read = read_eval_log(fspath(log))
        except (OSError, ValueError) as error:
            raise CtlensError(f"{log} cannot be read as a log of Inspect ({error}): check the path.") from None
    samples: Sequence[Any] = read.samples or ()
    found = [(one.metadata, one.scores["verdict"]) for one in samples if one.scores and "verdict" in one.scores]
    if not samples or len(found) < len(samples):
        raise CtlensError("the log has samples without a verdict of ctlens: give that of a finished task of ctlens.")
    if len({one.id for one in samples}) < len(samples):
        raise CtlensError("the log has several epochs, and an evaluation is of one answer per prompt: ask with one.")
    return evaluation_of(found)
