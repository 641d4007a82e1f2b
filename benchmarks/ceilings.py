"""Are the demo's ceilings true? Every branch goes on to five times its compute, and shows whether what was said holds.

    python benchmarks/ceilings.py [--seeds 5] [--times 5] [--preset demo] [--out runs/ceilings]
    python benchmarks/ceilings.py --simulate 400
    python benchmarks/ceilings.py --curves docs/results/study-curves.csv

One long run per seed answers all of it. At a constant learning rate RL does not know how long it will go on, so a
branch of the demo is the first part of the longer one to the last bit: cut there, the curves are those of the even
split; and `allocate.train_in_rounds`, replayed on the long curves, grants what the demo in rounds would have granted.

--simulate: does it spoil the intervals that a curve is looked at after each round, and stopped when it looks saturated?
Curves with known ceilings are stopped by that rule. --curves: curves of a file, in the format of `python -m
nanopcf.ceiling`, are cut after half, two thirds and five sixths of their points, and what is said there is held against
their end. The runs continue where they were interrupted.
"""

import argparse
import csv
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pipeline  # noqa: E402
from nanopcf import ceiling  # noqa: E402
from nanopcf.allocate import Curves, judge_branches, train_in_rounds  # noqa: E402
from nanopcf.ceiling.curve_files import COLUMNS, read_curves  # noqa: E402
from nanopcf.report.ceilings import fit_ceiling  # noqa: E402
from nanopcf.report.study import markdown  # noqa: E402
from nanopcf.report.text import ceiling_text, percent  # noqa: E402
from nanopcf.run import config  # noqa: E402

# ---- the long runs ----


def long_run(c: pipeline.PipelineConfig, seed: int, times: int, out: Path) -> tuple[Curves, int]:
    """The curves of all branches to `times` their steps, {name: points}; and how many problems a score counts."""
    c = replace(c, seed=seed, rl_steps=times * c.rl_steps, rl_points=times * c.rl_points, allocate="off", out=str(out))
    report = pipeline.main(replace(c, resume=(out / "config.json").exists()))
    names = [f"{branch['dataset']}@{branch['sft_step']}" for branch in report["branches"]]
    curves = {name: json.loads((out / "rl" / name / "curve.json").read_text())["curve"] for name in names}
    return curves, report["problems"]


def until(curve: list[dict], steps: int) -> list[dict]:
    return [point for point in curve if point["step"] <= steps]


@dataclass(frozen=True)
class Branch:
    """What the rounds need of a run's settings."""

    steps: int
    eval_every: int


def in_rounds(c: pipeline.PipelineConfig, curves: Curves, problems: int) -> dict[str, int]:
    """The steps that each branch would have been granted in rounds."""
    every = max(1, round(c.rl_steps / c.rl_points))
    configs = {name: Branch(c.rl_steps, every) for name in curves}

    def train(some: dict) -> Curves:
        return {name: until(curves[name], branch.steps) for name, branch in some.items()}

    with tempfile.TemporaryDirectory() as folder:
        return train_in_rounds(configs, train, Path(folder) / "granted.json", problems)[1]


def checked(curves: Curves, fits: dict[str, dict], times: int, steps: int) -> list[dict]:
    """Of each branch: what was said, the level where it ended, and whether that lies in the interval.

    The level is the mean of its scores over the last `steps` steps, or of its last five where it ended before.
    """
    rows = []
    for name, curve in curves.items():
        late = [point["score"] for point in curve if point["step"] > (times - 1) * steps] or [
            point["score"] for point in curve[-5:]
        ]
        level, fit = float(np.mean(late)), fits[name]
        inside = fit["a_post_low"] <= level <= fit["a_post_high"]
        above = level >= fit["a_post_low"]
        steps_to = curve[-1]["step"]
        rows.append({"name": name, **fit, "level": level, "inside": inside, "above": above, "steps": steps_to})
    return rows


def tables(c: pipeline.PipelineConfig, seeds: range, times: int, out: Path) -> str:
    """One line per branch, then one line per seed and way to spend the compute."""
    each, of_seed, points = [], [], []
    for seed in seeds:
        curves, problems = long_run(c, seed, times, out / f"seed-{seed}")
        for name, curve in curves.items():
            branch = (f"seed-{seed} {name}", name.split("@")[1], 0)
            points += [(*branch, "rl" if i else "sft", p["x"], f"{100 * p['score']:.2f}") for i, p in enumerate(curve)]
        for way in ("even", "rounds"):
            granted = dict.fromkeys(curves, c.rl_steps) if way == "even" else in_rounds(c, curves, problems)
            seen = {name: until(curve, granted[name]) for name, curve in curves.items()}
            fits, chance = judge_branches(seen, granted, problems)
            rows = checked(curves, fits, times, c.rl_steps)
            known = [row for row in rows if row["identified"]]
            others = [row for row in rows if not row["identified"]]
            of_seed.append(
                {
                    "seed": seed,
                    "way": way,
                    "branches": len(rows),
                    "known": len(known),
                    "ended": sum(row["status"] == "out of signal" for row in rows),
                    "inside": sum(row["inside"] for row in known),
                    "above": sum(row["above"] for row in others),
                    "sure": max(chance.values()),
                    "steps": sum(min(granted[name], curves[name][-1]["step"]) for name in curves),
                }
            )
            for row in rows:
                verdict = ("inside" if row["inside"] else "outside") if row["identified"] else "bound holds"
                if not row["identified"] and not row["above"]:
                    verdict = "bound too high"
                each.append(
                    [
                        seed,
                        row["name"],
                        way,
                        granted[row["name"]],
                        ceiling_text(row),
                        row["status"],
                        percent(row["level"]),
                        verdict,
                    ]
                )
    with open(out / "curves.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *points])
    head = ["seed", "start", "split", "steps", "said", "verdict", "level at the end", ""]
    text = markdown(head, [list(map(str, row)) for row in each])
    head = [
        "split",
        "seed",
        "steps spent",
        "identified",
        "out of signal",
        "level inside",
        "lower bounds that hold",
        "P(best start)",
    ]
    lines = []
    for way in ("even", "rounds"):
        rows = [row for row in of_seed if row["way"] == way]
        lines += [seed_line(way, str(row["seed"]), [row]) for row in rows]
        lines.append(seed_line(way, "all", rows))
    return "\n".join([*text, "", *markdown(head, lines)])


def seed_line(way: str, seed: str, rows: list[dict]) -> list[str]:
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name not in ("seed", "way")}
    others = total["branches"] - total["known"]
    return [
        way,
        seed,
        str(total["steps"]),
        f"{total['known']} of {total['branches']}",
        str(total["ended"]),
        f"{total['inside']} of {total['known']}",
        f"{total['above']} of {others}",
        f"{total['sure'] / len(rows):.2f}",
    ]


# ---- the stopping rule, simulated ----

POINTS, NOISE = 15, 0.0075  # of an even share of the compute, and of a score: about what the demo has
LOOKS = (10, 15, 20, 25, 30, 35, 40, 45)  # points at the ends of rounds, up to three even shares


def stopped(seed: int) -> dict:
    """A curve with a known ceiling, looked at after each round until it is identified; and at one even share."""
    rng = np.random.default_rng(seed)
    start, gain = rng.uniform(0.2, 0.6), rng.uniform(0.05, 0.35)
    c_mid, b = POINTS * np.exp(rng.uniform(np.log(0.03), np.log(0.6))), 1.2 * np.exp(0.35 * rng.normal())
    x = np.arange(1.0, LOOKS[-1] + 1)
    y = start + gain / (1 + (c_mid / x) ** b) + NOISE * rng.normal(size=len(x))
    first, result = start + NOISE * rng.normal(), {}
    for n in LOOKS:
        fit, _ = fit_ceiling(
            [{"x": float(at), "score": float(np.clip(score, 0, 1))} for at, score in zip(x[:n], y[:n], strict=True)],
            float(np.clip(first, 0, 1)),
            2000,
            seed=seed,
        )
        inside = fit["a_post_low"] <= start + gain <= fit["a_post_high"]
        if n == POINTS:
            result["even"] = (fit["identified"], inside)
        if fit["identified"] and "rounds" not in result:
            result["rounds"] = (True, inside)
        if "rounds" in result and "even" in result:
            break
    return {"rounds": (False, False)} | result


def simulation(count: int) -> str:
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(stopped, range(count), chunksize=10))
    rows = []
    for way, text in (
        ("even", "fitted once, at the end of an even share"),
        ("rounds", "looked at after each round, stopped when identified"),
    ):
        known = [inside for identified, inside in (result[way] for result in results) if identified]
        rows.append([text, f"{len(known)} of {count}", f"{np.mean(known):.0%}"])
    return "\n".join(markdown(["curves", "identified", "interval of these holds the true ceiling"], rows))


# ---- curves that are there, cut ----


def cut(file: str) -> str:
    """Of the ceilings that are called identified on the first part of a curve: how many hold the level at its end, the
    mean of the last three scores, with LAW_ERROR and LATE_GAIN, and without. Curves shorter than the longest ended
    before, for want of a signal, and are left out.
    """
    branches = [branch for branch in read_curves(file)[0].values() if branch.x]
    longest = max(len(branch.x) for branch in branches)
    known = inside = narrow = 0
    for branch in branches:
        if len(branch.x) < longest:
            continue
        level = np.mean(branch.y[-3:])
        for share in (1 / 2, 2 / 3, 5 / 6):
            n = round(share * longest)
            fit = ceiling.fit(branch.x[:n], branch.y[:n], branch.p_sft, max_score=100.0)
            (low, high), margin = fit.interval, 100 * ceiling.LAW_ERROR
            late = ceiling.LATE_GAIN * (fit.a_post - branch.p_sft - fit.epsilon)
            if fit.identified:
                known += 1
                inside += low <= level <= high
                narrow += low + margin <= level <= high - margin - late
    return f"{known} ceilings called identified; the end lies in the interval of {inside}, of {narrow} as the posterior has it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ...")
    parser.add_argument("--times", type=int, default=5, help="how far the branches go on")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--out", type=Path, default=Path("runs/ceilings"))
    parser.add_argument("--simulate", type=int, default=0, metavar="N")
    parser.add_argument("--curves", metavar="CURVES.csv")
    args = parser.parse_args()
    if args.curves:
        print(cut(args.curves))
        return
    if args.simulate:
        print(simulation(args.simulate))
        return
    c = config.parse(pipeline.PipelineConfig, "", ["--preset", args.preset], presets=pipeline.PRESETS, preset="demo")
    print(tables(c, range(args.seeds), args.times, args.out))


if __name__ == "__main__":
    main()
