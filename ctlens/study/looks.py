"""The looks of a study: what one is, the folder that holds it, and the finished ones as the claims read them.

A look is one analysis of the models trained on one threat. `ctlens.study.analyses` runs looks; this module finds
and loads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from ctlens.analysis import AttentionDiff
from ctlens.analysis.base.result import Result
from ctlens.core.files import read_json
from ctlens.study.conditions import RETENTION
from ctlens.study.config import Cell, StudyConfig

R = TypeVar("R", bound=Result)
Training: TypeAlias = tuple[int, int]
"""A training by the numbers of its organism and of its seed."""

EQUAL_STEPS = "equal steps"
"""The setting that compares the models at the end of their trainings."""
MATCHED = "matched effect"
"""The setting that compares the models where each has the same effect, the study's `matched`."""
SETTINGS = (EQUAL_STEPS, MATCHED)
AT_BOTH = ("similarity", "transplant")
"""The analyses that run at both settings; every other one runs at equal steps alone."""
ALL_SEEDS = ("similarity",)
"""The analyses that take the models of all seeds at once; every other one runs seed by seed."""
REFUSALS = "refused.json"
"""The file in a look's folder with the reasons of the analyses that refused, by name."""


@dataclass(frozen=True)
class Look:
    """One analysis of the models that were trained on one threat, from one organism.

    Attributes:
        analysis: a key of `ctlens.study.analyses.ANALYSES`.
        threat: trained on.
        organism: that they started from.
        setting: one of `SETTINGS`: the models at the end of the training, or at the effect of the study's `matched`.
        seed: of the trainings; of an analysis of all seeds at once 0.
    """

    analysis: str
    threat: str
    organism: int
    setting: str
    seed: int = 0

    def place(self, study: Path) -> Path:
        """The folder that holds the look, inside that of a study."""
        organism = f"organism{self.organism}-" if self.organism else ""
        matched = "-matched" if self.setting == MATCHED else ""
        seed = f"-seed{self.seed}" if self.analysis not in ALL_SEEDS else ""
        return study / "inside" / f"{organism}{self.threat}" / f"{self.analysis}{matched}{seed}"

    def load(self, study: Path, kind: type[R]) -> dict[str, R]:
        """Loads the results of the look, by name; none where it has not run."""
        return {path.stem: kind.load(path) for path in sorted(self.place(study).glob("*.safetensors"))}

    def refusals(self, study: Path) -> dict[str, str]:
        """Reads why there is no result, by the name of the result."""
        place = self.place(study) / REFUSALS
        return read_json(place) if place.is_file() else {}


class Looks:
    """The finished looks of a study, by training.

    Args:
        config: of the study.
        study: its folder.
    """

    def __init__(self, config: StudyConfig, study: Path) -> None:
        self.config = config
        self.study = study

    @property
    def trainings(self) -> list[Training]:
        """Organism and seed of every training that has looks of its own."""
        return [(organism, seed) for organism in range(self.config.organisms) for seed in range(self.config.seeds)]

    def of(self, kind: type[R], analysis: str, threat: str, setting: str = EQUAL_STEPS) -> dict[Training, dict[str, R]]:
        """By training, the results of an analysis by name; one that all seeds share stands at seed 0 alone."""
        found = {
            (organism, seed): Look(analysis, threat, organism, setting, seed).load(self.study, kind)
            for organism, seed in self.trainings
            if seed == 0 or analysis not in ALL_SEEDS
        }
        return {training: results for training, results in found.items() if results}

    def refused(self, analysis: str, threat: str, setting: str = EQUAL_STEPS) -> str:
        """Why an analysis gave no result, where it refused: every reason once."""
        looks = [Look(analysis, threat, organism, setting, seed) for organism, seed in self.trainings]
        reasons = [reason for look in looks for reason in look.refusals(self.study).values()]
        return "; ".join(dict.fromkeys(reasons))

    def attention(self, threat: str) -> dict[Training, dict[str, AttentionDiff]]:
        """By training, what each method did to attention."""
        return {
            (organism, seed): {
                name: AttentionDiff.load(Cell(threat, name, seed, organism).place(self.study) / "attention.safetensors")
                for name in (RETENTION, *self.config.methods)
            }
            for organism, seed in self.trainings
        }
