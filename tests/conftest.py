"""Hypothesis profiles: "ci" (the default) repeats the same examples everywhere; "nightly" looks further and is not derandomised."""

from __future__ import annotations

import os

import numpy as np
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


@pytest.fixture(scope="session")
def bench():
    """(problem, policy, grid) where every planted error of theory.md, section 7, is an error: eta != 1, an uneven grid, a departure through x."""
    import ctrl

    def make(eta=0.7, steps=3, dim=2, sampled=False, kl_weight=0.5, discount=0.0, times=(0.0, 0.3, 0.5, 0.75, 0.9, 1.0)):
        data = ctrl.Gaussian(np.array([1.0, -0.5])[:dim], np.array([[0.6, 0.2], [0.2, 0.3]])[:dim, :dim])
        reward = ctrl.QuadraticReward(np.diag([1.0, 0.5])[:dim, :dim], np.array([-0.5, 1.0])[:dim])
        problem = ctrl.Problem(ctrl.VP(0.5, 2.0, 1.0), data, reward, kl_weight=kl_weight, eta=eta, discount=discount)
        W = np.array([[[0.3, -0.2], [0.1, 0.2]]])[:, :dim, :dim]
        policy = ctrl.BasisPolicy(problem, lambda t: np.array([1.0]), W, np.array([[0.2, -0.1]])[:, :dim], 0.4 * np.eye(dim) if sampled else None)
        return problem, policy, ctrl.TimeGrid(np.array(times)[[*range(steps), -1]])

    return make


@pytest.fixture(scope="session")
def away():
    """|mean - target| / |target|, the target grad J unless it is given."""
    import ctrl

    def measure(estimator, problem, policy, grid, noise, target=None):
        target = ctrl.exact.evaluate(problem, policy, grid).gradient.theta if target is None else target
        return float(np.linalg.norm(estimator(problem, policy, grid, noise).mean - target) / np.linalg.norm(target))

    return measure


@pytest.fixture(scope="session")
def two_processes():
    """(make, work) -> what work returns of make(accelerator) in each of two threads, which exchange as two processes do under `accelerate`."""
    import threading
    from types import SimpleNamespace

    import torch

    def run(make, work, factor=1.0):
        barrier, slots, out = threading.Barrier(2, timeout=60), [None, None], [None, None]

        def rank(k):
            def exchange(x):
                slots[k] = x
                barrier.wait()
                both = list(slots)
                barrier.wait()
                return both

            return SimpleNamespace(device=torch.device("cpu"), process_index=k, num_processes=2, is_main_process=k == 0,
                                   gather=lambda x: torch.cat(exchange(x.detach())), reduce=lambda x, how: factor * torch.stack(exchange(x)).mean(0))

        def done(k):
            out[k] = work(parts[k])

        parts = [make(rank(k)) for k in range(2)]  # not in the threads, which share one seed
        threads = [threading.Thread(target=done, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out

    return run
