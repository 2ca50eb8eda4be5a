r"""Normals as a pure function of (seed, stream, path, step, coordinate): Philox4x32-10, then Box-Muller.

    key = seed,   counter = (path low, path high, step // 4, coordinate | stream << 28)  ->  words w_0, w_1, w_2, w_3
    u_j = (w_j + 1/2) 2^-32,   (z_{4m}, z_{4m+1}) = sqrt(-2 log u_0) (cos, sin)(2 pi u_1),   (z_{4m+2}, z_{4m+3}) likewise

The counter *is* the coordinates of the number, so nothing has a state. Logarithm, sine and cosine are polynomials written
out here, because calls into the C library keep the loop over lanes from becoming vector instructions.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011); polynomials: fdlibm (float64), Cephes (float32).
Checked: tests/test_noise.py::test_known_answers, tests/test_noise.py::test_specification
"""

from __future__ import annotations

import math
import numpy as np
from numba import njit, types
from numba.extending import overload

from ctrl import elementary
from ctrl.elementary import FAST, as_bits, as_float, built_from

LANES = 256
WIDTH = np.uint64(LANES)  # rows of lanes lie one after the other in flat arrays: an array of rows costs a reference count for every row taken
ROW_0, ROW_1, ROW_2, ROW_3 = np.uint64(0), np.uint64(LANES), np.uint64(2 * LANES), np.uint64(3 * LANES)
STEP, START, ACTION, COMPONENT = 0, 1, 2, 3  # streams

# Philox4x32-10
M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
HIGH, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)

# Angles: nearest quarter turn, and the sign of each function on it
EIGHTH, QUARTER_SHIFT = np.uint32(0x20000000), np.uint32(30)
U1, U2 = np.uint32(1), np.uint32(2)

# float32: exponent split at sqrt(1/2), then Cephes
SQRT_HALF_32, MANTISSA_32 = np.int32(0x3F3504F3), np.int32(23)
TOP_32, ZERO_32 = np.int32(31), np.int32(0)
ONE_32, HALF_32, MINUS_2_32 = np.float32(1), np.float32(0.5), np.float32(-2)
ULP_WORD_32, ANGLE_32 = np.float32(2.0**-32), np.float32(2 * math.pi * 2.0**-32)
LN2_HI_32, LN2_LO_32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
A0, A1, A2 = np.float32(7.0376836292e-2), np.float32(-1.1514610310e-1), np.float32(1.1676998740e-1)
A3, A4, A5 = np.float32(-1.2420140846e-1), np.float32(1.4249322787e-1), np.float32(-1.6668057665e-1)
A6, A7, A8 = np.float32(2.0000714765e-1), np.float32(-2.4999993993e-1), np.float32(3.3333331174e-1)
SA, SB, SC = np.float32(-1.9515295891e-4), np.float32(8.3321608736e-3), np.float32(-1.6666654611e-1)
CA, CB, CC = np.float32(2.443315711809948e-5), np.float32(-1.388731625493765e-3), np.float32(4.166664568298827e-2)

# float64: the same split, then fdlibm
SQRT_HALF_64, MANTISSA_64 = np.uint64(0x3FE6A09E667F3BCD), np.uint64(52)
BIAS_64, SIGN_64 = np.uint64(64 << 52), np.uint64(62)
TWO_52_BITS, TWO_52_PLUS_64 = np.uint64(0x4330000000000000), 2.0**52 + 64.0
ULP_WORD_64, ANGLE_64 = 2.0**-32, 2 * math.pi * 2.0**-32
LN2_HI_64, LN2_LO_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
G1, G2, G3, G4 = 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01
G5, G6, G7 = 1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860510658591e-01
S1, S2, S3 = -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04
S4, S5, S6 = 2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10
C1, C2, C3 = 4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05
C4, C5, C6 = -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round: two 32 x 32 -> 64 bit products, their halves swapped and mixed with the key.

    A word is the low half of a u64 whose high half is left over from a product: vector units multiply low halves, so that nothing
    is ever packed or masked; and the key meets what the last round left, off the path of the products (25 % faster together).
    """
    a = np.uint64(c0 & LOW) * M0
    b = np.uint64(c2 & LOW) * M1
    return np.uint64(np.uint64(c1 ^ k0) ^ np.uint64(b >> HIGH)), b, np.uint64(np.uint64(c3 ^ k1) ^ np.uint64(a >> HIGH)), a


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def row(k):
    """Where the k-th row of lanes begins. Unsigned: a signed index could be negative, and the test for that keeps loops scalar."""
    return np.uint64(k) * WIDTH


@njit(error_model="numpy", fastmath=FAST)
def words(key, first, keep, c2, c3, out):
    """Philox4x32-10 for LANES consecutive paths, a row per word; `keep` clears the lowest path bit of antithetic noise."""
    for lane in range(WIDTH):
        path = np.uint64(np.uint64(first + lane) & keep)
        x0, x1, x2, x3 = path, np.uint64(path >> HIGH), np.uint64(c2), np.uint64(c3)
        # Inside the loop on purpose: round keys carried from outside it stop LLVM from vectorising (4 times slower).
        k0, k1 = np.uint64(key & LOW), np.uint64(key >> HIGH)
        for _ in range(10):
            x0, x1, x2, x3 = philox_round(x0, x1, x2, x3, k0, k1)
            k0, k1 = np.uint64(k0 + W0), np.uint64(k1 + W1)
        out[lane], out[ROW_1 + lane], out[ROW_2 + lane], out[ROW_3 + lane] = np.uint32(x0), np.uint32(x1), np.uint32(x2), np.uint32(x3)


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def quarter_turns(w):
    """Nearest quarter turn q (mod 4) of the angle 2 pi w 2^-32, and the signed remainder in words."""
    q = np.uint32(np.uint32(w + EIGHTH) >> QUARTER_SHIFT)
    return q, np.int32(np.uint32(w - np.uint32(q << QUARTER_SHIFT)))


# Box-Muller in three passes over the lanes, with what is between them in the rows of the result: in one pass, operations that wait for each other
# fill the processor's window before it sees the next lanes (1.4 to 1.5 times slower on 256-bit vectors, the same bits).


@njit(error_model="numpy", fastmath=FAST)
def box_muller_32(word, a, b, out, za, zb):
    """Rows a, b of words to rows za, zb of float32 normals, the float64 normals to float32 rounding (under 6 ulp)."""
    exponents_32(word, a, out, za, zb)
    squared_radii_32(out, za, zb)
    turned_32(word, b, out, za, zb)


@njit(error_model="numpy", fastmath=FAST)
def exponents_32(word, a, out, k, f):
    """u = (w + 1/2) 2^-32 as 2^k (1 + f)."""
    for lane in range(WIDTH):
        # t = u below 1/2 and 1 - u above, so that log u = log1p(-t) keeps its relative accuracy as u -> 1.
        w = np.int32(word[a + lane])
        flip = np.int32(w >> TOP_32)
        t = (np.float32(np.int32(w ^ flip)) + HALF_32) * ULP_WORD_32
        u = t if flip == ZERO_32 else ONE_32 - t
        bits = as_bits(u)
        e = np.int32(np.int32(bits - SQRT_HALF_32) >> MANTISSA_32)
        out[f + lane] = as_float(np.int32(bits - np.int32(e << MANTISSA_32))) - ONE_32 if e < ZERO_32 else -t
        out[k + lane] = np.float32(e)


@njit(error_model="numpy", fastmath=FAST)
def squared_radii_32(out, at, fraction):
    """-2 log(2^k (1 + f)), in the place of k."""
    for lane in range(WIDTH):
        k, f = out[at + lane], out[fraction + lane]
        y = ((((((((A0 * f + A1) * f + A2) * f + A3) * f + A4) * f + A5) * f + A6) * f + A7) * f + A8) * f * (f * f)
        out[at + lane] = MINUS_2_32 * (k * LN2_LO_32 + y - HALF_32 * (f * f) + f + k * LN2_HI_32)


@njit(error_model="numpy", fastmath=FAST)
def turned_32(word, b, out, za, zb):
    """The radius, its square in row za, times cosine and sine of the angle in words."""
    for lane in range(WIDTH):
        radius = np.float32(math.sqrt(out[za + lane]))
        q, remainder = quarter_turns(word[b + lane])
        x = (np.float32(remainder) + HALF_32) * ANGLE_32
        z = x * x
        s = radius * (((SA * z + SB) * z + SC) * z * x + x)
        c = radius * (((CA * z + CB) * z + CC) * z * z - HALF_32 * z + ONE_32)
        odd = np.uint32(q & U1) == U1
        cosine, sine = s if odd else c, c if odd else s
        out[za + lane] = as_float(np.uint32(np.uint32(as_bits(cosine)) ^ np.uint32(np.uint32(np.uint32(q + U1) & U2) << QUARTER_SHIFT)))
        out[zb + lane] = as_float(np.uint32(np.uint32(as_bits(sine)) ^ np.uint32(np.uint32(q & U2) << QUARTER_SHIFT)))


@njit(error_model="numpy", fastmath=FAST)
def box_muller_64(word, a, b, out, za, zb):
    """Rows a, b of words to rows za, zb of float64 normals, within 4 units in the last place."""
    exponents_64(word, a, out, za, zb)
    squared_radii_64(out, za, zb)
    turned_64(word, b, out, za, zb)


@njit(error_model="numpy", fastmath=FAST)
def exponents_64(word, a, out, k, f):
    """u = (w + 1/2) 2^-32 as 2^k (1 + f)."""
    for lane in range(WIDTH):
        u = (np.float64(word[a + lane]) + 0.5) * ULP_WORD_64  # exact
        bits = np.uint64(as_bits(u))
        # exponent + 64, so that the shift may be unsigned: vector units shift u64 but not i64
        e = np.uint64(np.uint64(np.uint64(bits - SQRT_HALF_64) + BIAS_64) >> MANTISSA_64)
        out[k + lane] = as_float(np.uint64(e | TWO_52_BITS)) - TWO_52_PLUS_64
        out[f + lane] = as_float(np.uint64(np.uint64(bits - np.uint64(e << MANTISSA_64)) + BIAS_64)) - 1.0


@njit(error_model="numpy", fastmath=FAST)
def squared_radii_64(out, at, fraction):
    """-2 log(2^k (1 + f)), in the place of k."""
    for lane in range(WIDTH):
        k, f = out[at + lane], out[fraction + lane]
        s = f / (2.0 + f)
        z = s * s
        r = z * (G1 + z * (G2 + z * (G3 + z * (G4 + z * (G5 + z * (G6 + z * G7))))))
        h = 0.5 * f * f
        out[at + lane] = -2.0 * (k * LN2_HI_64 - ((h - (s * (h + r) + k * LN2_LO_64)) - f))


@njit(error_model="numpy", fastmath=FAST)
def turned_64(word, b, out, za, zb):
    """The radius, its square in row za, times cosine and sine of the angle in words."""
    for lane in range(WIDTH):
        radius = math.sqrt(out[za + lane])
        q, remainder = quarter_turns(word[b + lane])
        x = (np.float64(remainder) + 0.5) * ANGLE_64
        z = x * x
        s = radius * (x + x * z * (S1 + z * (S2 + z * (S3 + z * (S4 + z * (S5 + z * S6))))))
        c = radius * (1.0 - (0.5 * z - z * z * (C1 + z * (C2 + z * (C3 + z * (C4 + z * (C5 + z * C6)))))))
        odd = np.uint32(q & U1) == U1
        cosine, sine = s if odd else c, c if odd else s
        out[za + lane] = as_float(np.uint64(np.uint64(as_bits(cosine)) ^ np.uint64(np.uint64(np.uint32(np.uint32(q + U1) & U2)) << SIGN_64)))
        out[zb + lane] = as_float(np.uint64(np.uint64(as_bits(sine)) ^ np.uint64(np.uint64(np.uint32(q & U2)) << SIGN_64)))


def box_muller(word, a, b, out, za, zb):
    """Box-Muller in the precision of the output rows."""
    raise NotImplementedError("compiled code only")


@overload(box_muller, jit_options={"error_model": "numpy", "fastmath": FAST})
def _box_muller(word, a, b, out, za, zb):
    if out.dtype == types.float32:
        return lambda word, a, b, out, za, zb: box_muller_32(word, a, b, out, za, zb)
    return lambda word, a, b, out, za, zb: box_muller_64(word, a, b, out, za, zb)


@njit(error_model="numpy", fastmath=FAST)
def normals(key, first, antithetic, stream, group, dim, word, out):
    """Normals of steps 4 group ... 4 group + 3 for LANES paths: row r dim + j of `out` is step 4 group + r, coordinate j."""
    keep = np.uint64(~np.uint64(antithetic))
    for j in range(dim):
        c3 = np.uint32(np.uint32(j) | np.uint32(np.uint32(stream) << np.uint32(28)))
        words(key, first, keep, np.uint32(group), c3, word)
        box_muller(word, ROW_0, ROW_1, out, row(j), row(dim + j))
        box_muller(word, ROW_2, ROW_3, out, row(2 * dim + j), row(3 * dim + j))
    if antithetic:
        for k in range(4 * dim):
            negate_odd(first, out, row(k))


@njit(error_model="numpy", fastmath=FAST)
def negate_odd(first, out, at):
    """Antithetic partners: path 2m + 1 carries path 2m's normals negated."""
    for lane in range(WIDTH):
        out[at + lane] = -out[at + lane] if np.uint64(np.uint64(first + lane) & np.uint64(1)) else out[at + lane]


@built_from(elementary.__file__)
@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
def fill_normals(key, first, antithetic, stream, out):
    """out[p, i, j] = normal of path first + p, step i, coordinate j; any float dtype, any number of paths."""
    paths, steps, dim = out.shape
    word = np.empty(4 * LANES, np.uint32)
    rows = np.empty(4 * dim * LANES, out.dtype)
    for begin in range(0, paths, LANES):
        for group in range((steps + 3) // 4):
            normals(key, np.uint64(first + np.uint64(begin)), antithetic, stream, group, dim, word, rows)
            for lane in range(min(LANES, paths - begin)):
                for r in range(min(4, steps - 4 * group)):
                    for j in range(dim):
                        out[begin + lane, 4 * group + r, j] = rows[(r * dim + j) * LANES + lane]


@built_from(elementary.__file__)
@njit(cache=True, error_model="numpy", fastmath=FAST)
def fill_words(key, first, keep, c2, c3, out):
    """out[p] = the four words of counter (first + p, c2, c3), (n, 4) u32."""
    word = np.empty(4 * LANES, np.uint32)
    for begin in range(0, out.shape[0], LANES):
        words(key, np.uint64(first + np.uint64(begin)), keep, c2, c3, word)
        for lane in range(min(LANES, out.shape[0] - begin)):
            for j in range(4):
                out[begin + lane, j] = word[j * LANES + lane]
