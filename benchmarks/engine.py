r"""Path-steps per core-second of `ctrl.simulate` on workload W1, beside torchsde's Euler.

W1: VP with beta from 0.1 to 20, Gaussian data N(1, 1/4 I), pre-trained (affine) score, 1000 uniform steps, terminal state
kept, d = 1, 2, 8. Every version runs on one pinned core with one thread, rounds are interleaved, medians of processor time
(not wall time: a busy machine would then be measured) are reported.
Before it is timed, a version's terminal mean and variance must agree with the chain's exact ones to 5 standard errors.

    python benchmarks/engine.py [--quick] [--out FILE.csv]

torchsde runs as its documentation shows it, and with its Brownian tree told the step length, which is twice as fast.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ctrl
import numpy as np
import tyro

MEAN, VARIANCE, SEED = 1.0, 0.25, 2024
PEER, TUNED = "torchsde Euler float32", "torchsde, tree sized to dt"


@dataclass(frozen=True)
class Case:
    """One workload: dimension, steps, and the number of paths per call of our kernels and of the peer."""

    dim: int
    steps: int
    paths: int
    peer_paths: int

    def problem(self) -> ctrl.Problem:
        data = ctrl.Gaussian(np.full(self.dim, MEAN), VARIANCE * np.eye(self.dim))
        return ctrl.Problem(ctrl.VP(0.1, 20.0), data, ctrl.LinearReward(np.ones(self.dim)), kl_weight=1.0)


# The peer's batches are large enough for its overhead per step not to matter; quick mode has fewer steps, not smaller batches.
CASES = [Case(1, 1000, 2**17, 2**16), Case(2, 1000, 2**16, 2**15), Case(8, 1000, 2**15, 2**13)]
QUICK = [Case(1, 100, 2**17, 2**16), Case(2, 100, 2**16, 2**15), Case(8, 100, 2**15, 2**13)]


@dataclass(frozen=True)
class Row:
    """One version on one workload; rates in million path-steps per core-second."""

    workload: str
    dim: int
    version: str
    paths: int
    steps: int
    rounds: int
    seconds: float
    million_path_steps_per_second: float
    slowest_over_fastest: float
    ratio_to_torchsde: float | None
    ratio_to_tuned_torchsde: float | None
    mean_z: float
    variance_z: float


def exact_moments(case: Case) -> tuple[float, float]:
    """Mean and variance of a coordinate of X_N, by the chain's recursion (coordinates are alike and independent)."""
    problem = case.problem()
    grid = problem.grid(case.steps)
    c, pre = problem.coefficients(grid), problem.pretrained(grid).parts(grid)
    mean, variance = 0.0, 1.0
    for i in range(case.steps):
        A = 1 - c.dt[i] * c.f[i] + c.dt[i] * c.h[i] * pre.K[i, 0, 0]
        mean, variance = A * mean + c.dt[i] * c.h[i] * pre.k[i, 0], A * A * variance + c.noise[i] ** 2
    return mean, variance


def ours(case: Case, dtype: Any) -> Callable[[int], np.ndarray[Any, Any]]:
    problem = case.problem()
    grid = problem.grid(case.steps)
    policy = problem.pretrained(grid)

    def call(seed: int) -> np.ndarray[Any, Any]:
        return ctrl.simulate(problem, policy, grid, ctrl.Noise(seed, case.paths), dtype=dtype, threads=1).terminal

    return call


def torchsde_euler(case: Case, tuned: bool) -> Callable[[int], np.ndarray[Any, Any]]:
    """The same chain by torchsde: float32, diagonal noise, coefficients from a table; `tuned` tells its Brownian tree dt.

    dt is a little more than 1/steps, so that the last step ends at 1 and rounding of times leaves no sliver of a step: a sliver
    makes torchsde rebuild its tree at that resolution, forty times slower.
    """
    import torch
    import torchsde

    torch.set_num_threads(1)
    problem = case.problem()
    grid = problem.grid(case.steps)
    c, pre = problem.coefficients(grid), problem.pretrained(grid).parts(grid)
    slope, shift = (-c.f + c.h * pre.K[:, 0, 0]).tolist(), (c.h * pre.k[:, 0]).tolist()
    scale, dt = np.sqrt(c.g2).tolist(), (1 + 1e-4) / case.steps

    class Reverse(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def step(self, t: Any) -> int:
            return min(case.steps - 1, int(float(t) * case.steps + 0.5))

        def f(self, t: Any, y: Any) -> Any:
            i = self.step(t)
            return slope[i] * y + shift[i]

        def g(self, t: Any, y: Any) -> Any:
            return torch.full_like(y, scale[self.step(t)])

    def call(seed: int) -> np.ndarray[Any, Any]:
        torch.manual_seed(seed)
        with torch.no_grad():
            start = torch.randn(case.peer_paths, case.dim)
            tree = torchsde.BrownianInterval(0.0, 1.0, size=start.shape, dt=dt if tuned else None, entropy=seed)
            ends = torchsde.sdeint(Reverse(), start, torch.tensor([0.0, 1.0]), method="euler", dt=dt, bm=tree)
        return ends[-1].numpy()

    return call


def moments_z(case: Case, x: np.ndarray[Any, Any]) -> tuple[float, float]:
    """z of the terminal mean and variance against the chain's; ValueError beyond 5."""
    mean, variance = exact_moments(case)
    x = x.astype(np.float64).ravel()
    z = (x.mean() - mean) / np.sqrt(variance / x.size), (((x - mean) ** 2).mean() / variance - 1) / np.sqrt(2 / x.size)
    if max(map(abs, z)) > 5:
        raise ValueError(f"terminal law: expected the chain's mean and variance within 5 standard errors, got z = {z}")
    return float(z[0]), float(z[1])


def run(case: Case, rounds: int, seed: int) -> list[Row]:
    """Check, warm up, then time all versions in turn, `rounds` times."""
    calls = {"ctrl.simulate float32": ours(case, np.float32), "ctrl.simulate float64": ours(case, np.float64)}
    if importlib.util.find_spec("torchsde") is not None:
        calls |= {PEER: torchsde_euler(case, tuned=False), TUNED: torchsde_euler(case, tuned=True)}
    checked = {name: moments_z(case, call(seed)) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            call(seed + 1 + r)
            seconds[name].append(time.process_time() - began)
    return list(rows(case, rounds, seconds, checked))


def rows(case: Case, rounds: int, seconds: dict[str, list[float]], checked: dict[str, tuple[float, float]]) -> Iterator[Row]:
    paths = {name: case.peer_paths if name in (PEER, TUNED) else case.paths for name in seconds}
    rate = {name: paths[name] * case.steps / statistics.median(s) / 1e6 for name, s in seconds.items()}
    for name, s in seconds.items():
        plain, tuned = (rate[name] / rate[peer] if peer in rate else None for peer in (PEER, TUNED))
        yield Row("W1", case.dim, name, paths[name], case.steps, rounds, statistics.median(s), rate[name], max(s) / min(s),
                  plain, tuned, *checked[name])


def environment(seed: int) -> dict[str, Any]:
    """What a number depends on: versions, machine, load, seed."""
    names = ("numba", "numpy", "torch", "torchsde")
    found = {name: version(name) if importlib.util.find_spec(name) else "not installed" for name in names}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    load = round(os.getloadavg()[0], 1)
    return {"ctrl": ctrl.__version__, "python": platform.python_version(), **found, "machine": f"{cpu}, {platform.machine()}",
            "cores": os.cpu_count(), "load": load, "seed": seed}


def main(quick: bool = False, out: Path = Path("engine.csv"), rounds: int = 5, seed: int = SEED) -> None:
    """Time W1 and write one row per version and dimension.

    Args:
        quick: smaller workloads, two rounds.
        out: the CSV file to write.
        rounds: interleaved rounds per version.
        seed: of all noise.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if importlib.util.find_spec("torchsde") is None:
        print("torchsde is not installed: its rows and the ratios are skipped")
    found = [row for case in (QUICK if quick else CASES) for row in run(case, 2 if quick else rounds, seed)]
    about = environment(seed)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(found[0]), *about])
        writer.writeheader()
        writer.writerows({**asdict(row), **about} for row in found)
    for row in found:
        ratio = "" if row.ratio_to_torchsde is None else (
            f"   {row.ratio_to_torchsde:6.1f} x torchsde, {row.ratio_to_tuned_torchsde:.1f} x tuned")
        print(f"{row.workload} d={row.dim}  {row.version:27s} {row.million_path_steps_per_second:8.1f} M path-steps/s"
              f"   spread {row.slowest_over_fastest:.2f}{ratio}")


if __name__ == "__main__":
    tyro.cli(main)
