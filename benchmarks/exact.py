r"""Milliseconds of exact truth: the chain in 8 and 64 dimensions, the line on 2001 points, beside the plain loops they replace.

    chain   J by NumPy's recursion, one step after another (the formula as a page has it);  also scipy's solve_ivp on the moments' ODEs
    line    J by dense N x n x n kernels in NumPy

Every version runs on one pinned core, rounds are interleaved, medians of processor time are reported, with the gradient too where there is
one. Before it is timed a peer must agree with this library to 1e-10, the ODEs (of the continuous law) with `exact.limit`.

    python benchmarks/exact.py [--quick] [--out FILE.csv]          about 3 minutes; --quick 20 seconds

Rows of a full run are in benchmarks/exact/exact.csv. Feeds docs/results.md.
"""

from __future__ import annotations

import csv
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ctrl
import numpy as np
import tyro
from engine import environment
from scipy.integrate import solve_ivp

Array = np.ndarray[Any, Any]
LONG = 5.0  # seconds after which a version is not timed again: those are peers, of which a few rounds tell enough
GRADIENT_BAR = 4.0  # evaluation and gradient together, times the evaluation


@dataclass(frozen=True)
class Case(ABC):
    """A problem and a grid, with the bar on the objective in milliseconds."""

    name: str
    steps: int
    bar: float

    @property
    @abstractmethod
    def problem(self) -> ctrl.Problem: ...

    @abstractmethod
    def policies(self, problem: ctrl.Problem, grid: ctrl.TimeGrid) -> dict[str, Any]: ...

    @abstractmethod
    def truth(self, problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid) -> Any: ...

    @abstractmethod
    def peers(self, problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid) -> dict[str, Callable[[], float]]:
        """Functions that return their distance from this library's answer, relative."""


@dataclass(frozen=True)
class Chain(Case):
    """Gaussian data, affine policy, quadratic reward."""

    dim: int

    @property
    def problem(self) -> ctrl.Problem:
        if self.dim == 8:
            return ctrl.zoo.gaussian_8d()
        rng = np.random.default_rng(self.dim)
        root, bend = rng.normal(size=(2, self.dim, self.dim)) / np.sqrt(self.dim)
        return ctrl.Problem(ctrl.VP(0.1, 10.0), ctrl.Gaussian(rng.normal(size=self.dim), 0.5 * root @ root.T + 0.3 * np.eye(self.dim)),
                            ctrl.QuadraticReward(bend @ bend.T, rng.normal(size=self.dim)), kl_weight=0.5)

    def policies(self, problem: ctrl.Problem, grid: ctrl.TimeGrid) -> dict[str, Any]:
        pre, d = problem.pretrained(grid), self.dim
        W = 0.05 * np.broadcast_to(np.eye(d), (3, d, d))
        return {"AffinePolicy, all theta": ctrl.AffinePolicy(0.9 * pre.K, pre.k + 0.1),
                "BasisPolicy, 3 time functions": ctrl.BasisPolicy(problem, ctrl.policy.Monomials(2), W, np.full((3, d), 0.1)),
                "BasisPolicy.scaled": ctrl.BasisPolicy.scaled(problem, 0.9, np.full(d, 0.1))}

    def truth(self, problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid) -> Any:
        return ctrl.exact.evaluate(problem, policy, grid)

    def peers(self, problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid) -> dict[str, Callable[[], float]]:
        known, out = self.truth(problem, policy, grid).objective, {"NumPy recursion": lambda: abs(recursion(problem, policy, grid) / known - 1)}
        if isinstance(policy, ctrl.BasisPolicy) and self.dim <= 8:
            limit = ctrl.exact.limit.evaluate(problem, policy).terminal
            out["solve_ivp DOP853, moments only"] = lambda: float(np.max(np.abs(moments_by_ode(problem, policy) - limit.cov)) / np.max(limit.cov))
        return out


@dataclass(frozen=True)
class Line(Case):
    """A mixture on the line, by quadrature."""

    points: int

    @property
    def problem(self) -> ctrl.Problem:
        return getattr(ctrl.zoo, self.name)()

    def policies(self, problem: ctrl.Problem, grid: ctrl.TimeGrid) -> dict[str, Any]:
        bins = ctrl.policy.TimeBins(16, problem.horizon)
        return {"BasisPolicy.shift": ctrl.BasisPolicy.shift(problem, [0.1]), "MixturePolicy": ctrl.MixturePolicy(problem.schedule, problem.data),
                "BasisPolicy, 16 time bins": ctrl.BasisPolicy(problem, bins, np.full((16, 1, 1), 0.05), np.full((16, 1), 0.1))}

    def truth(self, problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid) -> Any:
        return ctrl.exact.quadrature.evaluate(problem, policy, grid, points=self.points)

    def peers(self, problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid) -> dict[str, Callable[[], float]]:
        known = self.truth(problem, policy, grid).objective
        return {"NumPy dense kernels": lambda: abs(dense_kernels(problem, policy, grid, self.points) / known - 1)}


CASES = [Chain("gaussian_8d", 1000, 2.0, 8), Chain("gaussian_64d", 200, 300.0, 64), Line("mixture_bump_1d", 100, 500.0, 2001),
         Line("digits_line", 100, 500.0, 2001)]
QUICK = [Chain("gaussian_8d", 100, 2.0, 8), Line("mixture_bump_1d", 10, 500.0, 1001)]


def recursion(problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid) -> float:
    """J of an affine-Gaussian chain, step by step: what a page of formulas becomes in NumPy; no discount, mean actions."""
    c, (K, k, _), pre, r = problem.coefficients(grid), policy.parts(grid), problem.pretrained(grid), problem.reward.quadratic(problem.dim)
    m, P, cost = problem.start_law.mean, problem.start_law.cov, 0.0
    for i in range(grid.steps):
        dK, gap = K[i] - pre.K[i], (K[i] - pre.K[i]) @ m + k[i] - pre.k[i]
        cost += c.kappa[i] * c.dt[i] * (np.trace(dK @ P @ dK.T) + gap @ gap)
        A = (1 - c.dt[i] * c.f[i]) * np.eye(problem.dim) + c.dt[i] * c.h[i] * K[i]
        m, P = A @ m + c.dt[i] * c.h[i] * k[i], A @ P @ A.T + c.noise[i] ** 2 * np.eye(problem.dim)
    return float(-0.5 * (np.trace(r.matrix @ P) + m @ r.matrix @ m) + r.vector @ m + r.constant - problem.kl_weight * cost)


def moments_by_ode(problem: ctrl.Problem, policy: ctrl.BasisPolicy) -> Array:
    """Covariance of X_T in continuous time, by scipy's DOP853 to 1e-10: m' = F m + c, P' = F P + P F' + eta^2 g^2 I."""
    d = problem.dim

    def rhs(t: float, y: Array) -> Array:
        (f, g2, h, _), (K, k), P = problem.schedule.rates(t, problem.eta), policy.affine_at(t), y[d:].reshape(d, d)
        F = h * K - f * np.eye(d)
        return np.concatenate([F @ y[:d] + h * k, (F @ P + P @ F.T + problem.eta**2 * g2 * np.eye(d)).ravel()])

    start = np.concatenate([problem.start_law.mean, problem.start_law.cov.ravel()])
    return solve_ivp(rhs, (0.0, problem.horizon), start, method="DOP853", rtol=1e-10, atol=1e-12).y[d:, -1].reshape(d, d)


def dense_kernels(problem: ctrl.Problem, policy: Any, grid: ctrl.TimeGrid, points: int) -> float:
    """J on the line by full n x n transition matrices on one lattice, eight standard deviations wide; mean actions, no discount."""
    c, law = problem.coefficients(grid), problem.data
    wide = 8 * max(1.0, float(np.sqrt(law.cov[0, 0])))
    x, dx = np.linspace(-wide, wide, points), 2 * wide / (points - 1)
    p, cost = np.exp(problem.start_law.log_density(x[:, None])), 0.0
    for i in range(grid.steps):
        a, s = (v[:, 0] for v in (policy.mean(grid, i, x[:, None]), problem.score(float(grid.times[i]), x[:, None])))
        cost += c.kappa[i] * c.dt[i] * dx * float(p @ (a - s) ** 2)
        centre = x + c.dt[i] * (-c.f[i] * x + c.h[i] * a)
        kernel = np.exp(-0.5 * ((x[:, None] - centre) / c.noise[i]) ** 2) / (np.sqrt(2 * np.pi) * c.noise[i])
        p = kernel @ (p * dx)
    return float(dx * p @ problem.reward.value(x[:, None])) - problem.kl_weight * cost


@dataclass(frozen=True)
class Row:
    """One version on one case; milliseconds of processor time. `meets` judges the bars, where there is one."""

    case: str
    dim: int
    steps: int
    policy: str
    version: str
    rounds: int
    objective_ms: float
    with_gradient_ms: float | None
    gradient_ratio: float | None
    first_call_ms: float
    bar_ms: float | None
    meets: bool | None
    times_this_library: float
    relative_gap: float | None


def run(case: Case, rounds: int) -> Iterator[Row]:
    """Check, warm up (the first call, which compiles or loads), then time all versions in turn, `rounds` times."""
    problem = case.problem
    grid = problem.grid(case.steps)
    for name, policy in case.policies(problem, grid).items():
        def objective(policy: Any = policy) -> float:
            return float(case.truth(problem, policy, grid).objective)

        def gradient(policy: Any = policy) -> Any:
            truth = case.truth(problem, policy, grid)
            return truth.objective, truth.gradient

        first = {"objective": clock(objective), "gradient": clock(gradient)}
        peers, gaps = case.peers(problem, policy, grid), {}
        for peer, call in peers.items():
            gaps[peer] = call()
            if gaps[peer] > 1e-10:
                raise ValueError(f"{peer}: expected agreement on {case.name}, got a relative gap of {gaps[peer]:.2g}")
        seconds: dict[str, list[float]] = {key: [] for key in ("objective", "gradient", *peers)}
        for _ in range(rounds):
            for key, call in {"objective": objective, "gradient": gradient, **peers}.items():
                if sum(seconds[key]) < LONG:
                    seconds[key].append(sustained(call))
        ms = {key: 1e3 * statistics.median(s) for key, s in seconds.items()}
        ratio = ms["gradient"] / ms["objective"]
        yield Row(case.name, problem.dim, case.steps, name, "ctrl.exact", len(seconds["objective"]), ms["objective"], ms["gradient"], ratio,
                  1e3 * sum(first.values()), case.bar, ms["objective"] < case.bar and ratio <= GRADIENT_BAR, 1.0, None)
        for peer in peers:
            yield Row(case.name, problem.dim, case.steps, name, peer, len(seconds[peer]), ms[peer], None, None, ms[peer], None, None,
                      ms[peer] / ms["objective"], gaps[peer])


def clock(call: Callable[[], Any]) -> float:
    """Seconds of processor time of one call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def sustained(call: Callable[[], Any]) -> float:
    """The same per call, on average over calls one after another for at least 20 ms: a neighbour's cold memory is not this version's cost."""
    spent = [clock(call)]
    while sum(spent) < 0.02:
        spent.append(clock(call))
    return statistics.mean(spent)


def write(found: list[Row], out: Path) -> None:
    about = environment(seed=0)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(found[0]), *about])
        writer.writeheader()
        writer.writerows({**asdict(row), **about} for row in found)


def main(quick: bool = False, out: Path = Path("exact.csv"), rounds: int = 5) -> None:
    """Time exact truth and write one row per case, policy and version.

    Args:
        quick: fewer steps and points, three rounds.
        out: the CSV file to write.
        rounds: interleaved rounds per version.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found: list[Row] = []
    for row in (row for case in (QUICK if quick else CASES) for row in run(case, 3 if quick else rounds)):
        found.append(row)
        write(found, out)
        more = f"   with gradient {row.with_gradient_ms:8.2f} ({row.gradient_ratio:.2f} x)   {'meets' if row.meets else 'misses'} {row.bar_ms:g} ms" \
            if row.gradient_ratio is not None else f"   {row.times_this_library:6.1f} x ctrl.exact, gap {row.relative_gap:.1e}"
        print(f"{row.case:16s} N={row.steps:<5d}{row.policy:30s}{row.version:32s}{row.objective_ms:9.2f} ms{more}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
