"""`ctrl audit`: faithful steps pass, every planted error is caught by the check that is meant for it, and what cannot be read is one line."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctrl import VP, DiscreteVP, Gaussian, cli
from ctrl.audit import audit
from ctrl.evidence import fitted_order
from ctrl.torch import DDIM, PredictsClean, PredictsNoise, PredictsScore, PredictsVelocity, Times
from ctrl.torch.step import COV, MEAN, OUTPUTS, Level, Network, sampler_of

EXAMPLE = Path(__file__).parent.parent / "analysis" / "audit_example.py"
spec = importlib.util.spec_from_file_location("audit_example", EXAMPLE)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def rows_of(reference, seed=0):
    return audit(str(reference), seed, stream=io.StringIO())


def failures(rows):
    return [(row.theorem, row.reason) for row in rows if row.holds is False]


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("name", "prediction"), [
    ("epsilon", PredictsNoise()), ("sample", PredictsClean()), ("v_prediction", PredictsVelocity()), ("score", PredictsScore()),
    ("flow_prediction", None)])
def test_networks_predictions_are_those_of_the_law(name, prediction):
    """As actions they are the score of the noised Gaussian, by the library's own two roads; a velocity of the flow by its definition."""
    schedule = VP(0.1, 10.0, 1.0)
    times = Times.of(schedule, SimpleNamespace(times=np.array([0.3, 0.7])), torch.float64)
    levels = {float(tau): Level(schedule.alpha(tau), schedule.v(tau) ** 0.5) for tau in times.tau.tolist()}
    x = torch.randn(5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.stack([Network(levels, OUTPUTS[name])(x[:, i], times.tau[i].expand(5)) for i in range(2)], 1).detach()
    law = Gaussian(MEAN, np.diag(COV))
    score = torch.tensor(np.stack([law.noised(at.alpha, at.sigma**2).score(x[:, i].numpy()) for i, at in enumerate(levels.values())], 1))
    if prediction is None:
        noise, alpha = times.v[:, None].sqrt(), times.alpha[:, None]
        torch.testing.assert_close(out, -noise * score - (x + noise**2 * score) / alpha, rtol=1e-11, atol=1e-11)
    else:
        torch.testing.assert_close(prediction.action(times, x, out), score, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="model: expected to be called at one of TIMES, in the step's own units, got 300"):
        Network(levels, OUTPUTS[name])(x[:, 0], 300)


def test_the_example_is_the_librarys_ddim():
    """Mean, std and log_prob of the file that users copy, against the step that is tested against diffusers."""
    x, x_next, eps = torch.randn(3, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    true = DDIM(DiscreteVP.scaled_linear(), 1.0)
    for t, t_next in ((981, 961), (21, 1), (1, 0)):
        given, log_prob = example.ddim_step(x, t, t_next, lambda x, t: eps, None, x_next)
        assert given is x_next
        torch.testing.assert_close(log_prob, true.log_prob(x_next, x, eps, t, t_next), rtol=1e-6, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- faithful steps

FAITHFUL = '''
import math, torch
from diffusers import DDIMScheduler, DDPMScheduler
from audit_example import KEPT, TIMES as STEPS, ddim_step, schedule, kl, noise_like, mean_of, std_of, normal

TIMES = torch.tensor(STEPS)


def made(kind, **options):
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, **options)
    scheduler.set_timesteps(50)
    return scheduler


ddim = made(DDIMScheduler, steps_offset=1, set_alpha_to_one=False)
to_data = made(DDIMScheduler, timestep_spacing="trailing", prediction_type="v_prediction")
ddpm = made(DDPMScheduler, variance_type="fixed_small")
to_data.ETA = 0.5
for scheduler in (ddim, to_data, ddpm):
    scheduler.kl = None


def single(x, t, t_next, model, generator, x_next=None):
    """A trainer's: everything in float32, the constant too."""
    x_next, log_prob = ddim_step(x.float(), t, t_next, model, generator, None if x_next is None else x_next.float())
    return x_next.to(x.dtype), log_prob.float()


def elsewhere(x, t, t_next, model, generator, x_next=None, wrong=1.0):
    """Noise that no seed's torch.randn(x.shape) is: half of two draws."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * (noise_like(x, generator) + noise_like(x, generator)) / math.sqrt(2)).detach()
    return x_next, normal(x_next, mean, wrong * std).flatten(1).sum(1)


def elsewhere_wrong(*given):
    return elsewhere(*given, *[None] * (6 - len(given)), wrong=1.05)


def quiet_at_data(x, t, t_next, model, generator, x_next=None):
    """The last step without noise, and without a density."""
    if t_next > 0:
        return ddim_step(x, t, t_next, model, generator, x_next)
    return mean_of(x, model(x, t), t, t_next, 0 * KEPT[0]).detach() if x_next is None else x_next, torch.zeros(len(x))


class Flow:
    """The stochastic flow-matching step: dx = [u + s^2/2t (x + (1 - t) u)] dt + s dB, s^2 = .49 t/(1 - t), data at t = 0."""

    TIMES = [0.96 * (1 - i / 40) for i in range(41)]
    PREDICTION = "flow_prediction"
    SHAPE = (5,)
    kl = None

    def schedule(self):
        t = torch.tensor(self.TIMES, dtype=torch.float64)
        return 1 - t, t

    def __call__(self, x, t, t_next, model, generator, x_next=None):
        s2, dt, u = 0.49 * t / (1 - t), t_next - t, model(x, torch.full((len(x),), t))
        mean, std = x + (u + s2 / (2 * t) * (x + (1 - t) * u)) * dt, torch.tensor(math.sqrt(-s2 * dt), dtype=x.dtype)
        if x_next is None:
            x_next = (mean + std * noise_like(x, generator)).detach()
        return x_next, normal(x_next, mean, std).sum(-1)


class Euler:
    """The reverse SDE of VP(.1, 10) by Euler, down to data; and from torch's own generator, which no one asked for."""

    TIMES = [i / 100 for i in range(100, -1, -1)]
    PREDICTION = "score"
    kl = None

    def schedule(self):
        t = torch.tensor(self.TIMES, dtype=torch.float64)
        B = 0.1 * t + 0.5 * 9.9 * t**2
        return torch.exp(-B / 2), (-torch.expm1(-B)).sqrt()

    def __call__(self, x, t, t_next, model, generator, x_next=None):
        g2, D = torch.tensor(0.1 + 9.9 * t, dtype=x.dtype), t - t_next
        mean, std = x + (g2 / 2 * x + g2 * model(x, t)) * D, (g2 * D).sqrt()
        if x_next is None:
            x_next = (mean + std * torch.randn_like(x)).detach()
        return x_next, normal(x_next, mean, std).flatten(1).sum(1)


flow, euler = Flow(), Euler()
clipped = made(DDIMScheduler)
clipped.register_to_config(clip_sample=True)
clipped.kl = None
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    pytest.importorskip("diffusers")
    file = tmp_path_factory.mktemp("audit") / "own_steps.py"
    shutil.copy(EXAMPLE, file.parent)
    file.write_text(FAITHFUL)
    return file


@pytest.mark.parametrize("name", ["ddim_step", "half_noisy"])
def test_the_faithful_example_passes(name):
    """All of it: 18 verdicts, none skipped, at several seeds; nothing of torch's own generator is used up."""
    state = torch.get_rng_state()
    for seed in (0, 1, 7):
        rows = rows_of(f"{EXAMPLE}:{name}", seed)
        assert len(rows) == 18 and all(row.holds for row in rows), failures(rows)
    assert torch.equal(state, torch.get_rng_state())
    assert {row.theorem for row in rows} == {"density", "noise", "ratio", "kl", "batch", "last_step", "law"}


@pytest.mark.parametrize(("name", "skipped"), [
    ("ddim", {"kl", "last_step"}), ("to_data", {"kl"}), ("ddpm", {"kl", "last_step"}), ("single", set()), ("elsewhere", {"last_step", "law"}),
    ("quiet_at_data", set()), ("flow", {"kl"}), ("clipped", {"kl", "last_step", "law"})])
def test_faithful_steps_pass(own, name, skipped):
    """diffusers' schedulers, single precision, noise of another kind, flow matching on vectors; what does not apply is said, never judged."""
    rows = rows_of(f"{own}:{name}")
    assert not failures(rows) and {row.theorem for row in rows if row.holds is None} == skipped
    assert all(row.reason for row in rows)


def test_noise_from_elsewhere_is_judged_by_sampling(own):
    """A std 5 % off is seen in 65536 draws; verdicts that hold say what would show, those that fail how far off they are."""
    right, wrong = (rows_of(f"{own}:{name}") for name in ("elsewhere", "elsewhere_wrong"))
    sampled = [row for row in right if row.theorem == "noise"]
    assert {row.check for row in sampled} == {"monte_carlo"}
    assert all("an error of 0.0" in row.reason and "would show with probability 0.999, a smaller one may not" in row.reason for row in sampled)
    assert {topic for topic, _ in failures(wrong)} == {"noise", "last_step", "kl"}
    told = next(reason for topic, reason in failures(wrong) if topic == "noise")
    assert told.startswith("draws have the variance of log_prob's density, in units of it: 0.907 where 1 is right, ")
    assert told.endswith("standard errors off")


ALIKE = '''
from audit_example import *
import torch


def once(x, t, t_next, model, generator, x_next=None):
    """One normal for the whole batch and all its coordinates."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * torch.randn((), generator=generator, dtype=x.dtype)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def never(x, t, t_next, model, generator, x_next=None):
    """No noise, and a density all the same."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    return (mean.detach() if x_next is None else x_next), normal(mean.detach() if x_next is None else x_next, mean, std).flatten(1).sum(1)
'''


def test_draws_that_do_not_differ_are_no_evidence(tmp_path):
    """Never that an error of 0 is seen: noise drawn once has correlation 1, and says so; where there is none, there is nothing to correlate."""
    shutil.copy(EXAMPLE, tmp_path)
    (tmp_path / "alike.py").write_text(ALIKE)
    once, never = (rows_of(f"{tmp_path / 'alike.py'}:{name}") for name in ("once", "never"))
    correlation, = (row for row in once if "correlation" in row.reason)
    assert correlation.holds is False and correlation.measured == 1 and "1 where 0 is right, and the draws are all alike" in correlation.reason
    assert all(row.holds is False and row.reason.endswith("and the draws are all alike") for row in once if row.check == "monte_carlo")
    correlation, = (row for row in never if "correlation" in row.reason)
    assert correlation.holds is None and correlation.reason.endswith("no step adds noise")
    assert {"noise", "last_step"} <= {topic for topic, _ in failures(never)}


def test_global_noise_is_told(own):
    """torch.randn_like is not the generator's: one row says so, the law of Euler's chain is right."""
    rows = rows_of(f"{own}:euler")
    (topic, reason), = failures(rows)
    assert topic == "batch" and "same generator" in reason
    order = next(row for row in rows if row.theorem == "law")
    assert 0.85 < order.measured < 1.15


def test_weak_order_is_that_of_the_linear_recursion():
    """The law row against the same sums from the library's DDIM kernel, by its coefficients."""
    kernel, grid = DDIM(DiscreteVP.scaled_linear(), 1.0), np.array(example.TIMES)
    zero, one, m0, c = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), np.array(MEAN), np.array(COV)

    def added(t, t_next):
        (a, v), (b, w) = ((kernel.schedule.alpha(tau), kernel.schedule.v(tau)) for tau in map(kernel.schedule.noise_time, (t, t_next)))
        on_x, on_eps = kernel.mean(one, zero, t, t_next).item(), kernel.mean(zero, one, t, t_next).item()
        slope = on_x + on_eps * v**0.5 / (a**2 * c + v)  # eps = sqrt(v) (x - a m)/(a^2 c + v)
        target = b**2 * c + w
        variance = slope**2 * (a**2 * c + v) + kernel.std(t, t_next) ** 2
        return np.sum(np.abs(on_x * a * m0 - b * m0) / target**0.5 + np.abs(variance - target) / target)

    grids = [grid[::-1][::k][::-1] for k in (1, 2, 4, 8)]
    grids = [g if g[0] == grid[0] else np.append(grid[0], g) for g in grids]
    lengths, sums = (np.array(column) for column in zip(*(
        (1 / (len(g) - 1), sum(added(*pair) for pair in zip(g.tolist(), g[1:].tolist(), strict=False))) for g in grids), strict=True))
    row = next(row for row in rows_of(f"{EXAMPLE}:ddim_step") if row.theorem == "law")
    assert row.measured == pytest.approx(fitted_order(lengths, sums).slope, abs=1e-6)
    assert 0.75 < row.measured < 1 and sums[0] == pytest.approx(0.4, abs=0.02)


# ---------------------------------------------------------------------------------------------------- planted errors

PLANTED = {
    "mean_over_coordinates": ("density", "a sum, not a mean", {"density"}),
    "no_normaliser": ("density", "integrates to 1", {"density"}),
    "variance_for_std": ("noise", "have the std", {"noise", "kl", "last_step"}),
    "variance_for_noise": ("law", "weak order", {"law", "kl"}),
    "another_noise": ("ratio", "before any update", {"ratio"}),
    "rounded_after_scoring": ("ratio", "before any update", {"ratio"}),
    "dropout_in_step": ("ratio", "before any update", None),
    "attached": ("ratio", "autograd of a drawn", {"ratio"}),
    "shared_noise": ("batch", "correlation", {"batch", "noise", "last_step"}),
    "batch_statistics": ("batch", "in parts", {"batch", "kl"}),
    "noiseless_last": ("last_step", "no density", {"last_step"}),
    "clamped_last": ("last_step", "over its length", {"last_step", "law"}),
    "times_exchanged": ("law", "weak order", {"law", "kl"}),
    "whole_direction": ("law", "weak order", {"law", "kl"}),
    "kl_without_time_step": ("kl", "in nats", {"kl"}),
    "kl_in_bits": ("kl", "in nats", {"kl"}),
    "kl_over_std": ("kl", "in nats", {"kl"}),
    "kl_mean_over_coordinates": ("kl", "a sum, not a mean", {"kl"}),
    "kl_detached": ("kl", "autograd of kl", {"kl"})}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught_by_the_check_meant_for_them(name):
    """And by few others: those that the error is an error for too (a kl that is not its density's, a last step as wrong as the rest)."""
    topic, what, allowed = PLANTED[name]
    failed = failures(rows_of(f"{EXAMPLE}:{name}"))
    assert any(found == topic and what in reason for found, reason in failed), failed
    assert allowed is None or {found for found, _ in failed} <= allowed, failed


def test_every_planted_error_of_the_example_is_here():
    written = {name for name, value in vars(example).items() if callable(value) and getattr(value, "__module__", "") == "audit_example"}
    assert written - set(PLANTED) == {"schedule", "std_of", "mean_of", "normal", "noise_like", "ddim_step", "kl", "half_noisy", "with_kl"}


def test_rows_show_what_was_measured():
    """A claim where there is no noise; the sampled std beside the claimed one, at the worst step."""
    row = next(row for row in rows_of(f"{EXAMPLE}:noiseless_last") if row.holds is False)
    assert row.measured > 100 and row.expected == 0
    row = next(row for row in rows_of(f"{EXAMPLE}:variance_for_std") if row.holds is False)
    std = example.std_of(21, 1).item()
    assert row.measured == pytest.approx(std, rel=1e-6) and row.expected == pytest.approx(std**2, rel=1e-6)


# ---------------------------------------------------------------------------------------------------- the command


def test_command(tmp_path, capsys):
    """0 and 1; the table, the failures in full, verdicts.json."""
    assert cli.main(["audit", f"{EXAMPLE}:ddim_step", "--out", str(tmp_path / "right")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ddim_step: 50 steps, t = 981 ... 0, x (n, 3, 4, 4), double precision")
    assert out[1].split()[:4] == ["check", "of", "step", "check"] and len([line for line in out if " ok " in line]) == 18
    assert out[-1].startswith("18 of 18 verdicts hold; 0 skipped; ")
    assert cli.main(["audit", f"{EXAMPLE}:kl_in_bits", "--out", str(tmp_path / "wrong"), "--seed", "3"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in out if line.startswith("FAIL")] == [["FAIL", "kl", "(exact):"]] * 2
    assert out[-1].endswith(": 0.442695, wanted 0")  # 1/log 2 - 1, of the gradient
    assert cli.main(["audit", f"{EXAMPLE}:whole_direction"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(": -0.0373473, wanted at least 0.5")
    rows = json.loads((tmp_path / "wrong" / "verdicts.json").read_text())
    kl = [row for row in rows if row["theorem"] == "kl"]
    assert [row["holds"] for row in kl] == [False, False, True]
    assert kl[0]["measured"] / kl[0]["expected"] == pytest.approx(1 / math.log(2), rel=1e-6)


HEAD = "import torch\nTIMES = [3, 2, 1, 0]\ndef schedule(): return [0.2, 0.5, 0.8, 0.9]\n"
LOOP = "def step(x, t, t_next, model, generator, x_next=None):\n    eps = model(x, t)\n    return {}\n"
BAD = [
    ("", "step: expected step to be a function (x, t, t_next, model, generator, x_next=None) or a diffusers scheduler, got NoneType"),
    ("step = 3", "step: expected step to be a function"),
    ("def step(x): pass", "step: expected TIMES and a function schedule() beside it, got no TIMES"),
    ("TIMES = [1, 0]\ndef step(x): pass", "step: expected TIMES and a function schedule() beside it, got schedule = NoneType"),
    ("TIMES = [1, 0]\ndef schedule(): return [1.0]\ndef step(x): pass", "schedule: expected shape (N + 1,), alphas_cumprod at each of TIMES"),
    ("TIMES = [1, 0]\ndef schedule(): return [0.5, 1.5]\ndef step(x): pass", "schedule: expected alphas_cumprod in [0, 1], got [0.5, 1.5]"),
    ("TIMES = [0, 1]\ndef schedule(): return [0.9, 0.2]\ndef step(x): pass", "TIMES: expected two or more, from noise to data"),
    ("TIMES = [1, 0]\ndef schedule(): return [1, 2], [3]\ndef step(x): pass", "schedule: expected shape (N + 1,)"),
    ("TIMES = [1, 0]\ndef schedule(): return absent\ndef step(x): pass", "schedule: expected to run, got NameError"),
    (HEAD + "PREDICTION = 'noise'\ndef step(x): pass",
     "PREDICTION: expected one of epsilon, sample, v_prediction, flow_prediction, score, got 'noise'"),
    (HEAD + "SHAPE = (0,)\ndef step(x): pass", "SHAPE: expected a tuple of positive integers, got (0,)"),
    (HEAD + "kl = 3\ndef step(x): pass", "kl: expected a function (x, t, t_next, model, reference) -> (n,), got int"),
    (HEAD + "def step(x): pass", "step: expected to run at t = 3 -> 2 with x (2, 3, 4, 4), got TypeError"),
    (HEAD + LOOP.format("x"), "step: expected two tensors, (x_next, log_prob), got Tensor"),
    (HEAD + LOOP.format("x, eps"), "step: expected x_next (2, 3, 4, 4) and log_prob (2,) for x (2, 3, 4, 4) (a step on states of another shape"),
    (HEAD + LOOP.format("x, torch.zeros(len(x))"), "step: expected a step that adds noise and has a density, got none at t = 3 -> 2, t = 2 -> 1"),
    (HEAD + LOOP.replace("model(x, t)", "model(x, t / 1000)").format("x, x"), "step: expected to run at t = 3 -> 2 with x (2, 3, 4, 4), got "
     "ValueError: model: expected to be called at one of TIMES, in the step's own units, got 0.003"),
    ("import diffusers\nstep = diffusers.DDIMScheduler()", "step: expected a DDIMScheduler or a DDPMScheduler after set_timesteps, got DDIMScheduler "
     "before it"),
    ("import diffusers\nstep = diffusers.FlowMatchEulerDiscreteScheduler()", "step: expected a DDIMScheduler or a DDPMScheduler after")]


@pytest.mark.parametrize(("source", "expected"), BAD)
def test_bad_files_are_named_in_one_line(source, expected, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(source)
    assert cli.main(["audit", f"{tmp_path / 'mine.py'}:step"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ctrl: error: {expected}") and error.count("\n") == 1


@pytest.mark.parametrize(("arguments", "expected"), [
    (["nothing.py:step"], "step: expected an existing file, got 'nothing.py'"), (["step"], "step: expected FILE.py:NAME, got 'step'"),
    ([f"{EXAMPLE}:ddim_step", "--seed", "-1"], "seed: expected an integer >= 0, got -1"),
    ([f"{EXAMPLE}:ddim_step", "--out", "/dev/null/x"], "out: expected a writable folder, got /dev/null/x")])
def test_bad_arguments_are_named_in_one_line(arguments, expected, capsys):
    assert cli.main(["audit", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"ctrl: error: {expected}")


def test_coarser_grids_keep_both_ends():
    sampler = sampler_of(f"{EXAMPLE}:ddim_step")
    for k in (2, 4, 7, 8, 50):
        jumps = sampler.coarser(k).jumps
        assert (jumps[0].t, jumps[-1].t_next) == (981, 0) and len(jumps) == math.ceil(50 / k)
        assert all(a.t_next == b.t and a.there == b.here for a, b in pairwise(jumps))
