"""`kvcompile inspect`: what kvcompile sees in a model, before anybody writes a spec for it; and what files of sessions and indexes hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kvcompile.compiler import run_passes
from kvcompile.ir.errors import Problem, SessionError, UnsupportedGraphError
from kvcompile.ir.sites import AttentionSite
from kvcompile.report import Table, format_bytes
from kvcompile.runtime.checked_file import CheckedFile, file_kind, open_checked
from kvcompile.runtime.indexes.registry import INDEX_FILE
from kvcompile.runtime.session_file import SESSION_FILE

_FRONT_ENDS = {
    "interface": "transformers' attention interface",
    "sdpa": "scaled_dot_product_attention, recognised in the graph",
    "products": "matmul, softmax, matmul, recognised in the graph",
}


@dataclass(frozen=True)
class Inspection:
    """What was found, or why nothing was.

    segments:  of each distinct segment how often it is called.  convolutions: (path, channels, taps) of each.
    refused:   problems by node and source line; () where the graph can be compiled.  A compile also probes and verifies, with weights.
    """

    front_end: str
    sites: tuple[AttentionSite, ...]
    convolutions: tuple[tuple[str, int, int], ...]
    segments: tuple[int, ...]
    position_rows: int | None
    context_tokens: int | None
    notes: tuple[str, ...]
    refused: tuple[Problem, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """One row for each run of equal attentions."""
        rows: list[tuple[str, ...]] = []
        first = 0
        for place, site in enumerate(self.sites):
            facts = _facts(site)
            if place + 1 < len(self.sites) and _facts(self.sites[place + 1]) == facts:
                continue
            number = str(first) if first == place else f"{first}-{place}"
            rows.append((number, self.sites[first].path, *facts))
            first = place + 1
        return Table(("sites", "first module", "query heads", "KV heads", "head_dim", "scale", "sees", "extras"), tuple(rows))

    def lines(self) -> list[str]:
        """What stands below the table."""
        if self.refused:
            return ["refused:", *(str(problem) for problem in self.refused)]
        found = [f"attention found in: {'; '.join(_FRONT_ENDS[each] for each in self.front_end.split(' and '))}"]
        times = ", ".join(f"{count}x" for count in self.segments)
        found.append(f"segments: {sum(self.segments)}, of which {len(self.segments)} are distinct ({times})")
        alike = Counter((channels, taps) for _, channels, taps in self.convolutions)
        found += [f"short convolutions: {n} of {channels} channels, {taps} taps" for (channels, taps), n in alike.items()]
        if self.context_tokens is not None:
            found.append(f"made for {self.context_tokens} tokens")
        if self.position_rows is not None:
            found.append(f"learnt positions for {self.position_rows} tokens: no session can be longer")
        return found + [f"note: {note}" for note in self.notes]


def inspect_model(model: str | Path | nn.Module, *, progress: Callable[[str], None] | None = None) -> Inspection:
    """Traces a model under policy `full` and tells what was found.  A model that is refused is a result, not an error.

    Raises ModelError where there is no such model.
    """
    spec: dict[str, Any] = {"kvcompile": 1}
    module = model if isinstance(model, nn.Module) else None
    if module is None:
        spec["model"] = {"path": str(model)}
    try:
        result = run_passes(spec, module=module, progress=progress)
    except UnsupportedGraphError as error:
        return Inspection("", (), (), (), None, None, (), error.problems)
    unit = result.unit
    assert unit.plan is not None
    calls = Counter(str(node.target) for node in unit.graph.graph.find_nodes(op="call_module"))
    return Inspection(
        front_end=unit.front_end,
        sites=unit.sites,
        convolutions=tuple((each.path, each.channels, each.taps) for each in unit.convolutions),
        segments=tuple(calls.values()),
        position_rows=unit.position_rows,
        context_tokens=unit.context_tokens,
        notes=(*unit.warnings, *unit.plan.notes),
        refused=(),
    )


@dataclass(frozen=True)
class KeptFile:
    """A session or an index in a file, every byte of which is as it was written.

    facts: by name.  parts: of a session, stores that are alike: their attentions, KV heads of one, kind, how keys lie, and bytes of all.
    """

    path: str
    holds: str
    format: int
    written_by: str
    nbytes: int
    facts: dict[str, Any]
    parts: tuple[tuple[str, ...], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        head = f"{self.path}: {self.holds}, format {self.format}, written by kvcompile {self.written_by}"
        return [head, *(f"{name}: {value}" for name, value in self.facts.items()), f"{format_bytes(self.nbytes)}, every checksum is right"]

    def table(self) -> Table:
        return Table(("attentions", "KV heads", "store", "keys lie in", "bytes"), self.parts, right=frozenset({4}))


def inspect_file(path: str | Path) -> KeptFile | None:
    """What a session file or an index file holds; None of a model.  Raises SessionError where it is damaged, and for any other file."""
    kind = file_kind(path, (SESSION_FILE, INDEX_FILE))
    if kind is None:
        if Path(path).is_file() and Path(path).suffix not in (".gguf", ".pt2"):
            what = "is no file of a session or an index (it does not begin as one), and no .gguf or .pt2 file of a model."
            raise SessionError(Problem(str(path), what, "Name such a file, or the folder of a model."))
        return None
    with open_checked(path, kind) as file:
        file.read_sections()
        with file.believed():
            facts, parts = _session_facts(file) if kind is SESSION_FILE else _index_facts(file)
    return KeptFile(str(path), kind.noun, kind.format, file.written_by, file.nbytes, facts, parts)


def _index_facts(file: CheckedFile) -> tuple[dict[str, Any], tuple[tuple[str, ...], ...]]:
    content = file.content
    return {"kind": content["kind"], "first position": content["numbers"]["first"], "tensors": len(content["tensors"])}, ()


def _session_facts(file: CheckedFile) -> tuple[dict[str, Any], tuple[tuple[str, ...], ...]]:
    content = file.content
    model = content["model"]
    facts = {"model": f"{model['name']} (hash {model['hash'][:12]})", "tokens": len(file.tensor(content["tokens"]))}
    if content["convolutions"]:
        facts["short convolutions"] = len(content["convolutions"])
    alike: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for site, (own, states) in enumerate(zip(content["plan"]["facts"]["sites"], content["stores"], strict=True)):
        for group, state in zip(own["groups"], states, strict=True):
            name = f"{state['kind']} with {state['inner']['index']['kind']}" if "index" in state["inner"] else str(state["kind"])
            key = str(len(group["kv_heads"])), name, _layout(state)
            alike.setdefault(key, []).append((site, _state_bytes(file, state)))
    parts = [(str(len({site for site, _ in found})), *key, format_bytes(sum(size for _, size in found))) for key, found in alike.items()]
    return facts, tuple(parts)


def _layout(state: Any) -> str:
    """How exact keys lie in memory, of the store or of the first in it that says so."""
    if "layout" in state["numbers"]:
        return str(state["numbers"]["layout"])
    return next((layout for inner in state["inner"].values() if (layout := _layout(inner))), "")


def _state_bytes(file: CheckedFile, state: Any) -> int:
    own: int = sum(file.sections[found["section"]].nbytes for found in state["tensors"].values())
    return own + sum(_state_bytes(file, inner) for inner in state["inner"].values())


def _facts(site: AttentionSite) -> tuple[str, ...]:
    """The columns of the table that describe an attention."""
    dims = str(site.head_dim) if site.head_dim == site.value_dim else f"{site.head_dim}, values {site.value_dim}"
    sees = "every earlier token"
    if site.chunk_tokens:
        sees = f"its own chunk of {site.chunk_tokens}"
    if site.sliding_window:
        sees = f"{sees}, of which the last {site.sliding_window}" if site.chunk_tokens else f"the last {site.sliding_window}"
    extras = [f"soft cap {site.soft_cap:g}"] if site.soft_cap else []
    extras += ["learnt sinks"] if site.learnt_sinks else []
    extras += [f"the model chooses {site.chosen_tokens} keys"] if site.chosen_tokens else []
    extras += [f"ALiBi slopes {max(site.slopes):.3g} to {min(site.slopes):.3g}"] if site.slopes else []
    return (str(site.query_heads), str(site.kv_heads), dims, f"{site.scale:.6g}", sees, ", ".join(extras))
