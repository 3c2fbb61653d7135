"""Build zones: the KV heads of a site that share a policy become one group, with zones that the site can hold.

A layer with a sliding window or chunks of its own keeps them whatever the policy says: the model was trained so, and no
token outside them was ever visible.

A convolution keeps its last inputs, and as many more as the largest `rollback` among the model's policies promises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.errors import Problem, SpecError
from kvcompile.ir.plan import ConvolutionPlan, HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import HeadPolicy, SinkRecent
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.unit import Unit


@dataclass(frozen=True)
class BuildZones:
    """KV heads with equal policies form a group; a model's own window or chunk overrides the policy's zones."""

    name: str = "build_zones"
    requires: tuple[str, ...] = ("assign_policies",)

    def run(self, unit: Unit) -> Unit:
        for site, policies in zip(unit.sites, unit.policies, strict=True):
            found = next((policy for policy in policies if policy.found is not None), None)
            if found is not None and site.slopes and site.own_window is None:
                what = f"{site.path} adds ALiBi slopes to its logits, which no zone that finds keys knows of."
                raise SpecError(Problem(unit.spec.where(f"policies.{found.name}.zones"), what, "Use full or streaming for this model."))
            _refuse_beside_choices(unit, site, policies)
        sites = tuple(
            SitePlan(site, _groups(site, [_at_site(policy, site) for policy in policies]))
            for site, policies in zip(unit.sites, unit.policies, strict=True)
        )
        overridden = [site.path for site, policies in zip(unit.sites, unit.policies, strict=True) if site.own_window and policies]
        choosing = sum(site.chosen_tokens is not None for site in unit.sites)
        notes = [f"{len(overridden)} layers keep the model's own window or chunk whatever the policy"] if overridden else []
        notes += [f"{choosing} layers choose their keys themselves: they attend in torch"] if choosing else []
        seen: dict[int, int] = {}
        for node in unit.graph.graph.find_nodes(op="get_attr"):
            tensor = unit.graph.get_parameter(node.target) if _is_parameter(unit, node.target) else unit.graph.get_buffer(node.target)
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
        rollback_tokens = max((policy.rollback_tokens for policies in unit.policies for policy in policies), default=0)
        convolutions = tuple(ConvolutionPlan(site, rollback_tokens) for site in unit.convolutions)
        relay = unit.spec.prefix.relay
        plan = Plan(sites, sum(seen.values()), unit.context_tokens, unit.position_rows, tuple(notes), convolutions, relay, unit.prefixes)
        return replace(unit, plan=plan)

    def ensures(self, unit: Unit) -> None:
        assert unit.plan is not None and len(unit.plan.sites) == len(unit.sites)
        assert len(unit.plan.convolutions) == len(unit.convolutions)


def _refuse_beside_choices(unit: Unit, site: AttentionSite, policies: tuple[HeadPolicy, ...]) -> None:
    """A model that chooses its keys itself chooses of those that a policy keeps, as they are and where they are."""
    if site.chosen_tokens is not None and site.slopes:
        what = f"{site.path} chooses its keys itself and has slopes (ALiBi), which attention to chosen keys does not know."
        raise SpecError(Problem(unit.spec.where("model"), what, "No policy runs this model."))
    for policy in policies if site.chosen_tokens is not None else ():
        quantised, rotated = policy.store.quantised is not None, policy.positions != "absolute"
        if policy.found is not None or quantised or rotated or policy.device:
            field = "zones" if policy.found is not None or policy.device else "store" if quantised else "positions"
            what = f"{site.path} chooses {site.chosen_tokens} keys for each query itself, of exact keys in memory, at their own positions."
            raise SpecError(Problem(unit.spec.where(f"policies.{policy.name}.{field}"), what, "Use full or streaming for this model."))


def _is_parameter(unit: Unit, target: str) -> bool:
    try:
        unit.graph.get_parameter(target)
    except AttributeError:
        return False
    return True


def _at_site(policy: HeadPolicy, site: AttentionSite) -> HeadPolicy:
    window = site.own_window
    if window is None:
        return policy
    name = f"chunk {window}" if site.chunk_tokens == window else f"window {window}"
    return replace(policy, name=name, zones=(SinkRecent(0, window),), positions="absolute", device=None)


def _groups(site: AttentionSite, policies: list[HeadPolicy]) -> tuple[HeadGroup, ...]:
    members: dict[HeadPolicy, list[int]] = {}
    for kv_head, policy in enumerate(policies):
        members.setdefault(policy, []).append(kv_head)
    return tuple(HeadGroup(tuple(kv_heads), policy) for policy, kv_heads in members.items())
