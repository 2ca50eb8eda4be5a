# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own estimator
#
# One function `(problem, policy, grid, noise) -> ctrl.Gradient`, per-path samples inside. On problems whose $\nabla J$ is known its bias shows
# to ten digits, without a random number. The chain, with $\xi_i$ its noise:
#
# $$X_{i+1} = X_i + (-f_iX_i + h_ia_i)D_i + \eta g_i\sqrt{D_i}\,\xi_i,\qquad
# \nabla J = \sum_i D_i\,\mathbb E\left[(\partial_\theta\mu_i)^\top\left(h_i\nabla V_{i+1}(X_{i+1}) - 2\lambda\kappa_i(\mu_i - s_i)\right)\right].$$
#
# Below, a score function with reward-to-go written from scratch; replace `mine` by yours.

# %%
import os
from functools import partial

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import FloatSlider, interact

QUICK = os.environ.get("QUICK") == "1"
ETA = 0.7
KL_WEIGHT = 0.5
PATHS = 2000 if QUICK else 20_000      # of the Monte Carlo check
BASELINE = -3.0                        # any constant leaves the mean alone


# %%
def mine(problem, policy, grid, noise, baseline=BASELINE, explicit=1.0, power=0.5):
    """sum_i (d mu_i)'( h_i D_i^power / (eta g_i) xi_i (G_{i+1} - b) + explicit e_i ):  right at power = 1/2 and explicit = 1."""
    paths, c = ctrl.simulate(problem, policy, grid, noise, trajectory=True), problem.coefficients(grid)
    samples = np.zeros((noise.paths, policy.theta.size))
    to_go = paths.reward.copy()                                     # G_{i+1}, from the last step back
    for i in reversed(range(grid.steps)):
        x = paths.states[:, i]
        away = paths.actions[:, i] - problem.score(grid.times[i], x)
        gain = c.h[i] * c.dt[i]**power / (problem.eta * np.sqrt(c.g2[i]))
        e = -2 * problem.kl_weight * c.kappa[i] * c.dt[i] * away
        policy.add_vjp(samples, grid, i, x, gain * paths.noise_steps[:, i] * (to_go - baseline)[:, None] + explicit * e)
        to_go -= problem.kl_weight * c.kappa[i] * c.dt[i] * np.sum(away**2, axis=1)
    return ctrl.Gradient.from_samples(samples, noise.weights)


def setting(eta=ETA, kl_weight=KL_WEIGHT, steps=3):
    """mu - s depends on x, eta is not 1, lambda is not 0, the grid is uneven: nothing hides."""
    p = ctrl.zoo.gaussian_pull_2d(eta)
    problem = ctrl.Problem(p.schedule, p.data, p.reward, kl_weight, eta)
    policy = ctrl.BasisPolicy(problem, lambda t: np.ones(1), W=[[[0.2, -0.1], [0.1, 0.2]]], w=[[0.3, -0.2]])
    return problem, policy, ctrl.TimeGrid(problem.horizon * np.linspace(0, 1, steps + 1) ** 1.3)


def bias(estimator, **where):
    at = setting(**where)
    truth = ctrl.exact.evaluate(*at).gradient.theta
    return np.linalg.norm(estimator(*at, ctrl.Noise.signs(*at)).mean - truth) / np.linalg.norm(truth)


def draw(explicit=1.0, power=0.5, baseline=BASELINE):
    at = setting()
    truth, found = ctrl.exact.evaluate(*at).gradient.theta, mine(*at, ctrl.Noise(seed=0, paths=PATHS), baseline, explicit, power)
    exactly = mine(*at, ctrl.Noise.signs(*at), baseline, explicit, power).mean
    _, ax = plt.subplots(figsize=(7.5, 3.4))
    k = np.arange(truth.size)
    ax.bar(k, truth, width=0.7, color="0.85", label=r"exact $\nabla J$")
    ax.plot(k, exactly, "C3_", ms=26, mew=2, label=f"yours, {2 ** 8} sign patterns: exact expectation")
    ax.errorbar(k, found.mean, 3 * found.standard_error, fmt="C0o", ms=4, label=f"yours, {PATHS} random paths, 3 standard errors")
    ax.set(xticks=k, xticklabels=["$W_{11}$", "$W_{12}$", "$W_{21}$", "$W_{22}$", "$w_1$", "$w_2$"],
           title=f"relative bias {np.linalg.norm(exactly - truth) / np.linalg.norm(truth):.1e}")
    ax.legend()
    plt.show()


draw()

# %% [markdown]
# Drag `explicit` from 1 to 0: the term $e_i$ fades out, and the random paths need luck to see what the sign patterns see at once. `power` is that of
# $D$ in $\sigma_i$; at 0 the root of $D$ is missing. `baseline` moves the error bars only.

# %% tags=["skip-execution"]
interact(draw, explicit=FloatSlider(1.0, min=0.0, max=1.0, step=0.1, continuous_update=False),
         power=FloatSlider(0.5, min=0.0, max=1.0, step=0.25, continuous_update=False),
         baseline=FloatSlider(BASELINE, min=-10, max=10, step=1, continuous_update=False));

# %% [markdown]
# ## In your own tests
#
# `assert_unbiased` is the line to put into your pytest. It refuses what it cannot decide, and warns where errors are invisible.

# %%
error = ctrl.testing.assert_unbiased(mine, *setting())
print(f"mine: relative error {error:.1e}")
planted = {"no explicit gradient": partial(mine, explicit=0.0), "half of it": partial(mine, explicit=0.5), "no root of D": partial(mine, power=0.0)}
reasons = {}
for name, formula in planted.items():
    try:
        ctrl.testing.assert_unbiased(formula, *setting())
    except AssertionError as failure:
        reasons[name] = str(failure)
        print(f"\n{name}: {failure}")

# %% [markdown]
# ## Where sign patterns do not reach
#
# Ratios, clips and batch statistics are no polynomials. There the Monte Carlo twin states its error rates: a false alarm once in $10^6$, and
# `resolves`, the smallest error that it sees 999 times in 1000; if that is larger than what you ask for, it refuses to judge.

# %%
at = setting(steps=20)
truth = ctrl.exact.evaluate(*at).gradient.theta
found = mine(*at, ctrl.Noise(seed=1, paths=PATHS))
ctrl.testing.assert_mean(found.samples, truth, resolves=0.5 * np.linalg.norm(truth))
print(f"largest |z| = {np.max(np.abs(found.mean - truth) / found.standard_error):.2f} on {PATHS} paths, N = 20")
without = mine(*at, ctrl.Noise(seed=1, paths=PATHS), baseline=0.0)
print(f"trace of one path's covariance: {np.trace(found.covariance):.1f}; without the baseline {np.trace(without.covariance):.1f}")

# %% [markdown]
# ## Beside all others
#
# The same function in a file, `ctrl bench --estimator FILE.py:mine`, gives a table and figure of bias, variance, its exponent in $N$, speed and cost.
# `analysis/wrong_estimator.py` is a file to copy.
#
# ## Exercises
#
# 1. Use the batch's own mean, `to_go.mean()`, as the baseline. The sign patterns see nothing; why? *Hint:* over all patterns that mean is a
#    constant. In
#    a random batch of $n$ paths the score part shrinks by $1 - 1/n$: batch statistics are for `assert_mean`.
# 2. Set `ETA = 1.0` and write `np.sqrt(c.g2[i])` in the place of $h/(\eta g)$. Is it caught? At `ETA = 0.7`? *Hint:* $h = g^2$ at $\eta = 1$.
# 3. Move `to_go -= ...` before `add_vjp`. The mean does not change; why? *Hint:* cost$_i$ is known at $X_i$; it is a baseline.

# %%
assert error < 1e-10 and bias(mine) < 1e-10
assert set(reasons) == set(planted) and all("biased" in reason for reason in reasons.values())
assert np.allclose(mine(*setting(), ctrl.Noise.signs(*setting()), baseline=4.0).mean, mine(*setting(), ctrl.Noise.signs(*setting())).mean, rtol=1e-9)
