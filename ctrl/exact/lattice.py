r"""Tensor lattices in the plane, and normal kernels onto them and off them.

A lattice stands in a frame F in which the kernel that lands on it, N(m, F F'), is a product of two unit normals: a window of it is two
short vectors of weights. Sums over a lattice are trapezoid sums, spectrally accurate for smooth integrands: the error is about
exp(-2 pi^2 (sd/spacing)^2), 4e-14 at 1.25. What every other row or column of nodes misses says how far a lattice is from enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from ctrl.check import Array

REACH = 8.0  # half-width of the kernel, in standard deviations: exp(-32) is beyond
LOG_REACH = 8.0  # the same around a peak in log space, where weights may bend more than the kernel does
TILE = 8  # nodes along the side of a square in which phi does not vary beyond the range of numbers
UNIT = np.ones(2)


@njit(cache=True, error_model="numpy")
def _weights(place: float, ratio: float, table: Array, n: int, w: Array, xi: Array) -> tuple[int, int]:
    r"""Normal weights of the nodes around a centre at `place` (in spacings), for a spacing of `ratio` deviations.

    With c the nearest node and frac = place - c, exp(-xi^2/2) = exp(-(frac ratio)^2/2) T_k rho^k, T_k = exp(-(k ratio)^2/2) a
    table, rho = exp(frac ratio^2). Returns the first node and how many; none when the centre is off the lattice.
    """
    if not (place > -0.5 and place < n - 0.5):
        return 0, 0
    c = math.floor(place + 0.5)
    first, last = max(c - table.size + 1, 0), min(c + table.size - 1, n - 1)
    frac = place - c
    w[c - first] = ratio / math.sqrt(2 * math.pi) * math.exp(-0.5 * (frac * ratio) ** 2)
    rho = math.exp(frac * ratio * ratio)
    power = w[c - first]
    for k in range(1, last - c + 1):
        power *= rho
        w[c - first + k] = table[k] * power
    rho, power = 1.0 / rho, w[c - first]
    for k in range(1, c - first + 1):
        power *= rho
        w[c - first - k] = table[k] * power
    for k in range(last - first + 1):
        xi[k] = (first + k - place) * ratio
    return first, last - first + 1


@njit(cache=True, error_model="numpy", nogil=True)
def _gather(place: Array, ratio: Array, table1: Array, table2: Array, values: Array, order: int, out: Array) -> None:
    """out (n, 3) = E[V], E[V xi_1], E[V xi_2] of V(centre + xi); for order 2 also E[V xi_1^2], E[V xi_1 xi_2], E[V xi_2^2], (n, 6)."""
    n1, n2 = values.shape
    w1, x1 = np.empty(2 * table1.size), np.empty(2 * table1.size)
    w2, x2 = np.empty(2 * table2.size), np.empty(2 * table2.size)
    column = np.empty((3, 2 * table2.size))
    for j in range(len(place)):
        first1, m1 = _weights(place[j, 0], ratio[0], table1, n1, w1, x1)
        first2, m2 = _weights(place[j, 1], ratio[1], table2, n2, w2, x2)
        column[: order + 1, :m2] = 0.0
        for k in range(m1):
            row, a = values[first1 + k, first2 : first2 + m2], w1[k]
            for q in range(order + 1):
                for m in range(m2):
                    column[q, m] += a * row[m]
                a *= x1[k]
        out[j] = 0.0
        for m in range(m2):
            a, b = w2[m] * column[0, m], w2[m] * column[1, m]
            out[j, 0] += a
            out[j, 1] += b
            out[j, 2] += a * x2[m]
            if order == 2:
                out[j, 3] += w2[m] * column[2, m]
                out[j, 4] += b * x2[m]
                out[j, 5] += a * x2[m] ** 2


@njit(cache=True, error_model="numpy", nogil=True)
def _scatter(mass: Array, place: Array, ratio: Array, table1: Array, table2: Array, parts: Array) -> None:
    """parts (2, 2, n1, n2) += the weights of `_gather` times mass, by the parity of the sources (m1, m2): its transpose."""
    n1, n2 = parts.shape[2:]
    w1, x1 = np.empty(2 * table1.size), np.empty(2 * table1.size)
    w2, x2 = np.empty(2 * table2.size), np.empty(2 * table2.size)
    for i in range(mass.shape[0]):
        for j in range(mass.shape[1]):
            if mass[i, j] > 0:
                first1, m1 = _weights(place[i, j, 0], ratio[0], table1, n1, w1, x1)
                first2, m2 = _weights(place[i, j, 1], ratio[1], table2, n2, w2, x2)
                for k in range(m1):
                    row, a = parts[i % 2, j % 2, first1 + k, first2 : first2 + m2], mass[i, j] * w1[k]
                    for m in range(m2):
                        row[m] += a * w2[m]


@njit(cache=True, error_model="numpy", nogil=True)
def _log_gather(place: Array, ratio: Array, reach: float, log_phi: Array, carried: Array, out: Array) -> None:
    """out (n, 4) = log of the sum of phi times exp(-xi^2/2), the mean of R under it, on a window around the peak of the summand,
    and by how much the sum changes, relative, when every other row, or column, is dropped.

    Exponentials are taken once for every node, relative to the largest of its tile, then once for every tile of a window.
    """
    n1, n2 = log_phi.shape
    largest, phi = np.full(((n1 - 1) // TILE + 1, (n2 - 1) // TILE + 1), -np.inf), np.empty((n1, n2))
    for a in range(n1):
        for b in range(n2):
            largest[a // TILE, b // TILE] = max(largest[a // TILE, b // TILE], log_phi[a, b])
    for a in range(n1):
        for b in range(n2):
            phi[a, b] = math.exp(log_phi[a, b] - largest[a // TILE, b // TILE])
    half1, half2 = math.ceil(reach / ratio[0]), math.ceil(reach / ratio[1])
    w1, w2, sums = np.empty(2 * half1 + 1), np.empty(2 * half2 + 1), np.empty((2, 2))
    for j in range(len(place)):
        p1, p2 = place[j]
        k, m, top = _peak(p1, p2, ratio, log_phi)
        first1, last1, first2, last2 = max(k - half1, 0), min(k + half1, n1 - 1), max(m - half2, 0), min(m + half2, n2 - 1)
        for a in range(first1, last1 + 1):  # relative to the peak
            w1[a - first1] = math.exp(-0.5 * (a - k) * (a + k - 2 * p1) * ratio[0] ** 2)
        for b in range(first2, last2 + 1):
            w2[b - first2] = math.exp(-0.5 * (b - m) * (b + m - 2 * p2) * ratio[1] ** 2)
        sums[:], moment = 0.0, 0.0
        for ta in range(first1 // TILE, last1 // TILE + 1):
            for tb in range(first2 // TILE, last2 // TILE + 1):
                scale = math.exp(largest[ta, tb] - log_phi[k, m])
                for a in range(max(ta * TILE, first1), min(ta * TILE + TILE - 1, last1) + 1):
                    for b in range(max(tb * TILE, first2), min(tb * TILE + TILE - 1, last2) + 1):
                        weight = scale * w1[a - first1] * w2[b - first2] * phi[a, b]
                        sums[a & 1, b & 1] += weight
                        moment += weight * carried[a, b]
        total = sums.sum()
        out[j, 0], out[j, 1] = top + math.log(total), moment / total
        out[j, 2] = abs(sums[0, 0] + sums[0, 1] - sums[1, 0] - sums[1, 1]) / total
        out[j, 3] = abs(sums[0, 0] + sums[1, 0] - sums[0, 1] - sums[1, 1]) / total


@njit(cache=True, error_model="numpy")
def _peak(p1: float, p2: float, ratio: Array, log_phi: Array) -> tuple[int, int, float]:
    """Where log phi - xi^2/2 is largest, going a node at a time towards a larger neighbour."""
    n1, n2 = log_phi.shape
    k, m = min(max(round(p1), 0), n1 - 1), min(max(round(p2), 0), n2 - 1)
    top = log_phi[k, m] - 0.5 * (((k - p1) * ratio[0]) ** 2 + ((m - p2) * ratio[1]) ** 2)
    climbing = True
    while climbing:
        climbing = False
        for a, b in ((k + 1, m), (k - 1, m), (k, m + 1), (k, m - 1)):
            if 0 <= a < n1 and 0 <= b < n2:
                height = log_phi[a, b] - 0.5 * (((a - p1) * ratio[0]) ** 2 + ((b - p2) * ratio[1]) ** 2)
                if height > top:
                    k, m, top, climbing = a, b, height, True
    return k, m, top


def _table(reach: float, ratio: float) -> Array:
    """exp(-(k ratio)^2/2) for k = 0 ... up to `reach` standard deviations."""
    return np.exp(-0.5 * (np.arange(math.ceil(reach / ratio) + 1) * ratio) ** 2)


class Lattice(NamedTuple):
    """Nodes frame @ (low + step (k, l)), k < shape[0], l < shape[1]."""

    frame: Array
    low: Array
    step: Array
    shape: tuple[int, int]

    @classmethod
    def around(cls, frame: Array, points: Array, spacing: Array) -> Lattice:
        """Over all points (n, 2), at most `spacing` (2,) apart along the axes of the frame."""
        z = points @ np.linalg.inv(frame).T
        low, span = z.min(axis=0), np.ptp(z, axis=0)
        n = np.maximum(np.ceil(span / spacing), 15).astype(int)
        return cls(frame, low, span / n, (int(n[0]) + 1, int(n[1]) + 1))

    def finer(self, factor: Array) -> Lattice:
        """The same ends with spacings multiplied by about `factor` (2,) <= 1."""
        old = np.array(self.shape) - 1
        n = np.ceil(old / factor).astype(int)
        return Lattice(self.frame, self.low, self.step * old / n, (int(n[0]) + 1, int(n[1]) + 1))

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def area(self) -> float:
        """Of a cell."""
        return float(abs(np.linalg.det(self.frame)) * np.prod(self.step))

    def window(self, reach: float) -> float:
        """Nodes that one kernel of so many standard deviations visits, at most."""
        return float(np.prod(np.minimum(self.shape, 2 * np.ceil(reach / self.step) + 1)))

    def nodes(self) -> Array:
        """(n, 2), the second axis of the frame fastest."""
        k, m = (self.low[a] + self.step[a] * np.arange(self.shape[a]) for a in (0, 1))
        return np.stack(np.broadcast_arrays(k[:, None], m), axis=-1).reshape(-1, 2) @ self.frame.T

    def corners(self) -> Array:
        """(4, 2)."""
        ends = self.step * (np.array(self.shape) - 1)
        return (self.low + np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * ends) @ self.frame.T

    def nearest(self, x: Array) -> Array:
        """The nearest points of the lattice's rectangle, (n, 2), along the axes of its frame."""
        z = np.clip(x @ np.linalg.inv(self.frame).T, self.low, self.low + self.step * (np.array(self.shape) - 1))
        return z @ self.frame.T

    def place(self, x: Array) -> Array:
        """States (n, 2) in spacings from the first node."""
        return (x @ np.linalg.inv(self.frame).T - self.low) / self.step


def expect(lattice: Lattice, values: Array, centre: Array, sd: Array, order: int = 1) -> Array:
    """E[V], E[V xi_1], ... of V(centre + frame (sd xi)) for every centre (n, 2), V given on the lattice: see `_gather`."""
    ratio = lattice.step / sd
    out = np.empty((len(centre), 3 if order == 1 else 6))
    _gather(lattice.place(centre), ratio, _table(REACH, ratio[0]), _table(REACH, ratio[1]), values, order, out)
    return out


def log_expect(lattice: Lattice, log_phi: Array, carried: Array, centre: Array) -> tuple[Array, Array, Array]:
    """log E[phi], E[phi R] / E[phi] and what every other row, or column, misses (n, 2), relative, at centre + frame xi.

    For every centre (n, 2); log phi and R given on the lattice.
    """
    out = np.empty((len(centre), 4))
    _log_gather(lattice.place(centre), lattice.step, LOG_REACH, log_phi, carried, out)
    return out[:, 0] + math.log(lattice.step[0] * lattice.step[1] / (2 * math.pi)), out[:, 1], out[:, 2:]


class Source(NamedTuple):
    """Where a law sits and where a step takes it: masses (m1, m2) and means of the next state (m1, m2, 2)."""

    mass: Array
    centre: Array

    def onto(self, lattice: Lattice, sd: Array = UNIT, reach: float = REACH) -> Array:
        """Density on a lattice, frame sd xi the noise, apart by the parity of its sources: (2, 2, n1, n2)."""
        ratio, parts = lattice.step / sd, np.zeros((2, 2, *lattice.shape))
        place = lattice.place(self.centre.reshape(-1, 2)).reshape(self.centre.shape)
        _scatter(self.mass / lattice.area, place, ratio, _table(reach, ratio[0]), _table(reach, ratio[1]), parts)
        return parts


def parity(parts: Array) -> Array:
    """By how much the sum of parts (2, 2, ...) changes when every other row, or column, of its sources is dropped, (2,)."""
    rows, columns = parts.sum(axis=1), parts.sum(axis=0)
    return np.array([np.abs(rows[0] - rows[1]).sum(), np.abs(columns[0] - columns[1]).sum()])


def parity_of_sum(terms: Array) -> Array:
    """The same for a sum over the nodes of a lattice, terms (n1, n2), relative to its size (or 1e-9: rounding is no error)."""
    parts = np.array([[terms[a::2, b::2].sum() for b in (0, 1)] for a in (0, 1)])
    return parity(parts) / max(np.abs(terms).sum(), 1e-9)


def shrink(error: Array, allowed: float) -> Array:
    """Factors for the spacings that bring an error exp(-const/spacing^2) down to what is allowed, (2,)."""
    wanted = np.sqrt(np.log(np.clip(error, allowed, 0.9)) / math.log(allowed))
    return np.where(error > allowed, np.clip(0.95 * wanted, 0.5, 0.9), 1.0)
