"""Hook points by name: find them, capture activations with or without gradient, edit them, and leave no hook behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import Activations, ChosenLogits, HookFunction, LensModel, Logits, Mask, Tokens
from ctlens.models.bridges import huggingface_config, is_bridge
from ctlens.models.finite import forward

SHORTHANDS = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "z": "blocks.{layer}.attn.hook_z",
}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# The final norm's output, which a `HookedTransformer` has no hook point for.
FINAL_NORM = "ln_final.hook_out"
NAMED_LAYERS = ("all", "last", "middle", "last_half", "last_quarter")

Layers: TypeAlias = str | int | tuple[int, ...] | list[int]


def select_layers(n_layers: int, layers: Layers) -> tuple[int, ...]:
    """Layer numbers for a selection.

    >>> select_layers(8, "last_quarter"), select_layers(8, "middle"), select_layers(4, [0, -1])
    ((6, 7), (4,), (0, 3))

    Args:
        n_layers: of the model.
        layers: one of `NAMED_LAYERS`, a number, or a list of numbers; negative ones count from the end.

    Raises:
        CtlensError: an unknown name, a layer that does not exist, or an empty or repeating list.
    """
    if isinstance(layers, str):
        starts = {"all": 0, "last_half": n_layers // 2, "last_quarter": n_layers - max(1, n_layers // 4)}
        single = {"last": n_layers - 1, "middle": n_layers // 2}
        if layers in single:
            return (single[layers],)
        if layers not in starts:
            raise unknown("layer selection", layers, NAMED_LAYERS)
        return tuple(range(starts[layers], n_layers))
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    for number in numbers:
        if not -n_layers <= number < n_layers:
            raise CtlensError(f"layer {number} does not exist: the model has layers 0 to {n_layers - 1}.")
    chosen = tuple(number % n_layers for number in numbers)
    if not chosen or len(set(chosen)) < len(chosen):
        raise CtlensError("a layer selection must name at least one layer, and each layer once.")
    return chosen


class SiteAt(NamedTuple):
    """A hook point by its short name, where it has one, and the layers at which it is meant."""

    site: str
    layers: Layers


def site_at(site: str, layers: Layers = "all") -> SiteAt:
    """A site by its short name: a full hook name is that of one layer.

    >>> site_at("blocks.3.attn.hook_z"), site_at("z", "last")
    (SiteAt(site='z', layers=3), SiteAt(site='z', layers='last'))

    Raises:
        CtlensError: a full name stands in another layer than the layers that are chosen.
    """
    found = _IN_BLOCK.fullmatch(site)
    if found is None:
        return SiteAt(site, layers)
    layer = int(found[1])
    if layers != "all" and ((layers,) if isinstance(layers, int) else tuple(layers)) != (layer,):
        raise CtlensError(f"{site} stands in layer {layer}, and the layers are {layers!r}: leave the layers out.")
    of_any_layer = f"blocks.{{layer}}.{found[2]}"
    return SiteAt(next((short for short, name in SHORTHANDS.items() if name == of_any_layer), site), layer)


def unknown_site(site: str) -> CtlensError:
    """The error for a site that has no short name; of a full name it suggests full names of its layer."""
    found = _IN_BLOCK.fullmatch(site)
    return unknown("site", site, [name.format(layer=found[1]) for name in SHORTHANDS.values()] if found else SHORTHANDS)


def resolve(model: LensModel, site: str, layers: Layers = "all") -> list[str]:
    """Finds the hook names of a site, a shorthand such as `"resid_post"`, at some layers, or of one full name.

    Raises:
        CtlensError: nothing of that name exists on this model, and the nearest names are given; or it is not what its
            name says, see `ctlens.models.adopt.tried_hooks`.
    """
    if site in SHORTHANDS:
        names = [SHORTHANDS[site].format(layer=layer) for layer in select_layers(model.cfg.n_layers, layers)]
    else:
        names = [site]
    require_hooks(model, names)
    return names


def require_hooks(model: LensModel, names: Iterable[str]) -> dict[str, Any]:
    """Returns the hook points of a model if these full names are among them; raises as `resolve` else.

    A bridge puts its hook points together anew each time it is asked, so many names are looked up at once.
    """
    known = model.hook_dict
    trial = getattr(model, "ctlens_trial", None)
    for name in names:
        if name not in known and name.endswith("hook_resid_mid") and name.replace("mid", "pre") in known:
            raise CtlensError(
                "this model has no resid_mid: its blocks add attention and MLP to the same residual stream, side by "
                "side; name resid_pre or resid_post."
            )
        if name not in known and not (name == FINAL_NORM and hasattr(model, "ln_final")):
            raise unknown("hook point", name, [*SHORTHANDS, *known])
        if trial is not None and name in trial.odd:
            raise CtlensError(f"{name} is not what its name says on this model: {trial.odd[name]}.")
    return known


def run_capturing(
    model: LensModel,
    tokens: Tokens,
    names: Iterable[str],
    *,
    grad: bool,
    mask: Mask | None = None,
    logits: bool = True,
) -> tuple[Float[Tensor, "batch _ d_vocab"], Activations]:
    """One forward pass: its logits and the activations at the named hook points.

    Args:
        model: any `LensModel`.
        tokens: `[batch, pos]`.
        names: full hook names, from `resolve`.
        grad: True keeps the graph (the trained side); False runs without it (the reference side).
        mask: True at real tokens. Needed when padding is on the left; padding on the right is
            invisible to causal attention.
        logits: False leaves them out, `[batch, 0, d_vocab]`, where nobody reads them.

    Returns:
        `[batch, pos, d_vocab]` logits and a dictionary keyed by the names that were asked for (a
        bridge calls its hooks by other, canonical names).

    Raises:
        CtlensError: a name does not exist, or its hook did not fire.
    """
    store: Activations = {}
    with torch.set_grad_enabled(grad), capturing(model, names, store):
        found = run(model, tokens, mask, logits_at=None if logits else torch.zeros(tokens.shape, dtype=torch.bool))
    return found if logits else found.expand(len(tokens), -1, -1), store


def run(
    model: LensModel, tokens: Tokens, mask: Mask | None = None, *, logits_at: Mask | None = None
) -> Logits | ChosenLogits:
    """The logits of one forward pass; `mask` as in `run_capturing`, `logits_at` and errors as of `forward`."""
    options: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
    if huggingface_config(model) is not None:
        options["use_cache"] = False  # no one reads the cache, and a block that is run again would add to it
    return forward(model, tokens, logits_at=logits_at, **options)


@contextmanager
def capturing(model: LensModel, names: Iterable[str], store: Activations) -> Iterator[None]:
    """Fills `store` by requested name during the forward passes inside the block.

    Raises:
        CtlensError: a name does not exist, or its hook did not fire.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        store.pop(name, None)
    with visiting(model, {name: partial(store.__setitem__, name) for name in names}):
        yield


@contextmanager
def visiting(model: LensModel, visits: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Calls a function with the activation at each full hook name during the forward passes inside the block.

    Raises:
        CtlensError: a name does not exist, or its hook did not fire.
    """
    if not visits:
        yield
        return
    fired: dict[str, Any] = {}

    def visit(name: str, activation: Tensor) -> None:
        fired[name] = True
        visits[name](activation)

    known = require_hooks(model, visits)
    hooks = [(known[name], _seeing(partial(visit, name))) for name in visits if name in known]
    with hooked(model, hooks), ExitStack() as modules:
        if FINAL_NORM in visits and FINAL_NORM not in known:
            handle = cast(Any, model).ln_final.register_forward_hook(
                lambda module, inputs, output: visit(FINAL_NORM, output)
            )
            modules.callback(handle.remove)
        yield
    _require_fired(visits, fired)


@contextmanager
def hooked(model: LensModel, hooks: Sequence[tuple[Any, HookFunction]]) -> Iterator[None]:
    """Puts functions on hook points, which are values of `model.hook_dict`, inside the block.

    It is `model.hooks` without its search: on a bridge, that one collects all hook points of the model anew for each
    function, which for the 30 layers of SmolLM2 takes a tenth of a forward pass over a small batch.
    """
    lens = cast(Any, model)
    lens.context_level += 1
    level = lens.context_level
    try:
        for point, function in hooks:
            point.add_hook(function, level=level)
        yield
    finally:
        for point, _ in hooks:
            point.remove_hooks(level=level)
        lens.context_level -= 1


def _seeing(visit: Callable[[Tensor], None]) -> HookFunction:
    def hook(activation: Tensor, hook: Any) -> None:
        visit(activation)

    return hook


@contextmanager
def editing(model: LensModel, edits: Mapping[str, HookFunction], *, required: bool = True) -> Iterator[None]:
    """Replaces activations during the forward passes inside the block.

    On a `TransformerBridge` an edit of `hook_resid_mid` alone would not reach the skip path; it
    is made through the attention output instead, so that it means the same on every model.

    Args:
        model: any `LensModel`.
        edits: per full hook name, a function of the activation that returns its replacement.
        required: refuse a block in which a hook did not fire; False where the block may run no pass.

    Raises:
        CtlensError: a name does not exist, its hook did not fire, or an edit of it would reach nothing.
    """
    fired: dict[str, Any] = {}
    trial = getattr(model, "ctlens_trial", None)
    direct: list[tuple[str, HookFunction]] = []
    rerouted: list[tuple[str, HookFunction]] = []
    known = require_hooks(model, edits)
    for name, edit in edits.items():
        if trial is not None and name in trial.read_only:
            raise CtlensError(f"{name} can be read on this model, and not edited: {trial.read_only[name]}.")
        if is_bridge(model) and name.endswith("hook_resid_mid"):
            rerouted += _through_attention_output(name, edit, fired)
        else:
            direct.append((name, _replacing(name, edit, fired)))
    # Rerouted hooks run last, so that they see the edits made upstream of hook_resid_mid.
    with hooked(model, [(known[name], hook) for name, hook in direct + rerouted]):
        yield
    if required:
        _require_fired(edits, fired)


def _replacing(name: str, edit: HookFunction, fired: dict[str, Any]) -> HookFunction:
    def hook(activation: Tensor, hook: Any) -> Tensor | None:
        fired[name] = True
        return edit(activation)

    return hook


def _through_attention_output(name: str, edit: HookFunction, fired: dict[str, Any]) -> list[tuple[str, HookFunction]]:
    block = name.removesuffix("hook_resid_mid")
    before: dict[str, Tensor] = {}

    def remember(activation: Tensor, hook: Any) -> None:
        before["resid_pre"] = activation

    def replace(activation: Tensor, hook: Any) -> Tensor:
        fired[name] = True
        middle = before["resid_pre"] + activation
        edited = edit(middle)
        return activation if edited is None else edited - before["resid_pre"]

    return [(f"{block}hook_resid_pre", remember), (f"{block}hook_attn_out", replace)]


def _require_fired(names: Iterable[str], fired: Mapping[str, Any]) -> None:
    silent = [name for name in names if name not in fired]
    if silent:
        raise CtlensError(f"hook {silent[0]} did not fire: the model does not compute it, or no forward pass was made.")
