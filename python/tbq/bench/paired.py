# SPDX-License-Identifier: MIT
"""Statistics of two measurements of the same questions."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

DRAWS = 10000  # of a bootstrap; its own noise is then below 2 % of the width of the interval


def bootstrap(
    differences: Sequence[float], groups: Sequence[int], seed: int = 0, share: float = 0.95
) -> tuple[float, float, float]:
    """The mean of paired differences, and the ends of its confidence interval (percentiles of a bootstrap).

    differences: one for each question.  groups: the group of each; questions about one text are not independent, so
    whole groups are drawn.  With a single group the interval is not known, and both ends are NaN.
    seed: of the draws; the same arguments give the same digits.  share: how much the interval covers.

    A bootstrap of few groups is too narrow: with G of them by sqrt((G - 1) / G), and by the ratio of the normal
    distribution's quantile to that of Student's t with G - 1 degrees of freedom.  So the ends are moved out by both.
    """
    values = np.asarray(differences, np.float64)
    _, inverse = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(inverse, values), np.bincount(inverse)
    if len(sums) < 2:
        return float(values.mean()), math.nan, math.nan
    random, means = np.random.default_rng(seed), []
    for _ in range(10):  # in parts, so that many groups need little memory
        drawn = random.integers(len(sums), size=(DRAWS // 10, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    mean, count = float(values.mean()), len(sums)
    low, high = np.quantile(np.concatenate(means), [(1 - share) / 2, (1 + share) / 2])
    wider = _student(share, count - 1) / _normal(share) * math.sqrt(count / (count - 1))
    return mean, mean + wider * (float(low) - mean), mean + wider * (float(high) - mean)


def _normal(share: float) -> float:
    """Half the width of the interval that holds a share of the standard normal distribution."""
    return statistics.NormalDist().inv_cdf((1 + share) / 2)


def _student(share: float, freedom: int) -> float:
    """The same of Student's t distribution: Abramowitz and Stegun, 26.7.5; within 1 % from two degrees of freedom."""
    z, n = _normal(share), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def mcnemar(lost: int, won: int) -> float:
    """The p value of McNemar's exact test, two-sided: how likely so uneven a split is if both are equally good.

    It takes questions for independent.  Those about one text are not, and p is then too small.

    lost: questions that only the first one answers.  won: those that only the second one answers.
    """
    n = lost + won
    return float(min(1.0, 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n))
