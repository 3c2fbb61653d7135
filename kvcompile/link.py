"""From plan and graph to what runs: kernels built, loaded and known to be there; what cannot be built runs in torch, and says so."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcompile.codegen.build import Build
from kvcompile.codegen.cpp.render import launcher_sources, library_sources, refusal, render
from kvcompile.codegen.segment_binary import can_compile, compile_segment, segment_key
from kvcompile.codegen.toolchain import BASE_FLAGS, Isa, Toolchain, find_toolchain, isa_flags, machine_isa, torch_flags, why_none
from kvcompile.codegen.triton import sources as triton_sources
from kvcompile.ir.errors import BuildError, KvcompileError, Problem, TargetError, UnsupportedGraphError
from kvcompile.ir.linear_op import LINEARS
from kvcompile.ir.plan import Plan
from kvcompile.ir.request import LinearRequest, Request
from kvcompile.ir.segment_description import SegmentDescription
from kvcompile.ir.spec import Spec
from kvcompile.ir.tokens import fake_value
from kvcompile.models import cache
from kvcompile.runtime.native import NO_KERNELS, NativeKernels, load_kernels, load_launcher
from kvcompile.runtime.program import EagerSegment, Program, Segment
from kvcompile.runtime.segment import load_segment

Stage = Callable[[str, str], contextlib.AbstractContextManager[None]]  # (name, line): around each long part
GEMV_TOKENS = 4  # linear layers of so many tokens read their weights once in a kernel of ours; more are torch's
_ISA_ORDER: tuple[Isa, ...] = ("portable", "avx2", "avx512")
_PACKAGE, _DESCRIPTION = "segment.pt2", "segment.json"


@dataclass(frozen=True)
class Linked:
    """A program ready to run.  warnings: what runs slower than it could, and why."""

    program: Program
    kernels: NativeKernels
    warnings: tuple[str, ...]


def link(graph: torch.fx.GraphModule, plans: Iterable[Plan], spec: Spec, stage: Stage) -> Linked:
    """Builds, or finds in the cache, what the outlined graph and the plans ask for.

    plans: all that will run on the program.
    Raises TargetError where `target.isa` names instructions that this processor lacks.
    """
    isa = _isa(spec)
    requests = _requests(graph, plans)
    refusals = sorted({words for request in requests if (words := refusal(request)) is not None})
    warnings = [f"{words}; it runs in torch, which is slower." for words in refusals]
    requests = [request for request in requests if refusal(request) is None]
    kernels, gemv = NO_KERNELS, {}
    if spec.target.kernels == "torch":
        toolchain = None
    else:
        toolchain = find_toolchain()
        if toolchain is None:
            warnings = [f"{why_none()}: attention and linear layers run in torch, which is slower. Install g++, or set CXX."]
    if toolchain is not None:
        try:
            with stage("kernels", "building kernels"):
                kernels = build_kernels(requests, isa, toolchain)
                gemv = {request.dtype: kernels.name(request.key) for request in requests if isinstance(request, LinearRequest)}
        except BuildError as error:
            warnings.append(f"the kernels could not be built, so torch runs instead, which is slower. {error}")
    segments = _segments(graph, gemv)
    if spec.target.segments == "compiled" and toolchain is not None:
        with stage("segments", "compiling segments"):
            loaded, notes = _compiled(segments)
        warnings += notes
    else:
        loaded = {name: EagerSegment(module) for name, module in segments.items()}
    return Linked(Program.from_graph(graph, loaded), kernels, tuple(warnings))


def kernel_sources(graph: torch.fx.GraphModule, plan: Plan) -> dict[str, str]:
    """The kernels that a plan and its outlined graph ask for, C++ or Triton, as text by file name; nothing is built."""
    asked = [group.request for site in plan.sites for group in site.groups if group.request is not None]
    requests = [request for request in _requests(graph, (plan,)) if refusal(request) is None] if _on_cpu(plan) else []
    return {**{source.name: source.text for source in map(render, requests)}, **triton_sources(asked)}


def _on_cpu(plan: Plan) -> bool:
    return any(group.device == "cpu" for site in plan.sites for group in site.groups)


def _isa(spec: Spec) -> Isa:
    offered = machine_isa()
    isa = spec.target.isa or offered
    if _ISA_ORDER.index(isa) > _ISA_ORDER.index(offered):
        raise TargetError(
            Problem(
                spec.where("target.isa"),
                f"this processor does not run {isa}.",
                f"Leave it out, or write one of {', '.join(_ISA_ORDER[: _ISA_ORDER.index(offered) + 1])}.",
            )
        )
    return isa


def _requests(graph: torch.fx.GraphModule, plans: Iterable[Plan]) -> list[Request]:
    """Every request once, by content hash; those of the linear layers are the last."""
    groups = [group for plan in plans for site in plan.sites for group in site.groups]
    wanted = {group.request.key: group.request for group in groups if group.request is not None and group.device == "cpu"}
    linears = [LinearRequest("linears", "cpu", dtype, GEMV_TOKENS) for dtype in sorted(_linear_dtypes(graph))]
    return [*(request for _, request in sorted(wanted.items())), *linears]


def _linear_dtypes(graph: torch.fx.GraphModule) -> set[str]:
    return {
        _dtype_of(node)
        for segment in graph.children()
        if isinstance(segment, torch.fx.GraphModule)
        for node in segment.graph.find_nodes(op="call_function", target=LINEARS)
    }


def _dtype_of(node: torch.fx.Node) -> str:
    return str(fake_value(node).dtype).removeprefix("torch.")


def build_kernels(requests: Sequence[Request], isa: Isa, toolchain: Toolchain, extra_flags: tuple[str, ...] = ()) -> NativeKernels:
    """The kernels of `requests`, built or found in the cache, and loaded; extra_flags: of the compiler, for launcher and kernels."""
    if not requests:
        return NO_KERNELS
    torch_compile, torch_link = torch_flags()
    flags = BASE_FLAGS + torch_compile + extra_flags
    launcher = Build("kvc_launcher", launcher_sources(), flags, toolchain, torch_link, (torch.__version__,))
    with _built(launcher, "launcher") as path:
        load_launcher(path)
    kernels = Build("kvc_kernels", library_sources(requests), BASE_FLAGS + isa_flags(isa) + extra_flags, toolchain)
    with _built(kernels, "kernels") as path:
        variant = int.from_bytes(hashlib.sha256(isa.encode()).digest()[:8])
        return load_kernels(path, [request.key for request in requests], variant)


@contextlib.contextmanager
def _built(build: Build, kind: str) -> Iterator[Path]:
    with cache.use(build.key, lambda folder: build.into(folder, keep=cache.failed(build.key)), what=f"the {kind}", kind=kind) as folder:
        yield folder / build.library


def _segments(graph: torch.fx.GraphModule, gemv: Mapping[str, str]) -> dict[str, torch.fx.GraphModule]:
    """The distinct segments; gemv: by dtype the kernel that their linear layers call, torch's where there is none."""
    found = {}
    for name in dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="call_module")):
        segment = graph.get_submodule(name)
        assert isinstance(segment, torch.fx.GraphModule)
        found[name] = _with_kernels(segment, gemv)
    return found


def _with_kernels(segment: torch.fx.GraphModule, gemv: Mapping[str, str]) -> torch.fx.GraphModule:
    """The same segment, its linear layers calling kernels."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(segment.graph, {}))
    for node in graph.find_nodes(op="call_function", target=LINEARS):
        dtype = _dtype_of(node)
        if dtype in gemv:
            node.target = torch.ops.kvc_native.linears.default
            node.args = (*node.args, gemv[dtype])
    return torch.fx.GraphModule(segment, graph, class_name="Segment")


def _compiled(segments: dict[str, torch.fx.GraphModule]) -> tuple[dict[str, Segment], list[str]]:
    reason = can_compile()
    if reason is not None:
        return {name: EagerSegment(module) for name, module in segments.items()}, [f"{reason}: segments run uncompiled, which is slower."]
    loaded: dict[str, Segment] = {}
    notes = []
    for name, segment in segments.items():
        try:
            loaded[name] = _compiled_segment(segment)
        except (UnsupportedGraphError, KvcompileError) as error:
            loaded[name] = EagerSegment(segment)
            notes.append(f"{name} runs uncompiled, which is slower. {error}")
    return loaded, notes


def _loop_threads() -> int:
    """Threads of a segment's own loops (norms, rotations, activations), fixed in the binary.

    On 2 cores a parallel region costs a decode step 0.5 ms of 14 and gains a prompt 3 to 5 %: there the loops run on one.
    """
    threads = torch.get_num_threads()
    return threads if threads > 2 else 1


def _compiled_segment(segment: torch.fx.GraphModule) -> Segment:
    def build(folder: Path) -> None:
        description = compile_segment(segment, folder / _PACKAGE, _loop_threads())
        (folder / _DESCRIPTION).write_text(json.dumps(description.as_dict()), encoding="utf-8")

    with cache.use(segment_key(segment, _loop_threads()), build, what="a compiled segment", kind="segments") as folder:
        description = SegmentDescription.from_dict(json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8")))
        return load_segment(folder / _PACKAGE, description)
