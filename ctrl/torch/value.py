r"""Value functions on tensors: the network with the paper's skeleton, a plain one, and exact values (theory.md, sections 5 and 13).

    V_phi(t, x) = c_skip(t) r(x0_hat(t, x)) + c_out(t) F_phi(t, x),      c_skip = alpha^2/(alpha^2 + v),  c_out = sqrt(1 - c_skip^2)

Learned by the martingale loss E sum_i D_i (V_phi(t_i, X_i) - G_i)^2, whose minimiser is V.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctrl.estimators import ValueFunction
from ctrl.torch.chain import Run


class Value(nn.Module, ABC):
    """V(t_i, X_i) at the left points of a run, (n, N); at t_N the value is the reward itself."""

    @abstractmethod
    def forward(self, run: Run) -> Tensor:
        """(n, N), differentiable in the leaf run.x and in the parameters."""


class Ansatz(Value):
    r"""The value network's skeleton: r at the denoised image, and a network that learns the rest.

        V_phi(t, x) = c_skip r(x0_hat(t, x)) + sqrt(1 - c_skip^2) F_phi(t, x),    x0_hat = (x + v s)/alpha,    c_skip = alpha^2/(alpha^2 + v)

    c_skip = 1 and c_out = 0 at data. r(x0_hat) ignores what is still random given x (Jensen) and is too steep, so its weight falls with the
    signal's share of the variance. Weights cos and sin of pi tau/2T, of atan(sqrt(v)/alpha), and these end at a regret of .69, .54 on
    digit 3, and .61 (the second) against .48 (these) on digit 8, one seed each.
    network F : (times, x (n, k, *shape), context) -> (n, k)      Needs a differentiable reward only where grad V is asked for.
    Source: Scores as Actions (2409.08400); theory.md, section 13.   Checked: tests/test_torch_value.py::test_ansatz_is_its_formula
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, run: Run) -> Tensor:
        times = run.times[: run.grid.steps]
        skip = times.alpha.square() / (times.alpha.square() + times.v)
        return skip * run.predicted_reward + (1 - skip.square()).sqrt() * self.network(times, run.x, run.context)


class PlainValue(Value):
    """V_phi = F_phi: a network alone, to be compared with the skeleton.

    Source: theory.md, section 13.   Checked: tests/test_torch_value.py::test_ansatz_is_its_formula
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, run: Run) -> Tensor:
        return self.network(run.times[: run.grid.steps], run.x, run.context)


class ExactValue(Value):
    """An exact V(i, x) of the analytic part with its gradient, for checks: every estimator with the true V is unbiased.

    Source: theory.md, section 7.   Checked: tests/test_torch_objectives.py::test_objectives_equal_numpy_estimators
    """

    def __init__(self, value: ValueFunction) -> None:
        super().__init__()
        self.value = value

    def forward(self, run: Run) -> Tensor:
        return torch.stack([_Known.apply(run.x[:, i], self.value, i) for i in range(run.grid.steps)], dim=1)


class _Known(torch.autograd.Function):
    """A NumPy function with a known gradient, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: ValueFunction, i: int) -> Tensor:
        points = x.detach().cpu().numpy().astype(np.float64)
        ctx.slope = torch.as_tensor(np.ascontiguousarray(value.gradient(i, points))).to(x)
        return torch.as_tensor(value(i, points)).to(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return upstream[:, None] * ctx.slope, None, None


def values(value: Value, run: Run) -> Tensor:
    """e^{-rho t_i} V_i(X_i) for i = 0 ... N with V_N = r, (n, N + 1), numbers."""
    with torch.no_grad():
        return torch.cat([run.at(run.coefficients.discount) * value(run.still), run.final[:, None]], dim=1)


def value_gradients(value: Value, run: Run) -> Tensor:
    """e^{-rho t_i} grad V_i(X_i) for i = 1 ... N with V_N = r, (n, N, *shape)."""
    v = run.at(run.coefficients.discount) * value(run)
    slope = torch.autograd.grad(v.sum(), run.x, retain_graph=True)[0]
    return torch.cat([slope[:, 1:], run.reward_gradient[:, None]], dim=1)


def martingale_loss(value: Value, run: Run) -> Tensor:
    r"""E sum_i D_i (V_phi(t_i, X_i) - G_i)^2 with G_i = r - sum_{j>=i} (cost_j + lambda u_j'xi_j), minimised by V (per path, (n,)).

    The noise u'xi, u = sqrt(2 kappa D)(a - s), has mean zero given X_i, so that the minimiser is V as with the costs alone; and it
    cancels what is random in the return: at the continuous-time optimum G_i = V(t_i, X_i) path by path (r/lambda - k1 is constant, section 9).
    Source: theory.md, sections 5 and 9 (Jia and Zhou).   Checked: tests/test_torch_value.py::test_martingale_loss_is_least_at_the_value
    """
    returns = run.final[:, None] - run.cost_to_go - run.noise_to_go
    residual = run.at(run.coefficients.discount) * value(run.still) - returns
    return (run.at(run.coefficients.dt) * residual.square()).sum(1)
