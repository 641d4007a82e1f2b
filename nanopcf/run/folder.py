"""Run folders: config.json, metrics.jsonl, checkpoints/step-N/. Each holds one run, and a process locks it.

The order of the data and the sampling depend on (seed, step) alone. So besides its weights a resumed run needs the
optimizer's state and the step, but no state of a random number generator. What a run chose by looking at the machine
(threads, slots) is saved too, because it changes how sums are rounded.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from nanopcf.run import parallel
from nanopcf.run.config import flag
from nanopcf.run.files import append_text, named, read_json, set_aside, strict, write_bytes, write_json

FINGERPRINTS = "fingerprints"  # in config.json, beside the settings
WRITTEN_BY = "written_by"  # also there: the mark that the folder is ours, and whose
FREE = ("device", "threads", "keep", "shard_optimizer")  # settings of training that may change when it is resumed
NOT_THE_MODEL = ("optimizer.safetensors", "state.json", "metrics.json")  # files that only a checkpoint has

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- opening ----


@contextmanager
def open_run(out: str | Path, config: object, resume: bool, *, free: tuple[str, ...] = ()) -> Iterator[Path]:
    """Make or re-enter a run folder, and lock it inside the block.

    A resumed run must have the same settings, except for --out and the fields named in `free` (device, threads ...).
    The files and the model that they name must have the same content, wherever they lie now. Raises ValueError when
    the folder holds a run and resume is off, when it holds a run with other settings or other data, or when another
    process works in it.
    """
    out = Path(out)
    if parallel.rank() > 0:
        parallel.wait()  # rank 0 opens it for all
        yield out
        return
    with lock(out, config):
        settings = {k: v for k, v in as_saved(asdict(config)).items() if k != "resume"}
        path, now = out / "config.json", fingerprints(settings)
        if not path.exists():
            write_json(path, settings | {FINGERPRINTS: now, WRITTEN_BY: mark(config)})
        elif not resume:
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        # A setting that was unknown when the run began has its default.
        saved = as_saved({f.name: f.default for f in fields(config) if f.default is not MISSING}) | read_json(path)
        check_settings(out, {k: v for k, v in settings.items() if k not in ("out", *free)}, now, saved)
        # With the free settings as they are now, and the files where they lie now.
        write_json(path, saved | settings | {FINGERPRINTS: now, WRITTEN_BY: mark(config)})
        clear_up(out)
        parallel.wait()
        yield out


@contextmanager
def open_changing_run(out: Path, config: object) -> Iterator[None]:
    """The same for a run whose settings may change when it is resumed: config.json holds the newest ones."""
    with lock(out, config):
        path = out / "config.json"
        if path.exists() and not config.resume:
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        write_json(path, asdict(config) | {WRITTEN_BY: mark(config)})
        yield


def check_settings(out: Path, settings: dict, now: dict[str, str], saved: dict) -> None:
    """Raises ValueError unless the settings are the saved ones, and the files that they name have the same content.

    now: the fingerprints of these files. The saved settings hold those of the run's start; older runs have none.
    """
    before = saved.get(FINGERPRINTS, {})
    for name, value in settings.items():
        was = saved.get(name)
        many = isinstance(was, list) and isinstance(value, list) and len(was) == len(value)
        for one, other in zip(was, value, strict=True) if many else [(was, value)]:
            content = before.get(one) if isinstance(one, str) else None
            if content and content == now.get(other):
                continue  # it may have another name now, or lie elsewhere
            same_place = one == other or (isinstance(other, str) and isinstance(one, str) and is_same(one, other))
            if not same_place:
                was_and_is = f"{flag(name)} was {was!r}, is {value!r}"
                raise ValueError(f"{out} holds a run of another config: {was_and_is}; choose another --out")
            if content:
                raise ValueError(f"{other} has changed since the run in {out} began; choose another --out")


def is_same(one: str, other: str) -> bool:
    """Do two paths lead to the same file or folder?"""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def as_saved(settings: dict) -> dict:
    """The settings as config.json gives them back: tuples are lists there."""
    return json.loads(json.dumps(settings))


def fingerprints(settings: dict) -> dict[str, str]:
    """Name -> `fingerprint` of the content, for each file that a setting names, and for the folder of a model.

    Raises OSError when one cannot be read.
    """
    values = [item for value in settings.values() for item in (value if isinstance(value, list) else [value])]
    found = {name: fingerprint(Path(name)) for name in values if isinstance(name, str) and os.path.isfile(name)}
    model = settings.get("model")
    if isinstance(model, str) and os.path.isfile(os.path.join(model, "config.json")):
        parts = [path for path in sorted(Path(model).iterdir()) if path.suffix in (".json", ".jinja", ".safetensors")]
        prints = "".join(f"{path.name} {fingerprint(path)}\n" for path in parts if path.name not in NOT_THE_MODEL)
        found[model] = hashlib.sha256(prints.encode()).hexdigest()
    return found


def fingerprint(path: Path) -> str:
    """ "bytes:sha256" of a file. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return f"{os.fstat(file.fileno()).st_size}:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def mark(config: object) -> str:
    return f"nanopcf {type(config).__name__}"


def check_is_run(out: Path, config: object) -> None:
    """Raises ValueError unless the folder is new, or empty, or was made by a command with this kind of config."""
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if "config.json" in found:
        saved = read_json(out / "config.json")
        known = {field.name for field in fields(config)}
        # Older versions wrote no mark. A config.json that is not ours has hardly one of our settings.
        is_older = WRITTEN_BY not in saved and len(known & saved.keys()) > len(known) / 2
        if is_older or saved.get(WRITTEN_BY) == mark(config):
            return
        if str(saved.get(WRITTEN_BY)).startswith("nanopcf "):
            raise ValueError(f"{out} holds the run of another command; choose another --out")
    elif found <= {"lock", "config.json.tmp"}:  # a run that was killed as it began leaves these
        path = out / "lock"
        if not path.is_file() or path.read_bytes()[:8] in (b"", b"process "):
            return
    raise ValueError(f"{out} is not empty and not a run folder; choose another --out")


# ---- the lock ----

locked: dict[str, tuple[int, int]] = {}  # the run folders of this process: absolute path -> (device, inode)


@contextmanager
def lock(out: Path, config: object) -> Iterator[None]:
    """Make a run folder if there is none, and keep other processes out of it inside the block.

    Locked are the folder itself and the file `lock` in it, which names the owner and holds where a file system cannot
    lock folders. The operating system releases both when the owner dies, however that happens, so no old lock stays
    behind. Raises ValueError with the process that works there, or when the folder holds something that is not a run.
    """
    check_is_run(out, config)
    out.mkdir(parents=True, exist_ok=True)
    follow_no_link = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with ExitStack() as stack:
        descriptor = os.open(out / "lock", follow_no_link, 0o644)
        stack.callback(os.close, descriptor)
        if fcntl is not None:
            folder = os.open(out, os.O_RDONLY)
            stack.callback(os.close, folder)
            for held in (folder, descriptor):
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                    raise ValueError(
                        f"{out}: at work in it is {owner}; wait for its end, or choose another --out"
                    ) from error
                except OSError:  # a file system that has no locks
                    pass
        with named(out / "lock"):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        name = os.path.abspath(out)
        locked[name] = identity(out)
        stack.callback(locked.pop, name)
        yield


def identity(out: Path) -> tuple[int, int]:
    stat = os.stat(out)
    return stat.st_dev, stat.st_ino


def check_still_ours(out: Path) -> None:
    """Raises OSError when a run folder is gone, and ValueError when its name leads to another folder by now.

    A run asks before each write: in a folder that was made anew another process may be at work.
    """
    known = locked.get(os.path.abspath(out))
    if known and identity(out) != known:
        raise ValueError(f"{out} is another folder than when the run began; move it back, and --resume goes on")


# ---- what is kept ----


def kept(out: str | Path, name: str, choose: Callable[[], int]) -> int:
    """choose(), or what it gave an earlier start of this run, which chosen.json keeps; without a folder choose()."""
    if not out:
        return choose()
    path = Path(out) / "chosen.json"
    saved = read_json(path) if path.exists() else {}
    if name not in saved:
        saved[name] = choose()
        write_json(path, saved)
    if type(saved[name]) is not int or saved[name] < 1:
        raise ValueError(f"{path}: {name} is {saved[name]!r}, expected a number from 1 on")
    return saved[name]


class Metrics:
    """Appends to metrics.jsonl, one JSON object per line. A resumed run first drops the steps that it repeats.

    Raises ValueError when lines of earlier steps are lost or changed: without them the curve would have a hole.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "metrics.jsonl"
        if parallel.rank() > 0:
            return
        content, saved = b"", checkpoints(out)
        if saved:
            step, newest = saved[-1]
            if (newest / "metrics.json").exists():
                was, content = read_json(newest / "metrics.json"), self.path.read_bytes()
                content = content[: was["bytes"]] if isinstance(was.get("bytes"), int) else b""
                if digest(content) != was:
                    raise ValueError(f"{self.path}: lines up to step {step} are lost or changed; put them back")
            else:  # a checkpoint of an older version
                rows = read_metrics(self.path)
                rows = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
                content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        write_bytes(self.path, content)

    def rows(self, column: str) -> list[dict]:
        """The rows that have this column, by step."""
        return [row for row in read_metrics(self.path) if column in row]

    def log(self, **row: object) -> None:
        if parallel.rank() == 0:
            check_still_ours(self.out)
            append_text(self.path, json.dumps(strict(row)) + "\n")


def digest(content: bytes) -> dict:
    """What a checkpoint keeps of the lines in metrics.jsonl that came before it."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_metrics(path: Path) -> list[dict]:
    """The JSON objects in a file that is written line by line. A kill may cut the last line, which is left out then.

    Raises ValueError that names the line when another one is damaged.
    """
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [json_object(line) for line in lines]
    if None in rows:
        raise ValueError(f"{path}, line {rows.index(None) + 1}: damaged, expected a JSON object")
    return rows + [row for row in [json_object(last)] if row is not None]


def json_object(line: str) -> dict | None:
    """The JSON object in a line, or None if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint of a run, by step. Raises OSError when they can't be listed."""
    folder = out / "checkpoints"
    if not os.path.lexists(folder):
        return []
    # A link that leads nowhere raises here. A run that took it for "no checkpoints" would begin again.
    steps = [(path.name.removeprefix("step-"), path) for path in folder.iterdir() if path.name.startswith("step-")]
    return sorted((int(step), path) for step, path in steps if step.isdigit())  # not step-3.tmp


def clear_up(out: Path) -> None:
    """Put right what a kill left of a checkpoint: step-3.tmp, half-written, and step-3.old, set aside.

    Removed are those that were replaced or pruned. The newest one was set aside to be replaced, and comes back.
    """
    newest = max((step for step, _ in checkpoints(out)), default=-1)
    left = [path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+\.(old|tmp)", path.name)]
    for path in left:
        if path.suffix == ".old" and int(path.stem.removeprefix("step-")) > newest:
            os.replace(path, path.with_suffix(""))
        else:
            shutil.rmtree(path)


def prune(out: Path, keep: int, goodness: dict[int, float]) -> None:
    """Remove the checkpoints of a run except the newest `keep` and the best one; with keep=0 remove none.

    goodness: step -> a number, higher is better. A checkpoint without one cannot be the best.
    """
    saved = checkpoints(out)
    best = max((step for step, _ in saved if step in goodness), key=goodness.get, default=None)
    for step, folder in saved[:-keep] if keep else []:
        if step != best:
            shutil.rmtree(set_aside(folder))
