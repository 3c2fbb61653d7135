from __future__ import annotations

from dataclasses import replace

import pytest
import toys
from units import before, learnt, texts

from kvcompile.ir.errors import CapacityError, SpecError
from kvcompile.ir.plan import PlannedPrefix
from kvcompile.ir.show import difference
from kvcompile.ir.spec import Target
from kvcompile.ir.unit import Unit
from kvcompile.passes.place import DEFAULT_CAPACITY_TOKENS, Place

RULES = [{"policy": "short", "kv_heads": 0}]


def test_growable_stores_get_a_capacity(golden):
    golden("place", learnt("place", toys.gated(), heads=RULES))


def test_the_graph_is_not_touched():
    assert difference(*texts("place", toys.gated(), heads=RULES)) == ""


@pytest.mark.parametrize(
    ("context", "rows", "capacity"),
    [(None, None, DEFAULT_CAPACITY_TOKENS), (512, None, 512), (512, 64, 64), (1 << 30, None, 1 << 20)],
)
def test_the_capacity_is_what_the_model_was_made_for(context, rows, capacity):
    unit = replace(before("place", toys.gated(inner=(16,))), context_tokens=context, position_rows=rows)
    assert Place().run(unit).plan.sites[0].groups[0].capacity_tokens == capacity


def test_every_group_gets_the_target_device():
    unit = before("place", toys.gated(inner=(16,)))
    placed = Place().run(replace(unit, spec=replace(unit.spec, target=Target(device="cuda"))))
    assert {group.device for site in placed.plan.sites for group in site.groups} == {"cuda"}


def test_a_plan_that_does_not_fit_is_refused_with_its_parts():
    unit = before("place", toys.llama(layers=2), target={"memory": "1MiB"})
    with pytest.raises(CapacityError) as caught:
        Place().run(replace(unit, context_tokens=4096))
    text = str(caught.value)
    # 2 layers, 2 KV heads of 16 + 16 floats of 4 bytes: 512 bytes a token
    assert text.startswith("<spec>: target.memory: the plan needs 2 MiB (0 MiB of weights, 2 MiB for one session of 4096 tokens)")
    assert text.endswith(
        "tokens), more than the declared 1 MiB.\n  Declare more memory, give more heads a streaming policy, or choose a smaller dtype."
    )


def test_a_streaming_plan_fits_where_a_full_one_does_not():
    unit = before("place", toys.llama(layers=2), target={"memory": "1MiB"}, heads=[{"policy": "short"}])
    Place().run(replace(unit, context_tokens=1 << 20))


def test_a_plan_on_disk_needs_memory_for_a_block_and_the_staging_area():
    policies = {"far": {"zones": [{"all": {"device": "disk"}}]}}
    options = {"policies": policies, "heads": [{"policy": "far"}]}
    placed = Place().run(replace(before("place", toys.llama(layers=2), **options), context_tokens=1 << 20)).plan
    groups = [group for site in placed.sites for group in site.groups]
    assert [(group.device, group.capacity_tokens) for group in groups] == [("disk", None)] * 2
    block = 256 * 512 // 2  # tokens, bytes of one layer
    assert (placed.stored_bytes(1 << 20), placed.staging_bytes) == (2 * block, 4 * block)
    assert placed.disk_bytes((1 << 20) + 255) == (1 << 20) * 512
    fits = 6 * block + placed.weight_bytes
    Place().run(replace(before("place", toys.llama(layers=2), target={"memory": fits}, **options), context_tokens=1 << 20))
    with pytest.raises(CapacityError, match=r"for one session of 1048576 tokens\), more than the declared"):
        Place().run(replace(before("place", toys.llama(layers=2), target={"memory": fits - 1}, **options), context_tokens=1 << 20))


PREFIXES = (PlannedPrefix("a", (1,) * 40), PlannedPrefix("b", (2,) * 24, after="a", before=40, default=True), PlannedPrefix("c", (3,) * 16))


def behind_prefixes(memory: int = 1 << 40) -> Unit:
    shared = [{"name": each.name, "text": "x"} for each in PREFIXES]
    unit = before("place", toys.llama(layers=2), prefix={"shared": shared}, target={"memory": memory})
    return replace(unit, plan=replace(unit.plan, prefixes=PREFIXES), context_tokens=1024)


def test_prefixes_that_a_session_does_not_stand_behind_need_memory_too():
    fits = Place().run(behind_prefixes()).plan.weight_bytes + (1024 + 16) * 512  # a and b are part of the session
    Place().run(behind_prefixes(fits))
    with pytest.raises(CapacityError, match=r"for one session of 1024 tokens, 0 MiB for prefixes that it does not stand behind\)"):
        Place().run(behind_prefixes(fits - 1))


def test_what_forks_copy_is_not_shared_with_a_prefix():
    """Everything of `full`, nothing of a ring; and without a default a session stands behind none."""
    plan = Place().run(behind_prefixes()).plan
    assert plan.lent_bytes(64) == 64 * 512 == plan.stored_bytes(64)
    policies = {"short": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}]}}
    rings = Place().run(before("place", toys.llama(layers=2), policies=policies, heads=[{"policy": "short"}])).plan
    assert rings.lent_bytes(64) == 0 < rings.stored_bytes(64)
    none = tuple(replace(each, default=False) for each in PREFIXES)
    unit = behind_prefixes(plan.weight_bytes + (1024 + 64 + 16) * 512 - 1)
    with pytest.raises(CapacityError):
        Place().run(replace(unit, plan=replace(unit.plan, prefixes=none)))


def test_a_prefix_leaves_room_for_a_token():
    Place().run(replace(behind_prefixes(), plan=replace(behind_prefixes().plan, position_rows=65)))
    with pytest.raises(SpecError) as caught:
        Place().run(replace(behind_prefixes(), plan=replace(behind_prefixes().plan, position_rows=64)))
    assert str(caught.value) == (
        "<spec>: prefix.shared[1]: the prefix b ends after 64 tokens, and the model has learnt positions for 64.\n  Shorten it."
    )


@pytest.mark.parametrize(
    ("group", "told"),
    [
        (32, "kivi quantises values in groups of 32 channels, and value_dim 16 is no multiple of it.\n  Write group: 16."),
        (16, None),
    ],
)
def test_groups_that_do_not_fit_a_head_are_refused(group, told):
    policies = {"few": {"zones": ["all"], "store": {"kivi": {"group": group}}}}
    unit = before("place", toys.llama(layers=2), policies=policies, heads=[{"policy": "few", "kv_heads": 1}])
    if told is None:
        Place().run(unit)
        return
    with pytest.raises(SpecError) as caught:
        Place().run(unit)
    assert str(caught.value) == f"<spec>: policies.few.store: {unit.plan.sites[0].site.path}: {told}"
