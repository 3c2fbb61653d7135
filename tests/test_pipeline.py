"""The order of the passes, and what the pipeline writes down on the way."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from xml.etree import ElementTree

import networkx as nx
import pytest
import toys
from units import traced

import kvcompile
from kvcompile.codegen.reproducer import reproducer_source
from kvcompile.compiler import run_passes
from kvcompile.ir.errors import SpecError, UnsupportedGraphError
from kvcompile.ir.show import difference, graph_text, unit_text
from kvcompile.pipeline import PASSES, Pipeline

NAMES = [each.name for each in PASSES]


def test_every_pass_stands_behind_what_it_requires():
    for place, each in enumerate(PASSES):
        assert set(each.requires) <= set(NAMES[:place]), each.name
    assert len(set(NAMES)) == len(NAMES)


def test_a_pass_is_named_as_its_file():
    for each in PASSES:
        assert type(each).__module__ == f"kvcompile.passes.{each.name}"
        assert type(each).__name__ == "".join(word.capitalize() for word in each.name.split("_"))
        assert type(each).__doc__


@pytest.mark.parametrize("stop_after", ["trace", *NAMES])
def test_stopping_after_a_pass_runs_it_and_no_other(stop_after):
    ran = []
    unit = Pipeline(on_pass=lambda name, seconds: ran.append(name)).run(traced(toys.gated(inner=(16,))), stop_after)
    assert ran == list(unit.passed) == [*NAMES, ""][: ["trace", *NAMES].index(stop_after)]


def test_an_unknown_pass_is_refused_with_the_names_there_are():
    with pytest.raises(SpecError) as caught:
        Pipeline().run(traced(toys.gated(inner=(16,))), "fuse")
    assert str(caught.value) == f"--stop-after: there is no pass 'fuse'.\n  Passes: {', '.join(['trace', *NAMES])}."


def test_passes_in_a_wrong_order_are_our_mistake():
    with pytest.raises(AssertionError, match=r"build_zones needs \['assign_policies'\] to run first"):
        Pipeline(passes=(PASSES[0], PASSES[4])).run(traced(toys.gated(inner=(16,))))


def test_a_result_that_breaks_the_promise_is_found():
    @dataclass(frozen=True)
    class Forgetful:
        name: str = "forgetful"
        requires: tuple[str, ...] = ()

        def run(self, unit):
            return replace(unit, warnings=("done",))

        def ensures(self, unit):
            assert unit.warnings == (), "looks at the result"

    with pytest.raises(AssertionError, match="looks at the result"):
        Pipeline(passes=(Forgetful(),)).run(traced(toys.gated(inner=(16,))))


def test_a_dump_holds_what_is_known_after_every_pass_and_every_graph_that_changed(tmp_path):
    unit = Pipeline(dump=tmp_path / "dump").run(traced(toys.gated(inner=(16,))))
    stems = [f"{number:02d}-{name}" for number, name in enumerate(["trace", *NAMES])]
    texts = [(tmp_path / "dump" / f"{stem}.txt").read_text() for stem in stems]
    assert texts[-1] == f"{unit_text(unit)}\n{graph_text(unit.graph)}"
    for stem, before, after in zip(stems[1:], texts, texts[1:], strict=False):
        assert (tmp_path / "dump" / f"{stem}.diff").read_text() == difference(before, after) + "\n"
    pictures = {path.stem for path in (tmp_path / "dump").glob("*.svg")}
    assert pictures == {path.stem for path in (tmp_path / "dump").glob("*.graphml")}
    assert pictures == {"00-trace", "01-canonicalise_attention", "08-outline_segments"}
    for stem in pictures:
        assert nx.read_graphml(tmp_path / "dump" / f"{stem}.graphml").number_of_nodes()
        ElementTree.parse(tmp_path / "dump" / f"{stem}.svg")


def test_compile_and_run_passes_dump_too(tmp_path):
    run_passes({"kvcompile": 1}, module=toys.gated(inner=(16,)), stop_after="check_token_wise", dump=tmp_path / "a")
    assert (tmp_path / "a" / "03-check_token_wise.txt").exists()
    assert not (tmp_path / "a" / "04-assign_policies.txt").exists()
    kvcompile.compile(toys.gated(inner=(16,)), spec={"kvcompile": 1, "verify": {"tokens": 16}}, dump=str(tmp_path / "b"))
    assert (tmp_path / "b" / f"{len(NAMES):02d}-outline_segments.svg").exists()


def test_run_passes_tells_graph_plan_sources_and_time():
    early = run_passes({"kvcompile": 1}, module=toys.gated(inner=(16,)), stop_after="check_token_wise")
    assert (early.plan, early.sources) == (None, {})
    assert "kvc.attend.default" in early.text
    late = run_passes({"kvcompile": 1}, module=toys.gated(inner=(16,)))
    assert late.plan is not None and sorted(late.sources) == ["segment_0", "segment_1"]
    assert set(late.timings) == {"trace", *NAMES}


@pytest.mark.parametrize(("toy", "failed"), [("convolution", "check_token_wise"), ("spelt_out", "canonicalise_attention")])
def test_a_failure_leaves_what_repeats_it(tmp_path, toy, failed):
    with pytest.raises(UnsupportedGraphError) as caught:
        kvcompile.compile(getattr(toys, toy)(), spec={"kvcompile": 1}, dump=tmp_path)
    told = (tmp_path / "failed.txt").read_text()
    assert told.startswith(f"{failed}: {caught.value}\n\n")
    assert "input_ids = input" in told
    ran = subprocess.run([sys.executable, str(tmp_path / "reproduce.py")], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 1, ran.stderr
    first = str(caught.value).splitlines()[0].split(": ", 2)
    assert f"UnsupportedGraphError: {first[0]}: " in ran.stderr
    assert first[2].split(": ")[0] in ran.stderr


def test_a_reproducer_needs_neither_the_model_nor_its_values():
    source = reproducer_source(traced(toys.nanogpt(layers=1)).graph, "place")
    compile(source, "reproduce.py", "exec")
    assert '"""Repeats a failure of kvcompile\'s pass place;' in source
    assert '"positions.weight": ((64, 32), torch.float32),' in source
    assert "toys" not in source and "transformers" not in source


def test_nothing_is_written_without_a_dump_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedGraphError):
        kvcompile.compile(toys.convolution(), spec={"kvcompile": 1})
    assert list(tmp_path.iterdir()) == []
