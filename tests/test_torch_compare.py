"""The comparison of methods: rows that agree with one another, parts that are kept, an estimator of signal-to-noise, a sorted table."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import ctrl
from ctrl.testing import assert_mean
from ctrl.torch import compare as c
from ctrl.torch.compared import STYLES, summary
from ctrl.torch.methods import ALL, AdjointMatching, Pathwise, RewardWeighted, ScoreFunction, ValueGradient

ONLY = ("value-gradient", "score-function", "ppo")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A tiny comparison of three methods: its settings and frames."""
    folder = tmp_path_factory.mktemp("compare")
    settings = c.Compare(quick=True, only=ONLY, cache=folder / "cache", out=folder / "out", iterations=3, transfer_steps=(5,)).made_quick()
    settings = replace(settings, snr_sizes=(4, 8), pretraining=replace(settings.pretraining, iterations=10))
    return settings, c.compare(settings)


def parts_of(settings):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((settings.out / "parts").iterdir())}


# ------------------------------------------------------------------------------------------- the whole


def test_files(done):
    settings, frames = done
    there = {path.name for path in settings.out.iterdir()}
    assert there == {"config.json", "env.json", "parts", "table.txt", "compare.png", "index.html", *(f"{name}.csv" for name in frames)}
    assert set(frames) == {"runs", "learning", "ideal", "transfer", "snr"}
    assert len(parts_of(settings)) == 2 * (3 * 2 + 2) + 2 + 1 + 3   # 3 methods, 2 seeds; 2 at the frontier's other weight; snapshot; transfer; snr
    for name, frame in frames.items():
        assert pd.read_csv(settings.out / f"{name}.csv").shape == frame.shape


def test_rows_are_consistent(done):
    """Every method has the same queries; regret is J* - J; totals are those of the last update; queries plus the skeleton's are counted."""
    settings, frames = done
    runs, learning = frames["runs"], frames["learning"]
    assert set(runs["queries"]) == {settings.paths * settings.iterations} and runs["stopped"].isna().all()
    assert np.allclose(runs["regret"], runs["optimum"] - runs["objective"], rtol=0, atol=1e-9)
    assert not np.allclose(runs["regret"], runs["optimum"] - runs["reward"], rtol=0, atol=1e-9)  # planted: judged by reward
    assert np.allclose(runs["objective"], runs["reward"] - runs["kl_weight"] * runs["kl_mean"], rtol=1e-4)
    for _, run in runs.iterrows():
        rows = learning[(learning[["method", "seed", "kl_weight"]] == run[["method", "seed", "kl_weight"]]).all(axis=1)]
        assert len(rows) == run["updates"] and rows["queries"].tolist() == [settings.paths * (k + 1) for k in range(settings.iterations)]
        assert np.allclose(rows["regret"], run["optimum"] - rows["objective"])
        for name in ("reward_evaluations", "network_evaluations", "seconds"):
            assert rows[name].is_monotonic_increasing and rows[name].iloc[-1] == run[name]
    by_method = runs.groupby("method")[["reward_evaluations", "network_evaluations"]].max()
    q, n = settings.paths * settings.iterations, settings.steps
    assert by_method.loc["score-function"].tolist() == [q, q * n * 3]  # sampling, the forward of the update, the reference's
    assert by_method.loc["value-gradient", "reward_evaluations"] == q * (n + 2)  # the skeleton at every step, the gradient at the end
    assert q * n * 4 <= by_method.loc["ppo", "network_evaluations"] <= q * n * 5  # one more epoch, with the reference's or without


def test_first_batches_are_the_same_paths(done):
    """Before the first update all methods sample the pre-trained model on the noise of their seed."""
    learning = done[1]["learning"]
    first = learning[learning["iteration"] == 1].groupby("seed")["reward"]
    assert (first.nunique() == 1).all() and first.first().nunique() == 2


def test_frontier_transfer_and_snr(done):
    settings, frames = done
    at = frames["runs"].groupby("method")["kl_weight"].nunique()
    assert at.to_dict() == {"value-gradient": 2, "score-function": 2, "ppo": 1}  # PPO is not on the frontier
    assert frames["ideal"]["kl"].is_monotonic_increasing and frames["ideal"]["reward"].is_monotonic_increasing
    transfer = frames["transfer"].set_index(["model", "eta", "steps"]).sort_index()
    assert len(transfer) == 2 * 3 * len(settings.transfer_steps) and (transfer.loc["pre-trained", "kl_mean"] == 0).all()
    assert set(zip(frames["snr"]["method"], frames["snr"]["paths"], strict=True)) == {(m, n) for m in ONLY for n in settings.snr_sizes}
    assert (frames["snr"]["noise"] > 0).all()


def test_resume_reuses_parts(done):
    """Finished parts stay as they are, a part that is gone is made again to the same numbers, other settings are refused by name."""
    settings, frames = done
    before = parts_of(settings)
    gone = settings.out / "parts" / "snr_ppo.json"
    gone.unlink()
    again = c.compare(replace(settings, resume=True, parts=("learning", "frontier", "transfer", "snr")))
    after = parts_of(settings)
    assert {name for name in before if before[name] != after[name]} == {gone.name} and set(before) == set(after)
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(frame, again[name], rtol=1e-5)
    with pytest.raises(ValueError, match=r"out: expected a new folder \(or --resume"):
        c.compare(settings)
    with pytest.raises(ValueError, match="got other values of steps, clip_norm"):
        c.compare(replace(settings, resume=True, steps=5, clip_norm=2.0))


def test_runs_side_by_side_are_the_same_runs(done, tmp_path):
    settings, frames = done
    found = c.compare(replace(settings, out=tmp_path, only=("score-function",), seeds=2, parts=("learning",), jobs=2))
    ours = frames["learning"].query("method == 'score-function' and kl_weight == 0.5").drop(columns="seconds").dropna(axis=1).reset_index(drop=True)
    pd.testing.assert_frame_equal(found["learning"].drop(columns="seconds"), ours, rtol=1e-5)
    assert set(found) == {"runs", "learning"} and (tmp_path / "compare.png").exists()


def test_a_method_that_diverges_is_reported(done, tmp_path, monkeypatch):
    """Its last finite state stands in the table, with the reason; the others go on. A reward without gradient is such a reason too."""
    settings, _ = done
    update = c.Training.update

    def fails(self):
        if isinstance(self.settings.method, ValueGradient) and self.iteration == 2:
            raise FloatingPointError("kl_max is inf")
        return update(self)

    monkeypatch.setattr(c.Training, "update", fails)
    runs = c.compare(replace(settings, out=tmp_path, only=("value-gradient", "ppo"), seeds=1, parts=("learning",)))["runs"].set_index("method")
    assert runs.loc["value-gradient", "stopped"] == "update 3: kl_max is inf" and runs.loc["value-gradient", "updates"] == 2
    assert np.isfinite(runs.loc["value-gradient", "regret"]) and runs.loc["ppo", "updates"] == 3
    assert "1 of 1 stopped at the last finite state shown: update 3: kl_max is inf" in (tmp_path / "table.txt").read_text()


def test_a_final_evaluation_that_is_not_finite(done, monkeypatch):
    """The last finite batch stands in for it; with no batch at all, nothing does."""
    settings, _ = done
    task = c._prepared(settings)
    training = c.Training(task, settings.single(ALL[0], 0, 0.5), c.Accelerator())
    monkeypatch.setattr(c, "measured", lambda *given: {"reward": float("inf")})
    last = {"reward": -1.0, "objective": -2.0, "kl_mean": 2.0, "kl_median": 2.0, "kl_max": 3.0, "loss": 0.0}
    row, prompts, why = c.judged(task, training, settings, [last])
    assert why == "final evaluation: reward is inf" and row["regret"] == task.yardstick.objective + 2.0 and "loss" not in row
    assert prompts == [] and c.judged(task, training, settings, []) == ({}, [], why)
    head = {"method": "ppo", "seed": 0, "kl_weight": 0.5, "stopped": why, "queries": 0}
    assert "1 of 1 stopped" in c.table(pd.DataFrame([head]), 0.5)


def kept(settings, *names):
    return [(c.Trained(method, seed, settings.kl_weight), c.Trained(method, seed, settings.kl_weight).read(settings)) for method in ALL
            for seed in range(settings.seeds) if c.name_of(method) in names]


def test_unequal_runs_are_refused(done, tmp_path, monkeypatch):
    """Another model, other queries, other noise of one run are seen in what was kept; a method that samples more than the rest stops a comparison."""
    settings, _ = done
    c.fair(kept(settings, *ONLY))
    assert len(kept(settings, *ONLY)) == 6
    for what, plant in (("the pre-trained model", lambda run: run["final"].update(base="another")),
                        ("reward queries of update 2", lambda run: run["rows"][1].update(queries=33)),
                        ("rewards of the first paths", lambda run: run["rows"][0].update(reward=1.01 * run["rows"][0]["reward"])),
                        ("prompts of update 3", lambda run: run["rows"][2].update(prompts=[{"prompt": 0, "paths": 16}])),
                        ("rewards of the first paths", lambda run: run.update(rows=kept(settings, "ppo")[0][1]["rows"]))):  # of seed 0
        found = kept(settings, *ONLY)
        plant(found[-1][1])
        with pytest.raises(ValueError, match=f"expected the same of value-gradient_seed1_lambda0.5 and ppo_seed1_lambda0.5, got {what}"):
            c.fair(found)
    single = c.Compare.single

    def greedy(self, method, seed, kl_weight):
        own = single(self, method, seed, kl_weight)
        return replace(own, paths=own.paths + 2) if c.name_of(method) == "ppo" else own

    monkeypatch.setattr(c.Compare, "single", greedy)
    with pytest.raises(ValueError, match="ppo_seed0_lambda0.5, got reward queries of update 1: 16 and 18"):
        c.compare(replace(settings, out=tmp_path, only=("score-function", "ppo"), seeds=1, parts=("learning",)))
    assert not (tmp_path / "table.txt").exists()


def test_learning_rates_are_searched(done, tmp_path):
    """By objective, among rates whose runs all went through, on seeds of their own; what is chosen moves the runs that are shown."""
    def tried(method, rate, objective, stopped=None):
        return {"method": method, "learning_rate": rate, "objective": objective, "stopped": stopped, "queries": 64, "reward": 9 * rate}

    rates = c.searched([tried("a", 1, 0.5), tried("a", 1, 0.7), tried("a", 2, 0.8), tried("a", 2, 0.6), tried("a", 3, 2.0), tried("a", 3, 2.0, "no"),
                        tried("b", 2, 1.0, "no"), tried("b", 1, np.nan)])
    assert rates["chosen"].tolist() == [False, True, False, False, True] and rates["stopped"].tolist() == [0, 0, 1, 1, 0]
    assert c.searched([]).empty
    settings = replace(done[0], out=tmp_path, only=("score-function",), seeds=1, parts=("learning",), rates=(1.0, 0.01, 30.0))
    frames = c.compare(settings)
    objectives = frames["rates"].set_index("learning_rate")["objective"]
    assert objectives.index.tolist() == [1e-3, 1e-5, 3e-2] and objectives.nunique() == 3
    best = objectives.idxmax()
    assert frames["rates"].query("chosen")["learning_rate"].tolist() == [best] == frames["runs"]["learning_rate"].tolist()
    assert len(frames["runs"]) == 1 and {part.seed for part in c.trials(settings, settings.methods)} == {2**30}
    end = ", the largest" if best == 3e-2 else ", the least" if best == 1e-5 else ""
    assert f"144 more reward queries a method: score-function {best:g} (of 3{end})" in (tmp_path / "table.txt").read_text()
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 1  # the model that is shown
    before = parts_of(settings)
    c.compare(replace(settings, resume=True))
    assert parts_of(settings) == before


def test_page_shows_the_table(done):
    """Every number and every sentence of the table, and the figure, in one file that asks for no other."""
    settings, frames = done
    page, lines = (settings.out / "index.html").read_text(), (settings.out / "table.txt").read_text().splitlines()
    numbers = [cell for line in lines[2:5] for cell in line.split()]
    assert len(numbers) > 30 and all(f">{cell.replace('+-', ' ± ')}</" in page for cell in numbers)
    assert len(lines) > 5 and all(line.replace("+-", "±").replace("'", "&#39;") in page for line in lines[5:])
    assert lines[5].startswith(f"J* = {frames['runs']['optimum'].iloc[0]:.3f} +- ") and "of 256 reference samples, ESS" in lines[5]
    assert page.count("data:image/png;base64,") == 1 and "http" not in page


def test_refusals():
    with pytest.raises(ValueError, match="only: expected some of value-gradient, .*, got reinforce"):
        c.Compare(only=("reinforce",))
    with pytest.raises(ValueError, match="kl_weight: expected a finite number > 0, got 0"):
        c.Compare(kl_weight=0.0)
    with pytest.raises(ValueError, match="snr_batches: expected an integer >= 3, got 2"):
        c.Compare(snr_batches=2)
    with pytest.raises(ValueError, match="rates: expected different factors, got 1 3 1"):
        c.Compare(rates=(1.0, 3.0, 1.0))
    with pytest.raises(ValueError, match=r"seed: expected an integer below 2\^30 with all its runs"):
        c.Compare(seed=2**30 - 2)
    with pytest.raises(ValueError, match="snr_sizes: expected an integer >= 2, got 1"):
        c.Compare(snr_sizes=(1, 2))


def test_names_and_identity():
    assert c.NAMES == ("value-gradient", "temporal-difference", "pathwise", "adjoint-matching", "score-function", "ppo", "dpok", "reward-weighted")
    settings = c.Compare()
    assert settings.identity() == replace(settings, seeds=9, only=("ppo",), parts=("snr",), jobs=2, resume=True).identity()
    assert settings.identity() != replace(settings, snapshot=51).identity()
    assert set(settings.identity()["methods"]) == set(c.NAMES) and json.dumps(settings.identity())


# ------------------------------------------------------------------------------------------- signal to noise


def gradients(seed, batches, p=40, scale=1.0):
    """Gaussian gradients with |E g|^2 = p/4 and tr Cov = scale^2 (1 + ... + p)/p, correlated by a rotation."""
    noise = ctrl.Noise(seed, batches).start(p)
    rotation = np.linalg.qr(ctrl.Noise(10**6, p).start(p))[0]
    return torch.as_tensor(0.5 + scale * (noise * np.sqrt(np.arange(1, p + 1) / p)) @ rotation)


def test_signal_to_noise_of_a_known_gradient():
    """Mean over 1,500 repetitions of 8 batches: false alarm 1e-6, an error of 0.5 in 10 is missed once in a thousand."""
    rows = pd.DataFrame([c.signal_to_noise(gradients(seed, 8)) for seed in range(1500)])
    signal, noise = 40 / 4, 41 / 2
    assert_mean(rows["signal"].to_numpy(), signal, resolves=0.8)
    assert_mean(rows["noise"].to_numpy(), noise, resolves=0.8)
    with pytest.raises(AssertionError):  # planted: |mean g|^2 uncorrected, too large by noise/M = 2.6
        assert_mean((rows["signal"] + rows["noise"] / 8).to_numpy(), signal, resolves=0.8)
    with pytest.raises(AssertionError):  # planted: the mean over all pairs, a batch with itself among them, in the noise
        assert_mean((rows["noise"] * 7 / 8).to_numpy(), noise, resolves=0.8)


def test_signal_to_noise_error_is_that_of_repetition():
    """The jackknife error against the spread of 400 repetitions of 32 batches: within 15 %; half or twice of it is not."""
    rows = pd.DataFrame([c.signal_to_noise(gradients(seed, 32, scale=2.0)) for seed in range(2000, 2400)])
    ratio = np.sqrt((rows["snr_error"] ** 2).mean()) / rows["snr"].std()
    assert 0.8 < ratio < 1.25, ratio


def test_batch_gradient_is_the_mean_of_path_gradients(done):
    """For an objective that does not couple paths, the gradient of a batch is the mean of those of its halves."""
    settings, _ = done
    training = c.Training(c._prepared(settings), settings.single(ALL[0], 0, 0.5), c.Accelerator())
    training.objective, _ = training.asked_of(Pathwise())
    noise = ctrl.Noise(5, 6)
    whole, first, second = (c.batch_gradient(training, part) for part in (noise, noise[:3], noise[3:]))
    assert whole.shape == (sum(p.numel() for p in training.policy.trainable()),) and whole.norm() > 0
    assert (whole - (first + second) / 2).norm() < 1e-5 * whole.norm()
    assert (whole - (first + second)).norm() > 0.5 * whole.norm()  # planted: the sum


# ------------------------------------------------------------------------------------------- the table


def made(method, regret, reward, seed=0, **more):
    return {"method": method, "seed": seed, "kl_weight": 0.5, "stopped": None, "queries": 640, "queries_to_share": None, "regret": regret,
            "reward": reward, "kl_mean": 2.0, "kl_median": 2.0, "kl_max": 4.0, **more}


def test_table_is_sorted_by_regret():
    """Not by reward: a method that buys reward with KL stands below one that does not; means and standard errors over seeds."""
    runs = pd.DataFrame([made("ppo", 1.6, -0.1), made("ppo", 1.2, -0.1, seed=1), made("pathwise", 0.5, -0.4), made("pathwise", 0.5, -0.4, seed=1),
                         made("dpok", np.nan, np.nan, stopped="update 1: no"), made("dpok", np.nan, np.nan, seed=1),
                         made("value-gradient", 0.1, -0.9) | {"kl_weight": 1.0}])
    rows = summary(runs, 0.5)
    assert rows.index.tolist() == ["pathwise", "ppo", "dpok"] and rows["regret"].tolist()[:2] == [0.5, pytest.approx(1.4)]
    assert rows.index.tolist() != rows.sort_values("reward", ascending=False).index.tolist()  # planted: by reward
    assert rows.loc["ppo", "regret_sem"] == pytest.approx(0.2) and rows.loc["dpok", "stopped"] == 1
    lines = c.table(runs, 0.5).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["pathwise", "ppo", "dpok", "1"]
    assert "1.400+-0.200" in lines[3] and "1 of 2 stopped at the last finite state shown: update 1: no" in lines[5]


def test_share_that_some_seeds_never_reach():
    runs = pd.DataFrame([made("ppo", 1.0, 0.0, queries_to_share=500.0), made("ppo", 1.0, 0.0, seed=1)])
    assert "500 (1/2)" in c.table(runs, 0.5)
    assert c.table(runs, 2.0) == "no learning curves were asked for"


def test_every_method_has_its_own_style():
    assert set(STYLES) == set(c.NAMES) and len({s["color"] for s in STYLES.values()}) == len({s["marker"] for s in STYLES.values()}) == 8
    kinds = (ValueGradient, Pathwise, AdjointMatching, ScoreFunction)
    assert all(kind in c.ON_FRONTIER for kind in kinds) and RewardWeighted not in c.ON_FRONTIER
