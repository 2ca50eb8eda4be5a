"""Validation at the public edge: every message names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def array(name: str, value: ArrayLike, shape: tuple[int | None, ...], letters: str = "") -> Array:
    """A finite, read-only float64 copy of `value` with the given shape (None: any length)."""
    try:
        if np.iscomplexobj(raw := np.asarray(value)):
            raise TypeError  # a cast would drop the imaginary part
        out = np.array(raw, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected real numbers of shape {letters or _words(shape)}, got {_short(value)}") from None
    if len(out.shape) != len(shape) or any(want not in (None, got) for want, got in zip(shape, out.shape, strict=True)):
        raise ValueError(f"{name}: expected shape {letters or _words(shape)}, got {out.shape}")
    if not np.all(np.isfinite(out)):
        raise ValueError(f"{name}: expected finite numbers, got {np.count_nonzero(~np.isfinite(out))} NaN or infinite")
    out.flags.writeable = False
    return out


def number(name: str, value: Any, *, above: float = -np.inf, at_least: float = -np.inf) -> float:
    """A finite float, strictly above `above` and not below `at_least`."""
    wanted = "a finite number"
    if above > -np.inf:
        wanted += f" > {above:g}"
    if at_least > -np.inf:
        wanted += f" >= {at_least:g}"
    try:
        out = np.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        out = np.nan
    if not np.isfinite(out) or out <= above or out < at_least:
        raise ValueError(f"{name}: expected {wanted}, got {_short(value)}")
    return out


def integer(name: str, value: Any, *, at_least: int) -> int:
    """A whole number not below `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(f"{name}: expected an integer >= {at_least}, got {_short(value)}")
    return int(value)


def spd(name: str, value: ArrayLike, dim: int | None = None) -> Array:
    """A symmetric positive definite matrix, or a stack of them; symmetric to rounding, symmetrised exactly."""
    shape = np.shape(value)
    out = array(name, value, (*(None,) * (len(shape) - 2), dim, dim) if len(shape) >= 2 else (dim, dim), "(..., d, d)")
    if out.shape[-1] != out.shape[-2]:
        raise ValueError(f"{name}: expected a square matrix, got shape {out.shape}")
    transpose = np.swapaxes(out, -1, -2)
    if not np.allclose(out, transpose, rtol=1e-10, atol=1e-12 * max(1e-300, float(np.max(np.abs(out), initial=0.0)))):
        raise ValueError(f"{name}: expected a symmetric matrix, got asymmetry {np.max(np.abs(out - transpose)):.3g}")
    out = (out + transpose) / 2
    smallest = float(np.min(np.linalg.eigvalsh(out))) if out.size else np.inf
    if smallest <= 0:
        raise ValueError(f"{name}: expected a positive definite matrix, got smallest eigenvalue {smallest:.6g}")
    out.flags.writeable = False
    return out


def points(name: str, x: ArrayLike, dim: int) -> Array:
    """States (n, d), real or complex (complex steps pass through)."""
    out = np.asarray(x)
    if out.dtype.kind not in "fc":
        out = out.astype(np.float64)
    if out.ndim != 2 or out.shape[1] != dim:
        raise ValueError(f"{name}: expected shape (n, {dim}), got {out.shape}")
    return out


def _short(value: Any) -> str:
    """The argument on one line, at most 80 characters."""
    return " ".join(repr(value).split())[:80]


def instance(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """ValueError unless `value` is of the kind that `what` describes."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {what}, got {type(value).__name__}")


def returned(name: str, out: Array, shape: tuple[int, ...]) -> Array:
    """What a user's function returned, checked for shape and finiteness."""
    out = np.asarray(out)
    if out.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected to return real numbers, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{name}: expected to return shape {shape}, got {out.shape}")
    if not np.all(np.isfinite(out)):
        raise ValueError(f"{name}: expected finite values, got {np.count_nonzero(~np.isfinite(out))} NaN or infinite")
    return out


def _words(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
