"""The order of the passes, and what the pipeline writes down on the way."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from xml.etree import ElementTree

import networkx as nx
import pytest
import toys
from units import spec, traced

import kvcompile
from kvcompile.codegen.reproducer import captured, reproducer_source
from kvcompile.compiler import run_passes
from kvcompile.ir.errors import CapacityError, KvcompileError, SpecError, UnsupportedGraphError
from kvcompile.ir.show import difference, graph_text, unit_text
from kvcompile.pipeline import PASSES, Pipeline
from kvcompile.spec.patterns import write_pattern

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
        Pipeline(passes=(PASSES[0], PASSES[NAMES.index("build_zones")])).run(traced(toys.gated(inner=(16,))))


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
    assert {stem.partition("-")[2] for stem in pictures} == {"trace", "canonicalise_attention", "group_linears", "outline_segments"}
    for stem in pictures:
        assert nx.read_graphml(tmp_path / "dump" / f"{stem}.graphml").number_of_nodes()
        ElementTree.parse(tmp_path / "dump" / f"{stem}.svg")


def test_compile_and_run_passes_dump_too(tmp_path):
    run_passes({"kvcompile": 1}, module=toys.gated(inner=(16,)), stop_after="check_token_wise", dump=tmp_path / "a")
    last = 1 + NAMES.index("check_token_wise")
    assert (tmp_path / "a" / f"{last:02d}-check_token_wise.txt").exists()
    assert not (tmp_path / "a" / f"{last + 1:02d}-assign_policies.txt").exists()
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}}
    kvcompile.compile(toys.gated(inner=(16,)), spec=spec, dump=str(tmp_path / "b"))
    assert (tmp_path / "b" / f"{len(NAMES):02d}-outline_segments.svg").exists()


def test_run_passes_tells_graph_plan_sources_and_time():
    early = run_passes({"kvcompile": 1}, module=toys.gated(inner=(16,)), stop_after="check_token_wise")
    assert (early.plan, early.sources) == (None, {})
    assert "kvc.attend.default" in early.text
    late = run_passes({"kvcompile": 1}, module=toys.gated(inner=(16,)))
    assert late.plan is not None and [name.partition("_")[0] for name in late.sources] == ["attend", "linears", "segment", "segment"]
    assert set(late.timings) == {"trace", *NAMES}


@pytest.mark.slow
@pytest.mark.parametrize(("toy", "failed"), [("running_sum", "check_token_wise"), ("pairs", "canonicalise_attention")])
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
    unit = traced(toys.nanogpt(layers=1))
    source = reproducer_source(*captured(unit.graph), unit.spec, None, "place")
    compile(source, "reproduce.py", "exec")
    assert '"""Repeats a failure of kvcompile\'s pass place;' in source
    assert '"positions.weight": ((64, 32), torch.float32),' in source
    assert "toys" not in source and "transformers" not in source


def test_nothing_is_written_without_a_dump_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedGraphError):
        kvcompile.compile(toys.running_sum(), spec={"kvcompile": 1})
    assert list(tmp_path.iterdir()) == []


def repeated(folder):
    """The last line that reproduce.py prints, which must fail."""
    ran = subprocess.run([sys.executable, str(folder / "reproduce.py")], capture_output=True, text=True, check=False, cwd=folder)
    assert ran.returncode == 1, ran.stderr
    return ran.stderr


@pytest.mark.slow
def test_a_reproducer_carries_the_spec_and_repeats_what_does_not_fit(tmp_path):
    given = {"kvcompile": 1, "target": {"memory": "1KiB"}, "heads": [{"policy": "streaming", "layers": 0}]}
    with pytest.raises(CapacityError) as caught:
        kvcompile.compile(toys.llama(layers=2), spec=given, dump=tmp_path)
    assert f"kvcompile.ir.errors.CapacityError: {caught.value}" in repeated(tmp_path)
    assert "HeadRule(policy='streaming'" in (tmp_path / "reproduce.py").read_text()


@pytest.mark.slow
def test_a_reproducer_carries_patterns_with_their_scores(tmp_path):
    write_pattern(tmp_path / "p.yaml", model="toy", scores=[[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    given = spec(heads=[{"policy": "short", "pattern": str(tmp_path / "p.yaml"), "share": "50%"}])
    (tmp_path / "p.yaml").unlink()
    with pytest.raises(SpecError) as caught:
        kvcompile.compile(toys.llama(layers=2), spec=given, dump=tmp_path)
    assert "scores 3 layers of 2 KV heads; the model has 2 of 2." in str(caught.value)
    assert f"kvcompile.ir.errors.SpecError: {caught.value}" in repeated(tmp_path)


def test_a_reproducer_holds_the_graph_as_it_was_before_a_pass_spoilt_it(tmp_path):
    @dataclass(frozen=True)
    class Spoils:
        name: str = "spoils"
        requires: tuple[str, ...] = ()

        def run(self, unit):
            unit.graph.graph.call_function(print, ("spoilt",))
            raise KeyError("half way")

        def ensures(self, unit):
            raise AssertionError

    unit = traced(toys.gated(inner=(16,)))
    expected = reproducer_source(*captured(unit.graph), unit.spec, None, "spoils")
    with pytest.raises(KeyError, match="half way"):
        Pipeline(passes=(Spoils(),), dump=tmp_path).run(unit)
    assert (tmp_path / "reproduce.py").read_text() == expected
    assert "spoilt" not in (tmp_path / "failed.txt").read_text()


def test_a_dump_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KvcompileError) as caught:
        Pipeline(dump=tmp_path / "file" / "dump").run(traced(toys.gated(inner=(16,))))
    place = tmp_path / "file" / "dump"
    assert str(caught.value) == f"--dump {place}: the folder cannot be made: Not a directory.\n  Name a folder that can be written."
