"""A reward in processes of its own: batches are split over them, answers come back in order, and none of them outlives the run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl import check
from ctrl.check import Array
from ctrl.torch.chain import rows
from ctrl.torch.rewards import ImageReward


@dataclass(eq=False)
class Pooled(ImageReward):
    r"""A reward without gradient, asked in `workers` spawned processes with one thread each: r(x_1 ... x_n) in parts, in order.

    reward : named in messages; it need not be picklable      make : () -> the same, picklable and hashable, called in each worker
    The bits are those of no pool where the reward judges image by image; images and context travel, so that a context must be picklable.
    Workers start at the first call and end with `close`, an error, an interrupt, or the death of this process, however sudden. Where one dies,
    those that remain are replaced and asked what was not answered; after `attempts` times OSError.
    Source: design.md, runs.   Checked: tests/test_torch_workers.py::test_same_bits_in_order
    """

    reward: ImageReward
    make: Callable[[], ImageReward]
    workers: int
    attempts: int = 3
    _pool: _Pool | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check.integer("workers", self.workers, at_least=1)
        check.integer("attempts", self.attempts, at_least=1)

    @property
    def name(self) -> str:
        return self.reward.name

    def value(self, images: Tensor, context: Any) -> Array:
        pixels = images.cpu().numpy()
        edges = np.linspace(0, len(pixels), min(self.workers, max(len(pixels), 1)) + 1).astype(int)
        parts = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        answers: dict[int, Array] = {}
        for _ in range(self.attempts):
            try:
                answers |= self._asked({k: (pixels[part], rows(context, part)) for k, part in enumerate(parts) if k not in answers})
            except BaseException:  # an error of the reward's own, an interrupt: nobody waits for the other answers
                self.close()
                raise
            if len(answers) == len(parts):
                return np.concatenate([answers[k] for k in range(len(parts))])
            self.close()
        raise ChildProcessError(f"reward: a process of {self.name} died, {self.attempts} of {self.attempts} times")

    def _asked(self, questions: dict[int, tuple[Array, Any]]) -> dict[int, Array]:
        """Answers to all, or those that were there when a process died."""
        if self._pool is None:
            self._pool = _Pool.of(self.workers)
        answers: dict[int, Array] = {}
        with suppress(BrokenProcessPool):
            futures = {k: self._pool.executor.submit(_answer, self.make, *question) for k, question in questions.items()}
            for k, future in futures.items():
                with suppress(BrokenProcessPool):
                    answers[k] = future.result()
        return answers

    def close(self) -> None:
        """End the workers at once, whatever they are doing; another call starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


@dataclass(frozen=True)
class _Pool:
    """Processes that live as long as the other end of their pipe is held: by this process, until it lets go or dies."""

    executor: ProcessPoolExecutor
    held: Connection

    @classmethod
    def of(cls, workers: int) -> _Pool:
        spawn = get_context("spawn")
        watched, held = spawn.Pipe(duplex=False)
        return cls(ProcessPoolExecutor(workers, spawn, _begin, (watched,)), held)

    def close(self) -> None:
        self.held.close()
        self.executor.shutdown(wait=False, cancel_futures=True)


def _begin(watched: Connection) -> None:
    """In a worker: one thread, deaf to the interrupt that its parent also gets, and gone when the parent is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: Connection) -> None:
    try:
        watched.recv()
    except (EOFError, OSError):
        os._exit(1)


@lru_cache(maxsize=1)
def _made(make: Callable[[], ImageReward]) -> ImageReward:
    """Once in a process."""
    return make()


def _answer(make: Callable[[], ImageReward], pixels: Array, context: Any) -> Array:
    """In a worker: the rewards of its part, of the shape that is expected; whether they are finite is seen where they are put together."""
    reward, images = _made(make), torch.from_numpy(pixels)
    with torch.no_grad():
        return reward.numbers(reward.value(images, context), images).numpy()
