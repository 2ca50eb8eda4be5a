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
# # Performance difference and trust regions
#
# $$J(\theta') - J(\theta) = \mathbb E_{\theta'}\int_0^T q(t,X'_t,a'_t;\pi_\theta)\,dt = \sum_i\mathbb E_{\theta'}\left[Q_i^\theta(X_i,\mu'_i) -
# V_i^\theta(X_i)\right]$$
#
# exactly, on the chain. With the states of $\theta$ in the place of those of $\theta'$ this is the **local surrogate** $L_\theta(\theta')$ of TRPO
# and PPO:
# $J(\theta') - J(\theta) - L_\theta(\theta') = O(|\theta'-\theta|^2) = O(\mathrm{KL})$. The KL is measured by the Fisher information
# $F = \sum_i2\kappa_iD_i\,\mathbb E[(\partial\mu_i)^\top(\partial\mu_i)]$: $\mathrm{KL}(P_\theta\Vert P_{\theta+\delta}) = \tfrac12\delta^\top
# F\delta$,
# exactly for policies linear in $\theta$.

# %%
import os

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ctrl import estimators as e
from ipywidgets import FloatSlider, interact

QUICK = os.environ.get("QUICK") == "1"
ETA = 1.0
STEPS = 20
START = np.array([0.9, 0.1, 0.1])      # theta = (scale, shift): a = scale K_pre x + k_pre + shift
problem = ctrl.zoo.gaussian_pull_2d(ETA)
grid = problem.grid(STEPS)


# %%
def at(theta):
    return ctrl.BasisPolicy.scaled(problem, theta[0], theta[1:])


def objective(theta):
    return ctrl.exact.evaluate(problem, at(theta), grid).objective


def advantage_over(states_of, old, new):
    """sum_i E[ Q_i(X_i, mu'_i) - V_i(X_i) ], Q and V of theta, over the states of any policy.

    Quadratic in Gaussian states, so that 2 v paths of the cross rule give the expectation exactly.
    """
    V, noise = ctrl.exact.value(problem, at(old), grid), ctrl.Noise.cross(problem, at(old), grid)
    paths = ctrl.simulate(problem, at(states_of), grid, noise, trajectory=True)
    terms = [V.action_value(i, x, at(new).mean(grid, i, x)) - V(i, x) for i, x in enumerate(np.moveaxis(paths.states[:, :-1], 1, 0))]
    return float(np.mean(np.sum(terms, axis=0)))


def kl(old, new):
    """KL(P_old || P_new) = E_old sum kappa D |mu_new - mu_old|^2, nats."""
    c, noise = problem.coefficients(grid), ctrl.Noise.cross(problem, at(old), grid)
    paths = ctrl.simulate(problem, at(old), grid, noise, trajectory=True)
    steps = [c.kappa[i] * c.dt[i] * np.sum((at(new).mean(grid, i, x) - at(old).mean(grid, i, x)) ** 2, axis=1)
             for i, x in enumerate(np.moveaxis(paths.states[:, :-1], 1, 0))]
    return float(np.mean(np.sum(steps, axis=0)))


F = e.fisher(problem, at(START), grid, ctrl.Noise.cross(problem, at(START), grid))
g = ctrl.exact.evaluate(problem, at(START), grid).gradient.theta
natural = np.linalg.solve(F, g)


def draw(reach=3.0):
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, direction, name in zip(axes, (g, natural), ("gradient", "natural gradient $F^{-1}g$"), strict=True):
        direction = direction / np.sqrt(direction @ F @ direction / 2)          # one nat at size 1
        size = np.linspace(0, np.sqrt(reach), 13)
        J = np.array([objective(START + s * direction) for s in size])
        L = np.array([advantage_over(START, START, START + s * direction) for s in size]) + J[0]
        ax.plot(size**2, J, "C0", label=r"$J(\theta + \delta)$")
        ax.plot(size**2, L, "C3--", label=r"surrogate $J(\theta) + L_\theta$")
        ax.plot(size[J.argmax()] ** 2, J.max(), "ko", ms=4, label=f"best: {J.max():.3f}")
        ax.set(xlabel=r"$\mathrm{KL}(P_\theta\Vert P_{\theta+\delta})$, nats", title=f"Along the {name}")
        ax.legend()
    axes[0].set_ylabel("reward units")
    plt.show()


draw()

# %% tags=["skip-execution"]
interact(draw, reach=FloatSlider(3.0, min=0.1, max=10.0, step=0.1, continuous_update=False));

# %% [markdown]
# ## The identity, both ways, and two right-hand sides that are wrong

# %%
other = START + np.array([-0.05, -0.2, 0.15])
gain = objective(other) - objective(START)
sides = {"advantage of θ over the states of θ'": advantage_over(other, START, other), "states of θ": advantage_over(START, START, other),
         "advantage of θ' over its own states": advantage_over(other, other, other),
         "from the other side: -advantage of θ', over θ": -advantage_over(START, other, START)}
print(f"J(θ') - J(θ) = {gain:.12f}\n")
for name, value in sides.items():
    print(f"{name:48s} {value:.12f}")

# %% [markdown]
# ## Orders
#
# The surrogate's gap has slope 2 in $|\theta'-\theta|$ and slope 1 in the KL; $\tfrac12\delta^\top F\delta$ is the KL itself.

# %%
sizes = 0.05 / 2.0 ** np.arange(5)
unit = np.array([0.3, -0.5, 0.8]) / np.linalg.norm([0.3, -0.5, 0.8])
gaps = np.array([abs(objective(START + s * unit) - objective(START) - advantage_over(START, START, START + s * unit)) for s in sizes])
nats = np.array([kl(START, START + s * unit) for s in sizes])
_, ax = plt.subplots(figsize=(7, 3.2))
ax.loglog(sizes, gaps, "o-", label=f"gap of the surrogate: slope {np.log2(gaps[-2] / gaps[-1]):.3f}")
ax.loglog(sizes, nats, "s-", label=f"KL: slope {np.log2(nats[-2] / nats[-1]):.3f}")
ax.loglog(sizes, [s**2 * unit @ F @ unit / 2 for s in sizes], "k+", ms=12, label=r"$\frac{1}{2}\delta^\top F\delta$")
ax.set_xticks(sizes, [f"{s:g}" for s in sizes])
ax.minorticks_off()
ax.set(xlabel=r"$|\theta' - \theta|$", title="Second order, both")
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. Natural gradient steps of 0.1 nats from `START`: how many to within $10^{-3}$ of the best of the class? And plain steps of the same
#    KL? *Hint:* scale
#    each direction by $\sqrt{2\cdot0.1/\delta^\top F\delta}$.
# 2. Drop the 2 from $F$. What becomes of a trust region of 0.1 nats? *Hint:* $\tfrac12\delta^\top F\delta$ is half of what is spent.
# 3. `ETA = 0.5`. Is a step of the same $\delta$ nearer or farther in nats? *Hint:* $\kappa = g^2(1+\eta^2)^2/(8\eta^2)$.

# %%
assert np.isclose(sides["advantage of θ over the states of θ'"], gain, rtol=1e-10)
assert np.isclose(sides["from the other side: -advantage of θ', over θ"], gain, rtol=1e-10)
assert abs(sides["states of θ"] - gain) > 1e-3 and abs(sides["advantage of θ' over its own states"]) < 1e-10
assert abs(np.log2(gaps[-2] / gaps[-1]) - 2) < 0.05
assert np.allclose(nats, [s**2 * unit @ F @ unit / 2 for s in sizes], rtol=1e-10)
