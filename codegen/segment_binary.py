"""A segment as a binary: compiled once by AOTInductor, then loaded without a compiler (`kvcompile.runtime.segment`).

Weights stay inputs, so equal layers share one binary.  Activations are compiled as contiguous, weights for their strides.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kvcompile.codegen.toolchain import Toolchain
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.segment_description import TOKENS, SegmentDescription, TensorLayout, cpu_features, machine
from kvcompile.ir.tokens import fake_value, token_dimensions

MAX_TOKENS = 2**20
_EXAMPLE_TOKENS = 24  # an example of one token would make a binary for one token
_FORMAT = 1  # of keys and descriptions; a change of either, or of how segments are compiled, counts it up


def can_compile(toolchain: Toolchain) -> str | None:
    """Why AOTInductor cannot compile with this compiler here, in words; None when it can."""
    if sys.platform not in ("linux", "darwin"):
        return f"segments are compiled on Linux and macOS only, this is {platform.system()}"
    if toolchain.options:
        return f"AOTInductor takes a compiler without options, not CXX={toolchain.command} {' '.join(toolchain.options)}"
    return None


def compile_segment(segment: torch.fx.GraphModule, path: Path, toolchain: Toolchain, threads: int | None = None) -> SegmentDescription:
    """Compiles a segment that `outline_segments` made into the package `path` (*.pt2); takes 6 to 15 s.

    threads: that the binary's own loops run on, fixed in the binary (None: `torch.get_num_threads()`).
    Returns what the caller has to keep beside the package for `load_segment`.
    Raises UnsupportedGraphError where torch.export or AOTInductor fail on it.  Ask `can_compile` first.
    """
    assert path.suffix == ".pt2", path
    threads = threads or torch.get_num_threads()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.13 warns of its own deprecated names
            exported = _export(segment)
            _package(exported, path, toolchain, threads)
    except Exception as error:  # export, Inductor and the compiler raise dozens of classes; the caller sees one
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = f"AOTInductor cannot compile it: {type(error).__name__}: {reason}"
        raise UnsupportedGraphError(Problem(f"segment {path.stem}", what, "It runs without being compiled, more slowly.")) from error
    activations, weights = _split(segment)
    (output,) = segment.graph.find_nodes(op="output")
    return SegmentDescription(
        activations=tuple(_layout(node, strides=False) for node in activations),
        weights=tuple(_layout(node, strides=True) for node in weights),
        outputs=tuple(_layout(node, strides=False) for node in output.args[0]),
        most_tokens=_most_tokens(exported),
        torch=torch.__version__,
        machine=machine(),
        cpu_features=cpu_features(),
        threads=threads,
        compiler=toolchain.version,
    )


def segment_key(segment: torch.fx.GraphModule, toolchain: Toolchain, threads: int | None = None) -> str:
    """A hash of all that decides the binary: the same in every process, whatever nodes and layers are called.

    Covers the graph with dtypes, shapes and weights' strides, torch, the processor, the compiler, and our settings.
    """
    facts = [
        f"format {_FORMAT}",
        f"torch {torch.__version__}",
        f"cpu {machine()} {torch.backends.cpu.get_cpu_capability()} {' '.join(cpu_features())}",
        f"compiler {toolchain.kind} {toolchain.version}",
        f"settings {sorted(_settings(threads or torch.get_num_threads()).items())}",
        segment_text(segment),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def segment_text(segment: torch.fx.GraphModule) -> str:
    """The graph, one node a line, its nodes by number: equal texts compute the same."""
    numbers = {node: f"%{number}" for number, node in enumerate(segment.graph.nodes)}
    activations, _ = _split(segment)
    lines = []
    for node, number in numbers.items():
        if node.op == "placeholder":
            weight = node not in activations
            what = f"{'weight' if weight else 'activation'} {_value_text(fake_value(node), strides=weight)}"
        else:
            arguments = [_argument_text(argument, numbers) for argument in node.args]
            arguments += [f"{name}={_argument_text(argument, numbers)}" for name, argument in sorted(node.kwargs.items())]
            target = str(node.target) if isinstance(node.target, (str, torch._ops.OpOverload)) else getattr(node.target, "__name__", "")
            assert target, f"{node}: a target without a name"
            what = f"{target}({', '.join(arguments)}) {_value_text(fake_value(node))}"
        lines.append(f"{number} = {what}")
    return "\n".join(lines) + "\n"


def _argument_text(argument: Any, numbers: dict[torch.fx.Node, str]) -> str:
    if isinstance(argument, torch.fx.Node):
        return numbers[argument]
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_argument_text(item, numbers) for item in argument)}]"
    known = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    assert isinstance(argument, known), f"{argument!r}: its text may differ from process to process"
    return repr(argument)


def _value_text(value: Any, *, strides: bool = True) -> str:
    if isinstance(value, Tensor):
        text = f"{value.dtype}{[_size_text(size) for size in value.shape]}"
        return f"{text} strides {[_size_text(stride) for stride in value.stride()]}" if strides else text
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_value_text(item) for item in value)})"
    return _size_text(value) if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else "-"


def _size_text(size: Any) -> str:
    """A graph has one symbol; its number is an accident of the trace."""
    return re.sub(r"\bs\d+\b", TOKENS, str(size))


def _split(segment: torch.fx.GraphModule) -> tuple[list[torch.fx.Node], list[torch.fx.Node]]:
    """The placeholders that are activations and those that are weights; `outline_segments` says which by their names."""
    nodes = segment.graph.find_nodes(op="placeholder")
    count = sum(not node.name.startswith("weight") for node in nodes)
    assert all(node.name.startswith("weight") for node in nodes[count:]), "activations stand before weights"
    return nodes[:count], nodes[count:]


def _layout(node: torch.fx.Node, *, strides: bool) -> TensorLayout:
    value = fake_value(node)
    dims = token_dimensions(value)
    return TensorLayout(
        dtype=str(value.dtype).removeprefix("torch."),
        sizes=tuple(TOKENS if dim in dims else int(size) for dim, size in enumerate(value.shape)),
        strides=tuple(int(stride) for stride in value.stride()) if strides else None,
    )


class _Listed(nn.Module):
    """A segment that takes its inputs as one list."""

    def __init__(self, segment: torch.fx.GraphModule) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return self.segment(*inputs)  # type: ignore[no-any-return]


def _export(segment: torch.fx.GraphModule) -> ExportedProgram:
    activations, weights = _split(segment)
    values = [fake_value(node) for node in (*activations, *weights)]
    examples = [_example(value, strides=place >= len(activations)) for place, value in enumerate(values)]

    def export(tokens: Any) -> ExportedProgram:
        shapes = [dict.fromkeys(token_dimensions(value), tokens) or None for value in values]
        return torch.export.export(_Listed(segment), (examples,), dynamic_shapes=(shapes,), strict=False)

    try:
        return export(Dim(TOKENS, min=1, max=MAX_TOKENS))
    except torch._dynamo.exc.UserError:
        return export(Dim.DYNAMIC)  # a table of fewer rows bounds the number of tokens


def _example(value: Tensor, *, strides: bool) -> Tensor:
    """Numbers of no meaning; memory that is never touched, for a vocabulary's weights may take a gigabyte."""
    dims = token_dimensions(value)
    sizes = [_EXAMPLE_TOKENS if dim in dims else int(size) for dim, size in enumerate(value.shape)]
    if strides:
        return torch.empty_strided(sizes, [int(stride) for stride in value.stride()], dtype=value.dtype)
    return torch.zeros(sizes, dtype=value.dtype)


def _package(exported: ExportedProgram, path: Path, toolchain: Toolchain, threads: int) -> None:
    from torch._inductor import aoti_compile_and_package  # 2 s; only a compile pays for it

    settings = {**_settings(threads), "cpp.cxx": (toolchain.command,)}
    aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)


def _settings(threads: int) -> dict[str, Any]:
    """What we set of Inductor's configuration.

    cpp.threads: the number is written into the binary.  emulate_precision_casts: without it fused bfloat16 operations keep
    float32 between them, 5e-3 (root mean square, relative) from what the original model computes; with it, 0.
    """
    return {"cpp.threads": threads, "emulate_precision_casts": True}


def _most_tokens(exported: ExportedProgram) -> int:
    bounds = [int(bound.upper) for bound in exported.range_constraints.values() if str(bound.upper).isdecimal()]
    return min([MAX_TOKENS, *bounds])
