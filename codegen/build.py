"""Generated sources become a shared object; what it is made of gives the key that it is kept under."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvcompile.codegen.toolchain import Ran, Toolchain, first_error, run_compiler
from kvcompile.ir.errors import BuildError

TIMEOUT_S = 600.0
_FORMAT = 1  # of what `into` leaves in a folder
_OUTPUT = "compiler.txt"


@dataclass(frozen=True)
class Build:
    """One shared object and all that it depends on.

    name:       of the library, without ".so"
    sources:    file name -> text.  Those that end in .cpp are compiled, in one call; the others are there to be included
    flags:      of the compiler, instruction set included: BASE_FLAGS + isa_flags(...)
    link_flags: come after the sources
    depends:    what else the result depends on, in words: the version of torch whose headers are included
    """

    name: str
    sources: Mapping[str, str]
    flags: tuple[str, ...]
    toolchain: Toolchain
    link_flags: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for file in (self.name, *self.sources):
            path = PurePosixPath(file)
            assert not path.is_absolute() and ".." not in path.parts and not file.startswith("-"), f"not a file of the folder: {file!r}"
        assert self._compiled, f"{self.name}: nothing to compile"

    @property
    def library(self) -> str:
        """The file name of the result."""
        return f"{self.name}.so"

    @property
    def key(self) -> str:
        """Hash of content, flags, compiler version and kind of machine: 32 hexadecimal digits, the same in every process.

        The compiler's path is not in it; the processor is by its name (x86_64) and by the instruction sets in `flags`.
        """
        content = {
            "format": _FORMAT,
            "name": self.name,
            "sources": dict(self.sources),
            "flags": [*self.toolchain.options, *self.flags],
            "link_flags": self.link_flags,
            "depends": self.depends,
            "compiler": [self.toolchain.kind, self.toolchain.version],
            "machine": [sys.platform, platform.machine()],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The compiler call, for a folder that holds the sources.  No path of that folder is in it, so none is in the library."""
        made = (*self.flags, "-I.", "-o", self.library, *self._compiled, *self.link_flags)
        return (self.toolchain.command, *self.toolchain.options, *made)

    def command(self, folder: Path) -> str:
        """The shell command that compiles the sources in `folder`."""
        return f"cd {shlex.quote(str(folder))} && {shlex.join(self.arguments)}"

    def write(self, folder: Path) -> None:
        """Writes the sources."""
        for file, text in self.sources.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())

    def into(self, folder: Path, *, keep: Path, timeout_s: float = TIMEOUT_S) -> None:
        """Writes the sources into `folder` and compiles them there; warnings, if any, are in compiler.txt.

        keep: where the sources and the compiler's output go if that fails, made anew.  Raises BuildError.
        """
        self.write(folder)
        ran = run_compiler(self.arguments, folder, timeout_s)
        if ran.code != 0 or not (folder / self.library).is_file():
            raise self._failure(ran, keep, timeout_s)
        if ran.output:
            (folder / _OUTPUT).write_text(ran.output, encoding="utf-8")

    @property
    def _compiled(self) -> list[str]:
        return sorted(file for file in self.sources if file.endswith(".cpp"))

    def _failure(self, ran: Ran, keep: Path, timeout_s: float) -> BuildError:
        if ran.code is None:
            what = f"{self.toolchain.command} did not end within {timeout_s:g} s and was stopped."
        else:
            what = first_error(ran.output) or f"{self.toolchain.command} made no library (exit status {ran.code})."
        try:
            shutil.rmtree(keep, ignore_errors=True)
            keep.mkdir(parents=True)
            self.write(keep)
            (keep / _OUTPUT).write_text(ran.output, encoding="utf-8")
        except OSError as error:
            return BuildError.at(str(keep), what, f"The sources could not be kept there: {error.strerror or error}.")
        return BuildError.at(str(keep), what, f"The sources are kept there; to repeat it: {self.command(keep)}")
