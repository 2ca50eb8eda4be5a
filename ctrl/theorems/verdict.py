"""Verdicts: what was measured against what, and whether it holds; and the cases on which theorems are tried."""

from __future__ import annotations

import json
import math
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ctrl import exact
from ctrl.check import Array
from ctrl.evidence import MISS, MeanTest, fitted_order, separation
from ctrl.laws import Gaussian
from ctrl.noise import Noise
from ctrl.policy import BasisPolicy, Monomials
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER_TOLERANCE = 0.05
IN_PLANE = 8  # steps of a chain in the plane: every truth of it costs half a second


@dataclass(frozen=True)
class Verdict:
    """One row of the table. A planted row holds when the error was rejected; a skipped row has holds None and a reason."""

    theorem: str
    problem: str
    check: str
    measured: float | None
    expected: float | None
    tolerance: float | None
    z: float | None
    holds: bool | None
    reason: str
    seconds: float = 0.0
    right_error: float | None = None  # of a planted row by Monte Carlo: the right formula's standard error in the same check

    def __post_init__(self) -> None:
        # NumPy's False is not False: a verdict is a plain bool, its numbers plain floats.
        object.__setattr__(self, "holds", None if self.holds is None else bool(self.holds))
        for name in ("measured", "expected", "tolerance", "z", "right_error"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    @cached_property
    def resolution(self) -> float | None:
        r"""The smallest share of a planted error that its check catches with probability 1 - miss; None for other rows.

        An error of size e is the blend (1 - e) right + e wrong of the checked quantity: its mean is e G away, G = measured - expected.

            exact check:        e = tolerance / |G|
            Monte Carlo check:  e |G| = s ( (1 - e) se_right + e se ),    s = threshold + z_miss sqrt(1 + threshold^2 / 2 freedom)

        By the triangle inequality the bracket is an upper bound of the blend's standard error; without a given se_right it is se.
        `inf` where no share of it is caught that often. Freedom is taken as 1000: an upper bound, samples being
        thousands. The measured G is itself uncertain by se: e by a part se / |G|. Exact checks: up to the right formula's rounding.
        Source: theory.md, section 0.   Checked: tests/test_sensitivity.py::test_sampled_errors_are_missed_as_often_as_said
        """
        if self.check != "planted" or self.measured is None or self.expected is None or self.tolerance is None:
            return None
        gap = abs(self.measured - self.expected)
        if gap == 0 or not math.isfinite(gap):
            return math.inf if gap == 0 else None
        if self.z is None:
            return self.tolerance / gap
        se = gap / abs(self.z)
        right = se if self.right_error is None else self.right_error
        away = separation(self.tolerance / se, freedom=1000)
        rest = gap - away * (se - right)
        return away * right / rest if rest > 0 else math.inf

    def record(self) -> dict[str, Any]:
        """For JSON: infinite and NaN numbers become None with the fact told in the reason."""
        row = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "right_error"}
        for name in ("measured", "expected", "tolerance", "z"):
            if row[name] is not None and not math.isfinite(row[name]):
                row["reason"] += f" ({name} was {row[name]})"
                row[name] = None
        return row

    @cached_property
    def line(self) -> str:
        """The record in JSON; a run writes every row again whenever it has more."""
        return json.dumps(self.record(), allow_nan=False)


@dataclass(frozen=True, eq=False)
class Case:
    """A named problem with a policy, a grid, a sample size and noise of its own."""

    name: str
    problem: Problem
    quick: bool
    seed: int
    steps: int = 40
    own: bool = False  # a user's problem: what cannot be seen on it is skipped, where the zoo must show it

    def at(self, eta: float, **changes: Any) -> Case:
        """The same case at another eta (and other fields of the problem); one object, with what it has computed, for equal changes."""
        if eta == self.problem.eta and not changes:
            return self
        return _case(self.name, _altered(self.problem, ("eta", eta), *changes.items()), self.quick, self.seed, self.steps, self.own)

    def over(self, steps: int) -> Case:
        """The same case over so many steps; one object, with what it has computed, for equal numbers."""
        return self if steps == self.steps else _case(self.name, self.problem, self.quick, self.seed, int(steps), self.own)

    @property
    def etas(self) -> tuple[float, ...]:
        """1, one half (where everything about h shows: section 16), and the problem's own eta when it has noise."""
        own = (self.problem.eta,) if self.problem.eta > 0 else ()
        return tuple(dict.fromkeys((1.0, 0.5, *own)))

    @property
    def linear(self) -> bool:
        """Gaussian data and a quadratic reward: the chain is exact in any dimension."""
        return isinstance(self.problem.data, Gaussian) and self.problem.reward.quadratic(self.problem.dim) is not None

    @property
    def planar(self) -> bool:
        """In the plane and not linear: a truth takes a lattice for every time."""
        return self.problem.dim == 2 and not self.linear

    @property
    def brief(self) -> Case:
        """The case with no more steps than an affordable truth allows: itself, except in the plane."""
        return self.over(IN_PLANE) if self.planar and self.steps > IN_PLANE else self

    @cached_property
    def solvable(self) -> bool:
        """There is an exact truth: of a linear chain, on the line, and of a brief chain in the plane that lattices resolve."""
        if not self.planar or self.steps > IN_PLANE:
            return self.linear or self.problem.dim == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "reward: not smooth", RuntimeWarning)
            try:
                _ = self.truth
            except (ValueError, RuntimeWarning):
                return False
        return True

    @property
    def idle(self) -> bool:
        """The objective is one constant: no penalty, and a reward that does not depend on x."""
        r = self.problem.reward.quadratic(self.problem.dim)
        return self.problem.kl_weight == 0 and r is not None and not np.any(r.matrix) and not np.any(r.vector)

    @property
    def grid(self) -> TimeGrid:
        return self.problem.grid(self.steps)

    @property
    def policy(self) -> BasisPolicy:
        """A departure from the pre-trained score with a part that depends on x (section 16 says why)."""
        return _policy(self.problem)

    @property
    def exploring(self) -> BasisPolicy:
        """The same mean with sampled actions; Sigma = 0.4 I + 0.1, not diagonal, so that a transposed factor shows."""
        return _exploring(self.problem)

    @property
    def paths(self) -> int:
        return 50_000 if self.quick else 400_000

    def noise(self, label: str, paths: int | None = None) -> Noise:
        """Independent noise for every label, a pure function of (seed, problem, label)."""
        key = zlib.crc32(f"{self.name}/{self.problem.eta:g}/{label}".encode())
        return Noise(seed=(self.seed << 32 | key) % 2**64, paths=paths or self.paths)

    @cached_property
    def truth(self) -> exact.Truth:
        return exact.evaluate(self.problem, self.policy, self.grid)

    @cached_property
    def value(self) -> exact.Value:
        return exact.value(self.problem, self.policy, self.grid)


# Cached by identity, so that what one theorem has computed of a case the others find.


@lru_cache(maxsize=32)
def _case(name: str, problem: Problem, quick: bool, seed: int, steps: int, own: bool) -> Case:
    return Case(name, problem, quick, seed, steps, own)


@lru_cache(maxsize=64)
def _altered(problem: Problem, *changes: tuple[str, Any]) -> Problem:
    return replace(problem, **dict(changes))


@lru_cache(maxsize=64)
def _policy(problem: Problem) -> BasisPolicy:
    d = problem.dim
    if isinstance(problem.data, Gaussian):
        return BasisPolicy.scaled(problem, scale=0.9, shift=np.full(d, 0.1))
    return BasisPolicy(problem, Monomials(0, problem.horizon), W=-0.2 * np.eye(d)[None], w=np.full((1, d), 0.2))


@lru_cache(maxsize=64)
def _exploring(problem: Problem) -> BasisPolicy:
    d = problem.dim
    return _policy(problem).with_exploration(0.4 * np.eye(d) + np.full((d, d), 0.1))


class Theorem(ABC):
    """A theorem of the paper with its exact twin, its Monte Carlo twin, its limit and its planted errors."""

    name: str
    statement: str
    formulas: tuple[str, ...] = ()  # of the statement, in matplotlib's mathtext

    @abstractmethod
    def checks(self, case: Case) -> Iterator[Verdict]:
        """All verdicts of this theorem on one case."""

    @abstractmethod
    def figure(self, case: Case) -> Figure:
        """What the theorem looks like, drawn on a case with an exact truth."""

    def exact(self, case: Case, measured: ArrayLike, expected: ArrayLike, tolerance: float, what: str) -> Verdict:
        """An identity to rounding: |measured - expected| <= tolerance * scale, scale the largest |expected| (or 1 below 1e-3)."""
        worst_measured, worst_expected, allowed, holds = _compare(measured, expected, tolerance)
        reason = what if holds else f"{what}: measured {worst_measured:.12g} against {worst_expected:.12g}"
        return Verdict(self.name, case.name, "exact", worst_measured, worst_expected, allowed, None, holds, reason)

    def monte_carlo(self, case: Case, test: MeanTest, resolves: float, what: str) -> Verdict:
        """A mean test that must be able to see an error of size `resolves`; an underpowered test is refused, never judged."""
        if test.resolves > resolves:
            return self.skipped(case, f"{what}: refused as underpowered, sees {test.resolves:.3g} but must see {resolves:.3g}")
        reason = f"{what}; sees {test.resolves:.2g} with probability {1 - MISS:g}"
        if not test.holds:
            reason = f"{what}: measured {test.mean:.9g} against {test.expected:.9g}, {abs(test.z):.1f} standard errors"
        return Verdict(self.name, case.name, "monte_carlo", test.mean, test.expected, test.threshold * test.standard_error, test.z,
                       test.holds, reason)

    def limit(self, case: Case, dt: ArrayLike, error: ArrayLike, order: float, what: str, over: str = "D") -> Verdict:
        """The fitted order of convergence of a noise-free error, in D or in what `over` names; a user's grids need not show it."""
        if case.own and np.min(np.abs(error)) < 1e-12:
            return self.skipped(case, f"{what}: no error to fit an order to")
        fit = fitted_order(np.asarray(dt), np.asarray(error))
        holds = abs(fit.slope - order) <= ORDER_TOLERANCE
        reason = f"{what}: order {fit.slope:.3f} +- {fit.standard_error:.3f} over {over} = {np.max(dt):.2g} ... {np.min(dt):.2g}"
        if case.own and not holds:
            return self.skipped(case, f"{reason}: not yet on its slope")
        return Verdict(self.name, case.name, "limit", fit.slope, order, ORDER_TOLERANCE, None, holds, reason)

    def planted(self, case: Case, measured: ArrayLike, expected: ArrayLike, tolerance: float, what: str) -> Verdict:
        """A wrong formula against an exact check: the row holds when the check rejects it."""
        worst_measured, worst_expected, allowed, passes = _compare(measured, expected, tolerance)
        if case.own and passes:
            return self.skipped(case, f"planted: {what}: not visible on this problem")
        reason = f"planted: {what}" + (" was NOT caught" if passes else "")
        return Verdict(self.name, case.name, "planted", worst_measured, worst_expected, allowed, None, not passes, reason)

    def planted_sampled(self, case: Case, test: MeanTest, what: str, right: MeanTest | None = None) -> Verdict:
        """A wrong formula against a Monte Carlo check: the row holds when the check rejects it.

        right : the right formula in the same check, where its standard error is another (see Verdict.resolution).
        """
        right_error = None if right is None else right.resolves / separation(right.threshold)  # the worst coordinate's, at least
        if case.own and test.holds:
            return self.skipped(case, f"planted: {what}: not visible at this sample size (z = {test.z:.2f})")
        reason = f"planted: {what}" + (" was NOT caught" if test.holds else "")
        return Verdict(self.name, case.name, "planted", test.mean, test.expected, test.threshold * test.standard_error, test.z,
                       not test.holds, reason, right_error=right_error)

    def skipped(self, case: Case, reason: str) -> Verdict:
        return Verdict(self.name, case.name, "skipped", None, None, None, None, None, reason)


def _compare(measured: ArrayLike, expected: ArrayLike, tolerance: float) -> tuple[float, float, float, bool]:
    """The worst coordinate, what is allowed there, and whether every coordinate is within it."""
    m, e = np.broadcast_arrays(np.asarray(measured, dtype=np.float64), np.asarray(expected, dtype=np.float64))
    scale = float(np.max(np.abs(e)))
    allowed = tolerance * (scale if scale > 1e-3 else 1.0)
    gap = np.abs(m - e).ravel()
    worst = int(np.argmax(np.where(np.isfinite(gap), gap, np.inf)))
    return float(m.ravel()[worst]), float(e.ravel()[worst]), allowed, bool(gap[worst] <= allowed)


def order_steps(case: Case) -> Array:
    """Numbers of steps over which orders are fitted: asymptotic for the zoo, and affordable for 1-D quadrature; three of four when quick."""
    steps = np.array([80, 160, 320, 640] if case.linear else [48, 72, 96, 144])
    return steps[:-1] if case.quick else steps


def convergence(case: Case, curve: Callable[[int], ArrayLike], target: Array | float | None = None) -> tuple[Array, Array]:
    """Step lengths and errors of a noise-free curve N -> numbers: |F(N) - target|, or |F(N) - F(2N)| without a known limit."""
    steps, known = order_steps(case), cache(lambda n: np.atleast_1d(np.asarray(curve(n), dtype=np.float64)))
    errors = [np.linalg.norm(known(n) - (known(2 * n) if target is None else target)) for n in steps.tolist()]
    return case.problem.horizon / steps, np.array(errors)
