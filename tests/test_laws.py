"""Gaussians and mixtures: scores and Jacobians by complex step, noising as a semigroup, sampling as a pure function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrl import VP, Gaussian, GaussianMixture
from ctrl.elementary import dot, exp_32, exp_64, quadratic_form
from ctrl.laws import noised_law, noised_laws
from ctrl.schedule import TimeGrid

STEP = 1e-30


def spd(rng, d, size=()):
    a = rng.normal(size=(*size, d, d))
    return a @ np.swapaxes(a, -1, -2) / d + 0.2 * np.eye(d)


def gaussian(rng, d):
    return Gaussian(rng.normal(size=d), spd(rng, d))


def mixture(rng, d, k=3):
    return GaussianMixture(rng.dirichlet(np.full(k, 3.0)), 1.5 * rng.normal(size=(k, d)), spd(rng, d, (k,)))


def complex_gradient(f, x):
    """d f(x_n) / d x_nj of a function that acts on rows, exact to rounding, (n, d, ...)."""
    out = []
    for j in range(x.shape[1]):
        z = x.astype(complex)
        z[:, j] += 1j * STEP
        out.append(np.imag(f(z)) / STEP)
    return np.stack(out, axis=1)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_score_is_gradient_of_log_density(make, d):
    rng = np.random.default_rng(d)
    law = make(rng, d)
    for noised in (law, law.noised(0.7, 0.3)):
        x = 2 * rng.normal(size=(40, d))
        expected = complex_gradient(noised.log_density, x)
        np.testing.assert_allclose(noised.score(x), expected, rtol=1e-11, atol=1e-12)
        jacobian = complex_gradient(noised.score, x).transpose(0, 2, 1)
        np.testing.assert_allclose(noised.score_jacobian(x), jacobian, rtol=1e-10, atol=1e-11)
        if make is mixture:                  # planted: the most likely component's score for the mixture's
            s = noised.component_scores(x)
            planted = s[np.arange(len(x)), noised.responsibilities(x).argmax(axis=1)]
            assert np.max(np.abs(planted - expected)) > 1e-2


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_mixture_score_and_jacobian_everywhere(seed, d, k):
    rng = np.random.default_rng(seed)
    law = mixture(rng, d, k)
    x = rng.normal(size=(8, d)) * 10.0 ** rng.uniform(-2, 1)
    np.testing.assert_allclose(law.score(x), complex_gradient(law.log_density, x), rtol=1e-9, atol=1e-10)
    jacobian = law.score_jacobian(x)
    scale = 1 + np.abs(law.component_scores(x)).max() ** 2
    np.testing.assert_allclose(jacobian, complex_gradient(law.score, x).transpose(0, 2, 1), atol=1e-12 * scale)
    np.testing.assert_allclose(jacobian, np.swapaxes(jacobian, 1, 2), atol=1e-12 * scale)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_score_vjp_means(d):
    rng = np.random.default_rng(10 + d)
    law = mixture(rng, d)
    x, u = rng.normal(size=(20, d)), rng.normal(size=(20, d))
    expected = np.empty((20, 3, d))
    for k in range(3):
        for j in range(d):
            means = law.means.astype(complex)
            means[k, j] += 1j * STEP
            y = x[:, None, :] - means
            s = -np.einsum("kij,nkj->nki", law.precisions, y)
            joint = law.log_normalisers + 0.5 * np.einsum("nki,nki->nk", s, y)
            rho = np.exp(joint - joint.real.max(axis=1, keepdims=True))
            score = np.einsum("nk,nki->ni", rho / rho.sum(axis=1, keepdims=True), s)
            expected[:, k, j] = np.einsum("ni,ni->n", score.imag / STEP, u)
    np.testing.assert_allclose(law.score_vjp_means(x, u), expected, rtol=1e-10, atol=1e-11)
    frozen = law.responsibilities(x)[:, :, None] * np.einsum("kij,nj->nki", law.precisions, u)
    assert np.max(np.abs(frozen - expected)) > 1e-2          # planted: responsibilities held fixed


def test_gaussian_kl():
    rng = np.random.default_rng(3)
    p, q = Gaussian([0.3], [[0.5]]), Gaussian([-0.4], [[1.3]])
    x = np.linspace(-12, 12, 20001)
    lp, lq = p.log_density(x[:, None]), q.log_density(x[:, None])
    assert p.kl(q) == pytest.approx(np.trapezoid(np.exp(lp) * (lp - lq), x), rel=1e-10)
    for d in (1, 2, 5):
        p, q = gaussian(rng, d), gaussian(rng, d)
        assert p.kl(q) > 0 and p.kl(p) == pytest.approx(0, abs=1e-13) and p.kl(q) != pytest.approx(q.kl(p), rel=1e-3)
        a = rng.normal(size=(d, d))                          # invariant under x -> a x
        moved = [Gaussian(a @ r.mean, a @ r.cov @ a.T) for r in (p, q)]
        assert moved[0].kl(moved[1]) == pytest.approx(p.kl(q), rel=1e-8)
    both = Gaussian(np.zeros(2), np.diag([0.5, 1.3]))
    one = [Gaussian([0.0], [[v]]).kl(Gaussian([0.0], [[1.0]])) for v in (0.5, 1.3)]
    assert both.kl(Gaussian(np.zeros(2), np.eye(2))) == pytest.approx(sum(one), rel=1e-13)   # a sum over dimensions, not a mean
    with pytest.raises(ValueError, match="other: expected"):
        both.kl(Gaussian([0.0], [[1.0]]))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_noising_is_a_semigroup(seed, d):
    rng = np.random.default_rng(seed)
    law, (a, b), (v, u) = mixture(rng, d), rng.uniform(0.2, 1, 2), rng.uniform(0.01, 1, 2)
    twice, once = law.noised(a, v).noised(b, u), law.noised(a * b, b**2 * v + u)
    np.testing.assert_allclose(twice.means, once.means, rtol=1e-13)
    np.testing.assert_allclose(twice.covs, once.covs, rtol=1e-12)
    np.testing.assert_allclose(law.noised(a, v).mean, a * law.mean, rtol=1e-12)
    np.testing.assert_allclose(law.noised(a, v).cov, a**2 * law.cov + v * np.eye(d), rtol=1e-11, atol=1e-13)
    assert not np.allclose(twice.covs, law.noised(a * b, v + u).covs, rtol=1e-6)             # planted: variances merely added


def test_noised_density_is_a_convolution():
    law, alpha, v = GaussianMixture([0.3, 0.7], [[-1.2], [0.8]], [[[0.09]], [[0.16]]]), 0.6, 0.25
    y = np.linspace(-6, 6, 6001)
    density = np.exp(law.log_density(y[:, None]))
    assert np.trapezoid(density, y) == pytest.approx(1, rel=1e-12)
    for x in (-1.0, 0.1, 2.0):
        kernel = np.exp(-0.5 * (x - alpha * y) ** 2 / v) / np.sqrt(2 * np.pi * v)
        expected = np.trapezoid(density * kernel, y)
        assert np.exp(law.noised(alpha, v).log_density([[x]]))[0] == pytest.approx(expected, rel=1e-11)


def test_one_component_is_a_gaussian_and_tails_stay_finite():
    rng = np.random.default_rng(5)
    g = gaussian(rng, 3)
    m = GaussianMixture([1.0], g.mean[None], g.cov[None])
    x = rng.normal(size=(10, 3))
    np.testing.assert_allclose(m.log_density(x), g.log_density(x), rtol=1e-13)
    np.testing.assert_allclose(m.score(x), g.score(x), rtol=1e-12)
    np.testing.assert_allclose(m.cov, g.cov, rtol=1e-13)
    far = mixture(rng, 2)
    out = far.score([[1e4, -1e4]]), far.log_density([[1e4, -1e4]]), far.score_jacobian([[1e4, -1e4]])
    assert all(np.all(np.isfinite(v)) for v in out)


class Nodes:
    """All sign patterns of d normals, and every component in proportion: exact moments of degree three."""

    def __init__(self, d, components=None):
        grid = np.array(np.meshgrid(*[[-1.0, 1.0]] * d)).reshape(d, -1).T
        self.z = np.tile(grid, (1 if components is None else len(components), 1))
        self.j = None if components is None else np.repeat(components, len(grid))

    def start(self, d):
        return self.z

    def component(self, weights):
        return self.j


def test_sampling_is_a_pure_function_with_the_right_moments():
    rng = np.random.default_rng(6)
    g = gaussian(rng, 3)
    x = g.sample(Nodes(3))
    np.testing.assert_allclose(x.mean(axis=0), g.mean, atol=1e-13)
    np.testing.assert_allclose(np.cov(x.T, bias=True), g.cov, rtol=1e-12)
    m = GaussianMixture([0.25, 0.75], rng.normal(size=(2, 2)), spd(rng, 2, (2,)))
    x = m.sample(Nodes(2, [0, 1, 1, 1]))
    np.testing.assert_allclose(x.mean(axis=0), m.mean, atol=1e-13)
    np.testing.assert_allclose(np.cov(x.T, bias=True), m.cov, rtol=1e-12)


def test_noised_laws_are_cached_and_use_the_clock():
    vp, law = VP(0.1, 10.0), gaussian(np.random.default_rng(7), 2)
    assert noised_law(vp, law, 0.25) is noised_law(vp, law, 0.25)
    np.testing.assert_array_equal(noised_law(vp, law, 1.0).cov, law.cov)                      # t = T is data
    np.testing.assert_allclose(noised_law(vp, law, 0.25).mean, vp.alpha(0.75) * law.mean, rtol=1e-14)
    assert len(noised_laws(vp, law, TimeGrid.uniform(4, 1.0))) == 4


I2 = np.eye(2)
BAD = [
    ("mean", lambda: Gaussian([], np.zeros((0, 0)))),
    ("mean", lambda: Gaussian([np.nan], [[1.0]])),
    ("mean", lambda: Gaussian(0.0, [[1.0]])),
    ("cov", lambda: Gaussian([0.0, 0.0], [[1.0]])),
    ("cov", lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]])),
    ("cov", lambda: Gaussian([0.0, 0.0], [[1.0, 0.1], [0.2, 1.0]])),
    ("cov", lambda: Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])),
    ("cov", lambda: Gaussian([0.0, 0.0], [[1.0, np.nan], [np.nan, 1.0]])),
    ("cov", lambda: Gaussian([0.0], np.ones((1, 1, 1)))),
    ("weights", lambda: GaussianMixture([0.5, 0.4], np.zeros((2, 2)), [I2, I2])),
    ("weights", lambda: GaussianMixture([1.5, -0.5], np.zeros((2, 2)), [I2, I2])),
    ("weights", lambda: GaussianMixture([1.0, 0.0], np.zeros((2, 2)), [I2, I2])),
    ("weights", lambda: GaussianMixture([], np.zeros((0, 2)), np.zeros((0, 2, 2)))),
    ("weights", lambda: GaussianMixture([np.nan, 1.0], np.zeros((2, 2)), [I2, I2])),
    ("means", lambda: GaussianMixture([0.5, 0.5], np.zeros((3, 2)), [I2, I2])),
    ("means", lambda: GaussianMixture([0.5, 0.5], [[0.0, np.inf], [0, 0]], [I2, I2])),
    ("covs", lambda: GaussianMixture([0.5, 0.5], np.zeros((2, 2)), I2)),
    ("covs", lambda: GaussianMixture([0.5, 0.5], np.zeros((2, 2)), [I2, -I2])),
    ("x", lambda: Gaussian([0.0, 0.0], I2).log_density([0.0, 0.0])),
    ("x", lambda: Gaussian([0.0, 0.0], I2).score([[0.0]])),
    ("x", lambda: GaussianMixture([1.0], [[0.0, 0.0]], [I2]).score([[0.0]])),
]


@pytest.mark.parametrize(("name", "make"), BAD, ids=range(len(BAD)))
def test_bad_inputs_are_named_in_one_line(name, make):
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"{name}: expected") and ", got " in message and "\n" not in message


@pytest.mark.parametrize("d", [1, 2, 8])
def test_sums_over_coordinates(d):
    """As NumPy's sums; complex numbers are not conjugated, so that complex steps pass through."""
    rng = np.random.default_rng(d)
    x, y = rng.normal(size=(2, 5, 7, d)) + 1j * rng.normal(size=(2, 5, 7, d))
    S = rng.normal(size=(d, d))
    np.testing.assert_allclose(dot(x, y), np.sum(x * y, axis=-1), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(quadratic_form(x[0], S), np.sum((x[0] @ S) * x[0], axis=1), rtol=1e-13, atol=1e-13)
    assert np.abs(dot(x, y) - np.sum(np.conj(x) * y, axis=-1)).max() > 0.1  # planted: conjugated
    z = rng.normal(size=(100, d))
    assert [quadratic_form(row[None], S)[0] for row in z] == quadratic_form(z, S).tolist()  # each as if alone, to the bit


@pytest.mark.parametrize(("dtype", "low", "compiled"), [(np.float64, -708.0, exp_64), (np.float32, -87.0, exp_32)])
def test_exp(dtype, low, compiled):
    """exp(t), t <= 0, within 3 units in the last place (2.3 seen) wherever it is normal; below, the smallest normal ones."""
    t = np.concatenate([np.linspace(low, 0, 200_001), -np.geomspace(1e-12, 1, 1000)]).astype(dtype)
    got = np.array([compiled(v) for v in t], dtype=dtype)
    expected = np.exp(t.astype(np.longdouble))
    assert np.max(np.abs(got - expected) / np.spacing(expected.astype(dtype))) < 3
    assert compiled(dtype(2 * low)) == compiled(dtype(low)) > 0


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 127, 128, 300])
def test_blocks_of_points_are_points(d, count):
    """Rows of points in blocks, the last one narrow: the NumPy form for complex x, point by point; far points too."""
    rng = np.random.default_rng(d)
    root = rng.normal(size=(5, d, d))
    law = GaussianMixture(np.arange(1, 6) / 15, rng.normal(size=(5, d)), root @ root.transpose(0, 2, 1) + 0.2 * np.eye(d))
    x = rng.normal(size=(count, d)) * np.geomspace(0.1, 30, count)[:, None]
    z = x.astype(np.complex128)
    for name in ("log_density", "score", "score_jacobian"):
        expected = getattr(law, name)(z).real
        np.testing.assert_allclose(getattr(law, name)(x), expected, rtol=1e-11, atol=1e-11 * np.max(np.abs(expected)))
    x[0] = np.nan
    assert np.all(np.isnan(law.score(x)[0])) and np.isnan(law.log_density(x)[0]) and np.all(np.isfinite(law.score(x)[1:]))
