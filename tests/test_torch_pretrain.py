"""Pre-training: the sampling grid, denoising below the Gaussian's error, determinism, and models on disk."""

import dataclasses

import numpy as np
import pytest
import torch

import ctrl
from ctrl.schedule import VE, VP, SubVP
from ctrl.torch.images import Images
from ctrl.torch.networks import MLPDenoiser
from ctrl.torch.policy import Times
from ctrl.torch.pretrain import FINAL_TAU, Pretraining, follow, load_denoiser, pretrain, sampling_grid, save_denoiser

SETTINGS = Pretraining(iterations=250, batch=256, learning_rate=1e-2, average=0.95, width=32, depth=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def four_clusters(n=256):
    """Four images of two pixels, nearly, each pixel black or white: as far from Gaussian as data can be."""
    generator = torch.Generator().manual_seed(0)
    sign = 2.0 * ((torch.arange(n)[:, None] // torch.tensor([1, 2])) % 2) - 1
    return Images((0.6 * sign + 0.02 * torch.randn(n, 2, generator=generator)).reshape(n, 1, 1, 2))


LAW = ctrl.GaussianMixture([0.25] * 4, [[a, b] for a in (-0.6, 0.6) for b in (-0.6, 0.6)], [0.02**2 * np.eye(2)] * 4)


@torch.no_grad()
def excess(network):
    """Mean |D(x) - E[X_0 | x]|^2 per pixel over 20 noise levels: the posterior mean of the clusters' own law is the truth."""
    schedule, clean = VP(), four_clusters().pixels.flatten(1)
    times, out = Times.of(schedule, sampling_grid(schedule, 20)), []
    for k in range(len(times)):
        alpha, v = float(times.alpha[k]), float(times.v[k])
        x = alpha * clean + v**0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(k))
        truth = (x.double().numpy() + v * LAW.noised(alpha, v).score(x.double().numpy())) / alpha
        out.append(np.square(network(times[k : k + 1], x.reshape(-1, 1, 1, 1, 2)).flatten(1).numpy() - truth).mean())
    return float(np.mean(out))


@pytest.mark.parametrize("schedule", [VP(), VE(0.02, 20.0), SubVP(), VP(0.1, 8.0, horizon=2.0)], ids=lambda s: f"{type(s).__name__}{s.horizon:g}")
def test_sampling_grid(schedule):
    """tau_i = e + (T - e)(u + u^2)/2, from T down to T/100, with steps that shorten; uniform and quadratic grids are other ones."""
    n, horizon = 10, schedule.horizon
    grid = sampling_grid(schedule, n)
    tau = np.array([schedule.tau(t) for t in grid.times])
    u = 1 - np.arange(n + 1) / n
    expected = [FINAL_TAU * horizon + (1 - FINAL_TAU) * horizon * shape for shape in ((u + u**2) / 2, u, u**2)]
    np.testing.assert_allclose(tau, expected[0], rtol=0, atol=1e-12 * horizon)
    assert grid.steps == n and grid.times[0] == 0 and np.isclose(tau[0], horizon) and np.isclose(tau[-1], horizon / 100)
    assert np.all(np.diff(grid.dt) < 0)
    assert all(np.abs(tau - wrong).max() > 0.05 * horizon for wrong in expected[1:])


def test_pretraining_denoises():
    """Ten times nearer to the true posterior mean than the Gaussian's; a denoiser of other images is far from it."""
    data, losses = four_clusters(), []
    gaussian, drawn = MLPDenoiser(data.shape, 32, 2), torch.random.get_rng_state()
    gaussian.fit(data)
    network = pretrain(data, VP(), SETTINGS, 0, losses.append)
    assert torch.equal(torch.random.get_rng_state(), drawn)  # the caller's generator is left alone
    assert len(losses) == SETTINGS.iterations and np.mean(losses[-20:]) < 0.9 * np.mean(losses[:5])
    assert excess(network) < 0.2 * excess(gaussian)
    shrunk = pretrain(Images(0.7 * data.pixels), VP(), dataclasses.replace(SETTINGS, iterations=50), 0)
    assert excess(shrunk) > excess(gaussian)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_pretraining_repeats_to_the_last_bit():
    short, data = Pretraining(iterations=5, batch=64, width=8, depth=1), four_clusters(64)
    first, again, other = (pretrain(data, VP(), short, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_average_of_weights():
    """a <- 0.9 a + 0.1 b for every parameter, and nothing else: 0.1 a + 0.9 b would be the network itself, nearly."""
    a, b = MLPDenoiser((1, 1, 2), 8, 1), MLPDenoiser((1, 1, 2), 8, 1)
    torch.nn.init.normal_(a.core.last.weight)
    before = {name: p.detach().clone() for name, p in a.named_parameters()}
    follow(a, b, 0.9)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), 0.9 * before[name] + 0.1 * q.detach(), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(a.core.last.weight, 0.1 * before["core.last.weight"], atol=1e-3)


def test_denoiser_on_disk(tmp_path):
    network = pretrain(four_clusters(64), VP(), Pretraining(iterations=3, batch=64, width=8, depth=1), 0)
    save_denoiser(network, tmp_path)
    again = load_denoiser(tmp_path)
    assert excess(again) == excess(network) and not again.training
    (tmp_path / "config.json").write_text('{"kind": "Pickle", "shape": [1, 1, 2]}')
    with pytest.raises(ValueError, match="folder: expected a model of MLPDenoiser.*got 'Pickle'"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("batch", 0), ("width", 1), ("depth", 0), ("learning_rate", 0.0), ("average", 1.0)])
def test_refused_settings(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got {value:g}"):
        Pretraining(**{name: value})
