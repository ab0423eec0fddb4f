"""Frozen dataclass to JSON and back, seeds, and the stamp that says where a result was made."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ctlens.core.errors import CtlensError, unknown

T = TypeVar("T")

STAMPED_PACKAGES = ("ctlens", "torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn", "plotly")


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON-ready values; tuples become lists, nested ones dictionaries."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value


def from_dict(kind: type[T], data: Mapping[str, Any]) -> T:
    """An instance of the dataclass `kind` with the fields in `data`; lists become tuples.

    Raises:
        CtlensError: a key is no field of `kind`, or a field without a default is missing.
    """
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise unknown(f"option of {kind.__name__}", key, sorted(fields))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise CtlensError(f"{kind.__name__} cannot be read: {error}.") from None


def generator(seed: int, *scope: object) -> torch.Generator:
    """A local random generator for one purpose.

    The stream depends on the seed and the scope alone, so two purposes of one seed never share
    draws and the global random state is neither read nor changed.

    Args:
        seed: the user's seed.
        scope: what the draws are for, for example `"batches"`.
    """
    key = "/".join(str(part) for part in (seed, *scope))
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def environment() -> dict[str, str]:
    """Versions, platform and thread count, to stand beside every saved result."""
    versions = {}
    for package in STAMPED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    return {**machine, "threads": str(torch.get_num_threads()), **versions}
