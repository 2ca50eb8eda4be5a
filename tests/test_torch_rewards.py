"""Image rewards: gradients against finite differences and closed forms, JPEG sizes, users' functions, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from ctrl.torch import rewards
from ctrl.torch.images import digits, from_bytes
from ctrl.torch.rewards import (
    SMOOTHING,
    Brightness,
    CallableImageReward,
    ClassLogProbability,
    Compressibility,
    Contrast,
    ImageReward,
    Incompressibility,
    jpeg_kilobytes,
)


def images(n=3, c=2, h=3, w=4, seed=0):
    return 0.6 * torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(classes=5, c=2, h=3, w=4):
    """A small smooth classifier in float64, with a layer that training mode would change."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Dropout(0.5),
                             nn.Linear(4 * h * w, classes)).double()


def autograd(reward, x, context=None):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(reward(x, context).sum(), x)[0]


def differences(reward, x, context=None, step=1e-5):
    """Central differences in every pixel; rewards act image by image, so one pixel of all images moves at once."""
    out = torch.zeros_like(x)
    for j in range(x[0].numel()):
        move = torch.zeros_like(x).flatten(1)
        move[:, j] = step
        move = move.view_as(x)
        with torch.no_grad():
            out.flatten(1)[:, j] = (reward(x + move, context) - reward(x - move, context)) / (2 * step)
    return out


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx, g):
        return g[:, None, None, None] * ctx.saved_tensors[0]      # the factor 2 is missing


CASES = {
    "label": (ClassLogProbability(network(), 3), None),
    "context": (ClassLogProbability(network()), torch.tensor([4, 0, 2])),
    "brightness": (Brightness(), None),
    "contrast": (Contrast(), None),
    "callable": (CallableImageReward(lambda x, context: (x[:, 0] ** 3).mean((1, 2)) * context, True), torch.tensor([1.0, -2.0, 0.5]))}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name):
    """Every reward that claims a gradient; central differences at step 1e-5 are good to about 1e-9 here."""
    reward, context = CASES[name]
    x = images()
    assert reward.differentiable and reward(x, context).dtype == torch.float64
    torch.testing.assert_close(autograd(reward, x, context), differences(reward, x, context), rtol=1e-6, atol=1e-9)


def test_a_planted_gradient_is_seen():
    reward = CallableImageReward(lambda x: WrongGradient.apply(x), True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(autograd(reward, images()), differences(reward, images()), rtol=1e-6, atol=1e-9)


def test_closed_form_gradients():
    """The docstrings' formulas; planted: all channels about one mean, e left out, the derivative by y in the place of x."""
    x = images()
    d = x[0].numel()
    torch.testing.assert_close(autograd(Brightness(), x), torch.full_like(x, 0.5 / d), rtol=1e-13, atol=0)
    y = (x + 1) / 2
    away = y - y.mean((2, 3), keepdim=True)
    v = away.square().mean((1, 2, 3), keepdim=True)
    found, expected = autograd(Contrast(), x), away / (2 * d * (v + SMOOTHING**2).sqrt())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(Contrast()(x), (v.flatten() + SMOOTHING**2).sqrt() - SMOOTHING, rtol=1e-13, atol=0)
    for wrong in ((y - y.mean((1, 2, 3), keepdim=True)) / (2 * d * (v + SMOOTHING**2).sqrt()), away / (2 * d * v.sqrt()), 2 * expected):
        assert not torch.allclose(found, wrong, rtol=1e-7, atol=0)


def test_brightness_and_contrast_of_plain_images():
    black, white = -torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    red = torch.cat([white[:, :1], black[:, :2]], 1)
    board = 1.0 - 2 * (torch.arange(16).view(1, 1, 4, 4) % 2)
    assert Brightness()(torch.cat([black, white, red])).tolist() == pytest.approx([0, 1, 1 / 3])
    assert Contrast()(torch.cat([black, white, red])).tolist() == [0, 0, 0]      # one flat colour has no contrast
    assert float(Contrast()(board)) == pytest.approx(0.5, abs=SMOOTHING)
    assert torch.equal(autograd(Contrast(), red), torch.zeros_like(red))         # where the plain one has no derivative


def test_classifier_is_a_frozen_copy():
    mine = network().train()
    reward = ClassLogProbability(mine, 3)
    x = images().requires_grad_()
    expected = network().eval()(x).log_softmax(1)
    torch.testing.assert_close(reward(x), expected[:, 3])
    torch.testing.assert_close(ClassLogProbability(mine)(x, [4, 0, 2]), expected[[0, 1, 2], [4, 0, 2]])
    reward(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None and not p.requires_grad for p in reward.classifier.parameters())
    assert mine.training and all(p.requires_grad for p in mine.parameters())
    with torch.no_grad():
        mine[-1].bias.add_(1 + torch.arange(5))
    torch.testing.assert_close(reward(x), expected[:, 3])      # training goes on, the reward stays
    assert reward(x.float()).dtype == torch.float32            # images of another precision than the classifier's


@pytest.mark.parametrize(("label", "context", "message"), [
    (5, None, "label: expected class indices in 0 ... 4, got 5 ... 5"),
    (None, None, "context: expected 3 class indices, as ClassLogProbability has no label, got None"),
    (None, torch.tensor([0, 1, 5]), "context: expected class indices in 0 ... 4, got 0 ... 5"),
    (None, torch.tensor([0, -1, 3]), "context: expected class indices in 0 ... 4, got -1 ... 3"),
    (None, torch.tensor([0, 1]), r"context: expected 3 class indices, got torch.int64 \(2,\)"),
    (None, torch.tensor([0.0, 1, 2]), "context: expected 3 class indices, got torch.float32")])
def test_wrong_labels(label, context, message):
    with pytest.raises(ValueError, match=message):
        ClassLogProbability(network(), label)(images(), context)


def test_wrong_classifiers():
    with pytest.raises(ValueError, match="classifier: expected a torch module, got function"):
        ClassLogProbability(lambda x: x)
    with pytest.raises(ValueError, match=r"classifier: expected logits \(3, classes\), got \(3, 2, 3, 4\)"):
        ClassLogProbability(nn.Identity(), 0)(images())
    with pytest.raises(ValueError, match="label: expected an integer"):
        ClassLogProbability(network(), -1)


def test_jpeg_sizes():
    from PIL import Image

    rng = np.random.default_rng(0)
    tint = np.broadcast_to(np.uint8([200, 100, 50]), (32, 32, 3))
    colour = np.stack([tint, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)])
    x = from_bytes(colour.transpose(0, 3, 1, 2))

    def size(array, quality):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        return len(file.getvalue()) / 1000

    for quality in (95, 40):
        expected = torch.tensor([size(array, quality) for array in colour])
        assert torch.equal(Incompressibility(quality)(x), expected) and torch.equal(Compressibility(quality)(x), -expected)
        grey = torch.tensor([size(array[..., 0], quality) for array in colour])
        assert torch.equal(Incompressibility(quality)(x[:, :1]), grey) and bool((grey < expected).all())
    assert expected[1] > 1.3 * expected[0]              # noise does not compress
    assert Compressibility() == Compressibility(95) and not Compressibility().differentiable
    outside = torch.where(x > 0.9, 3.0, x)              # clamped, not wrapped around
    assert torch.equal(Compressibility()(outside), Compressibility()(outside.clamp(-1, 1)))
    planar = np.ascontiguousarray(colour.transpose(0, 3, 1, 2)).reshape(2, 32, 32, 3)      # planted: axes reinterpreted, not moved
    assert size(planar[0], 95) > 1.1 * size(colour[0], 95)


def test_jpeg_refusals():
    for quality in (0, 101, 9.5):
        for kind in (Compressibility, Incompressibility):
            with pytest.raises(ValueError, match="quality: expected"):
                kind(quality)
    with pytest.raises(ValueError, match="images: expected 1 or 3 channels for JPEG, got 2"):
        Compressibility()(images())
    with pytest.raises(ValueError, match="images: expected finite pixels, got 1 of 2 with NaN or infinity, in Compressibility"):
        Compressibility()(torch.cat([torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), torch.nan)]))
    assert jpeg_kilobytes(digits().pixels[:4], 95).shape == (4,)


def test_no_gradient_through_a_reward_without_one():
    x = images(c=1).requires_grad_()
    for reward in (Compressibility(), *(CallableImageReward(f) for f in (lambda x: x.mean((1, 2, 3)), lambda x: x.numpy().mean((1, 2, 3))))):
        assert not reward.differentiable and not reward(x).requires_grad
    for broken in (lambda x: x.detach().mean((1, 2, 3)), lambda x: x.detach().numpy().mean((1, 2, 3)), lambda x: x.detach().mean((1, 2, 3)).tolist()):
        with pytest.raises(ValueError, match="<lambda>: expected a reward that depends on the images through torch"):
            CallableImageReward(broken, differentiable=True)(x)
        assert CallableImageReward(broken, differentiable=True)(x.detach()).shape == (3,)      # nobody asked for a gradient


def test_rewards_out_of_reach_are_asked_again(monkeypatch):
    """Twice more after 1 and 2 seconds, and then no more; other errors at once; the prompts still reach it, and networks stay as they are."""
    slept, tried = [], []
    monkeypatch.setattr(rewards.time, "sleep", slept.append)

    def flaky(x, context):
        tried.append(context)
        if len(tried) < 3:
            raise ConnectionError("no server")
        return x.sum((1, 2, 3))

    reward = CallableImageReward(rewards.retried(flaky, 3))
    assert torch.equal(reward(images(), ["a", "b", "c"]), images().sum((1, 2, 3)))
    assert slept == [1, 2] and tried == [["a", "b", "c"]] * 3 and reward.name == "flaky"
    tried.clear()
    with pytest.raises(ConnectionError, match="no server"):
        CallableImageReward(rewards.retried(flaky, 2))(images(), [""])
    assert len(tried) == 2

    def wrong(x):
        tried.append(x)
        raise RuntimeError("a bug")

    tried.clear()
    with pytest.raises(RuntimeError, match="a bug"):
        CallableImageReward(rewards.retried(wrong, 3))(images())
    assert len(tried) == 1
    network = nn.Identity()
    assert rewards.retried(network, 3) is network


def test_callable_reward():
    x, prompts = images(), ["a", "bb", "ccc"]
    total = x.sum((1, 2, 3))

    def lengths(x, prompts):
        return torch.tensor([len(p) for p in prompts])

    class Module(nn.Module):
        def forward(self, x, context=None):
            return x.sum((1, 2, 3)) * (0 if context is None else 2)

    for function, context, expected in [
            (lambda x: x.sum((1, 2, 3)), prompts, total), (lambda x, scale=3.0: scale * x.sum((1, 2, 3)), prompts, 3 * total),
            (lengths, prompts, torch.tensor([1.0, 2, 3], dtype=torch.float64)), (Module(), None, 0 * total), (Module(), prompts, 2 * total),
            (lambda x, context=None: x.sum((1, 2, 3)) * len(context), prompts, 3 * total),
            (lambda x: x.numpy().sum((1, 2, 3)), None, total), (lambda *xs: xs[0].sum((1, 2, 3)) * len(xs), prompts, total),
            (lambda x: [1, 2, 3], None, torch.tensor([1.0, 2, 3], dtype=torch.float64))]:
        found = CallableImageReward(function)(x, context)
        torch.testing.assert_close(found, expected)
    assert CallableImageReward(lengths)(x.bfloat16(), prompts).dtype == torch.float32
    assert CallableImageReward(lengths).name == "lengths" and CallableImageReward(Module()).name == "Module"


@pytest.mark.parametrize("function", [lambda: 0, lambda x, y, z: 0, lambda x, *, other: 0, 3, dict])
def test_functions_that_cannot_be_rewards(function):
    with pytest.raises(ValueError, match="function: expected"):
        CallableImageReward(function)


def rewarding(out):
    def clumsy(x):
        return out
    return CallableImageReward(clumsy)


@pytest.mark.parametrize(("out", "message"), [
    (torch.zeros(3, 1), r"clumsy: expected real rewards of shape \(3,\), got torch.float32 \(3, 1\)"),
    (torch.tensor(1.0), r"clumsy: expected real rewards of shape \(3,\), got torch.float32 \(\)"), (torch.zeros(4), r"got torch.float32 \(4,\)"),
    (torch.zeros(3, dtype=torch.complex64), "got torch.complex64"), (None, "clumsy: expected a tensor or array of rewards, got NoneType"),
    ("abc", "clumsy: expected a tensor or array of rewards, got str")])
def test_wrong_shapes_are_refused(out, message):
    with pytest.raises(ValueError, match=message):
        rewarding(out)(images())


class HalfBroken(ImageReward):
    def value(self, images, context):
        return images.mean((1, 2, 3)).log()      # NaN for a dark image, -inf for a grey one


def test_non_finite_rewards_are_refused():
    bad = [1.0, np.nan, np.inf]
    for out in (torch.tensor(bad), np.array(bad), bad):
        with pytest.raises(ValueError, match="rewards: expected finite numbers, got 2 of 3 with NaN or infinity, in clumsy"):
            rewarding(out)(images())
    x = torch.tensor([-0.5, 0.0, 0.5])[:, None, None, None].expand(3, 1, 2, 2)
    with pytest.raises(ValueError, match="got 2 of 3 with NaN or infinity, in HalfBroken"):
        HalfBroken()(x)
    with pytest.raises(ValueError, match="got 1 of 1 with NaN or infinity, in clumsy"):
        rewarding(np.array([1e300]))(x[:1])      # beyond float32
    with pytest.raises(ValueError, match="images: expected finite pixels, got 1 of 3 with NaN or infinity, in Brightness"):
        Brightness()(torch.where(x < 0, torch.inf, x))
    for x in (np.zeros((3, 1, 2, 2)), torch.zeros(3, 4), torch.zeros(3, 1, 2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images: expected a"):
            Brightness()(x)
