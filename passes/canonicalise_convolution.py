"""Canonicalise convolutions: every causal short convolution over the tokens is one `kvc.convolve` node, numbered, with its facts.

    conv1d(x, weight, bias, stride 1, padding taps - 1, dilation 1, groups channels)[:, :, :tokens]  ->  kvc.convolve(x, weight, bias)

1. A convolution counts that slides over the token dimension.  Around it, back to a value with one column a token and on to
   the next such value, stands what pads and cuts; however that is written, it is replaced with the convolution.
2. It is recognised as a function: the piece is run in float64 on random inputs, weights and numbers of tokens, and must be
   the causal filter of each channel, zeros standing before the first token.  Weights are not read: a plan has none.
3. Any other convolution over the tokens is refused by its node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcompile.ir.convolve_op import CONVOLVE
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.evaluate import FakeConstantError, evaluate_nodes, size_at
from kvcompile.ir.show import node_text
from kvcompile.ir.sites import ConvolutionSite
from kvcompile.ir.tokens import fake_value, is_size, path_of, place_of, token_dimensions
from kvcompile.ir.unit import Unit

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv1d.padding, _aten.convolution.default)
_WEIGHT_VIEWS = (_aten.squeeze.dim, _aten.unsqueeze.default, _aten.view.default, _aten.reshape.default)
_MOST_NODES = 6  # that pad or cut on one side: a walk that does not end is none of ours
_TOLERANCE = 1e-10  # float64, of values of about 1


@dataclass(frozen=True)
class _Piece:
    """A convolution with what pads and cuts around it: `source` and `result` hold one column a token."""

    convolution: torch.fx.Node
    source: torch.fx.Node
    result: torch.fx.Node

    @property
    def weight(self) -> torch.fx.Node:
        weight: Any = self.convolution.args[1]
        assert isinstance(weight, torch.fx.Node)
        return weight

    @property
    def bias(self) -> torch.fx.Node | None:
        arguments: tuple[Any, ...] = self.convolution.args
        keywords: dict[str, Any] = self.convolution.kwargs
        bias: torch.fx.Node | None = arguments[2] if len(arguments) > 2 else keywords.get("bias")
        return bias


@dataclass(frozen=True)
class CanonicaliseConvolution:
    """All causal convolutions of single channels become numbered `kvc.convolve` nodes; others over the tokens are refused."""

    name: str = "canonicalise_convolution"
    requires: tuple[str, ...] = ("canonicalise_attention",)

    def run(self, unit: Unit) -> Unit:
        graph = unit.graph.graph
        tokens = str(fake_value(graph.find_nodes(op="placeholder")[0]).shape[1])
        problems = []
        for node in [node for node in graph.nodes if _slides_over_tokens(node)]:
            piece = _piece(node, tokens)
            if why := _shape_problem(node) or ("" if piece is not None and _is_causal_filter(piece) else "that is not a causal filter"):
                problems.append(
                    Problem(
                        f"{self.name}: {place_of(node)}",
                        f"a convolution over the tokens {why}: {node_text(node).strip()}",
                        "Built: a filter for each channel (groups = channels), causal, stride 1, dilation 1, zeros before the first token.",
                    )
                )
            elif piece is not None:
                _rewrite(graph, piece)
        if problems:
            raise UnsupportedGraphError(*problems)
        graph.eliminate_dead_code()
        sites = []
        for index, node in enumerate(graph.find_nodes(op="call_function", target=CONVOLVE)):
            node.update_arg(3, index)
            sites.append(_describe(index, node))
        unit.graph.recompile()
        return replace(unit, convolutions=tuple(sites))

    def ensures(self, unit: Unit) -> None:
        nodes = unit.graph.graph.find_nodes(op="call_function", target=CONVOLVE)
        assert [node.args[3] for node in nodes] == list(range(len(unit.convolutions)))
        assert not any(_slides_over_tokens(node) for node in unit.graph.graph.nodes)


def _slides_over_tokens(node: torch.fx.Node) -> bool:
    """Rule 1: whether a node is a convolution of [1, channels, tokens]."""
    if node.target not in _CONVOLUTIONS:
        return False
    value = fake_value(node.args[0])  # type: ignore[arg-type]
    return value.dim() == 3 and token_dimensions(value) == (2,)


def _shape_problem(node: torch.fx.Node) -> str:
    """What shapes and constants already say against a convolution; "" when nothing."""
    source, weight = (fake_value(argument) for argument in node.args[:2])  # type: ignore[arg-type]
    overload: Any = node.target
    arguments: tuple[Any, ...] = node.args
    names = [argument.name for argument in overload._schema.arguments]
    given: dict[str, Any] = dict(zip(names, arguments, strict=False)) | dict(node.kwargs)
    if str(source.shape[0]) != "1":
        return "of several sequences at once"
    if given.get("transposed"):
        return "that is transposed"
    if any(step != 1 for step in given.get("stride", [1])):
        return "with a stride"
    if any(step != 1 for step in given.get("dilation", [1])):
        return "with a dilation"
    if weight.shape[1] != 1 or weight.shape[0] != source.shape[1]:
        return "that mixes channels"
    return ""


def _piece(convolution: torch.fx.Node, tokens: str) -> _Piece | None:
    """The convolution between the nearest values with one column a token; None when there is no such piece."""
    source: torch.fx.Node = convolution.args[0]  # type: ignore[assignment]
    result = convolution
    for _ in range(_MOST_NODES):
        if _columns(source) == tokens:
            break
        inputs = [each for each in source.all_input_nodes if token_dimensions(fake_value(each))]
        # the padding that `cat` puts in front may take its size from the tokens: the value itself has as many columns
        inputs = [each for each in inputs if _columns(each) == tokens] or inputs
        if len(inputs) != 1:
            return None
        source = inputs[0]
    for _ in range(_MOST_NODES):
        if _columns(result) == tokens:
            break
        users = [user for user in result.users if not is_size(user)]
        if len(users) != 1:
            return None
        result = users[0]
    whole = all(_columns(node) == tokens and fake_value(node).dim() == 3 for node in (source, result))
    return _Piece(convolution, source, result) if whole else None


def _columns(node: torch.fx.Node) -> str:
    """How many tokens a value holds, as the trace writes it; "" for none."""
    dims = token_dimensions(fake_value(node))
    return str(fake_value(node).shape[dims[0]]) if len(dims) == 1 else ""


def _is_causal_filter(piece: _Piece) -> bool:
    """Rule 2."""
    graph = piece.convolution.graph
    taps = int(fake_value(piece.weight).shape[2])
    generator = torch.Generator().manual_seed(0)

    def random(node: torch.fx.Node, tokens: int) -> torch.Tensor:
        return torch.randn([size_at(size, tokens) for size in fake_value(node).shape], dtype=torch.float64, generator=generator)

    for tokens in (1, 2, taps, 2 * taps + 3):
        known: dict[torch.fx.Node, Any] = {
            node: size_at(fake_value(node), tokens) for node in graph.nodes if isinstance(fake_value(node), torch.SymInt)
        }
        known |= {node: random(node, tokens) for node in (piece.source, piece.weight, piece.bias) if node is not None}
        try:
            (found,) = evaluate_nodes([piece.result], known, compute=torch.float64)
        except (FakeConstantError, LookupError, RuntimeError, ValueError):  # needs more than its input, or more tokens
            return False
        expected = CONVOLVE(
            _channels_first(known[piece.source], piece.source),
            known[piece.weight],
            known[piece.bias] if piece.bias is not None else None,
            0,
        )
        found = _channels_first(found, piece.result)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE):
            return False
    return True


def _channels_first(value: torch.Tensor, node: torch.fx.Node) -> torch.Tensor:
    return value if token_dimensions(fake_value(node)) == (2,) else value.transpose(1, 2)


def _rewrite(graph: torch.fx.Graph, piece: _Piece) -> None:
    """source -> kvc.convolve -> what read the result; transposed on either side where tokens stand before channels."""
    transpose = torch.ops.aten.transpose.int
    result = piece.result
    with graph.inserting_before(result):
        source = piece.source
        if token_dimensions(fake_value(source)) == (1,):
            source = graph.call_function(transpose, (source, 1, 2))
            source.meta = dict(piece.convolution.meta, val=fake_value(piece.source).transpose(1, 2))
        out = site = graph.call_function(CONVOLVE, (source, _parameter(piece.weight), piece.bias, -1))
        site.meta = dict(piece.convolution.meta, val=CONVOLVE(fake_value(source), fake_value(piece.weight), None, -1))
        if token_dimensions(fake_value(result)) == (1,):
            out = graph.call_function(transpose, (site, 1, 2))
            out.meta = dict(result.meta, val=fake_value(site).transpose(1, 2))
    result.replace_all_uses_with(out)


def _parameter(weight: torch.fx.Node) -> torch.fx.Node:
    """The model's own tensor behind views that add or drop the dimension of size 1; the weight itself when there is none."""
    node = weight
    while node.target in _WEIGHT_VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    channels, _, taps = fake_value(weight).shape
    known = node.op == "get_attr" and tuple(fake_value(node).shape) in ((channels, taps), (channels, 1, taps))
    return node if known else weight


def _describe(index: int, node: torch.fx.Node) -> ConvolutionSite:
    source, weight = (fake_value(argument) for argument in node.args[:2])  # type: ignore[arg-type]
    return ConvolutionSite(
        index=index,
        path=path_of(node) or f"convolution {index}",
        channels=int(source.shape[1]),
        taps=int(weight.shape[-1]),
        dtype=str(source.dtype).removeprefix("torch."),
    )
