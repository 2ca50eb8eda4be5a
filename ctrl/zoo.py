"""Named problems: the reference Gaussian, a mixture, a correlated Gaussian in eight dimensions, and real digits.

Every function returns a Problem; `PROBLEMS` lists those that `ctrl verify` runs, in its order; `LISTED` all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.files import kept
from ctrl.laws import Gaussian, GaussianMixture
from ctrl.problem import Problem
from ctrl.reward import BumpReward, ClassLogPosteriorReward, LogDensityReward, QuadraticReward
from ctrl.schedule import VP


def gaussian_pull_2d(eta: float = 1.0) -> Problem:
    """The reference problem: Gaussian data in 2-D pulled by a quadratic reward; everything known in closed form.

    Source: theory.md, section 17.   Checked: tests/test_chain.py::test_reference_numbers
    """
    return Problem(
        schedule=VP(beta_min=0.1, beta_max=10.0, horizon=1.0),
        data=Gaussian(mean=[1.0, -0.5], cov=[[0.6, 0.2], [0.2, 0.3]]),
        reward=QuadraticReward(matrix=[[1.0, 0.0], [0.0, 0.5]], center=[-0.5, 1.0]),
        kl_weight=0.5, eta=eta)


def mixture_bump_1d(eta: float = 1.0) -> Problem:
    """A two-component mixture on the line with a bump reward; truth by quadrature.

    Source: theory.md, section 17.   Checked: tests/test_quadrature.py::test_reference_numbers
    """
    return Problem(
        schedule=VP(beta_min=0.1, beta_max=10.0, horizon=1.0),
        data=GaussianMixture(weights=[0.3, 0.7], means=[[-1.2], [0.8]], covs=[[[0.3**2]], [[0.4**2]]]),
        reward=BumpReward(center=[-1.0], width=0.5),
        kl_weight=0.2, eta=eta)


def gaussian_8d(eta: float = 1.0) -> Problem:
    """A correlated Gaussian in 8-D, C_ij = sd_i sd_j 0.6^|i-j|, pulled along and across its long axes; closed form.

    Source: theory.md, section 1.   Checked: tests/test_zoo.py::test_every_problem_has_a_truth
    """
    i = np.arange(8)
    sd = np.linspace(0.5, 1.2, 8)
    return Problem(
        schedule=VP(beta_min=0.1, beta_max=10.0, horizon=1.0),
        data=Gaussian(mean=np.cos(i), cov=np.outer(sd, sd) * 0.6 ** np.abs(i[:, None] - i)),
        reward=QuadraticReward(matrix=np.diag(np.linspace(0.1, 0.8, 8)), center=np.sin(i)),
        kl_weight=0.5, eta=eta)


def digits_line(digit: int = 3, eta: float = 1.0) -> Problem:
    """Real 8x8 digits on their first principal axis; the reward is the log posterior probability of a digit.

        r(x) = log P(digit | x) under ten class densities, each a Gaussian mixture fitted to that digit's images

    Truth by quadrature. Data: scikit-learn's 1,797 bundled digits.
    Source: theory.md, section 1 (mixtures).   Checked: tests/test_zoo.py::test_digits_axes_and_weights
    """
    return _digits(digit, eta, dimensions=1, components=2)


def digits_plane(digit: int = 3, eta: float = 1.0) -> Problem:
    """Real 8x8 digits on their first two principal axes, two Gaussian components per class.

    Truth by quadrature in the plane. Data and reward as in `digits_line`.
    Source: theory.md, section 1 (mixtures).   Checked: tests/test_plane.py::test_digits_plane_against_simulated_paths
    """
    return _digits(digit, eta, dimensions=2, components=2)


def double_well_2d(eta: float = 1.0) -> Problem:
    r"""Two wells in the plane: nine tenths of the data lie in the first, the reward's higher peak in the second.

        data  .9 N((-.8, -.2), C_a) + .1 N((1.6, .6), C_b),      r = log( .2 N((-1.4, -.6), .35 I) + .8 N((1.6, .9), .25 I) )

    Grad r points from the first well away from the second, so that local methods get stuck. On N = 40 steps, eta = 1 (share: of mass
    nearer to the second mean of the data):

        pre-trained                         J  -3.4599      share  .119
        best shift near none (-.387, -.278)    -3.3199             .020      where a climb from the pre-trained model ends
        best shift             (.950, .591)    -2.8558             .836
        optimum over all means, J*             -1.513726           .999      path KL 3.232 nats

    Truth by quadrature in the plane.
    Source: theory.md, sections 1 and 9 (i).   Checked: tests/test_plane.py::test_double_well_is_hard
    """
    return Problem(
        schedule=VP(beta_min=0.1, beta_max=10.0, horizon=1.0),
        data=GaussianMixture(weights=[0.9, 0.1], means=[[-0.8, -0.2], [1.6, 0.6]],
                             covs=[[[0.3, 0.1], [0.1, 0.2]], [[0.15, -0.04], [-0.04, 0.2]]]),
        reward=LogDensityReward(GaussianMixture(weights=[0.2, 0.8], means=[[-1.4, -0.6], [1.6, 0.9]],
                                                covs=[[[0.35, 0.0], [0.0, 0.35]], [[0.25, 0.0], [0.0, 0.25]]])),
        kl_weight=0.2, eta=eta)


def _digits(digit: int, eta: float, dimensions: int, components: int) -> Problem:
    if check.integer("digit", digit, at_least=0) > 9:
        raise ValueError(f"digit: expected 0 ... 9, got {digit}")
    prior, classes = digit_classes(dimensions, components)
    data = GaussianMixture.of(prior, classes)
    reward = ClassLogPosteriorReward(classes, prior, digit)
    return Problem(VP(beta_min=0.1, beta_max=10.0, horizon=1.0), data, reward, kl_weight=0.5, eta=eta)


@lru_cache(maxsize=4)
def digit_classes(dimensions: int, components: int) -> tuple[Array, tuple[GaussianMixture, ...]]:
    """Class frequencies (10,) and one fitted mixture per digit, on standardised principal axes.

    Each axis has its largest loading positive and unit variance over all images, so that refits agree in sign.
    """
    prior, fits = kept(fitted_digits, dimensions, components, needs=("scikit-learn", "numpy", "scipy"))
    return np.array(prior), tuple(GaussianMixture(*fit) for fit in fits)


def fitted_digits(dimensions: int, components: int) -> tuple[list[float], list[tuple[Any, Any, Any]]]:
    """Class frequencies, and weights, means and covariances of each digit's mixture: scikit-learn's, a second to import and half a second to fit.

    Source: sklearn.datasets.load_digits, sklearn.mixture.   Checked: tests/test_zoo.py::test_digits_axes_and_weights
    """
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture as Fit

    images, labels = load_digits(return_X_y=True)
    pca = PCA(dimensions, random_state=0, svd_solver="full").fit(images)
    axes = pca.components_ * np.sign(pca.components_[np.arange(dimensions), np.abs(pca.components_).argmax(axis=1)])[:, None]
    x = (images - pca.mean_) @ axes.T
    x = x / x.std(axis=0)
    prior = np.bincount(labels) / len(labels)
    fits = [Fit(components, random_state=0, reg_covar=1e-2).fit(x[labels == c]) for c in range(10)]
    return prior.tolist(), [((f.weights_ / f.weights_.sum()).tolist(), f.means_.tolist(), f.covariances_.tolist()) for f in fits]


PROBLEMS: tuple[Callable[[], Problem], ...] = (gaussian_pull_2d, mixture_bump_1d, gaussian_8d, digits_line, digits_plane)
# By `ctrl zoo`; `ctrl verify` leaves out the last, whose truth takes long and on which several planted errors are small.
LISTED: tuple[Callable[[], Problem], ...] = (*PROBLEMS, double_well_2d)
