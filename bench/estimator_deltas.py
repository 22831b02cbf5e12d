"""What smaller dtypes change for estimators other than trees: scores and predictions before and after, as a table.

    python bench/estimator_deltas.py

Each estimator is fitted twice on the same two thirds of a data set that scikit-learn brings: as it is, and after
SklearnPrecisionOptimizer; both score the last third (accuracy, R2, or for KMeans and PCA what their score() says).
"largest change" is the largest |after - before| of predict_proba, decision_function, transform or of a regressor's
predict, beside the largest of these numbers; labels that differ are counted. A star marks fits that stopped at their
max_iter before they converged: how far such a fit comes depends on every rounding. All fits are seeded.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy
import sklearn
from halfstep.sklearn import SklearnPrecisionOptimizer
from sklearn import datasets
from sklearn.base import BaseEstimator, clone, is_regressor
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

CLASSES = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}
NUMBERS = {
    "diabetes": datasets.load_diabetes,
    "diabetes raw": lambda **options: datasets.load_diabetes(scaled=False, **options),
}
CLASSIFIERS = [
    LogisticRegression(),
    make_pipeline(StandardScaler(), LogisticRegression()),
    SVC(),
    KNeighborsClassifier(),
    GaussianNB(),
    MLPClassifier((32,), random_state=0, max_iter=100),
    GradientBoostingClassifier(n_estimators=20, random_state=0),
    HistGradientBoostingClassifier(max_iter=20, random_state=0),
]
REGRESSORS = [
    LinearRegression(),
    Ridge(),
    KNeighborsRegressor(),
    GradientBoostingRegressor(n_estimators=20, random_state=0),
    HistGradientBoostingRegressor(max_iter=20, random_state=0),
]
OTHERS = [KMeans(3, n_init=1, random_state=0), PCA(2, random_state=0)]


def cases() -> Iterator[tuple[BaseEstimator, str, Any]]:
    for estimators, sets in ((CLASSIFIERS, CLASSES), (REGRESSORS, NUMBERS), (OTHERS, {**CLASSES, **NUMBERS})):
        for estimator in estimators:
            for name, load in sets.items():
                yield estimator, name, load


def outputs(model: Any, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (none for regressors and transformers), and numbers to compare."""
    if is_regressor(model):
        return np.zeros(0), model.predict(X)
    numbers = model.predict_proba(X) if hasattr(model, "predict_proba") else None
    if numbers is None:
        numbers = model.decision_function(X) if hasattr(model, "decision_function") else model.transform(X)
    return model.predict(X) if hasattr(model, "predict") else np.zeros(0), numbers


def row(estimator: BaseEstimator, name: str, load: Any) -> str:
    X, y = load(return_X_y=True)
    X_fit, X_score, y_fit, y_score = train_test_split(X, y, test_size=1 / 3, random_state=0)
    optimizer = SklearnPrecisionOptimizer()
    small_fit, small_y = optimizer.optimize_data_precision(X_fit, y_fit)
    small_score, small_y_score = optimizer.optimize_data_precision(X_score, y_score)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = clone(estimator).fit(X_fit, y_fit)
        after = clone(estimator).fit(small_fit, small_y)
    star = " *" if any(issubclass(each.category, ConvergenceWarning) for each in caught) else ""
    scores = before.score(X_score, y_score), after.score(small_score, small_y_score)
    (labels, numbers), (small_labels, small_numbers) = outputs(before, X_score), outputs(after, small_score)
    difference = float(np.max(np.abs(np.asarray(small_numbers, np.float64) - numbers)))
    size = float(np.max(np.abs(numbers)))
    changed = f"{np.count_nonzero(labels != small_labels)} of {len(labels)}" if len(labels) else ""
    steps = estimator.steps if hasattr(estimator, "steps") else [("", estimator)]
    title = " + ".join(type(step).__name__ for _, step in steps)
    return (
        f"| {title} | {name} | {X.dtype} to {small_fit.dtype} | {scores[0]:.6g} | {scores[1]:.6g} "
        f"| {difference:.1e} (of {size:.3g}){star} | {changed} |"
    )


def main() -> None:
    print("| estimator | data | X | score before | after | largest change | labels changed |")
    print("|---|---|---|---|---|---|---|")
    for estimator, name, load in cases():
        print(row(estimator, name, load), flush=True)
    print(
        f"\nscikit-learn {sklearn.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
