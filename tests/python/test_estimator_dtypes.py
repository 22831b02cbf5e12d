"""explain_estimator against what fits of scikit-learn allocate, and docs/estimators.md against the table.

A case is fitted under tracemalloc, to which NumPy reports its arrays; the arrays as large as X that live together at
the peak must be the copies and work arrays of the table, no more and no fewer. What a fit allocates and frees inside
one call of C code is not seen so: the naive Bayes classes that convert X in a product are told by their peak of bytes.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from estimator_cases import CASES, TALL, case_id, make_data, watch_fit
from halfstep.estimator_dtypes import explain_estimator
from halfstep.estimator_table import INPUTS, KINDS, SAME, TABLE
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin, is_classifier
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    RandomForestRegressor,
    StackingRegressor,
    VotingRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge, SGDRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils import all_estimators

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "estimators.md"
CLASSES = dict(all_estimators())
DTYPES = ("float32", "float64", "int8")
MORE_DTYPES = ("int16", "int32", "int64", "uint64")
HIDDEN = {"MultinomialNB", "ComplementNB"}  # their copies live in one product
SLOW = {"PowerTransformer"}
FIRST = list({case[0]: case for case in reversed(CASES)}.values())  # of each class, fitted with more dtypes
measured = pytest.mark.skipif(
    not sklearn.__version__.startswith("1.9."), reason="the table is that of scikit-learn 1.9"
)


def fit_of(estimator: Any, columns: int, elements: int) -> Any:
    entry = TABLE[type(estimator).__name__]
    return entry(estimator, columns, elements) if callable(entry) else entry


def expected_arrays(fit: Any, dtype: str) -> list[int]:
    """The itemsizes of copies and work arrays; those of one byte are not watched."""
    slot = INPUTS.index("int8" if dtype == "int16" else dtype)
    names = KINDS[fit.kind].copies[slot].split() + fit.work[min(slot, 2)].split()
    return sorted(n for n in (np.dtype(dtype if name == SAME else name).itemsize for name in names) if n > 1)


def check_fit(case: tuple[str, dict[str, Any], tuple[int, int]], dtypes: tuple[str, ...]) -> None:
    """Fit for each dtype, and compare the arrays that are held with the table, and its bytes with the explanation."""
    name, parameters, shape = case
    held, expected = {}, {}
    for dtype in dtypes:
        x, labels, targets = make_data(shape, dtype)
        estimator = CLASSES[name](**parameters)
        held[dtype] = watch_fit(estimator, x, labels if is_classifier(estimator) else targets).most
        fit = fit_of(estimator, shape[1], x.size)
        expected[dtype] = expected_arrays(fit, dtype)
        cost = explain_estimator(estimator, dtype, x.size, shape[1])
        column = {"float32": 0, "float64": 1}.get(dtype, 2)
        work = x.size * sum(np.dtype(each).itemsize for each in fit.work[column].split())
        one_byte = x.size if (dtype, fit.kind) == ("int8", "copied") else 0
        assert cost.bytes == x.size * sum(expected[dtype]) - work + one_byte
        assert cost.copies == (cost.bytes > 0) == (cost.fit_dtype is not None)
    assert held == expected


@measured
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case_id(case), marks=[pytest.mark.slow] if case[0] in SLOW else [])
        for case in CASES
        if case[0] not in HIDDEN
    ],
)
def test_a_fit_holds_the_arrays_of_the_table(case: tuple[str, dict[str, Any], tuple[int, int]]) -> None:
    check_fit(case, DTYPES)


@measured
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FIRST if case[0] not in HIDDEN | SLOW], ids=case_id)
def test_other_integers_go_as_the_table_says(case: tuple[str, dict[str, Any], tuple[int, int]]) -> None:
    check_fit(case, MORE_DTYPES)


@measured
@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_naive_bayes_converts_x_in_a_product(name: str) -> None:
    peaks = {}
    for dtype in DTYPES + MORE_DTYPES:
        x, labels, _ = make_data(TALL, dtype)
        CLASSES[name]().fit(x, labels)  # what the first fit imports is not counted
        watch = watch_fit(CLASSES[name](), x, labels)
        cost = explain_estimator(CLASSES[name](), dtype, x.size)
        assert cost.bytes == (0 if dtype in ("float64", "int64") else 8 * x.size)
        assert watch.most == []
        peaks[dtype] = watch.peak / x.size
        assert (peaks[dtype] > 8) == (cost.bytes > 0), peaks


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_class_of_the_table_is_measured_and_exists(name: str) -> None:
    assert name in CLASSES
    assert any(case[0] == name for case in CASES)


@measured
@pytest.mark.parametrize("dtype", [*DTYPES, "int64"])
@pytest.mark.parametrize(
    "estimator",
    [
        Pipeline([("none", "passthrough"), ("scale", MinMaxScaler()), ("ridge", Ridge())]),
        VotingRegressor([("forest", RandomForestRegressor(2, max_depth=3)), ("sgd", SGDRegressor(max_iter=2))]),
        FeatureUnion([("a", MinMaxScaler()), ("b", StandardScaler(with_std=False))]).set_params(b="drop"),
        OneVsRestClassifier(LinearSVC(max_iter=2)),
        TransformedTargetRegressor(Ridge()),
        AdaBoostClassifier(n_estimators=2),
        AdaBoostRegressor(n_estimators=2),
        BaggingClassifier(n_estimators=2),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_parts_cost_what_they_cost_in_a_fit(estimator: Any, dtype: str) -> None:
    x, labels, targets = make_data(TALL, dtype)
    if isinstance(estimator, FeatureUnion):  # its fit alone: fit_transform has what it puts out besides
        estimator = FeatureUnion(estimator.transformer_list)
    held = watch_fit(estimator, x, labels if is_classifier(estimator) else targets).most
    if isinstance(estimator, Pipeline):  # Ridge gets float64 or float32 from the scaler; see the first step alone
        held = watch_fit(estimator.steps[1][1], x, targets).most
    cost = explain_estimator(estimator, dtype, x.size, x.shape[1])
    own = x.size if isinstance(estimator, AdaBoostRegressor) and dtype == "int8" else 0  # one byte is not watched
    assert cost.bytes == x.size * sum(held) + own
    assert cost.parts


def test_parts_are_named() -> None:
    pipeline = Pipeline([("none", None), ("skip", "passthrough"), ("svc", SVC())])
    (part,) = explain_estimator(GridSearchCV(pipeline, {}), "float32", 100).parts
    assert part.estimator == "Pipeline"
    assert [each.estimator for each in part.parts] == ["SVC"]
    assert part.bytes == 800
    stack = explain_estimator(StackingRegressor([("a", Ridge()), ("b", RandomForestRegressor())]), "int8", 100)
    assert [each.estimator for each in stack.parts] == ["Ridge", "RandomForestRegressor"]
    assert stack.bytes == 1600  # Ridge converts, and copies what it converted
    assert "with n_jobs" in stack.note
    shown = str(stack).splitlines()
    assert len(shown) == 3
    assert shown[0].startswith("StackingRegressor (int8): copies 1,600 bytes. ")
    assert shown[1].startswith("  Ridge (int8): copies 1,600 bytes. ")


def test_a_column_transformer_has_its_columns() -> None:
    transformer = ColumnTransformer([("a", MinMaxScaler(), [0, 1]), ("b", "drop", [2]), ("c", SVC(), [3])])
    cost = explain_estimator(transformer, "int8", 400, columns=4)
    assert [part.bytes for part in cost.parts] == [1600, 800]
    assert cost.bytes == 1600
    unknown = explain_estimator(ColumnTransformer([("a", MinMaxScaler(), slice(2))]), "int8", 400, columns=4)
    assert unknown.copies is None
    assert math.isnan(unknown.bytes)


class Mine(TransformerMixin, Ridge):
    """A user's class, with a mixin of scikit-learn's before the estimator."""


class Other(RegressorMixin, BaseEstimator):
    def fit(self, x: Any, y: Any = None) -> Other:
        return self


class SVR(Other):
    """Has the name of a class in the table, but is not scikit-learn's."""


def test_subclasses_cost_what_their_base_costs() -> None:
    cost = explain_estimator(Mine(copy_X=False), "int8", 10)
    assert (cost.estimator, cost.bytes) == ("Mine", 80)


@pytest.mark.parametrize("estimator", [Other(), SVR(), GridSearchCV(Other(), {}), Pipeline([("a", SVR())])])
def test_what_is_not_in_the_table_is_unknown(estimator: Any) -> None:
    cost = explain_estimator(estimator, "float32", 10)
    assert cost.copies is None
    assert cost.fit_dtype is None
    assert math.isnan(cost.bytes)
    assert "not known" in cost.note
    assert "unknown number of bytes" in str(cost)


def test_float16_is_unknown() -> None:
    """StandardScaler keeps it, KMeans converts it, and QuadraticDiscriminantAnalysis fails."""
    for estimator in (StandardScaler(), CLASSES["KMeans"](), GridSearchCV(SVC(), {})):
        cost = explain_estimator(estimator, np.float16, 10)
        assert cost.copies is None
        assert math.isnan(cost.bytes)


def test_unsigned_types_go_as_the_signed_ones_but_uint64() -> None:
    bayes = CLASSES["MultinomialNB"]()
    assert explain_estimator(bayes, "int64", 10).copies is False
    assert explain_estimator(bayes, "uint64", 10).fit_dtype == np.float64
    assert explain_estimator(bayes, "uint32", 10).fit_dtype == np.int64
    for dtype in ("bool", "uint8", "uint16", "uint32"):
        assert explain_estimator(SGDRegressor(), dtype, 10).bytes == 80


def test_a_class_whose_base_is_in_the_table_is_not_taken_for_it() -> None:
    """LogisticRegressionCV is a LogisticRegression, which keeps float32, and computes in float64."""
    assert explain_estimator(CLASSES["LogisticRegressionCV"](), "float32", 10).bytes == 80
    assert explain_estimator(LogisticRegression(), "float32", 10).bytes == 0


@pytest.mark.parametrize(
    ("estimator", "dtype", "words"),
    [
        (
            SVC(),
            "float32",
            "SVC computes in float64: a float32 X becomes float64 and saves memory only outside of fit.",
        ),
        (SGDRegressor(), "int8", "an int8 X becomes float64, 8 times its size; pass float32."),
        (SGDRegressor(), "float32", "computes in X's float type, on X itself: X is used as it is."),
        (Ridge(), "int16", "an int16 X becomes float64, 8 times its size; pass float32."),
        (Ridge(), "float32", "a copy in float32 is made whatever X is."),
        (RandomForestRegressor(), "float64", "a float64 X becomes float32; pass float32 and no copy is made."),
        (RandomForestRegressor(), "uint16", "a uint16 X becomes float32, 2 times its size"),
        (SVC(), "int32", "an int32 X becomes float64, 2 times its size."),
    ],
)
def test_the_note_says_what_to_do(estimator: Any, dtype: str, words: str) -> None:
    assert words in explain_estimator(estimator, dtype, 1000).note


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("estimator", "dtype", "expected"),
    [
        ("sklearn.svm.LinearSVC(max_iter=1)", "float32", 24),
        ("sklearn.svm.LinearSVC(max_iter=1)", "float64", 16),
        ("sklearn.linear_model.LogisticRegression(solver='liblinear', max_iter=1)", "float32", 16),
        ("sklearn.linear_model.LogisticRegression(max_iter=1)", "float32", 0),
    ],
)
def test_liblinear_holds_x_once_more(estimator: str, dtype: str, expected: int) -> None:
    """tracemalloc does not see it: by the peak of a process's memory, in bytes per element."""
    code = f"""
import warnings, numpy, sklearn.linear_model, sklearn.svm
def peak():  # ru_maxrss would begin at that of the process which started this one
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
warnings.simplefilter("ignore")
x = numpy.ones((50_000, 60), "{dtype}")
x[::2] = 2
y = numpy.arange(len(x)) % 2
{estimator}.fit(x[:1000].copy(), y[:1000])
before = peak()
{estimator}.fit(x, y)
print((peak() - before) / x.size)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert abs(grown - expected) < 2.5
    liblinear = LinearSVC() if "LinearSVC" in estimator else LogisticRegression(solver="liblinear")
    assert "16 bytes" in explain_estimator(liblinear, dtype, 10).note


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"estimator is the class Ridge, expected an instance: Ridge\(\)"):
        explain_estimator(Ridge, "float32", 10)
    with pytest.raises(TypeError, match="estimator is a str, expected an object with a method fit"):
        explain_estimator("Ridge", "float32", 10)
    for dtype in ("complex64", "O", "U3", "M8[s]", np.longdouble):
        with pytest.raises(TypeError, match="expected a float of up to 8 bytes"):
            explain_estimator(Ridge(), dtype, 10)
    with pytest.raises(ValueError, match="elements is -1, expected 0 or more"):
        explain_estimator(Ridge(), "f4", -1)
    with pytest.raises(ValueError, match="columns is 0, expected 1 or more"):
        explain_estimator(Ridge(), "f4", 10, 0)
    with pytest.raises(ValueError, match=r"elements is 10, expected a multiple of columns \(3\)"):
        explain_estimator(Ridge(), "f4", 10, 3)
    for elements in (1.5, True, "10"):
        with pytest.raises(TypeError, match="elements is .*, expected an integer"):
            explain_estimator(Ridge(), "f4", elements)


def test_the_import_needs_neither_sklearn_nor_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'python_shim')!r}); import halfstep.estimator_dtypes\n"
        "assert not {'sklearn', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def document_table() -> str:
    """One row for each outcome, with the estimators that have it; parameters that only bound time are left out."""
    told = {"solver", "copy_X", "copy_x", "copy", "positive", "algorithm", "svd_solver", "strategy", "copy_X_train"}
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, parameters, shape in CASES:
        estimator = CLASSES[name](**parameters)
        shown = ", ".join(f"{key}={value!r}" for key, value in parameters.items() if key in told)
        label = f"{name}({shown})" if shown else name
        if "auto" in (parameters.get("algorithm"), getattr(estimator, "algorithm", None)):
            label += " with up to 15 columns" if shape[1] <= 15 else " with more columns"
        size = shape[0] * shape[1]
        costs = [explain_estimator(estimator, dtype, size, shape[1]) for dtype in ("float32", "float64", "int8")]
        outcome = tuple(f"{cost.fit_dtype or 'as it is'}, {int(cost.bytes) // size}" for cost in costs)
        labels = rows.setdefault(outcome, [])
        if label not in labels:
            labels.append(label)
    lines = ["| float32 in | float64 in | int8 in | estimators |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(outcome)} | {', '.join(labels)} |" for outcome, labels in rows.items()]
    return "\n".join(lines) + "\n"


def test_the_document_has_the_table() -> None:
    assert DOCUMENT.read_text().endswith(f"\n\n{document_table()}"), f"write it anew: python {Path(__file__).name}"


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text[: text.index("| float32 in")] + document_table())
