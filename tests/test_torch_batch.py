"""Micro-batches: every method's update by parts is that of the whole batch, from stored paths or from seeds; nothing is asked twice or held on."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from ctrl.torch import finetune as f
from ctrl.torch import objectives, rewards, watch
from ctrl.torch.batch import Batch, Joined
from ctrl.torch.chain import sample
from ctrl.torch.methods import ALL, DPOK, PPO, ScoreFunction, ValueGradient
from ctrl.torch.pipelines import Prompts
from ctrl.torch.task import outline

torch.set_num_threads(1)
CPU = f.Alone(torch.device("cpu"))
BASE = f.Finetune(reward=rewards.Brightness(), steps=4, paths=8, clip_norm=1e9, kl_weight=0.2)
WIDE = [replace(method, value_updates=2, learning_rate=0.02, **({"clip": 1e-3} if isinstance(method, PPO) else {})) for method in ALL]
WIDE += [replace(WIDE[0], epochs=2), replace(WIDE[-2], epochs=2)]  # value gradient and DPOK, whose value has moved when paths are sampled again


def name(method):
    return type(method).__name__ + "x2" * (method.epochs > 1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    made = outline(replace(BASE, cache=tmp_path_factory.mktemp("cache")))
    base = made.base.double()
    return replace(made, base=base, problem=replace(made.problem, pretrained=base))


def training(task, method, accelerator=CPU, **changed):
    """In float64, off the pre-trained model, where every term of a loss has a gradient."""
    out = f.Training(task, replace(BASE, method=method, **changed), accelerator)
    out.policy.double(), out.average.double(), out.value.double()
    with torch.no_grad():
        for p in (*out.policy.parameters(), *out.value.parameters()):
            p += 0.01 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))
    return out


@pytest.fixture(autouse=True)
def double(monkeypatch):
    monkeypatch.setattr(f, "sample", lambda *given, **how: sample(*given, dtype=torch.float64, **how))


def ends(made):
    """Metrics of an update, the last gradients, and where they lead."""
    row = {key: x for key, x in made.update().items() if key != "seconds"}
    moved = [*made.policy.trainable(), *(made.value.parameters() if made.settings.method.learns_value else ())]
    pulled = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in moved])
    return row, pulled, torch.cat([p.detach().flatten() for p in moved])


def error(one, other):
    """Of the gradients, relative."""
    return float((one[1] - other[1]).norm() / other[1].norm())


@pytest.mark.parametrize("trajectories", ["stored", "seeds"])
@pytest.mark.parametrize("method", WIDE, ids=name)
def test_parts_are_the_whole_batch(task, method, trajectories):
    """3 + 3 + 2 of 8 paths: metrics, last gradients and parameters to rounding in float64; a forward pass of few states on top changes nothing."""
    whole = ends(training(task, method))
    parts = ends(training(task, method, micro_batch=3, trajectories=trajectories, at_once=BASE.steps if trajectories == "seeds" else BASE.at_once))
    assert parts[0] == pytest.approx(whole[0], rel=1e-9) and error(parts, whole) < 1e-10
    assert (parts[2] - whole[2]).abs().max() < 1e-10  # of steps of 2e-3: Adam divides by the gradient


@pytest.mark.parametrize("method", WIDE, ids=name)
def test_halves_change_nothing(task, method):
    """What is said of a gradient's signal moves neither it nor where it leads."""
    watched, plain = training(task, method), training(task, method)
    plain.watched = False
    one, other = ends(watched), ends(plain)
    assert error(one, other) < 1e-10 and (one[2] - other[2]).abs().max() < 1e-10
    assert {*one[0]} - {*other[0]} == {"gradient_signal", "gradient_noise"}


@pytest.mark.parametrize("method", [ValueGradient(), PPO()], ids=name)
def test_single_precision(method, tmp_path, monkeypatch):
    """As a run has it: to rounding."""
    monkeypatch.setattr(f, "sample", sample)
    task = outline(replace(BASE, cache=tmp_path))
    how = ({}, {"micro_batch": 3}, {"micro_batch": 3, "trajectories": "seeds"})
    found = [ends(f.Training(task, replace(BASE, method=replace(method, value_updates=1), **changed), CPU)) for changed in how]
    assert max(error(parts, found[0]) for parts in found[1:]) < 2e-5
    assert torch.equal(found[1][2], found[2][2])  # the same paths, whether they are kept or sampled again


def states(made):
    return torch.cat(made._batch(0).each(lambda run: run.states))


def test_paths_are_sampled_again_bit_for_bit(task):
    """In every pass over a batch, whatever the policy has become; and they are those of the whole batch."""
    made = training(task, replace(WIDE[0], epochs=2), micro_batch=3, trajectories="seeds")
    batch, whole = made._batch(0), states(training(task, WIDE[0]))
    first = torch.cat(batch.each(lambda run: run.states))
    with torch.no_grad():
        for p in made.policy.parameters():
            p.mul_(1.5)
    assert torch.equal(torch.cat(batch.each(lambda run: run.states)), first) and not torch.equal(states(made), first)
    torch.testing.assert_close(first, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trajectories", ["stored", "seeds"])
@pytest.mark.parametrize("method", [m for m in WIDE if isinstance(m, ScoreFunction | PPO)], ids=name)
def test_prompts_are_those_of_the_whole_batch(task, method, trajectories, monkeypatch):
    """Baselines of each prompt, what is remembered of them, and the second update, which they enter; planted: a part's own paths alone."""
    asked, found = replace(task, prompts=Prompts(("one", "two", "three"), (torch.zeros(3, 1),))), []
    for changed in ({}, {"micro_batch": 3, "trajectories": trajectories}, {"micro_batch": 3, "trajectories": trajectories}):
        made = training(asked, method, **changed)
        made.statistics.double()
        if len(found) == 2:
            alone(monkeypatch)
        made.update()
        found.append((ends(made), made.statistics.mean.clone()))
    (whole, mean), (parts, also), (wrong, _) = found
    assert error(parts, whole) < 1e-10 and torch.allclose(mean, also, rtol=1e-12) and error(wrong, whole) > 1e-4


# ------------------------------------------------------------------------------------------- planted errors


def alone(monkeypatch):
    """Each part couples its own paths."""
    monkeypatch.setattr(Joined, "__call__", lambda self, own: own)


def new_paths(monkeypatch):
    """Paths are sampled again by the policy of now."""
    monkeypatch.setattr(f, "_swapped", lambda policy, theta: f.suppress())


def mean_of_means(monkeypatch):
    """An uneven last part weighs as much as the others."""
    def backward(batch, losses):
        (losses.mean() / len(batch.parts)).backward()
        return losses.detach()

    monkeypatch.setattr(Batch, "backward", backward)


def last_part(monkeypatch):
    """The gradient of the last part alone."""
    def backward(self, batch, loss, run):
        for p in self.theta:
            p.grad = None
        return batch.backward(loss(run))

    monkeypatch.setattr(watch.Halves, "backward", backward)


COUPLED = ("ScoreFunction", "PPOx2", "RewardWeighted")
AGAIN = ("ValueGradient", "ValueGradientx2", "TemporalDifference", "PPOx2", "DPOK", "DPOKx2")


@pytest.mark.parametrize("method", [m for m in WIDE if name(m) in ("ValueGradientx2", "PPOx2", "DPOKx2", "RewardWeighted", "Pathwise")], ids=name)
@pytest.mark.parametrize(("plant", "seen"), [(alone, COUPLED), (new_paths, AGAIN), (mean_of_means, None), (last_part, None)],
                         ids=["alone", "new paths", "mean of means", "last part"])
def test_planted_errors_are_seen(task, method, plant, seen, monkeypatch):
    """Where a method is touched by an error, the error is far above rounding; elsewhere it changes nothing."""
    whole = ends(training(task, method))
    plant(monkeypatch)
    wrong = error(ends(training(task, method, micro_batch=3, trajectories="seeds")), whole)
    assert (wrong > 1e-4) if seen is None or name(method) in seen else (wrong < 1e-10)


# ------------------------------------------------------------------------------------------- what it costs, what is held


@pytest.mark.parametrize(("trajectories", "factor"), [("stored", 1), ("seeds", 4)])
def test_no_reward_is_asked_twice(task, trajectories, factor):
    """n rewards and N n predicted ones, as for the whole batch; seeds sample again for the policy's step and each of the value's."""
    method, asked, passed = ValueGradient(value_updates=3), [], []
    made = training(task, method, micro_batch=3, trajectories=trajectories)
    reward = made.problem.reward
    made.problem = replace(made.problem, reward=lambda x, context: asked.append(len(x)) or reward(x, context))
    made.policy.register_forward_pre_hook(lambda module, given: passed.append(given[1].shape[:2].numel()))
    made.update()
    plain, steps = 8, BASE.steps
    assert sum(asked) == plain * 2 + plain * steps  # sampled, as the end of the value gradient, predicted
    assert sum(passed) == plain * steps * factor + plain * steps  # sampled, and once with gradients


@pytest.mark.parametrize("trajectories", ["stored", "seeds"])
def test_parts_are_let_go(task, trajectories):
    """While a part is worked on no other one's graph is alive, nor, of seeds, its states; and nothing outlives the batch."""
    made = training(task, ValueGradient(), micro_batch=2, trajectories=trajectories)
    batch, seen = made._batch(0), []
    gc.disable()
    try:
        def work(run):
            held = [(graph() is not None, states() is not None) for graph, states in seen]
            loss = made.objective.loss(run)
            loss.sum().backward()
            seen.append((weakref.ref(run.pretrained), weakref.ref(run.states)))
            return held

        held = batch.each(work)[-1]
        assert held == [(False, trajectories == "stored")] * 3
        del batch
        assert not any(graph() is not None or states() is not None for graph, states in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("method", [ScoreFunction(), PPO(), DPOK(value_updates=2)], ids=name)
def test_two_processes_by_parts(task, method, two_processes):
    """4 paths each, 3 and 1 at a time, from seeds: the gradient of the joined batch."""
    whole = ends(training(task, method))
    out = two_processes(lambda accelerator: training(task, method, accelerator, micro_batch=3, trajectories="seeds"), ends)
    assert error(out[0], whole) < 1e-10 and torch.equal(out[0][2], out[1][2]) and out[0][0] == pytest.approx(whole[0], rel=1e-9)


def test_refusals(task):
    """A loss that asks of the batch what its coupling does not say; parts of no paths."""
    class Quiet(objectives.ScoreFunction):
        coupling = None

    made = training(task, ScoreFunction())
    made.objective = Quiet(made.objective.baseline)
    with pytest.raises(ValueError, match=r"coupling: expected the numbers that the loss asks of the batch, \(n, 4\), got nothing"):
        made.update()
    with pytest.raises(ValueError, match="micro_batch: expected an integer"):
        replace(BASE, micro_batch=0)
    with pytest.raises(ValueError, match="size: expected an integer"):
        Batch(None, 4, 0)
