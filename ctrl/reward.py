"""Terminal rewards r(x): one face, `value` (n, d) -> (n,) and `gradient` (n, d) -> (n, d) (theory.md, section 1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numba.core.errors import NumbaError
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.elementary import quadratic_form
from ctrl.laws import Gaussian, GaussianMixture, Law

COMPLEX_STEP = 1e-30
FEW = 8  # rows on which a complex step is compared with a real difference


class Quadratic(NamedTuple):
    """r(x) = -1/2 x' matrix x + vector'x + constant: what the affine-Gaussian recursions need."""

    matrix: Array
    vector: Array
    constant: float


class Reward(ABC):
    """A terminal reward; `dim` is None when any dimension will do."""

    dim: int | None = None

    @abstractmethod
    def value(self, x: Array) -> Array:
        """r(x), (n, d) -> (n,)."""

    @abstractmethod
    def gradient(self, x: Array) -> Array:
        """grad r(x), (n, d) -> (n, d)."""

    def quadratic(self, dim: int) -> Quadratic | None:
        """Coefficients when the reward is (at most) quadratic, else None."""
        return None


@dataclass(frozen=True, eq=False)
class QuadraticReward(Reward):
    r"""r(x) = -1/2 (x - c)'Q(x - c) + b'x.

    matrix Q : (d, d), symmetric      center c : (d,)      linear b : (d,), default 0
    Source: theory.md, section 1.   Checked: tests/test_reward.py::test_gradient_is_complex_step
    """

    matrix: Array
    center: Array
    linear: Array

    def __init__(self, matrix: ArrayLike, center: ArrayLike, linear: ArrayLike | None = None) -> None:
        c = check.array("center", center, (None,), "(d,)")
        q = check.array("matrix", matrix, (c.size, c.size), f"({c.size}, {c.size})")
        if not np.allclose(q, q.T, rtol=1e-10, atol=1e-12 * float(np.max(np.abs(q), initial=0.0))):
            raise ValueError(f"matrix: expected a symmetric matrix, got asymmetry {np.max(np.abs(q - q.T)):.3g}")
        object.__setattr__(self, "center", c)
        object.__setattr__(self, "matrix", q)
        object.__setattr__(self, "linear", check.array("linear", np.zeros(c.size) if linear is None else linear, (c.size,)))
        object.__setattr__(self, "dim", c.size)

    def value(self, x: Array) -> Array:
        y = x - self.center
        return -0.5 * quadratic_form(y, self.matrix) + x @ self.linear

    def gradient(self, x: Array) -> Array:
        return -(x - self.center) @ self.matrix + self.linear

    def quadratic(self, dim: int) -> Quadratic:
        pull = self.matrix @ self.center
        return Quadratic(self.matrix, pull + self.linear, -0.5 * float(self.center @ pull))


@dataclass(frozen=True, eq=False)
class LinearReward(Reward):
    r"""r(x) = b'x.

    linear b : (d,)
    Source: theory.md, section 1.   Checked: tests/test_reward.py::test_gradient_is_complex_step
    """

    linear: Array

    def __init__(self, linear: ArrayLike) -> None:
        object.__setattr__(self, "linear", check.array("linear", linear, (None,), "(d,)"))
        object.__setattr__(self, "dim", self.linear.size)

    def value(self, x: Array) -> Array:
        return x @ self.linear

    def gradient(self, x: Array) -> Array:
        return np.broadcast_to(self.linear, x.shape)

    def quadratic(self, dim: int) -> Quadratic:
        return Quadratic(np.zeros((dim, dim)), self.linear, 0.0)


@dataclass(frozen=True, eq=False)
class BumpReward(Reward):
    r"""r(x) = exp( -|x - c|^2 / (2 w^2) ).

    center c : (d,)      width w > 0, state units
    Source: theory.md, section 1.   Checked: tests/test_reward.py::test_gradient_is_complex_step
    """

    center: Array
    width: float

    def __init__(self, center: ArrayLike, width: float) -> None:
        object.__setattr__(self, "center", check.array("center", center, (None,), "(d,)"))
        object.__setattr__(self, "width", check.number("width", width, above=0))
        object.__setattr__(self, "dim", self.center.size)

    def value(self, x: Array) -> Array:
        return np.exp(-0.5 * np.sum((x - self.center) ** 2, axis=1) / self.width**2)

    def gradient(self, x: Array) -> Array:
        return -(x - self.center) / self.width**2 * self.value(x)[:, None]


@dataclass(frozen=True, eq=False)
class LogDensityReward(Reward):
    r"""r(x) = log q(x) for a Gaussian or a Gaussian mixture q, in nats.

    Source: theory.md, section 1.   Checked: tests/test_reward.py::test_gradient_is_complex_step
    """

    law: Law

    def __post_init__(self) -> None:
        if not isinstance(self.law, (Gaussian, GaussianMixture)):
            raise ValueError(f"law: expected a Gaussian or a GaussianMixture, got {type(self.law).__name__}")
        object.__setattr__(self, "dim", self.law.dim)

    def value(self, x: Array) -> Array:
        return self.law.log_density(x)

    def gradient(self, x: Array) -> Array:
        return self.law.score(x)

    def quadratic(self, dim: int) -> Quadratic | None:
        if not isinstance(self.law, Gaussian):
            return None
        pull = self.law.precision @ self.law.mean
        return Quadratic(self.law.precision, pull, self.law.log_normaliser - 0.5 * float(self.law.mean @ pull))


@dataclass(frozen=True, eq=False)
class ClassLogPosteriorReward(Reward):
    r"""r(x) = log P(class | x) when class c has prior w_c and density q_c: the log-probability of a Bayes classifier.

        r(x) = log w_c + log q_c(x) - log q(x),      grad r = score_c - score,      q = sum_j w_j q_j and its score

    laws : one law per class      prior : (classes,), on the simplex      label : index of the wanted class
    Nats.   Source: theory.md, section 1 (log-density rewards).   Checked: tests/test_reward.py::test_gradient_is_complex_step
    """

    laws: tuple[Law, ...]
    prior: Array
    label: int

    def __init__(self, laws: tuple[Law, ...], prior: ArrayLike, label: int) -> None:
        laws = tuple(laws)
        if not all(isinstance(law, (Gaussian, GaussianMixture)) for law in laws):
            raise ValueError(f"laws: expected Gaussians or GaussianMixtures, got {[type(law).__name__ for law in laws]}")
        if len(laws) < 2 or len({law.dim for law in laws}) != 1:
            raise ValueError(f"laws: expected at least two laws of one dimension, got dimensions {[a.dim for a in laws]}")
        w = check.array("prior", prior, (len(laws),), f"({len(laws)},)")
        if np.any(w <= 0) or abs(float(w.sum()) - 1) > 1e-8:
            raise ValueError(f"prior: expected positive numbers that sum to 1, got sum {w.sum():.12g}")
        if check.integer("label", label, at_least=0) >= len(laws):
            raise ValueError(f"label: expected a class index in 0 ... {len(laws) - 1}, got {label}")
        object.__setattr__(self, "laws", laws)
        object.__setattr__(self, "prior", w)
        object.__setattr__(self, "label", int(label))
        object.__setattr__(self, "dim", laws[0].dim)

    @cached_property
    def evidence(self) -> GaussianMixture:
        """The law of all classes, sum_j w_j q_j."""
        return GaussianMixture.of(self.prior, self.laws)

    def value(self, x: Array) -> Array:
        r = np.log(self.prior[self.label] / self.prior.sum()) + self.laws[self.label].log_density(x) - self.evidence.log_density(x)
        return r if np.iscomplexobj(r) else np.minimum(r, 0.0)  # rounding of two large numbers makes no probability above 1

    def gradient(self, x: Array) -> Array:
        return self.laws[self.label].score(x) - self.evidence.score(x)


@dataclass(frozen=True, eq=False)
class CallableReward(Reward):
    r"""Any r(x): `function` maps (n, d) to (n,); `derivative` maps (n, d) to (n, d), by complex step when None.

    The complex step, Im r(x + i h e_j) / h with h = 1e-30, is exact to rounding for analytic NumPy code.
    Source: theory.md, section 1.   Checked: tests/test_reward.py::test_callable_reward
    """

    function: Callable[[Array], Array]
    derivative: Callable[[Array], Array] | None = None

    def __init__(self, value: Callable[[Array], Array], gradient: Callable[[Array], Array] | None = None) -> None:
        for name, f in (("value", value), ("gradient", gradient)):
            if f is not None and not callable(f):
                raise ValueError(f"{name}: expected a callable, got {type(f).__name__}")
        object.__setattr__(self, "function", value)
        object.__setattr__(self, "derivative", gradient)

    def value(self, x: Array) -> Array:
        try:
            out = self.function(x)
        except Exception as error:
            raise ValueError(f"reward: expected a function of states (n, {x.shape[1]}), got {type(error).__name__}: {error}") from error
        return check.returned("reward", out, (len(x),))

    def gradient(self, x: Array) -> Array:
        if self.derivative is not None:
            return check.returned("reward gradient", self.derivative(x), x.shape)
        columns = [complex_step("reward", self.function, x, j, (len(x),)) for j in range(x.shape[1])]
        for j, column in enumerate(columns):
            require_analytic("reward", self.function, x[:FEW], j, column[:FEW])
        return np.stack(columns, axis=1)


def complex_step(name: str, function: Callable[[Array], Array], x: Array, j: int, shape: tuple[int, ...]) -> Array:
    """d function / d x_j (last axis of x) = Im function(x + i h e_j) / h, for code that is analytic in x."""
    moved = x.astype(np.complex128)
    moved[..., j] += 1j * COMPLEX_STEP
    try:
        out = np.asarray(function(moved))
    except (TypeError, ValueError, NumbaError) as error:
        raise ValueError(f"{name}: expected code that accepts complex numbers (or an explicit derivative), "
                         f"got {type(error).__name__}: {error!s:.300}") from None
    return check.returned(name, out.imag / COMPLEX_STEP, shape)


def require_analytic(name: str, function: Callable[[Array], Array], x: Array, j: int, derivative: Array) -> None:
    """ValueError when a complex step (few rows of it are enough) is not the real difference: |x|, conj and the like fool it."""
    step = 1e-5 * max(1.0, float(np.max(np.abs(x), initial=0.0)))
    up, down = x.copy(), x.copy()
    up[..., j] += step
    down[..., j] -= step
    above, below = (np.asarray(function(moved), dtype=np.float64) for moved in (up, down))
    difference = (above - below) / (2 * step)
    allowed = 1e-3 * (np.max(np.abs(difference)) + np.max(np.abs(derivative))) + 1e-9 * np.max(np.abs(above)) / step
    if (error := float(np.max(np.abs(difference - derivative)))) > allowed:
        raise ValueError(f"{name}: expected analytic code (or an explicit derivative), got a complex step that is off by {error:.3g} "
                         "from a real difference (abs, conj and comparisons fool it)")
