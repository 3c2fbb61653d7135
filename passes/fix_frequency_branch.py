"""Fix the frequency branch: rotary frequencies chosen by the largest position in the call are chosen once, for the declared context.

    frequencies = where(max(position_ids) + 1 > 4096, long, short)   ->   where(declared context > 4096, long, short)

LongRoPE (Ding et al. 2024), as the published models run it, has one set of frequencies up to the length of the first training
and another beyond it.  In a call that packs several sessions, or a part of a prompt, the largest position is that of another
session, or of this part: a long session would change a short one's logits, and steps would differ from one prefill.

1. Only a maximum over positions that does nothing but choose (compared, after constants were added) is fixed, to the last
   position of the declared context.  Any other is left to the token-wise check, which refuses it.
2. Without a declared context there is nothing to choose by, and the model is refused.

The choice is in the graph only if it was written as above.  `frequencies_chosen_in_the_graph` writes it so for models whose own code
branches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.evaluate import opname
from kvcompile.ir.graphs import depends_only_on
from kvcompile.ir.show import node_text
from kvcompile.ir.tokens import fake_value, path_of, token_dimensions
from kvcompile.ir.unit import Unit

_aten = torch.ops.aten
_COMPARISONS = frozenset({"gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"})
_SHIFTS = frozenset({"add", "sub", "to", "_to_copy", "clone"})


@dataclass(frozen=True)
class FixFrequencyBranch:
    """A comparison with the call's largest position becomes one with the declared context's."""

    name: str = "fix_frequency_branch"
    requires: tuple[str, ...] = ("make_positions_explicit",)

    def run(self, unit: Unit) -> Unit:
        graph = unit.graph.graph
        _, position_ids = graph.find_nodes(op="placeholder")
        choosing = [node for node in graph.nodes if _is_longest(node, position_ids) and _only_chooses(node)]
        if not choosing:
            return unit
        context = unit.context_tokens
        if context is None:
            raise UnsupportedGraphError(
                Problem(
                    f"{self.name}: {path_of(choosing[0]) or choosing[0].name}",
                    f"the largest position of a call chooses what is computed for all its tokens: {node_text(choosing[0]).strip()}",
                    "Declare the context in the model's configuration: max_position_embeddings.",
                )
            )
        for node in choosing:
            value = fake_value(node)
            with graph.inserting_before(node):
                last = graph.call_function(
                    _aten.full.default, (list(value.shape), context - 1), {"dtype": value.dtype, "device": value.device}
                )
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
        graph.eliminate_dead_code()
        unit.graph.recompile()
        warning = (
            f"the original chooses rotary frequencies by the longest sequence of a call; here they are always those of the "
            f"declared context, {context} tokens, and it is compared under these"
        )
        return replace(unit, warnings=(*unit.warnings, warning), frequency_tokens=context)

    def ensures(self, unit: Unit) -> None:
        _, position_ids = unit.graph.graph.find_nodes(op="placeholder")
        assert not any(_is_longest(node, position_ids) and _only_chooses(node) for node in unit.graph.graph.nodes)


def _is_longest(node: torch.fx.Node, position_ids: torch.fx.Node) -> bool:
    """Whether a node is the maximum of positions over the tokens of the call."""
    return (
        node.op == "call_function"
        and opname(node) in ("max", "amax")
        and not token_dimensions(fake_value(node))
        and isinstance(fake_value(node), torch.Tensor)
        and depends_only_on(node, position_ids)
    )


def _only_chooses(node: torch.fx.Node) -> bool:
    """Rule 1: every user compares the value, or what becomes of it by adding constants."""
    return bool(node.users) and all(
        opname(user) in _COMPARISONS or (opname(user) in _SHIFTS and len(user.all_input_nodes) == 1 and _only_chooses(user))
        for user in node.users
        if user.op == "call_function"
    )


@contextlib.contextmanager
def frequencies_chosen_in_the_graph(model: nn.Module) -> Iterator[None]:
    """While open, a transformers model chooses LongRoPE's frequencies by `torch.where`; afterwards its buffers are what they were.

    Until 5.17 transformers branches in Python on the largest position, which torch.export cannot trace; newer ones write `where`
    themselves and are left alone.  Without LongRoPE nothing changes.
    Source: transformers.modeling_rope_utils.dynamic_rope_update, which wraps the forward of each rotary module.
    """
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            update = _frequency_update(type(module).forward) if _has_longrope(module) else None
            if update is None:
                continue
            if "where" not in update.cell_contents.__code__.co_names:
                undo.callback(setattr, update, "cell_contents", update.cell_contents)
                update.cell_contents = _choose_frequencies
            if update.cell_contents is _choose_frequencies:
                buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
                undo.callback(module._buffers.update, buffers)
                # after a short call the chosen frequencies and the short ones are one tensor: one of them is written to
                module._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
        yield


def _has_longrope(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)  # a text, or one for each kind of layer
    return "longrope" in (kinds.values() if isinstance(kinds, dict) else (kinds,))


def _frequency_update(forward: Callable[..., Any] | None) -> CellType | None:
    """Where `forward`, or what it wraps, holds the function that chooses LongRoPE's frequencies; None if it holds none."""
    while forward is not None:
        cells: tuple[CellType, ...] = getattr(forward, "__closure__", None) or ()
        names = forward.__code__.co_freevars if cells else ()
        if "longrope_frequency_update" in names:
            return cells[names.index("longrope_frequency_update")]
        forward = getattr(forward, "__wrapped__", None)
    return None


def _choose_frequencies(module: Any, position_ids: Tensor, device: torch.device, layer_type: str | None = None) -> None:
    """The function of newer versions: both sets are made, and the largest position chooses one for all tokens."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tokens = torch.max(position_ids) + 1
    parameters, prefix = module.config.rope_parameters, ""
    if layer_type is not None:
        parameters, prefix = parameters[layer_type], f"{layer_type}_"
    trained = parameters["original_max_position_embeddings"]
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=trained + 1, layer_type=layer_type)
    short = getattr(module, f"{prefix}original_inv_freq").to(device)
    getattr(module, f"{prefix}inv_freq").copy_(torch.where(tokens > trained, long, short))


def refuse_dynamic_frequencies(configuration: object) -> None:
    """Refuses `rope_type: dynamic` by its name; a configuration without rotary parameters is none.

    Its frequencies grow with the longest sequence that the module has seen: they are kept in the module, so that one
    sequence changes the next, and torch.export cannot trace them.
    Raises UnsupportedGraphError.
    """
    found = getattr(configuration, "rope_parameters", None) or {}
    for parameters in (found, *found.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "dynamic":
            raise UnsupportedGraphError(
                Problem(
                    "trace",
                    "the model has rope_type: dynamic, whose frequencies depend on the longest sequence that it has seen.",
                    "Choose rope_type linear, yarn or longrope in the model's configuration, as its weights allow.",
                )
            )
