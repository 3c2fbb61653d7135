"""What runs when something is missing, and what the fields of `target:` decide."""

from __future__ import annotations

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile import link
from kvcompile.codegen import toolchain
from kvcompile.codegen.toolchain import find_toolchain
from kvcompile.compiler import make_plan
from kvcompile.ir.errors import BuildError, TargetError
from kvcompile.runtime.model import CompiledModel

pytestmark = [pytest.mark.usefixtures("own_cache")]
VOCABULARY = 256


def compiled(model: torch.nn.Module | None = None, **target: object) -> CompiledModel:
    heads = [{"policy": "streaming", "kv_heads": 0}]
    policies = {"streaming": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}]}}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": policies, "heads": heads, "target": {"segments": "eager", **target}}
    return kvcompile.compile(model or toys.llama(layers=2), spec=spec)


def logits(model: CompiledModel) -> torch.Tensor:
    session = model.session()
    session.prefill(some_ids(40, VOCABULARY))
    return session.step(3)


def layouts(model: CompiledModel) -> set[str]:
    return {store.layout for site in range(2) for store in model.session().stores(site)}


@pytest.fixture(scope="module")
def generated() -> torch.Tensor:
    return logits(compiled())


def test_kernels_serve_every_group_and_torch_computes_the_same(generated):
    model = compiled()
    assert model.warnings == ()
    assert layouts(model) == {"blocks"}
    in_torch = compiled(kernels="torch")
    assert in_torch.warnings == ()
    assert layouts(in_torch) == {"rows"}
    torch.testing.assert_close(logits(in_torch), generated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_every_instruction_set_computes_the_same(generated, isa):
    if link._ISA_ORDER.index(isa) > link._ISA_ORDER.index(toolchain.machine_isa()):
        pytest.skip(f"this processor does not run {isa}")
    torch.testing.assert_close(logits(compiled(isa=isa)), generated, rtol=1e-4, atol=1e-4)


def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(link, "machine_isa", lambda: "avx2")
    with pytest.raises(TargetError) as caught:
        compiled(isa="avx512")
    assert str(caught.value).endswith("target.isa: this processor does not run avx512.\n  Leave it out, or write one of portable, avx2.")


def test_without_a_compiler_torch_runs_and_one_line_says_so(generated, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert find_toolchain() is None
    model = compiled(segments="compiled")
    assert model.warnings == (
        "none of g++, clang++, c++ is on PATH, and CXX is not set: everything runs in torch, uncompiled, which is slower. "
        "Install g++, or set CXX.",
    )
    assert model.warnings[0] in model.explain()
    torch.testing.assert_close(logits(model), generated, rtol=1e-4, atol=1e-4)


def test_a_build_that_fails_is_told_and_torch_runs(generated, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise BuildError.at("kept/folder", "rows.h:1: error: no such thing.", "Repeat it with: g++ ...")

    monkeypatch.setattr(link, "build_kernels", fail)
    model = compiled()
    assert len(model.warnings) == 1
    assert "the kernels could not be built" in model.warnings[0]
    assert "rows.h:1: error: no such thing" in model.warnings[0]
    torch.testing.assert_close(logits(model), generated, rtol=1e-4, atol=1e-4)


def test_a_cache_that_cannot_be_written_costs_time_only(generated, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    model = compiled()
    words = " cannot be kept and will be built again next time. "
    assert [line.partition(words)[0] for line in model.warnings] == ["the launcher", "the kernels"]
    torch.testing.assert_close(logits(model), generated, rtol=1e-4, atol=1e-4)


def test_a_plan_that_was_not_built_runs_in_torch_and_says_so(generated):
    model = compiled()
    policies = {"near": {"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 5}}]}}
    spec = {"kvcompile": 1, "policies": policies, "heads": [{"policy": "near"}]}
    other = model.with_plan(make_plan(spec, module=toys.llama(layers=2)))
    assert other.warnings == ("2 of 2 groups of KV heads have no kernel that was built with this model: they run in torch, slower.",)
    assert layouts(other) == {"rows"}
    assert model.with_plan(model.plan).warnings == ()


@torch.no_grad()
def test_a_number_that_is_none_is_not_hidden():
    """A key of NaN must not look like a key that is not there."""
    model = compiled()
    session = model.session()
    session.prefill(some_ids(5, VOCABULARY))
    weight = next(weight for weight in model.program.weights.values() if weight.dim() == 2 and weight.shape[0] == VOCABULARY)
    kept = weight[7].clone()
    try:
        weight[7] = torch.nan
        assert session.step(7).isnan().all()
    finally:
        weight[7] = kept


@pytest.mark.parametrize("kernels", ["generated", "torch"])
def test_linear_layers_of_slices_and_of_turned_weights(kernels):
    """2 to 4 tokens are another kernel than 1 and than 5."""
    model = compiled(toys.sliced(), kernels=kernels)
    ids = some_ids(12, VOCABULARY)
    whole = model.session().prefill(ids, logits="all")
    session = model.session()
    parts = [session.prefill(part, logits="all") for part in ids.split([1, 2, 3, 4, 2])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_a_dtype_without_a_kernel_is_told_and_runs_in_torch():
    model = compiled(toys.llama(layers=2).half())
    assert model.warnings == (
        "computing in float16 has no C++ kernel: torch runs instead, which is slower.",
        "linear layers in float16 have no C++ kernel: torch runs instead, which is slower.",
    )
    assert layouts(model) == {"rows"}


@pytest.mark.slow  # two or three segments of 10 s
@pytest.mark.families
@pytest.mark.parametrize("toy", ["gpt_oss", "gemma2", "nanogpt"])
def test_compiled_segments_of_other_families(toy):
    """Learnt sinks and experts; soft caps and windows; learnt positions and biases.  Verification reads chunks of 1, 3, 5 and more."""
    model, eager = (compiled(getattr(toys, toy)(), segments=segments) for segments in ("compiled", "eager"))
    assert model.warnings == eager.warnings == ()
    ids = some_ids(30, model.vocabulary)
    found = []
    for each in (model, eager):
        one, two = each.session(), each.session()
        one.prefill(ids)
        two.prefill(ids[:11])
        branch = two.fork()
        steps = [each.step([one, two, branch], [1, 2, 3]), each.step([branch, one], [4, 5])]
        one.rollback(1)
        found.append(torch.cat([*steps, one.prefill(ids[:3], logits="all")]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.slow  # two segments of 10 s
def test_compiled_segments_compute_what_eager_ones_do(generated):
    model = compiled(segments="compiled")
    assert model.warnings == ()
    torch.testing.assert_close(logits(model), generated, rtol=1e-4, atol=1e-4)
    assert "segments" in model.timings
    again = compiled(segments="compiled")
    assert again.timings["segments"] < 2  # found in the cache
    assert torch.equal(logits(again), logits(model))
