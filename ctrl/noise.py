r"""Randomness as an argument: normals that are a pure function of (seed, stream, path, step, coordinate).

    noise.start(d) (n, d),   noise.steps(k, d) (n, k, d),   noise.actions(k, d) (n, k, d),   noise.component(weights), noise.choice(weights) (n,)

Every kind of noise here has this face, `paths`, `weights` and `group`, and is sliced by paths: `noise[a:b]` holds the same
numbers as those paths of the whole. Nothing has a state, so results depend neither on chunking nor on threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.kernels import normals
from ctrl.kernels.threads import over_paths

if TYPE_CHECKING:
    from ctrl.policy import Policy
    from ctrl.problem import Problem
    from ctrl.schedule import TimeGrid

MAX_PATTERNS = 2**22
MAX_NODES = 100  # beyond about 180 the weights of the rule overflow


class NoiseLike(Protocol):
    """What `simulate` and the estimators ask of noise, random or quadrature."""

    @property
    def paths(self) -> int: ...

    @property
    def group(self) -> int:
        """Consecutive paths that form one independent unit: 2 for antithetic pairs, all of a quasi-Monte-Carlo replicate, else 1."""

    @property
    def weights(self) -> Array | None:
        """Quadrature weights (n,), summing to 1; None for random paths, which weigh the same."""

    def start(self, d: int) -> Array: ...

    def steps(self, k: int, d: int) -> Array: ...

    def actions(self, k: int, d: int) -> Array: ...

    def component(self, weights: ArrayLike) -> Array: ...

    def choice(self, weights: ArrayLike) -> Array: ...

    def __getitem__(self, part: slice) -> NoiseLike: ...


def require_noise(noise: Any) -> None:
    """ValueError unless `noise` can be asked for start and step normals."""
    if not all(hasattr(noise, name) for name in ("paths", "start", "steps")):
        raise ValueError(f"noise: expected a ctrl.Noise or one of its kind, got {type(noise).__name__}")


@dataclass(frozen=True)
class Noise:
    r"""Independent standard normals for n paths, a pure function of their coordinates.

        xi[p, i, j] = normal( Philox4x32-10( key = seed, counter = (p, i // 4, j, stream) ), i mod 4 )

    seed : int in [0, 2^64)      paths : n      antithetic : path 2m + 1 carries path 2m's normals negated (n even)
    first : index of the first path, so that a slice is a window on the same numbers

    float64 normals are within a few units in the last place of the exact Box-Muller of the same words; |xi| < 6.77.
    Source: Salmon et al. (2011), Random123; theory.md, section 0.   Checked: tests/test_noise.py::test_specification
    """

    seed: int
    paths: int
    antithetic: bool = False
    first: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected an integer in [0, 2^64), got {self.seed!r:.80}")
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "paths", check.integer("paths", self.paths, at_least=1))
        object.__setattr__(self, "first", check.integer("first", self.first, at_least=0))
        if self.antithetic and (self.paths % 2 or self.first % 2):
            raise ValueError(f"paths: expected whole antithetic pairs (an even number of paths, from an even path on), "
                             f"got {self.paths} from path {self.first}")
        if self.first + self.paths > 2**63:
            raise ValueError(f"paths: expected path indices below 2^63, got {self.first + self.paths}")

    @property
    def weights(self) -> None:
        """Random paths weigh the same."""
        return None

    @property
    def group(self) -> int:
        """Consecutive paths that form one independent unit."""
        return 2 if self.antithetic else 1

    def start(self, d: int) -> Array:
        """Normals of the start law, (n, d)."""
        return self._normals(normals.START, 1, d)[:, 0, :]

    def steps(self, k: int, d: int) -> Array:
        """Brownian increments in units of sqrt(D), (n, k, d)."""
        return self._normals(normals.STEP, k, d)

    def actions(self, k: int, d: int) -> Array:
        """Normals of sampled actions, (n, k, d)."""
        return self._normals(normals.ACTION, k, d)

    def component(self, weights: ArrayLike) -> Array:
        """A mixture component per path by inversion of one uniform (mirrored, 1 - u, for antithetic partners), (n,)."""
        u = (self._words(normals.COMPONENT)[:, 0] + 0.5) * 2.0**-32
        if self.antithetic:
            u[1::2] = 1 - u[1::2]
        return _inverted(weights, u)

    def choice(self, weights: ArrayLike) -> Array:
        """An index per path, such as a step, by inversion of another uniform (the same one for antithetic partners), (n,)."""
        return _inverted(weights, (self._words(normals.COMPONENT)[:, 1] + 0.5) * 2.0**-32)

    def __getitem__(self, part: slice) -> Noise:
        start, stop = _bounds(part, self.paths)
        if self.antithetic and (start % 2 or stop % 2):
            raise ValueError(f"noise[{start}:{stop}]: expected even bounds, for whole antithetic pairs")
        return replace(self, first=self.first + start, paths=stop - start)

    def coarsened(self, grid: TimeGrid, factor: int) -> CoarsenedNoise:
        """The same Brownian paths on every `factor`-th time of `grid`; see CoarsenedNoise."""
        return CoarsenedNoise(self, grid, factor)

    @classmethod
    def signs(cls, problem: Problem, policy: Policy, grid: TimeGrid) -> QuadratureNoise:
        r"""All sign patterns: exact expectations of polynomials of degree <= 3 in each variable.

            E p(xi) = 2^{-v} sum_{signs} p(+-1, ..., +-1),      v = d (start) + N d (steps, eta > 0) + N d (sampled actions)

        Equal weights, times the component's weight for a mixture start.
        Source: theory.md, section 7.   Checked: tests/test_noise.py::test_signs_integrate_cubics
        """
        return _quadrature(problem, policy, grid, np.array([-1.0, 1.0]), np.array([0.5, 0.5]))

    @classmethod
    def gauss_hermite(cls, problem: Problem, policy: Policy, grid: TimeGrid, nodes: int = 4) -> QuadratureNoise:
        r"""Tensor Gauss-Hermite rule: exact expectations of polynomials of degree <= 2 nodes - 1 in each variable.

        Source: theory.md, section 7.   Checked: tests/test_noise.py::test_gauss_hermite_degree
        """
        if check.integer("nodes", nodes, at_least=1) > MAX_NODES:
            raise ValueError(f"nodes: expected at most {MAX_NODES}, got {nodes}")
        x, w = np.polynomial.hermite_e.hermegauss(nodes)
        return _quadrature(problem, policy, grid, x, w / w.sum())

    @classmethod
    def cross(cls, problem: Problem, policy: Policy, grid: TimeGrid) -> ArrayNoise:
        r"""2 v paths, +-sqrt(v) along each of v variables: exact expectations of polynomials of total degree <= 3, on grids of any length.

            E p(xi) = 1/(2v) sum_j p(sqrt(v) e_j) + p(-sqrt(v) e_j),      v = d (start) + N d (steps) + N d (sampled actions)

        For the means of pathwise, value-gradient, q and lean-adjoint forms (degree 2 with affine policies and quadratic rewards), not of
        score functions (degree 4), and not for second moments. Gaussian start laws.
        Source: theory.md, section 7.   Checked: tests/test_noise.py::test_cross_integrates_cubics_in_all_variables_together
        """
        if hasattr(problem.start_law, "weights"):
            raise ValueError("problem: expected a Gaussian start law for a cross rule, got a mixture")
        d, N, sampled = problem.dim, grid.steps, policy.exploration is not None
        v = d * (1 + N * (1 + sampled))
        axes = math.sqrt(v) * np.concatenate([np.eye(v), -np.eye(v)])
        rest = axes[:, d:].reshape(2 * v, -1, d)
        return ArrayNoise(axes[:, :d], rest[:, :N], rest[:, N:] if sampled else None, np.full(2 * v, 0.5 / v))

    @classmethod
    def sobol(cls, problem: Problem, policy: Policy, grid: TimeGrid, seed: int, points: int, replicates: int = 16) -> SobolNoise:
        r"""Scrambled Sobol points for this problem, policy and grid, `replicates` times `points` (a power of 2) paths: see SobolNoise.

        Source: Owen (1997); scipy.stats.qmc.Sobol.   Checked: tests/test_noise.py::test_sobol_replicates_are_unbiased_and_narrow
        """
        return SobolNoise(seed, points, replicates, problem.dim, grid.steps, policy.exploration is not None)

    def _normals(self, stream: int, k: int, d: int) -> Array:
        k, d = check.integer("k", k, at_least=1), check.integer("d", d, at_least=1)
        out = np.empty((self.paths, k, d))
        key = np.uint64(self.seed)

        def fill(begin: int, end: int) -> None:
            normals.fill_normals(key, np.uint64(self.first + begin), int(self.antithetic), stream, out[begin:end])

        over_paths(fill, self.paths)
        return out

    def _words(self, stream: int) -> Array:
        """Words of step group 0, coordinate 0; antithetic partners share theirs."""
        out = np.empty((self.paths, 4), np.uint32)
        keep = np.uint64(2**64 - 1 - int(self.antithetic))
        normals.fill_words(np.uint64(self.seed), np.uint64(self.first), keep, np.uint32(0), np.uint32(stream << 28), out)
        return out


@dataclass(frozen=True, eq=False)
class CoarsenedNoise:
    r"""A Noise's Brownian paths seen on a coarser grid.

        xi_I = sum_{i in I} sqrt(D_i) xi_i / sqrt( sum_{i in I} D_i ),      I: `factor` consecutive fine steps

    so that sqrt(D_I) xi_I is the fine increments' sum; the same for action noise. Start and components are unchanged.
    fine : Noise      grid : the fine grid, N steps      factor : a divisor of N
    Source: theory.md, sections 3 and 12.   Checked: tests/test_noise.py::test_coarsening_adds_increments
    """

    fine: Noise
    grid: TimeGrid
    factor: int

    def __post_init__(self) -> None:
        check.integer("factor", self.factor, at_least=1)
        if self.grid.steps % self.factor:
            raise ValueError(f"factor: expected a divisor of the fine grid's {self.grid.steps} steps, got {self.factor}")

    @property
    def paths(self) -> int:
        return self.fine.paths

    @property
    def group(self) -> int:
        return self.fine.group

    @property
    def weights(self) -> None:
        return None

    def start(self, d: int) -> Array:
        """Normals of the start law, (n, d): those of the fine noise."""
        return self.fine.start(d)

    def steps(self, k: int, d: int) -> Array:
        """Coarse increments in units of sqrt(D_I), (n, k, d); k = N / factor."""
        return self._coarse(self.fine.steps, k, d)

    def actions(self, k: int, d: int) -> Array:
        """Action normals of the coarse steps, (n, k, d); k = N / factor."""
        return self._coarse(self.fine.actions, k, d)

    def component(self, weights: ArrayLike) -> Array:
        """Mixture components, (n,): those of the fine noise."""
        return self.fine.component(weights)

    def choice(self, weights: ArrayLike) -> Array:
        """Indices, (n,): those of the fine noise."""
        return self.fine.choice(weights)

    def __getitem__(self, part: slice) -> CoarsenedNoise:
        return replace(self, fine=self.fine[part])

    def _coarse(self, draw: Callable[[int, int], Array], k: int, d: int) -> Array:
        steps = self.grid.steps // self.factor
        if k != steps:
            raise ValueError(f"k: expected the coarse grid's {steps} steps ({self.grid.steps} / {self.factor}), got {k}")
        root = np.sqrt(self.grid.dt).reshape(steps, self.factor)
        root = root / np.linalg.norm(root, axis=1, keepdims=True)
        return np.einsum("nkjd,kj->nkd", draw(self.grid.steps, d).reshape(-1, steps, self.factor, d), root)


@dataclass(frozen=True, eq=False)
class QuadratureNoise:
    r"""A tensor quadrature rule with the face of Noise: its weighted mean over paths is an expectation.

        E p(xi) = sum_p weights[p] p(xi_p),      xi_p = (nodes[digit_v(p)])_v,   digits of p in base len(nodes)

    The variables are d start normals, then N d step normals, then N d action normals (the last two only where they
    matter; asked for where they do not, they are zero), then the component of a mixture start, then a choice (see `choosing`).
    nodes, node_weights : (q,)      components : (K,) weights of the start law's components, (1,) for a Gaussian      choices : likewise
    Source: theory.md, section 7.   Checked: tests/test_noise.py::test_signs_integrate_cubics
    """

    nodes: Array
    node_weights: Array
    components: Array
    dim: int
    grid_steps: int
    has_steps: bool
    has_actions: bool
    paths: int
    first: int = 0
    choices: Array = field(default_factory=lambda: np.ones(1))

    @property
    def group(self) -> int:
        return 1

    @property
    def variables(self) -> int:
        """Number of normals that the rule integrates over."""
        return self.dim * (1 + self.grid_steps * (self.has_steps + self.has_actions))

    @cached_property
    def weights(self) -> Array:
        """Weight of each path, (n,); they sum to 1 over the whole rule, to less over a slice."""
        out = np.ones(self.paths)
        for variable in range(self.variables):
            out *= self.node_weights[self._digit(variable)]
        return out * self.components[self._component()] * self.choices[self._choice()]

    def choosing(self, weights: ArrayLike) -> QuadratureNoise:
        """The rule times an index with these probabilities (K,), which `choice` then answers: K times as many paths. A whole rule only."""
        odds = check.array("weights", weights, (None,), "(K,)")
        whole = self.nodes.size**self.variables * self.components.size
        if self.choices.size > 1 or (self.first, self.paths) != (0, whole):
            raise ValueError(f"noise: expected a whole rule without a choice, got paths {self.first} ... {self.first + self.paths} of {whole}")
        return replace(self, choices=odds / odds.sum(), paths=whole * odds.size)

    def require(self, problem: Problem, policy: Policy, grid: TimeGrid) -> None:
        """ValueError where the rule lacks what the chain draws: zeros would pass for noise. More variables than needed do no harm."""
        lacking = (problem.eta > 0 and not self.has_steps) or (policy.exploration is not None and not self.has_actions)
        if lacking or (self.dim, self.grid_steps) != (problem.dim, grid.steps):
            raise ValueError("noise: expected a quadrature rule made for this problem, policy and grid (dimension, steps, step noise, "
                             f"sampled actions) = ({problem.dim}, {grid.steps}, {problem.eta > 0}, {policy.exploration is not None}), got one "
                             f"for ({self.dim}, {self.grid_steps}, {self.has_steps}, {self.has_actions})")

    def start(self, d: int) -> Array:
        """Nodes of the start normals, (n, d)."""
        return self._block(0, 1, d)[:, 0, :]

    def steps(self, k: int, d: int) -> Array:
        """Nodes of the step normals, (n, k, d); zero at eta = 0, where steps have no noise."""
        return self._block(1, k, d) if self.has_steps else np.zeros((self.paths, k, d))

    def actions(self, k: int, d: int) -> Array:
        """Nodes of the action normals, (n, k, d); zero when actions are means."""
        return self._block(1 + self.grid_steps * self.has_steps, k, d) if self.has_actions else np.zeros((self.paths, k, d))

    def component(self, weights: ArrayLike) -> Array:
        """Component of the start law of each path, (n,)."""
        if np.shape(weights) != self.components.shape:
            raise ValueError(f"weights: expected {self.components.size} component weights, got shape {np.shape(weights)}")
        return self._component()

    def choice(self, weights: ArrayLike) -> Array:
        """The index of each path, (n,), of a rule made by `choosing` the same weights."""
        odds = np.asarray(weights, dtype=np.float64)
        if odds.shape != self.choices.shape or not np.allclose(odds / odds.sum(), self.choices):
            raise ValueError(f"weights: expected those of noise.choosing(weights), {self.choices.size} of them, got shape {odds.shape}")
        return self._choice()

    def __getitem__(self, part: slice) -> QuadratureNoise:
        start, stop = _bounds(part, self.paths)
        return replace(self, first=self.first + start, paths=stop - start)

    def _index(self) -> Array:
        return np.arange(self.first, self.first + self.paths)

    def _digit(self, variable: int) -> Array:
        return self._index() // self.nodes.size**variable % self.nodes.size

    def _component(self) -> Array:
        return self._index() // self.nodes.size**self.variables % self.components.size

    def _choice(self) -> Array:
        return self._index() // (self.nodes.size**self.variables * self.components.size)

    def _block(self, offset: int, k: int, d: int) -> Array:
        """Normals of k steps, from the offset-th block of d variables on."""
        if d != self.dim or k != (self.grid_steps if offset else 1):
            raise ValueError(f"(k, d): expected the rule's ({self.grid_steps}, {self.dim}), got ({k}, {d})")
        out = np.empty((self.paths, k, d))
        for i in range(k):
            for j in range(d):
                out[:, i, j] = self.nodes[self._digit((offset + i) * d + j)]
        return out


def _quadrature(problem: Problem, policy: Policy, grid: TimeGrid, nodes: Array, node_weights: Array) -> QuadratureNoise:
    components = np.asarray(getattr(problem.start_law, "weights", [1.0]), dtype=np.float64)
    has_steps, has_actions = problem.eta > 0, policy.exploration_factor(grid) is not None
    variables = problem.dim * (1 + grid.steps * (has_steps + has_actions))
    if variables * math.log(nodes.size) + math.log(components.size) > math.log(MAX_PATTERNS) + 1e-9:
        product = f"{nodes.size}^{variables}" + (f" x {components.size} components" if components.size > 1 else "")
        raise ValueError(f"grid: expected a rule of at most 2^22 patterns, got {product} (d = {problem.dim}, {grid.steps} "
                         f"steps); reduce the steps, the dimension or the nodes")
    return QuadratureNoise(nodes, node_weights, components, problem.dim, grid.steps, has_steps, has_actions,
                           paths=nodes.size**variables * components.size)


@dataclass(frozen=True, eq=False)
class ArrayNoise:
    r"""Normals that somebody else has made, with the face of Noise: rows of any rule, replayed draws, one path by hand.

    start_normals : (n, d)   step_normals : (n, N, d)   action_normals : (n, N, d) or None   weights : (n,) of a quadrature rule, or None
    group : consecutive paths that form one independent unit      No component and no choice: a mixture start draws one.
    Source: theory.md, section 7.   Checked: tests/test_noise.py::test_cross_integrates_cubics_in_all_variables_together
    """

    start_normals: Array
    step_normals: Array
    action_normals: Array | None = None
    weights: Array | None = None
    group: int = 1

    def __post_init__(self) -> None:
        start = check.array("start_normals", self.start_normals, (None, None), "(n, d)")
        steps = check.array("step_normals", self.step_normals, (len(start), None, start.shape[1]), f"({len(start)}, N, {start.shape[1]})")
        object.__setattr__(self, "start_normals", start)
        object.__setattr__(self, "step_normals", steps)
        if self.action_normals is not None:
            object.__setattr__(self, "action_normals", check.array("action_normals", self.action_normals, steps.shape, f"{steps.shape}"))
        if self.weights is not None:
            object.__setattr__(self, "weights", check.array("weights", self.weights, (len(start),), f"({len(start)},)"))
        if check.integer("group", self.group, at_least=1) > 1 and (self.weights is not None or len(start) % self.group):
            given = "weights" if self.weights is not None else f"{len(start)} paths"
            raise ValueError(f"group: expected 1 with weights, or whole groups of paths, got {self.group} with {given}")

    @property
    def paths(self) -> int:
        return len(self.start_normals)

    def start(self, d: int) -> Array:
        """Normals of the start law, (n, d)."""
        return _of_shape(self.start_normals, self.start_normals.shape[0], d)

    def steps(self, k: int, d: int) -> Array:
        """Step normals, (n, k, d)."""
        return _of_shape(self.step_normals, self.paths, k, d)

    def actions(self, k: int, d: int) -> Array:
        """Normals of sampled actions, (n, k, d)."""
        if self.action_normals is None:
            raise ValueError("noise: expected action normals for a policy with exploration, got None")
        return _of_shape(self.action_normals, self.paths, k, d)

    def component(self, weights: ArrayLike) -> Array:
        """Nobody has made any."""
        raise ValueError("noise: expected noise that draws indices (a mixture start, a random step), got an ArrayNoise")

    choice = component

    def __getitem__(self, part: slice) -> ArrayNoise:
        begin, end = _bounds(part, self.paths)
        start, steps, actions, weights = (None if a is None else a[begin:end] for a in
                                          (self.start_normals, self.step_normals, self.action_normals, self.weights))
        assert start is not None and steps is not None
        return ArrayNoise(start, steps, actions, weights, self.group)


def _of_shape(array: Array, *shape: int) -> Array:
    if array.shape != shape:
        raise ValueError(f"noise: expected normals for this problem, policy and grid, shape {shape}, got {array.shape}")
    return array


@dataclass(frozen=True, eq=False)
class SobolNoise:
    r"""Randomised quasi-Monte Carlo: scrambled Sobol points through the inverse normal CDF, several independent scramblings.

        xi[r points + m, v] = Phi^{-1}( u_{r,m,v} ),      u_r the m-th scrambled Sobol point of replicate r;  v: start, steps in time, actions

    seed : int      points : of a replicate, a power of 2      replicates : independent scramblings, the units of every standard error
    first, count : the window of paths, so that a slice is the same numbers
    Every path is standard normal by itself, so that means are unbiased; the paths of a replicate depend on one another, and its mean has an
    error that falls faster than points^{-1/2} for smooth integrands. The standard error is over replicates, of which 16 or more are wanted.
    Source: Owen (1997); scipy.stats.qmc.Sobol.   Checked: tests/test_noise.py::test_sobol_replicates_are_unbiased_and_narrow
    """

    seed: int
    points: int
    replicates: int
    dim: int
    grid_steps: int
    has_actions: bool
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        check.integer("seed", self.seed, at_least=0)
        check.integer("replicates", self.replicates, at_least=2)
        if check.integer("points", self.points, at_least=2) & (self.points - 1):
            raise ValueError(f"points: expected a power of 2, got {self.points}")

    @property
    def paths(self) -> int:
        return self.points * self.replicates - self.first if self.count is None else self.count

    @property
    def group(self) -> int:
        """The paths of a replicate are one unit."""
        return self.points

    @property
    def weights(self) -> None:
        return None

    def start(self, d: int) -> Array:
        """Normals of the start law, (n, d)."""
        return _of_shape(self._normals[:, : self.dim], self.paths, d)

    def steps(self, k: int, d: int) -> Array:
        """Step normals, (n, k, d)."""
        return self._block(1, k, d)

    def actions(self, k: int, d: int) -> Array:
        """Normals of sampled actions, (n, k, d)."""
        if not self.has_actions:
            raise ValueError("noise: expected a rule made for a policy with exploration, got one for mean actions")
        return self._block(1 + self.grid_steps, k, d)

    def component(self, weights: ArrayLike) -> Array:
        """Mixture components by inversion of a coordinate of their own, (n,)."""
        return _inverted(weights, self._uniforms[:, -2])

    def choice(self, weights: ArrayLike) -> Array:
        """Indices by inversion of a coordinate of their own, (n,)."""
        return _inverted(weights, self._uniforms[:, -1])

    def __getitem__(self, part: slice) -> SobolNoise:
        begin, end = _bounds(part, self.paths)
        return replace(self, first=self.first + begin, count=end - begin)

    def _block(self, offset: int, k: int, d: int) -> Array:
        begin = offset * self.dim
        block = self._normals[:, begin : begin + self.grid_steps * self.dim]
        return _of_shape(block.reshape(self.paths, self.grid_steps, self.dim), self.paths, k, d)

    @cached_property
    def _normals(self) -> Array:
        from scipy.special import ndtri  # heavy: only when asked for

        return ndtri(self._uniforms[:, :-2])

    @cached_property
    def _uniforms(self) -> Array:
        """(n, variables + 2): coordinates in the order of the variables, then one for the component, one for the choice."""
        variables, last, parts = self.dim * (1 + self.grid_steps * (1 + self.has_actions)), self.first + self.paths, []
        for replicate in range(self.first // self.points, -(-last // self.points)):
            before = replicate * self.points
            whole = _scrambled(self.seed, replicate, self.points, variables + 2)
            parts.append(whole[max(self.first - before, 0) : last - before])
        return np.concatenate(parts)


@lru_cache(maxsize=4)
def _scrambled(seed: int, replicate: int, points: int, coordinates: int) -> Array:
    """A replicate's uniforms, the middles of cells of 2^-52, (points, coordinates); kept, as chunks of paths ask for it again."""
    from scipy.stats import qmc

    engine = qmc.Sobol(coordinates, scramble=True, bits=52, seed=np.random.default_rng((seed, replicate)))
    out = engine.random(points) + 2.0**-53
    out.flags.writeable = False
    return out


def _inverted(weights: ArrayLike, u: Array) -> Array:
    """Indices with these weights (K,) by inversion of uniforms (n,), (n,)."""
    cumulative = np.cumsum(check.array("weights", weights, (None,), "(K,)"))
    return np.minimum(np.searchsorted(cumulative, u * cumulative[-1], side="right"), cumulative.size - 1)


def _bounds(part: slice, paths: int) -> tuple[int, int]:
    if not isinstance(part, slice):
        raise ValueError(f"noise[...]: expected a slice of paths, got {part!r:.80}")
    start, stop, step = part.indices(paths)
    if step != 1 or stop <= start:
        raise ValueError(f"noise[...]: expected a non-empty slice of consecutive paths, got {part} of {paths} paths")
    return start, stop
