"""The audit: a model labels prompts, is trained on its labels, and is asked before and after."""

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
from ctlens.auditing.exact import histogram, moments
from ctlens.auditing.labels import Label, label_distributions, labels_of_one, resolved, save_labels
from ctlens.auditing.pools import Asked, asked_of, labelled_prompts, require_apart
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
from ctlens.data.pairs import Pair, Prompt
from ctlens.losses import BCT
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
    selectors: Sequence[str | Selector],
    *,
    heldout: Pairs = (),
    pools: Sequence[str] = ("wrapped",),
    training: TrainConfig | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Audit:
    """Trains a model on labels that it gives itself, once per selector and pool, and measures its risk exactly.

    The labels are chosen from sampled answers of the model as it is, and the model is trained on them by cross-entropy.
    Risk is the probability of a bad answer, by enumeration of all answers above a small probability; what the labels
    are by a closed form, or by all ways in which their samples can come out.

    Args:
        model: the model, or several by name; none is changed.
        pool: the pairs whose prompts are labelled. `ctlens.pairs` makes them of two lists of texts.
        selectors: names, see `ctlens.auditing.selector_named`, or selectors.
        heldout: pairs that are only asked; none of their prompts may be labelled.
        pools: which prompts of a pair are labelled: `"wrapped"`, `"clean"`, or `"mixed"` for both in turns; a
            training for each.
        training: settings of the training; its seed is replaced. By default few steps, without retention.
        temperature: of the samples of the selectors that are named.
        seed: decides the samples and the training.
        out: a new folder for the labels (`labels.jsonl`), the result and the settings; None keeps nothing on disk.
        progress: show a progress bar.

    Raises:
        CtlensError: the pool has no pairs, a prompt names no bad answer, a selector is unknown or gives what it may
            not, a held-out prompt would be labelled, or a model's answers cannot be enumerated.
    """
    models = _named(model)
    chosen = resolved(selectors, temperature)
    asked = asked_of(pool, heldout)
    if not pools or len(set(pools)) < len(pools):
        raise CtlensError("name at least one pool, and each once: wrapped, clean or mixed.")
    of_pools = {kind: labelled_prompts(pool, kind) for kind in pools}
    require_apart([prompt for prompts in of_pools.values() for prompt in prompts], asked)
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
        "selectors": {selector.name: selector.source.described() for selector in chosen},
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
    n_labels: np.ndarray
    exact: list[bool]
    labels: list[Label]


class _Work:
    """The work on one model: its answers before training, and after each training on its labels."""

    def __init__(
        self, model: LensModel, asked: Sequence[Asked], of_pools: Mapping[str, Sequence[Prompt]], config: TrainConfig
    ) -> None:
        self.model = model
        self.prompts = [one.prompt for one in asked]
        self.of_pools = of_pools
        self.labelled = list(dict.fromkeys(prompt for prompts in of_pools.values() for prompt in prompts))
        self.config = config
        self.branching = Branching()
        self.answerer = Answerer(model, config.max_new_tokens)

    def of_all(self, selectors: Sequence[Selector], done: Callable[[], object]) -> _OfOrganism:
        """Measures the model, and trains and measures it once per selector and pool; calls `done` after each."""
        own = self.answerer.enumerated(self.prompts, self.branching)
        known = [self._known_of(selector) for selector in selectors]
        drawn = [labels_of_one(self.answerer, self.labelled, selector, self.config.seed) for selector in selectors]
        shape = (len(selectors), len(self.of_pools))
        after = np.zeros((2, *shape, len(own)))
        n_labels = np.zeros(shape, dtype=int)
        for (number, labels), (at, prompts) in product(enumerate(drawn), enumerate(self.of_pools.values())):
            given = {label.prompt: label.label for label in labels}
            pairs = [Pair(prompt, prompt, target=given[prompt]) for prompt in prompts if given[prompt]]
            n_labels[number, at] = len(pairs)
            after[:, number, at] = self._measured(self._trained(pairs))
            done()
        of_labels = np.stack([found for found, _ in known], axis=1)
        return _OfOrganism(
            before=np.array([each.risk for each in own]),
            missed=np.array([each.missed for each in own]),
            moments=np.array([moments(each) for each in own]),
            histogram=np.array([histogram(each) for each in own]),
            after=after[0],
            missed_after=after[1],
            label_risk=of_labels[0],
            kept=of_labels[1],
            drawn_bad=np.stack([self._bad_of(labels) for labels in drawn]),
            divergence=of_labels[2],
            n_labels=n_labels,
            exact=[exact for _, exact in known],
            labels=[label for labels in drawn for label in labels],
        )

    def _known_of(self, selector: Selector) -> tuple[Float[np.ndarray, "3 prompt"], bool]:
        """Risk, probability and divergence of the labels of each prompt, NaN where it has none; if all are exact."""
        known = label_distributions(self.answerer, self.labelled, selector, self.branching, self.config.seed)
        by_prompt = dict(zip(self.labelled, known, strict=True))
        found = np.full((3, len(self.prompts)), np.nan)
        for index, prompt in enumerate(self.prompts):
            if prompt in by_prompt:
                labels = by_prompt[prompt]
                found[:, index] = labels.risk, labels.kept, labels.divergence
        return found, all(labels.exact for labels in known)

    def _bad_of(self, labels: Sequence[Label]) -> Float[np.ndarray, " prompt"]:
        """Whether the label of each prompt is bad, 0 or 1; NaN where it has none."""
        given = {label.prompt: label.label for label in labels if label.label is not None}
        verdicts = [judge(prompt, given[prompt]) if prompt in given else None for prompt in self.prompts]
        return np.array([float("nan") if verdict is None else float(verdict == "bad") for verdict in verdicts])

    def _measured(self, model: LensModel) -> Float[np.ndarray, "2 prompt"]:
        """The risk of a model at each prompt, and what the enumeration misses."""
        answerer = Answerer(model, self.config.max_new_tokens)
        found = answerer.enumerated(self.prompts, self.branching, any_mass=True)
        return np.array([[each.risk for each in found], [each.missed for each in found]])

    def _trained(self, pairs: Sequence[Pair]) -> LensModel:
        """The model after training on labels; itself where a selector dropped every prompt."""
        if not pairs:
            return self.model
        trainer = Trainer(self.model, pairs, BCT(), self.config)
        for _ in trainer:  # not `train`, which an interrupt ends with the model as it is
            pass
        return trainer.model


def _result(
    found: Sequence[_OfOrganism],
    asked: Sequence[Asked],
    organisms: tuple[str, ...],
    selectors: Sequence[Selector],
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
        selectors=tuple(selector.name for selector in selectors),
        pools=pools,
        sides=tuple(one.prompt_side for one in asked),
        splits=tuple(one.split for one in asked),
        labels={name: [one.pair.labels.get(name, "") for one in asked] for name in named},
        exact=tuple(all(flags) for flags in zip(*(of_one.exact for of_one in found), strict=True)),
        settings=settings,
        groups=groups_of([one.pair for one in asked]),
    )
