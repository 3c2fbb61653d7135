"""A graph as text: one node a line, shape first, the module it came from behind.  No absolute paths, stable between runs."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from kvcompile.ir.tokens import fake_value, path_of
from kvcompile.ir.unit import Unit

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


def shape_text(value: Any) -> str:
    """`bf16[1, s, 576]`: dtype and shape, `s` for the number of tokens; a SymInt is `size`; unknown is `-`."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join("s" if isinstance(size, torch.SymInt) else str(size) for size in value.shape)
        return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return "size"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(shape_text(item) for item in value) + ")"
    return "-"


def _argument_text(argument: Any) -> str:
    if isinstance(argument, torch.fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(_argument_text(item) for item in argument)
        return f"[{inner}]" if isinstance(argument, list) else f"({inner})"
    return str(argument)


def node_text(node: torch.fx.Node) -> str:
    """One line: `bf16[1, s, 576]  %linear_3 = aten.linear.default(%mul_4, %weight)  # model.layers.0.mlp`."""
    arguments = [_argument_text(argument) for argument in node.args]
    arguments += [f"{key}={_argument_text(argument)}" for key, argument in node.kwargs.items()]
    shape = shape_text(fake_value(node))
    if node.op == "output":
        return f"{'return':24s}{arguments[0]}"
    if node.op == "placeholder":
        what = "input"
    elif node.op == "get_attr":
        what = f"weight {node.target}"
    else:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        namespace = str(node.target).split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""
        what = f"{namespace + '.' if namespace else ''}{target}({', '.join(arguments)})"
    path = path_of(node)
    return f"{shape:24s}%{node.name} = {what}" + (f"  # {path}" if path and node.op == "call_function" else "")


def graph_text(module: torch.fx.GraphModule) -> str:
    """The whole graph, its segments (sub-graphs) behind it, each under its name."""
    lines = [node_text(node) for node in module.graph.nodes]
    called = dict.fromkeys(node.target for node in module.graph.find_nodes(op="call_module"))
    for name in called:
        segment = module.get_submodule(name)
        assert isinstance(segment, torch.fx.GraphModule)
        lines += ["", f"{name}:"] + ["  " + node_text(node) for node in segment.graph.nodes]
    return "\n".join(lines) + "\n"


def difference(before: str, after: str, context: int = 0) -> str:
    """What changed between two texts, as a unified diff without headers or line numbers; "" when nothing did."""
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=context)
    return "\n".join(line for line in list(diff)[2:] if not line.startswith("@@"))


def unit_text(unit: Unit) -> str:
    """What passes learnt, one fact a line: sites, policies, groups with capacity, device and kernel."""
    lines = []
    for site in unit.sites:
        facts = f"{site.query_heads} query heads over {site.kv_heads}, head_dim {site.head_dim}/{site.value_dim}, scale {site.scale:g}"
        lines.append(f"site {site.index} {site.path}: {facts}, {site.dtype}")
    for convolution in unit.convolutions:
        facts = f"{convolution.channels} channels, {convolution.taps} taps"
        lines.append(f"convolution {convolution.index} {convolution.path}: {facts}, {convolution.dtype}")
    for site, policies in zip(unit.sites, unit.policies, strict=False):
        lines.append(f"policies {site.index}: {', '.join(policy.name for policy in policies)}")
    for plan in unit.plan.sites if unit.plan else ():
        for group in plan.groups:
            zones = " and ".join(zone.describe() for zone in group.policy.zones)
            line = f"group {plan.site.index}: KV heads {list(group.kv_heads)} {group.policy.name} ({zones})"
            line += f" positions {group.policy.positions}" if group.policy.positions != "absolute" else ""
            line += f" {store}" if (store := group.policy.store.describe()) else ""
            line += f" rollback {group.policy.rollback_tokens}" if group.policy.rollback_tokens else ""
            line += f", capacity {group.capacity_tokens} on {group.device}" if group.capacity_tokens else ""
            line += ", on disk" if group.device == "disk" else ""
            request = group.request
            if request:
                seen = "all" if request.recent_tokens is None else f"{request.sink_tokens} + {request.recent_tokens}"
                seen += " in rows" if request.key_layout == "rows" else ""
                line += f", {request.kind} {request.device} {request.store_dtype}->{request.compute_dtype} sees {seen} key {request.key}"
            if lookup := group.lookup:
                line += f", {lookup.kind} {lookup.device} {lookup.store_dtype} key {lookup.key}"
            lines.append(line)
    for kept in unit.plan.convolutions if unit.plan else ():
        lines.append(f"state {kept.site.index}: the last {kept.kept_tokens} inputs")
    if unit.plan:
        lines.append(f"weights {unit.plan.weight_bytes} bytes")
        lines += [f"note: {note}" for note in unit.plan.notes]
    lines += [f"position rows {unit.position_rows}"] * (unit.position_rows is not None)
    return "\n".join([*lines, *(f"warning: {warning}" for warning in unit.warnings)]) + "\n"
