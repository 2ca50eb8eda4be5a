"""Hypothesis profiles: "ci" (the default) repeats the same examples everywhere; "nightly" looks further and is not derandomised."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_slow = [HealthCheck.too_slow]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None, suppress_health_check=_slow)
settings.register_profile("nightly", derandomize=False, deadline=None, max_examples=500, suppress_health_check=_slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
