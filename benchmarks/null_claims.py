"""How often does a claim about the inside hold where there is nothing, and where a difference of known size is planted?

Run `python benchmarks/null_claims.py`; `--quick` takes a tenth of the draws. Models are trained by ACT on one organism,
in as many data orders, and a draw gives the names of the study's methods to some of them: whatever differs then between
"ACT" and "BCT" is no matter of the loss. A draw also takes other held-out prompts. The rule of the claims is the
study's. In the last rows the model called BCT is one trained by BCT, or lies on the way there from one of ACT.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import ctlens as ct
from ctlens.analysis import AttentionDiff, ShiftSimilarity, Transplant
from ctlens.analysis.base.result import ResultOverPairs
from ctlens.core.progress import progress_bar
from ctlens.core.types import LensModel
from ctlens.models.parameters import copy_model
from ctlens.study.analyses import EQUAL_STEPS, FinishedAnalyses, Training
from ctlens.study.claims.claim import HOLDS
from ctlens.study.claims.inside import inside_claims
from ctlens.study.conditions import CROSSED_CONDITIONS, DEFAULT_METHODS, RETENTION
from ctlens.study.config import StudyConfig

HERE = Path(__file__).parent
THREAT = "sycophancy"
NAMES = (*DEFAULT_METHODS, *CROSSED_CONDITIONS)
SEEDS = 3
N_MODELS = SEEDS * len(NAMES)
POOL = 240
"""Held-out prompts of which a draw takes `N_PROMPTS`, as many as a study compares."""
N_PROMPTS = 64
DRAWS = 300
WEIGHTS = (0.25, 0.5, 1.0)
"""How far the model called BCT lies on the straight line from one of ACT to one of BCT."""
JUDGED = ("shared", "shared_content", "left_later", "level", "attention")
"""The claims that compare methods with each other; those about BCT's distance and the cue have nulls of their own."""


class Pool:
    """Models with what the analyses found of each on all prompts of the pool.

    Args:
        base: before training.
        models: by a name of their own.
        retention: trained on retention alone.
    """

    def __init__(self, base: LensModel, models: Mapping[str, LensModel], retention: LensModel) -> None:
        self.names = list(models)
        every = {**models, RETENTION: retention}
        quiet: dict[str, Any] = {"progress": False}
        pairs = ct.threats.get(THREAT).pairs(POOL, split="heldout")
        self.similarity = ct.analysis.shift_similarity(base, every, pairs, null=RETENTION, **quiet)
        look = ct.analysis
        self.attention = {name: look.attention_diff(base, model, pairs, **quiet) for name, model in every.items()}
        self.transplants = {name: look.transplant(model, base, pairs, **quiet) for name, model in models.items()}


class Draw(FinishedAnalyses):
    """The analyses of a study whose methods are models of a pool, on some of its prompts.

    Args:
        pool: the models.
        named: per training, the name in the pool of each method's model.
        chosen: the numbers of the prompts.
    """

    def __init__(self, pool: Pool, named: Mapping[Training, Mapping[str, str]], chosen: np.ndarray) -> None:
        super().__init__(StudyConfig((THREAT,), seeds=len(named), analysed=(THREAT,)), Path())
        self.pool = pool
        self.named = named
        self.chosen = chosen

    def of(self, kind: type[Any], name: str, threat: str, setting: str = EQUAL_STEPS) -> dict[Training, Any]:
        """What the pool knows; of the other analyses, and at a matched effect, nothing."""
        if setting != EQUAL_STEPS or kind not in (ShiftSimilarity, Transplant):
            return {}
        if kind is ShiftSimilarity:
            return {training: {name: self._similarity(models)} for training, models in self.named.items()}
        return {
            training: {name: some_pairs(self.pool.transplants[model], self.chosen) for name, model in models.items()}
            for training, models in self.named.items()
        }

    def refused(self, name: str, threat: str, setting: str = EQUAL_STEPS) -> str:
        """Nothing was refused."""
        return ""

    def attention(self, threat: str) -> dict[Training, dict[str, AttentionDiff]]:
        """What each method did to attention, by training."""
        return {
            training: {
                name: some_pairs(self.pool.attention[model], self.chosen)
                for name, model in {**models, RETENTION: RETENTION}.items()
                if name in (*DEFAULT_METHODS, RETENTION)
            }
            for training, models in self.named.items()
        }

    def _similarity(self, models: Mapping[str, str]) -> ShiftSimilarity:
        whole = self.pool.similarity.among([*models.values(), RETENTION])
        by_prompt = whole.by_prompt[..., self.chosen, :, :]
        groups = chosen_groups(whole, self.chosen)
        return replace(whole, methods=(*models, RETENTION), by_prompt=by_prompt, groups=groups)


def some_pairs(result: AttentionDiff | Transplant, chosen: np.ndarray) -> Any:
    """A result on some of its pairs."""
    groups = chosen_groups(result, chosen)
    if isinstance(result, AttentionDiff):
        return replace(result, values=result.values[:, :, chosen], groups=groups)
    arrays = {name: getattr(result, name)[..., chosen] for name in ("values", "unpatched", "source")}
    return replace(result, **arrays, groups=groups)


def chosen_groups(result: ResultOverPairs, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The groups of some of a result's pairs."""
    return {kind: numbers[chosen] for kind, numbers in result.groups.items()}


def pool() -> Pool:
    """Trains the models: of ACT in many data orders, of BCT in as many as there are seeds, and on the way between."""
    base = ct.load_organism()
    threat = ct.threats.get(THREAT)

    def trained(loss: ct.losses.Loss | None, seed: int) -> LensModel:
        config = ct.TrainConfig(seed=seed)
        losses = [] if loss is None else [loss]
        trainer = ct.Trainer(base, threat.pairs(256, seed=seed), losses, config, retain=threat.neutral(128, seed=seed))
        for _ in trainer:
            pass
        return trainer.model

    orders = progress_bar(range(N_MODELS), desc="trainings by ACT", total=N_MODELS, shown=True)
    acts = {f"act {seed}": trained(ct.losses.ACT(), seed) for seed in orders}
    bcts = [trained(ct.losses.BCT(), seed) for seed in range(SEEDS)]
    between = {
        f"bct {weight:g} {seed}": on_the_way(acts[f"act {seed}"], bct, weight)
        for seed, bct in enumerate(bcts)
        for weight in WEIGHTS
    }
    return Pool(base, {**acts, **between}, trained(None, 0))


def on_the_way(start: LensModel, end: LensModel, weight: float) -> LensModel:
    """The model some way along the straight line between the weights of two."""
    found = copy_model(start)
    for moved, target in zip(found.parameters(), end.parameters(), strict=True):
        moved.data.lerp_(target.data, weight)
    return found


def drawn(models: Pool, n_seeds: int, weight: float, n: int) -> Iterator[Draw]:
    """Draws studies: which models of ACT have the methods' names, and which prompts are asked."""
    draw = np.random.default_rng(0)
    for _ in range(n):
        order = draw.permutation(N_MODELS).reshape(SEEDS, len(NAMES))[:n_seeds]
        named = {
            (0, seed): {name: f"act {number}" for name, number in zip(NAMES, row, strict=True)}
            for seed, row in enumerate(order)
        }
        if weight:
            named = {(0, seed): {**row, "bct": f"bct {weight:g} {seed}"} for (_, seed), row in named.items()}
        yield Draw(models, named, draw.permutation(POOL)[:N_PROMPTS])


def rows(models: Pool, n_seeds: int, weight: float, n: int) -> list[dict[str, object]]:
    """How often each claim holds, a row per claim."""
    held: Counter[str] = Counter()
    for study in progress_bar(drawn(models, n_seeds, weight, n), desc=f"BCT at {weight:g}", total=n, shown=True):
        judged = [claim for claim in inside_claims(study) if claim.setting == EQUAL_STEPS]
        held.update(claim.key for claim in judged if claim.verdict == HOLDS)
    planted = "none" if not weight else f"{weight:g} of the way from ACT to BCT"
    return [{"claim": key, "seeds": n_seeds, "difference": planted, "holds": f"{held[key] / n:.3f}"} for key in JUDGED]


def main(n: int) -> None:
    """Judges the claims of every kind of draw, and writes the table."""
    models = pool()
    settings: Sequence[tuple[int, float]] = [(seeds, weight) for weight in (0.0, *WEIGHTS) for seeds in (1, SEEDS)]
    found = [row for seeds, weight in settings for row in rows(models, seeds, weight, n)]
    pd.DataFrame(found).to_csv(HERE / "null_claims.csv", index=False)


if __name__ == "__main__":
    main(DRAWS // 10 if "--quick" in sys.argv else DRAWS)
