"""What strangers write (answers of a model, chat templates, names in files): a limit on what it costs to read it, and
no control over the terminal.

The limits are kept by the process itself, and need nothing of what runs inside them. Where they cannot be kept, they
are left out: outside of the main thread, and on Windows.
"""

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import resource
except ImportError:  # Windows
    resource = None

WAITING_S = 120.0  # the longest that a block may wait: for a process that imports sympy on a busy machine


class TooLong(BaseException):
    """A block ran into its `time_limit`. It is no Exception, because many libraries catch those and go on."""


# Of the innermost limit: its seconds, and the thread's and the wall's time when it began.
_running: tuple[float, float, float] | None = None
_handler_is_set = False  # once for all limits: to set it takes longer than to judge an answer


def _look(*_: object) -> None:
    if _running is not None:
        seconds, computed, began = _running
        if time.thread_time() - computed > seconds or time.monotonic() - began > WAITING_S:
            raise TooLong


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the block with TooLong after `seconds` of computing by this thread, or after WAITING_S in all.

    What counts is the time that the thread computes, since a busy machine must not change a verdict. A loop in Python
    or in a pattern of `re` is ended; a long call of a C library only when it returns.
    """
    global _running, _handler_is_set
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    if not _handler_is_set:
        signal.signal(signal.SIGALRM, _look)
        _handler_is_set = True
    outer, _running = _running, (seconds, time.thread_time(), time.monotonic())
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 4)
    try:
        yield
    finally:
        _running = outer
        again = outer[0] / 4 if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, again, again)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let this process have `size` bytes more than it has: what asks for more in the block gets a MemoryError.

    Only on Linux, which says how much that is.
    """
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
        limits = [used + size, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    except (OSError, AttributeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Control characters but for the tab and the line break, and those that turn the direction of writing; half characters,
# which can't be written at all.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """The text with its control characters written out, "\\x1b[2J" for the one that clears the screen."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], str(text))


def panicked(error: BaseException) -> bool:
    """Is it a panic of a library in Rust, such as tokenizers? Those are no Exceptions, and what they are is private."""
    return type(error).__name__ == "PanicException"
