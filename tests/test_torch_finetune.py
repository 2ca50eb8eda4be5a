"""Fine-tuning: the run folder, the same bits after a kill, what stops a run, two processes as one, adapters, precision, data."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import image as picture_files
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ctrl import cli
from ctrl.torch import finetune as f
from ctrl.torch import methods, objectives, pictures, task
from ctrl.torch.chain import sample, simulate
from ctrl.torch.policy import WithoutAdapter

torch.set_num_threads(1)

FILES = {"config.json", "env.json", "metrics.jsonl", "checkpoint.safetensors", "model", "before.png", "after.png", "before_after.png", "curves.png",
         "summary.json"}
NAMED = ("data", "data_dir", "cache", "out", "steps", "paths", "iterations", "checkpoint_every", "lora_rank", "precision", "kl_weight", "seed")


def blobs():
    """60 noisy 6x6 images of four classes, each bright in its own corner: bytes and labels."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 4
    pixels = rng.integers(0, 90, (60, 6, 6))
    for k, label in enumerate(labels):
        top, left = divmod(int(label), 2)
        pixels[k, 3 * top : 3 * top + 3, 3 * left : 3 * left + 3] += 150
    return pixels.astype(np.uint8), labels.astype(np.uint8)


def write_idx(folder, part="train", mark="-", end=""):
    """The blobs as IDX files of the given names."""
    folder.mkdir()
    for kind, values in zip(("images", "labels"), blobs(), strict=True):
        raw = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
        name = f"{part}-{kind}{mark}idx{values.ndim}-ubyte{end}"
        (folder / name).write_bytes(gzip.compress(raw) if end else raw)
    return folder


def arguments(settings, *more):
    """The command line of quick settings."""
    return ["finetune", "--quick", *(word for name in NAMED for word in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))), *more]


def metrics(out):
    """Rows of metrics.jsonl without their times."""
    return [{k: x for k, x in json.loads(line).items() if k != "seconds"} for line in (out / "metrics.jsonl").read_text().splitlines()]


def results(out):
    """What two runs that are the same share to the bit."""
    summary = json.loads((out / "summary.json").read_text())
    del summary["seconds"]
    return (out / "model" / "model.safetensors").read_bytes(), metrics(out), summary


def counts(checkpoint):
    with safe_open(checkpoint, "pt") as file:
        return json.loads(file.metadata()["counts"])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A tiny run by the command line: its settings, task, summary and what was printed."""
    folder = tmp_path_factory.mktemp("finetune")
    settings = f.Finetune(data="mnist", data_dir=write_idx(folder / "data"), cache=folder / "cache", out=folder / "out", steps=5, paths=8,
                          checkpoint_every=2, quick=True).made_quick()
    with redirect_stdout(io.StringIO()) as printed:
        assert cli.main(arguments(settings)) == 0
    summary = json.loads((settings.out / "summary.json").read_text())
    settings = replace(settings, no_plan=True)  # from here on
    return SimpleNamespace(settings=settings, task=task.prepare(settings), summary=summary, printed=printed.getvalue())


@pytest.fixture
def undrawn(monkeypatch):
    """Without pictures, which take longer than a tiny run."""
    for name in ("before_and_after", "learning_curves"):
        monkeypatch.setattr(pictures, name, lambda *given: None)


def training(done, accelerator=None, **changes):
    return f.Training(done.task, replace(done.settings, **changes), accelerator or f.Alone(torch.device("cpu")))


def trained(done, updates, **changes):
    out = training(done, **changes)
    for _ in range(updates):
        out.update()
    return out


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ------------------------------------------------------------------------------------------- a run and its folder


def test_run_folder(done):
    """Files, metrics that agree with one another, and pictures that are the models' own images."""
    out, summary = done.settings.out, done.summary
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "config.json").read_text()) == done.settings.identity()
    surroundings = json.loads((out / "env.json").read_text())
    assert set(surroundings) == {"versions", "platform", "processor", "cores", "commit", "dirty", "threads", "device"}
    assert surroundings["threads"] == 1 and len(surroundings["commit"] or 40 * " ") == 40
    assert {"torch", "accelerate", "peft", "safetensors", "scores-as-actions"} < set(surroundings["versions"])
    rows = metrics(out)
    assert [(row["iteration"], row["queries"]) for row in rows] == [(k, 8 * k) for k in range(1, 5)] and counts(out / "checkpoint.safetensors") == {
        "iteration": 4, "queries": 32}
    assert set(rows[0]) - {"ode_reward"} == set(rows[1]) == {"iteration", "queries", "reward", "objective", "kl_mean", "kl_median", "kl_max",
        "judged_share", "loss", "gradient_norm", "gradient_signal", "gradient_noise", "value_loss"}
    assert ["ode_reward" in row for row in rows] == [True, False, False, False]
    assert all(row["objective"] == pytest.approx(row["reward"] - 0.5 * row["kl_mean"], rel=1e-5) for row in rows)
    assert rows[0]["kl_max"] < 1e-10 < rows[-1]["kl_median"] <= rows[-1]["kl_max"]  # the first batch is the pre-trained model's
    assert summary["updates"] == 4 and summary["queries"] == 32 and summary["yardstick"]["ess"] > 1 and "queries_to_share_0.8" in summary
    for model in ("tuned", "pretrained", "tuned_ode"):
        assert summary[model]["regret"] == pytest.approx(summary["yardstick"]["objective"] - summary[model]["objective"])
        assert 0 <= summary[model]["judged_share"] <= 1 and summary[model]["kl_median"] <= summary[model]["kl_max"]
    plan, _, table = done.printed.partition("ValueGradient:")
    assert plan.startswith("plan: peak memory") and f"updates {32 * (1 + 1 + 5) + 8}," in plan  # samples, slopes, predictions at 5 times; eta = 0
    shown = ("ValueGradient:" + table).splitlines()
    assert shown[0].startswith("ValueGradient: 4 updates, 32 reward queries") and [line.split()[0] for line in shown[2:]] == [
        "pretrained", "tuned", "tuned_ode", "optimum"]

    averaged = f.load_policy(out / "model")
    noise, grid = done.settings.noise(task.PICTURES, 64), f.sampling_grid(task.SCHEDULE, 5)
    for name, policy, other in (("before", done.task.base, averaged), ("after", averaged, done.task.base)):
        shown, right, wrong = picture_files.imread(out / f"{name}.png")[..., 0], *(pictures._enlarged(pictures.tile(
            simulate(done.task.problem, model, grid, noise).terminal)) for model in (policy, other))
        assert np.abs(shown - right).max() < 2 / 255 < np.abs(shown - wrong).max()
    assert all(picture_files.imread(out / name).std() > 0.1 for name in ("before_after.png", "curves.png"))


def test_seeds_reproduce_a_run(done, tmp_path, undrawn):
    """From nothing, in another folder with an empty cache: every bit; another seed: other numbers from the first update on."""
    again = replace(done.settings, out=tmp_path / "again", cache=tmp_path / "cache")
    f.finetune(again)
    assert results(again.out) == results(done.settings.out)
    assert training(done, seed=1).update()["reward"] != training(done).update()["reward"] == metrics(again.out)[0]["reward"]


def test_evaluation_of_the_pretrained_model(done):
    """Regret is J* - E r, with no KL, of the model itself and of a copy; each number from its definition, on the evaluation's own noise."""
    settings, problem = done.settings, done.task.problem
    row = task.evaluate(done.task, done.task.base, done.task.base, settings)
    assert row == done.summary["pretrained"] and row["kl_mean"] == row["kl_max"] == 0 and row["objective"] == row["reward"]
    run = sample(problem, done.task.base, f.sampling_grid(task.SCHEDULE, 5), settings.noise(task.EVALUATION, 64))
    images, r = run.states[:, -1], run.reward.double().numpy()
    judged = done.task.judge(images).argmax(1) == settings.reward.label
    best = done.task.yardstick
    assert row["reward"] == pytest.approx(r.mean(), rel=1e-5) and row["objective_error"] == pytest.approx(r.std(ddof=1) / 8, rel=1e-5)
    assert row["regret"] == best.objective - row["objective"]
    assert row["regret_error"] == pytest.approx((best.objective_error**2 + r.var(ddof=1) / 64) ** 0.5, rel=1e-5)
    assert row["judged_share"] == pytest.approx(judged.double().mean())
    twin = task.evaluate(done.task, copy.deepcopy(done.task.base), done.task.base, settings)
    assert twin == row and task.evaluate(done.task, trained(done, 3).policy, done.task.base, settings)["kl_mean"] > 1e-6  # planted: it has moved

    coarse = task.evaluate(done.task, done.task.base, done.task.base, settings, steps=3, eta=0.0)
    ode = simulate(replace(problem, eta=0.0), done.task.base, f.sampling_grid(task.SCHEDULE, 3), settings.noise(task.EVALUATION, 64))
    assert coarse["reward"] == float(ode.reward.mean()) != row["reward"]


def test_pair_distance():
    """Over pairs of different images, not over all pairs."""
    x = torch.randn(7, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    pairs = [float((x[i] - x[j]).norm()) for i in range(7) for j in range(i)]
    assert task.pair_distance(x) == pytest.approx(np.mean(pairs)) and task.pair_distance(x[:1]) == 0
    assert task.pair_distance(x, most=3) == pytest.approx(np.mean(pairs[:3]))


def test_queries_to_share():
    """The first update at which the last 500 images or more are accepted more often than the share."""
    def rows(shares, paths=100):
        return [{"queries": paths * (k + 1), "judged_share": share} for k, share in enumerate(shares)]

    assert f.queries_to_share(rows([1.0] * 4), 0.8) is None  # four hundred say nothing yet
    assert f.queries_to_share(rows([1.0] * 5), 0.8) == 500
    assert f.queries_to_share(rows([0, 0, 0, *[1.0] * 9]), 0.8) == 800
    assert f.queries_to_share(rows([0.8] * 20), 0.8) is None and f.queries_to_share(rows([0.81] * 20, paths=600), 0.8) == 600
    assert f.queries_to_share(rows([0.0, 1.0, 0.9, 0.9, 0.9, 0.5, 0.9]), 0.8) == 600


# ------------------------------------------------------------------------------------------- the model that is kept


@pytest.mark.parametrize("rank", [0, 2])
def test_saved_model_is_the_model(done, tmp_path, undrawn, rank):
    """Bit for bit the averaged policy of the last checkpoint, to whose numbers the summary belongs; an adapter with its base beside it."""
    settings = replace(done.settings, lora_rank=rank, out=tmp_path / "out") if rank else done.settings
    summary = f.finetune(settings) if rank else done.summary
    last = training(done, lora_rank=rank)
    last.load(settings.out / "checkpoint.safetensors")
    loaded = f.load_policy(settings.out / "model")
    times = last.problem.times(last.grid, torch.empty(0))[:-1]
    x = torch.randn(4, 5, *done.task.images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(times, x), last.average(times, x)) and not loaded.trainable()
        assert not torch.equal(loaded(times, x), last.policy(times, x))  # planted: the last weights for their average
        assert not torch.equal(loaded(times, x), done.task.base(times, x))
        if rank:
            assert f.digest(f.load_denoiser(settings.out / "model" / "base")) == f.digest(done.task.base.network)
            assert torch.equal(WithoutAdapter(loaded)(times, x), done.task.base(times, x))
    assert task.evaluate(done.task, loaded, done.task.base, settings) == summary["tuned"]
    assert all(path.suffix in (".json", ".safetensors", ".md") for path in (settings.out / "model").rglob("*.*"))  # nothing that runs code


def test_reference_is_unchanged_by_training(done):
    """The base model keeps its bits; with an adapter it is the trained network without it, and only the adapter is trained and kept."""
    before = f.digest(done.task.base)
    for rank in (0, 2):
        last = trained(done, 3, lora_rank=rank)
        reference, start = last.problem.pretrained, training(done, lora_rank=rank)
        times = last.problem.times(last.grid, torch.empty(0))[:-1]
        x = torch.randn(4, 5, *done.task.images.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(reference(times, x), done.task.base(times, x)) and torch.equal(start.policy(times, x), done.task.base(times, x))
            assert not torch.equal(last.policy(times, x), reference(times, x))
    assert f.digest(done.task.base) == before and isinstance(reference, WithoutAdapter)
    assert last.policy.trainable() and all(("lora_" in name) == p.requires_grad for name, p in last.policy.named_parameters())
    kept = {name for name in last.tensors() if name.startswith(("policy.", "average."))}
    assert kept and all("lora_" in name for name in kept) and "value.core.first.weight" not in kept
    with torch.no_grad():
        next(p for p in last.policy.network.parameters() if not p.requires_grad).add_(1)  # planted: a base weight that moves
        assert not torch.equal(reference(times, x), done.task.base(times, x))


# ------------------------------------------------------------------------------------------- going on


def forget_policy(restored):
    restored.optimiser.state.clear()


def forget_value_optimiser(restored):
    restored.value_optimiser.state.clear()


def forget_average(restored):
    restored.average.load_state_dict(restored.policy.state_dict())


def forget_value(restored):
    restored.value.load_state_dict(training(SimpleNamespace(task=restored.task, settings=restored.settings)).value.state_dict())


def forget_iteration(restored):
    restored.iteration -= 1


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpoint_is_all_that_the_next_update_depends_on(done, tmp_path, rank):
    """Two updates, a checkpoint, one more from it: the bits of three; a checkpoint without any of its parts gives others."""
    expected, path = trained(done, 3, lora_rank=rank).tensors(), tmp_path / "checkpoint.safetensors"
    trained(done, 2, lora_rank=rank).save(path)

    def resumed(forget):
        out = training(done, lora_rank=rank)
        out.load(path)
        forget(out)
        out.update()
        return out.tensors()

    assert same(resumed(lambda restored: None), expected)
    for forget in (forget_policy, forget_value_optimiser, forget_average, forget_value, forget_iteration):
        assert not same(resumed(forget), expected), forget.__name__


@pytest.mark.parametrize("method", methods.ALL, ids=lambda method: type(method).__name__)
def test_every_method_goes_on(done, tmp_path, method):
    expected = trained(done, 2, method=method).tensors()
    trained(done, 1, method=method).save(tmp_path / "checkpoint.safetensors")
    out = training(done, method=method)
    out.load(tmp_path / "checkpoint.safetensors")
    row = out.update()
    assert same(out.tensors(), expected) and row["iteration"] == 2
    assert not same(trained(done, 2, method=method, seed=1).tensors(), expected)


KILLED = r"""
import dataclasses, json, os, signal, sys, time
import ctrl, torch
from ctrl import cli
from ctrl.torch import finetune as f, pictures
from safetensors import safe_open

# What loads on first use, once for all children.
torch.optim.Adam([torch.zeros(1, requires_grad=True)])
ctrl.Noise(0, 2).start(1)

settings, out = cli.HEAVY["finetune"].settings(json.loads(sys.argv[1])[1:], "ctrl finetune"), sys.argv[2]
settings = dataclasses.replace(settings, no_plan=True)
checkpoint, metrics = os.path.join(out, "checkpoint.safetensors"), os.path.join(out, "metrics.jsonl")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def between_the_steps_of_an_update():
    descend, seen = f.Training._descend, []
    def counted(self, losses, optimiser, *given):
        if isinstance(self.accelerator, f.Accelerator):
            seen.append(optimiser)
            if len(seen) == 5:
                die()
        return descend(self, losses, optimiser, *given)
    f.Training._descend = counted

def in_the_middle_of_a_row():
    def half(self, row):
        with self.metrics.open("a") as file:
            if row["iteration"] == 3:
                file.write('{"iteration": 3, "quer')
                file.flush()
                die()
            file.write(json.dumps(row) + "\n")
    f.RunFolder.add = half

def in_the_middle_of_a_checkpoint(after=False):
    move = os.replace
    def dying(source, target):
        if str(target) == checkpoint:
            if after:
                move(source, target)
            else:
                os.truncate(source, os.path.getsize(source) // 2)
            die()
        move(source, target)
    os.replace = dying

def after_a_checkpoint():
    in_the_middle_of_a_checkpoint(after=True)

def in_the_evaluation():
    f.measured = lambda *given: die()

def slowly():
    add = f.RunFolder.add
    f.RunFolder.add = lambda self, row: (add(self, row), time.sleep(60))
    pictures.learning_curves = lambda *given: time.sleep(60)

def lines():
    try:
        with open(metrics, "rb") as file:
            return file.read().count(b"\n")
    except FileNotFoundError:
        return 0

def state():
    update = 0
    if os.path.exists(checkpoint):
        with safe_open(checkpoint, "pt") as file:
            update = json.loads(file.metadata()["counts"])["iteration"]
    return [lines(), update, sum(".partial" in name for name in os.listdir(out)), os.path.exists(os.path.join(out, "summary.json"))]

def run(prepare=lambda: None, resume=True, until=None):
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        prepare()
        os._exit(dataclasses.replace(settings, resume=resume).run())
    if until is not None:
        while not until() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), *state()]), flush=True)

run(between_the_steps_of_an_update, resume=False)
run(slowly, until=lambda: lines() >= 1)
run(in_the_middle_of_a_row)
run(in_the_middle_of_a_checkpoint)
run(after_a_checkpoint)
run(in_the_evaluation)
run(slowly, until=lambda: os.path.exists(os.path.join(out, "before_after.png")))
run()
"""


def test_killed_at_any_moment(done, tmp_path):
    """kill -9 between the two steps of an update, from outside, within a row, within a checkpoint, after one, in the evaluation and in the
    pictures: what --resume arrives at is the uninterrupted run of another process, every bit of it."""
    out = tmp_path / "out"
    command = json.dumps(arguments(replace(done.settings, out=out)))
    ran = subprocess.run([sys.executable, "-c", KILLED, command, str(out)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    states = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [state[0] for state in states] == [-9] * 7 + [0] and [state[-1] for state in states] == [False] * 7 + [True]
    first, outside, row, half, after, evaluating, drawing, last = (state[1:-1] for state in states)  # rows, update of the checkpoint, partial files
    assert first == [0, 0, 0] and outside == [1, 0, 0]
    assert row[:2] == [2, 2] and half == [4, 2, 1] and after == evaluating == drawing == last == [4, 4, 0]
    assert results(out) == results(done.settings.out) and {path.name for path in out.iterdir()} == FILES
    assert same(load_file(out / "checkpoint.safetensors"), load_file(done.settings.out / "checkpoint.safetensors"))


def test_a_half_written_checkpoint_never_has_its_name(done, tmp_path, monkeypatch):
    """A disk that fills up leaves the old file, says so, and leaves nothing beside it."""
    path = tmp_path / "checkpoint.safetensors"
    last = trained(done, 1)
    last.save(path)
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(before[: len(before) // 2])
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(task, "save_file", full)
    last.update()
    with pytest.raises(f.TrainingStopped, match=rf"update 2 of ValueGradient: {path}: no space .*; last good checkpoint: {path} \(update 1\)"), \
            last.stopping("update 2", path):
        last.save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name] and last.kept == 1


def test_a_finished_run_is_not_done_again(done, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.settings.out.iterdir()}
    monkeypatch.setattr(f, "prepare", None)
    assert cli.main(arguments(done.settings, "--resume")) == 0
    assert done.printed.endswith(capsys.readouterr().out) and {path: path.stat().st_mtime_ns for path in done.settings.out.iterdir()} == before


# ------------------------------------------------------------------------------------------- what stops a run

REWARDS = """
from pathlib import Path

calls = 0

def fragile(images):
    global calls
    calls += 1
    r = images.mean((1, 2, 3))
    if calls >= 11 and Path(__file__).with_name("broken").exists():  # seven calls are the plan's, one the deterministic sampler's
        r[0] = float("inf")
    return r

def distant(images):
    global calls
    calls += 1
    if calls >= 11 and Path(__file__).with_name("broken").exists():
        raise ConnectionError("no answer from the reward server")
    return images.mean((1, 2, 3))

def hopeless(images):
    return images.mean((1, 2, 3)) * float("nan")

def plain(images):
    return images.numpy().mean((1, 2, 3))
"""


@pytest.fixture
def user(done, tmp_path, undrawn):
    """(name, words of the command, settings) -> the exit code of a run with a user's reward of that name."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def run(name, *words, method="score-function", **changes):
        settings = replace(done.settings, out=tmp_path / "out", **changes)
        return cli.main(arguments(settings, *words, f"method:{method}", "reward:user", "--reward.function", f"{tmp_path / 'rewards.py'}:{name}"))

    return run


def test_infinite_reward_stops_with_its_place(user, tmp_path, capsys):
    """One line with the step, the method and what is kept, exit code 1; --resume goes on from there to the bits of a run without the failure."""
    (tmp_path / "broken").touch()
    assert user("fragile", checkpoint_every=25) == 1
    out, checkpoint = tmp_path / "out", tmp_path / "out" / "checkpoint.safetensors"
    assert capsys.readouterr().err == ("ctrl: training stopped: update 3 of ScoreFunction: rewards: expected finite numbers, got 1 of 8 with NaN or "
                                       f"infinity, in fragile; last good checkpoint: {checkpoint} (update 2)\n")
    assert counts(checkpoint)["iteration"] == 2 == len(metrics(out)) and not (out / "summary.json").exists()
    (tmp_path / "broken").unlink()
    assert user("fragile", "--resume", checkpoint_every=25) == 0
    shutil.move(out, tmp_path / "resumed")
    assert user("fragile") == 0 and results(out) == results(tmp_path / "resumed")


def test_reward_out_of_reach_stops_with_everything_saved(user, tmp_path, capsys, monkeypatch):
    """Asked three times in all, then one line and exit code 1; what was reached is kept, and a resumed run goes on to the same bits."""
    slept = []
    monkeypatch.setattr("ctrl.torch.rewards.time.sleep", slept.append)
    (tmp_path / "broken").touch()
    assert user("distant", checkpoint_every=25) == 1
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    assert capsys.readouterr().err == ("ctrl: training stopped: update 3 of ScoreFunction: no answer from the reward server; "
                                       f"last good checkpoint: {checkpoint} (update 2)\n")
    assert slept == [1, 2] and counts(checkpoint)["iteration"] == 2
    (tmp_path / "broken").unlink()
    assert user("distant", "--resume", checkpoint_every=25) == 0
    shutil.move(tmp_path / "out", tmp_path / "resumed")
    assert user("distant") == 0 and results(tmp_path / "out") == results(tmp_path / "resumed")


def test_reward_that_is_never_finite(user, tmp_path, capsys):
    """What the trial sees of an untrained model's images is no refusal: the first update says it."""
    assert user("hopeless") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "update 1 of ScoreFunction: rewards: expected finite" in error and "last good checkpoint: none yet" in error


def test_infinite_loss_moves_nothing(done, tmp_path, monkeypatch):
    """Neither the policy nor the value takes a step; the message says which number it was."""
    last = trained(done, 2)
    before = {name: x.clone() for name, x in last.tensors().items()}
    loss = objectives.ValueGradient.loss
    monkeypatch.setattr(objectives.ValueGradient, "loss", lambda self, run: loss(self, run) * torch.tensor([1.0] * 7 + [torch.inf]))
    with pytest.raises(f.TrainingStopped, match=r"update 3 of ValueGradient: loss is -?inf|nan; last good checkpoint: none yet"):
        f._train(last, None, tmp_path / "checkpoint.safetensors")
    assert same(last.tensors(), before)
    monkeypatch.setattr(objectives.ValueGradient, "loss", lambda self, run: {}["score"])
    with pytest.raises(KeyError) as raised:  # other people's error keeps its name and its place, and says ours
        f._train(last, None, tmp_path / "checkpoint.safetensors")
    assert raised.value.__notes__ == ["update 3 of ValueGradient: training stopped; last good checkpoint: none yet"]


@pytest.mark.parametrize("sound", [None, lambda training: True], ids=["as it is", "planted"])
def test_a_policy_that_diverged_replaces_no_checkpoint(done, tmp_path, monkeypatch, undrawn, sound):
    """Planted: keeping whatever was reached, from where no resume gets any further."""
    update = f.Training.update

    def diverges(self):
        row = update(self)
        if self.iteration == 3:
            with torch.no_grad():
                self.policy.trainable()[0].fill_(1e30)
        return row

    monkeypatch.setattr(f.Training, "update", diverges)
    if sound is not None:
        monkeypatch.setattr(f.Training, "sound", sound)
    settings = replace(done.settings, out=tmp_path / "out")
    with pytest.raises(f.TrainingStopped, match="update 4 of ValueGradient: images: expected finite pixels"):
        f.finetune(settings)
    monkeypatch.undo()
    assert counts(settings.out / "checkpoint.safetensors")["iteration"] == (2 if sound is None else 3)
    again = training(done)
    again.load(settings.out / "checkpoint.safetensors")
    assert again.sound() == (sound is None)


def test_evaluation_that_is_not_finite(done, tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(f, "measured", lambda *given: {"reward": float("nan")})
    with pytest.raises(f.TrainingStopped, match=r"^evaluation of ValueGradient: reward is nan; last good checkpoint: .*tensors \(update 4\)$"):
        f.finetune(replace(done.settings, out=tmp_path / "out"))
    assert not (tmp_path / "out" / "summary.json").exists()


def test_refusals_before_the_long_work(done, user, tmp_path, capsys):
    """Other runs' folders, settings that changed, what cannot be differentiated or judged: one line and exit code 2, and nothing was pre-trained."""
    def refused(code):
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and error.startswith("ctrl: error: "), error
        return error

    main, settings = cli.main, replace(done.settings, cache=tmp_path / "cache")
    assert f"out: expected a new folder (or --resume to go on with the run in it), got {settings.out}" in refused(main(arguments(settings)))
    words = arguments(replace(settings, steps=4, seed=2), "--resume", "method:ppo")
    assert f"expected the settings of the run in {settings.out}, got other values of method, steps, seed" in refused(main(words))
    assert "expected a differentiable reward" in refused(user("plain", method="value-gradient", cache=tmp_path / "cache"))
    assert f"reward: expected misspelt in the file of {tmp_path / 'rewards.py'}:misspelt, got none" in refused(user("misspelt"))
    other = replace(settings, out=tmp_path / "other")
    assert "label: expected a class of the data (0 ... 3), got 7" in refused(main(arguments(other, "reward:class", "--reward.label", "7")))
    assert "eta: expected eta > 0" in refused(main(arguments(other, "--eta", "0", "method:ppo")))
    assert "cache: expected a writable folder" in refused(main(arguments(replace(other, cache="/dev/null/cache"))))
    assert not list((tmp_path / "cache").glob("denoiser*"))
    assert not any((folder / "config.json").exists() for folder in (other.out, tmp_path / "out"))


def test_checkpoint_of_another_base_model(done, tmp_path):
    """Same settings, another pre-trained model in the cache: refused by name, not continued."""
    last = trained(done, 1)
    last.save(tmp_path / "checkpoint.safetensors")
    other = training(SimpleNamespace(task=replace(done.task, base=copy.deepcopy(done.task.base)), settings=done.settings))
    other.load(tmp_path / "checkpoint.safetensors")
    with torch.no_grad():
        next(iter(other.task.base.parameters())).mul_(1 + 1e-6)
    with pytest.raises(ValueError, match="resume: expected the pre-trained model that .* began with, got another one from"):
        other.load(tmp_path / "checkpoint.safetensors")


# ------------------------------------------------------------------------------------------- processes


def gradient(part):
    """What the last step of the policy was taken along, (p,)."""
    return torch.cat([p.grad.flatten() for p in part.policy.trainable()])


@pytest.fixture
def on_two(done, two_processes):
    """One update by two processes, not clipped: the row, the gradient and the tensors of both."""
    def run(method, factor=1.0):
        return two_processes(lambda accelerator: training(done, accelerator, method=method, clip_norm=1e9),
                             lambda part: (part.update(), gradient(part), part.tensors()), factor)

    return run


def distance(rows, expected):
    """The largest difference of two runs' metrics, relative to the largest of its kind."""
    assert [{*row} for row in rows] == [{*row} for row in expected]
    largest = {name: max(abs(row[name]) for row in expected if name in row) or 1 for name in expected[0]}
    return max(abs(row[name] - x) / largest[name]
               for row, right in zip(rows, expected, strict=True) for name, x in right.items() if name != "seconds")


@pytest.mark.parametrize("method", methods.ALL, ids=lambda method: type(method).__name__)
def test_two_processes_take_the_gradient_of_the_joined_batch(done, on_two, method):
    """To float32 rounding, for every method, and end with the very same parameters as each other."""
    whole = training(done, method=method, clip_norm=1e9)
    row, expected = whole.update(), gradient(whole)

    def error(both):
        return float((both[0][1] - expected).norm() / expected.norm())

    both = on_two(method)
    assert error(both) < 1e-6 and distance([both[0][0]], [row]) < 1e-6 and same(both[0][2], both[1][2])
    assert error(on_two(method, factor=2.0)) > 0.5  # planted: the sum of the gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f, "sample", lambda *given, joined, reward: sample(*given))  # planted: each couples the paths of its own half alone
        assert (error(on_two(method)) > 0.1) == isinstance(method, (methods.ScoreFunction, methods.PPO, methods.RewardWeighted))


ENDS = """
from pathlib import Path

from ctrl.cli import entry

try:
    entry()
finally:
    left = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    assert not any("gloo" in name for name in left), left
"""


def test_torchrun(done, tmp_path):
    """The same command under torchrun, from gzipped files of the other names: one run folder, the metrics of one process, no thread that talks on."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    settings = replace(done.settings, out=tmp_path / "out", data_dir=write_idx(tmp_path / "test", "t10k", ".", ".gz"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), *arguments(settings)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert [ran.stdout.count(words) for words in ("plan: peak memory", "reward queries")] == [1, 2]
    assert {path.name for path in settings.out.iterdir()} == FILES
    assert distance(metrics(settings.out), metrics(done.settings.out)) < 1e-4
    one, two = (load_file(out / "model" / "model.safetensors") for out in (done.settings.out, settings.out))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)


def test_paths_are_shared_evenly(done, tmp_path, monkeypatch):
    monkeypatch.setattr(f, "Accelerator", lambda **given: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="paths: expected a multiple of 3 processes, got 8"):
        f.finetune(replace(done.settings, out=tmp_path))


def test_every_process_knows_what_is_kept(done, tmp_path, monkeypatch):
    """A failure on any of them names the checkpoint that the main process wrote; the others write nothing."""
    other, path = training(done, checkpoint_every=2), tmp_path / "checkpoint.safetensors"
    other.accelerator = SimpleNamespace(**{name: getattr(other.accelerator, name) for name in ("device", "process_index", "num_processes", "gather",
                                                                                                 "reduce")}, is_main_process=False)
    update = f.Training.update

    def fails(self):
        if self.iteration == 3:
            raise FloatingPointError("reward is nan")
        return update(self)

    monkeypatch.setattr(f.Training, "update", fails)
    with pytest.raises(f.TrainingStopped, match=rf"update 4 of ValueGradient: reward is nan; last good checkpoint: {path} \(update 2\)"):
        f._train(other, None, path)
    assert not path.exists()


# ------------------------------------------------------------------------------------------- precision, data, surroundings


@pytest.mark.parametrize("rank", [0, 2])
def test_half_precision_networks(done, rank):
    """Layers compute in bfloat16; states, actions, log-densities, KL and everything that is kept are float32, near the run without it."""
    settings, seen = replace(done.settings, precision="bf16", lora_rank=rank), []
    half = task.prepare(settings)
    assert half.base.autocast == torch.bfloat16 and torch.equal(half.reference, done.task.reference)
    coarse, fine = f.Training(half, settings, f.Alone(torch.device("cpu"))), training(done, lora_rank=rank)
    for layer in (m for m in coarse.policy.modules() if isinstance(m, torch.nn.Linear)):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    [run] = coarse._batch(0).each(lambda run: run)
    assert all(y.dtype == torch.float32 for y in (run.states, run.actions, run.mu, run.s, run.log_ratio, run.k1, run.kl, run.objective))
    assert torch.bfloat16 in seen
    rows, right = [coarse.update() for _ in range(2)], [fine.update() for _ in range(2)]
    assert 0 < abs(rows[1]["reward"] / right[1]["reward"] - 1) < 0.02 and rows[0]["kl_max"] < 1e-10
    assert all(x.dtype == torch.float32 for x in coarse.tensors().values())


@pytest.mark.parametrize(("part", "mark", "end"), [("train", "-", ".gz"), ("train", ".", ""), ("t10k", "-", "")])
def test_mnist_files_of_any_name_are_the_same_data(done, tmp_path, part, mark, end):
    folder = write_idx(tmp_path / "mnist", part, mark, end)
    found = task.outline(replace(done.settings, data_dir=folder))
    assert torch.equal(found.images.pixels, done.task.images.pixels) and found.problem.rewards(found.images.pixels).equal(
        done.task.problem.rewards(found.images.pixels))


def test_folder_of_images(done, tmp_path, undrawn):
    """Any folder, resized, with a reward that knows no classes: a run without a judge; at lambda = 0 also without a yardstick."""
    (tmp_path / "pictures").mkdir()
    for k, pixels in enumerate(blobs()[0][:20]):
        Image.fromarray(np.kron(pixels, np.ones((2, 2), np.uint8))).save(tmp_path / "pictures" / f"{k}.png")
    settings = replace(done.settings, data="folder", data_dir=tmp_path / "pictures", image_size=4, out=tmp_path / "out", cache=tmp_path / "cache",
                       kl_weight=0.0)
    assert cli.main(arguments(settings, "--image-size", "4", "reward:brightness")) == 0
    summary = json.loads((settings.out / "summary.json").read_text())
    assert not {"judged_share", "regret"} & set(summary["tuned"]) and "yardstick" not in summary and summary["reward"] == "Brightness"
    assert 0 < summary["pretrained"]["reward"] < 1 and "judged_share" not in metrics(settings.out)[0]
    assert f.load_denoiser(settings.out / "model").shape == (1, 4, 4)
    with pytest.raises(ValueError, match="reward: expected data with classes for a class reward, got pictures, which has none"):
        f.finetune(replace(settings, out=tmp_path / "no"))


def test_a_users_reward_is_known_by_its_content(tmp_path):
    (tmp_path / "r.py").write_text("def r(x): return x.mean((1, 2, 3))")
    settings = f.Finetune(reward=task.UserReward(f"{tmp_path / 'r.py'}:r"))
    before = settings.identity()
    (tmp_path / "r.py").write_text("def r(x): return -x.mean((1, 2, 3))")
    assert before != settings.identity() and json.dumps(before)
    same_run = replace(settings, threads=2, cache=tmp_path, out=tmp_path, checkpoint_every=1, resume=True, tensorboard=True)
    assert same_run.identity() == settings.identity() != replace(settings, seed=1).identity()


def test_tensorboard(done, tmp_path, monkeypatch, undrawn, capsys):
    """Every metric of every update; a line that says what is missing, before any work."""
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append(self.folder.name)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    settings = replace(done.settings, out=tmp_path / "out", iterations=1)
    assert cli.main(arguments(settings, "--tensorboard")) == 0
    assert {*written} == {(name, 1) for name in (*metrics(settings.out)[0], "seconds")} | {"tensorboard"}
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # not installed
    capsys.readouterr()
    assert cli.main(arguments(replace(settings, out=tmp_path / "other"), "--tensorboard")) == 2
    assert capsys.readouterr().err == "ctrl: error: the module tensorboard is missing; pip install tensorboard\n"
    assert not list((tmp_path / "other").iterdir())


def test_progress_bar(monkeypatch):
    """On a terminal after a second, with the numbers of the last update; nothing in a file, nor on the other processes."""
    def shown(terminal, **how):
        clock, stream = [0.0], io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
        with task.progress("PPO", 4, **how) as step:
            for k in range(4):
                clock[0] += 0.6
                step(1, reward=-1.5 + k)
        return stream.getvalue()

    bar = shown(terminal=True)
    assert "PPO" in bar and "3/4" in bar and re.search(r"reward=0?\.5", bar)
    assert shown(terminal=False) == shown(terminal=True, shown=False) == ""
