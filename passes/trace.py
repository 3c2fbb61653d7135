"""Trace: a causal language model as one functional torch.fx graph, without a KV cache.

    forward(input_ids [1, tokens] int64, position_ids [1, tokens] int64) -> logits [1, tokens, vocabulary]

Batch is 1 and the token dimension is dynamic: all sessions' tokens are packed along it.  torch.export's graph may hold
in-place operators, on which every question about dataflow is silently wrong; such a graph is functionalised.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.evaluate import content_nodes, opname
from kvcompile.ir.tokens import fake_value, fixed_tokens, place_of, token_dimensions
from kvcompile.passes import huggingface
from kvcompile.passes.check_token_wise import Copies, token_mixing, why_mixes
from kvcompile.passes.fix_frequency_branch import refuse_dynamic_frequencies
from kvcompile.passes.route_densely import RouteDensely, settle_masks

EXAMPLE_TOKENS = 24  # an example of one token would specialise the graph to it
MAX_TOKENS = 1 << 20
_FIXED = "specialized it to be a constant"  # how torch.export says that a number of tokens was written into the graph
_FIXED_TOKENS = 13  # a size that nothing else in a model has


class FixedLengthError(UnsupportedGraphError):
    """The model's graph depends on how many tokens there are (a loop over them): no other front end will change that."""


class _HuggingFaceCall(nn.Module):
    """A transformers model; what its forward does not take by name (positions, caches) it is not given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        taken = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in taken and not _counts_its_own_positions(model)
        self.keywords = {"use_cache": False} if "use_cache" in taken else {}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        with RouteDensely():
            logits: Tensor = self.model(input_ids=input_ids, **positions, **self.keywords).logits
        return logits


def _counts_its_own_positions(model: nn.Module) -> bool:
    """Whether the model's own positions are not 0, 1, 2, ... but begin behind the padding token's number."""
    return any(hasattr(type(module), "create_position_ids_from_input_ids") for module in model.modules())


class PlainCall(nn.Module):
    """A module as it stands: forward(ids) or forward(ids, position_ids); an exported program may want them by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions(model)
        spec: Any = getattr(model, "_in_spec", None)
        names = list(spec.child(1).context) if spec is not None and spec.num_children == 2 else []
        self.names = names if set(names) <= {"input_ids", "position_ids"} else []

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if self.names:
            given = {"input_ids": input_ids, "position_ids": position_ids}
            out = self.model(**{name: given[name] for name in self.names})
        else:
            out = self.model(input_ids, position_ids) if self.takes_positions else self.model(input_ids)
        if isinstance(out, dict):
            out = out["logits"]  # transformers' outputs are dicts too
        logits: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return logits


class _RoutedPlainCall(PlainCall):
    """A plain module as it is traced."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        with RouteDensely():
            return super().forward(input_ids, position_ids)


FrontEnd: TypeAlias = Literal["interface", "sdpa", "eager", "plain"]


def front_ends(model: nn.Module) -> tuple[FrontEnd, ...]:
    """The ways to trace a model, in the order in which they are worth trying.

    interface: transformers' attention interface.  sdpa, eager: transformers' own implementations, whose products and masks are
    then recognised in the graph.  plain: a module as it stands.
    """
    return ("interface", "sdpa", "eager") if huggingface.is_huggingface(model) else ("plain",)


def trace(model: nn.Module, front_end: FrontEnd | None = None) -> torch.fx.GraphModule:
    """The graph of `model`, its parameters under their own names (`model.layers.0.mlp.up_proj.weight`).

    front_end: one of `front_ends(model)`; None is the first.
    The parameters are the model's own tensors, not copies; a model built under a FakeTensorMode gives a graph with
    fake parameters (`bind_weights` fills them in).
    Raises UnsupportedGraphError when torch.export cannot trace the model.
    """
    if model.training and not isinstance(model, torch.fx.GraphModule):  # a graph says itself what its dropouts do
        raise UnsupportedGraphError(Problem("trace", "the model is in training mode.", "Call model.eval() first."))
    refuse_dynamic_frequencies(getattr(model, "config", None))
    front_end = front_end or front_ends(model)[0]
    context: contextlib.AbstractContextManager[huggingface.MaskRecorder | None] = contextlib.nullcontext()
    call: nn.Module
    if front_end == "plain":
        call = _RoutedPlainCall(model)
    else:
        context = huggingface.attention_as_nodes(model) if front_end == "interface" else huggingface.own_attention(model, front_end)
        call = _HuggingFaceCall(model)
    with context as masks, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export warns of its own internals
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # of what `_attributes_kept` takes back
        with _attributes_kept(model):
            program = _export(call)
        if masks is not None:
            _check_windows(program, masks.windows)
        if any(_mutates(node) for node in program.graph.nodes):
            program = program.run_decompositions({})
    return _as_plain_graph(program)


def takes_positions(model: nn.Module) -> bool:
    """Whether a plain module's second argument is `position_ids`."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 and positional[1].name == "position_ids"


def _check_windows(program: ExportedProgram, asked: set[int]) -> None:
    """Every sliding window and chunk that the model's masks have must have reached an attention."""
    reached = {bound for node in program.graph.find_nodes(op="call_function", target=ATTEND) for bound in (node.args[6], *node.args[8:9])}
    if lost := asked - reached:
        raise UnsupportedGraphError(
            Problem(
                "trace",
                f"the model masks with a sliding window of {sorted(lost)} tokens but does not tell its attention.",
                "The window would be lost; the model cannot be compiled yet.",
            )
        )


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """While torch.export runs a forward that keeps tensors in plain attributes (LongRoPE's frequencies), it leaves fake ones there."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _export(call: nn.Module) -> ExportedProgram:
    device = _device(call)
    parameter = next(iter(call.parameters()), None)
    mode: Any = getattr(parameter, "fake_mode", None)
    with mode or contextlib.nullcontext():
        input_ids = torch.arange(EXAMPLE_TOKENS, device=device)[None] % 7 + 3
        position_ids = torch.arange(EXAMPLE_TOKENS, device=device)[None].contiguous()

        def export(tokens: Any, deferred: bool) -> ExportedProgram:
            shapes = {"input_ids": {1: tokens}, "position_ids": {1: tokens}}
            with contextlib.redirect_stderr(io.StringIO()):  # it prints the whole graph when it fails; the error says what is needed
                return torch.export.export(
                    call,
                    (input_ids, position_ids),
                    dynamic_shapes=shapes,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=deferred,
                )

        first: Exception | None = None
        for tokens, deferred in (
            (Dim("tokens", min=1, max=MAX_TOKENS), False),
            (Dim.DYNAMIC, False),  # a table of fewer rows bounds the number of tokens
            (Dim.DYNAMIC, True),  # a guard on the number of tokens (chunks, a slice of a mask) is checked when it runs
        ):
            try:
                program = export(tokens, deferred)
                (output,) = program.graph.find_nodes(op="output")
                if token_dimensions(fake_value(output.args[0][0])):
                    return program
                raise RuntimeError(_FIXED)  # it was exported for the example's length, without a word
            except UnsupportedGraphError:
                raise
            except Exception as error:  # torch.export raises dozens of classes; the user sees one
                first = first or error
                if _FIXED in str(error):
                    break
        assert first is not None
        reason = next((line.strip() for line in str(first).splitlines() if line.strip()), type(first).__name__)
        name = type(getattr(call, "model", call)).__name__
        what = f"torch.export could not trace {name}: {type(first).__name__}: {reason}"
        if _FIXED not in str(first):
            mend = "Its forward must be traceable for a varying number of tokens, without a KV cache."
            raise UnsupportedGraphError(Problem("trace", what, mend)) from first
        mixers = _mixers_of_fixed_length(call, device)
        if mixers:
            raise FixedLengthError(*mixers) from first
        mend = "Take sizes from `ids.shape[1]`; a program of torch.export needs dynamic_shapes={1: torch.export.Dim('tokens')}."
        what = f"torch.export could not trace {name}: it is fixed to one number of tokens."
        raise FixedLengthError(Problem("trace", what, mend)) from first


def _mixers_of_fixed_length(call: nn.Module, device: torch.device) -> list[Problem]:
    """What mixes tokens in a model that cannot be traced for a varying number of them: it is traced for one number, to name it."""
    ids, positions = (torch.arange(_FIXED_TOKENS, device=device)[None] for _ in range(2))
    try:
        program = torch.export.export(call, (ids % 7 + 3, positions.contiguous()), strict=False).run_decompositions({})
        graph = _as_plain_graph(program).graph
    except Exception:  # it cannot be traced at all, which the user knows already
        return []
    input_ids = next(iter(graph.find_nodes(op="placeholder")), None)
    if input_ids is None:
        return []
    content = content_nodes(graph, input_ids)
    copies: Copies = {}
    with fixed_tokens(_FIXED_TOKENS):
        found = ((node, why_mixes(node, copies)) for node in graph.nodes if node in content and not _attends(node))
        return [token_mixing(node, why) for node, why in found if why][:1]


def _attends(node: torch.fx.Node) -> bool:
    """Whether a node belongs to an attention as any front end would find it: pairs of tokens, or their softmax and sdpa."""
    pairs = [each for each in (node, *node.all_input_nodes) if len(token_dimensions(fake_value(each))) > 1]
    return bool(pairs) or opname(node) in ("scaled_dot_product_attention", "softmax", "_softmax")


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _as_plain_graph(program: ExportedProgram) -> torch.fx.GraphModule:
    """Undo export's wrapping: the plain signature, the model's own names, no guards."""
    unlifted = program.module(check_guards=False)
    graph = unlifted.graph
    for node in list(graph.nodes):
        if "_assert" in str(node.target) or (node.op == "call_module" and "_guards" in str(node.target)):
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        if node.args[2] and node.args[1]:
            raise UnsupportedGraphError(
                Problem(f"trace: {place_of(node)}", "the graph draws a dropout.", "Trace or export the model after model.eval().")
            )
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    settle_masks(graph)
    _drop_empty_parts(graph)
    graph.set_codegen(CodeGen())
    (output,) = graph.find_nodes(op="output")
    result = output.args[0]
    output.args = (result[0] if isinstance(result, (tuple, list)) else result,)
    owner = nn.Module()
    for node in list(graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.erase_node(node)
            continue
        _refuse_subgraph(node)
        tensor = _get(unlifted, node.target)
        node.target = node.target.removeprefix("model.")
        _set(owner, node.target, tensor)
    module = torch.fx.GraphModule(owner, graph, class_name="Traced")
    module.graph.eliminate_dead_code()
    module.recompile()
    module.eval()
    return module


def _drop_empty_parts(graph: torch.fx.Graph) -> None:
    """cat([nothing, x]) -> x: a cache that a forward makes for itself begins empty."""
    for target in (torch.ops.aten.cat.default, torch.ops.aten.concat.default):
        for node in graph.find_nodes(op="call_function", target=target):
            parts: Any = node.args[0]
            held = [part for part in parts if [*fake_value(part).shape] != [0]]
            if len(held) == 1 < len(parts) and fake_value(held[0]).dtype == fake_value(node).dtype:
                node.replace_all_uses_with(held[0])
                graph.erase_node(node)


def _refuse_subgraph(node: torch.fx.Node) -> None:
    """A weight is a tensor; an operator over sub-graphs (cond, scan, autocast, checkpoint) holds modules instead."""
    owner: Any = node.graph.owning_module
    for part in node.target.split("."):  # type: ignore[union-attr]
        owner = getattr(owner, part)
    if isinstance(owner, Tensor):
        return
    operators = ", ".join(sorted({getattr(user.target, "__name__", str(user.target)) for user in node.users}))
    raise UnsupportedGraphError(
        Problem(
            f"trace: {place_of(node)}",
            f"the model's forward uses {operators}, which holds a graph of its own.",
            "Take autocast, enable_grad, checkpointing and data-dependent control flow out of forward.",
        )
    )


def bind_weights(graph: torch.fx.GraphModule, model: nn.Module) -> bool:
    """Give a graph traced from fake weights the real ones of `model`, by name.

    False, and nothing changed, when the graph holds a constant that the model does not name, or names with another
    shape or dtype: trace the real model.
    """
    targets = {node.target for node in graph.graph.find_nodes(op="get_attr")}
    try:
        tensors = {target: _get(model, target) for target in targets}
    except AttributeError:
        return False
    for target, tensor in tensors.items():
        traced = _get(graph, target)
        if (traced.shape, traced.dtype) != (tensor.shape, tensor.dtype):
            return False
    for target, tensor in tensors.items():
        _set(graph, target, tensor)
    return True


def _get(root: nn.Module, target: str) -> Tensor:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):  # `bias = None`
        raise AttributeError(target)
    return value


def _set(root: nn.Module, target: str, tensor: Tensor) -> None:
    *path, leaf = target.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if hasattr(module, leaf):
        delattr(module, leaf)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)
