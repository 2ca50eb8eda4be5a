"""benchmarks/scaling.py: planted bends are found, memory is measured, and the quick mode draws all sweeps."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import scaling


def rows(x, y):
    return [scaling.Row("paths", "float64", int(a), float(b), float(b), float(b)) for a, b in zip(x, y, strict=True)]


def test_bends_are_found_where_they_are():
    """A fixed cost at the lower end, a power that another overtakes, and none; order of the rows does not matter."""
    x = 2 ** np.arange(14)
    overhead = scaling.fit(rows(x, 10.0 + x)[::-1])
    assert overhead.exponent == pytest.approx(0.99, abs=0.02) and overhead.first_slope < 0.15 and 32 <= overhead.holds_from <= 64
    corner = scaling.fit(rows(x, np.where(x <= 32, 32.0 * x, x**2)))
    assert corner.exponent == pytest.approx(2, abs=1e-9) and corner.holds_from == 32 and corner.first_slope == pytest.approx(1)
    straight = scaling.fit(rows(x, 5.0 * x))
    assert straight.holds_from == 1 and straight.exponent == pytest.approx(1) and straight.fitted_from == x[7]


def test_points_do_what_they_say():
    """Terminal states of the size that is swept, and a mixture of so many components."""
    found = {(p.sweep, p.curve, p.x): p for p in scaling.points(quick=True)}
    assert found["paths", "float32", 64].call(0).shape == (64, 2) and found["paths", "float32", 64].call(0).dtype == np.float32
    assert found["d", "dense, float64", 4].call(0).shape == (128, 4)
    assert scaling.mixture(8).data.weights.size == 8
    for sweep in ("paths", "steps", "d", "K"):
        assert len([key for key in found if key[0] == sweep and key[1].endswith("float64") and "iso" not in key[1]]) >= 5


@pytest.mark.skipif(not scaling.MEMORY.exists(), reason="the peak of a process is read and reset as on Linux")
def test_the_peak_is_what_a_call_holds_for_a_while(monkeypatch):
    """64 MiB that a planted call touches and gives back are seen; so are the trajectories that a run would hold."""
    def held(curve, steps, paths):
        return lambda seed: None if steps == 8 else np.ones(64 * 2**17).sum()

    monkeypatch.setattr(scaling, "streamed", held)
    assert scaling.peak("", 9, 1) == pytest.approx(64, rel=0.1)


def test_memory_does_not_grow_with_steps(tmp_path, monkeypatch):
    """All of quick mode but for the timing, which is cut to a few points: rows, exponents and the figure."""
    few = [p for p in scaling.points(quick=True) if p.curve.endswith("float32") and p.x <= 2**9]
    monkeypatch.setattr(scaling, "points", lambda quick: iter(few))
    fits = {(f.sweep, f.curve): f for f in scaling.main(quick=True, out=tmp_path)}
    if scaling.MEMORY.exists():
        steps = fits["memory over steps", "simulate"]
        assert abs(steps.exponent) < 0.1
    assert {"paths", "steps", "d", "K"} <= {sweep for sweep, _ in fits}
    assert (tmp_path / "scaling.png").stat().st_size > 50_000 and (tmp_path / "scaling.csv").exists() and (tmp_path / "exponents.csv").exists()
