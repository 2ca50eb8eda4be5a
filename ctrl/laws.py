"""Data laws that stay exact under noising: Gaussians and Gaussian mixtures (theory.md, section 1).

If Y_tau | Y_0 ~ N(alpha Y_0, v I), then N(m, C) becomes N(alpha m, alpha^2 C + v I), component by component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, TypeVar

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from ctrl import check, elementary
from ctrl.check import Array
from ctrl.elementary import FAST, built_from, exp_64, quadratic_form
from ctrl.schedule import Schedule, TimeGrid

LOG_2PI = float(np.log(2 * np.pi))


class StartNoise(Protocol):
    """What sampling a law asks of a noise (ctrl.Noise, or quadrature nodes in its place)."""

    def start(self, d: int) -> Array: ...

    def component(self, weights: Array) -> Array: ...


@dataclass(frozen=True, eq=False)
class Gaussian:
    r"""The normal law N(mean, cov) on R^d.

        log p(x) = -1/2 (x - m)' C^{-1} (x - m) - 1/2 log det(2 pi C),      score = -C^{-1} (x - m)

    mean : (d,)      cov : (d, d), symmetric positive definite
    Source: theory.md, section 1.   Checked: tests/test_laws.py::test_score_is_gradient_of_log_density
    """

    mean: Array
    cov: Array

    def __init__(self, mean: ArrayLike, cov: ArrayLike) -> None:
        m = check.array("mean", mean, (None,), "(d,)")
        if m.size == 0:
            raise ValueError("mean: expected at least one coordinate, got an empty array")
        c = check.array("cov", cov, (m.size, m.size), f"({m.size}, {m.size})")
        object.__setattr__(self, "mean", m)
        object.__setattr__(self, "cov", check.spd("cov", c))

    @property
    def dim(self) -> int:
        return int(self.mean.size)

    @cached_property
    def precision(self) -> Array:
        """C^{-1}, (d, d)."""
        return np.linalg.inv(self.cov)

    @cached_property
    def principal(self) -> tuple[Array, Array]:
        """Variances (d,) along the axes, columns (d, d): C = axes diag(variances) axes'; those of a noised law are alpha^2 variances + v."""
        return np.linalg.eigh(self.cov)

    @cached_property
    def log_normaliser(self) -> float:
        """log p at the mean: -1/2 log det(2 pi C), nats."""
        return -0.5 * (self.dim * LOG_2PI + float(np.linalg.slogdet(self.cov)[1]))

    def log_density(self, x: ArrayLike) -> Array:
        """log p(x), (n, d) -> (n,), nats."""
        y = check.points("x", x, self.dim) - self.mean
        return self.log_normaliser - 0.5 * quadratic_form(y, self.precision)

    def score(self, x: ArrayLike) -> Array:
        """grad log p(x), (n, d) -> (n, d)."""
        return -(check.points("x", x, self.dim) - self.mean) @ self.precision

    def score_jacobian(self, x: ArrayLike) -> Array:
        """d score / d x, (n, d) -> (n, d, d)."""
        return np.broadcast_to(-self.precision, (len(check.points("x", x, self.dim)), self.dim, self.dim))

    def noised(self, alpha: float, v: float) -> Gaussian:
        """Law of alpha Y + sqrt(v) Z: N(alpha m, alpha^2 C + v I)."""
        return _trusted(Gaussian, mean=alpha * self.mean, cov=alpha**2 * self.cov + v * np.eye(self.dim))

    def from_normals(self, z: Array) -> Array:
        """Standard normals (n, d) -> samples m + chol(C) z, (n, d)."""
        return self.mean + z @ np.linalg.cholesky(self.cov).T

    def sample(self, noise: StartNoise) -> Array:
        """Samples (n, d) as a pure function of the noise's start stream."""
        return self.from_normals(noise.start(self.dim))

    def kl(self, other: Gaussian) -> float:
        r"""KL(self || other) in nats.

            1/2 [ tr(C'^{-1} C) - d + (m' - m)' C'^{-1} (m' - m) + log det C' - log det C ]

        Source: standard.   Checked: tests/test_laws.py::test_gaussian_kl
        """
        if not isinstance(other, Gaussian) or other.dim != self.dim:
            raise ValueError(f"other: expected a Gaussian of dimension {self.dim}, got {type(other).__name__} of dimension {other.dim}")
        gap = other.mean - self.mean
        quadratic = float(np.sum(other.precision * self.cov) + gap @ other.precision @ gap)
        return 0.5 * (quadratic - self.dim) + self.log_normaliser - other.log_normaliser


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""The mixture sum_j w_j N(mean_j, cov_j) on R^d.

        score(x) = sum_j rho_j(x) s_j(x),   s_j = -C_j^{-1} (x - m_j),   rho = softmax_j( log w_j + log N_j(x) )

    weights : (K,), positive, on the simplex      means : (K, d)      covs : (K, d, d)
    Assumes nothing else; log-sum-exp keeps the tails finite.
    Source: theory.md, section 1.   Checked: tests/test_laws.py::test_score_is_gradient_of_log_density
    """

    weights: Array
    means: Array
    covs: Array

    def __init__(self, weights: ArrayLike, means: ArrayLike, covs: ArrayLike) -> None:
        w = check.array("weights", weights, (None,), "(K,)")
        if w.size == 0 or np.any(w <= 0) or abs(float(w.sum()) - 1.0) > 1e-8:
            raise ValueError(f"weights: expected positive numbers that sum to 1, got sum {w.sum():.12g}, min "
                             f"{w.min(initial=np.inf):.6g}")
        m = check.array("means", means, (w.size, None), f"({w.size}, d)")
        c = check.array("covs", covs, (w.size, m.shape[1], m.shape[1]), f"({w.size}, {m.shape[1]}, {m.shape[1]})")
        if abs(float(w.sum()) - 1.0) > w.size * np.finfo(np.float64).eps:  # else keep the bits: normalising twice changes them
            w = w / w.sum()
            w.flags.writeable = False
        object.__setattr__(self, "weights", w)
        object.__setattr__(self, "means", m)
        object.__setattr__(self, "covs", check.spd("covs", c))

    @classmethod
    def of(cls, weights: Array, laws: Sequence[Gaussian | GaussianMixture]) -> GaussianMixture:
        """sum_c w_c q_c / sum_c w_c of Gaussians and mixtures q_c, as one mixture of all their components that have any weight.

        Source: theory.md, section 1.   Checked: tests/test_reward.py::test_class_posteriors_at_their_edges
        """
        parts = [(np.ones(1), q.mean[None], q.cov[None]) if isinstance(q, Gaussian) else (q.weights, q.means, q.covs) for q in laws]
        of_class, means, covs = (np.concatenate(column) for column in zip(*parts, strict=True))
        mass = np.repeat(weights / np.sum(weights), [len(part[0]) for part in parts]) * of_class
        any_weight = mass > 0
        return cls(mass[any_weight], means[any_weight], covs[any_weight])

    @property
    def dim(self) -> int:
        return int(self.means.shape[1])

    @property
    def mean(self) -> Array:
        """sum_j w_j m_j, (d,)."""
        return self.weights @ self.means

    @property
    def cov(self) -> Array:
        """sum_j w_j (C_j + m_j m_j') - m m', (d, d)."""
        centred = self.means - self.mean
        return np.einsum("k,kij->ij", self.weights, self.covs) + np.einsum("k,ki,kj", self.weights, centred, centred)

    @cached_property
    def precisions(self) -> Array:
        """C_j^{-1}, (K, d, d)."""
        return np.linalg.inv(self.covs)

    @cached_property
    def log_normalisers(self) -> Array:
        """log w_j - 1/2 log det(2 pi C_j), (K,)."""
        return np.log(self.weights) - 0.5 * (self.dim * LOG_2PI + np.linalg.slogdet(self.covs)[1])

    def component_scores(self, x: Array) -> Array:
        """s_j(x) = -C_j^{-1} (x - m_j), (n, d) -> (n, K, d)."""
        return -np.einsum("kij,nkj->nki", self.precisions, x[:, None, :] - self.means)

    def _joint(self, x: Array) -> tuple[Array, Array]:
        """Component scores (n, K, d) and log w_j N_j(x) (n, K); complex x passes through analytically."""
        s = self.component_scores(x)
        return s, self.log_normalisers + 0.5 * np.einsum("nki,nki->nk", s, x[:, None, :] - self.means)

    def log_density(self, x: ArrayLike) -> Array:
        """log p(x), (n, d) -> (n,), nats."""
        x = check.points("x", x, self.dim)
        if x.dtype == np.float64:
            return _mixture_log_density(x, self.means, self.precisions, self.log_normalisers)
        _, joint = self._joint(x)
        top = joint.real.max(axis=1)
        return top + np.log(np.exp(joint - top[:, None]).sum(axis=1))

    def responsibilities(self, x: ArrayLike) -> Array:
        """rho_j(x) = posterior probability of component j, (n, d) -> (n, K)."""
        return self._scores_and_responsibilities(check.points("x", x, self.dim))[1]

    def _scores_and_responsibilities(self, x: Array) -> tuple[Array, Array]:
        s, joint = self._joint(x)
        weight = np.exp(joint - joint.real.max(axis=1, keepdims=True))
        return s, weight / weight.sum(axis=1, keepdims=True)

    def score(self, x: ArrayLike) -> Array:
        """grad log p(x), (n, d) -> (n, d)."""
        x = check.points("x", x, self.dim)
        if x.dtype == np.float64:
            return _mixture_scores(x, self.means, self.precisions, self.log_normalisers)
        s, rho = self._scores_and_responsibilities(x)
        return np.einsum("nk,nki->ni", rho, s)

    def score_jacobian(self, x: ArrayLike) -> Array:
        """d score / d x = sum_j rho_j (s_j s_j' - C_j^{-1}) - s s', (n, d) -> (n, d, d)."""
        x = check.points("x", x, self.dim)
        if x.dtype == np.float64:
            return _mixture_slopes(x, self.means, self.precisions, self.log_normalisers)
        s, rho = self._scores_and_responsibilities(x)
        mean = np.einsum("nk,nki->ni", rho, s)
        centred = s - mean[:, None, :]
        return np.einsum("nk,nki,nkj->nij", rho, centred, centred) - np.einsum("nk,kij->nij", rho, self.precisions)

    def score_vjp_means(self, x: Array, u: Array) -> Array:
        r"""u' d score / d m_k = rho_k ( C_k^{-1} u - (u.(s_k - s)) s_k ), (n, d), (n, d) -> (n, K, d).

        Since d log N_k / d m_k = -s_k, the responsibilities answer with d rho_j / d m_k = -rho_j (1{j=k} - rho_k) s_k.
        Source: theory.md, section 1 (mixture policy).   Checked: tests/test_laws.py::test_score_vjp_means
        """
        s, rho = self._scores_and_responsibilities(x)
        centred = s - np.einsum("nk,nki->ni", rho, s)[:, None, :]
        along = np.einsum("ni,nki->nk", u, centred)
        return rho[:, :, None] * (np.einsum("kij,nj->nki", self.precisions, u) - along[:, :, None] * s)

    def noised(self, alpha: float, v: float) -> GaussianMixture:
        """Law of alpha Y + sqrt(v) Z: each component noised alike."""
        covs = alpha**2 * self.covs + v * np.eye(self.dim)
        return _trusted(GaussianMixture, weights=self.weights, means=alpha * self.means, covs=covs)

    def from_normals(self, z: Array, component: Array) -> Array:
        """Standard normals (n, d) and component indices (n,) -> samples (n, d)."""
        return self.means[component] + np.einsum("nij,nj->ni", np.linalg.cholesky(self.covs)[component], z)

    def sample(self, noise: StartNoise) -> Array:
        """Samples (n, d) as a pure function of the noise's start and component streams."""
        return self.from_normals(noise.start(self.dim), noise.component(self.weights))


BLOCK = 128  # points at a time: rows of numbers side by side become vector instructions


@njit(error_model="numpy", fastmath=FAST)
def _pull(z, mean, precision, gap, pull):
    """gap = x - m and pull = C^{-1} (x - m) of one component, rows (d, BLOCK)."""
    for a in range(len(z)):
        m = mean[a]
        for k in range(BLOCK):
            gap[a, k] = z[a, k] - m
    for a in range(len(z)):
        p = precision[a, 0]
        for k in range(BLOCK):
            pull[a, k] = p * gap[0, k]
        for b in range(1, len(z)):
            p = precision[a, b]
            for k in range(BLOCK):
                pull[a, k] += p * gap[b, k]


@njit(error_model="numpy", fastmath=FAST)
def _weights(x, begin, means, precisions, log_normalisers, z, gap, pull, top, total, weight):
    """Points begin ... to rows z; per component w_j N_j(x) / e^top to rows of weight, their sum to total, the highest exponent to top."""
    for a in range(len(z)):
        for k in range(BLOCK):
            z[a, k] = x[min(begin + k, len(x) - 1), a]
    for j in range(len(means)):
        _pull(z, means[j], precisions[j], gap, pull)
        level = weight[j]
        for k in range(BLOCK):
            level[k] = log_normalisers[j]
        for a in range(len(z)):
            for k in range(BLOCK):
                level[k] -= 0.5 * gap[a, k] * pull[a, k]
        for k in range(BLOCK):
            top[k] = level[k] if j == 0 or level[k] > top[k] else top[k]
    for k in range(BLOCK):
        total[k] = 0.0
    for j in range(len(means)):
        level = weight[j]
        for k in range(BLOCK):
            w = exp_64(level[k] - top[k])
            level[k] = w
            total[k] += w


@njit(error_model="numpy")
def _rows(d, count):
    """z, gap, pull (d, BLOCK), top, total (BLOCK,), weight (K, BLOCK)."""
    return np.empty((d, BLOCK)), np.empty((d, BLOCK)), np.empty((d, BLOCK)), np.empty(BLOCK), np.empty(BLOCK), np.empty((count, BLOCK))


@njit(error_model="numpy", fastmath=FAST)
def _mean_score(means, precisions, z, gap, pull, total, weight, score):
    """score = sum_j rho_j s_j, rows (d, BLOCK)."""
    score[:] = 0.0
    for j in range(len(means)):
        _pull(z, means[j], precisions[j], gap, pull)
        w = weight[j]
        for a in range(len(z)):
            for k in range(BLOCK):
                score[a, k] -= w[k] * pull[a, k]
    for a in range(len(z)):
        for k in range(BLOCK):
            score[a, k] /= total[k]


@built_from(elementary.__file__)
@njit(cache=True, error_model="numpy", fastmath=FAST)
def _mixture_log_density(x, means, precisions, log_normalisers):
    """log sum_j w_j N_j(x), (n,)."""
    out = np.empty(len(x))
    z, gap, pull, top, total, weight = _rows(x.shape[1], len(means))
    for begin in range(0, len(x), BLOCK):
        _weights(x, begin, means, precisions, log_normalisers, z, gap, pull, top, total, weight)
        for k in range(min(BLOCK, len(x) - begin)):
            out[begin + k] = top[k] + np.log(total[k])
    return out


@built_from(elementary.__file__)
@njit(cache=True, error_model="numpy", fastmath=FAST)
def _mixture_scores(x, means, precisions, log_normalisers):
    """sum_j rho_j s_j, (n, d): the same sums as the NumPy form for complex x, without its (n, K, d) arrays."""
    out, score = np.empty(x.shape), np.empty((x.shape[1], BLOCK))
    z, gap, pull, top, total, weight = _rows(x.shape[1], len(means))
    for begin in range(0, len(x), BLOCK):
        _weights(x, begin, means, precisions, log_normalisers, z, gap, pull, top, total, weight)
        _mean_score(means, precisions, z, gap, pull, total, weight, score)
        for a in range(x.shape[1]):
            for k in range(min(BLOCK, len(x) - begin)):
                out[begin + k, a] = score[a, k]
    return out


@built_from(elementary.__file__)
@njit(cache=True, error_model="numpy", fastmath=FAST)
def _mixture_slopes(x, means, precisions, log_normalisers):
    """sum_j rho_j ( (s_j - s)(s_j - s)' - C_j^{-1} ), (n, d, d)."""
    d = x.shape[1]
    out, score, slope = np.empty((len(x), d, d)), np.empty((d, BLOCK)), np.empty((d, d, BLOCK))
    z, gap, pull, top, total, weight = _rows(d, len(means))
    for begin in range(0, len(x), BLOCK):
        _weights(x, begin, means, precisions, log_normalisers, z, gap, pull, top, total, weight)
        _mean_score(means, precisions, z, gap, pull, total, weight, score)
        slope[:] = 0.0
        for j in range(len(means)):
            _pull(z, means[j], precisions[j], gap, pull)
            w = weight[j]
            for a in range(d):
                for b in range(d):
                    p = precisions[j, a, b]
                    for k in range(BLOCK):
                        slope[a, b, k] += w[k] * ((pull[a, k] + score[a, k]) * (pull[b, k] + score[b, k]) - p)
        for a in range(d):
            for b in range(d):
                for k in range(min(BLOCK, len(x) - begin)):
                    out[begin + k, a, b] = slope[a, b, k] / total[k]
    return out


Law = Gaussian | GaussianMixture

L = TypeVar("L", Gaussian, GaussianMixture)


def _trusted(cls: type[L], **fields: Array) -> L:
    """A law made from validated parts, without validating again (noising keeps every condition)."""
    law = object.__new__(cls)
    for name, value in fields.items():
        value.flags.writeable = False
        object.__setattr__(law, name, value)
    return law


@lru_cache(maxsize=4096)
def noised_law(schedule: Schedule, law: Law, t: float) -> Law:
    """The noised law at generation time t; cached, so that equal questions give the same object."""
    tau = schedule.tau(t)
    return law.noised(schedule.alpha(tau), schedule.v(tau))


@lru_cache(maxsize=64)
def noised_laws(schedule: Schedule, law: Law, grid: TimeGrid) -> tuple[Law, ...]:
    """The noised laws at the left points of a grid, N of them; cached by identity."""
    return tuple(noised_law(schedule, law, float(t)) for t in grid.times[:-1])
