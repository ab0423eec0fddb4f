"""What every analysis returns: arrays with labels, one safetensors file on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ctlens.errors import CtlensError
from ctlens.files import atomic_file

R = TypeVar("R", bound="Result")


@dataclasses.dataclass(frozen=True)
class Result:
    """Base of the results: a frozen dataclass of numpy arrays and JSON-ready labels."""

    def save(self, path: str | Path) -> None:
        """Writes the arrays and labels to one safetensors file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        labels = {name: value for name, value in values.items() if name not in arrays}
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, {"kind": type(self).__name__, "labels": json.dumps(labels)})

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """The result that `save` wrote.

        Raises:
            CtlensError: the file is missing or holds another kind of result.
        """
        if not Path(path).is_file():
            raise CtlensError(f"{path} does not exist: check the path.")
        with safe_open(path, framework="numpy") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            if metadata.get("kind") != cls.__name__:
                raise CtlensError(f"{path} holds a {metadata.get('kind', 'foreign file')}, not a {cls.__name__}.")
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        labels: dict[str, Any] = json.loads(metadata["labels"])
        return cls(**arrays, **{k: tuple(v) if isinstance(v, list) else v for k, v in labels.items()})
