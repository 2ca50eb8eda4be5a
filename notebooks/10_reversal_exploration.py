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
# # Reversal and exploration
#
# **Reversal.** With $a = s = \nabla\log p_{T-t}$ and $X_0\sim p_T$, every member of the $\eta$-family
#
# $$dX_t = \left[-fX_t + h\,s(t,X_t)\right]dt + \eta\,g\,dB_t,\qquad h = \tfrac{1+\eta^2}{2}\,g^2,$$
#
# has $\mathrm{law}(X_t) = p_{T-t}$; the Euler–Maruyama chain misses it by $O(D)$. **Exploration.** Sampling $a_i\sim\mathcal N(\mu,\Sigma)$ at
# each grid time
# changes paths by $\mathbb E|X^{\mathrm{sampled}} - X^{\mathrm{mean}}|^2 = O(D)$, while the objective moves at once, by
# $-\lambda\int\kappa\,\mathrm{tr}\,\Sigma\,dt$.

# %%
import os
from dataclasses import replace

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import FloatSlider, IntSlider, interact

QUICK = os.environ.get("QUICK") == "1"
STEPS = 50          # N
BETA_MAX = 10.0     # how much noise the schedule adds
ETAS = (0.0, 0.5, 1.0, 1.5)


# %%
def line(eta, beta_max=BETA_MAX):
    """A mixture on the line, started from the noised data law itself."""
    p = ctrl.zoo.mixture_bump_1d(eta)
    return replace(p, schedule=ctrl.VP(0.1, beta_max, 1.0), start="exact")


def draw(steps=STEPS, beta_max=BETA_MAX):
    _, ax = plt.subplots(figsize=(7.5, 3.8))
    for k, eta in enumerate(ETAS):
        problem = line(eta, beta_max)
        grid = problem.grid(steps)
        end = ctrl.exact.evaluate(problem, problem.pretrained(grid), grid).terminal
        ax.plot(end.points.ravel(), end.density, color=f"C{k}", lw=1.2, label=rf"chain, $\eta = {eta:g}$")
    x = np.linspace(-2.6, 2.4, 400)
    ax.fill_between(x, np.exp(problem.data.log_density(x[:, None])), color="0.85", label="data")
    ax.set(xlim=(-2.6, 2.4), xlabel="$x$", ylabel="density of $X_N$", title=rf"Four samplers, one law: $N = {steps}$, $\beta_\max = {beta_max:g}$")
    ax.legend()
    plt.show()


draw()

# %% tags=["skip-execution"]
interact(draw, steps=IntSlider(STEPS, min=20, max=200, step=10, continuous_update=False),
         beta_max=FloatSlider(BETA_MAX, min=4.0, max=20.0, step=2.0, continuous_update=False));

# %% [markdown]
# ## Order, and two formulas that are wrong
#
# Gaussian data: the law of the chain in closed form. The gain $g^2$ in the place of $h$ is the action $s\,g^2/h$; the error then does not vanish
# with $D$.
# The prior start, $X_0\sim\mathcal N(0, I)$, leaves a bias of its own,
# $\mathbb E X_T - m = -\alpha(T)^{1+\eta^2}\left(C\,C_T^{-1}\right)^{(1+\eta^2)/2}m$, $C_T = \alpha^2C + vI$.


# %%
def law_error(problem, grid, gain=1.0):
    """How far the terminal mean and covariance are from the data's."""
    pre = problem.pretrained(grid)
    end = ctrl.exact.evaluate(problem, ctrl.AffinePolicy(gain * pre.K, gain * pre.k), grid).terminal
    return np.hypot(np.linalg.norm(end.mean - problem.data.mean), np.linalg.norm(end.cov - problem.data.cov))


N = np.array([100, 200, 400, 800, 1600])
_, ax = plt.subplots(figsize=(7.5, 3.6))
orders = {}
for k, eta in enumerate(ETAS):
    problem = replace(ctrl.zoo.gaussian_pull_2d(eta), start="exact")
    right = np.array([law_error(problem, problem.grid(int(n))) for n in N])
    orders[eta] = np.log2(right[:-1] / right[1:])
    ax.loglog(1 / N, right, "o-", ms=3, color=f"C{k}", label=rf"$\eta = {eta:g}$: order {orders[eta][-1]:.3f}")
    if eta != 1:
        wrong = [law_error(problem, problem.grid(int(n)), gain=2 / (1 + eta**2)) for n in N]
        ax.loglog(1 / N, wrong, "x:", color=f"C{k}", label=rf"$\eta = {eta:g}$, gain $g^2$")
ax.set(xlabel="$D$", ylabel="error of the terminal law", title="Order 1 without noise; a wrong gain stays wrong")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()


def prior_bias(eta):
    """(closed form, measured in continuous time) of E X_T - m."""
    problem = ctrl.zoo.gaussian_pull_2d(eta)
    alpha, v = problem.schedule.alpha(1.0), problem.schedule.v(1.0)
    c, axes = np.linalg.eigh(problem.data.cov)
    formula = -axes @ (alpha ** (1 + eta**2) * (c / (alpha**2 * c + v)) ** ((1 + eta**2) / 2) * (axes.T @ problem.data.mean))
    return formula, ctrl.exact.limit.evaluate(problem, ctrl.BasisPolicy.shift(problem, [0.0, 0.0])).terminal.mean - problem.data.mean


for eta in ETAS:
    print(f"eta = {eta:g}: prior bias {prior_bias(eta)[0]}, measured {prior_bias(eta)[1]}")

# %% [markdown]
# ## Sampled actions
#
# Same mean, $\Sigma = I$, exact chains: the covariance gains $h^2D^2\Sigma$ per step, so $\mathrm{tr}(P_{\mathrm{sampled}} - P_{\mathrm{mean}})
# = \mathbb E|X^{\mathrm{sampled}} - X^{\mathrm{mean}}|^2\to 0$; the cost does not.

# %%
problem = ctrl.zoo.gaussian_pull_2d()
mean = ctrl.BasisPolicy.scaled(problem, 0.9, [0.1, 0.1])
sampled = mean.with_exploration(np.eye(2))
jump = -problem.kl_weight * 2 * (0.1 + 10.0) / 4           # -lambda tr Sigma int beta/2 dt
gaps = []
for n in N:
    s, m = (ctrl.exact.evaluate(problem, p, problem.grid(int(n))) for p in (sampled, mean))
    gaps.append((np.trace(s.terminal.cov - m.terminal.cov), s.objective - m.objective))
square, moved = np.array(gaps).T

grid = problem.grid(40)
s, m = (ctrl.simulate(problem, p, grid, ctrl.Noise(seed=0, paths=3), trajectory=True).states for p in (sampled, mean))
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
left.plot(grid.times, m[:, :, 0].T, "C0", lw=1)
left.plot(grid.times, s[:, :, 0].T, "C3", lw=1)
left.set(xlabel="$t$", ylabel="$x_1$", title="Mean (blue) and sampled actions, same $\\xi$, $N = 40$")
right.loglog(1 / N, square, "o-", label=r"$\mathbb{E}|X^{\rm sampled} - X^{\rm mean}|^2$")
right.loglog(1 / N, np.abs(moved - jump), "s-", label=r"$|\Delta J - (-\lambda\int\kappa\,{\rm tr}\,\Sigma)|$")
right.set(xlabel="$D$", title=f"Both of order 1; the jump is {jump:g}")
right.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. `BETA_MAX = 4.0` and `start="prior"` in `line`. Which $\eta$ suffers most? *Hint:* the bias scales like $\alpha(T)^{1+\eta^2}$.
# 2. Exchange $\tau$ and $t$: run `AffinePolicy(pre.K[::-1], pre.k[::-1])` in `law_error`. *Hint:* the score of almost clean data is steep.
# 3. Sample with $\Sigma/D$, `exploration = np.eye(2) * n`. Does the gap vanish? *Hint:* $h^2D^2\cdot\Sigma/D = h^2D\,\Sigma$ per step, $N$ steps.

# %%
for eta in ETAS:
    assert abs(orders[eta][-1] - 1) < 0.05, (eta, orders[eta])
    assert np.allclose(*prior_bias(eta), rtol=1e-8, atol=1e-10)
reference = ctrl.exact.evaluate(problem, sampled, problem.grid(100))
assert np.isclose(reference.objective, -5.263941511451915, rtol=1e-12)                 # theory, section 17
assert abs(np.log2(square[-2] / square[-1]) - 1) < 0.05
assert abs(np.log2(abs(moved[-2] - jump) / abs(moved[-1] - jump)) - 1) < 0.05
