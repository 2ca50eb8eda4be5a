r"""Denoisers of diffusers as networks of `ctrl.torch`: a time of the schedule becomes their timestep, a context their prompt; nothing else.

    tau  ->  timestep K tau/T - 1,        guided output = out(empty) + w ( out(prompt) - out(empty) )

What their output means (noise, v) is a prediction of `ctrl.torch.policy`; sampling, log-densities, KL and estimators are those already there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ctrl import check
from ctrl.schedule import DiscreteVP
from ctrl.torch.policy import Times


class DiffusersUNet(nn.Module):
    r"""A UNet2DModel or UNet2DConditionModel: (times, x (n, k, c, h, w), context) -> (n, k, c, h, w).

    core : the model      schedule : whose K timesteps it was trained on
    empty : (l, e), the embedding of the empty prompt, for models with prompts: the context where none is given
    guidance w : 1 for the model itself; else classifier-free guidance, as part of the action, at two calls a state
    context : (n, l, e) embeddings of prompts, or None
    Source: Ho and Salimans (2207.12598), equation 6.   Checked: tests/test_torch_pipelines.py::test_output_is_the_models
    """

    empty: Tensor | None

    def __init__(self, core: nn.Module, schedule: DiscreteVP, empty: Tensor | None = None, guidance: float = 1.0) -> None:
        super().__init__()
        check.instance("schedule", schedule, DiscreteVP, "a DiscreteVP")
        self.core, self.schedule, self.guidance = core, schedule, check.number("guidance", guidance)
        self.register_buffer("empty", empty, persistent=False)
        if empty is None and self.guidance != 1:
            raise ValueError(f"empty: expected the embedding of the empty prompt for guidance {self.guidance:g}, got None")

    def forward(self, times: Times, x: Tensor, context: Tensor | None = None) -> Tensor:
        n, k = x.shape[:2]
        # timesteps end at -1, which is data: no state is there, and rounding of tau must not go below the first
        timestep = (self.schedule.betas.size * times.tau / self.schedule.horizon - 1).clamp(min=0).repeat(n)
        states = x.flatten(0, 1)
        if self.empty is None:
            if context is not None:
                raise ValueError("context: expected None for a model without prompts, got one")
            return self._called(states, timestep).reshape(x.shape)
        blank = self.empty.expand(n, *self.empty.shape)
        prompted = self._called(states, timestep, _each(blank if context is None else context, k))
        if context is None or self.guidance == 1:
            return prompted.reshape(x.shape)
        unprompted = self._called(states, timestep, _each(blank, k))
        return (unprompted + self.guidance * (prompted - unprompted)).reshape(x.shape)

    def _called(self, states: Tensor, timestep: Tensor, *prompt: Tensor) -> Tensor:
        out: Any = self.core(states, timestep, *prompt, return_dict=False)[0]
        return out[:, : states.shape[1]]  # models that also predict a variance have twice the channels


def _each(prompts: Tensor, k: int) -> Tensor:
    """A prompt per path, for k times each."""
    return prompts.repeat_interleave(k, dim=0)
