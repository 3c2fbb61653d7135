"""Trace: a causal language model as one functional torch.fx graph, without a KV cache.

    forward(input_ids [1, tokens] int64, position_ids [1, tokens] int64) -> logits [1, tokens, vocabulary]

Batch is 1 and the token dimension is dynamic: all sessions' tokens are packed along it.  torch.export's graph may hold
in-place operators, on which every question about dataflow is silently wrong; such a graph is functionalised.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.tokens import path_of
from kvcompile.passes import huggingface

EXAMPLE_TOKENS = 24  # an example of one token would specialise the graph to it
MAX_TOKENS = 1 << 20


class _HuggingFaceCall(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits


class _PlainCall(nn.Module):
    def __init__(self, model: nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        out = self.model(input_ids, position_ids) if self.takes_positions else self.model(input_ids)
        logits: Tensor = out[0] if isinstance(out, tuple) else out
        return logits


def trace(model: nn.Module) -> torch.fx.GraphModule:
    """The graph of `model`, its parameters under their own names (`model.layers.0.mlp.up_proj.weight`).

    The parameters are the model's own tensors, not copies; a model built under a FakeTensorMode gives a graph with
    fake parameters (`bind_weights` fills them in).
    Raises UnsupportedGraphError when torch.export cannot trace the model.
    """
    if model.training:
        raise UnsupportedGraphError(Problem("trace", "the model is in training mode.", "Call model.eval() first."))
    context: contextlib.AbstractContextManager[huggingface.MaskRecorder | None] = contextlib.nullcontext()
    call: nn.Module
    if huggingface.is_huggingface(model):
        context = huggingface.attention_as_nodes(model)
        call = _HuggingFaceCall(model)
    else:
        call = _PlainCall(model, takes_positions(model))
    with context as masks, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export warns of its own internals
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
    """Every sliding window that the model's masks have must have reached an attention."""
    reached = {node.args[6] for node in program.graph.find_nodes(op="call_function", target=ATTEND)}
    if lost := asked - reached:
        raise UnsupportedGraphError(
            Problem(
                "trace",
                f"the model masks with a sliding window of {sorted(lost)} tokens but does not tell its attention.",
                "The window would be lost; the model cannot be compiled yet.",
            )
        )


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

        def export(tokens: Any) -> ExportedProgram:
            shapes = {"input_ids": {1: tokens}, "position_ids": {1: tokens}}
            return torch.export.export(call, (input_ids, position_ids), dynamic_shapes=shapes, strict=False)

        try:
            try:
                return export(Dim("tokens", min=1, max=MAX_TOKENS))
            except torch._dynamo.exc.UserError:
                return export(Dim.DYNAMIC)  # a table of fewer rows bounds the number of tokens
        except UnsupportedGraphError:
            raise
        except Exception as error:  # torch.export raises dozens of classes; the user sees one
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnsupportedGraphError(
                Problem(
                    "trace",
                    f"torch.export could not trace {type(getattr(call, 'model', call)).__name__}: {type(error).__name__}: {reason}",
                    "Its forward must be traceable for a varying number of tokens, without a KV cache.",
                )
            ) from error


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
            f"trace: {path_of(node) or node.name}",
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
