"""Decoding steps as CUDA graphs: the host launches a whole step at once in place of its hundreds of kernels.

A graph replays the same kernels on the same addresses and shapes. So the sampler writes its state in place, and here
the shapes of a step are rounded up, to so few values that each is captured once and replayed often.
"""

from collections.abc import Callable

import torch


class Replay:
    """step(rows, S) of the sampler, with both numbers rounded up, captured once per pair and then replayed.

    The first call with a pair runs the step as it is, which also lets the libraries choose their kernels; the second
    call captures it. Rows beyond the live ones are idle: what they draw goes to a row of the output that nobody reads.
    """

    def __init__(self, step: Callable[[int, int], None], capture: Callable, slots: int, length: int) -> None:
        self.step, self.capture, self.slots, self.length = step, capture, slots, length
        self.captured: dict[tuple[int, int], Callable[[], None] | None] = {}

    def __call__(self, live: int, S: int) -> None:
        rows = self.slots
        while rows // 2 >= live:
            rows //= 2
        # Lengths are a multiple of 1/8 of the next power of two: few captures, and at most a quarter of wasted work.
        multiple = max(64, 2 ** S.bit_length() // 8)
        S = min(self.length, -(-S // multiple) * multiple)
        key = (rows, S)
        if key not in self.captured:
            self.captured[key] = None
            self.step(rows, S)
            return
        if self.captured[key] is None:
            self.captured[key] = self.capture(lambda: self.step(rows, S))
        self.captured[key]()


def graph_capture() -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A function capture(work) that records work() as a CUDA graph and returns the function that replays it.

    Capturing runs nothing. All graphs of one `capture` keep their temporaries in the same memory, since none of these
    is needed after its replay.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture
