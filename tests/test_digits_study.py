"""The study of all digits: a tiny one runs, goes on where it stopped, and its table says what the committed rows say."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("digits_study", ROOT / "analysis" / "digits_study.py")
study = sys.modules["digits_study"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    plan = study.Study(out=out, digits=(3,), seeds=(0,), quick=True, start=replace(study.Finetune(), cache=out / "cache", steps=4), fine_steps=8)
    return plan, study.main(plan)


def test_a_tiny_study_runs_and_goes_on(tiny, monkeypatch):
    plan, rows = tiny
    assert len(rows) == 2 and (plan.out / "study.png").stat().st_size > 10_000 and (plan.out / "samples.png").exists()
    finished = {path: path.read_bytes() for path in (plan.out / "runs").glob("*.json")}
    monkeypatch.setattr(study, "finetune", lambda settings: pytest.fail("a finished run was done again"))
    assert study.main(plan).equals(rows)
    assert {path: path.read_bytes() for path in finished} == finished


def test_rows_are_the_runs_summaries(tiny):
    plan, rows = tiny
    summary = json.loads((plan.settings(3, 0, plan.start.steps).out / "summary.json").read_text())
    row = rows[rows.steps == summary_steps(plan)].iloc[0]
    assert row.regret == summary["tuned"]["regret"] and row.optimum_kl == summary["yardstick"]["kl"]
    assert row.regret == pytest.approx(summary["yardstick"]["objective"] - summary["tuned"]["objective"], abs=1e-12)


def summary_steps(plan):
    return plan.settings(3, 0, plan.start.steps).steps
