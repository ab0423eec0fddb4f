"""Stores keep the reference's activations on clean prompts, pair by pair: in memory, or in memory-mapped files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_file

EVERY = slice(None)


class Store(Protocol):
    """A Store keeps tensors by pair and hook point: positions first, and heads second where there are any."""

    def __contains__(self, row: int) -> bool: ...

    def put(self, row: int, values: Mapping[str, Tensor]) -> None:
        """Keeps the reference's tensors of a pair, by hook point."""
        ...

    def get(self, row: int, name: str, heads: slice) -> Tensor:
        """Returns the tensor of a pair at one hook point; `heads` selects from a tensor that has heads."""
        ...


class InMemory:
    """InMemory keeps tensors on the CPU, for this training."""

    def __init__(self) -> None:
        self._kept: dict[int, Mapping[str, Tensor]] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._kept

    def put(self, row: int, values: Mapping[str, Tensor]) -> None:
        """Keeps the tensors themselves."""
        self._kept[row] = values

    def get(self, row: int, name: str, heads: slice) -> Tensor:
        """Returns one hook point of a pair, or a view of some of its heads."""
        value = self._kept[row][name]
        return value if heads == EVERY else value[:, heads]


class OnDisk:
    """OnDisk keeps a safetensors file per pair, and reads only the hook point asked for.

    Args:
        folder: the folder of these targets alone; files of an earlier training in it are used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, row: int) -> bool:
        return self._path(row).is_file()

    def put(self, row: int, values: Mapping[str, Tensor]) -> None:
        """Writes the pair's file, whole or not at all; one that another training wrote meanwhile stays."""
        if row in self:
            return
        with atomic_file(self._path(row)) as temporary:
            save_file({name: value.contiguous() for name, value in values.items()}, temporary)

    def get(self, row: int, name: str, heads: slice) -> Tensor:
        """Reads one hook point of a pair from its mapped file; `heads` selects from a tensor that has heads.

        Raises:
            CtlensError: the file is damaged.
        """
        try:
            with safe_open(self._path(row), framework="pt") as file:
                return file.get_tensor(name) if heads == EVERY else file.get_slice(name)[:, heads]
        except (OSError, SafetensorError) as error:
            raise CtlensError(f"{self._path(row)} cannot be read ({error}): remove its folder.") from None

    def _path(self, row: int) -> Path:
        return self.folder / f"pair-{row}.safetensors"
