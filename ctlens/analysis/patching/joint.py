"""Joint patching: several activations of one run put into another together, beside each of them alone.

What single patches do need not add up. Two heads may write the same thing, so that either alone does what both do; or
one reads what the other writes, so that neither does anything alone. The *interaction* is the change by all patches
together less the sum of the changes by each alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.base.metrics import UserMetric, measured, named_metrics
from ctlens.analysis.base.result import groups_of
from ctlens.analysis.patching.hooked import WITH_HEADS, write_of
from ctlens.analysis.patching.jobs import Jobs, PatchBatch, patch_batch, patch_pairs
from ctlens.analysis.patching.joint_result import JointPatching
from ctlens.analysis.patching.paths import PATH_POSITIONS
from ctlens.analysis.patching.sweep import Recorded, asked_sites, fitting, require_head, source_and_target
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.models.hooks import SHORTHANDS, editing, resolve, run

_HEAD = re.compile(r"L(\d+)H(\d+)$")


@dataclass(frozen=True)
class JointPatch:
    """One of the activations that are patched together.

    Attributes:
        name: of its row in the result.
        hook_name: in full.
        site: the short name of the hook point.
        heads: that are patched; the first one alone where the site has none.
    """

    name: str
    hook_name: str
    site: str
    heads: tuple[int, ...]


@public
@torch.no_grad()
def joint_patch(
    model: LensModel,
    pairs: Pairs,
    patches: Sequence[str | tuple[str, int]],
    *,
    direction: str,
    positions: str = "all",
    window: str = "shared",
    metrics: Sequence[str | UserMetric] = ("logit_diff",),
    max_batch: int | None = None,
    progress: bool = True,
) -> JointPatching:
    """Joint patching: several hook points or heads patched together, and each of them alone.

    >>> import ctlens as ct
    >>> model, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(4, split="heldout")
    >>> heads = ["L2H0", ("blocks.3.attn.hook_z", 1)]
    >>> found = ct.analysis.joint_patch(model, pairs, heads, direction="denoising", progress=False)
    >>> found.to_dataframe()["patched"].tolist()
    ['all together', 'L2H0', 'blocks.3.attn.hook_z head 1', 'sum of each alone', 'interaction']

    Args:
        model: in eval mode.
        pairs: with good and bad answers. `ctlens.pairs` makes them of two lists of texts.
        patches: full hook names, `"blocks.1.mlp.hook_post"`, of hook points that `patch` takes; for one head of
            `hook_z` or `hook_pattern` the name and the head's number, `("blocks.2.attn.hook_z", 3)`; for what a head
            writes also its name in figures, `"L2H3"`.
        direction: `"denoising"`, the clean run's activations into the wrapped run, or `"noising"`, the reverse.
        positions: the aligned tokens at which all are patched: `"last"` the last token, `"content"` those in front of
            it, `"all"` all.
        window: which tokens are aligned, see `patch`.
        metrics: see `patch`.
        max_batch: pairs held at once; by default as many as fit.
        progress: show a progress bar.

    Raises:
        CtlensError: as `patch`; or a name is not in full, there is no such head, or an activation is named twice.
    """
    require_eval(model)
    chosen = _chosen(model, patches)
    if positions not in PATH_POSITIONS:
        raise unknown("choice of positions", positions, PATH_POSITIONS)
    measures = named_metrics(metrics)
    prepared = patch_pairs(model, pairs, direction, positions, window)
    longest = max(len(ids) for pair in prepared for ids in (pair.source, pair.target))
    size = max_batch or fitting(model, longest)
    sets = [chosen, *([one] for one in chosen)]
    values: list[np.ndarray] = []
    plain: list[np.ndarray] = []
    with progress_bar(total=len(sets) * len(prepared), desc="patches", shown=progress, leave=False) as bar:
        for start in range(0, len(prepared), size):
            batch = patch_batch(prepared[start : start + size], next(model.parameters()).device)
            source, target = source_and_target(model, batch, list(dict.fromkeys(one.hook_name for one in chosen)))
            runs = []
            for together in sets:
                last = _patched(model, batch, together, source)
                runs.append(measured(measures, last, batch.target, source.last).cpu().numpy())
                bar.update(len(last))
            values.append(np.stack(runs, 1))
            of_target = measured(measures, target.last, batch.target, source.last)
            of_source = measured(measures, source.last, batch.source, source.last)
            plain.append(torch.stack([of_target, of_source]).cpu().numpy())
    of_target, of_source = np.concatenate(plain, -1)
    return JointPatching(
        values=np.concatenate(values, -1),
        target=of_target,
        source=of_source,
        metrics=tuple(measures),
        patches=tuple(one.name for one in chosen),
        direction=direction,
        positions=positions,
        window=window,
        groups=groups_of(pairs),
    )


def _chosen(model: LensModel, patches: Sequence[str | tuple[str, int]]) -> list[JointPatch]:
    """The activations of these names.

    Raises:
        CtlensError: none is named, a name is not in full, there is no such head, or two of them overlap.
    """
    if not patches:
        raise CtlensError("there is nothing to patch: name at least one hook point.")
    found = [_one(model, given) for given in patches]
    named = [(one.hook_name, head) for one in found for head in one.heads]
    for twice in named:
        if named.count(twice) > 1:
            raise CtlensError(f"{twice[0]} is named twice, or by a head and as a whole: name each activation once.")
    return found


def _one(model: LensModel, given: str | tuple[str, int]) -> JointPatch:
    if isinstance(given, str) and (named := _HEAD.match(given)):
        layer, number = map(int, named.groups())
        (hook_name,) = resolve(model, "z", layer)
        return replace(_one(model, (hook_name, number)), name=given)
    hook_name, head = (given, None) if isinstance(given, str) else given
    if hook_name in SHORTHANDS:
        example = SHORTHANDS[hook_name].format(layer=0)
        raise CtlensError(f"{hook_name} is a site of every layer: name hook points in full, such as {example!r}.")
    site = asked_sites(model, [hook_name], "all")[hook_name].site
    require_head(model, site, head)
    every = range(model.cfg.n_heads if site in WITH_HEADS else 1)
    if head is None:
        return JointPatch(hook_name, hook_name, site, tuple(every))
    return JointPatch(f"{hook_name} head {head}", hook_name, site, (head,))


def _patched(
    model: LensModel, batch: PatchBatch, together: Sequence[JointPatch], source: Recorded
) -> Float[Tensor, "pair d_vocab"]:
    """The last logits of the target runs with some activations of the source runs."""
    by_hook = {one.hook_name: [other for other in together if other.hook_name == one.hook_name] for one in together}
    edits = {name: partial(_written, batch, chosen, source.states[name]) for name, chosen in by_hook.items()}
    with editing(model, edits):
        return batch.target.at_last(run(model, batch.target.side.tokens, batch.target.side.needed_mask))


def _written(batch: PatchBatch, chosen: Sequence[JointPatch], source: Tensor, activation: Tensor) -> Tensor:
    """The activation of one hook point with those of the source run written over it."""
    edited = activation.clone()
    rows = torch.arange(len(edited), device=edited.device)
    none = torch.zeros_like(rows)
    for one in chosen:
        for head in one.heads:
            jobs = Jobs(site=none, pair=rows, layer=none, column=none, head=none + head)
            write_of(one.site)(batch, jobs, source, edited, rows, 0)
    return edited
