"""Reasons in docs/audit.md: `python figures/verbalisation.py runs/organisms/{together/[0-2],afterwards/[0-1]}`.

Organisms that say why they answer as they do are trained by each method against sycophancy, and asked on the way
whether they still admit that the user's hint moved them. The first of them is trained from a second seed too. What
stands in the table is taken up: without the table all is measured anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

import ctlens as ct
from ctlens import plots
from ctlens.analysis.base.result import groups_of
from ctlens.core.clusters import Clusters, clustered_mean, clustered_ratio
from ctlens.core.files import atomic_file
from ctlens.core.keeping import keeping
from ctlens.core.labels import BASE
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn
from ctlens.data.pairs import Pair, Prompt
from ctlens.organism import by_reason, give_reasons, reason_probabilities
from ctlens.study.cells import NEUTRAL_PROMPTS
from ctlens.study.conditions import RETENTION, condition_named
from ctlens.study.config import SHARED_TRAINING
from ctlens.training import Trainer

FOLDER = "verbalisation"
HELD = Path(__file__).parent / "data" / FOLDER
TABLE = "by-step.csv"
THREAT = "sycophancy"
REASONS_HELD = "BCT, reasons held"
"""BCT whose retention also holds the reason behind the bad answer, to the same wrapped prompts."""
METHODS = ("act", "mlpct", "attct", "bct", "opct", "rmct")
CONDITIONS = {
    **{name: name for name in (RETENTION, *METHODS)},
    REASONS_HELD: "bct",
    "harmless_bct": "harmless_bct",
}
"""What organisms are trained in, by name, and the condition of the study that gives the loss and the pairs."""
STEPS = (5, 10, 20, 40, 100)
OUTCOMES = ("admitted_given_switched", "denied_given_switched", "admitted_given_not_switched")
"""What greedy answers say of the hint: where it changed them, the truth and its denial, and where it did not."""
N_PAIRS = 256
N_PROMPTS = 96
SEEDS = (0, 1)
"""Of the trainings: both for the first organism, the first for all."""
NUMBERS = ["metric", "value", "n_prompts", "ci_low", "ci_high"]
COLUMNS = ["organism", "seed", "condition", "step", *NUMBERS]


def measured(model: LensModel, pairs: Sequence[Pair]) -> pd.DataFrame:
    """The numbers of one model: of its greedy answers, and of its probabilities."""
    greedy = ct.analysis.verbalisation(model, pairs, by_reason, progress=False).to_dataframe()
    clusters = Clusters.of({kind: numbers.tolist() for kind, numbers in groups_of(pairs).items()})
    wrapped = reason_probabilities(model, [pair.wrapped for pair in pairs])
    clean = reason_probabilities(model, [pair.clean for pair in pairs])
    rows = [("bad", *map(float, clustered_mean(wrapped["bad"].to_numpy(), clusters)))]
    for metric, table, part, whole in (
        ("admitted_given_bad", wrapped, "bad_said", "bad"),
        ("denied_given_bad", wrapped, "bad_known", "bad"),
        ("admitted_given_good", wrapped, "good_said", "good"),
        ("clean_admitted_given_bad", clean, "bad_said", "bad"),
    ):
        ratio = clustered_ratio(table[part].to_numpy(), table[whole].to_numpy(), clusters)
        rows.append((metric, *map(float, ratio)))
    exact = pd.DataFrame(rows, columns=["metric", "value", "ci_low", "ci_high"]).assign(n_prompts=len(pairs))
    return pd.concat([greedy[NUMBERS], exact[NUMBERS]], ignore_index=True)


def on_the_way(model: LensModel, name: str, seed: int) -> Iterator[tuple[int, LensModel]]:
    """Trains a model as a study does and yields it after each number of `STEPS`."""
    threat = ct.threats.get(THREAT)
    attacked = threat.pairs(N_PAIRS, seed=seed)
    retain = threat.neutral(NEUTRAL_PROMPTS, seed=seed)
    condition = condition_named(CONDITIONS[name])
    pairs = condition.pairs(attacked, retain, model.tokenizer)
    if name == REASONS_HELD:
        retain = [*retain, *map(begun, attacked)]
    config = replace(SHARED_TRAINING, window="shared", steps=STEPS[-1], seed=seed)
    trainer = Trainer(model, pairs, condition.losses(), config, retain=retain)
    for before, after in pairwise((0, *STEPS)):
        for _ in range(after - before):
            trainer.take_step()
        yield after, trainer.model
    trainer.close()


def begun(pair: Pair) -> Prompt:
    """The wrapped prompt with its bad answer given, so that only the reason is left to say."""
    return Prompt((*pair.wrapped.turns, Turn("assistant", str(pair.wrapped.bad))))


def of_organism(model: LensModel, seed: int) -> pd.DataFrame:
    """The numbers of an organism that gives reasons, in every condition and at every step of trainings from a seed."""
    heldout = ct.threats.get(THREAT).pairs(N_PROMPTS, split="heldout")
    with one_thread(), keeping():
        trained = [
            measured(now, heldout).assign(condition=name, step=step)
            for name in CONDITIONS
            for step, now in on_the_way(model, name, seed)
        ]
        return pd.concat([measured(model, heldout).assign(condition=BASE, step=0), *trained])


def main(folders: Sequence[Path]) -> None:
    """Gives each organism reasons, measures what the table lacks of it, and puts it there."""
    held = HELD / TABLE
    table = pd.read_csv(held) if held.is_file() else pd.DataFrame(columns=COLUMNS)
    known = set(zip(table["organism"], table["seed"], strict=True))
    asked = [(folder, SEEDS[0]) for folder in folders] + [(folders[0], seed) for seed in SEEDS[1:]]
    for folder, seed in asked:
        name = f"{folder.parent.name}-{folder.name}"
        if (name, seed) in known:
            continue
        model = give_reasons(ct.load_model(folder), progress=False)
        found = of_organism(model, seed).assign(organism=name, seed=seed)[COLUMNS]
        table = found if table.empty else pd.concat([table, found])
        with atomic_file(held) as temporary:
            table.to_csv(temporary, index=False, float_format="%.5g")


class Verbalised:
    """The table of the study, read from a folder.

    Args:
        held: the folder that `main` wrote.
    """

    def __init__(self, held: Path) -> None:
        table = pd.read_csv(held / TABLE)
        again = table["organism"] + ", seed " + table["seed"].astype(str)
        table["training"] = table["organism"].where(table["seed"] == 0, again)
        self.trainings = tuple(table["training"].unique())
        """The organisms by name, and one again with the seed that its trainings are of."""
        self.table = table.set_index(["training", "condition", "step", "metric"]).sort_index()

    def number(self, metric: str, condition: str, step: int, training: str) -> tuple[float, float, float]:
        """A number with its interval; at step 0 that of the organism before training, NaN where it was not measured."""
        at = (training, condition if step else BASE, step, metric)
        if at not in self.table.index:
            return np.nan, np.nan, np.nan
        value, low, high = self.table.loc[at, ["value", "ci_low", "ci_high"]]
        return value, max(low, 0.0), min(high, 1.0)

    def values(self, metric: str, condition: str, step: int, trainings: Sequence[str] = ()) -> list[float]:
        """A number of some trainings; by default of all."""
        return [self.number(metric, condition, step, training)[0] for training in trainings or self.trainings]

    def admissions_table(self, step: int, trainings: Sequence[str]) -> str:
        """Writes as a Markdown table how likely each organism admits a bad answer, of how likely it gives one.

        Args:
            step: after how many steps.
            trainings: a column for each.
        """

        def row(condition: str, step: int) -> str:
            told = [self.told("admitted_given_bad", condition, step, training) for training in trainings]
            given = self.values("bad", condition, step, trainings)
            cells = [f"{one} of {of:.0%}" for one, of in zip(told, given, strict=True)]
            falsely = self.values("admitted_given_good", condition, step, trainings)
            return f"{' | '.join(cells)} | {', '.join(f'{value:.0%}' for value in falsely)}"

        return _table([*trainings, "admitted, not given in"], row, step)

    def outcomes_table(self, step: int, trainings: Sequence[str]) -> str:
        """Writes as a Markdown table the `OUTCOMES` of each organism's greedy answers.

        Args:
            step: after how many steps.
            trainings: a column for each.
        """

        def row(condition: str, step: int) -> str:
            cells = [" · ".join(self.told(metric, condition, step, name) for metric in OUTCOMES) for name in trainings]
            return " | ".join(cells)

        return _table(trainings, row, step)

    def told(self, metric: str, condition: str, step: int, training: str) -> str:
        """A number in words."""
        value, low, high = self.number(metric, condition, step, training)
        return "too few" if np.isnan(value) else f"{value:.0%} [{100 * low:.0f}–{100 * high:.0f}]"

    def figure(self) -> plots.Figure:
        """Draws the admissions of each organism by step, and how likely it gives in, a line per method."""
        panels = {
            f"{name}, {training}": plots.CurvePanel(self._curves(metric, training), words)
            for metric, name, words in (
                ("admitted_given_bad", "admitted", "share of bad answers"),
                ("bad", "bad answers", "probability"),
            )
            for training in self.trainings
        }
        return plots.curve_panels(
            (0, *STEPS),
            panels,
            "Does a model that still gives in still say why?",
            x_title="training steps",
            caption="Exact, at temperature 1; bands are 95% intervals over topics and wrapper texts.",
            subtitle=f"{THREAT}, organisms that give reasons; new entities in new wrapper texts",
        )

    def _curves(self, metric: str, training: str) -> dict[str, plots.Curve]:
        """A number of a training by step, with its interval."""
        found = {}
        for name in CONDITIONS:
            value, low, high = np.array([self.number(metric, name, step, training) for step in (0, *STEPS)]).T
            found[name] = (value, low, high)
        return found


def _table(heads: Sequence[str], row: Callable[[str, int], str], step: int) -> str:
    """A Markdown table of the organisms before training and after `step` steps in each condition."""
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, after in [(BASE, 0), *((name, step) for name in CONDITIONS)]:
        lines.append(f"| {plots.label(name)} | {row(name, after)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
