"""Decoding steps as CUDA graphs: the host launches a whole step at once in place of its hundreds of kernels.

A graph replays the same kernels on the same addresses and shapes. So the sampler writes its state in place, and here
the shapes of a step are rounded up, to so few values that each is captured once and replayed often.
"""

import gc
from collections.abc import Callable, Hashable
from functools import partial

import torch


class Replay:
    """step([(rows, S)], *how) of the sampler, captured once per rows, S and `how` to draw, and then replayed.

    Both numbers are rounded up. The first call with a pair runs the step as it is, which also lets the libraries choose
    their kernels; the second call captures it. Rows beyond the live ones are idle: what they draw goes to a row of the
    output that nobody reads. With a mask all rows read as far as the longest.
    """

    def __init__(self, step: Callable[..., None], capture: Callable, slots: int, length: int) -> None:
        self.step, self.capture, self.slots, self.length = step, capture, slots, length
        self.captured: dict[tuple, Callable[[], None] | None] = {}

    def __call__(self, spans: list[tuple[int, int]], *how: Hashable) -> None:
        live, S = sum(rows for rows, _ in spans), max(length for _, length in spans)
        rows = self.slots
        while rows // 2 >= live:
            rows //= 2
        # Lengths are a multiple of 1/8 of the next power of two: few captures, and at most a quarter of wasted work.
        multiple = max(64, 2 ** S.bit_length() // 8)
        S = min(self.length, -(-S // multiple) * multiple)
        key, step = (rows, S, *how), partial(self.step, [(rows, S)], *how)
        if key not in self.captured:
            self.captured[key] = None
            step()
            return
        if self.captured[key] is None:
            self.captured[key] = self.capture(step)
        self.captured[key]()


def graph_capture() -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A function capture(work) that records work() as a CUDA graph and returns the function that replays it.

    Capturing runs nothing. All graphs of one `capture` keep their temporaries in the same memory, since none of these
    is needed after its replay. Older versions of torch collect Python's garbage before each capture: frozen, the
    objects that exist cost no time there.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        gc.freeze()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
        finally:
            gc.unfreeze()
        return graph.replay

    return capture
