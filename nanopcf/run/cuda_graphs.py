"""A decoding step as a CUDA graph."""

from collections.abc import Callable

import torch


class Replay:
    """step(rows, S) with both rounded up to a few values, so that a captured step can be replayed.

    The first call of a pair runs as it is (which also warms the libraries up), the second is captured. Rows beyond the
    live ones are idle: what they draw goes to a row of the output that nobody reads.
    """

    def __init__(self, step: Callable[[int, int], None], capture: Callable, slots: int, length: int) -> None:
        self.step, self.capture, self.slots, self.length = step, capture, slots, length
        self.captured: dict[tuple[int, int], Callable[[], None] | None] = {}

    def __call__(self, live: int, S: int) -> None:
        rows = self.slots
        while rows // 2 >= live:
            rows //= 2
        # lengths an eighth to a quarter apart: neither a capture every few steps nor much work in vain
        apart = max(64, 2 ** S.bit_length() // 8)
        S = min(self.length, -(-S // apart) * apart)
        key = (rows, S)
        if key not in self.captured:
            self.captured[key] = None
            self.step(rows, S)
            return
        if self.captured[key] is None:
            self.captured[key] = self.capture(lambda: self.step(rows, S))
        self.captured[key]()


def graph_capture() -> Callable[[Callable[[], None]], Callable[[], None]]:
    """capture(work) -> a CUDA graph of it: capturing runs nothing, replaying costs one launch. All graphs that one capture
    makes keep their temporaries in the same memory: none of them outlives its replay."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture
