r"""The contract of every algorithm: pure updates of a state, judged by the exact objective after each (theory.md, section 15)."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from ctrl import check, exact
from ctrl.check import Array
from ctrl.estimators import Estimator, Need, Run
from ctrl.noise import Noise, NoiseLike
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.rollout import simulate
from ctrl.schedule import TimeGrid


class Diverged(ArithmeticError):
    """Parameters that are no longer numbers."""


@dataclass(frozen=True)
class Counts:
    """What has been spent: rewards asked for, and passes through a network at one state, of the policy or of the pre-trained model.

    queries : rewards      forward : actions and scores      backward : pull-backs into theta or x
    A batch of n paths costs n queries and 2 n N forward passes (every action, and the score that its KL needs).
    """

    queries: int = 0
    forward: int = 0
    backward: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.queries + other.queries, self.forward + other.forward, self.backward + other.backward)

    @property
    def evaluations(self) -> int:
        """Passes in both directions."""
        return self.forward + self.backward


@dataclass(frozen=True, eq=False)
class State:
    """Where an algorithm is: its policy, what it remembers (a value, a penalty; None: nothing), and what it has spent."""

    problem: Problem
    policy: Policy
    grid: TimeGrid
    memory: Any = None
    counts: Counts = Counts()

    def sample(self, noise: NoiseLike, sampler: Policy | None = None) -> Run:
        """All paths of one batch, with their states; drawn by the policy, or by `sampler`. Diverged where a moved policy has lost them."""
        try:
            paths = simulate(self.problem, sampler or self.policy, self.grid, noise, trajectory=True)
        except ValueError as error:
            if self.counts.queries == 0:
                raise
            raise Diverged(str(error)) from error
        return Run(self.problem, self.policy, self.grid, noise, paths, sampler)

    def moved(self, policy: Policy, memory: Any, spent: Counts) -> State:
        """The state after an update."""
        return replace(self, policy=policy, memory=memory, counts=self.counts + spent)


class Algorithm(ABC):
    """How theta is moved: `start` makes a state, `update` is a pure function of a state and the noise of its paths.

    step : the one step size      backward : pull-backs per state and epoch
    """

    step: float
    backward = 1

    def start(self, problem: Problem, policy: Policy, grid: TimeGrid) -> State:
        """Before any path."""
        check.instance("problem", problem, Problem, "a ctrl.Problem")
        problem.check_types(policy, grid)
        check.number("step", self.step, above=0)
        self.require(problem, policy)
        return State(problem, policy, grid, self.remembered())

    def require(self, problem: Problem, policy: Policy) -> None:
        """ValueError for what the algorithm needs and is not there: eta > 0 unless it says otherwise."""
        problem.require_path_kl()

    def remembered(self) -> Any:
        """The memory before any path."""
        return None

    @abstractmethod
    def update(self, state: State, noise: NoiseLike) -> State:
        """After one batch of paths."""

    def with_step(self, step: float) -> Algorithm:
        """The same algorithm with another step size."""
        return replace(self, step=check.number("step", step, above=0))  # type: ignore[type-var]


def weights(noise: NoiseLike) -> Array:
    """Of the paths in a mean, (n,)."""
    return np.full(noise.paths, 1 / noise.paths) if noise.weights is None else noise.weights


def mean(estimator: Estimator, run: Run) -> Array:
    """The estimator's mean on paths that are there already, (p,)."""
    return weights(run.noise) @ estimator.prepared(lambda: iter([run]), run.noise).samples(run)


def ascended(policy: Policy, direction: Array) -> Policy:
    """theta + direction; Diverged when that is no longer a number."""
    theta = policy.theta + direction
    if not np.all(np.isfinite(theta)):
        raise Diverged(f"theta: expected numbers, got {theta}")
    return policy.with_theta(theta)


class Ascent(Algorithm):
    r"""Gradient ascent along the mean of an estimator, for one or several epochs on the same paths.

        theta <- theta + step * mean of cotangents' samples,       paths those of the theta before the first epoch
    """

    epochs = 1

    @abstractmethod
    def estimator(self, state: State, run: Run) -> tuple[Estimator, Any]:
        """What is followed on this batch, and what is remembered."""

    def update(self, state: State, noise: NoiseLike) -> State:
        run = state.sample(noise)
        estimator, memory = self.estimator(state, run)
        policy = state.policy
        for epoch in range(self.epochs):
            here = run if epoch == 0 else replace(run, policy=policy, sampler=state.policy)
            policy = ascended(policy, self.step * mean(estimator, here))
        return state.moved(policy, memory, spent(run, self.backward * self.epochs, again=self.epochs - 1))


class SimpleAscent(Ascent):
    """An estimator that needs no memory."""

    @abstractmethod
    def form(self) -> Estimator:
        """The estimator."""

    def require(self, problem: Problem, policy: Policy) -> None:
        if Need.DIFFUSION in self.form().needs:
            problem.require_path_kl()
        self.form().require(problem, policy)

    def estimator(self, state: State, run: Run) -> tuple[Estimator, Any]:
        return self.form(), None


def spent(run: Run, backward: int, again: int = 0) -> Counts:
    """Of one batch: two forward passes at every state, one more for every further look at it, and so many pull-backs."""
    states = run.noise.paths * run.grid.steps
    return Counts(run.noise.paths, (2 + again) * states, backward * states)


# ---- training, judged ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Training:
    r"""One run of an algorithm: exact J(theta_k) after every update k (or every m-th), and what it had cost by then.

    objective (K/m + 1,) : J(theta_0) ... J(theta_K), -inf from where theta or J stopped being a number
    theta (K/m + 1, p)   counts : as many   seconds (K/m + 1,) : of the algorithm alone, the judge's time not counted
    Source: theory.md, section 15.   Checked: tests/test_learn.py::test_training_is_judged_by_exact_objectives
    """

    algorithm: Algorithm
    state: State
    objective: Array
    theta: Array
    counts: tuple[Counts, ...]
    seconds: Array

    @property
    def diverged(self) -> bool:
        """Whether J stopped being a number."""
        return not np.all(np.isfinite(self.objective))

    @cached_property
    def queries(self) -> Array:
        """Rewards asked for, (K + 1,)."""
        return np.array([c.queries for c in self.counts])

    @cached_property
    def evaluations(self) -> Array:
        """Network passes, forward and backward, (K + 1,)."""
        return np.array([c.evaluations for c in self.counts])

    def reached(self, objective: float) -> int | None:
        """The first judged update from which J stays at or above a level; None where it does not end there."""
        below = np.flatnonzero(self.objective < objective)
        k = 0 if not len(below) else int(below[-1]) + 1
        return k if k < len(self.objective) else None


def noise_of(seed: int, k: int, paths: int) -> Noise:
    """The noise of update k: a pure function of (seed, k)."""
    return Noise(int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0]), paths)


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings of overflow and of unstable grids, which a step size that is too large brings about."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def updates_of(algorithm: Algorithm, state: State, seed: int, paths: int, updates: int) -> Iterator[State]:
    """The states after updates 1 ... K; ends early where theta diverges."""
    for k in range(updates):
        try:
            with quietly():
                state = algorithm.update(state, noise_of(seed, k, paths))
        except (Diverged, np.linalg.LinAlgError):
            return
        yield state


def judged(state: State) -> float:
    """Exact J, -inf where it is not a number or no exact method reaches that far out."""
    try:
        with quietly():
            J = exact.evaluate(state.problem, state.policy, state.grid).objective
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):
        return -math.inf
    return J if math.isfinite(J) else -math.inf


def train(algorithm: Algorithm, problem: Problem, policy: Policy, grid: TimeGrid, *, seed: int, paths: int, updates: int,
          every: int = 1) -> Training:
    r"""Run an algorithm and judge it by the exact objective after every update, J(theta_0) ... J(theta_K).

    every m : judge every m-th update only, K a multiple of m, where truth takes long      paths : per update
    seed : with k it gives the noise of update k, so that two runs are the same and every algorithm sees the same noise
    Source: theory.md, section 15.   Checked: tests/test_learn.py::test_training_is_judged_by_exact_objectives
    """
    check.integer("paths", paths, at_least=2)
    if check.integer("updates", updates, at_least=1) % check.integer("every", every, at_least=1):
        raise ValueError(f"updates: expected a multiple of every = {every}, got {updates}")
    state = algorithm.start(problem, policy, grid)
    states, J, seconds = [state], [exact.evaluate(problem, policy, grid).objective], [0.0]
    ahead = updates_of(algorithm, state, seed, paths, updates)
    while True:
        begin = time.perf_counter()
        group = list(islice(ahead, every))
        if len(group) < every:
            break
        after = group[-1]
        seconds.append(seconds[-1] + time.perf_counter() - begin)
        states.append(after)
        J.append(judged(after))
        if J[-1] == -math.inf:
            break
    lost = updates // every + 1 - len(states)
    states += [states[-1]] * lost
    return Training(algorithm, states[-1], np.array(J + [-math.inf] * lost), np.stack([s.policy.theta for s in states]),
                    tuple(s.counts for s in states), np.array(seconds + seconds[-1:] * lost))
