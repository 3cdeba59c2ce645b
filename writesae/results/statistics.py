"""The statistics that the experiments report: rates and their intervals, bootstraps by cluster, effect sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from writesae.jobs.extras import extra

Z95 = NormalDist().inv_cdf(0.975)  # 1.96
Array: TypeAlias = np.ndarray
Values: TypeAlias = Float[Tensor, " n"] | Shaped[Array, " n"]
OtherValues: TypeAlias = Float[Tensor, " m"] | Shaped[Array, " m"]  # of a sample that may have another size


@dataclass(frozen=True)
class Rate:
    """How often out of how many, with its Wilson 95% interval."""

    count: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.count / self.n

    value = rate

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval, from so many observations."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Paired:
    """Two conditions compared pair by pair: ``difference = x - y``.

    Attributes:
        mean, median: of the differences, ``mean`` with its 95% interval of Student's t.
        p_t: two-sided, paired t-test.
        p_wilcoxon: two-sided, Wilcoxon's signed-rank test.
        cohens_d: mean difference / standard deviation of the differences.
    """

    n: int
    mean: float
    low: float
    high: float
    median: float
    p_t: float
    p_wilcoxon: float
    cohens_d: float


def wilson(count: int, n: int) -> Rate:
    """A proportion ``p`` with its Wilson 95% interval, ``(p + z^2/2n ± z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)``.

    Raises:
        ValueError: no trial, or more hits than trials.
    """
    if n < 1:
        raise ValueError("an interval needs at least one trial")
    if not 0 <= count <= n:
        raise ValueError(f"of {n} trials, from 0 to {n} can be hits; got {count}")
    p, z2 = count / n, Z95**2
    middle, half = p + z2 / (2 * n), Z95 * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return Rate(count, n, low if count else 0.0, high if count < n else 1.0)


def bootstrap(
    values: Float[Tensor, "n ..."] | Shaped[Array, "n ..."],
    clusters: Shaped[Array, " n"] | Shaped[Tensor, " n"] | None = None,
    statistic: Callable[[Array], float] = np.mean,  # type: ignore[assignment]
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic with its percentile bootstrap 95% interval; where observations belong to clusters, these are drawn.

    Args:
        values: observations, of one number or more each.
        clusters: of each observation, which cluster it belongs to (a document, an atom): observations of one are not
            independent, and the interval without them is too narrow.
        statistic: of an array.
        n_resamples: samples drawn.
        seed: of the drawing.

    Raises:
        ValueError: fewer than two clusters (observations), or not a cluster for each value.
    """
    x = np.asarray(values)
    groups = np.arange(len(x)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if len(groups) != len(x):
        raise ValueError(f"each value needs its cluster; got {len(x)} values and {len(groups)} clusters")
    n_groups = int(groups.max(initial=-1)) + 1
    if n_groups < 2:
        what = "observations" if clusters is None else "clusters"
        raise ValueError(f"a bootstrap interval needs at least 2 {what}; got {n_groups}")
    rng = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups))
    members = [order[a:b] for a, b in zip(np.r_[0, ends[:-1]], ends, strict=True)]
    if statistic is np.mean and x.ndim == 1:  # sums of clusters are all a mean needs
        sums, sizes = np.array([x[m].sum() for m in members]), np.array([len(m) for m in members])
        drawn = rng.integers(n_groups, size=(n_resamples, n_groups))
        found = sums[drawn].sum(1) / sizes[drawn].sum(1)
    elif clusters is None:
        found = np.array([statistic(x[rng.integers(n_groups, size=n_groups)]) for _ in range(n_resamples)])
    else:
        found = np.array(
            [
                statistic(x[np.concatenate([members[i] for i in rng.integers(n_groups, size=n_groups)])])
                for _ in range(n_resamples)
            ]
        )
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(statistic(x)), float(low), float(high), len(x))


def cliffs_delta(x: Values, y: OtherValues) -> float:
    """``P(x > y) - P(x < y)`` over all pairs, from -1 to 1: how far two samples lie apart, ties counting half.

    NaN if a value is.
    """
    a, b = np.asarray(x), np.sort(np.asarray(y))
    if np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    below, above = np.searchsorted(b, a, "left").sum(), (len(b) - np.searchsorted(b, a, "right")).sum()
    return float(below - above) / (len(a) * len(b))


def paired(x: Values, y: OtherValues) -> Paired:
    """Compare two conditions pair by pair; ValueError for fewer than two pairs, or different lengths."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a paired comparison needs two or more pairs; got {len(a)} and {len(b)} values")
    stats, d = extra("scipy.stats"), a - b
    wilcoxon: Any = stats.wilcoxon(d) if d.any() else None
    p_w = 1.0 if wilcoxon is None else float(wilcoxon.pvalue)
    if (d == d[0]).all():  # the t-test and Cohen's d divide by the standard deviation
        one = float(d[0])
        return Paired(len(d), one, one, one, one, float(one == 0), p_w, float(np.sign(one) * np.inf) if one else 0.0)
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(d) - 1)) * sd / len(d) ** 0.5
    t_test: Any = stats.ttest_1samp(d, 0)
    p_t = float(t_test.pvalue)
    return Paired(len(d), mean, mean - half, mean + half, float(np.median(d)), p_t, p_w, mean / sd)


def r_squared(measured: Values, predicted: Values) -> float:
    """``1 - sum (measured - predicted)^2 / sum (measured - mean)^2``: of the prediction as it is, nothing fitted.

    Below 0 where the mean of what was measured would have predicted better.
    """
    y, x = np.asarray(measured, dtype=float), np.asarray(predicted, dtype=float)
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        raise ValueError("R squared of measurements that are all equal is not defined")
    return 1 - float(((y - x) ** 2).sum()) / total
