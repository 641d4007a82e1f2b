"""A study: the same experiment with several seeds, and what they say together about the paper's claims.

    python pipeline.py --preset study --seeds 3

Each seed draws its own problems and pretrains its own base model, so that the spread between seeds is that of the whole
experiment. For every claim each seed gives draws of a margin, by how much one value lies above another (`claims`). The
seeds together give the mean margin with two errors: what each curve leaves open, and the spread between the seeds, by
Student's t. So three seeds that agree can show a claim, and three that differ cannot.

Beside the paper's claims stand questions of ours: does the validation loss order the ceilings better than P_sft does,
or than pass@k; how much ceiling does each guide cost whose favourite set is taken; would the first half of the RL
curves have been enough to choose; and does RL from an overfitted start end lower, wherever its ceiling may be?
"""

import datetime
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanopcf.report import paradigms
from nanopcf.report.agreement import spearman_of_draws
from nanopcf.report.assembly import fit_branches
from nanopcf.report.ceilings import probability_above, sampling_error, verdict
from nanopcf.report.claims import Contest, Draws, contests, starts_of
from nanopcf.report.study_figures import draw_study
from nanopcf.report.text import ceiling_text, claim_text, percent
from nanopcf.run import files
from nanopcf.run.folder import check_is_run
from nanopcf.run.untrusted import printable

PARTS = {"half": 1 / 2, "quarter": 1 / 4}  # of the RL curves, from which one could have chosen


def run_seeds(c: Any, experiment: Callable[[Any], dict]) -> dict:
    """Run the pipeline's experiment with seeds c.seed, c.seed + 1, ..., each in a folder of its own, and publish the
    study. c: the pipeline's config."""
    out, reports = Path(c.out or f"runs/{c.preset}"), []
    check_is_study(out, c)
    for seed in range(c.seed, c.seed + c.seeds):
        folder = out / f"seed-{seed}"
        begun = c.resume and (folder / "config.json").exists()
        reports.append(experiment(replace(c, seed=seed, seeds=1, out=str(folder), resume=begun)))
    return publish(reports, out)


def check_is_study(out: Path, c: Any) -> None:
    """Raises ValueError unless the folder is new, or empty, or holds the runs of a study: `publish` writes into it."""
    found = set(out.iterdir()) if out.is_dir() else set()
    seeds = {path for path in found if re.fullmatch(r"seed-\d+", path.name)}
    for folder in seeds:
        check_is_run(folder, c)
    if found - seeds and not any((folder / "config.json").exists() for folder in seeds):
        raise ValueError(f"{out} is not empty and not the folder of a study; choose another --out")


def publish(reports: list[dict], folder: Path) -> dict:
    """Write study.json, study.md and its figures into the folder, and print what the seeds say together."""
    study = pool(reports)
    images = draw_study(reports, study)
    files.write_json(folder / "study.json", files.strict(study))
    for name, image in images.items():
        files.write_bytes(folder / f"{name}.png", image)
    files.write_text(folder / "study.md", page(reports, study, images))
    print(printable("\n".join(claim_lines(study["claims"]))))
    print(f"\n{folder / 'study.md'}")
    return study


# ---- what the seeds say together ----


def pool(reports: list[dict]) -> dict:
    """{seeds, claims, guides, paradigms} of judged reports of one experiment, one per seed."""
    drawn = [fit_branches(report["branches"], report["problems"])[1] for report in reports]
    of_seeds = []
    for report, draws in zip(reports, drawn, strict=True):
        found = contests(report, draws) + guide_contests(report, draws) + level_contests(report)
        of_seeds.append(found + over_sets(found, [row["name"] for row in report["selector"]["ranking"]]))
    claims = [pooled(name, of_seeds) for name in dict.fromkeys(c.claim for found in of_seeds for c in found)]
    problems = min(report["problems"] for report in reports)
    rows = paradigms.summarise([run for report in reports for run in report["paradigm_runs"]], problems)
    return {
        "seeds": [report["seed"] for report in reports],
        "claims": claims + [claim | {"seeds": {}} for claim in paradigms.judge_claims(rows, problems)],
        "guides": [{"seed": r["seed"], **regrets(r, draws)} for r, draws in zip(reports, drawn, strict=True)],
        "paradigms": rows,
    }


def pooled(name: str, of_seeds: list[list[Contest]]) -> dict:
    """One claim over the seeds that can say something about it: {claim, verdict, probability, margin, seeds, evidence}.

    margin: (low, mean, high) of the mean margin over seeds, with its 90 % interval; seeds: {number in the list: the
    probability by that seed alone}. One seed alone has no spread, and resolves nothing here.
    """
    found = {i: c for i, contests in enumerate(of_seeds) for c in contests if c.claim == name}
    margins = np.array([contest.high - contest.low for contest in found.values()])  # (seeds, R)
    draws = mean_over_seeds(margins)
    # Equal values count half: two guides that order all sets alike are not better than each other.
    probability = float((draws > 0).mean() + (draws == 0).mean() / 2) if len(margins) > 1 else None
    low, middle, high = (float(v) for v in np.quantile(draws, [0.05, 0.5, 0.95]))
    return {
        "claim": name,
        "verdict": "not resolved" if probability is None else verdict(probability),
        "probability": probability,
        "margin": (low, middle, high),
        "seeds": {i: probability_above(contest.high, contest.low) for i, contest in found.items()},
        "evidence": [contest.evidence for contest in found.values()],
    }


def mean_over_seeds(values: np.ndarray, R: int = 20_000) -> np.ndarray:
    """Draws (R,) of the mean over all seeds that there could be, from draws (S, r) of the values of S seeds.

    In each draw the seeds have some values; their mean errs by their deviation / sqrt(S), by Student's t.
    """
    rng, S = np.random.default_rng(0), len(values)
    each = np.array([rng.choice(of_seed, R) for of_seed in values])  # (S, R)
    if S == 1:
        return each[0]
    return each.mean(axis=0) + each.std(axis=0, ddof=1) / S**0.5 * rng.standard_t(S - 1, size=R)


# ---- questions beside the paper's ----

# guide -> (its column in the selector's ranking, 1 if more of it is better and -1 if less)
GUIDES = {"validation loss": ("min_val_loss", -1), "P_sft": ("p_sft", 1), "pass@k": ("pass_at_k", 1)}


def guide_contests(report: dict, draws: Draws) -> list[Contest]:
    """Which number, known before RL, orders the ceilings of the candidate sets best? Compared with the loss."""
    _, starts, _ = starts_of(report)
    ranking = report["selector"]["ranking"]
    ceilings = np.array([draws[starts[row["name"]]] for row in ranking])  # (sets, R)
    orders = {}
    for name, (column, sign) in GUIDES.items():
        correlations = spearman_of_draws([sign * row[column] for row in ranking], ceilings)
        if correlations is not None:
            orders[name] = correlations
    if "validation loss" not in orders:
        return []
    found = []
    for name in list(orders)[1:]:
        medians = "; ".join(f"{guide} {np.median(orders[guide]):.2f}" for guide in ("validation loss", name))
        claim = f"The validation loss orders the ceilings better than {name} (ours)"
        found.append(Contest(claim, orders["validation loss"], orders[name], f"Spearman with the ceiling: {medians}"))
    return found


def level_contests(report: dict) -> list[Contest]:
    """Does RL from a severely overfitted start end lower than from the stable one, after the same number of steps?

    Such runs often end for want of a signal, and then no curve identifies a ceiling; the level where they end is known.
    """
    rng = np.random.default_rng(0)
    branches, starts, _ = starts_of(report)

    def level(branch: dict) -> np.ndarray:
        """Draws (R,) of the mean of the last scores, which other test problems would have changed."""
        mean = np.mean([point["score"] for point in branch["curve"][-paradigms.LAST :]])
        return mean + sampling_error(mean, report["problems"]) * rng.normal(size=2000)

    found = []
    for name, start in starts.items():
        for key, branch in branches.items():
            if key[0] == name and branch["regime"] == "severe" and key != start:
                stable, severe = level(branches[start]), level(branch)
                claim = f"{name}: RL from a severe start ends lower than from the stable one (ours)"
                found.append(Contest(claim, stable, severe, f"{percent(stable.mean())}; {percent(severe.mean())}"))
    return found


def over_sets(found: list[Contest], names: list[str]) -> list[Contest]:
    """The claims that are made about one set each, once more about the mean over the sets."""
    alike: dict[str, list[Contest]] = {}
    for contest in found:
        name, _, claim = contest.claim.partition(": ")
        if name in names:
            alike.setdefault(claim, []).append(contest)
    return [
        Contest(
            f"mean of {len(group)} sets: {claim}",
            np.mean([contest.high for contest in group], axis=0),
            np.mean([contest.low for contest in group], axis=0),
            "; ".join(contest.evidence for contest in group),
        )
        for claim, group in alike.items()
        if len(group) > 1
    ]


def regrets(report: dict, draws: Draws) -> dict[str, dict]:
    """{guide: {set, regret}}: the set that each guide would have taken, and how much its ceiling lies below the best.

    Guides: the numbers known before RL, and the ceilings fitted to the first part of each RL curve.
    """
    branches, starts, _ = starts_of(report)
    ranking = {row["name"]: row for row in report["selector"]["ranking"]}
    ceiling = {name: float(np.median(draws[start])) for name, start in starts.items()}
    choices = {
        guide: max(ranking, key=lambda name, column=column, sign=sign: sign * ranking[name][column])
        for guide, (column, sign) in GUIDES.items()
    }
    for part, share in PARTS.items():
        early = [shortened(branches[start], share) for start in starts.values()]
        _, drawn = fit_branches(early, report["problems"])
        choices[f"first {part} of RL"] = max(starts, key=lambda name: np.median(drawn[starts[name]]))
    best = max(ceiling.values())
    return {guide: {"set": name, "regret": best - ceiling[name]} for guide, name in choices.items()}


def shortened(branch: dict, share: float) -> dict:
    """The branch with the first share of its curve, by compute."""
    end = share * branch["curve"][-1]["x"] * (1 + 1e-9)
    return branch | {"curve": [point for point in branch["curve"] if point["x"] <= end], "out_of_signal": False}


# ---- the page ----


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def claim_lines(claims: list[dict]) -> list[str]:
    """For the terminal: one line per claim."""
    return [f"{claim_text(claim):<20} {claim['claim']}" for claim in claims]


def page(reports: list[dict], study: dict, images: dict[str, bytes]) -> str:
    """study.md: claims, guides, ceilings and how to run it again, with the figures beside it."""
    seeds = study["seeds"]
    lines = ["# The study: are the paper's claims true at nano scale?", ""]
    lines += [f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), each with problems and a base model of its own.", ""]
    for question, text in QUESTIONS.items():
        asked = [claim["verdict"] for claim in study["claims"] if question in claim["claim"]]
        counts = [f"{asked.count(v)} {v}" for v in ("shown", "not shown", "not resolved")]
        lines.append(f"- {question}, {text}: of {len(asked)} claims {', '.join(counts)}.")
    lines.append("")
    lines += claims_table(study)
    lines += ["", PROBABILITIES, ""]
    for name, caption in CAPTIONS.items():
        if name in images:
            lines += [f"![{name}]({name}.png)", "", caption, ""]
    lines += ["## Which guide picks the data?", "", GUIDES_TEXT, "", *guides_table(study)]
    lines += ["", "## Every ceiling", "", *ceilings_table(reports), ""]
    if study["paradigms"]:
        head = [name if name != "first" else "at the start" for name in paradigms.HEAD]
        lines += [
            "## Every paradigm at equal compute",
            "",
            *markdown(head, list(map(paradigms.cells, study["paradigms"]))),
            "",
        ]
    return "\n".join(lines + reproduction(reports))


QUESTIONS = {
    "RQ1": "SFT-then-RL against either alone and against both at once",
    "RQ2": "when to switch from SFT to RL",
    "RQ3": "which data",
}
PROBABILITIES = (
    "The probability that a claim is true here has the doubt of each curve, the sampling of the test problems and the "
    "spread between seeds in it (Student's t). Shown: at least 95 %; not shown: at most 5 %. Beside it what each seed "
    "says alone. Margin: by how much, in points of the score or of Spearman's correlation, with a 90 % interval."
)
GUIDES_TEXT = (
    "The set that each guide would have taken, and in parentheses by how many points its ceiling lies below that of the "
    "best set. The first three are known before any RL; the last two need that part of every RL run."
)
CAPTIONS = {
    "study_ceilings": "Ceilings (filled; with an arrow where only a lower bound is known) and P_sft (open) of every start, one mark per seed.",
    "study_loss": "The minimum validation loss of a set, and the ceiling of its recommended start. One colour per set, one mark per seed.",
    "study_curves": "The paper's Fig. 8: score along RL from each start, one line per seed.",
    "study_sft": "The paper's Fig. 3: score along SFT, one line per seed, and the ceilings of RL from the checkpoints where it started.",
    "fig2_paradigms": "The paper's Fig. 2: every paradigm at equal compute; mean over seeds, the band is one standard deviation between them.",
}


def claims_table(study: dict) -> list[str]:
    rows = []
    for claim in study["claims"]:
        alone = " ".join(f"{p:.2f}" for p in claim["seeds"].values())
        margin = ""
        if "margin" in claim:
            correlation = "Spearman" in claim["claim"] or "orders" in claim["claim"]
            low, middle, high = (v if correlation else 100 * v for v in claim["margin"])
            margin = (
                f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"
                if correlation
                else f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
            )
        probability = "–" if claim["probability"] is None else f"{claim['probability']:.2f}"
        rows.append([claim["claim"], f"**{claim['verdict']}**", probability, margin, alone])
    return markdown(["claim", "verdict", "P(true here)", "margin", "P by each seed"], rows)


def guides_table(study: dict) -> list[str]:
    names = [name for name in study["guides"][0] if name != "seed"]
    rows = []
    for name in names:
        cells = [f"{of_seed[name]['set']} ({100 * of_seed[name]['regret']:.1f})" for of_seed in study["guides"]]
        mean = np.mean([of_seed[name]["regret"] for of_seed in study["guides"]])
        rows.append([name, *cells, f"{100 * mean:.1f}"])
    return markdown(["guide", *(f"seed {s}" for s in study["seeds"]), "mean regret"], rows)


def ceilings_table(reports: list[dict]) -> list[str]:
    rows = []
    for report in reports:
        for b in report["branches"]:
            name = "pure RL" if b["dataset"] == "base" else f"{b['dataset']} @{b['sft_step']}"
            scores = [percent(b["p_sft"]), percent(b["best"]), ceiling_text(b)]
            rows.append([str(report["seed"]), name, b["regime"], *scores, b["status"]])
    return markdown(["seed", "start", "regime", "P_sft", "best", "ceiling", "verdict"], rows)


def reproduction(reports: list[dict]) -> list[str]:
    first = reports[0]
    hours = sum(report["elapsed_s"]["total"] for report in reports) / 3600
    versions = ", ".join(f"{name} {version}" for name, version in first["environment"]["versions"].items())
    return [
        "## To run it again",
        "",
        *(f"    python {command}" for command in dict.fromkeys(r["environment"]["command"] for r in reports)),
        "",
        f"{hours:.1f} hours on {first['environment']['device']}; {versions}; commit {first['environment']['commit']}; "
        f"{datetime.date.today()}. Page: Python {platform.python_version()}, torch {torch.__version__}.",
        "",
    ]
