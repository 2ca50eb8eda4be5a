r"""The yardstick for fine-tuning images: the best objective that exists, from samples of the pre-trained model alone.

    J* = lambda log E_pre e^{r/lambda},      E*[r] = E_pre[ w r ],  w = e^{r/lambda} / E_pre e^{r/lambda},      KL* = (E*[r] - J*)/lambda

the value of the continuous-time optimum, whose terminal law is the tilt p_pre e^{r/lambda} when the noising is memoryless (theory.md, section 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ctrl import check
from ctrl.check import Array


@dataclass(frozen=True, eq=False)
class Yardstick:
    r"""Optimal objective, reward and KL at one kl_weight, estimated from pre-trained samples by self-normalised weights.

        J* = lambda (logsumexp(r/lambda) - log n),      s.e. = lambda sd(w)/sqrt(n),      ESS = n^2 / sum w^2   (mean of w is 1)

    objective, reward (reward units), kl (nats), each with its standard error by the delta method; ess : of n samples
    weights : (n,), summing to n.   Regret of a model is objective - J(model): nats times kl_weight, that is reward units.
    Assumes a memoryless noising; a bound for every chain up to O(D).   Bias O(1/ESS): distrust it below an ESS of about 50.
    Source: theory.md, section 9.   Checked: tests/test_torch_yardstick.py::test_yardstick_is_the_exact_tilt
    """

    kl_weight: float
    objective: float
    objective_error: float
    reward: float
    reward_error: float
    kl: float
    kl_error: float
    ess: float
    weights: Array

    def mean(self, values: ArrayLike) -> float:
        """The optimum's expectation of anything known per sample, (n,): for instance the share that a judge accepts."""
        values = check.array("values", values, (len(self.weights),), f"({len(self.weights)},)")
        return float(np.mean(self.weights * values))


def yardstick(rewards: ArrayLike, kl_weight: float) -> Yardstick:
    r"""The optimum's numbers from the rewards (n,) of samples of the pre-trained model.

    Source: theory.md, section 9.   Checked: tests/test_torch_yardstick.py::test_yardstick_is_the_exact_tilt
    """
    r = check.array("rewards", rewards, (None,), "(n,)")
    kl_weight = check.number("kl_weight", kl_weight, above=0)
    if len(r) < 2:
        raise ValueError(f"rewards: expected at least 2 samples, got {len(r)}")
    n, scaled = len(r), r / kl_weight
    level = float(logsumexp(scaled) - np.log(n))
    w = np.exp(scaled - level)
    reward = float(np.mean(w * r))
    # Influence functions: J* = lambda log mean e^{r/lambda}, E*[r] = mean(w r), KL* = (E*[r] - J*)/lambda.
    on_objective, on_reward = kl_weight * (w - 1), w * (r - reward)
    errors = [float(np.std(f, ddof=1) / np.sqrt(n)) for f in (on_objective, on_reward, (on_reward - on_objective) / kl_weight)]
    return Yardstick(kl_weight, kl_weight * level, errors[0], reward, errors[1], (reward - kl_weight * level) / kl_weight, errors[2],
                     n / float(np.mean(w**2)), w)


def ideal_frontier(rewards: ArrayLike, kl_weights: Sequence[float]) -> list[Yardstick]:
    r"""The ideal reward-KL frontier: no model at KL* nats has more reward than E*[r]; its slope dE*[r]/dKL* is kl_weight.

    Source: theory.md, section 9 (envelope).   Checked: tests/test_torch_yardstick.py::test_frontier_has_slope_lambda
    """
    return [yardstick(rewards, kl_weight) for kl_weight in kl_weights]
