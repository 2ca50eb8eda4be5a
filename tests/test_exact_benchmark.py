"""The benchmark of exact truth, in quick mode: complete rows, peers that agree, and a peer that does not is refused."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("exact")


def test_rows_are_complete(bench, tmp_path):
    found = [row for case in bench.QUICK for row in bench.run(case, rounds=2)]
    assert {row.version for row in found} == {"ctrl.exact", "NumPy recursion", "solve_ivp DOP853, moments only", "NumPy dense kernels"}
    for row in found:
        assert row.objective_ms > 0 and math.isfinite(row.times_this_library)
        assert (row.version == "ctrl.exact") == (row.meets is not None) == (row.gradient_ratio is not None) == (row.relative_gap is None)
        assert row.relative_gap is None or row.relative_gap < 1e-10
    bench.write(found, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found) and all(row["machine"] and row["numpy"] == np.__version__ for row in table)


def test_a_peer_that_computes_something_else_is_refused(bench, monkeypatch):
    true = bench.recursion
    monkeypatch.setattr(bench, "recursion", lambda *arguments: true(*arguments) * (1 + 1e-8))
    with pytest.raises(ValueError, match="^NumPy recursion: expected agreement on gaussian_8d"):
        list(bench.run(bench.QUICK[0], rounds=1))
