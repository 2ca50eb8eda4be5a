"""Denoisers of diffusers as networks: their output at their timesteps, prompts and guidance, and nothing else."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from ctrl.schedule import DiscreteVP, TimeGrid
from ctrl.torch.pipelines import DiffusersUNet
from ctrl.torch.policy import NetworkPolicy, PredictsNoise, Times

torch.set_num_threads(1)
SCHEDULE = DiscreteVP.scaled_linear()
STEPS = (999, 640, 321, 0)


def unconditional(out=3):
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=3, out_channels=out, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()


def prompted():
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                                cross_attention_dim=12, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()


@pytest.fixture
def times():
    grid = SCHEDULE.grid(STEPS)
    assert isinstance(grid, TimeGrid)
    return Times.of(SCHEDULE, grid, torch.float64)[: len(STEPS)]


@pytest.fixture
def x():
    return torch.randn(2, len(STEPS), 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_output_is_the_models(times, x):
    """State by state at diffusers' own timesteps; a predicted variance is left out; a timestep off by one is seen."""
    core = unconditional(6).double()
    found = DiffusersUNet(core, SCHEDULE)(times, x)
    for j, t in enumerate(STEPS):
        torch.testing.assert_close(found[:, j], core(x[:, j], t).sample[:, :3], rtol=1e-9, atol=1e-9)
    assert (found[:, 1] - core(x[:, 1], STEPS[1] - 1).sample[:, :3]).abs().max() > 1e-4


@torch.no_grad()
def test_prompts_and_guidance(times, x):
    """A prompt per path at all its times; the empty one where none is given; guidance is diffusers' formula."""
    core, draw = prompted().double(), torch.Generator().manual_seed(2)
    empty, prompts = (torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((5, 12), (2, 5, 12)))
    free, bound = (torch.stack([core(x[:, j], t, e).sample for j, t in enumerate(STEPS)], 1) for e in (empty.expand(2, 5, 12), prompts))
    for guidance in (1.0, 7.5):
        network = DiffusersUNet(core, SCHEDULE, empty, guidance)
        torch.testing.assert_close(network(times, x), free, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(network(times, x, prompts), free + guidance * (bound - free), rtol=1e-9, atol=1e-9)
        assert (network(times, x, prompts.flip(0)) - network(times, x, prompts)).abs().max() > 1e-3
    assert "empty" not in "".join(network.state_dict())  # the text encoder's, not the model's


@torch.no_grad()
def test_action_is_the_score_of_diffusers(times, x):
    """-eps/sqrt(1 - alphas_cumprod), of the scheduler that the model was trained with."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    core = unconditional().double()
    found = NetworkPolicy(DiffusersUNet(core, DiscreteVP.of(scheduler)), PredictsNoise())(times, x)
    for j, t in enumerate(STEPS):
        expected = -core(x[:, j], t).sample / (1 - scheduler.alphas_cumprod[t].double()).sqrt()
        torch.testing.assert_close(found[:, j], expected, rtol=1e-4, atol=1e-5)


def test_refusals(times, x):
    with pytest.raises(ValueError, match="empty: expected the embedding of the empty prompt for guidance 2, got None"):
        DiffusersUNet(unconditional(), SCHEDULE, guidance=2.0)
    with pytest.raises(ValueError, match="context: expected None for a model without prompts"):
        DiffusersUNet(unconditional().double(), SCHEDULE)(times, x, torch.zeros(2, 5, 12))
    with pytest.raises(ValueError, match="schedule: expected a DiscreteVP"):
        DiffusersUNet(unconditional(), "scaled_linear")
