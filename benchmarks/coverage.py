"""How often do 95 percent intervals hold the truth, where prompts of a topic and of a wrapper text go together?

Run `python benchmarks/coverage.py`; `--quick` takes a tenth of the samples. Every sample draws topics and wrapper texts
anew, as many as a threat has held out, and asks its number of prompts. A prompt's answer is bad where the sum of a part
of its topic, a part of its wrapper and a part of its own lies below a threshold; the shares of the variance are given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ctlens.core.clusters import (
    Clusters,
    clustered_mean,
    clustered_rate,
    clustered_ratio,
    clustered_statistic,
    paired_difference,
    simultaneous_mean,
)
from ctlens.core.progress import progress_bar
from ctlens.core.stats import Interval, wilson

HERE = Path(__file__).parent
DESIGNS = {"sycophancy": (15, 8, 96), "jailbreak": (6, 8, 96), "conditional": (5, 8, 96), "facts": (56, 8, 96)}
"""Topics, wrapper texts and prompts of the held-out split of some threats."""
SHARES = ((0.0, 0.0), (0.1, 0.1), (0.3, 0.3))
"""Shares of the variance between topics and between wrapper texts."""
BEFORE = 0.7
AFTER = 0.3
"""The rates of bad answers of two models, whose answers to a prompt are correlated by .7."""
_ALIKE = 0.7
HEADS = 64
"""Means that are looked at together, as of the heads of a model; an interval holds where those of all do."""
SAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """The answers of two models to the prompts of one draw: what is compared with the threshold, lower is worse.

    Attributes:
        before, after: of each prompt.
        heads: numbers of each prompt, each with parts of its own.
        clusters: of the prompts.
    """

    before: np.ndarray
    after: np.ndarray
    heads: np.ndarray
    clusters: Clusters


class Estimate(NamedTuple):
    """The intervals of one number of a sample, or of several together: ours, and those of independent prompts."""

    number: str
    truth: float
    clustered: Interval | tuple[np.ndarray, np.ndarray]
    independent: Interval | tuple[np.ndarray, np.ndarray]

    @property
    def held(self) -> tuple[bool, bool]:
        """Whether the intervals of either kind all hold the truth."""
        ends = (self.clustered, self.independent)
        found = [bool(np.all((low <= self.truth) & (self.truth <= high))) for low, high in ends]
        return found[0], found[1]


def samples(design: tuple[int, int, int], shares: tuple[float, float], n: int, seed: int = 0) -> Iterator[Sample]:
    """Draws topics, wrapper texts and prompts anew."""
    draw = np.random.default_rng(seed)
    topics, wrappers, n_prompts = design
    cells = np.array([*product(range(topics), range(wrappers))])
    for _ in range(n):
        orders = [draw.permutation(len(cells)) for _ in range(-(-n_prompts // len(cells)))]
        topic, wrapper = cells[np.concatenate(orders)[:n_prompts]].T
        labels = {"topic": topic.astype(str).tolist(), "wrapper": wrapper.astype(str).tolist()}
        parts = [draw.standard_normal((2, size)) for size in (topics, wrappers, n_prompts)]
        both = [np.stack([part[0], _ALIKE * part[0] + (1 - _ALIKE**2) ** 0.5 * part[1]]) for part in parts]
        sizes = np.sqrt([*shares, 1 - sum(shares)])
        of_heads = [draw.standard_normal((size, HEADS)) for size in (topics, wrappers, n_prompts)]
        heads = sizes[0] * of_heads[0][topic] + sizes[1] * of_heads[1][wrapper] + sizes[2] * of_heads[2]
        before, after = sizes[0] * both[0][:, topic] + sizes[1] * both[1][:, wrapper] + sizes[2] * both[2]
        yield Sample(before, after, heads, Clusters.of(labels))


def estimates(sample: Sample) -> Iterator[Estimate]:
    """Yields the intervals of several numbers of a sample."""
    bad = sample.before < stats.norm.ppf(BEFORE)
    still = sample.after < stats.norm.ppf(AFTER)
    n = len(bad)
    yield Estimate("rate", BEFORE, clustered_rate(bad, sample.clusters)[2:], wilson(int(bad.sum()), n))
    both = (sample.clusters, Clusters.alone(n))
    yield Estimate("mean", 0.0, *(clustered_mean(sample.before, clusters)[1:] for clusters in both))
    ratios = [clustered_ratio(sample.after + 1, sample.before + 2, clusters)[1:] for clusters in both]
    yield Estimate("share of a gap", 0.5, *ratios)
    yield Estimate(f"all of {HEADS} means", 0.0, *(simultaneous_mean(sample.heads, clusters)[1:] for clusters in both))
    gained = (bad & ~still).astype(float)
    lost = (still & ~bad).astype(float)
    yield Estimate(
        "difference of paired rates",
        BEFORE - AFTER,
        *(paired_difference(gained, lost, clusters) for clusters in both),
    )

    def ratio(chosen: np.ndarray) -> list[float]:
        return [still[chosen].mean() / bad[chosen].mean()]

    yield Estimate("ratio of rates", AFTER / BEFORE, *(clustered_statistic(ratio, n, clusters)[0] for clusters in both))


def main(n_samples: int) -> None:
    """Measures every number at every design and share, and writes the table."""
    settings = [*product(DESIGNS.items(), SHARES)]
    rows = []
    for (name, design), shares in progress_bar(settings, desc="designs", total=len(settings), shown=True):
        held: dict[str, list[tuple[bool, bool]]] = {}
        for sample in samples(design, shares, n_samples):
            for estimate in estimates(sample):
                held.setdefault(estimate.number, []).append(estimate.held)
        for what, found in held.items():
            clustered, independent = np.mean(found, axis=0)
            rows.append(
                {
                    "number": what,
                    "topics": design[0],
                    "wrappers": design[1],
                    "prompts": design[2],
                    "as in": name,
                    "topic share": shares[0],
                    "wrapper share": shares[1],
                    "coverage": f"{clustered:.3f}",
                    "as if independent": f"{independent:.3f}",
                }
            )
    pd.DataFrame(rows).sort_values("number", kind="stable").to_csv(HERE / "coverage.csv", index=False)


if __name__ == "__main__":
    main(SAMPLES // 10 if "--quick" in sys.argv else SAMPLES)
