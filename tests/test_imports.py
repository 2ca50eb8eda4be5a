"""The house's floors: who may import whom, one clock, and what `import ctrl` must not load."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from numba.extending import is_jitted

import ctrl

ROOT = Path(ctrl.__file__).parent

# A module imports only from lower floors; on one floor, freely without circles.
FLOORS = {
    "check": 0, "elementary": 0, "evidence": 0, "files": 0, "laws": 0, "schedule": 0, "noise": 0, "reward": 1, "policy": 1, "problem": 2,
    "zoo": 3, "storage": 3,
    "exact": 3, "rollout": 3, "kernels": 3, "parallel": 4, "estimators": 4, "learn": 5, "testing": 5, "torch": 5, "theorems": 6, "report": 7,
    "verify": 8, "audit": 8, "bench": 8, "cli": 9, "__main__": 10}
# Kernels hold the compiled word generator of noise.py: flat loops that import nothing of the library but one another.
SHARED = {("noise", "kernels")}
STRANGERS = [("exact", "rollout"), ("exact", "kernels"), ("rollout", "exact"), ("kernels", "exact"), ("estimators", "exact")]
HEAVY = ("torch", "matplotlib", "pandas", "diffusers", "scipy.special", "scipy.stats", "scipy.integrate", "sklearn", "hypothesis")


def imported(source):
    """Names under ctrl that a file imports or reaches as attributes of `ctrl`; TYPE_CHECKING blocks are skipped."""
    out = set()

    def home(name):
        return ctrl._HOME.get(name, name)

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node):
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node):
            out.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ctrl."))

        def visit_ImportFrom(self, node):
            assert node.level == 0, "imports are absolute"
            if node.module == "ctrl":
                out.update(home(alias.name) for alias in node.names)
            elif node.module and node.module.startswith("ctrl."):
                out.add(node.module.split(".")[1])

        def visit_Attribute(self, node):
            if isinstance(node.value, ast.Name) and node.value.id == "ctrl":
                out.add(home(node.attr))
            self.generic_visit(node)

    Visitor().visit(ast.parse(source))
    return {name for name in out if not name.startswith("__") or name == "__main__"}


def subtracts_the_clock(source):
    """Lines that compute `horizon - something` (or `T - t`): only schedule.py may."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)
            and (getattr(node.left, "attr", None) == "horizon" or getattr(node.left, "id", None) in ("horizon", "T"))]


def files():
    return [(path.relative_to(ROOT).parts[0].removesuffix(".py"), path) for path in sorted(ROOT.rglob("*.py"))
            if path != ROOT / "__init__.py"]


def climbs(unit, names):
    return [name for name in names if name != unit and (unit, name) not in SHARED and FLOORS[name] > FLOORS[unit]]


def test_every_module_has_a_floor_and_imports_downwards():
    graph = {}
    for unit, path in files():
        assert unit in FLOORS, f"{path.name} stands on no floor"
        names = imported(path.read_text())
        assert not climbs(unit, names), f"{path.relative_to(ROOT)} imports from a higher floor: {climbs(unit, names)}"
        graph.setdefault(unit, set()).update(names - {unit})
    done = set()
    while len(done) < len(graph):            # peel off modules whose imports are all peeled: stuck means a circle
        free = {unit for unit in graph if unit not in done and all(n in done or n not in graph or (unit, n) in SHARED for n in graph[unit])}
        assert free, f"a circle of imports among {sorted(set(graph) - done)}"
        done |= free


def test_exact_and_simulated_never_meet():
    for unit, path in files():
        names = imported(path.read_text())
        assert not [pair for pair in STRANGERS if pair[0] == unit and pair[1] in names], path.name


def test_one_clock():
    for unit, path in files():
        if unit != "schedule":
            assert not subtracts_the_clock(path.read_text()), f"{path.relative_to(ROOT)} subtracts from the horizon"


@pytest.mark.parametrize(("unit", "source"), [
    ("laws", "from ctrl.problem import Problem"), ("laws", "import ctrl.problem"), ("policy", "import ctrl\nctrl.Problem"),
    ("problem",
     "def f():\n    from ctrl import exact"), ("estimators", "from ctrl import testing"), ("noise", "from ctrl import simulate")])
def test_planted_climbs_are_seen(unit, source):
    assert climbs(unit, imported(source))


def test_planted_clocks_and_strangers_are_seen():
    assert subtracts_the_clock("tau = problem.horizon - t") and subtracts_the_clock("tau = T - t") and not subtracts_the_clock("t - T")
    assert "exact" in imported("def f():\n    from ctrl.exact import chain")
    assert not imported("if TYPE_CHECKING:\n    from ctrl.problem import Problem")


def fresh(code, environment=None):
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, timeout=240,
                         env={**os.environ, **(environment or {})})
    return json.loads(out.stdout)


def heavy_among(modules):
    return [m for m in modules if any(m == heavy or m.startswith(heavy + ".") for heavy in HEAVY)]


REPORT = "import json, sys; print(json.dumps([seconds, sorted(sys.modules)]))"


def test_import_is_light_and_fast():
    """`import ctrl` and the floor under a problem load nothing heavy; best of five under 0.7 s."""
    code = "import time; start = time.perf_counter(); import ctrl{}; seconds = time.perf_counter() - start; " + REPORT
    best = 1e9
    for _ in range(5):
        seconds, modules = fresh(code.format(""))
        best = min(best, seconds)
        assert not heavy_among(modules)
        if best < 0.35:
            break
    assert best < 0.7
    _, modules = fresh(code.format("; ctrl.Problem, ctrl.VP, ctrl.save"))
    assert not heavy_among(modules) and "ctrl.problem" in modules
    assert heavy_among(["numpy", "torch.nn", "scipy.stats", "scipy.linalg"]) == ["torch.nn", "scipy.stats"]     # planted


FIRST = """
import json, time
import ctrl
from ctrl.exact import chain
from ctrl.kernels import chain as paths, normals

problem = ctrl.zoo.gaussian_pull_2d()
grid = problem.grid(20)
policy, noise = problem.pretrained(grid), ctrl.Noise(seed=0, paths=1000)
ctrl.simulate
start = time.perf_counter()
mean = ctrl.simulate(problem, policy, grid, noise).terminal.mean(axis=0)
seconds = time.perf_counter() - start
truth = ctrl.exact.evaluate(problem, policy, grid)
gradient = truth.gradient.theta
kernels = paths.run, normals.fill_normals, chain._forward, chain._mean_squares, chain._backward, chain._gradients
stats = {kernel.py_func.__name__: kernel.stats for kernel in kernels}
print(json.dumps([seconds, list(mean), truth.objective, {name: [sum(s.cache_hits.values()), sum(s.cache_misses.values())]
                                                         for name, s in stats.items()}]))
"""
COLD = """
import json
import numpy as np
from ctrl.kernels.normals import fill_normals
fill_normals(np.uint64(0), np.uint64(0), 0, 0, np.empty((4, 4, 2)))
print(json.dumps([sum(fill_normals.stats.cache_hits.values()), sum(fill_normals.stats.cache_misses.values())]))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    """Every kernel of a first `simulate` and a first truth comes from the compile cache; half a second is the bar, CI machines are busy.

    The first process finds what this one has compiled, or compiles it.
    """
    (_, *first, found), (seconds, *second, warm) = (fresh(FIRST) for _ in range(2))
    assert first == second and all(sum(counts) == 1 for counts in found.values())
    assert warm == {kernel: [1, 0] for kernel in found}
    assert seconds < 5
    assert fresh(COLD, {"NUMBA_CACHE_DIR": str(tmp_path)}) == [0, 1]        # planted: an empty cache is a miss


def test_names():
    assert ctrl.__version__ and sorted(set(ctrl.__all__)) == sorted(ctrl.__all__) and set(ctrl.__all__) <= set(dir(ctrl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ctrl.nothing
    assert ctrl.VP is ctrl.schedule.VP


def compiled_in_ctrl():
    modules = [import_module(m.name) for m in pkgutil.walk_packages(ctrl.__path__, "ctrl.") if not m.name.startswith(("ctrl.torch", "ctrl.__main__"))]
    return [f for m in modules for f in vars(m).values() if is_jitted(f) and f.py_func.__module__ == m.__name__]


def called(function):
    """Files of all compiled functions that a compiled function calls, by the names in its code."""
    files, seen, todo = set(), set(), [function]
    while todo:
        f = todo.pop()
        if f not in seen:
            seen.add(f)
            files.add(f.py_func.__code__.co_filename)
            todo += [g for name in f.py_func.__code__.co_names if is_jitted(g := f.py_func.__globals__.get(name))]
    return files - {function.py_func.__code__.co_filename}


def test_caches_name_all_files_they_were_built_from():
    cached = [f for f in compiled_in_ctrl() if hasattr(f._cache, "_cache_file")]
    needs = {f.py_func.__name__: called(f) - getattr(f, "sources", frozenset()) for f in cached}
    assert len(cached) > 20 and not any(needs.values()), needs
    run = next(f for f in cached if f.py_func.__name__ == "run")
    assert len(called(run)) == 4 and called(run) < run.sources      # planted: without its sources it would be missing four


TOP = """
import base
from ctrl.elementary import built_from
from numba import njit
{stamp}
@njit(cache=True)
def top(x):
    return base.low(x)
if __name__ == "__main__":
    import json, top as module
    print(json.dumps([module.top(1.0), sum(module.top.stats.cache_hits.values())]))
"""


@pytest.mark.parametrize(("stamp", "answers"), [("@built_from(base.__file__)", [[2.0, 0], [2.0, 1], [3.0, 0]]), ("", [[2.0, 0], [2.0, 1], [2.0, 1]])])
def test_caches_know_what_they_were_built_from(tmp_path, stamp, answers):
    """Run, run again, change the function that is called, run: the planted one, without the stamp, answers from the old machine code."""
    (tmp_path / "top.py").write_text(TOP.format(stamp=stamp))
    found = []
    for factor in (2.0, 2.0, 3.0):
        (tmp_path / "base.py").write_text(f"from numba import njit\n@njit\ndef low(x):\n    return {factor} * x\n")
        out = subprocess.run([sys.executable, "top.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240,
                             env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"})
        found.append(json.loads(out.stdout))
    assert found == answers
