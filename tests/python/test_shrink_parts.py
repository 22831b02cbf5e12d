"""Masked and structured arrays, and sparse matrices: each part by itself, and the whole still works."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from halfstep.sklearn import SklearnPrecisionOptimizer
from numpy import ma

ID = 2.0**24 + 1  # an integer that float32 does not hold


def shrink(X, **options):
    return SklearnPrecisionOptimizer(**options).optimize_data_precision(X)[0]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


# -------------------------------------------------------------------------------------------------------------- masked


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("bad", [1e300, 1e-300, np.inf, np.nan])
def test_values_below_a_mask_do_not_decide(bad: float, order: str) -> None:
    data = np.asarray(numbers(3000, 3), order=order)
    mask = np.zeros(data.shape, bool)
    data[2999, 1], mask[2999, 1] = bad, True
    array = ma.MaskedArray(data, mask=mask)
    before = data.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = shrink(array)
    assert type(result) is ma.MaskedArray
    assert result.dtype == np.float32
    assert np.array_equal(result.mask, mask)
    assert np.array_equal(result.compressed(), array.compressed().astype(np.float32))
    assert data.tobytes() == before
    assert not np.shares_memory(result.data, data)
    data[5, 1] = 1e300  # and one that is not masked
    assert shrink(array) is array


def test_values_below_a_mask_do_not_hide_integers_or_a_small_spread() -> None:
    """One fraction below the mask must not make measurements of identifiers, nor one value a spread."""
    ids = ma.MaskedArray([ID, ID + 2, 0.5], mask=[False, False, True])
    assert shrink(ids) is ids
    stamps = ma.MaskedArray([1.7e9 + 0.25, 1.7e9 + 60.25, -1.7e9], mask=[False, False, True])
    assert shrink(stamps) is stamps


def test_a_value_of_another_column_does_not_stand_in_for_a_masked_one() -> None:
    array = ma.MaskedArray([[0.5, ID], [1.5, ID + 2], [2.5, 9.0]], mask=[[0, 0], [0, 0], [0, 1]])
    assert shrink(array) is array


def test_an_element_that_is_unmasked_again_is_what_it_was() -> None:
    for data in (np.array([0.5, 0.1, 2.5]), np.array([1, 100, 3])):
        result = shrink(ma.MaskedArray(data, mask=[False, True, False]))
        result.mask = ma.nomask
        assert np.array_equal(np.asarray(result), data.astype(result.dtype))


def test_masked_integers_and_complex_numbers() -> None:
    integers = ma.MaskedArray([1, 2, 999999], mask=[0, 0, 1])
    result = shrink(integers)
    assert result.dtype == np.int8
    assert result.compressed().tolist() == [1, 2]
    complexes = ma.MaskedArray([1 + 2j, 0.1j], mask=[False, True])
    result = shrink(complexes, mode="exact")
    assert result.dtype == np.complex64
    assert result.compressed().tolist() == [1 + 2j]
    y = SklearnPrecisionOptimizer().optimize_data_precision(np.ones(3), integers)[1]
    assert (type(y), y.dtype) == (ma.MaskedArray, np.int32)


def test_fill_values_masks_and_their_hardness() -> None:
    soft = ma.MaskedArray([1.5, 2.5], mask=[False, True], fill_value=7.5)
    result = shrink(soft)
    assert (result.fill_value, result.hardmask) == (7.5, False)
    hard = ma.MaskedArray([1.5, 2.5], mask=[False, True], hard_mask=True)
    result = shrink(hard)
    assert result.hardmask
    result[1] = 9.0
    assert result.mask.tolist() == [False, True]
    bare = ma.MaskedArray([1.5, 2.5])
    assert shrink(bare).mask is ma.nomask
    for array in (ma.MaskedArray([1.5, 2.5], fill_value=1e300), ma.MaskedArray([1, 2], fill_value=999999)):
        result = shrink(array)
        assert result.fill_value == ma.MaskedArray([1], dtype=result.dtype).fill_value  # the old one does not exist
        assert result.filled().dtype == result.dtype
    result = shrink(soft)
    result[0] = ma.masked
    assert soft.mask.tolist() == [False, True]


@pytest.mark.parametrize(
    "array",
    [
        ma.MaskedArray([1e300, 2.5], mask=True),
        ma.MaskedArray(np.empty((0, 3))),
        ma.MaskedArray(["a", "b"], mask=[True, False]),
        ma.MaskedArray(np.ones(2, [("a", "f8")])),
        ma.MaskedArray([1.5], dtype=np.float32),
    ],
    ids=str,
)
def test_masked_arrays_that_stay(array: ma.MaskedArray) -> None:
    assert shrink(array) is array


def test_masked_arrays_of_no_dimension_and_a_report_without_doubles() -> None:
    assert shrink(ma.MaskedArray(1.5)).dtype == np.float32
    report = SklearnPrecisionOptimizer().plan(ma.MaskedArray([[1e300, 1.5]], mask=[[True, False]]))
    assert [(column.column, column.after) for column in report.columns] == [(0, "float32"), (1, "float32")]


def test_a_masked_test_set_that_fits_gives_no_warning() -> None:
    optimizer = SklearnPrecisionOptimizer()
    optimizer.optimize_data_precision(ma.MaskedArray([0.5, 1.5], mask=[False, True]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.optimize_data_precision(ma.MaskedArray([0.5, 1e300], mask=[0, 1]))[0].dtype == np.float32
    with pytest.warns(UserWarning, match="float32 before, float64 now"):
        optimizer.optimize_data_precision(ma.MaskedArray([1e300, 0.5], mask=[0, 1]))


# ---------------------------------------------------------------------------------------------------------- structured

FIELDS = [("x", "f8"), ("n", "i8"), ("name", "U3"), ("m", "f8", (2, 3)), ("blocked", "f8"), ("v", "u4", (4,))]
SMALL = [("x", "f4"), ("n", "i2"), ("name", "U3"), ("m", "f4", (2, 3)), ("blocked", "f8"), ("v", "u1", (4,))]


def structured(dtype, *shape: int) -> np.ndarray:
    array = np.zeros(shape, dtype)
    array["x"], array["n"], array["name"] = numbers(*shape), 300, "abc"
    array["m"], array["v"], array["blocked"] = numbers(*shape, 2, 3), 200, 1e300
    return array


@pytest.mark.parametrize("shape", [(3000,), (40, 30), (), (1,)])
@pytest.mark.parametrize("form", ["packed", "aligned", "with gaps", "other byte order", "every second"])
def test_each_field_of_a_structure(form: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(FIELDS, align=form == "aligned")
    if form == "with gaps":
        names = [field[0] for field in FIELDS]
        offsets = [16 * i + dtype.fields[name][1] for i, name in enumerate(names)]
        dtype = np.dtype({"names": names, "formats": [dtype.fields[n][0] for n in names], "offsets": offsets})
    array = structured(dtype.newbyteorder(">") if form == "other byte order" else dtype, *shape)
    if form == "every second" and shape:
        array = array.repeat(2, axis=0)[::-2]
    array.flags.writeable = False
    before = array.copy()
    optimizer = SklearnPrecisionOptimizer()
    planned = optimizer.plan(array)
    result = optimizer.optimize_data_precision(array)[0]
    wanted = np.dtype(SMALL, align=form == "aligned")
    assert result.dtype.names == wanted.names
    assert all(result.dtype[name] == wanted[name] for name in ("x", "n", "m", "v"))
    assert result.dtype.itemsize == wanted.itemsize
    assert result.shape == array.shape
    for name in wanted.names:
        assert np.array_equal(result[name], array[name].astype(wanted[name].base))
    assert result.flags.writeable
    assert np.array_equal(array, before)
    assert optimizer.report() == planned
    assert [column.column for column in planned.columns] == list(wanted.names)
    assert planned.columns[3].bytes_before == 2 * planned.columns[3].bytes_after == array["m"].nbytes


def test_fields_that_are_left_out_and_fields_of_fields() -> None:
    array = np.ones(5, [("a", "f8"), ("inner", [("x", "f8"), ("n", "i8")]), ("c", "i8")])
    optimizer = SklearnPrecisionOptimizer(exclude=["a"])
    result = optimizer.optimize_data_precision(array)[0]
    assert result.dtype == [("a", "f8"), ("inner", [("x", "f8"), ("n", "i8")]), ("c", "i1")]
    assert result.tolist() == array.tolist()
    assert [column.blocked for column in optimizer.report().columns] == ["left out", "it is a structure", ""]


def test_titles_and_objects_stay() -> None:
    array = np.ones(2, [(("Length in m", "a"), "f8"), ("b", "i8"), ("o", "O")])
    array["o"] = [{}, "text"]
    for options in ({}, {"memory_threshold_mb": 0}):  # objects do not live in files
        result = shrink(array, **options)
        assert result.dtype == [(("Length in m", "a"), "f4"), ("b", "i1"), ("o", "O")]
        assert result["Length in m"].tolist() == [1.0, 1.0]
        assert result["o"].tolist() == [{}, "text"]
        assert not isinstance(result, np.memmap)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(0, FIELDS),
        np.zeros((3, 0), FIELDS),
        np.zeros(3, [("a", "f4"), ("b", "S2")]),
        np.zeros(3, [("a", "f8", (0,)), ("b", "f8", (0, 2))]),
        np.full(3, 1e300, [("a", "f8")]),
    ],
    ids=str,
)
def test_structures_that_stay(array: np.ndarray) -> None:
    assert shrink(array) is array


def test_later_structures_keep_what_their_values_need() -> None:
    optimizer = SklearnPrecisionOptimizer()
    dtype = [("a", "f8"), ("b", "i8")]
    assert optimizer.optimize_data_precision(np.array([(0.5, 2)], dtype))[0].dtype == [("a", "f4"), ("b", "i1")]
    wide = np.array([(1e300, 2000)], dtype)
    with pytest.warns(UserWarning, match="does not fit"):
        result = optimizer.optimize_data_precision(wide)[0]
    assert result.dtype == [("a", "f8"), ("b", "i2")]
    assert result.tolist() == [(1e300, 2000)]
    cubes = SklearnPrecisionOptimizer()
    for shape in ((4, 5, 6), (4, 5, 7), (4, 6)):  # of a structure each row has as many columns
        assert cubes.optimize_data_precision(np.ones(shape, dtype))[0].dtype == [("a", "f4"), ("b", "i1")]
    other = np.array([(2, 0.5)], [("a", "i8"), ("b", "f8")])  # the same names and sizes, other fields
    assert optimizer.optimize_data_precision(other)[0].dtype == [("a", "i1"), ("b", "f4")]


# -------------------------------------------------------------------------------------------------------------- sparse

FORMATS = ["csr", "csc", "coo", "bsr", "dia"]


def sparse(form: str, kind: str, index: type = np.int64):
    dense = np.where(np.random.default_rng(1).random((60, 40)) < 0.2, numbers(60, 40), 0)
    coo = (sp.coo_array if kind == "array" else sp.coo_matrix)(dense)
    matrix = coo.asformat(form) if form != "bsr" else coo.tobsr(blocksize=(2, 2))
    return with_indices(matrix, index)


def with_indices(matrix, index: type):
    if matrix.format == "coo":
        matrix.coords = tuple(part.astype(index) for part in matrix.coords)
    else:
        for name in ("offsets",) if matrix.format == "dia" else ("indices", "indptr"):
            setattr(matrix, name, getattr(matrix, name).astype(index))
    return matrix


def index_arrays(matrix) -> list[np.ndarray]:
    if matrix.format == "coo":
        return list(matrix.coords)
    return [matrix.offsets] if matrix.format == "dia" else [matrix.indices, matrix.indptr]


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_sparse_format(form: str, kind: str, index: type) -> None:
    matrix = sparse(form, kind, index)
    before = [array.tobytes() for array in (matrix.data, *index_arrays(matrix))]
    optimizer = SklearnPrecisionOptimizer()
    planned = optimizer.plan(matrix)
    result = optimizer.optimize_data_precision(matrix)[0]
    assert optimizer.report() == planned
    assert type(result) is type(matrix)
    assert result.data.dtype == np.float32
    assert [array.dtype for array in index_arrays(result)] == [np.int32] * len(before[1:])
    wanted = matrix.toarray().astype(np.float32)
    assert np.array_equal(result.toarray(), wanted)
    for other in FORMATS:
        assert np.array_equal(result.asformat(other).toarray(), wanted)
    vector = numbers(40).astype(np.float32)
    assert (result @ vector).dtype == np.float32
    np.testing.assert_allclose(result @ vector, wanted @ vector, rtol=1e-5, atol=1e-5)
    assert np.array_equal(result.T.toarray(), wanted.T)
    assert np.array_equal((result + result).toarray(), wanted + wanted)
    assert np.array_equal(result.copy().toarray(), wanted)
    if form in ("csr", "csc"):
        assert np.array_equal(result[5:9, ::3].toarray(), wanted[5:9, ::3])
        assert np.array_equal(result[:, [3, 1]].toarray(), wanted[:, [3, 1]])
    assert [array.tobytes() for array in (matrix.data, *index_arrays(matrix))] == before
    for mine in (result.data, *index_arrays(result)):
        assert mine.flags.writeable
        assert not any(np.shares_memory(mine, theirs) for theirs in (matrix.data, *index_arrays(matrix)))


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_sorting_the_result_in_place_leaves_the_source_alone(form: str, index: type) -> None:
    make = sp.csr_array if form == "csr" else sp.csc_array
    indices = np.array([2, 0, 1, 1], index)
    matrix = make((np.array([1.5, 2.5, 3.5, 0.0]), indices, np.array([0, 3, 4, 4], index)), shape=(3, 3))
    assert not matrix.has_sorted_indices
    dense = matrix.toarray()
    result = shrink(matrix)
    result.sort_indices()
    result.eliminate_zeros()
    result.sum_duplicates()
    assert np.array_equal(matrix.toarray(), dense)
    assert indices.tolist() == [2, 0, 1, 1]
    assert np.array_equal(result.toarray(), dense)
    assert result.has_sorted_indices
    assert not matrix.has_sorted_indices
    integers = with_indices(make(dense.astype(np.int64)), np.int64)
    result = shrink(integers)
    result.data[:] = 0
    assert integers.toarray().any()


def test_flags_of_order_are_kept() -> None:
    matrix = sparse("csr", "array")
    matrix.sum_duplicates()
    assert matrix.has_canonical_format
    result = shrink(matrix)
    assert result.__dict__["_has_canonical_format"]
    assert result.has_sorted_indices
    twice = sp.coo_array((np.array([0.5, 1.5]), (np.array([1, 1]), np.array([2, 2]))), shape=(3, 3))
    result = shrink(twice)
    assert not result.has_canonical_format
    assert result.tocsr()[1, 2] == 2.0


def test_sparse_values_that_stay() -> None:
    blocked = with_indices(sp.csr_array(np.diag([0.5, 1e300])), np.int64)
    result = shrink(blocked)
    assert (result.data.dtype, result.indices.dtype) == (np.float64, np.int32)
    assert np.array_equal(result.toarray(), blocked.toarray())
    blocked = sp.csr_array(np.diag([0.5, 1e300]))
    assert shrink(blocked) is blocked
    counts = sp.csr_array(np.diag([1, 2]))
    assert shrink(counts) is counts
    assert "products and sums would wrap" in SklearnPrecisionOptimizer().plan(counts).columns[0].blocked
    flags = sp.csr_array(np.diag([True, True]))
    assert shrink(flags) is flags


@pytest.mark.parametrize("form", ["lil", "dok"])
def test_formats_without_arrays_pass_through(form: str) -> None:
    matrix = sparse("csr", "array").asformat(form)
    optimizer = SklearnPrecisionOptimizer()
    assert optimizer.optimize_data_precision(matrix)[0] is matrix
    assert "use tocsr()" in optimizer.report().columns[0].blocked


@pytest.mark.parametrize("form", FORMATS)
def test_a_sparse_matrix_without_values_gets_one_type_of_index(form: str) -> None:
    matrix = with_indices(sp.coo_array((5, 4)).asformat(form), np.int64)
    result = shrink(matrix)
    assert {array.dtype for array in index_arrays(result)} == {np.dtype(np.int32)}
    assert result.toarray().tolist() == np.zeros((5, 4)).tolist()
    assert result.dtype == np.float64


def test_one_dimension_odd_layouts_and_sizes_beyond_int32() -> None:
    line = with_indices(sp.coo_array(np.array([0, 0.5, 0, 1.5])), np.int64)
    result = shrink(line)
    assert (result.shape, result.dtype, result.coords[0].dtype) == ((4,), np.float32, np.int32)
    assert result.toarray().tolist() == [0, 0.5, 0, 1.5]
    blocks = sp.bsr_array(np.kron(np.eye(3), [[1.5, 2], [0, 4]]), blocksize=(2, 2))
    blocks.data = np.asfortranarray(blocks.data)
    assert np.array_equal(shrink(blocks).toarray(), blocks.toarray())
    place = (np.array([0]), np.array([2**31]))
    wide = sp.coo_array((np.array([0.5]), place), shape=(2, 2**31 + 1))
    result = shrink(wide)
    assert (result.dtype, result.coords[1].dtype, result.coords[0].dtype) == (np.float32, np.int64, np.int64)
    assert result.coords[1].tolist() == [2**31]
    edge = sp.coo_array((np.array([0.5]), (np.array([0]), np.array([2**31 - 2]))), shape=(2, 2**31 - 1))
    assert shrink(with_indices(edge, np.int64)).coords[1].dtype == np.int32


def test_columns_of_a_sparse_matrix_cannot_be_left_out() -> None:
    for options in ({"exclude": [0]}, {"include": [1]}):
        with pytest.raises(ValueError, match="include and exclude name columns"):
            shrink(sparse("csr", "array"), **options)


def test_a_tree_that_refuses_int64_indices_takes_the_result() -> None:
    from sklearn.tree import DecisionTreeRegressor

    X, y = sparse("csr", "array"), numbers(60)
    with pytest.raises(ValueError, match="int64"):
        DecisionTreeRegressor().fit(X, y)
    small = shrink(X)
    tree = DecisionTreeRegressor(random_state=0).fit(small, y)
    dense = DecisionTreeRegressor(random_state=0).fit(X.toarray(), y)
    assert np.array_equal(tree.predict(small), dense.predict(X.toarray()))
