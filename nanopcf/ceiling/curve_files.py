"""Reading CURVES.csv, and the table of the paper's settings.

The columns of CURVES.csv are dataset, sft_step, x_sft, stage, x and score. A branch is (dataset, sft_step). Its one row
with stage `sft` holds P_sft, and its rows with stage `rl` hold the curve: x is compute within RL, increasing, in any
unit (the paper's is exaFLOPs). The scores of a file are all fractions or all percentages.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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

MOST_POINTS = 300  # of a curve: the time of a fit grows with their square, and 300 take three seconds


def averaged(branch: Branch) -> Branch:
    """The branch with at most MOST_POINTS points, each the mean of as many neighbours."""
    places = np.array_split(np.arange(len(branch.x)), MOST_POINTS)
    x, y = ([float(np.mean(values[p[0] : p[-1] + 1])) for p in places] for values in (branch.x, branch.y))
    return replace(branch, x=x, y=y)


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
        rows = csv.DictReader(file)
        try:
            if not {"dataset", "sft_step"} <= set(rows.fieldnames or []):
                raise ValueError("columns missing: dataset and sft_step say which branch a row is for")
            for row in rows:
                step = whole_number(row["sft_step"])
                settings[(row["dataset"], step) if step else BASE] = paper_options(row)
        except (csv.Error, UnicodeError) as error:
            raise ValueError(f"{path}: row {rows.line_num + 1}: not CSV in UTF-8 ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path}: row {rows.line_num}: {error}") from error
    return settings


def paper_options(row: dict[str, str]) -> dict:
    """Raises ValueError that names the column of a value that cannot be one."""
    tau = option(row, "outlier_threshold", float, lambda tau: tau > 0, "a number above 0")
    first = option(row, "train_start", int, lambda first: first >= 0, "a whole number from 0")
    return dict(
        tau=2.5 if tau is None else tau,
        lts_alpha=option(row, "lts_alpha", float, lambda share: 0 < share <= 1, "a share above 0, and at most 1"),
        first=first or 0,
        last=option(row, "train_end", int, lambda last: last >= 0, "a whole number from 0"),
        free_offset=bool(option(row, "free_offset", float, lambda flag: flag in (0, 1), "0 or 1")),
    )


def option(
    row: dict[str, str], column: str, kind: type, holds: Callable[[float], bool], words: str
) -> int | float | None:
    """A cell of the table, None if it is empty. What the paper released stands in a column `released_...`."""
    released = f"released_{column}"
    text = (row[released] if released in row else row.get(column)) or ""
    if not text:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not holds(value):
        raise ValueError(f"{column} is {text!r}: must be {words}")
    return value
