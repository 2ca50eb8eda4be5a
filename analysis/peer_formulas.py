r"""Wrong formulas that trainers use, on a chain whose truth is known: the size of each error over N = 5 ... 100 and d = 1 ... 16384.

    python -m analysis.peer_formulas [--quick] [--workers 2]      10 s on one core; --quick 7 s

Each formula of theory.md's sections 4 and 7 is a KL or a gradient with an error that people really make (several public trainers ship a KL that lacks
its time step, a log-density averaged over dimensions, or a KL without a gradient). Two numbers say how large it is, both exact, nothing sampled:

    number     what it takes for the path KL, over the path KL (nats)
    gradient   |E G - grad J| / |grad J| and the cosine of E G with grad J;  for a KL, G is the gradient of  E r - lambda (what it takes for the KL)

The problem is a product of d equal coordinates: VP(.1, 10), data N(1, .6), r = -1/2 (x + 1/2)^2, lambda = 1/2, the policy 1.1 K_pre x + k_pre - .3,
and theta = (scale, shift) shared by all of them: most of the way to the best of its class, where grad E r and lambda grad KL are of one size. J, the
KL and grad J are d times those of one coordinate, so that one coordinate's chain is enough for every d; what is not additive is the mean over
dimensions, the std of the reward and the ratio's clip, whose d is in their formulas. Clipped ratios have a problem of their own, linear in x, where
they are integrals over a line (`Pair`).

Grids are uniform, where one time step for all may hide in lambda what lacks it, and uneven, t = T(1 - (1 - i/N)^(3/2)), where it cannot.
Writes rows.csv, table.txt, env.json and figure.png; finished rows are kept in parts/, and a second call goes on there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import ctrl
import numpy as np
import pandas as pd
import tyro
from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import DDPO as PublishedDDPO
from ctrl.estimators import K1, K3, Analytic, ClippedRatio, Estimator, KLForm, Pathwise, RewardToGo, Run, StepKL
from ctrl.exact.chain import LinearChain
from ctrl.files import environment, writable, write_json, write_text
from ctrl.schedule import Coefficients
from ctrl.theorems import style
from ctrl.theorems.kl_estimators import LogRatio
from ctrl.theorems.path_kl import JointLaw
from ctrl.theorems.policy_gradient import (Distorted, LateActionReturn, LaterSteps, OwnMeanOfTwo, PeekingBaseline, g_for_h_over_eta_g, next_noise,
                                           without_root_dt)
from scipy.special import ndtr

from analysis.sweep import Pool, Row, sweep

SCALE, SHIFT, EXPLORATION = 1.1, -0.3, 0.4
OLD, NEW, SLOPE = -0.25, -0.3, -1.5  # shifts of the policy that drew the paths and of the one they serve; slope of the linear reward
REACH, NODES = 12.0, 400  # standard deviations, and Gauss-Legendre nodes, of an integral over one normal
ETAS, SPACINGS = (1.0, 0.5), ("uniform", "uneven")


# ---------------------------------------------------------------------------------------------- the truth


def product(dim: int, eta: float, slope: float | None = None) -> ctrl.Problem:
    """d equal and independent coordinates; the reward linear where it has a slope."""
    reward = ctrl.QuadraticReward(np.eye(dim), np.full(dim, -0.5)) if slope is None else ctrl.LinearReward(np.full(dim, slope))
    data = ctrl.Gaussian(np.ones(dim), 0.6 * np.eye(dim))
    return ctrl.Problem(ctrl.VP(beta_min=0.1, beta_max=10.0, horizon=1.0), data, reward, kl_weight=0.5, eta=eta)


def scaled(problem: ctrl.Problem, sampled: bool = False) -> ctrl.BasisPolicy:
    """mu = 1.1 K_pre x + k_pre - .3, in every coordinate; theta = (scale, d shifts)."""
    return ctrl.BasisPolicy.scaled(problem, SCALE, np.full(problem.dim, SHIFT), EXPLORATION * np.eye(problem.dim) if sampled else None)


def spaced(spacing: str, steps: int, horizon: float) -> ctrl.TimeGrid:
    """t_i = T i/N, or T(1 - (1 - i/N)^(3/2)), whose steps are shorter near data."""
    u = np.linspace(0.0, 1.0, steps + 1)
    return ctrl.TimeGrid(horizon * (u if spacing == "uniform" else 1 - (1 - u) ** 1.5))


def noise_variance(problem: ctrl.Problem, grid: ctrl.TimeGrid) -> Array:
    """v at the left points, (N,): |eps - eps_ref|^2 = v |a - s|^2."""
    return np.array([problem.schedule.v(problem.schedule.tau(float(t))) for t in grid.times[:-1]])


@dataclass(frozen=True, eq=False)
class Coordinate:
    r"""One coordinate's chain: moments, their slopes in theta = (scale, shift), and the parts of the gradient at every step.

        T_i = D_i h_i E[ d mu_i grad V_{i+1}(X_{i+1}) ],     e_i = -2 lambda kappa_i D_i E[ d mu_i (mu_i - s_i) ],     grad J = sum_i T_i + e_i
    """

    problem: ctrl.Problem
    policy: ctrl.BasisPolicy
    grid: ctrl.TimeGrid

    @cached_property
    def chain(self) -> LinearChain:
        return LinearChain(self.problem, self.policy, self.grid)

    @cached_property
    def pretrained(self) -> LinearChain:
        return LinearChain(self.problem, self.problem.pretrained(self.grid), self.grid)

    @cached_property
    def truth(self) -> exact.Truth:
        return exact.evaluate(self.problem, self.policy, self.grid)

    @property
    def gradient(self) -> Array:
        """grad J, (2,)."""
        return self.truth.gradient.theta

    @cached_property
    def c(self) -> Coefficients:
        return self.problem.coefficients(self.grid)

    @cached_property
    def pre(self) -> tuple[Array, Array]:
        """s = K x + k, (N,) each."""
        parts = self.problem.pretrained(self.grid).parts(self.grid)
        assert parts is not None
        return parts.K[:, 0, 0], parts.k[:, 0]

    @cached_property
    def turn(self) -> tuple[Array, Array]:
        """d mu = turn x + turn', (N, 2) each: K_pre x for the scale and 1 for the shift."""
        one, none = np.ones(self.grid.steps), np.zeros(self.grid.steps)
        return np.stack([self.pre[0], none], axis=1), np.stack([none, one], axis=1)

    @property
    def departure(self) -> tuple[Array, Array]:
        """mu - s = B x + b, (N,) each."""
        dK, dk = self.chain.departure
        return dK[:, 0, 0], dk[:, 0]

    @cached_property
    def moments(self) -> tuple[Array, Array, Array, Array]:
        """Mean and variance of X_0 ... X_N, (N + 1,), and their slopes in theta, (N + 1, 2)."""
        (A, _), (m, P), gain = self.chain.maps, self.chain.moments, (self.c.dt * self.c.h)[:, None]
        m, P, A, dA, dc = m[:, 0], P[:, 0, 0], A[:, 0], gain * self.turn[0], gain * self.turn[1]
        dm, dP = np.zeros((len(m), 2)), np.zeros((len(m), 2))
        for i in range(self.grid.steps):
            dm[i + 1] = A[i] * dm[i] + dA[i] * m[i] + dc[i]
            dP[i + 1] = A[i] ** 2 * dP[i] + 2 * A[i] * dA[i] * P[i]
        return m, P, dm, dP

    @cached_property
    def reward_slope(self) -> Array:
        """grad E r, (2,)."""
        m, _, dm, dP = (v[-1] for v in self.moments)
        r = self.problem.reward.quadratic(1)
        assert r is not None
        return -r.matrix[0, 0] * (0.5 * dP + m * dm) + r.vector[0] * dm

    @cached_property
    def reward_std(self) -> float:
        """Of r(X_N) in one coordinate; sqrt(d) times it in d."""
        m, P, *_ = (v[-1] for v in self.moments)
        r = self.problem.reward.quadratic(1)
        assert r is not None
        q, b = r.matrix[0, 0], r.vector[0]
        return math.sqrt(0.5 * (q * P) ** 2 + P * (b - q * m) ** 2)

    def explicit(self, B: Array, b: Array, turn: tuple[Array, Array], at: LinearChain | None = None) -> Array:
        """d/dtheta E|B_i X_i + b_i|^2 at states that are held fixed, 2 E[(d B_i X_i + d b_i)(B_i X_i + b_i)], (N, 2)."""
        m, P = (at or self.chain).moments
        m, square = m[:-1], P[:-1, :, 0] + m[:-1] ** 2
        B, b, (dB, db) = B[:, None], b[:, None], turn
        return 2 * (B * dB * square + (B * db + b * dB) * m + b * db)

    def square(self, B: Array, b: Array, turn: tuple[Array, Array]) -> tuple[Array, Array]:
        """E|B_i X_i + b_i|^2, (N,), and its slope in theta, (N, 2), through B, b and through the states."""
        m, P, dm, dP = (v[:-1] for v in self.moments)
        value = B**2 * P + (B * m + b) ** 2
        return value, self.explicit(B, b, turn) + (B**2)[:, None] * dP + 2 * ((B * m + b) * B)[:, None] * dm

    @cached_property
    def squared(self) -> tuple[Array, Array]:
        """E|mu_i - s_i|^2, (N,), and its slope, (N, 2)."""
        return self.square(*self.departure, self.turn)

    @cached_property
    def e(self) -> Array:
        """(N, 2)."""
        return -(self.problem.kl_weight * self.c.kappa * self.c.dt)[:, None] * self.explicit(*self.departure, self.turn)

    @cached_property
    def T(self) -> Array:
        """(N, 2)."""
        S, w, _ = self.chain.values
        (A, c), (m, P, _, _) = self.chain.maps, self.moments
        return (self.c.dt * self.c.h)[:, None] * self.pulled(S[1:, 0, 0] * A[:, 0, 0], w[1:, 0] - S[1:, 0, 0] * c[:, 0], m[:-1], P[:-1])

    def pulled(self, slope: Array, level: Array, m: Array, P: Array) -> Array:
        """E[ d mu_i (level_i - slope_i X_i) ], (N, 2)."""
        slope, level, m, P = slope[:, None], level[:, None], m[:, None], P[:, None]
        return self.turn[0] * (level * m - slope * (P + m**2)) + self.turn[1] * (level - slope * m)


@dataclass(frozen=True, eq=False)
class Pair:
    r"""A policy s - .3 and the one that drew its paths, s - .25, with the linear reward -1.5 sum_j x_j: theta is their shared shift.

    Along (1, ..., 1)/sqrt(d) this is one coordinate whose ratio, reward and score are sqrt(d) times as large; across, nothing depends on theta. With
    z the step's noise along it and y what else the reward depends on, both standard normal and independent, and t = a z - a^2/2,

        log rho_i = t,      A_i ~ L_i z + R_i y,      a_i = h_i sqrt(D_i)/(eta g_i) (theta - theta_old) sqrt(d)
    """

    problem: ctrl.Problem
    grid: ctrl.TimeGrid

    @cached_property
    def truth(self) -> exact.Truth:
        return exact.evaluate(self.problem, ctrl.BasisPolicy.shift(self.problem, [NEW]), self.grid)

    @cached_property
    def c(self) -> Coefficients:
        return self.problem.coefficients(self.grid)

    @cached_property
    def gain(self) -> Array:
        """h_i sqrt(D_i)/(eta g_i), (N,)."""
        return self.c.h * self.c.dt / self.c.noise

    @cached_property
    def pull(self) -> float:
        """sum_i e_i."""
        return float(np.sum(-2 * self.problem.kl_weight * self.c.kappa * self.c.dt * NEW))

    @cached_property
    def advantage(self) -> tuple[Array, Array]:
        """L and R, (N,) each, in units of sqrt(d)."""
        chain = LinearChain(self.problem, ctrl.BasisPolicy.shift(self.problem, [OLD]), self.grid)
        A, variance = chain.maps[0][:, 0, 0], chain.moments[1][-1, 0, 0]
        L = SLOPE * np.append(np.cumprod(A[:0:-1])[::-1], 1.0) * self.c.noise
        return L, np.sqrt(SLOPE**2 * variance - L**2)

    def surrogate(self, d: int, power: float, clip: float | None) -> float:
        r"""The gradient of sum_i E_old min( rho^p A, clip(rho^p) A ) in the shared shift, over d: one integral over z for each step and sign of A.

            p h sqrt(D)/(eta g) E[ rho^p (z - a) A 1{ A > 0, rho^p <= 1 + clip  or  A < 0, rho^p >= 1 - clip } ]
        """
        a = self.gain * (NEW - OLD) * math.sqrt(d)
        sign, a, (L, R) = np.sign(a), np.abs(a), self.advantage
        high, low = (math.inf, -math.inf) if clip is None else (math.log1p(clip) / power, math.log1p(-clip) / power)
        # phi(z) rho^p = phi(z - p a) e^{(p^2 - p) a^2/2}; bounds are those of z - p a.
        upper, lower = (np.clip(t / a + (0.5 - power) * a, -REACH, REACH) for t in (high, low))
        weight = self.gain * power * np.exp(0.5 * (power**2 - power) * a**2)
        above = _normal_integral(np.full_like(a, -REACH), upper, power * a, a, sign * L, R)
        below = _normal_integral(lower, np.full_like(a, REACH), power * a, a, -sign * L, R)
        return float(np.sum(weight * sign * (above - below)))


def _normal_integral(lower: Array, upper: Array, shift: Array, a: Array, L: Array, R: Array) -> Array:
    """int phi(u) (z - a) E[ (L z + R y)_+ ] du over [lower, upper] with z = u + shift, (N,)."""
    nodes, weights = _legendre()
    u = 0.5 * (upper + lower) + 0.5 * (upper - lower) * nodes[:, None]
    z = u + shift
    ahead = L * z / R
    positive = R * (ahead * ndtr(ahead) + np.exp(-0.5 * ahead**2) / math.sqrt(2 * math.pi))
    return 0.5 * (upper - lower) * (weights @ (np.exp(-0.5 * u**2) / math.sqrt(2 * math.pi) * (z - a) * positive))


@lru_cache
def _legendre() -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(NODES)


@dataclass(frozen=True)
class Place:
    """Where a formula is tried: eta, the grid's spacing, N and d; the chains of one coordinate do not depend on d."""

    eta: float
    spacing: str
    steps: int
    dim: int

    @property
    def one(self) -> Coordinate:
        return _coordinate(self.eta, self.spacing, self.steps, False)

    @property
    def sampled(self) -> Coordinate:
        """The same with sampled actions, Sigma = .4."""
        return _coordinate(self.eta, self.spacing, self.steps, True)

    @property
    def pair(self) -> Pair:
        return _pair(self.eta, self.spacing, self.steps)


@lru_cache(maxsize=64)
def _coordinate(eta: float, spacing: str, steps: int, sampled: bool) -> Coordinate:
    problem = product(1, eta)
    return Coordinate(problem, scaled(problem, sampled), spaced(spacing, steps, problem.horizon))


@lru_cache(maxsize=64)
def _pair(eta: float, spacing: str, steps: int) -> Pair:
    problem = product(1, eta, SLOPE)
    return Pair(problem, spaced(spacing, steps, problem.horizon))


# ---------------------------------------------------------------------------------------------- formulas


class Formula(ABC):
    """A formula with its two numbers per coordinate; None where it has no such number.

    name : in tables      met : in which kind of trainer      hidden : where the error cannot be seen
    """

    name: ClassVar[str]
    met: ClassVar[str]
    hidden: ClassVar[str]

    def kl(self, at: Place) -> float | None:
        """What it takes for the path KL, over d; nats."""
        return None

    @abstractmethod
    def gradient(self, at: Place) -> Array | None:
        """E G over d, (2,), or (1,) on a `Pair`."""

    def target(self, at: Place) -> Array:
        """grad J over d."""
        return at.one.gradient

    @abstractmethod
    def estimator(self) -> Estimator | None:
        """The same formula on paths of any problem, an estimator whose mean over d `gradient` is; None where the library has none."""


@dataclass(frozen=True)
class Priced(StepKL):
    """lambda w_i |a_i - s_i|^2: what a weighted KL charges for a step, as a cost and as a loss on detached states."""

    form: WeightedKL

    def cost(self, run: Run) -> Array:
        return self._price(run) * np.sum(run.departure**2, axis=2)

    def pull(self, run: Run) -> Array:
        return -2 * self._price(run)[:, None] * run.departure

    def _price(self, run: Run) -> Array:
        w = self.form.weights(run.coefficients, noise_variance(run.problem, run.grid), run.problem.dim)
        return run.problem.kl_weight * w


class KLFormula(Formula):
    """What is taken for the path KL, and the gradient of E r - lambda times it."""

    @abstractmethod
    def slope(self, at: Place) -> Array:
        """The gradient of its KL over d, (2,)."""

    def gradient(self, at: Place) -> Array:
        return at.one.reward_slope - at.one.problem.kl_weight * self.slope(at)


class WeightedKL(KLFormula):
    """E sum_i w_i |mu_i - s_i|^2 for the path KL, differentiated as a whole: through the actions and through the states."""

    @abstractmethod
    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        """w_i in the place of kappa_i D_i, (N,)."""

    def kl(self, at: Place) -> float:
        return float(self._weights(at) @ at.one.squared[0])

    def slope(self, at: Place) -> Array:
        return self._weights(at) @ at.one.squared[1]

    def _weights(self, at: Place) -> Array:
        return self.weights(at.one.c, noise_variance(at.one.problem, at.one.grid), at.dim)

    def estimator(self) -> Estimator:
        return KLForm(Priced(self), Priced(self))


@dataclass(frozen=True)
class PathKL(WeightedKL):
    """Right: w = kappa D, kappa = h^2/(2 eta^2 g^2). No error in either number."""

    name = "path KL (right)"
    met = ""
    hidden = ""

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return c.kappa * c.dt


@dataclass(frozen=True)
class WholeRate(WeightedKL):
    """w = g^2 D, the 1/2 lost: 2 times the KL at eta = 1, 8 eta^2/(1 + eta^2)^2 times it else, whatever N and d."""

    name = "g² for g²/2"
    met = "a KL written by hand from the SDE"
    hidden = "one factor: lambda takes it up"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return c.g2 * c.dt


@dataclass(frozen=True)
class KeptRate(WeightedKL):
    """w = g^2/2 D at every eta: 4 eta^2/(1 + eta^2)^2 times the KL, whatever N and d."""

    name = "g²/2 at eta != 1"
    met = "a KL derived for the reverse SDE and kept for partly stochastic samplers"
    hidden = "eta = 1; else one factor"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return 0.5 * c.g2 * c.dt


@dataclass(frozen=True)
class StepLostInSum(WeightedKL):
    """w = kappa, the integral's dt lost: N/T times the KL on a uniform grid, a reweighting of steps on any other."""

    name = "D missing in the sum"
    met = "trainers that add the KL's rate over the steps (section 4)"
    hidden = "one N, one D: the factor N/T is in lambda; never when N changes"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return c.kappa


@dataclass(frozen=True)
class StepLostInVariance(WeightedKL):
    """w = kappa D^2, the step's variance taken for eta^2 g^2 and not eta^2 g^2 D: T/N times the KL on a uniform grid."""

    name = "D missing in the variance"
    met = "a published trainer (section 4): a gap of means of order D over a variance without D"
    hidden = "one N, one D: the factor T/N is in lambda; never when N changes"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return c.kappa * c.dt**2


@dataclass(frozen=True)
class DimensionMean(WeightedKL):
    """w = kappa D/d, a mean over dimensions for their sum: 1/d times the KL."""

    name = "mean over dimensions"
    met = "trainers that take the mean of a tensor over all but the batch"
    hidden = "d = 1; one d: the factor 1/d is in lambda"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return c.kappa * c.dt / d


@dataclass(frozen=True)
class WholeMean(WeightedKL):
    """w = kappa D/(N d), a mean over steps, too: 1/(N d) times the KL."""

    name = "mean over dimensions and steps"
    met = "the same, with a batch of single steps"
    hidden = "one N and one d: the factor 1/(N d) is in lambda"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return c.kappa * c.dt / (len(c.dt) * d)


@dataclass(frozen=True)
class FullLogSNR(WeightedKL):
    """w = 2 kappa D, the noise form weighted by the step of log-SNR and not by half of it: 2 times the KL."""

    name = "full log-SNR step"
    met = "published as 2 log(alpha/sigma) (section 4)"
    hidden = "one factor: lambda takes it up"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return 2 * c.kappa * c.dt


@dataclass(frozen=True)
class NoiseSpace(WeightedKL):
    """w = v, an unweighted sum of |eps - eps_ref|^2: steps near data count too little, and the sum grows like N."""

    name = "noise-space squared error"
    met = "trainers that hold the noise prediction to the reference's"
    hidden = "nowhere exactly: it weighs the steps otherwise"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return v


@dataclass(frozen=True)
class NoiseSpaceMean(WeightedKL):
    """w = v/(N d), the same as a mean over steps and dimensions: neither N nor D shows in it, but it shrinks like 1/d."""

    name = "noise-space MSE"
    met = "the mean squared difference of two noise predictions beside the trainer's loss"
    hidden = "nowhere exactly: it weighs the steps otherwise"

    def weights(self, c: Coefficients, v: Array, d: int) -> Array:
        return v / (len(v) * d)


@dataclass(frozen=True)
class ReferenceStates(KLFormula):
    """E_pre sum_i kappa_i D_i |mu_i - s_i|^2, the reverse KL: paths of the reference, so that its gradient has no states' part."""

    name = "reverse KL (states of the reference)"
    met = "a KL to the reference on its own samples, or on a data set"
    hidden = "a constant shift: mu - s and d mu do not depend on x"

    def kl(self, at: Place) -> float:
        (B, b), (m, P) = at.one.departure, at.one.pretrained.moments
        return float((at.one.c.kappa * at.one.c.dt) @ (B**2 * P[:-1, 0, 0] + (B * m[:-1, 0] + b) ** 2))

    def slope(self, at: Place) -> Array:
        return (at.one.c.kappa * at.one.c.dt) @ at.one.explicit(*at.one.departure, at.one.turn, at.one.pretrained)

    def estimator(self) -> None:
        return None


@dataclass(frozen=True)
class OtherEta(KLFormula):
    r"""The reference's density with another eta' = 1.1 eta: variances differ at every step, which costs about .009 N d nats.

        sum_i 1/2 d (q - 1 - log q) + D_i E|h_i mu_i - h_i' s_i|^2 / (2 eta'^2 g_i^2),      q = eta^2/eta'^2
    """

    name = "eta unlike the reference's, by 10 %"
    met = "a policy and a reference with schedulers of their own"
    hidden = "nowhere; what grows like N has no gradient"

    factor = 1.1

    def kl(self, at: Place) -> float:
        q = self.factor**-2
        return 0.5 * at.steps * (q - 1 - math.log(q)) + float(self._squares(at)[0].sum())

    def slope(self, at: Place) -> Array:
        return self._squares(at)[1].sum(axis=0)

    def _squares(self, at: Place) -> tuple[Array, Array]:
        one, (K, k) = at.one, at.one.pre
        h = replace(one.problem, eta=self.factor * at.eta).coefficients(one.grid).h
        w, (B, b), gain = 0.5 * one.c.dt / (self.factor**2 * at.eta**2 * one.c.g2), one.departure, one.c.h
        values, slopes = one.square(gain * B + (gain - h) * K, gain * b + (gain - h) * k, (gain[:, None] * one.turn[0], gain[:, None] * one.turn[1]))
        return w * values, w[:, None] * slopes

    def estimator(self) -> None:
        return None


@dataclass(frozen=True)
class SquaredLogRatio(Formula):
    """E k1^2/2 over whole paths, k1 their log-ratio: (Var k1 + KL^2)/2, so that it grows like d^2. As a loss its gradient is right."""

    name = "k2 of the path, as a number"
    met = "k2 reported as the KL"
    hidden = "small KL, where Var k1 is 2 KL; as a loss no error"

    def kl(self, at: Place) -> float:
        mean, variance = _log_ratio(at.eta, at.spacing, at.steps)
        return 0.5 * (variance + at.dim * mean**2)

    def gradient(self, at: Place) -> None:
        return None

    def estimator(self) -> None:
        return None


@lru_cache(maxsize=64)
def _log_ratio(eta: float, spacing: str, steps: int) -> tuple[float, float]:
    """Mean and variance of one coordinate's log-ratio."""
    one = _coordinate(eta, spacing, steps, False)
    mean, variance, *_ = LogRatio.between(JointLaw.of(one.chain), JointLaw.of(one.pretrained)).cumulants.tolist()
    return mean, variance


@dataclass(frozen=True)
class Complete(Formula):
    """Right: sum_i T_i + e_i, the reward-to-go estimator with the explicit gradient of the running cost. No error."""

    name = "policy gradient (right)"
    met = ""
    hidden = ""

    def gradient(self, at: Place) -> Array:
        return (at.one.T + at.one.e).sum(axis=0)

    def estimator(self) -> Estimator:
        return RewardToGo()


@dataclass(frozen=True)
class Folded(Formula):
    """(A) the cost in the return and no e_i: E G = sum T_i, off by sum e_i, whatever d."""

    name = "(A) KL folded into the reward"
    met = "trainers whose reward is r - lambda KL with the analytic KL"
    hidden = "mu = s (the start of training); lambda = 0"

    def gradient(self, at: Place) -> Array:
        return at.one.T.sum(axis=0)

    def estimator(self) -> Estimator:
        return KLForm(Analytic(), None)


@dataclass(frozen=True)
class StepLoss(Formula):
    """(B) e_i and the cost not in the return: E G = grad E r + sum e_i, off by what the policy does to the states, whatever d."""

    name = "(B) KL as a loss on detached states"
    met = "trainers that add the KL of the step to the policy loss"
    hidden = "mu - s constant in x (a constant shift); lambda = 0"

    def gradient(self, at: Place) -> Array:
        return at.one.reward_slope + at.one.e.sum(axis=0)

    def estimator(self) -> Estimator:
        return KLForm(None, Analytic())


@dataclass(frozen=True)
class NoKL(Formula):
    """(C) neither: E G = grad E r, whatever d."""

    name = "(C) KL without a gradient"
    met = "trainers whose KL carries no gradient"
    hidden = "mu = s (the start of training); lambda = 0"

    def gradient(self, at: Place) -> Array:
        return at.one.reward_slope

    def estimator(self) -> Estimator:
        return KLForm(None, None)


@dataclass(frozen=True)
class K1Loss(NoKL):
    """k1, the log-ratio, as a loss: its number is the KL and its gradient 0 in the mean, so that E G is that of (C)."""

    name = "k1 as a loss"
    met = "the difference of two log-densities in the loss"

    def kl(self, at: Place) -> float:
        return _log_ratio(at.eta, at.spacing, at.steps)[0]

    def estimator(self) -> Estimator:
        return KLForm(None, K1())


@dataclass(frozen=True)
class K3Loss(StepLoss):
    """k3 of each step as a loss, e^{-k1} - 1 + k1: its number is the KL in the mean, its gradient that of (B)."""

    name = "k3 of each step as a loss"
    met = "the estimate that is never negative, in the loss"

    def kl(self, at: Place) -> float:
        return _log_ratio(at.eta, at.spacing, at.steps)[0]

    def estimator(self) -> Estimator:
        return KLForm(None, K3())


@dataclass(frozen=True)
class RootLost(Formula):
    """h/(eta g) xi for h sqrt(D)/(eta g) xi, sqrt(D) missing from the score: sum T_i/sqrt(D_i) + e_i, sqrt(N/T) times the score's part."""

    name = "sqrt(D) missing from the score"
    met = "a log-density with the SDE's g for the step's std"
    hidden = "mu = s or lambda = 0: the scale alone"

    def gradient(self, at: Place) -> Array:
        return (at.one.T / np.sqrt(at.one.c.dt)[:, None] + at.one.e).sum(axis=0)

    def estimator(self) -> Estimator:
        return Distorted(noise_factor=without_root_dt)


@dataclass(frozen=True)
class LateNoise(Formula):
    """xi_{i+1} in the score of step i: the action is credited with the next one's noise, an error O(D) that only exact twins tell from none."""

    name = "noise of the next step"
    met = "an off-by-one between stored latents and timesteps"
    hidden = "large N: O(1/N), within sampling error"

    def gradient(self, at: Place) -> Array:
        one, n = at.one, at.steps
        (A, c), (S, w, _), (m, P, _, _) = one.chain.maps, one.chain.values, one.moments
        A, c, S, w = A[:, 0, 0], c[:, 0], S[:, 0, 0], w[:, 0]
        on, to = A[1:] * A[:-1], A[1:] * c[:-1] + c[1:]  # X_{i+2} = on X_i + to + noise
        gain = one.c.h * one.c.dt / one.c.noise
        late = np.zeros((2, n))
        late[:, :-1] = S[2:] * on, w[2:] - S[2:] * to
        credit = np.append(gain[:-1] * one.c.noise[1:], 0.0)
        return (credit[:, None] * one.pulled(late[0], late[1], m[:-1], P[:-1]) + one.e).sum(axis=0)

    def estimator(self) -> Estimator:
        return Distorted(noise_factor=next_noise)


@dataclass(frozen=True)
class PlainGain(Formula):
    """g for h/(eta g) in the score at eta != 1: 2 eta/(1 + eta^2) times the score's part, whatever N and d."""

    name = "g for h/(eta g) at eta != 1"
    met = "the reverse SDE's score kept for partly stochastic samplers"
    hidden = "eta = 1; else one factor on the score's part"

    def gradient(self, at: Place) -> Array:
        return 2 * at.eta / (1 + at.eta**2) * at.one.T.sum(axis=0) + at.one.e.sum(axis=0)

    def estimator(self) -> Estimator:
        return Distorted(noise_factor=g_for_h_over_eta_g)


@dataclass(frozen=True)
class LogDensityMean(Formula):
    """log p averaged over dimensions: sum T_i/d + e_i, as if the explicit part of the KL counted d times."""

    name = "log-density averaged over dimensions"
    met = "DDPO as published (section 7), beside a KL that is a sum"
    hidden = "d = 1; mu = s or lambda = 0: the scale alone"

    def gradient(self, at: Place) -> Array:
        return at.one.T.sum(axis=0) / at.dim + at.one.e.sum(axis=0)

    def estimator(self) -> Estimator:
        return Distorted(noise_factor=lambda run: run.score_noise / run.problem.dim)


@dataclass(frozen=True)
class LogDensityStepMean(Formula):
    """log p averaged over steps: sum T_i/N + e_i, as if the explicit part of the KL counted N times."""

    name = "log-density averaged over steps"
    met = "a mean over a batch of single steps beside a KL that is a sum"
    hidden = "N = 1; mu = s or lambda = 0: the scale alone"

    def gradient(self, at: Place) -> Array:
        return at.one.T.sum(axis=0) / at.steps + at.one.e.sum(axis=0)

    def estimator(self) -> Estimator:
        return Distorted(noise_factor=lambda run: run.score_noise / run.grid.steps)


@dataclass(frozen=True)
class OwnMean(Formula):
    """A batch of two whose baseline is their mean, the path itself in it: 1 - 1/2 times the score's part (1 - 1/n for n paths)."""

    name = "own mean as baseline, batches of 2"
    met = "rewards centred by the mean of their group"
    hidden = "large batches: 1/n"

    def gradient(self, at: Place) -> Array:
        return 0.5 * at.one.T.sum(axis=0) + at.one.e.sum(axis=0)

    def estimator(self) -> Estimator:
        return OwnMeanOfTwo()


@dataclass(frozen=True)
class Peeking(Formula):
    """The baseline r(X_{i+1}), which depends on xi_i: sum D_i h_i E[ d mu_i grad r(X_{i+1}) ] is lost."""

    name = "baseline that looks at X_(i+1)"
    met = "a critic fed with the state after the step"
    hidden = "nowhere"

    def gradient(self, at: Place) -> Array:
        one, r = at.one, at.one.problem.reward.quadratic(1)
        assert r is not None
        (A, c), (m, P, _, _), q = one.chain.maps, one.moments, r.matrix[0, 0]
        lost = (one.c.dt * one.c.h)[:, None] * one.pulled(q * A[:, 0, 0], r.vector[0] - q * c[:, 0], m[:-1], P[:-1])
        return (one.T - lost + one.e).sum(axis=0)

    def estimator(self) -> Estimator:
        return PeekingBaseline()


@dataclass(frozen=True)
class LaterHalf(Formula):
    """A deterministic first half without a gradient: sum over i >= N/2 of T_i + e_i."""

    name = "gradient of the later half of the steps"
    met = "samplers that draw, and train, only late steps"
    hidden = "N = 1; errors of early steps are small where the chain forgets them"

    def gradient(self, at: Place) -> Array:
        return (at.one.T + at.one.e)[at.steps // 2 :].sum(axis=0)

    def estimator(self) -> Estimator:
        return LaterSteps()


@dataclass(frozen=True)
class LastStep(Formula):
    """The pathwise gradient through the last step alone (DRaFT-1), sold as the full one: T_{N-1} + e_{N-1}, smaller as N grows."""

    name = "pathwise through the last step"
    met = "truncated backpropagation, sold as the full gradient"
    hidden = "N = 1"

    def gradient(self, at: Place) -> Array:
        return (at.one.T + at.one.e)[-1]

    def estimator(self) -> Estimator:
        return Pathwise(last=1)


@dataclass(frozen=True)
class LateReturn(Formula):
    """Sampled actions with G_{i+1} in the place of G_i: the cost of the very action is lost, and with it sum e_i, whatever d."""

    name = "action noise with G_(i+1)"
    met = "reward-to-go of discrete RL, copied to sampled actions"
    hidden = "mu = s; lambda = 0"

    def gradient(self, at: Place) -> Array:
        return at.sampled.T.sum(axis=0)

    def target(self, at: Place) -> Array:
        return at.sampled.gradient

    def estimator(self) -> Estimator:
        return LateActionReturn()


@dataclass(frozen=True)
class DDPO(Formula):
    """Advantages over the batch's std, log-densities averaged over dimensions, no KL: grad E r/(d std r), d^{-3/2}, in large batches."""

    name = "advantages / std, log-density averaged"
    met = "DDPO as published (section 7)"
    hidden = "mu = s or lambda = 0: the scale alone"

    def gradient(self, at: Place) -> Array:
        return at.one.reward_slope / (at.dim**1.5 * at.one.reward_std)

    def estimator(self) -> Estimator:
        return PublishedDDPO()


@dataclass(frozen=True)
class Ratio(Formula):
    """Right: the ratio of every step on paths of theta_old, unclipped. With a constant shift and a linear reward the states do not matter."""

    name = "ratio without a clip (right here)"
    met = ""
    hidden = ""

    power_of_d: ClassVar[float] = 0.0
    clip: ClassVar[float | None] = None

    def gradient(self, at: Place) -> Array:
        return np.array([at.pair.surrogate(at.dim, float(at.dim) ** self.power_of_d, self.clip) + at.pair.pull])

    def target(self, at: Place) -> Array:
        return at.pair.truth.gradient.theta

    def estimator(self) -> Estimator:
        return ClippedRatio(theta_old=[OLD], clip=self.clip)


@dataclass(frozen=True)
class Clipped(Ratio):
    """The ratio clipped at 1 +- .2: for one update of every coordinate its log has a std like sqrt(d), so that nothing is clipped at d = 1.

    Samples that the update has favoured are dropped and those that pull back stay: beyond the clip E G points back to theta_old.
    """

    name = "ratio clipped at .2"
    met = "PPO's clip, the log-density a sum"
    hidden = "theta = theta_old; updates small against d^-1/2"
    clip = 0.2


@dataclass(frozen=True)
class ClippedTightly(Ratio):
    """The ratio clipped at 1 +- 1e-4: every sample that the update has favoured is dropped, at every d, and E G points back to theta_old."""

    name = "ratio clipped at 1e-4"
    met = "DDPO's clip, the log-density a sum"
    hidden = "theta = theta_old"
    clip = 1e-4


@dataclass(frozen=True)
class ClippedMean(Ratio):
    """rho^{1/d} clipped at 1 +- 1e-4, log-densities averaged: 1/d times the score's part, and a clip of about 1e-4 d in the log of rho itself."""

    name = "ratio^(1/d) clipped at 1e-4"
    met = "DDPO as published (section 7)"
    hidden = "theta = theta_old, up to the factor 1/d"
    power_of_d = -1.0
    clip = 1e-4

    def estimator(self) -> None:
        return None


FORMULAS: dict[str, Formula] = {type(form).__name__: form for form in (
    PathKL(), WholeRate(), KeptRate(), FullLogSNR(), StepLostInSum(), StepLostInVariance(), DimensionMean(), WholeMean(), NoiseSpace(),
    NoiseSpaceMean(), ReferenceStates(), OtherEta(), SquaredLogRatio(), K1Loss(), K3Loss(), Complete(), Folded(), StepLoss(), NoKL(), RootLost(),
    LateNoise(), PlainGain(), LogDensityMean(), LogDensityStepMean(), OwnMean(), Peeking(), LaterHalf(), LastStep(), LateReturn(), DDPO(), Ratio(),
    Clipped(), ClippedTightly(), ClippedMean())}


# ---------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Study:
    """Every formula at every eta, spacing, N and d."""

    out: Path = Path("analysis/peer_formulas")
    """Where rows, table and figure go."""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Numbers of steps."""
    dims: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    """Numbers of coordinates."""
    pool: Annotated[Pool, tyro.conf.arg(name="")] = field(default_factory=Pool)
    """Where the jobs run."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Few N and d, only to show that everything works."""

    def sized(self) -> Study:
        return replace(self, steps=(5, 20), dims=(1, 4, 16384)) if self.quick else self

    def jobs(self) -> dict[str, tuple[str, Place]]:
        places = [Place(eta, spacing, steps, dim) for eta in ETAS for spacing in SPACINGS for steps in self.steps for dim in self.dims]
        return {f"{key}-eta{at.eta:g}-{at.spacing}-N{at.steps}-d{at.dim}": (key, at) for at in places for key in FORMULAS}


def compute(job: tuple[str, Place]) -> Row:
    """One formula at one place; null where it has no such number.

    number : its KL over the path KL      bias : |E G - grad J| / |grad J|      cosine : of E G with grad J
    kl_cosine : of the gradient of its KL with grad KL; 1 where one factor, taken up by lambda, hides the error
    """
    key, at = job
    form, target = FORMULAS[key], FORMULAS[key].target(at)
    kl, gradient = form.kl(at), form.gradient(at)
    slopes = (form.slope(at), PathKL().slope(at)) if isinstance(form, KLFormula) else None
    return {"formula": key, "eta": at.eta, "spacing": at.spacing, "steps": at.steps, "dim": at.dim,
            "number": None if kl is None else kl / at.one.truth.path_kl,
            "bias": None if gradient is None else float(np.linalg.norm(gradient - target) / np.linalg.norm(target)),
            "cosine": None if gradient is None else _cosine(gradient, target), "kl_cosine": None if slopes is None else _cosine(*slopes)}


def _cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each formula at eta = .5: number and bias at three corners of (N, d), cosines on both grids at the largest N, and where it hides."""
    few, many, wide = rows.steps.min(), rows.steps.max(), rows.dim.max()
    at = rows.set_index(["formula", "eta", "spacing", "steps", "dim"]).sort_index()
    lines = []
    for key, form in FORMULAS.items():
        line: dict[str, Any] = {"formula": form.name}
        for column, label in (("number", "KL"), ("bias", "bias")):
            line |= {f"{label} {n},{d}": at[column][key, 0.5, "uniform", n, d] for n, d in ((few, 1), (many, 1), (many, wide))}
        line["cos"] = at.cosine[key, 0.5, "uniform", many, wide]
        line |= {f"cos {label}": at.kl_cosine[key, 0.5, spacing, many, 1] for label, spacing in (("KL uniform", "uniform"), ("KL uneven", "uneven"))}
        lines.append(line | {"not seen at": form.hidden})
    return pd.DataFrame(lines)


HEAD = """eta = .5, uniform grid. KL N,d: what it takes for the path KL over the path KL. bias N,d: |E G - grad J|/|grad J|.
cos: of E G with grad J at the last N,d. cos KL: of the gradient of its KL with grad KL: 1 where one factor, taken up by lambda, hides the error.
All exact: closed recursions of one coordinate, and d in closed form. 0: below 1e-12. Clipped ratios have one parameter, so that cos is a sign."""


def text(summary: pd.DataFrame) -> str:
    """The table, what its columns are, and where each formula is met."""
    numbers = summary.drop(columns="not seen at").map(lambda x: x if isinstance(x, str) else "" if pd.isna(x) else _short(x))
    shown = numbers.assign(hidden="  " + summary["not seen at"]).rename(columns={"hidden": "  not seen at"})
    shown["formula"], shown["  not seen at"] = (shown[c].str.ljust(shown[c].str.len().max()) for c in ("formula", "  not seen at"))
    met = "\n".join(f"  {form.name}: {form.met}" for form in FORMULAS.values() if form.met)
    return f"{HEAD}\n\n{shown.to_string(index=False)}\n\nWhere it is met:\n{met}\n"


def _short(x: float) -> str:
    return "0" if abs(x) < 1e-12 else f"{x:.4g}"


def draw(rows: pd.DataFrame) -> bytes:
    """Above numbers over the path KL, below biases of gradients; over N, over d, and over eta and grids, where some cannot be seen."""
    import matplotlib
    from matplotlib.figure import Figure

    middle = sorted(set(rows.steps))[len(set(rows.steps)) // 2]
    few, half = rows.dim.min(), (rows.eta == 0.5) & (rows.spacing == "uniform")
    rows = rows.assign(place=[f"η = {eta:g}\n{spacing}" for eta, spacing in zip(rows.eta, rows.spacing, strict=True)])
    wide = sorted(set(rows.dim))[1]
    columns = (("steps", half & (rows.dim == few), f"steps N   (d = {few}, η = 0.5, uniform)"),
               ("dim", half & (rows.steps == middle), f"dimensions d   (N = {middle}, η = 0.5, uniform)"),
               ("place", (rows.steps == middle) & (rows.dim == wide), f"stochasticity η and grid   (N = {middle}, d = {wide})"))
    counts = [rows.loc[rows[value].notna(), "formula"].nunique() for value in ("number", "bias")]
    with matplotlib.rc_context({**style.RC, "axes.grid": False}):
        figure = Figure(figsize=(15.5, 0.235 * sum(counts) + 3), layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=counts, width_ratios=[rows[key].nunique() for key, _, _ in columns])
        for line, (value, title) in enumerate((("number", "Taken for the KL / path KL"), ("bias", "Bias of the gradient, |E G − ∇J| / |∇J|"))):
            for column, (key, chosen, label) in enumerate(columns):
                ax = figure.add_subplot(grid[line, column])
                image = _heat(ax, rows[chosen & rows[value].notna()].pivot_table(value, "formula", key, sort=False), value == "number")
                ax.set_xlabel(label)
                if column:
                    ax.set_yticklabels([])
                else:
                    ax.set_title(f"{title}: exact, nothing sampled", loc="left")
            figure.colorbar(image, ax=ax, label=("ratio" if value == "number" else "relative bias") + " (log scale)", pad=0.02)
        figure.suptitle("Wrong formulas on a chain whose truth is known", fontsize=12)
        return style.png(figure)


def _heat(ax: Any, cells: pd.DataFrame, ratio: bool) -> Any:
    """Numbers on their colours: purple below one and orange above it for ratios, dark for large biases; 0, below 1e-12, is white."""
    from matplotlib.colors import LogNorm

    norm, seen = LogNorm(1e-4, 1e4) if ratio else LogNorm(1e-2, 1e2), cells.to_numpy()
    image = ax.imshow(np.ma.masked_less(seen, 1e-12), norm=norm, cmap="PuOr_r" if ratio else "cividis_r", aspect="auto")
    for (i, j), x in np.ndenumerate(seen):
        red, green, blue, _ = image.cmap(norm(max(x, 1e-12)))
        dark = x > 1e-12 and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        ax.text(j, i, _cell(x), ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
    ax.set_xticks(range(cells.shape[1]), [f"{c}" for c in cells.columns], fontsize=7)
    ax.set_yticks(range(cells.shape[0]), [FORMULAS[key].name for key in cells.index], fontsize=7.5)
    ax.tick_params(length=0)
    return image


def _cell(x: float) -> str:
    if abs(x) < 1e-12:
        return "0"
    digits = f"{x:.2g}" if 1e-3 <= abs(x) < 99.5 else f"{x:.0f}" if 99.5 <= abs(x) < 1e4 else f"{x:.0e}"
    return digits.replace("e-0", "e-").replace("e+0", "e")


def main(study: Study) -> pd.DataFrame:
    """Compute what is missing, then write the rows, the table and the figure."""
    study = study.sized()
    out = writable(study.out)
    rows = pd.DataFrame(sweep(compute, study.jobs(), study.pool, out / "parts"))
    rows.to_csv(out / "rows.csv", index=False)
    said = text(table(rows))
    write_text(out / "table.txt", said)
    write_json(out / "env.json", environment("joblib", "matplotlib"))
    (out / "figure.png").write_bytes(draw(rows))
    print(said, end="")
    return rows


if __name__ == "__main__":
    from analysis import peer_formulas as named  # where other processes find what is cached here, which they cannot be sent

    named.main(tyro.cli(named.Study))
