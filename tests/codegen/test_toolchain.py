"""Which compiler is found, why there is none, and how it is run."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from kvcompile.codegen import toolchain
from kvcompile.codegen.toolchain import BASE_FLAGS, find_toolchain, first_error, isa_flags, machine_isa, run_compiler, why_none
from kvcompile.ir.errors import TargetError


def script(place: Path, text: str) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(f"#!/bin/sh\n{text}\n")
    place.chmod(0o755)
    return place


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> toolchain.Toolchain:
    monkeypatch.delenv("CXX", raising=False)
    found = find_toolchain()
    if found is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    return found


def test_the_compiler_on_the_path_is_found(compiler: toolchain.Toolchain) -> None:
    assert Path(compiler.command).is_absolute()
    assert compiler.version and "\n" not in compiler.version
    assert compiler.kind in ("gcc", "clang")
    assert why_none() == ""


def test_it_is_looked_for_once(compiler: toolchain.Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "run_compiler", None)
    assert find_toolchain() is compiler


def test_without_a_path_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert find_toolchain() is None
    assert why_none() == "none of g++, clang++, c++ is on PATH, and CXX is not set"


def test_a_compiler_without_headers_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'case "$1" in --version) echo "g++ (Half) 12.0";; *) echo "probe.cpp:1:10: fatal error: cmath: No such file" >&2; exit 1;; esac'
    command = script(tmp_path / "g++", text)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_toolchain() is None
    assert why_none() == f"{command} cannot compile an empty program: probe.cpp:1:10: fatal error: cmath: No such file"


def test_a_compiler_that_writes_nothing_or_only_fails_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    one, two = script(tmp_path / "g++", "exit 0"), script(tmp_path / "c++", "exit 3")
    assert find_toolchain() is None
    assert why_none() == f"{one} cannot compile an empty program: it wrote no file; {two} --version exit status 3"


def test_the_next_compiler_is_taken_where_the_first_is_broken(
    compiler: toolchain.Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "g++", "exit 1")
    second = script(tmp_path / "clang++", f'exec {compiler.command} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")  # gcc looks for the assembler there
    found = find_toolchain()
    assert found is not None and found.command == str(second)


def test_cxx_comes_first_and_may_hold_options(compiler: toolchain.Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = script(tmp_path / "my-c++", f'test "$1" = -DMINE || exit 7; exec {compiler.command} "$@"')
    monkeypatch.setenv("CXX", f"{mine} -DMINE")
    found = find_toolchain()
    assert found == toolchain.Toolchain(str(mine), compiler.version, compiler.kind, ("-DMINE",))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nonsense-c++", "nonsense-c++ is not on PATH"),
        ("/no/such/c++", "/no/such/c++ is not found"),
        ("'g++", "no closing quotation"),
    ],
)
def test_a_cxx_that_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch, given: str, why: str) -> None:
    monkeypatch.setenv("CXX", given)
    expected = f"CXX: {given!r} does not work: {why}.\n  Name a C++17 compiler, or unset CXX to have one looked for."
    for ask in (find_toolchain, why_none):
        with pytest.raises(TargetError, match=f"^{re.escape(expected)}$"):
            ask()


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("fma f16c avx2 avx512f avx512bw avx512vl avx512dq amx_bf16", "avx512"),
        ("fma f16c avx2 avx512f avx512bw avx512vl", "avx2"),
        ("fma avx2", "portable"),
        ("asimd fp bf16", "portable"),
        ("", "portable"),
    ],
)
def test_the_isa_is_the_widest_whose_flags_are_all_there(monkeypatch: pytest.MonkeyPatch, flags: str, isa: str) -> None:
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: frozenset(flags.split()))
    assert machine_isa() == isa


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_the_compiler_takes_the_flags_and_they_switch_the_isa_on(compiler: toolchain.Toolchain, tmp_path: Path, isa: toolchain.Isa) -> None:
    """Compiled only, not run: this machine may lack the instructions."""
    if isa != "portable" and machine_isa() == "portable":
        pytest.skip("x86 flags on a machine that has none of them")
    wanted = {
        "avx512": ("__AVX512BW__", "__AVX512VL__", "__AVX512DQ__", "__F16C__", "__FMA__"),
        "avx2": ("__AVX2__", "__FMA__", "__F16C__"),
    }
    lines = [f"#ifndef {name}\n#error {name}\n#endif" for name in wanted.get(isa, ())]
    (tmp_path / "a.cpp").write_text("\n".join([*lines, "int one() { return 1; }\n"]))
    ran = run_compiler((compiler.command, *BASE_FLAGS, *isa_flags(isa), "-Werror", "-o", "a.so", "a.cpp"), tmp_path, 60)
    assert ran == toolchain.Ran(0, "")


def test_instructions_for_whole_numbers_are_switched_on_where_the_machine_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: frozenset({"avx512_vnni"}))
    assert "-mavx512vnni" in isa_flags("avx512") and "-mavx512vnni" not in isa_flags("avx2")
    monkeypatch.setattr(toolchain, "cpu_flags", frozenset)
    assert "-mavx512vnni" not in isa_flags("avx512")


def test_nothing_is_compiled_for_this_machine_alone_or_with_fast_math() -> None:
    flags = {flag for isa in ("avx512", "avx2", "portable") for flag in (*BASE_FLAGS, *isa_flags(isa))}
    assert not flags & {"-march=native", "-mtune=native", "-ffast-math", "-Ofast", "-Werror"}


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a.cpp: In function 'f':\na.cpp:2:3: warning: x\na.cpp:3:1: error: no\na.cpp:4:1: error: more", "a.cpp:3:1: error: no"),
        (
            "/usr/bin/ld: a.o: in function `f':\na.cpp:(.text+0x5): undefined reference to `g'\ncollect2: error: ld returned 1",
            "a.cpp:(.text+0x5): undefined reference to `g'",
        ),
        (
            "/usr/bin/ld: cannot find -lnothing: No such file\ncollect2: error: ld returned 1",
            "/usr/bin/ld: cannot find -lnothing: No such file",
        ),
        ("\nKilled\n", "Killed"),
        ("", ""),
    ],
)
def test_the_first_error_is_the_line_that_says_what_is_wrong(output: str, line: str) -> None:
    assert first_error(output) == line


def test_a_compiler_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    slow = script(tmp_path / "slow", f"(sleep 1; touch {tmp_path}/child) & sleep 60")
    start = time.monotonic()
    assert run_compiler((str(slow),), tmp_path, 0.3) == toolchain.Ran(None, "")
    assert time.monotonic() - start < 30
    time.sleep(1.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow"], "neither the child's file nor temporary ones"


def test_what_a_compiler_says_and_how_it_ends_come_back(tmp_path: Path) -> None:
    noisy = script(tmp_path / "noisy", "echo out; echo err >&2; cat; exit 5")
    assert run_compiler((str(noisy),), tmp_path, 30) == toolchain.Ran(5, "out\nerr\n")
    missing = run_compiler((str(tmp_path / "missing"),), tmp_path, 30)
    assert missing.code == 127 and "not found" in missing.output


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    done = script(tmp_path / "done", "echo $PPID > group")
    assert run_compiler((str(done),), tmp_path, 30).code == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(int((tmp_path / "group").read_text()), 0)
