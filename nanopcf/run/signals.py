"""Ctrl-C, SIGTERM and SIGHUP (a terminal that was closed): after the first one a run saves and ends; a second one ends
the process at once, unsaved."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanopcf.run import parallel
from nanopcf.run.log import announce

PATIENCE_S = 2.0  # for a judge of answers, once a signal has come
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


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


def ending(*, by_hand: bool = True) -> list[int]:
    """The signals that end a run. by_hand: those that a terminal sends to all its processes are among them."""
    numbers = [signal.SIGTERM] + [signal.SIGINT] * by_hand
    if HANGUP and by_hand and signal.getsignal(HANGUP) != signal.SIG_IGN:  # ignored: nohup started the run
        numbers.append(HANGUP)
    return numbers


class Stopped(BaseException):
    """Work that is dropped because a signal has come. It is no Exception, so that nobody takes it for an error."""


# Of the run in this process: the signals that came, and whether the work that is under way may be dropped.
noted: list[int] = []
droppable = False


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """Note the signals that end a run, so that a loop can save first: `with stoppable() as stop_signal:`.

    stop_signal() is the number of the signal that came, or 0. With several processes it is the same in all of them,
    whichever got the signal.
    """
    noted.clear()
    is_second = SecondSignal()
    # A worker of a pipeline always saves; its parent kills it when a second signal comes.
    is_worker = multiprocessing.parent_process() is not None

    def note(number: int, _frame: object) -> None:
        if is_second() and not is_worker:
            os._exit(128 + number)
        if not noted:
            noted.append(number)
            if droppable:
                raise Stopped
            announce("\nstopping after this step; once more to stop at once, unsaved")

    def stop_signal() -> int:
        return max(parallel.gathered([noted[0] if noted else 0]))

    # Ctrl-C reaches the workers too, but they ignore it: their parent passes it on as SIGTERM.
    with handling(note, *ending(by_hand=not is_worker)):
        try:
            yield stop_signal
        except Stopped:  # by `impatient`: a step can't be saved before its answers are judged
            name = signal.Signals(noted[0]).name
            announce(
                f"stopped by {name} while answers were judged, and too slowly; --resume goes on where it last saved"
            )
            raise SystemExit(128 + noted[0]) from None
    if is_worker and noted:  # the signal came after the loop's last look at it; the worker must end all the same
        raise SystemExit(128 + noted[0])


def unless_stopped(work: Callable[[], Any], out: Path, step: int, save: Callable[[], None]) -> Any:
    """work(), which changes nothing that is saved: when a signal comes it is dropped at once, the run saves and ends
    as it stood before, after `step` steps. Where several processes train it is not dropped, since all must end alike.
    """
    global droppable
    try:
        try:
            droppable = parallel.world() == 1
            if noted and droppable:
                raise Stopped
            return work()
        finally:
            droppable = False
    except Stopped:
        save()
        leave(out, step, noted[0])


def impatient(judge: Callable[..., float]) -> Callable[..., float]:
    """The judge of answers; raises Stopped when it has taken longer than PATIENCE_S since a signal came."""
    spent = 0.0

    def judged(*arguments: object, **options: object) -> float:
        nonlocal spent
        began = time.monotonic()
        verdict = judge(*arguments, **options)
        if noted and parallel.world() == 1:
            spent += time.monotonic() - began
            if spent > PATIENCE_S:
                raise Stopped
        return verdict

    return judged


def leave(out: Path, step: int, number: int) -> None:
    """End an interrupted run, after its checkpoint. Raises SystemExit(128 + number), which is 129, 130 or 143."""
    name = signal.Signals(number).name
    announce(f"{out}: stopped by {name} after step {step}, saved; the same command with --resume goes on")
    raise SystemExit(128 + number)
