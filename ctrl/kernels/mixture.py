r"""Scores of Gaussian mixtures on rows of lanes, which lie one after the other in flat arrays.

    score(x) = - sum_m w_m P_m (x - mu_m) / sum_m w_m,      w_m = exp( l_m - max l ),   l_m = log c_m - 1/2 (x - mu_m)' P_m (x - mu_m)

Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_chain_is_its_specification
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from ctrl.kernels.normals import FAST, WIDTH, as_bits, as_float, row

# exp(t), t <= 0: t = n log 2 + r, the integer n read off the low bits of t log2(e) + 1.5 * 2^(mantissa bits)
LOW_32, LOG2E_32, ROUND_32 = np.float32(-87.0), np.float32(1.44269504088896341), np.float32(1.5 * 2**23)
LN2_HI_32, LN2_LO_32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
E1, E2, E3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E4, E5, E6 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
ONE_32, MANTISSA_32 = np.float32(1), np.uint32(23)
LOW_64, LOG2E_64, ROUND_64 = -708.0, 1.44269504088896340736, 1.5 * 2.0**52
LN2_HI_64, LN2_LO_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
T3, T4, T5, T6, T7 = 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040
T8, T9, T10, T11, T12 = 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800, 1 / 479001600
MANTISSA_64 = np.uint64(52)


@njit(error_model="numpy", fastmath=FAST)
def exp_32(t):
    """exp(t) for t <= 0, float32."""
    t = t if t > LOW_32 else LOW_32
    shifted = t * LOG2E_32 + ROUND_32
    n = shifted - ROUND_32
    r = t - n * LN2_HI_32 - n * LN2_LO_32
    p = (((((E1 * r + E2) * r + E3) * r + E4) * r + E5) * r + E6) * (r * r) + r + ONE_32
    return as_float(np.uint32(np.uint32(as_bits(p)) + np.uint32(np.uint32(as_bits(shifted)) << MANTISSA_32)))


@njit(error_model="numpy", fastmath=FAST)
def exp_64(t):
    """exp(t) for t <= 0, float64."""
    t = t if t > LOW_64 else LOW_64
    shifted = t * LOG2E_64 + ROUND_64
    n = shifted - ROUND_64
    r = t - n * LN2_HI_64 - n * LN2_LO_64
    p = (((((((((T12 * r + T11) * r + T10) * r + T9) * r + T8) * r + T7) * r + T6) * r + T5) * r + T4) * r + T3) * r + 0.5
    p = p * (r * r) + r + 1.0
    return as_float(np.uint64(np.uint64(as_bits(p)) + np.uint64(np.uint64(as_bits(shifted)) << MANTISSA_64)))


def exp_below(t):
    """exp(t), t <= 0, in the precision of t."""
    raise NotImplementedError("compiled code only")


@overload(exp_below, jit_options={"error_model": "numpy", "fastmath": FAST})
def _exp_below(t):
    if t == types.float32:
        return lambda t: exp_32(t)
    return lambda t: exp_64(t)


@njit(error_model="numpy", fastmath=FAST)
def score_rows(x, dim, j, i, means, precisions, constants, half, gap, pull, level, top, out):
    """Rows 0 ... d - 1 of out = score of mixture j of step i at x; gap, pull, level and top are scratch."""
    count = means.shape[2]
    for m in range(count):
        if dim == 1:
            component_1(x, means[j, i, m, 0], precisions[j, i, m, 0, 0], constants[j, i, m], half, pull, level, row(m))
        elif dim == 2:
            component_2(x, means[j, i, m, 0], means[j, i, m, 1], precisions[j, i, m, 0, 0], precisions[j, i, m, 0, 1],
                        precisions[j, i, m, 1, 1], constants[j, i, m], half, pull, level, row(m))
        else:
            component(x, dim, j, i, m, means, precisions, constants, half, gap, pull, level)
        highest(level, row(m), m == 0, top)
    fill(gap, row(0), half - half)
    for a in range(dim):
        fill(out, row(a), half - half)
    for m in range(count):
        if dim == 1:
            weigh_1(level, row(m), top, pull, gap, out)
        elif dim == 2:
            weigh_2(level, row(m), top, pull, gap, out)
        else:
            weigh(level, row(m), top, gap)
            for a in range(dim):
                add_product(level, row(m), pull, row(m * dim + a), out, row(a))
    for a in range(dim):
        divide_negative(gap, out, row(a))


@njit(error_model="numpy", fastmath=FAST)
def component_1(x, mean, precision, constant, half, pull, level, at):
    """One component in one dimension: pull = P (x - mu), level = constant - 1/2 (x - mu) P (x - mu)."""
    for lane in range(WIDTH):
        g = x[lane] - mean
        y = precision * g
        pull[at + lane] = y
        level[at + lane] = constant - half * (g * y)


@njit(error_model="numpy", fastmath=FAST)
def component_2(x, m0, m1, p00, p01, p11, constant, half, pull, level, at):
    """One component in two dimensions."""
    second = at + at
    for lane in range(WIDTH):
        g0, g1 = x[lane] - m0, x[WIDTH + lane] - m1
        y0, y1 = p00 * g0 + p01 * g1, p01 * g0 + p11 * g1
        pull[second + lane], pull[second + WIDTH + lane] = y0, y1
        level[at + lane] = constant - half * (g0 * y0 + g1 * y1)


@njit(error_model="numpy", fastmath=FAST)
def component(x, dim, j, i, m, means, precisions, constants, half, gap, pull, level):
    """One component in any dimension."""
    for a in range(dim):
        less(x, row(a), means[j, i, m, a], gap)
    fill(level, row(m), constants[j, i, m])
    for a in range(dim):
        at = row(m * dim + a)
        fill(pull, at, half - half)
        for b in range(dim):
            if precisions[j, i, m, a, b] != 0:
                axpy(precisions[j, i, m, a, b], gap, row(b), pull, at)
        lower(half, gap, row(a), pull, at, level, row(m))


@njit(error_model="numpy", fastmath=FAST)
def less(x, at, centre, out):
    for lane in range(WIDTH):
        out[at + lane] = x[at + lane] - centre


@njit(error_model="numpy", fastmath=FAST)
def lower(half, x, ax, y, ay, out, at):
    """out -= 1/2 x y."""
    for lane in range(WIDTH):
        out[at + lane] -= half * x[ax + lane] * y[ay + lane]


@njit(error_model="numpy", fastmath=FAST)
def highest(level, at, begins, top):
    """top = the largest level so far, lane by lane."""
    for lane in range(WIDTH):
        top[lane] = level[at + lane] if begins or level[at + lane] > top[lane] else top[lane]


@njit(error_model="numpy", fastmath=FAST)
def weigh_1(level, at, top, pull, total, out):
    """total += w, out += w pull with w = exp(level - top), in one dimension."""
    for lane in range(WIDTH):
        w = exp_below(level[at + lane] - top[lane])
        total[lane] += w
        out[lane] += w * pull[at + lane]


@njit(error_model="numpy", fastmath=FAST)
def weigh_2(level, at, top, pull, total, out):
    """The same in two dimensions."""
    second = at + at
    for lane in range(WIDTH):
        w = exp_below(level[at + lane] - top[lane])
        total[lane] += w
        out[lane] += w * pull[second + lane]
        out[WIDTH + lane] += w * pull[second + WIDTH + lane]


@njit(error_model="numpy", fastmath=FAST)
def weigh(level, at, top, total):
    """level = w and total += w."""
    for lane in range(WIDTH):
        w = exp_below(level[at + lane] - top[lane])
        level[at + lane] = w
        total[lane] += w


@njit(error_model="numpy", fastmath=FAST)
def accumulate(A, i, a, x, dim, out, at):
    """out += sum_b A[i, a, b] x_b; four rows in one pass when all are needed, none when none is."""
    b = 0
    while b < dim:
        if b + 4 <= dim and A[i, a, b] != 0 and A[i, a, b + 1] != 0 and A[i, a, b + 2] != 0 and A[i, a, b + 3] != 0:
            axpy_4(A[i, a, b], A[i, a, b + 1], A[i, a, b + 2], A[i, a, b + 3], x, row(b), out, at)
            b += 4
        else:
            if A[i, a, b] != 0:
                axpy(A[i, a, b], x, row(b), out, at)
            b += 1


@njit(error_model="numpy", fastmath=FAST)
def axpy_4(a0, a1, a2, a3, x, first, out, at):
    for lane in range(WIDTH):
        near = first + lane
        out[at + lane] += a0 * x[near] + a1 * x[near + WIDTH] + a2 * x[near + 2 * WIDTH] + a3 * x[near + 3 * WIDTH]


@njit(error_model="numpy", fastmath=FAST)
def axpy(a, x, ax, out, at):
    for lane in range(WIDTH):
        out[at + lane] += a * x[ax + lane]


@njit(error_model="numpy", fastmath=FAST)
def fill(out, at, value):
    for lane in range(WIDTH):
        out[at + lane] = value


@njit(error_model="numpy", fastmath=FAST)
def add_product(x, ax, y, ay, out, at):
    for lane in range(WIDTH):
        out[at + lane] += x[ax + lane] * y[ay + lane]


@njit(error_model="numpy", fastmath=FAST)
def divide_negative(x, out, at):
    for lane in range(WIDTH):
        out[at + lane] = -out[at + lane] / x[lane]
