"""`kvcompile inspect`: what kvcompile sees in a model, before anybody writes a spec for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kvcompile.compiler import run_passes
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.sites import AttentionSite
from kvcompile.report import Table

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
