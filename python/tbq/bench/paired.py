# SPDX-License-Identifier: MIT
"""Statistics of two measurements of the same questions."""

import math
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
    low, high = np.quantile(np.concatenate(means), [(1 - share) / 2, (1 + share) / 2])
    return float(values.mean()), float(low), float(high)


def mcnemar(lost: int, won: int) -> float:
    """The p value of McNemar's exact test, two-sided: how likely so uneven a split is if both are equally good.

    lost: questions that only the first one answers.  won: those that only the second one answers.
    """
    n = lost + won
    return float(min(1.0, 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n))
