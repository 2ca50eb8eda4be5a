"""The study of all digits: a tiny one runs, goes on where it stopped, and its table says what the committed rows say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from analysis import digits_study as study
from analysis.sweep import Pool


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    threads = torch.get_num_threads()
    plan = planned(tmp_path_factory.mktemp("study"))
    yield plan, study.main(plan)
    torch.set_num_threads(threads)


def planned(out, pool=None):
    """Two runs, with one thread as on a pool."""
    start = replace(study.Finetune(), cache=out / "cache", steps=4, threads=1)
    return study.Study(out=out, digits=(3,), seeds=(0,), quick=True, start=start, fine_steps=8, pool=pool or Pool())


def test_a_tiny_study_runs_and_goes_on(tiny, monkeypatch):
    plan, rows = tiny
    assert len(rows) == 2 and (plan.out / "study.png").stat().st_size > 10_000 and (plan.out / "samples.png").exists()
    finished = {path: path.read_bytes() for path in (plan.out / "runs").glob("*.json")}
    monkeypatch.setattr(study, "finetune", lambda settings: pytest.fail("a finished run was done again"))
    assert study.main(plan).equals(rows)
    assert {path: path.read_bytes() for path in finished} == finished


def test_a_pool_gives_the_same_rows(tiny, tmp_path):
    """Pre-training and all, on spawned processes; threads share torch's generator and are refused."""
    _, rows = tiny
    pooled = study.main(planned(tmp_path, Pool(workers=2)))
    assert pooled.drop(columns="seconds").equals(rows.drop(columns="seconds"))
    with pytest.raises(ValueError, match="backend: expected loky or dask"):
        planned(tmp_path, Pool(2, "threading"))


def test_rows_are_the_runs_summaries(tiny):
    plan, rows = tiny
    summary = json.loads((plan.settings(3, 0, plan.start.steps).out / "summary.json").read_text())
    row = rows[rows.steps == summary_steps(plan)].iloc[0]
    assert row.regret == summary["tuned"]["regret"] and row.optimum_kl == summary["yardstick"]["kl"]
    assert row.regret == pytest.approx(summary["yardstick"]["objective"] - summary["tuned"]["objective"], abs=1e-12)


def summary_steps(plan):
    return plan.settings(3, 0, plan.start.steps).steps
