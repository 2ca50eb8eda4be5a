"""What a run is watched by: signal and noise of a gradient with known answer, ratios of a policy that moved, the deterministic sampler."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrl.torch import finetune as f
from ctrl.torch import methods, task, watch
from ctrl.torch.chain import simulate
from ctrl.torch.objectives import ClippedRatio

torch.set_num_threads(1)
PATHS, DIM = 5, 3


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Settings and a pre-trained model of a tiny run on digits."""
    folder = tmp_path_factory.mktemp("watch")
    settings = f.Finetune(cache=folder / "cache", out=folder / "out", steps=4, paths=6, quick=True).made_quick()
    return settings, task.prepare(settings)


def training(start, updates=0, **changes):
    settings, prepared = start
    out = f.Training(prepared, replace(settings, **changes), f.Alone(torch.device("cpu")))
    for _ in range(updates):
        out.update()
    return out


def sampled(part, k):
    """The run of update k, in one part."""
    return part._batch(k).each(lambda run: run)[0]


# ------------------------------------------------------------------------------------------- signal and noise


def expected(gradients, measure=watch.gradient_signal):
    """Means of signal and noise over all batches, (patterns, n, d), and first halves of n // 2 paths."""
    n = gradients.shape[1]
    rows = [measure([(batch[: n // 2].sum(0) / n, batch[n // 2 :].sum(0) / n)], (n // 2) / n) for batch in gradients]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def signs(n):
    return torch.tensor(list(product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


@pytest.mark.parametrize("n", [4, 5])
def test_signal_and_noise_of_a_known_gradient(n):
    """Gradients m +- v: over all sign patterns their means are |m|^2 and |v|^2/n to rounding, at odd n too."""
    m, v = (torch.from_numpy(np.random.default_rng(k).normal(size=DIM)) for k in (0, 1))
    gradients = m + signs(n)[:, :, None] * v
    found, truth = expected(gradients), (float(m @ m), float(v @ v) / n)
    assert (found["gradient_signal"], found["gradient_noise"]) == pytest.approx(truth, rel=1e-12)
    assert gradients.mean(1).square().sum(1).mean() == pytest.approx(sum(truth), rel=1e-12)  # the norm of g is both

    def planted(halves, share):
        """|g|^2 for the signal, and the variance of half a batch for the noise."""
        return {"gradient_signal": float(sum(halves[0]).square().sum()), "gradient_noise": watch.gradient_signal(halves, share)["gradient_noise"] * 2}

    wrong = expected(gradients, planted)
    assert wrong["gradient_signal"] - truth[0] == pytest.approx(truth[1]) and wrong["gradient_noise"] == pytest.approx(2 * truth[1])


def test_a_leave_one_out_baseline_couples_the_halves():
    """sigma (r - b) with r = a sigma + c: <g_1, g_2> is too large by |E sigma r|^2 / (n - 1)^2, as said, and by no more."""
    n, a, c = 4, 0.7, 2.0
    sigma = signs(n)
    r = a * sigma + c
    advantage = (r - r.mean(1, keepdim=True)) * n / (n - 1)
    assert expected((sigma * advantage)[:, :, None])["gradient_signal"] == pytest.approx(a**2 * (1 + 1 / (n - 1) ** 2), rel=1e-12)


def per_path(run, objective, theta) -> Tensor:
    """The gradient of every path's own loss, (n, p), one after the other."""
    losses = objective.loss(run)
    each = [torch.autograd.grad(loss, theta, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(theta, row, strict=True)]) for row in each])


@pytest.mark.parametrize("method", methods.ALL, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(("paths", "micro_batch"), [(5, None), (6, 2), (6, 3)])
def test_two_halves_are_the_whole(start, method, paths, micro_batch):
    """The step is that of one backward pass; signal and noise are those of gradients taken path by path, before clipping."""
    part = training(start, 1, method=method, paths=paths, clip_norm=1e-3)
    part.settings = replace(part.settings, micro_batch=micro_batch)
    theta = part.policy.trainable()
    each = torch.cat(part._batch(1).each(lambda run: per_path(run, part.objective, theta).double()))
    row = part._step(part._batch(1), first=True)[0]
    got = torch.cat([p.grad.flatten() for p in theta]).double()
    whole, half = each.mean(0), paths // 2
    one, other = each[:half].mean(0), each[half:].mean(0)
    assert row["gradient_norm"] == pytest.approx(float(whole.norm()), rel=1e-4)
    assert float((got / got.norm() - whole / whole.norm()).norm()) < 1e-4
    scale = float(one.norm() * other.norm())
    assert row["gradient_signal"] == pytest.approx(float(one @ other), abs=1e-4 * scale)
    assert row["gradient_noise"] == pytest.approx(float((one - other).square().sum()) * half * (paths - half) / paths**2, rel=1e-3)
    plain = part._step(part._batch(1), first=False)[0]
    assert {*row} - {*plain} == {"gradient_signal", "gradient_noise"}


def test_one_path_has_no_halves(start):
    assert "gradient_signal" not in training(start, paths=1).update()


# ------------------------------------------------------------------------------------------- ratios


def test_ratios_of_a_policy_that_moved(start):
    """|log rho| from the densities of both policies; clipped are the terms that autograd finds without a gradient."""
    part, objective = training(start, 2, paths=16, method=methods.PPO()), ClippedRatio(clip=0.05)
    run = sampled(part, 2)
    assert float(watch.ratios(objective, run.under(part.policy)).abs().max()) < 1e-5  # the policy that sampled
    for p in part.policy.trainable():
        p.data.add_(0.002 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    now = run.under(part.policy)
    c, x = part.problem.coefficients(part.grid), run.states
    drift = torch.as_tensor(c.h * c.dt).float()[:, None, None, None]
    with torch.no_grad():
        kept = x[:, 1:] - drift * run.actions  # X_{i+1} less what the action adds: the mean differs by that alone
        noise = torch.as_tensor(c.noise).float()[:, None, None, None]
        base = kept - run.xi * noise
        densities = [torch.distributions.Normal(base + drift * a, noise).log_prob(x[:, 1:]).flatten(2).sum(2) for a in (now.mu, run.actions)]
    log_rho = densities[0] - densities[1]
    rho = now.log_ratio.detach().requires_grad_()
    now.__dict__["log_ratio"] = rho
    dead = torch.autograd.grad(objective.loss(now).sum(), rho, retain_graph=True)[0] == 0
    found = watch.ratios(objective, now)
    assert 0.05 < float(dead.float().mean()) < 0.95
    assert torch.allclose(found[:, 0], log_rho.abs().mean(1), rtol=2e-3, atol=2e-4) and torch.allclose(
        found[:, 1], log_rho.abs().amax(1), rtol=2e-3, atol=1e-3)
    assert torch.equal(found[:, 2], dead.float().mean(1))
    outside = (rho.exp() - 1).abs() > 0.05  # planted: whatever the advantage's sign
    assert float(outside.float().mean()) > 1.3 * float(dead.float().mean())


def test_ratios_are_told_of_later_epochs(start):
    """Only where there is a ratio, and a second epoch."""
    names = {"log_ratio_mean", "log_ratio_max", "clipped_share"}
    told, untold = (methods.PPO(), methods.DPOK(epochs=2)), (methods.PPO(epochs=1), methods.ScoreFunction(epochs=2))
    for method, there in [(method, True) for method in told] + [(method, False) for method in untold]:
        assert (names <= {*training(start, method=method).update()}) == there
    row = training(start, 3, method=methods.PPO(epochs=3, clip=1e-6)).update()
    assert 0 < row["log_ratio_mean"] < row["log_ratio_max"] and 0.5 < row["clipped_share"] < 1  # a step goes where advantages pull


# ------------------------------------------------------------------------------------------- the deterministic sampler


def test_reward_of_the_deterministic_sampler(start, tmp_path, monkeypatch):
    """Now and then, of the policy that samples that update's batch, on the same noise every time; not at eta = 0."""
    monkeypatch.setattr(f, "DEPLOYED_EVERY", 2)
    part = training(start)
    rows, rewards = [], []
    for _ in range(4):
        ode = simulate(replace(part.problem, eta=0.0), part.policy, part.grid, part.settings.noise(task.WATCHED, 6))
        rewards.append(float(ode.reward.mean()))
        rows.append(f._updated(part, None, tmp_path))
    assert [row.get("ode_reward") for row in rows] == [rewards[0], None, rewards[2], None] and rewards[0] != rewards[2]
    assert part.deterministic() == part.deterministic() and training(start, eta=0.0, method=methods.Pathwise()).deterministic() == {}
