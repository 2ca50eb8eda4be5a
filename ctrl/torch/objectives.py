r"""Objectives as losses: the autograd gradient of each loss is minus the estimator of the same name (theory.md, section 7).

Per path, with everything but mu_theta a number, and with cost_i = lambda kappa_i D_i |mu_i - s_i|^2 (its gradient is -(d mu_i)'e_i):

    ScoreFunction        sum_i -log p(X_{i+1}|X_i) (G - b) + cost_i                   G the total return (REINFORCE, DDPO-SF)
    RewardToGo           sum_i -log p(X_{i+1}|X_i) (G_{i+1} - b) + cost_i             G_{i+1} the return after step i
    ClippedRatio         sum_i -min(rho_i A_i, clip(rho_i) A_i) + cost_i              rho_i = p_theta/p_old of step i (DDPO-IS, PPO)
    DPOK                 the clipped ratio with A_i = G_{i+1} - V_i(X_i)
    TemporalDifference   sum_i -log p(X_{i+1}|X_i) (V_{i+1}(X_{i+1}) - V_i(X_i)) + cost_i
    ValueGradient        sum_i -D_i h_i <mu_i, grad V_{i+1}(X_{i+1})> + cost_i
    Pathwise             sum_i -D_i h_i <mu_i, p_{i+1}> + cost_i                      p the adjoint of the whole chain, or i >= N - K only
    AdjointMatching      the same with the lean adjoint
    RewardWeighted       -w sum_i log p(X_{i+1}|X_i)                                  w self-normalised e^{r/lambda - k1}

All losses are per path (n,); their mean is what an optimiser minimises. KL is in nats per image, with its time step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctrl import check
from ctrl.estimators import Gradient, LeaveOneOut
from ctrl.noise import NoiseLike
from ctrl.schedule import TimeGrid
from ctrl.torch.chain import Problem, Run, inner, sample, step
from ctrl.torch.policy import Policy
from ctrl.torch.prompts import PerPrompt, with_prompt
from ctrl.torch.value import Value, value_gradients, values

SAMPLES_AT_ONCE = 64  # per-path gradients in one batched backward pass


class Objective(ABC):
    """A loss per path whose autograd gradient is minus a policy-gradient estimator; called, it is that estimator."""

    @abstractmethod
    def loss(self, run: Run) -> Tensor:
        """(n,); theta enters through run.mu alone."""

    def remember(self, run: Run) -> None:  # noqa: B027
        """Take in what later batches are to know of this one, after its last step: nothing, as a rule."""

    @property
    def coupling(self) -> Callable[[Run], Tensor] | None:
        """Numbers of each path, (n, ...), which the loss wants of the whole batch, through `run.joined`; None where every path is by itself."""
        return None

    def __call__(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, context: Any = None) -> Gradient:
        """The estimator: per-path gradients in theta (all trainable parameters, in order), in float64."""
        run, theta, kept = sample(problem, policy, grid, noise, context, dtype=torch.float64), policy.trainable(), []
        run.__dict__["mu"] = mu = run.actions.clone().requires_grad_()  # a leaf: the loss pulls at it, the policy passes that on to theta
        pull, *others = torch.autograd.grad(self.loss(run).sum(), [mu, *theta], allow_unused=True)
        if pull is None or any(other is not None for other in others):
            raise ValueError(f"loss: expected theta to enter through run.mu alone in {type(self).__name__}, got another way")
        for first in range(0, len(run), SAMPLES_AT_ONCE):
            part = slice(first, first + SAMPLES_AT_ONCE)
            each = torch.diag_embed(pull[part].movedim(0, -1), dim1=0, dim2=1)
            rows = torch.autograd.grad(run[part].mu, theta, each, is_grads_batched=True)
            kept.append(-torch.cat([row.flatten(1) for row in rows], dim=1))
        samples = torch.cat(kept).cpu().numpy()
        return Gradient.from_samples(samples.reshape(-1, noise.group, samples.shape[1]).mean(axis=1), noise.weights)


Baseline = float | LeaveOneOut | PerPrompt | Value | None


@dataclass(frozen=True, eq=False)
class ScoreFunction(Objective):
    r"""Score-function gradient with the total return (REINFORCE, DDPO-SF).

        loss = sum_i -log p_theta(X_{i+1}|X_i) (G - b_i) + cost_i,      G = r - sum cost

    baseline b : None, a number, LeaveOneOut() (over the joined batch), PerPrompt (the same for each prompt), or a value
    Unbiased for the chain at every step size; eta > 0.
    Source: Black et al. (2305.13301); theory.md, section 7.
    Checked: tests/test_torch_objectives.py::test_objectives_equal_numpy_estimators
    """

    baseline: Baseline = None

    def __call__(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, context: Any = None) -> Gradient:
        if isinstance(self.baseline, LeaveOneOut | PerPrompt) and (noise.group > 1 or noise.weights is not None):
            what = "antithetic pairs" if noise.group > 1 else "a quadrature rule"
            raise ValueError(f"noise: expected independent random paths for a leave-one-out baseline, got {what}")
        return super().__call__(problem, policy, grid, noise, context)

    @property
    def coupling(self) -> Callable[[Run], Tensor] | None:
        if isinstance(self.baseline, PerPrompt):
            return lambda run: with_prompt(run, self.returns(run))
        return self.returns if isinstance(self.baseline, LeaveOneOut) else None

    def returns(self, run: Run) -> Tensor:
        """What multiplies the score before the baseline, (n, N): G at every step."""
        return run.objective[:, None].expand(-1, run.grid.steps)

    def advantage(self, run: Run) -> Tensor:
        """Returns less the baseline, (n, N), numbers."""
        returns, b = self.returns(run), self.baseline
        if isinstance(b, LeaveOneOut):
            everyone = run.joined(returns.contiguous())
            if len(everyone) < 2:
                raise ValueError(f"baseline: expected at least 2 paths for a leave-one-out baseline, got {len(everyone)}")
            return (returns - everyone.mean(0)) * (len(everyone) / (len(everyone) - 1))
        if isinstance(b, PerPrompt):
            return returns - b(run, returns)
        if isinstance(b, Value):
            return returns - values(b, run)[:, :-1]
        return returns - (0.0 if b is None else b)

    def remember(self, run: Run) -> None:
        if isinstance(self.baseline, PerPrompt):
            self.baseline.remember(run, self.returns(run))

    def loss(self, run: Run) -> Tensor:
        # At the sampling policy log_ratio is 0, and its gradient is that of log p.
        return (-run.log_ratio * self.advantage(run) + run.cost).sum(1)


@dataclass(frozen=True, eq=False)
class RewardToGo(ScoreFunction):
    r"""Score-function gradient with the return after step i.

        loss = sum_i -log p_theta(X_{i+1}|X_i) (G_{i+1} - b_i) + cost_i,      G_{i+1} = r - sum_{j>i} cost_j

    Unbiased for the chain at every step size; eta > 0.
    Source: theory.md, section 7.   Checked: tests/test_torch_objectives.py::test_objectives_equal_numpy_estimators
    """

    def returns(self, run: Run) -> Tensor:
        return run.final[:, None] - (run.cost_to_go - run.paid)


@dataclass(frozen=True, eq=False)
class ClippedRatio(RewardToGo):
    r"""The clipped ratio of every step (PPO, DDPO-IS), with the analytic KL as its own term.

        loss = sum_i -min( rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i ) + cost_i,      rho_i = p_theta/p_old (X_{i+1}|X_i)

    clip : half-width of the trust region; rho multiplies densities of whole images, so that useful clips are small
    At the policy that sampled: unbiased. Away from it biased even without clipping, as the states stay those of the old policy.
    Source: Schulman et al. (1707.06347); Black et al. (2305.13301); theory.md, section 7.
    Checked: tests/test_torch_objectives.py::test_clipped_ratio_away_from_the_sampling_policy
    """

    baseline: Baseline = field(default_factory=LeaveOneOut)
    clip: float = 0.2

    def __post_init__(self) -> None:
        check.number("clip", self.clip, above=0)

    @torch.no_grad()
    def clipped(self, run: Run) -> Tensor:
        """Where the minimum is the clipped term, beyond the trust region on the side of the advantage: these have no gradient; (n, N), bool."""
        rho, advantage = run.log_ratio.exp(), self.advantage(run)
        return torch.where(advantage > 0, rho > 1 + self.clip, rho < 1 - self.clip) & (advantage != 0)

    def loss(self, run: Run) -> Tensor:
        ratio, advantage = run.log_ratio.exp(), self.advantage(run)
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return (-torch.minimum(ratio * advantage, clipped * advantage) + run.cost).sum(1)


@dataclass(frozen=True, eq=False)
class DPOK(ClippedRatio):
    r"""KL-regularised policy gradient with a value baseline (DPOK), its KL in nats, with its time step and its whole gradient.

        loss = sum_i -min( rho_i A_i, clip(rho_i) A_i ) + cost_i,      A_i = G_{i+1} - V_i(X_i)

    kl_in_return : False is DPOK as published, whose KL acts on detached states only (A_i = r - V_i): biased, see (B)
    Source: Fan et al. (2305.16381); theory.md, section 7.
    Checked: tests/test_torch_objectives.py::test_dpok_as_published_is_biased
    """

    baseline: Baseline = None
    kl_in_return: bool = True

    def returns(self, run: Run) -> Tensor:
        return super().returns(run) if self.kl_in_return else run.final[:, None].expand(-1, run.grid.steps)


@dataclass(frozen=True, eq=False)
class TemporalDifference(Objective):
    r"""Score function times the temporal-difference residual of a value (the paper's policy gradient).

        loss = sum_i -log p_theta(X_{i+1}|X_i) (V_{i+1}(X_{i+1}) - V_i(X_i)) + cost_i

    Unbiased for the chain with the true V; eta > 0.
    Source: Scores as Actions (2409.08400); theory.md, section 7.
    Checked: tests/test_torch_objectives.py::test_objectives_equal_numpy_estimators
    """

    value: Value

    def loss(self, run: Run) -> Tensor:
        return (-run.log_ratio * values(self.value, run).diff(dim=1) + run.cost).sum(1)


@dataclass(frozen=True, eq=False)
class ValueGradient(Objective):
    r"""The value's gradient in the place of the score function.

        loss = sum_i -D_i h_i <mu_i, grad V_{i+1}(X_{i+1})> + cost_i

    Unbiased for the chain with the true V, at every eta; needs a differentiable reward.
    Source: Scores as Actions (2409.08400); theory.md, section 7.
    Checked: tests/test_torch_objectives.py::test_objectives_equal_numpy_estimators
    """

    value: Value

    def loss(self, run: Run) -> Tensor:
        return _along(run, value_gradients(self.value, run))


def _along(run: Run, p: Tensor) -> Tensor:
    """sum_i -D_i h_i <mu_i, p_{i+1}> + cost_i for costates p_1 ... p_N, (n, N, *shape); with K < N costates, the last K steps."""
    c, k = run.coefficients, p.shape[1]
    gain = run.at(c.dt * c.h)[-k:]
    return (-gain * inner(run.mu[:, -k:], p) + run.cost[:, -k:]).sum(1)


@dataclass(frozen=True, eq=False)
class Pathwise(Objective):
    r"""Differentiation through the chain (AlignProp, DRaFT), by its adjoint: memory does not grow with the number of steps.

        loss = sum_i -D_i h_i <mu_i, p_{i+1}> + cost_i,    p_N = grad r,   p_i = (dX_{i+1}/dX_i)' p_{i+1} - d cost_i / dx

    last K : only the policy calls of the last K steps, with their costs (DRaFT-K): biased; None for all steps: unbiased
    Source: Clark et al. (2309.17400); theory.md, section 7.
    Checked: tests/test_torch_objectives.py::test_objectives_equal_numpy_estimators
    """

    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None:
            check.integer("last", self.last, at_least=1)

    def loss(self, run: Run) -> Tensor:
        return _along(run, _costates(run, run.policy, self.last or run.grid.steps, running=True))


@dataclass(frozen=True, eq=False)
class AdjointMatching(Objective):
    r"""Adjoint Matching: regression of the control on the lean adjoint.

        loss = sum_i -D_i h_i <mu_i, p_{i+1}> + cost_i,    p_N = grad r,   p_i = (I + D_i(-f_i I + h_i ds_i/dx))' p_{i+1}

    equal, up to terms without theta, to sum_i lambda kappa_i D_i |mu_i - s_i - h_i p_{i+1}/(2 lambda kappa_i)|^2.
    Not grad J in general; zero at the optimum.
    Source: Domingo-Enrich et al. (2409.08861); theory.md, section 7.
    Checked: tests/test_torch_objectives.py::test_adjoint_matching_is_the_lean_adjoint
    """

    def loss(self, run: Run) -> Tensor:
        return _along(run, _costates(run, run.problem.pretrained, run.grid.steps, running=False))


def _costates(run: Run, through: Policy, last: int, *, running: bool) -> Tensor:
    """p_{N-last+1} ... p_N: grad r pulled back through the steps of a policy, with the running cost's gradient or without."""
    c, p = run.coefficients, run.reward_gradient
    out = [p]
    for i in range(run.grid.steps - 1, max(run.grid.steps - last, 0), -1):
        x = run.states[:, i : i + 1].clone().requires_grad_()
        times = run.times[i : i + 1]
        with torch.enable_grad():
            a = through(times, x, run.context)
            ahead = (step(c, i, x, a) * p[:, None]).sum()
            if running:
                departure = a - run.problem.pretrained(times, x, run.context)
                ahead = ahead - run.rate[i] * departure.square().sum()
        p = torch.autograd.grad(ahead, x)[0][:, 0]
        out.append(p)
    return torch.stack(out[::-1], dim=1)


@dataclass(frozen=True, eq=False)
class RewardWeighted(Objective):
    r"""Reward-weighted regression: maximum likelihood on paths weighted by their reward.

        loss = -w sum_i log p_theta(X_{i+1}|X_i),      w = n e^{r/lambda - k1} / sum e^{r/lambda - k1}

    by_prompt : sum and n over the paths of the same prompt, whose tilted laws have a constant each: over all paths, a prompt would weigh as much
                as its constant. A prompt's only path has w = 1
    anchored : the weights of the tilted path law P_pre e^{r/lambda} (its optimum is theirs); False drops k1, as published: the
               model then chases e^{r/lambda} without end, away from the pre-trained one
    Not grad J; self-normalised over the joined batch; needs kl_weight > 0.
    Source: Peters and Schaal (2007); Lee et al. (2302.12192); theory.md, section 9.
    Checked: tests/test_torch_objectives.py::test_reward_weighted_points_to_the_tilt, tests/test_torch_prompts.py::test_weights_of_each_prompt
    """

    anchored: bool = True
    by_prompt: bool = False

    @property
    def coupling(self) -> Callable[[Run], Tensor] | None:
        if self.by_prompt:
            return lambda run: with_prompt(run, self.logits(run)[:, None])
        return self.logits

    def logits(self, run: Run) -> Tensor:
        """log w of each path, (n,), before they are normalised."""
        if run.problem.kl_weight == 0:
            raise ValueError("kl_weight: expected kl_weight > 0 for reward-weighted regression (weights e^{r/kl_weight}), got 0")
        return run.final / run.problem.kl_weight - (run.k1.sum(1) if self.anchored else 0.0)

    def loss(self, run: Run) -> Tensor:
        return -self.weight(run) * run.log_ratio.sum(1)

    def weight(self, run: Run) -> Tensor:
        """w of each path, (n,), a number."""
        logits = self.logits(run)
        assert self.coupling is not None
        everyone = run.joined(self.coupling(run))
        if not self.by_prompt:
            return len(everyone) * (logits - everyone.logsumexp(0)).exp()
        same = run.prompt[:, None] == everyone[:, 1].round()
        return same.sum(1) * (logits - torch.where(same, everyone[:, 0], -torch.inf).logsumexp(1)).exp()
