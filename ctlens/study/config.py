"""The plan of a study: its settings and the models that follow from them, each a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctlens import threats
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.labels import BASE
from ctlens.evaluation.result import OWN_PAIRS
from ctlens.study import conditions
from ctlens.study.conditions import ABLATED, BESIDE, CROSSED_CONDITIONS, EVERYTHING, METHODS, PERTURBED, RETENTION
from ctlens.training import TrainConfig

ORGANISM = "organism"
LOOKED_INTO = ("sycophancy", "jailbreak")
CEILING_SEEDS = 2
FULL = 3
TRAINING = TrainConfig(batch_size=16, lr=1e-3, trainable=("attn",))
"""The settings that every condition shares.

Where embeddings, norms and MLPs are trained too, half of a repair can be an edit of the words.
"""


@dataclass(frozen=True)
class StudyConfig:
    """What a study runs; equal configs give equal studies.

    Attributes:
        threats: trained on, one at a time; each trained model is evaluated on all of them. None
            given means all there are.
        methods: names of losses, `METHODS` when none are given; the retention-only control is always added.
        seeds: number of seeds, from 0.
        pairs: training pairs a threat.
        items: evaluation pairs a threat and split.
        training: settings shared by every cell, whatever its method: window (`"shared"` unless it names
            another), trainable parameters, steps, order of the pairs, retention, calibration; the seed
            is replaced by the cell's. By default attention alone is trained.
        looked_into: the threats whose models are compared inside, with the crossed conditions, every control
            and a second seed; by default those of `LOOKED_INTO` among the threats.
        beside: names of what is trained beside the methods there, see `ctlens.study.conditions`; by default `BESIDE`
            without what is a method already, or for a file its crossed conditions, as neutral words and other
            requests are those of the micro-world.
        organisms: how many; those behind the first are pretrained for the study.
        matched: the share of the gap in the logit difference at which methods are compared again, 0 to 1.
        model: the folder of what is trained, instead of the shipped organism.
        file: JSONL pairs to train and evaluate on, instead of threats.
        device: where models live, for example `"cuda"`.
        dtype: of their weights, for example `"bfloat16"`; adapters are then what is trained.
    """

    threats: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: int = 1
    pairs: int = 256
    items: int = 96
    training: TrainConfig = TRAINING
    looked_into: tuple[str, ...] | None = None
    beside: tuple[str, ...] | None = None
    organisms: int = 1
    matched: float = 0.5
    model: str = ""
    file: str = ""
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        known = [OWN_PAIRS] if self.file else threats.names()
        chosen = self.threats or tuple(known)
        looked = [OWN_PAIRS] if self.file else [name for name in LOOKED_INTO if name in chosen]
        defaults = {"threats": chosen, "methods": self.methods or METHODS}
        defaults |= {"looked_into": tuple(looked) if self.looked_into is None else self.looked_into}
        if self.beside is None:
            known_conditions = CROSSED_CONDITIONS if self.file else BESIDE
            defaults |= {"beside": tuple(name for name in known_conditions if name not in defaults["methods"])}
        for name, values in defaults.items():
            object.__setattr__(self, name, tuple(values))
        if self.training.window is None:
            object.__setattr__(self, "training", replace(self.training, window="shared"))
        self._check(known)

    def _check(self, known: Sequence[str]) -> None:
        for name, allowed in (("threats", known), ("looked_into", self.threats)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise unknown("threat", value, allowed)
        conditions.require_methods(self.methods)
        for name in ("threats", "looked_into", "beside"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise CtlensError(f"{name} must name each once, not {', '.join(values)}.")
        for name in self.beside or ():
            if name in (*self.methods, RETENTION):
                raise CtlensError(f"{name} is trained already: name it once.")
            conditions.get(name)
        for name in ("seeds", "pairs", "items", "organisms"):
            if getattr(self, name) < 1:
                raise CtlensError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.matched < 1:
            raise CtlensError(f"methods are matched at a share between 0 and 1, not {self.matched}.")
        if self.organisms > 1 and (self.model or self.file):
            raise CtlensError("several organisms are trained from the micro-world: leave out the model and the file.")

    @property
    def insides(self) -> tuple[str, ...]:
        """The threats that are looked into."""
        return self.looked_into or ()

    def beside_of(self, threat: str) -> list[str]:
        """The extra conditions that a threat allows: at the last token only where both prompts end alike."""
        alike = bool(self.file) or threats.get(threat).ends_alike
        return [name for name in self.beside or () if alike or conditions.get(name).window != conditions.LAST]

    def cells(self) -> list[Cell]:
        """Every training of the study, in their order: methods first, then what is beside them, then other seeds."""
        compared = (RETENTION, *self.methods)
        found = [
            Cell(threat, method, seed, organism)
            for organism in range(self.organisms)
            for seed in range(self.seeds)
            for threat in self.threats
            for method in compared
        ]
        for organism in range(self.organisms):
            for threat in self.insides:
                beside = self.beside_of(threat)
                found += [Cell(threat, condition, seed, organism) for seed in range(self.seeds) for condition in beside]
                extra = range(self.seeds, CEILING_SEEDS)
                found += [Cell(threat, method, seed, organism) for seed in extra for method in compared]
        return found

    def derived(self) -> list[Cell]:
        """The models that are made from finished trainings: weights perturbed as far as training moves them."""
        return [
            Cell(threat, PERTURBED, seed, organism)
            for organism in range(self.organisms)
            for threat in self.insides
            for seed in range(self.seeds)
        ]


def full_study(**settings: Any) -> StudyConfig:
    """The study with every condition and analysis, several seeds and organisms, and all parameters as an ablation.

    Args:
        settings: of a `StudyConfig`; those given are kept.
    """
    known = {"seeds": FULL, **settings}
    if not (known.get("model") or known.get("file")):
        known = {"organisms": FULL, **known}
    config = StudyConfig(**known)
    ablated = [name for name in ABLATED if name.removesuffix(EVERYTHING) in (RETENTION, *config.methods)]
    beside = (*(config.beside or ()), *ablated) if settings.get("beside") is None else config.beside
    return replace(config, looked_into=settings.get("looked_into") or config.threats, beside=beside)


@dataclass(frozen=True)
class Cell:
    """One model of a study.

    Attributes:
        threat: trained on; empty for a model that was not trained on one.
        method: what it was trained with, see `ctlens.study.conditions`; `"base"` for the model before training,
            `"organism"` for its pretraining.
        seed: of the training.
        organism: the number of the model it started from.
    """

    threat: str
    method: str
    seed: int
    organism: int = 0

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        start = f"organism{self.organism}-" if self.organism else ""
        return f"{start}{self.threat}-{self.method}-seed{self.seed}"

    def place(self, study: Path) -> Path:
        """What there is in the folder of a study once the cell is done: a folder, or the file of the base's answers."""
        if self.method == ORGANISM:
            return study / "organisms" / f"organism{self.organism}"
        if self.method == BASE:
            return study / (f"base-organism{self.organism}.csv" if self.organism else "base.csv")
        return study / "runs" / self.name


def base_cell(organism: int = 0) -> Cell:
    """The model that an organism's cells start from, which answers but is not trained."""
    return Cell("", BASE, 0, organism)


def organism_cell(organism: int) -> Cell:
    """The pretraining of an organism, from 1; the first is there."""
    return Cell("", ORGANISM, organism, organism)
