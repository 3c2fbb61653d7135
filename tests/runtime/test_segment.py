"""A loaded binary at its border: what it is given is made right or refused, never believed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_segment import compiled, inputs

from kvcompile.ir.errors import KvcompileError, SessionError, TargetError
from kvcompile.ir.segment_description import SegmentDescription, TensorLayout, cpu_features, machine
from kvcompile.runtime.segment import LoadedSegment, load_segment

AGAIN = "\n  Compile the model again on this machine."


def described(**changes) -> SegmentDescription:
    """A segment of [1, tokens, 4] and one weight [4, 2] that was stored the other way round."""
    whole = SegmentDescription(
        activations=(TensorLayout("float32", (1, "tokens", 4)), TensorLayout("float32", (3,))),
        weights=(TensorLayout("float32", (4, 2), (1, 4)),),
        outputs=(TensorLayout("float32", (1, "tokens", 2)),),
        most_tokens=64,
        torch=torch.__version__,
        machine=machine(),
        cpu_features=cpu_features(),
        threads=1,
        compiler="",
    )
    return replace(whole, **changes)


def listening() -> tuple[LoadedSegment, list[torch.Tensor]]:
    """A segment that keeps what its binary would have been given."""
    given: list[torch.Tensor] = []

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        given[:] = inputs
        inputs.clear()
        return []

    return LoadedSegment("segment toy", described(), run), given


def test_the_binary_gets_contiguous_activations_and_weights_of_its_strides():
    loaded, given = listening()
    weight = torch.randn(4, 2)
    loaded.bind([weight])(torch.randn(1, 4, 5).transpose(1, 2), torch.randn(6)[::2])
    assert [tensor.stride() for tensor in given] == [(20, 4, 1), (1,), (1, 4)]
    assert torch.equal(given[2], weight)


def test_a_tensor_that_fits_is_not_copied():
    loaded, given = listening()
    value, table, weight = torch.randn(1, 5, 4), torch.randn(3), torch.randn(2, 4).T
    loaded(value, table, weight)
    assert [tensor.data_ptr() for tensor in given] == [tensor.data_ptr() for tensor in (value, table, weight)]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(1, 5, 3), "activation 0: float32[1, 5, 3] on cpu where float32[1, tokens, 4] on cpu is expected."),
        (torch.zeros(1, 5, 4).double(), "activation 0: float64[1, 5, 4] on cpu where float32[1, tokens, 4] on cpu is expected."),
        (torch.zeros(4), "activation 0: float32[4] on cpu where float32[1, tokens, 4] on cpu is expected."),
        (torch.zeros(1, 5, 4, device="meta"), "activation 0: float32[1, 5, 4] on meta where float32[1, tokens, 4] on cpu is expected."),
    ],
)
def test_an_activation_of_another_shape_is_refused(value, told):
    loaded, given = listening()
    with pytest.raises(SessionError) as caught:
        loaded.bind([torch.zeros(4, 2)])(value, torch.zeros(3))
    assert str(caught.value) == f"segment toy: {told}{AGAIN}"
    assert not given


def test_a_weight_of_another_shape_is_refused_when_it_is_bound():
    loaded, _ = listening()
    with pytest.raises(SessionError) as caught:
        loaded.bind([torch.zeros(2, 4)])
    assert str(caught.value) == f"segment toy: weight 0: float32[2, 4] on cpu where float32[4, 2] on cpu is expected.{AGAIN}"


def test_another_number_of_inputs_or_tokens_is_refused():
    loaded, _ = listening()
    with pytest.raises(SessionError, match="2 weights where 1 are expected"):
        loaded.bind([torch.zeros(4, 2)] * 2)
    call = loaded.bind([torch.zeros(4, 2)])
    with pytest.raises(SessionError, match="1 activations where 2 are expected"):
        call(torch.zeros(1, 5, 4))
    for tokens in (0, 65):
        with pytest.raises(SessionError) as caught:
            call(torch.zeros(1, tokens, 4), torch.zeros(3))
        assert str(caught.value) == f"segment toy: {tokens} tokens in one call.\n  Call it with 1 to 64 tokens."


def forged(path: Path, isa: str) -> Path:
    """A package that says that it was compiled for `isa`; what would run is no machine code at all."""
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("toy/data/aotinductor/model/x.wrapper_metadata.json", json.dumps({"AOTI_CPU_ISA": isa}))
        package.writestr("toy/data/aotinductor/model/x.wrapper.so", b"not a library")
    return path


def refusal(path: Path, description: SegmentDescription) -> str:
    with pytest.raises(TargetError) as caught:
        load_segment(path, description)
    assert str(caught.value).endswith(AGAIN)
    return str(caught.value).removesuffix(AGAIN)


def test_a_binary_for_another_processor_is_refused_before_it_runs(tmp_path, monkeypatch):
    path = forged(tmp_path / "toy.pt2", "AVX512 AVX512_VNNI")
    monkeypatch.setattr("kvcompile.runtime.segment.cpu_features", lambda: ("avx2", "f16c", "fma"))
    told = refusal(path, described(cpu_features=("avx2",)))
    lacks = "avx512_vnni, avx512bw, avx512dq, avx512f, avx512vl"
    assert told == f"{path}: it was compiled for a processor with {lacks}, which this one lacks."
    forged(path, "AVX2")
    told = refusal(path, described(cpu_features=("avx2", "avx512_bf16")))
    assert told == f"{path}: it was compiled for a processor with avx512_bf16, which this one lacks."
    forged(path, "AVX1024")
    assert refusal(path, described()) == f"{path}: it was compiled for AVX1024, which this version of kvcompile does not know."


def test_a_binary_for_another_torch_or_machine_is_refused(tmp_path):
    path = forged(tmp_path / "toy.pt2", "INVALID_VEC_ISA")
    told = refusal(path, described(torch="2.10.0"))
    assert told == f"{path}: it was compiled for torch 2.10.0, this is torch {torch.__version__}."
    assert refusal(path, described(machine="pdp11")) == f"{path}: it was compiled for pdp11, this is {machine()}."


def test_a_damaged_package_is_refused(tmp_path):
    path = tmp_path / "toy.pt2"
    texts = []
    for content in (None, b"", forged(tmp_path / "whole.pt2", "INVALID_VEC_ISA").read_bytes()):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(KvcompileError) as caught:
            load_segment(path, described())
        texts.append(str(caught.value))
    assert all(text.startswith(f"{path}: the compiled segment cannot be read: ") for text in texts)
    assert all(text.endswith("\n  Remove it; it is compiled again.") for text in texts)


@pytest.mark.slow
def test_a_truncated_package_is_refused(tmp_path):
    _, path, description = compiled()
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1):
        (tmp_path / "toy.pt2").write_bytes(whole[:length])
        with pytest.raises(KvcompileError, match="the compiled segment cannot be read"):
            load_segment(tmp_path / "toy.pt2", description)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 7])
def test_other_strides_give_the_same_numbers(tokens):
    _, path, description = compiled()
    activations, weights = inputs(description, tokens)
    loaded = load_segment(path, description)
    expected = loaded(*activations, *weights)
    twisted = [value.transpose(1, -1).contiguous().transpose(1, -1) for value in activations]
    turned = [weight.t().contiguous().t() for weight in weights]
    assert tokens == 1 or not any(value.is_contiguous() for value in twisted)
    torch.testing.assert_close(loaded.bind(turned)(*twisted), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_loading_and_calling_needs_neither_inductor_nor_a_compiler(tmp_path):
    _, path, description = compiled()
    shutil.copy(path, tmp_path / "toy.pt2")
    (tmp_path / "toy.json").write_text(json.dumps(description.as_dict()))
    activations, weights = inputs(description, 3)
    torch.save([*activations, *weights], tmp_path / "inputs.pt")
    script = """
import json, sys, torch
from pathlib import Path
from kvcompile.ir.segment_description import SegmentDescription
from kvcompile.runtime.segment import load_segment
description = SegmentDescription.from_dict(json.loads(Path("toy.json").read_text()))
out = load_segment(Path("toy.pt2"), description)(*torch.load("inputs.pt"))
print(tuple(out[0].shape), [name for name in ("torch._inductor", "torch._dynamo", "sympy") if name in sys.modules])
"""
    environment = {"PATH": "", "CXX": "none", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert ran.stdout.strip() == "(1, 3, 64) []", ran.stderr
