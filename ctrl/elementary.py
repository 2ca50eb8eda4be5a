r"""exp on vector units: polynomials in place of calls into the C library, which keep a loop from becoming vector instructions;
sums over the few coordinates of a state; and compile caches that know what they were built from.

Source: polynomials and splittings as in Cephes (float32) and fdlibm (float64).   Checked: tests/test_laws.py::test_exp
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

from ctrl.check import Array

FAST = {"contract", "nsz", "arcp", "afn"}  # keeps NaN and infinity; no reassociation

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


def dot(x: Array, y: Array) -> Array:
    """x'y along the last axis, (..., d) twice -> (...); three to four times as fast as np.sum over a short axis.

    Source: numpy.einsum.   Checked: tests/test_laws.py::test_sums_over_coordinates
    """
    return np.einsum("...i,...i->...", x, y)


def quadratic_form(x: Array, S: Array) -> Array:
    """x'S x, (n, d) and (d, d) -> (n,); twice as fast as one sum over both indices, and no row depends on the others, as in BLAS it may.

    Source: numpy.einsum.   Checked: tests/test_laws.py::test_sums_over_coordinates
    """
    return dot(np.einsum("ni,ij->nj", x, S), x)


def built_from(*sources: str | Path) -> Callable[[Any], Any]:
    """For a compiled, cached function that calls compiled functions of these files: a change in one of them voids its cache.

    Numba looks at the function's own file alone, so that an update of the others would leave the old machine code in use.
    Source: numba.core.caching.   Checked: tests/test_imports.py::test_caches_know_what_they_were_built_from
    """
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()

    def stamp(function: Any) -> Any:
        index = getattr(getattr(function, "_cache", None), "_cache_file", None)  # none where compilation or caches are off
        if index is not None:
            index._source_stamp = (index._source_stamp, digest)
            function.sources = frozenset(str(source) for source in sources)
        return function

    return stamp


@intrinsic
def as_bits(typing_context: Any, x: Any) -> Any:
    """The bits of a float as a signed integer of the same width."""
    return _bitcast(x, {types.float32: types.int32, types.float64: types.int64}[x])


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float with these bits."""
    wide = bits in (types.int64, types.uint64)
    return _bitcast(bits, types.float64 if wide else types.float32)


def _bitcast(source: Any, target: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(target))

    return target(source), generate


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def exp_32(t):
    """exp(t) for t <= 0, float32."""
    t = t if t > LOW_32 else LOW_32
    shifted = t * LOG2E_32 + ROUND_32
    n = shifted - ROUND_32
    r = t - n * LN2_HI_32 - n * LN2_LO_32
    p = (((((E1 * r + E2) * r + E3) * r + E4) * r + E5) * r + E6) * (r * r) + r + ONE_32
    return as_float(np.uint32(np.uint32(as_bits(p)) + np.uint32(np.uint32(as_bits(shifted)) << MANTISSA_32)))


@njit(error_model="numpy", fastmath=FAST, forceinline=True)
def exp_64(t):
    """exp(t) for t <= 0, float64."""
    t = t if t > LOW_64 else LOW_64
    shifted = t * LOG2E_64 + ROUND_64
    n = shifted - ROUND_64
    r = t - n * LN2_HI_64 - n * LN2_LO_64
    square = r * r
    fourth = square * square  # short sums side by side (Estrin), as one long chain keeps units waiting
    p = (0.5 + r * T3 + square * (T4 + r * T5)) + fourth * (T6 + r * T7 + square * (T8 + r * T9) + fourth * (T10 + r * T11 + square * T12))
    p = p * square + r + 1.0
    return as_float(np.uint64(np.uint64(as_bits(p)) + np.uint64(np.uint64(as_bits(shifted)) << MANTISSA_64)))


def exp_below(t):
    """exp(t), t <= 0, in the precision of t."""
    raise NotImplementedError("compiled code only")


@overload(exp_below, jit_options={"error_model": "numpy", "fastmath": FAST, "forceinline": True})
def _exp_below(t):
    if t == types.float32:
        return lambda t: exp_32(t)
    return lambda t: exp_64(t)
