"""What a compile does beside compiling: threads, files, stop tokens."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import toys

import kvcompile
from kvcompile import compiler
from kvcompile.compiler import make_plan
from kvcompile.ir.errors import SpecError
from kvcompile.spec import load_spec

SPEC = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)
    compiler._own_threads = None


def test_a_number_of_threads_does_not_leak_into_later_compiles(threads):
    for number in (threads + 1, threads + 2):
        kvcompile.compile(toys.gated(inner=(16,)), spec={**SPEC, "target": {"threads": number, "segments": "eager"}})
        assert torch.get_num_threads() == number
    kvcompile.compile(toys.gated(inner=(16,)), spec={**SPEC, "target": {"threads": "auto", "segments": "eager"}})
    assert torch.get_num_threads() == threads


def test_threads_auto_leaves_what_the_caller_set(threads):
    torch.set_num_threads(threads + 3)
    kvcompile.compile(toys.gated(inner=(16,)), spec=SPEC)
    assert torch.get_num_threads() == threads + 3


def test_compile_writes_the_report_that_the_spec_asks_for(tmp_path):
    folder = tmp_path / "out"
    model = kvcompile.compile(toys.gated(inner=(16,)), spec={**SPEC, "output": {"directory": folder}}, contexts=(100,))
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.txt"]
    written = json.loads((folder / "report.json").read_text())
    assert sorted(written) == ["model", "plan", "spec", "timings", "verification", "warnings"]
    assert [each["tokens"] for each in written["plan"]["contexts"]] == [100]
    assert model.verification.text() in (folder / "report.txt").read_text()


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_traced(tmp_path, monkeypatch):
    spec = load_spec({**SPEC, "output": {"directory": tmp_path / "out"}})
    (tmp_path / "out").write_text("a file by now")
    monkeypatch.setattr(compiler, "trace", lambda module: pytest.fail("traced"))
    with pytest.raises(SpecError) as caught:
        kvcompile.compile(toys.gated(inner=(16,)), spec=spec)
    assert str(caught.value) == (
        f'<spec>: output.directory: "{tmp_path / "out"}" is a file.\n  Name a folder that can be made or written to.'
    )


def test_a_plan_can_be_dumped(tmp_path):
    make_plan(SPEC, module=toys.gated(inner=(16,)), dump=tmp_path)
    assert list(tmp_path.glob("*-request_kernels.txt"))


def test_a_module_brings_the_stop_tokens_of_both_its_configs():
    module = toys.llama(layers=1, eos_token_id=3)
    module.generation_config = SimpleNamespace(eos_token_id=[5, 3])
    assert kvcompile.compile(module, spec=SPEC).stop_tokens == {3, 5}


def test_a_rollback_of_zone_all_enlarges_the_models_own_windows():
    policies = {"mine": {"zones": ["all"], "rollback": 6}}
    model = kvcompile.compile(toys.gemma2(window=8), spec={**SPEC, "policies": policies, "heads": [{"policy": "mine"}]})
    session, other = model.session(), model.session()
    ids = list(range(40))
    for each in (session, other):
        for token in ids:
            each.step(token)
    for token in (1, 2, 3, 4, 5, 6):
        session.step(token)
    session.rollback(6)
    assert torch.equal(session.step(9), other.step(9))
