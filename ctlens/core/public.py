"""The door of the library: what holds for every public function before its first line runs.

A function that is called under `torch.autocast`, in inference mode, with another default dtype or device, or from two
threads at once, computes the same numbers as in a fresh program.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

import torch

from ctlens.core.arguments import checked_arguments
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel

_P = ParamSpec("_P")
_R = TypeVar("_R")


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function public: its arguments are checked, and it works under the library's own settings.

    An iterator among the arguments is replaced by all that it gives, because a function may read it twice.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:  # it does not say whose arguments they are
            raise TypeError(f"{function.__qualname__}() {error}") from None
        checked_arguments(function, bound)
        with at_work(*_models_in(bound.arguments.values())):
            return function(*bound.args, **bound.kwargs)

    return called


def _models_in(values: Any) -> Iterator[LensModel]:
    """The models among arguments, in dictionaries and behind recordings too."""
    for value in values:
        if isinstance(value, Mapping):
            yield from _models_in(value.values())
        elif isinstance(value, torch.nn.Module) and isinstance(value, LensModel):
            yield value
        elif isinstance(model := getattr(value, "model", None), torch.nn.Module):
            yield cast(LensModel, model)


@contextmanager
def at_work(*models: LensModel) -> Iterator[None]:
    """Runs a block under the library's own settings of torch, alone with its models among all threads.

    Autocast is off, the default dtype is float32 and the default device the CPU; what the caller had comes back after
    the block. In inference mode, whose tensors no gradient may pass through, the block has mere `no_grad`.

    Raises:
        CtlensError: a model is compiled.
    """
    for model in models:
        _require_uncompiled(model)
    with ExitStack() as settings:
        for model in sorted(set(models), key=id):  # in one order everywhere, or two threads would wait for each other
            settings.enter_context(_lock_of(model))
        if torch.is_inference_mode_enabled():
            settings.enter_context(torch.inference_mode(False))
            settings.enter_context(torch.no_grad())
        for device in {"cpu", *(next(model.parameters()).device.type for model in models)}:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                settings.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        settings.enter_context(_FLOAT32)
        yield


def _require_uncompiled(model: Any) -> None:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise CtlensError(
            "the model is compiled, and hooks do not fire in it: give the model from before it was compiled."
        )


class _Float32:
    """float32 as torch's default dtype, which threads share: the first one in sets it, the last one out resets it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.theirs = torch.float32

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.theirs = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.set_default_dtype(self.theirs)


_FLOAT32 = _Float32()
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()  # type: ignore[valid-type]
_LOCKS_LOCK = threading.Lock()


def _lock_of(model: LensModel) -> Any:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())
