"""Sweeps: the same rows wherever they are computed, on spawned processes of one thread, kept when a job fails or the run is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial

import ctrl
import numba
import pytest
from analysis import estimator_variance as study
from analysis.sweep import Pool, sweep
from ctrl.kernels.threads import default_threads, one_thread
from ctrl.parallel import awake, side_by_side
from threadpoolctl import threadpool_info

JOBS = {f"{name}-N{steps}": (name, steps, 0) for steps in (12, 4) for name in ("ScoreFunction", "ValueGradient", "ActionNoise")}
COMPUTE = partial(study.compute, 3000)
FORK = """
import os, ctrl
ctrl.given_to_the_parent = True
if (child := os.fork()) == 0:
    os._exit(hasattr(ctrl, "given_to_the_parent"))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def rows():
    return list(sweep(COMPUTE, JOBS))


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with (distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as here,
          distributed.Client(here) as client):
        yield client


def where(_):
    """Who computes this row, on how many threads, and whether it has what its parent was given after its start."""
    time.sleep(0.02)
    return {"process": os.getpid(), "parent": os.getppid(), "thread": threading.get_ident(), "numba": numba.config.NUMBA_NUM_THREADS,
            "kernels": default_threads(), "blas": max(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"),
            "inherited": hasattr(ctrl, "given_to_the_parent")}


def square(folder, job):
    """A row that leaves a mark whenever it is computed; the job 13 fails, and 99 is a user's Ctrl-C, until all is well."""
    (folder / f"{job}-{os.urandom(4).hex()}").touch()
    well = (folder / "well").exists()
    if job == 13 and not well:
        raise ZeroDivisionError("unlucky")
    if job == 99 and not well:
        raise KeyboardInterrupt
    return {"job": job, "root": job**0.5, "square": job * job}


def computed(folder):
    return sorted(int(path.name.split("-")[0]) for path in folder.glob("*-*"))


def test_processes_are_spawned_and_have_one_thread(monkeypatch):
    """Of the parent, which has four; what a forked process inherits, these do not have (planted: a fork is seen)."""
    monkeypatch.setattr(ctrl, "given_to_the_parent", True, raising=False)
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "4")
    found = list(sweep(where, dict.fromkeys("abcdefgh"), Pool(2)))
    assert len({row["process"] for row in found} | {os.getpid()}) == 3 and {row["parent"] for row in found} == {os.getpid()}
    assert {(row["numba"], row["kernels"], row["blas"]) for row in found} == {(1, 1, 1)}
    assert not any(row["inherited"] for row in found)
    assert subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=True).stdout == "1\n"


def test_threads_leave_the_cores_to_their_neighbours(monkeypatch):
    """Kernels have one thread on a thread of a pool, and all where the caller waits; a limit does not outlive its block."""
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    found = list(sweep(where, dict.fromkeys("abcdefgh"), Pool(2, "threading")))
    assert {(row["process"], row["kernels"], row["blas"]) for row in found} == {(os.getpid(), 1, 1)}
    assert len({row["thread"] for row in found} | {threading.get_ident()}) == 3
    assert {(row["thread"], row["kernels"], row["blas"]) for row in sweep(where, {"a": 0})} == {(threading.get_ident(), 2, 1)}
    with one_thread():
        assert default_threads() == 1
    assert default_threads() == 2


@pytest.mark.parametrize("pool", [Pool(2), Pool(2, "threading")], ids=lambda pool: pool.backend)
def test_rows_do_not_depend_on_where_they_are_computed(pool, rows):
    """Bit for bit and in the order of the jobs; another seed is another row."""
    assert [(row["estimator"], row["steps"]) for row in rows] == [(name, steps) for name, steps, _ in JOBS.values()]
    assert list(sweep(COMPUTE, JOBS, pool)) == rows
    assert all(COMPUTE((*job[:2], 1))["trace_shift"] != row["trace_shift"] for job, row in zip(JOBS.values(), rows, strict=True))


@pytest.mark.parametrize("pool", [Pool(), Pool(2), Pool(2, "threading")], ids=lambda pool: f"{pool.backend} {pool.workers}")
def test_a_failing_job_is_named_and_loses_nothing(pool, tmp_path):
    """The others' rows come first and are on disk; then the error with where it came from; a second call computes that job alone."""
    jobs, parts, marks = {f"job{j}": j for j in (2, 13, 4, 5)}, tmp_path / "parts", tmp_path / "marks"
    marks.mkdir()
    got, rest = [], sweep(partial(square, marks), jobs, pool, parts)
    with pytest.raises(RuntimeError, match="^job job13: ZeroDivisionError: unlucky") as caught:
        for row in rest:
            got.append(row["job"])  # noqa: PERF401
    assert got == [2, 4, 5]
    assert 'raise ZeroDivisionError("unlucky")' in caught.value.__notes__[0]
    assert sorted(path.stem for path in parts.iterdir()) == ["job2", "job4", "job5"]
    (marks / "well").touch()
    again = list(sweep(partial(square, marks), jobs, pool, parts))
    assert [row["job"] for row in again] == [2, 13, 4, 5] and computed(marks) == [2, 4, 5, 13, 13]
    assert list(sweep(partial(square, marks), jobs)) == again  # from files or not, the same numbers


def test_an_interrupted_run_goes_on(tmp_path):
    """Ctrl-C keeps the rows before it; the second call computes what is missing, the third nothing."""
    jobs, parts, marks = {f"job{j}": j for j in (2, 3, 99, 5)}, tmp_path / "parts", tmp_path / "marks"
    marks.mkdir()
    with pytest.raises(KeyboardInterrupt):
        list(sweep(partial(square, marks), jobs, folder=parts))
    assert sorted(path.name for path in parts.iterdir()) == ["job2.json", "job3.json"]
    (marks / "well").touch()
    for pool in (Pool(2), Pool()):
        assert [row["job"] for row in sweep(partial(square, marks), jobs, pool, parts)] == [2, 3, 99, 5]
        assert computed(marks) == [2, 3, 5, 99, 99]


def test_rows_that_json_cannot_hold_are_refused():
    with pytest.raises(RuntimeError, match="job a: ValueError: Out of range float"):
        list(sweep(lambda job: {"x": float("nan")}, {"a": 0}))


def test_pools_are_checked():
    with pytest.raises(ValueError, match="workers: expected an integer >= 1, got 0"):
        Pool(0)
    with pytest.raises(ValueError, match="scheduler: expected the backend dask, got loky"):
        Pool(scheduler="tcp://127.0.0.1:8786")


def test_results_come_as_they_are_finished():
    """A slow call does not hold up a fast one, and a sweep that is left early leaves no worker behind it waiting."""
    slow, fast = list(side_by_side(pause, [(0.5,), (0.0,)], 2, "threading"))[::-1]
    assert (slow, fast) == (0.5, 0.0)
    with one_thread():
        first = sweep(partial(pause, name="seconds"), {"a": 0.0, "b": 0.0}, Pool(2, "threading"))
        assert next(first) == {"seconds": 0.0}
        first.close()


def test_processes_are_there_before_their_work():
    with awake("tabnanny", 2):
        assert "tabnanny" not in sys.modules
    assert any(list(side_by_side(imported, [("tabnanny",)] * 4, 2)))


def imported(module):
    time.sleep(0.05)
    return module in sys.modules


def pause(seconds, name=None):
    time.sleep(seconds)
    return seconds if name is None else {name: seconds}


def test_the_study_draws_what_it_computes(tmp_path, capsys):
    """In quick mode, resumed: rows are those of the files; action noise grows like N and the value gradient does not."""
    plan = study.Study(out=tmp_path, quick=True)
    rows = study.main(plan)
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len(stored) == len(rows) == 6 * 6 * 3
    assert study.main(plan).equals(rows) and {path: path.stat().st_mtime_ns for path in stored} == stored
    found = study.table(rows).set_index("estimator")
    assert 0.7 < found.exponent["ActionNoise"] < 1.1 and abs(found.exponent["ValueGradient"]) < 0.2
    assert (tmp_path / "variance.png").stat().st_size > 30_000 and "ActionNoise" in capsys.readouterr().out


def test_a_dask_cluster_gives_the_same_rows(cluster, rows):
    """Two worker processes, of which both compute on one thread, found by the client at hand and by their address."""
    assert list(sweep(COMPUTE, JOBS, Pool(backend="dask"))) == rows
    assert list(sweep(COMPUTE, JOBS, Pool(backend="dask", scheduler=cluster.scheduler.address))) == rows
    found = list(sweep(where, dict.fromkeys(map(str, range(40))), Pool(backend="dask")))
    assert len({row["process"] for row in found} | {os.getpid()}) == 3
    assert {(row["kernels"], row["blas"]) for row in found} == {(1, 1)}
