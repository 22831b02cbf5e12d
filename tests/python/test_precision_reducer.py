"""PrecisionReducer: scikit-learn's own checks, dtypes that fit decides and transform applies, pipelines and workers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp
from halfstep.sklearn import PrecisionReducer, SklearnPrecisionOptimizer
from sklearn.base import clone
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

SHIM = str(Path(__file__).resolve().parents[2] / "python_shim")
ENVIRONMENT = {**os.environ, "PYTHONPATH": SHIM}


def run_python(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**ENVIRONMENT, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "count": [1, 2, 300],
            "price": [0.5, np.nan, 2.0],
            "flag": [True, False, True],
            "masked": pd.array([1, None, 3], dtype="Int64"),
            "arrow": pd.array([1, None, 3], dtype="int64[pyarrow]"),
            "identity": [16777217.0, 1.0, 2.0],
        },
        index=[7, 8, 9],
    )


DTYPES = {"count": "i2", "price": "f4", "flag": "?", "masked": "i1", "arrow": "i1", "identity": "f8"}


@parametrize_with_checks([PrecisionReducer(), PrecisionReducer(on_misfit="widen"), PrecisionReducer(mode="exact")])
def test_scikit_learns_own_checks(estimator, check):
    if "array_api" in str(check) and "SCIPY_ARRAY_API" not in os.environ:  # to be set before SciPy is imported
        code = (
            "import halfstep.sklearn, sklearn.utils.estimator_checks as checks\n"
            f"checks.{check.func.__name__}('reducer', halfstep.sklearn.{estimator!r}, **{check.keywords!r})\n"
            "print('ok')"
        )
        assert run_python(code, SCIPY_ARRAY_API="1") == "ok\n"
    else:
        check(estimator)


def test_import_takes_neither_torch_nor_scikit_learn():
    code = (
        "import sys, halfstep.sklearn as door\n"
        "print(sorted({'torch', 'sklearn'} & set(sys.modules)), 'PrecisionReducer' in dir(door))\n"
        "door.PrecisionReducer\n"
        "print(sorted({'torch', 'sklearn'} & set(sys.modules)))"
    )
    assert run_python(code) == "[] True\n['sklearn']\n"


def test_decisions_are_the_optimizers():
    generator = np.random.default_rng(0)
    for X in (
        generator.normal(size=(50, 3)),
        generator.integers(-400, 400, (50, 3)),
        generator.normal(size=(9, 2)) * 1e-42,
    ):
        expected, _ = SklearnPrecisionOptimizer().optimize_data_precision(X)
        result = PrecisionReducer().fit_transform(X)
        assert result.dtype == expected.dtype
        assert result.tobytes() == expected.tobytes()
    assert PrecisionReducer().fit(X).dtypes_ == np.float64
    assert PrecisionReducer(mode="force").fit(X).dtypes_ == np.float32
    assert PrecisionReducer(enable_int_downcasting=False).fit([[1, 2]]).dtypes_ == np.int64
    assert PrecisionReducer(enable_float32_reduction=False).fit([[1.5, 2]]).dtypes_ == np.float64


def test_transform_keeps_to_the_dtypes_of_fit():
    reducer = PrecisionReducer().fit(np.array([[1, 300], [2, 4]]))
    assert reducer.dtypes_ == np.int16
    for other in ([[1, 2]], [[1.0, -0.0]], [[True, False]], np.array([[1, 2]], ">i8"), np.array([[1, 2]], np.uint8)):
        result = reducer.transform(other)
        assert result.dtype == np.int16
        assert np.array_equal(result, np.asarray(other))
    floats = PrecisionReducer().fit([[1.5, np.nan]])
    assert floats.dtypes_ == np.float32
    assert floats.transform([[1, 2]]).dtype == np.float32
    assert floats.transform([[0.1, np.inf]]).tolist() == [[float(np.float32(0.1)), np.inf]]
    wide = PrecisionReducer().fit([[1e300]])
    assert wide.transform(np.ones((1, 1), np.float32)).dtype == np.float64
    assert PrecisionReducer().fit(np.array([[1e300]], ">f8")).transform([[2.0]]).dtype == np.dtype("=f8")


MISFITS = [
    ([[1, 2], [3, 4]], [[1, 2], [3, 200]], "column 1, row 1: int8.* does not hold 200"),
    ([[1, 2], [3, 4]], [[1, 2], [-129, 4]], "column 0, row 1: int8.* does not hold -129"),
    ([[1, 2], [3, 4]], [[1, 2], [3, 4.5]], "column 1, row 1: int8.* does not hold 4.5"),
    ([[1, 2], [3, 4]], [[1, np.nan]], "column 1, row 0: int8.* does not hold nan"),
    ([[1, 2], [3, 2**40]], [[1, 2.0**63]], "column 1, row 0: int64.* does not hold 9.2"),
    (
        [[1, 2], [3, 4]],
        np.array([[0, 2**64 - 1]], np.uint64),
        "column 1, row 0: int8.* does not hold 18446744073709551615",
    ),
    (np.array([[1, 2]], np.uint64), [[3, -1]], "column 1, row 0: uint8.* does not hold -1"),
    ([[True, False]], [[1, 2]], "column 1, row 0: bool.* does not hold 2"),
    ([[1.5, 2]], [[1.0, 2], [1e300, 2]], "column 0, row 1: 1e.300 is larger than float32 holds"),
    ([[1.5, 2]], [[1.0, 1e-300]], "column 1, row 0: 1e-300 is so small"),
    ([[1.5, 2]], [[1, 2**60 + 1]], "column 1, row 0: float32.* does not hold 1152921504606846977"),
    ([[1.5, 2.0]], [[1.5, 16777217.0]], "column 1, row 0: all values are integers"),
]


@pytest.mark.parametrize(("first", "later", "message"), MISFITS)
def test_misfits_raise_or_widen(first, later, message):
    later = np.array(later)
    before = later.copy()
    with pytest.raises(ValueError, match=message):
        PrecisionReducer().fit(first).transform(later)
    widening = PrecisionReducer(on_misfit="widen").fit(first)
    with pytest.warns(UserWarning, match=message) as caught:
        result = widening.transform(later)
    assert caught[0].filename == __file__
    assert result.dtype == later.dtype
    assert result.tobytes() == before.tobytes() == later.tobytes()
    assert widening.dtypes_ == PrecisionReducer().fit(first).dtypes_  # transform changes nothing


def test_columns_of_integers_stay_exact_and_others_round():
    reducer = PrecisionReducer().fit([[1.5, 3.0]])
    assert reducer.transform([[16777217.0, 3.0], [0.5, 1.0]]).dtype == np.float32  # column 0 is none of integers
    with pytest.raises(ValueError, match="column 1, row 1"):
        reducer.transform([[0.5, 1.0], [1.0, 16777217.0]])


def test_pandas_columns_get_their_own_dtypes():
    data, before = frame(), frame()
    reducer = PrecisionReducer().fit(data)
    assert reducer.dtypes_ == {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
    assert reducer.get_feature_names_out().tolist() == list(DTYPES)
    assert [column.column for column in reducer.report_.columns] == list(DTYPES)
    result = reducer.transform(data)
    assert list(map(str, result.dtypes)) == ["int16", "float32", "bool", "Int8", "int8[pyarrow]", "float64"]
    pd.testing.assert_frame_equal(result, before, check_dtype=False)
    pd.testing.assert_frame_equal(data, before)
    small = data.head(1).astype({"masked": "int64", "count": "float64"})
    assert list(map(str, reducer.transform(small).dtypes)) == [
        "int16", "float32", "bool", "int8", "int8[pyarrow]", "float64",
    ]  # fmt: skip


def test_pandas_missing_values_do_not_decide():
    reducer = PrecisionReducer().fit(frame())
    later = frame().assign(
        masked=pd.array([None] * 3, dtype="Int64"), arrow=pd.array([None, 5, None], "double[pyarrow]")
    )
    result = reducer.transform(later)
    assert str(result["masked"].dtype) == "Int8"
    assert result["masked"].isna().all()
    assert str(result["arrow"].dtype) == "int8[pyarrow]"
    assert result["arrow"].tolist()[1] == 5
    later["arrow"] = pd.array([None, None, 500], dtype="int64[pyarrow]")
    with pytest.raises(ValueError, match="column 'arrow', row 2: int8.* does not hold 500"):
        reducer.transform(later)
    reducer.set_params(on_misfit="widen")
    with pytest.warns(UserWarning, match="column 'arrow', row 2"):
        widened = reducer.transform(later)
    assert list(map(str, widened.dtypes)) == ["int16", "float32", "bool", "Int8", "int64[pyarrow]", "float64"]


def test_polars_columns_get_their_own_dtypes():
    data = pl.DataFrame(
        {
            "i": [1, None, 300],
            "f": [0.5, None, 2.0],
            "b": [True, None, False],
            "none": pl.Series([None] * 3, dtype=pl.Int64),
        }
    )
    before = data.clone()
    reducer = PrecisionReducer().fit(data)
    assert {name: str(dtype) for name, dtype in reducer.dtypes_.items()} == {
        "i": "int16", "f": "float32", "b": "bool", "none": "int64",
    }  # fmt: skip
    result = reducer.transform(data)
    assert result.dtypes == [pl.Int16, pl.Float32, pl.Boolean, pl.Int64]
    assert result.equals(data)
    assert data.equals(before)
    assert data.dtypes == before.dtypes
    later = pl.DataFrame({"i": [1.0, None], "f": [1, None], "b": [1, None], "none": [None, 5]}).with_columns(
        f=pl.Series([None, None], dtype=pl.Float64)
    )
    result = reducer.transform(later)
    assert result.dtypes == [pl.Int16, pl.Float32, pl.Boolean, pl.Int64]
    assert result["b"].to_list() == [True, None]
    with pytest.raises(ValueError, match="column 'i', row 2: int16.* does not hold 40000"):
        reducer.transform(data.with_columns(i=pl.Series([None, 1, 40000])))


def test_frames_and_arrays_mix():
    data = pd.DataFrame({"a": [1, 2], "b": [0.5, 300.25]})
    reducer = PrecisionReducer().fit(data)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        result = reducer.transform(data.to_numpy())
    assert type(result) is np.ndarray
    assert result.dtype == np.float32  # holds int8 and float32
    reducer = PrecisionReducer().fit(data.to_numpy())
    with pytest.warns(UserWarning, match="has feature names"):
        result = reducer.transform(data)
    assert type(result) is np.ndarray
    assert result.dtype == np.float32
    numbered = pd.DataFrame([[1, 2.5]])
    assert list(map(str, PrecisionReducer().fit_transform(numbered).dtypes)) == ["int8", "float32"]


@pytest.mark.parametrize("wanted", ["pandas", "polars"])
@pytest.mark.parametrize("given", ["pandas", "polars", "array"])
def test_set_output(wanted, given):
    data = {"a": [1, 2, 3], "b": [0.5, 1.5, 2.5]}
    X = {"pandas": pd.DataFrame(data, index=[4, 5, 6]), "polars": pl.DataFrame(data)}.get(given)
    X = np.array([[1, 2], [3, 4], [5, 6]]) if X is None else X
    result = PrecisionReducer().set_output(transform=wanted).fit_transform(X)
    assert type(result) is {"pandas": pd.DataFrame, "polars": pl.DataFrame}[wanted]
    assert list(result.columns) == (["x0", "x1"] if given == "array" else ["a", "b"])
    expected = ["int8", "int8"] if given == "array" else ["int8", "float32"]
    assert [str(result[name].to_numpy().dtype) for name in result.columns] == expected
    if wanted == given == "pandas":
        assert result.index.tolist() == [4, 5, 6]


def test_what_stays_is_not_the_callers_frame():
    data = pd.DataFrame({"a": np.array([1, 2], np.int8)})
    data.columns.name = "mine"
    result = PrecisionReducer().set_output(transform="pandas").fit_transform(data)
    assert result is not data
    assert data.columns.name == "mine"
    array = np.array([[1, 2]], np.int8)
    assert PrecisionReducer().fit_transform(array) is array


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
def test_sparse(form):
    dense = np.where(np.eye(6), 0.1, 0.0)
    X = sp.csr_array(dense).asformat(form)
    reducer = PrecisionReducer().fit(X)
    result = reducer.transform(X)
    assert reducer.dtypes_ == result.dtype == np.float32
    assert np.array_equal(result.toarray(), dense.astype(np.float32))
    assert X.dtype == np.float64
    assert reducer.transform(dense).dtype == np.float32
    assert PrecisionReducer().fit(dense).transform(X).dtype == np.float32
    with pytest.raises(ValueError, match="1e-300 is so small"):
        reducer.transform(sp.csr_array(dense * 1e-299).asformat(form))


def test_sparse_indices_become_int32():
    X = sp.csr_array(np.eye(4) * 0.5)
    X.indices, X.indptr = X.indices.astype(np.int64), X.indptr.astype(np.int64)
    result = PrecisionReducer().fit_transform(X)
    assert result.indices.dtype == result.indptr.dtype == np.int32
    assert X.indices.dtype == np.int64


BAD = [
    (pd.DataFrame({"s": ["a"]}), "column 's' has dtype .*, expected numbers"),
    (pd.DataFrame({"d": pd.to_datetime(["2020-01-01"])}), "column 'd' has dtype datetime64"),
    (pd.DataFrame({"c": [1j]}), "column 'c' has dtype complex128"),
    (pd.DataFrame({"k": pd.Categorical([1])}), "column 'k' has dtype category"),
    (pd.DataFrame({"o": pd.Series([{}], dtype=object)}), "column 'o' has objects that are no numbers"),
    (pd.DataFrame([[1, 2]], columns=[3, 3]), "columns of the same name: \\[3\\]"),
    (pd.DataFrame({"a": []}), "0 sample\\(s\\)"),
    (pd.DataFrame(index=[1, 2]), "0 feature\\(s\\)"),
    (pl.DataFrame({"s": ["a"]}), "column 's' has dtype String"),
    (pl.DataFrame({"i": pl.Series([1], dtype=pl.Int128)}), "column 'i' has dtype Int128"),
    (np.array([["a"]]), "numeric"),
    (np.array([[1j]]), "Complex data not supported"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_what_is_no_number_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        PrecisionReducer().fit(data)


def test_objects_that_are_numbers():
    data = pd.DataFrame({"o": pd.Series([1, 2.5, None], dtype=object)})
    result = PrecisionReducer().fit_transform(data)
    assert result["o"].dtype == np.float32
    assert data["o"].dtype == object


def test_bad_parameters_are_refused_in_fit():
    for name, value in (("mode", "fast"), ("on_misfit", "clip"), ("n_jobs", 0)):
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            PrecisionReducer(**{name: value}).fit([[1]])
    with pytest.raises(TypeError, match="enable_int_downcasting"):
        PrecisionReducer(enable_int_downcasting=1).fit([[1]])
    with pytest.raises(NotFittedError):
        PrecisionReducer().transform([[1]])


def test_clone_and_pickle():
    reducer = PrecisionReducer(mode="exact", on_misfit="widen", n_jobs=-1).fit(frame())
    assert clone(reducer).get_params() == reducer.get_params()
    assert not hasattr(clone(reducer), "dtypes_")
    again = pickle.loads(pickle.dumps(reducer))
    assert again.dtypes_ == reducer.dtypes_
    assert again.report_ == reducer.report_
    pd.testing.assert_frame_equal(again.transform(frame()), reducer.transform(frame()))


def test_pipelines():
    X, y = load_breast_cancer(return_X_y=True)
    forest = RandomForestClassifier(5, random_state=0)
    plain = clone(forest).fit(X, y)
    pipeline = make_pipeline(PrecisionReducer(), forest).fit(X, y)
    assert np.array_equal(plain.predict_proba(X), pipeline.predict_proba(X))
    linear = make_pipeline(PrecisionReducer(), StandardScaler(), LogisticRegression()).fit(X, y)
    assert linear[:-1].transform(X).dtype == np.float32
    assert linear.score(X, y) > 0.98


def test_column_transformer():
    data = frame().assign(kind=["x", "y", "x"])
    numbers = make_column_selector(dtype_include="number")
    encoder = OneHotEncoder(sparse_output=False, dtype=np.int8)
    columns = make_column_transformer((PrecisionReducer(), numbers), (encoder, ["kind"]))
    with pytest.raises(ValueError, match=r"pandas.NA"):  # scikit-learn refuses these in an array, which is its default
        columns.fit_transform(data)
    result = columns.fit_transform(data.drop(columns=["masked", "arrow"]))
    assert type(result) is np.ndarray
    assert result.tolist()[2] == [300, 2.0, 2.0, 1, 0]
    result = columns.set_output(transform="pandas").fit_transform(data)
    assert result.shape == (3, 7)
    assert list(map(str, result.dtypes)) == ["int16", "float32", "Int8", "int8[pyarrow]", "float64", "int8", "int8"]
    assert result.index.tolist() == [7, 8, 9]


def test_grid_search_in_other_processes():
    X, y = load_digits(return_X_y=True)
    SklearnPrecisionOptimizer().optimize_data_precision(np.tile(X, (20, 1)))  # the parent has used threads
    pipeline = make_pipeline(PrecisionReducer(), RandomForestClassifier(3, random_state=0))
    grid = {"precisionreducer__mode": ["rtol", "exact"], "randomforestclassifier__max_depth": [3, 6]}
    here = GridSearchCV(pipeline, grid, cv=2).fit(X, y)
    there = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(X, y)
    assert here.cv_results_["mean_test_score"].tolist() == there.cv_results_["mean_test_score"].tolist()
    with joblib.parallel_backend("multiprocessing", n_jobs=2):
        forked = GridSearchCV(pipeline, grid, cv=2).fit(X, y)
    assert here.cv_results_["mean_test_score"].tolist() == forked.cv_results_["mean_test_score"].tolist()


def test_forked_workers_after_threads_in_the_parent():
    code = (
        "import multiprocessing, numpy as np\n"
        "from halfstep.sklearn import PrecisionReducer\n"
        "X = np.random.default_rng(0).normal(size=(400_000, 8))\n"
        "reducer = PrecisionReducer(n_jobs=4).fit(X)\n"
        "expected = reducer.transform(X)\n"
        "def work(i): return np.array_equal(reducer.transform(X), expected)\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    print(pool.map_async(work, range(4)).get(timeout=120))\n"
    )
    assert run_python(code) == "[True, True, True, True]\n"


def test_integers_keep_their_value_in_columns_that_were_fractions() -> None:
    reducer = PrecisionReducer().fit(np.array([[0.5], [1.25]]))
    assert reducer.transform(np.array([[2**24]])).dtype == np.float32
    with pytest.raises(ValueError, match=r"float32 does not hold 16777217.*on_misfit=\"widen\""):
        reducer.transform(np.array([[2**24 + 1]]))


def test_integers_with_missing_values_stay_integers_on_their_way_to_pandas() -> None:
    frame = pl.DataFrame({"a": [2**60 + 1, None], "b": [True, None]})
    result = PrecisionReducer().set_output(transform="pandas").fit_transform(frame)
    assert [str(dtype) for dtype in result.dtypes] == ["Int64", "boolean"]
    assert result["a"][0] == 2**60 + 1
    assert result.isna().to_numpy().tolist() == [[False, False], [True, True]]


def test_integers_among_objects_keep_their_value() -> None:
    frame = pd.DataFrame({"a": np.array([2**60 + 1, 3], dtype=object)})
    assert PrecisionReducer().fit_transform(frame)["a"].tolist() == [2**60 + 1, 3]
