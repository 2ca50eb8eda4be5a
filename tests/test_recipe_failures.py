"""The study of failures: a tiny one runs, goes on where it stopped, and shows what the recipe says of those failures that it can reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysis import recipe_failures as study

from ctrl.torch import methods
from ctrl.torch.finetune import Alone, Training


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("failures")
    plan = study.Study(out=out, seeds=(0,), quick=True, start=study.Finetune(cache=out / "cache", samples=64, threads=1))
    yield plan, study.main(plan)
    torch.set_num_threads(threads)


def curves(found, setup, number):
    rows = found["curves"]
    return rows[rows["setup"] == setup][number].to_numpy()


def test_failures_tell_themselves(tiny):
    """Each number of the recipe, healthy against failing, where sixteen updates of a poor model can show it."""
    _, found = tiny
    assert curves(found, "large steps", "kl_mean")[-1] > 10 * curves(found, "PPO", "kl_mean")[-1] > 0
    assert curves(found, "stale batch", "log_ratio_max").max() > 5 * curves(found, "PPO", "log_ratio_max").max()
    assert curves(found, "tight clip", "clipped_share")[:2].min() > 0.4 and curves(found, "PPO", "clipped_share").max() < 0.1
    assert curves(found, "no baseline", "gradient_noise").mean() > 3 * curves(found, "score function", "gradient_noise").mean()
    assert (curves(found, "stale batch", "clipped_share") == 0).all()  # a clip that never binds


def test_the_planted_kl_is_a_mean(tiny):
    """Its loss at a policy that moved: the clipped ratio's with lambda / (d N) in the place of lambda, and the reward alone as return."""
    plan, _ = tiny
    task = study.prepared(plan.settings)
    training = Training(task, study.replace(plan.settings, method=methods.PPO(learning_rate=1e-2), iterations=50), Alone(torch.device("cpu")))
    for _ in range(3):
        training.update()
    run = study.replace(training._batch(3).each(lambda run: run)[0], joined=lambda x: x)  # each of the two has returns of its own
    planted, right = study.MeanKL(clip=0.2), study.objectives.ClippedRatio(clip=0.2)
    spread = run.rate[:, None] * run.departure.square().flatten(2)  # (n, N, d)
    surrogate = planted.loss(run) - spread.mean((1, 2))
    everyone = run.final - (run.final.sum() - run.final) / (len(run) - 1)
    assert torch.allclose(surrogate, -(run.log_ratio.exp() * everyone[:, None]).sum(1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(planted.loss(run), right.loss(run), rtol=1e-2)


def test_a_tiny_study_goes_on(tiny, monkeypatch):
    """A finished run is not done again; curves and samples are kept as they were computed."""
    plan, found = tiny
    assert (plan.out / "failures.png").stat().st_size > 50_000 and set(found["curves"]["setup"]) == set(study.SETUPS)
    assert len(found["samples"]) == study.IMAGES * len(study.SETUPS) and np.isfinite(found["finals"].drop(columns="setup").to_numpy()).all()
    monkeypatch.setattr(study, "compute", lambda *given: pytest.fail("a finished run was done again"))
    again = study.main(plan)
    assert all(again[name].equals(frame) for name, frame in found.items())
    with pytest.raises(ValueError, match="backend: expected loky or dask"):
        study.Study(pool=study.Pool(2, "threading"))


def test_every_failure_has_a_panel():
    """And its healthy run is one."""
    assert {panel.failing for panel in study.PANELS} == {*study.SETUPS} - {*study.HEALTHY}
    assert {panel.healthy for panel in study.PANELS} == {*study.HEALTHY}
