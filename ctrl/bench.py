r"""`ctrl bench`: every estimator of the gradient side by side, and your own: bias, variance, speed and cost (theory.md, sections 7 and 16).

All numbers are relative to |target|, the exact gradient (F^{-1} times it for natural gradients), so that estimators of different units compare:

    bias      |E G - target| / |target|            by Gauss-Hermite nodes on a grid of two steps, without a random number
    z         of the worst coordinate of the mean over all paths, on the finest grid
    z sees    the smallest bias of a coordinate that z rejects with probability .999: below it, a small z says nothing
    variance  tr Cov(G) / |target|^2 of one path,  ~ N^exponent over the grids         signal-to-noise of one path: variance^{-1/2}
    error/s   (variance x seconds per path)^{1/2}: the standard error after one second of paths
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ctrl import check, exact, zoo
from ctrl.check import Array
from ctrl.estimators import Bias, Claim, Entry, Given, Gradient, Need, catalogue, fisher
from ctrl.evidence import FALSE_ALARM, MISS, estimate_test
from ctrl.files import user_object, writable, write_text
from ctrl.noise import Noise, NoiseLike
from ctrl.policy import BasisPolicy, Monomials, Policy
from ctrl.problem import Problem
from ctrl.reward import Reward
from ctrl.schedule import TimeGrid
from ctrl.theorems import style
from ctrl.verify import user_problem

Estimate = Callable[[Problem, Policy, TimeGrid, NoiseLike], Gradient]

ROUNDING = 1e-9
NODE_PATHS = 60_000
NODES = 12
COUNTED = 32
REPEATS = 24
COLOURS = {Bias.NONE: style.BLUE, Bias.ORDER_D: style.GREEN, Bias.PRESENT: style.ORANGE, Bias.UNSTATED: style.RED}


@dataclass(frozen=True)
class Settings:
    """What to run: grids of `steps` steps, `paths` on each; batches of `batch` paths for the signal-to-noise ratio.

    Source: theory.md, section 7.   Checked: tests/test_bench.py::test_what_is_refused
    """

    estimator: str | None = None
    problem: str = "gaussian_pull_2d"
    steps: tuple[int, ...] = (5, 10, 20, 40)
    paths: int = 10_000
    batch: tuple[int, ...] = (4, 16, 64, 256)
    out: Path = Path("bench")
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 2)):
            given = [check.integer(name, n, at_least=least) for n in getattr(self, name)]
            if not given or sorted(set(given)) != given:
                raise ValueError(f"{name}: expected increasing integers, got {given}")
        if len(self.steps) < 2:
            raise ValueError(f"steps: expected at least two numbers of steps for an exponent, got {list(self.steps)}")
        check.integer("paths", self.paths, at_least=100)
        check.integer("seed", self.seed, at_least=0)


@dataclass(frozen=True, eq=False)
class Setup:
    """A chain, what estimators may ask for on it, its exact gradient (p,), and whether it is affine-Gaussian, where few nodes are enough."""

    problem: Problem
    policy: Policy
    grid: TimeGrid
    given: Given
    gradient: Array
    linear: bool

    def target(self, claim: Claim) -> Array:
        """What an estimator of this claim estimates, (p,)."""
        if not claim.of.startswith("F^-1"):
            return self.gradient
        assert self.given.fisher is not None
        return np.linalg.solve(self.given.fisher, self.gradient)

    def run(self, entry: Entry, noise: NoiseLike) -> Gradient:
        """The estimate; ValueError for what is no Gradient of the right shape."""
        found: Any = entry.make(self.given)(self.problem, self.policy, self.grid, noise)
        if not isinstance(found, Gradient):
            raise ValueError(f"estimator: expected {entry.name} to return a ctrl.estimators.Gradient, got {type(found).__name__}")
        if found.mean.shape != self.gradient.shape:
            raise ValueError(f"estimator: expected a mean like policy.theta, {self.gradient.shape}, got {found.mean.shape}")
        return found


@dataclass(frozen=True)
class Row:
    """What the bench finds about an estimator; relative numbers as the module says.

    exact_bias : None where no rule of few nodes fits (mixtures, many dimensions), with exact_error, how much a rule of one node fewer differs
    gap, error : of the mean's worst coordinate and its standard error, relative      network, products, queries : of one path on the finest grid
    resolves : the smallest relative bias of any coordinate that z is beyond its threshold for with probability 1 - MISS
    Source: theory.md, section 7.   Checked: tests/test_bench.py::test_numbers_are_those_of_the_estimator
    """

    name: str
    claim: Claim
    own: bool
    exact_bias: float | None
    exact_error: float | None
    z: float
    threshold: float
    gap: float
    error: float
    resolves: float
    variance: tuple[float, ...]
    exponent: float
    ratios: tuple[float, ...]
    seconds: float
    network: float
    products: float
    queries: float

    @property
    def biased(self) -> bool:
        """Beyond rounding and what nodes and paths leave open."""
        seen = self.exact_bias is not None and self.exact_error is not None and self.exact_bias > max(ROUNDING, 10 * self.exact_error)
        return seen or not abs(self.z) <= self.threshold

    @property
    def holds(self) -> bool:
        """No claim is broken: who says unbiased, or is the user's and says nothing, is so."""
        return not (self.biased and self.claim.bias in (Bias.NONE, Bias.UNSTATED))

    @property
    def signal(self) -> float:
        """Signal-to-noise ratio of one path."""
        return self.variance[-1] ** -0.5 if self.variance[-1] > 0 else float("inf")

    @property
    def error_per_second(self) -> float:
        """Relative standard error after one second of paths."""
        return float(np.sqrt(self.variance[-1] * self.seconds))


def bench(settings: Settings, entries: Sequence[Entry] | None = None, stream: TextIO | None = None) -> list[Row]:
    """Run all estimators that the problem allows; writes rows.csv and bench.png, prints one line each.

    Source: theory.md, section 7.   Checked: tests/test_bench.py::test_the_catalogue_keeps_its_claims
    """
    out, name, problem = stream or sys.stdout, *_problem(settings.problem)
    folder, chosen = writable(settings.out), list(catalogue() if entries is None else entries)
    if settings.estimator is not None:
        chosen.append(_own(settings.estimator))
    plans = {sampled: _Plan.of(problem, settings, sampled) for sampled in sorted({Need.EXPLORATION in entry.needs for entry in chosen})}
    rows = []
    print(f"{name}: {settings.paths} paths, N = {settings.steps[-1]}; z sees: the smallest bias, over |target|, that it shows with probability "
          f"{1 - MISS:g} at a false alarm of {FALSE_ALARM:g}\n{_header()}", file=out, flush=True)
    for entry in chosen:
        plan = plans[Need.EXPLORATION in entry.needs]
        if lacking := entry.lacking(plan.finest.given, problem, plan.finest.policy):
            print(f"{entry.name:<52.52} needs {', '.join(sorted(need.value for need in lacking))}", file=out, flush=True)
            continue
        rows.append(plan.row(entry, own=settings.estimator is not None and entry is chosen[-1]))
        print(_line(rows[-1]), file=out, flush=True)
    write_text(folder / "rows.csv", _table(rows, settings))
    (folder / "bench.png").write_bytes(_figure(rows, settings, name))
    broken, sampled = [row.name for row in rows if not row.holds], [row.resolves for row in rows if row.exact_bias is None]
    if sampled:
        print(f"{len(sampled)} of {len(rows)} rest on z alone: it may pass a bias of up to {max(sampled):.2g} |target|", file=out, flush=True)
    print(f"broken: {'; '.join(broken)}" if broken else "every claim holds", file=out, flush=True)
    return rows


def _problem(reference: str) -> tuple[str, Problem]:
    """Of the zoo by its name, or the user's own, FILE.py:NAME."""
    if ":" in reference:
        return user_problem(reference)
    named = {make.__name__: make for make in zoo.LISTED}
    if reference not in named:
        raise ValueError(f"problem: expected FILE.py:NAME or one of {', '.join(named)}, got {reference!r}")
    return reference, named[reference]()


def _own(reference: str) -> Entry:
    """The user's estimator as an entry; one that claims nothing is held to unbiasedness."""
    name, found = user_object("estimator", reference)
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"estimator: expected {name} to be a function (problem, policy, grid, noise) -> Gradient, got {type(found).__name__}")
    needs: frozenset[Need] = frozenset(getattr(found, "needs", ()))
    return Entry(name, getattr(found, "claim", Claim(Bias.UNSTATED)), needs, lambda given: found)


# ---------------------------------------------------------------------------------------------- chains


@dataclass(frozen=True, eq=False)
class _Plan:
    """The chains of one bench: of every number of steps, and short ones for nodes."""

    settings: Settings
    chains: tuple[Setup, ...]
    short: tuple[Setup, ...]

    @classmethod
    def of(cls, problem: Problem, settings: Settings, sampled: bool) -> _Plan:
        """The short grid is uneven, at the problem's eta and at .7 of it, where more wrong formulas differ from right ones."""
        few = TimeGrid(problem.horizon * np.array([0.0, 0.1, 0.25]))
        etas = sorted({problem.eta, 0.7 * problem.eta})
        return cls(settings, tuple(_setup(problem, problem.grid(n), sampled) for n in settings.steps),
                   tuple(_setup(replace(problem, eta=eta), few, sampled) for eta in etas))

    @property
    def finest(self) -> Setup:
        return self.chains[-1]

    def row(self, entry: Entry, own: bool) -> Row:
        s, target = self.settings, self.finest.target(entry.claim)
        norm, variances, seconds = float(np.linalg.norm(target)), [], 0.0
        for setup in self.chains:
            begin = time.perf_counter()
            found = setup.run(entry, Noise(s.seed, s.paths))
            seconds = (time.perf_counter() - begin) / s.paths
            variances.append(float(np.trace(found.covariance)) * s.paths / found.count / float(np.sum(setup.target(entry.claim) ** 2)))
        test = estimate_test(found.mean, found.standard_error, target, freedom=max(found.count - 1, 1))
        exact_bias, exact_error = self._exact(entry)
        return Row(entry.name, entry.claim, own, exact_bias, exact_error, test.z, test.threshold, (test.mean - test.expected) / norm,
                   test.standard_error / norm, test.resolves / norm, tuple(variances), _exponent(s.steps, variances), self._ratios(entry), seconds,
                   *_counts(entry, self.finest))

    def _exact(self, entry: Entry) -> tuple[float | None, float | None]:
        """The largest relative bias on the short chains, and by how much a rule of one node fewer differs."""
        biases, errors = [], []
        for setup in self.short:
            problem, policy, grid = setup.problem, setup.policy, setup.grid
            variables = problem.dim * (1 + grid.steps * ((problem.eta > 0) + (policy.exploration is not None)))
            nodes = min(NODES, int(NODE_PATHS ** (1 / variables)))
            if nodes < 3 or not setup.linear:
                return None, None
            most, fewer = (setup.run(entry, Noise.gauss_hermite(problem, policy, grid, nodes=n)).mean for n in (nodes, nodes - 1))
            target = setup.target(entry.claim)
            biases.append(float(np.linalg.norm(most - target) / np.linalg.norm(target)))
            errors.append(float(np.linalg.norm(most - fewer) / np.linalg.norm(target)))
        worst = int(np.argmax(biases))
        return biases[worst], errors[worst]

    def _ratios(self, entry: Entry) -> tuple[float, ...]:
        """|mean| over the deviation of the estimate of a whole batch, on the coarsest grid: couplings within the batch count."""
        out = []
        for size in self.settings.batch:
            noise = Noise(self.settings.seed + 1, REPEATS * size)
            means = np.stack([self.chains[0].run(entry, noise[k * size : (k + 1) * size]).mean for k in range(REPEATS)])
            spread = float(np.sqrt(means.var(axis=0, ddof=1).sum()))
            out.append(float(np.linalg.norm(means.mean(axis=0))) / spread if spread > 0 else float("inf"))
        return tuple(out)


def _exponent(steps: Sequence[int], variances: Sequence[float]) -> float:
    """The slope of log variance against log N."""
    return float(np.polyfit(np.log(steps), np.log(np.maximum(variances, 1e-300)), 1)[0])


def _setup(problem: Problem, grid: TimeGrid, sampled: bool) -> Setup:
    """A policy off the pre-trained one by a shift and by a matrix that is not symmetric, so that errors of the KL's gradient show."""
    d = problem.dim
    W = 0.2 * np.eye(d) + 0.1 * (np.tri(d, k=-1) - np.tri(d, k=-1).T)
    shift = np.resize([0.3, -0.2], d)
    policy: Policy = BasisPolicy(problem, Monomials(0, problem.horizon), W[None], shift[None], 0.4 * np.eye(d) if sampled else None)
    truth, value = exact.evaluate(problem, policy, grid), exact.value(problem, policy, grid)

    def advantage(i: int, x: Array, a: Array) -> Array:
        return (value.action_value(i, x, a) - value(i, x)) / grid.dt[i]

    p = policy.theta.size
    F = None if problem.eta == 0 else fisher(problem, policy, grid, Noise(2**20, 2000)) + 0.1 * np.eye(p)
    given = Given(value, advantage, policy.theta + np.resize([0.05, -0.1], p), F)
    return Setup(problem, policy, grid, given, truth.gradient.theta, truth.method == "chain")


# ---------------------------------------------------------------------------------------------- costs


@dataclass(eq=False)
class _Tally:
    """Evaluations that differ: the same function at the same point counts once, as whoever stores it pays once."""

    network: int = 0
    products: int = 0
    queries: int = 0
    seen: set[tuple[Any, ...]] = field(default_factory=set)

    def new(self, *key: Any) -> bool:
        key = tuple(k.tobytes() if isinstance(k, np.ndarray) else k for k in key)
        fresh = key not in self.seen
        self.seen.add(key)
        return fresh


class _CountedPolicy(Policy):
    """A policy whose evaluations are counted; no parts, so that the simulator calls it step by step."""

    def __init__(self, inner: Policy, tally: _Tally, whole: bool = False) -> None:
        self.inner, self.tally, self.whole, self.theta, self.exploration = inner, tally, whole, inner.theta, inner.exploration

    @property
    def dim(self) -> int:
        return self.inner.dim

    def with_theta(self, theta: Any) -> _CountedPolicy:
        return _CountedPolicy(self.inner.with_theta(theta), self.tally)

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        if self.tally.new("pre" if self.whole else self.theta, grid.times[i], x):
            self.tally.network += len(x)
        return self.inner.mean(grid, i, x)

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        # A full Jacobian here, but a backward pass needs one product with it.
        if self.tally.new("jacobian", self.whole, self.theta, i, x):
            self.tally.products += len(x)
        return self.inner.jacobian_x(grid, i, x)

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        if self.tally.new("vjp", self.theta, i, x, u):
            self.tally.products += int(np.count_nonzero(np.any(u != 0, axis=1)))
        self.inner.add_vjp(out, grid, i, x, u)

    def parts(self, grid: TimeGrid) -> Any:
        return self.inner.parts(grid) if self.whole else None

    def exploration_cov(self, grid: TimeGrid) -> Array | None:
        return self.inner.exploration_cov(grid)


@dataclass(frozen=True, eq=False)
class _CountedReward(Reward):
    """A reward whose values and gradients are counted."""

    inner: Reward
    tally: _Tally

    def value(self, x: Array) -> Array:
        self.tally.queries += len(x) * self.tally.new("reward", x)
        return self.inner.value(x)

    def gradient(self, x: Array) -> Array:
        self.tally.queries += len(x) * self.tally.new("gradient", x)
        return self.inner.gradient(x)


@dataclass(frozen=True, eq=False)
class _CountedProblem(Problem):
    """A problem whose pre-trained score is counted."""

    tally: _Tally = field(default_factory=_Tally)

    def score(self, t: float, x: Any) -> Array:
        x = np.asarray(x)
        self.tally.network += len(x) * self.tally.new("pre", np.float64(t), x)
        return super().score(t, x)

    def pretrained(self, grid: TimeGrid) -> Any:
        return _CountedPolicy(super().pretrained(grid), self.tally, whole=True)


@dataclass(frozen=True, eq=False)
class _CountedValue:
    """A value (a critic's network) whose evaluations are counted."""

    inner: Any
    tally: _Tally

    def __call__(self, i: int, x: Array) -> Array:
        self.tally.network += len(x) * self.tally.new("V", i, x)
        return np.asarray(self.inner(i, x))

    def gradient(self, i: int, x: Array) -> Array:
        self.tally.network += len(x) * self.tally.new("V", i, x)
        self.tally.products += len(x) * self.tally.new("grad V", i, x)
        return np.asarray(self.inner.gradient(i, x))


def _counts(entry: Entry, setup: Setup) -> tuple[float, float, float]:
    """Network evaluations (policy, pre-trained score, value, advantage), Jacobian-vector products, reward queries (r and grad r) per path."""
    tally, p, given = _Tally(), setup.problem, setup.given
    counted = _CountedProblem(p.schedule, p.data, _CountedReward(p.reward, tally), p.kl_weight, p.eta, p.start, p.entropy_weight, p.discount, tally)
    rate = given.advantage

    def advantage(i: int, x: Array, a: Array) -> Array:
        assert rate is not None
        tally.network += len(x) * tally.new("A", i, x, a)
        return rate(i, x, a)

    asked = replace(given, value=_CountedValue(given.value, tally), advantage=advantage)
    replace(setup, problem=counted, policy=_CountedPolicy(setup.policy, tally), given=asked).run(entry, Noise(0, COUNTED))
    return tally.network / COUNTED, tally.products / COUNTED, tally.queries / COUNTED


# ---------------------------------------------------------------------------------------------- table and figure


COLUMNS = (("estimator", 52), ("claim", 13), ("exact bias", 10), ("z", 9), ("z sees", 8), ("variance", 9), ("N^", 6), ("signal", 7), ("s/1e4", 7),
           ("error/s", 8), ("network", 7), ("products", 8), ("queries", 7))


def _header() -> str:
    return " ".join(f"{name:<{width}}" if k < 2 else f"{name:>{width}}" for k, (name, width) in enumerate(COLUMNS))


def _line(row: Row) -> str:
    exact_bias = "-" if row.exact_bias is None or row.exact_error is None else f"{row.exact_bias:.1e}"
    z = f"{row.z:+.2f}" if abs(row.z) < 1e4 else f"{row.z:+.0e}"
    cells = (row.name[:52], row.claim.bias.value, exact_bias, z, f"{row.resolves:.2g}", f"{row.variance[-1]:.3g}", f"{row.exponent:+.2f}",
             f"{row.signal:.3f}", f"{1e4 * row.seconds:.3f}", f"{row.error_per_second:.2g}", f"{row.network:g}", f"{row.products:g}",
             f"{row.queries:g}")
    body = " ".join(f"{c:<{w}}" if k < 2 else f"{c:>{w}}" for k, (c, (_, w)) in enumerate(zip(cells, COLUMNS, strict=True)))
    return body + ("" if row.holds else "  BIASED")


def _table(rows: Sequence[Row], settings: Settings) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "claim", "own", "exact_bias", "exact_error", "z", "threshold", "gap", "standard_error", "resolves", "exponent", "signal",
                     "seconds_per_path", "error_per_second", "network", "products", "queries", "biased", "holds",
                     *(f"variance_{n}" for n in settings.steps),
                     *(f"signal_batch_{n}" for n in settings.batch)])
    for r in rows:
        writer.writerow([r.name, str(r.claim), r.own, r.exact_bias, r.exact_error, r.z, r.threshold, r.gap, r.error, r.resolves, r.exponent, r.signal,
                         r.seconds, r.error_per_second, r.network, r.products, r.queries, r.biased, r.holds, *r.variance, *r.ratios])
    return out.getvalue()


def _figure(rows: Sequence[Row], settings: Settings, name: str) -> bytes:
    """Numbers at the lines are those of the rows in the panel of the bias; colours are claims, the user's own black."""
    with style.panels(3, f"Gradient estimators on {name}", width=5.6, height=7.2) as (figure, (bias, variance, signal)):
        for k, row in enumerate(rows):
            colour, width = ("black", 2.5) if row.own else (COLOURS[row.claim.bias], 1.0)
            bias.errorbar(row.gap, k, xerr=3 * row.error, fmt="o", color=colour, linewidth=width)
            for ax, x, y in ((variance, settings.steps, row.variance), (signal, settings.batch, row.ratios)):
                ax.loglog(x, y, color=colour, linewidth=width, alpha=0.8)
                ax.annotate(str(k + 1), (x[-1], y[-1]), xytext=(3 + 11 * (k % 3), 0), textcoords="offset points", fontsize=6,
                            color=colour, va="center")
        bias.set_yticks(range(len(rows)), [f"{row.name} {k + 1}" for k, row in enumerate(rows)], fontsize=7)
        bias.invert_yaxis()
        bias.set_xscale("symlog", linthresh=0.01)
        bias.set(xlabel="(mean - target)/|target|, worst coordinate, 3 standard errors", title=f"Bias at N = {settings.steps[-1]}")
        low, high = min(row.exponent for row in rows), max(row.exponent for row in rows)
        variance.set(xlabel="steps N", ylabel="tr Cov / |target|$^2$ of one path", title=f"Variance: exponents {low:+.2f} to {high:+.2f}")
        signal.set(xlabel="paths in a batch", ylabel="|mean| / deviation of the batch's estimate",
                   title=f"Signal-to-noise at N = {settings.steps[0]}")
        style.log_ticks(variance, settings.steps, [str(n) for n in settings.steps])
        style.log_ticks(signal, settings.batch, [str(n) for n in settings.batch])
        for claim, colour in COLOURS.items():
            if any(row.claim.bias is claim and not row.own for row in rows):
                signal.plot([], [], color=colour, label=f"claims: {claim.value}")
        signal.legend(loc="lower right")
        return style.png(figure)
