"""Make positions explicit: nothing but `position_ids` says where a token stands.

1. Whatever counts the call's tokens (`arange`, a running sum of ones) and is found, by evaluating it, to be a * position + b,
   becomes that; the first rows of a table, as many as there are tokens (`table[:tokens]`), become the rows of those positions.
   A running sum over the tokens that are no padding token counts all of them, and a warning says so: sessions hold no padding.
2. The number of tokens in the call may shape tensors; used as a *value* it would make a token's result depend on how
   many tokens stand beside it, and is refused by its node.
3. A mask of as many first tokens as are no padding (`arange < sum(ids != padding)`) is found by evaluating it to hold for all of
   them where there is none; it becomes so, and a warning says it.
4. A table whose rows are chosen by positions bounds every session (`position_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.evaluate import FakeConstantError, ancestors, content_nodes, evaluate_nodes, opname
from kvcompile.ir.show import node_text
from kvcompile.ir.tokens import fake_value, is_size, place_of, token_dimensions
from kvcompile.ir.unit import Unit

_aten = torch.ops.aten
_ARANGE = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)
_RUNNING_SUMS = (_aten.cumsum.default,)
_CUTS = (_aten.slice.Tensor, _aten.narrow.default)
# operators whose size arguments only shape the result
_SHAPING = frozenset(
    {
        _aten.view.default,
        _aten.reshape.default,
        _aten._unsafe_view.default,
        _aten.expand.default,
        _aten.slice.Tensor,
        _aten.narrow.default,
        _aten.repeat.default,
        _aten.new_empty.default,
        _aten.new_zeros.default,
        _aten.new_ones.default,
        _aten.empty.memory_format,
        _aten.zeros.default,
        _aten.ones.default,
        _aten.unflatten.int,
        _aten.split_with_sizes.default,
    }
)

# operators that are shaped and filled: where the argument stands that is a value
_NO_PADDING = 1 << 40  # a token id that no model compares with

_FILL = {_aten.full.default: 1, _aten.new_full.default: 2}


@dataclass(frozen=True)
class MakePositionsExplicit:
    """`arange` over tokens becomes the position input; the token count is a shape, never a value."""

    name: str = "make_positions_explicit"
    requires: tuple[str, ...] = ("canonicalise_attention",)

    def run(self, unit: Unit) -> Unit:
        graph = unit.graph.graph
        input_ids, position_ids = graph.find_nodes(op="placeholder")
        warnings = list(unit.warnings)
        warnings += _settle_padding_masks(graph, input_ids)
        for node in list(graph.nodes):
            if node.target in (*_ARANGE, *_RUNNING_SUMS) and len(token_dimensions(fake_value(node))) == 1:
                warnings += _replace_count(graph, node, input_ids, position_ids)
        for node in [node for target in _CUTS for node in graph.find_nodes(op="call_function", target=target)]:
            if token_dimensions(fake_value(node)) and not token_dimensions(fake_value(node.args[0])):
                _replace_first_rows(graph, node, input_ids, position_ids)
        graph.eliminate_dead_code()
        for node in graph.nodes:
            _refuse_size_as_value(self.name, node)
        unit.graph.recompile()
        return replace(unit, position_rows=_position_rows(graph, input_ids, position_ids), warnings=tuple(dict.fromkeys(warnings)))

    def ensures(self, unit: Unit) -> None:
        for target in _ARANGE:
            assert not any(token_dimensions(fake_value(n)) for n in unit.graph.graph.find_nodes(op="call_function", target=target))


def _replace_count(graph: torch.fx.Graph, node: torch.fx.Node, input_ids: torch.fx.Node, position_ids: torch.fx.Node) -> tuple[str, ...]:
    """Rule 1 for one node; returns warnings.  A running sum of something else is left to `check_token_wise`."""
    if position_ids in ancestors([node], ()) or fake_value(node).dim() > 2:
        return ()
    found, padding = _affine(node, input_ids)
    if found is None:
        if node.target in _RUNNING_SUMS:
            return ()
        raise UnsupportedGraphError(
            Problem(
                f"make_positions_explicit: {place_of(node)}",
                f"positions are not a * position + b, one a token: {node_text(node).strip()}",
                "Let the model take position_ids as its second argument.",
            )
        )
    step, start = found
    value = fake_value(node)
    with graph.inserting_before(node):
        made = [position_ids] if value.dim() == 2 else [graph.call_function(_aten.select.int, (position_ids, 0, 0))]
        if step != 1:
            made.append(graph.call_function(_aten.mul.Scalar, (made[-1], step)))
        if start != 0:
            made.append(graph.call_function(_aten.add.Scalar, (made[-1], start)))
        made.append(graph.call_function(_aten.to.dtype, (made[-1], value.dtype)))
    for each in made:
        if each is not position_ids:
            each.meta = dict(node.meta, val=each.target(*(fake_value(a) if isinstance(a, torch.fx.Node) else a for a in each.args)))  # type: ignore[operator]
    node.replace_all_uses_with(made[-1])
    graph.erase_node(node)
    if not padding:
        return ()
    return (f"the model's positions skip token {', '.join(map(str, sorted(padding)))}; a session counts it like any other token",)


def _affine(node: torch.fx.Node, input_ids: torch.fx.Node) -> tuple[tuple[int, int] | None, frozenset[int]]:
    """(a, b) if the value at position i is a * i + b whatever the number of tokens; and the token ids that it skips.

    It may depend on token ids by comparing them with constants; they are then evaluated on ids that are none of these.
    """
    cone = ancestors([node], ())
    special = frozenset(argument for each in cone if input_ids in each.all_input_nodes for argument in each.args if type(argument) is int)
    if any(each.op == "get_attr" for each in cone):
        return None, frozenset()
    few, many = 5, 9
    ordinary = [token for token in range(2 * many + len(special)) if token not in special][:many]
    try:
        rows = [evaluate_nodes([node], {input_ids: torch.tensor([ordinary[:tokens]])})[0].flatten() for tokens in (few, many)]
    except LookupError:
        return None, frozenset()
    start, step = int(rows[1][0]), int(rows[1][1] - rows[1][0])
    for row, tokens in zip(rows, (few, many), strict=True):
        if len(row) != tokens or not torch.equal(row.long(), torch.arange(tokens) * step + start):
            return None, frozenset()
    if node not in content_nodes(node.graph, input_ids):
        return (step, start), frozenset()
    readers = {each.target for each in cone if input_ids in each.all_input_nodes and opname(each) not in ("sym_size", "ones_like")}
    padding = next(iter(special), 0)
    if step != 1 or len(special) != 1 or readers != {_aten.ne.Scalar} or not _skips(node, input_ids, ordinary, padding, start):
        return None, frozenset()  # it counts something else than tokens
    return (step, start), special


def _skips(node: torch.fx.Node, input_ids: torch.fx.Node, ordinary: list[int], padding: int, start: int) -> bool:
    """Whether a running sum counts every token but `padding`: one of them, in place 2, keeps the count from growing there."""
    ids = [*ordinary[:2], padding, *ordinary[2:8]]
    (found,) = evaluate_nodes([node], {input_ids: torch.tensor([ids])})
    return bool(found.flatten().tolist() == [start, start + 1, start + 1, *(start + place for place in range(2, 8))])


def _settle_padding_masks(graph: torch.fx.Graph, input_ids: torch.fx.Node) -> list[str]:
    """Rule 3; returns warnings."""
    warnings = []
    for node in [node for node in graph.nodes if _counts_tokens(node, input_ids)]:
        cone = ancestors([node], ())
        special, readers = _compared(cone, input_ids)
        if len(special) != 1 or readers != {_aten.ne.Scalar} or any(each.op == "get_attr" for each in cone):
            continue
        ordinary = [token for token in range(10) if token not in special]
        try:
            held = [evaluate_nodes([node], {input_ids: torch.tensor([ordinary[:tokens]])})[0] for tokens in (5, 9)]
        except LookupError:  # it knows positions, which are none of a count's business
            continue
        if not all(bool(mask.all()) for mask in held):
            continue
        with graph.inserting_before(node):
            every = graph.call_function(_aten.ones_like.default, (input_ids,), {"dtype": torch.bool})
        every.meta = dict(node.meta)
        node.replace_all_uses_with(every)
        padding = next(iter(special))
        warnings.append(f"the model hides as many of its last tokens as it reads tokens {padding}; a session hides none")
    graph.eliminate_dead_code()
    return warnings


def _counts_tokens(node: torch.fx.Node, input_ids: torch.fx.Node) -> bool:
    """Whether a node is a mask [1, tokens] that compares with something summed over token ids."""
    value = fake_value(node)
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return False
    if [str(size) for size in value.shape] != [str(size) for size in fake_value(input_ids).shape]:
        return False
    cone = ancestors([node], ())
    sums = [each for each in cone if each.target is _aten.sum.dim_IntList and token_dimensions(fake_value(each.all_input_nodes[0]))]
    return any(input_ids in ancestors([each], ()) for each in sums)


def _compared(cone: Iterable[torch.fx.Node], input_ids: torch.fx.Node) -> tuple[frozenset[int], set[Any]]:
    """The numbers that token ids are compared with, and the operators that do so."""
    readers = [each for each in cone if input_ids in each.all_input_nodes]
    special = frozenset(argument for each in readers for argument in each.args if type(argument) is int and opname(each) != "sym_size")
    return special, {each.target for each in readers if opname(each) not in ("sym_size", "ones_like")}


def _replace_first_rows(graph: torch.fx.Graph, node: torch.fx.Node, input_ids: torch.fx.Node, position_ids: torch.fx.Node) -> None:
    """table[..., :tokens, ...] -> index_select(table, dim, position_ids[0]); refuses other cuts that depend on the number of tokens."""
    table, dim, start = node.args[0], *(*node.args[1:3], *(0, 0)[len(node.args[1:3]) :])
    step = node.args[4] if len(node.args) > 4 else 1
    tokens = str(fake_value(input_ids).shape[1])
    if start not in (0, None) or step != 1 or str(fake_value(node).shape[dim]) != tokens:
        raise UnsupportedGraphError(
            Problem(
                f"make_positions_explicit: {place_of(node)}",
                f"the number of tokens decides where a table is cut: {node_text(node).strip()}",
                "Let the model take position_ids as its second argument.",
            )
        )
    with graph.inserting_before(node):
        positions = graph.call_function(_aten.select.int, (position_ids, 0, 0))
        rows = graph.call_function(_aten.index_select.default, (table, dim, positions))
    positions.meta = dict(node.meta, val=fake_value(position_ids)[0])
    rows.meta = dict(node.meta)
    node.replace_all_uses_with(rows)
    graph.erase_node(node)


def _refuse_size_as_value(pass_name: str, node: torch.fx.Node) -> None:
    if node.op != "call_function" or is_size(node) or node.target in _SHAPING:
        return
    arguments: tuple[Any, ...] = node.args
    given = arguments[_FILL[node.target] :] if node.target in _FILL else node.all_input_nodes
    if any(isinstance(argument, torch.fx.Node) and is_size(argument) for argument in given):
        raise UnsupportedGraphError(
            Problem(
                f"{pass_name}: {place_of(node)}",
                f"the number of tokens in the call is used as a value: {node_text(node).strip()}",
                "A token's result may depend on its position, never on how many tokens stand beside it.",
            )
        )


def _position_rows(graph: torch.fx.Graph, input_ids: torch.fx.Node, position_ids: torch.fx.Node) -> int | None:
    """Positions that every table has a row for; None when positions are only computed with, never looked up."""
    bounds = []
    for table_rows, index in _look_ups(graph):
        if isinstance(index, torch.fx.Node) and _counts(index, position_ids):
            bounds.append(_positions_within(index, input_ids, position_ids, table_rows))
    return min((bound for bound in bounds if bound is not None), default=None)


def _counts(index: torch.fx.Node, position_ids: torch.fx.Node) -> bool:
    """Whether an index is computed from positions in whole numbers; an expert's number comes through the whole model."""
    cone = ancestors([index], ())
    return position_ids in cone and not any(
        isinstance(value := fake_value(node), torch.Tensor) and (value.is_floating_point() or value.is_complex()) for node in cone
    )


def _look_ups(graph: torch.fx.Graph) -> Iterator[tuple[int, Any]]:
    """(rows, index) of every table look-up."""
    for node in graph.find_nodes(op="call_function", target=_aten.embedding.default):
        yield int(fake_value(node.args[0]).shape[0]), node.args[1]
    for node in graph.find_nodes(op="call_function", target=_aten.gather.default):
        if not token_dimensions(fake_value(node.args[0])):
            yield int(fake_value(node.args[0]).shape[node.args[1]]), node.args[2]
    for node in graph.find_nodes(op="call_function", target=_aten.index_select.default):
        if not token_dimensions(fake_value(node.args[0])):
            yield int(fake_value(node.args[0]).shape[node.args[1]]), node.args[2]
    for node in graph.find_nodes(op="call_function", target=_aten.index.Tensor):
        for dimension, index in enumerate(node.args[1]):
            if index is not None and dimension not in token_dimensions(fake_value(node.args[0])):
                yield int(fake_value(node.args[0]).shape[dimension]), index


def _positions_within(index: torch.fx.Node, input_ids: torch.fx.Node, position_ids: torch.fx.Node, rows: int) -> int | None:
    """How many positions, from 0, have a row: a model that looks up position + 2 has 2 rows less than its table.

    None where the row that is looked up does not grow with the position.
    """
    known = {position_ids: torch.arange(rows + 1)[None], input_ids: torch.full((1, rows + 1), _NO_PADDING)}
    try:
        (found,) = evaluate_nodes([index], known)
    except FakeConstantError:
        return None
    along = next((dim for dim, size in enumerate(found.shape) if size == rows + 1), None)
    if along is None:
        return None
    outside = ((found < 0) | (found >= rows)).movedim(along, 0).reshape(rows + 1, -1).any(1).nonzero()
    return int(outside[0]) if len(outside) else None
