"""Arguments are checked against the types that a signature names, so that a wrong one is refused in one sentence.

A signature says all of it: a function with `batch_size: int` takes whole numbers, one with `losses: Sequence[Loss]`
takes losses. A hint that is annotated with `Made` also says what is made of an argument, as `ctlens.data.inputs.Pairs`
does. `ctlens.core.limits.BY_NAME` says which numbers have a sense under a name.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd

from ctlens.core.errors import CtlensError
from ctlens.core.limits import BY_NAME, EACH_ONCE, NOT_EMPTY, require

_SIMPLE: dict[Any, tuple[Callable[[Any], bool], str]] = {
    NoneType: (lambda value: value is None, "None"),
    bool: (lambda value: isinstance(value, bool | np.bool_), "True or False"),
    int: (lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool), "a number"),
    str: (lambda value: isinstance(value, str), "a text"),
}
_MADE_BY = {
    "LensModel": "Load it with ctlens.load_model, which takes a HuggingFace model too.",
    "Pair": "Make them of two lists of texts with ctlens.pairs(clean, wrapped, good=, bad=), or read a file with "
    "ctlens.load_pairs.",
    "Prompt": "Make one of a text or of chat messages with ctlens.prompt.",
    "Turn": "Make a prompt of a text with ctlens.prompt.",
    "Loss": "Make one, as ctlens.ACT() or ctlens.losses.get('act').",
}


_INSTEAD = {
    "Recording": "Recording, which cannot run (give recording.model)",
    "Run": "Run (give run.model)",
    "Trainer": "Trainer (give trainer.model)",
}
"""What a thing that is no model is called where one is needed, with where its model is."""


class Made(NamedTuple):
    """Made stands in an `Annotated` hint and says what is made of an argument before the function sees it.

    Attributes:
        make: gives what fits the hint; it raises a `CtlensError` of what it cannot use, which follows "it must be X, ".
        words: what the argument must be, in words.
    """

    make: Callable[[Any], Any]
    words: str


class Unfit(Exception):
    """Unfit is a value of another type than its hint; its text says what it is instead."""


def checked_arguments(function: Callable[..., Any], bound: inspect.BoundArguments) -> None:
    """Checks the arguments of one call in place; an iterator is replaced by all that it gives.

    Raises:
        CtlensError: an argument has another type than the signature says, or a number that has no sense.
    """
    hints = _hints(function)
    for name, value in bound.arguments.items():
        if name in hints and not _is_variadic(function, name):
            bound.arguments[name] = fitted(name, value, hints[name])


def require_types(config: Any) -> None:
    """Checks the fields of a dataclass against its annotations; for its `__post_init__`.

    A field that is an iterator becomes all that it gives, because the check reads it to its end.

    Raises:
        CtlensError: as `checked_arguments`.
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        found = fitted(field.name, given, hints.get(field.name, Any))
        if found is not given:
            object.__setattr__(config, field.name, found)


def fitted(name: str, value: Any, hint: Any) -> Any:
    """Returns a value that fits its hint and its name; an iterator comes back as a tuple.

    >>> fitted("batch_size", 1.5, int)
    Traceback (most recent call last):
    ctlens.core.errors.CtlensError: batch_size must be a whole number, not 1.5.

    Raises:
        CtlensError: it does not fit.
    """
    try:
        found = _fitting(value, hint)
    except Unfit as unfit:
        raise CtlensError(f"{name} must be {_words(hint)}, {unfit}.{_advice(hint)}") from None
    entries = list(found) if _is_many(found) else [found]
    if name in BY_NAME:
        for entry in entries:
            require(BY_NAME[name], **{name: entry})
    if name in NOT_EMPTY and not entries:
        raise CtlensError(f"there are no {name}: give at least one.")
    if name in EACH_ONCE and len(set(entries)) < len(entries):
        twice = next(entry for entry in entries if entries.count(entry) > 1)
        raise CtlensError(f"{name} names {getattr(twice, 'name', twice)!r} twice: name each once.")
    return found


def _fitting(value: Any, hint: Any) -> Any:
    """The value as the hint takes it.

    Raises:
        Unfit: it is of another type.
    """
    return value if type(value) is hint else _kind_of(hint).fit(value, hint)


def _require(fits: bool, value: Any) -> None:
    if not fits:
        if isinstance(value, type):
            raise Unfit(f"not the class {value.__name__} itself")
        shown = isinstance(value, str | numbers.Number) or value is None
        kind = _INSTEAD.get(type(value).__name__, type(value).__name__)
        raise Unfit(f"not {value!r}" if shown and len(repr(value)) < 60 else f"not a {kind}")


def _fit_simple(value: Any, hint: Any) -> Any:
    _require(_SIMPLE[hint][0](value), value)
    return value


def _fit_one_of(value: Any, hint: Any) -> Any:
    """The value as the first of the hints takes it; where none does, the longest refusal knows most of it."""
    refusals = []
    for one in get_args(hint):
        try:
            return _fitting(value, one)
        except Unfit as unfit:
            refusals.append(unfit)
    raise max(refusals, key=lambda unfit: len(str(unfit)))


def _fit_literal(value: Any, hint: Any) -> Any:
    _require(value in get_args(hint), value)
    return value


def _fit_mapping(value: Any, hint: Any) -> Any:
    _require(isinstance(value, Mapping), value)
    _, entry_hint = get_args(hint)
    for key, entry in value.items():  # keys are labels, which each function refuses in words of its own
        _fit_entry(repr(key), entry, entry_hint)
    return value


def _is_many(value: Any) -> bool:
    return isinstance(value, Sequence | Set | np.ndarray) and not isinstance(value, str | bytes)


def _fit_many(value: Any, hint: Any) -> Any:
    if isinstance(value, Iterator | pd.Series):
        value = tuple(value)
    _require(_is_many(value), value)
    hints = get_args(hint)
    if get_origin(hint) is not tuple or hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    _require(len(value) == len(hints), value)
    for number, (entry, entry_hint) in enumerate(zip(value, hints, strict=True), start=1):
        _fit_entry(f"number {number}", entry, entry_hint)
    return value


def _fit_entry(which: str, entry: Any, hint: Any) -> None:
    try:
        _require(_fitting(entry, hint) is entry, entry)  # an iterator in a list would be read to its end by the check
    except Unfit as unfit:
        raise Unfit(f"{unfit} at {which}") from None


def _fit_made(value: Any, hint: Any) -> Any:
    try:
        return _made(hint).make(value)
    except CtlensError as error:
        raise Unfit(str(error).rstrip(".")) from None


def _made(hint: Any) -> Made:
    return next(note for note in get_args(hint)[1:] if isinstance(note, Made))


def _fit_function(value: Any, hint: Any) -> Any:
    _require(callable(value), value)
    return value


def _fit_class(value: Any, hint: Any) -> Any:
    _require(isinstance(value, get_origin(hint) or hint), value)
    return value


def _is_class(hint: Any) -> bool:
    """Tells whether `isinstance` decides: not for `Any`, type variables, shapes and interfaces of methods."""
    hint = get_origin(hint) or hint
    interface = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    return (
        isinstance(hint, type)
        and hint is not Any
        and not interface
        and not type(hint).__module__.startswith("jaxtyping")
    )


def _class_in_words(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind in (Path, os.PathLike):
        return "a path"
    return "a TransformerLens model" if kind.__name__ == "LensModel" else f"a {kind.__name__}"


def _plural(hint: Any) -> str:
    words = {str: "texts", int: "whole numbers", float: "numbers"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_plural, get_args(hint)))
    return words.get(hint) or (f"{hint.__name__} objects" if _is_class(hint) else _words(hint))


def _words(hint: Any) -> str:
    """A hint in words, for the sentence of an error."""
    return _kind_of(hint).words(hint)


class Kind(NamedTuple):
    """A kind of hints: how a value is made to fit one, and what one is called in the sentence of an error."""

    fit: Callable[[Any, Any], Any]
    words: Callable[[Any], str]


_SIMPLE_KIND = Kind(_fit_simple, lambda hint: _SIMPLE[hint][1])
_ANYTHING = Kind(lambda value, hint: value, lambda hint: getattr(hint, "__name__", "anything"))
_CLASS = Kind(_fit_class, _class_in_words)
_UNION = Kind(_fit_one_of, lambda hint: " or ".join(dict.fromkeys(map(_words, get_args(hint)))))
_MANY = Kind(_fit_many, lambda hint: f"a list of {_plural(get_args(hint)[0])}")
_MAPPING = Kind(_fit_mapping, lambda hint: f"a dictionary of {_plural(get_args(hint)[1])}")
_BY_ORIGIN: dict[Any, Kind] = {
    Union: _UNION,
    UnionType: _UNION,
    Literal: Kind(_fit_literal, lambda hint: " or ".join(map(repr, get_args(hint)))),
    Callable: Kind(_fit_function, lambda hint: "a function"),
    Annotated: Kind(_fit_made, lambda hint: _made(hint).words),
    **dict.fromkeys((Mapping, dict), _MAPPING),
    **dict.fromkeys((Sequence, Iterable, list, tuple), _MANY),
}


@cache
def _kind_of(hint: Any) -> Kind:
    if hint in _SIMPLE:
        return _SIMPLE_KIND
    return _BY_ORIGIN.get(get_origin(hint)) or (_CLASS if _is_class(hint) else _ANYTHING)


def _advice(hint: Any) -> str:
    """How to make what the hint asks for, where that is not plain."""
    named = (getattr(kind, "__name__", "") for kind in _parts(hint))
    found = next((_MADE_BY[name] for name in named if name in _MADE_BY), "")
    return f" {found}" if found else ""


def _parts(hint: Any) -> Iterator[Any]:
    """A hint and all that it is made of."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


@cache
def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:  # a loss from a notebook may name types that are not known there
        return {}


@cache
def _is_variadic(function: Callable[..., Any], name: str) -> bool:
    kind = inspect.signature(function).parameters[name].kind
    return kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
