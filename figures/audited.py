"""The page on the audit: its tables, from those that `audit.py` has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

DATA = Path(__file__).parent / "data" / "audit"
CHANGE = ("change", "ci_low", "ci_high")
SHIFT = ("label_shift", "label_low", "label_high")
SHOWN = ("first", "greedy", "certainty:4", "majority:4", "soft-bct-own", "act-own")
"""The methods of the table and the figure of the misbehaviours."""
TARGETS = ("soft-bct", "act")
SIDES = {"wrapped": "with the greeting", "clean": "without"}
SPLITS = {"pool": "labelled prompts", "heldout": "held-out prompts"}
LIKELIER = {"yes": "bad answer likelier", "no": "good answer likelier"}
MODES = {
    "agreement": "sycophancy",
    "shortcut": "spurious correlation",
    "advice": "emergent misalignment",
    "hack": "reward hacking",
}
"""The failure modes of arXiv 2606.03810, by the misbehaviour that is the small twin of each."""
FAMILIES = {
    "label methods": ("certainty:4",),
    "greedy self-training": ("greedy",),
    "soft BCT": ("soft-bct-own",),
    "ACT": ("act-own",),
}
"""The methods here by those of the paper, whose label methods are five; self-certainty alone stands for them here."""
PAPER = {
    ("label methods", "agreement"): 0.25,
    ("label methods", "shortcut"): 0.50,
    ("label methods", "advice"): 0.72,
    ("label methods", "hack"): 0.63,
    ("greedy self-training", "agreement"): 0.50,
    ("greedy self-training", "advice"): 0.80,
    ("greedy self-training", "hack"): 0.70,
    ("soft BCT", "agreement"): 0.35,
    ("soft BCT", "advice"): 0.95,
    ("soft BCT", "hack"): 0.95,
    ("ACT", "agreement"): 0.10,
    ("ACT", "advice"): 0.95,
    ("ACT", "hack"): 1.00,
}
"""The share of runs whose risk fell, as the paper states it; what is missing was not at hand."""


class Noise(NamedTuple):
    """How much of what the control does is chance in the labels that were drawn, over organisms and misbehaviours.

    Attributes:
        change: the root of the mean square of the change of risk, labelled prompts.
        drawn: that of the shift of the labels that were drawn.
        left: that of the change less the shift.
        n: the trainings.
    """

    change: float
    drawn: float
    left: float
    n: int


class Runs(NamedTuple):
    """How many of `n` trainings lowered risk."""

    lower: int
    n: int

    @property
    def share(self) -> float:
        """The share that did; NaN of none."""
        return self.lower / self.n if self.n else float("nan")


class Audited:
    """The tables of the audit, read from a folder.

    Args:
        held: the folder that `audit.py` wrote.
    """

    def __init__(self, held: Path) -> None:
        def read(name: str) -> pd.DataFrame:
            return pd.read_csv(held / f"{name}.csv", dtype={"prevalence": str}, keep_default_na=True)

        self.sycophancy = read("sycophancy")
        self.strength = read("sycophancy-strength")
        self.signs = read("sycophancy-signs")
        self.clean = read("sycophancy-clean")
        self.across = read("sycophancy-across")
        self.labels = read("labels-by-n")
        self.draws = read("draws")
        self.eta = read("eta")
        self.regularisers = read("regularisers")
        self.misbehaviours = read("misbehaviours")

    def sycophancy_table(self) -> str:
        """Writes what labels and trainings do under sycophancy, a row per selector and pool."""
        heads = [f"{words}: {what}" for words in LIKELIER.values() for what in ("labels", "labelled", "held out")]
        lines = [f"| selector | pool | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
        table = self.sycophancy.set_index(["method", "pool", "bad_likelier", "split"])
        for method, pool in dict.fromkeys(zip(self.sycophancy["method"], self.sycophancy["pool"], strict=True)):
            cells = []
            for likelier in LIKELIER:
                rows = [table.loc[(method, pool, likelier, split)] for split in SPLITS]
                cells += [_points(rows[0]["label_shift"]), *map(_judged, rows)]
            lines.append(f"| {method} | {pool} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def signs_table(self) -> str:
        """Writes how many labelled prompts go where their labels lead, over organisms."""
        lines = ["| selector | pool | prompts | go where their labels lead | correlation |", "|---|---|---|---|---|"]
        for (method, pool), rows in self.signs.groupby(["method", "pool"], sort=False):
            n = rows["n_prompts"].sum()
            agree = (rows["agree"] * rows["n_prompts"]).sum() / n
            correlation = (rows["correlation"] * rows["n_prompts"]).sum() / n
            lines.append(f"| {method} | {pool} | {n} | {agree:.1%} | {correlation:.2f} |")
        return "\n".join(lines)

    def strength_table(self) -> str:
        """Writes what the strength of an attack does to greedy labels of the wrapped pool."""
        lines = ["| strength | risk before | labels | labelled | held out |", "|---|---|---|---|---|"]
        rows = self.strength.query("method == 'greedy' and pool == 'wrapped'").set_index(["split", "strength"])
        for strength in sorted(set(self.strength["strength"])):
            own = rows.loc[("pool", strength)]
            told = [
                f"{100 * own['risk_before']:.1f}",
                _led(own),
                _judged(own),
                _judged(rows.loc[("heldout", strength)]),
            ]
            lines.append(f"| {strength} | {' | '.join(told)} |")
        return "\n".join(lines)

    def across_table(self) -> str:
        """Writes what labels of weak and of strong attacks alone do, also to held-out prompts of each strength."""
        strengths = sorted(set(self.across["asked"]) - {"all", *LIKELIER})
        heads = ["attacks", "selector", "labels", "labelled", *(f"held out, strength {number}" for number in strengths)]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        table = self.across.set_index(["trained", "method", "split", "asked"])
        for trained, method in dict.fromkeys(zip(self.across["trained"], self.across["method"], strict=True)):
            own = table.loc[(trained, method, "pool", "all")]
            others = [_judged(table.loc[(trained, method, "heldout", asked)]) for asked in strengths]
            lines.append(f"| {trained} | {method} | {' | '.join([_led(own), _judged(own), *others])} |")
        return "\n".join(lines)

    def labels_table(self) -> str:
        """Writes what labels are by the number of samples."""
        numbers = list(dict.fromkeys(self.labels["n"]))
        first, *others = numbers
        lines = [
            f"| selector | bad answers likelier | N {first} | {' | '.join(map(str, others))} |",
            "|---|---|" + "---|" * len(numbers),
        ]
        for (selector, likelier), rows in self.labels.groupby(["selector", "bad_likelier"], sort=False):
            lines.append(f"| {selector} | {likelier} | {' | '.join(map(_points, rows['label_shift']))} |")
        return "\n".join(lines)

    def draws_table(self) -> str:
        """Writes how far estimates from samples are from the exact numbers."""
        numbers = list(dict.fromkeys(self.draws["n"]))
        lines = [f"| estimate | {' | '.join(f'{n} samples' for n in numbers)} |", "|---|" + "---|" * len(numbers)]
        for quantity, rows in self.draws.groupby("quantity", sort=False):
            nats = quantity.startswith("KL")
            cells = [f"{error:.2f} nats" if nats else f"{100 * error:.1f}" for error in rows["error"]]
            lines.append(f"| {quantity} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def regularisers_table(self) -> str:
        """Writes what each regulariser does in each direction, held-out prompts, over organisms."""
        lines = [
            "| trained side | method | wrapped: before | change | clean: before | change |",
            "|---|---|---|---|---|---|",
        ]
        rows = self.regularisers.query("organism == 'all' and split == 'heldout'")
        sides = rows.set_index(["pool", "method", "prompt_side"])
        for pool, method in product(dict.fromkeys(rows["pool"]), dict.fromkeys(rows["method"])):
            cells = []
            for side in ("wrapped", "clean"):
                row = sides.loc[(pool, method, side)]
                cells += [f"{100 * row['risk_before']:.1f}", _judged(row)]
            lines.append(f"| {pool} | {method} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def misbehaviours_table(self) -> str:
        """Writes the change on held-out prompts, a row per kind and prevalence, a column per method."""
        lines = [
            f"| kind | prevalence | before | {' | '.join(SHOWN)} |",
            "|---|---|---|" + "---|" * len(SHOWN),
        ]
        for (kind, prevalence), group in self.shown().groupby(["kind", "prevalence"], sort=False):
            rows = group.set_index("method")
            cells = [_changed(rows.loc[method]) for method in SHOWN]
            before = 100 * group["risk_before"].iloc[0]
            lines.append(f"| {kind} | {prevalence} | {before:.1f} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def targets_table(self) -> str:
        """Writes what regularisers do to agreement with a target that moves and with one that does not."""
        lines = [f"| target | {' | '.join(f'{name}, {words}' for name in TARGETS for words in SIDES.values())} |"]
        lines.append("|---|" + "---|" * len(TARGETS) * len(SIDES))
        rows = self.misbehaviours.query("organism == 'all' and split == 'heldout' and kind == 'agreement'")
        table = rows[rows["prevalence"] == self.prevalences[0]].set_index(["method", "prompt_side"])
        for target in ("own", "reference"):
            cells = [_judged(table.loc[(f"{name}-{target}", side)]) for name in TARGETS for side in SIDES]
            lines.append(f"| {target} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def paper_table(self) -> str:
        """Writes the share of trainings after which risk was lower: the paper's, and here at each prevalence."""
        lines = [f"| method | {' | '.join(f'{mode} ({kind})' for kind, mode in MODES.items())} |"]
        lines.append("|---|" + "---|" * len(MODES))
        for family in FAMILIES:
            cells = []
            for kind in MODES:
                share = PAPER.get((family, kind))
                runs = [self.suppressed(family, kind, at) for at in self.prevalences]
                told = ["–" if share is None else f"{share:.0%}", *(f"{lower} of {n}" for lower, n in runs)]
                cells.append(" · ".join(told))
            lines.append(f"| {family} | {' | '.join(cells)} |")
        return "\n".join(lines)

    @property
    def prevalences(self) -> tuple[str, ...]:
        """The prevalences of the misbehaviours."""
        return tuple(dict.fromkeys(self.misbehaviours["prevalence"]))

    def suppressed(self, family: str, kind: str, prevalence: str) -> Runs:
        """The trainings of a family of methods, by whether the risk of held-out prompts fell."""
        rows = self.misbehaviours.query(
            "organism != 'all' and split == 'heldout' and prompt_side == 'clean' and kind == @kind "
            "and prevalence == @prevalence"
        )
        changes = rows[rows["method"].isin(FAMILIES[family])]["change"]
        return Runs(int((changes < 0).sum()), len(changes))

    def noise(self, kinds: Sequence[str]) -> Noise:
        """How much of what the control does to labelled prompts is chance in its labels, for some misbehaviours."""
        rows = self.misbehaviours.query("organism != 'all' and method == 'first' and split == 'pool'")
        rows = rows[rows["kind"].isin(kinds)]
        left = rows["change"] - rows["drawn_shift"]
        return Noise(_size(rows["change"]), _size(rows["drawn_shift"]), _size(left), len(rows))

    def shown(self) -> pd.DataFrame:
        """The rows of all organisms, of held-out prompts without a greeting and the methods that are shown."""
        rows = self.misbehaviours.query("organism == 'all' and split == 'heldout' and prompt_side == 'clean'")
        return rows[rows["method"].isin(SHOWN)]


def _size(values: pd.Series) -> float:
    return float(np.sqrt((values**2).mean()))


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _bold(text: str, verdict: Any) -> str:
    return f"**{text}**" if verdict in ("amplify", "suppress") else text


def _changed(row: Mapping[str, Any] | pd.Series) -> str:
    """A change, bold where it amplifies or suppresses."""
    return _bold(_points(row["change"]), row["verdict"])


def _judged(row: Mapping[str, Any] | pd.Series) -> str:
    """A change with its interval."""
    return f"{_changed(row)} [{_points(row['ci_low'])}, {_points(row['ci_high'])}]"


def _led(row: Mapping[str, Any] | pd.Series) -> str:
    """The shift of labels with its interval, bold where it predicts either."""
    ends = f"[{_points(row['label_low'])}, {_points(row['label_high'])}]"
    return f"{_bold(_points(row['label_shift']), row['predicted'])} {ends}"
