"""The plan of a study: its settings and the models that follow from them, each a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ctlens import threats
from ctlens.core.arguments import require_types
from ctlens.core.config import from_dict
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.labels import BASE, CLEAN_BORN
from ctlens.core.reading import read_json
from ctlens.evaluation.result import OWN_PAIRS
from ctlens.models.lora import LoRA
from ctlens.study import conditions
from ctlens.study.conditions import (
    ABLATED,
    ALL_PARAMETERS,
    CROSSED_CONDITIONS,
    DEFAULT_METHODS,
    EXTRA_CONDITIONS,
    EXTRA_CONTROLS,
    FINE_TUNED,
    LAST_TOKEN,
    PERTURBED,
    RETENTION,
    SHAM,
    condition_named,
)
from ctlens.study.source import screening_file
from ctlens.training import TrainConfig

SCREENING = "screening"
ANALYSED_THREATS = ("sycophancy", "jailbreak")
"""The threats whose models a study analyses by default: the two of the pilot on a prototype organism."""
NATURAL_THREATS = ("facts", "order", "beginning")
"""The threats of a study of a real model where none are named: a hint, an order of options and a begun answer."""
CEILING_SEEDS = 2
"""The fewest seeds of an analysed method, two: how alike they are is the ceiling of how alike two methods can be."""
FULL_STUDY_SEEDS = 3
"""Seeds of a full study: the fewest whose spread Student's interval shows, see `results.SEVERAL`."""
SHARED_TRAINING = TrainConfig()
"""The settings that every condition shares: those of any training, so that one by itself is the study's condition."""
NATURAL_TRAINING = TrainConfig(
    batch_size=8, lr=1e-3, steps=20, calibrate=1.0, retention=1.0, retention_ratio=0.5, trainable=LoRA()
)
"""The settings that every condition of a study of a real model shares.

They are those of a trial of three methods on SmolLM2-135M-Instruct, each of which repaired a part of the switches in
20 steps; no search was made. Retention is trained at about every second step, to save passes.
"""


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study; equal configs give equal studies.

    Attributes:
        threats: trained on, one at a time; each trained model is evaluated on all of them. None
            given means all of the micro-world. Natural threats are screened on the model before training.
        methods: names of losses, `DEFAULT_METHODS` when none are given; the retention-only control is always added.
        seeds: number of seeds, from 0.
        n_pairs: training pairs per threat.
        n_prompts: evaluation pairs per threat and split.
        training: settings shared by every cell, whatever its condition: window (`"shared"` unless it names
            another), trainable parameters, steps, order of the pairs, retention, calibration; the seed
            is replaced by the cell's. By default attention alone is trained.
        analysed: the threats whose models are analysed, with the extra conditions and a second seed; by default those
            of `ANALYSED_THREATS` among the threats.
        asked: further threats whose prompts every method's model answers at its end, beside those trained on.
        extra_conditions: names of the crossed conditions and controls that are trained beside the methods on the
            analysed threats, see `ctlens.study.conditions`; by default `EXTRA_CONDITIONS` without the methods. For a
            file and natural threats it is the crossed conditions, as neutral words are those of the micro-world.
        n_analysed: held-out pairs on which activations are compared, and three times as many for probes; not tuned.
        analysed_seeds: how many seeds have the analyses that compare finished models; None for all.
        ceiling_seeds: the fewest seeds of the methods on the analysed threats. Those beyond `seeds` are trained for the
            analyses alone: how alike two seeds of one method are is the ceiling of how alike two methods can be. 1
            does without that ceiling.
        matched: the share of the gap in the logit difference at which methods are compared again, 0 to 1.
        model: the model to train, as `ct.load_model` takes it from disk, instead of the shipped organism.
        clean_born: folder of the organism's twin without vulnerability; with it the results say how much of the way to
            the twin a repair went.
        file: JSONL pairs to train and evaluate on, instead of threats.
        device: where models live, for example `"cuda"`.
        dtype: of their weights, for example `"bfloat16"`; adapters are then what is trained.
    """

    threats: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: int = 1
    n_pairs: int = 256
    n_prompts: int = 96
    n_analysed: int = 64
    analysed_seeds: int | None = None
    training: TrainConfig = SHARED_TRAINING
    analysed: tuple[str, ...] | None = None
    asked: tuple[str, ...] = ()
    extra_conditions: tuple[str, ...] | None = None
    ceiling_seeds: int = CEILING_SEEDS
    matched: float = 0.5
    model: str = ""
    clean_born: str = ""
    file: str = ""
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_types(self)
        known = [OWN_PAIRS] if self.file else [*threats.names(), *threats.natural_names()]
        chosen = self.threats or ((OWN_PAIRS,) if self.file else tuple(threats.names()))
        no_neutral_words = self.file or set(chosen) & set(threats.natural_names())
        methods = self.methods or DEFAULT_METHODS
        analysed = self.analysed
        extra = self.extra_conditions
        if analysed is None:
            analysed = [OWN_PAIRS] if self.file else [name for name in ANALYSED_THREATS if name in chosen]
        if extra is None:
            possible = CROSSED_CONDITIONS if no_neutral_words else EXTRA_CONDITIONS
            extra = [name for name in possible if name not in methods]
        settled = {"threats": chosen, "methods": methods, "analysed": analysed, "extra_conditions": extra}
        settled["asked"] = tuple(dict.fromkeys((*chosen, *self.asked)))
        for name, values in settled.items():
            object.__setattr__(self, name, tuple(values))
        if self.training.window is None:
            object.__setattr__(self, "training", replace(self.training, window="shared"))
        self._check(known)

    def _check(self, known: Sequence[str]) -> None:
        self._check_names(known)
        for name in ("seeds", "n_pairs", "n_prompts", "n_analysed", "analysed_seeds", "ceiling_seeds"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise CtlensError(f"{name} must be at least 1, not {number}.")
        if not 0 < self.matched < 1:
            raise CtlensError(f"methods are matched at a share between 0 and 1, not {self.matched}.")
        if self.natural and not self.model:
            raise CtlensError(
                f"the organism has not the words of {', '.join(self.natural)}: name a model that speaks English."
            )
        if self.natural and len(self.natural) < len(self.asked):
            raise CtlensError(
                f"{', '.join(self.natural)} are for real models and the other threats for organisms: run two studies."
            )

    def _check_names(self, known: Sequence[str]) -> None:
        """Refuses threats, methods and conditions that are unknown, named twice or not of this study."""
        for name, allowed in (("threats", known), ("asked", known), ("analysed", self.threats)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise unknown("threat", value, allowed)
        conditions.require_methods(self.methods)
        for name in ("threats", "asked", "analysed", "extra_conditions"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise CtlensError(f"{name} names one of its entries twice ({', '.join(values)}): name each once.")
        for name in self.extra_conditions or ():
            if name in (*self.methods, RETENTION):
                raise CtlensError(f"{name} is trained already: name it once.")
            condition_named(name)

    @property
    def natural(self) -> tuple[str, ...]:
        """Those of the threats that are natural."""
        return tuple(name for name in self.asked if not self.file and name in threats.natural_names())

    @property
    def analysed_threats(self) -> tuple[str, ...]:
        """The threats whose models are analysed."""
        return self.analysed or ()

    def compares_inside(self, threat: str) -> bool:
        """Whether every model trained on a threat is evaluated on the way and compared with the base inside.

        On a real model these passes are dear, so there it is done for the analysed threats alone.
        """
        return threat in self.analysed_threats or not self.natural

    def extra_conditions_of(self, threat: str) -> list[str]:
        """The extra conditions that a threat allows: at the last token only where both prompts end alike."""
        alike = bool(self.file) or threats.get(threat).ends_alike
        return [name for name in self.extra_conditions or () if alike or condition_named(name).window != LAST_TOKEN]

    def cells(self) -> list[Cell]:
        """Every training of the study, in their order: the methods, then the extra conditions, then other seeds."""
        compared = (RETENTION, *self.methods)
        found = [
            Cell(threat, condition, seed)
            for seed in range(self.seeds)
            for threat in self.threats
            for condition in compared
        ]
        for threat in self.analysed_threats:
            extra = self.extra_conditions_of(threat)
            found += [Cell(threat, condition, seed) for seed in range(self.seeds) for condition in extra]
            further = range(self.seeds, self.ceiling_seeds)
            found += [Cell(threat, condition, seed) for seed in further for condition in compared]
        return found

    @property
    def answering(self) -> list[Cell]:
        """The models that answer without being trained: the base, and its twin where there is one."""
        return [BASE_CELL, TWIN_CELL] if self.clean_born else [BASE_CELL]

    def screenings(self) -> list[Cell]:
        """What has to be there before everything else: the questions of natural threats that the base answers right."""
        return [Cell(name, SCREENING, 0) for name in self.natural]

    def derived(self) -> list[Cell]:
        """The models that are made from finished trainings: weights moved as far as training moves them.

        They are moved at random, and where there is a fine-tuning on other data, along that.
        """
        made = (PERTURBED, SHAM) if FINE_TUNED in (self.extra_conditions or ()) else (PERTURBED,)
        seeds = range(self.seeds)
        return [Cell(threat, name, seed) for threat in self.analysed_threats for name in made for seed in seeds]


def first_study(**settings: Any) -> StudyConfig:
    """The study that a newcomer runs: two threats, each analysed, with the controls but without what only refines them.

    It leaves out of the matrix the other threats, the crossed conditions and the second seed. What it trains, it trains
    as the matrix does. Other threats that are named are analysed too.

    Args:
        settings: of a `StudyConfig`; those given are kept.
    """
    known = {"ceiling_seeds": 1, **settings}
    if known.get("extra_conditions") is None:
        known["extra_conditions"] = () if known.get("file") else EXTRA_CONTROLS
    if not known.get("file"):
        known["threats"] = known.get("threats") or ANALYSED_THREATS
        if known.get("analysed") is None:
            known["analysed"] = known["threats"]
    return StudyConfig(**known)


def natural_study(**settings: Any) -> StudyConfig:
    """The study of a real model: natural threats, three seeds, adapters, and few pairs, as each costs much.

    The models of the first threat are analysed.

    Args:
        settings: of a `StudyConfig`; those given are kept.
    """
    known = {
        "seeds": FULL_STUDY_SEEDS,
        "n_pairs": 96,
        "n_prompts": 24,
        "n_analysed": 16,
        "analysed_seeds": 1,
        "training": NATURAL_TRAINING,
        **settings,
    }
    known["threats"] = tuple(known.get("threats") or NATURAL_THREATS)
    if known.get("analysed") is None:
        known["analysed"] = known["threats"][:1]
    return StudyConfig(**known)


def replicated_study(**settings: Any) -> StudyConfig:
    """The study that is run on one organism after the other, for `ctlens.study.replication`.

    It trains on the two analysed threats, with three seeds, and asks every model about all threats. The crossed losses
    are trained beside the methods, and of the controls retention alone and the fine-tuning that a sham is made of.
    Analyses that compare finished models one by one are of the first seed, as other models say more than other seeds.

    Args:
        settings: of a `StudyConfig`; those given are kept.
    """
    known = {"seeds": FULL_STUDY_SEEDS, "analysed_seeds": 1, **settings}
    known["threats"] = tuple(known.get("threats") or ANALYSED_THREATS)
    if known.get("extra_conditions") is None:
        known["extra_conditions"] = (*CROSSED_CONDITIONS, FINE_TUNED)
    known["asked"] = tuple(known.get("asked") or threats.names())
    return StudyConfig(**known)


def full_study(**settings: Any) -> StudyConfig:
    """The study with every condition and analysis, several seeds, and all parameters as an ablation.

    Args:
        settings: of a `StudyConfig`; those given are kept.
    """
    config = StudyConfig(**{"seeds": FULL_STUDY_SEEDS, **settings})
    extra = config.extra_conditions or ()
    if settings.get("extra_conditions") is None:
        trained = (RETENTION, *config.methods)
        extra = (*extra, *(name for name in ABLATED if name.removesuffix(ALL_PARAMETERS) in trained))
    return replace(config, analysed=settings.get("analysed") or config.threats, extra_conditions=extra)


STUDY_SIZES: Mapping[str, Callable[..., StudyConfig]] = {
    "first": first_study,
    "matrix": StudyConfig,
    "natural": natural_study,
    "replicated": replicated_study,
    "full": full_study,
}
"""How much a study runs, from a newcomer's first study to every condition on every threat."""


def size_for(names: Sequence[str]) -> str:
    """The size of a study of these threats where none is named: `"natural"` if one of them is, else `"first"`."""
    return "natural" if set(names) & set(threats.natural_names()) else "first"


def shared_training(size: str) -> TrainConfig:
    """The settings that the conditions of a study of this size share, where none are given."""
    return NATURAL_TRAINING if size == "natural" else SHARED_TRAINING


def study_of_size(size: str, **settings: Any) -> StudyConfig:
    """The study of a size, one of `STUDY_SIZES`, with these settings of a `StudyConfig`.

    Raises:
        CtlensError: there is no such size.
    """
    if size not in STUDY_SIZES:
        raise unknown("size of a study", size, STUDY_SIZES)
    return STUDY_SIZES[size](**settings)


def earlier_study(path: str | Path) -> StudyConfig:
    """The study that the config.json in a study's folder describes.

    Raises:
        CtlensError: the file is missing or damaged, or describes something else.
    """
    known = {field.name for field in fields(StudyConfig)}
    held = read_json(path, "threats", "methods", "training")
    return from_dict(StudyConfig, {name: value for name, value in held.items() if name in known})


@dataclass(frozen=True)
class Cell:
    """One model of a study.

    Attributes:
        threat: trained on; empty for a model that was not trained on one.
        condition: what it was trained with, see `ctlens.study.conditions`; `"base"` for the model before training,
            `"clean-born"` for its twin without vulnerability, `"screening"` for the choice of a natural threat's
            questions.
        seed: of the training.
    """

    threat: str
    condition: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.threat}-{self.condition}-seed{self.seed}"

    @property
    def trained(self) -> bool:
        """Whether it is a model that training made, or that is made of such models."""
        return self.condition not in (BASE, CLEAN_BORN, SCREENING)

    def path(self, study: Path) -> Path:
        """The path that exists once the cell is done: its folder, or the file of the base's answers or questions."""
        if self.condition == SCREENING:
            return screening_file(study, self.threat)
        if self.condition in (BASE, CLEAN_BORN):
            return study / f"{self.condition}.csv"
        return study / "runs" / self.name


BASE_CELL = Cell("", BASE, 0)
"""The model that all trainings start from, which answers but is not trained."""
TWIN_CELL = Cell("", CLEAN_BORN, 0)
"""The twin of that model without vulnerability, which answers too."""
