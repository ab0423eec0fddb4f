"""Intervals of items that go together: plain restatements, invariances, and what has no interval."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from ctlens.core.clusters import (
    Clusters,
    clustered_mean,
    clustered_rate,
    clustered_ratio,
    clustered_statistic,
    effective_size,
    paired_difference,
    pigeonhole,
    simultaneous_mean,
)
from ctlens.core.stats import wilson

GRID = list(product("abcdef", "uvwxy"))
TOPICS = [topic for topic, _ in GRID]
WRAPPERS = [wrapper for _, wrapper in GRID]


def grid() -> Clusters:
    return Clusters.of({"topic": TOPICS, "wrapper": WRAPPERS})


def independent(n: int) -> Clusters:
    return Clusters.of({"item": [str(number) for number in range(n)]})


def planted(seed: int = 0) -> np.ndarray:
    """Values with a part of their topic, one of their wrapper and one of their own."""
    draw = np.random.default_rng(seed)
    topic = dict(zip("abcdef", draw.standard_normal(6), strict=True))
    wrapper = dict(zip("uvwxy", draw.standard_normal(5), strict=True))
    return np.array([topic[t] + wrapper[w] for t, w in GRID]) + draw.standard_normal(len(GRID))


def by_sums(values: np.ndarray) -> tuple[float, float]:
    """Variance of the mean and its degrees of freedom, written out for two kinds of clusters."""
    off = values - values.mean()
    n = len(values)
    parts = []
    for key in (lambda t, w: t, lambda t, w: w, lambda t, w: (t, w)):
        keys = [key(t, w) for t, w in GRID]
        sums = [sum(o for o, k in zip(off, keys, strict=True) if k == one) / n for one in dict.fromkeys(keys)]
        parts.append((len(sums) / (len(sums) - 1) * sum(s**2 for s in sums), len(sums) - 1))
    (a, df_a), (b, df_b), (c, df_c) = parts
    variance = a + b - c
    return variance, variance**2 / (a**2 / df_a + b**2 / df_b + c**2 / df_c)


def test_the_spread_of_a_mean_is_that_of_its_clusters() -> None:
    values = planted()
    variance, freedom = by_sums(values)
    reach = stats.t.ppf(0.975, freedom) * variance**0.5

    mean, low, high = clustered_mean(values, grid())

    assert variance > values.var(ddof=1) / len(values)  # what is planted shows
    assert (mean, low, high) == pytest.approx((values.mean(), values.mean() - reach, values.mean() + reach))


def test_clusters_that_add_nothing_leave_the_interval_of_independent_items() -> None:
    off = np.array([1.0, -1.0] * 15)  # balanced over topics and wrappers: their sums vary less than by chance
    mean, low, high = clustered_mean(off, grid())
    reach = stats.t.ppf(0.975, 29) * off.std(ddof=1) / 30**0.5

    assert by_sums(off)[0] < off.var(ddof=1) / 30
    assert (low, high) == pytest.approx((mean - reach, mean + reach))
    assert clustered_rate(off > 0, grid())[2:] == pytest.approx(wilson(15, 30))


@given(st.permutations(range(len(GRID))))
def test_the_order_of_the_items_and_the_names_of_the_clusters_change_nothing(order: list[int]) -> None:
    values = planted()
    renamed = Clusters.of({"topic": [f"of {TOPICS[i]}" for i in order], "wrapper": [WRAPPERS[i] * 2 for i in order]})

    assert clustered_mean(values[order], renamed) == pytest.approx(clustered_mean(values, grid()))
    flags = values > 0.5
    assert clustered_rate(flags[order], renamed)[2:] == pytest.approx(clustered_rate(flags, grid())[2:])


def test_asking_every_prompt_twice_makes_no_interval_narrower() -> None:
    values = planted()
    twice = Clusters.of({"topic": TOPICS * 2, "wrapper": WRAPPERS * 2})

    assert clustered_mean(np.tile(values, 2), twice) == pytest.approx(clustered_mean(values, grid()))


@pytest.mark.parametrize("n_topics", [5, 20])
def test_prompts_of_one_topic_that_all_answer_alike_count_once(n_topics: int) -> None:
    flags = np.repeat(np.arange(n_topics) % 2 == 0, 10)
    topics = Clusters.of({"topic": np.repeat(np.arange(n_topics), 10).astype(str).tolist()})
    share = n_topics / 2 if n_topics % 2 == 0 else (n_topics + 1) / 2
    wider = (stats.t.ppf(0.975, n_topics - 1) / stats.norm.ppf(0.975)) ** 2

    # n topics of equal answers: the variance of the mean of n flags, over the n - 1 that estimate it
    expected = n_topics * (n_topics - 1) / n_topics / wider * (10 * n_topics) / (10 * n_topics - 1)

    assert effective_size(flags - flags.mean(), topics, len(flags)) == pytest.approx(expected)
    _, _, low, high = clustered_rate(flags, topics)
    assert low < share / n_topics < high and high - low > wilson(5, 10)[1] - wilson(5, 10)[0] - 0.35


def test_a_statistic_of_means_has_the_interval_of_its_linear_part() -> None:
    values = np.stack([planted(0) + 10, planted(1) + 20], axis=1)

    def ratio(chosen: np.ndarray) -> list[float]:
        one, two = values[chosen].mean(0)
        return [one / two, one]

    (low, high), of_mean = clustered_statistic(ratio, 30, grid())
    one, two = values.mean(0)
    _, by_delta, _ = clustered_mean((values[:, 0] - one / two * values[:, 1]) / two, grid())

    assert (high - low) / 2 == pytest.approx(-float(by_delta), rel=0.02)
    assert of_mean == pytest.approx(clustered_mean(values[:, 0], grid())[1:])


def test_a_ratio_of_means_has_the_interval_of_the_jackknife() -> None:
    above = np.stack([planted(0) + 10, planted(2) + 5], axis=1)
    below = planted(1) + 20

    ratio, low, high = clustered_ratio(above, below[:, None], grid())
    ends = clustered_statistic(lambda chosen: (above[chosen].mean(0) / below[chosen].mean()).tolist(), 30, grid())

    assert ratio == pytest.approx(above.mean(0) / below.mean())
    assert np.stack([low, high], 1) == pytest.approx(np.array(ends), rel=0.01)
    assert np.isnan(clustered_ratio(above[:, 0], np.tile([1.0, -1.0], 15))).all()


def test_intervals_for_all_at_once_are_each_that_of_a_level_shared_by_all() -> None:
    values = np.random.default_rng(1).normal(size=(30, 4, 5))

    mean, low, high = simultaneous_mean(values, grid())

    off = values[:, 2, 3] - values[:, 2, 3].mean()
    reach = stats.t.ppf(1 - 0.025 / 20, 5 - 1) * grid().spread(off).variance ** 0.5  # five wrappers
    assert (low[2, 3], high[2, 3]) == pytest.approx((mean[2, 3] - reach, mean[2, 3] + reach)) and mean.shape == (4, 5)
    assert simultaneous_mean(values[:, 0, 0]) == pytest.approx(clustered_mean(values[:, 0, 0]))
    few = Clusters.of({"topic": ["a"] * 10 + ["b"] * 20})
    assert np.isnan(simultaneous_mean(values, few)[1:]).all() and np.isnan(simultaneous_mean(values[:1])[1:]).all()


def test_hardly_any_of_many_means_is_told_apart_where_none_differs() -> None:
    """Ten of 200 families of 40 means may hold a wrong one; taken alone, nearly every family holds some."""
    draw = np.random.default_rng(0)
    wrong = 0
    alone = 0
    for _ in range(200):
        topics = draw.normal(size=(6, 40))
        wrappers = draw.normal(size=(5, 40))
        values = np.repeat(topics, 5, axis=0) + np.tile(wrappers, (6, 1)) + draw.normal(size=(30, 40))
        _, low, high = simultaneous_mean(values, grid())
        wrong += ((low > 0) | (high < 0)).any()
        _, low, high = clustered_mean(values)
        alone += ((low > 0) | (high < 0)).any()

    assert wrong <= 10 and alone > 190


def test_a_pigeonhole_draw_counts_an_item_as_often_as_all_its_groups_are_drawn() -> None:
    topics = np.array([0, 0, 1, 1, 2])
    wrappers = np.array([0, 1, 0, 1, -1])

    counts = pigeonhole([topics, wrappers])
    only = pigeonhole([topics])

    assert (only[:, 0] == only[:, 1]).all() and (only[:, [0, 2, 4]].sum(1) == 3).all()
    assert (counts[:, 0] * counts[:, 3] == counts[:, 1] * counts[:, 2]).all()
    assert counts[:, 4].max() == 3 and (pigeonhole([topics, wrappers]) == counts).all()


def test_a_resample_draws_whole_topics_and_one_without_any_item_is_left_out() -> None:
    topics = Clusters.of({"topic": ["a", "a", "b", "b", "c"]})

    counts = topics.resamples()

    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, [0, 2, 4]].sum(1) == 3).all()
    assert (Clusters.alone(4).resamples().sum(1) == 4).all()
    apart = Clusters(("topic", "wrapper"), np.array([[0, 1], [0, 1]]))  # drawn apart, no item is in both
    assert 0 < len(apart.resamples()) < 999 and apart.resamples().any(-1).all()


def tango_by_likelihood(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Tango's interval from its definition: the score of a difference at the likeliest shares that have it."""

    def score(difference: float) -> float:
        def unlikely(share: float) -> float:  # of the lost ones; the gained ones are the difference more
            rest = 1 - 2 * share - difference
            return -(gained * np.log(share + difference) + lost * np.log(share) + (n - gained - lost) * np.log(rest))

        bounds = (max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
        share = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - n * difference) / (n * (2 * share + difference - difference**2)) ** 0.5

    z = stats.norm.ppf(0.975)
    found = (gained - lost) / n
    return (
        optimize.brentq(lambda d: score(d) - z, -0.999, found),
        optimize.brentq(lambda d: score(d) + z, found, 0.999),
    )


@pytest.mark.parametrize(("gained", "lost", "n"), [(9, 1, 50), (16, 4, 50), (3, 3, 30), (1, 12, 40)])
def test_a_paired_difference_is_tangos_of_independent_items(gained: int, lost: int, n: int) -> None:
    numbers = np.arange(n)
    found = paired_difference(
        (numbers < gained).astype(float),
        ((numbers >= gained) & (numbers < gained + lost)).astype(float),
        independent(n),
    )

    assert found == pytest.approx(tango_by_likelihood(gained, lost, n), abs=1e-4)


def test_equal_answers_differ_by_nothing_up_to_an_interval() -> None:
    z = stats.norm.ppf(0.975) ** 2

    assert paired_difference(np.zeros(96), np.zeros(96), independent(96)) == pytest.approx(
        (-z / (96 + z), z / (96 + z))
    )


def test_a_difference_of_one_topic_is_wider_than_one_that_is_spread() -> None:
    here = np.array([topic == "a" for topic in TOPICS]).astype(float)
    spread = np.zeros(30)
    spread[[0, 6, 12, 18, 24]] = 1

    together = paired_difference(here, np.zeros(30), grid())
    apart = paired_difference(spread, np.zeros(30), grid())

    assert together[0] < apart[0] and together[1] > apart[1]
    assert together[0] < 0 < apart[0]  # five prompts of one topic show nothing of other topics


def test_too_few_clusters_of_a_kind_give_no_interval() -> None:
    few = Clusters.of({"topic": TOPICS, "wrapper": ["p" if number < 15 else "q" for number in range(30)]})
    values = planted()

    assert few.too_few == "2 wrappers"
    assert grid().too_few == ""
    assert np.isnan(clustered_mean(values, few)[1:]).all()
    assert np.isnan(clustered_rate(values > 0, few)[2:]).all()
    assert np.isnan(paired_difference(values > 0, values < -1, few)).all()
    assert np.isnan(clustered_statistic(lambda chosen: [values[chosen].mean()], 30, few)).all()


def test_a_statistic_that_rests_on_one_item_has_no_interval() -> None:
    def of_the_fifth(chosen: np.ndarray) -> list[float]:
        return [1.0 if 4 in chosen else float("nan")]

    assert np.isnan(clustered_statistic(of_the_fifth, 30, grid())).all()


def test_a_kind_that_groups_nothing_or_everything_is_left_out() -> None:
    alone = Clusters.of({"topic": ["a", "b", "c"], "wrapper": ["", "", ""]})

    assert alone.kinds == () and len(alone) == 3 and alone.too_few == ""
    assert clustered_rate(np.array([True, False, False]), alone)[2:] == pytest.approx(wilson(1, 3))


def test_one_item_has_an_interval_of_a_share_and_none_of_a_mean() -> None:
    one = Clusters.of({"topic": ["a"]})

    assert clustered_rate(np.array([True]), one)[2:] == pytest.approx(wilson(1, 1))
    assert np.isnan(clustered_mean(np.array([2.0]), one)[1:]).all()
