"""What the paper says, and what this run shows.

Each claim says that one value lies above another, and both are known by their draws: it gets the probability that it is
true in this run. From 95 % on it is "shown"; where its opposite has 95 %, "not shown"; between them it is "not
resolved", and the probability stands beside it. A run has one seed, so what another seed would have given is not in
these probabilities: `study` has that.
"""

from typing import NamedTuple

import numpy as np

from nanopcf.report.agreement import FOLLOWS, spearman_of_draws
from nanopcf.report.ceilings import probability_above, sampling_error, verdict
from nanopcf.report.text import ceiling_text, correlation, label, percent, si

Draws = dict[tuple[str, int], np.ndarray]  # (data set, SFT step) of a branch -> draws of its ceiling (R,)


class Contest(NamedTuple):
    """A claim: what `high` stands for is above what `low` stands for."""

    claim: str
    high: np.ndarray  # (R,) draws of a score, or of a correlation
    low: np.ndarray  # (R,)
    evidence: str


def judge_claims(report: dict, draws: Draws) -> list[dict]:
    """The paper's claims that this run can be held against: {claim, verdict, probability, evidence}."""
    return [
        entry(contest.claim, probability_above(contest.high, contest.low), contest.evidence)
        for contest in contests(report, draws)
    ]


def contests(report: dict, draws: Draws) -> list[Contest]:
    """The paper's claims, with the draws of what each compares."""
    branches, starts, base = starts_of(report)
    # The chosen start stands for SFT-then-RL: the best of all branches would be the luckiest one too.
    chosen = starts[report["selector"]["chosen"]]

    def higher(claim: str, high: tuple, low: tuple, more: str = "") -> Contest:
        """Is the ceiling of one branch above that of another?"""
        evidence = "; ".join(f"{label(branches[key])} {ceiling_text(branches[key])}" for key in (high, low))
        return Contest(claim, draws[high], draws[low], evidence + more)

    found = []
    if base:
        more = at_equal_compute(branches[chosen], branches[base])
        found.append(higher("SFT-then-RL has a higher ceiling than pure RL (RQ1)", chosen, base, more))
    found.append(above_pure_sft(branches[chosen], draws[chosen], report))
    for name, start in starts.items():
        others = {branch["regime"]: key for key, branch in branches.items() if key[0] == name and key != start}
        if "adaptive" in others:
            claim = f"{name}: a stable start has a higher ceiling than an adaptive one (RQ2)"
            found.append(higher(claim, start, others["adaptive"]))
        if "severe" in others:
            found.append(higher(f"{name}: severe overfitting lowers the ceiling (RQ2)", start, others["severe"]))
    found += loss_claim(report["selector"], starts, draws)
    sets = [candidate for candidate in report["candidates"] if candidate["name"] in starts]
    for claim, high, low in scale_claims(sets) + difficulty_claims(sets):
        found.append(higher(claim, starts[high], starts[low]))
    return found


def starts_of(report: dict) -> tuple[dict, dict, tuple | None]:
    """Each branch by where it starts, (data set, SFT step); where the selector would start RL from each candidate set;
    and where pure RL starts, if the run has it."""
    branches = {(branch["dataset"], branch["sft_step"]): branch for branch in report["branches"]}
    starts = {row["name"]: (row["name"], row["recommended_step"]) for row in report["selector"]["ranking"]}
    return branches, starts, next((key for key in branches if key[0] == "base"), None)


def entry(claim: str, probability: float, evidence: str) -> dict:
    return {"claim": claim, "verdict": verdict(probability), "probability": probability, "evidence": evidence}


def answer(report: dict, draws: Draws) -> str:
    """The question of the run in a sentence: how high can RL from the chosen start go, and is another set better?"""
    branches, starts, base = starts_of(report)
    chosen = starts[report["selector"]["chosen"]]
    text = f"RL from step {chosen[1]} of {chosen[0]} {reach(branches[chosen])}"
    if base:
        text += f"; from the base model it {reach(branches[base])}"
    if len(starts) > 1:
        others = np.max([draws[start] for start in starts.values() if start != chosen], axis=0)  # (R,)
        better = probability_above(others, draws[chosen])
        text += f". That another of the {len(starts)} sets has a higher ceiling has a probability of {better:.2f}"
        if verdict(better) == "not resolved":
            text += f" ({problems_to_tell(draws[chosen] - others, report['problems'])})"
    return text + "."


def problems_to_tell(margin: np.ndarray, problems: int) -> str:
    """How many test problems would tell whether draws of a margin (R,) are above 0, if it is what it seems to be and
    its doubt shrinks as that of a score does."""
    low, middle, high = np.quantile(margin, [0.05, 0.5, 0.95])
    times = ((high - low) / 2 / abs(middle)) ** 2 if middle else np.inf  # 0 lies at the end of the interval then
    if times > 30:
        return f"30 times the {problems:,} test problems might not tell which"
    return f"some {round(times * problems, -2):,.0f} test problems in place of {problems:,} would tell which"


def reach(branch: dict) -> str:
    """How high a branch can go; and where its curve does not tell, what would."""
    if branch["identified"]:
        return f"can reach {ceiling_text(branch)}"
    if branch["status"] == "out of signal":
        more = "a whole batch gave no signal: more rounds of prompts a step, or other prompts, would tell"
    elif branch["settled_at"] is None:
        more = "30 times its compute might not settle how high"
    else:
        more = f"some {branch['settled_at'] / branch['curve'][-1]['x']:.1f} times its compute would settle how high"
    return f"can reach more than {percent(branch['a_post'])} ({more})"


# ---- RQ1: SFT-then-RL against either alone ----


def at_equal_compute(branch: dict, pure_rl: dict) -> str:
    """The best scores at the total compute that pure RL had, as far as the other branch has points there."""
    spent = pure_rl["curve"][-1]["x"]
    within = [point["score"] for point in branch["curve"] if point["x"] + branch["x_sft"] <= spent]
    if not within:
        return ""
    return f"; best scores at a total of {si(spent)}: {percent(max(within))} and {percent(pure_rl['best'])}"


def above_pure_sft(branch: dict, draws: np.ndarray, report: dict) -> Contest:
    """Is the ceiling above the best score of any SFT checkpoint, of which some luck is a part?"""
    sft = best_sft(report)
    noise = sampling_error(sft, report["problems"])
    sft_draws = sft + noise * np.random.default_rng(len(report["branches"])).normal(size=len(draws))
    evidence = f"{label(branch)} {ceiling_text(branch)}; best of all SFT checkpoints {percent(sft)} ± {percent(noise)}"
    return Contest("SFT-then-RL has a ceiling above pure SFT (RQ1)", draws, sft_draws, evidence)


def best_sft(report: dict) -> float:
    """The best score of any SFT checkpoint."""
    return max(c["score"] for candidate in report["candidates"] for c in candidate["checkpoints"])


# ---- RQ3: which data ----


def loss_claim(selector: dict, starts: dict, draws: Draws) -> list[Contest]:
    """Does the loss order the ceilings? Two sets, or sets that are all alike, cannot say."""
    ranking = selector["ranking"]
    ceilings = np.array([draws[starts[row["name"]]] for row in ranking])  # (sets, R)
    spearman = spearman_of_draws([row["min_val_loss"] for row in ranking], ceilings)
    if spearman is None:
        return []
    evidence = (
        f"{agreement_text(selector)}; a random order is so low with probability {selector['p_value']:.2f}; "
        f"of the loss and P_sft {correlation(selector['spearman_p_sft'])}"
    )
    claim = f"A lower minimum validation loss goes with a higher ceiling (RQ3: Spearman at most {FOLLOWS})"
    at_most = np.full_like(spearman, FOLLOWS + 1e-9)  # a correlation of just FOLLOWS is low enough
    return [Contest(claim, at_most, spearman, evidence)]


def agreement_text(selector: dict) -> str:
    """How the losses order the ceilings, and how many of these are identified."""
    if selector["spearman"] is None:
        return "Spearman of loss and ceiling –"
    low, high = selector["spearman_interval"]
    return (
        f"Spearman of loss and ceiling {selector['spearman']:.2f} [{low:.2f}, {high:.2f}] "
        f"({selector['identified']} of {selector['n']} ceilings identified)"
    )


def scale_claims(sets: list[dict]) -> list[tuple[str, str, str]]:
    """(claim, set that should be higher, set that should be lower): the largest and smallest of each difficulty."""
    claims = []
    for difficulty in ("uniform", "easy", "hard"):
        alike = sorted((s for s in sets if s["difficulty"] == difficulty), key=lambda s: s["size"])
        if len(alike) > 1:
            claim = f"Scale: more {difficulty} trajectories, a higher ceiling (RQ3)"
            claims.append((claim, alike[-1]["name"], alike[0]["name"]))
    return claims


def difficulty_claims(sets: list[dict]) -> list[tuple[str, str, str]]:
    """The same for sets of one size and different difficulty."""
    claims = []
    for harder, easier in (("hard", "uniform"), ("uniform", "easy")):
        for a in sets:
            for b in sets:
                if a["size"] == b["size"] and (a["difficulty"], b["difficulty"]) == (harder, easier):
                    claim = (
                        f"Difficulty: {a['size']} {harder} trajectories give a higher ceiling than {easier} ones (RQ3)"
                    )
                    claims.append((claim, a["name"], b["name"]))
    return claims
