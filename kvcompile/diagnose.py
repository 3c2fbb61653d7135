"""Where a compiled model first differs from the original: the path of the first site.

First the traced graph's attentions and convolutions against the runtime's: a kernel or a store is wrong.  Then the modules that own the
sites, run with the model's own attention and with `kvc.attend` in its place: the trace is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.convolve_op import CONVOLVE
from kvcompile.ir.sites import AttentionSite, ConvolutionSite
from kvcompile.passes.huggingface import attention_as_nodes, is_huggingface
from kvcompile.passes.trace import PlainCall
from kvcompile.runtime.model import CompiledModel, PackedCall

TOLERANCE = 1e-2  # of the largest value: what is wrong is wrong by more, and bfloat16 rounds by less
IN_A_SEGMENT = "in a segment: every attention agrees, the logits do not"


@contextlib.contextmanager
def soft_caps_applied(model: nn.Module, sites: Iterable[AttentionSite]) -> Iterator[None]:
    """While open, a transformers model whose sites cap their logits runs "eager" attention if it would run on "sdpa".

    scaled_dot_product_attention has no soft cap; transformers 5.17 chooses it for such models all the same and leaves the cap out
    without a word, where newer versions refuse to.  Other models are left as they are.
    """
    config: Any = model.config if is_huggingface(model) else None
    if config is None or config._attn_implementation != "sdpa" or not any(site.soft_cap for site in sites):
        yield
        return
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


def original_logits(model: nn.Module, ids: Tensor, frequency_tokens: int | None = None) -> Tensor:
    """Logits [tokens, vocabulary] of the model as its author wrote it, at least float32.  ids: [tokens].

    frequency_tokens: a model that chooses its frequencies by the longest position of a call chooses as for so many tokens:
    one more token stands at the last of these positions, behind all others, which never see it.  None: as it is called.
    """
    with torch.no_grad():
        if frequency_tokens is not None and len(ids) < frequency_tokens:
            positions = torch.arange(len(ids) + 1)
            positions[-1] = frequency_tokens - 1
            longer = torch.cat([ids, ids[:1]])[None]
            if is_huggingface(model):
                logits: Tensor = model(input_ids=longer, position_ids=positions[None], use_cache=False).logits
            else:
                logits = PlainCall(model)(longer, positions[None])
        elif is_huggingface(model):
            logits = model(input_ids=ids[None], use_cache=False).logits
        else:
            logits = PlainCall(model)(ids[None], torch.arange(len(ids))[None])
    logits = logits[0, : len(ids)]
    return logits if logits.dtype == torch.float64 else logits.float()


def first_difference(
    model: nn.Module, graph: torch.fx.GraphModule, full: CompiledModel, ids: Tensor, frequency_tokens: int | None = None
) -> str:
    """A sentence that names the first site.  graph: the outlined graph.  full: the program under policy full.  ids: [tokens]."""
    for site, difference in site_differences(graph, full, ids).items():
        if not difference <= TOLERANCE:
            number, kind = ("site", "attention") if isinstance(site, AttentionSite) else ("convolution", "convolution")
            where = f"{site.path} ({number} {site.index})"
            return f"{where}: the runtime's {kind} differs by {difference:.2e} of the traced {kind}'s largest value"
    if not is_huggingface(model):
        return IN_A_SEGMENT
    paths = [plan.site.path for plan in full.plan.sites]
    with soft_caps_applied(model, [plan.site for plan in full.plan.sites]):
        expected = _module_outputs(model, paths, ids, frequency_tokens)
    with attention_as_nodes(model):
        found = _module_outputs(model, paths, ids, frequency_tokens)
    for path in paths:
        if path in expected and (apart := _difference(expected[path], found[path])) is not None:
            return f"{path}: the model's own attention differs from the traced one by {apart:.2e}"
    return IN_A_SEGMENT


def _difference(expected: Tensor, found: Tensor) -> float | None:
    """The largest absolute difference where it is beyond the tolerance (or not a number), else None."""
    expected, found = expected.double(), found.double()
    difference = float((expected - found).abs().max())
    return None if difference <= TOLERANCE * max(1.0, float(expected.abs().max())) else difference


def site_differences(graph: torch.fx.GraphModule, full: CompiledModel, ids: Tensor) -> dict[AttentionSite | ConvolutionSite, float]:
    """For each site, in program order, the largest difference between what was traced and the runtime's on the same inputs.

    Relative to the site's largest value.  Each site gets the traced graph's own inputs, so nothing accumulates: a KV head
    that forgets shows at its site, in bfloat16 too.  graph: outlined.  full: the program under policy full.  ids: [tokens].
    """
    found: dict[AttentionSite | ConvolutionSite, float] = {}
    call = PackedCall.begin(full, [full.session(prefix=None)], [0], [len(ids)], only_last=False)

    def apart(expected: Tensor, ran: Tensor) -> float:
        return float((expected.double() - ran.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))

    class Compare(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            expected = super().call_function(target, args, kwargs)
            if target is ATTEND:
                query, key, value, sinks, site = args[:5]
                choosing = args[11] if len(args) > 11 else None
                found[full.plan.sites[site].site] = apart(expected, call.attend(site, query, key, value, sinks, None, False, choosing))
            elif target is CONVOLVE:
                source, weight, bias, site = args
                found[full.plan.convolutions[site].site] = apart(expected, call.convolve(site, source, weight, bias, False))
            return expected

    with torch.no_grad():
        Compare(graph).run(ids[None], torch.arange(len(ids))[None])
    return found


def original_noise(model: nn.Module, ids: Tensor, frequency_tokens: int | None = None) -> tuple[Tensor, Tensor] | None:
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
            found.append(original_logits(model, ids, frequency_tokens))
    except (ValueError, ImportError):  # transformers: this model has no such implementation
        return None
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
    return found[0], found[1]


def _module_outputs(model: nn.Module, paths: list[str], ids: Tensor, frequency_tokens: int | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = []
    known = dict(model.named_modules())
    for path in paths:
        if path in known:

            def keep(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
                found[path] = (out[0] if isinstance(out, tuple) else out)[:, : len(ids)]

            hooks.append(known[path].register_forward_hook(keep))
    try:
        original_logits(model, ids, frequency_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found
