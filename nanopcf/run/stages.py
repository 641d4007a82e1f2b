"""Stages of a pipeline: their results are cached in the run folder, and their jobs run in parallel worker processes.

The result of a stage is saved in NAME.json, with a key made of the settings that the stage reads and of the keys of all
stages before it. What the stage writes besides is in the folder NAME/. If a setting changes, the stage that reads it
and the stages after it run again, and no other. Nothing in this file is about the paper.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanopcf.run import files, log, signals
from nanopcf.run.folder import check_still_ours, fingerprints, open_changing_run, read_metrics
from nanopcf.run.machine import resource

# ---- the cache ----


class Stages:
    """The stages of one run folder, in their order. elapsed: seconds of each, earlier interrupted calls included."""

    def __init__(self, config: object, out: Path) -> None:
        self.config = config
        self.out = out
        self.key = ""
        self.elapsed: dict[str, float] = {}
        self.moved = {HERE: str(out)}  # paths in saved results -> where they are now

    def run(self, name: str, settings: str, work: Callable, *arguments: object) -> Any:
        """The value of work(config, folder, *arguments), or the saved value of an earlier call with an equal key.

        settings: the names of the config's fields that the stage reads, separated by spaces. The value is saved as
        JSON. If an earlier call was interrupted, work finds its folder as that call left it, and the training runs
        inside continue from their checkpoints. Raises ValueError if a file that a setting names has changed since then,
        or if the folder or the file of the stage is not from an earlier call: then nothing is removed.
        """
        check_still_ours(self.out)
        path, folder = self.out / f"{name}.json", self.out / name
        record = files.read_json(path) if path.exists() else {}
        if not {"key", "done"} <= record.keys() and (path.exists() or folder.exists()):
            stranger = path if path.exists() else folder
            raise ValueError(f"{stranger} is not of this run; move it away, or choose another --out")
        if record and not is_whole(record):
            raise ValueError(f"{path}: damaged; put it back, or remove it and {folder}, and --resume runs {name} again")
        values = {field: getattr(self.config, field) for field in settings.split()}
        data = fingerprints(values)  # of the files that the settings name
        # A file of the same content may lie elsewhere by now. The key goes on with the path that it had.
        paths = {content: path for path, content in record.get("data", {}).items()}
        as_named = {k: paths.get(data[v], v) if isinstance(v, str) and v in data else v for k, v in values.items()}
        self.moved |= {was: values[k] for k, was in as_named.items() if was != values[k]}
        self.key += json.dumps({name: as_named}, sort_keys=True)  # it grows: a stage depends on all stages before it
        if record.get("key") != self.key:
            if folder.exists():
                # If a kill interrupts the removal, what is left must not be taken for the stage of the old settings.
                files.write_json(path, with_sum({"key": "", "done": False}))
                shutil.rmtree(folder)
            record = {"key": self.key, "data": data, "done": False, "elapsed_s": 0.0}
            files.write_json(path, with_sum(record))
        changed = [file for file, was in record.get("data", {}).items() if data.get(file, was) != was]
        if changed:
            raise ValueError(f"{changed[0]} has changed since the run in {self.out} began; choose another --out")
        if record["done"]:
            log.announce(f"{name}: kept from before")
        else:
            folder.mkdir(exist_ok=True)
            started = time.perf_counter()
            result = work(self.config, folder, *arguments)
            elapsed = record["elapsed_s"] + time.perf_counter() - started
            result = renamed(result, str(self.out), HERE)
            record |= {"done": True, "result": result, "elapsed_s": round(elapsed, 1)}
            check_still_ours(self.out)
            files.write_json(path, with_sum(record))
        self.elapsed[name] = record["elapsed_s"]
        result = record["result"]
        for was, now in self.moved.items():
            result = renamed(result, was, now)
        return result


def is_whole(record: dict) -> bool:
    """Is the record of a stage as `with_sum` gave it? Records of older versions have no sum."""
    if "sha256" in record:
        return record == with_sum(record)
    data = record.get("data", {})
    timed = isinstance(record.get("elapsed_s"), int | float) or not record["key"]
    ended = "result" in record or not record["done"]
    return timed and ended and isinstance(data, dict) and all(isinstance(value, str) for value in data.values())


def with_sum(record: dict) -> dict:
    """The record of a stage with the SHA-256 of all else in it."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


HERE = "{run folder}"  # in a saved result, so that a run folder can be moved


def renamed(value: Any, one: str, other: str) -> Any:
    """A result of a stage with a path renamed, wherever a string is that path or lies in it."""
    if isinstance(value, dict):
        return {key: renamed(item, one, other) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [renamed(item, one, other) for item in value]
    if isinstance(value, str) and (value == one or value.startswith(one + os.sep)):
        return other + value[len(one) :]
    return value


@contextmanager
def open_pipeline(out: Path, config: Any) -> Iterator[None]:
    """Inside the block the run folder is locked, and a signal ends the run so that --resume can go on."""
    with open_changing_run(out, config), resumable(out):
        yield


# ---- worker processes ----


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes for `run_parallel`. They start when the first jobs arrive.

    One pool serves all stages, because every new process spends seconds on importing torch.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork can hang once torch has started threads
    return ProcessPoolExecutor(workers, spawn, start_worker)


def start_worker() -> None:
    """Prepare a worker process: the parent alone decides when it ends.

    The terminal sends Ctrl-C, and its end, to parent and workers alike. The worker ignores them, since the parent sends
    SIGTERM to those workers that shall save and end. If the parent is killed and can send nothing, the worker ends by
    itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if signals.HANGUP:
        signal.signal(signals.HANGUP, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def do_job(log_file: Path, function: Callable, *arguments: object) -> object:
    """The value of function(*arguments), computed in a worker.

    Its messages go to log_file, because on the terminal they would tear the parent's progress bar apart. A job that was
    stopped raises SystemExit after it has saved. Then the whole worker ends, so that it does not take another job.
    """
    with log_file.open("a", encoding="utf-8", buffering=1) as file, redirect_stderr(file):
        try:
            return function(*arguments)
        except SystemExit as stopped:
            os._exit(stopped.code)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # so that the parent and other workers can have the memory


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """The first signal that ends a run raises SystemExit(128 + its number), and `run_parallel` has its workers save.

    A second signal kills the workers and this process at once.
    """

    def stop(number: int, _frame: object) -> None:
        if is_second():
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)
        if received:
            return
        received.append(number)
        name = signal.Signals(number).name
        log.announce(f"\n{out}: stopped by {name}; the same command with --resume goes on (once more to stop at once)")
        raise SystemExit(128 + number)

    received: list[int] = []
    is_second = signals.SecondSignal()
    with signals.handling(stop, *signals.ending()):
        yield


def run_parallel(
    label: str,
    jobs: dict[Hashable, tuple],
    pool: ProcessPoolExecutor,
    folder: Path,
    progress: Callable[[Collection[Hashable]], tuple[float, str]] | None = None,
) -> dict[Hashable, Any]:
    """{name: function(*arguments)} for jobs {name: (function, *arguments)}, under one progress bar.

    As many jobs run at a time as the pool has workers; their messages go to log.txt in the folder. progress(names of
    the jobs that ended) -> (share that is done, from 0 to 1; text for the bar) is called again and again. Without it
    the bar shows how many jobs ended. Raises ValueError when a worker was killed.
    """
    results: dict[Hashable, Any] = {}
    shape = "{desc:<12} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}{postfix}"
    interval = 0.5 if sys.stderr.isatty() else 15.0  # seconds; a log file needs no line every half second
    with tqdm(total=100, desc=label, bar_format=shape) as bar:
        names = {pool.submit(do_job, folder / "log.txt", *job): name for name, job in jobs.items()}
        pending, workers = set(names), set()
        try:
            while pending:
                workers |= set(multiprocessing.active_children())
                ended, pending = wait(pending, timeout=interval, return_when=FIRST_COMPLETED)
                for future in ended:
                    results[names[future]] = future.result()
                share, text = progress(results) if progress else (len(results) / len(jobs), "")
                bar.set_postfix_str(text, refresh=False)
                bar.update(round(100 * share) - bar.n if pending else 100 - bar.n)
                bar.refresh()
        except BaseException as error:
            # an error or a signal: the other workers save and end, so that their runs can be resumed
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                left = [str(name) for name in jobs if name not in results]
                raise ValueError(how_they_died(workers, left[: len(workers)])) from error
            raise
    return {name: results[name] for name in jobs}


def how_they_died(workers: set, at_work: list[str]) -> str:
    """A sentence about worker processes of which one died, so that the pool has ended the others with SIGTERM."""
    for worker in workers:
        worker.join(timeout=30)  # those that the pool has ended save first
    killed = [w for w in workers if w.exitcode not in (None, 0, -signal.SIGTERM, 128 + signal.SIGTERM)]
    ends = [f"process {w.pid} by {signal.Signals(-w.exitcode).name}" for w in killed if w.exitcode < 0]
    ends += [f"process {w.pid} with exit code {w.exitcode}" for w in killed if w.exitcode > 0]
    memory = ""
    if resource is not None:
        unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
        memory = f" (the largest had {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit:.1f} GiB)"
    return (
        f"a worker died: {', '.join(ends) or 'nobody knows how'}; at work: {', '.join(at_work)}. Often the "
        f"system has run out of memory{memory}: fewer --workers need less; the same command with --resume goes on"
    )


def train_parallel(
    label: str, train: Callable, configs: dict[Hashable, Any], pool: ProcessPoolExecutor, folder: Path, shown: str
) -> dict[Hashable, Any]:
    """{name: train(config)} for training runs {name: config}, under one progress bar.

    The bar follows each run's metrics.jsonl, to the run's `steps` or, where it has such a limit, to its `max_flops`.
    Beside the bar stands the newest value of the column `shown`, val_loss or score, of a run that still goes on.
    """
    text = {"val_loss": "val loss {:.3f}", "score": "score {:.1%}"}[shown]

    def done(config: Any) -> tuple[float, str]:
        """The share of a run that its metrics.jsonl shows, and the text on it."""
        path = Path(config.out) / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        values = [row[shown] for row in rows if isinstance(row.get(shown), int | float)]
        most = getattr(config, "max_flops", 0.0)
        share = 0.0
        if rows:
            reached = rows[-1].get("x" if most else "step")
            share = reached / (most or config.steps) if isinstance(reached, int | float) else 0.0
        return min(1.0, share), f"{Path(config.out).name}: {text.format(values[-1])}" if values else ""

    before = {name: done(config)[0] for name, config in configs.items()}  # of runs that go on

    def progress(ended: Collection[Hashable]) -> tuple[float, str]:
        share, latest = 0.0, ""
        for name, config in configs.items():
            now, text = (1.0, "") if name in ended else done(config)
            share += 1.0 if before[name] == 1 else (now - before[name]) / (1 - before[name])
            latest = text or latest
        return share / len(configs), latest

    jobs = {name: (train, c) for name, c in configs.items()}
    return run_parallel(label, jobs, pool, folder, progress)
