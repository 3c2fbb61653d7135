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
    for index, difference in sorted(site_differences(graph, full, ids).items()):
        if not difference <= TOLERANCE:
            path = full.plan.sites[index].site.path
            return f"{path} (site {index}): the runtime's attention differs by {difference:.2e} of the traced attention's largest value"
    if not is_huggingface(model):
        return IN_A_SEGMENT
    paths = [plan.site.path for plan in full.plan.sites]
    expected = _module_outputs(model, paths, ids)
    with attention_as_nodes(model):
        found = _module_outputs(model, paths, ids)
    for path in paths:
        if path in expected and (apart := _difference(expected[path], found[path])) is not None:
            return f"{path}: the model's own attention differs from the traced one by {apart:.2e}"
    return IN_A_SEGMENT


def _difference(expected: Tensor, found: Tensor) -> float | None:
    """The largest absolute difference where it is beyond the tolerance (or not a number), else None."""
    expected, found = expected.double(), found.double()
    difference = float((expected - found).abs().max())
    return None if difference <= TOLERANCE * max(1.0, float(expected.abs().max())) else difference


def site_differences(graph: torch.fx.GraphModule, full: CompiledModel, ids: Tensor) -> dict[int, float]:
    """For each site the largest difference between the traced attention and the runtime's on the same query, key and value.

    Relative to the site's largest value.  Each site gets the traced graph's own inputs, so nothing accumulates: a KV head
    that forgets shows at its site, in bfloat16 too.  graph: outlined.  full: the program under policy full.  ids: [tokens].
    """
    found: dict[int, float] = {}
    call = PackedCall.begin(full, [full.session()], [0], [len(ids)], only_last=False)

    class Compare(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            expected = super().call_function(target, args, kwargs)
            if target is ATTEND:
                query, key, value, sinks, site = args[:5]
                ran = call.attend(site, query, key, value, sinks, None, False).double()
                found[site] = float((expected.double() - ran).abs().max() / expected.double().abs().max().clamp_min(1e-30))
            return expected

    with torch.no_grad():
        Compare(graph).run(ids[None], torch.arange(len(ids))[None])
    return found


def original_noise(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """The original's logits [tokens, vocabulary] under two attention implementations of transformers: two roundings of one model.

    None for a model that has only one.
    """
    if not is_huggingface(model):
        return None
    config: Any = model.config
    before, found = config._attn_implementation, []
    try:
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)  # type: ignore[operator]
            found.append(original_logits(model, ids))
    except (ValueError, ImportError):  # transformers: this model has no such implementation
        return None
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
    return found[0], found[1]


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
