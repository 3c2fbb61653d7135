"""From a spec to a decoder: what is taken, what is proved, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
import yaml
from torch import nn
from units import some_ids

import kvcompile
from kvcompile import verify
from kvcompile.compiler import make_plan
from kvcompile.diagnose import soft_caps_applied
from kvcompile.ir.errors import CapacityError, SpecError, TargetError, UnsupportedGraphError, VerificationError
from kvcompile.models.opened import OpenedModel
from kvcompile.passes import huggingface
from kvcompile.runtime.model import PackedCall
from kvcompile.runtime.program import Program
from kvcompile.transformers_cache import attention_sites

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]  # every test traces and verifies a model

SPEC = {"kvcompile": 1, "verify": {"tokens": 32}, "target": {"segments": "eager"}}
SHORT = {"short": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}]}}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A llama of 1 layer on disk."""
    toys.llama(layers=1).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def write(path: Path, spec: dict) -> Path:
    path.write_text(yaml.safe_dump(spec))
    return path


# --- what is taken -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["planted", "nanogpt", "gated", "sliced_table", "shared_values", "gemma2", "gemma3", pytest.param("gpt_oss", marks=pytest.mark.slow)],
)
def test_every_toy_is_the_same_decoder_as_its_module(name):
    """Windows, soft caps, learnt sinks, learnt positions, shared values: prefill in two chunks and steps against the original."""
    model = getattr(toys, name)()
    compiled = kvcompile.compile(model, spec=SPEC)
    proved = compiled.verification
    assert (proved.full.greedy_agreement, proved.full.max_logit_difference < 1e-4, proved.spec.max_logit_difference) == (1.0, True, 0.0)
    ids = some_ids(40, compiled.vocabulary, seed=5)
    session = compiled.session()
    session.prefill(ids[:30])
    for place in range(30, 40):
        logits = session.step(int(ids[place]))
    torch.testing.assert_close(logits, verify.original_logits(model, ids)[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("soft_cap", "runs"), [(5.0, "eager"), (None, "sdpa")])
def test_a_model_with_soft_caps_is_compared_with_attention_that_applies_them(soft_cap, runs):
    """transformers 5.17 runs such models on "sdpa", which leaves the cap out; newer ones refuse to."""
    model = toys.llama(layers=1)
    sites = [replace(site, soft_cap=soft_cap) for site in attention_sites(model)]
    with soft_caps_applied(model, sites):
        assert model.config._attn_implementation == runs
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_soft_caps_compiles_as_transformers_builds_it():
    model = toys.gemma2()
    chosen = type(model)(model.config.__class__(**model.config.to_dict()))
    chosen.load_state_dict(model.state_dict())
    proved = kvcompile.compile(chosen.eval(), spec=SPEC).verification
    assert proved.full.max_logit_difference < 1e-4


def test_a_module_that_takes_positions():
    class Positions(toys.NanoGPT):
        def forward(self, ids, position_ids):
            x = self.words(ids) + self.positions(position_ids)
            return self.head(self.norm(self.blocks[0](x)))

    torch.manual_seed(0)
    compiled = kvcompile.compile(Positions(1, 64, 32, 2).eval(), spec=SPEC)
    assert compiled.plan.position_rows == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_verified_with_their_own_tolerance(dtype):
    compiled = kvcompile.compile(toys.llama(layers=1).to(dtype), spec=SPEC)
    assert compiled.verification.dtype == str(dtype).removeprefix("torch.")
    assert compiled.session().prefill([1, 2, 3]).dtype == torch.float32


def test_a_spec_may_be_a_dict_a_path_or_read_already(tmp_path):
    spec = {**SPEC, "policies": SHORT, "heads": [{"policy": "short"}]}
    ids = some_ids(60, 256)
    forms = [spec, write(tmp_path / "s.yaml", spec), str(tmp_path / "s.yaml"), kvcompile.load_spec(spec)]
    logits = [kvcompile.compile(toys.llama(layers=1), spec=form).session().prefill(ids) for form in forms]
    assert all(torch.equal(each, logits[0]) for each in logits)


def test_a_model_may_be_named_by_the_spec_or_beside_it(tmp_path, folder):
    named = kvcompile.compile(write(tmp_path / "s.yaml", {**SPEC, "model": {"path": "tiny"}}))
    beside = kvcompile.compile(str(folder), spec=SPEC)
    ids = some_ids(9, 256)
    assert torch.equal(named.session().prefill(ids), beside.session().prefill(ids))
    torch.testing.assert_close(named.session().prefill(ids), toys.llama(layers=1)(ids[None]).logits[0, -1], rtol=0, atol=1e-5)
    assert named.name.endswith("tiny")


def test_overrides_win(tmp_path):
    assert kvcompile.compile(toys.llama(layers=1), spec=SPEC, overrides=("prefill.chunk_tokens=5",)).chunk_tokens == 5


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        kvcompile.compile(toys.gated(inner=(16,)), spec={**SPEC, "target": {"threads": 1, "segments": "eager"}})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_progress_is_told(folder):
    lines: list[str] = []
    kvcompile.compile(str(folder), spec=SPEC, progress=lines.append)
    text = "\n".join(lines)
    places = [text.index(word) for word in ("reading", "tracing", "running passes", "loading", "verifying")]
    assert places == sorted(places)


def test_stop_tokens_come_from_the_configuration():
    assert kvcompile.compile(toys.llama(layers=1, eos_token_id=[7, 9]), spec=SPEC).stop_tokens == {7, 9}
    assert kvcompile.compile(toys.llama(layers=1), spec=SPEC).stop_tokens == frozenset()


# --- what a head that forgets costs --------------------------------------------------------------------------------------------------

P = toys.Planted
LOST_SINK = {"no_sink": {"zones": [{"sink_recent": {"sink_tokens": 0, "recent_tokens": 16}}]}}
RETRIEVAL, SINK = 0, 1  # KV heads of the planted model


def answer(*rules: dict, after: int = 100) -> int:
    named = {rule["policy"] for rule in rules}
    policies = {name: policy for name, policy in {**SHORT, **LOST_SINK}.items() if name in named}
    compiled = kvcompile.compile(toys.planted(), spec={**SPEC, "policies": policies, "heads": [{"policy": "full"}, *rules]})
    return int(compiled.session().prefill(P.question(name=3, code=5, before=50, after=after)).argmax())


def test_the_planted_model_answers():
    assert answer() == P.code(5)


def test_a_head_with_a_sink_may_stream_if_it_keeps_its_sink():
    """Trap 18."""
    assert answer({"policy": "short", "kv_heads": SINK}) == P.code(5)


def test_a_lost_sink_is_seen():
    assert answer({"policy": "no_sink", "kv_heads": SINK}) == P.NOISE


def test_a_retrieval_head_may_not_stream():
    assert answer({"policy": "short", "kv_heads": RETRIEVAL}) != P.code(5)
    assert answer({"policy": "short", "kv_heads": RETRIEVAL}, after=8) == P.code(5)  # within its window it may


def test_the_price_is_in_the_verification():
    """On text that the model answers all the time: ask, with the fact far behind."""
    compiled = kvcompile.compile(toys.planted(), spec={**SPEC, "policies": LOST_SINK, "heads": [{"policy": "no_sink"}]})
    assert compiled.verification.full.max_logit_difference < 1e-4
    whole = compiled.with_plan(verify.full_plan(compiled.plan))
    ids = P.question(3, 5, 50, 100)
    compared = verify.Comparison.of(*(each.session().prefill(ids, logits="all") for each in (whole, compiled)))
    assert compared.mean_kl > 1 and compared.greedy_agreement < 0.5
    assert compared.text().startswith("max |logit difference| 2.00e+01, mean KL ")


# --- what is refused -----------------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], *args, **options) -> str:
    with pytest.raises(error) as caught:
        kvcompile.compile(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("source", [None, "module"])
def test_there_must_be_a_spec(source):
    told = refused(SpecError, toys.planted() if source else None)
    assert told == "compile: there is no spec.\n  Give spec= a path, a dict or a Spec; {'kvcompile': 1} is policy full."


def test_a_model_named_twice_is_refused(tmp_path, folder):
    path = write(tmp_path / "s.yaml", {"kvcompile": 1, "model": {"path": "tiny"}})
    line = path.read_text().splitlines().index("model:") + 1
    told = refused(SpecError, toys.planted(), spec=path)
    assert told == f"{path}:{line}: model: the spec names a model and a module was given too.\n  Leave `model:` out of the spec."
    told = refused(SpecError, str(folder), spec=path)
    assert told == f"{path}:{line}: model: the spec names a model and {str(folder)!r} was given too.\n  Name the model in one place."


def test_no_model_at_all_is_refused(tmp_path):
    path = write(tmp_path / "s.yaml", SPEC)
    assert refused(SpecError, path) == (
        f"{path}: model: the spec names no model.\n  Write `model: {{path: ...}}`, or give a module: compile(module, spec=...)."
    )


def test_training_mode_is_refused():
    assert refused(UnsupportedGraphError, toys.planted().train(), spec=SPEC).startswith("trace: the model is in training mode.")


@pytest.mark.parametrize("name", ["centred_convolution", "running_sum", "pairs"])
def test_a_model_that_mixes_tokens_in_another_way_is_refused(name):
    refused(UnsupportedGraphError, getattr(toys, name)(), spec=SPEC)


def test_layers_that_the_model_does_not_have_are_refused_with_their_line(tmp_path):
    path = write(tmp_path / "s.yaml", {**SPEC, "heads": [{"policy": "streaming", "layers": 7}]})
    told = refused(SpecError, toys.llama(layers=2), spec=path)
    assert f"{path}:" in told and "layer 7 does not exist (2 attention layers, 0 to 1)" in told


@pytest.mark.parametrize(
    ("present", "missing"), [(False, "there is no CUDA device on this machine"), (True, "its kernels are not built yet")]
)
def test_cuda_is_refused(monkeypatch, present, missing):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert refused(TargetError, toys.planted(), spec={**SPEC, "target": {"device": "cuda"}}) == (
        f"<spec>: target.device: cuda cannot run: {missing}.\n"
        "  Write `device: cpu`; validate, plan, --show, --dump and --stop-after work for cuda without a device."
    )


def test_a_plan_for_cuda_needs_no_device():
    plan = make_plan({**SPEC, "target": {"device": "cuda"}}, module=toys.llama(layers=1))
    assert {group.device for site in plan.sites for group in site.groups} == {"cuda"}


def test_too_little_memory_is_refused_before_weights_are_loaded(folder, monkeypatch):
    monkeypatch.setattr(OpenedModel, "load", lambda self: pytest.fail("weights were loaded"))
    told = refused(CapacityError, str(folder), spec={**SPEC, "target": {"memory": "1MiB"}})
    assert "for one session of 4096 tokens), more than the declared 1 MiB." in told


# --- what is proved ------------------------------------------------------------------------------------------------------------------


def louder_llama() -> nn.Module:
    model = toys.llama(layers=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(10 if name.endswith("proj.weight") else 1)
    return model


def test_a_wrong_kernel_is_named_by_its_site(monkeypatch):
    real = PackedCall.attend

    def wrong(self, site, *rest):
        out = real(self, site, *rest)
        return out * 1.5 if site == 1 else out

    monkeypatch.setattr(PackedCall, "attend", wrong)
    told = refused(VerificationError, louder_llama(), spec=SPEC)
    assert told.startswith("verification: policy full differs from the original model: max |logit difference| ")
    assert "First difference: model.layers.1.self_attn (site 1): the runtime's attention differs by " in told
    assert " of the traced attention's largest value." in told
    assert told.endswith("\n  Nothing was kept. kvcompile misreads this model; `--dump DIR` writes what is needed to report it.")


def test_a_wrong_trace_is_named_by_its_module(monkeypatch):
    real = huggingface._attention

    def wrong(module, query, key, value, mask, scaling=None, **keywords):
        return real(module, query, key, value, mask, scaling * (4 if module.layer_idx == 2 else 1), **keywords)

    monkeypatch.setattr(huggingface, "_attention", wrong)
    told = refused(VerificationError, louder_llama(), spec=SPEC)
    assert "First difference: model.layers.2.self_attn: the model's own attention differs from the traced one by " in told


def test_a_difference_between_attentions_is_said_to_be_in_a_segment(monkeypatch):
    real = Program.run
    monkeypatch.setattr(Program, "run", lambda self, *rest: real(self, *rest) * 1.5)
    told = refused(VerificationError, toys.nanogpt(), spec=SPEC)
    assert "First difference: in a segment: every attention agrees, the logits do not." in told


def test_a_result_that_is_not_a_number_is_never_verified():
    model = toys.nanogpt()
    with torch.no_grad():
        model.head.weight[3, 3] = torch.nan
    refused(VerificationError, model, spec=SPEC)


def records(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "verified").glob("*.json"))


def test_a_verification_is_kept_and_believed_again(tmp_path, folder):
    first = kvcompile.compile(str(folder), spec=SPEC)
    second = kvcompile.compile(str(folder), spec=SPEC)
    assert (first.verification.from_record, second.verification.from_record) == (False, True)
    assert second.verification == replace(first.verification, from_record=True)
    assert "verify" in first.timings and "verify" not in second.timings
    assert "(proved before, nothing changed since)" in second.verification.text()
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("change", ["policy", "tokens", "weights", "record"])
def test_whatever_changes_is_verified_anew(tmp_path, folder, change):
    kvcompile.compile(str(folder), spec=SPEC)
    spec = dict(SPEC)
    if change == "policy":
        spec["heads"] = [{"policy": "streaming"}]
    elif change == "tokens":
        spec["verify"] = {"tokens": 33}
    elif change == "weights":
        toys.llama(layers=1, seed=1).save_pretrained(folder)
    else:
        (record,) = records(tmp_path)
        record.write_text(json.dumps({"full": {}}))
    assert not kvcompile.compile(str(folder), spec=spec).verification.from_record


def test_a_failed_verification_is_not_kept(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(verify, "KL_TOLERANCE", {"float32": -1.0})
    refused(VerificationError, str(folder), spec=SPEC)
    assert records(tmp_path) == []


# --- what is told --------------------------------------------------------------------------------------------------------------------


def test_the_plan_is_what_a_session_takes():
    spec = {**SPEC, "policies": SHORT, "heads": [{"policy": "short", "kv_heads": 0}, {"policy": "short", "layers": 1}]}
    model = toys.llama(layers=3)
    compiled = kvcompile.compile(model, spec=spec)
    assert make_plan(spec, module=model) == compiled.plan
    session = compiled.session()
    session.prefill(some_ids(300, 256))
    assert session.nbytes() == compiled.plan.stored_bytes(300) == 2 * (16 + 16) * 4 * (300 + 16) + 2 * (16 + 16) * 4 * 16


def test_explain_tells_plan_proof_and_time(folder):
    text = kvcompile.compile(str(folder), spec=SPEC).explain()
    for part in ("layers", "2 full", "weights: ", "full against the original: max |logit difference|", "this spec against full:"):
        assert part in text
    assert "compile: open " in text and "outline_segments" in text


def test_ties_of_a_pattern_are_told(tmp_path):
    from kvcompile.spec.patterns import write_pattern

    write_pattern(tmp_path / "p.yaml", model="tiny", scores=[[0.5, 0.5]] * 2)
    spec = {**SPEC, "heads": [{"policy": "streaming", "pattern": str(tmp_path / "p.yaml"), "share": "25%"}]}
    compiled = kvcompile.compile(toys.llama(layers=2), spec=spec)
    (warning,) = compiled.warnings
    assert "4 KV heads score 0.5 where the share ends" in warning and warning in compiled.explain()
