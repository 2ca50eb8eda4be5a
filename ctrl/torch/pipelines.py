r"""Pipelines of diffusers as pre-trained models: a time of the schedule becomes their timestep, a context their prompt; nothing else is new.

    tau  ->  timestep K tau/T - 1 (flows: 1000 tau),        guided output = out(empty) + w ( out(prompt) - out(empty) )

What their output means (noise, v, clean images, the velocity of a flow) is a prediction of `ctrl.torch.policy`; sampling, log-densities, KL and
estimators are those already there, in the space where the model denoises: pixels, or latents, which only the reward and pictures decode.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl import check
from ctrl.schedule import DiscreteVP, FlowMatching, Schedule
from ctrl.torch.policy import NetworkPolicy, Prediction, PredictsClean, PredictsFlow, PredictsNoise, PredictsVelocity, Times

PREDICTIONS: dict[str, Prediction] = {"epsilon": PredictsNoise(), "v_prediction": PredictsVelocity(), "sample": PredictsClean()}  # diffusers' words


@dataclass(frozen=True, eq=False)
class Prompts:
    """The context of paths: what is asked for, (n) texts, and how the model reads it, one tensor or several: embeddings (n, l, e), pooled (n, p).

    numbers : which prompt each is, (n,), kept by parts and repetitions; none given: each is its own
    Source: theory.md, section 1 (context).   Checked: tests/test_torch_pipelines.py::test_prompts_are_a_context
    """

    texts: tuple[str, ...]
    read: tuple[Tensor, ...]
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(len(self.texts))))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> Prompts:
        return self._at(range(len(self))[part])

    def repeated(self, k: int) -> Prompts:
        """Each for k times in a row."""
        return self._at([j for j in range(len(self)) for _ in range(k)])

    def cycled(self, n: int, first: int = 0) -> Prompts:
        """One for each of the n paths from number `first` on, in turn."""
        return self._at([j % len(self) for j in range(first, first + n)])

    def _at(self, chosen: Sequence[int]) -> Prompts:
        rows = list(chosen)
        return Prompts(tuple(self.texts[j] for j in rows), tuple(x[rows] for x in self.read), tuple(self.numbers[j] for j in rows))

    def to(self, *where: Any) -> Prompts:
        """On another device, or in another precision."""
        return replace(self, read=tuple(x.to(*where) for x in self.read))


class DiffusersNetwork(nn.Module, ABC):
    r"""A denoiser of diffusers: (times, x (n, k, c, h, w), context) -> (n, k, c, h, w), the model's output at its own timesteps.

    core : the model
    empty : how the model reads the empty prompt, (l, e) and what more it takes, for models with prompts: the context where none is given
    guidance w : 1 for the model itself; else classifier-free guidance, as part of the action, at two calls a state
    context : Prompts, or embeddings (n, l, e), or None
    Source: Ho and Salimans (2207.12598), equation 6.   Checked: tests/test_torch_pipelines.py::test_prompts_and_guidance
    """

    def __init__(self, core: nn.Module, empty: Sequence[Tensor] = (), guidance: float = 1.0) -> None:
        super().__init__()
        self.core, self.guidance, self.reads = core, check.number("guidance", guidance), len(empty)
        for j, x in enumerate(empty):
            self.register_buffer(f"empty_{j}", x, persistent=False)
        if not empty and self.guidance != 1:
            raise ValueError(f"empty: expected the embedding of the empty prompt for guidance {self.guidance:g}, got none")

    @property
    def empty(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"empty_{j}") for j in range(self.reads))

    @abstractmethod
    def timesteps(self, times: Times) -> Tensor:
        """What the model calls these times, (k,)."""

    @abstractmethod
    def called(self, states: Tensor, timestep: Tensor, *prompt: Tensor) -> Tensor:
        """The model's output, (m, c, h, w)."""

    def forward(self, times: Times, x: Tensor, context: Prompts | Tensor | None = None) -> Tensor:
        n, k = x.shape[:2]
        timestep, states = self.timesteps(times).repeat(n), x.flatten(0, 1)
        prompt = context.read if isinstance(context, Prompts) else () if context is None else (context,)
        if prompt and not self.reads:
            raise ValueError("context: expected None for a model without prompts, got one")
        blank = [e.expand(n * k, *e.shape) for e in self.empty]
        if not prompt:
            return self.called(states, timestep, *blank).reshape(x.shape)
        prompted = self.called(states, timestep, *(p.repeat_interleave(k, dim=0) for p in prompt))
        if self.guidance == 1:
            return prompted.reshape(x.shape)
        unprompted = self.called(states, timestep, *blank)
        return (unprompted + self.guidance * (prompted - unprompted)).reshape(x.shape)


class DiffusersUNet(DiffusersNetwork):
    r"""A UNet2DModel or UNet2DConditionModel, at timestep K tau/T - 1 of the K that it was trained on.

    Source: Ho et al. (2006.11239); Rombach et al. (2112.10752).   Checked: tests/test_torch_pipelines.py::test_output_is_the_models
    """

    def __init__(self, core: nn.Module, schedule: DiscreteVP, empty: Sequence[Tensor] = (), guidance: float = 1.0) -> None:
        super().__init__(core, empty, guidance)
        check.instance("schedule", schedule, DiscreteVP, "a DiscreteVP")
        self.schedule = schedule

    def timesteps(self, times: Times) -> Tensor:
        # They end at -1, which is data: no state is there, and rounding of tau must not go below the first.
        return (self.schedule.betas.size * times.tau / self.schedule.horizon - 1).clamp(min=0)

    def called(self, states: Tensor, timestep: Tensor, *prompt: Tensor) -> Tensor:
        out: Any = self.core(states, timestep, *prompt, return_dict=False)[0]
        return out[:, : states.shape[1]]  # models that also predict a variance have twice the channels


class DiffusersFlow(DiffusersNetwork):
    r"""An SD3Transformer2DModel, which predicts the velocity of a flow at sigma = tau, on the scale of its training steps.

    Source: Esser et al. (2403.03206).   Checked: tests/test_torch_pipelines.py::test_a_flow_is_read_as_it_is
    """

    def __init__(self, core: nn.Module, empty: Sequence[Tensor], guidance: float = 1.0, trained_times: int = 1000) -> None:
        super().__init__(core, empty, guidance)
        self.trained_times = check.integer("trained_times", trained_times, at_least=1)

    def timesteps(self, times: Times) -> Tensor:
        return self.trained_times * times.tau

    def called(self, states: Tensor, timestep: Tensor, *prompt: Tensor) -> Tensor:
        embeddings, pooled = prompt
        return self.core(hidden_states=states, timestep=timestep, encoder_hidden_states=embeddings, pooled_projections=pooled, return_dict=False)[0]


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

    schedule: Schedule
    base: NetworkPolicy
    shape: tuple[int, int, int]
    decode: Decoded
    prompts: Prompts | None

    @classmethod
    def load(cls, source: str, prompts: Sequence[str] = (), guidance: float = 1.0, autocast: torch.dtype | None = None,
             device: torch.device | str = "cpu") -> Pretrained:
        """From a folder (or hub id) of a DDPM, DDIM, Stable Diffusion or Stable Diffusion 3 pipeline: safetensors only, no code of it is run."""
        from diffusers import DiffusionPipeline

        try:
            pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise ValueError(f"pipeline: expected a folder or an id of a diffusers pipeline with safetensors, got {source}: {error}") from None
        return cls.of(pipeline, prompts, guidance, autocast, device)

    @classmethod
    def of(cls, pipeline: Any, prompts: Sequence[str] = (), guidance: float = 1.0, autocast: torch.dtype | None = None,
           device: torch.device | str = "cpu") -> Pretrained:
        """From a pipeline at hand; its modules are used, frozen, not copied.

        Source: theory.md, section 1.   Checked: tests/test_torch_pipelines.py::test_a_pipeline_is_read_as_it_is
        """
        from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

        core: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if not isinstance(core, UNet2DModel | UNet2DConditionModel | SD3Transformer2DModel):
            raise ValueError("pipeline: expected one with a UNet2DModel, a UNet2DConditionModel or an SD3Transformer2DModel, "
                             f"got {type(pipeline).__name__}")
        wanted = not isinstance(core, UNet2DModel)
        if bool(prompts) != wanted:
            raise ValueError(f"prompts: expected {'some' if wanted else 'none'} for a {type(pipeline).__name__}, got {len(prompts)}")
        empty = [x[0] for x in _read(pipeline, [""])] if wanted else []
        asked = Prompts(tuple(prompts), _read(pipeline, prompts)).to(device) if wanted else None
        schedule: Schedule
        network: DiffusersNetwork
        prediction: Prediction
        if isinstance(core, SD3Transformer2DModel):
            schedule, prediction = FlowMatching(), PredictsFlow()
            network = DiffusersFlow(core, empty, guidance, pipeline.scheduler.config.num_train_timesteps)
        else:
            schedule, prediction = DiscreteVP.of(pipeline.scheduler), _prediction(pipeline.scheduler.config.prediction_type)
            network = DiffusersUNet(core, schedule, empty, guidance)
        side = core.config.sample_size
        shape = (core.config.in_channels, *((side, side) if isinstance(side, int) else side))
        base = NetworkPolicy(network, prediction, autocast).to(device).frozen()
        return cls(schedule, base, shape, Decoded(getattr(pipeline, "vae", None)).to(device), asked)


def _prediction(kind: str) -> Prediction:
    if kind not in PREDICTIONS:
        raise ValueError(f"pipeline: expected a scheduler that predicts one of {', '.join(PREDICTIONS)}, got {kind}")
    return PREDICTIONS[kind]


@torch.no_grad()
def _read(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Embeddings (n, l, e), for flows with pooled ones (n, p): computed once, the text encoders are not needed again."""
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if (encoder := getattr(pipeline, name, None)) is not None:
            encoder.eval()  # what is just made has dropout
    if hasattr(pipeline, "transformer"):
        embeddings, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)
        return embeddings.detach().float(), pooled.detach().float()
    return (pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)[0].detach().float(),)


@dataclass(frozen=True, eq=False)
class OfImages:
    """A reward of images as one of states: r(decode(x), texts); it has a gradient where the images' own has one.

    Source: theory.md, section 1.   Checked: tests/test_torch_pipelines.py::test_gradients_are_those_of_the_objective
    """

    reward: Callable[[Tensor, Any], Tensor]
    decode: Decoded

    @property
    def differentiable(self) -> bool:
        """Whether the images' own reward has a gradient, as far as it says."""
        return getattr(self.reward, "differentiable", True)

    def __call__(self, states: Tensor, context: Any = None) -> Tensor:
        return self.reward(self.decode(states), list(context.texts) if isinstance(context, Prompts) else context)


def prompts_of(source: tuple[str, ...], template: str = "{}") -> tuple[str, ...]:
    """The lines of a file, or prompts as they are; each put into the template.

    Source: theory.md, section 1 (context).   Checked: tests/test_torch_pipelines.py::test_prompts_are_a_context
    """
    lines: Sequence[str] = source
    if len(source) == 1 and (Path(source[0]).is_file() or source[0].lower().endswith(".txt")):
        try:
            lines = [line.strip() for line in Path(source[0]).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:  # nobody asks for images of "prompts.txt"
            raise ValueError(f"prompts: expected a file of text in UTF-8, one prompt a line, got {source[0]}: {error}") from None
        if not lines:
            raise ValueError(f"prompts: expected a file with a prompt a line, got {source[0]} without any")
    if "{}" not in template:
        raise ValueError(f"prompt_template: expected a text with {{}}, got {template!r}")
    return tuple(template.replace("{}", line) for line in lines)


def save_tuned(network: Any, folder: Path) -> None:
    """What diffusers loads: unet/ or transformer/ of a pipeline, or, of an adapter, what `load_lora_weights` takes (merged where nothing does).

    Source: Hu et al. (2106.09685).   Checked: tests/test_torch_pipelines.py::test_what_is_saved_is_loaded_by_diffusers
    """
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
    from peft import PeftModel, get_peft_model_state_dict

    whole = network.get_base_model() if isinstance(network, PeftModel) else network
    flow = isinstance(whole, DiffusersFlow)
    if not isinstance(network, PeftModel):
        whole.core.save_pretrained(folder / ("transformer" if flow else "unet"))
    elif flow or isinstance(whole.core, UNet2DConditionModel):
        layers = {name.removeprefix("base_model.model.core."): x for name, x in get_peft_model_state_dict(network).items()}
        if flow:
            StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        else:
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    else:
        copy.deepcopy(network).merge_and_unload().core.save_pretrained(folder / "unet")
