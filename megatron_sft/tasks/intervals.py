"""How sure a score is: 95 % intervals, of one model and of the difference between two on the same questions."""

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959963984540054
"""Of a normal distribution 95 % lie within so many standard deviations."""


def mean(scores: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(score * weight for score, weight in zip(scores, weights, strict=True)) / math.fsum(weights)


def interval(scores: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Of the weighted mean. Wilson's for right and wrong of equal weight, which knows that 0 of 10 is not surely 0; else the
    normal one.

    Args:
        scores: at least one.
        weights: one each.

    Returns:
        The ends. 5 of 10 -> (0.237, 0.763); of one score that is neither 0 nor 1 both are that score.
    """
    n, center = len(scores), mean(scores, weights)
    if set(scores) <= {0.0, 1.0} and len(set(weights)) == 1:
        middle, spread = center + Z * Z / (2 * n), Z * math.sqrt(center * (1 - center) / n + Z * Z / (4 * n * n))
        return max(0.0, (middle - spread) / (1 + Z * Z / n)), min(1.0, (middle + spread) / (1 + Z * Z / n))
    half = Z * _standard_error(scores, weights, center)
    return center - half, center + half


def _standard_error(scores: Sequence[float], weights: Sequence[float], center: float) -> float:
    """Of a weighted mean of independent scores (a ratio of sums; Cochran, Sampling Techniques, 1977, 2.11)."""
    n = len(scores)
    if n < 2:
        return 0.0
    squares = math.fsum((weight * (score - center)) ** 2 for score, weight in zip(scores, weights, strict=True))
    return math.sqrt(squares * n / (n - 1)) / math.fsum(weights)


def paired(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> dict[str, Any]:
    """The difference second - first over the same questions.

    Returns:
        difference, low, high (of its normal interval), count, and on how many questions each had the higher score.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    center = mean(differences, weights)
    half = Z * _standard_error(differences, weights, center)
    return {
        "difference": center,
        "low": center - half,
        "high": center + half,
        "count": len(differences),
        "first_higher": sum(value < 0 for value in differences),
        "second_higher": sum(value > 0 for value in differences),
    }
