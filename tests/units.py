"""Toy units on their way through the passes, and what a pass adds to one as text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvcompile.ir.show import graph_text
from kvcompile.ir.spec import Spec
from kvcompile.ir.unit import Unit
from kvcompile.passes.trace import trace
from kvcompile.pipeline import PASSES, Pipeline
from kvcompile.spec import load_spec


def spec(**sections: Any) -> Spec:
    """A spec without a model; `short` is 2 sink + 4 recent tokens."""
    policies = {"short": {"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 4}}]}, **sections.pop("policies", {})}
    return load_spec({"kvcompile": 1, "policies": policies, **sections})


def traced(model: nn.Module, **sections: Any) -> Unit:
    return Unit(trace(model), spec(**sections))


def before(name: str, model: nn.Module, **sections: Any) -> Unit:
    """The unit as pass `name` gets it."""
    names = ["trace", *(each.name for each in PASSES)]
    return Pipeline().run(traced(model, **sections), stop_after=names[names.index(name) - 1])


def after(name: str, model: nn.Module, **sections: Any) -> Unit:
    return Pipeline().run(traced(model, **sections), stop_after=name)


def texts(name: str, model: nn.Module, **sections: Any) -> tuple[str, str]:
    """The graph before and after a pass."""
    return graph_text(before(name, model, **sections).graph), graph_text(after(name, model, **sections).graph)


def logits(graph: torch.fx.GraphModule, ids: torch.Tensor) -> torch.Tensor:
    """What a graph computes at any stage [tokens, vocabulary]: `kvc.attend` runs as an operator."""
    with torch.no_grad():
        return graph(ids[None], torch.arange(len(ids))[None])[0]


def some_ids(tokens: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


def agrees_before_and_after(name: str, model: nn.Module, vocabulary: int, **sections: Any) -> None:
    """Asserts that a pass does not change what the graph computes, for numbers of tokens that the trace did not see."""
    one, two = before(name, model, **sections).graph, after(name, model, **sections).graph
    for tokens in (1, 5, 40):
        ids = some_ids(tokens, vocabulary)
        torch.testing.assert_close(logits(two, ids), logits(one, ids), rtol=1e-5, atol=1e-5)


def unit_text(unit: Unit) -> str:
    """What passes learnt, one fact a line: sites, policies, groups with capacity, device and kernel."""
    lines = []
    for site in unit.sites:
        facts = [f"{site.query_heads} query heads over {site.kv_heads}", f"head_dim {site.head_dim}/{site.value_dim}", f"scale {site.scale:g}"]
        facts += [f"window {site.sliding_window}"] * bool(site.sliding_window) + [f"soft cap {site.soft_cap:g}"] * bool(site.soft_cap)
        lines.append(f"site {site.index} {site.path}: {', '.join([*facts, *['learnt sinks'] * site.learnt_sinks, site.dtype])}")
    for site, policies in zip(unit.sites, unit.policies, strict=False):
        lines.append(f"policies {site.index}: {', '.join(policy.name for policy in policies)}")
    for plan in unit.plan.sites if unit.plan else ():
        for group in plan.groups:
            zones = " and ".join(zone.describe() for zone in group.policy.zones)
            line = f"group {plan.site.index}: KV heads {list(group.kv_heads)} {group.policy.name} ({zones})"
            line += f" {group.policy.store.dtype}" if group.policy.store.dtype else ""
            line += f" rollback {group.policy.rollback_tokens}" if group.policy.rollback_tokens else ""
            line += f", capacity {group.capacity_tokens}" if group.capacity_tokens else ""
            request = group.request
            if request:
                seen = "all" if request.recent_tokens is None else f"{request.sink_tokens} + {request.recent_tokens}"
                line += f", {request.kind} {request.device} {request.store_dtype}->{request.compute_dtype} sees {seen} key {request.key}"
            lines.append(line)
    if unit.plan:
        lines.append(f"weights {unit.plan.weight_bytes} bytes")
        lines += [f"note: {note}" for note in unit.plan.notes]
    lines += [f"position rows {unit.position_rows}"] * (unit.position_rows is not None)
    return "\n".join([*lines, *(f"warning: {warning}" for warning in unit.warnings)]) + "\n"
