"""`python -m halfstep shrink`: npy, csv and parquet, and what can be wrong with them."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def shrink(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run `python -m halfstep shrink` in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(run, "shrink")


TABLE = pd.DataFrame({"id": [70000, 2, 3], "x": [0.5, 1.5, np.nan], "day": ["a", "b", "c"], "big": [1e39, 1.5, 2.0]})


def test_npy(shrink) -> None:
    X = np.random.default_rng(0).normal(size=(100, 3))
    np.save("x.npy", np.asfortranarray(X))
    code, out, err = shrink("x.npy")
    assert (code, err) == (0, "")
    assert "float64  float32" in out
    assert out.endswith("written to x-small.npy\n")
    small = np.load("x-small.npy")
    assert small.dtype == np.float32
    assert np.array_equal(small, X.astype(np.float32))


def test_parquet_and_csv(shrink) -> None:
    TABLE.to_parquet("t.parquet")
    TABLE.to_csv("t.csv", index=False)
    for line, result in ((("t.parquet",), "t-small.parquet"), (("t.csv", "-o", "c.parquet"), "c.parquet")):
        code, out, _ = shrink(*line)
        assert code == 0
        assert "1e+39 is larger than float32 holds" in out
        small = pd.read_parquet(result)
        types = [str(field.type) for field in pq.read_schema(result)]
        assert types[:2] == ["int32", "float"]
        assert types[3] == "double"
        for name in ("id", "x", "big"):
            assert np.array_equal(small[name].to_numpy(float), TABLE[name].to_numpy(float), equal_nan=True)
        assert small["day"].tolist() == ["a", "b", "c"]
    assert "expected .parquet" in shrink("t.csv", "-o", "again.csv")[2], (
        "text of float32 numbers would be other numbers"
    )


def test_integers_beside_missing_values_stay(shrink) -> None:
    table = pa.table({"id": [2**53 + 1, None, 1], "u": pa.array([1, None, 3], pa.int8())})
    pq.write_table(table, "t.parquet")
    Path("t.csv").write_text(f"id,u\n{2**53 + 1},1\n,\n1,3\n")
    for source in ("t.parquet", "t.csv"):
        assert shrink(source, "--force")[0] == 0
        small = pq.read_table("t-small.parquet")
        assert small["id"].to_pylist() == [2**53 + 1, None, 1]
        assert str(small["u"].type) == "int8"


def test_options(shrink) -> None:
    TABLE.to_parquet("t.parquet")
    assert shrink("t.parquet", "--exclude", "id", "--exclude", "x")[0] == 0
    assert [str(field.type) for field in pq.read_schema("t-small.parquet")][:2] == ["int64", "double"]
    X = np.array([[0.1, 1.0], [0.5, 2.0]])
    np.save("x.npy", X)
    code, out, _ = shrink("x.npy", "--mode", "exact", "--dry-run")
    assert code == 0
    assert "float32 does not hold 0.1" in out
    assert not Path("x-small.npy").exists()
    assert shrink("x.npy", "--exclude", "0")[0] == 0
    assert np.load("x-small.npy").dtype == np.float64, "a column that is left out keeps its 0.1"


def test_existing_files_are_kept(shrink) -> None:
    np.save("x.npy", np.ones(3))
    Path("x-small.npy").write_text("mine")
    code, out, err = shrink("x.npy")
    assert (code, out, err) == (1, "", "x-small.npy exists: --force replaces it\n")
    assert Path("x-small.npy").read_text() == "mine"
    assert shrink("x.npy", "--force")[0] == 0
    assert np.load("x-small.npy").dtype == np.float32
    before = Path("x.npy").read_bytes()
    assert shrink("x.npy", "-o", "x.npy", "--force")[2] == "x.npy is the source itself\n"
    assert Path("x.npy").read_bytes() == before


def test_what_is_wrong(shrink) -> None:
    Path("x.txt").write_text("1")
    assert "its suffix is '.txt', expected one of .npy, .csv, .parquet" in shrink("x.txt")[2]
    assert "No such file" in shrink("nothing.npy")[2]
    np.save("x.npy", np.ones(3))
    assert "its suffix is '.csv', expected .npy" in shrink("x.npy", "-o", "x.csv")[2]
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    code, _, err = shrink("objects.npy")
    assert code == 1
    assert "Python objects" in err
    TABLE.to_parquet("t.parquet")
    code, _, err = shrink("t.parquet", "--exclude", "nothing")
    assert code == 1
    assert "include or exclude name ['nothing']" in err
    Path("bad.npy").write_bytes(b"\x93NUMPY\x01\x00")
    assert shrink("bad.npy")[0] == 1
    Path("bad.parquet").write_bytes(b"PAR1")
    assert shrink("bad.parquet")[0] == 1
    assert sorted(path.name for path in Path().iterdir()) == [
        "bad.npy", "bad.parquet", "objects.npy", "t.parquet", "x.npy", "x.txt",
    ]  # fmt: skip


def test_it_needs_no_torch(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    shim = Path(__file__).resolve().parents[2] / "python_shim"
    code = (
        f"import sys; sys.path.insert(0, {str(shim)!r}); sys.modules['torch'] = None\n"
        f"sys.argv = ['halfstep', 'shrink', {str(tmp_path / 'x.npy')!r}]\n"
        "from halfstep.__main__ import main; raise SystemExit(main())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "x-small.npy").dtype == np.float32
