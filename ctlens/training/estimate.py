"""Estimates of a training before there are weights: the memory and operations of a step, and what makes it fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, TypeAlias

import pandas as pd
from transformers import PretrainedConfig

from ctlens import losses as loss_registry
from ctlens.core.errors import CtlensError
from ctlens.core.limits import AT_LEAST_1, POSITIVE, require
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel, dtype_named
from ctlens.data.batch import require_room
from ctlens.losses import Loss, require_distinct
from ctlens.models.lora import LoRA
from ctlens.models.outline import outline
from ctlens.models.parameters import present_parameters
from ctlens.models.sources import read_config, shallower
from ctlens.training.config import MEMORY, TrainConfig
from ctlens.training.needs import HELD, PHASES, StepNeeds, example, step_needs
from ctlens.training.prepare import in_window

GIB = 2**30
DEPTHS = (2, 4)
"""Layers of the two models that a deeper one is worked out from."""
Needed: TypeAlias = Callable[[TrainConfig, int, bool], StepNeeds]
"""What a step needs with these settings and so many processes, which share the weights or do not."""


@dataclass(frozen=True)
class Estimate:
    """An estimate says what a training step of a model needs, and which ways to set it fit in a budget.

    Attributes:
        n_parameters: of the model.
        asked: the step as it was asked for.
        ways: the ways that were tried, `asked` first. The others are tried where `asked` does not fit: each with as
            many processes as were asked for and, where that does not fit either, with the fewest that fit, or with
            one pair each.
        batch_size: the pairs of a step, of all processes together.
        budget: the bytes that one process may hold; None where no budget was given.
        tflops: the 1e12 operations that a process does per second; None where that was not given.
    """

    n_parameters: int
    asked: StepNeeds
    ways: tuple[StepNeeds, ...]
    batch_size: int
    budget: int | None = None
    tflops: float | None = None

    def fits(self, way: StepNeeds) -> bool:
        """Whether a way holds no more than the budget; without a budget every way fits."""
        return self.budget is None or way.peak <= self.budget

    @property
    def verdict(self) -> str:
        """The estimate in words."""
        held = f"A step holds {_gib(self.asked.peak)}{' in each process' if self.asked.processes > 1 else ''}"
        if self.budget is None:
            return f"{held}."
        if self.fits(self.asked):
            return f"{held}, which fits in {_gib(self.budget)}."
        if fitting := [_in_words(way) for way in self.ways if self.fits(way)]:
            return f"{held}, more than {_gib(self.budget)}. It fits with {'; or with '.join(fitting)}."
        least = min(self.ways, key=lambda way: way.peak)
        return f"{held}, and nothing makes it fit in {_gib(self.budget)}: the least is {_in_words(least)}."

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulates one row per way: its settings, the parts of its peak in GiB, and its operations in 1e12.

        With `tflops` also the seconds of a step and the pairs per second of all processes, for products alone.
        """
        return pd.DataFrame([self._row(way) for way in self.ways])

    def _row(self, way: StepNeeds) -> dict[str, Any]:
        verdict = "yes" if self.fits(way) else "no"
        fits = {} if self.budget is None else {"fits": verdict}
        settings = {name: getattr(way, name) for name in ("trained", "memory", "processes", "pairs")}
        settings["weights split"] = "yes" if way.shard else "no"
        sizes = {name: getattr(way, name) / GIB for name in ("peak", *HELD)}
        operations = {f"{phase} tflop": way.flops[phase] / 1e12 for phase in PHASES}
        return {**settings, **fits, **sizes, "targets per pair": way.targets / GIB, **operations, **self._speed(way)}

    def _speed(self, way: StepNeeds) -> dict[str, float]:
        if self.tflops is None:
            return {}
        seconds = sum(way.flops.values()) / (1e12 * self.tflops)
        return {"seconds per step": seconds, "pairs per second": self.batch_size / seconds}


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"


def _in_words(way: StepNeeds) -> str:
    shared = f", {way.processes} processes" if way.processes > 1 else ""
    shared += " that split the weights" if way.shard else ""
    return f"memory={way.memory}, {way.trained} trained{shared} ({_gib(way.peak)})"


@public
def estimate(
    model: str | PathLike[str] | PretrainedConfig,
    losses: Loss | str | Sequence[Loss | str] = "act",
    *,
    config: TrainConfig | None = None,
    length: int = 256,
    wrapper_length: int = 64,
    dtype: str = "float32",
    processes: int = 1,
    shard: bool = False,
    budget_gib: float | None = None,
    tflops: float | None = None,
    progress: bool = True,
) -> Estimate:
    """Estimates the memory and the floating-point operations of a training step, without any weights.

    The step is one of a first epoch, when the reference still runs. Counted are tensors and the operations of matrix
    products; what the device's libraries hold for themselves comes on top.

    >>> import ctlens as ct
    >>> found = ct.estimate("gpt2", "bct", config=ct.TrainConfig(batch_size=2), length=32, wrapper_length=8)
    >>> found.n_parameters
    124439808

    Args:
        model: HuggingFace's config.json, a folder that holds one, a configuration in memory, or a model type of
            transformers, whose sizes are then transformers' own for it.
        losses: one loss or several, or their names.
        config: the settings of the training.
        length: tokens of a wrapped prompt; where a loss has answers, one of `config.max_new_tokens` comes behind it.
        wrapper_length: how many of them the clean prompt lacks.
        dtype: of the weights, one of `ctlens.core.types.DTYPES`.
        processes: how many processes share a batch.
        shard: they share the weights too, as in a training with `--shard`.
        budget_gib: the GiB that one process may hold.
        tflops: the 1e12 operations that a process does per second in such a training, which says how long a step is.
        progress: show a progress bar where several ways are tried.

    Raises:
        CtlensError: the configuration is not there, is damaged, or is of no causal language model that TransformerLens
            bridges; a number breaks its limit; a prompt does not fit the context; a loss samples answers of its own,
            for which weights are needed; or weights in half precision would be trained.
    """
    config = config or TrainConfig()
    require(POSITIVE, budget_gib=budget_gib, tflops=tflops)
    require(AT_LEAST_1, wrapper_length=wrapper_length, processes=processes)
    chosen = [in_window(loss, config.window) for loss in loss_registry.built(losses)]
    require_distinct(chosen)
    _require_possible(chosen, config, length, wrapper_length, processes)
    described = read_config(model)
    whole = outline(described, dtype_named(dtype))
    require_room(length + config.max_new_tokens, whole.cfg.n_ctx, "a wrapped prompt with its answer")
    pair = example(chosen, config, length, wrapper_length)
    models = _shallow(whole, described) if all(getattr(loss, "layers", "all") == "all" for loss in chosen) else {}

    def needed(config: TrainConfig, processes: int, shard: bool) -> StepNeeds:
        made = models or {whole.cfg.n_layers: whole}
        return step_needs(made, whole.cfg.n_layers, pair, chosen, config, processes, shard)

    asked = needed(config, processes, shard)
    budget = None if budget_gib is None else int(budget_gib * GIB)
    ways = [asked]
    if budget is not None and asked.peak > budget:
        others = [] if shard else [(other, processes, False) for other in _other_ways(config)]
        if shard or config.batch_size > 1:  # as many processes as there are pairs can split the weights
            others += [(other, max(processes, 2), True) for other in _other_ways(config)]
        with progress_bar(others, desc="ways to fit", shown=progress, leave=False) as bar:
            ways += [fewest_processes(needed, other, least, budget, shard=split) for other, least, split in bar]
    return Estimate(_n_parameters(whole), asked, tuple(ways), config.batch_size, budget, tflops)


def _require_possible(
    losses: Sequence[Loss], config: TrainConfig, length: int, wrapper_length: int, processes: int
) -> None:
    if wrapper_length > length - 2:
        raise CtlensError(f"a prompt of {length} tokens has no room for a wrapper of {wrapper_length}: make it longer.")
    if processes > config.batch_size:
        raise CtlensError(f"{config.batch_size} pairs are too few for {processes} processes: raise batch_size.")
    for loss in losses:
        if loss.makes_rows:
            raise CtlensError(
                f"{loss.name} trains on rows of its own making, such as answers that the model samples, and a model "
                "without weights makes none: estimate BCT, with as many pairs as there are rows in a step."
            )


def _shallow(whole: LensModel, described: PretrainedConfig) -> dict[int, LensModel]:
    """The same model at two depths that stand for its own; none where its layers are few, or not alike."""
    n_layers = whole.cfg.n_layers
    if n_layers <= DEPTHS[-1]:
        return {}
    models = {depth: outline(shallower(described, depth), whole.cfg.dtype) for depth in DEPTHS}
    counts = [_n_parameters(models[depth]) for depth in DEPTHS]
    shallow = counts[0]
    per_layer = (counts[1] - shallow) / (DEPTHS[1] - DEPTHS[0])
    return models if _n_parameters(whole) == shallow + per_layer * (n_layers - DEPTHS[0]) else {}


def _n_parameters(model: LensModel) -> int:
    return sum(parameter.numel() for parameter in present_parameters(model).values())


def _other_ways(config: TrainConfig) -> list[TrainConfig]:
    """Every way to keep memory, with what is asked to be trained and then with adapters, which have fewer moments."""
    trained = [config.trainable] if isinstance(config.trainable, LoRA) else [config.trainable, LoRA()]
    return [replace(config, trainable=what, memory=memory) for what in trained for memory in MEMORY]


def fewest_processes(
    needed: Needed, config: TrainConfig, processes: int, budget: int, *, shard: bool = False
) -> StepNeeds:
    """What a way needs with the fewest processes that make it fit, from those asked for on; else with a pair each."""
    seen: dict[int, StepNeeds] = {}

    def of(count: int) -> StepNeeds:
        pairs = -(-config.batch_size // count)
        number = count if shard else pairs  # whole weights need the same with as many pairs
        seen[number] = seen.get(number) or needed(config, count, shard)
        return replace(seen[number], processes=count)

    def fits(count: int) -> bool:
        return of(count).peak <= budget

    if fits(processes):
        return of(processes)
    if not fits(config.batch_size):
        return of(config.batch_size)
    # More processes never hold more, so that the fewest are found by halving.
    counts = range(processes, config.batch_size + 1)
    return of(counts[bisect_left(counts, True, key=fits)])
