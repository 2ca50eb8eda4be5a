"""`ctrl verify`: every theorem on every problem, one table, one JSON file, one figure per theorem, one page (theory.md, section 0)."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import sha256
from multiprocessing import current_process
from pathlib import Path
from typing import Any, TextIO

from ctrl import check, report, zoo
from ctrl.evidence import FALSE_ALARM, MISS
from ctrl.files import environment, user_object, versions, writable, write_json, write_text
from ctrl.laws import GaussianMixture
from ctrl.parallel import asleep, awake, side_by_side
from ctrl.problem import Problem
from ctrl.theorems.advantage import AdvantageRate
from ctrl.theorems.deterministic_sampler import DeterministicSampler
from ctrl.theorems.exploration import Exploration
from ctrl.theorems.gibbs_exploration import GibbsExploration
from ctrl.theorems.kl_estimators import KLEstimators
from ctrl.theorems.optimal_tilt import OptimalTilt
from ctrl.theorems.path_kl import PathKL
from ctrl.theorems.performance_difference import PerformanceDifference
from ctrl.theorems.policy_gradient import PolicyGradient
from ctrl.theorems.reversal import Reversal
from ctrl.theorems.step_size import StepSize
from ctrl.theorems.style import png
from ctrl.theorems.value import ValueMartingale
from ctrl.theorems.value_ansatz import ValueAnsatz
from ctrl.theorems.value_learning import ValueLearning
from ctrl.theorems.verdict import Case, Theorem, Verdict

# In the order of theory.md's sections.
THEOREMS: tuple[Theorem, ...] = (
    Reversal(), Exploration(), PathKL(), ValueMartingale(), ValueLearning(), AdvantageRate(), PolicyGradient(), PerformanceDifference(),
    OptimalTilt(), GibbsExploration(), DeterministicSampler(), StepSize(), ValueAnsatz(), KLEstimators())


@dataclass(frozen=True)
class Settings:
    """What a run of the theorems depends on; equal settings give equal verdicts.

    Source: design.md's contract.   Checked: tests/test_verify.py::test_resume_keeps_finished_parts
    """

    quick: bool = False
    only: tuple[str, ...] = ()
    problem: str | None = None
    out: Path = Path("verify")
    resume: bool = False
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check.integer("seed", self.seed, at_least=0)
        if self.seed >= 2**32:
            raise ValueError(f"seed: expected an integer below 2^32, got {self.seed}")
        if self.threads is not None:
            check.integer("threads", self.threads, at_least=1)

    def identity(self) -> dict[str, Any]:
        """What must agree before a run is resumed."""
        file = Path(self.problem.rpartition(":")[0]) if self.problem else None
        content = sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None
        return {"quick": self.quick, "problem": self.problem, "content": content, "seed": self.seed, "versions": versions()}


@dataclass
class Progress:
    """Rows, finished (theorem, problem) pairs and drawn figures of a run, on disk after every one and whenever it stops."""

    folder: Path
    identity: dict[str, Any]
    rows: list[Verdict] = field(default_factory=list)
    done: list[list[str]] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)

    def picture(self, theorem: str) -> Path:
        return self.folder / f"{theorem}.png"

    def write(self) -> None:
        lines = ",\n".join(row.line for row in self.rows)
        write_text(self.folder / "verdicts.json", f"[\n{lines}\n]\n")
        report.write_sensitivity(self.folder / "sensitivity.csv", self.rows)
        write_json(self.folder / "run.json", {**self.identity, "platform": platform.platform(), "done": self.done, "drawn": self.drawn})

    def read(self) -> None:
        """Take up the finished pairs and figures of an earlier run with the same settings."""
        path = self.folder / "run.json"
        if not path.exists():
            return
        try:
            earlier = dict(json.loads(path.read_text()))
            rows = json.loads((self.folder / "verdicts.json").read_text())
            keys = [(row["theorem"], row["problem"], row["reason"]) for row in rows]
            right_error = report.right_errors(self.folder / "sensitivity.csv")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume: expected a readable earlier run in {self.folder}, got {error}") from None
        differing = [key for key, value in self.identity.items() if earlier.get(key) != value]
        if differing:
            raise ValueError(f"resume: expected an earlier run with the same {', '.join(differing)}, got "
                             f"{', '.join(str(earlier.get(key)) for key in differing)} in {self.folder}")
        self.done = earlier["done"]
        self.drawn = [name for name in earlier.get("drawn", []) if self.picture(name).exists()]
        names = {f.name for f in fields(Verdict)}
        self.rows = [Verdict(**{k: v for k, v in row.items() if k in names}, right_error=right_error.get(key))
                     for row, key in zip(rows, keys, strict=True) if list(key[:2]) in self.done]


def verify(settings: Settings, theorems: Sequence[Theorem] = THEOREMS, stream: TextIO | None = None) -> list[Verdict]:
    """Run the theorems, print the table as it grows, write verdicts.json, the figures and index.html, and return all verdicts.

    Interrupted runs keep what they have; `resume` goes on from there.
    Source: theory.md, section 0.   Checked: tests/test_verify.py::test_verdicts_file
    """
    stream = stream or sys.stdout
    chosen = _chosen(settings, theorems)
    with awake(__name__, 1 if settings.resume else _workers(settings, 2 * len(chosen))):  # at least a check and a figure for every theorem
        cases = _cases(settings)
    progress = Progress(writable(settings.out), settings.identity())
    if settings.resume:
        progress.read()
    started = time.perf_counter()
    width = shutil.get_terminal_size((200, 24)).columns if stream.isatty() else 10**6
    print(report.header(), file=stream)
    for row in progress.rows:
        print(report.line(row, width), file=stream)
    try:
        _run(settings, chosen, cases, progress, stream, width)
    finally:
        progress.write()
    asleep()
    seconds = time.perf_counter() - started
    pictures = {name: progress.picture(name).read_bytes() for name in progress.drawn}
    write_text(settings.out / "index.html", report.page(progress.rows, theorems, pictures, _facts(settings, progress, seconds)))
    print(_summary(progress, seconds), file=stream)
    return progress.rows


def _run(settings: Settings, theorems: Sequence[Theorem], cases: Sequence[Case], progress: Progress, stream: TextIO, width: int) -> None:
    """All (theorem, case) pairs and figures, side by side; the table and the file keep the order of theorems and cases."""
    from tqdm import tqdm

    order = {(theorem.name, case.name): j for j, (theorem, case) in enumerate((theorem, case) for theorem in theorems for case in cases)}
    tasks: list[Task] = [(_checked, theorem, case) for theorem in theorems for case in cases if [theorem.name, case.name] not in progress.done]
    drawable = next((case for case in cases if case.linear), None)  # the first case that has a continuous limit
    if drawable is not None:
        tasks += [(_drawn, theorem, drawable) for theorem in theorems if theorem.name not in progress.drawn]
    with tqdm(total=len(tasks), disable=None, unit="part", leave=False, file=sys.stderr) as bar:
        for number, (name, case_name, part) in enumerate(_side_by_side(settings, tasks)):
            if number == 0:
                report.prepare(theorems)  # while other processes work
            if isinstance(part, bytes):
                if part:
                    progress.picture(name).write_bytes(part)
                    progress.drawn.append(name)
            else:
                for row in part:
                    progress.rows.append(row)
                    tqdm.write(report.line(row, width), file=stream)
                    stream.flush()
                progress.done.append([name, case_name])
                progress.rows.sort(key=lambda row: order.get((row.theorem, row.problem), -1))  # rows of other theorems, resumed, first
            progress.write()
            bar.update()
            bar.set_description(f"{name} on {case_name}")


Part = tuple[str, str, Iterable[Verdict] | bytes]
Task = tuple[Callable[[Theorem, Case], Part], Theorem, Case]


def _side_by_side(settings: Settings, tasks: Sequence[Task]) -> Iterator[Part]:
    """The results of tasks as they come: in this process with one thread, else in spawned processes of one thread each."""
    workers = _workers(settings, len(tasks))
    if workers <= 1:
        for function, theorem, case in tasks:
            yield function(theorem, case)
        return
    # Long tasks begun first do not leave one process working alone at the end.
    calls = ((function, theorem, settings if case.own else pickle.dumps(case))
             for function, theorem, case in sorted(tasks, key=_size, reverse=True))
    yield from side_by_side(_in_worker, calls, workers)


def _size(task: Task) -> tuple[int, int]:
    """What a task's time grows with: components of the data law, then dimensions; a figure is one simple case on many grids."""
    function, _, case = task
    data = case.problem.data
    return len(data.weights) if isinstance(data, GaussianMixture) else 1, case.problem.dim + (function is _drawn)


def _in_worker(function: Callable[[Theorem, Case], Part], theorem: Theorem, sent: Settings | bytes) -> Part:
    return function(theorem, _received(sent))


@lru_cache(maxsize=16)
def _received(sent: Settings | bytes) -> Case:
    """One case for all tasks of a process; a user's problem is read from its file again, as code from a file cannot be sent."""
    return pickle.loads(sent) if isinstance(sent, bytes) else _cases(sent)[0]


def _checked(theorem: Theorem, case: Case) -> Part:
    """The verdicts of one pair; a list, so that it can come from another process, or rows as they come in this one."""
    rows = _rows(theorem, case)
    return theorem.name, case.name, rows if current_process().name == "MainProcess" else list(rows)


def _drawn(theorem: Theorem, case: Case) -> Part:
    """The figure as a PNG, empty where a user's problem does not have what it shows."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        try:
            return theorem.name, case.name, png(theorem.figure(case))
        except (ValueError, ZeroDivisionError):
            if not case.own:
                raise
            return theorem.name, case.name, b""


def _rows(theorem: Theorem, case: Case) -> Iterator[Verdict]:
    """Timed verdicts on one BLAS thread (so that sums round alike); on a user's problem what does not apply is skipped, and why."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        try:
            yield from report.timed(theorem.checks(case))
        except ValueError as error:
            if not case.own or str(error).startswith(("reward", "action")):
                raise
            yield theorem.skipped(case, f"the rest does not apply: {error}")


def _workers(settings: Settings, tasks: int) -> int:
    return min(settings.threads or _cores(), tasks)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _facts(settings: Settings, progress: Progress, seconds: float) -> dict[str, str]:
    """What the page says of the run."""
    here = environment("matplotlib")
    commit = f"commit {here['commit'][:12]}{' with local changes' if here['dirty'] else ''}, " if here["commit"] else ""
    work = sum(row.seconds for row in progress.rows)
    return {
        "run": f"{'quick' if settings.quick else 'full'}, seed {settings.seed}, {settings.problem or 'all named problems'}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "time": f"{seconds:.0f} s on up to {settings.threads or _cores()} cores{' (resumed)' if settings.resume else ''}; {work:.0f} s of checks",
        "machine": f"{here['platform']}, {here['processor']}, {here['cores']} cores",
        "versions": commit + ", ".join(f"{name} {version}" for name, version in here["versions"].items())}


def _chosen(settings: Settings, theorems: Sequence[Theorem]) -> list[Theorem]:
    known = [theorem.name for theorem in theorems]
    unknown = [name for name in settings.only if name not in known]
    if unknown:
        raise ValueError(f"only: expected theorems among {', '.join(known)}, got {', '.join(unknown)}")
    return [theorem for theorem in theorems if not settings.only or theorem.name in settings.only]


def _cases(settings: Settings) -> list[Case]:
    if settings.problem is None:
        return [Case(make.__name__, make(), settings.quick, settings.seed) for make in zoo.PROBLEMS]
    name, problem = user_problem(settings.problem)
    return [Case(name, problem, settings.quick, settings.seed, own=True)]


def user_problem(reference: str) -> tuple[str, Problem]:
    """The Problem called NAME (or returned by the function NAME) in FILE.py, from "FILE.py:NAME".

    Source: design.md's contract.   Checked: tests/test_verify.py::test_user_problem
    """
    name, found = user_object("problem", reference)
    file = reference.rpartition(":")[0]
    try:
        problem = found() if callable(found) else found
    except (Exception, SystemExit) as error:
        raise ValueError(f"problem: expected {file} to run, got {type(error).__name__}: {error}") from error
    if not isinstance(problem, Problem):
        raise ValueError(f"problem: expected {name} in {Path(file).name} to be a ctrl.Problem (or to return one), got {type(problem).__name__}")
    return name, problem


def _summary(progress: Progress, seconds: float) -> str:
    """Counts, error rates, failures in full, and where everything was written."""
    rows, out = progress.rows, progress.folder
    judged = [row for row in rows if row.holds is not None]
    planted = [row for row in judged if row.check == "planted"]
    sampled = [row for row in judged if row.check == "monte_carlo"]
    failed = [row for row in judged if not row.holds]
    lines = ["", f"{len(judged) - len(failed)} of {len(judged)} verdicts hold; {len(rows) - len(judged)} skipped; "
             f"planted errors caught: {sum(bool(row.holds) for row in planted)} of {len(planted)}; {seconds:.1f} s",
             f"{len(sampled)} Monte Carlo checks at {FALSE_ALARM:g} each: a correct library fails this run with probability at most "
             f"{len(sampled) * FALSE_ALARM:.1g}; each sees the error it states with probability {1 - MISS:g}"]
    lines += [f"FAIL {row.theorem} on {row.problem} ({row.check}): {row.reason}" for row in failed]
    files = [out / "index.html", out / "verdicts.json", out / "sensitivity.csv", *(progress.picture(name) for name in progress.drawn)]
    lines.append(f"written: {', '.join(map(str, files))}")
    return "\n".join(lines)
