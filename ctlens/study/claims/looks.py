"""The finished looks of a study, as the claims read them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from ctlens.analysis import AttentionDiff
from ctlens.analysis.base.result import Result
from ctlens.study.analyses import ALL_SEEDS, EQUAL_STEPS, Look
from ctlens.study.claims.estimates import Training
from ctlens.study.conditions import RETENTION
from ctlens.study.config import Cell, StudyConfig

R = TypeVar("R", bound=Result)


class Looks:
    """The finished looks of a study, by training."""

    def __init__(self, config: StudyConfig, study: Path) -> None:
        self.config, self.study = config, study

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
