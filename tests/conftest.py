"""Hypothesis profiles: "ci" (the default) repeats the same examples everywhere; "nightly" looks further and is not derandomised."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

import ctrl

_slow = [HealthCheck.too_slow]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None, suppress_health_check=_slow)
settings.register_profile("nightly", derandomize=False, deadline=None, max_examples=500, suppress_health_check=_slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def mixture_in_space():
    """A problem without truth: a mixture in three dimensions."""
    law = ctrl.GaussianMixture([0.4, 0.6], [[-0.8, 0.3, 0.1], [0.7, -0.2, 0.4]], [[[0.3, 0.1, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 0.5]]] * 2)
    return ctrl.Problem(ctrl.VP(0.1, 10.0), law, ctrl.BumpReward([-0.7, 0.4, 0.2], 0.8), kl_weight=0.3)
