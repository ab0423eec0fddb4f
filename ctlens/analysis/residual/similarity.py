"""The analysis that asks whether two trainings move the residual stream alike.

Every number stands between its ceiling and its floors.

The shift of a model is its activation on the wrapped prompt minus the reference's (see
`ctlens.analysis.residual.shift_vectors`). All trainings that work pull towards the clean prompt, so their shifts
are alike for that reason alone. The part *off* the gap is the honest test of a shared mechanism;
*along* the gap of one token, the cosine of a prompt is a mere sign.

- Ceiling: a method with itself at another seed. Trainings that differ only in the order of their
  data are no more alike than that; a number *corrected* for it is divided by the root of the two
  ceilings (correction for attenuation; cosines only).
- Floors: how alike a method is to a training without consistency loss, the null, and to one
  random direction with the shift's length at every token.
- Intervals are over prompts, for these very models. How much depends on the seeds is in
  `seed_low` and `seed_high`, the range over pairs of models; numbers between methods are means
  over pairs of *different* seeds, because trainings of one seed see the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ctlens.analysis.base.forward import encoded_pairs, require_comparable, vector_site
from ctlens.analysis.base.recording import Readable, model_of
from ctlens.analysis.base.result import groups_of
from ctlens.analysis.residual.likeness import MethodSeeds
from ctlens.analysis.residual.shift_vectors import Shifts, shifts_at
from ctlens.analysis.residual.similarity_result import ShiftSimilarity
from ctlens.analysis.residual.similarity_statistics import SIMILARITY_MEASURES, arrays, names_of
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.models.hooks import Layers


@public
def shift_similarity(
    before: Readable,
    models: Mapping[tuple[str, int], Readable] | Mapping[str, Readable],
    pairs: Pairs,
    *,
    null: str | None = None,
    quantities: Sequence[str] = ("cosine", "mean_cosine"),
    k: int = 3,
    site: str = "resid_post",
    layers: Layers = "all",
    batch_size: int = 64,
    progress: bool = True,
) -> ShiftSimilarity:
    """Measures how alike trained models moved a hook point away from the reference, on wrapped prompts.

    >>> import ctlens as ct
    >>> base, pairs = ct.load_organism(), ct.threats.get("sycophancy").pairs(8, seed=0)
    >>> runs = {
    ...     (loss.name, seed): ct.train(base, pairs, loss, steps=2, seed=seed, progress=False).model
    ...     for loss in (ct.ACT(), ct.MLPCT())
    ...     for seed in (0, 1)
    ... }
    >>> found = ct.analysis.shift_similarity(base, runs, pairs, layers="last", progress=False).to_dataframe()
    >>> found.query("quantity == 'cosine' and part == 'off' and positions == 'last'")[["a", "b"]].values.tolist()
    [['act', 'act'], ['act', 'mlpct'], ['mlpct', 'mlpct']]

    Args:
        before: the reference, in eval mode; or its recording of both sides, from `ctlens.analysis.base.record`.
        models: trained models by (method, seed), in eval mode, or their recordings of the wrapped
            side; a name alone is seed 0.
        pairs: clean and wrapped prompts. `ctlens.pairs` makes them of two lists of texts.
        null: the method that is the floor, such as training on retention alone.
        quantities: of `ctlens.analysis.residual.similarity_statistics.SIMILARITY_MEASURES`. `cosine`: of the shifts at
            a prompt's tokens taken as one vector, the mean over prompts. `mean_cosine`: of the mean shifts.
            `cka`: debiased linear CKA, with more prompts than dimensions only. `principal`: the
            cosines of the principal angles between the spans of the `k` top shift directions.
        k: how many directions span a shift, for `principal`.
        site: a hook point with one vector per token, see `ctlens.models.hooks.SHORTHANDS`, or its full hook name.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        batch_size: prompts per forward pass at most; as many as fit with all their tokens and hook points into 256 MiB.
            If not even one does, models run again.
        progress: show a progress bar.

    Raises:
        CtlensError: a model does not compare with the reference, is in training mode or has not
            moved, there is one model only or one twice, a pair does not align, a name is unknown,
            there are too few prompts for a quantity, or a recording lacks a hook point or a prompt.
    """
    base = model_of(before)
    keyed = _keyed(base, models)
    seeds = list(keyed)
    methods = tuple(dict.fromkeys(method for method, _ in seeds))
    if not quantities or len(set(quantities)) < len(quantities):
        raise CtlensError("name at least one quantity, and each of them once.")
    for name in quantities:
        if name not in SIMILARITY_MEASURES:
            raise unknown("quantity", name, list(SIMILARITY_MEASURES))
    if null is not None and null not in methods:
        raise unknown("null", null, methods)
    rows = encoded_pairs(base, pairs, ("shared",))
    at = vector_site(base, site, layers)
    found = shifts_at(before, list(keyed.values()), rows, at.hook_names, batch_size, progress)
    _require_moved(seeds, found)
    groups = groups_of(pairs)
    return ShiftSimilarity(
        **arrays(found, seeds, quantities, k, groups),
        groups=groups,
        quantities=names_of(quantities, k),
        methods=methods,
        layers=at.layers,
        null=null or "",
        one_seed=tuple(method for method in methods if [name for name, _ in seeds].count(method) == 1),
        site=at.site,
    )


def _keyed(
    base: LensModel, models: Mapping[tuple[str, int], Readable] | Mapping[str, Readable]
) -> dict[tuple[str, int], Readable]:
    """The models by method and seed; they compare with the reference."""
    seeds = [(key, 0) if isinstance(key, str) else key for key in models]
    if len(seeds) < 2:
        raise CtlensError("a comparison needs at least two models: give them by (method, seed).")
    if len(set(seeds)) < len(seeds):
        raise CtlensError(f"a model is given twice ({seeds}): a name alone is seed 0.")
    for model in models.values():
        require_comparable(base, model_of(model))
    return dict(zip(seeds, models.values(), strict=True))


def _require_moved(seeds: MethodSeeds, found: Sequence[dict[tuple[str, str], Shifts]]) -> None:
    length = sum(np.einsum("naa->a", shifts.gram) for of_layer in found for shifts in of_layer.values())
    for key, moved in zip(seeds, np.asarray(length), strict=True):
        if not moved:
            raise CtlensError(
                f"the model {key} does not differ from the one before, so its shift is zero everywhere: leave it out."
            )
