"""Pictures of a run: the same noise before and after, and what was reached against what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from ctrl.torch.chain import simulate
from ctrl.torch.policy import Policy
from ctrl.torch.pretrain import sampling_grid
from ctrl.torch.task import PICTURES, Settings, Task

# Okabe and Ito: distinguishable without colour vision, and of different lightness in grey.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"


def before_and_after(task: Task, policy: Policy, pretrained: Policy, settings: Settings, out: Path) -> None:
    """before.png, after.png and before_after.png: 64 images of the same start and step noise under both models.

    Source: design.md, runs.   Checked: tests/test_torch_finetune.py::test_run_folder
    """
    grid, noise = sampling_grid(task.problem.schedule, settings.steps), settings.noise(PICTURES, 64)
    sets = [("pre-trained", "before", pretrained), ("fine-tuned", "after", policy)]
    ends = [simulate(task.problem, model, grid, noise, task.context(64), most=task.most).terminal for _, _, model in sets]
    drawn = [torch.cat([task.decode(x).cpu() for x in end.split(task.most or 64)]) for end in ends]
    tiles = [(title, name, tile(images)) for (title, name, _), images in zip(sets, drawn, strict=True)]
    for _, name, picture in tiles:
        imsave(out / f"{name}.png", _enlarged(picture), cmap="gray", vmin=0, vmax=1)
    figure = Figure(figsize=(7, 3.8), layout="constrained")  # no pyplot, so that a notebook keeps its backend
    axes = figure.subplots(1, 2)
    for axis, (title, _, picture) in zip(axes, tiles, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{title}, same noise")
        axis.set(xticks=[], yticks=[])  # not set_axis_off: the layout would leave no room for the titles
    figure.savefig(out / "before_after.png", dpi=150)


def tile(images: Tensor, columns: int = 8) -> np.ndarray:
    """(n, c, h, w) in [-1, 1] to one picture in [0, 1], with a line between images."""
    x = ((images.float().cpu().clamp(-1, 1) + 1) / 2).numpy()
    n, c, h, w = x.shape
    rows = -(-n // columns)
    out = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, c), 0.5)
    for k, image in enumerate(x):
        top, left = (k // columns) * (h + 1) + 1, (k % columns) * (w + 1) + 1
        out[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    return out[..., 0] if c == 1 else out


def _enlarged(picture: np.ndarray) -> np.ndarray:
    factor = max(1, 600 // picture.shape[0])
    return np.kron(picture, np.ones((factor, factor) + (1,) * (picture.ndim - 2)))


def learning_curves(rows: list[dict[str, float]], summary: dict[str, Any], path: Path) -> None:
    """Reward, regret and KL of the training batches against reward queries, with the optimum's values and the final model's.

    Source: theory.md, sections 9 and 15.   Checked: tests/test_torch_finetune.py::test_run_folder
    """
    queries = np.array([row["queries"] for row in rows])
    tuned: dict[str, float] = summary["tuned"]
    best: dict[str, float] = summary.get("yardstick", {})
    panels = [("reward", "reward (nats)" if summary["reward"] == "ClassReward" else "reward", "reward", best.get("reward"))]
    if best:
        panels.append(("regret", "regret J* - J (reward units)", "regret", 0.0))
    panels.append(("kl_mean", "path KL (nats per image)", "kl_mean", best.get("kl")))
    figure = Figure(figsize=(3.4 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True)
    for axis, (name, label, key, optimum) in zip(np.atleast_1d(axes), panels, strict=True):
        values = np.array([best["objective"] - row["objective"] if name == "regret" else row[name] for row in rows])
        axis.plot(queries, values, color=BLUE, alpha=0.35, lw=0.8)
        axis.plot(queries, _smooth(values), color=BLUE, label="training batches, smoothed")
        if name == "kl_mean":
            axis.plot(queries, _smooth(np.array([row["kl_median"] for row in rows])), color=GREEN, ls=":", label="median of the batch")
            axis.plot(queries, _smooth(np.array([row["kl_max"] for row in rows])), color=ORANGE, ls="-.", label="maximum of the batch")
        axis.axhline(tuned[key], color=BLACK, lw=1, label="final model, fresh noise")
        if optimum is not None:
            axis.axhline(optimum, color=BLACK, lw=1, ls="--", label="optimum (yardstick)")
        axis.set_xlabel("reward queries")
        axis.set_ylabel(label)
        axis.legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=150)


def prompt_rewards(table: list[dict[str, Any]], reward: str, path: Path, most: int = 30) -> None:
    """Reward of each prompt under the pre-trained and the fine-tuned model, with standard errors; of more, those that changed most either way.

    Source: design.md, runs.   Checked: tests/test_torch_pipelines.py::test_a_run_says_how_each_prompt_fared
    """
    gain = np.array([row["tuned"]["reward"] - row["pretrained"]["reward"] for row in table])
    at = np.argsort(-np.abs(gain))[:most]
    shown = [table[j] for j in at[np.argsort(-gain[at])]]
    place = np.arange(len(shown))
    figure = Figure(figsize=(7, 1.1 + 0.24 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for model, label, colour, mark, shift in (("pretrained", "pre-trained", ORANGE, "s", -0.12), ("tuned", "fine-tuned", BLUE, "o", 0.12)):
        means = [row[model]["reward"] for row in shown]
        errors = [row[model]["reward_error"] or 0.0 for row in shown]  # none of a single image
        axis.errorbar(means, place + shift, xerr=errors, fmt=mark, color=colour, ms=4, capsize=2, lw=1, label=label)
    axis.set_yticks(place, [text if len(text := row["prompt"]) <= 40 else f"{text[:37]}..." for row in shown], fontsize=7)
    axis.set_ylim(len(shown) - 0.5, -0.5)  # what gained most on top
    axis.grid(axis="y", alpha=0.2)
    few = f"\nthe {len(shown)} of {len(table)} prompts that changed most" if len(shown) < len(table) else ""
    axis.set_xlabel(f"{reward}: mean and standard error of fresh images{few}", fontsize=8)
    figure.legend(fontsize=7, frameon=False, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred running mean, shorter at the ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
