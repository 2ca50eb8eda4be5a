r"""Path-steps per core-second of the compiled chain, beside its peers, in one run on one pinned core.

    python benchmarks/engine.py [--quick] [--out DIR]          about 6 minutes; --quick half a minute

W1: VP with beta from 0.1 to 20, Gaussian data, pre-trained (affine) score, 1000 uniform steps, terminal state kept; d = 1, 2, 8 with
isotropic data, and d = 8 with a dense covariance. W2: a mixture of 8 components in the plane (the product of two and four on the
axes, so that its chain is known exactly), 500 steps. W3: sampled actions of an affine policy in 16 time bins, d = 2, 200 steps, the
sums of the score-function gradient kept for every path.

Peers: the same loops in C++ (engine.cpp, built here with g++ if there is one), with the library's own Philox words, 32 and 64 bits
wide, and with a lane generator; NumPy, torch eager, torchsde, jax's scan and diffrax. What is not installed is skipped and named.
Before it is timed, a version's terminal mean and variance (W3: its gradient) must agree with the chain's exact ones to 5.5 standard
errors. Rounds are interleaved; rates are from medians of processor time: on a busy machine wall time would measure the others.

Writes engine.csv (a row per version), ratios.csv (a row per bar) and engine.png. Feeds README.md and docs/results.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # One thread each, before the libraries that count cores are imported: idle BLAS threads spin on the pinned core.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import csv
import ctypes
import importlib.util
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ctrl
import numpy as np
import tyro
from ctrl.estimators import ScoreFunction
from ctrl.policy import TimeBins
from ctrl.rollout import OnePass, one_pass
from numba import njit
from tqdm import tqdm

SEED, BINS, SHIFT = 2024, 16, np.array([0.1, -0.2])
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-shared", "-fPIC")
Array = np.ndarray[Any, Any]
Call = Callable[[int], Array]
PHILOX, WIDE, LANES = "C++ Philox", "C++ Philox, wide", "C++ lanes"


@dataclass(frozen=True)
class Version:
    """One implementation of a workload: call(seed) -> terminal states (n, d), or gradient samples (n, p) in W3."""

    name: str
    bits: int
    paths: int
    call: Call


@dataclass(frozen=True)
class Row:
    """One version on one workload; rate in million path-steps per core-second."""

    workload: str
    version: str
    bits: int
    paths: int
    steps: int
    rounds: int
    seconds: float
    rate: float
    slowest_over_fastest: float
    largest_z: float


def kind(bits: int) -> Any:
    return np.float32 if bits == 32 else np.float64


# ---- workloads ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """W1: x' = A x + c + s xi."""

    name: str
    dim: int
    steps: int
    paths: int
    dense: bool = False

    @cached_property
    def problem(self) -> ctrl.Problem:
        root = np.random.default_rng(0).normal(size=(self.dim, self.dim)) / 2
        cov = root @ root.T / self.dim + 0.1 * np.eye(self.dim) if self.dense else 0.25 * np.eye(self.dim)
        return ctrl.Problem(ctrl.VP(0.1, 20.0), ctrl.Gaussian(np.ones(self.dim), cov), ctrl.LinearReward(np.ones(self.dim)), kl_weight=1.0)

    @cached_property
    def chain(self) -> tuple[Array, Array, Array]:
        """A (N, d, d), or (N, d) when it is diagonal, c (N, d), s (N,)."""
        grid = self.problem.grid(self.steps)
        co, pre = self.problem.coefficients(grid), self.problem.pretrained(grid).parts(grid)
        A = (1 - co.dt * co.f)[:, None, None] * np.eye(self.dim) + (co.dt * co.h)[:, None, None] * pre.K
        return A if self.dense else np.einsum("kii->ki", A), (co.dt * co.h)[:, None] * pre.k, co.noise

    @cached_property
    def law(self) -> tuple[Array, Array]:
        """Exact mean and variance of every coordinate of X_N."""
        grid = self.problem.grid(self.steps)
        terminal = ctrl.exact.evaluate(self.problem, self.problem.pretrained(grid), grid).terminal
        return terminal.mean, np.diag(terminal.cov)

    def z(self, x: Array) -> float:
        return moments_z(x, *self.law)

    def ours(self, bits: int) -> Version:
        return simulated("ctrl.simulate", self, self.problem.pretrained(self.problem.grid(self.steps)), bits)

    def own_action(self, bits: int) -> Version:
        """The same score as a user's @njit function."""
        grid = self.problem.grid(self.steps)
        K, k = self.problem.pretrained(grid).parts(grid)[:2]
        theta = np.concatenate([np.einsum("kii->ki", K)[:, 0], k[:, 0]])
        return simulated("ctrl.simulate, own action", self, ctrl.CallablePolicy(own_action, theta, dim=self.dim), bits)

    def compiled(self, library: ctypes.CDLL, generator: str, bits: int) -> Call:
        function = getattr(library, f"{generator}_{'dense' if self.dense else 'affine'}_{self.dim}_{bits}")
        arrays = [np.ascontiguousarray(a, kind(bits)) for a in self.chain]
        return compiled_chain(function, arrays, self, bits)

    def peers(self) -> Iterator[Version]:
        if self.dense:
            return
        A, c, s = self.chain
        batch = max(2**12, self.paths // 4)
        yield Version("NumPy", 64, batch, numpy_loop(batch, self.dim, self.steps, lambda x, xi, i: A[i] * x + (c[i] + s[i] * xi)))
        if installed("torch"):
            yield Version("torch eager", 32, batch, torch_affine(batch, A, c, s))
        if installed("torchsde"):
            for name, tuned in (("torchsde", False), ("torchsde, tree sized to dt", True)):
                yield Version(name, 32, batch, torchsde_euler(batch, self, tuned))
        if installed("jax"):
            yield Version("jax scan", 32, batch, jax_scan(batch, A, c, s))
        if installed("jax") and installed("diffrax"):
            yield Version("diffrax", 32, batch, diffrax_euler(batch, self))


@njit(cache=True, error_model="numpy")
def own_action(t: float, x: Array, theta: Array) -> Array:
    i = min(int(t * (theta.size // 2) + 0.5), theta.size // 2 - 1)
    return theta[i] * x + theta[theta.size // 2 + i]


@dataclass(frozen=True)
class Mixture:
    """W2: x' = A x + s xi + drive score(x), the product of mixtures on the axes."""

    name: str
    steps: int
    paths: int
    dim: int = 2
    axes = (ctrl.GaussianMixture([0.4, 0.6], [[-1.0], [0.8]], [[[0.1]], [[0.2]]]),
            ctrl.GaussianMixture([0.1, 0.2, 0.3, 0.4], [[-1.5], [-0.4], [0.5], [1.4]], [[[0.05]], [[0.1]], [[0.08]], [[0.1]]]))

    @cached_property
    def problem(self) -> ctrl.Problem:
        a, b = self.axes
        pairs = [(i, j) for i in range(a.weights.size) for j in range(b.weights.size)]
        data = ctrl.GaussianMixture([a.weights[i] * b.weights[j] for i, j in pairs], [[a.means[i, 0], b.means[j, 0]] for i, j in pairs],
                                    [np.diag([a.covs[i, 0, 0], b.covs[j, 0, 0]]) for i, j in pairs])
        return ctrl.Problem(ctrl.VP(0.1, 20.0), data, ctrl.LinearReward(np.ones(2)), kl_weight=1.0)

    @cached_property
    def law(self) -> tuple[Array, Array]:
        lines = [ctrl.Problem(ctrl.VP(0.1, 20.0), axis, ctrl.LinearReward(np.ones(1)), kl_weight=1.0) for axis in self.axes]
        ends = [ctrl.exact.evaluate(line, line.pretrained(line.grid(self.steps)), line.grid(self.steps)).terminal for line in lines]
        return np.concatenate([end.mean for end in ends]), np.array([end.cov[0, 0] for end in ends])

    def z(self, x: Array) -> float:
        return moments_z(x, *self.law)

    def ours(self, bits: int) -> Version:
        return simulated("ctrl.simulate", self, self.problem.pretrained(self.problem.grid(self.steps)), bits)

    @cached_property
    def components(self) -> Array:
        """(N, K, 6): mean, precision (three numbers), log-normaliser."""
        laws = self.problem.pretrained(grid := self.problem.grid(self.steps)).parts(grid).laws
        return np.stack([np.column_stack([law.means, law.precisions[:, 0], law.precisions[:, 1, 1], law.log_normalisers]) for law in laws])

    def compiled(self, library: ctypes.CDLL, generator: str, bits: int) -> Call:
        function, c = getattr(library, f"{generator}_mixture_{bits}"), self.problem.coefficients(self.problem.grid(self.steps))
        arrays = [np.ascontiguousarray(a, kind(bits)) for a in (1 - c.dt * c.f, c.dt * c.h, c.noise, self.components)]
        return compiled_chain(function, arrays, self, bits)

    def peers(self) -> Iterator[Version]:
        c, q, batch = self.problem.coefficients(self.problem.grid(self.steps)), self.components, self.paths // 8

        def score(x: Array, i: int) -> Array:
            gap = x[:, None] - q[i, :, :2]
            pull = np.stack([q[i, :, 2] * gap[..., 0] + q[i, :, 3] * gap[..., 1], q[i, :, 3] * gap[..., 0] + q[i, :, 4] * gap[..., 1]], axis=2)
            level = q[i, :, 5] - 0.5 * np.sum(gap * pull, axis=2)
            w = np.exp(level - level.max(axis=1, keepdims=True))
            return -np.einsum("nk,nkd->nd", w / w.sum(axis=1, keepdims=True), pull)

        yield Version("NumPy", 64, batch, numpy_loop(batch, 2, self.steps, lambda x, xi, i: (1 - c.dt[i] * c.f[i]) * x
                                                     + c.dt[i] * c.h[i] * score(x, i) + c.noise[i] * xi))
        if installed("torch"):
            yield Version("torch eager", 32, batch, torch_mixture(batch, q, 1 - c.dt * c.f, c.dt * c.h, c.noise))


@dataclass(frozen=True)
class GradientSums:
    """W3: sampled actions, and for every path S and P, of which S G + P is the score-function gradient."""

    name: str
    steps: int
    paths: int
    dim: int = 2

    @cached_property
    def setup(self) -> tuple[ctrl.Problem, ctrl.BasisPolicy, ctrl.TimeGrid]:
        problem = ctrl.Problem(ctrl.VP(0.1, 20.0), ctrl.Gaussian([1.0, -0.5], [[0.6, 0.2], [0.2, 0.3]]),
                               ctrl.QuadraticReward(np.diag([1.0, 0.5]), [-0.5, 1.0]), kl_weight=0.4)
        W, w = np.tile([[0.1, 0.05], [0.02, -0.1]], (BINS, 1, 1)), np.tile(SHIFT, (BINS, 1))
        return problem, ctrl.BasisPolicy(problem, TimeBins(BINS), W, w, 0.3 * np.eye(2)), problem.grid(self.steps)

    @cached_property
    def gradient(self) -> Array:
        return ctrl.exact.evaluate(*self.setup).gradient.theta

    def z(self, samples: Array) -> float:
        samples = samples.astype(np.float64)
        return float(np.max(np.abs(samples.mean(axis=0) - self.gradient) / (samples.std(axis=0) / np.sqrt(len(samples)))))

    def ours(self, bits: int) -> Version:
        def call(seed: int) -> Array:
            chunks = one_pass(*self.setup, ctrl.Noise(seed, self.paths), OnePass(), kind(bits), threads=1)
            return np.concatenate([G[:, None] * S + P for G, (S, P) in chunks])

        return Version("ctrl one pass", bits, self.paths, call)

    def compiled(self, library: ctypes.CDLL, generator: str, bits: int) -> Call:
        problem, policy, grid = self.setup
        c, (K, k, _), pre = problem.coefficients(grid), policy.parts(grid), problem.pretrained(grid).parts(grid)
        gain, w = c.dt * c.h, np.sqrt(2 * c.kappa * c.dt)
        A = (1 - c.dt * c.f)[:, None, None] * np.eye(2) + gain[:, None, None] * K
        flat, root, price = (grid.steps, -1), np.sqrt(0.3), problem.kl_weight * c.discount
        step = np.column_stack([A.reshape(flat), gain[:, None] * k, (w[:, None, None] * (K - pre.K)).reshape(flat), w[:, None] * (k - pre.k),
                                c.noise, gain * root, w * root, gain / c.noise, -price * w, price])
        bins = np.array([np.argmax(TimeBins(BINS)(float(t))) for t in grid.times[:-1]], np.int32)
        function, table = getattr(library, f"{generator}_gradient_{bits}"), np.ascontiguousarray(step, kind(bits))
        order = np.array([*(6 * b + e for b in range(BINS) for e in range(4)), *(6 * b + 4 + e for b in range(BINS) for e in range(2))])

        def call(seed: int) -> Array:
            x, n = np.ascontiguousarray(ctrl.Noise(seed, self.paths).start(2), kind(bits)), self.paths
            spent, S, P = np.empty(n, kind(bits)), np.empty((n, 6 * BINS), kind(bits)), np.empty((n, 6 * BINS), kind(bits))
            function(ctypes.c_int64(n), ctypes.c_int(grid.steps), ctypes.c_uint64(seed), *map(pointer, [table, bins, x, spent, S, P]))
            G = c.final_discount * problem.reward.value(x.astype(np.float64)) - spent
            return (G[:, None] * S + P)[:, order]

        return call

    def peers(self) -> Iterator[Version]:
        def estimate(seed: int) -> Array:
            samples = ScoreFunction()(*self.setup, ctrl.Noise(seed, self.paths), dtype=np.float32).samples
            assert samples is not None
            return samples

        def trajectories(seed: int) -> Array:
            return np.concatenate([ScoreFunction().samples(run) for run in ctrl.estimators.runs(*self.setup, ctrl.Noise(seed, self.paths // 8))])

        yield Version("ctrl.ScoreFunction with covariance", 32, self.paths, estimate)
        yield Version("ctrl, whole trajectories in NumPy", 64, self.paths // 8, trajectories)


def simulated(name: str, work: Affine | Mixture, policy: Any, bits: int) -> Version:
    """`ctrl.simulate` of a workload's problem under a policy, on one thread."""
    problem, grid = work.problem, work.problem.grid(work.steps)

    def call(seed: int) -> Array:
        return ctrl.simulate(problem, policy, grid, ctrl.Noise(seed, work.paths), dtype=kind(bits), threads=1).terminal

    return Version(name, bits, work.paths, call)


def compiled_chain(function: Any, arrays: list[Array], work: Affine | Mixture, bits: int) -> Call:
    """A function of engine.cpp on a workload's coefficients: it takes the start and leaves the end."""

    def call(seed: int) -> Array:
        x = np.ascontiguousarray(ctrl.Noise(seed, work.paths).start(work.dim), kind(bits))
        function(ctypes.c_int64(work.paths), ctypes.c_int(work.steps), ctypes.c_uint64(seed), *map(pointer, [*arrays, x]))
        return x

    return call


# ---- peers -------------------------------------------------------------------------------------------------------------------


def pointer(a: Array) -> ctypes.c_void_p:
    return a.ctypes.data_as(ctypes.c_void_p)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def build(folder: Path) -> ctypes.CDLL | None:
    """engine.cpp for this machine, or None without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    subprocess.run([compiler, *FLAGS, "-o", str(folder / "engine.so"), str(SOURCE)], check=True)
    return ctypes.CDLL(str(folder / "engine.so"))


def numpy_loop(batch: int, dim: int, steps: int, step: Callable[[Array, Array, int], Array]) -> Call:
    def call(seed: int) -> Array:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((batch, dim))
        for i in range(steps):
            x = step(x, rng.standard_normal((batch, dim)), i)
        return x

    return call


def torch_affine(batch: int, A: Array, c: Array, s: Array) -> Call:
    """In place: x <- A x + s xi + c."""
    import torch

    torch.set_num_threads(1)
    slope, shift, scale = torch.tensor(A, dtype=torch.float32), torch.tensor(c, dtype=torch.float32), s.tolist()

    def call(seed: int) -> Array:
        generator = torch.Generator().manual_seed(seed)
        x, xi = torch.randn(batch, A.shape[1], generator=generator), torch.empty(batch, A.shape[1])
        for i in range(len(A)):
            x.mul_(slope[i]).add_(xi.normal_(generator=generator), alpha=scale[i]).add_(shift[i])
        return x.numpy()

    return call


def torch_mixture(batch: int, q: Array, A: Array, drive: Array, s: Array) -> Call:
    import torch

    torch.set_num_threads(1)
    means, constants = torch.tensor(q[..., :2], dtype=torch.float32), torch.tensor(q[..., 5], dtype=torch.float32)
    precisions = torch.tensor(q[..., [2, 3, 3, 4]].reshape(*q.shape[:2], 2, 2), dtype=torch.float32)

    def call(seed: int) -> Array:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 2, generator=generator)
        for i in range(len(A)):
            gap = x[:, None] - means[i]
            pull = torch.einsum("kab,nkb->nka", precisions[i], gap)
            weight = torch.softmax(constants[i] - 0.5 * (gap * pull).sum(-1), dim=1)
            score = -torch.einsum("nk,nkd->nd", weight, pull)
            x = float(A[i]) * x + float(drive[i]) * score + float(s[i]) * torch.randn(batch, 2, generator=generator)
        return x.numpy()

    return call


def torchsde_euler(batch: int, case: Affine, tuned: bool) -> Call:
    """The same chain by torchsde: float32, diagonal noise, coefficients from a table; `tuned` tells its Brownian tree dt.

    dt is a little more than 1/steps, so that the last step ends at 1 and rounding of times leaves no sliver of a step: a sliver
    makes torchsde rebuild its tree at that resolution, forty times slower.
    """
    import torch
    import torchsde

    torch.set_num_threads(1)
    slope, shift, scale, dt = *sde_table(case), (1 + 1e-4) / case.steps

    class Reverse(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def step(self, t: Any) -> int:
            return min(case.steps - 1, int(float(t) * case.steps + 0.5))

        def f(self, t: Any, y: Any) -> Any:
            i = self.step(t)
            return slope[i] * y + shift[i]

        def g(self, t: Any, y: Any) -> Any:
            return torch.full_like(y, scale[self.step(t)])

    def call(seed: int) -> Array:
        torch.manual_seed(seed)
        with torch.no_grad():
            start = torch.randn(batch, case.dim)
            tree = torchsde.BrownianInterval(0.0, 1.0, size=start.shape, dt=dt if tuned else None, entropy=seed)
            ends = torchsde.sdeint(Reverse(), start, torch.tensor([0.0, 1.0]), method="euler", dt=dt, bm=tree)
        return ends[-1].numpy()

    return call


def sde_table(case: Affine) -> tuple[list[float], list[float], list[float]]:
    """Drift slope and shift, and diffusion, of every step of isotropic W1."""
    c = case.problem.coefficients(case.problem.grid(case.steps))
    A, shift, s = case.chain
    return ((A[:, 0] - 1) / c.dt).tolist(), (shift[:, 0] / c.dt).tolist(), (s / np.sqrt(c.dt)).tolist()


def jax_scan(batch: int, A: Array, c: Array, s: Array) -> Call:
    import jax
    import jax.numpy as jnp

    table = tuple(jnp.asarray(a, jnp.float32) for a in (A, c, s))

    @jax.jit
    def ends(key: Any) -> Any:
        first, rest = jax.random.split(key)

        def step(x: Any, at: Any) -> Any:
            (slope, shift, scale), k = at
            return slope * x + (shift + scale * jax.random.normal(k, x.shape)), None

        return jax.lax.scan(step, jax.random.normal(first, (batch, A.shape[1])), (table, jax.random.split(rest, len(A))))[0]

    return lambda seed: np.asarray(ends(jax.random.key(seed)))


def diffrax_euler(batch: int, case: Affine) -> Call:
    import diffrax
    import jax
    import jax.numpy as jnp

    slope, shift, scale = (jnp.asarray(a, jnp.float32) for a in sde_table(case))

    def at(t: Any) -> Any:
        return jnp.clip((t * case.steps + 0.5).astype(int), 0, case.steps - 1)

    @jax.jit
    def ends(key: Any) -> Any:
        first, rest = jax.random.split(key)
        path = diffrax.UnsafeBrownianPath(shape=(batch, case.dim), key=rest)
        terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, _: slope[at(t)] * y + shift[at(t)]),
                                  diffrax.ControlTerm(lambda t, y, _: diffrax_diagonal(scale[at(t)], y), path))
        return diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, 1.0 / case.steps, jax.random.normal(first, (batch, case.dim)),
                                   adjoint=diffrax.DirectAdjoint(), max_steps=case.steps + 1).ys[-1]

    def diffrax_diagonal(scale: Any, y: Any) -> Any:
        import lineax

        return lineax.DiagonalLinearOperator(jnp.full_like(y, scale))

    return lambda seed: np.asarray(ends(jax.random.key(seed)))


# ---- the race ----------------------------------------------------------------------------------------------------------------


def moments_z(x: Array, mean: Array, variance: Array) -> float:
    """The largest |z| of the coordinates' means and second moments about the exact mean; its own spread is measured."""
    square, n = (x.astype(np.float64) - mean) ** 2, len(x)
    of_mean = (x.astype(np.float64).mean(axis=0) - mean) / np.sqrt(variance / n)
    of_square = (square.mean(axis=0) - variance) / (square.std(axis=0) / np.sqrt(n))
    return float(np.max(np.abs([of_mean, of_square])))


Workload = Affine | Mixture | GradientSums


def workloads(quick: bool) -> list[Workload]:
    """Batches are large enough for a call's overhead not to matter; quick mode has fewer steps, not smaller batches."""
    s = 10 if quick else 1
    return [Affine("W1 d=1", 1, 1000 // s, 2**16), Affine("W1 d=2", 2, 1000 // s, 2**15), Affine("W1 d=8", 8, 1000 // s, 2**13),
            Affine("W1 d=8 dense", 8, 1000 // s, 2**13, dense=True), Mixture("W2", 500 // s, 2**14), GradientSums("W3", 200 // s, 2**14)]


def versions(work: Workload, library: ctypes.CDLL | None) -> Iterator[Version]:
    for bits in (32, 64):
        yield work.ours(bits)
        if isinstance(work, Affine) and not work.dense:
            yield work.own_action(bits)
        if library is not None:
            for name, generator in ((PHILOX, "philox"), (WIDE, "wide"), (LANES, "lanes")):
                yield Version(name, bits, work.paths, work.compiled(library, generator, bits))
    yield from work.peers()


def race(work: Workload, library: ctypes.CDLL | None, rounds: int, seed: int) -> list[Row]:
    """Check and warm up, then time all versions in turn, `rounds` times."""
    entered, z = list(versions(work, library)), []
    for v in tqdm(entered, desc=f"{work.name}: laws", leave=False, disable=None):
        z.append(work.z(v.call(seed)))
        if not z[-1] < 5.5:
            raise ValueError(f"{work.name}, {v.name} float{v.bits}: expected the chain's law within 5.5 standard errors, got |z| = {z[-1]:.1f}")
    seconds: list[list[float]] = [[] for _ in entered]
    for r in tqdm(range(rounds), desc=f"{work.name}: rounds", leave=False, disable=None):
        for v, spent in zip(entered, seconds, strict=True):
            began = time.process_time()
            v.call(seed + 1 + r)
            spent.append(time.process_time() - began)
    return [Row(work.name, v.name, v.bits, v.paths, work.steps, rounds, m := statistics.median(s), v.paths * work.steps / m / 1e6,
                max(s) / min(s), worst) for v, s, worst in zip(entered, seconds, z, strict=True)]


@dataclass(frozen=True)
class Bar:
    """The ratio of two rates in one run, and what it should at least be."""

    workload: str
    bits: int
    peer: str
    ratio: float
    bar: float
    reached: bool


def bars(rows: list[Row]) -> Iterator[Bar]:
    """Ratios against each peer; the C++ loop with Philox is the faster of the two."""
    ours = {(r.workload, r.bits): r.rate for r in rows if r.version in ("ctrl.simulate", "ctrl one pass")}
    rate = {(r.workload, r.version, r.bits): r.rate for r in rows}
    for (work, bits), own in ours.items():
        if philox := [rate[key] for name in (PHILOX, WIDE) if (key := (work, name, bits)) in rate]:
            wanted = 0.60 if "dense" in work else 0.70 if bits == 64 or work == "W2" else 0.80
            yield bar(work, bits, "C++ Philox, the faster", own / max(philox), wanted)
        if work.startswith("W1") and "dense" not in work and (key := (work, LANES, bits)) in rate:
            yield bar(work, bits, LANES, own / rate[key], 0.60)
    for (work, name, bits), peer in rate.items():
        for of, least in {("torchsde", 32): 50.0, ("torch eager", 32): 5.0, ("jax scan", 32): 6.5, ("diffrax", 32): 15.0}.items():
            if work.startswith("W1") and (name, bits) == of:
                yield bar(work, 32, name, ours[work, 32] / peer, least)
        if work.startswith("W1") and name in ("torchsde", "NumPy"):
            yield bar(work, 64, f"{name} float{bits}", ours[work, 64] / peer, {"torchsde": 20.0, "NumPy": 6.0}[name])


def bar(work: str, bits: int, peer: str, ratio: float, least: float) -> Bar:
    return Bar(work, bits, peer, ratio, least, ratio >= least)


def figure(rows: list[Row], path: Path, machine: str) -> None:
    """Rates on a log axis, a panel per workload, ours on top; the number beside a bar is ours over it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r.workload for r in rows))
    fig, axes = plt.subplots(2, 3, figsize=(12, 8.5), layout="constrained")
    colors = {"ctrl": "#0072B2", "C++": "#E69F00"}
    for ax, name in zip(axes.flat, names, strict=False):
        here = sorted((r for r in rows if r.workload == name), key=lambda r: r.rate)
        ours = {r.bits: r.rate for r in here if r.version in ("ctrl.simulate", "ctrl one pass")}
        for y, r in enumerate(here):
            color = next((c for prefix, c in colors.items() if r.version.startswith(prefix)), "#999999")
            ax.barh(y, r.rate, color=color, edgecolor="black", linewidth=0.5, hatch="" if r.bits == 32 else "///")
            ax.text(r.rate * 1.08, y, f"{r.rate:,.3g}" + (f"  (ours / it: {ours[r.bits] / r.rate:.3g})" if r.rate not in ours.values() else ""),
                    va="center", fontsize=7)
        ax.set_yticks(range(len(here)), [f"{r.version} f{r.bits}" for r in here], fontsize=7)
        ax.set(xscale="log", title=name, xlabel="million path-steps per core-second")
        ax.set_xlim(min(r.rate for r in here) / 2, max(r.rate for r in here) * 400)
    fig.suptitle(f"One core, one run, medians; hatched: float64. {machine}", fontsize=9)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def environment(seed: int, compiler: str = "not used") -> dict[str, Any]:
    """What a number depends on: versions, machine, load, seed."""
    names = ("numba", "numpy", "torch", "torchsde", "jax", "diffrax")
    found = {name: version(name) if installed(name) else "not installed" for name in names}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        cpu += next((f" ({flag})" for flag in ("avx512f", "avx2") if f" {flag} " in " ".join(lines) + " "), "")
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {"ctrl": ctrl.__version__, "python": platform.python_version(), **found, "compiler": compiler, "machine": f"{cpu}, {platform.machine()}",
            "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "seed": seed}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(quick: bool = False, out: Path = Path("engine"), rounds: int = 7, seed: int = SEED) -> None:
    """Time all workloads; write engine.csv, ratios.csv and engine.png.

    Args:
        quick: a tenth of the steps, three rounds.
        out: the folder to write to.
        rounds: interleaved rounds per version.
        seed: of all noise.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        compiler = "none" if library is None else subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
        missing = [name for name in ("torchsde", "jax", "diffrax") if not installed(name)] + ([] if library else ["a C++ compiler"])
        print(f"skipped, not installed: {', '.join(missing)}" if missing else "all peers are installed")
        about = environment(seed, compiler)
        for work in workloads(quick):
            rows += race(work, library, 3 if quick else rounds, seed)
            write(out / "engine.csv", [{**asdict(row), **about} for row in rows])
            for row in sorted((r for r in rows if r.workload == work.name), key=lambda r: -r.rate):
                print(f"{row.workload:13s} {row.version:36s} float{row.bits} {row.rate:9.1f} M path-steps/s   spread {row.slowest_over_fastest:.2f}"
                      f"   |z| {row.largest_z:.1f}")
    found = list(bars(rows))
    write(out / "ratios.csv", [{**asdict(b), **about} for b in found])
    for b in found:
        print(f"{b.workload:13s} float{b.bits}  {b.ratio:7.2f} x {b.peer:24s} bar {b.bar:5.2f}   {'reached' if b.reached else 'MISSED'}")
    figure(rows, out / "engine.png", about["machine"])


if __name__ == "__main__":
    tyro.cli(main)
