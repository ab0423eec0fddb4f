"""The base of all results: arrays with labels, saved as one safetensors file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ctlens.core.clusters import Clusters
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_file
from ctlens.core.shown import Shown
from ctlens.data.pairs import CLUSTER_KINDS, Pair, clusters_of

_R = TypeVar("_R", bound="Result")
ENTRY = "result"
"""The one entry of a file's metadata: several entries would be written in an order drawn by chance."""
UNSAVED = {"saved": False}
"""The metadata of a field that does not go to the file, and is None when the result comes back."""


@dataclasses.dataclass(frozen=True)
class Result(Shown):
    """Base of the results: a frozen dataclass of numpy arrays, arrays by name, and JSON-ready labels."""

    def save(self, path: str | Path) -> None:
        """Writes the arrays and labels to one safetensors file."""
        fields = [field.name for field in dataclasses.fields(self) if field.metadata != UNSAVED]
        arrays: dict[str, np.ndarray] = {}
        labels: dict[str, Any] = {}
        for name in fields:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                arrays[name] = np.ascontiguousarray(value)
            elif isinstance(value, Mapping) and value and all(isinstance(part, np.ndarray) for part in value.values()):
                arrays |= {f"{name}/{key}": np.ascontiguousarray(part) for key, part in value.items()}
            else:
                labels[name] = value
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, {ENTRY: json.dumps({"kind": type(self).__name__, "labels": labels})})

    @classmethod
    def load(cls: type[_R], path: str | Path) -> _R:
        """Loads the result that `save` wrote.

        Raises:
            CtlensError: the file is missing or damaged, holds another kind of result, or was saved by another version.
        """
        if not Path(path).is_file():
            raise CtlensError(f"{path} does not exist: check the path.")
        try:
            with safe_open(path, framework="numpy") as stored:
                metadata: dict[str, Any] = json.loads((stored.metadata() or {}).get(ENTRY, "{}"))
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, ValueError) as error:
            raise CtlensError(f"{path} cannot be read as a result ({error}): compute it again.") from None
        if metadata.get("kind") != cls.__name__:
            raise CtlensError(
                f"{path} holds a {metadata.get('kind', 'foreign file')}, not a {cls.__name__}: load it with the "
                "class that saved it."
            )
        arrays: dict[str, Any] = {}  # mappings of arrays too
        for stored_name, array in tensors.items():
            name, _, key = stored_name.partition("/")
            arrays[name] = {**arrays.get(name, {}), key: array} if key else array
        labels: dict[str, Any] = metadata["labels"]
        saved = {field.name for field in dataclasses.fields(cls) if field.metadata != UNSAVED}
        found = {*arrays, *labels}
        if found != saved:
            difference = f"{min(found - saved)!r}" if found - saved else f"no {min(saved - found)!r}"
            raise CtlensError(
                f"{path} was saved by another version of ctlens, whose {cls.__name__} had {difference}: compute it "
                "again, or load it with that version."
            )
        return cls(**arrays, **{k: tuple(v) if isinstance(v, list) else v for k, v in labels.items()})


@dataclasses.dataclass(frozen=True)
class ResultOverPairs(Result):
    """Base of the results that hold numbers of each pair, with what their intervals need.

    Attributes:
        groups: the number of each pair's group, by kind as in `ctlens.data.pairs.CLUSTER_KINDS`; pairs of one group go
            together. Empty where they are taken as independent.
    """

    groups: Mapping[str, Int[np.ndarray, " pair"]] = dataclasses.field(default_factory=dict, kw_only=True)

    def clusters(self, chosen: Bool[np.ndarray, " pair"] | Int[np.ndarray, " chosen"] | None = None) -> Clusters | None:
        """Which pairs go together, of all or of some, chosen by a mask or by number; None where that is not known."""
        return clusters_in(self.groups, chosen)


def clusters_in(
    groups: Mapping[str, Int[np.ndarray, " pair"]],
    chosen: Bool[np.ndarray, " pair"] | Int[np.ndarray, " chosen"] | None = None,
) -> Clusters | None:
    """Which pairs go together, from the groups of each kind, see `ResultOverPairs`."""
    if not groups:
        return None
    return Clusters.of({kind: (row if chosen is None else row[chosen]).tolist() for kind, row in groups.items()})


def groups_of(pairs: Sequence[Pair]) -> dict[str, Int[np.ndarray, " pair"]]:
    """The groups of pairs, see `ResultOverPairs` and `ctlens.data.pairs.clusters_of`.

    >>> from ctlens.data.pairs import prompt
    >>> asked = [prompt("is it red?"), prompt("is it red?"), prompt("is it blue?")]
    >>> groups_of([Pair(clean, clean, labels={"wrapper": name}) for clean, name in zip(asked, "aba", strict=True)])
    {'topic': array([1, 1, 0]), 'wrapper': array([0, 1, 0])}
    """
    found = [clusters_of(pair) for pair in pairs]
    return {
        kind: np.unique([names[number] for names in found], return_inverse=True)[1]
        for number, kind in enumerate(CLUSTER_KINDS)
    }


def beside(result: _R, others: Mapping[str, _R], label: str) -> dict[str, _R]:
    """Puts a result under its label in front of the others under theirs, for a figure that compares them.

    Args:
        result: the one that is compared.
        others: by label; they may hold the result too, under the same label.
        label: of the result.

    Raises:
        CtlensError: another result has the label.
    """
    if not isinstance(others, Mapping):
        raise CtlensError("the results to compare with go by their labels: give a dictionary, {'name': result}.")
    if others.get(label, result) is not result:
        raise CtlensError(f"two results are called {label!r}: give every result a label of its own.")
    return {label: result, **others}
