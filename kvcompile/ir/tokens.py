"""The token dimension: which dimension of a traced value counts the call's tokens.

A traced graph has one symbol, the number of tokens in the call.  A value whose shape holds it in one dimension is
token-wise material; in two dimensions it is an attention that no front end found.
"""

from __future__ import annotations

from typing import Any

import torch


def fake_value(node: torch.fx.Node) -> Any:
    """What the trace recorded for a node: a fake tensor, a SymInt, or a tuple of them; None when nothing was."""
    return node.meta.get("val")


def is_size(node: torch.fx.Node) -> bool:
    """Whether a node is a number made of sizes (a SymInt), not a tensor."""
    return isinstance(fake_value(node), (torch.SymInt, torch.SymBool, torch.SymFloat))


def token_dimensions(value: Any) -> tuple[int, ...]:
    """The dimensions of a fake tensor that depend on the number of tokens; () for anything else."""
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt) and not size.node.is_constant())


def path_of(node: torch.fx.Node) -> str:
    """The innermost module that a node came from, `model.layers.0.self_attn`; "" when the trace does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if not entry[0].startswith("_")]  # torch marks an empty stack by a name
    return paths[-1].removeprefix("model").removeprefix(".") if paths else ""
