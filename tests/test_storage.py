"""Save and load: every stored type, bit for bit, in both formats; nothing else gets in or out."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

import ctrl
from ctrl import policy as P
from ctrl.storage import STORABLE


def things():
    rng = np.random.default_rng(0)
    g = ctrl.Gaussian([1 / 3, -0.5], [[0.6, 0.2], [0.2, 0.3]])
    m = ctrl.GaussianMixture([0.3, 0.7], rng.normal(size=(2, 2)), [np.eye(2), 2 * np.eye(2) / 3])
    quadratic = ctrl.QuadraticReward([[1.0, 0.1], [0.1, 0.5]], [-0.5, 1.0], [1e-300, 0.1])
    one = ctrl.Problem(ctrl.VP(0.1, 10.0, 1.5), g, quadratic, 0.5, 0.3, "exact", 0.1, 0.2)
    posterior = ctrl.ClassLogPosteriorReward((g, m), [0.25, 0.75], 1)
    two = ctrl.Problem(ctrl.SubVP(), m, posterior, 0.2)
    W, w = rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 2))
    return [
        one, two, ctrl.Problem(ctrl.VE(), m, ctrl.BumpReward([0, 1], 0.5), 0.2),
        ctrl.Problem(ctrl.FlowMatching(0.7), g, ctrl.LinearReward([1, 2]), 1),
        ctrl.Problem(ctrl.OU(2.0), g, ctrl.LinearReward([1, 2]), 1),
        ctrl.Problem(ctrl.OU(), g, ctrl.LogDensityReward(m), 1), ctrl.TimeGrid([0, 0.1, 1 / 3]),
        ctrl.Problem(ctrl.DiscreteVP([1e-4, 1 / 3, 0.9], 1.5), g, quadratic, 0.5),
        ctrl.AffinePolicy(W, w), ctrl.AffinePolicy(W, w, np.stack([np.eye(2) * s for s in (1, 2, 3)])),
        ctrl.BasisPolicy(two, P.Monomials(2), W, w, exploration=np.eye(2)), ctrl.BasisPolicy(one, P.TimeBins(3), W, w),
        ctrl.BasisPolicy.shift(one, [0.1, 0.2]), ctrl.BasisPolicy.scaled(one, 0.9, [0.1, 0.2]),
        ctrl.MixturePolicy(ctrl.VP(), m, np.eye(2)), *(factory() for factory in ctrl.zoo.PROBLEMS)]


THINGS = things()


def same(a, b):
    """Equal types and equal bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_round_trip(tmp_path, suffix):
    seen = set()

    def visit(thing):
        seen.add(type(thing))
        if isinstance(thing, tuple):
            for part in thing:
                visit(part)
        elif is_dataclass(thing):
            for f in fields(thing):
                visit(getattr(thing, f.name))

    for i, thing in enumerate(THINGS):
        path = tmp_path / f"{i}{suffix}"
        ctrl.save(thing, path)
        assert same(ctrl.load(path), thing)
        ctrl.save(thing, str(path))          # again, by name, over the old file
        visit(thing)
    assert set(STORABLE) <= seen             # no stored type goes untested


def test_one_changed_bit_is_noticed():
    a, b = ctrl.TimeGrid([0, 1.0]), ctrl.TimeGrid([0, np.nextafter(1.0, 2)])
    assert same(a, ctrl.TimeGrid([0, 1.0])) and not same(a, b)


def test_a_loaded_policy_runs(tmp_path):
    problem = ctrl.zoo.gaussian_pull_2d()
    policy = ctrl.BasisPolicy.scaled(problem, 0.9, [0.1, 0.1])
    ctrl.save(policy, tmp_path / "p.npz")
    ctrl.save(problem, tmp_path / "q.json")
    truth = ctrl.exact.evaluate(ctrl.load(tmp_path / "q.json"), ctrl.load(tmp_path / "p.npz"), problem.grid(20))
    assert truth.objective == ctrl.exact.evaluate(problem, policy, problem.grid(20)).objective


def tampered(tmp_path, edit, thing=None):
    path = tmp_path / "x.json"
    ctrl.save(thing or ctrl.Gaussian([0.0], [[1.0]]), path)
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    return ctrl.load(path)


EDITS = [
    lambda r: r.update(format="ctrl-0"),
    lambda r: r.pop("format"),
    lambda r: r.pop("object"),
    lambda r: r["object"].update(type="os.system"),
    lambda r: r["object"].pop("type"),
    lambda r: r["object"].pop("fields"),
    lambda r: r["object"]["fields"].pop("cov"),
    lambda r: r["object"]["fields"].update(extra=1.0),
    lambda r: r["object"]["fields"].update(cov={"array": [[-1.0]]}),
    lambda r: r["object"]["fields"].update(cov={"array": "array_0"}),
    lambda r: r["object"]["fields"].update(mean={"array": [float("nan")]}),
    lambda r: r["object"]["fields"].update(mean={"tuple": 3}),
]


@pytest.mark.parametrize("edit", EDITS, ids=range(len(EDITS)))
def test_tampered_files_are_refused(tmp_path, edit):
    with pytest.raises(ValueError, match=r"^path: expected [^\n]*, got [^\n]*$"):
        tampered(tmp_path, edit)


def test_a_tampered_theta_is_refused(tmp_path):
    shift = ctrl.BasisPolicy.shift(ctrl.zoo.gaussian_pull_2d(), [0.1, 0.2])
    with pytest.raises(ValueError, match="theta"):
        tampered(tmp_path, lambda r: r["object"]["fields"].update(theta={"array": [0.1]}), shift)


def test_what_is_not_a_file_of_ours(tmp_path):
    thing = ctrl.Gaussian([0.0], [[1.0]])
    ctrl.save(thing, tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    (tmp_path / "noise.npz").write_bytes(b"not a zip file")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\xfa")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    for name in ("cut.npz", "noise.npz", "empty.npz", "empty.json", "list.json", "latin.json", "other.npz"):
        with pytest.raises(ValueError, match="path: expected a file written by ctrl.save"):
            ctrl.load(tmp_path / name)
    for call in (lambda: ctrl.load(tmp_path / "x.pickle"), lambda: ctrl.save(thing, tmp_path / "x.pickle")):
        with pytest.raises(ValueError, match=r"path: expected a name ending in \.json or \.npz"):
            call()
    assert not (tmp_path / "x.pickle").exists()


def test_functions_cannot_be_written(tmp_path):
    problem = ctrl.zoo.gaussian_pull_2d()
    by_function = ctrl.BasisPolicy(problem, lambda t: [t], np.zeros((1, 2, 2)), np.zeros((1, 2)))
    for thing in (ctrl.CallableReward(lambda x: x[:, 0]), by_function, ctrl.CallablePolicy(lambda t, x, th: x, [1.0]), {"a": 1}):
        with pytest.raises(ValueError, match="thing: expected"):
            ctrl.save(thing, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
