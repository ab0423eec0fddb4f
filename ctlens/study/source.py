"""The sources of a study: threats of the micro-world or pairs of a file, and the models that trainings start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias, cast

from ctlens import threats as threat_registry
from ctlens.core.config import generator
from ctlens.core.digests import require_undamaged
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.formats import load_pairs
from ctlens.data.pairs import Pair, Prompt
from ctlens.evaluation import Evaluation, evaluate
from ctlens.evaluation.result import OWN_PAIRS
from ctlens.models.loading import load_model
from ctlens.organism import SHIPPED
from ctlens.study.results import SPLIT
from ctlens.threats import Natural, Screening, Threat
from ctlens.world import SPLITS

_TRAIN_SPLIT = "train"
HELD_OUT = tuple(split for split in SPLITS if split != _TRAIN_SPLIT)
"""The splits that a study evaluates on."""
_HELD_SHARE_OF_FILE = 0.3
"""The share of a file's clean prompts that is held out; not tuned."""


@dataclass(frozen=True)
class FilePairs:
    """The pairs of a file as a subject: no clean prompt is both trained on and held out.

    Attributes:
        path: of the JSONL file.
    """

    path: str
    name = OWN_PAIRS
    ratio = ""
    ends_alike = True

    def pairs(self, n_pairs: int, split: str = _TRAIN_SPLIT, seed: int = 0) -> list[Pair]:
        """Up to `n_pairs` pairs of a split, `"train"` or `"heldout"`; which are held out does not depend on the seed.

        Raises:
            CtlensError: the split is another, the file has fewer than two clean prompts, or a pair names no answers.
        """
        if split not in (_TRAIN_SPLIT, SPLIT):
            raise unknown("split of a file", split, (_TRAIN_SPLIT, SPLIT))
        read = _read(self.path, _version(self.path))
        held = _held_out(self.path, _version(self.path))
        found = [pair for pair in read if (pair.clean in held) == (split == SPLIT)]
        order = _shuffled(len(found), seed if split == _TRAIN_SPLIT else 0)
        return [found[number] for number in order[:n_pairs]]

    def neutral(self, n_prompts: int, split: str = _TRAIN_SPLIT, seed: int = 0) -> list[Prompt]:
        """The clean prompts of a split, as a file holds no other ordinary requests."""
        return list(dict.fromkeys(pair.clean for pair in self.pairs(n_prompts, split, seed)))


Subject: TypeAlias = Threat | FilePairs
"""The source of a study's pairs."""


def _version(path: str) -> tuple[int, int]:
    """When a file was changed and its size: what was read of it before counts as long as they stay."""
    stat = Path(path).stat() if Path(path).is_file() else None
    return (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)


@cache
def _read(path: str, version: tuple[int, int]) -> tuple[Pair, ...]:
    pairs = tuple(load_pairs(path))
    for number, pair in enumerate(pairs, start=1):
        if not (pair.wrapped.good and pair.wrapped.bad):
            raise CtlensError(f"{path}, pair {number} names no good and bad answer: a study needs both to compare.")
    return pairs


@cache
def _held_out(path: str, version: tuple[int, int]) -> frozenset[Prompt]:
    prompts = list(dict.fromkeys(pair.clean for pair in _read(path, version)))
    if len(prompts) < 2:
        raise CtlensError(f"{path} has one clean prompt: at least two are needed to hold some out.")
    n_held = max(1, round(_HELD_SHARE_OF_FILE * len(prompts)))
    return frozenset(prompts[number] for number in _shuffled(len(prompts), 0)[:n_held])


def _shuffled(n: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(n, generator=generator(seed, "pairs of a file")).tolist()


def subject(name: str, file: str = "", study: Path | None = None) -> Subject:
    """The threat of a name, or the pairs of a file.

    Args:
        name: of the threat.
        file: with pairs, instead of a threat.
        study: the folder of the study, whose screening chose the questions of a natural threat; None for all of them.

    Raises:
        CtlensError: there is no such threat, the file holds no pairs, or the screening is missing or damaged.
    """
    if file:
        return FilePairs(file)
    found = threat_registry.get(name)
    return screening(study, name).threat if isinstance(found, Natural) and study is not None else found


def screening(study: Path, name: str) -> Screening:
    """The questions of a natural threat that the base of a study answers right.

    Raises:
        CtlensError: the file is missing or damaged.
    """
    path = screening_file(study, name)
    require_undamaged(study, path.relative_to(study).as_posix())
    return Screening.load(path, cast(Natural, threat_registry.get(name)))


def screening_file(study: Path, name: str) -> Path:
    """The file in a study's folder that says which questions of a natural threat the base answers right."""
    return study / "screened" / f"{name}.json"


def splits_of(file: str) -> Sequence[str]:
    """The held-out splits of the threats, or of a file."""
    return (SPLIT,) if file else HELD_OUT


def evaluated(model: LensModel, subjects: Sequence[Subject], splits: Sequence[str], n_prompts: int) -> Evaluation:
    """Evaluates a model on threats, or on the held-out pairs of a file."""
    given = [one for one in subjects if isinstance(one, FilePairs)]
    if not given:
        threats = [one for one in subjects if isinstance(one, Threat)]
        return evaluate(model, threats, split=splits, n_prompts=n_prompts, progress=False)
    found = evaluate(model, pairs=given[0].pairs(n_prompts, SPLIT), progress=False)
    return Evaluation(found.outcomes.assign(split=SPLIT))


@cache
def start_model(model: str, device: str = "cpu", dtype: str = "float32") -> LensModel:
    """A model that trainings start from, loaded once per process and never changed.

    Args:
        model: a folder; the shipped organism if empty.
        device, dtype: where it lives, and of its weights.
    """
    return load_model(model or SHIPPED, device=device, dtype=dtype)
