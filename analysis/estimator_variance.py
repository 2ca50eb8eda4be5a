r"""How the variance of gradient estimators grows with the number of steps N.

    python -m analysis.estimator_variance [--quick] [--workers 2] [--backend loky]      70 s on one core; --quick 4 s

On the reference problem and its policy a = .9 K_pre x + k_pre + .1 (theory.md, sections 7 and 17): the trace of the per-path covariance of
the gradient with respect to the shift, sampled with a fixed seed for every (N, seed), so that rows are the same bit for bit on any pool.
Expected (section 7): as N grows it settles for every estimator that acts through the chain's own noise (131.5 score function, 128.5
reward-to-go, 1.00 temporal difference, .844 value gradient, 2.85 pathwise at N = 160), and grows like N where actions are sampled
(1507, 2668, 5015, 9720 at N = 20, 40, 80, 160). The temporal difference settles last: what it has above its limit falls like 1/N.

Writes rows.csv, table.txt, env.json and variance.png; finished rows are kept in parts/, and a second call goes on there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ctrl
import numpy as np
import pandas as pd
import tyro
from ctrl import estimators as e
from ctrl import exact
from ctrl.evidence import fitted_power
from ctrl.files import environment, writable, write_json
from ctrl.theorems.style import COLOURS, LINES, MARKERS, log_ticks, panels, png

from analysis.sweep import Pool, sweep


@dataclass(frozen=True)
class Entry:
    """An estimator, how it is made of the exact value, and what theory.md says of its trace: (N, trace)."""

    name: str
    make: Callable[[e.ValueFunction], e.Estimator]
    expected: tuple[tuple[int, float], ...]
    exploring: bool = False


ENTRIES = (
    Entry("ActionNoise", lambda value: e.ActionNoise(), ((20, 1507.0), (40, 2668.0), (80, 5015.0), (160, 9720.0)), exploring=True),
    Entry("ScoreFunction", lambda value: e.ScoreFunction(), ((160, 131.5),)),
    Entry("RewardToGo", lambda value: e.RewardToGo(), ((160, 128.5),)),
    Entry("Pathwise", lambda value: e.Pathwise(), ((160, 2.85),)),
    Entry("TemporalDifference", e.TemporalDifference, ((160, 1.00),)),
    Entry("ValueGradient", e.ValueGradient, ((160, 0.844),)))
FITTED = 40  # exponents are of N from here on
Job = tuple[str, int, int]


@dataclass(frozen=True)
class Study:
    """Six estimators, seven N, eight seeds."""

    out: Path = Path("analysis/estimator_variance")
    """Where rows, table and figure go."""
    steps: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 200)
    """Numbers of steps."""
    seeds: int = 8
    """Seeds of every N."""
    paths: int = 2**14
    """Paths of every seed."""
    pool: Annotated[Pool, tyro.conf.arg(name="")] = field(default_factory=Pool)
    """Where the jobs run."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Few steps, seeds and paths, only to show that everything works."""

    def sized(self) -> Study:
        return replace(self, steps=(5, 10, 20, 40, 60, 80), seeds=3, paths=2**11) if self.quick else self

    def jobs(self) -> dict[str, Job]:
        """Long ones first, so that no worker is left with one at the end."""
        return {f"{entry.name}-N{steps}-seed{seed}-n{self.paths}": (entry.name, steps, seed)
                for steps in sorted(self.steps, reverse=True) for entry in ENTRIES for seed in range(self.seeds)}


def compute(paths: int, job: Job) -> dict[str, Any]:
    """The row of one estimator, N and seed; all estimators see the same noise."""
    name, steps, seed = job
    entry = next(entry for entry in ENTRIES if entry.name == name)
    problem = ctrl.zoo.gaussian_pull_2d()
    policy, grid = ctrl.BasisPolicy.scaled(problem, scale=0.9, shift=[0.1, 0.1]), problem.grid(steps)
    estimator = entry.make(exact.value(problem, policy, grid))
    noise = ctrl.Noise(seed=1000 * seed + steps, paths=paths)
    gradient = estimator(problem, policy.with_exploration(np.eye(2)) if entry.exploring else policy, grid, noise)
    scale, *shift = np.diag(gradient.covariance)  # theta: scale, then shift
    return {"estimator": name, "steps": steps, "seed": seed, "paths": paths, "trace_shift": float(sum(shift)), "variance_scale": float(scale)}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per estimator: the exponent in N with its standard error, and the trace beside what theory.md says, at its largest N."""
    lines = []
    for entry in ENTRIES:
        mine = rows[rows.estimator == entry.name]
        late = mine[mine.steps >= FITTED]
        shift, scale = (fitted_power(late.steps.to_numpy(), late[column].to_numpy()) for column in ("trace_shift", "variance_scale"))
        steps, expected = max((pair for pair in entry.expected if pair[0] in set(mine.steps)), default=(int(mine.steps.max()), np.nan))
        found = mine[mine.steps == steps].trace_shift
        lines.append({"estimator": entry.name, "exponent": shift.slope, "error": shift.standard_error, "exponent_scale": scale.slope,
                      "error_scale": scale.standard_error, "N": steps, "trace": found.mean(), "trace_error": found.std() / np.sqrt(len(found)),
                      "expected": expected})
    return pd.DataFrame(lines)


def draw(rows: pd.DataFrame, summary: pd.DataFrame) -> bytes:
    """Left: traces over N, and theory.md's; right: the same relative to the largest N, where the bands can be seen."""
    with panels(2, f"Variance of one path's gradient (shift), bands: two standard deviations over {rows.seed.nunique()} seeds of "
                   f"{rows.paths.max():,} paths", 5.4, 4.2) as (figure, (left, right)):
        for j, (entry, line) in enumerate(zip(ENTRIES, summary.itertuples(), strict=True)):
            over = rows[rows.estimator == entry.name].groupby("steps").trace_shift
            mean, spread = over.mean(), 2 * over.std()
            look = {"color": COLOURS[j], "marker": MARKERS[j], "linestyle": LINES[j]}
            for ax, unit in ((left, 1.0),) if entry.exploring else ((left, 1.0), (right, mean.iloc[-1])):
                ax.loglog(mean.index, mean / unit, label=f"{entry.name}: $N^{{{line.exponent:.3f} \\pm {line.error:.3f}}}$", **look)
                ax.fill_between(mean.index, (mean - spread) / unit, (mean + spread) / unit, color=COLOURS[j], alpha=0.25, linewidth=0)
            left.plot(*zip(*entry.expected, strict=True), "o", mfc="none", mec="black", ms=9, mew=0.8,
                      label="expected (theory.md, section 7)" if j == len(ENTRIES) - 1 else None)
        left.set(ylabel="trace of the covariance (squared gradient units)", title=f"exponents fitted from N = {FITTED} on")
        right.set(ylabel=f"trace / its value at N = {rows.steps.max()}", title="how it settles (without action noise)", ylim=(0.8, 10))
        for ax in (left, right):
            ax.set_xlabel("steps N")
            log_ticks(ax, sorted(set(rows.steps)), [f"{n}" if n != 160 else "" for n in sorted(set(rows.steps))])
        right.set_yticks([0.8, 1, 1.5, 2, 3, 5, 10], ["0.8", "1", "1.5", "2", "3", "5", "10"])
        right.tick_params(axis="y", which="minor", left=False, labelleft=False)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
        return png(figure)


def main(study: Study) -> pd.DataFrame:
    """Compute what is missing, then write the rows, the table and the figure."""
    study = study.sized()
    out = writable(study.out)
    rows = pd.DataFrame(sweep(partial(compute, study.paths), study.jobs(), study.pool, out / "parts"))
    rows.to_csv(out / "rows.csv", index=False)
    summary = table(rows)
    (out / "table.txt").write_text(summary.to_string(index=False, float_format="%.4g") + "\n")
    write_json(out / "env.json", environment("joblib", "matplotlib"))
    (out / "variance.png").write_bytes(draw(rows, summary))
    print(summary.to_string(index=False, float_format="%.4g"))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Study))
