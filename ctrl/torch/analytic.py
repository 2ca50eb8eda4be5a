r"""The analytic problems on tensors: the same law, policy and reward as an `nn.Module`, in float64, for checks against exact truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctrl import problem as numpy_problem
from ctrl.estimators import Gradient
from ctrl.laws import noised_laws
from ctrl.noise import NoiseLike
from ctrl.policy import AffinePolicy, BasisPolicy, MixturePolicy
from ctrl.policy import Policy as NumpyPolicy
from ctrl.reward import Reward
from ctrl.schedule import TimeGrid
from ctrl.torch.chain import Problem
from ctrl.torch.objectives import Objective
from ctrl.torch.policy import Policy, Times


class LinearPolicy(Policy):
    r"""An AffinePolicy or BasisPolicy on tensors: mu = K_theta(t) x + k_theta(t) (+ the score of fixed mixtures).

    K, k affine in theta, tabulated on one grid.   Source: theory.md, section 1.
    Checked: tests/test_torch_objectives.py::test_paths_equal_numpy
    """

    K: Tensor
    k: Tensor
    dK: Tensor
    dk: Tensor

    def __init__(self, policy: AffinePolicy | BasisPolicy, grid: TimeGrid) -> None:
        super().__init__()
        origin = policy.with_theta(np.zeros_like(policy.theta)).parts(grid)
        columns = [policy.with_theta(unit).parts(grid) for unit in np.eye(policy.theta.size)]
        self.theta = nn.Parameter(torch.tensor(policy.theta, dtype=torch.float64))
        self.register_buffer("K", torch.tensor(origin.K))
        self.register_buffer("k", torch.tensor(origin.k))
        self.register_buffer("dK", torch.tensor(np.stack([c.K - origin.K for c in columns], axis=-1)))
        self.register_buffer("dk", torch.tensor(np.stack([c.k - origin.k for c in columns], axis=-1)))
        self.score = None if origin.laws is None else MixtureScore.fixed(origin.laws)

    def forward(self, times: Times, x: Tensor, context: Any = None) -> Tensor:
        part = slice(times.first, times.first + len(times))
        K, k = self.K[part] + self.dK[part] @ self.theta, self.k[part] + self.dk[part] @ self.theta
        linear = torch.einsum("kij,nkj->nki", K, x) + k
        return linear if self.score is None else linear + self.score(times, x)


class MixtureScore(Policy):
    r"""A MixturePolicy on tensors: the score of the mixture of N(alpha m_c, alpha^2 C_c + v I), theta = the means m_c.

        a = -sum_c rho_c(x) P_c (x - alpha m_c),      rho = softmax( log w_c + log det P_c / 2 - (x - alpha m_c)'P_c(x - alpha m_c)/2 )

    Source: theory.md, section 1.   Checked: tests/test_torch_objectives.py::test_paths_equal_numpy
    """

    theta: nn.Parameter | None
    precision: Tensor
    level: Tensor
    centres: Tensor

    def __init__(self, policy: MixturePolicy, grid: TimeGrid) -> None:
        super().__init__()
        self._tabulate(noised_laws(policy.schedule, policy.law, grid))
        self.theta = nn.Parameter(torch.tensor(policy.theta, dtype=torch.float64))

    @classmethod
    def fixed(cls, laws: tuple[Any, ...]) -> MixtureScore:
        """The score of given mixtures, one per step, without parameters."""
        score = cls.__new__(cls)
        nn.Module.__init__(score)
        score._tabulate(laws)
        score.theta = None
        score.register_buffer("centres", torch.tensor(np.stack([law.means for law in laws])))
        return score

    def _tabulate(self, laws: tuple[Any, ...]) -> None:
        precision = np.stack([np.linalg.inv(law.covs) for law in laws])
        self.register_buffer("precision", torch.tensor(precision))
        self.register_buffer("level", torch.tensor(np.log(np.stack([law.weights for law in laws])) + 0.5 * np.linalg.slogdet(precision)[1]))

    def forward(self, times: Times, x: Tensor, context: Any = None) -> Tensor:
        part = slice(times.first, times.first + len(times))
        precision = self.precision[part]
        if self.theta is None:
            centres = self.centres[part]
        else:
            centres = times.alpha[:, None, None] * self.theta.reshape(precision.shape[1], -1)
        away = x[:, :, None] - centres
        pulled = torch.einsum("kcij,nkcj->nkci", precision, away)
        share = (self.level[part] - 0.5 * (away * pulled).sum(-1)).softmax(-1)
        return -(share[..., None] * pulled).sum(2)


class _Reward(torch.autograd.Function):
    """A NumPy reward with its gradient, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reward: Reward) -> Tensor:
        points = x.detach().cpu().numpy()
        ctx.slope = torch.tensor(reward.gradient(points)).to(x)
        return torch.tensor(reward.value(points)).to(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return upstream[:, None] * ctx.slope, None


def policy_of(policy: NumpyPolicy, grid: TimeGrid) -> Policy:
    """The same policy as an `nn.Module`, its theta a parameter of the same order.

    Source: theory.md, section 1.   Checked: tests/test_torch_objectives.py::test_paths_equal_numpy
    """
    if isinstance(policy, (AffinePolicy, BasisPolicy)):
        return LinearPolicy(policy, grid)
    if isinstance(policy, MixturePolicy):
        return MixtureScore(policy, grid)
    raise ValueError(f"policy: expected an AffinePolicy, a BasisPolicy or a MixturePolicy, got {type(policy).__name__}")


def problem_of(problem: numpy_problem.Problem, grid: TimeGrid) -> Problem:
    """The same problem on tensors: same schedule, weights, start law and reward; the exact score as its pre-trained policy.

    Source: theory.md, section 1.   Checked: tests/test_torch_objectives.py::test_paths_equal_numpy
    """
    if problem.entropy_weight:
        raise ValueError(f"entropy_weight: expected 0 on tensors (actions are means), got {problem.entropy_weight:g}")
    pretrained = policy_of(problem.pretrained(grid), grid).frozen()
    return Problem(problem.schedule, pretrained, lambda x, context: _Reward.apply(x, problem.reward), (problem.dim,), problem.kl_weight,
                   problem.eta, problem.discount, problem.start_law)


def estimator(objective: Objective) -> Callable[[numpy_problem.Problem, NumpyPolicy, TimeGrid, NoiseLike], Gradient]:
    """An objective as an estimator of the analytic part, for `ctrl.testing.assert_unbiased` and the gradient bench.

    Source: theory.md, section 7.   Checked: tests/test_torch_objectives.py::test_unbiased_on_sign_patterns
    """
    return lambda problem, policy, grid, noise: objective(problem_of(problem, grid), policy_of(policy, grid), grid, noise)
