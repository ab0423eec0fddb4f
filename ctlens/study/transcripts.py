"""The transcripts of a study: a few prompts with what every model answered, to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from ctlens.core.files import atomic_file
from ctlens.core.labels import BASE
from ctlens.core.reading import read_jsonl
from ctlens.data.pairs import Pair
from ctlens.evaluation import Evaluation
from ctlens.study.cells import OUTCOMES_FILE
from ctlens.study.conditions import RETENTION
from ctlens.study.config import BASE_CELL, Cell, StudyConfig
from ctlens.study.results import SPLIT
from ctlens.study.source import subject

TRANSCRIPTS_FILE = "transcripts.jsonl"
N_TRANSCRIPTS = 5


@dataclass(frozen=True)
class Transcript:
    """One wrapped prompt, and what each model answered.

    Attributes:
        threat: of the prompt, which the models were trained against.
        turns: the conversation up to the answer, role and text of each turn.
        good, bad: the answers that count as good and as bad.
        answers: of each condition, its answer and the verdict on it.
    """

    threat: str
    turns: Sequence[Sequence[str]]
    good: str
    bad: str
    answers: Mapping[str, Sequence[str]]


def write_transcripts(config: StudyConfig, study: Path) -> None:
    """Writes the first held-out prompts of each threat in turn, with the answers of every method's first seed.

    They are the first of the split and not chosen by their answers.

    Args:
        config: of the study.
        study: its folder, with every cell.
    """
    found = []
    for item, threat in product(range(N_TRANSCRIPTS), config.threats):
        pairs = subject(threat, config.file, study).pairs(config.n_prompts, split=SPLIT)
        if item < len(pairs) and len(found) < N_TRANSCRIPTS:
            found.append(_transcript(threat, item, pairs[item], _answers(config, study, threat)))
    with atomic_file(study / TRANSCRIPTS_FILE) as temporary:
        temporary.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in found), encoding="utf-8")


def read_transcripts(study: Path) -> list[Transcript]:
    """Reads the transcripts of a study; none where an earlier ctlens wrote it.

    Raises:
        CtlensError: the file is damaged.
    """
    path = study / TRANSCRIPTS_FILE
    return [Transcript(**row) for _, row in read_jsonl(path)] if path.is_file() else []


def _answers(config: StudyConfig, study: Path, threat: str) -> dict[str, Evaluation]:
    """The answers of the base, and of retention and every method after training against a threat."""
    trained = {name: Cell(threat, name, 0).path(study) / OUTCOMES_FILE for name in (RETENTION, *config.methods)}
    files = {BASE: BASE_CELL.path(study), **trained}
    return {name: Evaluation.load(path) for name, path in files.items()}


def _transcript(threat: str, item: int, pair: Pair, answering: Mapping[str, Evaluation]) -> Transcript:
    answers = {}
    for name, evaluation in answering.items():
        row = evaluation.answers(threat, SPLIT).set_index("item").loc[item]
        answers[name] = (str(row["answer"]), str(row["verdict"]))
    turns = [(turn.role, turn.content) for turn in pair.wrapped.turns]
    return Transcript(threat, turns, pair.wrapped.good or "", pair.wrapped.bad or "", answers)
