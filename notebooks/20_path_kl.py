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
# # Path KL: what the regulariser is, in nats
#
# $$\mathrm{KL}(P_\theta\,\Vert\,P_{\mathrm{pre}}) = \mathbb E_\theta\int_0^T\kappa\,|\mu-s|^2\,dt,\qquad \kappa =
# \frac{h^2}{2\eta^2g^2}\quad(=\tfrac12g^2\text{ at }\eta=1),
# \qquad \log\frac{dP_\theta}{dP_{\mathrm{pre}}} = \sum_i u_i^\top\xi_i + \tfrac12|u_i|^2,\quad u_i = \sqrt{2\kappa_iD_i}\,(\mu_i-s_i).$$
#
# On the chain the left-point sum $\sum_i\kappa_iD_i\,\mathbb E|\mu_i-s_i|^2$ is **exact**: each step is a pair of Gaussians with one covariance.
# It does not
# depend on the grid but for $O(D)$. Several published trainers have a KL that does.

# %%
import os

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import FloatSlider, interact

QUICK = os.environ.get("QUICK") == "1"
ETA = 0.5
SCALE, SHIFT = 0.9, 0.1                 # the policy: a = SCALE K_pre x + k_pre + SHIFT
PATHS = 5_000 if QUICK else 100_000
N = np.array([10, 20, 40, 80, 160, 320])


# %%
def setting(eta, scale=SCALE, shift=SHIFT):
    problem = ctrl.zoo.gaussian_pull_2d(eta)
    return problem, ctrl.BasisPolicy.scaled(problem, scale, [shift, shift])


def claims(problem, policy, grid):
    """What people write in the place of kappa_i D_i, each times E|mu_i - s_i|^2."""
    c, squared = problem.coefficients(grid), ctrl.exact.chain.LinearChain(problem, policy, grid).mean_departure
    v = np.array([problem.schedule.v(problem.schedule.tau(t)) for t in grid.times[:-1]])
    rates = {"path KL": c.kappa * c.dt, "$g^2/2$ for $\\kappa$": c.g2 / 2 * c.dt, "no $D$ in the sum": c.kappa,
             "$D$ twice (no $D$ in the variance)": c.kappa * c.dt**2,
             "mean over dimensions": c.kappa * c.dt / problem.dim, "unweighted $|\\epsilon - \\epsilon_{\\rm ref}|^2$": v}
    return {name: float(rate @ squared) for name, rate in rates.items()}


def draw(eta=ETA, scale=SCALE, shift=SHIFT):
    problem, policy = setting(eta, scale, shift)
    rows = [claims(problem, policy, problem.grid(int(n))) for n in N]
    _, ax = plt.subplots(figsize=(8.5, 3.8))
    for k, name in enumerate(rows[0]):
        ax.loglog(N, [row[name] for row in rows], "o-" if k == 0 else "x--", color="k" if k == 0 else f"C{k}", lw=2.5 if k == 0 else 1, label=name)
    ax.axhline(ctrl.exact.limit.evaluate(problem, policy).path_kl, color="k", ls=":", lw=1, label="continuous time")
    ax.set(xlabel="steps $N$", ylabel="claimed KL (nats)", title=rf"One policy, many grids: $\eta = {eta:g}$")
    ax.set_xticks(N, [str(n) for n in N], minor=False)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


draw()

# %% tags=["skip-execution"]
interact(draw, eta=FloatSlider(ETA, min=0.25, max=1.5, step=0.25, continuous_update=False),
         scale=FloatSlider(SCALE, min=0.7, max=1.3, step=0.05, continuous_update=False), shift=FloatSlider(SHIFT, min=0.0, max=0.5, step=0.05,
                                                                                                           continuous_update=False));

# %% [markdown]
# ## The likelihood ratio of paths
#
# `simulate` returns $k_1 = \log dP_\theta/dP_{\mathrm{pre}}$ of each path. Its mean is the path KL; with $k_3 = e^{-k_1} - 1 + k_1$,
# $\mathbb E k_3$ is the same and $k_3\ge 0$; $\mathbb E_\theta e^{-k_1} = 1$. The terminal law forgets:
# $\mathrm{KL}_{\mathrm{terminal}}\le\mathrm{KL}_{\mathrm{path}}$.

# %%
problem, policy = setting(1.0, 0.9, 0.1)
grid = problem.grid(100)
truth = ctrl.exact.evaluate(problem, policy, grid)
k1 = ctrl.simulate(problem, policy, grid, ctrl.Noise(seed=0, paths=PATHS)).log_weight
k3 = np.expm1(-k1) + k1
_, ax = plt.subplots(figsize=(7.5, 3.2))
ax.hist(k1, 120, range=(-2, 3), density=True, alpha=0.6, label=rf"$k_1$: mean {k1.mean():.4f}, variance {k1.var():.3f}")
ax.hist(k3, 120, range=(-2, 3), density=True, alpha=0.6, label=rf"$k_3$: mean {k3.mean():.4f}, variance {k3.var():.3f}")
ax.axvline(truth.path_kl, color="k", lw=1, label=f"path KL {truth.path_kl:.4f}")
ax.axvline(truth.terminal_kl, color="k", lw=1, ls=":", label=f"terminal KL {truth.terminal_kl:.4f}")
ax.set(ylim=(0, 4), xlabel="nats", title="Two unbiased estimators of one KL")
ax.legend()
plt.show()
z = [(np.mean(x) - want) / (np.std(x) / np.sqrt(PATHS)) for x, want in ((k1, truth.path_kl), (k3, truth.path_kl), (np.exp(-k1), 1.0))]
print("z of E k1, E k3, E exp(-k1):", np.round(z, 2))

# %% [markdown]
# ## Exactly, on a short chain
#
# $k_1$ is quadratic in the noise: all sign patterns of three steps give its mean to rounding. As a *loss*, though, $k_1$ has gradient zero, and
# $k_3$, or the
# analytic KL per step on detached states, drops what the policy does to the states: see `40_policy_gradient`.

# %%
few = problem.grid(3)
signs = ctrl.Noise.signs(problem, policy, few)
by_signs, exactly = ctrl.simulate(problem, policy, few, signs).log_weight @ signs.weights, ctrl.exact.evaluate(problem, policy, few).path_kl
print(f"E k1 over {signs.paths} sign patterns {by_signs:.15f}\n        exact path KL        {exactly:.15f}")
curve = np.array([ctrl.exact.evaluate(problem, policy, problem.grid(int(n))).path_kl for n in 10 * N])
order = np.log2(np.abs(curve - ctrl.exact.limit.evaluate(problem, policy).path_kl))
print("order towards continuous time:", (order[:-1] - order[1:]).round(3))

# %% [markdown]
# ## Exercises
#
# 1. `draw(eta=1.0)`. Which red line falls on the black one? *Hint:* $\kappa = g^2/2$ at $\eta = 1$.
# 2. `SCALE = 0.8` and a long look at `np.exp(-k1).var()` for growing `PATHS`. *Hint:* the variance of the inverse ratio is infinite there.
# 3. At which $\eta$ is the same policy cheapest? Predict with $\kappa = g^2(1+\eta^2)^2/(8\eta^2)$. *Hint:* minimise over $\eta$; the states
#    change too.

# %%
assert np.isclose(truth.path_kl, 0.1762947512058871, rtol=1e-12) and np.isclose(truth.terminal_kl, 0.10291396146596798, rtol=1e-11)
for eta, known in ((0.5, 0.2786219129802991), (1.5, 0.20536023333023848)):
    at, theta = setting(eta, 0.9, 0.1)
    assert np.isclose(ctrl.exact.evaluate(at, theta, at.grid(100)).path_kl, known, rtol=1e-12)
assert np.isclose(by_signs, exactly, rtol=1e-12)
assert max(map(abs, z)) < 5 and truth.terminal_kl < truth.path_kl
assert abs(order[-2] - order[-1] - 1) < 0.05
