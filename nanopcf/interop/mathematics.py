"""math-verify, the verifier that the paper uses, in a process that can be killed. Optional.

    python -m nanopcf.interop.mathematics F.jsonl ...     how often our verifier and math-verify agree on these answers

math-verify (extra `math`) reads LaTeX with sympy. On an answer that a model made up, that can take minutes or
gigabytes, and math-verify's own time limit is a signal, which cannot interrupt a loop in C. So it runs in a process of
its own. When an answer takes longer than a second it counts as wrong, the process is killed, and the next question
starts a new one.
"""

import contextlib
import importlib.util
import logging
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from nanopcf.data import read_examples
from nanopcf.rewards import verify
from nanopcf.run import config
from nanopcf.run.config import Argument, Count

STARTING_S = 60.0  # to import sympy takes seconds, and longer on a busy machine
MEMORY_BYTES = 4 << 30


# ---- the verifier ----


def serve(pipe: Connection) -> None:
    """The worker process: receives (response, answer), sends True or False, until the pipe closes."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows and macOS have no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)  # it warns that its own time limit is off
    from math_verify import parse, verify

    pipe.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            response, answer = pipe.recv()
            correct = False
            with contextlib.suppress(Exception):  # whatever sympy raises, the worker goes on
                expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
                given = parse(response, parsing_timeout=None)
                correct = bool(verify(expected, given, timeout_seconds=None))
            pipe.send(correct)


class MathVerify:
    """`with MathVerify() as checker: checker(response, answer)` -> 1.0 or 0.0, like `rewards.verify`.

    It never raises because of an answer, and never takes longer than `limit_s` for one. Raises ValueError when
    math-verify is not installed.
    """

    def __init__(self, limit_s: float = 1.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError('math-verify isn\'t installed: pip install -e ".[math]", or use our own verifier')
        self.limit_s = limit_s
        self.killed = 0  # how many processes
        self.process = None

    def __enter__(self) -> "MathVerify":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork after torch has started threads can hang
        self.pipe, end_of_worker = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(end_of_worker,), daemon=True)
        self.process.start()
        end_of_worker.close()  # then only the worker holds it, and its death closes the pipe
        if not self.pipe.poll(STARTING_S):
            self.stop()
            raise ValueError(f"math-verify didn't start within {STARTING_S:.0f} s")
        try:
            self.pipe.recv()
        except EOFError as error:
            self.stop()
            raise ValueError("math-verify couldn't be imported; see the lines above") from error

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def __call__(self, response: str, answer: str) -> float:
        if self.process is None:
            self.start()
        with contextlib.suppress(EOFError, OSError, UnicodeError):  # the worker died, or the text cannot be sent
            # the final answer stands at the end of a response
            self.pipe.send((response[-20_000:], answer[:2_000]))
            if self.pipe.poll(self.limit_s):
                return float(self.pipe.recv())
        self.stop()
        self.killed += 1
        return 0.0


def verifier(name: str) -> Callable[[str, str], float]:
    """(response, answer) -> 1.0 or 0.0, by name: ours, math-verify, or either (correct when one of the two says so)."""
    if name == "ours":
        return verify
    if name not in ("math-verify", "either"):
        raise ValueError(f"--verifier must be ours, math-verify or either, got {name!r}")
    theirs = MathVerify()
    if name == "math-verify":
        return theirs

    def either(response: str, answer: str) -> float:
        return verify(response, answer) or theirs(response, answer)

    return either


# ---- the comparison with ours ----


@dataclass(frozen=True)
class AgreementConfig(config.Config):
    files: tuple[Argument, ...]  # JSONL files of problems with answers
    pairs: Count = 1000  # at most so many answers per file
    seed: int = 0  # of the choice of answers


def compare(
    pairs: list[tuple[str, str]], theirs: MathVerify
) -> tuple[Counter[tuple[float, float]], list[tuple[str, str, float]]]:
    """Both verifiers on pairs of (answer in a box, expected answer).

    Returns how often they said (ours, theirs), and the pairs on which they differ, with what ours said.
    """
    counts: Counter[tuple[float, float]] = Counter()
    differences = []
    for boxed, expected in pairs:
        response = f"So the answer is \\boxed{{{boxed}}}."
        verdicts = verify(response, expected), theirs(response, expected)
        counts[verdicts] += 1
        if verdicts[0] != verdicts[1]:
            differences.append((boxed, expected, verdicts[0]))
    return counts, differences


def agreement(paths: list[str], pairs: int, seed: int) -> None:
    """Each expected answer against itself, and against that of another problem: how often do the verifiers agree?"""
    rng = random.Random(seed)
    differences = []
    with MathVerify() as theirs:
        print(f"{'file':<28} {'against':<9} {'pairs':>7} {'agree':>7} {'ours right':>11} {'theirs right':>13}")
        for path in paths:
            answers = [e.answer for e in read_examples(path, need=("prompt", "answer"))]
            chosen = answers if len(answers) <= pairs else rng.sample(answers, pairs)
            others = rng.choices(answers, k=len(chosen))
            for kind, expected in (("itself", chosen), ("another's", others)):
                counts, differ = compare(list(zip(chosen, expected, strict=True)), theirs)
                differences += [(kind, *difference) for difference in differ]
                n = len(chosen)
                agree = (counts[0, 0] + counts[1, 1]) / n
                ours_right, theirs_right = (counts[1, 0] + counts[1, 1]) / n, (counts[0, 1] + counts[1, 1]) / n
                name = path.rpartition("/")[2]
                print(
                    f"{name:<28} {kind:<9} {n:>7} {agree:>7.1%} {ours_right:>11.1%} {theirs_right:>13.1%}", flush=True
                )
        print(f"killed after {theirs.limit_s:g} s: {theirs.killed}")
    for kind, boxed, expected, ours in differences[:20]:
        print(f"differ, against {kind}: {boxed!r} and {expected!r}: we say {'right' if ours else 'wrong'}")


def main() -> None:
    c = config.parse(AgreementConfig, __doc__)
    agreement(c.files, c.pairs, c.seed)


if __name__ == "__main__":
    config.run_cli(main)
