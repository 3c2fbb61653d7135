"""The passes in their order, and what runs them: checks after each, differences, dumps, stop-after, a reproducer on failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from kvcompile.codegen.reproducer import captured, reproducer_source
from kvcompile.ir.errors import KvcompileError, Problem, SpecError
from kvcompile.ir.graphs import write_graphml, write_svg
from kvcompile.ir.show import difference, graph_text, unit_text
from kvcompile.ir.unit import Pass, Unit
from kvcompile.passes.assign_policies import AssignPolicies
from kvcompile.passes.build_zones import BuildZones
from kvcompile.passes.canonicalise_attention import CanonicaliseAttention
from kvcompile.passes.canonicalise_convolution import CanonicaliseConvolution
from kvcompile.passes.check_token_wise import CheckTokenWise
from kvcompile.passes.fix_frequency_branch import FixFrequencyBranch
from kvcompile.passes.group_linears import GroupLinears
from kvcompile.passes.make_positions_explicit import MakePositionsExplicit
from kvcompile.passes.outline_segments import OutlineSegments
from kvcompile.passes.place import Place
from kvcompile.passes.request_kernels import RequestKernels
from kvcompile.passes.rotate_sink_queries import RotateSinkQueries

PASSES: tuple[Pass, ...] = (
    CanonicaliseAttention(),  # first: every later pass asks where the sites are
    CanonicaliseConvolution(),  # the other kind of site; before the token-wise check, which knows no convolution
    MakePositionsExplicit(),  # before the token-wise check: an arange is a position, not a mixing of tokens
    FixFrequencyBranch(),  # before the token-wise check, which refuses a maximum over tokens; the positions must be known as such
    CheckTokenWise(),  # before anything is planned: a refusal should cost nothing
    AssignPolicies(),  # the rules need the sites' KV heads
    BuildZones(),  # groups need every head's policy
    RotateSinkQueries(),  # the cache's size is in the zones; before linears are grouped, which traces anew what reads them
    Place(),  # bytes need the groups; a plan that does not fit stops here, before weights are loaded
    RequestKernels(),  # the request names the device
    GroupLinears(),  # after the plan, which needs no kernel of a linear layer; before outlining, so that equal segments stay equal
    OutlineSegments(),  # last: it replaces the graph that the others read
)


@dataclass(frozen=True)
class Pipeline:
    """Runs passes over a unit.

    stop_after: the name of the last pass to run ("trace" runs none).
    dump:       folder that gets, after each pass, a numbered text of what is known and of the graph, the difference that
                the pass made, and where it changed the graph its GraphML and SVG; on a failure failed.txt, and
                reproduce.py, which repeats it from the traced graph and the spec.
    on_pass:    called with each pass's name and seconds.
    """

    passes: tuple[Pass, ...] = PASSES
    dump: Path | None = None
    on_pass: Callable[[str, float], None] = field(default=lambda name, seconds: None)

    def run(self, unit: Unit, stop_after: str | None = None) -> Unit:
        names = ["trace", *(each.name for each in self.passes)]
        if stop_after is not None and stop_after not in names:
            raise SpecError(Problem("--stop-after", f"there is no pass {stop_after!r}.", f"Passes: {', '.join(names)}."))
        before = _text(unit)
        # now: a pass that fails may leave the graph half changed
        repeats = None if self.dump is None else partial(reproducer_source, *captured(unit.graph), unit.spec, unit.context_tokens)
        self._dump(0, "trace", unit, "", before)
        for number, each in enumerate(self.passes[: names.index(stop_after)] if stop_after else self.passes, start=1):
            missing = [name for name in each.requires if name not in unit.passed]
            assert not missing, f"{each.name} needs {missing} to run first"
            started = time.perf_counter()
            try:
                unit = each.run(unit)
                each.ensures(unit)
            except Exception as error:
                if self.dump is not None and repeats is not None:
                    (self.dump / "failed.txt").write_text(f"{each.name}: {error}\n\n{before}")
                    (self.dump / "reproduce.py").write_text(repeats(each.name))
                raise
            unit = replace(unit, passed=(*unit.passed, each.name))
            self.on_pass(each.name, time.perf_counter() - started)
            if self.dump is not None:
                after = _text(unit)
                self._dump(number, each.name, unit, before, after)
                before = after
        return unit

    def _dump(self, number: int, name: str, unit: Unit, before: str, after: str) -> None:
        if self.dump is None:
            return
        try:
            self.dump.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"the folder cannot be made: {error.strerror}."
            raise KvcompileError(Problem(f"--dump {self.dump}", what, "Name a folder that can be written.")) from error
        stem = f"{number:02d}-{name}"
        (self.dump / f"{stem}.txt").write_text(after)
        (self.dump / f"{stem}.diff").write_text(difference(before, after) + "\n")
        if not before.endswith(graph_text(unit.graph)):
            write_graphml(unit.graph, self.dump / f"{stem}.graphml")
            write_svg(unit.graph, self.dump / f"{stem}.svg")


def _text(unit: Unit) -> str:
    return f"{unit_text(unit)}\n{graph_text(unit.graph)}"
