"""A document -> a Spec: the schema, then what the schema cannot know, then plain dataclasses.  All problems are raised at once.

When the schema finds faults, each faulty section is replaced by a harmless one (`_mended`), so that the other sections are still
checked for unknown names, missing files and numbers that the model does not have.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from kvcompile.ir.errors import KvcompileError, Problem, SpecError
from kvcompile.ir.indexes import BUILT_IN as BUILT_IN_INDEXES
from kvcompile.ir.indexes import SAMPLING, index_facts, index_names
from kvcompile.ir.policy import All, HeadPolicy, Int8, Kivi, Sample, SinkRecent, Static, Store, TopK, Zone, can_stand_together
from kvcompile.ir.spec import HeadRule, ModelSource, Output, Pattern, Prefix, Spec, Target
from kvcompile.ir.store_bytes import LANES
from kvcompile.models.header import ModelHeader, exists, read_header
from kvcompile.spec import bundled
from kvcompile.spec.loader import Document, from_mapping, read_yaml
from kvcompile.spec.messages import nearest, translate
from kvcompile.spec.overrides import apply_overrides
from kvcompile.spec.patterns import check_pattern, read_pattern
from kvcompile.spec.prefixes import read_prefix
from kvcompile.spec.schema import MOST_TOKENS, ClustersForm, PolicyForm, RuleForm, SampleForm, SpecForm, StoreForm, TopKForm, ZoneKind
from kvcompile.spec.unbuilt import FOUND_ZONES, fits_disk, unbuilt_problems

BUILT_IN = {
    "full": HeadPolicy("full", (All(),)),
    "streaming": HeadPolicy("streaming", (SinkRecent(16, 256),)),
    "lookup": HeadPolicy("lookup", (SinkRecent(64, 256), TopK(0.01, "sketch", tail=True))),
    "magicpig": HeadPolicy("magicpig", (SinkRecent(4, 64), Sample())),
    "quest": HeadPolicy("quest", (SinkRecent(16, 64), TopK(64 * 16, "minmax", (("page_tokens", 16),)))),
    "infllm": HeadPolicy("infllm", (SinkRecent(128, 4096), TopK(16 * 128, "representatives", (("page_tokens", 128),)))),
    "retroinfer": HeadPolicy(
        "retroinfer", (SinkRecent(4, 64), TopK(0.018, "clusters", (("estimate", 0.232), ("tokens_per_cluster", 16)), "sum", tail=True))
    ),
}


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str], check_model: bool) -> Spec:
    document, folder = _open(source)
    reader = _Reader(document, folder, check_model)
    reader.problems += document.problems
    reader.problems += apply_overrides(document, overrides)
    form = reader.validate()
    if form is not None:
        reader.problems += unbuilt_problems(form, document)
        spec = reader.build(form)
    if reader.problems:
        raise SpecError(*sorted(_without_repeats(reader.problems), key=_line))
    assert form is not None
    return spec


def _open(source: str | Path | Mapping[str, Any]) -> tuple[Document, Path]:
    """The document and the folder that its relative paths start from."""
    if isinstance(source, Mapping):
        return from_mapping(source), Path(".")
    if isinstance(source, str) and source.startswith(bundled.PREFIX):
        path = bundled.bundled_path(source)
    else:
        path = Path(source)
        if not exists(path):
            near = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
            mend = f"Did you mean {path.parent / near}?" if near else "Name a YAML file, or builtin:NAME."
            name = next(iter(str(source).splitlines()), "")[:200]
            raise SpecError.at(name, "does not exist.", mend)
    return read_yaml(path), path.parent


@dataclass
class _Reader:
    document: Document
    folder: Path
    check_model: bool
    problems: list[Problem] = field(default_factory=list)
    faulty_heads: bool = False
    header: ModelHeader | None = None

    # --- the schema ------------------------------------------------------------------------------------------------------------------

    def validate(self) -> SpecForm | None:
        """The whole form, or one whose faulty sections were replaced, or None when nothing can be made of it."""
        value = self.document.value
        if not isinstance(value, dict):
            found = "is empty" if value is None else "is not a mapping"
            self.problems.append(Problem(self.document.source, f"{found}.", "Write keys and values, `kvcompile: 1` first."))
            return None
        try:
            return SpecForm.model_validate(value)
        except ValidationError as error:
            self.problems += translate(error, self.document)
            locations = [detail["loc"] for detail in error.errors(include_url=False, include_context=False, include_input=False)]
        try:
            return SpecForm.model_validate(self._mended(value, locations))
        except ValidationError:
            return None

    def _mended(self, value: dict[str, Any], locations: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
        mended = copy.deepcopy(value)
        mended["kvcompile"] = 1
        for location in locations:
            self.faulty_heads |= location[0] == "heads"
            match location:
                case ("policies", str(name), *_) if isinstance(mended.get("policies"), dict):
                    mended["policies"][name] = {"zones": ["all"]}
                case ("heads", int(index), *_) if isinstance(mended.get("heads"), list):
                    policy = value["heads"][index].get("policy") if isinstance(value["heads"][index], dict) else None
                    mended["heads"][index] = {"policy": policy if isinstance(policy, str) and policy else "full"}
                case (str(section), *_) if section != "kvcompile":
                    mended.pop(section, None)
        return mended

    # --- what the schema cannot know -------------------------------------------------------------------------------------------------

    def build(self, form: SpecForm) -> Spec:
        """The Spec; where `problems` were found it is incomplete, and nobody sees it."""
        model = self._model(form)
        patterns = [self._pattern(index, rule) for index, rule in enumerate(form.heads or [])]
        policies = self._policies(form, patterns)
        return Spec(
            model=model,
            policies=policies,
            heads=self._heads(form, patterns, policies),
            target=Target(
                device=form.target.device,
                threads=form.target.threads,
                memory_bytes=form.target.memory,
                deterministic=form.target.deterministic,
                isa=None if form.target.isa == "auto" else form.target.isa,
                kernels=form.target.kernels,
                segments=form.target.segments,
                disk=self._disk(form),
                where=self._where("target"),
            ),
            prefill_chunk_tokens=form.prefill.chunk_tokens,
            verify_tokens=form.verify.tokens,
            seed=form.seed,
            output=self._output(form),
            prefix=self._prefix(form),
            source=self.document.source,
            lines=dict(self.document.lines),
        )

    def _model(self, form: SpecForm) -> ModelSource | None:
        if form.model is None:
            return None
        folder = self._folder("model.path")
        where = self._where("model.path")
        if self.check_model:
            try:
                self.header = read_header(form.model.path, folder)
            except KvcompileError as error:
                for problem in error.problems:
                    what = problem.what if problem.where == form.model.path else f"{problem.where} {problem.what}"
                    self.problems.append(Problem(f"{where}: {form.model.path}", what, problem.mend))
        return ModelSource(path=form.model.path, dtype=form.model.dtype, folder=str(folder), where=where)

    def _pattern(self, index: int, rule: RuleForm) -> Pattern | None:
        path = f"heads[{index}]"
        if (rule.pattern is None) != (rule.share is None):
            given, missing, example = ("share", "pattern", "patterns/model.yaml") if rule.pattern is None else ("pattern", "share", "75%")
            self._problem(f"{path}.{given}", f"{given} without {missing}.", f"Write {missing} too, for example {missing}: {example}.")
        if rule.pattern is None:
            return None
        where = self._where(f"{path}.pattern")
        file = self._folder(f"{path}.pattern") / Path(rule.pattern).expanduser()
        if not exists(file):
            near = nearest(file.name, os.listdir(file.parent) if file.parent.is_dir() else [])
            mend = f'Did you mean "{Path(rule.pattern).parent / near}"?' if near else "Paths start at the spec's folder."
            self.problems.append(Problem(where, f'the pattern "{rule.pattern}" does not exist (looked for {file}).', mend))
            return None
        try:
            pattern = read_pattern(file)
        except SpecError as error:
            self.problems += error.problems
            return None
        self.problems += check_pattern(pattern, self.header, where)
        return pattern

    def _policies(self, form: SpecForm, patterns: Sequence[Pattern | None]) -> dict[str, HeadPolicy]:
        policies = {name: _seeded(policy, form.seed) for name, policy in BUILT_IN.items() if name not in form.policies}
        for name, policy in form.policies.items():
            users = [index for index, rule in enumerate(form.heads or []) if rule.policy == name]
            zones = tuple(self._zones(name, policy, [(index, patterns[index]) for index in users], form.seed))
            if name == "full" and zones and zones != (All(),):
                self._problem(
                    "policies.full.zones",
                    "full is what KV heads without a rule do and what every compile is proved with: its zones are [all].",
                    "Give this policy another name.",
                )
            if zones and can_stand_together(zones):
                store = self._store(name, policy.store)
                policies[name] = HeadPolicy(name, zones, policy.positions, store, policy.rollback, self._device(name, policy))
                self._check_positions(policies[name], policy.zones)
        return policies

    def _store(self, name: str, form: StoreForm | None) -> Store:
        if form is None:
            return Store()
        quantised: Int8 | Kivi | None = Int8() if form.dtype == "int8" else None
        path = f"policies.{name}.store"
        if form.kivi is not None:
            bits, group, residual = form.kivi.bits, form.kivi.group, form.kivi.residual_tokens
            quantised = Kivi(bits, group, residual)
            if group % LANES:
                mend = f"Write group: {max(1, round(group / LANES)) * LANES}."
                self._problem(f"{path}.kivi.group", f"{group} tokens or channels are no multiple of {LANES}.", mend)
            elif residual % group:
                what = f"{residual} tokens are no whole number of groups of {group}, and keys are quantised in groups."
                self._problem(f"{path}.kivi.residual_tokens", what, f"Write residual_tokens: {max(1, round(residual / group)) * group}.")
        if quantised is not None and name == "full":
            what = "full is what every compile is proved with: its keys and values are not quantised."
            self._problem(path, what, "Give this policy another name.")
        return Store(None if form.dtype == "int8" else form.dtype, quantised)

    def _device(self, name: str, form: PolicyForm) -> Literal["disk"] | None:
        """disk, where unbuilt.py has nothing against it."""
        path = next((path for path, device in form.devices if device == "disk"), None)
        if path is None or not fits_disk(form):
            return None
        if name == "full":
            what = "full is what every compile is proved with: its keys and values stay in memory."
            self._problem(f"policies.{name}.{path}", what, "Give this policy another name.")
        return "disk"

    def _disk(self, form: SpecForm) -> str | None:
        """target.disk, a folder that can be written to and that a policy uses."""
        folder = form.target.disk
        if folder is None:
            return None
        if not any(device == "disk" for policy in form.policies.values() for _, device in policy.devices):
            what = "no policy keeps its keys and values on disk."
            self._problem("target.disk", what, "Take it out, or write a policy such as flexgen: {zones: [{all: {device: disk}}]}.")
        elif fault := unwritable(folder):
            self._problem("target.disk", fault, UNWRITABLE_MEND)
        return folder

    def _check_positions(self, policy: HeadPolicy, zones: Sequence[ZoneKind]) -> None:
        """cache_index says where a query stands among sinks: refused where there are none, and where keys far from them are shown."""
        if policy.positions == "cache_index" and policy.found is not None:
            kind = next(zone.kind for zone in zones if zone.kind in FOUND_ZONES)
            what = f"cache_index moves the sinks next to the window, and {kind} shows keys between them."
            self._problem(f"policies.{policy.name}.positions", what, "Write absolute.")
            return
        sinks = [zone.sink_tokens for zone in policy.zones if isinstance(zone, SinkRecent)]
        if policy.positions == "cache_index" and not any(sinks):
            kind = "keeps no sink tokens" if sinks else "has no sink_recent zone"
            self._problem(
                f"policies.{policy.name}.positions",
                f"cache_index is the place of a query behind its sinks, and the policy {kind}.",
                "Write positions: absolute, or a zone such as sink_recent: {sink_tokens: 16, recent_tokens: 256}.",
            )

    def _zones(self, name: str, policy: PolicyForm, users: Sequence[tuple[int, Pattern | None]], seed: int) -> list[Zone]:
        zones: list[Zone] = []
        for index, zone in enumerate(policy.zones):
            if zone.all is not None:
                zones.append(All())
            if zone.sink_recent is not None:
                path = f"policies.{name}.zones[{index}].sink_recent"
                sink = self._window(f"{path}.sink_tokens", zone.sink_recent.sink_tokens, users)
                recent = self._window(f"{path}.recent_tokens", zone.sink_recent.recent_tokens, users)
                if sink is not None and recent is not None:
                    zones.append(SinkRecent(sink, recent))
            if zone.static is not None:
                zones.append(Static(zone.static.keys))
            if zone.top_k is not None and (top_k := self._top_k(f"policies.{name}.zones[{index}].top_k", zone.top_k)) is not None:
                zones.append(top_k)
            if zone.clusters is not None:
                zones += self._clusters(f"policies.{name}.zones[{index}].clusters", zone.clusters)
            if zone.sample is not None:
                zones += self._sample(f"policies.{name}.zones[{index}].sample", zone.sample, seed)
        return zones

    def _clusters(self, path: str, form: ClustersForm) -> list[TopK]:
        """The zone, none where its shares are at fault, which is then said.  Query heads choose together, by the sum of their weights."""
        options = {"estimate": form.estimate, "tokens_per_cluster": form.tokens_per_cluster}
        faults = index_facts("clusters").check(options)
        for fault in faults:
            self._problem(f"{path}.{fault.option}", f"{fault.option} {fault.what}", fault.mend)
        if form.exact <= 0:
            self._problem(f"{path}.exact", "no cluster is read exactly.", "Write a percentage: exact: 1.8%.")
        elif form.exact + form.estimate > 1:
            what = f"exact and estimate are {100 * (form.exact + form.estimate):g}% of the clusters together."
            self._problem(path, what, "Write percentages that add up to 100% at most: exact: 1.8%, estimate: 23.2%.")
        elif not faults:
            return [TopK(form.exact, "clusters", tuple(sorted(options.items())), "sum", form.estimate > 0)]
        return []

    def _sample(self, path: str, form: SampleForm, seed: int) -> list[Sample]:
        """The zone, none where an option is at fault, which is then said."""
        zone = Sample(form.lsh.hash_bits, form.lsh.tables, seed)
        faults = SAMPLING[zone.index].check(dict(zone.options))
        for fault in faults:
            self._problem(f"{path}.lsh.{fault.option}", f"{fault.option} {fault.what}", fault.mend)
        return [] if faults else [zone]

    def _top_k(self, path: str, form: TopKForm) -> TopK | None:
        """The zone, or None where its index or k is at fault, which is then said."""
        name, options = (form.index, {}) if isinstance(form.index, str) else next(iter(form.index.items()))
        where = f"{path}.index" if isinstance(form.index, str) else f"{path}.index.{name}"
        try:
            facts = index_facts(name)
        except LookupError as error:
            near = nearest(name, index_names())
            mend = f'Did you mean "{near}"?' if near else f"Write one of {', '.join(index_names())}."
            self._problem(where, f'the index "{name}": {error}.', mend)
            return None
        if name in SAMPLING:
            what = f"the index {name} draws keys by chance, and is not asked for k of them."
            self._problem(where, what, "Write the zone sample: {lsh: {hash_bits: 10, tables: 150}}.")
            return None
        finds_pages = bool(getattr(facts, "pages", False))
        k = self._pages(path, name, options, form, finds_pages) if finds_pages or form.pages or form.page_tokens else self._k(path, form)
        if k is None:
            return None
        if finds_pages:
            options = {**options, "page_tokens": form.page_tokens}
        faults = facts.check(options)
        for fault in faults:
            place = path if fault.option == "page_tokens" else where
            self._problem(f"{place}.{fault.option}" if fault.option else place, f"{fault.option} {fault.what}".strip(), fault.mend)
        if form.tail and not facts.estimates:
            what = f"the index {name} does not estimate what it has not read."
            self._problem(f"{path}.tail", what, "Write tail: false, or index: sketch.")
        if form.select in ("sum", "max") and not facts.scores:
            what = f"the index {name} does not guess every logit, which select: {form.select} needs."
            self._problem(f"{path}.select", what, "Write select: union.")
        return None if faults else TopK(k, name, tuple(sorted(options.items())), form.select, form.tail)

    def _k(self, path: str, form: TopKForm) -> int | float | None:
        """k as written, or None, which is then said."""
        if form.k is None or form.k <= 0 or form.k > (1.0 if isinstance(form.k, float) else MOST_TOKENS):
            most = f"100%, and {MOST_TOKENS} tokens"
            what = "is missing." if form.k is None else "finds no key." if form.k <= 0 else f"is more than there can be ({most})."
            self._problem(f"{path}.k" if form.k is not None else path, f"k {what}", "Write a number of tokens or a percentage: k: 1%.")
            return None
        return form.k

    def _pages(self, path: str, name: str, options: Mapping[str, Any], form: TopKForm, finds_pages: bool) -> int | None:
        """The keys of `pages` pages, or None where pages are at fault, which is then said."""
        pages, page_tokens = form.pages or 64, form.page_tokens or 16
        mend = f"Write for example pages: {pages}, page_tokens: {page_tokens}, and no k."
        if not finds_pages:
            key = "pages" if form.pages is not None else "page_tokens"
            known = ", ".join(each for each in BUILT_IN_INDEXES if getattr(BUILT_IN_INDEXES[each], "pages", False))
            self._problem(f"{path}.{key}", f"the index {name} finds keys, not pages.", f"Write k, or one of the indexes {known}.")
        elif form.k is not None:
            self._problem(f"{path}.k", f"k counts keys, and the index {name} finds pages.", mend)
        elif "page_tokens" in options:
            self._problem(f"{path}.index.{name}.page_tokens", "page_tokens stands beside index, not in it.", mend)
        elif form.pages is None:
            self._problem(path, f"pages is missing: the index {name} finds pages.", mend)
        elif form.page_tokens is None:
            self._problem(path, "page_tokens is missing: how many tokens a page has.", mend)
        else:
            return form.pages * form.page_tokens
        return None

    def _window(self, path: str, written: int | None, users: Sequence[tuple[int, Pattern | None]]) -> int | None:
        """sink_tokens or recent_tokens: what the policy says, else what the patterns of the rules that use it agree on."""
        if written is not None:
            return written
        key = path.rpartition(".")[2]
        found: set[int | None] = {getattr(pattern, key) if pattern else None for _, pattern in users}
        agreed = next(iter(found)) if len(found) == 1 else None
        if agreed is not None:
            return agreed
        if len(found) > 1:
            values = ", ".join(f"heads[{index}] {'none' if not pattern else getattr(pattern, key)}" for index, pattern in users)
            self._problem(path, f"is missing and the rules that use the policy differ: {values}.", f"Write for example {key}: 64.")
        else:
            example = 16 if key == "sink_tokens" else 256
            self._problem(
                path, "is missing, and no rule that uses the policy brings it by a pattern.", f"Write for example {key}: {example}."
            )
        return None

    def _heads(self, form: SpecForm, patterns: Sequence[Pattern | None], policies: Mapping[str, HeadPolicy]) -> tuple[HeadRule, ...]:
        """The rules as they stand.  KV heads that none names are full (passes/assign_policies), and so are all without any rule."""
        self._check_every_policy_used(form, policies)
        rules: list[HeadRule] = []
        for index, (rule, pattern) in enumerate(zip(form.heads or [], patterns, strict=True)):
            self._check_policy(index, rule, form, policies)
            self._check_numbers(index, rule)
            rules.append(HeadRule(rule.policy, rule.layers, rule.kv_heads, pattern, rule.share, self._where(f"heads[{index}]")))
        return tuple(rules) or (HeadRule("full"),)

    def _check_every_policy_used(self, form: SpecForm, policies: Mapping[str, HeadPolicy]) -> None:
        """A policy that no rule names does nothing; said only where the rules were read as they were meant."""
        named = {rule.policy for rule in form.heads or []}
        if any(path.startswith("heads") and place.startswith("--set ") for path, place in self.document.lines.items()):
            return  # the rules of a file were changed for one run
        if self.faulty_heads or named - {*form.policies, *policies}:
            return
        for name in form.policies:
            if name not in named and name != "full":  # full is what KV heads without a rule get
                mend = f"Name it in heads, for example heads: [{{policy: {name}}}], or take it out."
                self._problem(f"policies.{name}", f'policy "{name}" is used by no rule.', mend)

    def _check_policy(self, index: int, rule: RuleForm, form: SpecForm, policies: Mapping[str, HeadPolicy]) -> None:
        known = list(dict.fromkeys([*form.policies, *policies]))
        if rule.policy in known:
            return
        near = nearest(rule.policy, known)
        mend = f'Did you mean "{near}"?' if near else "Name one of them, or add it under policies."
        self._problem(f"heads[{index}].policy", f'policy "{rule.policy}" does not exist (there are {", ".join(sorted(known))}).', mend)

    def _check_numbers(self, index: int, rule: RuleForm) -> None:
        """Layers and KV heads against the model's header, where it is known."""
        if self.header is None or self.header.layers is None:
            return
        count = self.header.layers
        missing = [layer for layer in rule.layers or () if layer >= count]
        if missing:
            what = f"layer {missing[0]} does not exist in the model ({count} layers, 0 to {count - 1})."
            self._problem(f"heads[{index}].layers", what, f'Write numbers from 0 to {count - 1}, a range such as 0-{count - 1}, or "all".')
        for layer in rule.layers or range(count):
            kv_heads = self.header.kv_heads[layer] if self.header.kv_heads and layer < count else None
            beyond = [head for head in rule.kv_heads or () if kv_heads is not None and head >= kv_heads]
            if beyond and kv_heads:
                last = kv_heads - 1
                counted = "1 KV head, number 0" if kv_heads == 1 else f"{kv_heads} KV heads, 0 to {last}"
                what = f"KV head {beyond[0]} does not exist in layers.{layer} ({counted})."
                mend = f'Write numbers from 0 to {last}, a range such as 0-{last}, or "all".' if last else 'Write 0, or "all".'
                self._problem(f"heads[{index}].kv_heads", what, mend)
                return

    def _output(self, form: SpecForm) -> Output:
        directory, formats = form.output.directory, form.output.formats
        if directory is None:
            if formats is not None:
                self._problem("output.formats", "formats without a directory are written nowhere.", "Write output.directory, or -o FOLDER.")
            return Output()
        fault = unwritable(directory)
        if fault:
            self._problem("output.directory", fault, UNWRITABLE_MEND)
        return Output(directory=directory, formats=tuple(dict.fromkeys(formats or ("report",))))

    def _prefix(self, form: SpecForm) -> Prefix:
        prefix, problems = read_prefix(form.prefix, self._where, self._folder)
        self.problems += problems
        return prefix

    # --- places ----------------------------------------------------------------------------------------------------------------------

    def _where(self, path: str) -> str:
        return self.document.where(path)

    def _problem(self, path: str, what: str, mend: str) -> None:
        self.problems.append(Problem(self._where(path), what, mend))

    def _folder(self, path: str) -> Path:
        """Where a relative path starts: the spec's folder; the working directory for one that `--set` gave."""
        return Path(".") if self._where(path).startswith("--set ") else self.folder


def _seeded(policy: HeadPolicy, seed: int) -> HeadPolicy:
    """Keys that are drawn by chance are drawn by the spec's seed."""
    return replace(policy, zones=tuple(replace(zone, seed=seed) if isinstance(zone, Sample) else zone for zone in policy.zones))


UNWRITABLE_MEND = "Name a folder that can be made or written to."


def unwritable(directory: str) -> str | None:
    """Why output.directory can neither be written to nor made, as a sentence; nothing is made here."""
    fault = _fault(Path(directory).expanduser())
    return f'"{directory}" {fault}.' if fault else None


def _fault(directory: Path) -> str | None:
    if exists(directory) and not directory.is_dir():
        return "is a file"
    existing = next(parent for parent in (directory, *directory.absolute().parents) if exists(parent))
    if not existing.is_dir():
        return f"cannot be made: {existing} is a file"
    if not os.access(existing, os.W_OK | os.X_OK):
        return "is not writable" if existing == directory else f"cannot be made: {existing} is not writable"
    return None


def _without_repeats(problems: Sequence[Problem]) -> list[Problem]:
    """Each once: two rules that name one faulty pattern tell of it twice."""
    return list(dict.fromkeys(problems))


def _line(problem: Problem) -> int:
    """The line in the file, for the order of problems; 0 when the problem has none."""
    place = problem.where.split(": ")[0].rpartition(":")[2]
    return int(place) if place.isdigit() else 0
