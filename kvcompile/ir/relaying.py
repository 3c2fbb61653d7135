"""What a plan knows of relay (runtime/relay.py): which KV heads sessions can see together, and whether that is settled before a machine is
measured."""

from __future__ import annotations

from collections.abc import Callable

from kvcompile.ir.plan import HeadGroup, Plan
from kvcompile.ir.policy import All, Kivi
from kvcompile.ir.spec import Target

CHUNK_TOKENS = 256  # kChunkTokens of codegen/cpp/kernel.h: only whole chunks are seen together
ALWAYS = f"always, as the spec says: from 2 sessions and {CHUNK_TOKENS} shared tokens on"


def can_relay(group: HeadGroup) -> bool:
    """Whether sessions can see the past of a group of KV heads together: a C++ kernel reads all of it, in rows or blocks or as int8."""
    request = group.request
    if request is None or group.device != "cpu" or group.policy.zones != (All(),) or isinstance(group.policy.store.quantised, Kivi):
        return False
    return not request.alibi and request.chunk_tokens is None and request.recent_tokens is None


def why_off(plan: Plan, deterministic: bool, able: Callable[[HeadGroup], bool]) -> str | None:
    """Why nothing is relayed, for people; None where it may be.  able: `can_relay`, of groups with kernels."""
    if plan.relay == "off":
        return "off: the spec says so"
    if deterministic:
        return "off: under target.deterministic sessions step one after the other"
    if not any(able(group) for site in plan.sites for group in site.groups):
        return "off: no KV head keeps all its past where a C++ kernel reads it"
    return None


def relay_remark(plan: Plan, target: Target, has_kernel: Callable[[HeadGroup], bool] | None = None) -> str:
    """One line: whether sessions that step together see what they share together, why, and on how many KV heads.

    has_kernel: of a model that is compiled; None: all groups get what the spec asks for.
    """

    def able(group: HeadGroup) -> bool:
        return can_relay(group) and (target.kernels == "generated" if has_kernel is None else has_kernel(group))

    off = why_off(plan, target.deterministic, able)
    if off is not None:
        return f"relay {off}"
    groups = [group for site in plan.sites for group in site.groups]
    some, every = (sum(len(group.kv_heads) for group in counted) for counted in (filter(able, groups), groups))
    heads = f"{some} of {every} KV heads, those that keep all their past"
    if plan.relay == "always":
        return f"relay {ALWAYS}, on {heads}"
    return f"relay auto, on {heads}: measured on the machine when several sessions first step together (model.relay.reason)"
