r"""Score-function gradients in the same pass as the paths, on rows of lanes: per path two sums over steps,

    S = sum_i (d mu_i)' c_i xi_i,          P = sum_i (d mu_i)' ( c_i xi_i w_i + e_i ),          c_i = h_i sqrt(D_i)/(eta g_i)

so that S G + P is the estimator with return G. The weight w_i is made of what is spent so far (reward to go), of a quadratic
value V_i(x) = -1/2 x'S_i x + w_i'x + z_i as a baseline, or of its difference along the step (temporal difference).
A policy linear in theta is a list of terms: theta_p multiplies factor x_b (or factor) in coordinate a of the mean of a step.
Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_one_pass_is_the_cotangents
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ctrl.elementary import FAST
from ctrl.kernels.normals import LANES, WIDTH, row

Array = np.ndarray[Any, Any]
NO_VALUE, BASELINE, DIFFERENCE = 0, 1, 2


class Collect(NamedTuple):
    """What is summed; `gain` c_i (N,), empty for nothing; `pull` e_i = pull_i u_i and `price` lambda e^{-rho t_i}, (N,).

    terms : a policy's, begin (N + 1,), parameter, coordinate, state, factor (see ctrl.policy.Terms)

    sampled : costs are lambda (u'xi + |u|^2/2)     to_go : w holds what is spent     use : of the value, S (N + 1, d, d), w, z
    """

    terms: Any
    gain: Array
    pull: Array
    price: Array
    sampled: int
    to_go: int
    use: int
    S: Array
    w: Array
    z: Array


@njit(error_model="numpy", fastmath=FAST)
def spend(price, sampled, half, u, dim, xi, now, spent, to):
    """spent += price (|u|^2/2 [+ u'xi])."""
    k1 = half + half if sampled else half - half
    for a in range(dim):
        at = row(a)
        for lane in range(WIDTH):
            value = u[at + lane]
            spent[to + lane] += price * value * (half * value + k1 * xi[now + at + lane])


@njit(error_model="numpy", fastmath=FAST)
def add_value(sign, S, w, z, i, half, x, dim, out):
    """out += sign V_i(x)."""
    for lane in range(WIDTH):
        out[lane] += sign * z[i]
    for a in range(dim):
        at = row(a)
        for lane in range(WIDTH):
            out[lane] += sign * w[i, a] * x[at + lane]
        for b in range(dim):
            near, curvature = row(b), sign * half * S[i, a, b]
            for lane in range(WIDTH):
                out[lane] -= curvature * x[at + lane] * x[near + lane]


@njit(error_model="numpy", fastmath=FAST)
def collect(terms, gain, pull, i, weight, before, u, dim, xi, now, q, v, S, P):
    """S += (d mu_i)' c_i xi_i and P += (d mu_i)' ( c_i xi_i weight + e_i ); q and v are scratch."""
    for a in range(dim):
        at = row(a)
        for lane in range(WIDTH):
            noise = gain * xi[now + at + lane]
            v[at + lane] = noise
            q[at + lane] = noise * weight[lane] + pull * u[at + lane]
    for e in range(terms.begin[i], terms.begin[i + 1]):
        to, at = row(terms.parameter[e]), row(terms.coordinate[e])
        if terms.state[e] < 0:
            add_both(terms.factor[e], v, q, at, S, P, to)
        else:
            add_both_times(terms.factor[e], v, q, at, before, row(terms.state[e]), S, P, to)


@njit(error_model="numpy", fastmath=FAST)
def add_both(factor, v, q, at, S, P, to):
    for lane in range(WIDTH):
        S[to + lane] += factor * v[at + lane]
        P[to + lane] += factor * q[at + lane]


@njit(error_model="numpy", fastmath=FAST)
def add_both_times(factor, v, q, at, x, ax, S, P, to):
    for lane in range(WIDTH):
        y = factor * x[ax + lane]
        S[to + lane] += y * v[at + lane]
        P[to + lane] += y * q[at + lane]


@njit(error_model="numpy", fastmath=FAST)
def hand_over(begin, width, S, P, out):
    """Rows S and P to out[0] and out[1], (n, p) each."""
    for lane in range(width):
        for k in range(out.shape[2]):
            out[0, begin + lane, k] = S[k * LANES + lane]
            out[1, begin + lane, k] = P[k * LANES + lane]
