"""What would make the host wait for a GPU, seen on a machine without one.

The tensors of a model, and whatever is computed from them or is moved to their device, are taken to be on a GPU. Other
tensors, such as token ids that are being padded or the number of AdamW's steps, are the host's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten: Any = torch.ops.aten
READS = frozenset(
    {_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select, _aten._unique2, _aten.bincount}
)
"""Operations whose result is a number of Python, or has a shape that depends on numbers."""
INDEXING = frozenset({_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_})
COPIES = frozenset({Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__})
"""Copies to the host that are no operations where the tensor is there already."""
Marked = WeakKeyDictionary[Any, bool]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_marked(marked: Marked, values: Any) -> bool:
    return any(value.untyped_storage() in marked for value in _tensors(values))


class _Computed(TorchDispatchMode):
    """Marks what is computed from marked tensors, and lists the operations that read them."""

    def __init__(self, marked: Marked, found: list[str]) -> None:
        super().__init__()
        self.marked = marked
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = [value for value in _tensors(args[1:2]) if value.dtype is torch.bool] if packet in INDEXING else []
        if _is_marked(self.marked, masks if packet in INDEXING else (args, kwargs)) and (packet in READS or masks):
            self.found.append(str(func))
        made = func(*args, **(kwargs or {}))
        if _is_marked(self.marked, (args, kwargs)):
            self.marked.update({value.untyped_storage(): True for value in _tensors(made)})
        return made


class _Asked(TorchFunctionMode):
    """Marks what is moved to or made on a named device, and lists the copies of marked tensors to the host."""

    def __init__(self, marked: Marked, found: list[str]) -> None:
        super().__init__()
        self.marked = marked
        self.found = found

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        if func in COPIES and _is_marked(self.marked, args):
            self.found.append(func.__name__)
        if func is Tensor.to and "cpu" in (*args[1:], *kwargs.values()) and _is_marked(self.marked, args):
            self.found.append("to")
        made = func(*args, **kwargs)
        if named and isinstance(made, Tensor):
            made = made.clone() if made is args[0] else made  # the host keeps what it moves
            self.marked[made.untyped_storage()] = True
        return made


@contextmanager
def host_reads(models: Iterable[Any]) -> Iterator[list[str]]:
    """Lists, in the block, what reads from a GPU on which these models would be."""
    held = [value for model in models for value in (*model.parameters(), *model.buffers())]
    marked: Marked = WeakKeyDictionary({value.untyped_storage(): True for value in held})
    found: list[str] = []
    with _Asked(marked, found), _Computed(marked, found):
        yield found


def plant(block: nn.Module, what: str) -> None:
    """Lets every pass through a block read its output, in one of the ways in which that is done by mistake."""
    ways: dict[str, Callable[[Tensor], object]] = {
        "item": lambda state: state.sum().item(),
        "bool": lambda state: bool(state.isfinite().all()),
        "tolist": lambda state: state[0, 0].tolist(),
        "cpu": lambda state: state.cpu(),
        "to": lambda state: state.to("cpu"),
        "mask": lambda state: state[state > 0],
        "nonzero": lambda state: (state > 0).nonzero(),
    }

    def read(module: nn.Module, inputs: Any, output: Tensor) -> None:
        ways[what](output.detach())

    block.register_forward_hook(read)
