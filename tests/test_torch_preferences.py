"""Rewards that see prompts: those of transformers on tiny models made here, their gradients, and what is refused."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ctrl.torch import preferences
from ctrl.torch.preferences import Aesthetic, CLIPScore, LearnedImageReward, PickScore, prepared

torch.set_num_threads(1)
TEXTS = ["a red cat", "b"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP and a tokenizer of single characters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 4}, projection_dim=6)).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", model, tokenizer


def images(n=2, side=16, channels=3):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_scores_are_those_of_transformers(clip):
    """Its own logits for each image with its own prompt; prompts exchanged are another reward."""
    folder, model, tokenizer = clip
    x, tokens = images(), tokenizer(TEXTS, padding=True, return_tensors="pt")
    logits = model(pixel_values=prepared(x, 16), **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(PickScore(str(folder))(x, TEXTS), logits)
    torch.testing.assert_close(CLIPScore(str(folder))(x, TEXTS), logits / model.logit_scale.exp())
    assert (PickScore(str(folder))(x, TEXTS[::-1]) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(40, 56), (16, 16), (9, 12)])
def test_images_are_prepared_as_clip_does(shape):
    """Pillow's bicubic resize and middle, up to its rounding to bytes after either axis; where nothing overshoots, which it cuts in between."""
    pixels = np.random.default_rng(0).integers(64, 192, (*shape, 3), dtype=np.uint8)
    h, w = shape
    size = (round(w * 16 / min(shape)), round(h * 16 / min(shape)))
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / 255
    top, left = (size[1] - 16) // 2, (size[0] - 16) // 2
    expected = (resized[top : top + 16, left : left + 16] - preferences.MEAN) / preferences.STD
    found = prepared(torch.tensor(pixels.transpose(2, 0, 1)[None] / 127.5 - 1), 16)[0].numpy().transpose(1, 2, 0)
    assert np.abs(found - expected).max() < 1.5 / 255 / min(preferences.STD)
    grey = prepared(images(channels=1), 16) * torch.tensor(preferences.STD).reshape(1, 3, 1, 1) + torch.tensor(preferences.MEAN).reshape(1, 3, 1, 1)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


@pytest.fixture
def head(tmp_path):
    """Layers in the order of their numbers, 10 after 2."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"layers.2": (5, 6), "layers.10": (1, 5)}
    tensors = {f"{name}.{part}": torch.randn(shape if part == "weight" else shape[:1], generator=draw)
               for name, shape in shapes.items() for part in ("weight", "bias")}
    save_file(tensors, tmp_path / "head.safetensors")
    torch.save(tensors, tmp_path / "head.pth")
    return tmp_path / "head.safetensors", tensors


@torch.no_grad()
def test_aesthetic_head_is_its_layers(clip, head):
    folder, model, _ = clip
    file, layers = head
    seen = torch.nn.functional.normalize(model.visual_projection(model.vision_model(prepared(images(), 16)).pooler_output), dim=1)
    expected = (seen @ layers["layers.2.weight"].T + layers["layers.2.bias"]) @ layers["layers.10.weight"].T + layers["layers.10.bias"]
    for path in (file, file.with_suffix(".pth")):
        torch.testing.assert_close(Aesthetic(str(folder), path)(images(), TEXTS), expected[:, 0])


@pytest.mark.parametrize("kind", [CLIPScore, PickScore, Aesthetic])
def test_gradients_are_finite_differences(clip, head, kind):
    """Through the resize too (24 to 16 pixels); in single precision, as the models are."""
    reward = kind(str(clip[0]), *([head[0]] if kind is Aesthetic else []))
    x = (0.8 * images(side=24)).requires_grad_()
    gradient = torch.autograd.grad(reward(x, TEXTS).sum(), x)[0]
    step = 3e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (reward(x + step, TEXTS) - reward(x - step, TEXTS)).sum() / 6e-2
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_imagereward_is_asked_with_prompts(monkeypatch):
    """The package's own score, image by image; without it the message says what is missing."""
    asked = []

    def score(text, pictures):
        asked.append((text, np.asarray(pictures[0]).shape))
        return len(text)

    preferences._imagereward.cache_clear()
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ValueError, match="reward: expected the package image-reward to be installed"):
        LearnedImageReward()(images(), TEXTS)
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name, device: SimpleNamespace(score=score)))
    assert LearnedImageReward()(images(), TEXTS).tolist() == [9.0, 1.0]
    assert asked == [(text, (16, 16, 3)) for text in TEXTS]
    preferences._imagereward.cache_clear()


def test_refusals(clip, tmp_path):
    with pytest.raises(ValueError, match="context: expected 2 prompts for CLIPScore, got NoneType"):
        CLIPScore(str(clip[0]))(images())
    with pytest.raises(ValueError, match="model: expected a folder or an id of a CLIP with safetensors"):
        PickScore(str(tmp_path))(images(), TEXTS)

    class Planted:
        def __reduce__(self):
            return (print, ("code in a weights file",))

    torch.save({"0.weight": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(ValueError, match="head: expected a file of linear layers"):
        Aesthetic(str(clip[0]), tmp_path / "planted.pth")(images(), TEXTS)
