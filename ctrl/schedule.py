r"""Forward noising and the one clock (theory.md, section 1).

    dY = f(tau) Y dtau + g(tau) dW,      Y_tau | Y_0 ~ N(alpha Y_0, v I),   alpha = exp int f,   v = alpha^2 int g^2 / alpha^2

tau in [0, T] is noise time (tau = 0 is data); t = T - tau is generation time. Only this module converts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class FlowMatching(Schedule):
    r"""Straight paths from data to noise (rectified flow): Y_tau = (1 - tau) Y_0 + tau eps, with tau the models' sigma.

        alpha = 1 - tau,   v = tau^2,   f = -1/(1 - tau),   g^2 = 2 tau/(1 - tau);      the start law "prior" is N(0, v(T) I)

    horizon T < 1: at tau = 1 nothing is left of the data, f and g are infinite, and only eta = 0, the flow itself, would have a limit. An Euler
    step at eta > 0 is stable while D < 2 (1 - tau)/eta^2: `grid` begins with steps in proportion to 1 - tau.
    Source: Lipman et al. (2210.02747); Liu et al. (2209.03003); Esser et al. (2403.03206).
    Checked: tests/test_schedule.py::test_closed_forms_solve_their_odes
    """

    horizon: float = 0.98

    def __post_init__(self) -> None:
        object.__setattr__(self, "horizon", check.number("horizon", self.horizon, above=0))
        if self.horizon >= 1:
            raise ValueError(f"horizon: expected less than 1, where the noise would be infinite, got {self.horizon:g}")

    @property
    def prior_variance(self) -> float:
        return self.v(self.horizon)

    def f(self, tau: float) -> float:
        return -1 / (1 - tau)

    def g2(self, tau: float) -> float:
        return 2 * tau / (1 - tau)

    def alpha(self, tau: float) -> float:
        return 1 - tau

    def v(self, tau: float) -> float:
        return tau**2

    def grid(self, steps: int, last: float = 1e-3) -> TimeGrid:
        r"""Equal steps of log(tau/(1 - tau)), half the log of the noise-to-signal ratio, from the horizon to `last`.

        Source: Esser et al. (2403.03206), section 3.   Checked: tests/test_schedule.py::test_flow_grid
        """
        steps, last = check.integer("steps", steps, at_least=1), check.number("last", last, above=0)
        if last >= self.horizon:
            raise ValueError(f"last: expected less than the horizon {self.horizon:g}, got {last:g}")
        logit = np.linspace(np.log(self.horizon / (1 - self.horizon)), np.log(last / (1 - last)), steps + 1)
        return TimeGrid(np.concatenate([[0.0], [self.t(tau) for tau in 1 / (1 + np.exp(-logit[1:]))]]))


class _Nodes(NamedTuple):
    """B and beta = dB/dtau at the nodes, (K + 1,), and B's slope over each cell, (K,)."""

    B: Array
    beta: Array
    slope: Array


@dataclass(frozen=True, eq=False)
class DiscreteVP(Schedule):
    r"""A DDPM schedule of K discrete steps in continuous noise time: f = -beta/2, g^2 = beta, as diffusers' schedulers have it.

        B(tau_k) = -sum_{j<k} log(1 - beta_j),   tau_k = T k / K,   k = 0..K,       alpha = exp(-B/2),  v = 1 - alpha^2

    Timestep t of diffusers is tau = T (t + 1)/K, where alpha^2 = alphas_cumprod[t]; timestep -1 is data. Between the nodes B is the cubic
    spline (beta = dB/dtau is C^1), its node slopes held within [1/2, 2] times the lesser slope of the cells beside: beta > 0 for any betas,
    and still continuous where rough ones meet the bounds.

    betas : (K,), in (0, 1), K >= 2
    Source: DDPM (2006.11239), equation 4, and Song et al. (2011.13456), appendix B; bounds as in Hyman, SIAM J. Sci. Stat.
    Comput. 4 (1983).   Checked: tests/test_schedule.py::test_discrete_nodes, tests/test_schedule.py::test_discrete_rate_is_positive_and_continuous
    """

    betas: Array
    horizon: float = 1.0

    def __init__(self, betas: ArrayLike, horizon: float = 1.0) -> None:
        b = check.array("betas", betas, (None,), "(K,)")
        if b.size < 2:
            raise ValueError(f"betas: expected at least two, got {b.size}")
        if np.any(bad := (b <= 0) | (b >= 1)):
            raise ValueError(f"betas: expected numbers in (0, 1), got {b[np.argmax(bad)]:.6g} at index {np.argmax(bad)}")
        object.__setattr__(self, "betas", b)
        object.__setattr__(self, "horizon", check.number("horizon", horizon, above=0))

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, horizon: float = 1.0) -> DiscreteVP:
        """Betas in equal steps: diffusers' "linear" (DDPM), close to VP(0.1, 20).

        Source: DDPM (2006.11239), section 4.   Checked: tests/test_schedule.py::test_discrete_betas_are_those_of_diffusers
        """
        return cls(np.linspace(beta_start, beta_end, check.integer("steps", steps, at_least=2)), horizon)

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, horizon: float = 1.0) -> DiscreteVP:
        """Square roots of betas in equal steps: diffusers' "scaled_linear" (Stable Diffusion).

        Source: diffusers, DDPMScheduler.   Checked: tests/test_schedule.py::test_discrete_betas_are_those_of_diffusers
        """
        low, high = (check.number(name, b, above=0) ** 0.5 for name, b in (("beta_start", beta_start), ("beta_end", beta_end)))
        return cls(np.linspace(low, high, check.integer("steps", steps, at_least=2)) ** 2, horizon)

    @classmethod
    def squaredcos(cls, steps: int = 1000, horizon: float = 1.0) -> DiscreteVP:
        r"""The cosine schedule, alphas_cumprod ~ cos^2(pi/2 (s + .008)/1.008), betas capped at .999: diffusers' "squaredcos_cap_v2".

        Source: Nichol and Dhariwal (2102.09672), equation 17.   Checked: tests/test_schedule.py::test_discrete_betas_are_those_of_diffusers
        """
        s = np.linspace(0.0, 1.0, check.integer("steps", steps, at_least=2) + 1)
        kept = np.cos(0.5 * np.pi * (s + 0.008) / 1.008) ** 2
        return cls(np.minimum(1 - kept[1:] / kept[:-1], 0.999), horizon)

    @classmethod
    def of(cls, scheduler: Any, horizon: float = 1.0) -> DiscreteVP:
        """The schedule of a diffusers scheduler, or of anything with alphas_cumprod (K,).

        alpha and v are as stored; single precision there leaves noise of up to 1e-7 / beta_k (relative) in f and g^2, which slows exact.limit.
        Source: diffusers, SchedulerMixin.   Checked: tests/test_schedule.py::test_discrete_schedule_of_a_scheduler
        """
        if (kept := getattr(scheduler, "alphas_cumprod", None)) is None:
            raise ValueError(f"scheduler: expected a variance-preserving scheduler with alphas_cumprod, got {type(scheduler).__name__}")
        kept = check.array("scheduler", _on_host(kept), (None,), "(K,) in alphas_cumprod")
        if np.any(kept <= 0) or np.any(np.diff(kept, prepend=1.0) >= 0):
            raise ValueError("scheduler: expected alphas_cumprod strictly decreasing in (0, 1) (zero terminal SNR has no reverse SDE), "
                             f"got values in [{np.min(kept, initial=1):.6g}, {np.max(kept, initial=0):.6g}]")
        return cls(-np.expm1(np.diff(np.log(kept), prepend=0.0)), horizon)

    def until(self, timestep: int) -> DiscreteVP:
        """The same schedule with horizon at `timestep`: where diffusers starts when timesteps[0] < K - 1; beta moves in the last cells only.

        Source: theory.md, section 1.   Checked: tests/test_schedule.py::test_discrete_grid
        """
        kept = check.integer("timestep", timestep, at_least=1) + 1
        if kept > self.betas.size:
            raise ValueError(f"timestep: expected at most {self.betas.size - 1}, got {timestep}")
        return DiscreteVP(self.betas[:kept], self.horizon * (kept / self.betas.size))

    def timestep(self, tau: float) -> float:
        """The network's time: diffusers' timestep at noise time tau, real-valued; -1 is data."""
        return self.betas.size * tau / self.horizon - 1

    def noise_time(self, timestep: float) -> float:
        """tau of a timestep in [-1, K - 1], real-valued: T (t + 1)/K."""
        return self.horizon * ((timestep + 1) / self.betas.size)

    def grid(self, timesteps: ArrayLike, last: float = -1) -> TimeGrid:
        """Generation times of decreasing timesteps and a last one: N steps from timesteps[0] = K - 1 (else see `until`) to `last`.

        last = -1 ends at data (diffusers' set_alpha_to_one=True), last = 0 at alphas_cumprod[0] (set_alpha_to_one=False). Each step ends where
        the next begins; diffusers' own DDIM moves by K // N instead, which is the same for "leading", and for "trailing" if N divides K.
        Source: diffusers, DDIMScheduler.set_timesteps.   Checked: tests/test_schedule.py::test_discrete_grid
        """
        at = check.array("timesteps", _on_host(timesteps), (None,), "(N,)")
        at = np.append(at, check.number("last", last, at_least=-1))
        if at[0] != self.betas.size - 1:
            raise ValueError(f"timesteps: expected the first to be {self.betas.size - 1} (shorten the schedule by until), got {at[0]:g}")
        if np.any(rises := np.diff(at) >= 0):
            where = int(np.argmax(rises))
            raise ValueError(f"timesteps: expected strictly decreasing down to {last:g}, got {at[where]:g} before {at[where + 1]:g}")
        return TimeGrid([self.t(self.noise_time(s)) for s in at])

    @cached_property
    def _nodes(self) -> _Nodes:
        from scipy.interpolate import CubicSpline

        rise, nodes = -np.log1p(-self.betas), np.linspace(0.0, self.horizon, self.betas.size + 1)
        B, slope = np.append(0.0, np.cumsum(rise)), rise * (self.betas.size / self.horizon)
        beside = np.pad(slope, 1, mode="edge")
        least = np.minimum(beside[:-1], beside[1:])
        return _Nodes(B, np.clip(CubicSpline(nodes, B)(nodes, 1), 0.5 * least, 2 * least), slope)

    def _cell(self, tau: float) -> tuple[float, float, float, float, float]:
        """B at the left of tau's cell, beta's Bernstein coefficients there (left, middle, right), and the position u in [0, 1]."""
        at = tau * self.betas.size / self.horizon
        k = min(max(int(at), 0), self.betas.size - 1)
        (left, right), slope = self._nodes.beta[k : k + 2], self._nodes.slope[k]
        return self._nodes.B[k], left, 3 * slope - left - right, right, at - k

    def beta(self, tau: float) -> float:
        _, left, middle, right, u = self._cell(tau)
        return float((1 - u) ** 2 * left + 2 * u * (1 - u) * middle + u**2 * right)

    def integral(self, tau: float) -> float:
        """B(tau) = int_0^tau beta."""
        B, left, middle, right, u = self._cell(tau)
        mean = (1 - u + u**2 / 3) * left + (u - 2 * u**2 / 3) * middle + u**2 / 3 * right
        return float(B + mean * u * self.horizon / self.betas.size)

    def f(self, tau: float) -> float:
        return -0.5 * self.beta(tau)

    def g2(self, tau: float) -> float:
        return self.beta(tau)

    def alpha(self, tau: float) -> float:
        return float(np.exp(-0.5 * self.integral(tau)))

    def v(self, tau: float) -> float:
        return float(-np.expm1(-self.integral(tau)))


def _on_host(values: Any) -> Any:
    """A tensor brought to the CPU; anything else as it is."""
    return values.cpu() if hasattr(values, "cpu") else values
