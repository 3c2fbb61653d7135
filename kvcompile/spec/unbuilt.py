"""What the schema knows and this release does not build: each is refused by its name, here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

from kvcompile import __version__
from kvcompile.ir.errors import Problem
from kvcompile.spec.loader import Document
from kvcompile.spec.schema import PolicyForm, SpecForm, ZoneKind

BUILT_ZONES = ("all", "sink_recent", "static", "top_k", "clusters", "sample")
LOOKING_POLICIES = ("lookup", "magicpig", "quest", "infllm", "retroinfer")
FOUND_ZONES = ("static", "top_k", "clusters", "sample")  # their keys are found at run time, between the sinks and the window of sink_recent
BUILT_FORMATS = ("report",)


def unbuilt_problems(spec: SpecForm, document: Document) -> Iterator[Problem]:
    """One Problem for each thing of the spec that is not built in this release."""
    for name, policy in spec.policies.items():
        yield from _policy_problems(policy, f"policies.{name}", document, spec.target.device == "cuda")
    if spec.target.device == "cuda":
        for index, rule in enumerate(spec.heads or []):
            if rule.policy in LOOKING_POLICIES and rule.policy not in spec.policies:
                yield _not_built(document.where(f"heads[{index}].policy"), f"policy {rule.policy} on cuda", "Write target.device: cpu.")
        for name, policy in spec.policies.items():
            if policy.store is not None and (policy.store.kivi is not None or policy.store.dtype == "int8"):
                where = document.where(f"policies.{name}.store")
                yield _not_built(where, f"store {policy.store.dtype or 'kivi'} on cuda", "Write target.device: cpu.")
            for index, zone in enumerate(policy.zones):
                if zone.kind in FOUND_ZONES:
                    where = document.where(f"policies.{name}.zones[{index}].{zone.kind}")
                    yield _not_built(where, f"zone kind {zone.kind} on cuda", "Write target.device: cpu.")
    for index, name in enumerate(spec.output.formats or []):
        if name not in BUILT_FORMATS:
            where = document.where(f"output.formats[{index}]")
            yield _not_built(where, f"output format {name}", f"Built: {', '.join(BUILT_FORMATS)}.")


def _policy_problems(policy: PolicyForm, path: str, document: Document, on_cuda: bool) -> Iterator[Problem]:
    for place, device in policy.devices:
        yield from _device_problems(policy, device, document.where(f"{path}.{place}"), on_cuda)
    for index, zone in enumerate(policy.zones):
        yield from _zone_problems(zone, f"{path}.zones[{index}]", document)
    kinds = [zone.kind for zone in policy.zones]
    if all(kind in BUILT_ZONES for kind in kinds):
        yield from _combination_problems(kinds, document.where(f"{path}.zones"))


def fits_disk(policy: PolicyForm) -> bool:
    """Whether a store on disk is built for a policy: every token, as it is."""
    return [zone.kind for zone in policy.zones] == ["all"] and not _quantises(policy)


def _quantises(policy: PolicyForm) -> bool:
    return policy.store is not None and (policy.store.kivi is not None or policy.store.dtype == "int8")


def _device_problems(policy: PolicyForm, device: str, where: str, on_cuda: bool) -> Iterator[Problem]:
    if device == "cpu" and not on_cuda:
        yield Problem(where, "cpu is the target's device already: it changes nothing.", "Take it out, or write device: disk.")
    elif device != "disk":
        yield _not_built(where, f"device {device} for one policy", "Write target.device; what is not on disk lives there.")
    elif on_cuda:
        yield _not_built(where, "device disk on cuda", "Write target.device: cpu.")
    elif _quantises(policy):
        store = policy.store.dtype if policy.store is not None and policy.store.dtype else "kivi"
        yield _not_built(where, f"store {store} on disk", "Write store: bfloat16, float16 or float32.")
    elif not fits_disk(policy):
        kinds = " and ".join(zone.kind for zone in policy.zones)
        yield _not_built(where, f"{kinds} on disk", "Write zones: [{all: {device: disk}}], or take the device out.")


def _combination_problems(kinds: list[str], where: str) -> Iterator[Problem]:
    found = [kind for kind in kinds if kind in FOUND_ZONES]
    if len(kinds) == 1 and not found:
        return
    if found and kinds == ["sink_recent", *found[:1]]:
        return
    if found and "sink_recent" not in kinds:
        what = f"{found[0]} finds keys between sinks and window, and no zone says which these are."
        yield Problem(where, what, "Write it behind a zone such as sink_recent: {sink_tokens: 64, recent_tokens: 256}.")
    elif sorted(kinds) == sorted(["sink_recent", *found[:1]]):
        yield Problem(where, f"sink_recent stands behind {found[0]}.", "Write sink_recent first.")
    else:
        what = f"{' and '.join(kinds)} share tokens, which would then count twice."
        yield Problem(where, what, f"Keep one of the zones, or sink_recent and one of {', '.join(FOUND_ZONES)} behind it.")


def _zone_problems(zone: ZoneKind, path: str, document: Document) -> Iterator[Problem]:
    path = f"{path}.{zone.kind}"
    if zone.kind not in BUILT_ZONES:
        yield _not_built(document.where(path), f"zone kind {zone.kind}", f"Built: {', '.join(BUILT_ZONES)}.")
        return
    form = getattr(zone, zone.kind)
    if form.store is not None:
        yield _not_built(document.where(f"{path}.store"), "a store for one zone", "Write store at the policy.")


def _not_built(where: str, what: str, mend: str) -> Problem:
    return Problem(where, f"{what} is not built in kvcompile {__version__}.", mend)
