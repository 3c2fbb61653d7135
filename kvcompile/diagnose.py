"""Where a compiled model first differs from the original: the path of the first attention site.

First the traced graph's attentions against the runtime's: a kernel or a store is wrong.  Then the modules that own the
sites, run with the model's own attention and with `kvc.attend` in its place: the trace is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.ir.attend_op import ATTEND
from kvcompile.passes.huggingface import attention_as_nodes, is_huggingface
from kvcompile.passes.trace import takes_positions
from kvcompile.runtime.model import CompiledModel, PackedCall

TOLERANCE = 1e-2  # of the largest value: what is wrong is wrong by more, and bfloat16 rounds by less
IN_A_SEGMENT = "in a segment: every attention agrees, the logits do not"


def original_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of the model as its author wrote it, at least float32.  ids: [tokens]."""
    with torch.no_grad():
        if is_huggingface(model):
            out = model(input_ids=ids[None], use_cache=False)
        else:
            out = model(ids[None], torch.arange(len(ids))[None]) if takes_positions(model) else model(ids[None])
    logits: Tensor = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
    return logits[0] if logits.dtype == torch.float64 else logits[0].float()


def first_difference(model: nn.Module, graph: torch.fx.GraphModule, full: CompiledModel, ids: Tensor) -> str:
    """A sentence that names the first site.  graph: the outlined graph.  full: the program under policy full.  ids: [tokens]."""
    traced, ran = _traced_sites(graph, ids), _runtime_sites(full, ids)
    for plan in full.plan.sites:
        index, path = plan.site.index, plan.site.path
        if (difference := _difference(traced[index], ran[index])) is not None:
            return f"{path} (site {index}): the runtime's attention differs from the traced graph's by {difference:.2e}"
    if not is_huggingface(model):
        return IN_A_SEGMENT
    paths = [plan.site.path for plan in full.plan.sites]
    expected = _module_outputs(model, paths, ids)
    with attention_as_nodes(model):
        found = _module_outputs(model, paths, ids)
    for path in paths:
        if path in expected and (difference := _difference(expected[path], found[path])) is not None:
            return f"{path}: the model's own attention differs from the traced one by {difference:.2e}"
    return IN_A_SEGMENT


def _difference(expected: Tensor, found: Tensor) -> float | None:
    """The largest absolute difference where it is beyond the tolerance (or not a number), else None."""
    expected, found = expected.double(), found.double()
    difference = float((expected - found).abs().max())
    return None if difference <= TOLERANCE * max(1.0, float(expected.abs().max())) else difference


def _traced_sites(graph: torch.fx.GraphModule, ids: Tensor) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    class Record(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            out = super().call_function(target, args, kwargs)
            if target is ATTEND:
                found[args[4]] = out
            return out

    with torch.no_grad():
        Record(graph).run(ids[None], torch.arange(len(ids))[None])
    return found


def _runtime_sites(full: CompiledModel, ids: Tensor) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    call = PackedCall(full.plan, [full.session()], [0], [len(ids)], only_last=False)

    def attend(site: int, *rest: Any) -> Tensor:
        found[site] = call.attend(site, *rest)
        return found[site]

    with torch.no_grad():
        full.program.run(ids[None], torch.arange(len(ids))[None], attend, None)
    return found


def _module_outputs(model: nn.Module, paths: list[str], ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = []
    known = dict(model.named_modules())
    for path in paths:
        if path in known:

            def keep(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
                found[path] = out[0] if isinstance(out, tuple) else out

            hooks.append(known[path].register_forward_hook(keep))
    try:
        original_logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found
