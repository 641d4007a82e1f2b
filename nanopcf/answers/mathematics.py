"""math-verify, the verifier that the paper uses, in a process that can be killed. Optional: the extra `math`.

math-verify reads LaTeX with sympy. On an answer that a model made up that can take minutes or gigabytes, and its own
time limit is a signal, which cannot interrupt a loop in C. So it runs in a process of its own (`worker.py`). A question
that takes longer than a second is answered with no. Where the process doesn't say so by itself, it is killed, and a new
one starts at once. Two answers get eight questions and two seconds in all, and the question that is under way then; the
rest of a long list counts as different. What else is done to judge an answer is done in this process, and `limited`.
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
from functools import cache, lru_cache, wraps
from pathlib import Path

from nanopcf.answers.comparing import KNOWN, LETTER, How, equal
from nanopcf.answers.numbers import read_number
from nanopcf.run.untrusted import TooLong, time_limit

GRACE_S = 1.0  # for the process to give up by itself: a new one needs seconds to start
STARTING_S = 60.0  # to import sympy takes seconds, and longer on a busy machine
INSTALL = 'pip install -e ".[math]"'


# ---- the limit ----

LIMIT_S = 5.0  # of computing in this process, for an answer; most take a tenth of a millisecond
_cut_off = 0


def limited(judge: Callable[..., float]) -> Callable[..., float]:
    """The judge with a limit that this process keeps: an answer that takes it longer is wrong, and is counted."""

    @wraps(judge)
    def judged(*arguments: object, **options: object) -> float:
        try:
            with time_limit(LIMIT_S):
                return judge(*arguments, **options)
        except TooLong:
            count_cut_off()
            return 0.0

    return judged


def count_cut_off() -> None:
    global _cut_off
    _cut_off += 1


def take_cut_off() -> int:
    """How many answers and questions ran into a limit since the last call; they counted as wrong."""
    global _cut_off
    count, _cut_off = _cut_off, 0
    return count


# ---- the process ----


@cache
def installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


class MathVerify:
    """`checker(response, answer)` -> 1.0 or 0.0, like `rewards.verify`. Its process ends with ours.

    It never raises because of an answer, and takes `limit_s` for one at most, GRACE_S more when it has to be killed; to
    start the process takes seconds more. Raises ValueError when math-verify is not installed.
    """

    def __init__(self, limit_s: float = 1.0) -> None:
        if not installed():
            raise ValueError(f"math-verify isn't installed: {INSTALL}, or use our own verifier")
        self.limit_s = limit_s
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()  # one question at a time

    def start(self) -> None:
        """Start the process if there is none; `wait_until_ready` waits for it."""
        if self.process is not None:
            return
        # -P: the folder of worker.py is no place to import from. A session of its own: Ctrl-C is for the run alone.
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(self.limit_s)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        self.process, self.ready = subprocess.Popen(command, start_new_session=True, **pipes), False
        atexit.register(self.stop)

    def wait_until_ready(self) -> None:
        if not self.ready and self.line(STARTING_S) != "ready\n":
            self.stop()
            raise ValueError(f"math-verify didn't start within {STARTING_S:.0f} s; see the lines above")
        self.ready = True

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
        try:
            return self.process.stdout.readline()
        finally:
            clock.cancel()

    def ask(self, kind: str, said: str, gold: str, places: int = -1) -> tuple[bool, float]:
        """(the reply, the seconds that it took, without those that the process took to start)"""
        question = json.dumps([kind, said, gold, places]) + "\n"
        with self.lock:
            try:
                for _ in range(2):
                    self.start()
                    self.wait_until_ready()
                    began, reply = time.monotonic(), ""
                    with contextlib.suppress(OSError):  # the process has died
                        self.process.stdin.write(question)
                        self.process.stdin.flush()
                        reply = self.line(self.limit_s + GRACE_S)
                    seconds = time.monotonic() - began
                    if reply in ("true\n", "false\n"):
                        return reply == "true\n", seconds
                    if reply:  # "null": the time is over, and the process goes on
                        break
                    self.stop()
                    if seconds > self.limit_s:
                        break
                    # It died by itself, perhaps long ago and for lack of memory: the question is asked once more.
                self.start()  # the next question need not wait for all of it
            except BaseException:  # a signal: what the process says next would answer this question and not the next
                self.stop()
                raise
            count_cut_off()
            return False, seconds

    @limited
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
    return limited(
        lambda response, answer, strict=False: float(equal(rewards.final_answer(response, strict), answer, strict))
    )
