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

from ctlens.core.clusters import Clusters, clustered_mean, clustered_rate, clustered_statistic, paired_difference
from ctlens.core.progress import progress_bar
from ctlens.core.stats import Interval, bootstrap_mean, wilson

HERE = Path(__file__).parent
DESIGNS = {"sycophancy": (15, 8, 96), "jailbreak": (6, 8, 96), "conditional": (5, 8, 96), "facts": (56, 8, 96)}
"""Topics, wrapper texts and prompts of the held-out split of some threats."""
SHARES = ((0.0, 0.0), (0.1, 0.1), (0.3, 0.3))
"""Shares of the variance between topics and between wrapper texts."""
BEFORE = 0.7
AFTER = 0.3
"""The rates of bad answers of two models, whose answers to a prompt are correlated by .7."""
_ALIKE = 0.7
SAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """The answers of two models to the prompts of one draw: what is compared with the threshold, lower is worse."""

    before: np.ndarray
    after: np.ndarray
    clusters: Clusters


class Estimate(NamedTuple):
    """The intervals of one number of a sample: ours, and the one that takes prompts as independent."""

    number: str
    truth: float
    clustered: Interval
    independent: Interval

    @property
    def held(self) -> tuple[bool, bool]:
        """Whether each interval holds the truth."""
        ends = (self.clustered, self.independent)
        return (ends[0][0] <= self.truth <= ends[0][1], ends[1][0] <= self.truth <= ends[1][1])


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
        before, after = sizes[0] * both[0][:, topic] + sizes[1] * both[1][:, wrapper] + sizes[2] * both[2]
        yield Sample(before, after, Clusters.of(labels))


def estimates(sample: Sample) -> Iterator[Estimate]:
    """Yields the intervals of several numbers of a sample."""
    bad = sample.before < stats.norm.ppf(BEFORE)
    still = sample.after < stats.norm.ppf(AFTER)
    n = len(bad)
    alone = Clusters.of({"item": [str(item) for item in range(n)]})
    yield Estimate("rate", BEFORE, clustered_rate(bad, sample.clusters)[2:], wilson(int(bad.sum()), n))
    _, low, high = clustered_mean(sample.before, sample.clusters)
    _, lower, higher = bootstrap_mean(sample.before)
    yield Estimate("mean", 0.0, (float(low), float(high)), (float(lower), float(higher)))
    gained = (bad & ~still).astype(float)
    lost = (still & ~bad).astype(float)
    ends = [paired_difference(gained, lost, clusters) for clusters in (sample.clusters, alone)]
    yield Estimate("difference of paired rates", BEFORE - AFTER, ends[0], ends[1])

    def ratio(chosen: np.ndarray) -> list[float]:
        return [still[chosen].mean() / bad[chosen].mean()]

    ends = [clustered_statistic(ratio, clusters)[0] for clusters in (sample.clusters, alone)]
    yield Estimate("ratio of rates", AFTER / BEFORE, ends[0], ends[1])


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
