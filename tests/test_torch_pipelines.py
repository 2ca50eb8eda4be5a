"""Denoisers of diffusers as networks: their output at their timesteps, prompts and guidance, and nothing else."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import randrange

import numpy as np
import pytest
import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel)
from matplotlib.image import imread
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ctrl
from ctrl import cli
from ctrl import torch as ct
from ctrl.files import write_json
from ctrl.schedule import DiscreteVP, TimeGrid
from ctrl.torch import compare, pictures, rewards
from ctrl.torch.finetune import Alone, Finetune, Training, finetune
from ctrl.torch.chain import step
from ctrl.torch.methods import ALL, PPO, Pathwise, RewardWeighted, ScoreFunction, ValueGradient
from ctrl.torch.pipelines import DiffusersUNet, OfImages, Pretrained, Prompts, prompts_of
from ctrl.torch.policy import NetworkPolicy, PredictsNoise, Times, denoised
from ctrl.torch.pretrain import sampling_grid
from ctrl.torch.task import UserReward, prepare
from ctrl.torch.yardstick import yardstick

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
        network = DiffusersUNet(core, SCHEDULE, [empty], guidance)
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
    with pytest.raises(ValueError, match="empty: expected the embedding of the empty prompt for guidance 2, got none"):
        DiffusersUNet(unconditional(), SCHEDULE, guidance=2.0)
    with pytest.raises(ValueError, match="context: expected None for a model without prompts"):
        DiffusersUNet(unconditional().double(), SCHEDULE)(times, x, torch.zeros(2, 5, 12))
    with pytest.raises(ValueError, match="schedule: expected a DiscreteVP"):
        DiffusersUNet(unconditional(), "scaled_linear")


# ------------------------------------------------------------------------------------------- whole pipelines, made here


def tokenizer(folder):
    """Of single characters: no file is fetched."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def stable_diffusion(folder, prediction="epsilon"):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    words = tokenizer(folder)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        max_position_embeddings=8, projection_dim=12, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1))
    unet = UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                                cross_attention_dim=12, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        latent_channels=4, norm_num_groups=4, sample_size=8, scaling_factor=0.2)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction, clip_sample=False,
                              steps_offset=1)
    return StableDiffusionPipeline(vae, text, words, unet, scheduler, None, None, requires_safety_checker=False)


def flow(folder):
    """A tiny Stable Diffusion 3, one tokenizer for all three text encoders."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = tokenizer(folder)
    config = CLIPTextConfig(vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=8, projection_dim=8, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    texts = [CLIPTextModelWithProjection(config) for _ in range(2)]
    transformer = SD3Transformer2DModel(sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
                                        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=8, pooled_projection_dim=16,
                                        pos_embed_max_size=8)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        latent_channels=4, norm_num_groups=4, sample_size=8, scaling_factor=1.5, shift_factor=0.1)
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, texts[0], words, texts[1], words, t5, words)


@torch.no_grad()
def test_a_flow_is_read_as_it_is(tmp_path):
    """A step at eta = 0 is that of diffusers' own scheduler, with guidance and prompts as it reads them; images are decoded as it does."""
    pipeline = flow(tmp_path)
    found = Pretrained.of(pipeline, ["a b", "c"], guidance=3.0)
    scheduler, x = pipeline.scheduler, torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(sigmas=[0.9, 0.6])
    sigma, after = scheduler.sigmas[:2].tolist()
    asked, empty, pooled, blank = pipeline.encode_prompt(["a b", "c"], None, None)
    out = [pipeline.transformer(x, e, p, scheduler.timesteps[0].expand(2), return_dict=False)[0] for e, p in ((empty, blank), (asked, pooled))]
    expected = scheduler.step(out[0] + 3.0 * (out[1] - out[0]), scheduler.timesteps[0], x).prev_sample
    schedule = ctrl.FlowMatching(sigma)
    grid = TimeGrid([0.0, sigma - after])
    action = found.base(Times.of(schedule, grid)[:1], x[:, None], found.prompts)[:, 0]
    torch.testing.assert_close(step(schedule.coefficients(grid, 0.0, 0.0), 0, x, action), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.decode(x), pipeline.vae.decode(x / 1.5 + 0.1).sample)


@pytest.mark.parametrize("rank", [0, 2])
def test_flows_are_tuned_and_saved(tmp_path, rank):
    """Two updates by two methods, a run folder, and weights that diffusers loads into a pipeline of its own."""
    flow(tmp_path).save_pretrained(tmp_path / "pipeline")
    for method in (Pathwise(learning_rate=0.05), ScoreFunction()):
        run = settings(tmp_path / "pipeline", tmp_path / type(method).__name__, method=method, average=0.0, eta=0.7, lora_rank=rank,
                       lora_targets=("to_q", "to_v"), **PROMPTED)
        summary = finetune(run)
        assert np.isfinite(list(summary["tuned"].values())).all() and summary["tuned"]["kl_mean"] > 0
    pipeline, model = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline"), tmp_path / "Pathwise" / "model"
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    asked, _, pooled, _ = pipeline.encode_prompt(["a", "b"], None, None, do_classifier_free_guidance=False)

    @torch.no_grad()
    def output():
        return pipeline.transformer(x, asked, pooled, torch.full((2,), 500.0), return_dict=False)[0]

    before = output()
    if rank:
        pipeline.load_lora_weights(model)
    else:
        pipeline.transformer = SD3Transformer2DModel.from_pretrained(model / "transformer")
    assert (output() - before).abs().max() > 1e-4


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """A folder with a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion(folder).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A folder with a tiny DDPM."""
    folder = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(unconditional(), DDPMScheduler()).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_pipeline_is_read_as_it_is(tmp_path, prediction):
    """The noise of a step that diffusers' own scheduler finds in the guided output is that of the action; images are decoded as it does."""
    pipeline = stable_diffusion(tmp_path, prediction)
    found = Pretrained.of(pipeline, ["a b", "c"], guidance=3.0)
    assert found.shape == (4, 4, 4) and len(found.prompts) == 2
    x, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), 500
    times = Times.of(found.schedule, found.schedule.grid((999, t)))[1:2]
    with torch.no_grad():
        asked, empty = pipeline.encode_prompt(["a b", "c"], "cpu", 1, True, negative_prompt=["", ""])[:2]
        out = [pipeline.unet(x, t, encoder_hidden_states=e).sample for e in (empty, asked)]
        pipeline.scheduler.set_timesteps(10)
        guided = out[0] + 3.0 * (out[1] - out[0])
        clean = pipeline.scheduler.step(guided, t, x).pred_original_sample
        torch.testing.assert_close(denoised(times, x[:, None], found.base(times, x[:, None], found.prompts))[:, 0], clean, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(found.decode(x), pipeline.vae.decode(x / 0.2).sample)


def test_prompts_are_a_context(tmp_path):
    """Sliced, in turn, and each for several times; from a file, which is never itself a prompt."""
    prompts = Prompts(("a", "b", "c"), (torch.arange(3.0).reshape(3, 1, 1), torch.arange(3.0)[:, None]))
    assert prompts.cycled(5).texts == ("a", "b", "c", "a", "b")
    assert [x.flatten().tolist() for x in prompts.cycled(5).read] == [[0, 1, 2, 0, 1]] * 2
    assert prompts.cycled(2, first=2).texts == ("c", "a")
    assert prompts[1:].texts == ("b", "c") and prompts[1:].repeated(2).texts == ("b", "b", "c", "c")
    assert [x.flatten().tolist() for x in prompts[1:].repeated(2).read] == [[1, 1, 2, 2]] * 2
    assert prompts[1:].repeated(2).numbers == (1, 1, 2, 2) and prompts.cycled(4, first=2)[1:].numbers == (0, 1, 2)
    assert prompts_of(("cat", "dog"), "a photo of a {}") == ("a photo of a cat", "a photo of a dog")
    file = tmp_path / "prompts.txt"
    for content, said in ((None, "No such file"), (b"", "without any"), (b"caf\xe9", "can't decode")):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^prompts: expected a file .*{said}"):
            prompts_of((str(file),))
    file.write_bytes("\ufeffa café\r\n\n b\n".encode())
    assert prompts_of((str(file),)) == ("a café", "b")


def settings(folder, out, **changed):
    small = dict(steps=4, paths=6, iterations=2, samples=6, reference_samples=0, threads=1, kl_weight=0.1)
    return Finetune(**{**small, "no_plan": True, "pipeline": str(folder), "reward": rewards.Brightness(), "out": out, "cache": out.parent / "cache",
                       **changed})


PROMPTED = dict(prompts=("cat", "dog"), prompt_template="a {}", guidance=2.0)


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_every_method_runs_on_latents(latent, tmp_path, method):
    """An update with prompts and guidance; the policy moves and the reference does not; all numbers are finite."""
    summary = finetune(settings(latent, tmp_path / "run", method=replace(method, value_updates=2), iterations=1, **PROMPTED))
    assert summary["updates"] == 1 and summary["queries"] == 6 and np.isfinite(list(summary["tuned"].values())).all()
    assert summary["pretrained"]["kl_mean"] == 0 and summary["tuned"]["kl_mean"] > 0 and "yardstick" not in summary


@pytest.mark.parametrize("guided", [False, True])
def test_gradients_are_those_of_the_objective(latent, guided):
    """Pathwise in float64, through guidance, the chain and the decoder: the slope of J on shared noise along the gradient."""
    found = Pretrained.load(str(latent), ["a b", "c"], 2.0 if guided else 1.0)
    base, decode = found.base.double(), found.decode.double()
    prompts = found.prompts.to(torch.float64).cycled(4)
    problem = ct.Problem(found.schedule, base, OfImages(rewards.Brightness(), decode), found.shape, kl_weight=0.05, eta=1.0)
    policy = ct.NetworkPolicy(copy.deepcopy(base.network).requires_grad_(True), base.prediction)
    with torch.no_grad():
        for p in policy.parameters():  # off the pre-trained model, where the KL has a gradient
            p += 0.02 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))
    grid, noise = sampling_grid(found.schedule, 4), ctrl.Noise(3, 4)
    run = ct.sample(problem, policy, grid, noise, prompts, dtype=torch.float64)
    gradient = torch.autograd.grad(-ct.Pathwise().loss(run).mean(), policy.trainable())
    norm = sum(g.square().sum() for g in gradient).sqrt()

    def J(step):
        moved = copy.deepcopy(policy)
        with torch.no_grad():
            for p, g in zip(moved.trainable(), gradient, strict=True):
                p += step * g / norm
        return ct.simulate(problem, moved, grid, noise, prompts, dtype=torch.float64).objective.mean().item()

    assert (J(1e-5) - J(-1e-5)) / 2e-5 == pytest.approx(float(norm), rel=1e-5)
    unpriced = ct.AdjointMatching().loss(ct.sample(problem, policy, grid, noise, prompts, dtype=torch.float64)).mean()
    planted = sum((a * b).sum() for a, b in zip(torch.autograd.grad(-unpriced, policy.trainable()), gradient, strict=True)) / norm
    assert abs(float(planted / norm) - 1) > 1e-4  # the lean adjoint is another gradient


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_saved_is_loaded_by_diffusers(latent, tmp_path, rank):
    """The averaged policy's output is that of diffusers' own pipeline with the saved weights, merged or not."""
    run = settings(latent, tmp_path / "run", method=Pathwise(learning_rate=0.05), average=0.0, lora_rank=rank, lora_targets=("to_q", "to_v"),
                   **PROMPTED)
    finetune(run)
    pipeline = StableDiffusionPipeline.from_pretrained(latent, safety_checker=None)
    before, model = copy.deepcopy(pipeline.unet), tmp_path / "run" / "model"
    if rank:
        pipeline.load_lora_weights(model)
        assert not (model / "unet").exists()
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(model / "unet")
    training = Training(prepare(run), run, Alone(torch.device("cpu")))
    training.load(tmp_path / "run" / "checkpoint.safetensors")
    x, prompt = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 1, 4, 4, 4), (2, 8, 12)))
    times = Times.of(training.problem.schedule, training.problem.schedule.grid((999, 400)))[1:2]
    with torch.no_grad():
        ours = training.average.network.requires_grad_(False)(times, x, training.task.prompts)
        prompts = (training.task.base.network.empty[0].expand(2, -1, -1), training.task.prompts.read[0])
        empty, asked = (core_output(pipeline.unet, x, 400, e) for e in prompts)
        torch.testing.assert_close(ours[:, 0], empty + 2.0 * (asked - empty), rtol=1e-4, atol=1e-5)
        assert (core_output(before, x, 400, prompt) - core_output(pipeline.unet, x, 400, prompt)).abs().max() > 1e-4


def core_output(unet, x, t, prompt):
    return unet(x[:, 0], t, encoder_hidden_states=prompt).sample


def test_a_stopped_run_goes_on(latent, tmp_path):
    """Checkpoints and resume: the same metrics and the same model, bit for bit."""
    whole = settings(latent, tmp_path / "whole", iterations=3, checkpoint_every=1, lora_rank=2, **PROMPTED)
    finetune(whole)
    part = replace(whole, out=tmp_path / "part")
    training = Training(prepare(part), part, Alone(torch.device("cpu")))
    part.out.mkdir()
    write_json(part.out / "config.json", part.identity())
    row = training.update()
    (part.out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    training.save(part.out / "checkpoint.safetensors")
    finetune(replace(part, resume=True))
    first, second = (load_file(run.out / "checkpoint.safetensors") for run in (whole, part))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_prompt_is_asked(latent, tmp_path):
    """More prompts than paths: the next update goes on where the last one ended; and a run knows its prompts by what they say."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join("abcde"))
    run = settings(latent, tmp_path / "run", paths=2, prompts=(str(file),), method=ScoreFunction())
    training = Training(prepare(run), run, Alone(torch.device("cpu")))
    asked = []
    training.problem = replace(training.problem, reward=lambda x, context: asked.extend(context.texts) or x.flatten(1).mean(1))
    for _ in range(3):
        training.update()
    assert asked == ["a", "b", "c", "d", "e", "a"]
    before = run.identity()
    file.write_text("another")
    assert before["prompts"] == list("abcde") and run.identity() != before


def test_a_run_says_how_each_prompt_fared(latent, tmp_path):
    """In every row of the metrics, in the summary (with regret) and in a picture; the prompts' means average to what the run says as a whole."""
    run = settings(latent, tmp_path / "run", method=ScoreFunction(), samples=8, reference_samples=40, reference_steps=4, **PROMPTED)
    summary = finetune(run)
    for row in metrics(run.out):
        assert [(each["prompt"], each["paths"]) for each in row["prompts"]] == [(0, 3), (1, 3)]
        assert np.mean([each["reward"] for each in row["prompts"]]) == pytest.approx(row["reward"])
        assert np.mean([each["kl"] for each in row["prompts"]]) == pytest.approx(row["kl_mean"], abs=1e-9)
        assert all(each["reward_std"] > 0 for each in row["prompts"])
    assert [(row["prompt"], row["paths"]) for row in summary["prompts"]] == [("a cat", 4), ("a dog", 4)]
    for model in ("pretrained", "tuned", "tuned_ode"):
        for name, whole in (("reward", "reward"), ("kl", "kl_mean"), ("regret", "regret")):
            assert np.mean([row[model][name] for row in summary["prompts"]]) == pytest.approx(summary[model][whole], abs=1e-6)
    assert summary["prompts"][0]["tuned"]["reward"] != summary["prompts"][1]["tuned"]["reward"]
    assert all(row["tuned"]["reward_error"] > 0 and row["tuned"]["regret_error"] > 0 for row in summary["prompts"])
    assert imread(run.out / "prompts.png").std() > 0.1
    assert json.loads((run.out / "summary.json").read_text())["prompts"] == summary["prompts"]


def metrics(out):
    """Rows of metrics.jsonl without their times."""
    return [{k: x for k, x in json.loads(line).items() if k != "seconds"} for line in (out / "metrics.jsonl").read_text().splitlines()]


def started(latent, tmp_path, **changes):
    run = settings(latent, tmp_path / "run", **{"paths": 3, "prompts": tuple("abcd"), **changes})
    return Training(prepare(run), run, Alone(torch.device("cpu")))


def test_prompts_are_compared_with_earlier_updates_only(latent, tmp_path, monkeypatch):
    """Both steps on a batch see the statistics as they were before it; each prompt's paths are counted."""
    training, seen = started(latent, tmp_path, method=PPO()), []
    advantage = ct.ClippedRatio.advantage
    monkeypatch.setattr(ct.ClippedRatio, "advantage", lambda self, run: seen.append(self.baseline.weight.tolist()) or advantage(self, run))
    for _ in range(2):
        training.update()
    # the loss of both steps, and what is said of the second one's ratios
    assert seen == [[0] * 4] * 3 + [[1, 1, 1, 0]] * 3 and training.statistics.weight.tolist() == [2, 2, 1, 1]
    assert training.asked_of(RewardWeighted())[0].by_prompt


def test_statistics_of_prompts_are_kept(latent, tmp_path):
    """The next update from a checkpoint is that of the run that was not stopped; without the statistics it is another."""
    whole, path = started(latent, tmp_path, method=ScoreFunction()), tmp_path / "checkpoint.safetensors"
    whole.update()
    whole.save(path)
    whole.update()
    for forgotten in (False, True):
        part = started(latent, tmp_path, method=ScoreFunction())
        part.load(path)
        if forgotten:
            part.statistics.weight.zero_()
        part.update()
        mine, theirs = part.tensors(), whole.tensors()
        moved = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
        assert any(name.startswith("policy") for name in moved) if forgotten else not moved
    older = {name: x for name, x in load_file(path).items() if not name.startswith("statistics")}
    with safe_open(path, "pt") as file:
        save_file(older, path, file.metadata())
    with pytest.raises(ValueError, match="resume: expected a checkpoint with statistics of prompts"):
        part.load(path)


RUNS = r"""
import dataclasses, json, os, pathlib, signal, socket, sys, time
import ctrl, torch, diffusers, transformers, peft
from ctrl import cli
from ctrl.torch import pictures

for drawn in ("before_and_after", "learning_curves", "prompt_rewards"):  # they take longer than all the rest
    setattr(pictures, drawn, lambda *given: None)
settings, update = cli.HEAVY["finetune"].settings(json.loads(sys.argv[1]), "ctrl finetune"), int(sys.argv[2])

def begun(environment={}, **changes):
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        sys.stdout = open(os.devnull, "w")
        os._exit(dataclasses.replace(settings, **changes).run())
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

killed = pathlib.Path(sys.argv[3])
child, metrics = begun(out=killed), killed / "metrics.jsonl"
while not metrics.exists() or metrics.read_bytes().count(b"\n") < update:
    time.sleep(0.0005)
os.kill(child, signal.SIGKILL)
codes = [ended(child), (killed / "summary.json").exists(), ended(begun(out=killed, resume=True))]

with socket.socket() as free:
    free.bind(("localhost", 0))
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
ranks = [begun({**group, "RANK": k, "LOCAL_RANK": k}, out=pathlib.Path(sys.argv[4])) for k in "01"]  # as torchrun starts them
print(json.dumps(codes + [ended(rank) for rank in ranks]))
"""


@pytest.fixture(scope="module")
def runs(latent, tmp_path_factory):
    """The same run with prompts, an adapter and statistics: whole, killed after an update that is drawn anew each time, and on two processes."""
    folder, update = tmp_path_factory.mktemp("runs"), randrange(1, 8)
    words = ["--pipeline", str(latent), "--prompts", *"abc", "--guidance", "2", "--lora-rank", "2", "--lora-targets", "to_q", "to_v", "--steps", "4",
             "--paths", "4", "--iterations", "8", "--samples", "6", "--reference-samples", "12", "--reference-steps", "4", "--threads", "1",
             "--checkpoint-every", "3", "--no-plan", "--cache", str(folder / "cache"), "--out", str(folder / "whole"), "method:score-function",
             "--method.learning-rate", "0.01", "reward:compressibility"]
    with pytest.MonkeyPatch.context() as undrawn:
        for name in ("before_and_after", "learning_curves", "prompt_rewards"):
            undrawn.setattr(pictures, name, lambda *given: None)
        assert cli.main(["finetune", *words]) == 0
    command = [sys.executable, "-c", RUNS, json.dumps(words), str(update), str(folder / "killed"), str(folder / "two")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0 and json.loads(ran.stdout) == [-9, False, 0, 0, 0], (update, ran.stdout, ran.stderr)
    return folder, update


def test_killed_and_resumed(runs):
    """kill -9 at any update: --resume arrives at every bit of the uninterrupted run."""
    folder, update = runs
    assert metrics(folder / "killed") == metrics(folder / "whole"), update
    first, second = (load_file(folder / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), update
    assert "statistics.mean" in first and first["statistics.weight"].sum() == 4 * 8


def test_two_processes_are_one(runs):
    """The metrics of one process to rounding, prompt by prompt; a prompt's paths are found wherever they are."""
    folder, _ = runs
    for row, expected in zip(metrics(folder / "two"), metrics(folder / "whole"), strict=True):
        found, right = row.pop("prompts"), expected.pop("prompts")
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert [each["paths"] for each in found] == [each["paths"] for each in right]
        for name in ("reward", "kl"):
            assert [each[name] for each in found] == pytest.approx([each[name] for each in right], rel=1e-3, abs=1e-5)
    one, two = (load_file(folder / name / "checkpoint.safetensors")["statistics.mean"] for name in ("whole", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_unconditional_pipelines(pixels, tmp_path):
    """Pixels and no prompts; an adapter is merged, as there is nothing that loads it; a yardstick where it is asked for."""
    summary = finetune(settings(pixels, tmp_path / "run", reference_samples=32, reference_steps=4, lora_rank=2, lora_targets=("to_q", "to_k")))
    assert summary["yardstick"]["ess"] > 1 and np.isfinite(summary["tuned"]["regret"])
    assert isinstance(UNet2DModel.from_pretrained(tmp_path / "run" / "model" / "unet"), UNet2DModel)


def test_yardstick_of_prompts_is_their_average(latent, tmp_path):
    """J* for each prompt, then the mean: not that of all samples together."""
    run = settings(latent, tmp_path / "run", reference_samples=40, reference_steps=4, **PROMPTED)
    task, weight = prepare(run), run.kl_weight
    r = task.reference_rewards
    each = [yardstick(r[j::2], weight) for j in range(2)]
    assert task.yardstick.objective == pytest.approx(np.mean([best.objective for best in each]))
    assert task.yardstick.mean(r) == pytest.approx(np.mean([best.reward for best in each]))
    assert task.yardstick.objective != yardstick(r, weight).objective


def test_pipelines_that_are_refused(latent, pixels, tmp_path):
    with pytest.raises(ValueError, match="prompts: expected some for a StableDiffusionPipeline, got 0"):
        Pretrained.load(str(latent))
    with pytest.raises(ValueError, match="prompts: expected none for a DDPMPipeline, got 1"):
        Pretrained.load(str(pixels), ["a"])
    for count in (3, 2):  # no multiple of two prompts; one sample of each
        with pytest.raises(ValueError, match=f"reference_samples: expected 0 or a multiple of 2 prompts, at least two of each, got {count}"):
            prepare(settings(latent, tmp_path / "run", reference_samples=count, **PROMPTED))
    with pytest.raises(ValueError, match="pipeline: expected a folder or an id of a diffusers pipeline with safetensors, got"):
        Pretrained.load(str(tmp_path))
    with pytest.raises(ValueError, match="reward: expected one that needs no classes with a pipeline"):
        Finetune(pipeline=str(pixels))
    with pytest.raises(ValueError, match="lora_targets: expected ends of names of the network's layers, got to_x"):
        finetune(settings(pixels, tmp_path / "run", lora_rank=2, lora_targets=("to_x",)))
    shutil.copytree(pixels, tmp_path / "pickled")
    weights = next((tmp_path / "pickled" / "unet").glob("*.safetensors"))
    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="pipeline: expected a folder or an id of a diffusers pipeline with safetensors"):
        Pretrained.load(str(tmp_path / "pickled"))


# ------------------------------------------------------------------------------------------- methods compared


def comparison(folder, out, **changed):
    small = dict(steps=3, paths=4, iterations=2, samples=4, seeds=2, kl_weights=(0.5, 0.1), kl_weight=0.1, transfer_steps=(3,), snapshot=1,
                 snr_sizes=(2, 4), snr_batches=3, only=("score-function", "pathwise"), threads=1)
    return compare.Compare(**{**small, "pipeline": str(folder), "out": out, "cache": out.parent / "cache", **changed})


ASKED = dict(prompts=("cat", "dog"), reference_samples=24, reference_steps=3)


@pytest.fixture(scope="module")
def compared(latent, tmp_path_factory):
    """Two methods, two seeds, two prompts on latents, with a reward that has a gradient and favours a prompt: settings and frames."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "reward.py").write_text("def score(images, prompts):\n"
                                      "    return 100 * images.flatten(1).mean(1) + images.new_tensor([float(p == 'cat') for p in prompts])\n")
    settings = comparison(latent, folder / "out", reward=UserReward(f"{folder / 'reward.py'}:score", differentiable=True), **ASKED)
    return settings, compare.compare(settings)


def test_methods_are_compared_on_prompts(compared):
    """Every part of a comparison; what is said by prompt averages to what is said as a whole; in words what there is not."""
    settings, frames = compared
    assert set(frames) == {"runs", "learning", "prompts", "ideal", "transfer", "snr"} and frames["runs"]["stopped"].isna().all()
    assert "prompts" not in frames["learning"] and set(frames["runs"]["queries"]) == {8}
    keys = ["method", "seed", "kl_weight"]
    assert len(frames["runs"]) == 2 * (2 + 1) and len(frames["prompts"]) == 2 * len(frames["runs"])
    means = frames["prompts"].groupby(keys)[["reward", "kl", "regret"]].mean()
    whole = frames["runs"].set_index(keys).loc[means.index, ["reward", "kl_mean", "regret"]]
    np.testing.assert_allclose(means.to_numpy(), whole.to_numpy(), rtol=1e-5, atol=1e-6)
    of_prompt = frames["prompts"].groupby("prompt")["reward"].mean()
    assert 0.2 < of_prompt["cat"] - of_prompt["dog"] < 1.8
    page, text = (settings.out / "index.html").read_text(), (settings.out / "table.txt").read_text()
    assert "by regret" in text and "no judged share: a judge is there for classes of the data alone" in text
    assert "(the least of 2 prompts, 12 samples each); below an ESS of 50 it tends to be too low" in text
    assert '<th scope="row">cat</th>' in page and '<th scope="row">dog</th>' in page and "judged" not in page.replace("no judged share", "")
    assert imread(settings.out / "compare.png").std() > 0.05


def test_ideal_frontier_is_that_of_each_prompt(compared):
    """No model may answer one prompt in the place of another: the mean of the prompts' frontiers, not that of all samples together."""
    settings, frames = compared
    r = prepare(settings).reference_rewards
    for _, row in frames["ideal"][frames["ideal"]["kl_weight"].isin(settings.kl_weights)].iterrows():
        each = [yardstick(r[j::2], row["kl_weight"]) for j in range(2)]
        assert row["kl"] == pytest.approx(np.mean([best.kl for best in each]), abs=1e-6)
        assert row["reward"] == pytest.approx(np.mean([best.reward for best in each]))
        assert abs(row["reward"] - yardstick(r, row["kl_weight"]).reward) > 1e-3  # planted: all samples together


def test_compared_gradients_see_the_prompts(compared, monkeypatch):
    """The gradient of a batch is that of the loss on paths of the prompts in turn, with a baseline for each; without prompts it is another."""
    settings, _ = compared
    training = Training(prepare(settings), settings.single(ScoreFunction(), 0, 0.1), Alone(torch.device("cpu")))
    training.objective, training.statistics = training.asked_of(ScoreFunction())
    noise, theta = ctrl.Noise(5, 6), training.policy.trainable()
    found = compare.batch_gradient(training, noise, training.task.context(6))

    def by_hand(objective, context):
        run = ct.sample(training.problem, training.policy, training.grid, noise, context)
        grads = torch.autograd.grad(objective.loss(run).mean(), theta, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, theta, strict=True)])

    own, turned = training.task.prompts.cycled(6), training.task.prompts.cycled(6, first=1)
    assert isinstance(training.statistics, ct.PerPrompt)
    assert (found - by_hand(training.objective, own)).norm() < 1e-4 * found.norm()
    for wrong in (by_hand(training.objective, turned), by_hand(ScoreFunction().objective(training.value), own)):
        assert (found - wrong).norm() > 1e-2 * found.norm()
    seen, draw = [], torch.Generator().manual_seed(0)
    monkeypatch.setattr(compare, "batch_gradient", lambda training, noise, context: seen.append(context.texts) or torch.randn(3, generator=draw))
    compare.SignalToNoise(Pathwise(), compare.Snapshot(0, ValueGradient())).compute(settings, training.task)
    assert seen == [("cat", "dog")] * 3 + [("cat", "dog", "cat", "dog")] * 3


@pytest.mark.parametrize(("paths", "seen"), [(4, "rewards of the first paths"), (3, "prompts of update 1")])
def test_a_method_that_sees_other_prompts_is_refused(compared, tmp_path, monkeypatch, paths, seen):
    """Planted: the next prompt for every path of one method. As many of each: other rewards; else other numbers of paths."""
    batch = Training.batch

    def turned(self, noise, context):
        return batch(self, noise, self.task.prompts.cycled(len(context), first=1) if isinstance(self.settings.method, Pathwise) else context)

    monkeypatch.setattr(Training, "batch", turned)
    run = replace(compared[0], out=tmp_path, seeds=1, paths=paths, iterations=1, samples=2, parts=("learning",))
    with pytest.raises(ValueError, match=f"expected the same of pathwise_seed0_lambda0.1 and score-function_seed0_lambda0.1, got {seen}"):
        compare.compare(run)


KILLED = """
import json, os, signal, sys
from ctrl import cli
from ctrl.torch import compare

finish, left = compare.Part.finish, [int(sys.argv[2])]

def last(self, settings, task):
    if left[0] == 0:
        compute = type(self)._updates
        type(self)._updates = lambda *given, **more: (compute(*given, **more), os.kill(os.getpid(), signal.SIGKILL))
    left[0] -= 1
    finish(self, settings, task)

compare.Part.finish = last
cli.main(["compare", *json.loads(sys.argv[1])])
"""


def test_a_comparison_killed_and_resumed(compared, tmp_path):
    """kill -9 within any run: --resume keeps what was finished, and arrives at every bit of the uninterrupted comparison."""
    settings, _ = compared
    done, out = randrange(4), tmp_path / "out"
    words = ["--pipeline", settings.pipeline, "--prompts", "cat", "dog", "--steps", "3", "--paths", "4", "--iterations", "2", "--samples", "4",
             "--seeds", "2", "--kl-weight", ".1", "--kl-weights", ".5", ".1", "--transfer-steps", "3", "--snapshot", "1", "--snr-sizes", "2", "4",
             "--snr-batches", "3", "--only", "score-function", "pathwise", "--threads", "1", "--reference-samples", "24", "--reference-steps", "3",
             "--parts", "learning", "--cache", str(settings.cache), "--out", str(out), "reward:user", "--reward.function", settings.reward.function,
             "--reward.differentiable"]
    ran = subprocess.run([sys.executable, "-c", KILLED, json.dumps(words), str(done)], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    finished = {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("*.json")}
    assert ran.returncode == -9 and len(finished) == done and not (out / "table.txt").exists(), (done, ran.stderr)
    compare.compare(replace(settings, out=out, parts=("learning",), resume=True))
    again = sorted((out / "parts").iterdir())
    assert len(again) == 2 * 4 and all((out / "parts" / name).stat().st_mtime_ns == then for name, then in finished.items())
    for path in again:
        whole = settings.out / "parts" / path.name
        if path.suffix == ".json":
            mine, theirs = (re.sub(r'"seconds": [^,\n]*', "", file.read_text()) for file in (path, whole))
            assert mine == theirs, (done, path.name)
        else:
            first, second = load_file(path), load_file(whole)
            assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), (done, path.name)


def test_methods_are_compared_on_pixels(pixels, tmp_path):
    """No prompts, no reference samples, no gradient of the reward, an adapter: in words what there is not, and all the rest."""
    settings = comparison(pixels, tmp_path / "out", reward=rewards.Compressibility(), reference_samples=0, lora_rank=2, lora_targets=("to_q", "to_k"),
                          only=("score-function", "dpok", "pathwise"))
    frames, text = compare.compare(settings), (tmp_path / "out" / "table.txt").read_text()
    assert set(frames) == {"runs", "learning", "transfer", "snr"}
    assert set(frames["runs"]["method"]) == set(frames["snr"]["method"]) == {"score-function", "dpok"}
    assert not any("regret" in frame for frame in frames.values()) and frames["runs"]["stopped"].isna().all()
    for said in ("by objective", "no J*, no regret, no ideal frontier: no reference samples", "no judged share",
                 "left out, as the reward has no gradient: pathwise", "no runs at other prices of the KL: dpok\n",
                 "on the way of temporal-difference",
                 "learning rates are those that suit digits", "before the first update: reward"):
        assert said in text
    evaluations = frames["runs"].set_index("method")["network_evaluations"]
    assert (evaluations["score-function"] == 8 * 3 * 3).all()  # sampling, the forward of the update, the reference's: an adapter is not counted twice
    assert imread(settings.out / "compare.png").std() > 0.05
    with pytest.raises(ValueError, match="only: expected a method that does without the reward's gradient, which there is not, got pathwise"):
        compare.compare(replace(settings, out=tmp_path / "none", only=("pathwise",)))


def test_a_quick_run_has_as_many_reference_samples_of_each_prompt(latent):
    def few(count):
        prompts = tuple(map(str, range(count)))
        return comparison(latent, Path("out"), reward=rewards.Brightness(), prompts=prompts).made_quick().reference_samples

    assert [few(count) for count in (1, 2, 3, 9, 129)] == [256, 256, 255, 252, 0]
