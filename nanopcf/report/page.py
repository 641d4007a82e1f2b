"""The report of a pipeline run for people: a table for the terminal, and one self-contained HTML page.

The page holds its figures (`figures.py`) within itself; without them it has its tables only. Every text from a run is
escaped: a model may write anything. Each section of the page is one function, which returns its HTML.
"""

import base64
import textwrap
from collections.abc import Collection
from html import escape

from nanopcf.report import paradigms
from nanopcf.report.claims import agreement_text, best_sft
from nanopcf.report.text import ceiling_text, claim_text, correlation, label, percent, plasticity_text, si, verdict_text

# ---- the terminal ----


def terminal_table(report: dict) -> str:
    """One line per branch, then the selector's choice and the verdicts; at most 110 columns."""
    lines = [f"{'start of RL':<30}{'P_sft':>7}{'best':>7}{'PL_rl':>8}  {'ceiling A_post':<20} verdict", "─" * 90]
    for branch in report["branches"]:
        p_sft, best, pl_rl = percent(branch["p_sft"]), percent(branch["best"]), plasticity_text(branch)
        name, ceiling = label(branch)[:29], ceiling_text(branch)
        lines.append(f"{name:<30}{p_sft:>7}{best:>7}{pl_rl:>8}  {ceiling:<20} {verdict_text(branch)}")
    selector = report["selector"]
    verdicts = [claim["verdict"] for claim in report["claims"]]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("shown", "not shown", "not resolved")]
    lines += [
        "─" * 90,
        f"selector: {selector['chosen']} has the lowest validation loss of {len(selector['ranking'])} sets",
        f"{agreement_text(selector)}, of loss and P_sft {correlation(selector['spearman_p_sft'])}",
        f"the paper's claims: {', '.join(counts)} in this run",
        *textwrap.wrap(report["answer"], 100),
    ]
    return "\n".join(lines)


# ---- the page ----

CSS = """
:root { --ink: #1d2430; --soft: #5b6472; --line: #e3e6ea; --accent: #0072b2 }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem }
h1 { font-size: 1.9rem; margin: 0 0 .3rem } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem }
.lead { font-size: 1.15rem; color: var(--soft); max-width: 62ch } .note, figcaption { color: var(--soft); font-size: .9rem; max-width: 80ch }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.6rem 0 }
.tile { flex: 1 1 9rem; border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem }
.tile b { display: block; font-size: 1.6rem; font-weight: 600; color: var(--accent) } .tile span { font-size: .85rem; color: var(--soft) }
.wide { overflow-x: auto } .line { white-space: nowrap }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 600 } td, th { padding: .38rem .6rem; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right } td.n { white-space: nowrap } figure { margin: 1.2rem 0 } .narrow { max-width: 640px } img { width: 100%; height: auto }
.pill { border-radius: 99px; padding: .1rem .6rem; font-size: .82rem; white-space: nowrap }
.good { background: #d9f0d3 } .open { background: #fdf0c8 } .bad { background: #f9d9d0 }
code, pre { font: .88rem ui-monospace, monospace; background: #f5f6f8; border-radius: 6px } code { padding: .1rem .3rem }
td code { white-space: pre } pre { padding: .8rem; overflow-x: auto }
@media print { h2 { break-after: avoid } figure, tr { break-inside: avoid } }
"""

CAPTIONS = {
    "fig3_sft_and_ceilings": (
        "The paper's Fig. 3, one panel per candidate set. Blue: score after SFT (P_sft). Orange on top: RL "
        "plasticity up to the fitted ceiling A_post, with its 90 % interval; hatched with an arrow where the "
        "curve does not identify it and only a lower bound is known. Dashed: validation loss (right axis). Shades: the "
        "regimes of Eqs. 5-9."
    ),
    "fig8_rl_curves": (
        "The paper's Fig. 8: score along RL from each checkpoint, the fit of Eq. 2, and the ceiling (dotted, with"
        " its interval) where it is identified."
    ),
    "loss_against_ceiling": (
        "Does the minimum validation loss, known before any RL, order the ceilings? Lines: 90 % intervals. Open "
        "circles with an arrow: the curve does not identify its ceiling, and this is its lower bound."
    ),
    "fig2_paradigms": (
        "The paper's Fig. 2: every paradigm's mean score over its seeds against total compute, equal for all; the"
        " band is one standard deviation between seeds. From the SFT checkpoint (right) the SFT before it is on "
        "the axis."
    ),
    "compute": (
        "All routes against total compute. Dashed: SFT alone. Solid: RL, from the checkpoint where SFT stopped."
    ),
}


def html_page(report: dict, images: dict[str, bytes]) -> str:
    """The whole page, with `images` (PNG bytes by name) in it."""
    sections = [
        head_of_page(report, images),
        selector_section(report, images),
        branches_section(report, images),
        "<h2>Every route against compute</h2>" + figure("compute", images),
        *([paradigms_section(report["paradigms"], images)] if report["paradigms"] else []),
        claims_section(report),
        samples_section(report["samples"]),
        reproduction_section(report),
        "</html>\n",
    ]
    return "\n".join(sections)


# ---- its parts ----


def table(head: list[str], rows: list[list[str]], numeric: Collection[int] = ()) -> str:
    """Cells are HTML already; columns in `numeric` are aligned to the right."""

    def line(cells: list[str], tag: str) -> str:
        classes = [" class=n" if column in numeric else "" for column in range(len(cells))]
        return "".join(f"<{tag}{c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{line(head, 'th')}</tr>{body}</table></div>"


def figure(name: str, images: dict[str, bytes]) -> str:
    """The image with its caption; nothing without the image."""
    if name not in images:
        return ""
    narrow = " class=narrow" if name == "loss_against_ceiling" else ""
    source = f"data:image/png;base64,{base64.b64encode(images[name]).decode()}"
    return f'<figure{narrow}><img alt="{name}" src="{source}"><figcaption>{CAPTIONS[name]}</figcaption></figure>'


def pill(verdict: str, text: str = "") -> str:
    """A verdict on a coloured ground. text: shown in its place."""
    good, bad = ("shown", "saturated", "right"), ("not shown", "collapsed", "wrong")
    colour = "good" if verdict in good else "bad" if verdict in bad else "open"
    return f'<span class="pill {colour}">{escape(text or verdict)}</span>'


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


# ---- its sections ----


def head_of_page(report: dict, images: dict[str, bytes]) -> str:
    p_0, best_rl = report["base"]["p_0"], max(branch["best"] for branch in report["branches"])
    identified = sum(branch["identified"] for branch in report["branches"])
    tiles = {
        "base model, P_0": f"{percent(p_0)} %",
        "best SFT checkpoint": f"{percent(best_sft(report))} %",
        "best after RL": f"{percent(best_rl)} %",
        "ceilings identified": f"{identified} of {len(report['branches'])}",
        "total time": f"{report['elapsed_s'].get('total', 0) / 60:.1f} min",
    }
    tiles_html = "".join(f"<div class=tile><b>{value}</b><span>{text}</span></div>" for text, value in tiles.items())
    no_figures = "" if images else '<p class="note">No figures: <code>pip install -e ".[plot]"</code> adds them.</p>'
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanopcf: {escape(report["preset"])}, seed {report["seed"]}</title><style>{CSS}</style>
<h1>How high can this model go?</h1>
<p class="lead">{escape(report["answer"])}</p>
<div class="tiles">{tiles_html}</div>
<p class="note">A {report["base"]["parameters"]:,}-parameter transformer {setting(report)}. Scores are pass@1 in \
per cent at temperature 0.7, on problems seen in no training stage.</p>{no_figures}"""


def setting(report: dict) -> str:
    """Which model, on which problems."""
    flags = report["flags"]
    if flags.get("data"):
        return f"({code(flags['model'])}) on {code(flags['data'])}"
    return f"on generated mathematics (task {code(report['task'])}), trained from random weights in this run"


def selector_section(report: dict, images: dict[str, bytes]) -> str:
    selector = report["selector"]
    k = report["candidates"][0]["checkpoints"][0]["k"]
    rows = []
    for ranked in selector["ranking"]:
        name = escape(ranked["name"])
        rows.append(
            [
                f"<b>{name}</b> ← chosen" if ranked["name"] == selector["chosen"] else name,
                f"{ranked['min_val_loss']:.3f}",
                f"{ranked['recommended_step']} ({escape(ranked['recommended_regime'])})",
                percent(ranked.get("score")),
                percent(ranked.get("pass_at_k")),
                ceiling_text(ranked),
                pill(ranked["status"], verdict_text(ranked)),
            ]
        )
    head = ["candidate set", "min val loss", "start RL at step", "P_sft", f"pass@{k}", "ceiling", "verdict"]
    return f"""<h2>Which expert data? The selector</h2>
<p class="note">Ranked by minimum validation loss, which is known before any RL (the paper's RQ3). pass@{k} stands \
beside it for comparison. {escape(agreement_text(selector))}; of the loss and P_sft \
{correlation(selector["spearman_p_sft"])}: the loss says more than P_sft only where these differ.</p>
{table(head, rows, numeric=(1, 3, 4, 5))}
{figure("loss_against_ceiling", images)}"""


def branches_section(report: dict, images: dict[str, bytes]) -> str:
    rows = [
        [
            escape(label(branch)),
            si(branch["x_sft"]) if branch["x_sft"] else "0",
            percent(branch["p_sft"]),
            percent(branch["best"]),
            plasticity_text(branch),
            f"<span class=line>{ceiling_text(branch)}</span>",
            percent(branch["rmse_fit"]),
            percent(branch["rmse_heldout"]),
            f"<span class=line>{percent(branch['greedy_before'])} → {percent(branch['greedy_after'])}</span>",
            pill(branch["status"], verdict_text(branch)),
        ]
        for branch in report["branches"]
    ]
    head = ["start of RL", "SFT compute", "P_sft", "best", "PL_rl", "ceiling A_post", "RMSE", "held out", "greedy"]
    return f"""<h2>SFT regimes and what RL adds</h2>{figure("fig3_sft_and_ceilings", images)}
<h2>RL from each checkpoint</h2>{figure("fig8_rl_curves", images)}
{table([*head, "verdict"], rows, numeric=(2, 3, 4, 6, 7))}
<p class="note">Only a <i>saturated</i> curve identifies its ceiling. Elsewhere ≥ stands before a lower bound, the low \
end of the 90 % interval, and PL_rl is the bound less P_sft. <i>Out of signal</i>: RL ended because no prompt had right \
and wrong answers any more. At a pass rate near 100 they are learned, near 0 out of reach; more or other prompts, not \
more compute, could lift the score. Scores are of \
{report["problems"]:,} problems with the same random numbers at every evaluation, so that their noise within a curve is \
smaller than between runs. Greedy accuracy is given because part of any gain at a temperature is sharpening.</p>"""


def paradigms_section(rows: list[dict], images: dict[str, bytes]) -> str:
    cells = [[escape(cell) for cell in paradigms.cells(row)] for row in rows]
    return f"""<h2>Every paradigm at equal compute</h2>{figure("fig2_paradigms", images)}
{table(paradigms.HEAD, cells, numeric=(2, 3, 4, 5))}
<p class="note">{rows[0]["seeds"]} seeds each, {si(rows[0]["curve"][-1]["x"])} in all. Final: mean of the last \
{paradigms.LAST} scores, ± its standard deviation between seeds.
Peak: mean of the best scores. Wobble: standard deviation of the scores in the second half of a run; the sampling of \
answers alone gives some of it.
The ceiling is fitted to the mean curve.</p>"""


def claims_section(report: dict) -> str:
    rows = [
        [escape(claim["claim"]), pill(claim["verdict"], claim_text(claim)), escape(claim["evidence"])]
        for claim in report["claims"]
    ]
    if report["flags"].get("data"):
        caution = "One seed: read this as a first look."
    else:
        caution = (
            "One seed of a nano model: read this as a check of the machinery. Built into the task: an expert "
            "trajectory teaches exactly the facts that stand in it, which favours larger and longer sets; and RL can't "
            "find facts that the base model's web text never states rightly."
        )
    return f"""<h2>What the paper claims, and what this run shows</h2>
{table(["claim", "this run", "evidence"], rows)}
<p class="note">{caution} Shown: true with a probability of 95 %, by the ceilings of this run and the sampling of its test \
set. Not shown: its opposite is. Not resolved: neither, with the probability that the claim is true. Where the best of \
several paradigms wins, the level is corrected for their number. Of many claims at 95 %, one in twenty may be wrong.</p>"""


def samples_section(samples: list[dict]) -> str:
    def judged(sample: dict, when: str) -> str:
        return f"{code(sample[when])} {pill('right' if sample[f'{when}_correct'] else 'wrong')}"

    rows = [[code(s["prompt"]), code(s["answer"]), judged(s, "before"), judged(s, "after")] for s in samples]
    return f"""<h2>The same problems before and after RL</h2>
<p class="note">Greedy answers of {escape(samples[0]["dataset"]) if samples else "–"}.</p>
{table(["problem", "answer", "before RL", "after RL"], rows)}"""


def reproduction_section(report: dict) -> str:
    environment = report["environment"]
    facts = {
        "command": environment["command"],
        "device": environment["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        "commit": environment["commit"],
        "seed": str(report["seed"]),
        "seconds": ", ".join(f"{stage} {seconds:g}" for stage, seconds in report["elapsed_s"].items()),
    }
    return "<h2>To run it again</h2>\n" + table(["", ""], [[name, escape(fact)] for name, fact in facts.items()])
