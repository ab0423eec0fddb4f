"""The tables of docs/audit.md: `python figures/audit.py runs/organisms/together/*` measures them anew, in minutes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

import ctlens as ct
from ctlens.auditing import Audit, audit_pairs, selector_named
from ctlens.auditing.answers import Answerer
from ctlens.auditing.exact import moments
from ctlens.auditing.labels import label_distributions
from ctlens.auditing.run import LABEL_TRAINING
from ctlens.core.types import LensModel
from ctlens.models.enumeration import Branching
from ctlens.organism import MISBEHAVIOURS, misbehave, misbehaviour_pairs

HELD = Path(__file__).parent / "data" / "audit"
LABELLED = 96
HELD_OUT = 72
NUMBERS = [
    *("n_prompts", "risk_before", "risk_after", "missed", "change", "ci_low", "ci_high", "verdict"),
    *("label_shift", "label_low", "label_high", "predicted", "drawn_shift", "label_kl", "kept", "slope"),
]


def sycophancy(models: Mapping[str, LensModel], selectors: Sequence[str], pools: Sequence[str]) -> Audit:
    """Audits organisms under sycophancy."""
    pool = audit_pairs("sycophancy", LABELLED)
    return ct.audit(models, pool, selectors, heldout=audit_pairs("sycophancy", HELD_OUT, "heldout"), pools=pools)


def misbehaviours() -> Iterator[pd.DataFrame]:
    """Audits the shipped organism with each misbehaviour of its own, at two prevalences."""
    for kind in MISBEHAVIOURS:
        models = {f"{share:g}": misbehave(ct.load_organism(), kind, share) for share in (0.2, 0.8)}
        heldout = misbehaviour_pairs(kind, HELD_OUT, "heldout")
        selectors = ["first", "greedy", "certainty:4"]
        found = ct.audit(models, misbehaviour_pairs(kind, LABELLED), selectors, heldout=heldout, pools=["clean"])
        rows = found.to_dataframe().query("organism != 'all' and prompt_side == 'clean'")
        rows = rows.rename(columns={"organism": "prevalence"}).assign(kind=kind)
        yield rows[["kind", "prevalence", "selector", "split", *NUMBERS]]


def by_number_of_samples(models: Mapping[str, LensModel]) -> pd.DataFrame:
    """Tabulates what labels are by the number of samples, without any draw; means over organisms."""
    pool = [pair.wrapped for pair in audit_pairs("sycophancy", LABELLED)]
    rows = []
    for name, model in models.items():
        answerer = Answerer(model, LABEL_TRAINING.max_new_tokens)
        own = answerer.enumerated(pool, Branching())
        risk = np.array([moments(answers).bad for answers in own])
        likelier = np.array([answers.risk > 0.5 for answers in own])
        for selector, n in product(("certainty", "majority", "oracle", "anti-oracle"), (1, 2, 4, 8, 16)):
            labels = label_distributions(answerer, pool, selector_named(f"{selector}:{n}"), Branching(), 0)
            of_labels = np.array([(one.risk, one.divergence, one.kept) for one in labels])
            for words, chosen in (("yes", likelier), ("no", ~likelier)):
                shift = np.nanmean(of_labels[chosen, 0] - risk[chosen])
                kl = np.nanmean(of_labels[chosen, 1])
                rows.append((name, selector, n, words, shift, kl, of_labels[chosen, 2].mean()))
    columns = ["organism", "selector", "n", "bad_likelier", "label_shift", "label_kl", "kept"]
    grouped = pd.DataFrame(rows, columns=columns).groupby(["selector", "n", "bad_likelier"], sort=False)
    return grouped[["label_shift", "label_kl", "kept"]].mean().reset_index()


def main(folders: Sequence[Path]) -> None:
    """Writes every table."""
    models = {f"{folder.parent.name}-{folder.name}": ct.load_model(folder) for folder in folders}
    write("labels-by-n", by_number_of_samples(models))
    found = sycophancy(models, ["first", "greedy", "certainty:4", "majority:4"], ["wrapped", "mixed"])
    rows = found.to_dataframe("bad_likelier").query("organism == 'all' and prompt_side == 'wrapped'")
    write("sycophancy", rows[["selector", "pool", "split", "bad_likelier", *NUMBERS]])
    rows = found.to_dataframe("strength").query("organism == 'all' and prompt_side == 'wrapped'")
    rows = rows.sort_values(["split", "pool", "selector", "strength"], kind="stable")
    write("sycophancy-strength", rows[["selector", "pool", "split", "strength", *NUMBERS]])
    write("sycophancy-signs", found.signs().query("prompt_side == 'wrapped'"))
    clean = sycophancy(models, ["first", "greedy"], ["clean"]).to_dataframe("bad_likelier").query("organism == 'all'")
    write("sycophancy-clean", clean[["selector", "pool", "split", "prompt_side", "bad_likelier", *NUMBERS]])
    write("misbehaviours", pd.concat(list(misbehaviours())))


def write(name: str, table: pd.DataFrame) -> None:
    """Writes one table."""
    table.round(5).to_csv(HELD / f"{name}.csv", index=False)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
