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
# # Estimators race
#
# All on one chain, one class of policies, the same paths per update, judged by **exact regret**
#
# $$J^* - J(\theta_k) = \underbrace{(J^* - J_{\mathrm{class}})}_{\text{what no policy of the class can reach}} + \underbrace{(J_{\mathrm{class}} -
# J(\theta_k))}_{\text{what an algorithm can win}},
# \qquad J^* = \sup_\mu\ \mathbb E\,r - \lambda\sum_i\kappa_iD_i\,\mathbb E|\mu_i - s_i|^2 .$$
#
# $J(\theta_k)$ and $J^*$ are known without sampling: no evaluation noise, so a tenth of a percent is visible.

# %%
import os

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ctrl import learn
from ipywidgets import FloatLogSlider, IntSlider, interact

QUICK = os.environ.get("QUICK") == "1"
STEPS = 20                          # N
PATHS = 64 if QUICK else 256        # per update: reward queries
UPDATES = 5 if QUICK else 80
ETA = 1.0
problem = ctrl.zoo.gaussian_pull_2d(ETA)
grid = problem.grid(STEPS)


def alphas(t):
    """Time functions of the policy: alpha and alpha^2, as in the optimal feedback."""
    alpha = problem.schedule.alpha(problem.schedule.tau(t))
    return np.array([alpha, alpha**2])


start = ctrl.BasisPolicy(problem, alphas, W=np.zeros((2, 2, 2)), w=np.zeros((2, 2)))       # the pre-trained policy, 12 parameters
yardstick = learn.Yardstick.of(problem, start, grid)
print(f"J* = {yardstick.optimum:.9f}, best of the class {yardstick.best:.9f}, start {ctrl.exact.evaluate(problem, start, grid).objective:.9f}")

# %%
racers = {"score function": learn.ScoreFunction(), "PPO": learn.PPO(), "temporal difference": learn.TemporalDifference(),
          "value gradient": learn.ValueGradient(),
          "pathwise": learn.Pathwise(), "Adjoint Matching": learn.AdjointMatching(), "natural gradient": learn.NaturalGradient(),
          "q-learning": learn.QLearning(), "DDPO as published": learn.DDPO()}
runs = {name: learn.train(racer, problem, start, grid, seed=1, paths=PATHS, updates=UPDATES) for name, racer in racers.items()}

_, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
for k, (name, run) in enumerate(runs.items()):
    within = np.maximum(yardstick.within(run.objective), 1e-6)
    axes[0].semilogy(run.queries, within, color=f"C{k}", label=name)
    axes[1].semilogy(run.evaluations, within, color=f"C{k}", label=name)
axes[0].set(xlabel="reward queries", ylabel=r"$J_{\rm class} - J(\theta_k)$", title="Exact regret, default step sizes")
axes[1].set(xlabel="network passes", title="The same runs, by cost")
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# DDPO as published has no KL: it climbs $\mathbb E\,r$ past the maximum of $J$. The plain ascents, unbiased or not, noisy or not, end close
# together: see below.
# One step size for all would be unfair; drag it and see who minds.


# %%
def draw(step=0.25, seed=1, racer="score function"):
    run = learn.train(racers[racer].with_step(step), problem, start, grid, seed=seed, paths=PATHS, updates=UPDATES)
    _, ax = plt.subplots(figsize=(7, 3.2))
    ax.semilogy(np.maximum(yardstick.within(run.objective), 1e-6))
    ax.axhline(yardstick.of_class, color="k", ls=":", label="$J^* - J_{\\rm class}$")
    ax.set(xlabel="update", ylabel="regret within the class", title=f"{racer}, step {step:g}, seed {seed}" + (": diverged" if run.diverged else ""))
    ax.legend()
    plt.show()


draw()

# %% tags=["skip-execution"]
interact(draw, step=FloatLogSlider(0.25, min=-3, max=1, step=0.25, continuous_update=False), seed=IntSlider(1, min=0, max=9), racer=list(racers));

# %% [markdown]
# ## Noise, or conditioning?
#
# Left over at the end is not noise: the forms with a value have many times the signal of the score function and end no nearer. $J$ is poorly
# conditioned in
# $\theta$; one step size cannot serve all directions, and $F^{-1}$ can.

# %%
V, truth = ctrl.exact.value(problem, start, grid), ctrl.exact.evaluate(problem, start, grid).gradient.theta
e = ctrl.estimators
forms = {"score function": e.ScoreFunction(e.LeaveOneOut()), "reward-to-go, baseline V": e.RewardToGo(V),
         "temporal difference, true V": e.TemporalDifference(V),
         "value gradient, true V": e.ValueGradient(V), "pathwise": e.Pathwise()}
noise = ctrl.Noise(seed=0, paths=1000 if QUICK else 10_000)
signal = {name: truth @ truth / np.trace(form(problem, start, grid, noise).covariance) for name, form in forms.items()}
_, ax = plt.subplots(figsize=(7, 2.6))
ax.barh(list(signal), list(signal.values()))
ax.invert_yaxis()
ax.set(xscale="log", xlabel=r"$|\nabla J|^2/{\rm tr\,Cov}$")
plt.show()
F = e.fisher(problem, start, grid, ctrl.Noise.cross(problem, start, grid))
print(f"condition number of the Fisher information: {np.linalg.cond(F):.0f}")
for name, run in runs.items():
    J = run.objective[-1]
    print(f"{name:22s} ends at J = {J:+.6f}, regret within the class {yardstick.within(J):.2e}, {run.seconds[-1]:.2f} s")

# %% [markdown]
# `python -m analysis.regret` is the full race: thirteen algorithms, six problems, ten seeds, step sizes from one search for all.
#
# ## Exercises
#
# 1. `ETA = 0.0`. Who can still run? *Hint:* those that need no $\log p$.
# 2. Replace the class by a constant shift, `ctrl.BasisPolicy.shift(problem, [0, 0])`. Where does Adjoint Matching end, and why? *Hint:* its
#    stationary point is $J^*$ only if the
#    class contains it; for a constant shift, though, its mean is $\nabla J$.
# 3. Double `STEPS` and keep every step size. Whose curve moves? *Hint:* variance that grows like $N$.

# %%
assert np.isclose(yardstick.optimum, ctrl.exact.optimum(problem, grid).objective, rtol=1e-12) and yardstick.of_class > 0
assert all(np.all(run.objective <= yardstick.best + 1e-9) for run in runs.values())       # nothing beats the best of its class
assert signal["value gradient, true V"] > signal["score function"]
if not QUICK:
    ends = {name: yardstick.within(run.objective[-1]) for name, run in runs.items()}
    to_win = yardstick.best - runs["pathwise"].objective[0]
    assert ends["natural gradient"] < 0.005 * to_win < 0.01 * to_win < ends["pathwise"] < 0.05 * to_win < ends["DDPO as published"]
