"""bfloat16 in Triton's interpreter (TRITON_INTERPRET=1) as a GPU has it.

The interpreter works with NumPy, which has no bfloat16: it keeps the bit patterns as integers, and multiplies these
integers. The two methods mended here are there in Triton 3.6 and 3.7.
"""

import numpy as np
import torch
import triton.language as tl


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16 -> float32: the upper half of the same number."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16, as uint16; rounded to nearest, ties to even."""
    rounded = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def mend_bfloat16() -> None:
    """Casts between bfloat16 and float32 round to nearest (they cut off), and products are those of the numbers.

    Other arithmetic in bfloat16 stays wrong: kernels cast what they load to float32.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float32(src.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        a, b = (cast_impl(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
