"""What fit of each scikit-learn class does with a dense, C-ordered X, by its dtype. Measured with scikit-learn 1.9.1.

tests/python/test_estimator_dtypes.py fits every class in it and counts the arrays as large as X that live at once.
`copies` are X again: converted, centred or ordered otherwise. `work` are other arrays as large as X (temporaries of a
variance, singular vectors, products); these depend on more than dtypes and are told in words, not in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# int8 stands for int16 too, int8 and int32 for their unsigned types and for bool. float16 is not here: some classes
# keep it, some convert it and some fail.
INPUTS = ("float32", "float64", "int8", "int32", "int64", "uint64")
SAME = "same"  # a copy in the dtype of X


@dataclass(frozen=True)
class Kind:
    """The dtypes of the copies, separated by spaces, for each of INPUTS; `why` ends a sentence about the estimator."""

    copies: tuple[str, str, str, str, str, str]
    why: str


def _kind(float32: str, float64: str, integers: str, why: str, **others: str) -> Kind:
    """`others` are the integer types that differ from `integers`."""
    return Kind((float32, float64, *(others.get(each, integers) for each in INPUTS[2:])), why)


KINDS = {
    "float32": _kind("", "float32", "float32", "computes in float32"),
    "float64": _kind("float64", "", "float64", "computes in float64"),
    "float64 twice": _kind(
        "float64 float64", "", "float64 float64", "computes in float64, once to build and once to ask"
    ),
    "float64, copied": _kind("float64", "float64", "float64", "computes in float64, on a copy of its own"),
    "keeps floats": _kind("", "", "float64", "computes in X's float type, on X itself"),
    "copies floats": _kind("float32", "float64", "float64", "computes in X's float type, on a copy"),
    "copies floats, integers twice": _kind(
        "float32", "float64", "float64 float64", "computes in X's float type, on a copy (integers are converted first)"
    ),
    "nonnegative": _kind("float32 float64", "float64", "float64", "solves in float64, after a copy in X's float type"),
    "as it is": _kind("", "", "", "reads X in the type it has"),
    "copied": _kind(SAME, SAME, SAME, "copies X in the type it has"),
    "counts": _kind(
        "float64", "", "int64", "multiplies X by int64 labels, which converts it", int64="", uint64="float64"
    ),
    "categories": _kind("int64", "int64", "int64", "computes in int64", int64=""),
}


@dataclass(frozen=True)
class Fit:
    """One class under given parameters: the name of its kind, and its work arrays, as many for each of INPUTS."""

    kind: str
    work: tuple[str, str, str] = ("", "", "")  # for float32, float64, integers; dtypes separated by spaces
    beyond: str = ""  # a sentence about memory that NumPy does not know of


def _fit(kind: str, work: int = 0, dtype: str | None = None) -> Fit:
    """`work` arrays of `dtype`, by default that of floats, integers being computed with in float64."""
    return Fit(kind, tuple(" ".join([dtype or own] * work) for own in ("float32", "float64", "float64")))


_NODES = "liblinear then holds X once more, outside of NumPy: about 16 bytes for each element that is not 0."
FLOAT32, FLOAT64, KEEPS, COPIES, AS_IT_IS = map(
    _fit, ("float32", "float64", "keeps floats", "copies floats", "as it is")
)


def _copied_if(name: str, copied: Fit, kept: Fit) -> Callable[[Any, int | None, int], Fit]:
    return lambda estimator, columns, elements: copied if getattr(estimator, name) else kept


def _by(name: str, otherwise: Fit, **fits: Fit) -> Callable[[Any, int | None, int], Fit]:
    return lambda estimator, columns, elements: fits.get(str(getattr(estimator, name)).replace("-", "_"), otherwise)


def uses_a_tree(estimator: Any, columns: int | None) -> bool:
    """Whether a search for neighbours builds a tree: "auto" does for up to 15 columns (taken so where unknown)."""
    if estimator.algorithm == "auto":
        return columns is None or columns <= 15
    return estimator.algorithm != "brute"


def _neighbors(estimator: Any, columns: int | None, elements: int) -> Fit:
    return FLOAT64 if uses_a_tree(estimator, columns) else AS_IT_IS


def _dbscan(estimator: Any, columns: int | None, elements: int) -> Fit:
    return Fit("float64 twice") if uses_a_tree(estimator, columns) else KEEPS


def _linear_regression(estimator: Any, columns: int | None, elements: int) -> Fit:
    if estimator.positive:
        return _fit("nonnegative") if estimator.copy_X else FLOAT64
    return COPIES if estimator.copy_X else KEEPS


def _ridge(estimator: Any, columns: int | None, elements: int) -> Fit:
    kind = "copies floats, integers twice" if estimator.copy_X else "keeps floats"
    return Fit(kind, ("float32 float64", "float64", "float64")) if estimator.solver == "svd" else Fit(kind)


def _pca(estimator: Any, columns: int | None, elements: int) -> Fit:
    """Tell by the solver; "auto" takes the covariance for many rows (taken so where the columns are unknown)."""
    solver, tall = estimator.svd_solver, columns is None or (columns <= 1000 and elements // columns >= 10 * columns)
    if solver == "covariance_eigh" or (solver == "auto" and tall):
        return KEEPS
    work = {"arpack": 0, "randomized": 2}.get(solver, 1)
    if estimator.copy:
        return _fit("copies floats, integers twice", work)
    return _fit("keeps floats", work)


def _imputer(estimator: Any, columns: int | None, elements: int) -> Fit:
    if estimator.strategy == "median":
        kind = "copies floats" if estimator.copy else "keeps floats"
        return Fit(kind, ("float32 float32 float64", "float64 float64 float64", "float64 float64 float64"))
    if estimator.strategy == "mean":
        return COPIES if estimator.copy else KEEPS
    return Fit("copied") if estimator.copy else AS_IT_IS


_LASSO = _copied_if("fit_intercept", COPIES, _fit("copies floats", 1))
_SVM = _fit("float64", 1, "float64")  # the support vectors, in the worst case all rows
_MOMENTS = _fit("as it is", 1)
_PROCESS = _copied_if("copy_X_train", _fit("copied", 1, "float64"), _fit("as it is", 1, "float64"))

TABLE: dict[str, Fit | Callable[[Any, int | None, int], Fit]] = {
    **dict.fromkeys(("DecisionTreeClassifier", "DecisionTreeRegressor", "ExtraTreeClassifier"), FLOAT32),
    **dict.fromkeys(("ExtraTreeRegressor", "RandomForestClassifier", "RandomForestRegressor"), FLOAT32),
    **dict.fromkeys(("ExtraTreesClassifier", "ExtraTreesRegressor", "RandomTreesEmbedding"), FLOAT32),
    **dict.fromkeys(("GradientBoostingClassifier", "GradientBoostingRegressor", "IsolationForest"), FLOAT32),
    **dict.fromkeys(("HistGradientBoostingClassifier", "HistGradientBoostingRegressor"), FLOAT64),
    **dict.fromkeys(("SVC", "SVR", "NuSVC", "NuSVR", "OneClassSVM"), _SVM),
    **dict.fromkeys(("LinearSVC", "LinearSVR"), Fit("float64", beyond=_NODES)),
    **dict.fromkeys(("AgglomerativeClustering", "HDBSCAN", "KernelDensity"), FLOAT64),
    "LogisticRegression": _by(
        "solver",
        KEEPS,
        liblinear=Fit("keeps floats", beyond=_NODES),
        newton_cg=_fit("keeps floats", 2),
        newton_cholesky=_fit("keeps floats", 1),
    ),
    "LogisticRegressionCV": _by(
        "solver",
        FLOAT64,
        liblinear=Fit("float64", beyond=_NODES),
        newton_cg=_fit("float64", 2, "float64"),
        newton_cholesky=_fit("float64", 1, "float64"),
    ),
    "LinearRegression": _linear_regression,
    "Ridge": _ridge,
    "RidgeClassifier": _fit("copies floats", 1),
    **dict.fromkeys(("Lasso", "ElasticNet"), _LASSO),
    **dict.fromkeys(("Lars", "LassoLars"), COPIES),
    "OrthogonalMatchingPursuit": Fit("copies floats, integers twice"),
    "HuberRegressor": _fit("keeps floats", 1),
    **dict.fromkeys(("PoissonRegressor", "GammaRegressor", "TweedieRegressor"), KEEPS),
    **dict.fromkeys(("SGDClassifier", "SGDRegressor", "SGDOneClassSVM", "Perceptron"), KEEPS),
    **dict.fromkeys(("KNeighborsClassifier", "KNeighborsRegressor", "NearestNeighbors"), _neighbors),
    **dict.fromkeys(("RadiusNeighborsClassifier", "RadiusNeighborsRegressor"), _neighbors),
    "NearestCentroid": _fit("as it is", 1, "float64"),
    "KMeans": _copied_if("copy_x", _fit("copies floats", 1), _fit("keeps floats", 1)),
    **dict.fromkeys(("MiniBatchKMeans", "Birch"), KEEPS),
    "DBSCAN": _dbscan,
    "PCA": _pca,
    "IncrementalPCA": _copied_if("copy", COPIES, KEEPS),
    "TruncatedSVD": _MOMENTS,
    **dict.fromkeys(("NMF", "MiniBatchNMF"), _fit("keeps floats", 3)),
    "FastICA": _fit("copies floats", 2),
    "FactorAnalysis": _fit("float64, copied", 4, "float64"),
    "StandardScaler": _copied_if("with_std", _fit("keeps floats", 1, "float64"), _fit("keeps floats", 1)),
    "MaxAbsScaler": _fit("keeps floats", 1),
    **dict.fromkeys(("MinMaxScaler", "RobustScaler", "QuantileTransformer"), KEEPS),
    "PowerTransformer": _fit("copies floats", 1, "float64"),
    **dict.fromkeys(("Normalizer", "Binarizer", "PolynomialFeatures", "SplineTransformer"), AS_IT_IS),
    **dict.fromkeys(("KBinsDiscretizer", "OneHotEncoder", "OrdinalEncoder"), AS_IT_IS),
    "SimpleImputer": _imputer,
    "GaussianNB": _MOMENTS,
    **dict.fromkeys(("MultinomialNB", "ComplementNB"), Fit("counts")),
    "CategoricalNB": Fit("categories"),
    **dict.fromkeys(("MLPClassifier", "MLPRegressor", "KernelRidge"), KEEPS),
    **dict.fromkeys(("GaussianProcessClassifier", "GaussianProcessRegressor"), _PROCESS),
    "LinearDiscriminantAnalysis": _by(
        "solver", KEEPS, svd=_fit("keeps floats", 3), eigen=_fit("keeps floats", 1, "float64")
    ),
    "QuadraticDiscriminantAnalysis": AS_IT_IS,
    "GaussianMixture": _fit("keeps floats", 2),
    "EmpiricalCovariance": _fit("as it is", 1, "float64"),
    **dict.fromkeys(("DummyClassifier", "DummyRegressor"), AS_IT_IS),
}
