"""Noise on a device: the same words bit for bit, the same normals to rounding, whatever the chunks, in the place of `ctrl.Noise`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ctrl
from ctrl import torch as ct
from ctrl.kernels import normals
from ctrl.torch import noise as device_noise
from ctrl.torch.noise import DeviceNoise, near, words

torch.set_num_threads(1)

SEED = 0x89ABCDEF01234567
DRAWS = [("start", (3,)), ("steps", (6, 3)), ("actions", (5, 2))]


def compiled_words(seed, first, paths, group, lane):
    out = np.empty((paths, 4), np.uint32)
    normals.fill_words(np.uint64(seed), np.uint64(first), np.uint64(2**64 - 1), np.uint32(group), np.uint32(lane), out)
    return out.astype(np.int64)


def device_words(seed, first, paths, group, lane):
    four = words(seed, first + torch.arange(paths)[:, None], group, torch.tensor([lane]))
    return torch.cat(four, 1).numpy()


def draw(noise, name, sizes):
    return np.asarray(getattr(noise, name)(*sizes))


def ulps(found, expected):
    return float(np.max(np.abs(found - expected) / np.spacing(np.abs(expected))))


# ------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(("seed", "first", "group", "lane"), [
    (0, 0, 0, 0), (SEED, 2**32 - 300, 7, 5 | normals.ACTION << 28), (2**64 - 1, 2**63 - 1000, 2**32 - 1, 2**32 - 1)])
def test_words_are_philox(seed, first, group, lane, monkeypatch):
    """Every bit, also where products pass 2^63 and paths 2^32; exchanged multipliers or round keys are seen."""
    expected = compiled_words(seed, first, 1000, group, lane)
    assert np.array_equal(device_words(seed, first, 1000, group, lane), expected)
    for name in ("MULTIPLIERS", "INCREMENTS"):
        with monkeypatch.context() as planted:
            planted.setattr(device_noise, name, getattr(device_noise, name)[::-1])
            assert not np.array_equal(device_words(seed, first, 1000, group, lane), expected)


# ------------------------------------------------------------------------------------------- normals


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("name", "sizes"), DRAWS)
def test_normals_are_those_of_the_noise(name, sizes, antithetic, monkeypatch):
    """float64 within units in the last place; float32 is float64 rounded, but for ties a unit away; a shifted uniform is seen."""
    noise = ctrl.Noise(SEED, 20_000, antithetic, first=2**32 - 300)
    expected = draw(noise, name, sizes)
    found = getattr(DeviceNoise(noise, dtype=torch.float64), name)(*sizes)
    assert found.dtype == torch.float64 and ulps(found.numpy(), expected) <= 8
    single = getattr(DeviceNoise(noise), name)(*sizes)
    rounded = expected.astype(np.float32)
    assert single.dtype == torch.float32 and ulps(single.numpy(), rounded) <= 1 and np.mean(single.numpy() != rounded) < 1e-4
    right = device_noise.box_muller
    monkeypatch.setattr(device_noise, "box_muller", lambda wa, wb: right(wa + 1, wb))
    assert ulps(draw(DeviceNoise(noise, dtype=torch.float64), name, sizes), expected) > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "sizes"), [("start", (5,)), ("steps", (7, 3)), ("actions", (6, 2))])
def test_normals_on_a_gpu_are_those_of_the_noise(name, sizes):
    """Its logarithm and sine are others, within units in the last place."""
    noise = ctrl.Noise(SEED, 20_000, first=2**32 - 300)
    found = getattr(DeviceNoise(noise, "cuda", torch.float64), name)(*sizes)
    assert found.is_cuda and ulps(found.cpu().numpy(), draw(noise, name, sizes)) <= 16


def test_extreme_words():
    """Both ends of both uniforms and the borders of the quarter turns: finite, and the compiled kernel's to rounding."""
    edges = np.array([0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 7 * 2**29, 2**32 - 2, 2**32 - 1])
    wa, wb = (np.resize(w.ravel(), normals.LANES) for w in np.meshgrid(edges, edges))
    expected = np.empty((2, normals.LANES))
    rows = np.stack([wa, wb]).astype(np.uint32).ravel()
    normals.box_muller_64(rows, normals.ROW_0, normals.ROW_1, expected.ravel(), normals.ROW_0, normals.ROW_1)
    found = torch.stack(device_noise.box_muller(torch.tensor(wa), torch.tensor(wb))).numpy()
    assert np.all(np.isfinite(found)) and ulps(found, expected) <= 8


@pytest.mark.parametrize("antithetic", [False, True])
def test_slices_and_chunks_are_windows(antithetic, monkeypatch):
    """A slice holds the same bits as those paths of the whole, in chunks of any size; so do fewer steps and coordinates."""
    noise = DeviceNoise(ctrl.Noise(7, 102, antithetic))
    whole = {name: draw(noise, name, sizes) for name, sizes in DRAWS}
    for chunk in (7, 64):
        monkeypatch.setattr(device_noise, "CHUNK", chunk)
        for name, sizes in DRAWS:
            assert np.array_equal(np.concatenate([draw(noise[a:b], name, sizes) for a, b in ((0, 2), (2, 40), (40, 102))]), whole[name])
    assert np.array_equal(draw(noise, "steps", (3, 2)), whole["steps"][:, :3, :2])
    assert (noise.paths, noise.group, noise.weights) == (102, 2 if antithetic else 1, None)
    assert np.array_equal(noise.component([0.2, 0.8]), noise.noise.component([0.2, 0.8]))


# ------------------------------------------------------------------------------------------- in the chain


class Halving(ct.Policy):
    def forward(self, times, x, context=None):
        return -0.5 * x


def problem(start=None):
    return ct.Problem(ctrl.VP(0.1, 8.0), Halving().frozen(), lambda x, context: -x.flatten(1).square().sum(1), (1, 2, 3), kl_weight=0.5, start=start)


@pytest.mark.parametrize("start", [None, ctrl.Gaussian(np.ones(6), 0.3 * np.eye(6) + 0.1)])
def test_paths_do_not_depend_on_where_the_noise_is_made(start):
    """Sampling with it is sampling with its noise, to rounding, from the prior and from a law; another seed is another path."""
    case, noise = problem(start), ctrl.Noise(5, 40)
    grid = case.grid(6)
    here, there = (ct.sample(case, case.pretrained, grid, n, dtype=torch.float64).states for n in (noise, DeviceNoise(noise, dtype=torch.float64)))
    other = ct.sample(case, case.pretrained, grid, DeviceNoise(ctrl.Noise(6, 40), dtype=torch.float64), dtype=torch.float64).states
    assert torch.allclose(here, there, rtol=0, atol=1e-13) and not torch.allclose(here, other, atol=0.1)
    simulated = ct.simulate(case, case.pretrained, grid, DeviceNoise(noise), dtype=torch.float32).terminal
    assert torch.allclose(simulated.double(), here[:, -1], rtol=0, atol=1e-5)


def test_noise_is_made_where_the_policy_lives():
    """On the CPU the compiled normals stay; elsewhere a Noise's are made there, in the states' precision; rules and others stay."""
    noise = ctrl.Noise(5, 4)
    assert near(noise, torch.empty(0)) is noise
    made = near(noise, torch.empty(0, device="meta", dtype=torch.float64))
    assert isinstance(made, DeviceNoise) and (made.noise, made.device, made.dtype) == (noise, torch.device("meta"), torch.float64)
    coarse = noise.coarsened(ctrl.TimeGrid.uniform(4, 1.0), 2)
    assert near(coarse, torch.empty(0, device="meta")) is coarse


def test_refusals():
    with pytest.raises(ValueError, match=r"noise: expected a ctrl.Noise, got int"):
        DeviceNoise(3)
    with pytest.raises(ValueError, match=r"k: expected an integer >= 1, got 0"):
        DeviceNoise(ctrl.Noise(0, 4)).steps(0, 1)
