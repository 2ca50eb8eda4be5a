r"""Policies: pi_theta(. | t, x) = N( mu_theta(t, x), Sigma(t) ), an action in the place of the score (theory.md, section 1).

Every policy answers four questions at step i of a grid: its mean, the two Jacobians of the mean, and, when it can, its
affine-plus-mixture form that the fast kernels and the exact recursions use. `exploration=None` means that actions are means.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.laws import GaussianMixture, Law, noised_law, noised_laws
from ctrl.reward import FEW, complex_step, require_analytic
from ctrl.schedule import Schedule, TimeGrid

if TYPE_CHECKING:
    from ctrl.problem import Problem


class Parts(NamedTuple):
    """mean_i(x) = K_i x + k_i + grad log laws_i(x); K (N, d, d), k (N, d), laws N mixtures or None (no such term)."""

    K: Array
    k: Array
    laws: tuple[Law, ...] | None


class Terms(NamedTuple):
    r"""A mean's dependence on theta, when it is linear: entries begin[i] ... begin[i + 1] - 1 belong to step i of a grid.

        d mu_a / d theta_parameter = factor x_state    (or factor, where state is -1),   a = coordinate
    """

    begin: Array
    parameter: Array
    coordinate: Array
    state: Array
    factor: Array


class Policy(ABC):
    """A Gaussian policy with parameters theta (p,) and an optional exploration covariance."""

    theta: Array
    exploration: Array | None

    @property
    @abstractmethod
    def dim(self) -> int: ...

    @abstractmethod
    def with_theta(self, theta: ArrayLike) -> Self:
        """The same policy at other parameters."""

    @abstractmethod
    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        """mu(t_i, x), (n, d) -> (n, d)."""

    @abstractmethod
    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        """d mu / d x, (n, d) -> (n, d, d)."""

    @abstractmethod
    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        """out (n, p) += (d mu / d theta)' u, per path, for u (n, d)."""

    def jacobian_theta(self, grid: TimeGrid, i: int, x: Array) -> Array:
        """d mu / d theta, (n, d) -> (n, d, p)."""
        out = np.zeros((self.dim, len(x), self.theta.size))
        for j in range(self.dim):
            unit = np.zeros_like(x)
            unit[:, j] = 1.0
            self.add_vjp(out[j], grid, i, x, unit)
        return out.transpose(1, 0, 2)

    def parts(self, grid: TimeGrid) -> Parts | None:
        """Affine-plus-mixture form on a grid; None for arbitrary Python."""
        return None

    def pullback(self, grid: TimeGrid, K: Array, k: Array) -> Array:
        """Chain rule for policies whose parts are linear in theta: dJ/dK (N, d, d), dJ/dk (N, d) -> dJ/dtheta (p,)."""
        raise ValueError(f"policy: expected an AffinePolicy or a BasisPolicy (parts linear in theta), got {type(self).__name__}")

    def terms(self, grid: TimeGrid) -> Terms | None:
        """d mu / d theta as a list, for one-pass estimators; None where it is not linear in x."""
        return None

    def exploration_cov(self, grid: TimeGrid) -> Array | None:
        """Sigma at every step, (N, d, d), or None when actions are means."""
        if self.exploration is None:
            return None
        return np.broadcast_to(self.exploration, (grid.steps, self.dim, self.dim))

    def exploration_factor(self, grid: TimeGrid) -> Array | None:
        """Cholesky factors of Sigma, (N, d, d), or None when actions are means."""
        cov = self.exploration_cov(grid)
        return None if cov is None else np.linalg.cholesky(cov)

    def with_exploration(self, exploration: ArrayLike | None) -> Self:
        """The same mean with another exploration covariance: (d, d), SPD, or None for mean actions."""
        return replace(self, exploration=_exploration(exploration, self.dim))  # type: ignore[type-var]


def _exploration(value: ArrayLike | None, dim: int) -> Array | None:
    if value is None:
        return None
    if np.ndim(value) != 2:
        raise ValueError(f"exploration: expected shape ({dim}, {dim}), got {np.shape(value)}")
    return check.spd("exploration", value, dim)


def _theta(value: ArrayLike, size: int) -> Array:
    return check.array("theta", value, (size,), f"({size},)")


@dataclass(frozen=True, eq=False)
class AffinePolicy(Policy):
    r"""One affine map per grid step: mu_i(x) = K_i x + k_i.

    K : (N, d, d)   k : (N, d)   exploration : None, (d, d) or (N, d, d), SPD   theta = (K.ravel(), k.ravel())
    With Gaussian data the chain under this policy is linear-Gaussian.
    Source: theory.md, section 1.   Checked: tests/test_policy.py::test_jacobians_are_complex_steps
    """

    K: Array
    k: Array
    exploration: Array | None = None

    def __post_init__(self) -> None:
        k = check.array("k", self.k, (None, None), "(N, d)")
        steps, d = k.shape
        if k.size == 0:
            raise ValueError(f"k: expected at least one step and one coordinate, got shape {k.shape}")
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "K", check.array("K", self.K, (steps, d, d), f"({steps}, {d}, {d})"))
        if self.exploration is not None:
            if np.shape(self.exploration) not in ((d, d), (steps, d, d)):
                raise ValueError(f"exploration: expected shape ({d}, {d}) or ({steps}, {d}, {d}), "
                                 f"got {np.shape(self.exploration)}")
            object.__setattr__(self, "exploration", check.spd("exploration", self.exploration, d))

    @property
    def dim(self) -> int:
        return int(self.k.shape[1])

    @property
    def theta(self) -> Array:  # type: ignore[override]
        return np.concatenate([self.K.ravel(), self.k.ravel()])

    def with_theta(self, theta: ArrayLike) -> AffinePolicy:
        theta = _theta(theta, self.K.size + self.k.size)
        return replace(self, K=theta[: self.K.size].reshape(self.K.shape), k=theta[self.K.size :].reshape(self.k.shape))

    def with_exploration(self, exploration: ArrayLike | None) -> AffinePolicy:
        return AffinePolicy(self.K, self.k, None if exploration is None else np.asarray(exploration))

    def _on(self, grid: TimeGrid) -> None:
        if grid.steps != len(self.k):
            raise ValueError(f"grid: expected {len(self.k)} steps, one per affine map of the policy, got {grid.steps}")

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        self._on(grid)
        return x @ self.K[i].T + self.k[i]

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        self._on(grid)
        return np.broadcast_to(self.K[i], (len(x), self.dim, self.dim))

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        self._on(grid)
        d = self.dim
        matrix, vector = out[:, i * d * d : (i + 1) * d * d], out[:, self.K.size + i * d : self.K.size + (i + 1) * d]
        matrix += (u[:, :, None] * x[:, None, :]).reshape(len(x), d * d)
        vector += u

    def pullback(self, grid: TimeGrid, K: Array, k: Array) -> Array:
        return np.concatenate([K.ravel(), k.ravel()])

    def parts(self, grid: TimeGrid) -> Parts:
        self._on(grid)
        return Parts(self.K, self.k, None)

    def terms(self, grid: TimeGrid) -> Terms:
        self._on(grid)
        steps, d = self.k.shape
        of_K, of_k = np.arange(self.K.size).reshape(steps, d * d), np.arange(self.K.size, self.theta.size).reshape(steps, d)
        entry = np.concatenate([np.arange(d * d), np.arange(d)])
        coordinate, state = np.where(np.arange(entry.size) < d * d, entry // d, entry), np.where(np.arange(entry.size) < d * d, entry % d, -1)
        return Terms((d * d + d) * np.arange(steps + 1), np.concatenate([of_K, of_k], axis=1).ravel(),
                     np.tile(coordinate, steps), np.tile(state, steps), np.ones(self.theta.size))


@dataclass(frozen=True)
class Monomials:
    """Time functions 1, t/T, ..., (t/T)^degree; the default basis that can be saved to a file."""

    degree: int
    horizon: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "degree", check.integer("degree", self.degree, at_least=0))
        object.__setattr__(self, "horizon", check.number("horizon", self.horizon, above=0))

    def __call__(self, t: float) -> Array:
        return (t / self.horizon) ** np.arange(self.degree + 1)


@dataclass(frozen=True)
class TimeBins:
    """Indicator functions of `bins` equal intervals of [0, T]."""

    bins: int
    horizon: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bins", check.integer("bins", self.bins, at_least=1))
        object.__setattr__(self, "horizon", check.number("horizon", self.horizon, above=0))

    def __call__(self, t: float) -> Array:
        return (np.arange(self.bins) == min(int(t / self.horizon * self.bins), self.bins - 1)).astype(np.float64)


class Basis(ABC):
    """A linear map theta -> (K(t), k(t)) and its adjoint: what a linear-in-theta policy adds to the score."""

    @abstractmethod
    def apply(self, t: float, theta: Array) -> tuple[Array, Array]:
        """(p,) -> K (d, d), k (d,)."""

    @abstractmethod
    def adjoint(self, t: float, K: Array, k: Array) -> Array:
        """Cotangents K (..., d, d), k (..., d) -> (..., p)."""

    def vjp(self, t: float, x: Array, u: Array) -> Array:
        """The adjoint at K = u x', k = u: (d mu / d theta)' u per path, (n, d), (n, d) -> (n, p)."""
        return self.adjoint(t, u[:, :, None] * x[:, None, :], u)

    def on(self, grid: TimeGrid, theta: Array) -> tuple[Array, Array]:
        """`apply` at every step of a grid: (p,) -> K (N, d, d), k (N, d)."""
        K, k = zip(*(self.apply(float(t), theta) for t in grid.times[:-1]), strict=True)
        return np.stack(K), np.stack(k)

    def pullback(self, grid: TimeGrid, K: Array, k: Array) -> Array:
        """Its adjoint, summed over steps: cotangents K (N, d, d), k (N, d) -> (p,)."""
        return np.sum([self.adjoint(float(t), Ki, ki) for t, Ki, ki in zip(grid.times[:-1], K, k, strict=True)], axis=0)

    def origin(self, theta: Array) -> Array:
        """The parameters at which nothing is added, (p,)."""
        return np.zeros_like(theta)


@dataclass(frozen=True, eq=False)
class FunctionBasis(Basis):
    """K(t) = sum_b phi_b(t) W_b, k(t) = sum_b phi_b(t) w_b; theta = (W.ravel(), w.ravel())."""

    functions: Callable[[float], Array]
    count: int
    dim: int

    def time_functions(self, t: float) -> Array:
        """phi(t), (b,)."""
        phi = np.asarray(self.functions(t), dtype=np.float64)
        if phi.shape != (self.count,) or not np.all(np.isfinite(phi)):
            raise ValueError(f"functions: expected to return {self.count} finite numbers (one per W), got shape {phi.shape} "
                             f"at t = {t:g}")
        return phi

    def apply(self, t: float, theta: Array) -> tuple[Array, Array]:
        b, d, phi = self.count, self.dim, self.time_functions(t)
        W, w = theta[: b * d * d].reshape(b, d, d), theta[b * d * d :].reshape(b, d)
        return np.einsum("b,bij->ij", phi, W), phi @ w

    def adjoint(self, t: float, K: Array, k: Array) -> Array:
        phi = self.time_functions(t)
        matrix = phi[:, None, None] * K[..., None, :, :]
        vector = phi[:, None] * k[..., None, :]
        return np.concatenate([matrix.reshape(*k.shape[:-1], -1), vector.reshape(*k.shape[:-1], -1)], axis=-1)

    def on(self, grid: TimeGrid, theta: Array) -> tuple[Array, Array]:
        b, d, phi = self.count, self.dim, _time_table(self, grid)
        return (phi @ theta[: b * d * d].reshape(b, d * d)).reshape(-1, d, d), phi @ theta[b * d * d :].reshape(b, d)

    def pullback(self, grid: TimeGrid, K: Array, k: Array) -> Array:
        phi = _time_table(self, grid)
        return np.concatenate([(phi.T @ K.reshape(len(K), -1)).ravel(), (phi.T @ k).ravel()])


@lru_cache(maxsize=64)
def _time_table(basis: FunctionBasis, grid: TimeGrid) -> Array:
    """phi_b(t_i), (N, b); cached by identity, so that one grid asks the functions once for all theta."""
    return np.stack([basis.time_functions(float(t)) for t in grid.times[:-1]])


@dataclass(frozen=True, eq=False)
class ShiftBasis(Basis):
    """K = 0, k(t) = theta."""

    dim: int

    def apply(self, t: float, theta: Array) -> tuple[Array, Array]:
        return np.zeros((self.dim, self.dim)), theta

    def adjoint(self, t: float, K: Array, k: Array) -> Array:
        return k

    def vjp(self, t: float, x: Array, u: Array) -> Array:
        return u

    def on(self, grid: TimeGrid, theta: Array) -> tuple[Array, Array]:
        return np.zeros((grid.steps, self.dim, self.dim)), np.tile(theta, (grid.steps, 1))

    def pullback(self, grid: TimeGrid, K: Array, k: Array) -> Array:
        return k.sum(axis=0)


@dataclass(frozen=True, eq=False)
class ScaleBasis(Basis):
    """K(t) = (theta_0 - 1) K_pre(t), k(t) = theta_1: ; affine in theta through the origin (1, 0)."""

    problem: Problem

    def apply(self, t: float, theta: Array) -> tuple[Array, Array]:
        return (theta[0] - 1.0) * self.problem.affine_score(t)[0], theta[1:]

    def origin(self, theta: Array) -> Array:
        return np.eye(theta.size)[0]

    def vjp(self, t: float, x: Array, u: Array) -> Array:
        along = np.einsum("ni,ni->n", x @ self.problem.affine_score(t)[0].T, u)
        return np.concatenate([along[:, None], u], axis=1)

    def adjoint(self, t: float, K: Array, k: Array) -> Array:
        along = np.einsum("ij,...ij->...", self.problem.affine_score(t)[0], K)
        return np.concatenate([along[..., None], k], axis=-1)

    def on(self, grid: TimeGrid, theta: Array) -> tuple[Array, Array]:
        return (theta[0] - 1.0) * self._pretrained(grid), np.tile(theta[1:], (grid.steps, 1))

    def pullback(self, grid: TimeGrid, K: Array, k: Array) -> Array:
        return np.append(np.vdot(self._pretrained(grid), K), k.sum(axis=0))

    def _pretrained(self, grid: TimeGrid) -> Array:
        """K_pre of every step, (N, d, d)."""
        pre = self.problem.pretrained(grid).parts(grid)
        return pre.K


@dataclass(frozen=True, eq=False)
class BasisPolicy(Policy):
    r"""A policy in continuous time, linear in theta: mu(t, x) = s(t, x) + sum_b phi_b(t) (W_b x + w_b).

    functions : t -> (b,)   W : (b, d, d)   w : (b, d)   theta = (W.ravel(), w.ravel())   exploration : None or (d, d)
    One theta runs on any grid, because phi_b are functions of t and never of the step index.
    Source: theory.md, sections 1 and 12.   Checked: tests/test_policy.py::test_jacobians_are_complex_steps
    """

    problem: Problem
    basis: Basis
    theta: Array
    exploration: Array | None = None

    def __init__(self, problem: Problem, functions: Callable[[float], Array], W: ArrayLike, w: ArrayLike,
                 exploration: ArrayLike | None = None) -> None:
        if not callable(functions):
            raise ValueError(f"functions: expected a callable t -> (b,), got {type(functions).__name__}")
        vector = check.array("w", w, (None, problem.dim), f"(b, {problem.dim})")
        matrix = check.array("W", W, (len(vector), problem.dim, problem.dim), f"({len(vector)}, {problem.dim}, {problem.dim})")
        basis = FunctionBasis(functions, len(vector), problem.dim)
        basis.apply(0.0, theta := np.concatenate([matrix.ravel(), vector.ravel()]))
        self._set(problem, basis, theta, exploration)

    def _set(self, problem: Problem, basis: Basis, theta: Array, exploration: ArrayLike | None) -> None:
        d = problem.dim
        theta = _theta(theta, basis.adjoint(0.0, np.zeros((d, d)), np.zeros(d)).size)
        object.__setattr__(self, "problem", problem)
        object.__setattr__(self, "basis", basis)
        object.__setattr__(self, "theta", theta)
        object.__setattr__(self, "exploration", _exploration(exploration, problem.dim))

    @classmethod
    def of(cls, problem: Problem, basis: Basis, theta: Array, exploration: ArrayLike | None = None) -> BasisPolicy:
        """A policy from any Basis object: mu = s + (K(t) x + k(t)) with (K, k) = basis.apply(t, theta)."""
        policy = object.__new__(cls)
        policy._set(problem, basis, theta, exploration)
        return policy

    @classmethod
    def shift(cls, problem: Problem, theta: ArrayLike, exploration: ArrayLike | None = None) -> BasisPolicy:
        """mu(t, x) = s(t, x) + theta; theta (d,)."""
        return cls.of(problem, ShiftBasis(problem.dim), _theta(theta, problem.dim), exploration)

    @classmethod
    def scaled(cls, problem: Problem, scale: float, shift: ArrayLike, exploration: ArrayLike | None = None) -> BasisPolicy:
        """mu(t, x) = scale K_pre(t) x + k_pre(t) + shift, Gaussian data; theta = (scale, shift), (1 + d,)."""
        problem.affine_score(0.0)
        theta = np.concatenate([[check.number("scale", scale)], check.array("shift", shift, (problem.dim,))])
        return cls.of(problem, ScaleBasis(problem), theta, exploration)

    @property
    def dim(self) -> int:
        return self.problem.dim

    def with_theta(self, theta: ArrayLike) -> BasisPolicy:
        return self.of(self.problem, self.basis, _theta(theta, self.theta.size), self.exploration)

    def with_exploration(self, exploration: ArrayLike | None) -> BasisPolicy:
        return self.of(self.problem, self.basis, self.theta, exploration)

    def affine_at(self, t: float) -> tuple[Array, Array]:
        """(K(t), k(t)) of the whole mean, for Gaussian data."""
        K, k = self.problem.affine_score(t)
        W, w = self.basis.apply(t, self.theta)
        return K + W, k + w

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        W, w = _basis_terms(self, grid)
        return self.problem.score(float(grid.times[i]), x) + x @ W[i].T + w[i]

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        t = float(grid.times[i])
        return self.problem.marginal(t).score_jacobian(x) + self.basis.apply(t, self.theta)[0]

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        out += self.basis.vjp(float(grid.times[i]), x, u)

    def pullback(self, grid: TimeGrid, K: Array, k: Array) -> Array:
        return self.basis.pullback(grid, K, k)

    def terms(self, grid: TimeGrid) -> Terms:
        d = self.dim
        units = np.eye(d * d + d)
        K, k = units[:, : d * d].reshape(-1, d, d), units[:, d * d :]
        table = np.stack([self.basis.adjoint(float(t), K, k) for t in grid.times[:-1]])
        step, entry, parameter = np.nonzero(table)
        linear = entry < d * d
        return Terms(np.searchsorted(step, np.arange(grid.steps + 1)), parameter, np.where(linear, entry // d, entry - d * d),
                     np.where(linear, entry % d, -1), table[step, entry, parameter])

    def parts(self, grid: TimeGrid) -> Parts:
        return _basis_parts(self, grid)


@lru_cache(maxsize=16)
def _basis_parts(policy: BasisPolicy, grid: TimeGrid) -> Parts:
    """Of the score and the basis together; cached by identity, since every solver asks several times."""
    pre, (W, w) = policy.problem.pretrained(grid).parts(grid), _basis_terms(policy, grid)
    return Parts(pre.K + W, pre.k + w, pre.laws)


@lru_cache(maxsize=16)
def _basis_terms(policy: BasisPolicy, grid: TimeGrid) -> tuple[Array, Array]:
    return policy.basis.on(grid, policy.theta)


@dataclass(frozen=True, eq=False)
class MixturePolicy(Policy):
    r"""The noised score of a mixture with its own means: mu(t, x) = grad log p_{T-t}(x; means).

    law : GaussianMixture (weights and covariances fixed)   theta = law.means.ravel()   exploration : None or (d, d)
    theta is a generative model; at the data's own means it is the pre-trained policy.
    Source: theory.md, section 1.   Checked: tests/test_policy.py::test_jacobians_are_complex_steps
    """

    schedule: Schedule
    law: GaussianMixture
    exploration: Array | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.law, GaussianMixture):
            raise ValueError(f"law: expected a GaussianMixture, got {type(self.law).__name__}")
        check.instance("schedule", self.schedule, Schedule, "a noising schedule")
        object.__setattr__(self, "exploration", _exploration(self.exploration, self.law.dim))

    @property
    def dim(self) -> int:
        return self.law.dim

    @property
    def theta(self) -> Array:  # type: ignore[override]
        return self.law.means.ravel()

    def with_theta(self, theta: ArrayLike) -> MixturePolicy:
        means = _theta(theta, self.law.means.size).reshape(self.law.means.shape)
        return replace(self, law=GaussianMixture(self.law.weights, means, self.law.covs))

    def _at(self, grid: TimeGrid, i: int) -> GaussianMixture:
        law = noised_law(self.schedule, self.law, float(grid.times[i]))
        assert isinstance(law, GaussianMixture)
        return law

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        return self._at(grid, i).score(x)

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        return self._at(grid, i).score_jacobian(x)

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        alpha = self.schedule.alpha(self.schedule.tau(float(grid.times[i])))
        out += alpha * self._at(grid, i).score_vjp_means(x, u).reshape(len(x), -1)

    def parts(self, grid: TimeGrid) -> Parts:
        d = self.dim
        return Parts(np.zeros((grid.steps, d, d)), np.zeros((grid.steps, d)), noised_laws(self.schedule, self.law, grid))


Action = Callable[[float, Array, Array], Array]


@dataclass(frozen=True, eq=False)
class CallablePolicy(Policy):
    r"""Any mean action mu(t, x; theta), with Jacobians given or taken by complex step.

    action(t, x, theta) : (n, d)   jacobian_theta : (n, d, p)   jacobian_x : (n, d, d)   exploration : None or (d, d)
    The complex step is exact to rounding for analytic NumPy code; non-analytic code needs explicit Jacobians.
    Source: theory.md, section 1.   Checked: tests/test_policy.py::test_jacobians_are_complex_steps
    """

    action: Action
    theta: Array
    theta_jacobian: Action | None
    x_jacobian: Action | None
    exploration: Array | None
    state_dim: int | None

    def __init__(self, action: Action, theta: ArrayLike, jacobian_theta: Action | None = None,
                 jacobian_x: Action | None = None, exploration: ArrayLike | None = None, dim: int | None = None) -> None:
        for name, f in (("action", action), ("jacobian_theta", jacobian_theta), ("jacobian_x", jacobian_x)):
            if f is not None and not callable(f):
                raise ValueError(f"{name}: expected a callable (t, x, theta), got {type(f).__name__}")
        object.__setattr__(self, "action", action)
        object.__setattr__(self, "theta", check.array("theta", np.atleast_1d(np.asarray(theta)), (None,), "(p,)"))
        object.__setattr__(self, "theta_jacobian", jacobian_theta)
        object.__setattr__(self, "x_jacobian", jacobian_x)
        size = np.shape(exploration)[-1] if exploration is not None and np.ndim(exploration) else dim
        object.__setattr__(self, "exploration", None if exploration is None else check.spd("exploration", exploration, size))
        object.__setattr__(self, "state_dim", size)

    @property
    def dim(self) -> int:
        if self.state_dim is None:
            raise ValueError("dim: expected CallablePolicy(..., dim=d) where the dimension is needed without states, got None")
        return self.state_dim

    def with_theta(self, theta: ArrayLike) -> CallablePolicy:
        return CallablePolicy(self.action, _theta(theta, self.theta.size), self.theta_jacobian, self.x_jacobian,
                              self.exploration, self.state_dim)

    def with_exploration(self, exploration: ArrayLike | None) -> CallablePolicy:
        return CallablePolicy(self.action, self.theta, self.theta_jacobian, self.x_jacobian, exploration, self.state_dim)

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        return check.returned("action", self.action(float(grid.times[i]), x.copy(), self.theta), x.shape)

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        t, (n, d) = float(grid.times[i]), x.shape
        if self.x_jacobian is not None:
            return check.returned("jacobian_x", self.x_jacobian(t, x, self.theta), (n, d, d))

        def action(z: Array) -> Array:
            return self.action(t, z, self.theta)

        columns = [complex_step("action", action, x, j, x.shape) for j in range(d)]
        for j, column in enumerate(columns):
            require_analytic("action", action, x[:FEW], j, column[:FEW])
        return np.stack(columns, axis=2)

    def jacobian_theta(self, grid: TimeGrid, i: int, x: Array) -> Array:
        t, p = float(grid.times[i]), self.theta.size
        if self.theta_jacobian is not None:
            return check.returned("jacobian_theta", self.theta_jacobian(t, x, self.theta), (*x.shape, p))
        columns = [complex_step("action", lambda z: self.action(t, x, z), self.theta, j, x.shape) for j in range(p)]
        for j, column in enumerate(columns):
            require_analytic("action", lambda z: self.action(t, x[:FEW], z), self.theta, j, column[:FEW])
        return np.stack(columns, axis=2)

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        out += np.einsum("ndp,nd->np", self.jacobian_theta(grid, i, x), u)

    def exploration_cov(self, grid: TimeGrid) -> Array | None:
        return None if self.exploration is None else super().exploration_cov(grid)
