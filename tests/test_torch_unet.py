"""The U-Net denoiser and the convolutional value: Gaussian at the start, rows that do not see one another, files, gradients, training."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import ctrl
from ctrl import torch as ct
from ctrl.torch import images as data
from ctrl.torch import networks
from ctrl.torch.networks import ConvValueNetwork, UNetDenoiser
from ctrl.torch.policy import Times, lift
from ctrl.torch.pretrain import Pretraining, load_denoiser, pretrain, sampling_grid, save_denoiser

torch.set_num_threads(1)

SHAPE, SMALL = (1, 8, 8), (8, 16)


def times_of(steps=4, dtype=torch.float32):
    return Times.of(ctrl.VP(), sampling_grid(ctrl.VP(), steps), dtype)[:steps]


def states(n, k, shape=SHAPE, dtype=torch.float32, seed=0):
    return torch.randn(n, k, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet(shape=SHAPE, channels=SMALL, depth=1, *, blank=False):
    """With a last layer that is not zero, unless blank; mean and variance of some images."""
    torch.manual_seed(0)
    network = UNetDenoiser(shape, channels, depth)
    if not blank:
        torch.nn.init.normal_(network.core.conv_out.weight, std=0.1)
    pixels = torch.linspace(-1, 1, 6)[:, None, None, None] * torch.rand(6, *shape)
    network.fit(data.Images(pixels))
    return network, pixels


def posterior_mean(times, x, mean, variance):
    """E[X_0 | X_tau = x] for X_0 = N(mean, variance): (alpha l x + v m)/(alpha^2 l + v)."""
    alpha, v = lift(times.alpha, x), lift(times.v, x)
    return (alpha * variance * x + v * mean) / (alpha**2 * variance + v)


# ------------------------------------------------------------------------------------------- denoiser


@pytest.mark.parametrize(("shape", "channels"), [(SHAPE, SMALL), ((1, 28, 28), (8, 8, 16)), ((3, 32, 32), (8, 8, 16))])
def test_untrained_denoiser_is_the_gaussian_posterior(shape, channels):
    """F = 0: the Gaussian of the data's mean and average variance, at every time; another variance is not."""
    network, pixels = unet(shape, channels, blank=True)
    times, x = times_of(), states(3, 4, shape)
    mean, variance = pixels.mean(0), pixels.var(0, correction=0).mean()
    found = network(times, x)
    assert torch.allclose(found, posterior_mean(times, x, mean, variance), rtol=0, atol=1e-5)
    for wrong in (pixels.var(0, correction=0), 1.1 * variance):  # planted: a variance per pixel; one a tenth too large
        assert not torch.allclose(found, posterior_mean(times, x, mean, wrong), rtol=0, atol=1e-3)


def test_rows_do_not_see_one_another(monkeypatch):
    """(n, k) in one call are its rows one by one; times that go with paths instead of steps are seen."""
    network, times, x = unet()[0].double(), times_of(dtype=torch.float64), states(3, 4, dtype=torch.float64)
    whole = network(times, x)
    single = torch.stack([torch.cat([network(times[k : k + 1], x[i : i + 1, k : k + 1])[0] for k in range(4)]) for i in range(3)])
    assert whole.shape == x.shape and torch.allclose(whole, single, rtol=0, atol=1e-6)
    monkeypatch.setattr(networks, "noise_level", lambda times: right(times).flip(0))
    assert not torch.allclose(whole, network(times, x), rtol=0, atol=1e-4)


right = networks.noise_level


def test_gradients_reach_states_and_parameters():
    """The slope in x is a finite difference's, and every parameter has one; a detached state has none."""
    network, times, x = unet()[0].double(), times_of(dtype=torch.float64), states(2, 4, dtype=torch.float64).requires_grad_()
    y = states(2, 4, dtype=torch.float64, seed=1)
    slope, *others = torch.autograd.grad((network(times, x) * y).sum(), [x, *network.parameters()], allow_unused=True)
    step = 1e-5 * states(2, 4, dtype=torch.float64, seed=2)
    with torch.no_grad():
        difference = ((network(times, x + step) - network(times, x - step)) * y).sum() / 2
    assert torch.allclose((slope * step).sum(), difference, rtol=1e-6, atol=0)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in others)
    assert not torch.allclose(slope, y * posterior_slope(network, times, x), rtol=0.01)  # F's own part is there


def posterior_slope(network, times, x):
    return posterior_mean(times, torch.ones_like(x), 0, network.variance[0]).detach()


def test_files_there_and_back(tmp_path):
    """The same bits from the files; another architecture and an unknown kind are refused."""
    network, _ = unet()
    save_denoiser(network, tmp_path)
    times, x = times_of(), states(2, 4)
    loaded = load_denoiser(tmp_path)
    assert isinstance(loaded, UNetDenoiser) and torch.equal(loaded(times, x), network.eval()(times, x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["channels"] == list(SMALL) and config["depth"] == 1
    for change, error in (({"channels": [8, 8]}, RuntimeError), ({"kind": "Transformer"}, ValueError)):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error):
            load_denoiser(tmp_path)


def test_actions_under_autocast():
    """A policy whose network computes in bfloat16 has float32 actions, within a hundredth of those of float32."""
    network, times, x = unet()[0], times_of(8), states(2, 8)
    fine, coarse = (ct.NetworkPolicy(network, ct.PredictsClean(), dtype)(times, x).detach() for dtype in (None, torch.bfloat16))
    assert coarse.dtype == torch.float32 and 0 < (coarse - fine).norm() <= 0.01 * fine.norm()


@pytest.mark.parametrize(("shape", "channels"), [((1, 7, 7), (8, 16)), ((1, 28, 28), (8, 8, 8, 8)), ((4,), (8,)), ((1, 8, 8), ())])
def test_levels_that_do_not_halve_are_refused(shape, channels):
    with pytest.raises(ValueError, match=r"channels: expected levels that halve"):
        UNetDenoiser(shape, channels)


def test_pretraining():
    """A few steps on two images, far from Gaussian, lower the denoising loss by a tenth; the same bits again, others for another seed."""
    images = data.Images(torch.tensor([[1.0, -0.5, 0.3, -1.0], [-1.0, 0.5, -0.3, 1.0]]).reshape(2, 1, 2, 2).tile(1, 1, 2, 2))
    losses = []
    network = pretrain(images, ctrl.VP(), Pretraining(60, 64, 2e-2, 0.5, depth=1, channels=(8,)), 0, losses.append)
    assert isinstance(network, UNetDenoiser) and not network.training
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    first, again, other = (pretrain(images, ctrl.VP(), Pretraining(2, 64, depth=1, channels=(8,)), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(x, again[key]) for key, x in first.items()) and not torch.equal(first["core.conv_in.weight"], other["core.conv_in.weight"])


def test_diffusers_is_imported_late():
    code = "import sys, ctrl.torch, ctrl.torch.pretrain; print([name for name in ('diffusers', 'transformers', 'peft') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, timeout=240)
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------- value


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_value_network(shape):
    """Zero at the start; (n, k) are its rows one by one; smooth in x, with its own slope at every time."""
    torch.manual_seed(0)
    network, times = ConvValueNetwork(shape, (4, 8, 8)).double(), times_of(dtype=torch.float64)
    x = states(2, 4, shape, torch.float64).requires_grad_()
    assert network(times, x).shape == (2, 4) and not network(times, x).any()
    for layer in (network.last, network.embed[2]):
        torch.nn.init.normal_(layer.weight, std=0.3)
    whole = network(times, x)
    single = torch.stack([torch.cat([network(times[k : k + 1], x[i : i + 1, k : k + 1])[0] for k in range(4)]) for i in range(2)])
    assert torch.allclose(whole, single, rtol=0, atol=1e-12)
    assert (whole - network(times[:1], x.reshape(8, 1, *shape)).reshape(2, 4))[:, 1:].abs().min() > 1e-6  # planted: one time for all
    slope, = torch.autograd.grad(whole.sum(), x)
    step = 1e-6 * states(2, 4, shape, torch.float64, seed=1)
    difference = (network(times, x + step) - network(times, x - step)).sum() / 2
    assert torch.allclose((slope * step).sum(), difference, rtol=1e-5, atol=0)
