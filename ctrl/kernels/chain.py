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

from ctrl.kernels.mixture import accumulate, axpy, fill, score_rows
from ctrl.kernels.normals import ACTION, FAST, LANES, STEP, WIDTH, normals, row

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
    dim, steps, size, half = x.shape[1], motion.s.shape[0], x.shape[1] * LANES, x.dtype.type(0.5)
    count, mixtures = scores.means.shape[2], scores.drive.shape[0]
    costs, samples, draws, keeps = cost.U.shape[0] > 0, exploration.E.shape[0] > 0, given.xi.shape[0] == 0, states.shape[0] > 0
    state, new, u, total = np.zeros(size, x.dtype), np.zeros(size, x.dtype), np.zeros(size, x.dtype), np.zeros(3 * LANES, x.dtype)
    xi, z, word = np.zeros(4 * size, x.dtype), np.zeros(4 * size, x.dtype), np.empty(4 * LANES, np.uint32)
    score, gap, top = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(LANES, x.dtype)
    pull, level = np.empty(count * size, x.dtype), np.empty(count * LANES, x.dtype)
    first = np.uint64(words.first + np.uint64(begin))
    for lane in range(width):
        for a in range(dim):
            state[a * LANES + lane] = x[begin + lane, a]
    if keeps:
        record(states, begin, width, 0, dim, state)
    for i in range(steps):
        now = row((i % 4) * dim)
        if i % 4 == 0 and draws:
            normals(words.key, first, words.antithetic, STEP, i // 4, dim, word, xi)
            if samples:
                normals(words.key, first, words.antithetic, ACTION, i // 4, dim, word, z)
        elif not draws:
            load(given.xi, begin, width, i, dim, xi, now)
            if samples:
                load(given.z, begin, width, i, dim, z, now)
        move(motion.A, motion.c, motion.s, exploration.E, i, dim, state, xi, z, now, new)
        if costs:
            steer(cost.U, cost.u0, exploration.F, i, dim, state, z, now, u)
        for j in range(mixtures):
            score_rows(state, dim, j, i, scores.means, scores.precisions, scores.constants, half, gap, pull, level, top, score)
            for a in range(dim):
                if scores.drive[j, i] != 0:
                    axpy(scores.drive[j, i], score, row(a), new, row(a))
                if scores.charge[j, i] != 0:
                    axpy(scores.charge[j, i], score, row(a), u, row(a))
        if costs:
            for a in range(dim):
                charge(u, row(a), xi, now + row(a), total)
                if cost.discount.size > 0:
                    add_scaled_square(cost.discount[i], u, row(a), total, row(2))
        if keeps:
            record(states, begin, width, i + 1, dim, new)
        state, new = new, state
    for lane in range(width):
        for a in range(dim):
            x[begin + lane, a] = state[a * LANES + lane]
        for a in range(3):
            sums[begin + lane, a] = total[a * LANES + lane]


@njit(error_model="numpy", fastmath=FAST)
def load(source, begin, width, i, dim, out, at):
    """source[begin: begin + width, i] (n, N, d) to rows."""
    for lane in range(width):
        for a in range(dim):
            out[at + row(a) + np.uint64(lane)] = source[begin + lane, i, a]


@njit(error_model="numpy", fastmath=FAST)
def record(states, begin, width, i, dim, rows):
    """Rows to states[:, i]."""
    for lane in range(width):
        for a in range(dim):
            states[begin + lane, i, a] = rows[a * LANES + lane]


@njit(error_model="numpy", fastmath=FAST)
def move(A, c, s, E, i, dim, state, xi, z, now, new):
    """new = A x + c + s xi + E z; in one pass where A couples a coordinate to itself alone."""
    for a in range(dim):
        at, alone = row(a), True
        for b in range(dim):
            alone = alone and (a == b or A[i, a, b] == 0)
        if alone:
            affine(A[i, a, a], state, at, c[i, a], s[i], xi, now + at, new)
        else:
            scaled_plus(s[i], xi, now + at, c[i, a], new, at)
            accumulate(A, i, a, state, dim, new, at)
        if E.shape[0] > 0:
            explore(E, i, a, z, now, dim, new, at)


@njit(error_model="numpy", fastmath=FAST)
def steer(U, u0, F, i, dim, state, z, now, u):
    """u = U x + u0 + F z."""
    for a in range(dim):
        fill(u, row(a), u0[i, a])
        accumulate(U, i, a, state, dim, u, row(a))
        if F.shape[0] > 0:
            explore(F, i, a, z, now, dim, u, row(a))


@njit(error_model="numpy", fastmath=FAST)
def explore(factor, i, a, z, now, dim, out, at):
    """out += sum_b factor[i, a, b] z_b, a triangular factor."""
    for b in range(a + 1):
        if factor[i, a, b] != 0:
            axpy(factor[i, a, b], z, now + row(b), out, at)


@njit(error_model="numpy", fastmath=FAST)
def affine(slope, x, at, shift, scale, z, az, out):
    for lane in range(WIDTH):
        out[at + lane] = slope * x[at + lane] + (shift + scale * z[az + lane])


@njit(error_model="numpy", fastmath=FAST)
def scaled_plus(scale, z, az, shift, out, at):
    for lane in range(WIDTH):
        out[at + lane] = shift + scale * z[az + lane]


@njit(error_model="numpy", fastmath=FAST)
def charge(u, at, xi, ax, total):
    """square += u^2, cross += u xi."""
    for lane in range(WIDTH):
        value = u[at + lane]
        total[lane] += value * value
        total[WIDTH + lane] += value * xi[ax + lane]


@njit(error_model="numpy", fastmath=FAST)
def add_scaled_square(s, x, ax, out, at):
    for lane in range(WIDTH):
        out[at + lane] += s * (x[ax + lane] * x[ax + lane])
