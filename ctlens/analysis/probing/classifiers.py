"""Classifiers, linear ones and one that is not, which are tried on groups that they were not fitted on.

A probe of some layers is thousands of fits of a few hundred prompts. scikit-learn spends most of such a fit on
checking its input, so the standardisation and the ridge, the default, are its formulas without the checks; tests hold
both to scikit-learn's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import linalg
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from ctlens.analysis.probing.tasks import NO_GROUP, Task
from ctlens.core.errors import CtlensError, unknown

PromptNumbers = Int[np.ndarray, " _"]
Split = tuple[PromptNumbers, PromptNumbers]
"""Rows to fit on and rows to try."""
StateVectors = Float[np.ndarray, "prompt d"]


class MassMean(ClassifierMixin, BaseEstimator):
    """A classifier that names the class whose mean is nearest.

    With two classes the direction is the difference of their means and the threshold lies midway
    (mass-mean probing without covariance, Marks and Tegmark, arXiv 2310.06824).
    """

    def fit(self, X: np.ndarray, y: np.ndarray) -> MassMean:
        """Takes the mean of each class."""
        self.classes_ = np.unique(y)
        self.means_ = np.stack([X[y == label].mean(0) for label in self.classes_])
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """`x . mean - |mean|^2 / 2` per class, `[prompt, class]`."""
        return X @ self.means_.T - (self.means_**2).sum(1) / 2

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The class with the largest value."""
        return self.classes_[self.decision_function(X).argmax(1)]


class Ridge(ClassifierMixin, BaseEstimator):
    """A ridge regression on each class against the others, with balanced classes, that names the largest class.

    It is scikit-learn's `RidgeClassifier(alpha, class_weight="balanced")`, to the last bit. Of two classes it regresses
    on the second alone, for the first is its negative.

    Args:
        alpha: the penalty.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def fit(self, X: np.ndarray, y: np.ndarray) -> Ridge:
        """Solves the normal equations of the centred inputs; of more inputs than prompts their dual."""
        self.classes_, codes = np.unique(y, return_inverse=True)
        wanted = np.where(codes[:, None] == np.arange(len(self.classes_)), 1, -1).astype(X.dtype)
        wanted = wanted[:, 1:] if len(self.classes_) == 2 else wanted
        balanced = len(y) / (len(self.classes_) * np.bincount(codes))
        weight = balanced[codes].astype(X.dtype)
        root = np.sqrt(weight)[:, None]
        x_mean = np.average(X, axis=0, weights=weight)
        wanted_mean = np.average(wanted, axis=0, weights=weight)
        x = (X - x_mean) * root
        wanted = (wanted - wanted_mean) * root
        dual = x.shape[1] > len(x)
        gram = x @ x.T if dual else x.T @ x
        gram.flat[:: len(gram) + 1] += self.alpha
        solved = linalg.solve(gram, wanted if dual else x.T @ wanted, assume_a="pos")
        self.coef_ = (x.T @ solved if dual else solved).T
        self.intercept_ = wanted_mean - x_mean @ self.coef_.T
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The class with the largest value."""
        values = X @ self.coef_.T + self.intercept_
        return self.classes_[(values[:, 0] > 0).astype(int) if values.shape[1] == 1 else values.argmax(1)]


class RbfRidge(ClassifierMixin, BaseEstimator):
    """A ridge regression as `Ridge`, of the kernel `exp(-|x - y|^2 / d)` of two inputs of `d` numbers.

    It is scikit-learn's `KernelRidge(alpha=alpha, kernel="rbf", gamma=1 / d)` with balanced weights.

    Args:
        alpha: the penalty.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def fit(self, X: np.ndarray, y: np.ndarray) -> RbfRidge:
        """Solves the dual equations."""
        self.classes_, codes = np.unique(y, return_inverse=True)
        self.X_ = X
        wanted = np.where(codes[:, None] == np.arange(len(self.classes_)), 1, -1).astype(X.dtype)
        root = np.sqrt(len(y) / (len(self.classes_) * np.bincount(codes)))[codes, None].astype(X.dtype)
        gram = self._kernel(X) * root * root.T
        gram.flat[:: len(gram) + 1] += self.alpha
        self.dual_coef_ = root * linalg.solve(gram, wanted * root, assume_a="pos")
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The class with the largest value."""
        return self.classes_[(self._kernel(X) @ self.dual_coef_).argmax(1)]

    def _kernel(self, X: np.ndarray) -> np.ndarray:
        """How near inputs are to those fitted on, 0 to 1."""
        lengths = (X**2).sum(1)[:, None] + (self.X_**2).sum(1)
        return np.exp((2 * X @ self.X_.T - lengths) / X.shape[1])


NONLINEAR = "rbf"
"""The estimator that is not linear: a ridge regression on how near a state is to each of those fitted on.

It reads a planted parity as well as a support vector machine with the same kernel, at half the cost, and better than a
net. Of 192 states in 96 dimensions, with noise of deviation 1 and a bit as the sign of the product of two inputs that
are 4 long, it told .99 right on unseen groups, the machine .99, and a net of 64 hidden units .82 at some 40 times the
cost. That needs one scale for all inputs: standardised one by one, noise is as long as the code, and all told .51 to
.53.
"""
# The penalties are for about as many prompts as dimensions: with weaker ones, probes read less on unseen groups.
ESTIMATORS: dict[str, Callable[[], ClassifierMixin]] = {
    "ridge": lambda: Ridge(alpha=100.0),
    "logistic": lambda: LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000),
    "mass_mean": MassMean,
    NONLINEAR: lambda: RbfRidge(alpha=0.1),
}


class Standardised:
    """A classifier whose inputs are standardised, by the means and deviations of those that it was fitted on.

    Args:
        estimator: the classifier, not yet fitted.
        one_scale: divide all inputs by one deviation, their root mean square, so that distances keep their shape.
    """

    def __init__(self, estimator: Any, *, one_scale: bool = False) -> None:
        self.estimator = estimator
        self.one_scale = one_scale

    def fit(self, values: StateVectors, labels: np.ndarray) -> Standardised:
        """Fits both."""
        self.mean = values.mean(0, dtype=float)
        variance = values.var(0, dtype=float)
        if self.one_scale:
            variance = np.full_like(variance, variance.mean())
        # Rounding alone gives an input that never changes a variance of up to this; dividing by it would blow it up.
        rounding = len(values) * np.finfo(float).eps
        constant = variance <= rounding * variance + (rounding * self.mean) ** 2
        self.scale = np.where(constant, 1, np.sqrt(variance))
        self.estimator.fit(self._standardised(values), labels)
        return self

    def predict(self, values: StateVectors) -> np.ndarray:
        """The label of each prompt."""
        return self.estimator.predict(self._standardised(values))

    def _standardised(self, values: StateVectors) -> StateVectors:
        return (values - self.mean.astype(values.dtype)) / self.scale.astype(values.dtype)


def make_probe(name: str) -> Standardised:
    """An estimator behind a standardisation of its inputs, both not yet fitted.

    Raises:
        CtlensError: the estimator is unknown.
    """
    if name not in ESTIMATORS:
        raise unknown("estimator", name, ESTIMATORS)
    return Standardised(ESTIMATORS[name](), one_scale=name == NONLINEAR)


def weights(name: str, values: StateVectors, positive: np.ndarray) -> Float[np.ndarray, " d"]:
    """The weights of a probe for True, fitted on all prompts, in units of the inputs before their standardisation.

    `mass_mean` has no weights of its own; for it they are the difference of the means.

    Raises:
        CtlensError: the estimator is unknown or not linear.
    """
    if name == NONLINEAR:
        raise CtlensError(f"a probe that is not linear ({name!r}) reads along no direction: choose 'ridge'.")
    fitted = make_probe(name).fit(values, positive)
    if isinstance(fitted.estimator, MassMean):
        return (fitted.estimator.means_[1] - fitted.estimator.means_[0]) * fitted.scale
    return np.ravel(fitted.estimator.coef_) / fitted.scale


def group_splits(task: Task, folds: int, seed: int) -> list[Split]:
    """Splits the prompts into rows to fit on and rows to try, so that every prompt is tried.

    Each factor's groups are dealt into folds. A test set is one fold of every factor, its training
    set the prompts that are in none of these folds; the others sit out.

    Args:
        task: labels and groups.
        folds: how many per factor.
        seed: of the dealing; the order of the prompts has no part in it.

    Raises:
        CtlensError: a factor has fewer groups than folds, or a training set lacks a class.
    """
    labels = np.array(task.labels)
    dealt = np.array([_deal(labels, np.array(of), name, folds, seed) for name, of in task.groups.items()])
    found = []
    for chosen in itertools.product(range(folds), repeat=len(dealt)):
        inside = dealt == np.array(chosen)[:, None]
        train = np.flatnonzero(~inside.any(0))
        test = np.flatnonzero((inside | (dealt < 0)).all(0))
        if len(test):
            _require_classes(labels, train, folds)
            found.append((train, test))
    return found


def hits(
    name: str,
    fitted: StateVectors,
    reads: Sequence[StateVectors],
    task: Task,
    deals: Sequence[Sequence[Split]],
    *,
    shuffled: bool = False,
) -> Float[np.ndarray, "deal reading prompt"]:
    """The share of probes fitted without a prompt's groups that told it right, 0 to 1, for each prompt.

    Args:
        name: of the estimator.
        fitted: what the probes are fitted on.
        reads: what each of them is then tried on: the same prompts, for example in other models.
        task: labels and groups.
        deals: each from `group_splits`.
        shuffled: fit on labels shuffled among the training prompts that are alike in what is known.
    """
    labels = np.unique(task.labels, return_inverse=True)[1]
    contested = [np.array(task.stratum) == value for value in task.contested()]
    draw = np.random.default_rng(0)
    right = np.zeros((len(deals), len(reads), len(labels)))
    tried = np.zeros((len(deals), 1, len(labels)))
    with threadpool_limits(1, "blas"):  # threads cost more than they gain on matrices as small as these
        for deal, train, test in ((deal, *split) for deal, splits in enumerate(deals) for split in splits):
            known = [of_value[train] for of_value in contested]
            given = _shuffled(labels[train], known, draw) if shuffled else labels[train]
            probe = make_probe(name).fit(fitted[train], given)
            tried[deal, 0, test] += 1
            for row, read in zip(right[deal], reads, strict=True):
                row[test] += probe.predict(read[test]) == labels[test]
    return right / tried


def hits_of_models(
    name: str,
    values: Mapping[str, np.ndarray],
    readings: Sequence[tuple[str, str]],
    task: Task,
    deals: Sequence[Sequence[Split]],
    *,
    shuffled: bool = False,
) -> Float[np.ndarray, "deal reading prompt"]:
    """Computes `hits` for models that read each other: each probe is fitted once and tried on all that it reads.

    Args:
        name: of the estimator.
        values: of each model.
        readings: the model fitted on and the model read.
        task, deals, shuffled: as in `hits`.
    """
    rows: dict[tuple[str, str], np.ndarray] = {}
    for fitted in values:
        reads = [read for fit, read in readings if fit == fitted]
        right = hits(name, values[fitted], [values[read] for read in reads], task, deals, shuffled=shuffled)
        rows.update(zip(((fitted, read) for read in reads), right.swapaxes(0, 1), strict=True))
    return np.stack([rows[reading] for reading in readings], 1)


def _deal(labels: np.ndarray, groups: np.ndarray, factor: str, folds: int, seed: int) -> PromptNumbers:
    """The fold of each prompt, -1 for one that is in no group."""
    member = np.flatnonzero(groups != NO_GROUP)
    count = len(np.unique(groups[member]))
    if count < folds:
        raise CtlensError(f"{count} groups of {factor!r} do not fill {folds} folds: give more of them or fewer folds.")
    order = member[np.lexsort((labels[member], groups[member]))]
    dealer = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    dealt = np.full(len(labels), -1)
    for number, (_, chosen) in enumerate(dealer.split(order, labels[order], groups[order])):
        dealt[order[chosen]] = number
    return dealt


def _require_classes(labels: np.ndarray, train: PromptNumbers, folds: int) -> None:
    missing = np.setdiff1d(labels, labels[train]).tolist()
    if missing:
        raise CtlensError(f"with {folds} folds, a training set has no prompt labelled {missing[0]!r}: give more pairs.")


def _shuffled(labels: np.ndarray, contested: Sequence[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    """Training labels, shuffled among prompts that are alike in what is known.

    Where that leaves a single class, true labels would still tell one side of the question: there
    labels are drawn from those of the other prompts.

    Args:
        labels: of the training prompts.
        contested: the prompts of each stratum that has several classes.
        draw: the random numbers.
    """
    shuffled = draw.choice(labels[np.any(contested, axis=0)], len(labels))
    for rows in contested:
        shuffled[rows] = draw.permutation(labels[rows])
    return shuffled
