"""Assign policies: the spec's rules become one policy for each KV head of each site.  The only pass that reads the spec's rules.

1. Every KV head starts with policy `full`; later rules win.
2. A rule covers the KV heads of its layers; with a pattern, only the lowest-scoring `share` of them.
3. A pattern's own sink and recent tokens (a DuoAttention folder) were put into the rule's policy when the spec was read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.errors import Problem, SpecError
from kvcompile.ir.patterns import select_lowest
from kvcompile.ir.policy import All, HeadPolicy
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.spec import HeadRule
from kvcompile.ir.unit import Unit


@dataclass(frozen=True)
class AssignPolicies:
    """One policy for each KV head of each site."""

    name: str = "assign_policies"
    requires: tuple[str, ...] = ("canonicalise_attention",)

    def run(self, unit: Unit) -> Unit:
        full = unit.spec.policies.get("full", HeadPolicy("full", (All(),)))
        assigned: dict[tuple[int, int], HeadPolicy] = {
            (site.index, kv_head): full for site in unit.sites for kv_head in range(site.kv_heads)
        }
        problems: list[Problem] = []
        warnings: list[str] = []
        for rule in unit.spec.heads:
            wrong = _problems(rule, unit.sites)
            problems += wrong
            if wrong:
                continue
            candidates = _candidates(rule, unit.sites)
            if rule.pattern is not None:
                assert rule.share is not None
                selection = select_lowest(rule.pattern.scores, candidates, rule.share)
                candidates = list(selection.chosen)
                if selection.tie:
                    warnings.append(f"{rule.where}: {selection.tie}")
            for head in candidates:
                assigned[head] = unit.spec.policies[rule.policy]
        if problems:
            raise SpecError(*problems)
        policies = tuple(tuple(assigned[site.index, kv_head] for kv_head in range(site.kv_heads)) for site in unit.sites)
        return replace(unit, policies=policies, warnings=unit.warnings + tuple(warnings))

    def ensures(self, unit: Unit) -> None:
        assert [len(policies) for policies in unit.policies] == [site.kv_heads for site in unit.sites]


def _candidates(rule: HeadRule, sites: tuple[AttentionSite, ...]) -> list[tuple[int, int]]:
    layers = rule.layers if rule.layers is not None else range(len(sites))
    return [
        (layer, kv_head) for layer in layers for kv_head in (rule.kv_heads if rule.kv_heads is not None else range(sites[layer].kv_heads))
    ]


def _problems(rule: HeadRule, sites: tuple[AttentionSite, ...]) -> list[Problem]:
    found = []
    for layer in rule.layers or ():
        if not 0 <= layer < len(sites):
            found.append(
                Problem(
                    f"{rule.where}.layers",
                    f"layer {layer} does not exist ({len(sites)} attention layers, 0 to {len(sites) - 1}).",
                    f"Write numbers from 0 to {len(sites) - 1}, a range such as 0-1, or leave `layers` out.",
                )
            )
    layers = rule.layers if rule.layers is not None else range(len(sites))
    for layer in layers if not found else ():
        site = sites[layer]
        for kv_head in rule.kv_heads or ():
            if not 0 <= kv_head < site.kv_heads:
                found.append(
                    Problem(
                        f"{rule.where}.kv_heads",
                        f"KV head {kv_head} does not exist in {site.path} ({site.kv_heads} KV heads, 0 to {site.kv_heads - 1}).",
                        f'Write numbers from 0 to {site.kv_heads - 1}, a range such as 0-1, or "all".',
                    )
                )
                break
        if found:
            break
    if rule.pattern is not None:
        shape = [len(row) for row in rule.pattern.scores]
        wanted = [site.kv_heads for site in sites]
        if shape != wanted:
            found.append(
                Problem(
                    f"{rule.where}.pattern",
                    f"{rule.pattern.path} scores {len(shape)} layers of {max(shape, default=0)} KV heads; "
                    f"the model has {len(wanted)} of {max(wanted)}.",
                    "Use a pattern computed for this model.",
                )
            )
    return found
