"""What people have in the place of pairs and prompts: texts, chat messages, token ids, dictionaries and tables.

`Pairs` and `Prompts` are the hints of every public function that takes them: what is given is made into pairs before
the function's first line, by `as_pairs` and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from ctlens.core.arguments import Made
from ctlens.core.errors import CtlensError
from ctlens.core.files import write_text
from ctlens.core.public import public
from ctlens.data.chat import TOKENS, Turn
from ctlens.data.formats import pair_of_row
from ctlens.data.pairs import Pair, Prompt, prompt, row_of, turns_of


def as_pairs(given: Any) -> list[Pair]:
    """Makes pairs of what people have.

    >>> as_pairs([("Is it red?", "I say no. Is it red?")]) == as_pairs(
    ...     pd.DataFrame({"clean": ["Is it red?"], "wrapped": ["I say no. Is it red?"]})
    ... )
    True

    Args:
        given: a list or an iterator of pairs, or a table. A pair is a `Pair`, a tuple of a clean and a wrapped prompt
            (see `as_prompt`), or a dictionary with the fields of a row in a file, see `ctlens.data.formats.read_pairs`.
            A table is a pandas DataFrame, a data set of HuggingFace's `datasets`, or a dictionary of lists, with these
            fields as columns; there, what is missing in a row is left out of it.

    Raises:
        CtlensError: it is something else, or an entry is no pair. The sentence follows what a pair must be.
    """
    if isinstance(given, pd.DataFrame):
        return _of_table(given.to_dict("records"))
    if isinstance(given, Mapping):
        given = {name: list(column) if _is_column(column) else column for name, column in given.items()}
        if _is_table(given):
            return _of_table(dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True))
        shown = f"one dictionary of {', '.join(map(repr, list(given)[:3]))}" if given else "an empty dictionary"
        raise CtlensError(
            f"not {shown}: name a split of a data set, put one dictionary per pair into a list, or give columns that "
            "are lists of one length"
        )
    if isinstance(given, str | bytes | Path) or not isinstance(given, Iterable):
        raise CtlensError(_not(given))
    if hasattr(given, "column_names"):
        return _of_table(given)
    return [_as_pair(entry, f"number {number}") for number, entry in enumerate(given, start=1)]


def as_prompts(given: Any) -> list[Prompt]:
    """Makes prompts of an iterable of what `as_prompt` takes.

    Raises:
        CtlensError: it is something else; the sentence follows what it must be.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise CtlensError(_not(given))
    return [as_prompt(entry, f"number {number}") for number, entry in enumerate(given, start=1)]


def as_prompt(given: Any, where: str = "") -> Prompt:
    """Makes a prompt of a text, of a list of chat messages, or of token ids in a list, an array or a tensor.

    >>> as_prompt([5, 7]) == as_prompt(torch.tensor([5, 7]))
    True

    Args:
        given: what people have.
        where: the words that say in an error where it is; empty for one by itself.

    Raises:
        CtlensError: it is something else, or empty.
    """
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str) and given.strip():
        return prompt(given)
    if isinstance(given, np.ndarray | torch.Tensor):
        given = given.tolist()
    if isinstance(given, list | tuple) and given:
        if all(isinstance(message, Mapping) for message in given):
            return Prompt(turns_of([dict(message) for message in given], "messages", f"but {where or 'it'}"))
        if all(type(token) is int for token in given):
            return Prompt((Turn(TOKENS, " ".join(map(str, given))),))
    said = "a blank text" if isinstance(given, str) else f"a {_kind(given)}"
    raise CtlensError(f"not {said}{_at(where)}: a prompt is a text, a list of chat messages, or token ids")


Pairs: TypeAlias = Annotated[Sequence[Pair] | Any, Made(as_pairs, "a list of pairs")]
"""What `as_pairs` makes pairs of; of two lists of texts `pairs` does."""
OnePair: TypeAlias = Annotated[Pair | Any, Made(lambda given: _as_pair(given), "a pair")]
"""One entry of what `as_pairs` takes."""
Prompts: TypeAlias = Annotated[Sequence[Prompt] | Any, Made(as_prompts, "a list of prompts")]
"""What `as_prompts` makes prompts of."""
OnePrompt: TypeAlias = Annotated[Prompt | Any, Made(lambda given: as_prompt(given), "a prompt")]
"""One entry of what `as_prompts` takes."""


@public
def pairs(
    clean: Prompts,
    wrapped: Prompts,
    *,
    good: str | Sequence[str] | None = None,
    bad: str | Sequence[str] | None = None,
    benign: Prompts | None = None,
    target: Sequence[str] | None = None,
    labels: Sequence[Mapping[str, str]] | None = None,
) -> list[Pair]:
    """Makes pairs of a list of clean prompts and a list of wrapped ones, in the same order.

    >>> (pair,) = pairs(["is it red?"], ["my teacher says no. is it red?"], good="yes", bad="no")
    >>> pair.wrapped.bad
    'no'

    Args:
        clean: plain requests: texts, lists of chat messages, or token ids.
        wrapped: the same requests under an attack.
        good, bad: the answers to both prompts of a pair that count as good and as bad, a list with one per pair or one
            for all; without them a model can be trained but its answers cannot be judged.
        benign: the wrappers around harmless requests, which must stay answered.
        target: the answers that BCT trains on the wrapped prompts; by default the model's own to the clean ones.
        labels: what is known of each pair, such as `topic` and `wrapper`, by which intervals take pairs together.

    Raises:
        CtlensError: two lists are not equally long, or the good answer of a pair is its bad one.
    """
    named = {"wrapped": wrapped, "benign": benign, "good": good, "bad": bad, "target": target, "labels": labels}
    columns = [_column(name, given, len(clean)) for name, given in named.items()]
    found = []
    for one, other, twin, right, wrong, answer, known in zip(clean, *columns, strict=True):
        if right is not None and right == wrong:
            raise CtlensError(f"{right!r} is both the good and the bad answer of a pair: they must differ.")
        answers = {name: value for name, value in (("good", right), ("bad", wrong)) if value is not None}
        found.append(Pair(replace(one, **answers), replace(other, **answers), twin, answer, labels=known or {}))
    return found


@public
def save_pairs(path: str | Path, pairs: Pairs) -> None:
    """Writes pairs as JSONL, from which `load_pairs` reads equal pairs.

    Args:
        path: of the file, `.jsonl`.
        pairs: in any form, see `as_pairs`. `ctlens.pairs` makes them of two lists of texts.

    Raises:
        CtlensError: the name ends as that of a table does.
    """
    if Path(path).suffix == ".csv":
        raise CtlensError(f"pairs are written as JSONL, and {path} would be read as a table: name it .jsonl.")
    write_text(path, "".join(json.dumps(row_of(pair), ensure_ascii=False) + "\n" for pair in pairs))


def _column(name: str, given: Any, length: int) -> Sequence[Any]:
    """One value per pair; what is given once is that of all."""
    if given is None or isinstance(given, str):
        return [given] * length
    if len(given) != length:
        raise CtlensError(f"there are {length} clean prompts and {len(given)} of {name}: give one per pair.")
    return given


def _of_table(rows: Iterable[Mapping[str, Any]]) -> list[Pair]:
    """Makes pairs of the rows of a table, in which every row has every column."""
    present = ({name: value for name, value in row.items() if not _missing(value)} for row in rows)
    return [_as_pair(row, f"row {number}") for number, row in enumerate(present, start=1)]


def _is_column(column: Any) -> bool:
    return isinstance(column, pd.Series | np.ndarray)


def _is_table(given: Mapping[str, Any]) -> bool:
    """Whether a dictionary holds columns of one length, and not one pair, whose prompts may be lists of messages."""
    columns = list(given.values())
    if not all(isinstance(column, list | tuple) for column in columns) or len(set(map(len, columns))) != 1:
        return False
    return all(isinstance(entry, str | list | tuple | Prompt) for entry in given.get("clean", columns[0]))


def _missing(value: Any) -> bool:
    return value is None or (np.isscalar(value) and bool(pd.isna(value)))


def _as_pair(given: Any, where: str = "") -> Pair:
    if isinstance(given, Pair):
        return given
    if isinstance(given, tuple) and len(given) == 2:
        clean, wrapped = given
        return Pair(as_prompt(clean, where), as_prompt(wrapped, where))
    if isinstance(given, Mapping):
        return pair_of_row({name: _plain(value) for name, value in given.items()}, f"but {where or 'it'}")
    raise CtlensError(
        f"not a {_kind(given)}{_at(where)}: a pair is a tuple of a clean and a wrapped prompt, or a dictionary with "
        "'clean' and 'wrapped'"
    )


def _plain(value: Any) -> Any:
    """A field as a file would hold it: a column of a table may have arrays for lists."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _at(where: str) -> str:
    return f" at {where}" if where else ""


def _not(given: Any) -> str:
    shown = given is None or isinstance(given, str | Path | int | float)
    return f"not {given!r}" if shown and len(repr(given)) < 60 else f"not a {_kind(given)}"


def _kind(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__
