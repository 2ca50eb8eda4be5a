r"""The Euler-Maruyama chain in normal form, on blocks of lanes.

    x' = A x + c + s xi + E z + sum_j drive_j score_j(x),      u = U x + u0 + F z + sum_j charge_j score_j(x)
    square += |u|^2,   cross += u'xi,   discounted += discount |u|^2,      u = sqrt(2 kappa D) (a - s)

Parts that a case does not have come as empty arrays and are skipped, a whole row of lanes at a time: one kernel per precision
serves every case, and the test for emptiness costs nothing beside the row.
Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_chain_is_its_specification
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ctrl.kernels.mixture import accumulate, add_product, axpy, fill, score_rows
from ctrl.kernels.normals import ACTION, FAST, LANES, STEP, normals

Array = np.ndarray[Any, Any]


class Words(NamedTuple):
    """Noise from counters: key (u64), first path (u64), antithetic (0 or 1)."""

    key: Any
    first: Any
    antithetic: int


class Given(NamedTuple):
    """Noise from arrays: xi and z (n, N, d); empty for counter noise, z empty without exploration."""

    xi: Array
    z: Array


class Motion(NamedTuple):
    """A (N, d, d), c (N, d), s (N,)."""

    A: Array
    c: Array
    s: Array


class Exploration(NamedTuple):
    """Sampled actions: E = h D L and F = sqrt(2 kappa D) L, (N, d, d), L L' = Sigma; empty when actions are means."""

    E: Array
    F: Array


class Cost(NamedTuple):
    """U (N, d, d), u0 (N, d), empty when u = 0; discount (N,), empty for none."""

    U: Array
    u0: Array
    discount: Array


class Scores(NamedTuple):
    """S mixtures a step: means (S, N, M, d), precisions (S, N, M, d, d), constants (S, N, M), drive and charge (S, N)."""

    means: Array
    precisions: Array
    constants: Array
    drive: Array
    charge: Array


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
def run(begin, end, x, words, given, motion, exploration, cost, scores, sums, states):
    """Paths begin ... end - 1: x (n, d) holds the start and receives the end; sums (n, 3): square, cross, discounted.

    given, exploration, cost, scores and states (n, N + 1, d) may be empty; `words` is used when `given` is.
    """
    for block in range(begin, end, LANES):
        run_block(block, min(LANES, end - block), x, words, given, motion, exploration, cost, scores, sums, states)


@njit(error_model="numpy", fastmath=FAST)
def run_block(begin, width, x, words, given, motion, exploration, cost, scores, sums, states):
    """Up to LANES paths from `begin` on; a narrow block is padded with zeros."""
    dim, steps = x.shape[1], motion.s.shape[0]
    state, new = np.zeros((dim, LANES), x.dtype), np.zeros((dim, LANES), x.dtype)
    xi, z = np.zeros((4 * dim, LANES), x.dtype), np.zeros((4 * dim, LANES), x.dtype)
    u, total = np.zeros((dim, LANES), x.dtype), np.zeros((3, LANES), x.dtype)
    word = np.empty((4, LANES), np.uint32)
    score, gap = np.empty((dim, LANES), x.dtype), np.empty((dim, LANES), x.dtype)
    pull, level = np.empty((scores.means.shape[2] * dim, LANES), x.dtype), np.empty((scores.means.shape[2], LANES), x.dtype)
    top, half = np.empty(LANES, x.dtype), x.dtype.type(0.5)
    load(x, begin, width, state)
    record(states, begin, width, 0, state)
    for i in range(steps):
        now = (i % 4) * dim
        if i % 4 == 0:
            draw(words, given, exploration, begin, width, i, dim, word, xi, z)
        xi_now, z_now = xi[now : now + dim], z[now : now + dim]
        move(motion, exploration, i, state, xi_now, z_now, new)
        steer(cost, exploration, i, state, z_now, u)
        for j in range(scores.drive.shape[0]):
            score_rows(state, scores.means[j, i], scores.precisions[j, i], scores.constants[j, i], half,
                       gap, pull, level, top, score)
            add_score(scores.drive[j, i], score, new)
            add_score(scores.charge[j, i], score, u)
        charge(cost, i, u, xi_now, total)
        record(states, begin, width, i + 1, new)
        state, new = new, state
    for lane in range(width):
        for a in range(dim):
            x[begin + lane, a] = state[a, lane]
        for a in range(3):
            sums[begin + lane, a] = total[a, lane]


@njit(error_model="numpy", fastmath=FAST)
def draw(words, given, exploration, begin, width, i, dim, word, xi, z):
    """Normals of steps i ... i + 3, rows (step, coordinate): xi, and z when actions are sampled."""
    if given.xi.shape[0] == 0:
        first = np.uint64(words.first + np.uint64(begin))
        normals(words.key, first, words.antithetic, STEP, i // 4, dim, word, xi)
        if exploration.E.shape[0] > 0:
            normals(words.key, first, words.antithetic, ACTION, i // 4, dim, word, z)
    else:
        for r in range(min(4, given.xi.shape[1] - i)):
            load(given.xi[:, i + r], begin, width, xi[r * dim : (r + 1) * dim])
            if exploration.E.shape[0] > 0:
                load(given.z[:, i + r], begin, width, z[r * dim : (r + 1) * dim])


@njit(error_model="numpy", fastmath=FAST)
def load(x, begin, width, rows):
    """Paths (n, d) to rows (d, LANES)."""
    for lane in range(width):
        for a in range(rows.shape[0]):
            rows[a, lane] = x[begin + lane, a]


@njit(error_model="numpy", fastmath=FAST)
def record(states, begin, width, i, rows):
    """Rows (d, LANES) to states[:, i]."""
    if states.shape[0] > 0:
        for lane in range(width):
            for a in range(rows.shape[0]):
                states[begin + lane, i, a] = rows[a, lane]


@njit(error_model="numpy", fastmath=FAST)
def move(motion, exploration, i, state, xi, z, new):
    """new = A x + c + s xi + E z."""
    for a in range(state.shape[0]):
        scaled_plus(motion.s[i], xi[a], motion.c[i, a], new[a])
        accumulate(motion.A[i, a], state, new[a])
        if exploration.E.shape[0] > 0:
            accumulate(exploration.E[i, a], z, new[a])


@njit(error_model="numpy", fastmath=FAST)
def steer(cost, exploration, i, state, z, u):
    """u = U x + u0 + F z."""
    if cost.U.shape[0] > 0:
        for a in range(state.shape[0]):
            fill(u[a], cost.u0[i, a])
            accumulate(cost.U[i, a], state, u[a])
            if exploration.E.shape[0] > 0:
                accumulate(exploration.F[i, a], z, u[a])


@njit(error_model="numpy", fastmath=FAST)
def add_score(coefficient, score, out):
    """out += coefficient * score."""
    if coefficient != 0:
        for a in range(score.shape[0]):
            axpy(coefficient, score[a], out[a])


@njit(error_model="numpy", fastmath=FAST)
def charge(cost, i, u, xi, total):
    """square += |u|^2, cross += u'xi, discounted += discount |u|^2."""
    if cost.U.shape[0] > 0:
        for a in range(u.shape[0]):
            add_product(u[a], u[a], total[0])
            add_product(u[a], xi[a], total[1])
            if cost.discount.size > 0:
                add_scaled_square(cost.discount[i], u[a], total[2])


@njit(error_model="numpy", fastmath=FAST)
def scaled_plus(s, x, c, out):
    for lane in range(LANES):
        out[lane] = c + s * x[lane]


@njit(error_model="numpy", fastmath=FAST)
def add_scaled_square(s, x, out):
    for lane in range(LANES):
        out[lane] += s * (x[lane] * x[lane])
