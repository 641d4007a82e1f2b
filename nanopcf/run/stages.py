"""Stages of a pipeline, cached in its run folder, and their runs in parallel processes under one progress bar.

A stage's result stands in NAME.json under a key made of the settings it reads and the keys of all stages before it,
its files in NAME/. A changed setting thus reruns that stage and those after it, and nothing else.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from tqdm import tqdm

from nanopcf.run import files, log, signals
from nanopcf.run.folder import read_metrics


class Stages:
    """Results of stages, cached in the run folder. A stage runs again iff its settings or a stage before it changed."""

    def __init__(self, c: object, out: Path) -> None:
        self.c, self.out, self.keys = c, out, ""
        self.elapsed: dict[str, float] = {}

    def run(self, name: str, settings: str, work: Callable[[Path], object]) -> object:
        """work(folder) -> JSON value, or the cached value of an equal earlier call. Interrupted work goes on in place."""
        values = {k: getattr(self.c, k) for k in settings.split()}
        self.keys += json.dumps({name: values}, sort_keys=True)  # a stage depends on all before it
        path, folder = self.out / f"{name}.json", self.out / name
        record = files.read_json(path) if path.exists() else {}
        if record.get("key") != self.keys:
            shutil.rmtree(folder, ignore_errors=True)
            record = {"key": self.keys, "done": False, "elapsed_s": 0.0}
            files.write_json(path, record)
        if not record["done"]:
            folder.mkdir(exist_ok=True)
            began = time.perf_counter()
            result = work(folder)
            elapsed = record["elapsed_s"] + time.perf_counter() - began
            record |= {"done": True, "result": result, "elapsed_s": round(elapsed, 1)}
            files.write_json(path, record)
        else:
            log.announce(f"{name}: kept from before")
        self.elapsed[name] = record["elapsed_s"]
        return record["result"]


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes for `run_parallel`. One serves all stages, since each new process imports torch, which takes seconds; they
    start when there is work for them."""
    spawn = multiprocessing.get_context("spawn")  # fork after torch has started threads can hang
    return ProcessPoolExecutor(workers, spawn, in_child)


def in_child() -> None:
    """Set up a worker process. Its end is the parent's affair: Ctrl-C is passed on as SIGTERM, and a worker doesn't outlive
    a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def do_job(log: Path, function: Callable, *arguments: object) -> object:
    """function(*arguments) in a worker. What it says goes to the log, so the parent's bar stays whole. A worker that was
    asked to end does so once its job has saved, instead of taking the next one."""
    with log.open("a", encoding="utf-8", buffering=1) as file, redirect_stderr(file):
        try:
            return function(*arguments)
        except SystemExit as ended:
            os._exit(ended.code)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # for the parent, or for a worker beside this one


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """SIGINT or SIGTERM ends the block by SystemExit 130 or 143; run_parallel then has its workers save. A second one
    kills them and the process at once."""

    def stop(number: int, _frame: object) -> None:
        if again():
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)
        if noted:
            return
        noted.append(number)
        name = signal.Signals(number).name
        log.announce(f"\n{out}: stopped by {name}; the same command with --resume goes on (once more to stop at once)")
        raise SystemExit(128 + number)

    noted, again = [], signals.SecondSignal()
    with signals.handling(stop, signal.SIGINT, signal.SIGTERM):
        yield


def run_parallel(
    label: str, jobs: dict[str, tuple], pool: ProcessPoolExecutor, log: Path, live: Callable | None = None
) -> dict:
    """{name: function(*arguments)} of jobs {name: (function, arguments...)}, as many at a time as the pool has workers,
    under one bar.

    live() -> (share done 0..1, text) is asked again and again for what the bar shows.
    """
    results = {}
    bar = tqdm(
        total=100, desc=label, bar_format="{desc:<12} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}{postfix}"
    )
    pause = 0.5 if sys.stderr.isatty() else 15.0  # a log file needs no line every half second
    with bar:
        futures = {pool.submit(do_job, log, *job): name for name, job in jobs.items()}
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=pause, return_when=FIRST_COMPLETED)
                for future in done:
                    results[futures[future]] = future.result()
                share, text = live() if live else (len(results) / len(jobs), "")
                bar.set_postfix_str(text, refresh=False)
                bar.update(round(100 * share) - bar.n if pending else 100 - bar.n)
                bar.refresh()
        except BaseException:  # an error or a signal: the others save and end, their folders can be resumed
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return {name: results[name] for name in jobs}


def watch(folders: dict, total: float, number: str, show: str, of: str = "step") -> Callable[[], tuple[float, str]]:
    """live() for runs in folders: progress of `of` towards its total from their metrics.jsonl, and the latest value of
    `number`."""

    def live() -> tuple[float, str]:
        share, latest = 0.0, ""
        for folder in folders.values():
            path = folder / "metrics.jsonl"
            rows = read_metrics(path) if path.exists() else []
            values = [r[number] for r in rows if number in r]
            ended = any((folder / f).exists() for f in ("checkpoints.json", "curve.json"))
            share += 1 if ended else min(1, rows[-1].get(of, 0) / total) if rows else 0
            if values and not ended:
                latest = f"{folder.name}: {show.format(values[-1])}"
        return share / len(folders), latest

    return live
