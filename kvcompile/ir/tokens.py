"""The token dimension: which dimension of a traced value counts the call's tokens.

A traced graph has one symbol, the number of tokens in the call.  A value whose shape holds it in one dimension is
token-wise material; in two dimensions it is an attention that no front end found.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

_OURS = "/passes/trace.py"  # calls the model: in every stack, and nobody's code
_fixed_tokens: ContextVar[int | None] = ContextVar("fixed_tokens", default=None)


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
    fixed = _fixed_tokens.get()
    if fixed is not None:
        return tuple(dim for dim, size in enumerate(value.shape) if size == fixed)
    return tuple(dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt) and not size.node.is_constant())


@contextlib.contextmanager
def fixed_tokens(tokens: int) -> Iterator[None]:
    """While open, sizes equal to `tokens` are the token dimension: for a graph of a fixed length, which is only looked at to
    say why it cannot be compiled.
    """
    token = _fixed_tokens.set(tokens)
    try:
        yield
    finally:
        _fixed_tokens.reset(token)


def path_of(node: torch.fx.Node) -> str:
    """The innermost module that a node came from, `model.layers.0.self_attn`; "" when the trace does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if not entry[0].startswith("_")]  # torch marks an empty stack by a name
    return paths[-1].removeprefix("model").removeprefix(".") if paths else ""


def place_of(node: torch.fx.Node) -> str:
    """Where a user finds a node: its module's path or its name, and the line of the model's own code it came from."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    source = [(file.rsplit("/", 1)[-1], line) for file, line in lines if "/torch/" not in file and not file.endswith(_OURS)]
    name = path_of(node) or node.name
    return f"{name} ({source[-1][0]}:{source[-1][1]})" if source else name
