"""The command line: dispatch, exit codes, messages, JSON, and what it must not import."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kvcompile
from kvcompile.cli import main, with_command
from kvcompile.ir.errors import KvcompileError

SPEC = """kvcompile: 1
policies:
  mine:
    zones: [{sink_recent: {sink_tokens: 4, recent_tokens: 8}}]
heads:
  - {policy: mine, layers: 0}
"""
COMMANDS = ["cache", "compile", "env", "init", "inspect", "passes", "plan", "recall", "schema", "specs", "sweep", "validate"]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(tmp_path / "cache"))


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, "--help")
    assert (code, err) == (0, "")
    assert [name for name in COMMANDS if f"  {name} " not in out] == []


def test_no_words_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys)[1] == answer(capsys, "-h")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = answer(capsys, command, "--help")
    assert code == 0
    assert f"kvcompile {command}" in out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--version") == (0, f"kvcompile {kvcompile.__version__}\n", "")


def test_a_first_word_that_is_no_command_is_a_spec(spec: Path) -> None:
    assert with_command([str(spec)], COMMANDS) == ["compile", str(spec)]
    assert with_command(["no-such.yaml", "-q"], COMMANDS) == ["compile", "no-such.yaml", "-q"]
    assert with_command(["builtin:duo"], COMMANDS) == ["compile", "builtin:duo"]
    assert with_command(["--show", "plan", str(spec)], COMMANDS) == ["compile", "--show", "plan", str(spec)]
    assert with_command(["plan", str(spec)], COMMANDS) == ["plan", str(spec)]


def test_a_command_wins_over_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan").write_text(SPEC)
    assert with_command(["plan"], COMMANDS) == ["plan"]
    with pytest.raises(KvcompileError, match="Did you mean plan"):
        with_command(["plann"], COMMANDS)


def test_a_typo_gets_the_nearest_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "vaildate", "x.yaml") == (2, "", "vaildate: no such file or command.\n  Did you mean validate?\n")


def test_a_word_near_to_nothing_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = answer(capsys, "qqqq")
    assert code == 2
    assert f"or a command: {', '.join(COMMANDS)}." in err


def test_a_missing_spec_is_an_error_without_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = answer(capsys, tmp_path / "nothing.yaml")
    assert (code, out) == (1, "")
    assert "nothing.yaml: does not exist" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ["validate"],
        ["validate", "a.yaml", "b.yaml"],
        ["compile", "a.yaml", "--no-such-option"],
        ["compile", "a.yaml", "--show", "nothing"],
        ["compile", "a.yaml", "--contexts", "8q"],
        ["compile", "a.yaml", "--contexts", "0"],
        ["compile", "a.yaml", "--max-new-tokens", "0", "--prompt", "x"],
        ["compile", "a.yaml", "--temperature", "-1", "--prompt", "x"],
        ["compile", "a.yaml", "--chat"],
        ["compile", "a.yaml", "--max-new-tokens", "3"],
    ],
)
def test_a_wrong_command_line_exits_with_2_and_points_to_the_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, out, err = answer(capsys, *words)
    assert (code, out) == (2, "")
    assert err.endswith(f"\n  See kvcompile {words[0]} --help.\n")


@pytest.mark.parametrize(
    ("words", "code"), [(["vaildate", "--json"], 2), (["validate", "--json"], 2), (["validate", "no.yaml", "--json"], 1)]
)
def test_errors_are_one_json_object_with_json(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> None:
    got, out, err = answer(capsys, *words)
    assert (got, err) == (code, "")
    [error] = json.loads(out)["errors"]
    assert sorted(error) == ["mend", "what", "where"]
    assert error["what"]


def test_validate_says_ok(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, out, err = answer(capsys, "validate", spec)
    assert (code, err) == (0, "")
    assert out.startswith(f"{spec}: ok (policies ")
    assert "mine" in out


def test_validate_tells_every_mistake(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    spec.write_text(SPEC.replace("sink_tokens", "sink_tokns").replace("layers: 0", "layers: x"))
    code, out, _ = answer(capsys, "validate", spec, "--json")
    assert code == 1
    assert len(json.loads(out)["errors"]) >= 2


def test_set_wins_over_the_file(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, _, err = answer(capsys, "validate", spec, "--set", "heads[0].policy=nothing")
    assert code == 1
    assert "nothing" in err
    assert answer(capsys, "validate", spec, "--set", "heads[0].policy=full", "--set", "seed=3")[0] == 0


def test_validate_json_is_one_object(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    found = json.loads(answer(capsys, "validate", spec, "--json")[1])
    assert found["ok"] is True
    assert found["errors"] == []
    assert found["spec"] == str(spec)


def test_schema_is_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, "schema")[1])
    assert {"model", "policies", "heads"} <= set(found["properties"])


def test_specs_lists_every_bundled_spec(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = sorted(path.stem for path in (Path(__file__).parents[2] / "specs").glob("*.yaml"))
    found = json.loads(answer(capsys, "specs", "--json")[1])["specs"]
    assert [each["name"] for each in found] == [f"builtin:{name}" for name in shipped]
    assert all(each["about"] for each in found)
    code, out, _ = answer(capsys, "specs")
    assert code == 0
    assert all(f"builtin:{name}" in out for name in shipped)


def test_cache_shows_and_clears(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from kvcompile.models import cache

    with cache.use("entry-1", lambda folder: (folder / "x").write_bytes(b"1" * 5000), what="it"):
        pass
    code, out, _ = answer(capsys, "cache")
    assert code == 0
    assert "entry-1" in out
    assert str(tmp_path / "cache") in out
    [entry] = json.loads(answer(capsys, "cache", "--json")[1])["entries"]
    assert entry["key"] == "entry-1"
    assert entry["kind"] == "models"
    assert entry["bytes"] > 5000
    assert json.loads(answer(capsys, "cache", "--clear", "--json")[1])["entries"] == []
    assert cache.entries() == []


def test_init_writes_a_spec_that_validates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32})
    )
    target = tmp_path / "my.yaml"
    code, out, _ = answer(capsys, "init", folder, "-o", target)
    assert (code, out) == (0, f"wrote {target}; check it: kvcompile validate {target}\n")
    assert answer(capsys, "validate", target)[0] == 0
    code, _, err = answer(capsys, "init", folder, "-o", target)
    assert (code, err) == (1, f"{target}: it exists.\n  Name another file, or add --force.\n")
    assert answer(capsys, "init", folder, "-o", target, "--force")[0] == 0
    assert answer(capsys, "init", folder, "-o", tmp_path / "no" / "my.yaml")[0] == 1
    assert list(tmp_path.glob(".my*")) == []
    assert target.read_text().startswith(answer(capsys, "init", folder)[1][:40])


def test_init_of_a_missing_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = answer(capsys, "init", "./nothing.gguf")
    assert code == 1
    assert "./nothing.gguf: does not exist" in err


def test_env_tells_versions_machine_and_cache(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = json.loads(answer(capsys, "env", "--json")[1])
    assert found["kvcompile"] == kvcompile.__version__
    assert found["cores"] >= 1
    assert {"python", "torch", "transformers", "triton", "cpu", "cpu flags", "threads", "memory", "compiler", "cache"} <= set(found)


def test_passes_are_listed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    from kvcompile.pipeline import PASSES

    found = json.loads(answer(capsys, "passes", "--json")[1])["passes"]
    assert [each["name"] for each in found] == [each.name for each in PASSES]
    assert all(each["does"] for each in found)


def test_a_spec_without_a_model_cannot_be_compiled_here(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, _, err = answer(capsys, spec)
    assert code == 1
    assert "model" in err


@pytest.mark.parametrize(
    "words", [["--help"], ["validate", "SPEC"], ["schema"], ["specs"], ["vaildate"], ["cache"], ["init", "python:a:b"]]
)
def test_quick_commands_import_neither_torch_nor_transformers(words: list[str], spec: Path) -> None:
    words = [str(spec) if word == "SPEC" else word for word in words]
    script = (
        "import sys\nfrom kvcompile.cli import main\n"
        f"main({words!r})\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'networkx') if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-1] == "[]", ran.stderr


def test_ctrl_c_is_one_line_and_130(spec: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompt")  # reading it waits for a writer that never comes
    # a shell starts what it puts in the background, and so perhaps this test, with SIGINT ignored
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = f"{heard}import sys\nfrom kvcompile.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, str(spec), "--prompt-file", str(tmp_path / "prompt")]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer = None
    for _ in range(200):  # it is reading once the other end can be opened without waiting
        try:
            writer = os.open(tmp_path / "prompt", os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            time.sleep(0.05)
    assert writer is not None
    started.send_signal(signal.SIGINT)
    try:
        out, err = started.communicate(timeout=30)
    except subprocess.TimeoutExpired:  # it came between Python's last look for one and read(2), which does not return: press again
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=30)
    os.close(writer)
    assert (started.returncode, out, err) == (130, "", "kvcompile: interrupted\n")


def test_a_missing_package_of_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: Path) -> None:
    monkeypatch.setitem(sys.modules, "kvcompile.spec.resolve", None)
    with pytest.raises(ModuleNotFoundError):  # not of the extra: a mistake of ours keeps its traceback
        main(["validate", str(spec)])
    monkeypatch.delitem(sys.modules, "kvcompile.spec.resolve")

    def missing(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr("kvcompile.spec.load_spec", missing)
    assert answer(capsys, "validate", spec) == (1, "", "the package pydantic is missing.\n  pip install 'kvcompile[compile]'\n")


def test_stdin_is_a_prompt_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.cli.prompts import read_prompts

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode())))
    assert read_prompts("?", "-") == ["Grüße?"]
