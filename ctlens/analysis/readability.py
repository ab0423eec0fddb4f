"""How well a cue can be read from the states of a model, by a linear probe fitted on that model itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctlens.analysis.directions import group_names
from ctlens.analysis.states import Span, states
from ctlens.errors import CtlensError
from ctlens.intervals import bootstrap_mean
from ctlens.pairs import Pair
from ctlens.types import LensModel

PRESENCE = ""
FOLDS = 4


def readability(
    model: LensModel,
    pairs: Sequence[Pair],
    cue: str,
    *,
    place: str | Span,
    site: str,
    layers: Sequence[int],
    draws: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Float[np.ndarray, "layer 5"]:
    """Balanced accuracy, the ends of its interval over pairs, and its lowest and highest with shuffled labels.

    No request is in both the fitted and the tested part. The cue is the wrapper's presence,
    clean against wrapped prompts, or the value of a label, among wrapped prompts.

    Raises:
        CtlensError: a pair lacks the label, there is only one class, or there are too few requests.
    """
    sides = ("wrapped", "clean") if cue == PRESENCE else ("wrapped",)
    options = {"site": site, "batch_size": batch_size, "progress": progress}
    found = [states(model, pairs, side=side, place=place, layers=list(layers), **options) for side in sides]
    values = np.concatenate([side.values for side in found], 1)
    names = [side for side in sides for _ in pairs] if cue == PRESENCE else group_names(pairs, cue)
    classes = np.unique(names, return_inverse=True)[1]
    requests = np.unique([pair.clean.turns[-1].content for pair in pairs] * len(sides), return_inverse=True)[1]
    if classes.max() == 0:
        raise CtlensError(f"every pair has the same {cue!r}: a cue needs at least two values to be read.")
    if requests.max() + 1 < FOLDS:
        raise CtlensError(f"{requests.max() + 1} requests are too few to be split {FOLDS} ways: give more pairs.")
    shuffled = np.random.default_rng(seed)
    orders = [shuffled.permutation(len(classes)) for _ in range(draws)]
    rows = []
    for layer in values:
        scores = _scores(layer, classes, requests).reshape(len(sides), len(pairs)).mean(0)
        nulls = [_scores(layer, classes[order], requests).mean() for order in orders]
        rows.append([*bootstrap_mean(scores), min(nulls), max(nulls)])
    return np.array(rows)


def _scores(
    values: Float[np.ndarray, "prompt d"], classes: Int[np.ndarray, " prompt"], requests: Int[np.ndarray, " prompt"]
) -> Float[np.ndarray, " prompt"]:
    """Of each prompt, 0 where its class is missed; so weighted that every class counts alike."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=300))
    told = cross_val_predict(probe, values, classes, groups=requests, cv=GroupKFold(FOLDS))
    counts = np.bincount(classes)
    return (told == classes) * (len(classes) / ((counts > 0).sum() * counts[classes]))
