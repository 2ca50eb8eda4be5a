"""The plan of a run: predicted bytes against those of the update itself, queries against those of a run, and what is said of them."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from ctrl.torch import finetune as f
from ctrl.torch import rewards
from ctrl.torch import plan as p
from ctrl.torch.methods import PPO, Pathwise, ScoreFunction, ValueGradient
from ctrl.torch.pipelines import Decoded, DiffusersUNet, OfImages, Prompts
from ctrl.torch.chain import Problem, simulate
from ctrl.torch.policy import NetworkPolicy, PredictsNoise
from ctrl.torch.pretrain import Pretraining, sampling_grid
from ctrl.torch.task import Task, outline
from ctrl.schedule import DiscreteVP

torch.set_num_threads(1)
CPU = torch.device("cpu")
METHODS = (ScoreFunction(), ValueGradient(value_updates=2), Pathwise())
MLP = f.Finetune(reward=rewards.Brightness(), steps=4, paths=60, reference_samples=0, samples=100, pretraining=Pretraining(width=32, depth=2))
UNET = replace(MLP, paths=20, pretraining=Pretraining(channels=(8, 16), depth=1))
TINY = replace(UNET, paths=8, steps=2)  # latents


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def latent(settings, device=CPU, channels=(8, 16), side=8):
    """The task of a tiny Stable Diffusion, with guidance, two prompts and a decoder to images of twice the side."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=side, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=channels, norm_num_groups=4,
                                cross_attention_dim=12, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        latent_channels=4, norm_num_groups=4, sample_size=2 * side, scaling_factor=0.2)
    schedule, prompts = DiscreteVP.of(DDIMScheduler()), Prompts(("cat", "dog"), (torch.randn(2, 5, 12),)).to(device)
    base = NetworkPolicy(DiffusersUNet(unet, schedule, [torch.randn(5, 12)], guidance=2.0), PredictsNoise()).to(device).frozen()
    decode, shape = Decoded(vae).to(device), (4, side, side)
    problem = Problem(schedule, base, OfImages(rewards.Brightness(), decode), shape, settings.kl_weight, settings.eta)
    return Task(None, problem, base, None, None, torch.empty(0, *shape), prompts, decode, settings.most or settings.paths)


def measured(trial, work):
    """Bytes at the peak of some work of a training in its stride, and those between updates."""
    gc.collect()
    with p.Meter(CPU, trial.held()) as trial.meter:
        work(trial)
    return max(trial.meter.marks), trial.weights


def holds(predicted, real, weights):
    """Within a hundredth of the whole, and within a twentieth of what is not weights: ten times better than it is asked to be."""
    return abs(predicted / real - 1) < 0.01 and abs((predicted - weights) / (real - weights) - 1) < 0.05


def named(part):
    return "perceptron" if part is MLP else "U-Net" if part is UNET else "latents" if part is TINY else (
        ",".join(f"{name}={x}" for name, x in part.items()) or "plain") if isinstance(part, dict) else type(part).__name__


EVERY = {"micro_batch": 7, "at_once": 12, "trajectories": "seeds"}
CASES = [(MLP, ScoreFunction(), changed) for changed in ({}, {"at_once": 20}, {"micro_batch": 10})] + [(MLP, METHODS[1], EVERY)]
CASES += [(UNET, Pathwise(), {})]
CASES += [(TINY, Pathwise(), {"micro_batch": 4, "lora_rank": 2}), (TINY, ScoreFunction(), {"at_once": 4})]


@pytest.mark.parametrize(("model", "method", "changed"), CASES, ids=named)
def test_prediction_is_what_is_measured(cache, model, method, changed):
    """Of a whole update: perceptron and U-Net on digits, guided latents in full and with an adapter."""
    settings = replace(model, method=method, cache=cache, lora_targets=("to_q", "to_v"), **changed)
    task = latent(settings) if model is TINY else outline(settings)
    sizes, trial = p.sizes_of(settings), p.Trial(task, settings, CPU)
    real, weights = measured(trial, lambda trial: trial.update(sizes))
    found = trial.phase("updates", sizes, trial.update)
    assert holds(found.peak, real, weights)

    real, _ = measured(trial, lambda trial: watched(trial, sizes))
    if sizes[0] == sizes[2]:  # with the halves of its gradient, what a run does
        assert trial.updates().peak == pytest.approx(real, rel=0.001)
    else:
        assert trial.with_halves(found).peak == pytest.approx(real, rel=0.05)


def watched(trial, sizes):
    """An update with the halves of its gradient."""
    trial.training.watched = True
    try:
        trial.update(sizes)
    finally:
        trial.training.watched = False


def test_a_pass_in_two_halves_recomputes_in_halves(cache):
    """Activations that the network itself recomputes: what a backward pass holds for a while is half as much. Planted: halves unknown to the plan."""
    settings = replace(TINY, method=ScoreFunction(), cache=cache, paths=16, lora_rank=2, lora_targets=("to_q", "to_v"))
    task, sizes = latent(settings), p.sizes_of(settings)
    task.base.network.core.enable_gradient_checkpointing()
    trial = p.Trial(task, settings, CPU)
    real, _ = measured(trial, lambda trial: watched(trial, sizes))
    assert trial.updates().peak == pytest.approx(real, rel=0.001)
    assert trial.with_halves(trial.phase("updates", sizes, trial.update)).peak > 1.04 * real


def test_later_epochs_and_plain_values(cache):
    """A copy of the policy that sampled is held for seeds, and a value without the skeleton asks no rewards of predictions."""
    for changed in ({"method": PPO(), "trajectories": "seeds", "micro_batch": 8}, {"method": ValueGradient(value_updates=1), "plain_value": True}):
        settings = replace(MLP, cache=cache, **changed)
        task = outline(settings)
        trial = p.Trial(task, settings, CPU)
        real, weights = measured(trial, lambda trial, settings=settings: trial.update(p.sizes_of(settings)))
        assert holds(trial.phase("updates", p.sizes_of(settings), trial.update).peak, real, weights)


@pytest.mark.parametrize("model", ["perceptron", "latents"])
def test_evaluation_and_reference(cache, model):
    """Chunks of a decoder's images are bounded; what is predicted of sampling is what is measured."""
    settings = replace(MLP if model == "perceptron" else replace(TINY, micro_batch=6), cache=cache, reference_samples=40, reference_steps=5)
    task = outline(settings) if model == "perceptron" else latent(settings)
    grid, sizes = sampling_grid(task.problem.schedule, settings.steps), []

    def evaluate(trial):
        watched = replace(trial.training.problem, reward=lambda x, c: sizes.append(len(x)) or trial.training.problem.reward(x, c))
        simulate(watched, trial.training.average, grid, settings.noise(0, 100), task.context(100), most=task.most)

    trial = p.Trial(task, settings, CPU)
    real, weights = measured(trial, evaluate)
    assert holds(trial.evaluation().peak, real, weights) and max(sizes) == (100 if model == "perceptron" else 6)
    problem, count = task.memoryless, 40 if model == "perceptron" else 6
    with p.Meter(CPU, (*task.base.parameters(), *task.base.buffers())) as meter:
        simulate(problem, problem.pretrained, sampling_grid(problem.schedule, 5), settings.noise(0, count), task.context(count))
    assert p._reference(task, settings, CPU).peak == pytest.approx(max(meter.marks) + 3 * 4 * 40 * problem.dim, rel=0.01)


def test_one_number_for_the_peak_is_not_enough(cache):
    """Planted: the peaks of the same trials, extrapolated, instead of every operation; another one is the largest at other sizes."""
    settings = replace(MLP, cache=cache, pretraining=Pretraining(width=256, depth=2))
    task, sizes = outline(settings), p.sizes_of(settings)
    trial, lines = p.Trial(task, settings, CPU), []
    real, weights = measured(trial, lambda trial: trial.update(sizes))
    for few in p.TRIALS[False, False]:
        gc.collect()
        with p.Meter(CPU, trial.held()) as trial.meter:
            trial.update(few)
        lines.append(trial.meter.marks)
    assert holds(p.fitted("", sizes, p.TRIALS[False, False], lines).peak, real, weights)
    assert not holds(p.fitted("", sizes, p.TRIALS[False, False], [[max(line)] for line in lines]).peak, real, weights)


# ------------------------------------------------------------------------------------------- meter and fit


def test_meter_counts_what_lives():
    """By hand: views count once, what is freed counts no more, gradients count, what was there before counts from the start."""
    x = torch.ones(1000, requires_grad=True)
    with p.Meter(CPU, [x]) as meter:
        y = x * 2
        z = y.view(10, 100)
        y.sum().backward()
        del y, z
        torch.ones(1)
    float32 = 4
    assert meter.marks[1] == 2000 * float32 and max(meter.marks) == 3000 * float32 + float32 + float32 and meter.marks[-1] == 2000 * float32 + float32


def test_operations_together_are_one():
    """At their largest."""
    with p.Meter(CPU) as meter:
        with meter.together():
            for _ in range(3):
                torch.ones(100) + torch.ones(100)
        torch.ones(1)
    assert meter.marks == [0, 1200, 4]


def known(sizes, twice=True):
    """Bytes of an update by hand: parts in order, pieces in order; 5 fixed, 2 a stored path, 3 a path at work, 7 in a forward pass."""
    n, k, m = sizes
    out = [5.0]
    for first in range(0, n, k):
        rows = min(k, n - first)
        out += [5.0 + 2 * n + 3 * rows + 7 * min(m, rows - piece) for piece in range(0, rows, m)]
    return out


@pytest.mark.parametrize("sizes", [(50, 50, 50), (50, 50, 7), (50, 7, 7), (50, 9, 2), (4, 3, 2), (7, 1, 1)])
def test_fit_of_known_timelines(sizes):
    """Exact at any size, uneven last parts and pieces among them."""
    trials = p.TRIALS[sizes[1] < sizes[0], sizes[2] < sizes[1]]
    phase = p.fitted("known", sizes, trials, [known(trial) for trial in trials])
    assert phase.peak == pytest.approx(max(known(sizes)))


def test_timelines_of_other_lengths_say_their_peaks():
    assert p.fitted("", (10, 10, 10), p.TRIALS[False, False], [[1, 4], [1, 2, 5]]).peak == pytest.approx(4 + 8)


# ------------------------------------------------------------------------------------------- queries, words, a run


class Counted(rewards.Brightness):
    """Brightness that remembers how much it was asked."""

    asked: ClassVar[list[int]] = []

    def value(self, images, context):
        Counted.asked.append(len(images))
        return super().value(images, context)


def brief(folder, **changes):
    return replace(MLP, paths=6, iterations=2, samples=8, reference_samples=10, reference_steps=3, out=folder / "out", cache=folder / "cache",
                   pretraining=Pretraining(iterations=2, batch=8, width=16), **changes)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: type(method).__name__)
def test_queries_are_those_of_a_run(tmp_path, method, monkeypatch, capsys):
    """The plan's own, of updates, evaluation and yardstick: to the last image, with states through the networks; and the run prints its plan."""
    settings = brief(tmp_path, reward=Counted(), method=method)
    planned, plans = [], p.plan
    monkeypatch.setattr(p, "plan", lambda *given: planned.append(plans(*given)) or planned[-1])
    passed, forward = [], NetworkPolicy.forward
    monkeypatch.setattr(NetworkPolicy, "forward", lambda self, times, x, context=None: passed.append(x.shape[:2].numel()) or forward(
        self, times, x, context))
    Counted.asked.clear()
    f.finetune(settings)
    asked = planned[0].asked
    assert sum(Counted.asked) == asked.plan + asked.updates + asked.evaluation + asked.yardstick
    trials = (2 + 3) * (settings.steps * 2 + settings.reference_steps)  # evaluation and reference of two and three paths, which it does not count
    assert sum(passed) == planned[0].forwards + trials
    printed = capsys.readouterr().out
    assert "plan: peak memory" in printed and f"{asked.updates:,}" in printed and "reward queries" in printed


def test_runs_without_a_plan(tmp_path, monkeypatch, capsys):
    """Where it is not wanted, where a run goes on, and where it does not fit: which stops no run."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(p, "plan", full)
    settings = brief(tmp_path)
    tight = {"out": tmp_path / "tight"}
    for changed, said in (({"no_plan": True}, ""), ({"resume": True}, ""), (tight, "plan: none, as updates of two or three paths")):
        (settings.out / "summary.json").unlink(missing_ok=True)
        run = replace(settings, **changed)
        f.finetune(run)
        printed = capsys.readouterr().out
        assert said in printed and ("plan:" in printed) == bool(said) and (run.out / "summary.json").exists()

    def undefined(*_):
        raise FloatingPointError("reward is nan")

    monkeypatch.setattr(p, "plan", undefined)
    f._plan(None, settings, f.Alone(torch.device("cpu")))
    assert capsys.readouterr().out == "plan: none, as numbers of its trial are not finite: reward is nan\n"


def test_words():
    """The largest phase is named; too little memory is said, with what helps."""
    phases = (p.Phase("updates", (64, 8, 2), 1e9, 1e6, 2e8, 3e9), p.Phase("evaluation", (100, 8, 8), 2e9, 1e6))
    plan = p.Plan(phases, int(9e8), p.Asked(10, 6400, 300, 0), 12_345, "a GPU", int(16e9))
    assert plan.largest.name == "updates" and plan.largest.peak == pytest.approx(1e9 + 64e6 + 1.6e9 + 6e9) and plan.warning is None
    assert str(plan).splitlines() == [
        "plan: peak memory 8.07 GiB (a GPU), in updates; 0.84 GiB of it weights, gradients and optimiser",
        "      updates     8.07 GiB: 0.93 GiB whatever the paths, 61.04 MiB 64 paths, 1.49 GiB 8 at a time, 5.59 GiB 2 in a forward pass",
        "      evaluation  1.96 GiB: 1.86 GiB whatever the paths, 95.37 MiB 100 paths",
        "      6,710 reward queries: plan 10, updates 6,400, evaluation 300; 12,345 states through the network"]
    small = replace(plan, total=int(8e9))
    assert small.warning in str(small)
    for word in ("updates would need 8.07 GiB, and a GPU has 7.45 GiB", "--micro-batch", "--at-once", "--lora-rank", "--precision bf16"):
        assert word in small.warning


def test_a_plan_leaves_no_trace(cache):
    """The task's model has no hooks, no gradients and the same numbers; several processes share the paths."""
    settings = replace(MLP, cache=cache, method=ScoreFunction())
    task = outline(settings)
    before = {name: x.clone() for name, x in task.base.state_dict().items()}
    one, two = p.plan(task, settings), p.plan(task, settings, 2)
    assert not task.base.network._forward_pre_hooks and all(x.grad is None for x in task.base.parameters())
    assert all(torch.equal(x, before[name]) for name, x in task.base.state_dict().items())
    assert two.phases[0].sizes == (30, 30, 30) and two.phases[0].peak < one.phases[0].peak and replace(two.asked, plan=one.asked.plan) == one.asked
    assert np.isfinite([phase.peak for phase in one.phases]).all()
    gc.disable()
    try:
        f._plan(task, settings, f.Alone(CPU))
        assert not [x for x in gc.get_objects() if type(x) is p.Trial]  # it refers to itself
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changed", [{}, {"at_once": 40}, {"micro_batch": 16, "trajectories": "seeds"}], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_gpu_stays_within_a_tenth(cache, method, changed):
    """Peaks of the allocator over three updates of guided latents."""
    device = torch.device("cuda")
    settings = replace(UNET, method=method, cache=cache, paths=64, **changed)
    task = latent(settings, device, channels=(64, 128), side=32)
    planned = p.plan(task, settings).phases[0].peak
    gc.collect()
    torch.cuda.empty_cache()
    training = f.Training(task, settings, f.Alone(device))
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        training.update()
    assert torch.cuda.max_memory_allocated(device) == pytest.approx(planned, rel=0.1)
