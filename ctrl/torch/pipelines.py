r"""Pipelines of diffusers as pre-trained models: a time of the schedule becomes their timestep, a context their prompt; nothing else is new.

    tau  ->  timestep K tau/T - 1,        guided output = out(empty) + w ( out(prompt) - out(empty) )

What their output means (noise, v, clean images) is a prediction of `ctrl.torch.policy`; sampling, log-densities, KL and estimators are those
already there, in the space where the model denoises: pixels, or the latents of an autoencoder, which only the reward and pictures decode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl import check
from ctrl.schedule import DiscreteVP
from ctrl.torch.policy import NetworkPolicy, Prediction, PredictsClean, PredictsNoise, PredictsVelocity, Times

PREDICTIONS: dict[str, Prediction] = {"epsilon": PredictsNoise(), "v_prediction": PredictsVelocity(), "sample": PredictsClean()}  # diffusers' words


@dataclass(frozen=True, eq=False)
class Prompts:
    """The context of paths: what is asked for, (n) texts, and how the model reads it, embeddings (n, l, e).

    Source: theory.md, section 1 (context).   Checked: tests/test_torch_pipelines.py::test_prompts_are_a_context
    """

    texts: tuple[str, ...]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> Prompts:
        return Prompts(self.texts[part], self.embeddings[part])

    def repeated(self, k: int) -> Prompts:
        """Each for k times in a row."""
        return Prompts(tuple(text for text in self.texts for _ in range(k)), self.embeddings.repeat_interleave(k, dim=0))

    def cycled(self, n: int) -> Prompts:
        """One for each of n paths, in turn."""
        at = [j % len(self) for j in range(n)]
        return Prompts(tuple(self.texts[j] for j in at), self.embeddings[at])


class DiffusersUNet(nn.Module):
    r"""A UNet2DModel or UNet2DConditionModel: (times, x (n, k, c, h, w), context) -> (n, k, c, h, w).

    core : the model      schedule : whose K timesteps it was trained on
    empty : (l, e), the embedding of the empty prompt, for models with prompts: the context where none is given
    guidance w : 1 for the model itself; else classifier-free guidance, as part of the action, at two calls a state
    context : Prompts, or embeddings (n, l, e), or None
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

    def forward(self, times: Times, x: Tensor, context: Prompts | Tensor | None = None) -> Tensor:
        n, k = x.shape[:2]
        # Timesteps end at -1, which is data: no state is there, and rounding of tau must not go below the first.
        timestep = (self.schedule.betas.size * times.tau / self.schedule.horizon - 1).clamp(min=0).repeat(n)
        states, prompt = x.flatten(0, 1), context.embeddings if isinstance(context, Prompts) else context
        if self.empty is None:
            if prompt is not None:
                raise ValueError("context: expected None for a model without prompts, got one")
            return self._called(states, timestep).reshape(x.shape)
        blank = self.empty.expand(n, *self.empty.shape)
        prompted = self._called(states, timestep, _each(blank if prompt is None else prompt, k))
        if prompt is None or self.guidance == 1:
            return prompted.reshape(x.shape)
        unprompted = self._called(states, timestep, _each(blank, k))
        return (unprompted + self.guidance * (prompted - unprompted)).reshape(x.shape)

    def _called(self, states: Tensor, timestep: Tensor, *prompt: Tensor) -> Tensor:
        out: Any = self.core(states, timestep, *prompt, return_dict=False)[0]
        return out[:, : states.shape[1]]  # models that also predict a variance have twice the channels


def _each(prompts: Tensor, k: int) -> Tensor:
    """A prompt per path, for k times each."""
    return prompts.repeat_interleave(k, dim=0)


class Decoded(nn.Module):
    """Images of latents, (n, c, h, w) -> (n, 3, H, W) in about [-1, 1], by a frozen autoencoder; the identity without one.

    Source: Rombach et al. (2112.10752).   Checked: tests/test_torch_pipelines.py::test_a_pipeline_is_read_as_it_is
    """

    def __init__(self, vae: nn.Module | None = None) -> None:
        super().__init__()
        self.vae: Any = None if vae is None else vae.eval().requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents
        scaled = latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        return self.vae.decode(scaled, return_dict=False)[0]


@dataclass(frozen=True, eq=False)
class Pretrained:
    """What fine-tuning takes from a pipeline: schedule, frozen policy, shape of a state, decoder, and prompts where it has some.

    Source: theory.md, section 1.   Checked: tests/test_torch_pipelines.py::test_a_pipeline_is_read_as_it_is
    """

    schedule: DiscreteVP
    base: NetworkPolicy
    shape: tuple[int, int, int]
    decode: Decoded
    prompts: Prompts | None

    @classmethod
    def load(cls, source: str, prompts: Sequence[str] = (), guidance: float = 1.0, autocast: torch.dtype | None = None,
             device: torch.device | str = "cpu") -> Pretrained:
        """From a folder (or hub id) of a DDPM, DDIM or Stable Diffusion pipeline: safetensors only, and no code from it is run."""
        from diffusers import DiffusionPipeline

        try:
            pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True, trust_remote_code=False, safety_checker=None)
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise ValueError(f"pipeline: expected a folder or an id of a diffusers pipeline with safetensors, got {source}: {error}") from None
        return cls.of(pipeline, prompts, guidance, autocast, device)

    @classmethod
    def of(cls, pipeline: Any, prompts: Sequence[str] = (), guidance: float = 1.0, autocast: torch.dtype | None = None,
           device: torch.device | str = "cpu") -> Pretrained:
        """From a pipeline at hand; its modules are used, frozen, not copied.

        Source: theory.md, section 1.   Checked: tests/test_torch_pipelines.py::test_a_pipeline_is_read_as_it_is
        """
        from diffusers import UNet2DConditionModel, UNet2DModel

        unet: Any = getattr(pipeline, "unet", None)
        prompted = isinstance(unet, UNet2DConditionModel)
        if not (isinstance(unet, UNet2DModel) or prompted):
            raise ValueError(f"pipeline: expected one with a UNet2DModel or a UNet2DConditionModel, got {type(pipeline).__name__}")
        if bool(prompts) != prompted:
            raise ValueError(f"prompts: expected {'some' if prompted else 'none'} for a {type(pipeline).__name__}, got {len(prompts)}")
        kind = pipeline.scheduler.config.prediction_type
        if kind not in PREDICTIONS:
            raise ValueError(f"pipeline: expected a scheduler that predicts one of {', '.join(PREDICTIONS)}, got {kind}")
        schedule, side = DiscreteVP.of(pipeline.scheduler), unet.config.sample_size
        empty, asked = (_read(pipeline, [""])[0], Prompts(tuple(prompts), _read(pipeline, prompts))) if prompted else (None, None)
        network = DiffusersUNet(unet, schedule, empty, guidance)
        sides = (side, side) if isinstance(side, int) else tuple(side)
        base = NetworkPolicy(network, PREDICTIONS[kind], autocast).to(device).frozen()
        decode = Decoded(getattr(pipeline, "vae", None)).to(device)
        held = None if asked is None else Prompts(asked.texts, asked.embeddings.to(device))
        return cls(schedule, base, (unet.config.in_channels, *sides), decode, held)


@torch.no_grad()
def _read(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Embeddings, (n, l, e): computed once, the text encoder is not needed again."""
    return pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)[0].detach().float()


@dataclass(frozen=True, eq=False)
class OfImages:
    """A reward of images as one of states: r(decode(x), texts); it has a gradient where the images' own has one.

    Source: theory.md, section 1.   Checked: tests/test_torch_pipelines.py::test_gradients_are_those_of_the_objective
    """

    reward: Callable[[Tensor, Any], Tensor]
    decode: Decoded

    def __call__(self, states: Tensor, context: Any = None) -> Tensor:
        return self.reward(self.decode(states), list(context.texts) if isinstance(context, Prompts) else context)


def prompts_of(source: tuple[str, ...], template: str = "{}") -> tuple[str, ...]:
    """The lines of a file, or prompts as they are; each put into the template.

    Source: theory.md, section 1 (context).   Checked: tests/test_torch_pipelines.py::test_prompts_are_a_context
    """
    lines: Sequence[str] = source
    if len(source) == 1 and Path(source[0]).is_file():
        lines = [line.strip() for line in Path(source[0]).read_text().splitlines() if line.strip()]
    if "{}" not in template:
        raise ValueError(f"prompt_template: expected a text with {{}}, got {template!r}")
    return tuple(template.replace("{}", line) for line in lines)


def save_tuned(network: Any, folder: Path) -> None:
    """What diffusers loads: unet/ of a pipeline, or, of an adapter, what `load_lora_weights` takes (and unet/ merged, for models without it).

    Source: Hu et al. (2106.09685).   Checked: tests/test_torch_pipelines.py::test_what_is_saved_is_loaded_by_diffusers
    """
    from peft import PeftModel

    if not isinstance(network, PeftModel):
        network.core.save_pretrained(folder / "unet")
        return
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import get_peft_model_state_dict

    core = network.get_base_model().core
    if isinstance(core, UNet2DConditionModel):
        prefix = "base_model.model.core."
        layers = {name.removeprefix(prefix): x for name, x in get_peft_model_state_dict(network).items()}
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    else:
        copy.deepcopy(network).merge_and_unload().core.save_pretrained(folder / "unet")
