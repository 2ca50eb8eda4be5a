"""The README tells the truth: its Python runs, its output is real, and the machine that checks merges runs its commands."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = (
    'pip install -c constraints-cpu.txt -e ".[dev]" && ctrl verify',
    'pip install -c constraints-cpu.txt -e ".[dev]" && pytest')


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(source):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def test_python_blocks_run_and_print_what_is_shown():
    sources, shown = blocks("python"), blocks("text")
    assert len(sources) == len(shown) >= 1
    for source, output in zip(sources, shown, strict=True):
        assert run(source) == output


def test_a_wrong_formula_in_the_readme_would_be_noticed():
    planted = blocks("python")[0].replace("RewardToGo()", "ScoreFunction()").replace("estimate.mean,", "0.99 * estimate.mean,")
    try:
        run(planted)
    except AssertionError:
        return
    raise AssertionError("a one per cent error went unnoticed")


def test_the_two_commands_are_verbatim_and_in_fresh_environments():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    for command in COMMANDS:
        assert lines.count(command) == 1
        assert lines[lines.index(command) - 1].startswith("python -m venv ")


def test_ci_takes_its_test_command_from_here():
    ci = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert [line for line in README.splitlines() if line.endswith("&& pytest")] == [COMMANDS[1]]
    assert "grep -E '&& pytest$' README.md" in ci and "pip install" not in ci
    for wanted in ("ctrl verify --quick --out", "ruff check", "mypy", "set -euo pipefail", "-m venv"):
        assert wanted in ci


def test_files_that_it_mentions_exist():
    for name in re.findall(r"`([\w/.-]+\.(?:md|cff|txt|py)|ctrl/\w+/)`", README):
        assert (ROOT / name).exists(), name
    torch = re.search(r"torch==([\d.]+)", README)
    assert torch and f"torch=={torch[1]}" in (ROOT / "constraints-cpu.txt").read_text().split()
