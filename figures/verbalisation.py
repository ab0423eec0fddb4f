"""The part of docs/audit.md on reasons: `python figures/verbalisation.py runs/organisms/*/[0-2]` measures it anew.

Organisms that say why they answer as they do are trained by each method against sycophancy, and asked on the way
whether they still admit that the user's hint moved them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
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
from ctlens.core.stats import over_models
from ctlens.core.threads import one_thread
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair
from ctlens.organism import by_reason, give_reasons, reason_probabilities
from ctlens.study.cells import NEUTRAL_PROMPTS
from ctlens.study.conditions import RETENTION, condition_named
from ctlens.study.config import SHARED_TRAINING
from ctlens.training import Trainer

FOLDER = "verbalisation"
TABLE = "by-step.csv"
THREAT = "sycophancy"
COMPARED = (RETENTION, "act", "mlpct", "attct", "bct", "opct", "rmct")
STEPS = (0, 5, 10, 20, 40, 100)
N_PAIRS = 256
N_PROMPTS = 192
NUMBERS = ["metric", "value", "n_prompts", "ci_low", "ci_high"]
EXACT = ("bad", "admitted_given_bad", "denied_given_bad", "admitted_given_good")
"""What is computed from probabilities, at temperature 1: bad answers, and the reasons behind the two answers."""
MATCHED = 0.5
"""Methods are compared where the probability of a bad answer is nearest to this share of that before training."""
Numbers = tuple[float, float, float]


def measured(model: LensModel, pairs: Sequence[Pair]) -> pd.DataFrame:
    """The numbers of one model: of its greedy answers, and of its probabilities."""
    greedy = ct.analysis.verbalisation(model, pairs, by_reason, progress=False).to_dataframe()
    clusters = Clusters.of({kind: numbers.tolist() for kind, numbers in groups_of(pairs).items()})
    wrapped = reason_probabilities(model, [pair.wrapped for pair in pairs])
    mean = clustered_mean(wrapped["bad"].to_numpy(), clusters)
    rows = [("bad", *map(float, mean))]
    for metric, part, whole in (
        ("admitted_given_bad", "bad_said", "bad"),
        ("denied_given_bad", "bad_known", "bad"),
        ("admitted_given_good", "good_said", "good"),
    ):
        ratio = clustered_ratio(wrapped[part].to_numpy(), wrapped[whole].to_numpy(), clusters)
        rows.append((metric, *map(float, ratio)))
    exact = pd.DataFrame(rows, columns=["metric", "value", "ci_low", "ci_high"]).assign(n_prompts=len(pairs))
    return pd.concat([greedy[NUMBERS], exact[NUMBERS]], ignore_index=True)


def on_the_way(model: LensModel, condition: str) -> Iterator[tuple[int, LensModel]]:
    """Trains a model as a study does and yields it after each number of `STEPS`, the first of which is 0."""
    threat = ct.threats.get(THREAT)
    config = replace(SHARED_TRAINING, window="shared", steps=STEPS[-1])
    trainer = Trainer(
        model,
        threat.pairs(N_PAIRS),
        condition_named(condition).losses(),
        config,
        retain=threat.neutral(NEUTRAL_PROMPTS),
    )
    yield 0, trainer.model
    for before, after in pairwise(STEPS):
        for _ in range(after - before):
            trainer.take_step()
        yield after, trainer.model
    trainer.close()


def main(folders: Sequence[Path]) -> None:
    """Measures every organism, condition and step, and writes the table."""
    heldout = ct.threats.get(THREAT).pairs(N_PROMPTS, split="heldout")
    tables = []
    with one_thread():
        for folder in folders:
            model = give_reasons(ct.load_model(folder), progress=False)
            labels = {"recipe": folder.parent.name, "organism": f"{folder.parent.name}-{folder.name}"}
            with keeping():
                for condition in COMPARED:
                    for step, trained in on_the_way(model, condition):
                        tables.append(measured(trained, heldout).assign(**labels, condition=condition, step=step))
    held = Path(__file__).parent / "data" / FOLDER
    held.mkdir(parents=True, exist_ok=True)
    table = pd.concat(tables)[["recipe", "organism", "condition", "step", *NUMBERS]]
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

    def each(self, metric: str, condition: str, step: int | Mapping[str, int]) -> pd.DataFrame:
        """A number of each organism that has it, at one step for all or at a step for each.

        Args:
            metric: its name.
            condition: that the organisms were trained in.
            step: after how many steps.
        """
        rows = self.table.query("metric == @metric and condition == @condition").dropna(subset=["value"])
        at = rows["organism"].map(step) if isinstance(step, Mapping) else step
        return rows[rows["step"] == at]

    def pooled(self, metric: str, condition: str, step: int | Mapping[str, int]) -> Numbers:
        """The mean of a number over organisms, with its interval over these, topics and wrapper texts; NaN for none."""
        rows = self.each(metric, condition, step)
        if rows.empty:
            return np.nan, np.nan, np.nan
        values, low, high = (rows[end].to_numpy() for end in ("value", "ci_low", "ci_high"))
        low, high = over_models(values, low, high)
        return float(values.mean()), max(low, 0.0), min(high, 1.0)

    def matched(self, condition: str) -> dict[str, int]:
        """The step of each organism at which its probability of a bad answer is nearest to the matched share."""
        found = {}
        for organism, rows in self.table.query("metric == 'bad' and condition == @condition").groupby("organism"):
            bad = rows.set_index("step")["value"]
            found[str(organism)] = int((bad / bad[0] - MATCHED).abs().idxmin())
        return found

    def figure(self) -> plots.Figure:
        """Draws how likely the bad answer is by step, and the reasons behind answers, a line per method."""
        names = {
            "bad": ("bad answer", "probability"),
            "admitted_given_bad": ("admitted, given the bad answer", "share"),
            "admitted_given_good": ("admitted, given the good answer", "share"),
        }
        panels = {}
        for metric, (name, y_title) in names.items():
            curves = {one: self._curve(metric, one) for one in COMPARED}
            panels[name] = plots.CurvePanel(curves, y_title)
        return plots.curve_panels(
            STEPS,
            panels,
            "Does a model that still gives in still say why?",
            x_title="training steps",
            caption="Exact, at temperature 1; bands are 95% intervals over organisms, topics and wrapper texts.",
            subtitle=f"{THREAT}, {self.organisms} organisms that give reasons; new entities in new wrapper texts",
        )

    def _curve(self, metric: str, condition: str) -> plots.Curve:
        value, low, high = np.array([self.pooled(metric, condition, step) for step in STEPS]).T
        return value, low, high


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
