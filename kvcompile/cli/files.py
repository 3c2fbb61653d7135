"""Small files that commands read and write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kvcompile.ir.errors import KvcompileError


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Writes a file that is seen whole or not at all; refuses one that exists unless forced."""
    if path.exists() and not force:
        raise KvcompileError.at(str(path), "it exists.", "Name another file, or add --force.")
    try:
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            Path(aside).chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
            os.replace(aside, path)
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError as error:
        mend = "Name a file in a folder that you may write to."
        raise KvcompileError.at(str(path), f"cannot be written: {error.strerror}.", mend) from error


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file, without its mark."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""
