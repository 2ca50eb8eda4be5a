r"""Rewards that see the prompt, and learned tastes: CLIP and PickScore, the LAION aesthetic head, ImageReward; from weights that the user has.

    r(x, c) = s <e(x), e(c)>,      e(x), e(c) unit embeddings of image and prompt by one CLIP

A model is a folder or a hub id; it is loaded at the first call, frozen, safetensors only. Images are resized and normalised by torch, so that the
reward has a gradient; `transformers` is asked for only here.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl.torch.rewards import ImageReward

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the images that CLIP was trained on


@lru_cache(maxsize=2)
def _clip(model: str, device: str) -> tuple[Any, Any]:
    """The frozen CLIP and its tokenizer."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        network = CLIPModel.from_pretrained(model, use_safetensors=True)
        return network.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model: expected a folder or an id of a CLIP with safetensors and a tokenizer, got {model}: {error}") from None


def prepared(images: Tensor, side: int) -> Tensor:
    """Images in [-1, 1] as CLIP wants them: grey ones in three channels, the shorter side resized (bicubic), its middle, normalised.

    Source: Radford et al. (2103.00020).   Checked: tests/test_torch_preferences.py::test_images_are_prepared_as_clip_does
    """
    x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    h, w = x.shape[-2:]
    size = (round(h * side / min(h, w)), round(w * side / min(h, w)))
    x = nn.functional.interpolate((x + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    shape = (1, 3, 1, 1)
    return (x[..., top : top + side, left : left + side] - x.new_tensor(MEAN).reshape(shape)) / x.new_tensor(STD).reshape(shape)


@dataclass(frozen=True)
class _OfCLIP(ImageReward):
    """model : a folder or hub id of a CLIP."""

    model: str
    """Folder or hub id of a CLIP with safetensors."""
    differentiable = True

    def value(self, images: Tensor, context: Any) -> Tensor:
        network, tokenizer = _clip(self.model, str(images.device))
        x = network.vision_model(pixel_values=prepared(images, network.config.vision_config.image_size).to(network.dtype)).pooler_output
        seen = nn.functional.normalize(network.visual_projection(x), dim=1)
        return self.judged(seen, context, network, tokenizer).to(images.dtype)

    @abstractmethod
    def judged(self, seen: Tensor, context: Any, network: Any, tokenizer: Any) -> Tensor:
        """(n,) of unit embeddings of images (n, e)."""

    def asked(self, context: Any, n: int, network: Any, tokenizer: Any) -> Tensor:
        """Unit embeddings of the prompts, (n, e)."""
        if not isinstance(context, list) or len(context) != n or not all(isinstance(text, str) for text in context):
            raise ValueError(f"context: expected {n} prompts for {self.name}, got {type(context).__name__}")
        tokens = tokenizer(context, padding=True, truncation=True, max_length=network.config.text_config.max_position_embeddings,
                           return_tensors="pt").to(network.device)
        with torch.no_grad():
            read = network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            return nn.functional.normalize(network.text_projection(read), dim=1)


@dataclass(frozen=True)
class CLIPScore(_OfCLIP):
    """Cosine of the image's and the prompt's embeddings by a CLIP, from -1 to 1.

    Differentiable.   Source: Hessel et al. (2104.08718), without its scale and cut.
    Checked: tests/test_torch_preferences.py::test_scores_are_those_of_transformers
    """

    def judged(self, seen: Tensor, context: Any, network: Any, tokenizer: Any) -> Tensor:
        return (seen * self.asked(context, len(seen), network, tokenizer)).sum(1)


@dataclass(frozen=True)
class PickScore(_OfCLIP):
    """PickScore: the cosine times the model's own scale (about 100), a logit of being preferred.

    Differentiable.   Source: Kirstain et al. (2305.01569).   Checked: tests/test_torch_preferences.py::test_scores_are_those_of_transformers
    """

    def judged(self, seen: Tensor, context: Any, network: Any, tokenizer: Any) -> Tensor:
        return network.logit_scale.exp() * (seen * self.asked(context, len(seen), network, tokenizer)).sum(1)


@dataclass(frozen=True)
class Aesthetic(_OfCLIP):
    """The LAION aesthetic predictor: linear layers on the image's unit embedding; prompts do not matter.

    head : its weights, .safetensors, or a .pth that holds nothing but tensors      Differentiable.
    Source: Schuhmann (2022), improved-aesthetic-predictor.   Checked: tests/test_torch_preferences.py::test_aesthetic_head_is_its_layers
    """

    head: Path
    """File of the head's weights."""

    def judged(self, seen: Tensor, context: Any, network: Any, tokenizer: Any) -> Tensor:
        out = seen
        for weight, bias in _layers(self.head):
            out = nn.functional.linear(out, weight.to(out), bias.to(out))
        return out.squeeze(1)


@lru_cache(maxsize=2)
def _layers(head: Path) -> tuple[tuple[Tensor, Tensor], ...]:
    """Weights and biases of the layers in their order; no code in the file is run."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(head) if head.suffix == ".safetensors" else torch.load(head, map_location="cpu", weights_only=True)
        names = sorted((name for name in tensors if name.endswith(".weight")), key=lambda name: [int(n) for n in name.split(".") if n.isdigit()])
        return tuple((tensors[name], tensors[name.removesuffix("weight") + "bias"]) for name in names)
    except Exception as error:
        raise ValueError(f"head: expected a file of linear layers (.safetensors, or .pth of tensors alone), got {head}: {error}") from None


@dataclass(frozen=True)
class LearnedImageReward(ImageReward):
    """ImageReward, by its authors' package.

    model : its name or checkpoint, as `ImageReward.load` takes it.   Not differentiable.
    Source: Xu et al. (2304.05977).   Checked: tests/test_torch_preferences.py::test_imagereward_is_asked_with_prompts
    """

    model: str = "ImageReward-v1.0"
    """Name, or file of a checkpoint."""

    def value(self, images: Tensor, context: Any) -> Tensor:
        from PIL import Image

        from ctrl.torch.images import to_bytes

        if not isinstance(context, list) or len(context) != len(images):
            raise ValueError(f"context: expected {len(images)} prompts for {self.name}, got {type(context).__name__}")
        network = _imagereward(self.model, str(images.device))
        pictures = [Image.fromarray(pixels) for pixels in to_bytes(images).transpose(0, 2, 3, 1)]
        with torch.no_grad():
            return torch.tensor([float(network.score(text, [picture])) for text, picture in zip(context, pictures, strict=True)])


@lru_cache(maxsize=1)
def _imagereward(model: str, device: str) -> Any:
    try:
        import ImageReward
    except ImportError as error:
        raise ValueError(f"reward: expected the package image-reward to be installed for ImageReward ({error})") from None
    return ImageReward.load(model, device=device)
