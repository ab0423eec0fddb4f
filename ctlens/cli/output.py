"""What a command prints: lines and tables, or with `--json` one object that holds both."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Document:
    """The output of a command as one object.

    Attributes:
        wanted: whether `--json` was given.
        tables: the rows of each table, by the words of its title in front of the first comma.
        lines: everything else that is printed.
    """

    wanted: bool = False
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Forgets what an earlier command of this process printed."""
        self.wanted = False
        self.tables = {}
        self.lines = []

    def end(self) -> None:
        """Writes the object, if it is wanted."""
        if self.wanted and is_main_process():
            sys.stdout.write(json.dumps({"tables": self.tables, "lines": self.lines}, ensure_ascii=False) + "\n")


DOCUMENT = Document()


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, with tables and lines, instead of text.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Gives the function of a command the option `--json` beside its own."""

    @functools.wraps(function)
    def called(*args: Any, as_json: bool = False, **options: Any) -> None:
        DOCUMENT.wanted = as_json
        function(*args, **options)

    hints = get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters.items()
    option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    own = [parameter.replace(annotation=hints[name]) for name, parameter in given]
    of_function: Any = called
    of_function.__signature__ = inspect.Signature([*own, option])
    called.__annotations__ = {**hints, "as_json": Json}
    return called


def is_main_process() -> bool:
    """Says whether this process writes and prints: among several that accelerate started, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Writes one line on stdout, from the main process only."""
    if DOCUMENT.wanted:
        DOCUMENT.lines.append(text)
    elif is_main_process():
        sys.stdout.write(text + "\n")


def say_above_bars(text: str) -> None:
    """Writes one line above the progress bars."""
    from tqdm.auto import tqdm

    if DOCUMENT.wanted:
        say(text)
    else:
        tqdm.write(text)


def print_table(title: str, table: pd.DataFrame) -> None:
    """Prints a table with its title; texts from outside, such as tokens, stand as they are and are no markup."""
    if DOCUMENT.wanted:
        columns = [str(column) for column in table.columns]
        rows = ([_plain(value) for value in row] for row in table.itertuples(index=False))
        DOCUMENT.tables[title.partition(",")[0]] = [dict(zip(columns, row, strict=True)) for row in rows]
        return
    if not is_main_process():
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for position, column in enumerate(table.columns):
        shown.add_column(str(column), overflow="fold", no_wrap=position == 0)
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.3f}" if isinstance(value, float) else _visible(str(value)) for value in row))
    Console(markup=False, emoji=False).print(shown)


def _plain(value: Any) -> Any:
    """A cell as JSON has it: a rate by its parts, no number for NaN."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and isnan(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _visible(text: str) -> str:
    """A text with its control characters written out, for a terminal would obey them.

    >>> _visible("\x1b[2J é")
    '\\\\x1b[2J é'
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
