"""Mixtures of Gaussians over one number per atom, and what BIC says of how many there are."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from writesae.jobs.extras import extra
from writesae.results.statistics import Array

MIN_VALUES = 10  # three components have eight parameters


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture, components by ascending mean.

    Attributes:
        weights, means, sds: of each component.
        bic: Bayesian information criterion, lower is better.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    sds: tuple[float, ...]
    bic: float

    @property
    def n(self) -> str:
        """How many components, in words."""
        return f"{len(self.means)} component{'s' if len(self.means) > 1 else ''}"

    @property
    def separation(self) -> float:
        """Ashman's D of the outer components, the distance of their means over their root mean square deviation: from
        2 on, two of equal size show as two humps. 0 for one component."""
        spread = (0.5 * (self.sds[0] ** 2 + self.sds[-1] ** 2)) ** 0.5
        return (self.means[-1] - self.means[0]) / spread

    def density(self, x: Float[Array, " n"]) -> Float[Array, "component n"]:
        """Of each component, times its weight."""
        pdf = extra("scipy.stats").norm.pdf
        of_each = zip(self.weights, self.means, self.sds, strict=True)
        return np.stack([weight * pdf(x, mean, sd) for weight, mean, sd in of_each])

    def upper(self, x: Float[Array, " n"]) -> Bool[Array, " n"]:
        """Whether each value belongs to the last component, the more likely one.

        The wider of two Gaussians is the more likely one far out on both sides. So what lies beyond the mean of the
        narrow one, away from the wide one, would go to the wide one: it is left where it lies.
        """
        last = self.density(x).argmax(0) == len(self.means) - 1
        return (last & (x > self.means[0])) | (x >= self.means[-1])


def fit_mixture(values: Float[Array, " n"], n_components: int, *, seed: int = 0) -> Mixture:
    """The likeliest mixture of three starts (scikit-learn's, one from k-means and two from random values).

    Where components overlap, a fit creeps on for hundreds of steps: stopped at a hundredth of scikit-learn's usual
    tolerance, BIC of one shipped SAE was off by 65, and another had 3.5 times the registers. So it goes on to the end.

    Each component has a standard deviation of 0.001 or more. ValueError for fewer than 10 values.
    """
    GaussianMixture = extra("sklearn.mixture").GaussianMixture
    ConvergenceWarning = extra("sklearn.exceptions").ConvergenceWarning
    if len(values) < MIN_VALUES:
        raise ValueError(f"a mixture needs at least {MIN_VALUES} values; got {len(values)}")
    x = np.asarray(values, dtype=float)[:, None]
    options: Any = dict(random_state=seed, tol=1e-7, max_iter=2000, reg_covar=1e-6)
    starts: list[Any] = [
        GaussianMixture(n_components, init_params="kmeans", **options),
        GaussianMixture(n_components, init_params="random_from_data", n_init=2, **options),
    ]
    with warnings.catch_warnings():
        # Equal values are fewer clusters than asked for: the components coincide, and BIC says that they are too many.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = max((start.fit(x) for start in starts[:n_components]), key=lambda fitted: fitted.lower_bound_)
    order = model.means_[:, 0].argsort()
    weights, means = model.weights_[order], model.means_[order, 0]
    sds = model.covariances_[order, 0, 0] ** 0.5
    return Mixture(*(tuple(map(float, part)) for part in (weights, means, sds)), bic=float(model.bic(x)))
