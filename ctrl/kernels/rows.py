r"""Rows of lanes: one number of LANES paths side by side, row k of a flat array at k LANES.

Rows lie one after the other in flat arrays: an array of rows costs a reference count for every row that is taken. Every
function is one loop over lanes without a branch, which LLVM turns into vector instructions.
Checked: tests/test_rollout.py::test_chain_is_its_specification
"""

from __future__ import annotations

from numba import njit

from ctrl.elementary import FAST
from ctrl.kernels.normals import ROW_1, ROW_2, ROW_3, WIDTH, row


@njit(error_model="numpy", fastmath=FAST)
def fill(out, at, value):
    for lane in range(WIDTH):
        out[at + lane] = value


@njit(error_model="numpy", fastmath=FAST)
def copy(x, size, out):
    """The first `size` numbers of whole rows."""
    for k in range(size):
        out[k] = x[k]


@njit(error_model="numpy", fastmath=FAST)
def axpy(a, x, ax, out, at):
    for lane in range(WIDTH):
        out[at + lane] += a * x[ax + lane]


@njit(error_model="numpy", fastmath=FAST)
def affine(slope, x, at, shift, scale, z, az):
    """x = slope x + (shift + scale z)."""
    for lane in range(WIDTH):
        x[at + lane] = slope * x[at + lane] + (shift + scale * z[az + lane])


@njit(error_model="numpy", fastmath=FAST)
def affine_4(a0, a1, a2, a3, x, at, c0, c1, c2, c3, s0, s1, s2, s3, z, z0, z1, z2, z3):
    """Four times `affine`, with x in a register."""
    for lane in range(WIDTH):
        y = a0 * x[at + lane] + (c0 + s0 * z[z0 + lane])
        y = a1 * y + (c1 + s1 * z[z1 + lane])
        y = a2 * y + (c2 + s2 * z[z2 + lane])
        x[at + lane] = a3 * y + (c3 + s3 * z[z3 + lane])


@njit(error_model="numpy", fastmath=FAST)
def scaled_plus(scale, z, az, shift, out, at):
    for lane in range(WIDTH):
        out[at + lane] = shift + scale * z[az + lane]


@njit(error_model="numpy", fastmath=FAST)
def add_product(A, i, x, dim, out):
    """out_a += sum_b A[i, a, b] x_b, in tiles: what a row costs is loading and storing it."""
    a = 0
    while a + 2 <= dim:
        b = 0
        while b + 4 <= dim:
            tile_2x4(A, i, a, b, x, row(b), out, row(a))
            b += 4
        while b + 2 <= dim:
            tile_2x2(A[i, a, b], A[i, a, b + 1], A[i, a + 1, b], A[i, a + 1, b + 1], x, row(b), out, row(a))
            b += 2
        if b < dim:
            axpy(A[i, a, b], x, row(b), out, row(a))
            axpy(A[i, a + 1, b], x, row(b), out, row(a + 1))
        a += 2
    if a < dim:
        for b in range(dim):
            axpy(A[i, a, b], x, row(b), out, row(a))


@njit(error_model="numpy", fastmath=FAST)
def tile_2x2(a0, a1, b0, b1, x, first, out, at):
    second = at + WIDTH
    for lane in range(WIDTH):
        x0, x1 = x[first + lane], x[first + WIDTH + lane]
        out[at + lane] += a0 * x0 + a1 * x1
        out[second + lane] += b0 * x0 + b1 * x1


@njit(error_model="numpy", fastmath=FAST)
def tile_2x4(A, i, a, b, x, first, out, at):
    a0, a1, a2, a3 = A[i, a, b], A[i, a, b + 1], A[i, a, b + 2], A[i, a, b + 3]
    b0, b1, b2, b3 = A[i, a + 1, b], A[i, a + 1, b + 1], A[i, a + 1, b + 2], A[i, a + 1, b + 3]
    second = at + WIDTH
    for lane in range(WIDTH):
        near = first + lane
        x0, x1, x2, x3 = x[near], x[near + ROW_1], x[near + ROW_2], x[near + ROW_3]
        out[at + lane] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        out[second + lane] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
