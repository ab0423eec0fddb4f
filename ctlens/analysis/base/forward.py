"""Forward passes for analyses: pairs in batches, and models that are checked before they are run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ctlens.analysis.base.recording import Recording
from ctlens.core.errors import CtlensError
from ctlens.core.progress import progress_bar
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, PairBatch, collate, encode
from ctlens.data.pairs import Pair
from ctlens.models.adopt import adopt
from ctlens.models.hooks import SHORTHANDS, Layers, resolve, select_layers, site_at

_M = TypeVar("_M")
"""The label of the model before training."""
PER_HEAD = tuple(SHORTHANDS[name].split(".")[-1] for name in ("z", "pattern"))
PER_HEAD += ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_result")


def require_eval(*models: LensModel) -> None:
    """Raises a `CtlensError` unless every model can be adopted and is in eval mode; a recording cannot be run."""
    if any(isinstance(model, Recording) for model in models):
        raise CtlensError("this analysis runs the model, a recording cannot stand for it: give recording.model.")
    for model in models:
        adopt(model)
    if any(model.training for model in models):
        raise CtlensError("an analysis needs models in eval mode: call model.eval() first.")


def require_comparable(before: LensModel, after: LensModel) -> None:
    """Raises a `CtlensError` unless both models are in eval mode, of one shape, and read text alike."""
    require_eval(before, after)
    for name in ("n_layers", "n_heads", "d_model", "d_vocab"):
        here = getattr(before.cfg, name)
        there = getattr(after.cfg, name)
        if here != there:
            raise CtlensError(
                f"the models do not compare: {name} is {here} before and {there} after; give models of one shape."
            )
    if not _read_alike(before.tokenizer, after.tokenizer):
        raise CtlensError("the models do not compare: their tokenizers differ; give models that share one.")


def _read_alike(tokenizer: Any, other: Any) -> bool:
    """Tells whether two tokenizers have one vocabulary; a model without a tokenizer is compared with any."""
    if tokenizer is other or tokenizer is None or other is None:
        return True
    return tokenizer.get_vocab() == other.get_vocab()


def by_label(models: _M | Mapping[str, _M]) -> dict[str, _M]:
    """Models, or recordings of them, by label; a single one is called `"model"`.

    Raises:
        CtlensError: there are none.
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not named:
        raise CtlensError("there are no models: give at least one, by its label.")
    return named


def comparable_by_label(models: LensModel | Mapping[str, LensModel]) -> dict[str, LensModel]:
    """Models by label, as `by_label`, that are in eval mode and compare with each other.

    Raises:
        CtlensError: there are none, or one does not compare with the first.
    """
    named = by_label(models)
    first = next(iter(named.values()))
    for model in named.values():
        require_comparable(first, model)
    return named


def vector_hooks(model: LensModel, site: str, layers: Layers = "all") -> list[str]:
    """The hook names of a site that has one vector per token.

    Raises:
        CtlensError: as `resolve`, or the site has an axis of heads.
    """
    names = resolve(model, site, layers)
    if names[0].split(".")[-1] in PER_HEAD:
        raise CtlensError(f"{site!r} has one vector per head, not one per token: choose attn_out or resid_mid instead.")
    return names


class VectorSite(NamedTuple):
    """A site that has one vector per token: its short name where it has one, its layers, and their full hook names."""

    site: str
    layers: tuple[int, ...]
    hook_names: list[str]


def vector_site(model: LensModel, site: str, layers: Layers) -> VectorSite:
    """The site of a short or a full name, see `ctlens.models.hooks.site_at`.

    Raises:
        CtlensError: as `site_at` and `vector_hooks`; or the hook point stands in no layer.
    """
    at = site_at(site, layers)
    names = vector_hooks(model, at.site, at.layers)
    if not names[0].startswith("blocks."):
        raise CtlensError(f"{site} stands in no layer: name a hook point of a block.")
    return VectorSite(at.site, select_layers(model.cfg.n_layers, at.layers), names)


def pair_batches(
    model: LensModel, pairs: Sequence[Pair], window: str, batch_size: int, progress: bool
) -> Iterator[tuple[list[EncodedPair], PairBatch]]:
    """Yields pairs as encoded rows and as a batch on the model's device; raises as `encoded_pairs`."""
    yield from encoded_batches(model, encoded_pairs(model, pairs, (window,)), batch_size, progress)


def encoded_pairs(model: LensModel, pairs: Sequence[Pair], windows: Sequence[str]) -> tuple[EncodedPair, ...]:
    """Encodes every pair, and aligns its sides in every window.

    Raises:
        CtlensError: as `encode`, or a pair does not align, because an analysis leaves no pair out silently.
    """
    found = encode(pairs, model.tokenizer, windows=windows, n_ctx=model.cfg.n_ctx)
    if found.dropped:
        reason, count = next(iter(found.dropped.items()))
        raise CtlensError(f"{count} of {len(pairs)} pairs do not align ({reason}): leave them out.")
    return found.rows


def encoded_batches(
    model: LensModel, rows: Sequence[EncodedPair], batch_size: int, progress: bool
) -> Iterator[tuple[list[EncodedPair], PairBatch]]:
    """Yields encoded rows, in their order, with their batch on the model's device."""
    device = next(model.parameters()).device
    for start in progress_bar(range(0, len(rows), batch_size), desc="forward", shown=progress, leave=False):
        chosen = list(rows[start : start + batch_size])
        yield chosen, collate(chosen).to(device)
