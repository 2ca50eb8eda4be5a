"""Networks for images: the Gaussian posterior that they start from, the loss in its units, time features, and full precision under autocast."""

import numpy as np
import pytest
import torch

from ctrl.schedule import OU, VE, VP, DiscreteVP, SubVP
from ctrl.torch.images import Images
from ctrl.torch.networks import MLPDenoiser, ResidualMLP, TimeFeatures, ValueNetwork
from ctrl.torch.policy import Times
from ctrl.torch.pretrain import sampling_grid

SCHEDULES = [VP(), VE(0.02, 20.0), SubVP(), OU(), DiscreteVP(np.linspace(1e-4, 0.02, 1000))]
SHAPE = (1, 2, 3)
D = 6


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n=400, seed=0):
    """Correlated pixels with variances between about .01 and .1, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=generator)
    x = torch.randn(n, D, generator=generator) @ mixing
    x = x / (1.5 * x.abs().max()) + torch.linspace(-0.2, 0.3, D)
    return Images(x.reshape(n, *SHAPE))


def fitted(floor=1e-6):
    network = MLPDenoiser(SHAPE, width=16, depth=2).double()
    network.fit(images(), floor=floor)
    return network


def trained(seed=1):
    """A denoiser whose F is not zero."""
    network = fitted()
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return network


def at(schedule, steps=6):
    grid = sampling_grid(schedule, steps)
    times = Times.of(schedule, grid, torch.float64)
    x = torch.randn(5, steps + 1, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return times, x * (times.alpha**2 + times.v).sqrt().reshape(-1, 1, 1, 1)


def posterior_mean(times, x, mean, cov, power=2):
    """E[X_0 | X_tau = x] for X_0 ~ N(mean, cov): m + alpha C (alpha^2 C + v I)^-1 (x - alpha m); power 1 plants alpha for alpha^2."""
    out = []
    for k in range(len(times)):
        alpha, v = times.alpha[k], times.v[k]
        gain = alpha * cov @ torch.linalg.inv(alpha**power * cov + v * torch.eye(D, dtype=torch.float64))
        out.append(mean + (x[:, k].flatten(1) - alpha * mean) @ gain.T)
    return torch.stack(out, 1).reshape(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_untrained_denoiser_is_the_gaussian_posterior(schedule):
    """With F = 0, to 1e-10; another mean, another covariance or alpha in the place of alpha^2 are rejected."""
    data = images().pixels.flatten(1).double()
    mean, cov = data.mean(0), torch.cov(data.T)
    times, x = at(schedule)
    found = fitted()(times, x)
    torch.testing.assert_close(found, posterior_mean(times, x, mean, cov), rtol=1e-10, atol=1e-10)
    planted = [posterior_mean(times, x, 0 * mean, cov), posterior_mean(times, x, mean, torch.diag(torch.diag(cov))),
               posterior_mean(times, x, mean, cov.trace() / D * torch.eye(D, dtype=torch.float64))]
    if not isinstance(schedule, VE):  # where alpha = 1
        planted.append(posterior_mean(times, x, mean, cov, power=1))
    for wrong in planted:
        assert float((found - wrong).abs().max()) > 1e-3


def test_directions_without_variance_get_the_floor():
    flat = images().pixels.clone()
    flat[..., 0] = flat[..., 1]
    network = MLPDenoiser(SHAPE, width=16, depth=1).double()
    network.fit(Images(flat), floor=0.005)
    assert int((network.variance == 0.005).sum()) >= 2 and torch.isfinite(network(*at(VP()))).all()


@torch.no_grad()
def test_loss_is_the_denoising_error_in_units_of_c_out():
    """|F - target|^2 = |U'(D(x) - clean)/c_out|^2 per coordinate, exactly; without c_out it is another number."""
    network, (times, x) = trained(), at(VP())
    clean = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s2 = (times.v / times.alpha**2)[:, None]
    c_out = (s2 * network.variance / (s2 + network.variance)).sqrt()
    error = (network(times, x) - clean).flatten(2) @ network.axes
    torch.testing.assert_close(network.loss(times, x, clean), (error / c_out).square().mean(-1), rtol=1e-10, atol=0)
    assert float((error.square().mean(-1) / network.loss(times, x, clean) - 1).abs().max()) > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_time_features(schedule):
    """Finite and bounded at every time of every schedule, tau = 0 included; no two times of a grid share theirs."""
    for grid in (sampling_grid(schedule, 50), type(sampling_grid(schedule, 1)).uniform(50, schedule.horizon)):
        features = TimeFeatures()(Times.of(schedule, grid))
        assert features.shape == (51, TimeFeatures.width) and torch.isfinite(features).all() and float(features.abs().max()) <= 1
        distance = torch.cdist(features, features) + 10 * torch.eye(51)
        assert float(distance.min()) > 1e-3
    assert not torch.isfinite(Times.of(schedule, grid).v.log()).all()  # what the features are made of


def test_value_network_starts_at_zero():
    """Zero at every time and state; not so with weights that are not zero, and it has a gradient to leave zero by."""
    times, x = at(VP())
    network = ValueNetwork(SHAPE, width=16).double()
    value = network(times, x)
    assert value.shape == x.shape[:2] and torch.equal(value, torch.zeros_like(value))
    (value - 1).square().sum().backward()
    assert float(network.core.last.bias.grad.abs()) > 0
    torch.nn.init.ones_(network.core.last.weight)
    assert float(network(times, x).detach().abs().min()) > 0


def test_classes_modulate_the_layers():
    core, (times, x) = ResidualMLP(D, D, width=8, depth=2, classes=3).double(), at(VP())
    torch.nn.init.normal_(core.last.weight)
    z, labels = x.flatten(2), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(core(times, z, labels), core(times, z, None), rtol=0, atol=0)  # classes are without effect at the start
    torch.nn.init.normal_(core.label.weight)
    rows = core(times, z[:1].expand(5, -1, -1), labels)
    assert torch.equal(rows[0], rows[3]) and not torch.allclose(rows[0], rows[1])


@torch.no_grad()
def test_the_gaussian_part_is_never_rounded():
    """Under bfloat16 autocast F = 0 changes no bit, where a product under autocast would be off by a thousandth."""
    network, (times, x) = fitted().float(), at(VP())
    times, x = Times.of(VP(), times.grid), x.float()
    full = network(times, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(times, x), full) and full.dtype == torch.float32
        rounded = (x.flatten(2) - network.mean) @ network.axes
    assert float((rounded - (x.flatten(2) - network.mean) @ network.axes).abs().max()) > 1e-3
