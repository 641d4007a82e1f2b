"""The figures of a report: the paper's Figs. 2, 3 and 8, validation loss against ceiling, and score against compute.

A ceiling that its curve does not identify is drawn open, as the lower bound that it is. matplotlib (the extra `plot`)
is imported only when figures are drawn. A report holds scores as fractions; figures show per cent.
"""

import io
import math
from collections.abc import Callable, Iterable

import numpy as np

from nanopcf.ceiling.drawing import BLUE, draw_ceiling, draw_curve
from nanopcf.ceiling.law import law_at
from nanopcf.report.claims import agreement_text
from nanopcf.report.text import ceiling_text, flops_unit
from nanopcf.run import log

# Backgrounds of the regimes of Eqs. 5-9, and the lines of branches that start in one of them.
SHADES = {"adaptive": "#dbe9f6", "stable": "#d9f0d3", "unstable": "#eeeeee", "mild": "#fdf0c8", "severe": "#f9d9d0"}
REGIME_COLOURS = {
    "base": "#444444",
    "adaptive": "#0072b2",
    "stable": "#009e73",
    "unstable": "#777777",
    "mild": "#c79100",
    "severe": "#d55e00",
}
# Candidate sets and paradigms, in their order.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#5e3c99", "#444444", "#a6611a"]
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
}


def draw_figures(report: dict) -> dict[str, bytes]:
    """The figures of a report: see `drawn`."""
    colours = in_turn(candidate["name"] for candidate in report["candidates"]) | {"base": REGIME_COLOURS["base"]}
    figures = {
        "fig3_sft_and_ceilings": lambda plt: draw_sft(plt, report),
        "fig8_rl_curves": lambda plt: draw_rl(plt, report),
        "loss_against_ceiling": lambda plt: draw_agreement(plt, report, colours),
        "compute": lambda plt: draw_compute(plt, report, colours),
    }
    if report.get("paradigms"):
        figures["fig2_paradigms"] = lambda plt: draw_paradigms(plt, report["paradigms"])
    return drawn(figures)


def drawn(figures: dict[str, Callable]) -> dict[str, bytes]:
    """PNG bytes by name of figures {name: draw(plt)}. Without matplotlib there are none, and a line says so."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        log.announce('no figures: matplotlib is missing; pip install -e ".[plot]"')
        return {}
    with plt.rc_context(STYLE):
        return {name: png(plt, draw(plt)) for name, draw in figures.items()}


def png(plt, figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def in_turn(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name; they repeat after nine."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def panel_grid(plt, count: int, height: float):
    """A figure with `count` panels, at most three in a row, and those panels."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.1 * columns, height * rows), squeeze=False, layout="constrained", sharey=True
    )
    for unused in panels.flat[count:]:
        unused.set_visible(False)
    return figure, panels.flat[:count]


def percents(points: list[dict]) -> list[float]:
    return [100 * point["score"] for point in points]


# ---- the paper's Fig. 3 ----


def draw_sft(plt, report: dict):
    """One panel per candidate set: SFT scores, losses and regimes; at each start of RL, its plasticity and ceiling."""
    candidates = report["candidates"]
    figure, panels = panel_grid(plt, len(candidates), 3.3)
    scale, unit = flops_unit(max(candidate["checkpoints"][-1]["x_sft"] for candidate in candidates))
    for panel, candidate in zip(panels, candidates, strict=True):
        checkpoints = candidate["checkpoints"]
        x = [checkpoint["x_sft"] / scale for checkpoint in checkpoints]
        width = x[-1] / len(x)
        for checkpoint, at in zip(checkpoints, x, strict=True):
            panel.axvspan(at - width / 2, at + width / 2, color=SHADES[checkpoint["regime"]], lw=0)
        panel.plot(x, percents(checkpoints), "o-", color=BLUE, ms=3, lw=1, label="P_sft")
        for branch in report["branches"]:
            if branch["dataset"] == candidate["name"]:
                draw_start(panel, branch, branch["x_sft"] / scale, 0.6 * width)
        draw_losses(panel, x, [checkpoint["val_loss"] for checkpoint in checkpoints])
        panel.set_title(candidate["name"], fontsize=11)
        panel.set_xlim(x[0] - width / 2, x[-1] + width / 2)
        panel.set_ylim(0, 105)
        panel.set_xlabel(f"SFT compute ({unit})")
    panels[0].set_ylabel("score (%)")
    present = {checkpoint["regime"] for candidate in candidates for checkpoint in candidate["checkpoints"]}
    regimes = [regime for regime in SHADES if regime in present]
    patches = [plt.Rectangle((0, 0), 1, 1, color=SHADES[regime]) for regime in regimes]
    figure.legend(patches, regimes, loc="outside upper center", ncols=5, fontsize=9)
    return figure


def draw_start(panel, branch: dict, at: float, width: float) -> None:
    p_sft = 100 * branch["p_sft"]
    low, high = 100 * branch["a_post_low"], 100 * branch["a_post_high"]
    if branch["identified"]:
        draw_ceiling(panel, at, width, p_sft, 100 * branch["a_post"], (low, high))
    else:
        draw_ceiling(panel, at, width, p_sft, low, arrow=7)


def draw_losses(panel, x: list[float], losses: list[float]) -> None:
    """Dashed, with a scale of their own on the right."""
    right = panel.twinx()
    right.plot(x, losses, "--", color="#555555", lw=1)
    right.grid(False)
    right.tick_params(colors="#777777", labelsize=8)
    right.spines["top"].set_visible(False)


# ---- the paper's Fig. 8 ----


def draw_rl(plt, report: dict):
    """One panel per data set: scores along RL, the fit and the ceiling of each of its branches."""
    branches = report["branches"]
    names = list(dict.fromkeys(branch["dataset"] for branch in branches))
    figure, panels = panel_grid(plt, len(names), 3.2)
    scale, unit = flops_unit(max(branch["curve"][-1]["x"] for branch in branches))
    for panel, name in zip(panels, names, strict=True):
        for branch in branches:
            if branch["dataset"] == name:
                draw_branch(panel, branch, scale)
        panel.set_title("pure RL (from the base model)" if name == "base" else name, fontsize=11)
        panel.set_xlabel(f"RL compute ({unit})")
        panel.legend(fontsize=8, loc="lower right")
        panel.set_ylim(0, 105)
    panels[0].set_ylabel("score (%)")
    return figure


def draw_branch(panel, branch: dict, scale: float) -> None:
    colour = REGIME_COLOURS[branch["regime"]]
    x = [point["x"] / scale for point in branch["curve"]]
    law = None
    if branch["law"]:
        dense = np.linspace(0, x[-1], 101)
        law = dense, 100 * law_at(dense * scale, branch["law"])
    start = "no SFT" if branch["dataset"] == "base" else f"step {branch['sft_step']}, {branch['regime']}"
    draw_curve(panel, x, percents(branch["curve"]), law, colour, f"{start}: {ceiling_text(branch)}")
    if branch["identified"]:
        panel.axhline(100 * branch["a_post"], color=colour, ls=":", lw=1.2)
        panel.axhspan(100 * branch["a_post_low"], 100 * branch["a_post_high"], color=colour, alpha=0.1, lw=0)


# ---- validation loss against ceiling, score against compute ----


def draw_agreement(plt, report: dict, colours: dict[str, str]):
    """One point per candidate set: its minimum validation loss and the ceiling of its recommended start."""
    figure, panel = plt.subplots(figsize=(6.2, 3.8), layout="constrained")
    ranking, selector = report["selector"]["ranking"], report["selector"]
    at = [100 * row["a_post"] for row in ranking]
    losses = [row["min_val_loss"] for row in ranking]
    # Room for the names on the right, and for intervals and arrows above.
    width = max(losses) - min(losses) or 0.1
    panel.set_xlim(min(losses) - 0.1 * width, max(losses) + 0.9 * width)
    lows, highs = [100 * row["a_post_low"] for row in ranking], [100 * row["a_post_high"] for row in ranking]
    top = max(high if row["identified"] else y for row, high, y in zip(ranking, highs, at, strict=True))
    height = max(5.0, top - min(lows))
    bottom, top = min(lows) - 0.15 * height, top + 0.25 * height
    panel.set_ylim(bottom, top)
    for row, y, label_y in zip(ranking, at, spread(at, bottom, top, (top - bottom) / 14), strict=True):
        loss, colour = row["min_val_loss"], colours[row["name"]]
        if row["identified"]:
            panel.plot([loss, loss], [100 * row["a_post_low"], 100 * row["a_post_high"]], color=colour, lw=1.5)
        else:
            style = {"arrowstyle": "<-", "color": colour, "lw": 1.5}
            panel.annotate("", (loss, y), (0, 26), textcoords="offset points", arrowprops=style)
        fill = colour if row["identified"] else "white"
        panel.plot(loss, y, "o", ms=8, color=colour, mfc=fill, mew=2)
        column = max(losses) + 0.15 * width  # of the names, with a thin line from each to its point
        panel.plot([loss, column], [y, label_y], color=colour, lw=0.6, alpha=0.6, zorder=0)
        name = row["name"] + ("" if row["identified"] else " (lower bound)")
        panel.text(column, label_y, f" {name}", color=colour, fontsize=9, va="center")
    panel.set_xlabel("minimum SFT validation loss")
    panel.set_ylabel("ceiling A_post (%)")
    panel.set_title(agreement_text(selector), fontsize=10)
    return figure


def spread(values: list[float], bottom: float, top: float, gap: float) -> list[float]:
    """The values moved to lie a gap apart, from bottom + gap to top - gap, in their order; a smaller gap for many."""
    gap = min(gap, (top - bottom) / (len(values) + 1))
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [values[i] for i in order]
    for i in range(len(places)):  # upwards, each at least a gap above the one before
        places[i] = max(places[i], places[i - 1] + gap if i else bottom + gap)
    for i in reversed(range(len(places))):  # and down again, so that the last stays below the top
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else top - gap)
    return [places[order.index(i)] for i in range(len(values))]


def draw_compute(plt, report: dict, colours: dict[str, str]):
    """Score against total compute: pure SFT dashed, RL solid from where SFT stopped."""
    figure, panel = plt.subplots(figsize=(9, 4.2), layout="constrained")
    branches = report["branches"]
    scale, unit = flops_unit(max(branch["x_sft"] + branch["curve"][-1]["x"] for branch in branches))
    for candidate in report["candidates"]:
        x = [checkpoint["x_sft"] / scale for checkpoint in candidate["checkpoints"]]
        panel.plot(x, percents(candidate["checkpoints"]), "--", color=colours[candidate["name"]], lw=1)
    in_legend = set()
    for branch in branches:
        x = [(branch["x_sft"] + point["x"]) / scale for point in branch["curve"]]
        name, colour = branch["dataset"], colours[branch["dataset"]]
        text = None if name in in_legend else "pure RL" if name == "base" else name
        panel.plot(x, percents(branch["curve"]), color=colour, lw=1.6, label=text)
        panel.plot(x[0], 100 * branch["p_sft"], "o", ms=5, color=colour)
        in_legend.add(name)
    panel.set_xlabel(f"total compute, SFT + RL ({unit})")
    panel.set_ylabel("score (%)")
    panel.legend(ncols=3, fontsize=9, loc="lower right")
    return figure


# ---- the paper's Fig. 2 ----


def draw_paradigms(plt, rows: list[dict]):
    """The mean score of each paradigm against total compute; from the base model on the left, from SFT on the right."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    scale, unit = flops_unit(max(row["curve"][-1]["x"] for row in rows))
    names = list(dict.fromkeys(row["algo"] for row in rows))
    colours = in_turn(names)
    # From the tenth paradigm on the colours repeat, and the line is dashed.
    dashes = {name: "--" if i >= len(COLOURS) else "-" for i, name in enumerate(names)}
    titles = {"base": "from the base model", "sft": "from the SFT checkpoint"}
    for panel, start in zip(panels, titles, strict=True):
        for row in rows:
            if row["start"] == start:
                draw_paradigm(panel, row, scale, colours[row["algo"]], dashes[row["algo"]])
        others = [row for row in rows if row["start"] != start]
        if others:
            draw_best_of_other_start(panel, max(others, key=lambda row: row["final"]))
        panel.set_title(titles[start], fontsize=11)
        panel.set_xlabel(f"total compute, SFT included ({unit})")
        panel.set_xlim(left=0)
    panels[0].set_ylabel("score (%)")
    lines = [plt.Line2D([], [], color=colours[name], lw=2, ls=dashes[name]) for name in names]
    figure.legend(lines, names, loc="outside right center", fontsize=9)
    return figure


def draw_paradigm(panel, row: dict, scale: float, colour: str, dash: str) -> None:
    """The mean over the seeds; the band is one standard deviation between seeds."""
    x = [point["x"] / scale for point in row["curve"]]
    mean, spread = np.array(percents(row["curve"])), 100 * np.array(row["spread"])
    panel.plot(x, mean, dash, marker="o", ms=2.5, color=colour, lw=1.7)
    panel.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)


def draw_best_of_other_start(panel, best: dict) -> None:
    """A dotted line where it ends, if that is not below the panel: the two panels have different scales."""
    bottom, top = panel.get_ylim()
    level = 100 * best["final"]
    if level <= bottom:
        return
    panel.axhline(level, color="#777777", ls=":", lw=1.2)
    text = f"best from {'SFT' if best['start'] == 'sft' else 'the base model'}: {best['algo']}"
    right = panel.get_xlim()[1]
    panel.annotate(
        text, (right, level), xytext=(0, 3), textcoords="offset points", fontsize=8, color="#555555", ha="right"
    )
    panel.set_ylim(bottom, max(top, level + 0.06 * (level - bottom)))
