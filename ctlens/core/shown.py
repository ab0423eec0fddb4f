"""How objects show themselves in a terminal and in a notebook: by shapes and labels, and not by every number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

_FEW = 6
"""Entries of a list, a mapping or a table's columns that are shown; chosen by eye."""
_LONGEST = 60
"""Characters of a text that are shown."""


class Shown:
    """Shown is the base of dataclasses that would print all their numbers if nobody kept them from it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:  # or the decorator of a dataclass writes one, with every number
            cls.__repr__ = Shown.__repr__

    def described(self) -> dict[str, str]:
        """Says what the object holds: a short text by name, here of each field."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: shown(getattr(self, field.name)) for field in fields}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}: {text}' for name, text in self.described().items())})"

    def _repr_html_(self) -> str:
        return table_of(type(self).__name__, self.described())


def table_of(title: str, rows: Mapping[str, str]) -> str:
    """Writes names and texts as a table of HTML."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def shown(value: Any) -> str:
    """Says in a few words what a value is.

    >>> import numpy as np
    >>> shown(np.zeros((2, 3))), shown(("resid_pre", "z")), shown(range(9)), shown({"act": 1})
    ('float64[2, 3]', 'resid_pre, z', '0, 1, 2, 3, 4, 5, ... (9)', 'act')
    """
    if isinstance(value, Mapping):
        return _listed([str(name) for name in value]) or "none"
    if isinstance(value, list | tuple | range):
        return _listed([entry if isinstance(entry, str) else shown(entry) for entry in value]) or "none"
    if sizes := _sizes(value):
        return sizes
    if isinstance(value, str | int | float | Shown):
        return _short(str(value))
    return type(value).__name__ if dataclasses.is_dataclass(value) else _short(repr(value))


def _sizes(value: Any) -> str:
    """The sizes of a table, an array or a model; empty for anything else."""
    if isinstance(value, pd.DataFrame):
        return f"{len(value)} rows of {_listed([str(column) for column in value.columns])}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if hasattr(value, "cfg") and hasattr(value.cfg, "n_layers"):
        return f"{type(value).__name__} of {value.cfg.n_layers} layers, {value.cfg.d_model} wide"
    return ""


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _listed(entries: list[str]) -> str:
    few = ", ".join(map(_short, entries[:_FEW]))
    return few if len(entries) <= _FEW else f"{few}, ... ({len(entries)})"
