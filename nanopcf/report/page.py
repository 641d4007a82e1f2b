"""The report of a pipeline run: report.json, four figures, one self-contained report.html, a table for the terminal.

The figures stand in `figures.py`; without matplotlib (the extra `plot`) the page has its tables only.

`claims` holds the paper's statements against this run's numbers, and says "not resolved" where the intervals overlap:
one seed of a nano model is no evidence for or against a paper, but it shows what to look at.
"""

import base64
import html

from nanopcf.report import paradigms
from nanopcf.report.claims import claims
from nanopcf.report.figures import ceiling_text, label, percent, rising, si

# ---- the terminal ----


def terminal_table(report: dict) -> str:
    """One line a branch, then the selector's choice; at most 100 columns."""
    lines = [f"{'start of RL':<30}{'P_sft':>7}{'best':>7}{'PL_rl':>7}  {'ceiling A_post':<20} verdict", "─" * 88]
    for b in report["branches"]:
        plasticity = f"≥{percent(b['best'] - b['p_sft'])}" if rising(b) else percent(b["pl_rl"])
        lines.append(
            f"{label(b)[:29]:<30}{percent(b['p_sft']):>7}{percent(b['best']):>7}{plasticity:>7}  {ceiling_text(b):<20} {b['status']}"
        )
    s = report["selector"]
    lines += [
        "─" * 88,
        f"selector: {s['chosen']} has the lowest validation loss of {len(s['ranking'])} sets; Spearman of loss and ceiling "
        f"{'–' if s['spearman'] is None else format(s['spearman'], '.2f')}",
    ]
    verdicts = [c["verdict"] for c in claims(report)]
    lines.append(
        f"the paper's claims: {verdicts.count('shown')} shown, {verdicts.count('not shown')} not shown, "
        f"{verdicts.count('not resolved')} not resolved in this run"
    )
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
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 600 } td, th { padding: .38rem .6rem; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right } figure { margin: 1.2rem 0 } .narrow { max-width: 640px } img { width: 100%; height: auto }
.pill { border-radius: 99px; padding: .1rem .6rem; font-size: .82rem; white-space: nowrap }
.good { background: #d9f0d3 } .open { background: #fdf0c8 } .bad { background: #f9d9d0 }
code, pre { font: .88rem ui-monospace, monospace; background: #f5f6f8; border-radius: 6px } code { padding: .1rem .3rem }
td code { white-space: pre } pre { padding: .8rem; overflow-x: auto }
@media print { h2 { break-after: avoid } figure, tr { break-inside: avoid } }
"""

CAPTIONS = {
    "fig3_sft_and_ceilings": "The paper's Fig. 3, one panel a candidate set. Blue: score after SFT (P_sft). Orange on top: "
    "RL plasticity up to the fitted ceiling A_post, with its 90 % interval; hatched with an arrow where the curve still "
    "rises and only a lower bound is known. Dashed: validation loss (right axis). Shades: the regimes of Eqs. 5-9.",
    "fig8_rl_curves": "The paper's Fig. 8: score along RL from each checkpoint, the fit of Eq. 2, and the ceiling (dotted, "
    "with its interval) where it is identified.",
    "loss_against_ceiling": "Does the minimum validation loss, known before any RL, order the ceilings? Open circles are "
    "still rising: their ceiling is an extrapolation.",
    "fig2_paradigms": "The paper's Fig. 2: every paradigm's mean score over its seeds against total compute, equal for all; the "
    "band is one standard deviation between seeds. From the SFT checkpoint (right) the SFT before it is on the axis.",
    "compute": "All routes against total compute. Dashed: SFT alone. Solid: RL, from the checkpoint where SFT stopped.",
}


def table(head: list[str], rows: list[list[str]], numeric: set[int] = frozenset()) -> str:
    """Cells are HTML already; columns in `numeric` are right-aligned."""
    cell = lambda tag, i, v: f"<{tag}{' class=n' if i in numeric else ''}>{v}</{tag}>"  # noqa: E731
    body = "".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(r)) + "</tr>" for r in rows)
    return "<table><tr>" + "".join(cell("th", i, v) for i, v in enumerate(head)) + f"</tr>{body}</table>"


def pill(text: str) -> str:
    kind = {
        "shown": "good",
        "saturated": "good",
        "right": "good",
        "not shown": "bad",
        "collapsed": "bad",
        "wrong": "bad",
    }
    return f'<span class="pill {kind.get(text, "open")}">{html.escape(text)}</span>'


def headline(report: dict) -> str:
    top = max(report["branches"], key=lambda b: b["best"])
    gain = f"from {percent(report['base']['p_0'])} % (base model) over {percent(top['p_sft'])} % (after SFT) to {percent(top['best'])} %"
    route = (
        "Pure RL"
        if top["dataset"] == "base"
        else f"RL from step {top['sft_step']} of {top['dataset']} ({top['regime']})"
    )
    return f"{route} went furthest: {gain}."


def page(report: dict, images: dict[str, bytes]) -> str:
    e = html.escape
    identified = [b for b in report["branches"] if not rising(b)]
    tiles = [
        (percent(report["base"]["p_0"]) + " %", "base model, P_0"),
        (
            percent(max(c["score"] for s in report["candidates"] for c in s["checkpoints"])) + " %",
            "best SFT checkpoint",
        ),
        (percent(max(b["best"] for b in report["branches"])) + " %", "best after RL"),
        (f"{len(identified)} of {len(report['branches'])}", "ceilings identified"),
        (f"{report['elapsed_s'].get('total', 0) / 60:.1f} min", "total time"),
    ]
    chosen = report["selector"]["chosen"]
    ranking = [
        [
            f"<b>{e(r['name'])}</b> ← chosen" if r["name"] == chosen else e(r["name"]),
            f"{r['min_val_loss']:.3f}",
            f"{r['recommended_step']} ({e(r['recommended_regime'])})",
            percent(r.get("score")),
            percent(r.get("pass_at_k")),
            percent(r.get("a_post")),
            pill(r["status"]) if r.get("status") else "–",
        ]
        for r in report["selector"]["ranking"]
    ]
    k = report["candidates"][0]["checkpoints"][0]["k"]
    branches = [
        [
            e(label(b)),
            si(b["x_sft"]) if b["x_sft"] else "0",
            percent(b["p_sft"]),
            percent(b["best"]),
            percent(b["pl_rl"]),
            ceiling_text(b),
            percent(b["rmse_fit"]),
            percent(b["rmse_heldout"]),
            f"{percent(b['greedy_before'])} → {percent(b['greedy_after'])}",
            pill(b["status"]),
        ]
        for b in report["branches"]
    ]
    verdicts = [[e(c["claim"]), pill(c["verdict"]), e(c["evidence"])] for c in claims(report)]
    mark = lambda ok: pill("right" if ok else "wrong")  # noqa: E731
    samples = [
        [
            f"<code>{e(s['prompt'])}</code>",
            f"<code>{e(s['answer'])}</code>",
            f"<code>{e(s['before'])}</code> {mark(s['before_correct'])}",
            f"<code>{e(s['after'])}</code> {mark(s['after_correct'])}",
        ]
        for s in report["samples"]
    ]
    figure = lambda name: (  # noqa: E731
        f'<figure{" class=narrow" if name == "loss_against_ceiling" else ""}><img alt="{e(name)}" src="data:image/png;base64,{base64.b64encode(images[name]).decode()}">'
        f"<figcaption>{CAPTIONS[name]}</figcaption></figure>"
        if name in images
        else ""
    )
    no_plots = "" if images else '<p class="note">No figures: <code>pip install -e ".[plot]"</code> adds them.</p>'
    environment = report["environment"]
    facts = [["command", e(environment["command"])], ["device", e(environment["device"])]]
    facts += [["versions", e(", ".join(f"{n} {v}" for n, v in environment["versions"].items()))]]
    facts += [["commit", e(environment["commit"])], ["seed", str(report["seed"])]]
    facts += [["seconds", e(", ".join(f"{n} {s:g}" for n, s in report["elapsed_s"].items()))]]
    if report["flags"].get("data"):
        setting = f"(<code>{e(report['flags']['model'])}</code>) on <code>{e(report['flags']['data'])}</code>"
        caution = "One seed: read this as a first look."
    else:
        setting = (
            f"on generated mathematics (task <code>{e(report['task'])}</code>), trained from random weights in this run"
        )
        caution = (
            "One seed of a nano model: read this as a check of the machinery. Built into the task: an expert trajectory "
            "teaches exactly the facts that stand in it, which favours larger and longer sets."
        )
    compared = ""
    if report["paradigms"]:
        rows = [[e(cell) for cell in paradigms.cells(r)] for r in report["paradigms"]]
        seeds, spent = report["paradigms"][0]["seeds"], report["paradigms"][0]["curve"][-1]["x"]
        compared = f"""<h2>Every paradigm at equal compute</h2>{figure("fig2_paradigms")}
{table(paradigms.HEAD, rows, {2, 3, 4, 5})}
<p class="note">{seeds} seeds each, {si(spent)} in all. Final: mean of the last {paradigms.LAST} scores, ± its standard deviation between seeds.
Peak: mean of the best scores. Wobble: standard deviation of the scores in the second half of a run; the test set alone gives some of it.
The ceiling is fitted to the mean curve.</p>"""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanopcf: {e(report["preset"])}, seed {report["seed"]}</title><style>{CSS}</style>
<h1>How high can this model go?</h1>
<p class="lead">{e(headline(report))}</p>
<div class="tiles">{"".join(f"<div class=tile><b>{v}</b><span>{t}</span></div>" for v, t in tiles)}</div>
<p class="note">A {report["base"]["parameters"]:,}-parameter transformer {setting}. Scores are pass@1 in per cent at temperature 0.7, on problems seen in no training stage.</p>{no_plots}
<h2>Which expert data? The selector</h2>
<p class="note">Ranked by minimum validation loss, which is known before any RL (the paper's RQ3). pass@{k} stands beside it for comparison.</p>
{table(["candidate set", "min val loss", "start RL at step", "P_sft", f"pass@{k}", "ceiling", "verdict"], ranking, {1, 3, 4, 5})}
{figure("loss_against_ceiling")}
<h2>SFT regimes and what RL adds</h2>{figure("fig3_sft_and_ceilings")}
<h2>RL from each checkpoint</h2>{figure("fig8_rl_curves")}
{table(["start of RL", "SFT compute", "P_sft", "best", "PL_rl", "ceiling A_post", "RMSE", "held out", "greedy", "verdict"], branches, {2, 3, 4, 6, 7})}
<p class="note">A ceiling called <i>still rising</i> isn't identified by its curve: the number is what was reached, a lower bound (and PL_rl an
extrapolation). Intervals are 90 %. Greedy accuracy is given because part of any gain at a temperature is sharpening.</p>
<h2>Every route against compute</h2>{figure("compute")}
{compared}<h2>What the paper claims, and what this run shows</h2>
{table(["claim", "this run", "evidence"], verdicts)}
<p class="note">{caution} “Not resolved” means that the intervals overlap or a curve still rises.</p>
<h2>The same problems before and after RL</h2>
<p class="note">Greedy answers of {e(report["samples"][0]["dataset"]) if report["samples"] else "–"}.</p>
{table(["problem", "answer", "before RL", "after RL"], samples)}
<h2>To run it again</h2>
{table(["", ""], facts)}
</html>
"""
