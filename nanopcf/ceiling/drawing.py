"""The paper's Figs. 3 and 8 for a file of curves. The report of a pipeline run draws its own from the same two parts.

matplotlib (the extra `plot`) is imported only when something is drawn.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanopcf.ceiling import CeilingFit
from nanopcf.ceiling.curve_files import Branch, Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE = "#0072b2", "#d55e00"

# ---- the two parts: plain numbers in, in the units of the panel ----


def draw_curve(
    panel: "Axes", x: np.ndarray, y: np.ndarray, law: tuple[np.ndarray, np.ndarray] | None, colour, label: str, size=3.5
) -> None:
    """One curve of Fig. 8: scores as points, and the law (its x, its y) as a line."""
    panel.plot(x, y, "o", ms=size, color=colour, alpha=0.7, label=label)
    if law is not None:
        panel.plot(*law, color=colour, lw=1.5)


def draw_ceiling(
    panel: "Axes",
    at: float,
    width: float,
    p_sft: float,
    a_post: float,
    interval: tuple[float, float] | None = None,
    arrow: float | None = None,
) -> None:
    """One start of RL in Fig. 3: a bar up to P_sft, and on it the plasticity up to A_post, with its interval.

    arrow: A_post is a lower bound only, so the bar stays open, and an arrow of this length stands on it.
    """
    if arrow is None:
        panel.bar(at, a_post - p_sft, width, p_sft, color=ORANGE, alpha=0.75)
    else:
        panel.bar(at, a_post - p_sft, width, p_sft, fill=False, ec=ORANGE, hatch="///", lw=1)
        style = {"arrowstyle": "->", "color": ORANGE}
        panel.annotate("", xy=(at, a_post + arrow), xytext=(at, a_post), arrowprops=style)
    if interval is not None:
        panel.plot([at, at], interval, color="black", lw=1.5)
    panel.bar(at, p_sft, width, color=BLUE, alpha=0.75)


# ---- the figure of `--plot` ----


def plot(fits: dict[Key, CeilingFit], branches: dict[Key, Branch], path: str | Path) -> None:
    """One column per data set: above, score along RL with law and band; below, P_sft and plasticity by SFT compute."""
    from matplotlib.figure import Figure  # not pyplot: it needs no display, and leaves no global state

    datasets = list(dict.fromkeys(dataset for dataset, _ in fits))
    figure = Figure(figsize=(4.6 * len(datasets), 7), layout="constrained")
    panels = figure.subplots(2, len(datasets), squeeze=False, sharey="row")
    for i, dataset in enumerate(datasets):
        fits_here = {key: fit for key, fit in fits.items() if key[0] == dataset}
        draw_curves(panels[0, i], fits_here, branches)
        draw_ceilings(panels[1, i], fits_here, branches)
        panels[0, i].set(title=dataset, xlabel="RL compute")
    panels[0, 0].set_ylabel("score")
    panels[1, 0].set_ylabel("score after SFT, ceiling, 90 % interval")
    figure.savefig(path, dpi=130)


def draw_curves(panel: "Axes", fits: dict[Key, CeilingFit], branches: dict[Key, Branch]) -> None:
    from matplotlib import colormaps

    for i, (key, fit) in enumerate(fits.items()):
        colour = colormaps["viridis"](0.9 * i / max(len(fits) - 1, 1))
        x, y = np.array(branches[key].x), np.array(branches[key].y)
        dense = np.linspace(0, x[-1], 120)
        law = dense, fit.predict(dense)
        draw_curve(panel, x[fit.kept], y[fit.kept], law, colour, f"step {key[1]}: {fit.status}", size=2)
        panel.plot(x[~fit.kept], y[~fit.kept], "x", color=colour, ms=4, alpha=0.6)  # outliers, or a collapse
        if fit.draws is not None:
            panel.fill_between(dense, *fit.band(dense), color=colour, alpha=0.15, lw=0)
    shown = np.concatenate([branches[key].y for key in fits])
    low, high = np.quantile(shown, [0.02, 1])  # a collapse would hide the rest
    panel.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
    if len(fits) <= 12:
        panel.legend(fontsize="x-small", frameon=False, loc="lower right")
    panel.grid(alpha=0.25)


def draw_ceilings(panel: "Axes", fits: dict[Key, CeilingFit], branches: dict[Key, Branch]) -> None:
    low = min(fit.p_sft for fit in fits.values())
    high = max(max(fit.a_post, fit.interval[1] if fit.draws else 0) for fit in fits.values())
    for at, fit in enumerate(fits.values()):
        if fit.identified:
            draw_ceiling(panel, at, 0.6, fit.p_sft, fit.a_post, fit.interval if fit.draws else None)
        else:
            draw_ceiling(panel, at, 0.6, fit.p_sft, fit.interval[0], arrow=0.08 * (high - low))
    panel.set_ylim(max(0, low - 0.4 * (high - low)), high + 0.05 * (high - low))
    panel.set_xticks(range(len(fits)), [f"{branches[key].x_sft:.3g}" for key in fits], rotation=45, fontsize="small")
    panel.set(xlabel="SFT compute; hatched: not identified, a lower bound only")
    panel.grid(alpha=0.25, axis="y")
