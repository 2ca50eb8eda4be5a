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
# # The value network's skeleton
#
# $$V_\phi(t,x) = c_{\mathrm{skip}}(t)\,r(\hat x_0(t,x)) + c_{\mathrm{out}}(t)\,F_\phi(t,x),\qquad \hat x_0 = \frac{x + v\,s(t,x)}{\alpha}\
# \text{(Tweedie)},\qquad
# c_{\mathrm{skip}}(T) = 1,\ c_{\mathrm{out}}(T) = 0.$$
#
# Why it fits: for the pre-trained policy at $\eta = 1$, Gaussian data $\mathcal N(m, C)$ and a quadratic reward,
# $V - r(\hat x_0) = -\tfrac12\mathrm{tr}\,(Q\,\mathrm{Cov}(X_T|X_t))$, a function of time alone, $\mathrm{Cov} = (C^{-1} + \alpha^2/v\,I)^{-1}$.
# At other $\eta$ the mean $\mathbb E_\eta[X_T|x]$ is not Tweedie's, and $\hat x_0$ leaves a part that depends on $x$.

# %%
import os

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ctrl.exact.tilt import Bridge
from ipywidgets import FloatSlider, interact

QUICK = os.environ.get("QUICK") == "1"
ETA = 1.0
TIME = 0.5         # generation time t in the first picture
FEW = 64           # paths from which a value is learned
REPEATS = 20 if QUICK else 200


# %%
def denoised(problem, t, x):
    """Tweedie: E[X_T | X_t = x] at eta = 1."""
    tau = problem.schedule.tau(t)
    alpha, v = problem.schedule.alpha(tau), problem.schedule.v(tau)
    return (x + v * problem.score(t, x)) / alpha


def value(problem):
    """V of the pre-trained policy in continuous time."""
    return ctrl.exact.limit.value(problem, ctrl.BasisPolicy.shift(problem, [0.0, 0.0]))


def draw(t=TIME, eta=ETA):
    problem = ctrl.zoo.gaussian_pull_2d(eta)
    x = np.stack([np.linspace(-2.5, 2.5, 80), np.zeros(80)], axis=1)
    V, bridge = value(problem)(t, x), Bridge.of(problem, t)
    time_only = -0.5 * np.trace(problem.reward.matrix @ bridge.Gamma)
    _, ax = plt.subplots(figsize=(7.5, 3.8))
    ax.plot(x[:, 0], V, "k", lw=2.5, label="$V(t, x)$")
    ax.plot(x[:, 0], problem.reward.value(denoised(problem, t, x)), "C0", label=r"$r(\hat x_0)$, Tweedie")
    ax.plot(x[:, 0], problem.reward.value(bridge.centre(x)), "C2--", label=r"$r(\mathbb{E}_\eta[X_T|x])$")
    ax.plot(x[:, 0], problem.reward.value(bridge.centre(x)) + time_only, "C1:", lw=3, label=r"$\cdots - \frac{1}{2}{\rm tr}(Q\,{\rm Cov}_\eta)$")
    ax.plot(x[:, 0], problem.reward.value(x), "C3", lw=0.8, label="$r(x)$: no denoising")
    ax.set(xlabel="$x_1$ ($x_2 = 0$)", title=rf"$t = {t:g}$, $\eta = {eta:g}$: time-only part {time_only:.4f}", ylim=(V.min() - 1, 0.5))
    ax.legend()
    plt.show()


draw()

# %% tags=["skip-execution"]
interact(draw, t=FloatSlider(TIME, min=0.0, max=0.95, step=0.05, continuous_update=False),
         eta=FloatSlider(ETA, min=0.25, max=1.5, step=0.25, continuous_update=False));

# %% [markdown]
# ## How much of $V$ the skeleton leaves to the network
#
# Standard deviation of $V - r(\hat x_0)$ over $X_t\sim p_{T-t}$, as a share of that of $V$: 0 at $\eta = 1$; without the $1/\alpha$, nothing is
# left of it.

# %%
times = np.linspace(0.05, 0.95, 19)


def left_over(eta, guess):
    problem = ctrl.zoo.gaussian_pull_2d(eta)
    V, shares = value(problem), []
    for t in times:
        x = problem.marginal(t).sample(ctrl.Noise(seed=0, paths=2000))
        shares.append(np.std(V(t, x) - problem.reward.value(guess(problem, t, x))) / np.std(V(t, x)))
    return np.array(shares)


def without_alpha(problem, t, x):
    return denoised(problem, t, x) * problem.schedule.alpha(problem.schedule.tau(t))


curves = {rf"$\hat x_0$, $\eta = {eta:g}$": left_over(eta, denoised) for eta in (0.5, 1.0, 1.5)}
curves[r"$\hat x_0$ without $1/\alpha$, $\eta = 1$"] = left_over(1.0, without_alpha)
_, ax = plt.subplots(figsize=(7.5, 3.2))
for name, share in curves.items():
    ax.plot(times, share, label=name)
ax.set(xlabel="$t$", ylabel="share left over", ylim=(0, 1.6), title="What is left for $F_\\phi$")
ax.legend()
plt.show()

# %% [markdown]
# ## Learning it from few paths
#
# A mixture on the line: regress the returns of `FEW` paths on $(1, x, x^2, x^3)$, with $c_{\mathrm{skip}}(t)\,r(\hat x_0)$ taken off first,
# $c_{\mathrm{skip}} = 0$, $\alpha^2/(\alpha^2 + v)$, or 1. Root mean square over $X_i$ against the exact $V_i$ of the chain. The skeleton wins
# near the data; in the
# middle $r(\hat x_0)$ is far from $V$, and what does not fade costs.

# %%
problem = ctrl.zoo.mixture_bump_1d()
grid = problem.grid(40)
pre = problem.pretrained(grid)
V = ctrl.exact.value(problem, pre, grid)
at = np.arange(4, 40, 4)
paths = ctrl.simulate(problem, pre, grid, ctrl.Noise(seed=0, paths=FEW * REPEATS), trajectory=True)
errors = {"plain": [], "skeleton": [], "$c_{\\rm skip} = 1$ throughout": []}
for i in at:
    x = paths.states[:, i]
    truth, features, base = V(i, x), np.vander(x[:, 0], 4), problem.reward.value(denoised(problem, grid.times[i], x))
    tau = problem.schedule.tau(grid.times[i])
    alpha, v = problem.schedule.alpha(tau), problem.schedule.v(tau)
    for name, skip in zip(errors, (0.0, alpha**2 / (alpha**2 + v), 1.0), strict=True):
        off = skip * base
        squares = []
        for k in range(REPEATS):
            part = slice(k * FEW, (k + 1) * FEW)
            fit = np.linalg.lstsq(features[part], paths.reward[part] - off[part], rcond=None)[0]
            squares.append(np.mean((features @ fit + off - truth) ** 2))
        errors[name].append(np.sqrt(np.median(squares)))
_, ax = plt.subplots(figsize=(7.5, 3.2))
for name, values in errors.items():
    ax.semilogy(grid.times[at], values, "o-", label=name)
ax.set(xlabel="$t$", ylabel="error of $V$", title=f"Median of {REPEATS} fits to {FEW} paths each")
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. `draw(t=0.0)`: why are $V$ and $r(\hat x_0)$ flat there? *Hint:* memoryless: $X_0$ says nothing of $X_T$.
# 2. In `draw`, use the covariance of $\eta = 1$, `Bridge.of(ctrl.zoo.gaussian_pull_2d(), t).Gamma`, at $\eta = 0.5$. Which curve misses $V$, and
#    by what? *Hint:* $\mathrm{Cov}_\eta = C(I - (\alpha^2CC_\tau^{-1})^{\eta^2})$.
# 3. Put $c_{\mathrm{skip}}$ at the wrong end: take off $(1 - t)\,r(\hat x_0)$ in the last experiment. Where does it hurt? *Hint:* at $t = T$, $V =
#    r$.

# %%
reference = ctrl.zoo.gaussian_pull_2d()
x = reference.marginal(0.5).sample(ctrl.Noise(seed=1, paths=100))
tau = reference.schedule.tau(0.5)
cov = np.linalg.inv(np.linalg.inv(reference.data.cov) + reference.schedule.alpha(tau) ** 2 / reference.schedule.v(tau) * np.eye(2))
gap = value(reference)(0.5, x) - reference.reward.value(denoised(reference, 0.5, x))
assert np.allclose(gap, -0.5 * np.trace(reference.reward.matrix @ cov), rtol=1e-9)
for eta in (0.5, 1.5):
    other = ctrl.zoo.gaussian_pull_2d(eta)
    bridge = Bridge.of(other, 0.5)
    assert np.allclose(value(other)(0.5, x) - other.reward.value(bridge.centre(x)), -0.5 * np.trace(other.reward.matrix @ bridge.Gamma), rtol=1e-9)
assert curves[r"$\hat x_0$, $\eta = 1$"].max() < 1e-8 < 0.01 < min(curves[rf"$\hat x_0$, $\eta = {eta}$"].max() for eta in (0.5, 1.5))
assert errors["skeleton"][-1] < 0.5 * errors["plain"][-1]
