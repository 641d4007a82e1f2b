"""Ctrl-C and SIGTERM: after the first one a run saves and ends; a second one ends the process at once, unsaved."""

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
    """Called by a handler for every signal: is this the second one?

    Signals within 0.1 s of the first count as the same one, because `timeout` and batch schedulers send theirs twice,
    to the process and to its group.
    """

    first = math.inf  # when it came

    def __call__(self) -> bool:
        self.first = min(self.first, time.monotonic())
        return time.monotonic() - self.first > 0.1


@contextmanager
def handling(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Call handler(number, frame) for these signals inside the block.

    Python delivers signals to the main thread only, so in any other thread this does nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if in_main}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """Note SIGINT and SIGTERM instead of ending, so that a loop can save first: `with stoppable() as stop_signal:`.

    stop_signal() is the number of the signal that came, or 0. With several processes it is the same in all of them,
    whichever got the signal.
    """
    noted: list[int] = []
    is_second = SecondSignal()
    # A worker of a pipeline always saves; its parent kills it when a second signal comes.
    is_worker = multiprocessing.parent_process() is not None

    def note(number: int, _frame: object) -> None:
        if is_second() and not is_worker:
            os._exit(128 + number)
        if not noted:
            noted.append(number)
            announce("\nstopping after this step; once more to stop at once, unsaved")

    def stop_signal() -> int:
        return max(parallel.gathered([noted[0] if noted else 0]))

    # Ctrl-C reaches the workers too, but they ignore it: their parent passes it on as SIGTERM.
    with handling(note, signal.SIGTERM, *([] if is_worker else [signal.SIGINT])):
        yield stop_signal
    if is_worker and noted:  # the signal came after the loop's last look at it; the worker must end all the same
        raise SystemExit(128 + noted[0])


def leave(out: Path, step: int, number: int) -> None:
    """End an interrupted run, after its checkpoint. Raises SystemExit(128 + number), which is 130 or 143."""
    name = signal.Signals(number).name
    announce(f"{out}: stopped by {name} after step {step}, saved; the same command with --resume goes on")
    raise SystemExit(128 + number)
