"""The methods that are compared: an objective of `ctrl.torch.objectives` with its own step sizes, as a user would choose it.

Step sizes of all but the value gradient by one search: the least regret on digits of class 3 after 100 updates of 64 paths (kl_weight .5,
a seed that no result uses) among 5e-4, 1e-3, 2e-3 (pathwise, adjoint matching), 3e-4, 1e-3, 2e-3 (temporal difference), 3e-4, 1e-3, 3e-3
(reward-weighted) and 1e-4, 3e-4, 1e-3 (the ratios, whose best is the largest tried); pathwise: 2e-3 was no better within its standard error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import tyro

from ctrl.estimators import LeaveOneOut
from ctrl.torch import objectives
from ctrl.torch.value import Value


@dataclass(frozen=True)
class Method(ABC):
    """How theta is moved: an objective, and the step sizes that suit it."""

    learning_rate: float = 7e-4
    """Peak step size of the policy's Adam."""
    value_learning_rate: float = 4e-3
    """Peak step size of the value's Adam, where a value is learned."""
    value_updates: int = 10
    """Updates of the value on each batch of paths."""
    epochs: int = 1
    """Updates on each batch of paths."""

    @property
    def learns_value(self) -> bool:
        """Whether the objective asks for a value function."""
        return False

    @property
    def differentiates(self) -> bool:
        """Whether the objective asks for the reward's gradient."""
        return False

    @abstractmethod
    def objective(self, value: Value) -> objectives.Objective:
        """The objective, given the value that is being learned."""


@dataclass(frozen=True)
class ValueGradient(Method):
    """The paper's value skeleton; the gradient of the learned value moves the policy."""

    @property
    def learns_value(self) -> bool:
        return True

    @property
    def differentiates(self) -> bool:
        return True

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.ValueGradient(value)


@dataclass(frozen=True)
class TemporalDifference(Method):
    """The paper's policy gradient: score function times the learned value's temporal difference."""

    learning_rate: float = 1e-3

    @property
    def learns_value(self) -> bool:
        return True

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.TemporalDifference(value)


@dataclass(frozen=True)
class ScoreFunction(Method):
    """DDPO-SF: REINFORCE with a leave-one-out baseline."""

    learning_rate: float = 1e-3

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.ScoreFunction(LeaveOneOut())


@dataclass(frozen=True)
class PPO(Method):
    """DDPO-IS: clipped ratios over several updates of one batch."""

    learning_rate: float = 1e-3
    epochs: int = 2
    clip: float = 0.2
    """Half-width of the ratio's trust region, per step and image."""

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.ClippedRatio(LeaveOneOut(), self.clip)


@dataclass(frozen=True)
class DPOK(Method):
    """KL-regularised policy gradient with a learned value as baseline."""

    learning_rate: float = 1e-3
    clip: float = 0.2
    """Half-width of the ratio's trust region, per step and image."""

    @property
    def learns_value(self) -> bool:
        return True

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.DPOK(value, self.clip)


@dataclass(frozen=True)
class Pathwise(Method):
    """AlignProp, DRaFT: differentiation through the chain."""

    learning_rate: float = 1e-3
    last: int | None = None
    """Only the last K policy calls (DRaFT-K, biased); None for all."""

    @property
    def differentiates(self) -> bool:
        return True

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.Pathwise(self.last)


@dataclass(frozen=True)
class AdjointMatching(Method):
    """Regression on the lean adjoint."""

    learning_rate: float = 1e-3

    @property
    def differentiates(self) -> bool:
        return True

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.AdjointMatching()


@dataclass(frozen=True)
class RewardWeighted(Method):
    """Reward-weighted regression on the tilted path law."""

    learning_rate: float = 3e-4
    anchored: bool = True
    """Weights of the tilted path law; off: as published, by the reward alone."""

    def objective(self, value: Value) -> objectives.Objective:
        return objectives.RewardWeighted(self.anchored)


ALL: tuple[Method, ...] = (ValueGradient(), TemporalDifference(), Pathwise(), AdjointMatching(), ScoreFunction(), PPO(), DPOK(), RewardWeighted())

Choice = (
    Annotated[ValueGradient, tyro.conf.subcommand("value-gradient")]
    | Annotated[TemporalDifference, tyro.conf.subcommand("temporal-difference")]
    | Annotated[Pathwise, tyro.conf.subcommand("pathwise")]
    | Annotated[AdjointMatching, tyro.conf.subcommand("adjoint-matching")]
    | Annotated[ScoreFunction, tyro.conf.subcommand("score-function")]
    | Annotated[PPO, tyro.conf.subcommand("ppo")]
    | Annotated[DPOK, tyro.conf.subcommand("dpok")]
    | Annotated[RewardWeighted, tyro.conf.subcommand("reward-weighted")])
