"""How good the ceiling fit is: on the paper's curves, and on simulated ones whose ceiling is known.

    python benchmarks/ceiling.py --curves CURVES.csv --table TABLE4.csv [--simulate 2000] [--markdown]

CURVES.csv: scores along RL, in the format of `python -m nanopcf.ceiling`. TABLE4.csv: dataset, sft_step, a_post as
published, and the published procedure's choices for each curve. Without them only the simulation runs. --markdown
writes docs/ceiling.md.
"""

import argparse
import csv
import datetime
import itertools
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanopcf import ceiling  # noqa: E402
from nanopcf.ceiling import curves  # noqa: E402
from nanopcf.ceiling.posterior import DRAWS  # noqa: E402
from nanopcf.ceiling.published import bootstrap, fit_paper  # noqa: E402
from nanopcf.ceiling.robust import collapse_point  # noqa: E402
from nanopcf.report.agreement import agreement  # noqa: E402

CONTRADICTION = ("", 0)  # pure RL: the table prints 77.3 beside P_sft 46.7 + PL_rl 25.3 = 72.0
TABLE_5 = {"S1K": 0.51, "Easy102K": 0.44, "Uniform102K": 0.42, "Hard102K": 0.40, "SFT889K": 0.37}  # min validation loss


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, *([str(c) for c in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    show = lambda line: "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([show(lines[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(show, lines[1:])])


# ---- the paper's curves ----


def load(args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Branches (pure RL once, under the key ("", 0)), the published settings, the published ceilings."""
    branches, errors = curves.read_curves(args.curves)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    unique = {}
    for key, b in branches.items():
        if b.x and b.p_sft is not None:
            unique.setdefault(key if key[1] else curves.BASE, b)
    settings, table = {}, {}
    if args.table:
        settings = curves.read_settings(args.table)
        with open(args.table, newline="", encoding="utf-8") as file:
            for r in csv.DictReader(file):
                step = int(r["sft_step"])
                table[(r["dataset"], step) if step else curves.BASE] = (
                    float(r["p_sft"]) + float(r["pl_rl"]) if not step else float(r["a_post"])
                )
    return unique, settings, table


def label(key: tuple[str, int]) -> str:
    return f"{key[0]} {key[1]}" if key[1] else "pure RL"


def table_4(branches: dict, settings: dict, table: dict, fits: dict) -> tuple[str, dict]:
    """Every published ceiling beside the published procedure and the default, with its interval."""
    rows, paper_fits = [], {}
    for key in [k for k in table if k in branches]:
        b, f = branches[key], fits[key]
        paper = paper_fits[key] = fit_paper(b.x, b.y, b.p_sft, **settings.get(key, {}))
        low, high = f.interval
        rising = f.status == "still rising"
        rows.append(
            [
                label(key),
                f"{b.p_sft:.1f}",
                f"{table[key]:.1f}",
                f"{paper.a_post:.1f}",
                f"{f.a_post:.1f}" if not rising else f">= {low:.1f}",
                f"[{low:.1f}, {high:.1f}]",
                f.status,
                remark(table[key], paper, f, b),
            ]
        )
    head = [
        "start of RL",
        "P_sft",
        "Table 4",
        "published procedure",
        "default",
        "90 % interval",
        "verdict",
        "where one differs from Table 4 by more than 1.0",
    ]
    return markdown(head, rows), paper_fits


def remark(published: float, paper: ceiling.CeilingFit, f: ceiling.CeilingFit, b: curves.Branch) -> str:
    """Why a ceiling is off, from the fit itself."""
    said = []
    if abs(paper.a_post - published) > 1:
        last = b.x[np.flatnonzero(paper.kept)[-1]]
        bound = [
            n
            for n, at in (
                ("C_mid", paper.c_mid > 0.95 * last),
                ("B", paper.b < 0.12 or paper.b > 11.5),
                ("A_post", paper.a_post > 99.5),
            )
            if at
        ]
        said.append(
            "procedure: " + (f"{' and '.join(bound)} at its bound, not identified" if bound else "fits these points so")
        )
    if f.status != "still rising" and abs(f.a_post - published) > 1:
        inside = f.interval[0] <= published <= f.interval[1]
        why = (
            "the best before the collapse"
            if f.status == "collapsed"
            else "its interval holds the published value"
            if inside
            else "published value outside of the interval"
        )
        said.append("default: " + why)
    return "; ".join(said)


def released_splits(branches: dict, settings: dict, fits: dict) -> str:
    """RMSE on the points that the released settings hold out: the default fitted to all before them, against the procedure."""
    rows, ordinary = [], []
    for key, options in settings.items():
        if key not in branches or options["last"] is None or options["last"] >= len(branches[key].x):
            continue
        b, n = branches[key], options["last"]
        x, y = np.array(b.x), np.array(b.y)
        theirs = fit_paper(x, y, b.p_sft, **options).rmse_heldout
        seen = ceiling.fit(x[:n], y[:n], b.p_sft, max_score=100.0)
        ours = float(np.sqrt(np.mean((y[n:] - np.median(seen.draws.scores(x[n:]), 0)) ** 2)))
        worst = np.abs(y[n:] - np.median(y[n:])).max()
        if worst < 4:  # no collapse within the held-out part
            ordinary.append((ours, theirs))
        rows.append(
            [
                label(key),
                n,
                len(x) - n,
                f"{ours:.2f}",
                f"{theirs:.2f}",
                "" if worst < 4 else "falls in the held-out part",
            ]
        )
    mean = np.mean(ordinary, axis=0)
    rows.append([f"mean of the {len(ordinary)} ordinary curves", "", "", f"{mean[0]:.3f}", f"{mean[1]:.3f}", ""])
    return markdown(["curve", "fitted", "held out", "default", "published procedure", ""], rows)


def forecasts(branches: dict, fits: dict) -> str:
    results = {k: curves.holdout(b, 100.0) for k, b in branches.items()}
    falls = {
        k
        for k, f in fits.items()
        if f.status == "collapsed" or (np.array(branches[k].y)[-len(branches[k].y) // 3 :] < f.a_post - 4).any()
    }
    rows = []
    for name, keys in (("no fall in the last third", set(results) - falls), ("all", set(results))):
        for fraction in curves.FRACTIONS:
            mine = [r for k in keys for r in results[k] if r["fraction"] == fraction]
            mean = lambda n: np.mean([abs(r[n]) for r in mine])  # noqa: B023, E731
            rows.append(
                [
                    name,
                    len(mine),
                    f"first {fraction:.0%}",
                    *(f"{mean(n):.2f}" for n in ("error", "error_plain", "error_last")),
                    f"{mean('inside'):.0%}",
                ]
            )
    return markdown(
        ["curves", "", "fitted on", "default", "plain sigmoid", "last score", "inside the 90 % interval"], rows
    )


def claims(branches: dict, fits: dict, table: dict) -> str:
    """The paper's three answers, as differences between draws of the fitted ceilings."""
    draws = {k: f.draws.a_post for k, f in fits.items() if f.status in ("saturated", "still rising")}
    rng = np.random.default_rng(0)
    shuffled = {k: rng.permutation(d) for k, d in draws.items()}  # curves are independent of each other
    above = lambda a, b: float((shuffled[a] > shuffled[b]).mean())  # noqa: E731
    said = []
    if curves.BASE in draws:
        others = {k: above(k, curves.BASE) for k in draws if k != curves.BASE}
        sure = [k for k, p in others.items() if p > 0.95]
        said.append(
            f"- **SFT before RL beats pure RL.** {len(sure)} of {len(others)} ceilings of SFT-then-RL lie above pure RL's with more than 95 % probability."
        )
    for dataset in dict.fromkeys(k[0] for k in draws if k[1]):
        mine = [k for k in draws if k[0] == dataset]
        pairs = list(itertools.combinations(mine, 2))
        told = [(a, b) for a, b in pairs if not 0.05 < above(a, b) < 0.95]
        text = f"- **When to switch, {dataset}.** {len(told)} of {len(pairs)} pairs of checkpoints differ by more than the uncertainty"
        said.append(
            text
            + (
                ": "
                + "; ".join(
                    f"{max(p, key=lambda k: fits[k].a_post)[1]} over {min(p, key=lambda k: fits[k].a_post)[1]}"
                    for p in told
                )
                if told
                else ""
            )
            + "."
        )
    best = {}
    for dataset in dict.fromkeys(k[0] for k in draws if k[1]):
        best[dataset] = np.max([shuffled[k] for k in draws if k[0] == dataset], axis=0)
    pairs = list(itertools.combinations(best, 2))
    told = [(a, b) for a, b in pairs if not 0.05 < (best[a] > best[b]).mean() < 0.95]
    said.append(
        f"- **Which data.** {len(told)} of {len(pairs)} pairs of data sets ({', '.join(best)}) differ in their highest ceiling by more than the uncertainty."
    )
    known = [d for d in best if d in TABLE_5]
    if len(known) >= 3:
        r = [agreement([TABLE_5[d] for d in known], [best[d][i] for d in known])["pearson"] for i in range(0, DRAWS, 8)]
        low, high = np.quantile([v for v in r if v is not None], [0.05, 0.95])
        said.append(
            f"  With their minimum validation losses, Pearson's r over these {len(known)} sets lies in [{low:.2f}, {high:.2f}] (90 % of draws)."
        )
    seven = agreement([0.51, 0.44, 0.42, 0.41, 0.40, 0.39, 0.37], [77.3, 78.8, 79.7, 82.6, 82.8, 82.8, 84.0])
    said.append(
        f"  From the published numbers of all seven sets: r = {seven['pearson']:.2f}, 90 % interval [{seven['pearson_interval'][0]:.2f}, {seven['pearson_interval'][1]:.2f}] (Fisher), Spearman {seven['spearman']:.2f} with p = {seven['p_value']:.4f}."
    )
    return "\n".join(said)


# ---- simulated curves ----

KINDS = {
    "saturates early (C_mid < 0.1 of the run)": (0.02, 0.1),
    "in between (0.1 to 0.5)": (0.1, 0.5),
    "late (0.5 to 1.5)": (0.5, 1.5),
}


def simulate(rng: np.random.Generator) -> dict:
    """A run like the paper's: 14 to 80 scores, white noise and drift of about 0.4 points each, outliers; a tenth collapse."""
    n = int(rng.integers(14, 81))
    x = np.linspace(1 / n, 1, n) * rng.uniform(100, 250)
    p = rng.uniform(45, 78)
    gain = min(rng.uniform(0.5, 12) if rng.random() < 0.8 else rng.uniform(10, 30), 97 - p)
    late, b = np.exp(rng.uniform(np.log(0.02), np.log(1.5))), np.clip(np.exp(rng.normal(0.3, 0.4)), 0.5, 3.5)
    white = rng.uniform(0.2, 0.5)
    length = rng.uniform(0.03, 0.25) * x[-1]
    walk = np.linalg.cholesky(np.exp(-np.abs(x[:, None] - x) / length) + 1e-9 * np.eye(n))
    y = p + gain / (1 + (late * x[-1] / x) ** b)
    tau = rng.uniform(0, 1.5)
    y = y + white * (tau * walk @ rng.normal(size=n) + rng.normal(size=n))
    y = y - np.where(rng.random(n) < 0.02, rng.uniform(2, 15, n), 0)
    collapses = rng.random() < 0.1
    if collapses:
        start = int(rng.integers(n // 2, n - max(2, n // 12)))
        m = n - start
        y[start:] -= rng.uniform(6, 40) * np.minimum(1, (1 + np.arange(m)) / max(1, m * rng.uniform(0.05, 0.4)))
    return dict(
        x=x,
        y=np.clip(y, 0, 100),
        p=float(p + white * rng.normal()),
        truth=p + gain,
        late=late,
        tau=tau,
        collapses=collapses,
    )


def simulated(seed: int) -> dict:
    """One curve, fitted; and its bootstrap interval."""
    c = simulate(np.random.default_rng(seed))
    f = ceiling.fit(c["x"], c["y"], c["p"], max_score=100.0)
    end = collapse_point(c["y"], c["p"], 100.0)
    keep = f.kept & (np.arange(len(c["x"])) < end)
    low, high = np.quantile(bootstrap(c["x"][keep], c["y"][keep], c["p"], max_score=100.0), [0.05, 0.95])
    return dict(
        late=c["late"],
        tau=c["tau"],
        collapses=c["collapses"],
        status=f.status,
        error=abs(f.a_post - c["truth"]),
        inside=f.interval[0] <= c["truth"] <= f.interval[1],
        width=f.interval[1] - f.interval[0],
        bootstrap=low <= c["truth"] <= high,
    )


def simulation(count: int) -> str:
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(simulated, range(count), chunksize=20))
    groups = {k: [r for r in found if a <= r["late"] < b and not r["collapses"]] for k, (a, b) in KINDS.items()}
    groups |= {
        "nearly white noise (tau < 0.2)": [r for r in found if r["tau"] < 0.2],
        "strong drift (tau > 1.2)": [r for r in found if r["tau"] > 1.2],
    }
    groups |= {
        "collapses": [r for r in found if r["collapses"]],
        "called saturated": [r for r in found if r["status"] == "saturated"],
        "all": found,
    }
    rows = []
    for name, mine in groups.items():
        share = lambda f: f"{np.mean([bool(f(r)) for r in mine]):.0%}"  # noqa: B023, E731
        rows.append(
            [
                name,
                len(mine),
                share(lambda r: r["inside"]),
                share(lambda r: r["bootstrap"]),
                f"{np.median([r['width'] for r in mine]):.1f}",
                f"{np.median([r['error'] for r in mine]):.2f}",
                share(lambda r: r["status"] == "saturated"),
                share(lambda r: r["status"] == "still rising"),
                share(lambda r: r["status"] == "collapsed"),
            ]
        )
    head = [
        "curves",
        "",
        "interval holds the true ceiling",
        "bootstrap's does",
        "median width",
        "median error of a_post",
        "saturated",
        "still rising",
        "collapsed",
    ]
    return markdown(head, rows)


def bootstrap_seconds() -> float:
    """CPU time of 1,000 refits of a 60-point curve."""
    x = np.linspace(3, 200, 60)
    y = 70 + 6 / (1 + 30 / x) + np.random.default_rng(0).normal(size=60) * 0.4
    start = time.process_time()
    bootstrap(x, y, 70.0)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves")
    parser.add_argument("--table")
    parser.add_argument("--simulate", type=int, default=2000, metavar="N")
    parser.add_argument("--markdown", action="store_true", help="write docs/ceiling.md")
    args = parser.parse_args()
    text = (ROOT / "benchmarks" / "ceiling.md.in").read_text(encoding="utf-8")
    fill = dict(versions=f"Python {platform.python_version()}, numpy {np.__version__}, {datetime.date.today()}")
    if args.curves:
        branches, settings, table = load(args)
        fits = {k: ceiling.fit(b.x, b.y, b.p_sft, max_score=100.0) for k, b in branches.items()}
        fill["table_4"], paper_fits = table_4(branches, settings, table, fits)
        theirs = [abs(f.a_post - table[k]) for k, f in paper_fits.items()]
        ours = [abs(fits[k].a_post - table[k]) for k in paper_fits if fits[k].status == "saturated"]
        fill |= dict(n=len(theirs), paper_median=f"{np.median(theirs):.2f}", paper_within=sum(d <= 1 for d in theirs))
        fill |= dict(identified=len(ours), ours_median=f"{np.median(ours):.2f}", ours_within=sum(d <= 1 for d in ours))
        fill |= dict(splits=released_splits(branches, settings, fits), forecasts=forecasts(branches, fits))
        fill["claims"] = claims(branches, fits, table)
    fill["simulation"] = simulation(args.simulate)
    fill["seconds"] = f"{bootstrap_seconds():.2f}"
    for name, value in fill.items():
        text = text.replace("{" + name + "}", str(value))
    print(text)
    if args.markdown:
        (ROOT / "docs" / "ceiling.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
