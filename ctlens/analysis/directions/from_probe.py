"""The direction that a probe reads along, to steer with or to take out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from ctlens.analysis.base.positions import POSITIONS_IN_WORDS, PositionsOf
from ctlens.analysis.base.recording import Readable
from ctlens.analysis.base.states import States
from ctlens.analysis.directions.directions import Directions
from ctlens.analysis.probing.classifiers import weights
from ctlens.analysis.probing.tasks import Task
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.models.hooks import Layers


@public
def probe_direction(
    model: Readable | States,
    task: Task,
    towards: str,
    *,
    name: str,
    estimator: str = "ridge",
    positions: str | PositionsOf = "last",
    site: str = "resid_post",
    layers: Layers = "all",
    batch_size: int = 64,
    progress: bool = True,
) -> Directions:
    """Makes directions of a probe's weights, fitted on all prompts of a task, in units of the stream, by layer.

    A strength of 1 is as long as the means of the two classes are apart along it; without the
    direction a state has the component that the other class has on average. What a probe reads
    along need not be what the model uses: `steer` and `ablate` tell.

    >>> import ctlens as ct
    >>> model, pairs = ct.load_organism(), ct.threats.get("jailbreak").pairs(32, split="heldout")
    >>> task = ct.analysis.wrapper_present(pairs, model.tokenizer)
    >>> found = ct.analysis.probe_direction(model, task, "wrapper", name="base", layers=[2], progress=False)
    >>> found.name
    "ridge probe for 'wrapper' at the last token of base"

    Args:
        model: in eval mode; or its recording; or its states on the task's prompts, from `Task.states`.
        task: what the probe is asked, see `ctlens.analysis.probing.tasks`.
        towards: the label that the direction points to, from all others.
        name: of the model; it stands in every result.
        estimator: `"ridge"`, `"logistic"`, or `"mass_mean"`: the difference of the means.
        positions: where the states are read, see `ctlens.analysis.base.states`.
        site: the hook point, one of `ctlens.analysis.directions.directions.DIRECTION_SITES`.
        layers: which ones, see `ctlens.models.hooks.select_layers`.
        batch_size: prompts per forward pass.
        progress: show a progress bar. Like the positions, the site, the layers and the batch size it is not
            used where states are given.

    Raises:
        CtlensError: a name is unknown, the model is in training mode, the states are not of the
            task's prompts, or the probe tells nothing apart at a layer.
    """
    if towards not in task.labels:
        raise unknown("label", towards, sorted(set(task.labels)))
    if not isinstance(model, States):
        model = task.states(
            model, positions=positions, site=site, layers=layers, batch_size=batch_size, progress=progress
        )
    if model.values.shape[1] != len(task.labels):
        raise CtlensError(
            f"there are states of {model.values.shape[1]} prompts for {len(task.labels)} labels: "
            "give those of the task's prompts, from task.states(model)."
        )
    positive = np.array(task.labels) == towards
    by_layer = [_of_layer(estimator, values.astype(float), positive) for values in model.values]
    vectors = [vector for vector, _ in by_layer]
    rest = [of_other for _, of_other in by_layer]
    source = f"{estimator.replace('_', '-')} probe for {towards!r} {POSITIONS_IN_WORDS[model.positions]}"
    found = Directions.from_vectors(np.stack(vectors), model.layers, site=model.site, source=source, model=name)
    return replace(found, rest=np.array(rest)[:, None])


def _of_layer(
    estimator: str, values: Float[np.ndarray, "prompt d"], positive: np.ndarray
) -> tuple[Float[np.ndarray, " d"], float]:
    """The direction, as long as the classes are apart along it, and the other class's component."""
    vector = weights(estimator, values, positive)
    unit = vector / max(float(np.linalg.norm(vector)), np.finfo(float).tiny)
    there = float((values[positive] @ unit).mean())
    rest = float((values[~positive] @ unit).mean())
    return max(there - rest, 0.0) * unit, rest
