"""The command line: `ctrl verify`, `bench`, `audit`, `zoo`, `finetune`, `compare` (exit 0: all holds, 1: a verdict or a run fails, 2: bad usage)."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Annotated, Any

import tyro

import ctrl

DISTRIBUTION = "scores-as-actions"


@dataclass(frozen=True)
class Verify:
    """Check every theorem on every problem: exact twins, Monte Carlo twins, limits and planted errors."""

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Smaller samples and fewer step sizes."""
    only: tuple[str, ...] = ()
    """Theorems to run (default: all)."""
    problem: str | None = None
    """A problem of your own, FILE.py:NAME, in the place of the zoo."""
    out: Path = Path("verify")
    """Folder for index.html, verdicts.json, sensitivity.csv and one figure per theorem."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the verdicts already in the folder."""
    seed: int = 0
    """Seed of all noise."""
    threads: int | None = None
    """Cores to use, theorems side by side (default: all; the verdicts do not depend on it)."""

    def run(self) -> int:
        from ctrl.verify import Settings, verify

        rows = verify(Settings(self.quick, self.only, self.problem, self.out, self.resume, self.seed, self.threads))
        return 0 if all(row.holds is not False for row in rows) else 1


@dataclass(frozen=True)
class Bench:
    """Compare estimators of the gradient: bias, variance, speed and cost; a claim that is broken is exit code 1."""

    estimator: str | None = None
    """An estimator of your own, FILE.py:NAME: (problem, policy, grid, noise) -> Gradient."""
    problem: str = "gaussian_pull_2d"
    """A problem of the zoo, or your own, FILE.py:NAME."""
    steps: tuple[int, ...] = (5, 10, 20, 40)
    """Numbers of steps, for how the variance grows; the table is of the last."""
    paths: int = 10_000
    """Paths of every estimate."""
    batch: tuple[int, ...] = (4, 16, 64, 256)
    """Batches for the signal-to-noise ratio."""
    out: Path = Path("bench")
    """Folder for rows.csv and bench.png."""
    seed: int = 0
    """Seed of all noise."""

    def run(self) -> int:
        from ctrl.bench import Settings, bench

        rows = bench(Settings(self.estimator, self.problem, self.steps, self.paths, self.batch, self.out, self.seed))
        return 0 if all(row.holds for row in rows) else 1


@dataclass(frozen=True)
class Zoo:
    """List the named problems, with what is known of each."""

    def run(self) -> int:
        from ctrl import zoo

        for make in zoo.LISTED:
            summary = " ".join((make.__doc__ or "").split("\n")[0].split())
            print(f"{make.__name__}\n    {summary}\n    {_known(make())}")
        return 0


def _known(problem: ctrl.Problem, steps: int = 50) -> str:
    """One line: dimensions and weights, and the exact numbers of a chain of `steps` steps where there are any."""
    from ctrl import exact

    grid = problem.grid(steps)
    line = f"d = {problem.dim}, {type(problem.data).__name__}, lambda = {problem.kl_weight:g}, eta = {problem.eta:g}; "
    try:
        truth = exact.evaluate(problem, problem.pretrained(grid), grid)
    except ValueError:
        return line + "no exact truth: identities, and estimators against each other"
    line += f"truth by {truth.method}: pre-trained E r = {truth.expected_reward:.6f}"
    if truth.method in ("chain", "quadrature"):
        best = exact.optimum(problem, grid)
        line += f", optimum J* = {best.objective:.6f} at {best.path_kl:.4f} nats"
    return line + f" (N = {steps})"


@dataclass(frozen=True)
class Audit:
    """Check a sampler step of your own: its density, noise, ratio, KL, batches, last step and law."""

    step: tyro.conf.Positional[str]
    """FILE.py:NAME, a function (x, t, t_next, model, generator, x_next=None) -> (x_next, log_prob (n,)), or a diffusers scheduler.
    Beside it in the file: TIMES (N + 1 of them, from noise to data), schedule() -> alphas_cumprod at TIMES, or a tuple (alpha, sigma);
    and where needed kl(x, t, t_next, model, reference) -> (n,), PREDICTION = "epsilon", SHAPE = (3, 4, 4), ETA = 1 (of a scheduler)."""
    seed: int = 0
    """Seed of all noise."""
    out: Path | None = None
    """Folder for verdicts.json (default: the table alone)."""

    def run(self) -> int:
        from ctrl.audit import audit

        return 0 if all(row.holds is not False for row in audit(self.step, self.seed, self.out)) else 1


@dataclass(frozen=True)
class _Heavy:
    """A command whose settings live with torch, which the other commands do without."""

    module: str
    name: str

    def settings(self, arguments: Sequence[str], prog: str) -> Any:
        kind = getattr(import_module(self.module), self.name)
        return parsed(kind, arguments, prog, kind.__doc__)


def parsed(kind: Any, arguments: Sequence[str], prog: str, description: str | None) -> Any:
    """tyro's reading of the arguments; what it refuses, in a box of several lines, is a ValueError of one.

    Source: design.md's contract (command line).   Checked: tests/test_cli.py::test_refused_arguments_are_one_line
    """
    try:
        with redirect_stderr(io.StringIO()):
            return tyro.cli(kind, args=arguments, prog=prog, description=description)
    except SystemExit as stop:
        if stop.code == 0:
            raise
    raise ValueError(_refusal(kind, arguments, prog))


def _refusal(kind: Any, arguments: Sequence[str], prog: str) -> str:
    """What tyro says against the arguments, read again where it draws no colours and breaks no line: title, rule, words, rule, advice."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as box, suppress(SystemExit), _columns(10**6):
        tyro.cli(kind, args=arguments, prog=prog)
    parts = [" ".join(part.split()) for part in re.split(r"(?m)^ *-{3,} *$", box.getvalue())]
    said = re.sub(r"^Error parsing ([A-Z]\w*: )?", "", parts[min(1, len(parts) - 1)])
    choices = [part for part in parts if part.startswith("Available subcommands:")]
    return "; ".join([said, *choices]) if re.match(r"Unrecognized options: \w", said) else said


@contextmanager
def _columns(width: int) -> Iterator[None]:
    """A terminal of another width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a diffusion model of real images (ctrl finetune --help)."""


@dataclass(frozen=True)
class Compare:
    """Compare the methods in use from one pre-trained model (ctrl compare --help)."""


HEAVY = {"finetune": _Heavy("ctrl.torch.finetune", "Finetune"), "compare": _Heavy("ctrl.torch.compare", "Compare")}

Command = (
    Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Zoo, tyro.conf.subcommand("zoo")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Compare, tyro.conf.subcommand("compare")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad usage is one line on stderr and exit code 2, never a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"ctrl {ctrl.__version__}")
        return 0
    try:
        if given and given[0] in HEAVY:
            return HEAVY[given[0]].settings(given[1:], f"ctrl {given[0]}").run()
        command: Verify | Bench | Zoo | Audit | Finetune | Compare = parsed(Command, given, "ctrl", ctrl.__doc__)
        if "--only" in given and isinstance(command, Verify) and not command.only:
            raise ValueError("only: expected at least one theorem, got none")
        assert isinstance(command, (Verify, Bench, Zoo, Audit))  # the others were met above
        if arguments is None and isinstance(command, Verify):
            from ctrl.parallel import settle

            settle("ctrl.verify")  # here alone, where the process is ours and nothing of the user's is there yet
        return command.run()
    except ModuleNotFoundError as error:
        print(f"ctrl: error: {missing(error.name or '')}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"ctrl: error: {' '.join(str(error).split())}", file=sys.stderr)
    except RuntimeError as error:
        if type(error).__name__ != "TrainingStopped":
            raise
        print(f"ctrl: training stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ctrl: interrupted; what is finished is on disk, --resume goes on", file=sys.stderr)
        return 130
    return 2


def missing(module: str) -> str:
    """What to install for a module that is not there: the smallest extra that lists it, from this distribution's metadata."""
    package = module.split(".")[0].replace("_", "-").lower()
    try:
        wanted = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        wanted = []
    members: dict[str, list[str]] = {}
    for line in wanted:
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", line):
            members.setdefault(extra[1], []).append(re.split(r"[ <>=!~;\[(]", line, maxsplit=1)[0].lower())
    for extra_name, packages in sorted(members.items(), key=lambda item: len(item[1])):
        if package in packages:
            return f"{module} is missing; it comes with the extra {extra_name}: pip install '{DISTRIBUTION}[{extra_name}]'"
    return f"the module {module} is missing; pip install {module}"


def entry() -> None:
    sys.exit(main())
