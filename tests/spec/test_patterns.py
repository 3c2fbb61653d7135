import json

import pytest

from kvcompile.ir.errors import SpecError
from kvcompile.models.header import ModelHeader
from kvcompile.spec.patterns import check_pattern, read_pattern, write_pattern

OURS = "kvcompile_pattern: 1\nmodel: toy\nlayers: 2\nkv_heads: 2\n"


def duo(folder, rows, sizes=(64, 256)):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "full_attention_heads.tsv").write_text(rows)
    (folder / "config.json").write_text(json.dumps({"sink_size": sizes[0], "recent_size": sizes[1]}))
    return folder


def test_a_written_pattern_reads_back(tmp_path):
    file = tmp_path / "sub" / "p.yaml"
    write_pattern(file, model="toy", scores=[[0.5, 1e-5], [1, 0]], model_hash="abc", method="needle", seed=3)
    pattern = read_pattern(file)
    assert pattern.scores == ((0.5, 1e-5), (1.0, 0.0))
    assert (pattern.method, pattern.seed, pattern.model_hash) == ("needle", 3, "abc")
    assert (pattern.sink_tokens, pattern.recent_tokens) == (None, None)
    assert [path.name for path in file.parent.iterdir()] == ["p.yaml"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("old")
    with pytest.raises(TypeError):
        write_pattern(file, model="toy", scores=[[None]])
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p.yaml"]


@pytest.mark.parametrize("sub", ["", "lr=0.02"])
def test_a_duo_attention_folder_is_read_clipped_and_brings_its_window(tmp_path, sub):
    duo(tmp_path / "m" / sub, "-1.4e-3\t1.0\n0.25\t1.004\n")
    pattern = read_pattern(tmp_path / "m")
    assert pattern.scores == ((0.0, 1.0), (0.25, 1.0))
    assert (pattern.sink_tokens, pattern.recent_tokens, pattern.method) == (64, 256, "duo_attention")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("scores: [[0, 1]]", "p.yaml:5: scores: 1 row for 2 layers.\n  Write one row for each layer."),
        ("scores:\n - [0, 1]\n - [0]", "p.yaml:7: scores[1]: 1 value for 2 KV heads.\n  Write one number for each KV head."),
        ("scores:\n - [0, 1]\n - [0, .nan]", "p.yaml:7: scores[1][1]: the score is nan, not a finite number."),
        ("scores: [[0, 1], [0, -.inf]]", "the score is -inf, not a finite number."),
        ("scores: [[0, 1], [0, 1.2]]", "the score 1.2 is outside of 0 to 1 by more than 0.01."),
        ("scores: [[0, 1], [-0.02, 1]]", "the score -0.02 is outside of 0 to 1 by more than 0.01."),
        ("scores: [[0, 1], [x, true]]", "'x' is not a number."),
        ("scores: 3", "p.yaml:5: scores: 3 is not allowed: a list of lists of numbers."),
        ("score: [[0, 1], [0, 1]]", "p.yaml: scores is missing."),
        ("scores: [[0, 1], [0, 1]]\nseed: '3'", "p.yaml:6: seed: '3' is not allowed: a whole number."),
        ("scores: [[0, 1], [0, 1]]\nsinks: 3", 'p.yaml:6: sinks: the key "sinks" does not exist here'),
    ],
)
def test_a_wrong_pattern_is_refused_with_its_line(tmp_path, scores, message):
    file = tmp_path / "p.yaml"
    file.write_text(f"{OURS}{scores}\n")
    with pytest.raises(SpecError) as caught:
        read_pattern(file)
    assert message in str(caught.value)


def test_wrong_duo_attention_folders_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"a DuoAttention pattern has a full_attention_heads.tsv; it is not there."):
        read_pattern(tmp_path)
    with pytest.raises(SpecError, match=r"full_attention_heads.tsv:2: scores\[1\]: 1 value for 2 KV heads"):
        read_pattern(duo(tmp_path / "ragged", "0\t1\n1\n"))
    with pytest.raises(SpecError, match="the score is nan"):
        read_pattern(duo(tmp_path / "nan", "0\tnan\n"))
    with pytest.raises(SpecError, match="0 rows for 0 layers"):
        read_pattern(duo(tmp_path / "empty", ""))
    with pytest.raises(SpecError, match=r"config.json: recent_size: 0 is not allowed: a number of tokens from 1."):
        read_pattern(duo(tmp_path / "size", "0\t1\n", (0, 0)))
    with pytest.raises(SpecError, match=r"is the table of a DuoAttention pattern.\n  Name its folder"):
        read_pattern(duo(tmp_path / "t", "0\t1\n") / "full_attention_heads.tsv")


def test_a_pattern_of_another_model_is_named(tmp_path):
    file = tmp_path / "p.yaml"
    write_pattern(file, model="toy", scores=[[0, 1], [0, 1]], model_hash="aaaa")
    pattern = read_pattern(file)
    fits = ModelHeader("m", "gguf", layers=2, kv_heads=(2, 2), hash="aaaa")
    assert not list(check_pattern(pattern, fits, "w"))
    assert not list(check_pattern(pattern, None, "w"))
    (wrong,) = check_pattern(pattern, ModelHeader("m", "gguf", layers=2, kv_heads=(2, 2), hash="bbbb"), "w")
    assert "is for the wrong model: its model_hash is aaaa, the model's is bbbb." in wrong.what
    (layers,) = check_pattern(pattern, ModelHeader("m", "gguf", layers=3, kv_heads=(2, 2, 2)), "w")
    assert "has 2 layers, the model has 3: it was made for another model than m." in layers.what
    (heads,) = check_pattern(pattern, ModelHeader("m", "gguf", layers=2, kv_heads=(2, 4)), "w")
    assert "has 2 KV heads in layers.1, the model has 4" in heads.what
