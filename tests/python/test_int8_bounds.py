"""Confidence bounds against SciPy, and by how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from halfstep.int8_bounds import (
    drop_at_most,
    incomplete_beta,
    mean_at_most,
    ratios_at_most,
    samples_for,
    share_at_least,
    share_at_most,
    student_t,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats


@settings(max_examples=300, deadline=None)
@given(st.floats(0.5, 1e5), st.floats(0.5, 1e5), st.floats(0, 1))
def test_incomplete_beta(a: float, b: float, share: float) -> None:
    x = share if a + b < 4 else float(stats.beta.ppf(share, a, b))  # where the function rises
    assert incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-8, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20_000), st.data())
def test_bounds_of_shares_are_those_of_scipy(samples: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, samples))
    confidence = data.draw(st.sampled_from([0.9, 0.95, 0.975, 0.999]))
    # The exact interval with the same doubt at each end.
    expected = stats.binomtest(count, samples).proportion_ci(2 * confidence - 1, method="exact")
    assert share_at_most(count, samples, confidence) == pytest.approx(expected.high, rel=1e-8)
    assert share_at_least(count, samples, confidence) == pytest.approx(expected.low, rel=1e-8)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.975, 0.9995])
@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 99, 1234, 1_000_000])
def test_student_t_is_that_of_scipy(confidence: float, freedom: int) -> None:
    # At a million the logarithms of the gamma function cancel to nine digits.
    assert student_t(confidence, freedom) == pytest.approx(stats.t.ppf(confidence, freedom), rel=1e-8, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_bound_of_a_mean_is_that_of_scipy(values: list[float]) -> None:
    mean, bound = mean_at_most(values, 0.95)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert bound == pytest.approx(np.mean(values) + stats.t.ppf(0.95, len(values) - 1) * error, rel=1e-9, abs=1e-6)


def test_one_value_has_no_bound() -> None:
    assert mean_at_most([0.25], 0.95) == (0.25, math.inf)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("drop", [0.5, 0.1, 0.02, 0.01, 1e-4])
def test_no_fewer_samples_would_do(drop: float, confidence: float) -> None:
    samples = samples_for(drop, confidence)
    assert drop_at_most(0, 0, samples, confidence)[1] <= drop
    assert drop_at_most(0, 0, samples - 1, confidence)[1] > drop


def test_samples_for_two_percent() -> None:
    assert samples_for(0.02, 0.95) == 183  # 0.975 = 1 - 0.98^n
    assert samples_for(0.0, 0.95) is None
    assert samples_for(1.0, 0.95) == 1


@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.01, 0.0), (0.02, 0.02), (0.05, 0.01), (0.3, 0.25)])
@pytest.mark.parametrize("samples", [40, 300])
def test_the_bound_of_a_drop_holds(lost: float, gained: float, samples: int) -> None:
    """Of planted truths, in at least 95 % of all samples. The probability is summed up, not drawn."""
    truth = lost - gained
    total = covered = 0.0
    for losses in range(samples + 1):
        chance = stats.binom.pmf(losses, samples, lost)
        if chance < 1e-12:
            continue
        gains = np.arange(samples - losses + 1)
        chances = chance * stats.binom.pmf(gains, samples - losses, gained / (1 - lost))
        for gain in np.flatnonzero(chances > 1e-12):
            total += chances[gain]
            covered += chances[gain] * (drop_at_most(losses, int(gain), samples, 0.95)[1] >= truth - 1e-12)
    assert total == pytest.approx(1, abs=1e-6)
    assert covered >= 0.95 * total


@pytest.mark.parametrize("samples", [2, 5, 60])
def test_the_bound_of_a_mean_holds(samples: int) -> None:
    """In 95 % of all samples of normal differences, which is what t promises: not in fewer, nor in many more."""
    rng = np.random.default_rng(0)
    trials, truth = 8000, 0.013
    drawn = rng.normal(truth, 0.1, (trials, samples))
    share = np.mean([mean_at_most(row, 0.95)[1] >= truth for row in drawn.tolist()])
    error = math.sqrt(0.95 * 0.05 / trials)
    assert abs(share - 0.95) < 4 * error


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-3, 1e6)), min_size=2, max_size=50))
def test_bound_of_a_ratio_is_that_of_its_linearization(samples: list[tuple[float, float]]) -> None:
    part, whole = np.array(samples).T
    ratio = part.sum() / whole.sum()
    found, bound = ratios_at_most([samples], 0.95)
    error = stats.sem((part - ratio * whole) / whole.mean())
    assert found == pytest.approx(ratio)
    assert bound == pytest.approx(ratio + stats.t.ppf(0.95, len(part) - 1) * error, rel=1e-6, abs=1e-9)
    same = [(each, 1.0) for each in part.tolist()]  # of equal wholes it is the mean
    assert ratios_at_most([same], 0.95) == pytest.approx(mean_at_most(part.tolist(), 0.95), rel=1e-9, abs=1e-9)
    assert ratios_at_most([samples, samples], 0.95) == pytest.approx((found, bound), rel=1e-9, abs=1e-9)


def test_the_bound_of_a_ratio_holds() -> None:
    """In about 95 % of all samples: wholes vary by half of their mean, and parts with them."""
    rng = np.random.default_rng(0)
    trials, truth = 4000, 0.02
    whole = rng.gamma(4.0, 0.25, (trials, 60))
    part = whole * truth * rng.gamma(8.0, 1 / 8, (trials, 60))
    pairs = np.stack([part, whole], 2).tolist()
    share = np.mean([ratios_at_most([samples], 0.95)[1] >= truth for samples in pairs])
    assert abs(share - 0.95) < 0.02


def test_ratios_of_nothing() -> None:
    nothing, something = [(0.0, 0.0)] * 4, [(1.0, 2.0)] * 4
    assert ratios_at_most([nothing], 0.95) == (0.0, 0.0)
    assert ratios_at_most([[(1.0, 0.0)] * 4], 0.95) == (1.0, math.inf)
    assert ratios_at_most([nothing, something], 0.95) == (0.25, 0.25)
    assert ratios_at_most([[(1.0, 2.0)]], 0.95) == (0.5, math.inf)


@pytest.mark.parametrize(("samples", "documented"), [(30, 0.85), (300, 0.91)])
def test_skewed_values_are_covered_as_often_as_documented(samples: int, documented: float) -> None:
    """A limit of Student's t, not a promise."""
    rng = np.random.default_rng(0)
    trials = 3000
    drawn = rng.lognormal(-0.5, 1.0, (trials, samples))  # of mean 1
    share = np.mean([mean_at_most(row, 0.95)[1] >= 1.0 for row in drawn.tolist()])
    assert abs(share - documented) < 0.02


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (share_at_most, (3, 2, 0.95)),
        (share_at_most, (-1, 2, 0.95)),
        (share_at_least, (0, 0, 0.95)),
        (share_at_least, (1, 2, 1.0)),
        (student_t, (0.95, 0)),
        (student_t, (0.3, 5)),
        (mean_at_most, ([], 0.95)),
        (ratios_at_most, ([], 0.95)),
        (ratios_at_most, ([[]], 0.95)),
    ],
)
def test_arguments_are_checked(function, arguments) -> None:
    with pytest.raises(ValueError, match="expected"):
        function(*arguments)
