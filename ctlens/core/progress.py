"""Progress bars, which are shown where somebody can see them move: on a terminal, or in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

from tqdm.asyncio import tqdm as on_terminals
from tqdm.auto import tqdm

ProgressBar: TypeAlias = tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> ProgressBar:
    """Makes a progress bar of tqdm; in a file or a pipe it would leave a line per update, so none is shown there.

    Args:
        iterable: what the bar runs over; None for a bar that is updated by hand.
        shown: whether the caller wants one.
        options: of tqdm.
    """
    seen = tqdm is not on_terminals or sys.stderr.isatty()  # elsewhere `tqdm.auto` is the bar of notebooks
    return tqdm(iterable, disable=not (shown and seen), **options)
