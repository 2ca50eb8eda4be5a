"""The command line: what is refused is one line and exit code 2, on a terminal too; help, versions, exit codes; torch only where it is used."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import fields

import pytest

import ctrl
from ctrl import cli, parallel, zoo
from ctrl.torch import compare, finetune
from ctrl.torch.methods import ALL

LONG = "/tmp/a,b/" + 12 * "a-long-name/"


class Stream(io.TextIOWrapper):
    """Standard output of some encoding, on a terminal or not."""

    def __init__(self, encoding, terminal):
        super().__init__(io.BytesIO(), encoding)
        self.isatty = lambda: terminal


def refusal(arguments, capsys):
    """The one line of a refused command, after `ctrl: error: `."""
    code, (out, error) = cli.main(arguments), capsys.readouterr()
    assert code == 2 and out == "" and error.endswith("\n") and error[:-1].isprintable() and error.startswith("ctrl: error: "), error
    return error.removeprefix("ctrl: error: ")[:-1]


REFUSED = [
    (["finetune", "method:reinforce"], "Unrecognized options: method:reinforce; Available subcommands: method:value-gradient, method:temporal-"),
    (["finetune", "method:ppo", "reward:beauty"], "Unrecognized options: reward:beauty; Available subcommands: reward:class, reward:brightness"),
    (["finetune", "--data", "cifar"], "invalid choice 'cifar' for argument '--data'. Expected one of ('digits', 'mnist', 'folder')."),
    (["finetune", "--precision", "fp16"], "invalid choice 'fp16' for argument '--precision'. Expected one of ('no', 'bf16')."),
    (["finetune", "--steps", "many"], "--steps: invalid literal for int() with base 10: 'many'"),
    (["finetune", "--steps", "0"], "steps: expected an integer >= 1, got 0"),
    (["finetune", "--steps"], "Missing value for argument '--steps'. Expected 1 values."),
    (["finetune", "--eta", "-1"], "eta: expected a finite number >= 0, got -1.0"),
    (["finetune", "--kl-weight", "nan"], "kl_weight: expected a finite number >= 0, got nan"),
    (["finetune", "--average", "1"], "average: expected a decay in [0, 1), got 1"),
    (["finetune", "--pretraining.average", "1"], "pretraining: average: expected a decay in [0, 1), got 1"),
    (["finetune", "--pretraining.iterations", "0"], "pretraining: iterations: expected an integer >= 1, got 0"),
    (["finetune", "--seed", str(2**31)], f"seed: expected an integer below 2^31, got {2**31}"),
    (["finetune", "--lora-rank", "-1"], "lora_rank: expected an integer >= 0, got -1"),
    (["finetune", "--checkpoint-every", "0"], "checkpoint_every: expected an integer >= 1, got 0"),
    (["finetune", "--threads", "0"], "threads: expected an integer >= 1, got 0"),
    (["finetune", "--quick", "--threads", "0"], "threads: expected an integer >= 1, got 0"),
    (["finetune", "--data", "mnist"], "data_dir: expected a folder with data = mnist, got None"),
    (["finetune", "--data-dir", LONG], f"data_dir: expected none with data = digits, got {LONG[:-1]}"),
    (["finetune", "--out", "/dev/null/x"], "out: expected a writable folder, got /dev/null/x (Not a directory)"),
    (["finetune", "--learning-rate", "1"], "Unrecognized options: --learning-rate, 1"),
    (["finetune", "method:ppo", "--method.epochs", "0"], "method.epochs: expected an integer >= 1, got 0"),
    (["finetune", "reward:user"], "Missing from ctrl finetune reward:user: --reward.function STR FILE.py:NAME. (required)"),
    (["compare", "--only", "reinforce"], "only: expected some of value-gradient, temporal-difference, pathwise, adjoint-matching"),
    (["compare", "--seeds", "0"], "seeds: expected an integer >= 1, got 0"),
    (["verify", "--seed", "x"], "--seed: invalid literal for int() with base 10: 'x'"),
    (["verify", "--only"], "only: expected at least one theorem, got none"),
    (["zoo", "here"], "Unrecognized options: here"),
    (["finetun"], "Unrecognized options: finetun; Available subcommands: verify, bench, zoo, audit, finetune, compare"),
    ([], "Expected one of {verify, bench, zoo, audit, finetune, compare}.")]


@pytest.mark.parametrize(("encoding", "terminal", "every"), [("utf-8", True, 1), ("utf-8", False, 6), ("ascii", True, 6), ("ascii", False, 6)])
def test_refused_arguments_are_one_line(encoding, terminal, every, capsys, monkeypatch, tmp_path):
    """The argument, what was expected and what came, whole: no box, no colours, no path that a box's edge breaks; nothing is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", Stream(encoding, terminal))
    for arguments, expected in REFUSED[::every]:
        assert refusal(arguments, capsys).startswith(expected), arguments
    assert not list(tmp_path.iterdir())


def test_refusal_leaves_the_terminal_as_it_was(capsys, monkeypatch):
    for columns in ("60", None):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        assert refusal(["finetune", "--steps", "0"], capsys) and os.environ.get("COLUMNS") == columns


@pytest.mark.parametrize(("name", "kind"), [("finetune", finetune.Finetune), ("compare", compare.Compare)])
def test_help_says_every_option(name, kind, capsys):
    """Every field with its sentence; of a method, its own step sizes."""
    def shown(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([name, *arguments, "--help"])
        out, error = capsys.readouterr()
        assert stop.value.code == 0 and error == ""
        return " ".join(out.replace("│", " ").split())

    page = shown()
    assert page.startswith(f"usage: ctrl {name}") and " ".join(kind.__doc__.split()) in page
    hidden = {"reward_workers"} if name == "compare" else set()  # which has no use for them
    flags = {field.name for field in fields(kind)} - {"method", "reward", "pretraining"} - hidden
    assert not any(f"--{flag.replace('_', '-')} " in page for flag in hidden)
    assert all(f"--{flag.replace('_', '-')} " in page for flag in flags) and "--pretraining.width INT" in page and "reward:class" in page
    assert "--nonsense" not in page
    if name == "finetune":
        assert all(f"method:{compare.name_of(method)}" in page for method in ALL)
        assert "--method.clip FLOAT" in shown("method:ppo") and "--method.clip" not in shown("method:pathwise")


def test_zoo_lists_every_problem(capsys, monkeypatch):
    """With its exact numbers, where there are any."""
    pull, mixture = zoo.gaussian_pull_2d(), zoo.mixture_bump_1d()
    grid = pull.grid(5)
    best = ctrl.exact.optimum(pull, grid)
    known = cli._known(pull, 5)
    assert f"pre-trained E r = {ctrl.exact.evaluate(pull, pull.pretrained(grid), grid).expected_reward:.6f}" in known and "truth by chain" in known
    assert f"J* = {best.objective:.6f} at {best.path_kl:.4f} nats" in known
    assert "truth by quadrature" in (line := cli._known(mixture, 5)) and "J* = " in line
    monkeypatch.setattr(cli, "_known", lambda problem: "known")
    assert cli.main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == [make.__name__ for make in zoo.LISTED]
    assert {*lines[2::3]} == {"    known"} and all(len(line) > 10 for line in lines[1::3])


def test_exit_codes(capsys, monkeypatch):
    """0, 1 for a run that stopped, 2 for what is refused, 130 for an interrupt; an error of our own keeps its traceback."""
    def ending(outcome):
        def run(self):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(finetune.Finetune, "run", run)
        return cli.main(["finetune"]), capsys.readouterr().err

    assert ending(0) == (0, "")
    assert ending(finetune.TrainingStopped("update 3 of PPO: no")) == (1, "ctrl: training stopped: update 3 of PPO: no\n")
    assert ending(ValueError("paths: no,\n  never")) == (2, "ctrl: error: paths: no, never\n")
    assert ending(PermissionError(13, "Permission denied", "x")) == (2, "ctrl: error: [Errno 13] Permission denied: 'x'\n")
    assert ending(KeyboardInterrupt())[0] == 130
    assert ending(ModuleNotFoundError("no", name="peft")) == (
        2, "ctrl: error: peft is missing; it comes with the extra images: pip install 'scores-as-actions[images]'\n")
    with pytest.raises(RuntimeError, match="a bug"):
        ending(RuntimeError("a bug"))


def test_light_commands_do_without_torch():
    code = """import sys; from ctrl import cli
print(cli.main(["--version"]), cli.main(["verify", "--seed", "x"]), {"torch", "matplotlib"} & {*sys.modules})"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == f"ctrl {ctrl.__version__}\n0 2 set()\n" and ran.stderr.startswith("ctrl: error: --seed: ") and ran.stderr.count("\n") == 1


def test_imports_are_settled_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    """Not in a caller's, whose garbage would stay; and what a user's file has written is in its file at the end."""
    settled = []
    monkeypatch.setattr(parallel, "settle", settled.append)
    wrong = ["verify", "--only", "nothing", "--out", str(tmp_path)]
    assert cli.main(wrong) == 2 and settled == []
    monkeypatch.setattr(sys, "argv", ["ctrl", *wrong])
    assert cli.main() == 2 and settled == ["ctrl.verify"]
    own = ["class Log:", "    def __init__(self):", "        self.file, self.me = open('log', 'w'), self", "problem = Log()"]
    own.append("problem.file.write('kept')")
    (tmp_path / "own.py").write_text("\n".join(own))
    run = subprocess.run([sys.executable, "-m", "ctrl", "verify", "--problem", "own.py:problem"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "expected problem in own.py to be a ctrl.Problem" in run.stderr
    assert (tmp_path / "log").read_text() == "kept"
