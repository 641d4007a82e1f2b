"""How good the ceiling fit is: on the paper's curves, and on simulated ones whose ceiling is known.

    python benchmarks/ceiling.py --curves CURVES.csv --table TABLE4.csv [--simulate 3000] [--markdown]

CURVES.csv: scores along RL, in the format of `python -m nanopcf.ceiling`. TABLE4.csv: dataset, sft_step, a_post as
published, and the published procedure's choices for each curve. Without them only the simulation runs. --markdown
writes docs/ceiling.md: benchmarks/ceiling.md.in, with a table in place of each {name}.
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
from nanopcf.ceiling import CeilingFit  # noqa: E402
from nanopcf.ceiling.curve_files import BASE, Branch, Key, read_curves, read_settings  # noqa: E402
from nanopcf.ceiling.forecasts import FRACTIONS, holdout, mean_size, rmse  # noqa: E402
from nanopcf.ceiling.posterior import DRAWS  # noqa: E402
from nanopcf.ceiling.published import bootstrap, fit_paper  # noqa: E402
from nanopcf.ceiling.robust import collapse_point  # noqa: E402
from nanopcf.report.agreement import agreement  # noqa: E402
from nanopcf.report.ceilings import probability_above, verdict  # noqa: E402

TABLE_5 = {"S1K": 0.51, "Easy102K": 0.44, "Uniform102K": 0.42, "Hard102K": 0.40, "SFT889K": 0.37}  # min validation loss
# Table 5 and Fig. 3, all seven data sets: minimum validation loss, highest ceiling.
PUBLISHED_LOSSES = [0.51, 0.44, 0.42, 0.41, 0.40, 0.39, 0.37]
PUBLISHED_CEILINGS = [77.3, 78.8, 79.7, 82.6, 82.8, 82.8, 84.0]


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"| {padded[0]} |", rule, *(f"| {line} |" for line in padded[1:])])


# ---- the paper's curves ----


def load(curves_file: str, table_file: str | None) -> tuple[dict[Key, Branch], dict[Key, dict], dict[Key, float]]:
    """Branches (pure RL once, under the key BASE), the published settings, the published ceilings."""
    branches, errors = read_curves(curves_file)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    unique = {}
    for key, branch in branches.items():
        if branch.x and branch.p_sft is not None:
            unique.setdefault(key if key[1] else BASE, branch)
    if not table_file:
        return unique, {}, {}
    table = {}
    with open(table_file, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if step := int(row["sft_step"]):
                table[row["dataset"], step] = float(row["a_post"])
            else:
                # The row of pure RL contradicts itself: it prints 77.3 beside P_sft 46.7 + PL_rl 25.3 = 72.0.
                table[BASE] = float(row["p_sft"]) + float(row["pl_rl"])
    return unique, read_settings(table_file), table


def label(key: Key) -> str:
    return f"{key[0]} {key[1]}" if key[1] else "pure RL"


def table_4(
    branches: dict[Key, Branch], table: dict[Key, float], fits: dict[Key, CeilingFit], paper_fits: dict[Key, CeilingFit]
) -> str:
    """Every published ceiling beside the published procedure and the default, with its interval."""
    rows = []
    for key, paper_fit in paper_fits.items():
        fit = fits[key]
        low, high = fit.interval
        default = f"{fit.a_post:.1f}" if fit.identified else f">= {low:.1f}"
        rows.append(
            [
                label(key),
                f"{branches[key].p_sft:.1f}",
                f"{table[key]:.1f}",
                f"{paper_fit.a_post:.1f}",
                default,
                f"[{low:.1f}, {high:.1f}]",
                fit.status,
                remark(table[key], paper_fit, fit, branches[key]),
            ]
        )
    head = ["start of RL", "P_sft", "Table 4", "published procedure", "default", "90 % interval", "verdict"]
    return markdown([*head, "where one differs from Table 4 by more than 1.0"], rows)


def remark(published: float, paper_fit: CeilingFit, fit: CeilingFit, branch: Branch) -> str:
    """Why a ceiling is off, from the fit itself."""
    remarks = []
    if abs(paper_fit.a_post - published) > 1:
        last = branch.x[np.flatnonzero(paper_fit.kept)[-1]]
        at_bound = {
            "C_mid": paper_fit.c_mid > 0.95 * last,
            "B": paper_fit.b < 0.12 or paper_fit.b > 11.5,
            "A_post": paper_fit.a_post > 99.5,
        }
        names = " and ".join(name for name, is_there in at_bound.items() if is_there)
        remarks.append(
            f"procedure: {names} at its bound, not identified" if names else "procedure: fits these points so"
        )
    if fit.identified and abs(fit.a_post - published) > 1:
        if fit.interval[0] <= published <= fit.interval[1]:
            remarks.append("default: its interval holds the published value")
        else:
            remarks.append("default: published value outside of the interval")
    return "; ".join(remarks)


def released_splits(branches: dict[Key, Branch], settings: dict[Key, dict]) -> str:
    """RMSE on points that the released settings hold out, of the default (fitted to all before) and the procedure."""
    rows, ordinary = [], []
    for key, options in settings.items():
        n = options["last"]  # points fitted
        if key not in branches or n is None or n >= len(branches[key].x):
            continue
        x, y, p_sft = np.array(branches[key].x), np.array(branches[key].y), branches[key].p_sft
        procedure = fit_paper(x, y, p_sft, **options).rmse_heldout
        draws = ceiling.fit(x[:n], y[:n], p_sft, max_score=100.0).draws
        default = rmse(np.median(draws.scores(x[n:]), 0), y[n:])
        falls = np.abs(y[n:] - np.median(y[n:])).max() >= 4  # a collapse within the held-out part
        if not falls:
            ordinary.append((default, procedure))
        remark = "falls in the held-out part" if falls else ""
        rows.append([label(key), n, len(x) - n, f"{default:.2f}", f"{procedure:.2f}", remark])
    default, procedure = np.mean(ordinary, axis=0)
    name = f"mean of the {len(ordinary)} ordinary curves"
    rows.append([name, "", "", f"{default:.3f}", f"{procedure:.3f}", ""])
    return markdown(["curve", "fitted", "held out", "default", "published procedure", ""], rows)


def forecasts(branches: dict[Key, Branch], fits: dict[Key, CeilingFit]) -> str:
    """Means of `holdout` over the curves, with and without those that fall in their last third."""
    results = {key: holdout(branch, 100.0) for key, branch in branches.items()}
    falls = set()
    for key, fit in fits.items():
        y = np.array(branches[key].y)
        if fit.status == "collapsed" or (y[-len(y) // 3 :] < fit.a_post - 4).any():
            falls.add(key)
    rows = []
    for name, keys in (("no fall in the last third", set(results) - falls), ("all", set(results))):
        for fraction in FRACTIONS:
            chosen = [result for key in keys for result in results[key] if result["fraction"] == fraction]
            errors = [f"{mean_size(chosen, error):.2f}" for error in ("error", "error_plain", "error_last")]
            rows.append([name, len(chosen), f"first {fraction:.0%}", *errors, f"{mean_size(chosen, 'inside'):.0%}"])
    head = ["curves", "", "fitted on", "default", "plain sigmoid", "last score", "inside the 90 % interval"]
    return markdown(head, rows)


# ---- the paper's claims ----


def claims(fits: dict[Key, CeilingFit]) -> str:
    """The paper's three answers, as differences between draws of the fitted ceilings."""
    rng = np.random.default_rng(0)
    # Curves are independent of each other, so their draws must not be in the same order.
    draws = {
        key: rng.permutation(fit.draws.a_post)
        for key, fit in fits.items()
        if fit.status in ("saturated", "still rising")
    }
    groups: dict[str, list[Key]] = {}
    for key in draws:
        if key[1]:
            groups.setdefault(key[0], []).append(key)
    best = {dataset: np.max([draws[key] for key in keys], axis=0) for dataset, keys in groups.items()}
    lines = [against_pure_rl(draws)] if BASE in draws else []
    lines += [when_to_switch(dataset, keys, draws, fits) for dataset, keys in groups.items()]
    return "\n".join([*lines, *which_data(best)])


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Is one ceiling above the other with more than 95 % probability?"""
    return verdict(probability_above(a, b)) != "not resolved"


def against_pure_rl(draws: dict[Key, np.ndarray]) -> str:
    above = [verdict(probability_above(draws[key], draws[BASE])) == "shown" for key in draws if key != BASE]
    return (
        f"- **SFT before RL beats pure RL.** {sum(above)} of {len(above)} ceilings of SFT-then-RL lie above pure RL's "
        "with more than 95 % probability."
    )


def when_to_switch(dataset: str, keys: list[Key], draws: dict[Key, np.ndarray], fits: dict[Key, CeilingFit]) -> str:
    pairs = list(itertools.combinations(keys, 2))
    different = [pair for pair in pairs if differ(draws[pair[0]], draws[pair[1]])]
    line = (
        f"- **When to switch, {dataset}.** {len(different)} of {len(pairs)} pairs of checkpoints differ by more than "
        "the uncertainty"
    )
    orders = []
    for pair in different:
        low, high = sorted(pair, key=lambda key: fits[key].a_post)
        orders.append(f"{high[1]} over {low[1]}")
    return line + (": " + "; ".join(orders) if orders else "") + "."


def which_data(best: dict[str, np.ndarray]) -> list[str]:
    """best: draws of the highest ceiling of each data set."""
    pairs = list(itertools.combinations(best, 2))
    different = sum(differ(best[a], best[b]) for a, b in pairs)
    lines = [
        f"- **Which data.** {different} of {len(pairs)} pairs of data sets ({', '.join(best)}) differ in their highest "
        "ceiling by more than the uncertainty."
    ]
    known = [dataset for dataset in best if dataset in TABLE_5]
    if len(known) >= 3:
        losses = [TABLE_5[dataset] for dataset in known]
        correlations = [
            agreement(losses, [best[dataset][i] for dataset in known])["pearson"] for i in range(0, DRAWS, 8)
        ]
        low, high = np.quantile([r for r in correlations if r is not None], [0.05, 0.95])
        lines.append(
            f"  With their minimum validation losses, Pearson's r over these {len(known)} sets lies in "
            f"[{low:.2f}, {high:.2f}] (90 % of draws)."
        )
    seven = agreement(PUBLISHED_LOSSES, PUBLISHED_CEILINGS)
    low, high = seven["pearson_interval"]
    lines.append(
        f"  From the published numbers of all seven sets: r = {seven['pearson']:.2f}, 90 % interval "
        f"[{low:.2f}, {high:.2f}] (Fisher), Spearman {seven['spearman']:.2f} with p = {seven['p_value']:.4f}."
    )
    return lines


# ---- simulated curves ----

# Small gains, as the paper has: C_mid as a share of the run.
KINDS = {
    "saturates early (C_mid < 0.1 of the run)": (0.02, 0.1),
    "in between (0.1 to 0.5)": (0.1, 0.5),
    "late (0.5 to 1.5)": (0.5, 1.5),
}

# Curves of a nano task, or of any run with large gains: points, noise, gain, C_mid as a share of the run.
LARGE = {
    "60 scores, noise 0.4, gain 20 to 50, C_mid 0.05 to 0.5": (60, 0.4, (20, 50), (0.05, 0.5)),
    "30 scores, noise 0.8, gain 20 to 50, C_mid 0.05 to 0.5": (30, 0.8, (20, 50), (0.05, 0.5)),
    "14 scores, noise 1.5, gain 20 to 50, C_mid 0.05 to 1": (14, 1.5, (20, 50), (0.05, 1)),
    "14 scores, noise 1.5, gain 20 to 50, C_mid 0.5 to 3": (14, 1.5, (20, 50), (0.5, 3)),
    "60 scores, noise 0.4, gain 2 to 12, C_mid 0.05 to 1.5": (60, 0.4, (2, 12), (0.05, 1.5)),
    "14 scores, noise 1.5, gain 2 to 12, C_mid 0.05 to 1.5": (14, 1.5, (2, 12), (0.05, 1.5)),
}
PER_KIND = 400

# What it takes to identify a ceiling: scores of a run, their noise, and how many C_mid the run is long.
POINTS, NOISES, LENGTHS = (15, 30, 60), (0.4, 0.75, 1.5), (3, 6, 12, 24)
GAINS = (8.0, 35.0)
PER_CELL = 60


def simulate(rng: np.random.Generator) -> dict:
    """A run like the paper's: 14 to 80 scores, noise and drift of about 0.4 points each, outliers; a tenth collapse."""
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
    curve = simulate(np.random.default_rng(seed))
    x, y, p_sft, truth = curve["x"], curve["y"], curve["p"], curve["truth"]
    fit = ceiling.fit(x, y, p_sft, max_score=100.0)
    kept = fit.kept & (np.arange(len(x)) < collapse_point(y, p_sft, 100.0))
    low, high = np.quantile(bootstrap(x[kept], y[kept], p_sft, max_score=100.0), [0.05, 0.95])
    return dict(
        late=curve["late"],
        tau=curve["tau"],
        collapses=curve["collapses"],
        status=fit.status,
        error=abs(fit.a_post - truth),
        inside=fit.interval[0] <= truth <= fit.interval[1],
        width=fit.interval[1] - fit.interval[0],
        bootstrap=low <= truth <= high,
    )


def simulation(count: int) -> str:
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(simulated, range(count), chunksize=20))
    groups = {}
    for kind, (early, late) in KINDS.items():
        groups[kind] = [r for r in results if early <= r["late"] < late and not r["collapses"]]
    groups["nearly white noise (tau < 0.2)"] = [r for r in results if r["tau"] < 0.2]
    groups["strong drift (tau > 1.2)"] = [r for r in results if r["tau"] > 1.2]
    groups["collapses"] = [r for r in results if r["collapses"]]
    groups["called saturated"] = [r for r in results if r["status"] == "saturated"]
    groups["all"] = results
    head = ["curves", "", "interval holds the true ceiling", "bootstrap's does", "median width"]
    head += ["median error of a_post", "saturated", "still rising", "collapsed"]
    return markdown(head, [[name, len(group), *coverage(group)] for name, group in groups.items()])


def coverage(group: list[dict]) -> list[str]:
    """The numbers of one row of the table of `simulation`."""
    shares = [np.mean([bool(r[name]) for r in group]) for name in ("inside", "bootstrap")]
    width, error = (np.median([r[name] for r in group]) for name in ("width", "error"))
    verdicts = [
        np.mean([r["status"] == status for r in group]) for status in ("saturated", "still rising", "collapsed")
    ]
    return [*(f"{v:.0%}" for v in shares), f"{width:.1f}", f"{error:.2f}", *(f"{v:.0%}" for v in verdicts)]


def white_curve(
    rng: np.random.Generator, points: int, noise: float, gain: float, late: float
) -> tuple[CeilingFit, float]:
    """The fit to a curve with white noise and B around 1.2, from a start that leaves room; and the true ceiling."""
    x = np.linspace(1 / points, 1, points)
    p, b = rng.uniform(10, 97 - gain), np.clip(1.2 * np.exp(0.35 * rng.normal()), 0.6, 3)
    y = p + gain / (1 + (late / x) ** b) + noise * rng.normal(size=points)
    fit = ceiling.fit(x, np.clip(y, 0, 100), float(np.clip(p + noise * rng.normal(), 0, 100)), max_score=100.0)
    return fit, p + gain


def simulated_large(kind: str, seed: int) -> dict:
    points, noise, gains, lates = LARGE[kind]
    rng = np.random.default_rng((seed, list(LARGE).index(kind)))
    fit, truth = white_curve(rng, points, noise, rng.uniform(*gains), np.exp(rng.uniform(*np.log(lates))))
    low, high = fit.interval
    return dict(inside=low <= truth <= high, above=low > truth, width=high - low, status=fit.status)


def large_simulation() -> str:
    """Coverage by kind of curve, of all and of those called saturated; and how often a lower bound is wrong."""
    rows = []
    with ProcessPoolExecutor() as pool:
        for kind in LARGE:
            results = list(pool.map(simulated_large, [kind] * PER_KIND, range(PER_KIND), chunksize=20))
            saturated = [r for r in results if r["status"] == "saturated"]
            rising = [r for r in results if r["status"] == "still rising"]
            share = f"{np.mean([r['inside'] for r in saturated]):.0%}" if len(saturated) >= 30 else "(few)"
            wrong = f"{np.mean([r['above'] for r in rising]):.0%}"
            inside, width = np.mean([r["inside"] for r in results]), np.median([r["width"] for r in results])
            cells = [f"{inside:.0%}", f"{len(saturated) / PER_KIND:.0%}", share, wrong, f"{width:.1f}"]
            rows.append([kind, *cells])
    head = ["curves", "interval holds the true ceiling", "called saturated", "interval of these holds it"]
    return markdown([*head, "lower bound of a rising one is above it", "median width"], rows)


def identified_share(cell: tuple[float, int, float, int]) -> float:
    gain, points, noise, length = cell
    fits = [white_curve(np.random.default_rng(i), points, noise, gain, 1 / length)[0] for i in range(PER_CELL)]
    return np.mean([fit.identified for fit in fits])


def what_it_takes() -> str:
    """The share of curves whose ceiling is identified, by gain, number of scores, noise and length of the run."""
    cells = list(itertools.product(GAINS, POINTS, NOISES, LENGTHS))
    with ProcessPoolExecutor() as pool:
        shares = dict(zip(cells, pool.map(identified_share, cells), strict=True))
    rows = []
    for gain, points, noise in itertools.product(GAINS, POINTS, NOISES):
        rows.append([f"{gain:g}", points, noise, *(f"{shares[gain, points, noise, n]:.0%}" for n in LENGTHS)])
    return markdown(["gain", "scores", "noise", *(f"{n} C_mid" for n in LENGTHS)], rows)


def bootstrap_seconds() -> float:
    """CPU time of 1,000 refits of a 60-point curve."""
    x = np.linspace(3, 200, 60)
    y = 70 + 6 / (1 + 30 / x) + np.random.default_rng(0).normal(size=60) * 0.4
    start = time.process_time()
    bootstrap(x, y, 70.0)
    return time.process_time() - start


# ---- the page ----


def paper_tables(curves_file: str, table_file: str | None) -> dict[str, object]:
    """Everything on the page that needs the paper's curves, by its name there."""
    branches, settings, table = load(curves_file, table_file)
    fits = {key: ceiling.fit(b.x, b.y, b.p_sft, max_score=100.0) for key, b in branches.items()}
    paper_fits = {}
    for key in table:
        if key in branches:
            b = branches[key]
            paper_fits[key] = fit_paper(b.x, b.y, b.p_sft, **settings.get(key, {}))
    off_paper = [abs(fit.a_post - table[key]) for key, fit in paper_fits.items()]
    off_ours = [abs(fits[key].a_post - table[key]) for key in paper_fits if fits[key].status == "saturated"]
    return {
        "table_4": table_4(branches, table, fits, paper_fits),
        "n": len(off_paper),
        "paper_median": f"{np.median(off_paper):.2f}",
        "paper_within": sum(off <= 1 for off in off_paper),
        "identified": len(off_ours),
        "ours_median": f"{np.median(off_ours):.2f}",
        "ours_within": sum(off <= 1 for off in off_ours),
        "splits": released_splits(branches, settings),
        "forecasts": forecasts(branches, fits),
        "claims": claims(fits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves")
    parser.add_argument("--table")
    parser.add_argument("--simulate", type=int, default=3000, metavar="N")
    parser.add_argument("--markdown", action="store_true", help="write docs/ceiling.md")
    args = parser.parse_args()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, {datetime.date.today()}"
    values: dict[str, object] = {"versions": versions}
    if args.curves:
        values |= paper_tables(args.curves, args.table)
    values["simulation"] = simulation(args.simulate)
    values["large"], values["takes"] = large_simulation(), what_it_takes()
    values |= {"per_kind": PER_KIND, "per_cell": PER_CELL}
    values["seconds"] = f"{bootstrap_seconds():.2f}"
    text = (ROOT / "benchmarks" / "ceiling.md.in").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    print(text)
    if args.markdown:
        (ROOT / "docs" / "ceiling.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
