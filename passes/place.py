"""Place: the device and the reserved capacity of every group's store; refuses what does not fit the declared memory.

Address space is reserved, not memory: a growable store takes memory only for tokens written, and opens a further span
beyond its capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.errors import CapacityError, Problem
from kvcompile.ir.plan import Plan
from kvcompile.ir.policy import All
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
        capacity = min(unit.position_rows or unit.context_tokens or DEFAULT_CAPACITY_TOKENS, 1 << 20)
        sites = tuple(
            replace(
                site,
                groups=tuple(
                    replace(
                        group,
                        device=unit.spec.target.device,
                        capacity_tokens=capacity if any(isinstance(zone, All) for zone in group.policy.zones) else None,
                    )
                    for group in site.groups
                ),
            )
            for site in plan.sites
        )
        placed = replace(plan, sites=sites)
        self._check_memory(unit, placed, capacity)
        return replace(unit, plan=placed)

    def _check_memory(self, unit: Unit, plan: Plan, capacity: int) -> None:
        limit = unit.spec.target.memory_bytes
        if limit is None:
            return
        stored = plan.stored_bytes(capacity)
        needed = plan.weight_bytes + stored
        if needed > limit:
            raise CapacityError(
                Problem(
                    unit.spec.where("target.memory"),
                    f"the plan needs {needed / _MIB:,.0f} MiB ({plan.weight_bytes / _MIB:,.0f} MiB of weights, {stored / _MIB:,.0f} MiB "
                    f"for one session of {capacity} tokens), more than the declared {limit / _MIB:,.0f} MiB.",
                    "Declare more memory, give more heads a streaming policy, or choose a smaller dtype.",
                )
            )

    def ensures(self, unit: Unit) -> None:
        assert unit.plan is not None
        assert all(group.device == unit.spec.target.device for site in unit.plan.sites for group in site.groups)
