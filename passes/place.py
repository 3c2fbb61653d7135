"""Place: the device and the reserved capacity of every group's store; refuses what does not fit the declared memory.

Address space is reserved, not memory: a growable store takes memory only for tokens written, and opens a further span
beyond its capacity.  A store on disk reserves nothing, and needs a block of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.errors import CapacityError, Problem, SpecError
from kvcompile.ir.plan import HeadGroup, Plan
from kvcompile.ir.policy import All, HeadPolicy, Static
from kvcompile.ir.store_bytes import store_problem
from kvcompile.ir.unit import Unit

DEFAULT_CAPACITY_TOKENS = 32768
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Place:
    """Device and capacity of every store; the declared memory must hold weights and one full session."""

    name: str = "place"
    requires: tuple[str, ...] = ("build_zones",)

    def run(self, unit: Unit) -> Unit:
        plan = unit.plan
        assert plan is not None
        self._check_stores(unit, plan)
        capacity = min(unit.position_rows or unit.context_tokens or DEFAULT_CAPACITY_TOKENS, 1 << 20)
        sites = tuple(
            replace(
                site,
                groups=tuple(
                    replace(
                        group,
                        device=group.policy.device or unit.spec.target.device,
                        capacity_tokens=capacity if _grows(group.policy) else None,
                    )
                    for group in site.groups
                ),
            )
            for site in plan.sites
        )
        placed = replace(plan, sites=sites)
        self._check_prefixes(unit, placed)
        self._check_memory(unit, placed, capacity)
        return replace(unit, plan=placed)

    def _check_stores(self, unit: Unit, plan: Plan) -> None:
        """Quantised stores fit the heads that they are for."""
        problems: dict[str, Problem] = {}
        for site in plan.sites:
            for group in site.groups:
                found = store_problem(group.policy.store, site.site.head_dim, site.site.value_dim)
                if found is not None:
                    where = unit.spec.where(f"policies.{_policy_name(unit, group.policy)}.store")
                    problems.setdefault(where, Problem(where, f"{site.site.path}: {found[0]}", found[1]))
        if problems:
            raise SpecError(*problems.values())

    def _check_prefixes(self, unit: Unit, plan: Plan) -> None:
        """A prefix leaves room for a token behind it."""
        where = {each.name: each.where for each in unit.spec.prefix.shared}
        problems = [
            Problem(
                where[each.name],
                f"the prefix {each.name} ends after {each.tokens} tokens, and the model has learnt positions for {plan.position_rows}.",
                "Shorten it.",
            )
            for each in plan.prefixes
            if plan.position_rows is not None and each.tokens >= plan.position_rows
        ]
        if problems:
            raise SpecError(*problems)

    def _check_memory(self, unit: Unit, plan: Plan, capacity: int) -> None:
        limit = unit.spec.target.memory_bytes
        if limit is None:
            return
        stored = _with_whole_prompts(plan).stored_bytes(capacity) + plan.staging_bytes
        held = sum(map(plan.prefix_bytes, plan.prefixes))
        behind = next((each for each in plan.prefixes if each.default or len(plan.prefixes) == 1), None)
        shared = 0 if behind is None else plan.lent_bytes(min(behind.tokens, capacity))  # the session reads it where it lies
        needed = plan.weight_bytes + stored + held - shared
        if needed > limit:
            raise CapacityError(
                Problem(
                    unit.spec.where("target.memory"),
                    f"the plan needs {needed / _MIB:,.0f} MiB ({plan.weight_bytes / _MIB:,.0f} MiB of weights, {stored / _MIB:,.0f} MiB "
                    f"for one session of {capacity} tokens{_of_prefixes(held - shared)}), more than the declared {limit / _MIB:,.0f} MiB.",
                    "Declare more memory, give more heads a streaming policy, or choose a smaller dtype.",
                )
            )

    def ensures(self, unit: Unit) -> None:
        assert unit.plan is not None
        groups = [group for site in unit.plan.sites for group in site.groups]
        assert all(group.device == (group.policy.device or unit.spec.target.device) for group in groups)


def _of_prefixes(held: int) -> str:
    return f", {held / _MIB:,.0f} MiB for prefixes that it does not stand behind" if held else ""


def _grows(policy: HeadPolicy) -> bool:
    """Whether its store reserves address space for every token."""
    return policy.device is None and (policy.window is None or policy.found is not None)


def _policy_name(unit: Unit, policy: HeadPolicy) -> str:
    """As the spec calls it: a layer with a window of its own has another name for it."""
    named = [name for name, other in unit.spec.policies.items() if name == policy.name or other.store == policy.store]
    return policy.name if policy.name in named else named[0]


def _with_whole_prompts(plan: Plan) -> Plan:
    """The plan as it is while a prompt is read: heads that will choose keys still hold all of it."""

    def whole(group: HeadGroup) -> HeadGroup:
        return replace(group, policy=replace(group.policy, zones=(All(),))) if isinstance(group.policy.found, Static) else group

    return replace(plan, sites=tuple(replace(site, groups=tuple(map(whole, site.groups))) for site in plan.sites))
