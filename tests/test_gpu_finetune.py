"""The benchmark of fine-tuning on a GPU: a tiny one runs here, FLOPs are those counted by hand, and no tuning changes what is computed."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ctrl.torch.finetune import queries_to_share
from ctrl.torch.methods import ALL, ScoreFunction
from ctrl.torch.networks import UNetDenoiser
from ctrl.torch.pretrain import load_denoiser, save_denoiser

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("gpu_finetune", ROOT / "benchmarks" / "gpu_finetune.py")
bench = sys.modules["gpu_finetune"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

torch.set_num_threads(1)
OPTIONAL = {"method", "share", "reward", "kl", "share_wanted", "queries_to_share", "seconds_to_share", "stopped", "cuda", "cudnn",
            "planned_memory_bytes"}
UNKNOWN_HERE = {"peak_flops", "mfu"}  # a CPU has no entry in the table of peaks


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def rows(folder):
    bench.main(tiny=True, out=folder / "rows.csv", rounds=2, cache=folder / "cache")
    return table(folder / "rows.csv")


@pytest.fixture(scope="module")
def tiny(folder, rows):
    """What the rows were measured on."""
    return bench.Bench(replace(bench.TINY_START, cache=folder / "cache"), Accelerator(cpu=True), rounds=2)


# ------------------------------------------------------------------------------------------- rows


def test_rows_are_complete(rows):
    """One a case, in their order; every number finite; all methods train; versions and seed stand beside."""
    assert [row["case"] for row in rows] == [case.name for case in bench.TINY]
    assert [row["method"] for row in rows if row["work"] == "to share"] == [bench.name_of(method) for method in ALL]
    for row in rows:
        assert not row["stopped"] and row["device"] == "cpu" and row["seed"] == "0" and row["torch"] == torch.__version__ and row["machine"]
        empty = {name for name, value in row.items() if not value}
        assert empty <= OPTIONAL | UNKNOWN_HERE and empty >= UNKNOWN_HERE
        for name in ("warm_up_seconds", "seconds", "images_per_second", "network_flops", "flops_per_image", "peak_memory_bytes"):
            assert 0 < float(row[name]) < math.inf


def test_rows_are_consistent(rows):
    for row in rows:
        calls, images, seconds = int(row["calls"]), int(row["images"]), float(row["seconds"])
        assert images == calls * int(row["batch"])
        assert float(row["images_per_second"]) * seconds == pytest.approx(images, rel=1e-12)
        assert float(row["calls_per_second"]) * seconds == pytest.approx(calls, rel=1e-12)
        assert float(row["flops_per_second"]) == pytest.approx(float(row["flops_per_image"]) * images / seconds, rel=1e-12)
        assert float(row["slowest_over_fastest"]) >= 1
        if row["work"] == "to share":
            assert 0 <= float(row["share"]) <= 1 and float(row["kl"]) >= 0 and row["share_wanted"]
            assert calls <= bench.TINY_START.iterations and (calls == bench.TINY_START.iterations or row["queries_to_share"])
            if row["queries_to_share"]:
                assert int(row["queries_to_share"]) == images and float(row["seconds_to_share"]) == seconds
        else:
            assert calls == 2 and not row["share_wanted"] and not row["queries_to_share"]
    assert any(row["queries_to_share"] for row in rows)


def test_a_second_call_goes_on(rows, folder, monkeypatch, capsys):
    """Finished rows stay as they are; one that is missing is measured, and it alone; another seed has no rows yet; one failure spoils no other."""
    out, before = folder / "rows.csv", (folder / "rows.csv").read_bytes()
    done, drawn = [], []

    def pretend(case, own):
        done.append(case.name)
        if len(done) == 2:
            raise RuntimeError("a kernel that does not compile")
        return replace(case.blank(own), stopped="out of memory")

    monkeypatch.setattr(bench, "run", pretend)
    monkeypatch.setattr(bench, "draw", lambda rows, path: drawn.append(rows))
    with monkeypatch.context() as patched:
        patched.setattr(bench, "outline", lambda *_: pytest.fail("the model of a finished benchmark was asked for"))
        bench.main(tiny=True, out=out, rounds=2, cache=folder / "cache")
    assert not done and out.read_bytes() == before and drawn == [rows]
    short = folder / "short.csv"
    bench.write(short, rows[:1] + rows[2:])
    bench.main(tiny=True, out=short, rounds=2, cache=folder / "cache")
    assert done == [rows[1]["case"]] and len(table(short)) == len(rows) and table(short)[-1]["stopped"] == "out of memory"
    done.clear()
    with pytest.raises(SystemExit, match=r"1 of 2 cases failed: sampling bf16"):
        bench.main(tiny=True, out=short, only=("sampling",), rounds=3, cache=folder / "cache")
    assert len(done) == 2 and len(table(short)) == len(rows) + 1  # another number of rounds is another row
    assert [row["case"] for row in drawn[-1]] == done[:1]
    assert "a kernel that does not compile" in capsys.readouterr().err


def test_the_figure_is_drawn_from_rows(rows, folder, monkeypatch):
    """It stands beside the rows; its bars are theirs, utilisation too where a device has a peak."""
    assert (folder / "rows.png").stat().st_size > 20_000
    drawn = []
    monkeypatch.setattr(bench.plt, "close", drawn.append)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: None)
    bench.draw([{**row, "mfu": "0.25", "seconds_to_share": ""} for row in rows], folder / "again.png")
    speed, utilisation, seconds, queries = drawn[0].axes
    widths = [[patch.get_width() for patch in axis.patches] for axis in (speed, utilisation, seconds, queries)]
    trained = [row for row in rows if row["work"] == "to share"]
    assert widths[0] == [float(row["images_per_second"]) for row in rows if row["work"] != "to share"] and set(widths[1]) == {0.25}
    assert widths[2] == [float(row["seconds"]) for row in trained] and widths[3] == [float(row["images"]) for row in trained]
    assert all(axis.get_xlabel() for axis in drawn[0].axes) and not any(patch.get_facecolor()[3] for patch in seconds.patches)


# ------------------------------------------------------------------------------------------- FLOPs


def test_flops_by_hand():
    """A multiply-add is two; a layer's backward pass costs one product for its weights and one for its inputs, where they are asked for."""
    linear, x = nn.Linear(3, 5), torch.ones(7, 3)
    forward = 2 * 7 * 3 * 5
    assert bench.model_flops(lambda: linear(x)) == forward
    assert bench.model_flops(lambda: linear(x).sum().backward()) == 2 * forward
    assert bench.model_flops(lambda: linear(x.clone().requires_grad_()).sum().backward()) == 3 * forward
    assert bench.model_flops(lambda: torch.autograd.grad(linear(y).sum(), y) if (y := x.clone().requires_grad_()) is not None else 0) == 2 * forward
    conv, image = nn.Conv2d(2, 4, 3, padding=1), torch.ones(6, 2, 8, 8)
    assert bench.model_flops(lambda: conv(image)) == 2 * 6 * 4 * 8 * 8 * 2 * 3 * 3
    q = torch.ones(2, 1, 10, 16)
    assert bench.model_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 10 * 10 * 16)


def test_flops_are_torchs(tiny):
    """Of the U-Net, forward and backward, as torch's own counter has it where there is no attention kernel between."""
    network, x = UNetDenoiser((1, 8, 8), (8,), 1), torch.zeros(3, 1, 8, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.core(x, 0.5).sample.sum().backward()
    assert bench.model_flops(lambda: network.core(x, 0.5).sample.sum().backward()) == counter.get_total_flops() > 0


def test_flops_of_an_image(tiny, rows):
    """Sampling: N networks and the reward. Scores: at each step one network for the sample, one for s, and three for mu and its slope."""
    reward, n = bench.model_flops(lambda: tiny.task.problem.rewards(tiny.task.images.pixels[:1])), tiny.settings.steps
    judge = bench.model_flops(lambda: tiny.task.judged(tiny.task.images.pixels[:1]))
    for row in rows:
        network, image = float(row["network_flops"]), float(row["flops_per_image"])
        if row["work"] == "sampling":
            assert image == n * network + reward
        elif row["method"] in ("score-function", "reward-weighted"):
            assert image == pytest.approx(5 * n * network + reward + judge, rel=0.002)
        else:
            assert image > 6 * n * network + reward + judge  # values, second epochs, gradients through the networks


@pytest.mark.parametrize(("device", "precision", "expected"), [
    ("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("NVIDIA H200", "bf16", 989e12), ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
    ("NVIDIA A100-SXM4-40GB", "tf32", 156e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None), ("cpu", "fp32", None)])
def test_peaks(device, precision, expected):
    found = bench.peak_flops(device, precision)
    assert found is None if expected is None else found == pytest.approx(expected, rel=1e-3)


def test_utilisation(tiny, rows, monkeypatch):
    """Half of the peak is one half."""
    monkeypatch.setattr(bench, "peak_flops", lambda device, precision: 2e6)
    case = bench.TINY[0]
    row = bench.rates(case.blank(tiny), tiny, case.tuning, [1.0, 3.0], flops_per_image=1e6 / 16)
    assert row.images == 64 and row.images_per_second == 16 and row.mfu == 0.5 and row.slowest_over_fastest == 3


# ------------------------------------------------------------------------------------------- tunings


def training(tiny, tuning, **changed):
    return bench.Training(tiny.tuned(tuning, tiny.task), replace(tiny.settings, method=ScoreFunction(), **changed), tiny.accelerator)


def moved(made, updates=2):
    """Metrics of some updates, and where they lead."""
    metrics = [{name: x for name, x in made.update().items() if name != "seconds"} for _ in range(updates)]
    return metrics, torch.cat([p.detach().flatten() for p in made.policy.parameters()])


@pytest.fixture(scope="module")
def plain(tiny):
    """Start, metrics and end of two plain updates."""
    made = training(tiny, bench.Tuning())
    return moved(made, 0)[1], *moved(made)


def distance(plain, end):
    """From the plain end, in units of the way from the start."""
    return float((end - plain[2]).norm() / (plain[2] - plain[0]).norm())


def test_channels_last_changes_nothing(tiny, plain):
    """The layout reaches every copy that is trained, and the run is the same to rounding; half precision is not."""
    made = training(tiny, bench.Tuning(channels_last=True))
    for module in (made.policy, made.average, made.problem.pretrained):
        kernels = [p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
        assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)
    assert distance(plain, moved(made)[1]) <= 1e-3 < distance(plain, moved(training(tiny, bench.Tuning("bf16")))[1])


def test_microbatches_change_nothing(tiny, plain):
    """`at_once` bounds the states of a forward pass, and moves the policy alike to rounding."""
    made, passed = training(tiny, bench.Tuning(), at_once=2 * tiny.settings.steps), []
    made.policy.network.core.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    assert distance(plain, moved(made)[1]) <= 1e-3
    assert max(passed) == tiny.settings.paths and min(passed) == 2 * tiny.settings.steps  # sampling; the pieces
    assert "at_once" not in made.settings.identity()  # a run goes on with another one


def test_compiled_networks_keep_their_names(tiny, rows, tmp_path):
    """In place: one graph for every kind of call, the same keys; checkpoints and models pass between compiled and plain ones."""
    assert {int(row["graphs"]) for row in rows if "compiled" in row["tuning"]} == {3}  # for the sample, for s, and for mu with its gradient
    assert {row["graphs"] for row in rows if "compiled" not in row["tuning"]} == {"0"}
    tuning = bench.Tuning(channels_last=True, compiler=bench.Compiler("eager"))
    plain, compiled = (training(tiny, replace(tuning, compiler=None)) for _ in range(2))
    keys = list(compiled.policy.state_dict())
    tuning.compile(compiled.policy)
    assert list(compiled.policy.state_dict()) == keys and list(compiled.tensors()) == list(plain.tensors())
    moved(plain, 1)
    plain.save(tmp_path / "plain.safetensors")
    compiled.load(tmp_path / "plain.safetensors")
    compiled.save(tmp_path / "compiled.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in ours.items())
    save_denoiser(compiled.policy.network, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(load_denoiser(tmp_path).parameters(), plain.policy.network.parameters(), strict=True))


def test_warm_up_is_undone(tiny, plain):
    """A warmed training is a fresh one: the same metrics, the same parameters, bit for bit."""
    made = training(tiny, bench.Tuning())
    bench.ToShare(bench.Tuning(), ScoreFunction(), 8, 16, share=0.5, over=16).warm(made)
    assert made.iteration == made.queries == 0
    metrics, end = moved(made)
    assert metrics == plain[1] and torch.equal(end, plain[2])


def test_switches_are_put_back():
    before = (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    with pytest.raises(KeyError), bench.Tuning("tf32", searched=True).applied():
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# ------------------------------------------------------------------------------------------- time to a share


class Made:
    """A training whose judged shares are given."""

    def __init__(self, settings, shares):
        self.settings, self.shares, self.iteration = settings, shares, 0

    def update(self):
        share = self.shares[self.iteration]
        if share is None:
            raise FloatingPointError("loss is nan")
        self.iteration += 1
        return {"queries": 8 * self.iteration, "judged_share": share}


def test_time_to_a_share(tiny):
    """The update at which the window's mean exceeds the share, the budget's end, or the update that broke down."""
    case, long = bench.ToShare(bench.Tuning(), ScoreFunction(), 8, 16, share=0.5, over=16), replace(tiny.settings, iterations=4)
    rows, seconds, queries, stopped = case.updates(Made(long, [0.9, 0.1, 0.8, 0.9]), tiny)
    assert queries == 32 == queries_to_share(rows, 0.5, 16) and len(seconds) == 4 and not stopped  # (.1 + .8)/2 is below
    assert case.updates(Made(long, [0.1] * 4), tiny)[1:] == ([pytest.approx(0, abs=1)] * 4, None, "")
    rows, seconds, queries, stopped = case.updates(Made(long, [0.1, None]), tiny)
    assert len(rows) == len(seconds) == 1 and queries is None and stopped == "update 2: loss is nan"


# ------------------------------------------------------------------------------------------- the full configuration


def test_the_full_network_has_ten_million_parameters():
    network = UNetDenoiser((1, 28, 28), bench.UNET.channels, bench.UNET.depth)
    assert bench.size(network) == pytest.approx(10e6, rel=0.05)


def test_the_full_cases():
    """No name twice; every method; every part of a forward pass has as many paths, so that one graph serves."""
    names = [case.name for case in bench.CASES]
    assert len(set(names)) == len(names)
    assert [case.method for case in bench.CASES if isinstance(case, bench.ToShare)] == list(ALL)
    for case in bench.CASES:
        if isinstance(case, bench.Trains):
            assert case.at_once % bench.START.steps == 0 and case.paths % min(case.paths, case.at_once // bench.START.steps) == 0


def test_refusals(tmp_path, monkeypatch):
    """Words of no case; a file with other columns; the full configuration without data; memory that does not suffice is a row."""
    with pytest.raises(ValueError, match=r"only: expected words of some case's name, got brightness"):
        bench.main(tiny=True, only=("brightness",), cache=tmp_path)
    (tmp_path / "other.csv").write_text("case,speed\na,1\n")
    with pytest.raises(ValueError, match=r"out: expected a new file"):
        bench.main(tiny=True, out=tmp_path / "other.csv", cache=tmp_path)
    monkeypatch.setattr(bench, "Accelerator", lambda cpu: type("GPU", (), {"device": torch.device("cuda")}))
    with pytest.raises(ValueError, match=r"data_dir: expected a folder with MNIST's IDX files"):
        bench.main()


def test_too_little_memory_is_a_row(tiny, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "sample", full)
    row = bench.run(bench.TINY[0], tiny)
    assert row.stopped == "out of memory" and row.images_per_second is None
    assert bench.describe(bench.cells(row)) == f"{row.case}: out of memory"


def test_updates_are_planned(tiny, rows, monkeypatch):
    """On a GPU, but not where networks are compiled; a plan that does not fit leaves the case to itself."""
    plain, compiled = (case for case in bench.TINY if isinstance(case, bench.Updates))
    assert tiny.planned_memory(plain) is None
    monkeypatch.setattr(bench.Bench, "on_gpu", True)
    monkeypatch.setattr(bench.Bench, "release", lambda self: None)
    planned = tiny.planned_memory(plain)
    assert 5 * 4 * bench.size(tiny.untrained.base) < planned < int(rows[0]["peak_memory_bytes"]) and tiny.planned_memory(compiled) is None
    row = next(row for row in rows if row["case"] == plain.name)
    assert f"({bench.gib(planned)} planned)" in bench.describe({**row, "planned_memory_bytes": str(planned)})

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "Trial", full)
    assert tiny.planned_memory(plain) is None


# ------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def latents():
    settings = replace(bench.TINY_START, steps=3)
    return bench.Latents(settings, Accelerator(cpu=True), 1, channels=(32, 64), side=8, prompt=(3, 16))


def test_latents_have_the_size_of_stable_diffusion():
    """Known of its U-Net: 859,520,964 parameters, and 0.80 TFLOP a forward pass on latents of 64 x 64."""
    with torch.device("meta"):
        full = bench.Latents(bench.LATENTS_START, type("Meta", (), {"device": torch.device("meta")}), 1)
        assert bench.size(full.untrained.base) == 859_520_964
        flops = bench.passed_flops(full.untrained.problem, full.untrained.base.network, "meta")
    assert flops == pytest.approx(0.803e12, rel=1e-3)


@pytest.mark.parametrize("rank", [0, 2])
def test_flops_of_an_update_of_latents(latents, rank):
    """Counted on no device, they are those of a whole update on this one; an adapter costs less than all weights."""
    case = bench.Updates(bench.Tuning(), bench.SLOW, 2, 6, lora_rank=rank)
    counted = bench.model_flops(latents.training(case, 2).update) / 2
    assert latents.update_flops(case)["flops_per_image"] == pytest.approx(counted, rel=1e-9)
    full = replace(case, lora_rank=0)
    assert rank == 0 or latents.update_flops(case)["flops_per_image"] < 0.9 * latents.update_flops(full)["flops_per_image"]


def test_recomputed_activations_change_nothing(latents):
    """Of full weights and of an adapter on attention, which alone moves."""
    for rank in (0, 2):
        ends = []
        for recomputed in (False, True):
            made = latents.training(bench.Updates(bench.Tuning(recomputed=recomputed), bench.SLOW, 4, 6, lora_rank=rank), 4)
            names = [name for name, p in made.policy.named_parameters() if p.requires_grad]
            assert rank == 0 or (names and all("lora" in name and any(f".{end}." in name for end in bench.ATTENTION) for name in names))
            row, theta = made.update(), torch.cat([p.detach().flatten() for p in made.policy.trainable()])
            ends.append((row["loss"], row["gradient_norm"], theta))
        (loss, norm, theta), (loss_again, norm_again, theta_again) = ends
        assert loss == pytest.approx(loss_again, rel=1e-5) and norm == pytest.approx(norm_again, rel=1e-4)
        assert torch.allclose(theta, theta_again, rtol=0, atol=1e-6)


def test_latents_rows(folder):
    bench.main(tiny=True, latents=True, out=folder / "latents.csv", rounds=1)
    found = table(folder / "latents.csv")
    assert [row["case"] for row in found] == [case.name for case in bench.TINY_LATENTS] and all(row["data"] == "latents" for row in found)
    assert not any(row["stopped"] for row in found) and (folder / "latents.png").stat().st_size > 10_000
