"""The C++ compiler of this machine, its flags, and how it is run.

The compiler is looked for in this order: $CXX (which may hold options too: "ccache g++"), g++, clang++, c++.  One that is there but
cannot make an empty program (no C++ library headers, no linker) counts as none.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvcompile.ir.errors import TargetError

Isa = Literal["avx512", "avx2", "portable"]

NAMES = ("g++", "clang++", "c++")
PROBE_TIMEOUT_S = 60.0
# No -ffast-math: linking with it switches denormals off for the whole process, torch's threads too.
BASE_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
_NEEDS: dict[Isa, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
# Not -march=native: what it means differs from machine to machine, and a cache may be shared.
_ISA_FLAGS: dict[Isa, tuple[str, ...]] = {
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c",
        "-mprefer-vector-width=512", "-mtune=generic",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mtune=generic"),
    "portable": (),
}  # fmt: skip
_EXTRAS = {"avx512_vnni": "-mavx512vnni", "avx512_bf16": "-mavx512bf16"}
_PROBE = "#include <cmath>\nint main() {}\n"
# Runs the compiler beside a watcher that reads a pipe which only this process can write to.  When this process dies, however it
# dies, the watcher sees the end of the pipe and kills the process group: the compiler proper, assembler and linker too.
_WATCHED = """
exec 3<&0
(read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 &
"$@" 3<&- </dev/null
code=$?
kill -KILL $!
wait $! 2>/dev/null
exit $code
"""


@dataclass(frozen=True)
class Toolchain:
    """A compiler that works.

    command: its absolute path; version: the first line of --version; options: the words that $CXX holds after the first.
    """

    command: str
    version: str
    kind: Literal["gcc", "clang"]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ran:
    """How a compiler ended.  code: 0 is success, None says that the time was over; output: all that it printed."""

    code: int | None
    output: str


def find_toolchain() -> Toolchain | None:
    """The compiler, None if there is none (`why_none` says why).  Looked for once for each value of (PATH, CXX).

    Raises TargetError where $CXX names a compiler that does not work.
    """
    return _looked()[0]


def why_none() -> str:
    """Why `find_toolchain` gives None, in words without a full stop; empty where it gives a compiler."""
    return _looked()[1]


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of the first processor of /proc/cpuinfo, in Linux' words; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def machine_isa() -> Isa:
    """The widest instruction set that this machine has and kernels are written for."""
    return next((isa for isa, needed in _NEEDS.items() if needed <= cpu_flags()), "portable")


def isa_flags(isa: Isa) -> tuple[str, ...]:
    """The compiler flags that switch an instruction set on; to be added to BASE_FLAGS.

    Beside avx512 stands what this machine has of _EXTRAS: how fast whole numbers are multiplied, which changes no result, and whether
    bfloat16 numbers are multiplied in pairs where sessions attend to what they share (codegen/cpp/pairs.h), which rounds otherwise.
    """
    extras = [flag for feature, flag in _EXTRAS.items() if feature in cpu_flags()] if isa == "avx512" else []
    return (*_ISA_FLAGS[isa], *extras)


def torch_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compiler flags and link flags for a source that uses torch's stable ABI, as of torch 2.11."""
    import torch

    home = Path(torch.__file__).parent
    include = ("-isystem", str(home / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000")
    return include, (f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10")


def first_error(output: str) -> str:
    """The line of a compiler's or linker's output that says what is wrong; empty if it printed nothing."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = re.compile(r"\berror: |undefined reference|ld: cannot|ld: library|Undefined symbols")
    return next((line for line in lines if told.search(line)), lines[0] if lines else "")


def run_compiler(arguments: tuple[str, ...], folder: Path, timeout_s: float) -> Ran:
    """Runs a compiler in `folder`, where its temporary files are too; it and its children end with this call or this process."""
    reader, writer = os.pipe()
    scratch = tempfile.mkdtemp(prefix=".compiler-", dir=folder)
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHED, "sh", *arguments],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", "TMPDIR": scratch},
            stdin=reader,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        with process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                return Ran(None, "")
            finally:
                if process.poll() is None:  # not after its end: the number may be another's by then
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return Ran(process.returncode, output)
    finally:
        os.close(writer)
        os.close(reader)
        shutil.rmtree(scratch, ignore_errors=True)


def _looked() -> tuple[Toolchain | None, str]:
    return _look(os.environ.get("PATH"), os.environ.get("CXX", "").strip())


@functools.cache
def _look(path: str | None, cxx: str) -> tuple[Toolchain | None, str]:
    if cxx:
        named, why = _try(cxx, path)
        if named is None:
            raise TargetError.at("CXX", f"{cxx!r} does not work: {why}.", "Name a C++17 compiler, or unset CXX to have one looked for.")
        return named, ""
    faults = []
    for name in NAMES:
        found, why = _try(name, path)
        if found is not None:
            return found, ""
        if shutil.which(name, path=path):
            faults.append(why)
    return None, "; ".join(faults) or f"none of {', '.join(NAMES)} is on PATH, and CXX is not set"


def _try(words: str, path: str | None) -> tuple[Toolchain | None, str]:
    """The compiler of these words, or None and why it is none."""
    try:
        name, *options = shlex.split(words)
    except ValueError as error:
        return None, str(error).lower()
    command = shutil.which(name, path=path)
    if command is None:
        return None, f"{name} is not found" if os.sep in name else f"{name} is not on PATH"
    command = os.path.abspath(command)
    with tempfile.TemporaryDirectory(prefix="kvcompile-") as scratch:
        folder = Path(scratch)
        asked = run_compiler((command, *options, "--version"), folder, PROBE_TIMEOUT_S)
        version = asked.output.strip().partition("\n")[0].strip()
        if asked.code != 0:
            return None, f"{command} --version {_ending(asked)}"
        (folder / "probe.cpp").write_text(_PROBE, encoding="utf-8")
        ran = run_compiler((command, *options, *BASE_FLAGS, "-o", "probe.so", "probe.cpp"), folder, PROBE_TIMEOUT_S)
        if ran.code != 0 or not (folder / "probe.so").is_file():
            return None, f"{command} cannot compile an empty program: {_ending(ran)}"
    return Toolchain(command, version, "clang" if "clang" in asked.output.lower() else "gcc", tuple(options)), ""


def _ending(ran: Ran) -> str:
    if ran.code is None:
        return f"did not end within {PROBE_TIMEOUT_S:g} s"
    return first_error(ran.output) or (f"exit status {ran.code}" if ran.code else "it wrote no file")
