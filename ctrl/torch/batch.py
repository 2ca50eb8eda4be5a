r"""The paths of an update, some at a time: what a loss holds of them at once does not grow with their number.

    grad (1/n) sum_j loss_j  =  sum_parts grad (1/n) sum_{j in part} loss_j

Between the passes over a batch trajectories are stored, or kept as seeds: noise is a pure function of (seed, update, path), so that the same
paths are sampled again, bit for bit, from the same parameters. What has been found of them in numbers is kept: no reward is asked twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from ctrl import check
from ctrl.torch.chain import Run

T = TypeVar("T")


class Joined:
    """What couples the paths of a batch, known of all of them before the losses of any: `Run.joined` of each part."""

    def __init__(self) -> None:
        self.everyone: Tensor | None = None

    def __call__(self, own: Tensor) -> Tensor:
        if self.everyone is None or self.everyone.shape[1:] != own.shape[1:]:
            known = "nothing" if self.everyone is None else f"{tuple(self.everyone.shape)}"
            asked = f"(n, {', '.join(map(str, own.shape[1:]))})"
            raise ValueError(f"coupling: expected the numbers that the loss asks of the batch, {asked}, got {known}")
        return self.everyone


class Samples(Protocol):
    """The paths of a slice of the batch, always the same; with their rewards where these are known."""

    def __call__(self, some: slice, joined: Joined, reward: Tensor | None) -> Run: ...


class Batch:
    """n paths in parts of at most `size`; `stored`, or sampled again for every pass over them.

    Source: theory.md, section 7.   Checked: tests/test_torch_batch.py::test_parts_are_the_whole_batch
    """

    def __init__(self, sampled: Samples, paths: int, size: int, *, stored: bool = True) -> None:
        self.paths, size = check.integer("paths", paths, at_least=1), check.integer("size", size, at_least=1)
        self.sampled, self.stored, self.joined = sampled, stored, Joined()
        self.parts = [slice(a, min(a + size, paths)) for a in range(0, paths, size)]
        self.runs: dict[int, Run] = {}
        self.known: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return self.paths

    def everyone(self, numbers: Tensor) -> None:
        """The objective's coupling of all paths of all processes, from here on the answer of `Run.joined`."""
        self.joined.everyone = numbers

    def each(self, what: Callable[[Run], T]) -> list[T]:
        """`what` of every part in turn; a part is let go before the next one comes."""
        return [self._of(j, what) for j in range(len(self.parts))]

    def backward(self, losses: Tensor) -> Tensor:
        """Add the share of a part's losses, (k,), to the gradient of the batch's mean; the losses as numbers."""
        (losses.sum() / self.paths).backward()
        return losses.detach()

    def first(self, what: Callable[[Run], T]) -> T:
        """`what` of the first part, for what joins the whole batch by itself."""
        return self._of(0, what)

    def _of(self, j: int, what: Callable[[Run], T]) -> T:
        run = self.runs.pop(j) if j in self.runs else self._again(j)
        out = what(run)
        if self.stored:
            self.runs[j] = run.under(run.policy)  # without graphs
        else:
            self.known[j] = run.reward, run.numbers()
        return out

    def _again(self, j: int) -> Run:
        reward, numbers = self.known.get(j, (None, {}))
        return self.sampled(self.parts[j], self.joined, reward).knowing(numbers)
