"""One search of the step size for every algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctrl import check
from ctrl.learn.contract import Algorithm, judged, updates_of
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

HELD_OUT = (2**40, 2**40 + 1)  # seeds that no result uses


@dataclass(frozen=True)
class Search:
    """What was tried: the algorithm with its best step, and the mean final J of every step, -inf where one seed diverged."""

    algorithm: Algorithm
    scores: dict[float, float]


def search(algorithm: Algorithm, problem: Problem, policy: Policy, grid: TimeGrid, *, paths: int, updates: int,
           factor: float = 2.0, seeds: tuple[int, ...] = HELD_OUT, most: int = 16) -> Search:
    r"""The step size of best mean exact J(theta_K), by a walk on the grid step * factor^m from the algorithm's own step.

    From the best step so far its two neighbours are tried, until both are worse (or `most` steps have been tried). The same for all
    algorithms: same seeds, held out from results, same paths and updates as the race it is for. A run that diverges scores -inf.
    Source: theory.md, section 15.   Checked: tests/test_learn.py::test_the_search_finds_the_inside_of_its_grid
    """
    check.number("factor", factor, above=1)
    scores: dict[int, float] = {}

    def score(m: int) -> float:
        if m not in scores:
            tried = algorithm.with_step(algorithm.step * factor**m)
            scores[m] = float(np.mean([final(tried, problem, policy, grid, seed, paths, updates) for seed in seeds]))
        return scores[m]

    best = 0
    score(0)
    while len(scores) < most:
        near = max((best - 1, best + 1), key=score)
        if scores[near] == scores[best] == -np.inf:
            near = best - 1  # everything diverges: smaller
        elif scores[near] <= scores[best]:
            break
        best = near
    return Search(algorithm.with_step(algorithm.step * factor**best), {algorithm.step * factor**m: scores[m] for m in sorted(scores)})


def final(algorithm: Algorithm, problem: Problem, policy: Policy, grid: TimeGrid, seed: int, paths: int, updates: int) -> float:
    """Exact J after the last update, -inf for a run that diverged."""
    states = list(updates_of(algorithm, algorithm.start(problem, policy, grid), seed, paths, updates))
    return judged(states[-1]) if len(states) == updates else -np.inf
