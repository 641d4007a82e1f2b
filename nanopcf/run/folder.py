"""Run folders: config.json, metrics.jsonl, checkpoints/step-N/. One config each, locked while a process is at work.

The order of the data and the sampling are functions of (seed, step), so what a resumed run needs besides its weights is
the optimizer's state and the step: no state of a random number generator.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nanopcf.run import parallel
from nanopcf.run.config import flag
from nanopcf.run.files import read_json, set_aside, write_json, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def open_run(out: str | Path, config: object, resume: bool, *, free: tuple[str, ...] = ()) -> Iterator[Path]:
    """Make or re-enter the run folder, and hold its lock. Fields named in `free` may differ on resume (device, threads ...).

    Raises ValueError when the folder holds a run and resume is off, holds a run of another config, or when another
    process is at work in it.
    """
    out = Path(out)
    if parallel.rank() > 0:
        parallel.wait()  # rank 0 opens it
        yield out
        return
    with lock(out):
        now = {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in ("resume", *free)}
        path = out / "config.json"
        then = read_json(path) if path.exists() else now
        if path.exists() and not resume:
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        for k in now:
            if then.get(k) != now[k]:
                raise ValueError(
                    f"{out} holds a run of another config: {flag(k)} was {then.get(k)!r}, is {now[k]!r}; choose another --out"
                )
        if not path.exists():
            write_json(path, now)
        parallel.wait()
        yield out


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep other processes out of a run folder, made here if need be.

    The system lets go of a lock when its owner dies: none is ever stale.
    Raises ValueError naming the process that is at work there, or when the folder holds something that is no run.
    """
    file = out / "lock"
    if out.is_dir() and any(out.iterdir()) and not (file.exists() or (out / "config.json").exists()):
        raise ValueError(f"{out} is not empty and not a run folder; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    follow_no_link = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(file, follow_no_link, 0o644), "r+", encoding="utf-8", errors="replace") as held:
        try:
            if fcntl is not None:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held.seek(0)
            owner = held.read(200).strip() or "another process"
            raise ValueError(f"{out}: at work in it is {owner}; wait for its end, or choose another --out") from error
        except OSError:  # a file system without locks
            pass
        held.truncate(0)
        held.write(f"process {os.getpid()} on {platform.node()}")
        held.flush()
        yield


class Metrics:
    """Appends one JSON object a line to metrics.jsonl; on resume drops the lines of steps that will be run again."""

    def __init__(self, folder: Path, from_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if parallel.rank() > 0:
            return
        there = read_metrics(self.path) if self.path.exists() else []
        rows = [r for r in there if isinstance(r.get("step"), int) and r["step"] <= from_step]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in rows))

    def rows(self, column: str) -> list[dict]:
        """Those that hold the column, by step."""
        return [r for r in read_metrics(self.path) if column in r]

    def log(self, **row: object) -> None:
        if parallel.rank() > 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """Objects of a JSONL file that is written line by line, up to a line that isn't one: the last, cut off by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint of a run, by step."""
    found = [(int(p.name[5:]), p) for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found)


def prune(out: Path, keep: int, goodness: dict[int, float]) -> None:
    """Remove all checkpoints of a run but the newest `keep` and the best of those whose goodness is known. keep=0: none."""
    there = checkpoints(out)
    best = max((step for step, _ in there if step in goodness), key=goodness.get, default=None)
    for step, folder in there[:-keep] if keep else []:
        if step != best:
            shutil.rmtree(set_aside(folder))
