r"""The chain on tensors: the same problem, grid, coefficients and noise as in the analytic part (theory.md, section 1).

    X_{i+1} = X_i + ( -f_i X_i + h_i a_i ) D_i + eta g_i sqrt(D_i) xi_i,        a_i = mu_theta(t_i, X_i)
    J(theta) = E[ e^{-rho T} r(X_N) ] - lambda E sum_i e^{-rho t_i} kappa_i D_i |a_i - s_i|^2        (nats per image, summed over pixels)

Schedules, grids, eta, the KL rate and the noise are those of `ctrl`; this file only moves them to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctrl import check
from ctrl.laws import Gaussian, GaussianMixture, Law
from ctrl.noise import QuadratureNoise, require_noise
from ctrl.schedule import Coefficients, Schedule, TimeGrid
from ctrl.torch.noise import AnyNoise, DeviceNoise, near
from ctrl.torch.policy import Policy, Times, denoised, lift

Reward = Callable[[Tensor, Any], Tensor]

CHUNK_NUMBERS = 2**25  # numbers of an (n, N, *shape) array at a time where paths are streamed
NUMBERS = ("paid", "cost_to_go", "noise_to_go", "k1", "kl", "prediction")  # of a run, per path or per step: what is kept of it without its states


@dataclass(frozen=True, eq=False)
class Problem:
    r"""Reward fine-tuning of a pre-trained image model: `ctrl.Problem` with a network in the place of the data law.

    schedule : any of `ctrl`'s      pretrained : the frozen policy s(t, x)      reward : (images (n, *shape), context) -> (n,)
    shape : of one state      kl_weight lambda >= 0, reward units per nat      eta >= 0      discount rho >= 0
    start : law of X_0; None for the prior N(0, prior variance I)
    Source: Scores as Actions (2409.08400); theory.md, section 1.   Checked: tests/test_torch_objectives.py::test_paths_equal_numpy
    """

    schedule: Schedule
    pretrained: Policy
    reward: Reward
    shape: tuple[int, ...]
    kl_weight: float
    eta: float = 1.0
    discount: float = 0.0
    start: Law | None = None

    def __post_init__(self) -> None:
        check.instance("schedule", self.schedule, Schedule, "a noising schedule")
        check.instance("pretrained", self.pretrained, Policy, "a ctrl.torch policy")
        check.instance("start", self.start, (Gaussian, GaussianMixture, type(None)), "a law or None")
        if not callable(self.reward):
            raise ValueError(f"reward: expected a callable (images, context) -> (n,), got {type(self.reward).__name__}")
        object.__setattr__(self, "shape", tuple(check.integer("shape", int(s), at_least=1) for s in self.shape))
        for name in ("kl_weight", "eta", "discount"):
            object.__setattr__(self, name, check.number(name, getattr(self, name), at_least=0))

    @property
    def dim(self) -> int:
        """Coordinates of a state."""
        return prod(self.shape)

    def grid(self, steps: int) -> TimeGrid:
        """A uniform grid of `steps` steps on [0, T]."""
        return TimeGrid.uniform(steps, self.schedule.horizon)

    def coefficients(self, grid: TimeGrid) -> Coefficients:
        """Left-point coefficients of the generation SDE on a grid, the library's own."""
        check.instance("grid", grid, TimeGrid, "a TimeGrid")
        if grid.times[-1] > self.schedule.horizon * (1 + 1e-12):
            raise ValueError(f"grid: expected times up to the horizon {self.schedule.horizon:g}, got {grid.times[-1]:.6g}")
        return self.schedule.coefficients(grid, self.eta, self.discount)

    def times(self, grid: TimeGrid, like: Tensor) -> Times:
        """The grid's N + 1 times, in the precision and on the device of `like`."""
        return Times.of(self.schedule, grid, like.dtype, like.device)

    def initial(self, noise: AnyNoise, like: Tensor) -> Tensor:
        """X_0, (n, *shape), as a pure function of the noise."""
        if self.start is None:
            x = noise.start(self.dim) * self.schedule.prior_variance**0.5
        else:
            x = self.start.sample(noise.noise if isinstance(noise, DeviceNoise) else noise)  # laws are NumPy's
        return torch.as_tensor(x).to(like).reshape(noise.paths, *self.shape)

    def require_path_kl(self) -> None:
        """ValueError at eta = 0, where path measures are singular to one another."""
        if self.eta == 0:
            raise ValueError("eta: expected eta > 0 for a log-density, a path KL or a score-function form, got 0")

    def rewards(self, images: Tensor, context: Any = None) -> Tensor:
        """r, (n,), checked for shape and finiteness."""
        r = self.reward(images, context)
        if not isinstance(r, Tensor) or r.shape != images.shape[:1]:
            raise ValueError(f"reward: expected a tensor of shape ({len(images)},), got {tuple(getattr(r, 'shape', ())) or type(r).__name__}")
        if not torch.isfinite(r.detach()).all():
            raise FloatingPointError(f"reward: expected finite numbers, got {int((~torch.isfinite(r.detach())).sum())} NaN or infinite of {len(r)}")
        return r


@dataclass(frozen=True, eq=False)
class Paths:
    r"""Simulated paths: `ctrl.rollout.Paths` on tensors.

        penalty = sum_i kappa_i D_i |a_i - s_i|^2      (nats per image; its mean is the path KL for eta > 0)

    terminal : (n, *shape)      reward, penalty, objective : (n,)
    Source: theory.md, sections 1 and 4.   Checked: tests/test_torch_objectives.py::test_paths_equal_numpy
    """

    terminal: Tensor
    reward: Tensor
    penalty: Tensor
    objective: Tensor


def simulate(problem: Problem, policy: Policy, grid: TimeGrid, noise: AnyNoise, context: Any = None, *,
             dtype: torch.dtype = torch.float32, progress: Callable[[int], None] | None = None, most: int | None = None) -> Paths:
    r"""Sample the chain under a policy, without gradients, some paths at a time; a pure function of its arguments.

        X_{i+1} = X_i + ( -f_i X_i + h_i a_i ) D_i + eta g_i sqrt(D_i) xi_i

    context : None, or per path (n, ...)      progress : told the number of paths done after every chunk
    most : paths at a time, where what the reward does with a path (a decoder's activations) is larger than the path
    Exact for the chain; weak order 1 against the continuous law.
    Source: theory.md, section 1.   Checked: tests/test_torch_objectives.py::test_paths_equal_numpy
    """
    _require(problem, grid, noise, context)
    size = min(max(1, CHUNK_NUMBERS // (problem.dim * grid.steps)), noise.paths if most is None else most)
    parts = []
    for first in range(0, noise.paths, size):
        part = slice(first, min(first + size, noise.paths))
        parts.append(_simulate(problem, policy, grid, noise[part], rows(context, part), dtype))
        if progress is not None:
            progress(part.stop)
    return Paths(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _require(problem: Problem, grid: TimeGrid, noise: AnyNoise, context: Any) -> None:
    """What is checked before paths are sampled."""
    problem.coefficients(grid)
    require_noise(noise)
    if isinstance(noise, QuadratureNoise) and problem.eta > 0 and not noise.has_steps:
        raise ValueError("noise: expected a quadrature rule with step noise at eta > 0, got one for eta = 0, whose steps are zero")
    if context is not None and len(context) != noise.paths:
        raise ValueError(f"context: expected one for each of {noise.paths} paths, got {len(context)}")


@torch.no_grad()
def _simulate(problem: Problem, policy: Policy, grid: TimeGrid, noise: AnyNoise, context: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    c = problem.coefficients(grid)
    times, penalty, running = None, 0.0, 0.0
    for i, x, a, _ in _chain(problem, policy, grid, noise, context, dtype):
        if i < grid.steps and policy is not problem.pretrained:
            times = times or problem.times(grid, x)
            squares = c.dt[i] * c.kappa[i] * _squares(a - problem.pretrained(times[i : i + 1], x[:, None], context)[:, 0])
            penalty, running = penalty + squares, running + c.discount[i] * squares
    reward = problem.rewards(x, context)
    zero = torch.zeros_like(reward)
    return x, reward, penalty + zero, c.final_discount * reward - problem.kl_weight * (running + zero)


def _chain(problem: Problem, policy: Policy, grid: TimeGrid, noise: AnyNoise, context: Any, dtype: torch.dtype,
           ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(i, X_i, a_i, xi_i) for i = 0 ... N - 1, then (N, X_N, -, -)."""
    c = problem.coefficients(grid)
    like = torch.empty(0, dtype=dtype, device=device_of(policy))
    noise = near(noise, like)
    x = problem.initial(noise, like)
    times = problem.times(grid, x)
    xi = torch.as_tensor(noise.steps(grid.steps, problem.dim)).to(x).reshape(len(x), grid.steps, *problem.shape)
    for i in range(grid.steps):
        a = policy(times[i : i + 1], x[:, None], context)[:, 0]
        yield i, x, a, xi[:, i]
        x = step(c, i, x, a) + float(c.noise[i]) * xi[:, i]
    yield grid.steps, x, a, xi[:, -1]


def step(c: Coefficients, i: int, x: Tensor, a: Tensor) -> Tensor:
    """E[X_{i+1} | X_i = x] = x + (-f x + h a) D: the mean of one Euler step."""
    return x + (-float(c.f[i]) * x + float(c.h[i]) * a) * float(c.dt[i])


def device_of(policy: Policy) -> torch.device:
    """Where a policy's parameters live (CPU when it has none)."""
    return next((p.device for p in policy.parameters()), torch.device("cpu"))


def rows(context: Any, part: slice) -> Any:
    """The context of some paths."""
    return None if context is None else context[part]


def _repeated(context: Any, k: int) -> Any:
    """A context per path, repeated for k times."""
    if context is None:
        return None
    if isinstance(context, Tensor):
        return context.repeat_interleave(k, dim=0)
    if hasattr(context, "repeated"):
        return context.repeated(k)
    return [context[j] for j in range(len(context)) for _ in range(k)]


def _squares(x: Tensor) -> Tensor:
    """|x|^2 over a state's coordinates: (n, *shape) -> (n,)."""
    return x.flatten(1).square().sum(1)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> over a state's coordinates: (n, k, *shape) -> (n, k)."""
    return (x * y).flatten(2).sum(2)


@dataclass(frozen=True, eq=False)
class Run:
    r"""A batch of sampled paths with everything that the losses are made of: `ctrl.estimators.Run` on tensors, (n, N, *shape).

    states : X_0 ... X_N      xi : the noise      actions : of the policy that sampled      reward : (n,), undiscounted
    joined : (n, ...) of this process -> of all processes, for what couples the paths of a batch
    policy : where gradients are taken; another one than that which sampled makes the run off-policy (PPO's later epochs)
    at_once : states per forward with gradients; beyond it activations are recomputed, results do not change (the paths stay: see `Batch`)
    """

    problem: Problem
    policy: Policy
    grid: TimeGrid
    states: Tensor
    xi: Tensor
    actions: Tensor
    reward: Tensor
    context: Any = None
    joined: Callable[[Tensor], Tensor] = lambda x: x
    at_once: int = 2**16

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, part: slice) -> Run:
        return replace(self, states=self.states[part], xi=self.xi[part], actions=self.actions[part], reward=self.reward[part],
                       context=rows(self.context, part))

    def under(self, policy: Policy) -> Run:
        """The same paths, with gradients in another policy's parameters; what does not depend on them is kept, graphs are not."""
        other = replace(self, policy=policy)
        if "s" in self.__dict__:
            other.__dict__["s"] = self.s
        return other.knowing(self.numbers())

    def numbers(self) -> dict[str, Tensor]:
        """What has been found of the paths so far beside their states, (n, ...)."""
        found = {name: self.__dict__[name] for name in NUMBERS if name in self.__dict__}
        for run in (self.__dict__.get("still"), self):
            if run is not None and "predicted_reward" in run.__dict__:
                found["prediction"] = run.predicted_reward.detach()
        return found

    def knowing(self, numbers: dict[str, Tensor]) -> Run:
        """This run, told what is known of its paths."""
        self.__dict__.update(numbers)
        return self

    @cached_property
    def still(self) -> Run:
        """The same paths for losses in a value's parameters: its states are numbers."""
        other = self.under(self.policy)
        other.__dict__["x"] = self.states[:, :-1]
        if "prediction" in other.__dict__:
            other.__dict__["predicted_reward"] = other.__dict__["prediction"]
        return other

    @cached_property
    def prompt(self) -> Tensor:
        """Number of each path's prompt, (n,): the context's `numbers`, or the context itself where that is one integer a path."""
        given = getattr(self.context, "numbers", self.context)
        asked = torch.as_tensor([0.5] if given is None else given, device=self.states.device)
        if asked.shape != (len(self),) or asked.is_floating_point():
            what = type(self.context).__name__
            raise ValueError(f"context: expected prompts, or the number of its prompt for each of {len(self)} paths, got {what}")
        return asked.long()

    @cached_property
    def coefficients(self) -> Coefficients:
        return self.problem.coefficients(self.grid)

    def at(self, column: Any) -> Tensor:
        """Per-step numbers of the coefficients, (N,), on the run's device."""
        return torch.as_tensor(column).to(self.states)

    @cached_property
    def times(self) -> Times:
        return self.problem.times(self.grid, self.states)

    @cached_property
    def x(self) -> Tensor:
        """X_0 ... X_{N-1} as a leaf, for gradients of values."""
        return self.states[:, :-1].clone().requires_grad_()

    @cached_property
    def mu(self) -> Tensor:
        """mu_theta at the sampled states: its graph holds theta, and not the states; after `divide` a leaf."""
        if "parts" in self.__dict__:
            return torch.cat([mu.detach() for mu in self.passing]).requires_grad_()
        return self._forward(self.policy, self.states[:, :-1])

    def divide(self, *parts: slice) -> None:
        """A gradient in mu stops there from now on; `passing` hands it on to theta, one part of the paths after the other."""
        self.__dict__["parts"] = parts

    @cached_property
    def passing(self) -> list[Tensor]:
        """mu of each part, in a graph of its own; made when a loss first asks for mu, and not while it finds what it weighs mu by."""
        return [self.mu_of(part) for part in self.__dict__["parts"]]

    @cached_property
    def pretrained(self) -> Tensor:
        """The pre-trained action at X_0 ... X_{N-1}; its graph holds the leaf `x`."""
        return self._forward(self.problem.pretrained, self.x)

    @cached_property
    def s(self) -> Tensor:
        """The pre-trained action at the sampled states, a number; taken from `pretrained` where that is there already."""
        if "pretrained" in self.__dict__:
            return self.pretrained.detach()
        with torch.no_grad():
            return self._forward(self.problem.pretrained, self.states[:, :-1])

    def mu_of(self, part: slice) -> Tensor:
        """mu of some paths, in a graph of their own; recomputed in the backward pass where that of all paths would be."""
        return self[part]._forward(self.policy, self.states[part, :-1], recomputed=len(self) > self._together)

    @property
    def _together(self) -> int:
        """Paths in a forward pass with gradients."""
        return max(1, self.at_once // self.grid.steps)

    def _forward(self, policy: Policy, x: Tensor, recomputed: bool = False) -> Tensor:
        """One call on all N n states, or several with their activations recomputed in the backward pass."""
        times, size = self.times[: self.grid.steps], self._together
        if len(x) <= size and not recomputed:
            return policy(times, x, self.context)
        return torch.cat([checkpoint(policy, times, x[a : a + size], rows(self.context, slice(a, a + size)), use_reentrant=False)
                          for a in range(0, len(x), size)])

    @cached_property
    def departure(self) -> Tensor:
        """mu_i - s_i."""
        return self.mu - self.s

    @cached_property
    def rate(self) -> Tensor:
        """lambda e^{-rho t_i} kappa_i D_i, (N,)."""
        c = self.coefficients
        return self.at(self.problem.kl_weight * c.discount * c.kappa * c.dt)

    @cached_property
    def cost(self) -> Tensor:
        """lambda e^{-rho t_i} kappa_i D_i |mu_i - s_i|^2, (n, N); minus its gradient in theta at fixed states is (d mu_i)'e_i."""
        return self.rate * inner(self.departure, self.departure)

    @cached_property
    def paid(self) -> Tensor:
        """The cost of the actions that were taken, (n, N), a number: `cost` at the sampling policy, and the same ever after."""
        return self.rate * inner(self.actions - self.s, self.actions - self.s)

    @cached_property
    def kl(self) -> Tensor:
        """Path KL of each path, sum_i kappa_i D_i |a_i - s_i|^2, (n,), nats."""
        return (self.at(self.coefficients.kappa * self.coefficients.dt) * inner(self.actions - self.s, self.actions - self.s)).sum(1)

    @cached_property
    def log_ratio(self) -> Tensor:
        r"""log p_theta(X_{i+1}|X_i) - log p_old(X_{i+1}|X_i), (n, N), summed over coordinates.

            delta'xi - |delta|^2/2,   delta_i = h_i sqrt(D_i)/(eta g_i) (mu_i - a_i): at the sampling policy 0, with gradient sigma_i
        """
        self.problem.require_path_kl()
        c = self.coefficients
        delta = lift(self.at(c.h * c.dt / c.noise), self.mu) * (self.mu - self.actions)
        return inner(delta, self.xi) - 0.5 * inner(delta, delta)

    @cached_property
    def k1(self) -> Tensor:
        """log p_old/p_pre of every step, u'xi + |u|^2/2 with u = sqrt(2 kappa D)(a - s), (n, N), nats."""
        self.problem.require_path_kl()
        c = self.coefficients
        u = lift(self.at((2 * c.kappa * c.dt) ** 0.5), self.s) * (self.actions - self.s)
        return inner(u, self.xi) + 0.5 * inner(u, u)

    @cached_property
    def final(self) -> Tensor:
        """e^{-rho T} r(X_N), (n,)."""
        return self.coefficients.final_discount * self.reward

    @cached_property
    def cost_to_go(self) -> Tensor:
        """sum_{j >= i} of what was paid, (n, N), a number."""
        return self.paid.flip(1).cumsum(1).flip(1)

    @cached_property
    def noise_to_go(self) -> Tensor:
        """lambda sum_{j >= i} u_j'xi_j, (n, N), a number of mean 0 given X_i (0 at eta = 0): with it the cost to go is lambda k1's sum."""
        if self.problem.eta == 0:
            return torch.zeros_like(self.paid)
        sampled = self.problem.kl_weight * self.at(self.coefficients.discount) * self.k1
        return (sampled - self.paid).flip(1).cumsum(1).flip(1)

    @cached_property
    def objective(self) -> Tensor:
        """The return r - sum cost of each path, (n,), a number."""
        return self.final - self.cost_to_go[:, 0]

    @cached_property
    def clean(self) -> Tensor:
        """x0_hat of the pre-trained model at X_0 ... X_{N-1}; its graph holds the leaf `x`."""
        return denoised(self.times[: self.grid.steps], self.x, self.pretrained)

    @cached_property
    def predicted_reward(self) -> Tensor:
        """r(x0_hat) at X_0 ... X_{N-1}, (n, N): N more evaluations of the reward for every path, on predictions instead of samples."""
        n, k = self.states.shape[0], self.grid.steps
        return self.problem.rewards(self.clean.flatten(0, 1), _repeated(self.context, k)).reshape(n, k)

    @cached_property
    def reward_gradient(self) -> Tensor:
        """e^{-rho T} grad r(X_N), (n, *shape)."""
        x = self.states[:, -1].clone().requires_grad_()
        r = self.problem.rewards(x, self.context)
        if not r.requires_grad:
            raise ValueError("reward: expected a differentiable reward for pathwise, adjoint or value gradients, got one without a gradient")
        return self.coefficients.final_discount * torch.autograd.grad(r.sum(), x)[0]


@torch.no_grad()
def sample(problem: Problem, policy: Policy, grid: TimeGrid, noise: AnyNoise, context: Any = None, *,
           dtype: torch.dtype = torch.float32, joined: Callable[[Tensor], Tensor] = lambda x: x, reward: Tensor | None = None) -> Run:
    r"""Paths with their trajectories, ready for the losses; sampled without gradients.

    reward : of these paths, where they have been sampled before and it need not be asked again

    Source: theory.md, section 7.   Checked: tests/test_torch_objectives.py::test_objectives_equal_numpy_estimators
    """
    _require(problem, grid, noise, context)
    columns = list(zip(*_chain(problem, policy, grid, noise, context, dtype), strict=True))
    states, actions, xi = torch.stack(columns[1], 1), torch.stack(columns[2][:-1], 1), torch.stack(columns[3][:-1], 1)
    reward = problem.rewards(states[:, -1], context) if reward is None else reward
    return Run(problem, policy, grid, states, xi, actions, reward, context, joined)
