r"""The race: exact regret J* - J(theta_k) of thirteen algorithms, against reward queries, network evaluations and seconds.

    python -m analysis.regret [--quick] [--workers 2] [--backend loky]

Six problems (the reference in 2-D, Gaussians in 8 and 32 dimensions, a mixture and real digits on the line, two wells in the plane), 10 seeds,
the same batches of paths for all. Every algorithm's one step size comes from the same search (`ctrl.learn.search`: a walk by factors of 2 from its
own default, exact J at the end of two held-out seeds, the race's own paths and updates); other settings are defaults. Exact J after every
update (`Course.every` says where less often). Policies: what is added to the score is affine in x with time functions alpha(tau), alpha(tau)^2,
as the optimal feedback is nearly; in 32-D its matrices are diagonal. J* is the mean-shift optimum of the chain (theory.md, section 9 (i)); regret is
split, J* - J = (J* - J_class) + (J_class - J), and "1 %" is of J_class - J(theta_0), the part that an algorithm can win.

`steps.csv` has the second question (section 12): the step size found at N = 10, tried times 1/4, 1 and 4 at N = 10, 100, 1000.
An algorithm keeps its step where the regret left at factor 1 stays within a factor of 3. Expected of all whose mean direction has a limit as N
grows and whose variance settles (section 7): q-learning, too, which acts through its own noise but on temporal differences; what fails does so at
N = 10, at the edge of stability. `tilt` in the table is the regret of the class's best fit to Doob's path law, where reward-weighted
regression ends, from batches of 2^14 paths: section 9 (ii), not (i).

Writes rows.jsonl, table.csv, steps.csv, table.txt, env.json and a figure per problem. Finished parts are kept in parts/: a second call
goes on there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import ctrl
import numpy as np
import pandas as pd
import tyro
from ctrl import exact, learn
from ctrl.check import Array
from ctrl.files import environment, writable, write_json
from ctrl.policy import Basis, FunctionBasis
from ctrl.theorems.style import COLOURS, LINES, panels, png

from analysis.sweep import Pool, sweep

ALGORITHMS: dict[str, learn.Algorithm] = {type(a).__name__: a for a in learn.ALL}
SHARE = 0.01
FACTORS = (0.25, 1.0, 4.0)


# ---- courses: a problem, a class of policies, a grid, a budget -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Diagonal(Basis):
    """K(t) = sum_b phi_b(t) diag(W_b), k(t) = sum_b phi_b(t) w_b; theta = (W, w), 2 b d of them."""

    whole: FunctionBasis

    def _full(self, theta: Array) -> Array:
        b, d = self.whole.count, self.whole.dim
        W = theta[: b * d].reshape(b, d)
        return np.concatenate([(W[:, :, None] * np.eye(d)).ravel(), theta[b * d :]])

    def apply(self, t: float, theta: Array) -> tuple[Array, Array]:
        return self.whole.apply(t, self._full(theta))

    def adjoint(self, t: float, K: Array, k: Array) -> Array:
        phi = self.whole.time_functions(t)
        parts = (phi[:, None] * np.diagonal(K, axis1=-2, axis2=-1)[..., None, :], phi[:, None] * k[..., None, :])
        return np.concatenate([part.reshape(*k.shape[:-1], -1) for part in parts], axis=-1)

    def vjp(self, t: float, x: Array, u: Array) -> Array:
        phi = self.whole.time_functions(t)
        return np.concatenate([(phi[:, None] * v[:, None, :]).reshape(len(x), -1) for v in (u * x, u)], axis=1)


def gaussian_32d() -> ctrl.Problem:
    """`gaussian_8d` in 32 dimensions."""
    i, sd = np.arange(32), np.linspace(0.5, 1.2, 32)
    return ctrl.Problem(
        schedule=ctrl.VP(beta_min=0.1, beta_max=10.0, horizon=1.0),
        data=ctrl.Gaussian(mean=np.cos(i), cov=np.outer(sd, sd) * 0.6 ** np.abs(i[:, None] - i)),
        reward=ctrl.QuadraticReward(matrix=np.diag(np.linspace(0.1, 0.8, 32)), center=np.sin(i)), kl_weight=0.5)


@dataclass(frozen=True)
class Course:
    """A problem and the budget of its race."""

    make: Callable[[], ctrl.Problem]
    steps: int = 20
    paths: int = 256
    updates: int = 80
    every: int = 1
    """Updates from one exact J to the next."""
    diagonal: bool = False
    """Diagonal matrices in the policy, squares alone in the value."""

    @property
    def name(self) -> str:
        return self.make.__name__

    def set(self, steps: int | None = None) -> tuple[ctrl.Problem, ctrl.BasisPolicy, ctrl.TimeGrid]:
        """Problem, the policy to start from (the pre-trained one), and a grid."""
        problem = self.make()
        whole = FunctionBasis(Alphas(problem.schedule), 2, problem.dim)
        basis: Basis = Diagonal(whole) if self.diagonal else whole
        d = problem.dim
        return problem, ctrl.BasisPolicy.of(problem, basis, np.zeros(4 * d if self.diagonal else 2 * (d * d + d))), problem.grid(steps or self.steps)

    def algorithm(self, name: str) -> learn.Algorithm:
        """At its defaults, with a value that fits the dimension."""
        algorithm = ALGORITHMS[name]
        if self.diagonal and hasattr(algorithm, "critic"):
            return replace(algorithm, critic=replace(algorithm.critic, features=learn.Quadratic(cross=False)))
        return algorithm


@dataclass(frozen=True)
class Alphas:
    """Time functions alpha(tau), alpha(tau)^2."""

    schedule: Any

    def __call__(self, t: float) -> Array:
        return self.schedule.alpha(self.schedule.tau(t)) ** np.array([1.0, 2.0])


COURSES: dict[str, Course] = {c.name: c for c in (
    Course(ctrl.zoo.gaussian_pull_2d), Course(ctrl.zoo.gaussian_8d), Course(gaussian_32d, updates=60, diagonal=True),
    Course(ctrl.zoo.mixture_bump_1d, every=2), Course(ctrl.zoo.digits_line, every=2), Course(ctrl.zoo.double_well_2d, steps=10, every=8))}


@lru_cache(maxsize=8)
def yardstick(name: str, steps: int) -> learn.Yardstick:
    """J* and the best of the class."""
    return learn.Yardstick.of(*COURSES[name].set(steps))


# ---- jobs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One algorithm on one course: its search, or one seed of its race at a step size and a number of steps."""

    course: str
    algorithm: str
    paths: int
    updates: int
    steps: int
    step: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Says all that the row depends on."""
        run = f"-step{self.step:.6g}-seed{self.seed}" if self.step else ""
        return f"{self.course}-{self.algorithm}-N{self.steps}-n{self.paths}-k{self.updates}{run}"


def found(job: Job) -> dict[str, Any]:
    """The step size of one algorithm on one course, and how many were tried."""
    course = COURSES[job.course]
    result = learn.search(course.algorithm(job.algorithm), *course.set(job.steps), paths=job.paths, updates=job.updates)
    return {"course": job.course, "algorithm": job.algorithm, "step": result.algorithm.step, "tried": len(result.scores)}


def raced(job: Job) -> dict[str, Any]:
    """One seed: regret, queries, evaluations and seconds at every judgement; what diverged is null."""
    course = COURSES[job.course]
    algorithm = course.algorithm(job.algorithm).with_step(job.step)
    run = learn.train(algorithm, *course.set(job.steps), seed=job.seed, paths=job.paths, updates=job.updates, every=course.every)
    yard = yardstick(job.course, job.steps)
    reached = run.reached(yard.best - SHARE * float(yard.within(run.objective[0])))
    within = [float(r) if np.isfinite(r) else None for r in yard.within(run.objective)]
    return {"course": job.course, "algorithm": job.algorithm, "N": job.steps, "step": job.step, "seed": job.seed, "of_class": yard.of_class,
            "within": within, "queries": run.queries.tolist(), "evaluations": run.evaluations.tolist(),
            "seconds": run.seconds.tolist(), "reached": reached}


def tilted(name: str) -> dict[str, Any]:
    """Regret within the class of its best fit to Doob's path law: reward-weighted regression with many paths, from the best of the class."""
    problem, policy, grid = COURSES[name].set()
    state = learn.RewardWeighted(step=0.5).start(problem, learn.best_in_class(problem, policy, grid).policy, grid)
    fits = []
    for k in range(16):
        state = learn.RewardWeighted(step=0.5).update(state, learn.noise_of(2**41, k, 2**14))
        fits.append(state.policy.theta)
    J = exact.evaluate(problem, policy.with_theta(np.mean(fits[8:], axis=0)), grid).objective
    return {"course": name, "tilt": float(yardstick(name, grid.steps).within(J))}


# ---- the study -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Thirteen algorithms, six problems, ten seeds."""

    out: Path = Path("analysis/regret")
    """Where rows, tables and figure go."""
    courses: tuple[str, ...] = tuple(COURSES)
    """Which problems."""
    seeds: int = 10
    """Seeds of every race."""
    grids: tuple[int, ...] = (10, 100, 1000)
    """Numbers of steps on which the step size of the first is tried again, on the first problem."""
    pool: Annotated[Pool, tyro.conf.arg(name="")] = field(default_factory=Pool)
    """Where the jobs run."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """One problem, few seeds, updates and grids, only to show that everything works."""

    def sized(self) -> Study:
        return replace(self, courses=self.courses[:1], seeds=3, grids=(10, 40)) if self.quick else self

    def updates(self, course: Course) -> int:
        return 24 if self.quick else course.updates

    def races(self, parts: Path) -> pd.DataFrame:
        """Step sizes, then all seeds at them."""
        courses = [COURSES[name] for name in self.courses]
        searches = [Job(c.name, a, c.paths, self.updates(c), c.steps) for c in courses for a in ALGORITHMS]
        steps = list(sweep(found, {job.name: job for job in searches}, self.pool, parts / "steps"))
        jobs = [replace(job, step=row["step"], seed=seed) for job, row in zip(searches, steps, strict=True) for seed in range(self.seeds)]
        return pd.DataFrame(sweep(raced, {job.name: job for job in jobs}, self.pool, parts / "races"))

    def transfers(self, parts: Path) -> pd.DataFrame:
        """The step size of the first grid on all of them, and its neighbours."""
        c, updates = COURSES[self.courses[0]], 12 if self.quick else 20
        searches = [Job(c.name, a, c.paths, updates, self.grids[0]) for a in ALGORITHMS]
        steps = list(sweep(found, {job.name: job for job in searches}, self.pool, parts / "steps"))
        jobs = [replace(job, steps=n, step=factor * row["step"]) for job, row in zip(searches, steps, strict=True)
                for n in self.grids for factor in FACTORS]
        rows = pd.DataFrame(sweep(raced, {job.name: job for job in jobs}, self.pool, parts / "races"))
        rows["factor"] = [factor for _ in searches for _ in self.grids for factor in FACTORS]
        rows["share"] = [shares(w)[-1] for w in rows.within]
        return rows[["algorithm", "N", "factor", "step", "share"]]


def shares(within: list[float | None]) -> Array:
    """Regret within the class relative to the start's; inf where it diverged."""
    w = np.array([np.inf if r is None else r for r in within], dtype=np.float64)
    return w / w[0]


def transferred(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per algorithm: at every N the best factor, and the share of regret that is left at factor 1; does it keep its step?"""
    lines = []
    for name in ALGORITHMS:
        mine = rows[rows.algorithm == name]
        line: dict[str, Any] = {"algorithm": name, "step": float(mine[mine.factor == 1].step.iloc[0])}
        for n in dict.fromkeys(mine.N):
            at = mine[n == mine.N]
            line |= {f"best factor N={n}": float(at.factor.iloc[int(np.argmin(at.share))]), f"left N={n}": float(at[at.factor == 1].share.iloc[0])}
        left = [line[key] for key in line if key.startswith("left")]
        lines.append(line | {"keeps": max(left) < 3 * min(left) + SHARE})
    return pd.DataFrame(lines)


def table(rows: pd.DataFrame, tilt: dict[str, float]) -> pd.DataFrame:
    """A line per course and algorithm: step, regret at the end, and what 1 % of the first regret costs (median over seeds; inf: not reached)."""
    lines = []
    for (course, name), mine in rows.groupby(["course", "algorithm"], sort=False):
        ends, first = np.array([shares(w)[-1] for w in mine.within]), mine.within.iloc[0][0]
        low, high = 100 * np.quantile(ends, (0.1, 0.9), method="nearest")  # one of the seeds': some may be infinite

        def cost(what: str, mine: pd.DataFrame = mine) -> float:
            return float(np.median([np.inf if k is None or k != k else c[int(k)] for k, c in zip(mine.reached, mine[what], strict=True)]))

        lines.append({"course": course, "algorithm": name, "step": mine.step.iloc[0], "J* - J_class": mine.of_class.iloc[0], "J_class - J_0": first,
                      "left (%)": 100 * np.median(ends), "low": low, "high": high, "lost seeds": int(np.sum(ends > 1)),
                      "tilt (%)": 100 * tilt[course] / first, "queries to 1 %": cost("queries"), "evaluations to 1 %": cost("evaluations"),
                      "seconds to 1 %": cost("seconds")})
    return pd.DataFrame(lines)


def draw(rows: pd.DataFrame, course: str) -> bytes:
    """Regret within the class over queries, network passes and seconds; median and 10-90 % of seeds."""
    mine = rows[rows.course == course]
    title = f"{course}: regret within the class, median and 10–90 % of {mine.seed.nunique()} seeds"
    with panels(3, title, 4.8, 4.2) as (figure, axes):
        for ax, (what, label) in zip(axes, (("queries", "reward queries"), ("evaluations", "network passes"), ("seconds", "seconds")), strict=True):
            for j, name in enumerate(ALGORITHMS):
                runs = mine[mine.algorithm == name]
                x = np.median(np.array(list(runs[what]), dtype=np.float64), axis=0)[1:]
                left = np.array([shares(w) for w in runs.within])[:, 1:]
                low, middle, high = np.quantile(np.clip(left, 1e-5, 1e3), (0.1, 0.5, 0.9), axis=0, method="nearest")
                ax.loglog(x, middle, color=COLOURS[j % len(COLOURS)], linestyle=LINES[j // len(COLOURS)], label=name)
                ax.fill_between(x, low, high, color=COLOURS[j % len(COLOURS)], alpha=0.12, linewidth=0)
            ax.axhline(SHARE, color="black", linewidth=0.8)
            ax.set(xlabel=label, ylim=(1e-4, 2))
        axes[0].set_ylabel("(J_class − J) / (J_class − J at the start)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        return png(figure)


def main(study: Study) -> pd.DataFrame:
    """Compute what is missing, then write rows, tables and the figure."""
    study = study.sized()
    out = writable(study.out)
    rows = study.races(out / "parts")
    tilt = {row["course"]: row["tilt"] for row in sweep(tilted, {name: name for name in study.courses}, study.pool, out / "parts" / "tilt")}
    steps = study.transfers(out / "parts")
    rows.to_json(out / "rows.jsonl", orient="records", lines=True)
    summary, kept = table(rows, tilt), transferred(steps)
    summary.to_csv(out / "table.csv", index=False)
    kept.to_csv(out / "steps.csv", index=False)
    text = "\n\n".join(frame.to_string(index=False, float_format="%.4g") for frame in (summary, kept))
    (out / "table.txt").write_text(text + "\n")
    write_json(out / "env.json", environment("joblib", "matplotlib"))
    for course in study.courses:
        (out / f"{course}.png").write_bytes(draw(rows, course))
    print(text)
    return rows


if __name__ == "__main__":
    from analysis import regret as named  # where other processes find what is cached here, which they cannot be sent

    named.main(tyro.cli(named.Study))
