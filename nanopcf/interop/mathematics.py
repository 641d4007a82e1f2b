"""math-verify, the verifier the paper uses, in a process that can be killed (extra `math`). Never needed: `rewards` is ours.

    python -m nanopcf.interop.mathematics F.jsonl ...     how often the two verifiers agree on the answers of these files

math-verify reads LaTeX with sympy, which can take minutes or gigabytes on an answer that a model made up, and stops
itself by signals, which is no limit inside a C loop. So it lives in a process of its own: an answer that takes longer
than a second counts as wrong, the process is killed, and the next question starts another one.
"""

import argparse
import contextlib
import importlib.util
import logging
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection

from nanopcf.data import read_examples
from nanopcf.rewards import verify
from nanopcf.run import config

STARTING_S = 60.0  # importing sympy takes seconds, on a busy machine more
MEMORY_BYTES = 4 << 30


def serve(pipe: Connection) -> None:
    """The worker: (response, answer) in, True or False out, until the pipe closes."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on Windows and macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)  # it warns of the timeouts that we turn off
    from math_verify import parse, verify

    pipe.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            response, answer = pipe.recv()
            right = False
            with contextlib.suppress(Exception):  # whatever sympy makes of it, the worker answers
                gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
                said = parse(response, parsing_timeout=None)
                right = bool(verify(gold, said, timeout_seconds=None))
            pipe.send(right)


class MathVerify:
    """`with MathVerify() as checker: checker(response, answer)` -> 1.0 or 0.0, like `rewards.verify`.

    Never raises on an answer and never takes longer than `limit_s`. Raises ValueError when math-verify isn't installed.
    """

    def __init__(self, limit_s: float = 1.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError('math-verify isn\'t installed: pip install -e ".[math]", or use our own verifier')
        self.limit_s, self.killed, self.process = limit_s, 0, None

    def __enter__(self) -> "MathVerify":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # fork after torch has started threads can hang
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is seen at once
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
        with contextlib.suppress(EOFError, OSError, UnicodeError):  # it died, or the text can't be sent
            self.pipe.send((response[-20_000:], answer[:2_000]))
            if self.pipe.poll(self.limit_s):
                return float(self.pipe.recv())
        self.stop()
        self.killed += 1
        return 0.0


def verifier(name: str) -> Callable[[str, str], float]:
    """(response, answer) -> 1.0 or 0.0, by name: ours, math-verify, or either (right when one of them says so)."""
    if name == "ours":
        return verify
    if name not in ("math-verify", "either"):
        raise ValueError(f"--verifier must be ours, math-verify or either, got {name!r}")
    theirs = MathVerify()
    return theirs if name == "math-verify" else lambda r, a: verify(r, a) or theirs(r, a)


def agreement(files: list[str], pairs: int, seed: int) -> None:
    """Each gold answer against itself in a box, and `pairs` against another problem's: how often the two say the same."""
    rng, differ = random.Random(seed), []
    with MathVerify() as theirs:
        print(f"{'file':<28} {'against':<9} {'pairs':>7} {'agree':>7} {'ours right':>11} {'theirs right':>13}")
        for file in files:
            answers = [e.answer for e in read_examples(file, need=("prompt", "answer"))]
            drawn = answers if len(answers) <= pairs else rng.sample(answers, pairs)
            for kind, other in (("itself", drawn), ("another's", rng.choices(answers, k=len(drawn)))):
                counts = Counter()
                for response, answer in zip(drawn, other, strict=True):
                    text = f"So the answer is \\boxed{{{response}}}."
                    ours, said = verify(text, answer), theirs(text, answer)
                    counts[ours, said] += 1
                    if ours != said:
                        differ.append((kind, response, answer, ours))
                n = len(drawn)
                agree, mine = counts[0, 0] + counts[1, 1], counts[1, 0] + counts[1, 1]
                print(
                    f"{file.rpartition('/')[2]:<28} {kind:<9} {n:>7} {agree / n:>7.1%} {mine / n:>11.1%} "
                    f"{(counts[0, 1] + counts[1, 1]) / n:>13.1%}",
                    flush=True,
                )
        print(f"killed after {theirs.limit_s:g} s: {theirs.killed}")
    for kind, response, answer, ours in differ[:20]:
        print(f"differ, against {kind}: {response!r} and {answer!r}: we say {'right' if ours else 'wrong'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="nanopcf.interop.mathematics", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="F.jsonl", help="problems with answers")
    parser.add_argument("--pairs", type=int, default=1000, help="answers of a file at most (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args(sys.argv[1:])
    config.run_cli(agreement, args.files, args.pairs, args.seed)
