"""Calls side by side, as their results come: on spawned processes, on threads or on a dask cluster, one thread each."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ctrl.kernels.threads import one_thread


def side_by_side(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], workers: int,
                 backend: str = "loky") -> Generator[Any, None, None]:
    """function(*a) for every a, in the order in which they finish.

    backend : of joblib. "loky": processes, spawned and never forked; "threading"; "dask": the cluster of the client at hand, all of it
    workers : processes or threads; with one, calls run one after the other in the caller's thread, when their results are asked for
    Away from the caller's thread, kernels run on one thread. BLAS does everywhere, so that sums round alike.
    Checked: tests/test_sweep.py::test_rows_do_not_depend_on_where_they_are_computed
    """
    from joblib import Parallel, delayed, parallel_config
    from threadpoolctl import threadpool_limits

    # Of the three only loky takes the limit, which is set before the libraries of a process are loaded.
    limit = {"inner_max_num_threads": 1} if backend == "loky" else {}
    call = delayed(_Guest(function, os.getpid(), threading.get_ident()))
    with threadpool_limits(1, user_api="blas"), parallel_config(backend=backend, **limit):
        yield from Parallel(n_jobs=workers, return_as="generator_unordered")(call(*a) for a in arguments)


@contextmanager
def awake(module: str, workers: int) -> Iterator[None]:
    """Processes for a later `side_by_side` of so many workers start and import a module, while this one does what it has to do first.

    Checked: tests/test_sweep.py::test_processes_are_there_before_their_work
    """
    def start() -> None:
        list(side_by_side(settle, [(module,)] * workers, workers))

    thread = threading.Thread(target=start, daemon=True)
    if workers > 1:
        thread.start()
    try:
        yield
    finally:
        if workers > 1:
            thread.join()


def settle(module: str) -> None:
    """Import a module for good: the search for garbage leaves what is there alone from now on, a tenth of a second each time and at the end.

    Not in a process of the user's: what is garbage there would never be collected, and files in it never be flushed.
    Checked: tests/test_cli.py::test_imports_are_settled_in_a_process_of_its_own
    """
    import_module(module)
    gc.collect()
    gc.freeze()


def asleep() -> None:
    """The processes of earlier calls end, while this one goes on; a later `side_by_side` starts others."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor(reuse=True).shutdown(wait=False)


@dataclass(frozen=True)
class _Guest:
    """A function that leaves the other cores to its neighbours, unless it runs where its caller waits for it."""

    function: Callable[..., Any]
    process: int
    thread: int

    def __call__(self, *arguments: Any) -> Any:
        if (os.getpid(), threading.get_ident()) == (self.process, self.thread):
            return self.function(*arguments)
        if os.getpid() != self.process:
            from threadpoolctl import threadpool_limits

            threadpool_limits(1)  # for good: the process is there to work beside others
        with one_thread():
            return self.function(*arguments)
