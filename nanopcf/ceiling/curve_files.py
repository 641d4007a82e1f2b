"""Reading CURVES.csv, and the table of the paper's settings.

The columns of CURVES.csv are dataset, sft_step, x_sft, stage, x and score. A branch is (dataset, sft_step). Its one row
with stage `sft` holds P_sft, and its rows with stage `rl` hold the curve: x is compute within RL, increasing, in any
unit (the paper's is exaFLOPs). The scores of a file are all fractions or all percentages.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

COLUMNS = ["dataset", "sft_step", "x_sft", "stage", "x", "score"]

Key = tuple[str, int]  # dataset, sft_step
BASE: Key = ("", 0)  # settings of pure RL: step 0 is the base model, whatever the name of the data set


@dataclass
class Branch:
    x_sft: float
    row: int  # the row of the file where the branch starts
    p_sft: float | None = None
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


def branch_name(key: Key) -> str:
    return f"branch {key[0]}, step {key[1]}"


# ---- the curves ----


def read_curves(path: str | Path) -> tuple[dict[Key, Branch], list[str]]:
    """The branches without an error, and one sentence for each error. Raises ValueError, OSError for a bad file."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        try:
            missing = [column for column in COLUMNS if column not in (rows.fieldnames or [])]
            if missing:
                raise ValueError(f"{path}: row 1: columns missing: {', '.join(missing)}")
            branches, errors = read_rows(rows, path)
        except (csv.Error, UnicodeError) as error:
            raise ValueError(f"{path}: row {rows.line_num + 1}: not CSV in UTF-8 ({error})") from error
    # A branch of fractions in a file of percentages is wrong by a factor of 100.
    highest = {key: max([*branch.y, branch.p_sft or 0.0]) for key, branch in branches.items()}
    if any(score > 1 for score in highest.values()):
        for key, score in highest.items():
            if 0 < score <= 1:
                branch = branches.pop(key)
                errors.append(
                    f"{path}: row {branch.row}: {branch_name(key)}: scores up to {score:g} look like fractions, "
                    "while the file has percentages"
                )
    return branches, errors


def read_rows(rows: csv.DictReader, path: str | Path) -> tuple[dict[Key, Branch], list[str]]:
    """The branches without a wrong row, and one sentence for each wrong row. Raises ValueError if there are no rows."""
    branches: dict[Key, Branch] = {}
    errors: list[str] = []
    bad: set[Key | None] = set()
    for row in rows:
        key = None
        try:
            key = row["dataset"], whole_number(row["sft_step"])
            add_row(row, branches.setdefault(key, Branch(number(row, "x_sft"), rows.line_num)))
        except ValueError as error:
            errors.append(f"{path}: row {rows.line_num}: {error}")
            bad.add(key)
    if not branches and not errors:
        raise ValueError(f"{path}: row 1: no rows below the header")
    return {key: branch for key, branch in branches.items() if key not in bad}, errors


def add_row(row: dict[str, str], branch: Branch) -> None:
    """Adds one row to its branch. Raises ValueError that says what is wrong with it."""
    x, score = number(row, "x"), number(row, "score")
    if x < 0:
        raise ValueError(f"x is {x:g}: compute can't be negative")
    if not 0 <= score <= 100:
        raise ValueError(f"score is {score:g}: must lie in [0, 1] or [0, 100]")
    if row["stage"] == "sft":
        if branch.p_sft is not None:
            raise ValueError("a second sft row for this branch")
        branch.p_sft = score
    elif row["stage"] == "rl":
        if branch.x and x <= branch.x[-1]:
            raise ValueError(f"x is {x:g} after {branch.x[-1]:g}: it must increase within a branch")
        branch.x.append(x)
        branch.y.append(score)
    else:
        raise ValueError(f"stage is {row['stage']!r}: must be sft or rl")


def number(row: dict[str, str | None], column: str) -> float:
    try:
        value = float(row[column] or "nothing")
    except ValueError:
        raise ValueError(f"{column} is {row[column]!r}: must be a number") from None
    if not np.isfinite(value):
        raise ValueError(f"{column} is {value}: must be finite")
    return value


def whole_number(text: str | None) -> int:
    try:
        return int(text or "nothing")
    except ValueError:
        raise ValueError(f"sft_step is {text!r}: must be a whole number") from None


# ---- the paper's settings ----


def read_settings(path: str | Path) -> dict[Key, dict]:
    """The paper's choices by hand for each branch, as options of `fit_paper`. Raises ValueError, OSError."""
    settings: dict[Key, dict] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        for i, row in enumerate(csv.DictReader(file), start=2):
            try:
                step = int(row["sft_step"])
                settings[(row["dataset"], step) if step else BASE] = paper_options(row)
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{path}: row {i}: not the settings of a branch ({error})") from error
    return settings


def paper_options(row: dict[str, str]) -> dict:
    lts_alpha, last = setting(row, "lts_alpha"), setting(row, "train_end")
    return dict(
        tau=float(setting(row, "outlier_threshold") or 2.5),
        lts_alpha=float(lts_alpha) if lts_alpha else None,
        first=int(setting(row, "train_start") or 0),
        last=int(last) if last else None,
        free_offset=bool(float(setting(row, "free_offset") or 0)),
    )


def setting(row: dict[str, str], column: str) -> str:
    """A cell of the table, "" if it is empty. What the paper released stands in a column `released_...`."""
    released = f"released_{column}"
    return (row[released] if released in row else row.get(column)) or ""
