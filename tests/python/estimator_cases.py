"""Estimators to fit, and the arrays as large as X that a fit holds at its peak."""

from __future__ import annotations

import sys
import tracemalloc
import warnings
from types import FrameType
from typing import Any

import numpy as np

TALL, WIDE = (4001, 13), (211, 1231)  # wide where memory grows with the square of the rows
_MANY_ROWS = (12007, 13)
_TREES = {"max_depth": 3}
_FEW = {"n_estimators": 2}
_STEPS = {"max_iter": 2}

# Class, parameters, shape of X.
CASES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    *[(name, _TREES, TALL) for name in ("DecisionTreeClassifier", "DecisionTreeRegressor")],
    *[(name, _TREES, TALL) for name in ("ExtraTreeClassifier", "ExtraTreeRegressor")],
    *[(name, _FEW | _TREES, TALL) for name in ("RandomForestClassifier", "RandomForestRegressor")],
    *[(name, _FEW | _TREES, TALL) for name in ("ExtraTreesClassifier", "ExtraTreesRegressor", "RandomTreesEmbedding")],
    *[(name, _FEW, TALL) for name in ("GradientBoostingClassifier", "GradientBoostingRegressor", "IsolationForest")],
    *[(f"HistGradientBoosting{kind}", _STEPS | {"max_leaf_nodes": 4}, TALL) for kind in ("Classifier", "Regressor")],
    *[(name, _STEPS, WIDE) for name in ("SVC", "SVR", "NuSVC", "NuSVR", "OneClassSVM")],
    *[(name, _STEPS, TALL) for name in ("LinearSVC", "LinearSVR")],
    *[
        ("LogisticRegression", _STEPS | {"solver": solver}, TALL)
        for solver in ("lbfgs", "liblinear", "newton-cg", "newton-cholesky", "sag", "saga")
    ],
    *[
        ("LogisticRegressionCV", _STEPS | {"solver": solver, "cv": 3, "Cs": 1}, TALL)
        for solver in ("lbfgs", "liblinear", "newton-cg", "newton-cholesky", "saga")
    ],
    *[
        ("LinearRegression", {"copy_X": copy, "positive": positive}, TALL)
        for copy in (True, False)
        for positive in (False, True)
    ],
    *[
        ("Ridge", {"solver": solver}, TALL)
        for solver in ("auto", "svd", "cholesky", "lsqr", "sparse_cg", "sag", "saga")
    ],
    ("Ridge", {"copy_X": False}, TALL),
    ("RidgeClassifier", {}, TALL),
    *[
        (name, _STEPS | {"fit_intercept": intercept, "copy_X": copy}, TALL)
        for name in ("Lasso", "ElasticNet")
        for intercept, copy in ((True, True), (True, False), (False, True))
    ],
    *[(name, {}, TALL) for name in ("Lars", "LassoLars", "OrthogonalMatchingPursuit")],
    *[(name, _STEPS, TALL) for name in ("HuberRegressor", "PoissonRegressor", "GammaRegressor", "TweedieRegressor")],
    *[(name, _STEPS, TALL) for name in ("SGDClassifier", "SGDRegressor", "SGDOneClassSVM", "Perceptron")],
    *[
        (f"{kind}Neighbors{task}", {"algorithm": algorithm}, shape)
        for kind, task in (("K", "Classifier"), ("K", "Regressor"), ("Radius", "Classifier"), ("Radius", "Regressor"))
        for algorithm, shape in (
            ("auto", TALL),
            ("auto", WIDE),
            ("brute", TALL),
            ("kd_tree", TALL),
            ("ball_tree", TALL),
        )
    ],
    ("NearestNeighbors", {}, TALL),
    ("NearestNeighbors", {}, WIDE),
    ("NearestCentroid", {}, TALL),
    *[("KMeans", _STEPS | {"n_init": 1, "copy_x": copy}, TALL) for copy in (True, False)],
    ("MiniBatchKMeans", _STEPS | {"n_init": 1}, _MANY_ROWS),
    ("Birch", {"threshold": 1e6}, (503, 13)),
    ("DBSCAN", {}, TALL),
    ("DBSCAN", {}, WIDE),
    ("HDBSCAN", {"copy": False}, WIDE),
    ("AgglomerativeClustering", {}, WIDE),
    ("KernelDensity", {}, TALL),
    *[
        ("PCA", {"n_components": 3, "svd_solver": solver, "copy": copy}, TALL)
        for solver, copy in (("auto", True), ("covariance_eigh", False), ("full", True), ("full", False))
    ],
    *[("PCA", {"n_components": 3, "svd_solver": solver}, TALL) for solver in ("arpack", "randomized")],
    *[("IncrementalPCA", {"n_components": 3, "copy": copy}, (1001, 13)) for copy in (True, False)],
    *[("TruncatedSVD", {"algorithm": algorithm}, TALL) for algorithm in ("randomized", "arpack")],
    *[(name, _STEPS | {"n_components": 3}, TALL) for name in ("NMF", "MiniBatchNMF", "FactorAnalysis")],
    ("FastICA", _STEPS, TALL),
    *[("StandardScaler", {"with_std": scaled}, TALL) for scaled in (True, False)],
    *[(name, {}, TALL) for name in ("MaxAbsScaler", "MinMaxScaler", "RobustScaler")],
    ("QuantileTransformer", {"n_quantiles": 100}, TALL),
    ("PowerTransformer", {}, (4001, 5)),
    *[(name, {}, TALL) for name in ("Normalizer", "Binarizer", "PolynomialFeatures", "SplineTransformer")],
    *[(name, {}, TALL) for name in ("KBinsDiscretizer", "OneHotEncoder", "OrdinalEncoder")],
    *[("SimpleImputer", {"strategy": how}, TALL) for how in ("mean", "median", "most_frequent", "constant")],
    *[("SimpleImputer", {"strategy": how, "copy": False}, TALL) for how in ("mean", "median", "most_frequent")],
    *[(name, {}, TALL) for name in ("GaussianNB", "MultinomialNB", "ComplementNB", "CategoricalNB")],
    *[(name, {"max_iter": 1, "hidden_layer_sizes": (2,)}, TALL) for name in ("MLPClassifier", "MLPRegressor")],
    *[
        (f"GaussianProcess{task}", {"copy_X_train": copy}, WIDE)
        for task in ("Classifier", "Regressor")
        for copy in (True, False)
    ],
    ("KernelRidge", {}, WIDE),
    *[("LinearDiscriminantAnalysis", {"solver": solver}, TALL) for solver in ("svd", "lsqr", "eigen")],
    *[("QuadraticDiscriminantAnalysis", {"solver": solver}, TALL) for solver in ("svd", "eigen")],
    ("GaussianMixture", {"max_iter": 1}, TALL),
    ("EmpiricalCovariance", {}, TALL),
    ("DummyClassifier", {}, TALL),
    ("DummyRegressor", {}, TALL),
]


def case_id(case: tuple[str, dict[str, Any], tuple[int, int]]) -> str:
    name, parameters, shape = case
    return "-".join([name, *[f"{key}={value}" for key, value in parameters.items()], f"{shape[1]}columns"])


def make_data(shape: tuple[int, int], dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X of the whole numbers 1 to 99, which all dtypes hold, labels 0 and 1, and positive float64 targets."""
    generator = np.random.default_rng(0)
    x = generator.integers(1, 100, shape).astype(dtype)
    return x, generator.integers(0, 2, shape[0]), np.abs(generator.normal(size=shape[0])) + 0.1


class Watch:
    """Under tracemalloc: the itemsizes of the arrays of X.size elements that live together, at their greatest sum.

    Looked at on each call and return of Python code and of builtins; what lives only inside one call of C code is in
    `peak` alone: the most bytes that were allocated at any time. Arrays of one byte per element do not count: most are
    masks and bins, and int16 tells what a copy of small integers does.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.most: list[int] = []
        self.peak = 0
        self._before = 0

    def __enter__(self) -> Watch:
        tracemalloc.start(1)
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    def _look(self, frame: FrameType, event: str, arg: Any) -> None:
        now = tracemalloc.get_traced_memory()[0]
        if abs(now - self._before) < 1.5 * self.size:
            return
        self._before = now
        traces = tracemalloc.take_snapshot().traces
        alive = [n for trace in traces for n in (2, 4, 8) if 0 <= trace.size - n * self.size <= 64]
        if sum(alive) > sum(self.most):
            self.most = sorted(alive)


def watch_fit(estimator: Any, x: np.ndarray, y: np.ndarray) -> Watch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few iterations do not converge
        with Watch(x.size) as watch:
            estimator.fit(x, y)
    return watch
