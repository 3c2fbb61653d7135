"""Modules that know nothing of kvcompile compile and decode exactly, as modules, as graphs and as files."""

from __future__ import annotations

from pathlib import Path

import plain_models
import pytest
import torch
from torch.export import Dim
from units import some_ids

import kvcompile
import kvcompile.compiler
from kvcompile.ir.errors import ModelError, UnsupportedGraphError

SPEC = {"kvcompile": 1, "target": {"segments": "eager"}, "verify": {"tokens": 64}}
STREAMING = {
    **SPEC,
    "policies": {"short": {"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 6}}]}},
    "heads": [{"policy": "short"}],
}
MODELS = ("NanoGPT", "AlibiMQA", "ParallelFused")


def built(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(plain_models, name)(**options).eval()


def decodes_exactly(model: torch.nn.Module, compiled: kvcompile.CompiledModel) -> None:
    ids = some_ids(60, 80)
    session = compiled.session()
    found = [session.prefill(ids[:20], logits="all"), *(session.step(token)[None] for token in ids[20:])]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found), model(ids[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_module_decodes_exactly(name, own_cache):
    model = built(name)
    decodes_exactly(model, kvcompile.compile(model, SPEC))


def test_what_each_attention_is_was_recognised(own_cache):
    (site,) = (site.site for site in kvcompile.compile(built("AlibiMQA"), SPEC).plan.sites)
    assert (site.query_heads, site.kv_heads, site.head_dim) == (6, 1, 8)
    assert site.slopes == pytest.approx([2.0**-k for k in range(1, 7)], rel=1e-6)
    windows = [site.site.sliding_window for site in kvcompile.compile(built("ParallelFused"), SPEC).plan.sites]
    assert windows == [None, 9]


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_module_streams(name, own_cache):
    """Below sinks + window equal to the original; beyond it the first tokens are still the original's."""
    model = built(name)
    compiled = kvcompile.compile(model, STREAMING)
    ids = some_ids(40, 80)
    with torch.no_grad():
        expected = model(ids[None])[0]
    found = compiled.session().prefill(ids, logits="all")
    torch.testing.assert_close(found[:8], expected[:8], rtol=1e-4, atol=1e-4)
    assert (found[8:] - expected[8:]).abs().max() > 1e-2


@pytest.mark.parametrize("window", [200, 5000])
def test_a_window_wider_than_any_probe_is_read_from_the_mask(window, own_cache):
    model = built("ParallelFused", windows=(window,))
    (site,) = kvcompile.compiler.make_plan(SPEC, module=model).sites
    assert site.site.sliding_window == window


def test_a_fixed_mask_bounds_nothing_but_the_table(own_cache):
    """NanoGPT's buffer of ones is looked through to its last row."""
    sites = kvcompile.compiler.make_plan(SPEC, module=built("NanoGPT")).sites
    assert [site.site.sliding_window for site in sites] == [None, None]


def test_a_graph_module_is_a_model(own_cache):
    model = built("AlibiMQA")

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    graph = torch.fx.GraphModule(model, Leaf().trace(model))
    decodes_exactly(model, kvcompile.compile(graph, SPEC))


@pytest.mark.parametrize("wrap", [lambda logits: {"logits": logits}, lambda logits: [logits], lambda logits: (logits, None)])
def test_logits_may_come_in_a_dict_a_list_or_a_tuple(wrap, own_cache):
    class Wrapped(plain_models.NanoGPT):
        def forward(self, idx):
            return wrap(super().forward(idx))

    torch.manual_seed(0)
    assert kvcompile.compile(Wrapped().eval(), SPEC).verification.full.greedy_agreement == 1.0


def exported(model: torch.nn.Module, dynamic: bool = True) -> torch.export.ExportedProgram:
    shapes = ({1: Dim("tokens", min=2, max=100)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (some_ids(24, 80)[None],), dynamic_shapes=shapes, strict=False)


def test_an_exported_program_and_its_file_are_models(own_cache, tmp_path: Path):
    model = built("NanoGPT")
    program = exported(model)
    decodes_exactly(model, kvcompile.compile(program, SPEC))
    torch.export.save(program, tmp_path / "nano.pt2")
    decodes_exactly(model, kvcompile.compile(tmp_path / "nano.pt2", SPEC))


def test_a_program_of_one_length_is_refused():
    with pytest.raises(UnsupportedGraphError) as caught:
        kvcompile.compile(exported(built("NanoGPT"), dynamic=False), SPEC)
    assert str(caught.value).endswith(
        "it is fixed to one number of tokens.\n"
        "  Take sizes from `ids.shape[1]`; a program of torch.export needs dynamic_shapes={1: torch.export.Dim('tokens')}."
    )


def test_a_damaged_file_is_refused(tmp_path: Path):
    (tmp_path / "broken.pt2").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ModelError) as caught:
        kvcompile.compile(tmp_path / "broken.pt2", SPEC)
    assert "broken.pt2 cannot be read as a program of torch.export: " in str(caught.value)
    assert str(caught.value).endswith("\n  Save it again with torch.export.save.")


def test_something_that_is_no_model_is_refused():
    with pytest.raises(ModelError) as caught:
        kvcompile.compile(3, SPEC)
    assert str(caught.value) == (
        "compile: a int is no model.\n  Give a path, a torch.nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram."
    )
