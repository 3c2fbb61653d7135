"""Route densely: while a model is traced, rows that its own numbers choose are all rows, and what was not chosen is masked.

A mixture of experts that gathers each expert's tokens makes tensors whose size depends on numbers, which no graph of one symbol
holds.  What it computes is a function of one token nevertheless, so it is traced in another form with the same results:

1. `x[mask]` is every row of x;  `y[mask] = rows` writes where the mask holds.
2. `where(mask)` and `nonzero(mask)` over tokens are the numbers of every place of the mask;  `x[numbers]` lays x out over these
   places, and `y.index_add(0, numbers, rows)` adds the rows whose place the mask holds.
3. `nonzero(mask)` of a mask without tokens (which experts were chosen at all) is every number, known while tracing.  An expert
   that nobody chose adds nothing, for its rows are masked; a number beyond a table's end is never chosen, or the model's own
   look-up would fail, so it stands for the last entry.
4. `keys.sort()` of whole numbers, one a row, leaves the rows in their order;  `x.split(counts)` in that order gives, for each key,
   every row, and the `cat` of as many parts takes each row from the part of its key.

Rows are tokens: whatever else is done along them is seen in the graph and refused by `check_token_wise`.  That counts are those
of the keys' rows is not seen in the graph; every compile compares the compiled model with the original (verify.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.evaluate import ancestors, evaluate_nodes
from kvcompile.ir.tokens import fake_value


@dataclass(frozen=True, eq=False)
class _Place:
    """Rule 2: numbers along dimension `dim` of `mask`, one for each of its places in their order."""

    mask: Tensor
    dim: int


@dataclass(frozen=True, eq=False)
class _Order:
    """Rule 4: rows sorted by `keys`; numbers of this order, whole-number divided by `times`, are rows of which each is there so often."""

    keys: Tensor
    times: int = 1


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Rows that stand in the order of `keys`; part: of which key, None for all."""

    keys: Tensor
    part: int | None = None


_UNKNOWN_PICK = "they pick in a way that is not known"
_Mark: TypeAlias = "_Place | _Order | _Sorted | int"


class RouteDensely(TorchFunctionMode):
    """While open, the rules above hold.  Tensors that nothing chose are handled as ever."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, _Mark] = {}
        self._kept: list[Tensor] = []  # alive, so that an id stays one tensor's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(getattr(func, "__name__", ""))
        if rule is not None:
            found = rule(self, func, args, kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        self._pass_on(args, out)
        return out

    def mark(self, tensor: Tensor, mark: _Mark) -> Tensor:
        self._kept.append(tensor)
        self._marks[id(tensor)] = mark
        return tensor

    def of(self, item: Any) -> _Mark | None:
        return self._marks.get(id(item)) if isinstance(item, Tensor) else None

    def _pass_on(self, args: Any, out: Any) -> None:
        """What is computed from rows in an order stands in that order, as long as it has as many rows."""
        marked = [(item, mark) for item in torch.utils._pytree.tree_leaves(args) if isinstance(mark := self.of(item), _Sorted)]
        if not marked:
            return
        source, mark = next(((item, mark) for item, mark in marked if mark.part is not None), marked[0])
        for item in torch.utils._pytree.tree_leaves(out):
            if isinstance(item, Tensor) and item.dim() and str(item.shape[0]) == str(source.shape[0]) and self.of(item) is None:
                self.mark(item, mark)


def _refuse(what: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(Problem("trace", f"the model's own numbers choose rows, and {what}.", "Choose with a mask and `where`."))


def _by_tokens(value: Tensor) -> bool:
    """Whether a size of `value` is the number of tokens."""
    return any(isinstance(size, torch.SymInt) for size in value.shape)


def _rows(value: Tensor, mask: Tensor) -> Tensor:
    """[places of the mask, ...] of value [*mask's sizes, ...]."""
    return value.reshape(-1, *value.shape[mask.dim() :])


def _is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool and item.dim() > 0


def _get(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    """Rules 1 to 4 of `x[index]`."""
    value, index = args
    if isinstance(mode.of(value), int) and index == 0:
        return value  # one number of a list of single numbers
    indexes = list(index) if isinstance(index, tuple) else [index]
    marks = [mode.of(item) for item in indexes]
    if _is_mask(indexes[0]) and len(indexes) == 1 and _sizes(value)[: indexes[0].dim()] == _sizes(indexes[0]):
        return _rows(value, indexes[0])
    if isinstance(marks[0], int):
        first = min(marks[0], int(value.shape[0]) - 1)
        return value[(first, *indexes[1:])]
    if isinstance(marks[0], _Order):
        if len(indexes) > 1 or str(value.shape[0] * marks[0].times) != str(marks[0].keys.shape[0]):
            raise _refuse(_UNKNOWN_PICK)
        rows = value.repeat_interleave(marks[0].times, 0) if marks[0].times > 1 else value.clone()
        return mode.mark(rows, _Sorted(marks[0].keys))
    places = [mark for mark in marks if isinstance(mark, _Place)]
    if not places:
        return NotImplemented
    rest = indexes[len(places) :]
    if marks[: len(places)] != places or any(item is not None and item != slice(None) for item in rest):
        raise _refuse(_UNKNOWN_PICK)
    return _over_places(value, places)[(slice(None), *rest)]


def _sizes(value: Tensor) -> list[str]:
    return [str(size) for size in value.shape]


def _over_places(value: Tensor, places: list[_Place]) -> Tensor:
    """value[numbers of places]: [places of the mask, ...]."""
    mask, dims = places[0].mask, [place.dim for place in places]
    one = all(place.mask is mask for place in places) and len(set(dims)) == len(dims)
    if not one or _sizes(value)[: len(dims)] != [str(mask.shape[dim]) for dim in dims]:
        raise _refuse(_UNKNOWN_PICK)
    ordered = sorted(range(len(dims)), key=dims.__getitem__)
    laid = value.permute(*ordered, *range(len(dims), value.dim()))
    for dim in range(mask.dim()):
        if dim not in dims:
            laid = laid.unsqueeze(dim)
    return _rows(laid.expand(*mask.shape, *value.shape[len(dims) :]), mask)


def _set(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    """Rule 1 of `y[mask] = rows`; a single number under a mask is elementwise as it stands."""
    value, mask, rows = args
    if not _is_mask(mask) or not isinstance(rows, Tensor) or rows.dim() < 1 or rows.numel() == 1:
        return NotImplemented
    if str(rows.shape[0]) != str(math.prod(mask.shape)):
        raise _refuse("rows of another number are written under a mask")
    held = mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim()))
    value.copy_(torch.where(held, rows.reshape(value.shape).to(value.dtype), value))
    return None


def _nonzero(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    """Rules 2 and 3."""
    mask = args[0] if args else kwargs.get("input", kwargs.get("condition"))
    if not isinstance(mask, Tensor) or mask.dim() == 0 or len(args) > 2:
        return NotImplemented
    if func.__name__ == "where" and (len(args) > 1 or len(kwargs) > (not args)):
        return NotImplemented
    apart = func.__name__ == "where" or kwargs.get("as_tuple", False)
    held = mask != 0 if mask.dtype != torch.bool else mask
    if not _by_tokens(mask):
        if mask.dim() > 1:
            return NotImplemented
        every = [mode.mark(torch.tensor(number), number) for number in range(int(mask.shape[0]))]
        return (every,) if apart else every  # a list of numbers in place of a tensor of them
    if not apart:
        raise _refuse(_UNKNOWN_PICK)
    return tuple(mode.mark(_number_along(held, dim), _Place(held, dim)) for dim in range(mask.dim()))


def _number_along(mask: Tensor, dim: int) -> Tensor:
    sizes = [-1 if at == dim else 1 for at in range(mask.dim())]
    numbers = torch.arange(mask.shape[dim], device=mask.device).reshape(sizes)
    return numbers.expand(mask.shape).reshape(-1)


def _item(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    mark = mode.of(args[0])
    return mark if isinstance(mark, int) else NotImplemented


def _index_add(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    """Rules 2 and 4."""
    value, dim, index, rows = [*args] + [kwargs[name] for name in ("dim", "index", "source") if name in kwargs]
    mark = mode.of(index)
    if not isinstance(mark, (_Place, _Order)):
        return NotImplemented
    if dim != 0 or kwargs.get("alpha", 1) != 1:
        raise _refuse("they are added up in a way that is not known")
    if isinstance(mark, _Place):
        held = mark.mask.reshape(*mark.mask.shape, *[1] * (rows.dim() - 1))
        laid = rows.reshape(*mark.mask.shape, *rows.shape[1:])
        others = [other for other in range(mark.mask.dim()) if other != mark.dim]
        added = torch.where(held, laid, torch.zeros_like(laid))
        added = added.sum(others) if others else added
    else:
        added = rows.reshape(-1, mark.times, *rows.shape[1:]).sum(1) if mark.times > 1 else rows
    if _sizes(added) != _sizes(value):
        raise _refuse("their sum has another size")
    if func.__name__ == "index_add_":
        return value.add_(added.to(value.dtype))
    return value + added.to(value.dtype)


def _sort(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    """Rule 4."""
    keys = args[0]
    if keys.dim() != 1 or keys.is_floating_point() or not _by_tokens(keys) or any(kwargs.values()) or any(args[1:]):
        return NotImplemented
    order = mode.mark(torch.arange(keys.shape[0], device=keys.device), _Order(keys))
    return order if func.__name__ == "argsort" else (keys, order)


def _divide(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    mark = mode.of(args[0])
    if not isinstance(mark, _Order) or not isinstance(args[1], int):
        return NotImplemented
    if func.__name__ == "div" and kwargs.get("rounding_mode") not in ("trunc", "floor"):
        return NotImplemented
    return mode.mark(func(*args, **kwargs), _Order(mark.keys, mark.times * args[1]))


def _split(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    """Rule 4."""
    value, sizes = args[0], args[1] if len(args) > 1 else kwargs.get("split_size", kwargs.get("split_size_or_sections"))
    if not isinstance(sizes, (list, tuple)) or not any(_is_told_by_numbers(size) for size in sizes):
        return NotImplemented
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    mark = mode.of(value)
    if not isinstance(mark, _Sorted) or mark.part is not None or dim != 0 or not all(map(_is_told_by_numbers, sizes)):
        raise _refuse("counts of them cut something that does not stand in their order")
    return tuple(mode.mark(value.clone(), _Sorted(mark.keys, part)) for part in range(len(sizes)))


def _is_told_by_numbers(size: Any) -> bool:
    """Whether a size is none of shapes: only the model's numbers tell it."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _cat(mode: RouteDensely, func: Any, args: Any, kwargs: Any) -> Any:
    """Rule 4."""
    parts = args[0] if args else kwargs["tensors"]
    marks = [mode.of(part) for part in parts]
    if not any(isinstance(mark, _Sorted) and mark.part is not None for mark in marks):
        return NotImplemented
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if dim != 0:
        return NotImplemented  # beside one another: rows stay what they are
    first = marks[0]
    assert isinstance(first, _Sorted)
    if any(not isinstance(mark, _Sorted) or mark.keys is not first.keys or mark.part != number for number, mark in enumerate(marks)):
        raise _refuse("parts of an order are put together in a way that is not known")
    whole = torch.zeros_like(parts[0])
    for number, part in enumerate(parts):
        held = (first.keys == number).reshape(-1, *[1] * (part.dim() - 1))
        whole = torch.where(held, part, whole)
    return mode.mark(whole, _Sorted(first.keys))


def settle_masks(graph: torch.fx.Graph) -> None:
    """`where` under a mask that is the same in every call (which adapter a configuration names) is what the mask takes."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.where.self):
        if any(source.op in ("placeholder", "get_attr") for source in ancestors([node.args[0]], ())):
            continue
        (mask,) = evaluate_nodes([node.args[0]], {})
        taken = node.args[1] if mask.all() else node.args[2] if not mask.any() else None
        if isinstance(taken, torch.fx.Node) and _sizes(fake_value(taken)) == _sizes(fake_value(node)):
            node.replace_all_uses_with(taken)
            graph.erase_node(node)


_Rule: TypeAlias = Callable[[RouteDensely, Any, Any, Any], Any]
_RULES: dict[str, _Rule] = {
    "__getitem__": _get,
    "__setitem__": _set,
    **dict.fromkeys(("nonzero", "where"), _nonzero),
    **dict.fromkeys(("item", "__int__", "__index__"), _item),
    **dict.fromkeys(("index_add", "index_add_"), _index_add),
    **dict.fromkeys(("sort", "argsort"), _sort),
    **dict.fromkeys(("div", "floor_divide", "__floordiv__"), _divide),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("cat", "concat"), _cat),
}
