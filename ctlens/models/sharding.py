"""Sharded models: each of several processes holds a slice of every weight, by torch's fully sharded data parallelism.

A block's weights are gathered while it runs and let go after it, forwards and backwards (`fully_shard`, FSDP2), so a
process holds one block whole and its share of the others. Processes run on inputs of their own and must make the same
passes in the same order, because each pass gathers from all of them; where their numbers of passes differ, `in_step`
makes up for it.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, empty

from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder, digest
from ctlens.core.types import LensModel
from ctlens.models.parameters import ORIGINALS, evaluating, plain_name, require_whole

# A sharded model cannot be copied, so a copy is made of the model that it was before, which has shapes and no numbers.
_BLANKS: WeakKeyDictionary[Any, LensModel] = WeakKeyDictionary()
# What a model was found to be once it had its weights, see `ctlens.models.adopt`.
_MARKS = ("ctlens_absent", "ctlens_trial")
_OPEN: ContextVar[LensModel | None] = ContextVar("the model whose passes are counted", default=None)


def is_sharded(model: LensModel) -> bool:
    """Whether the model's weights are split among processes."""
    return model in _BLANKS


def shard(model: LensModel) -> LensModel:
    """A sharded copy of a model that every process holds whole, in eval mode; `model` is left as it is.

    Raises:
        CtlensError: no launcher has started this process, or the model is not whole.
    """
    require_whole(model)
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):  # a bridge holds on to its last activations, and a graph cannot be copied
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    blank = _without_weights(model)
    made = split_blank(blank)
    held = dict(model.named_parameters())
    fill(made, {name: _slice_of(held[name].detach(), value) for name, value in made.named_parameters()})
    return made


def sharded_copy(
    model: LensModel, change: Callable[[LensModel], object] = lambda blank: None, *, share_weights: bool = False
) -> LensModel:
    """A copy of a sharded model, in eval mode.

    Args:
        model: the original.
        change: of the copy before it is split, as freezing or adapters; weights have no numbers then.
        share_weights: the copy's weights lie where the model's lie, see `ctlens.models.parameters.copy_model`.
    """
    blank = copy.deepcopy(_BLANKS[model], {id(model.tokenizer): model.tokenizer})
    change(blank)
    made = split_blank(blank)
    made.tokenizer = model.tokenizer
    vars(made.cfg).update(vars(model.cfg))
    for mark in _MARKS:
        if mark in vars(model):
            setattr(made, mark, vars(model)[mark])
    held = {plain_name(name): value.detach() for name, value in model.named_parameters()}
    values = {name: held[plain_name(name)] for name, _ in made.named_parameters() if plain_name(name) in held}
    fill(made, values if share_weights else {name: value.clone() for name, value in values.items()})
    return made


def split_blank(blank: LensModel) -> LensModel:
    """A sharded model of the kind of a blank, whose weights have no numbers; `fill` gives it some."""
    made = copy.deepcopy(blank, {id(blank.tokenizer): blank.tokenizer}).eval()
    for parameter in made.parameters():
        parameter.data = parameter.data.contiguous()  # slices of a matrix that another one is the transpose of
    ORIGINALS[made] = blank
    _BLANKS[made] = blank
    split_modules((*cast(Any, made).blocks, root_of(made)))
    return made


def split_modules(parts: Iterable[nn.Module]) -> None:
    """Splits the weights of modules among the processes, inner modules first; each is gathered while it runs."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of logits that nobody writes into
    mesh = _mesh()
    for part in parts:
        # Also the outermost part lets its weights go, the embeddings: kept, they would be whole on every process.
        sharded = cast(FSDPModule, fully_shard(part, mesh=mesh, reshard_after_forward=True))
        sharded.set_gradient_divide_factor(1.0)  # shares of a batch are weighted, so gradients are summed
        sharded.set_force_sum_reduction_for_comms(True)


def empty_slices(like: Tensor) -> Tensor:
    """A tensor that is split as a weight without numbers is, on the device of the processes."""
    split_as = cast(DTensor, like)
    return empty(like.shape, dtype=like.dtype, device_mesh=split_as.device_mesh, placements=split_as.placements)


def fill(model: LensModel | nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives the weights of a split model their numbers, which lie from now on where `values` lie."""
    root = root_of(model)
    of_name = dict(root.named_parameters(remove_duplicate=False))
    made = {
        id(of_name[name]): nn.Parameter(value, requires_grad=of_name[name].requires_grad)
        for name, value in values.items()
    }
    tensors = {name: made[id(value)] for name, value in of_name.items() if id(value) in made}
    nn.Module.load_state_dict(root, tensors, strict=False, assign=True)
    left = [name for name, value in root.named_parameters() if value.is_meta]
    if left:
        raise CtlensError(f"the weights do not fit the model: {left[0]} has no numbers. Use its own weights.")


def gather(block: nn.Module) -> None:
    """Gathers the weights of a block that runs again in a backward pass; only those of a sharded model are apart."""
    if isinstance(block, FSDPModule):
        block.unshard()


def is_first(model: LensModel) -> bool:
    """Whether this process writes what is written once; those that share a sharded model leave it to one of them."""
    return not is_sharded(model) or distributed.get_rank() == 0


def read_slices(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads numbers into tensors from the safetensors of a folder by name, each process those of its own slices.

    Raises:
        CtlensError: the folder lacks one of the tensors, holds it in another shape, or cannot be read.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    try:
        held = cast(Mapping[str, Any], reader.read_metadata().state_dict_metadata)
        for name, tensor in tensors.items():
            if name not in held or held[name].size != tensor.shape:
                raise CtlensError(
                    f"the safetensors in {folder} hold no {name} of the shape {tuple(tensor.shape)}, so they cannot be "
                    "read slice by slice: load the model without shard, or export it first."
                )
        state_dict_loader.load(dict(tensors), storage_reader=reader)
    except (CheckpointException, OSError, SafetensorError) as error:
        raise CtlensError(f"the safetensors in {folder} cannot be read ({_last_line(error)}).") from None


def write_joined(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors into one file of safetensors; raises as `write_slices`."""
    work = file.with_suffix(".slices")
    write_slices(work, tensors, joined=True)
    if distributed.get_rank() == 0:
        os.replace(work / "model-00001-of-00001.safetensors", file)
        shutil.rmtree(work)
    distributed.barrier()


def write_slices(folder: Path, tensors: Mapping[str, Tensor], *, joined: bool = False) -> None:
    """Writes tensors as safetensors into a folder that all processes see, each process its own slices.

    Args:
        folder: new, or there already.
        tensors: by name; those that are not sharded are equal on all processes.
        joined: join the slices in one file, `model-00001-of-00001.safetensors`.

    Raises:
        CtlensError: the system refuses it.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=joined)
    plain = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        state_dict_saver.save(plain, storage_writer=writer)
    except (CheckpointException, OSError) as error:
        raise CtlensError(f"{folder} cannot be written ({_last_line(error)}).") from None


def digests(folder: Path) -> dict[str, str]:
    """The digest of each file of slices in a folder that all processes see; each process reads its share of them."""
    count = distributed.get_world_size()
    files = sorted(folder.glob("*.safetensors"))
    mine = {path.name: digest(path) for path in files[distributed.get_rank() :: count]}
    found: list[dict[str, str]] = [{}] * count
    distributed.all_gather_object(found, mine)
    return {name: value for part in found for name, value in part.items()}


@contextmanager
def folder_for(model: LensModel, path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder as `atomic_folder` does, and one to all processes that share a sharded model."""
    if not is_sharded(model):
        with atomic_folder(path) as work:
            yield work
        return
    with atomic_folder(path) if is_first(model) else nullcontext() as work:
        named = [str(work)]
        distributed.broadcast_object_list(named)
        yield Path(named[0])
        distributed.barrier()
    distributed.barrier()


def root_of(model: LensModel | nn.Module) -> nn.Module:
    """The outermost module that computes: a bridge calls the HuggingFace model behind it."""
    return cast(Any, getattr(model, "original_model", model))


@contextmanager
def in_step(model: LensModel) -> Iterator[None]:
    """Lets each process make as many passes of this model as it needs inside the block, without gradient.

    A pass gathers weights from all processes, so whoever is done makes empty passes until all are.
    """
    if not is_sharded(model) or distributed.get_world_size() == 1:
        yield
        return
    token = _OPEN.set(model)
    try:
        yield
    finally:
        _OPEN.reset(token)
    nothing = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), evaluating(model):
        while _anyone(False, nothing.device):
            model(nothing)


def announce(model: LensModel) -> None:
    """Tells the other processes that a pass of this model comes, inside `in_step`."""
    if _OPEN.get() is model:
        _anyone(True, next(model.parameters()).device)


def _anyone(passes: bool, device: torch.device) -> bool:
    """Whether any process makes a pass now."""
    count = torch.tensor(int(passes), device=device)
    distributed.all_reduce(count)
    return bool(count)


def _without_weights(model: LensModel) -> LensModel:
    """A copy whose weights have shapes and no numbers; buffers keep theirs."""
    there: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    there |= {id(value): nn.Parameter(value.detach().to("meta"), value.requires_grad) for value in model.parameters()}
    blank = copy.deepcopy(model, there).eval()
    ORIGINALS[blank] = model
    return blank


def _slice_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's slice of a tensor that every process holds."""
    target = cast(DTensor, like)
    return distribute_tensor(value.contiguous(), target.device_mesh, target.placements, src_data_rank=None)


def _mesh() -> DeviceMesh:
    """All processes in a row, on GPUs where there are some."""
    require_launched()
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (int(os.environ["WORLD_SIZE"]),))


def require_launched() -> None:
    """Refuses to shard in a process that no launcher has started, or with a torch that is too old.

    Raises:
        CtlensError: one of these.
    """
    if "RANK" not in os.environ:
        raise CtlensError(
            "a sharded model needs several processes: start them with torchrun --nproc-per-node N -m ctlens train ..."
        )
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise CtlensError(f"a sharded model needs torch 2.8, and this is {torch.__version__}: install a newer one.")


def _last_line(error: BaseException) -> str:
    """What failed on one of the processes, which torch lists with the stack of each."""
    return str(error).strip().splitlines()[-1].rstrip(".")
