"""Forward passes that end in numbers: logits of NaN or infinity are refused, with where they first appeared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.types import LensModel, Logits, Mask
from ctlens.data.batch import PADDING, moved
from ctlens.models.bridges import one_sequence_per_row
from ctlens.models.parameters import own_part, plain_name
from ctlens.models.sharding import announce, is_sharded

_WITH_CACHE = ("past_kv_cache", "past_key_values")
_OF_CACHE = (*_WITH_CACHE, "use_cache", "attention_mask", "position_ids")
_MASKED = "hook_attn_scores"  # holds minus infinity where a token must not look
_SHOWN = 60  # characters of a prompt that an error shows
_UNREAD: ContextVar[list[Tensor] | None] = ContextVar("whether passes were finite, not read yet", default=None)


@contextmanager
def read_later() -> Iterator[list[Tensor]]:
    """Lets every pass inside the block go on, finite or not; whether each was is in the list, on the model's device.

    To read it at once would wait for a GPU at every pass. Whoever opens the block reads the list in time.
    """
    unread: list[Tensor] = []
    with _reading(unread):
        yield unread


def read_at_once() -> AbstractContextManager[None]:
    """Refuses a pass that is not finite inside the block also where that would be read later."""
    return _reading(None)


@contextmanager
def _reading(unread: list[Tensor] | None) -> Iterator[None]:
    token = _UNREAD.set(unread)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def forward(model: LensModel, entering: Tensor, *, logits_at: Mask | None = None, **options: Any) -> Logits:
    """The logits of one forward pass. Every pass of ctlens is made here, and none that is not finite goes on.

    A logit may be minus infinity, which masks its token, but the largest logit of every position is a number. To
    check that costs one reduction of the logits, and where only some are wanted one of what is unembedded.

    Args:
        model: any `LensModel`, with whatever hooks are on it.
        entering: `[batch, pos]` tokens; or the residual stream, with `start_at_layer`.
        logits_at: the positions whose logits are wanted, which come as one row, `[1, chosen, d_vocab]`; None for all.
            What nobody reads is then not worked out: in SmolLM2 the unembedding is a fifth of a pass. A mask on the
            CPU spares a GPU from being waited for.
        options: of the model.

    Raises:
        NotFinite: a position has no largest logit; the sentence names the first hook point that is not finite. Inside
            `read_later` it is not raised.
        CtlensError: a prompt holds a special token that the model has no embedding for.
    """
    states: list[Tensor] = []
    announce(model)
    later = _UNREAD.get() is not None
    try:
        with _unembedding_at(model, logits_at, states), one_sequence_per_row() if later else nullcontext():
            logits = model(entering, **options)
    except IndexError:
        _require_embedded(model, entering)
        raise
    unread = _UNREAD.get()
    if unread is not None:
        unread += [logits.detach().amax(-1).isfinite().all(), *(state.isfinite().all() for state in states)]
        return logits
    if is_finite(logits) and all(bool(state.isfinite().all()) for state in states):
        return logits
    raise _refusal(model, entering, options, logits)


@contextmanager
def _unembedding_at(model: LensModel, chosen: Mask | None, states: list[Tensor]) -> Iterator[None]:
    """Cuts what the model unembeds inside the block to the chosen positions; `states` gets it whole, without graph."""
    if chosen is None:
        yield
        return
    positions = chosen.flatten().nonzero()[:, 0]

    def cut(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(inputs[0].detach())
        state = inputs[0].flatten(0, 1)
        return state.index_select(0, moved(positions, state.device))[None], *inputs[1:]

    handle = cast(Any, model).unembed.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def _require_embedded(model: LensModel, entering: Tensor) -> None:
    """Refuses a token without an embedding, as a tokenizer may have one for images; asked when a pass has failed."""
    token = 0 if entering.is_floating_point() else int(entering.max())
    if token >= model.cfg.d_vocab:
        text = repr(model.tokenizer.decode([token])) if model.tokenizer is not None else "without a tokenizer"
        raise CtlensError(
            f"a prompt holds the token {token} ({text}), but the model has embeddings for {model.cfg.d_vocab} tokens: "
            "leave it out of the text."
        ) from None


def is_finite(logits: Tensor) -> bool:
    """Tells whether logits have a largest one at every position; NaN among them takes it away."""
    return bool(logits.detach().amax(-1).isfinite().all())


def require_finite(logits: Tensor, whose: str) -> None:
    """Raises a `NotFinite` for logits that were computed without `forward` and are not finite."""
    if not is_finite(logits):
        raise NotFinite(f"{whose} computes nan or infinity: check the activations that go in.")


def require_finite_weights(model: LensModel) -> None:
    """Raises a `NotFinite` that names the first weight of a model that is not finite."""
    broken = _broken_weight(model)
    if broken is not None:
        raise NotFinite(f"the weight {broken} of the model is not finite: train or load it anew.")


@torch.no_grad()
def _refusal(model: LensModel, entering: Tensor, options: Mapping[str, Any], logits: Logits) -> NotFinite:
    """Runs the same tokens once more, with a hook at every hook point, and says what was found.

    A sharded model cannot: the other processes make no such pass.
    """
    if is_sharded(model):
        return NotFinite(f"the model computes {what_is_not_finite(logits)}: {advice(model)}.")
    cached = any(options.get(name) is not None for name in _WITH_CACHE)  # it holds these tokens already
    again = {name: value for name, value in options.items() if not (cached and name in _OF_CACHE)}
    found: list[tuple[str, Tensor]] = []
    with ExitStack() as hooks:
        for point, name in {point: name for name, point in model.hook_dict.items()}.items():
            hooks.callback(point.register_forward_hook(partial(_visit, found, name)).remove)
        model(entering, **again)
    name, values = found[0] if found else ("its logits", logits)
    where = f"first at {name}{_in_prompt(model, entering, values)}"
    return NotFinite(f"the model computes {what_is_not_finite(values)}, {where}: {advice(model)}.")


def what_is_not_finite(values: Tensor) -> Literal["nan", "infinity"]:
    """Names what there is among values that are not all finite."""
    return "nan" if bool(values.isnan().any()) else "infinity"


def _visit(found: list[tuple[str, Tensor]], name: str, point: Any, inputs: Any, activation: Any) -> None:
    """Keeps the first activation that is not finite, in the order of the forward pass."""
    if not found and isinstance(activation, Tensor) and activation.is_floating_point():
        wrong = activation.isnan() if name.endswith(_MASKED) else ~activation.isfinite()
        if wrong.any():
            found.append((name, activation))


def _in_prompt(model: LensModel, entering: Tensor, values: Tensor) -> str:
    """Names the first prompt of a batch whose values are not finite; nothing where they have no rows of the batch."""
    if entering.is_floating_point() or len(values) != len(entering):
        return ""
    rows = values.isnan().flatten(1).any(1)
    rows = rows if rows.any() else values.isinf().flatten(1).any(1)
    return f", in the prompt {_shown(model, entering[int(rows.int().argmax())])}"


def _shown(model: LensModel, ids: Tensor) -> str:
    """The end of a prompt in words, or its tokens where the model has no tokenizer; padding is left out."""
    real = ids.tolist()
    while len(real) > 1 and real[-1] == PADDING:
        real.pop()
    text = str(model.tokenizer.decode(real)) if model.tokenizer is not None else str(real)
    return repr(text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}")


def advice(model: LensModel | nn.Module) -> str:
    """What to do about a model that computes NaN or infinity: it names the first weight that is not finite."""
    broken = _broken_weight(model)
    if broken is not None:
        return f"its weight {broken} is not finite, so train or load it anew"
    return "its weights are finite, so lower what trains or edits it, or load it in float32"


def _broken_weight(model: LensModel | nn.Module) -> str | None:
    held = ((plain_name(name), own_part(weight)) for name, weight in model.named_parameters())
    return next((name for name, weight in held if not weight.isfinite().all()), None)
