r"""The DDIM step on tensors: the sampler of image models, with its own stochasticity ddim_eta, beside the Euler chain of the rest.

    x_prev = mean + std xi,     std^2 = ddim_eta^2 (v'/v) (1 - alpha^2/alpha'^2)
    mean = alpha' x0_hat + sqrt(v' - std^2) eps,     x0_hat = (x - sqrt(v) eps)/alpha        (alpha', v' at t_prev)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, log, pi, sqrt

import torch
from torch import Tensor

from ctrl import check
from ctrl.schedule import DiscreteVP


@dataclass(frozen=True, eq=False)
class DDIM:
    r"""One step of DDIM from timestep t to t_prev, as a Gaussian kernel; ddim_eta = 1 is DDPM's posterior step, 0 the deterministic sampler.

        x_prev | x ~ N( alpha'/alpha x + c eps, std^2 I ),     c = sqrt(v' - std^2) - alpha'/alpha sqrt(v)

    x, eps, noise, x_prev : (n, *shape); eps is the network's noise prediction, -sqrt(v) times an action
    t > t_prev >= -1 : timesteps of diffusers, real-valued; -1 is data (its set_alpha_to_one=True), 0 stands for set_alpha_to_one=False
    Everything is computed in float32 at least: a state in half precision would bury the noise of a small step.

    Beside the Euler chain X + (-f X + h a) D + eta g sqrt(D) xi with eta = ddim_eta, a = -eps/sqrt(v) and D = tau - tau', at fixed tau > 0, x, eps:

        mean - Euler's mean = O(D^2),      std/(eta g sqrt(D)) = 1 - D/2 ( beta/2 + beta'/(2 beta) + beta alpha^2/v ) + O(D^2)

    for every ddim_eta in [0, 1]: std differs by O(D^{3/2}), and ddim_eta = 1 is the reverse SDE, 0 the probability-flow ODE. Near data the
    remainders grow like D/v, and the step to data has std 0 where Euler has eta g sqrt(D). With the exact score of Gaussian data N(m, C) started
    at p_T the mean of the whole chain is exact; on a uniform grid down to data its covariance is C - (1 + ddim_eta^2)^2/4 beta(0) D log(1/D) I
    + O(D), where Euler's chain has O(D): order 1 up to the logarithm, and order 1 on grids that stop at a fixed tau > 0.
    Source: DDIM (2010.02502), equations 12 and 16; expansions derived here.   Checked: tests/test_torch_ddim.py::test_step_is_that_of_diffusers,
    tests/test_torch_ddim.py::test_one_step_beside_euler, tests/test_torch_ddim.py::test_law_of_the_chain
    """

    schedule: DiscreteVP
    ddim_eta: float = 1.0

    def __post_init__(self) -> None:
        check.instance("schedule", self.schedule, DiscreteVP, "a DiscreteVP")
        object.__setattr__(self, "ddim_eta", check.number("ddim_eta", self.ddim_eta, at_least=0))
        if self.ddim_eta > 1:
            raise ValueError(f"ddim_eta: expected a number in [0, 1], got {self.ddim_eta:g}")

    def mean(self, x: Tensor, eps: Tensor, t: float, t_prev: float) -> Tensor:
        """E[x_prev | x], (n, *shape), float32 at least.

        Source: DDIM (2010.02502), equation 12.   Checked: tests/test_torch_ddim.py::test_step_is_that_of_diffusers
        """
        if x.shape != eps.shape:
            raise ValueError(f"eps: expected shape {tuple(x.shape)} like x, got {tuple(eps.shape)}")
        on_x, on_eps, _ = self._kernel(t, t_prev)
        return on_x * _precise(x) + on_eps * _precise(eps)

    def std(self, t: float, t_prev: float) -> float:
        """Standard deviation of x_prev given x, in every coordinate; 0 at ddim_eta = 0 and for the step to data.

        Source: DDIM (2010.02502), equation 16.   Checked: tests/test_torch_ddim.py::test_step_is_that_of_diffusers
        """
        return self._kernel(t, t_prev)[2]

    def step(self, x: Tensor, eps: Tensor, t: float, t_prev: float, noise: Tensor) -> Tensor:
        """x_prev = mean + std noise, (n, *shape), float32 at least.

        Source: DDIM (2010.02502), equation 12.   Checked: tests/test_torch_ddim.py::test_step_is_that_of_diffusers
        """
        if x.shape != noise.shape:
            raise ValueError(f"noise: expected shape {tuple(x.shape)} like x, got {tuple(noise.shape)}")
        return self.mean(x, eps, t, t_prev) + self.std(t, t_prev) * _precise(noise)

    def log_prob(self, x_prev: Tensor, x: Tensor, eps: Tensor, t: float, t_prev: float) -> Tensor:
        r"""log p(x_prev | x), (n,), nats per state: the sum over its coordinates, not their mean.

            -1/2 |x_prev - mean|^2/std^2 - d/2 log(2 pi std^2)

        Differentiable in all three; ValueError where std = 0 (ddim_eta = 0, or the step to data), where there is no density.
        Source: DDIM (2010.02502), equation 12.   Checked: tests/test_torch_ddim.py::test_log_prob_is_the_sum
        """
        if x_prev.shape != x.shape:
            raise ValueError(f"x_prev: expected shape {tuple(x.shape)} like x, got {tuple(x_prev.shape)}")
        if (std := self.std(t, t_prev)) == 0:
            raise ValueError(f"ddim_eta: expected a step that adds noise for a log-density, got ddim_eta = {self.ddim_eta:g} "
                             f"from timestep {t:g} to {t_prev:g}")
        z = ((_precise(x_prev) - self.mean(x, eps, t, t_prev)) / std).flatten(1)
        return -0.5 * z.square().sum(1) - z.shape[1] * (log(std) + 0.5 * log(2 * pi))

    def _kernel(self, t: float, t_prev: float) -> tuple[float, float, float]:
        """The weights of x and eps in the mean, and std; 1 - alpha^2 and v' - std^2 without cancellation."""
        if not (-1 <= t_prev <= t and -1 < t <= self.schedule.betas.size - 1):  # also refuses NaN
            raise ValueError(f"t_prev: expected -1 <= t_prev <= t and -1 < t <= {self.schedule.betas.size - 1}, got {t_prev} after t = {t}")
        B, B_prev = (self.schedule.integral(self.schedule.noise_time(float(s))) for s in (t, t_prev))
        v, v_prev, drop = -expm1(-B), -expm1(-B_prev), -expm1(B_prev - B)
        deterministic = (1 - self.ddim_eta**2) * v_prev + self.ddim_eta**2 * v_prev**2 * (1 - drop) / v  # v' - std^2
        growth = exp(0.5 * (B - B_prev))
        return growth, sqrt(deterministic) - growth * sqrt(v), self.ddim_eta * sqrt(v_prev * drop / v)


def _precise(x: Tensor) -> Tensor:
    """At least single precision."""
    return x if x.dtype == torch.float64 else x.float()
