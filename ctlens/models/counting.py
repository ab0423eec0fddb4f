"""Counting what a computation needs: the bytes that live at once and the floating-point operations, op by op.

The counts follow from shapes alone, so they are the same on every run and machine, and the same for a model on torch's
meta device, which has shapes and no numbers, as for one with weights.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

_aten: Any = torch.ops.aten
META = torch.device("meta")
ELSEWHERE = "elsewhere"


class Counting(TorchDispatchMode):
    """Counting counts the tensors made inside its block: bytes alive now, their peak, and floating-point operations.

    What an operation needs inside itself is not seen. Operations on the meta device also run where some of their
    tensors hold numbers: token ids, positions and masks stay on the CPU, because code branches on them. What has no
    number counts as true where code asks, for the only questions of a training step are whether all is finite. Values
    that a step moves to the CPU are kept apart, because they take no memory of the device.

    Args:
        kind_of: names the kind of a new tensor; by default all are of one kind.

    Attributes:
        phase: the part of the computation that runs now, by a name that the caller sets.
        now: bytes alive.
        at_peak: by phase, the bytes that were alive when they were most, by kind.
        elsewhere: bytes alive that were moved to the CPU.
        flops: by phase, floating-point operations of matrix products; a multiplication and an addition are two.
    """

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda made: "") -> None:
        super().__init__()
        self.kind_of = kind_of
        self.phase = ""
        self.now = 0
        self.elsewhere = 0
        self.at_peak: dict[str, Counter[str]] = {}
        self._peaks: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf.is_meta for leaf in given):
            made = self._without_numbers(func, args, kwargs, all(leaf.is_meta for leaf in given))
        elif func is _aten._to_copy.default and kwargs.get("device") == META and not given[0].is_floating_point():
            made = func(*args, **{**kwargs, "device": given[0].device})
        else:
            made = func(*args, **kwargs)
        if counted := flop_registry.get(func._overloadpacket):
            self.flops[self.phase] += counted(*args, **kwargs, out_val=made)
        old = {leaf.untyped_storage() for leaf in given}
        for leaf in [made] if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in old:
                self._count(leaf, ELSEWHERE if _leaves_the_device(func, kwargs, given) else self.kind_of(leaf))
        return made

    def _without_numbers(self, func: Any, args: Any, kwargs: Any, all_on_meta: bool) -> Any:
        if func is _aten._local_scalar_dense.default:
            return True
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten._index_put_impl_.default):
            chosen = [_as_positions(index) for index in args[1]]
            args = (args[0], [part for parts in chosen for part in parts], *args[2:])
        if not all_on_meta:
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        if kwargs.get("device") == torch.device("cpu"):
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once, in any phase."""
        return max(self._peaks.values(), default=0)

    def label(self, tensor: Tensor, kind: str) -> None:
        """Gives a tensor that was counted another kind."""
        entry = self._known[tensor.untyped_storage()]
        size = tensor.untyped_storage().nbytes()
        self._kinds[entry[0]] -= size
        self._kinds[kind] += size
        entry[0] = kind

    def _count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        entry = [kind]
        self._known[storage] = entry
        size = storage.nbytes()
        weakref.finalize(storage, self._forget, entry, size)
        if kind == ELSEWHERE:
            self.elsewhere += size
            return
        self.now += size
        self._kinds[kind] += size
        if self.now > self._peaks[self.phase]:
            self._peaks[self.phase] = self.now
            self.at_peak[self.phase] = Counter(self._kinds)

    def _forget(self, entry: list[str], size: int) -> None:
        if entry[0] == ELSEWHERE:
            self.elsewhere -= size
            return
        self.now -= size
        self._kinds[entry[0]] -= size


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to(META)


def _leaves_the_device(func: Any, kwargs: Any, given: Sequence[Tensor]) -> bool:
    moved = func is _aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
    return moved and given[0].is_meta


def _as_positions(index: Tensor | None) -> Sequence[Tensor | None]:
    """A mask among indices as the positions that it marks, which have a shape without its numbers too."""
    return index.nonzero(as_tuple=True) if index is not None and index.dtype is torch.bool else (index,)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Counts the bytes of tensors; memory that several share counts once."""
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in tensors})
