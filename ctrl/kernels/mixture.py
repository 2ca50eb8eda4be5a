r"""Scores of Gaussian mixtures on rows of lanes.

    score(x) = - sum_m w_m P_m (x - mu_m) / sum_m w_m,      w_m = exp( l_m - max l ),   l_m = log c_m - 1/2 (x - mu_m)' P_m (x - mu_m)

Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_chain_is_its_specification
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from ctrl.kernels.normals import FAST, LANES, as_bits, as_float

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
def exp_below_32(top, row):
    """row = exp(row - top) for row <= top, float32."""
    for lane in range(LANES):
        t = row[lane] - top[lane]
        t = t if t > LOW_32 else LOW_32
        shifted = t * LOG2E_32 + ROUND_32
        n = shifted - ROUND_32
        r = t - n * LN2_HI_32 - n * LN2_LO_32
        p = (((((E1 * r + E2) * r + E3) * r + E4) * r + E5) * r + E6) * (r * r) + r + ONE_32
        row[lane] = as_float(np.uint32(np.uint32(as_bits(p)) + np.uint32(np.uint32(as_bits(shifted)) << MANTISSA_32)))


@njit(error_model="numpy", fastmath=FAST)
def exp_below_64(top, row):
    """row = exp(row - top) for row <= top, float64."""
    for lane in range(LANES):
        t = row[lane] - top[lane]
        t = t if t > LOW_64 else LOW_64
        shifted = t * LOG2E_64 + ROUND_64
        n = shifted - ROUND_64
        r = t - n * LN2_HI_64 - n * LN2_LO_64
        p = (((((((((T12 * r + T11) * r + T10) * r + T9) * r + T8) * r + T7) * r + T6) * r + T5) * r + T4) * r + T3) * r + 0.5
        p = p * (r * r) + r + 1.0
        row[lane] = as_float(np.uint64(np.uint64(as_bits(p)) + np.uint64(np.uint64(as_bits(shifted)) << MANTISSA_64)))


def exp_below(top, row):
    """exp(row - top) in the precision of the row."""
    raise NotImplementedError("compiled code only")


@overload(exp_below, jit_options={"error_model": "numpy", "fastmath": FAST})
def _exp_below(top, row):
    if row.dtype == types.float32:
        return lambda top, row: exp_below_32(top, row)
    return lambda top, row: exp_below_64(top, row)


@njit(error_model="numpy", fastmath=FAST)
def component(x, mean, precision, constant, half, gap, pull, level):
    """One component: pull = P (x - mu), level = constant - 1/2 (x - mu)'P(x - mu)."""
    dim = x.shape[0]
    for a in range(dim):
        row, shifted, centre = x[a], gap[a], mean[a]
        for lane in range(LANES):
            shifted[lane] = row[lane] - centre
    for lane in range(LANES):
        level[lane] = constant
    for a in range(dim):
        fill(pull[a], half - half)
        accumulate(precision[a], gap, pull[a])
        left, right = gap[a], pull[a]
        for lane in range(LANES):
            level[lane] -= half * left[lane] * right[lane]


@njit(error_model="numpy", fastmath=FAST)
def component_2(x0, x1, mean, precision, constant, half, pull0, pull1, level):
    """`component` in two dimensions, in one pass."""
    m0, m1, p00, p01, p11 = mean[0], mean[1], precision[0, 0], precision[0, 1], precision[1, 1]
    for lane in range(LANES):
        g0, g1 = x0[lane] - m0, x1[lane] - m1
        y0, y1 = p00 * g0 + p01 * g1, p01 * g0 + p11 * g1
        pull0[lane], pull1[lane] = y0, y1
        level[lane] = constant - half * (g0 * y0 + g1 * y1)


@njit(error_model="numpy", fastmath=FAST)
def score_rows(x, means, precisions, constants, half, gap, pull, level, top, out):
    """out (d, LANES) = score of one mixture at x (d, LANES); gap, pull, level, top are scratch."""
    dim, count, zero, total = x.shape[0], means.shape[0], half - half, gap[0]
    for m in range(count):
        if dim == 2:
            component_2(x[0], x[1], means[m], precisions[m], constants[m], half, pull[2 * m], pull[2 * m + 1], level[m])
        else:
            component(x, means[m], precisions[m], constants[m], half, gap, pull[m * dim : (m + 1) * dim], level[m])
    highest(level, top)
    fill(total, zero)
    for m in range(count):
        exp_below(top, level[m])
        axpy(half + half, level[m], total)
    for a in range(dim):
        fill(out[a], zero)
        for m in range(count):
            add_product(level[m], pull[m * dim + a], out[a])
        divide_negative(total, out[a])


@njit(error_model="numpy", fastmath=FAST)
def highest(rows, out):
    """out = the largest of the rows, lane by lane."""
    for m in range(rows.shape[0]):
        row = rows[m]
        for lane in range(LANES):
            out[lane] = row[lane] if m == 0 or row[lane] > out[lane] else out[lane]


@njit(error_model="numpy", fastmath=FAST)
def accumulate(coefficients, x, out):
    """out += sum_b coefficients[b] x[b]; four rows in one pass when all are needed, none when none is."""
    dim = x.shape[0]
    b = 0
    while b < dim:
        if b + 4 <= dim and coefficients[b] != 0 and coefficients[b + 1] != 0 and coefficients[b + 2] != 0 and coefficients[b + 3] != 0:
            axpy_4(coefficients[b], x[b], coefficients[b + 1], x[b + 1], coefficients[b + 2], x[b + 2],
                   coefficients[b + 3], x[b + 3], out)
            b += 4
        else:
            if coefficients[b] != 0:
                axpy(coefficients[b], x[b], out)
            b += 1


@njit(error_model="numpy", fastmath=FAST)
def axpy_4(a0, x0, a1, x1, a2, x2, a3, x3, out):
    for lane in range(LANES):
        out[lane] += a0 * x0[lane] + a1 * x1[lane] + a2 * x2[lane] + a3 * x3[lane]


@njit(error_model="numpy", fastmath=FAST)
def axpy(a, x, out):
    for lane in range(LANES):
        out[lane] += a * x[lane]


@njit(error_model="numpy", fastmath=FAST)
def fill(out, value):
    for lane in range(LANES):
        out[lane] = value


@njit(error_model="numpy", fastmath=FAST)
def add_product(x, y, out):
    for lane in range(LANES):
        out[lane] += x[lane] * y[lane]


@njit(error_model="numpy", fastmath=FAST)
def divide_negative(x, out):
    for lane in range(LANES):
        out[lane] = -out[lane] / x[lane]
