"""Every public name says what it is in one sentence, where it comes from, and which existing test checks it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import ctrl

TESTS = Path(__file__).parent
spec = importlib.util.spec_from_file_location("api", TESTS.parent / "docs" / "api.py")
api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api)
public = cache(api.public)
# Faces and containers that users meet only through the names above; a sentence is enough.
PLUMBING = {
    "estimators.Bias", "estimators.Estimator", "estimators.Need", "estimators.Run", "estimators.StepKL", "estimators.ValueFunction",
    "estimators.runs",
    "exact.Terminal", "exact.ExactGradient", "exact.Value", "exact.Optimum",
    "exact.chain.applies", "exact.chain.entropy", "exact.chain.LinearChain", "exact.chain.QuadraticValue", "exact.chain.Optimum",
    "exact.tilt.Rule", "exact.tilt.log_partition", "exact.tilt.support", "exact.divergence.Divergence",
    "exact.limit.ContinuousPolicy", "exact.limit.FeedbackBasis", "exact.limit.MarginalKLRate",
    "learn.Algorithm", "learn.Best", "learn.Counts", "learn.Critic", "learn.Diverged", "learn.LearnedValue", "learn.Quadratic", "learn.Search",
    "learn.State", "learn.noise_of",
    "testing.Setup", "testing.gaussians", "testing.mixtures", "testing.reals", "testing.rewards", "testing.schedules", "testing.vectors",
    "theorems.Case", "theorems.Theorem", "theorems.Verdict",
    "torch.Objective", "torch.Policy", "torch.Run", "torch.Value", "torch.classifiers.Classifier"}


@cache
def checks_in(path):
    """Names of the test functions in a file under tests/, by reading it."""
    if not (TESTS.parent / path).exists():
        return frozenset()
    tree = ast.parse((TESTS.parent / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def faults(docstring, plumbing=False):
    """What a docstring lacks, in words."""
    text = inspect.cleandoc(docstring or "")
    first = text.split("\n\n")[0].replace("\n", " ")
    found = [] if len(first) > 10 and re.search(r"[.:;)]", first) else ["no opening sentence"]
    if plumbing:
        return found
    if not re.search(r"Source:\s*\S", text):
        found.append("no Source:")
    named = re.findall(r"(tests/\w+\.py)::(\w+)", text[text.find("Checked:"):] if "Checked:" in text else "")
    if not named:
        found.append("no Checked: tests/...::test_...")
    return found + [f"{path}::{name} does not exist" for path, name in named if name not in checks_in(path)]


@pytest.mark.parametrize("label", sorted(public()))
def test_public_names_are_documented(label):
    assert not faults(public()[label].__doc__, label in PLUMBING)


def test_the_reference_is_up_to_date():
    """python docs/api.py writes it."""
    assert api.PAGE.read_text() == api.reference()


def test_the_list_of_exceptions_is_alive():
    gone = {label for label in PLUMBING if label not in public()}
    assert not gone, f"remove {sorted(gone)} from PLUMBING"


def test_checked_tests_exist_everywhere():
    """Also on private names and modules: wherever a docstring names a test, the test is there."""
    missing = []
    for path in sorted(Path(ctrl.__file__).parent.rglob("*.py")):
        for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", path.read_text()):
            if name not in checks_in(file):
                missing.append(f"{path.name}: {file}::{name}")
    assert not missing


def test_planted_docstrings_are_faulted():
    here = "tests/test_docstrings.py::test_planted_docstrings_are_faulted"
    assert not faults(f"A sentence that says it.\n\nSource: theory.md, section 1.   Checked: {here}")
    assert faults(None) and faults("Short") and faults(f"A sentence that says it.\n\nChecked: {here}") == ["no Source:"]
    assert faults("A sentence that says it.\n\nSource: a paper.") == ["no Checked: tests/...::test_..."]
    assert faults("A sentence that says it.\n\nSource: a paper.   Checked: tests/test_docstrings.py::test_of_nothing")
