"""Sources become a library that can be called, under a key of what they are; what fails can be repeated."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvcompile.codegen.build import Build
from kvcompile.codegen.toolchain import BASE_FLAGS, Toolchain, find_toolchain, torch_flags, why_none
from kvcompile.ir.errors import BuildError
from kvcompile.models import cache

SOURCES = {
    "sum.h": 'extern "C" __attribute__((visibility("default"))) int sum(const int* values, int count);\n',
    "sum.cpp": '#include "sum.h"\nint sum(const int* values, int count) { int s = 0; while (count) s += values[--count]; return s; }\n',
    "detail/other.cpp": '#include "sum.h"\nint other() { return 2; }\n',
}
ANY = Toolchain("/usr/bin/g++", "g++ 12.2.0", "gcc")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    monkeypatch.delenv("CXX", raising=False)
    found = find_toolchain()
    if found is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    return found


def library_answers(path: Path) -> bool:
    return ctypes.CDLL(str(path)).sum((ctypes.c_int * 3)(1, 2, 39), 3) == 42


def test_sources_become_a_library_that_can_be_called(compiler: Toolchain, tmp_path: Path) -> None:
    build = Build("sum", SOURCES, BASE_FLAGS, compiler)
    build.into(tmp_path, keep=tmp_path / "failed")
    assert library_answers(tmp_path / build.library)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {*SOURCES, "sum.so"}
    assert (tmp_path / "sum.cpp").read_text() == SOURCES["sum.cpp"]


def test_the_same_sources_give_the_same_bytes_in_any_folder(compiler: Toolchain, tmp_path: Path) -> None:
    build = Build("sum", SOURCES, BASE_FLAGS, compiler)
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        build.into(tmp_path / name, keep=tmp_path / "failed")
    assert (tmp_path / "one" / "sum.so").read_bytes() == (tmp_path / "another" / "sum.so").read_bytes()


def test_warnings_are_kept_beside_the_library(compiler: Toolchain, tmp_path: Path) -> None:
    Build("warned", {"a.cpp": "static int unused() { return 1; }\n"}, BASE_FLAGS, compiler).into(tmp_path, keep=tmp_path / "failed")
    assert "warning: " in (tmp_path / "compiler.txt").read_text()


def test_a_library_of_the_stable_abi_is_an_operator_of_torch(compiler: Toolchain, tmp_path: Path) -> None:
    import torch

    source = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
static int64_t count(torch::stable::Tensor x) { return x.numel(); }
STABLE_TORCH_LIBRARY(kvc_test_build, m) { m.def("count(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(kvc_test_build, CPU, m) { m.impl("count", TORCH_BOX(&count)); }
"""
    flags, link_flags = torch_flags()
    build = Build("launcher", {"launcher.cpp": source}, BASE_FLAGS + flags, compiler, link_flags, (torch.__version__,))
    build.into(tmp_path, keep=tmp_path / "failed")
    torch.ops.load_library(str(tmp_path / build.library))
    assert torch.ops.kvc_test_build.count(torch.zeros(3, 5)) == 15


def test_the_key_is_the_same_in_another_process() -> None:
    script = (
        "from kvcompile.codegen.build import Build\nfrom kvcompile.codegen.toolchain import BASE_FLAGS, Toolchain\n"
        f"print(Build('sum', dict(reversed({SOURCES!r}.items())), BASE_FLAGS, {ANY!r}).key)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert other.stdout.strip() == Build("sum", SOURCES, BASE_FLAGS, ANY).key


def test_whatever_changes_the_result_changes_the_key() -> None:
    build = Build("sum", SOURCES, BASE_FLAGS, ANY)
    others = [
        replace(build, name="add"),
        replace(build, sources={**SOURCES, "sum.h": SOURCES["sum.h"] + "\n"}),
        replace(build, sources={**SOURCES, "more.h": ""}),
        replace(build, flags=(*BASE_FLAGS, "-mavx2")),
        replace(build, link_flags=("-lm",)),
        replace(build, flags=(*BASE_FLAGS, "-lm")),
        replace(build, depends=("torch 2.13.0",)),
        replace(build, toolchain=replace(ANY, version="g++ 13.1.0")),
        replace(build, toolchain=replace(ANY, kind="clang")),
        replace(build, toolchain=replace(ANY, options=("-m32",))),
    ]
    assert len({each.key for each in [build, *others]}) == len(others) + 1
    assert replace(build, toolchain=replace(ANY, command="/opt/bin/g++")).key == build.key


@pytest.mark.parametrize("file", ["/etc/a.cpp", "../a.cpp", "-a.cpp"])
def test_a_source_stays_in_its_folder(file: str) -> None:
    with pytest.raises(AssertionError, match="not a file of the folder"):
        Build("sum", {file: ""}, BASE_FLAGS, ANY)


def test_a_refused_source_is_kept_with_the_command_that_repeats_it(compiler: Toolchain, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    keep = tmp_path / "kept here" / "failed" / "KEY"
    build = Build(
        "broken",
        {"a.h": "#define WORD unknown_word\n", "a.cpp": '#include "a.h"\nint f() { return WORD; }\nint g() { return x; }\n'},
        BASE_FLAGS,
        compiler,
    )
    with pytest.raises(BuildError) as caught:
        build.into(tmp_path / "made", keep=keep)
    first, mend = str(caught.value).splitlines()
    assert first.startswith(f"{keep}: ") and "error: " in first and "unknown_word" in first
    before, _, command = mend.partition(": ")
    assert before == "  The sources are kept there; to repeat it"
    assert command == build.command(keep)
    assert (keep / "a.cpp").read_text() == build.sources["a.cpp"]
    again = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    assert again.returncode != 0
    assert again.stderr == (keep / "compiler.txt").read_text()
    assert first.removeprefix(f"{keep}: ") in again.stderr


def test_an_error_of_the_linker_is_told_too(compiler: Toolchain, tmp_path: Path) -> None:
    build = Build("sum", SOURCES, BASE_FLAGS, compiler, ("-lkvc_nothing",))
    with pytest.raises(BuildError, match="kvc_nothing"):
        build.into(tmp_path, keep=tmp_path / "failed")


def test_a_compiler_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    build = Build("sum", SOURCES, BASE_FLAGS, Toolchain(str(slow), "slow 1", "gcc"))
    with pytest.raises(
        BuildError, match=r"slow did not end within 0\.2 s and was stopped\.\n  The sources are kept there; to repeat it: cd "
    ):
        build.into(tmp_path, keep=tmp_path / "failed", timeout_s=0.2)


def test_a_compiler_that_makes_nothing_is_an_error_and_so_is_a_folder_that_cannot_keep(tmp_path: Path) -> None:
    build = Build("sum", SOURCES, BASE_FLAGS, Toolchain("/bin/true", "true 1", "gcc"))
    with pytest.raises(BuildError, match=r"/bin/true made no library \(exit status 0\)\."):
        build.into(tmp_path, keep=tmp_path / "failed")
    with pytest.raises(BuildError, match=r"The sources could not be kept there: Not a directory\."):
        build.into(tmp_path, keep=tmp_path / "sum.cpp" / "failed")


@pytest.fixture
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KVCOMPILE_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


def test_a_build_that_fails_leaves_the_cache_whole(compiler: Toolchain, cache_root: Path) -> None:
    build = Build("broken", {"a.cpp": "int f( {\n"}, BASE_FLAGS, compiler)
    with (
        pytest.raises(BuildError) as caught,
        cache.use(build.key, lambda folder: build.into(folder, keep=cache.failed(build.key)), what="it", kind="kernels"),
    ):
        pass
    assert caught.value.problems[0].where == str(cache_root / "failed" / build.key)
    assert cache.entries() == []
    assert list((cache_root / "tmp").iterdir()) == []
    assert (cache_root / "failed" / build.key / "a.cpp").is_file()


BUILDER = """
import ctypes, os, sys
from kvcompile.codegen.build import Build
from kvcompile.codegen.toolchain import BASE_FLAGS, Toolchain
from kvcompile.models import cache

build = Build("sum", {sources!r}, BASE_FLAGS, {toolchain!r})

def made(folder):
    with open({log!r}, "a") as log:
        print(os.getpid(), file=log, flush=True)
    build.into(folder, keep=cache.failed(build.key))

with cache.use(build.key, made, what="it", kind="kernels") as folder:
    print(ctypes.CDLL(str(folder / build.library)).sum((ctypes.c_int * 3)(1, 2, 39), 3))
"""


def wait_until_lines(path: Path, count: int) -> list[str]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.02)
    raise AssertionError(f"{path.name} has no {count} lines")


def test_of_four_processes_that_build_at_once_one_may_be_killed(compiler: Toolchain, cache_root: Path, tmp_path: Path) -> None:
    """The one that compiles is killed in the middle; its compiler ends with it, another makes the entry, three get it."""
    slow, log, asked, compiled = (tmp_path / name for name in ("slow-c++", "made", "asked", "compiled"))
    slow.write_text(f'#!/bin/sh\necho x >> {asked}\nsleep 1.5\necho x >> {compiled}\n{compiler.command} "$@"\n')
    slow.chmod(0o755)
    script = BUILDER.format(sources=SOURCES, toolchain=replace(compiler, command=str(slow)), log=str(log))
    started = {}
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started[process.pid] = process
    wait_until_lines(asked, 1)
    [first] = log.read_text().splitlines()
    killed = started.pop(int(first))
    killed.kill()
    killed.communicate(timeout=60)
    for process in started.values():
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "42\n"), errors
    makers = log.read_text().splitlines()
    assert len(makers) == 2 and int(makers[1]) in started
    assert compiled.read_text() == "x\n", "the compiler of the killed process went on"
    [entry] = cache.entries()
    assert cache.find_fault(entry.path) is None
    assert list((cache_root / "tmp").iterdir()) == []
    assert not (cache_root / "failed").exists()


def test_a_broken_library_is_built_again(compiler: Toolchain, cache_root: Path) -> None:
    build = Build("sum", SOURCES, BASE_FLAGS, compiler)
    lines: list[str] = []
    for _ in range(2):
        with cache.use(
            build.key,
            lambda folder: build.into(folder, keep=cache.failed(build.key)),
            what="the library",
            kind="kernels",
            progress=lines.append,
        ) as folder:
            library = folder / build.library
            size_bytes = library.stat().st_size
            library.write_bytes(b"")
    assert lines == [f"the library is broken (sum.so has 0 bytes, not {size_bytes}); making it again"]
