"""What the schema knows and this release does not build: each is refused by its name, here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

from kvcompile import __version__
from kvcompile.ir.errors import Problem
from kvcompile.spec.loader import Document
from kvcompile.spec.schema import PolicyForm, SpecForm, StoreForm, ZoneKind

BUILT_ZONES = ("all", "sink_recent")
BUILT_POLICIES = ("full", "streaming")
BUILT_STORES = ("float32", "bfloat16", "float16")
BUILT_FORMATS = ("report",)
UNBUILT_POLICIES = ("lookup", "magicpig", "quest", "infllm", "retroinfer")


def unbuilt_problems(spec: SpecForm, document: Document) -> Iterator[Problem]:
    """One Problem for each thing of the spec that is not built in this release."""
    for name, policy in spec.policies.items():
        yield from _policy_problems(policy, f"policies.{name}", document)
    for index, rule in enumerate(spec.heads or []):
        if rule.policy in UNBUILT_POLICIES and rule.policy not in spec.policies:
            path = f"heads[{index}].policy"
            yield _not_built(document.where(path), f"policy {rule.policy}", f"Built: {', '.join(BUILT_POLICIES)}, and your own.")
    if spec.prefix is not None:
        yield _not_built(document.where("prefix"), "a prefix shared by several sessions", "Take it out.")
    for index, name in enumerate(spec.output.formats or []):
        if name not in BUILT_FORMATS:
            where = document.where(f"output.formats[{index}]")
            yield _not_built(where, f"output format {name}", f"Built: {', '.join(BUILT_FORMATS)}.")


def _policy_problems(policy: PolicyForm, path: str, document: Document) -> Iterator[Problem]:
    if policy.store is not None:
        yield from _store_problems(policy.store, f"{path}.store", document)
    if policy.device is not None:
        yield _not_built(document.where(f"{path}.device"), "a device for one policy", "Write target.device; every store lives there.")
    for index, zone in enumerate(policy.zones):
        yield from _zone_problems(zone, f"{path}.zones[{index}]", document)
    kinds = [zone.kind for zone in policy.zones]
    if len(kinds) > 1 and all(kind in BUILT_ZONES for kind in kinds):
        what = f"{' and '.join(kinds)} share tokens, which would then count twice."
        yield Problem(document.where(f"{path}.zones"), what, "Keep one of the zones.")


def _zone_problems(zone: ZoneKind, path: str, document: Document) -> Iterator[Problem]:
    path = f"{path}.{zone.kind}"
    if zone.kind not in BUILT_ZONES:
        yield _not_built(document.where(path), f"zone kind {zone.kind}", f"Built: {', '.join(BUILT_ZONES)}.")
        return
    form = getattr(zone, zone.kind)
    if form.store is not None:
        yield _not_built(document.where(f"{path}.store"), "a store for one zone", "Write store at the policy.")
    if form.device is not None:
        yield _not_built(document.where(f"{path}.device"), "a device for one zone", "Write target.device; every store lives there.")


def _store_problems(store: StoreForm, path: str, document: Document) -> Iterator[Problem]:
    name = store.dtype if store.dtype is not None else "kivi"
    if name not in BUILT_STORES:
        yield _not_built(document.where(path), f"store {name}", f"Built: {', '.join(BUILT_STORES)}.")


def _not_built(where: str, what: str, mend: str) -> Problem:
    return Problem(where, f"{what} is not built in kvcompile {__version__}.", mend)
