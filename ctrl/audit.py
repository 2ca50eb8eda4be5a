r"""`ctrl audit`: a sampler step of a user's own against what a trainer takes for granted of it, in one table (theory.md, sections 1, 4, 7, 11, 12).

    step(x, t, t_next, model, generator, x_next=None) -> (x_next, log_prob)

The step is a black box. Its mean and std are read off the noise that a generator's seed stands for, its density off log_prob of given points,
by quadrature; what it should be follows from a model whose data law is Gaussian, so that every time's law is known.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, nan, prod, sqrt
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ctrl import check, report
from ctrl.evidence import FALSE_ALARM, MISS, MeanTest, fitted_order, mean_test
from ctrl.files import writable, write_json
from ctrl.theorems.verdict import Verdict
from ctrl.torch.step import NOISELESS, Jump, Moments, Sampler, sampler_of

JUMPS = 6  # steps before the last at which a step's density is looked at
DRAWS = 2**16
THETA = (0.3, 0.2)  # the model's departure from its reference
COARSER = (1, 2, 4, 8)
FEWEST = 2 * COARSER[-1]  # steps below which no order is fitted
SINGLE = 1e-6  # constants such as log sqrt(2 pi) in single precision are no error
ALIKE = 1e-9  # of a gap: a scatter that is rounding
LEAST_ORDER = 0.5  # half way between a step of order 1 and one whose error does not vanish


class Slice(NamedTuple):
    """exp(log_prob) along one coordinate: nodes (m, *shape), their distance, and its mass, mean and std there; NaN where it is no density."""

    nodes: Tensor
    width: float
    mass: float
    mean: float
    std: float


@dataclass(frozen=True, eq=False)
class Bench:
    """A sampler, the steps of it that are looked at, and a model with its reference."""

    sampler: Sampler
    seed: int
    known: dict[Jump, Moments] = field(default_factory=dict, init=False)

    @cached_property
    def model(self) -> nn.Module:
        return self.sampler.network(THETA)

    @cached_property
    def reference(self) -> nn.Module:
        return self.sampler.network()

    @property
    def last(self) -> Jump:
        return self.sampler.jumps[-1]

    @cached_property
    def jumps(self) -> tuple[Jump, ...]:
        """Steps from the first to the last but one, without those that add no noise and claim no density."""
        before = self.sampler.jumps[:-1] or self.sampler.jumps
        self.draw(self.states(before[0], 2, 0), before[0], 0)  # what does not run, or has the wrong shape, is refused on a small batch
        chosen = [before[i] for i in np.unique(np.linspace(0, len(before) - 1, JUMPS).round().astype(int))]
        dense = tuple(jump for jump in chosen if not self.silent(jump))
        if not dense:
            raise ValueError(f"{self.sampler.name}: expected a step that adds noise and has a density, got none at {', '.join(map(str, chosen))}")
        return dense

    def point(self, jump: Jump, last: int = 1) -> Tensor:
        """(1, *shape): 0.7 standard deviations above the mean of Y_t, `last` coordinates."""
        m, P = jump.here.law(self.sampler.axes(last))
        return (m + 0.7 * P.sqrt())[None]

    def states(self, jump: Jump, n: int, label: int, shape: tuple[int, ...] | None = None) -> Tensor:
        """(n, *shape) draws of Y_t, of the sampler's shape or another."""
        shape = shape or self.sampler.shape
        m, P = jump.here.law(shape)
        return m + P.sqrt() * torch.randn((n, *shape), dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed + label))

    def draw(self, x: Tensor, jump: Jump, label: int) -> tuple[Tensor, Tensor]:
        return self.sampler.draw(x, jump, self.model, self.seed + label)

    def moments(self, jump: Jump) -> Moments:
        """Of x_next given `point`, one coordinate."""
        if jump not in self.known:
            self.known[jump] = self.sampler.moments(self.point(jump), jump, self.model, DRAWS, self.seed + 1)
        return self.known[jump]

    def silent(self, jump: Jump) -> bool:
        """No noise, and log_prob zero."""
        return self.moments(jump).noiseless and self.largest_log_prob(jump) == 0

    @torch.no_grad()
    def largest_log_prob(self, jump: Jump) -> float:
        """max |log_prob| of a draw and of a given x_next; infinite where it is NaN."""
        x = self.states(jump, 4, 2)
        x_next, drawn = self.draw(x, jump, 3)
        both = torch.cat([drawn, self.sampler.score(x_next, x, jump, self.model)]).abs()
        return inf if both.isnan().any() else both.max().item()

    @cached_property
    def eps(self) -> float:
        """The unit roundoff that the step works in: of its results' dtypes, and single at best where a change of 1e-8 in x is not felt linearly."""
        jump = self.jumps[0]
        x = self.point(jump)
        with torch.no_grad():
            x_next, _ = self.draw(x, jump, 4)
            curves = [torch.stack([f(x + shift) for shift in (0, 1e-8, 2e-8)]).double().flatten(1) for f in (
                lambda y: self.draw(y, jump, 4)[0], lambda y: self.sampler.score(x_next, y, jump, self.model))]
        fine = all((a - 2 * b + c).abs().max() <= 1e-3 * (c - a).abs().max() != 0 for a, b, c in curves)
        dtypes = [torch.float64 if fine else torch.float32, x_next.dtype, self.sampler.score(x_next, x, jump, self.model).dtype]
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def slack(self, jump: Jump, x: Tensor) -> float:
        """Rounding of a log_prob of x's coordinates: an error eps |x| is |x|/std of the noise."""
        return max(1e-9, 8 * self.eps * x[0].numel() * (1 + x.abs().max().item() / max(self.moments(jump).std.item(), NOISELESS)))

    @torch.no_grad()
    def slice(self, jump: Jump) -> Slice:
        """The density given `point`, from its mode out to 12 of its own standard deviations, by the trapezoid rule."""
        x, near = self.point(jump), self.moments(jump)

        def log_prob(at: Tensor) -> Tensor:
            nodes = at.reshape(-1, *x.shape[1:])
            return self.sampler.score(nodes, x.expand_as(nodes), jump, self.model).double()

        centre, width = near.mean.item(), max(near.std.item(), 1e-3)
        for _ in range(3):  # Newton for the mode; of a Gaussian the first is exact
            left, middle, right = log_prob(centre + width * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)).tolist()
            if not (curvature := left - 2 * middle + right) < 0:
                return Slice(x, nan, nan, nan, nan)
            centre, width = centre - width * (right - left) / (2 * curvature), width / sqrt(-curvature)
        nodes = centre + width * torch.linspace(-12, 12, 481, dtype=torch.float64)
        step = 0.05 * width
        p = log_prob(nodes).exp() * step
        mass = p.sum().item()
        mean = (p @ nodes).item() / mass
        return Slice(nodes.reshape(-1, *x.shape[1:]), step, mass, mean, sqrt((p @ (nodes - mean).square()).item() / mass))

    # ------------------------------------------------------------------------------------------------ verdicts

    def exact(self, topic: str, what: str, jumps: Sequence[Jump], measured: ArrayLike, expected: ArrayLike, tolerance: ArrayLike) -> Verdict:
        """|measured - expected| <= tolerance at every jump; the row shows the worst."""
        m, e, allowed = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (measured, expected, tolerance)))
        with np.errstate(invalid="ignore"):
            share = np.abs(m - e) / allowed
        worst = int(np.argmax(np.where(np.isnan(share), inf, share)))
        told = "" if np.isfinite(m[worst] + e[worst]) else "; log_prob has no value, or no maximum, there"
        return Verdict(topic, self.sampler.name, "exact", m[worst], e[worst], allowed[worst], None, bool(share[worst] <= 1),
                       f"{what}; worst at {jumps[worst]}{told}")

    def sampled(self, topic: str, what: str, test: MeanTest) -> Verdict:
        """A mean over draws; one that holds says how large an error it would have shown, one that fails how far off it is."""
        told = f"{what}: {test.mean:.3g} where {test.expected:g} is right, "
        if test.holds:
            told = f"{what}; an error of {test.resolves:.2g} would show with probability {1 - MISS:g}, a smaller one may not"
        elif test.standard_error <= ALIKE * abs(test.mean - test.expected):
            told += "and the draws are all alike"
        else:
            told += f"{abs(test.z):.1f} standard errors off"
        allowed = test.threshold * test.standard_error
        return Verdict(topic, self.sampler.name, "monte_carlo", test.mean, test.expected, allowed, test.z, test.holds, told)

    def order(self, topic: str, what: str, length: ArrayLike, error: ArrayLike, slope: float) -> Verdict:
        lengths, errors = np.asarray(length), np.asarray(error)
        told = f"{what}: {', '.join(f'{e:.2g}' for e in errors)} over {', '.join(f'{d:.2g}' for d in lengths)}"
        return Verdict(topic, self.sampler.name, "limit", slope, 1.0, LEAST_ORDER, None, slope >= 1 - LEAST_ORDER, told)

    def skipped(self, topic: str, reason: str) -> Verdict:
        return Verdict(topic, self.sampler.name, "skipped", None, None, None, None, None, reason)


# ---------------------------------------------------------------------------------------------------- the checks


def density(bench: Bench) -> Iterator[Verdict]:
    r"""exp(log_prob) integrates to 1 over one coordinate, and log_prob is a sum over coordinates, not their mean.

        int exp( log p(x' | x) ) dx' = 1 in one dimension;      log p(k copies of x' | k copies of x) = k log p(x' | x)

    Source: theory.md, sections 4 and 16.   Checked: tests/test_audit.py::test_planted_errors_are_caught_by_the_check_meant_for_them
    """
    slices = [bench.slice(jump) for jump in bench.jumps]
    yield bench.exact("density", "exp(log_prob) integrates to 1 over a coordinate", bench.jumps, [s.mass for s in slices], 1.0,
                      max(SINGLE, 1e4 * bench.eps))
    shape, rows = bench.sampler.shape, []
    copies = (1, *shape[:-1], max(2, shape[-1] // 2))
    with torch.no_grad():
        for jump in bench.jumps:
            x = bench.point(jump, 2)
            x_next = bench.draw(x, jump, 5)[0]
            one, many = (bench.sampler.score(y_next, y, jump, bench.model).item() for y_next, y in (
                (x_next, x), (x_next.repeat(copies), x.repeat(copies))))
            rows.append((many, prod(copies) * one, bench.slack(jump, x.repeat(copies))))
    yield bench.exact("density", f"log_prob of {prod(copies)} copies of two coordinates is {prod(copies)} times theirs: a sum, not a mean",
                      bench.jumps, *zip(*rows, strict=True))


def noise(bench: Bench, topic: str = "noise", jumps: Sequence[Jump] | None = None) -> Iterator[Verdict]:
    """The density that log_prob says has the mean and the std of what is drawn.

    Exact where the noise is torch.randn(x.shape, generator=generator), else by sampling.
    Source: theory.md, section 4.   Checked: tests/test_audit.py::test_planted_errors_are_caught_by_the_check_meant_for_them
    """
    jumps = bench.jumps if jumps is None else jumps
    slices, drawn = [bench.slice(jump) for jump in jumps], [bench.moments(jump) for jump in jumps]
    mean, std = "draws have the mean of log_prob's density", "draws have the {} of log_prob's density"
    if all(found.exact for found in drawn):
        relative = max(1e-7, 1e4 * bench.eps)
        slack = [relative * s.std + 8 * bench.eps * abs(s.mean) for s in slices]
        yield bench.exact(topic, mean, jumps, [m.mean.item() for m in drawn], [s.mean for s in slices], slack)
        yield bench.exact(topic, std.format("std"), jumps, [m.std.item() for m in drawn], [s.std for s in slices], slack)
    else:
        z = np.stack([(_draws(bench, jump) - said.mean) / said.std for jump, said in zip(jumps, slices, strict=True)], 1)
        yield bench.sampled(topic, f"{mean}, in units of its std", mean_test(z, 0.0))
        yield bench.sampled(topic, f"{std.format('variance')}, in units of it", mean_test(z**2, 1.0))


@torch.no_grad()
def _draws(bench: Bench, jump: Jump) -> np.ndarray:
    """(DRAWS,) of x_next given `point`."""
    x = bench.point(jump).expand(DRAWS, *bench.sampler.axes(1))
    return bench.draw(x, jump, 1)[0].double().flatten().numpy()


def ratio(bench: Bench) -> Iterator[Verdict]:
    r"""Before any update, what is scored is what was drawn: ratio 1, and its gradient the score.

        exp( log p(x' | x) when given - log p(x' | x) when drawn ) = 1,      d log p/d theta by autograd = by differences

    Source: theory.md, section 7.   Checked: tests/test_audit.py::test_planted_errors_are_caught_by_the_check_meant_for_them
    """
    ratios, gaps, drawn_gaps = [], [], []
    for jump in bench.jumps:
        x = bench.states(jump, 8, 6)
        with torch.no_grad():
            x_next, drawn = bench.draw(x, jump, 7)
            away = (bench.sampler.score(x_next, x, jump, bench.model) - drawn).double()
        ratios.append((away[away.abs().nan_to_num(inf).argmax()].clamp(-50, 50).exp().item(), bench.slack(jump, x)))
        x = bench.states(jump, 8, 6, bench.sampler.axes(1))  # few coordinates: differences go wrong where they cross a bound of a clipped one
        x_next, drawn = bench.draw(x, jump, 7)
        slope = _gradient(bench.sampler.score(x_next.detach(), x, jump, bench.model), bench.model)
        gaps.append(_relative(slope, _differences(bench, x_next.detach(), x, jump)))
        if drawn.requires_grad:
            drawn_gaps.append(_relative(_gradient(drawn, bench.model), slope))
    yield bench.exact("ratio", "exp(log_prob given - log_prob drawn) before any update", bench.jumps, [r for r, _ in ratios], 1.0,
                      [s for _, s in ratios])
    loose = max(1e-6, 1e5 * bench.eps)
    yield bench.exact("ratio", "autograd of a given x_next's log_prob against differences, relative", bench.jumps, gaps, 0.0, loose)
    if len(drawn_gaps) == len(bench.jumps):
        yield bench.exact("ratio", "autograd of a drawn log_prob (x_next held fixed) against that of the given one, relative", bench.jumps,
                          drawn_gaps, 0.0, loose)
    else:
        yield bench.skipped("ratio", "the log_prob of a draw carries no gradient: nothing to check of it")


def _gradient(value: Tensor, model: nn.Module) -> Tensor:
    """d sum(value)/d theta, zero where value does not depend on it."""
    theta = next(iter(model.parameters()))
    found = torch.autograd.grad(value.sum(), theta, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(theta) if found is None else found.double()


@torch.no_grad()
def _differences(bench: Bench, x_next: Tensor, x: Tensor, jump: Jump) -> Tensor:
    """The same by central differences, exact up to rounding where log_prob is quadratic in theta."""
    h = bench.eps ** (1 / 3)

    def total(j: int, shift: float) -> Tensor:
        theta = [value + shift * (i == j) for i, value in enumerate(THETA)]
        return bench.sampler.score(x_next, x, jump, bench.sampler.network(theta)).double().sum()

    return torch.stack([(total(j, h) - total(j, -h)) / (2 * h) for j in range(len(THETA))])


def _relative(measured: Tensor, expected: Tensor) -> float:
    return ((measured - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def divergence(bench: Bench) -> Iterator[Verdict]:
    r"""kl is the KL divergence, in nats, between the densities that log_prob says under the model and under its reference; and so is its gradient.

        kl = int p (log p - log p_ref) dx',      d kl/d theta,      kl of k copies = k kl

    Source: theory.md, sections 4 and 14.   Checked: tests/test_audit.py::test_planted_errors_are_caught_by_the_check_meant_for_them
    """
    if bench.sampler.kl is None:
        for what in ("nats", "gradient", "a sum over coordinates"):
            yield bench.skipped("kl", f"{what}: no function kl(x, t, t_next, model, reference) beside the step")
        return
    shape, values, slopes, sums = bench.sampler.shape, [], [], []
    copies = (1, *shape[:-1], shape[-1] + 1)
    for jump in bench.jumps:
        x = bench.point(jump)
        said, expected = bench.sampler.divergence(x, jump, bench.model, bench.reference), _quadrature_kl(bench, jump)
        values.append((said.item(), expected.item()))
        slopes.append(_relative(_gradient(said, bench.model), _gradient(expected, bench.model)))
        with torch.no_grad():
            sums.append((bench.sampler.divergence(x.repeat(copies), jump, bench.model, bench.reference).item(), prod(copies) * said.item()))
    relative = max(1e-7, 1e4 * bench.eps)
    (said_all, expected_all), (many, times_one) = zip(*values, strict=True), zip(*sums, strict=True)
    yield bench.exact("kl", "kl in nats against int p (log p - log p_ref), one coordinate", bench.jumps, said_all, expected_all,
                      relative * np.abs(expected_all))
    yield bench.exact("kl", "autograd of kl against that of the integral, relative", bench.jumps, slopes, 0.0, max(1e-6, 1e5 * bench.eps))
    yield bench.exact("kl", f"kl of {prod(copies)} copies of a coordinate is {prod(copies)} times its own: a sum, not a mean", bench.jumps, many,
                      times_one, relative * np.abs(times_one))


def _quadrature_kl(bench: Bench, jump: Jump) -> Tensor:
    """int p (log p - log p_ref), differentiable in the model; both densities normalised on the nodes, so that constants do not matter."""
    nodes, width, *_ = bench.slice(jump)
    x = bench.point(jump).expand_as(nodes)
    log_p, log_ref = (bench.sampler.score(nodes, x, jump, model).double() for model in (bench.model, bench.reference))
    log_p, log_ref = (log - (log.logsumexp(0) + np.log(width)) for log in (log_p, log_ref))
    return (width * log_p.exp() * (log_p - log_ref)).sum()


def batch(bench: Bench) -> Iterator[Verdict]:
    """A row's result is its own: the same in any part of the batch, with noise of its own, from the generator alone.

    Source: theory.md, section 7.   Checked: tests/test_audit.py::test_planted_errors_are_caught_by_the_check_meant_for_them
    """
    scored, moved, again, products = [], [], [], []
    with torch.no_grad():
        for jump in bench.jumps:
            x = bench.states(jump, 6, 8)
            x_next, _ = bench.draw(x, jump, 9)
            whole, *parts = (bench.sampler.score(x_next[part], x[part], jump, bench.model)
                             for part in (slice(6), slice(1), slice(1, 3), slice(3, 6)))
            scored.append(((torch.cat(parts) - whole).abs().max().item(), bench.slack(jump, x)))
            others = torch.cat([x[:1], x[1:] + 1])
            moved.append(((bench.draw(others, jump, 9)[0] - x_next)[0].abs().max().item(), 64 * bench.eps * x.abs().max().item()))
            again.append((bench.sampler.draw(x, jump, bench.model, bench.seed + 9, elsewhere=bench.seed + 12)[0] - x_next).abs().max().item())
            if not bench.moments(jump).noiseless:
                products.append(_neighbours(bench, jump))
    yield bench.exact("batch", "log_prob of a batch in parts against the whole", bench.jumps, *_columns(scored))
    yield bench.exact("batch", "x_next of a row when the other rows change", bench.jumps, *_columns(moved))
    yield bench.exact("batch", "x_next drawn again from the same generator", bench.jumps, again, 0.0, 64 * bench.eps)
    what = "correlation of the noise of two rows, and of two coordinates"
    if products:
        yield bench.sampled("batch", what, mean_test(np.concatenate(products, axis=1), 0.0))
    else:
        yield bench.skipped("batch", f"{what}: no step adds noise")


def _columns(rows: Sequence[tuple[float, float]]) -> tuple[list[float], float, list[float]]:
    return [gap for gap, _ in rows], 0.0, [slack for _, slack in rows]


def _neighbours(bench: Bench, jump: Jump, n: int = 256) -> np.ndarray:
    """(n^2/2, 2) products of standardised draws: of neighbouring rows, and of neighbouring coordinates, of n rows of n coordinates.

    One where all are one and the same, as of a noise that is drawn once for a batch.
    """
    x = bench.point(jump, n).expand(n, *bench.sampler.axes(n))
    y = bench.draw(x, jump, 10)[0].double().reshape(n, n // 2, 2)  # the law of coordinates is that of every other one
    spread = y.std((0, 1))
    z = torch.where(spread > NOISELESS, (y - y.mean((0, 1))) / spread.clamp_min(NOISELESS), torch.ones_like(y)).reshape(n, n)
    return torch.stack([(z[::2] * z[1::2]).flatten(), (z[:, ::2] * z[:, 1::2]).flatten()], 1).numpy()


def last_step(bench: Bench) -> Iterator[Verdict]:
    """The last step's log_prob has the variance of what it draws (none, and zero, where it adds no noise), and its error vanishes with its length.

    Source: theory.md, sections 1 and 11.   Checked: tests/test_audit.py::test_planted_errors_are_caught_by_the_check_meant_for_them
    """
    jump = bench.last
    if bench.moments(jump).noiseless:
        yield bench.exact("last_step", "it adds no noise, so that it has no density: |log_prob| must be 0", [jump], [bench.largest_log_prob(jump)],
                          0.0, 1e-9)
    else:
        yield from noise(bench, "last_step", [jump])
    grids = list(_coarser(bench))
    jumps = [grid.jumps[-1] for grid in grids]
    lengths = [jump.here.noise - jump.there.noise for jump in jumps]
    if len(jumps) < len(COARSER) or len({round(length, 12) for length in lengths}) < len(lengths):
        yield bench.skipped("last_step", "order of its error: too few steps, or coarser grids end in the same last step")
        return
    defects = [_defect(grid, jump, bench.seed) for grid, jump in zip(grids, jumps, strict=True)]
    yield from _order(bench, "last_step", "what it adds to the law's error, over its length in sigma^2/(alpha^2 + sigma^2)", lengths, defects,
                      lambda: float(np.polyfit(np.log(lengths), np.log(defects), 1)[0]))


def law(bench: Bench) -> Iterator[Verdict]:
    r"""Weak order: what the steps add to the error of the exact law, taken together, vanishes with their number.

        sum_i sum_j |m_j - m_j'|/sd_j' + |P_j - P_j'|/P_j',      m, P after a step from the exact law of t, m', P' the exact ones at t_next

    A step of global order 1 adds O(D^2), N of them O(D); one with a wrong mean or a wrong variance adds O(D), and the sum does not vanish.
    Source: theory.md, sections 1, 2 and 12.   Checked: tests/test_audit.py::test_planted_errors_are_caught_by_the_check_meant_for_them
    """
    grids = list(_coarser(bench))
    if len(grids) < len(COARSER):
        yield bench.skipped("law", f"weak order: expected at least {FEWEST} steps to compare with coarser grids, got {len(bench.sampler.jumps)}")
        return
    defects = [sum(_defect(grid, jump, bench.seed) for jump in grid.jumps) for grid in grids]
    lengths = [1 / len(grid.jumps) for grid in grids]
    yield from _order(bench, "law", "weak order of the error that the steps add to the exact law, over 1/N", lengths, defects,
                      lambda: fitted_order(np.asarray(lengths), np.asarray(defects)).slope)


def _coarser(bench: Bench) -> Iterator[Sampler]:
    """The sampler with 1, 2, 4 and 8 times fewer steps; itself alone when it has too few."""
    few = len(bench.sampler.jumps) < FEWEST
    return (bench.sampler.coarser(k) for k in (COARSER[:1] if few else COARSER))


def _order(bench: Bench, topic: str, what: str, lengths: list[float], defects: list[float], slope: Callable[[], float]) -> Iterator[Verdict]:
    if not np.all(np.isfinite(defects)):
        yield bench.skipped(topic, f"{what}: x_next is not affine in x where the model is (clipping?), or its noise is not torch.randn(x.shape, "
                                   "generator=generator): no exact law")
    elif max(defects) <= 1e4 * bench.eps:
        yield Verdict(topic, bench.sampler.name, "exact", max(defects), 0.0, 1e4 * bench.eps, None, True, f"{what}: no error")
    else:
        yield bench.order(topic, what, lengths, defects, slope())


def _defect(grid: Sampler, jump: Jump, seed: int, draws: int = 16) -> float:
    """The error in law, relative to the exact one, of a step from the exact law; NaN where it is not known.

    Three nodes of Gauss-Hermite integrate mean and variance exactly when the step is affine in x, as the model is.
    """
    (m, P), (m_next, P_next) = (level.law(grid.axes(2)) for level in (jump.here, jump.there))
    nodes, weights = sqrt(3) * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([1, 4, 1], dtype=torch.float64) / 6
    points = m + P.sqrt() * nodes.reshape(-1, *(1,) * m.ndim)
    after = grid.moments(points, jump, grid.network(), draws, seed + 11)
    bend = (after.mean[1] - (after.mean[0] + after.mean[2]) / 2).abs().max()
    if not after.exact or bend > 1e-4 * points.abs().max():
        return nan
    mean = torch.tensordot(weights, after.mean, 1)
    variance = torch.tensordot(weights, (after.mean - mean).square() + after.std.square(), 1)
    return ((mean - m_next).abs() / P_next.sqrt() + (variance - P_next).abs() / P_next).sum().item()


# ---------------------------------------------------------------------------------------------------- the command

CHECKS: tuple[Callable[[Bench], Iterator[Verdict]], ...] = (density, noise, ratio, divergence, batch, last_step, law)


def audit(reference: str, seed: int = 0, out: Path | None = None, stream: TextIO | None = None) -> list[Verdict]:
    """Audit the step called NAME in FILE.py, from "FILE.py:NAME": print the table, write OUT/verdicts.json if asked to, return the verdicts.

    Source: theory.md, section 0.   Checked: tests/test_audit.py::test_command
    """
    stream = stream or sys.stdout
    if check.integer("seed", seed, at_least=0) >= 2**31:
        raise ValueError(f"seed: expected an integer below 2^31, got {seed}")
    folder = None if out is None else writable(out)
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        bench = Bench(sampler_of(reference), seed)
        width = shutil.get_terminal_size((200, 24)).columns if stream.isatty() else 10**6
        print(_heading(bench), report.header("check of", "step"), sep="\n", file=stream)
        rows = []
        for row in report.timed(row for topic in CHECKS for row in topic(bench)):
            print(report.line(replace(row, problem=row.problem[:16]), width), file=stream, flush=True)
            rows.append(row)
    if folder is not None:
        write_json(folder / "verdicts.json", [row.record() for row in rows])
    print(_summary(rows, time.perf_counter() - started), file=stream)
    return rows


def _heading(bench: Bench) -> str:
    jumps = bench.sampler.jumps
    precision = "double" if bench.eps < 1e-12 else "single" if bench.eps < 1e-5 else "half"
    return (f"{bench.sampler.name}: {len(jumps)} steps, t = {float(jumps[0].t):g} ... {float(jumps[-1].t_next):g}, x (n, "
            f"{', '.join(map(str, bench.sampler.shape))}), {precision} precision; its density is looked at from t = "
            f"{', '.join(f'{float(jump.t):g}' for jump in bench.jumps)}")


def _summary(rows: Sequence[Verdict], seconds: float) -> str:
    judged = [row for row in rows if row.holds is not None]
    failed = [row for row in judged if not row.holds]
    sampled = sum(row.check == "monte_carlo" for row in judged)
    lines = ["", f"{len(judged) - len(failed)} of {len(judged)} verdicts hold; {len(rows) - len(judged)} skipped; {seconds:.1f} s; "
             f"{sampled} Monte Carlo at a false alarm of {FALSE_ALARM:g} each"]
    return "\n".join(lines + [f"FAIL {row.theorem} ({row.check}): {row.reason}{_found(row)}" for row in failed])


def _found(row: Verdict) -> str:
    """Measured and wanted, where the reason does not tell them already."""
    if row.check == "monte_carlo":
        return ""
    return f": {row.measured:.6g}, wanted {f'at least {LEAST_ORDER:g}' if row.check == 'limit' else f'{row.expected:.6g}'}"
