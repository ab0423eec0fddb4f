"""What one training step needs: the step is run on a model without numbers, and every operation is counted.

So there is no formula here of a loss, an architecture or a way to keep memory: the counts follow when one of them
changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ctlens.core.types import LensModel
from ctlens.data.alignment import align, wrapper_positions
from ctlens.data.batch import EncodedPair, EncodedPairs, pad
from ctlens.data.chat import Rendered
from ctlens.data.pairs import Pair, prompt
from ctlens.losses import Loss
from ctlens.models.counting import Counting, bytes_of
from ctlens.models.lora import LoRA
from ctlens.models.optimisation import adamw, clipped_update
from ctlens.models.parameters import copy_model, present_parameters
from ctlens.training.answers import answers_kind, drawn_together
from ctlens.training.config import TrainConfig
from ctlens.training.order import parts
from ctlens.training.passes import Passes, Term
from ctlens.training.prepare import trained_parameters
from ctlens.training.retention import answers_divergence

PATTERNS = "patterns"
_LOGITS = "logits"
GRADIENTS = "gradients"
_ACTIVATIONS = "activations"
_GATHERED = "gathered"
KINDS = (GRADIENTS, PATTERNS, _LOGITS, _ACTIVATIONS)
HELD = ("reference", "weights", "optimizer", _GATHERED, *KINDS)
LATER = "backward, when half of the gradients are there"
"""A phase of its own: over the layers what is held grows or falls, so that it is most at one end or the other."""
PHASES = ("reference", "forward", "backward", "retention")
_WITH_GRADIENTS = ("backward", LATER, "retention")
_FIRST_CHARACTER = 0x4E00  # from here on Unicode has 20,000 letters in a row, so that no text of a prompt occurs twice
_DISTINCT_IDS = 96  # token ids repeat after so many; every vocabulary has more


StepCounts: TypeAlias = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class StepNeeds:
    """StepNeeds is what one training step needs of one process, set one way.

    Sizes are in bytes. The parts of the peak are those at the moment when most is held.

    Attributes:
        trained: what is trained, in words.
        memory: what the step keeps, `TrainConfig.memory`.
        processes: how many processes share the batch.
        pairs: the pairs of one process.
        shard: the weights are split among the processes, and with them gradients and moments.
        n_trained: trained numbers, of the weights or of adapters.
        reference: the frozen model.
        weights: the trained copy; of a LoRA the adapters, for the rest is the reference's.
        optimizer: AdamW's two moments.
        gathered: of split weights, what a process holds whole for a moment, and its gradients; else 0.
        gradients: those of the trained numbers.
        patterns: attention weights, and what is worked out of them.
        logits: logits, and what is worked out of them.
        activations: everything else that the passes hold.
        targets: the clean activations and logits of one pair that are kept for later epochs, on the CPU or in the
            cache folder. They are no part of the peak.
        flops: floating-point operations by phase (`PHASES`). Those of the reference are over once all targets are kept.
    """

    trained: str
    memory: str
    processes: int
    pairs: int
    shard: bool
    n_trained: int
    reference: int
    weights: int
    optimizer: int
    gathered: int
    gradients: int
    patterns: int
    logits: int
    activations: int
    targets: int
    flops: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most bytes that are held at once, without the targets that are kept on the CPU."""
        return sum(getattr(self, part) for part in HELD)


def step_needs(
    models: Mapping[int, LensModel],
    n_layers: int,
    pair: EncodedPair,
    losses: Sequence[Loss],
    config: TrainConfig,
    processes: int = 1,
    shard: bool = False,
) -> StepNeeds:
    """Counts what a step of a first epoch needs.

    The reference runs on the clean prompts and the model on the wrapped ones; every loss and retention go backward, and
    AdamW moves the weights.

    Args:
        models: by its number of layers, the model on the meta device (see `ctlens.models.outline`); or two
            with fewer layers of the same sizes. What each phase of a step holds grows by the same amount with each
            layer, so that two depths give every other one.
        n_layers: of the model that is asked about.
        pair: every pair of the batch is as long as this one, see `example`.
        losses: what is trained.
        config: the settings of the training.
        processes: how many share the batch; the needs are those of the one with the most pairs.
        shard: they share the weights too.

    Raises:
        CtlensError: as `ctlens.training.prepare.trained_parameters`, or a loss does not run on such a pair.
    """
    n_pairs = -(-config.batch_size // processes)
    pairs = EncodedPairs((pair,) * n_pairs, {})
    counts = _at_depth(n_layers, {depth: _counted(model, pairs, losses, config) for depth, model in models.items()})
    phases = dict.fromkeys(key[1] for key in counts if key[0] == "held")
    held = {phase: {kind: counts["held", phase, kind] for kind in KINDS} for phase in phases}
    slices = processes if shard else 1
    for phase, kinds in held.items():
        kinds[GRADIENTS] = -(-kinds[GRADIENTS] // slices)
        kinds[_GATHERED] = _gathered(counts, phase) if shard else 0
    return StepNeeds(
        trained=_words(config.trainable),
        memory=config.memory,
        processes=processes,
        pairs=n_pairs,
        shard=shard,
        n_trained=counts["", "n_trained"],
        **{name: -(-counts["", name] // slices) for name in ("reference", "weights", "optimizer")},
        **max(held.values(), key=lambda kinds: sum(kinds.values())),
        targets=counts["", "targets"] // n_pairs,
        flops={phase: counts["flops", phase] for phase in PHASES},
    )


def _gathered(counts: StepCounts, phase: str) -> int:
    """What is whole in a phase of a sharded step: the embeddings, the block that runs and the one fetched beside it.

    On the way back their gradients are whole too, before they are summed and cut.
    """
    if phase == "update":
        return 0
    made = ("weights", "trained") if phase in _WITH_GRADIENTS else ("weights",)
    return sum(counts["outside", kind] + 2 * counts["block", kind] for kind in made)


def _at_depth(n_layers: int, counts: Mapping[int, StepCounts]) -> StepCounts:
    """What is counted at two depths, carried on in a straight line; one depth is taken as it is."""
    shallow = min(counts)
    deep = max(counts)
    if shallow == deep:
        return counts[deep]
    beyond = {key: counts[deep][key] - counts[shallow][key] for key in counts[shallow] | counts[deep]}
    steps = n_layers - shallow
    return Counter({key: counts[shallow][key] + more * steps // (deep - shallow) for key, more in beyond.items()})


def _counted(reference: LensModel, pairs: EncodedPairs, losses: Sequence[Loss], config: TrainConfig) -> StepCounts:
    """Runs the step on a copy of a model, and returns all counts by their names."""
    with Counting():
        model = copy_model(reference, share_weights=isinstance(config.trainable, LoRA))
        parameters = trained_parameters(model, config)
        optimizer = _with_moments(parameters, config)
    counting = Counting(partial(_kind, n_vocab=reference.cfg.d_vocab, d_head=reference.cfg.d_head))
    step = _Step(reference, model, parameters, losses, config, counting)
    with counting:
        step.take(pairs, optimizer)
    counts: StepCounts = Counter(
        {
            ("", "n_trained"): sum(parameter.numel() for parameter in parameters),
            ("", "reference"): _bytes_of_models(reference),
            ("", "weights"): _bytes_of_models(reference, model) - _bytes_of_models(reference),
            ("", "optimizer"): bytes_of(value for state in optimizer.state.values() for value in state.values()),
            ("", "targets"): step.targets_kept,
        }
    )
    blocks = [list(block.parameters()) for block in cast(Any, model).blocks]
    inside = {id(parameter) for block in blocks for parameter in block}
    every = present_parameters(model).values()
    of_part = {
        "outside": [parameter for parameter in every if id(parameter) not in inside],
        "block": max(blocks, key=bytes_of),
    }
    for part, held in of_part.items():
        counts[part, "weights"] = bytes_of(held)
        counts[part, "trained"] = bytes_of(parameter for parameter in held if parameter.requires_grad)
    for phase, flops in counting.flops.items():
        counts["flops", "backward" if phase == LATER else phase] += flops
    for phase, kinds in counting.at_peak.items():
        counts.update({("held", phase, kind): size for kind, size in kinds.items()})
    return counts


def example(losses: Sequence[Loss], config: TrainConfig, length: int, wrapper_length: int) -> EncodedPair:
    """Makes a pair of prompts whose every token can be aligned but those of a wrapper in front.

    Args:
        losses: their windows are aligned, and an answer stands behind the prompts where they have one.
        config: the settings, with the length of answers.
        length: tokens of the wrapped prompt, a BOS among them.
        wrapper_length: how many of them are the wrapper's.
    """
    text = "".join(map(chr, range(_FIRST_CHARACTER, _FIRST_CHARACTER + length - 1)))
    clean = _rendered(text[wrapper_length:])
    wrapped = _rendered(text)
    answer = (1,) * config.max_new_tokens if answers_kind(losses) else ()
    behind_clean = answer if any(loss.answers_on_both_sides for loss in losses) else ()
    windows = dict.fromkeys([*(window for loss in losses for window in loss.windows), *filter(None, [config.window])])
    shared = (clean.text,)
    alignments = {window: align(clean, wrapped, window, shared=shared, answer=behind_clean) for window in windows}
    added = wrapper_positions(clean, wrapped)
    return EncodedPair(Pair(prompt("-"), prompt("-")), clean, wrapped, alignments, answer, added, behind_clean)


def _rendered(text: str) -> Rendered:
    """A BOS and one message, with a token for each character."""
    ids = (0, *(1 + ord(character) % _DISTINCT_IDS for character in text))
    offsets = ((0, 0), *((position, position + 1) for position in range(len(text))))
    return Rendered(text, ids, offsets, ((0, len(text)),))


class _Step:
    """A step that is counted.

    Args:
        reference: the frozen model.
        model: the trained copy.
        parameters: the trained ones.
        losses: what is trained.
        config: the settings of the training.
        counting: counts the step; its phases are set here.
    """

    def __init__(
        self,
        reference: LensModel,
        model: LensModel,
        parameters: Sequence[nn.Parameter],
        losses: Sequence[Loss],
        config: TrainConfig,
        counting: Counting,
    ) -> None:
        self.reference = reference
        self.model = model
        self.parameters = parameters
        self.terms = {loss.name: Term(loss, loss.factors(model)) for loss in losses}
        self.config = config
        self.counting = counting
        self.targets_kept = 0
        self._missing = sum(parameter.numel() for parameter in parameters) / 2

    def take(self, pairs: EncodedPairs, optimizer: AdamW) -> None:
        """Takes the step on all pairs, part by part as the config says."""
        losses = [term.loss for term in self.terms.values()]
        units = drawn_together(pairs, losses)
        self.model.train()
        with self._noted(), torch.enable_grad():
            passes = Passes(self.reference, self.model, pairs, self.terms, units, self.config)
            for part in parts(range(len(pairs)), self.config.accumulate) if self.terms else ():
                self._learn_from(passes, part)
            self.targets_kept = self.counting.elsewhere
            if self.config.retention:
                self._hold(passes, pairs)
            self.counting.phase = "update"
            clipped_update(optimizer, self.parameters, self.config.clip)

    def _learn_from(self, passes: Passes, rows: list[int]) -> None:
        self.counting.phase = "forward"
        with passes.open() as forwards:
            found = forwards.seen(rows, self.terms, step=1, grad=True)
            totals = [term.loss.compute(found[name], term.factors).total for name, term in self.terms.items()]
            self.counting.phase = "backward"
            torch.stack(totals).sum().backward()

    def _hold(self, passes: Passes, pairs: EncodedPairs) -> None:
        """Adds retention on half as many clean prompts as there are pairs, each with an answer."""
        self.counting.phase = "retention"
        weight = next(self.model.parameters())
        answer = (1,) * self.config.max_new_tokens
        ids = [row.clean.ids + answer for row in pairs.rows[: (len(pairs) + 1) // 2]]
        with passes.open():
            for part in parts(range(len(ids)), self.config.accumulate):
                side = pad([ids[row] for row in part]).to(weight.device)
                decides = torch.zeros_like(side.mask[:, 1:])
                decides[:, -len(answer) :] = True
                target = weight.new_zeros(len(part) * len(answer), self.model.cfg.d_vocab)
                answers_divergence(self.model, side, decides, target).backward()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Counts the reference's passes in their own phase, and gradients as such from the moment they are kept."""
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(self.counting.phase)
            self.counting.phase = "reference"

        def leave(*_: Any) -> None:
            self.counting.phase = before.pop()

        reference = cast(nn.Module, self.reference)
        hooks = [reference.register_forward_pre_hook(enter), reference.register_forward_hook(leave)]
        for parameter in self.parameters:
            hooks.append(parameter.register_post_accumulate_grad_hook(self._mark))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _mark(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self.counting.label(parameter.grad, GRADIENTS)
        self._missing -= parameter.numel()
        if self._missing <= 0 and self.counting.phase == "backward":
            self.counting.phase = LATER


def _with_moments(parameters: Sequence[nn.Parameter], config: TrainConfig) -> AdamW:
    """An optimiser that has taken a step, for the first one makes its moments."""
    optimizer = adamw(parameters, lr=config.lr, weight_decay=config.weight_decay, relative_eps=config.relative_eps)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _kind(made: Tensor, *, n_vocab: int, d_head: int) -> str:
    """Tells logits and attention patterns by their shapes; what else has four axes has a head's width as its last."""
    if made.ndim > 1 and made.shape[-1] == n_vocab:
        return _LOGITS
    return PATTERNS if made.ndim == 4 and made.shape[-1] not in (d_head, d_head // 2) else _ACTIVATIONS


def _words(trainable: tuple[str, ...] | LoRA) -> str:
    if isinstance(trainable, LoRA):
        return f"LoRA of rank {trainable.rank} on {' and '.join(trainable.target_modules)}"
    return " and ".join(trainable)


def _bytes_of_models(*models: LensModel) -> int:
    modules = [cast(nn.Module, model) for model in models]
    return bytes_of(value for module in modules for value in (*module.parameters(), *module.buffers()))
