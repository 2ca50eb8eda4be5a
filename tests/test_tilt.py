"""Tilts, Doob's linear chain, the initial-law bias, the continuous optimum by time reversal, and f-divergences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ctrl
from ctrl import exact, zoo
from ctrl.exact import limit, quadrature, tilt
from ctrl.exact.divergence import KL, Alpha, ChiSquare, ForwardKL, divergence_tilt, line_divergence_tilt
from ctrl.exact.linear_doob import Exponent, LinearDoob
from ctrl.laws import Gaussian
from ctrl.testing import gaussians

PULL, MIXTURE = zoo.gaussian_pull_2d(), zoo.mixture_bump_1d()
LINE = ctrl.Problem(ctrl.VP(0.1, 3.0), Gaussian([0.5], [[0.4]]), ctrl.QuadraticReward([[1.2]], [-0.7], [0.3]), kl_weight=0.4)
DIVERGENCES = [KL(), ForwardKL(), ChiSquare(), Alpha(0.5), Alpha(2.0), Alpha(3.0)]


def reward_of(seed, d):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d)) / np.sqrt(d)
    return ctrl.QuadraticReward(root @ root.T - 0.1 * np.eye(d), rng.normal(size=d), rng.normal(size=d))


# ---- tilts -----------------------------------------------------------------------------------------------------------


def test_tilts_in_closed_form_and_by_panels():
    one = tilt.tilt(LINE.data, LINE.reward, 0.4)
    plain = ctrl.CallableReward(LINE.reward.value)
    other = tilt.tilt(LINE.data, plain, 0.4)
    for name in ("objective", "reward", "kl"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-12)
    assert one.law.precision[0, 0] == pytest.approx(1 / 0.4 + 1.2 / 0.4, rel=1e-14)
    assert one.kl == pytest.approx(one.law.kl(LINE.data), rel=1e-12)
    far = tilt.tilt(LINE.data, ctrl.LinearReward([8.0]), 0.4)  # twelve deviations away
    assert tilt.tilt(LINE.data, ctrl.CallableReward(lambda x: 8 * x[:, 0]), 0.4).reward == pytest.approx(far.reward, rel=1e-12)
    # planted: lambda and 1/lambda exchanged
    assert abs(tilt.tilt(LINE.data, LINE.reward, 1 / 0.4).kl - one.kl) > 0.1


@settings(deadline=None, max_examples=30)
@given(gaussians(2), st.integers(0, 100), st.floats(0.3, 3.0))
def test_gaussian_tilts_are_optimal(law, seed, kl_weight):
    """E r - lambda KL of the tilt is its objective, and of any other Gaussian less: by KL(other || tilt)."""
    reward, rng = reward_of(seed, 2), np.random.default_rng(seed + 1)
    best = tilt.tilt(law, reward, kl_weight)
    r = Exponent.of(reward.quadratic(2), 1.0)
    assert r.mean(best.law) - kl_weight * best.law.kl(law) == pytest.approx(best.objective, rel=1e-9, abs=1e-9)
    other = Gaussian(best.law.mean + 0.3 * rng.normal(size=2), best.law.cov * np.exp(0.3 * rng.normal()))
    lost = best.objective - (r.mean(other) - kl_weight * other.kl(law))
    assert lost == pytest.approx(kl_weight * other.kl(best.law), rel=1e-8, abs=1e-9)


def test_frontier_has_slope_lambda():
    for law, reward in ((PULL.data, PULL.reward), (MIXTURE.data, MIXTURE.reward)):
        e = 1e-4
        low, here, high = tilt.frontier(law, reward, [0.4 - e, 0.4, 0.4 + e])
        assert (high.reward - low.reward) / (high.kl - low.kl) == pytest.approx(0.4, rel=1e-6)
        assert (high.objective - low.objective) / (2 * e) == pytest.approx(-here.kl, rel=1e-6)
        samples = tilt.yardstick(reward.value(law.sample(ctrl.Noise(0, 200_000))), 0.4)
        for name in ("objective", "reward", "kl"):
            assert abs(getattr(samples, name) - getattr(here, name)) < 5.5 * getattr(samples, f"{name}_error")  # false alarm 4e-8 each


# ---- Doob's linear chain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("start", ["prior", "exact"])
@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.gaussian_8d])
def test_linear_doob_chain(make, start, eta):
    """From the start p_0 phi_0 the terminal law is the tilt of the chain's terminal law, at every N; and log ratios path by path."""
    problem = replace(make(eta=eta), start=start)
    for steps in (1, 7, 60):
        grid = problem.grid(steps)
        doob = exact.doob(problem, grid)
        pre = exact.evaluate(problem, problem.pretrained(grid), grid).terminal
        target = tilt.tilt(Gaussian(pre.mean, pre.cov), problem.reward, problem.kl_weight)
        found = doob.terminal(doob.tilted_start)
        np.testing.assert_allclose(found.mean, target.law.mean, atol=1e-11)
        np.testing.assert_allclose(found.cov, target.law.cov, atol=1e-12)
        if eta == 0.5:  # planted: the start law unchanged, where the chain remembers it
            assert doob.terminal(doob.start).kl(target.law) > 1e-5
    chain, c = exact.chain.LinearChain(problem, problem.pretrained(grid), grid), doob.kernel
    (A, b), rng = chain.maps, np.random.default_rng(0)
    x = doob.start.from_normals(rng.normal(size=(5, problem.dim)))
    first, ratio = doob.log_phi(0, x), 0.0
    for i in range(steps):
        free = Gaussian(np.zeros(problem.dim), c[2][i])
        step, pre_mean = free.from_normals(rng.normal(size=x.shape)), x @ A[i].T + b[i]
        y = x @ c[0][i].T + c[1][i] + step
        ratio = ratio + free.log_density(step) - Gaussian(np.zeros(problem.dim), chain.step_cov[i]).log_density(y - pre_mean)
        x = y
    np.testing.assert_allclose(problem.reward.value(x) / problem.kl_weight - ratio, first, atol=1e-9)


def test_doob_reference_numbers():
    grid = PULL.grid(100)
    doob = exact.doob(PULL, grid)
    assert doob.objective == pytest.approx(-1.390575, abs=5e-7)
    assert doob.objective > exact.optimum(PULL, grid).objective  # fewer controls, less value
    step = 1e-5 * np.eye(2)
    x = np.array([[0.3, -0.2]])
    slope = [(doob.log_phi(40, x + h) - doob.log_phi(40, x - h))[0] / 2e-5 for h in step]
    np.testing.assert_allclose(doob.gradient(40, x)[0], slope, rtol=1e-8)


def test_doob_dispatch():
    grid = LINE.grid(12)
    linear, line = exact.doob(LINE, grid), quadrature.doob(LINE, grid)
    assert isinstance(linear, LinearDoob) and isinstance(exact.doob(MIXTURE, grid), quadrature.Doob)
    for name in ("objective", "path_kl", "expected_reward"):
        assert getattr(line, name) == pytest.approx(getattr(linear, name), rel=1e-11)
    x = np.linspace(-1, 1, 5)[:, None]
    assert np.max(np.abs(line.log_phi(4, x) - linear.log_phi(4, x))) < 1e-11
    with pytest.raises(ValueError, match="^problem: expected kl_weight > 0 and discount 0"):
        exact.doob(replace(LINE, discount=0.1), grid)
    with pytest.raises(ValueError, match="^eta: expected eta > 0"):
        exact.doob(replace(LINE, eta=0.0), grid)
    with pytest.raises(ValueError, match=r"^kl_weight: expected a weight large enough for E e\^\(r / kl_weight\)"):
        exact.doob(replace(LINE, reward=ctrl.QuadraticReward([[-6.0]], [0.0])), grid)


# ---- the initial-law bias --------------------------------------------------------------------------------------------


REFERENCE_BIAS = {1.0: "1.11e-10 2.473e-6 1.206e-3 1.339e-2 6.314e-2", 0.5: "1.46e-3 2.06e-2 1.32e-1 3.05e-1 5.29e-1",
                  1.5: "5e-22 2.9e-12 2.5e-6 3.3e-4 5.4e-3"}


@pytest.mark.parametrize("eta", REFERENCE_BIAS)
def test_initial_law_bias(eta):
    """The fifteen numbers of theory.md to the digits given there; the law itself against the optimum's ODEs; and not a finite N."""
    for beta_max, expected in zip((20.0, 10.0, 4.0, 2.0, 1.0), REFERENCE_BIAS[eta].split(), strict=True):
        problem = replace(PULL, schedule=ctrl.VP(0.1, beta_max), start="exact", eta=eta)
        bias = tilt.initial_bias(problem)
        digits = sum(c.isdigit() for c in expected.split("e")[0])
        assert float(f"{bias.kl:.{digits - 1}e}") == float(expected)
        terminal = limit.evaluate(problem, limit.optimum(problem).policy).terminal
        np.testing.assert_allclose(bias.terminal.mean, terminal.mean, atol=1e-11)
        np.testing.assert_allclose(bias.terminal.cov, terminal.cov, atol=1e-11)
        assert bias.terminal.kl(bias.tilt) == pytest.approx(bias.kl, abs=1e-14)
    problem = replace(PULL, schedule=ctrl.VP(0.1, 20.0), start="exact", eta=eta)
    grid = problem.grid(2000)
    chain = exact.doob(problem, grid).terminal(problem.start_law)
    finite, long = chain.kl(tilt.initial_bias(problem).tilt), tilt.initial_bias(problem).kl
    assert abs(finite - long) > 1e-7  # planted: step size quoted as bias
    if eta == 1:
        best = exact.optimum(problem, grid).truth.terminal
        assert Gaussian(best.mean, best.cov).kl(tilt.initial_bias(problem).tilt) == pytest.approx(7e-7, abs=0.5e-7)


@pytest.mark.parametrize("schedule", [ctrl.VP(0.1, 4.0), ctrl.VE(0.05, 2.0), ctrl.SubVP(0.1, 4.0), ctrl.OU(2.0, 0.7)])
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
def test_bridge_against_fine_chains(schedule, eta):
    """E[X_T | X_t] and its covariance, by ODEs for the linear chain of zero reward; phi against the Riccati solution."""
    problem = replace(PULL, schedule=schedule, start="exact", eta=eta)
    value = limit.optimum(problem)
    t = 0.3 * problem.horizon
    bridge = tilt.Bridge.of(problem, t)
    law = problem.marginal(t)
    np.testing.assert_allclose(bridge.Gamma + bridge.Phi @ law.cov @ bridge.Phi.T, problem.data.cov, atol=1e-12)  # the marginals agree
    phi = bridge.log_phi(Exponent.of(problem.reward.quadratic(2), problem.kl_weight))
    x = np.array([[0.4, -0.3], [1.0, 0.5]])
    K, k = value.policy.affine_at(t)
    _, _, h, kappa = schedule.rates(t, eta)
    feedback = x @ K.T + k - problem.score(t, x)
    gradient = problem.kl_weight * (phi.w - x @ phi.S)
    np.testing.assert_allclose(feedback, h / (2 * problem.kl_weight * kappa) * gradient, atol=1e-9)
    if eta != 1:  # planted: the eta = 1 formula elsewhere
        assert np.max(np.abs(feedback - gradient / problem.kl_weight)) > 1e-2


def test_reversal_optimum():
    """Against the Riccati equation and the closed-form bias on Gaussian data; the chains of a mixture tend to it at order 1."""
    for start in ("prior", "exact"):
        problem = replace(LINE, start=start)
        found, true, bias = tilt.reversal_optimum(problem), limit.optimum(problem), tilt.initial_bias(problem)
        assert found.objective == pytest.approx(true.objective, rel=1e-12) and found.path_kl == pytest.approx(true.path_kl, rel=1e-11)
        assert found.bias == pytest.approx(bias.kl, rel=1e-9)
        assert found.masses @ found.points == pytest.approx(bias.terminal.mean[0], rel=1e-12)
    limit_ = tilt.reversal_optimum(MIXTURE)
    means, free = np.array([[exact.optimum(MIXTURE, MIXTURE.grid(n)).objective, exact.doob(MIXTURE, MIXTURE.grid(n)).objective]
                            for n in (50, 100, 200)]).T
    for curve in (means, free):
        errors = curve - limit_.objective
        assert np.all(np.abs(np.log2(errors[:-1] / errors[1:]) - 1) < 0.05)
    assert limit_.bias == pytest.approx(4.475e-6, rel=1e-3)
    with pytest.raises(ValueError, match="^eta: expected 1, where the model is the time reversal"):
        tilt.reversal_optimum(zoo.mixture_bump_1d(eta=0.5))


# ---- f-divergences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [*DIVERGENCES, Alpha(-1.0), Alpha(0.3)])
def test_divergences_are_what_they_say(divergence):
    """f(1) = f'(1) = 0, f' and f'' are derivatives, ratio inverts f', and is 0 below f'(0)."""
    one, u = np.ones(1), np.linspace(0.2, 3, 15)
    assert divergence.f(one)[0] == divergence.slope(one)[0] == 0
    h = 1e-5
    np.testing.assert_allclose((divergence.f(u + h) - divergence.f(u - h)) / (2 * h), divergence.slope(u), atol=1e-8)
    np.testing.assert_allclose((divergence.slope(u + h) - divergence.slope(u - h)) / (2 * h), divergence.curvature(u), rtol=1e-7)
    np.testing.assert_allclose(divergence.ratio(divergence.slope(u)), u, rtol=1e-12)
    assert np.all(divergence.slope(u) < divergence.highest)
    if np.isfinite(divergence.lowest):
        assert divergence.ratio(np.array([divergence.lowest - 0.1]))[0] == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_tilts_are_optimal(divergence):
    """On samples of an 8-D law: no perturbation helps, r - lambda f'(u) is level on the support, and it is the tilt for KL."""
    problem = zoo.gaussian_8d()
    r = problem.reward.value(problem.data.sample(ctrl.Noise(1, 4_000)))
    best, lam = divergence_tilt(r, 1.5, divergence), 1.5
    m, u, rng = best.masses, best.ratio, np.random.default_rng(0)
    assert m @ u == pytest.approx(1, abs=1e-12) and best.objective == pytest.approx(m @ (u * r) - lam * m @ divergence.f(u), rel=1e-12)
    seen = u > 0
    assert np.ptp(r[seen] - lam * divergence.slope(u[seen])) < 1e-8 * np.ptp(r)
    assert np.all(r[~seen] <= best.level + lam * divergence.lowest + 1e-9)

    def objective(v):
        return m @ (v * r) - lam * m @ divergence.f(v)

    for _ in range(5):
        move = np.where(seen, u, 0.0) * rng.uniform(-1, 1, len(u))
        move = move - u * (m @ move)
        for e in (-1e-3, 1e-3):
            lost = best.objective - objective(u + e * move)
            assert lost == pytest.approx(0.5 * lam * e**2 * (m[seen] @ (divergence.curvature(u[seen]) * move[seen] ** 2)), rel=0.02)
    wrong = divergence_tilt(r, 1 / lam, divergence)  # planted: lambda and 1/lambda exchanged
    assert objective(wrong.ratio) < best.objective - 1e-2
    if isinstance(divergence, KL):
        same = tilt.yardstick(r, lam)
        assert best.objective == pytest.approx(same.objective, rel=1e-12)
        np.testing.assert_allclose(u, same.weights, rtol=1e-10)


def test_divergence_tilts_on_the_line():
    law, reward, lam = MIXTURE.data, MIXTURE.reward, 0.2
    true = tilt.tilt(law, reward, lam)
    kl = line_divergence_tilt(law, reward, lam, KL())
    assert (kl.objective, kl.reward, kl.divergence) == pytest.approx((true.objective, true.reward, true.kl), rel=1e-11)
    # alpha -> 1 is KL at order 1, alpha -> 0 is forward KL, 2 chi^2/2
    gaps = [line_divergence_tilt(law, reward, lam, Alpha(1 + e)).objective - true.objective for e in (4e-3, 2e-3, -2e-3)]
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.03) and gaps[2] / gaps[1] == pytest.approx(-1, abs=0.03)
    forward = line_divergence_tilt(law, reward, lam, ForwardKL()).objective
    assert line_divergence_tilt(law, reward, lam, Alpha(1e-6)).objective == pytest.approx(forward, abs=1e-6)
    half = line_divergence_tilt(law, reward, lam, Alpha(2.0)).objective
    assert line_divergence_tilt(law, reward, lam / 2, ChiSquare()).objective == pytest.approx(half, rel=1e-12)
    # a dense lattice, and the spacing's square where the ratio is cut
    x = np.linspace(-4, 4, 40_001)
    masses = np.exp(law.log_density(x[:, None]))
    for divergence in DIVERGENCES:
        found = line_divergence_tilt(law, reward, lam, divergence)
        dense = divergence_tilt(reward.value(x[:, None]), lam, divergence, masses / masses.sum())
        assert found.objective == pytest.approx(dense.objective, abs=1e-8)
    with pytest.raises(ValueError, match="^divergence: expected one under which a density is optimal"):
        digits = zoo.digits_line()
        line_divergence_tilt(digits.data, digits.reward, 0.5, Alpha(-1.0))


def test_tilts_in_the_plane():
    """A mixture of one component against the closed form, and a product of lines with a sum of rewards against the lines' own tilts."""
    single = ctrl.GaussianMixture([1.0], PULL.data.mean[None], PULL.data.cov[None])
    known, found = (tilt.tilt(law, PULL.reward, 0.5) for law in (PULL.data, single))

    def numbers(t):
        return np.array([t.objective, t.reward, t.kl])

    np.testing.assert_allclose(numbers(found), numbers(known), rtol=1e-9)
    assert abs(tilt.tilt(single, PULL.reward, 0.501).objective / known.objective - 1) > 1e-5

    line, bump = MIXTURE.data, MIXTURE.reward
    pair = ctrl.GaussianMixture(np.outer(line.weights, line.weights).ravel(), [[a, b] for a in line.means[:, 0] for b in line.means[:, 0]],
                                [np.diag([a, b]) for a in line.covs[:, 0, 0] for b in line.covs[:, 0, 0]])
    both = tilt.tilt(pair, ctrl.CallableReward(lambda x: bump.value(x[:, :1]) + bump.value(x[:, 1:])), 0.2)
    np.testing.assert_allclose(numbers(both), 2 * numbers(tilt.tilt(line, bump, 0.2)), rtol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="^kl_weight: expected .* integrable"):
        tilt.tilt(LINE.data, ctrl.CallableReward(lambda x: x[:, 0] ** 2), 0.2)
    with pytest.raises(ValueError, match="^kl_weight: expected a weight large enough"):
        tilt.tilt(LINE.data, ctrl.QuadraticReward([[-2.0]], [0.0]), 0.2)
    with pytest.raises(ValueError, match="^law: expected a Gaussian with a quadratic reward, or dimension 1"):
        tilt.tilt(ctrl.Gaussian(np.zeros(3), np.eye(3)), ctrl.BumpReward(np.zeros(3), 1.0), 0.5)
    with pytest.raises(ValueError, match="^problem: expected Gaussian data for a bridge"):
        tilt.Bridge.of(MIXTURE)
    with pytest.raises(ValueError, match="^problem: expected Gaussian data and a quadratic reward for the initial-law bias"):
        tilt.initial_bias(replace(PULL, reward=ctrl.BumpReward([0.0, 0.0], 1.0)))
    with pytest.raises(ValueError, match="^eta: expected eta > 0"):
        tilt.initial_bias(replace(PULL, eta=0.0))
    for a in (0, 1):
        with pytest.raises(ValueError, match="^a: expected a number other than 0"):
            Alpha(a)
    with pytest.raises(ValueError, match="^masses: expected numbers >= 0 that sum to 1"):
        divergence_tilt([1.0, 2.0], 1.0, KL(), [0.5, 0.6])
    with pytest.raises(ValueError, match="^rewards: expected at least 2 points"):
        divergence_tilt([1.0], 1.0, KL())
