"""The statistics of the experiments, against published numbers, brute force, scipy, and simulations of known truth."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from writesae.results.statistics import bootstrap, cliffs_delta, paired, r_squared, wilson

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # The paper: sections 3.2 and 3.3, 92.4% of 4,851 and 88.08% of 2,500, to three digits.
        (4481, 4851, 0.916, 0.931),
        (2202, 2500, 0.868, 0.893),
    ],
)
def test_wilson_intervals_that_were_published(count, n, low, high):
    rate = wilson(count, n)
    digits = 3 if n > 1000 else 4
    assert rate.rate == count / n
    assert (round(rate.low, digits), round(rate.high, digits)) == (low, high)
    wald = 1.96 * (rate.rate * (1 - rate.rate) / n) ** 0.5  # the twin: the textbook's other interval is not it
    if digits == 4:
        assert round(rate.rate + wald, 4) != high


def test_a_rate_needs_trials():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)
    with pytest.raises(ValueError):
        wilson(3, 2)


# The bootstrap -------------------------------------------------------------------------------------------------------


def covered(use_clusters, statistic=np.mean, n_sets=200, n_clusters=60, each=8):
    """How often a 95% interval contains the truth, 0: observations share more than half of their variance within a
    cluster."""
    rng, hits = np.random.default_rng(1), 0
    clusters = np.repeat(np.arange(n_clusters), each)
    for seed in range(n_sets):
        x = rng.normal(size=n_clusters).repeat(each) + 0.8 * rng.normal(size=n_clusters * each)
        found = bootstrap(x, clusters if use_clusters else None, statistic, n_resamples=300, seed=seed)
        hits += found.low <= 0 <= found.high
    return hits / n_sets


def test_the_cluster_interval_covers_the_truth_where_the_naive_one_does_not():
    assert 0.90 <= covered(True) <= 0.99
    assert covered(False) < 0.75


def test_so_it_does_for_other_statistics():
    assert covered(True, np.median, n_sets=60) >= 0.88 > covered(False, np.median, n_sets=60)


@pytest.mark.parametrize("clustered", [False, True])
def test_the_mean_by_sums_is_the_mean_by_samples(clustered):
    """The fast way for the mean draws what the slow way draws."""
    x = RNG.normal(size=60)
    clusters = RNG.integers(7, size=60) if clustered else None
    fast = bootstrap(x, clusters, n_resamples=4000)
    slow = bootstrap(x, clusters, lambda a: float(np.mean(a)), n_resamples=4000)
    assert fast.value == slow.value == x.mean() and fast.n == slow.n == 60
    assert abs(fast.low - slow.low) + abs(fast.high - slow.high) < 0.05 * (fast.high - fast.low)


def test_clusters_may_be_any_labels_in_any_order():
    x = torch.randn(30)
    clusters = torch.randint(5, (30,))
    order = torch.randperm(30)
    a = bootstrap(x, clusters, n_resamples=500)
    b = bootstrap(x[order], clusters[order], n_resamples=500)
    c = bootstrap(x, np.array(list("abcde"))[clusters.numpy()], n_resamples=500)
    assert (a.low, a.high) == pytest.approx((b.low, b.high)) == (c.low, c.high)
    assert str(bootstrap(np.array([1.0, 1.0]))) == "1 [1, 1]"


def test_observations_may_be_rows():
    """A correlation is a statistic of pairs, which stay together."""
    pairs = RNG.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=400)
    found = bootstrap(pairs, np.arange(400) // 4, lambda p: float(np.corrcoef(p.T)[0, 1]), n_resamples=300)
    assert found.low < 0.8 < found.high and found.high - found.low < 0.15 and found.n == 400
    mean = bootstrap(pairs, n_resamples=50)
    assert mean.value == pytest.approx(pairs.mean()) and mean.low < mean.value < mean.high


def test_too_few_observations_or_clusters():
    with pytest.raises(ValueError, match="at least 2 observations; got 1"):
        bootstrap(np.ones(1))
    with pytest.raises(ValueError, match="at least 2 observations; got 0"):
        bootstrap(np.ones(0))
    with pytest.raises(ValueError, match="at least 2 clusters; got 1"):
        bootstrap(np.ones(5), np.zeros(5))


# Effect sizes and tests ----------------------------------------------------------------------------------------------


def by_pairs(x, y):
    """Over all pairs: the definition."""
    return sum(int(a > b) - int(a < b) for a, b in itertools.product(x, y)) / (len(x) * len(y))


@pytest.mark.parametrize("levels", [1000, 4], ids=["few ties", "many ties"])
def test_cliffs_delta_is_what_all_pairs_say(levels):
    x, y = RNG.integers(levels, size=37), RNG.integers(levels, size=23) + levels // 4
    assert cliffs_delta(x, y) == pytest.approx(by_pairs(x, y))
    assert cliffs_delta(y, x) == pytest.approx(-cliffs_delta(x, y)) and cliffs_delta(x, y) < 0
    assert cliffs_delta(x, y) != pytest.approx(by_pairs(y, x)), "the twin: exchanged, it must differ"


def test_cliffs_delta_of_extremes():
    assert cliffs_delta(np.array([5.0, 6]), np.array([1.0, 2])) == 1
    assert cliffs_delta(torch.zeros(3), torch.zeros(4)) == 0


def test_paired_by_hand():
    # Differences 1, 2, 3, 4: mean 2.5, sd sqrt(5/3), t = 2.5 / (sd / 2) = 3.873 on 3 degrees of freedom.
    found = paired(np.array([2.0, 4, 6, 8]), np.array([1.0, 2, 3, 4]))
    sd = (5 / 3) ** 0.5
    assert found.n == 4 and found.mean == found.median == 2.5 and found.cohens_d == pytest.approx(2.5 / sd)
    assert found.high - found.mean == pytest.approx(3.182446 * sd / 2, rel=1e-6)  # t_{0.975, 3} of the tables
    assert found.p_t == pytest.approx(0.030466, abs=1e-6)
    assert found.p_wilcoxon == pytest.approx(2 / 2**4)  # all four ranks positive: the most extreme of 16 outcomes


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_paired_is_what_scipy_says(shift):
    y = RNG.normal(size=50)
    x = y + RNG.normal(size=50) + shift
    found = paired(torch.tensor(x), torch.tensor(y))
    t = stats.ttest_rel(x, y)
    interval = t.confidence_interval()
    assert found.p_t == pytest.approx(t.pvalue) and found.p_wilcoxon == pytest.approx(stats.wilcoxon(x, y).pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    unpaired = stats.ttest_ind(x, y).pvalue  # the twin: the samples are paired, and it matters
    assert found.p_t != pytest.approx(unpaired, rel=0.01)


def test_paired_differences_that_are_all_equal():
    x = np.arange(5.0)
    same, more = paired(x, x), paired(x + 1, x)
    assert same.mean == same.low == same.high == 0 and same.p_t == same.p_wilcoxon == 1 and same.cohens_d == 0
    assert more.mean == 1 and more.p_t == 0 and more.cohens_d == np.inf
    assert more.p_wilcoxon == pytest.approx(2 / 2**5), "five signs alike are no proof, however equal the differences"
    assert paired(x, x + 1).cohens_d == -np.inf


def test_paired_needs_pairs():
    with pytest.raises(ValueError, match="two or more pairs; got 1 and 1"):
        paired(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="got 3 and 2 values"):
        paired(np.ones(3), np.ones(2))


def test_r_squared_by_hand():
    y = np.array([1.0, 2, 3])
    assert r_squared(y, y) == 1
    assert r_squared(y, np.array([1.0, 2, 4])) == 1 - 1 / 2
    assert r_squared(y, np.full(3, 2.0)) == 0, "the mean"
    assert r_squared(y, np.array([3.0, 2, 1])) == -3, "worse than the mean: squares 4 + 0 + 4 over 2"
    assert r_squared(torch.tensor(y), torch.tensor(2 * y)) == 1 - 14 / 2, "nothing is fitted: a slope would give 1"
    with pytest.raises(ValueError, match="all equal is not defined"):
        r_squared(np.ones(3), y)
