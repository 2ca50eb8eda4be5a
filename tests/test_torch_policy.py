"""Networks as policies: the adapter's reference is the pre-trained model to the bit, gradients reach what they should, precisions stay."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import ctrl
from ctrl import torch as ct
from ctrl.torch.policy import Times

torch.set_num_threads(1)

SHAPE = (1, 4, 4)


class Network(nn.Module):
    """A small image network with time and label: (times, x (n, k, *shape), context) -> the same shape."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.label, self.last = nn.Linear(16, 32), nn.Embedding(3, 32), nn.Linear(32, 16)

    def forward(self, times, x, context):
        h = self.first(x.flatten(2)) + times.tau[:, None] + self.label(context)[:, None]
        return self.last(h.tanh()).reshape(x.shape)


LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def brightness(images, context):
    return images.mean((1, 2, 3))


def adapted(dtype=torch.float32, autocast=None):
    """A policy with a moved adapter, the original as a policy of its own, and everything that a run needs."""
    peft = pytest.importorskip("peft")
    original = ct.NetworkPolicy(Network().to(dtype), ct.PredictsNoise(), autocast).frozen()
    network = peft.get_peft_model(Network().to(dtype), peft.LoraConfig(r=2, target_modules=["first", "last"]), autocast_adapter_dtype=False)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(4)
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.add_(0.3 * torch.randn_like(p))
    return ct.NetworkPolicy(network, ct.PredictsNoise(), autocast), original


def sampled(policy, reference, dtype=torch.float32, **changes):
    problem = ct.Problem(ctrl.VP(0.1, 8.0), reference, brightness, SHAPE, 0.3)
    return replace(ct.sample(problem, policy, problem.grid(4), ctrl.Noise(1, 6), LABELS, dtype=dtype), **changes)


def by_name(policy, loss):
    """Gradient of every parameter, None where there is none."""
    names, parameters = zip(*policy.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, [p.requires_grad_() for p in parameters], allow_unused=True), strict=True))


# ------------------------------------------------------------------------------------------- the adapter's reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_reference_is_the_pretrained_model(dtype):
    """Bit for bit, in runs and in paths, though the adapter has moved; without a second copy of the weights."""
    policy, original = adapted(dtype)
    reference = ct.WithoutAdapter(policy)
    run = sampled(policy, reference, dtype)
    times, x = run.times[:-1], run.states[:, :-1]
    assert torch.equal(reference(times, x, LABELS), original(times, x, LABELS)) and torch.equal(run.s, original(times, x, LABELS))
    assert (policy(times, x, LABELS) - run.s).abs().max() > 0.1 and run.kl.min() > 1e-2  # planted: the adapter left on
    assert not list(reference.parameters()) and not reference.state_dict()
    problems = run.problem, replace(run.problem, pretrained=original)
    one, other = (ct.simulate(problem, policy, run.grid, ctrl.Noise(1, 6), LABELS, dtype=dtype).penalty for problem in problems)
    assert torch.equal(one, other)
    with torch.no_grad():
        for name, p in policy.network.named_parameters():
            if "lora_" not in name:
                p.mul_(1.01)  # planted: base weights that move
    assert not torch.equal(reference(times, x, LABELS), original(times, x, LABELS))


@pytest.mark.parametrize("at_once", [2**16, 8])
def test_gradients_reach_the_adapter_alone(at_once):
    """The KL's gradient moves every adapter weight and no base weight, and equals that against a copy of the original."""
    policy, original = adapted(torch.float64)
    theta = policy.trainable()
    assert all(("lora_" in name) == p.requires_grad for name, p in policy.named_parameters()) and len(theta) == 4

    def kl_gradient(reference):
        return torch.autograd.grad(sampled(policy, reference, torch.float64, at_once=at_once).cost.sum(), theta)

    for found, expected in zip(kl_gradient(ct.WithoutAdapter(policy)), kl_gradient(original), strict=True):
        assert expected.abs().max() > 1e-3 and torch.equal(found, expected)
    policy.zero_grad()
    sampled(policy, ct.WithoutAdapter(policy), torch.float64, at_once=at_once).cost.sum().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in policy.named_parameters())


@pytest.mark.parametrize("at_once", [2**16, 8])
def test_reference_passes_gradients_to_states_and_none_to_weights(at_once):
    """Even where all weights ask for gradients; also while activations are recomputed in the backward pass."""
    policy, original = adapted(torch.float64)
    policy.requires_grad_(True)
    run = sampled(policy, ct.WithoutAdapter(policy), torch.float64, at_once=at_once)
    assert all(gradient is None for gradient in by_name(policy, (run.clean * run.clean).sum()).values())
    expected = sampled(policy, original, torch.float64)
    found, right = (torch.autograd.grad(r.clean.square().sum(), r.x)[0] for r in (run[:], expected))
    assert right.abs().min() > 0 and torch.allclose(found, right, rtol=1e-13, atol=0)
    leaking = sampled(policy, policy, torch.float64)  # planted: the policy itself for its reference
    assert any(gradient is not None for gradient in by_name(policy, leaking.clean.square().sum()).values())


def test_calls_leave_the_flags_as_they_were():
    """Frozen stays frozen, trainable trainable, also when a call fails."""
    policy, _ = adapted()
    times = Times.of(ctrl.VP(), ctrl.TimeGrid.uniform(4, 1.0))[:4]
    for asked in (4, 0):
        before = [p.requires_grad for p in policy.parameters()]
        ct.WithoutAdapter(policy)(times, torch.zeros(6, 4, *SHAPE), LABELS)
        with pytest.raises(RuntimeError):
            ct.WithoutAdapter(policy)(times, torch.zeros(6, 4, 1, 3, 3), LABELS)
        assert [p.requires_grad for p in policy.parameters()] == before and sum(before) == asked
        policy.frozen()


# ------------------------------------------------------------------------------------------- precision


def test_autocast_keeps_actions_in_the_states_precision():
    """The network computes in bfloat16; actions, densities and the KL are single precision, and near those of a single-precision network."""
    seen = []
    network = Network()
    network.last.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    half, single = (ct.NetworkPolicy(network, ct.PredictsNoise(), autocast) for autocast in (torch.bfloat16, None))
    times = Times.of(ctrl.VP(), ctrl.TimeGrid.uniform(4, 1.0))[:4]
    x = torch.randn(6, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    coarse, fine = half(times, x, LABELS), single(times, x, LABELS)
    assert seen == [torch.bfloat16, torch.float32] and coarse.dtype == fine.dtype == torch.float32
    assert 0 < (coarse - fine).abs().max() <= 0.03 * fine.abs().max()
    run = sampled(half, copy.deepcopy(single).frozen())
    assert all(y.dtype == torch.float32 for y in (run.states, run.actions, run.cost, run.log_ratio, run.k1, run.kl))
    assert not torch.equal(run.actions, run.actions.bfloat16().float())  # planted: the division by sqrt(v) in half precision, too


def test_frozen_policies_are_in_evaluation_mode_without_gradients():
    policy = ct.NetworkPolicy(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), ct.PredictsScore())
    assert len(policy.trainable()) == 2
    frozen = copy.deepcopy(policy).frozen()
    assert not frozen.trainable() and not any(module.training for module in frozen.modules()) and policy.training
