"""From plan and graph to what runs: kernels built, loaded and known to be there; what cannot be built runs in torch, and says so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kvcompile.codegen.build import Build
from kvcompile.codegen.cpp.render import graph_sources, launcher_sources, library_sources, lsh_sources, refusal, render
from kvcompile.codegen.segment_binary import can_compile, compile_segment, segment_key
from kvcompile.codegen.toolchain import BASE_FLAGS, Isa, Toolchain, find_toolchain, isa_flags, machine_isa, torch_flags, why_none
from kvcompile.codegen.triton import sources as triton_sources
from kvcompile.ir.errors import BuildError, KvcompileError, Problem, TargetError, UnsupportedGraphError
from kvcompile.ir.graph_facts import ROARGRAPH
from kvcompile.ir.linear_op import LINEARS
from kvcompile.ir.plan import Plan
from kvcompile.ir.policy import LookedUp, Sample
from kvcompile.ir.request import LinearRequest, Request
from kvcompile.ir.segment_description import SegmentDescription
from kvcompile.ir.spec import Spec
from kvcompile.ir.tokens import fake_value
from kvcompile.models import cache
from kvcompile.runtime.native import NO_KERNELS, NativeKernels, load_kernels, load_launcher
from kvcompile.runtime.native_graph import GraphLibrary, load_graphs
from kvcompile.runtime.native_lsh import LshLibrary, load_lsh
from kvcompile.runtime.program import EagerSegment, Program, Segment
from kvcompile.runtime.segment import load_segment

Stage = Callable[[str, str], contextlib.AbstractContextManager[None]]  # (name, line): around each long part
GEMV_TOKENS = 4  # linear layers of so many tokens read their weights once in a kernel of ours; more are torch's
_ISA_ORDER: tuple[Isa, ...] = ("portable", "avx2", "avx512")
_PACKAGE, _DESCRIPTION = "segment.pt2", "segment.json"


@dataclass(frozen=True)
class Linked:
    """A program ready to run.

    built:    hashes of all that was built for it, and the names of segments that run eagerly.
    warnings: what runs slower than it could, and why.
    """

    program: Program
    kernels: NativeKernels
    built: tuple[str, ...]
    warnings: tuple[str, ...]


def link(graph: torch.fx.GraphModule, plans: Iterable[Plan], spec: Spec, stage: Stage) -> Linked:
    """Builds, or finds in the cache, what the outlined graph and the plans ask for.

    plans: all that will run on the program.
    Raises TargetError where `target.isa` names instructions that this processor lacks, or $CXX does not work.
    """
    isa = _isa(spec)
    plans = tuple(plans)
    target = spec.target
    toolchain = find_toolchain() if (target.kernels, target.segments) != ("torch", "eager") else None
    warnings: list[str] = []
    built: list[str] = []
    if toolchain is None and (target.kernels, target.segments) != ("torch", "eager"):
        warnings.append(f"{why_none()}: everything runs in torch, uncompiled, which is slower. Install g++, or set CXX.")
    kernels, gemv = NO_KERNELS, {}
    if toolchain is not None and target.kernels == "generated":
        requests = _requests(graph, plans)
        refusals = sorted({words for request in requests if (words := refusal(request)) is not None})
        warnings += [f"{words}: torch runs instead, which is slower." for words in refusals]
        requests = [request for request in requests if refusal(request) is None]
        try:
            with stage("kernels", "building or loading kernels"):
                kernels = build_kernels(requests, isa, toolchain, warnings=warnings, built=built)
                gemv = {request.dtype: kernels.name(request.key) for request in requests if isinstance(request, LinearRequest)}
        except BuildError as error:
            warnings.append(f"the kernels could not be built, so torch runs instead, which is slower. {error}")
    if toolchain is not None and target.kernels == "generated" and any(isinstance(zone, Sample) for zone in _looked_up(plans)):
        try:
            with stage("hash tables", "building or loading the library of hash tables"):
                build_lsh(isa, toolchain, warnings=warnings, built=built)
        except BuildError as error:
            warnings.append(f"the library of hash tables could not be built, so torch looks into them, which is slower. {error}")
    if any(zone.index == ROARGRAPH.name for zone in _looked_up(plans)):
        with stage("graphs", "building or loading the library of graphs"):
            build_graphs(isa, _compiler_of_graphs(spec), warnings=warnings, built=built)
    segments = _segments(graph, gemv)
    loaded: dict[str, Segment] = {}
    if toolchain is not None and target.segments == "compiled":
        with stage("segments", _segments_line(segments, toolchain)):
            loaded = _compiled(segments, toolchain, warnings, built)
    for name, module in segments.items():
        if name not in loaded:
            loaded[name] = EagerSegment(module)
            built.append(f"{name} eager")
    return Linked(Program.from_graph(graph, loaded), kernels, tuple(built), tuple(warnings))


def _looked_up(plans: Iterable[Plan]) -> set[LookedUp]:
    """The zones whose keys an index finds."""
    zones = (group.policy.looked_up for plan in plans for site in plan.sites for group in site.groups)
    return {zone for zone in zones if zone is not None}


def _compiler_of_graphs(spec: Spec) -> Toolchain:
    """Graphs are built and walked in C++ whatever `target` says of kernels: there is no other version."""
    toolchain = find_toolchain()
    if toolchain is None:
        what = f"the index {ROARGRAPH.name} runs in C++ only, and {why_none()}."
        raise TargetError.at(spec.where("policies"), what, "Install g++, set CXX, or write index: sketch, which torch can run.")
    return toolchain


def build_graphs(
    isa: Isa,
    toolchain: Toolchain,
    extra_flags: tuple[str, ...] = (),
    *,
    warnings: list[str] | None = None,
    built: list[str] | None = None,
) -> GraphLibrary:
    """The library of graphs, built or found in the cache, and loaded: indexes use it from now on.  Options as of `build_kernels`."""
    graphs = Build("kvc_graphs", graph_sources(), BASE_FLAGS + isa_flags(isa) + extra_flags, toolchain, ("-pthread",))
    if built is not None:
        built.append(graphs.key)
    with _kept(graphs.key, partial(_build, graphs), "kernels", warnings) as folder:
        return load_graphs(folder / graphs.library)


def build_lsh(
    isa: Isa,
    toolchain: Toolchain,
    extra_flags: tuple[str, ...] = (),
    *,
    warnings: list[str] | None = None,
    built: list[str] | None = None,
) -> LshLibrary:
    """The library of hash tables, as `build_graphs`."""
    tables = Build("kvc_lsh", lsh_sources(), BASE_FLAGS + isa_flags(isa) + extra_flags, toolchain, ("-pthread",))
    if built is not None:
        built.append(tables.key)
    with _kept(tables.key, partial(_build, tables), "kernels", warnings) as folder:
        return load_lsh(folder / tables.library)


def kernel_sources(graph: torch.fx.GraphModule, plan: Plan) -> dict[str, str]:
    """The kernels that a plan and its outlined graph ask for, C++ or Triton, as text by file name; nothing is built."""
    asked = [request for site in plan.sites for group in site.groups for request in group.requests]
    requests = [request for request in _requests(graph, (plan,)) if refusal(request) is None] if _on_cpu(plan) else []
    return {**{source.name: source.text for source in map(render, requests)}, **triton_sources(asked)}


def _on_cpu(plan: Plan) -> bool:
    return any(group.device in ("cpu", "disk") for site in plan.sites for group in site.groups)


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
    wanted = {request.key: request for group in groups for request in group.requests if request.device == "cpu"}
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


def build_kernels(
    requests: Sequence[Request],
    isa: Isa,
    toolchain: Toolchain,
    extra_flags: tuple[str, ...] = (),
    *,
    warnings: list[str] | None = None,
    built: list[str] | None = None,
) -> NativeKernels:
    """The kernels of `requests`, built or found in the cache, and loaded.

    extra_flags: of the compiler, for launcher and kernels.  warnings, built: get a line for what could not be kept, and the
    hashes of what is loaded.
    """
    if not requests:
        return NO_KERNELS
    torch_compile, torch_link = torch_flags()
    flags = BASE_FLAGS + torch_compile + extra_flags
    launcher = Build("kvc_launcher", launcher_sources(), flags, toolchain, torch_link, (torch.__version__,))
    kernels = Build("kvc_kernels", library_sources(requests), BASE_FLAGS + isa_flags(isa) + extra_flags, toolchain)
    if built is not None:
        built += [launcher.key, kernels.key]
    with _kept(launcher.key, partial(_build, launcher), "launcher", warnings) as folder:
        load_launcher(folder / launcher.library)
    with _kept(kernels.key, partial(_build, kernels), "kernels", warnings) as folder:
        variant = int.from_bytes(hashlib.sha256(isa.encode()).digest()[:8])
        return load_kernels(folder / kernels.library, [request.key for request in requests], variant)


def _build(build: Build, folder: Path) -> None:
    try:
        build.into(folder, keep=cache.failed(build.key))
    except OSError as error:  # nothing could be kept of it either
        mend = "Set KVCOMPILE_CACHE_DIR to a folder that you may write to."
        raise BuildError.at(str(folder), f"{error.strerror or error}.", mend) from error


@contextlib.contextmanager
def _kept(key: str, build: Callable[[Path], None], kind: str, warnings: list[str] | None) -> Iterator[Path]:
    """The folder that `build` fills: of the cache, or where that cannot be written a temporary one."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(cache.use(key, build, what=f"the {kind}", kind=kind))
        except (BuildError, UnsupportedGraphError):
            raise
        except (KvcompileError, OSError) as error:  # read only, or full
            if warnings is not None:
                warnings.append(f"the {kind} cannot be kept and will be built again next time. {error}")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcompile-")))
            build(folder)
        yield folder


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


def _compiled(
    segments: Mapping[str, torch.fx.GraphModule], toolchain: Toolchain, warnings: list[str], built: list[str]
) -> dict[str, Segment]:
    """The segments that could be compiled; for the others a warning."""
    reason = can_compile(toolchain)
    if reason is not None:
        warnings.append(f"{reason}: segments run uncompiled, which is slower.")
        return {}
    loaded: dict[str, Segment] = {}
    for name, segment in segments.items():
        key = segment_key(segment, toolchain, _loop_threads())
        try:
            with _kept(key, partial(_compile, segment, toolchain), "segments", warnings) as folder:
                description = SegmentDescription.from_dict(json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8")))
                loaded[name] = load_segment(folder / _PACKAGE, description)
                built.append(key)
        except UnsupportedGraphError as error:
            warnings.append(f"{name} runs uncompiled, which is slower. {error}")
    return loaded


def _segments_line(segments: Mapping[str, torch.fx.GraphModule], toolchain: Toolchain) -> str:
    keys = [segment_key(segment, toolchain, _loop_threads()) for segment in segments.values()]
    missing = sum(not cache.has(key, "segments") for key in keys)
    return f"compiling {missing} of {len(keys)} segments, about 10 s each" if missing else f"loading {len(keys)} segments"


def _compile(segment: torch.fx.GraphModule, toolchain: Toolchain, folder: Path) -> None:
    description = compile_segment(segment, folder / _PACKAGE, toolchain, _loop_threads())
    (folder / _DESCRIPTION).write_text(json.dumps(description.as_dict()), encoding="utf-8")


def _loop_threads() -> int:
    """Threads of a segment's own loops (norms, rotations, activations), fixed in the binary.

    On 2 cores a parallel region costs a decode step 0.5 ms of 14 and gains a prompt 3 to 5 %: there the loops run on one.
    """
    threads = torch.get_num_threads()
    return threads if threads > 2 else 1
