"""Makes TRITON_INTERPRET=1 right about bfloat16, or loud.

Triton 3.6's interpreter keeps bfloat16 as uint16 bit patterns.  Loads, stores and casts to float32 are right; tl.dot and
arithmetic work on the bit patterns without an error, and float32 becomes bfloat16 by truncation.  After `install`:
1. tl.dot multiplies the numbers and sums in float32;
2. casts to bfloat16 round to nearest even, as a GPU does, and casts from it go through float32;
3. other arithmetic and comparisons of bfloat16 raise: the kernel must cast to float32 first.  Reductions are not seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ORIGINAL = {name: getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "binary_op", "unary_op")}


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def numbers(handle: TensorHandle) -> Any:
    """The handle's array, bit patterns of bfloat16 as float32."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if is_bf16(handle) else handle.data


def round_to_bf16(array: Any) -> Any:
    """float32 to the bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype(np.uint16)


def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
    if is_bf16(a) or is_bf16(b):  # rule 1
        return TensorHandle(np.matmul(numbers(a), numbers(b), dtype=np.float32) + d.data, d.dtype.scalar)
    return ORIGINAL["create_dot"](self, a, b, d, *options)


def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
    if target.scalar == tl.bfloat16 and not is_bf16(source):  # rule 2
        return TensorHandle(round_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
    if is_bf16(source) and target.scalar != tl.bfloat16:
        source = TensorHandle(numbers(source), tl.float32)
    return ORIGINAL["cast_impl"](self, source, target)


def binary_op(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, operation: Any) -> TensorHandle:
    if is_bf16(left) or is_bf16(right):  # rule 3
        raise TypeError(f"{operation.__name__} of bfloat16 works on bit patterns in Triton's interpreter: cast to tl.float32 first")
    return ORIGINAL["binary_op"](self, left, right, operation)


def unary_op(self: InterpreterBuilder, handle: TensorHandle, operation: Any) -> TensorHandle:
    if is_bf16(handle):  # rule 3
        raise TypeError(f"{operation.__name__} of bfloat16 works on bit patterns in Triton's interpreter: cast to tl.float32 first")
    return ORIGINAL["unary_op"](self, handle, operation)


def install() -> None:
    for function in (create_dot, cast_impl, binary_op, unary_op):
        setattr(InterpreterBuilder, function.__name__, function)
