"""The limits that the numbers of a config or an option must keep, each with the words of its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ctlens.core.errors import CtlensError


class Limit(NamedTuple):
    """A limit is a condition that a number has to meet, with the words for it.

    Attributes:
        holds: tells whether a number meets the condition; NaN meets no condition.
        words: the words of an error, between the name of the number and its value.
    """

    holds: Callable[[float], bool]
    words: str


AT_LEAST_1 = Limit(lambda value: value >= 1, "must be at least 1")
POSITIVE = Limit(lambda value: 0 < value < float("inf"), "must be a positive number")
NOT_NEGATIVE = Limit(lambda value: 0 <= value < float("inf"), "must be zero or a positive number")
SHARE_OF_ALL = Limit(lambda value: 0 <= value <= 1, "is a share, 0 to 1")
PROBABILITY = Limit(lambda value: 0 < value <= 1, "is a probability above 0, up to 1")

BY_NAME: Mapping[str, Limit] = dict.fromkeys(
    (
        "steps",
        "batch_size",
        "max_batch",
        "max_batch_tokens",
        "max_new_tokens",
        "n_pairs",
        "n_prompts",
        "seeds",
        "draws",
        "folds",
        "k",
        "length",
        "workers",
        "every",
    ),
    AT_LEAST_1,
)
"""The limit of a number by the name that it has in every signature."""
EACH_ONCE = ("threats", "methods", "split", "sites", "sides", "quantities", "estimators", "by")
"""The arguments that name things, each of which has a sense only once."""
NOT_EMPTY = ("pairs",)
"""The arguments of which at least one has to be given."""


_COUNTABLE = 2**63
"""The first whole number that does not fit PyTorch's integers."""


def require(limit: Limit, **values: float | None) -> None:
    """Raises a `CtlensError` that names the first of the values to break the limit; None is within every limit.

    >>> require(POSITIVE, lr=1e-3, clip=0)
    Traceback (most recent call last):
    ctlens.core.errors.CtlensError: clip must be a positive number, not 0.
    """
    for name, value in values.items():
        if isinstance(value, int) and abs(value) >= _COUNTABLE:
            raise CtlensError(f"{name} is {value}, beyond what PyTorch can count: name a smaller number.")
        if value is not None and not limit.holds(value):
            raise CtlensError(f"{name} {limit.words}, not {value}.")


def require_fields(config: Any, limits: Mapping[str, Limit]) -> None:
    """Raises as `require` does for the fields of a dataclass, each with its own limit."""
    for name, limit in limits.items():
        require(limit, **{name: getattr(config, name)})
