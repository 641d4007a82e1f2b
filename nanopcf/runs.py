"""Run folders: config.json, metrics.jsonl, checkpoints/step-N/. Written atomically, resumed exactly.

A folder belongs to one config: starting another one in it is an error. Files are written under a temporary name and
renamed, so a reader (or a resumed run) only ever sees whole ones. Order of data and sampling are functions of
(seed, step), so what a resumed run needs besides weights is the optimizer's state and the step: no RNG state.
"""

import json
import math
import multiprocessing
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
from tqdm import tqdm

from kernels.products import ONEDNN
from nanopcf import parallel
from nanopcf.config import flag

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link to a file elsewhere
    temporary.write_bytes(content)
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
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
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
    older = set_aside(path)
    os.replace(temporary, path)
    shutil.rmtree(older, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Under another name, before it is removed: one that a kill leaves half removed must not pass for a whole one."""
    older = folder.with_name(folder.name + ".old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    return older


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
            raise ValueError(
                f"{out}: at work in it is {owner}; wait for its end, or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        held.truncate(0)
        held.write(f"process {os.getpid()} on {platform.node()}")
        held.flush()
        yield


class SecondSignal:
    """Called in a handler: is this the second signal? One at the heels of the first (0.1 s) is the first again:
    `timeout` and schedulers send theirs to a process and once more to its group."""

    first = math.inf

    def __call__(self) -> bool:
        self.first = min(self.first, time.monotonic())
        return time.monotonic() - self.first > 0.1


@contextmanager
def handling(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """handler(number, frame) for these signals inside the block; nothing outside the main thread, which alone gets them."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handler) for n in numbers if in_main}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """The first SIGINT or SIGTERM is only noted, so that a loop can save and leave; a second one ends the process at once.

    Yields asked() -> the number of the signal, or 0 (of any process, where there are several).
    """
    noted: list[int] = []
    again = SecondSignal()
    # in a worker of a pipeline the parent decides when to end at once
    worker = multiprocessing.parent_process() is not None

    def note(number: int, _frame: object) -> None:
        if again() and not worker:
            os._exit(128 + number)
        if not noted:
            noted.append(number)
            announce("\nstopping after this step; once more to stop at once, unsaved")

    # Ctrl-C is passed on to a worker as SIGTERM
    with handling(note, signal.SIGTERM, *([] if worker else [signal.SIGINT])):
        yield lambda: max(parallel.gathered([noted[0] if noted else 0]))
    if worker and noted:  # it came too late for the loop: the worker is to end all the same
        raise SystemExit(128 + noted[0])


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


def bar(start: int, end: int, total: int, label: str) -> tqdm:
    """The steps from `start` to `end`, with a progress bar that says how far it is to `total`."""
    hidden = parallel.rank() > 0
    return tqdm(range(start, end), initial=start, total=total, desc=label, leave=False, mininterval=0.5, disable=hidden)  # fmt: skip


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
    if name == "cuda":
        # cuDNN's attention plans anew for every shape, which packed rows and generation have many of
        torch.backends.cuda.enable_cudnn_sdp(False)
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


def set_threads(threads: int, model: torch.nn.Module) -> int:
    """Set torch's CPU threads, and return how many. 0: on a CPU, as many as a probe of the model finds worth it.

    Small models spend their time between operations, where a second thread on a busy machine costs up to 100 times: the
    fewest threads are taken that come within a quarter of the fastest. Large products always gain: all cores.
    """
    parameters = model.parameter_count()
    elsewhere = model.head_weight.device.type != "cpu"
    if not threads and (elsewhere or parameters > 20e6 or cores() == 1):
        threads = cores()
    if not threads:
        length = min(40, model.config.max_length)
        rows = min(32, max(1, int(3e9 / (6 * parameters * length))))  # some tens of milliseconds
        tokens = torch.zeros(rows, length, dtype=torch.long)
        tried = sorted({2**i for i in range(cores().bit_length())} | {cores()})
        seconds = {t: step_seconds(model, tokens, t) for t in tried}
        threads = next(t for t in tried if seconds[t] <= 1.25 * min(seconds.values()))
    torch.set_num_threads(threads)
    return threads


def step_seconds(model: torch.nn.Module, tokens: torch.Tensor, threads: int) -> float:
    """Time of a forward and backward pass with so many threads: the best of three after one that isn't counted."""
    torch.set_num_threads(threads)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        model(tokens).sum().backward()
        times.append(time.perf_counter() - began)
    model.zero_grad()
    return min(times[1:])


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
    products = ", products by oneDNN" if ONEDNN and device.type == "cpu" else ""
    numbers = f"{str(dtype).removeprefix('torch.')}, {threads} thread(s){products}"
    return f"{e['command']}\n{versions}, commit {e['commit']}; {e['device']}, {numbers}"


def announce(text: str) -> None:
    if parallel.rank() == 0:
        print(text, file=sys.stderr, flush=True)
