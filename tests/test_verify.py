"""The runner: verdicts on disk, resuming, users' problems, exit codes, and failures that say what was measured."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import ctrl
from ctrl import cli
from ctrl.evidence import mean_test
from ctrl.schedule import Schedule
from ctrl.theorems.deterministic_sampler import DeterministicSampler
from ctrl.theorems.path_kl import PathKL
from ctrl.theorems.policy_gradient import PolicyGradient
from ctrl.theorems.value import ValueMartingale
from ctrl.theorems.value_learning import ValueLearning
from ctrl.theorems.verdict import Case, Theorem, Verdict
from ctrl.verify import Settings, _checked, _drawn, _size, user_problem, verify

KEYS = {"theorem", "problem", "check", "measured", "expected", "tolerance", "z", "holds", "reason", "seconds"}

PROBLEM = """
import ctrl
mine = ctrl.Problem(ctrl.VP(0.1, 8.0), ctrl.Gaussian([0.5], [[0.4]]), ctrl.QuadraticReward([[1.0]], [-1.0]), kl_weight=0.7)
def made():
    return mine
wrong = 3
"""


class Counted(Theorem):
    """A theorem that counts its calls, for tests of the runner."""

    statement = "1 = 1"

    def __init__(self, name: str, interrupt: bool = False) -> None:
        self.name, self.interrupt, self.calls, self.figures = name, interrupt, 0, 0

    def checks(self, case: Case):
        self.calls += 1
        yield self.exact(case, 1.0, 1.0, 1e-12, "one is one")
        if self.interrupt:
            raise KeyboardInterrupt
        yield self.planted(case, 2.0, 1.0, 1e-12, "two for one")
        yield self.skipped(case, "nothing more to say")

    def figure(self, case: Case):
        from matplotlib.figure import Figure

        self.figures += 1
        return Figure()


@pytest.fixture
def problem_file(tmp_path):
    path = tmp_path / "problems.py"
    path.write_text(PROBLEM)
    return path


def test_verdicts_file(tmp_path, problem_file, capsys):
    settings = Settings(quick=True, problem=f"{problem_file}:mine", out=tmp_path / "out", threads=1)
    rows = verify(settings, [Counted("first")])
    stored = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    assert [set(row) for row in stored] == [KEYS] * 3
    assert [row["holds"] for row in stored] == [True, True, None] == [row.holds for row in rows]
    assert (tmp_path / "out" / "first.png").exists() and "two for one" in (tmp_path / "out" / "index.html").read_text()
    printed = capsys.readouterr().out
    assert "caught" in printed and "2 of 2 verdicts hold" in printed and "probability at most" in printed


def test_numbers_that_json_cannot_hold_become_none():
    row = Verdict("t", "p", "exact", float("inf"), float("nan"), 1.0, None, False, "why")
    record = row.record()
    assert record["measured"] is None and record["expected"] is None and "inf" in record["reason"] and "nan" in record["reason"]
    json.dumps(record, allow_nan=False)


def test_resume_keeps_finished_parts(tmp_path, problem_file):
    settings = dict(quick=True, problem=f"{problem_file}:mine", out=tmp_path / "out", threads=1)
    first, second = Counted("first"), Counted("second", interrupt=True)
    with pytest.raises(KeyboardInterrupt):
        verify(Settings(**settings), [first, second])
    stored = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    assert [row["theorem"] for row in stored] == ["first"] * 3 + ["second"]
    second.interrupt = False
    rows = verify(Settings(**settings, resume=True), [first, second])
    assert (first.calls, second.calls) == (1, 2)
    assert [row.theorem for row in rows] == ["first"] * 3 + ["second"] * 3
    with pytest.raises(ValueError, match=r"resume: expected an earlier run with the same seed"):
        verify(Settings(**settings, resume=True, seed=5), [first, second])


class Blunt(Counted):
    """A check whose planted error has another noise than the right formula, and a verdict that fails."""

    def checks(self, case: Case):
        self.calls += 1
        samples = case.noise("blunt", 1000).start(1)[:, 0]
        yield self.planted_sampled(case, mean_test(1 + 0.1 * samples, 0.0), "one for zero", right=mean_test(samples, 0.0))
        yield self.exact(case, 2.0, 1.0, 1e-12, "two is one")


def test_a_resumed_run_has_the_same_page(tmp_path, problem_file):
    """Also when a verdict fails: figures are drawn once, and resolutions come back to the last bit."""
    settings = dict(quick=True, problem=f"{problem_file}:mine", out=tmp_path / "out", threads=1)
    theorem = Blunt("blunt")
    rows = verify(Settings(**settings), [theorem])
    files = [tmp_path / "out" / name for name in ("index.html", "sensitivity.csv", "verdicts.json")]
    page, *data = (file.read_text() for file in files)
    assert "1 of 2 verdicts failed" in page and "two is one" in page
    files[0].unlink()
    again = verify(Settings(**settings, resume=True), [theorem])
    assert (theorem.calls, theorem.figures) == (1, 1) and again == rows and rows[0].resolution == again[0].resolution < 0.3
    resumed, *same = (file.read_text() for file in files)
    assert same == data and resumed.count("(resumed)") == 1
    assert page[page.index("What failed"):] == resumed[resumed.index("What failed"):]
    (tmp_path / "out" / "blunt.png").unlink()
    verify(Settings(**settings, resume=True), [theorem])
    assert (theorem.calls, theorem.figures) == (1, 2)


def test_only_renders_one_theorem(tmp_path, problem_file):
    settings = dict(quick=True, problem=f"{problem_file}:mine", out=tmp_path / "out", threads=1)
    first, second = Counted("first"), Counted("second")
    verify(Settings(**settings, only=("second",)), [first, second])
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'id="second"' in page and 'id="first"' not in page and (first.figures, second.figures) == (0, 1)
    verify(Settings(**settings, only=("first",), resume=True), [first, second])
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index('id="first"') < page.index('id="second"') and page.count("data:image/png") == 3  # two figures and all resolutions


def test_long_tasks_begin_first():
    tasks = [(function, Counted("t"), Case(make.__name__, make(), quick=True, seed=0))
             for make in ctrl.zoo.PROBLEMS for function in ((_checked, _drawn) if make.__name__ == "gaussian_pull_2d" else (_checked,))]
    names = [(case.name, function is _drawn) for function, _, case in sorted(tasks, key=_size, reverse=True)]
    assert names == [("digits_plane", False), ("digits_line", False), ("mixture_bump_1d", False), ("gaussian_8d", False),
                     ("gaussian_pull_2d", True), ("gaussian_pull_2d", False)]


def test_processes_give_the_verdicts_of_one(tmp_path, problem_file):
    """Two processes that read the user's file again: the same rows, in the same order, to the last bit."""
    settings = dict(quick=True, only=("path_kl", "advantage"), problem=f"{problem_file}:made")
    one = verify(Settings(**settings, out=tmp_path / "one", threads=1))
    two = verify(Settings(**settings, out=tmp_path / "two", threads=2))
    assert [dataclasses.replace(row, seconds=0) for row in one] == [dataclasses.replace(row, seconds=0) for row in two]
    assert (tmp_path / "two" / "advantage.png").exists()


def test_user_problem(problem_file):
    assert user_problem(f"{problem_file}:mine")[1].kl_weight == 0.7
    assert user_problem(f"{problem_file}:made")[0] == "made"
    for reference, message in ((f"{problem_file}:wrong", "to be a ctrl.Problem"), (f"{problem_file}:absent", "to be a ctrl.Problem"),
                               ("nowhere.py:x", "existing file"), ("x", "FILE.py:NAME")):
        with pytest.raises(ValueError, match=f"problem: expected.*{message}"):
            user_problem(reference)
    problem_file.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"problem: expected problems.py to run, got ZeroDivisionError"):
        user_problem(f"{problem_file}:mine")


@pytest.mark.parametrize(("arguments", "message"), [
    (["verify", "--only", "girsanov"], "only: expected theorems among reversal, exploration"),
    (["verify", "--out", "/dev/null/x"], "out: expected a writable folder"),
    (["verify", "--problem", "absent.py:x"], "problem: expected an existing file"),
    (["verify", "--seed", "-1"], "seed: expected an integer >= 0"),
    (["verify", "--threads", "0"], "threads: expected an integer >= 1"),
])
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_exit_codes_of_verdicts(tmp_path, problem_file, monkeypatch):
    arguments = ["verify", "--quick", "--only", "path_kl", "--problem", f"{problem_file}:mine", "--out", str(tmp_path / "out"), "--threads", "1"]
    assert cli.main(arguments) == 0
    right = Schedule.rates
    monkeypatch.setattr(Schedule, "rates", lambda self, t, eta: (*right(self, t, eta)[:3], 0.3 * right(self, t, eta)[3]))
    assert cli.main(arguments) == 1
    stored = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    failed = [row for row in stored if row["holds"] is False]
    assert failed and all("measured" in row["reason"] for row in failed if row["check"] == "exact")


def test_version_and_module():
    for command in ([sys.executable, "-m", "ctrl", "--version"],):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert out.strip() == f"ctrl {ctrl.__version__}"


def test_a_missing_extra_is_named():
    assert "extra test" in cli.missing("torchsde") or "extra bench" in cli.missing("torchsde")
    assert "extra images" in cli.missing("diffusers.models")
    assert "pip install nonsense" in cli.missing("nonsense")


def test_a_verdict_is_a_plain_bool():
    """NumPy's False is not False, and would pass for a verdict that holds."""
    row = Verdict("t", "p", "exact", np.float32(1), None, None, None, np.bool_(False), "why")
    assert row.holds is False and type(row.measured) is float
    json.dumps(row.record())


def test_a_test_without_power_is_refused_and_a_missed_error_fails():
    """Refused on any problem; a planted error that is missed fails on the zoo and is skipped, and said, on a user's problem."""
    theorem, zoo_case = Counted("t"), Case("p", ctrl.zoo.gaussian_pull_2d(), quick=True, seed=0)
    blunt = mean_test(ctrl.Noise(seed=0, paths=100).start(1)[:, 0], 0.0)
    assert theorem.monte_carlo(zoo_case, blunt, 0.1, "x").holds is None
    assert theorem.monte_carlo(zoo_case, blunt, 10.0, "x").holds is True
    assert theorem.planted_sampled(zoo_case, blunt, "x").holds is False
    assert theorem.planted_sampled(dataclasses.replace(zoo_case, own=True), blunt, "x").holds is None


def test_a_problem_file_may_import_its_neighbours_and_is_known_by_its_content(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("weight = 0.7\n")
    path = tmp_path / "mine.py"
    path.write_text("from neighbour import weight\n" + PROBLEM.replace("kl_weight=0.7", "kl_weight=weight"))
    assert user_problem(f"{path}:mine")[1].kl_weight == 0.7
    settings = dict(quick=True, problem=f"{path}:mine", out=tmp_path / "out", threads=1)
    verify(Settings(**settings), [Counted("first")])
    path.write_text(PROBLEM)
    with pytest.raises(ValueError, match="resume: expected an earlier run with the same content"):
        verify(Settings(**settings, resume=True), [Counted("first")])


@pytest.mark.parametrize(("body", "said"), [
    ("ctrl.CallableReward(lambda x: {}['a'])", "got KeyError"), ("ctrl.CallableReward(lambda x: x[:, 0] * np.nan)", "got 64 NaN or infinite")])
def test_a_reward_that_fails_is_one_line_and_exit_code_2(tmp_path, capsys, body, said):
    path = tmp_path / "bad.py"
    path.write_text(f"import ctrl\nimport numpy as np\np = ctrl.Problem(ctrl.VP(), ctrl.Gaussian([0.5], [[0.4]]), {body}, 0.5)\n")
    assert cli.main(["verify", "--quick", "--only", "path_kl", "--problem", f"{path}:p", "--out", str(tmp_path / "o"), "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert "reward: expected" in error and "Traceback" not in error and error.count("\n") == 1


USERS = {
    "wide": ctrl.Problem(ctrl.VE(0.05, 2.0), ctrl.GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [[[0.2]], [[0.3]]]), ctrl.LinearReward([1.0]),
                         kl_weight=0.5, eta=1.5),
    "idle": ctrl.Problem(ctrl.VP(0.1, 10.0), ctrl.Gaussian([1.0, 0.0], 0.5 * np.eye(2)), ctrl.LinearReward([0.0, 0.0]), kl_weight=0.0, eta=0.5)}


@pytest.mark.parametrize(("name", "theorem"), [
    ("wide", PathKL()), ("wide", DeterministicSampler()), ("idle", ValueMartingale()), ("idle", PolicyGradient()), ("idle", ValueLearning()),
], ids=lambda v: getattr(v, "name", v))
def test_a_users_problem_is_never_failed_for_what_it_cannot_show(name, theorem):
    """Coarse grids, wide laws, objectives that are constant: skipped with the reason, on a user's problem alone."""
    case = Case(name, USERS[name], quick=True, seed=0, own=True)
    rows = list(theorem.checks(case))
    assert rows and not [row for row in rows if row.holds is False]
    if name == "idle" and theorem.name != "value_learning":
        assert [row.check for row in rows] == ["skipped"]
