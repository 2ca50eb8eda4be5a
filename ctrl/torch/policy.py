r"""Policies on tensors: networks that predict noise, clean images, v or the score become actions here, and only here.

    x_tau = alpha x_0 + sqrt(v) eps:    action a = score = -eps/sqrt(v) = (alpha x_0 - x)/v,      x_0 = (x + v a)/alpha

States are (n, k, *shape): n paths at k times, as in `ctrl.estimators`; a batch of a whole trajectory is one call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ctrl import check
from ctrl.schedule import Schedule, TimeGrid


@dataclass(frozen=True, eq=False)
class Times:
    r"""k consecutive times of a grid, in the noise's terms: tau, and Y_tau = alpha Y_0 + sqrt(v) eps there.

    grid : the TimeGrid      first : index of the first      tau, alpha, v : (k,), rounded once from float64
    Source: theory.md, section 1.   Checked: tests/test_torch_chain.py::test_times_are_the_schedules
    """

    grid: TimeGrid
    first: int
    tau: Tensor
    alpha: Tensor
    v: Tensor

    @classmethod
    def of(cls, schedule: Schedule, grid: TimeGrid, dtype: torch.dtype = torch.float32, device: Any = None) -> Times:
        """All N + 1 times of a grid."""
        tau = [schedule.tau(t) for t in grid.times]
        columns = (tau, [schedule.alpha(s) for s in tau], [schedule.v(s) for s in tau])
        return cls(grid, 0, *(torch.tensor(c, dtype=torch.float64).to(dtype=dtype, device=device) for c in columns))

    def __len__(self) -> int:
        return len(self.tau)

    def __getitem__(self, part: slice) -> Times:
        first, last, _ = part.indices(len(self))
        return replace(self, first=self.first + first, tau=self.tau[first:last], alpha=self.alpha[first:last], v=self.v[first:last])


def lift(c: Tensor, x: Tensor) -> Tensor:
    """Per-time numbers (k,) beside states (n, k, *shape)."""
    return c.reshape(-1, *(1,) * (x.ndim - 2))


def denoised(times: Times, x: Tensor, action: Tensor) -> Tensor:
    r"""x0_hat = (x + v a)/alpha: the clean image that an action stands for (Tweedie's formula when a is the score).

    x, action, returns : (n, k, *shape)
    Source: theory.md, section 13.   Checked: tests/test_torch_chain.py::test_predictions_are_one_action
    """
    return (x + lift(times.v, x) * action) / lift(times.alpha, x)


class Policy(nn.Module, ABC):
    """mu_theta(t, x), an action in the place of the score; parameters are theta."""

    @abstractmethod
    def forward(self, times: Times, x: Tensor, context: Any = None) -> Tensor:
        """(n, k, *shape) -> (n, k, *shape)."""

    def trainable(self) -> list[nn.Parameter]:
        """theta: the parameters that a gradient is taken of."""
        return [p for p in self.parameters() if p.requires_grad]

    def frozen(self) -> Self:
        """This policy without gradients and in evaluation mode, in place: a pre-trained reference."""
        return self.eval().requires_grad_(False)


class Prediction(ABC):
    """What a network's output means; `action` turns it into an action."""

    @abstractmethod
    def action(self, times: Times, x: Tensor, output: Tensor) -> Tensor:
        """(n, k, *shape) -> (n, k, *shape)."""


@dataclass(frozen=True)
class PredictsNoise(Prediction):
    """output = eps (DDPM): a = -eps/sqrt(v).

    Source: Ho et al. (2006.11239).   Checked: tests/test_torch_chain.py::test_predictions_are_one_action
    """

    def action(self, times: Times, x: Tensor, output: Tensor) -> Tensor:
        return -output / lift(times.v, x).sqrt()


@dataclass(frozen=True)
class PredictsClean(Prediction):
    """output = x_0: a = (alpha x_0 - x)/v.

    Source: theory.md, section 13.   Checked: tests/test_torch_chain.py::test_predictions_are_one_action
    """

    def action(self, times: Times, x: Tensor, output: Tensor) -> Tensor:
        return (lift(times.alpha, x) * output - x) / lift(times.v, x)


@dataclass(frozen=True)
class PredictsVelocity(Prediction):
    """output = alpha eps - sqrt(v) x_0 (v-prediction): eps = (alpha output + sqrt(v) x)/(alpha^2 + v), a = -eps/sqrt(v).

    Source: Salimans and Ho (2202.00512).   Checked: tests/test_torch_chain.py::test_predictions_are_one_action
    """

    def action(self, times: Times, x: Tensor, output: Tensor) -> Tensor:
        alpha, v = lift(times.alpha, x), lift(times.v, x)
        return -(alpha * output / v.sqrt() + x) / (alpha**2 + v)


@dataclass(frozen=True)
class PredictsFlow(Prediction):
    """output = eps - x_0 (flow matching): eps = (x + alpha output)/(alpha + sqrt(v)), a = -eps/sqrt(v).

    Source: Lipman et al. (2210.02747).   Checked: tests/test_torch_chain.py::test_predictions_are_one_action
    """

    def action(self, times: Times, x: Tensor, output: Tensor) -> Tensor:
        alpha, root = lift(times.alpha, x), lift(times.v, x).sqrt()
        return -(x + alpha * output) / (root * (alpha + root))


@dataclass(frozen=True)
class PredictsScore(Prediction):
    """output = score: a = output.

    Source: Song et al. (2011.13456).   Checked: tests/test_torch_chain.py::test_predictions_are_one_action
    """

    def action(self, times: Times, x: Tensor, output: Tensor) -> Tensor:
        return output


class NetworkPolicy(Policy):
    r"""A network and what it predicts: mu(t, x) = prediction.action(t, x, network(times, x, context)).

    network : (times, x (n, k, *shape), context) -> (n, k, *shape)      autocast : compute dtype of the network, None for the states'
    Actions come back in the states' precision, so that log-densities and the KL never see half precision.
    Source: Scores as Actions (2409.08400).   Checked: tests/test_torch_chain.py::test_predictions_are_one_action
    """

    def __init__(self, network: nn.Module, prediction: Prediction, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        check.instance("prediction", prediction, Prediction, "a prediction, for instance PredictsNoise()")
        self.network, self.prediction, self.autocast = network, prediction, autocast

    def forward(self, times: Times, x: Tensor, context: Any = None) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = self.network(times, x, context)
        return self.prediction.action(times, x, output.to(x.dtype))


class WithoutAdapter(Policy):
    """A policy with its LoRA adapter switched off: the frozen pre-trained model, without a second copy of the weights.

    Source: Hu et al. (2106.09685).   Checked: tests/test_torch_policy.py::test_lora_reference_is_the_pretrained_model
    """

    def __init__(self, policy: NetworkPolicy) -> None:
        super().__init__()
        # In a tuple, hidden from parameters() and state_dict(): the weights belong to `policy`.
        self._policy = (policy,)

    def forward(self, times: Times, x: Tensor, context: Any = None) -> Tensor:
        policy = self._policy[0]
        with _fixed(policy), policy.network.disable_adapter():  # type: ignore[operator]
            return policy(times, x, context)


@contextmanager
def _fixed(policy: Policy) -> Iterator[None]:
    """No gradient reaches the parameters inside; gradients to the states pass."""
    before = [(p, p.requires_grad) for p in policy.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, asked in before:
            p.requires_grad_(asked)
