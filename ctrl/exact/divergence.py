r"""Tilts under f-divergences: the law that maximises E_p r - lambda D_f(p || p_pre) (theory.md, section 9; 2403.06279).

    D_f(p || p_pre) = E_pre f(p/p_pre),  f convex, f(1) = f'(1) = 0:      p*/p_pre = (f')^{-1}( (r - c)/lambda ),  0 where f'(0) is above

c makes the masses sum to 1. A law is given by points with masses, so the same lines serve quadrature on the line and samples of any model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.exact.line import components
from ctrl.exact.panels import fit
from ctrl.exact.tilt import support
from ctrl.laws import Law
from ctrl.reward import Reward

ATOM, POINT = 0.02, 1e-6  # more mass than that on a node that narrow (of the line) is an atom, where r is largest
STILL = 1e-12  # of lambda and c: change of c between two rules
ROUNDS = 12


class Divergence(ABC):
    """A convex f with f(1) = f'(1) = 0; `highest` is the supremum of f', which (r - c)/lambda must stay below."""

    @property
    def highest(self) -> float:
        return np.inf

    @abstractmethod
    def f(self, u: Array) -> Array:
        """f(u), (n,) -> (n,), u >= 0."""

    @abstractmethod
    def slope(self, u: Array) -> Array:
        """f'(u), (n,) -> (n,), u > 0."""

    @abstractmethod
    def curvature(self, u: Array) -> Array:
        """f''(u), (n,) -> (n,), u > 0."""

    @abstractmethod
    def ratio(self, y: Array) -> Array:
        """(f')^{-1}(y), (n,) -> (n,), y < highest; 0 where y is below f'(0)."""

    @property
    def lowest(self) -> float:
        """f'(0), below which the ratio is cut to 0."""
        return -np.inf


@dataclass(frozen=True)
class KL(Divergence):
    r"""KL(p || p_pre): f = u log u - u + 1, ratio e^{(r - c)/lambda}.

    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_divergences_are_what_they_say
    """

    def f(self, u: Array) -> Array:
        return np.where(u > 0, u * np.log(np.maximum(u, 1e-300)), 0.0) - u + 1

    def slope(self, u: Array) -> Array:
        return np.log(u)

    def curvature(self, u: Array) -> Array:
        return 1 / u

    def ratio(self, y: Array) -> Array:
        return np.exp(y)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    r"""KL(p_pre || p): f = -log u + u - 1, ratio lambda/(c' - r) with c' = c + lambda above sup r.

    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_divergences_are_what_they_say
    """

    @property
    def highest(self) -> float:
        return 1.0

    def f(self, u: Array) -> Array:
        return -np.log(u) + u - 1

    def slope(self, u: Array) -> Array:
        return 1 - 1 / u

    def curvature(self, u: Array) -> Array:
        return 1 / u**2

    def ratio(self, y: Array) -> Array:
        return 1 / (1 - y)


@dataclass(frozen=True)
class ChiSquare(Divergence):
    r"""chi^2(p || p_pre): f = (u - 1)^2, ratio max(0, 1 + (r - c)/(2 lambda)).

    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_divergences_are_what_they_say
    """

    def f(self, u: Array) -> Array:
        return (u - 1) ** 2

    def slope(self, u: Array) -> Array:
        return 2 * (u - 1)

    def curvature(self, u: Array) -> Array:
        return np.full_like(u, 2.0)

    def ratio(self, y: Array) -> Array:
        return np.maximum(0.0, 1 + 0.5 * y)

    @property
    def lowest(self) -> float:
        return -2.0


@dataclass(frozen=True)
class Alpha(Divergence):
    r"""f = (u^a - 1 - a (u - 1)) / (a (a - 1)), a not 0 or 1: ratio [1 + (a - 1)(r - c)/lambda]_+^{1/(a - 1)}; a -> 1 is KL, a -> 0 forward KL.

    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_divergences_are_what_they_say
    """

    a: float

    def __post_init__(self) -> None:
        if check.number("a", self.a) in (0.0, 1.0):
            raise ValueError(f"a: expected a number other than 0 (ForwardKL) and 1 (KL), got {self.a:g}")

    @property
    def highest(self) -> float:
        return 1 / (1 - self.a) if self.a < 1 else np.inf

    @property
    def lowest(self) -> float:
        return 1 / (1 - self.a) if self.a > 1 else -np.inf

    def f(self, u: Array) -> Array:
        return (u**self.a - 1 - self.a * (u - 1)) / (self.a * (self.a - 1))

    def slope(self, u: Array) -> Array:
        return (u ** (self.a - 1) - 1) / (self.a - 1)

    def curvature(self, u: Array) -> Array:
        return u ** (self.a - 2)

    def ratio(self, y: Array) -> Array:
        return np.maximum(0.0, 1 + (self.a - 1) * y) ** (1 / (self.a - 1))


@dataclass(frozen=True, eq=False)
class DivergenceTilt:
    r"""The maximiser of E_p r - lambda D_f(p || p_pre) over laws on given points.

    ratio : (n,) p*/p_pre at the points      masses : (n,) of p_pre      level : c      reward : E* r      divergence : D_f
    objective : reward - lambda divergence      points : (n,) on the line, else None
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_divergence_tilts_are_optimal
    """

    ratio: Array
    masses: Array
    level: float
    reward: float
    divergence: float
    objective: float
    points: Array | None = None


def divergence_tilt(rewards: ArrayLike, kl_weight: float, divergence: Divergence, masses: ArrayLike | None = None) -> DivergenceTilt:
    r"""The f-tilt from rewards (n,) of points with masses (n,), by default of equally likely samples.

        sum_j m_j (f')^{-1}((r_j - c)/lambda) = 1,      one monotone equation for c

    Exact for the law of the points, whatever their dimension. Source: theory.md, section 9.
    Checked: tests/test_tilt.py::test_divergence_tilts_are_optimal
    """
    r = check.array("rewards", rewards, (None,), "(n,)")
    lam = check.number("kl_weight", kl_weight, above=0)
    if len(r) < 2:
        raise ValueError(f"rewards: expected at least 2 points, got {len(r)}")
    m = np.full(len(r), 1 / len(r)) if masses is None else check.array("masses", masses, (len(r),), f"({len(r)},)")
    if np.any(m < 0) or abs(float(m.sum()) - 1) > 1e-8:
        raise ValueError(f"masses: expected numbers >= 0 that sum to 1, got sum {m.sum():.12g}, min {m.min():.6g}")
    level = _level(r[m > 0], m[m > 0], lam, divergence)
    u = divergence.ratio((r - level) / lam)
    u = u / float(m @ u)
    reward, spent = float(m @ (u * r)), float(m @ divergence.f(u))
    return DivergenceTilt(u, m, level, reward, spent, reward - lam * spent)


def _level(r: Array, m: Array, lam: float, divergence: Divergence) -> float:
    """c = top - gap: all ratios are at most 1 at gap 0 and at least 1 at the range of r; gap stays below lambda highest."""
    from scipy.optimize import brentq

    top, spread, limit = float(r.max()), float(np.ptp(r)), lam * divergence.highest

    def excess(gap: float) -> float:
        return float(m @ divergence.ratio((r - top + gap) / lam)) - 1

    high = spread if spread < limit else limit * (1 - 1e-15)
    if excess(0.0) >= 0:
        return top
    if excess(high) < 0:
        raise ValueError("divergence: expected one under which a density is optimal, got one whose mass goes to the point where the reward is "
                         f"largest, {top:.6g}")
    return top - float(brentq(excess, 0.0, high, xtol=1e-300, rtol=1e-15, maxiter=500))


def line_divergence_tilt(law: Law, reward: Reward, kl_weight: float, divergence: Divergence) -> DivergenceTilt:
    r"""The f-tilt of a law on the line, by panels that end where the ratio is cut to 0; c, E* r and D_f to 1e-10.

    ValueError where no density is optimal: too little mass of p_pre near the top of r for a forward KL.
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_divergence_tilts_on_the_line
    """
    lam = check.number("kl_weight", kl_weight, above=0)
    covered = [support(law, g)[:2] for g in (np.zeros_like, lambda x: np.minimum(reward.value(x[:, None]) / lam, 1e3))]
    ends = np.array([min(low for low, _ in covered), max(high for _, high in covered)])
    found, cuts, level = _on_rule(law, reward, lam, divergence, ends, np.array([]), None), np.array([]), np.nan
    for _ in range(ROUNDS):
        if abs(found.level - level) <= STILL * (abs(level) + lam):
            return found
        level = found.level
        cuts = _cuts(reward, ends, level + lam * divergence.lowest)
        found = _on_rule(law, reward, lam, divergence, ends, cuts, level)
    raise ValueError(f"divergence: expected one under which a density is optimal, got a level that still moves at {found.level:.6g}")


def _on_rule(law: Law, reward: Reward, lam: float, divergence: Divergence, ends: Array, cuts: Array, level: float | None) -> DivergenceTilt:
    """The tilt on a rule that resolves p and, at a level near its own, p times the ratio."""

    def density(x: Array) -> Array:
        p, r = np.exp(law.log_density(x[:, None])), reward.value(x[:, None])
        if level is None:
            return np.stack([p, p, p])
        u = divergence.ratio(np.minimum((r - level) / lam, (1 - 1e-12) * divergence.highest))
        rounding = (np.abs(r) + abs(level)) / (lam * divergence.curvature(np.maximum(u, 1e-300)))
        return np.stack([p * (1 + u), p, p * (1 + u + np.where(u > 0, rounding, 0.0))])

    rule = fit(density, np.concatenate([ends[:1], cuts, ends[1:]]), float(np.min(components(law)[1])), 2, "reward")
    masses = rule.weights * rule.flat(1)
    out = divergence_tilt(reward.value(rule.nodes[:, None]), lam, divergence, masses / masses.sum())
    heavy = out.masses * out.ratio > ATOM
    if np.any(heavy & (rule.weights < POINT * (ends[1] - ends[0]))):
        raise ValueError("divergence: expected one under which a density is optimal, got an atom where the reward is largest")
    return replace(out, points=rule.nodes)


def _cuts(reward: Reward, ends: Array, level: float) -> Array:
    """Where r crosses a level, by bisection."""
    if not np.isfinite(level):
        return np.array([])
    x = np.linspace(ends[0], ends[1], 8001)
    above = reward.value(x[:, None]) > level
    j = np.flatnonzero(above[1:] != above[:-1])
    left, right, up = x[j], x[j + 1], above[j + 1]
    for _ in range(60):
        middle = 0.5 * (left + right)
        beyond = (reward.value(middle[:, None]) > level) == up
        left, right = np.where(beyond, left, middle), np.where(beyond, middle, right)
    return 0.5 * (left + right)
