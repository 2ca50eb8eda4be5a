"""The named problems: what is known of each, and real digits that are what they claim to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ctrl
from ctrl import zoo

METHOD = {"gaussian_pull_2d": "chain", "mixture_bump_1d": "quadrature", "gaussian_8d": "chain", "digits_line": "quadrature", "digits_plane": "plane",
          "double_well_2d": "plane"}


@pytest.mark.parametrize("factory", zoo.LISTED, ids=lambda f: f.__name__)
def test_every_problem_has_a_truth(factory):
    problem = factory()
    grid = problem.grid(60)
    pre = problem.pretrained(grid)
    truth = ctrl.exact.evaluate(problem, pre, grid)
    assert truth.method == METHOD[factory.__name__]
    assert truth.path_kl == pytest.approx(0, abs=1e-12) and truth.objective == pytest.approx(truth.expected_reward, rel=1e-12)
    assert np.isfinite(truth.objective) and np.all(np.linalg.eigvalsh(np.atleast_2d(truth.terminal.cov)) > 0)


@pytest.mark.parametrize("factory", [zoo.gaussian_pull_2d, zoo.gaussian_8d], ids=lambda f: f.__name__)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_pretrained_chain_nearly_makes_the_data(factory, eta):
    problem = replace(factory(eta=eta), start="exact")       # from the prior a bias of order alpha(T)^(1 + eta^2) would remain

    def gap(steps):
        grid = problem.grid(steps)
        law = ctrl.exact.evaluate(problem, problem.pretrained(grid), grid).terminal
        return np.max(np.abs(law.mean - problem.data.mean)) + np.max(np.abs(law.cov - problem.data.cov))

    assert gap(1000) < 0.02 and gap(500) / gap(1000) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("dimensions", "components"), [(1, 2), (2, 2)])
def test_digits_axes_and_weights(dimensions, components):
    from sklearn.datasets import load_digits

    prior, classes = zoo.digit_classes(dimensions, components)
    images, labels = load_digits(return_X_y=True)
    np.testing.assert_allclose(prior, np.bincount(labels) / 1797)
    assert len(classes) == 10 and all(law.dim == dimensions and len(law.weights) == components for law in classes)
    # The axes again, by a singular value decomposition: directions up to sign, unit variance, largest loading positive.
    centred = images - images.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:dimensions]
    axes = axes * np.sign(axes[np.arange(dimensions), np.abs(axes).argmax(axis=1)])[:, None]
    x = centred @ axes.T
    x = x / x.std(axis=0)
    for digit, law in enumerate(classes):    # EM with a ridge keeps the sample mean, and the covariance up to the ridge
        mine = x[labels == digit]
        np.testing.assert_allclose(law.mean, mine.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(law.cov, np.cov(mine.T, bias=True).reshape(law.cov.shape) + 1e-2 * np.eye(dimensions), atol=1e-6)
    problem = (zoo.digits_line, zoo.digits_plane)[dimensions - 1](digit=3)
    np.testing.assert_allclose(problem.data.mean, 0, atol=1e-6)
    np.testing.assert_allclose(np.diag(problem.data.cov), 1.01, atol=1e-6)
    assert problem.reward.label == 3 and problem.dim == dimensions
    flipped = np.concatenate([-x[labels == 3].mean(axis=0)])                                    # planted: the other sign
    assert np.max(np.abs(classes[3].mean - flipped)) > 0.1


def test_the_digit_is_an_argument_that_is_checked():
    x = np.linspace(-2, 2, 5)[:, None]
    total = sum(np.exp(zoo.digits_line(digit=c).reward.value(x)) for c in range(10))
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    for bad in (-1, 10, 2.5, "3"):
        with pytest.raises(ValueError, match="digit: expected"):
            zoo.digits_line(digit=bad)
    assert zoo.gaussian_pull_2d(eta=0.5).eta == 0.5
