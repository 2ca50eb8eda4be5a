"""The pages tell the truth: their Python and commands run in order, print what is shown, and exit as they say; links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall(page.read_text())


def executed(source, namespace):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "block", "exec"), namespace)
    return out.getvalue()


def commanded(line, folder):
    """A command with `# exit code 1` behind it has to fail so."""
    wanted = int(found[1]) if (found := re.search(r"# exit code (\d)", line)) else 0
    program, *arguments = shlex.split(line, comments=True)
    assert program == "ctrl"
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside other tests, more threads would wait for one another
    done = subprocess.run([sys.executable, "-m", "ctrl", *arguments], cwd=folder, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == wanted, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def followed(page, folder):
    """All blocks of a page in their order: files are written, commands and code are run, and what is printed is compared."""
    namespace, printed = {"__name__": "page"}, ""
    for language, body in blocks(page):
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", body)):
            (folder / name[1]).write_text(body)
            importlib.invalidate_caches()
        elif language == "python":
            printed = executed(body, namespace)
        elif language == "bash":
            for line in body.splitlines():
                commanded(line, folder)
        else:
            assert (language, body) == ("text", printed)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader's own files are; forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_a_reader_gets_what_is_shown(page, folder):
    followed(page, folder)


def test_a_wrong_number_in_a_page_would_be_noticed(folder):
    """Printed output, an assertion, and an exit code."""
    for language, shown in (("text", "2\n"), ("python", "assert x == 2\n"), ("bash", "ctrl --version  # exit code 1\n")):
        page = folder / "planted.md"
        page.write_text(f"```python\nx = 1\nprint(x)\n```\n\n```{language}\n{shown}```\n")
        with pytest.raises(AssertionError):
            followed(page, folder)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *PAGES], ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_lead_somewhere(page):
    """Files, and headings within them."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_every_benchmark_is_in_the_table():
    table = (ROOT / "benchmarks" / "README.md").read_text()
    for file in (ROOT / "benchmarks").glob("*.py"):
        assert f"benchmarks/{file.name}" in table or f"benchmarks.{file.stem}" in table, file.name
