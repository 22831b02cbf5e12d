"""The estimators of torch.classes.halfstep.Observer against NumPy, by definition, and against torch's observers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_cases import CASES, METHODS, normal, observer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SIDE = 2048
SMALLEST_NORMAL = 2.0**-126


# ------------------------------------------------------------------------------------------------- twins in float64


def twin_histogram(data: np.ndarray) -> tuple[np.ndarray, float]:
    x = data.astype(np.float64)
    x = x[np.isfinite(x)]
    largest = np.abs(x).max(initial=0.0)
    high = 2.0**-126
    while high <= largest:
        high *= 2
    k = np.floor(np.abs(x) / (high / SIDE)).astype(int)
    return np.bincount(np.where(x < 0, SIDE - 1 - k, SIDE + k), minlength=2 * SIDE), high


def twin_parameters(low: float, high: float, symmetric: bool, bits: int) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    scale = float(np.float32(1.0 if scale == 0 else max(scale, SMALLEST_NORMAL)))
    if symmetric:
        return scale, 0
    lowest = -(2 ** (bits - 1))
    return scale, int(np.clip(lowest - np.round(low / scale), lowest, -lowest - 1))


def integer_range(symmetric: bool, bits: int) -> tuple[int, int]:
    levels = 2 ** (bits - 1)
    return (1 - levels if symmetric else -levels), levels - 1


def error_on(data: np.ndarray, weights: np.ndarray, scale: float, zero_point: int, symmetric: bool, bits: int) -> float:
    lowest, highest = integer_range(symmetric, bits)
    q = np.clip(np.round(data / scale) + zero_point, lowest, highest)
    return float((weights * (data - (q - zero_point) * scale) ** 2).sum() / weights.sum())


def divergences(magnitudes: np.ndarray, levels: int) -> dict[int, float]:
    """Of each number of bins kept: Migacz's procedure, step by step."""
    counts = magnitudes.astype(np.float64)
    filled = int(np.nonzero(counts)[0][-1]) + 1
    result = {}
    for bins in range(levels, filled + 1):
        reference = counts[:bins].copy()
        reference[-1] += counts[bins:].sum()
        starts = [level * bins // levels for level in range(levels)]
        totals = np.add.reduceat(counts[:bins], starts)
        used = np.add.reduceat((counts[:bins] > 0).astype(np.float64), starts)
        spread = np.repeat(totals / np.maximum(used, 1), np.diff([*starts, bins]))
        candidate = np.where(counts[:bins] > 0, spread, 0.0)
        p, q = reference / reference.sum(), candidate / max(candidate.sum(), 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p * np.log(p / q), 0.0)
        result[bins] = float(terms.sum())
    return result


# ------------------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("small", "huge")])
def test_histogram(case: str, dtype: torch.dtype) -> None:
    tensor = torch.tensor(CASES[case]).to(dtype)
    data = tensor.double().numpy()
    observer = observer_of(tensor)
    counts, low, high = observer.histogram()
    expected, limit = twin_histogram(data)
    assert (low, high) == (-limit, limit)
    assert np.array_equal(counts.numpy(), expected)
    assert (observer.min(), observer.max()) == (data.min(), data.max())
    assert (observer.count(), observer.nonfinite(), observer.batches()) == (data.size, 0, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_min_max_and_moving_average(case: str, symmetric: bool, bits: int) -> None:
    first, second = CASES[case], CASES[case][: len(CASES[case]) // 2 + 1] * np.float32(0.5)
    observer = observer_of(first, second)
    both = np.concatenate([first, second]).astype(np.float64)
    assert observer.parameters("min_max", symmetric, bits) == twin_parameters(both.min(), both.max(), symmetric, bits)
    low = float(first.min()) + 0.01 * (float(second.min()) - float(first.min()))
    high = float(first.max()) + 0.01 * (float(second.max()) - float(first.max()))
    scale, zero_point = observer.parameters("moving_average", symmetric, bits)
    assert (scale, zero_point) == (pytest.approx(twin_parameters(low, high, symmetric, bits)[0], rel=1e-7), zero_point)
    assert zero_point == twin_parameters(low, high, symmetric, bits)[1]


@pytest.mark.parametrize("percentile", [100.0, 99.99, 99.0, 60.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_percentile(case: str, symmetric: bool, percentile: float) -> None:
    data = np.sort(CASES[case].astype(np.float64))
    observer = observer_of(CASES[case])
    counts, _, limit = observer.histogram()
    width = limit / SIDE
    scale, zero_point = observer.parameters("percentile", symmetric, 8, percentile)
    dropped = (1 - percentile / 100) * data.size

    def reach(outward: np.ndarray) -> tuple[float, float]:
        """Bounds of the end of a side without its `dropped` outermost values, from the sorted data alone."""
        outward = np.concatenate([[0.0], np.sort(outward)])
        share = dropped if symmetric or data[0] >= 0 or data[-1] <= 0 else dropped / 2
        return (
            outward[max(len(outward) - 1 - int(np.ceil(share + 1e-6)), 0)] - 1.001 * width,
            outward[max(len(outward) - 1 - max(int(np.floor(share - 1e-6)), 0), 0)] + 1.001 * width,
        )

    if symmetric or data[0] >= 0 or data[-1] <= 0:
        low, high = reach(np.abs(data[data != 0]))
        assert low <= scale * (127 if symmetric else 255) <= high
    else:
        low, high = reach(data[data > 0])
        assert low - scale <= (127 - zero_point) * scale <= high + scale
        low, high = reach(-data[data < 0])
        assert low - scale <= (zero_point + 128) * scale <= high + scale
    if percentile == 100.0:
        assert (scale, zero_point) == observer.parameters("min_max", symmetric)


def test_percentiles_are_interpolated() -> None:
    """1000 values in one bin of width 1 / 1024: cutting a quarter of them cuts a quarter of the bin."""
    observer = observer_of(torch.cat([torch.full((1000,), 1.0), torch.full((1000,), 1.9999)]))
    scale, _ = observer.parameters("percentile", True, 8, 87.5)
    assert scale * 127 == pytest.approx(2 - 0.25 / 1024, rel=1e-6)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_entropy(case: str, symmetric: bool, bits: int) -> None:
    data = CASES[case].astype(np.float64)
    low, high = min(data.min(), 0.0), max(data.max(), 0.0)
    observer = observer_of(CASES[case])
    counts, limit = twin_histogram(data)
    counts[SIDE] -= int((data == 0).sum())
    magnitudes = counts[SIDE:] + counts[:SIDE][::-1]
    filled = int(np.nonzero(magnitudes)[0][-1]) + 1
    levels = 2**bits if not symmetric and (low == 0 or high == 0) else 2 ** (bits - 1)
    found = divergences(magnitudes, levels)
    least = min(found.values())
    # Any of those that tie to rounding will do.
    allowed = [
        twin_parameters(max(low, -bins * limit / SIDE), min(high, bins * limit / SIDE), symmetric, bits)
        for bins, divergence in found.items()
        if divergence <= least + 1e-9
    ]
    assert filled > levels
    assert observer.parameters("entropy", symmetric, bits) in allowed


def test_entropy_clips_outliers_and_keeps_what_is_narrow() -> None:
    data = normal()
    data[5] = 12.0
    scale, _ = observer_of(data).parameters("entropy", True)
    assert 2 < scale * 127 < 5
    narrow = observer_of(torch.tensor([1.0] * 100 + [1e-3]))
    assert narrow.parameters("entropy", True, 8)[0] * 127 == pytest.approx(1.0)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_mse_is_close_to_the_best_of_a_fine_grid(case: str, symmetric: bool, bits: int) -> None:
    """By the error on the data themselves, over all pairs of ends."""
    data = CASES[case].astype(np.float64)
    unit = np.abs(data).max()
    ones = np.ones_like(data)
    scale, zero_point = observer_of(CASES[case]).parameters("mse", symmetric, bits)
    found = error_on(data, ones, scale, zero_point, symmetric, bits)
    shares = 2.0 ** -np.arange(0, 7, 0.2)
    low, high = min(data.min(), 0.0), max(data.max(), 0.0)
    if symmetric:
        pairs = [(-unit * share, unit * share) for share in 2.0 ** -np.arange(0, 8, 1 / 32)]
    elif low == 0 or high == 0:
        pairs = [(low * share, high * share) for share in 2.0 ** -np.arange(0, 8, 1 / 32)]
    else:
        pairs = [(low * a, high * b) for a in shares for b in shares]
    errors = [error_on(data, ones, *twin_parameters(*pair, symmetric, bits), symmetric, bits) for pair in pairs]
    # Data of few values are spread over their bin in the model: allow the square of a bin and of a fine step.
    _, limit = twin_histogram(data)
    slack = (limit / SIDE) ** 2 + (0.02 * scale) ** 2
    assert found <= 1.03 * min(errors) + slack
    assert found <= error_on(data, ones, *twin_parameters(low, high, symmetric, bits), symmetric, bits) + slack


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", ["normal", "relu", "heavy", "two modes", "outliers"])
def test_mse_of_the_histogram_itself(case: str, symmetric: bool) -> None:
    """Each bin as 32 evenly spaced values: no pair of ends has less than the chosen one, but for the grid's step."""
    data = CASES[case].astype(np.float64)
    counts, limit = twin_histogram(data)
    counts[SIDE] -= int((data == 0).sum())
    width = limit / SIDE
    bins = np.nonzero(counts)[0]
    begin = np.maximum((bins - SIDE) * width, data.min())
    end = np.minimum((bins - SIDE + 1) * width, data.max())
    points = (begin[:, None] + (end - begin)[:, None] * (np.arange(32) + 0.5) / 32).ravel()
    weights = np.repeat(counts[bins].astype(np.float64), 32)
    found = observer_of(CASES[case]).parameters("mse", symmetric, 4)
    low, high = min(data.min(), 0.0), max(data.max(), 0.0)
    shares = 2.0 ** -np.arange(0, 7, 0.25)
    if symmetric:
        pairs = [(-share * max(-low, high), share * max(-low, high)) for share in 2.0 ** -np.arange(0, 9, 1 / 32)]
    else:
        pairs = [(low * a, high * b) for a in shares for b in shares]
    errors = [error_on(points, weights, *twin_parameters(*pair, symmetric, 4), symmetric, 4) for pair in pairs]
    assert error_on(points, weights, *found, symmetric, 4) <= 1.01 * min(errors)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45, -1e-40, 3e38, -3.4e38, 1.0])
def test_extreme_values(method: str, value: float) -> None:
    observer = observer_of(torch.tensor([value, 0.0, value]))
    for symmetric in (False, True):
        for bits in (2, 8):
            scale, zero_point = observer.parameters(method, symmetric, bits)
            assert SMALLEST_NORMAL <= scale < 3.5e38
            if value == 0.0:
                assert scale == 1.0
            if value >= 0.0:
                assert zero_point == (0 if symmetric else -(2 ** (bits - 1)))
            elif not symmetric and value < -1:
                assert zero_point == 2 ** (bits - 1) - 1


def test_torchs_own_observers() -> None:
    from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver

    torch.manual_seed(3)
    batches = [torch.randn(50, 8) * (1 + i) for i in range(6)]
    for symmetric in (False, True):
        scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        limits = {"quant_min": -127 if symmetric else -128, "quant_max": 127}
        for method, kind in (("min_max", MinMaxObserver), ("moving_average", MovingAverageMinMaxObserver)):
            theirs = kind(dtype=torch.qint8, qscheme=scheme, **limits)
            for batch in batches:
                theirs(batch)
            scale, zero_point = theirs.calculate_qparams()
            ours = observer_of(*batches).parameters(method, symmetric)
            assert ours == (pytest.approx(scale.item(), rel=1e-6), zero_point.item())


# ------------------------------------------------------------------------------------------------ order and merging

FLOATS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32))


@settings(max_examples=80, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_neither_order_nor_batches_nor_merging_matter(batches: list[np.ndarray], random) -> None:
    whole = observer_of(np.concatenate(batches))
    random.shuffle(batches)
    cut = random.randint(0, len(batches))
    one_by_one, first, second = observer_of(*batches), observer_of(*batches[:cut]), observer_of(*batches[cut:])
    first.merge(second)
    counts, low, high = whole.histogram()
    expected, limit = twin_histogram(np.concatenate(batches))
    assert np.array_equal(counts.numpy(), expected)
    assert high == limit
    for other in (one_by_one, first):
        others = other.histogram()
        assert torch.equal(others[0], counts)
        assert others[1:] == (low, high)
        assert (other.count(), other.nonfinite()) == (whole.count(), whole.nonfinite())
        assert other.batches() == len(batches)
        if whole.count() > 0:
            assert (other.min(), other.max()) == (whole.min(), whole.max())
            for method in ("min_max", "percentile", "entropy", "mse"):
                assert other.parameters(method) == whole.parameters(method)


def test_merged_moving_averages_are_weighted_by_batches() -> None:
    first, second = observer_of(torch.tensor([-1.0, 1.0])), observer_of(*[torch.tensor([-4.0, 7.0])] * 2)
    first.merge(second)
    assert first.parameters("moving_average") == twin_parameters(-9 / 3, 15 / 3, False, 8)
    first.merge(observer_of(torch.tensor([float("nan")])))
    assert first.batches() == 4
    assert first.parameters("moving_average") == twin_parameters(-9 / 3, 15 / 3, False, 8)


def test_merging_with_itself_and_with_other_channels() -> None:
    observer = observer_of(torch.tensor([[1.0, -2.0]]), channels_dim=1)
    observer.merge(observer)
    assert observer.count() == 4
    with pytest.raises(ValueError, match="channels_dim"):
        observer.merge(observer_of())
    with pytest.raises(ValueError, match="got 3 channels, expected 2"):
        observer.merge(observer_of(torch.ones(1, 3), channels_dim=1))
    assert observer.count() == 4
