"""Check token-wise: with its sites removed, the model is a function of one token.

A session keeps only keys and values; any other way in which one token reaches another would be lost without a word.
The operators that work *along* a dimension are listed with the argument that names it; a path over the token dimension
is reported by its first node.  Verification then runs the compiled model one token at a time against the original,
which finds what a list of operators can not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.show import node_text
from kvcompile.ir.tokens import fake_value, path_of, token_dimensions
from kvcompile.ir.unit import Unit

# operators along one dimension, and where their schema puts it
_ALONG_ARGUMENT: dict[str, int] = {
    "softmax": 1,
    "_softmax": 1,
    "log_softmax": 1,
    "_log_softmax": 1,
    "cumsum": 1,
    "cumprod": 1,
    "cummax": 1,
    "cummin": 1,
    "logcumsumexp": 1,
    "diff": 2,
    "flip": 1,
    "roll": 2,
    "sort": 1,
    "topk": 2,
    "sum": 1,
    "mean": 1,
    "amax": 1,
    "amin": 1,
    "prod": 1,
    "var": 1,
    "std": 1,
    "argmax": 1,
    "argmin": 1,
    "any": 1,
    "all": 1,
    "logsumexp": 1,
    "norm": 2,
    "linalg_vector_norm": 2,
    "cat": 1,
    "slice": 1,
    "narrow": 1,
    "select": 1,
    "index_select": 1,
    "gather": 1,
    "scatter": 1,
    "scatter_add": 1,
    "unfold": 1,
}
_ALWAYS_MIXING = frozenset(
    {
        *("conv1d", "convolution", "conv2d", "_fft_r2c", "fft_fft", "lstm", "gru"),
        *("batch_norm", "group_norm", "instance_norm", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"),
    }
)
# a result without the token dimension is fine here: nothing of the tensor's content is in it
_CONTENT_FREE = frozenset({"sym_size", "new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like"})
_KEEPS_WHOLE = frozenset({"slice", "narrow"})


@dataclass(frozen=True)
class CheckTokenWise:
    """Refuses every operator, sites aside, that works along the token dimension."""

    name: str = "check_token_wise"
    requires: tuple[str, ...] = ("canonicalise_attention", "make_positions_explicit")

    def run(self, unit: Unit) -> Unit:
        problems = [
            Problem(
                f"{self.name}: {path_of(node) or node.name}",
                f"{why}: {node_text(node).strip()}",
                "Only attention may carry anything from one token to another; this kind of layer is not supported yet.",
            )
            for node in unit.graph.graph.nodes
            if (why := _mixes(node))
        ]
        if problems:
            raise UnsupportedGraphError(*problems[:8])
        return unit

    def ensures(self, unit: Unit) -> None:
        (output,) = unit.graph.graph.find_nodes(op="output")
        assert token_dimensions(fake_value(output.args[0])) == (1,), "the logits are not [1, tokens, vocabulary]"


def _mixes(node: torch.fx.Node) -> str:
    """Why a node is not token-wise; "" when it is."""
    if node.op != "call_function" or node.target is ATTEND or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._opname
    sources = [source for source in node.all_input_nodes if token_dimensions(fake_value(source))]
    if not sources or name in _CONTENT_FREE:
        return ""
    if name in _ALWAYS_MIXING:
        return f"{name} mixes neighbouring tokens"
    if name in ("pad", "constant_pad_nd") and _pads_tokens(node):
        return f"{name} shifts tokens"
    if name == "index" and _picks_tokens(node):
        return "index picks tokens by number"
    operand: Any = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    value: Any = fake_value(operand) if isinstance(operand, torch.fx.Node) else None
    for dimension in _dimensions_along(node, name) if isinstance(value, torch.Tensor) else ():
        if dimension % max(1, value.dim()) in token_dimensions(value) and not (name in _KEEPS_WHOLE and _same_tokens(node, value)):
            return f"{name} works along the token dimension"
    if name in ("matmul", "bmm", "mm", "linear", "einsum", "addmm", "baddbmm") and _contracts_tokens(node):
        return f"{name} sums over tokens"
    outputs = fake_value(node)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    if any(isinstance(out, torch.Tensor) and not token_dimensions(out) for out in outputs):
        return f"{name} reduces over tokens"
    return ""


def _dimensions_along(node: torch.fx.Node, name: str) -> Iterator[int]:
    place = _ALONG_ARGUMENT.get(name)
    if place is None:
        return
    schema = node.target._schema  # type: ignore[union-attr]
    argument_name = schema.arguments[place].name if place < len(schema.arguments) else ""
    default: Any = schema.arguments[place].default_value if argument_name.startswith("dim") else None
    found = node.args[place] if place < len(node.args) else node.kwargs.get(argument_name, default)
    if not argument_name.startswith("dim") and argument_name != "dims":
        found = None
    for dimension in found if isinstance(found, (list, tuple)) else [found]:
        if isinstance(dimension, int):
            yield dimension


def _picks_tokens(node: torch.fx.Node) -> bool:
    """Whether `x[..., numbers, ...]` stands at x's token dimension."""
    tokens = token_dimensions(fake_value(node.args[0]))  # type: ignore[arg-type]
    return any(index is not None and dimension in tokens for dimension, index in enumerate(node.args[1]))  # type: ignore[arg-type]


def _same_tokens(node: torch.fx.Node, source: torch.Tensor) -> bool:
    """A slice that keeps every token is none."""
    out = fake_value(node)
    return isinstance(out, torch.Tensor) and [str(size) for size in out.shape] == [str(size) for size in source.shape]


def _pads_tokens(node: torch.fx.Node) -> bool:
    source, padding = fake_value(node.args[0]), node.args[1]  # type: ignore[arg-type]
    assert isinstance(padding, (list, tuple))
    padded = {source.dim() - 1 - place // 2 for place, amount in enumerate(padding) if amount != 0}
    return bool(padded & set(token_dimensions(source)))


def _contracts_tokens(node: torch.fx.Node) -> bool:
    """Whether a matrix product sums over the token dimension: the left operand's last, or the right operand's last but one."""
    operands: list[Any] = [fake_value(source) for source in node.all_input_nodes]
    operands = [value for value in operands if isinstance(value, torch.Tensor)]
    name = node.target._opname  # type: ignore[union-attr]
    if name in ("addmm", "baddbmm"):
        operands = operands[1:]
    left_last = operands[0].dim() - 1 in token_dimensions(operands[0])
    if name == "linear" or len(operands) < 2:
        return left_last
    return left_last or (operands[1].dim() >= 2 and operands[1].dim() - 2 in token_dimensions(operands[1]))
