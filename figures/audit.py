"""The tables of docs/audit.md: `python figures/audit.py runs/organisms/together/*` measures them all anew."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
from audited import DATA
from jaxtyping import Float

import ctlens as ct
from ctlens.auditing import REGULARISERS, Audit, audit_pairs, rephrased, selector_named
from ctlens.auditing.answers import Answerer, AnswerSet, Sample
from ctlens.auditing.exact import moments
from ctlens.auditing.labels import label_distributions
from ctlens.auditing.run import LABEL_TRAINING
from ctlens.auditing.selectors import PUBLISHED_N
from ctlens.auditing.sources import Sampled
from ctlens.core.types import LensModel
from ctlens.data.pairs import Prompt
from ctlens.models.enumeration import Branching
from ctlens.organism import MISBEHAVIOURS, misbehave, misbehaviour_pairs
from ctlens.threats import judge

LABELLED = 96
HELD_OUT = 72
ON_BOTH_POOLS = ("first", "greedy", "certainty:4", "majority:4")
ON_WRAPPED = ("views:4", "decodings", "oracle:4", "anti-oracle:4")
ON_MISBEHAVIOURS = ("first", "greedy", "certainty:4")
MOVING = tuple(name for name in REGULARISERS if name.endswith("-own"))
PREVALENCES = (0.2, 0.8)
FROZEN_TOO = ("agreement", 0.2)
"""The misbehaviour and the prevalence at which regularisers have a frozen target too."""
MISBEHAVING = 3
"""How many organisms get misbehaviours of their own."""
DRAWS = 64
"""Samples of a prompt, of which estimates with fewer are made in turns."""
CHANGES = ["n_prompts", "risk_before", "risk_after", "missed", "change", "ci_low", "ci_high", "verdict"]
NUMBERS = [*CHANGES, "label_shift", "label_low", "label_high", "predicted", "drawn_shift", "label_kl", "kept", "slope"]


def sycophancy(models: Mapping[str, LensModel], methods: Sequence[str], pools: Sequence[str]) -> Audit:
    """Audits organisms under sycophancy."""
    pool = audit_pairs("sycophancy", LABELLED)
    return ct.audit(models, pool, methods, heldout=audit_pairs("sycophancy", HELD_OUT, "heldout"), pools=pools)


def misbehaviours(models: Mapping[str, LensModel]) -> Iterator[pd.DataFrame]:
    """Audits organisms with each misbehaviour of their own, a table per kind and prevalence.

    Selectors label the prompts as they are. Regularisers hold the same prompts behind a greeting to them.
    """
    for kind, prevalence in product(MISBEHAVIOURS, PREVALENCES):
        organisms = {name: misbehave(model, kind, prevalence) for name, model in models.items()}
        pool = misbehaviour_pairs(kind, LABELLED)
        heldout = misbehaviour_pairs(kind, HELD_OUT, "heldout")
        labelled = ct.audit(organisms, pool, ON_MISBEHAVIOURS, heldout=heldout, pools=["clean"])
        regularisers = REGULARISERS if (kind, prevalence) == FROZEN_TOO else MOVING
        greeted = ct.audit(organisms, rephrased(pool), regularisers, heldout=rephrased(heldout))
        rows = pd.concat([labelled.to_dataframe().query("prompt_side == 'clean'"), greeted.to_dataframe()])
        named = ["kind", "prevalence", "organism", "method", "pool", "split", "prompt_side"]
        yield rows.assign(kind=kind, prevalence=prevalence)[[*named, *NUMBERS]]


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


def by_number_of_draws(model: LensModel) -> pd.DataFrame:
    """Tabulates how far estimates from drawn samples are from the exact numbers, by the samples of a prompt.

    Errors are roots of mean squares over all estimates that the draws give. Of single prompts what the binomial
    distribution expects stands beside.
    """
    pool = [pair.wrapped for pair in audit_pairs("sycophancy", LABELLED)]
    answerer = Answerer(model, LABEL_TRAINING.max_new_tokens)
    own = answerer.enumerated(pool, Branching())
    risk = np.array([moments(answers).bad for answers in own])
    surest = selector_named(f"certainty:{PUBLISHED_N}")
    exact = label_distributions(answerer, pool, surest, Branching(), 0)
    shift = np.mean([labels.risk for labels in exact]) - risk.mean()
    kl = np.mean([labels.divergence for labels in exact])
    drawn = Sampled(DRAWS).draw(answerer, pool, 0)
    chosen = [[max(four, key=lambda sample: sample.score) for four in _parts(row, PUBLISHED_N)] for row in drawn]
    bad = _verdicts(pool, drawn)
    bad_labels = _verdicts(pool, chosen)
    rows = []
    n = PUBLISHED_N
    while n <= DRAWS:
        risks = _means(bad, n)
        of_labels = _means(bad_labels, n // PUBLISHED_N)
        kls = [
            np.mean([_plug_in(labels, answers) for labels, answers in zip(column, own, strict=True)])
            for column in zip(*(_parts(row, n // PUBLISHED_N) for row in chosen), strict=True)
        ]
        expected = float(np.sqrt((risk * (1 - risk)).mean() / n))
        rows += [
            ("risk of a prompt", n, _error(risks - risk[:, None]), expected),
            ("risk of the pool", n, _error(risks.mean(0) - risk.mean()), np.nan),
            ("shift of the labels", n, _error((of_labels - risks).mean(0) - shift), np.nan),
            ("KL of the labels", n, _error(np.array(kls) - kl), np.nan),
        ]
        n *= 2
    return pd.DataFrame(rows, columns=["quantity", "n", "error", "expected"])


def _verdicts(prompts: Sequence[Prompt], rows: Sequence[Sequence[Sample]]) -> np.ndarray:
    """Whether each sample of each prompt is bad."""
    return np.array(
        [[judge(prompt, one.text) == "bad" for one in row] for prompt, row in zip(prompts, rows, strict=True)]
    )


def _parts(row: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [row[start : start + size] for start in range(0, len(row), size)]


def _means(values: np.ndarray, size: int) -> Float[np.ndarray, "prompt part"]:
    return values.reshape(len(values), -1, size).mean(-1)


def _error(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean()))


def _plug_in(labels: Sequence[Sample], answers: AnswerSet) -> float:
    """The KL of labels from the model's answers as one has it without enumeration: with shares that were counted."""
    known = dict(zip(answers.texts, answers.log_p, strict=True))
    counted = Counter(label.text for label in labels)
    log_p = {label.text: known.get(label.text, label.log_p) for label in labels}
    return float(sum(n / len(labels) * (np.log(n / len(labels)) - log_p[text]) for text, n in counted.items()))


def main(folders: Sequence[Path]) -> None:
    """Writes every table, as soon as it is there."""
    models = {f"{folder.parent.name}-{folder.name}": ct.load_model(folder) for folder in folders}
    write("labels-by-n", by_number_of_samples(models))
    write("draws", by_number_of_draws(ct.load_organism()))
    found = sycophancy(models, ON_BOTH_POOLS, ["wrapped", "mixed"])
    write("eta", found.eta("bad_likelier").query("split == 'pool' and prompt_side == 'wrapped'"))
    rows = found.to_dataframe("strength").query("organism == 'all' and prompt_side == 'wrapped'")
    rows = rows.sort_values(["split", "pool", "method", "strength"], kind="stable")
    write("sycophancy-strength", rows[["method", "pool", "split", "strength", *NUMBERS]])
    both = [found, sycophancy(models, ON_WRAPPED, ["wrapped"])]
    rows = pd.concat([one.to_dataframe("bad_likelier") for one in both])
    rows = rows.query("organism == 'all' and prompt_side == 'wrapped'")
    write("sycophancy", rows[["method", "pool", "split", "bad_likelier", *NUMBERS]])
    write("sycophancy-signs", pd.concat([one.signs() for one in both]).query("prompt_side == 'wrapped'"))
    clean = sycophancy(models, ["first", "greedy"], ["clean"]).to_dataframe("bad_likelier").query("organism == 'all'")
    write("sycophancy-clean", clean[["method", "pool", "split", "prompt_side", "bad_likelier", *NUMBERS]])
    held = sycophancy(models, REGULARISERS, ["wrapped", "clean"]).to_dataframe()
    write("regularisers", held[["organism", "method", "pool", "split", "prompt_side", *CHANGES]])
    tables: list[pd.DataFrame] = []
    for table in misbehaviours(dict(islice(models.items(), MISBEHAVING))):
        tables.append(table)
        write("misbehaviours", pd.concat(tables))


def write(name: str, table: pd.DataFrame) -> None:
    """Writes one table."""
    table.round(5).to_csv(DATA / f"{name}.csv", index=False)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
