"""Runs a model once over the prompts of pairs and keeps what analyses read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from ctlens.analysis.base.contrast import up_to_contrast
from ctlens.analysis.base.forward import require_eval
from ctlens.analysis.base.recording import LOGITS, Recording, read
from ctlens.analysis.base.result import groups_of
from ctlens.core.errors import CtlensError, located
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.batch import pad, require_room
from ctlens.data.chat import render
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.generation import Ids
from ctlens.models.hooks import Layers, resolve
from ctlens.models.parameters import fingerprint

BETWEEN_TOKENS = ("hook_pattern", "hook_attn_scores")

Prompted: TypeAlias = tuple[str, int, Ids]
"""A side, the index of a pair among the pairs, and the tokens that are run."""


@public
def record(
    model: LensModel,
    pairs: Pairs,
    *,
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    sides: Sequence[str] = ("clean", "wrapped"),
    batch_size: int = 64,
    progress: bool = True,
) -> Recording:
    """Records what a model computes on the prompts of pairs, for several analyses to read in place of the model.

    `residual_shift`, `shift_similarity`, `logit_lens`, `logit_attribution`, `states`, `mean_difference`, `probe`
    and `probe_direction` read a recording, on the same pairs or some of them. With the same pairs and the same
    batch size the numbers are the same to the last bit.

    >>> import ctlens as ct
    >>> base, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(8, split="heldout")
    >>> seen = ct.analysis.record(base, pairs, progress=False)
    >>> lens = ct.analysis.logit_lens(seen, pairs, progress=False)
    >>> bool((lens.values == ct.analysis.logit_lens(base, pairs, progress=False).values).all())
    True

    Args:
        model: in eval mode.
        pairs: whose prompts are run. A prompt whose good and bad answer begin alike is also run with what they have in
            common, for analyses of their difference. `ctlens.pairs` makes them of two lists of texts.
        sites: hook points with values at every token, see `ctlens.models.hooks.SHORTHANDS`; full names; or
            `"logits"`, those at the last token. `logit_attribution` needs
            `ctlens.analysis.outputs.logit_lens.ATTRIBUTION_SITES`.
        layers: the layers of each site, see `ctlens.models.hooks.select_layers`.
        sides: which prompts of a pair, see `ctlens.data.pairs.PROMPT_SIDES`.
        batch_size: prompts per forward pass; beside the recording, one batch is held with all its hook points.
        progress: show a progress bar.

    Raises:
        CtlensError: the model is in training mode, a name is unknown, a hook point has no values at
            every token, there are no pairs, a pair lacks a side or has words that the model's
            tokenizer does not know, or a prompt is too long.
    """
    require_eval(model)
    names = list(dict.fromkeys(name for site in sites for name in _names(model, site, layers)))
    if not names:
        raise CtlensError("there is nothing to record: give at least one site.")
    passes = [part for side in sides for part in _passes(model, pairs, side, batch_size)]
    prompts = [prompt for part in passes for prompt in part]
    lengths = np.array([len(ids) for *_, ids in prompts])
    values: dict[str, np.ndarray] = {}
    device = next(model.parameters()).device
    done = dict.fromkeys(names, 0)
    for part in progress_bar(passes, desc="forward", shown=progress, leave=False):
        batch = pad([ids for *_, ids in part]).to(device)
        for name, found in read(model, batch, names).items():
            rows = (found if name == LOGITS else found[batch.mask]).cpu().numpy()
            total = len(prompts) if name == LOGITS else lengths.sum()
            array = values.setdefault(name, np.empty((total, *rows.shape[1:]), dtype=np.float32))
            array[done[name] : done[name] + len(rows)] = rows
            done[name] += len(rows)
    return Recording(
        groups=groups_of(pairs),
        values=values,
        tokens=np.array([token for *_, ids in prompts for token in ids]),
        lengths=lengths,
        numbers=np.array([number for _, number, _ in prompts]),
        sides=tuple(side for side, *_ in prompts),
        weights=fingerprint(model),
        model=model,
    )


def _names(model: LensModel, site: str, layers: Layers) -> list[str]:
    """The hook names of a site; raises where it has no values at every token."""
    if site == LOGITS:
        return [LOGITS]
    names = resolve(model, site, layers)
    if names[0].endswith(BETWEEN_TOKENS):
        raise CtlensError(
            f"{site!r} has one value per pair of tokens, and a recording holds one vector per token: "
            "give the model itself to the analysis, or choose another site."
        )
    return names


def _passes(model: LensModel, pairs: Sequence[Pair], side: str, batch_size: int) -> Iterator[list[Prompted]]:
    """Yields the prompts of each forward pass: those of all pairs, then those that go on into an answer."""
    plain: list[Prompted] = []
    further: list[Prompted] = []
    for number, pair in enumerate(pairs):
        prompt = pair.side(side)
        whose = f"the {side} prompt of pair {number + 1}"
        if prompt is None:
            raise CtlensError(f"pair {number + 1} has no {side} prompt: give one, or leave it out.")
        with located(whose):
            asked = render(model.tokenizer, prompt.turns)
            longer = up_to_contrast(model.tokenizer, prompt, asked)
        require_room(len(longer), model.cfg.n_ctx, whose)
        plain.append((side, number, asked.ids))
        further += [(side, number, longer)] if longer != asked.ids else []
    for prompts in (plain, further):
        yield from (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
