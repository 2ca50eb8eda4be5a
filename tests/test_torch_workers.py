"""Rewards in processes of their own: the same bits in order, what dies is replaced, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from ctrl.torch import finetune as f
from ctrl.torch import methods, rewards, task
from ctrl.torch.workers import Pooled, _answer

torch.set_num_threads(1)

REWARDS = """
import os, time
from pathlib import Path

import torch

HERE = Path(__file__).parent

def lengths(images, prompts):
    (HERE / f"pid-{os.getpid()}-{torch.get_num_threads()}").touch()
    return [float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]

def fragile(images):
    '''Dies on images that are white as long as there is a file that says how often.'''
    left = HERE / "left"
    if (images > 0.9).all((1, 2, 3)).any() and (n := int(left.read_text())):
        left.write_text(str(n - 1))
        os._exit(9)
    return images.mean((1, 2, 3))

def slow(images):
    (HERE / f"pid-{os.getpid()}-{torch.get_num_threads()}").touch()
    time.sleep(600)

def expensive(images):
    return images.mean((1, 2, 3))

class Own(Exception):
    pass

def strange(images):
    if len(images) == 1:
        raise Own("of the user")
    return images if len(images) == 2 else images.mean((1, 2, 3)) / 0
"""


@pytest.fixture
def user(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    return lambda name, **more: task.UserReward(f"{tmp_path / 'rewards.py'}:{name}", **more)


@pytest.fixture
def pooled():
    """A reward with workers, which are ended afterwards."""
    made = []

    def of(chosen, workers):
        made.append(task._asked_of(f.Finetune(reward=chosen, method=methods.ScoreFunction(), reward_workers=workers)))
        return made[-1]

    yield of
    for reward in made:
        reward.close()


def images(n):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def pids(folder):
    return [int(path.name.split("-")[1]) for path in folder.glob("pid-*")]


def soon(condition, within=30.0):
    until = time.monotonic() + within
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_same_bits_in_order(user, pooled, tmp_path):
    """More workers than images too; prompts travel with their images; one thread each; float64 stays that; closed, they are gone."""
    x, prompts, chosen = images(7), [k * "a" for k in range(7)], user("lengths")
    expected, reward = task._unlabelled(chosen)(x, prompts), pooled(chosen, 3)
    assert isinstance(reward, Pooled) and not reward.differentiable and reward.name == "lengths"
    assert torch.equal(reward(x, prompts), expected) and torch.equal(reward(x[:2], prompts[:2]), expected[:2])
    assert reward(x.double(), prompts).dtype == torch.float64
    theirs = [path.name for path in tmp_path.glob("pid-*") if str(os.getpid()) not in path.name]
    assert theirs and all(name.endswith("-1") for name in theirs)  # a quick worker may have taken all of it
    assert all(alive(int(name.split("-")[1])) for name in theirs)
    reward.close()
    assert soon(lambda: not any(alive(int(name.split("-")[1])) for name in theirs))


def test_a_worker_that_dies_is_replaced(user, pooled, tmp_path):
    """As often as is allowed; then an OSError, which stops a run with everything saved."""
    x = images(4)
    x[3] = 1.0
    reward, left = pooled(user("fragile", attempts=2), 2), tmp_path / "left"
    left.write_text("1")
    assert torch.equal(reward(x), x.mean((1, 2, 3))) and left.read_text() == "0"
    left.write_text("1")
    reward.attempts = 1
    with pytest.raises(OSError, match="reward: a process of fragile died, 1 of 1 times"):
        reward(x)


def test_errors_are_the_rewards_own(user, pooled):
    x = images(3)
    reward = pooled(user("strange"), 1)
    with pytest.raises(rewards.NotFinite, match="rewards: expected finite numbers, got 3 of 3 with NaN or infinity, in strange"):
        reward(x)
    with pytest.raises(ValueError, match=r"strange: expected real rewards of shape \(2,\), got torch.float32 \(2, 3, 8, 8\)"):
        _answer(reward.make, x[:2].numpy(), None)
    with pytest.raises(Exception, match="of the user"):
        reward(x[:1])
    assert reward._pool is None


def test_a_file_that_changes_under_a_run_is_refused(user, pooled, tmp_path):
    """A worker that starts later would ask another reward."""
    reward = pooled(user("expensive"), 1)
    assert reward.make().name == "expensive"
    (tmp_path / "rewards.py").write_text("def expensive(images): return -images.mean((1, 2, 3))")
    with pytest.raises(ValueError, match="reward: expected the user's file to stay as it is"):
        reward.make()


PARENT = """
import signal, sys, torch
from ctrl.torch import finetune as f, methods, task
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit that it is ignored
reward = task._asked_of(f.Finetune(reward=task.UserReward(sys.argv[1]), method=methods.ScoreFunction(), reward_workers=int(sys.argv[2])))
reward(torch.zeros(4, 1, 8, 8))
"""


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_no_process_outlives_its_parent(user, tmp_path, how, workers):
    """kill -9 and an interrupt of the parent in the middle of a batch: the workers, asleep in a user's code for ten minutes, go away at once."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, user("slow").function, str(workers)], stderr=subprocess.PIPE, text=True)
    try:
        assert soon(lambda: len(pids(tmp_path)) == workers, 60) and all(map(alive, pids(tmp_path)))
        parent.send_signal(how)
        assert soon(lambda: not any(map(alive, pids(tmp_path))), 10)
        error = parent.communicate(timeout=20)[1]
        assert parent.returncode == (-9 if how == signal.SIGKILL else -2) and ("KeyboardInterrupt" in error) == (how == signal.SIGINT)
    finally:
        parent.kill()
        for pid in filter(alive, pids(tmp_path)):
            os.kill(pid, signal.SIGKILL)


def test_a_run_with_workers_is_the_run_without(tmp_path, user, monkeypatch):
    """Training, yardstick and evaluation, all asked of the workers: every bit; a resumed run may have another number of them; they end with it."""
    monkeypatch.setattr("ctrl.torch.pictures.before_and_after", lambda *given: None)
    monkeypatch.setattr("ctrl.torch.pictures.learning_curves", lambda *given: None)
    closed, close = [], Pooled.close
    monkeypatch.setattr(Pooled, "close", lambda self: closed.append(self._pool is not None) or close(self))
    alone = f.Finetune(reward=rewards.Compressibility(), method=methods.ScoreFunction(), cache=tmp_path / "cache", out=tmp_path / "alone", steps=4,
                       paths=6, quick=True, no_plan=True).made_quick()
    many = replace(alone, out=tmp_path / "many", reward_workers=2)
    assert alone.identity() == many.identity()
    first, second = f.finetune(alone), f.finetune(many)
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and closed == [True]
    one, two = ([{**json.loads(row), "seconds": 0} for row in (run.out / "metrics.jsonl").read_text().splitlines()] for run in (alone, many))
    assert one == two


def test_what_needs_the_rewards_gradient_is_refused(user):
    for method in methods.ALL:
        allowed = not isinstance(method, methods.ValueGradient | methods.Pathwise | methods.AdjointMatching)
        said = f"reward_workers: expected 0 with {type(method).__name__}, which asks for the reward's gradient, got 1"
        with nullcontext() if allowed else pytest.raises(ValueError, match=said):
            f.Finetune(reward=rewards.Brightness(), method=method, reward_workers=1)  # differentiable, but not all ask for that
    with pytest.raises(ValueError, match="reward_workers: expected 0 with the class reward, whose classifier is here, got 2"):
        f.Finetune(method=methods.ScoreFunction(), reward_workers=2)
    with pytest.raises(ValueError, match="workers: expected"):
        Pooled(rewards.Brightness(), rewards.Brightness, 0)
