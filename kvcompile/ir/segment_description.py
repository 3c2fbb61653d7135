"""What a compiled segment expects of its caller and of the machine, as JSON beside the binary.

A binary that AOTInductor made checks none of it: another stride, shape or processor gives wrong numbers, not an error.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TOKENS = "tokens"  # stands for the number of tokens of the call among a layout's sizes

# Flags of /proc/cpuinfo that name instructions a compiler may choose by itself under -march=native; the rest are the kernel's.
_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|adx|aes|vaes|v?pclmul|gfni|sha_ni|rdrand|rdseed|clwb|cldemote|movdiri|serialize"
    r"|asimd|fp$|fphp|sve|sme\d*$|bf16|i8mm|crc32|atomics|dotprod|lrcpc)"
)


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a segment's border.

    dtype:   "bfloat16".
    sizes:   numbers, and TOKENS for the token dimension.
    strides: of a weight; None means contiguous (and of an output that nothing is promised).
    """

    dtype: str
    sizes: tuple[int | str, ...]
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SegmentDescription:
    """A compiled segment's border and the machine it was compiled for.

    activations, weights: the inputs in their order, activations first.
    most_tokens:  calls take 1 to this many tokens.
    torch:        the version whose libraries the binary was compiled against.
    machine:      `platform.machine()`.
    cpu_features: the instruction sets of the compiling processor (`cpu_features()`); -march=native may have used any of them.
    threads:      threads that the binary's loops run on.
    compiler:     the first line of `$CXX --version`, "" when it does not tell.
    """

    activations: tuple[TensorLayout, ...]
    weights: tuple[TensorLayout, ...]
    outputs: tuple[TensorLayout, ...]
    most_tokens: int
    torch: str
    machine: str
    cpu_features: tuple[str, ...]
    threads: int
    compiler: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> SegmentDescription:
        """The description that `as_dict` wrote, from JSON too.  Raises KeyError or TypeError on anything else."""
        borders = {name: tuple(_layout(entry) for entry in kept[name]) for name in ("activations", "weights", "outputs")}
        return cls(**{**kept, **borders, "cpu_features": tuple(kept["cpu_features"])})


def _layout(kept: Mapping[str, Any]) -> TensorLayout:
    strides = kept["strides"]
    return TensorLayout(kept["dtype"], tuple(kept["sizes"]), None if strides is None else tuple(strides))


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The instruction sets of this processor, sorted, as Linux names them; elsewhere torch's word for it, such as ("avx512",)."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return (torch.backends.cpu.get_cpu_capability().lower(),)
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return tuple(sorted(flag for flag in (found[1].split() if found else ()) if _INSTRUCTIONS.match(flag)))


def machine() -> str:
    """The processor's family, `x86_64` or `aarch64`."""
    return platform.machine()
