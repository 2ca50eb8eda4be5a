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
# # Policy gradient: one gradient, many estimators
#
# $$\nabla_\theta J = \mathbb E\int_0^T(\partial_\theta\mu)^\top\left[h\,\nabla V - 2\lambda\kappa\,(\mu - s)\right]dt
# = \mathbb E\int_0^T\mathbb E_{a\sim\pi}\left[\nabla_\theta\log\pi(a|t,X_t)\;q(t,X_t,a)\right]dt.$$
#
# On the chain the left form is exact with $V_{i+1}(X_{i+1})$, and Stein's lemma
# $\mathbb E[\nabla V_{i+1}(X_{i+1})|X_i] = \mathbb E[V_{i+1}(X_{i+1})\,\xi_i|X_i]/(\eta g_i\sqrt{D_i})$ turns it into every score-function form.
# Their means are the same; their variances are not, and formulas that look alike have other means.

# %%
import os

import ctrl
import matplotlib.pyplot as plt
import numpy as np
from ctrl import estimators as e
from ipywidgets import FloatSlider, IntSlider, interact

QUICK = os.environ.get("QUICK") == "1"
ETA = 0.5          # at eta = 1 everything about h, kappa and h/(eta g) hides: h = g^2
KL_WEIGHT = 0.5    # lambda; 0 hides every KL-gradient error
STEPS = 3          # of the exact check: 2^(2 + 2 N) sign patterns


# %%
def setting(eta=ETA, kl_weight=KL_WEIGHT, steps=STEPS):
    """The reference problem, and a policy off the pre-trained one by a matrix and a shift."""
    p = ctrl.zoo.gaussian_pull_2d(eta)
    problem = ctrl.Problem(p.schedule, p.data, p.reward, kl_weight, eta)
    policy = ctrl.BasisPolicy(problem, lambda t: np.ones(1), W=[[[0.2, -0.1], [0.1, 0.2]]], w=[[0.3, -0.2]])
    return problem, policy, problem.grid(steps)


def right(V):
    return {"score function": e.ScoreFunction(), "  reward-to-go": e.RewardToGo(), "  baseline V": e.RewardToGo(V),
            "  leave-one-out": e.ScoreFunction(e.LeaveOneOut()),
            "  k1 in the return": e.ScoreFunction(sampled_kl=True), "temporal difference": e.TemporalDifference(V),
            "value gradient": e.ValueGradient(V),
            "pathwise": e.Pathwise()}


def wrong(V):
    return {"(A) cost in $G$, no $e_i$": e.KLForm(e.Analytic(), None), "(B) KL as a per-step loss": e.KLForm(None, e.Analytic()),
            "(C) no KL": e.KLForm(None, None),
            "k1 as a loss": e.KLForm(None, e.K1()), "k3 as a loss": e.KLForm(None, e.K3()), "last step only (DRaFT-1)": e.Pathwise(last=1),
            "lean adjoint": e.AdjointMatching(), "q form: $O(D)$": e.QForm(V)}


def biases(eta=ETA, kl_weight=KL_WEIGHT, steps=STEPS):
    """Relative distance of every estimator's expectation from grad J; no random number."""
    at = setting(eta, kl_weight, steps)
    truth, V, nodes = ctrl.exact.evaluate(*at).gradient.theta, ctrl.exact.value(*at), ctrl.Noise.signs(*at)
    return [{name: np.linalg.norm(form(*at, nodes).mean - truth) / np.linalg.norm(truth) for name, form in forms.items()}
            for forms in (right(V), wrong(V))]


def draw(eta=ETA, kl_weight=KL_WEIGHT, steps=STEPS):
    _, ax = plt.subplots(figsize=(8, 4.6))
    for bias, color in zip(biases(eta, kl_weight, steps), ("C0", "C3"), strict=True):
        ax.barh(list(bias), np.maximum(list(bias.values()), 1e-17), left=1e-17, color=color)
    ax.axvline(1e-10, color="k", ls=":", lw=1)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel=r"$|\mathbb{E}\,G - \nabla J|\,/\,|\nabla J|$ over all sign patterns",
           title=rf"Bias, $N = {steps}$, $\eta = {eta:g}$, $\lambda = {kl_weight:g}$ (dotted: tolerance $10^{{-10}}$)")
    plt.show()


draw()

# %% [markdown]
# Blue: unbiased, to rounding. Red: formulas that people write. Drag $\lambda$ to 0: (A), (B), (C) and the KL losses turn right, for there is no KL.

# %% tags=["skip-execution"]
interact(draw, eta=FloatSlider(ETA, min=0.25, max=1.5, step=0.25, continuous_update=False),
         kl_weight=FloatSlider(KL_WEIGHT, min=0.0, max=2.0, step=0.25, continuous_update=False), steps=IntSlider(STEPS, min=1, max=4,
                                                                                                                 continuous_update=False));

# %% [markdown]
# ## Variance
#
# A mean without its spread is half an estimator: `Gradient` keeps the covariance of one path. Traces on the reference problem,
# constant shift $\theta = (.1, .1)$ on top of $K = .9 K_{\mathrm{pre}}$, $\eta = 1$, and their growth with $N$.

# %%
reference = ctrl.zoo.gaussian_pull_2d()
counts = (10, 40) if QUICK else (10, 20, 40, 80, 160)
traces = {}
for n in counts:
    grid = reference.grid(n)
    shifted = ctrl.BasisPolicy.scaled(reference, 0.9, [0.1, 0.1])
    V = ctrl.exact.value(reference, shifted, grid)
    noise = ctrl.Noise(seed=n, paths=500 if QUICK else 8000)
    for name, form in right(V).items():
        traces.setdefault(name, []).append(np.trace(form(reference, shifted, grid, noise).covariance[1:, 1:]))

_, ax = plt.subplots(figsize=(8, 3.6))
for k, (name, values) in enumerate(traces.items()):
    ax.loglog(counts, values, "o-", ms=3, color=f"C{k}", label=name.strip())
ax.set(xlabel="steps $N$", ylabel="trace of the covariance", title="One path's spread in the two shift coordinates")
ax.set_xticks(counts, [str(n) for n in counts], minor=False)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## The limit
#
# $\nabla J^D \to \nabla J$ at order 1. Both sides exact: a slope without noise.

# %%
at_eta = ctrl.zoo.gaussian_pull_2d(ETA)
theta = ctrl.BasisPolicy.scaled(at_eta, 0.9, [0.1, 0.1])
limit = ctrl.exact.limit.evaluate(at_eta, theta).gradient.theta
N = np.array([50, 100, 200, 400, 800])
errors = np.array([np.linalg.norm(ctrl.exact.evaluate(at_eta, theta, at_eta.grid(int(n))).gradient.theta - limit) for n in N])
slopes = np.log2(errors[:-1] / errors[1:])
print("limit", limit, "\nerrors", errors, "\nobserved orders", slopes)

# %% [markdown]
# ## Exercises
#
# 1. Set `ETA = 1.0` and predict which red bars move. *Hint:* at $\eta = 1$ the formulas differ only in the KL.
# 2. Make the policy a constant shift (`W = 0`). Two red bars become blue; which? *Hint:* $\partial_x(\mu - s) = 0$.
# 3. Add `e.RewardToGo(lambda i, x: V(i, x) + 5)` to `right`. Does the mean change? The trace? *Hint:* $\mathbb E[\sigma_i|X_i] = 0$.

# %%
unbiased, biased = biases()
assert max(unbiased.values()) < 1e-10, unbiased
if ETA != 1 and KL_WEIGHT > 0:
    assert min(biased.values()) > 1e-4, biased
assert np.all(np.abs(slopes - 1) < 0.1)
truth = ctrl.exact.evaluate(reference, ctrl.BasisPolicy.scaled(reference, 0.9, [0.1, 0.1]), reference.grid(100)).gradient.theta
assert np.allclose(truth, [5.467255574706948, -3.017229320141546, -0.2482680655707115], rtol=1e-11)       # theory, section 17
if not QUICK:
    known = {"score function": 131.5, "  reward-to-go": 128.5, "  baseline V": 24.2, "temporal difference": 1.00, "value gradient": 0.844,
             "pathwise": 2.85}
    for name, trace in known.items():
        assert abs(traces[name][-1] / trace - 1) < 0.25, (name, traces[name][-1])
