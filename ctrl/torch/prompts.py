r"""Statistics of each prompt: a baseline that knows the prompt without the path at hand, and rewards and KL by prompt.

Prompts have different mean rewards. A leave-one-out mean of a whole batch is unbiased, but it leaves these differences in every advantage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctrl import check
from ctrl.torch.chain import Run


class PerPrompt(nn.Module):
    r"""A leave-one-out baseline for each prompt, which also knows the prompt's paths of earlier updates.

        b_i(j) = ( sum_{k != j, same prompt} R_i(k) + w m_i ) / ( c - 1 + w )

    R_i : what multiplies the score at step i, (n, N)      c : paths of the prompt in the joined batch      `Run.prompt` says whose they are
    m, w : running mean of the prompt's R, (P, N), and its weight in paths, (P,): of earlier updates alone, at most `memory` of them
    A path that knows nothing of its prompt (c = 1, w = 0) gets the mean of the batch's others. Given theta, b(j) is independent of path j:
    unbiased. DDPO also divides by the prompt's standard deviation, which weighs the gradient of each prompt by its inverse: biased, not done.
    Source: Black et al. (2305.13301), per-prompt statistics; theory.md, section 7.
    Checked: tests/test_torch_prompts.py::test_baseline_is_its_formula
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, prompts: int, steps: int, memory: int = 16) -> None:
        super().__init__()
        self.memory = check.integer("memory", memory, at_least=0)
        shape = check.integer("prompts", prompts, at_least=1), check.integer("steps", steps, at_least=1)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(shape[0]))

    def forward(self, run: Run, returns: Tensor) -> Tensor:
        """b, (n, N), a number."""
        everyone, asked = _joined(run, returns)
        same = (run.prompt[:, None] == asked).to(returns)
        others, w = same.sum(1, keepdim=True) - 1, self.weight.to(returns)[run.prompt, None]
        known = others + w
        own = (same @ everyone - returns + w * self.mean.to(returns)[run.prompt]) / known.clamp(min=1)
        if (known == 0).any() and len(everyone) < 2:
            raise ValueError("baseline: expected at least 2 paths for a leave-one-out baseline of prompts not met before, got 1")
        return torch.where(known > 0, own, (everyone.sum(0) - returns) / max(len(everyone) - 1, 1))

    def remember(self, run: Run, returns: Tensor) -> None:
        """Take in a batch, after its last step: earlier, it would be compared with itself."""
        everyone, asked = _joined(run, returns)
        of = (torch.arange(len(self.weight), device=asked.device)[:, None] == asked).to(self.mean)
        now, w = of.sum(1), self.weight
        met = (now > 0)[:, None]
        self.mean = torch.where(met, (w[:, None] * self.mean + of @ everyone.to(self.mean)) / (w + now).clamp(min=1)[:, None], self.mean)
        self.weight = (w + now).clamp(max=self.memory)


def with_prompt(run: Run, returns: Tensor) -> Tensor:
    """Returns and, in the last column, the number of each path's prompt, (n, N + 1): what couples a batch.

    Source: theory.md, section 7.   Checked: tests/test_torch_prompts.py::test_baseline_is_its_formula
    """
    return torch.cat([returns, run.prompt[:, None].to(returns)], 1)


def _joined(run: Run, returns: Tensor) -> tuple[Tensor, Tensor]:
    """Of all processes: returns (m, N), numbers of prompts (m,); in one message."""
    together = run.joined(with_prompt(run, returns))
    return together[:, :-1], together[:, -1].round().long()


def by_prompt(prompt: Tensor, **columns: Tensor) -> list[dict[str, Any]]:
    """For each prompt that was asked: its number, its paths, and mean and standard deviation (none of a single path) of columns (n,).

    Source: design.md, runs.   Checked: tests/test_torch_prompts.py::test_statistics_by_prompt
    """
    rows = []
    for number in prompt.unique().tolist():
        own = {name: x[prompt == number].double() for name, x in columns.items()}
        row: dict[str, Any] = {"prompt": number, "paths": int((prompt == number).sum())}
        for name, x in own.items():
            row |= {name: float(x.mean()), f"{name}_std": float(x.std()) if len(x) > 1 else None}
        rows.append(row)
    return rows
