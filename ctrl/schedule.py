r"""Forward noising and the one clock (theory.md, section 1).

    dY = f(tau) Y dtau + g(tau) dW,      Y_tau | Y_0 ~ N(alpha Y_0, v I),   alpha = exp int f,   v = alpha^2 int g^2 / alpha^2

tau in [0, T] is noise time (tau = 0 is data); t = T - tau is generation time. Only this module converts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Generation times 0 = t_0 < ... < t_N; D_i = t_{i+1} - t_i.

    times : (N + 1,)   horizon units
    Source: theory.md, section 1.   Checked: tests/test_schedule.py::test_time_grid
    """

    times: Array

    def __init__(self, times: ArrayLike) -> None:
        t = check.array("times", times, (None,), "(N + 1,)")
        if t.size < 2:
            raise ValueError(f"times: expected at least two times (one step), got {t.size}")
        if np.any(np.diff(t) <= 0):
            where = int(np.argmax(np.diff(t) <= 0))
            raise ValueError(f"times: expected strictly increasing times, got {t[where]:.6g} before {t[where + 1]:.6g}")
        if t[0] != 0.0:
            raise ValueError(f"times: expected the first time to be 0, got {t[0]:.6g}")
        object.__setattr__(self, "times", t)

    @classmethod
    def uniform(cls, steps: int, horizon: float) -> TimeGrid:
        """N equal steps on [0, T]."""
        steps = check.integer("steps", steps, at_least=1)
        return cls(np.linspace(0.0, check.number("horizon", horizon, above=0), steps + 1))

    @property
    def steps(self) -> int:
        return int(self.times.size - 1)

    @cached_property
    def dt(self) -> Array:
        """Step lengths D_i, (N,)."""
        return np.diff(self.times)

    def coarsened(self, factor: int) -> TimeGrid:
        """Every `factor`-th time; the number of steps must be divisible."""
        factor = check.integer("factor", factor, at_least=1)
        if self.steps % factor:
            raise ValueError(f"factor: expected a divisor of {self.steps} steps, got {factor}")
        return TimeGrid(self.times[::factor])


@dataclass(frozen=True, eq=False)
class Coefficients:
    r"""The generation SDE's coefficients at the left points of a grid, all shape (N,).

        X_{i+1} = X_i + ( -f_i X_i + h_i a_i ) D_i + noise_i xi_i,     h = (1 + eta^2)/2 g^2,   noise = eta g sqrt(D)
        kappa = h^2 / (2 eta^2 g^2)  (eta > 0: a KL rate),   kappa = g^2 / 2  (eta = 0: a penalty)

    Source: theory.md, section 1.   Checked: tests/test_schedule.py::test_coefficients
    """

    dt: Array
    f: Array
    g2: Array
    h: Array
    kappa: Array
    noise: Array
    discount: Array
    final_discount: float


@dataclass(frozen=True)
class Schedule(ABC):
    """A noising schedule: f, g^2, alpha and v as functions of noise time tau in [0, horizon]."""

    @property
    @abstractmethod
    def horizon(self) -> float: ...

    @abstractmethod
    def f(self, tau: float) -> float:
        """Linear drift rate, 1/time."""

    @abstractmethod
    def g2(self, tau: float) -> float:
        """Squared volatility g^2, state^2/time."""

    @abstractmethod
    def alpha(self, tau: float) -> float:
        """Signal factor exp(int_0^tau f)."""

    @abstractmethod
    def v(self, tau: float) -> float:
        """Noise variance of Y_tau given Y_0."""

    @property
    def prior_variance(self) -> float:
        """Variance of the start law "prior": 1 for VP, OU and sub-VP."""
        return 1.0

    def tau(self, t: float) -> float:
        """THE CLOCK: noise time of generation time t, horizon - t, never below 0 by rounding."""
        return max(0.0, self.horizon - float(t))

    def t(self, tau: float) -> float:
        """THE CLOCK, the other way: generation time of noise time tau."""
        return max(0.0, self.horizon - float(tau))

    def rates(self, t: float, eta: float) -> tuple[float, float, float, float]:
        """(f, g^2, h, kappa) at generation time t; kappa = (1+eta^2)^2 g^2 / (8 eta^2), written without the 0/0 at g = 0."""
        tau = self.tau(t)
        g2 = self.g2(tau)
        h = 0.5 * (1 + eta**2) * g2
        kappa = (1 + eta**2) ** 2 / (8 * eta**2) * g2 if eta > 0 else 0.5 * g2
        return self.f(tau), g2, h, kappa

    def coefficients(self, grid: TimeGrid, eta: float, discount_rate: float) -> Coefficients:
        """Left-point coefficients on a grid."""
        f, g2, h, kappa = (np.array(c) for c in zip(*(self.rates(t, eta) for t in grid.times[:-1]), strict=True))
        discount = np.exp(-discount_rate * grid.times)
        return Coefficients(grid.dt, f, g2, h, kappa, eta * np.sqrt(g2 * grid.dt), discount[:-1], float(discount[-1]))


@dataclass(frozen=True)
class VP(Schedule):
    r"""Variance preserving: f = -beta/2, g^2 = beta, beta(tau) linear from beta_min to beta_max.

        alpha = exp(-B/2),  v = 1 - alpha^2,  B(tau) = int_0^tau beta

    Source: Song et al. (2011.13456), section 3.4.   Checked: tests/test_schedule.py::test_closed_forms_solve_their_odes
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta_min", check.number("beta_min", self.beta_min, above=0))
        object.__setattr__(self, "beta_max", check.number("beta_max", self.beta_max, above=0))
        object.__setattr__(self, "horizon", check.number("horizon", self.horizon, above=0))

    def beta(self, tau: float) -> float:
        return self.beta_min + (self.beta_max - self.beta_min) * tau / self.horizon

    def integral(self, tau: float) -> float:
        """B(tau) = int_0^tau beta."""
        return self.beta_min * tau + 0.5 * (self.beta_max - self.beta_min) * tau**2 / self.horizon

    def f(self, tau: float) -> float:
        return -0.5 * self.beta(tau)

    def g2(self, tau: float) -> float:
        return self.beta(tau)

    def alpha(self, tau: float) -> float:
        return float(np.exp(-0.5 * self.integral(tau)))

    def v(self, tau: float) -> float:
        return float(-np.expm1(-self.integral(tau)))


@dataclass(frozen=True)
class SubVP(VP):
    r"""Sub-variance preserving: f = -beta/2, g^2 = beta (1 - exp(-2B)), v = (1 - exp(-B))^2.

    Source: Song et al. (2011.13456), section 3.4.   Checked: tests/test_schedule.py::test_closed_forms_solve_their_odes
    """

    def g2(self, tau: float) -> float:
        return float(-self.beta(tau) * np.expm1(-2 * self.integral(tau)))

    def v(self, tau: float) -> float:
        return float(np.expm1(-self.integral(tau)) ** 2)


@dataclass(frozen=True)
class OU(Schedule):
    r"""Ornstein-Uhlenbeck: VP with constant beta; f = -beta/2, g^2 = beta, alpha = exp(-beta tau/2).

    Source: theory.md, section 1.   Checked: tests/test_schedule.py::test_closed_forms_solve_their_odes
    """

    beta: float = 1.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", check.number("beta", self.beta, above=0))
        object.__setattr__(self, "horizon", check.number("horizon", self.horizon, above=0))

    def f(self, tau: float) -> float:
        return -0.5 * self.beta

    def g2(self, tau: float) -> float:
        return self.beta

    def alpha(self, tau: float) -> float:
        return float(np.exp(-0.5 * self.beta * tau))

    def v(self, tau: float) -> float:
        return float(-np.expm1(-self.beta * tau))


@dataclass(frozen=True)
class VE(Schedule):
    r"""Variance exploding: f = 0, sigma(tau) = sigma_min (sigma_max/sigma_min)^(tau/T), g^2 = d sigma^2/dtau.

        alpha = 1,  v = sigma^2(tau) - sigma^2(0);  start law "prior" is N(0, v(T) I)

    Source: Song et al. (2011.13456), section 3.4.   Checked: tests/test_schedule.py::test_closed_forms_solve_their_odes
    """

    sigma_min: float = 0.01
    sigma_max: float = 10.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma_min", check.number("sigma_min", self.sigma_min, above=0))
        object.__setattr__(self, "sigma_max", check.number("sigma_max", self.sigma_max, above=self.sigma_min))
        object.__setattr__(self, "horizon", check.number("horizon", self.horizon, above=0))

    @property
    def log_ratio(self) -> float:
        return float(np.log(self.sigma_max / self.sigma_min))

    @property
    def prior_variance(self) -> float:
        return self.v(self.horizon)

    def f(self, tau: float) -> float:
        return 0.0

    def g2(self, tau: float) -> float:
        return 2 * self.log_ratio / self.horizon * self.sigma_min**2 * float(np.exp(2 * self.log_ratio * tau / self.horizon))

    def alpha(self, tau: float) -> float:
        return 1.0

    def v(self, tau: float) -> float:
        return self.sigma_min**2 * float(np.expm1(2 * self.log_ratio * tau / self.horizon))

    def geometric_grid(self, steps: int, sigma_first: float | None = None) -> TimeGrid:
        r"""Steps of equal ratio in sigma(tau) - sigma(0): the VE chain needs them (theory.md, section 2).

            sigma(tau_i) - sigma(0) decreases geometrically down to `sigma_first` (default sigma_min / 10); the last step ends at data.
        """
        steps = check.integer("steps", steps, at_least=2)
        low = self.sigma_min * 0.1 if sigma_first is None else check.number("sigma_first", sigma_first, above=0)
        if low >= self.sigma_max - self.sigma_min:
            raise ValueError(f"sigma_first: expected less than sigma_max - sigma_min = {self.sigma_max - self.sigma_min:g}, got {low:g}")
        gap = np.geomspace(self.sigma_max - self.sigma_min, low, steps)
        tau = self.horizon * np.log1p(gap / self.sigma_min) / self.log_ratio
        return TimeGrid(np.concatenate([[0.0], [self.t(x) for x in tau[1:]], [self.horizon]]))
