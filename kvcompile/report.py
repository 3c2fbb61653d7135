"""The plan as people and programs read it, and the files of `output.formats: [report]`.

stored: bytes that a session holds, for each token of its context.   read: bytes of it that one generated token reads.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.ir.errors import KvcompileError
from kvcompile.ir.indexes import SAMPLING
from kvcompile.ir.plan import Plan, PlannedPrefix, SitePlan
from kvcompile.ir.policy import Sample
from kvcompile.ir.relaying import relay_remark
from kvcompile.ir.spec import Output

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel

DEFAULT_CONTEXTS = (8 * 1024, 32 * 1024, 128 * 1024)


@dataclass(frozen=True)
class Table:
    """A table before it is drawn.  Columns in `right` are aligned to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    right: frozenset[int] = frozenset()

    def text(self) -> str:
        """Aligned plain text without trailing spaces."""
        widths = [max(len(row[column]) for row in (self.header, *self.rows)) for column in range(len(self.header))]

        def line(row: Sequence[str]) -> str:
            cells = (c.rjust(w) if n in self.right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
            return "  ".join(cells).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([*([self.title] if self.title else []), line(self.header), rule, *map(line, self.rows)])


def format_bytes(count: float) -> str:
    """0 B, 1023 B, 1.5 KiB, 12.0 MiB: one decimal from KiB on."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1023.95 or unit == "TiB":
            break
    return f"{count:.1f} {unit}"


def format_tokens(count: int) -> str:
    """8192 is 8K; what is no multiple of 1024 is written out."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)


def fold_sites(plan: Plan) -> list[list[SitePlan]]:
    """Consecutive sites that cost and do the same; which of their KV heads have which policy may differ."""
    folded: list[list[SitePlan]] = []
    for site in plan.sites:
        if folded and _alike(folded[-1][0]) == _alike(site):
            folded[-1].append(site)
        else:
            folded.append([site])
    return folded


def describe_groups(site: SitePlan) -> str:
    """`1 full (all), 2 streaming (sink 16 + recent 256)`."""
    parts = []
    for (name, zones, store, positions, device), count in _policy_counts(site).items():
        kept = " and ".join(zones) + (f", positions {positions}" if positions != "absolute" else "")
        kept += f" on {device}" if device else ""
        told = name if kept == "all" and name == "full" else f"{name} ({kept})"
        parts.append(f"{count} {told}{f' in {store}' if store else ''}")
    return ", ".join(parts)


def layer_table(plan: Plan, contexts: Sequence[int]) -> Table:
    """One row for each run of equal layers: bytes of one of them."""
    words = ("stored", "on disk", "read") if _uses_disk(plan) else ("stored", "read")
    columns = [f"{format_tokens(context)} {word}" for context in contexts for word in words]
    rows = []
    for sites in fold_sites(plan):
        first, last = sites[0].site.index, sites[-1].site.index
        cost = [format_bytes(value) for context in contexts for value in _costs(sites[0], context, words)]
        rows.append((f"{first}" if first == last else f"{first}-{last}", describe_groups(sites[0]), *cost))
    return Table(
        ("layers", "KV heads", *columns),
        tuple(rows),
        f"Each layer: bytes stored for a token of context{', in memory and on disk' if _uses_disk(plan) else ''}, "
        "bytes read for a generated token",
        frozenset(range(2, 2 + len(columns))),
    )


def _uses_disk(plan: Plan) -> bool:
    return any(group.device == "disk" for site in plan.sites for group in site.groups)


def _costs(site: SitePlan, context: int, words: Sequence[str]) -> list[float]:
    """Bytes of a layer, in the order of the table's columns."""
    costs = {
        "stored": site.stored_bytes(context) / context,
        "on disk": site.disk_bytes(context) / context,
        "read": site.read_bytes(context),
    }
    return [costs[word] for word in words]


def total_table(plan: Plan, contexts: Sequence[int]) -> Table:
    """The whole model against the plain KV cache in the model's dtype."""
    rows = []
    for context in contexts:
        full, stored, read = plan.full_bytes(context), plan.stored_bytes(context), plan.read_bytes(context)
        rows.append(
            (
                format_tokens(context),
                *(format_bytes(value) for value in (full, stored)),
                _ratio(full, stored),
                format_bytes(stored / context),
                *([format_bytes(plan.disk_bytes(context) / context)] if _uses_disk(plan) else []),
                format_bytes(read),
                _ratio(full, read),
            )
        )
    on_disk = ("on disk a token",) if _uses_disk(plan) else ()
    header = ("context", "full cache", "stored", "less by", "stored a token", *on_disk, "read a token", "less by")
    title = "The model: bytes of a session" + (", stored in memory" if on_disk else "")
    return Table(header, tuple(rows), title, frozenset(range(1, len(header))))


def plan_tables(plan: Plan, contexts: Sequence[int]) -> list[Table]:
    return [layer_table(plan, contexts), total_table(plan, contexts)]


def plan_text(plan: Plan, contexts: Sequence[int] = DEFAULT_CONTEXTS) -> str:
    """The tables and the notes, plain."""
    return "\n\n".join([*(table.text() for table in plan_tables(plan, contexts)), "\n".join(plan_remarks(plan, contexts))]).rstrip()


def plan_remarks(plan: Plan, contexts: Sequence[int]) -> list[str]:
    """What stands below the tables."""
    remarks = [f"weights: {format_bytes(plan.weight_bytes)}"] if plan.weight_bytes else []
    if plan.context_tokens is not None:
        beyond = [format_tokens(context) for context in contexts if context > plan.context_tokens]
        made_for = f"the model was made for {format_tokens(plan.context_tokens)} tokens"
        remarks.append(f"{made_for}; bytes at {', '.join(beyond)} are computed all the same" if beyond else made_for)
    if plan.position_rows is not None:
        remarks.append(f"the model has learnt positions for {plan.position_rows} tokens: no session can be longer")
    remarks += [*_sample_remarks(plan), *_build_remarks(plan, contexts)]
    if plan.staging_bytes:
        remarks.append(f"blocks from the disk are read into {format_bytes(plan.staging_bytes)} of memory, once for all sessions")
    remarks += [_prefix_remark(plan, prefix) for prefix in plan.prefixes]
    return [*remarks, *_convolution_remarks(plan), *(f"note: {note}" for note in plan.notes)]


def _prefix_remark(plan: Plan, prefix: PlannedPrefix) -> str:
    """`prefix rules (after system): 120 tokens behind 1024, read once, 2.6 MiB for all sessions`."""
    facts = [f"after {prefix.after}"] if prefix.after is not None else []
    facts += ["a system message"] if prefix.system is not None else []
    facts += ["the default"] if prefix.default else []
    name = f"prefix {prefix.name}" + (f" ({', '.join(facts)})" if facts else "")
    behind = f" behind {prefix.before}" if prefix.before else ""
    return f"{name}: {len(prefix.ids)} tokens{behind}, read once, {format_bytes(plan.prefix_bytes(prefix))} for all sessions"


def _sample_remarks(plan: Plan) -> list[str]:
    """One line for each zone that draws keys by chance, and each head_dim."""
    drawn = {(group.policy.found, each.site.head_dim): None for each in plan.sites for group in each.groups}
    return [
        f"{zone.describe()}: how many keys are drawn is known only when they are; read bytes count "
        f"{SAMPLING[zone.index].sampled_share(head_dim, dict(zone.options)):.2%} of those between sinks and window, as where keys of "
        f"{head_dim} dimensions lie in all directions alike"
        for zone, head_dim in drawn
        if isinstance(zone, Sample)
    ]


def _build_remarks(plan: Plan, contexts: Sequence[int]) -> list[str]:
    """Where the indexes take longer to make than the prompt takes to read."""
    longer = [(context, share) for context in contexts if (share := plan.build_share(context)) > 1]
    if not longer:
        return []
    told = ", ".join(f"{share:.1f} times at {format_tokens(context)}" for context, share in longer)
    return [f"making the indexes, by the first generated token, takes longer than reading the prompt: on a CPU about {told}"]


def _convolution_remarks(plan: Plan) -> list[str]:
    """One line for all short convolutions of a kind; the layers of the table are attentions only."""
    alike: Counter[tuple[int, int, int]] = Counter()
    held: Counter[tuple[int, int, int]] = Counter()
    for each in plan.convolutions:
        kind = (each.site.channels, each.site.taps, each.kept_tokens)
        alike[kind] += 1
        held[kind] += each.stored_bytes(each.kept_tokens)
    return [
        f"short convolutions: {count} of {channels} channels and {taps} taps; a session keeps their last {kept} inputs, "
        f"{format_bytes(held[channels, taps, kept])} in all"
        for (channels, taps, kept), count in alike.items()
    ]


def plan_dict(plan: Plan, contexts: Sequence[int]) -> dict[str, Any]:
    """The plan for programs: numbers in bytes, every site with the KV heads of each group."""
    return {
        "weight_bytes": plan.weight_bytes,
        "context_tokens": plan.context_tokens,
        "notes": list(plan.notes),
        "prefix": {"relay": plan.relay, "shared": [_prefix_dict(plan, prefix) for prefix in plan.prefixes]},
        "contexts": [
            {
                "tokens": context,
                "stored_bytes": plan.stored_bytes(context),
                "stored_bytes_per_context_token": plan.stored_bytes(context) / context,
                "disk_bytes": plan.disk_bytes(context),
                "disk_bytes_per_context_token": plan.disk_bytes(context) / context,
                "read_bytes_per_generated_token": plan.read_bytes(context),
                "full_bytes": plan.full_bytes(context),
            }
            for context in contexts
        ],
        "sites": [_site_dict(site, contexts) for site in plan.sites],
        "convolutions": [{**asdict(each.site), "kept_tokens": each.kept_tokens} for each in plan.convolutions],
    }


def _prefix_dict(plan: Plan, prefix: PlannedPrefix) -> dict[str, Any]:
    """own_tokens, bytes: without those of the prefix that it continues."""
    return {
        "name": prefix.name,
        "after": prefix.after,
        "tokens": prefix.tokens,
        "own_tokens": len(prefix.ids),
        "bytes": plan.prefix_bytes(prefix),
        "chat": prefix.system is not None,
        "default": prefix.default,
    }


def verified_text(model: CompiledModel) -> str:
    return "" if model.verification is None else str(model.verification.text())


def compiled_dict(model: CompiledModel, contexts: Sequence[int]) -> dict[str, Any]:
    """A compiled model for programs: report.json, and the command's --json."""
    return {
        "spec": model.spec.source,
        "model": model.name,
        "plan": plan_dict(model.plan, contexts),
        "verification": None if model.verification is None else model.verification.as_dict(),
        "warnings": list(model.warnings),
        "timings": dict(model.timings),
    }


def report_files(output: Output) -> list[Path]:
    """What a compile writes for `output:`; [] where it asks for nothing."""
    if output.directory is None or "report" not in output.formats:
        return []
    folder = Path(output.directory).expanduser()
    return [folder / "report.json", folder / "report.txt"]


def report_compiled(model: CompiledModel, contexts: Sequence[int]) -> list[Path]:
    """Writes what the model's spec asks for in `output:`; the files written."""
    files = report_files(model.spec.output)
    if not files:
        return []
    warnings = "".join(f"warning: {warning}\n" for warning in model.warnings)
    plan = f"{plan_text(model.plan, contexts)}\n{relay_remark(model.plan, model.spec.target, model.kernels.serve)}"
    text = f"{model.spec.source}\n\n{plan}\n{warnings}\n{verified_text(model)}"
    return write_report(files[0].parent, compiled_dict(model, contexts), text)


def write_report(folder: Path, value: Mapping[str, Any], text: str) -> list[Path]:
    """report.json and report.txt in `folder`."""
    return write_files(folder, {"report.json": as_json(value), "report.txt": text.rstrip() + "\n"})


def as_json(value: Mapping[str, Any]) -> str:
    """A report for programs, as it stands in a file."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_files(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    """Files by name in `folder`, which is made; all new or none: they are written aside and then moved."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".report-", dir=folder))
        try:
            for name, content in contents.items():
                (aside / name).write_text(content, encoding="utf-8")
            for name in contents:
                os.replace(aside / name, folder / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise KvcompileError.at(
            str(folder), f"the report cannot be written: {error.strerror or error}.", "Name another folder with -o."
        ) from error
    return [folder / name for name in contents]


def _site_dict(site: SitePlan, contexts: Sequence[int]) -> dict[str, Any]:
    return {
        **asdict(site.site),
        "groups": [
            {
                "kv_heads": list(group.kv_heads),
                "policy": group.policy.name,
                "zones": [zone.describe() for zone in group.policy.zones],
                "positions": group.policy.positions,
                "store_dtype": group.policy.store.dtype or site.site.dtype,
                "store": group.policy.store.describe() or site.site.dtype,
                "device": group.device,
                "kernel": group.request.key if group.request else None,
                "lookup_kernel": group.lookup.key if group.lookup else None,
            }
            for group in site.groups
        ],
        "stored_bytes": {str(context): site.stored_bytes(context) for context in contexts},
        "disk_bytes": {str(context): site.disk_bytes(context) for context in contexts},
        "read_bytes": {str(context): site.read_bytes(context) for context in contexts},
    }


def _policy_counts(site: SitePlan) -> Counter[tuple[str, tuple[str, ...], str, str, str]]:
    counts: Counter[tuple[str, tuple[str, ...], str, str, str]] = Counter()
    for group in site.groups:
        zones = tuple(zone.describe() for zone in group.policy.zones)
        policy = group.policy
        counts[(policy.name, zones, policy.store.describe(), policy.positions, policy.device or "")] += len(group.kv_heads)
    return counts


def _alike(site: SitePlan) -> tuple[Any, ...]:
    facts = site.site
    return (facts.kv_heads, facts.head_dim, facts.value_dim, facts.dtype, tuple(sorted(map(str, _policy_counts(site).items()))))


def _ratio(full: float, part: float) -> str:
    return f"{full / part:.1f}x" if part else "-"
