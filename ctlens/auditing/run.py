"""The audit: a model is trained on labels of its own, or on agreement with itself, and is asked before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ctlens.analysis.base.result import groups_of
from ctlens.auditing.answers import Answerer
from ctlens.auditing.base import Method
from ctlens.auditing.exact import histogram, moments
from ctlens.auditing.labels import Label, label_distributions, labels_of_one, save_labels
from ctlens.auditing.methods import resolved
from ctlens.auditing.pools import Asked, asked_of, facing, require_apart
from ctlens.auditing.result import EVERY_ORGANISM, Audit
from ctlens.auditing.selectors import Selector
from ctlens.core.config import environment, to_dict
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder, require_free, write_json
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.losses import Loss
from ctlens.models.adopt import adopt
from ctlens.models.enumeration import Branching
from ctlens.models.parameters import fingerprint
from ctlens.threats import judge
from ctlens.training import TrainConfig, Trainer

# Without retention, as label-then-train methods are; few and small steps, so that labels drawn at temperature 1, which
# teach nothing new, leave the shipped organism's risk where it is (measured: +1.5 points; 100 steps at 5e-4 add 5).
LABEL_TRAINING = TrainConfig(steps=40, batch_size=32, lr=2e-4, retention=0.0, trainable=("attn", "mlp"))


@public
def audit(
    model: LensModel | Mapping[str, LensModel],
    pool: Pairs,
    methods: Sequence[str | Method],
    *,
    heldout: Pairs = (),
    pools: Sequence[str] = ("wrapped",),
    training: TrainConfig | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Audit:
    """Trains a model without any truth from outside, once per method and pool, and measures its risk exactly.

    A selector labels prompts with sampled answers of the model as it is, and the model is trained on the labels by
    cross-entropy. A regulariser has no labels: it holds each prompt of the pool to the other prompt of its pair. Risk
    is the probability of a bad answer, by enumeration of all answers above a small probability; what the labels are by
    a closed form, or by all ways in which their samples can come out.

    Args:
        model: the model, or several by name; none is changed.
        pool: the pairs whose prompts are trained on. `ctlens.pairs` makes them of two lists of texts.
        methods: names, see `ctlens.auditing.method_named`; selectors or regularisers.
        heldout: pairs that are only asked; none of their prompts may be trained on.
        pools: which prompts of a pair are trained on: `"wrapped"`, `"clean"`, or `"mixed"` for both in turns; a
            training for each.
        training: settings of the training; its seed is replaced. By default few steps, without retention.
        temperature: of the samples of the selectors that are named.
        seed: decides the samples and the training.
        out: a new folder for the labels (`labels.jsonl`), the result and the settings; None keeps nothing on disk.
        progress: show a progress bar.

    Raises:
        CtlensError: the pool has no pairs, a prompt names no bad answer, a method is unknown or gives what it may
            not, a regulariser's pair has one prompt twice, a held-out prompt would be trained on, or a model's answers
            cannot be enumerated.
    """
    models = _named(model)
    chosen = resolved(methods, temperature)
    asked = asked_of(pool, heldout)
    if not pools or len(set(pools)) < len(pools):
        raise CtlensError("name at least one pool, and each once: wrapped, clean or mixed.")
    of_pools = {kind: facing(pool, kind) for kind in pools}
    trained = [prompt for pairs in of_pools.values() for pair in pairs for one in chosen for prompt in one.seen(pair)]
    require_apart(trained, asked)
    if out is not None:
        require_free(out)
    config = replace(training or LABEL_TRAINING, seed=seed)
    found: list[_OfOrganism] = []
    with (
        one_thread(),
        progress_bar(total=len(models) * len(chosen) * len(of_pools), desc="audit", shown=progress) as bar,
    ):
        for organism in models.values():
            work = _Work(organism, asked, of_pools, config)
            found.append(work.of_all(chosen, bar.update))
    settings = {
        "training": to_dict(config),
        "temperature": temperature,
        "seed": seed,
        "models": {name: fingerprint(organism) for name, organism in models.items()},
        "methods": {method.name: method.described() for method in chosen},
        "smallest": Branching().smallest,
    }
    result = _result(found, asked, tuple(models), chosen, tuple(of_pools), settings)
    if out is not None:
        with atomic_folder(out) as folder:
            save_labels(folder / "labels.jsonl", [label for of_one in found for label in of_one.labels])
            result.save(folder / "audit.safetensors")
            write_json(folder / "config.json", settings)
            write_json(folder / "environment.json", environment())
    return result


def _named(model: LensModel | Mapping[str, LensModel]) -> dict[str, LensModel]:
    models = dict(model) if isinstance(model, Mapping) else {"model": model}
    if not models:
        raise CtlensError("there is no model to audit: give one, or several by name.")
    if EVERY_ORGANISM in models:
        raise CtlensError(f"no model can be called {EVERY_ORGANISM!r}, as the row of all of them is: rename it.")
    for one in models.values():
        adopt(one)
    return models


class _OfOrganism(NamedTuple):
    """The numbers of one model, as in `Audit` without the axis of organisms, and its labels."""

    before: np.ndarray
    missed: np.ndarray
    moments: np.ndarray
    histogram: np.ndarray
    after: np.ndarray
    missed_after: np.ndarray
    label_risk: np.ndarray
    kept: np.ndarray
    drawn_bad: np.ndarray
    divergence: np.ndarray
    n_trained: np.ndarray
    exact: list[bool]
    labels: list[Label]


class _OfLabels(NamedTuple):
    """What a method's labels of each prompt are, NaN where it has none, and those that were drawn."""

    risk: Float[np.ndarray, " prompt"]
    kept: Float[np.ndarray, " prompt"]
    divergence: Float[np.ndarray, " prompt"]
    drawn_bad: Float[np.ndarray, " prompt"]
    exact: bool
    labels: list[Label]


class _Work:
    """The work on one model: its answers before training, and after each training."""

    def __init__(
        self, model: LensModel, asked: Sequence[Asked], of_pools: Mapping[str, Sequence[Pair]], config: TrainConfig
    ) -> None:
        self.model = model
        self.prompts = [one.prompt for one in asked]
        self.of_pools = of_pools
        self.labelled = list(dict.fromkeys(pair.wrapped for pairs in of_pools.values() for pair in pairs))
        self.config = config
        self.branching = Branching()
        self.answerer = Answerer(model, config.max_new_tokens)

    def of_all(self, methods: Sequence[Method], done: Callable[[], object]) -> _OfOrganism:
        """Measures the model, and trains and measures it once per method and pool; calls `done` after each."""
        own = self.answerer.enumerated(self.prompts, self.branching)
        known = [self._labels_of(method) for method in methods]
        shape = (len(methods), len(self.of_pools))
        after = np.zeros((2, *shape, len(own)))
        n_trained = np.zeros(shape, dtype=int)
        for (number, method), (at, pairs) in product(enumerate(methods), enumerate(self.of_pools.values())):
            labels = {label.prompt: label.label for label in known[number].labels}
            trained_on = method.trained_on(pairs, labels)
            n_trained[number, at] = len(trained_on)
            after[:, number, at] = self._measured(self._trained(trained_on, method.trained_with))
            done()
        return _OfOrganism(
            before=np.array([each.risk for each in own]),
            missed=np.array([each.missed for each in own]),
            moments=np.array([moments(each) for each in own]),
            histogram=np.array([histogram(each) for each in own]),
            after=after[0],
            missed_after=after[1],
            label_risk=np.stack([each.risk for each in known]),
            kept=np.stack([each.kept for each in known]),
            drawn_bad=np.stack([each.drawn_bad for each in known]),
            divergence=np.stack([each.divergence for each in known]),
            n_trained=n_trained,
            exact=[each.exact for each in known],
            labels=[label for each in known for label in each.labels],
        )

    def _labels_of(self, method: Method) -> _OfLabels:
        """The labels of each prompt: in distribution, and as they are drawn."""
        found = np.full((4, len(self.prompts)), np.nan)
        if not isinstance(method, Selector):
            return _OfLabels(*found, exact=True, labels=[])
        known = label_distributions(self.answerer, self.labelled, method, self.branching, self.config.seed)
        drawn = labels_of_one(self.answerer, self.labelled, method, self.config.seed)
        of_prompts = {label.prompt: (labels, label) for labels, label in zip(known, drawn, strict=True)}
        for index, prompt in enumerate(self.prompts):
            if prompt in of_prompts:
                labels, label = of_prompts[prompt]
                found[:, index] = labels.risk, labels.kept, labels.divergence, _bad(label)
        return _OfLabels(*found, exact=all(labels.exact for labels in known), labels=drawn)

    def _measured(self, model: LensModel) -> Float[np.ndarray, "2 prompt"]:
        """The risk of a model at each prompt, and what the enumeration misses."""
        answerer = Answerer(model, self.config.max_new_tokens)
        found = answerer.enumerated(self.prompts, self.branching, any_mass=True)
        return np.array([[each.risk for each in found], [each.missed for each in found]])

    def _trained(self, pairs: Sequence[Pair], loss: Loss) -> LensModel:
        """The model after a training; itself where a selector dropped every prompt."""
        if not pairs:
            return self.model
        trainer = Trainer(self.model, pairs, loss, self.config)
        for _ in trainer:  # not `train`, which an interrupt ends with the model as it is
            pass
        return trainer.model


def _bad(label: Label) -> float:
    """Whether a label is bad, 0 or 1; NaN where there is none."""
    return float("nan") if label.label is None else float(judge(label.prompt, label.label) == "bad")


def _result(
    found: Sequence[_OfOrganism],
    asked: Sequence[Asked],
    organisms: tuple[str, ...],
    methods: Sequence[Method],
    pools: tuple[str, ...],
    settings: dict[str, object],
) -> Audit:
    arrays = {
        name: np.stack([getattr(of_one, name) for of_one in found])
        for name in _OfOrganism._fields
        if name not in ("exact", "labels")
    }
    named = dict.fromkeys(name for one in asked for name in one.pair.labels)
    return Audit(
        **arrays,
        organisms=organisms,
        methods=tuple(method.name for method in methods),
        pools=pools,
        sides=tuple(one.prompt_side for one in asked),
        splits=tuple(one.split for one in asked),
        labels={name: [one.pair.labels.get(name, "") for one in asked] for name in named},
        exact=tuple(all(flags) for flags in zip(*(of_one.exact for of_one in found), strict=True)),
        settings=settings,
        groups=groups_of([one.pair for one in asked]),
    )
