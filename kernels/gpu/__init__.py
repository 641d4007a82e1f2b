"""The Triton kernels: the functions of `kernels/reference.py` again, for GPUs.

Nobody need read them to understand the rest. They are a lesson of their own, in two steps: `logprob.py` (log-probs
without logits in memory), then `token_loss.py`. This file says whether they can run, and imports Triton only for that.
"""

import torch

OLDEST_TRITON = (3, 6)  # the first whose tensor descriptors, made on the host, also serve GPUs without TMA


def missing() -> str | None:
    """Why the kernels cannot run in this process; None when they can."""
    try:
        import triton
    except ImportError:
        return "triton isn't installed"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def interpreted() -> bool:
    """Do the kernels run in Triton's interpreter (TRITON_INTERPRET=1)? Only asked when Triton is there."""
    import triton

    return triton.knobs.runtime.interpret
