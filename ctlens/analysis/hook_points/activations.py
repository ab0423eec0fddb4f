"""Activations at any hook points of any prompts, and what one patch of one of them does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.patching.hooked import WITH_HEADS, write_of
from ctlens.analysis.patching.jobs import Jobs, patch_batch, patch_pairs
from ctlens.analysis.patching.sweep import asked_sites, require_head, source_and_target
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.data.inputs import OnePair
from ctlens.data.pairs import Prompt, prompt
from ctlens.models.adopt import adopt
from ctlens.models.hooks import editing, resolve, run, run_capturing

PromptLike: TypeAlias = str | Prompt | Sequence[int] | Tensor
"""A user's message, a prompt, or token ids."""


class CapturedKeyError(CtlensError, KeyError):
    """CapturedKeyError is the error for a hook point that was not captured; a mapping raises a `KeyError`."""

    __str__ = CtlensError.__str__


@dataclass(frozen=True)
class Captured(Mapping[str, list[Tensor]]):
    """Captured holds activations by full hook name: of each prompt one tensor `[pos, ...]`, without padding.

    Attributes:
        activations: by full hook name, one tensor per prompt.
        tokens: of each prompt, the text of every token.
    """

    activations: Mapping[str, list[Tensor]]
    tokens: tuple[tuple[str, ...], ...]

    def __getitem__(self, name: str) -> list[Tensor]:
        if name not in self.activations:
            raise CapturedKeyError(f"{name!r} was not captured: name one in full, of {', '.join(self.activations)}.")
        return self.activations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def __repr__(self) -> str:
        return f"Captured({len(self.tokens)} prompts at {', '.join(self.activations)})"


@public
@torch.no_grad()
def capture(model: LensModel, prompts: PromptLike | Sequence[PromptLike], names: str | Sequence[str]) -> Captured:
    """Captures the activations at any hook points, as tensors.

    >>> import ctlens as ct
    >>> model = ct.load_organism()
    >>> found = ct.capture(model, ct.threats.get("jailbreak").pairs(2)[0].wrapped, ["resid_post", "hook_embed"])
    >>> len(found), found["hook_embed"][0].shape[1], len(found.tokens[0]) == len(found["hook_embed"][0])
    (5, 96, True)

    Args:
        model: in eval mode.
        prompts: one, or several: texts, which are the user's message, `Prompt`s, or token ids, which are taken as they
            are, in a list or a tensor of one or two axes.
        names: full hook names, which `hook_table` lists, or short ones such as `"resid_post"` for all layers.

    Raises:
        CtlensError: there is no prompt or no name, a name does not exist, or the model has no tokenizer for a text.
    """
    adopt(model)
    require_eval(model)
    asked = [name for given in ([names] if isinstance(names, str) else names) for name in resolve(model, given)]
    rows = [prompt_ids(model, given) for given in _listed(prompts)]
    if not asked or not rows:
        raise CtlensError("there is nothing to capture: give at least one prompt and one name of a hook point.")
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in asked}
    for ids in rows:
        _, seen = run_capturing(model, torch.tensor([ids], device=device), asked, grad=False, logits=False)
        for name, activation in seen.items():
            found[name].append(activation[0])
    return Captured(found, tuple(_words(model, ids) for ids in rows))


def _listed(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """The prompts in a list, also if one is given alone."""
    if isinstance(prompts, str | Prompt):
        return [prompts]
    if isinstance(prompts, Tensor):
        return [prompts] if prompts.ndim == 1 else list(prompts)
    given = list(prompts)
    tokens = [item for item in given if isinstance(item, int)]
    return [tokens] if tokens else [item for item in given if not isinstance(item, int)]


def prompt_ids(model: LensModel, given: PromptLike) -> list[int]:
    """The token ids of a prompt: a text is the user's message, rendered; ids are taken as they are.

    Raises:
        CtlensError: it has no tokens, or it is a text and the model has no tokenizer.
    """
    if isinstance(given, str | Prompt):
        if model.tokenizer is None:
            raise CtlensError("the model has no tokenizer for a text: give token ids, or load it with a tokenizer.")
        turns = (prompt(given) if isinstance(given, str) else given).turns
        return list(render(model.tokenizer, turns).ids)
    ids = [int(token) for token in given]
    if not ids:
        raise CtlensError("a prompt has no tokens: leave it out.")
    return ids


def _words(model: LensModel, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of every token; its number where there is no tokenizer."""
    if model.tokenizer is None:
        return tuple(map(str, ids))
    return tuple(model.tokenizer.decode([token]) for token in ids)


class OnePatch(NamedTuple):
    """One patch in logit differences: of the run as it is, of the patched one, and of the run that was copied from.

    Attributes:
        target: without the patch.
        patched: with it.
        source: of the run whose activation was taken.
    """

    target: float
    patched: float
    source: float

    @property
    def share(self) -> float:
        """The share of the way from target to source that the patch goes; NaN where they do not differ."""
        gap = self.source - self.target
        return (self.patched - self.target) / gap if gap else float("nan")


@public
@torch.no_grad()
def patch_one(
    model: LensModel,
    pair: OnePair,
    site: str,
    layer: int | None = None,
    position: int = -1,
    *,
    head: int | None = None,
    direction: str = "denoising",
) -> OnePatch:
    """Patches one activation of one pair: the clean run's into the wrapped run, or the other way round.

    >>> import ctlens as ct
    >>> model, (pair, *_) = ct.load_organism(), ct.threats.get("sycophancy").pairs(1, split="heldout")
    >>> ct.patch_one(model, pair, "resid_post", layer=-1).share  # the last token's last stream is the whole answer
    1.0

    Args:
        model: in eval mode.
        pair: whose prompts name a good and a bad answer.
        site: as of `ct.analysis.patch`, short or in full, as `"blocks.3.hook_resid_post"`.
        layer: of a short name: its number, negative ones from the last.
        position: among the aligned tokens, -1 for the last.
        head: of `"z"` and `"pattern"`, and of no other site.
        direction: `"denoising"` or `"noising"`.

    Raises:
        CtlensError: as `ct.analysis.patch`; or there is no such position or head.
    """
    require_eval(model)
    at = asked_sites(model, [site], "all" if layer is None else layer)[site]
    if len(at.layers) > 1:
        raise CtlensError(f"{site} is a site of every layer: name a layer, or the hook point in full.")
    (name,) = resolve(model, at.site, at.layers)
    require_head(model, at.site, head)
    if at.site in WITH_HEADS and head is None:
        raise CtlensError(f"{site} has heads: name one.")
    (prepared,) = patch_pairs(model, [pair], direction, "each", "shared")
    columns = prepared.columns
    if not -len(columns) <= position < len(columns):
        raise CtlensError(
            f"there are {len(columns)} aligned tokens, and none at {position}: count from the last one, -1."
        )
    device = next(model.parameters()).device
    batch = patch_batch([replace(prepared, columns=(columns[position],))], device)
    source, target = source_and_target(model, batch, [name])
    first = torch.zeros(1, dtype=torch.long, device=device)
    job = Jobs(site=first, pair=first, layer=first, column=first, head=first + (head or 0))

    def patched(activation: Tensor) -> Tensor:
        edited = activation.clone()
        write_of(at.site)(batch, job, source.states[name], edited, first, 0)
        return edited

    with editing(model, {name: patched}):
        logits = run(model, batch.target.side.tokens)
    said = batch.target.logit_diff
    return OnePatch(float(said(target.last)), float(said(batch.target.at_last(logits))), float(said(source.last)))
