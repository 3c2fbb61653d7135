"""Request kernels: what each group needs computed, without naming its layer, so that equal layers share one kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.indexes import SKETCH
from kvcompile.ir.plan import HeadGroup
from kvcompile.ir.policy import HeadPolicy, Int8, TopK
from kvcompile.ir.request import KernelRequest, LookupRequest
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.store_bytes import quantised_in
from kvcompile.ir.unit import Unit


@dataclass(frozen=True)
class RequestKernels:
    """The requests of each group of KV heads that kernels can serve; equal groups of other layers ask for the same."""

    name: str = "request_kernels"
    requires: tuple[str, ...] = ("place",)

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        sites = tuple(replace(site, groups=tuple(_with_requests(site.site, group) for group in site.groups)) for site in unit.plan.sites)
        return replace(unit, plan=replace(unit.plan, sites=sites))

    def ensures(self, unit: Unit) -> None:
        assert unit.plan is not None
        for site in unit.plan.sites:
            assert all(group.request is not None or group.policy.found or site.site.chosen_tokens for group in site.groups)


def _with_requests(site: AttentionSite, group: HeadGroup) -> HeadGroup:
    if site.chosen_tokens is not None:
        return group  # torch attends to keys that the model itself chooses
    if group.policy.found is not None and group.policy.store.quantised is not None:
        return group  # torch reads quantised stores that keys are found in, prompts and single tokens
    return replace(group, request=_request(site, group), lookup=_lookup(site, group))


def _lookup(site: AttentionSite, group: HeadGroup) -> LookupRequest | None:
    """None where nothing is looked up, and of indexes without a kernel."""
    found = group.policy.found
    if not isinstance(found, TopK) or found.index != SKETCH.name:
        return None
    return LookupRequest(
        kind="lookup",
        device=_computing(group),
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        queries_per_kv=site.queries_per_kv,
        dtype=site.dtype,
        store_dtype=group.policy.store.dtype or site.dtype,
        scale=site.scale,
        soft_cap=site.soft_cap,
    )


def _request(site: AttentionSite, group: HeadGroup) -> KernelRequest:
    """Where keys are found, a prompt sees all its past."""
    found = group.policy.found
    window = group.policy.window if found is None else None
    sink_tokens, recent_tokens = (0, None) if window is None else (window.sink_tokens, window.recent_tokens)
    return KernelRequest(
        kind="attend_spans",
        device=_computing(group),
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        queries_per_kv=site.queries_per_kv,
        dtype=site.dtype,
        compute_dtype="float64" if site.dtype == "float64" else "float32",
        store_dtype=group.policy.store.dtype or site.dtype,
        scale=site.scale,
        soft_cap=site.soft_cap,
        learnt_sinks=site.learnt_sinks,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        chunk_tokens=site.chunk_tokens,
        alibi=bool(site.slopes),
        cache_index=group.policy.positions == "cache_index",
        store_quantised=_quantised(group.policy),
        key_layout="blocks" if found is None else "rows",
    )


def _computing(group: HeadGroup) -> str:
    """Where its attention is computed: what lies on disk is read by the CPU."""
    return "cpu" if group.device == "disk" else group.device


def _quantised(policy: HeadPolicy) -> str:
    """KernelRequest.store_quantised: nothing of how many tokens stay exact, which is no kernel's business."""
    quantised = quantised_in(policy.store, policy.window, policy.rollback_tokens)
    if quantised is None:
        return ""
    return "int8" if isinstance(quantised, Int8) else f"kivi {quantised.bits} {quantised.group}"
