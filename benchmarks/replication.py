"""How often does the interval of a number over several models hold the truth, and a claim hold by chance?

Run `python benchmarks/replication.py`; `--quick` takes a tenth of the samples. A number is a mean over prompts, as a
cosine or a share of a gap is. Every sample draws topics, wrapper texts and prompts, which all models are asked, and
models with seeds of training; what a topic or a wrapper does in two models is correlated. The spreads over models and
seeds are on the scale of the number, whose prompts have a standard deviation of `PROMPT_SPREAD`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from ctlens.core.clusters import Clusters, clustered_mean
from ctlens.core.progress import progress_bar
from ctlens.core.stats import LEVEL
from ctlens.study.claims.estimates import spanned
from ctlens.study.replication import pooled_over_models

HERE = Path(__file__).parent
DESIGN = (15, 8, 96)
"""Topics, wrapper texts and prompts, as sycophancy has them held out."""
SHARES = ((0.0, 0.0), (0.1, 0.1), (0.3, 0.3))
"""Shares of the variance over prompts that topics and wrapper texts have."""
SPREADS = ((0.0, 0.0), (0.02, 0.02), (0.05, 0.05))
"""Standard deviations between models, and between seeds of one."""
MODELS = (3, 5, 10)
SEEDS = 3
PROMPT_SPREAD = 0.2
_ALIKE = 0.7
"""How alike what a topic, a wrapper or a prompt does is in two models, as a correlation."""
SAMPLES = 1000


def samples(shares: tuple[float, float], spreads: tuple[float, float], n_models: int, n: int) -> Iterator[np.ndarray]:
    """Yields the value and the ends of both intervals of every model, over prompts and over all; the truth is 0."""
    draw = np.random.default_rng(0)
    topics, wrappers, n_prompts = DESIGN
    cells = np.array([*product(range(topics), range(wrappers))])
    sizes = PROMPT_SPREAD * np.sqrt([*shares, 1 - sum(shares)])
    for _ in range(n):
        topic, wrapper = cells[draw.permutation(len(cells))[:n_prompts]].T
        clusters = Clusters.of({"topic": topic.astype(str).tolist(), "wrapper": wrapper.astype(str).tolist()})
        shared = [draw.standard_normal(count) for count in (topics, wrappers, n_prompts)]
        found = []
        for _ in range(n_models):
            own = [_ALIKE**0.5 * part + (1 - _ALIKE) ** 0.5 * draw.standard_normal(len(part)) for part in shared]
            prompts = sizes[0] * own[0][topic] + sizes[1] * own[1][wrapper] + sizes[2] * own[2]
            moved = spreads[0] * draw.standard_normal() + spreads[1] * draw.standard_normal(SEEDS)
            value, low, high = clustered_mean(prompts + moved.mean(), clusters)
            by_seed = dict(enumerate(prompts.mean() + moved))
            of_model = spanned(float(value), (float(low), float(high)), n_prompts, by_seed, LEVEL)
            found.append((of_model.value, of_model.prompts_low, of_model.prompts_high, of_model.low, of_model.high))
        yield np.array(found)


def main(n_samples: int) -> None:
    """Measures every setting, and writes the table."""
    settings = [*product(SHARES, SPREADS, MODELS)]
    rows = []
    for shares, spreads, n_models in progress_bar(settings, desc="settings", total=len(settings), shown=True):
        pooled = []
        alone = []
        for found in samples(shares, spreads, n_models, n_samples):
            value, low, high, *_ = found.T
            over = pooled_over_models(value, low, high)
            pooled.append((over.low <= 0 <= over.high, over.low > 0, over.low > -0.1))
            *_, own_low, own_high = found[0]
            alone.append((own_low <= 0 <= own_high, own_low > 0))
        covered, by_chance, found_out = np.mean(pooled, axis=0)
        alone_covered, alone_by_chance = np.mean(alone, axis=0)
        rows.append(
            {
                "models": n_models,
                "spread over models": spreads[0],
                "spread over seeds": spreads[1],
                "topic share": shares[0],
                "wrapper share": shares[1],
                "coverage": f"{covered:.3f}",
                "holds by chance": f"{by_chance:.3f}",
                "power at .1": f"{found_out:.3f}",
                "coverage of one model's": f"{alone_covered:.3f}",
                "one model holds by chance": f"{alone_by_chance:.3f}",
            }
        )
    pd.DataFrame(rows).sort_values("models", kind="stable").to_csv(HERE / "replication.csv", index=False)


if __name__ == "__main__":
    main(SAMPLES // 10 if "--quick" in sys.argv else SAMPLES)
