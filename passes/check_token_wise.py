"""Check token-wise: with its sites removed, the model is a function of one token.

A session keeps keys, values and the inputs of short convolutions; any other way in which one token reaches another would
be lost without a word.  So the rule is a list of what is known to be token-wise, and everything else is refused by name:

1. elementwise operators (torch's own `pointwise` tag, and casts and copies)
2. operators that only move dimensions; a view must keep as many elements before the token dimension as there were, else
   it deals one token's numbers out to others.  A dimension of [copies * tokens] has its copies before the tokens
   (experts that all see every token); how many is followed from node to node
3. operators along a dimension that their schema names (`dim`, `dims`), when it is not the token dimension
4. matrix products that do not sum over tokens, normalisations over trailing dimensions, table look-ups
5. results that hold nothing of a tensor's content
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.show import node_text
from kvcompile.ir.site_operators import SITES
from kvcompile.ir.tokens import fake_value, is_size, place_of, token_dimensions
from kvcompile.ir.unit import Unit

_COPIES = frozenset({"to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "dropout", "copy"})
_UNTAGGED_ELEMENTWISE = frozenset(
    {
        *("gelu", "silu", "softplus", "where", "clamp", "bitwise_not", "floor_divide", "one_hot", "float_power"),
        *("multiply", "divide", "subtract", "__or__", "__and__", "__xor__"),
        *("polar", "complex", "view_as_complex", "view_as_real", "real", "imag"),
    }
)
_VIEWS = frozenset({"view", "reshape", "reshape_as", "view_as", "_unsafe_view", "flatten", "unflatten"})
_MOVES = frozenset({"stack", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "t", "numpy_T", "movedim", "swapaxes"})
_ALONG = frozenset(
    {
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp"),
        *("sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "norm", "linalg_vector_norm", "max", "min", "argmax", "argmin"),
        *("cumsum", "cumprod", "sort", "topk", "argsort", "any", "all", "flip", "roll"),
        *("cat", "concat", "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "tensor_split"),
        *("index_select", "gather", "scatter", "scatter_add", "masked_select", "glu", "repeat_interleave"),
        *("slice_scatter", "select_scatter"),
    }
)
_PRODUCTS = frozenset({"matmul", "bmm", "mm", "mv", "linear", "addmm", "baddbmm"})
_NORMS = frozenset({"layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"})
_CONTENT_FREE = frozenset(
    {"sym_size", "new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like"}
)
_TABLE = frozenset({"embedding"})

# of a node whose token dimension is [copies * tokens]: how many copies stand before the tokens; 1 where a node is not in it
Copies: TypeAlias = dict[torch.fx.Node, int]


@dataclass(frozen=True)
class CheckTokenWise:
    """Passes the operators known to be token-wise and refuses, sites aside, every other one that touches tokens."""

    name: str = "check_token_wise"
    requires: tuple[str, ...] = ("canonicalise_attention", "canonicalise_convolution", "make_positions_explicit")

    def run(self, unit: Unit) -> Unit:
        copies: Copies = {}
        problems = [token_mixing(node, why) for node in unit.graph.graph.nodes if (why := why_mixes(node, copies))]
        if problems:
            raise UnsupportedGraphError(*problems[:8])
        return unit

    def ensures(self, unit: Unit) -> None:
        (output,) = unit.graph.graph.find_nodes(op="output")
        assert token_dimensions(fake_value(output.args[0])) == (1,), "the logits are not [1, tokens, vocabulary]"


def token_mixing(node: torch.fx.Node, why: str) -> Problem:
    """The refusal of a node that is not token-wise."""
    return Problem(
        f"check_token_wise: {place_of(node)}",
        f"{why}: {node_text(node).strip()}",
        "Only attention and causal convolutions may carry anything from one token to another; this layer is not supported yet.",
    )


def why_mixes(node: torch.fx.Node, copies: Copies) -> str:
    """Why a node is not known to be token-wise; "" when it is.  copies: of the nodes before this one; its own are added."""
    if node.op != "call_function" or node.target in SITES or is_size(node):
        return ""
    if node.target is operator.getitem:  # one of a split's parts
        (source,) = node.all_input_nodes
        if source in copies:
            copies[node] = copies[source]
        return ""
    sources = [source for source in node.all_input_nodes if _has_tokens(source)]
    if not sources:
        return ""
    if not isinstance(node.target, torch._ops.OpOverload):
        return f"{getattr(node.target, '__name__', node.target)} is not an operator that kvcompile can look into"
    name = node.target._opname
    if name in _CONTENT_FREE or name == "item":
        return ""
    different = {copies.get(source, 1) for source in sources}
    if len(different) > 1:
        return f"{name} meets tokens in different orders"
    if different != {1}:
        copies[node] = different.pop()
    if why := _wrong_dimension(node, name, copies):
        return why
    outputs = fake_value(node)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    if any(isinstance(out, torch.Tensor) and not token_dimensions(out) for out in outputs):
        return f"{name} reduces over tokens"
    return ""


def _wrong_dimension(node: torch.fx.Node, name: str, copies: Copies) -> str:
    arguments: tuple[Any, ...] = node.args
    overload: Any = node.target
    if name in _ALONG and overload._overloadname not in ("self_int", "other"):  # max.other compares two tensors
        for value in _operands(arguments[0]):
            dimensions = list(_dimensions(node))
            if not dimensions:
                return f"{name} works on the flattened tensor"
            tokens = token_dimensions(value)
            if any(dim % max(1, value.dim()) in tokens for dim in dimensions) and not _same_tokens(node, name, value):
                return f"{name} works along the token dimension"
        return ""
    if name in _VIEWS:
        return "" if _keeps_tokens_apart(arguments[0], node, copies) else f"{name} deals a token's numbers out to others"
    if name in _PRODUCTS:
        return f"{name} sums over tokens" if _contracts_tokens(node, name) else ""
    if name in _NORMS:
        value, trailing = fake_value(arguments[0]), len(arguments[1])
        over = range(value.dim() - trailing, value.dim())
        return f"{name} works along the token dimension" if set(over) & set(token_dimensions(value)) else ""
    if name in ("pad", "constant_pad_nd"):
        return f"{name} shifts tokens" if _pads_tokens(arguments[0], arguments[1]) else ""
    if name == "repeat":
        return "" if _repeats_in_order(node, copies) else "repeat repeats tokens"
    if name == "index_put":
        return "" if _fills_under_mask(node) else "index_put writes to tokens by number"
    if name == "index":
        return "index picks tokens by number" if _picks_tokens(arguments[0], arguments[1]) else ""
    if name in _TABLE:
        return f"{name} looks up in a table of tokens" if _has_tokens(arguments[0]) else ""
    if overload is torch.ops.aten.repeat_interleave.self_int:  # along a dimension a token's rows stay side by side
        return "" if list(_dimensions(node)) else "repeat_interleave works on the flattened tensor"
    if torch.Tag.pointwise in overload.tags or name in _COPIES | _UNTAGGED_ELEMENTWISE | _MOVES:
        return ""
    return f"{name} is not known to be token-wise"


def _has_tokens(node: Any) -> bool:
    value = fake_value(node) if isinstance(node, torch.fx.Node) else None
    return any(token_dimensions(item) for item in (value if isinstance(value, (tuple, list)) else (value,)))


def _operands(argument: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operator along a dimension works on: its first argument, or each of a list of them."""
    for item in argument if isinstance(argument, (list, tuple)) else [argument]:
        value = fake_value(item) if isinstance(item, torch.fx.Node) else None
        if isinstance(value, torch.Tensor) and token_dimensions(value):
            yield value


def _dimensions(node: torch.fx.Node) -> Iterator[int]:
    """The values of the arguments that the schema calls `dim` or `dims`, defaults included."""
    overload: Any = node.target
    for place, argument in enumerate(overload._schema.arguments):
        if argument.name in ("dim", "dims"):
            given: Any = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            yield from (dim for dim in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(dim, int))


def _same_tokens(node: torch.fx.Node, name: str, source: torch.Tensor) -> bool:
    """A slice that keeps every token is none."""
    out = fake_value(node)
    kept = isinstance(out, torch.Tensor) and [str(size) for size in out.shape] == [str(size) for size in source.shape]
    return name in ("slice", "narrow") and kept


def _keeps_tokens_apart(source: torch.fx.Node, node: torch.fx.Node, copies: Copies) -> bool:
    """A view leaves each token's numbers together when as many elements stand before the token as stood there."""
    out = fake_value(node)
    if len(token_dimensions(out)) != 1:
        return False
    before = _elements_before(fake_value(source)) * copies.get(source, 1)
    copies[node], rest = divmod(before, _elements_before(out))
    return rest == 0 and _times_tokens(out) % copies[node] == 0


def _elements_before(value: torch.Tensor) -> int:
    (dim,) = token_dimensions(value)
    return math.prod(int(size) for size in value.shape[:dim])


def _times_tokens(value: torch.Tensor) -> int:
    """How many times the number of tokens a value's token dimension is."""
    (dim,) = token_dimensions(value)
    size: Any = value.shape[dim]
    if not isinstance(size, torch.SymInt):
        return 1
    symbol = next(iter(size.node.expr.free_symbols))
    times = size.node.expr / symbol
    return int(times) if times.is_Integer else 1


def _pads_tokens(source: torch.fx.Node, padding: list[int]) -> bool:
    value: Any = fake_value(source)
    padded = {value.dim() - 1 - place // 2 for place, amount in enumerate(padding) if amount != 0}
    return bool(padded & set(token_dimensions(value)))


def _repeats_in_order(node: torch.fx.Node, copies: Copies) -> bool:
    """`repeat` lays copies of all tokens one behind the other; only one copy is there of what stands before them."""
    source, times = node.args
    assert isinstance(source, torch.fx.Node) and isinstance(times, (list, tuple))
    value: Any = fake_value(source)
    (dim,) = token_dimensions(value)
    added = len(times) - value.dim()
    at_tokens: Any = times[added + dim]
    if at_tokens == 1:
        return True
    if type(at_tokens) is not int or _elements_before(fake_value(node)) != 1:
        return False
    copies[node] = copies.get(source, 1) * at_tokens
    return True


def _fills_under_mask(node: torch.fx.Node) -> bool:
    """`x[mask] = number` where the mask is as large as x: elementwise."""
    source, numbers, value = node.args[:3]
    assert isinstance(source, torch.fx.Node) and isinstance(numbers, (list, tuple)) and isinstance(value, torch.fx.Node)
    if len(numbers) != 1 or not isinstance(numbers[0], torch.fx.Node):
        return False
    mask: Any = fake_value(numbers[0])
    return bool(mask.dtype == torch.bool and mask.shape == fake_value(source).shape and fake_value(value).numel() == 1)


def _picks_tokens(source: torch.fx.Node, numbers: list[Any]) -> bool:
    """Whether `x[..., numbers, ...]` stands at x's token dimension."""
    tokens = token_dimensions(fake_value(source))
    return any(index is not None and dimension in tokens for dimension, index in enumerate(numbers))


def _contracts_tokens(node: torch.fx.Node, name: str) -> bool:
    """Whether a matrix product sums over the token dimension: the left operand's last, or the right operand's last but one."""
    left, right = [fake_value(argument) for argument in node.args[1 if name in ("addmm", "baddbmm") else 0 :][:2]]  # type: ignore[arg-type]
    summed_left = left.dim() - 1 in token_dimensions(left)
    if name == "linear":
        return summed_left or bool(token_dimensions(right))
    return summed_left or max(0, right.dim() - 2) in token_dimensions(right)
