r"""Simulation of the chain under a policy: the same numbers whatever the chunking and the threads (theory.md, section 1)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import types
from numba.extending import is_jitted
from numpy.typing import DTypeLike

from ctrl import check
from ctrl.check import Array
from ctrl.kernels.chain import Cost, Exploration, Given, Motion, Own, Scores, Words, run
from ctrl.kernels.gradient import NO_VALUE, Collect
from ctrl.kernels.normals import LANES
from ctrl.kernels.own import first_class
from ctrl.kernels.threads import over_paths
from ctrl.laws import Gaussian, GaussianMixture, Law
from ctrl.noise import Noise, NoiseLike, QuadratureNoise, require_noise
from ctrl.policy import Parts, Policy, Terms
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

CHUNK_PATHS = 2**15  # paths at a time on counter noise
CHUNK_NUMBERS = 2**21  # numbers of an (n, N, d) array at a time where one is needed


@dataclass(frozen=True, eq=False)
class Paths:
    r"""Simulated paths of the chain under a policy.

        penalty = sum_i kappa_i D_i |a_i - s_i|^2      (nats in the mean for mean actions, eta > 0)
        objective = e^{-rho t_N} r(X_N) - lambda sum_i e^{-rho t_i} kappa_i D_i |a_i - s_i|^2 + gamma sum_i e^{-rho t_i} D_i H_i
        log_weight = sum_i u_i'xi_i + 1/2 |u_i|^2,     u_i = sqrt(2 kappa_i D_i) (a_i - s_i)

    terminal : (n, d)    reward, penalty, objective, log_weight : (n,)    weights : (n,) of quadrature noise, else None
    With trajectory=True: states (n, N + 1, d), noise_steps xi (n, N, d), actions (n, N, d); else None.
    With mean actions log_weight = log dP_theta/dP_pre along P_theta paths; with sampled actions, given the actions.
    H_i is the entropy of the policy's exploration, gamma the problem's entropy weight.
    Source: theory.md, sections 1 and 4.   Checked: tests/test_rollout.py::test_chain_is_its_specification
    """

    terminal: Array
    reward: Array
    penalty: Array
    objective: Array
    weights: Array | None
    log_ratio: Array | None
    states: Array | None = None
    noise_steps: Array | None = None
    actions: Array | None = None

    @property
    def log_weight(self) -> Array:
        """log dP_theta/dP_pre of each path, (n,), nats; ValueError at eta = 0."""
        if self.log_ratio is None:
            raise ValueError("eta: expected eta > 0 for log_weight (path measures are singular to one another at eta = 0), got 0")
        return self.log_ratio


def simulate(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, *, dtype: DTypeLike = np.float64,
             trajectory: bool = False, threads: int | None = None) -> Paths:
    r"""Euler-Maruyama paths of the controlled chain, a pure function of its arguments.

        X_{i+1} = X_i + ( -f_i X_i + h_i a_i ) D_i + eta g_i sqrt(D_i) xi_i,      a_i = mu_i(X_i)  or  mu_i(X_i) + L_i z_i

    dtype : precision of the states, float64 or float32 (rewards are always float64)
    trajectory : keep states, noise and actions too      threads : None for all cores; results do not depend on it
    Streams: noise is made inside the kernels and memory is that of the result, unless trajectories are kept or the noise
    is a quadrature or coarsened one (then a bounded chunk of it at a time). A CallablePolicy runs in NumPy, or in the kernels
    when its action is an @njit function; that is asked for blocks of 256 paths, in float64, and must answer for any x.
    Exact for the chain; against the continuous law the chain is of weak order 1.
    Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_chain_is_its_specification
    """
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    require_noise(noise)
    problem.check_policy(policy, grid)
    paths = _simulated(problem, policy, grid, noise, dtype, trajectory, threads)
    return replace(paths, actions=actions(policy, grid, noise, paths.states)) if paths.states is not None else paths


def trajectories(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: DTypeLike = np.float64) -> Paths:
    """`simulate` with states and noise, without `actions`: they follow from these.

    Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_actions_follow_from_states_and_noise
    """
    problem.check_policy(policy, grid)
    return _simulated(problem, policy, grid, noise, dtype, True, None)


def actions(policy: Policy, grid: TimeGrid, noise: NoiseLike, states: Array) -> Array:
    """a_i = mu_i(X_i), or mu_i(X_i) + L_i z_i, along the states (n, N + 1, d) of a noise's paths, (n, N, d).

    Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_actions_follow_from_states_and_noise
    """
    (n, _, d), factor = states.shape, policy.exploration_factor(grid)
    out, z = np.empty((n, grid.steps, d), states.dtype), None if factor is None else noise.actions(grid.steps, d).astype(states.dtype, copy=False)
    for i in range(grid.steps):
        out[:, i] = policy.mean(grid, i, states[:, i].astype(np.float64))
        if z is not None and factor is not None:
            out[:, i] += z[:, i] @ factor[i].T
    return out


def _simulated(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: DTypeLike, trajectory: bool, threads: int | None) -> Paths:
    if isinstance(noise, QuadratureNoise):
        noise.require(problem, policy, grid)
    kind = precision(dtype)
    if threads is not None:
        threads = check.integer("threads", threads, at_least=1)
    if trajectory:
        _require_memory(noise.paths, grid.steps, problem.dim, kind)
    chain = _Chain(problem, policy, grid, kind, threads)
    out = _Result(problem, grid, noise, kind, trajectory)
    size = chain.chunk(noise, trajectory)
    for begin in range(0, noise.paths, size):
        out.add(begin, *chain.run(noise[begin : min(begin + size, noise.paths)], trajectory))
    return out.paths(problem.kl_weight, _discounted_entropy(problem, policy, grid))


def precision(dtype: DTypeLike) -> np.dtype[Any]:
    """float64 or float32; ValueError for anything else."""
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype: expected float64 or float32, got {dtype!r:.80}") from None
    if kind not in (np.dtype(np.float64), np.dtype(np.float32)):
        raise ValueError(f"dtype: expected float64 or float32, got {kind}")
    return kind


class _Chain:
    """A problem, policy and grid made ready for the kernels; `run` simulates one chunk of paths."""

    def __init__(self, problem: Problem, policy: Policy, grid: TimeGrid, dtype: Any, threads: int | None) -> None:
        self.problem, self.policy, self.grid, self.dtype, self.threads = problem, policy, grid, dtype, threads
        self.factor = policy.exploration_factor(grid)
        parts, pre = policy.parts(grid), problem.pretrained(grid).parts(grid)
        self.own = _own(problem, policy, grid, dtype)
        if self.own is not None:
            parts = Parts(np.zeros((grid.steps, problem.dim, problem.dim)), np.zeros((grid.steps, problem.dim)), None)
        self.coefficients = None if parts is None else _normal_form(problem, grid, parts, pre, self.factor, dtype)

    def chunk(self, noise: NoiseLike, trajectory: bool) -> int:
        """Paths at a time: whole blocks, so that antithetic pairs and lanes stay together."""
        if self.coefficients is not None and isinstance(noise, Noise) and not trajectory:
            return CHUNK_PATHS
        return max(LANES, CHUNK_NUMBERS // (self.grid.steps * self.problem.dim) // LANES * LANES)

    def run(self, noise: NoiseLike, trajectory: bool) -> tuple[Array, Array, Array | None, Array | None]:
        """(terminal (n, d), sums (n, 3), states, noise_steps) of these paths."""
        steps, d = self.grid.steps, self.problem.dim
        x = np.array(self.problem.initial(noise), dtype=self.dtype, order="C")
        states = np.empty((noise.paths if trajectory else 0, steps + 1, d), self.dtype)
        streams = self.coefficients is not None and isinstance(noise, Noise)
        xi, z = (None, None) if streams and not trajectory else self._arrays(noise)
        if self.coefficients is None:
            assert xi is not None
            sums = self._plain(x, xi, z, states)
        else:
            sums = self._kernel(x, noise, xi, z, states, _nothing(d, self.dtype), np.empty((2, 0, 0), self.dtype))
        return (x, sums, states, xi) if trajectory else (x, sums, None, None)

    def collect(self, noise: NoiseLike, wanted: Collect, parameters: int) -> tuple[Array, Array, Array]:
        """(terminal (n, d), what each path spent (n,), its sums S and P (2, n, p)): see ctrl.kernels.gradient."""
        x = np.array(self.problem.initial(noise), dtype=self.dtype, order="C")
        xi, z = (None, None) if isinstance(noise, Noise) else self._arrays(noise)
        samples = np.empty((2, len(x), parameters), self.dtype)
        sums = self._kernel(x, noise, xi, z, np.empty((0, 0, x.shape[1]), self.dtype), wanted, samples)
        return x, sums[:, 2], samples

    def _arrays(self, noise: NoiseLike) -> tuple[Array, Array | None]:
        """xi, and z where the policy explores, (n, N, d)."""
        shape = self.grid.steps, self.problem.dim
        xi = noise.steps(*shape).astype(self.dtype, copy=False)
        return xi, None if self.factor is None else noise.actions(*shape).astype(self.dtype, copy=False)

    def _kernel(self, x: Array, noise: NoiseLike, xi: Array | None, z: Array | None, states: Array, wanted: Collect, samples: Array) -> Array:
        """The compiled chain from x, which it overwrites; counter noise is made inside, other noise comes as arrays."""
        assert self.coefficients is not None
        motion, exploration, cost, scores = self.coefficients
        sums, none = np.zeros((len(x), 3), self.dtype), np.empty((0, self.grid.steps, x.shape[1]), self.dtype)
        if isinstance(noise, Noise):
            words, given = Words(np.uint64(noise.seed), np.uint64(noise.first), int(noise.antithetic)), Given(none, none)
        else:
            assert xi is not None
            # Views and read-only arrays are other types, for each of which the whole kernel would be compiled.
            given = Given(np.require(xi, requirements=["C", "W"]), none if z is None else np.require(z, requirements=["C", "W"]))
            words = Words(np.uint64(0), np.uint64(0), 0)

        def piece(begin: int, end: int) -> None:
            run(begin, end, x, words, given, motion, exploration, cost, scores, self.own, wanted, sums, states, samples)

        over_paths(piece, len(x), self.threads)
        return sums

    def _plain(self, x: Array, xi: Array, z: Array | None, states: Array) -> Array:
        """The same chain in NumPy, for policies that are arbitrary Python; x is overwritten by the end."""
        c, pre = self.problem.coefficients(self.grid), self.problem.pretrained(self.grid)
        sums, here = np.zeros((len(x), 3)), x.astype(np.float64)
        states[:, :1] = here[: len(states), None]
        for i in range(self.grid.steps):
            a = self.policy.mean(self.grid, i, here) + (0.0 if z is None or self.factor is None else z[:, i] @ self.factor[i].T)
            u = np.sqrt(2 * c.kappa[i] * c.dt[i]) * (a - pre.mean(self.grid, i, here))
            square = np.einsum("nd,nd->n", u, u)
            sums += np.stack([square, np.einsum("nd,nd->n", u, xi[:, i]), c.discount[i] * square], axis=1)
            step = here + (-c.f[i] * here + c.h[i] * a) * c.dt[i] + c.noise[i] * xi[:, i]
            here = step.astype(self.dtype).astype(np.float64)
            states[:, i + 1] = here[: len(states)]
        x[:] = here
        return sums


class _Result:
    """The arrays of Paths, filled chunk by chunk."""

    def __init__(self, problem: Problem, grid: TimeGrid, noise: NoiseLike, dtype: Any, trajectory: bool) -> None:
        n, d, steps = noise.paths, problem.dim, grid.steps
        self.problem, self.weights = problem, noise.weights
        self.final_discount = problem.coefficients(grid).final_discount
        self.terminal, self.reward, self.penalty, self.discounted = np.empty((n, d), dtype), np.empty(n), np.empty(n), np.empty(n)
        self.log_ratio = np.empty(n) if problem.eta > 0 else None
        self.states = np.empty((n, steps + 1, d), dtype) if trajectory else None
        self.noise_steps = np.empty((n, steps, d), dtype) if trajectory else None

    def add(self, begin: int, terminal: Array, sums: Array, *kept: Array | None) -> None:
        here = slice(begin, begin + len(terminal))
        square, cross, discounted = sums.astype(np.float64).T
        reward = self.problem.reward.value(terminal.astype(np.float64))
        self.terminal[here], self.reward[here] = terminal, check.returned("reward", reward, (len(terminal),))
        self.penalty[here] = 0.5 * square
        self.discounted[here] = 0.5 * (discounted if self.problem.discount > 0 else square)
        if self.log_ratio is not None:
            self.log_ratio[here] = cross + 0.5 * square
        for whole, part in zip((self.states, self.noise_steps), kept, strict=True):
            if whole is not None:
                whole[here] = part

    def paths(self, kl_weight: float, entropy: float) -> Paths:
        objective = self.final_discount * self.reward - kl_weight * self.discounted + entropy
        return Paths(self.terminal, self.reward, self.penalty, objective, self.weights, self.log_ratio,
                     self.states, self.noise_steps)


def _normal_form(problem: Problem, grid: TimeGrid, parts: Parts, pre: Parts, factor: Array | None,
                 dtype: Any) -> tuple[Motion, Exploration, Cost, Scores]:
    r"""The kernels' coefficients.

        A = (1 - D f) I + D h K,  c = D h k,  s = eta g sqrt(D),  E = D h L,
        U = w (K - K_pre),  u0 = w (k - k_pre),  F = w L,  w = sqrt(2 kappa D);  mixture scores: D h drives x, w charges u

    The policy's and the pre-trained mixture are evaluated once when they are the same; then u does not see them.
    """
    c, d = problem.coefficients(grid), problem.dim
    gain, w = c.dt * c.h, np.sqrt(2 * c.kappa * c.dt)
    shared = parts.laws is pre.laws
    free = factor is None and shared and np.array_equal(parts.K, pre.K) and np.array_equal(parts.k, pre.k)
    mixtures = []
    if parts.laws is not None:
        mixtures.append((parts.laws, gain, 0 * w if shared else w))
    if pre.laws is not None and not shared:
        mixtures.append((pre.laws, 0 * gain, -w))
    A = (1 - c.dt * c.f)[:, None, None] * np.eye(d) + gain[:, None, None] * parts.K
    none = np.empty((0, d, d))
    diagonal = not np.any(A * (1 - np.eye(d)))
    cost = (none if np.array_equal(parts.K, pre.K) else w[:, None, None] * (parts.K - pre.K), w[:, None] * (parts.k - pre.k),
            c.discount if problem.discount > 0 else c.discount[:0])
    sampled = (none, none) if factor is None else (gain[:, None, None] * factor, w[:, None, None] * factor)
    return (Motion(*_cast(dtype, none if diagonal else A, np.einsum("kii->ki", A), gain[:, None] * parts.k, c.noise)),
            Exploration(*_cast(dtype, *sampled)),
            Cost(*_cast(dtype, *(none, none[:, 0], c.discount[:0]) if free else cost)),
            _scores(mixtures, d, grid.steps, dtype))


def _own(problem: Problem, policy: Policy, grid: TimeGrid, dtype: Any) -> Own | None:
    """The kernels' view of a CallablePolicy whose action is an @njit function; None for anything else."""
    action: Any = getattr(policy, "action", None)
    if not is_jitted(action):
        return None
    c, x, theta = problem.coefficients(grid), np.zeros((problem.dim, LANES)).T, policy.theta.copy()  # compiled for arrays that are writable
    compiled = first_class("action", action, (types.float64, types.Array(types.float64, 2, "F"), types.float64[::1]))
    check.returned("action", action(float(grid.times[0]), x, theta), x.shape)
    return Own(compiled, theta, grid.times[:-1].copy(), *_cast(dtype, c.dt * c.h, np.sqrt(2 * c.kappa * c.dt)))


def _scores(mixtures: list[tuple[tuple[Law, ...], Array, Array]], d: int, steps: int, dtype: Any) -> Scores:
    """Mixtures of every step, padded to one number of components by far-off ones of no weight."""
    laws = [[_as_mixture(law) for law in row] for row, _, _ in mixtures]
    count = max((row[0].weights.size for row in laws), default=0)
    shape = (len(laws), steps, count)
    means, precisions, constants = np.zeros((*shape, d)), np.zeros((*shape, d, d)), np.full(shape, -1e30)
    for j, row in enumerate(laws):
        for i, law in enumerate(row):
            m = law.weights.size
            means[j, i, :m], precisions[j, i, :m], constants[j, i, :m] = law.means, law.precisions, law.log_normalisers
    drive, charge = (np.array([row[which] for row in mixtures]).reshape(len(laws), steps) for which in (1, 2))
    return Scores(*_cast(dtype, means, precisions, constants, drive, charge))


def _as_mixture(law: Law) -> GaussianMixture:
    return GaussianMixture([1.0], law.mean[None], law.cov[None]) if isinstance(law, Gaussian) else law


def _cast(dtype: Any, *arrays: Array) -> list[Array]:
    return [np.array(a, dtype=dtype, order="C") for a in arrays]


@dataclass(frozen=True, eq=False)
class OnePass:
    r"""What an estimator with returns wants of the kernels: samples S G + P, with w_i in P (see ctrl.kernels.gradient).

    sampled_kl : costs are lambda (u'xi + |u|^2/2), without e_i     to_go : w_i holds what is spent so far
    value, use : V_i(x) = -1/2 x'S_i x + w_i'x + z_i as a BASELINE, or its DIFFERENCE along the step (then G = 0)
    """

    sampled_kl: bool = False
    to_go: bool = False
    use: int = NO_VALUE
    value: tuple[Array, Array, Array] | None = None


def one_pass(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, form: OnePass, dtype: Any,
             threads: int | None = None) -> Iterator[tuple[Array, Array]] | None:
    """Chunks of (G (n,), (S, P) (2, n, p)) made in the same pass as the paths; None for policies that the kernels do not know."""
    terms, chain = policy.terms(grid), _Chain(problem, policy, grid, dtype, threads)
    if terms is None or chain.coefficients is None:
        return None
    wanted = _wanted(problem, grid, terms, form, dtype)
    per_path = 2 * policy.theta.size + (0 if isinstance(noise, Noise) else 2 * grid.steps * problem.dim)
    size = max(LANES, CHUNK_NUMBERS // per_path // LANES * LANES)
    final = problem.coefficients(grid).final_discount

    def chunks() -> Iterator[tuple[Array, Array]]:
        for begin in range(0, noise.paths, size):
            x, spent, sums = chain.collect(noise[begin : min(begin + size, noise.paths)], wanted, policy.theta.size)
            reward = check.returned("reward", problem.reward.value(x.astype(np.float64)), (len(x),))
            yield final * reward - spent, sums

    return chunks()


def _wanted(problem: Problem, grid: TimeGrid, terms: Terms, form: OnePass, dtype: Any) -> Collect:
    """The kernels' coefficients of the sums S and P."""
    c, d = problem.coefficients(grid), problem.dim
    price = problem.kl_weight * c.discount
    pull = (0.0 if form.sampled_kl else -1.0) * price * np.sqrt(2 * c.kappa * c.dt)
    gain, pull, price = _cast(dtype, c.h * c.dt / c.noise, pull, price)
    discounts, value = np.append(c.discount, c.final_discount), form.value or (np.empty((0, d, d)), np.empty((0, d)), np.empty(0))
    if form.value is not None and (shapes := [v.shape for v in value]) != [(grid.steps + 1, *(d,) * k) for k in (2, 1, 0)]:
        raise ValueError(f"value: expected one on this grid, of {grid.steps} steps and dimension {d}, got S, w, z of shapes {shapes}")
    S, w, z = _cast(dtype, *(v * discounts[: len(v)].reshape(-1, *(1,) * (v.ndim - 1)) for v in value))
    indices = (np.ascontiguousarray(a, dtype=np.int64) for a in terms[:4])
    return Collect(Terms(*indices, *_cast(dtype, terms.factor)), gain, pull, price, int(form.sampled_kl), int(form.to_go), form.use, S, w, z)


def _nothing(d: int, dtype: Any) -> Collect:
    """No sums of gradients."""
    index, number = np.empty(0, np.int64), np.empty(0, dtype)
    return Collect(Terms(index, index, index, index, number), number, number, number, 0, 0, NO_VALUE,
                   np.empty((0, d, d), dtype), np.empty((0, d), dtype), number)


def _discounted_entropy(problem: Problem, policy: Policy, grid: TimeGrid) -> float:
    """gamma sum_i e^{-rho t_i} D_i H_i, H_i = d/2 log(2 pi e) + log det L_i; zero without an entropy weight."""
    factor = policy.exploration_factor(grid)
    if problem.entropy_weight == 0 or factor is None:
        return 0.0
    c = problem.coefficients(grid)
    entropy = 0.5 * problem.dim * np.log(2 * np.pi * np.e) + np.log(np.einsum("kii->ki", factor)).sum(axis=1)
    return problem.entropy_weight * float(np.sum(c.discount * c.dt * entropy))


def _require_memory(paths: int, steps: int, dim: int, dtype: Any) -> None:
    """Refuse trajectories (states, noise, actions) that do not fit."""
    wanted, available = paths * (3 * steps + 1) * dim * dtype.itemsize, _available_memory()
    if wanted > available:
        raise ValueError(f"trajectory: expected arrays that fit in memory ({available / 2**30:.1f} GiB free), got "
                         f"{wanted / 2**30:.1f} GiB for {paths} paths x {steps} steps x {dim}; split the noise or keep only ends")


def _available_memory() -> int:
    """Bytes that can be had without swapping: what Linux estimates, elsewhere the free pages."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
