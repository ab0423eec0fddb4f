"""Probes on planted states: what was put in is read, at its positions only, and groups and chance keep them honest."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from helpers.models import byte_level_tokenizer, hf_model
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from ctlens import load_organism, threats
from ctlens.analysis import Probe, States, Task, answer_hinted, labelled, probe, will_misbehave, wrapper_present
from ctlens.analysis.base.recording import read
from ctlens.analysis.base.states import states
from ctlens.analysis.probing.classifiers import ESTIMATORS, MassMean, group_splits, make_probe, weights
from ctlens.analysis.probing.scores import balanced, curves, interval, surely_above
from ctlens.analysis.probing.tasks import NO_GROUP
from ctlens.core.errors import CtlensError
from ctlens.data.chat import Turn, render
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.loading import load_model
from ctlens.plots.theme import METHOD_STYLES

N = 120
D = 12
LAYERS = 3
PLANTED = 1
GROUPS = tuple(f"g{number % 20}" for number in range(N))
LABELS = tuple("yes" if number // 20 % 2 else "no" for number in range(N))
TASK = Task("what was planted", LABELS, {"item": GROUPS})
SIGNS = np.array([1.0 if label == "yes" else -1.0 for label in LABELS])


def noise(seed: int = 0, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((LAYERS, n, D))


def held(values: np.ndarray, **changes: object) -> States:
    return (
        States(values, tuple(range(len(values))), "resid_post", "wrapped", "last")
        if not changes
        else replace(held(values), **changes)
    )


def planted(seed: int = 0, strength: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with the label written along one direction at one layer, and that direction."""
    direction = np.random.default_rng(99).standard_normal(D)
    direction /= np.linalg.norm(direction)
    values = noise(seed)
    values[PLANTED] += strength * SIGNS[:, None] * direction
    return values, direction


def own(found: Probe, name: str = "base", estimator: str | None = None) -> np.ndarray:
    return found.curve(name, name, "last", estimator or found.estimators[0])[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_planted_direction_is_read_at_its_layer_only_and_not_once_projected_out(estimator: str) -> None:
    values, direction = planted()
    erased = values - (values @ direction)[..., None] * direction

    found = probe({"base": held(values), "erased": held(erased)}, TASK, estimators=[estimator], progress=False)

    assert own(found)[PLANTED] > 0.97
    for scores in (np.delete(own(found), PLANTED), own(found, "erased")):
        assert (abs(scores - 0.5) < 0.15).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_shuffled_labels_and_random_vectors_are_at_chance_where_the_labels_are_read(estimator: str) -> None:
    found = probe({"base": held(planted()[0])}, TASK, estimators=[estimator], progress=False)

    assert own(found)[PLANTED] > 0.97 and found.chance == 0.5
    assert abs(found.shuffled[0, 0, 0, PLANTED] - 0.5) < 0.15
    assert abs(found.random_features[0] - 0.5) < 0.15


@pytest.mark.parametrize("factor", ["item", "wrapper"])
def test_a_label_that_only_the_group_tells_is_at_chance(factor: str) -> None:
    draw = np.random.default_rng(3)
    numbers = np.arange(N) % 20
    marks = 5 * draw.standard_normal((20, D))
    of_group = draw.permutation(np.repeat(["no", "yes"], 10))
    values = noise() + marks[numbers]
    other = tuple(f"w{number % 7}" for number in range(N))
    task = Task("the group", tuple(of_group[numbers].tolist()), {"item": GROUPS, "wrapper": other})
    if factor == "wrapper":
        task = replace(task, groups={"item": other, "wrapper": GROUPS})
    leaky = replace(task, groups={"item": tuple(map(str, range(N)))})

    honest = probe({"base": held(values)}, task, seeds=1, progress=False)
    leaking = probe({"base": held(values)}, leaky, seeds=1, progress=False)

    assert own(leaking).min() > 0.75  # the states do tell the group
    assert own(honest).max() < 0.65


def test_no_group_of_any_factor_is_on_both_sides_and_every_prompt_is_tried() -> None:
    wrappers = tuple(NO_GROUP if number % 3 == 0 else f"w{number % 8}" for number in range(N))
    task = replace(TASK, groups={"item": GROUPS, "wrapper": wrappers})

    splits = group_splits(task, 3, seed=1)

    for groups in task.groups.values():
        for train, test in splits:
            assert not ({groups[row] for row in train} & {groups[row] for row in test}) - {NO_GROUP}
    assert all(not set(train) & set(test) for train, test in splits)
    tried = np.bincount(np.concatenate([test for _, test in splits]), minlength=N)
    assert all(tried == [3 if wrapper == NO_GROUP else 1 for wrapper in wrappers])


def test_mass_mean_is_the_difference_of_means_with_the_threshold_midway() -> None:
    low = np.array([[0.0, 0.0], [2.0, 0.0]])
    high = np.array([[4.0, 2.0], [6.0, 2.0], [5.0, 5.0]])
    fitted = MassMean().fit(np.concatenate([low, high]), np.array(["a", "a", "b", "b", "b"]))

    # Means (1, 0) and (5, 3): direction (4, 3), midpoint (3, 1.5), so b where 4x + 3y > 16.5.
    np.testing.assert_allclose(fitted.means_, [[1, 0], [5, 3]])
    assert fitted.predict(np.array([[3.0, 1.4], [3.0, 1.6], [4.2, 0.0], [4.0, 0.0]])).tolist() == ["a", "b", "b", "a"]
    values = fitted.decision_function(np.array([[3.0, 2.5]]))
    assert (values[:, 1] - values[:, 0]).item() == pytest.approx(4 * 3 + 3 * 2.5 - 16.5)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("ridge", RidgeClassifier(alpha=100.0, class_weight="balanced")),
        ("logistic", LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)),
    ],
)
def test_scores_match_scikit_learn_called_plainly(name: str, plain: RidgeClassifier | LogisticRegression) -> None:
    values = planted(strength=0.7)[0]
    order = np.lexsort((LABELS, GROUPS))
    x = values[PLANTED][order]
    y = np.array(LABELS)[order]
    groups = np.array(GROUPS)[order]
    right = np.zeros(N)
    for train, test in StratifiedGroupKFold(4, shuffle=True, random_state=0).split(x, y, groups):
        mean = x[train].mean(0)
        deviation = x[train].std(0)
        plain.fit((x[train] - mean) / deviation, y[train])
        right[test] = plain.predict((x[test] - mean) / deviation) == y[test]
    expected = (right[y == "yes"].mean() + right[y == "no"].mean()) / 2

    found = probe({"base": held(values)}, TASK, estimators=[name], folds=4, seeds=1, progress=False)

    assert own(found)[PLANTED] == pytest.approx(expected) and 0.6 < expected < 0.95
    assert (found.n_train, found.n_test, found.balance) == (90, 120, {"no": 60, "yes": 60})


@pytest.mark.parametrize("n", [90, 15])  # with 15 prompts of 24 inputs, the dual problem is the smaller one
@pytest.mark.parametrize("classes", [2, 5])
def test_the_ridge_is_that_of_scikit_learn_to_the_last_bit(n: int, classes: int) -> None:
    draw = np.random.default_rng(n + classes)
    x = (5 + draw.standard_normal((n, 24)) * draw.uniform(0.1, 30, 24)).astype(np.float32)
    x[:, 7] = 0.3  # an input that never changes, which must not be divided by its deviation
    y = np.array(list("abcde"))[np.minimum(np.arange(n) % 8, classes - 1)]
    other = (5 + 9 * draw.standard_normal((50, 24))).astype(np.float32)

    scaler, plain = make_pipeline(StandardScaler(), RidgeClassifier(100.0, class_weight="balanced")).fit(x, y)
    found = make_probe("ridge").fit(x, y)

    np.testing.assert_array_equal(found.scale, scaler.scale_)
    np.testing.assert_array_equal(found.estimator.coef_.squeeze(), plain.coef_.squeeze())
    np.testing.assert_array_equal(found.estimator.intercept_.squeeze(), plain.intercept_)
    np.testing.assert_array_equal(found.predict(other), plain.predict(scaler.transform(other)))
    assert found.estimator.coef_.dtype == np.float32 and len(set(found.predict(other))) > 1


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_that_is_not_linear_is_the_kernel_ridge_of_scikit_learn(classes: int) -> None:
    draw = np.random.default_rng(classes)
    x = 5 + draw.standard_normal((80, 24)) * draw.uniform(0.1, 30, 24)
    other = x[::-1][:50] + draw.standard_normal((50, 24))
    y = np.array(list("abcd"))[np.minimum(np.arange(80) % 7, classes - 1)]
    wanted = np.where(y[:, None] == np.unique(y), 1, -1)

    scale = x.std(0)
    scale = np.sqrt((scale**2).mean())
    plain = KernelRidge(alpha=0.1, kernel="rbf", gamma=1 / 24)
    plain.fit((x - x.mean(0)) / scale, wanted, sample_weight=compute_sample_weight("balanced", y))
    found = make_probe("rbf").fit(x, y)

    np.testing.assert_allclose(found.estimator.dual_coef_, plain.dual_coef_, rtol=1e-6, atol=1e-9)
    told = np.unique(y)[plain.predict((other - x.mean(0)) / scale).argmax(1)]
    np.testing.assert_array_equal(found.predict(other), told)
    assert len(set(told)) == classes


def test_a_parity_is_read_by_the_probe_that_is_not_linear_alone() -> None:
    values = noise()
    first = np.random.default_rng(8).choice([-4.0, 4.0], N)
    values[PLANTED, :, 0] += first
    values[PLANTED, :, 1] += first * SIGNS

    found = probe({"base": held(values)}, TASK, estimators=["ridge", "rbf"], seeds=1, progress=False)

    assert own(found, estimator="rbf")[PLANTED] > 0.95 and abs(own(found, estimator="ridge")[PLANTED] - 0.5) < 0.15
    assert found.figure(estimator="rbf").layout.meta["title"].startswith("Can a probe read")
    with pytest.raises(CtlensError, match="not linear .* reads along no direction: choose 'ridge'"):
        weights("rbf", values[PLANTED], SIGNS > 0)


def test_the_order_of_the_prompts_changes_nothing() -> None:
    values = planted(strength=0.7)[0]
    order = np.random.default_rng(1).permutation(N)
    turned = Task(TASK.question, tuple(np.array(LABELS)[order]), {"item": tuple(np.array(GROUPS)[order])})

    here = probe({"base": held(values)}, TASK, estimators=list(ESTIMATORS), seeds=1, progress=False)
    there = probe({"base": held(values[:, order])}, turned, estimators=list(ESTIMATORS), seeds=1, progress=False)

    np.testing.assert_allclose(here.score, there.score)
    np.testing.assert_allclose(here.ci_low, there.ci_low)


def test_a_turned_representation_is_lost_to_the_bases_probe_and_not_to_its_own() -> None:
    values = planted(strength=4.0)[0]
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((D, D)))[0]

    models = {"base": held(values), "act": held(values), "bct": held(values @ rotation)}
    found = probe(models, TASK, seeds=1, progress=False)

    assert own(found, "bct")[PLANTED] > 0.97 and own(found, "act")[PLANTED] > 0.97
    assert found.curve("base", "act", "last", "ridge")[0][PLANTED] > 0.97
    assert found.curve("base", "bct", "last", "ridge")[0][PLANTED] < 0.9
    assert found.curve("bct", "base", "last", "ridge")[0][PLANTED] < 0.9
    assert ("act", "bct") not in set(zip(found.fitted_on, found.read_on, strict=True))


def test_without_a_base_every_model_has_its_own_probe_alone() -> None:
    found = probe({"act": held(noise()), "bct": held(noise(1))}, TASK, seeds=1, progress=False)

    assert found.fitted_on == found.read_on == ("act", "bct")
    assert {trace.name for trace in found.figure().data if trace.mode == "lines+markers"} == {"ACT", "BCT"}


def test_a_score_is_the_mean_over_classes_among_prompts_alike_in_what_is_known() -> None:
    task = Task("?", ("a", "a", "a", "b", "c", "d", "a"), {"item": tuple("1234567")}, tuple("xxxxyyz"))
    right = np.array([[1, 1, 0, 1, 0, 1, 0.0]])

    # x: a 2/3, b 1; y: c 0, d 1; z leaves only a, which it gives away.
    assert balanced(right, task).item() == pytest.approx(((2 / 3 + 1) / 2 + 1 / 2) / 2)
    assert task.chance() == 0.5 and task.contested() == {"x": ["a", "b"], "y": ["c", "d"]}
    doubled = np.array([[1, 0, 2, 1, 1, 1, 9.0]])
    assert balanced(right, task, doubled).item() == pytest.approx(((1 / 3 + 1) / 2 + 1 / 2) / 2)


def test_the_interval_counts_groups_and_not_prompts() -> None:
    right = np.tile(np.repeat([1.0, 0.0], [4, 2]), 40)[None]  # two of six groups are always wrong
    labels = ("a", "b") * 120
    few = Task("?", labels, {"item": tuple(f"g{number % 6}" for number in range(240))})
    many = replace(few, groups={"item": tuple(map(str, range(240)))})

    (score, low, high) = interval(right, few)
    (same, low_many, high_many) = interval(right, many)

    assert score == same == pytest.approx(2 / 3)
    assert low < low_many < 2 / 3 < high_many < high
    assert (high - low)[0] > 3 * (high_many - low_many)[0]  # sqrt(240 / 6) is 6.3


def chances(right: float, layers: int, seed: int, prompts: int = 240) -> np.ndarray:
    """Random hits, `[positions, estimator, layer, reading, prompt]`."""
    return (np.random.default_rng(seed).random((1, 1, layers, 1, prompts)) < right).astype(float)


IN_GROUPS = Task("?", ("a", "b") * 120, {"item": tuple(f"g{number // 2 % 30}" for number in range(240))})


def test_of_a_single_layer_nothing_is_picked_and_the_bound_is_that_of_the_difference() -> None:
    real = chances(0.8, 1, seed=1)
    never = np.zeros_like(real)

    score, low, high = np.ravel(curves(real, IN_GROUPS)).tolist()
    assert surely_above(real, never, IN_GROUPS).item() == pytest.approx(2 * score - high)  # the reach, taken off below
    assert 2 * score - high == pytest.approx(low, abs=0.02)
    assert surely_above(real, real, IN_GROUPS).item() == 0  # no more than shuffled labels, whatever is resampled


def test_the_best_of_many_layers_stands_out_by_chance_no_more_often_than_one() -> None:
    found = [
        float(surely_above(chances(0.5, 12, 2 * seed), chances(0.5, 12, 2 * seed + 1), IN_GROUPS).max() > 0)
        for seed in range(60)
    ]

    assert np.mean(found) <= 0.1  # 2.5 percent are meant, one or two of sixty
    strong = surely_above(chances(0.75, 12, 7), chances(0.5, 12, 8), IN_GROUPS)
    assert (strong > 0).all()


def test_the_peak_is_the_layer_most_above_shuffled_labels() -> None:
    values = noise()
    values[1] += 2 * SIGNS[:, None]
    found = probe({"base": held(values), "act": held(noise(3))}, TASK, seeds=1, progress=False)
    peaks = found.peak().query("positions == 'last'").set_index(["fitted_on", "read_on"])

    base = peaks.loc[("base", "base")]
    assert (base["layer"], base["stands_out"], base["layers_compared"]) == (1, True, LAYERS)
    assert base["selectivity_low"] == found.selectivity_low[0, 0, 0, 1] > 0
    assert not peaks.loc[("act", "act"), "stands_out"]


def test_the_range_over_seeds_is_that_of_single_deals_and_the_score_their_mean() -> None:
    values = {"base": held(planted(strength=0.7)[0])}
    options = {"estimators": ["ridge", "mass_mean"], "progress": False}

    found = probe(values, TASK, seeds=3, **options)
    first = probe(values, TASK, seeds=1, **options)

    x = values["base"].values
    y = np.array(LABELS)
    groups = np.array(GROUPS)
    for number, layer in product(range(2), range(LAYERS)):
        estimator = make_probe(("ridge", "mass_mean")[number])
        scores = []
        for seed in range(3):
            right = np.zeros(N)
            for train, test in group_splits(TASK, 3, seed):
                assert not set(groups[train]) & set(groups[test])
                right[test] = estimator.fit(x[layer][train], y[train]).predict(x[layer][test]) == y[test]
            scores.append((right[y == "yes"].mean() + right[y == "no"].mean()) / 2)
        at = (0, 0, number, layer)
        assert (found.seed_low[at], found.seed_high[at]) == pytest.approx((min(scores), max(scores)))
        assert found.score[at] == pytest.approx(np.mean(scores)) and first.score[at] == pytest.approx(scores[0])
    assert (found.seed_low < found.seed_high).any() and (first.seed_low == first.seed_high).all()
    apart = (found.seed_high - found.seed_low)[:, 0, 0].max()
    assert f"seeds differ by up to {apart:.2f}" in found.figure().layout.meta["subtitle"]
    assert "seeds" not in first.figure().layout.meta["subtitle"]


def test_what_is_known_does_not_count_as_read() -> None:
    known = tuple("xy"[number % 2] for number in range(N))
    labels = tuple(f"{side}{number // 2 % 4}" for number, side in enumerate(known))
    values = noise()
    values[:, :, 0] += [9.0 if side == "x" else -9.0 for side in known]
    groups = {"item": tuple(f"g{number // 8 % 15}" for number in range(N))}

    found = probe({"base": held(values)}, Task("?", labels, groups, known), progress=False)

    assert found.chance == 0.25
    assert abs(own(found) - 0.25).max() < 0.15 and abs(found.shuffled - 0.25).max() < 0.15


def test_a_task_at_ceiling_in_every_model_and_layer_is_called_uninformative() -> None:
    easy = noise() + 9 * SIGNS[None, :, None]
    hard = easy.copy()
    hard[0] = noise()[0]

    ceiling = probe({"base": held(easy), "act": held(easy)}, TASK, seeds=1, progress=False)
    not_ceiling = probe({"base": held(easy), "act": held(hard)}, TASK, seeds=1, progress=False)

    assert ceiling.to_dataframe()["uninformative"].all() and not not_ceiling.to_dataframe()["uninformative"].any()
    assert "uninformative" in ceiling.figure().layout.meta["subtitle"]
    assert "uninformative" not in not_ceiling.figure().layout.meta["subtitle"]


@pytest.fixture(scope="module")
def found() -> Probe:
    models = {"base": held(planted()[0]), "act": held(planted(seed=1)[0])}
    return probe(models, TASK, estimators=["ridge", "mass_mean"], seeds=1, progress=False)


def test_the_table_has_one_row_a_reading_and_survives_saving(found: Probe, tmp_path) -> None:
    table = found.to_dataframe()

    assert len(table) == 4 * 2 * LAYERS  # two own, one carried each way
    assert table["selectivity"].tolist() == (table["score"] - table["shuffled"]).tolist()
    row = table.query("fitted_on == 'base' and read_on == 'act' and estimator == 'mass_mean' and layer == 1").squeeze()
    assert (row["score"], row["ci_low"], row["ci_high"]) == tuple(
        end[1] for end in found.curve("base", "act", "last", "mass_mean")
    )
    assert row["random_features"] == found.random_features[1]
    assert (table["ci_low"] <= table["score"]).all() and (table["score"] <= table["ci_high"]).all()
    found.save(tmp_path / "probe.safetensors")
    assert Probe.load(tmp_path / "probe.safetensors").to_dataframe().equals(table)


def test_the_figure_draws_own_probes_solid_and_the_bases_dashed_in_the_models_colour(found: Probe) -> None:
    figure = found.figure(estimator="mass_mean")
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}

    assert set(lines) == {"base", "ACT", "ACT, fitted on the base"}
    assert [lines[name].line.dash for name in lines] == ["solid", "solid", "dash"]
    assert lines["ACT"].line.color == lines["ACT, fitted on the base"].line.color == METHOD_STYLES["act"].colour
    np.testing.assert_array_equal(lines["ACT"].y, found.curve("act", "act", "last", "mass_mean")[0])
    value, low, high = found.curve("base", "act", "last", "mass_mean")
    whiskers = lines["ACT, fitted on the base"].error_y
    np.testing.assert_allclose([whiskers.array, whiskers.arrayminus], [high - value, value - low])
    band = next(trace for trace in figure.data if trace.name == "shuffled labels")
    assert max(band.y) == found.shuffled_high[:2, 0, 1].max() and found.fitted_on[:2] == found.read_on[:2]
    assert figure.layout.shapes[0].y0 == 0.5
    assert "what was planted, at the last token" in figure.layout.meta["title"]


ORGANISM = load_organism()
PAIRS = threats.get("sycophancy").pairs(48, split="heldout")


@pytest.mark.parametrize("name", threats.names())
def test_neutral_prompts_have_the_tokens_and_the_places_of_the_attack_and_none_of_its_text(name: str) -> None:
    pairs = [pair for split in ("train", "structure") for pair in threats.get(name).pairs(24, split=split)]
    task = wrapper_present(pairs, ORGANISM.tokenizer)

    (positives, _), (clean, side), (neutral, _) = task.parts
    assert positives == clean == tuple(pairs) and side == "clean" and len(neutral) == len(pairs)
    for pair, harmless in zip(pairs, neutral, strict=True):
        there = render(ORGANISM.tokenizer, pair.wrapped.turns)
        here = render(ORGANISM.tokenizer, harmless.wrapped.turns)
        assert len(here.ids) == len(there.ids) and harmless.wrapped.turns != pair.wrapped.turns
        request = pair.clean.turns[-1].content
        at = [[turn.content.find(request) >= 0 for turn in item.wrapped.turns] for item in (pair, harmless)]
        assert at[0] == at[1] and harmless.clean == pair.clean


def test_a_probe_reads_all_its_positions_off_the_same_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    task = wrapper_present(PAIRS, ORGANISM.tokenizer)
    passes = []
    monkeypatch.setattr("ctlens.analysis.base.states.read", lambda *given: passes.append(given) or read(*given))

    both = probe({"base": ORGANISM}, task, seeds=1, layers=[1, 2], progress=False)
    read_together = len(passes)
    alone = [task.states(ORGANISM, positions=name, layers=[1, 2], progress=False) for name in ("last", "content")]

    assert read_together == len(task.parts) and len(passes) == 3 * read_together
    assert probe({"base": alone}, task, seeds=1).to_dataframe().equals(both.to_dataframe())


def test_presence_is_judged_against_neutral_prompts_of_equal_length_alone() -> None:
    task = wrapper_present(PAIRS, ORGANISM.tokenizer)

    lengths = np.array([len(render(ORGANISM.tokenizer, pair.wrapped.turns).ids) for pair in task.parts[0][0]])
    other = np.array([len(render(ORGANISM.tokenizer, pair.wrapped.turns).ids) for pair in task.parts[2][0]])
    clean = np.array([len(render(ORGANISM.tokenizer, pair.clean.turns).ids) for pair in PAIRS])
    only_length = np.concatenate([lengths, clean, other])[None, :, None].astype(float)
    found = probe({"base": held(only_length)}, task, progress=False)

    assert task.chance() == 0.5 and list(task.contested()) == ["request beside other text"]
    assert own(found).item() == pytest.approx(0.5, abs=0.05)
    assert (found.n_test, found.balance) == (96, {"none": 96, "wrapper": 48})


def test_own_negatives_take_the_place_of_the_neutral_prompts() -> None:
    negatives = [
        Pair(pair.clean, prompt(f"good morning . {pair.clean.turns[-1].content}"), labels={"wrapper": f"n{i % 4}"})
        for i, pair in enumerate(PAIRS[:20])
    ]
    task = wrapper_present(PAIRS, ORGANISM.tokenizer, negatives=negatives)

    assert task.parts[2][0] == tuple(negatives) and task.labels.count("none") == 48 + 20
    assert task.groups["wrapper"][-4:] == ("n0", "n1", "n2", "n3")


def test_tasks_take_labels_and_groups_from_the_pairs() -> None:
    task = answer_hinted(PAIRS)
    by_wrapper = labelled(PAIRS, "wrapper", side="clean")

    assert task.labels == tuple(pair.labels["hint"] for pair in PAIRS) and task.chance() == pytest.approx(1 / 8)
    assert task.groups["subject"] == tuple(pair.labels["entity"] for pair in PAIRS)
    assert task.groups["wrapper"] == tuple(pair.labels["wrapper"] for pair in PAIRS)
    assert list(by_wrapper.groups) == ["subject"] and by_wrapper.parts[0][1] == "clean"
    bare = [Pair(pair.clean, pair.wrapped) for pair in PAIRS]
    assert labelled(bare, ["x", "y"] * 24).groups["wrapper"][0] == PAIRS[0].wrapped.turns[0].content.replace(
        PAIRS[0].clean.turns[0].content, ""
    )


def test_will_misbehave_labels_the_models_own_answers() -> None:
    task = will_misbehave(ORGANISM, PAIRS, progress=False)
    verdicts = [reply.verdict for reply in threats.ask(ORGANISM, [pair.wrapped for pair in PAIRS])]

    assert [label == "bad" for label in task.labels] == [verdict == "bad" for verdict in verdicts]
    assert set(task.labels) == {"bad", "not bad"}


def test_a_model_and_its_states_give_the_same_scores() -> None:
    task = labelled(PAIRS, "relation")
    given = [
        task.states(ORGANISM, positions=positions, layers=[0, 2], progress=False) for positions in ("last", "content")
    ]

    from_states = probe({"base": given}, task, seeds=1, progress=False)
    from_model = probe({"base": ORGANISM}, task, layers=[0, 2], seeds=1, progress=False)

    assert from_model.to_dataframe().equals(from_states.to_dataframe())
    assert from_model.layers == (0, 2) and from_model.positions == ("last", "content")
    plain = states(ORGANISM, PAIRS, layers=[0, 2], progress=False)
    np.testing.assert_array_equal(given[0].values, plain.values)


def test_the_states_of_a_task_stand_in_the_order_of_its_labels() -> None:
    task = wrapper_present(PAIRS, ORGANISM.tokenizer)
    found = task.states(ORGANISM, layers="last", progress=False)

    np.testing.assert_array_equal(found.values[:, :48], states(ORGANISM, PAIRS, layers="last", progress=False).values)
    clean = states(ORGANISM, PAIRS, side="clean", layers="last", progress=False)
    np.testing.assert_array_equal(found.values[:, 48:96], clean.values)
    assert found.side == "both" and found.values.shape[1] == len(task.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("yes",) * N}, "labels of one class"),
        ({"groups": {"item": GROUPS[1:]}}, "120 labels, but 119 entries of 'item'"),
        ({"known": ("x",)}, "120 labels, but 1 entries of 'known'"),
        ({"known": LABELS}, "gives every label away"),
        ({"groups": {"item": (NO_GROUP, *GROUPS[1:])}}, "in no group"),
        ({"groups": {}}, "in no group"),
        ({"parts": ((tuple(PAIRS), "wrapped"),)}, f"labels, but {len(PAIRS)} prompts"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        replace(TASK, **changes)


def one_class_in_one_group() -> Task:
    return replace(TASK, labels=tuple("yes" if group == "g3" else "no" for group in GROUPS))


@pytest.mark.parametrize(
    ("models", "task", "options", "message"),
    [
        ({"base": held(noise())}, TASK, {"folds": 21}, "20 groups of 'item' do not fill 21 folds"),
        ({"base": held(noise())}, TASK, {"estimators": ["rigde"]}, "did you mean 'ridge'"),
        ({"base": held(noise())}, TASK, {"folds": 1}, "at least 2 folds"),
        ({"base": held(noise())}, one_class_in_one_group(), {}, "no prompt labelled 'yes'"),
        ({"base": held(noise(n=90))}, TASK, {}, "of 90 prompts, but the task has 120 labels"),
        ({"base": held(noise()), "act": held(noise(), layers=(1, 2, 3))}, TASK, {}, "same positions, layers"),
        ({"base": [held(noise()), held(noise())]}, TASK, {}, "each choice of positions can be probed once"),
        ({"base": []}, TASK, {}, "same positions, layers"),
        ({}, TASK, {}, "same positions, layers"),
        ({"base": held(noise() * np.nan)}, TASK, {}, "not finite"),
        ({"base": ORGANISM}, TASK, {}, "names no prompts"),
        ({"base": ORGANISM}, labelled(PAIRS, "relation"), {"layers": [4]}, "layer 4 does not exist"),
    ],
)
def test_what_cannot_be_probed_is_refused(models: dict, task: Task, options: dict, message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        probe(models, task, progress=False, **options)


def test_models_that_do_not_compare_or_train_are_refused() -> None:
    task = labelled(PAIRS, "relation")
    tiny = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(400))
    other = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(380))
    training = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer()).train()

    for models, message in (
        ({"base": tiny, "act": other}, "tokenizers differ"),
        ({"base": tiny, "act": training}, "eval mode"),
        ({"base": training}, "eval mode"),
    ):
        with pytest.raises(CtlensError, match=message):
            probe(models, task, progress=False)


def test_labels_and_attacks_that_are_not_there_are_refused() -> None:
    found = probe({"base": held(noise())}, TASK, seeds=1, progress=False)
    alike = [Pair(pair.clean, pair.clean) for pair in PAIRS]
    for call, message in (
        (lambda: answer_hinted(threats.get("jailbreak").pairs(4)), "unknown label 'hint'"),
        (lambda: wrapper_present(alike, ORGANISM.tokenizer), "no neutral text has the tokens of the attack in pair 1"),
        (lambda: found.curve("act", "base", "last", "ridge"), "unknown reading"),
        (lambda: found.figure("content"), "unknown positions"),
        (lambda: found.figure(estimator="logistic"), "unknown estimator"),
    ):
        with pytest.raises(CtlensError, match=message):
            call()


def test_an_earlier_turn_is_replaced_and_the_clean_conversation_kept() -> None:
    system, said = Turn("system", "you are kind ."), Turn("assistant", "let us start")
    clean = Prompt((system, Turn("user", "what time is it ?")))
    attack = Prompt((system, Turn("user", "let us do a quiz ."), said, Turn("user", "what time is it ?")))

    ((neutral,), _) = wrapper_present([Pair(clean, attack)], ORGANISM.tokenizer).parts[2]

    first, quiz, start, last = neutral.wrapped.turns
    assert (first, last) == (system, clean.turns[-1]) and [quiz.role, start.role] == ["user", "assistant"]
    assert len(quiz.content.split()) == 6 and len(start.content.split()) == 3
    assert quiz.content.startswith("good morning .") and start.content == "good morning ."
