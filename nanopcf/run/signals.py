"""Ctrl-C and SIGTERM: the first is noted, so that a loop can save and leave; a second one ends the process at once."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanopcf.run import parallel
from nanopcf.run.log import announce


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
