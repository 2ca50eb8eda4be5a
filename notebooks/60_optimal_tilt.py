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
# # The optimum, the tilt, and the initial-law bias
#
# In continuous time $\sup_a\,\mathbb E\,r - \lambda\,\mathrm{KL}$ is attained at
#
# $$a^* = s + \frac{h}{2\lambda\kappa}\nabla V^*,\qquad V^* = \lambda\log\varphi,\qquad \varphi(t,x) = \mathbb
# E_{\mathrm{pre}}\left[e^{r(X_T)/\lambda}\,\middle|\,X_t=x\right],$$
#
# and the optimal terminal law is the **tilt** $p_{\mathrm{pre}}\,e^{r/\lambda}/Z$ if $X_0$ and $X_T$ are independent under $P_{\mathrm{pre}}$. If
# the noising is too
# short for that, it is another law: each start $x$ is weighted by $1/\varphi(0,x)$, the *initial-law bias*.

# %%
import os
from dataclasses import replace

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ctrl.exact import tilt
from ipywidgets import FloatSlider, interact

QUICK = os.environ.get("QUICK") == "1"
KL_WEIGHT = 0.2    # lambda
BETA_MAX = 3.0     # short noising; 10 is the zoo's


# %%
def draw(kl_weight=KL_WEIGHT, beta_max=BETA_MAX):
    """The optimum in continuous time at eta = 1 on the line, without a grid in time."""
    problem = replace(ctrl.zoo.mixture_bump_1d(), kl_weight=kl_weight, schedule=ctrl.VP(0.1, beta_max, 1.0), start="exact")
    best = tilt.reversal_optimum(problem)
    order = np.argsort(best.points)
    x = best.points[order]
    dense = np.linspace(-2.6, 2.4, 400)[:, None]
    pre = np.exp(problem.data.log_density(dense))
    ideal = pre * np.exp(problem.reward.value(dense) / kl_weight)
    ideal /= np.trapezoid(ideal, dense[:, 0])
    optimal = np.interp(dense[:, 0], x, best.masses[order] / best.tilt[order]) * ideal
    _, ax = plt.subplots(figsize=(7.5, 3.8))
    ax.fill_between(dense[:, 0], pre, color="0.85", label="pre-trained $p$")
    ax.plot(dense, ideal, "C0", label=r"tilt $p\,e^{r/\lambda}/Z$")
    ax.plot(dense, optimal, "C3", label="law of $X_T$ at the optimum")
    ax.plot(dense, problem.reward.value(dense), "k:", lw=1, label="reward")
    ax.set(xlabel="$x$", title=rf"$\lambda = {kl_weight:g}$, $\beta_\max = {beta_max:g}$: $J^* = {best.objective:.5f}$, bias {best.bias:.2e} nats")
    ax.legend()
    plt.show()


draw()

# %% tags=["skip-execution"]
interact(draw, kl_weight=FloatSlider(KL_WEIGHT, min=0.1, max=2.0, step=0.1, continuous_update=False),
         beta_max=FloatSlider(BETA_MAX, min=1.0, max=20.0, step=1.0, continuous_update=False));

# %% [markdown]
# ## How long is long enough?
#
# Gaussian data, closed form. More stochasticity forgets faster: the dependence of $X_T$ on $X_0$ scales with $\alpha(T)^{1+\eta^2}$.

# %%
betas = np.array([20.0, 10.0, 4.0, 2.0, 1.0])
bias = {eta: np.array([tilt.initial_bias(replace(ctrl.zoo.gaussian_pull_2d(eta), schedule=ctrl.VP(0.1, b, 1.0), start="exact")).kl for b in betas])
        for eta in (0.5, 1.0, 1.5)}
_, ax = plt.subplots(figsize=(7, 3.2))
for eta, values in bias.items():
    ax.loglog(betas, values, "o-", label=rf"$\eta = {eta:g}$")
ax.set(xlabel=r"$\beta_\max$", ylabel="KL(optimal terminal law ‖ tilt), nats", ylim=(1e-18, 10), title="Initial-law bias")
ax.set_xticks(betas, [f"{b:g}" for b in betas], minor=False)
ax.legend()
plt.show()
print({eta: [f"{v:.3e}" for v in values] for eta, values in bias.items()})

# %% [markdown]
# ## On the chain there are two optima
#
# (i) only the mean is controlled: $J^*$ of this library, `exact.optimum`; (ii) whole kernels are free: Doob's chain, $\lambda\,\mathbb
# E\log\varphi_0$, `exact.doob`, whose
# terminal law from the start $p_0\varphi_0$ **is** the chain's tilt, exactly. They differ by $O(D)$; taking (ii) for (i) invents regret.

# %%
problem = ctrl.zoo.gaussian_pull_2d()
N = np.array([50, 100, 200, 400, 800])
pairs = [(ctrl.exact.optimum(problem, problem.grid(int(n))), ctrl.exact.doob(problem, problem.grid(int(n)))) for n in N]
limit = ctrl.exact.limit.optimum(problem)
difference = np.array([d.objective - o.objective for o, d in pairs])
_, ax = plt.subplots(figsize=(7, 3))
ax.semilogx(1 / N, [o.objective for o, _ in pairs], "o-", label="(i) means free: $J^*$")
ax.semilogx(1 / N, [d.objective for _, d in pairs], "s-", label="(ii) kernels free: Doob")
ax.axhline(limit.objective, color="k", ls=":", label=f"continuous time {limit.objective:.6f}")
ax.set_xticks(1 / N, [f"1/{n}" for n in N])
ax.minorticks_off()
ax.set(xlabel="$D$", ylabel="objective", title=f"They part at order {np.log2(difference[-2] / difference[-1]):.3f} in $D$")
ax.legend()
plt.show()
doob = pairs[1][1]
pre_end = ctrl.exact.evaluate(problem, problem.pretrained(problem.grid(100)), problem.grid(100)).terminal
precision = np.linalg.inv(pre_end.cov) + problem.reward.matrix / problem.kl_weight
print("Doob's terminal precision from p_0 phi_0, less that of the tilt:",
      np.abs(np.linalg.inv(doob.terminal(doob.tilted_start).cov) - precision).max())

# %% [markdown]
# ## The ideal frontier
#
# No model at $\mathrm{KL}^*$ nats has more reward; the slope is $dE^*[r]/d\mathrm{KL}^* = \lambda$. From samples of the pre-trained model alone,
# weights
# $e^{r/\lambda}$ estimate it: a yardstick where nothing is known, images too.

# %%
weights = np.geomspace(0.15, 5.0, 40)
ideal = tilt.frontier(problem.data, problem.reward, weights)
samples = problem.data.sample(ctrl.Noise(seed=0, paths=2_000 if QUICK else 50_000))
estimated = tilt.ideal_frontier(problem.reward.value(samples), weights)
_, ax = plt.subplots(figsize=(7, 3.2))
ax.plot([p.kl for p in ideal], [p.reward for p in ideal], "k", label="exact")
kept = [y for y in estimated if y.ess > 50]
ax.errorbar([y.kl for y in kept], [y.reward for y in kept], [2 * y.reward_error for y in kept], fmt="C0o", ms=3,
            label=f"weights on {len(samples)} samples, ESS > 50")
ax.plot([o.path_kl for o, _ in pairs[1:2]], [o.truth.expected_reward for o, _ in pairs[1:2]], "C3*", ms=11,
        label=r"chain's optimum, $N = 100$, $\lambda = 1/2$")
ax.set(xlabel="KL (nats)", ylabel=r"$\mathbb{E}^*[r]$", title="Reward against KL")
ax.legend()
plt.show()
rewards, kls = np.array([p.reward for p in ideal]), np.array([p.kl for p in ideal])
slope = np.diff(rewards) / np.diff(kls)

# %% [markdown]
# ## Exercises
#
# 1. Put `kl_weight = 5.0` into `draw`, then $1/5$. Which one did you mean? *Hint:* $\lambda$ and $1/\lambda$ agree at $\lambda = 1$ only.
# 2. `start="prior"` in `draw` with `BETA_MAX = 1.0`. What does the optimum start from, and what does the tilt tilt? *Hint:* $\mathcal N(0,1)$ is
#    not $p_T$ then.
# 3. Replace $V^*$ by $\mathbb E_{\mathrm{pre}}[r|x]$ ("best guess of the reward"). Above or below? *Hint:* Jensen.

# %%
known = {1.0: [1.11e-10, 2.473e-6, 1.206e-3, 1.339e-2, 6.314e-2], 0.5: [1.46e-3, 2.06e-2, 0.132, 0.305, 0.529],
         1.5: [5e-22, 2.9e-12, 2.5e-6, 3.3e-4, 5.4e-3]}
for eta, values in known.items():
    assert np.allclose(bias[eta], values, rtol=0.06), (eta, bias[eta])
best, doob = pairs[1]
assert np.isclose(best.objective, -1.3921577814829753, rtol=1e-12) and np.isclose(best.path_kl, 0.771217765188002, rtol=1e-11)
assert np.isclose(doob.objective, -1.390575, atol=5e-7)
assert np.isclose(limit.objective, -1.387113300443, rtol=1e-11) and np.isclose(limit.path_kl, 0.765750677206, rtol=1e-10)
assert abs(np.log2(difference[-2] / difference[-1]) - 1) < 0.05
assert np.allclose(np.linalg.inv(doob.terminal(doob.tilted_start).cov), precision, rtol=1e-9)
assert np.all((slope > weights[:-1]) & (slope < weights[1:]))
