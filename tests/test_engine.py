"""benchmarks/engine.py: every version runs the chain that it says, and one that does not is refused before it is timed."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("engine", ROOT / "benchmarks" / "engine.py")
assert spec is not None and spec.loader is not None
engine = importlib.util.module_from_spec(spec)
sys.modules["engine"] = engine
spec.loader.exec_module(engine)

SMALL = [engine.Affine("W1 d=1", 1, 60, 2**12), engine.Affine("W1 d=2", 2, 60, 2**12), engine.Affine("W1 d=8", 8, 60, 2**12),
         engine.Affine("W1 d=8 dense", 8, 60, 2**12, dense=True), engine.Mixture("W2", 60, 2**12), engine.GradientSums("W3", 40, 2**12)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return engine.build(tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("work", SMALL, ids=lambda w: w.name)
def test_cpp_is_the_same_chain(work, library):
    """With the library's words, path by path, in both precisions; another seed is another answer."""
    for bits, tolerance in ((64, 1e-10), (32, 2e-3)):
        ours = work.ours(bits).call(3)
        for generator in ("philox", "wide"):
            other = work.compiled(library, generator, bits)(3)
            assert np.max(np.abs(ours - other)) < tolerance * np.max(np.abs(ours)), (generator, bits)
    assert np.max(np.abs(ours - work.compiled(library, "philox", 32)(4))) > 0.1


@pytest.mark.parametrize("work", SMALL, ids=lambda w: w.name)
def test_every_version_has_the_exact_law(work):
    """Python peers too; the threshold of 5.5 standard errors has a false-alarm rate of 4e-8 for each statistic."""
    found = {v.name: work.z(v.call(1)) for v in engine.versions(work, None)}
    assert "NumPy" in found or work.name in ("W1 d=8 dense", "W3")
    assert max(found.values()) < 5.5, found


def test_a_wrong_chain_is_refused():
    """Planted: a peer whose noise is a tenth too small."""
    work = SMALL[1]

    class Wrong(engine.Affine):
        def peers(self):
            A, c, s = self.chain
            yield engine.Version("wrong", 64, 2**12, engine.numpy_loop(2**12, 2, self.steps, lambda x, xi, i: A[i] * x + c[i] + 0.9 * s[i] * xi))

    with pytest.raises(ValueError, match="wrong float64: expected the chain's law"):
        engine.race(Wrong("W1 d=2", 2, work.steps, work.paths), None, 1, 0)


def test_bars_and_figure(tmp_path):
    """Ratios are of rates in the same run against the faster C++ loop; the bars are those asked for."""
    def row(version, bits, rate):
        return engine.Row("W1 d=1", version, bits, 10, 10, 1, 1.0, rate, 1.0, 0.0)

    rows = [row("ctrl.simulate", 32, 80.0), row(engine.PHILOX, 32, 50.0), row(engine.WIDE, 32, 100.0), row(engine.LANES, 32, 160.0),
            row("ctrl.simulate", 64, 40.0), row("NumPy", 64, 5.0), row("torchsde", 32, 2.0)]
    found = {(b.bits, b.peer): (b.ratio, b.bar, b.reached) for b in engine.bars(rows)}
    assert found[32, "C++ Philox, the faster"] == (0.8, 0.8, True) and found[32, "C++ lanes"] == (0.5, 0.6, False)
    assert found[64, "NumPy float64"] == (8.0, 6.0, True) and found[64, "torchsde float32"] == (20.0, 20.0, True)
    assert found[32, "torchsde"] == (40.0, 50.0, False)
    faster = [replace(r, rate=2 * r.rate) if r.version.startswith("C++") else r for r in rows]
    assert not next(b for b in engine.bars(faster) if b.peer == "C++ Philox, the faster").reached
    engine.figure(rows, tmp_path / "engine.png", "a machine")
    assert (tmp_path / "engine.png").stat().st_size > 10_000
