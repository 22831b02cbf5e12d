"""What a sample proves of the whole: one-sided confidence bounds, exact for shares. Plain numbers, no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

_TINY = 1e-300
_TERMS = 100_000


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of the incomplete beta function by Lentz's method (DLMF 8.17.22, 3.10(iii))."""
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    value = d
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1.0 + term * d
            c = 1.0 + term / c
            d = 1.0 / (d if abs(d) > _TINY else _TINY)
            c = c if abs(c) > _TINY else _TINY
            change = c * d
            value *= change
        if abs(change - 1.0) < 1e-15:
            break
    return value


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), a and b above 0, x in 0 .. 1."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b))
    if x < (a + 1.0) / (a + b + 2.0):  # where the fraction converges quickly
        return front * _fraction(a, b, x) / a
    return 1.0 - front * _fraction(b, a, 1.0 - x) / b


def _where(function: Callable[[float], float], value: float) -> float:
    """Return the x in 0 .. 1 at which a rising function reaches the value, to the last place."""
    low, high = 0.0, 1.0
    while low < (middle := low + (high - low) / 2) < high:
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return high


def _check_share(count: int, samples: int, confidence: float) -> None:
    if not 0 <= count <= samples or samples < 1:
        raise ValueError(f"count is {count} of {samples} samples, expected 0 to the number of samples, at least 1")
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0.5 <= confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, expected 0.5 or more and less than 1")


@functools.lru_cache(maxsize=1024)
def share_at_most(count: int, samples: int, confidence: float) -> float:
    """Return the upper bound of a share that was seen `count` times (Clopper and Pearson, 1934)."""
    _check_share(count, samples, confidence)
    if count == samples:
        return 1.0
    if count == 0:
        return -math.expm1(math.log1p(-confidence) / samples)
    return _where(lambda x: incomplete_beta(count + 1, samples - count, x), confidence)


@functools.lru_cache(maxsize=1024)
def share_at_least(count: int, samples: int, confidence: float) -> float:
    """Return the lower bound of a share that was seen `count` times."""
    _check_share(count, samples, confidence)
    if count == 0:
        return 0.0
    if count == samples:
        return math.exp(math.log1p(-confidence) / samples)
    return _where(lambda x: incomplete_beta(count, samples - count + 1, x), 1.0 - confidence)


@functools.lru_cache(maxsize=1024)
def student_t(confidence: float, freedom: int) -> float:
    """Return the t that Student's distribution stays below with this confidence."""
    _check_confidence(confidence)
    if freedom < 1:
        raise ValueError(f"freedom is {freedom}, expected at least 1")
    # 2 * confidence - 1 lies between -t and t, where t^2 / (freedom + t^2) has a beta distribution.
    share = _where(lambda y: incomplete_beta(0.5, freedom / 2, y), 2.0 * confidence - 1.0)
    return math.sqrt(freedom * share / (1.0 - share))


def mean_at_most(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Return the mean and the upper bound of the mean of all, by Student's t; infinity for fewer than two values.

    Values with a long tail to the right are covered less often than normal ones: of lognormal ones with sigma 1, 95 %
    became 85 % with 30 samples, and 91 % with 300.
    """
    count = len(values)
    if count == 0:
        raise ValueError("values is empty, expected at least one")
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, mean + student_t(confidence, count - 1) * math.sqrt(variance / count)


def ratios_at_most(ratios: Sequence[Sequence[tuple[float, float]]], confidence: float) -> tuple[float, float]:
    """Return the mean of ratios of sums, and its upper bound for all samples.

    ratios: for each ratio a part and a whole, 0 or more, of each of the same samples. The bound is Student's t for the
    linearized ratio (Cochran, Sampling Techniques, 3rd edition, chapter 6): the error of sum(part) / sum(whole) is that
    of the mean of part - ratio * whole, over the mean of the whole. It promises as little of skewed values as
    mean_at_most(). Infinity for fewer than two samples, and for something of nothing, which is a ratio of 1.
    """
    count = len(ratios[0]) if ratios else 0
    if count == 0:
        raise ValueError("ratios is empty, expected at least one of at least one sample")
    found: list[float] = []
    deviations = [0.0] * count
    is_bounded = count > 1
    for samples in ratios:
        part, whole = (math.fsum(values) for values in zip(*samples, strict=True))
        if whole == 0.0:
            found.append(float(part > 0.0))
            is_bounded &= part == 0.0
            continue
        found.append(part / whole)
        for i, (a, b) in enumerate(samples):
            deviations[i] += (a - found[-1] * b) / whole * count / len(ratios)
    mean = math.fsum(found) / len(found)
    if not is_bounded:
        return mean, math.inf
    variance = math.fsum(deviation**2 for deviation in deviations) / (count - 1)  # their mean is 0
    return mean, mean + student_t(confidence, count - 1) * math.sqrt(variance / count)


def drop_at_most(lost: int, gained: int, samples: int, confidence: float) -> tuple[float, float]:
    """Return the drop (lost - gained) / samples and its upper bound.

    Each share has half of the doubt (Bonferroni), so the bound holds with the whole confidence however the two depend.
    """
    each = 1.0 - (1.0 - confidence) / 2
    most = share_at_most(lost, samples, each) - share_at_least(gained, samples, each)
    return (lost - gained) / samples, most


def samples_for(drop: float, confidence: float) -> int | None:
    """Return how many samples without a loss show that the drop is at most this; None if no number does."""
    if drop <= 0.0:
        return None
    if drop >= 1.0:
        return 1
    samples = max(1, math.ceil(math.log((1.0 - confidence) / 2) / math.log1p(-drop)) - 1)
    while drop_at_most(0, 0, samples, confidence)[1] > drop:
        samples += 1
    return samples
