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
# # Value and advantage
#
# $$V_\theta(t,x) = \mathbb E\left[r(X_T) - \lambda\int_t^T\kappa\,|\mu-s|^2\,\middle|\,X_t=x\right],\qquad
# q(t,x,a) = h\,(a-\mu)\cdot\nabla V - \lambda\kappa\left(|a-s|^2 - |\mu-s|^2 - \mathrm{tr}\,\Sigma\right).$$
#
# On the chain $V_i(X_i) - \lambda\sum_{j<i}\kappa_jD_j|\mu_j-s_j|^2$ is a martingale, **exactly**; and
# $q = \lim_{D\to0}(Q_i - V_i)/D$, an advantage *rate*: $Q$ itself forgets the action as $D\to0$.

# %%
import os

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import FloatSlider, interact

QUICK = os.environ.get("QUICK") == "1"
THETA = -0.15       # a = s + THETA cos x
STEPS = 50
PATHS = 2_000 if QUICK else 20_000


# %%
def cosine(theta, eta=1.0, steps=STEPS):
    """A mixture on the line with a bump reward at -1, and an action that leans towards it (theory, section 17)."""
    problem = ctrl.zoo.mixture_bump_1d(eta)
    policy = ctrl.CallablePolicy(lambda t, x, th: problem.score(t, x) + th[0] * np.cos(x), [theta],
                                 jacobian_theta=lambda t, x, th: np.cos(x)[:, :, None],
                                 jacobian_x=lambda t, x, th: problem.marginal(t).score_jacobian(x) - th[0] * np.sin(x)[:, :, None])
    return problem, policy, problem.grid(steps)


def draw(theta=THETA, eta=1.0):
    problem, policy, grid = cosine(theta, eta)
    V, x = ctrl.exact.value(problem, policy, grid), np.linspace(-2, 2, 81)
    table = np.array([V(i, x[:, None]) for i in range(0, STEPS + 1, 2)])
    paths = ctrl.simulate(problem, policy, grid, ctrl.Noise(seed=1, paths=8), trajectory=True).states
    fig, ax = plt.subplots(figsize=(7.5, 3.8))
    mesh = ax.pcolormesh(grid.times[::2], x, table.T, shading="nearest", vmin=0, vmax=1)
    ax.plot(grid.times, paths[:, :, 0].T, "w", lw=0.7, alpha=0.8)
    fig.colorbar(mesh, label=r"$V_\theta(t, x)$")
    J = ctrl.exact.evaluate(problem, policy, grid).objective
    ax.set(ylim=(-2, 2), xlabel="$t$", ylabel="$x$", title=rf"Value and eight paths: $\theta = {theta:g}$, $\eta = {eta:g}$, $J = {J:.6f}$")
    ax.grid(False)
    plt.show()


draw()

# %% tags=["skip-execution"]
interact(draw, theta=FloatSlider(THETA, min=-1.5, max=1.0, step=0.25, continuous_update=False),
         eta=FloatSlider(1.0, min=0.5, max=1.5, step=0.25, continuous_update=False));

# %% [markdown]
# ## The martingale
#
# Along simulated paths, and with one sign wrong: the cost added.

# %%
problem = ctrl.zoo.gaussian_pull_2d()
policy = ctrl.BasisPolicy.scaled(problem, 0.9, [0.1, 0.1])
grid = problem.grid(100)
V, truth, c = ctrl.exact.value(problem, policy, grid), ctrl.exact.evaluate(problem, policy, grid), problem.coefficients(grid)


def process(policy, grid, noise, sign=-1):
    """V_i(X_i) + sign lambda sum_{j < i} kappa_j D_j |mu_j - s_j|^2 per path, (n, N + 1)."""
    V, c = ctrl.exact.value(problem, policy, grid), problem.coefficients(grid)
    paths = ctrl.simulate(problem, policy, grid, noise, trajectory=True)
    spent, out = np.zeros(noise.paths), []
    for i in range(grid.steps + 1):
        out.append(V(i, paths.states[:, i]) + sign * spent)
        if i < grid.steps:
            away = paths.actions[:, i] - problem.score(grid.times[i], paths.states[:, i])
            spent = spent + problem.kl_weight * c.kappa[i] * c.dt[i] * np.sum(away**2, axis=1)
    return np.stack(out, axis=1)


noise = ctrl.Noise(seed=0, paths=PATHS)
M, wrong = process(policy, grid, noise), process(policy, grid, noise, sign=+1)
_, ax = plt.subplots(figsize=(7.5, 3.4))
ax.axhline(truth.objective, color="k", lw=1, label="exact $J$")
for values, color, label in ((M, "C0", "cost subtracted"), (wrong, "C3", "cost added")):
    increments, error = values - M[:, :1], values[:, :1].std() / np.sqrt(PATHS)
    mean, bar = truth.objective + increments.mean(axis=0), 2 * increments.std(axis=0) / np.sqrt(PATHS)
    ax.plot(grid.times, mean, color, label=label)
    ax.fill_between(grid.times, mean - bar, mean + bar, color=color, alpha=0.25)
ax.set(xlabel="$t$", ylabel="mean of the process", title=rf"A martingale stays where it starts ({PATHS} paths, 2 standard errors)")
ax.legend()
plt.show()
few = problem.grid(3)
signs = ctrl.Noise.signs(problem, policy, few)
exactly = process(policy, few, signs).T @ signs.weights
print("over all sign patterns of three steps:", exactly, " J =", ctrl.exact.evaluate(problem, policy, few).objective)

# %% [markdown]
# ## The advantage rate
#
# $(Q_i - V_i)/D\to q$ at order 1, while the part of $Q_i$ that depends on the action is $O(D)$: what is learned as $Q$ tells actions apart less
# and less.

# %%
x, a = np.array([[0.3, -0.4]]), np.array([[1.0, 0.5]])
N = np.array([25, 50, 100, 200, 400, 800])
gap, collapse = [], []
for n in N:
    at, i = problem.grid(int(n)), int(0.4 * n)
    W, q = ctrl.exact.value(problem, policy, at), ctrl.exact.advantage(problem, policy, at)
    rise = W.action_value(i, x, a) - W(i, x)
    gap.append((rise / at.dt[i] - q(i, x, a))[0])
    collapse.append(rise[0])
_, ax = plt.subplots(figsize=(7.5, 3.2))
ax.loglog(1 / N, np.abs(gap), "o-", label=r"$|(Q-V)/D - q|$")
ax.loglog(1 / N, np.abs(collapse), "x-", color="C3", label=r"$|Q - V|$: no information left")
ax.set_xticks(1 / N, [f"1/{n}" for n in N])
ax.minorticks_off()
ax.set(xlabel="$D$", title="$q$ is a rate")
ax.legend()
plt.show()

explored = policy.with_exploration(0.3 * np.eye(2))
q = ctrl.exact.advantage(problem, explored, grid)
z, w = np.polynomial.hermite_e.hermegauss(3)                      # E_{a ~ pi} q = 0: three nodes are exact for a quadratic
z = np.stack(np.meshgrid(z, z), axis=-1).reshape(-1, 2)
actions = explored.mean(grid, 40, x) + np.sqrt(0.3) * z
centred = q(40, np.repeat(x, len(z), axis=0), actions) @ np.outer(w, w).ravel() / w.sum() ** 2
print(f"E_pi q = {centred:.1e}; without tr Sigma it would be {-problem.kl_weight * c.kappa[40] * 0.6:.4f}")

# %% [markdown]
# ## Exercises
#
# 1. In `process`, use the value of the *pre-trained* policy. Where does the mean drift? *Hint:* $\mathbb E[V^{\mathrm{pre}}_{i+1}|X_i] \ne
#    V^{\mathrm{pre}}_i$ under $P_\theta$.
# 2. Halve every step: does `collapse` halve? *Hint:* $Q - V = D\,q + O(D^2)$.
# 3. `draw(theta=1.0)`: whither do the paths lean, and what happens to $V$ near $x = -1$ at small $t$? *Hint:* the action pushes right wherever
#    $\cos x > 0$.

# %%
mixture = ctrl.exact.evaluate(*cosine(-0.15))
assert np.isclose(mixture.objective, 0.307163121294876, rtol=1e-9) and np.isclose(mixture.path_kl, 0.032011346690260, rtol=1e-9)
assert np.isclose(mixture.gradient.theta[0], -0.32719181299024, rtol=1e-8)
assert np.allclose(exactly, ctrl.exact.evaluate(problem, policy, few).objective, rtol=1e-12)
assert abs((M[:, -1] - M[:, 0]).mean()) < 5 * (M[:, -1] - M[:, 0]).std() / np.sqrt(PATHS) < (wrong[:, -1] - M[:, 0]).mean()
assert abs(np.log2(abs(gap[-2] / gap[-1])) - 1) < 0.05 and abs(np.log2(abs(collapse[-2] / collapse[-1])) - 1) < 0.05
assert abs(centred) < 1e-12
