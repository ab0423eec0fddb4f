"""Names for the shapes of tensors, used in every signature, and the interface that ctlens needs of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctlens.core.errors import CtlensError, unknown

Tokens: TypeAlias = Int[Tensor, "batch pos"]
Mask: TypeAlias = Bool[Tensor, "batch pos"]
Logits: TypeAlias = Float[Tensor, "batch pos d_vocab"]
ChosenLogits: TypeAlias = Float[Tensor, "1 chosen d_vocab"]
CleanLogits: TypeAlias = Float[Tensor, "batch clean_pos d_vocab"]
Pattern: TypeAlias = Float[Tensor, "batch head q k"]
Activation: TypeAlias = Float[Tensor, "batch pos ..."]
Scalar: TypeAlias = Float[Tensor, ""]
PerRow: TypeAlias = Float[Tensor, " batch"]
ChosenRows: TypeAlias = Bool[Tensor, " batch"]
RowNumbers: TypeAlias = Int[Tensor, " chosen"]
Positions: TypeAlias = Int[Tensor, "batch width"]

Activations: TypeAlias = dict[str, Tensor]
HookFunction: TypeAlias = Callable[..., Tensor | None]


DTYPES = ("float32", "bfloat16", "float16", "float64")


def dtype_named(name: str) -> torch.dtype:
    """Returns the type of weights of that name.

    Raises:
        CtlensError: the name is not in `DTYPES`.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return getattr(torch, name)


def device_named(device: str | torch.device) -> torch.device:
    """Returns the device of that name, on which tensors can be made here; `"auto"` is an accelerator, or else the CPU.

    Raises:
        CtlensError: there is no such device, or this machine lacks it.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).split("\n")[0]
        known = "" if reason.startswith("Expected one of") else f": {reason}"  # torch's list, of which few are for us
        raise CtlensError(f"device {device} cannot be used here, name cpu, cuda or mps{known}") from None
    if found.type == "meta":
        raise CtlensError("device meta holds no numbers, name cpu, cuda or mps.")
    return found


def widened(values: Tensor) -> Tensor:
    """Returns half-precision values as float32, in which sums are fine enough; other values stay as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@runtime_checkable
class LensModel(Protocol):
    """LensModel is a TransformerLens model: `HookedTransformer` (3.x) or `TransformerBridge` (3.x and 4.x).

    It is typed by structure, so that only `ctlens.models.loading` imports TransformerLens.
    """

    cfg: Any
    tokenizer: Any
    training: bool

    @property
    def hook_dict(self) -> dict[str, Any]: ...

    def hooks(self, fwd_hooks: list[tuple[str, HookFunction]] = ...) -> AbstractContextManager[Any]: ...

    def __call__(self, input: Tokens, **options: Any) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def train(self, mode: bool = ...) -> Any: ...

    def eval(self) -> Any: ...
