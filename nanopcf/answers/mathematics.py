"""math-verify, the verifier that the paper uses, in a process that can be killed. Optional: the extra `math`.

math-verify reads LaTeX with sympy. On an answer that a model made up that can take minutes or gigabytes, and its own
time limit is a signal, which cannot interrupt a loop in C. So it runs in a process of its own (`worker.py`). A question
that takes longer than a second is answered with no. Where the process doesn't say so by itself, it is killed, and the
next question starts a new one.
"""

import atexit
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

from nanopcf.answers.comparing import KNOWN, LETTER, How, equal
from nanopcf.answers.numbers import read_number

GRACE_S = 1.0  # for the process to give up by itself: a new one needs seconds to start
STARTING_S = 60.0  # to import sympy takes seconds, and longer on a busy machine
INSTALL = 'pip install -e ".[math]"'


@cache
def installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


class MathVerify:
    """`checker(response, answer)` -> 1.0 or 0.0, like `rewards.verify`. Its process ends with ours.

    It never raises because of an answer, and takes `limit_s` for one at most, GRACE_S more when it has to be killed.
    Raises ValueError when math-verify is not installed.
    """

    def __init__(self, limit_s: float = 1.0) -> None:
        if not installed():
            raise ValueError(f"math-verify isn't installed: {INSTALL}, or use our own verifier")
        self.limit_s = limit_s
        self.killed = 0  # how many processes
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()  # one question at a time

    def start(self) -> None:
        # -P: the folder of worker.py is no place to import from. A session of its own: Ctrl-C is for the run alone.
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(self.limit_s)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)
        atexit.register(self.stop)
        if self.line(STARTING_S) != "ready\n":
            self.stop()
            raise ValueError(f"math-verify didn't start within {STARTING_S:.0f} s; see the lines above")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self.process = None
            atexit.unregister(self.stop)

    def line(self, limit_s: float) -> str:
        """The next line of the worker; "" when it was killed because none came in time, or died."""
        clock = threading.Timer(limit_s, self.process.kill)
        clock.start()
        line = self.process.stdout.readline()
        clock.cancel()
        return line

    def ask(self, kind: str, said: str, gold: str, places: int = -1) -> tuple[bool, float]:
        """(the reply, the seconds that it took, without those that the process took to start)"""
        with self.lock:
            if self.process is None:
                self.start()
            began = time.monotonic()
            with contextlib.suppress(OSError):  # the worker has died
                self.process.stdin.write(json.dumps([kind, said, gold, places]) + "\n")
                self.process.stdin.flush()
                if reply := self.line(self.limit_s + GRACE_S):
                    return reply == "true\n", time.monotonic() - began
            self.stop()
            self.killed += 1
            return False, time.monotonic() - began

    def __call__(self, response: str, answer: str) -> float:
        # the final answer stands at the end of a response
        return float(self.ask("whole", response[-20_000:], answer[:2_000])[0])


# ---- formulas by value ----


@cache
def shared() -> MathVerify:
    """The worker of this process, which `rewards.verify` asks; its first question starts it. Raises ValueError when
    math-verify is not installed."""
    return MathVerify()


def by_value(said: str, gold: str, how: How) -> bool:
    """Two formulas in tidy LaTeX, or two relations such as y = 2x. False without math-verify, and when `how` has no
    questions or no time left for this pair of answers."""
    if not installed() or how.questions <= 0 or how.seconds <= 0:
        return False
    right, seconds = asked(said, gold, rounds=not how.strict)
    how.questions -= 1
    how.seconds -= seconds
    return right


@lru_cache(maxsize=10_000)
def asked(said: str, gold: str, rounds: bool) -> tuple[bool, float]:
    """(are they equal, the seconds that it took). `rounds`: 1.414 may stand for \\sqrt{2}."""
    decimals = [d for t in (said, gold) if (d := read_number(t)) and d.places > 2]
    places = decimals[0].places if rounds and len(decimals) == 1 else -1
    return shared().ask("formula", *renamed(said, gold), places)


def renamed(*texts: str) -> list[str]:
    """The formulas with x_{1}, x_{2}, ... for their letters. math-verify would read R and r as one letter, AB as A
    times B under an arrow, and drop an index that it doesn't know. e, i, \\pi and the names of functions stay."""
    names: dict[str, str] = {}

    def name(m: re.Match) -> str:
        letter = re.sub(r"[\s{}]", "", m[0])
        if letter in ("e", "i") or m[1] in KNOWN:
            return m[0]
        return names.setdefault(letter, f"x_{{{len(names) + 1}}}")

    return [re.sub(r"\*", r"\\cdot ", LETTER.sub(name, t)) for t in texts]


# ---- verifiers by name ----


def verifier(name: str) -> Callable[..., float]:
    """(response, answer) -> 1.0 or 0.0, by name; those of ours take `strict` too.

    ours         texts and numbers alone
    auto         formulas by math-verify too, where it is installed
    math-verify  math-verify finds the answer itself, and compares it
    """
    from nanopcf import rewards

    if name != "ours":
        return shared() if name == "math-verify" else rewards.verify
    return lambda response, answer, strict=False: float(equal(rewards.final_answer(response, strict), answer, strict))
