r"""The Euler-Maruyama chain in normal form, on blocks of lanes.

    x' = A x + c + s xi + E z + sum_j drive_j score_j(x),      u = U x + u0 + F z + sum_j charge_j score_j(x)
    square += |u|^2,   cross += u'xi,   discounted += discount |u|^2,      u = sqrt(2 kappa D) (a - s)

Parts that a case does not have come as empty arrays and are skipped, a whole row of lanes at a time: one kernel per precision
serves every case, and the test for emptiness costs nothing beside the row.
Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_chain_is_its_specification
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ctrl import elementary
from ctrl.elementary import FAST, built_from
from ctrl.kernels.gradient import DIFFERENCE, NO_VALUE, add_value, collect, hand_over, spend
from ctrl.kernels.mixture import score_rows
from ctrl.kernels.normals import ACTION, LANES, STEP, WIDTH, normals, row
from ctrl.kernels.rows import add_product, affine, affine_4, axpy, copy, fill, scaled_plus

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
    """A (N, d, d), empty where it is diagonal: then slope (N, d); c (N, d), s (N,)."""

    A: Array
    slope: Array
    c: Array
    s: Array


class Exploration(NamedTuple):
    """Sampled actions: E = h D L and F = sqrt(2 kappa D) L, (N, d, d), L L' = Sigma; empty when actions are means."""

    E: Array
    F: Array


class Cost(NamedTuple):
    """u0 (N, d), empty when u = 0; U (N, d, d), empty when zero; discount (N,), empty for none."""

    U: Array
    u0: Array
    discount: Array


class Own(NamedTuple):
    """A user's compiled action(t, x (n, d), theta) -> (n, d): drives x and charges u like a score; times, drive, charge (N,)."""

    action: Any
    theta: Array
    times: Array
    drive: Array
    charge: Array


class Scores(NamedTuple):
    """S mixtures a step: means (S, N, M, d), precisions (S, N, M, d, d), constants (S, N, M), drive and charge (S, N)."""

    means: Array
    precisions: Array
    constants: Array
    drive: Array
    charge: Array


@built_from(elementary.__file__, *sorted(Path(__file__).parent.glob("*.py")))
@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
def run(begin, end, x, words, given, motion, exploration, cost, scores, own, wanted, sums, states, samples):
    """Paths begin ... end - 1: x (n, d) holds the start and receives the end; sums (n, 3): square, cross, discounted.

    given, exploration, cost, scores, states (n, N + 1, d) and samples (2, n, p) may be empty, own None; `words` is used when `given` is.
    With samples (of what is `wanted`), sums[:, 2] is what is spent.
    """
    room = scratch(x, scores.means.shape[2], scores.drive.shape[0], samples.shape[2])
    for block in range(begin, end, LANES):
        run_block(block, min(LANES, end - block), x, words, given, motion, exploration, cost, scores, own, wanted, sums, states, samples, room)


class Room(NamedTuple):
    """Rows to work in, made once a call: fresh ones for every block would be handed back to the system and faulted in again."""

    state: Array
    before: Array
    u: Array
    total: Array
    xi: Array
    z: Array
    word: Array
    score: Array
    gap: Array
    new: Array
    top: Array
    level: Array
    weight: Array
    score_sum: Array
    other_sum: Array
    mine: Array
    real: Array


@njit(error_model="numpy", fastmath=FAST)
def scratch(x, count, mixtures, parameters):
    kind, size = x.dtype, x.shape[1] * LANES
    return Room(
        np.zeros(size, kind), np.zeros(size, kind), np.zeros(size, kind), np.zeros(3 * LANES, kind), np.zeros(4 * size, kind),
        np.zeros(4 * size, kind), np.empty(4 * LANES, np.uint32), np.empty(mixtures * size, kind), np.empty(size, kind),
        np.empty(size, kind), np.empty(LANES, kind), np.empty((count + 1) * LANES, kind), np.zeros(LANES, kind),
        np.zeros(parameters * LANES, kind), np.zeros(parameters * LANES, kind), np.empty(size, kind), np.empty(size))


@njit(error_model="numpy", fastmath=FAST)
def run_block(begin, width, x, words, given, motion, exploration, cost, scores, own, wanted, sums, states, samples, room):
    """Up to LANES paths from `begin` on; what pads a narrow block is computed and dropped."""
    A, slope, c, s = motion
    E, F = exploration
    U, u0, discount = cost
    means, precisions, constants, drive, charge = scores
    terms, gain, pull, price, sampled, to_go, use, S, w, z0 = wanted
    dim, steps, size, half = x.shape[1], s.shape[0], x.shape[1] * LANES, x.dtype.type(0.5)
    one, mixtures, parameters = half + half, drive.shape[0], samples.shape[2]
    costs, explores, draws, keeps, collects = u0.shape[0] > 0, E.shape[0] > 0, given.xi.shape[0] == 0, states.shape[0] > 0, parameters > 0
    glides = own is None and not (costs or explores or keeps or collects or mixtures > 0 or A.shape[0] > 0)
    state, before, u, total, xi, z, word, score, gap, new, top, level, weight, score_sum, other_sum, mine, real = room
    for start in (state, total, score_sum, other_sum):
        start[:] = 0
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
            if explores:
                normals(words.key, first, words.antithetic, ACTION, i // 4, dim, word, z)
        elif not draws:
            load(given.xi, begin, width, i, dim, xi, now)
            if explores:
                load(given.z, begin, width, i, dim, z, now)
        if glides:
            glide(slope, c, s, i, dim, draws, state, xi, now)
            continue
        for j in range(mixtures):
            score_rows(state, dim, j, i, means, precisions, constants, half, gap, new, level, top, score, row(j * dim))
        if own is not None:
            act(own.action, own.times[i], own.theta, state, dim, real, mine)
        if costs:
            steer(U, u0, F, i, dim, state, z, now, u)
            for j in range(mixtures):
                push(charge[j, i], score, j, dim, u)
            if own is not None:
                push(own.charge[i], mine, 0, dim, u)
            charge_step(u, dim, xi, now, total)
            if discount.shape[0] > 0 and not collects:
                add_scaled_squares(discount[i], u, dim, total, row(2))
        if collects:
            copy(state, size, before)
            fill(weight, row(0), half - half)
            if to_go and sampled:
                axpy(one, total, row(2), weight, row(0))
            spend(price[i], sampled, half, u, dim, xi, now, total, row(2))
            if to_go and not sampled:
                axpy(one, total, row(2), weight, row(0))
            if use != NO_VALUE:
                add_value(-one, S, w, z0, i, half, before, dim, weight)
        move(A, slope, c, s, E, i, dim, state, new, xi, z, now)
        for j in range(mixtures):
            push(drive[j, i], score, j, dim, state)
        if own is not None:
            push(own.drive[i], mine, 0, dim, state)
        if collects:
            if use == DIFFERENCE:
                add_value(one, S, w, z0, i + 1, half, state, dim, weight)
            collect(terms, gain[i], pull[i], i, weight, before, u, dim, xi, now, gap, new, score_sum, other_sum)
        if keeps:
            record(states, begin, width, i + 1, dim, state)
    for lane in range(width):
        for a in range(dim):
            x[begin + lane, a] = state[a * LANES + lane]
        for a in range(3):
            sums[begin + lane, a] = total[a * LANES + lane]
    if collects:
        hand_over(begin, width, score_sum, other_sum, samples)


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
def glide(slope, c, s, i, dim, draws, state, xi, now):
    """x = slope x + c + s xi where nothing else is asked for: four steps at a time while their normals are there."""
    four = draws and i // 4 * 4 + 4 <= s.shape[0]
    if four and i % 4 > 0:
        return
    for a in range(dim):
        at = row(a)
        if four:
            affine_4(slope[i, a], slope[i + 1, a], slope[i + 2, a], slope[i + 3, a], state, at, c[i, a], c[i + 1, a], c[i + 2, a], c[i + 3, a],
                     s[i], s[i + 1], s[i + 2], s[i + 3], xi, at, row(dim) + at, row(2 * dim) + at, row(3 * dim) + at)
        else:
            affine(slope[i, a], state, at, c[i, a], s[i], xi, now + at)


@njit(error_model="numpy", fastmath=FAST)
def move(A, slope, c, s, E, i, dim, state, new, xi, z, now):
    """x = A x + c + s xi + E z."""
    if A.shape[0] == 0:
        for a in range(dim):
            affine(slope[i, a], state, row(a), c[i, a], s[i], xi, now + row(a))
    else:
        for a in range(dim):
            scaled_plus(s[i], xi, now + row(a), c[i, a], new, row(a))
        add_product(A, i, state, dim, new)
        copy(new, dim * LANES, state)
    if E.shape[0] > 0:
        explore(E, i, dim, z, now, state)


@njit(error_model="numpy", fastmath=FAST)
def steer(U, u0, F, i, dim, state, z, now, u):
    """u = U x + u0 + F z."""
    for a in range(dim):
        fill(u, row(a), u0[i, a])
    if U.shape[0] > 0:
        add_product(U, i, state, dim, u)
    if F.shape[0] > 0:
        explore(F, i, dim, z, now, u)


@njit(error_model="numpy", fastmath=FAST)
def explore(factor, i, dim, z, now, out):
    """out_a += sum_b factor[i, a, b] z_b, a triangular factor."""
    for a in range(dim):
        for b in range(a + 1):
            if factor[i, a, b] != 0:
                axpy(factor[i, a, b], z, now + row(b), out, row(a))


@njit(error_model="numpy", fastmath=FAST)
def act(action, t, theta, state, dim, real, out):
    """Rows of the user's action at all lanes, in float64; one call of a first-class function a block."""
    for k in range(dim * LANES):
        real[k] = state[k]
    a = action(t, real.reshape(dim, LANES).T, theta)
    if a.shape != (LANES, dim):
        raise ValueError("action: expected the shape of x, (n, d), at every time, got another")
    for j in range(dim):
        for lane in range(LANES):
            out[j * LANES + lane] = a[lane, j]


@njit(error_model="numpy", fastmath=FAST)
def push(weight, score, j, dim, out):
    """out += weight times the j-th score."""
    if weight != 0:
        for a in range(dim):
            axpy(weight, score, row(j * dim + a), out, row(a))


@njit(error_model="numpy", fastmath=FAST)
def charge_step(u, dim, xi, now, total):
    """square += |u|^2, cross += u'xi."""
    for a in range(dim):
        at = row(a)
        for lane in range(WIDTH):
            value = u[at + lane]
            total[lane] += value * value
            total[WIDTH + lane] += value * xi[now + at + lane]


@njit(error_model="numpy", fastmath=FAST)
def add_scaled_squares(scale, u, dim, out, at):
    """out += scale |u|^2."""
    for a in range(dim):
        near = row(a)
        for lane in range(WIDTH):
            out[at + lane] += scale * (u[near + lane] * u[near + lane])
