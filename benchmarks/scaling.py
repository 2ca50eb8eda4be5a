r"""Time and memory of the compiled chain against paths, steps, dimensions, mixture components and threads: exponents, and where they bend.

    python -m benchmarks.scaling [--quick] [--out DIR]          about 5 minutes; --quick half a minute

Time: the median processor time of a call of `ctrl.simulate` on one thread, in both precisions (rounds are interleaved); where threads
are swept, the wall time of the fastest round, since what else a machine does only adds to it. Memory: what a streamed run adds to the
resident set at its peak, in a fresh process that has run a small one. An exponent is the slope of a log-log line through the upper half
of its sweep, with the standard error that the scatter implies; a curve bends where the slope between neighbours leaves it by over .15.
Expected: paths and steps 1, from where the arithmetic outweighs a call's fixed cost; isotropic data 1 in d (noise) until the call's own
d x d matrices, made once for all paths, outweigh a small batch; dense data from 1 to 2 as products with matrices overtake the noise;
components towards 1 (noise comes first). Memory: 1 in paths beyond the scratch of a chunk; 0 in steps but for the tables of a grid, which
do not depend on the paths (in the plane under a tenth of a KiB a step for simulate; 2 KiB for gradients, with the laws of every step).

Writes scaling.csv, exponents.csv and scaling.png into benchmarks/scaling. Feeds README.md and docs/results.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before the libraries that count cores are imported; where threads are swept they are asked for by number.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ctrl
import numpy as np
import tyro
from ctrl.estimators import ScoreFunction
from ctrl.evidence import fitted_power
from ctrl.theorems.style import COLOURS, LINES, MARKERS, RC, log_ticks, png
from joblib import cpu_count
from tqdm import tqdm

from benchmarks.engine import SEED, Affine, Array, environment, kind, write

NARROW = 2**12  # paths where these are not swept
BENT = 0.15  # a slope between neighbours that is so far from the exponent
MEMORY = Path("/proc/self/clear_refs")  # Linux: where a process forgets its peak
MIB = 2.0**20


@dataclass(frozen=True)
class Row:
    """One point: x of a sweep's curve, seconds or MiB there (median), and the extremes over rounds."""

    sweep: str
    curve: str
    x: int
    y: float
    least: float
    most: float


@dataclass(frozen=True)
class Fit:
    """y ~ x^exponent over the upper half; from `holds_from` on no slope between neighbours leaves it, below the first slope is `first_slope`."""

    sweep: str
    curve: str
    exponent: float
    standard_error: float
    fitted_from: float
    holds_from: float
    first_slope: float
    last_slope: float

    def sentence(self) -> str:
        return (f"{self.sweep:17s} {self.curve:20s} exponent {self.exponent:6.3f} +- {self.standard_error:.3f}, fitted from {self.fitted_from:g}, "
                f"holds from {self.holds_from:g}; slope at the lower end {self.first_slope:.2f}, at the upper {self.last_slope:.2f}")


def fit(rows: Sequence[Row]) -> Fit:
    """The exponent of one curve and where it bends; at least five points."""
    x, y = (np.array([float(getattr(row, name)) for row in sorted(rows, key=lambda row: row.x)]) for name in ("x", "y"))
    upper = max(3, -(-len(x) // 2))
    power = fitted_power(x[-upper:], y[-upper:])
    slopes = np.diff(np.log(y)) / np.diff(np.log(x))
    bent = np.flatnonzero(np.abs(slopes - power.slope) > BENT)
    return Fit(rows[0].sweep, rows[0].curve, power.slope, power.standard_error, float(x[-upper]), float(x[bent[-1] + 1] if bent.size else x[0]),
               float(slopes[0]), float(slopes[-1]))


# ---- time --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A call to be timed."""

    sweep: str
    curve: str
    x: int
    call: Callable[[int], Any]


@cache
def mixture(components: int) -> ctrl.Problem:
    """Components on a circle in the plane."""
    angle = 2 * np.pi * np.arange(components) / components
    data = ctrl.GaussianMixture(np.full(components, 1 / components), np.column_stack([np.cos(angle), np.sin(angle)]),
                                np.tile([[0.1, 0.02], [0.02, 0.2]], (components, 1, 1)))
    return ctrl.Problem(ctrl.VP(0.1, 20.0), data, ctrl.LinearReward(np.ones(2)), kl_weight=1.0)


def simulation(problem: ctrl.Problem, steps: int, paths: int, bits: int, threads: int = 1) -> Callable[[int], Array]:
    """A streamed run of the pre-trained model, whose preparation is not timed."""
    grid = problem.grid(steps)
    policy = problem.pretrained(grid)
    return lambda seed: ctrl.simulate(problem, policy, grid, ctrl.Noise(seed, paths), dtype=kind(bits), threads=threads).terminal


def points(quick: bool) -> Iterator[Point]:
    """All sweeps of time; the smallest first, each over at least five points."""
    plane, less = Affine("", 2, 1, 1).problem, 3 if quick else 0
    narrow = NARROW >> less
    for bits in (64, 32):
        name = f"float{bits}"
        for paths in 2 ** np.arange(5, 19 - 3 * less // 2):
            yield Point("paths", name, int(paths), simulation(plane, 100, int(paths), bits))
        for steps in 2 ** np.arange(4, 13 - less):
            yield Point("steps", name, int(steps), simulation(plane, int(steps), narrow, bits))
        for dim in 2 ** np.arange(0, 9 - less):
            for shape, dense in (("isotropic", False), ("dense", True)):
                yield Point("d", f"{shape}, {name}", int(dim), simulation(Affine("", int(dim), 1, 1, dense).problem, 50, narrow // 4, bits))
        for count in 2 ** np.arange(0, 8 - less // 2):
            yield Point("K", name, int(count), simulation(mixture(int(count)), 50, narrow, bits))


def timed(entered: Sequence[Point], rounds: int, clock: Callable[[], float], least: float = 0.02,
          middle: Callable[[list[float]], float] = statistics.median) -> list[Row]:
    """Every point warmed up, then all in turn, `rounds` times, each for about `least` seconds."""
    calls = []
    for point in tqdm(entered, desc="warm-up", leave=False, disable=None):
        point.call(SEED)
        began = clock()
        point.call(SEED)
        calls.append(max(1, round(least / max(clock() - began, 1e-6))))
    seconds: list[list[float]] = [[] for _ in entered]
    for r in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        for point, count, spent in zip(entered, calls, seconds, strict=True):
            began = clock()
            for k in range(count):
                point.call(SEED + 1 + r + k)
            spent.append((clock() - began) / count)
    return [Row(p.sweep, p.curve, p.x, middle(s), min(s), max(s)) for p, s in zip(entered, seconds, strict=True)]


def threaded(quick: bool) -> list[Point]:
    """From one thread to twice the cores that this process may use."""
    cores, problem = cpu_count(), Affine("", 2, 1, 1).problem
    counts = sorted({1, *(2**k for k in range(1, 10) if 2**k <= 2 * cores), cores, 2 * cores})
    return [Point("threads", f"float{bits}", count, simulation(problem, 200, 2**14 if quick else 2**17, bits, count))
            for bits in (64, 32) for count in counts]


# ---- memory ------------------------------------------------------------------------------------------------------------------


def gradient(steps: int, paths: int) -> Callable[[int], Any]:
    """Score-function gradients in one pass with the paths."""
    problem = ctrl.zoo.gaussian_pull_2d()
    policy, grid = ctrl.BasisPolicy.scaled(problem, scale=0.9, shift=[0.1, 0.1]), problem.grid(steps)
    return lambda seed: ScoreFunction()(problem, policy, grid, ctrl.Noise(seed, paths)).mean


def streamed(curve: str, steps: int, paths: int) -> Callable[[int], Any]:
    return gradient(steps, paths) if curve == "ScoreFunction" else simulation(Affine("", 2, 1, 1).problem, steps, paths, 64)


def peak(curve: str, steps: int, paths: int) -> float:
    """MiB that a run adds to this process at its peak, beyond what was there after a small one."""
    streamed(curve, 8, 512)(SEED)
    call = streamed(curve, steps, paths)
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # or a call may take what the heap still holds, unseen
    MEMORY.write_text("5")
    before = resident("VmRSS")
    call(SEED)
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    """KiB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))


def remembered(quick: bool) -> Iterator[Row]:
    """Peaks, each in a fresh process."""
    steps, paths = (2 ** np.arange(3, 8), 2 ** np.arange(12, 17)) if quick else (2 ** np.arange(4, 13), 2 ** np.arange(10, 22))
    for curve in ("simulate",) if quick else ("simulate", "ScoreFunction"):
        wanted = [("memory over steps", int(n), int(n), 2**14 if quick else 2**16) for n in steps]
        wanted += [("memory over paths", int(n), 50, int(n)) for n in paths]
        for sweep, x, many, wide in tqdm(wanted, desc=f"memory of {curve}", leave=False, disable=None):
            code = f"import json; from benchmarks.scaling import peak; print(json.dumps(peak({curve!r}, {many}, {wide})))"
            found = [json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
                                               cwd=Path(__file__).parents[1]).stdout) for _ in range(1 if quick else 3)]
            yield Row(sweep, curve, x, statistics.median(found), min(found), max(found))


# ---- figure ------------------------------------------------------------------------------------------------------------------

PANELS = (
    ("paths", "paths (d = 2, 100 steps)", "seconds a call"), ("steps", "steps ({narrow} paths, d = 2)", "seconds a call"),
    ("d", "dimensions d ({fewer} paths, 50 steps)", "seconds a call"), ("K", "components K ({narrow} paths, 50 steps, d = 2)", "seconds a call"),
    ("threads", "threads (d = 2, 200 steps)", "wall seconds a call"), ("memory", "steps or paths", "MiB added at the peak"))


def figure(rows: Sequence[Row], fits: Sequence[Fit], about: dict[str, Any], narrow: int) -> bytes:
    """A panel per sweep; full markers: fitted; the dashed line in the memory's panel: what whole trajectories would take."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        drawing = Figure(figsize=(13, 7.6), layout="constrained")
        for ax, (sweep, xlabel, ylabel) in zip(drawing.subplots(2, 3).flat, PANELS, strict=True):
            curves = dict.fromkeys((row.sweep, row.curve) for row in rows if row.sweep.startswith(sweep))
            for j, key in enumerate(curves):
                mine = [row for row in rows if (row.sweep, row.curve) == key]
                found = next((f for f in fits if (f.sweep, f.curve) == key), None)
                line(ax, mine, found, j)
            ax.set(xscale="log", yscale="log", xlabel=xlabel.format(narrow=f"{narrow:,}", fewer=f"{narrow // 4:,}"), ylabel=ylabel)
            if sweep == "memory" and curves:
                whole(ax, [row.x for row in rows if row.sweep == "memory over steps" and row.curve == "simulate"], about["streamed_paths"])
            if sweep in ("d", "K", "threads"):
                at = sorted({row.x for row in rows if row.sweep == sweep})
                log_ticks(ax, at, [str(x) for x in at])
            if curves:
                ax.legend(fontsize=7.5)
        drawing.suptitle(f"Time of ctrl.simulate and memory of streamed runs; filled markers are fitted. {about['machine']}, load {about['load']}",
                         fontsize=10)
        return png(drawing)


def line(ax: Any, rows: Sequence[Row], found: Fit | None, j: int) -> None:
    """One curve with the spread over rounds; open markers are below the fitted half."""
    x, y = np.array([row.x for row in rows]), np.array([row.y for row in rows])
    label = rows[0].curve + (f" ({rows[0].sweep.removeprefix('memory ')})" if rows[0].sweep.startswith("memory") else "")
    if found is None:
        label += f": speed {', '.join(f'{y[0] / t:.2f}' for t in y)} on {', '.join(map(str, x))} threads"
    else:
        held = "" if found.holds_from == x[0] else ", still bending" if found.holds_from == x[-1] else f" from {found.holds_from:,.0f}"
        label += f": $x^{{{found.exponent:.2f} \\pm {found.standard_error:.2f}}}$" + held
    color, fitted = COLOURS[j], x >= (found.fitted_from if found else x[0])
    ax.plot(x, y, color=color, linestyle=LINES[j], label=label, marker=MARKERS[j], markevery=list(np.flatnonzero(fitted)))
    ax.plot(x[~fitted], y[~fitted], color=color, linestyle="none", marker=MARKERS[j], mfc="white")
    ax.fill_between(x, [row.least for row in rows], [row.most for row in rows], color=color, alpha=0.2, linewidth=0)


def whole(ax: Any, at: Sequence[int], paths: int) -> None:
    """States, noise and actions of all paths in float64, which a streamed run never holds."""
    steps = np.array(at)
    ax.plot(steps, 2 * 8 * paths * (3 * steps + 1) / MIB, color="black", linestyle=(0, (2, 2)), linewidth=1, label="whole trajectories (over steps)")
    ax.set_ylim(top=1e8)  # room for the legend


def main(quick: bool = False, out: Path = Path("benchmarks/scaling"), rounds: int = 7) -> list[Fit]:
    """Time and weigh all sweeps; write scaling.csv, exponents.csv and scaling.png.

    Args:
        quick: short sweeps, two rounds.
        out: the folder to write to.
        rounds: interleaved rounds of every point.
    """
    out.mkdir(parents=True, exist_ok=True)
    rounds = 2 if quick else rounds
    about = {**environment(SEED), "streamed_paths": 2**14 if quick else 2**16}
    rows = timed(list(points(quick)), rounds, time.process_time)
    rows += timed(threaded(quick), rounds, time.perf_counter, middle=min)
    if MEMORY.exists():
        rows += remembered(quick)
    else:
        print(f"memory is skipped: no {MEMORY} on this machine")
    write(out / "scaling.csv", [{**asdict(row), **about} for row in rows])
    fits = [fit([row for row in rows if (row.sweep, row.curve) == key])
            for key in dict.fromkeys((row.sweep, row.curve) for row in rows if row.sweep != "threads")]
    write(out / "exponents.csv", [{**asdict(f), **about} for f in fits])
    for found in fits:
        print(found.sentence())
    for row in rows:
        if row.sweep == "threads":
            print(f"threads  {row.curve:24s} {row.x:3d}: {row.y * 1e3:8.1f} ms (wall)")
    (out / "scaling.png").write_bytes(figure(rows, fits, about, NARROW >> 3 if quick else NARROW))
    return fits


if __name__ == "__main__":
    tyro.cli(main)
