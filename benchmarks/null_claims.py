"""How often does a claim about methods hold where there is one method? Three seeds of it play the parts of three.

Run `python benchmarks/null_claims.py runs/replication/*/*` on finished studies of `--size replicated`. In each study,
threat and method the models of three seeds are taken for ACT, AttCT and BCT, in three orders, and judged by the code
that judges studies; then each part is pooled over the studies as `ctlens replicate` pools. A claim that tells BCT or
AttCT from the others should hold in at most 1 of 40: the interval's one side.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from ctlens.analysis import shift_similarity, transplant
from ctlens.core.progress import progress_bar
from ctlens.core.threads import one_thread
from ctlens.study.analyses import EQUAL_STEPS, Analysis, FinishedAnalyses
from ctlens.study.cells import base_model, finished_model, probe_pairs
from ctlens.study.claims.claim import HOLDS, Claim, claim_verdict
from ctlens.study.claims.inside import inside_claims
from ctlens.study.conditions import RETENTION
from ctlens.study.config import Cell, StudyConfig, replicated_study
from ctlens.study.replication import pooled_over_models
from ctlens.study.source import subject

HERE = Path(__file__).parent
PARTS = ("act", "attct", "bct")
ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
"""Which seed plays which of the parts."""
JUDGED = ("shared", "shared_content", "left_later", "attention")
"""The claims that tell one part from the others."""


def null_claims(study: Path, threat: str, method: str) -> list[list[Claim]]:
    """Judges the claims where the seeds of one method play all parts, once in each order."""
    settings = json.loads((study / "config.json").read_text())
    config = replicated_study(model=settings["model"], clean_born=settings["clean_born"])
    base = base_model(config)
    pairs = probe_pairs(subject(threat), config, base, config.n_analysed)
    folders = [Cell(threat, method, seed).path(study) for seed in range(len(PARTS))]
    models = [finished_model(config, base, folder) for folder in folders]
    moved = [transplant(model, base, pairs, progress=False) for model in models]
    found = []
    for order in ORDERS:
        with TemporaryDirectory() as work:
            named = dict(zip(PARTS, order, strict=True))
            alike = Analysis("similarity", threat, EQUAL_STEPS).path(Path(work))
            alike.mkdir(parents=True)
            taken = {part: models[seed] for part, seed in named.items()}
            shift_similarity(base, taken, pairs, progress=False).save(alike / "similarity.safetensors")
            moves = Analysis("transplant", threat, EQUAL_STEPS).path(Path(work))
            moves.mkdir()
            for part, seed in named.items():
                moved[seed].save(moves / f"{part}.safetensors")
            attention = {part: folders[seed] for part, seed in named.items()}
            attention[RETENTION] = Cell(threat, RETENTION, 0).path(study)
            for part, folder in attention.items():
                there = Cell(threat, part, 0).path(Path(work))
                there.mkdir(parents=True)
                shutil.copyfile(folder / "attention.safetensors", there / "attention.safetensors")
            played = StudyConfig((threat,), PARTS, analysed=(threat,), extra_conditions=(), ceiling_seeds=1)
            judged = inside_claims(FinishedAnalyses(played, Path(work)))
            found.append([claim for claim in judged if claim.key in JUDGED and claim.setting == EQUAL_STEPS])
    return found


def main(studies: Sequence[Path]) -> None:
    """Judges every study, threat and method, and writes how often each claim holds."""
    methods = replicated_study().methods
    cases = [(threat, method) for threat in replicated_study().threats for method in methods]
    every = [(study, *case) for study in studies for case in cases]
    by_claim: dict[str, list[Claim]] = defaultdict(list)
    by_case: dict[tuple[str, str, str, int], list[Claim]] = defaultdict(list)
    with one_thread():
        for study, threat, method in progress_bar(every, desc="null studies", total=len(every), shown=True):
            for order, claims in enumerate(null_claims(study, threat, method)):
                for claim in claims:
                    by_claim[claim.key].append(claim)
                    by_case[claim.key, threat, method, order].append(claim)
    rows = []
    for key, claims in by_claim.items():
        pooled = [_holds_over_models(of_case) for case, of_case in by_case.items() if case[0] == key]
        rows.append(
            {
                "claim": key,
                "studies": len(claims),
                "holds in one study": f"{np.mean([claim.verdict == HOLDS for claim in claims]):.3f}",
                "replications": len(pooled),
                "holds over studies": f"{np.mean(pooled):.3f}",
            }
        )
    pd.DataFrame(rows).to_csv(HERE / "null_claims.csv", index=False)


def _holds_over_models(claims: Sequence[Claim]) -> bool:
    """Whether the claim holds by its number over the models of all studies."""
    numbers = np.array([(claim.value, claim.prompts_low, claim.prompts_high) for claim in claims])
    over = pooled_over_models(*numbers.T)
    return claim_verdict(over.value, over.low, over.high) == HOLDS


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
