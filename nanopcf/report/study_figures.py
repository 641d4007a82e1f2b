"""The figures of a study: those of a report, over several seeds. matplotlib is imported only when they are drawn."""

import numpy as np

from nanopcf.report.figures import REGIME_COLOURS, draw_paradigms, drawn, in_turn, panel_grid, percents
from nanopcf.report.text import flops_unit

MARKS = ["o", "s", "^", "D", "v", "P", "X", "*"]  # of the seeds, in turn


def draw_study(reports: list[dict], study: dict) -> dict[str, bytes]:
    """The figures of a study: see `figures.drawn`."""
    figures = {
        "study_ceilings": lambda plt: draw_ceilings(plt, reports),
        "study_loss": lambda plt: draw_loss(plt, reports),
        "study_curves": lambda plt: draw_curves(plt, reports),
        "study_sft": lambda plt: draw_sft(plt, reports),
    }
    if study["paradigms"]:
        figures["fig2_paradigms"] = lambda plt: draw_paradigms(plt, study["paradigms"])
    return drawn(figures)


def mark(i: int) -> str:
    return MARKS[i % len(MARKS)]


def start_kind(branch: dict) -> tuple[str, str]:
    """What the seeds have in common of a start: the step differs from seed to seed, the regime does not."""
    return branch["dataset"], branch["regime"]


def legend_of_seeds(plt, panel, reports: list[dict]) -> None:
    lines = [plt.Line2D([], [], color="#555555", ls="", marker=mark(i)) for i in range(len(reports))]
    panel.legend(lines, [f"seed {report['seed']}" for report in reports], fontsize=9, loc="lower right")


def draw_ceilings(plt, reports: list[dict]):
    """One row per start, sorted by its mean ceiling; one mark per seed for P_sft (open) and for the ceiling."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for report in reports:
        for branch in report["branches"]:
            kinds.setdefault(start_kind(branch), []).append(branch["a_post"])
    order = sorted(kinds, key=lambda kind: np.mean(kinds[kind]))
    figure, panel = plt.subplots(figsize=(8.5, 0.36 * len(order) + 1.2), layout="constrained")
    for i, report in enumerate(reports):
        shift = 0.22 * (i - (len(reports) - 1) / 2)
        for branch in report["branches"]:
            y, colour = order.index(start_kind(branch)) + shift, REGIME_COLOURS[branch["regime"]]
            p_sft, ceiling = 100 * branch["p_sft"], 100 * branch["a_post"]
            panel.plot([p_sft, ceiling], [y, y], color=colour, lw=0.8, alpha=0.5)
            panel.plot(p_sft, y, mark(i), ms=5, color=colour, mfc="white")
            panel.plot(ceiling, y, mark(i), ms=5.5, color=colour)
            if branch["identified"]:
                panel.plot([100 * branch["a_post_low"], 100 * branch["a_post_high"]], [y, y], color=colour, lw=2)
            else:
                style = {"arrowstyle": "->", "color": colour, "lw": 1.3}
                panel.annotate("", (ceiling + 4, y), (ceiling, y), arrowprops=style)
    names = ["pure RL" if dataset == "base" else f"{dataset}, {regime}" for dataset, regime in order]
    panel.set_yticks(range(len(order)), names, fontsize=9)
    panel.set_xlabel("score (%): P_sft (open) and ceiling A_post (filled)")
    legend_of_seeds(plt, panel, reports)
    return figure


def draw_loss(plt, reports: list[dict]):
    """Minimum validation loss against the ceiling of the recommended start, all sets of all seeds."""
    colours = in_turn(dict.fromkeys(row["name"] for report in reports for row in report["selector"]["ranking"]))
    figure, panel = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
    for i, report in enumerate(reports):
        for row in report["selector"]["ranking"]:
            colour, at, loss = colours[row["name"]], 100 * row["a_post"], row["min_val_loss"]
            panel.plot(loss, at, mark(i), ms=7, color=colour, mfc=colour if row["identified"] else "white", mew=1.6)
    lines = [plt.Line2D([], [], color=colour, ls="", marker="o") for colour in colours.values()]
    marks = [plt.Line2D([], [], color="#555555", ls="", marker=mark(i)) for i in range(len(reports))]
    names = [*colours, *(f"seed {report['seed']}" for report in reports)]
    figure.legend(lines + marks, names, loc="outside right center", fontsize=9)
    panel.set_xlabel("minimum SFT validation loss")
    panel.set_ylabel("ceiling A_post (%); open: a lower bound")
    return figure


def draw_curves(plt, reports: list[dict]):
    """One panel per data set: scores along RL, one line per seed, coloured by the regime of the start."""
    names = list(dict.fromkeys(branch["dataset"] for report in reports for branch in report["branches"]))
    figure, panels = panel_grid(plt, len(names), 2.7)
    scale, unit = flops_unit(max(b["curve"][-1]["x"] for report in reports for b in report["branches"]))
    for panel, name in zip(panels, names, strict=True):
        seen = {}
        for report in reports:
            for branch in report["branches"]:
                if branch["dataset"] == name:
                    x = [point["x"] / scale for point in branch["curve"]]
                    colour = REGIME_COLOURS[branch["regime"]]
                    (seen[branch["regime"]],) = panel.plot(x, percents(branch["curve"]), color=colour, lw=1.1)
        panel.set_title("pure RL" if name == "base" else name, fontsize=10)
        panel.set_ylim(0, 105)
        if name != "base":
            panel.legend(seen.values(), seen, fontsize=8, loc="lower right")
    for panel in panels[-3:]:
        panel.set_xlabel(f"RL compute ({unit})")
    panels[0].set_ylabel("score (%)")
    return figure


def draw_sft(plt, reports: list[dict]):
    """One panel per set: scores along SFT, one line per seed, and above its starts of RL where these can go."""
    names = list(dict.fromkeys(candidate["name"] for report in reports for candidate in report["candidates"]))
    figure, panels = panel_grid(plt, len(names), 2.7)
    for panel, name in zip(panels, names, strict=True):
        for i, report in enumerate(reports):
            for candidate in report["candidates"]:
                if candidate["name"] == name:
                    steps = [checkpoint["step"] for checkpoint in candidate["checkpoints"]]
                    panel.plot(steps, percents(candidate["checkpoints"]), color="#0072b2", lw=1, alpha=0.7)
            for branch in report["branches"]:
                if branch["dataset"] == name:
                    colour, x = REGIME_COLOURS[branch["regime"]], branch["sft_step"]
                    panel.plot([x, x], [100 * branch["p_sft"], 100 * branch["a_post"]], color=colour, lw=1)
                    fill = colour if branch["identified"] else "white"
                    panel.plot(x, 100 * branch["a_post"], mark(i), ms=5, color=colour, mfc=fill)
        panel.set_title(name, fontsize=10)
        panel.set_ylim(0, 105)
    for panel in panels[-3:]:
        panel.set_xlabel("SFT step")
    panels[0].set_ylabel("score (%)")
    return figure
