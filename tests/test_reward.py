"""Rewards: gradients by complex step, quadratic coefficients, and what a user's function may not return."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl import (
    BumpReward,
    CallableReward,
    ClassLogPosteriorReward,
    Gaussian,
    GaussianMixture,
    LinearReward,
    LogDensityReward,
    QuadraticReward,
)

STEP = 1e-30


def complex_gradient(f, x):
    out = []
    for j in range(x.shape[1]):
        z = x.astype(complex)
        z[:, j] += 1j * STEP
        out.append(np.imag(f(z)) / STEP)
    return np.stack(out, axis=1)


def rewards(d):
    rng = np.random.default_rng(d)
    a = rng.normal(size=(3, d, d))
    cov = a @ a.transpose(0, 2, 1) / d + 0.3 * np.eye(d)
    g = Gaussian(rng.normal(size=d), cov[0])
    m = GaussianMixture([0.2, 0.5, 0.3], rng.normal(size=(3, d)), cov)
    return [
        QuadraticReward(cov[1], rng.normal(size=d)), QuadraticReward(-cov[1], rng.normal(size=d), rng.normal(size=d)),
        LinearReward(rng.normal(size=d)), BumpReward(rng.normal(size=d), 0.7), LogDensityReward(g), LogDensityReward(m),
        ClassLogPosteriorReward((g, m, Gaussian(np.zeros(d), np.eye(d))), [0.2, 0.3, 0.5], 1)]


@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradient_is_complex_step(d):
    x = np.random.default_rng(99).normal(size=(30, d))
    for reward in rewards(d):
        assert reward.dim == d and reward.value(x).shape == (30,)
        expected = complex_gradient(reward.value, x)
        np.testing.assert_allclose(reward.gradient(x), expected, rtol=1e-10, atol=1e-11)
        wrong = reward.gradient(x + 1e-4)    # planted: the gradient at a neighbouring point
        assert isinstance(reward, LinearReward) or np.max(np.abs(wrong - expected)) > 1e-6


@pytest.mark.parametrize("d", [1, 2, 5])
def test_quadratic_coefficients_give_the_same_function(d):
    x = np.random.default_rng(98).normal(size=(20, d))
    seen = 0
    for reward in rewards(d):
        if (q := reward.quadratic(d)) is not None:
            seen += 1
            value = -0.5 * np.einsum("ni,ij,nj->n", x, q.matrix, x) + x @ q.vector + q.constant
            np.testing.assert_allclose(value, reward.value(x), rtol=1e-11, atol=1e-12)
    assert seen == 4                         # two quadratics, the linear one, the log-density of a Gaussian


def test_class_posteriors_sum_to_one():
    laws, x = (Gaussian([0.0], [[1.0]]), Gaussian([2.0], [[0.3]])), np.linspace(-30, 30, 50)[:, None]
    total = sum(np.exp(ClassLogPosteriorReward(laws, [0.4, 0.6], c).value(x)) for c in (0, 1))
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_class_posteriors_at_their_edges():
    """No probability above 1 where two large numbers round; priors as far from 1 as they may be; components without weight."""
    laws, x = (Gaussian([0.0], [[1e-8]]), Gaussian([0.5], [[1e-8]])), np.linspace(-1, 1, 2001)[:, None]
    assert ClassLogPosteriorReward(laws, [0.5, 0.5], 0).value(x).max() == 0
    mixed = (GaussianMixture([1 / 3, 2 / 3 + 9e-9], [[0.0], [1.0]], [[[1.0]], [[0.5]]]), Gaussian([2.0], [[0.3]]))
    total = sum(np.exp(ClassLogPosteriorReward(mixed, [0.4, 0.6 + 9e-9], c).value(x)) for c in (0, 1))
    np.testing.assert_allclose(total, 1, rtol=1e-14)
    faint, sure, zero = GaussianMixture([1e-200, 1 - 1e-200], [[0.0], [1.0]], [[[1.0]], [[0.5]]]), Gaussian([2.0], [[0.3]]), np.zeros((1, 1))
    r = ClassLogPosteriorReward((faint, sure), [1e-150, 1 - 1e-150], 0).value(zero)
    np.testing.assert_allclose(r, np.log(1e-150) + faint.log_density(zero) - sure.log_density(zero), rtol=1e-12)


def test_callable_reward():
    x = np.random.default_rng(1).normal(size=(12, 3))

    def f(x):
        return np.sin(x[:, 0]) * x[:, 1] - x[:, 2] ** 2

    def df(x):
        return np.stack([np.cos(x[:, 0]) * x[:, 1], np.sin(x[:, 0]), -2 * x[:, 2]], axis=1)

    np.testing.assert_allclose(CallableReward(f).gradient(x), df(x), rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(CallableReward(f, df).gradient(x), df(x))
    np.testing.assert_array_equal(CallableReward(f).value(x), f(x))
    assert CallableReward(f).quadratic(3) is None and CallableReward(f).dim is None


X = np.ones((4, 2))
LAW = Gaussian([0.0, 0.0], np.eye(2))
BAD = [
    ("matrix", lambda: QuadraticReward([[1.0]], [0.0, 0.0])),
    ("matrix", lambda: QuadraticReward([[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0])),
    ("matrix", lambda: QuadraticReward([[np.nan]], [0.0])),
    ("center", lambda: QuadraticReward([[1.0]], 0.0)),
    ("linear", lambda: QuadraticReward([[1.0]], [0.0], [1.0, 2.0])),
    ("linear", lambda: LinearReward([np.inf])),
    ("center", lambda: BumpReward([[0.0]], 1.0)),
    ("width", lambda: BumpReward([0.0], 0.0)),
    ("width", lambda: BumpReward([0.0], np.nan)),
    ("law", lambda: LogDensityReward("normal")),
    ("laws", lambda: ClassLogPosteriorReward((LAW,), [1.0], 0)),
    ("laws", lambda: ClassLogPosteriorReward((LAW, Gaussian([0.0], [[1.0]])), [0.5, 0.5], 0)),
    ("laws", lambda: ClassLogPosteriorReward((LAW, "normal"), [0.5, 0.5], 0)),
    ("prior", lambda: ClassLogPosteriorReward((LAW, LAW), [0.5, 0.6], 0)),
    ("label", lambda: ClassLogPosteriorReward((LAW, LAW), [0.5, 0.5], 2)),
    ("label", lambda: ClassLogPosteriorReward((LAW, LAW), [0.5, 0.5], 0.5)),
    ("value", lambda: CallableReward(3.0)),
    ("gradient", lambda: CallableReward(lambda x: x[:, 0], 3.0)),
    ("reward", lambda: CallableReward(lambda x: x).value(X)),
    ("reward", lambda: CallableReward(lambda x: 1.0).value(X)),
    ("reward", lambda: CallableReward(lambda x: np.full(len(x), np.nan)).value(X)),
    ("reward", lambda: CallableReward(lambda x: x[:, 0] / 0.0).value(X)),
    ("reward gradient", lambda: CallableReward(lambda x: x[:, 0], lambda x: x[:, 0]).gradient(X)),
    ("reward gradient", lambda: CallableReward(lambda x: x[:, 0], lambda x: x * np.nan).gradient(X)),
    ("reward", lambda: CallableReward(lambda x: x.real[:, 0]).gradient(X)),
    ("reward", lambda: CallableReward(lambda x: np.array([float(v) for v in x[:, 0]])).gradient(X)),
]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("name", "make"), BAD, ids=range(len(BAD)))
def test_bad_inputs_are_named_in_one_line(name, make):
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"{name}: expected") and ", got " in message and "\n" not in message
