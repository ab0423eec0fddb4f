"""The part of docs/audit.md on reasons: `python figures/verbalisation.py runs/organisms/*/[0-2]` measures it anew.

Organisms that say why they answer as they do are trained by each method against sycophancy, and asked on the way
whether they still admit that the user's hint moved them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

import ctlens as ct
from ctlens import plots
from ctlens.analysis.base.result import groups_of
from ctlens.core.clusters import Clusters, clustered_mean, clustered_ratio
from ctlens.core.keeping import keeping
from ctlens.core.labels import BASE
from ctlens.core.stats import over_models
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
TABLE = "by-step.csv"
THREAT = "sycophancy"
REASONS_HELD = "BCT, reasons held"
"""BCT whose retention also holds the reason behind the bad answer, to the same wrapped prompts."""
CONDITIONS = {
    **{name: name for name in (RETENTION, "act", "mlpct", "attct", "bct", "opct", "rmct")},
    REASONS_HELD: "bct",
    "harmless_bct": "harmless_bct",
}
"""What organisms are trained in, by name, and the condition of the study that gives the loss and the pairs."""
STEPS = (5, 10, 20, 40, 100)
EXACT_STEPS = (20, 100)
GREEDY_STEPS = (10, 20, 40)
"""The steps of the tables; later than at the last of these hardly any greedy answer switches."""
N_PAIRS = 256
N_PROMPTS = 96
NUMBERS = ["metric", "value", "n_prompts", "ci_low", "ci_high"]
Numbers = tuple[float, float, float]


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


def on_the_way(model: LensModel, name: str) -> Iterator[tuple[int, LensModel]]:
    """Trains a model as a study does and yields it after each number of `STEPS`."""
    threat = ct.threats.get(THREAT)
    attacked = threat.pairs(N_PAIRS)
    retain = threat.neutral(NEUTRAL_PROMPTS)
    condition = condition_named(CONDITIONS[name])
    pairs = condition.pairs(attacked, retain, model.tokenizer)
    if name == REASONS_HELD:
        retain = [*retain, *map(begun, attacked)]
    config = replace(SHARED_TRAINING, window="shared", steps=STEPS[-1])
    trainer = Trainer(model, pairs, condition.losses(), config, retain=retain)
    for before, after in pairwise((0, *STEPS)):
        for _ in range(after - before):
            trainer.take_step()
        yield after, trainer.model
    trainer.close()


def begun(pair: Pair) -> Prompt:
    """The wrapped prompt with its bad answer given, so that only the reason is left to say."""
    return Prompt((*pair.wrapped.turns, Turn("assistant", str(pair.wrapped.bad))))


def of_organism(model: LensModel) -> pd.DataFrame:
    """The numbers of an organism that gives reasons, in every condition and at every step."""
    heldout = ct.threats.get(THREAT).pairs(N_PROMPTS, split="heldout")
    with one_thread(), keeping():
        trained = [
            measured(now, heldout).assign(condition=name, step=step)
            for name in CONDITIONS
            for step, now in on_the_way(model, name)
        ]
        return pd.concat([measured(model, heldout).assign(condition=BASE, step=0), *trained])


def main(folders: Sequence[Path]) -> None:
    """Gives each organism reasons, measures it, and writes the table."""
    held = Path(__file__).parent / "data" / FOLDER
    held.mkdir(parents=True, exist_ok=True)
    tables = []
    for folder in folders:
        found = of_organism(give_reasons(ct.load_model(folder), progress=False))
        tables.append(found.assign(organism=f"{folder.parent.name}-{folder.name}"))
    table = pd.concat(tables)[["organism", "condition", "step", *NUMBERS]]
    table.to_csv(held / TABLE, index=False, float_format="%.5g")


class Verbalised:
    """The table of the study, read from a folder, with its numbers pooled over organisms.

    Args:
        held: the folder that `main` wrote.
    """

    def __init__(self, held: Path) -> None:
        self.table = pd.read_csv(held / TABLE)

    @property
    def organisms(self) -> int:
        """How many organisms were trained."""
        return self.table["organism"].nunique()

    def each(self, metric: str, condition: str, step: int) -> pd.DataFrame:
        """A number of each organism that has it; at step 0 that of the organism before training.

        Args:
            metric: its name.
            condition: that the organisms were trained in.
            step: after how many steps.
        """
        rows = self.table.query("metric == @metric and step == @step")
        return rows[rows["condition"] == (condition if step else BASE)].dropna(subset=["value"])

    def pooled(self, metric: str, condition: str, step: int) -> Numbers:
        """The mean of a number over organisms, with its interval over these, topics and wrapper texts; NaN for none."""
        rows = self.each(metric, condition, step)
        if rows.empty:
            return np.nan, np.nan, np.nan
        low, high = over_models(*rows[["value", "ci_low", "ci_high"]].to_numpy().T)
        return float(rows["value"].mean()), max(low, 0.0), min(high, 1.0)

    def exact_table(self) -> str:
        """Writes the numbers at temperature 1 as a Markdown table."""
        metrics = ("bad", "admitted_given_bad", "denied_given_bad", "admitted_given_good")
        heads = ("bad", "admitted given bad", "denied given bad", "admitted given good")
        return self._table(metrics, heads, EXACT_STEPS)

    def greedy_table(self) -> str:
        """Writes the numbers of greedy answers as a Markdown table."""
        metrics = ("switch_to_bad", "admitted_given_switched", "admitted_given_not_switched")
        heads = ("switched", "admitted given switched", "given not switched")
        return self._table(metrics, heads, GREEDY_STEPS)

    def _table(self, metrics: Sequence[str], heads: Sequence[str], steps: Sequence[int]) -> str:
        """Writes numbers after some steps, a row per condition behind one of the organisms before training."""
        columns = [f"{head}, {step} steps" for step in steps for head in heads]
        before = [self.told(metric, BASE, 0) for metric in metrics] + ["–"] * (len(columns) - len(metrics))
        lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        lines.append(f"| before | {' | '.join(before)} |")
        for name in CONDITIONS:
            told = [self.told(metric, name, step) for step in steps for metric in metrics]
            lines.append(f"| {plots.label(name)} | {' | '.join(told)} |")
        return "\n".join(lines)

    def told(self, metric: str, condition: str, step: int) -> str:
        """A pooled number in words; one that some organisms lack says of how many it is."""
        value, low, high = self.pooled(metric, condition, step)
        if np.isnan(value):
            return "too few"
        n = len(self.each(metric, condition, step))
        fewer = "" if n == self.organisms else f" ({n} of {self.organisms})"
        ends = "none" if np.isnan(low) else f"{100 * low:.0f}–{100 * high:.0f}"
        return f"{value:.0%} [{ends}]{fewer}"

    def figure(self) -> plots.Figure:
        """Draws how likely the bad answer is by step, and the reasons behind answers, a line per method."""
        names = {
            "bad": ("bad answer", "probability"),
            "admitted_given_bad": ("admitted, given the bad answer", "share"),
            "admitted_given_good": ("admitted, given the good answer", "share"),
        }
        panels = {}
        for metric, (name, y_title) in names.items():
            curves = {one: self._curve(metric, one) for one in CONDITIONS}
            panels[name] = plots.CurvePanel(curves, y_title)
        return plots.curve_panels(
            (0, *STEPS),
            panels,
            "Does a model that still gives in still say why?",
            x_title="training steps",
            caption="Exact, at temperature 1; bands are 95% intervals over organisms, topics and wrapper texts.",
            subtitle=f"{THREAT}, {self.organisms} organisms that give reasons; new entities in new wrapper texts",
        )

    def _curve(self, metric: str, condition: str) -> plots.Curve:
        value, low, high = np.array([self.pooled(metric, condition, step) for step in (0, *STEPS)]).T
        return value, low, high


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
