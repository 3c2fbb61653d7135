"""`kvcompile compile` from the words to the files, with a tiny model whose tokens are bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kvcompile
from kvcompile.cli import main

MODEL = '''
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class Bytes:
    """One token a byte."""
    chat_template = None
    eos_token_id = None
    def __call__(self, text, **_options):
        return {"input_ids": list(text.encode())}
    def decode(self, ids, **_options):
        return bytes(int(token) % 128 for token in ids).decode("ascii")

def build():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config), Bytes()
'''
SPEC = """kvcompile: 1
model: {path: "python:kvc_tiny_bytes:build"}
policies:
  near: {zones: [{sink_recent: {sink_tokens: 4, recent_tokens: 12}}]}
heads:
  - {policy: near, layers: 0, kv_heads: 1}
verify: {tokens: 32}
target: {segments: eager}
"""
PATTERN = """kvcompile_pattern: 1
model: tiny
method: none
layers: 2
kv_heads: 2
scores:
  - [0.5, 0.5]
  - [0.5, 0.5]
"""


@pytest.fixture(autouse=True)
def spec(tmp_path: Path, own_cache: Path) -> Path:
    (tmp_path / "kvc_tiny_bytes.py").write_text(MODEL)
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def answer_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code, out, err = answer(capsys, *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_spec_alone_prints_the_plan_and_what_was_proved(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, out, err = answer(capsys, spec, "--contexts", "1k")
    assert code == 0
    assert "0       1 full, 1 near (sink 4 + recent 12)" in out
    assert "1       2 full" in out
    assert "full against the original" in out
    assert all(line.startswith("kvcompile: ") for line in err.splitlines())


def test_json_is_one_object_with_plan_verification_and_text(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    found = answer_json(capsys, spec, "--prompt", "Hello", "--max-new-tokens", "5")
    assert sorted(found) == ["generations", "model", "plan", "spec", "timings", "verification", "warnings"]
    [made] = found["generations"]
    assert (made["prompt_tokens"], made["new_tokens"], len(made["text"])) == (5, 5, 5)
    assert [len(site["groups"]) for site in found["plan"]["sites"]] == [2, 1]
    assert found["verification"]


@pytest.mark.slow
def test_quiet_prints_the_generated_text_only(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    expected = answer_json(capsys, spec, "--prompt", "Hello", "--max-new-tokens", "5")["generations"][0]["text"]
    assert answer(capsys, spec, "--prompt", "Hello", "--max-new-tokens", "5", "-q") == (0, expected + "\n", "")


@pytest.mark.slow
def test_each_line_of_jsonl_is_continued(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text('"one"\n{"prompt": "three"}\n')
    found = answer_json(capsys, spec, "--prompt-file", tmp_path / "many.jsonl", "--prompt", "!", "--max-new-tokens", "2")
    assert [made["prompt_tokens"] for made in found["generations"]] == [4, 6]


@pytest.mark.slow
def test_the_seed_decides_what_is_sampled(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    def sampled(seed: int) -> str:
        found = answer_json(capsys, spec, "--prompt", "Hello", "--temperature", "1", "--seed", seed, "--max-new-tokens", "16")
        return str(found["generations"][0]["text"])

    assert sampled(1) == sampled(1) != sampled(2)


def test_chat_without_a_template_is_refused(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, _, err = answer(capsys, spec, "--prompt", "Hello", "--chat")
    assert code == 1
    assert "--chat: this model has no chat template." in err


@pytest.mark.slow
def test_a_folder_gets_the_report(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    found = answer_json(capsys, spec, "-o", tmp_path / "out")
    assert found["report"] == [str(tmp_path / "out" / name) for name in ("report.json", "report.txt")]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["plan"] == found["plan"]
    assert "full against the original" in (tmp_path / "out" / "report.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_format_that_is_not_built_is_refused_by_name(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    code, _, err = answer(capsys, spec, "-o", tmp_path / "out", "--formats", "report,onnx")
    assert code == 1
    assert "onnx" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_plan_alone_is_the_same_plan(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    _, shown, _ = answer(capsys, spec, "--show", "plan", "--contexts", "1k,2k")
    assert answer(capsys, "plan", spec, "--contexts", "1k,2k")[1] == shown
    assert "2K stored" in shown
    assert answer_json(capsys, "plan", spec)["plan"] == answer_json(capsys, spec, "--show", "plan")["plan"]


@pytest.mark.slow
def test_show_graph_source_and_timing(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    assert "attend" in answer(capsys, spec, "--show", "graph", "--stop-after", "request_kernels")[1]
    source = answer(capsys, spec, "--show", "source")[1]
    kernels, _, segments = source.partition("# segment_0\n")
    assert kernels.startswith("// attend_spans_")
    assert kernels.count('#include "rows.h"') == 3  # two policies, and the linear layers
    compile(segments, "source", "exec")
    assert "def " in segments
    timing = answer(capsys, spec, "--show", "timing")[1]
    assert timing.splitlines()[0].split() == ["stage", "seconds"]
    assert "trace" in timing


def test_stop_after_dumps_numbered_files(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    found = answer_json(capsys, spec, "--stop-after", "canonicalise_attention", "--dump", tmp_path / "dump")
    assert found["stop_after"] == "canonicalise_attention"
    assert found["plan"] is None
    names = sorted(path.name for path in (tmp_path / "dump").glob("*.txt"))
    assert names == ["00-trace.txt", "01-canonicalise_attention.txt"]
    code, _, err = answer(capsys, spec, "--stop-after", "canonicalize")
    assert code == 1
    assert "there is no pass 'canonicalize'" in err


def test_a_prompt_cannot_go_with_an_early_stop(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, _, err = answer(capsys, spec, "--stop-after", "trace", "--prompt", "Hello")
    assert (code, err) == (1, "--stop-after: nothing is generated: the compile ends before there is a model.\n  Take the prompt out.\n")


@pytest.mark.parametrize("words", [("--show", "graph"), ("--show", "source"), ("--stop-after", "trace")])
def test_a_folder_for_a_report_cannot_go_with_an_early_stop(
    capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path, words: tuple[str, str]
) -> None:
    option = words[0] if words[0] == "--stop-after" else " ".join(words)
    code, _, err = answer(capsys, spec, *words, "-o", tmp_path / "out")
    what = f"{option}: nothing is written to {tmp_path / 'out'}: the compile ends before there is a report."
    assert (code, err) == (1, f"{what}\n  Take -o out, or write the graphs with --dump.\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_the_spec_names_is_told_to_stay_empty_by_an_early_stop(
    capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path
) -> None:
    spec.write_text(f"{SPEC}output: {{directory: {tmp_path / 'out'}}}\n")
    code, _, err = answer(capsys, spec, "--stop-after", "trace")
    assert code == 0
    assert f"--stop-after: nothing is written to {tmp_path / 'out'}: the compile ends before there is a report.\n" in err


def test_a_plan_dumps_its_passes_and_tells_their_warnings(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    """Trap 7: heads of equal score."""
    (tmp_path / "p.yaml").write_text(PATTERN)
    spec.write_text(SPEC.replace("layers: 0, kv_heads: 1", "pattern: p.yaml, share: 50%"))
    code, _, err = answer(capsys, spec, "--show", "plan", "--dump", tmp_path / "dump")
    assert code == 0
    assert list((tmp_path / "dump").glob("*-request_kernels.txt"))
    told = [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1
    assert told[0].startswith(f"{spec}:6: heads[0]: ")
    assert f"warning: {told[0]}\n" in answer(capsys, "plan", spec)[2]
    assert answer_json(capsys, "plan", spec)["warnings"] == told


# --- sessions ----------------------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_once_and_asked_again(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.session"
    whole = answer_json(capsys, spec, "--prompt", "A long book. Who?", "--max-new-tokens", "6")["generations"][0]
    saved = answer_json(capsys, spec, "--prompt", "A long book.", "--max-new-tokens", "0", "--save-session", book)["generations"][0]
    assert (saved["text"], saved["new_tokens"], saved["saved_session"]["tokens"]) == ("", 0, 12)
    assert saved["saved_session"]["file_bytes"] == book.stat().st_size
    for _ in range(2):
        asked = answer_json(capsys, spec, "--session", book, "--prompt", " Who?", "--max-new-tokens", "6")
        assert asked["session"]["tokens"] == 12 and asked["session"]["shared_bytes"] > 0
        assert (asked["generations"][0]["text"], asked["generations"][0]["prompt_tokens"]) == (whole["text"], 5)


@pytest.mark.slow
def test_a_conversation_is_saved_with_its_answers(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk.session"
    first = answer_json(capsys, spec, "--prompt", "Hello", "--max-new-tokens", "6", "--save-session", talk)["generations"][0]
    code, out, err = answer(capsys, spec, "--session", talk, "--prompt", " and?", "--max-new-tokens", "6", "--save-session", talk, "-q")
    assert code == 0, err
    model = kvcompile.compile(spec)
    session = model.session()
    texts = [model.generate(prompt, max_new_tokens=6, session=session) for prompt in ("Hello", " and?")]
    assert [first["text"], out] == [texts[0], texts[1] + "\n"]
    kept = answer_json(capsys, "inspect", talk)
    assert (kept["holds"], kept["facts"]["tokens"]) == ("session", 5 + 6 + 5 + 6)
    (tmp_path / "many.jsonl").write_text('"one"\n"two"\n')
    asked = answer_json(capsys, spec, "--session", talk, "--prompt-file", tmp_path / "many.jsonl", "--max-new-tokens", "3")
    assert [made["prompt_tokens"] for made in asked["generations"]] == [3, 3]  # each behind a fork of the file's session


def test_inspect_tells_what_a_session_file_holds(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.session"
    answer_json(capsys, spec, "--prompt", "A long book.", "--max-new-tokens", "0", "--save-session", book)
    code, out, _ = answer(capsys, "inspect", book)
    assert code == 0
    assert out.startswith(f"{book}: session, format 2, written by kvcompile ")
    assert "tokens: 12\n" in out and "every checksum is right" in out
    assert [line.split()[:3] for line in out.splitlines()[-3:]] == [["1", "1", "growable"], ["1", "1", "ring"], ["1", "2", "growable"]]
    book.write_bytes(book.read_bytes()[:-1])
    code, _, err = answer(capsys, "inspect", book)
    assert code == 1 and "is damaged: it is cut off" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--session", "x"], "--session and --save-session need a --prompt or a --prompt-file."),
        (["--save-session", "x"], "--session and --save-session need a --prompt or a --prompt-file."),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0 reads the prompt only: say where to with --save-session."),
        (["--prompt", "x", "--session", "missing"], "missing: cannot be read: No such file or directory."),
        (["--prompt", "x", "--save-session", "."], ".: is a folder."),
        (["--prompt", "x", "--save-session", "missing/x"], "missing/x: cannot be written: No such file or directory."),
        (["--prompt-file", "many.jsonl", "--save-session", "x"], "--save-session: there are 2 prompts, each with a session of its own."),
    ],
)
def test_what_cannot_be_saved_or_continued_is_said_before_the_compile(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(**given: Any) -> None:
        raise AssertionError("compiled first")

    monkeypatch.setattr("kvcompile.compiler.compile", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many.jsonl").write_text('"one"\n"two"\n')
    code, _, err = answer(capsys, spec, *words)
    assert code != 0 and told in " ".join(err.replace("│", " ").split())


# --- prefixes ----------------------------------------------------------------------------------------------------------------------------


SHARED = "prefix: {shared: [{name: rules, text: 'One rule. ', after: system}, {name: system, file: system.txt, default: true}]}\n"


@pytest.fixture
def shared_spec(spec: Path) -> Path:
    (spec.parent / "system.txt").write_text("Be brief. ")
    spec.write_text(SPEC + SHARED)
    return spec


def test_prompts_of_a_file_start_behind_a_prefix_that_is_read_once(
    capsys: pytest.CaptureFixture[str], shared_spec: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text('"one"\n{"prompt": "three"}\n"four!"\n')
    words = (shared_spec, "--prompt-file", many, "--max-new-tokens", "4")
    found = answer_json(capsys, *words, "--prefix", "rules")
    told = found["prefix"]
    assert (told["name"], told["tokens_read_once"], told["prompts"], told["tokens_saved"]) == ("rules", 20, 3, 40)
    assert told["shared_bytes"] == 3 * 20 * 2 * 8 * 4  # of four KV heads one keeps a ring, which is copied; float32
    assert [made["prompt_tokens"] for made in found["generations"]] == [3, 5, 5]
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(json.dumps(f"Be brief. One rule. {each}") + "\n" for each in ("one", "three", "four!")))
    apart = answer_json(capsys, shared_spec, "--prompt-file", whole, "--max-new-tokens", "4", "--prefix", "none")
    assert "prefix" not in apart
    assert [made["text"] for made in found["generations"]] == [made["text"] for made in apart["generations"]]
    code, _, err = answer(capsys, *words)
    assert code == 0
    assert "kvcompile: reading prefix system: 10 tokens\n" in err
    assert "prefix system: 10 tokens read once in " in err
    assert "1.9 KiB that all sessions read where they lie; 3 prompts started behind it, 20 tokens were not read again\n" in err


def test_progress_is_shown_while_a_long_prefix_is_read(capsys: pytest.CaptureFixture[str], shared_spec: Path) -> None:
    words = (shared_spec, "--prompt", "x", "--max-new-tokens", "1", "--set", "prefill.chunk_tokens=4", "--prefix", "rules")
    _, _, err = answer(capsys, *words)
    read = [line for line in err.splitlines() if line.startswith("kvcompile: reading prefix rules: ")]
    assert [line.split(": ")[2] for line in read] == ["20 tokens", *(f"{count} of 20 tokens" for count in (4, 8, 10, 14, 18))]
    assert "1 prompt started behind it, 0 tokens were not read again" in err


def test_a_prefix_is_saved_with_the_session_that_stands_behind_it(
    capsys: pytest.CaptureFixture[str], shared_spec: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book.session"
    words = ("--prompt", "A book.", "--max-new-tokens", "0", "--save-session", book)
    assert answer_json(capsys, shared_spec, *words)["generations"][0]["saved_session"]["tokens"] == 17
    whole = answer_json(capsys, shared_spec, "--prompt", "A book. Who?", "--max-new-tokens", "6")["generations"][0]["text"]
    asked = answer_json(capsys, shared_spec, "--session", book, "--prompt", " Who?", "--max-new-tokens", "6")
    assert asked["generations"][0]["text"] == whole and "prefix" not in asked


def test_the_plan_names_the_prefixes(capsys: pytest.CaptureFixture[str], shared_spec: Path) -> None:
    code, out, err = answer(capsys, "plan", shared_spec, "--contexts", "1k")
    assert code == 0, err
    assert "prefix system (the default): 10 tokens, read once, 2.5 KiB for all sessions\n" in out
    assert "prefix rules (after system): 10 tokens behind 10, read once, " in out
    assert out.endswith(
        "KV heads, those that keep all their past: measured on the machine when several sessions first step together (model.relay.reason)\n"
    )
    assert out == answer(capsys, shared_spec, "--show", "plan", "--contexts", "1k")[1]
    set_off = answer(capsys, shared_spec, "--show", "plan", "--set", "prefix.relay=off")[1]
    assert set_off.endswith("\nrelay off: the spec says so\n")
    assert [each["name"] for each in answer_json(capsys, "plan", shared_spec)["plan"]["prefix"]["shared"]] == ["system", "rules"]


@pytest.mark.parametrize(
    ("section", "words", "told"),
    [
        (SHARED, ["--prefix", "rules"], "--prefix needs a --prompt or a --prompt-file."),
        (SHARED, ["--prompt", "x", "--prefix", "rule"], "--prefix rule: the spec declares no prefix of this name (there are system, "),
        (SHARED, ["--prompt", "x", "--prefix", "rule"], "Did you mean rules?"),
        (SHARED, ["--prompt", "x", "--prefix", "zz"], "Name one of them, or none."),
        ("", ["--prompt", "x", "--prefix", "rules"], "--prefix rules: the spec declares no prefix. Take it out."),
        (
            SHARED.replace(", default: true", ""),
            ["--prompt", "x"],
            "--prefix: the spec declares 2 prefixes, system, rules, and none is the default. Write --prefix system, or --prefix none.",
        ),
        (SHARED, ["--prompt", "x", "--session", "kept", "--prefix", "none"], "--prefix: what the session file holds has a past of its own"),
        (SHARED.replace("system.txt", "sistem.txt"), ["--prompt", "x"], "sistem.txt cannot be read: No such file or directory."),
    ],
)
def test_a_prefix_that_cannot_be_is_said_before_the_compile(
    section: str,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    shared_spec: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(**given: Any) -> None:
        raise AssertionError("compiled first")

    monkeypatch.setattr("kvcompile.compiler.compile", never)
    monkeypatch.setattr("kvcompile.cli.compiling._check_session_files", lambda job: None)
    shared_spec.write_text(SPEC + section)
    code, _, err = answer(capsys, shared_spec, *words)
    assert code != 0 and told in " ".join(err.replace("│", " ").split())
