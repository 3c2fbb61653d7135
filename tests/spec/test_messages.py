"""What a user is told: the text of every kind of mistake."""

import json
import os

import pytest

from kvcompile.ir.errors import SpecError
from kvcompile.spec import load_spec
from kvcompile.spec.patterns import write_pattern


@pytest.fixture
def folder(tmp_path, monkeypatch):
    config = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_pattern(tmp_path / "good.yaml", model="toy", scores=[[0.1, 0.2, 0.3]] * 4)
    write_pattern(tmp_path / "short.yaml", model="toy", scores=[[0.1, 0.2, 0.3]] * 3)
    write_pattern(tmp_path / "other.yaml", model="toy", scores=[[0.1, 0.2, 0.3]] * 4, model_hash="0123")
    (tmp_path / "nan.yaml").write_text("kvcompile_pattern: 1\nlayers: 1\nkv_heads: 2\nscores:\n  - [0.5, .nan]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(text, overrides=()):
    with open("s.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(SpecError) as caught:
        load_spec("s.yaml", overrides=overrides)
    message = str(caught.value)
    for jargon in ("Input should", "pydantic", "type=", "Traceback", "value_error", "Annotated"):
        assert jargon not in message
    return message


SINK = "policies: {mine: {zones: [{sink_recent: {sink_tokens: 4, recent_tokens: 8}}]"
SINKS = "{sink_recent: {sink_tokens: 4, recent_tokens: 8}}"
LOOKUP = f"policies: {{a: {{zones: [{SINKS}, {{top_k: {{"
SAMPLE = f"policies: {{a: {{zones: [{SINKS}, {{sample: {{lsh: {{"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("target: {device: cdua}", 's.yaml:2: target.device: "cdua" is not allowed: one of cpu, cuda.\n  Write "cuda".'),
        (
            "target: {threads: 0}",
            "s.yaml:2: target.threads: 0 is not allowed: auto, or a number from 1 to 1024.\n  Write for example threads: auto.",
        ),
        ("target: {memory: 4G}", 's.yaml:2: target.memory: "4G" is not allowed: a size such as 256MiB, 4GiB or 4GB.'),
        ("target: {deterministic: yes}", 's.yaml:2: target.deterministic: "yes" is not allowed: true or false.'),
        (
            "target: 3",
            "s.yaml:2: target: 3 is not allowed: a mapping of device, threads, memory, deterministic, isa, kernels, segments, disk.",
        ),
        ("seed: -1", "s.yaml:2: seed: -1 is not allowed: a whole number from 0.\n  Write for example seed: 0."),
        ('seed: "12"', 's.yaml:2: seed: "12" is not allowed: a whole number from 0.'),
        ("seed: 1.0", "s.yaml:2: seed: 1.0 is not allowed: a whole number from 0."),
        ("seed: true", "s.yaml:2: seed: true is not allowed: a whole number from 0."),
        ("modle: {path: x}", 's.yaml:2: modle: the key "modle" does not exist here (there are kvcompile, model, target,'),
        ("modle: {path: x}", 'Did you mean "model"?'),
        ("target: {devices: cpu}", 'Did you mean "device"?'),
        (
            "model: {dtype: float32}",
            "s.yaml:2: model.path: is missing: a folder, a hub id, a file.gguf, package:NAME/FILE or python:module:factory.",
        ),
        ("model: {path: x/y, dtype: fp16}", 's.yaml:2: model.dtype: "fp16" is not allowed: one of float32, bfloat16, float16.'),
        ("seed: 1\nseed: 2", "s.yaml:3: seed: the key stands here and in line 2.\n  Keep one of them."),
        ("heads: [", "s.yaml:3: YAML syntax: "),
        ("heads: []", "s.yaml:2: heads: an empty list is not allowed: a list of rules, at least one."),
        ("heads: [full]", 's.yaml:2: heads[0]: "full" is not allowed: a mapping of policy, layers, kv_heads, pattern, share.'),
        ("heads: {policy: full}", "s.yaml:2: heads: a mapping of 1 is not allowed: a list of rules, at least one."),
        ("heads: [{layers: 1}]", "s.yaml:2: heads[0].policy: is missing: the name of a policy.\n  Write for example policy: full."),
        (
            "heads: [{policy: strem}]",
            's.yaml:2: heads[0].policy: policy "strem" does not exist '
            "(there are full, infllm, lookup, magicpig, quest, retroinfer, streaming).\n"
            '  Did you mean "streaming"?',
        ),
        ("heads: [{policy: zzz}]", "Name one of them, or add it under policies."),
        (
            "heads: [{policy: full, layers: 2-1}]",
            's.yaml:2: heads[0].layers: "2-1" is not allowed: a number from 0, a range such as "0-2", a list',
        ),
        ("heads: [{policy: full, layers: [0, x]}]", "s.yaml:2: heads[0].layers: [0, x] is not allowed"),
        (
            "heads: [{policy: full, share: 50%}]",
            "s.yaml:2: heads[0].share: share without pattern.\n  Write pattern too, for example pattern: patterns/model.yaml.",
        ),
        (
            "heads: [{policy: full, pattern: good.yaml}]",
            "s.yaml:2: heads[0].pattern: pattern without share.\n  Write share too, for example share: 75%.",
        ),
        (
            "heads: [{policy: full, pattern: good.yaml, share: 0.5}]",
            "heads[0].share: 0.5 is not allowed: a percentage from 0% to 100%, with its sign.",
        ),
        ("heads: [{policy: full, pattern: good.yaml, share: 101%}]", 'heads[0].share: "101%" is not allowed: a percentage from 0% to 100%'),
        (
            "heads: [{policy: full, pattern: god.yaml, share: 5%}]",
            's.yaml:2: heads[0].pattern: the pattern "god.yaml" does not exist (looked for god.yaml).\n  Did you mean "good.yaml"?',
        ),
        (
            "heads: [{policy: full, pattern: nan.yaml, share: 5%}]",
            "nan.yaml:5: scores[0][1]: the score is nan, not a finite number.\n  Scores are numbers from 0 to 1.",
        ),
        ("policies: {a: 3}", "s.yaml:2: policies.a: 3 is not allowed: a mapping of zones, positions, store, device, rollback."),
        (
            "policies: {a: {zones: [all], store: {kivi: {group: 24}}}}\nheads: [{policy: a}]",
            "s.yaml:2: policies.a.store.kivi.group: 24 tokens or channels are no multiple of 16.\n  Write group: 32.",
        ),
        (
            "policies: {a: {zones: [all], store: {kivi: {residual_tokens: 100}}}}\nheads: [{policy: a}]",
            "s.yaml:2: policies.a.store.kivi.residual_tokens: 100 tokens are no whole number of groups of 32, and keys are quantised in "
            "groups.\n  Write residual_tokens: 96.",
        ),
        (
            "policies: {full: {zones: [all], store: int8}}",
            "s.yaml:2: policies.full.store: full is what every compile is proved with: its keys and values are not quantised.\n"
            "  Give this policy another name.",
        ),
        ("policies: [a]", "s.yaml:2: policies: [a] is not allowed: a mapping of names to policies."),
        ("policies: {a: {}}", "s.yaml:2: policies.a.zones: is missing: a list of zones, at least one."),
        ("policies: {a: {zones: []}}", "s.yaml:2: policies.a.zones: an empty list is not allowed: a list of zones, at least one."),
        (
            "policies: {a: {zones: [{topk: {}}]}}",
            's.yaml:2: policies.a.zones[0].topk: zone kind "topk" does not exist (there are all, sink_recent,',
        ),
        ("policies: {a: {zones: [{topk: {}}]}}", 'Did you mean "top_k"?'),
        (
            "policies: {a: {zones: [{all: {}, state: {}}]}}",
            "policies.a.zones[0]: a zone is a mapping with exactly one key, its kind; found all, state.",
        ),
        ("policies: {a: {zones: [none]}}", "policies.a.zones[0]: a zone is a mapping with exactly one key, its kind; found 'none'."),
        (
            "policies: {a: {zones: [sink_recent]}}",
            "policies.a.zones[0]: zone kind sink_recent needs its options.\n  Write sink_recent: {sink_tokens: 16,",
        ),
        ("policies: {a: {zones: [{sink_recent: {sink: 4}}]}}", 'Did you mean "sink_tokens"?'),
        (
            "policies: {a: {zones: [{sink_recent: {sink_tokens: -1, recent_tokens: 8}}]}}",
            "sink_recent.sink_tokens: -1 is not allowed: a number of tokens from 0",
        ),
        (
            "policies: {a: {zones: [all], positions: cache_index}}",
            "s.yaml:2: policies.a.positions: cache_index is the place of a query behind its sinks, and the policy has no sink_recent "
            "zone.\n  Write positions: absolute, or a zone such as sink_recent: {sink_tokens: 16, recent_tokens: 256}.",
        ),
        (
            "policies: {a: {zones: [{sink_recent: {sink_tokens: 0, recent_tokens: 8}}], positions: cache_index}}",
            "policies.a.positions: cache_index is the place of a query behind its sinks, and the policy keeps no sink tokens.",
        ),
        (f"{SINK}, positions: relative}}}}", 'policies.mine.positions: "relative" is not allowed: one of absolute, cache_index.'),
        (
            "policies: {a: {zones: [{sink_recent: {sink_tokens: 1, recent_tokens: 0}}]}}",
            "sink_recent.recent_tokens: 0 is not allowed: a number of tokens from 1",
        ),
        (
            "policies: {a: {zones: [{sink_recent: {recent_tokens: 8}}]}}",
            "s.yaml:2: policies.a.zones[0].sink_recent.sink_tokens: is missing, and no rule",
        ),
        (
            "policies: {a: {zones: [all], store: int9}}",
            'policies.a.store.dtype: "int9" is not allowed: one of float32, bfloat16, float16, int8.\n  Write "int8".',
        ),
        (
            "policies: {a: {zones: [all], store: {dtype: int8, kivi: {}}}}",
            "policies.a.store: a store has exactly one key, found dtype, kivi.",
        ),
        ("policies: {a: {zones: [all], store: {kivi: {bits: 3}}}}", "policies.a.store.kivi.bits: 3 is not allowed: 2 or 4."),
        (
            "policies: {a: {zones: [all]}}",
            's.yaml:2: policies.a: policy "a" is used by no rule.\n  Name it in heads, for example heads: [{policy: a}], or take it out.',
        ),
        ("prefill: {chunk_tokens: 0}", 's.yaml:2: prefill.chunk_tokens: 0 is not allowed: a number of tokens from 1, or such as "2k".'),
        ("verify: {tokens: 15}", 's.yaml:2: verify.tokens: 15 is not allowed: a number of tokens from 16, or such as "1k".'),
        ("output: {directory: s.yaml}", 's.yaml:2: output.directory: "s.yaml" is a file.\n  Name a folder that can be made or written to.'),
        ("output: {directory: s.yaml/x/y}", 'output.directory: "s.yaml/x/y" cannot be made: '),
        (
            "output: {formats: [report]}",
            "s.yaml:2: output.formats: formats without a directory are written nowhere.\n  Write output.directory, or -o FOLDER.",
        ),
        (
            "output: {directory: x, formats: [artifcat]}",
            's.yaml:2: output.formats[0]: "artifcat" is not allowed: a list of artifact, report, onnx.\n  Write "artifact".',
        ),
        ("target:", "s.yaml:2: target: has no value.\n  Write one, or take the line out."),
        (
            "model: {path: ./nowhere}",
            "s.yaml:2: model.path: ./nowhere: does not exist (looked for nowhere).\n  Write a folder, a hub id, a file.gguf,",
        ),
        ("model: {path: gone.gguf}", "s.yaml:2: model.path: gone.gguf: does not exist (looked for gone.gguf)."),
        ("model: {path: s.yaml}", "s.yaml:2: model.path: s.yaml: is a file of another kind than .gguf and .pt2."),
        ("model: {path: .}", "s.yaml:2: model.path: .: is a folder without a config.json."),
        (
            "model: {path: package:no_such_thing/x.gguf}",
            "the package no_such_thing is not installed.\n  Install it: pip install no-such-thing",
        ),
    ],
)
def test_a_mistake_is_told_with_its_place_and_its_mend(folder, body, message):
    assert message in told(f"kvcompile: 1\n{body}\n")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            "{policy: full, layers: 4}",
            "s.yaml:3: heads[0].layers: layer 4 does not exist in the model (4 layers, 0 to 3).\n"
            '  Write numbers from 0 to 3, a range such as 0-3, or "all".',
        ),
        (
            "{policy: full, layers: 3, kv_heads: [0, 9]}",
            "s.yaml:3: heads[0].kv_heads: KV head 9 does not exist in layers.3 (3 KV heads, 0 to 2).\n"
            '  Write numbers from 0 to 2, a range such as 0-2, or "all".',
        ),
        ("{policy: full, kv_heads: 3}", "KV head 3 does not exist in layers.0 (3 KV heads, 0 to 2)."),
        (
            "{policy: full, pattern: short.yaml, share: 5%}",
            "s.yaml:3: heads[0].pattern: short.yaml has 3 layers, the model has 4: it was made for another model than model.",
        ),
        ("{policy: full, pattern: other.yaml, share: 5%}", "other.yaml is for the wrong model: its model_hash is 0123, the model's is "),
    ],
)
def test_rules_are_compared_with_the_model(folder, heads, message):
    assert message in told(f"kvcompile: 1\nmodel: {{path: model}}\nheads: [{heads}]\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            f"target: {{device: cuda}}\n{SAMPLE} tables: 75}}}}}}]}}}}",
            "s.yaml:3: policies.a.zones[1].sample: zone kind sample on cuda is not built in kvcompile 0.1.0.\n  Write target.device: cpu.",
        ),
        (
            "target: {device: cuda}\nheads: [{policy: magicpig}]",
            "s.yaml:3: heads[0].policy: policy magicpig on cuda is not built in kvcompile 0.1.0.\n  Write target.device: cpu.",
        ),
        (
            f"target: {{device: cuda}}\n{LOOKUP} k: 1%}}}}]}}}}",
            "s.yaml:3: policies.a.zones[1].top_k: zone kind top_k on cuda is not built in kvcompile 0.1.0.\n  Write target.device: cpu.",
        ),
        ("policies: {a: {zones: [{state: {any: 1}}]}}", "zone kind state is not built"),
        (
            "policies: {a: {zones: [all, {sink_recent: {sink_tokens: 4, recent_tokens: 8}}]}}",
            "s.yaml:2: policies.a.zones: all and sink_recent share tokens, which would then count twice.\n  Keep one of the zones, or "
            "sink_recent and one of static, top_k, clusters, sample behind it.",
        ),
        (
            "policies: {a: {zones: [{all: {store: float16}}]}}",
            "policies.a.zones[0].all.store: a store for one zone is not built in kvcompile 0.1.0.\n  Write store at the policy.",
        ),
        ("policies: {a: {zones: [{all: {device: cuda}}]}}", "policies.a.zones[0].all.device: device cuda for one policy is not built"),
        (
            "policies: {a: {zones: [{all: {device: cpu}}]}}",
            "policies.a.zones[0].all.device: cpu is the target's device already: it changes nothing.\n  Take it out, or write",
        ),
        (
            "target: {device: cuda}\npolicies: {a: {zones: [{all: {device: disk}}]}}",
            "policies.a.zones[0].all.device: device disk on cuda is not built in kvcompile 0.1.0.\n  Write target.device: cpu.",
        ),
        (
            f"{SINK}, device: disk}}}}",
            "policies.mine.device: sink_recent on disk is not built in kvcompile 0.1.0.\n  Write zones: [{all: {device: disk}}], or take",
        ),
        (
            f"{LOOKUP} k: 1%, device: disk}}}}]}}}}",
            "policies.a.zones[1].top_k.device: sink_recent and top_k on disk is not built in kvcompile 0.1.0.",
        ),
        (
            "policies: {a: {zones: [{all: {device: disk}}], store: int8}}",
            "store int8 on disk is not built in kvcompile 0.1.0.\n  Write store: bfloat16, float16 or float32.",
        ),
        ("policies: {a: {zones: [{all: {device: disk}}], store: {kivi: {bits: 2}}}}", "store kivi on disk is not built"),
        (
            "policies: {full: {zones: [{all: {device: disk}}]}}",
            "policies.full.zones[0].all.device: full is what every compile is proved with: its keys and values stay in memory.\n  Give",
        ),
        (
            "target: {disk: /tmp}",
            "s.yaml:2: target.disk: no policy keeps its keys and values on disk.\n"
            "  Take it out, or write a policy such as flexgen: {zones: [{all: {device: disk}}]}.",
        ),
        (
            "target: {disk: s.yaml}\npolicies: {a: {zones: [{all: {device: disk}}]}}\nheads: [{policy: a}]",
            's.yaml:2: target.disk: "s.yaml" is a file.\n  Name a folder that can be made or written to.',
        ),
        (
            f"target: {{device: cuda}}\n{SINK}, store: int8}}}}",
            "policies.mine.store: store int8 on cuda is not built in kvcompile 0.1.0.\n  Write target.device: cpu.",
        ),
        (f"target: {{device: cuda}}\n{SINK}, store: {{kivi: {{bits: 2}}}}}}}}", "policies.mine.store: store kivi on cuda is not built"),
        (
            f"{SINK}, device: cpu}}}}",
            "policies.mine.device: cpu is the target's device already: it changes nothing.\n  Take it out, or write device: disk.",
        ),
        (
            "output: {directory: x, formats: [artifact]}",
            "s.yaml:2: output.formats[0]: output format artifact is not built in kvcompile 0.1.0.\n  Built: report.",
        ),
        ("output: {directory: x, formats: [onnx]}", "output format onnx is not built"),
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(folder, body, message):
    import kvcompile

    assert message.replace("0.1.0", kvcompile.__version__) in told(f"kvcompile: 1\n{body}\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "policies: {a: {zones: [{top_k: {k: 1%, index: sketch}}]}}",
            "s.yaml:2: policies.a.zones: top_k finds keys between sinks and window, and no zone says which these are.\n  Write it behind",
        ),
        (
            f"policies: {{a: {{zones: [{{static: {{keys: 4}}}}, {SINKS}]}}}}",
            "s.yaml:2: policies.a.zones: sink_recent stands behind static.\n  Write sink_recent first.",
        ),
        (
            f"policies: {{a: {{zones: [{SINKS}, {{static: {{keys: 4}}}}, {{top_k: {{k: 4}}}}]}}}}",
            "s.yaml:2: policies.a.zones: sink_recent and static and top_k share tokens",
        ),
        (f"{LOOKUP} index: flat}}}}]}}}}", "policies.a.zones[1].top_k: k is missing.\n  Write a number of tokens or a percentage: k: 1%."),
        (f"{LOOKUP} k: 0}}}}]}}}}", "policies.a.zones[1].top_k.k: k finds no key."),
        (f"{LOOKUP} k: 0%}}}}]}}}}", "policies.a.zones[1].top_k.k: k finds no key."),
        (f"{LOOKUP} k: 101%}}}}]}}}}", "policies.a.zones[1].top_k.k: k is more than there can be (100%, and"),
        (f"{LOOKUP} k: {10**30}}}}}]}}}}", "policies.a.zones[1].top_k.k: k is more than there can be (100%, and"),
        (
            "target: {device: cuda}\nheads: [{policy: lookup}]",
            "s.yaml:3: heads[0].policy: policy lookup on cuda is not built in kvcompile",
        ),
        (
            f"{LOOKUP} k: 4, index: scetch}}}}]}}}}",
            'policies.a.zones[1].top_k.index: the index "scetch": there is no index scetch.\n  Did you mean "sketch"?',
        ),
        (
            f"{LOOKUP} k: 4, index: {{sketch: {{bytes_per_key: 7}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.sketch.bytes_per_key: bytes_per_key 7 is not allowed: a multiple of 4 from 4 to 256.",
        ),
        (
            f"{LOOKUP} k: 4, index: {{sketch: {{ef: 7}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.sketch.ef: ef is no option of sketch.",
        ),
        (
            f"{LOOKUP} k: 4, index: {{flat: {{ef: 7}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.flat.ef: ef is no option of flat, which has none.",
        ),
        (
            f"{LOOKUP} k: 4, index: flat, tail: true}}}}]}}}}",
            "policies.a.zones[1].top_k.tail: the index flat does not estimate what it has not read.\n  Write tail: false,",
        ),
        (
            f"policies: {{a: {{zones: [{SINKS}, {{top_k: {{k: 4}}}}], positions: cache_index}}}}",
            "policies.a.positions: cache_index moves the sinks next to the window, and top_k shows keys between them.",
        ),
        ("policies: {a: {zones: [{static: {any: 1}}]}}", "policies.a.zones[0].static.keys: is missing"),
        (
            f"{LOOKUP} pages: 4, page_tokens: 16}}}}]}}}}",
            "policies.a.zones[1].top_k.pages: the index flat finds keys, not pages.\n  Write k, or one of the indexes minmax, cuboid,",
        ),
        (
            f"{LOOKUP} k: 9, page_tokens: 16, index: sketch}}}}]}}}}",
            "policies.a.zones[1].top_k.page_tokens: the index sketch finds keys, not pages.",
        ),
        (
            f"{LOOKUP} pages: 4, k: 9, page_tokens: 16, index: minmax}}}}]}}}}",
            "policies.a.zones[1].top_k.k: k counts keys, and the index minmax finds pages.\n  Write for example pages: 4, page_",
        ),
        (f"{LOOKUP} k: 9, index: mean}}}}]}}}}", "policies.a.zones[1].top_k.k: k counts keys, and the index mean finds pages."),
        (f"{LOOKUP} pages: 4, index: mean}}}}]}}}}", "policies.a.zones[1].top_k: page_tokens is missing: how many tokens a page has."),
        (f"{LOOKUP} page_tokens: 4, index: mean}}}}]}}}}", "policies.a.zones[1].top_k: pages is missing: the index mean finds pages."),
        (
            f"{LOOKUP} pages: 4, index: {{mean: {{page_tokens: 4}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.mean.page_tokens: page_tokens stands beside index, not in it.",
        ),
        (
            f"{LOOKUP} pages: 4, page_tokens: 8k, index: minmax}}}}]}}}}",
            "policies.a.zones[1].top_k.page_tokens: page_tokens 8192 is not allowed: a number of tokens from 1 to 4096.",
        ),
        (
            f"{LOOKUP} pages: 4, page_tokens: 16, index: {{cuboid: {{radius: min}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.cuboid.radius: radius 'min' is not allowed: one of mean, max.",
        ),
        (
            f"{LOOKUP} pages: 4, page_tokens: 16, index: {{representatives: {{keys: 17}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.representatives.keys: keys 17 is not allowed: a number of keys from 1 to 16.",
        ),
        (
            f"{LOOKUP} pages: 4, page_tokens: 16, index: {{minmax: {{keys: 17}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.minmax.keys: keys is no option of minmax, which has none.",
        ),
        (
            f"{LOOKUP} pages: 4, page_tokens: 16, select: max, index: minmax}}}}]}}}}",
            "policies.a.zones[1].top_k.select: the index minmax does not guess every logit, which select: max needs.",
        ),
        (
            f"{LOOKUP} k: 4, index: {{ivf: {{lists: 16, probe: 17}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.ivf.probe: probe 17 is not allowed: a number from 1 to 16, how many lists there are.",
        ),
        (
            "policies: {a: {zones: [{clusters: {exact: 1.8%}}]}}",
            "s.yaml:2: policies.a.zones: clusters finds keys between sinks and window, and no zone says which these are.",
        ),
        (
            f"policies: {{a: {{zones: [{SINKS}, {{clusters: {{exact: 0%}}}}]}}}}",
            "policies.a.zones[1].clusters.exact: no cluster is read exactly.\n  Write a percentage: exact: 1.8%.",
        ),
        (
            f"policies: {{a: {{zones: [{SINKS}, {{clusters: {{exact: 40%, estimate: 61%}}}}]}}}}",
            "policies.a.zones[1].clusters: exact and estimate are 101% of the clusters together.",
        ),
        (
            f"policies: {{a: {{zones: [{SINKS}, {{clusters: {{tokens_per_cluster: 2000}}}}]}}}}",
            "policies.a.zones[1].clusters.tokens_per_cluster: tokens_per_cluster 2000 is not allowed: a number of tokens from 1 to 1024.",
        ),
        (
            f"{SAMPLE} hash_bits: 17}}}}}}]}}}}",
            "s.yaml:2: policies.a.zones[1].sample.lsh.hash_bits: hash_bits 17 is not allowed: a whole number from 1 to 16.\n"
            "  Write for example hash_bits: 10.",
        ),
        (f"{SAMPLE} hash_bits: 0}}}}}}]}}}}", "policies.a.zones[1].sample.lsh.hash_bits: 0 is not allowed: a number from 1 to 16."),
        (
            f"{SAMPLE} tables: 1}}}}}}]}}}}",
            "sample.lsh.tables: tables 1 is not allowed: a whole number from 2 to 1024: a key is drawn that the query meets in 2 of them.",
        ),
        (f"{SAMPLE} tables: 1025}}}}}}]}}}}", "sample.lsh.tables: tables 1025 is not allowed: a whole number from 2 to 1024."),
        (f"{SAMPLE} table: 10}}}}}}]}}}}", 's.yaml:2: policies.a.zones[1].sample.lsh.table: the key "table" does not exist here'),
        (f"policies: {{a: {{zones: [{SINKS}, sample]}}}}", "zone kind sample needs its options.\n  Write sample: {lsh: {hash_bits: 10,"),
        ("policies: {a: {zones: [{sample: {lsh: {}}}]}}", "policies.a.zones: sample finds keys between sinks and window, and no zone says"),
        (
            f"policies: {{a: {{zones: [{{sample: {{lsh: {{}}}}}}, {SINKS}]}}}}",
            "s.yaml:2: policies.a.zones: sink_recent stands behind sample.",
        ),
        (
            f"{SAMPLE}}}}}}}], positions: cache_index}}}}",
            "policies.a.positions: cache_index moves the sinks next to the window, and sample shows keys between them.",
        ),
        (
            f"{LOOKUP} k: 4, index: lsh}}}}]}}}}",
            "policies.a.zones[1].top_k.index: the index lsh draws keys by chance, and is not asked for k of them.\n"
            "  Write the zone sample: {lsh: {hash_bits: 10, tables: 150}}.",
        ),
        (
            f"policies: {{a: {{zones: [{SINKS}, {{clusters: {{}}}}], positions: cache_index}}}}",
            "policies.a.positions: cache_index moves the sinks next to the window, and clusters shows keys between them.",
        ),
        (
            f"{LOOKUP} k: 4, index: {{clusters: {{estimate: 23.2%}}}}}}}}]}}}}",
            "zones[1].top_k.index.clusters.estimate: estimate '23.2%' is not allowed: a share from 0 to 1.",
        ),
        (f"{LOOKUP} k: 4, index: {{hnsw: {{centred: 1}}}}}}}}]}}}}", "hnsw.centred: centred 1 is not allowed: true or false."),
        (f"{LOOKUP} k: 4, index: {{clusters: {{size: 9}}}}}}}}]}}}}", "top_k.index.clusters.size: size is no option of clusters."),
        (f"{LOOKUP} k: 4, index: {{ivf: {{lists: 0}}}}}}}}]}}}}", "policies.a.zones[1].top_k.index.ivf.lists: lists 0 is not allowed"),
        (
            f"{LOOKUP} k: 4, index: {{ivf: {{nprobe: 3}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.ivf.nprobe: nprobe is no option of ivf.",
        ),
        (
            f"{LOOKUP} k: 4, index: {{hnsw: {{m: 1}}}}}}}}]}}}}",
            "policies.a.zones[1].top_k.index.hnsw.m: m 1 is not allowed: a number from 2",
        ),
        (f"{LOOKUP} k: 4, index: {{hnsw: {{M: 9}}}}}}}}]}}}}", "top_k.index.hnsw.M: M is no option of hnsw.\n  Write one of m, ef, ef_con"),
    ],
)
def test_zones_that_find_keys_are_checked(folder, body, message):
    assert message in told(f"kvcompile: 1\n{body}\n")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(folder):
    text = """kvcompile: 2
model: {path: model, dtype: fp8}
target: {devise: cpu}
policies:
  broken: {zones: [all], store: int9}
heads:
  - {policy: broken}
  - {policy: strem, share: 75}
  - {policy: full, layers: 7, pattern: gone.yaml, share: 5%}
  - {policy: magicfig}
verify: {tokens: "256"}
output: {directory: s.yaml}
"""
    lines = [line.split(" ")[0] + " " + line.split(" ")[1] for line in told(text).splitlines() if not line.startswith("  ")]
    assert lines == [
        "s.yaml:1: kvcompile:",
        "s.yaml:2: model.dtype:",
        "s.yaml:3: target.devise:",
        "s.yaml:5: policies.broken.store.dtype:",
        "s.yaml:8: heads[1].share:",
        "s.yaml:8: heads[1].policy:",
        "s.yaml:9: heads[2].pattern:",
        "s.yaml:10: heads[3].policy:",
        "s.yaml:11: verify.tokens:",
        "s.yaml:12: output.directory:",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: is not of the form a.b=value.\n  Write for example --set heads[1].share=50%."),
        ("a..b=1", "--set a..b=1: is not of the form a.b=value."),
        ("heads[3].share=5%", "--set heads[3].share=5%: heads[3] does not exist: heads has 1 entries, counted from 0."),
        ("seed[0]=5", "--set seed[0]=5: seed[0] does not exist: seed is not a list."),
        ("seed.x=5", "--set seed.x=5: seed is not a mapping and has no x."),
        ("seed=[1", "--set seed=[1:1: YAML syntax: "),
        ("verify.tokens=1", "--set verify.tokens=1: verify.tokens: 1 is not allowed: a number of tokens from 16"),
        (
            "verify.token=64",
            '--set verify.token=64: verify.token: the key "token" does not exist here (there are tokens).\n  Did you mean "tokens"?',
        ),
        ("heads[0].policy=strem", '--set heads[0].policy=strem: heads[0].policy: policy "strem" does not exist'),
    ],
)
def test_a_wrong_override_is_named(folder, override, message):
    assert message in told("kvcompile: 1\nseed: 3\nheads: [{policy: full}]\n", [override])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("speck.yaml", "speck.yaml: does not exist.\n  Did you mean spec.yaml?"),
        ("none/x.yaml", "none/x.yaml: does not exist.\n  Name a YAML file, or builtin:NAME."),
        ("kvcompile: 1\n" * 999, "kvcompile: 1: does not exist.\n  Name a YAML file"),
        ("empty.yaml", "empty.yaml: is empty.\n  Write keys and values, `kvcompile: 1` first."),
        ("list.yaml", "list.yaml: is not a mapping."),
        ({}, "<spec>: kvcompile: is missing: 1, the version of this schema.\n  Write for example kvcompile: 1."),
        ({"kvcompile": True}, "<spec>: kvcompile: true is not allowed: 1, the version of this schema."),
        ({"kvcompile": 1, 3: 4}, "<spec>: the key 3 is not text."),
        ({"kvcompile": 1, "seed": float("nan")}, "<spec>: seed: nan is not allowed: a whole number from 0."),
        ({"kvcompile": 1, "seed": object}, "<spec>: seed: <class 'object'> is not allowed"),
    ],
)
def test_a_source_that_is_no_spec_is_refused(folder, source, message):
    (folder / "spec.yaml").write_text("kvcompile: 1\n")
    (folder / "empty.yaml").write_text("# nothing\n")
    (folder / "list.yaml").write_text("- 1\n")
    with pytest.raises(SpecError) as caught:
        load_spec(source)
    assert message in str(caught.value)


def test_patterns_whose_windows_differ_need_one_in_the_policy(folder):
    for name, size in (("a", 16), ("b", 64)):
        (folder / name).mkdir()
        (folder / name / "full_attention_heads.tsv").write_text("0\t1\n")
        (folder / name / "config.json").write_text(f'{{"sink_size": {size}, "recent_size": 256}}')
    message = told(
        "kvcompile: 1\npolicies: {mine: {zones: [{sink_recent: {}}]}}\n"
        "heads: [{policy: mine, pattern: a, share: 5%}, {policy: mine, pattern: b, share: 5%}]\n"
    )
    place = "s.yaml:2: policies.mine.zones[0].sink_recent.sink_tokens: is missing and the rules that use the policy differ: "
    assert message == f"{place}heads[0] 16, heads[1] 64.\n  Write for example sink_tokens: 64."


def test_an_unwritable_output_is_told_before_anything_is_compiled(folder, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if mode & os.W_OK else access(path, mode))
    assert 'output.directory: "model" is not writable.' in told("kvcompile: 1\noutput: {directory: model}\n")
    assert 'output.directory: "model/a/b" cannot be made: ' in told("kvcompile: 1\noutput: {directory: model/a/b}\n")


def test_full_cannot_be_given_another_meaning():
    window = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 16}}
    with pytest.raises(SpecError) as caught:
        load_spec({"kvcompile": 1, "policies": {"full": {"zones": [window]}}})
    assert str(caught.value) == (
        "<spec>: policies.full.zones: full is what KV heads without a rule do and what every compile is proved with: its zones are [all].\n"
        "  Give this policy another name."
    )
