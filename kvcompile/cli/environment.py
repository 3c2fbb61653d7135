"""What `kvcompile env` tells: versions, processor, memory, compiler, cache."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from kvcompile import __version__
from kvcompile.ir.errors import KvcompileError
from kvcompile.models import cache
from kvcompile.report import format_bytes

# What a kernel may be made for; the rest of the flags change nothing here.
_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Facts in the order they are printed; what is not there is named as missing."""
    model, flags = _cpu()
    facts: dict[str, Any] = {
        "kvcompile": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton", "numpy")},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cpu flags": [flag for flag in _FLAGS if flag in flags] or ["none that matter"],
        "cores": _cores(),
        **_torch_facts(),
        "memory": _memory(),
        **_kernels(),
        "cache": f"{cache.root()} ({format_bytes(cache.size())})",
    }
    return facts


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"threads": torch.get_num_threads(), "gpu": device}


def _cpu() -> tuple[str, set[str]]:
    """Name and instruction sets, from /proc/cpuinfo (Linux) or sysctl (macOS)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or "unknown", set()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name") or platform.processor() or platform.machine(), set(
        (facts.get("flags") or facts.get("Features") or "").split()
    )


def _memory() -> str:
    try:
        return format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return "unknown"


def _kernels() -> dict[str, str]:
    """The compiler of the C++ kernels and what they are built for; codegen imports torch, which may be missing."""
    try:
        from kvcompile.codegen.toolchain import find_toolchain, machine_isa, why_none
    except ImportError:
        return {"compiler": "none looked for: torch is not installed"}
    try:
        found = find_toolchain()
    except KvcompileError as error:
        return {"compiler": f"none: {error}"}
    if found is None:
        return {"compiler": f"none: {why_none()}", "kernels": "torch"}
    return {"compiler": f"{found.command} ({found.version})", "kernels": f"C++, {machine_isa()}"}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
