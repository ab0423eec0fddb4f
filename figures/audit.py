"""The tables of docs/audit.md: `python figures/audit.py runs/audit runs/organisms/together/*` measures them all anew.

The first folder keeps the audit of every organism, each a file, and those that lie there are taken up.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from audited import CHANGE, DATA, SHIFT
from jaxtyping import Float

import ctlens as ct
from ctlens.auditing import REGULARISERS, Audit, audit_pairs, rephrased, selector_named
from ctlens.auditing.answers import Answerer, AnswerSet, Sample
from ctlens.auditing.exact import moments
from ctlens.auditing.labels import label_distributions
from ctlens.auditing.result import EVERY_ORGANISM, Change
from ctlens.auditing.run import LABEL_TRAINING
from ctlens.auditing.selectors import PUBLISHED_N
from ctlens.auditing.sources import Sampled
from ctlens.core.files import digest_of
from ctlens.core.stats import student
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt
from ctlens.models.enumeration import Branching
from ctlens.models.parameters import fingerprint
from ctlens.organism import MISBEHAVIOURS, misbehave, misbehaviour_pairs
from ctlens.threats import judge

LABELLED = 96
HELD_OUT = 72
ON_BOTH_POOLS = ("first", "greedy", "certainty:4", "majority:4")
ON_WRAPPED = ("views:4", "decodings", "oracle:4", "anti-oracle:4")
CONTROLLED = ("first", "greedy")
"""The selectors of the pools beside the two first ones: the control and the plainest."""
OF_STRENGTHS: Mapping[str, tuple[str, ...]] = {"weak": ("1", "2"), "strong": ("3", "4")}
"""The pools of some strengths alone, by name."""
DRAWN = 400
"""The pairs that are drawn so that each of them finds `LABELLED` of its own."""
ON_MISBEHAVIOURS = ("first", "greedy", "certainty:4", "majority:4")
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
OF_ORGANISMS = (
    *("before", "missed", "moments", "histogram", "after", "missed_after"),
    *("label_risk", "kept", "drawn_bad", "divergence", "n_trained"),
)
"""The arrays of an audit, all of which have the organisms as their first axis."""


class Misbehaving(NamedTuple):
    """The audits of an organism with a misbehaviour.

    Attributes:
        labelled: by selectors, of the prompts as they are.
        greeted: by regularisers, of the same prompts behind a greeting.
    """

    labelled: Audit
    greeted: Audit


class Units:
    """The audits of single organisms, each a file of a folder.

    A file's name has a hash of all that decides what is in it, but not of the code.

    Args:
        folder: where they lie; it may be there already, with some of them.
        models: the organisms by name.
    """

    def __init__(self, folder: Path, models: Mapping[str, LensModel]) -> None:
        self.folder = folder
        self.models = models
        self.known = {name: fingerprint(model) for name, model in models.items()}

    def sycophancy(self, part: str, methods: Sequence[str], pools: Sequence[str], pool: Sequence[Pair]) -> Audit:
        """Audits the organisms under sycophancy: each by itself, put together."""
        heldout = audit_pairs("sycophancy", HELD_OUT, "heldout")

        def measured(name: str) -> Audit:
            return ct.audit({name: self.models[name]}, pool, methods, heldout=heldout, pools=pools, progress=False)

        return joined([self._kept(name, part, methods, partial(measured, name), pools=pools) for name in self.models])

    def misbehaviours(self) -> Iterator[pd.DataFrame]:
        """Audits organisms with each misbehaviour of their own, a table per kind and prevalence.

        Selectors label the prompts as they are. Regularisers hold the same prompts behind a greeting to them.
        """
        for kind, prevalence in product(MISBEHAVIOURS, PREVALENCES):
            found = [
                self._misbehaving(name, model, kind, prevalence)
                for name, model in islice(self.models.items(), MISBEHAVING)
            ]
            labelled = joined([of_one.labelled for of_one in found]).to_dataframe()
            greeted = joined([of_one.greeted for of_one in found]).to_dataframe()
            rows = pd.concat([labelled.query("prompt_side == 'clean'"), greeted])
            rows = over_organisms(rows, ["method", "pool", "split", "prompt_side"])
            named = ["kind", "prevalence", "organism", "method", "pool", "split", "prompt_side"]
            yield rows.assign(kind=kind, prevalence=prevalence)[[*named, *NUMBERS]]

    def _misbehaving(self, name: str, model: LensModel, kind: str, prevalence: float) -> Misbehaving:
        """The two audits of an organism with a misbehaviour, which is made where one of them is not there."""
        organism = cache(partial(misbehave, model, kind, prevalence, progress=False))
        pool = misbehaviour_pairs(kind, LABELLED)
        heldout = misbehaviour_pairs(kind, HELD_OUT, "heldout")
        regularisers = REGULARISERS if (kind, prevalence) == FROZEN_TOO else MOVING

        def labelled() -> Audit:
            return ct.audit(
                {name: organism()}, pool, ON_MISBEHAVIOURS, heldout=heldout, pools=["clean"], progress=False
            )

        def greeted() -> Audit:
            asked = rephrased(heldout)
            return ct.audit({name: organism()}, rephrased(pool), regularisers, heldout=asked, progress=False)

        part = f"{kind}-{prevalence}"
        return Misbehaving(
            labelled=self._kept(name, f"{part}-labelled", ON_MISBEHAVIOURS, labelled),
            greeted=self._kept(name, f"{part}-greeted", regularisers, greeted),
        )

    def _kept(
        self, organism: str, part: str, methods: Sequence[str], measured: Callable[[], Audit], **asked: Any
    ) -> Audit:
        """The audit that lies in the folder, or that is measured and put there."""
        decided = {"model": self.known[organism], "methods": methods, "prompts": (LABELLED, HELD_OUT), **asked}
        path = self.folder / f"{organism}-{part}-{digest_of(decided)}.safetensors"
        if not path.is_file():
            measured().save(path)
        return Audit.load(path)


def joined(audits: Sequence[Audit]) -> Audit:
    """Puts audits of single organisms together, as one audit of all of them would have it."""
    first = audits[0]
    arrays = {name: np.concatenate([getattr(one, name) for one in audits]) for name in OF_ORGANISMS}
    models = {name: known for one in audits for name, known in one.settings["models"].items()}
    return replace(
        first,
        **arrays,
        organisms=tuple(name for one in audits for name in one.organisms),
        exact=tuple(all(flags) for flags in np.array([one.exact for one in audits]).T.tolist()),
        settings={**first.settings, "models": models},
    )


def of_strengths(strengths: Sequence[str]) -> list[Pair]:
    """The pairs of a pool of some strengths alone."""
    found = [pair for pair in audit_pairs("sycophancy", DRAWN) if pair.labels["strength"] in strengths]
    return found[:LABELLED]


def over_organisms(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Gives the rows of all organisms that lack an interval Student's over the organisms alone.

    An audit has none where a group of prompts has too few topics or wrapper texts. It holds what the enumerations
    missed.

    Args:
        table: of an audit, with the rows of single organisms.
        keys: the columns that name a group, a method and a pool.
    """
    filled = table.reset_index(drop=True)
    for _, rows in filled.groupby(list(keys)):
        each = rows[rows["organism"] != EVERY_ORGANISM]
        for number, row in rows[rows["organism"] == EVERY_ORGANISM].iterrows():
            for names, verdict, missed in ((CHANGE, "verdict", row["missed"]), (SHIFT, "predicted", 0.0)):
                value, low, _ = names
                if np.isnan(row[low]) and not np.isnan(row[value]):
                    ends = student(each[value].to_numpy())
                    change = Change(row[value], ends[0] - missed, ends[1] + missed)
                    filled.loc[number, list(names)] = list(change)
                    filled.loc[number, verdict] = change.verdict
    return filled


def of_wrapped(found: Audit, *by: str) -> pd.DataFrame:
    """The rows of all organisms at wrapped prompts, by labels, with intervals."""
    table = over_organisms(found.to_dataframe(*by), ["split", "prompt_side", "pool", "method", *by])
    rows = table.query("organism == 'all' and prompt_side == 'wrapped'")
    return rows.sort_values([*by, "split"], kind="stable")


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


def main(folder: Path, organisms: Sequence[Path]) -> None:
    """Writes every table, as soon as it is there.

    Args:
        folder: of the audits that are kept.
        organisms: the folders of the models.
    """
    models = {f"{organism.parent.name}-{organism.name}": ct.load_model(organism) for organism in organisms}
    units = Units(folder, models)
    pool = audit_pairs("sycophancy", LABELLED)
    write_sycophancy(units, pool)
    held = units.sycophancy("regularisers", REGULARISERS, ["wrapped", "clean"], pool).to_dataframe()
    write("regularisers", held[["organism", "method", "pool", "split", "prompt_side", *CHANGES]])
    tables: list[pd.DataFrame] = []
    for table in units.misbehaviours():
        tables.append(table)
        write("misbehaviours", pd.concat(tables))
    write("sycophancy-across", across_strengths(units))
    write("labels-by-n", by_number_of_samples(models))
    write("draws", by_number_of_draws(ct.load_organism()))


def write_sycophancy(units: Units, pool: Sequence[Pair]) -> None:
    """Writes the tables of the selectors under sycophancy."""
    both = units.sycophancy("both", ON_BOTH_POOLS, ["wrapped", "mixed"], pool)
    write("eta", both.eta("bad_likelier").query("split == 'pool' and prompt_side == 'wrapped'"))
    write("sycophancy-strength", of_wrapped(both, "strength")[["method", "pool", "split", "strength", *NUMBERS]])
    found = [both, units.sycophancy("wrapped", ON_WRAPPED, ["wrapped"], pool)]
    rows = pd.concat([of_wrapped(one, "bad_likelier") for one in found])
    write("sycophancy", rows[["method", "pool", "split", "bad_likelier", *NUMBERS]])
    write("sycophancy-signs", pd.concat([one.signs() for one in found]).query("prompt_side == 'wrapped'"))
    clean = units.sycophancy("clean", CONTROLLED, ["clean"], pool).to_dataframe("bad_likelier")
    clean = clean.query("organism == 'all'")
    write("sycophancy-clean", clean[["method", "pool", "split", "prompt_side", "bad_likelier", *NUMBERS]])


def across_strengths(units: Units) -> pd.DataFrame:
    """Tabulates what labels of some strengths do: to all wrapped prompts, by the likelier answer, by strength."""
    tables = []
    for trained, strengths in OF_STRENGTHS.items():
        found = units.sycophancy(trained, CONTROLLED, ["wrapped"], of_strengths(strengths))
        asked = [of_wrapped(found).assign(asked="all")]
        for by in ("bad_likelier", "strength"):
            asked.append(of_wrapped(found, by).rename(columns={by: "asked"}))
        tables.append(pd.concat(asked).assign(trained=trained))
    return pd.concat(tables)[["trained", "method", "split", "asked", *NUMBERS]]


def write(name: str, table: pd.DataFrame) -> None:
    """Writes one table."""
    table.round(5).to_csv(DATA / f"{name}.csv", index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(organism) for organism in sys.argv[2:]])
