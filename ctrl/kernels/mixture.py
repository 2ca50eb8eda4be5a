r"""Scores of Gaussian mixtures on rows of lanes, which lie one after the other in flat arrays.

    score(x) = - sum_m w_m P_m (x - mu_m) / sum_m w_m,      w_m = exp( l_m - max l ),   l_m = log c_m - 1/2 (x - mu_m)' P_m (x - mu_m)

Source: theory.md, section 1.   Checked: tests/test_rollout.py::test_chain_is_its_specification
"""

from __future__ import annotations

from numba import njit

from ctrl.elementary import FAST, exp_below
from ctrl.kernels.normals import ROW_1, ROW_2, ROW_3, WIDTH, row
from ctrl.kernels.rows import add_product, fill


@njit(error_model="numpy", fastmath=FAST)
def score_rows(x, dim, j, i, means, precisions, constants, half, gap, pull, level, top, out, at):
    """Rows at, at + 1, ... of out = score of mixture j of step i at x; gap and pull (d rows), level (M + 1) and top are scratch.

    Two passes: levels and the highest of them, then weights. Four components share a pass in one and two dimensions, and P (x - mu)
    is made twice rather than stored: passes over rows, not the arithmetic, are what small mixtures cost.
    """
    count, total, four, single = means.shape[2], row(means.shape[2]), 0, precisions[j, i]
    if dim <= 2:
        four = count // 4 * 4
    for a in range(dim):
        fill(out, at + row(a), half - half)
    fill(level, total, half - half)
    for m in range(0, four, 4):
        if dim == 1:
            four_levels_1(x, j, i, m, means, precisions, constants, half, level, top)
        else:
            four_levels_2(x, j, i, m, means, precisions, constants, half, level, top)
    for m in range(four, count):
        centre(x, j, i, m, means, dim, gap)
        one_level(gap, pull, single, m, dim, constants[j, i, m], half, level, top)
    for m in range(0, four, 4):
        if dim == 1:
            four_weights_1(x, j, i, m, means, precisions, level, total, top, out, at)
        else:
            four_weights_2(x, j, i, m, means, precisions, level, total, top, out, at)
    for m in range(four, count):
        centre(x, j, i, m, means, dim, gap)
        one_weight(gap, pull, single, m, dim, level, total, top, out, at)
    for a in range(dim):
        divide_negative(level, total, out, at + row(a))


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def level_1(x, centre, precision, constant, half):
    g = x - centre
    return constant - half * (g * (precision * g))


@njit(error_model="numpy", fastmath=FAST)
def four_levels_1(x, j, i, m, means, precisions, constants, half, level, top):
    """Levels of components m ... m + 3, and the highest so far."""
    m0, m1, m2, m3 = means[j, i, m, 0], means[j, i, m + 1, 0], means[j, i, m + 2, 0], means[j, i, m + 3, 0]
    p0, p1, p2, p3 = precisions[j, i, m, 0, 0], precisions[j, i, m + 1, 0, 0], precisions[j, i, m + 2, 0, 0], precisions[j, i, m + 3, 0, 0]
    c0, c1, c2, c3 = constants[j, i, m], constants[j, i, m + 1], constants[j, i, m + 2], constants[j, i, m + 3]
    begins, at = m == 0, row(m)
    for lane in range(WIDTH):
        y = x[lane]
        l0, l1, l2, l3 = level_1(y, m0, p0, c0, half), level_1(y, m1, p1, c1, half), level_1(y, m2, p2, c2, half), level_1(y, m3, p3, c3, half)
        level[at + lane], level[at + ROW_1 + lane], level[at + ROW_2 + lane], level[at + ROW_3 + lane] = l0, l1, l2, l3
        high = higher(higher(l0, l1), higher(l2, l3))
        top[lane] = high if begins else higher(high, top[lane])


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def higher(a, b):
    return a if a > b else b


@njit(error_model="numpy", fastmath=FAST)
def four_weights_1(x, j, i, m, means, precisions, level, total, top, out, to):
    """total += w, out += w P (x - mu), for components m ... m + 3."""
    m0, m1, m2, m3 = means[j, i, m, 0], means[j, i, m + 1, 0], means[j, i, m + 2, 0], means[j, i, m + 3, 0]
    p0, p1, p2, p3 = precisions[j, i, m, 0, 0], precisions[j, i, m + 1, 0, 0], precisions[j, i, m + 2, 0, 0], precisions[j, i, m + 3, 0, 0]
    at = row(m)
    for k in range(4):
        exponentials(level, at + row(k), top)
    for lane in range(WIDTH):
        y, w0, w1, w2, w3 = x[lane], level[at + lane], level[at + ROW_1 + lane], level[at + ROW_2 + lane], level[at + ROW_3 + lane]
        level[total + lane] += (w0 + w1) + (w2 + w3)
        out[to + lane] += (w0 * (p0 * (y - m0)) + w1 * (p1 * (y - m1))) + (w2 * (p2 * (y - m2)) + w3 * (p3 * (y - m3)))


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def level_2(x, y, mx, my, p, q, r, constant, half):
    g, h = x - mx, y - my
    return constant - half * (g * (p * g + q * h) + h * (q * g + r * h))


@njit(error_model="numpy", fastmath=FAST)
def four_levels_2(x, j, i, m, means, precisions, constants, half, level, top):
    x0, x1, x2, x3 = means[j, i, m, 0], means[j, i, m + 1, 0], means[j, i, m + 2, 0], means[j, i, m + 3, 0]
    y0, y1, y2, y3 = means[j, i, m, 1], means[j, i, m + 1, 1], means[j, i, m + 2, 1], means[j, i, m + 3, 1]
    p0, p1, p2, p3 = precisions[j, i, m, 0, 0], precisions[j, i, m + 1, 0, 0], precisions[j, i, m + 2, 0, 0], precisions[j, i, m + 3, 0, 0]
    q0, q1, q2, q3 = precisions[j, i, m, 0, 1], precisions[j, i, m + 1, 0, 1], precisions[j, i, m + 2, 0, 1], precisions[j, i, m + 3, 0, 1]
    r0, r1, r2, r3 = precisions[j, i, m, 1, 1], precisions[j, i, m + 1, 1, 1], precisions[j, i, m + 2, 1, 1], precisions[j, i, m + 3, 1, 1]
    c0, c1, c2, c3 = constants[j, i, m], constants[j, i, m + 1], constants[j, i, m + 2], constants[j, i, m + 3]
    begins, at = m == 0, row(m)
    for lane in range(WIDTH):
        a, b = x[lane], x[WIDTH + lane]
        l0, l1 = level_2(a, b, x0, y0, p0, q0, r0, c0, half), level_2(a, b, x1, y1, p1, q1, r1, c1, half)
        l2, l3 = level_2(a, b, x2, y2, p2, q2, r2, c2, half), level_2(a, b, x3, y3, p3, q3, r3, c3, half)
        level[at + lane], level[at + ROW_1 + lane], level[at + ROW_2 + lane], level[at + ROW_3 + lane] = l0, l1, l2, l3
        high = higher(higher(l0, l1), higher(l2, l3))
        top[lane] = high if begins else higher(high, top[lane])


@njit(error_model="numpy", fastmath=FAST)
def four_weights_2(x, j, i, m, means, precisions, level, total, top, out, to):
    x0, x1, x2, x3 = means[j, i, m, 0], means[j, i, m + 1, 0], means[j, i, m + 2, 0], means[j, i, m + 3, 0]
    y0, y1, y2, y3 = means[j, i, m, 1], means[j, i, m + 1, 1], means[j, i, m + 2, 1], means[j, i, m + 3, 1]
    p0, p1, p2, p3 = precisions[j, i, m, 0, 0], precisions[j, i, m + 1, 0, 0], precisions[j, i, m + 2, 0, 0], precisions[j, i, m + 3, 0, 0]
    q0, q1, q2, q3 = precisions[j, i, m, 0, 1], precisions[j, i, m + 1, 0, 1], precisions[j, i, m + 2, 0, 1], precisions[j, i, m + 3, 0, 1]
    r0, r1, r2, r3 = precisions[j, i, m, 1, 1], precisions[j, i, m + 1, 1, 1], precisions[j, i, m + 2, 1, 1], precisions[j, i, m + 3, 1, 1]
    at = row(m)
    for k in range(4):
        exponentials(level, at + row(k), top)
    for lane in range(WIDTH):
        a, b = x[lane], x[WIDTH + lane]
        w0, w1, w2, w3 = level[at + lane], level[at + ROW_1 + lane], level[at + ROW_2 + lane], level[at + ROW_3 + lane]
        level[total + lane] += (w0 + w1) + (w2 + w3)
        g0, g1, g2, g3 = a - x0, a - x1, a - x2, a - x3
        h0, h1, h2, h3 = b - y0, b - y1, b - y2, b - y3
        # w last, in a fused product: a tiny w times a small number alone would be subnormal, which is slow
        out[to + lane] += w0 * (p0 * g0 + q0 * h0) + w1 * (p1 * g1 + q1 * h1) + w2 * (p2 * g2 + q2 * h2) + w3 * (p3 * g3 + q3 * h3)
        out[to + WIDTH + lane] += w0 * (q0 * g0 + r0 * h0) + w1 * (q1 * g1 + r1 * h1) + w2 * (q2 * g2 + r2 * h2) + w3 * (q3 * g3 + r3 * h3)


@njit(error_model="numpy", fastmath=FAST)
def exponentials(level, at, top):
    """exp(level - top) of a row, in a pass of its own: see normals.box_muller_64."""
    for lane in range(WIDTH):
        level[at + lane] = exp_below(level[at + lane] - top[lane])


@njit(error_model="numpy", fastmath=FAST)
def centre(x, j, i, m, means, dim, gap):
    """gap = x - mu_m."""
    for a in range(dim):
        at, mean = row(a), means[j, i, m, a]
        for lane in range(WIDTH):
            gap[at + lane] = x[at + lane] - mean


@njit(error_model="numpy", fastmath=FAST)
def one_level(gap, pull, precision, m, dim, constant, half, level, top):
    """The level of one component in any dimension, and the highest so far."""
    at = row(m)
    product(precision, m, gap, dim, pull)
    fill(level, at, constant)
    for a in range(dim):
        near = row(a)
        for lane in range(WIDTH):
            level[at + lane] -= half * (gap[near + lane] * pull[near + lane])
    for lane in range(WIDTH):
        top[lane] = level[at + lane] if m == 0 else higher(level[at + lane], top[lane])


@njit(error_model="numpy", fastmath=FAST)
def one_weight(gap, pull, precision, m, dim, level, total, top, out, to):
    """total += w, out += w P (x - mu), for one component in any dimension."""
    at = row(m)
    product(precision, m, gap, dim, pull)
    for lane in range(WIDTH):
        w = exp_below(level[at + lane] - top[lane])
        level[at + lane] = w
        level[total + lane] += w
    for a in range(dim):
        near = row(a)
        for lane in range(WIDTH):
            out[to + near + lane] += level[at + lane] * pull[near + lane]


@njit(error_model="numpy", fastmath=FAST)
def product(A, i, x, dim, out):
    """out_a = sum_b A[i, a, b] x_b."""
    for a in range(dim):
        fill(out, row(a), x.dtype.type(0))
    add_product(A, i, x, dim, out)


@njit(error_model="numpy", fastmath=FAST)
def divide_negative(x, ax, out, at):
    for lane in range(WIDTH):
        out[at + lane] = -out[at + lane] / x[ax + lane]
