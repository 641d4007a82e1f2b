"""Run folders: config.json, metrics.jsonl, checkpoints/step-N/. Written atomically, resumed exactly.

A folder belongs to one config: starting another one in it is an error. Files are written under a temporary name and
renamed, so a reader (or a resumed run) only ever sees whole ones. Order of data and sampling are functions of
(seed, step), so what a resumed run needs besides weights is the optimizer's state and the step: no RNG state.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from nanopcf import parallel

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Out of the system's buffers, so that a renamed file is a whole one after a power cut too."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder by write(folder), whole or not at all. An older one of the same name is replaced."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for file in temporary.iterdir():
            flush(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    older = path.with_name(
        path.name + ".old"
    )  # moved, not deleted: a kill here leaves a whole one of some name
    shutil.rmtree(older, ignore_errors=True)
    if path.exists():
        os.replace(path, older)
    os.replace(temporary, path)
    shutil.rmtree(older, ignore_errors=True)


def open_run(out: str | Path, config: object, resume: bool, *, free: tuple[str, ...] = ()) -> Path:
    """Make or re-enter the run folder. Fields named in `free` may differ on resume (device, threads ...).

    Raises ValueError when the folder holds a run and resume is off, or holds a run of another config.
    """
    out = Path(out)
    if parallel.rank() > 0:
        parallel.wait()  # rank 0 opens it
        return out
    now = {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in ("resume", *free)}
    path = out / "config.json"
    if path.exists():
        if not resume:
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        then = read_json(path)
        changed = [k for k in now if then.get(k) != now[k]]
        if changed:
            k = changed[0]
            raise ValueError(
                f"{out} holds a run of another config: --{k.replace('_', '-')} was {then.get(k)!r}, is {now[k]!r}; choose another --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and not a run folder; choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    parallel.wait()
    return out


@contextmanager
def at_work(out: Path) -> Iterator[Callable[[], int]]:
    """While a run is at work in its folder: no other process may be, and it can be stopped without loss.

    The first SIGINT or SIGTERM is only noted, so that the loop can save and leave; a second one ends the process at once.
    Yields asked() -> the number of the signal, or 0 (of any process, where there are several).
    Raises ValueError naming the process that is at work there already.
    """
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        if noted:
            os._exit(128 + number)
        noted.append(number)
        announce("\nstopping after this step; once more to stop at once, unsaved")

    with lock(out):
        before = {}
        if threading.current_thread() is threading.main_thread():  # signals go to the main thread alone
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield lambda: max(parallel.gathered([noted[0] if noted else 0]))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """The system lets go of a lock when its owner dies: none is ever stale."""
    if fcntl is None or parallel.rank() > 0:
        yield
        return
    with (out / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"{out}: at work in it is {owner}; wait for its end, or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def leave(out: Path, step: int, number: int) -> None:
    """The end of an interrupted run, after its checkpoint. Raises SystemExit(128 + number): 130 or 143."""
    announce(
        f"{out}: stopped by {signal.Signals(number).name} after step {step}, saved; the same command with --resume goes on"
    )
    raise SystemExit(128 + number)


class Metrics:
    """Appends one JSON object a line to metrics.jsonl; on resume drops the lines of steps that will be run again."""

    def __init__(self, folder: Path, from_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if parallel.rank() > 0:
            return
        rows = [r for r in read_metrics(self.path) if r["step"] <= from_step] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in rows))

    def log(self, **row: object) -> None:
        if parallel.rank() > 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint of a run, by step."""
    found = [(int(p.name[5:]), p) for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found)


def choose_device(name: str) -> torch.device:
    """auto -> cuda, mps or cpu, whichever is there first. Raises ValueError when the named one isn't."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(n for n, ok in there.items() if ok)
    if name not in there:
        raise ValueError(f"--device {name}: expected auto, cpu, cuda or mps")
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this build of torch has none; try --device cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto -> bfloat16 on CUDA, float32 elsewhere (CPUs emulate bfloat16). Raises ValueError on another name."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {name!r}")
    return getattr(torch, name)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int, parameters: int) -> int:
    """Set torch's CPU threads, and return how many: 0 asks for one below 20 million parameters, for every core above.

    Small models spend their time between operations, where a second thread on a busy machine costs up to 100 times.
    """
    threads = threads or (1 if parameters < 20e6 else cores())
    torch.set_num_threads(threads)
    return threads


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now; 4 GiB where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30


def try_out(what: str, work: Callable[[], None], device: torch.device) -> None:
    """Run work(), the heaviest step of a run, and say what it took. Raises ValueError when memory doesn't hold it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            f"{what}: doesn't fit in memory; fewer --micro-rows or --slots, or --recompute, need less"
        ) from error
    if device.type == "cuda":
        peak, there = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        memory = f"peak {peak / 2**30:.2f} of {there / 2**30:.1f} GiB"
    elif resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = (
            f"the process reached {peak / 2**30:.2f} GiB, {free_memory(device) / 2**30:.1f} GiB are free now"
        )
    else:
        memory = "memory isn't known here"
    announce(f"{what}: fits; {memory}; {time.perf_counter() - began:.2f} s")


def environment(device: torch.device) -> dict:
    """What a number must be quoted with: command, versions, device, commit."""
    root = Path(__file__).resolve().parents[1]
    try:
        git = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        commit = git.stdout.strip() or "unknown"
    except OSError:  # no git here
        commit = "unknown"
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"{device.type} ({name})",
        "commit": commit,
    }


def header(device: torch.device, threads: int, dtype: torch.dtype = torch.float32) -> str:
    """The first line of a run's log."""
    e = environment(device)
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    return f"{e['command']}\n{versions}, commit {e['commit']}; {e['device']}, {str(dtype).removeprefix('torch.')}, {threads} thread(s)"


def announce(text: str) -> None:
    if parallel.rank() == 0:
        print(text, file=sys.stderr, flush=True)
