"""Loading and calling a compiled segment: needs torch alone, no compiler, and unpickles nothing.

The binary believes its caller.  What it would not notice is checked here, because the result would be wrong numbers:
1. a binary for another torch, or for instructions that this processor lacks, is refused when it is loaded;
2. weights are checked when they are bound, activations at every call: another dtype or shape is refused,
   other strides are copied into those that the binary was compiled for.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvcompile.ir.linear_op  # noqa: F401  # binaries call this operator by name
from kvcompile.ir.errors import KvcompileError, SessionError, TargetError
from kvcompile.ir.segment_description import TOKENS, SegmentDescription, TensorLayout, cpu_features, machine

BoxedRun = Callable[[list[Tensor]], list[Tensor]]

# AOTInductor's words for what it vectorised for, and the flags of /proc/cpuinfo that they stand for.
_ISA_FLAGS = {
    "AVX2": {"avx2", "fma", "f16c"},
    "AVX512": {"avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"},
    "AVX512_VNNI": {"avx512_vnni"},
    "AMX_TILE": {"amx_tile", "amx_bf16", "amx_int8"},
    "ASIMD": {"asimd"},
    "NEON": set(),
    "INVALID_VEC_ISA": set(),  # plain loops
}
_COMPILE_AGAIN = "Compile the model again on this machine."


@dataclass(frozen=True)
class LoadedSegment:
    """A loaded binary.  name: for error texts."""

    name: str
    description: SegmentDescription
    run: BoxedRun

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The segment's outputs; `inputs` are the activations, then the weights, which are checked anew (see `bind`).

        Raises SessionError where one has another dtype or shape than the segment was compiled for.
        """
        count = len(self.description.activations)
        return self.bind(inputs[count:])(*inputs[:count])

    def bind(self, weights: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """The segment with one layer's weights, a function of the activations alone.

        Weights of other strides are copied, once.  Raises SessionError where one has another dtype or shape.
        """
        expected = self.description.weights
        if len(weights) != len(expected):
            raise SessionError.at(self.name, f"{len(weights)} weights where {len(expected)} are expected.", _COMPILE_AGAIN)
        fitted = []
        for number, (weight, layout) in enumerate(zip(weights, expected, strict=True)):
            if not weight.is_cpu or weight.dtype is not _dtype(layout) or tuple(weight.shape) != layout.sizes:
                raise _misfit(f"{self.name}: weight {number}", weight, layout)
            if layout.strides is not None and not _same_strides(weight, layout.strides):
                weight = torch.empty_strided(weight.shape, layout.strides, dtype=weight.dtype).copy_(weight)
            fitted.append(weight.detach())
        return _bound(self.name, self.description, self.run, fitted)


def load_segment(path: Path, description: SegmentDescription) -> LoadedSegment:
    """The segment that `compile_segment` put into the package `path`, ready to be bound to weights.

    Raises TargetError for a binary of another torch or processor, KvcompileError for a package that cannot be read.
    """
    _refuse_other_machines(path, description, _package_isa(path))
    try:
        run = _boxed_run(path)
    except RuntimeError as error:
        raise _damaged(path, str(error).partition("\n")[0]) from error
    return LoadedSegment(f"segment {path.stem}", description, run)


def _bound(name: str, description: SegmentDescription, run: BoxedRun, weights: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Rule 2 for activations.  Runs 30 times a token: everything that can be known before is."""
    layouts = description.activations
    counted, token_dim = next((place, layout.sizes.index(TOKENS)) for place, layout in enumerate(layouts) if TOKENS in layout.sizes)
    wanted = [(_dtype(layout), *_around(layout)) for layout in layouts]
    most_tokens = description.most_tokens

    def call(*activations: Tensor) -> tuple[Tensor, ...]:
        if len(activations) != len(wanted):
            raise SessionError.at(name, f"{len(activations)} activations where {len(wanted)} are expected.", _COMPILE_AGAIN)
        shape = activations[counted].shape
        tokens = shape[token_dim] if len(shape) > token_dim else 0
        inputs: list[Tensor] = []
        for activation, (dtype, front, has_tokens, back) in zip(activations, wanted, strict=True):
            sizes = (*front, tokens, *back) if has_tokens else front
            if activation.dtype is not dtype or activation.shape != sizes or not activation.is_cpu:
                place = len(inputs)
                raise _misfit(f"{name}: activation {place}", activation, layouts[place])
            inputs.append(activation if activation.is_contiguous() else activation.contiguous())
        if not 0 < tokens <= most_tokens:
            raise SessionError.at(name, f"{tokens} tokens in one call.", f"Call it with 1 to {most_tokens} tokens.")
        inputs += weights
        return tuple(run(inputs))

    return call


def _around(layout: TensorLayout) -> tuple[tuple[int | str, ...], bool, tuple[int | str, ...]]:
    """The sizes in front of the token dimension, whether there is one, the sizes behind."""
    if TOKENS not in layout.sizes:
        return layout.sizes, False, ()
    place = layout.sizes.index(TOKENS)
    return layout.sizes[:place], True, layout.sizes[place + 1 :]


def _dtype(layout: TensorLayout) -> torch.dtype:
    dtype = getattr(torch, layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _same_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Along a dimension of one element every stride is right."""
    return all(size == 1 or one == other for size, one, other in zip(tensor.shape, tensor.stride(), strides, strict=True))


def _misfit(where: str, found: Tensor, layout: TensorLayout) -> SessionError:
    dtype = str(found.dtype).removeprefix("torch.")
    got = f"{dtype}[{', '.join(map(str, found.shape))}] on {found.device.type}"
    return SessionError.at(where, f"{got} where {layout.dtype}[{', '.join(map(str, layout.sizes))}] on cpu is expected.", _COMPILE_AGAIN)


def _refuse_other_machines(path: Path, description: SegmentDescription, isa: str) -> None:
    """Rule 1."""
    if description.torch != torch.__version__:
        what = f"it was compiled for torch {description.torch}, this is torch {torch.__version__}."
        raise TargetError.at(str(path), what, _COMPILE_AGAIN)
    if description.machine != machine():
        raise TargetError.at(str(path), f"it was compiled for {description.machine}, this is {machine()}.", _COMPILE_AGAIN)
    present = set(cpu_features())
    unknown = [word for word in isa.split() if word not in _ISA_FLAGS]
    if unknown:
        raise TargetError.at(str(path), f"it was compiled for {isa}, which this version of kvcompile does not know.", _COMPILE_AGAIN)
    needed = set(description.cpu_features)
    if Path("/proc/cpuinfo").exists():  # elsewhere the features are not named one by one
        needed = needed.union(*(_ISA_FLAGS[word] for word in isa.split()))
    missing = sorted(needed - present)
    if missing:
        what = f"it was compiled for a processor with {', '.join(missing)}, which this one lacks."
        raise TargetError.at(str(path), what, _COMPILE_AGAIN)


def _package_isa(path: Path) -> str:
    """What the package itself says it was vectorised for, read before anything of it is run."""
    try:
        with zipfile.ZipFile(path) as package:
            names = [name for name in package.namelist() if name.endswith("_metadata.json")]
            found = {str(json.loads(package.read(name))["AOTI_CPU_ISA"]) for name in names}
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    if not found:
        raise _damaged(path, "it does not say what processor it was compiled for")
    return " ".join(sorted(found))


def _boxed_run(path: Path) -> BoxedRun:
    """Through torch's C++ loader alone: importing torch._inductor, where the public `aoti_load_package` lives, takes 2 s."""
    loader: Any = getattr(getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader", None)
    if loader is not None:
        try:
            return loader(str(path), "model", False, 1, -1).boxed_run  # type: ignore[no-any-return]
        except TypeError:
            pass  # another signature than torch 2.11 to 2.13 have
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path)).loader.boxed_run


def _damaged(path: Path, reason: str) -> KvcompileError:
    return KvcompileError.at(str(path), f"the compiled segment cannot be read: {reason}.", "Remove it; it is compiled again.")
