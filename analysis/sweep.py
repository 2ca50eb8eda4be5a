"""Sweeps: a function of many jobs, on one process, many, threads or a dask cluster, with the same rows in the same order.

    from analysis.sweep import Pool, sweep
    rows = list(sweep(compute, {"N20-seed0": (20, 0), "N20-seed1": (20, 1)}, Pool(workers=2), folder=Path("parts")))

A finished row is a JSON file of its job's name in the folder, so that a second call computes only what is missing: a name says all that
its row depends on. A job that fails does not stop the others; the error that names it comes when all others are done.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ctrl import check
from ctrl.files import writable, write_json
from ctrl.parallel import side_by_side

Job = TypeVar("Job")
Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Where the jobs of a sweep run."""

    workers: int = 1
    """Jobs at a time; with one, they run one after the other in this process, on all its threads."""
    backend: Literal["loky", "threading", "dask"] = "loky"
    """joblib's: spawned processes, threads of this process, or a dask cluster; one compute thread each."""
    scheduler: str | None = None
    """Address of a dask cluster; without it the client at hand, or else a local cluster of that many workers."""

    def __post_init__(self) -> None:
        check.integer("workers", self.workers, at_least=1)
        if self.scheduler is not None and self.backend != "dask":
            raise ValueError(f"scheduler: expected the backend dask, got {self.backend}")

    @contextmanager
    def open(self) -> Iterator[None]:
        """The cluster at hand, begun and ended here if need be."""
        if self.backend != "dask":
            yield
            return
        from distributed import Client, LocalCluster, get_client

        if self.scheduler is not None:
            with Client(self.scheduler):
                yield
            return
        try:
            get_client()
        except ValueError:
            with (LocalCluster(n_workers=self.workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, Client(cluster)):
                yield
        else:
            yield


@dataclass(frozen=True)
class Failure:
    """What a job says in the place of its row."""

    error: str
    trace: str


def sweep(function: Callable[[Job], Row], jobs: Mapping[str, Job], pool: Pool | None = None, folder: Path | None = None) -> Iterator[Row]:
    """function(job) for every job, in their order: flat rows of numbers and strings that JSON can hold.

    Checked: tests/test_sweep.py::test_rows_do_not_depend_on_where_they_are_computed
    """
    from tqdm import tqdm

    pool = pool or Pool()
    done = {} if folder is None else _finished(writable(folder), jobs)
    missing = [(function, name, job) for name, job in jobs.items() if name not in done]
    failures: dict[str, Failure] = {}
    with (tqdm(total=len(jobs), initial=len(done), disable=None, unit="row", leave=False, file=sys.stderr) as bar,
          pool.open() if missing else nullcontext(),
          closing(side_by_side(_outcome, missing, pool.workers, pool.backend)) as arriving):
        for expected in jobs:
            while expected not in done and expected not in failures:
                name, outcome = next(arriving)
                bar.update()
                if isinstance(outcome, Failure):
                    failures[name] = outcome
                    tqdm.write(f"{name}: {outcome.error}", file=sys.stderr)
                    continue
                if folder is not None:
                    write_json(folder / f"{name}.json", outcome)
                done[name] = outcome
            if expected in done:
                yield done.pop(expected)
    if failures:
        error = RuntimeError("; ".join(f"job {name}: {failure.error}" for name, failure in failures.items()))
        for name, failure in failures.items():
            error.add_note(f"job {name}\n{failure.trace}")
        raise error


def _finished(folder: Path, jobs: Mapping[str, Any]) -> dict[str, Row]:
    """The rows that are there."""
    return {name: json.loads(path.read_text()) for name in jobs if (path := folder / f"{name}.json").exists()}


def _outcome(function: Callable[[Job], Row], name: str, job: Job) -> tuple[str, Row | Failure]:
    try:
        row = function(job)
        json.dumps(row, allow_nan=False)  # what cannot be kept is this job's error
        return name, row
    except Exception as error:
        return name, Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
