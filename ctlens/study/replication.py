"""Replication: the claims and the rates of several studies, each of a model of its own, with intervals over the models.

One study says what holds in one model. Studies of equal settings that differ in the model alone say what holds again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from ctlens import plots
from ctlens.core.clusters import Clusters, clustered_statistic
from ctlens.core.config import first_difference
from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_file
from ctlens.core.public import public
from ctlens.core.reading import read_json
from ctlens.core.stats import LEVEL, Interval, over_models
from ctlens.plots import Figure
from ctlens.study.claims.claim import FAILS, HOLDS, OPEN, Claim, claim_verdict, read_claims
from ctlens.study.results import SEVERAL, SPLIT, VERDICT_RATES, ResultRow, last_step, read_results

ALL_MODELS = "all"
"""The group of a row that is about the models of every group."""
_OF_THE_MODEL = ("model", "weights", "clean_born", "clean_born_weights")
"""The settings by which two studies of a replication may differ."""
_CHOSEN_ANEW = ("transfer",)
"""Claims about the clearest of many cases, another one in every study; `Replication.transfers` has all cases."""
_NAN = float("nan")
_ENDS = ("value", "ci_low", "ci_high")
_OF_PROMPTS = ("value", "prompts_low", "prompts_high")


@dataclass(frozen=True)
class Pooled:
    """A number of several models, pooled.

    Attributes:
        value: its mean over the models.
        low, high: the ends of its interval over models and prompts; NaN for fewer than `SEVERAL` models, or where the
            models have none over prompts.
        n: how many models have the number.
    """

    value: float
    low: float
    high: float
    n: int


def pooled_over_models(
    values: Float[np.ndarray, " model"],
    low: Float[np.ndarray, " model"],
    high: Float[np.ndarray, " model"],
    level: float = LEVEL,
) -> Pooled:
    """Pools a number of several models, see `ctlens.core.stats.over_models`.

    Args:
        values: of each model; NaN for a model that has none.
        low, high: the ends of each one's interval over prompts alone, at 95 percent.
        level: of confidence of the interval that is made.

    >>> pooled_over_models(np.array([1.0, 2.0, np.nan]), np.zeros(3), np.full(3, 3.0))
    Pooled(value=1.5, low=nan, high=nan, n=2)
    """
    known = ~np.isnan(values)
    n = int(known.sum())
    value = float(values[known].mean()) if n else _NAN
    ends = over_models(values[known], low[known], high[known], level) if n >= SEVERAL else (_NAN, _NAN)
    return Pooled(value, *ends, n)


@dataclass(frozen=True)
class Replication:
    """Replication holds what several studies found, each about a model of its own.

    Attributes:
        claims: a row per study and claim: its group, its name, and the columns of `claims.csv`.
        results: a row per study and number: its group, its name, and the columns of `results.csv`, of every training at
            its last step.
    """

    claims: pd.DataFrame
    results: pd.DataFrame

    @property
    def groups(self) -> list[str]:
        """The names of the groups that the studies lie in."""
        return list(dict.fromkeys(self.claims["group"]))

    def __repr__(self) -> str:
        sizes = self.claims.groupby("group", sort=False)["study"].nunique()
        return f"Replication({', '.join(f'{group}: {n} studies' for group, n in sizes.items())})"

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulates the claims, each pooled over all models and over those of each group.

        Returns:
            A row per claim, threat, setting and group (`"all"` for every model): `key`, `statement`, `threat`,
            `setting`, `group`; `n`, how many models it was measured on, and on how many of them it `holds`, `fails` or
            stays `open`; the mean `value` with `ci_low` and `ci_high` over models and prompts, the mean `floor`, and
            the `verdict` on the pooled number by the rule of a single study.
        """
        return pd.DataFrame([*self._claims()])

    def _claims(self) -> Iterator[dict[str, Any]]:
        repeated = [row for row in _records(self.claims) if row["key"] not in _CHOSEN_ANEW]
        for (key, threat, setting), rows in _grouped(repeated, ("key", "threat", "setting")).items():
            for group, of_group in self._by_group(rows):
                floors = np.array([row["floor"] for row in of_group])
                # A floor such as that of shuffled labels is each model's own, so what is pooled is what lies above it.
                value, low, high = np.array([[row[end] for end in _OF_PROMPTS] for row in of_group]).T - floors
                above = pooled_over_models(value, low, high)
                floor = float(floors[[not np.isnan(row["value"]) for row in of_group]].mean()) if above.n else _NAN
                judged = [row["verdict"] for row in of_group]
                yield {
                    "key": key,
                    "statement": of_group[0]["statement"],
                    "threat": threat,
                    "setting": setting,
                    "group": group,
                    "n": above.n,
                    "holds": judged.count(HOLDS),
                    "fails": judged.count(FAILS),
                    "open": judged.count(OPEN),
                    "value": above.value + floor,
                    "ci_low": above.low + floor,
                    "ci_high": above.high + floor,
                    "floor": floor,
                    "verdict": claim_verdict(above.value, above.low, above.high),
                }

    def _by_group(self, rows: Sequence[ResultRow]) -> Iterator[tuple[str, Sequence[ResultRow]]]:
        """The rows of all models, then those of each group where there are several."""
        yield ALL_MODELS, rows
        if len(self.groups) > 1:
            for group in self.groups:
                if of_group := [row for row in rows if row["group"] == group]:
                    yield group, of_group

    def rates(self, metric: str = "bad_rate", split: str = SPLIT, prompt_side: str = "wrapped") -> pd.DataFrame:
        """Tabulates a number of `results.csv` on the threat that was trained on, pooled over models.

        Args:
            metric: for example `"bad_rate"`, `"bad_rate_vs_retention"` or `"share_repaired"`.
            split, prompt_side: of the prompts.

        Returns:
            A row per threat, condition and group: `threat`, `condition`, `group`, `n` models, `value`, `ci_low` and
            `ci_high`.

        Raises:
            CtlensError: the studies have no such number.
        """
        ends = (0.0, 1.0) if metric in VERDICT_RATES else (-np.inf, np.inf)
        rows = self._numbers(metric, split, prompt_side)
        trained = {row["trained_threat"] for row in rows}
        own = [row for row in rows if row["trained_threat"] in ("", row["evaluated_threat"])]
        return pd.DataFrame(
            [
                {"threat": threat, "condition": condition, "group": group, **_columns(_pooled(of_group), ends)}
                for (threat, condition), cases in _grouped(own, ("evaluated_threat", "condition")).items()
                if threat in trained
                for group, of_group in self._by_group(cases)
            ]
        )

    def transfers(self, split: str = SPLIT) -> pd.DataFrame:
        """Tabulates what training against one threat does to the bad rate on each other one, pooled over models.

        It is the bad rate less that after training on retention alone, with Bonferroni's correction for all cases.

        Args:
            split: of the prompts.

        Returns:
            A row per case: `trained_threat`, `condition`, `evaluated_threat`, `n` models, `value`, `ci_low`, `ci_high`,
            and whether the change is `clear` of 0.

        Raises:
            CtlensError: the models were asked about no other threat.
        """
        names = ("trained_threat", "condition", "evaluated_threat")
        rows = self._numbers("bad_rate_vs_retention", split, "wrapped")
        cases = _grouped([row for row in rows if row["trained_threat"] != row["evaluated_threat"]], names)
        if not cases:
            raise CtlensError("these models were asked about no other threat: name some with asked in the studies.")
        level = 1 - (1 - LEVEL) / len(cases)
        found = pd.DataFrame(
            [dict(zip(names, case, strict=True)) | _columns(_pooled(of, level)) for case, of in cases.items()]
        )
        return found.assign(clear=(found["ci_low"] > 0) | (found["ci_high"] < 0))

    def related(self, one: str, other: str) -> pd.DataFrame:
        """Asks whether the number of one kind of claim goes with that of another, over models and methods.

        A kind of claim is one about each method, such as `"cue"` of `cue_act` and `cue_bct`. Models of the same
        organism by several methods go together.

        Args:
            one, other: the kinds, for example `"cue"` and `"relearnt"`: is what can still be read relearnt sooner?

        Returns:
            A row per threat: Spearman's rank correlation as `value` with `ci_low` and `ci_high` over models, `n` models
            and `n_pairs` of numbers.

        Raises:
            CtlensError: no model has numbers of both kinds.
        """
        of_kind = {kind: self._by_method(kind) for kind in (one, other)}
        both = [case for case in of_kind[one] if case in of_kind[other]]
        if not both:
            raise CtlensError(f"no model has claims of both kinds, {one!r} and {other!r}: check the names.")
        rows = []
        for threat in dict.fromkeys(threat for threat, *_ in both):
            cases = [case for case in both if case[0] == threat]
            numbers = np.array([[of_kind[kind][case] for kind in (one, other)] for case in cases])
            models = ["/".join(case[1:3]) for case in cases]

            def correlated(chosen: Int[np.ndarray, " chosen"], numbers: np.ndarray = numbers) -> list[float]:
                ranks = pd.DataFrame(numbers[chosen]).rank()
                return [float(ranks.corr().iloc[0, 1])]

            ((low, high),) = clustered_statistic(correlated, len(cases), Clusters.of({"model": models}))
            value = correlated(np.arange(len(cases)))[0]
            ends = {"value": value, "ci_low": low, "ci_high": high}
            rows.append({"threat": threat, **ends, "n": len(set(models)), "n_pairs": len(cases)})
        return pd.DataFrame(rows)

    def _by_method(self, kind: str) -> dict[tuple[str, str, str, str], float]:
        """The numbers of a kind of claim above their floors, by threat, group, study and method."""
        return {
            (row["threat"], row["group"], row["study"], row["key"].removeprefix(f"{kind}_")): row["value"]
            - row["floor"]
            for row in _records(self.claims)
            if row["key"].startswith(f"{kind}_") and not np.isnan(row["value"])
        }

    def _numbers(self, metric: str, split: str, prompt_side: str) -> list[ResultRow]:
        sought = (metric, split, prompt_side)
        rows = [row for row in _records(self.results) if (row["metric"], row["split"], row["prompt_side"]) == sought]
        if not rows:
            raise CtlensError(f"the studies have no {metric} of {prompt_side} prompts on {split!r}: check the names.")
        return rows

    def figure(self, threat: str, setting: str, keys: Sequence[str] = ()) -> Figure:
        """Draws the claims on one threat: each model's number above the claim's floor, and the pooled ones.

        Args:
            threat, setting: of the claims.
            keys: which of them, in the order of the rows; all by default.

        Raises:
            CtlensError: no such claim was measured there.
        """
        single = [
            row
            for row in _records(self.claims)
            if (row["threat"], row["setting"]) == (threat, setting)
            and row["key"] not in _CHOSEN_ANEW
            and (not keys or row["key"] in keys)
            and not np.isnan(row["value"])
        ]
        if not single:
            raise CtlensError(f"no claim was measured on {threat!r} at {setting!r}: check the names.")
        told = {row["key"]: row["statement"] for row in single}
        statements = {key: told[key] for key in keys or told if key in told}
        groups = self.groups if len(self.groups) > 1 else [ALL_MODELS]
        pooled = {(row["group"], row["key"], row["threat"], row["setting"]): row for row in self._claims()}
        models: dict[str, list[list[float]]] = {}
        numbers: dict[str, plots.Curve] = {}
        for group in groups:
            of_group = [row for row in single if group in (ALL_MODELS, row["group"])]
            models[group] = [
                [row["value"] - row["floor"] for row in of_group if row["key"] == key] for key in statements
            ]
            lines = [pooled[group, key, threat, setting] for key in statements]
            value, low, high = np.array([[line[end] - line["floor"] for end in _ENDS] for line in lines]).T
            numbers[group] = (value, low, high)
        return plots.replicated(
            list(statements.values()),
            models,
            numbers,
            "Which claims hold again in other models?",
            subtitle=f"{threat}, {setting}",
            x_title="the claim's number, less what it must exceed",
        )

    def save(self, path: str | Path) -> None:
        """Writes the pooled claims as CSV, a row as `to_dataframe` has it."""
        with atomic_file(Path(path)) as temporary:
            self.to_dataframe().to_csv(temporary, index=False)


@public
def replicate(studies: Sequence[str | Path]) -> Replication:
    """Reads several finished studies, each of a model of its own, and pools what they found.

    The studies that lie in one folder are a group, under the name of that folder: for example organisms of one recipe.

    Args:
        studies: their folders, at least two; each has a `claims.csv`, a `results.csv` and a `config.json`.

    Raises:
        CtlensError: there are fewer than two, one is missing or damaged, two have the same name in one group, two are
            of one model, or they differ in more than the model.
    """
    if len(studies) < 2:
        raise CtlensError("a replication is of at least two studies: name the folder of each.")
    folders = [Path(folder) for folder in studies]
    configs = {folder: read_json(folder / "config.json", "threats", "methods", "weights") for folder in folders}
    _require_alike(configs)
    labels = {folder: (folder.resolve().parent.name, folder.resolve().name) for folder in folders}
    if len(set(labels.values())) < len(folders):
        raise CtlensError("two studies have one name in one group: name each folder once, in a folder of its group.")
    claims = [_labelled(_claim_rows(read_claims(folder / "claims.csv")), *labels[folder]) for folder in folders]
    results = [_labelled(last_step(read_results(folder / "results.csv")), *labels[folder]) for folder in folders]
    return Replication(pd.concat(claims, ignore_index=True), pd.concat(results, ignore_index=True))


def _require_alike(configs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuses studies of one model, and such as differ in more than the model."""
    (first, expected), *others = configs.items()
    seen = {str(expected["weights"]): first}
    for folder, config in others:
        if other := first_difference(_settings(expected), _settings(config)):
            raise CtlensError(f"{first} and {folder} are different studies ({other}): give them equal settings.")
        if (twice := seen.setdefault(str(config["weights"]), folder)) != folder:
            raise CtlensError(f"{twice} and {folder} are studies of one model, which count once: name one of them.")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _OF_THE_MODEL}


def _claim_rows(claims: Sequence[Claim]) -> pd.DataFrame:
    return pd.DataFrame([asdict(claim) for claim in claims])


def _labelled(rows: pd.DataFrame, group: str, study: str) -> pd.DataFrame:
    labelled = rows.reset_index(drop=True)
    labelled.insert(0, "study", study)
    labelled.insert(0, "group", group)
    return labelled


def _records(rows: pd.DataFrame) -> list[ResultRow]:
    return [*rows.to_dict("records")]


def _grouped(rows: Iterable[ResultRow], names: Sequence[str]) -> dict[tuple[Any, ...], list[ResultRow]]:
    """The rows by their values in some columns, in the order in which these first occur."""
    found: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _pooled(rows: Iterable[ResultRow], level: float = LEVEL) -> Pooled:
    """Pools the rows of one number: first the seeds of each model, whose prompts are the same, then the models."""
    of_models = _grouped(rows, ("group", "study")).values()
    seeds = [[[row[end] for end in _ENDS] for row in of_model] for of_model in of_models]
    return pooled_over_models(*np.array([np.mean(of_model, axis=0) for of_model in seeds]).T, level=level)


def _columns(pooled: Pooled, possible: Interval = (-np.inf, np.inf)) -> dict[str, float]:
    """The columns of a pooled number, its interval within what is possible."""
    low, high = np.clip([pooled.low, pooled.high], *possible).tolist()
    return {"n": pooled.n, "value": pooled.value, "ci_low": low, "ci_high": high}
