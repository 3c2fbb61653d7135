"""What a spec becomes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile.ir.errors import SpecError
from kvcompile.ir.policy import All, HeadPolicy, Int8, Kivi, SinkRecent, Store
from kvcompile.ir.spec import HeadRule, Target
from kvcompile.spec import bundled, bundled_specs, json_schema, load_spec
from kvcompile.spec.patterns import write_pattern


@pytest.fixture
def folder(tmp_path):
    """A folder with a model of 3 layers of 2 KV heads and a pattern for it."""
    config = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_pattern(tmp_path / "p.yaml", model="toy", scores=[[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    return tmp_path


def write(folder, text):
    file = folder / "spec.yaml"
    file.write_text(text)
    return file


def test_a_full_spec_becomes_plain_dataclasses(folder):
    file = write(
        folder,
        """kvcompile: 1
model: {path: model, dtype: bfloat16}
target: {device: cuda, threads: 4, memory: 4GiB, deterministic: true, isa: avx2, kernels: torch, segments: eager}
policies:
  mine:
    zones: [{sink_recent: {sink_tokens: 4, recent_tokens: 1k}}]
    positions: absolute
    store: {dtype: float16}
    rollback: 8
heads:
  - {policy: full}
  - {policy: mine, pattern: p.yaml, share: 75%}
  - policy: streaming
    layers: [0-1]
    kv_heads: 1
prefill: {chunk_tokens: 2k}
verify: {tokens: 64}
output: {directory: build/x, formats: [report]}
seed: 7
""",
    )
    spec = load_spec(file)
    assert spec.model is not None
    assert (spec.model.path, spec.model.dtype, spec.model.folder) == ("model", "bfloat16", str(folder))
    assert spec.model.where == f"{file}:2: model.path"
    assert spec.target == Target("cuda", 4, 4 << 30, True, "avx2", "torch", "eager", f"{file}:3: target")
    assert spec.policies["mine"] == HeadPolicy("mine", (SinkRecent(4, 1024),), store=Store("float16"), rollback_tokens=8)
    assert [rule.policy for rule in spec.heads] == ["full", "mine", "streaming"]
    assert spec.heads[1].share == 0.75
    assert spec.heads[1].pattern is not None
    assert spec.heads[1].pattern.scores[2] == (0.5, 0.6)
    assert spec.heads[2] == HeadRule("streaming", (0, 1), (1,), where=f"{file}:13: heads[2]")
    assert (spec.prefill_chunk_tokens, spec.verify_tokens, spec.seed) == (2048, 64, 7)
    assert (spec.output.directory, spec.output.formats) == ("build/x", ("report",))
    assert spec.where("heads[2].kv_heads") == f"{file}:15: heads[2].kv_heads"


def test_without_heads_every_kv_head_is_full_and_policies_are_built_in():
    spec = load_spec({"kvcompile": 1})
    assert spec.model is None
    assert [(rule.policy, rule.layers, rule.kv_heads) for rule in spec.heads] == [("full", None, None)]
    assert spec.policies["full"].zones == (All(),)
    assert spec.policies["streaming"].zones == (SinkRecent(16, 256),)


@pytest.mark.parametrize("positions", ["absolute", "cache_index"])
def test_a_policy_says_where_queries_stand(positions):
    zones = [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 8}}]
    policies = {"mine": {"zones": zones, "positions": positions}}
    spec = load_spec({"kvcompile": 1, "policies": policies, "heads": [{"policy": "mine"}]})
    assert spec.policies["mine"] == HeadPolicy("mine", (SinkRecent(4, 8),), positions)


def test_a_policy_may_redefine_a_built_in_name():
    spec = load_spec({"kvcompile": 1, "policies": {"quest": {"zones": ["all"]}}, "heads": [{"policy": "quest"}]})
    assert spec.policies["quest"].zones == (All(),)


def test_output_is_a_report_unless_said_otherwise(tmp_path):
    assert load_spec({"kvcompile": 1, "output": {"directory": tmp_path / "new"}}).output.formats == ("report",)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("written", "window"),
    [({}, SinkRecent(64, 128)), ({"sink_tokens": 4}, SinkRecent(4, 128)), ({"sink_tokens": 4, "recent_tokens": 8}, SinkRecent(4, 8))],
)
def test_the_window_of_a_duo_attention_pattern_applies_where_the_policy_leaves_it_out(folder, written, window):
    (folder / "duo").mkdir()
    (folder / "duo" / "full_attention_heads.tsv").write_text("0\t1\n0\t1\n0\t1\n")
    (folder / "duo" / "config.json").write_text('{"sink_size": 64, "recent_size": 128}')
    policies = {"mine": {"zones": [{"sink_recent": written}]}}
    heads = [{"policy": "mine", "pattern": str(folder / "duo"), "share": "50%"}]
    spec = load_spec({"kvcompile": 1, "model": {"path": folder / "model"}, "policies": policies, "heads": heads})
    assert spec.policies["mine"].zones == (window,)


def test_overrides_win_and_give_their_own_place(folder):
    file = write(folder, "kvcompile: 1\nheads:\n  - {policy: full}\n  - {policy: streaming, pattern: p.yaml, share: 75%}\n")
    changes = ["heads[1].share=50%", "target.threads=3", "seed=0x10", "heads[0]={policy: streaming, layers: 0-1}"]
    spec = load_spec(file, overrides=changes)
    assert spec.heads[1].share == 0.5
    assert spec.heads[0].layers == (0, 1)
    assert (spec.target.threads, spec.seed) == (3, 16)
    assert spec.where("heads[1].share") == "--set heads[1].share=50%: heads[1].share"
    assert load_spec(file, overrides=["heads="]).heads[0].policy == "full"


def test_paths_start_at_the_spec_and_those_of_overrides_at_the_working_directory(folder, monkeypatch):
    (folder / "sub").mkdir()
    file = write(folder / "sub", "kvcompile: 1\nmodel: {path: ../model}\n")
    assert load_spec(file).model is not None
    monkeypatch.chdir(folder)
    spec = load_spec(file, overrides=["model.path=./model"])
    assert spec.model is not None
    assert spec.model.folder == "."


def test_a_spec_that_was_read_is_returned_and_cannot_be_overridden():
    spec = load_spec({"kvcompile": 1})
    assert load_spec(spec) is spec
    with pytest.raises(SpecError, match="this spec was read already; --set changes a file or a dict"):
        load_spec(spec, overrides=["seed=1"])


def test_the_model_is_not_looked_at_when_told_so():
    spec = {"kvcompile": 1, "model": {"path": "./nowhere"}}
    assert load_spec(spec, check_model=False).model is not None
    with pytest.raises(SpecError, match="does not exist"):
        load_spec(spec)


def test_bundled_specs_load_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "folder", lambda: tmp_path)
    (tmp_path / "small.yaml").write_text("kvcompile: 1\nseed: 3\n")
    assert bundled_specs() == ("small",)
    assert load_spec("builtin:small").seed == 3
    with pytest.raises(SpecError) as caught:
        load_spec("builtin:smal")
    message = 'builtin:smal: there is no bundled spec of this name (there are small).\n  Did you mean "builtin:small"?'
    assert str(caught.value) == message


def test_every_bundled_spec_is_right():
    for name in bundled_specs():
        load_spec(f"builtin:{name}", check_model=False)


def test_the_json_schema_has_every_section_and_no_null():
    schema = json_schema()
    assert set(schema["properties"]) >= {"kvcompile", "model", "target", "policies", "heads", "prefill", "verify", "output", "seed"}
    assert "null" not in json.dumps(schema)
    assert schema["additionalProperties"] is False


def test_reading_a_spec_imports_neither_torch_nor_transformers(folder):
    file = write(folder, "kvcompile: 1\nmodel: {path: model}\nheads: [{policy: streaming, pattern: p.yaml, share: 50%}]\n")
    code = (
        "import sys; from kvcompile.spec import load_spec, json_schema;"
        "assert not {'pydantic', 'yaml'} & set(sys.modules);"
        f"load_spec({str(file)!r}); json_schema();"
        "print(sorted({'torch', 'transformers', 'numpy', 'networkx'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


NEAR = {"near": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 8}}]}}
UNUSED = (
    '<spec>: policies.near: policy "near" is used by no rule.\n  Name it in heads, for example heads: [{policy: near}], or take it out.'
)


@pytest.mark.parametrize("heads", [{}, {"heads": [{"policy": "full"}]}])
def test_a_policy_that_no_rule_uses_is_refused(heads):
    with pytest.raises(SpecError) as caught:
        load_spec({"kvcompile": 1, "policies": NEAR, **heads})
    assert str(caught.value) == UNUSED


def test_a_redefined_full_needs_no_rule_because_other_kv_heads_get_it():
    spec = load_spec({"kvcompile": 1, "policies": {"full": {"zones": ["all"], "store": "bfloat16"}}})
    assert spec.policies["full"].store == Store("bfloat16")


def test_a_misspelt_rule_is_told_once_and_not_as_an_unused_policy_too():
    with pytest.raises(SpecError) as caught:
        load_spec({"kvcompile": 1, "policies": NEAR, "heads": [{"policy": "naer"}]})
    told = '<spec>: heads[0].policy: policy "naer" does not exist '
    told += "(there are full, infllm, lookup, magicpig, near, quest, retroinfer, streaming).\n"
    told += '  Did you mean "near"?'
    assert str(caught.value) == told


def test_rules_that_an_override_took_away_leave_their_policies_alone(folder):
    file = write(folder, "kvcompile: 1\npolicies: {mine: {zones: [all]}}\nheads: [{policy: mine}]\n")
    assert load_spec(file, overrides=["heads="]).heads == (HeadRule("full"),)
    assert load_spec(file, overrides=["heads[0].policy=full"]).heads[0].policy == "full"


def test_zone_all_takes_a_rollback_for_the_windows_that_a_model_has_itself():
    policies = {"mine": {"zones": ["all"], "rollback": 8}}
    spec = load_spec({"kvcompile": 1, "policies": policies, "heads": [{"policy": "mine"}]})
    assert spec.policies["mine"] == HeadPolicy("mine", (All(),), rollback_tokens=8)


@pytest.mark.parametrize(
    ("written", "store"),
    [
        ("int8", Store(quantised=Int8())),
        ({"dtype": "int8"}, Store(quantised=Int8())),
        ({"kivi": {}}, Store(quantised=Kivi(4, 32, 128))),
        ({"kivi": {"bits": 2, "group": 16, "residual_tokens": 64}}, Store(quantised=Kivi(2, 16, 64))),
    ],
)
def test_stores_of_fewer_bits_reach_their_policy(written, store):
    policy = {"zones": ["all"], "store": written}
    spec = load_spec({"kvcompile": 1, "policies": {"few": policy}, "heads": [{"policy": "few"}]})
    assert spec.policies["few"] == HeadPolicy("few", (All(),), store=store)
