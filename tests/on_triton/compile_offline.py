"""Compiles a request's kernels for a GPU that need not be here and prints, as JSON, what each costs.

    python compile_offline.py 90 '{"kind": "attend_spans", "device": "cuda", "head_dim": 128, ...}' FOLDER

A process of its own for each: a bug in Triton can abort it.  Arguments are tensors on torch's device "meta", so that types,
divisibility by 16 and the values 1 are inferred as a launch infers them; without them the kernel spills.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kvcompile.codegen.triton import render_decode
from kvcompile.codegen.triton.decode import tile_of
from kvcompile.ir.request import KernelRequest
from kvcompile.runtime.triton_attend import load

KV_HEADS, ITEMS = 8, 40


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(request: KernelRequest) -> dict[str, tuple[object, ...]]:
    """Those of a launch, by kernel."""
    store, group, dim = getattr(torch, request.store_dtype), request.queries_per_kv, request.value_dim
    parts = meta((ITEMS, group, dim), torch.float32), meta((ITEMS, group), torch.float32)
    keys, values = meta((KV_HEADS, 4096, request.head_dim), store), meta((KV_HEADS, 4096, dim), store)
    query = meta((1, KV_HEADS, group, request.head_dim), getattr(torch, request.dtype))
    work, first = meta((ITEMS, 7), torch.int64), meta((KV_HEADS + 1,), torch.int32)
    sinks = (meta((KV_HEADS, group), torch.float32), KV_HEADS) if request.learnt_sinks else ()
    out, lse = meta((1, KV_HEADS, group, dim), torch.float32), meta((1, KV_HEADS, group), torch.float32)
    vector = tile_of(request).vector
    return {
        "attend_spans": (query, keys, values, work, *parts, request.head_dim // vector, dim // vector),
        "merge_parts": (*parts, first, *sinks, out, lse),
    }


def compile_kernel(function: triton.JITFunction, given: tuple[object, ...], arch: int, **options: int) -> dict[str, int]:
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    words = {**options, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialisation, _ = bind(*given, **words)
    chosen, signature, constants, attributes = function._pack_args(backend, words, bound, specialisation, None)
    source = ASTSource(function, signature, constants, attributes)
    return cost(triton.compile(source, target=target, options=chosen.__dict__), arch)


def cost(compiled: triton.compiler.CompiledKernel, arch: int) -> dict[str, int]:
    """From what ptxas says of the PTX: `n_regs` and `n_spills` would need the device."""
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", "-o", "/dev/null", "/dev/stdin"]
    said = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True, check=True).stderr
    stack, stores, loads = (int(number) for number in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)[:3])
    [registers] = re.findall(r"Used (\d+) registers", said)
    return {
        "registers": int(registers),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": stores + loads,
        "stack_bytes": stack,
        "asynchronous_copies": len(re.findall(r"\bcp\.async\.c[ag]\b", compiled.asm["ptx"])),
    }


def main() -> None:
    arch, request = int(sys.argv[1]), KernelRequest(**json.loads(sys.argv[2]))
    module = load(render_decode(request), Path(sys.argv[3]))
    given = arguments(request)
    chosen = {"attend_spans": {"num_warps": module.NUM_WARPS, "num_stages": module.NUM_STAGES}, "merge_parts": {}}
    costs = {name: compile_kernel(getattr(module, name), given[name], arch, **chosen[name]) for name in given}
    print(json.dumps({"triton": triton.__version__, "kernels": costs}))


if __name__ == "__main__":
    main()
