"""The figures of a report, after the paper's: Fig. 3, Fig. 8, validation loss against ceiling, score against compute.

A ceiling that its curve doesn't identify (`still rising`) is drawn open, as the lower bound that it is. matplotlib
(the extra `plot`) is imported only when figures are drawn.
"""

import io
import math

import numpy as np

from nanopcf.ceiling import law_at

SHADES = {"adaptive": "#dbe9f6", "stable": "#d9f0d3", "unstable": "#eeeeee", "mild": "#fdf0c8", "severe": "#f9d9d0"}
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#5e3c99", "#444444", "#a6611a"]
REGIME_COLOURS = {
    "base": "#444444",
    "adaptive": "#0072b2",
    "stable": "#009e73",
    "unstable": "#777777",
    "mild": "#c79100",
    "severe": "#d55e00",
}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def si(flops: float) -> str:
    """1.2e12 -> "1.20 TFLOPs"."""
    scale, unit = flops_unit(flops)
    return f"{flops / scale:.3g} {unit}"


def label(b: dict) -> str:
    return "pure RL" if b["dataset"] == "base" else f"{b['dataset']} @{b['sft_step']} ({b['regime']})"


def rising(b: dict) -> bool:
    return b["status"] == "still rising"


def ceiling_text(b: dict) -> str:
    if rising(b):
        return f"≥ {percent(b['best'])}"
    return f"{percent(b['a_post'])} [{percent(b['a_post_low'])}, {percent(b['a_post_high'])}]"


def figures(report: dict) -> dict[str, bytes]:
    """PNG bytes by name. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "figure.dpi": 110,
    }
    names = [c["name"] for c in report["candidates"]]
    colour = {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(names)} | {"base": "#444444"}
    drawn = {}

    def finish(name: str, fig) -> None:
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
        plt.close(fig)
        drawn[name] = buffer.getvalue()

    with plt.rc_context(style):
        finish("fig3_sft_and_ceilings", draw_sft(plt, report))
        finish("fig8_rl_curves", draw_rl(plt, report))
        finish("loss_against_ceiling", draw_agreement(plt, report, colour))
        finish("compute", draw_compute(plt, report, colour))
        if report.get("paradigms"):
            finish("fig2_paradigms", draw_paradigms(plt, report["paradigms"]))
    return drawn


def grid(plt, count: int, height: float, **options):
    columns = min(3, count)
    rows = math.ceil(count / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(4.1 * columns, height * rows), squeeze=False, layout="constrained", **options
    )
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return fig, axes.flat[:count]


def draw_sft(plt, report: dict):
    """The paper's Fig. 3, a panel a candidate set."""
    fig, axes = grid(plt, len(report["candidates"]), 3.3, sharey=True)
    scale, unit = flops_unit(max(c["checkpoints"][-1]["x_sft"] for c in report["candidates"]))
    for ax, c in zip(axes, report["candidates"], strict=True):
        points = c["checkpoints"]
        x = [p["x_sft"] / scale for p in points]
        width = x[-1] / len(x)
        for p, at in zip(points, x, strict=True):
            ax.axvspan(at - width / 2, at + width / 2, color=SHADES[p["regime"]], lw=0)
        ax.plot(x, [100 * p["score"] for p in points], "o-", color="#0072b2", ms=3, lw=1, label="P_sft")
        for b in report["branches"]:
            if b["dataset"] != c["name"]:
                continue
            at, bottom = b["x_sft"] / scale, 100 * b["p_sft"]
            if rising(b):
                ax.bar(at, 100 * b["best"] - bottom, 0.6 * width, bottom, fill=False, ec="#d55e00", hatch="///", lw=1)
                ax.annotate(
                    "",
                    (at, 100 * b["best"] + 7),
                    (at, 100 * b["best"]),
                    arrowprops={"arrowstyle": "->", "color": "#d55e00"},
                )
            else:
                ax.bar(at, 100 * b["a_post"] - bottom, 0.6 * width, bottom, color="#d55e00", alpha=0.75)
                low, high = 100 * b["a_post_low"], 100 * b["a_post_high"]
                ax.plot([at, at], [low, high], color="black", lw=1.5)
            ax.bar(at, bottom, 0.6 * width, color="#0072b2", alpha=0.75)
        loss = ax.twinx()
        loss.plot(x, [p["val_loss"] for p in points], "--", color="#555555", lw=1)
        loss.grid(False)
        loss.tick_params(colors="#777777", labelsize=8)
        loss.spines["top"].set_visible(False)
        ax.set_title(c["name"], fontsize=11)
        ax.set_xlim(x[0] - width / 2, x[-1] + width / 2)
        ax.set_ylim(0, 105)
        ax.set_xlabel(f"SFT compute ({unit})")
    axes[0].set_ylabel("score (%)")
    present = {p["regime"] for c in report["candidates"] for p in c["checkpoints"]}
    patches = [plt.Rectangle((0, 0), 1, 1, color=SHADES[r]) for r in SHADES if r in present]
    fig.legend(patches, [r for r in SHADES if r in present], loc="outside upper center", ncols=5, fontsize=9)
    return fig


def draw_rl(plt, report: dict):
    """The paper's Fig. 8: points, fit and ceiling of every branch, a panel a data set."""
    names = list(dict.fromkeys(b["dataset"] for b in report["branches"]))
    fig, axes = grid(plt, len(names), 3.2, sharey=True)
    scale, unit = flops_unit(max(b["curve"][-1]["x"] for b in report["branches"]))
    for ax, name in zip(axes, names, strict=True):
        for b in (b for b in report["branches"] if b["dataset"] == name):
            colour = REGIME_COLOURS[b["regime"]]
            x, y = [p["x"] / scale for p in b["curve"]], [100 * p["score"] for p in b["curve"]]
            text = "no SFT" if name == "base" else f"step {b['sft_step']}, {b['regime']}"
            ax.plot(x, y, "o", ms=3.5, color=colour, alpha=0.7, label=f"{text}: {ceiling_text(b)}")
            if b["law"]:
                at = np.linspace(0, x[-1], 101)
                ax.plot(at, 100 * law_at(at * scale, b["law"]), color=colour, lw=1.5)
            if not rising(b):
                ax.axhline(100 * b["a_post"], color=colour, ls=":", lw=1.2)
                ax.axhspan(100 * b["a_post_low"], 100 * b["a_post_high"], color=colour, alpha=0.1, lw=0)
        ax.set_title("pure RL (from the base model)" if name == "base" else name, fontsize=11)
        ax.set_xlabel(f"RL compute ({unit})")
        ax.legend(fontsize=8, loc="lower right")
        ax.set_ylim(0, 105)
    axes[0].set_ylabel("score (%)")
    return fig


def draw_agreement(plt, report: dict, colour: dict[str, str]):
    fig, ax = plt.subplots(figsize=(6.2, 3.8), layout="constrained")
    ranking = [r for r in report["selector"]["ranking"] if r.get("a_post") is not None]
    for i, r in enumerate(ranking):
        open_ = r["status"] == "still rising"
        ax.plot(
            r["min_val_loss"],
            100 * r["a_post"],
            "o",
            ms=9,
            color=colour[r["name"]],
            mfc="white" if open_ else None,
            mew=2,
        )
        ax.annotate(
            r["name"] + (" (still rising)" if open_ else ""),
            (r["min_val_loss"], 100 * r["a_post"]),
            xytext=(9, 6 if i % 2 else -12),
            textcoords="offset points",
            fontsize=9,
        )
    ax.margins(x=0.25, y=0.15)
    ax.set_xlabel("minimum SFT validation loss")
    ax.set_ylabel("fitted ceiling A_post (%)")
    rho = report["selector"]["spearman"]
    ax.set_title(
        f"Spearman {'–' if rho is None else format(rho, '.2f')} over {report['selector']['n']} sets", fontsize=11
    )
    return fig


def draw_compute(plt, report: dict, colour: dict[str, str]):
    """Score against total compute: pure SFT dashed, RL solid from where SFT stopped."""
    fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    totals = [b["x_sft"] + b["curve"][-1]["x"] for b in report["branches"]]
    scale, unit = flops_unit(max(totals))
    for c in report["candidates"]:
        x = [p["x_sft"] / scale for p in c["checkpoints"]]
        ax.plot(x, [100 * p["score"] for p in c["checkpoints"]], "--", color=colour[c["name"]], lw=1)
    seen = set()
    for b in report["branches"]:
        x = [(b["x_sft"] + p["x"]) / scale for p in b["curve"]]
        name = "pure RL" if b["dataset"] == "base" else b["dataset"]
        ax.plot(
            x,
            [100 * p["score"] for p in b["curve"]],
            color=colour[b["dataset"]],
            lw=1.6,
            label=None if name in seen else name,
        )
        ax.plot(x[0], 100 * b["p_sft"], "o", ms=5, color=colour[b["dataset"]])
        seen.add(name)
    ax.set_xlabel(f"total compute, SFT + RL ({unit})")
    ax.set_ylabel("score (%)")
    ax.legend(ncols=3, fontsize=9, loc="lower right")
    return fig


def draw_paradigms(plt, rows: list[dict]):
    """The paper's Fig. 2: mean score of every paradigm against total compute, a panel a start, each with its own scale; the
    band is one standard deviation between seeds. Dotted: where the best one of the other start ends, if it fits."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    scale, unit = flops_unit(max(r["curve"][-1]["x"] for r in rows))
    names = list(dict.fromkeys(r["algo"] for r in rows))
    colour = {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(names)}
    titles = {"base": "from the base model", "sft": "from the SFT checkpoint"}
    for ax, start in zip(axes, titles, strict=True):
        for r in (r for r in rows if r["start"] == start):
            style = "--" if names.index(r["algo"]) >= len(COLOURS) else "-"
            x = [p["x"] / scale for p in r["curve"]]
            y = [100 * p["score"] for p in r["curve"]]
            low, high = ([v + sign * 100 * s for v, s in zip(y, r["spread"], strict=True)] for sign in (-1, 1))
            ax.plot(x, y, style, marker="o", ms=2.5, color=colour[r["algo"]], lw=1.7)
            ax.fill_between(x, low, high, color=colour[r["algo"]], alpha=0.12, lw=0)
        bottom, top = ax.get_ylim()
        other = max((r for r in rows if r["start"] != start), key=lambda r: r["final"], default=None)
        if other and 100 * other["final"] > bottom:
            level = 100 * other["final"]
            ax.axhline(level, color="#777777", ls=":", lw=1.2)
            text = f"best from {'SFT' if other['start'] == 'sft' else 'the base model'}: {other['algo']}"
            ax.annotate(
                text,
                (ax.get_xlim()[1], level),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
                color="#555555",
                ha="right",
            )
            ax.set_ylim(bottom, max(top, level + 0.06 * (level - bottom)))
        ax.set_title(titles[start], fontsize=11)
        ax.set_xlabel(f"total compute, SFT included ({unit})")
        ax.set_xlim(left=0)
    axes[0].set_ylabel("score (%)")
    lines = [
        plt.Line2D([], [], color=colour[n], lw=2, ls="--" if i >= len(COLOURS) else "-") for i, n in enumerate(names)
    ]
    fig.legend(lines, names, loc="outside right center", fontsize=9)
    return fig


def flops_unit(largest: float) -> tuple[float, str]:
    power = min(6, int(math.log10(largest) // 3)) if largest >= 1 else 0
    return 1000.0**power, " KMGTPE"[power].strip() + "FLOPs"
