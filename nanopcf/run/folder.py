"""Run folders: config.json, metrics.jsonl, checkpoints/step-N/. Each holds one run, and a process locks it.

The order of the data and the sampling depend on (seed, step) alone. So besides its weights a resumed run needs the
optimizer's state and the step, but no state of a random number generator.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from nanopcf.run import parallel
from nanopcf.run.config import flag
from nanopcf.run.files import read_json, set_aside, strict, write_json, write_text

FINGERPRINTS = "fingerprints"  # in config.json, beside the settings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def open_run(out: str | Path, config: object, resume: bool, *, free: tuple[str, ...] = ()) -> Iterator[Path]:
    """Make or re-enter a run folder, and lock it inside the block.

    A resumed run must have the same settings, except for the fields named in `free` (device, threads ...), and the
    files that they name must have the same content. Raises ValueError when the folder holds a run and resume is off,
    when it holds a run with other settings or other data, or when another process works in it.
    """
    out = Path(out)
    if parallel.rank() > 0:
        parallel.wait()  # rank 0 opens it for all
        yield out
        return
    with lock(out):
        settings = {k: v for k, v in as_saved(asdict(config)).items() if k != "resume"}
        path, now = out / "config.json", fingerprints(settings)
        if not path.exists():
            write_json(path, settings | {FINGERPRINTS: now})
        elif not resume:
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        # A setting that was unknown when the run began has its default.
        saved = as_saved({f.name: f.default for f in fields(config) if f.default is not MISSING}) | read_json(path)
        for k in settings:
            if saved.get(k) != settings[k] and k not in free:
                was_and_is = f"{flag(k)} was {saved.get(k)!r}, is {settings[k]!r}"
                raise ValueError(f"{out} holds a run of another config: {was_and_is}; choose another --out")
        for file, was in saved.get(FINGERPRINTS, {}).items():  # older runs have none
            if now.get(file) != was:
                raise ValueError(f"{file} has changed since the run in {out} began; choose another --out")
        write_json(path, saved | settings)  # with the free ones as they are now
        parallel.wait()
        yield out


def as_saved(settings: dict) -> dict:
    """The settings as config.json gives them back: tuples are lists there."""
    return json.loads(json.dumps(settings))


def fingerprints(settings: dict) -> dict[str, str]:
    """File -> "bytes:sha256" of its content, for each file that a setting names. Folders, such as models, are left out.

    Raises OSError when one cannot be read.
    """
    values = [item for value in settings.values() for item in (value if isinstance(value, list) else [value])]
    found = {}
    for name in values:
        if isinstance(name, str) and os.path.isfile(name):
            with open(name, "rb") as file:
                found[name] = f"{os.fstat(file.fileno()).st_size}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return found


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Make a run folder if there is none, and keep other processes out of it inside the block.

    The operating system releases the lock when its owner dies, however that happens, so no old lock stays behind.
    Raises ValueError with the process that works there, or when the folder holds something that is not a run.
    """
    path = out / "lock"
    if out.is_dir() and any(out.iterdir()) and not (path.exists() or (out / "config.json").exists()):
        raise ValueError(f"{out} is not empty and not a run folder; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    follow_no_link = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, follow_no_link, 0o644), "r+", encoding="utf-8", errors="replace") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise ValueError(f"{out}: at work in it is {owner}; wait for its end, or choose another --out") from error
        except OSError:  # a file system that has no locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


class Metrics:
    """Appends to metrics.jsonl, one JSON object per line. A resumed run first drops the steps that it repeats."""

    def __init__(self, folder: Path, from_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if parallel.rank() > 0:
            return
        rows = read_metrics(self.path) if self.path.exists() else []
        kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= from_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self, column: str) -> list[dict]:
        """The rows that have this column, by step."""
        return [row for row in read_metrics(self.path) if column in row]

    def log(self, **row: object) -> None:
        if parallel.rank() > 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict(row)) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The JSON objects in a file that is written line by line. A kill may cut the last: the first bad line ends it."""
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
    """(step, folder) of every complete checkpoint of a run, by step."""
    steps = [(path.name.removeprefix("step-"), path) for path in (out / "checkpoints").glob("step-*")]
    return sorted((int(step), path) for step, path in steps if step.isdigit())  # not step-3.tmp


def prune(out: Path, keep: int, goodness: dict[int, float]) -> None:
    """Remove the checkpoints of a run except the newest `keep` and the best one; with keep=0 remove none.

    goodness: step -> a number, higher is better. A checkpoint without one cannot be the best.
    """
    saved = checkpoints(out)
    best = max((step for step, _ in saved if step in goodness), key=goodness.get, default=None)
    for step, folder in saved[:-keep] if keep else []:
        if step != best:
            shutil.rmtree(set_aside(folder))
