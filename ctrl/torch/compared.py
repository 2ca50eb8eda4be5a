r"""What a comparison of methods shows: a table by regret, a figure, and one page without network; of its frames alone.

    frames   runs : one row a trained model      learning : one a model and update      ideal : the best reward at each KL
             transfer : one a sampler      snr : one an objective and batch size      prompts : one a model and prompt
             rates : one a learning rate that was tried
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ctrl.files import embedded
from ctrl.torch.methods import ALL, AdjointMatching, Method, Pathwise, ScoreFunction, TemporalDifference, ValueGradient

ON_FRONTIER = (ValueGradient, Pathwise, AdjointMatching, TemporalDifference, ScoreFunction)
MANY = 40  # prompts that a page lists
COLUMNS = (("regret", "regret", 3, True), ("objective", "objective", 3, True), ("reward", "reward", 3, True), ("KL mean", "kl_mean", 2, True),
           ("median", "kl_median", 2, False), ("max", "kl_max", 1, False), ("judged share", "judged_share", 3, True),
           ("queries to .8", "queries_to_share", 0, False), ("reward evals", "reward_evaluations", 0, False),
           ("network evals", "network_evaluations", 0, False), ("seconds", "seconds", 0, False))  # head, name, digits, with its error


def name_of(method: Method) -> str:
    """value-gradient for ValueGradient(): the name on the command line and in tables."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(method).__name__).lower()


NAMES = tuple(name_of(method) for method in ALL)


# ------------------------------------------------------------------------------------------- the table


def summary(runs: pd.DataFrame, kl_weight: float) -> pd.DataFrame:
    """One row a method at one kl_weight, by regret (by objective without J*): means over seeds, their standard errors, runs that stopped.

    Source: theory.md, section 15.   Checked: tests/test_torch_compare.py::test_table_is_sorted_by_regret
    """
    runs = runs[runs["kl_weight"] == kl_weight]
    if runs.empty:
        return pd.DataFrame()
    apart = ("method", "seed", "kl_weight", "stopped", "base")
    names = [name for name in runs.columns if name not in apart and runs[name].notna().any()]
    groups = runs.groupby("method")
    out = pd.concat([groups[names].mean(numeric_only=True), groups[names].sem(numeric_only=True).add_suffix("_sem")], axis=1)
    out = out.assign(seeds=groups.size(), stopped=groups["stopped"].count(), why=groups["stopped"].first())
    if "queries_to_share" in out:
        out["reached"] = groups["queries_to_share"].count()
    if "regret" in out:
        return out.sort_values("regret", na_position="last")
    return out.sort_values("objective", ascending=False, na_position="last") if "objective" in out else out


def table(runs: pd.DataFrame, kl_weight: float, notes: Sequence[str] = ()) -> str:
    """The summary as text; mean over seeds +- its standard error; then what is to be said of it."""
    rows = summary(runs, kl_weight)
    if rows.empty:
        return "\n".join(["no learning curves were asked for", *notes])
    heads, body = cells(rows)
    lines = [heading(rows, kl_weight), f"{'method':<20}{'runs':>5}" + "".join(f"{head:>16}" for head in heads)]
    for (method, row), shown in zip(rows.iterrows(), body, strict=True):
        lines.append(f"{method:<20}{row['seeds']:>5.0f}" + "".join(f"{cell:>16}" for cell in shown))
        if row["stopped"]:
            lines.append(f"{'':<20}{stop(row)}")
    return "\n".join([*lines, *notes])


def heading(rows: pd.DataFrame, kl_weight: float) -> str:
    """What a summary is of."""
    best = f", J* = {rows['optimum'].max():.3f}" if "optimum" in rows else ""
    order = "by regret" if "regret" in rows else "by objective"
    return f"kl_weight {kl_weight:g}{best}; {rows['queries'].max():.0f} reward queries a run; mean over seeds +- standard error; {order}"


def stop(row: pd.Series) -> str:
    """How many runs of a method ended before their last update, and why the first of them did."""
    return f"{row['stopped']:.0f} of {row['seeds']:.0f} stopped at the last finite state shown: {row['why']}"


def cells(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The heads of a summary's columns that have numbers, and what stands in each row; an objective only where there is no regret."""
    columns = [column for column in COLUMNS if column[1] in rows and not (column[1] == "objective" and "regret" in rows)]
    body = [[_cell(row, name, digits, error) for _, name, digits, error in columns] for _, row in rows.iterrows()]
    return [head for head, *_ in columns], body


def _cell(row: pd.Series, name: str, digits: int, error: bool) -> str:
    """3.21+-0.04; for what some runs never reached, with how many did."""
    x = row.get(name, np.nan)
    if not np.isfinite(x):
        return "-"
    out = f"{x:.{digits}f}" + (f"+-{row[name + '_sem']:.{digits}f}" if error and np.isfinite(row[name + "_sem"]) else "")
    return out + (f" ({row['reached']:.0f}/{row['seeds']:.0f})" if name == "queries_to_share" and row["reached"] < row["seeds"] else "")


# ------------------------------------------------------------------------------------------- the figure

# Okabe and Ito: distinguishable without colour vision; methods also differ by line and marker.
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": colour, "ls": line, "marker": marker} for name, colour, line, marker in zip(
        NAMES, ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933"),
        ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))), "os^DvPX*", strict=True)}
BLUE, GREY = STYLES[NAMES[0]]["color"], "#666666"
Panel = Callable[[Axes, dict[str, pd.DataFrame], float], None]


def draw(frames: dict[str, pd.DataFrame], kl_weight: float) -> Figure:
    """Regret (the objective without J*), KL and judged share against reward queries; the frontier; transfer; signal-to-noise; prompts: of what is
    there."""
    learning, transfer = frames.get("learning", pd.DataFrame()), frames.get("transfer", pd.DataFrame())
    aim = ("regret", "regret $J^* - J$ (reward units)") if "regret" in {*learning, *transfer} else ("objective", "objective $J$ (reward units)")
    share = ("judged_share", "judged share")
    panels: list[tuple[bool, Panel]] = [
        (len(learning) > 0, _curve(*aim)), (len(learning) > 0, _curve("kl_mean", "path KL (nats per image)")),
        ("judged_share" in learning, _curve(*share)), ("ideal" in frames or frames["runs"]["kl_weight"].nunique() > 1, _frontier),
        (len(transfer) > 0, _transfer(*(share if "judged_share" in transfer else ("reward", "reward")))), (len(transfer) > 0, _transfer(*aim)),
        ("snr" in frames, _snr), ("prompts" in frames, _prompts)]
    panels = [(there, panel) for there, panel in panels if there]
    columns = min(4, len(panels) + 1)
    figure = Figure(figsize=(4.1 * columns, 3.5 * -(-(len(panels) + 1) // columns)), layout="constrained")
    axes = figure.subplots(-(-(len(panels) + 1) // columns), columns, squeeze=False).ravel()
    for axis, (_, panel) in zip(axes, panels, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
        panel(axis, frames, kl_weight)
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    shown = {method for frame in frames.values() if "method" in frame for method in frame["method"]}
    lines = [Line2D([], [], label=name, lw=1.6, ms=5, **style) for name, style in STYLES.items() if name in shown]
    axes[len(panels)].legend(handles=lines, title=f"kl_weight {kl_weight:g} unless said", loc="center", frameon=False, handlelength=5)
    return figure


def _curve(name: str, label: str) -> Panel:
    """Means over seeds of running means over updates; bands from the least to the greatest seed."""
    def panel(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
        at_weight = frames["learning"][frames["learning"]["kl_weight"] == kl_weight]
        for method, rows in at_weight.groupby("method", sort=False):
            runs = rows.pivot(index="queries", columns="seed", values=name)
            runs = runs.rolling(min(15, 1 + len(runs) // 8), center=True, min_periods=1).mean()
            axis.plot(runs.index, runs.mean(axis=1), lw=1.6, ms=4, markevery=max(1, len(runs) // 6), **STYLES[method])
            axis.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=STYLES[method]["color"], alpha=0.15, lw=0)
        shown = np.concatenate([line.get_ydata() for line in axis.lines])
        if name in ("regret", "kl_mean") and np.nanmax(shown) > 3 * np.nanmin(shown) > 0:
            axis.set_yscale("log")  # an estimated J* may lie below what was reached
            axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-4 * np.nanmax(shown)))  # a KL of 0 is one of rounding
            axis.yaxis.set_major_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
            axis.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
        axis.set_xlabel("terminal reward queries (images)")
        axis.set_ylabel(label)
        axis.set_title("training batches, smoothed; band: least to greatest seed", fontsize=8)
    return panel


def _frontier(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
    """Reward against KL of every kl_weight, under the curve that no model can cross, whose slope is kl_weight; where samples show that curve."""
    runs = frames["runs"]
    runs = runs[(runs["seed"] == runs["seed"].min()) & runs["method"].isin([name_of(method) for method in ALL if isinstance(method, ON_FRONTIER)])]
    for method, rows in runs.sort_values("kl_weight").groupby("method", sort=False):
        axis.plot(rows["kl_mean"], rows["reward"], lw=1, ms=5, **STYLES[method])
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axis.set_xlabel("path KL (nats per image)")
    axis.set_ylabel("reward")
    if "ideal" not in frames:
        axis.set_title("one point a kl_weight; no ideal to hold it against", fontsize=8)
        return
    ideal = frames["ideal"]
    axis.plot(ideal["kl"], ideal["reward"], "--", color="black", lw=1.2, label="ideal, +- 2 s.e.")
    low, high = (ideal["reward"] + z * ideal["reward_error"] for z in (-2, 2))
    axis.fill_between(ideal["kl"], low, high, color="black", alpha=0.15, lw=0)
    for _, best in ideal[ideal["kl_weight"].isin(runs["kl_weight"])].iterrows():
        axis.plot(best["kl"], best["reward"], "o", color="black", ms=3)
        axis.annotate(f"{best['kl_weight']:g}", (best["kl"], best["reward"]), (-3, 3), textcoords="offset points", ha="right", fontsize=7)
    axis.set_title("one point a kl_weight; the ideal's slope is kl_weight", fontsize=8)
    axis.legend(loc="lower right", fontsize=7, frameon=False)


def _transfer(name: str, label: str) -> Panel:
    """One model under other samplers."""
    def panel(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
        for (model, eta), rows in frames["transfer"].groupby(["model", "eta"], sort=False):
            line, marker = {1.0: ("-", "o"), 0.5: ("-.", "s"), 0.0: (":", "^")}[eta]
            axis.plot(rows["steps"], rows[name], ls=line, marker=marker, color=BLUE if model == "fine-tuned" else GREY, ms=4, lw=1.2,
                      label=f"{model}, eta {eta:g}")
        axis.set_xscale("log")
        ticks = sorted(frames["transfer"]["steps"].unique())
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set_xlabel("sampler steps N")
        axis.set_ylabel(label)
        axis.set_title("one model under other samplers", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    return panel


def _snr(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
    """Measured on batches of each size, and the line n SNR(1) through the pooled estimates."""
    for method, rows in frames["snr"].groupby("method", sort=False):
        n, style = rows["paths"].to_numpy(), STYLES[method]
        above = rows[rows["snr"] > 0]
        low = np.minimum(above["snr_error"], 0.9 * above["snr"])
        axis.errorbar(above["paths"], above["snr"], [low, above["snr_error"]], lw=0, elinewidth=0.8, ms=4,
                      marker=style["marker"], color=style["color"])
        one = float((n * rows["signal"]).sum() / n.sum() / (n * rows["noise"]).mean())
        if one > 0:
            axis.plot(n, n * one, lw=1.2, color=style["color"], ls=style["ls"])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    sizes = sorted(frames["snr"]["paths"].unique())
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axis.set_xlabel("paths in a batch n")
    axis.set_ylabel("SNR $|E g|^2 / (\\mathrm{tr}\\, \\mathrm{Cov}\\, g / n)$")
    axis.set_title("gradient at one snapshot; lines: n SNR(1)", fontsize=8)


def _prompts(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
    """Reward of each prompt under each method's models, means over seeds."""
    means = by_prompt(frames["prompts"], kl_weight)
    for method in means:
        axis.plot(np.arange(1, len(means) + 1), means[method], **{**STYLES[method], "ls": ""}, ms=5)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.set_xlim(0.5, len(means) + 0.5)
    axis.set_xlabel("prompt, in their order")
    axis.set_ylabel("reward")
    axis.set_title("fresh images of each prompt, mean over seeds", fontsize=8)


def by_prompt(prompts: pd.DataFrame, kl_weight: float) -> pd.DataFrame:
    """Reward at one kl_weight: a row for each prompt in their order, a column for each method, means over seeds."""
    rows = prompts[prompts["kl_weight"] == kl_weight]
    return rows.pivot_table(index="prompt", columns="method", values="reward", sort=False)


# ------------------------------------------------------------------------------------------- the page


def page(frames: dict[str, pd.DataFrame], kl_weight: float, notes: Sequence[str], facts: Mapping[str, str], figure: Figure) -> str:
    """One HTML page that needs no network: the table, what is to be said of it, the figure, learning rates and prompts.

    facts : what is said of the comparison, in order (model, prompts, reward, sampler, versions)
    Source: theory.md, section 15.   Checked: tests/test_torch_compare.py::test_page_shows_the_table
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rows, png = summary(frames["runs"], kl_weight), BytesIO()
    figure.savefig(png, dpi=150)
    heads, body = cells(rows) if len(rows) else ([], [])
    shown = [(method, f"{row['seeds']:.0f}", texts, stop(row) if row["stopped"] else "")
             for (method, row), texts in zip(rows.iterrows(), body, strict=True)]
    prompts = by_prompt(frames["prompts"], kl_weight) if "prompts" in frames else pd.DataFrame()
    engine = Environment(loader=PackageLoader("ctrl"), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return engine.get_template("compare.html").render(
        heading=heading(rows, kl_weight) if len(rows) else "No learning curves were asked for.", heads=heads, rows=shown, notes=notes, facts=facts,
        picture=embedded(png.getvalue()), rates=frames.get("rates", pd.DataFrame()).to_dict("records"), methods=list(prompts.columns),
        prompts=[(text, [f"{x:.3f}" for x in row]) for text, row in prompts.head(MANY).iterrows()], more=max(0, len(prompts) - MANY))
