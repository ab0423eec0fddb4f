"""Configs as JSON and back, seeded generators, and the environment that stands beside every saved result."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch

from ctlens.core.errors import CtlensError, unknown

Config = TypeVar("Config")

_MISSING = object()
STAMPED_PACKAGES = ("ctlens", "torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn", "plotly")


def to_dict(config: Any) -> dict[str, Any]:
    """Writes the fields of a dataclass as JSON-ready values; tuples become lists, dataclasses dictionaries."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value


def from_dict(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """Builds a dataclass from the values that `to_dict` gave, the dataclasses in its fields too; lists become tuples.

    A field may have had another name in an earlier version of ctlens. The class maps such earlier names to
    today's in `EARLIER_NAMES`, and they are read too.

    Raises:
        CtlensError: the data are no mapping, a key is no field of `kind`, or they lack a field that has no default.
    """
    if not isinstance(data, Mapping):
        raise CtlensError(f"{kind.__name__} cannot be read from {data!r}: an object with its fields is expected.")
    earlier: Mapping[str, str] = getattr(kind, "EARLIER_NAMES", {})
    data = {earlier.get(key, key): value for key, value in data.items()}
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise unknown(f"option of {kind.__name__}", key, sorted(fields))
    # Only a nested dataclass needs type hints; those of a loss from a notebook may name types that are unknown here.
    hints = get_type_hints(kind) if any(map(_holds_mapping, data.values())) else {}
    values = {key: _rebuilt(value, hints.get(key, Any)) for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise CtlensError(f"{kind.__name__} cannot be read: {error}; give every field without a default.") from None


def first_difference(there: Any, here: Any, name: str = "") -> str:
    """Says where two JSON-ready values differ, at the first place; empty if they are equal.

    >>> first_difference({"training": {"steps": 5, "lr": 0.1}}, {"training": {"steps": 9, "lr": 0.1}})
    'training.steps is 5 there and 9 here'
    >>> first_difference({"seeds": 1}, {"seeds": 1, "model": "x"})
    "model is missing there and 'x' here"
    """
    if isinstance(there, list) and isinstance(here, list):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            below = f"{name}.{key}" if name else str(key)
            if found := first_difference(there.get(key, _MISSING), here.get(key, _MISSING), below):
                return found
        return ""
    shown = ["missing" if value is _MISSING else repr(value) for value in (there, here)]
    return "" if there == here else f"{name} is {shown[0]} there and {shown[1]} here"


def _holds_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(map(_holds_mapping, value)))


def _rebuilt(value: Any, hint: Any) -> Any:
    """Makes a field's value again from its plain form: a dataclass from a mapping, if the hint names one."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, Mapping):
        nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        return value if nested is None else from_dict(cast(Any, nested), value)
    if isinstance(value, list):
        entry_hint = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        return tuple(_rebuilt(entry, entry_hint) for entry in value)
    return value


def generator(seed: int, *scope: object) -> torch.Generator:
    """Makes a local random generator for one purpose.

    The stream depends on the seed and the scope alone, so two purposes of one seed never share
    draws and the global random state is neither read nor changed.

    Args:
        seed: the seed that the user gave.
        scope: the purpose of the draws, for example `"batches"`.
    """
    key = "/".join(str(part) for part in (seed, *scope))
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def environment() -> dict[str, str]:
    """Lists package versions, platform and thread count; they stand beside every saved result."""
    versions = {}
    for package in STAMPED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    return {**machine, "threads": str(torch.get_num_threads()), **versions}
