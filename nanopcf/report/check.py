"""Does a report.json hold what `judge`, the page and the figures read? If not, one sentence says what is wrong."""

import math
from typing import Any

NUMBER, SCORE, COUNT, TEXT = "a finite number", "a score in [0, 1]", "a whole number above 0", "a text"
SHAPE = {
    "seed": NUMBER,
    "preset": TEXT,
    "task": TEXT,
    "flags": {},
    "base": {"p_0": SCORE, "parameters": COUNT},
    "candidates": [
        {
            "name": TEXT,
            "size": NUMBER,
            "difficulty": TEXT,
            "checkpoints": [{"x_sft": NUMBER, "val_loss": NUMBER, "score": SCORE, "regime": TEXT, "k": NUMBER}],
        }
    ],
    "branches": [
        {
            "dataset": TEXT,
            "sft_step": NUMBER,
            "regime": TEXT,
            "x_sft": NUMBER,
            "p_sft": SCORE,
            "best": SCORE,
            "greedy_before": SCORE,
            "greedy_after": SCORE,
            "curve": [{"x": NUMBER, "score": SCORE}],
        }
    ],
    "selector": {
        "chosen": TEXT,
        "ranking": [{"name": TEXT, "min_val_loss": NUMBER, "recommended_step": NUMBER, "recommended_regime": TEXT}],
    },
    "environment": {"command": TEXT, "device": TEXT, "versions": {}},
    "elapsed_s": {},
}
RUNS = [{"algo": TEXT, "start": TEXT, "seed": NUMBER, "x_sft": NUMBER, "curve": [{"x": NUMBER, "score": SCORE}]}]


def check(report: Any) -> None:
    """Raises ValueError that names the place."""
    compare(report, SHAPE, "")
    if report.get("paradigm_runs"):  # there is none without --paradigms
        compare(report["paradigm_runs"], RUNS, "paradigm_runs")
    compare(report.get("problems", report["flags"].get("test")), COUNT, "problems")
    starts = [(branch["dataset"], branch["sft_step"]) for branch in report["branches"]]
    for i, start in enumerate(starts):
        if start in starts[:i]:
            raise ValueError(f"report: two branches start at step {start[1]} of {start[0]}")
    ranking = report["selector"]["ranking"]
    for row in ranking:
        if (row["name"], row["recommended_step"]) not in starts:
            place = f"step {row['recommended_step']} of {row['name']}"
            raise ValueError(f"report: the selector starts RL at {place}, and no branch does")
    if report["selector"]["chosen"] not in [row["name"] for row in ranking]:
        raise ValueError(f"report: selector.chosen is {report['selector']['chosen']!r}, which selector.ranking lacks")


def compare(value: Any, shape: Any, place: str) -> None:
    """Raises ValueError unless the value has the shape: a dict with these keys, a list of such, or one of the kinds."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"report: {place or 'the whole'} should be an object")
        for key, inner in shape.items():
            inside = f"{place}.{key}" if place else key
            if key not in value:
                raise ValueError(f"report: no {inside}: a report.json of another version? Run the pipeline again")
            compare(value[key], inner, inside)
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"report: {place} should be a list that is not empty")
        for i, entry in enumerate(value):
            compare(entry, shape[0], f"{place}[{i}]")
    elif not is_a(value, shape):
        raise ValueError(f"report: {place} is {value!r:.40}, should be {shape}")


def is_a(value: Any, kind: str) -> bool:
    if kind == TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return {NUMBER: True, SCORE: 0 <= value <= 1, COUNT: value >= 1 and value == int(value)}[kind]
