"""Blocks of paths on threads.

Kernels release the interpreter's lock and write disjoint rows, so plain threads do. Numba's own parallel loops would double
the compilation time, and some of its threading layers must not be entered from two threads or after a fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

from numba import config

from ctrl.kernels.normals import LANES

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, and only in the calling thread, the default is one thread."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def default_threads() -> int:
    """Cores that this process may use, or NUMBA_NUM_THREADS if that is less; one inside `one_thread`."""
    return 1 if _alone.get() else max(1, min(config.NUMBA_NUM_THREADS, len(os.sched_getaffinity(0))))


def over_paths(run: Callable[[int, int], None], paths: int, threads: int | None = None) -> None:
    """run(begin, end) on whole blocks that together cover range(paths); one call when one thread is enough."""
    blocks = -(-paths // LANES)
    workers = min(default_threads() if threads is None else threads, blocks)
    if workers == 1:
        run(0, paths)
        return
    bounds = [min(paths, blocks * w // workers * LANES) for w in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(run, begin, end) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]:
            done.result()
